"""specialize: a kernel in two versions, one of which knows more about a run-time dimension.

Before::                                After ``specialize(s, (N % 16).eq(0))``::

    for i in 0..(N + 15) // 16 parallel:    for i in 0..(N + 15) // 16 parallel:
      y[ramp(i * 16, 1, 16)] = .. if m        if N % 16 == 0:
                                                let N.by16 = N // 16
                                                let i~1 = i
                                                y[ramp(i~1 * 16, 1, 16)] = ..
                                              else:
                                                y[ramp(i * 16, 1, 16)] = .. if m

The condition becomes a fact by substitution: ``N % c == 0`` makes N the product of c and a new variable, ``N >= c`` a variable
with that lower bound, ``N == c`` a number. Masks, tails and clamps that the fact makes unnecessary vanish as they are built, since
index arithmetic decides them; no pass looks for them afterwards. The choice stands inside the outermost parallel loop, so that
threads share the kernel as before.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import Axis
from luthier.ir.expr import Expr, as_expr, floordiv, free_vars, land, substitute, var
from luthier.ir.loop import Alloc, Block, For, If, Let, Stmt, block
from luthier.schedules.base.schedule import Schedule, ScheduleError, Stage


def specialize(s: Schedule, condition: Expr) -> Schedule:
    """The kernels of ``s`` in two versions, under ``condition`` and without it. May be applied several times: the special version is
    for all conditions together.

    ``condition``: ``(N % c).eq(0)``, ``N >= c`` or ``N.eq(c)`` for a dim N of the Compute and a number c. Raises ScheduleError for another
    form, and where a stage is a fold or a push."""
    _fact(condition, s)
    if any(st.fold is not None or st.push is not None for st in s.stages.values()):
        raise ScheduleError("specialize knows pure tensors only, the schedule has a fold or a push")
    if any(_fact(c, s)[0] is _fact(condition, s)[0] for c in s.special):
        raise ScheduleError(f"the schedule is specialized on {_fact(condition, s)[0]!r} already")
    return replace(s, special=(*s.special, condition), trace=(*s.trace, ("specialize", repr(condition))))


def _fact(c: Expr, s: Schedule) -> tuple[Expr, Expr, Expr | None]:
    """(dim, what it is under the condition, the value of the new variable in it)."""
    dims = set(s.compute.dims)
    a = c.args
    if c.op == "eq" and len(a) == 2:
        for x, y in (a, a[::-1]):
            if y.op == "const" and x in dims:
                return x, y, None
            if y.op == "const" and y.attr == 0 and x.op == "mod" and x.args[0] in dims and x.args[1].op == "const":
                n, k = x.args[0], int(x.args[1].attr)
                low = n.attr[1]
                v = var(f"{n.attr[0]}.by{k}", lo=None if low is None else -(-low // k), hi=n.attr[2] // k if isinstance(n.attr[2], int) else None)
                return n, v * k, floordiv(n, as_expr(k))
    if c.op in ("le", "lt") and a[0].op == "const" and a[1] in dims:
        n, k = a[1], int(a[0].attr) + (c.op == "lt")
        v = var(f"{n.attr[0]}.from{k}", lo=k, hi=n.attr[2])
        return n, v, n
    raise ScheduleError(f"cannot specialize on {c!r}: the condition must be (N % c).eq(0), N >= c or N.eq(c) for a dim of the Compute")


def special_version(s: Schedule) -> tuple[Schedule, list[Stmt]]:
    """The schedule under its conditions, and the definitions that its kernels start with."""
    env: dict[Expr, Expr] = {}
    lets: list[Stmt] = []
    for c in s.special:
        n, e, value = _fact(c, s)
        env[n] = e
        if value is not None:
            (v,) = free_vars(e)
            lets.append(Let(v, value))
    memo: dict[Expr, Expr] = {}

    def sub(e: Expr) -> Expr:
        return substitute(e, env, memo)

    def known(st: Stage) -> Stage:
        return replace(st, axes=tuple(Axis(a.var, sub(a.extent)) for a in st.axes), expr=sub(st.expr), guards=tuple((sub(e), sub(b)) for e, b in st.guards))

    stages = {k: known(st) for k, st in s.stages.items()}
    return replace(s, stages=stages, ext={k: sub(e) for k, e in s.ext.items()}, special=()), lets


def choose(general: Stmt, special: Stmt, s: Schedule, lets: list[Stmt]) -> Stmt:
    """``special`` where the conditions hold, else ``general``: inside the parallel loop that both start with, else around both."""
    cond = land(*s.special)
    g, pre = _parallel(general)
    t, t_pre = _parallel(special)
    if g is not None and t is not None and not pre and not t_pre:
        return For(g.var, g.lo, g.hi, g.kind, If(cond, block(*lets, Let(t.var, g.var), t.body), g.body))
    return If(cond, block(*lets, special), general)


def _parallel(s: Stmt) -> tuple[For | None, list[Stmt]]:
    """The parallel loop that is the whole statement, below Allocs and Lets (returned) only."""
    pre: list[Stmt] = []
    while True:
        if isinstance(s, For):
            return (s if s.kind == "parallel" else None), pre
        if isinstance(s, Alloc):
            pre.append(s)
            s = s.body
        elif isinstance(s, Block) and s.stmts and all(isinstance(x, Let) for x in s.stmts[:-1]):
            pre += s.stmts[:-1]
            s = s.stmts[-1]
        else:
            return None, pre
