"""Recognise scaled dot-product attention.

Before: ``s = MatMul(Mul(q, c), Mul(Transpose[..,3,2](k), c)); p = Softmax(Add(s, mask)); y = MatMul(p, v)``.
After: ``y = luthier::Attention{scale=c*c}(q, k, v, mask)`` over ``[batch, heads, length, size]``. The scale may sit on either operand or on
the product, as Mul or Div; a guard that turns the NaN rows of a fully masked softmax into zeros is absorbed.
"""

from __future__ import annotations

from luthier.ir.graph import Graph, Node, Value
from luthier.ir.op import lookup
from luthier.passes.graph.canonicalize import perm_of, scalar
from luthier.passes.graph.rewrite import Context, rewrite_graph


def recognise_attention(graph: Graph) -> bool:
    """In place; True when something was recognised."""
    return lookup("luthier::Attention") is not None and rewrite_graph(graph, _rule)


def _scaled(v: Value | None, ctx: Context) -> tuple[Value | None, float]:
    """(x, c) with ``v`` = c * x; multiplications by constants are peeled off."""
    c = 1.0
    while True:
        m = ctx.single(v, "Mul", "Div")
        if m is None:
            return v, c
        k = scalar(m.inputs[1])
        if k is not None and k != 0:
            c, v = (c * k if m.op == "Mul" else c / k), m.inputs[0]
        elif m.op == "Mul" and scalar(m.inputs[0]) is not None:
            c, v = c * scalar(m.inputs[0]), m.inputs[1]
        else:
            return v, c


def _softmax(v: Value | None, ctx: Context) -> Value | None:
    """The operand of a softmax over the last axis, through a guard against NaN rows."""
    w = ctx.single(v, "Where")
    if w is not None:
        nan = ctx.producer(w.inputs[0], "IsNaN")
        if nan is None or nan.inputs[0] is not w.inputs[2] or scalar(w.inputs[1]) != 0:
            return None
        s = ctx.producer(w.inputs[2], "Softmax")
    else:
        s = ctx.single(v, "Softmax")
    if s is None or s.inputs[0] is None:
        return None
    axis = int(s.attrs.get("axis", -1))
    return s.inputs[0] if axis in (-1, s.inputs[0].rank - 1) else None


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.op != "MatMul" or n.outputs[0].rank != 4:
        return None
    v = n.inputs[1]
    scores = _softmax(n.inputs[0], ctx)
    if scores is None or v is None or v.rank != 4:
        return None
    mask: Value | None = None
    add = ctx.single(scores, "Add")
    qk = ctx.single(scores, "MatMul", "Mul", "Div")
    if add is not None:
        for i in (0, 1):
            if _scaled(add.inputs[i], ctx)[0] is not None and ctx.single(_scaled(add.inputs[i], ctx)[0], "MatMul") is not None:
                mask, scores = add.inputs[1 - i], add.inputs[i]
                break
        else:
            return None
    elif qk is None:
        return None
    product, outer = _scaled(scores, ctx)
    mm = ctx.single(product, "MatMul")
    if mm is None:
        return None
    q, cq = _scaled(mm.inputs[0], ctx)
    kt, ck = _scaled(mm.inputs[1], ctx)
    if q is None or kt is None or q.rank != 4 or kt.rank != 4 or q.shape[:2] != v.shape[:2] or kt.shape[:2] != v.shape[:2]:
        return None
    t = ctx.producer(kt, "Transpose")
    if t is not None and t.inputs[0] is not None:
        p = perm_of(t)
        x = t.inputs[0]
        inner = (p[0], p[1], p[3], p[2])
        k = x if inner == (0, 1, 2, 3) else ctx.make("Transpose", [x], {"perm": inner}, t)
    else:
        k = ctx.make("Transpose", [kt], {"perm": (0, 1, 3, 2)}, n)
    if mask is not None and (mask.rank > 4 or not mask.dtype.is_float):
        return None
    return ctx.make("luthier::Attention", [q, k, v, mask], {"scale": float(outer * cq * ck)}, n)
