"""From a Program to a Module for CUDA, or for CUDA emulated on a processor."""

from __future__ import annotations

from collections.abc import Mapping

from luthier import settings
from luthier.backends.cpu import manifest
from luthier.backends.cuda_emulate import build, translation_unit
from luthier.backends.cuda_module import CudaModule
from luthier.backends.native import DTYPES
from luthier.cache import ObjectCache
from luthier.codegen.gpu.cuda_program import build_cuda
from luthier.codegen.gpu.host_expr import check_extents
from luthier.codegen.gpu.nvrtc import Compiled, compile_kernels
from luthier.codegen.targets.cuda import EMULATE
from luthier.codegen.targets.target import Target
from luthier.ir.program import Program

__all__ = ["build_module"]


def build_module(program: Program, target: Target, threads: int | None = None) -> CudaModule:
    """Raises CompilationError, naming node and operator, for what CUDA cannot compute, TargetError without a compiler."""
    check_extents(program)
    g = build_cuda(program)
    info = manifest(program, target, g.calls, int(g.blob.size), g.defaults)
    kernels = list(g.kernels.values())
    host = {
        "pipelines": g.pipelines, "weights": g.weights, "narrow": g.narrow, "within": g.within, "mirrors": g.mirrors,
        "body": g.body,
        "output_bits": [DTYPES[o["code"]][1] for o in info["outputs"]],
    }  # fmt: skip
    if target.cpu == EMULATE:
        source = translation_unit([k.emulated for k in kernels])
        code = build(source) if kernels else b""
    else:
        source = "\n".join(k.source for k in kernels)
        made = compile_kernels([k.source for k in kernels], target.cpu, ObjectCache())
        code, host["images"] = pack({k.symbol: c for k, c in zip(kernels, made, strict=True)})
        info["resources"] = {
            k.symbol: {"registers": c.registers, "stack": c.stack, "spills": c.spills, "shared": c.shared}
            for k, c in zip(kernels, made, strict=True)
        }  # fmt: skip
    if settings.dump.get() is not None:
        for k in kernels:
            settings.write_dump(f"cuda-{k.name}.cu", k.source)
    return CudaModule(info, host, source, code, g.blob, threads)


def pack(kernels: Mapping[str, Compiled]) -> tuple[bytes, dict[str, dict[str, list[int]]]]:
    """All code one after the other, and where each kernel's stands: [first byte, bytes]."""
    parts: list[bytes] = []
    where: dict[str, dict[str, list[int]]] = {}
    at = 0
    for symbol, c in kernels.items():
        for kind, data in (("cubin", c.cubin), ("ptx", c.ptx)):
            where.setdefault(symbol, {})[kind] = [at, len(data)]
            parts += [data, bytes(-len(data) % 16)]
            at += len(data) + -len(data) % 16
    return b"".join(parts), where
