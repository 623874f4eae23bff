"""legalize_operators: operators that are defined by others give way to them.

Before: ``y = com.microsoft::Attention(x, w, b)``. After: MatMul, Add, Split, Reshape, Transpose, MatMul, Softmax, ... (whatever the
operator's ``legalize`` adds). Runs before the recognition passes, which see only basic operators.
"""

from __future__ import annotations

from luthier.ir.graph import Graph, Node, Value
from luthier.ir.op import lookup
from luthier.ir.ops.transformer import Composite, Steps
from luthier.passes.graph.rewrite import Context, rewrite_graph


def legalize_operators(graph: Graph) -> bool:
    """In place; True when something changed."""
    return rewrite_graph(graph, _legalize)


def _legalize(n: Node, ctx: Context) -> list[Value] | None:
    o = lookup(n.op)
    if not isinstance(o, Composite):
        return None
    s = Steps(n, ctx.names)
    values = list(o.legalize(n, s))
    for new in s.nodes:
        ctx.add(new)
    return values
