"""Fold the dequantization of constants that no integer operator took.

Before: ``w = DequantizeLinear(const i8, s); y = Gather(w, i)``. After: ``y = Gather(const f32, i)``. Runs after ``quantize_integer``.
"""

from __future__ import annotations

from luthier.ir.graph import Graph, all_nodes
from luthier.passes.graph.fold_constants import NEVER, fold_constants


def fold_dequantize(graph: Graph) -> bool:
    """In place; True when something was folded."""
    if not any(n.op == "DequantizeLinear" for n in all_nodes(graph)):
        return False
    return fold_constants(graph, NEVER - {"DequantizeLinear"})
