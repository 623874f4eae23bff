"""Arrays of other libraries as numpy views, by DLPack and without a copy; outputs as DLPack exporters. Imports numpy and the leaf modules.

numpy reads DLPack for the types that it has; bfloat16 and the 8-bit floats, which only ml_dtypes knows, are read here. Structures
after the DLPack specification (dmlc.github.io/dlpack), version 1: ``DLTensor``, ``DLManagedTensor``, ``DLManagedTensorVersioned``.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from luthier.backends.native import numpy_dtype
from luthier.errors import InputError

__all__ = ["view"]

# devices whose memory the processor may touch: CPU, and memory of the host or managed memory that a GPU's library allocated
_HOST = {1: "cpu", 3: "cuda_host", 11: "rocm_host", 13: "cuda_managed"}
_NAMES = {2: "cuda", 4: "opencl", 7: "vulkan", 8: "metal", 9: "vpi", 10: "rocm", 14: "oneapi", 15: "webgpu", 16: "hexagon"}
# (type code, bits) of elements -> name
_TYPES = {
    **{(0, b): f"int{b}" for b in (8, 16, 32, 64)}, **{(1, b): f"uint{b}" for b in (8, 16, 32, 64)}, (2, 16): "float16", (2, 32): "float32",
    (2, 64): "float64", (4, 16): "bfloat16", (6, 8): "bool", (10, 8): "float8_e4m3fn", (11, 8): "float8_e4m3fnuz", (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz", (14, 8): "float8_e8m0fnu",
}  # fmt: skip
_READ_ONLY = 1


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("device_id", ctypes.c_int32), ("rank", ctypes.c_int32), ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]  # fmt: skip


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]  # fmt: skip


def python(name: str, result: Any, *args: Any) -> Any:
    f = getattr(ctypes.pythonapi, name)
    f.restype, f.argtypes = result, args
    return f


_is_valid = python("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_pointer = python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_rename = python("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_USED = {b"dltensor": b"used_dltensor", b"dltensor_versioned": b"used_dltensor_versioned"}  # kept alive: capsules refer to them


def view(a: Any, what: str) -> np.ndarray[Any, Any]:
    """``a`` (anything with ``__dlpack__``) as a numpy array over the same memory. ``what``: what messages call it.

    Raises InputError when the memory is not the processor's, or the elements have no numpy type."""
    kind = type(a).__name__
    try:
        device, number = a.__dlpack_device__()
    except (AttributeError, TypeError, ValueError) as e:
        raise InputError(f"{what}: this {kind} does not say where its memory is: {e}") from e
    if int(device) not in _HOST:
        where = _NAMES.get(int(device), f"device type {int(device)}")
        raise InputError(f"{what}: this {kind} lies on {where}:{int(number)}, the module runs on the processor", hint="copy it to the CPU first")
    try:
        return np.from_dlpack(a)
    except (BufferError, RuntimeError, TypeError, ValueError) as e:
        reason = e
    try:
        capsule = _capsule(a)
    except (BufferError, RuntimeError, TypeError, ValueError):
        raise InputError(f"{what}: numpy cannot view this {kind}: {reason}") from reason
    return from_capsule(capsule, f"{what}: this {kind}")


def _capsule(a: Any) -> Any:
    try:
        return a.__dlpack__(max_version=(1, 0))
    except TypeError:  # a producer of before version 1
        return a.__dlpack__()


def from_capsule(capsule: Any, what: str) -> np.ndarray[Any, Any]:
    """The array of a capsule that nobody has consumed; its deleter runs with the last array over the memory."""
    name = next((n for n in _USED if _is_valid(capsule, n)), None)
    if name is None:
        raise InputError(f"{what} gave a capsule that holds no tensor or was used before")
    ptr = _pointer(capsule, name)
    managed: Any = (Versioned if name == b"dltensor_versioned" else _Managed).from_address(ptr)
    read_only = False
    if isinstance(managed, Versioned):
        if managed.major > 1:
            raise InputError(f"{what} speaks DLPack {managed.major}.{managed.minor}, this package version 1")
        read_only = bool(managed.flags & _READ_ONLY)
    t = managed.tensor
    element = _TYPES.get((t.code, t.bits)) if t.lanes == 1 else None
    if element is None:
        raise InputError(f"{what} has elements of DLPack type {t.code}, {t.bits} bits, {t.lanes} lanes, which have no numpy type")
    dtype = numpy_dtype(element)
    shape = tuple(t.shape[k] for k in range(t.rank))
    strides = tuple(t.strides[k] * dtype.itemsize for k in range(t.rank)) if t.strides else None
    deleter = managed.deleter
    _rename(capsule, _USED[name])
    if 0 in shape or not t.data:
        _release(deleter, ptr)
        return np.empty(shape, dtype)
    if strides is not None and any(s < 0 for s in strides):
        _release(deleter, ptr)
        raise InputError(f"{what} has negative strides", hint="make a contiguous copy")
    extent = dtype.itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if strides is not None else dtype.itemsize * int(np.prod(shape))
    memory = (ctypes.c_uint8 * extent).from_address(t.data + t.offset)
    weakref.finalize(memory, _release, deleter, ptr)
    out: np.ndarray[Any, Any] = np.ndarray(shape, dtype, memory, strides=strides)  # type: ignore[arg-type]
    out.flags.writeable = not read_only
    return out


def _release(deleter: int | None, ptr: int) -> None:
    if deleter:
        Deleter(deleter)(ptr)
