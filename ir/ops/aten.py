"""Elementwise operators that torch has and ONNX has not, under their ATen names. Source: torch's documentation of each."""

from __future__ import annotations

import math

import numpy as np

from luthier.ir.dtypes import boolean
from luthier.ir.expr import Expr, binary, carry_nan, land, lor, select, unary
from luthier.ir.graph import Node
from luthier.ir.ops.common import Array, register
from luthier.ir.ops.elementwise import Map, k

for _name, _ref in (
    ("expm1", np.expm1), ("log1p", np.log1p), ("log2", np.log2), ("exp2", np.exp2), ("trunc", np.trunc), ("rsqrt", lambda x: 1 / np.sqrt(x)),
):  # fmt: skip
    register(f"aten::{_name}", Map("float", lambda node, x, _op=_name: unary(_op, x), lambda node, x, _ref=_ref: _ref(x)))

register("aten::log10", Map("float", lambda node, x: unary("log", x) * k(x, 1 / math.log(10)), lambda node, x: np.log10(x)))
register("aten::signbit", Map("float", lambda node, x: lor(x < 0.0, (k(x, 1) / x) < 0.0), lambda node, x: np.signbit(x), result=boolean))


def _floor_divide(node: Node, a: Expr, b: Expr) -> Expr:
    """The floor of the exact quotient: (a - fmod(a, b)) / b, one less where the signs of remainder and divisor differ."""
    if not a.dtype.is_float:
        return binary("floordiv", a, b)
    r = binary("rem", a, b)
    q = (a - r) / b
    q = select(land(r.ne(0.0), (b < 0.0).ne(r < 0.0)), q - 1.0, q)
    f = unary("floor", q)
    exact = select((q - f) > 0.5, f + 1.0, f)
    return select(b.eq(0.0), a / b, exact)


def _floor_divide_ref(node: Node, a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":
        return np.asarray(np.floor_divide(a, np.where(b == 0, 1, b)) * (b != 0), a.dtype)
    return np.where(b == 0, a / b, np.floor_divide(a, b))


def _hypot(node: Node, a: Expr, b: Expr) -> Expr:
    """sqrt(a a + b b), scaled by the larger so that squares stay in range."""
    a, b = unary("abs", a), unary("abs", b)
    top, low = carry_nan("max", a, b), carry_nan("min", a, b)
    q = low / top
    scaled = top * unary("sqrt", q * q + k(a, 1))
    return select(lor(top.eq(0.0), unary("isinf", top)), top, scaled)


def _log_add(exp: str, log: str, scale: float) -> Map:
    """log(exp(a) + exp(b)) = max + log1p(exp(min - max)); infinities of one sign stay."""

    def expr(node: Node, a: Expr, b: Expr) -> Expr:
        top, low = carry_nan("max", a, b), carry_nan("min", a, b)
        both = land(unary("isinf", a), a.eq(b))
        return select(both, a, top + unary("log1p", unary(exp, low - top)) * k(a, scale))

    ref = np.logaddexp if exp == "exp" else np.logaddexp2
    return Map("float", expr, lambda node, a, b: ref(a, b), (2, 2))


def _copy_sign(node: Node, a: Expr, b: Expr) -> Expr:
    size = unary("abs", a)
    return select(lor(b < 0.0, land(b.eq(0.0), (k(b, 1) / b) < 0.0)), -size, size)


register("aten::floor_divide", Map("number", _floor_divide, _floor_divide_ref, (2, 2)))
register("aten::hypot", Map("float", _hypot, lambda node, a, b: np.hypot(a, b), (2, 2)))
register("aten::logaddexp", _log_add("exp", "log", 1.0))
register("aten::logaddexp2", _log_add("exp2", "log2", 1 / math.log(2)))
register("aten::copysign", Map("float", _copy_sign, lambda node, a, b: np.copysign(a, b), (2, 2)))
register("aten::atan2", Map("float", lambda node, a, b: binary("atan2", a, b), lambda node, a, b: np.arctan2(a, b), (2, 2)))
