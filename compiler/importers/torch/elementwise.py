"""Rules of operators that work element by element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from luthier.importers.torch.emitter import Emitter, Kind, alias, aten, dtype_of
from luthier.ir import dtypes as D
from luthier.ir.errors import UnsupportedOperator
from luthier.ir.graph import Value

FLOAT, SAME, BOOL = Kind.INT_TO_FLOAT, Kind.DEFAULT, Kind.ALWAYS_BOOL

UNARY = {
    "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh",
    "cosh": "Cosh", "tanh": "Tanh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh", "erf": "Erf", "sigmoid": "Sigmoid", "sqrt": "Sqrt",
    "reciprocal": "Reciprocal", "expm1": "aten::expm1", "log1p": "aten::log1p", "log2": "aten::log2", "exp2": "aten::exp2",
    "rsqrt": "aten::rsqrt", "log10": "aten::log10",
}  # fmt: skip
ROUNDING = {"floor": "Floor", "ceil": "Ceil", "trunc": "aten::trunc"}
BINARY = {"mul": "Mul", "maximum": "Max", "minimum": "Min"}
COMPARED = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
BITS = {"and": ("BitwiseAnd", "And"), "or": ("BitwiseOr", "Or"), "xor": ("BitwiseXor", "Xor")}
FLOAT_PAIRS = {"atan2": "aten::atan2", "hypot": "aten::hypot", "logaddexp": "aten::logaddexp", "logaddexp2": "aten::logaddexp2", "copysign": "aten::copysign"}

alias(
    absolute="abs", negative="neg", multiply="mul", divide="div", true_divide="div", subtract="sub", greater="gt", greater_equal="ge", less="lt",
    less_equal="le", not_equal="ne", arccos="acos", arcsin="asin", arctan="atan", arccosh="acosh", arcsinh="asinh", arctanh="atanh",
    arctan2="atan2", fix="trunc", sgn="sign", clip="clamp", concat="cat", concatenate="cat", special_expit="sigmoid", special_erf="erf",
    special_exp2="exp2", special_expm1="expm1", special_log1p="log1p", special_sinc="sinc", special_xlogy="xlogy", special_logit="logit",
    special_round="round", special_log_softmax="log_softmax", special_softmax="softmax", special_logsumexp="logsumexp", swapaxes="transpose",
    swapdims="transpose", moveaxis="movedim", _unsafe_view="view", reshape="view", _reshape_alias="view", inverse="linalg_inv", ger="outer",
    row_stack="vstack", special_erfc="erfc", unsafe_chunk="chunk", unsafe_split="split", unsafe_split_with_sizes="split_with_sizes",
    linalg_matmul="matmul", det="linalg_det", special_entr="entr",
)  # fmt: skip


def _unary(name: str, op: str) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value) -> Value:
        return e.op(op, *e.promoted(FLOAT, x))


def _rounding(name: str, op: str) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value) -> Value:
        return e.op(op, x) if x.dtype.is_float else x


def _binary(name: str, op: str, kind: Kind) -> None:
    @aten(name)
    def rule(e: Emitter, x: Any, other: Any) -> Value:
        a, b = e.promoted(kind, x, other)
        if a.dtype.is_bool and name == "mul":
            return e.op("And", a, b)
        if a.dtype.is_bool and op in ("Max", "Min", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"):
            return e.cast(e.op(op, e.cast(a, D.u8), e.cast(b, D.u8)), e.dtype)
        return e.op(op, a, b)


def _bits(name: str, op: str, logic: str) -> None:
    @aten(f"bitwise_{name}", f"__{name}__")
    def rule(e: Emitter, x: Any, other: Any) -> Value:
        a, b = e.promoted(SAME, x, other)
        return e.op(logic if a.dtype.is_bool else op, a, b)

    @aten(f"logical_{name}")
    def logical(e: Emitter, x: Value, other: Value) -> Value:
        return e.op(logic, e.cast(x, D.boolean), e.cast(other, D.boolean))


for _n, _o in UNARY.items():
    _unary(_n, _o)
for _n, _o in ROUNDING.items():
    _rounding(_n, _o)
for _n, _o in BINARY.items():
    _binary(_n, _o, SAME)
for _n, _o in COMPARED.items():
    _binary(_n, _o, BOOL)
for _n, _o in FLOAT_PAIRS.items():
    _binary(_n, _o, FLOAT)
for _n, (_o, _l) in BITS.items():
    _bits(_n, _o, _l)


@aten("round")
def round_(e: Emitter, x: Value, decimals: int = 0) -> Value:
    if not x.dtype.is_float:
        return x
    if not decimals:
        return e.op("Round", x)
    scale = e.number(10.0 ** abs(decimals), x.dtype)
    up, down = ("Mul", "Div") if decimals > 0 else ("Div", "Mul")
    return e.op(down, e.op("Round", e.op(up, x, scale)), scale)


@aten("ne")
def ne(e: Emitter, x: Any, other: Any) -> Value:
    return e.op("Not", e.op("Equal", *e.promoted(BOOL, x, other)))


def _sum(name: str) -> None:
    @aten(name)
    def rule(e: Emitter, x: Any, other: Any, alpha: Any = 1) -> Value:
        a, b = e.promoted(SAME, x, other)
        if name == "rsub":
            a, b = b, a
        if alpha != 1:
            if name == "rsub":
                a, b = a, e.op("Mul", b, e.number(alpha, b.dtype))
            else:
                b = e.op("And" if b.dtype.is_bool else "Mul", b, e.number(alpha, b.dtype))
        if a.dtype.is_bool:
            return e.op("Or", a, b)
        return e.op("Add" if name == "add" else "Sub", a, b)


for _n in ("add", "sub", "rsub"):
    _sum(_n)


@aten("div")
def div(e: Emitter, x: Any, other: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return e.op("Div", *e.promoted(FLOAT, x, other))
    a, b = e.promoted(SAME, x, other)
    if rounding_mode == "floor":
        return e.op("aten::floor_divide", a, b)
    q = e.op("Div", a, b)
    return e.op("aten::trunc", q) if q.dtype.is_float else q


@aten("floor_divide")
def floor_divide(e: Emitter, x: Any, other: Any) -> Value:
    return e.op("aten::floor_divide", *e.promoted(SAME, x, other))


@aten("remainder")
def remainder(e: Emitter, x: Any, other: Any) -> Value:
    return e.op("Mod", *e.promoted(SAME, x, other), fmod=0)


@aten("fmod")
def fmod(e: Emitter, x: Any, other: Any) -> Value:
    return e.op("Mod", *e.promoted(SAME, x, other), fmod=1)


@aten("pow", "float_power")
def pow_(e: Emitter, x: Any, exponent: Any) -> Value:
    if isinstance(exponent, (int, float)) and isinstance(x, Value) and exponent == 0.5 and x.dtype.is_float:
        return e.op("Sqrt", x)
    a, b = e.promoted(Kind.BOOL_TO_LONG, x, exponent)
    a, b = e.cast(a, e.dtype), e.cast(b, e.dtype)
    if isinstance(exponent, (int, float)) and exponent == -1:
        return e.op("Reciprocal", a)
    return e.op("Pow", a, b)


@aten("abs")
def abs_(e: Emitter, x: Value) -> Value:
    return x if x.dtype.is_bool or not x.dtype.is_signed and x.dtype.is_int else e.op("Abs", x)


@aten("neg")
def neg(e: Emitter, x: Value) -> Value:
    return e.op("Neg", x)


@aten("sign")
def sign(e: Emitter, x: Value) -> Value:
    return x if x.dtype.is_bool else e.op("Sign", x)


@aten("positive", "clone", "contiguous", "lift_fresh_copy", "lift_fresh", "lift", "alias_copy", "resolve_conj", "resolve_neg", "conj", "_conj",
      "conj_physical", "real")  # fmt: skip
def same(e: Emitter, x: Value) -> Value:
    return x


@aten("logical_not")
def logical_not(e: Emitter, x: Value) -> Value:
    return e.op("Not", e.cast(x, D.boolean))


@aten("bitwise_not")
def bitwise_not(e: Emitter, x: Value) -> Value:
    return e.op("Not" if x.dtype.is_bool else "BitwiseNot", x)


def _shift(names: tuple[str, str], direction: str) -> None:
    @aten(*names)
    def rule(e: Emitter, x: Any, other: Any) -> Value:
        a, b = e.promoted(SAME, x, other)
        return e.op("BitShift", a, b, direction=direction)


_shift(("bitwise_left_shift", "__lshift__"), "LEFT")
_shift(("bitwise_right_shift", "__rshift__"), "RIGHT")


@aten("isnan")
def isnan(e: Emitter, x: Value) -> Value:
    return e.op("IsNaN", x) if x.dtype.is_float else _all(e, x, False)


@aten("isinf")
def isinf(e: Emitter, x: Value) -> Value:
    return e.op("IsInf", x) if x.dtype.is_float else _all(e, x, False)


@aten("isposinf")
def isposinf(e: Emitter, x: Value) -> Value:
    return e.op("IsInf", x, detect_negative=0) if x.dtype.is_float else _all(e, x, False)


@aten("isneginf")
def isneginf(e: Emitter, x: Value) -> Value:
    return e.op("IsInf", x, detect_positive=0) if x.dtype.is_float else _all(e, x, False)


@aten("isfinite")
def isfinite(e: Emitter, x: Value) -> Value:
    return e.op("Not", e.op("Or", e.op("IsNaN", x), e.op("IsInf", x))) if x.dtype.is_float else _all(e, x, True)


@aten("isreal")
def isreal(e: Emitter, x: Value) -> Value:
    return _all(e, x, True)


@aten("signbit")
def signbit(e: Emitter, x: Value) -> Value:
    if x.dtype.is_float:
        return e.op("aten::signbit", x)
    return e.op("Less", x, e.number(0, x.dtype)) if x.dtype.is_signed else _all(e, x, False)


def _all(e: Emitter, x: Value, value: bool) -> Value:
    return e.expand(e.const("all", np.array(value)), x.shape)


@aten("where")
def where(e: Emitter, condition: Value, x: Any = None, other: Any = None) -> Value:
    if x is None:
        raise UnsupportedOperator("where with a condition alone is nonzero(as_tuple=True), whose results have sizes that depend on data")
    a, b = e.promoted(SAME, x, other)
    return e.op("Where", e.cast(condition, D.boolean), a, b)


@aten("masked_fill")
def masked_fill(e: Emitter, x: Value, mask: Value, value: Any) -> Value:
    return e.op("Where", e.cast(mask, D.boolean), e.number(value, x.dtype), x)


@aten("clamp", "clamp_min", "clamp_max")
def clamp(e: Emitter, x: Value, min: Any = None, max: Any = None) -> Value:
    given = [v for v in (min, max) if v is not None]
    vals = e.promoted(SAME, x, *given)
    if vals[0].dtype.is_bool:
        vals = [e.cast(v, D.u8) for v in vals]
    out, rest = vals[0], vals[1:]
    if min is not None:
        out, rest = e.op("Max", out, rest[0]), rest[1:]
    if max is not None:
        out = e.op("Min", out, rest[0])
    return e.cast(out, e.dtype)


def _ignoring_nan(name: str, op: str) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value, other: Value) -> Value:
        a, b = e.promoted(SAME, x, other)
        best = e.cast(e.op(op, e.cast(a, D.u8), e.cast(b, D.u8)), a.dtype) if a.dtype.is_bool else e.op(op, a, b)
        if not a.dtype.is_float:
            return best
        return e.op("Where", e.op("IsNaN", a), b, e.op("Where", e.op("IsNaN", b), a, best))


_ignoring_nan("fmax", "Max")
_ignoring_nan("fmin", "Min")


@aten("nan_to_num")
def nan_to_num(e: Emitter, x: Value, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Value:
    if not x.dtype.is_float:
        return x
    info = torch.finfo(e.out.dtype)
    out = e.op("Where", e.op("IsNaN", x), e.number(0.0 if nan is None else nan, x.dtype), x)
    out = e.op("Where", e.op("IsInf", x, detect_negative=0), e.number(info.max if posinf is None else posinf, x.dtype), out)
    return e.op("Where", e.op("IsInf", x, detect_positive=0), e.number(info.min if neginf is None else neginf, x.dtype), out)


@aten("heaviside")
def heaviside(e: Emitter, x: Value, values: Value) -> Value:
    a, v = e.promoted(SAME, x, values)
    if a.dtype.is_bool:
        return e.op("Or", a, v)
    zero = e.number(0, a.dtype)
    step = e.cast(e.op("Greater", a, zero), a.dtype)
    return e.op("Where", e.op("Equal", a, zero), v, step)


@aten("erfc")
def erfc(e: Emitter, x: Value) -> Value:
    (v,) = e.promoted(FLOAT, x)
    return e.op("Sub", e.number(1.0, v.dtype), e.op("Erf", v))


@aten("frac")
def frac(e: Emitter, x: Value) -> Value:
    return e.op("Sub", x, e.op("aten::trunc", x))


@aten("square")
def square(e: Emitter, x: Value) -> Value:
    v = e.cast(x, e.dtype)
    return e.op("Mul", v, v)


@aten("sinc")
def sinc(e: Emitter, x: Value) -> Value:
    (v,) = e.promoted(FLOAT, x)
    p = e.op("Mul", v, e.number(math.pi, v.dtype))
    return e.op("Where", e.op("Equal", p, e.number(0.0, v.dtype)), e.number(1.0, v.dtype), e.op("Div", e.op("Sin", p), p))


@aten("deg2rad")
def deg2rad(e: Emitter, x: Value) -> Value:
    (v,) = e.promoted(FLOAT, x)
    return e.op("Mul", v, e.number(math.pi / 180, v.dtype))


@aten("rad2deg")
def rad2deg(e: Emitter, x: Value) -> Value:
    (v,) = e.promoted(FLOAT, x)
    return e.op("Mul", v, e.number(180 / math.pi, v.dtype))


@aten("xlogy")
def xlogy(e: Emitter, x: Any, other: Any) -> Value:
    return _xlog(e, x, other, "Log")


@aten("special_xlog1py")
def xlog1py(e: Emitter, x: Any, other: Any) -> Value:
    return _xlog(e, x, other, "aten::log1p")


def _xlog(e: Emitter, x: Any, y: Any, log: str) -> Value:
    a, b = e.promoted(FLOAT, x, y)
    zero = e.number(0.0, a.dtype)
    out = e.op("Where", e.op("Equal", a, zero), zero, e.op("Mul", a, e.op(log, b)))
    return e.op("Where", e.op("IsNaN", b), b, out)


@aten("entr")
def entr(e: Emitter, x: Value) -> Value:
    (v,) = e.promoted(FLOAT, x)
    zero = e.number(0.0, v.dtype)
    inside = e.op("Neg", e.op("Mul", v, e.op("Log", v)))
    low = e.op("Where", e.op("Equal", v, zero), zero, e.number(-math.inf, v.dtype))
    out = e.op("Where", e.op("Greater", v, zero), inside, low)
    return e.op("Where", e.op("IsNaN", v), v, out)


@aten("logit")
def logit(e: Emitter, x: Value, eps: float | None = None) -> Value:
    (v,) = e.promoted(FLOAT, x)
    if eps is not None:
        v = e.op("Min", e.op("Max", v, e.number(eps, v.dtype)), e.number(1 - eps, v.dtype))
    return e.op("Log", e.op("Div", v, e.op("Sub", e.number(1.0, v.dtype), v)))


@aten("lerp")
def lerp(e: Emitter, x: Value, end: Value, weight: Any) -> Value:
    a, b, w = e.promoted(SAME, x, end, weight)
    one, d = e.number(1.0, a.dtype), e.op("Sub", b, a)
    near = e.op("Add", a, e.op("Mul", w, d))
    far = e.op("Sub", b, e.op("Mul", d, e.op("Sub", one, w)))
    return e.op("Where", e.op("Less", e.op("Abs", w), e.number(0.5, a.dtype)), near, far)


def _addc(name: str, op: str) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value, tensor1: Value, tensor2: Value, value: Any = 1) -> Value:
        a, b, c = e.promoted(SAME, x, tensor1, tensor2)
        a, b, c = (e.cast(v, e.dtype) for v in (a, b, c))
        p = e.op(op, b, c)
        return e.op("Add", a, p if value == 1 else e.op("Mul", p, e.number(value, a.dtype)))


_addc("addcmul", "Mul")
_addc("addcdiv", "Div")


# ---------------------------------------------------------------- activations


def _simple(name: str, op: str, **fixed: Any) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value) -> Value:
        return e.op(op, x, **fixed)


for _n, _o in (("hardswish", "HardSwish"), ("mish", "Mish"), ("selu", "Selu")):
    _simple(_n, _o)
_simple("hardsigmoid", "HardSigmoid", alpha=1 / 6, beta=0.5)


@aten("relu")
def relu(e: Emitter, x: Value) -> Value:
    return e.op("Relu", x) if x.dtype.is_float else e.op("Max", x, e.number(0, x.dtype))


@aten("relu6")
def relu6(e: Emitter, x: Value) -> Value:
    return e.op("Clip", x, e.number(0, x.dtype), e.number(6, x.dtype))


@aten("silu")
def silu(e: Emitter, x: Value) -> Value:
    return e.op("Mul", x, e.op("Sigmoid", x))


@aten("gelu")
def gelu(e: Emitter, x: Value, approximate: str = "none") -> Value:
    return e.op("Gelu", x, approximate=approximate)


@aten("leaky_relu")
def leaky_relu(e: Emitter, x: Value, negative_slope: float = 0.01) -> Value:
    return e.op("LeakyRelu", x, alpha=float(negative_slope))


@aten("rrelu")
def rrelu(e: Emitter, x: Value, lower: float = 0.125, upper: float = 1 / 3, training: bool = False) -> Value:
    if training:
        raise UnsupportedOperator("rrelu in training mode draws random numbers", hint="call model.eval()")
    return e.op("LeakyRelu", x, alpha=(lower + upper) / 2)


@aten("elu")
def elu(e: Emitter, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    zero = e.number(0.0, x.dtype)
    low = e.op("Mul", e.op("aten::expm1", e.op("Mul", x, e.number(input_scale, x.dtype))), e.number(alpha * scale, x.dtype))
    return e.op("Where", e.op("LessOrEqual", x, zero), low, x if scale == 1 else e.op("Mul", x, e.number(scale, x.dtype)))


@aten("celu")
def celu(e: Emitter, x: Value, alpha: float = 1.0) -> Value:
    return elu(e, x, alpha, 1.0, 1 / alpha)


@aten("hardtanh")
def hardtanh(e: Emitter, x: Value, min_val: Any = -1, max_val: Any = 1) -> Value:
    return e.op("Min", e.op("Max", x, e.number(min_val, x.dtype)), e.number(max_val, x.dtype))


@aten("softplus")
def softplus(e: Emitter, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    b = e.number(beta, x.dtype)
    y = e.op("Mul", x, b)
    low = e.op("Div", e.op("aten::log1p", e.op("Exp", y)), b)
    return e.op("Where", e.op("Greater", y, e.number(threshold, x.dtype)), x, low)


@aten("log_sigmoid", "log_sigmoid_forward")
def log_sigmoid(e: Emitter, x: Value) -> Any:
    """min(x, 0) - log1p(exp(-|x|))."""
    low = e.op("Min", x, e.number(0.0, x.dtype))
    y = e.op("Sub", low, e.op("aten::log1p", e.op("Exp", e.op("Neg", e.op("Abs", x)))))
    return (y, x) if isinstance(e.out, (tuple, list)) else y


@aten("hardshrink")
def hardshrink(e: Emitter, x: Value, lambd: float = 0.5) -> Value:
    inside = e.op("LessOrEqual", e.op("Abs", x), e.number(lambd, x.dtype))
    return e.op("Where", inside, e.number(0.0, x.dtype), x)


@aten("softshrink")
def softshrink(e: Emitter, x: Value, lambd: float = 0.5) -> Value:
    t, zero = e.number(lambd, x.dtype), e.number(0.0, x.dtype)
    high = e.op("Where", e.op("Greater", x, t), e.op("Sub", x, t), e.op("Mul", x, zero))
    return e.op("Where", e.op("Less", x, e.number(-lambd, x.dtype)), e.op("Add", x, t), high)


@aten("threshold")
def threshold(e: Emitter, x: Value, threshold: Any, value: Any) -> Value:
    return e.op("Where", e.op("LessOrEqual", x, e.number(threshold, x.dtype)), e.number(value, x.dtype), x)


@aten("softsign")
def softsign(e: Emitter, x: Value) -> Value:
    return e.op("Div", x, e.op("Add", e.number(1.0, x.dtype), e.op("Abs", x)))


@aten("tanhshrink")
def tanhshrink(e: Emitter, x: Value) -> Value:
    return e.op("Sub", x, e.op("Tanh", x))


@aten("prelu", "_prelu_kernel")
def prelu(e: Emitter, x: Value, weight: Value) -> Value:
    if weight.rank == 1 and x.rank > 1:
        weight = e.reshape(weight, [1, weight.shape[0], *[1] * (x.rank - 2)])
    return e.reshape(e.op("PRelu", x, weight), x.shape)


@aten("glu")
def glu(e: Emitter, x: Value, dim: int = -1) -> Value:
    n = x.shape[dim] // 2
    a, b = e.slice(x, dim, 0, n), e.slice(x, dim, n, x.shape[dim])
    return e.op("Mul", a, e.op("Sigmoid", b))


@aten("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
def dropout(e: Emitter, x: Value, p: float = 0.5, train: bool | None = False) -> Any:
    if train and p:
        raise UnsupportedOperator("dropout in training mode draws random numbers", hint="call model.eval()")
    return (x, _all(e, x, True)) if isinstance(e.out, (tuple, list)) else x


# ---------------------------------------------------------------- types


@aten("_to_copy", "to", "type_as")
def to(e: Emitter, x: Value, **_: Any) -> Value:
    return e.cast(x, e.dtype)


@aten("view.dtype")
def view_dtype(e: Emitter, x: Value, dtype: torch.dtype) -> Value:
    to = dtype_of(dtype)
    if to.bits != x.dtype.bits:
        raise UnsupportedOperator(f"a view of {x.dtype} as {to}: the widths differ")
    return e.op("BitCast", x, to=to)


# ---------------------------------------------------------------- loops an element


def _looped(name: str, op: str, kind: Kind = FLOAT) -> None:
    @aten(name)
    def rule(e: Emitter, x: Any, other: Any = None, n: Any = None) -> Value:
        a, b = e.promoted(kind, x, other if n is None else n)
        return e.op(op, e.expand(a, e.shape), e.expand(b, e.shape))


for _n in ("zeta", "hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"):
    _looped(f"special_{_n}", f"aten::{_n}")
_looped("igamma", "aten::igamma")
_looped("igammac", "aten::igammac")
_looped("gcd", "aten::gcd", SAME)
alias(special_gammainc="igamma", special_gammaincc="igammac")
