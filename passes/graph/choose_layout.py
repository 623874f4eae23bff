"""Channels-last activations for convolution networks.

Before: ``y = Conv(x, w)`` over ``[N, C, H, W]``. After: ``y = Transpose[0,3,1,2](Conv{layout=NHWC}(Transpose[0,2,3,1](x), w'))``
with ``w'`` as ``[KH, KW, C/g, M]``; pooling and resizing likewise. ``eliminate_transposes`` then cancels the transposes inside a
region, so that only its borders move bytes. Channels-last because the innermost axis of a convolution's output is then the
one that fills vector lanes, at every spatial size and with any stride.

A region whose convolutions are depthwise or have kernels of one element runs as well channels-first, lanes along rows of pixels. It keeps
its layout where that costs less than the transposes at its borders would (:func:`stays_first`): a lone convolution, a graph that enters
and leaves soon.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from luthier.ir.graph import Graph, Node, Value, all_nodes
from luthier.ir.op import lookup
from luthier.passes.graph.eliminate_transposes import SINKS
from luthier.passes.graph.rewrite import Context, rewrite_graph

CONVS = frozenset({"Conv", "ConvTranspose", "ConvInteger"})
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})


ROW = 16  # pixels of a row from where on it fills lanes
TRANSPOSED = 6.0  # bytes of a tensor that a transposition moves in a cycle


def choose_layout(graph: Graph) -> bool:
    """In place; True when something changed. A graph without convolutions keeps its layout."""
    if not any(n.op in CONVS for n in all_nodes(graph)):
        return False
    first = stays_first(graph)
    return rewrite_graph(graph, lambda n, ctx: None if n.outputs and n.outputs[0] in first else _rule(n, ctx))


def stays_first(graph: Graph) -> set[Value]:
    """The results of the operators that keep their layout, by regions: what transposes sink through belongs together."""
    parent: dict[Value, Value] = {}

    def find(v: Value) -> Value:
        while parent.setdefault(v, v) is not v:
            v = parent[v]
        return v

    nodes = [n for n in graph.nodes if len(n.outputs) == 1 and n.outputs[0].rank > 2 and (_lays_out(n) or n.op in SINKS or (o := lookup(n.op)) is not None and o.permutes)]
    for n in nodes:
        for v in _carried(n):
            parent[find(v)] = find(n.outputs[0])
    members, makers = set(nodes), {v: n for n in graph.nodes for v in n.outputs}
    readers: dict[Value, list[Node]] = {}
    for n in all_nodes(graph):
        for u in n.inputs:
            if u is not None:
                readers.setdefault(u, []).append(n)
    lost: dict[Value, float] = {}
    for n in nodes:
        if _lays_out(n):
            lost[find(n.outputs[0])] = lost.get(find(n.outputs[0]), 0.0) + _lost(n)
    moved = dict.fromkeys(lost, 0.0)
    for v in list(parent):
        if find(v) in moved and (makers.get(v) not in members or v in graph.outputs or any(r not in members for r in readers.get(v, ()))):
            moved[find(v)] += _bytes(v)
    return {n.outputs[0] for n in nodes if _lays_out(n) and lost[find(n.outputs[0])] < moved[find(n.outputs[0])] / TRANSPOSED}


def _lays_out(n: Node) -> bool:
    return n.op in POOLS or n.op == "Resize" or n.op in CONVS and n.inputs[1] is not None and n.inputs[1].data is not None


def _carried(n: Node) -> list[Value]:
    """The operands whose layout is that of the result."""
    data = n.inputs[:1] if _lays_out(n) else n.inputs
    return [v for v in data if v is not None and v.data is None and v.rank == n.outputs[0].rank]


def _bytes(v: Value) -> float:
    """What a transposition of ``v`` moves; nothing where only extents of 1 change places."""
    sizes = [d.attr if d.op == "const" else 0 for d in v.shape]
    return 0.0 if sizes[1] == 1 or math.prod(sizes[2:]) == 1 else float(math.prod(sizes) * v.dtype.bits / 8)


def _lost(n: Node) -> float:
    """Cycles (of 32 operations) that the operator takes longer channels-first, infinitely many where that form is slow."""
    x, y = n.inputs[0], n.outputs[0]
    if x is None or any(d.op != "const" for d in (*x.shape, *y.shape)) or n.op not in POOLS and n.op != "Conv":
        return math.inf
    kernel, strides = n.attrs.get("kernel_shape") or (), n.attrs.get("strides") or (1,)
    if n.op == "Conv" and n.inputs[1] is not None:
        kernel, group, channels = [d.attr for d in n.inputs[1].shape[2:]], int(n.attrs.get("group", 1)), x.shape[1].attr
        if group == 1 and math.prod(kernel) == 1 and all(s == 1 for s in strides) and not any(n.attrs.get("pads") or ()):
            return 0.05 / 16 * math.prod(d.attr for d in y.shape) * channels
        if group != channels or y.shape[1].attr != channels:
            return math.inf
    good = n.op.startswith("Global") or y.shape[-1].attr >= ROW and strides[-1] <= 2 and math.prod(kernel) <= 64
    return 0.0 if good else math.inf


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
