"""Values of 64 bits as two 32-bit words, for a target without such types: which operator is which intrinsic, and what each means.

A value is a ``u32x2``, the low word first. The intrinsic ``wide.i64.add`` adds two such pairs as signed integers, ``wide.f64.lt`` compares
two as floats, ``wide.f64.of.f32`` makes one. How a target computes them stands with it (:mod:`luthier.codegen.gpu.wgsl_wide`).

Before: ``let x: i64 = A[i]``, ``x * y``. After: ``let x: u32x2 = wide.pair(A[i * 2], A[i * 2 + 1])``, ``wide.i64.mul(x, y)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from luthier.ir import intrin
from luthier.ir.dtypes import DType, boolean, f32, f64, i32, i64, index, u32, u64
from luthier.ir.expr import Expr, call, cast, const, extract, select
from luthier.ir.interpret.semantics import convert, evaluate

PAIR = u32.vec(2)
PREFIX = "wide."
TYPES = {d.name: d for d in (i64, u64, f64)}
INTEGER = ("add", "sub", "mul", "div", "rem", "floordiv", "mod", "and", "or", "xor", "shl", "shr", "neg", "abs", "not", "popcount")
FLOAT = ("add", "sub", "mul", "div", "rem", "neg", "abs", "sqrt", "floor", "ceil", "round", "trunc")
COMPARES = ("lt", "le", "eq")


def is_wide(d: DType) -> bool:
    """Whether a type has 64 bits in memory."""
    return d.scalar in (i64, u64, f64)


def unpack(pair: Any, d: DType) -> Any:
    return np.ascontiguousarray(pair, np.uint32).view(d.numpy)[..., 0]


def pack(value: Any, d: DType) -> Any:
    return np.ascontiguousarray(np.asarray(value, d.numpy)[..., None]).view(np.uint32)


def _declare() -> None:
    def arithmetic(op: str, d: DType, logic: bool) -> Callable[..., Any]:
        def run(dtype: DType, attr: Any, *args: Any) -> Any:
            r = evaluate(op, boolean if logic else d, *(unpack(a, d) for a in args))
            return r if logic else pack(r, d)

        return run

    def made(src: DType, d: DType) -> Callable[..., Any]:
        return lambda dtype, attr, a: pack(convert(unpack(a, src) if is_wide(src) else a, d), d)

    def taken(src: DType, d: DType) -> Callable[..., Any]:
        return lambda dtype, attr, a: convert(unpack(a, src), d)

    def near(src: DType) -> Callable[..., Any]:
        return lambda dtype, attr, a: np.clip(unpack(a, src).astype(object), *i32.limits()).astype(np.int64)

    def odd(src: DType) -> Callable[..., Any]:
        return lambda dtype, attr, a: _to_odd(unpack(a, src))

    intrin.register(f"{PREFIX}pair", lambda dtype, attr, lo, hi: np.stack([lo, hi], -1), "two words as one value")
    for name, d in TYPES.items():
        for op in FLOAT if d is f64 else INTEGER:
            intrin.register(f"{PREFIX}{name}.{op}", arithmetic(op, d, False), f"{op} of {name}")
        for op in (*COMPARES, *(("isnan", "isinf") if d is f64 else ())):
            intrin.register(f"{PREFIX}{name}.{op}", arithmetic(op, d, True), f"{op} of {name}")
        for src in (i32, u32, f32, *(x for x in TYPES.values() if x is not d and f64 in (x, d))):
            intrin.register(f"{PREFIX}{name}.of.{src.name}", made(src, d), f"{src} as {name}")
        intrin.register(f"{PREFIX}f32.of.{name}", taken(d, f32), f"{name} as f32")
        intrin.register(f"{PREFIX}odd.of.{name}", odd(d), f"{name} as f32, the last bit set where bits were lost: rounding again is exact")
        if d is not f64:
            intrin.register(f"{PREFIX}near.of.{name}", near(d), f"{name} as an index, the nearest one")


def _to_odd(v: Any) -> Any:
    """To f32; what is inexact goes to the neighbour whose last bit is set."""
    exact = np.asarray(v).astype(np.longdouble)
    r = np.asarray(v).astype(np.float32)
    other = np.where(r.astype(np.longdouble) > exact, np.nextafter(r, np.float32(-np.inf)), np.nextafter(r, np.float32(np.inf)))
    even = (r.view(np.uint32) & 1) == 0
    return np.where((r.astype(np.longdouble) != exact) & even & ~np.isnan(r), other, r).astype(np.float32)


_declare()


def wide_const(v: Any, d: DType) -> Expr:
    """A number of ``d`` as a pair."""
    lo, hi = (int(x) for x in pack(np.asarray(v).astype(d.scalar.numpy) if d.is_float else np.asarray(int(v), d.scalar.numpy), d.scalar))
    return pair(const(lo, u32), const(hi, u32))


def pair(lo: Expr, hi: Expr) -> Expr:
    return call(f"{PREFIX}pair", PAIR, lo, hi)


def wide_of(v: Expr, src: DType, d: DType) -> Expr:
    """A value of type ``src``, carried as it is or as a pair, as a pair of type ``d``."""
    s = src.scalar
    if v.dtype is PAIR:
        return v if s.is_float == d.is_float else call(f"{PREFIX}{d.name}.of.{s.name}", PAIR, v)
    if v.dtype.is_float:
        return call(f"{PREFIX}{d.name}.of.f32", PAIR, cast(v, f32))
    unsigned = v.dtype.is_bool or (v.dtype.is_int and not v.dtype.is_signed)
    c = u32 if unsigned else i32
    return call(f"{PREFIX}{d.name}.of.{c.name}", PAIR, cast(v, c))


def narrow_of(v: Expr, src: DType, d: DType) -> Expr:
    """A pair of type ``src`` as a value of a type ``d`` of at most 32 bits."""
    s = src.scalar
    if d.is_bool:
        return compare_pairs("ne", s, v, wide_const(0, s))
    if d.is_float:
        return call(f"{PREFIX}f32.of.{s.name}", f32, v) if d.scalar is f32 else cast(to_odd(v, s), d.scalar)
    if d.is_index:
        v, s = (call(f"{PREFIX}i64.of.f64", PAIR, v), i64) if s.is_float else (v, s)
        return call(f"{PREFIX}near.of.{s.name}", index, v)
    if s.is_float:  # saturates at the limits of the type
        v = call(f"{PREFIX}i64.of.f64", PAIR, v)
        lo, hi = (wide_const(x, i64) for x in d.limits())
        v = select(compare_pairs("lt", i64, v, lo), lo, v)
        v = select(compare_pairs("lt", i64, hi, v), hi, v)
    word = extract(v, 0)
    return word if d is u32 else cast(cast(word, i32), d)


def to_odd(v: Expr, src: DType) -> Expr:
    """A pair of type ``src`` in f32, to be rounded once more to a shorter type."""
    return call(f"{PREFIX}odd.of.{src.scalar.name}", f32, v)


def compare_pairs(op: str, d: DType, a: Expr, b: Expr) -> Expr:
    if op == "ne":
        return compare_pairs("eq", d, a, b).eq(const(False, boolean))
    return call(f"{PREFIX}{d.scalar.name}.{op}", boolean, a, b)


def operate(op: str, d: DType, *args: Expr) -> Expr | None:
    """An operator on pairs of type ``d``; None where there is no rule."""
    s = d.scalar
    if op in ("min", "max"):
        a, b = args
        return select(compare_pairs("lt", s, a, b) if op == "min" else compare_pairs("lt", s, b, a), a, b)
    if op == "abs" and s is u64:
        return args[0]
    if op in ("isnan", "isinf"):
        return call(f"{PREFIX}{s.name}.{op}", boolean, *args)
    if op == "rsqrt" and s is f64:
        return call(f"{PREFIX}f64.div", PAIR, wide_const(1.0, f64), call(f"{PREFIX}f64.sqrt", PAIR, *args))
    return call(f"{PREFIX}{s.name}.{op}", PAIR, *args) if op in (FLOAT if s is f64 else INTEGER) else None


__all__ = ["PAIR", "PREFIX", "compare_pairs", "is_wide", "narrow_of", "operate", "pack", "pair", "to_odd", "unpack", "wide_const", "wide_of"]
