"""Angles of any size less their multiples of pi/2, exactly, by integer arithmetic (Payne and Hanek).

``x = m 2^s`` with an integer m. Of the binary digits of 2/pi only those count whose product with x is below 4 (multiples of 4 are whole
turns) and not so small that no digit of the result sees them: a window of three words, found by s. Its product with m, modulo 4, is the
quadrant and 62 (f32) or 126 (f64) bits of the rest; the closest that a float comes to a multiple of pi/2 takes 31 (62) of them. Straight-line code in
unsigned integers of the float's width, with products in halves: right on every target, and dear; it stands where an angle is large.
"""

from __future__ import annotations

import functools

from luthier.ir.dtypes import DType, f64, i32, i64, u32, u64
from luthier.ir.expr import Expr, bitcast, cast, const, maximum, select

PAD = 64  # zero bits before the digits of 2/pi, so that a window may begin there


@functools.cache
def _two_over_pi(bits: int) -> int:
    """floor(2/pi * 2^bits), with pi by Machin's formula."""
    one = 1 << (bits + 64)

    def arctan(n: int) -> int:
        total = term = one // n
        k, sign = 3, -1
        while term:
            term //= n * n
            total += sign * (term // k)
            k, sign = k + 2, -sign
        return total

    pi = 4 * (4 * arctan(5) - arctan(239))
    return (2 * one << bits) // pi


def _words(width: int, count: int) -> list[int]:
    digits = _two_over_pi(width * count - PAD)
    return [(digits >> (width * (count - 1 - k))) & ((1 << width) - 1) for k in range(count)]


def _high(a: Expr, b: Expr) -> Expr:
    """The upper half of a product of two unsigned words."""
    half = a.dtype.bits // 2
    mask = (1 << half) - 1
    al, ah, bl, bh = a & mask, a >> half, b & mask, b >> half
    t = ah * bl + ((al * bl) >> half)
    u = al * bh + (t & mask)
    return ah * bh + (t >> half) + (u >> half)


def reduce_large(x: Expr) -> tuple[Expr, Expr]:
    """(r, q) with x = q' pi/2 + r, |r| <= pi/4 and q = q' modulo 4 in its low bits, for finite |x| >= 8192 (f32) or 2^26 (f64)."""
    wide = x.dtype.scalar is f64
    width, mant, bias = (64, 52, 1023) if wide else (32, 23, 127)
    u: DType = (u64 if wide else u32).vec(x.dtype.lanes)
    i: DType = (i64 if wide else i32).vec(x.dtype.lanes)

    def k(v: int) -> Expr:
        return const(v, u)

    b = bitcast(x, u)
    exponent = (b >> mant) & ((1 << (width - 1 - mant)) - 1)
    m = (b & ((1 << mant) - 1)) | k(1 << mant)
    # bit 0 of a window has the weight 2 after the product: it is bit PAD - 2 + s of the words, s = exponent - bias - mant
    least = bias + (26 if wide else 13)
    first = maximum(exponent, k(least)) - (bias + mant + 2 - PAD)
    q, shift = first >> (6 if wide else 5), first & (width - 1)
    steps = (16, 8, 4, 2, 1) if wide else (4, 2, 1)
    words: list[Expr] = [k(w) for w in _words(width, 2 * steps[0] + 3)]
    for step in steps:  # words[0..3] become those at q
        take = (q & step).ne(k(0))
        words = [select(take, words[j + step], words[j]) for j in range(len(words) - step)]
    w0, w1, w2 = ((words[j] << shift) | (words[j + 1] >> (k(width) - shift)) for j in range(3))
    low = _high(m, w2)
    y1 = low + m * w1
    y0 = _high(m, w1) + m * w0 + select(y1 < low, k(1), k(0))
    quadrant = (y0 + k(1 << (width - 3))) >> (width - 2)
    hi, lo = (y0 << 2) | (y1 >> (width - 2)), y1 << 2  # the rest as a signed fraction of 2^-width: from -1/2 to 1/2
    down = bitcast(hi, i) < const(0, i)
    hi, lo = select(down, ~hi, hi), select(down, ~lo, lo)
    f = x.dtype.scalar
    rest = cast(hi, f) * 2.0**-width + cast(lo, f) * 2.0 ** (-2 * width)
    r = rest * 1.5707963267948966
    minus = down.ne(x < 0.0)
    turns = bitcast(quadrant, i)
    return select(minus, -r, r), select(x < 0.0, -turns, turns)


__all__ = ["reduce_large"]
