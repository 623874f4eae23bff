"""expand_math: transcendental operators become range reduction, polynomial and selects (:mod:`luthier.ir.math_rules`), and
intrinsics that no target has become what they state.

Before: ``y[i] = exp(x[i])``. After: adds, multiplies, a shift and a bitcast; no library is called.
"""

from __future__ import annotations

from collections.abc import Iterable

from luthier.ir.loop import Func, rewrite_stmt
from luthier.ir.math_rules import expander


def expand_math(func: Func, native: Iterable[str] = frozenset()) -> Func:
    """``func`` without transcendental operators, except those in ``native`` that the target has itself."""
    return func.with_body(rewrite_stmt(func.body, expander(native)))
