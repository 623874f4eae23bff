"""split_vectors: vectors wider than a register become several that fit.

Before (128 bits): ``acc: f32x8; acc[] = acc[] + A[ramp(i, 1, 8)]; r[] = vreduce.add(acc[])``.
After: ``acc.0[] = acc.0[] + A[ramp(i, 1, 4)]; acc.1[] = acc.1[] + A[ramp(i + 4, 1, 4)]; r[] = vreduce.add(acc.0[] + acc.1[])``.

All vectors of N lanes are cut alike, by the widest element that any of them has, so that values, masks and indices keep lining up.
``vreduce`` halves: lane i with lane i + N / 2, as before. A function with shuffles, calls or bitcasts that change the number of
lanes among the vectors to cut is left alone.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.dtypes import DType
from luthier.ir.expr import (
    Expr,
    bcast,
    binary,
    bitcast,
    cast,
    extract,
    load,
    load_parts,
    loads,
    ramp,
    rebuild,
    rewrite,
    var,
    vreduce,
)
from luthier.ir.loop import (
    Alloc,
    Block,
    Buffer,
    Func,
    Let,
    Stmt,
    Store,
    block,
    contents_of,
    exprs_of,
    map_children,
    map_own_exprs,
    nodes_of,
)

_FIXED = ("shuffle", "call")


def split_vectors(f: Func, bits: int = 128) -> Func:
    """``bits``: width of a register."""
    inside = contents_of(f.body)
    widest: dict[int, int] = {}
    for d in (*inside.dtypes, *(b.dtype for b in inside.allocated)):
        if d.lanes > 1:
            widest[d.lanes] = max(widest.get(d.lanes, 1), _width(d))
    size = {n: max(bits // w, 2) for n, w in widest.items() if n * w > bits}
    if not size or inside.calls:
        return f
    for e in nodes_of(f.body):
        lanes = [x.dtype.lanes for x in (e, *e.args) if x.dtype.lanes in size]
        if lanes and (e.op in _FIXED or (e.op == "bitcast" and e.args[0].dtype.lanes != e.dtype.lanes)):
            return f
    if any(n % k or n & (n - 1) for n, k in size.items()) or any(b.dtype.lanes > 1 for b in f.buffers):
        return f
    return f.with_body(_Split(size).stmt(f.body))


def _width(d: DType) -> int:
    return 32 if d.is_index else 1 if d.is_bool else d.bits


class _Split:
    def __init__(self, size: dict[int, int]) -> None:
        self.size = size
        self.memo: dict[Expr, list[Expr]] = {}
        self.scalars: dict[Expr, Expr] = {}
        self.bufs: dict[Buffer, list[Buffer]] = {}
        self.fresh = 0

    # ------------------------------------------------------------ expressions

    def parts(self, e: Expr) -> list[Expr]:
        """The pieces of a vector that is cut."""
        r = self.memo.get(e)
        if r is None:
            r = self.memo[e] = self.cut(e)
        return r

    def cut(self, e: Expr) -> list[Expr]:
        lanes = e.dtype.lanes
        n = self.size[lanes]
        count = range(lanes // n)
        if e.op == "bcast":
            return [bcast(self.scalar(e.args[0]), n)] * len(count)
        if e.op == "ramp":
            base = self.scalar(e.args[0])
            return [ramp(base + k * n * e.attr[0], e.attr[0], n) for k in count]
        if e.op == "var":
            return [var(f"{e.attr[0]}.{k}", e.dtype.scalar.vec(n), e.attr[1], e.attr[2]) for k in count]
        if e.op == "load":
            buf, idx, m, o = load_parts(e)
            if buf.dtype.lanes > 1:
                return [load(b, i, None if m is None else self.part(m, k), None if o is None else self.part(o, k)) for k, (b, i) in enumerate(self.places(buf, idx))]
            return [load(buf, [self.part(i, k) for i in idx], None if m is None else self.part(m, k), None if o is None else self.part(o, k)) for k in count]
        if e.op == "cast":
            return [cast(a, e.dtype.scalar.vec(n)) for a in self.parts(e.args[0])]
        if e.op == "bitcast":
            return [bitcast(a, e.dtype.scalar.vec(n)) for a in self.parts(e.args[0])]
        return [rebuild(e, tuple(self.part(a, k) for a in e.args)) for k in count]

    def part(self, e: Expr, k: int) -> Expr:
        """Piece ``k`` of a vector, or a scalar as it is."""
        return self.parts(e)[k] if e.dtype.lanes in self.size else self.scalar(e)

    def scalar(self, e: Expr) -> Expr:
        """An expression that is not cut itself."""
        return rewrite(e, self.fix, self.scalars)

    def fix(self, e: Expr) -> Expr | None:
        if e.op == "vreduce" and e.args[0].dtype.lanes in self.size:
            xs = self.parts(e.args[0])
            while len(xs) > 1:
                h = len(xs) // 2
                xs = [binary(e.attr, a, b) for a, b in zip(xs[:h], xs[h:], strict=True)]
            return vreduce(e.attr, xs[0])
        if e.op == "extract" and e.args[0].dtype.lanes in self.size:
            n = self.size[e.args[0].dtype.lanes]
            return extract(self.parts(e.args[0])[e.attr // n], e.attr % n)
        return None

    # ------------------------------------------------------------ memory

    def places(self, buf: Buffer, idx: tuple[Expr, ...]) -> list[tuple[Buffer, tuple[Expr, ...]]]:
        """Where the pieces of an element of a buffer of vectors are."""
        bs = self.bufs[buf]
        ix = tuple(self.scalar(i) for i in idx)
        if buf.rank == 0:
            return [(b, ()) for b in bs]
        count = buf.dtype.lanes // self.size[buf.dtype.lanes]
        return [(bs[0], (*ix[:-1], ix[-1] * count + k)) for k in range(count)]

    def alloc(self, s: Alloc) -> Stmt:
        b, n = s.buf, self.size[s.buf.dtype.lanes]
        count = b.dtype.lanes // n
        d = b.dtype.scalar.vec(n)
        if b.rank:
            self.bufs[b] = [replace(b, dtype=d, shape=(*b.shape[:-1], b.shape[-1] * count))]
        else:
            self.bufs[b] = [replace(b, name=f"{b.name}.v{k}", dtype=d) for k in range(count)]
        self.memo.clear()  # a name may be allocated again
        self.scalars.clear()
        body = self.stmt(s.body)
        for x in reversed(self.bufs[b]):
            body = Alloc(x, body)
        return body

    # ------------------------------------------------------------ statements

    def stmt(self, s: Stmt) -> Stmt:
        if isinstance(s, Block):
            return block(*(self.stmt(c) for c in s.stmts))
        if isinstance(s, Let) and s.var.dtype.lanes in self.size:
            return block(*(Let(v, x) for v, x in zip(self.parts(s.var), self.parts(s.value), strict=True)))
        if isinstance(s, Alloc) and s.buf.dtype.lanes in self.size:
            return self.alloc(s)
        if isinstance(s, Store):
            return self.store(s)
        return map_children(map_own_exprs(s, self.scalar), self.stmt)

    def store(self, s: Store) -> Stmt:
        lanes = s.buf.dtype.lanes if s.buf.dtype.lanes > 1 else max([s.value.dtype.lanes, *(i.dtype.lanes for i in s.idx)])
        if lanes not in self.size:
            return map_own_exprs(s, self.scalar)
        count = lanes // self.size[lanes]
        if s.buf.dtype.lanes > 1:
            places = self.places(s.buf, s.idx)
        else:
            places = [(s.buf, tuple(self.part(i, k) for i in s.idx)) for k in range(count)]
        values = [self.part(s.value, k) for k in range(count)]
        lets: list[Stmt] = []
        if any(ld.attr[0].scope != "local" or ld.attr[0].rank for x in exprs_of(s) for ld in loads(x)):  # all are read before one is written
            for k, v in enumerate(values):
                self.fresh += 1
                t = var(f"split.{self.fresh}", v.dtype)
                lets.append(Let(t, v))
                values[k] = t
        masks = [None if s.mask is None else self.part(s.mask, k) for k in range(count)]
        return block(*lets, *(Store(b, i, v, m) for (b, i), v, m in zip(places, values, masks, strict=True)))
