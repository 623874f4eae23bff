"""Sink transposes through operators that do not care, until they meet their inverse.

Before: ``y = Relu(Transpose[p](x)); z = Transpose[p^-1](y)``. After: ``z = Relu(x)``.
A transpose moves behind an operator that permutes when every full-rank operand carries the same one (constants are permuted at
compile time), and behind Concat, reductions, Softmax, Pad, Slice and quantization with the axes renumbered. One forward sweep
suffices because operands are visited before their readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.graph import Graph, Node, Value
from luthier.ir.op import lookup
from luthier.passes.graph.canonicalize import perm_of
from luthier.passes.graph.rewrite import Context, rewrite_graph

Perm = tuple[int, ...]


def eliminate_transposes(graph: Graph) -> bool:
    """In place; True when something moved."""
    return rewrite_graph(graph, _rule)


def inverse(p: Perm) -> Perm:
    out = [0] * len(p)
    for i, k in enumerate(p):
        out[k] = i
    return tuple(out)


def _rule(n: Node, ctx: Context) -> Any:
    if n.op == "Transpose":
        return _compose(n, ctx)
    sink = SINKS.get(n.op)
    if sink is None and len(n.outputs) == 1 and (o := lookup(n.op)) is not None and o.permutes:
        sink = _elementwise
    return None if sink is None else sink(n, ctx)


def _compose(n: Node, ctx: Context) -> Value | None:
    inner = ctx.producer(n.inputs[0], "Transpose")
    if inner is None or inner.inputs[0] is None:
        return None
    both = tuple(perm_of(inner)[i] for i in perm_of(n))
    if both == tuple(range(len(both))):
        return inner.inputs[0]
    return ctx.make("Transpose", [inner.inputs[0]], {"perm": both}, n)


def _before(v: Value | None, ctx: Context) -> tuple[Value, Perm] | None:
    """(x, p) when ``v`` is Transpose[p](x)."""
    t = ctx.producer(v, "Transpose")
    return None if t is None or t.inputs[0] is None else (t.inputs[0], perm_of(t))


def _elementwise(n: Node, ctx: Context) -> Value | None:
    rank = n.outputs[0].rank
    perm: Perm | None = None
    for v in n.inputs:
        got = _before(v, ctx)
        if got is not None and len(got[1]) == rank and v is not None and not all(s.op == "const" and s.attr == 1 for s in v.shape):
            perm = got[1]
            break
    if perm is None or rank < 3:
        return None
    ins: list[Value | None] = []
    for v in n.inputs:
        if v is None:
            ins.append(None)
            continue
        got = _before(v, ctx)
        if got is not None and got[1] == perm:
            ins.append(got[0])
        elif v.data is not None:
            ins.append(_permuted_constant(ctx, v, perm, rank))
        elif v.rank == 0 or all(s.op == "const" and s.attr == 1 for s in v.shape):
            ins.append(v)
        else:
            return None
    return _after(n, ctx, ins, n.attrs, perm)


def _permuted_constant(ctx: Context, v: Value, perm: Perm, rank: int) -> Value:
    assert v.data is not None
    if v.data.size == 1:
        return v
    full = v.data.reshape((1,) * (rank - v.data.ndim) + v.data.shape)
    return ctx.const(v.name, np.ascontiguousarray(full.transpose(inverse(perm))))


def _after(n: Node, ctx: Context, ins: Sequence[Value | None], attrs: dict[str, Any], perm: Perm) -> Value:
    y = ctx.make(n.op, ins, attrs, n)
    return ctx.make("Transpose", [y], {"perm": perm}, n)


def _axis(n: Node, rank: int, default: int) -> int:
    a = int(n.attrs.get("axis", default))
    return a + rank if a < 0 else a


def _concat(n: Node, ctx: Context) -> Value | None:
    got = [_before(v, ctx) for v in n.inputs]
    first = next((g for g in got if g is not None), None)
    if first is None:
        return None
    perm = first[1]
    ins: list[Value] = []
    for v, g in zip(n.inputs, got, strict=True):
        assert v is not None
        if g is not None and g[1] == perm:
            ins.append(g[0])
        elif v.data is not None:
            ins.append(ctx.const(v.name, np.ascontiguousarray(v.data.transpose(inverse(perm)))))
        else:
            return None
    return _after(n, ctx, ins, {**n.attrs, "axis": perm[_axis(n, len(perm), 0)]}, perm)


def _one_axis(default: int) -> Callable[[Node, Context], Value | None]:
    def sink(n: Node, ctx: Context) -> Value | None:
        got = _before(n.inputs[0], ctx)
        if got is None or len(n.outputs) != 1:
            return None
        x, perm = got
        if n.attrs.get("keepdims", 1) == 0:
            return None
        return _after(n, ctx, [x, *n.inputs[1:]], {**n.attrs, "axis": perm[_axis(n, len(perm), default)]}, perm)

    return sink


def _reduce(n: Node, ctx: Context) -> Value | None:
    got = _before(n.inputs[0], ctx)
    if got is None:
        return None
    x, perm = got
    v = n.input(1)
    if v is not None and v.data is None:
        return None
    axes = [int(a) for a in v.data.reshape(-1)] if v is not None and v.data is not None else []
    if not axes and n.attrs.get("noop_with_empty_axes", 0):
        return _after(n, ctx, [x], n.attrs, perm)
    rank = len(perm)
    axes = [a + rank if a < 0 else a for a in axes] or list(range(rank))
    new = ctx.const("axes", np.array(sorted(perm[a] for a in axes), np.int64))
    if n.attrs.get("keepdims", 1):
        return _after(n, ctx, [x, new], n.attrs, perm)
    kept_new = [d for d in range(rank) if d not in {perm[a] for a in axes}]
    kept_old = [perm[d] for d in range(rank) if d not in axes]
    left = tuple(kept_new.index(d) for d in kept_old)
    y = ctx.make(n.op, [x, new], n.attrs, n)
    return y if left == tuple(range(len(left))) else ctx.make("Transpose", [y], {"perm": left}, n)


def _slice(n: Node, ctx: Context) -> Value | None:
    got = _before(n.inputs[0], ctx)
    if got is None:
        return None
    x, perm = got
    v = n.input(3)
    if v is not None and v.data is None:
        return None
    starts = n.inputs[1]
    if starts is None or starts.rank != 1 or starts.shape[0].op != "const":
        return None
    count = starts.shape[0]
    axes = [int(a) for a in v.data.reshape(-1)] if v is not None and v.data is not None else list(range(count.attr))
    new = ctx.const("axes", np.array([perm[a + len(perm) if a < 0 else a] for a in axes], np.int64))
    return _after(n, ctx, [x, n.inputs[1], n.inputs[2], new, *n.inputs[4:]], n.attrs, perm)


def _pad(n: Node, ctx: Context) -> Value | None:
    got = _before(n.inputs[0], ctx)
    pads = n.input(1)
    if got is None or pads is None or pads.data is None or n.input(3) is not None:
        return None
    x, perm = got
    r = len(perm)
    old = pads.data.reshape(-1)
    new = np.zeros(2 * r, np.int64)
    for i, k in enumerate(perm):
        new[k], new[k + r] = old[i], old[i + r]
    return _after(n, ctx, [x, ctx.const("pads", new), *n.inputs[2:]], n.attrs, perm)


def _quantize(n: Node, ctx: Context) -> Value | None:
    got = _before(n.inputs[0], ctx)
    scale = n.input(1)
    if got is None or scale is None or n.attrs.get("block_size", 0):
        return None
    x, perm = got
    attrs = dict(n.attrs)
    if scale.rank == 1:
        attrs["axis"] = perm[_axis(n, len(perm), 1)]
    return _after(n, ctx, [x, *n.inputs[1:]], attrs, perm)


def _depth_to_space(n: Node, ctx: Context) -> Value | None:
    """Blocks of channels are contiguous channels-last: whole pixels move."""
    got = _before(n.inputs[0], ctx)
    if got is None or got[1] != (0, 3, 1, 2) or n.attrs.get("layout", "NCHW") != "NCHW":
        return None
    return _after(n, ctx, [got[0]], {**n.attrs, "layout": "NHWC"}, got[1])


SINKS: dict[str, Callable[[Node, Context], Value | None]] = {
    "Concat": _concat, "Softmax": _one_axis(-1), "LogSoftmax": _one_axis(-1), "ArgMax": _one_axis(0), "ArgMin": _one_axis(0),
    "Slice": _slice, "Pad": _pad, "DepthToSpace": _depth_to_space, "QuantizeLinear": _quantize, "DequantizeLinear": _quantize,
    **{f"Reduce{r}": _reduce for r in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")},
}  # fmt: skip
