"""Arithmetic, comparison, logic, rounding, bits, transcendental functions: one output element from one element of each input.

Every operator is a row of a table: what it accepts, its expression, its numpy meaning. Narrow floats (f16, bf16, f8) are computed
in f32 and rounded once. Inputs broadcast as numpy's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.dtypes import DType, boolean, f32, f64
from luthier.ir.expr import Expr, binary, carry_nan, cast, const, land, lnot, lor, maximum, minimum, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.interpret.semantics import convert
from luthier.ir.interpret.semantics import evaluate as scalar
from luthier.ir.loop import Buffer
from luthier.ir.op import Op
from luthier.ir.ops.common import (
    Array,
    axes_of,
    broadcast,
    define,
    expect_one,
    flag,
    make,
    map_content,
    must,
    need,
    operand,
    register,
    shape_error,
    type_error,
    wide,
    widen,
)

ExprFn = Callable[..., Expr]
ArrayFn = Callable[..., Any]

_CLASSES: dict[str, Callable[[DType], bool]] = {
    "float": lambda d: d.is_float,
    "int": lambda d: d.is_int,
    "number": lambda d: d.is_float or d.is_int,
    "bool": lambda d: d.is_bool,
    "any": lambda d: d.kind != "s",
}


class Map(Op):
    """An elementwise operator with broadcasting.

    ``accepts``: class of the inputs' types. ``expr(node, *values)``: the result from operands in :func:`wide` types.
    ``ref(node, *arrays)``: the same in numpy, on f64 where the inputs are floats of at most 32 bits (``exact`` leaves types
    alone). ``result``: bool for predicates, None for the type of the first input. ``content``: on index expressions."""

    kind = "elementwise"
    permutes = True

    def __init__(
        self, accepts: str, expr: ExprFn, ref: ArrayFn, arity: tuple[int, int] = (1, 1), result: DType | None = None,
        content: Callable[..., Any] | None = None, exact: bool = False, same_types: bool = True,
    ) -> None:
        self.accepts, self.expr, self.ref, self.arity, self.result = accepts, expr, ref, arity, result
        self.content_fn, self.exact, self.same_types = content, exact, same_types

    def infer(self, node: Node) -> Sequence[TensorType]:
        n = len(node.inputs)
        lo, hi = self.arity
        if not lo <= n <= hi:
            raise shape_error(node, f"takes {lo if lo == hi else f'{lo} to {hi}'} inputs, {n} were given")
        vals = [need(node, i) for i in range(n)]
        self.check_types(node, [v.dtype for v in vals])
        return [TensorType(self.result or self.result_type(node), broadcast(node, *(v.shape for v in vals)))]

    def result_type(self, node: Node) -> DType:
        return need(node, 0).dtype

    def check_types(self, node: Node, types: list[DType]) -> None:
        for t in types:
            if not _CLASSES[self.accepts](t):
                raise type_error(node, f"{node.op} takes {self.accepts} inputs")
        if self.same_types and any(t is not types[0] for t in types):
            raise type_error(node, "the inputs differ in type; add a Cast")

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return None if self.content_fn is None else map_content(node, lambda *a: self.content_fn(node, *a))  # type: ignore[misc]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        out = outs[0]
        axes = axes_of(out.shape)
        args = [widen(operand(node, i, ins, axes)) for i in range(len(node.inputs))]
        return make(node, ins, outs, [define(out, axes, self.expr(node, *args))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        out = self.result or self.result_type(node)
        with np.errstate(all="ignore"):
            up = arrays if self.exact else [_f64(a) for a in arrays]
            return [convert(np.asarray(self.ref(node, *up)), out)]


def _f64(a: Array) -> Array:
    """Floats of any width as f64; everything else as it is."""
    a = np.asarray(a)
    return a if a.dtype.kind in "iub" or a.dtype.name.startswith(("int", "uint")) else a.astype(np.float64)


def simple(op: str) -> ExprFn:
    return lambda node, x: unary(op, x)


def two(op: str) -> ExprFn:
    return lambda node, a, b: binary(op, a, b)


def _unary(name: str, accepts: str, op: str, ref: ArrayFn, **kw: Any) -> None:
    register(name, Map(accepts, simple(op), lambda node, x: ref(x), **kw))


def k(x: Expr, v: float) -> Expr:
    """A number in the type of ``x``."""
    return const(v, x.dtype)


_erf = np.frompyfunc(__import__("math").erf, 1, 1)


def erf(x: Array) -> Array:
    return np.asarray(_erf(x), np.float64) if np.size(x) else np.zeros(np.shape(x))


# ---------------------------------------------------------------- one operand

for _n, _a, _o, _f in (
    ("Sqrt", "float", "sqrt", np.sqrt), ("Exp", "float", "exp", np.exp), ("Log", "float", "log", np.log),
    ("Sin", "float", "sin", np.sin), ("Cos", "float", "cos", np.cos), ("Tan", "float", "tan", np.tan),
    ("Asin", "float", "asin", np.arcsin), ("Acos", "float", "acos", np.arccos), ("Atan", "float", "atan", np.arctan),
    ("Sinh", "float", "sinh", np.sinh), ("Cosh", "float", "cosh", np.cosh), ("Tanh", "float", "tanh", np.tanh),
    ("Asinh", "float", "asinh", np.arcsinh), ("Acosh", "float", "acosh", np.arccosh), ("Atanh", "float", "atanh", np.arctanh),
    ("Erf", "float", "erf", erf), ("Sigmoid", "float", "sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    ("Floor", "float", "floor", np.floor), ("Ceil", "float", "ceil", np.ceil), ("Round", "float", "round", np.rint),
    ("BitwiseNot", "int", "not", np.invert),
):  # fmt: skip
    _unary(_n, _a, _o, _f)

register("Neg", Map("number", simple("neg"), lambda node, x: np.negative(x), content=lambda node, a: -a))
register("Abs", Map("number", simple("abs"), lambda node, x: np.abs(x), content=lambda node, a: maximum(a, -a)))
register("Not", Map("bool", simple("not"), lambda node, x: np.logical_not(x), content=lambda node, a: flag(a.eq(0))))
register("Reciprocal", Map("float", lambda node, x: k(x, 1) / x, lambda node, x: 1 / x))
register("IsNaN", Map("float", simple("isnan"), lambda node, x: np.isnan(x), result=boolean))


def _is_inf(node: Node, x: Expr) -> Expr:
    pos, neg = int(node.attrs.get("detect_positive", 1)), int(node.attrs.get("detect_negative", 1))
    if pos and neg:
        return unary("isinf", x)
    inf = float("inf")
    return x.eq(k(x, inf)) if pos else x.eq(k(x, -inf)) if neg else const(False, boolean)


def _is_inf_ref(node: Node, x: Array) -> Array:
    pos, neg = int(node.attrs.get("detect_positive", 1)), int(node.attrs.get("detect_negative", 1))
    return (np.isposinf(x) & bool(pos)) | (np.isneginf(x) & bool(neg))


register("IsInf", Map("float", _is_inf, _is_inf_ref, result=boolean))
register(
    "Sign",
    Map(
        "number", lambda node, x: select(k(x, 0) < x, k(x, 1), select(x < k(x, 0), k(x, -1), x)) if x.dtype.is_signed or x.dtype.is_float else select(k(x, 0) < x, k(x, 1), k(x, 0)),
        lambda node, x: np.sign(x),
    ),
)

# ---------------------------------------------------------------- two operands


def _np_div(node: Node, a: Array, b: Array) -> Array:
    return np.asarray(scalar("div", _of(a), a, b)) if a.dtype.kind in "iu" else a / b


def _of(a: Array) -> DType:
    from luthier.ir.dtypes import from_numpy

    return from_numpy(a.dtype)


def _trunc_div(a: Expr, b: Expr) -> Expr:
    return binary("div", a, b)


class Sum(Map):
    """``a + b``: positions and one number are positions."""

    def limits(self, node: Node) -> tuple[Expr, Expr] | None:
        for v, w in ((need(node, 0), need(node, 1)), (need(node, 1), need(node, 0))):
            if v.limits is not None and w.content is not None and len(w.content) == 1:
                return v.limits[0] + w.content[0], v.limits[1] + w.content[0]
        return None


register("Add", Sum("number", two("add"), lambda node, a, b: a + b, (2, 2), content=lambda node, a, b: a + b))
register("Sub", Map("number", two("sub"), lambda node, a, b: a - b, (2, 2), content=lambda node, a, b: a - b))
register("Mul", Map("number", two("mul"), lambda node, a, b: a * b, (2, 2), content=lambda node, a, b: a * b))
register("Div", Map("number", two("div"), _np_div, (2, 2), content=lambda node, a, b: _trunc_div(a, b)))


def _mod(node: Node, a: Expr, b: Expr) -> Expr:
    if int(node.attrs.get("fmod", 0)):
        return binary("rem", a, b)
    if not a.dtype.is_float:
        return binary("mod", a, b)
    r = binary("rem", a, b)
    return select(land(r.ne(0.0), (r < 0.0).ne(b < 0.0)), r + b, r)


def _mod_ref(node: Node, a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":
        return np.asarray(scalar("rem" if int(node.attrs.get("fmod", 0)) else "mod", _of(a), a, b))
    return np.asarray(np.fmod(a, b) if int(node.attrs.get("fmod", 0)) else np.mod(a, b))


register("Mod", Map("number", _mod, _mod_ref, (2, 2), content=lambda node, a, b: binary("rem" if int(node.attrs.get("fmod", 0)) else "mod", a, b)))


def power(a: Expr, b: Expr) -> Expr:
    """a ** b in the type of ``a``; small constant exponents are products."""
    if b.op == "const":
        if b.attr == 2:
            return a * a
        if b.attr == 3:
            return a * a * a
        if b.attr == 1:
            return a
        if b.attr == 0.5 and a.dtype.is_float:
            return unary("sqrt", a)
    if a.dtype.is_int and b.dtype.is_float:
        t = f64 if a.dtype.bits > 16 or b.dtype is f64 else f32
        return cast(binary("pow", cast(a, t), cast(b, t)), a.dtype)
    return binary("pow", a, cast(b, a.dtype))


def _pow_ref(node: Node, a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        return np.asarray(scalar("pow", _of(a), a, b.astype(a.dtype)))
    return np.power(a.astype(np.float64), b.astype(np.float64))


register("Pow", Map("number", lambda node, a, b: power(a, b), _pow_ref, (2, 2), same_types=False))

for _n, _o, _r in (("And", "and", np.logical_and), ("Or", "or", np.logical_or), ("Xor", "xor", np.logical_xor)):
    _c = {"and": lambda node, a, b: flag(land(a.ne(0), b.ne(0))), "or": lambda node, a, b: flag(lor(a.ne(0), b.ne(0)))}.get(
        _o, lambda node, a, b: flag(a.ne(0).ne(b.ne(0)))
    )
    register(_n, Map("bool", two(_o), lambda node, a, b, _r=_r: _r(a, b), (2, 2), content=_c))
for _n, _o, _r in (("BitwiseAnd", "and", np.bitwise_and), ("BitwiseOr", "or", np.bitwise_or), ("BitwiseXor", "xor", np.bitwise_xor)):
    register(_n, Map("int", two(_o), lambda node, a, b, _r=_r: _r(a, b), (2, 2)))

_COMPARE: dict[str, tuple[Callable[[Expr, Expr], Expr], Any, str]] = {
    "Equal": (lambda a, b: a.eq(b), np.equal, "any"),
    "Less": (lambda a, b: a < b, np.less, "number"),
    "LessOrEqual": (lambda a, b: a <= b, np.less_equal, "number"),
    "Greater": (lambda a, b: b < a, np.greater, "number"),
    "GreaterOrEqual": (lambda a, b: b <= a, np.greater_equal, "number"),
}
for _n, (_e, _r, _a) in _COMPARE.items():
    register(
        _n,
        Map(
            _a, lambda node, a, b, _e=_e: _e(a, b), lambda node, a, b, _r=_r: _r(a, b), (2, 2), result=boolean,
            content=lambda node, a, b, _e=_e: flag(_e(a, b)),
        ),
    )


def _shift(node: Node, a: Expr, b: Expr) -> Expr:
    return binary(_direction(node), a, b)


def _direction(node: Node) -> str:
    d = node.attrs.get("direction")
    if d not in ("LEFT", "RIGHT"):
        raise shape_error(node, f"direction must be LEFT or RIGHT, it is {d!r}")
    return "shl" if d == "LEFT" else "shr"


register("BitShift", Map("int", _shift, lambda node, a, b: scalar(_direction(node), _of(a), a, b), (2, 2)))

# ---------------------------------------------------------------- any number of operands


def _chain(f: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def g(node: Node, *args: Any) -> Any:
        out = args[0]
        for x in args[1:]:
            out = f(out, x)
        return out

    return g


_MANY = (1, 1 << 20)
register("Max", Map("number", _chain(lambda a, b: carry_nan("max", a, b)), _chain(np.maximum), _MANY, content=_chain(maximum)))
register("Min", Map("number", _chain(lambda a, b: carry_nan("min", a, b)), _chain(np.minimum), _MANY, content=_chain(minimum)))
register("Sum", Map("number", _chain(lambda a, b: a + b), _chain(lambda a, b: a + b), _MANY))
register(
    "Mean",
    Map(
        "float", lambda node, *a: _chain(lambda x, y: x + y)(node, *a) * k(a[0], 1 / len(a)) if len(a) & (len(a) - 1) == 0 else _chain(lambda x, y: x + y)(node, *a) / k(a[0], len(a)),
        lambda node, *a: _chain(lambda x, y: x + y)(node, *a) / len(a), _MANY,
    ),
)


class Where(Map):
    """cond ? X : Y, all three broadcast."""

    def __init__(self) -> None:
        super().__init__("any", lambda node, c, a, b: select(c, a, b), lambda node, c, a, b: np.where(c, a, b), (3, 3), exact=True,
                         content=lambda node, c, a, b: select(c.ne(0), a, b))  # fmt: skip

    def check_types(self, node: Node, types: list[DType]) -> None:
        if not types[0].is_bool:
            raise type_error(node, "the condition must be bool")
        if types[1] is not types[2]:
            raise type_error(node, "X and Y differ in type; add a Cast")

    def result_type(self, node: Node) -> DType:
        return need(node, 1).dtype


register("Where", Where())


class Clip(Map):
    """min(max(X, low), high); bounds are optional scalars. NaN stays NaN, and ``high`` wins where low > high."""

    def __init__(self) -> None:
        super().__init__("number", self._expr, self._ref, (1, 3))

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        self.check_types(node, [v.dtype for v in node.inputs if v is not None])
        expect_one(node, 1, 2)
        return [x.type]

    @staticmethod
    def _expr(node: Node, x: Expr, lo: Expr | None, hi: Expr | None) -> Expr:
        if lo is not None:
            x = maximum(lo, x)
        return x if hi is None else minimum(hi, x)

    @staticmethod
    def _ref(node: Node, x: Array, lo: Any = None, hi: Any = None) -> Array:
        if lo is not None:
            x = np.maximum(x, np.asarray(lo).reshape(()))
        return x if hi is None else np.minimum(x, np.asarray(hi).reshape(()))

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x = widen(must(ins, 0)[tuple(a.var for a in axes)])
        lo, hi = (None if node.input(i) is None else widen(operand(node, i, ins, ())) for i in (1, 2))
        return make(node, ins, outs, [define(outs[0], axes, self._expr(node, x, lo, hi))])

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        if any(v is None for v in node.inputs):
            return None
        return map_content(node, lambda x, *b: minimum(maximum(x, b[0]), b[1]) if len(b) == 2 else maximum(x, b[0]) if b else x)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        args: list[Any] = [None if a is None else _f64(a) for a in arrays]
        return [convert(np.asarray(self._ref(node, *args)), need(node, 0).dtype)]


register("Clip", Clip())

__all__ = ["Map", "power", "erf", "k", "wide", "lnot"]
