"""CUDA kernels on this machine's processor: their text is compiled as it stands behind ``cuda_builtins.h``, and
``cuda_emulate.cpp`` runs threads as fibers. Every launch runs twice, threads and blocks forwards and backwards: outputs that
differ are a race (``LUTHIER_CUDA_CHECKS=orders``, the default); ``races`` looks at every access instead, and finds what makes no
difference by chance. Needs neither ``onnx`` nor ``luthier.ir``."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.resources
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier import settings
from luthier.cache import ObjectCache
from luthier.errors import CompilationError, KernelError, OutOfMemoryError, TargetError

Array = np.ndarray[Any, Any]

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fwrapv", "-fno-strict-aliasing", "-fno-math-errno", "-ffp-contract=off", "-w")
CHECKS = ("-fsanitize=bounds", "-fno-exceptions", "-fno-rtti")
RACES = ("-fsanitize=thread",)  # calls before every access, which the runtime answers: no library is linked for it
COMPILERS = ("c++", "g++", "clang++")
_lock = threading.Lock()  # kernels of one process run one at a time: their state is the runtime's


class _Argument(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p), ("n", ctypes.c_longlong)]


@functools.lru_cache(maxsize=1)
def compiler() -> str:
    """A C++ compiler. Raises TargetError without one."""
    wanted = settings.cxx.get()
    for name in [wanted] if wanted else COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    raise TargetError("emulating CUDA needs a C++ compiler", hint=f"install g++ or clang++, or set {settings.cxx.name}")


def _runtime(name: str) -> str:
    return importlib.resources.files("luthier.codegen.runtime").joinpath(name).read_text(encoding="utf-8")


def build(source: str, checks: Sequence[str] = CHECKS) -> bytes:
    """A shared library of C++ ``source`` behind the header, from the cache where it is there. Raises CompilationError with the
    compiler's words."""
    header = _runtime("cuda_builtins.h")
    flags = (*FLAGS, *checks)
    key = hashlib.sha256("\0".join([compiler(), os.uname().machine, *flags, header, source]).encode()).hexdigest()
    cache = ObjectCache()
    hit = cache.get(key)
    if hit is not None:
        return hit
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        (Path(folder) / "cuda_builtins.h").write_text(header, encoding="utf-8")
        (Path(folder) / "kernels.cpp").write_text(source, encoding="utf-8")
        for command in ((*flags, "-c", "kernels.cpp", "-o", "kernels.o"), ("-shared", "kernels.o", "-o", "kernels.so")):
            done = subprocess.run([compiler(), *command], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise CompilationError(f"{compiler()} refuses the kernels: {done.stderr.strip()[:2000]}")
        data = (Path(folder) / "kernels.so").read_bytes()
    cache.put(key, data)
    return data


def translation_unit(kernels: Sequence[str]) -> str:
    """One source for all kernels of a module."""
    return "\n".join(['#include "cuda_builtins.h"', *kernels])


def _load(data: bytes) -> ctypes.CDLL:
    """A shared library from memory."""
    with tempfile.NamedTemporaryFile(prefix="luthier-", suffix=".so") as f:
        f.write(data)
        f.flush()
        return ctypes.CDLL(f.name)


@functools.lru_cache(maxsize=1)
def _launcher() -> Any:
    return _load(build(_runtime("cuda_emulate.cpp"), ())).lt_launch


class Emulator:
    """A device for :class:`luthier.backends.cuda_device.Runner`. ``source``: what the kernels were printed as, for messages."""

    def __init__(self, library: bytes, source: str) -> None:
        self.launcher = _launcher()
        self.checks = settings.cuda_checks.get()
        if "races" in self.checks and library:
            library = build(source, (*CHECKS, *RACES))
        self.library = _load(library) if library else None
        self.lines = source.split("\n")

    def allocate(self, size: int) -> Array:
        """``size`` bytes from a multiple of 64. Raises OutOfMemoryError."""
        try:
            raw = np.empty(size + 64, np.uint8)
        except (MemoryError, ValueError) as e:
            raise OutOfMemoryError(f"no memory for a buffer of {size} bytes") from e
        at = -raw.ctypes.data % 64
        return raw[at : at + size]

    def upload(self, to: Array, offset: int, data: Any) -> None:
        raw = np.frombuffer(data, np.uint8)
        to[offset : offset + raw.size] = raw

    def copy(self, src: Array, so: int, dst: Array, do: int, n: int) -> None:
        dst[do : do + n] = src[so : so + n].copy()

    def download(self, src: Array, offset: int, n: int) -> bytes:
        return src[offset : offset + n].tobytes()

    def launch(
        self, p: Mapping[str, Any], bound: Sequence[tuple[Array, int, int]], scalars: Sequence[bytes], grid: tuple[int, int, int]
    ) -> None:
        """``bound``: (memory, byte, elements) of each buffer. Raises KernelError for a race, a divergent barrier, an index out of
        bounds."""
        args = (_Argument * (len(bound) + len(scalars)))()
        written = []
        for k, ((memory, at, count), (name, width, writes)) in enumerate(zip(bound, p["buffers"], strict=True)):
            args[k].p, args[k].n = memory.ctypes.data + at, count
            if writes:
                written.append((name, memory[at : at + count * width], width))
        for k, word in enumerate(scalars, len(bound)):
            args[k].p = int.from_bytes(word, "little")
        twice = "orders" in self.checks
        before = [m.copy() for _, m, _ in written] if twice else []
        self.run(p, args, grid, False)
        if not twice:
            return
        first = [m.copy() for _, m, _ in written]
        for (_, m, _), old in zip(written, before, strict=True):
            m[...] = old
        self.run(p, args, grid, True)
        for (name, m, width), got in zip(written, first, strict=True):
            differ = np.flatnonzero(m != got)
            if len(differ):
                many = len(np.unique(differ // width))
                raise KernelError(
                    f"race: {many} of {m.size // width} elements of {name} depend on the order of threads, "
                    f"the first is {differ[0] // width}",
                    op=p["symbol"],
                    node=", ".join(p["nodes"]) or None,
                    hint="a barrier is missing",
                )

    def wait(self) -> None:
        """A launch is over when it returns."""

    def run(self, p: Mapping[str, Any], args: Any, grid: tuple[int, int, int], back: bool) -> None:
        dims = (ctypes.c_uint * 6)(*grid, *p["group"])
        message = ctypes.create_string_buffer(512)
        assert self.library is not None
        with _lock:
            failed = self.launcher(
                getattr(self.library, f"call_{p['symbol']}"),
                self.library.lt_bind,
                args,
                dims,
                int(p["waits"]),
                int(back),
                message,
            )
        if failed:
            text, _, line = message.value.decode(errors="replace").partition("\tline ")
            number, _, where = line.partition(" ")
            at = f": {self.lines[int(number) - 1].strip()} {where}" if line else ""
            raise KernelError(f"{text}{at}", op=p["symbol"], node=", ".join(p["nodes"]) or None)
