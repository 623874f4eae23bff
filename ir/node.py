"""The nodes of :mod:`luthier.ir.expr`: interned, unsimplified; leaves; variables of an expression."""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, boolean, f64, index

UNARY = frozenset(
    "neg abs floor ceil round trunc sqrt rsqrt exp exp2 log log2 expm1 log1p tanh sigmoid erf sin cos tan asin acos atan sinh cosh asinh acosh "
    "atanh not isnan isinf popcount".split()
)
BINARY = frozenset("add sub mul div rem floordiv mod min max and or xor shl shr pow atan2".split())
COMPARE = frozenset("lt le eq ne".split())
_table: dict[Any, Expr] = {}
Number = int | float | bool
UNSET: Any = object()
MEMOS: list[dict[Any, Expr]] = []  # tables of other modules that refer to nodes: forgotten when nodes are collected
_limit = [1_000_000]
HUGE = 1 << 30  # nodes of a tree that nobody can write out
KEY_LENGTH = 1000  # characters of a key as they stand; what is longer ends in a hash


class _Build:
    """The constructors that the operators of Expr call; :mod:`luthier.ir.construct` sets them."""

    unary: Callable[[str, Any], Expr]
    binary: Callable[[str, Any, Any], Expr]
    compare: Callable[[str, Any, Any], Expr]
    cast: Callable[[Any, DType], Expr]


_build = _Build()


def set_constructors(**constructors: Callable[..., Expr]) -> None:
    """``unary``, ``binary``, ``compare`` and ``cast``."""
    for name, f in constructors.items():
        setattr(_build, name, f)


class Expr:
    """One node. ``op``: operator; ``dtype``: type of the value; ``args``: operands; ``attr``: what is not an operand; ``loading``:
    whether a load is inside."""

    __slots__ = ("op", "dtype", "args", "attr", "_bounds", "_vars", "_poly", "_key", "_size", "loading", "types", "__weakref__")
    op: str
    dtype: DType
    args: tuple[Expr, ...]
    attr: Any
    _bounds: Any
    _vars: Any
    _poly: Any
    _key: str | None
    _size: int
    loading: bool  # a load is inside
    types: int  # of this node and all inside, as a set (:func:`luthier.ir.dtypes.types_in`)

    def __bool__(self) -> bool:
        if self.op == "const":
            return bool(self.attr)
        raise TypeError(f"the truth of {self!r} is not known at compile time")

    def __add__(self, o: Any) -> Expr:
        return _build.binary("add", self, o)

    def __radd__(self, o: Any) -> Expr:
        return _build.binary("add", as_expr(o, self.dtype), self)

    def __sub__(self, o: Any) -> Expr:
        return _build.binary("sub", self, o)

    def __rsub__(self, o: Any) -> Expr:
        return _build.binary("sub", as_expr(o, self.dtype), self)

    def __mul__(self, o: Any) -> Expr:
        return _build.binary("mul", self, o)

    def __rmul__(self, o: Any) -> Expr:
        return _build.binary("mul", as_expr(o, self.dtype), self)

    def __truediv__(self, o: Any) -> Expr:
        return _build.binary("div", self, o)

    def __rtruediv__(self, o: Any) -> Expr:
        return _build.binary("div", as_expr(o, self.dtype), self)

    def __floordiv__(self, o: Any) -> Expr:
        return _build.binary("floordiv", self, o)

    def __rfloordiv__(self, o: Any) -> Expr:
        return _build.binary("floordiv", as_expr(o, self.dtype), self)

    def __mod__(self, o: Any) -> Expr:
        return _build.binary("mod", self, o)

    def __neg__(self) -> Expr:
        return _build.unary("neg", self)

    def __and__(self, o: Any) -> Expr:
        return _build.binary("and", self, o)

    def __or__(self, o: Any) -> Expr:
        return _build.binary("or", self, o)

    def __xor__(self, o: Any) -> Expr:
        return _build.binary("xor", self, o)

    def __lshift__(self, o: Any) -> Expr:
        return _build.binary("shl", self, o)

    def __rshift__(self, o: Any) -> Expr:
        return _build.binary("shr", self, o)

    def __invert__(self) -> Expr:
        return _build.unary("not", self)

    def __lt__(self, o: Any) -> Expr:
        return _build.compare("lt", self, o)

    def __le__(self, o: Any) -> Expr:
        return _build.compare("le", self, o)

    def __gt__(self, o: Any) -> Expr:
        return _build.compare("lt", as_expr(o, self.dtype), self)

    def __ge__(self, o: Any) -> Expr:
        return _build.compare("le", as_expr(o, self.dtype), self)

    # == stays identity (hash-consing); use .eq / .ne for the comparison as an expression
    def eq(self, o: Any) -> Expr:
        return _build.compare("eq", self, o)

    def ne(self, o: Any) -> Expr:
        return _build.compare("ne", self, o)

    def cast(self, dtype: DType) -> Expr:
        return _build.cast(self, dtype)

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
                if len(k) > KEY_LENGTH:  # as a tree, an expression that shares its parts is exponentially longer than it is deep
                    k = f"{k[:KEY_LENGTH]}#{hashlib.sha256(k.encode()).hexdigest()}"
            self._key = k
        return k


_new = object.__new__


def make_node(op: str, dtype: DType, args: tuple[Expr, ...] = (), attr: Any = None) -> Expr:
    """The interned node, unsimplified. Use the constructors below; passes that rebuild nodes use :func:`rebuild`."""
    k = (op, dtype, args, struct.pack("<d", attr) if type(attr) is float else attr)
    e = _table.get(k)
    if e is None:
        e = _new(Expr)
        loading = op == "load"
        types = dtype.bit
        for a in args:
            types |= a.types
            if a.loading:
                loading = True
        e.loading, e.types = loading, types
        e.op, e.dtype, e.args, e.attr = op, dtype, args, attr
        e._bounds = e._vars = e._poly = UNSET
        e._key = None
        e._size = 0
        _table[k] = e
        if len(_table) > _limit[0]:
            collect()
    return e


def collect() -> None:
    """Forget interned expressions that nothing else refers to (parents before their operands). Runs by itself as the table grows."""
    for memo in MEMOS:
        memo.clear()
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
    """A constant, rounded or wrapped to ``dtype`` (broadcast when ``dtype`` has lanes); an index saturates."""
    if dtype is index and type(value) is int and -(1 << 62) < value < 1 << 62:
        return make_node("const", index, (), value)
    s = dtype.scalar
    if s.is_bool:
        v: Any = bool(value)
    elif s.is_float:
        v = float(value)
        if s is not f64 and not (math.isnan(v) or math.isinf(v)):
            with np.errstate(over="ignore"):
                v = float(np.asarray(v).astype(s.numpy))
    elif s.is_index:  # a size that no memory holds stays one: it never wraps around
        v = max(-(1 << 63), min(int(value), (1 << 63) - 1))
    else:
        v = int(value)
        if s.bits < 64 or s.kind == "u" or not -(1 << 63) <= v < (1 << 63):
            v &= (1 << s.bits) - 1
            if s.is_signed and v >> (s.bits - 1):
                v -= 1 << s.bits
    e = make_node("const", s, (), v)
    return e if dtype.lanes == 1 else bcast(e, dtype.lanes)


def var(name: str, dtype: DType = index, lo: int | None = 0, hi: int | Expr | None = None) -> Expr:
    """A variable. ``lo``/``hi``: inclusive bounds of an integer variable; ``hi`` may be an Expr, None means unbounded."""
    if isinstance(hi, Expr) and hi.op == "const":
        hi = int(hi.attr)
    if not (dtype.is_index or dtype.is_int):
        lo = hi = None
    return make_node("var", dtype, (), (name, lo, hi))


def as_expr(v: Any, dtype: DType = index) -> Expr:
    if isinstance(v, Expr):
        return v
    if isinstance(v, (bool, np.bool_)):
        return const(bool(v), boolean if not dtype.is_bool else dtype)
    if isinstance(v, (int, float, np.integer, np.floating)):
        return const(v.item() if isinstance(v, np.generic) else v, dtype)
    raise TypeError(f"cannot use {v!r} as an expression")


def is_const(e: Expr, value: Any = UNSET) -> bool:
    if e.op == "bcast":
        e = e.args[0]
    return e.op == "const" and (value is UNSET or (e.attr == value and not (value == 0 and isinstance(e.attr, float) and math.copysign(1, e.attr) < 0)))


def bcast(a: Expr, lanes: int) -> Expr:
    """A scalar repeated in every lane."""
    if a.dtype.lanes == lanes:
        return a
    if a.dtype.lanes != 1:
        raise TypeError(f"cannot broadcast {a.dtype} to {lanes} lanes")
    return make_node("bcast", a.dtype.vec(lanes), (a,))


def tree_size(e: Expr) -> int:
    """Nodes of ``e`` written out as a tree, which may be exponentially more than it has; from ``HUGE`` on no longer counted."""
    n = e._size
    if not n:
        n = e._size = min(1 + sum([tree_size(a) for a in e.args]), HUGE)
    return n


def free_vars(e: Expr) -> frozenset[Expr]:
    """Variables read by ``e``, shapes of buffers excluded; axes of a ``reduce`` are bound by it."""
    v = e._vars
    if v is UNSET:
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
