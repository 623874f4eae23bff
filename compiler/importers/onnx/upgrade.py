"""Older ONNX operator forms rewritten to the newest one: the table ``UPGRADES``.

``UPGRADES[operator]`` is a list of ``(version, step)``: a node of an opset below ``version`` goes through ``step``. Steps run
in order and edit the node in place; a step may return the node's outputs instead, when it needed other operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.importers.onnx.tensors import ELEMENT
from luthier.ir.dtypes import i64
from luthier.ir.errors import InvalidModel, UnsupportedOperator
from luthier.ir.graph import Value

Emit = Callable[..., tuple[Value, ...]]


@dataclass(slots=True)
class Old:
    """A node on its way to the newest form. ``emit(op, inputs, attrs)`` adds a helper node and gives its outputs."""

    op: str
    inputs: list[Value | None]
    attrs: dict[str, Any]
    outputs: int
    opset: int
    emit: Emit
    constant: Callable[[Any], Value]
    name: str = ""
    integral: Mapping[Value, Value] = field(default_factory=dict)

    def get(self, i: int) -> Value:
        v = self.inputs[i] if i < len(self.inputs) else None
        if v is None:
            raise InvalidModel(f"input {i} is missing", node=self.name, op=self.op)
        return v

    def put(self, i: int, v: Value | None) -> None:
        while len(self.inputs) <= i:
            self.inputs.append(None)
        self.inputs[i] = v

    def integer(self, v: Value) -> Value | None:
        """``v`` (a float) as an i64 value when it is known to hold integers: a constant, or a Cast of integers."""
        if v.data is not None:
            return self.constant(v.data.astype(np.int64)) if np.array_equal(v.data, np.trunc(v.data)) else None
        w = self.integral.get(v)
        return w if w is None or w.dtype is i64 else self.emit("Cast", [w], {"to": 7})[0]

    def ints(self, values: Sequence[int]) -> Value:
        return self.constant(np.array(list(values), np.int64))


Step = Callable[[Old], "Sequence[Value] | None"]
UPGRADES: dict[str, list[tuple[int, Step]]] = {}


def upgrade(version: int, *ops: str) -> Callable[[Step], Step]:
    def wrap(step: Step) -> Step:
        for o in ops:
            UPGRADES.setdefault(o, []).append((version, step))
        return step

    return wrap


def attr_to_input(attr: str, index: int, dtype: Any = np.int64, scalar: bool = False) -> Step:
    """The attribute becomes a constant input; nothing happens when it is absent."""

    def step(n: Old) -> None:
        if attr in n.attrs:
            v = n.attrs.pop(attr)
            n.put(index, n.constant(np.array(v, dtype) if scalar else np.atleast_1d(np.array(v, dtype))))

    return step


for _names, _version, _attr, _index, _scalar in (
    (("Squeeze", "Unsqueeze", "ReduceSum"), 13, "axes", 1, False),
    (
        (
            "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
            "ReduceSumSquare",
        ),
        18, "axes", 1, False,
    ),
    (("Split",), 13, "split", 1, False),
    (("Reshape",), 5, "shape", 1, False),
    (("TopK",), 10, "k", 1, False),
    (("DFT",), 20, "axis", 2, True),
):  # fmt: skip
    upgrade(_version, *_names)(attr_to_input(_attr, _index, scalar=_scalar))


# ---------------------------------------------------------------- one-way broadcasting by axis (opset < 7)


@upgrade(7, "Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less", "PRelu")
def broadcast_axis(n: Old) -> None:
    """``broadcast=1, axis=k``: B's dimensions match A's from axis k on. B gets trailing unit dimensions."""
    axis = n.attrs.pop("axis", None)
    n.attrs.pop("broadcast", None)
    a, b = n.get(0), n.get(1)
    if n.op == "PRelu" and axis is None and b.rank == 1 and a.rank > 1 and not (b.shape[0].op == "const" and b.shape[0].attr == 1):
        axis = 1
    if axis is None or b.rank == 0:
        return
    axis = axis + a.rank if axis < 0 else axis
    extra = a.rank - axis - b.rank
    if extra > 0:
        n.put(1, n.emit("Unsqueeze", [b, n.ints(range(b.rank, b.rank + extra))], {})[0])


@upgrade(7, "Gemm")
def gemm_broadcast(n: Old) -> None:
    n.attrs.pop("broadcast", None)


# ---------------------------------------------------------------- attributes that became inputs, with special cases


@upgrade(11, "Clip")
def clip_bounds(n: Old) -> None:
    for i, key in ((1, "min"), (2, "max")):
        if key in n.attrs:
            n.put(i, n.constant(np.array(n.attrs.pop(key), n.get(0).dtype.numpy)))


@upgrade(12, "Dropout")
def dropout(n: Old) -> None:
    """Before opset 12 a model in inference has no training input; ``is_test`` and ``ratio`` say nothing about it."""
    n.attrs.clear()
    del n.inputs[1:]


@upgrade(10, "Slice")
def slice_attrs(n: Old) -> None:
    starts, ends = n.attrs.pop("starts"), n.attrs.pop("ends")
    axes = n.attrs.pop("axes", tuple(range(len(starts))))
    n.inputs = [n.get(0), n.ints(starts), n.ints(ends), n.ints(axes)]


@upgrade(11, "Pad")
def pad_attrs(n: Old) -> None:
    pads = n.attrs.pop("pads", None) or n.attrs.pop("paddings")
    value = n.attrs.pop("value", 0.0)
    n.inputs = [n.get(0), n.ints(pads), n.constant(np.array(value, n.get(0).dtype.numpy))]


@upgrade(6, "Tile")
def tile_axis(n: Old) -> None:
    """Tile-1: (input, tiles, axis), scalars."""
    tiles, axis = n.get(1), n.get(2)
    if tiles.data is None or axis.data is None:
        raise UnsupportedOperator("Tile of opset 1 with run-time repeats", node=n.name, op=n.op)
    reps = [1] * n.get(0).rank
    reps[int(axis.data)] = int(tiles.data)
    n.inputs = [n.get(0), n.ints(reps)]


@upgrade(9, "Upsample")
def upsample_scales(n: Old) -> None:
    if "scales" in n.attrs:
        n.put(1, n.constant(np.array(n.attrs.pop("scales"), np.float32)))
    elif "height_scale" in n.attrs:
        h, w = n.attrs.pop("height_scale"), n.attrs.pop("width_scale")
        n.put(1, n.constant(np.array([1, 1, h, w], np.float32)))


@upgrade(99, "Upsample")
def upsample_is_resize(n: Old) -> Sequence[Value]:
    """Upsample counts pixels from their corners and rounds down."""
    mode = n.attrs.get("mode", "nearest")
    attrs = {"mode": "linear" if mode in ("linear", "bilinear") else mode, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return n.emit("Resize", [n.get(0), None, n.get(1)], attrs)


@upgrade(11, "Resize")
def resize_10(n: Old) -> Sequence[Value] | None:
    """Pixels are counted from their corners; the nearest one is rounded down where a dimension grows, up where it shrinks."""
    x, scales = n.get(0), n.get(1)
    n.inputs = [x, None, scales]
    n.attrs |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if n.attrs.get("mode", "nearest") != "nearest" or scales.data is None or (scales.data >= 1).all():
        return None
    if (scales.data <= 1).all():
        n.attrs["nearest_mode"] = "ceil"
        return None
    shrunk = n.emit("Resize", [x, None, n.constant(np.minimum(scales.data, 1))], {**n.attrs, "nearest_mode": "ceil"})[0]
    return n.emit("Resize", [shrunk, None, n.constant(np.maximum(scales.data, 1))], n.attrs)


@upgrade(13, "Softmax", "LogSoftmax", "Hardmax")
def softmax_flattens(n: Old) -> Sequence[Value] | None:
    """Before opset 13 the input is seen as a matrix, split at ``axis`` (default 1)."""
    x = n.get(0)
    axis = n.attrs.get("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if axis == x.rank - 1 or all(d.op == "const" and d.attr == 1 for d in x.shape[axis + 1 :]):
        n.attrs["axis"] = axis
        return None
    flat = n.emit("Flatten", [x], {"axis": axis})[0]
    y = n.emit(n.op, [flat], {"axis": 1})[0]
    return n.emit("Reshape", [y, n.emit("Shape", [x], {})[0]], {"allowzero": 1})


@upgrade(18, "Split")
def split_count(n: Old) -> None:
    if len(n.inputs) < 2 or n.inputs[1] is None:
        n.attrs["num_outputs"] = n.outputs


@upgrade(9, "BatchNormalization")
def batch_norm(n: Old) -> None:
    for key in ("spatial", "is_test", "consumed_inputs"):
        if n.attrs.pop(key, 1) == 0 and key == "spatial":
            raise UnsupportedOperator("BatchNormalization with spatial=0", node=n.name, op=n.op)
    n.outputs = 1


@upgrade(14, "BatchNormalization")
def batch_norm_outputs(n: Old) -> None:
    """Further outputs of opsets below 14 belong to training."""
    n.outputs = 1


@upgrade(21, "GroupNormalization")
def group_norm(n: Old) -> None:
    """Scale and bias had one element per group, now one per channel."""
    x, groups = n.get(0), int(n.attrs["num_groups"])
    c = x.shape[1]
    if c.op != "const":
        raise UnsupportedOperator("GroupNormalization below opset 21 needs a known channel count", node=n.name, op=n.op, shapes={"X": tuple(x.shape)})
    for i in (1, 2):
        v = n.emit("Unsqueeze", [n.get(i), n.ints([1])], {})[0]
        v = n.emit("Expand", [v, n.ints([groups, c.attr // groups])], {})[0]
        n.put(i, n.emit("Reshape", [v, n.ints([c.attr])], {})[0])
    n.attrs.pop("stash_type", None)


@upgrade(20, "GridSample")
def grid_sample_names(n: Old) -> None:
    m = n.attrs.get("mode")
    if m in ("bilinear", "bicubic"):
        n.attrs["mode"] = {"bilinear": "linear", "bicubic": "cubic"}[m]


@upgrade(99, "Scatter")
def scatter(n: Old) -> None:
    n.op = "ScatterElements"


@upgrade(4, "Concat")
def concat_axis(n: Old) -> None:
    n.attrs.setdefault("axis", 1)


@upgrade(6, "Cast")
def cast_to_name(n: Old) -> None:
    to = n.attrs.get("to")
    if isinstance(to, str):
        from onnx import TensorProto

        n.attrs["to"] = TensorProto.DataType.Value(to)


@upgrade(9, "Scan")
def scan_8(n: Old) -> None:
    raise UnsupportedOperator("Scan of opset 8 (batched, with sequence_lens)", node=n.name, op=n.op, hint="export with opset 9 or newer")


@upgrade(13, "DequantizeLinear", "QuantizeLinear")
def quantize_axis(n: Old) -> None:
    """Opset 10 is per tensor only."""
    n.attrs.pop("axis", None)


@upgrade(9, "MaxPool", "AveragePool", "MaxRoiPool")
def pool(n: Old) -> None:
    n.attrs.pop("is_test", None)


@upgrade(14, "LSTM", "GRU", "RNN")
def recurrent(n: Old) -> None:
    n.attrs.pop("output_sequence", None)


@upgrade(11, "DepthToSpace")
def depth_to_space(n: Old) -> None:
    n.attrs.setdefault("mode", "DCR")


@upgrade(99, "Range")
def float_range(n: Old) -> Sequence[Value] | None:
    """A Range over floats that are not constants counts in integers: ``start + Cast(Range(0, ceil((limit - start) / delta))) * delta``."""
    start, limit, delta = (n.get(i) for i in range(3))
    if not start.dtype.is_float or all(v.data is not None for v in (start, limit, delta)):
        return None
    to = {"to": next(code for code, d in ELEMENT.items() if d is start.dtype)}
    whole = [n.integer(v) for v in (start, limit, delta)]
    if all(v is not None for v in whole):
        return n.emit("Cast", n.emit("Range", whole, {}), to)
    span = n.emit("Div", [n.emit("Sub", [limit, start], {})[0], delta], {})
    count = n.emit("Cast", n.emit("Ceil", span, {}), {"to": 7})[0]
    zero, one = n.constant(np.array(0, np.int64)), n.constant(np.array(1, np.int64))
    k = n.emit("Cast", n.emit("Range", [zero, count, one], {}), to)[0]
    return n.emit("Add", [n.emit("Mul", [k, delta], {})[0], start], {})


def apply(n: Old) -> Sequence[Value] | None:
    """Bring ``n`` to its newest form. Returns its outputs when it was replaced by other operators.

    Raises InvalidModel or UnsupportedOperator."""
    n.attrs.pop("consumed_inputs", None)
    for version, step in UPGRADES.get(n.op, ()):
        if n.opset < version:
            out = step(n)
            if out is not None:
                return out
    return None
