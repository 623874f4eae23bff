"""Fold batch normalisation and per-channel scaling and bias into the convolution or Gemm in front of them.

Before: ``y = BatchNormalization(Conv(x, w), s, b, m, v)``. After: ``y = Conv(x, w * a, b - m * a)`` with ``a = s / sqrt(v + eps)``.
Also ``Conv(x, w) * c`` and ``Conv(x, w) + c`` for a constant ``c`` per channel. A batch norm behind anything else becomes one
multiplication and one addition. Computed in f64, rounded once; results change by rounding only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.graph import Graph, Node, Value
from luthier.passes.graph.rewrite import Context, rewrite_graph

Array = np.ndarray[Any, Any]
_CONVS = ("Conv", "ConvTranspose")


def fold_batch_norm(graph: Graph) -> bool:
    """In place; True when something was folded."""
    return rewrite_graph(graph, _rule)


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.op == "BatchNormalization":
        return _batch_norm(n, ctx)
    if n.op in ("Mul", "Add"):
        return _channelwise(n, ctx)
    return None


def _batch_norm(n: Node, ctx: Context) -> Value | None:
    if len(n.outputs) > 1 or n.attrs.get("training_mode", 0):
        return None
    x = n.inputs[0]
    params = [None if v is None else v.data for v in n.inputs[1:5]]
    if x is None or any(p is None for p in params):
        return None
    s, b, m, v = (np.asarray(p, np.float64) for p in params)
    a = s / np.sqrt(v + n.attrs.get("epsilon", 1e-5))
    c = b - m * a
    done = _into(ctx, n, x, a, c)
    if done is not None:
        return done
    shape = (-1,) + (1,) * (x.rank - 2)
    dt = x.dtype.numpy
    y = ctx.make("Mul", [x, ctx.const(n.name + ".scale", a.reshape(shape).astype(dt))], {}, n)
    return ctx.make("Add", [y, ctx.const(n.name + ".shift", c.reshape(shape).astype(dt))], {}, n)


def _channelwise(n: Node, ctx: Context) -> Value | None:
    for i in (0, 1):
        x, c = n.inputs[i], n.inputs[1 - i]
        if x is None or c is None or c.data is None or c.data.dtype.kind != "f":
            continue
        conv = ctx.single(x, *_CONVS)
        if conv is None:
            continue
        vec = per_channel(c.data, x)
        if vec is None:
            continue
        zero, one = np.zeros_like(vec), np.ones_like(vec)
        return _into(ctx, n, x, vec if n.op == "Mul" else one, vec if n.op == "Add" else zero)
    return None


def per_channel(c: Array, x: Value) -> Array | None:
    """``c`` broadcast against ``x`` [N, C, ...] as a vector over C in f64, or None when it varies along another axis."""
    if x.shape[1].op != "const" or c.ndim > x.rank:
        return None
    shape = (1,) * (x.rank - c.ndim) + c.shape
    channels = int(x.shape[1].attr)
    if any(d != 1 for k, d in enumerate(shape) if k != 1) or shape[1] not in (1, channels):
        return None
    return np.broadcast_to(c.reshape(-1).astype(np.float64), (channels,)).copy()


def _into(ctx: Context, n: Node, x: Value, a: Array, c: Array) -> Value | None:
    """``a * conv + c`` as one convolution."""
    conv = ctx.single(x, *_CONVS)
    if conv is None:
        return None
    w, bias = conv.inputs[1], conv.input(2)
    if w is None or w.data is None or w.data.dtype.kind != "f" or (bias is not None and bias.data is None):
        return None
    if conv.op == "ConvTranspose" and int(conv.attrs.get("group", 1)) != 1:
        return None
    axis = 0 if conv.op == "Conv" else 1
    if w.data.shape[axis] != a.shape[0]:
        return None
    shape = [1] * w.data.ndim
    shape[axis] = -1
    dt = w.data.dtype
    new_w = w if (a == 1).all() else ctx.const(w.name, (w.data.astype(np.float64) * a.reshape(shape)).astype(dt))
    old = 0.0 if bias is None or bias.data is None else bias.data.astype(np.float64)
    new_b = ctx.const((bias or w).name + ".bias", (old * a + c).astype(dt))
    return ctx.make(conv.op, [conv.inputs[0], new_w, new_b], dict(conv.attrs), conv)
