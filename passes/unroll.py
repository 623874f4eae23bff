"""unroll: loops of kind ``unroll`` with a constant number of rounds become straight code; others become serial.

Before: ``for i in 0..3 unroll: A[i] = i``. After: ``A[0] = 0; A[1] = 1; A[2] = 2``.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import Expr, const, substitute, var
from luthier.ir.loop import Block, For, Func, Let, Stmt, block, map_children, map_own_exprs, walk_stmts

LIMIT = 512


def unroll(f: Func) -> Func:
    """Every statement of the result is rebuilt once, with the numbers of all rounds around it."""
    if not any(isinstance(s, For) and s.kind == "unroll" for s in walk_stmts(f.body)):
        return f
    return f.with_body(_Unroller().stmt(f.body, _Round({}, {})))


class _Round:
    """The values of the variables of the loops around a statement."""

    __slots__ = ("env", "memo")

    def __init__(self, env: dict[Expr, Expr], more: dict[Expr, Expr]) -> None:
        self.env: dict[Expr, Expr] = {**env, **more}
        self.memo: dict[Expr, Expr] = {}

    def value(self, e: Expr) -> Expr:
        return substitute(e, self.env, self.memo) if self.env else e


class _Unroller:
    def __init__(self) -> None:
        self.names: set[Expr] = set()
        self.copies = 0

    def stmt(self, s: Stmt, r: _Round) -> Stmt:
        if isinstance(s, Block):
            out: list[Stmt] = []
            for c in s.stmts:
                if isinstance(c, Let):
                    v, value = c.var, r.value(c.value)
                    if v in self.names and r.env:  # the same name in another round
                        self.copies += 1
                        v = var(f"{v.attr[0]}~u{self.copies}", v.dtype, v.attr[1], v.attr[2])
                        r = _Round(r.env, {c.var: v})
                    self.names.add(v)
                    out.append(Let(v, value))
                else:
                    out.append(self.stmt(c, r))
            return block(*out)
        if isinstance(s, For):
            lo, hi = r.value(s.lo), r.value(s.hi)
            if s.kind == "unroll":
                n = hi - lo
                if n.op == "const" and lo.op == "const" and n.attr <= LIMIT:
                    return block(*[self.stmt(s.body, _Round(r.env, {s.var: const(lo.attr + k)})) for k in range(n.attr)])
            return replace(s, lo=lo, hi=hi, kind="serial" if s.kind == "unroll" else s.kind, body=self.stmt(s.body, r))
        return map_children(map_own_exprs(s, r.value), lambda c: self.stmt(c, r))
