"""privatize_threads: a local buffer that every thread uses at its own index needs no such dimension.

Before: ``alloc acc: f32[16, 2] local: for t in 0..16 thread.x: acc[t, j] = ...``. After: ``alloc acc: f32[2] local: .. acc[j] = ...``.

A local buffer exists once for each thread, so ``acc[t]`` with ``t`` the thread's own number is one element. A dimension goes when
every access, in any thread loop of one kind that starts at 0, indexes it by that loop's variable.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import Expr, is_const, load, load_parts, rewrite, walk
from luthier.ir.loop import Alloc, Buffer, For, Func, Stmt, Store, exprs_of, map_children, map_exprs, walk_stmts


def privatize_threads(f: Func) -> Func:
    kind = {s.var: s.kind for s in walk_stmts(f.body) if isinstance(s, For) and s.kind.startswith("thread") and is_const(s.lo, 0)}
    bufs = {s.buf for s in walk_stmts(f.body) if isinstance(s, Alloc) and s.buf.scope == "local" and s.buf.rank}
    if not kind or not bufs:
        return f
    seen: dict[Buffer, list[set[str]]] = {b: [set() for _ in b.shape] for b in bufs}

    def note(b: Buffer, idx: tuple[Expr, ...]) -> None:
        if b in seen:
            for kinds, i in zip(seen[b], idx, strict=True):
                kinds.add(kind.get(i, ""))

    for s in walk_stmts(f.body):
        if isinstance(s, Store):
            note(s.buf, s.idx)
        for e in walk(*exprs_of(s)):
            if e.op == "load":
                b, idx, _, _ = load_parts(e)
                note(b, idx)
    keep = {b: [k for k, kinds in enumerate(ks) if len(kinds) != 1 or "" in kinds] for b, ks in seen.items()}
    new = {b: replace(b, shape=tuple(b.shape[k] for k in ks)) for b, ks in keep.items() if len(ks) < b.rank}
    if not new:
        return f

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0] in new:
            b, idx, m, o = load_parts(e)
            return load(new[b], [idx[k] for k in keep[b]], m, o)
        return None

    memo: dict[Expr, Expr] = {}

    def st(s: Stmt) -> Stmt:
        s = map_children(s, st)
        if isinstance(s, Alloc) and s.buf in new:
            return Alloc(new[s.buf], s.body)
        if isinstance(s, Store) and s.buf in new:
            return Store(new[s.buf], tuple(s.idx[k] for k in keep[s.buf]), s.value, s.mask)
        return s

    return f.with_body(map_exprs(st(f.body), lambda e: rewrite(e, fix, memo)))
