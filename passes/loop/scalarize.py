"""scalarize: vectors become their lanes, for targets that compute with scalars.

Before: ``C[ramp(i, 1, 2)] = A[ramp(i, 1, 2)] + r[]`` with ``r: f32x2[] local``.
After: ``let v.0 = A[i] + r.0[]; let v.1 = A[i + 1] + r.1[]; C[i] = v.0; C[i + 1] = v.1``.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir import intrin
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, binary, bitcast, call, cast, extract, is_const, load, load_parts, rebuild, select, var
from luthier.ir.loop import Alloc, Buffer, For, Func, If, Let, Stmt, Store, While, block, map_children, map_exprs

_LEAF = frozenset(("var", "const"))


def scalarize(f: Func) -> Func:
    """Raises CompilationError for intrinsics on vectors, which have no lanes to take apart."""
    return f.with_body(_Scalarize(f.name).stmt(f.body))


class _Scalarize:
    def __init__(self, name: str) -> None:
        self.name = name
        self.n = 0
        self.lets: dict[Expr, list[Expr]] = {}
        self.regs: dict[Buffer, list[Buffer]] = {}
        self.arrays: dict[Buffer, Buffer] = {}
        self.memo: dict[tuple[Expr, int], Expr] = {}
        self.memo1: dict[Expr, Expr] = {}

    def lane(self, e: Expr, k: int) -> Expr:
        """Lane ``k``, itself free of vectors."""
        if e.dtype.lanes == 1:
            return self.expr(e)
        key = (e, k)
        r = self.memo.get(key)
        if r is None:
            r = self.memo[key] = self._lane(e, k)
        return r

    def _lane(self, e: Expr, k: int) -> Expr:
        op, d = e.op, e.dtype
        if op in ("ramp", "bcast"):
            return self.expr(extract(e, k))
        if op == "var":
            return self.lets[e][k]
        if op == "load":
            buf, idx, m, o = load_parts(e)
            mk, ok = None if m is None else self.lane(m, k), None if o is None else self.lane(o, k)
            if buf in self.regs:
                return load(self.regs[buf][k], ())
            if buf.dtype.lanes > 1:
                return load(self.array(buf), [self.expr(idx[0]) * buf.dtype.lanes + k], mk, ok)
            return load(buf, [self.lane(i, k) for i in idx], mk, ok)
        if op == "select":
            return select(self.lane(e.args[0], k), self.lane(e.args[1], k), self.lane(e.args[2], k))
        if op == "cast":
            return cast(self.lane(e.args[0], k), d.scalar)
        if op == "bitcast" and e.args[0].dtype.lanes == d.lanes:
            return bitcast(self.lane(e.args[0], k), d.scalar)
        if op == "shuffle":
            p = max(e.attr[k], 0)
            for a in e.args:
                if p < a.dtype.lanes:
                    return self.lane(a, p)
                p -= a.dtype.lanes
        if op == "call" and intrin.lookup(e.attr[0]).lanewise:
            return call(e.attr[0], d.scalar, *(self.lane(a, k) for a in e.args), attr=e.attr[1])
        if op in ("bitcast", "call", "shuffle"):
            raise CompilationError(f"{e.attr[0] if op == 'call' else op} on {d} has no lanes", op=self.name)
        return rebuild(e, tuple(self.lane(a, k) for a in e.args))

    def expr(self, e: Expr) -> Expr:
        """A scalar expression whose vector parts are taken apart."""
        hit = self.memo1.get(e)
        if hit is not None:
            return hit
        if e.op == "extract":
            r = self.lane(e.args[0], e.attr)
        elif e.op == "vreduce":
            xs = [self.lane(e.args[0], k) for k in range(e.args[0].dtype.lanes)]
            while len(xs) > 1:
                h = len(xs) // 2
                xs = [binary(e.attr, xs[k], xs[k + h]) for k in range(h)] + xs[2 * h :]
            r = xs[0]
        elif e.args:
            args = tuple(self.expr(a) if a.dtype.lanes == 1 else a for a in e.args)
            if any(a.dtype.lanes > 1 for a in args):
                raise CompilationError(f"{e.op} mixes a vector into a scalar", op=self.name)
            r = rebuild(e, args) if any(x is not y for x, y in zip(args, e.args, strict=True)) else e
        else:
            r = e
        self.memo1[e] = r
        return r

    def array(self, b: Buffer) -> Buffer:
        if b not in self.arrays:
            self.arrays[b] = replace(b, dtype=b.dtype.scalar, shape=(b.size() * b.dtype.lanes,))
        return self.arrays[b]

    def fresh(self, base: str, like: Expr) -> Expr:
        self.n += 1
        return var(f"{base}.l{self.n}", like.dtype, None)

    def stmt(self, s: Stmt) -> Stmt:
        if isinstance(s, Let) and s.var.dtype.lanes > 1:
            xs = [self.lane(s.value, k) for k in range(s.var.dtype.lanes)]
            names = {x: x if x.op in _LEAF else self.fresh(s.var.attr[0], x) for x in xs}  # equal lanes are one
            self.lets[s.var] = [names[x] for x in xs]
            return block(*(Let(v, x) for x, v in names.items() if v is not x))
        if isinstance(s, Alloc) and s.buf.dtype.lanes > 1:
            if s.buf.rank == 0:
                parts = [Buffer(f"{s.buf.name}.{k}l", s.buf.dtype.scalar, (), "local") for k in range(s.buf.dtype.lanes)]
                self.regs[s.buf] = parts
                body = self.stmt(s.body)
                for p in reversed(parts):
                    body = Alloc(p, body)
                return body
            return Alloc(self.array(s.buf), self.stmt(s.body))
        if isinstance(s, Store) and s.value.dtype.lanes > 1:
            return self.store(s)
        if isinstance(s, (For, While, If, Alloc)):
            r = map_children(s, self.stmt)
            if isinstance(r, For):
                return replace(r, lo=self.expr(r.lo), hi=self.expr(r.hi))
            return replace(r, cond=self.expr(r.cond)) if isinstance(r, (While, If)) else r
        r = map_children(s, self.stmt)
        return r if r is not s else map_exprs(s, self.expr)

    def store(self, s: Store) -> Stmt:
        n = s.value.dtype.lanes
        xs = [self.lane(s.value, k) for k in range(n)]
        vs = [x if x.op in ("var", "const") else self.fresh("v", x) for x in xs]
        lets = [Let(v, x) for v, x in zip(vs, xs, strict=True) if v is not x]
        out: list[Stmt] = []
        for k, v in enumerate(vs):
            m = None if s.mask is None else self.lane(s.mask, k)
            m = None if m is not None and is_const(m, True) else m
            if s.buf in self.regs:
                out.append(Store(self.regs[s.buf][k], (), v, m))
            elif s.buf.dtype.lanes > 1:
                out.append(Store(self.array(s.buf), (self.expr(s.idx[0]) * n + k,), v, m))
            else:
                out.append(Store(s.buf, tuple(self.lane(i, k) for i in s.idx), v, m))
        return block(*lets, *out)
