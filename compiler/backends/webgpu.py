"""From a Program to a Module for WebGPU."""

from __future__ import annotations

from typing import Any

from luthier import settings
from luthier.backends.cpu import manifest
from luthier.backends.native import DTYPES
from luthier.backends.webgpu_module import WebGpuModule
from luthier.codegen.gpu.host_expr import check_extents
from luthier.codegen.gpu.webgpu import GpuProgram, build_webgpu
from luthier.codegen.gpu.webgpu_features import STANDARD
from luthier.codegen.gpu.webgpu_report import report
from luthier.codegen.targets.target import Target
from luthier.ir.program import Program

__all__ = ["build_module"]


def build_module(program: Program, target: Target, threads: int | None = None) -> WebGpuModule:
    """Raises CompilationError, naming node and operator, for what WebGPU cannot compute."""
    check_extents(program)
    g = build_webgpu(program)
    info = manifest(program, target, g.calls, int(g.blob.size), g.defaults)
    _dump(g, program)
    return WebGpuModule(info, host_data(g, info), g.shaders, g.blob, threads)


def host_data(g: GpuProgram, info: dict[str, Any]) -> dict[str, Any]:
    """What :mod:`luthier.backends.webgpu_device` runs, as JSON data."""
    return {
        "pipelines": g.pipelines, "features": g.features, "weights": g.weights, "narrow": g.narrow, "within": g.within, "fixed": g.fixed, "mirrors": g.mirrors, "body": g.body,
        "output_bits": [DTYPES[o["code"]][1] for o in info["outputs"]],
    }  # fmt: skip


def _dump(g: GpuProgram, program: Program) -> None:
    """With LUTHIER_DUMP: what main does, and every shader."""
    if settings.dump.get() is None:
        return
    settings.write_dump("webgpu-main.txt", report(g, program.nodes))
    for k, text in enumerate(g.shaders):
        text = STANDARD.write(text, g.features[k])
        settings.write_dump(f"wgsl-{k:03d}-{g.names[k]}.txt", text)
