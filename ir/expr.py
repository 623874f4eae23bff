"""Expr: a frozen, hash-consed scalar expression.

Two structurally equal expressions are the same object, so ``is`` compares, memo tables key on identity, and common
subexpressions are shared by construction. Constructors fold constants and keep index arithmetic in one normal form (a sum
of monomials with integer coefficients, constant last), so there is no separate index simplifier to call.

Semantics of the operators (``OPS``); every backend and the interpreter implement exactly these:

* integers wrap; ``index`` never overflows; float arithmetic is IEEE, multiply and add may be contracted to an FMA.
* ``div``: float division, or integer division truncating toward zero; ``rem`` its remainder (C ``fmod`` on floats).
  ``floordiv``/``mod``: floor semantics on integers (``mod`` takes the divisor's sign). A zero integer divisor gives 0.
* ``shl``/``shr``: a shift of at least the width gives 0 (``shr`` of a signed value: the sign). ``shr`` is arithmetic on ``i``.
* ``min(a, b) = a < b ? a : b`` and ``max(a, b) = a > b ? a : b``: **b when either is NaN** (one instruction on x86 and WASM).
* comparisons with NaN are false, except ``ne``.
* ``cast`` float to int truncates toward zero and saturates, NaN gives 0; int to int wraps; int to float rounds to nearest
  even; anything to bool is ``!= 0``. ``bitcast`` keeps the bits.
* ``round`` is half to even. ``select(c, a, b)`` evaluates both sides but loads of the side not taken must still be in bounds
  (use a masked load where they are not).
* ``load(buf, idx..., [mask, other])``: with a false mask no access happens and the value is ``other``.
* ``reduce`` (attr: monoid name and axes; args: values, then an optional ``where``) appears only in ``Compute``.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, boolean, f64, index

__all__ = [
    "Expr", "const", "var", "load", "cast", "bitcast", "select", "minimum", "maximum", "unary", "binary", "floordiv", "mod",
    "ramp", "bcast", "vreduce", "shuffle", "extract", "call", "proj", "bounds", "substitute", "rewrite", "walk", "free_vars", "loads",
    "linear", "as_expr", "land", "lor", "lnot", "is_const", "UNARY", "BINARY", "COMPARE", "prove", "poly_const",
]

UNARY = frozenset(
    "neg abs floor ceil round trunc sqrt rsqrt exp exp2 log log2 expm1 log1p tanh sigmoid erf sin cos tan asin acos atan sinh cosh asinh acosh "
    "atanh not isnan isinf popcount".split()
)
BINARY = frozenset("add sub mul div rem floordiv mod min max and or xor shl shr pow atan2".split())
COMPARE = frozenset("lt le eq ne".split())
_table: dict[Any, Expr] = {}
Number = int | float | bool
_UNSET: Any = object()
_index_memo: dict[Any, Expr] = {}
_poly_memo: dict[frozenset[Any], Expr] = {}
_limit = [1_000_000]


class Expr:
    """One node. ``op``: operator; ``dtype``: type of the value; ``args``: operands; ``attr``: what is not an operand; ``loading``:
    whether a load is inside."""

    __slots__ = ("op", "dtype", "args", "attr", "_bounds", "_vars", "_poly", "_key", "loading", "__weakref__")
    op: str
    dtype: DType
    args: tuple[Expr, ...]
    attr: Any
    _bounds: Any
    _vars: Any
    _poly: Any
    _key: str | None
    loading: bool  # a load is inside

    def __repr__(self) -> str:
        from luthier.ir.printer import format_expr

        return format_expr(self)

    def __bool__(self) -> bool:
        if self.op == "const":
            return bool(self.attr)
        raise TypeError(f"the truth of {self!r} is not known at compile time")

    def __add__(self, o: Any) -> Expr:
        return binary("add", self, o)

    def __radd__(self, o: Any) -> Expr:
        return binary("add", as_expr(o, self.dtype), self)

    def __sub__(self, o: Any) -> Expr:
        return binary("sub", self, o)

    def __rsub__(self, o: Any) -> Expr:
        return binary("sub", as_expr(o, self.dtype), self)

    def __mul__(self, o: Any) -> Expr:
        return binary("mul", self, o)

    def __rmul__(self, o: Any) -> Expr:
        return binary("mul", as_expr(o, self.dtype), self)

    def __truediv__(self, o: Any) -> Expr:
        return binary("div", self, o)

    def __rtruediv__(self, o: Any) -> Expr:
        return binary("div", as_expr(o, self.dtype), self)

    def __floordiv__(self, o: Any) -> Expr:
        return binary("floordiv", self, o)

    def __rfloordiv__(self, o: Any) -> Expr:
        return binary("floordiv", as_expr(o, self.dtype), self)

    def __mod__(self, o: Any) -> Expr:
        return binary("mod", self, o)

    def __neg__(self) -> Expr:
        return unary("neg", self)

    def __and__(self, o: Any) -> Expr:
        return binary("and", self, o)

    def __or__(self, o: Any) -> Expr:
        return binary("or", self, o)

    def __xor__(self, o: Any) -> Expr:
        return binary("xor", self, o)

    def __lshift__(self, o: Any) -> Expr:
        return binary("shl", self, o)

    def __rshift__(self, o: Any) -> Expr:
        return binary("shr", self, o)

    def __invert__(self) -> Expr:
        return unary("not", self)

    def __lt__(self, o: Any) -> Expr:
        return compare("lt", self, o)

    def __le__(self, o: Any) -> Expr:
        return compare("le", self, o)

    def __gt__(self, o: Any) -> Expr:
        return compare("lt", as_expr(o, self.dtype), self)

    def __ge__(self, o: Any) -> Expr:
        return compare("le", as_expr(o, self.dtype), self)

    # == stays identity (hash-consing); use .eq / .ne for the comparison as an expression
    def eq(self, o: Any) -> Expr:
        return compare("eq", self, o)

    def ne(self, o: Any) -> Expr:
        return compare("ne", self, o)

    def cast(self, dtype: DType) -> Expr:
        return cast(self, dtype)

    @property
    def key(self) -> str:
        """A text that orders expressions the same way in every process."""
        k = self._key
        if k is None:
            if self.op == "var":
                k = self.attr[0]
            elif self.op == "const":
                k = repr(self.attr)
            else:
                tag = self.attr.name if hasattr(self.attr, "name") else self.attr[0].name if self.op == "load" else ""
                k = f"~{self.op}{tag}({','.join(a.key for a in self.args)})"
            self._key = k
        return k


_new = object.__new__


def _mk(op: str, dtype: DType, args: tuple[Expr, ...] = (), attr: Any = None) -> Expr:
    """The interned node, unsimplified. Use the constructors below; passes that rebuild nodes use :func:`rebuild`."""
    k = (op, dtype, args, struct.pack("<d", attr) if type(attr) is float else attr)
    e = _table.get(k)
    if e is None:
        e = _new(Expr)
        e.loading = op == "load"
        if not e.loading:
            for a in args:
                if a.loading:
                    e.loading = True
                    break
        e.op, e.dtype, e.args, e.attr = op, dtype, args, attr
        e._bounds = e._vars = e._poly = _UNSET
        e._key = None
        _table[k] = e
        if len(_table) > _limit[0]:
            collect()
    return e


def collect() -> None:
    """Forget interned expressions that nothing else refers to (parents before their operands). Runs by itself as the table grows."""
    _index_memo.clear()
    _poly_memo.clear()
    keys = list(_table)
    while keys:
        k = keys.pop()
        e = _table[k]
        if sys.getrefcount(e) <= 3:
            del e, _table[k]
        del k
    _limit[0] = max(1_000_000, 2 * len(_table))


# ---------------------------------------------------------------- leaves


def const(value: Number, dtype: DType = index) -> Expr:
    """A constant, rounded or wrapped to ``dtype`` (broadcast when ``dtype`` has lanes)."""
    if dtype is index and type(value) is int and -(1 << 62) < value < 1 << 62:
        return _mk("const", index, (), value)
    s = dtype.scalar
    if s.is_bool:
        v: Any = bool(value)
    elif s.is_float:
        v = float(value)
        if s is not f64 and not (math.isnan(v) or math.isinf(v)):
            with np.errstate(over="ignore"):
                v = float(np.asarray(v).astype(s.numpy))
    else:
        v = int(value)
        if s.bits < 64 or s.kind == "u" or not -(1 << 63) <= v < (1 << 63):
            v &= (1 << s.bits) - 1
            if s.is_signed and v >> (s.bits - 1):
                v -= 1 << s.bits
    e = _mk("const", s, (), v)
    return e if dtype.lanes == 1 else bcast(e, dtype.lanes)


def var(name: str, dtype: DType = index, lo: int | None = 0, hi: int | Expr | None = None) -> Expr:
    """A variable. ``lo``/``hi``: inclusive bounds of an integer variable; ``hi`` may be an Expr, None means unbounded."""
    if isinstance(hi, Expr) and hi.op == "const":
        hi = int(hi.attr)
    if not (dtype.is_index or dtype.is_int):
        lo = hi = None
    return _mk("var", dtype, (), (name, lo, hi))


def as_expr(v: Any, dtype: DType = index) -> Expr:
    if isinstance(v, Expr):
        return v
    if isinstance(v, (bool, np.bool_)):
        return const(bool(v), boolean if not dtype.is_bool else dtype)
    if isinstance(v, (int, float, np.integer, np.floating)):
        return const(v.item() if isinstance(v, np.generic) else v, dtype)
    raise TypeError(f"cannot use {v!r} as an expression")


def is_const(e: Expr, value: Any = _UNSET) -> bool:
    if e.op == "bcast":
        e = e.args[0]
    return e.op == "const" and (value is _UNSET or (e.attr == value and not (value == 0 and isinstance(e.attr, float) and math.copysign(1, e.attr) < 0)))


# ---------------------------------------------------------------- polynomials over index atoms

Poly = dict[tuple[Expr, ...], int]


def linear(e: Expr) -> Poly:
    """``e`` (index) as {monomial: coefficient}; a monomial is a sorted tuple of atoms, () is the constant. Do not mutate."""
    p: Any = e._poly
    if p is _UNSET:
        if e.op == "const":
            p = {(): e.attr} if e.attr else {}
        elif e.op == "add":
            p = _padd(linear(e.args[0]), linear(e.args[1]), 1)
        elif e.op == "sub":
            p = _padd(linear(e.args[0]), linear(e.args[1]), -1)
        elif e.op == "mul":
            p = _pmul(linear(e.args[0]), linear(e.args[1]))
        else:
            p = {(e,): 1}
        e._poly = p
    return p  # type: ignore[no-any-return]


def _padd(a: Poly, b: Poly, s: int) -> Poly:
    r = dict(a)
    for m, c in b.items():
        v = r.get(m, 0) + s * c
        if v:
            r[m] = v
        else:
            r.pop(m, None)
    return r


def _pmul(a: Poly, b: Poly) -> Poly:
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


def _from_poly(p: Poly) -> Expr:
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
            t = _mk("mul", index, (t, a))
        if p[m] != 1:
            t = _mk("mul", index, (t, const(p[m])))
        out = t if out is None else _mk("add", index, (out, t))
    assert out is not None
    if c0:
        out = _mk("add", index, (out, const(c0)))
    if out._poly is _UNSET:
        out._poly = p
    return out


def poly_const(e: Expr) -> int:
    """The constant term of an index expression."""
    return linear(e).get((), 0)


# ---------------------------------------------------------------- bounds

Bounds = tuple[int | None, int | None]


def bounds(e: Expr) -> Bounds:
    """Inclusive (lo, hi) of an integer expression; None is unbounded. Interval arithmetic over variable bounds."""
    b = e._bounds
    if b is _UNSET:
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


# ---------------------------------------------------------------- constructors


def _np_fold(op: str, dtype: DType, *vals: Any) -> Any:
    from luthier.ir.semantics import evaluate

    with np.errstate(all="ignore"):
        return evaluate(op, dtype, *vals)


def unary(op: str, a: Expr) -> Expr:
    """One of ``UNARY``. ``isnan``/``isinf`` give bool, everything else the operand's type."""
    d = a.dtype
    out = boolean.vec(d.lanes) if op in ("isnan", "isinf") else d
    if op == "neg" and d.is_index:
        return const(0) - a
    if a.op == "const":
        return const(_np_fold(op, out, _typed(a)), out)
    if a.op == op and op in ("neg", "not"):
        return a.args[0]
    if op == "not" and a.op in COMPARE and not a.args[0].dtype.is_float:
        x, y = a.args
        return {"lt": lambda: y <= x, "le": lambda: y < x, "eq": lambda: x.ne(y), "ne": lambda: x.eq(y)}[a.op]()
    if op in ("isnan", "isinf") and not d.is_float:
        return const(False, out)
    if op in ("floor", "ceil", "round", "trunc") and not d.is_float:
        return a
    if op not in UNARY:
        raise ValueError(f"no unary operator {op!r}")
    return _mk(op, out, (a,))


def _typed(e: Expr) -> Any:
    return np.asarray(e.attr).astype(e.dtype.numpy)[()]


def _match(a: Any, b: Any) -> tuple[Expr, Expr]:
    if not isinstance(a, Expr):
        a = as_expr(a, b.dtype)
    if not isinstance(b, Expr):
        b = as_expr(b, a.dtype)
    if a.dtype is not b.dtype:
        la, lb = a.dtype.lanes, b.dtype.lanes
        if la != lb and 1 in (la, lb):
            a, b = (bcast(a, lb), b) if la == 1 else (a, bcast(b, la))
        if a.dtype is not b.dtype:
            raise TypeError(f"operands differ in type: {a!r} is {a.dtype}, {b!r} is {b.dtype}; cast one of them")
    return a, b


_FOLDING = frozenset(("const", "bcast"))  # operands that a constructor may fold
_FLOAT_IDENT = {"mul": 1.0, "div": 1.0}


def binary(op: str, a: Any, b: Any) -> Expr:
    """One of ``BINARY`` on two operands of one type (Python numbers take the other's type; scalars broadcast to lanes)."""
    a, b = _match(a, b)
    d = a.dtype
    if op not in BINARY:
        raise ValueError(f"no binary operator {op!r}")
    if d.is_index and d.lanes == 1:
        r = _index_memo.get((op, a, b))
        if r is None:
            if len(_index_memo) > 200_000:
                _index_memo.clear()
            r = _index_memo[(op, a, b)] = _index_binary(op, a, b)
        return r
    if a.op == "const" and b.op == "const":
        return const(_np_fold(op, d, _typed(a), _typed(b)), d)
    if d.is_index:  # vectors of indices: keep ramps and broadcasts outermost
        r = _ramp_binary(op, a, b)
        if r is not None:
            return r
    if a.op == "bcast" and b.op == "bcast":
        return bcast(binary(op, a.args[0], b.args[0]), d.lanes)
    if op in _FLOAT_IDENT and is_const(b, _FLOAT_IDENT[op]):
        return a
    if op == "mul" and is_const(a, 1):
        return b
    if op == "div" and d.is_float and b.op == "const" and b.attr != 0 and math.isfinite(b.attr):
        m, _ = math.frexp(b.attr)
        if abs(m) == 0.5 and math.isfinite(1.0 / b.attr):  # a power of two: the reciprocal is exact
            return binary("mul", a, const(1.0 / b.attr, d))
    if not d.is_float:
        if op in ("add", "sub", "or", "xor", "shl", "shr") and is_const(b, 0):
            return a
        if op in ("add", "or", "xor") and is_const(a, 0):
            return b
        if op in ("mul", "and") and (is_const(a, 0) or is_const(b, 0)):
            return const(0, d)
        if op in ("min", "max", "and", "or") and a is b:
            return a
    if d.is_bool:
        for x, y in ((a, b), (b, a)):
            if is_const(x):
                t = bool(x.attr if x.op == "const" else x.args[0].attr)
                if op == "and":
                    return y if t else x
                if op == "or":
                    return x if t else y
                if op == "xor":
                    return unary("not", y) if t else y
    return _mk(op, d, (a, b))


def _index_binary(op: str, a: Expr, b: Expr) -> Expr:
    if op in ("add", "sub"):
        if b.op == "const" and b.attr == 0:
            return a
        return _from_poly(_padd(linear(a), linear(b), 1 if op == "add" else -1))
    if op == "mul":
        return _from_poly(_pmul(linear(a), linear(b)))
    if op in ("div", "rem") and (bounds(a)[0] or 0) >= 0 and bounds(a)[0] is not None and (bounds(b)[0] or 0) > 0:
        op = "floordiv" if op == "div" else "mod"
    if op in ("floordiv", "mod"):
        return _divmod(op, a, b)
    if a.op == "const" and b.op == "const":
        return const(int(_np_fold(op, index, np.int64(a.attr), np.int64(b.attr))))
    if op in ("min", "max"):
        if a is b:
            return a
        lo, hi = bounds(a - b)
        if (hi is not None and hi <= 0) or (lo is not None and lo >= 0):
            a_small = hi is not None and hi <= 0
            return a if a_small == (op == "min") else b
        if a.key > b.key:
            a, b = b, a
    return _mk(op, index, (a, b))


def _divmod(op: str, a: Expr, b: Expr) -> Expr:
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
            r = _from_poly(rest)
            lo, hi = bounds(r)
            if lo is not None and hi is not None and lo // c == hi // c:  # the quotient of the rest is one number
                q0 = lo // c
                return _from_poly(quot) + q0 if op == "floordiv" else r - q0 * c
            # floor((g x + s) / (g c')) = floor(x / c') where 0 <= s < g: terms below g drop out
            for g in sorted({math.gcd(c, k) for m, k in rest.items() if m} - {1}, reverse=True):
                small = _from_poly({m: k for m, k in rest.items() if m and k % g} | ({(): rest[()] % g} if rest.get((), 0) % g else {}))
                slo, shi = bounds(small)
                if slo is None or shi is None or slo < 0 or shi >= g:
                    continue
                x = _from_poly({m: k // g for m, k in rest.items() if m and k % g == 0}) + rest.get((), 0) // g
                if op == "floordiv":
                    return _from_poly(quot) + _divmod("floordiv", x, const(c // g))
                return _divmod("mod", x, const(c // g)) * g + small
            if op == "floordiv":
                if r.op == "floordiv" and r.args[1].op == "const" and r.args[1].attr > 0:
                    return _from_poly(quot) + _divmod("floordiv", r.args[0], const(c * r.args[1].attr))
                return _from_poly(quot) + _mk("floordiv", index, (r, b))
            if r.op == "mod" and r.args[1].op == "const" and r.args[1].attr % c == 0:
                return _divmod("mod", r.args[0], b)
            return _mk("mod", index, (r, b))
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
            r = _from_poly(rest)
            if not rest or _var_below(r, b) or _below(r, b):
                return _from_poly(quot) if op == "floordiv" else r
            if quot:
                q = _mk("floordiv", index, (r, b))
                return _from_poly(quot) + q if op == "floordiv" else _mk("mod", index, (r, b))
    return _mk(op, index, (a, b))


def _below(r: Expr, n: Expr) -> bool:
    """0 <= r < n, replacing variables by their upper bounds one after another, those with bounds over other variables first."""
    lo, _ = bounds(r)
    if lo is None or lo < 0:
        return False
    p = _padd(linear(n), linear(r), -1)
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
                t = _pmul(t, hi if a is v else {(a,): 1})
            q = _padd(q, t, 1)
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
            rest = _padd(rest, _pmul(linear(x), {(): k}), 1)
            return _positive(_padd(rest, _pmul(linear(_divmod("mod", x, d)), {(): k}), -1), depth)
    low, _ = bounds(_from_poly(p))
    if low is not None and low > 0:
        return True
    if depth:
        for m, c in p.items():
            if len(m) == 1 and m[0].op == "min" and c < 0:
                rest = {q: v for q, v in p.items() if q != m}
                return any(_positive(_padd(rest, _pmul(linear(a), {(): c}), 1), depth - 1) for a in m[0].args)
    return False


def _ramp_binary(op: str, a: Expr, b: Expr) -> Expr | None:
    n = a.dtype.lanes
    if op in ("add", "sub"):
        if a.op == "ramp" and b.op == "bcast":
            return ramp(binary(op, a.args[0], b.args[0]), a.attr[0], n)
        if a.op == "bcast" and b.op == "ramp":
            return ramp(binary(op, a.args[0], b.args[0]), b.attr[0] * (1 if op == "add" else -1), n)
        if a.op == "ramp" and b.op == "ramp":
            s = a.attr[0] + b.attr[0] * (1 if op == "add" else -1)
            return ramp(binary(op, a.args[0], b.args[0]), s, n)
    if op == "mul":
        for x, y in ((a, b), (b, a)):
            if x.op == "ramp" and y.op == "bcast" and y.args[0].op == "const":
                return ramp(x.args[0] * y.args[0], x.attr[0] * y.args[0].attr, n)
    if op in ("floordiv", "mod") and a.op == "ramp" and b.op == "bcast" and b.args[0].op == "const" and b.args[0].attr > 0:
        c, base, s = b.args[0].attr, a.args[0], a.attr[0]
        # all lanes in one quotient: base % c + s * (n - 1) stays below c
        m = _divmod("mod", base, const(c))
        lo, hi = bounds(m + min(0, s * (n - 1)))[0], bounds(m + max(0, s * (n - 1)))[1]
        if lo is not None and lo >= 0 and hi is not None and hi < c:
            return bcast(base // c, n) if op == "floordiv" else ramp(m, s, n)
        if s % c == 0:
            return ramp(base // c, s // c, n) if op == "floordiv" else bcast(m, n)
    return None


def compare(op: str, a: Any, b: Any) -> Expr:
    """lt, le, eq, ne: bool, folded through bounds on integers."""
    a, b = _match(a, b)
    out = boolean.vec(a.dtype.lanes)
    if a.op == "const" and b.op == "const":
        return const(bool({"lt": a.attr < b.attr, "le": a.attr <= b.attr, "eq": a.attr == b.attr, "ne": a.attr != b.attr}[op]), out)
    if a.dtype.is_index or (a.dtype.is_int and a.dtype.lanes == 1 and a.dtype.bits <= 32):
        if a.op == "bcast" and b.op == "bcast":
            return bcast(compare(op, a.args[0], b.args[0]), a.dtype.lanes)
        if op == "lt" and a.op == "ramp" and a.attr[0] == 1 and b.op == "bcast" and b.args[0].op == "const":
            n = a.dtype.lanes
            if b.args[0].attr % n == 0 and all(c % n == 0 for c in linear(a.args[0]).values()):  # whole groups of lanes below it or not
                return bcast(compare(op, a.args[0], b.args[0]), n)
        if a.dtype.is_index and a.dtype.lanes > 1 and op in ("lt", "le"):  # whole vectors at once, by their extreme lanes
            (amin, amax), (bmin, bmax) = _extremes(a), _extremes(b)
            if amin is not None and bmin is not None:
                if prove(compare(op, amax, bmin)):
                    return const(True, out)
                if is_const(compare(op, amin, bmax), False):
                    return const(False, out)
        if a.dtype is index:
            lo, hi = bounds(a - b)
        else:
            (al, ah), (bl, bh) = bounds(a), bounds(b)
            lo = None if al is None or bh is None else al - bh
            hi = None if ah is None or bl is None else ah - bl
        if op == "lt":
            if hi is not None and hi < 0:
                return const(True, out)
            if lo is not None and lo >= 0:
                return const(False, out)
            if a.dtype is index and (_below(a, b) if lo is None or hi is None or hi >= 0 else False):
                return const(True, out)
        elif op == "le":
            if hi is not None and hi <= 0:
                return const(True, out)
            if lo is not None and lo > 0:
                return const(False, out)
        elif (lo is not None and lo > 0) or (hi is not None and hi < 0):
            return const(op == "ne", out)
    if a is b and not a.dtype.is_float:
        return const(op in ("le", "eq"), out)
    return _mk(op, out, (a, b))


def _extremes(v: Expr) -> tuple[Any, Any]:
    """(smallest, largest) lane of a ramp or broadcast, else (None, None)."""
    if v.op == "bcast":
        return v.args[0], v.args[0]
    if v.op == "ramp":
        end = v.args[0] + v.attr[0] * (v.dtype.lanes - 1)
        return (v.args[0], end) if v.attr[0] > 0 else (end, v.args[0])
    return None, None


def floordiv(a: Any, b: Any) -> Expr:
    return binary("floordiv", a, b)


def mod(a: Any, b: Any) -> Expr:
    return binary("mod", a, b)


def minimum(a: Any, b: Any) -> Expr:
    return binary("min", a, b)


def maximum(a: Any, b: Any) -> Expr:
    return binary("max", a, b)


def land(*conds: Any) -> Expr:
    out = const(True, boolean)
    for c in conds:
        out = binary("and", out, c)
    return out


def lor(*conds: Any) -> Expr:
    out = const(False, boolean)
    for c in conds:
        out = binary("or", out, c)
    return out


def lnot(c: Expr) -> Expr:
    return unary("not", c)


def select(c: Expr, a: Any, b: Any) -> Expr:
    a, b = _match(a, b)
    if c.op == "bcast":
        c = c.args[0]
    if c.op == "const":
        return a if c.attr else b
    if a is b:
        return a
    if c.dtype.lanes > a.dtype.lanes:
        a, b = bcast(a, c.dtype.lanes), bcast(b, c.dtype.lanes)
    return _mk("select", a.dtype, (c, a, b))


def cast(a: Any, dtype: DType) -> Expr:
    """To ``dtype`` lane by lane (lanes of the operand are kept when ``dtype`` is scalar)."""
    a = as_expr(a, dtype)
    if a.dtype.lanes != 1 and dtype.lanes == 1:
        dtype = dtype.vec(a.dtype.lanes)
    if a.dtype is dtype:
        return a
    if a.op == "const":
        return const(_np_fold("cast", dtype.scalar, _typed(a)), dtype)
    if a.op == "bcast":
        return bcast(cast(a.args[0], dtype.scalar), dtype.lanes)
    if a.op == "cast" and a.args[0].dtype.scalar is dtype.scalar and dtype.is_index is False and _widens(a.args[0].dtype, a.dtype):
        return a.args[0]
    return _mk("cast", dtype, (a,))


def _widens(a: DType, b: DType) -> bool:
    """Every value of a is a value of b."""
    if a.is_float and b.is_float:
        return a.kind == b.kind and a.bits <= b.bits or b.bits >= 32 and a.bits <= 16 or b is f64
    if a.is_int and (b.is_int or b.is_index):
        return (a.kind == b.kind or b.is_index) and a.bits <= b.bits if a.is_signed == b.is_signed else (not a.is_signed and a.bits < b.bits)
    return a.is_bool


def bitcast(a: Expr, dtype: DType) -> Expr:
    """Same bits, other type of the same total width."""
    if a.dtype is dtype:
        return a
    if a.dtype.bits * a.dtype.lanes != dtype.bits * dtype.lanes:
        raise TypeError(f"bitcast from {a.dtype} to {dtype} changes the width")
    return _mk("bitcast", dtype, (a,))


def load(buf: Any, idx: Iterable[Any], mask: Expr | None = None, other: Any = None) -> Expr:
    """``buf[idx...]``; with ``mask`` false no access happens and the value is ``other`` (default 0)."""
    ix = tuple(as_expr(i, index) for i in idx)
    lanes = max([i.dtype.lanes for i in ix] + ([mask.dtype.lanes] if mask is not None else []), default=1)
    d = buf.dtype
    if d.lanes == 1 and lanes > 1:
        ix = tuple(bcast(i, lanes) if i.dtype.lanes == 1 else i for i in ix)
        d = d.vec(lanes)
    if mask is not None and not is_const(mask, True):
        if mask.dtype.lanes < d.lanes:
            mask = bcast(mask, d.lanes)
        o = as_expr(0 if other is None else other, d.scalar)
        if o.dtype.lanes < d.lanes:
            o = bcast(o, d.lanes)
        if is_const(mask, False):
            return o
        return _mk("load", d, (*ix, mask, o), (buf, True))
    return _mk("load", d, ix, (buf, False))


def ramp(base: Expr, stride: int, lanes: int) -> Expr:
    """(base, base + stride, ...): ``lanes`` indices. attr is (stride,)."""
    if lanes == 1:
        return base
    if stride == 0:
        return bcast(base, lanes)
    return _mk("ramp", base.dtype.vec(lanes), (base,), (stride,))


def bcast(a: Expr, lanes: int) -> Expr:
    """A scalar repeated in every lane."""
    if a.dtype.lanes == lanes:
        return a
    if a.dtype.lanes != 1:
        raise TypeError(f"cannot broadcast {a.dtype} to {lanes} lanes")
    return _mk("bcast", a.dtype.vec(lanes), (a,))


def shuffle(args: Iterable[Expr], perm: Iterable[int]) -> Expr:
    """Lanes of the concatenation of ``args`` picked by ``perm`` (-1: don't care)."""
    a, p = tuple(args), tuple(perm)
    if len(a) == 1 and p == tuple(range(a[0].dtype.lanes)):
        return a[0]
    if len(p) == 1:
        k = p[0]
        for x in a:
            if k < x.dtype.lanes:
                return extract(x, k)
            k -= x.dtype.lanes
    return _mk("shuffle", a[0].dtype.vec(len(p)), a, p)


def extract(a: Expr, lane: int) -> Expr:
    """One lane as a scalar."""
    if a.dtype.lanes == 1:
        return a
    if a.op == "bcast":
        return a.args[0]
    if a.op == "ramp":
        return a.args[0] + lane * a.attr[0]
    return _mk("extract", a.dtype.scalar, (a,), lane)


def vreduce(op: str, a: Expr) -> Expr:
    """All lanes combined by ``op`` (add, mul, min, max, and, or): pairwise halving, so the order is fixed."""
    if a.dtype.lanes == 1:
        return a
    return _mk("vreduce", a.dtype.scalar, (a,), op)


def call(name: str, dtype: DType, *args: Expr, attr: Any = ()) -> Expr:
    """A pure intrinsic registered in :mod:`luthier.ir.intrin` (its meaning is there, its instruction with the target)."""
    return _mk("call", dtype, args, (name, attr))


def proj(e: Expr, n: int, dtype: DType) -> Expr:
    """Component ``n`` of a tuple reduction."""
    return _mk("proj", dtype, (e,), n)


# ---------------------------------------------------------------- traversal


def rebuild(e: Expr, args: tuple[Expr, ...]) -> Expr:
    """``e`` with other operands, through the folding constructors."""
    op, a = e.op, e.attr
    if op in BINARY:
        x, y = args
        if x.dtype is y.dtype and x.dtype.is_float and x.op not in _FOLDING and y.op not in _FOLDING:
            return _mk(op, x.dtype, args)
        return binary(op, x, y)
    if op in COMPARE:
        return compare(op, *args)
    if op in UNARY:
        return unary(op, args[0])
    if op == "load":
        buf, masked = a
        if masked:
            return load(buf, args[:-2], args[-2], args[-1])
        if all([x.dtype is y.dtype for x, y in zip(args, e.args, strict=True)]):
            return _mk("load", e.dtype, args, a)
        return load(buf, args)
    if op == "select":
        return select(*args)
    if op == "cast":
        return cast(args[0], e.dtype.scalar if args[0].dtype.lanes > 1 else e.dtype)
    if op in ("ramp", "bcast") and args[0].dtype is e.args[0].dtype:
        return _mk(op, e.dtype, args, a)
    if op == "ramp":
        return ramp(args[0], a[0], e.dtype.lanes)
    if op == "bcast":
        return bcast(args[0], e.dtype.lanes)
    if op == "shuffle":
        return shuffle(args, a)
    if op == "extract":
        return extract(args[0], a)
    if op == "vreduce":
        return vreduce(a, args[0])
    if op == "bitcast":  # as many bits as before, or more where the operand was vectorised
        return bitcast(args[0], e.dtype.scalar.vec(args[0].dtype.bits * args[0].dtype.lanes // e.dtype.bits))
    lanes = max((x.dtype.lanes for x in args), default=1)
    d = e.dtype
    if lanes != d.lanes and d.lanes == 1:  # operands were vectorised
        args = tuple(bcast(x, lanes) for x in args)
        d = d.vec(lanes)
    return _mk(op, d, args, a)


def rewrite(e: Expr, fn: Callable[[Expr], Expr | None], memo: dict[Expr, Expr] | None = None) -> Expr:
    """Bottom-up: ``fn`` sees each node after its operands were rewritten and returns a replacement or None."""
    if memo is None:
        memo = {}
    hit = memo.get(e)
    if hit is not None:
        return hit
    n = e
    if e.args:
        args = tuple([rewrite(a, fn, memo) for a in e.args])
        if args != e.args:
            n = rebuild(e, args)
    r = fn(n)
    out = n if r is None else r
    memo[e] = out
    return out


def rewrite_loads(e: Expr, fn: Callable[[Expr], Expr | None], memo: dict[Expr, Expr] | None = None) -> Expr:
    """:func:`rewrite` for an ``fn`` that changes nothing but loads: what has none is not looked at."""
    if not e.loading:
        return e
    if memo is None:
        memo = {}
    hit = memo.get(e)
    if hit is not None:
        return hit
    args = tuple([rewrite_loads(a, fn, memo) if a.loading else a for a in e.args])
    n = rebuild(e, args) if args != e.args else e
    if n.op == "load":
        r = fn(n)
        n = n if r is None else r
    memo[e] = n
    return n


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
    return _from_poly(rest), c0, coefs


def add_const(base: Expr, c: int) -> Expr:
    """An index expression without a constant term plus ``c``."""
    if not c:
        return base
    return const(c) if base.op == "const" else _mk("add", index, (base, const(c)))


def substitute(e: Expr, env: Mapping[Expr, Expr], memo: dict[Expr, Expr] | None = None) -> Expr:
    """Variables (or any nodes) replaced simultaneously. ``memo``: results so far for this very ``env``."""
    if not env:
        return e
    if memo is None:
        memo = {}
    keys = {k for k in env if k.op == "var"}
    plain = len(keys) == len(env)

    def go(x: Expr) -> Expr:
        r = env.get(x)
        if r is not None:
            return r
        if not x.args and x.op != "reduce":
            return x
        if plain and x.op != "load" and not keys & free_vars(x):
            return x
        r = memo.get(x)
        if r is None and x.dtype is index and x.op in ("add", "sub", "mul"):  # in one step, without the sums in between
            p: Poly = {}
            for m, c in linear(x).items():
                if len(m) == 1:
                    b = go(m[0])
                    t = {m: c} if b is m[0] else {k: v * c for k, v in linear(b).items()}
                else:
                    t = {(): c}
                    for a in m:
                        b = go(a)
                        t = _pmul(t, {(b,): 1} if b is a else linear(b))
                for k, v in t.items():
                    v += p.get(k, 0)
                    if v:
                        p[k] = v
                    else:
                        p.pop(k, None)
            r = memo[x] = _from_poly(p)
        if r is None:
            args = tuple([go(a) for a in x.args])
            r = rebuild(x, args) if args != x.args else x
            memo[x] = r
        return r

    return go(e)


def free_vars(e: Expr) -> frozenset[Expr]:
    """Variables read by ``e``, shapes of buffers excluded; axes of a ``reduce`` are bound by it."""
    v = e._vars
    if v is _UNSET:
        if e.op == "var":
            v = frozenset((e,))
        elif not e.args:
            v = frozenset()
        elif len(e.args) == 1:
            v = free_vars(e.args[0])
        else:
            v = frozenset().union(*(free_vars(a) for a in e.args))
        if e.op == "reduce":
            v = v - {a.var for a in e.attr[1]}
        e._vars = v
    return v  # type: ignore[no-any-return]


def walk(*es: Expr) -> Iterator[Expr]:
    """Every distinct node once, operands first."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(e, False) for e in reversed(es)]
    while stack:
        e, done = stack.pop()
        if done:
            yield e
        elif e not in seen:
            seen.add(e)
            stack.append((e, True))
            stack.extend((a, False) for a in e.args if a not in seen)


def loads(*es: Expr) -> list[Expr]:
    """Every distinct load once, those in its indices before it."""
    out: list[Expr] = []
    seen: set[Expr] = set()
    stack = [(e, False) for e in reversed(es) if e.loading]
    while stack:
        e, done = stack.pop()
        if done:
            out.append(e)
        elif e not in seen:
            seen.add(e)
            if e.op == "load":
                stack.append((e, True))
            stack.extend([(a, False) for a in e.args if a.loading and a not in seen])
    return out


def load_parts(e: Expr) -> tuple[Any, tuple[Expr, ...], Expr | None, Expr | None]:
    """(buffer, indices, mask, other) of a load."""
    buf, masked = e.attr
    return (buf, e.args[:-2], e.args[-2], e.args[-1]) if masked else (buf, e.args, None, None)

