"""The six ways to run or to accept a gate kernel. Each backend is a Runner made by a function that says why it is missing."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.codegen.gpu.cuda import CudaKernel, legalize_cuda, print_cuda
from luthier.codegen.gpu.nvrtc import compile_kernel
from luthier.codegen.gpu.wgsl import Shader, legalize_wgsl, print_wgsl
from luthier.codegen.wasm.printer import legalize_wasm
from luthier.codegen.wasm.run import run_wasm
from luthier.ir.loop import Func
from luthier.passes.loop.lower_subbyte import is_subbyte, lower_subbyte, pack_array, unpack_array
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.select import build_kernel
from tests.cuda import run_cuda

WASM = Capabilities(vector_bits=128, registers=15, index_bits=32, features=frozenset({"relaxed_simd"}))
GPU = Capabilities(vector_bits=32, registers=64, gpu=True, index_bits=32)


def packed(f: Func, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as the kernel's memory wants them: sub-byte elements packed into bytes."""
    return {b.name: pack_array(arrays[b.name], b.dtype) if is_subbyte(b.dtype) else arrays[b.name] for b in f.buffers}


def unpacked(f: Func, memory: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Written sub-byte buffers back into the arrays of the harness."""
    for b in f.buffers:
        if b.writable and is_subbyte(b.dtype):
            arrays[b.name][...] = unpack_array(memory[b.name], b.dtype, arrays[b.name].shape)


def printable(f: Func, caps: Capabilities) -> Func:
    """The shared loop passes."""
    return lower_subbyte(build_kernel(f, caps))


# ---------------------------------------------------------------- WebAssembly


def wasm(f: Func, arrays: Mapping[str, Any], scalars: Mapping[str, int]) -> None:
    memory = packed(f, arrays)
    run_wasm(legalize_wasm(build_kernel(f, WASM)), memory, scalars)
    unpacked(f, memory, arrays)


# ---------------------------------------------------------------- WGSL and CUDA


def shader(f: Func) -> Shader:
    return print_wgsl(legalize_wgsl(printable(f, GPU)))


def wgsl(f: Func, arrays: Mapping[str, Any], scalars: Mapping[str, int]) -> None:
    from luthier.codegen.gpu.wgsl_run import run_wgsl

    memory = packed(f, arrays)
    run_wgsl(shader(f), memory, scalars)
    unpacked(f, memory, arrays)


def cuda_kernel(f: Func) -> CudaKernel:
    return print_cuda(legalize_cuda(printable(f, GPU)))


def cuda(f: Func, arrays: Mapping[str, Any], scalars: Mapping[str, int]) -> None:
    """Emulated."""
    memory = packed(f, arrays)
    run_cuda(cuda_kernel(f), memory, scalars)
    unpacked(f, memory, arrays)


def cubin(f: Func) -> bytes:
    return compile_kernel(cuda_kernel(f).source, name=f"{f.name}.cu").cubin


# ---------------------------------------------------------------- LLVM


class LlvmKernel:
    """A kernel printed as LLVM text, compiled by the code generator alone and linked in this process."""

    def __init__(self, f: Func) -> None:
        import llvmlite.binding as llvm

        from luthier.codegen.llvm.printer import print_kernels
        from luthier.codegen.targets.target import host

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.target = host()
        self.f = printable(f, self.target.caps)
        self.text = print_kernels([("kernel", self.f)], self.target)
        mod = llvm.parse_assembly(self.text)
        mod.verify()
        tm = llvm.Target.from_triple(self.target.triple).create_target_machine(cpu=self.target.cpu, features=self.target.features, opt=3)
        self.engine = llvm.create_mcjit_compiler(mod, tm)
        self.engine.finalize_object()
        types = [ctypes.c_void_p for _ in self.f.buffers]
        types += [{"f32": ctypes.c_float, "f64": ctypes.c_double}.get(v.dtype.name, ctypes.c_int64) for v in self.f.scalars]  # type: ignore[misc]
        self.call = ctypes.CFUNCTYPE(None, *types, ctypes.c_int64, ctypes.c_int64)(self.engine.get_function_address("kernel"))

    def rounds(self, scalars: Mapping[str, int]) -> int:
        from luthier.codegen.llvm.printer import parallel_loop
        from luthier.ir.expr import free_vars
        from luthier.ir.interpret.loops import evaluate_expr

        p = parallel_loop(self.f)
        return 1 if p is None else int(evaluate_expr(p[1], {v: scalars[v.attr[0]] for v in free_vars(p[1])}))

    def __call__(self, arrays: Mapping[str, Any], scalars: Mapping[str, int]) -> None:
        ptrs = [arrays[b.name].ctypes.data for b in self.f.buffers]
        self.call(*ptrs, *(scalars[v.attr[0]] for v in self.f.scalars), 0, self.rounds(scalars))


def llvm(f: Func, arrays: Mapping[str, Any], scalars: Mapping[str, int]) -> None:
    a = {k: np.ascontiguousarray(v) for k, v in packed(f, arrays).items()}
    LlvmKernel(f)(a, scalars)
    for k, v in arrays.items():
        if a[k] is not v and a[k].dtype == v.dtype:
            v[...] = a[k]
    unpacked(f, a, arrays)
