"""TensorScatter: new entries written into a cache of keys or values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.expr import Expr, land, load, select
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Indexed, Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    check_axis,
    define,
    differ,
    get,
    make,
    must,
    need,
    shape_error,
    to_index,
    type_error,
)


@op("TensorScatter")
class TensorScatter(Op):
    """(past [B, .., max, ..], update [B, .., n, ..], write_indices [B]?): ``update`` from position write_indices[b] on along ``axis``;
    ``mode`` circular wraps around, linear refuses what would lie outside (and drops it where the run does not check)."""

    kind = "injective"

    def axis(self, node: Node) -> int:
        a = check_axis(node, node.attrs.get("axis", -2), need(node, 0).rank)
        if a == 0:
            raise shape_error(node, "axis 0 is the batch")
        return a

    def infer(self, node: Node) -> Sequence[TensorType]:
        past, new, at = need(node, 0), need(node, 1), node.input(2)
        a = self.axis(node)
        if past.dtype is not new.dtype or (at is not None and not at.dtype.is_int):
            raise type_error(node, "cache and update must have one type, write_indices must be integers")
        if past.rank != new.rank or any(differ(p, n) for k, (p, n) in enumerate(zip(past.shape, new.shape, strict=True)) if k != a):
            raise shape_error(node, f"cache and update differ outside of axis {a}")
        if at is not None and (at.rank != 1 or differ(at.shape[0], past.shape[0])):
            raise shape_error(node, "write_indices must have one element for each batch entry")
        if node.attrs.get("mode", "linear") not in ("linear", "circular"):
            raise shape_error(node, f"unknown mode {node.attrs['mode']!r}")
        return [past.type]

    def indexed(self, node: Node) -> Sequence[Indexed]:
        if node.input(2) is None or node.attrs.get("mode", "linear") == "circular":
            return []
        a = self.axis(node)
        return [Indexed(2, (ZERO,), (need(node, 0).shape[a] - need(node, 1).shape[a],))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        past, new, at, a = must(ins, 0), must(ins, 1), get(ins, 2), self.axis(node)
        axes = axes_of(outs[0].shape)
        pos: Expr = axes[a].var
        if at is not None:
            pos = pos - to_index(load(at, (axes[0].var,)))
        if node.attrs.get("mode", "linear") == "circular":
            pos = pos % axes[a].extent
        inside = land(ZERO <= pos, pos < new.shape[a])
        here = [x.var for x in axes]
        value = load(new, [pos if k == a else v for k, v in enumerate(here)], inside)
        return make(node, ins, outs, [define(outs[0], axes, select(inside, value, load(past, here)))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        out, new, a = np.array(arrays[0]), np.asarray(arrays[1]), self.axis(node)
        at = np.asarray(arrays[2]) if len(arrays) > 2 and arrays[2] is not None else np.zeros(len(out), np.int64)
        for b, w in enumerate(at):
            pos = int(w) + np.arange(new.shape[a])
            keep = np.ones(len(pos), bool)
            if node.attrs.get("mode", "linear") == "circular":
                pos = pos % out.shape[a]
            else:
                keep = (pos >= 0) & (pos < out.shape[a])
            row, src = np.moveaxis(out[b], a - 1, 0), np.moveaxis(new[b], a - 1, 0)
            row[pos[keep]] = src[keep]
        return [out]
