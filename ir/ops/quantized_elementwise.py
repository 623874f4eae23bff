"""com.microsoft operators on quantized tensors: QLinearAdd, QLinearMul, QLinearSigmoid, QLinearLeakyRelu, QLinearConcat,
QLinearGlobalAveragePool. Each dequantizes, computes in f32 and quantizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, axis, sum_
from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, cast, const, load, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ONE,
    Array,
    at,
    axes_of,
    broadcast,
    check_axis,
    define,
    expect_one,
    make,
    must,
    need,
    padded,
    product,
    shape_error,
    temp,
)
from luthier.ir.ops.quantize import centered, saturate, saturate_ref, scale_and_zero


def real(node: Node, ins: Sequence[Buffer | None], x: Expr, s: int, z: int) -> Expr:
    """A quantized value in f32, with scale and zero point at inputs ``s`` and ``z``."""
    sc, zp = scale_and_zero(node, ins, s, z)
    return cast(centered(x, zp), f32) * sc


def quantized(node: Node, ins: Sequence[Buffer | None], v: Expr, s: int, z: int, out: Buffer) -> Expr:
    sc, zp = scale_and_zero(node, ins, s, z)
    return saturate(v / sc, zp, out.dtype)


def real_ref(x: Any, s: Any, z: Any) -> Array:
    zero = np.int32(0) if z is None else np.asarray(z).reshape(()).astype(np.int32)
    return np.asarray((np.asarray(x).astype(np.int32) - zero).astype(np.float32) * np.asarray(s, np.float32).reshape(()))


def quantized_ref(v: Array, s: Any, z: Any, node: Node) -> Array:
    return saturate_ref(v / np.asarray(s, np.float32).reshape(()), None if z is None else np.asarray(z).reshape(()), node.outputs[0].dtype)


@op("com.microsoft::QLinearAdd", "com.microsoft::QLinearMul")
class QLinearBinary(Op):
    """(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero), broadcast like Add."""

    kind = "elementwise"
    permutes = True

    def infer(self, node: Node) -> Sequence[TensorType]:
        a, b = need(node, 0), need(node, 3)
        expect_one(node, 1, 2, 4, 5, 6, 7)
        return [TensorType(a.dtype, broadcast(node, a.shape, b.shape))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        a = real(node, ins, at(must(ins, 0), axes), 1, 2)
        b = real(node, ins, at(must(ins, 3), axes), 4, 5)
        v = a + b if self.name.endswith("Add") else a * b
        return make(node, ins, outs, [define(outs[0], axes, quantized(node, ins, v, 6, 7, outs[0]))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, sa, za, b, sb, zb, sy, zy = padded(arrays, 8)
        x, y = real_ref(a, sa, za), real_ref(b, sb, zb)
        return [quantized_ref(x + y if self.name.endswith("Add") else x * y, sy, zy, node)]


@op("com.microsoft::QLinearSigmoid", "com.microsoft::QLinearLeakyRelu")
class QLinearUnary(Op):
    """(x, x_scale, x_zero, y_scale, y_zero)."""

    kind = "elementwise"
    permutes = True

    def infer(self, node: Node) -> Sequence[TensorType]:
        expect_one(node, 1, 2, 3, 4)
        return [need(node, 0).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x = real(node, ins, at(must(ins, 0), axes), 1, 2)
        alpha = float(node.attrs.get("alpha", 0.01))
        v = unary("sigmoid", x) if self.name.endswith("Sigmoid") else select(x < 0.0, x * alpha, x)
        return make(node, ins, outs, [define(outs[0], axes, quantized(node, ins, v, 3, 4, outs[0]))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, sx, zx, sy, zy = padded(arrays, 5)
        r = real_ref(x, sx, zx)
        v = 1 / (1 + np.exp(-r)) if self.name.endswith("Sigmoid") else np.where(r < 0, r * np.float32(node.attrs.get("alpha", 0.01)), r)
        return [quantized_ref(v.astype(np.float32), sy, zy, node)]


@op("com.microsoft::QLinearGlobalAveragePool")
class QLinearGlobalAveragePool(Op):
    """(x [N, C, ...], x_scale, x_zero, y_scale, y_zero): the mean over the spatial axes; the sum is exact in i32. ``channels_last``: x is
    [N, ..., C]."""

    kind = "reduction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if x.rank < 3:
            raise shape_error(node, "QLinearGlobalAveragePool takes [N, C, ...]")
        expect_one(node, 1, 2, 3, 4)
        over = self.over(node)
        return [TensorType(x.dtype, tuple(ONE if d in over else s for d, s in enumerate(x.shape)))]

    def over(self, node: Node) -> range:
        """The axes of which the mean is taken."""
        rank = need(node, 0).rank
        return range(1, rank - 1) if int(node.attrs.get("channels_last", 0)) else range(2, rank)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x = must(ins, 0)
        axes = axes_of(outs[0].shape)
        over = self.over(node)
        ks = {d: axis(f"k{d}", x.shape[d]) for d in over}
        sx, zx = scale_and_zero(node, ins, 1, 2)
        element = load(x, [ks[d].var if d in ks else a.var for d, a in enumerate(axes)])
        acc = temp(outs[0], "acc", axes, sum_(ks.values(), centered(element, zx)))
        v = cast(load(acc.buf, [a.var for a in axes]), f32) * (sx / cast(product(x.shape[d] for d in over), f32))
        return make(node, ins, outs, [acc, define(outs[0], axes, quantized(node, ins, v, 3, 4, outs[0]))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, sx, zx, sy, zy = padded(arrays, 5)
        a = np.asarray(x).astype(np.int32) - (0 if zx is None else np.asarray(zx).reshape(()).astype(np.int32))
        ax = tuple(self.over(node))
        n = np.float32(np.prod([a.shape[d] for d in ax]))
        v = a.sum(ax, keepdims=True, dtype=np.int32).astype(np.float32) * (np.asarray(sx, np.float32).reshape(()) / n)
        return [quantized_ref(v, sy, zy, node)]


@op("com.microsoft::QLinearConcat")
class QLinearConcat(Op):
    """(y_scale, y_zero, then x, scale, zero for each part) along ``axis``."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        parts = [need(node, i) for i in range(2, len(node.inputs), 3)]
        a = check_axis(node, int(node.attrs["axis"]), parts[0].rank)
        total = const(0)
        expect_one(node, *(i for i in range(len(node.inputs)) if i < 2 or (i - 2) % 3))
        for p in parts:
            if p.rank != parts[0].rank:
                raise shape_error(node, "parts differ in rank")
            total = total + p.shape[a]
        return [TensorType(need(node, 1).dtype, tuple(total if d == a else s for d, s in enumerate(parts[0].shape)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        y = outs[0]
        axes = axes_of(y.shape)
        a = check_axis(node, int(node.attrs["axis"]), y.rank)
        out: Expr | None = None
        start = const(0)
        for i in range(2, len(ins), 3):
            b = must(ins, i)
            idx = [x.var - start if d == a else x.var for d, x in enumerate(axes)]
            end = start + b.shape[a]
            inside = (start <= axes[a].var) & (axes[a].var < end)
            v = quantized(node, ins, real(node, ins, load(b, idx, inside, const(0, b.dtype)), i + 1, i + 2), 0, 1, y)
            out = v if out is None else select(inside, v, out)
            start = end
        assert out is not None
        return make(node, ins, outs, [define(y, axes, out)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        sy, zy, *rest = arrays
        parts = [quantized_ref(real_ref(*rest[i : i + 3]), sy, zy, node) for i in range(0, len(rest), 3)]
        return [np.concatenate(parts, int(node.attrs["axis"]))]


__all__ = ["real", "quantized"]
