"""privatize_threads: a local buffer that every thread uses at its own places needs no dimension for the threads.

Before: ``alloc acc: f32[16, 2] local: for t in 0..16 thread.x: acc[t, j] = ...``. After: ``alloc acc: f32[2] local: .. acc[j] = ...``.
A tile that threads share out in steps keeps one part: with 16 threads, ``acc: f32[64]`` used at ``r * 16 + t`` becomes ``acc: f32[4]``
used at ``r``; ``acc: f32[128]`` used at ``r * 64 + t * 4 + v`` with ``v < 4`` becomes ``acc: f32[8]`` used at ``r * 4 + v``.

A local buffer exists once for each thread, so the places of the others are never used. A dimension shrinks when every access, in any
thread loop of one kind that starts at 0 and has one constant extent, has such an index.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import Expr, bounds, from_linear, is_const, linear, load, load_parts, rewrite, walk
from luthier.ir.loop import Alloc, Buffer, For, Func, Stmt, Store, exprs_of, map_children, map_exprs, walk_stmts

# kind of the thread loop; its extent where threads take turns, 0 where the index is the thread's number; neighbours that one thread has
Key = tuple[str, int, int]


def privatize_threads(f: Func) -> Func:
    kind = {s.var: s for s in walk_stmts(f.body) if isinstance(s, For) and s.kind.startswith("thread") and is_const(s.lo, 0)}
    bufs = {s.buf for s in walk_stmts(f.body) if isinstance(s, Alloc) and s.buf.scope == "local" and s.buf.rank}
    if not kind or not bufs:
        return f

    def split(i: Expr) -> tuple[Key, Expr | None] | None:
        """(who owns the place, index among the owner's places; None: there is one)."""
        if i in kind:
            return (kind[i].kind, 0, 1), None
        poly = linear(i)
        mine = [m for m in poly if len(m) == 1 and m[0] in kind]
        if len(mine) != 1 or poly[mine[0]] < 1:
            return None
        loop, own = kind[mine[0][0]], poly[mine[0]]
        if loop.extent.op != "const":
            return None
        n = int(loop.extent.attr)
        rest = {m: c for m, c in poly.items() if m != mine[0]}
        turns = {m: c for m, c in rest.items() if m and c % (n * own) == 0}
        place = from_linear({m: c for m, c in rest.items() if m not in turns})
        if () in rest:  # of a constant, whole turns are turns
            turns[()] = rest[()] // (n * own) * n * own
            place = place - turns[()]
        lo, hi = bounds(place)
        if lo is None or lo < 0 or hi is None or hi >= own or any(v in kind for m in rest for v in m):
            return None
        return (loop.kind, n, own), from_linear({m: c // n for m, c in turns.items() if c}) + place

    seen: dict[Buffer, list[set[Key | None]]] = {b: [set() for _ in b.shape] for b in bufs}

    def note(b: Buffer, idx: tuple[Expr, ...]) -> None:
        if b in seen:
            for keys, i, n in zip(seen[b], idx, b.shape, strict=True):
                hit = split(i)
                if hit is not None and hit[1] is None and n.op == "const" and is_const(kind[i].extent, n.attr):
                    keys.add((hit[0][0], int(n.attr), 1))  # one turn of as many threads as there are places
                else:
                    keys.add(None if hit is None else hit[0])

    for s in walk_stmts(f.body):
        if isinstance(s, Store):
            note(s.buf, s.idx)
        for e in walk(*exprs_of(s)):
            if e.op == "load":
                b, idx, _, _ = load_parts(e)
                note(b, idx)
    new: dict[Buffer, Buffer] = {}
    how: dict[Buffer, list[Key | None]] = {}
    for b, dims in seen.items():
        keys = [next(iter(ks)) if len(ks) == 1 else None for ks in dims]
        shape = []
        for n, k in zip(b.shape, keys, strict=True):
            if k is None:
                shape.append(n)
            elif k[1] and not (n.op == "const" and n.attr == k[1] * k[2] == k[1]):
                shape.append((n + (k[1] * k[2] - 1)) // (k[1] * k[2]) * k[2])
        if any(k is not None for k in keys):
            new[b] = replace(b, shape=tuple(shape))
            how[b] = keys
    if not new:
        return f

    def indices(b: Buffer, idx: tuple[Expr, ...]) -> tuple[Expr, ...]:
        out = []
        for i, n, k in zip(idx, b.shape, how[b], strict=True):
            if k is None:
                out.append(i)
            elif k[1] and not (n.op == "const" and n.attr == k[1] * k[2] == k[1]):
                hit = split(i)
                assert hit is not None and hit[1] is not None
                out.append(hit[1])
        return tuple(out)

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0] in new:
            b, idx, m, o = load_parts(e)
            return load(new[b], indices(b, idx), m, o)
        return None

    memo: dict[Expr, Expr] = {}

    def st(s: Stmt) -> Stmt:
        s = map_children(s, st)
        if isinstance(s, Alloc) and s.buf in new:
            return Alloc(new[s.buf], s.body)
        if isinstance(s, Store) and s.buf in new:
            return Store(new[s.buf], indices(s.buf, s.idx), s.value, s.mask)
        return s

    return f.with_body(map_exprs(st(f.body), lambda e: rewrite(e, fix, memo)))
