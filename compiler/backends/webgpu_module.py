"""A Module whose kernels run on WebGPU in this process (through ``wgpu``). Imports neither ``onnx`` nor ``luthier.ir``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.artifact import check_files
from luthier.backends.native import pack_bits, unpack_bits
from luthier.backends.webgpu_device import Runner
from luthier.codegen.gpu.webgpu_features import ALL
from luthier.errors import InputError
from luthier.module import Array, Module, check_out, convert

__all__ = ["WebGpuModule", "load_module"]

FILES = ("host.json", "shaders.json")


class WebGpuModule(Module):
    """``shaders``: WGSL texts; ``host``: the program's main as data (:mod:`luthier.codegen.gpu.webgpu`); ``blob``: all constants."""

    is_package = True

    def __init__(self, manifest: dict[str, Any], host: dict[str, Any], shaders: Sequence[str], blob: Array, threads: int | None = None) -> None:
        super().__init__(manifest, None, blob, threads)
        self.host, self.shaders = host, list(shaders)
        self._runner: Runner | None = None
        self._allowed: tuple[str, ...] | None = None

    @property
    def runner(self) -> Runner:
        """The device side, made on first use. Raises TargetError without an adapter."""
        if self._runner is None:
            self._runner = Runner(self.host, self.shaders, self._weights, self._allowed)
        return self._runner

    @property
    def features(self) -> tuple[str, ...]:
        """Optional features of WebGPU that the kernels of this module use here. Raises TargetError without an adapter."""
        return self.runner.features

    def allow_features(self, names: Collection[str] | None) -> None:
        """From now on use no optional features but these (WebGPU's names); None: all that the adapter has, unless ``LUTHIER_WEBGPU_FEATURES``
        says less. Raises InputError for a name that is no optional feature."""
        unknown = sorted(set(names or ()) - set(ALL))
        if unknown:
            raise InputError(f"no optional WebGPU feature {unknown[0]!r}", hint="known: " + ", ".join(ALL))
        self._allowed = None if names is None else tuple(names)
        self._runner = None

    def counters(self) -> dict[str, int]:
        """What the last run did: ``dispatches``, ``submits``, ``crossings``, ``bytes_bound``."""
        return dataclasses.asdict(self.runner.counters)

    def _run(self, arrays: Sequence[Any], out: Mapping[str, Array] | None, profile: int = 0) -> dict[str, Array]:
        ins, raw = self._bytes(arrays)
        got = self.runner.run(ins, raw)
        results: dict[str, Array] = {}
        own: list[Array] = []
        for q, (shape, data) in zip(self._outs, got, strict=True):
            flat = np.frombuffer(bytearray(data), np.uint8)
            if q.bits < 8:
                a = unpack_bits(flat, q.bits, shape, q.dtype, not q.dtype.name.startswith("u"))
            else:
                a = flat.view(q.dtype).reshape(shape)
            given = None if out is None else out.get(q.name)
            if given is not None:
                check_out(given, q, shape, outs=own)
                given[...] = a
                own.append(given)
                a = given
            results[q.name] = a
        return results

    def _bytes(self, arrays: Sequence[Any]) -> tuple[list[Array], list[Array]]:
        """The inputs, converted, and their bytes as the device wants them."""
        ins: list[Array] = []
        raw: list[Array] = []
        for j, (p, a) in enumerate(zip(self._ins, arrays, strict=True)):
            if type(a) is not np.ndarray or a.dtype != p.dtype or not a.flags.c_contiguous:
                a = convert(a, p)
            if a.ndim != p.rank:
                raise InputError(f"input {p.name} has rank {a.ndim}, expected {p.rank}", shapes={"given": a.shape, "expected": p.shape})
            if j in self.host["narrow"] and a.size:
                lo, hi = (-(1 << 31), (1 << 31) - 1) if a.dtype.kind == "i" else (0, (1 << 32) - 1)
                if int(a.min()) < lo or int(a.max()) > hi:
                    raise InputError(f"input {p.name} has integers that 32 bits cannot hold; the kernels that read it take 32-bit integers")
            ins.append(a)
            raw.append(pack_bits(a, p.bits) if p.bits < 8 else a.reshape(-1).view(np.uint8))
        for j, lo, hi, what in self.runner.within(ins):
            a = ins[j].reshape(-1, len(lo))
            bad = np.argwhere((a < lo) | (a > hi))
            if len(bad):
                i, k = bad[0]
                raise InputError(f"{what} in input {self._ins[j].name} is {a[i, k]}, it must be {lo[k]} to {hi[k]}")
        return ins, raw

    def profile(self, inputs: Mapping[str, Any], runs: int = 20) -> list[dict[str, Any]]:
        """As :meth:`Module.profile`: the device's own timestamps where the adapter has them, else the host's clock around every dispatch.
        Calls that only the host does have 0 ms. Times of a software adapter say nothing about a GPU."""
        ins, raw = self._bytes(self._given(inputs))
        total: dict[int, float] = {}
        self.runner.run(ins, raw)
        for _ in range(runs):
            for k, ms in self.runner.timed(ins, raw).items():
                total[k] = total.get(k, 0.0) + ms / runs
        return [
            {"kernel": c["kernel"], "nodes": tuple(c["nodes"]), "ms": total.get(k, 0.0), "flops": 0, "bytes": 0}
            for k, c in enumerate(self.manifest["calls"])
        ]

    def write_files(self, folder: Path, shard_mb: float | None = None) -> tuple[str, ...]:
        """An npm package; ``host.json`` in it is for :func:`load_module` alone."""
        from luthier.backends.web_package import SHARD_MB, write_package
        from luthier.codegen.gpu.host_js import print_host_js

        files = {
            "host.json": json.dumps(self.host), "shaders.json": json.dumps(self.shaders),
            "program.js": print_host_js(self.host),
        }  # fmt: skip
        return write_package(folder, self.manifest, self._weights, files, SHARD_MB if shard_mb is None else shard_mb, self.files)


def load_module(path: Path, manifest: dict[str, Any], threads: int | None) -> Module:
    """A module of WGSL from its folder. Raises ArtifactError."""
    from luthier.backends.web_package import read_weights
    from luthier.manifest import demand

    demand(manifest, path, "web")
    check_files(path, manifest, [*FILES, *(s["file"] for s in manifest["web"]["shards"])])
    host = json.loads((path / "host.json").read_text(encoding="utf-8"))
    shaders = json.loads((path / "shaders.json").read_text(encoding="utf-8"))
    return WebGpuModule(manifest, host, shaders, read_weights(path, manifest), threads)
