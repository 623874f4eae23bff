"""A cache of keys or values that a caller keeps, in the layout of ONNX decoders ([batch, heads, positions, head]): rows appended in place,
and the tensor of the positions that are filled.

The number P of filled positions is the extent of a vector ``past`` [P] whose elements nothing reads: an extent of an input is known before
a call begins, so the extents of everything that attention computes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.expr import load
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer, If, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, axes_of, define, differ, make, must, need, shape_error, static, type_error
from luthier.ir.ops.kernels import flat, for_, get, kernel, put

LANES = 8


def _check(node: Node) -> tuple[int, int, int]:
    """(batch times heads, capacity, head size). Raises ShapeError, TypeMismatch."""
    cache, new, past = (need(node, i) for i in range(3))
    if cache.rank != 4 or new.rank != 4 or past.rank != 1:
        raise shape_error(node, "takes a cache [batch, heads, capacity, head], rows [batch, heads, S, head] and a vector")
    if cache.dtype is not new.dtype:
        raise type_error(node, "cache and rows must have one type")
    if any(differ(cache.shape[k], new.shape[k]) for k in (0, 1, 3)):
        raise shape_error(node, "cache and rows differ outside of the positions")
    b, h, t, d = (static(node, s, "extents of a cache") for s in cache.shape)
    return b * h, t, d


@op("luthier::AppendToCache")
class AppendToCache(Op):
    """(cache [B, H, capacity, D], rows [B, H, S, D], past [P]) -> cache, with the rows at the positions P .. P + S - 1, **in place**: the output
    is the first input. Rows behind the capacity are dropped."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        _check(node)
        return [need(node, 0).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        heads, cap, d = _check(node)
        rows, first = must(ins, 1).shape[2], must(ins, 2).shape[0]
        new, cache = flat(must(ins, 1)), flat(outs[0])
        wide = d - d % LANES

        def row(h: Any, s: Any) -> Any:
            src, dst = (h * rows + s) * d, (h * cap + first + s) * d
            vectors = for_("o", wide // LANES, lambda o: for_("i", LANES, lambda i: put(cache, dst + o * LANES + i, get(new, src + o * LANES + i)), kind="vectorize"))
            rest = for_("r", d - wide, lambda i: put(cache, dst + wide + i, get(new, src + wide + i)))
            return If(first + s < cap, vectors if wide == d else rest if not wide else block(vectors, rest))

        k = kernel(node, ins, outs, (), for_("h", heads, lambda h: for_("s", rows, lambda s: row(h, s)), kind="parallel"))
        k.in_place = {outs[0].name: 0}
        return k

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        cache, new, past = np.array(arrays[0]), np.asarray(arrays[1]), len(arrays[2])
        n = min(new.shape[2], cache.shape[2] - past)
        cache[:, :, past : past + n] = new[:, :, :n]
        return [cache]


@op("luthier::FilledCache")
class FilledCache(Op):
    """(cache [B, H, capacity, D], rows [B, H, S, D], past [P]) -> [B, H, P + S, D]: the first P + S positions. Of rows and ``past`` only
    the extents matter."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        _check(node)
        c = need(node, 0)
        return [TensorType(c.dtype, (c.shape[0], c.shape[1], need(node, 2).shape[0] + need(node, 1).shape[2], c.shape[3]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        return make(node, ins, outs, [define(outs[0], axes, load(must(ins, 0), [a.var for a in axes]))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.ascontiguousarray(arrays[0][:, :, : len(arrays[2]) + arrays[1].shape[2]])]
