"""Normalisations. Statistics are computed in f32 (f64 stays), the variance from centred values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, LetStmt, axis, reduce_, sum_
from luthier.ir.expr import Expr, binary, cast, const, land, load, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ONE,
    ZERO,
    Array,
    at,
    axes_of,
    broadcast,
    check_axis,
    define,
    differ,
    get,
    make,
    must,
    need,
    product,
    shape_error,
    static,
    temp,
    type_error,
    wide,
    widen,
    window_size,
)


def f64(a: Any) -> Array:
    return np.asarray(a).astype(np.float64)


def epsilon(node: Node, default: float = 1e-5) -> float:
    return float(node.attrs.get("epsilon", default))


def _floats(node: Node) -> None:
    if not need(node, 0).dtype.is_float:
        raise type_error(node, f"{node.op} takes floats")


def here(axes: Sequence[Axis]) -> list[Expr]:
    return [a.var for a in axes]


class Statistics:
    """Mean and 1 / sqrt(variance + eps) of ``value`` over ``reds`` for every point of ``rows``, as lets."""

    def __init__(self, out: Buffer, rows: Sequence[Axis], reds: Sequence[Axis], value: Expr, eps: float, centre: bool = True) -> None:
        n = cast(product(a.extent for a in reds), value.dtype)
        self.lets: list[LetStmt] = []
        self.rows = tuple(rows)
        self.mean: Expr | None = None
        if centre:
            mean = temp(out, "mean", rows, sum_(reds, value) / n)
            self.lets.append(mean)
            self.mean = load(mean.buf, here(rows))
            value = value - self.mean
        var = temp(out, "var", rows, sum_(reds, value * value) / n)
        inv = temp(out, "inv", rows, const(1.0, value.dtype) / unary("sqrt", load(var.buf, here(rows)) + const(eps, value.dtype)))
        self.lets += [var, inv]
        self.var = load(var.buf, here(rows))
        self.inv = load(inv.buf, here(rows))


def normalized(x: Expr, s: Statistics) -> Expr:
    return (x if s.mean is None else x - s.mean) * s.inv


class RowNorm(Op):
    """Layer normalisation over the dimensions from ``axis`` on; ``centre`` subtracts the mean (LayerNorm) or not (RMSNorm).

    ``parts``: which inputs are the scale and the bias; ``extra``: inputs added to the first one before."""

    kind = "reduction"
    centre = True
    scale, bias = 1, 2
    extra: tuple[int, ...] = ()
    default_eps = 1e-5

    def axis(self, node: Node) -> int:
        return check_axis(node, node.attrs.get("axis", -1), need(node, 0).rank)

    def infer(self, node: Node) -> Sequence[TensorType]:
        _floats(node)
        x = need(node, 0)
        a = self.axis(node)
        for i in (self.scale, self.bias, *self.extra):
            v = node.input(i)
            if v is not None and not v.dtype.is_float:
                raise type_error(node, f"input {i} ({v.name}) should be floats")
            if v is not None and (len(whole := broadcast(node, x.shape, v.shape)) != x.rank or any(differ(d, e) for d, e in zip(whole, x.shape, strict=True))):
                raise shape_error(node, f"input {i} does not broadcast to the first one")
        stat = TensorType.of(wide(x.dtype), (*x.shape[:a], *(1,) * (x.rank - a)))
        return [x.type, *self.further(x.type, stat)]

    def further(self, x: TensorType, stat: TensorType) -> list[TensorType]:
        return [stat, stat]

    def added(self, ins: Sequence[Buffer | None], axes: Sequence[Axis]) -> Expr:
        """The tensor that is normalised, at a point."""
        e = widen(load(must(ins, 0), here(axes)))
        for i in self.extra:
            b = get(ins, i)
            if b is not None:
                e = e + widen(at(b, axes))
        return e

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        a = self.axis(node)
        axes = axes_of(out.shape)
        rows = axes[:a]
        reds = [axis(f"k{i}", s) for i, s in enumerate(x.shape[a:])]
        lets: list[LetStmt] = []
        inner, value = self.added(ins, (*rows, *reds)), self.added(ins, axes)
        if any(get(ins, i) is not None for i in self.extra):
            total = temp(out, "in", axes, value)
            lets.append(total)
            inner, value = load(total.buf, here((*rows, *reds))), load(total.buf, here(axes))
        s = Statistics(out, rows, reds, inner, epsilon(node, self.default_eps), self.centre)
        e = normalized(value, s)
        scale, bias = get(ins, self.scale), get(ins, self.bias)
        if scale is not None:
            e = e * widen(at(scale, axes))
        if bias is not None and self.bias >= 0:
            e = e + widen(at(bias, axes))
        lets += [*s.lets, define(out, axes, e)]
        for k, b in enumerate(outs[1:], 1):
            lets.append(self.statistic(k, b, s, value))
        return make(node, ins, outs, lets)

    def statistic(self, k: int, b: Buffer, s: Statistics, value: Expr) -> LetStmt:
        """Output ``k`` after the first: mean and inverse deviation (only the latter for RMSNorm), then the sum that was normalised."""
        ax = axes_of(b.shape)
        if k == 3:
            return define(b, ax, value)
        which = s.mean if k == 1 and s.mean is not None else s.inv
        return define(b, ax, which)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x0 = np.asarray(arrays[0])
        x = f64(x0)
        for i in self.extra:
            if i < len(arrays) and arrays[i] is not None:
                x = x + f64(arrays[i])
        a = int(node.attrs.get("axis", -1)) % x.ndim
        over = tuple(range(a, x.ndim))
        mean = x.mean(over, keepdims=True) if self.centre else np.zeros(())
        inv = 1 / np.sqrt(np.square(x - mean).mean(over, keepdims=True) + epsilon(node, self.default_eps))
        y = (x - mean) * inv
        if self.scale < len(arrays) and arrays[self.scale] is not None:
            y = y * f64(arrays[self.scale])
        if 0 <= self.bias < len(arrays) and arrays[self.bias] is not None:
            y = y + f64(arrays[self.bias])
        st = np.float64 if x0.dtype == np.float64 else np.float32
        stats = [mean.astype(st) if self.centre else inv.astype(st), inv.astype(st), x.astype(x0.dtype)]
        return [y.astype(x0.dtype), *stats][: max(len(node.outputs), 1)]


@op("LayerNormalization")
class LayerNormalization(RowNorm):
    """(X, Scale, B?) -> (Y, Mean?, InvStdDev?)."""


@op("RMSNormalization", "SimplifiedLayerNormalization")
class RMSNormalization(RowNorm):
    """(X, scale) -> Y: x / sqrt(mean(x x) + eps) * scale. The second output, where asked for, is the inverse deviation."""

    centre = False
    bias = -1


class SkipNorm(RowNorm):
    default_eps = 1e-12

    def further(self, x: TensorType, stat: TensorType) -> list[TensorType]:
        return [stat, stat, x]


@op("com.microsoft::SkipLayerNormalization")
class SkipLayerNormalization(SkipNorm):
    """(input, skip, gamma, beta?, bias?) -> (Y, mean?, inv_std?, input + skip + bias?)."""

    scale, bias, extra = 2, 3, (1, 4)


@op("com.microsoft::SkipSimplifiedLayerNormalization")
class SkipSimplifiedLayerNormalization(SkipNorm):
    """(input, skip, gamma, bias?): the same without mean and beta."""

    centre = False
    scale, bias, extra = 2, -1, (1, 3)


def channel_shape(node: Node, rank: int, i: int, c: Expr) -> None:
    v = node.input(i)
    if v is not None and (v.rank != 1 or differ(v.shape[0], c)):
        raise shape_error(node, f"input {i} must have one element per channel ({c!r})")
    if rank < 2:
        raise shape_error(node, f"{node.op} takes a batch of channels")


@op("InstanceNormalization")
class InstanceNormalization(Op):
    """(X [N, C, D...], scale [C], B [C]): statistics of every channel of every batch entry."""

    kind = "reduction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        _floats(node)
        x = need(node, 0)
        for i in (1, 2):
            need(node, i)
            channel_shape(node, x.rank, i, x.shape[1])
        return [x.type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        axes = axes_of(out.shape)
        rows = axes[:2]
        reds = [axis(f"k{i}", d) for i, d in enumerate(x.shape[2:])]
        s = Statistics(out, rows, reds, widen(load(x, here((*rows, *reds)))), epsilon(node))
        c = axes[1].var
        e = normalized(widen(load(x, here(axes))), s) * widen(must(ins, 1)[c]) + widen(must(ins, 2)[c])
        return make(node, ins, outs, [*s.lets, define(out, axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = f64(arrays[0])
        over = tuple(range(2, x.ndim))
        d = x - x.mean(over, keepdims=True)
        y = d / np.sqrt(np.square(d).mean(over, keepdims=True) + epsilon(node))
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return [(y * f64(arrays[1]).reshape(shape) + f64(arrays[2]).reshape(shape)).astype(np.asarray(arrays[0]).dtype)]


@op("GroupNormalization")
class GroupNormalization(Op):
    """(X [N, C, D...], scale [C], bias [C]): statistics of ``num_groups`` runs of channels."""

    kind = "reduction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        _floats(node)
        x, g = need(node, 0), int(node.attrs["num_groups"])
        c = static(node, x.shape[1], "the number of channels")
        if c % g:
            raise shape_error(node, f"{c} channels do not divide into {g} groups")
        for i in (1, 2):
            need(node, i)
            channel_shape(node, x.rank, i, x.shape[1])
        return [x.type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out, g = must(ins, 0), outs[0], int(node.attrs["num_groups"])
        per = int(x.shape[1].attr) // g
        axes = axes_of(out.shape)
        rows = (axes[0], axis("g", g))
        reds = [axis("c", per), *(axis(f"k{i}", d) for i, d in enumerate(x.shape[2:]))]
        value = widen(load(x, [rows[0].var, rows[1].var * per + reds[0].var, *here(reds[1:])]))
        s = Statistics(out, rows, reds, value, epsilon(node))
        group = axes[1].var // per
        from luthier.ir.expr import substitute

        mean, inv = (substitute(e, {rows[1].var: group}) for e in (s.mean, s.inv) if e is not None)
        c = axes[1].var
        e = (widen(load(x, here(axes))) - mean) * inv * widen(must(ins, 1)[c]) + widen(must(ins, 2)[c])
        return make(node, ins, outs, [*s.lets, define(out, axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, g = f64(arrays[0]), int(node.attrs["num_groups"])
        y = x.reshape(x.shape[0], g, -1)
        d = y - y.mean(2, keepdims=True)
        y = (d / np.sqrt(np.square(d).mean(2, keepdims=True) + epsilon(node))).reshape(x.shape)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return [(y * f64(arrays[1]).reshape(shape) + f64(arrays[2]).reshape(shape)).astype(np.asarray(arrays[0]).dtype)]


@op("BatchNormalization")
class BatchNormalization(Op):
    """(X, scale, B, mean, var) -> Y; with ``training_mode`` (Y, running mean, running variance) from the batch itself."""

    kind = "elementwise"

    def training(self, node: Node) -> bool:
        return bool(int(node.attrs.get("training_mode", 0)))

    def infer(self, node: Node) -> Sequence[TensorType]:
        _floats(node)
        x = need(node, 0)
        c = x.shape[1] if x.rank > 1 else ONE
        for i in range(1, 5):
            need(node, i)
            channel_shape(node, max(x.rank, 2), i, c)
        return [x.type, need(node, 3).type, need(node, 4).type] if self.training(node) else [x.type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        axes = axes_of(out.shape)
        c = axes[1] if len(axes) > 1 else None
        cv = ZERO if c is None else c.var
        scale, b = widen(must(ins, 1)[cv]), widen(must(ins, 2)[cv])
        value = widen(load(x, here(axes)))
        if not self.training(node):
            mean, var = widen(must(ins, 3)[cv]), widen(must(ins, 4)[cv])
            inv = const(1.0, value.dtype) / unary("sqrt", cast(var, value.dtype) + const(epsilon(node), value.dtype))
            e = (value - cast(mean, value.dtype)) * (inv * cast(scale, value.dtype)) + cast(b, value.dtype)
            return make(node, ins, outs, [define(out, axes, e)])
        assert c is not None
        reds = [axis(f"k{i}", a.extent) for i, a in enumerate(axes) if i != 1]
        inner = widen(load(x, [reds[0].var, cv, *here(reds[1:])]))
        s = Statistics(out, (c,), reds, inner, epsilon(node))
        e = normalized(value, s) * cast(scale, value.dtype) + cast(b, value.dtype)
        lets = [*s.lets, define(out, axes, e)]
        m = float(node.attrs.get("momentum", 0.9))
        for k, now in zip((1, 2), (s.mean, s.var), strict=True):
            if k < len(outs):
                assert now is not None
                old = widen(must(ins, k + 2)[cv])
                lets.append(define(outs[k], (c,), old * const(m, old.dtype) + cast(now, old.dtype) * const(1 - m, old.dtype)))
        return make(node, ins, outs, lets)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, scale, b, mean, var = (f64(a) for a in arrays)
        shape = (1, -1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else (-1,)
        outs = []
        if self.training(node):
            over = (0, *range(2, x.ndim))
            now, spread = x.mean(over), x.var(over)
            m = float(node.attrs.get("momentum", 0.9))
            outs = [(mean * m + now * (1 - m)).astype(arrays[3].dtype), (var * m + spread * (1 - m)).astype(arrays[4].dtype)]
            mean, var = now, spread
        y = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + epsilon(node)) * scale.reshape(shape) + b.reshape(shape)
        return [y.astype(np.asarray(arrays[0]).dtype), *outs]


@op("LpNormalization")
class LpNormalization(Op):
    """x / norm along ``axis`` with ``p`` 1 or 2; 0 where the norm is 0."""

    kind = "reduction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        _floats(node)
        check_axis(node, node.attrs.get("axis", -1), need(node, 0).rank)
        if int(node.attrs.get("p", 2)) not in (1, 2):
            raise shape_error(node, "p must be 1 or 2")
        return [need(node, 0).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out, p = must(ins, 0), outs[0], int(node.attrs.get("p", 2))
        a = check_axis(node, node.attrs.get("axis", -1), x.rank)
        axes = axes_of(out.shape)
        rows = [ax for i, ax in enumerate(axes) if i != a]
        k = axis("k0", axes[a].extent)
        v = widen(load(x, [k.var if i == a else ax.var for i, ax in enumerate(axes)]))
        total = temp(out, "sum", rows, sum_(k, unary("abs", v) if p == 1 else v * v))
        n = load(total.buf, here(rows))
        norm = temp(out, "norm", rows, n if p == 1 else unary("sqrt", n))
        n = load(norm.buf, here(rows))
        v = widen(load(x, here(axes)))
        return make(node, ins, outs, [total, norm, define(out, axes, select(n.eq(0.0), const(0, v.dtype), v / n))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, a = f64(arrays[0]), int(node.attrs.get("axis", -1))
        n = np.abs(x).sum(a, keepdims=True) if int(node.attrs.get("p", 2)) == 1 else np.sqrt(np.square(x).sum(a, keepdims=True))
        return [np.divide(x, n, out=np.zeros_like(x), where=n != 0).astype(np.asarray(arrays[0]).dtype)]


@op("MeanVarianceNormalization")
class MeanVarianceNormalization(Op):
    """(x - mean) / (deviation + 1e-9) over ``axes`` (default 0, 2, 3)."""

    kind = "reduction"

    def over(self, node: Node) -> set[int]:
        return {check_axis(node, a, need(node, 0).rank) for a in node.attrs.get("axes", (0, 2, 3))}

    def infer(self, node: Node) -> Sequence[TensorType]:
        _floats(node)
        self.over(node)
        return [need(node, 0).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out, over = must(ins, 0), outs[0], self.over(node)
        axes = axes_of(out.shape)
        rows = [a for i, a in enumerate(axes) if i not in over]
        reds = {i: axis(f"k{i}", axes[i].extent) for i in sorted(over)}
        v = widen(load(x, [reds[i].var if i in over else a.var for i, a in enumerate(axes)]))
        s = Statistics(out, rows, list(reds.values()), v, 0.0)
        dev = temp(out, "dev", rows, unary("sqrt", s.var) + const(1e-9, v.dtype))
        assert s.mean is not None
        e = (widen(load(x, here(axes))) - s.mean) / load(dev.buf, here(rows))
        lets = [x for x in s.lets if not getattr(x, "name", "").endswith(".inv")]
        return make(node, ins, outs, [*lets, dev, define(out, axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, over = f64(arrays[0]), tuple(sorted(self.over(node)))
        return [((x - x.mean(over, keepdims=True)) / (x.std(over, keepdims=True) + 1e-9)).astype(np.asarray(arrays[0]).dtype)]


@op("LRN")
class LRN(Op):
    """x / (bias + alpha / size * sum of squares over ``size`` neighbouring channels) ** beta."""

    kind = "reduction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        _floats(node)
        if need(node, 0).rank < 3:
            raise shape_error(node, "LRN takes [N, C, D...]")
        window_size(node, "size")
        return [need(node, 0).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out, size = must(ins, 0), outs[0], int(node.attrs["size"])
        axes = axes_of(out.shape)
        k = axis("k0", size)
        c = axes[1].var + k.var - (size - 1) // 2
        v = widen(load(x, [axes[0].var, c, *here(axes[2:])], land(ZERO <= c, c < axes[1].extent)))
        total = temp(out, "sum", axes, reduce_("sum", (k,), v * v))
        t = v.dtype
        base = load(total.buf, here(axes)) * const(float(node.attrs.get("alpha", 1e-4)) / size, t) + const(float(node.attrs.get("bias", 1.0)), t)
        e = widen(load(x, here(axes))) / binary("pow", base, const(float(node.attrs.get("beta", 0.75)), t))
        return make(node, ins, outs, [total, define(out, axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, size = f64(arrays[0]), int(node.attrs["size"])
        lo = (size - 1) // 2
        p = np.pad(np.square(x), [(0, 0), (lo, size - 1 - lo), *[(0, 0)] * (x.ndim - 2)])
        s = sum(p[:, k : k + x.shape[1]] for k in range(size))
        y = x / (float(node.attrs.get("bias", 1.0)) + float(node.attrs.get("alpha", 1e-4)) / size * s) ** float(node.attrs.get("beta", 0.75))
        return [y.astype(np.asarray(arrays[0]).dtype)]


