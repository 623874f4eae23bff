"""Template for windows along the innermost axis: pooling and depthwise convolution of channels-first images, one-dimensional ones, moving
reductions.

``out[.., i, j] = f(reduce[a, b](x[.., s i + a - p, t j + b - q] inside x else e))`` with t = 1 or 2, the value of x perhaps multiplied by
others that are the same for all j (``w[.., a, b]``). Lanes go along j: the padded input of
one plane (or of the rows that one row of the output reads) is copied into a local buffer whose border holds e, so that
no access of the windows is masked; a step of 2 takes two vectors and a shuffle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.ir.expr import bounds, free_vars, is_const, load_parts, loads
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule, annotate, fuse, in_runs, inline, reorder, split, stage
from luthier.schedules.cpu.contract import pad_input, split_epilogue
from luthier.schedules.cpu.elementwise import flat, stride, widest_bits
from luthier.schedules.cpu.rowwise import positions

UNROLLED = 112  # terms of straight code


KNOBS = (Knob("local_bytes", "the largest local copy of a padded plane or of rows, in bytes", (1 << 13, 1 << 18), 1 << 16),)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, local_bytes: int = 1 << 16) -> Schedule | None:
    """``local_bytes``: the largest local copy of a padded plane or of rows."""
    if caps.gpu or len(s.compute.outs) != 1 or any(st.push or st.fold for st in s.stages.values()):
        return None
    out = s.compute.outs[0]
    acc = _window(s)
    if acc is None or list(s.stages)[-1] != out:
        return None
    s = in_runs(s)
    lanes = min(caps.lanes(widest_bits(st)) for st in s.stages.values())
    n = s.static_extent(s.stages[acc].loops[len(s.stages[acc].axes) - 1].var)
    if lanes < 2 or n is None or n < lanes:
        return None
    for name in [name for name in s.stages if name not in (out, acc)]:
        s = inline(s, name)
    if acc == out:
        s, acc = split_epilogue(s, out)
    else:
        pos = positions(s, out)
        if pos is None or pos[acc] != list(range(len(s.stages[out].axes))):
            return None
    s = pad_input(s, acc, caps)
    if any(load_parts(x)[2] is not None for x in loads(s.stages[acc].expr)):
        return None
    *outer, last = (lp.name for lp in s.stages[out].loops)
    s = split(s, last, lanes, "cut")
    s = annotate(s, f"{last}.1", "vectorize")
    block = _rows_together(s, acc)
    if block > 1:
        row = outer[-1]
        s = annotate(split(s, row, block), f"{row}.1", "unroll")
        s = reorder(s, f"{row}.0", f"{last}.0", f"{row}.1", f"{last}.1")
        outer[-1] = f"{row}.0"
    s, rows = _place_padding(s, out, outer, lanes, local_bytes)
    s = stage(s, acc, at=f"{last}.0")
    st = s.stages[acc]
    mine, reds = [lp.name for lp in st.loops[: len(st.axes)]], [lp for lp in st.loops if lp.reduce]
    inner = mine[-2:] if block > 1 else mine[-1:]
    s = annotate(reorder(s, *(lp.name for lp in reds), *inner), inner[-1], "vectorize")
    if block > 1:
        s = annotate(s, inner[0], "unroll")
    size = block
    for lp in reversed(reds):
        e = s.static_extent(lp.var)
        if e is None or size * e > UNROLLED:
            break
        size *= e
        s = annotate(s, lp.name, "unroll")
    return annotate(s, rows, "parallel") if rows else s


def _rows_together(s: Schedule, acc: str) -> int:
    """Rows of the output that are summed side by side: sums do not wait for each other, and rows share factors and elements of x."""
    st = s.stages[acc]
    if len(st.axes) < 2:
        return 1
    n = st.axes[-2].extent.attr
    return next((k for k in (4, 5, 3, 7, 2) if n % k == 0), 1)


def _window(s: Schedule) -> str | None:
    """The one reduction, when it reads one tensor whose last index is ``t * j + window - q`` (t = 1 or 2) of the last output axis, and what
    else it reads depends on axes of that tensor only and not on j (a contraction reuses elements of x and is none)."""
    found = [st for st in s.stages.values() if st.reduction is not None]
    if len(found) != 1 or not found[0].axes:
        return None
    st = found[0]
    red = st.reduction
    assert red is not None
    mine = {a.var for a in st.axes}
    xs = [x for x in loads(*red.args) if st.axes[-1].var in free_vars(x)]
    if red.attr[2] != 1 or len(red.args) != 1 or len(xs) != 1 or xs[0].attr[0].scope != "param" or red.args[0].op == "reduce":
        return None
    if any(x.attr[0].scope != "param" or free_vars(x) & mine - free_vars(xs[0]) for x in loads(*red.args)):
        return None
    buf, idx, _, other = load_parts(xs[0])
    j, window = st.axes[-1].var, {a.var for a in red.attr[1]}
    t = stride(idx[-1], j) if idx else None
    if t is None or not (is_const(t, 1) or is_const(t, 2)) or not free_vars(idx[-1]) & window or any(j in free_vars(i) for i in idx[:-1]):
        return None
    if any(d.op != "const" for d in buf.shape) or any(a.extent.op != "const" for a in (*st.axes, *red.attr[1])) or other is not None and not is_const(other):
        return None
    e = flat(buf, idx)
    good = all(stride(e, a.var) is not None for a in (*st.axes, *red.attr[1]))
    return st.name if good and all(bounds(i)[0] is not None and bounds(i)[1] is not None for i in idx) else None


def _place_padding(s: Schedule, out: str, rows: list[str], lanes: int, local_bytes: int) -> tuple[Schedule, str | None]:
    """The padded copy inside the loop over planes, or inside that over rows when a plane is too large; what is parallel."""
    name = next((n for n in s.stages if n.endswith(".pad")), None)
    if name is None:
        while len(rows) > 1:
            s = fuse(s, rows[0], rows[1])
            rows = [s.stages[out].loops[0].name, *rows[2:]]
        return s, rows[0] if rows else None
    shape = [a.extent.attr for a in s.stages[name].axes]
    plane = 4
    for d in shape[-2:]:
        plane *= d
    outer = rows[:-1] if plane <= local_bytes and len(rows) > 1 else rows
    if not outer:
        return s, None
    while len(outer) > 1:
        s = fuse(s, outer[0], outer[1])
        outer = [s.stages[out].loops[0].name, *outer[2:]]
    s = stage(s, name, at=outer[0])
    inner = s.stages[name].loops[-1].name
    s = split(s, inner, lanes, "cut")
    return annotate(s, f"{inner}.1", "vectorize"), outer[0]
