"""8-bit floats on the bits: decoding to f32 (exact) and encoding from f32 (round to nearest even), for targets without them.

``f8e4m3fn``: no infinity, one NaN (0x7F); ``f8e5m2``: as IEEE; the ``fnuz`` forms: no infinity, no negative zero, NaN is 0x80;
``f8e8m0``: a power of two, the exponent of an f32, NaN is 0xFF. Overflow gives NaN, in ``f8e5m2`` infinity (ONNX's saturation is
part of the operator). Source: the formats' tables in the ONNX and OCP specifications; checked against ml_dtypes code by code.
"""

from __future__ import annotations

from collections.abc import Callable

from luthier.ir.dtypes import DType, f8e4m3fn, f8e4m3fnuz, f8e5m2, f8e5m2fnuz, f8e8m0, f32, u32
from luthier.ir.expr import Expr, binary, bitcast, cast, const, select, unary

_NAN = 0x7FC00000


def _decoder(mantissa: int, bias: int, kind: str) -> Callable[[Expr], Expr]:
    """``u32`` holding 8 bits to f32: (code << (23 - m)) moved to f32's bias; subnormals by a multiplication."""
    shift = 23 - mantissa

    def decode(c: Expr) -> Expr:
        d, f = c.dtype, f32.vec(c.dtype.lanes)
        x = c & 0x7F
        bits = select(x < const(1 << mantissa, d), bitcast(cast(x, f32) * 2.0 ** (1 - bias - mantissa), d), binary("shl", x, shift) + ((127 - bias) << 23))
        signed = bits | binary("shl", c & 0x80, 24)
        if kind == "ieee":
            signed = select(const(0x7C, d) <= x, binary("shl", x, shift) | 0x7F800000 | binary("shl", c & 0x80, 24), signed)
        elif kind == "fn":
            signed = select(x.eq(0x7F), const(_NAN, d), signed)
        else:
            signed = select(c.eq(0x80), const(_NAN, d), signed)
        return bitcast(signed, f)

    return decode


def _encoder(mantissa: int, bias: int, kind: str) -> Callable[[Expr], Expr]:
    """f32 to ``u32`` holding 8 bits."""
    shift = 23 - mantissa

    def encode(v: Expr) -> Expr:
        b = bitcast(v, u32.vec(v.dtype.lanes))
        d = b.dtype
        a = b & 0x7FFFFFFF
        least = const((128 - bias) << 23, d)  # the smallest normal number
        small = select(a < least, a, const(0, d))  # keeps the float to integer conversion in range
        tiny = cast(unary("round", bitcast(small, v.dtype) * 2.0 ** (bias - 1 + mantissa)), u32)
        normal = binary("shr", a - ((127 - bias) << 23) + ((1 << (shift - 1)) - 1) + (binary("shr", a, shift) & 1), shift)
        r = select(a < least, tiny, normal)
        sign = binary("shr", b, 24) & 0x80
        if kind == "ieee":
            return select(const(0x7F800000, d) < a, const(0x7E, d), select(const(0x7C, d) < r, const(0x7C, d), r)) | sign
        if kind == "fn":
            return select(const(0x7E, d) < r, const(0x7F, d), r) | sign
        return select(const(0x7F, d) < r, const(0x80, d), select(r.eq(0), r, r | sign))

    return encode


def _decode_e8m0(c: Expr) -> Expr:
    d = c.dtype
    bits = select(c.eq(0), const(0x00400000, d), select(c.eq(255), const(_NAN, d), binary("shl", c, 23)))
    return bitcast(bits, f32.vec(d.lanes))


def _encode_e8m0(v: Expr) -> Expr:
    """Of a power of two, or NaN."""
    return binary("shr", bitcast(v, u32.vec(v.dtype.lanes)), 23) & 255


_FORMATS = {f8e4m3fn: (3, 7, "fn"), f8e4m3fnuz: (3, 8, "fnuz"), f8e5m2: (2, 15, "ieee"), f8e5m2fnuz: (2, 16, "fnuz")}
DECODE: dict[DType, Callable[[Expr], Expr]] = {f8e8m0: _decode_e8m0} | {t: _decoder(*p) for t, p in _FORMATS.items()}
ENCODE: dict[DType, Callable[[Expr], Expr]] = {f8e8m0: _encode_e8m0} | {t: _encoder(*p) for t, p in _FORMATS.items()}
