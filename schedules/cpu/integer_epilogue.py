"""Epilogues of integer sums: requantization without divisions and without a way through bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from luthier.ir.dtypes import f32, i32
from luthier.ir.expr import Expr, const, is_const, load, load_parts, loads, maximum, minimum, rewrite
from luthier.schedules.base.schedule import Packing, Schedule
from luthier.schedules.cpu.integer_packing import ScaledPacking

EXACT = 1 << 24  # whole numbers up to here are exact in f32


def simplify_epilogue(s: Schedule, out: str, constants: Mapping[str, Any]) -> Schedule:
    """Divisions by a constant (QuantizeLinear's scale) move into constant factors of the dividend, rounded once; a rounded value that
    passes through bytes is clamped in floats.

    Before ``round((f32(a) * s[n] + f32(q - 133) * 0.06) / 0.04)``, after ``round(f32(a) * s'[n] + f32(q - 133) * 1.5)``; before
    ``f32(i32(u8(round(x) + z)) - 7)``, after ``min(max(round(x) + z, 0), 255) - 7``."""
    made: dict[str, Packing] = {}

    def fix(e: Expr) -> Expr | None:
        if e.op == "cast" and e.dtype is f32:
            return _through_bytes(e.args[0], constants)
        if e.op != "div" or e.dtype is not f32 or e.args[1].op != "const" or not np.isfinite(e.args[1].attr) or e.args[1].attr <= 0:
            return None
        return _divided(e.args[0], e.args[1].attr, s, constants, made)

    st = s.stages[out]
    e = rewrite(st.expr, fix)
    if e is st.expr:
        return s
    used = {x.attr[0].name for x in loads(e)}
    packed = {n: p for n, p in made.items() if n in used}
    return replace(s, stages={**s.stages, out: replace(st, expr=e)}, packed={**s.packed, **packed}, trace=(*s.trace, ("simplify_epilogue", out)))


def _through_bytes(e: Expr, constants: Mapping[str, Any]) -> Expr | None:
    """``f32(i32(u8(v)) - c)`` for a whole number v; u8 alone, where NaN gives 0 either way."""
    c = None
    if e.op == "sub" and e.dtype is i32 and e.args[1].op == "const":
        e, c = e.args
    if e.op != "cast" or e.args[0].op != "cast" or e.args[0].dtype.name != "u8" or e.args[0].args[0].dtype is not f32:
        return None
    v = e.args[0].args[0]
    if not all(x.op == "round" or _whole(x, constants) for x in (v.args if v.op == "add" else (v,))):
        return None
    r = minimum(maximum(v, const(0.0, f32)), const(255.0, f32))
    return r if c is None else r - const(float(c.attr), f32)


def _whole(e: Expr, constants: Mapping[str, Any]) -> bool:
    """A constant whole number that f32 adds exactly to another."""
    if e.op == "const":
        return float(e.attr).is_integer() and abs(e.attr) < EXACT
    a = np.asarray(constants[e.attr[0].name]) if e.op == "load" and e.attr[0].name in constants else None
    return a is not None and bool((a == np.rint(a)).all() and (np.abs(a) < EXACT).all())


def _divided(e: Expr, c: float, s: Schedule, constants: Mapping[str, Any], made: dict[str, Packing]) -> Expr | None:
    """``e / c`` with the division done in constants; None where a part of it has none."""
    if e.op == "const":
        return const(float(e.attr) / c, f32)
    if e.op == "load" and e.attr[0].name in constants and load_parts(e)[2] is None:
        buf = e.attr[0]
        name = f"{buf.name}.by{len(made)}"
        new = replace(buf, name=name)
        made[name] = ScaledPacking(buf.name, (), (), s.compute, new, c)
        return load(new, load_parts(e)[1])
    if e.op in ("add", "sub"):
        a, b = (_divided(x, c, s, constants, made) for x in e.args)
        return None if a is None or b is None else a + b if e.op == "add" else a - b
    if e.op == "mul":
        for x, y in (e.args, e.args[::-1]):
            if y.op == "const" or y.op == "load" and y.attr[0].name in constants:
                d = _divided(y, c, s, constants, made)
                return None if d is None else x * d
        return None
    if e.op == "max" and is_const(e.args[1], 0):
        d = _divided(e.args[0], c, s, constants, made)
        return None if d is None else maximum(d, e.args[1])
    if e.op == "max" and is_const(e.args[0], 0):
        d = _divided(e.args[1], c, s, constants, made)
        return None if d is None else maximum(e.args[0], d)
    return None
