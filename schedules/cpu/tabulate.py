"""Tables along the innermost axis of an elementwise tensor.

Before ``o[r, j] = x[r, max(min(cast(floor(f(j))), n - 1), 0)] * g(j)``, after::

    o.tab0[j] = i32(max(min(cast(floor(f(j))), n - 1), 0));  o.tab1[j] = g(j)
    o[r, j] = x[r, o.tab0[j]] * o.tab1[j]

What depends on the innermost axis alone and costs more than a load is computed once and not for every row: positions and weights of
resized, reflected or otherwise mapped rows.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import Axis, Pull
from luthier.ir.dtypes import f32, i32, index
from luthier.ir.expr import Expr, bounds, cast, free_vars, load, loads, rebuild, substitute, var, walk
from luthier.ir.loop import Buffer
from luthier.schedules.base.schedule import Schedule, Stage, pull_stage

COSTLY = frozenset({"floordiv", "mod", "floor", "ceil", "round", "trunc", "div", "rem", "min", "max", "select", "cast", "abs", "exp", "sin", "cos", "sqrt", "pow"})
WORTH = 6  # nodes of an expression
ROWS = 8  # rows that pay for a table


def tabulate(s: Schedule, name: str) -> Schedule:
    """The schedule with tables before the tensor ``name``, whose loops are still those of its axes."""
    st = s.stages[name]
    if len(st.axes) < 2 or st.reduction is not None or st.push is not None or st.fold is not None or not _many(st):
        return s
    axis = st.axes[-1]
    others = {a.var for a in st.axes[:-1]}
    tables: dict[Expr, Pull] = {}
    memo: dict[Expr, Expr] = {}

    def table(e: Expr) -> Expr:
        if e not in tables:
            v = var(f"{axis.name}.{len(tables)}", lo=0, hi=axis.extent - 1)
            kind = i32 if e.dtype is index else e.dtype
            value = substitute(e, {axis.var: v})
            tables[e] = Pull(Buffer(f"{name}.tab{len(tables)}", kind, (axis.extent,), "global"), (Axis(v, axis.extent),), cast(value, kind) if kind is not e.dtype else value)
        found = load(tables[e].buf, (axis.var,))
        return cast(found, index) if e.dtype is index else found

    def go(e: Expr) -> Expr:
        if e not in memo:
            if axis.var not in free_vars(e) or not e.args:
                memo[e] = e
            elif not free_vars(e) & others and _worth(e):
                memo[e] = table(e)
            else:
                args = tuple(go(a) for a in e.args)
                memo[e] = e if args == e.args else rebuild(e, args)
        return memo[e]

    new = go(st.expr)
    if not tables:
        return s
    ext = {k: v for k, v in s.ext.items() if k.attr[0].rsplit(".", 1)[0] != name}
    stages: dict[str, Stage] = {}
    for n, x in s.stages.items():
        if n == name:
            stages |= {t.name: pull_stage(t, ext) for t in tables.values()}
            x = replace(pull_stage(Pull(st.buf, st.axes, new), ext), scope=st.scope)
        stages[n] = x
    return replace(s, stages=stages, ext=ext, trace=(*s.trace, ("tabulate", name, len(tables))))


def _many(st: Stage) -> bool:
    rows = 1
    for a in st.axes[:-1]:
        rows *= a.extent.attr if a.extent.op == "const" else ROWS
    return rows >= ROWS


def _worth(e: Expr) -> bool:
    """An index or a number that costs more than a load, and fits the table's type."""
    if e.dtype not in (index, f32) or loads(e):
        return False
    low, high = bounds(e) if e.dtype is index else (0, 0)
    if low is None or e.dtype is index and (low < -(1 << 31) or high is not None and high >= 1 << 31):
        return False
    nodes = list(walk(e))
    return len(nodes) >= WORTH and any(x.op in COSTLY for x in nodes)
