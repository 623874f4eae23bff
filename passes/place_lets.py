"""place_lets: each repeated pure expression is bound once, at the outermost legal place: common subexpressions and loop invariants.

Before: ``for i: A[i] = exp(s) * (x + i) + (x + i)``.
After: ``let e = exp(s); for i: let t = x + i; A[i] = e * t + t``.

An expression may leave a loop when it reads no variable bound inside and no buffer that the loop writes; loads of anything
but register variables stay inside (the loop may run zero times). Inside a block a load is shared until its buffer is written.
"""

from __future__ import annotations

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


def place_lets(f: Func) -> Func:
    return f.with_body(_Placer(f).region(f.body, frozenset()))


class _Placer:
    def __init__(self, f: Func) -> None:
        names = (s.var.attr[0] for s in walk_stmts(f.body) if isinstance(s, Let))
        self.n = max((int(n[1:]) for n in names if n[0] == "t" and n[1:].isdecimal()), default=0)  # of an earlier run
        self.reads_memo: dict[Expr, frozenset[str]] = {}
        self.mem_memo: dict[Expr, bool] = {}
        self.write_memo: dict[int, tuple[frozenset[str], bool]] = {}
        self.keep: list[Stmt] = []  # statements whose id is in write_memo stay alive

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
        r = self.reads_memo.get(e)
        if r is None:
            r = frozenset().union(*(self.reads(a) for a in e.args)) if e.args else frozenset()
            if e.op == "load":
                r = r | {e.attr[0].name}
            self.reads_memo[e] = r
        return r

    def memory(self, e: Expr) -> bool:
        """True when a load of something else than a register variable is inside."""
        r = self.mem_memo.get(e)
        if r is None:
            r = (e.op == "load" and not _register(e.attr[0])) or any(self.memory(a) for a in e.args)
            self.mem_memo[e] = r
        return r

    # ------------------------------------------------------------ blocks

    def region(self, s: Stmt, outer: frozenset[Expr]) -> Stmt:
        todo = list(stmts_of(s))
        hoisted: list[Stmt] = []
        for st in todo:
            if isinstance(st, (For, While)):
                pre, st = self.hoist(st)
                hoisted.extend(pre)
            hoisted.append(st)
        counts = self.count(hoisted)
        avail: dict[Expr, Expr] = {}
        out: list[Stmt] = []
        for st in hoisted:
            pre2: list[Stmt] = []
            memo: dict[Expr, Expr] = {}

            def bind(e: Expr, pre2: list[Stmt] = pre2, memo: dict[Expr, Expr] = memo, avail: dict[Expr, Expr] = avail) -> Expr:
                hit = avail.get(e)
                if hit is None:
                    hit = memo.get(e)
                if hit is not None:
                    return hit
                r = e
                if e.args:
                    args = tuple(bind(a) for a in e.args)
                    if any(x is not y for x, y in zip(args, e.args, strict=True)):
                        r = rebuild(e, args)
                if counts.get(e, 0) > 1 and _worth(e) and r.op != "var":
                    v = self.fresh(r)
                    pre2.append(Let(v, r))
                    avail[e] = v
                    r = v
                memo[e] = r
                return r

            if isinstance(st, Let) and st.value not in avail:
                v = st.value
                if v.args:
                    args = tuple(bind(a) for a in v.args)
                    v = rebuild(v, args) if any(x is not y for x, y in zip(args, v.args, strict=True)) else v
                out += pre2
                out.append(Let(st.var, v))
                if _worth(st.value):
                    avail[st.value] = st.var
            elif isinstance(st, (Store, Let)):
                new = map_exprs(st, bind)
                out += pre2
                out.append(new)
            elif isinstance(st, For):
                lo, hi = bind(st.lo), bind(st.hi)
                out += pre2
                out.append(For(st.var, lo, hi, st.kind, self.region(self.use(st.body, avail), outer)))
            elif isinstance(st, If):
                c = bind(st.cond)
                out += pre2
                then = self.region(self.use(st.then, avail), outer)
                out.append(If(c, then, None if st.orelse is None else self.region(self.use(st.orelse, avail), outer)))
            elif isinstance(st, While):
                out.append(While(st.cond, self.region(st.body, outer)))
            elif isinstance(st, Alloc):
                bufs: list[Buffer] = []
                inner: Stmt = st
                while isinstance(inner, Alloc):  # a chain of tiles is one level
                    bufs.append(inner.buf)
                    inner = inner.body
                body = self.region(self.use(inner, avail), outer)
                for b in reversed(bufs):
                    body = Alloc(b, body)
                out.append(body)
            else:
                out.append(st)
            w, all_ = self.writes(st)
            if all_:
                avail = {e: v for e, v in avail.items() if not self.reads(e)}
            elif w:
                avail = {e: v for e, v in avail.items() if not self.reads(e) & w}
        return block(*out)

    def use(self, s: Stmt, avail: dict[Expr, Expr]) -> Stmt:
        """Values bound before a nested statement are read in it where it does not change them."""
        w, all_ = self.writes(s) if avail else (frozenset(), False)
        env = {e: v for e, v in avail.items() if not self.reads(e) or not (all_ or self.reads(e) & w)}
        return self.replace(s, env) if env else s

    def count(self, stmts: list[Stmt]) -> dict[Expr, int]:
        """Uses of every expression by distinct parents, in the direct expressions of these statements."""
        n: dict[Expr, int] = {}

        def visit(e: Expr) -> None:
            n[e] = n.get(e, 0) + 1
            if n[e] == 1:
                for a in e.args:
                    visit(a)

        for st in stmts:
            for e in exprs_of(st) if not isinstance(st, While) else ():
                visit(e)
        return n

    # ------------------------------------------------------------ loops

    def hoist(self, s: For | While) -> tuple[list[Stmt], Stmt]:
        """Maximal pure invariant expressions of a loop become Lets before it."""
        bound = _bound(s)
        w, all_ = self.writes(s.body)
        env: dict[Expr, Expr] = {}
        pre: list[Stmt] = []
        memo: dict[Expr, bool] = {}

        def invariant(e: Expr) -> bool:
            r = memo.get(e)
            if r is None:
                r = not (free_vars(e) & bound) and not self.memory(e) and not (self.reads(e) & w) and not (all_ and bool(self.reads(e)))
                memo[e] = r
            return r

        visited: set[Expr] = set()

        def visit(e: Expr, top: bool = True) -> None:
            if e in env or not e.args or e in visited:
                return
            visited.add(e)
            if invariant(e):
                if _worth(e) and e.op != "load":
                    v = self.fresh(e)
                    pre.append(Let(v, e))
                    env[e] = v
                return
            for a in e.args:
                visit(a, False)

        seen: set[Expr] = set()
        for st in walk_stmts(s.body):
            for e in exprs_of(st):
                if e not in seen:
                    seen.add(e)
                    visit(e)
        if not env:
            return [], s
        body = self.replace(s.body, env)
        return pre, (For(s.var, s.lo, s.hi, s.kind, body) if isinstance(s, For) else While(s.cond, body))

    def replace(self, s: Stmt, env: dict[Expr, Expr]) -> Stmt:
        memo: dict[Expr, Expr] = {}

        def go(e: Expr) -> Expr:
            r = env.get(e)
            if r is None:
                r = memo.get(e)
            if r is None:
                r = e
                if e.args:
                    args = tuple(go(a) for a in e.args)
                    if any(x is not y for x, y in zip(args, e.args, strict=True)):
                        r = rebuild(e, args)
                memo[e] = r
            return r

        return map_exprs(s, go)


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


def _bound(s: Stmt) -> frozenset[Expr]:
    out: set[Expr] = set()
    for x in walk_stmts(s):
        if isinstance(x, For):
            out.add(x.var)
        elif isinstance(x, Let):
            out.add(x.var)
    return frozenset(out)

