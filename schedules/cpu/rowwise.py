"""Template for softmax, normalisations and reductions: every reduction lives in the loop over the rows of its consumer.

``out[r, c] = f(x[r, c], m[r], ...)`` with ``m[r] = reduce over c``: rows are parallel, reductions and output walk a row in
lanes, and intermediate rows stay in a local buffer when they fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, const, free_vars, is_const, load_parts, loads, rewrite
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.reduction import contiguity, use_lanes
from luthier.schedules.base.schedule import Schedule, Stage, annotate, fuse, in_runs, inline, reorder, split, stage
from luthier.schedules.cpu.elementwise import widest_bits

KNOBS = (Knob("row_bytes", "of an intermediate row that is kept; a longer one is computed again where it is read", (0, 1 << 12, 1 << 16)),)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, row_bytes: int | None = None) -> Schedule | None:
    """``row_bytes``: of an intermediate row that is kept; a longer one is computed again where it is read. A quarter of the second-level
    cache, as far as a stack holds it."""
    row_bytes = min(caps.l2 // 4, caps.local_bytes // 2) if row_bytes is None else row_bytes
    if caps.gpu or len(s.compute.outs) != 1 or any(st.push or st.fold for st in s.stages.values()):
        return None
    out = s.stages[s.compute.outs[0]]
    if list(s.stages)[-1] != out.name or not any(st.reduction is not None for st in s.stages.values()):
        return None
    s = in_runs(s)
    if out.reduction is not None:
        return _root_reduction(s, caps) if len(s.stages) == 1 else None
    pos = positions(s, out.name)
    if pos is None or contractions(s) > 1:
        return None
    s = _divide_once(s, out)
    out = s.stages[out.name]
    depth = max((p + 1 for m in pos.values() for p in m if p is not None), default=0)
    for n, m in pos.items():  # a reduction over fewer axes than its reader's rows would be done again for each of them
        own = max((p + 1 for p in m if p is not None), default=0)
        again = [a.extent for a in out.axes[own:depth] if not is_const(a.extent, 1)]
        if again and s.stages[n].reduction is not None and own < depth:
            return None
    if depth == 0 or depth > len(out.axes) or any(st.at is not None for st in s.stages.values()):
        return None
    for n in [n for n in s.stages if n != out.name]:  # rows that cannot be kept are computed again where they are read
        st = s.stages[n]
        free = [a for a, p in zip(st.axes, pos[n], strict=True) if p is None]
        size = st.buf.dtype.itemsize
        for a in free:
            size = size * a.extent.attr if a.extent.op == "const" and size >= 0 else -1
        if free and not 0 <= size <= row_bytes:
            if st.reduction is not None:
                return None
            s = inline(s, n)
    if depth == len(out.axes):
        cols = _columns(s, caps, pos)
        if cols is not None:
            return cols
        for n, m in pos.items():  # the same where the axis that such rows share stands before the others: softmax over the first of two
            again = [a.extent for p, a in enumerate(out.axes) if p not in m and not is_const(a.extent, 1)]
            if again and n in s.stages and s.stages[n].reduction is not None:
                return None
    names = [lp.name for lp in out.loops[:depth]]
    while len(names) > 1:
        s = fuse(s, names[0], names[1])
        names = [s.stages[out.name].loops[0].name, *names[2:]]
    for n in [n for n in s.stages if n != out.name]:
        s = stage(s, n, at=names[0])
    for n in [n for n in s.stages if n != out.name]:
        st = s.stages[n]
        if st.reduction is not None:
            s = use_lanes(s, n, caps, spatial_ok=False)
        else:
            s = _lanes_of_row(s, n, caps, pos[n])
    # parts of split reductions must live inside the row as well
    for n in list(s.stages):
        if n.endswith(".p") and s.stages[n].at is None:
            s = stage(s, n, at=names[0])
    o = s.stages[out.name]
    if len(o.loops) > 1:
        last = o.loops[-1]
        lanes = caps.lanes(widest_bits(o))
        k = s.static_extent(last.var)
        if lanes > 1 and (k is None or k >= lanes):
            s = split(s, last.name, lanes * _registers(k, lanes, caps), "cut")
            s = annotate(s, f"{last.name}.1", "vectorize")
    return annotate(s, names[0], "parallel")


def _columns(s: Schedule, caps: Capabilities, pos: dict[str, list[int | None]]) -> Schedule | None:
    """Every point of the output reduces over other axes (pooling, column sums): lanes along the innermost output axis when all
    loads of the reductions walk it contiguously. None when they do not."""
    out = s.stages[s.compute.outs[0]]
    others = [n for n in s.stages if n != out.name]
    lanes = min(caps.lanes(widest_bits(s.stages[n])) for n in s.stages)
    last = out.loops[-1].name
    k = s.static_extent(out.loops[-1].var)
    if lanes == 1 or (k is not None and k < lanes):
        return None
    for n in others:
        st = s.stages[n]
        if not st.axes or pos[n][-1] != len(out.axes) - 1 or contiguity(st, st.axes[-1].var)[1]:
            return None
        if st.reduction is not None and (st.reduction.attr[2] != 1 or not contiguity(st, st.axes[-1].var)[0]):
            return None
    used = {p for n in others if s.stages[n].reduction is not None for p in pos[n]}
    inner = [k for k in range(len(out.loops) - 1) if k not in used]  # axes that no reduction depends on: walked inside
    for n in others:
        st = s.stages[n]
        if st.reduction is None and any(p in inner for p in pos[n]):
            size = st.buf.dtype.itemsize * lanes
            for a, p in zip(st.axes, pos[n], strict=True):
                if p in inner:
                    size = size * a.extent.attr if a.extent.op == "const" and size >= 0 else -1
            if not 0 <= size <= 1 << 15:
                s = inline(s, n)
    others = [n for n in others if n in s.stages]
    rows = [lp.name for k, lp in enumerate(out.loops[:-1]) if k not in inner]
    s = split(s, last, lanes, "cut")
    if inner:
        s = reorder(s, *rows, f"{last}.0", *(out.loops[k].name for k in inner), f"{last}.1")
    while len(rows) > 1:
        s = fuse(s, rows[0], rows[1])
        rows = [s.stages[out.name].loops[0].name, *rows[2:]]
    s = annotate(s, f"{last}.1", "vectorize")
    for n in others:
        s = stage(s, n, at=f"{last}.0")
        st = s.stages[n]
        mine = st.loops[len(st.axes) - 1].name
        reds = [lp for lp in st.loops if lp.reduce]
        if reds:
            s = reorder(s, *(lp.name for lp in reds), mine)
        s = annotate(s, mine, "vectorize")
        size = 1
        for lp in reversed(reds):
            e = s.static_extent(lp.var)
            if e is None or size * e > 9:
                break
            size *= e
            s = annotate(s, lp.name, "unroll")
    return annotate(s, rows[0] if rows else f"{last}.0", "parallel")


def contractions(s: Schedule) -> int:
    """Reductions of products whose factors have an axis of their own: work that grows faster than what is read."""
    n = 0
    for st in s.stages.values():
        r = st.reduction
        if r is None or r.attr[0] != "sum" or r.args[0].op != "mul":
            continue
        a, b = (free_vars(x) & {y.var for y in st.axes} for x in r.args[0].args)
        n += bool(a - b) and bool(b - a)
    return n


def positions(s: Schedule, out: str) -> dict[str, list[int | None]] | None:
    """For every axis of every intermediate tensor: which axis of the output it follows (None: none, or not always the same)."""
    o = s.stages[out]
    res: dict[str, list[int | None]] = {}
    maps: dict[str, dict[Expr, int]] = {out: {a.var: i for i, a in enumerate(o.axes)}}
    for n in reversed(list(s.stages)):
        st = s.stages[n]
        if n == out:
            continue
        found: list[set[int | None]] = [set() for _ in st.axes]
        used = False
        for u in s.stages.values():
            for x in loads(u.expr):
                if x.attr[0].name != n:
                    continue
                if u.name not in maps:
                    return None
                used = True
                for d, i in enumerate(load_parts(x)[1]):
                    if not (is_const(i, 0) and is_const(st.axes[d].extent, 1)):
                        found[d].add(maps[u.name].get(i))
                    elif d < len(o.axes) and is_const(o.axes[d].extent, 1):
                        found[d].add(d)
        if not used:
            return None
        res[n] = [f.pop() if len(f) == 1 else None for f in found]
        maps[n] = {a.var: p for a, p in zip(st.axes, res[n], strict=True) if p is not None}
    return res


def _lanes_of_row(s: Schedule, name: str, caps: Capabilities, pos: list[int | None]) -> Schedule:
    st = s.stages[name]
    free = [i for i, p in enumerate(pos) if p is None]
    if not free:
        return s
    lp = st.loops[free[-1]]
    lanes = caps.lanes(widest_bits(st))
    n = s.static_extent(lp.var)
    if lanes > 1 and n is not None and n >= lanes:
        s = split(s, lp.name, lanes * _registers(n, lanes, caps), "cut")
        s = annotate(s, f"{lp.name}.1", "vectorize")
    return s


def _divide_once(s: Schedule, out: Stage) -> Schedule:
    """A division of every element of a row by ``sum(exp(x - max(x)))``, which is at least 1 (so that nothing overflows), becomes a
    multiplication by its reciprocal. The result is off by one rounding more, 2**-24 of its magnitude."""

    def fix(e: Expr) -> Expr | None:
        if e.op != "div" or e.dtype is not f32 or e.args[1].op != "load" or not _at_least_one(s, e.args[1].attr[0].name):
            return None
        return e.args[0] * (const(1.0, f32) / e.args[1])

    new = rewrite(out.expr, fix)
    return s if new is out.expr else replace(s, stages={**s.stages, out.name: replace(out, expr=new)}, trace=(*s.trace, ("divide_once", out.name)))


def _at_least_one(s: Schedule, name: str) -> bool:
    total = s.stages[name].reduction if name in s.stages else None
    if total is None or total.attr[0] != "sum" or total.args[0].op != "load":
        return False
    e = s.stages[total.args[0].attr[0].name].expr if total.args[0].attr[0].name in s.stages else None
    if e is None or e.op != "exp" or e.args[0].op != "sub" or e.args[0].args[1].op != "load":
        return False
    x, top = e.args[0].args
    m = s.stages[top.attr[0].name].reduction if top.attr[0].name in s.stages else None
    over = None if m is None or m.attr[0] != "max" else m.args[0]
    return over is not None and over.op == x.op == "load" and over.attr[0].name == x.attr[0].name


def _registers(n: int | None, lanes: int, caps: Capabilities) -> int:
    """Registers that a round of a loop over ``n`` elements fills: two where they divide it and loops are printed as they stand."""
    return 2 if caps.whole_registers and n is not None and n % (2 * lanes) == 0 else 1


def _root_reduction(s: Schedule, caps: Capabilities) -> Schedule:
    name = s.compute.outs[0]
    s = use_lanes(s, name, caps)
    st = s.stages[name]
    names = [lp.name for lp in st.loops if not lp.reduce and lp.kind == "serial"]
    outer = []
    for lp in st.loops:
        if lp.name not in names:
            break
        outer.append(lp.name)
    moved = {x.at[1].attr[0] for x in s.stages.values() if x.at is not None}
    while len(outer) > 1 and not moved & set(outer[:2]):
        s = fuse(s, outer[0], outer[1])
        outer = [s.stages[name].loops[0].name, *outer[2:]]
    if outer:
        s = annotate(s, outer[0], "parallel")
    return s

