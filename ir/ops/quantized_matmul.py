"""Matrix products of quantized operands: MatMulInteger, QLinearMatMul and the com.microsoft forms QGemm, MatMulIntegerToFloat,
DynamicQuantizeMatMul, MatMulNBits. Sums of integer products are exact in i32 (they wrap)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, axis, sum_
from luthier.ir.dtypes import f32, i32, u8
from luthier.ir.expr import Expr, cast, const, load
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    Shape,
    axes_of,
    bcast_index,
    broadcast,
    const_value,
    define,
    differ,
    expect_shape,
    get,
    is_one,
    make,
    must,
    need,
    padded,
    shape_error,
    temp,
    type_error,
)
from luthier.ir.ops.lowbit import bit_field, grouped_product, unpack_bits
from luthier.ir.ops.quantize import (
    centered,
    check_parameters,
    dynamic_parameters,
    dynamic_parameters_ref,
    saturate,
    saturate_ref,
    scale_and_zero,
)


def matmul_shape(node: Node, a: Shape, b: Shape) -> Shape:
    """Shape of numpy's matmul. Raises ShapeError."""
    if not a or not b:
        raise shape_error(node, "matrix product of a scalar")
    ka, kb = a[-1], b[-2] if len(b) > 1 else b[-1]
    if differ(ka, kb):
        raise shape_error(node, f"inner extents differ: {ka!r} and {kb!r}")
    batch = broadcast(node, a[:-2], b[:-2])
    return (*batch, *((a[-2],) if len(a) > 1 else ()), *((b[-1],) if len(b) > 1 else ()))


def check_sides(node: Node, a: int, left: Sequence[int], b: int, right: Sequence[int]) -> None:
    """Scales and zero points ``left`` of the operand at input ``a`` (one, one a row, [..., M, 1]), ``right`` of that at ``b``
    (one, one a column, [..., 1, N])."""
    x, y = need(node, a), need(node, b)
    check_parameters(node, left, x.shape[-2] if x.rank > 1 else None, x)
    check_parameters(node, right, y.shape[-1] if y.rank > 1 else None, y, -2)


class Product:
    """Index algebra of numpy's matmul: where operands stand for a point of the output and of the inner axis."""

    def __init__(self, a: Buffer, b: Buffer, out: Sequence[Expr]) -> None:
        self.axes = axes_of(out)
        self.k = axis("k", a.shape[-1])
        rows, cols = a.rank > 1, b.rank > 1
        n = len(self.axes) - rows - cols
        self.batch = self.axes[:n]
        self.m: Axis | None = self.axes[n] if rows else None
        self.n: Axis | None = self.axes[-1] if cols else None
        lead = bcast_index(a.shape[:-2], self.batch) if rows else ()
        self.ia = [*lead, *([self.m.var] if self.m else []), self.k.var]
        lead = bcast_index(b.shape[:-2], self.batch) if cols else ()
        self.ib = [*lead, self.k.var, *([self.n.var] if self.n else [])]


def row_zero(node: Node, ins: Sequence[Buffer | None], i: int, p: Product, lead: Sequence[Expr]) -> Expr | None:
    """Zero point of the left operand: a scalar, one a row ([M]), or [..., M, 1]."""
    return _zero(node, ins, i, p.m, [*lead, p.m.var if p.m else ZERO, ZERO])


def col_zero(node: Node, ins: Sequence[Buffer | None], i: int, p: Product, lead: Sequence[Expr]) -> Expr | None:
    """Zero point of the right operand: a scalar, one a column ([N]), or [..., 1, N]."""
    return _zero(node, ins, i, p.n, [*lead, ZERO, p.n.var if p.n else ZERO])


def _zero(node: Node, ins: Sequence[Buffer | None], i: int, line: Axis | None, full: Sequence[Expr]) -> Expr | None:
    b = get(ins, i)
    if b is None:
        return None
    v = const_value(node.input(i))
    if v is not None:
        return None if v == 0 else const(v, b.dtype)
    return load(b, parameter_index(b, line, full))


def parameter_index(b: Buffer, line: Axis | None, full: Sequence[Expr]) -> list[Expr]:
    """Index of a scale or zero point: scalars, vectors along ``line``, or tensors that broadcast against the operand."""
    if all(is_one(d) for d in b.shape):
        return [ZERO] * b.rank
    if b.rank == 1:
        return [line.var if line else ZERO]
    return [ZERO if s.op == "const" and s.attr == 1 else i for s, i in zip(b.shape, list(full)[-b.rank :], strict=True)]


def integer_sum(node: Node, a: Buffer, b: Buffer, p: Product, za: Expr | None, zb: Expr | None) -> Expr:
    """``sum_k (a - za) * (b - zb)`` in i32."""
    return sum_(p.k, centered(load(a, p.ia), za) * centered(load(b, p.ib), zb))


def spread(p: Array | None, axis_: int, rank: int) -> Array | None:
    """numpy: a vector parameter along ``axis_`` of an operand of ``rank``; scalars and full tensors stay."""
    if p is None:
        return None
    p = np.asarray(p)
    if p.size == 1:
        return p.reshape(())
    if p.ndim == 1 and rank > 1:
        return p.reshape([-1 if d == axis_ % rank else 1 for d in range(rank)])
    return p


def integer_matmul(a: Array, b: Array, za: Array | None, zb: Array | None) -> Array:
    """numpy: the i32 product of quantized operands."""
    x = np.asarray(a).astype(np.int32)
    y = np.asarray(b).astype(np.int32)
    if za is not None:
        x = x - spread(za, -2, x.ndim).astype(np.int32)  # type: ignore[union-attr]
    if zb is not None:
        y = y - spread(zb, -1, y.ndim).astype(np.int32)  # type: ignore[union-attr]
    return np.asarray(np.matmul(x, y), np.int32)


def _arg(arrays: Sequence[Any], i: int) -> Any:
    return arrays[i] if i < len(arrays) else None


@op("MatMulInteger")
class MatMulInteger(Op):
    """(a, b, a_zero, b_zero) of i8 or u8 to i32."""

    kind = "contraction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        shape = matmul_shape(node, need(node, 0).shape, need(node, 1).shape)
        check_sides(node, 0, (2,), 1, (3,))
        return [TensorType(i32, shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b = must(ins, 0), must(ins, 1)
        p = Product(a, b, outs[0].shape)
        za = row_zero(node, ins, 2, p, p.ia[:-2])
        zb = col_zero(node, ins, 3, p, p.ib[:-2])
        return make(node, ins, outs, [define(outs[0], p.axes, integer_sum(node, a, b, p, za, zb))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [integer_matmul(arrays[0], arrays[1], _arg(arrays, 2), _arg(arrays, 3))]


@op("QLinearMatMul")
class QLinearMatMul(Op):
    """(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero): ``saturate(round(acc * (a_scale * b_scale / y_scale)) + y_zero)``."""

    kind = "contraction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        shape = matmul_shape(node, need(node, 0).shape, need(node, 3).shape)
        check_sides(node, 0, (1, 2), 3, (4, 5))
        check_parameters(node, (6, 7))
        return [TensorType(need(node, 7).dtype, shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b, y = must(ins, 0), must(ins, 3), outs[0]
        p = Product(a, b, y.shape)
        za = row_zero(node, ins, 2, p, p.ia[:-2])
        zb = col_zero(node, ins, 5, p, p.ib[:-2])
        acc = temp(y, "acc", p.axes, integer_sum(node, a, b, p, za, zb))
        sa = load(must(ins, 1), parameter_index(must(ins, 1), p.m, [*p.ia[:-2], p.m.var if p.m else ZERO, ZERO]))
        sb = load(must(ins, 4), parameter_index(must(ins, 4), p.n, [*p.ib[:-2], ZERO, p.n.var if p.n else ZERO]))
        sy, zy = scale_and_zero(node, ins, 6, 7)
        scale = cast(sa, f32) * cast(sb, f32) / cast(sy, f32)
        v = cast(load(acc.buf, [x.var for x in p.axes]), f32) * scale
        return make(node, ins, outs, [acc, define(y, p.axes, saturate(v, zy, y.dtype))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, sa, za, b, sb, zb, sy, zy = arrays
        acc = integer_matmul(a, b, za, zb)
        ra = spread(sa, -2, np.ndim(a)).astype(np.float32)  # type: ignore[union-attr]
        rb = spread(sb, -1, np.ndim(b)).astype(np.float32)  # type: ignore[union-attr]
        scale = ra * rb / np.asarray(sy).reshape(()).astype(np.float32)
        return [saturate_ref(acc.astype(np.float32) * scale, np.asarray(zy).reshape(()), need(node, 7).dtype)]


@op("com.microsoft::QGemm")
class QGemm(Op):
    """(A, a_scale, a_zero, B, b_scale, b_zero, C i32, y_scale, y_zero): ``alpha * (A' B' + C) * a_scale * b_scale``, quantized when
    y_scale is given, else f32. Attributes ``transA transB alpha``; b_scale and b_zero may be vectors along N."""

    kind = "contraction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        a, b = need(node, 0), need(node, 3)
        if a.rank != 2 or b.rank != 2:
            raise shape_error(node, "QGemm takes matrices")
        ta, tb = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
        if differ(a.shape[0 if ta else 1], b.shape[1 if tb else 0]):
            raise shape_error(node, "inner extents differ")
        check_parameters(node, (1, 2, 7, 8))
        check_parameters(node, (4, 5), b.shape[0 if tb else 1])
        z = node.input(8)
        return [TensorType(f32 if z is None else z.dtype, (a.shape[1 if ta else 0], b.shape[0 if tb else 1]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b, y = must(ins, 0), must(ins, 3), outs[0]
        m, n = axes_of(y.shape)
        ta, tb = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
        k = axis("k", a.shape[0 if ta else 1])
        sa, za = scale_and_zero(node, ins, 1, 2)
        sb, zb = scale_and_zero(node, ins, 4, 5, [n.var])
        x = load(a, [k.var, m.var] if ta else [m.var, k.var])
        w = load(b, [n.var, k.var] if tb else [k.var, n.var])
        acc = temp(y, "acc", (m, n), sum_(k, centered(x, za) * centered(w, zb)))
        v = load(acc.buf, [m.var, n.var])
        c = get(ins, 6)
        if c is not None:
            v = v + load(c, bcast_index(c.shape, (m, n)))
        r = cast(v, f32) * (sa * sb * float(node.attrs.get("alpha", 1.0)))
        if get(ins, 7) is None:
            return make(node, ins, outs, [acc, define(y, (m, n), r)])
        sy, zy = scale_and_zero(node, ins, 7, 8)
        return make(node, ins, outs, [acc, define(y, (m, n), saturate(r / sy, zy, y.dtype))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, sa, za, b, sb, zb, c, sy, zy = padded(arrays, 9)
        x = np.asarray(a).astype(np.int32) - np.asarray(za).astype(np.int32)
        zb = np.asarray(zb).astype(np.int32)
        w = np.asarray(b).astype(np.int32)
        w = (w.T if node.attrs.get("transB", 0) else w) - zb.reshape(1, -1)
        acc = (x.T if node.attrs.get("transA", 0) else x) @ w
        if c is not None:
            acc = acc + np.asarray(c)
        s = np.asarray(sa, np.float32).reshape(()) * np.asarray(sb, np.float32).reshape(-1) * np.float32(node.attrs.get("alpha", 1.0))
        r = acc.astype(np.float32) * s
        if sy is None:
            return [r.astype(np.float32)]
        return [saturate_ref(r / np.asarray(sy, np.float32).reshape(()), np.asarray(zy).reshape(()), need(node, 8).dtype)]


@op("com.microsoft::MatMulIntegerToFloat")
class MatMulIntegerToFloat(Op):
    """(A, B, a_scale, b_scale, a_zero, b_zero, bias): the integer product scaled to f32."""

    kind = "contraction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        shape = matmul_shape(node, need(node, 0).shape, need(node, 1).shape)
        check_parameters(node, (2,))
        check_sides(node, 0, (4,), 1, (3, 5))
        return [TensorType(need(node, 2).dtype, shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b, y = must(ins, 0), must(ins, 1), outs[0]
        p = Product(a, b, y.shape)
        za, zb = row_zero(node, ins, 4, p, p.ia[:-2]), col_zero(node, ins, 5, p, p.ib[:-2])
        acc = temp(y, "acc", p.axes, integer_sum(node, a, b, p, za, zb))
        sa = load(must(ins, 2), parameter_index(must(ins, 2), p.m, [ZERO]))
        sb = load(must(ins, 3), parameter_index(must(ins, 3), p.n, [*p.ib[:-2], ZERO, p.n.var if p.n else ZERO]))
        r = cast(load(acc.buf, [x.var for x in p.axes]), f32) * (cast(sa, f32) * cast(sb, f32))
        bias = get(ins, 6)
        if bias is not None:
            r = r + cast(load(bias, bcast_index(bias.shape, p.axes)), f32)
        return make(node, ins, outs, [acc, define(y, p.axes, r)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, b, sa, sb, za, zb, bias = padded(arrays, 7)
        acc = integer_matmul(a, b, za, zb).astype(np.float32)
        r = acc * (np.asarray(sa).reshape(()) * np.asarray(spread(sb, -1, np.ndim(b))))
        return [(r if bias is None else r + np.asarray(bias)).astype(need(node, 2).dtype.numpy)]


@op("com.microsoft::DynamicQuantizeMatMul")
class DynamicQuantizeMatMul(Op):
    """(A f32, B, b_scale, b_zero, bias): A is quantized to u8 over its whole range, multiplied, scaled back."""

    kind = "contraction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        shape = matmul_shape(node, need(node, 0).shape, need(node, 1).shape)
        check_sides(node, 0, (), 1, (2, 3))
        return [TensorType(need(node, 0).dtype, shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b, y = must(ins, 0), must(ins, 1), outs[0]
        params, s, z = dynamic_parameters(y.name, a)
        i = axes_of(a.shape, "q")
        at = [x.var for x in i]
        q = temp(y, "q", i, saturate(load(a, at) / s, z, u8))
        p = Product(a, b, y.shape)
        zb = col_zero(node, ins, 3, p, p.ib[:-2])
        acc = temp(y, "acc", p.axes, integer_sum(node, q.buf, b, p, z, zb))
        sb = load(must(ins, 2), parameter_index(must(ins, 2), p.n, [*p.ib[:-2], ZERO, p.n.var if p.n else ZERO]))
        v = cast(load(acc.buf, [x.var for x in p.axes]), f32) * (s * sb)
        bias = get(ins, 4)
        if bias is not None:
            v = v + load(bias, bcast_index(bias.shape, p.axes))
        return make(node, ins, outs, [*params, q, acc, define(y, p.axes, v)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, b, sb, zb, bias = padded(arrays, 5)
        x = np.asarray(a, np.float32)
        s, z = dynamic_parameters_ref(x)
        q = saturate_ref(x / s, np.asarray(z), u8)
        r = integer_matmul(q, b, np.asarray(z), zb).astype(np.float32) * (s * np.asarray(spread(sb, -1, np.ndim(b))))
        return [(r if bias is None else r + np.asarray(bias)).astype(np.float32)]


@op("com.microsoft::MatMulNBits")
class MatMulNBits(Op):
    """(A, B u8 [N, blocks, block * bits / 8], scales [N, blocks], zero_points, g_idx, bias): ``A @ dequantized(B).T``.

    Values of 1, 2, 3, 4 or 8 ``bits`` stand low bits first, a stream of bits in every block; without zero points the middle of
    the range is zero. Accumulates in f32. ``accuracy_level`` 4 lets the activations be rounded to 8 bits, one scale a block (at
    least 32 of them); every other level keeps them exact."""

    kind = "contraction"

    def geometry(self, node: Node) -> tuple[int, int, int, int, int]:
        """(K, N, bits, block size, blocks of a row)."""
        k, n, block = (int(node.attrs[x]) for x in ("K", "N", "block_size"))
        bits = int(node.attrs.get("bits", 4))
        if bits not in (1, 2, 3, 4, 8):
            raise type_error(node, f"MatMulNBits of {bits} bits is not supported, only of 1, 2, 3, 4 and 8")
        if block < 8 or block & (block - 1):
            raise type_error(node, f"MatMulNBits needs a block size that is a power of two and at least 8, not {block}")
        if node.input(4) is not None:
            raise type_error(node, "MatMulNBits with g_idx is not supported; export without act_order")
        return k, n, bits, block, -(-k // block)

    def infer(self, node: Node) -> Sequence[TensorType]:
        a = need(node, 0)
        k, n, bits, block, blocks = self.geometry(node)
        if not a.shape or a.shape[-1].op == "const" and a.shape[-1].attr != k:
            raise shape_error(node, f"the last extent of A must be K = {k}")
        expect_shape(node, 1, (n, blocks, block * bits // 8))
        zero = node.input(3)
        row = blocks if zero is None or zero.dtype.is_float else -(-blocks * bits // 8)
        for i, columns in ((2, blocks), (3, row)):
            v = node.input(i)
            expect_shape(node, i, (n * columns,) if v is not None and v.rank == 1 else (n, columns))
        expect_shape(node, 5, (n,))
        return [TensorType(a.dtype, (*a.shape[:-1], const(n)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b, s, y = must(ins, 0), must(ins, 1), must(ins, 2), outs[0]
        k_, _, bits, block, blocks = self.geometry(node)
        axes = axes_of(y.shape)
        n, k = axes[-1].var, axis("k", k_)
        group = k.var // block
        if b.rank != 3:
            raise shape_error(node, "B must have rank 3")
        q = bit_field(lambda i: cast(load(b, [n, group, i]), i32), k.var % block, bits)
        sc = load(s, [n * blocks + group] if s.rank == 1 else [n, group])
        zb = get(ins, 3)
        if zb is None:
            w = cast(q - const(1 << (bits - 1), i32), f32)
        elif zb.dtype.is_float:
            w = cast(q, f32) - cast(load(zb, [n * blocks + group] if zb.rank == 1 else [n, group]), f32)
        else:
            row = -(-blocks * bits // 8)
            z = bit_field(lambda i: cast(load(zb, [n * row + i] if zb.rank == 1 else [n, i]), i32), group, bits)
            w = cast(q - z, f32)
        wide = max(block, 32)
        act = wide if int(node.attrs.get("accuracy_level", 0)) == 4 and k_ % wide == 0 else 0
        lets = grouped_product(y, axes, k, lambda rows, i: cast(load(a, [*rows, i]), f32), w * cast(sc, f32), act)
        r = load(lets[-1].buf, [v.var for v in axes])  # type: ignore[union-attr]
        bias = get(ins, 5)
        if bias is not None:
            r = r + cast(load(bias, [n]), f32)
        return make(node, ins, outs, [*lets, define(y, axes, r)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, b, s, z, _, bias = padded(arrays, 6)
        k, n, bits, block, blocks = self.geometry(node)
        q = unpack_bits(np.asarray(b), bits)[..., :block].astype(np.float32)
        if z is None:
            zero: Any = np.float32(1 << (bits - 1))
        elif np.asarray(z).dtype == np.uint8:
            zero = unpack_bits(np.asarray(z).reshape(n, -1), bits)[:, :blocks, None].astype(np.float32)
        else:
            zero = np.asarray(z).reshape(n, blocks, 1).astype(np.float32)
        w = ((q - zero) * np.asarray(s).reshape(n, blocks, 1).astype(np.float32)).reshape(n, -1)[:, :k]
        r = np.asarray(a).astype(np.float32) @ w.T
        return [(r if bias is None else r + np.asarray(bias)).astype(np.asarray(a).dtype)]


__all__ = ["matmul_shape", "Product", "integer_sum", "integer_matmul"]
