"""From a Program to a Module for CUDA, or for CUDA emulated on a processor."""

from __future__ import annotations

from luthier import settings
from luthier.backends.cpu import manifest
from luthier.backends.cuda_emulate import build, translation_unit
from luthier.backends.cuda_module import CudaModule
from luthier.backends.native import DTYPES
from luthier.codegen.gpu.cuda_program import build_cuda
from luthier.codegen.gpu.host_expr import check_extents
from luthier.codegen.targets.cuda import EMULATE
from luthier.codegen.targets.target import Target
from luthier.errors import TargetError
from luthier.ir.program import Program

__all__ = ["build_module"]


def build_module(program: Program, target: Target, threads: int | None = None) -> CudaModule:
    """Raises CompilationError, naming node and operator, for what CUDA cannot compute, TargetError without a compiler."""
    check_extents(program)
    g = build_cuda(program)
    info = manifest(program, target, g.calls, int(g.blob.size), g.defaults)
    if target.cpu != EMULATE:
        raise TargetError(f"{target.name} is not there yet", hint="compile for cuda:emulate")
    source = translation_unit([k.emulated for k in g.kernels.values()])
    code = build(source) if g.kernels else b""
    if settings.dump.get() is not None:
        for k in g.kernels.values():
            settings.write_dump(f"cuda-{k.name}.cu", k.source)
    host = {
        "pipelines": g.pipelines, "weights": g.weights, "narrow": g.narrow, "within": g.within, "mirrors": g.mirrors, "body": g.body,
        "output_bits": [DTYPES[o["code"]][1] for o in info["outputs"]],
    }  # fmt: skip
    return CudaModule(info, host, source, code, g.blob, threads)
