"""Recognise activations by their values, whatever their spelling.

Before: ``y = Mul(Mul(x, 0.5), Add(Erf(Div(x, 1.4142)), 1))``. After: ``y = Gelu(x)``.
An elementwise region of one variable and scalar constants is a function R -> R. It is evaluated in f64 at sample points and
compared with the table of known activations; spellings cannot hide. Results change by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from luthier.ir.graph import Graph, Node, Value
from luthier.ir.op import lookup
from luthier.passes.graph.canonicalize import scalar
from luthier.passes.graph.rewrite import Context, rewrite_graph

Array = np.ndarray[Any, Any]
_POINTS = np.concatenate([np.linspace(-9.0, 9.0, 61), [-30.5, -3.0, -1e-3, 0.0, 1e-3, 3.0, 30.5]])
_erf = np.vectorize(math.erf, otypes=[np.float64])
_MAX_NODES = 12


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def _clip(n: Node, x: Array, lo: Array | None = None, hi: Array | None = None) -> Array:
    x = x if lo is None else np.maximum(x, lo)
    return x if hi is None else np.minimum(x, hi)


EVALUATE: dict[str, Callable[..., Array]] = {
    "Add": lambda n, a, b: a + b, "Sub": lambda n, a, b: a - b, "Mul": lambda n, a, b: a * b, "Div": lambda n, a, b: a / b,
    "Pow": lambda n, a, b: np.power(a, b), "Max": lambda n, a, b: np.maximum(a, b), "Min": lambda n, a, b: np.minimum(a, b),
    "Erf": lambda n, a: _erf(a), "Tanh": lambda n, a: np.tanh(a), "Sigmoid": lambda n, a: _sigmoid(a), "Exp": lambda n, a: np.exp(a),
    "Log": lambda n, a: np.log(a), "Neg": lambda n, a: -a, "Reciprocal": lambda n, a: 1.0 / a, "Relu": lambda n, a: np.maximum(a, 0),
    "Clip": _clip, "Softplus": lambda n, a: np.logaddexp(0, a),
    "HardSigmoid": lambda n, a: np.clip(n.attrs.get("alpha", 0.2) * a + n.attrs.get("beta", 0.5), 0, 1),
}  # fmt: skip

TANH_GELU = math.sqrt(2 / math.pi)
KNOWN: tuple[tuple[str, dict[str, Any], Callable[[Array], Array]], ...] = (
    ("Gelu", {}, lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    ("Gelu", {"approximate": "tanh"}, lambda x: 0.5 * x * (1 + np.tanh(TANH_GELU * (x + 0.044715 * x**3)))),
    ("Swish", {}, lambda x: x * _sigmoid(x)),
    ("HardSwish", {}, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("Mish", {}, lambda x: x * np.tanh(np.logaddexp(0, x))),
)  # fmt: skip
_ROOTS = frozenset({"Mul", "Div"})
_TELLING = frozenset({"Erf", "Tanh", "Sigmoid", "Exp", "Clip", "HardSigmoid", "Min", "Relu"})


def recognise_activations(graph: Graph) -> bool:
    """In place; True when something was recognised."""
    return rewrite_graph(graph, _rule)


def _rule(n: Node, ctx: Context) -> Value | None:
    """Widen the region behind ``n`` step by step; whenever it depends on a single value, compare it with the table."""
    if n.op not in _ROOTS or not n.outputs[0].dtype.is_float:
        return None
    inside: set[Node] = set()
    border: list[Value] = [n.outputs[0]]
    while len(inside) < _MAX_NODES:
        v = next((w for w in border if _enters(w, n, inside, ctx)), None)
        if v is None:
            return None
        m = ctx.producers[v]
        inside.add(m)
        border.remove(v)
        for w in m.inputs:
            if w is not None and w.data is None and w not in border:
                border.append(w)
        if len(border) == 1 and border[0].shape == n.outputs[0].shape and any(k.op in _TELLING for k in inside):
            y = _match(n, border[0], ctx)
            if y is not None:
                return y
    return None


def _enters(v: Value, root: Node, inside: set[Node], ctx: Context) -> bool:
    """The producer of ``v`` may join: elementwise with scalar constants only, and read by the region alone."""
    p = ctx.producer(v)
    if p is None or p.op not in EVALUATE or len(p.outputs) != 1 or v.shape != root.outputs[0].shape or not _scalars(p):
        return False
    return p is root or _single_path(v, inside, ctx)


def _match(n: Node, x: Value, ctx: Context) -> Value | None:
    with np.errstate(all="ignore"):
        y = _evaluate(n.outputs[0], x, ctx, {})
        for op, attrs, f in KNOWN:
            if lookup(op) is not None and np.allclose(y, f(_POINTS), rtol=2e-6, atol=2e-6):
                return ctx.make(op, [x], attrs, n)
    return None


def _scalars(n: Node) -> bool:
    """The constants among the operands are all of one value."""
    return all(w is None or w.data is None or scalar(w) is not None for w in n.inputs)


def _single_path(v: Value, inside: set[Node], ctx: Context) -> bool:
    """Everything that reads ``v`` lies in the region."""
    return ctx.uses.get(v, 0) <= sum(1 for m in inside for w in m.inputs if w is v)


def _evaluate(v: Value, x: Value, ctx: Context, memo: dict[Value, Array]) -> Array:
    if v is x:
        return _POINTS
    if v.data is not None:
        return np.float64(scalar(v))  # type: ignore[return-value]
    if v not in memo:
        n = ctx.producers[v]
        memo[v] = EVALUATE[n.op](n, *(None if w is None else _evaluate(w, x, ctx, memo) for w in n.inputs))
    return memo[v]
