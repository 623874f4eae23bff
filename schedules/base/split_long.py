"""Long reductions with few results, cut into pieces that run in parallel.

Before ``t[i] = sum[k < n](x[i, k])`` with a handful of i. After, each a kernel of its own::

    t.c[c, i] = sum[k < C](x[i, c C + k])          c < n // C: parallel
    t.q[i]    = sum[k < n % C](x[i, n - n % C + k])
    t[i]      = sum[c < n // C](t.c[c, i]) + t.q[i]

C does not depend on the threads, nor does the result. A reduction to one number that other tensors of its Compute read becomes a kernel of
its own first, so that it has lanes.
"""

from __future__ import annotations

from luthier.ir.compute import MONOIDS, Axis, Compute, LetStmt, Pull, axis, normalize, pull, reduce_
from luthier.ir.expr import Expr, const, load, substitute, var

PIECE = 1 << 16  # elements of a piece
FEW = 8  # results that would leave threads idle
SHORT = 64  # elements that one accumulator may as well take


def split_long(c: Compute) -> list[list[LetStmt]] | None:
    """The lets of a Compute that is one long reduction, in groups that are kernels; None for another one."""
    t = c.lets[0]
    if len(c.lets) != 1 or not isinstance(t, Pull) or not _plain(t) or not 0 < _number([a.extent for a in t.axes]) <= FEW:
        return None
    monoid, axes, _ = t.expr.attr
    total = _number([a.extent for a in axes])
    if 0 <= total < 4 * PIECE or total < 0 and _number([a.extent for a in t.axes]) > 1:
        return None
    k = max(axes, key=lambda a: a.extent.attr if a.extent.op == "const" else 1 << 62)  # the first of the longest
    others = [a for a in axes if a is not k]
    size = max(PIECE // max(_number([a.extent for a in others if a.extent.op == "const"]), 1), 1)
    if k.extent.op == "const" and k.extent.attr < 2 * size:
        return None
    count = k.extent // size

    def piece(name: str, extra: list[Axis], base: Expr, n: Expr) -> Pull:
        """The reduction over ``n`` positions of k from ``base`` on."""
        new = {a.var: var(a.name + "'", lo=0, hi=a.extent - 1) for a in (*t.axes, *others)}
        inner = axis(k.name + "'", n)
        body = [substitute(x, {**new, k.var: base + inner.var}) for x in t.expr.args]
        order = [Axis(new[a.var], a.extent) if a is not k else inner for a in axes]
        e = reduce_(monoid, order, body[0], where=body[1] if len(body) > 1 else None)
        return pull(name, [*extra, *(Axis(new[a.var], a.extent) for a in t.axes)], e)

    c1, c2 = axis("c", count), axis("c'", count)
    pieces = piece(f"{t.name}.c", [c1], c1.var * size, const(size))
    here = [a.var for a in t.axes]
    merged = reduce_(monoid, [c2], load(pieces.buf, [c2.var, *here]))
    if k.extent.op == "const" and k.extent.attr % size == 0:
        return [[pieces], [Pull(t.buf, t.axes, merged)]]
    rest = piece(f"{t.name}.q", [], count * size, k.extent % size)
    (whole,) = MONOIDS[monoid].combine((merged,), (load(rest.buf, here),))
    return [[pieces], [rest], [Pull(t.buf, t.axes, whole)]]


def split_single(c: Compute) -> list[list[LetStmt]] | None:
    """Groups of lets in which every reduction to one number stands by itself; None where there is no such reduction beside others."""
    lets = normalize(c).lets
    alone = [isinstance(x, Pull) and _plain(x) and _number([a.extent for a in x.axes]) == 1 and not 0 <= _number([a.extent for a in x.expr.attr[1]]) <= SHORT for x in lets]
    if not any(alone) or len(lets) == 1:
        return None
    groups: list[list[LetStmt]] = []
    before = True
    for x, own in zip(lets, alone, strict=True):
        if own or before:
            groups.append([x])
        else:
            groups[-1].append(x)
        before = own
    return groups


def _plain(x: Pull) -> bool:
    return x.expr.op == "reduce" and x.expr.attr[2] == 1 and MONOIDS[x.expr.attr[0]].vector is not None


def _number(extents: list[Expr]) -> int:
    """The product, -1 where one of them is not known."""
    n = 1
    for e in extents:
        n = n * e.attr if e.op == "const" and n >= 0 else -1
    return n
