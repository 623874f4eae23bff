"""The position of an extreme value along a row, in lanes.

Before ``o[i] = argmax[k](x[i, k], k).1``, after ``m[i] = max[k](x[i, k]); o[i] = min[k](select(x[i, k] == m[i], k, last))``: two
reductions that vectorise, for one of pairs that does not. The row is read twice, the second time from cache. Of floats the first one is
``nanmax``, and NaN counts as equal to the extreme value. An empty row gives an index inside the row.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import Axis, Compute, Pull, carried, normalize, pull, reduce_
from luthier.ir.dtypes import i32
from luthier.ir.expr import cast, const, is_const, load, load_parts, loads, maximum, minimum, select, substitute, unary, var
from luthier.schedules.cpu.elementwise import flat, stride

SHORT = 32  # elements that one thread goes through by itself
PLAIN = {"argmax": ("max", "min"), "argmin": ("min", "min"), "argmax_last": ("max", "max"), "argmin_last": ("min", "max")}


def split_arg(c: Compute, anywhere: bool = False) -> Compute:
    """The Compute with such reductions split where the reduced axis is contiguous, its index known to fit 32 bits and nothing else
    of the pair is read."""
    if not any(isinstance(x, Pull) and _position(x, anywhere) for x in c.lets):
        return c
    lets: list[Pull] = []
    for x in normalize(c).lets:
        if not isinstance(x, Pull):
            return c
        lets += _split(x) if _position(x, anywhere) else [x]
    return replace(c, lets=tuple(lets))


def _position(x: Pull, anywhere: bool) -> bool:
    e = x.expr
    if e.op != "proj" or e.attr != 1 or e.args[0].op != "reduce":
        return False
    monoid, axes, n = e.args[0].attr
    if monoid not in PLAIN or len(axes) != 1 or n != 2 or len(e.args[0].args) != 2:
        return False
    extent = axes[0].extent
    if not anywhere and (extent.op != "const" or extent.attr >= 1 << 24):
        return False
    value, index = e.args[0].args
    k = axes[0].var
    xs = loads(value)
    if index is not cast(k, index.dtype):
        return False
    if anywhere:
        return extent.op != "const" or extent.attr > SHORT
    if len(xs) != 1 or value.dtype.bits < 32:
        return False
    buf, idx, mask, _ = load_parts(xs[0])
    d = stride(flat(buf, idx), k)
    return mask is None and d is not None and is_const(d, 1)


def _split(x: Pull) -> list[Pull]:
    red = x.expr.args[0]
    monoid, (k,), _ = red.attr
    value, index = red.args
    best, which = PLAIN[monoid]
    again = {a.var: var(a.name + "'", lo=0, hi=a.extent - 1) for a in (*x.axes, k)}
    m = pull(f"{x.name}.best", [Axis(again[a.var], a.extent) for a in x.axes], reduce_(carried(best, value.dtype), [Axis(again[k.var], k.extent)], substitute(value, again)))
    none = const(i32.limits()[1] if which == "min" else -1, i32)
    hit = value.eq(load(m.buf, [a.var for a in x.axes]))
    found = select(hit | unary("isnan", value) if value.dtype.is_float else hit, cast(k.var, i32), none)
    w = {a.var: var(a.name + '"', lo=0, hi=a.extent - 1) for a in (*x.axes, k)}
    at = pull(f"{x.name}.at", [Axis(w[a.var], a.extent) for a in x.axes], substitute(reduce_(which, [k], found), {a.var: w[a.var] for a in x.axes}))
    i = load(at.buf, [a.var for a in x.axes])
    inside = minimum(i, cast(k.extent - 1, i32)) if which == "min" else maximum(i, const(0, i32))
    return [m, at, Pull(x.buf, x.axes, cast(inside, index.dtype))]
