"""legalize_arithmetic: integer divisions, shifts and narrow conversions become what machines do directly.

:mod:`luthier.ir.expr` defines them for every operand; instructions trap on a zero divisor and on the lowest value by -1, take a
shift's amount modulo the width, and convert floats to integers of 32 or 64 bits.
What is left after this pass is safe in any language:

* ``div`` and ``rem``: the divisor is not zero, and not -1 where the dividend may be the lowest value.
* ``floordiv`` and ``mod``: neither operand is negative, the divisor is positive, so that an unsigned division does.
* ``shl`` and ``shr``: the amount is below the width.
* ``cast`` of a float to an integer: of 32 or 64 bits (``narrow``).

Before: ``mod(a, b)``. After, with ``s = select(b == 0 or a == lowest and b == -1, 1, b)`` and ``r = rem(a, s)``:
``select(r != 0 and (r ^ s) < 0, r + s, r)``. What is known of the operands (constants, bounds) leaves parts of it out.
"""

from __future__ import annotations

from luthier.ir.dtypes import DType, i32
from luthier.ir.expr import (
    Expr,
    bitcast,
    bounds,
    cast,
    compare,
    const,
    land,
    lor,
    make_node,
    maximum,
    minimum,
    rewrite,
    select,
)
from luthier.ir.loop import Func, map_exprs

_DIVISIONS = frozenset({"div", "rem", "floordiv", "mod"})


def value_range(e: Expr) -> tuple[int | None, int | None]:
    """Inclusive bounds of an integer, through a conversion that keeps the value; None where unbounded."""
    if e.op == "bcast":
        return value_range(e.args[0])
    if e.op == "and" and e.args[1].op in ("const", "bcast"):
        lo, hi = value_range(e.args[1])
        if lo is not None and lo >= 0:
            return 0, hi
    if e.op == "cast" and e.dtype.is_int and (e.args[0].dtype.is_int or e.args[0].dtype.is_index):
        lo, hi = bounds(e.args[0])
        low, high = e.dtype.scalar.limits()
        if lo is not None and hi is not None and low <= lo and hi <= high:
            return lo, hi
    return bounds(e)


def _lowest(a: Expr, b: Expr, bits: int) -> Expr | None:
    """Where ``a / b`` overflows; None where it cannot."""
    d = a.dtype
    low = -(1 << (bits - 1))
    (alo, _), (lo, hi) = value_range(a), value_range(b)
    if not d.is_signed or (alo is not None and alo > low) or (lo is not None and lo >= 0) or (hi is not None and hi < -1):
        return None
    return land(compare("eq", a, const(low, d)), compare("eq", b, const(-1, d)))


def _divisor(a: Expr, b: Expr, bits: int) -> Expr:
    """``b``, or 1 where dividing ``a`` by it would trap."""
    lo, hi = value_range(b)
    bad = [compare("eq", b, const(0, b.dtype))] if not (lo is not None and lo > 0 or hi is not None and hi < 0) else []
    overflow = _lowest(a, b, bits)
    bad += [] if overflow is None else [overflow]
    return select(lor(*bad), const(1, b.dtype), b) if bad else b


def _division(e: Expr, bits: int) -> Expr | None:
    op, d, (a, b) = e.op, e.dtype, e.args
    (alo, _), (lo, hi) = value_range(a), value_range(b)
    floors, quotient = op in ("floordiv", "mod"), op in ("div", "floordiv")
    positive, zero, one = lo is not None and lo > 0, const(0, d), const(1, d)
    if not d.is_signed or alo is not None and alo >= 0:
        plain = "floordiv" if quotient else "mod"
        if positive:
            return None if op == plain else make_node(plain, d, e.args)
    guarded = b is _divisor(a, b.args[2] if b.op == "select" else b, bits)  # by this pass, or in no need of it
    if guarded and op in (("div", "rem") if d.is_signed else ("floordiv", "mod")):
        return None
    if lo == hi and lo is not None:
        if lo == 0:
            return zero
        if lo > 0 and lo & (lo - 1) == 0 and floors:
            op, k = ("shr", lo.bit_length() - 1) if quotient else ("and", lo - 1)
            return make_node(op, d, (a, const(k, d)))
    s = _divisor(a, b, bits)
    r = make_node("rem" if d.is_signed else "mod", d, (a, s))
    if not quotient:
        if not floors or not d.is_signed:
            return r
        return select(compare("lt", r, zero) if positive else _apart(r, s), r + s, r)
    q = make_node("div" if d.is_signed else "floordiv", d, (a, s))
    if floors and d.is_signed:
        r = a - q * s
        q = select(compare("lt", r, zero) if positive else _apart(r, s), q - one, q)
    return q if positive or hi is not None and hi < 0 else select(compare("eq", b, zero), zero, q)


def _apart(r: Expr, s: Expr) -> Expr:
    """Whether a remainder is not zero and of another sign than the divisor."""
    zero = const(0, r.dtype)
    return land(compare("ne", r, zero), compare("ne", compare("lt", r, zero), compare("lt", s, zero)))


def _shift(e: Expr, bits: int) -> Expr | None:
    d, (a, b) = e.dtype, e.args
    lo, hi = value_range(b)
    if lo is not None and lo >= 0 and hi is not None and hi < bits:
        return None
    keeps = e.op == "shr" and d.is_signed  # the sign
    if lo is not None and hi is not None and (hi < 0 or lo >= bits):
        return make_node("shr", d, (a, const(bits - 1, d))) if keeps else const(0, d)
    size, zero = const(bits, d), const(0, d)
    if d.is_index:
        inside = land(compare("le", zero, b), compare("lt", b, size))
    else:
        u = DType("u", d.bits, d.lanes)
        inside = compare("lt", bitcast(b, u) if d.is_signed else b, const(bits, u))
    if keeps:
        return make_node("shr", d, (a, _within(select(inside, b, const(bits - 1, d)), bits)))
    return select(inside, make_node(e.op, d, (a, _within(b, bits))), zero)


def _within(b: Expr, bits: int) -> Expr:
    """``b`` modulo the width, which instructions that shift do by themselves."""
    return make_node("and", b.dtype, (b, const(bits - 1, b.dtype)))


def _narrow(e: Expr) -> Expr:
    """A float to an integer below 32 bits: by way of 32 bits, between the limits."""
    low, high = e.dtype.scalar.limits()
    x = cast(e.args[0], i32)
    return cast(minimum(maximum(x, const(low, x.dtype)), const(high, x.dtype)), e.dtype.scalar)


def legal(e: Expr, narrow: bool = False, index_bits: int = 64) -> Expr | None:
    """What stands for one operator, or None where machines have it. ``narrow``: conversions too; ``index_bits``: of an index."""
    bits = index_bits if e.dtype.is_index else e.dtype.bits
    if e.op in _DIVISIONS:
        return None if e.dtype.is_float else _division(e, bits)
    if e.op in ("shl", "shr"):
        return _shift(e, bits)
    if narrow and e.op == "cast" and e.dtype.is_int and e.dtype.bits < 32 and e.args[0].dtype.is_float:
        return _narrow(e)
    return None


def legalize_arithmetic(f: Func, narrow: bool = True, index_bits: int = 32) -> Func:
    """``f`` with every operator legal, itself where it is already; values that it repeats have no names yet (``place_lets``)."""
    memo: dict[Expr, Expr] = {}
    changed = False

    def rule(e: Expr) -> Expr | None:
        nonlocal changed
        r = legal(e, narrow, index_bits)
        changed = changed or r is not None
        return r

    body = map_exprs(f.body, lambda e: rewrite(e, rule, memo))
    return f.with_body(body) if changed else f
