"""Convolutions of quantized operands: ConvInteger and QLinearConv. Sums are exact in i32; padding counts as the zero point of x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.dtypes import f32, i32
from luthier.ir.expr import Expr, cast, const, load, load_parts
from luthier.ir.graph import Node, TensorType, Value
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    const_value,
    define,
    expect_shape,
    get,
    is_one,
    make,
    need,
    padded,
    type_error,
    unsupported,
)
from luthier.ir.ops.conv import Conv, channels_last, conv_ref
from luthier.ir.ops.quantize import centered, check_parameters, saturate, saturate_ref, scale_and_zero


def _zero(node: Node, ins: Sequence[Buffer | None], i: int, m: Expr) -> Expr | None:
    """The zero point at input ``i`` (for filter ``m``); None when absent or known to be 0."""
    b = get(ins, i)
    if b is None:
        return None
    v = const_value(node.input(i))
    if v is not None:
        return None if v == 0 else const(v, b.dtype)
    return load(b, [ZERO] * b.rank if b.rank == 0 or is_one(b.shape[0]) else [m])


def _centered_ref(a: Any, z: Any, per: Sequence[int] | None = None) -> Array:
    """numpy: ``a - z`` in i32; a vector z is reshaped to ``per``."""
    r = np.asarray(a).astype(np.int32)
    if z is None:
        return r
    z = np.asarray(z).astype(np.int32).reshape(-1)
    return np.asarray(r - (z.reshape(per) if per is not None and z.size > 1 else z[0]), np.int32)


@op("ConvInteger")
class ConvInteger(Conv):
    """(x, w, x_zero, w_zero) of i8 or u8 to i32; the zero point of w may be one a filter."""

    def check_types(self, node: Node) -> Any:
        if any(need(node, i).dtype.name not in ("i8", "u8") for i in (0, 1)):
            raise type_error(node, "ConvInteger takes i8 or u8")
        return i32

    def infer(self, node: Node) -> Sequence[TensorType]:
        (t,) = super().infer(node)
        check_parameters(node, (2,))
        check_parameters(node, (3,), t.shape[-1 if channels_last(node) else 1])
        return [t]

    def bias(self, node: Node) -> Value | None:
        return None

    def product(self, node: Node, ins: Sequence[Buffer | None], x: Expr, w: Expr, c: Expr, m: Expr, mask: Expr) -> Expr:
        zx = _zero(node, ins, 2, ZERO)
        if zx is not None:  # a masked load gives the zero point, so that padding adds nothing
            buf, idx, cond, _ = load_parts(x)
            x = load(buf, idx, cond, zx)
        return centered(x, zx) * centered(w, _zero(node, ins, 3, m))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, w, zx, zw = padded(arrays, 4)
        last = channels_last(node)
        per = [1] * (np.ndim(w) - 1)
        a, b = _centered_ref(x, zx), _centered_ref(w, zw, [*per, -1] if last else [-1, *per])
        if last:
            a, b = np.moveaxis(a, -1, 1), np.moveaxis(b, (-1, -2), (0, 1))
        y = conv_ref(node, a, b).astype(np.int32)
        return [np.moveaxis(y, 1, -1) if last else y]


@op("QLinearConv")
class QLinearConv(Op):
    """(x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias i32); w_scale and w_zero may be one a filter.

    ``saturate(round((acc + bias) * (x_scale * w_scale / y_scale)) + y_zero)``."""

    kind = "contraction"

    def inner(self, node: Node) -> Node:
        """The integer convolution inside."""
        i = node.inputs
        acc = Value(f"{node.outputs[0].name}.acc" if node.outputs else "acc", TensorType(i32, ()))
        return Node("ConvInteger", (i[0], i[3], i[2], i[5]), (acc,), node.attrs, node.name, node.source)

    def infer(self, node: Node) -> Sequence[TensorType]:
        if node.attrs.get("channels_last", 0):
            raise unsupported(node, "channels_last is not supported")
        (t,) = _INTEGER.infer(self.inner(node))
        filters = t.shape[-1 if channels_last(node) else 1]
        check_parameters(node, (1, 2, 6, 7))
        check_parameters(node, (4, 5), filters)
        expect_shape(node, 8, [filters])
        return [TensorType(need(node, 7).dtype, t.shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        y = outs[0]
        acc = Buffer(f"{y.name}.acc", i32, y.shape, "global")
        lets = _INTEGER.compute(self.inner(node), [ins[0], ins[3], ins[2], ins[5]], [acc]).lets
        axes = axes_of(y.shape)
        m = axes[-1 if channels_last(node) else 1].var
        v = load(acc, [a.var for a in axes])
        bias = get(ins, 8)
        if bias is not None:
            v = v + load(bias, [m])
        sx, _ = scale_and_zero(node, ins, 1, 2)
        sw, _ = scale_and_zero(node, ins, 4, 5, [m])
        sy, zy = scale_and_zero(node, ins, 6, 7)
        return make(node, ins, outs, [*lets, define(y, axes, saturate(cast(v, f32) * (sx * sw / sy), zy, y.dtype))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, sx, zx, w, sw, zw, sy, zy, bias = padded(arrays, 9)
        (acc,) = _INTEGER.reference(self.inner(node), x, w, zx, zw)
        per = [-1] if channels_last(node) else [-1] + [1] * (acc.ndim - 2)
        if bias is not None:
            acc = acc + np.asarray(bias).reshape(per)
        scale = np.asarray(sx, np.float32).reshape(()) * np.asarray(sw, np.float32).reshape(per) / np.asarray(sy, np.float32).reshape(())
        return [saturate_ref(acc.astype(np.float32) * scale, np.asarray(zy).reshape(()), need(node, 7).dtype)]


_INTEGER = ConvInteger()
