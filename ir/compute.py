"""Compute: the mathematics of an operator or of a fused group, without an order of execution.

::

    Compute = params, dims, lets, outs
    Let     = Pull(name, axes, expr)                              # t[i, j] = e
            | Push(name, axes, init, over, index, value, op)      # t = init; for over in order: t[index] op= value
            | Fold(name, axis, state, step, next, emit)           # a loop-carried state

A ``Pull`` whose expression contains a ``reduce`` is normalised so that the ``reduce`` is the whole expression of a Pull of
its own (``normalize``). Axes start at 0 and are ``Axis(var, extent)``. Tensors are :class:`~luthier.ir.loop.Buffer`; a Let's
own buffer has scope ``global`` until a schedule stages it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from luthier.ir.dtypes import DType
from luthier.ir.expr import (
    Expr,
    as_expr,
    carry_nan,
    cast,
    const,
    lnot,
    load,
    make_node,
    maximum,
    minimum,
    proj,
    select,
    substitute,
    unary,
    var,
    walk,
)
from luthier.ir.loop import Buffer


@dataclass(frozen=True, slots=True)
class Axis:
    """An iteration 0 <= var < extent."""

    var: Expr
    extent: Expr

    @property
    def name(self) -> str:
        return self.var.attr[0]  # type: ignore[no-any-return]


def axis(name: str, extent: Any) -> Axis:
    """A fresh axis; the variable records its bounds so that index arithmetic can use them."""
    e = as_expr(extent)
    return Axis(var(name, lo=0, hi=e - 1), e)


@dataclass(frozen=True, slots=True)
class Monoid:
    """An associative combination. ``init(dtypes)``: start values; ``combine(a, b)``: tuples of Exprs to a tuple."""

    name: str
    init: Callable[[tuple[DType, ...]], tuple[Expr, ...]]
    combine: Callable[[tuple[Expr, ...], tuple[Expr, ...]], tuple[Expr, ...]]
    vector: str | None = None  # the lane-wise operator of vreduce where there is one


def _lowest(d: DType) -> Expr:
    return const(d.limits()[0], d)


def _highest(d: DType) -> Expr:
    return const(d.limits()[1], d)


def _arg(better: Callable[[Expr, Expr], Expr], last: bool = False) -> Callable[[tuple[Expr, ...], tuple[Expr, ...]], tuple[Expr, ...]]:
    def combine(a: tuple[Expr, ...], b: tuple[Expr, ...]) -> tuple[Expr, ...]:
        u = DType("u", b[1].dtype.bits)  # no position yet is -1, which is behind all others as an unsigned number
        tie = (cast(b[1], u) < cast(a[1], u)) if not last else (a[1] < b[1])
        take = better(b[0], a[0]) | (b[0].eq(a[0]) & tie)
        if b[0].dtype.is_float:  # NaN beats every number, and its like by position
            lost, held = unary("isnan", b[0]), unary("isnan", a[0])
            take = select(lost, lnot(held) | tie, take)
        return select(take, b[0], a[0]), select(take, b[1], a[1])

    return combine


def _one(f: Callable[[Expr, Expr], Expr]) -> Callable[[tuple[Expr, ...], tuple[Expr, ...]], tuple[Expr, ...]]:
    return lambda a, b: (f(a[0], b[0]),)


MONOIDS: dict[str, Monoid] = {
    "sum": Monoid("sum", lambda d: (const(0, d[0]),), _one(lambda a, b: a + b), "add"),
    "prod": Monoid("prod", lambda d: (const(1, d[0]),), _one(lambda a, b: a * b), "mul"),
    "max": Monoid("max", lambda d: (_lowest(d[0]),), _one(maximum), "max"),
    "min": Monoid("min", lambda d: (_highest(d[0]),), _one(minimum), "min"),
    "nanmax": Monoid("nanmax", lambda d: (_lowest(d[0]),), _one(lambda a, b: carry_nan("max", b, a)), "max"),
    "nanmin": Monoid("nanmin", lambda d: (_highest(d[0]),), _one(lambda a, b: carry_nan("min", b, a)), "min"),
    "any": Monoid("any", lambda d: (const(False, d[0]),), _one(lambda a, b: a | b), "or"),
    "all": Monoid("all", lambda d: (const(True, d[0]),), _one(lambda a, b: a & b), "and"),
    "argmax": Monoid("argmax", lambda d: (_lowest(d[0]), const(-1, d[1])), _arg(lambda a, b: b < a)),
    "argmin": Monoid("argmin", lambda d: (_highest(d[0]), const(-1, d[1])), _arg(lambda a, b: a < b)),
    "argmax_last": Monoid("argmax_last", lambda d: (_lowest(d[0]), const(-1, d[1])), _arg(lambda a, b: b < a, last=True)),
    "argmin_last": Monoid("argmin_last", lambda d: (_highest(d[0]), const(-1, d[1])), _arg(lambda a, b: a < b, last=True)),
}


# ``max`` and ``min`` may lose a NaN (one instruction; where what follows is NaN anyway, as in a softmax). ``nanmax`` and ``nanmin`` are NaN
# when an element is; ``argmax`` and ``argmin`` find the first NaN (``_last``: the last one) when there is one, as numpy and torch do.


def carried(monoid: str, d: DType) -> str:
    """``max`` or ``min`` of elements that may be NaN, which is kept."""
    return "nan" + monoid if d.is_float else monoid


def reduce_(monoid: str, axes: Iterable[Axis], *values: Expr, where: Expr | None = None) -> Expr:
    """A reduction. One value: the Expr itself; a tuple monoid (argmax): use :func:`proj` 0, 1, ... on it."""
    ax = tuple(axes)
    args = values if where is None else (*values, where)
    return make_node("reduce", values[0].dtype, args, (monoid, ax, len(values)))


def sum_(axes: Axis | Iterable[Axis], value: Expr, acc: DType | None = None) -> Expr:
    """Sum over ``axes``, accumulated in ``acc`` (default: the value's type)."""
    v = value if acc is None else cast(value, acc)
    return reduce_("sum", (axes,) if isinstance(axes, Axis) else axes, v)


def max_(axes: Axis | Iterable[Axis], value: Expr) -> Expr:
    return reduce_("max", (axes,) if isinstance(axes, Axis) else axes, value)


def min_(axes: Axis | Iterable[Axis], value: Expr) -> Expr:
    return reduce_("min", (axes,) if isinstance(axes, Axis) else axes, value)


@dataclass(frozen=True, slots=True)
class Pull:
    """``buf[axes] = expr`` for every point. A tuple reduction gives one Pull per component, each a ``proj``."""

    buf: Buffer
    axes: tuple[Axis, ...]
    expr: Expr

    @property
    def name(self) -> str:
        return self.buf.name


@dataclass(frozen=True, slots=True)
class Push:
    """``buf[axes] = init``; then for each point of ``over`` in lexicographic order ``buf[index] op= value``.

    ``op``: set, add, mul, max, min (NaN when either is). A point whose ``where`` is false is skipped."""

    buf: Buffer
    axes: tuple[Axis, ...]
    init: Expr
    over: tuple[Axis, ...]
    index: tuple[Expr, ...]
    value: Expr
    op: str = "set"
    where: Expr | None = None

    @property
    def name(self) -> str:
        return self.buf.name


@dataclass(frozen=True, slots=True)
class State:
    """One piece of loop-carried state: ``buf[axes]`` starts at ``init`` and becomes ``next`` after every step."""

    buf: Buffer
    axes: tuple[Axis, ...]
    init: Expr
    next: Expr


@dataclass(frozen=True, slots=True)
class Fold:
    """``for axis: step; emit; state = next``. ``step``: Pulls recomputed each round (they may read state and the axis).

    ``emit``: tensors with one slice per round: a Pull whose buffer has ``axis`` among its axes (``Pull.axes`` lists all axes of
    the buffer, ``axis`` included, in the buffer's order). The final states
    are readable after the Fold under their own names. ``reverse`` walks the axis from its end. ``axes``: shared axes; the fold
    runs independently for every point of them (batch, heads, rows), and states, steps and emits that have one carry that very axis."""

    name: str
    axis: Axis
    state: tuple[State, ...]
    step: tuple[Pull, ...] = ()
    emit: tuple[Pull, ...] = ()
    reverse: bool = False
    axes: tuple[Axis, ...] = ()


LetStmt = Pull | Push | Fold


@dataclass(frozen=True, slots=True)
class Compute:
    """``params``: input tensors (scope param). ``dims``: scalar parameters (symbolic dimensions and run-time scalars)."""

    name: str
    params: tuple[Buffer, ...]
    dims: tuple[Expr, ...]
    lets: tuple[LetStmt, ...]
    outs: tuple[str, ...]

    def let(self, name: str) -> LetStmt:
        for x in self.lets:
            if name in defined(x):
                return x
        raise KeyError(name)


def defined(x: LetStmt) -> tuple[str, ...]:
    """Names of the tensors that a let defines for later lets."""
    if isinstance(x, Fold):
        return tuple(s.buf.name for s in x.state) + tuple(e.buf.name for e in x.emit)
    return (x.buf.name,)


def buffers_of(x: LetStmt) -> tuple[Buffer, ...]:
    if isinstance(x, Fold):
        return tuple(s.buf for s in x.state) + tuple(e.buf for e in x.emit)
    return (x.buf,)


def pull(name: str, axes: Iterable[Axis], expr: Expr) -> Pull:
    """``name[axes] = expr`` as a tensor of the expression's type."""
    ax = tuple(axes)
    return Pull(Buffer(name, expr.dtype, tuple(a.extent for a in ax), "global"), ax, expr)


def map_let(x: LetStmt, fn: Callable[[Expr], Expr]) -> LetStmt:
    """Every expression of a let through ``fn``."""
    if isinstance(x, Pull):
        return Pull(x.buf, x.axes, fn(x.expr))
    if isinstance(x, Push):
        return Push(x.buf, x.axes, fn(x.init), x.over, tuple(fn(i) for i in x.index), fn(x.value), x.op, None if x.where is None else fn(x.where))
    return Fold(
        x.name, x.axis, tuple(State(s.buf, s.axes, fn(s.init), fn(s.next)) for s in x.state),
        tuple(Pull(p.buf, p.axes, fn(p.expr)) for p in x.step), tuple(Pull(p.buf, p.axes, fn(p.expr)) for p in x.emit), x.reverse, x.axes,
    )


def let_exprs(x: LetStmt) -> tuple[Expr, ...]:
    if isinstance(x, Pull):
        return (x.expr,)
    if isinstance(x, Push):
        return (x.init, *x.index, x.value) + (() if x.where is None else (x.where,))
    out: list[Expr] = []
    for p in x.step:
        out.append(p.expr)
    for s in x.state:
        out += [s.init, s.next]
    return tuple(out + [e.expr for e in x.emit])


def _normal_pull(p: Pull, fresh: Callable[[str], str], keep: frozenset[Expr] = frozenset()) -> list[Pull]:
    """Before: ``t[i] = reduce(..) * 2``. After: ``t.acc[i] = reduce(..); t[i] = t.acc[i] * 2`` (inner reductions first).

    ``keep``: axis variables with a meaning outside the pull (the shared axes of a Fold), which are not renamed."""
    out: list[Pull] = []
    env: dict[Expr, Expr] = {}
    top = p.expr
    whole = top if top.op == "reduce" else top.args[0] if top.op == "proj" and top.args[0].op == "reduce" else None
    for e in walk(p.expr):
        target = e
        if e.op == "proj":
            base: Expr | None = e.args[0]
        elif e.op == "reduce" and e.attr[2] == 1:
            base = e
        else:
            continue
        if base is whole and target is top:
            break
        bound = [a for a in _enclosing(p, target) if a.var in _fv(target)]
        axes = (*p.axes, *bound)
        rename = {a.var: a.var if a.var in keep else var(a.name + "'", lo=0, hi=a.extent - 1) for a in axes}
        new_axes = tuple(Axis(rename[a.var], a.extent) for a in axes)
        q = pull(fresh(p.name + ".acc"), new_axes, substitute(substitute(target, env), rename))
        out.append(q)
        env[target] = load(q.buf, [a.var for a in axes])
    if not out:
        return [p]
    return [*out, Pull(p.buf, p.axes, substitute(p.expr, env))]


def _fv(e: Expr) -> frozenset[Expr]:
    from luthier.ir.expr import free_vars

    return free_vars(e)


def _enclosing(p: Pull, target: Expr) -> list[Axis]:
    """Reduction axes of ``p.expr`` whose reduce contains ``target`` properly."""
    out: list[Axis] = []
    for r in walk(p.expr):
        if r.op == "reduce" and r is not target and not (target.op == "proj" and target.args[0] is r) and target in set(walk(*r.args)):
            out += [a for a in r.attr[1] if a not in out]
    return out


def normalize(c: Compute) -> Compute:
    """Every ``reduce`` becomes the whole expression of a Pull of its own (also inside a Fold's step)."""
    used = {b.name for b in c.params} | {n for x in c.lets for n in defined(x)}

    def fresh(base: str) -> str:
        n, k = base, 1
        while n in used:
            n, k = f"{base}{k}", k + 1
        used.add(n)
        return n

    lets: list[LetStmt] = []
    for x in c.lets:
        if isinstance(x, Pull):
            lets += _normal_pull(x, fresh)
        elif isinstance(x, Fold):
            shared = frozenset(a.var for a in x.axes)
            step: list[Pull] = []
            for p in x.step:
                step += _normal_pull(p, fresh, shared)
            state, emit = [], []
            for s in x.state:
                *pre, last = _normal_pull(Pull(s.buf, s.axes, s.next), fresh, shared)
                if last.expr.op == "reduce":
                    q = pull(fresh(s.buf.name + ".acc"), last.axes, last.expr)
                    pre, last = [*pre, q], Pull(s.buf, s.axes, load(q.buf, [a.var for a in s.axes]))
                step += pre
                state.append(State(s.buf, s.axes, s.init, last.expr))
            for e in x.emit:
                *pre, last = _normal_pull(e, fresh, shared)
                step += pre
                emit.append(last)
            lets.append(Fold(x.name, x.axis, tuple(state), tuple(step), tuple(emit), x.reverse, x.axes))
        else:
            lets.append(x)
    return replace(c, lets=tuple(lets))


__all__ = [
    "Axis", "axis", "Monoid", "MONOIDS", "carried", "reduce_", "sum_", "max_", "min_", "Pull", "Push", "State", "Fold", "Compute", "LetStmt",
    "defined", "buffers_of", "pull", "map_let", "let_exprs", "normalize", "proj",
]
