"""A running sum (CumSum, CumProd) in blocks, for machines that want more threads than it has rows.

Before: ``fold t < L: acc = acc + x[r, t]; y[r, t] = acc``. After, with ``L = blocks * size``: ``p[r, g] = sum[j < size](x[r, g * size + j])``;
``fold g: s[r, g] = before; before = before + p[r, g]``; ``fold j < size: acc = acc + x[r, g * size + j]; e[r, g, j] = acc`` which starts at
``s[r, g]`` and runs for every ``r, g`` at once; ``y[r, t] = e[r, t // size, t % size]``. The longest chain has ``blocks + 2 * size`` steps in
place of ``L``. Floats are summed in another order than before, which is why this is for targets where it pays alone.
"""

from __future__ import annotations

import math
from dataclasses import replace

from luthier.ir.compute import Axis, Compute, Fold, LetStmt, Pull, State, axis, let_exprs, reduce_
from luthier.ir.expr import Expr, const, load, loads, minimum, rewrite, substitute
from luthier.ir.loop import Buffer

MONOID = {"add": "sum", "mul": "prod"}
LONG = 1024  # steps from which on a scan is cut
MANY = 4096  # rows from which on it is not, as each has a thread
ENDLESS = 1 << 15  # steps from which on it is cut in any case
BLOCK = 256  # steps of a block where their number is known to the run only


def split_scan(c: Compute) -> Compute:
    """The Compute with every Fold cut that does nothing but combine one number after the other into a state of its own."""
    lets: list[LetStmt] = []
    for x in c.lets:
        others = [y for y in c.lets if y is not x]
        lets += _cut(x) if isinstance(x, Fold) and _scan(x, c, others) else [x]
    return c if len(lets) == len(c.lets) else replace(c, lets=tuple(lets))


def _scan(f: Fold, c: Compute, others: list[LetStmt]) -> bool:
    if len(f.state) != 1 or f.step or len(f.emit) != 1 or f.state[0].next.op not in MONOID or f.state[0].axes != f.axes:
        return False
    acc, new = f.state[0].buf.name, f.state[0].next
    if not _is(new.args[0], acc) or any(ld.attr[0].name == acc for ld in loads(new.args[1])) or f.state[0].init.op != "const":
        return False
    if acc in c.outs or any(ld.attr[0].name == acc for y in others for ld in loads(*let_exprs(y))):
        return False
    n, rows = f.axis.extent, 1
    for a in f.axes:
        rows = rows * a.extent.attr if a.extent.op == "const" else MANY
    return n.op != "const" or n.attr >= (LONG if rows < MANY else ENDLESS)


def _is(e: Expr, name: str) -> bool:
    return e.op == "load" and e.attr[0].name == name


def _cut(f: Fold) -> list[LetStmt]:
    state, emit = f.state[0], f.emit[0]
    n, start, op = f.axis.extent, state.init, state.next.op
    size = const(BLOCK if n.op != "const" else -(-math.isqrt(n.attr) // 16) * 16)
    blocks = (n + (size - 1)) // size

    def tensor(suffix: str, axes: tuple[Axis, ...], like: Buffer = state.buf) -> Buffer:
        return Buffer(f"{emit.buf.name}.{suffix}", like.dtype, tuple(a.extent for a in axes), "global")

    def fresh(suffix: str) -> tuple[tuple[Axis, ...], Axis, Axis]:
        return tuple(axis(f"{a.name}{suffix}", a.extent) for a in f.axes), axis(f"g{suffix}", blocks), axis(f"j{suffix}", size)

    def at(e: Expr, rows: tuple[Axis, ...], step: Expr) -> Expr:
        """``e`` of one step: of a point of the rows, at a number counted from where the scan starts; the last one for what is behind."""
        k = minimum(step, n - 1)
        return substitute(e, {**{a.var: r.var for a, r in zip(f.axes, rows, strict=True)}, f.axis.var: n - 1 - k if f.reverse else k})

    rows, g, j = fresh("'")
    step = g.var * size + j.var
    parts = tensor("part", (*rows, g))
    part = Pull(parts, (*rows, g), reduce_(MONOID[op], [j], at(state.next.args[1], rows, step), where=step < n))

    rows, g, _ = fresh('"')
    so_far, starts = tensor("before", rows), tensor("start", (*rows, g))
    before = load(so_far, [r.var for r in rows])
    after = rewrite(state.next, lambda e: before if _is(e, state.buf.name) else load(parts, [*(r.var for r in rows), g.var]) if e is state.next.args[1] else None)
    middle = Fold(f"{f.name}.blocks", g, (State(so_far, rows, start, after),), (), (Pull(starts, (*rows, g), before),), False, rows)

    rows, g, j = fresh("^")
    step = g.var * size + j.var
    acc, out = tensor("run", (*rows, g)), tensor("blocks", (*rows, g, j), emit.buf)
    here = load(acc, [*(r.var for r in rows), g.var])

    def inside(e: Expr) -> Expr:
        return rewrite(at(e, rows, step), lambda x: here if _is(x, state.buf.name) else None)

    run = State(acc, (*rows, g), load(starts, [*(r.var for r in rows), g.var]), inside(state.next))
    last = Fold(f"{f.name}.steps", j, (run,), (), (Pull(out, (*rows, g, j), inside(emit.expr)),), False, (*rows, g))

    walked = n - 1 - f.axis.var if f.reverse else f.axis.var
    return [part, middle, last, Pull(emit.buf, emit.axes, load(out, [*(a.var for a in f.axes), walked // size, walked % size]))]
