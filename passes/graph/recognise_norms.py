"""Recognise layer and RMS normalisation.

Before: ``d = Sub(x, ReduceMean(x)); y = Add(Mul(Div(d, Sqrt(Add(ReduceMean(Mul(d, d)), eps))), g), b)``.
After: ``y = LayerNormalization(x, g, b)``. Without the subtraction: ``RMSNormalization``. The reductions must be over the last
axes, kept. Division may be spelled Reciprocal, ``1 / s`` or ``Pow(v, -0.5)``. Results change by rounding only.
"""

from __future__ import annotations

import numpy as np

from luthier.ir.graph import Graph, Node, Value
from luthier.ir.op import lookup
from luthier.passes.graph.canonicalize import scalar
from luthier.passes.graph.rewrite import Context, rewrite_graph


def recognise_norms(graph: Graph) -> bool:
    """In place; True when something was recognised."""
    return rewrite_graph(graph, _rule)


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.op == "Div":
        return _normalized(n, ctx, n.inputs[0], _root(n.inputs[1], ctx))
    if n.op == "Mul":
        for i in (0, 1):
            inv = _inverse_root(n.inputs[1 - i], ctx)
            if inv is not None:
                y = _normalized(n, ctx, n.inputs[i], inv)
                if y is not None:
                    return y
        return _affine(n, ctx, 1)
    if n.op == "Add":
        return _affine(n, ctx, 2)
    return None


def _mean(v: Value | None, ctx: Context) -> tuple[Value, int] | None:
    """(x, first axis) when ``v`` is the kept mean of x over its last axes."""
    r = ctx.producer(v, "ReduceMean")
    if r is None or r.inputs[0] is None or not r.attrs.get("keepdims", 1):
        return None
    x, axes = r.inputs[0], r.input(1)
    if axes is None or axes.data is None:
        return None
    ax = sorted(int(a) + x.rank if a < 0 else int(a) for a in axes.data.reshape(-1))
    if not ax or ax != list(range(ax[0], x.rank)):
        return None
    return x, ax[0]


def _add_scalar(v: Value | None, ctx: Context) -> tuple[Value, float] | None:
    a = ctx.producer(v, "Add")
    if a is None:
        return None
    for i in (0, 1):
        c, x = scalar(a.inputs[i]), a.inputs[1 - i]
        if c is not None and x is not None:
            return x, float(c)
    return None


def _root(v: Value | None, ctx: Context) -> tuple[Value, float] | None:
    """(m, eps) when ``v`` is sqrt(m + eps)."""
    s = ctx.producer(v, "Sqrt")
    return None if s is None else _add_scalar(s.inputs[0], ctx)


def _inverse_root(v: Value | None, ctx: Context) -> tuple[Value, float] | None:
    """(m, eps) when ``v`` is 1 / sqrt(m + eps)."""
    p = ctx.producer(v, "Reciprocal", "Div", "Pow")
    if p is None:
        return None
    if p.op == "Reciprocal":
        return _root(p.inputs[0], ctx)
    if p.op == "Div":
        return _root(p.inputs[1], ctx) if scalar(p.inputs[0]) == 1 else None
    return _add_scalar(p.inputs[0], ctx) if scalar(p.inputs[1]) == -0.5 else None


def _square_of(v: Value, ctx: Context) -> Value | None:
    m = ctx.producer(v, "Mul", "Pow")
    if m is None:
        return None
    if m.op == "Pow":
        return m.inputs[0] if scalar(m.inputs[1]) == 2 else None
    return m.inputs[0] if m.inputs[0] is m.inputs[1] else None


def _normalized(n: Node, ctx: Context, d: Value | None, root: tuple[Value, float] | None) -> Value | None:
    if d is None or root is None or d.shape != n.outputs[0].shape:
        return None
    var, eps = root
    got = _mean(var, ctx)
    if got is None:
        return None
    sq, axis = got
    base = _square_of(sq, ctx)
    if base is None:
        return None
    dims = d.shape[axis:]
    if any(s.op != "const" for s in dims):
        return None
    ones = np.ones([s.attr for s in dims], d.dtype.numpy)
    attrs = {"axis": axis - d.rank, "epsilon": eps}
    sub = ctx.producer(base, "Sub")
    if sub is not None and (base is d or _same_difference(sub, ctx.producer(d, "Sub"))):
        mean = _mean(sub.inputs[1], ctx)
        x = sub.inputs[0]
        if mean is not None and x is not None and mean[0] is x and mean[1] == axis and lookup("LayerNormalization") is not None:
            return ctx.make("LayerNormalization", [x, ctx.const("scale", ones)], attrs, n)
    if base is d and lookup("RMSNormalization") is not None:
        return ctx.make("RMSNormalization", [d, ctx.const("scale", ones)], attrs, n)
    return None


def _same_difference(a: Node, b: Node | None) -> bool:
    return b is not None and a.inputs == b.inputs


def _affine(n: Node, ctx: Context, place: int) -> Value | None:
    """LayerNormalization(x, ones) * g = LayerNormalization(x, g); then + b."""
    for i in (0, 1):
        norm = ctx.single(n.inputs[i], "LayerNormalization", "RMSNormalization")
        c = n.inputs[1 - i]
        if norm is None or c is None or c.data is None or (place == 2 and norm.op == "RMSNormalization"):
            continue
        scale = norm.inputs[1]
        assert scale is not None
        y = n.outputs[0]
        full = (1,) * (y.rank - c.data.ndim) + c.data.shape
        inner = scale.type.static_shape or ()
        if norm.outputs[0].shape != y.shape or any(d != 1 for d in full[: y.rank - len(inner)]):
            continue
        c_full = ctx.const(c.name, np.ascontiguousarray(np.broadcast_to(c.data.reshape(full[y.rank - len(inner) :]), inner)))
        if place == 1 and scalar(scale) == 1 and norm.input(2) is None:
            return ctx.make(norm.op, [norm.inputs[0], c_full], dict(norm.attrs), n)
        if place == 2 and norm.input(2) is None:
            return ctx.make(norm.op, [norm.inputs[0], scale, c_full], dict(norm.attrs), n)
    return None
