"""A Module whose kernels run on WebGPU in this process (through ``wgpu``). Imports neither ``onnx`` nor ``luthier.ir``."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from luthier.artifact import check_files
from luthier.backends.host_module import HostModule
from luthier.backends.webgpu_device import Runner
from luthier.codegen.gpu.webgpu_features import ALL
from luthier.errors import InputError
from luthier.module import Array, Module

__all__ = ["WebGpuModule", "load_module"]

FILES = ("host.json", "shaders.json")


class WebGpuModule(HostModule):
    """``shaders``: WGSL texts; ``host``: the program's main as data (:mod:`luthier.codegen.gpu.webgpu`); ``blob``: all constants."""

    is_package = True

    def __init__(self, manifest: dict[str, Any], host: dict[str, Any], shaders: Sequence[str], blob: Array, threads: int | None = None) -> None:
        super().__init__(manifest, host, blob, threads)
        self.shaders = list(shaders)
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
