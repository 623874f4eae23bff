"""Numeric operators of domain ai.onnx.ml: ArrayFeatureExtractor, Binarizer, Scaler, Normalizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, axis, max_, sum_
from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, cast, const, load, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import ONE, Array, axes_of, define, make, must, need, shape_error, temp, to_index, unsupported, widen


@op("ai.onnx.ml::ArrayFeatureExtractor")
class ArrayFeatureExtractor(Op):
    """(X [..., n], Y positions): the elements of the last axis at the positions."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, y = need(node, 0), need(node, 1)
        count = ONE
        for s in y.shape:
            count = count * s
        lead = x.shape[:-1] if x.rank > 1 else (ONE,)
        return [TensorType.of(x.dtype, (*lead, count))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, p = must(ins, 0), must(ins, 1)
        axes = axes_of(outs[0].shape)
        at = load(p, [const(0)] * (p.rank - 1) + [axes[-1].var]) if p.rank else load(p, ())
        i = to_index(at)
        n = x.shape[-1]
        lead = [a.var for a in axes[:-1]] if x.rank > 1 else []
        return make(node, ins, outs, [define(outs[0], axes, load(x, [*lead, i], (const(0) <= i) & (i < n)))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, p = np.asarray(arrays[0]), np.asarray(arrays[1]).reshape(-1)
        r = np.take(x, p, axis=-1)
        return [r.reshape(1, -1) if x.ndim == 1 else r]


@op("ai.onnx.ml::Binarizer")
class Binarizer(Op):
    """1 where ``x > threshold``, else 0."""

    kind = "elementwise"
    permutes = True

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [need(node, 0).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x = load(must(ins, 0), [a.var for a in axes])
        t = const(node.attrs.get("threshold", 0.0), x.dtype)
        return make(node, ins, outs, [define(outs[0], axes, select(t < x, const(1, x.dtype), const(0, x.dtype)))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        return [(x > np.asarray(node.attrs.get("threshold", 0.0), x.dtype)).astype(x.dtype)]


@op("ai.onnx.ml::Scaler")
class Scaler(Op):
    """``(x - offset) * scale`` in f32, attributes per feature (last axis) or for all."""

    kind = "elementwise"

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [TensorType(f32, need(node, 0).shape)]

    def feature(self, values: Sequence[float], j: Expr) -> Expr:
        """The value of feature ``j``: a chain of selects."""
        e = const(float(values[-1]), f32)
        for k in range(len(values) - 2, -1, -1):
            e = select(j.eq(k), const(float(values[k]), f32), e)
        return e

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        off, sc = list(node.attrs.get("offset") or [0.0]), list(node.attrs.get("scale") or [1.0])
        if max(len(off), len(sc)) > 64:
            raise unsupported(node, "Scaler of more than 64 features")
        x = cast(load(must(ins, 0), [a.var for a in axes]), f32)
        j = axes[-1].var
        return make(node, ins, outs, [define(outs[0], axes, (x - self.feature(off, j)) * self.feature(sc, j))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        off, sc = (np.asarray(node.attrs.get(k) or [d], np.float32) for k, d in (("offset", 0.0), ("scale", 1.0)))
        return [((np.asarray(arrays[0]).astype(np.float32) - off) * sc).astype(np.float32)]


@op("ai.onnx.ml::Normalizer")
class Normalizer(Op):
    """Rows of X [N, C] divided by their norm: MAX, L1 or L2."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if x.rank not in (1, 2):
            raise shape_error(node, "Normalizer takes [C] or [N, C]")
        return [TensorType(f32, x.shape)]

    def norm(self, node: Node) -> str:
        n = node.attrs.get("norm", "MAX")
        n = n.decode() if isinstance(n, bytes) else str(n)
        if n not in ("MAX", "L1", "L2"):
            raise unsupported(node, f"norm {n!r}")
        return n

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, axes, how = must(ins, 0), axes_of(outs[0].shape), self.norm(node)
        lead = [a.var for a in axes[:-1]]
        k = axis("k", x.shape[-1])
        v = cast(load(x, [*lead, k.var]), f32)
        if how == "MAX":
            e = max_(k, unary("abs", v))
        else:
            e = sum_(k, unary("abs", v) if how == "L1" else v * v)
        n = temp(outs[0], "norm", axes[:-1], e)
        d = load(n.buf, lead)
        d = unary("sqrt", d) if how == "L2" else d
        y = widen(cast(load(x, [*lead, axes[-1].var]), f32))
        return make(node, ins, outs, [n, define(outs[0], axes, select(d.eq(0.0), y, y / d))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, how = np.asarray(arrays[0]).astype(np.float32), self.norm(node)
        n = {"MAX": lambda: np.abs(x).max(-1, keepdims=True), "L1": lambda: np.abs(x).sum(-1, keepdims=True), "L2": lambda: np.sqrt((x * x).sum(-1, keepdims=True))}[how]()
        return [np.where(n == 0, x, x / np.where(n == 0, 1, n)).astype(np.float32)]


