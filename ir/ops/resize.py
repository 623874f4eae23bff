"""Resize: nearest, linear and cubic interpolation, separable over the dimensions, with and without antialiasing.

Every dimension that changes has *taps*: input positions with weights, functions of the output position. Coordinates are
computed in f32. Integer factors with the usual nearest modes become plain divisions of the index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, LetStmt, axis, sum_
from luthier.ir.dtypes import DType, f32, index
from luthier.ir.expr import Expr, cast, const, land, load, lor, maximum, minimum, select, unary
from luthier.ir.graph import Node, TensorType, content_or_symbols
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.interpret.semantics import convert
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    check_axis,
    define,
    float_content,
    like,
    make,
    must,
    need,
    pinned,
    same,
    shape_error,
    temp,
    type_error,
    wide,
)

MODES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize")


def num(v: float) -> Expr:
    return const(float(v), f32)


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension: extents ``n`` to ``out``; ``scale`` as given (None: out / n); ``roi`` (start, end) where there is one."""

    n: Expr
    out: Expr
    scale: Expr | None
    roi: tuple[Expr, Expr] | None

    @property
    def factor(self) -> Expr:
        """out / n as f32."""
        return self.scale if self.scale is not None else cast(self.out, f32) / cast(self.n, f32)

    @property
    def whole(self) -> int | None:
        """The factor when it is an integer."""
        if self.scale is not None:
            if self.scale.op == "const" and self.scale.attr == int(self.scale.attr) and self.scale.attr >= 1:
                return int(self.scale.attr)
            return None
        if self.n.op == "const" and self.out.op == "const":
            return self.out.attr // self.n.attr if self.n.attr and self.out.attr % self.n.attr == 0 and self.out.attr else None
        for k in (1, 2, 3, 4, 8):
            if same(self.out, self.n * k):
                return k
        return None

    def identity(self) -> bool:
        return self.whole == 1 and same(self.n, self.out) and (self.roi is None or (const_is(self.roi[0], 0.0) and const_is(self.roi[1], 1.0)))


def const_is(e: Expr, v: float) -> bool:
    return e.op == "const" and e.attr == v


def scaled_extent(n: Expr, s: Expr) -> Expr:
    """floor(n * s), exactly where ``s`` is an integer or a binary fraction."""
    if s.op == "const":
        for q in (1, 2, 4, 8):
            if s.attr * q == int(s.attr * q):
                return (n * int(s.attr * q)) // q
        if n.op == "const":
            return const(int(np.floor(np.float32(n.attr) * np.float32(s.attr))))
    return cast(unary("floor", cast(n, f32) * s), index)


def source(d: Dim, o: Expr, mode: str) -> Expr:
    """The input coordinate (f32) of output position ``o`` (index)."""
    x, s, n = cast(o, f32), d.factor, cast(d.n, f32)
    width = s * n if d.scale is not None else cast(d.out, f32)
    one = num(1)

    def over(a: Expr) -> Expr:
        """a / factor, with one rounding where both extents are known to be integers."""
        return a / s if d.scale is not None else a * n / cast(d.out, f32)

    if mode == "align_corners":
        return select(width.eq(one), num(0), x * (n - one) / select(width.eq(one), one, width - one))
    if mode == "asymmetric":
        return over(x)
    if mode == "tf_crop_and_resize":
        assert d.roi is not None
        a, b = d.roi
        span = (b - a) * (n - one)
        return select(width.eq(one), span * num(0.5), x * span / select(width.eq(one), one, width - one)) + a * (n - one)
    if mode == "pytorch_half_pixel":
        return select(width.eq(one), num(0), over(x + num(0.5)) - num(0.5))
    if mode == "half_pixel_symmetric":
        adjust = cast(d.out, f32) / width
        return n * num(0.5) * (one - adjust) + over(x + num(0.5)) - num(0.5)
    return over(x + num(0.5)) - num(0.5)


def nearest(d: Dim, o: Expr, mode: str, rounding: str) -> Expr:
    k = d.whole
    if k is not None and (d.scale is not None or same(d.out, d.n * k)):
        if (mode == "asymmetric" and rounding == "floor") or (mode in ("half_pixel", "pytorch_half_pixel") and rounding == "round_prefer_floor" and not same(d.out, const(1))):
            return o // k
    x = source(d, o, mode)
    r = {
        "floor": lambda: unary("floor", x), "ceil": lambda: unary("ceil", x), "round_prefer_ceil": lambda: unary("floor", x + num(0.5)),
        "round_prefer_floor": lambda: unary("ceil", x - num(0.5)),
    }[rounding]()  # fmt: skip
    return maximum(minimum(cast(r, index), d.n - 1), 0)


def cubic_weight(t: Expr, a: float) -> Expr:
    """Keys' kernel at distance ``t``."""
    t = unary("abs", t)
    near = ((num(a + 2) * t - num(a + 3)) * t) * t + num(1)
    far = ((num(a) * t - num(5 * a)) * t + num(8 * a)) * t - num(4 * a)
    return select(t <= num(1), near, select(t < num(2), far, num(0)))


@dataclass(frozen=True, slots=True)
class Taps:
    """``count`` positions ``first + k``, with weights ``weight(k)``; ``total``: what the weights add up to (None: 1)."""

    count: Any  # int, or an index expression when the factor comes at run time
    first: Expr
    frac: Expr
    stretch: Expr
    kernel: str
    a: float
    n: Expr
    exclude: bool
    normalize: bool

    def position(self, k: Expr) -> Expr:
        return maximum(minimum(self.first + k, self.n - 1), 0)

    def weight(self, k: Expr, lead: Any) -> Expr:
        """Weight of tap ``k``; ``lead``: taps before the pixel left of the coordinate."""
        t = (cast(k - lead, f32) - self.frac) * self.stretch
        w = cubic_weight(t, self.a) if self.kernel == "cubic" else maximum(num(1) - unary("abs", t), num(0))
        if self.exclude:
            p = self.first + k
            w = select(land(ZERO <= p, p < self.n), w, num(0))
        return w


@op("Resize")
class Resize(Op):
    """(X, roi?, scales?, sizes?): see the ONNX operator; any subset of dimensions, scales and sizes may come at run time."""

    kind = "injective"
    channels_last = True

    def attr(self, node: Node, name: str, default: str) -> str:
        return str(node.attrs.get(name, default))

    def dims(self, node: Node) -> list[Dim]:
        x = need(node, 0)
        axes = [check_axis(node, a, x.rank) for a in node.attrs.get("axes", range(x.rank))]
        out: list[Dim] = [Dim(n, n, num(1), None) for n in x.shape]
        scales = node.input(2) if node.input(2) is not None and not empty(node, 2) else None
        sizes = node.input(3) if node.input(3) is not None and not empty(node, 3) else None
        if (scales is None) == (sizes is None):
            raise shape_error(node, "give either scales or sizes")
        mode = self.attr(node, "coordinate_transformation_mode", "half_pixel")
        roi: list[tuple[Expr, Expr] | None] = [None] * len(axes)
        if mode == "tf_crop_and_resize":
            r = [cast(e, f32) for e in float_content(node, 1)]
            if len(r) != 2 * len(axes):
                raise shape_error(node, f"roi has {len(r)} elements for {len(axes)} axes")
            roi = [(r[k], r[k + len(axes)]) for k in range(len(axes))]
        if scales is not None:
            given = [cast(e, f32) for e in float_content(node, 2)]
            if len(given) != len(axes):
                raise shape_error(node, f"{len(given)} scales for {len(axes)} axes")
            for k, a in enumerate(axes):
                if given[k].op == "const" and not 0 < given[k].attr < 1 << 31:
                    raise shape_error(node, f"a scale is {given[k].attr}, it must be a positive number")
                out[a] = Dim(x.shape[a], scaled_extent(x.shape[a], given[k]), given[k], roi[k])
            return out
        want = content_or_symbols(node, 3)
        if len(want) != len(axes):
            raise shape_error(node, f"{len(want)} sizes for {len(axes)} axes")
        policy = self.attr(node, "keep_aspect_ratio_policy", "stretch")
        if policy == "stretch":
            for k, a in enumerate(axes):
                out[a] = Dim(x.shape[a], want[k], None, roi[k])
            return out
        s: Expr | None = None
        for k, a in enumerate(axes):
            r1 = cast(want[k], f32) / cast(x.shape[a], f32)
            s = r1 if s is None else minimum(s, r1) if policy == "not_larger" else maximum(s, r1)
        assert s is not None
        for k, a in enumerate(axes):
            out[a] = Dim(x.shape[a], cast(unary("floor", s * cast(x.shape[a], f32) + num(0.5)), index), s, roi[k])
        return out

    def infer(self, node: Node) -> Sequence[TensorType]:
        mode, how = self.attr(node, "mode", "nearest"), self.attr(node, "coordinate_transformation_mode", "half_pixel")
        if mode not in ("nearest", "linear", "cubic"):
            raise shape_error(node, f"unknown mode {mode!r}")
        if how not in MODES:
            raise shape_error(node, f"unknown coordinate_transformation_mode {how!r}")
        if (rounding := self.attr(node, "nearest_mode", "round_prefer_floor")) not in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
            raise shape_error(node, f"unknown nearest_mode {rounding!r}")
        x = need(node, 0)
        if mode != "nearest" and not (x.dtype.is_float or x.dtype.is_int):
            raise type_error(node, "interpolation takes numbers")
        return [like(x.type, (d.out for d in self.dims(node)))]

    def taps(self, node: Node, d: Dim, o: Expr) -> tuple[Taps, Any]:
        """Taps of one dimension, and how many of them lie before the pixel left of the coordinate."""
        mode = self.attr(node, "mode", "nearest")
        x = source(d, o, self.attr(node, "coordinate_transformation_mode", "half_pixel"))
        low = unary("floor", x)
        reach = 2 if mode == "cubic" else 1
        stretch = num(1)
        lead: Any = reach - 1
        count: Any = 2 * reach
        anti = bool(int(node.attrs.get("antialias", 0)))
        if anti:
            s = d.factor
            if s.op != "const":
                stretch = minimum(s, num(1))
                lead = ZERO - (cast(unary("floor", num(-reach) / stretch), index) + 1)
                count = lead * 2 + 2
            elif s.attr < 1:
                lead = -(math.floor(-reach / s.attr) + 1)
                count = 2 * lead + 2
                stretch = s
        exclude = bool(int(node.attrs.get("exclude_outside", 0)))
        return Taps(
            count, cast(low, index) - lead, x - low, stretch, mode, float(node.attrs.get("cubic_coeff_a", -0.75)), d.n, exclude,
            exclude or (anti and not const_is(stretch, 1.0)),
        ), lead

    def outside(self, node: Node, dims: Sequence[Dim], axes: Sequence[Axis]) -> Expr:
        """True where tf_crop_and_resize leaves the input."""
        conds = []
        for d, a in zip(dims, axes, strict=True):
            if d.roi is not None and not d.identity():
                x = source(d, a.var, "tf_crop_and_resize")
                conds.append(lor(x < num(0), cast(d.n - 1, f32) < x))
        return lor(*conds)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        dims = self.dims(node)
        axes = axes_of(out.shape)
        mode, how = self.attr(node, "mode", "nearest"), self.attr(node, "coordinate_transformation_mode", "half_pixel")
        lets: list[LetStmt] = []
        if mode == "nearest":
            rounding = self.attr(node, "nearest_mode", "round_prefer_floor")
            idx = [a.var if d.identity() else nearest(d, a.var, how, rounding) for d, a in zip(dims, axes, strict=True)]
            e = load(x, idx)
        else:
            lets, e = self.interpolate(node, out, x, dims, axes)
        if how == "tf_crop_and_resize":
            fill = const(float(node.attrs.get("extrapolation_value", 0.0)), e.dtype)
            e = select(self.outside(node, dims, axes), fill, e)
        return make(node, ins, outs, [*lets, define(out, axes, to_type(e, out.dtype))])

    def interpolate(self, node: Node, out: Buffer, x: Buffer, dims: Sequence[Dim], axes: Sequence[Axis]) -> tuple[list[LetStmt], Expr]:
        moving = [(k, *self.taps(node, d, a.var)) for k, (d, a) in enumerate(zip(dims, axes, strict=True)) if not d.identity()]
        t = wide(x.dtype) if x.dtype.is_float else f32
        if not moving:
            return [], cast(load(x, [a.var for a in axes]), t)
        if any(isinstance(tp.count, Expr) for _, tp, _ in moving) or int(np.prod([tp.count for _, tp, _ in moving])) > 64:  # a loop over the taps instead of a written-out sum
            reds = [axis(f"k{k}", tp.count) for k, tp, _ in moving]
            idx = [a.var for a in axes]
            w: Expr | None = None
            lets: list[LetStmt] = []
            for (k, tp, lead), r in zip(moving, reds, strict=True):
                idx[k] = tp.position(r.var)
                part = tp.weight(r.var, lead)
                if tp.normalize:
                    norm = temp(out, f"norm{k}", (axes[k],), self.total(tp, lead))
                    lets.append(norm)
                    part = part / load(norm.buf, [axes[k].var])
                w = part if w is None else w * part
            assert w is not None
            return lets, sum_(reds, cast(load(x, idx), t) * cast(w, t))
        idx, last = [a.var for a in axes], moving[-1]
        if len(moving) == 1 or last[0] != x.rank - 1:
            return [], self.nested(x, idx, moving, t)
        j = axis("j", last[1].n)  # whole rows first: neighbours along them stand together
        rows = temp(out, "rows", (*axes[:-1], j), self.nested(x, [*idx[:-1], j.var], moving[:-1], t))
        return [rows], self.nested(rows.buf, idx, [last], t)

    def nested(self, x: Buffer, idx: list[Expr], moving: list[tuple[int, Taps, Any]], t: DType) -> Expr:
        """Interpolation along the first moving dimension of interpolations along the others."""
        if not moving:
            return cast(load(x, idx), t)
        (k, tp, lead), rest = moving[0], moving[1:]
        e: Expr | None = None
        total: Expr | None = None
        for j in range(tp.count):
            at = list(idx)
            at[k] = tp.position(const(j))
            w = tp.weight(const(j), lead) if tp.kernel == "cubic" or tp.exclude or tp.normalize else (num(1) - tp.frac if j == 0 else tp.frac)
            part = self.nested(x, at, rest, t) * cast(w, t)
            e = part if e is None else e + part
            total = w if total is None else total + w
        assert e is not None and total is not None
        return e / cast(total, t) if tp.normalize else e

    @staticmethod
    def total(tp: Taps, lead: Any) -> Expr:
        if isinstance(tp.count, Expr):
            r = axis(f"t{tp.n.key}", tp.count)
            return sum_(r, tp.weight(r.var, lead))
        total = tp.weight(ZERO, lead)
        for j in range(1, tp.count):
            total = total + tp.weight(const(j), lead)
        return total

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        node = pinned(node, arrays)
        x = np.asarray(arrays[0])
        mode, how = self.attr(node, "mode", "nearest"), self.attr(node, "coordinate_transformation_mode", "half_pixel")
        y = x if mode == "nearest" else x.astype(np.float64)
        gone = np.zeros((1,) * x.ndim, bool)
        for k, d in enumerate(self.dims(node)):
            if d.identity():
                continue
            o = np.arange(int(d.out.attr))
            v = axes_of([d.out], "o")[0].var
            shape = [-1 if i == k else 1 for i in range(x.ndim)]
            if how == "tf_crop_and_resize":
                c = evaluate_expr(source(d, v, how), {v: o})
                gone = gone | ((c < 0) | (c > int(d.n.attr) - 1)).reshape(shape)
            if mode == "nearest":
                j = evaluate_expr(nearest(d, v, how, self.attr(node, "nearest_mode", "round_prefer_floor")), {v: o})
                y = np.take(y, np.broadcast_to(j, o.shape), k)
                continue
            tp, lead = self.taps(node, d, v)
            ws = [np.broadcast_to(evaluate_expr(tp.weight(const(j), lead), {v: o}), o.shape).astype(np.float64) for j in range(tp.count)]
            parts = [np.take(y, np.broadcast_to(evaluate_expr(tp.position(const(j)), {v: o}), o.shape), k) * w.reshape(shape) for j, w in enumerate(ws)]
            y = sum(parts) / (sum(ws).reshape(shape) if tp.normalize else 1.0)  # type: ignore[union-attr]
        y = np.where(gone, float(node.attrs.get("extrapolation_value", 0.0)), y) if gone.any() else y
        if x.dtype.kind in "iu" and mode != "nearest":
            y = np.rint(y)
        return [np.asarray(convert(np.asarray(y), need(node, 0).dtype))]


def to_type(e: Expr, t: DType) -> Expr:
    return cast(unary("round", e), t) if e.dtype.is_float and t.is_int else cast(e, t)


def empty(node: Node, i: int) -> bool:
    v = node.input(i)
    return v is not None and any(s.op == "const" and s.attr == 0 for s in v.shape)


