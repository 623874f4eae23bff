"""NVRTC by ctypes: CUDA C++ to a cubin on a machine without a GPU (the extra ``luthier[gpu]``: nvidia-cuda-nvrtc)."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.ir.errors import CompilationError, TargetError


@lru_cache(maxsize=1)
def library() -> Any:
    """The NVRTC library of the nvidia-cuda-nvrtc package or of the system. Raises TargetError when there is none."""
    found: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for root in list(spec.submodule_search_locations or []) if spec is not None else []:
        found += sorted(p for p in Path(root).glob("**/libnvrtc.so*") if "builtins" not in p.name)
    for name in [*map(str, found), "libnvrtc.so"]:
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        return lib
    raise TargetError("compiling CUDA needs NVRTC", hint="pip install 'luthier[gpu]'")


def compile_cubin(source: str, arch: str = "sm_90", name: str = "kernel.cu", options: tuple[str, ...] = ()) -> bytes:
    """The cubin (ELF) of CUDA C++ ``source`` for ``arch``. Raises CompilationError with the compiler's log."""
    lib = library()
    prog = ctypes.c_void_p()
    _check(lib, lib.nvrtcCreateProgram(ctypes.byref(prog), source.encode(), name.encode(), 0, None, None))
    try:
        opts = [f"--gpu-architecture={arch}", "--std=c++17", *options]
        arr = (ctypes.c_char_p * len(opts))(*(o.encode() for o in opts))
        rc = lib.nvrtcCompileProgram(prog, len(opts), arr)
        if rc != 0:
            n = ctypes.c_size_t()
            lib.nvrtcGetProgramLogSize(prog, ctypes.byref(n))
            log = ctypes.create_string_buffer(n.value)
            lib.nvrtcGetProgramLog(prog, log)
            raise CompilationError(f"NVRTC: {log.value.decode(errors='replace').strip()}", op=name)
        n = ctypes.c_size_t()
        _check(lib, lib.nvrtcGetCUBINSize(prog, ctypes.byref(n)))
        out = ctypes.create_string_buffer(n.value)
        _check(lib, lib.nvrtcGetCUBIN(prog, out))
        return out.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(prog))


def _check(lib: Any, rc: int) -> None:
    if rc != 0:
        raise CompilationError(f"NVRTC: {lib.nvrtcGetErrorString(rc).decode()}")
