"""cast_half: operators compute on f16 or bf16 tensors, products and convolutions with sums in f32.

Before: ``y = MatMul(x, const f32)``. After: ``y = Cast(MatMul(Cast(x, f16), const f16), f32)``, with no casts between neighbours that are both
converted. Softmax, norms, reductions and everything else not in ``OPERATORS`` stay in f32, as do the graph's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from luthier.ir.builder import Names, infer_node
from luthier.ir.dtypes import bf16, f16, f32
from luthier.ir.graph import Graph, Node, TensorType, Value, node_reads

__all__ = ["OPERATORS", "cast_half"]

OPERATORS = frozenset(
    "MatMul Gemm Conv ConvTranspose Add Sub Mul Div Relu LeakyRelu Clip Sigmoid Tanh Gelu Erf HardSwish HardSigmoid MaxPool AveragePool GlobalAveragePool Concat "
    "Reshape Transpose Slice Split Gather Squeeze Unsqueeze Flatten Expand Pad Identity Where Min Max Neg Abs".split()
)
_ONNX = {"f32": 1, "f16": 10, "bf16": 16}


def cast_half(graph: Graph, kind: str, keep: Collection[Node] = ()) -> bool:
    """In place; True when something changed. ``kind``: f16 or bf16; ``keep``: nodes that stay in f32."""
    half = f16 if kind == "f16" else bf16
    names, kept = Names(graph), set(keep)
    narrow: dict[Value, Value] = {}  # f32 value -> its half form
    done: set[Value] = set()  # f32 forms that exist (inputs and results of f32 nodes always do)
    nodes: list[Node] = []

    def cast(v: Value, to: Any, out: Value, like: Node | None) -> Value:
        nodes.append(infer_node(Node("Cast", (v,), (out,), {"to": _ONNX[to.name]}, f"{out.name}.cast", "" if like is None else like.source)))
        return out

    def wide(v: Value, like: Node | None) -> None:
        if v in narrow and v not in done:
            cast(narrow[v], f32, v, like)
            done.add(v)

    def halved(v: Value, like: Node) -> Value:
        if v not in narrow:
            if v.data is not None:
                with np.errstate(over="ignore"):
                    narrow[v] = Value.const(names.fresh(f"{v.name}.{kind}"), v.data.astype(half.numpy))
            else:
                narrow[v] = cast(v, half, Value(names.fresh(f"{v.name}.{kind}"), TensorType(half, v.shape)), like)
            done.add(v)
        return narrow[v]

    changed = False
    for n in graph.nodes:
        floats = [v for v in n.inputs if v is not None and v.dtype is f32]
        moving = n.op in ("Gather",) and bool(n.inputs) and n.inputs[0] is not None and n.inputs[0].dtype is f32
        if n in kept or n.op not in OPERATORS or not (floats or moving) or any(v is not None and v.dtype.is_float and v.dtype is not f32 for v in n.inputs):
            for v in node_reads(n):
                wide(v, n)
            nodes.append(n)
            continue
        ins = tuple(halved(v, n) if v is not None and v.dtype is f32 else v for v in n.inputs)
        outs = []
        for v in n.outputs:
            if v.dtype is f32:
                narrow[v] = Value(names.fresh(f"{v.name}.{kind}"), TensorType(half, v.shape))
                outs.append(narrow[v])
            else:
                outs.append(v)
        nodes.append(infer_node(Node(n.op, ins, tuple(outs), dict(n.attrs), n.name, n.source)))
        changed = True
    for v in graph.outputs:
        wide(v, None)
    graph.nodes = nodes
    return changed
