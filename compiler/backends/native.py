"""The C side of a compiled module as Python sees it: tensors, contexts, memory. Imports nothing but numpy and the leaf modules.

``lt_tensor`` is ``{void *data; int64 capacity; int32 dtype; int32 rank; int64 shape[8]}``, 88 bytes; an array of them is an
array of 64-bit words, 11 for each, so that filling one costs a few item assignments.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from luthier import settings
from luthier.errors import ArtifactError, InputError, KernelError, LuthierError, OutOfMemoryError
from luthier.files import open_regular

ABI_VERSION = 1
EXPORTS = (
    "lt_abi_version", "lt_create", "lt_destroy", "lt_run", "lt_infer", "lt_message", "lt_free", "lt_set_profile", "lt_set_spin",
    "lt_threads",
)  # fmt: skip
WORDS = 11
MAX_RANK = 8

# ONNX's codes of element types: (name of the numpy or ml_dtypes type, bits in the ABI)
DTYPES: dict[int, tuple[str, int]] = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16), 6: ("int32", 32), 7: ("int64", 64),
    9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64), 12: ("uint32", 32), 13: ("uint64", 64), 16: ("bfloat16", 16),
    17: ("float8_e4m3fn", 8), 18: ("float8_e4m3fnuz", 8), 19: ("float8_e5m2", 8), 20: ("float8_e5m2fnuz", 8), 21: ("uint4", 4),
    22: ("int4", 4), 23: ("float4_e2m1fn", 4), 24: ("float8_e8m0fnu", 8), 25: ("uint2", 2), 26: ("int2", 2),
}  # fmt: skip


def numpy_dtype(name: str) -> np.dtype[Any]:
    """A numpy dtype by name; names that only ml_dtypes has need that package. Raises ArtifactError without it."""
    try:
        return np.dtype(name)
    except TypeError:
        try:
            import ml_dtypes
        except ImportError as e:
            raise ArtifactError(f"elements of type {name} need the package ml_dtypes", hint="pip install ml_dtypes") from e
        return np.dtype(getattr(ml_dtypes, name))


class Native(Protocol):
    """Where the functions of a module live: a library linked in memory, or a file."""

    def address(self, symbol: str) -> int: ...


class SharedObject:
    """``model.so`` opened with the dynamic loader. Raises ArtifactError when it cannot be opened or lacks a function."""

    def __init__(self, path: Path) -> None:
        try:
            self._dll = ctypes.CDLL(str(path))
        except OSError as e:
            raise ArtifactError(f"cannot open {path}: {e}") from e

    def address(self, symbol: str) -> int:
        f = getattr(self._dll, symbol, None)
        if f is None:
            raise ArtifactError(f"the library lacks {symbol}")
        return int(ctypes.cast(f, ctypes.c_void_p).value or 0)


class Functions:
    """The ABI of one module as callables. ``keep``: what must outlive them."""

    def __init__(self, native: Native) -> None:
        p, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64

        def fn(name: str, result: Any, *args: Any) -> Callable[..., Any]:
            return ctypes.CFUNCTYPE(result, *args)(native.address(name))

        self.keep = native
        version = fn("lt_abi_version", i32)()
        if version != ABI_VERSION:
            raise ArtifactError(f"the library has ABI version {version}, this package needs {ABI_VERSION}", hint="compile the model again")
        self.create = fn("lt_create", p, p, i64, i32)
        self.destroy = fn("lt_destroy", None, p)
        self.run = fn("lt_run", i32, p, p, i32, p, i32)
        self.infer = fn("lt_infer", i32, p, p, i32, p, i32)
        self.message = fn("lt_message", ctypes.c_char_p, p)
        self._free = fn("lt_free", None, p)
        self.set_profile = fn("lt_set_profile", None, p, p)
        self.set_spin = fn("lt_set_spin", None, p, i64)
        self.threads = fn("lt_threads", i32, p)

    def free(self, ptr: int) -> None:
        """Release an output. A method, so that a pending release keeps the library in memory."""
        self._free(ptr)


def _destroy(fns: Functions, ptr: int, weights: np.ndarray[Any, Any]) -> None:
    """Ends a context's threads. The arguments keep the code and the weights in memory until then, whatever order objects die in."""
    fns.destroy(ptr)


class Context:
    """One caller's state: threads, temporaries, and the two arrays of tensors that calls reuse."""

    def __init__(self, fns: Functions, weights: np.ndarray[Any, Any], threads: int, n_in: int, n_out: int) -> None:
        self.fns = fns
        self.weights = weights
        self.ptr = fns.create(weights.ctypes.data, weights.nbytes, threads)
        if not self.ptr:
            raise LuthierError("no memory for the state of the module")
        if settings.spin_us.is_set():
            fns.set_spin(self.ptr, settings.spin_us.get() * 1000)
        self.ins = (ctypes.c_int64 * (WORDS * max(n_in, 1)))()  # item assignment is quicker here than in numpy
        self.outs = (ctypes.c_int64 * (WORDS * max(n_out, 1)))()
        self.args = (self.ptr, ctypes.addressof(self.ins), n_in, ctypes.addressof(self.outs), n_out)
        self.key: Any = None
        self._end = weakref.finalize(self, _destroy, fns, self.ptr, weights)  # also at exit

    def check(self, status: int) -> None:
        """Raise what a status other than 0 means."""
        if status:
            text = (self.fns.message(self.ptr) or b"").decode(errors="replace").strip()
            if status == 1 or status == 2:
                raise InputError(text or "the inputs do not fit the module")
            kind = OutOfMemoryError if status == 3 else KernelError
            raise kind(text or f"the module failed with status {status}")

    def close(self) -> None:
        self._end()
        self.ptr = 0


_byte: Any = ctypes.c_char.from_buffer
_addressof = ctypes.addressof


def address(a: np.ndarray[Any, Any]) -> int:
    """Where an array's data starts (a third of a microsecond for writable arrays, some for others)."""
    try:
        return _addressof(_byte(a))
    except (TypeError, ValueError, BufferError):  # read-only or empty
        return int(a.ctypes.data)


def aligned(size: int, fill: bool = True) -> np.ndarray[Any, Any]:
    """``size`` bytes at a 64-byte boundary, huge pages where the system gives them."""
    if size >= 1 << 21:
        m = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                m.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages: ordinary ones serve
        return np.frombuffer(m, np.uint8, size)
    raw = np.zeros(size + 64, np.uint8) if fill else np.empty(size + 64, np.uint8)
    o = -raw.ctypes.data % 64
    return raw[o : o + max(size, 1)]


MAPPED = 1 << 22  # bytes from which weights are mapped


def map_file(path: Path) -> tuple[np.ndarray[Any, Any], Callable[[], None] | None]:
    """(a file's bytes, a check that it has not been cut short since). Large files are mapped and share their pages between processes: to
    read one behind its new end kills a process, so calls check first. Small ones are copied and need no check. Raises ArtifactError."""
    try:
        f = open_regular(path)
    except OSError as e:
        raise ArtifactError(f"cannot read {path}: {e.strerror or e}") from e
    size = os.fstat(f.fileno()).st_size
    if size < MAPPED:
        with f:
            out = aligned(size, False)
            f.readinto(out[:size].data)
        return out, None
    m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def intact() -> None:
        if os.fstat(f.fileno()).st_size < size:
            raise ArtifactError(f"{path} was cut short after it was loaded", hint="write another file and rename it; load the artifact again")

    return np.frombuffer(m, np.uint8), intact


def owned(ptr: int, nbytes: int, free: Callable[[int], None]) -> np.ndarray[Any, Any]:
    """Memory that the module allocated, as bytes; released with the last array that refers to it."""
    if nbytes == 0:
        free(ptr)
        return np.empty(0, np.uint8)
    buf = (ctypes.c_uint8 * nbytes).from_address(ptr)
    weakref.finalize(buf, free, ptr)
    return np.frombuffer(memoryview(buf), np.uint8)


def pack_bits(a: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Elements of 1, 2 or 4 bits into bytes, the first element lowest."""
    per = 8 // bits
    v = (a.view(np.uint8) if a.dtype.name.startswith("float") else a.astype(np.int8).view(np.uint8)).reshape(-1) & ((1 << bits) - 1)
    v = np.concatenate([v, np.zeros(-v.size % per, np.uint8)]).reshape(-1, per)
    out = np.zeros(v.shape[0], np.uint8)
    for k in range(per):
        out |= v[:, k] << (k * bits)
    return out


def unpack_bits(b: np.ndarray[Any, Any], bits: int, shape: Sequence[int], dtype: np.dtype[Any], signed: bool) -> np.ndarray[Any, Any]:
    """The reverse of :func:`pack_bits`."""
    per, n = 8 // bits, int(np.prod(shape, dtype=np.int64))
    v = np.stack([(b >> (k * bits)) & ((1 << bits) - 1) for k in range(per)], -1).reshape(-1)[:n].astype(np.int8)
    if dtype.name.startswith("float"):
        return v.view(dtype).reshape(shape)
    if signed:
        v = np.where(v >= 1 << (bits - 1), v - (1 << bits), v).astype(np.int8)
    return v.reshape(shape).astype(dtype)
