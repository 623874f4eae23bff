"""spread_subgroups: sums that a subgroup would share, where there are no subgroups: two steps through shared memory.

A loop of kind ``subgroup`` is run by all threads of a group alike and merges partial results into an accumulator that holds the neutral
element before. Before: ``for i in 0..96 subgroup: acc[] = acc[] + p[i]``. After, with 16 threads in the first step::

    for t in 0..16 thread.x: { part[] = acc[]; for j in 0..6: part[] = part[] + p[t + j * 16]; q[t] = part[] }
    barrier shared
    for j in 0..16: acc[] = acc[] + q[j]

A short loop, or one that is no such merge, becomes serial.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import Expr, binary, carry_nan, const, is_const, load, load_parts, rewrite, var
from luthier.ir.loop import (
    Alloc,
    Barrier,
    Buffer,
    For,
    Func,
    If,
    Let,
    Stmt,
    Store,
    block,
    map_children,
    map_exprs,
    stmts_of,
    substitute_stmt,
    walk_stmts,
)

MERGES = frozenset(("add", "mul", "min", "max"))
FEW = 4  # partial results that are not worth a step of their own


def merge_of(s: For) -> tuple[Buffer, str] | None:
    """(accumulator, operator) of a loop whose rounds do nothing but merge a value into a register variable. An operator of ``MERGES``, or
    one with ``nan`` before it (``carry_nan``)."""
    stmts = stmts_of(s.body)
    last = stmts[-1] if stmts else None
    if not isinstance(last, Store) or last.buf.rank or last.mask is not None or not all(isinstance(x, Let) for x in stmts[:-1]):
        return None
    v, old = last.value, load(last.buf, ())
    if v.op == "select" and v.args[2].op in ("min", "max") and v is carry_nan(v.args[2].op, v.args[1], old) and is_const(s.lo, 0):
        return last.buf, "nan" + v.args[2].op
    if v.op not in MERGES or not any(a is old for a in v.args) or not is_const(s.lo, 0):
        return None
    return last.buf, v.op


def merged(op: str, x: Expr, acc: Expr) -> Expr:
    """``acc`` and ``x`` combined by an operator of :func:`merge_of`."""
    return carry_nan(op[3:], x, acc) if op.startswith("nan") else binary(op, acc, x)


def spread_subgroups(f: Func) -> Func:
    loops = [s for s in walk_stmts(f.body) if isinstance(s, For)]
    if not any(s.kind == "subgroup" for s in loops):
        return f
    one_row = {s.kind for s in loops if s.kind.startswith("thread")} == {"thread.x"}
    count = 0

    def st(s: Stmt) -> Stmt:
        nonlocal count
        if isinstance(s, For) and s.kind == "subgroup":
            m = merge_of(s)
            n = s.hi.attr if s.hi.op == "const" else 0
            if m is None or not one_row or n <= FEW:
                return replace(s, kind="serial")
            count += 1
            return _two_steps(s, m[0], m[1], n, count)
        return map_children(s, st)

    return replace(f, body=st(f.body))


def _two_steps(s: For, acc: Buffer, op: str, n: int, number: int) -> Stmt:
    half = 1
    while half * half < n:
        half *= 2
    base = f"{acc.name}.s{number}"
    t, j = var(f"{base}.t", lo=0, hi=half - 1), var(f"{base}.j", lo=0, hi=-(-n // half) - 1)
    part, q = Buffer(f"{base}.part", acc.dtype, (), "local"), Buffer(f"{base}.q", acc.dtype, (const(half),), "shared")
    i = j * half + t

    def own(e: Expr) -> Expr | None:
        return load(part, ()) if e.op == "load" and load_parts(e)[0] == acc else None

    step = map_exprs(substitute_stmt(s.body, {s.var: i}), lambda e: rewrite(e, own))
    step = block(*(replace(x, buf=part) if isinstance(x, Store) else x for x in stmts_of(step)))
    if n % half:
        step = If(i < n, step)
    first = block(Store(part, (), load(acc, ())), For(j, const(0), const(-(-n // half)), "serial", step), Store(q, (t,), load(part, ())))
    k = var(f"{base}.k", lo=0, hi=half - 1)
    last = For(k, const(0), const(half), "serial", Store(acc, (), merged(op, load(q, (k,)), load(acc, ()))))
    return Alloc(q, block(For(t, const(0), const(half), "thread.x", Alloc(part, first)), Barrier("shared"), last))
