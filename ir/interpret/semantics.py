"""What every scalar operator means, in numpy: the interpreter, the constant folder and the tests share these definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType

_erf_table = np.vectorize(math.erf, otypes=[np.float64])


def _int_div(a: Any, b: Any) -> Any:
    safe = np.where(b == 0, np.ones_like(b), b)
    q = np.floor_divide(a, safe)
    q = q + ((np.remainder(a, safe) != 0) & ((a < 0) != (safe < 0))).astype(q.dtype)
    return np.where(b == 0, np.zeros_like(q), q)


def _div(a: Any, b: Any) -> Any:
    return np.true_divide(a, b) if _is_float(a) else _int_div(a, b)


def _rem(a: Any, b: Any) -> Any:
    if _is_float(a):
        return np.fmod(a, b)
    safe = np.where(b == 0, np.ones_like(b), b)
    return np.where(b == 0, np.zeros_like(a), np.fmod(a, safe))


def _floor(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def g(a: Any, b: Any) -> Any:
        if _is_float(a):
            return f(a, b)
        safe = np.where(b == 0, np.ones_like(b), b)
        return np.where(b == 0, np.zeros_like(a), f(a, safe))

    return g


def _shift(left: bool) -> Callable[[Any, Any], Any]:
    def g(a: Any, b: Any) -> Any:
        bits = np.asarray(a).dtype.itemsize * 8
        big = (b < 0) | (b >= bits)
        s = np.where(big, np.zeros_like(b), b)
        if left:
            return np.where(big, np.zeros_like(a), np.left_shift(a, s))
        fill = np.where(a < 0, np.full_like(a, -1), np.zeros_like(a)) if np.asarray(a).dtype.kind == "i" else np.zeros_like(a)
        return np.where(big, fill, np.right_shift(a, s))

    return g


def _is_float(a: Any) -> bool:
    k = np.asarray(a).dtype
    return k.kind == "f" or k.kind == "V" or k.name in ("bfloat16",) or k.name.startswith(("float8", "float4"))


def _f64(f: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluate in f64; the caller rounds to the type."""

    def g(*a: Any) -> Any:
        return f(*(np.asarray(x).astype(np.float64) for x in a))

    return g


def _popcount(a: Any) -> Any:
    a = np.asarray(a)
    return np.bitwise_count(a.view(np.dtype(f"u{a.dtype.itemsize}"))).astype(a.dtype)


FN: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _div, "rem": _rem,
    "floordiv": _floor(np.floor_divide), "mod": _floor(np.mod),
    "min": lambda a, b: np.where(a < b, a, b), "max": lambda a, b: np.where(a > b, a, b),
    "and": lambda a, b: np.logical_and(a, b) if np.asarray(a).dtype.kind == "b" else np.bitwise_and(a, b),
    "or": lambda a, b: np.logical_or(a, b) if np.asarray(a).dtype.kind == "b" else np.bitwise_or(a, b),
    "xor": lambda a, b: np.logical_xor(a, b) if np.asarray(a).dtype.kind == "b" else np.bitwise_xor(a, b),
    "shl": _shift(True), "shr": _shift(False), "pow": lambda a, b: _pow(a, b), "atan2": _f64(np.arctan2),
    "lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal,
    "neg": lambda a: np.negative(a), "abs": np.abs, "floor": np.floor, "ceil": np.ceil, "round": np.rint, "trunc": np.trunc,
    "sqrt": _f64(np.sqrt), "rsqrt": _f64(lambda a: 1 / np.sqrt(a)), "exp": _f64(np.exp), "exp2": _f64(np.exp2),
    "log": _f64(np.log), "log2": _f64(np.log2), "expm1": _f64(np.expm1), "log1p": _f64(np.log1p), "tanh": _f64(np.tanh),
    "sigmoid": _f64(lambda a: 1 / (1 + np.exp(-a))), "erf": _f64(_erf_table), "sin": _f64(np.sin), "cos": _f64(np.cos),
    "tan": _f64(np.tan), "asin": _f64(np.arcsin), "acos": _f64(np.arccos), "atan": _f64(np.arctan), "sinh": _f64(np.sinh),
    "cosh": _f64(np.cosh), "asinh": _f64(np.arcsinh), "acosh": _f64(np.arccosh), "atanh": _f64(np.arctanh),
    "not": lambda a: np.logical_not(a) if np.asarray(a).dtype.kind == "b" else np.invert(a),
    "isnan": np.isnan, "isinf": np.isinf, "popcount": _popcount, "select": np.where,
}


def _pow(a: Any, b: Any) -> Any:
    if _is_float(a):
        return np.power(np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64))
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    out = np.ones_like(a)
    base, e = a.copy(), np.where(b < 0, np.zeros_like(b), b)
    while np.any(e > 0):
        out = np.where(e & 1, out * base, out)
        base = base * base
        e = e >> 1
    recip = np.where(a == 1, 1, np.where(a == -1, np.where(b & 1, -1, 1), 0)).astype(a.dtype)
    return np.where(b < 0, recip, out)


def convert(v: Any, dtype: DType) -> Any:
    """``cast`` semantics: truncate and saturate float to int (NaN to 0), wrap int to int, nonzero to bool."""
    v = np.asarray(v)
    d = dtype.scalar
    if d.is_bool:
        return v != 0
    if (d.is_int or d.is_index) and _is_float(v):
        lo, hi = d.limits()
        f = np.trunc(v.astype(np.float64))
        big, small = f >= float(hi), f <= float(lo)
        f = np.where(np.isnan(f) | big | small, 0.0, f)
        if d.kind == "u" and d.bits == 64:
            out = f.astype(np.uint64)
        else:
            out = f.astype(np.int64)
        out = np.where(big & ~np.isnan(v.astype(np.float64)), np.array(hi, out.dtype), np.where(small, np.array(lo, out.dtype), out))
        return out.astype(d.numpy)
    if d.is_int and d.bits < 8:
        m = v.astype(np.int64) & ((1 << d.bits) - 1)
        if d.is_signed:
            m = np.where(m >> (d.bits - 1), m - (1 << d.bits), m)
        return m.astype(d.numpy)
    return v.astype(d.numpy)


def evaluate(op: str, dtype: DType, *vals: Any) -> Any:
    """Operator ``op`` on numpy values, rounded to ``dtype`` (the result type)."""
    with np.errstate(all="ignore"):
        if op == "cast":
            return convert(vals[0], dtype)
        r = np.asarray(FN[op](*vals))
        want = dtype.scalar.numpy
        return r if r.dtype == want else convert(r, dtype)
