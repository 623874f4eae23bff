"""Statements to kernels: parameters are the buffers that they touch."""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import Push
from luthier.ir.expr import (
    Expr,
    as_expr,
    carry_nan,
    const,
    free_vars,
    load,
    load_parts,
    loads,
    prove,
)
from luthier.ir.loop import Alloc, Buffer, For, Func, If, Stmt, Store


def make_func(name: str, body: Stmt, dims: tuple[Expr, ...]) -> Func:
    """A Func around ``body``: buffers that it uses but does not allocate become parameters (read ones first, then written)."""
    from luthier.ir.loop import exprs_of, walk_stmts

    local: set[str] = set()
    read: dict[str, Buffer] = {}
    written: dict[str, Buffer] = {}
    used: set[Expr] = set()
    bound: set[Expr] = set()
    for s in walk_stmts(body):
        if isinstance(s, Alloc):
            local.add(s.buf.name)
            used |= {v for e in s.buf.shape for v in free_vars(e)}
        if isinstance(s, Store):
            written.setdefault(s.buf.name, s.buf)
        if isinstance(s, For):
            bound.add(s.var)
        for e in exprs_of(s):
            used |= free_vars(e)
            for x in loads(e):
                read.setdefault(x.attr[0].name, x.attr[0])
    for b in [*read.values(), *written.values()]:
        for e in b.shape:
            used |= free_vars(e)
    ins = [replace(b, scope="param", writable=False) for n, b in read.items() if n not in local and n not in written]
    outs = [replace(b, scope="param") for n, b in written.items() if n not in local]
    dimset = [d for d in dims if d in used]
    env = {b.name: b for b in (*ins, *outs)}
    body = _rebind(body, env)
    return Func(name, (*ins, *outs, *dimset), body)


def _rebind(s: Stmt, env: dict[str, Buffer]) -> Stmt:
    """Loads and stores refer to the parameter buffers by the very same Buffer."""
    from luthier.ir.loop import map_children, rewrite_stmt

    def f(x: Expr) -> Expr | None:
        if x.op == "load" and x.attr[0].name in env and x.attr[0] is not env[x.attr[0].name] and x.attr[0].scope != "local":
            if x.attr[0].rank != env[x.attr[0].name].rank:
                return None
            _, idx, m, o = load_parts(x)
            return load(env[x.attr[0].name], idx, m, o)
        return None

    def st(x: Stmt) -> Stmt:
        if isinstance(x, Store) and x.buf.name in env and x.buf.rank == env[x.buf.name].rank:
            return replace(x, buf=env[x.buf.name])
        return map_children(x, st)

    return st(rewrite_stmt(s, f))


def push_nest(p: Push, buf: Buffer) -> Stmt:
    """The scatter loops of a Push, serial in axis order (its initialisation is an ordinary nest before it)."""
    dst = replace(buf, scope="param")
    value = p.value
    if p.op != "set":
        old = load(dst, p.index)
        value = old + value if p.op == "add" else old * value if p.op == "mul" else carry_nan(p.op, old, value)
    s: Stmt = Store(dst, p.index, value)
    ok = as_expr(0).eq(0) if p.where is None else p.where
    if not prove(ok):
        s = If(ok, s)
    for a in reversed(p.over):
        s = For(a.var, const(0), a.extent, "serial", s)
    return s
