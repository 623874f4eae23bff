"""How much a kernel does: operations and accesses counted over its loops with the extents of one run.

Conditions and bounds are evaluated, so tails and peeled rounds count once; a bound that only memory knows counts one round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.ir.expr import Expr, free_vars, is_const
from luthier.ir.loop import Alloc, Block, For, Func, If, Let, Stmt, Store, While, children, exprs_of

__all__ = ["Work", "count_work"]

_ARITHMETIC = frozenset("add sub mul div min max sqrt neg abs".split())
Env = dict[Expr, "int | None"]
Tables = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass
class Work:
    """``floats``, ``integers``: arithmetic operations on data (an FMA is two). ``reads``, ``writes``: {buffer: elements}."""

    floats: float = 0.0
    integers: float = 0.0
    reads: dict[str, float] = field(default_factory=dict)
    writes: dict[str, float] = field(default_factory=dict)

    def add(self, other: Work, times: float = 1.0) -> None:
        self.floats += other.floats * times
        self.integers += other.integers * times
        for mine, theirs in ((self.reads, other.reads), (self.writes, other.writes)):
            for k, n in theirs.items():
                mine[k] = mine.get(k, 0.0) + n * times


def count_work(f: Func, scalars: Mapping[Expr, int], tables: Tables | None = None) -> Work:
    """The work of one run of ``f``; ``scalars``: values of its index parameters; ``tables``: contents of integer parameters that may
    bound its loops."""
    return _Counter(tables or {}).stmt(f.body, dict(scalars))


class _Counter:
    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.own: dict[int, Work] = {}
        self.steering: dict[int, frozenset[Expr]] = {}
        self.memo: dict[tuple[int, tuple[int | None, ...]], Work] = {}
        self.alive: list[Stmt] = []

    def exprs(self, s: Stmt) -> Work:
        """What a statement itself evaluates, each shared expression once."""
        w = self.own.get(id(s))
        if w is None:
            w = self.own[id(s)] = Work()
            self.alive.append(s)
            seen: set[Expr] = set()
            stack = list(exprs_of(s))
            while stack:
                e = stack.pop()
                if e in seen:
                    continue
                seen.add(e)
                stack.extend(e.args)
                if e.op == "load":
                    b = e.attr[0]
                    if b.scope != "local":
                        w.reads[b.name] = w.reads.get(b.name, 0.0) + (1 if b.dtype.lanes > 1 else e.dtype.lanes)
                elif e.op in _ARITHMETIC or e.op == "call":
                    n = float(e.dtype.lanes)
                    if e.op == "call":  # instructions: a dot product of k products a lane
                        ones = any(a.op == "bcast" and is_const(a.args[0], 1) for a in e.args)  # then only sums
                        n *= (1 if ones else 2) * max(1, max((a.dtype.lanes for a in e.args), default=1) // max(1, e.dtype.lanes))
                    if e.dtype.is_float:
                        w.floats += n
                    elif not e.dtype.is_index and not e.dtype.is_bool:
                        w.integers += n
            if isinstance(s, Store) and s.buf.scope != "local":
                w.writes[s.buf.name] = float(max(s.value.dtype.lanes, 1) if s.buf.dtype.lanes == 1 else 1)
        return w

    def vars(self, s: Stmt) -> frozenset[Expr]:
        """Variables that decide how often something inside ``s`` runs."""
        v = self.steering.get(id(s))
        if v is None:
            out: set[Expr] = set()
            if isinstance(s, For):
                out |= free_vars(s.lo) | free_vars(s.hi)
            elif isinstance(s, If):
                out |= free_vars(s.cond)
            for c in children(s):
                out |= self.vars(c)
            if isinstance(s, Block):
                for c in reversed(s.stmts):
                    if isinstance(c, Let) and c.var in out:
                        out |= free_vars(c.value)
            v = self.steering[id(s)] = frozenset(out)
            self.alive.append(s)
        return v

    def stmt(self, s: Stmt, env: Env) -> Work:
        key = (id(s), tuple(env.get(v) for v in sorted(self.vars(s), key=lambda e: e.key)))
        hit = self.memo.get(key)
        if hit is None:
            hit = self.memo[key] = self._stmt(s, env)
        return hit

    def _stmt(self, s: Stmt, env: Env) -> Work:
        total = Work()
        total.add(self.exprs(s))
        if isinstance(s, Block):
            inner = dict(env)
            for c in s.stmts:
                if isinstance(c, Let) and c.var.dtype.is_index:
                    inner[c.var] = value(c.value, inner, self.tables)
                total.add(self.stmt(c, inner))
        elif isinstance(s, For):
            lo, hi = value(s.lo, env, self.tables), value(s.hi, env, self.tables)
            if lo is None or hi is None:
                lo, hi = 0, 1
            if s.var in self.vars(s.body):
                for i in range(lo, hi):
                    total.add(self.stmt(s.body, {**env, s.var: i}))
            elif hi > lo:
                total.add(self.stmt(s.body, {**env, s.var: lo}), hi - lo)
        elif isinstance(s, If):
            c = value(s.cond, env, self.tables)
            if c is None:
                total.add(self.stmt(s.then, env), 0.5 if s.orelse is not None else 1.0)
                if s.orelse is not None:
                    total.add(self.stmt(s.orelse, env), 0.5)
            elif c:
                total.add(self.stmt(s.then, env))
            elif s.orelse is not None:
                total.add(self.stmt(s.orelse, env))
        elif isinstance(s, (While, Alloc)):
            total.add(self.stmt(s.body, env))
        return total


def value(e: Expr, env: Mapping[Expr, int | None], tables: Tables | None = None) -> int | None:
    """An index or condition as a number; None when memory that is no table decides it."""
    op = e.op
    if op == "const":
        return int(e.attr)
    if op == "var":
        return env.get(e)
    a = [value(x, env, tables) for x in e.args]
    if any(x is None for x in a):
        return None
    n = [x for x in a if x is not None]
    if op == "load":
        t = None if tables is None else tables.get(e.attr[0].name)
        return int(t.flat[n[0]]) if t is not None and len(n) == 1 and 0 <= n[0] < t.size else None
    if op == "select":
        return n[1] if n[0] else n[2]
    if op in ("cast", "bcast"):
        return n[0]
    if op == "not":
        return int(not n[0])
    table: dict[str, Callable[[Any, Any], Any]] = {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "min": min, "max": max, "lt": lambda x, y: int(x < y),
        "le": lambda x, y: int(x <= y), "eq": lambda x, y: int(x == y), "ne": lambda x, y: int(x != y), "and": lambda x, y: x & y, "or": lambda x, y: x | y,
        "floordiv": lambda x, y: x // y if y else None, "mod": lambda x, y: x % y if y else None,
    }  # fmt: skip
    f = table.get(op)
    return None if f is None or len(n) != 2 else f(*n)  # type: ignore[no-any-return]
