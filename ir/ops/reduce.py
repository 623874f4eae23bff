"""Reductions along axes: Reduce*, ArgMax, ArgMin.

Narrow floats accumulate in f32. Axes may come at run time; then every dimension is walked and elements that do not belong to the
output element are left out. An empty reduction gives the identity: 0, 1, the lowest or the highest value. ReduceMax and ReduceMin are NaN
where an element is, and ArgMax and ArgMin give the position of the first NaN (the last one with ``select_last_index``), as in numpy and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, LetStmt, axis, carried, reduce_
from luthier.ir.dtypes import DType, f32, i64
from luthier.ir.expr import Expr, binary, cast, const, land, lnot, load, lor, proj, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.interpret.semantics import convert
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ONE,
    ZERO,
    Array,
    axes_of,
    check_axis,
    contents,
    define,
    flag,
    like,
    make,
    must,
    need,
    object_content,
    product,
    register,
    temp,
    type_error,
    wide,
)
from luthier.ir.ops.shape import choose, given_axes, total_of


def float_of(d: DType) -> DType:
    """The float type to compute a float function of ``d`` in."""
    return wide(d) if d.is_float else f32


class Layout:
    """How a reduction of ``shape`` over some axes reads its input.

    ``out``: output extents. ``bind(axes)``: (coordinates in the input, reduction axes, condition) for a point of the output."""

    def __init__(self, shape: Sequence[Expr], axes: Sequence[Expr], keep: bool) -> None:
        self.shape, self.keep = tuple(shape), keep
        self.static = all(a.op == "const" for a in axes)
        n = len(self.shape)
        self.hit = [lor(*(a.eq(d) for a in axes)) for d in range(n)]
        if self.static:
            hits = [bool(h.attr) for h in self.hit]
            self.out = tuple(ONE if h else s for h, s in zip(hits, self.shape, strict=True) if keep or not h)
        elif keep:
            self.out = tuple(select(h, ONE, s) for h, s in zip(self.hit, self.shape, strict=True))
        else:
            self.out = tuple(total_of(select(land(lnot(self.hit[d]), self.place(d).eq(k)), s, ZERO) for d, s in enumerate(self.shape)) for k in range(n - len(axes)))

    def place(self, d: int) -> Expr:
        """Where kept dimension ``d`` stands in the output (axes not kept)."""
        return const(d) - total_of(flag(h) for h in self.hit[:d])

    def bind(self, axes: Sequence[Axis]) -> tuple[list[Expr], list[Axis], Expr | None]:
        idx: list[Expr] = []
        reds: list[Axis] = []
        if self.static:
            k = 0
            for d, s in enumerate(self.shape):
                if self.hit[d].attr:
                    a = axis(f"k{d}", s)
                    reds.append(a)
                    idx.append(a.var)
                    k += self.keep
                else:
                    idx.append(axes[k].var)
                    k += 1
            return idx, reds, None
        conds = []
        for d, s in enumerate(self.shape):
            a = axis(f"k{d}", s)
            reds.append(a)
            idx.append(a.var)
            o = axes[d].var if self.keep else choose([x.var for x in axes], self.place(d)) if axes else ZERO
            conds.append(lor(self.hit[d], a.var.eq(o)))
        return idx, reds, land(*conds)

    def count(self) -> Expr:
        """Elements that one output element combines."""
        return product(select(h, s, ONE) for h, s in zip(self.hit, self.shape, strict=True))


class Reduction(Op):
    """``post(combine(pre(x)), n)`` over ``axes`` (second input; default all, unless ``noop_with_empty_axes``)."""

    kind = "reduction"

    def __init__(
        self, monoid: str, ref: Callable[..., Any], pre: Callable[[Expr], Expr] | None = None,
        post: Callable[[Expr, Expr], Expr] | None = None, floating: bool = False,
    ) -> None:
        self.monoid, self.ref, self.pre, self.post, self.floating = monoid, ref, pre, post, floating

    def axes(self, node: Node) -> list[Expr] | None:
        """None: nothing is reduced."""
        x = need(node, 0)
        given = [] if node.input(1) is None else given_axes(node, 1, x.rank)
        if not given:
            return None if int(node.attrs.get("noop_with_empty_axes", 0)) else [const(d) for d in range(x.rank)]
        return given

    def layout(self, node: Node) -> Layout:
        return Layout(need(node, 0).shape, self.axes(node) or [], bool(int(node.attrs.get("keepdims", 1))))

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if x.dtype.is_bool and self.monoid not in ("max", "min"):
            raise type_error(node, f"{node.op} takes numbers")
        return [like(x.type, self.layout(node).out)]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        """Products, sums, largest and smallest of shape elements."""
        c, axes = contents(node, 0), self.axes(node)
        fold: Any = {"prod": np.multiply, "sum": np.add}.get(self.monoid)
        if c is None or axes is None or fold is None or self.pre or self.post or any(a.op != "const" for a in axes):
            return None
        out = c[0]
        for a in sorted((a.attr for a in axes), reverse=True):
            if not out.shape[a]:
                return None
            out = fold.reduce(out, axis=a, keepdims=bool(int(node.attrs.get("keepdims", 1))))
        return object_content(np.asarray(out, object))

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        lay = self.layout(node)
        axes = axes_of(out.shape)
        idx, reds, where = lay.bind(axes)
        return make(node, ins, outs, self.lets(out, axes, load(x, idx), reds, where, lay))

    def lets(self, out: Buffer, axes: Sequence[Axis], v: Expr, reds: list[Axis], where: Expr | None, lay: Layout) -> list[LetStmt]:
        if v.dtype.is_bool:
            e = reduce_("any" if self.monoid == "max" else "all", reds, v, where=where) if reds else v
            return [define(out, axes, e)]
        if self.monoid in ("max", "min"):
            return [define(out, axes, reduce_(carried(self.monoid, v.dtype), reds, v, where=where) if reds else v)]
        v = cast(v, float_of(v.dtype) if self.floating else wide(v.dtype))
        v = self.pre(v) if self.pre else v
        e = reduce_(self.monoid, reds, v, where=where) if reds else v
        return [define(out, axes, self.post(e, lay.count()) if self.post else e)]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        axes = tuple(int(a) for a in np.asarray(arrays[1]).reshape(-1)) if len(arrays) > 1 and arrays[1] is not None else ()
        if not axes and int(node.attrs.get("noop_with_empty_axes", 0)):
            axes = ()
        elif not axes:
            axes = tuple(range(x.ndim))
        d = need(node, 0).dtype
        up = x if not self.floating and (x.dtype.kind in "iub" or self.monoid in ("max", "min")) else x.astype(np.float64)
        with np.errstate(all="ignore"):
            return [convert(np.asarray(self.ref(up, axes, bool(int(node.attrs.get("keepdims", 1))))), d)]


def _np_max(low: bool) -> Callable[..., Any]:
    def f(x: Array, axes: tuple[int, ...], keep: bool) -> Any:
        if x.dtype.kind == "b":
            return (np.all if low else np.any)(x, axis=axes, keepdims=keep)
        fl = x.dtype.kind not in "iu"
        start = (np.inf if low else -np.inf) if fl else (np.iinfo(x.dtype).max if low else np.iinfo(x.dtype).min)
        least: Any = np.min if low else np.max
        return least(x, axis=axes, keepdims=keep, initial=np.asarray(start, x.dtype)[()])

    return f


def _lse(x: Array, axes: tuple[int, ...], keep: bool) -> Any:
    if not x.size:
        return np.log(np.sum(np.exp(x), axis=axes, keepdims=keep))
    m = np.max(x, axis=axes, keepdims=True)
    m = np.where(np.isinf(m), 0, m)
    return np.log(np.sum(np.exp(x - m), axis=axes, keepdims=keep)) + (m if keep else np.squeeze(m, axes))


def _div_count(e: Expr, n: Expr) -> Expr:
    return e / cast(n, e.dtype) if e.dtype.is_float else binary("div", e, cast(n, e.dtype))


register("ReduceSum", Reduction("sum", lambda x, a, k: x.sum(axis=a, keepdims=k, dtype=x.dtype)))
register("ReduceProd", Reduction("prod", lambda x, a, k: x.prod(axis=a, keepdims=k, dtype=x.dtype)))
register("ReduceMax", Reduction("max", _np_max(False)))
register("ReduceMin", Reduction("min", _np_max(True)))
register("ReduceMean", Reduction("sum", lambda x, a, k: np.mean(x, axis=a, keepdims=k) if x.dtype.kind == "f" else np.trunc(np.mean(x, axis=a, keepdims=k)), post=_div_count))
register("ReduceL1", Reduction("sum", lambda x, a, k: np.abs(x).sum(axis=a, keepdims=k, dtype=x.dtype), pre=lambda x: unary("abs", x)))
register("ReduceSumSquare", Reduction("sum", lambda x, a, k: np.square(x).sum(axis=a, keepdims=k, dtype=x.dtype), pre=lambda x: x * x))
register(
    "ReduceL2",
    Reduction("sum", lambda x, a, k: np.sqrt(np.square(x).sum(axis=a, keepdims=k)), pre=lambda x: x * x, post=lambda e, n: unary("sqrt", e), floating=True),
)
register("ReduceLogSum", Reduction("sum", lambda x, a, k: np.log(x.sum(axis=a, keepdims=k)), post=lambda e, n: unary("log", e), floating=True))


class LogSumExp(Reduction):
    """log(sum(exp(x))), shifted by the largest element so that nothing overflows."""

    def __init__(self) -> None:
        super().__init__("sum", _lse, floating=True)

    def lets(self, out: Buffer, axes: Sequence[Axis], v: Expr, reds: list[Axis], where: Expr | None, lay: Layout) -> list[LetStmt]:
        v = cast(v, float_of(v.dtype))
        if not reds:
            return [define(out, axes, v)]
        top = temp(out, "max", axes, reduce_("max", reds, v, where=where))
        m = load(top.buf, [a.var for a in axes])
        shift = temp(out, "shift", axes, select(unary("isinf", m), const(0, m.dtype), m))
        m = load(shift.buf, [a.var for a in axes])
        total = temp(out, "sum", axes, reduce_("sum", reds, unary("exp", v - m), where=where))
        return [top, shift, total, define(out, axes, unary("log", load(total.buf, [a.var for a in axes])) + m)]


register("ReduceLogSumExp", LogSumExp())


class Arg(Op):
    """The position of the largest (smallest) element along ``axis``: the first, or the last with ``select_last_index``. NaN comes before
    every number in both, as in numpy and torch."""

    kind = "reduction"
    low = False

    def layout(self, node: Node) -> Layout:
        x = need(node, 0)
        a = check_axis(node, node.attrs.get("axis", 0), x.rank)
        return Layout(x.shape, [const(a)], bool(int(node.attrs.get("keepdims", 1))))

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [TensorType(i64, self.layout(node).out)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        idx, reds, _ = self.layout(node).bind(axes)
        x = load(must(ins, 0), idx)
        name = ("argmin" if self.low else "argmax") + ("_last" if int(node.attrs.get("select_last_index", 0)) else "")
        best = reduce_(name, reds, cast(x, wide(x.dtype)), cast(reds[0].var, i64))
        return make(node, ins, outs, [define(outs[0], axes, proj(best, 1, i64))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, a = np.asarray(arrays[0]), int(node.attrs.get("axis", 0))
        f = np.argmin if self.low else np.argmax
        if int(node.attrs.get("select_last_index", 0)):
            j = x.shape[a] - 1 - f(np.flip(x, a), axis=a)
        else:
            j = f(x, axis=a)
        return [np.asarray(np.expand_dims(j, a) if int(node.attrs.get("keepdims", 1)) else j, np.int64)]


@op("ArgMax")
class ArgMax(Arg):
    pass


@op("ArgMin")
class ArgMin(Arg):
    low = True


