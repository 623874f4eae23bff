"""A Module of CUDA kernels, on a GPU or emulated. Imports neither ``onnx`` nor ``luthier.ir``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from luthier.artifact import check_files
from luthier.backends.cuda_device import Device, Runner
from luthier.backends.cuda_driver import Gpu
from luthier.backends.cuda_emulate import Emulator
from luthier.backends.host_module import HostModule
from luthier.errors import ArtifactError
from luthier.module import Array, Module

__all__ = ["CudaModule", "load_module"]

FILES = ("host.json", "kernels.cu", "kernels.bin", "weights.bin")


class CudaModule(HostModule):
    """``source``: the text of all kernels; ``code``: what was made of it, for the emulator a shared library, else what
    ``host["images"]`` tells apart; ``blob``: all constants."""

    def __init__(
        self, manifest: dict[str, Any], host: dict[str, Any], source: str, code: bytes, blob: Array, threads: int | None = None
    ) -> None:
        super().__init__(manifest, host, blob, threads)
        self.source, self.code = source, code
        self._runner: Runner | None = None

    @property
    def runner(self) -> Runner:
        """The device side, made on first use. Raises TargetError without a GPU."""
        if self._runner is None:
            self._runner = Runner(self.host, self.device(), self._weights)
        return self._runner

    def device(self) -> Device:
        """What runs the kernels. Raises TargetError where there is none."""
        arch = self.manifest["target"]["cpu"]
        if arch == "emulate":
            return Emulator(self.code, self.source)
        return Gpu(self.images("cubin"), self.images("ptx"), arch)

    def images(self, kind: str) -> dict[str, bytes]:
        """{symbol: code}; ``kind``: ``cubin`` or ``ptx``."""
        return {symbol: self.code[at[kind][0] : at[kind][0] + at[kind][1]] for symbol, at in self.host["images"].items()}

    def write_files(self, folder: Path, shard_mb: float | None = None) -> tuple[str, ...]:
        """``host.json``: main as data; ``kernels.cu``: texts; ``kernels.bin``: code; ``weights.bin``: constants."""
        if shard_mb is not None:
            raise ArtifactError(
                f"an artifact for {self.manifest['target']['name']} has no shards", hint="leave the shard size out"
            )
        (folder / "host.json").write_text(json.dumps(self.host), encoding="utf-8")
        (folder / "kernels.cu").write_text(self.source, encoding="utf-8")
        (folder / "kernels.bin").write_bytes(self.code)
        self._weights.tofile(folder / "weights.bin")
        return FILES


def load_module(path: Path, manifest: dict[str, Any], threads: int | None) -> Module:
    """A module of CUDA kernels from its folder. Raises ArtifactError."""
    check_files(path, manifest, FILES)
    host = json.loads((path / "host.json").read_text(encoding="utf-8"))
    weights = np.fromfile(path / "weights.bin", np.uint8)
    return CudaModule(
        manifest, host, (path / "kernels.cu").read_text(encoding="utf-8"), (path / "kernels.bin").read_bytes(), weights, threads
    )
