"""Keep quantized graphs integer.

Before: ``y = Conv(DequantizeLinear(x, sx, zx), DequantizeLinear(w, sw), b)``. After: ``a = ConvInteger(x, w, zx); y = Add(Mul(Cast(a),
sx * sw), b)``: the sum is exact in i32, scale and bias are an epilogue that fusion keeps in registers, and a following
QuantizeLinear joins it as ``Cast(Add(Round(Add(Mul(Cast(a), s / sy), b / sy)), zy))`` without a division. MatMul and Gemm likewise.
QLinearConv and QLinearMatMul with constant parameters take the same form. MaxPool and operators that only move elements commute with DequantizeLinear, and ``QuantizeLinear(DequantizeLinear(x))`` with equal
parameters is ``x``. Scales are multiplied in f64 and rounded once, so a tie may round to the other neighbour.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.graph import Graph, Node, Value, all_nodes
from luthier.ir.op import lookup
from luthier.passes.graph.rewrite import Context, rewrite_graph

Array = np.ndarray[Any, Any]
_ONNX_F32 = 1
_CODES = {"u8": 2, "i8": 3, "u16": 4, "i16": 5, "i32": 6}
_LINEAR = ("QLinearConv", "QLinearMatMul")
_MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice")


def quantize_integer(graph: Graph) -> bool:
    """In place; True when something changed."""
    if not any(n.op in ("DequantizeLinear", *_LINEAR) for n in all_nodes(graph)):
        return False
    changed = rewrite_graph(graph, _integer)
    return rewrite_graph(graph, _requantize) or changed


def _integer(n: Node, ctx: Context) -> Value | None:
    if n.op == "Conv":
        return _conv(n, ctx)
    if n.op in ("MatMul", "Gemm"):
        return _matmul(n, ctx)
    if n.op in _LINEAR:
        return _linear(n, ctx)
    if n.op == "QuantizeLinear":
        d = ctx.producer(n.inputs[0], "DequantizeLinear")
        if d is not None and _same_parameters(n, d) and d.inputs[0] is not None and d.inputs[0].dtype is n.outputs[0].dtype:
            return d.inputs[0]
        return None
    if n.op in _MOVES and len(n.outputs) == 1:
        d = ctx.single(n.inputs[0], "DequantizeLinear")
        if d is not None and _per_tensor(d) and d.inputs[0] is not None and d.inputs[0].data is None:
            y = ctx.make(n.op, [d.inputs[0], *n.inputs[1:]], n.attrs, n)
            return ctx.make("DequantizeLinear", [y, *d.inputs[1:]], d.attrs, d)
    return None


def _per_tensor(d: Node) -> bool:
    s = d.input(1)
    return s is not None and s.data is not None and s.data.size == 1 and float(s.data.reshape(-1)[0]) > 0


def _same_parameters(q: Node, d: Node) -> bool:
    for i in (1, 2):
        a, b = q.input(i), d.input(i)
        if a is b:
            continue
        if a is None or b is None or a.data is None or b.data is None or a.data.shape != b.data.shape or not (a.data == b.data).all():
            return False
    return _per_tensor(q)


def _activation(v: Value | None, ctx: Context) -> Node | None:
    """The DequantizeLinear of an 8-bit activation with constant scalar parameters."""
    d = ctx.producer(v, "DequantizeLinear")
    if d is None or d.inputs[0] is None or d.inputs[0].data is not None or not _per_tensor(d) or d.inputs[0].dtype.bits != 8:
        return None
    z = d.input(2)
    return d if z is None or z.data is not None else None


def _weights(v: Value | None, ctx: Context, axis: int) -> tuple[Array, Array, Array | None] | None:
    """(w, scales, zero points or None when all are 0) of dequantized constant 8-bit weights, per tensor or along ``axis``."""
    d = ctx.producer(v, "DequantizeLinear")
    if d is None or d.attrs.get("block_size", 0):
        return None
    w, s, z = d.inputs[0], d.input(1), d.input(2)
    if w is None or w.data is None or w.dtype.bits != 8 or s is None or s.data is None or (z is not None and z.data is None):
        return None
    if s.data.size > 1:
        a = int(d.attrs.get("axis", 1))
        if (a + w.rank if a < 0 else a) != axis:
            return None
    zero = None if z is None or z.data is None or not z.data.any() else z.data
    return w.data, s.data.reshape(-1), zero


def _bias(v: Value | None, ctx: Context) -> Array | None:
    """Contents of a constant bias in f64, dequantized if need be."""
    if v is None:
        return None
    if v.data is not None:
        return v.data.astype(np.float64)
    d = ctx.producer(v, "DequantizeLinear")
    if d is None or any(i is not None and i.data is None for i in d.inputs):
        return None
    o = lookup("DequantizeLinear")
    assert o is not None
    return np.asarray(o.reference(d, *(None if i is None else i.data for i in d.inputs))[0]).astype(np.float64)


def _scaled(ctx: Context, n: Node, acc: Value, scale: Array, bias: Array | None, channels: int, tail: int) -> Value:
    """Cast(acc) * scale + bias, vectors over the channel axis followed by ``tail`` unit axes."""
    shape = (channels,) + (1,) * tail
    y = ctx.make("Cast", [acc], {"to": _ONNX_F32}, n)
    s = np.broadcast_to(scale, (channels,)).reshape(shape).astype(np.float32)
    y = ctx.make("Mul", [y, ctx.const(n.name + ".scale", s)], {}, n)
    if bias is None:
        return y
    b = np.broadcast_to(bias.reshape(-1), (channels,)).reshape(shape).astype(np.float32)
    return ctx.make("Add", [y, ctx.const(n.name + ".bias", b)], {}, n)


def _conv(n: Node, ctx: Context) -> Value | None:
    x = _activation(n.inputs[0], ctx)
    w = _weights(n.inputs[1], ctx, 0)
    if x is None or w is None or lookup("ConvInteger") is None:
        return None
    bias = _bias(n.input(2), ctx)
    if n.input(2) is not None and bias is None:
        return None
    data, scale, zero = w
    zw = None if zero is None else ctx.const(n.name + ".w_zero", zero)
    acc = ctx.make("ConvInteger", [x.inputs[0], ctx.const(n.name + ".w", data), x.input(2), zw], dict(n.attrs), n)
    sx = float(x.inputs[1].data.reshape(-1)[0])  # type: ignore[union-attr]
    return _scaled(ctx, n, acc, scale.astype(np.float64) * sx, bias, data.shape[0], data.ndim - 2)


def _matmul(n: Node, ctx: Context) -> Value | None:
    gemm = n.op == "Gemm"
    if gemm and (n.attrs.get("alpha", 1.0) != 1.0 or n.attrs.get("beta", 1.0) != 1.0 or n.attrs.get("transA", 0)):
        return None
    flip = gemm and bool(n.attrs.get("transB", 0))
    x = _activation(n.inputs[0], ctx)
    if x is None or n.inputs[1] is None or n.inputs[1].rank != 2 or lookup("MatMulInteger") is None:
        return None
    w = _weights(n.inputs[1], ctx, 0 if flip else 1)
    if w is None:
        return None
    bias = _bias(n.input(2), ctx) if gemm else None
    if gemm and n.input(2) is not None and (bias is None or bias.ndim > 1):
        return None
    data, scale, zero = w
    if flip:
        data = np.ascontiguousarray(data.T)
    zw = None if zero is None else ctx.const(n.name + ".w_zero", zero)
    acc = ctx.make("MatMulInteger", [x.inputs[0], ctx.const(n.name + ".w", data), x.input(2), zw], {}, n)
    sx = float(x.inputs[1].data.reshape(-1)[0])  # type: ignore[union-attr]
    return _scaled(ctx, n, acc, scale.astype(np.float64) * sx, bias, data.shape[1], 0)


def _linear(n: Node, ctx: Context) -> Value | None:
    """``QLinearConv(x, sx, zx, w, sw, zw, sy, zy, b)`` is ``Cast(Round((ConvInteger(x, w, zx, zw) + b) * (sx sw / sy)) + zy)``, and
    QLinearMatMul likewise; constant parameters, x and y per tensor, 8-bit."""
    conv = n.op == "QLinearConv"
    x, sx, zx, w, sw, zw, sy, zy = (n.input(i) for i in range(8))
    bias = n.input(8) if conv else None
    if any(v is None or v.data is None for v in (sx, w, sw, sy)) or any(v is not None and v.data is None for v in (zx, zw, zy, bias)):
        return None
    assert x is not None and sx is not None and w is not None and sw is not None and sy is not None
    assert sx.data is not None and w.data is not None and sw.data is not None and sy.data is not None
    one = all(v is None or v.data is None or v.data.size == 1 for v in (sx, zx, sy, zy))
    if not one or x.dtype.bits != 8 or w.dtype.bits != 8 or n.outputs[0].dtype.name not in ("u8", "i8") or n.attrs.get("channels_last", 0):
        return None
    if sx.data.dtype != np.float32 or sy.data.dtype != np.float32 or (not conv and (w.rank != 2 or x.rank < 2)):
        return None
    channels = w.data.shape[0] if conv else w.data.shape[1]
    if sw.data.size not in (1, channels):
        return None
    zero = None if zw is None or zw.data is None or not zw.data.any() else ctx.const(n.name + ".w_zero", zw.data if zw.data.size > 1 else zw.data.reshape(()))
    ins = [x, ctx.const(n.name + ".w", w.data), zx, zero]
    acc = ctx.make("ConvInteger" if conv else "MatMulInteger", ins, dict(n.attrs) if conv else {}, n)
    scale = sx.data.reshape(-1)[0].astype(np.float64) * sw.data.reshape(-1).astype(np.float64) / sy.data.reshape(-1)[0].astype(np.float64)
    b = None if bias is None or bias.data is None else bias.data.astype(np.float64) * scale
    y = ctx.make("Round", [_scaled(ctx, n, acc, scale, b, channels, w.data.ndim - 2 if conv else 0)], {}, n)
    if zy is not None and zy.data is not None and zy.data.any():
        y = ctx.make("Add", [y, ctx.const(n.name + ".zero", zy.data.reshape(()).astype(np.float32))], {"keep_scalars": True}, n)
    return ctx.make("Cast", [y], {"to": _CODES[n.outputs[0].dtype.name]}, n)


def _requantize(n: Node, ctx: Context) -> Value | None:
    """QuantizeLinear(a * s + b, sy, zy) = Cast(Round(a * (s / sy) + b / sy) + zy), saturating."""
    if n.op != "QuantizeLinear" or not _per_tensor(n) or n.outputs[0].dtype.name not in _CODES:
        return None
    z = n.input(2)
    if z is not None and (z.data is None or z.data.size != 1):
        return None
    add = ctx.single(n.inputs[0], "Add")
    bias = None if add is None else add.inputs[1]
    mul = ctx.single(n.inputs[0] if add is None else add.inputs[0], "Mul")
    if mul is None or (bias is not None and bias.data is None) or ctx.single(mul.inputs[0], "Cast") is None:
        return None
    scale = mul.inputs[1]
    if scale is None or scale.data is None or scale.data.dtype != np.float32:
        return None
    sy = float(n.inputs[1].data.reshape(-1)[0])  # type: ignore[union-attr]
    y = ctx.make("Mul", [mul.inputs[0], ctx.const(scale.name, (scale.data.astype(np.float64) / sy).astype(np.float32))], {}, n)
    if bias is not None and bias.data is not None:
        y = ctx.make("Add", [y, ctx.const(bias.name, (bias.data.astype(np.float64) / sy).astype(np.float32))], {}, n)
    y = ctx.make("Round", [y], {}, n)
    if z is not None and z.data is not None and z.data.any():
        y = ctx.make("Add", [y, ctx.const(n.name + ".zero", z.data.astype(np.float32))], {"keep_scalars": True}, n)
    return ctx.make("Cast", [y], {"to": _CODES[n.outputs[0].dtype.name]}, n)
