"""vectorize: loops of kind ``vectorize`` with a constant number of rounds become lanes.

Before: ``for j in 0..8 vectorize: C[i + j] = A[i + j] * b``.
After: ``C[ramp(i, 1, 8)] = A[ramp(i, 1, 8)] * bcast(b, 8)``.
Conditions on the lane become masks of the accesses below them; a store whose index does not depend on the lane is a reduction
over the lanes (``vreduce``); buffers allocated inside get vector elements. A loop that cannot be expressed so becomes serial and
is listed in ``Func.attrs["scalar_loops"]``.
"""

from __future__ import annotations

import math
from dataclasses import replace

from luthier.ir import intrin
from luthier.ir.compute import MONOIDS
from luthier.ir.expr import (
    Expr,
    bcast,
    binary,
    bounds,
    call,
    carry_nan,
    const,
    is_const,
    load,
    load_parts,
    ramp,
    rebuild,
    select,
    unary,
    var,
    vreduce,
)
from luthier.ir.loop import Alloc, Barrier, Block, Buffer, Call, For, Func, If, Let, Stmt, Store, While, block, map_children


class _CannotVectorize(Exception):
    pass


def vectorize(f: Func) -> Func:
    failed: list[str] = []

    def st(s: Stmt) -> Stmt:
        if isinstance(s, For) and s.kind == "vectorize":
            n = s.extent
            body = st(s.body)
            if n.op == "const" and n.attr == 1:
                return _Vec(s.var, 1, s.lo).stmt(body, None)
            try:
                if n.op != "const" or n.attr > 64:
                    raise _CannotVectorize("the number of lanes is not a constant up to 64")
                return _Vec(s.var, n.attr, s.lo).stmt(body, None)
            except _CannotVectorize as e:
                failed.append(f"{s.var!r}: {e}")
                return replace(s, kind="serial", body=body)
        return map_children(s, st)

    body = st(f.body)
    out = f.with_body(body)
    return replace(out, attrs={**f.attrs, "scalar_loops": [*f.attrs.get("scalar_loops", []), *failed]}) if failed else out


_IDENT = {"add": "sum", "mul": "prod", "max": "max", "min": "min", "and": "all", "or": "any"}


class _Vec:
    def __init__(self, v: Expr, lanes: int, lo: Expr) -> None:
        self.lanes = lanes
        self.env: dict[Expr, Expr] = {v: ramp(lo, 1, lanes)}
        self.wide: dict[Buffer, Buffer] = {}
        self.memo: dict[tuple[Expr, Expr | None], Expr] = {}

    def expr(self, e: Expr, mask: Expr | None) -> Expr:
        hit = self.env.get(e)
        if hit is not None:
            return hit
        key = (e, mask)
        r = self.memo.get(key)
        if r is not None:
            return r
        if e.op == "load":
            r = self.load(e, mask)
        elif not e.args:
            r = e
        else:
            args = tuple(self.expr(a, mask) for a in e.args)
            same = all(x is y for x, y in zip(args, e.args, strict=True))
            if not same and e.op in ("ramp", "bcast", "vreduce", "shuffle", "extract") and any(a.dtype.lanes > 1 for a in args if a.dtype.lanes != 1) and e.dtype.lanes > 1:
                raise _CannotVectorize("nested vectors")
            r = e if same else self.wide_call(e, args) if e.op == "call" else rebuild(e, args)
        self.memo[key] = r
        return r

    def wide_call(self, e: Expr, args: tuple[Expr, ...]) -> Expr:
        """An intrinsic that is the same in every lane, on vectors."""
        if e.dtype.lanes > 1 or not intrin.lookup(e.attr[0]).lanewise:
            raise _CannotVectorize(f"{e.attr[0]} on vectors")
        n = max(a.dtype.lanes for a in args)
        return call(e.attr[0], e.dtype.vec(n), *(a if a.dtype.lanes == n else bcast(a, n) for a in args), attr=e.attr[1])

    def load(self, e: Expr, mask: Expr | None) -> Expr:
        buf, idx, m, o = load_parts(e)
        ix = tuple(self.expr(i, mask) for i in idx)
        mm = None if m is None else self.expr(m, mask)
        oo = None if o is None else self.expr(o, mask)
        if buf in self.wide:
            if any(i.dtype.lanes > 1 for i in ix):
                raise _CannotVectorize(f"{buf.name} is indexed by the lane")
            return load(self.wide[buf], ix, None if mm is None else _no_lanes(mm), oo)
        lanes = max([i.dtype.lanes for i in ix], default=1)
        if e.dtype.lanes > 1 and any(x is not y for x, y in zip(ix, idx, strict=True)):
            raise _CannotVectorize("nested vectors")
        if mask is not None and lanes > 1 and not _inside(buf, ix):
            mm = mask if mm is None else (mm if mm.dtype.lanes > 1 else bcast(mm, lanes)) & mask
        if oo is not None and lanes == 1 and oo.dtype.lanes > 1:
            ix = (*ix[:-1], bcast(ix[-1], oo.dtype.lanes))
        return load(buf, ix, mm, oo)

    def stmt(self, s: Stmt, mask: Expr | None) -> Stmt:
        if isinstance(s, Block):
            return block(*(self.stmt(c, mask) for c in s.stmts))
        if isinstance(s, Store):
            return self.store(s, mask)
        if isinstance(s, Let):
            v = self.expr(s.value, mask)
            if v.dtype.lanes == s.var.dtype.lanes:
                if v is s.value:
                    return s
                self.env[s.var] = s.var
                return Let(s.var, v)
            nv = var(s.var.attr[0] + "~v", v.dtype, None)
            self.env[s.var] = nv
            return Let(nv, v)
        if isinstance(s, If):
            c = self.expr(s.cond, mask)
            if c.op == "bcast":  # all lanes or none
                c = c.args[0]
            if is_const(c, True):
                return self.stmt(s.then, mask)
            if c.dtype.lanes == 1:
                return If(c, self.stmt(s.then, mask), None if s.orelse is None else self.stmt(s.orelse, mask))
            if s.orelse is not None:
                inv = ~c
                return block(self.stmt(s.then, c if mask is None else mask & c), self.stmt(s.orelse, inv if mask is None else mask & inv))
            return self.stmt(s.then, c if mask is None else mask & c)
        if isinstance(s, For):
            lo, hi = self.expr(s.lo, mask), self.expr(s.hi, mask)
            if lo.dtype.lanes > 1 or hi.dtype.lanes > 1:
                raise _CannotVectorize(f"bounds of {s.var!r} depend on the lane")
            return For(s.var, lo, hi, s.kind, self.stmt(s.body, mask))
        if isinstance(s, Alloc):
            if s.buf.dtype.lanes > 1:
                raise _CannotVectorize("nested vectors")
            nb = replace(s.buf, dtype=s.buf.dtype.vec(self.lanes))
            if self.lanes > 1:
                self.wide[s.buf] = nb
            return Alloc(nb, self.stmt(s.body, mask))
        if isinstance(s, (While, Call, Barrier)):
            raise _CannotVectorize(f"{type(s).__name__} inside")
        raise TypeError(s)

    def store(self, s: Store, mask: Expr | None) -> Stmt:
        ix = tuple(self.expr(i, mask) for i in s.idx)
        own = None if s.mask is None else self.expr(s.mask, mask)
        m = mask if own is None else own if mask is None else (own if own.dtype.lanes > 1 else bcast(own, self.lanes)) & mask
        if s.buf in self.wide:
            if any(i.dtype.lanes > 1 for i in ix):
                raise _CannotVectorize(f"{s.buf.name} is indexed by the lane")
            nb = self.wide[s.buf]
            v = bcast(self.expr(s.value, mask), self.lanes)
            if m is not None:
                v = select(m, v, load(nb, ix))
            return Store(nb, ix, v)
        if any(i.dtype.lanes > 1 for i in ix):
            if s.value.dtype.lanes > 1:
                raise _CannotVectorize("nested vectors")
            return Store(s.buf, tuple(bcast(i, self.lanes) for i in ix), bcast(self.expr(s.value, mask), self.lanes), None if m is None else bcast(m, self.lanes))
        return self.lane_reduction(s, ix, m)

    def lane_reduction(self, s: Store, ix: tuple[Expr, ...], m: Expr | None) -> Stmt:
        old = load(s.buf, s.idx)
        v = s.value
        if v.op in _IDENT and old in v.args and s.value.dtype.lanes == 1:
            other = v.args[1] if v.args[0] is old else v.args[0]
            x = self.expr(other, m)
            x = bcast(x, self.lanes)
            if m is not None:
                x = select(bcast(m, self.lanes), x, bcast(MONOIDS[_IDENT[v.op]].init((v.dtype,))[0], self.lanes))
            return Store(s.buf, ix, binary(v.op, load(s.buf, ix), vreduce(v.op, x)))
        if m is None and (best := _carries_nan(v, old)) is not None:  # acc = nanmax(x, acc)
            x = bcast(self.expr(v.args[1], m), self.lanes)
            r = select(vreduce("or", unary("isnan", x)), const(math.nan, v.dtype), vreduce(best, x))
            return Store(s.buf, ix, carry_nan(best, r, load(s.buf, ix)))
        x = self.expr(v, m)
        if x.dtype.lanes == 1 and m is None and old not in v.args:
            return Store(s.buf, ix, x)
        raise _CannotVectorize(f"lanes write the same element of {s.buf.name}")


def _carries_nan(v: Expr, old: Expr) -> str | None:
    """``min`` or ``max`` where ``v`` is ``carry_nan(op, x, old)``."""
    if v.op != "select" or v.args[2].op not in ("min", "max") or v.args[2].args[1] is not old:
        return None
    return v.args[2].op if v is carry_nan(v.args[2].op, v.args[1], old) else None


def _inside(buf: Buffer, ix: tuple[Expr, ...]) -> bool:
    """Every lane lies in a local buffer whatever the mask says."""
    if buf.scope != "local" or len(ix) != 1 or buf.shape[0].op != "const":
        return False
    lo, hi = bounds(ix[0])
    return lo is not None and hi is not None and lo >= 0 and hi < buf.shape[0].attr  # type: ignore[no-any-return]


def _no_lanes(m: Expr) -> Expr:
    if m.dtype.lanes > 1:
        raise _CannotVectorize("masked load of a private buffer")
    return m

