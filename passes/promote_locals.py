"""promote_locals: local buffers whose every access has a constant index become register variables.

Before: ``alloc acc: f32[32] local`` with ``acc[ramp(16, 1, 16)]``. After: ``alloc acc.16: f32x16[] local`` with ``acc.16[]``.
Accesses must cut the buffer into disjoint pieces (same base and lanes wherever they overlap).
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import Expr, load, load_parts, rewrite_loads
from luthier.ir.loop import Alloc, Buffer, Func, Stmt, Store, loads_of, map_children, map_exprs, walk_stmts

MAX_PIECES = 256


def _piece(idx: tuple[Expr, ...]) -> tuple[int, int] | None:
    if len(idx) != 1:
        return None
    i = idx[0]
    if i.op == "const":
        return i.attr, 1
    if i.op == "ramp" and i.attr[0] == 1 and i.args[0].op == "const":
        return i.args[0].attr, i.dtype.lanes
    return None


def promote_locals(f: Func) -> Func:
    pieces: dict[Buffer, set[tuple[int, int]] | None] = {}
    for s in walk_stmts(f.body):
        if isinstance(s, Alloc) and s.buf.scope == "local" and s.buf.rank == 1:
            pieces.setdefault(s.buf, set())
    if not pieces:
        return f
    for s in walk_stmts(f.body):
        if isinstance(s, Store) and s.buf in pieces:
            _note(pieces, s.buf, _piece(s.idx))
    for x in loads_of(f.body):
        if x.attr[0] in pieces:
            b, idx, m, _ = load_parts(x)
            _note(pieces, b, None if m is not None else _piece(idx))
    env: dict[Buffer, dict[tuple[int, int], Buffer]] = {}
    for b, ps in pieces.items():
        if ps is None or len(ps) > MAX_PIECES or _overlap(ps):
            continue
        if any(p[1] > 1 for p in ps) and b.dtype.lanes > 1:
            continue
        env[b] = {p: Buffer(f"{b.name}.{p[0]}", b.dtype if p[1] == 1 else b.dtype.vec(p[1]), (), "local") for p in sorted(ps)}
    if not env:
        return f

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0] in env:
            b, idx, _, _ = load_parts(e)
            p = _piece(idx)
            assert p is not None
            return load(env[b][p], ())
        return None

    memo: dict[Expr, Expr] = {}

    def st(s: Stmt) -> Stmt:
        if isinstance(s, Alloc) and s.buf in env:
            body = st(s.body)
            for nb in reversed(env[s.buf].values()):
                body = Alloc(nb, body)
            return body
        if isinstance(s, Store) and s.buf in env:
            p = _piece(s.idx)
            assert p is not None
            m = s.mask
            nb = env[s.buf][p]
            if m is not None:
                from luthier.ir.expr import select

                return Store(nb, (), select(m, s.value, load(s.buf, s.idx)))
            return Store(nb, (), s.value)
        return map_children(s, st)

    return replace(f, body=map_exprs(st(f.body), lambda e: rewrite_loads(e, fix, memo)))


def _note(pieces: dict[Buffer, set[tuple[int, int]] | None], b: Buffer, p: tuple[int, int] | None) -> None:
    ps = pieces[b]
    if p is None:
        pieces[b] = None
    elif ps is not None:
        ps.add(p)


def _overlap(ps: set[tuple[int, int]]) -> bool:
    end = -1
    for base, n in sorted(ps):
        if base < end:
            return True
        end = base + n
    return False
