"""load_spans: vector loads whose lanes lie near each other in memory, at distances known now, become whole loads and a shuffle.

Before: ``y[ramp(16 * i, 1, 16)] = x[ramp(16 * i, 1, 16) // 2]``.
After: ``y[ramp(16 * i, 1, 16)] = shuffle(x[ramp(8 * i, 1, 8)]; 0, 0, 1, 1, 2, 2, ...)``.

Nothing before the first or behind the last of the elements is read. Steps of 1, -1 and 2 are the printers' own.
"""

from __future__ import annotations

from luthier.ir.expr import Expr, bcast, extract, load, load_parts, ramp, rebuild, rewrite_loads, shuffle
from luthier.ir.loop import Func, map_exprs

PARTS = 4  # loads of one shuffle


def load_spans(f: Func, whole: bool = False) -> Func:
    """``whole``: vectors of other lengths than the loop's have no registers."""
    memo: dict[Expr, Expr] = {}
    return f.with_body(map_exprs(f.body, lambda e: rewrite_loads(e, lambda x: _rule(x, whole), memo)))


def _rule(x: Expr, whole: bool) -> Expr | None:
    buf, idx, mask, _ = load_parts(x)
    n = x.dtype.lanes
    if n < 4 or mask is not None or len(idx) != 1 or buf.dtype.lanes > 1 or x.dtype.is_bool or x.dtype.bits < 8:
        return None
    i = idx[0]
    if i.op == "bcast" or i.op == "ramp" and i.attr[0] in (1, -1, 2) or i.loading:
        return None
    first = lane(i, 0)
    if first is None:
        return None
    at: list[int] = []
    for k in range(n):
        here = lane(i, k)
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
    if count > PARTS or whole and part != n or part < 2:
        return None
    starts = [min(k * part, span - part) for k in range(count)]
    loads = [load(buf, (ramp(first + b, 1, part),)) for b in starts]
    which = [min(a // part, count - 1) for a in at]
    return shuffle(loads, [k * part + a - starts[k] for k, a in zip(which, at, strict=True)])


def lane(e: Expr, k: int) -> Expr | None:
    """Lane ``k`` of an index without loads, simplified."""
    if e.dtype.lanes == 1:
        return e
    if e.op in ("bcast", "ramp"):
        return extract(e, k)
    if e.op not in ("add", "sub", "mul", "floordiv", "mod"):
        return None
    args = [lane(a, k) for a in e.args]
    known = [a for a in args if a is not None]
    return rebuild(e, tuple(known)) if len(known) == len(args) else None
