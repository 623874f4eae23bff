"""Type conversion and pass-through: Cast, CastLike, BitCast, Identity, Dropout, Constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir import float4
from luthier.ir.compute import Compute, LetStmt
from luthier.ir.dtypes import DType, boolean, f4e2m1, f32, from_numpy, i32
from luthier.ir.expr import Expr, bitcast, cast, const, lor, select
from luthier.ir.graph import Node, TensorType
from luthier.ir.interpret.semantics import convert
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    Array,
    axes_of,
    const_value,
    define,
    element_type,
    expect_one,
    flag,
    flat_position,
    get,
    make,
    map_content,
    must,
    need,
    operand,
    type_error,
    unsupported,
    wide,
)
from luthier.ir.ops.random_numbers import DrawnArrays, Draws, check_draws

F8_MAX = {"f8e4m3fn": 448.0, "f8e4m3fnuz": 240.0, "f8e5m2": 57344.0, "f8e5m2fnuz": 57344.0}


def cast_to(x: Expr, to: DType, saturate: bool = True, mode: str = "up") -> Expr:
    """Conversion as ONNX defines it: 8-bit floats saturate on demand; floats become
    sub-byte integers by way of i32, so they truncate and wrap."""
    if x.dtype is f4e2m1:
        x = float4.decode(x)
    if to is f4e2m1:
        return float4.encode(cast(x, f32))
    if x.dtype.is_bool and to.is_float and to.bits < 32:
        return cast(cast(x, f32), to)
    if to.name in F8_MAX:
        if not x.dtype.is_float:
            x = cast(x, f32)
        if saturate and x.dtype.bits >= 16:
            top = const(F8_MAX[to.name], x.dtype)
            x = select(top < x, top, select(x < -top, -top, x))
    elif to.name == "f8e8m0":
        return e8m0(cast(x, f32), saturate, mode)
    elif to.is_int and to.bits < 8 and x.dtype.is_float:
        x = cast(x, i32)
    return cast(x, to)


def e8m0(x: Expr, saturate: bool, mode: str) -> Expr:
    """A power of two from the exponent of ``x`` (f32); ``mode`` up, down or nearest decides where the mantissa goes."""
    from luthier.ir.dtypes import f8e8m0, u8

    bits = bitcast(x, i32)
    exp = (bits >> const(23, i32)) & const(255, i32)
    man = bits & const((1 << 23) - 1, i32)
    if mode == "up":
        # subnormals round up to 2^-126 from the halfway mantissa on, else to 2^-127
        up = select(exp.eq(0), const(1 << 22, i32) < man, const(0, i32) < man)
    elif mode == "nearest":
        up = const(1 << 22, i32) <= man
    else:
        up = const(False, boolean)
    top = const(254 if saturate else 255, i32)
    out = exp + select(up, const(1, i32), const(0, i32))
    out = select(out < top, out, top)
    nan = exp.eq(255) & man.ne(0) | exp.eq(255) if not saturate else exp.eq(255) & man.ne(0)
    return bitcast(cast(select(nan, const(255, i32), out), u8), f8e8m0)


def cast_ref(a: Array, to: DType, saturate: bool = True, mode: str = "up") -> Array:
    """numpy: see :func:`cast_to`."""
    a = np.asarray(a)
    fl = from_numpy(a.dtype).is_float
    if to.name in F8_MAX:
        x = a.astype(np.float64 if a.dtype == np.float64 else np.float32)
        if saturate:
            top = np.asarray(F8_MAX[to.name], x.dtype)
            x = np.where(np.greater(x, top), top, np.where(np.less(x, -top), -top, x)).astype(x.dtype)
        return x.astype(to.numpy)
    if to.name == "f8e8m0":
        b = a.astype(np.float32).view(np.int32)
        e, m = (b >> 23) & 255, b & ((1 << 23) - 1)
        up = np.where(e == 0, m > 1 << 22, m > 0) if mode == "up" else (m >= 1 << 22) if mode == "nearest" else np.zeros(m.shape, bool)
        out = np.minimum(e + up, 254 if saturate else 255)
        out = np.where((e == 255) & ((m != 0) | (not saturate)), 255, out)
        return out.astype(np.uint8).view(to.numpy)
    if to.is_int and to.bits < 8 and fl:
        a = convert(a, i32)
    return np.asarray(convert(a, to))


class CastBase(Op):
    kind = "elementwise"
    permutes = True

    def limits(self, node: Node) -> tuple[Expr, Expr] | None:
        return need(node, 0).limits if node.outputs[0].dtype.is_int else None

    def target(self, node: Node) -> DType:
        raise NotImplementedError

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [TensorType(self.target(node), need(node, 0).shape)]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        if not (need(node, 0).dtype.is_int or need(node, 0).dtype.is_bool):
            return None
        to = self.target(node)
        return map_content(node, (lambda e: flag(e.ne(0))) if to.is_bool else (lambda e: e), 0)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x = must(ins, 0)[tuple(a.var for a in axes)]
        return make(node, ins, outs, [define(outs[0], axes, cast_to(x, outs[0].dtype, bool(node.attrs.get("saturate", 1)), node.attrs.get("round_mode", "up")))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [cast_ref(arrays[0], self.target(node), bool(node.attrs.get("saturate", 1)), node.attrs.get("round_mode", "up"))]


@op("Cast")
class Cast(CastBase):
    """To element type ``to``. float to int truncates and saturates, NaN to 0."""

    def target(self, node: Node) -> DType:
        return element_type(node, node.attrs["to"])


@op("CastLike")
class CastLike(CastBase):
    """To the element type of the second input."""

    def target(self, node: Node) -> DType:
        return need(node, 1).dtype


@op("BitCast")
class BitCast(Op):
    """The same bits as another type of the same width."""

    kind = "elementwise"
    permutes = True

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, to = need(node, 0), element_type(node, node.attrs["to"])
        if x.dtype.bits != to.bits:
            raise type_error(node, f"{x.dtype} and {to} differ in width")
        return [TensorType(to, x.shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x, to = must(ins, 0)[tuple(a.var for a in axes)], outs[0].dtype
        if x.dtype.is_bool:
            from luthier.ir.dtypes import u8

            x = cast(x, u8)
        return make(node, ins, outs, [define(outs[0], axes, x.ne(0) if to.is_bool else bitcast(x, to))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        to = element_type(node, node.attrs["to"])
        return [np.ascontiguousarray(arrays[0]).view(to.numpy).reshape(np.shape(arrays[0]))]


@op("Identity")
class Identity(Op):
    """The same tensor."""

    kind = "view"

    def limits(self, node: Node) -> tuple[Expr, Expr] | None:
        return need(node, 0).limits

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [need(node, 0).type]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return [need(node, 0).content]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        return make(node, ins, outs, [define(outs[0], axes, must(ins, 0)[tuple(a.var for a in axes)])])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.asarray(arrays[0])]


@op("Dropout")
class Dropout(Op):
    """(data, ratio?, training_mode?) -> (output, mask?): the identity unless training drops something."""

    kind = "reduction"  # in training an element's value depends on its position

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if not x.dtype.is_float:
            raise type_error(node, "Dropout takes floats")
        expect_one(node, 1, 2)
        if self.trains(node):
            check_draws(node, 3)
        return [x.type, TensorType(boolean, x.shape)]

    def trains(self, node: Node) -> bool:
        """Whether some call may drop something."""
        training = node.input(2)
        return training is not None and const_value(training) != 0

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x = must(ins, 0)
        lets: list[LetStmt] = []
        kept: Expr = const(True, boolean)
        for o, b in enumerate(outs):
            axes = axes_of(b.shape)
            e = x[tuple(a.var for a in axes)]
            if self.trains(node):
                t = wide(x.dtype)
                ratio = const(0.5, t) if get(ins, 1) is None else cast(operand(node, 1, ins, ()), t)
                off = operand(node, 2, ins, ()).eq(const(False, boolean))
                kept = lor(off, ratio <= Draws(node, ins, 3).uniform(flat_position(axes), t))
                e = select(off, cast(e, t), select(kept, cast(e, t) / (const(1, t) - ratio), const(0, t)))
            lets.append(define(b, axes, kept if o else e))
        return make(node, ins, outs, lets)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        given = [None if a is None else np.asarray(a) for a in arrays[:3]] + [None] * 3
        x, ratio, training = given[:3]
        assert x is not None
        if not self.trains(node) or training is None or not training.reshape(-1)[0]:
            return [x, np.ones(x.shape, bool)]
        t = wide(need(node, 0).dtype)
        r = t.numpy.type(0.5 if ratio is None else ratio.reshape(-1)[0])
        kept = DrawnArrays(node, arrays, 3).uniform(x.shape, t) >= r
        return [np.where(kept, x.astype(t.numpy) / (t.numpy.type(1) - r), 0).astype(x.dtype), kept]


@op("Constant")
class Constant(Op):
    """A tensor from attribute ``value``; importers turn it into a constant Value, this is for graphs built by hand."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        a = self.reference(node)[0]
        return [TensorType.of(from_numpy(a.dtype), a.shape)]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        for key, dtype in (("value", None), ("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32), ("value_floats", np.float32)):
            if key in node.attrs:
                return [np.asarray(node.attrs[key], dtype)]
        raise unsupported(node, "a Constant without a numeric value")

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a = self.reference(node)[0]
        axes = axes_of(outs[0].shape)
        flat = a.reshape(-1)
        if flat.size > 64:
            raise unsupported(node, "a Constant of more than 64 elements must become a constant Value")
        pos = const(0)
        for ax in axes:
            pos = pos * ax.extent + ax.var
        e = const(flat[-1].item() if flat.size else 0, outs[0].dtype)
        for i in range(flat.size - 2, -1, -1):
            e = select(pos.eq(i), const(flat[i].item(), outs[0].dtype), e)
        return make(node, ins, outs, [define(outs[0], axes, e)])
