"""NVRTC by ctypes: CUDA C++ to a cubin and PTX on a machine without a GPU (the extra ``luthier[cuda]``: nvidia-cuda-nvrtc)."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from luthier.codegen.targets.target import usable_cores
from luthier.ir.errors import CompilationError, TargetError

OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--disable-warnings")


class Cache(Protocol):
    """Bytes by key."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Compiled:
    """``cubin``: machine code (ELF); ``ptx``: the same for architectures to come; ``registers``: of a thread; ``stack``,
    ``spills``: bytes of a thread in memory, and of them those stored because registers ran out; ``shared``: bytes of a block."""

    cubin: bytes
    ptx: bytes
    registers: int
    stack: int
    spills: int
    shared: int


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
    raise TargetError("compiling CUDA needs NVRTC", hint="pip install 'luthier[cuda]', or compile for cuda:emulate")


def version() -> str:
    """Of NVRTC. Raises TargetError."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_kernel(source: str, arch: str = "sm_90", name: str = "kernel.cu", options: tuple[str, ...] = ()) -> Compiled:
    """CUDA C++ of one kernel for ``arch``. Raises CompilationError with the compiler's log."""
    lib = library()
    prog = ctypes.c_void_p()
    _check(lib, lib.nvrtcCreateProgram(ctypes.byref(prog), source.encode(), name.encode(), 0, None, None))
    try:
        opts = [f"--gpu-architecture={arch}", *OPTIONS, *options]
        arr = (ctypes.c_char_p * len(opts))(*(o.encode() for o in opts))
        rc = lib.nvrtcCompileProgram(prog, len(opts), arr)
        log = _take(lib, prog, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if rc != 0:
            raise CompilationError(f"NVRTC: {log.strip()}", op=name)

        def number(pattern: str) -> int:
            return sum(map(int, re.findall(pattern, log)))

        return Compiled(
            _take(lib, prog, "CUBIN"),
            _take(lib, prog, "PTX").rstrip(b"\0"),
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes smem"),
        )
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(prog))


def compile_kernels(sources: Sequence[str], arch: str, cache: Cache) -> list[Compiled]:
    """As many at a time as there are cores; what the cache has is not compiled again. Raises CompilationError."""
    made = version()

    def one(source: str) -> Compiled:
        key = hashlib.sha256("\0".join(["nvrtc", made, arch, *OPTIONS, source]).encode()).hexdigest()
        hit = cache.get(key)
        if hit is None:
            c = compile_kernel(source, arch)
            if (
                c.spills
            ):  # the assembler aims at several blocks a processor: it need not where a thread's values have no room then
                c = min(
                    c,
                    compile_kernel(re.sub(r"__launch_bounds__\((\d+)\)", r"__launch_bounds__(\1, 1)", source), arch),
                    key=lambda c: c.spills,
                )
            numbers = json.dumps([len(c.cubin), c.registers, c.stack, c.spills, c.shared]).encode()
            cache.put(key, numbers + b"\n" + c.cubin + c.ptx)
            return c
        head, _, body = hit.partition(b"\n")
        size, *numbers = json.loads(head)
        return Compiled(body[:size], body[size:], *numbers)

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(one, sources))


def _take(lib: Any, prog: Any, what: str) -> bytes:
    n = ctypes.c_size_t()
    _check(lib, getattr(lib, f"nvrtcGet{what}Size")(prog, ctypes.byref(n)))
    out = ctypes.create_string_buffer(n.value)
    _check(lib, getattr(lib, f"nvrtcGet{what}")(prog, out))
    return out.raw


def _check(lib: Any, rc: int) -> None:
    if rc != 0:
        raise CompilationError(f"NVRTC: {lib.nvrtcGetErrorString(rc).decode()}")
