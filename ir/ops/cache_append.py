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
from luthier.ir.dtypes import i64, index
from luthier.ir.expr import cast, land, load
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer, If, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, axes_of, define, differ, make, must, need, product, shape_error, static, type_error
from luthier.ir.ops.kernels import Reg, flat, for_, get, kernel, put, with_regs

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


@op("luthier::IndexCopy")
class IndexCopy(Op):
    """(x, positions i64 [M], rows) -> x with ``rows`` at the positions of dimension ``axis``; positions outside of it are dropped. ``in_place``:
    the output is the first input, and only the rows are written."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, where, rows = (need(node, i) for i in range(3))
        a = int(node.attrs["axis"])
        if where.rank != 1 or where.dtype is not i64 or rows.rank != x.rank or not 0 <= a < x.rank or rows.dtype is not x.dtype:
            raise type_error(node, "takes x, i64 positions [M] and rows of the rank and type of x")
        if any(differ(p, q) for k, (p, q) in enumerate(zip(x.shape, rows.shape, strict=True)) if k != a) or differ(rows.shape[a], where.shape[0]):
            raise shape_error(node, "rows and x differ outside of the axis, or rows and positions in number")
        return [x.type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        x_, a, here = must(ins, 0), int(node.attrs["axis"]), bool(node.attrs.get("in_place", 0))
        outer, n, inner = product(x_.shape[:a]), x_.shape[a], product(x_.shape[a + 1 :])
        x, where, rows, y, m = flat(x_), flat(must(ins, 1)), flat(must(ins, 2)), flat(outs[0]), must(ins, 1).shape[0]
        at = Reg("at")

        def copied(src: Any, start: Any, dst: Any, size: Any) -> Any:
            vectors = for_("o", size // LANES, lambda o: for_("i", LANES, lambda i: put(y, dst + o * LANES + i, get(src, start + o * LANES + i)), kind="vectorize"))
            return block(vectors, for_("r", size, lambda i: put(y, dst + i, get(src, start + i)), lo=size // LANES * LANES))

        def row(h: Any, s: Any) -> Any:
            inside = land(at() >= 0, at() < n)
            return block(at.set(cast(get(where, s), index)), If(inside, copied(rows, (h * m + s) * inner, (h * n + at()) * inner, inner)))

        def plane(h: Any) -> Any:
            writes = for_("s", m, lambda s: with_regs([at], row(h, s)))
            return writes if here else block(copied(x, h * n * inner, h * n * inner, n * inner), writes)

        k = kernel(node, [ins[1], ins[2]] if here else ins, outs, (), for_("h", outer, plane, kind="parallel"))
        k.in_place = {outs[0].name: 0} if here else {}
        return k

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, where, rows = np.array(arrays[0]), np.asarray(arrays[1]), np.asarray(arrays[2])
        a = int(node.attrs["axis"])
        keep = (where >= 0) & (where < x.shape[a])
        for w, r in zip(where[keep], np.moveaxis(rows, a, 0)[keep], strict=True):
            np.moveaxis(x, a, 0)[w] = r
        return [x]


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
