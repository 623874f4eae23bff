"""round_by_operator: rounding by adding a large constant becomes the ``round`` operator.

The rules for exp and its like round to an integer by adding ``M = 1.5 * 2^23 + k``: one addition, and the integer stands in the low
bits. A target that may reassociate float arithmetic (WGSL) turns ``(x + M) - M`` into ``x``.

Before: ``t = x + M``, ``t - M``, ``bitcast.i32(t)``. After: ``round(x)``, ``i32(round(x)) + bits(M)``; both are equal to the original
bit for bit while ``|x| < 2^21``. Runs on whole expressions, before ``place_lets`` gives parts of them names.
"""

from __future__ import annotations

import numpy as np

from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, cast, const, is_const, unary
from luthier.ir.loop import Func, rewrite_stmt

_LOW, _HIGH = 1.25 * 2.0**23, 1.75 * 2.0**23


def _magic(e: Expr) -> tuple[Expr, Expr] | None:
    """(x, M) of ``x + M``."""
    if e.op == "add" and e.dtype.scalar is f32:
        c = e.args[1]
        if is_const(c):
            v = c.attr if c.op == "const" else c.args[0].attr
            if _LOW <= v <= _HIGH and v == int(v):
                return e.args[0], c
    return None


def _fix(e: Expr) -> Expr | None:
    if e.op == "sub":
        m = _magic(e.args[0])
        if m is not None and m[1] is e.args[1]:
            return unary("round", m[0])
    if e.op == "bitcast" and e.dtype.is_int:
        m = _magic(e.args[0])
        if m is not None:
            c = m[1] if m[1].op == "const" else m[1].args[0]
            bits = int(np.float32(c.attr).view(np.int32))
            return cast(unary("round", m[0]), e.dtype.scalar) + const(bits, e.dtype)
    return None


def round_by_operator(f: Func) -> Func:
    return f.with_body(rewrite_stmt(f.body, _fix))


