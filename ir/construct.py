"""Constructors of expressions: they fold constants and keep index arithmetic normal (semantics: :mod:`luthier.ir.expr`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, boolean, f64, index
from luthier.ir.index_algebra import bounds, divide, fold, index_binary, is_below, linear, prove
from luthier.ir.node import BINARY, COMPARE, MEMOS, UNARY, Expr, as_expr, bcast, const, is_const, make_node, set_constructors

index_memo: dict[Any, Expr] = {}
MEMOS.append(index_memo)


def unary(op: str, a: Expr) -> Expr:
    """One of ``UNARY``. ``isnan``/``isinf`` give bool, everything else the operand's type."""
    d = a.dtype
    out = boolean.vec(d.lanes) if op in ("isnan", "isinf") else d
    if op == "neg" and d.is_index:
        return const(0) - a
    if a.op == "const":
        return const(fold(op, out, typed(a)), out)
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
    return make_node(op, out, (a,))


def typed(e: Expr) -> Any:
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


FOLDING = frozenset(("const", "bcast"))  # operands that a constructor may fold
_FLOAT_IDENT = {"mul": 1.0, "div": 1.0}


def binary(op: str, a: Any, b: Any) -> Expr:
    """One of ``BINARY`` on two operands of one type (Python numbers take the other's type; scalars broadcast to lanes)."""
    a, b = _match(a, b)
    d = a.dtype
    if op not in BINARY:
        raise ValueError(f"no binary operator {op!r}")
    if d.is_index and d.lanes == 1:
        r = index_memo.get((op, a, b))
        if r is None:
            if len(index_memo) > 200_000:
                index_memo.clear()
            r = index_memo[(op, a, b)] = index_binary(op, a, b)
        return r
    if a.op == "const" and b.op == "const":
        return const(fold(op, d, typed(a), typed(b)), d)
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
    return make_node(op, d, (a, b))


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
        m = divide("mod", base, const(c))
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
        if op == "lt" and a.op == "ramp" and a.attr[0] == 1 and b.op == "bcast":
            n = a.dtype.lanes
            if all(c % n == 0 for x in (b.args[0], a.args[0]) for c in linear(x).values()):  # whole groups of lanes below it or not
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
            if a.dtype is index and (is_below(a, b) if lo is None or hi is None or hi >= 0 else False):
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
    return make_node(op, out, (a, b))


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


def carry_nan(op: str, a: Expr, b: Expr) -> Expr:
    """``min`` or ``max`` of a and b that is NaN when either is (numpy's and torch's): ``select(isnan(a), a, op(a, b))``."""
    r = binary(op, a, b)
    return select(unary("isnan", a), a, r) if a.dtype.is_float and a.op != "const" else r


def before(a: Expr, b: Expr) -> Expr:
    """``a`` stands before ``b`` in ascending order, NaN last: a total order once equal ones are told apart by their position."""
    if not a.dtype.is_float:
        return a < b
    return binary("and", unary("not", b <= a), unary("not", unary("isnan", a)))


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
    return make_node("select", a.dtype, (c, a, b))


def cast(a: Any, dtype: DType) -> Expr:
    """To ``dtype`` lane by lane (lanes of the operand are kept when ``dtype`` is scalar)."""
    a = as_expr(a, dtype)
    if a.dtype.lanes != 1 and dtype.lanes == 1:
        dtype = dtype.vec(a.dtype.lanes)
    if a.dtype is dtype:
        return a
    if a.op == "const":
        return const(fold("cast", dtype.scalar, typed(a)), dtype)
    if a.op == "bcast":
        return bcast(cast(a.args[0], dtype.scalar), dtype.lanes)
    if a.op == "cast" and a.args[0].dtype.scalar is dtype.scalar and dtype.is_index is False and _widens(a.args[0].dtype, a.dtype):
        return a.args[0]
    return make_node("cast", dtype, (a,))


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
    return make_node("bitcast", dtype, (a,))


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
        return make_node("load", d, (*ix, mask, o), (buf, True))
    return make_node("load", d, ix, (buf, False))


def ramp(base: Expr, stride: int, lanes: int) -> Expr:
    """(base, base + stride, ...): ``lanes`` indices. attr is (stride,)."""
    if lanes == 1:
        return base
    if stride == 0:
        return bcast(base, lanes)
    return make_node("ramp", base.dtype.vec(lanes), (base,), (stride,))


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
    return make_node("shuffle", a[0].dtype.vec(len(p)), a, p)


def extract(a: Expr, lane: int) -> Expr:
    """One lane as a scalar."""
    if a.dtype.lanes == 1:
        return a
    if a.op == "bcast":
        return a.args[0]
    if a.op == "ramp":
        return a.args[0] + lane * a.attr[0]
    if a.op == "shuffle" and a.attr[lane] >= 0:
        k = a.attr[lane]
        for x in a.args:
            if k < x.dtype.lanes:
                return extract(x, k)
            k -= x.dtype.lanes
    return make_node("extract", a.dtype.scalar, (a,), lane)


def vreduce(op: str, a: Expr) -> Expr:
    """All lanes combined by ``op`` (add, mul, min, max, and, or): pairwise halving, so the order is fixed."""
    if a.dtype.lanes == 1:
        return a
    return make_node("vreduce", a.dtype.scalar, (a,), op)


def call(name: str, dtype: DType, *args: Expr, attr: Any = ()) -> Expr:
    """A pure intrinsic registered in :mod:`luthier.ir.intrin` (its meaning is there, its instruction with the target)."""
    return make_node("call", dtype, args, (name, attr))


def proj(e: Expr, n: int, dtype: DType) -> Expr:
    """Component ``n`` of a tuple reduction."""
    return make_node("proj", dtype, (e,), n)


set_constructors(unary=unary, binary=binary, compare=compare, cast=cast)
