"""Constant folding.

Before: ``a = const; b = const; c = Add(a, b)``. After: ``c`` is a constant, computed by ``Op.reference``. Also replaces small
integer values whose symbolic content turned out to be all constants (shape arithmetic). Weights stay quantized:
``DequantizeLinear`` is folded only by ``fold_dequantize``, after the integer forms were recognised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.errors import InvalidModel
from luthier.ir.graph import Graph, Node, Value, subgraphs
from luthier.ir.op import lookup

Array = np.ndarray[Any, Any]
NEVER = frozenset({"DequantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"})
FREE_BYTES = 1 << 16


def fold_node(node: Node, never: frozenset[str] = NEVER) -> list[Array] | None:
    """The outputs of ``node`` as arrays when all of its inputs are constant, else None.

    A result larger than 64 KiB and than eight times the inputs (Expand, Tile, ConstantOfShape) stays a node."""
    if node.op in never or any(True for _ in subgraphs(node)):
        return None
    known = [_from_content(v) for v in node.outputs]
    if known and all(a is not None for a in known):
        return [a for a in known if a is not None]
    if any(v is not None and v.data is None for v in node.inputs):
        return None
    size = 0.0
    for v in node.outputs:
        s = v.type.static_shape
        if s is None:
            return None
        size += float(np.prod(s, dtype=np.float64)) * v.dtype.itemsize
    if size > FREE_BYTES and size > 8 * sum(v.data.nbytes for v in node.inputs if v is not None and v.data is not None):
        return None
    o = lookup(node.op)
    if o is None:
        return None
    try:
        with np.errstate(all="ignore"):
            outs = o.reference(node, *(None if v is None else v.data for v in node.inputs))
    except NotImplementedError:
        return None
    except (ValueError, IndexError, ZeroDivisionError) as e:  # numpy's refusals of operands that do not fit
        shapes = {v.name: v.data.shape for v in node.inputs if v is not None and v.data is not None}
        raise InvalidModel(f"constant inputs do not fit the operator: {e}", node=node.name, op=node.op, shapes=shapes) from None
    return [np.ascontiguousarray(a).reshape(np.shape(a)).astype(v.dtype.numpy, copy=False) for a, v in zip(outs, node.outputs, strict=False)]


def _from_content(v: Value) -> Array | None:
    c, s = v.content, v.type.static_shape
    if c is None or s is None or v.bound or not all(e.op == "const" for e in c):
        return None
    return np.array([e.attr for e in c], v.dtype.numpy).reshape(s)


def fold_constants(graph: Graph, never: frozenset[str] = NEVER) -> bool:
    """In place; True when something was folded. Graph outputs keep their producing node."""
    keep = set(graph.outputs)
    changed = False
    nodes = []
    for n in graph.nodes:
        for g in subgraphs(n):
            changed |= fold_constants(g, never)
        folded = None if any(v in keep for v in n.outputs) else fold_node(n, never)
        if folded is None:
            nodes.append(n)
            continue
        for v, a in zip(n.outputs, folded, strict=False):
            v.data, v.type = a, Value.const(v.name, a).type
        changed = True
    graph.nodes = nodes
    return changed
