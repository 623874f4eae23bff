"""com.microsoft operators that onnxruntime's optimizer and quantizer write, by basic ones: FusedConv, FusedGemm, NhwcMaxPool, CDist, GridSample,
QLinearAveragePool, QLinearSoftmax, QLinearWhere, QLinearConv (channels last), QAttention, QEmbedLayerNormalization,
GatherBlockQuantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import u8
from luthier.ir.graph import Node, Value
from luthier.ir.op import op
from luthier.ir.ops.common import ELEMENT_TYPES, check_axis, need, shape_error, unsupported
from luthier.ir.ops.transformer import Attention, Composite, Steps

_CODE = {d.name: k for k, d in ELEMENT_TYPES.items()}
_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides")
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def only(node: Node, names: Sequence[str]) -> dict[str, Any]:
    """The attributes among ``names``."""
    return {k: v for k, v in node.attrs.items() if k in names}


def activate(node: Node, s: Steps, y: Value, params: Sequence[float]) -> Value:
    """Attribute ``activation`` with ``params``. Raises UnsupportedOperator."""
    name = node.attrs.get("activation", "")
    name = name.decode() if isinstance(name, bytes) else str(name)
    if name in ("", "Relu", "Tanh", "Sigmoid"):
        return s(name, y) if name else y
    if name == "LeakyRelu":
        return s(name, y, alpha=params[0] if params else 0.01)
    if name == "Clip" and len(params) >= 2:
        return s(name, y, s.scalar(params[0], y), s.scalar(params[1], y))
    if name == "HardSigmoid":
        return s(name, y, alpha=params[0] if params else 0.2, beta=params[1] if len(params) > 1 else 0.5)
    raise unsupported(node, f"activation {name!r} with {len(params)} parameters")


def channels_first(s: Steps, x: Value) -> Value:
    """[N, ..., C] to [N, C, ...]."""
    return s("Transpose", x, perm=(0, x.rank - 1, *range(1, x.rank - 1)))


def channels_last(s: Steps, x: Value) -> Value:
    return s("Transpose", x, perm=(0, *range(2, x.rank), 1))


@op("com.microsoft::FusedConv")
class FusedConv(Composite):
    """(X, W, bias, Z): ``activation(Conv(X, W, bias) + Z)``."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        y = s("Conv", need(node, 0), need(node, 1), node.input(2), **only(node, _CONV))
        z = node.input(3)
        if z is not None:
            y = s("Add", y, z)
        return [activate(node, s, y, [float(v) for v in node.attrs.get("activation_params") or ()])]


@op("com.microsoft::FusedGemm")
class FusedGemm(Composite):
    """(A, B, C): ``activation(Gemm(A, B, C))``."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        y = s("Gemm", need(node, 0), need(node, 1), node.input(2), **only(node, ("alpha", "beta", "transA", "transB")))
        params = [float(node.attrs[k]) for k in ("activation_alpha", "activation_beta", "activation_gamma") if k in node.attrs]
        return [activate(node, s, y, params)]


@op("com.microsoft::NhwcMaxPool")
class NhwcMaxPool(Composite):
    """MaxPool of [N, ..., C]."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        return [channels_last(s, s("MaxPool", channels_first(s, need(node, 0)), **only(node, _POOL)))]


@op("com.microsoft::CDist")
class CDist(Composite):
    """(A [M, K], B [N, K]): the distances of all pairs of rows, ``euclidean`` or ``sqeuclidean``."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        metric = node.attrs.get("metric", "sqeuclidean")
        metric = metric.decode() if isinstance(metric, bytes) else metric
        if metric not in ("euclidean", "sqeuclidean"):
            raise unsupported(node, f"metric {metric!r}")
        d = s("Sub", s("Unsqueeze", need(node, 0), s.const([1])), s("Unsqueeze", need(node, 1), s.const([0])))
        sums = s("ReduceSumSquare", d, s.const([2]), keepdims=0)
        return [s("Sqrt", sums) if metric == "euclidean" else sums]


@op("com.microsoft::GridSample")
class GridSample(Composite):
    """GridSample with the names of modes of opset 16."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        mode = node.attrs.get("mode", "bilinear")
        mode = mode.decode() if isinstance(mode, bytes) else mode
        rest = only(node, ("align_corners", "padding_mode"))
        return [s("GridSample", need(node, 0), need(node, 1), mode={"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode), **rest)]


# ---------------------------------------------------------------- quantized tensors


@op("com.microsoft::QLinearAveragePool")
class QLinearAveragePool(Composite):
    """(x, x_scale, x_zero, y_scale, y_zero)."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        x, last = need(node, 0), int(node.attrs.get("channels_last", 0))
        v = s("DequantizeLinear", channels_first(s, x) if last else x, need(node, 1), node.input(2))
        y = s("QuantizeLinear", s("AveragePool", v, **only(node, _POOL)), need(node, 3), zero(node, s, 4, x))
        return [channels_last(s, y) if last else y]


def zero(node: Node, s: Steps, i: int, x: Value) -> Value:
    """The zero point at input ``i``, else 0 in the type of ``x``."""
    z = node.input(i)
    return z if z is not None else s.const(0, x.dtype.numpy)


@op("com.microsoft::QLinearSoftmax")
class QLinearSoftmax(Composite):
    """(x, x_scale, x_zero, y_scale, y_zero); attribute ``opset``: below 13 the axes from ``axis`` on are one."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        x = need(node, 0)
        axis = check_axis(node, int(node.attrs.get("axis", -1)), x.rank)
        v = s("DequantizeLinear", x, need(node, 1), node.input(2))
        if int(node.attrs.get("opset", 13)) >= 13 or axis == x.rank - 1:
            p = s("Softmax", v, axis=axis)
        else:
            p = s("Reshape", s("Softmax", s("Flatten", v, axis=axis), axis=1), s("Shape", x))
        return [s("QuantizeLinear", p, need(node, 3), zero(node, s, 4, x))]


@op("com.microsoft::QLinearWhere")
class QLinearWhere(Composite):
    """(condition, x, x_scale, x_zero, y, y_scale, y_zero, z_scale, z_zero)."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        x, y = (s("DequantizeLinear", need(node, i), need(node, i + 1), node.input(i + 2)) for i in (1, 4))
        return [s("QuantizeLinear", s("Where", need(node, 0), x, y), need(node, 7), zero(node, s, 8, need(node, 1)))]


@op("com.microsoft::QLinearConv")
class QLinearConv(Composite):
    """QLinearConv, of [N, ..., C] with ``channels_last``."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        last = int(node.attrs.get("channels_last", 0))
        x = need(node, 0)
        y = s("QLinearConv", channels_first(s, x) if last else x, *node.inputs[1:], **only(node, _CONV))
        return [channels_last(s, y) if last else y]


@op("com.microsoft::QAttention")
class QAttention(Attention):
    """(input, weights, bias, input_scale, weight_scale, mask_index, input_zero, weight_zero, past): Attention whose projection is a
    product of 8-bit integers."""

    places = {"mask": 5, "past": 8}

    def project(self, node: Node, s: Steps) -> Value:
        x, w = need(node, 0), need(node, 1)
        scale = need(node, 4)
        return s("com.microsoft::MatMulIntegerToFloat", x, w, need(node, 3), scale, node.input(6), node.input(7), node.input(2))


@op("com.microsoft::QEmbedLayerNormalization")
class QEmbedLayerNormalization(Composite):
    """EmbedLayerNormalization with 8-bit tables, gamma and beta: after its eight inputs come the scales of word, position and segment
    embeddings, gamma and beta, then their zero points."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        def table(i: int, k: int) -> Value | None:
            v = node.input(i)
            return None if v is None else s("DequantizeLinear", v, need(node, 8 + k), node.input(13 + k))

        tables = [table(i, k) for k, i in enumerate((2, 3, 4, 5, 6))]
        outs = s(
            "com.microsoft::EmbedLayerNormalization", need(node, 0), node.input(1), *tables, node.input(7), outputs=2,
            epsilon=float(node.attrs.get("epsilon", 1e-12)),
        )  # fmt: skip
        return list(outs)[: max(len(node.outputs), 1)]


@op("com.microsoft::GatherBlockQuantized")
class GatherBlockQuantized(Composite):
    """(data, indices, scales, zero_points): elements gathered along ``gather_axis``, dequantized by blocks of ``block_size`` along
    ``quantize_axis``. Data of u8 with ``bits`` 4 holds two elements a byte along its last axis, the first in the lower half."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        data, indices, scales = need(node, 0), need(node, 1), need(node, 2)
        packed = data.dtype is u8 and int(node.attrs.get("bits", 4)) == 4
        ga = check_axis(node, int(node.attrs.get("gather_axis", 0)), data.rank, "gather_axis")
        qa = check_axis(node, int(node.attrs.get("quantize_axis", 1)), data.rank, "quantize_axis")
        if ga == qa:
            raise unsupported(node, "gather_axis and quantize_axis are the same")
        if scales.rank != data.rank or packed and qa != data.rank - 1:
            raise shape_error(node, "scales need the rank of the data, and packed data is quantized along its last axis")

        def rows(v: Value, is_packed: bool) -> Value:
            v = s("Gather", v, indices, axis=ga)
            return self.unpack(s, v) if is_packed else v

        q, factor = rows(data, packed), rows(scales, False)
        z = node.input(3)
        if z is not None:
            z = rows(z, packed)
            if packed:  # an odd number of blocks leaves half a byte
                z = s("Slice", z, s.const([0]), s.extent(factor, factor.rank - 1), s.const([factor.rank - 1]))
        elif data.dtype is u8:
            z = s("Expand", s.const(1 << (int(node.attrs.get("bits", 4)) - 1), np.uint8), s("Shape", factor))
        axis = qa + indices.rank - 1 if ga < qa else qa
        return [s("DequantizeLinear", q, factor, z, axis=axis, block_size=int(node.attrs.get("block_size", 128)))]

    def unpack(self, s: Steps, v: Value) -> Value:
        """[..., n] bytes to [..., 2 n] numbers of 4 bits."""
        low, high = s("BitwiseAnd", v, s.const(15, np.uint8)), s("BitShift", v, s.const(4, np.uint8), direction="RIGHT")
        pairs = s("Concat", *(s("Unsqueeze", p, s.const([v.rank])) for p in (low, high)), axis=v.rank)
        return s("Reshape", pairs, s.const([*[0] * (v.rank - 1), -1]))
