"""Elements moved by index arithmetic known from shapes: Transpose, Concat, Split, Slice, Pad, Trilu, DepthToSpace, SpaceToDepth,
ReverseSequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.expr import Expr, as_expr, bounds, const, land, load, maximum, minimum, select
from luthier.ir.graph import Node, TensorType, content_or_symbols
from luthier.ir.loop import Buffer
from luthier.ir.op import Indexed, Op, op
from luthier.ir.ops.common import (
    ONE,
    ZERO,
    Array,
    axes_of,
    broadcast_dim,
    ceil_div,
    check_axis,
    const_value,
    contents,
    define,
    dimension,
    like,
    make,
    moved,
    must,
    need,
    object_content,
    shape_error,
    to_index,
    type_error,
)
from luthier.ir.ops.shape import given_axes
from luthier.ir.requirements import assume_at_least, assume_at_most, assume_equal

FAR = (1 << 31) - 1  # slice ends from here on mean "to the end"


@op("Transpose")
class Transpose(Op):
    """Dimension k of the output is dimension perm[k] of the input (default: reversed)."""

    kind = "injective"

    def perm(self, node: Node) -> tuple[int, ...]:
        n = need(node, 0).rank
        p = tuple(int(k) for k in node.attrs.get("perm", range(n - 1, -1, -1)))
        if sorted(p) != list(range(n)):
            raise shape_error(node, f"perm {list(p)} is no permutation of {n} dimensions")
        return p

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        return [like(x.type, (x.shape[k] for k in self.perm(node)))]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return moved(self, node)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        idx = [ZERO] * len(axes)
        for a, k in zip(axes, self.perm(node), strict=True):
            idx[k] = a.var
        return make(node, ins, outs, [define(outs[0], axes, load(must(ins, 0), idx))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.transpose(arrays[0], self.perm(node))]


@op("Concat")
class Concat(Op):
    """Inputs one after another along ``axis``."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        vals = [need(node, i) for i in range(len(node.inputs))]
        if not vals:
            raise shape_error(node, "Concat without inputs")
        first = vals[0]
        a = check_axis(node, node.attrs["axis"], first.rank)
        dims = list(first.shape)
        for v in vals[1:]:
            if v.dtype is not first.dtype:
                raise type_error(node, "the inputs differ in type")
            if v.rank != first.rank:
                raise shape_error(node, "the inputs differ in rank")
            for k, (d, s) in enumerate(zip(dims, v.shape, strict=True)):
                if k == a:
                    dims[k] = d + s
                elif d.op == "const" and s.op == "const" and d.attr != s.attr:
                    raise shape_error(node, f"the inputs differ in dimension {k}")
                else:
                    assume_equal(d, s, f"dimension {k} of its inputs")
                    if s.op == "const":
                        dims[k] = s
        return [like(first.type, dims)]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        c = contents(node)
        return None if c is None else object_content(np.concatenate(c, int(node.attrs["axis"])))

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        out = outs[0]
        axes = axes_of(out.shape)
        a = check_axis(node, node.attrs["axis"], out.rank)
        v = axes[a].var
        start: Expr = ZERO
        parts: list[tuple[Expr, Expr]] = []
        for i in range(len(ins)):
            b = must(ins, i)
            n = b.shape[a]
            if n.op == "const" and n.attr == 0:
                continue
            end = start + n
            idx = [v - start if k == a else ax.var for k, ax in enumerate(axes)]
            parts.append((v < end, load(b, idx, land(start <= v, v < end))))
            start = end
        if not parts:
            return make(node, ins, outs, [define(out, axes, const(0, out.dtype))])
        e = parts[-1][1]
        for cond, x in reversed(parts[:-1]):
            e = select(cond, x, e)
        return make(node, ins, outs, [define(out, axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.concatenate([np.asarray(a) for a in arrays], int(node.attrs["axis"]))]


@op("Split")
class Split(Op):
    """Pieces along ``axis``: lengths from the second input, or ``num_outputs`` equal ones (the last may be shorter)."""

    kind = "injective"

    def lengths(self, node: Node) -> list[Expr]:
        x = need(node, 0)
        n = x.shape[check_axis(node, node.attrs.get("axis", 0), x.rank)]
        if node.input(1) is not None:
            out = list(content_or_symbols(node, 1))
            if len(out) < len(node.outputs):
                raise shape_error(node, f"{len(out)} lengths for {len(node.outputs)} outputs")
            total = sum((e for e in out[1:]), out[0])
            if n.op == "const" and total.op == "const" and n.attr != total.attr:
                raise shape_error(node, f"the lengths add up to {total.attr}, the dimension is {n.attr}")
            assume_equal(total, n, "the sum of the lengths and the dimension")
            for k, e in enumerate(out):
                if e.op == "const" and e.attr < 0:
                    raise shape_error(node, f"length {k} is {e.attr}")
                assume_at_least(e, ZERO, f"length {k} and the least possible")
            return out
        k = int(node.attrs.get("num_outputs", len(node.outputs)))
        if k != len(node.outputs):
            raise shape_error(node, f"num_outputs is {k}, the node has {len(node.outputs)} outputs")
        piece = ceil_div(n, k)
        return [piece] * (k - 1) + [n - piece * (k - 1)]

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        a = check_axis(node, node.attrs.get("axis", 0), x.rank)
        return [like(x.type, (n if k == a else s for k, s in enumerate(x.shape))) for n in self.lengths(node)]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return moved(self, node)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a = check_axis(node, node.attrs.get("axis", 0), outs[0].rank)
        start: Expr = ZERO
        lets = []
        for out, n in zip(outs, self.lengths(node), strict=False):
            axes = axes_of(out.shape)
            lets.append(define(out, axes, load(must(ins, 0), [x.var + start if k == a else x.var for k, x in enumerate(axes)])))
            start = start + n
        return make(node, ins, outs, lets)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        a = int(node.attrs.get("axis", 0))
        if len(arrays) > 1 and arrays[1] is not None:
            at = np.cumsum(np.asarray(arrays[1]))[:-1]
        else:
            k = int(node.attrs.get("num_outputs", len(node.outputs)))
            piece = -(-x.shape[a] // k)
            at = np.arange(1, k) * piece
        return np.split(x, [int(p) for p in at], a)


def window(start: Expr, end: Expr, step: Expr, n: Expr) -> tuple[Expr, Expr]:
    """(first index, length) of Python's ``start:end:step`` on an extent ``n``, clamped as Python does."""

    def absolute(e: Expr) -> Expr:
        if e.op == "const":
            return e + n if e.attr < 0 else e
        lo = bounds(e)[0]
        return e if lo is not None and lo >= 0 else select(e < 0, e + n, e)

    def up() -> tuple[Expr, Expr]:
        s = start if start is ZERO else maximum(minimum(absolute(start), n), 0)
        e = n if end.op == "const" and end.attr >= FAR else maximum(minimum(absolute(end), n), 0)
        return s, maximum(ceil_div(e - s, step), 0)

    def down() -> tuple[Expr, Expr]:
        s = n - 1 if start.op == "const" and start.attr >= FAR else minimum(maximum(absolute(start), 0), n - 1)  # -1 where n is 0: nothing follows
        e = const(-1) if end.op == "const" and end.attr <= -FAR else maximum(minimum(absolute(end), n - 1), -1)
        return s, maximum(ceil_div(e - s, step), 0)

    if step.op == "const":
        return up() if step.attr > 0 else down()
    (s0, l0), (s1, l1) = up(), down()
    return select(ZERO < step, s0, s1), select(ZERO < step, l0, l1)


@op("Slice")
class Slice(Op):
    """data[starts:ends:steps] on ``axes``; all four may come at run time."""

    kind = "injective"

    def windows(self, node: Node) -> list[tuple[Expr, Expr, Expr]]:
        """(first index, length, step) of every dimension."""
        x = need(node, 0)
        starts, ends = content_or_symbols(node, 1), content_or_symbols(node, 2)
        axes = content_or_symbols(node, 3) if node.input(3) is not None else tuple(as_expr(k) for k in range(len(starts)))
        steps = content_or_symbols(node, 4) if node.input(4) is not None else (ONE,) * len(starts)
        if not len(starts) == len(ends) == len(axes) == len(steps):
            raise shape_error(node, f"{len(starts)} starts, {len(ends)} ends, {len(axes)} axes, {len(steps)} steps")
        if any(t is ZERO for t in steps):
            raise shape_error(node, "a step is 0")
        for k, t in enumerate(steps):
            assume_equal(t, select(t.eq(0), ONE, t), f"steps (number {k} is 0)")
        out = [(ZERO, n, ONE) for n in x.shape]
        for a, s, e, t in zip(axes, starts, ends, steps, strict=True):
            d = dimension(node, a, x.rank)
            if d.op == "const":
                out[d.attr] = (*window(s, e, t, x.shape[d.attr]), t)
                continue
            for k, n in enumerate(x.shape):  # the axis itself comes at run time
                hit = d.eq(k)
                first, length = window(s, e, t, n)
                old = out[k]
                out[k] = (select(hit, first, old[0]), select(hit, length, old[1]), select(hit, t, old[2]))
        return out

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [like(need(node, 0).type, (n for _, n, _ in self.windows(node)))]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return moved(self, node)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        idx = [s + a.var * t for a, (s, _, t) in zip(axes, self.windows(node), strict=True)]
        return make(node, ins, outs, [define(outs[0], axes, load(must(ins, 0), idx))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, starts, ends, *rest = arrays
        axes = rest[0] if rest and rest[0] is not None else np.arange(len(starts))
        steps = rest[1] if len(rest) > 1 and rest[1] is not None else np.ones(len(starts), np.int64)
        sl = [slice(None)] * np.ndim(x)
        for a, s, e, t in zip(axes, starts, ends, steps, strict=True):
            n = np.shape(x)[int(a)]
            stop: int | None = int(e)
            if int(t) < 0 and int(e) < -n:
                stop = None
            sl[int(a)] = slice(int(s), stop, int(t))
        return [np.asarray(x)[tuple(sl)]]


LARGEST = 1 << 48  # elements along an axis: more than any memory holds


@op("Pad")
class Pad(Op):
    """(data, pads, value?, axes?); ``mode`` constant, edge, reflect or wrap. Negative pads crop."""

    kind = "injective"

    def pads(self, node: Node) -> list[tuple[Expr, Expr]]:
        x, p = need(node, 0), content_or_symbols(node, 1)
        axes = [const(k) for k in range(x.rank)] if node.input(3) is None else given_axes(node, 3, x.rank)
        if len(p) != 2 * len(axes):
            raise shape_error(node, f"{len(p)} pads for {len(axes)} axes")
        out = [(ZERO, ZERO)] * x.rank
        for d in range(x.rank):
            for k, a in enumerate(axes):
                hit = a.eq(d)
                out[d] = (select(hit, p[k], out[d][0]), select(hit, p[k + len(axes)], out[d][1]))
        return out

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if node.attrs.get("mode", "constant") not in ("constant", "edge", "reflect", "wrap"):
            raise shape_error(node, f"unknown mode {node.attrs['mode']!r}")
        v = node.input(2)
        if v is not None and v.dtype is not x.dtype:
            raise type_error(node, "the fill value has another type than the data")
        out = []
        for k, (s, pair) in enumerate(zip(x.shape, self.pads(node), strict=True)):
            for p in pair:
                if p.op == "const" and abs(p.attr) >= LARGEST:
                    raise shape_error(node, f"a pad of axis {k} is {p.attr}")
                if p.op != "const":
                    assume_at_most(p, const(LARGEST), f"a pad of axis {k}")
            left = s + pair[0] + pair[1]
            if left.op == "const" and left.attr < 0:
                raise shape_error(node, f"the pads crop dimension {k} to {left.attr} elements")
            if pair != (ZERO, ZERO):
                assume_at_least(left, ZERO, f"what the pads leave of dimension {k} and the least possible")
            out.append(maximum(left, 0))
        return [like(x.type, out)]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return moved(self, node)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        mode = node.attrs.get("mode", "constant")
        axes = axes_of(out.shape)
        idx, conds = [], []
        for a, n, (lo, hi) in zip(axes, x.shape, self.pads(node), strict=True):
            j = a.var - lo
            if lo is ZERO and hi is ZERO:
                idx.append(a.var)
            elif mode == "constant":
                conds += [ZERO <= j, j < n]
                idx.append(j)
            else:
                idx.append(self.source(mode, j, n, lo, hi))
        if mode != "constant":
            return make(node, ins, outs, [define(out, axes, load(x, idx))])
        v = node.input(2)
        fill = const(0, x.dtype)
        if v is not None:
            c = const_value(v)
            fill = const(c, x.dtype) if c is not None else must(ins, 2)[(ZERO,) * must(ins, 2).rank]
        return make(node, ins, outs, [define(out, axes, load(x, idx, land(*conds), fill))])

    @staticmethod
    def source(mode: str, j: Expr, n: Expr, lo: Expr, hi: Expr) -> Expr:
        """Where a position ``j`` outside of 0 .. n - 1 reads from."""
        if mode == "edge":
            return maximum(minimum(j, n - 1), 0)
        if mode == "wrap":
            return j % n
        period = (n - 1) * 2
        m = j % period
        return select(m < n, m, period - m)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, pads, *rest = arrays
        x = np.asarray(x)
        pads = [int(p) for p in np.asarray(pads)]
        axes = [int(a) for a in (rest[1] if len(rest) > 1 and rest[1] is not None else range(x.ndim))]
        width = [[0, 0] for _ in range(x.ndim)]
        for k, a in enumerate(axes):
            width[a] = [pads[k], pads[k + len(axes)]]
        crop = tuple(slice(max(-lo, 0), x.shape[k] - max(-hi, 0)) for k, (lo, hi) in enumerate(width))
        width = [[max(lo, 0), max(hi, 0)] for lo, hi in width]
        mode = node.attrs.get("mode", "constant")
        if mode == "constant":
            fill = 0 if not rest or rest[0] is None else np.asarray(rest[0]).reshape(())
            return [np.pad(x[crop], width, "constant", constant_values=fill)]
        return [np.pad(x[crop], width, mode)]


@op("Trilu")
class Trilu(Op):
    """The upper (or lower) triangle of the last two dimensions from diagonal ``k`` on; zero elsewhere."""

    kind = "elementwise"

    def infer(self, node: Node) -> Sequence[TensorType]:
        if need(node, 0).rank < 2:
            raise shape_error(node, "Trilu takes a matrix or a stack of them")
        return [need(node, 0).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x = must(ins, 0)[tuple(a.var for a in axes)]
        v = node.input(1)
        c = const_value(v)
        k = ZERO if v is None else const(c) if c is not None else to_index(must(ins, 1)[(ZERO,) * must(ins, 1).rank])
        d = axes[-1].var - axes[-2].var
        keep = k <= d if int(node.attrs.get("upper", 1)) else d <= k
        return make(node, ins, outs, [define(outs[0], axes, select(keep, x, const(0, x.dtype)))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        k = int(np.asarray(arrays[1]).reshape(())) if len(arrays) > 1 and arrays[1] is not None else 0
        return [np.triu(x, k) if int(node.attrs.get("upper", 1)) else np.tril(x, k)]


def _block(node: Node) -> tuple[int, tuple[Expr, ...]]:
    x = need(node, 0)
    if x.rank != 4:
        raise shape_error(node, f"{node.op} takes NCHW, the input has rank {x.rank}")
    n, a, b, c = x.shape
    size = int(node.attrs["blocksize"])
    if not 1 <= size < 1 << 20:
        raise shape_error(node, f"the blocksize is {size}")
    return size, (n, c, a, b) if _last(node) else (n, a, b, c)


def _last(node: Node) -> bool:
    return node.attrs.get("layout", "NCHW") == "NHWC"


@op("DepthToSpace")
class DepthToSpace(Op):
    """Channels become blocks of pixels: f[N, C b b, H, W] to [N, C, H b, W b]; ``mode`` DCR or CRD orders the channels.

    Attribute ``layout`` (not ONNX): NCHW or NHWC."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        b, (n, c, h, w) = _block(node)
        if c.op == "const" and c.attr % (b * b):
            raise shape_error(node, f"{c.attr} channels do not divide by blocksize {b} squared")
        shape = (n, c // (b * b), h * b, w * b)
        return [like(need(node, 0).type, shape if not _last(node) else (shape[0], *shape[2:], shape[1]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        b, _ = _block(node)
        axes = axes_of(outs[0].shape)
        n, c, h, w = axes if not _last(node) else (axes[0], axes[3], axes[1], axes[2])
        i, j = h.var % b, w.var % b
        ch = (i * b + j) * c.extent + c.var if node.attrs.get("mode", "DCR") == "DCR" else c.var * (b * b) + i * b + j
        at = (n.var, ch, h.var // b, w.var // b) if not _last(node) else (n.var, h.var // b, w.var // b, ch)
        return make(node, ins, outs, [define(outs[0], axes, load(must(ins, 0), at))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, b = np.asarray(arrays[0]), int(node.attrs["blocksize"])
        x = np.moveaxis(x, -1, 1) if _last(node) else x
        n, c, h, w = x.shape
        if node.attrs.get("mode", "DCR") == "DCR":
            y = x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2)
        else:
            y = x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
        y = y.reshape(n, c // b**2, h * b, w * b)
        return [np.moveaxis(y, 1, -1) if _last(node) else y]


@op("SpaceToDepth")
class SpaceToDepth(Op):
    """Blocks of pixels become channels: f[N, C, H b, W b] to [N, C b b, H, W]; ``mode`` DCR or CRD orders the channels."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        b, (n, c, h, w) = _block(node)
        return [like(need(node, 0).type, (n, c * (b * b), h // b, w // b))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        b, (_, channels, _, _) = _block(node)
        axes = n, c, h, w = axes_of(outs[0].shape)
        if node.attrs.get("mode", "DCR") == "DCR":
            k, ch = c.var // channels, c.var % channels
        else:
            k, ch = c.var % (b * b), c.var // (b * b)
        idx = (n.var, ch, h.var * b + k // b, w.var * b + k % b)
        return make(node, ins, outs, [define(outs[0], axes, load(must(ins, 0), idx))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, b = np.asarray(arrays[0]), int(node.attrs["blocksize"])
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // b, b, w // b, b).transpose((0, 3, 5, 1, 2, 4) if node.attrs.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4))
        return [y.reshape(n, c * b * b, h // b, w // b)]


@op("ReverseSequence")
class ReverseSequence(Op):
    """The first sequence_lens[b] steps of every batch entry reversed; ``batch_axis`` and ``time_axis`` are 0 and 1 in some order."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, n = need(node, 0), need(node, 1)
        b, t = int(node.attrs.get("batch_axis", 1)), int(node.attrs.get("time_axis", 0))
        if {b, t} != {0, 1}:
            raise shape_error(node, f"batch_axis {b} and time_axis {t} should be 0 and 1 in some order")
        if n.rank != 1 or x.rank < 2 or broadcast_dim(n.shape[0], x.shape[b]) is None:
            raise shape_error(node, "sequence_lens must have one length for each batch entry")
        return [x.type]

    def indexed(self, node: Node) -> Sequence[Indexed]:
        return [Indexed(1, (ZERO,), (need(node, 0).shape[int(node.attrs.get("time_axis", 0))],))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        b, t = int(node.attrs.get("batch_axis", 1)), int(node.attrs.get("time_axis", 0))
        axes = axes_of(outs[0].shape)
        n = minimum(to_index(must(ins, 1)[axes[b].var]), axes[t].extent)
        v = axes[t].var
        idx: list[Any] = [a.var for a in axes]
        idx[t] = select(v < n, n - 1 - v, v)
        return make(node, ins, outs, [define(outs[0], axes, load(must(ins, 0), idx))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, lens = np.asarray(arrays[0]), np.asarray(arrays[1])
        b, t = int(node.attrs.get("batch_axis", 1)), int(node.attrs.get("time_axis", 0))
        y = np.moveaxis(x, (b, t), (0, 1)).copy()
        for k, n in enumerate(lens):
            y[k, : int(n)] = y[k, : int(n)][::-1]
        return [np.moveaxis(y, (0, 1), (b, t))]


