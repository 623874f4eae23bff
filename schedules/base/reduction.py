"""How one reduction stage uses lanes; shared by the templates that contain reductions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luthier.ir.compute import MONOIDS, Pull, axis, reduce_
from luthier.ir.expr import Expr, const, free_vars, is_const, load, load_parts, loads, rewrite, substitute, vars_outside_loads
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.schedule import Schedule, Stage, annotate, peel, pull_stage, reorder, split, stage
from luthier.schedules.base.simplify_axes import split_reduced_axes
from luthier.schedules.cpu.elementwise import flat, stride, widest_bits


def contiguity(st: Stage, v: Expr) -> tuple[int, int]:
    """(loads that walk ``v`` with stride 1, loads that walk it otherwise)."""
    good = bad = 0
    for x in loads(st.expr):
        b, idx, _, _ = load_parts(x)
        d = stride(flat(b, idx), v)
        if d is not None and d.op == "const" and d.attr == 0:
            continue
        if d is not None and d.op == "const" and d.attr == 1:
            good += 1
        else:
            bad += 1
    return good, bad


def fitting(n: int | None, lanes: int) -> int:
    """The lanes for ``n`` elements: all, or where there are fewer elements the largest power of two that they fill, 1 below four."""
    if n is None or n >= lanes:
        return lanes
    return 1 << (n.bit_length() - 1) if n >= 4 else 1


def use_lanes(s: Schedule, name: str, caps: Capabilities, spatial_ok: bool = True) -> Schedule:
    """Lanes for a reduction: over its innermost spatial axis if the loads walk that contiguously, else over the innermost
    reduction axis with private partial results (merged in a fixed order)."""
    st = s.stages[name]
    red = st.reduction
    assert red is not None
    lanes = caps.lanes(widest_bits(st))
    if lanes == 1:
        return s
    sp = [(i, a) for i, a in enumerate(st.axes)]
    if spatial_ok and sp:
        _, a = sp[-1]
        loop = next((lp for lp in st.loops if lp.var is st.subst[a.var]), None)
        good, bad = contiguity(st, a.var)
        if loop is not None and bad == 0 and good:
            n = s.static_extent(loop.var) if st.at is None else None
            if (n is None and st.at is None) or (n is not None and n >= lanes):
                f = lanes * 4 if n is not None and n >= lanes * 4 else lanes
                s = split(s, loop.name, f, "cut")
                reds = [lp.name for lp in s.stages[name].loops if lp.reduce]
                s = reorder(s, f"{loop.name}.0", *reds, f"{loop.name}.1")
                return annotate(s, f"{loop.name}.1", "vectorize")
    axes = red.attr[1]
    if red.attr[2] != 1 or MONOIDS[red.attr[0]].vector is None:
        return s
    for a in reversed(axes):
        loop = next((lp for lp in st.loops if lp.var is st.subst[a.var]), None)
        if loop is None:
            continue
        good, bad = contiguity(st, a.var)
        n = s.static_extent(loop.var)
        lanes = fitting(n, lanes)
        if bad or not good or lanes == 1:
            continue
        f = lanes * 4 if n is None or n >= lanes * 8 else lanes
        s = split(s, loop.name, f)
        s = stage(s, name, private=f"{loop.name}.1")
        p = f"{name}.p"
        ps = s.stages[p]
        lane = ps.loops[len(ps.axes) - 1]
        reds = [lp for lp in ps.loops if lp.reduce]
        s = reorder(s, *(lp.name for lp in ps.loops if lp is not lane), lane.name)
        s = annotate(s, lane.name, "vectorize")
        if reds and (n is None or n % f):
            s = peel(s, reds[-1].name)
        m = s.stages[name]
        s = annotate(s, m.loops[-1].name, "vectorize")
        at = m.loops[len(m.axes) - 1].name if m.axes else None
        if at is not None:
            s = stage(s, p, at=at)
        return s
    return s


def merge_reduced(s: Schedule, name: str) -> Schedule:
    """Adjacent axes of a reduction that all loads walk as one become one: kw and ic of an unpadded row, the pixels of an image."""
    st = s.stages[name]
    red = st.reduction
    assert red is not None
    if len(red.args) != 1 or red.attr[2] != 1 or st.expr is not red:
        return s
    new_axes, e = split_reduced_axes(red.attr[1], red.args[0])
    axes = list(new_axes)
    k = len(axes) - 1
    apart = vars_outside_loads(e)
    while k > 0:
        a, b = axes[k - 1], axes[k]
        good = apart.isdisjoint((a.var, b.var))
        for x in loads(e):
            buf, idx, m, _ = load_parts(x)
            f = flat(buf, idx)
            da, db = stride(f, a.var), stride(f, b.var)
            good = good and m is None and da is not None and db is not None and (da is db * b.extent or is_const(b.extent, 1))
        if good:
            j = axis(f"{a.name}{b.name}", a.extent * b.extent)
            env = {a.var: j.var, b.var: const(0)} if is_const(b.extent, 1) else {a.var: const(0), b.var: j.var}

            def view(x: Expr, env: Any = env) -> Expr | None:
                if x.op != "load":
                    return None
                lb, idx, m, o = load_parts(x)
                if not any(free_vars(i) & env.keys() for i in idx):
                    return None
                return load(replace(lb, shape=(lb.size(),)), (substitute(flat(lb, idx), env),), m, o)

            e = rewrite(e, view)
            axes[k - 1 : k + 1] = [j]
        k -= 1
    if e is red.args[0]:
        return s
    ext = {k2: v2 for k2, v2 in s.ext.items() if k2.attr[0].rsplit(".", 1)[0] != name}
    st2 = pull_stage(Pull(st.buf, st.axes, reduce_(red.attr[0], axes, e)), ext)
    return replace(s, stages={**s.stages, name: replace(st2, scope=st.scope)}, ext=ext, trace=(*s.trace, ("merge_reduced", name)))
