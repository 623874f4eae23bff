"""Name the extents of a Compute.

Before: ``o[n < batch, h < ((height + 1) // 2 + 1) // 2] = ...``. After: ``o[n < batch, h < e0] = ...`` with ``e0`` a scalar parameter
for which the caller passes ``((height + 1) // 2 + 1) // 2``. Layers that differ in such expressions only share one kernel, and
schedules, passes and machine code deal with a name instead of a tree. Sums and products stay: ``e0 * 2`` remains twice ``e0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Axis, Compute, Fold, LetStmt, Pull, Push, State, buffers_of, let_exprs
from luthier.ir.expr import Expr, bounds, free_vars, load, load_parts, make_node, rebuild, var, walk
from luthier.ir.loop import Buffer

ATOMIC = frozenset({"floordiv", "mod", "div", "rem", "min", "max", "select"})


def abstract_extents(c: Compute) -> tuple[Compute, dict[Expr, Expr]]:
    """(the Compute over names, {name: the expression that callers pass}); the Compute itself when there is nothing to name."""
    if not any(e.op in ATOMIC for s in _shapes(c) for e in walk(s)):
        return c, {}
    return _Namer(c).result()


def _shapes(c: Compute) -> list[Expr]:
    out = [s for b in c.params for s in b.shape]
    for x in c.lets:
        out += [s for b in buffers_of(x) for s in b.shape]
        out += [a.extent for a in _axes(x)]
    return out


def _axes(x: LetStmt) -> list[Axis]:
    out: list[Axis] = []
    if isinstance(x, Fold):
        out += [*x.axes, x.axis]
        parts: list[Any] = [*x.state, *x.step, *x.emit]
        for part in parts:
            out += part.axes
    else:
        out += x.axes
        if isinstance(x, Push):
            out += x.over
    for e in walk(*let_exprs(x)):
        if e.op == "reduce":
            out += e.attr[1]
    return out


class _Namer:
    def __init__(self, c: Compute) -> None:
        self.c = c
        self.axis_vars: set[Expr] = {a.var for x in c.lets for a in _axes(x)}
        self.names: dict[Expr, Expr] = {}
        self.memo: dict[Expr, Expr] = {}
        self.axes: dict[Axis, Axis] = {}
        self.vars: dict[Expr, Expr] = {}
        taken = {v.attr[0] for v in (*self.axis_vars, *c.dims)}
        self.free = (f"e{k}" for k in range(10_000) if f"e{k}" not in taken)

    def result(self) -> tuple[Compute, dict[Expr, Expr]]:
        c = self.c
        params = tuple(self.buffer(b) for b in c.params)
        lets = tuple(self.let(x) for x in c.lets)
        used: set[Expr] = set()
        out = replace(c, params=params, lets=lets)
        for s in _shapes(out):
            used |= free_vars(s)
        for x in lets:
            for e in let_exprs(x):
                used |= free_vars(e)
                for t in walk(e):
                    if t.op == "load":
                        used |= {v for s in t.attr[0].shape for v in free_vars(s)}
        bound = {a.var for x in lets for a in _axes(x)}
        named = {v: e for e, v in self.names.items() if v in used}
        dims = (*(d for d in c.dims if d in used), *named)
        assert used - bound <= set(dims), used - bound - set(dims)
        return replace(out, dims=dims), named

    def atom(self, e: Expr) -> bool:
        return e.op in ATOMIC and e.dtype.is_index and not free_vars(e) & self.axis_vars and all(t.op != "load" for t in walk(e))

    def go(self, e: Expr) -> Expr:
        hit = self.memo.get(e)
        if hit is not None:
            return hit
        if e.op == "var":
            out = self.vars.get(e, e)
        elif self.atom(e):
            out = self.names.get(e)  # type: ignore[assignment]
            if out is None:
                lo, hi = bounds(e)
                out = self.names[e] = var(next(self.free), lo=lo, hi=hi)
        elif e.op == "load":
            buf, idx, mask, other = load_parts(e)
            out = load(self.buffer(buf), [self.go(i) for i in idx], None if mask is None else self.go(mask), None if other is None else self.go(other))
        elif e.op == "reduce":
            name, axes, n = e.attr
            new = tuple(self.axis(a) for a in axes)
            out = make_node("reduce", e.dtype, tuple(self.go(a) for a in e.args), (name, new, n))
        elif e.args:
            args = tuple(self.go(a) for a in e.args)
            out = e if all(x is y for x, y in zip(args, e.args, strict=True)) else rebuild(e, args)
        else:
            out = e
        self.memo[e] = out
        return out

    def axis(self, a: Axis) -> Axis:
        new = self.axes.get(a)
        if new is None:
            extent = self.go(a.extent)
            v = a.var if extent is a.extent else var(a.name, lo=0, hi=extent - 1)
            new = self.axes[a] = Axis(v, extent)
            self.vars[a.var] = v
        return new

    def all_axes(self, axes: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(self.axis(a) for a in axes)

    def buffer(self, b: Buffer) -> Buffer:
        return replace(b, shape=tuple(self.go(s) for s in b.shape))

    def pull(self, p: Pull) -> Pull:
        axes = self.all_axes(p.axes)
        return Pull(self.buffer(p.buf), axes, self.go(p.expr))

    def let(self, x: LetStmt) -> LetStmt:
        for a in _axes(x):
            self.axis(a)  # before any expression that mentions its variable
        if isinstance(x, Pull):
            return self.pull(x)
        if isinstance(x, Push):
            where = None if x.where is None else self.go(x.where)
            return Push(
                self.buffer(x.buf), self.all_axes(x.axes), self.go(x.init), self.all_axes(x.over), tuple(self.go(i) for i in x.index), self.go(x.value), x.op, where,
            )  # fmt: skip
        state = tuple(State(self.buffer(s.buf), self.all_axes(s.axes), self.go(s.init), self.go(s.next)) for s in x.state)
        return replace(
            x, axis=self.axis(x.axis), axes=self.all_axes(x.axes), state=state, step=tuple(self.pull(p) for p in x.step), emit=tuple(self.pull(p) for p in x.emit),
        )  # fmt: skip
