"""Channels-last activations for convolution networks.

Before: ``y = Conv(x, w)`` over ``[N, C, H, W]``. After: ``y = Transpose[0,3,1,2](Conv{layout=NHWC}(Transpose[0,2,3,1](x), w'))``
with ``w'`` as ``[KH, KW, C/g, M]``; pooling and resizing likewise. ``eliminate_transposes`` then cancels the transposes inside a
region, so that only its borders move bytes. Channels-last because the innermost axis of a convolution's output is then the
one that fills vector lanes, at every spatial size and with any stride.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.graph import Graph, Node, Value, all_nodes
from luthier.ir.op import lookup
from luthier.passes.graph.rewrite import Context, rewrite_graph

CONVS = frozenset({"Conv", "ConvTranspose", "ConvInteger"})
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})


def choose_layout(graph: Graph) -> bool:
    """In place; True when something changed. A graph without convolutions keeps its layout."""
    if not any(n.op in CONVS for n in all_nodes(graph)):
        return False
    return rewrite_graph(graph, _rule)


def to_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


def to_first(rank: int) -> tuple[int, ...]:
    return (0, rank - 1, *range(1, rank - 1))


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.attrs.get("layout", "NCHW") != "NCHW" or not n.inputs or n.inputs[0] is None or len(n.outputs) != 1:
        return None
    x = n.inputs[0]
    rank = x.rank
    o = lookup(n.op)
    if rank < 3 or o is None or not getattr(o, "channels_last", False):
        return None
    if n.op in CONVS:
        w = n.inputs[1]
        if w is None or w.data is None:
            return None
        ins = [_last(ctx, x, n), _weights(ctx, n, w), *n.inputs[2:]]
    elif n.op in POOLS:
        ins = [_last(ctx, x, n)]
    elif n.op == "Resize":
        return _resize(n, ctx)
    else:
        return None
    y = ctx.make(n.op, ins, {**n.attrs, "layout": "NHWC"}, n)
    return ctx.make("Transpose", [y], {"perm": to_first(rank)}, n)


def _last(ctx: Context, x: Value, n: Node) -> Value:
    return ctx.make("Transpose", [x], {"perm": to_last(x.rank)}, n)


def _weights(ctx: Context, n: Node, w: Value) -> Value:
    """Conv [M, C/g, K...] to [K..., C/g, M]; ConvTranspose [C, M/g, K...] to [K..., C, M/g]."""
    assert w.data is not None
    k = tuple(range(2, w.data.ndim))
    perm = (*k, 1, 0) if n.op != "ConvTranspose" else (*k, 0, 1)
    return ctx.const(w.name, np.ascontiguousarray(w.data.transpose(perm)))


def _resize(n: Node, ctx: Context) -> Value | None:
    x = n.inputs[0]
    assert x is not None
    perm = to_last(x.rank)
    crops = n.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"  # the only mode that reads the region of interest
    if "axes" in n.attrs or crops and n.input(1) is not None:
        return None
    ins: list[Any] = [_last(ctx, x, n), None]
    for v in (n.input(2), n.input(3)):
        if v is None:
            ins.append(None)
        elif v.data is not None and v.data.size == x.rank:
            if v.data[1] != (1 if v is n.input(2) else x.shape[1].attr):  # channels are resized, or in the last dimension already
                return None
            ins.append(ctx.const(v.name, v.data[list(perm)]))
        elif v.data is not None and v.data.size == 0:
            ins.append(None)
        else:
            return None
    y = ctx.make("Resize", ins, n.attrs, n)
    return ctx.make("Transpose", [y], {"perm": to_first(x.rank)}, n)
