"""ONNX tensors, element types and external data to numpy."""

from __future__ import annotations

import os
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
for _name, _dtype in (("FLOAT8E8M0", D.f8e8m0), ("INT2", D.i2), ("UINT2", D.u2)):
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
    shape = tuple(t.dims)
    if d is not None and d.bits >= 8 and d is not D.string and t.HasField("raw_data"):
        return _view(t.raw_data, d, shape, t.name)
    try:
        return np.asarray(numpy_helper.to_array(t))
    except (ValueError, TypeError) as e:
        raise InvalidModel(f"constant {t.name!r} is malformed: {e}") from None


def from_bytes(raw: memoryview, t: TensorProto) -> np.ndarray[Any, Any]:
    """The contents of ``t`` whose raw bytes lie elsewhere: a view, or an aligned copy where the file misaligns them."""
    d = element_type(t.data_type, f"constant {t.name!r}")
    if d.bits < 8:
        copy = TensorProto(data_type=t.data_type, dims=t.dims, raw_data=bytes(raw))
        return np.asarray(numpy_helper.to_array(copy))
    a = _view(raw, d, tuple(t.dims), t.name)
    return a if a.flags.aligned else a.copy()


def _view(raw: bytes | memoryview, d: DType, shape: tuple[int, ...], name: str) -> np.ndarray[Any, Any]:
    want = int(np.prod(shape, dtype=np.int64)) * d.numpy.itemsize
    if len(raw) != want:
        raise InvalidModel(f"constant {name!r} holds {len(raw)} bytes, its shape {list(shape)} of {d} needs {want}")
    return np.frombuffer(raw, d.numpy).reshape(shape)


def _external(t: TensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    info = {e.key: e.value for e in t.external_data}
    where = info.get("location", "")
    if folder is None:
        raise InvalidModel(f"constant {t.name!r} lies in the file {where!r}; compile the model from its path, not from a ModelProto")
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, where))
    if os.path.isabs(where) or os.path.commonpath([root, path]) != root or not where:
        raise InvalidModel(f"constant {t.name!r} points at {where!r}, outside the model's folder")
    if not os.path.isfile(path):
        raise InvalidModel(f"constant {t.name!r} needs the file {where!r} beside the model; it is missing")
    d = element_type(t.data_type, f"constant {t.name!r}")
    offset = int(info.get("offset", 0))
    n = int(np.prod(tuple(t.dims), dtype=np.int64))
    size = (n * d.bits + 7) // 8
    if offset < 0 or offset + size > os.path.getsize(path) or int(info.get("length", size)) != size:
        raise InvalidModel(f"constant {t.name!r} needs {size} bytes at {offset} of {where!r}; the file or its length differs")
    if size == 0:
        return np.zeros(tuple(t.dims), d.numpy)
    raw = np.memmap(path, np.uint8, "r", offset, (size,))
    if d.bits >= 8:
        return raw.view(d.numpy).reshape(tuple(t.dims))
    copy = TensorProto(data_type=t.data_type, dims=t.dims, raw_data=raw.tobytes())
    return np.asarray(numpy_helper.to_array(copy))


def sparse_to_array(t: SparseTensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    """A SparseTensorProto as a dense array; indices are linear [NNZ] or coordinates [NNZ, rank]."""
    values = to_array(t.values, folder)
    idx = to_array(t.indices, folder)
    out = np.zeros(tuple(t.dims), values.dtype)
    if idx.ndim == 2:
        out[tuple(idx.T)] = values
    else:
        out.reshape(-1)[idx] = values
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
