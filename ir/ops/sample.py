"""Sampling at computed positions: GridSample, AffineGrid, RoiAlign; and CenterCropPad, Col2Im."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, axis, carried, reduce_, sum_
from luthier.ir.dtypes import f32, index
from luthier.ir.expr import Expr, binary, carry_nan, cast, const, land, load, lor, maximum, minimum, select, unary
from luthier.ir.graph import Node, TensorType, content_or_symbols
from luthier.ir.loop import Buffer
from luthier.ir.op import Indexed, Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    check_axis,
    define,
    differ,
    like,
    make,
    must,
    need,
    product,
    shape_error,
    static,
    temp,
    to_index,
    type_error,
    unsupported,
    widen,
    window_size,
)
from luthier.ir.ops.conv import attr_ints


def num(v: float) -> Expr:
    return const(float(v), f32)


def keys(t: Expr, a: float = -0.75) -> list[Expr]:
    """Weights of the four taps of cubic convolution for the fraction ``t``."""
    one, two = num(1), num(2)

    def far(x: Expr) -> Expr:
        return ((num(a) * x - num(5 * a)) * x + num(8 * a)) * x - num(4 * a)

    def near(x: Expr) -> Expr:
        return (num(a + 2) * x - num(a + 3)) * x * x + one

    return [far(t + one), near(t), near(one - t), far(two - t)]


@op("GridSample")
class GridSample(Op):
    """X [N, C, D...] at the positions grid [N, D'..., r] (x first, in -1 .. 1) to [N, C, D'...]."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, g = need(node, 0), need(node, 1)
        r = x.rank - 2
        if r < 1 or g.rank != x.rank or differ(g.shape[-1], const(r)) or differ(g.shape[0], x.shape[0]):
            raise shape_error(node, f"the grid must be [N, {r} output extents, {r}]")
        if not (x.dtype.is_float and g.dtype.is_float):
            raise type_error(node, "GridSample takes floats")
        if node.attrs.get("mode", "linear") not in ("nearest", "linear", "cubic") or node.attrs.get("padding_mode", "zeros") not in ("zeros", "border", "reflection"):
            raise shape_error(node, "unknown mode or padding_mode")
        return [like(x.type, (*x.shape[:2], *g.shape[1:-1]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, g, out = must(ins, 0), must(ins, 1), outs[0]
        mode, pad = node.attrs.get("mode", "linear"), node.attrs.get("padding_mode", "zeros")
        corners = bool(int(node.attrs.get("align_corners", 0)))
        axes = axes_of(out.shape)
        n, c, *o = axes
        r = len(o)
        taps: list[list[tuple[Expr, Expr]]] = []
        for d in range(r):
            size = x.shape[2 + d]
            v = cast(load(g, (n.var, *(a.var for a in o), const(r - 1 - d))), f32)
            s = cast(size, f32)
            p = (v + num(1)) * num(0.5) * (s - num(1)) if corners else ((v + num(1)) * s - num(1)) * num(0.5)
            lo, hi = (num(0), s - num(1)) if corners else (num(-0.5), s - num(0.5))
            if mode == "nearest":
                p = unary("round", p)
            if pad == "border" and mode != "cubic":  # of a cubic the taps are clamped, not the position
                p = select(lor(p < lo, hi < p), minimum(maximum(p, num(0)), s - num(1)), p)
            elif pad == "reflection":
                p = reflect(p, lo, hi)
            low = unary("floor", p)
            first, t = cast(low, index), p - low
            if mode == "nearest":
                taps.append([(cast(p, index), num(1))])
            elif mode == "linear":
                taps.append([(first, num(1) - t), (first + 1, t)])
            else:
                taps.append([(first + k - 1, w) for k, w in enumerate(keys(t))])
        e = self.nested(x, [n.var, c.var], taps, pad, corners)
        return make(node, ins, outs, [define(out, axes, e)])

    def nested(self, x: Buffer, lead: list[Expr], taps: Sequence[list[tuple[Expr, Expr]]], pad: str, corners: bool) -> Expr:
        if not taps:
            idx = list(lead)
            conds = []
            for k in range(2, len(idx)):
                size = x.shape[k]
                if pad == "zeros":
                    conds += [ZERO <= idx[k], idx[k] < size]
                elif pad == "reflection":
                    period = (size - 1) * 2 if corners else size * 2
                    m = idx[k] % period
                    back = period - m if corners else period - 1 - m
                    idx[k] = maximum(minimum(select(m < size, m, back), size - 1), 0)
                else:
                    idx[k] = maximum(minimum(idx[k], size - 1), 0)
            return widen(load(x, idx, land(*conds)))
        e: Expr | None = None
        for p, w in taps[0]:
            part = self.nested(x, [*lead, p], taps[1:], pad, corners)
            part = part * cast(w, part.dtype)
            e = part if e is None else e + part
        assert e is not None
        return e

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, g = np.asarray(arrays[0]), np.asarray(arrays[1]).astype(np.float32)
        mode, pad = node.attrs.get("mode", "linear"), node.attrs.get("padding_mode", "zeros")
        corners = bool(int(node.attrs.get("align_corners", 0)))
        r = x.ndim - 2
        out = np.zeros((*x.shape[:2], *g.shape[1:-1]))
        taps = []
        for d in range(r):
            s = x.shape[2 + d]
            v = g[..., r - 1 - d]
            p = (v + 1) / np.float32(2) * (s - 1) if corners else ((v + 1) * s - 1) / np.float32(2)
            p = np.rint(p) if mode == "nearest" else p
            lo, hi = (0, s - 1) if corners else (-0.5, s - 0.5)
            if pad == "border" and mode != "cubic":
                p = np.where((p < lo) | (p > hi), np.clip(p, 0, s - 1), p)
            elif pad == "reflection":
                span = hi - lo
                m = np.mod(np.abs(p - lo), 2 * span) if span else np.zeros_like(p)
                p = lo + np.where(m > span, 2 * span - m, m)
            i = np.floor(p)
            t = (p - i).astype(np.float64)
            i = i.astype(np.int64)
            if mode == "nearest":
                taps.append([(np.floor(p).astype(np.int64), np.ones_like(t))])
            elif mode == "linear":
                taps.append([(i, 1 - t), (i + 1, t)])
            else:
                a = -0.75
                w = [
                    ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a, ((a + 2) * t - (a + 3)) * t * t + 1,
                    ((a + 2) * (1 - t) - (a + 3)) * (1 - t) ** 2 + 1, ((a * (2 - t) - 5 * a) * (2 - t) + 8 * a) * (2 - t) - 4 * a,
                ]  # fmt: skip
                taps.append([(i + k - 1, w[k]) for k in range(4)])
        for pick in np.ndindex(*(len(t) for t in taps)):
            w = np.ones(g.shape[:-1])
            idx = []
            for d, k in enumerate(pick):
                j, wk = taps[d][k]
                s = x.shape[2 + d]
                w = w * wk
                if pad == "zeros":
                    w = w * ((j >= 0) & (j < s))
                    j = np.clip(j, 0, s - 1)
                elif pad == "border":
                    j = np.clip(j, 0, s - 1)
                else:
                    period = 2 * (s - 1) if corners else 2 * s
                    m = np.mod(j, period) if period else np.zeros_like(j)
                    j = np.where(m < s, m, period - m if corners else period - 1 - m)
                idx.append(j)
            for b in range(x.shape[0]):
                out[b] += x[b].astype(np.float64)[(slice(None), *(j[b] for j in idx))] * w[b]
        return [out.astype(x.dtype)]


def reflect(p: Expr, lo: Expr, hi: Expr) -> Expr:
    """A coordinate folded back between ``lo`` and ``hi``."""
    span = hi - lo
    safe = select(span <= num(0), num(1), span)
    m = binary("rem", unary("abs", p - lo), safe * num(2))
    return select(span <= num(0), lo, lo + select(span < m, safe * num(2) - m, m))


@op("AffineGrid")
class AffineGrid(Op):
    """theta [N, r, r + 1], size (N, C, D...) to the grid [N, D..., r] of transformed positions."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        t, size = need(node, 0), content_or_symbols(node, 1)
        r = len(size) - 2
        if t.rank != 3 or r not in (2, 3) or differ(t.shape[1], const(r)) or differ(t.shape[2], const(r + 1)):
            raise shape_error(node, "theta must be [N, 2, 3] for a size of 4 extents, [N, 3, 4] for 5")
        return [like(t.type, (t.shape[0], *size[2:], const(r)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        t = must(ins, 0)
        axes = axes_of(outs[0].shape)
        n, *o, k = axes
        corners = bool(int(node.attrs.get("align_corners", 0)))
        r = len(o)
        e: Expr | None = None
        for d, a in enumerate(reversed(o)):  # x first
            s, i = cast(a.extent, f32), cast(a.var, f32)
            p = i * num(2) / (s - num(1)) - num(1) if corners else (i * num(2) + num(1)) / s - num(1)
            part = widen(load(t, (n.var, k.var, const(d))))
            part = part * cast(p, part.dtype)
            e = part if e is None else e + part
        assert e is not None
        return make(node, ins, outs, [define(outs[0], axes, e + widen(load(t, (n.var, k.var, const(r)))))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        t, size = np.asarray(arrays[0]), [int(s) for s in np.asarray(arrays[1])]
        ps = []
        for s in size[2:]:
            i = np.arange(s, dtype=np.float64)
            ps.append(2 * i / (s - 1) - 1 if int(node.attrs.get("align_corners", 0)) else (2 * i + 1) / s - 1)
        grid = np.meshgrid(*ps, indexing="ij")
        full = np.stack([*reversed(grid), np.ones_like(grid[0])], -1)
        return [np.einsum("nkj,...j->n...k", t.astype(np.float64), full).astype(t.dtype)]


@op("CenterCropPad")
class CenterCropPad(Op):
    """Cropped or zero-padded around the centre to ``shape`` on ``axes``."""

    kind = "injective"

    def targets(self, node: Node) -> dict[int, Expr]:
        x, shape = need(node, 0), content_or_symbols(node, 1)
        axes = [check_axis(node, a, x.rank) for a in node.attrs.get("axes", range(x.rank))]
        if len(axes) != len(shape):
            raise shape_error(node, f"{len(shape)} extents for {len(axes)} axes")
        return dict(zip(axes, shape, strict=True))

    def infer(self, node: Node) -> Sequence[TensorType]:
        want = self.targets(node)
        return [like(need(node, 0).type, (want.get(k, s) for k, s in enumerate(need(node, 0).shape)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, want = must(ins, 0), self.targets(node)
        axes = axes_of(outs[0].shape)
        idx, conds = [], []
        for k, (a, n) in enumerate(zip(axes, x.shape, strict=True)):
            if k not in want:
                idx.append(a.var)
                continue
            m = want[k]
            j = a.var + select(m <= n, (n - m) // 2, ZERO - (m - n) // 2)
            conds += [ZERO <= j, j < n]
            idx.append(j)
        return make(node, ins, outs, [define(outs[0], axes, load(x, idx, land(*conds)))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, shape = np.asarray(arrays[0]), [int(s) for s in np.asarray(arrays[1])]
        y = x
        for a, m in zip([int(a) % x.ndim for a in node.attrs.get("axes", range(x.ndim))], shape, strict=True):
            n = x.shape[a]
            if m <= n:
                y = np.take(y, range((n - m) // 2, (n - m) // 2 + m), a)
            else:
                lo = (m - n) // 2
                y = np.pad(y, [(lo, m - n - lo) if k == a else (0, 0) for k in range(x.ndim)])
        return [y]


@op("Col2Im")
class Col2Im(Op):
    """Columns [N, C prod(block), L] added back into images [N, C, image...]."""

    kind = "contraction"

    def geometry(self, node: Node) -> tuple[tuple[Expr, ...], tuple[Expr, ...], list[Expr], list[int], list[int], list[int]]:
        image, block = tuple(content_or_symbols(node, 1)), tuple(content_or_symbols(node, 2))
        r = len(image)
        if len(block) != r:
            raise shape_error(node, "image_shape and block_shape differ in length")
        s, d, p = attr_ints(node, "strides", r, 1), attr_ints(node, "dilations", r, 1), attr_ints(node, "pads", 2 * r, 0)
        count = [(n + p[i] + p[i + r] - (block[i] - 1) * d[i] - 1) // s[i] + 1 for i, n in enumerate(image)]
        return image, block, count, list(s), list(d), list(p[:r])

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if x.rank != 3:
            raise shape_error(node, "Col2Im takes [N, C prod(block), L]")
        image, block, *_ = self.geometry(node)
        return [like(x.type, (x.shape[0], x.shape[1] // product(block), *image))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        _, block, count, s, d, p = self.geometry(node)
        n, c, *o = axes = axes_of(out.shape)
        reds = [axis(f"k{i}", b) for i, b in enumerate(block)]
        row, col = ZERO, ZERO
        conds = []
        for i, (a, k) in enumerate(zip(o, reds, strict=True)):
            q = a.var + p[i] - k.var * d[i]
            j = q // s[i]
            conds += [ZERO <= q, (q % s[i]).eq(0), j < count[i]]
            row = row * block[i] + k.var
            col = col * count[i] + j
        mask = land(*conds, ZERO <= col, col < x.shape[2])
        v = load(x, (n.var, c.var * product(block) + row, col), mask)
        return make(node, ins, outs, [define(out, axes, sum_(reds, widen(v)))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        image, block = [int(v) for v in arrays[1]], [int(v) for v in arrays[2]]
        r = len(image)
        s, d, p = attr_ints(node, "strides", r, 1), attr_ints(node, "dilations", r, 1), attr_ints(node, "pads", 2 * r, 0)
        count = [(n + p[i] + p[i + r] - (block[i] - 1) * d[i] - 1) // s[i] + 1 for i, n in enumerate(image)]
        y = np.zeros((x.shape[0], x.shape[1] // int(np.prod(block)), *(n + p[i] + p[i + r] for i, n in enumerate(image))), np.float64)
        v = x.reshape(x.shape[0], -1, *block, *count)
        for k in np.ndindex(*block):
            sl = tuple(slice(k[i] * d[i], k[i] * d[i] + s[i] * (count[i] - 1) + 1, s[i]) for i in range(r))
            y[(slice(None), slice(None), *sl)] += v[(slice(None), slice(None), *k)]
        return [y[(slice(None), slice(None), *(slice(p[i], p[i] + n) for i, n in enumerate(image)))].astype(x.dtype)]


@op("RoiAlign")
class RoiAlign(Op):
    """(X [N, C, H, W], rois [R, 4], batch_indices [R]) to [R, C, output_height, output_width]: bilinear samples, averaged or largest.

    ``sampling_ratio`` 0 (as many samples as the region has pixels) is not supported."""

    kind = "reduction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, rois, b = need(node, 0), need(node, 1), need(node, 2)
        if x.rank != 4 or rois.rank != 2 or differ(rois.shape[1], const(4)) or b.rank != 1:
            raise shape_error(node, "RoiAlign takes X [N, C, H, W], rois [R, 4] and batch_indices [R]")
        if int(node.attrs.get("sampling_ratio", 0)) < 1:
            raise unsupported(node, "sampling_ratio 0: the number of samples would depend on the data", hint="export with a sampling_ratio")
        window_size(node, "sampling_ratio", square=True)
        return [TensorType.of(x.dtype, (rois.shape[0], x.shape[1], int(node.attrs.get("output_height", 1)), int(node.attrs.get("output_width", 1))))]

    def indexed(self, node: Node) -> Sequence[Indexed]:
        return [Indexed(2, (const(0),), (need(node, 0).shape[0] - 1,))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, rois, batch, out = must(ins, 0), must(ins, 1), must(ins, 2), outs[0]
        q = int(node.attrs["sampling_ratio"])
        half = node.attrs.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
        scale = float(node.attrs.get("spatial_scale", 1.0))
        axes = r, c, ph, pw = axes_of(out.shape)
        ky, kx = axis("ky", q), axis("kx", q)

        def edge(k: int) -> Expr:
            v = cast(load(rois, (r.var, const(k))), f32) * num(scale)
            return v - num(0.5) if half else v

        def sample(lo: int, hi: int, o: Expr, k: Expr, bins: int, size: Expr) -> tuple[Expr, Expr, Expr, Expr, Expr]:
            """(first pixel, second pixel, their weights, inside)."""
            start, extent = edge(lo), edge(hi) - edge(lo)
            if not half:
                extent = maximum(extent, num(1))
            step = extent * num(1 / bins)
            p = start + cast(o, f32) * step + (cast(k, f32) + num(0.5)) * step * num(1 / q)
            s = cast(size, f32)
            ok = land(num(-1) <= p, p <= s)
            p = minimum(maximum(p, num(0)), s - num(1))
            i = maximum(minimum(cast(unary("floor", p), index), size - 1), 0)
            t = p - cast(i, f32)
            return i, minimum(i + 1, size - 1), num(1) - t, t, ok

        y0, y1, wy0, wy1, oky = sample(1, 3, ph.var, ky.var, static(node, ph.extent, "output_height"), x.shape[2])
        x0, x1, wx0, wx1, okx = sample(0, 2, pw.var, kx.var, static(node, pw.extent, "output_width"), x.shape[3])
        b = maximum(minimum(to_index(load(batch, (r.var,))), x.shape[0] - 1), 0)
        ok = land(oky, okx)
        parts = []
        for yi, wy in ((y0, wy0), (y1, wy1)):
            for xi, wx in ((x0, wx0), (x1, wx1)):
                v = widen(load(x, (b, c.var, yi, xi)))
                parts.append(v * cast(wy * wx, v.dtype))
        zero = const(0.0, parts[0].dtype)
        if node.attrs.get("mode", "avg") == "max":
            m = functools.reduce(functools.partial(carry_nan, "max"), parts)
            return make(node, ins, outs, [define(out, axes, reduce_(carried("max", m.dtype), (ky, kx), select(ok, m, zero)))])
        total = temp(out, "sum", axes, sum_((ky, kx), select(ok, parts[0] + parts[1] + parts[2] + parts[3], zero)))
        e = load(total.buf, [a.var for a in axes])
        return make(node, ins, outs, [total, define(out, axes, e / const(q * q, e.dtype))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, rois, batch = (np.asarray(a) for a in arrays)
        q = int(node.attrs["sampling_ratio"])
        half = node.attrs.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
        scale = float(node.attrs.get("spatial_scale", 1.0))
        oh, ow = int(node.attrs.get("output_height", 1)), int(node.attrs.get("output_width", 1))
        h, w = x.shape[2:]
        out = np.zeros((len(rois), x.shape[1], oh, ow))
        for i, roi in enumerate(rois.astype(np.float64) * scale - (0.5 if half else 0.0)):
            size = roi[2:] - roi[:2]
            if not half:
                size = np.maximum(size, 1)
            image = x[int(batch[i])].astype(np.float64)
            grids = []
            for start, extent, bins, n in ((roi[1], size[1], oh, h), (roi[0], size[0], ow, w)):
                p = start + (np.arange(bins * q) // q) * extent / bins + ((np.arange(bins * q) % q) + 0.5) * extent / bins / q
                ok = (p >= -1) & (p <= n)
                p = np.clip(p, 0, n - 1)
                lo = np.floor(p).astype(int)
                grids.append((lo, np.minimum(lo + 1, n - 1), p - lo, ok))
            (y0, y1, ty, oky), (x0, x1, tx, okx) = grids
            parts = np.stack([
                image[:, a][:, :, b] * wa[:, None] * wb[None]
                for a, wa in ((y0, 1 - ty), (y1, ty)) for b, wb in ((x0, 1 - tx), (x1, tx))
            ])  # fmt: skip
            parts = parts * (oky[:, None] & okx[None])
            v = (parts.max(0) if node.attrs.get("mode", "avg") == "max" else parts.sum(0)).reshape(-1, oh, q, ow, q)
            out[i] = v.max((2, 4)) if node.attrs.get("mode", "avg") == "max" else v.mean((2, 4))
        return [out.astype(x.dtype)]


