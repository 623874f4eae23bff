"""Floats of 4 bits (``f4e2m1``: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) on their codes, as expressions.

The format's table is that of the ONNX and OCP specifications; there is no infinity and no NaN, and what is too large is 6.
"""

from __future__ import annotations

from luthier.ir.dtypes import f4e2m1, f32, i32, u4
from luthier.ir.expr import Expr, bitcast, cast, const, minimum, select, unary


def decode(x: Expr) -> Expr:
    """``f4e2m1`` to f32, exact."""
    c = cast(bitcast(x, u4), i32)
    m = c & 7
    f = cast(m, f32)
    v = select(m < const(4, i32), f * 0.5, select(m < const(6, i32), f - 2.0, f * 2.0 - 8.0))
    return select(m < c, -v, v)


def encode(x: Expr) -> Expr:
    """f32 to ``f4e2m1``: to the nearest, of two the one with the even code; NaN becomes -0 as in ONNX's reference."""
    a = minimum(unary("abs", x), const(6.0, f32))
    half, one, two = unary("round", a * 2.0), unary("round", a) + 2.0, unary("round", a * 0.5) + 4.0
    code = cast(select(a < 2.0, half, select(a < 4.0, one, two)), i32)
    bits = bitcast(x, i32)
    nan = const(0x7F800000, i32) < (bits & 0x7FFFFFFF)  # shader compilers believe that x is x
    code = select(nan, const(8, i32), select(bits < const(0, i32), code | 8, code))
    return bitcast(cast(code, u4), f4e2m1)
