"""ONNX tensors, element types and external data to numpy."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, SparseTensorProto, TensorProto, numpy_helper

from luthier.ir import dtypes as D
from luthier.ir.dtypes import DType
from luthier.ir.errors import InvalidModel, UnsupportedOperator

ELEMENT: dict[int, DType] = {
    TensorProto.FLOAT: D.f32, TensorProto.UINT8: D.u8, TensorProto.INT8: D.i8, TensorProto.UINT16: D.u16,
    TensorProto.INT16: D.i16, TensorProto.INT32: D.i32, TensorProto.INT64: D.i64, TensorProto.STRING: D.string,
    TensorProto.BOOL: D.boolean, TensorProto.FLOAT16: D.f16, TensorProto.DOUBLE: D.f64, TensorProto.UINT32: D.u32,
    TensorProto.UINT64: D.u64, TensorProto.BFLOAT16: D.bf16, TensorProto.FLOAT8E4M3FN: D.f8e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: D.f8e4m3fnuz, TensorProto.FLOAT8E5M2: D.f8e5m2, TensorProto.FLOAT8E5M2FNUZ: D.f8e5m2fnuz,
    TensorProto.UINT4: D.u4, TensorProto.INT4: D.i4,
}  # fmt: skip
for _name, _dtype in (("FLOAT4E2M1", D.f4e2m1), ("FLOAT8E8M0", D.f8e8m0), ("INT2", D.i2), ("UINT2", D.u2)):
    if hasattr(TensorProto, _name):
        ELEMENT[getattr(TensorProto, _name)] = _dtype


def element_type(code: int, what: str) -> DType:
    """The DType of an ONNX element type. Raises UnsupportedOperator for strings' relatives that no target computes with."""
    d = ELEMENT.get(code)
    if d is None:
        label = TensorProto.DataType.Name(code) if code in TensorProto.DataType.values() else str(code)
        raise UnsupportedOperator(f"{what} has element type {label}, which is not supported")
    return d


def to_array(t: TensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    """A TensorProto as an array (zero-copy from ``raw_data`` where the layout allows it).

    ``folder``: where external data may lie; None means that the model came without a path. Raises InvalidModel."""
    if t.data_location == TensorProto.EXTERNAL:
        return _external(t, folder)
    d = ELEMENT.get(t.data_type)
    if d is None:
        element_type(t.data_type, f"constant {t.name!r}")
    shape = _shape(t)
    if d is not None and d.bits >= 8 and d is not D.string and t.HasField("raw_data"):
        return _view(t.raw_data, d, shape, t.name)
    return _unpacked(t)


def from_bytes(raw: memoryview, t: TensorProto) -> np.ndarray[Any, Any]:
    """The contents of ``t`` whose raw bytes lie elsewhere: a view, or an aligned copy where the file misaligns them."""
    d = element_type(t.data_type, f"constant {t.name!r}")
    if d.bits < 8:
        return _unpacked(TensorProto(name=t.name, data_type=t.data_type, dims=_shape(t), raw_data=bytes(raw)))
    a = _view(raw, d, _shape(t), t.name)
    return a if a.flags.aligned else a.copy()


def _unpacked(t: TensorProto) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(numpy_helper.to_array(t))
    except (ValueError, TypeError, OverflowError) as e:
        raise InvalidModel(f"constant {t.name!r} is malformed: {e}") from None


def _shape(t: TensorProto | SparseTensorProto, name: str | None = None) -> tuple[int, ...]:
    """The extents. Raises InvalidModel for negative ones and for more elements than memory could hold."""
    dims = tuple(t.dims)
    if any(d < 0 for d in dims) or math.prod(dims) >= 1 << 48:
        raise InvalidModel(f"constant {t.name if name is None else name!r} has the impossible shape {list(dims)}")
    return dims


def _view(raw: bytes | memoryview, d: DType, shape: tuple[int, ...], name: str) -> np.ndarray[Any, Any]:
    want = math.prod(shape) * d.numpy.itemsize
    if len(raw) != want:
        raise InvalidModel(f"constant {name!r} holds {len(raw)} bytes, its shape {list(shape)} of {d} needs {want}")
    return np.frombuffer(raw, d.numpy).reshape(shape)


def _external(t: TensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    info = {e.key: e.value for e in t.external_data}
    where = info.get("location", "")
    if folder is None:
        raise InvalidModel(f"constant {t.name!r} lies in the file {where!r}; compile the model from its path, not from a ModelProto")
    if not where or "\0" in where or os.path.isabs(where):
        raise InvalidModel(f"constant {t.name!r} lies in the file {where[:200]!r}, which is no path below the model's folder")
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, where))
    if os.path.commonpath([root, path]) != root:
        raise InvalidModel(f"constant {t.name!r} points at {where!r}, outside the model's folder")
    if not os.path.isfile(path):
        raise InvalidModel(f"constant {t.name!r} needs the file {where!r} beside the model; it is missing")
    d = element_type(t.data_type, f"constant {t.name!r}")
    if d is D.string:
        raise InvalidModel(f"constant {t.name!r} holds strings, which cannot be stored as external data")
    shape = _shape(t)
    size = (math.prod(shape) * d.bits + 7) // 8
    offset, length = (_number(t, info, key, default) for key, default in (("offset", 0), ("length", size)))
    if offset + size > os.path.getsize(path) or length != size:
        raise InvalidModel(f"constant {t.name!r} needs {size} bytes at {offset} of {where!r}; the file or its length differs")
    if size == 0:
        return np.zeros(shape, d.numpy)
    raw = np.memmap(path, np.uint8, "r", offset, (size,))
    if d.bits >= 8:
        return raw.view(d.numpy).reshape(shape)
    return _unpacked(TensorProto(name=t.name, data_type=t.data_type, dims=shape, raw_data=raw.tobytes()))


def _number(t: TensorProto, info: dict[str, str], key: str, default: int) -> int:
    """A field of the external data."""
    text = info.get(key)
    if text is None:
        return default
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,18}", text):  # bytes: no UTF-8
        raise InvalidModel(f"constant {t.name!r}: the {key} of its external data is {text[:40]!r}, it should be a number of bytes")
    return int(text)


def sparse_to_array(t: SparseTensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    """A SparseTensorProto as a dense array; indices are linear [NNZ] or coordinates [NNZ, rank]. Raises InvalidModel."""
    values = to_array(t.values, folder)
    idx = to_array(t.indices, folder)
    shape = _shape(t, t.values.name)
    where = idx.T if idx.ndim == 2 else idx[None]
    limits = shape if idx.ndim == 2 else (math.prod(shape),)
    fits = values.ndim == 1 and idx.ndim in (1, 2) and idx.dtype == np.int64 and len(idx) == len(values) and len(where) == len(limits)
    if not fits or any(len(values) and not 0 <= i.min() <= i.max() < n for i, n in zip(where, limits, strict=True)):
        raise InvalidModel(f"sparse constant {t.values.name!r}: {list(values.shape)} values at {list(idx.shape)} indices do not fit the shape {list(shape)}")
    out = np.zeros(shape, values.dtype)
    out.reshape(limits)[tuple(where)] = values
    return out


def attribute_value(a: AttributeProto, folder: Path | None) -> Any:
    """Attribute to a Python value: int, float, str, tuple of those, or an array. Graphs are left to the importer."""
    k = a.type
    if k == AttributeProto.INT:
        return int(a.i)
    if k == AttributeProto.FLOAT:
        return float(a.f)
    if k == AttributeProto.STRING:
        return a.s.decode("utf-8", "replace")
    if k == AttributeProto.INTS:
        return tuple(int(x) for x in a.ints)
    if k == AttributeProto.FLOATS:
        return tuple(float(x) for x in a.floats)
    if k == AttributeProto.STRINGS:
        return tuple(s.decode("utf-8", "replace") for s in a.strings)
    if k == AttributeProto.TYPE_PROTO:
        return a.tp
    if k == AttributeProto.TENSOR:
        return to_array(a.t, folder)
    if k == AttributeProto.SPARSE_TENSOR:
        return sparse_to_array(a.sparse_tensor, folder)
    raise UnsupportedOperator(f"attribute {a.name!r} has the kind {AttributeProto.AttributeType.Name(k)}, which is not supported")
