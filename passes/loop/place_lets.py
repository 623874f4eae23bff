"""place_lets: each repeated pure expression is bound once, at the outermost legal place: common subexpressions and loop invariants.

Before: ``for i: A[i] = exp(s) * (x + i) + (x + i)``.
After: ``let e = exp(s); for i: let t = x + i; A[i] = e * t + t``.

An expression may leave a loop when it reads no variable bound inside and no buffer that the loop writes; loads of anything
but register variables stay inside (the loop may run zero times). Inside a block a load is shared until its buffer is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.ir.expr import Expr, bounds, free_vars, rebuild, var
from luthier.ir.loop import (
    Alloc,
    Barrier,
    Buffer,
    Call,
    For,
    Func,
    If,
    Let,
    Stmt,
    Store,
    While,
    block,
    children,
    exprs_of,
    map_exprs,
    stmts_of,
    walk_stmts,
)

_LEAF = frozenset(("const", "var"))
_NONE: frozenset[str] = frozenset()


def place_lets(f: Func) -> Func:
    p = _Placer(f)
    p.collect(f.body, [])
    return f.with_body(p.region(f.body, {}))


@dataclass(slots=True)
class _Loop:
    """A loop around the statement in hand: what it writes, what leaves it, and what was looked at inside."""

    writes: frozenset[str]
    anything: bool
    leaving: dict[Expr, None]
    visited: set[Expr] = field(default_factory=set)
    parted: set[Expr] = field(default_factory=set)


class _Placer:
    def __init__(self, f: Func) -> None:
        names = (s.var.attr[0] for s in walk_stmts(f.body) if isinstance(s, Let))
        self.n = max((int(n[1:]) for n in names if n[0] == "t" and n[1:].isdecimal()), default=0)  # of an earlier run
        self.reads_memo: dict[Expr, frozenset[str]] = {}
        self.mem_memo: dict[Expr, bool] = {}
        self.write_memo: dict[int, tuple[frozenset[str], bool]] = {}
        self.keep: list[Stmt] = []  # statements whose id is in write_memo stay alive
        self.levels: dict[Expr, int] = {}  # number of loops around the binder of a variable, its own loop included
        self.level_memo: dict[Expr, int] = {}
        self.leaving: dict[int, dict[Expr, None]] = {}  # loop -> what is computed before it

    def writes(self, s: Stmt) -> tuple[frozenset[str], bool]:
        """Buffers stored to, and whether anything may be (calls, barriers)."""
        if isinstance(s, Store):
            return frozenset((s.buf.name,)), False
        if isinstance(s, (Let,)):
            return frozenset(), False
        if isinstance(s, (Call, Barrier)):
            return frozenset(), True
        hit = self.write_memo.get(id(s))
        if hit is None:
            names: set[str] = set()
            anything = False
            for c in children(s):
                n, a = self.writes(c)
                names |= n
                anything = anything or a
            hit = frozenset(names), anything
            self.write_memo[id(s)] = hit
            self.keep.append(s)
        return hit

    def fresh(self, e: Expr) -> Expr:
        self.n += 1
        lo, hi = bounds(e) if e.dtype.is_index and e.dtype.lanes == 1 else (None, None)
        return var(f"t{self.n}", e.dtype, lo, hi)

    def reads(self, e: Expr) -> frozenset[str]:
        """Names of the buffers an expression loads from."""
        if not e.loading:
            return _NONE
        r = self.reads_memo.get(e)
        if r is None:
            r = frozenset().union(*(self.reads(a) for a in e.args)) if e.args else frozenset()
            if e.op == "load":
                r = r | {e.attr[0].name}
            self.reads_memo[e] = r
        return r

    def memory(self, e: Expr) -> bool:
        """True when a load of something else than a register variable is inside."""
        if not e.loading:
            return False
        r = self.mem_memo.get(e)
        if r is None:
            r = (e.op == "load" and not _register(e.attr[0])) or any(self.memory(a) for a in e.args)
            self.mem_memo[e] = r
        return r

    # ------------------------------------------------------------ what leaves which loop

    def bind_level(self, v: Expr, level: int) -> None:
        if self.levels.setdefault(v, level) != level:  # bound again in another nest
            self.levels[v] = level
            self.level_memo.clear()

    def level(self, e: Expr, stack: list[_Loop]) -> int:
        """The number of loops that ``e`` depends on, counted from outside; loads of memory depend on all."""
        n = self.level_memo.get(e)
        if n is None:
            n = max((self.levels.get(v, 0) for v in free_vars(e)), default=0)
            self.level_memo[e] = n
        if n < len(stack):
            if self.memory(e):
                return len(stack)
            r = self.reads(e)
            if r:
                for k in range(len(stack), n, -1):
                    if stack[k - 1].anything or r & stack[k - 1].writes:
                        return k
        return n

    def collect(self, s: Stmt, stack: list[_Loop]) -> None:
        """Fills ``leaving``: every maximal invariant expression goes before the outermost loop that it does not depend on."""
        here = stack[-1] if stack else None
        for st in stmts_of(s):
            if here is not None:
                for e in exprs_of(st) if not isinstance(st, While) else ():
                    self.visit(e, here, stack)
            if isinstance(st, Let):
                self.bind_level(st.var, len(stack))
            elif isinstance(st, (For, While)):
                w, anything = self.writes(st.body)
                stack.append(_Loop(w, anything, self.leaving.setdefault(id(st), {})))
                if isinstance(st, For):
                    self.bind_level(st.var, len(stack))
                self.collect(st.body, stack)
                stack.pop()
            else:
                for c in children(st):
                    self.collect(c, stack)

    def visit(self, e: Expr, here: _Loop, stack: list[_Loop]) -> None:
        if not e.args or e in here.visited:
            return
        here.visited.add(e)
        n = self.level(e, stack)
        if n < len(stack):
            self.leave(e, n, stack)
        else:
            for a in e.args:
                self.visit(a, here, stack)

    def leave(self, e: Expr, n: int, stack: list[_Loop]) -> None:
        if _worth(e) and e.op != "load":
            if e in stack[n].leaving:
                return
            stack[n].leaving[e] = None
        self.parts(e, n, stack)

    def parts(self, e: Expr, n: int, stack: list[_Loop]) -> None:
        """Operands that depend on fewer loops than the whole leave further; shared ones are looked at once."""
        if e in stack[n].parted:
            return
        stack[n].parted.add(e)
        for a in e.args:
            if a.args:
                k = self.level(a, stack)
                if k < n:
                    self.leave(a, k, stack)
                else:
                    self.parts(a, n, stack)

    # ------------------------------------------------------------ blocks

    def region(self, s: Stmt, given: dict[Expr, Expr]) -> Stmt:
        """``given``: expressions that are bound outside and stay what they are in all of ``s``."""
        hoisted: list[Stmt] = []
        for st in stmts_of(s):
            if isinstance(st, (For, While)):
                hoisted += [Let(self.fresh(e), e) for e in self.leaving.get(id(st), ()) if e not in given]
            hoisted.append(st)
        counts = self.count(hoisted, given)
        avail = dict(given)
        out: list[Stmt] = []
        for st in hoisted:
            memo: dict[Expr, Expr] = {}

            def bind(e: Expr, memo: dict[Expr, Expr] = memo, avail: dict[Expr, Expr] = avail) -> Expr:
                hit = avail.get(e)
                if hit is None:
                    hit = memo.get(e)
                if hit is not None:
                    return hit
                r = e
                if e.args:
                    args = tuple([bind(a) for a in e.args])
                    if args != e.args:
                        r = rebuild(e, args)
                    if counts.get(e, 0) > 1 and _worth(e) and r.op != "var":
                        v = self.fresh(r)
                        out.append(Let(v, r))
                        avail[e] = v
                        r = v
                memo[e] = r
                return r

            if isinstance(st, Let) and st.value not in avail:
                v = st.value
                if v.args:
                    args = tuple([bind(a) for a in v.args])
                    v = rebuild(v, args) if args != v.args else v
                out.append(Let(st.var, v))
                if _worth(st.value):
                    avail[st.value] = st.var
            elif isinstance(st, (Store, Let, Call)):
                out.append(map_exprs(st, bind))
            elif isinstance(st, For):
                lo, hi = bind(st.lo), bind(st.hi)
                out.append(For(st.var, lo, hi, st.kind, self.region(st.body, self.kept(st.body, avail))))
            elif isinstance(st, If):
                c = bind(st.cond)
                then = self.region(st.then, self.kept(st.then, avail))
                out.append(If(c, then, None if st.orelse is None else self.region(st.orelse, self.kept(st.orelse, avail))))
            elif isinstance(st, While):
                out.append(While(st.cond, self.region(st.body, self.kept(st.body, avail))))
            elif isinstance(st, Alloc):
                bufs: list[Buffer] = []
                inner: Stmt = st
                while isinstance(inner, Alloc):  # a chain of tiles is one level
                    bufs.append(inner.buf)
                    inner = inner.body
                body = self.region(inner, self.kept(inner, avail))
                for b in reversed(bufs):
                    body = Alloc(b, body)
                out.append(body)
            else:
                out.append(st)
            w, all_ = self.writes(st)
            if all_:
                avail = {e: v for e, v in avail.items() if not e.loading}
            elif w:
                stale = [e for e in avail if e.loading and self.reads(e) & w]
                if stale:
                    avail = {e: v for e, v in avail.items() if e not in stale}
        return block(*out)

    def kept(self, s: Stmt, avail: dict[Expr, Expr]) -> dict[Expr, Expr]:
        """The values bound so far that a nested statement does not change."""
        if not avail:
            return avail
        w, all_ = self.writes(s)
        return {e: v for e, v in avail.items() if not e.loading or not (all_ or self.reads(e) & w)} if w or all_ else avail

    def count(self, stmts: list[Stmt], given: dict[Expr, Expr]) -> dict[Expr, int]:
        """Uses of every expression by distinct parents, in the direct expressions of these statements."""
        n: dict[Expr, int] = {}

        def visit(e: Expr) -> None:
            k = n[e] = n.get(e, 0) + 1
            if k == 1 and e not in given:
                for a in e.args:
                    visit(a)

        for st in stmts:
            for e in exprs_of(st) if not isinstance(st, While) else ():
                visit(e)
        return n


def _register(b: Buffer) -> bool:
    return b.scope == "local" and b.rank == 0


def _worth(e: Expr) -> bool:
    """Worth a name: anything but leaves, register reads, constant vectors and an index plus a constant."""
    if e.op in _LEAF or (e.op == "load" and _register(e.attr[0])):
        return False
    if e.op in ("bcast", "ramp"):
        return e.op == "bcast" and e.args[0].op not in _LEAF and not e.args[0].dtype.is_index
    if e.dtype.is_index and e.op == "add" and e.args[1].op == "const":
        return False
    return True
