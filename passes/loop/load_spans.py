"""load_spans: vector loads whose lanes lie near each other in memory, at distances known now, become whole loads and a shuffle.

Before: ``y[ramp(16 * i, 1, 16)] = x[ramp(16 * i, 1, 16) // 2]``.
After: ``y[ramp(16 * i, 1, 16)] = shuffle(x[ramp(8 * i, 1, 8)]; 0, 0, 1, 1, 2, 2, ...)``.

Nothing before the first or behind the last of the elements is read. Steps of 1, -1 and 2 are the printers' own.
"""

from __future__ import annotations

from luthier.ir.expr import Expr, bcast, cast, extract, load, load_parts, ramp, rebuild, rewrite_loads, shuffle
from luthier.ir.loop import Func, map_exprs

PARTS = 4  # loads of one shuffle


def load_spans(f: Func) -> Func:
    """For targets that rearrange lanes of several vectors of any length at once (``Capabilities.shuffles``)."""
    memo: dict[Expr, Expr] = {}
    return f.with_body(map_exprs(f.body, lambda e: rewrite_loads(e, _rule, memo)))


def _rule(x: Expr) -> Expr | None:
    buf, idx, mask, _ = load_parts(x)
    n = x.dtype.lanes
    if n < 4 or mask is not None or len(idx) != 1 or buf.dtype.lanes > 1 or x.dtype.is_bool or x.dtype.bits < 8:
        return None
    i = idx[0]
    if i.op == "bcast" or i.op == "ramp" and i.attr[0] in (1, -1, 2) or i.loading:
        return None
    first = lane_at(i, 0)
    if first is None:
        return None
    at: list[int] = []
    for k in range(n):
        here = lane_at(i, k)
        step = None if here is None else here - first
        if step is None or step.op != "const":
            return None
        at.append(step.attr)
    low = min(at)
    at, first = [a - low for a in at], first + low
    span = max(at) + 1
    if span == 1:
        return bcast(load(buf, (first,)), n)
    part = min(n, 1 << (span.bit_length() - 1))
    count = -(-span // part)
    if count > PARTS or part < 2:
        return None
    starts = [min(k * part, span - part) for k in range(count)]
    loads = [load(buf, (ramp(first + b, 1, part),)) for b in starts]
    which = [min(a // part, count - 1) for a in at]
    return shuffle(loads, [k * part + a - starts[k] for k, a in zip(which, at, strict=True)])


def lane_at(e: Expr, k: int) -> Expr | None:
    """Lane ``k`` of an index as a scalar, simplified, where it is made of loads, sums, products and quotients."""
    if e.dtype.lanes == 1:
        return e
    if e.op in ("bcast", "ramp"):
        return extract(e, k)
    if e.op == "load":
        b, idx, mask, _ = load_parts(e)
        at = lane_at(idx[0], k) if len(idx) == 1 and mask is None and b.dtype.lanes == 1 else None
        return None if at is None else load(b, (at,))
    if e.op not in ("add", "sub", "mul", "floordiv", "mod", "cast"):
        return None
    args = [lane_at(a, k) for a in e.args]
    known = [a for a in args if a is not None]
    if len(known) != len(args):
        return None
    return cast(known[0], e.dtype.scalar) if e.op == "cast" else rebuild(e, tuple(known))
