"""Transcendental functions as rules on ``Expr``: one definition for the interpreter and for every printer.

Every rule is straight-line: range reduction, a polynomial, reconstruction, selects for the special
values. It uses add, mul, div, sqrt, compare, select, min, max, shifts and bitcasts only, so it works on any number of lanes
and needs no library. f16, bf16 and 8-bit floats are computed in f32, f64 in f64. Bounds, in units in the last place of the
result, over the finite range where the result is a normal number (measured by the tests):

============================  ===  ===   ================================================================================
function                      f32  f64   notes
============================  ===  ===   ================================================================================
exp exp2                      2    2     denormal results are right; 0 below, inf above
expm1                         3    3
log log2 log1p                3    3     log(0) = -inf, log(x < 0) = NaN
tanh sigmoid                  4    4     sigmoid of x < -88 (f32) may be 0
erf                           4    4
sin cos tan                   4    4     of any finite angle; beyond 8192 (f32), 2^26 (f64) by ``large_angles``
asin acos atan atan2          4    4
sinh cosh asinh acosh atanh   5    5
pow                           2    2     IEEE special cases; integers wrap, a negative exponent truncates 1 / x**n
rsqrt                         2    2
============================  ===  ===   ================================================================================

FMA contraction changes the last bit at most. -0.0 may come out as 0.0 from expm1 and log1p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from luthier.ir.dtypes import DType, f32, f64, i32, i64
from luthier.ir.expr import Expr, binary, bitcast, cast, const, maximum, minimum, select, unary, vreduce, walk
from luthier.ir.intrin import PURE
from luthier.ir.large_angles import reduce_large
from luthier.ir.math_tables import POLY

# pi/2, ln 2 and log2(e) to 160 bits and more, as integers over a power of two
_PI_2 = Fraction(0x1921FB54442D18469898CC51701B839A252049C1, 1 << 156)
_LN2 = Fraction(0xB17217F7D1CF79ABC9E3B39803F2F6AF40F34326, 1 << 160)
_LOG2E = 1 / _LN2


@dataclass(frozen=True)
class _Format:
    """What the rules need to know of f32 and f64."""

    f: DType
    i: DType
    mant: int
    bias: int
    suffix: str
    exp_lo: float
    exp_hi: float

    @property
    def magic(self) -> float:
        """1.5 * 2^mant: adding it rounds to an integer that then stands in the low bits."""
        return 1.5 * 2.0**self.mant

    @property
    def tiny(self) -> float:
        return math.ldexp(1.0, 1 - self.bias)


_F32 = _Format(f32, i32, 23, 127, "32", -104.0, 89.0)
_F64 = _Format(f64, i64, 52, 1023, "64", -746.0, 710.0)


def _fmt(x: Expr) -> _Format:
    return _F64 if x.dtype.scalar is f64 else _F32


def _pieces(v: Fraction, bits: int, n: int) -> list[float]:
    """``v`` as a sum of n numbers of at most ``bits`` significant bits each (the last one takes what a float holds)."""
    out: list[float] = []
    for _ in range(n - 1):
        e = math.frexp(float(v))[1]
        q = Fraction(2) ** (e - bits)
        p = (v // q) * q
        out.append(float(p))
        v -= p
    return [*out, float(v)]


def _poly(name: str, x: Expr) -> Expr:
    c = POLY[name]
    p = const(c[-1], x.dtype)
    for k in reversed(c[:-1]):
        p = p * x + k
    return p


def _bits(x: Expr) -> Expr:
    return bitcast(x, _fmt(x).i.vec(x.dtype.lanes))


def _from_bits(b: Expr, k: _Format) -> Expr:
    return bitcast(b, k.f.vec(b.dtype.lanes))


def _int(v: int, like: Expr) -> Expr:
    return const(v, like.dtype)


def _clamp(x: Expr, lo: float, hi: float) -> Expr:
    """NaN stays NaN: min and max return their second operand then."""
    return minimum(const(hi, x.dtype), maximum(const(lo, x.dtype), x))


def _copysign(r: Expr, x: Expr) -> Expr:
    """r >= 0 with the sign of x."""
    k = _fmt(x)
    b = _bits(x)
    sign = b & _int(-(1 << (k.f.bits - 1)), b)
    return _from_bits(_bits(r) | sign, k)


def _abs(x: Expr) -> Expr:
    return unary("abs", x)


def _nan(x: Expr) -> Expr:
    return const(math.nan, x.dtype)


def _inf(x: Expr) -> Expr:
    return const(math.inf, x.dtype)


class Rules:
    """The rules for a target that has the operators in ``native`` itself; ``apply(op, x)`` expands or keeps one.

    ``small``: angles are known to be at most 8192 (f32) or 2^26 (f64), see :func:`large_angles`."""

    def __init__(self, native: Iterable[str] = (), small: bool = False) -> None:
        self.native, self.small = frozenset(native), small

    def apply(self, op: str, *args: Expr) -> Expr:
        """``op`` of ``args``, expanded unless native; narrow floats are computed in f32 and rounded."""
        d = args[0].dtype
        if op in self.native or op not in RULES:
            return binary(op, *args) if len(args) == 2 else unary(op, args[0])
        if not d.is_float:
            return self.int_pow(*args) if op == "pow" else unary(op, args[0])
        if d.bits < 32:
            return cast(self.apply(op, *(cast(a, f32) for a in args)), d.scalar)
        r: Expr = getattr(self, op)(*args)
        return r

    # -- exponentials

    def _exp(self, x: Expr, half: bool = False, least: float | None = None) -> Expr:
        """e^x (or e^x / 2): x = h * 2 ln 2 + r, |r| <= ln 2; e^x = p(r) * 2^h * 2^h keeps denormal and huge results exact.

        ``least``: below it the result may be that of ``least``."""
        k = _fmt(x)
        hi, lo = _pieces(2 * _LN2, 15 if k is _F32 else 40, 2)
        x = _clamp(x, k.exp_lo if least is None else least, k.exp_hi + (1 if half else 0))
        t = x * float(_LOG2E / 2) + (k.magic + k.bias)
        h = t - (k.magic + k.bias)
        r = (x - h * hi) - h * lo
        p = (_poly("exp" + k.suffix, r) * r + 1.0) * r + 1.0
        b = _bits(t)
        s = _from_bits(b << _int(k.mant, b), k)
        return (p * s) * (s * 0.5 if half else s)

    def exp(self, x: Expr) -> Expr:
        return self._exp(x)

    def _scale2(self, p: Expr, t: Expr, k: _Format) -> Expr:
        """p * 2^n where t = n + magic, in two steps so that neither factor leaves the normal range."""
        b = _bits(t)
        n = b - _bits(const(k.magic, t.dtype))
        n1 = n >> _int(1, b)
        one = _int(k.bias << k.mant, b)
        m = _int(k.mant, b)
        return (p * _from_bits((n1 << m) + one, k)) * _from_bits(((n - n1) << m) + one, k)

    def exp2(self, x: Expr) -> Expr:
        k = _fmt(x)
        x = _clamp(x, -k.bias - k.mant - 2.0, k.bias + 2.0)
        t = x + k.magic
        r = x - (t - k.magic)
        return self._scale2(_poly("exp2_" + k.suffix, r) * r + 1.0, t, k)

    def expm1(self, x: Expr) -> Expr:
        """e^x - 1 = 2 (q s + (s - 1/2)) with q = e^r - 1 and s = 2^(n-1)."""
        k = _fmt(x)
        hi, lo = _pieces(_LN2, 14 if k is _F32 else 40, 2)
        x = _clamp(x, -20.0 if k is _F32 else -40.0, k.exp_hi)
        t = x * float(_LOG2E) + (k.magic + k.bias - 1)
        n = t - (k.magic + k.bias - 1)
        r = (x - n * hi) - n * lo
        q = r + (r * r) * _poly("expm1_" + k.suffix, r)
        b = _bits(t)
        s = _from_bits(b << _int(k.mant, b), k)
        y = q * s + (s - 0.5)
        return y + y

    def sigmoid(self, x: Expr) -> Expr:
        """1 / (1 + e^-x); an e^-x that does not change 1 is kept above 1e-27: denormal ones cost hundreds of cycles each."""
        one = const(1.0, x.dtype)
        return one / (one + (self.apply("exp", -x) if "exp" in self.native else self._exp(-x, least=-30.0 if _fmt(x) is _F32 else -60.0)))

    def tanh(self, x: Expr) -> Expr:
        """t / (t + 2) with t = e^(2 x) - 1."""
        top = 9.5 if _fmt(x) is _F32 else 20.0
        x = _clamp(x, -top, top)
        t = self.apply("expm1", x + x)
        return t / (t + 2.0)

    def erf(self, x: Expr) -> Expr:
        """Below 1 an odd polynomial; above 1 - p(|x|)^-8 in f32, 1 - exp(-x^2) g(|x|) in f64."""
        k = _fmt(x)
        small = x + x * _poly("erf" + k.suffix, x * x)
        one = const(1.0, x.dtype)
        if k is _F32:
            a = minimum(const(4.0, x.dtype), _abs(x))
            p = _poly("erfc8", a - 2.0)
            p = p * p
            p = p * p
            big = one - one / (p * p)
        else:
            a = minimum(const(6.0, x.dtype), _abs(x))
            big = one - self.apply("exp", -(a * a)) * _poly("erfcx64", (a - 2.0) / (a + 2.0))
        return select(a < 1.0, small, _copysign(big, x))

    def sinh(self, x: Expr) -> Expr:
        """|x| < 1: odd polynomial; else E - 1/(4 E) with E = e^|x| / 2."""
        k, a = _fmt(x), _abs(x)
        e = self._exp(a, half=True)
        z = x * x
        small = x + (x * z) * _poly("sinh" + k.suffix, z)
        return select(a < 1.0, small, _copysign(e - const(0.25, x.dtype) / e, x))

    def cosh(self, x: Expr) -> Expr:
        e = self._exp(_abs(x), half=True)
        return e + const(0.25, x.dtype) / e

    # -- logarithms

    def _log_parts(self, x: Expr) -> tuple[Expr, Expr, _Format]:
        """x = 2^e * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), for positive finite x (denormals scaled up first)."""
        k = _fmt(x)
        up = k.mant + 2
        tiny = x < k.tiny
        b = _bits(select(tiny, x * math.ldexp(1.0, up), x))
        half = {23: 0x3F3504F3, 52: 0x3FE6A09E667F3BCD}[k.mant]
        e = (b - half) >> _int(k.mant, b)
        m = _from_bits(b - (e << _int(k.mant, b)), k)
        ef = cast(e, k.f) - select(tiny, const(float(up), x.dtype), const(0.0, x.dtype))
        return ef, m - 1.0, k

    def _log1f(self, f: Expr, k: _Format, low: Expr | None) -> Expr:
        """log(1 + f) + low for the mantissa part (low: a small term added before the large ones)."""
        hf = (f * f) * 0.5
        if k is _F32:
            y = (f * f) * (f * _poly("log32", f))
            if low is not None:
                y = y + low
            return f + (y - hf)
        s = f / (f + 2.0)
        z = s * s
        c = s * (f - z * _poly("log64", z))  # log(1 + f) = 2 s + s z Q(z) = f - s (f - z Q)
        return f - (c if low is None else c - low)

    def _log_special(self, x: Expr, r: Expr) -> Expr:
        zero = const(0.0, x.dtype)
        return select(zero < x, select(x < _inf(x), r, x), select(x.eq(0.0), -_inf(x), _nan(x)))

    def log(self, x: Expr) -> Expr:
        e, f, k = self._log_parts(x)
        hi, lo = _pieces(_LN2, 14 if k is _F32 else 40, 2)
        return self._log_special(x, self._log1f(f, k, e * lo) + e * hi)

    def log2(self, x: Expr) -> Expr:
        e, f, k = self._log_parts(x)
        return self._log_special(x, self._log1f(f, k, None) * float(_LOG2E) + e)

    def log1p(self, x: Expr) -> Expr:
        """log(u) + (x - (u - 1)) / u with u = 1 + x rounded."""
        u = x + 1.0
        r = self.apply("log", u)
        ok = (const(0.0, x.dtype) < u) & (u < _inf(x))
        return select(ok, r + (x - (u - 1.0)) / u, r)

    def asinh(self, x: Expr) -> Expr:
        a = _abs(x)
        big = const(2.0**30 if _fmt(x) is _F32 else 2.0**60, x.dtype) < a
        z = a * a
        arg = select(big, a, a + z / (unary("sqrt", z + 1.0) + 1.0))
        r = self.apply("log1p", arg) + select(big, const(math.log(2), x.dtype), const(0.0, x.dtype))
        return _copysign(r, x)

    def acosh(self, x: Expr) -> Expr:
        big = const(2.0**30 if _fmt(x) is _F32 else 2.0**60, x.dtype) < x
        t = x - 1.0
        arg = select(big, x, t + unary("sqrt", t + t + t * t))
        r = self.apply("log1p", arg) + select(big, const(math.log(2), x.dtype), const(0.0, x.dtype))
        return select(x < 1.0, _nan(x), r)

    def atanh(self, x: Expr) -> Expr:
        a = _abs(x)
        r = self.apply("log1p", (a + a) / (const(1.0, x.dtype) - a)) * 0.5
        return select(a <= 1.0, _copysign(r, x), _nan(x))

    # -- trigonometry

    def _reduce(self, x: Expr) -> tuple[Expr, Expr, _Format]:
        """x = (M * B + n) * pi/2 + r, |r| <= pi/4: Cody and Waite in two stages, pi/2 in four pieces, every product exact.

        Returns r and an integer whose low two bits are the quadrant (B is a multiple of 4)."""
        k = _fmt(x)
        stage, bits = (2.0**12, 11) if k is _F32 else (2.0**26, 26)
        c = _pieces(_PI_2, bits, 4)
        m = (x * float(1 / (_PI_2 * int(stage))) + k.magic) - k.magic
        rough = ((x - m * (c[0] * stage)) - m * (c[1] * stage)) - m * (c[2] * stage)
        t = rough * float(1 / _PI_2) + k.magic
        n = t - k.magic
        r = x
        for p in c:
            r = (r - m * (p * stage)) - n * p
        return _clamp(r, -0.79, 0.79), _bits(t), k

    def _sincos(self, x: Expr) -> tuple[Expr, Expr, Expr]:
        r, q, k = self._reduce(x)
        if not self.small:
            big, finite = _large(x), _abs(x) < _inf(x)
            far, turns = reduce_large(x)
            r, q = select(big, select(finite, far, _nan(x)), r), select(big, turns, q)
        z = r * r
        s = r + (r * z) * _poly("sin" + k.suffix, z)
        c = ((z * z) * _poly("cos" + k.suffix, z) - z * 0.5) + 1.0
        return s, c, q

    def sin(self, x: Expr) -> Expr:
        s, c, q = self._sincos(x)
        v = select((q & 1).eq(0), s, c)
        return select((q & 2).eq(0), v, -v)

    def cos(self, x: Expr) -> Expr:
        s, c, q = self._sincos(x)
        v = select((q & 1).eq(0), c, s)
        return select(((q + 1) & 2).eq(0), v, -v)

    def tan(self, x: Expr) -> Expr:
        s, c, q = self._sincos(x)
        even = (q & 1).eq(0)
        return select(even, s, -c) / select(even, c, s)

    def _atan_core(self, a: Expr, steep: bool) -> Expr:
        """atan of a >= 0 (a <= 1 when not steep): a, (a-1)/(a+1) or -1/a brings it below tan(pi/8)."""
        k = _fmt(a)
        one, zero = const(1.0, a.dtype), const(0.0, a.dtype)
        mid = const(math.sqrt(2) - 1, a.dtype) < a
        num, den = select(mid, a - 1.0, a), select(mid, a + 1.0, one)
        q = float(_PI_2 / 2)
        base, low = select(mid, const(q, a.dtype), zero), select(mid, const(float(_PI_2 / 2 - Fraction(_round(q, k))), a.dtype), zero)
        if steep:
            far = const(math.sqrt(2) + 1, a.dtype) < a
            num, den = select(far, const(-1.0, a.dtype), num), select(far, a, den)
            h = float(_PI_2)
            base = select(far, const(h, a.dtype), base)
            low = select(far, const(float(_PI_2 - Fraction(_round(h, k))), a.dtype), low)
        t = num / den
        z = t * t
        return base + (t + ((t * z) * _poly("atan" + k.suffix, z) + low))

    def atan(self, x: Expr) -> Expr:
        return _copysign(self._atan_core(_abs(x), True), x)

    def atan2(self, y: Expr, x: Expr) -> Expr:
        k = _fmt(x)
        ay, ax = _abs(y), _abs(x)
        hi, lo = maximum(ay, ax), minimum(ay, ax)
        t = select(hi.eq(0.0), const(0.0, x.dtype), select(lo.eq(math.inf), const(1.0, x.dtype), lo / hi))
        r = self._atan_core(t, False)
        h, p = float(_PI_2), float(2 * _PI_2)
        r = select(ax < ay, (const(h, x.dtype) - r) + float(_PI_2 - Fraction(_round(h, k))), r)
        r = select(_bits(x) < 0, (const(p, x.dtype) - r) + float(2 * _PI_2 - Fraction(_round(p, k))), r)
        return select(unary("isnan", x) | unary("isnan", y), _nan(x), _copysign(r, y))

    def _asin_parts(self, x: Expr) -> tuple[Expr, Expr]:
        """(|x| > 1/2, p): asin |x| = p, or pi/2 - 2 p where it is large."""
        k, a = _fmt(x), _abs(x)
        big = const(0.5, x.dtype) < a
        z = select(big, (const(1.0, x.dtype) - a) * 0.5, x * x)
        s = select(big, unary("sqrt", z), a)
        return big, s + (s * z) * _poly("asin" + k.suffix, z)

    def asin(self, x: Expr) -> Expr:
        big, p = self._asin_parts(x)
        h = float(_PI_2)
        low = float(_PI_2 - Fraction(_round(h, _fmt(x))))
        r = select(big, const(h, x.dtype) - ((p + p) - low), p)
        return select(_abs(x) <= 1.0, _copysign(r, x), _nan(x))

    def acos(self, x: Expr) -> Expr:
        big, p = self._asin_parts(x)
        k = _fmt(x)
        h, pi = float(_PI_2), float(2 * _PI_2)
        hl, pl = float(_PI_2 - Fraction(_round(h, k))), float(2 * _PI_2 - Fraction(_round(pi, k)))
        neg = x < 0.0
        near = select(neg, const(pi, x.dtype) - ((p + p) - pl), p + p)
        q = select(neg, -p, p)
        return select(big, near, const(h, x.dtype) - (q - hl))

    # -- powers

    def rsqrt(self, x: Expr) -> Expr:
        return const(1.0, x.dtype) / unary("sqrt", x)

    def pow(self, x: Expr, y: Expr) -> Expr:
        """x^y = 2^(y log2 |x|), the logarithm carried in two floats; constant small exponents become products."""
        short = self._const_pow(x, y)
        if short is not None:
            return short
        a = _abs(x)
        hi, lo, k = self._log2_two(a)
        limit = 2.0**40 if k is _F32 else 2.0**75
        yc = _clamp(y, -limit, limit)
        yh = self._head(yc)
        zh = yh * hi
        zl = (yc - yh) * hi + yc * lo
        top = k.bias + k.mant + 10.0
        zh, zl = _clamp(zh, -4 * top, 4 * top), _clamp(zl, -4 * top, 4 * top)
        t = _clamp(zh + zl, -top, top) + k.magic
        r = _clamp((zh - (t - k.magic)) + zl, -1.0, 1.0)
        v = self._scale2(_poly("exp2_" + k.suffix, r) * r + 1.0, t, k)
        zero, inf = const(0.0, x.dtype), _inf(x)
        down = y < 0.0
        v = select(a.eq(0.0), select(down, inf, zero), v)
        v = select(a.eq(math.inf), select(down, zero, inf), v)
        whole = unary("floor", y).eq(y)
        half = y * 0.5
        odd = whole & unary("floor", half).ne(half)
        negative = _bits(x) < 0
        v = select(negative & odd, -v, v)
        wrong = (x < 0.0) & unary("not", whole) & (a < _inf(x))
        v = select(wrong | unary("isnan", x) | unary("isnan", y), _nan(x), v)
        return select(x.eq(1.0) | y.eq(0.0), const(1.0, x.dtype), v)

    def _head(self, v: Expr) -> Expr:
        """The upper half of the significand: products of two heads are exact."""
        k = _fmt(v)
        b = _bits(v)
        return _from_bits(b & _int(-(1 << ((k.mant + 1) // 2 + (k.mant + 1) % 2)), b), k)

    def _log2_two(self, a: Expr) -> tuple[Expr, Expr, _Format]:
        """log2 of a > 0 as hi + lo, hi with half the significand.

        With s = f / (2 + f) in two parts, log(1 + f) = (2/3) s (3 + s^2 + 3 s^4 (1/5 + ...)); the products of heads are exact."""
        e, f, k = self._log_parts(a)
        v = const(1.0, a.dtype) / (f + 2.0)
        s = f * v
        sh = self._head(s)
        dh = self._head(f + 2.0)
        dl = f - (dh - 2.0)
        sl = v * ((f - sh * dh) - sh * dl)
        s2 = sh * sh
        z = s * s
        rest = (z * z) * _poly("pow" + k.suffix, z) + sl * (sh + s)
        th = self._head((s2 + 3.0) + rest)
        tl = rest - ((th - 3.0) - s2)
        u, w = sh * th, sl * th + tl * s
        ph = self._head(u + w)
        pl = w - (ph - u)
        c = _LOG2E * Fraction(2, 3)
        bits = (k.mant + 1) // 2
        ch, cl = _pieces(c, bits, 2)
        zh = ph * ch
        zl = ph * cl + pl * float(c)
        hi = self._head((zh + zl) + e)
        return hi, zl - ((hi - e) - zh), k

    def _const_pow(self, x: Expr, y: Expr) -> Expr | None:
        c = y.args[0] if y.op == "bcast" else y
        if c.op != "const":
            return None
        p = float(c.attr)
        if p == 0:
            return const(1.0, x.dtype)
        if abs(p) == 0.5:  # pow(-inf, 0.5) = inf and pow(-0, 0.5) = +0, unlike sqrt
            r = unary("sqrt", select(x.eq(-math.inf), _inf(x), x + 0.0))
            return r if p > 0 else const(1.0, x.dtype) / r
        if p != int(p) or abs(p) > 4:
            return None
        out = {1: x, 2: x * x, 3: x * x * x, 4: (x * x) * (x * x)}[int(abs(p))]
        return out if p > 0 else const(1.0, x.dtype) / out

    def int_pow(self, x: Expr, y: Expr) -> Expr:
        """Squaring, one round for each bit of the exponent."""
        d = x.dtype
        one, zero = const(1, d), const(0, d)
        c = y.args[0] if y.op == "bcast" else y
        if c.op == "const" and c.attr >= 0:
            out, base, n = one, x, int(c.attr)
            while n:
                out = out * base if n & 1 else out
                n >>= 1
                base = base * base if n else base
            return out
        out, base, n_ = one, x, y
        for _ in range(min(d.bits, 64) - (1 if d.is_signed else 0)):
            out = select((n_ & one).ne(zero), out * base, out)
            base = base * base
            n_ = n_ >> one
        if not d.is_signed:
            return out
        minus = const(-1, d)
        recip = select(x.eq(one), one, select(x.eq(minus), select((y & one).ne(zero), minus, one), zero))
        return select(y < zero, recip, out)


def _round(v: float, k: _Format) -> float:
    """``v`` as the format holds it."""
    return float(const(v, k.f).attr)


RULES: dict[str, Callable[..., Expr]] = {
    n: getattr(Rules, n)
    for n in (
        "exp exp2 expm1 sigmoid tanh erf sinh cosh log log2 log1p asinh acosh atanh sin cos tan atan atan2 asin acos rsqrt pow"
    ).split()
}


def expand_op(op: str, *args: Expr, native: Iterable[str] = ()) -> Expr:
    """One operator expanded into basic ones; unchanged when it is native or has no rule."""
    return Rules(native).apply(op, *args)


def expand_expr(e: Expr, native: Iterable[str] = ()) -> Expr:
    """Every transcendental in ``e`` expanded."""
    from luthier.ir.expr import rewrite

    return rewrite(e, expander(native))


def _large(x: Expr) -> Expr:
    """Whether an angle is larger than what :meth:`Rules._reduce` takes."""
    return const(2.0**26 if _fmt(x) is _F64 else 8192.0, x.dtype) < _abs(x)


def large_angles(e: Expr, native: Iterable[str] = ()) -> Expr | None:
    """Whether an angle in ``e`` is so large that it takes :func:`~luthier.ir.large_angles.reduce_large`; None where there is no angle."""
    out = None
    for x in {t.args[0] for t in walk(e) if t.op in ("sin", "cos", "tan") and t.op not in native and t.dtype.is_float}:
        big = _large(cast(x, f32) if x.dtype.bits < 32 else x)
        any_lane = vreduce("or", big)
        out = any_lane if out is None else out | any_lane
    return out


def expander(native: Iterable[str] = (), small: bool = False) -> Callable[[Expr], Expr | None]:
    """The rewrite function of :func:`expand_expr`, for passes over whole functions. ``small`` as for :class:`Rules`."""
    rules = Rules(native, small)

    def fn(e: Expr) -> Expr | None:
        if e.op in RULES and e.op not in rules.native and (e.dtype.is_float or e.op == "pow"):
            return rules.apply(e.op, *e.args)
        if e.op == "call" and (known := PURE.get(e.attr[0])) is not None and known.expand is not None:
            return known.expand(e.attr[1], *e.args)
        return None

    return fn


__all__ = ["RULES", "Rules", "expand_op", "expand_expr", "expander", "large_angles"]
