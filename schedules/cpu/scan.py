"""Template for Computes with a Fold (recurrent networks): the work of one round uses lanes.

The loop over time stays serial. Inside it, elementwise steps put their innermost axis in lanes, sums over a state run in lanes
with private partial results. What stands outside of the Fold is scheduled like any pointwise tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.ir.expr import Expr, const, free_vars, load_parts, loads
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.reduction import contiguity, use_lanes
from luthier.schedules.base.schedule import Schedule, Stage, annotate, fuse, pack, reorder, split
from luthier.schedules.cpu import elementwise
from luthier.schedules.cpu.contract import as_product, tile, unroll_lanes
from luthier.schedules.cpu.elementwise import widest_bits

BATCH = 8  # sequences that go through a round together
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
        mine = [n for n, x in inside.items() if x == h]
        out = _in_tiles(_side_by_side(out, h, mine, caps), h, mine, caps, constants)
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


def _in_tiles(s: Schedule, host: str, inside: Sequence[str], caps: Capabilities, constants: Mapping[str, Any]) -> Schedule:
    """Sequences of a batch go through a round together, so that a matrix which meets all of them is read once: its products are register
    tiles over packed panels."""
    st = s.stages[host]
    f = st.fold
    assert f is not None
    row = next((lp for lp in st.loops if f.axes and lp.var is st.subst[f.axes[-1].var]), None)
    n = None if row is None else s.static_extent(row.var)
    found = [x for x in (_panel(s, k, f.axes[-1].var, caps, constants) for k in inside) if x is not None] if n is not None and n > 1 else []
    if row is None or n is None or not found or any(s.stages[k].reduction is not None for k in inside if k not in {x[0] for x in found}):
        return s
    size = next(k for k in range(min(n, BATCH), 0, -1) if n % k == 0)
    if size == 1:
        return s
    outer = [lp.name for lp in st.loops if not lp.reduce and lp is not row]
    s = split(s, row.name, size, into=(f"{row.name}.0", f"{row.name}.1"))
    s = reorder(s, *outer, f"{row.name}.0", *(lp.name for lp in st.loops if lp.reduce), f"{row.name}.1")
    s = annotate(s, outer[0] if outer else f"{row.name}.0", "parallel")
    lanes = caps.lanes(32)
    for k, param, d in found:
        own = s.stages[k]
        red = own.reduction
        assert red is not None
        mu, nr = tile(const(size), own.axes[-1].extent, lanes, caps.registers, exact=True, issue=caps.issue)
        if f"{param}.pack" not in s.packed:
            x = next(x for x in loads(own.expr) if x.attr[0].name == param)
            others = [i for i in range(x.attr[0].rank) if i != d]
            s = pack(s, param, (*others[:-1], d, others[-1]), {d: nr * lanes})
        own = s.stages[k]
        b, q = (lp.name for lp in own.loops[-2 - len(red.attr[1]) :][:2])
        reds = [lp.name for lp in own.loops if lp.reduce]
        s = split(split(s, q, nr * lanes), b, mu, "cut")
        s = reorder(s, f"{q}.0", f"{b}.0", *reds, f"{b}.1", f"{q}.1")
        s = unroll_lanes(annotate(s, f"{b}.1", "unroll"), f"{q}.1", nr * lanes, lanes)
    return s


def _panel(s: Schedule, name: str, row: Expr, caps: Capabilities, constants: Mapping[str, Any]) -> tuple[str, str, int] | None:
    """(tensor, constant matrix, its dimension of results) of ``sum_k h[row, k] * R[.., q, k]``."""
    st = s.stages[name]
    if st.reduction is None or len(st.axes) < 2 or st.axes[-2].var is not row or as_product(st.reduction.args[0]) is None:
        return None
    q = st.axes[-1]
    mine = [x for x in loads(st.expr) if q.var in free_vars(x)]
    if len(mine) != 1 or row in free_vars(mine[0]) or mine[0].attr[0].name not in constants or q.extent.op != "const" or q.extent.attr % caps.lanes(32):
        return None
    buf, idx, mask, _ = load_parts(mine[0])
    d = [k for k, i in enumerate(idx) if q.var in free_vars(i)]
    base = idx[d[0]] - q.var
    first = next((w for w in (8, 4, 2, 1) if q.extent.attr % (w * caps.lanes(32)) == 0), 1)
    return (name, buf.name, d[0]) if mask is None and len(d) == 1 and buf.rank > 1 and base.op == "const" and base.attr % (first * caps.lanes(32)) == 0 else None


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
