"""Pooling: MaxPool, AveragePool, LpPool, their global forms, MaxUnpool. ``layout`` as for convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, LetStmt, Push, axis, carried, reduce_, sum_
from luthier.ir.dtypes import i64
from luthier.ir.expr import Expr, binary, cast, const, land, load, maximum, minimum, proj, unary
from luthier.ir.graph import Node, TensorType, content_or_symbols
from luthier.ir.loop import Buffer
from luthier.ir.op import Indexed, Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    ceil_div,
    define,
    like,
    make,
    must,
    need,
    pinned,
    product,
    shape_error,
    to_index,
    type_error,
    unravel,
    widen,
)
from luthier.ir.ops.conv import Window, attr_ints, channels_last, join_axes, join_shape, split_shape, taps, windows
from luthier.ir.ops.gather import inside
from luthier.ir.ops.matmul import up


class Pool(Op):
    """A reduction over windows of the spatial dimensions."""

    kind = "reduction"
    channels_last = True

    def windows(self, node: Node) -> list[Window]:
        _, _, spatial = split_shape(node, need(node, 0))
        if "kernel_shape" not in node.attrs:
            raise shape_error(node, "kernel_shape is missing")
        return windows(node, spatial, attr_ints(node, "kernel_shape", len(spatial), 1), bool(int(node.attrs.get("ceil_mode", 0))))

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        n, c, _ = split_shape(node, x)
        return [TensorType.of(x.dtype, join_shape(node, n, c, [w.out for w in self.windows(node)]))]

    def gather(self, node: Node, x: Buffer, out: Buffer, other: Any) -> tuple[tuple[Axis, ...], list[Axis], Expr, Expr, list[Expr], tuple[Axis, ...]]:
        """(output axes, reduction axes, masked value, mask, input position, spatial axes)."""
        wins = self.windows(node)
        axes, n, c, o = join_axes(node, out)
        k_axes, k = taps([w.k for w in wins])
        at = [w.at(a.var, kk) for w, a, kk in zip(wins, o, k, strict=True)]
        mask = land(*(w.inside(a.var, kk) for w, a, kk in zip(wins, o, k, strict=True)))
        value = load(x, join_shape(node, n.var, c.var, at), mask, other)
        return axes, k_axes, value, mask, at, o

    def patches(self, node: Node, x: Array, fill: float) -> Array:
        """Channels-first windows [N, C, out..., k...]; ``fill`` outside of the input."""
        wins = self.windows(node)
        r = len(wins)
        width = []
        for w in wins:
            need_hi = (int(w.out.attr) - 1) * w.stride + (w.taps - 1) * w.dilation + 1 - int(w.n.attr) - int(w.lo.attr)
            width.append((int(w.lo.attr), max(need_hi, 0)))
        p = np.pad(x, [(0, 0), (0, 0), *width], constant_values=fill)
        view = np.lib.stride_tricks.sliding_window_view(p, [(w.taps - 1) * w.dilation + 1 for w in wins], tuple(range(2, 2 + r)))  # type: ignore[call-overload]
        view = view[(slice(None), slice(None), *(slice(None, None, w.stride) for w in wins), *(slice(None, None, w.dilation) for w in wins))]
        return np.asarray(view[(slice(None), slice(None), *(slice(0, int(w.out.attr)) for w in wins))])


def first(node: Node, a: Any) -> Array:
    a = np.asarray(a)
    return np.moveaxis(a, -1, 1) if channels_last(node) else a


def back(node: Node, a: Array) -> Array:
    return np.moveaxis(a, 1, -1) if channels_last(node) else a


@op("MaxPool")
class MaxPool(Pool):
    """(Y, Indices?): the largest element of each window, and its position in the flattened input; the first NaN where there is one."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        (t,) = super().infer(node)
        return [t, TensorType(i64, t.shape)][: max(len(node.outputs), 1)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        axes, k_axes, value, mask, at, _ = self.gather(node, x, out, x.dtype.limits()[0])
        if len(outs) == 1:
            return make(node, ins, outs, [define(out, axes, reduce_(carried("max", x.dtype), k_axes, value) if k_axes else value)])
        _, n, c, _ = join_axes(node, out)
        spatial = list(split_shape(node, need(node, 0))[2])
        order = list(reversed(range(len(at)))) if int(node.attrs.get("storage_order", 0)) else list(range(len(at)))
        pos = ZERO
        for d in order:
            pos = pos * spatial[d] + at[d]
        pos = pos + (n.var * c.extent + c.var) * product(spatial)
        best = reduce_("argmax", k_axes, value, cast(pos, i64), where=mask)
        return make(node, ins, outs, [define(out, axes, proj(best, 0, x.dtype)), define(outs[1], axes, proj(best, 1, i64))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        node = pinned(node, arrays)
        x = first(node, arrays[0])
        low = float("-inf") if x.dtype.kind not in "iu" else np.iinfo(x.dtype).min
        p = self.patches(node, x, low)
        r = len(self.windows(node))
        y = p.max(axis=tuple(range(2 + r, 2 + 2 * r)))
        if len(node.outputs) < 2:
            return [back(node, y).astype(x.dtype)]
        ids = np.arange(int(np.prod(x.shape[2:])), dtype=np.int64).reshape(x.shape[2:], order="F" if int(node.attrs.get("storage_order", 0)) else "C")
        ids = ids + np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *(1,) * r) * ids.size
        j = self.patches(node, ids, -1)
        flat_p, flat_j = p.reshape(*y.shape, -1), j.reshape(*y.shape, -1)
        best = np.where(((flat_p == y[..., None]) | (flat_p != flat_p)) & (flat_j >= 0), flat_j, np.iinfo(np.int64).max).min(-1)
        return [back(node, y).astype(x.dtype), back(node, best)]


@op("AveragePool")
class AveragePool(Pool):
    """The mean of each window; ``count_include_pad`` counts the padding as elements."""

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        axes, k_axes, value, _, _, o = self.gather(node, x, out, 0)
        e = sum_(k_axes, widen(value)) if k_axes else widen(value)
        n = product(self.count(node, w, a.var) for w, a in zip(self.windows(node), o, strict=True))
        e = e * const(1 / n.attr, e.dtype) if n.op == "const" and n.attr & (n.attr - 1) == 0 else e / cast(n, e.dtype)
        return make(node, ins, outs, [define(out, axes, e)])

    @staticmethod
    def count(node: Node, w: Window, o: Expr) -> Expr:
        """How many taps of one dimension count for output ``o``."""
        if int(node.attrs.get("count_include_pad", 0)):
            if not int(node.attrs.get("ceil_mode", 0)):
                return const(w.taps)
            return minimum((w.n + w.hi - 1 + w.lo - o * w.stride) // w.dilation, w.k - 1) + 1
        lowest = maximum(ceil_div(w.lo - o * w.stride, w.dilation), 0)
        highest = minimum((w.n - 1 + w.lo - o * w.stride) // w.dilation, w.k - 1)
        return highest - lowest + 1

    def infer(self, node: Node) -> Sequence[TensorType]:
        if not need(node, 0).dtype.is_float:
            raise type_error(node, "AveragePool takes floats")
        return super().infer(node)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        node = pinned(node, arrays)
        x = first(node, arrays[0])
        r = len(self.windows(node))
        last = tuple(range(2 + r, 2 + 2 * r))
        total = self.patches(node, up(x), 0).sum(last)
        ones = np.ones((1, 1, *x.shape[2:]))
        if int(node.attrs.get("count_include_pad", 0)):
            wins = self.windows(node)
            ones = np.pad(ones, [(0, 0), (0, 0), *((int(w.lo.attr), int(w.hi.attr)) for w in wins)], constant_values=1)
            n = self.padded_count(wins, ones)
        else:
            n = self.patches(node, ones, 0).sum(last)
        return [back(node, total / n).astype(x.dtype)]

    @staticmethod
    def padded_count(wins: Sequence[Window], ones: Array) -> Array:
        """Elements of each window inside of the padded input."""
        out = np.ones((1, 1))
        for w, n in zip(wins, ones.shape[2:], strict=True):
            o = np.arange(int(w.out.attr))[:, None] * w.stride + np.arange(w.taps)[None] * w.dilation
            c = (o < n).sum(1)
            out = out[..., None] * c
        return out


def power_mean(x: Expr, p: int) -> Expr:
    """|x| ** p for a small integer p."""
    a = unary("abs", x)
    if p == 1:
        return a
    if p == 2:
        return x * x
    return binary("pow", a, const(p, a.dtype))


def root(x: Expr, p: int) -> Expr:
    return x if p == 1 else unary("sqrt", x) if p == 2 else binary("pow", x, const(1 / p, x.dtype))


@op("LpPool")
class LpPool(Pool):
    """(sum |x| ** p) ** (1 / p) of each window."""

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        p = int(node.attrs.get("p", 2))
        axes, k_axes, value, *_ = self.gather(node, must(ins, 0), outs[0], 0)
        e = power_mean(widen(value), p)
        return make(node, ins, outs, [define(outs[0], axes, root(sum_(k_axes, e) if k_axes else e, p))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        node = pinned(node, arrays)
        p, x = int(node.attrs.get("p", 2)), first(node, arrays[0])
        r = len(self.windows(node))
        s = (np.abs(self.patches(node, up(x), 0)) ** p).sum(tuple(range(2 + r, 2 + 2 * r)))
        return [back(node, s ** (1 / p)).astype(x.dtype)]


class GlobalPool(Op):
    """A reduction over all spatial dimensions, which stay as 1."""

    kind = "reduction"
    channels_last = True

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        n, c, spatial = split_shape(node, x)
        if not x.dtype.is_float:
            raise type_error(node, f"{node.op} takes floats")
        return [TensorType.of(x.dtype, join_shape(node, n, c, [1] * len(spatial)))]

    def reduce(self, node: Node, axes: Sequence[Axis], x: Expr) -> Expr:
        raise NotImplementedError

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes, n, c, _ = join_axes(node, outs[0])
        reds = [axis(f"k{i}", s) for i, s in enumerate(split_shape(node, need(node, 0))[2])]
        value = load(must(ins, 0), join_shape(node, n.var, c.var, [a.var for a in reds]))
        return make(node, ins, outs, [define(outs[0], axes, self.reduce(node, reds, value))])

    def ref(self, node: Node, x: Array, axes: tuple[int, ...]) -> Any:
        raise NotImplementedError

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = first(node, arrays[0])
        y = self.ref(node, up(x), tuple(range(2, x.ndim)))
        return [back(node, np.asarray(y).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))).astype(x.dtype)]


@op("GlobalAveragePool")
class GlobalAveragePool(GlobalPool):
    def reduce(self, node: Node, axes: Sequence[Axis], x: Expr) -> Expr:
        s = sum_(axes, widen(x))
        return s / cast(product(a.extent for a in axes), s.dtype)

    def ref(self, node: Node, x: Array, axes: tuple[int, ...]) -> Any:
        return x.mean(axes)


@op("GlobalMaxPool")
class GlobalMaxPool(GlobalPool):
    def reduce(self, node: Node, axes: Sequence[Axis], x: Expr) -> Expr:
        return reduce_(carried("max", x.dtype), tuple(axes), x)

    def ref(self, node: Node, x: Array, axes: tuple[int, ...]) -> Any:
        return x.max(axes)


@op("GlobalLpPool")
class GlobalLpPool(GlobalPool):
    def reduce(self, node: Node, axes: Sequence[Axis], x: Expr) -> Expr:
        p = int(node.attrs.get("p", 2))
        return root(sum_(axes, power_mean(widen(x), p)), p)

    def ref(self, node: Node, x: Array, axes: tuple[int, ...]) -> Any:
        p = int(node.attrs.get("p", 2))
        return (np.abs(x) ** p).sum(axes) ** (1 / p)


@op("MaxUnpool")
class MaxUnpool(Op):
    """(X, I, output_shape?): every element goes back to the flat position that MaxPool took it from; zeros elsewhere."""

    kind = "opaque"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if node.input(2) is not None:
            shape = content_or_symbols(node, 2)
            if len(shape) != x.rank:
                raise shape_error(node, f"output_shape has {len(shape)} extents for rank {x.rank}")
            return [like(x.type, shape)]
        return [like(x.type, self.default(node))]

    def indexed(self, node: Node) -> Sequence[Indexed]:
        return [Indexed(1, (ZERO,), (product(self.default(node)) - 1,))]

    def default(self, node: Node) -> list[Expr]:
        x = need(node, 0)
        r = x.rank - 2
        k, s, p = attr_ints(node, "kernel_shape", r, 1), attr_ints(node, "strides", r, 1), attr_ints(node, "pads", 2 * r, 0)
        return [*x.shape[:2], *((n - 1) * s[i] + k[i] - p[i] - p[i + r] for i, n in enumerate(x.shape[2:]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        out = outs[0]
        over = axes_of(must(ins, 0).shape, "u")
        here = tuple(a.var for a in over)
        # indices count in the tensor that the pooling saw
        shape = tuple(self.default(node))
        pos = to_index(load(must(ins, 1), here))
        at = unravel(pos, shape)
        where = land(ZERO <= pos, *(inside(i, s) for i, s in zip(at, out.shape, strict=True)))
        lets: list[LetStmt] = [Push(out, axes_of(out.shape), const(0, out.dtype), over, tuple(at), load(must(ins, 0), here), "set", where)]
        return make(node, ins, outs, lets)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        node = pinned(node, arrays)
        x, j = np.asarray(arrays[0]), np.asarray(arrays[1]).astype(np.int64)
        inner = [*x.shape[:2], *(int(d.attr) for d in self.default(node)[2:])]
        shape = [int(d) for d in arrays[2]] if len(arrays) > 2 and arrays[2] is not None else inner
        y = np.zeros(shape, x.dtype)
        at = np.stack(np.unravel_index(j.reshape(-1), inner), -1)
        for p, v in zip(at, x.reshape(-1), strict=True):
            y[tuple(p)] = v
        return [y]


