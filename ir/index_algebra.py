"""Index arithmetic in one normal form: a sum of monomials with integer coefficients, its bounds, division and comparisons.

The constructors of :mod:`luthier.ir.construct` come here for everything of type ``index``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, index
from luthier.ir.node import MEMOS, UNSET, Expr, as_expr, const, free_vars, make_node

_poly_memo: dict[Any, Expr] = {}
MEMOS.append(_poly_memo)

Poly = dict[tuple[Expr, ...], int]


def linear(e: Expr) -> Poly:
    """``e`` (index) as {monomial: coefficient}; a monomial is a sorted tuple of atoms, () is the constant. Do not mutate."""
    p: Any = e._poly
    if p is UNSET:
        if e.op == "const":
            p = {(): e.attr} if e.attr else {}
        elif e.op == "add":
            p = add_linear(linear(e.args[0]), linear(e.args[1]), 1)
        elif e.op == "sub":
            p = add_linear(linear(e.args[0]), linear(e.args[1]), -1)
        elif e.op == "mul":
            p = mul_linear(linear(e.args[0]), linear(e.args[1]))
        else:
            p = {(e,): 1}
        e._poly = p
    return p  # type: ignore[no-any-return]


def add_linear(a: Poly, b: Poly, s: int) -> Poly:
    r = dict(a)
    for m, c in b.items():
        v = r.get(m, 0) + s * c
        if v:
            r[m] = v
        else:
            r.pop(m, None)
    return r


def mul_linear(a: Poly, b: Poly) -> Poly:
    r: Poly = {}
    for m, c in a.items():
        for n, d in b.items():
            k = tuple(sorted(m + n, key=lambda x: x.key)) if m and n else m or n
            v = r.get(k, 0) + c * d
            if v:
                r[k] = v
            else:
                r.pop(k, None)
    return r


MAX_TERMS = 1024  # of a product that is multiplied out
MAX_DEGREE = 32


def _degree(p: Poly) -> int:
    return max(map(len, p), default=0)


def _opaque(e: Expr) -> Expr:
    """A product that is not multiplied out: an atom to the algebra."""
    e._poly = {(e,): 1}
    return e


def is_atom(e: Expr) -> bool:
    """Whether index algebra does not look into ``e``."""
    return (e,) in linear(e)


def from_linear(p: Poly) -> Expr:
    if not p:
        return const(0)
    if len(p) == 1:
        ((m, c),) = p.items()
        if not m:
            return const(c)
        if c == 1 and len(m) == 1:
            return m[0]
    k = frozenset(p.items())
    e = _poly_memo.get(k)
    if e is None:
        if len(_poly_memo) > 200_000:
            _poly_memo.clear()
        e = _poly_memo[k] = _sum(p)
    return e


def _sum(p: Poly) -> Expr:
    out: Expr | None = None
    c0 = p.get((), 0)
    for m in sorted((m for m in p if m), key=lambda m: (tuple(x.key for x in m))):
        t = m[0]
        for a in m[1:]:
            t = make_node("mul", index, (t, a))
        if p[m] != 1:
            t = make_node("mul", index, (t, const(p[m])))
        out = t if out is None else make_node("add", index, (out, t))
    assert out is not None
    if c0:
        out = make_node("add", index, (out, const(c0)))
    if out._poly is UNSET:
        out._poly = p
    return out


def poly_const(e: Expr) -> int:
    """The constant term of an index expression."""
    return linear(e).get((), 0)


def affine_parts(x: Expr, vs: frozenset[Expr]) -> tuple[Expr, int, list[tuple[Expr, int]]] | None:
    """(part without ``vs``, constant, coefficients of ``vs``) of an index expression; None where it is not affine in them."""
    rest: Poly = {}
    coefs: list[tuple[Expr, int]] = []
    c0 = 0
    for m, c in linear(x).items():
        if not m:
            c0 = c
        elif len(m) == 1 and m[0] in vs:
            coefs.append((m[0], c))
        elif any(not vs.isdisjoint(free_vars(a)) for a in m):
            return None
        else:
            rest[m] = c
    return from_linear(rest), c0, coefs


def rejoin(e: Expr) -> Expr:
    """``x // d * d + x % d`` is ``x`` (an index of fused loops that is taken apart and put together again), times any factor."""
    terms = linear(e)
    for m, c in terms.items():
        for a in m:
            if a.op != "mod":
                continue
            x, d = a.args
            rest = list(m)
            rest.remove(a)
            factor = {tuple(rest): c}
            whole = mul_linear(linear(x // d * d), factor)
            if whole and all(terms.get(k) == v for k, v in whole.items()):
                return rejoin(from_linear(add_linear(add_linear(add_linear(terms, whole, -1), {m: c}, -1), mul_linear(linear(x), factor), 1)))
    return e


def add_const(base: Expr, c: int) -> Expr:
    """An index expression without a constant term plus ``c``."""
    if not c:
        return base
    return const(c) if base.op == "const" else make_node("add", index, (base, const(c)))


# ---------------------------------------------------------------- bounds

Bounds = tuple[int | None, int | None]


def bounds(e: Expr) -> Bounds:
    """Inclusive (lo, hi) of an integer expression; None is unbounded. Interval arithmetic over variable bounds."""
    b = e._bounds
    if b is UNSET:
        b = e._bounds = _bounds(e)
    return b  # type: ignore[no-any-return]


def _bounds(e: Expr) -> Bounds:
    op = e.op
    if op == "const":
        return (int(e.attr), int(e.attr)) if not e.dtype.is_float else (None, None)
    if op == "var":
        lo, hi = e.attr[1], e.attr[2]
        return lo, bounds(hi)[1] if isinstance(hi, Expr) else hi
    if e.dtype.is_bool:
        return 0, 1
    if op == "ramp":
        (lo, hi), ext = bounds(e.args[0]), e.attr[0] * (e.dtype.lanes - 1)
        return (None if lo is None else lo + min(0, ext)), (None if hi is None else hi + max(0, ext))
    if op == "bcast":
        return bounds(e.args[0])
    if op == "cast" and e.dtype.is_index and (e.args[0].dtype.is_int or e.args[0].dtype.is_bool):
        lo, hi = bounds(e.args[0])
        a = e.args[0].dtype
        if lo is None and hi is None and a.bits <= 32:
            return a.limits()
        return lo, hi
    if op == "load" and e.dtype.is_int and e.dtype.bits <= 32:
        return e.dtype.scalar.limits()
    if not e.dtype.is_index:
        return None, None
    if op in ("floordiv", "div") and e.args[1].op == "const" and e.args[1].attr > 0:
        lo, hi = bounds(e.args[0])
        d = e.args[1].attr
        if op == "div" and (lo is None or lo < 0):
            return None, None
        return (None if lo is None else lo // d), (None if hi is None else hi // d)
    if op == "floordiv":
        lo, hi = bounds(e.args[0])
        dlo, _ = bounds(e.args[1])
        return (0, hi) if lo is not None and lo >= 0 and dlo is not None and dlo >= 0 else (None, None)
    if op == "mod":
        d = e.args[1]
        dlo, dhi = bounds(d)
        return (0, None if dhi is None else max(dhi - 1, 0)) if dlo is not None and dlo >= 0 else (None, None)
    if op == "mul" and is_atom(e):
        return _bmul(bounds(e.args[0]), bounds(e.args[1]))
    if op in ("add", "sub", "mul"):
        lo_s: int | None = 0
        hi_s: int | None = 0
        for m, c in linear(e).items():
            lo, hi = 1, 1
            for a in m:
                lo, hi = _bmul((lo, hi), bounds(a))  # type: ignore[assignment]
            if c < 0:
                lo, hi = hi, lo
            lo_s = None if lo_s is None or lo is None else lo_s + c * lo
            hi_s = None if hi_s is None or hi is None else hi_s + c * hi
        return lo_s, hi_s
    if op in ("min", "max"):
        (a, b), (c, d) = bounds(e.args[0]), bounds(e.args[1])
        if op == "min":
            return (None if a is None or c is None else min(a, c)), (d if b is None else b if d is None else min(b, d))
        return (c if a is None else a if c is None else max(a, c)), (None if b is None or d is None else max(b, d))
    if op == "select":
        (a, b), (c, d) = bounds(e.args[1]), bounds(e.args[2])
        return (None if a is None or c is None else min(a, c)), (None if b is None or d is None else max(b, d))
    return None, None


def _bmul(x: Bounds, y: Bounds) -> Bounds:
    (a, b), (c, d) = x, y
    if a is not None and a >= 0 and c is not None and c >= 0:
        return a * c, None if b is None or d is None else b * d
    if a is None or b is None or c is None or d is None:
        return None, None
    p = (a * c, a * d, b * c, b * d)
    return min(p), max(p)


def prove(cond: Expr) -> bool:
    """True when ``cond`` folded to the constant true (conditions fold by bounds when they are built)."""
    return cond.op == "const" and bool(cond.attr)


def _var_below(e: Expr, n: Expr) -> bool:
    """0 <= e < n for a variable whose recorded upper bound is the expression n - 1."""
    return e.op == "var" and e.attr[1] is not None and e.attr[1] >= 0 and isinstance(e.attr[2], Expr) and e.attr[2] is n - 1


# ---------------------------------------------------------------- operators


def fold(op: str, dtype: DType, *vals: Any) -> Any:
    from luthier.ir.interpret.semantics import evaluate

    with np.errstate(all="ignore"):
        return evaluate(op, dtype, *vals)


def index_binary(op: str, a: Expr, b: Expr) -> Expr:
    if op in ("add", "sub"):
        if b.op == "const" and b.attr == 0:
            return a
        return from_linear(add_linear(linear(a), linear(b), 1 if op == "add" else -1))
    if op == "mul":
        p, q = linear(a), linear(b)
        if len(p) * len(q) > MAX_TERMS or _degree(p) + _degree(q) > MAX_DEGREE:  # written out it would be exponentially long
            return _opaque(make_node("mul", index, (a, b)))
        return from_linear(mul_linear(p, q))
    if op in ("div", "rem") and (bounds(a)[0] or 0) >= 0 and bounds(a)[0] is not None and (bounds(b)[0] or 0) > 0:
        op = "floordiv" if op == "div" else "mod"
    if op in ("floordiv", "mod"):
        return divide(op, a, b)
    if a.op == "const" and b.op == "const":
        return const(int(fold(op, index, np.int64(a.attr), np.int64(b.attr))))
    if op in ("min", "max"):
        if a is b:
            return a
        lo, hi = bounds(a - b)
        if (hi is not None and hi <= 0) or (lo is not None and lo >= 0):
            a_small = hi is not None and hi <= 0
            return a if a_small == (op == "min") else b
        if part_below(a, b + 1):
            return a if op == "min" else b
        if part_below(b, a + 1):
            return b if op == "min" else a
        if a.key > b.key:
            a, b = b, a
    return make_node(op, index, (a, b))


def divide(op: str, a: Expr, b: Expr) -> Expr:
    if b.op == "const":
        c = b.attr
        if c == 0:
            return const(0)
        if c == 1:
            return a if op == "floordiv" else const(0)
        if c > 0:
            quot: Poly = {}
            rest: Poly = {}
            for m, k in linear(a).items():
                if m:
                    if k % c == 0:
                        quot[m] = k // c
                    else:
                        rest[m] = k
                elif k // c or k % c:
                    if k // c:
                        quot[m] = k // c
                    if k % c:
                        rest[m] = k % c
            r = from_linear(rest)
            lo, hi = bounds(r)
            if lo is not None and hi is not None and lo // c == hi // c:  # the quotient of the rest is one number
                q0 = lo // c
                return from_linear(quot) + q0 if op == "floordiv" else r - q0 * c
            # floor((g x + s) / (g c')) = floor(x / c') where 0 <= s < g: terms below g drop out
            for g in sorted({math.gcd(c, k) for m, k in rest.items() if m} - {1}, reverse=True):
                small = from_linear({m: k for m, k in rest.items() if m and k % g} | ({(): rest[()] % g} if rest.get((), 0) % g else {}))
                slo, shi = bounds(small)
                if slo is None or shi is None or slo < 0 or shi >= g:
                    continue
                x = from_linear({m: k // g for m, k in rest.items() if m and k % g == 0}) + rest.get((), 0) // g
                if op == "floordiv":
                    return from_linear(quot) + divide("floordiv", x, const(c // g))
                return divide("mod", x, const(c // g)) * g + small
            if op == "floordiv":
                if r.op == "floordiv" and r.args[1].op == "const" and r.args[1].attr > 0:
                    return from_linear(quot) + divide("floordiv", r.args[0], const(c * r.args[1].attr))
                return from_linear(quot) + make_node("floordiv", index, (r, b))
            if r.op == "mod" and r.args[1].op == "const" and r.args[1].attr % c == 0:
                return divide("mod", r.args[0], b)
            return make_node("mod", index, (r, b))
        if a.op == "const":
            return const(a.attr // c if op == "floordiv" else a.attr % c)
    elif a.op == "const" and a.attr == 0:
        return a
    else:
        bp = linear(b)
        if len(bp) == 1:
            ((bm, bc),) = bp.items()
            quot, rest = {}, {}
            for m, k in linear(a).items():
                left = list(m)
                ok = k % bc == 0 and bc > 0
                for t in bm:
                    if ok and t in left:
                        left.remove(t)
                    else:
                        ok = False
                if ok:
                    quot[tuple(left)] = k // bc
                else:
                    rest[m] = k
            r = from_linear(rest)
            if not rest or _var_below(r, b) or is_below(r, b):
                return from_linear(quot) if op == "floordiv" else r
            if quot:
                q = make_node("floordiv", index, (r, b))
                return from_linear(quot) + q if op == "floordiv" else make_node("mod", index, (r, b))
    return make_node(op, index, (a, b))


def part_below(r: Expr, n: Expr) -> bool:
    """0 <= r < n for a part of an index of fused loops: ``x // d < n`` follows from ``x < n * d``, ``x % d < d`` from ``x < k * d`` for
    any k (x >= 0, so that d is positive)."""
    if r.op not in ("floordiv", "mod") or r.args[1].op == "const":
        return False
    x, d = r.args
    if r.op == "floordiv":
        return is_below(x, n * d)
    if n is not d or x.op != "var" or not isinstance(x.attr[2], Expr) or x.attr[1] is None or x.attr[1] < 0:
        return False
    below = linear(x.attr[2] + 1)
    return all(any(set(k) <= set(m) for k in linear(d)) for m in below) and len(linear(d)) == 1


def is_below(r: Expr, n: Expr) -> bool:
    """0 <= r < n, replacing variables by their upper bounds one after another, those with bounds over other variables first."""
    if part_below(r, n):
        return True
    lo, _ = bounds(r)
    if lo is None or lo < 0:
        return False
    p = add_linear(linear(n), linear(r), -1)
    while not _positive(p, 4):
        falling = {a for m, c in p.items() for a in m if c < 0 and a.op == "var" and (isinstance(a.attr[2], Expr) or (len(m) == 1 and a.attr[2] is not None))}
        rising = {a for m, c in p.items() for a in m if c > 0}
        todo = [a for a in falling if a not in rising]  # p is smallest where these are largest
        if not todo:
            return False
        v = max(todo, key=lambda x: (isinstance(x.attr[2], Expr) and any(y in free_vars(x.attr[2]) for y in todo), isinstance(x.attr[2], Expr), x.key))
        hi = linear(as_expr(v.attr[2]))
        q: Poly = {}
        for m, c in p.items():
            t: Poly = {(): c}
            for a in m:
                t = mul_linear(t, hi if a is v else {(a,): 1})
            q = add_linear(q, t, 1)
        if q == p:
            return False
        p = q
    return True


def _positive(p: Poly, depth: int) -> bool:
    """p > 0, using d * (x // d) = x - x % d and, where it helps, -min(a, b) >= -a and >= -b."""
    for m, c in p.items():
        if len(m) == 1 and m[0].op == "floordiv" and m[0].args[1].op == "const" and m[0].args[1].attr > 0 and c % m[0].args[1].attr == 0:
            x, d = m[0].args
            k = c // d.attr
            rest = {q: v for q, v in p.items() if q != m}
            rest = add_linear(rest, mul_linear(linear(x), {(): k}), 1)
            return _positive(add_linear(rest, mul_linear(linear(divide("mod", x, d)), {(): k}), -1), depth)
    low, _ = bounds(from_linear(p))
    if low is not None and low > 0:
        return True
    if depth:
        for m, c in p.items():
            if len(m) == 1 and m[0].op == "min" and c < 0:
                rest = {q: v for q, v in p.items() if q != m}
                return any(_positive(add_linear(rest, mul_linear(linear(a), {(): c}), 1), depth - 1) for a in m[0].args)
    return False
