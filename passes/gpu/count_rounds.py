"""count_rounds: how many rounds of loops one thread of a kernel goes through, as an expression of the kernel's scalars.

An extent that depends on loops around it counts with the first or the last round of those, whichever is more. Rounds of a While, and what
depends on the contents of buffers, are not known before and count as one.

Before: ``for i in 0..n block.x: for j in 0..m: for k in 0..4: S``. After: ``m * 5``.
"""

from __future__ import annotations

from collections.abc import Iterable

from luthier.ir.expr import Expr, const, free_vars, loads, maximum, substitute
from luthier.ir.loop import Block, For, Func, If, Let, Stmt, While, children


def count_rounds(f: Func) -> Expr:
    return _rounds(f.body, {}, {}, set(f.scalars))


def _rounds(s: Stmt, first: dict[Expr, Expr], last: dict[Expr, Expr], known: set[Expr]) -> Expr:
    """``first``, ``last``: what names stand for in the first and the last round of the loops around."""
    if isinstance(s, Let):
        if s.var.dtype.is_index and s.var.dtype.lanes == 1:
            first[s.var], last[s.var] = substitute(s.value, first), substitute(s.value, last)
        return const(0)
    if isinstance(s, Block):
        return _sum(s.stmts, first, last, known)
    if isinstance(s, If):
        a, b = (const(0) if c is None else _rounds(c, first, last, known) for c in (s.then, s.orelse))
        return maximum(a, b)
    if isinstance(s, For):
        ends = [_known(substitute(s.extent, e), known) for e in (first, last)]
        n = ends[0] if ends[0] is ends[1] else maximum(*ends)
        inside = _rounds(s.body, {**first, s.var: substitute(s.lo, first)}, {**last, s.var: substitute(s.hi, last) - 1}, known)
        return inside if "." in s.kind else n * (inside + 1)
    if isinstance(s, While):
        return _rounds(s.body, first, last, known) + 1
    return _sum(children(s), first, last, known)


def _sum(stmts: Iterable[Stmt], first: dict[Expr, Expr], last: dict[Expr, Expr], known: set[Expr]) -> Expr:
    total = const(0)
    for c in stmts:
        total = total + _rounds(c, first, last, known)
    return total


def _known(n: Expr, known: set[Expr]) -> Expr:
    return n if free_vars(n) <= known and not loads(n) else const(1)
