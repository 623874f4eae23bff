"""combine_accesses: neighbouring elements that are loaded or stored together become one access of a whole vector.

Before: ``A: f32[n]``, ``B: f32[n]``, ``let x = A[q * 4]; let y = A[q * 4 + 1]; .. B[q * 4] = x; B[q * 4 + 1] = y; ..``.
After: ``A: f32x4[n // 4]``, ``B: f32x4[n // 4]``, ``let x = extract(A[q], 0); let y = extract(A[q], 1); .. B[q] = (x, y, ..)``.

The element type of a buffer changes only when every access to it is part of a whole, aligned vector; all other buffers stay as they
are. That an index is a multiple of the lanes must follow from its factors: what is not certain is not aligned. Runs on scalar code
(:mod:`luthier.passes.loop.scalarize`), after which the lanes of a vectorized loop and the rounds of an unrolled one look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from luthier.ir.expr import (
    Expr,
    binary,
    const,
    extract,
    from_linear,
    linear,
    load,
    load_parts,
    mod,
    poly_const,
    rewrite_loads,
    select,
    shuffle,
    var,
)
from luthier.ir.loop import (
    Alloc,
    Block,
    Buffer,
    Call,
    Func,
    Let,
    Stmt,
    Store,
    block,
    children,
    exprs_of,
    map_children,
    map_own_exprs,
    stmts_of,
    walk_stmts,
)
from luthier.passes.gpu.use_matrix import MMA

Place = tuple[Expr, int]  # index without its constant, number of the vector behind it


def combine_accesses(f: Func, lanes: int = 4, fits: Callable[[Buffer], bool] = lambda b: not b.dtype.is_bool) -> Func:
    """``f`` is scalar, and its buffers have one dimension. ``fits``: the buffers whose elements may become vectors."""
    if not any(fits(b) for b in f.buffers) and not any(isinstance(s, Alloc) and fits(s.buf) for s in walk_stmts(f.body)):
        return f
    c = _Combiner(f, lanes, fits)
    c.collect(f.body)
    c.decide()
    return c.rebuild() if c.new else f


class _Combiner:
    def __init__(self, f: Func, lanes: int, fits: Callable[[Buffer], bool]) -> None:
        self.f, self.lanes = f, lanes
        self.whole = (1 << lanes) - 1
        self.lets: dict[Expr, Expr] = {}
        again: set[Expr] = set()
        calls: set[str] = set(f.data)
        for s in walk_stmts(f.body):
            if isinstance(s, Let):
                if s.var in self.lets:
                    again.add(s.var)
                self.lets[s.var] = s.value
            elif isinstance(s, Call):  # a tile of a matrix instruction is memory to it, whatever its elements are
                tiles = s.callee in MMA.values()
                calls |= {
                    a.name if isinstance(a, Buffer) else a[0].name for a in s.args
                    if not isinstance(a, Expr) and not (tiles and isinstance(a, Buffer) and a.scope == "shared")
                }  # fmt: skip
        self.names = {v.attr[0] for v in self.lets}
        for v in again:
            del self.lets[v]
        self.fits = lambda b: b.rank == 1 and b.dtype.lanes == 1 and b.dtype.bits in (8, 16, 32) and not b.dtype.is_index and b.name not in calls and fits(b)
        self.fit: dict[Buffer, bool] = {}
        self.loads: dict[tuple[int, Buffer, Place, Expr | None], int] = {}  # a vector in a block -> its lanes that are loaded there
        self.spoiled: set[str] = set()
        self.stored: set[str] = set()
        self.runs: dict[int, list[tuple[Store, ...]]] = {}  # block -> groups of stores that become one
        self.parts: dict[Expr, Expr | None] = {}
        self.shares: dict[Expr, Expr | None] = {}  # variable -> the variable of its quotient
        self.keep: list[Stmt] = []
        self.new: dict[Buffer, Buffer] = {}

    # ------------------------------------------------------------ what is a multiple of the lanes

    def part(self, e: Expr) -> Expr | None:
        """``e`` divided by the lanes, None where it is not known to be a multiple of them."""
        if e not in self.parts:
            self.parts[e] = self._part(e)
        return self.parts[e]

    def _part(self, e: Expr) -> Expr | None:
        n = self.lanes
        out: dict[tuple[Expr, ...], int] = {}
        more: list[Expr] = []
        for m, c in linear(e).items():
            if c % n == 0:
                out[m] = c // n
                continue
            for k, x in enumerate(m):
                q = self.atom(x)
                if q is not None:
                    rest = from_linear({m[:k] + m[k + 1 :]: c})
                    more.append(rest * q)
                    break
            else:
                return None
        r = from_linear(out)
        for x in more:
            r = r + x
        return r

    def atom(self, x: Expr) -> Expr | None:
        if x.op == "var":
            value = self.lets.get(x)
            if value is None:
                return None
            if x not in self.shares:
                self.shares[x] = None
                if self.part(value) is not None:
                    self.shares[x] = var(self.fresh(f"{x.attr[0]}.v"), x.dtype, 0 if x.attr[1] is not None and x.attr[1] >= 0 else None)
            return self.shares[x]
        if x.op in ("select", "min", "max", "mod") and x.dtype.is_index:
            args = [self.part(a) for a in x.args[-2:]]
            a, b = args
            if a is None or b is None:
                return None
            return select(x.args[0], a, b) if x.op == "select" else mod(a, b) if x.op == "mod" else binary(x.op, a, b)
        return None

    def fresh(self, name: str) -> str:
        while name in self.names:
            name += "v"
        self.names.add(name)
        return name

    def place(self, i: Expr) -> tuple[Place, int] | None:
        """(the vector that element ``i`` is in, its lane)."""
        c = poly_const(i)
        base = add_const_free(i, c)
        return None if self.part(base) is None else ((base, c // self.lanes), c % self.lanes)

    # ------------------------------------------------------------ what is accessed

    def ok(self, b: Buffer) -> bool:
        r = self.fit.get(b)
        if r is None:
            r = self.fit[b] = self.fits(b)
        return r and b.name not in self.spoiled

    def collect(self, s: Stmt) -> None:
        stmts = stmts_of(s)
        self.keep.append(s)
        seen: set[Expr] = set()
        stack = [e for x in stmts for e in exprs_of(x) if e.loading]
        while stack:
            e = stack.pop()
            if e in seen:
                continue
            seen.add(e)
            if e.op == "load" and self.ok(e.attr[0]):
                b, idx, m, _ = load_parts(e)
                at = self.place(idx[0])
                if at is None:
                    self.spoiled.add(b.name)
                else:
                    key = (id(s), b, at[0], m)
                    self.loads[key] = self.loads.get(key, 0) | 1 << at[1]
            stack.extend(a for a in e.args if a.loading)
        self.stores(s, stmts)
        for x in stmts:
            for y in children(x):
                self.collect(y)

    def stores(self, s: Stmt, stmts: Sequence[Stmt]) -> None:
        """Groups of stores among neighbours, with nothing but Lets between them."""
        k = 0
        while k < len(stmts):
            x = stmts[k]
            k += 1
            if not isinstance(x, Store) or not self.ok(x.buf):
                continue
            self.stored.add(x.buf.name)
            first = self.place(x.idx[0])
            run, lanes = [x], 0 if first is None else 1 << first[1]
            while first is not None and lanes != self.whole and k < len(stmts):
                y = stmts[k]
                if isinstance(y, Store):
                    at = self.place(y.idx[0]) if y.buf == x.buf and y.mask is x.mask else None
                    if at is None or at[0] != first[0] or lanes >> at[1] & 1:
                        break
                    if self.reads(y, run):
                        break
                    lanes |= 1 << at[1]
                    run.append(y)
                elif not isinstance(y, Let) or self.reads(y, run):
                    break
                k += 1
            if first is None or lanes != self.whole:
                self.spoiled.add(x.buf.name)
            else:
                self.runs.setdefault(id(s), []).append(tuple(run))

    def reads(self, s: Stmt, run: Sequence[Store]) -> bool:
        """Whether a statement may read what the stores before it wrote."""
        stack = [e for e in exprs_of(s) if e.loading]
        while stack:
            e = stack.pop()
            if e.op == "load" and e.attr[0].name == run[0].buf.name:
                i = load_parts(e)[1][0]
                if any((i - x.idx[0]).op != "const" or i is x.idx[0] for x in run):
                    return True
            stack.extend(a for a in e.args if a.loading)
        return False

    def decide(self) -> None:
        named: set[str] = set(self.stored)
        for (_, b, _, _), lanes in self.loads.items():
            named.add(b.name)
            if lanes != self.whole:
                self.spoiled.add(b.name)
        for b, fits in self.fit.items():
            if fits and b.name in named and b.name not in self.spoiled:
                n = b.size()
                param = b.scope == "param"
                self.new[b] = replace(b, dtype=b.dtype.vec(self.lanes), shape=((n if param else n + (self.lanes - 1)) // self.lanes,))

    # ------------------------------------------------------------ the new code

    def vector(self, i: Expr) -> tuple[Expr, int]:
        at = self.place(i)
        assert at is not None
        q = self.part(at[0][0])
        assert q is not None
        return q + at[0][1], at[1]

    def rebuild(self) -> Func:
        memo: dict[Expr, Expr] = {}

        def fix(e: Expr) -> Expr | None:
            if e.op == "load" and e.attr[0] in self.new:
                b, idx, m, o = load_parts(e)
                q, lane = self.vector(idx[0])
                return extract(load(self.new[b], (q,), m, o), lane)
            return None

        def ex(e: Expr) -> Expr:
            return rewrite_loads(e, fix, memo)

        def st(s: Stmt) -> Stmt:
            runs = [r for r in self.runs.get(id(s), ()) if r[0].buf in self.new]
            last = {id(r[-1]): r for r in runs}
            inside = {id(x) for r in runs for x in r}
            out: list[Stmt] = []
            for x in stmts_of(s):
                if id(x) in last:
                    out.append(self.one_store(last[id(x)], ex))
                elif id(x) not in inside:
                    x = map_own_exprs(x, ex)
                    if isinstance(x, Call):
                        x = replace(x, args=tuple(self.new.get(a, a) if isinstance(a, Buffer) else a for a in x.args))
                    out.append(x if isinstance(x, (Store, Let)) else map_children(self.alloc(x), st))
                    if isinstance(x, Let) and self.shares.get(x.var) is not None:
                        v, q = self.shares[x.var], self.part(self.lets[x.var])
                        assert v is not None and q is not None
                        out.append(Let(v, ex(q)))
            return out[0] if len(out) == 1 and not isinstance(s, Block) else block(*out)

        body = st(self.f.body)
        return replace(self.f, params=tuple(self.new.get(p, p) if isinstance(p, Buffer) else p for p in self.f.params), body=body)

    def alloc(self, s: Stmt) -> Stmt:
        return Alloc(self.new[s.buf], s.body) if isinstance(s, Alloc) and s.buf in self.new else s

    def one_store(self, run: Sequence[Store], ex: Callable[[Expr], Expr]) -> Stmt:
        values: list[Expr] = [const(0)] * self.lanes
        for x in run:
            at, lane = self.vector(x.idx[0])
            values[lane] = ex(x.value)
        v = values[0]
        if all(y.op == "extract" and y.attr == k and y.args[0] is v.args[0] for k, y in enumerate(values)) and v.args[0].dtype.lanes == self.lanes:
            whole = v.args[0]
        else:
            whole = shuffle(values, range(self.lanes))
        mask = run[0].mask
        return Store(self.new[run[0].buf], (ex(at),), whole, None if mask is None else ex(mask))


def add_const_free(i: Expr, c: int) -> Expr:
    """An index expression without its constant ``c``."""
    return i if not c else from_linear({m: k for m, k in linear(i).items() if m})
