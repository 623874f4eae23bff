"""flatten: every buffer has one dimension and every access one index.

Before: ``A: f32[M, K]``, ``A[i, k]``. After: ``A: f32[M * K]``, ``A[i * K + k]``. A rank-0 local stays a register variable;
a rank-0 parameter becomes one element at index 0.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import Expr, as_expr, bcast, const, load, load_parts, ramp, rejoin, rewrite_loads
from luthier.ir.loop import Alloc, Buffer, Func, Stmt, Store, map_children, map_exprs


def flat_buffer(b: Buffer) -> Buffer:
    if b.rank == 0 and b.scope == "local":
        return b
    return replace(b, shape=(b.size(),))


def flat_index(b: Buffer, idx: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The row-major element number, or () for a register variable."""
    if b.rank == 0:
        return () if b.scope == "local" else (const(0),)
    lanes = max(i.dtype.lanes for i in idx)
    out = as_expr(0)
    for n, i in zip(b.shape, idx, strict=True):
        out = (out * n if lanes == 1 or out.dtype.lanes == 1 else out * bcast(n, lanes)) + i
    return (ramp(rejoin(out.args[0]), out.attr[0], lanes) if out.op == "ramp" else rejoin(out) if lanes == 1 else out,)


def flatten(f: Func) -> Func:
    memo: dict[Expr, Expr] = {}
    params = {p.name: flat_buffer(p) for p in f.params if isinstance(p, Buffer)}  # accesses may view a parameter in another rank

    def target(b: Buffer) -> Buffer:
        hit = params.get(b.name)
        return flat_buffer(b) if hit is None or b.scope in ("local", "shared") else hit

    def fix(e: Expr) -> Expr | None:
        if e.op != "load":
            return None
        b, idx, m, o = load_parts(e)
        nb = target(b)
        return None if nb is b else load(nb, flat_index(b, idx), m, o)

    def st(s: Stmt) -> Stmt:
        if isinstance(s, Store):
            return Store(target(s.buf), flat_index(s.buf, s.idx), s.value, s.mask)
        if isinstance(s, Alloc):
            return Alloc(flat_buffer(s.buf), st(s.body))
        return map_children(s, st)

    body = map_exprs(st(f.body), lambda e: rewrite_loads(e, fix, memo))
    return replace(f, params=tuple(flat_buffer(p) if isinstance(p, Buffer) else p for p in f.params), body=body)
