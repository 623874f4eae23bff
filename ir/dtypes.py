"""Scalar and vector data types.

``DType(kind, bits, lanes)``: ``kind`` is one of

=========  ====================================================================
``f``      IEEE float of 16, 32 or 64 bits
``bf``     bfloat16
``f8...``  8-bit floats, kind is the full ONNX-style name (``f8e4m3fn`` ...)
``f4...``  the 4-bit float ``f4e2m1``; operators compute on its codes (:mod:`luthier.ir.float4`)
``i``      signed integer of 2, 4, 8, 16, 32, 64 bits, two's complement, wraps on overflow
``u``      unsigned integer of 1, 2, 4, 8, 16, 32, 64 bits, wraps on overflow
``b``      bool; a condition in registers, one byte (0 or 1) in memory
``x``      index: dimensions, loop variables, addresses; a target picks its width (at least 32 bits); never overflows
``s``      string; exists so that refusals can name it, no target computes with it
=========  ====================================================================
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

_F8 = ("f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz", "f8e8m0")


class DType:
    """An interned data type: two equal types are the same object. ``bits`` is per lane."""

    __slots__ = ("kind", "bits", "lanes", "name", "is_float", "is_int", "is_signed", "is_index", "is_bool", "scalar", "bit")
    _table: dict[tuple[str, int, int], DType] = {}
    kind: str
    bits: int
    lanes: int
    name: str
    is_float: bool
    is_int: bool  # integers proper: ``i`` and ``u`` (not index, not bool)
    is_signed: bool
    is_index: bool
    is_bool: bool
    scalar: DType
    bit: int  # of its own in a set of types (:func:`types_in`)

    def __new__(cls, kind: str, bits: int, lanes: int = 1) -> DType:
        key = (kind, bits, lanes)
        hit = cls._table.get(key)
        if hit is not None:
            return hit
        self = object.__new__(cls)
        self.kind, self.bits, self.lanes = kind, bits, lanes
        base = {"b": "bool", "x": "index", "s": "str"}.get(kind) or (kind if kind.startswith(("f8", "f4")) else f"{kind}{bits}")
        self.name = base if lanes == 1 else f"{base}x{lanes}"
        self.is_float = kind[0] == "f" or kind == "bf"
        self.is_int, self.is_signed, self.is_index, self.is_bool = kind in "iu", kind in "ix", kind == "x", kind == "b"
        self.scalar = self if lanes == 1 else DType(kind, bits)
        self.bit = 1 << len(cls._table)
        cls._table[key] = self
        return self

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> Any:
        return (DType, (self.kind, self.bits, self.lanes))

    @property
    def itemsize(self) -> float:
        """Bytes of one lane in memory; fractional below 8 bits (rows are padded to whole bytes by layouts)."""
        return self.bits / 8

    def vec(self, lanes: int) -> DType:
        return DType(self.kind, self.bits, lanes)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of one lane. Raises TypeError where numpy has none (sub-byte types use ml_dtypes)."""
        return to_numpy(self)

    def limits(self) -> tuple[Any, Any]:
        """(lowest, highest) finite value as Python numbers; for floats (-inf, inf)."""
        if self.kind == "b":
            return False, True
        if self.kind in ("i", "x"):
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        if self.kind == "u":
            return 0, (1 << self.bits) - 1
        return float("-inf"), float("inf")


f16, f32, f64, bf16 = DType("f", 16), DType("f", 32), DType("f", 64), DType("bf", 16)
i8, i16, i32, i64 = DType("i", 8), DType("i", 16), DType("i", 32), DType("i", 64)
u8, u16, u32, u64 = DType("u", 8), DType("u", 16), DType("u", 32), DType("u", 64)
i2, i4, u1, u2, u4 = DType("i", 2), DType("i", 4), DType("u", 1), DType("u", 2), DType("u", 4)
boolean, index, string = DType("b", 8), DType("x", 64), DType("s", 64)
f8e4m3fn, f8e4m3fnuz, f8e5m2, f8e5m2fnuz, f8e8m0 = (DType(k, 8) for k in _F8)
f4e2m1 = DType("f4e2m1", 4)

_BY_NAME = {d.name: d for d in list(DType._table.values())}


def parse_dtype(name: str) -> DType:
    """``"f32"`` or ``"f32x8"`` to a DType. Raises KeyError on an unknown name."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    base, _, lanes = name.rpartition("x")
    return _BY_NAME[base].vec(int(lanes))


@cache
def types_in(bits: int) -> frozenset[DType]:
    """The types whose ``bit`` is set in ``bits``."""
    return frozenset(d for d in DType._table.values() if d.bit & bits)


def to_numpy(d: DType) -> np.dtype[Any]:
    if d.kind in "fiu" and d.bits >= 8:
        return np.dtype(f"{d.kind}{d.bits // 8}")
    if d.kind == "b":
        return np.dtype(np.bool_)
    if d.kind == "x":
        return np.dtype(np.int64)
    if d.kind == "s":
        return np.dtype(object)
    import ml_dtypes

    names = {
        "bf16": "bfloat16", "f8e4m3fn": "float8_e4m3fn", "f8e4m3fnuz": "float8_e4m3fnuz", "f8e5m2": "float8_e5m2",
        "f8e5m2fnuz": "float8_e5m2fnuz", "f8e8m0": "float8_e8m0fnu", "i4": "int4", "u4": "uint4", "i2": "int2",
        "u2": "uint2", "f4e2m1": "float4_e2m1fn",
    }
    if d.scalar.name not in names:
        raise TypeError(f"numpy has no type for {d}")
    return np.dtype(getattr(ml_dtypes, names[d.scalar.name]))


def from_numpy(dt: Any) -> DType:
    """The DType of a numpy (or ml_dtypes) dtype. Raises TypeError for complex, datetime and structured types."""
    dt = np.dtype(dt)
    if dt.kind in "fiu" and dt.name.startswith(("float", "int", "uint")) and dt.itemsize * 8 == int("".join(filter(str.isdigit, dt.name))):
        return DType(dt.kind, dt.itemsize * 8)
    if dt.kind == "b":
        return boolean
    if dt.kind in "OUST":
        return string
    names = {
        "bfloat16": bf16, "float8_e4m3fn": f8e4m3fn, "float8_e4m3fnuz": f8e4m3fnuz, "float8_e5m2": f8e5m2,
        "float8_e5m2fnuz": f8e5m2fnuz, "float8_e8m0fnu": f8e8m0, "int4": i4, "uint4": u4, "int2": i2, "uint2": u2,
        "float4_e2m1fn": f4e2m1,
    }
    if dt.name not in names:
        raise TypeError(f"no Luthier type for numpy's {dt}")
    return names[dt.name]
