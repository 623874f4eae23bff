"""DeformConv: a convolution whose taps are moved by learned offsets and read with bilinear interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, axis, sum_
from luthier.ir.dtypes import f32, index
from luthier.ir.expr import Expr, as_expr, cast, const, land, load, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    define,
    differ,
    get,
    make,
    must,
    need,
    shape_error,
    static,
    type_error,
    widen,
)
from luthier.ir.ops.conv import Window, windows


@op("DeformConv")
class DeformConv(Op):
    """(X [N, C, H, W], W [M, C/g, kH, kW], offset [N, 2 G kH kW, oH, oW], B?, mask? [N, G kH kW, oH, oW]) with G = ``offset_group``.

    Tap (i, j) of output (y, x) reads X at (y s - p + i d + offset_y, x s - p + j d + offset_x); pixels outside of X are 0."""

    kind = "contraction"

    def geometry(self, node: Node) -> tuple[list[Window], int, int]:
        """(windows, groups, offset groups)."""
        w = need(node, 1)
        kernel = [static(node, d, "a kernel extent") for d in w.shape[2:]]
        return windows(node, need(node, 0).shape[2:], kernel), int(node.attrs.get("group", 1)), int(node.attrs.get("offset_group", 1))

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, w, off = need(node, 0), need(node, 1), need(node, 2)
        if x.rank != 4 or w.rank != 4 or off.rank != 4:
            raise shape_error(node, "DeformConv takes images: X, W and offset of rank 4")
        if not x.dtype.is_float or any(v is not None and v.dtype is not x.dtype for v in node.inputs):
            raise type_error(node, "DeformConv takes floats of one type")
        wins, g, og = self.geometry(node)
        if differ(x.shape[1], w.shape[1] * g):
            raise shape_error(node, f"{x.shape[1]!r} input channels in {g} groups, weights for {w.shape[1]!r}")
        taps = wins[0].taps * wins[1].taps
        if differ(off.shape[1], const(2 * og * taps)) or any(differ(off.shape[2 + k], v.out) for k, v in enumerate(wins)):
            raise shape_error(node, f"offset must be [N, {2 * og * taps}, {wins[0].out!r}, {wins[1].out!r}]")
        m = node.input(4)
        if m is not None and (m.rank != 4 or differ(m.shape[1], const(og * taps))):
            raise shape_error(node, f"mask must have {og * taps} channels")
        return [TensorType.of(x.dtype, (x.shape[0], w.shape[0], *(v.out for v in wins)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, w, off, bias, mask = must(ins, 0), must(ins, 1), must(ins, 2), get(ins, 3), get(ins, 4)
        wins, g, og = self.geometry(node)
        n, m, *o = axes = axes_of(outs[0].shape)
        c, *k = axis("c", w.shape[1]), *(axis(f"k{d}", v.k) for d, v in enumerate(wins))
        channel = c.var if g == 1 else m.var // (w.shape[0] // g) * w.shape[1] + c.var
        group = ZERO if og == 1 else channel // (x.shape[1] // og)
        tap = k[0].var * wins[1].k + k[1].var
        taps = wins[0].taps * wins[1].taps
        ends: list[list[tuple[Expr, Expr]]] = []  # per dimension: (pixel, weight) on either side
        for d, v in enumerate(wins):
            moved = cast(load(off, (n.var, (group * taps + tap) * 2 + d, *(a.var for a in o))), f32)
            p = cast(v.at(o[d].var, k[d].var), f32) + moved
            low = unary("floor", p)
            i, t = cast(low, index), p - low
            ends.append([(i, const(1.0, f32) - t), (i + 1, t)])
        value: Expr | None = None
        for yi, wy in ends[0]:
            for xi, wx in ends[1]:
                inside = land(ZERO <= yi, yi < x.shape[2], ZERO <= xi, xi < x.shape[3])
                part = widen(load(x, (n.var, channel, yi, xi), inside))
                part = part * cast(wy * wx, part.dtype)
                value = part if value is None else value + part
        assert value is not None
        if mask is not None:
            value = value * widen(load(mask, (n.var, group * taps + tap, *(a.var for a in o))))
        e = sum_([c, *k], value * widen(load(w, (m.var, c.var, k[0].var, k[1].var))))
        if bias is not None:
            e = e + widen(bias[m.var])
        return make(node, ins, outs, [define(outs[0], axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, w, off = (np.asarray(a).astype(np.float64) for a in arrays[:3])
        g, og = int(node.attrs.get("group", 1)), int(node.attrs.get("offset_group", 1))
        kernel = w.shape[2:]
        wins = windows(node, [as_expr(n) for n in x.shape[2:]], kernel)
        n, ch, h, wd = x.shape
        out = np.zeros((n, w.shape[0], *off.shape[2:]))
        taps = kernel[0] * kernel[1]
        off = off.reshape(n, og, taps, 2, *off.shape[2:])
        mask = np.ones((n, og, taps, *off.shape[4:])) if len(arrays) < 5 or arrays[4] is None else np.asarray(arrays[4]).astype(np.float64).reshape(n, og, taps, *off.shape[4:])
        per_m, per_c = w.shape[0] // g, w.shape[1]
        for b, c, t in np.ndindex(n, ch, taps):
            i, j = divmod(t, kernel[1])
            q = c // (ch // og)
            base = np.meshgrid(*(np.arange(int(v.out.attr)) * v.stride - int(v.lo.attr) + s * v.dilation for v, s in zip(wins, (i, j), strict=True)), indexing="ij")
            y, z = base[0] + off[b, q, t, 0], base[1] + off[b, q, t, 1]
            y0, z0 = np.floor(y).astype(int), np.floor(z).astype(int)
            v = np.zeros(y.shape)
            for yi, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
                for zi, wz in ((z0, 1 - (z - z0)), (z0 + 1, z - z0)):
                    ok = (yi >= 0) & (yi < h) & (zi >= 0) & (zi < wd)
                    v += np.where(ok, x[b, c, np.clip(yi, 0, h - 1), np.clip(zi, 0, wd - 1)], 0) * wy * wz
            v = v * mask[b, q, t]
            gi = c // per_c
            out[b, gi * per_m : (gi + 1) * per_m] += w[gi * per_m : (gi + 1) * per_m, c % per_c, i, j][:, None, None] * v
        if len(arrays) > 3 and arrays[3] is not None:
            out += np.asarray(arrays[3]).astype(np.float64)[:, None, None]
        return [out.astype(np.asarray(arrays[0]).dtype)]
