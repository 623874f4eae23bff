"""map_parallel: the parallel loop of a kernel becomes the grid of a GPU.

Before: ``for i in 0..n parallel: S(i)``.
After: ``for b in 0..(n + 63) // 64 block.x: for t in 0..64 thread.x: if b * 64 + t < n: S(b * 64 + t)``.

Only the outermost parallel loop that nothing but Lets and Allocs surround is mapped; kernels with loops of kind ``block.*`` or
``thread.*`` are left alone, other parallel loops become serial. A kernel without one runs in a single thread.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import const, var
from luthier.ir.loop import Alloc, Block, For, Func, If, Let, Stmt, map_children, substitute_stmt, walk_stmts


def map_parallel(f: Func, threads: int = 64) -> Func:
    """``threads``: size of a group."""
    if any(isinstance(s, For) and "." in s.kind for s in walk_stmts(f.body)):
        return f.with_body(_serial(f.body))
    r = _map(f.body, threads)
    return f.with_body(_serial(f.body) if r is None else r)


def _serial(s: Stmt) -> Stmt:
    s = map_children(s, _serial)
    return replace(s, kind="serial") if isinstance(s, For) and s.kind == "parallel" else s


def _map(s: Stmt, threads: int) -> Stmt | None:
    if isinstance(s, For):
        if s.kind != "parallel":
            return None
        n = s.extent
        blocks = (n + (threads - 1)) // threads
        b, t = var(f"{s.var.attr[0]}.b", lo=0, hi=blocks - 1), var(f"{s.var.attr[0]}.t", lo=0, hi=threads - 1)
        i = b * threads + t
        body: Stmt = substitute_stmt(_serial(s.body), {s.var: s.lo + i})
        if not (n.op == "const" and n.attr % threads == 0):
            body = If(i < n, body)
        return For(b, const(0), blocks, "block.x", For(t, const(0), const(threads), "thread.x", body))
    if isinstance(s, Alloc) and s.buf.scope == "local":
        r = _map(s.body, threads)
        return None if r is None else Alloc(s.buf, r)
    if isinstance(s, Block):
        rest = [x for x in s.stmts if not isinstance(x, Let)]
        if len(rest) == 1:
            r = _map(rest[0], threads)
            return None if r is None else Block(tuple(r if x is rest[0] else x for x in s.stmts))
    return None
