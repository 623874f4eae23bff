"""insert_qdq: 8-bit integers at the inputs of layers, as QuantizeLinear / DequantizeLinear pairs that ``quantize_integer`` turns into integer kernels.

Before: ``y = Conv(x, w, b)``. After: ``y = Conv(DQ(Q(x)), DQ(const i8 w), DQ(const i32 b))``; activations are u8 with a zero point, or i8 without
one, weights i8 with a scale an output channel. Values keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import QuantizationError
from luthier.ir.builder import Names, infer_node
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.passes.quantize.quantize_weights import QuantizedWeight

__all__ = ["Activation", "IntegerLayer", "chain_inputs", "insert_qdq", "moved_from", "parameters"]

_MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Identity")
_SHAPERS = ("Relu", "Clip")
_CHAIN = ("Add", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Concat")


@dataclass(frozen=True, slots=True)
class Activation:
    """``real = (q - zero) * scale``; ``dtype``: u8 or i8."""

    scale: np.float32
    zero: int
    dtype: type[np.uint8] | type[np.int8]


@dataclass(frozen=True, eq=False, slots=True)
class IntegerLayer:
    """What a layer's constants become. ``weight``: 8 bits, narrow, one group a row; ``restore``: [N, K] in the shape of the node's constant;
    ``axis``: of that constant along which output channels lie."""

    node: Node
    weight: QuantizedWeight
    restore: Callable[[Any], Any]
    axis: int


def parameters(low: float, high: float, symmetric: bool = False) -> Activation:
    """For a range, widened to hold 0. Raises QuantizationError for one that is no range."""
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise QuantizationError(f"[{low}, {high}] is no range of activations")
    low, high = min(low, 0.0), max(high, 0.0)
    if max(-low, high) < 1e-30:  # nothing but 0; a scale must not underflow
        return Activation(np.float32(1), 0, np.int8 if symmetric else np.uint8)
    if symmetric:
        return Activation(np.float32(max(-low, high) / 127), 0, np.int8)
    scale = np.float32((high - low) / 255)
    return Activation(scale, int(np.clip(np.rint(-low / scale), 0, 255)), np.uint8)


def moved_from(graph: Graph, v: Value) -> Value:
    """The value whose elements ``v`` has (a maximum of some of them included): both can have the same parameters."""
    producers = graph.producers()
    while v in producers and producers[v].op in _MOVES and len(producers[v].outputs) == 1:
        source = producers[v].inputs[0]
        if source is None or not source.dtype.is_float:
            return v
        v = source
    return v


def chain_inputs(graph: Graph, layers: Sequence[Node]) -> list[tuple[Node, int]]:
    """(node, input) of sums and pools that read nothing but results of the given convolutions, of each other, or inputs of those layers.

    These are the residual sums and poolings between integer layers; with integers at their inputs nothing in the chain is stored as f32."""
    convs = {n for n in layers if n.op == "Conv"}
    quantized = {n.inputs[0] for n in layers}
    inside: set[Value] = set()
    found: list[tuple[Node, int]] = []
    for n in graph.nodes:
        if not n.outputs:
            continue
        data = [(i, v) for i, v in enumerate(n.inputs) if v is not None and v.data is None and v.dtype.is_float]
        if n in convs:
            inside.update(n.outputs)
        elif n.op in _SHAPERS or n.op in _MOVES and n.op != "MaxPool":
            if data and data[0][1] in inside:
                inside.add(n.outputs[0])
        elif n.op in _CHAIN and len(n.outputs) == 1 and data and all(v in inside or v in quantized for _, v in data) and any(v in inside for _, v in data):
            if n.op == "Add" and len(data) < 2:
                continue
            inside.add(n.outputs[0])
            found += [(n, i) for i, _ in data]
    return found


def insert_qdq(graph: Graph, layers: Sequence[IntegerLayer], activations: Mapping[Value, Activation], others: Sequence[tuple[Node, int]] = ()) -> bool:
    """In place; True when something changed. ``activations``: parameters of every value that a layer or an entry of ``others`` (node, input)
    reads. Layers' biases become i32 in units of the two scales where they fit. Raises QuantizationError for a missing range."""
    by_node = {layer.node: layer for layer in layers}
    reads: dict[Node, list[int]] = {layer.node: [0] for layer in layers}
    for n, i in others:
        reads.setdefault(n, []).append(i)
    names = Names(graph)
    pairs: dict[Value, Value] = {}
    nodes: list[Node] = []

    def const(name: str, data: Any) -> Value:
        return Value.const(names.fresh(name), data)

    def emit(op: str, inputs: Sequence[Value | None], name: str, attrs: dict[str, Any], like: Node) -> Value:
        out = Value(names.fresh(name), TensorType(like.outputs[0].dtype, ()))
        nodes.append(infer_node(Node(op, tuple(inputs), (out,), attrs, name, like.source)))
        return out

    def pair(v: Value, n: Node) -> Value:
        if v not in pairs:
            a = activations.get(v)
            if a is None:
                raise QuantizationError(f'no range is known for value "{v.name}"', node=n.name, op=n.op, hint="calibrate with data that reaches it")
            s, z = const(f"{v.name}.scale", np.array(a.scale, v.dtype.numpy)), const(f"{v.name}.zero", np.array(a.zero, a.dtype))
            q = emit("QuantizeLinear", [v, s, z], f"{v.name}.q", {}, n)
            pairs[v] = emit("DequantizeLinear", [q, s, z], f"{v.name}.dq", {}, n)
        return pairs[v]

    for n in graph.nodes:
        if n in reads:
            inputs = list(n.inputs)
            for i in reads[n]:
                v = inputs[i]
                assert v is not None
                inputs[i] = pair(v, n)
            layer = by_node.get(n)
            if layer is not None:
                inputs[1:3] = _constants(layer, n, activations, const, emit)
            n.inputs = tuple(inputs)
        nodes.append(n)
    graph.nodes = nodes
    return bool(pairs)


def _constants(layer: IntegerLayer, n: Node, activations: Mapping[Value, Activation], const: Any, emit: Any) -> list[Value | None]:
    q, w, x = layer.weight, n.inputs[1], n.inputs[0]
    assert w is not None and x is not None
    codes = layer.restore((q.codes.astype(np.int16) - int(q.zero)).astype(np.int8))
    scale = q.scales.astype(np.float32).reshape(-1)
    s, z = const(f"{w.name}.scale", scale.astype(w.dtype.numpy)), const(f"{w.name}.zero", np.zeros(scale.size, np.int8))
    out: list[Value | None] = [emit("DequantizeLinear", [const(f"{w.name}.i8", codes), s, z], f"{w.name}.dq", {"axis": layer.axis}, n)]
    bias = n.input(2)
    if bias is None:
        return out
    unit = scale.astype(np.float64) * float(activations[x].scale)
    if bias.data is None or bias.data.size != scale.size or n.attrs.get("beta", 1.0) != 1.0:
        return [*out, bias]
    steps = np.rint(bias.data.reshape(-1).astype(np.float64) / unit)
    if np.abs(steps).max(initial=0) >= 2**31:
        return [*out, bias]
    b, bs = const(f"{bias.name}.i32", steps.astype(np.int32)), const(f"{bias.name}.scale", unit.astype(w.dtype.numpy))
    return [*out, emit("DequantizeLinear", [b, bs, const(f"{bias.name}.zero", np.zeros(scale.size, np.int32))], f"{bias.name}.dq", {"axis": 0}, n)]
