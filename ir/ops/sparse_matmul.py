"""``luthier::SparseMatMul``: a product with group-sparse quantized weights in block sparse rows (after arXiv 2412.17560).

A block is ``1 x block`` weights of one output row, kept or dropped as a whole. Kept blocks are stored row by row, columns ascending::

    y[.., n] = bias[n] + sum(row_ptr[n] <= b < row_ptr[n + 1]) sum(j < block) x[.., cols[b] * block + j] * (q[b, j] - z[b]) * s[b]

``q``: unsigned values of 4 or 8 bits, little-endian in bytes; ``s``: one scale a block; ``z``: one zero point a block, or one number for
all (attribute ``zero``). The last block of a row may reach beyond ``K``: what stands there is multiplied by nothing. With
``act_levels`` = L > 0 a row of the activations is rounded first, ``round(x * L / amax) * amax / L``; the NMSE of that is below 1e-6 with
L = 2047 and 1e-7 with L = 8191 for normally distributed activations. 0 keeps them exact. Sums are in f32 or exact integers. With
``dense_act`` = g > 0 the compiler may instead round them to 8 bits in groups of g columns, when a dense product is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, LetStmt, axis, max_, reduce_
from luthier.ir.dtypes import f32, i16, i32
from luthier.ir.expr import Expr, cast, const, load, minimum, select, unary
from luthier.ir.graph import Node, TensorType, Value
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import Array, axes_of, define, get, make, must, need, padded, shape_error, temp, to_index, type_error
from luthier.ir.ops.lowbit import bit_field, pack_bits, unpack_bits

BLOCKS = (8, 16, 32)
MAX_LEVELS = 8191
LEVELS = 2047  # what kernels are fastest with


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """Weights [rows, columns] in block sparse rows. ``row_ptr`` i32 [rows + 1]; ``cols`` i32 [kept], numbers of column blocks;
    ``values`` u8 [kept, block]; ``scales`` f16 or f32 [kept]; ``zeros`` u8 [kept] or None, then ``zero`` for all."""

    rows: int
    columns: int
    block: int
    bits: int
    row_ptr: Array
    cols: Array
    values: Array
    scales: Array
    zeros: Array | None = None
    zero: int = 0

    @property
    def density(self) -> float:
        """Kept blocks over all blocks."""
        return len(self.cols) / max(1, self.rows * -(-self.columns // self.block))

    @property
    def packed_values(self) -> Array:
        """u8 [kept, block * bits / 8]."""
        return pack_bits(self.values, self.bits)

    def dense(self) -> Array:
        """The weights [rows, columns] in f32."""
        zero = np.float32(self.zero) if self.zeros is None else self.zeros.astype(np.float32)[:, None]
        w = (self.values.astype(np.float32) - zero) * self.scales.astype(np.float32)[:, None]
        return _scatter(w, self.row_ptr, self.cols, self.columns, self.block)

    def arrays(self) -> list[Array | None]:
        """Inputs 1 to 5 of the operator."""
        return [self.row_ptr, self.cols, self.packed_values, self.scales, self.zeros]

    def attrs(self, act_levels: int = LEVELS, dense_act: int = 0) -> dict[str, int]:
        """Attributes of the operator."""
        return {"K": self.columns, "block": self.block, "bits": self.bits, "zero": self.zero, "act_levels": act_levels, "dense_act": dense_act}


def quantize_blocks(w: Array, keep: Array, block: int, bits: int, scale_dtype: Any = np.float16) -> BlockSparse:
    """Kept blocks of ``w`` [rows, columns] f32 rounded to nearest, symmetric (the largest magnitude of a block at the end of the range).

    ``keep``: bool [rows, ceil(columns / block)]. Raises ValueError when shapes disagree."""
    rows, columns = w.shape
    count = -(-columns // block)
    if keep.shape != (rows, count) or block not in BLOCKS or bits not in (4, 8):
        raise ValueError(f"keep must be [{rows}, {count}], block one of {BLOCKS}, bits 4 or 8")
    v = np.zeros((rows, count * block), np.float32)
    v[:, :columns] = w
    kept = v.reshape(rows, count, block)[keep]
    half = 1 << (bits - 1)
    at = np.abs(kept).argmax(1)
    top = kept[np.arange(len(kept)), at]
    s = (top / -half).astype(scale_dtype)  # the largest magnitude becomes -2**(bits - 1)
    wide = s.astype(np.float32)[:, None]
    q = np.clip(np.rint(np.divide(kept, wide, out=np.zeros_like(kept), where=wide != 0)), -half, half - 1)
    ptr = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)
    return BlockSparse(rows, columns, block, bits, ptr, np.nonzero(keep)[1].astype(np.int32), (q + half).astype(np.uint8), s, None, half)


def _scatter(w: Array, ptr: Array, cols: Array, columns: int, block: int) -> Array:
    rows, count = len(ptr) - 1, -(-columns // block)
    out = np.zeros((rows, count, block), w.dtype)
    out[np.repeat(np.arange(rows), np.diff(ptr)), cols] = w
    return np.ascontiguousarray(out.reshape(rows, -1)[:, :columns])


@op("luthier::SparseMatMul")
class SparseMatMul(Op):
    """(x [.., K], row_ptr i32 [N + 1], cols i32 [B], values u8 [B, block * bits / 8], scales [B], zeros u8 [B]?, bias [N]?) -> [.., N].

    The mathematics stands at the top of this file. Inputs 1 to 4 are constants; they are checked when the graph is built."""

    kind = "contraction"

    def geometry(self, node: Node) -> tuple[int, int, int, int]:
        """(columns, block, bits, levels). Raises TypeMismatch."""
        k, block, bits = (int(node.attrs[n]) for n in ("K", "block", "bits"))
        levels = int(node.attrs.get("act_levels", 0))
        if block not in BLOCKS or bits not in (4, 8):
            raise type_error(node, f"blocks of {block} values of {bits} bits are not supported, only of 8, 16, 32 values of 4 or 8 bits")
        if k < 1 or not 0 <= levels <= MAX_LEVELS:
            raise type_error(node, f"K = {k} must be positive and act_levels = {levels} in 0..{MAX_LEVELS}")
        return k, block, bits, levels

    def infer(self, node: Node) -> Sequence[TensorType]:
        a = need(node, 0)
        k, block, bits, _ = self.geometry(node)
        if a.rank < 1 or a.shape[-1].op == "const" and a.shape[-1].attr != k:
            raise shape_error(node, f"the last extent of x must be K = {k}")
        ptr, cols, values, scales = (_constant(node, i) for i in (1, 2, 3, 4))
        check_blocks(node, ptr, cols, values, scales, k, block, bits)
        for i, n in ((5, len(cols)), (6, len(ptr) - 1)):
            v = node.inputs[i] if len(node.inputs) > i else None
            if v is not None and (v.rank != 1 or v.shape[0].op != "const" or v.shape[0].attr != n):
                raise shape_error(node, f"input {i} must have {n} elements")
        return [TensorType(a.dtype, (*a.shape[:-1], const(len(ptr) - 1)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, ptr, cols, values, scales, y = must(ins, 0), must(ins, 1), must(ins, 2), must(ins, 3), must(ins, 4), outs[0]
        k, block, bits, levels = self.geometry(node)
        axes = axes_of(y.shape)
        rows, n = [v.var for v in axes[:-1]], axes[-1].var
        bias = get(ins, 6)
        end = const(0.0, f32) if bias is None else cast(load(bias, [n]), f32)
        kept = int(cols.shape[0].attr)
        if not kept:
            return make(node, ins, outs, [define(y, axes, end)])
        lets, x, factor = _activations(a, y, axes, k, -(-k // block) * block, levels)
        longest = int(np.diff(_constant(node, 1)).max())
        i, j = axis("i", longest), axis("j", block)
        first = to_index(load(ptr, [n]))
        b = minimum(first + i.var, const(kept - 1))
        q = bit_field(lambda p: cast(load(values, [b, p]), i32), j.var, bits)
        z = get(ins, 5)
        q = q - (const(int(node.attrs.get("zero", 0)), i32) if z is None else cast(load(z, [b]), i32))
        w = cast(q, f32) * cast(load(scales, [b]), f32)
        value = x(rows, to_index(load(cols, [b])) * block + j.var) * w
        acc = temp(y, "acc", axes, reduce_("sum", (i, j), value, where=i.var < to_index(load(ptr, [n + 1])) - first))
        r = load(acc.buf, [v.var for v in axes])
        if factor is not None:
            r = r * factor(rows)
        return make(node, ins, outs, [*lets, acc, define(y, axes, r if bias is None else r + end)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, ptr, cols, values, scales, zeros, bias = padded(arrays, 7)
        k, block, bits, levels = self.geometry(node)
        zero = float(node.attrs.get("zero", 0)) if zeros is None else np.asarray(zeros).astype(np.float64)[:, None]
        q = unpack_bits(np.asarray(values), bits).astype(np.float64)
        w = _scatter((q - zero) * np.asarray(scales).astype(np.float64)[:, None], np.asarray(ptr), np.asarray(cols), k, block)
        x = np.asarray(a).astype(np.float64)
        if levels:
            top = np.abs(x).max(-1, keepdims=True)
            inv = np.divide(np.float32(levels), top.astype(np.float32), out=np.zeros(top.shape, np.float32), where=top > 0)
            x = np.rint(x.astype(np.float32) * inv).astype(np.float64) * (top / levels)
        r = x @ w.T
        return [(r if bias is None else r + np.asarray(bias)).astype(np.asarray(a).dtype)]


def _activations(a: Buffer, y: Buffer, axes: Sequence[Axis], k: int, width: int, levels: int) -> tuple[list[LetStmt], Any, Any]:
    """(lets, x(rows, column) in f32, factor(rows) of a result or None); columns from ``k`` to ``width`` read as 0."""

    def source(rows: Sequence[Expr], col: Expr) -> Expr:
        return cast(load(a, [*rows, col], None if width == k else col < k, None if width == k else 0), f32)

    if not levels:
        return [], source, None
    own = [axis(f"r{d}", v.extent) for d, v in enumerate(axes[:-1])]
    c = axis("c", k)
    amax = temp(y, "amax", own, max_(c, unary("abs", cast(load(a, [*(v.var for v in own), c.var]), f32))))
    own2, c2 = [axis(f"s{d}", v.extent) for d, v in enumerate(axes[:-1])], axis("c2", width)
    rv = [v.var for v in own2]
    top = load(amax.buf, rv)
    inv = select(const(0.0, f32) < top, const(float(levels), f32) / top, const(0.0, f32))
    xq = temp(y, "xq", [*own2, c2], cast(unary("round", source(rv, c2.var) * inv), i16))
    return [amax, xq], lambda rows, col: cast(load(xq.buf, [*rows, col]), f32), lambda rows: load(amax.buf, list(rows)) * const(1 / levels, f32)


def _constant(node: Node, i: int) -> Array:
    v: Value = need(node, i)
    if v.data is None:
        raise type_error(node, f"input {i} (the structure of the weights) must be a constant")
    return v.data


def check_blocks(node: Node, ptr: Array, cols: Array, values: Array, scales: Array, k: int, block: int, bits: int) -> None:
    """Raises ShapeError or TypeMismatch naming the first thing that is wrong with stored blocks."""
    count, kept = -(-k // block), len(cols)
    if ptr.ndim != 1 or cols.ndim != 1 or ptr.dtype.kind not in "iu" or cols.dtype.kind not in "iu" or len(ptr) < 2:
        raise type_error(node, "row_ptr and cols must be lists of integers, row_ptr one longer than there are rows")
    if values.dtype != np.uint8 or values.shape != (kept, block * bits // 8) or scales.shape != (kept,):
        raise shape_error(node, f"{kept} blocks need values u8 [{kept}, {block * bits // 8}] and scales [{kept}]")
    if ptr[0] != 0 or ptr[-1] != kept or (np.diff(ptr.astype(np.int64)) < 0).any():
        raise shape_error(node, f"row_ptr must rise from 0 to the number of blocks, {kept}; it runs from {ptr[0]} to {ptr[-1]}" + ("" if ptr[-1] != kept or ptr[0] else " and falls in between"))
    if kept and (int(cols.min()) < 0 or int(cols.max()) >= count):
        raise shape_error(node, f"cols must lie in 0..{count - 1}; found {int(cols.min()) if int(cols.min()) < 0 else int(cols.max())}")
    same_row = np.ones(max(0, kept - 1), bool)
    starts = ptr[1:-1].astype(np.int64)
    same_row[starts[(starts > 0) & (starts < kept)] - 1] = False
    bad = np.nonzero(same_row & (np.diff(cols.astype(np.int64)) <= 0))[0]
    if len(bad):
        row = int(np.searchsorted(ptr, bad[0], side="right")) - 1
        raise shape_error(node, f"cols of row {row} must rise: {int(cols[bad[0]])} is followed by {int(cols[bad[0] + 1])}", hint="sort the blocks of every row by column and keep each once")
    if not np.isfinite(scales.astype(np.float32)).all():
        at = int(np.nonzero(~np.isfinite(scales.astype(np.float32)))[0][0])
        raise type_error(node, f"the scale of block {at} is not finite")


__all__ = ["BLOCKS", "LEVELS", "MAX_LEVELS", "BlockSparse", "SparseMatMul", "check_blocks", "quantize_blocks"]
