"""Steps of optimizers: Adagrad, Adam, Momentum (domain ai.onnx.preview.training). Each takes (R, T, tensors ...) for n tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, LetStmt
from luthier.ir.expr import Expr, binary, cast, const, load, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import ZERO, Array, axes_of, define, expect_one, expect_shape, make, must, need, shape_error, widen


class Optimizer(Op):
    """``kinds`` inputs a tensor (X, G, then state) and one output fewer: all but G."""

    kinds = 3

    def count(self, node: Node) -> int:
        n = (len(node.inputs) - 2) // self.kinds
        if len(node.inputs) != 2 + n * self.kinds or n < 1:
            raise shape_error(node, f"{self.name} takes R, T and {self.kinds} inputs a tensor")
        return n

    def infer(self, node: Node) -> Sequence[TensorType]:
        n = self.count(node)
        expect_one(node, 0, 1)
        for i in range(n):
            for k in range(1, self.kinds):
                need(node, 2 + k * n + i)
                expect_shape(node, 2 + k * n + i, need(node, 2 + i).shape)
        return [need(node, 2 + k * n + i).type for k in (0, *range(2, self.kinds)) for i in range(n)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        n = self.count(node)
        rate, step = (load(must(ins, i), [ZERO] * must(ins, i).rank) for i in (0, 1))
        lets: list[LetStmt] = []
        for i in range(n):
            bufs = [must(ins, 2 + k * n + i) for k in range(self.kinds)]
            axes = axes_of(bufs[0].shape)
            v = [widen(load(b, [a.var for a in axes])) for b in bufs]
            new = self.update(node, cast(rate, v[0].dtype), step, v)
            for k, e in enumerate(new):
                lets.append(define(outs[k * n + i], axes, e))
        return make(node, ins, outs, lets)

    def update(self, node: Node, rate: Expr, step: Expr, v: list[Expr]) -> list[Expr]:
        """New X and states from (X, G, states...)."""
        raise NotImplementedError

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        n = self.count(node)
        rate, step = float(np.asarray(arrays[0]).reshape(())), int(np.asarray(arrays[1]).reshape(()))
        outs: list[list[Array]] = [[] for _ in range(self.kinds - 1)]
        for i in range(n):
            v = [np.asarray(arrays[2 + k * n + i]) for k in range(self.kinds)]
            for o, e in zip(outs, self.numpy_update(node, rate, step, [a.astype(np.float64) for a in v]), strict=True):
                o.append(e.astype(v[0].dtype))
        return [a for o in outs for a in o]

    def numpy_update(self, node: Node, rate: float, step: int, v: list[Array]) -> list[Array]:
        raise NotImplementedError


def _attr(node: Node, name: str, default: float = 0.0) -> float:
    return float(node.attrs.get(name, default))


@op("ai.onnx.preview.training::Adagrad")
class Adagrad(Optimizer):
    """(R, T, X, G, H): ``G' = norm X + G; H' = H + G'^2; X' = X - r G' / (sqrt(H') + eps)`` with ``r = R / (1 + T decay)``."""

    def update(self, node: Node, rate: Expr, step: Expr, v: list[Expr]) -> list[Expr]:
        x, g, h = v
        r = rate / (cast(step, x.dtype) * _attr(node, "decay_factor") + 1.0)
        g = x * _attr(node, "norm_coefficient") + g
        h = h + g * g
        return [x - r * g / (unary("sqrt", h) + _attr(node, "epsilon", 1e-6)), h]

    def numpy_update(self, node: Node, rate: float, step: int, v: list[Array]) -> list[Array]:
        x, g, h = v
        r = rate / (1 + step * _attr(node, "decay_factor"))
        g = _attr(node, "norm_coefficient") * x + g
        h = h + g * g
        return [x - r * g / (np.sqrt(h) + _attr(node, "epsilon", 1e-6)), h]


@op("ai.onnx.preview.training::Adam")
class Adam(Optimizer):
    """(R, T, X, G, V, H): moments with ``alpha`` and ``beta``, bias corrected when T > 0."""

    kinds = 4

    def update(self, node: Node, rate: Expr, step: Expr, v: list[Expr]) -> list[Expr]:
        x, g, m, h = v
        d = x.dtype
        a, b = _attr(node, "alpha", 0.9), _attr(node, "beta", 0.999)
        t = cast(step, d)
        g = x * _attr(node, "norm_coefficient") + g
        m = m * a + g * (1 - a)
        h = h * b + g * g * (1 - b)
        one = const(1.0, d)
        fixed = rate * unary("sqrt", one - binary("pow", const(b, d), t)) / (one - binary("pow", const(a, d), t))
        x = x - select(const(0, step.dtype) < step, fixed, rate) * m / (unary("sqrt", h) + _attr(node, "epsilon", 1e-6))
        return [x * (1 - _attr(node, "norm_coefficient_post")), m, h]

    def numpy_update(self, node: Node, rate: float, step: int, v: list[Array]) -> list[Array]:
        x, g, m, h = v
        a, b = _attr(node, "alpha", 0.9), _attr(node, "beta", 0.999)
        g = _attr(node, "norm_coefficient") * x + g
        m = a * m + (1 - a) * g
        h = b * h + (1 - b) * g * g
        r = rate * np.sqrt(1 - b**step) / (1 - a**step) if step > 0 else rate
        return [(1 - _attr(node, "norm_coefficient_post")) * (x - r * m / (np.sqrt(h) + _attr(node, "epsilon", 1e-6))), m, h]


@op("ai.onnx.preview.training::Momentum")
class Momentum(Optimizer):
    """(R, T, X, G, V): ``V' = alpha V + beta' G'``; ``mode`` standard steps by V', nesterov by ``G' + alpha V'``."""

    def update(self, node: Node, rate: Expr, step: Expr, v: list[Expr]) -> list[Expr]:
        x, g, m = v
        a, b = _attr(node, "alpha"), _attr(node, "beta")
        g = x * _attr(node, "norm_coefficient") + g
        m = m * a + g * select(const(0, step.dtype) < step, const(b, x.dtype), const(1.0, x.dtype))
        return [x - rate * (g + m * a if self.nesterov(node) else m), m]

    def nesterov(self, node: Node) -> bool:
        mode = node.attrs.get("mode", "standard")
        return (mode.decode() if isinstance(mode, bytes) else mode) == "nesterov"

    def numpy_update(self, node: Node, rate: float, step: int, v: list[Array]) -> list[Array]:
        x, g, m = v
        a, b = _attr(node, "alpha"), _attr(node, "beta")
        g = _attr(node, "norm_coefficient") * x + g
        m = a * m + (b if step > 0 else 1) * g
        return [x - rate * (g + a * m if self.nesterov(node) else m), m]
