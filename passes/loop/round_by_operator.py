"""round_by_operator: rounding by adding a large constant becomes the ``round`` operator.

The rules for exp and its like round to an integer by adding ``M = 1.5 * 2^23 + k``: one addition, and the integer stands in the low
bits. A target that may reassociate float arithmetic (WGSL) turns ``(x + M) - M`` into ``x``.

Before: ``let t = x + M``, ``t - M``, ``bitcast.i32(t)``. After: ``let r = round(x)``, ``r``, ``i32(r) + bits(M)``; both are equal to
the original bit for bit while ``|x| < 2^21``.
"""

from __future__ import annotations

import numpy as np

from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, binary, cast, const, is_const, rewrite, unary, var
from luthier.ir.loop import Func, Let, Stmt, map_children, map_exprs, walk_stmts

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


def round_by_operator(f: Func) -> Func:
    named: dict[Expr, tuple[Expr, Expr]] = {}  # t of ``let t = x + M``: (its rounded variable, M)
    for s in walk_stmts(f.body):
        if isinstance(s, Let):
            m = _magic(s.value)
            if m is not None:
                named[s.var] = (var(f"{s.var.attr[0]}.round", s.var.dtype, None), m[1])
    rounded = {v for v, _ in named.values()}

    def whole(x: Expr) -> Expr:
        return x if x in rounded else unary("round", x)

    def fix(e: Expr) -> Expr | None:
        if e in named:
            v, c = named[e]
            return binary("add", v, c)
        m = _magic(e.args[0]) if e.op in ("sub", "bitcast") else None
        if m is None:
            return None
        if e.op == "sub":
            return whole(m[0]) if m[1] is e.args[1] else None
        if not e.dtype.is_int:
            return None
        c = m[1] if m[1].op == "const" else m[1].args[0]
        bits = int(np.float32(c.attr).view(np.int32))
        return cast(whole(m[0]), e.dtype.scalar) + const(bits, e.dtype)

    memo: dict[Expr, Expr] = {}

    def ex(e: Expr) -> Expr:
        return rewrite(e, fix, memo)

    def st(s: Stmt) -> Stmt:
        if isinstance(s, Let) and s.var in named:
            m = _magic(s.value)
            assert m is not None
            return Let(named[s.var][0], unary("round", m[0]))
        return map_children(s, st)

    return f.with_body(map_exprs(st(f.body), ex))
