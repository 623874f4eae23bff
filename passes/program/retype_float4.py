"""retype_float4: floats of 4 bits are moved as unsigned integers of 4 bits.

Before: ``y: f4e2m1[n]``, ``y[i] = bitcast(u4(..), f4e2m1)``. After: ``y: u4[n]``, ``y[i] = u4(..)``. Operators encode and decode
(:mod:`luthier.ir.float4`); what is left of the type is its place in memory, so no template or printer knows it.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import Compute, Fold, LetStmt, Pull, Push, buffers_of, map_let
from luthier.ir.dtypes import f4e2m1, u4
from luthier.ir.expr import Expr, bitcast, const, load, load_parts, rewrite
from luthier.ir.loop import Buffer


def retype_float4(c: Compute) -> Compute:
    """The same Compute where no tensor is ``f4e2m1``."""
    mentioned = {b for x in c.lets for b in buffers_of(x)} | set(c.params)
    if all(b.dtype is not f4e2m1 for b in mentioned):
        return c
    memo: dict[Expr, Expr] = {}

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0].dtype is f4e2m1:
            b, idx, mask, other = load_parts(e)
            return load(buffer(b), idx, mask, None if other is None else fix(other) or other)
        if e.op == "const" and e.dtype is f4e2m1:
            return const({0.0: 0, 0.5: 1, 1.0: 2, 1.5: 3, 2.0: 4, 3.0: 5, 4.0: 6, 6.0: 7}[abs(float(e.attr))] | 8 * (float(e.attr) < 0), u4)
        if e.op == "bitcast" and f4e2m1 in (e.dtype, e.args[0].dtype) or e.op == "bitcast" and e.args[0].dtype is e.dtype:
            return e.args[0] if e.args[0].dtype is u4 else bitcast(e.args[0], u4)
        return None

    def let(x: LetStmt) -> LetStmt:
        x = map_let(x, lambda e: rewrite(e, fix, memo))
        if isinstance(x, Fold):
            state = tuple(replace(s, buf=buffer(s.buf)) for s in x.state)
            return replace(x, state=state, step=tuple(_pull(p) for p in x.step), emit=tuple(_pull(p) for p in x.emit))
        return replace(x, buf=buffer(x.buf)) if isinstance(x, Push) else _pull(x)

    return replace(c, params=tuple(buffer(b) for b in c.params), lets=tuple(let(x) for x in c.lets))


def buffer(b: Buffer) -> Buffer:
    return replace(b, dtype=u4) if b.dtype is f4e2m1 else b


def _pull(p: Pull) -> Pull:
    return replace(p, buf=buffer(p.buf))
