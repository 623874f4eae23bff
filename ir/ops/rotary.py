"""Rotary position embedding: the ONNX and the com.microsoft operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.expr import Expr, cast, const, load, maximum, minimum, select
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Indexed, Op, op
from luthier.ir.ops.common import (
    Array,
    axes_of,
    define,
    differ,
    get,
    like,
    make,
    must,
    need,
    shape_error,
    static,
    to_index,
    widen,
)


class Rotary(Op):
    """x1 cos - x2 sin, x1 sin + x2 cos on pairs of the head dimension: its halves, or neighbours when ``interleaved``.

    X is [B, H, L, D] or [B, L, H D]; caches are [positions, r / 2] with ``position_ids`` [B, L] or [1], else [B, L, r / 2]."""

    kind = "injective"
    order = (0, 1, 2, 3)  # which inputs are X, cos, sin, positions

    def geometry(self, node: Node) -> tuple[Expr, int]:
        """(head size, rotated part of it)."""
        x = need(node, 0)
        if x.rank == 4:
            size = x.shape[3]
        elif x.rank == 3:
            heads = int(node.attrs.get("num_heads", 0))
            if heads:
                size = x.shape[2] // heads
            else:
                size = need(node, self.order[1]).shape[-1] * 2
        else:
            raise shape_error(node, f"RotaryEmbedding takes rank 3 or 4, the input has {x.rank}")
        r = int(node.attrs.get("rotary_embedding_dim", 0)) or static(node, size, "the head size")
        return size, r

    def infer(self, node: Node) -> Sequence[TensorType]:
        size, r = self.geometry(node)
        cos, sin = need(node, self.order[1]), need(node, self.order[2])
        if differ(cos.shape[-1], const(r // 2)) or differ(sin.shape[-1], const(r // 2)):
            raise shape_error(node, f"the caches must have {r // 2} columns")
        if cos.rank != (2 if node.input(self.order[3]) is not None else 3) and node.input(self.order[3]) is None:
            raise shape_error(node, "without position_ids the caches must be [batch, length, size]")
        return [like(need(node, 0).type, need(node, 0).shape)]

    def indexed(self, node: Node) -> Sequence[Indexed]:
        pos = node.input(self.order[3])
        if pos is None:
            return []
        x, rows = need(node, 0), need(node, self.order[1]).shape[0]
        last = rows - (1 if pos.rank == 2 else x.shape[2 if x.rank == 4 else 1])  # one offset: the positions that follow it are read too
        return [Indexed(self.order[3], (const(0),), (last,))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, cos, sin = (must(ins, self.order[i]) for i in range(3))
        pos = get(ins, self.order[3])
        size, r = self.geometry(node)
        half = r // 2
        axes = axes_of(outs[0].shape)
        if x.rank == 4:
            b, length, d = axes[0].var, axes[2].var, axes[3].var

            def read(k: Expr) -> Expr:
                return load(x, (axes[0].var, axes[1].var, axes[2].var, k))
        else:
            b, length, d = axes[0].var, axes[1].var, axes[2].var % size
            base = axes[2].var - d

            def read(k: Expr) -> Expr:
                return load(x, (axes[0].var, axes[1].var, base + k))

        inter = bool(int(node.attrs.get("interleaved", 0)))
        first = (d % 2).eq(0) if inter else d < half
        pair = select(first, d + 1, d - 1) if inter else select(first, d + half, d - half)
        col = d // 2 if inter else select(first, d, d - half)
        rotated = d < r
        pair, col = select(rotated, pair, d), minimum(select(rotated, col, const(0)), const(half - 1))
        if pos is not None:
            p = load(pos, (b, length)) if pos.rank == 2 else load(pos, (const(0),)) if pos.rank else load(pos, ())
            row: Expr = to_index(p)
            if pos.rank < 2:
                row = row + length
            row = maximum(minimum(row, cos.shape[0] - 1), 0)
            c, s = load(cos, (row, col)), load(sin, (row, col))
        else:
            c, s = load(cos, (b, length, col)), load(sin, (b, length, col))
        here, other = widen(read(d)), widen(read(pair))
        c, s = cast(c, here.dtype), cast(s, here.dtype)
        e = here * c + other * select(first, -s, s)
        return make(node, ins, outs, [define(outs[0], axes, select(rotated, e, here))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, cos, sin = (np.asarray(arrays[self.order[i]]) for i in range(3))
        k = self.order[3]
        pos = np.asarray(arrays[k]).astype(np.int64) if k < len(arrays) and arrays[k] is not None else None
        shape, up = x.shape, x.astype(np.float64)
        if up.ndim == 3:
            heads = int(node.attrs.get("num_heads", 0)) or shape[2] // (cos.shape[-1] * 2)
            up = up.reshape(*shape[:2], heads, -1)
        else:
            up = up.transpose(0, 2, 1, 3)
        r = int(node.attrs.get("rotary_embedding_dim", 0)) or up.shape[-1]
        if pos is not None:
            if pos.ndim < 2:
                pos = np.broadcast_to(pos.reshape(-1)[0] + np.arange(up.shape[1]), up.shape[:2])
            cos, sin = cos[pos], sin[pos]
        c, s = (np.expand_dims(a.astype(np.float64), 2) for a in (cos, sin))
        y = up.copy()
        if int(node.attrs.get("interleaved", 0)):
            a, b = up[..., 0:r:2], up[..., 1:r:2]
            y[..., 0:r:2], y[..., 1:r:2] = a * c - b * s, a * s + b * c
        else:
            a, b = up[..., : r // 2], up[..., r // 2 : r]
            y[..., : r // 2], y[..., r // 2 : r] = a * c - b * s, a * s + b * c
        return [(y.reshape(shape) if x.ndim == 3 else y.transpose(0, 2, 1, 3)).astype(x.dtype)]


@op("RotaryEmbedding")
class RotaryEmbedding(Rotary):
    """(X, cos_cache, sin_cache, position_ids?)."""


@op("com.microsoft::RotaryEmbedding")
class MicrosoftRotaryEmbedding(Rotary):
    """(input, position_ids, cos_cache, sin_cache); one position id means consecutive positions from it on."""

    order = (0, 2, 3, 1)




@op("luthier::RotateHalf")
class RotateHalf(Op):
    """``y = concat(-x[..., h:], x[..., :h])`` with h half of the last dimension (static, even): what ``recognise_rotary`` makes of the
    spelled-out form, so that a rotary embedding is one expression over x, cos and sin."""

    kind = "injective"

    def half(self, node: Node) -> int:
        n = static(node, need(node, 0).shape[-1], "the last dimension")
        if n % 2:
            raise shape_error(node, f"the last dimension, {n}, must be even")
        return n // 2

    def infer(self, node: Node) -> Sequence[TensorType]:
        self.half(node)
        return [need(node, 0).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        h, x = self.half(node), must(ins, 0)
        axes = axes_of(outs[0].shape)
        *lead, d = [a.var for a in axes]
        low = d < h
        e = select(low, -load(x, [*lead, d + h], low), load(x, [*lead, d - h], ~low))
        return make(node, ins, outs, [define(outs[0], axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = arrays[0]
        h = x.shape[-1] // 2
        return [np.concatenate([-x[..., h:], x[..., :h]], axis=-1)]
