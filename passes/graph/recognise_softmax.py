"""Recognise a softmax that was spelled out.

Before: ``e = Exp(Sub(x, ReduceMax[a](x))); y = Div(e, ReduceSum[a](e))``. After: ``y = Softmax[a](x)``.
"""

from __future__ import annotations

from luthier.ir.graph import Graph, Node, Value
from luthier.passes.graph.rewrite import Context, rewrite_graph


def recognise_softmax(graph: Graph) -> bool:
    """In place; True when something was recognised."""
    return rewrite_graph(graph, _rule)


def _kept_axis(v: Value | None, ctx: Context, op: str) -> tuple[Value, int] | None:
    """(x, axis) when ``v`` is a kept reduction of x over one axis."""
    r = ctx.producer(v, op)
    if r is None or r.inputs[0] is None or not r.attrs.get("keepdims", 1):
        return None
    axes = r.input(1)
    if axes is None or axes.data is None or axes.data.size != 1:
        return None
    a = int(axes.data.reshape(-1)[0])
    return r.inputs[0], a + r.inputs[0].rank if a < 0 else a


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.op != "Div":
        return None
    e = ctx.producer(n.inputs[0], "Exp")
    total = _kept_axis(n.inputs[1], ctx, "ReduceSum")
    if e is None or total is None or total[0] is not n.inputs[0]:
        return None
    sub = ctx.producer(e.inputs[0], "Sub")
    if sub is None:
        return None
    top = _kept_axis(sub.inputs[1], ctx, "ReduceMax")
    if top is None or top[0] is not sub.inputs[0] or top[1] != total[1]:
        return None
    return ctx.make("Softmax", [top[0]], {"axis": top[1]}, n)
