"""How one reduction stage uses lanes; shared by the templates that contain reductions."""

from __future__ import annotations

from luthier.ir.compute import MONOIDS
from luthier.ir.expr import Expr, load_parts, loads
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.schedule import Schedule, Stage, annotate, peel, reorder, split, stage
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
        if bad or not good or (n is not None and n < lanes):
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
