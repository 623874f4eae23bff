"""Template for Computes with a Fold (recurrent networks): the work of one round uses lanes.

The loop over time stays serial. Inside it, elementwise steps put their innermost axis in lanes, sums over a state run in lanes
with private partial results. What stands outside of the Fold is scheduled like any pointwise tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.ir.expr import Expr
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.reduction import contiguity, use_lanes
from luthier.schedules.base.schedule import Schedule, Stage, annotate, fuse, reorder, split
from luthier.schedules.cpu import elementwise
from luthier.schedules.cpu.elementwise import widest_bits

ROWS = 8  # running sums that go on side by side in straight code


KNOBS = elementwise.KNOBS


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], **knobs: Any) -> Schedule | None:
    """None when the Compute has no Fold."""
    hosts = {n for n, st in s.stages.items() if st.fold is not None}
    if not hosts or caps.gpu:
        return None
    inside = {n: st.at[0] for n, st in s.stages.items() if st.at is not None and st.at[0] in hosts}
    out = elementwise.apply(s, caps, constants, **knobs)
    assert out is not None
    for h in hosts:
        out = _side_by_side(out, h, [n for n, x in inside.items() if x == h], caps)
    for n in inside:
        if not any(lp.kind in ("vectorize", "unroll") for lp in out.stages[n].loops):
            out = _lanes(out, n, caps)
    return out


def _side_by_side(s: Schedule, host: str, inside: Sequence[str], caps: Capabilities) -> Schedule:
    """Running sums of rows that do not depend on each other go on together, so that none waits for its own last addition: in lanes where
    the elements of a round stand behind one another, else a few rows in straight code."""
    st = s.stages[host]
    f = st.fold
    assert f is not None
    if not f.axes or any(q.axes != f.axes for q in f.state) or any(s.stages[n].reduction is not None for n in inside):
        return s
    row = next(lp for lp in st.loops if lp.var is st.subst[f.axes[-1].var])
    lanes = min(caps.lanes(max(widest_bits(s.stages[n]) for n in inside)), 16)
    n = s.static_extent(row.var)
    together = all(_contiguous(s.stages[k], f.axes[-1].var) for k in inside)
    size = (4 * lanes if n is not None and n >= 4 * lanes else lanes) if together else ROWS  # several vectors of a round, which lie side by side
    if n is not None and n < size or size < 2:
        return s
    kind = "vectorize" if together else "unroll"
    s = split(s, row.name, size, into=(f"{row.name}.0", f"{row.name}.1"))
    s = reorder(s, f"{row.name}.0", *(lp.name for lp in st.loops if lp.reduce), f"{row.name}.1")
    s = annotate(s, f"{row.name}.1", kind)
    outer = [lp.name for lp in s.stages[host].loops if not lp.reduce][:-1]
    while len(outer) > 1:
        s = fuse(s, outer[0], outer[1])
        outer = [s.stages[host].loops[0].name, *outer[2:]]
    s = annotate(s, outer[0], "parallel")
    for k in inside:
        own = s.stages[k]
        loop = next(lp for lp in own.loops if lp.var is own.subst[f.axes[-1].var])
        s = annotate(s, loop.name, kind)
        if own.loops[-1] is not loop:
            s = reorder(s, *(lp.name for lp in own.loops if lp is not loop), loop.name)
    return s


def _contiguous(st: Stage, row: Expr) -> bool:
    """Whether the elements of neighbouring rows are neighbours, in what is read and in what is written."""
    good, bad = contiguity(st, row)
    return not bad and (not st.axes or st.axes[-1].var is row)


def _lanes(s: Schedule, name: str, caps: Capabilities) -> Schedule:
    st = s.stages[name]
    if st.reduction is not None:
        return use_lanes(s, name, caps)
    if not st.axes:
        return s
    loop = next((lp for lp in st.loops if lp.var is st.subst[st.axes[-1].var]), None)
    lanes = caps.lanes(widest_bits(st))
    n = None if loop is None else s.static_extent(loop.var)
    if loop is None or lanes == 1 or n is None or n < lanes:
        return s
    s = split(s, loop.name, lanes, "cut")
    return annotate(s, f"{loop.name}.1", "vectorize")
