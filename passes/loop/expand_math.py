"""expand_math: transcendental operators become range reduction, polynomial and selects (:mod:`luthier.ir.math_rules`), and
intrinsics that no target has become what they state.

Before: ``y[i] = exp(x[i])``. After: adds, multiplies, a shift and a bitcast; no library is called.

Angles that are large take long integer arithmetic. A store of a sine stands twice, so that others do not pay for it: before
``y[i] = sin(x[i])``, after ``if 8192 < abs(x[i]): y[i] = (any angle) else: y[i] = (small angles)``, where a vector has one condition for all lanes.
"""

from __future__ import annotations

from collections.abc import Iterable

from luthier.ir.expr import Expr, rewrite
from luthier.ir.loop import Func, If, Stmt, Store, map_children, map_own_exprs
from luthier.ir.math_rules import expander, large_angles


def expand_math(func: Func, native: Iterable[str] = frozenset()) -> Func:
    """``func`` without transcendental operators, except those in ``native`` that the target has itself."""
    memos: dict[bool, dict[Expr, Expr]] = {False: {}, True: {}}
    rules = {small: expander(native, small) for small in memos}

    def expand(s: Stmt, small: bool = False) -> Stmt:
        return map_own_exprs(s, lambda e: rewrite(e, rules[small], memos[small]))

    def st(s: Stmt) -> Stmt:
        large = large_angles(s.value, native) if isinstance(s, Store) else None
        if large is not None:
            return If(rewrite(large, rules[True], memos[True]), expand(s), expand(s, small=True))
        return expand(map_children(s, st))

    return func.with_body(st(func.body))
