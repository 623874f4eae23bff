"""widen_subbyte: results of less than 8 bits are computed one to a byte; a second kernel packs them.

Before: ``y: i4[n]``, ``y[i] = i4(..)``. After: ``y: i8[n]``, ``y[i] = i8(i4(..))``, and :func:`packing` makes the bytes ``(y[2 i] & 15) |
(y[2 i + 1] & 15) << 4``. So no two threads or lanes ever own parts of one byte, whatever the extents are.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import Compute, Fold, LetStmt, Pull, Push, axis, map_let, pull
from luthier.ir.dtypes import DType, i8, u8
from luthier.ir.expr import Expr, as_expr, binary, cast, load, load_parts, rewrite, var
from luthier.ir.loop import Buffer
from luthier.passes.loop.lower_subbyte import is_subbyte


def carrier(d: DType) -> DType:
    """The byte that holds a value of ``d``."""
    return i8 if d.kind == "i" else u8


def widen_subbyte(c: Compute) -> tuple[Compute, dict[str, DType]]:
    """The Compute with whole bytes for its narrow outputs, and {output: its own type} of those."""
    outs = {b.name: b for x in c.lets if isinstance(x, (Pull, Push)) for b in [x.buf] if b.name in c.outs and is_subbyte(b.dtype)}
    if not outs:
        return c, {}
    memo: dict[Expr, Expr] = {}

    def fix(e: Expr) -> Expr | None:
        if e.op != "load" or e.attr[0].name not in outs:
            return None
        b, idx, mask, other = load_parts(e)
        d = carrier(b.dtype)
        return cast(load(replace(b, dtype=d), idx, mask, None if other is None else cast(other, d)), b.dtype)

    def let(x: LetStmt) -> LetStmt:
        x = map_let(x, lambda e: rewrite(e, fix, memo))
        if isinstance(x, Fold) or x.name not in outs:
            return x
        d = carrier(x.buf.dtype)
        if isinstance(x, Pull):
            return replace(x, buf=replace(x.buf, dtype=d), expr=cast(x.expr, d))
        return replace(x, buf=replace(x.buf, dtype=d), init=cast(x.init, d), value=cast(x.value, d))

    return replace(c, lets=tuple(let(x) for x in c.lets)), {n: b.dtype for n, b in outs.items()}


def packing(bits: int) -> Compute:
    """``o0[i]``: the bytes of ``n`` elements ``p0``, one to a byte."""
    n, per = var("n"), 8 // bits
    p = Buffer("p0", u8, (n,), "param", False)
    a = axis("i", (n + (per - 1)) // per)
    out: Expr | None = None
    for k in range(per):
        at = a.var * per + k
        part = binary("shl", load(p, [at], at < n) & ((1 << bits) - 1), as_expr(k * bits, u8))
        out = part if out is None else out | part
    assert out is not None
    return Compute(f"pack{bits}", (p,), (n,), (pull("o0", [a], out),), ("o0",))
