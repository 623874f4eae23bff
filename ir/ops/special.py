"""Functions of two numbers that take a loop an element: zeta, incomplete gamma, orthogonal polynomials, divisors.

Source: NIST Digital Library of Mathematical Functions, whose formulas are named by their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, index
from luthier.ir.expr import Expr, binary, cast, const, land, lor, maximum, minimum, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer, If, Stmt, While, block
from luthier.ir.op import Kernel, Op
from luthier.ir.ops.common import Array, differ, must, need, product, register, shape_error, type_error, wide
from luthier.ir.ops.kernels import Reg, flat, for_, get, kernel, put, with_regs


class Looped(Op):
    """(a, b) of one shape to an element each: ``loop(a, b, out)`` sets the register ``out``; ``ref(a, b)`` is the same on Python's numbers."""

    def __init__(self, loop: Callable[[Expr, Expr, Reg], Stmt], ref: Callable[[Any, Any], Any], integer: bool = False) -> None:
        self.loop, self.ref, self.integer = loop, ref, integer

    def infer(self, node: Node) -> Sequence[TensorType]:
        a, b = need(node, 0), need(node, 1)
        if not (a.dtype.is_int if self.integer else a.dtype.is_float) or b.dtype is not a.dtype:
            raise type_error(node, f"takes {'integers' if self.integer else 'floats'} of one type")
        if a.rank != b.rank or any(differ(x, y) for x, y in zip(a.shape, b.shape, strict=True)):
            raise shape_error(node, "takes tensors of one shape")
        return [a.type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        a, b, y = flat(must(ins, 0)), flat(must(ins, 1)), flat(outs[0])
        d = wide(a.dtype)

        def element(i: Expr) -> Stmt:
            out, p, q = Reg("out", d), Reg("first", d), Reg("second", d)
            body = block(p.set(cast(get(a, i), d)), q.set(cast(get(b, i), d)), self.loop(p(), q(), out), put(y, i, out()))
            return with_regs([out, p, q], body)

        return kernel(node, ins, outs, [], for_("i", product(outs[0].shape), element, kind="parallel"))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, b = (np.asarray(v) for v in arrays[:2])
        with np.errstate(all="ignore"):
            out = [self.ref(x, y) for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)]
        return [np.array(out, object).reshape(a.shape).astype(a.dtype)]


# ---------------------------------------------------------------- zeta

# (2 k)! / B(2 k), k = 1 .. 12, of the formula of Euler and Maclaurin (25.2.10)
_EULER = (
    12.0, -720.0, 30240.0, -1209600.0, 47900160.0, -1307674368000.0 / 691, 74724249600.0, -10670622842880000.0 / 3617,
    5109094217170944000.0 / 43867, -802857662698291200000.0 / 174611, 14101100039391805440000.0 / 77683, -1693824136731743669452800000.0 / 236364091,
)  # fmt: skip


def _zeta(x: Expr, q: Expr, out: Reg) -> Stmt:
    """Nine terms at least and until q + k is above 9, then Euler and Maclaurin's rest."""
    d = x.dtype
    a, b, w, k = Reg("a", d), Reg("b", d), Reg("w", d), Reg("k")
    zero, one = const(0.0, d), const(1.0, d)
    terms = While(lor(k() < 9, a() <= const(9.0, d)), block(k.add(), a.add(1.0), b.set(binary("pow", a(), -x)), out.set(out() + b())))
    rest: list[Stmt] = [w.set(a()), out.set(out() + b() * w() / (x - one) - const(0.5, d) * b()), a.set(one)]
    for i, f in enumerate(_EULER):
        rest += [a.set(a() * (x + const(2.0 * i, d))), b.set(b() / w()), out.set(out() + a() * b() / const(f, d))]
        rest += [a.set(a() * (x + const(2.0 * i + 1, d))), b.set(b() / w())]
    start = block(k.set(0), a.set(q), out.set(binary("pow", q, -x)), b.set(zero))
    pole = lor(x.eq(one), land(q <= zero, q.eq(unary("floor", q))))
    none = lor(x < one, land(q <= zero, x.ne(unary("floor", x))))
    value = If(pole, out.set(const(math.inf, d)), If(none, out.set(const(math.nan, d)), block(start, terms, *rest)))
    return with_regs([a, b, w, k], If(x < one, out.set(const(math.nan, d)), value))


def _zeta_ref(x: float, q: float) -> float:
    if not x >= 1:
        return math.nan
    if x == 1 or (q <= 0 and q == math.floor(q)):
        return math.inf
    if q <= 0 and x != math.floor(x):
        return math.nan
    n = max(0, math.ceil(40 - q))
    tail = q + n
    head = math.fsum(np.power(q + k, -x) for k in range(n))
    series = tail ** (1 - x) / (x - 1) + tail**-x / 2 + x * tail ** (-x - 1) / 12 - x * (x + 1) * (x + 2) * tail ** (-x - 3) / 720
    return float(head + series)


register("aten::zeta", Looped(_zeta, _zeta_ref))


# ---------------------------------------------------------------- orthogonal polynomials


Step = Callable[[Any, Any, Any, Any], Any]  # of x, k and the two before: the polynomial of degree k + 1


def _polynomial(first: Callable[[Any], Any], step: Step, limit: bool) -> Looped:
    """Of degree ``b`` at ``a`` by the recurrence of 18.9.1; 0 for negative degrees. ``limit``: NaN beyond 128 (512 in f64) as torch has it."""

    def loop(x: Expr, n: Expr, out: Reg) -> Stmt:
        d = x.dtype
        top = 512 if d.bits == 64 else 128
        degree, before, older = Reg("degree"), Reg("before", d), Reg("older", d)
        one = const(1.0, d)

        def climb(k: Expr) -> Stmt:
            return block(older.set(before()), before.set(out()), out.set(step(x, cast(k, d), before(), older())))

        wild = lor(unary("isnan", n), unary("isinf", n))
        begin = block(degree.set(cast(select(wild, const(-1.0, d), minimum(maximum(n, const(-1.0, d)), const(1e6, d))), index)), before.set(one), out.set(select(degree() < 1, one, first(x))))
        body = block(begin, for_("k", degree(), climb, lo=1))
        ends = [If(degree() < 0, out.set(const(0.0, d)))]
        if limit:
            body = block(begin, If(degree() <= top, for_("k", degree(), climb, lo=1), out.set(const(math.nan, d))))
        return with_regs([degree, before, older], block(body, *ends))

    def ref(x: float, n: float) -> float:
        degree = int(n) if math.isfinite(n) else -1
        if degree < 1:
            return float(degree == 0)
        before, out = 1.0, first(x)
        for k in range(1, degree):
            before, out = out, step(x, float(k), out, before)
        return float(out)

    return Looped(loop, ref)


def _number(like: Any, v: float) -> Any:
    return const(v, _type(like)) if isinstance(like, Expr) else v


def _type(e: Expr) -> DType:
    return e.dtype


register("aten::hermite_polynomial_h", _polynomial(lambda x: x + x, lambda x, k, p, o: (x + x) * p - (k + k) * o, True))
register("aten::hermite_polynomial_he", _polynomial(lambda x: x, lambda x, k, p, o: x * p - k * o, True))
register("aten::laguerre_polynomial_l", _polynomial(
    lambda x: _number(x, 1.0) - x, lambda x, k, p, o: ((k + k + _number(x, 1.0) - x) * p - k * o) / (k + _number(x, 1.0)), False))  # fmt: skip
register("aten::legendre_polynomial_p", _polynomial(
    lambda x: x, lambda x, k, p, o: ((k + k + _number(x, 1.0)) * x * p - k * o) / (k + _number(x, 1.0)), False))  # fmt: skip


# ---------------------------------------------------------------- incomplete gamma functions, greatest common divisors


def log_gamma(a: Expr) -> Expr:
    """Of a > 0, by Stirling's series (5.11.1); below 8 of a + 8, less the logarithm of a (a + 1) .. (a + 7)."""
    d = a.dtype
    low, product_ = a < const(8.0, d), a
    for k in range(1, 8):
        product_ = product_ * (a + const(float(k), d))
    v = select(low, a + const(8.0, d), a)
    z = const(1.0, d) / v
    series = const(1 / 1260, d) * z * z - const(1 / 360, d)
    series = series * z * z + const(1 / 12, d)
    value = (v - const(0.5, d)) * unary("log", v) - v + const(0.5 * math.log(2 * math.pi), d) + z * series
    return select(low, value - unary("log", product_), value)


def _igamma(upper: bool) -> Looped:
    """The regularized functions: the series of P (8.7.1) below a + 1, Lentz's continued fraction of Q (8.9.2) above."""

    def loop(a: Expr, x: Expr, out: Reg) -> Stmt:
        d = a.dtype
        zero, one, two = (const(v, d) for v in (0.0, 1.0, 2.0))
        eps, tiny = const(1e-7 if d.bits == 32 else 1e-15, d), const(1e-30, d)
        term, at, b, c, k = Reg("term", d), Reg("at", d), Reg("b", d), Reg("c", d), Reg("k")
        factor = unary("exp", a * unary("log", x) - x - log_gamma(a))
        add = block(k.add(), at.set(at() + one), term.set(term() * x / at()), out.set(out() + term()))
        more = land(eps * unary("abs", out()) < unary("abs", term()), k() < 5000)
        series = block(k.set(0), at.set(a), term.set(one / a), out.set(term()), While(more, add), out.set(out() * factor))
        n = cast(k(), d)
        nonzero = select(unary("abs", term()) < tiny, tiny, term())
        step = block(
            k.add(), at.set(n * (a - n)), b.set(b() + two), term.set(at() * term() + b()), c.set(b() + at() / c()), term.set(one / nonzero),
            at.set(term() * c()), out.set(out() * at()),
        )  # fmt: skip
        begin = block(k.set(0), b.set(x + one - a), c.set(one / tiny), term.set(one / b()), out.set(term()), at.set(zero))
        fraction = block(begin, While(land(eps < unary("abs", at() - one), k() < 5000), step), out.set(out() * factor))
        p, q = (block(series, out.set(one - out())), fraction) if upper else (series, block(fraction, out.set(one - out())))
        low, high = const(float(upper), d), const(float(not upper), d)
        nothing = lor(lor(a < zero, x < zero), lor(land(a.eq(0.0), x.eq(0.0)), land(unary("isinf", a), unary("isinf", x))))
        nothing = lor(nothing, lor(unary("isnan", a), unary("isnan", x)))
        inside = If(x < a + one, p, q)
        ends = If(lor(x.eq(0.0), unary("isinf", a)), out.set(low), If(lor(a.eq(0.0), unary("isinf", x)), out.set(high), inside))
        return with_regs([term, at, b, c, k], If(nothing, out.set(const(math.nan, d)), ends))

    def ref(a: float, x: float) -> float:
        if not (a >= 0 and x >= 0) or a == x == 0 or math.isinf(a) and math.isinf(x):
            return math.nan
        if x == 0 or math.isinf(a):
            return float(upper)
        if a == 0 or math.isinf(x):
            return float(not upper)
        t = np.linspace(0, 1, 200001)[1:-1]  # 8.2.1 by the midpoint of u^a = t, which takes the singularity away
        u = x * t ** (1 / min(a, 1))
        p = float(np.trapezoid(np.exp(-u + (a - 1) * np.log(u) - math.lgamma(a)), u))
        return 1 - p if upper else p

    return Looped(loop, ref)


register("aten::igamma", _igamma(False))
register("aten::igammac", _igamma(True))


def _gcd(a: Expr, b: Expr, out: Reg) -> Stmt:
    rest, held = Reg("rest", a.dtype), Reg("held", a.dtype)
    step = block(held.set(rest()), rest.set(binary("rem", out(), rest())), out.set(held()))
    body = block(out.set(unary("abs", a)), rest.set(unary("abs", b)), While(rest().ne(0), step))
    return with_regs([rest, held], body)


register("aten::gcd", Looped(_gcd, math.gcd, True))
