"""Recognise the rotation of a rotary embedding that was spelled out.

Before: ``Concat[-1](Neg(x2), x1)`` with ``x1, x2`` the halves of x's last dimension (two Slices, or one Split).
After: ``luthier::RotateHalf(x)``, which fuses with ``x * cos + rotated * sin`` into one kernel.
"""

from __future__ import annotations

from luthier.ir.graph import Graph, Node, Value
from luthier.passes.graph.rewrite import Context, rewrite_graph


def recognise_rotary(graph: Graph) -> bool:
    """In place; True when something was recognised."""
    return rewrite_graph(graph, _rule)


def _piece(v: Value | None, ctx: Context) -> tuple[Value, int] | None:
    """(x, first element) when ``v`` is a run of x's last dimension, all others in full."""
    n = ctx.producer(v, "Slice", "Split")
    if n is None or v is None or n.inputs[0] is None:
        return None
    x = n.inputs[0]
    if n.op == "Split":
        if int(n.attrs.get("axis", 0)) % x.rank != x.rank - 1:
            return None
        before = [o.shape[-1] for o in n.outputs[: n.outputs.index(v)]]
        return None if any(s.op != "const" for s in before) else (x, sum(int(s.attr) for s in before))
    given = [n.input(k) for k in range(1, 5)]
    if any(g is not None and (g.data is None or g.data.size != 1) for g in given):
        return None
    starts, _, axes, steps = (None if g is None or g.data is None else int(g.data.reshape(-1)[0]) for g in given)
    if starts is None or steps not in (None, 1) or (0 if axes is None else axes) % x.rank != x.rank - 1:
        return None
    size = x.shape[-1]
    if size.op != "const":
        return None
    return x, starts + size.attr if starts < 0 else starts


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.op != "Concat" or len(n.inputs) != 2 or n.outputs[0].rank == 0:
        return None
    if int(n.attrs.get("axis", 0)) % n.outputs[0].rank != n.outputs[0].rank - 1:
        return None
    neg = ctx.producer(n.inputs[0], "Neg")
    second = _piece(neg.inputs[0], ctx) if neg is not None else None
    first = _piece(n.inputs[1], ctx)
    if first is None or second is None or first[0] is not second[0] or first[1] != 0:
        return None
    x = first[0]
    size = x.shape[-1]
    halves = [v.shape[-1] for v in n.inputs if v is not None]
    if size.op != "const" or size.attr % 2 or second[1] != size.attr // 2 or any(h.op != "const" or h.attr != size.attr // 2 for h in halves):
        return None
    return ctx.make("luthier::RotateHalf", [x], {}, n)
