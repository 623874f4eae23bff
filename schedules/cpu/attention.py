"""Template for attention: two contractions with a softmax between them, in one kernel.

``s = q . k; m = max s; p = exp(s - m); l = sum p; o = p . v / l`` for a tile of query rows at a time: the scores of the tile stay
in a local buffer, both products use the register tile of :mod:`luthier.schedules.cpu.contract`, and the keys of a head are
transposed once into a local copy so that the lanes of the first product run along them. A single query row (a decode step)
needs no copy: lanes run along the head dimension instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Pull, axis
from luthier.ir.expr import Expr, const, free_vars, is_const, load, load_parts, loads, rewrite
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.reduction import use_lanes
from luthier.schedules.base.schedule import Schedule, annotate, fuse, pull_stage, reorder, split, stage
from luthier.schedules.cpu.contract import as_product, factors_of, tile, unroll_lanes
from luthier.schedules.cpu.elementwise import flat, stride
from luthier.schedules.cpu.rowwise import positions

MANY_ROWS = 256  # for fewer of them a copy of the keys in memory costs more than it saves


KNOBS = (Knob("rows", "query rows whose scores are kept at once", (1, 2, 4, 6, 8, 12)),)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, rows: int | None = None) -> Schedule | None:
    if caps.gpu or len(s.compute.outs) != 1 or any(st.push or st.fold for st in s.stages.values()):
        return None
    out = s.compute.outs[0]
    prods = [n for n, st in s.stages.items() if st.reduction is not None and st.reduction.attr[0] == "sum" and as_product(st.reduction.args[0]) is not None]
    if len(prods) != 2 or list(s.stages)[-1] != out or s.stages[out].reduction is not None:
        return None
    first, second = prods
    pos = positions(s, out)
    if pos is None or None in pos[second] or len(pos[first]) < 2 or pos[first][-1] is not None or None in pos[first][:-1]:
        return None
    o = s.stages[out]
    row = len(o.axes) - 2
    if max(p for p in pos[first] if p is not None) != row:
        return None
    # batch and heads may be open: they are loops around it all
    placed = [(a, p) for n, st in s.stages.items() for a, p in zip(st.axes, pos.get(n, range(len(st.axes))), strict=True)]
    if any(a.extent.op != "const" for a, p in placed if p is None or p >= row):
        return None
    q_ext, k_ext = o.axes[row].extent.attr, s.stages[first].axes[-1].extent.attr
    lanes = caps.lanes(32)
    nr = 2 if caps.registers <= 16 else 4  # one width for both products: keys' count and head size rarely share a divisor
    mu = rows or tile(const(q_ext), const(nr * lanes), lanes, caps.registers, width=nr)[0]
    if mu * -(-k_ext // (nr * lanes)) * nr * lanes * s.stages[first].buf.dtype.itemsize > caps.local_bytes:
        return None
    if q_ext > 1:
        s2 = _transpose_keys(s, first, q_ext, caps.local_bytes)
        if s2 is None:
            return None
        s = s2
    d_loop = o.loops[-1].name
    # a single row keeps eight vectors of the output going, or the additions would wait for each other
    nd = min((nr if q_ext > 1 else 8) * lanes, -(-o.axes[-1].extent.attr // lanes) * lanes)
    s = split(s, d_loop, nd, "guard", into=(f"{out}.do", f"{out}.di"))
    i_loop = o.loops[row].name
    heads = [lp.name for lp in o.loops[:row]]
    s = split(s, i_loop, mu, "cut", into=(f"{out}.qo", f"{out}.qi"))
    s = reorder(s, f"{out}.qo", f"{out}.do", f"{out}.qi", f"{out}.di")
    s = annotate(s, f"{out}.qi", "unroll")
    s = unroll_lanes(s, f"{out}.di", nd, lanes)
    while len(heads) > 1:
        s = fuse(s, heads[0], heads[1])
        heads = [s.stages[out].loops[0].name, *heads[2:]]
    if not heads:
        return None
    s = annotate(s, heads[0], "parallel")
    for n in [n for n in s.stages if n != out]:
        if n.endswith(".t"):
            copy = s.stages[n]
            s = stage(s, n, at=heads[0]) if copy.buf.scope == "local" else annotate(s, copy.loops[0].name, "parallel")
            s = _in_blocks(s, n, lanes)
        elif n == second:
            s = stage(s, n, at=f"{out}.do")
        else:
            s = stage(s, n, at=f"{out}.qo")
    s = _first_product(s, first, k_ext, mu, nr * lanes, lanes, caps, q_ext)
    for n in list(s.stages):
        st = s.stages[n]
        if n in (out, first, second) or n.endswith((".t", ".p")) or st.at is None:
            continue
        if st.reduction is not None:
            before = set(s.stages)
            s = use_lanes(s, n, caps, spatial_ok=False)
            for x in set(s.stages) - before:
                if s.stages[x].at is None:
                    s = stage(s, x, at=f"{out}.qo")
        elif n != _epilogue(s, first):
            lp = st.loops[-1]
            if pos[n][-1] is None and k_ext >= lanes:
                s = split(s, lp.name, lanes, "cut")
                s = annotate(s, f"{lp.name}.1", "vectorize")
    return _second_product(s, second, nd, lanes)


def _in_blocks(s: Schedule, name: str, lanes: int) -> Schedule:
    """The copy of transposed keys in square blocks (:mod:`luthier.passes.loop.transpose_blocks`) where both extents are whole
    blocks."""
    *_, d, j = (lp.name for lp in s.stages[name].loops)
    side = min(lanes, 16)
    if any((s.static_extent(lp.var) or 1) % side for lp in s.stages[name].loops[-2:]):
        return s
    s = annotate(annotate(split(split(s, d, side), j, side), f"{d}.1", "unroll"), f"{j}.1", "vectorize")
    return reorder(s, f"{d}.0", f"{j}.0", f"{d}.1", f"{j}.1")


def _epilogue(s: Schedule, first: str) -> str | None:
    """The elementwise tensor (scale, mask) that is the only reader of the scores."""
    readers = [n for n, st in s.stages.items() if any(x.attr[0].name == first for x in loads(st.expr))]
    if len(readers) == 1 and s.stages[readers[0]].reduction is None and len(s.stages[readers[0]].axes) == len(s.stages[first].axes):
        return readers[0]
    return None


def _first_product(s: Schedule, first: str, k_ext: int, mu: int, nv: int, lanes: int, caps: Capabilities, q_ext: int) -> Schedule:
    if q_ext == 1:
        before = set(s.stages)
        at = s.stages[first].at
        s = use_lanes(s, first, caps, spatial_ok=False)
        for x in set(s.stages) - before:
            if s.stages[x].at is None and at is not None:
                s = stage(s, x, at=at[1].attr[0])
        return s
    epi = _epilogue(s, first)
    host = epi or first
    st = s.stages[host]
    n = len(st.axes)
    jl, il = st.loops[n - 1].name, st.loops[n - 2].name
    if epi is not None:
        s = split(s, jl, nv, "cut", into=(f"{host}.jo", f"{host}.ji"))
        s = reorder(s, f"{host}.jo", il, f"{host}.ji")
        s = annotate(s, il, "unroll")
        s = unroll_lanes(s, f"{host}.ji", nv, lanes)
        s = stage(s, first, at=f"{host}.jo")
        a = s.stages[first]
        jl, il = a.loops[n - 1].name, a.loops[n - 2].name
        reds = [lp.name for lp in a.loops if lp.reduce]
        s = reorder(s, *reds, il, jl)
        s = annotate(s, il, "unroll")
        return unroll_lanes(s, jl, nv, lanes)
    reds = [lp.name for lp in st.loops if lp.reduce]
    s = split(s, jl, nv, "cut", into=(f"{first}.jo", f"{first}.ji"))
    s = reorder(s, f"{first}.jo", *reds, il, f"{first}.ji")
    s = annotate(s, il, "unroll")
    return unroll_lanes(s, f"{first}.ji", nv, lanes)


def _second_product(s: Schedule, second: str, nd: int, lanes: int) -> Schedule:
    a = s.stages[second]
    n = len(a.axes)
    dl, il = a.loops[n - 1].name, a.loops[n - 2].name
    reds = [lp.name for lp in a.loops if lp.reduce]
    s = reorder(s, *reds, il, dl)
    s = annotate(s, il, "unroll")
    return unroll_lanes(s, dl, nd, lanes)


def _transpose_keys(s: Schedule, first: str, rows: int, room: int) -> Schedule | None:
    """``k.t[.., d, j] = K[.., j, d]`` as a stage of its own, read by the first product. None when the keys are no plain load, or
    too many for the stack and read by few rows."""
    st = s.stages[first]
    red = st.reduction
    assert red is not None
    j = st.axes[-1].var
    p, q = factors_of(st)
    if j not in free_vars(p):
        p, q = q, p
    ls = [x for x in loads(p) if j in free_vars(x)]
    if len(ls) != 1 or j in free_vars(q) or len(red.attr[1]) != 1:
        return None
    x = ls[0]
    buf, idx, m, _ = load_parts(x)
    if m is not None:
        return None
    d = stride(flat(buf, idx), j)
    if d is not None and is_const(d, 1):
        return s
    da = red.attr[1][0]
    row_vars = [a for a in st.axes[:-1] if a.var in free_vars(x)]
    axes = [*row_vars, da, st.axes[-1]]
    new = [axis(f"{a.name}t", a.extent) for a in axes]
    sub: dict[Expr, Expr] = {a.var: b.var for a, b in zip(axes, new, strict=True)}
    from luthier.ir.expr import substitute

    if da.extent.op != "const":
        return None
    size = buf.dtype.itemsize * da.extent.attr * st.axes[-1].extent.attr
    if size > room and rows < MANY_ROWS:
        return None
    scope = "local" if size <= room else "global"  # keys too many for the stack are transposed by a kernel of their own
    tb = replace(buf, name=f"{buf.name}.t", shape=tuple(a.extent for a in new), scope=scope, writable=True)
    ext = dict(s.ext)
    tst = pull_stage(Pull(tb, tuple(new), substitute(x, sub)), ext)
    expr = rewrite(st.expr, lambda e: load(tb, [a.var for a in axes]) if e is x else None)
    return replace(s, stages={tb.name: tst, **s.stages, first: replace(st, expr=expr)}, ext=ext, trace=(*s.trace, ("transpose", buf.name)))
