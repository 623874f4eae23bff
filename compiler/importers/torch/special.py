"""Special functions, written with torch's own elementary ones and traced where a program uses them: Bessel, Airy, gamma, error functions.

Rational and Chebyshev approximations with the coefficients of Cephes (:mod:`luthier.importers.torch.cephes`); series from the NIST
Digital Library of Mathematical Functions (numbers of its formulas stand at each). Accuracy: that of the type computed in, f32 for narrower floats,
times the slope of the function; ``lgamma`` near its zeros 1 and 2 about 1e-6 absolute in f32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from luthier.importers.torch import cephes as C
from luthier.importers.torch.emitter import decomposed

Tensor = torch.Tensor
nan, inf, pi = math.nan, math.inf, math.pi


def special(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a decomposition for floats: other types are taken as the default type, narrow floats are computed in f32."""

    def wrap(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(f)
        def on_floats(*args: Any, **kwargs: Any) -> Tensor:
            tensors = [a for a in args if isinstance(a, Tensor)]
            dtype = torch.result_type(*tensors) if len(tensors) == 2 else tensors[0].dtype
            result = dtype if dtype.is_floating_point else torch.get_default_dtype()
            wide = torch.float32 if torch.finfo(result).bits < 32 else result
            return f(*(a.to(wide) if isinstance(a, Tensor) else a for a in args), **kwargs).to(result)

        return decomposed(*names)(on_floats)

    return wrap


def power_series(x: Tensor, c: Sequence[float]) -> Any:
    """Horner's rule, highest power first."""
    y: Any = c[0]
    for a in c[1:]:
        y = y * x + a
    return y


def chebyshev(x: Tensor, c: Sequence[float]) -> Any:
    """Clenshaw's rule for half the argument, highest degree first, the constant term halved."""
    a: Any = c[0]
    b: Any = 0.0
    older: Any = 0.0
    for t in c[1:]:
        older, b, a = b, a, x * a - b + t
    return 0.5 * (a - older)


# ---------------------------------------------------------------- Bessel functions


def _far(x: Tensor, shift: float, tables: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Modulus and phase for x > 5 (10.17.3): P/P', Q/Q' in (5/x)^2, cosine and sine of x - shift, the scale sqrt(2 / (pi x))."""
    w = 5.0 / x
    z = w * w
    p = power_series(z, tables[0]) / power_series(z, tables[1])
    q = w * power_series(z, tables[2]) / power_series(z, tables[3])
    return p, q, torch.cos(x - shift), torch.sin(x - shift), torch.rsqrt(x) * math.sqrt(2 / pi)


_FAR0, _FAR1 = (C.J0_PP, C.J0_PQ, C.J0_QP, C.J0_QQ), (C.J1_PP, C.J1_PQ, C.J1_QP, C.J1_QQ)


@special("special_bessel_j0")
def bessel_j0(x: Tensor) -> Tensor:
    x = x.abs()
    z = x * x
    near = (z - 5.78318596294678452118) * (z - 30.4712623436620863991) * power_series(z, C.J0_RP) / power_series(z, C.J0_RQ)
    p, q, c, s, scale = _far(x, pi / 4, _FAR0)
    return torch.where(x <= 5, near, (p * c - q * s) * scale)


@special("special_bessel_j1")
def bessel_j1(x: Tensor) -> Tensor:
    size = x.abs()
    z = x * x
    near = x * (z - 14.6819706421238932572) * (z - 49.2184563216946036703) * power_series(z, C.J1_RP) / power_series(z, C.J1_RQ)
    p, q, c, s, scale = _far(size, 3 * pi / 4, _FAR1)
    return torch.where(size <= 5, near, (p * c - q * s) * scale * torch.sign(x))


@special("special_bessel_y0")
def bessel_y0(x: Tensor) -> Tensor:
    z = x * x
    near = power_series(z, C.Y0_YP) / power_series(z, C.Y0_YQ) + 2 / pi * torch.log(x) * bessel_j0(x)
    p, q, c, s, scale = _far(x, pi / 4, _FAR0)
    return torch.where(x == 0, -inf, torch.where(x <= 5, near, (p * s + q * c) * scale))


@special("special_bessel_y1")
def bessel_y1(x: Tensor) -> Tensor:
    z = x * x
    near = x * power_series(z, C.Y1_YP) / power_series(z, C.Y1_YQ) + 2 / pi * (bessel_j1(x) * torch.log(x) - 1 / x)
    p, q, c, s, scale = _far(x, 3 * pi / 4, _FAR1)
    return torch.where(x == 0, -inf, torch.where(x <= 5, near, (p * s + q * c) * scale))


@special("special_i0e")
def i0e(x: Tensor) -> Tensor:
    x = x.abs()
    return torch.where(x <= 8, chebyshev(x / 2 - 2, C.I0_A), chebyshev(32 / x - 2, C.I0_B) * torch.rsqrt(x))


@special("i0", "special_i0", "special_modified_bessel_i0")
def i0(x: Tensor) -> Tensor:
    return torch.exp(x.abs()) * i0e(x)


@special("special_i1e")
def i1e(x: Tensor) -> Tensor:
    size = x.abs()
    return torch.where(size <= 8, x * chebyshev(size / 2 - 2, C.I1_A), torch.sign(x) * chebyshev(32 / size - 2, C.I1_B) * torch.rsqrt(size))


@special("special_i1", "special_modified_bessel_i1")
def i1(x: Tensor) -> Tensor:
    return torch.exp(x.abs()) * i1e(x)


def _k(x: Tensor, near: Tensor, far: Tensor) -> Tensor:
    return torch.where(x == 0, inf, torch.where(x < 0, nan, torch.where(x <= 2, near, far)))


def _k0(x: Tensor) -> tuple[Tensor, Tensor]:
    return chebyshev(x * x - 2, C.K0_A) - torch.log(0.5 * x) * i0(x), chebyshev(8 / x - 2, C.K0_B) * torch.rsqrt(x)


def _k1(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log(0.5 * x) * i1(x) + chebyshev(x * x - 2, C.K1_A) / x, chebyshev(8 / x - 2, C.K1_B) * torch.rsqrt(x)


@special("special_modified_bessel_k0")
def k0(x: Tensor) -> Tensor:
    near, far = _k0(x)
    return _k(x, near, torch.exp(-x) * far)


@special("special_modified_bessel_k1")
def k1(x: Tensor) -> Tensor:
    near, far = _k1(x)
    return _k(x, near, torch.exp(-x) * far)


@special("special_scaled_modified_bessel_k0")
def k0e(x: Tensor) -> Tensor:
    near, far = _k0(x)
    return _k(x, near * torch.exp(x), far)


@special("special_scaled_modified_bessel_k1")
def k1e(x: Tensor) -> Tensor:
    near, far = _k1(x)
    return _k(x, near * torch.exp(x), far)


@special("special_spherical_bessel_j0")
def spherical_j0(x: Tensor) -> Tensor:
    return torch.where(torch.isinf(x), 0.0, torch.where(x == 0, 1.0, torch.sin(x) / x))


@special("special_airy_ai")
def airy_ai(x: Tensor) -> Tensor:
    """9.7.5 and 9.7.9 beyond 2.09, the Maclaurin series (9.4.1) between."""
    size = x.abs()
    root, zeta = torch.sqrt(torch.sqrt(size)), 2 / 3 * size * torch.sqrt(size)
    w = 1 / zeta
    z, t, scale = w * w, zeta + pi / 4, 1 / (math.sqrt(pi) * root)
    wave = torch.sin(t) * (1 + z * power_series(z, C.AIRY_AFN) / power_series(z, C.AIRY_AFD))
    wave = wave - torch.cos(t) * (w * power_series(z, C.AIRY_AGN) / power_series(z, C.AIRY_AGD))
    falls = power_series(w, C.AIRY_AN) / power_series(w, C.AIRY_AD) * scale / 2 * torch.exp(-zeta)
    cube, m, n, k = x * x * x, torch.ones_like(x), x, 1
    f, g = m, n
    for _ in range(12):
        m, n = m * cube / ((k + 1) * (k + 2)), n * cube / ((k + 2) * (k + 3))
        f, g, k = f + m, g + n, k + 3
    near = 0.355028053887817239260 * f - 0.258819403792806798405 * g
    y = torch.where(x < -2.09, wave * scale, torch.where(x >= 2.09, torch.where(x > 103.892, 0.0, falls), near))
    return torch.where(torch.isinf(x), nan, y)


# ---------------------------------------------------------------- gamma functions

_STIRLING = (1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)  # 5.11.1
_PSI = (1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12)  # 5.11.2


def _turned(x: Tensor) -> Tensor:
    """x less its nearest integer: sin and tan of pi x without the error of a large product."""
    return x - torch.round(x)


@special("lgamma", "special_gammaln")
def lgamma(x: Tensor) -> Tensor:
    """Stirling's series of x + 8 less the logarithm of x (x + 1) .. (x + 7); below 1/2 by reflection (5.5.3)."""
    low = x < 0.5
    y = torch.where(low, 1 - x, x)
    shift = y < 8
    product = torch.ones_like(y)
    for k in range(8):
        product = product * (y + k)
    v = torch.where(shift, y + 8, y)
    z = 1 / v
    value = (v - 0.5) * torch.log(v) - v + 0.5 * math.log(2 * pi) + z * power_series(z * z, _STIRLING)
    value = torch.where(shift, value - torch.log(product), value)
    value = torch.where(torch.isinf(y), inf, value)
    mirrored = math.log(pi) - torch.log(torch.sin(pi * _turned(x)).abs()) - value
    return torch.where(torch.isinf(x), inf, torch.where(low, mirrored, value))


@special("digamma", "special_digamma", "special_psi")
def digamma(x: Tensor) -> Tensor:
    """5.11.2 of x + 10 less the sum of 1 / (x + k); below 0 by reflection (5.5.4)."""
    low = x < 0
    y = torch.where(low, 1 - x, x)
    shift = y < 10
    total = torch.zeros_like(y)
    for k in range(10):
        total = total + 1 / (y + k)
    v = torch.where(shift, y + 10, y)
    z = 1 / (v * v)
    value = torch.log(v) - 0.5 / v - z * power_series(z, _PSI) - torch.where(shift, total, 0.0)
    value = torch.where(low, value - pi / torch.tan(pi * _turned(x)), value)
    value = torch.where(low & (x == torch.floor(x)), nan, value)
    return torch.where(x == 0, torch.copysign(torch.full_like(x, inf), -x), value)


def _trigamma(x: Tensor) -> Tensor:
    """5.15.8 of x + 6 and the sum of 1 / (x + k)^2; below 1/2 by reflection (5.15.6)."""
    low = x < 0.5
    y = torch.where(low, 1 - x, x)
    total = torch.zeros_like(y)
    for k in range(6):
        total = total + 1 / ((y + k) * (y + k))
    v = y + 6
    z = 1 / (v * v)
    value = total + (1 + 0.5 / v + z * (1 / 6 - z * (1 / 30 - z / 42))) / v
    s = torch.sin(pi * x)
    return torch.where(low, pi * pi / (s * s) - value, value)


@decomposed("polygamma")
def polygamma(n: int, x: Tensor) -> Tensor:
    """(-1)^(n + 1) n! zeta(n + 1, x) (25.11.12)."""
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    if n == 0:
        return torch.digamma(x)
    if n == 1:
        return _trigamma(x)
    return torch.special.zeta(torch.full_like(x, n + 1), x) * ((-1) ** (n + 1) * math.factorial(n))


@decomposed("special_polygamma")
def special_polygamma(n: int, x: Tensor) -> Tensor:
    return polygamma(n, x)


# ---------------------------------------------------------------- error functions


@special("special_erfcx")
def erfcx(x: Tensor) -> Tensor:
    """exp(x^2) erfc(x): t times a polynomial of t = 1 / (1 + x / 2); below 0 by 2 exp(x^2) - erfcx(-x)."""
    size = x.abs()
    t = 1 / (1 + size / 2)
    y = t * (2 * chebyshev(4 * t - 2, (*C.ERFCX[:-1], 2 * C.ERFCX[-1])) / 2)
    return torch.where(x < 0, 2 * torch.exp(x * x) - y, y)


@special("special_log_ndtr")
def log_ndtr(x: Tensor) -> Tensor:
    t = x / math.sqrt(2)
    return torch.where(x < -1, torch.log(erfcx(-t) / 2) - t * t, torch.log1p(-torch.erfc(t) / 2))


def _normal_quantile(half: Tensor, tail: Tensor, low: Tensor) -> Tensor:
    """Of the probability 1/2 + ``half``; ``tail``: how much lies beyond it, below where ``low``. Rational in half^2 or in sqrt(-2 log tail)."""
    z = half * half
    central = math.sqrt(2 * pi) * (half + half * (z * power_series(z, C.NDTRI_P0) / power_series(z, C.NDTRI_Q0)))
    x = torch.sqrt(-2 * torch.log(tail))
    w = 1 / x
    near = w * power_series(w, C.NDTRI_P1) / power_series(w, C.NDTRI_Q1)
    far = w * power_series(w, C.NDTRI_P2) / power_series(w, C.NDTRI_Q2)
    y = x - torch.log(x) / x - torch.where(x < 8, near, far)
    y = torch.where(tail == 0, inf, torch.where(tail < 0, nan, y))
    return torch.where(tail > 0.13533528323661269189, central, torch.where(low, -y, y))


@special("special_ndtri")
def ndtri(p: Tensor) -> Tensor:
    return _normal_quantile(p - 0.5, torch.minimum(p, 1 - p), p < 0.5)


@special("erfinv", "special_erfinv")
def erfinv(x: Tensor) -> Tensor:
    return _normal_quantile(0.5 * x, 0.5 * (1 - x.abs()), x < 0) / math.sqrt(2)


# ---------------------------------------------------------------- Chebyshev polynomials


def _angles(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The degree as an integer, the angle (the area beyond 1), whether x is beyond 1, and (-1)^n where x is negative there."""
    n = torch.trunc(n)
    inside = x.abs() <= 1
    odd = (n - 2 * torch.floor(n / 2)) != 0
    flip = torch.where((x < 0) & odd, -1.0, 1.0)
    return n, torch.acos(x), torch.acosh(torch.where(inside, 1.0, x.abs())), inside, flip


def _chebyshev(kind: str, x: Tensor, n: Tensor) -> Tensor:
    """cos and sin of multiples of the angle (18.5.1 - 18.5.4), cosh and sinh beyond 1; 0 for negative degrees."""
    n, a, b, inside, flip = _angles(x, n)
    up = x > 0
    if kind == "t":
        y = torch.where(inside, torch.cos(n * a), flip * torch.cosh(n * b))
    elif kind == "u":
        near = torch.where(x.abs() == 1, flip * (n + 1), torch.sin((n + 1) * a) / torch.sin(a))
        y = torch.where(inside, near, flip * torch.sinh((n + 1) * b) / torch.sinh(b))
    else:
        k = n + 0.5
        grows, stays = torch.sinh(k * b) / torch.sinh(b / 2), torch.cosh(k * b) / torch.cosh(b / 2)
        if kind == "v":
            near = torch.where(x == -1, flip * (2 * n + 1), torch.cos(k * a) / torch.cos(a / 2))
            y = torch.where(inside, near, torch.where(up, stays, flip * grows))
        else:
            near = torch.where(x == 1, 2 * n + 1, torch.sin(k * a) / torch.sin(a / 2))
            y = torch.where(inside, near, torch.where(up, grows, flip * stays))
    return torch.where(n < 0, 0.0, y)


def _register(kind: str) -> None:
    def pair(x: Any, n: Any) -> tuple[Tensor, Tensor]:
        like = x if isinstance(x, Tensor) else n
        return tuple(v if isinstance(v, Tensor) else torch.full_like(like, v) for v in (x, n))  # type: ignore[return-value]

    @special(f"special_chebyshev_polynomial_{kind}")
    def plain(x: Any, n: Any) -> Tensor:
        return _chebyshev(kind, *pair(x, n))

    @special(f"special_shifted_chebyshev_polynomial_{kind}")
    def shifted(x: Any, n: Any) -> Tensor:
        a, b = pair(x, n)
        return _chebyshev(kind, a + a - 1, b)


for _kind in "tuvw":
    _register(_kind)
