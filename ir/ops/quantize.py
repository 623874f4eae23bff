"""Quantization: QuantizeLinear and DequantizeLinear (per tensor, per axis, in blocks), DynamicQuantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, Pull, pull, reduce_
from luthier.ir.dtypes import DType, f32, i32, u8
from luthier.ir.expr import Expr, cast, const, load, maximum, minimum, select, unary
from luthier.ir.graph import Node, TensorType, Value
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    check_axis,
    const_value,
    define,
    element_type,
    expect_shape,
    get,
    is_one,
    make,
    must,
    need,
    shape_error,
    type_error,
    wide,
    widen,
)
from luthier.ir.ops.convert import cast_ref, cast_to


def saturate(x: Expr, zero: Expr | None, to: DType) -> Expr:
    """``x`` (f32 or f64) rounded half to even, moved by the zero point, clamped to the range of ``to``; NaN gives its lowest value."""
    if to.is_float:
        return cast_to(x, to)
    lo, hi = to.limits()
    r = unary("round", x)
    if zero is not None:
        r = r + cast(zero, x.dtype)
    r = minimum(maximum(r, const(lo, x.dtype)), const(hi, x.dtype))
    return cast(cast(r, i32) if to.bits < 32 else r, to)


def saturate_ref(x: Array, zero: Array | None, to: DType) -> Array:
    """numpy: see :func:`saturate`."""
    if to.is_float:
        return cast_ref(x, to)
    lo, hi = to.limits()
    r = np.rint(x.astype(np.float64))
    if zero is not None:
        r = r + np.asarray(zero).astype(np.float64)
    return np.clip(np.nan_to_num(r, nan=lo), lo, hi).astype(np.int64).astype(to.numpy)


class Scaled(Op):
    """What the two operators share: where the scale of an element stands."""

    kind = "elementwise"

    def check(self, node: Node) -> None:
        """Scale and zero point are of one shape, that of the layout. Raises ShapeError; extents that only a run knows are checked
        then."""
        x, s, (a, block) = need(node, 0), need(node, 1), self.layout(node)
        if block:
            expect_shape(node, 1, [(d + block - 1) // block if k == a else d for k, d in enumerate(x.shape)])
        elif a >= 0:
            expect_shape(node, 1, [x.shape[a]])
        if a >= 0:
            expect_shape(node, 2, s.shape)
        else:
            check_parameters(node, (2,))

    def layout(self, node: Node) -> tuple[int, int]:
        """(axis, block size): axis -1 means one scale for all, block size 0 one scale along the axis per element."""
        x, s = need(node, 0), need(node, 1)
        block = int(node.attrs.get("block_size", 0))
        if s.rank == 0 or (s.rank == 1 and s.type.static_shape == (1,) and not block):
            return -1, 0
        a = check_axis(node, int(node.attrs.get("axis", 1)), x.rank)
        if block:
            if s.rank != x.rank:
                raise shape_error(node, f"block_size {block} needs a scale of rank {x.rank}")
            return a, block
        if s.rank != 1:
            raise shape_error(node, "the scale must be a scalar, a vector along the axis, or blocked (block_size)")
        return a, 0

    def parameter(self, node: Node, b: Buffer, axes: Sequence[Axis]) -> Expr:
        """``b`` (scale or zero point) for a point of ``axes``."""
        a, block = self.layout(node)
        if a < 0:
            return load(b, [ZERO] * b.rank)
        if not block:
            return load(b, [axes[a].var])
        return load(b, [x.var // block if d == a else x.var for d, x in enumerate(axes)])

    def scalar(self, node: Node, i: int, b: Buffer, axes: Sequence[Axis]) -> Expr:
        """Input ``i`` at a point; a one-element constant becomes a number in the expression."""
        v = const_value(node.input(i))
        return const(v, b.dtype) if v is not None and b.dtype.bits >= 8 else self.parameter(node, b, axes)

    def spread(self, node: Node, p: Array, shape: Sequence[int]) -> Array:
        """numpy: a scale or zero point for every element of ``shape``."""
        a, block = self.layout(node)
        p = np.asarray(p)
        if a < 0:
            return p.reshape(())
        if not block:
            return p.reshape([-1 if d == a else 1 for d in range(len(shape))])
        return np.take(np.repeat(p, block, axis=a), range(shape[a]), axis=a)


@op("QuantizeLinear")
class QuantizeLinear(Scaled):
    """(x, scale, zero_point): ``saturate(round(x / scale) + zero_point)``; the quotient is rounded to the type of the scale
    (or ``precision``). Output type: that of the zero point, ``output_dtype``, or u8."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        self.check(node)
        return [TensorType(self.target(node), need(node, 0).shape)]

    def target(self, node: Node) -> DType:
        z = node.input(2)
        if z is not None:
            return z.dtype
        code = node.attrs.get("output_dtype", 0)
        return element_type(node, code) if code else u8

    def precision(self, node: Node) -> DType:
        code = node.attrs.get("precision", 0)
        d = element_type(node, code) if code else need(node, 1).dtype
        return d if d.name != "f8e8m0" else f32

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x = must(ins, 0)[tuple(a.var for a in axes)]
        p = self.precision(node)
        w = wide(p)
        q = cast(x, w) / cast(self.scalar(node, 1, must(ins, 1), axes), w)
        if p is not w:
            q = cast(cast(q, p), w)
        zb = get(ins, 2)
        zero = None if zb is None or const_value(node.input(2)) == 0 else self.scalar(node, 2, zb, axes)
        return make(node, ins, outs, [define(outs[0], axes, saturate(q, zero, outs[0].dtype))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, s = np.asarray(arrays[0]), np.asarray(arrays[1])
        p = self.precision(node).numpy
        w = np.float64 if p == np.float64 else np.float32
        with np.errstate(all="ignore"):
            q = (x.astype(w) / self.spread(node, s, x.shape).astype(w)).astype(p).astype(w)
        z = arrays[2] if len(arrays) > 2 else None
        return [saturate_ref(q, None if z is None else self.spread(node, z, x.shape), self.target(node))]


@op("DequantizeLinear")
class DequantizeLinear(Scaled):
    """(x, scale, zero_point): ``(x - zero_point) * scale`` in the type of the scale (or ``output_dtype``)."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, z = need(node, 0), node.input(2)
        if z is not None and z.dtype is not x.dtype:
            raise type_error(node, "the zero point must have the type of the input")
        self.check(node)
        return [TensorType(self.target(node), x.shape)]

    def target(self, node: Node) -> DType:
        code = node.attrs.get("output_dtype", 0)
        if code:
            return element_type(node, code)
        d = need(node, 1).dtype
        return d if d.name != "f8e8m0" else f32

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x = must(ins, 0)[tuple(a.var for a in axes)]
        s = widen(self.scalar(node, 1, must(ins, 1), axes))
        zb = get(ins, 2)
        if not x.dtype.is_float:
            x = cast(x, i32)
        if zb is not None and const_value(node.input(2)) != 0 and not zb.dtype.is_float:
            x = x - cast(self.scalar(node, 2, zb, axes), i32)
        y = cast_to(x, s.dtype)
        if zb is not None and zb.dtype.is_float:
            y = y - cast_to(self.scalar(node, 2, zb, axes), s.dtype)
        return make(node, ins, outs, [define(outs[0], axes, y * s)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, s = np.asarray(arrays[0]), np.asarray(arrays[1])
        w = np.float64 if s.dtype == np.float64 else np.float32
        is_float = need(node, 0).dtype.is_float
        y = x.astype(w if is_float else np.int32)
        if len(arrays) > 2 and arrays[2] is not None:
            y = y - self.spread(node, np.asarray(arrays[2]), x.shape).astype(y.dtype)
        y = y.astype(w) * self.spread(node, s, x.shape).astype(w)
        return [y.astype(self.target(node).numpy)]


def dynamic_parameters(name: str, a: Buffer, scale: Buffer | None = None, zero: Buffer | None = None) -> tuple[list[Pull], Expr, Expr]:
    """(lets, scale, zero point) of ``a`` (f32) quantized to u8 over its range, which is made to hold 0."""
    r = axes_of(a.shape, "r")
    at = [x.var for x in r]
    hi, lo = (pull(f"{name}.{m}", (), reduce_(m, r, load(a, at))) for m in ("max", "min"))
    top, low = maximum(const(0.0, f32), load(hi.buf, ())), minimum(const(0.0, f32), load(lo.buf, ()))
    sb = scale or Buffer(f"{name}.scale", f32, (), "global")
    zb = zero or Buffer(f"{name}.zero", u8, (), "global")
    s = load(sb, ())
    q = unary("round", maximum(const(0.0, f32), minimum(const(255.0, f32), -low / s)))
    sc = Pull(sb, (), select(top.eq(low), const(1.0, f32), (top - low) / 255.0))
    return [hi, lo, sc, Pull(zb, (), cast(cast(q, i32), u8))], s, load(zb, ())


def dynamic_parameters_ref(x: Array) -> tuple[Any, Any]:
    """numpy: see :func:`dynamic_parameters`."""
    top, low = max(np.float32(0), x.max()), min(np.float32(0), x.min())
    s = np.float32(1) if top == low else np.float32((top - low) / np.float32(255))
    return s, np.uint8(np.rint(np.clip(-low / s, 0, 255)))


@op("DynamicQuantizeLinear")
class DynamicQuantizeLinear(Op):
    """x f32 to (y u8, scale, zero point): quantized over the whole range of x, which is made to hold 0."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [TensorType(u8, need(node, 0).shape), TensorType(f32, ()), TensorType(u8, ())]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, y = must(ins, 0), outs[0]
        lets, s, z = dynamic_parameters(y.name, x, outs[1], outs[2])
        axes = axes_of(y.shape)
        return make(node, ins, outs, [*lets, define(y, axes, saturate(load(x, [a.var for a in axes]) / s, z, u8))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0], np.float32)
        s, z = dynamic_parameters_ref(x)
        return [saturate_ref(x / s, np.asarray(z), u8), np.asarray(s), np.asarray(z)]


def check_parameters(
    node: Node, which: Sequence[int], line: Expr | None = None, operand: Value | None = None, inner: int = -1
) -> None:
    """Inputs ``which``, scales and zero points, where they are given: one element; or a vector of one an element of ``line``,
    where that is given; or of the rank of ``operand``, where that is given: its extents or 1, 1 along axis ``inner``, which the
    sum goes over. Raises ShapeError; extents that only a run knows are checked then."""
    for i in which:
        v = node.input(i)
        if v is None or all(is_one(d) for d in v.shape):
            continue
        if v.rank == 1:
            expect_shape(node, i, [1 if line is None else line])
        elif operand is None or v.rank != operand.rank:
            raise shape_error(node, f"input {i} ({v.name}) must have one element" + ("" if line is None else f", or {line!r}"))
        else:
            axis = inner % v.rank
            expect_shape(node, i, [1 if k == axis or is_one(d) else operand.shape[k] for k, d in enumerate(v.shape)])


def scale_and_zero(node: Node, ins: Sequence[Buffer | None], s: int, z: int, at: Sequence[Expr] = ()) -> tuple[Expr, Expr | None]:
    """The scale at input ``s`` and zero point at input ``z`` (None when absent or known to be 0) of a quantized operand.

    ``at``: index along the channel where they are vectors."""

    def read(i: int) -> Expr | None:
        b = get(ins, i)
        if b is None:
            return None
        v = const_value(node.input(i))
        if v is not None and b.dtype.bits >= 8:
            return const(v, b.dtype)
        return load(b, list(at) if at and not all(is_one(d) for d in b.shape) else [ZERO] * b.rank)

    sc, zp = read(s), read(z)
    assert sc is not None
    if zp is not None and zp.op == "const" and zp.attr == 0:
        zp = None
    return sc, zp


def centered(x: Expr, zero: Expr | None) -> Expr:
    """``x - zero`` in i32."""
    x = cast(x, i32)
    return x if zero is None else x - cast(zero, i32)


def is_scalar(v: Value | None) -> bool:
    """One element: rank 0 or shape [1]."""
    return v is None or v.rank == 0 or v.type.static_shape == (1,)


__all__ = [
    "centered", "check_parameters", "dynamic_parameters", "dynamic_parameters_ref", "is_scalar", "saturate", "saturate_ref",
    "scale_and_zero",
]  # fmt: skip
