"""Merge nodes that compute the same thing.

Before: ``a = Exp(x); b = Exp(x); c = Add(a, b)``. After: ``a = Exp(x); c = Add(a, a)``. Equal means: operator, inputs, attributes.
Constants with the same small contents count as one. Random operators, control flow, and operators that find out extents stay apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.graph import Graph, Node, Value, subgraphs, type_symbols
from luthier.passes.graph.fold_constants import NEVER
from luthier.passes.graph.rewrite import Context, rewrite_graph

_APART = NEVER - {"DequantizeLinear"} | {"Content"}


def _input_key(v: Value | None) -> Any:
    if v is None:
        return None
    if v.data is not None and v.data.nbytes <= 1024 and v.data.dtype != object:
        return (v.data.tobytes(), str(v.data.dtype), v.data.shape)
    return id(v.data) if v.data is not None else v


def _attr_key(a: Any) -> Any:
    return (a.tobytes(), str(a.dtype), a.shape) if isinstance(a, np.ndarray) else a


def merge_common(graph: Graph) -> bool:
    """In place; True when something was merged. Linear: one table look-up for each node."""
    seen: dict[Any, tuple[Context, Node]] = {}

    def rule(n: Node, ctx: Context) -> list[Value] | None:
        if n.op in _APART or any(True for _ in subgraphs(n)) or any(v.bound for v in n.outputs) or _decides_extents(n):
            return None
        key = (n.op, len(n.outputs), tuple(_input_key(v) for v in n.inputs), tuple(sorted((k, _attr_key(a)) for k, a in n.attrs.items())))
        hit = seen.get(key)
        if hit is None or not _visible(hit[0], ctx):
            seen[key] = (ctx, n)
            return None
        return list(hit[1].outputs)

    return rewrite_graph(graph, rule)


def _decides_extents(n: Node) -> bool:
    """A NonZero whose count is a symbol in the shapes of others: two of them keep a symbol each."""
    return any(str(s.attr[0]).startswith(f"{n.outputs[0].name}.") for v in n.outputs for s in type_symbols(v.type))


def _visible(defined: Context, here: Context | None) -> bool:
    """A value of an enclosing graph is visible, one of a sibling branch is not."""
    while here is not None:
        if here is defined:
            return True
        here = here.outer
    return False
