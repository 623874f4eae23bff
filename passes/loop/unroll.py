"""unroll: loops of kind ``unroll`` with a constant number of rounds become straight code; others become serial.

Before: ``for i in 0..3 unroll: A[i] = i``. After: ``A[0] = 0; A[1] = 1; A[2] = 2``. A condition that a round decides is gone, and
neighbouring rounds under one condition share it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luthier.ir.dtypes import index
from luthier.ir.expr import Expr, add_const, affine_parts, const, free_vars, rebuild, substitute, var
from luthier.ir.loop import Block, For, Func, If, Let, Stmt, block, map_children, map_own_exprs, stmts_of, walk_stmts

LIMIT = 512


def unroll(f: Func) -> Func:
    """Every statement of the result is rebuilt once, with the numbers of all rounds around it."""
    if not any(isinstance(s, For) and s.kind == "unroll" for s in walk_stmts(f.body)):
        return f
    return f.with_body(_Unroller().stmt(f.body, _Round({}, {}, {})))


class _Round:
    """The values of the variables of the loops around a statement. ``parts``: affine index expressions taken apart, for all rounds."""

    __slots__ = ("env", "keys", "memo", "parts")

    def __init__(self, env: dict[Expr, Expr], more: dict[Expr, Expr], parts: dict[Any, Any]) -> None:
        self.env: dict[Expr, Expr] = {**env, **more}
        self.keys = frozenset(self.env)
        self.memo: dict[Expr, Expr] = {}
        self.parts = parts

    def value(self, e: Expr) -> Expr:
        """``e`` in this round; an index that is affine in the loops keeps its variable part and gets another constant."""
        if not e.args:
            return self.env.get(e, e)
        r = self.memo.get(e)
        if r is not None:
            return r
        mine = self.keys & free_vars(e)
        if not mine:
            r = e
        elif e.dtype is index and e.op in ("add", "sub", "mul"):
            k = (e, mine)
            if k not in self.parts:
                self.parts[k] = affine_parts(e, mine)
            p = self.parts[k]
            values = None if p is None else [self.env[v] for v, _ in p[2]]
            if p is None or values is None or any([v.op != "const" for v in values]):
                r = substitute(e, self.env, self.memo)
            else:
                r = add_const(p[0], p[1] + sum([c * v.attr for (_, c), v in zip(p[2], values, strict=True)]))
        else:
            args = tuple([self.value(a) for a in e.args])
            r = rebuild(e, args) if args != e.args else e
        self.memo[e] = r
        return r


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
                        r = _Round(r.env, {c.var: v}, r.parts)
                    self.names.add(v)
                    out.append(Let(v, value))
                else:
                    out.append(self.stmt(c, r))
            return block(*_join(out))
        if isinstance(s, For):
            lo, hi = r.value(s.lo), r.value(s.hi)
            if s.kind == "unroll":
                n = hi - lo
                if n.op == "const" and lo.op == "const" and n.attr <= LIMIT:
                    return block(*_join([self.stmt(s.body, _Round(r.env, {s.var: const(lo.attr + k)}, r.parts)) for k in range(n.attr)]))
            return replace(s, lo=lo, hi=hi, kind="serial" if s.kind == "unroll" else s.kind, body=self.stmt(s.body, r))
        if isinstance(s, If):
            cond = r.value(s.cond)
            if cond.op == "const":
                taken = s.then if cond.attr else s.orelse
                return block() if taken is None else self.stmt(taken, r)
        return map_children(map_own_exprs(s, r.value), lambda c: self.stmt(c, r))


def _join(stmts: list[Stmt]) -> list[Stmt]:
    """Neighbours under the same condition become one; a condition that reads memory may change between them."""
    out: list[Stmt] = []
    for s in [x for b in stmts for x in stmts_of(b)]:
        last = out[-1] if out else None
        if isinstance(s, If) and isinstance(last, If) and s.cond is last.cond and not s.cond.loading and s.orelse is None and last.orelse is None:
            out[-1] = If(s.cond, block(last.then, s.then))
        else:
            out.append(s)
    return out
