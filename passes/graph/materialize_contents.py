"""Cut shape arithmetic loose from the tensors it came from.

Before: ``s = Shape(x); n = Gather(s, 0); t = Concat(n, [-1])``. After: ``t = Content()`` with the elements ``(batch, -1)``: nothing
reads ``x`` for its shape any more, and no kernel computes what the program knows as scalars.
"""

from __future__ import annotations

from luthier.ir.graph import Graph, Node, subgraphs

CONTENT = "Content"
_KEPT = frozenset({CONTENT, "luthier::Require"})  # a check is not only its content


def materialize_contents(graph: Graph) -> bool:
    """In place, subgraphs included; True when a node was replaced."""
    changed = False
    for i, n in enumerate(graph.nodes):
        for g in subgraphs(n):
            changed |= materialize_contents(g)
        if n.op not in _KEPT and n.outputs and all(v.content is not None and not v.bound and v.data is None for v in n.outputs):
            graph.nodes[i] = Node(CONTENT, (), n.outputs, {}, n.name, n.source)
            changed = True
    return changed
