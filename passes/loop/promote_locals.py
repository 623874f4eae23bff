"""promote_locals: local buffers whose every access has a constant index become register variables.

Before: ``alloc acc: f32[32] local`` with ``acc[ramp(16, 1, 16)]``. After: ``alloc acc.16: f32x16[] local`` with ``acc.16[]``.
Accesses must cut the buffer into disjoint pieces (same base and lanes wherever they overlap). A register variable whose only purpose
is to be copied into another (an accumulator into the tile that an epilogue reads) becomes that other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from luthier.ir.expr import Expr, load, load_parts, rewrite_loads
from luthier.ir.loop import (
    Alloc,
    Buffer,
    Call,
    For,
    Func,
    Stmt,
    Store,
    block,
    children,
    loads_of,
    map_children,
    map_exprs,
    stmts_of,
    walk_stmts,
)

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
    stores: dict[Buffer, int] = {}
    for s in walk_stmts(f.body):
        if isinstance(s, Store) and s.buf in pieces:
            stores[s.buf] = stores.get(s.buf, 0) + 1
            _note(pieces, s.buf, _piece(s.idx))
        elif isinstance(s, Call):  # takes the whole of it
            for a in s.args:
                if isinstance(a, Buffer) and a in pieces:
                    pieces[a] = None
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
    copied = _copied(f.body, env, stores)
    for a, b in copied.items():
        env[b] = env[a]
    gone = frozenset(copied.values())

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
            if s.buf in gone:
                return body
            for nb in reversed(env[s.buf].values()):
                body = Alloc(nb, body)
            return body
        if isinstance(s, Store) and s.buf in env:
            p = _piece(s.idx)
            assert p is not None
            if s.buf in copied and _source(s) in gone:
                return block()
            m = s.mask
            nb = env[s.buf][p]
            if m is not None:
                from luthier.ir.expr import select

                return Store(nb, (), select(m, s.value, load(s.buf, s.idx)))
            return Store(nb, (), s.value)
        return map_children(s, st)

    return replace(f, body=map_exprs(st(f.body), lambda e: rewrite_loads(e, fix, memo)))


def _source(s: Stmt) -> Buffer | None:
    """The buffer that a statement copies from, element by element."""
    if not isinstance(s, Store) or s.mask is not None or s.value.op != "load":
        return None
    b, idx, m, _ = load_parts(s.value)
    return b if m is None and idx == s.idx and b.dtype == s.buf.dtype else None


def _copied(body: Stmt, env: dict[Buffer, dict[tuple[int, int], Buffer]], stores: dict[Buffer, int]) -> dict[Buffer, Buffer]:
    """{a: b} where ``b``, in scope inside the scope of ``a``, ends with copies of all its pieces into ``a``, which nothing else writes
    and nothing reads before."""
    found: dict[Buffer, Buffer] = {}

    def peel(s: Stmt) -> tuple[list[Buffer], tuple[Stmt, ...]]:
        bufs: list[Buffer] = []
        while isinstance(s, Alloc):
            bufs.append(s.buf)
            s = s.body
        return bufs, tuple(stmts_of(s))

    def visit(s: Stmt) -> None:
        if isinstance(s, Alloc):
            outer, stmts = peel(s)
            for i, x in enumerate(stmts):
                if isinstance(x, Alloc) and env.keys() & set(outer):
                    pairs(set(outer), stmts[:i], x)
                visit(x)
        else:
            for c in children(s):
                visit(c)

    def pairs(outer: set[Buffer], before: tuple[Stmt, ...], x: Alloc) -> None:
        inner, stmts = peel(x)
        copies: dict[tuple[Buffer, Buffer], set[tuple[int, int] | None]] = {}
        for s in _backwards(stmts):
            b = _source(s)
            if b is None or not isinstance(s, Store) or b not in inner or s.buf not in outer:
                break
            copies.setdefault((s.buf, b), set()).add(_piece(s.idx))
        read: set[Buffer] | None = None
        for (a, b), ps in copies.items():
            if a not in env or b not in env or not ps == env[a].keys() == env[b].keys() or stores[a] != len(ps) or b in found.values():
                continue
            if read is None:
                read = {e.attr[0] for s in (*before, x) for e in loads_of(s)}
            if a not in read:
                found[a] = b

    visit(body)
    return found


def _backwards(stmts: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """Statements from the last one on; a loop of threads that ends them counts as what each of its threads does."""
    for s in reversed(stmts):
        if isinstance(s, For) and s.kind.startswith("thread"):
            yield from _backwards(tuple(stmts_of(s.body)))
        yield s


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
