"""A Module whose main a host runs (:mod:`luthier.backends.host_run`): what all devices share. Imports neither ``onnx`` nor
``luthier.ir``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from luthier.backends.host_run import Counters, within
from luthier.backends.native import pack_bits, unpack_bits
from luthier.errors import InputError
from luthier.module import Array, Module, check_out, convert


class Runner(Protocol):
    """The device side of a module. ``counters``: what the last run did."""

    counters: Counters

    def run(self, arrays: Sequence[Array], raw: Sequence[Array]) -> list[tuple[tuple[int, ...], bytes]]:
        """``arrays``: the inputs with their shapes; ``raw``: their bytes as the device wants them. Returns (shape, bytes) of
        every output."""

    def timed(self, arrays: Sequence[Array], raw: Sequence[Array]) -> dict[int, float]:
        """A run whose dispatches are timed one by one: {call number: ms}."""


class HostModule(Module):
    """``host``: the program's main as data; ``blob``: all constants. A subclass has ``runner``."""

    def __init__(self, manifest: dict[str, Any], host: dict[str, Any], blob: Array, threads: int | None = None) -> None:
        super().__init__(manifest, None, blob, threads)
        self.host = host

    @property
    def runner(self) -> Runner:
        """The device side, made on first use. Raises TargetError without a device."""
        raise NotImplementedError

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
                raise InputError(
                    f"input {p.name} has rank {a.ndim}, expected {p.rank}", shapes={"given": a.shape, "expected": p.shape}
                )
            if j in self.host["narrow"] and a.size:
                lo, hi = (-(1 << 31), (1 << 31) - 1) if a.dtype.kind == "i" else (0, (1 << 32) - 1)
                if int(a.min()) < lo or int(a.max()) > hi:
                    raise InputError(
                        f"input {p.name} has integers that 32 bits cannot hold; the kernels that read it take 32-bit integers"
                    )
            ins.append(a)
            raw.append(pack_bits(a, p.bits) if p.bits < 8 else a.reshape(-1).view(np.uint8))
        for j, lo, hi, what in within(self.host, ins):
            a = ins[j].reshape(-1, len(lo))
            bad = np.argwhere((a < lo) | (a > hi))
            if len(bad):
                i, k = bad[0]
                raise InputError(f"{what} in input {self._ins[j].name} is {a[i, k]}, it must be {lo[k]} to {hi[k]}")
        return ins, raw

    def profile(self, inputs: Mapping[str, Any], runs: int = 20) -> list[dict[str, Any]]:
        """As :meth:`Module.profile`: the device's own timestamps where it has them, else the host's clock around every dispatch.
        Calls that only the host does have 0 ms. Times of a device that software emulates say nothing about a GPU."""
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
