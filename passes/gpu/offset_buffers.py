"""offset_buffers: a kernel that may be given the inside of a buffer where the target can bind whole ones only.

Before: ``func k(A: f32[n], n)``, ``A[i]``. After: ``func k(A: f32[n + A.at], n, A.at)``, ``A[i + A.at]``: the caller binds the buffer
and says at which element the argument starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from luthier.ir.expr import Expr, bcast, load, load_parts, rewrite, var
from luthier.ir.loop import Buffer, Func, Stmt, Store, map_children, map_exprs


def offset_buffers(f: Func, names: Iterable[str], units: Mapping[str, int] | None = None) -> Func:
    """``f`` must be flat. The offsets are index scalars named ``BUFFER.at``, appended to the parameters in the order of ``names``. They
    count groups of ``units`` elements (1 where none are named), so that an aligned start is known to be one."""
    wanted = list(names)
    if not wanted:
        return f
    scalars = dict(zip(wanted, offset_scalars(f, wanted), strict=True))
    at = {n: v * (units or {}).get(n, 1) for n, v in scalars.items()}
    new = {b: replace(b, shape=(b.size() + at[b.name],)) for b in f.buffers if b.name in at}
    by_name = {b.name: nb for b, nb in new.items()}

    def shift(b: Buffer, idx: tuple[Expr, ...]) -> tuple[Expr, ...]:
        o = at[b.name]
        return tuple(i + (o if i.dtype.lanes == 1 else bcast(o, i.dtype.lanes)) for i in idx)

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0].scope == "param" and e.attr[0].name in at:
            b, idx, m, o = load_parts(e)
            return load(by_name[b.name], shift(b, idx), m, o)
        return None

    memo: dict[Expr, Expr] = {}

    def st(s: Stmt) -> Stmt:
        if isinstance(s, Store) and s.buf.scope == "param" and s.buf.name in at:
            return Store(by_name[s.buf.name], shift(s.buf, s.idx), s.value, s.mask)
        return map_children(s, st)

    # stores first: their own indices hold loads that are rewritten afterwards
    body = map_exprs(st(f.body), lambda e: rewrite(e, fix, memo))
    params = tuple(new.get(p, p) if isinstance(p, Buffer) else p for p in f.params)
    return replace(f, params=(*params, *scalars.values()), body=body)


def offset_scalars(f: Func, names: Iterable[str]) -> tuple[Expr, ...]:
    """The scalars that :func:`offset_buffers` adds."""
    return tuple(var(f"{n}.at", lo=0) for n in names)
