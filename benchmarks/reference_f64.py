"""Evaluates an ONNX model in f64 with onnx's ReferenceEvaluator: what f32 runtimes are measured against.

Every f32 and f16 tensor of the model becomes f64: inputs, weights, constants, casts. Convolution is replaced by one that goes
through BLAS, as the evaluator's own takes minutes on a picture. Two more operators stand in for ones that the
evaluator of onnx 1.23 gets wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from luthier.importers.onnx.importer import in_order

NARROW = (TensorProto.FLOAT, TensorProto.FLOAT16)
TYPE_OF = {"Cast": "to", "RandomNormal": "dtype", "RandomNormalLike": "dtype"}  # attributes that name an element type

Array = NDArray[Any]


def convolve(x: Array, w: Array, pads: list[int], strides: list[int], dilations: list[int], group: int) -> Array:
    """Convolution of x[N,C,*spatial] with w[M,C/group,*kernel], any number of spatial axes; the dtype of x."""
    rank = w.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0)] + [(pads[i], pads[i + rank]) for i in range(rank)])
    reach = [(w.shape[2 + i] - 1) * dilations[i] + 1 for i in range(rank)]
    axes = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
    pick = [slice(None), slice(None)] + [slice(None, None, s) for s in strides] + [slice(None, None, d) for d in dilations]
    windows = windows[tuple(pick)]  # [N, C, *out, *kernel]
    n, _, *out = windows.shape[: 2 + rank]
    m, each = w.shape[0], w.shape[1]
    result = np.empty((n, m, *out), x.dtype)
    if each == 1 and m == group:
        kernel = "uvw"[:rank]
        np.einsum(f"nc...{kernel},c{kernel}->nc...", windows, w[:, 0], out=result)
        return result
    for g in range(group):
        rows = slice(g * m // group, (g + 1) * m // group)
        part = windows[:, g * each : (g + 1) * each]
        contracted = (1, *range(2 + rank, 2 + 2 * rank))
        product = np.tensordot(part, w[rows], axes=(contracted, tuple(range(1, 2 + rank))))
        result[:, rows] = np.moveaxis(product, -1, 1)
    return result


class Conv(OpRun):
    """ONNX Conv through `convolve`."""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: list[int] | None = None,
        group: int | None = None,
        kernel_shape: list[int] | None = None,
        pads: list[int] | None = None,
        strides: list[int] | None = None,
    ) -> tuple[Array]:
        rank = w.ndim - 2
        strides, dilations = strides or [1] * rank, dilations or [1] * rank
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            total = []
            for i in range(rank):
                steps = -(-x.shape[2 + i] // strides[i])
                reach = (w.shape[2 + i] - 1) * dilations[i] + 1
                total.append(max(0, (steps - 1) * strides[i] + reach - x.shape[2 + i]))
            less, more = [t // 2 for t in total], [t - t // 2 for t in total]
            pads = less + more if auto_pad == "SAME_UPPER" else more + less
        elif auto_pad == "VALID" or pads is None:
            pads = [0] * (2 * rank)
        y = convolve(x, w, list(pads), list(strides), list(dilations), group or 1)
        return (y if b is None else y + b.reshape(1, -1, *[1] * rank),)


class BatchNormalization(OpRun):
    """Inference form; before opset 14 the evaluator's own takes the batch's statistics."""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, epsilon: float | None = None, **_: Any
    ) -> tuple[Array]:
        shape = (1, -1, *[1] * (x.ndim - 2))
        factor = scale / np.sqrt(var + (1e-5 if epsilon is None else epsilon))
        return (x * factor.reshape(shape) + (bias - mean * factor).reshape(shape),)


class GlobalMaxPool(OpRun):
    """Keeps the spatial axes, which the evaluator's own drops for [N,C,L]."""

    def _run(self, x: Array) -> tuple[Array]:
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


def widen_tensor(tensor: onnx.TensorProto) -> None:
    """f32 and f16 -> f64, in place; other types stay."""
    if tensor.data_type in NARROW:
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), name))


def widen_graph(graph: onnx.GraphProto) -> None:
    """Turns a graph's f32 and f16 into f64, subgraphs included, in place."""
    for entry in (*graph.input, *graph.output):
        if entry.type.tensor_type.elem_type in NARROW:
            entry.type.tensor_type.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    for tensor in graph.initializer:
        widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                widen_graph(attribute.g)
            elif attribute.type == onnx.AttributeProto.TENSOR:
                widen_tensor(attribute.t)
            elif attribute.name == TYPE_OF.get(node.op_type) and attribute.i in NARROW:
                attribute.i = TensorProto.DOUBLE
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                tensor = numpy_helper.from_array(np.array(values, np.float64))
                attribute.Clear()
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


class Reference:
    """A model in f64. Raises what onnx raises where the evaluator lacks an operator."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(str(path))
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in in_order(model.graph.node)]  # some converters forget it
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        widen_graph(model.graph)
        self.names = [entry.name for entry in model.graph.output]
        self.evaluator = ReferenceEvaluator(model, new_ops=[Conv, BatchNormalization, GlobalMaxPool])

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """f32 and f16 inputs are widened; outputs by name, as f64 where the model says one of these."""
        wide = {k: v.astype(np.float64) if v.dtype in (np.float32, np.float16) else v for k, v in inputs.items()}
        with np.errstate(all="ignore"):
            return dict(zip(self.names, self.evaluator.run(None, wide), strict=True))
