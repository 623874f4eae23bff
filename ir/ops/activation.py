"""Activation functions: rows of the elementwise table. Attribute defaults are ONNX's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from luthier.ir.expr import Expr, maximum, minimum, select, unary
from luthier.ir.graph import Node
from luthier.ir.ops.common import Array, register
from luthier.ir.ops.elementwise import Map, erf, k

SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def _attr(node: Node, name: str, default: float) -> float:
    return float(node.attrs.get(name, default))


def _act(*names: str, expr: Callable[[Node, Expr], Expr], ref: Callable[[Node, Array], Any]) -> None:
    for n in names:
        register(n, Map("float", expr, ref))


def sigmoid(x: Expr) -> Expr:
    return unary("sigmoid", x)


def _sig(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def softplus(x: Expr) -> Expr:
    """log(1 + e^x) without overflow: max(x, 0) + log1p(e^-|x|)."""
    return maximum(k(x, 0), x) + unary("log1p", unary("exp", -unary("abs", x)))


def gelu(x: Expr, tanh: bool = False) -> Expr:
    """x Phi(x): by erf, or the tanh approximation."""
    if tanh:
        inner = k(x, math.sqrt(2 / math.pi)) * (x + k(x, 0.044715) * x * x * x)
        return k(x, 0.5) * x * (k(x, 1) + unary("tanh", inner))
    return k(x, 0.5) * x * (k(x, 1) + unary("erf", x * k(x, math.sqrt(0.5))))


def gelu_ref(x: Array, tanh: bool = False) -> Array:
    if tanh:
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))


register("Relu", Map("number", lambda node, x: maximum(k(x, 0), x), lambda node, x: np.where(x < 0, 0, x)))
_act("LeakyRelu", expr=lambda n, x: select(x < k(x, 0), x * k(x, _attr(n, "alpha", 0.01)), x), ref=lambda n, x: np.where(x < 0, x * _attr(n, "alpha", 0.01), x))
_act("Elu", expr=lambda n, x: select(x < k(x, 0), k(x, _attr(n, "alpha", 1)) * unary("expm1", minimum(k(x, 0), x)), x),
     ref=lambda n, x: np.where(x < 0, _attr(n, "alpha", 1) * np.expm1(x), x))  # fmt: skip
_act(
    "Selu",
    expr=lambda n, x: k(x, _attr(n, "gamma", SELU_GAMMA)) * select(x < k(x, 0), k(x, _attr(n, "alpha", SELU_ALPHA)) * unary("expm1", minimum(k(x, 0), x)), x),
    ref=lambda n, x: _attr(n, "gamma", SELU_GAMMA) * np.where(x < 0, _attr(n, "alpha", SELU_ALPHA) * np.expm1(x), x),
)
_act(
    "Celu", expr=lambda n, x: select(x < k(x, 0), k(x, _attr(n, "alpha", 1)) * unary("expm1", minimum(k(x, 0), x) / k(x, _attr(n, "alpha", 1))), x),
    ref=lambda n, x: np.where(x < 0, _attr(n, "alpha", 1) * np.expm1(x / _attr(n, "alpha", 1)), x),
)
_act("ThresholdedRelu", expr=lambda n, x: select(k(x, _attr(n, "alpha", 1)) < x, x, k(x, 0)), ref=lambda n, x: np.where(x > _attr(n, "alpha", 1), x, 0))
_act(
    "HardSigmoid", expr=lambda n, x: minimum(k(x, 1), maximum(k(x, 0), x * k(x, _attr(n, "alpha", 0.2)) + k(x, _attr(n, "beta", 0.5)))),
    ref=lambda n, x: np.clip(x * _attr(n, "alpha", 0.2) + _attr(n, "beta", 0.5), 0, 1),
)
_act(
    "HardSwish", expr=lambda n, x: x * minimum(k(x, 1), maximum(k(x, 0), x * k(x, 1 / 6) + k(x, 0.5))),
    ref=lambda n, x: x * np.clip(x / 6 + 0.5, 0, 1),
)
_act("Softplus", expr=lambda n, x: softplus(x), ref=lambda n, x: np.logaddexp(0, x))
_act("Softsign", expr=lambda n, x: x / (k(x, 1) + unary("abs", x)), ref=lambda n, x: x / (1 + np.abs(x)))
_act("Mish", expr=lambda n, x: x * unary("tanh", softplus(x)), ref=lambda n, x: x * np.tanh(np.logaddexp(0, x)))
_act("Swish", expr=lambda n, x: x * sigmoid(x * k(x, _attr(n, "alpha", 1))), ref=lambda n, x: x * _sig(x * _attr(n, "alpha", 1)))
_act("com.microsoft::QuickGelu", expr=lambda n, x: x * sigmoid(x * k(x, _attr(n, "alpha", 1.702))), ref=lambda n, x: x * _sig(x * _attr(n, "alpha", 1.702)))
_act("Gelu", expr=lambda n, x: gelu(x, n.attrs.get("approximate", "none") == "tanh"), ref=lambda n, x: gelu_ref(x, n.attrs.get("approximate", "none") == "tanh"))
_act("com.microsoft::Gelu", expr=lambda n, x: gelu(x), ref=lambda n, x: gelu_ref(x))
register("com.microsoft::BiasGelu", Map("float", lambda n, a, b: gelu(a + b), lambda n, a, b: gelu_ref(a + b), (2, 2)))
register(
    "com.microsoft::FastGelu",
    Map("float", lambda n, a, b=None: gelu(a if b is None else a + b, True), lambda n, a, b=None: gelu_ref(a if b is None else a + b, True), (1, 2)),
)
register("PRelu", Map("number", lambda n, x, s: select(x < k(x, 0), x * s, x), lambda n, x, s: np.where(x < 0, x * s, x), (2, 2)))


def _shrink(n: Node, x: Expr) -> Expr:
    lam, bias = k(x, _attr(n, "lambd", 0.5)), k(x, _attr(n, "bias", 0))
    return select(x < -lam, x + bias, select(lam < x, x - bias, k(x, 0)))


def _shrink_ref(n: Node, x: Array) -> Array:
    lam, bias = _attr(n, "lambd", 0.5), _attr(n, "bias", 0)
    return np.where(x < -lam, x + bias, np.where(x > lam, x - bias, 0))


register("Shrink", Map("number", _shrink, _shrink_ref))
