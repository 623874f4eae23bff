"""Convolutions over 1 to 3 spatial dimensions.

Attribute ``layout``: ``NCHW`` (ONNX: X [N, C, D...], W [M, C/g, K...]) or ``NHWC`` (X [N, D..., C], W [K..., C/g, M]; transposed
convolution: W [K..., C, M/g]), bias and the meaning of all else unchanged. Padding is a masked load: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, axis, sum_
from luthier.ir.expr import Expr, as_expr, land, load, maximum
from luthier.ir.graph import Node, TensorType, Value
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    LONGEST,
    ZERO,
    Array,
    axes_of,
    ceil_div,
    define,
    differ,
    is_one,
    make,
    must,
    need,
    pinned,
    shape_error,
    widen,
)
from luthier.ir.ops.matmul import same_number_type, up
from luthier.ir.requirements import assume_at_least


def channels_last(node: Node) -> bool:
    layout = node.attrs.get("layout", "NCHW")
    if layout not in ("NCHW", "NHWC"):
        raise shape_error(node, f"unknown layout {layout!r}")
    return bool(layout == "NHWC")


def split_shape(node: Node, v: Value) -> tuple[Expr, Expr, tuple[Expr, ...]]:
    """(N, C, spatial extents) of an activation."""
    if v.rank < 3:
        raise shape_error(node, f"{node.op} takes a batch of channels of at least one spatial dimension")
    s = v.shape
    return (s[0], s[-1], s[1:-1]) if channels_last(node) else (s[0], s[1], s[2:])


def join_shape(node: Node, n: Any, c: Any, spatial: Sequence[Any]) -> tuple[Any, ...]:
    return (n, *spatial, c) if channels_last(node) else (n, c, *spatial)


def join_axes(node: Node, out: Buffer) -> tuple[tuple[Axis, ...], Axis, Axis, tuple[Axis, ...]]:
    """(all axes in order, batch, channel, spatial) of an output activation."""
    axes = axes_of(out.shape)
    return (axes, axes[0], axes[-1], axes[1:-1]) if channels_last(node) else (axes, axes[0], axes[1], axes[2:])


Extent = int | Expr  # of a kernel: a symbol where only a run knows it


@dataclass(frozen=True, slots=True)
class Window:
    """One spatial dimension: ``n`` input, ``out`` output extent, kernel ``k``, stride, dilation, padding before and after."""

    n: Expr
    out: Expr
    k: Any  # an Extent; a number in pools and references
    stride: int
    dilation: int
    lo: Expr
    hi: Expr

    @property
    def taps(self) -> int:
        """The kernel's extent where it is a number."""
        assert isinstance(self.k, int)
        return self.k

    def at(self, o: Expr, k: Expr) -> Expr:
        """Input position of tap ``k`` for output ``o``; outside of 0 .. n - 1 it is padding."""
        return o * self.stride + k * self.dilation - self.lo

    def inside(self, o: Expr, k: Expr) -> Expr:
        i = self.at(o, k)
        return land(ZERO <= i, i < self.n)


def attr_ints(node: Node, name: str, rank: int, default: int) -> tuple[int, ...]:
    v = tuple(int(x) for x in node.attrs.get(name) or (default,) * rank)
    if len(v) != rank:
        raise shape_error(node, f"{name} has {len(v)} values for {rank} dimensions")
    return v


def windows(node: Node, spatial: Sequence[Expr], kernel: Sequence[Extent], ceil_mode: bool = False) -> list[Window]:
    """The geometry of a convolution or pooling from its attributes. Raises ShapeError."""
    r = len(spatial)
    strides, dil = attr_ints(node, "strides", r, 1), attr_ints(node, "dilations", r, 1)
    pads = attr_ints(node, "pads", 2 * r, 0)
    auto = str(node.attrs.get("auto_pad", "NOTSET"))
    if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise shape_error(node, f"unknown auto_pad {auto!r}")
    if any(s < 1 for s in strides) or any(d < 1 for d in dil):
        raise shape_error(node, "strides and dilations must be positive")
    if any(isinstance(k, int) and k < 1 for k in kernel):
        raise shape_error(node, f"a kernel of {list(kernel)} elements is empty")
    if any(isinstance(k, int) and k * d > LONGEST for k, d in zip(kernel, dil, strict=True)):
        raise shape_error(node, f"a kernel of {list(kernel)} elements with dilations {list(dil)} is longer than {LONGEST}")
    out = []
    for i, n in enumerate(spatial):
        s, ek = strides[i], (kernel[i] - 1) * dil[i] + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            o = ceil_div(n, s)
            total = maximum((o - 1) * s + ek - n, 0)
            half = total // 2
            lo, hi = (half, total - half) if auto == "SAME_UPPER" else (total - half, half)
        else:
            lo, hi = (ZERO, ZERO) if auto == "VALID" else (as_expr(pads[i]), as_expr(pads[i + r]))
            span = n + lo + hi - ek
            if span.op == "const" and span.attr < 0:
                raise shape_error(node, f"the kernel covers {ek} elements, the padded input has {(n + lo + hi)!r}")
            wants = as_expr(ek) - lo - hi
            if span.op != "const" and (wants.op != "const" or wants.attr > 1):  # else an empty input gives an empty output
                assume_at_least(n + lo + hi, as_expr(ek), f"the padded extent of spatial dimension {i} and the kernel")
            if ceil_mode and s > 1:
                o = ceil_div(span, s) + 1
                # the last window must start inside of the input or of its leading padding
                from luthier.ir.expr import select

                o = select(n + lo <= (o - 1) * s, o - 1, o)
            else:
                o = span // s + 1
        out.append(Window(n, o, kernel[i], s, dil[i], lo, hi))
    return out


def kernel_extents(node: Node, extents: Sequence[Expr]) -> tuple[Extent, ...]:
    """Those of the weights: numbers where they, or attribute ``kernel_shape``, say so. Raises ShapeError when the two contradict."""
    given = node.attrs.get("kernel_shape")
    if given and (len(given) != len(extents) or any(differ(d, as_expr(int(g))) for d, g in zip(extents, given, strict=True))):
        raise shape_error(node, f"kernel_shape {list(given)} contradicts the weights")
    if given:
        return tuple(int(g) for g in given)
    return tuple(int(d.attr) if d.op == "const" else d for d in extents)


def taps(kernel: Sequence[Extent], prefix: str = "k") -> tuple[list[Axis], list[Expr]]:
    """Reduction axes over a kernel (none for extent 1), and the index of every kernel dimension."""
    axes, idx = [], []
    for i, k in enumerate(kernel):
        if isinstance(k, int) and k == 1:
            idx.append(ZERO)
        else:
            a = axis(f"{prefix}{i}", k)
            axes.append(a)
            idx.append(a.var)
    return axes, idx


@op("Conv")
class Conv(Op):
    """(X, W, B?): out[n, m, o] = B[m] + sum over taps k and channels c of X[n, c, o s + k d - p] W[m, c, k]."""

    kind = "contraction"
    channels_last = True
    result: Any = None

    def kernel(self, node: Node) -> tuple[tuple[Extent, ...], int, Expr, Expr]:
        """(kernel extents, groups, input channels of a group, output channels)."""
        w = need(node, 1)
        x = need(node, 0)
        if w.rank != x.rank:
            raise shape_error(node, f"the input has rank {x.rank}, the weights {w.rank}")
        k = w.shape[:-2] if channels_last(node) else w.shape[2:]
        ic, oc = (w.shape[-2], w.shape[-1]) if channels_last(node) else (w.shape[1], w.shape[0])
        return kernel_extents(node, k), int(node.attrs.get("group", 1)), ic, oc

    def check_types(self, node: Node) -> Any:
        return same_number_type(node, 0, 1)

    def infer(self, node: Node) -> Sequence[TensorType]:
        t = self.check_types(node)
        n, c, spatial = split_shape(node, need(node, 0))
        kernel, g, ic, oc = self.kernel(node)
        if differ(c, ic * g):
            raise shape_error(node, f"{c!r} input channels in {g} groups need weights for {(c // g)!r} channels, they have {ic!r}")
        if oc.op == "const" and oc.attr % g:
            raise shape_error(node, f"{oc.attr} output channels do not divide into {g} groups")
        b = self.bias(node)
        if b is not None and (b.rank != 1 or differ(b.shape[0], oc)):
            raise shape_error(node, f"the bias must have {oc!r} elements")
        return [TensorType.of(t, join_shape(node, n, oc, [w.out for w in windows(node, spatial, kernel)]))]

    def bias(self, node: Node) -> Value | None:
        return node.input(2)

    def product(self, node: Node, ins: Sequence[Buffer | None], x: Expr, w: Expr, c: Expr, m: Expr, mask: Expr) -> Expr:
        """One term of the sum. ``c``, ``m``: input and output channel; ``mask`` false in the padding (where x is 0 already)."""
        return widen(x) * widen(w)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, w, out = must(ins, 0), must(ins, 1), outs[0]
        last = channels_last(node)
        kernel, g, ic, oc = self.kernel(node)
        _, _, spatial = split_shape(node, need(node, 0))
        wins = windows(node, spatial, kernel)
        axes, n, m, o = join_axes(node, out)
        k_axes, k = taps(kernel)
        reds = list(k_axes)
        c: Expr = ZERO
        if not is_one(ic):
            ca = axis("c", ic)
            reds.append(ca)
            c = ca.var
        per = oc // g
        channel = c if g == 1 else (m.var // per) * ic + c
        at = [wi.at(a.var, kk) for wi, a, kk in zip(wins, o, k, strict=True)]
        mask = land(*(wi.inside(a.var, kk) for wi, a, kk in zip(wins, o, k, strict=True)))
        xv = load(x, (n.var, *at, channel) if last else (n.var, channel, *at), mask)
        wv = load(w, (*k, c, m.var) if last else (m.var, c, *k))
        e = self.product(node, ins, xv, wv, channel, m.var, mask)
        if reds:
            e = sum_(reds, e)
        if self.bias(node) is not None:
            e = e + widen(must(ins, 2)[m.var])
        return make(node, ins, outs, [define(out, axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, w = up(arrays[0]), up(arrays[1])
        if channels_last(node):
            x, w = np.moveaxis(x, -1, 1), np.moveaxis(w, (-1, -2), (0, 1))
        y = conv_ref(node, x, w)
        if len(arrays) > 2 and arrays[2] is not None:
            y = y + up(arrays[2]).reshape(1, -1, *(1,) * (y.ndim - 2))
        return [(np.moveaxis(y, 1, -1) if channels_last(node) else y).astype(np.asarray(arrays[0]).dtype)]


def conv_ref(node: Node, x: Array, w: Array) -> Array:
    """Channels-first convolution of arrays without bias."""
    g, kernel = int(node.attrs.get("group", 1)), w.shape[2:]
    r = len(kernel)
    wins = windows(node, [as_expr(n) for n in x.shape[2:]], kernel)
    p = np.pad(x, [(0, 0), (0, 0), *((int(v.lo.attr), int(v.hi.attr)) for v in wins)])
    view = np.lib.stride_tricks.sliding_window_view(p, [(v.taps - 1) * v.dilation + 1 for v in wins], tuple(range(2, 2 + r)))  # type: ignore[call-overload]
    view = view[(slice(None), slice(None), *(slice(None, None, v.stride) for v in wins), *(slice(None, None, v.dilation) for v in wins))]
    view = view[(slice(None), slice(None), *(slice(0, int(v.out.attr)) for v in wins))]
    n, c = x.shape[:2]
    m = w.shape[0]
    view = view.reshape(n, g, c // g, *view.shape[2:])
    w = w.reshape(g, m // g, c // g, *kernel)
    o, k = "hij"[:r], "uvw"[:r]
    return np.einsum(f"ngc{o}{k},gmc{k}->ngm{o}", view, w, optimize=True).reshape(n, m, *(int(v.out.attr) for v in wins))


@op("ConvTranspose")
class ConvTranspose(Op):
    """The gradient of a convolution with respect to its input: X [N, C, D...], W [C, M/g, K...] to [N, M, D'...]."""

    kind = "contraction"
    channels_last = True

    def kernel(self, node: Node) -> tuple[tuple[Extent, ...], int, Expr, Expr]:
        """(kernel extents, groups, all input channels, output channels of a group)."""
        w = need(node, 1)
        if w.rank != need(node, 0).rank:
            raise shape_error(node, f"the input has rank {need(node, 0).rank}, the weights {w.rank}")
        k = w.shape[:-2] if channels_last(node) else w.shape[2:]
        ic, oc = (w.shape[-2], w.shape[-1]) if channels_last(node) else (w.shape[0], w.shape[1])
        return kernel_extents(node, k), int(node.attrs.get("group", 1)), ic, oc

    def windows(self, node: Node) -> list[Window]:
        _, _, spatial = split_shape(node, need(node, 0))
        kernel = self.kernel(node)[0]
        r = len(spatial)
        strides, dil = attr_ints(node, "strides", r, 1), attr_ints(node, "dilations", r, 1)
        pads, extra = attr_ints(node, "pads", 2 * r, 0), attr_ints(node, "output_padding", r, 0)
        auto = str(node.attrs.get("auto_pad", "NOTSET"))
        shape = node.attrs.get("output_shape")
        shape = None if shape is None else tuple(int(d) for d in shape)[-r:]
        if shape is not None and len(shape) != r:
            raise shape_error(node, f"attribute output_shape has {len(shape)} extents for {r} spatial dimensions")
        out = []
        for i, n in enumerate(spatial):
            ek = (kernel[i] - 1) * dil[i] + 1
            full = (n - 1) * strides[i] + extra[i] + ek
            if shape is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
                o = as_expr(shape[i]) if shape is not None else n * strides[i]
                total = maximum(full - o, 0)
                half = total // 2
                lo, hi = (half, total - half) if auto == "SAME_UPPER" else (total - half, half)
            else:
                lo, hi = (ZERO, ZERO) if auto == "VALID" else (as_expr(pads[i]), as_expr(pads[i + r]))
                o = full - lo - hi
            out.append(Window(n, o, kernel[i], strides[i], dil[i], lo, hi))
        return out

    def infer(self, node: Node) -> Sequence[TensorType]:
        t = same_number_type(node, 0, 1)
        n, c, _ = split_shape(node, need(node, 0))
        _, g, ic, oc = self.kernel(node)
        if differ(c, ic):
            raise shape_error(node, f"{c!r} input channels, weights for {ic!r}")
        b = node.input(2)
        if b is not None and (b.rank != 1 or differ(b.shape[0], oc * g)):
            raise shape_error(node, f"the bias must have {(oc * g)!r} elements")
        return [TensorType.of(t, join_shape(node, n, oc * g, [w.out for w in self.windows(node)]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, w, out = must(ins, 0), must(ins, 1), outs[0]
        last = channels_last(node)
        kernel, g, ic, oc = self.kernel(node)
        axes, n, m, o = join_axes(node, out)
        k_axes, k_all = taps(kernel)
        per = ic // g
        reds, c = list(k_axes), ZERO
        if not is_one(per):
            ca = axis("c", per)
            reds.append(ca)
            c = ca.var
        channel = c if g == 1 else (m.var // oc) * per + c
        conds, at, k = [], [], list(k_all)
        for j, (v, a, kk) in enumerate(zip(self.windows(node), o, k_all, strict=True)):
            if isinstance(v.k, int) and v.stride == v.k and v.dilation == 1 and v.lo is ZERO:  # windows side by side: one tap reaches each output
                k[j] = a.var % v.stride
                reds = [r for r in reds if r.var is not kk]
                at.append(a.var // v.stride)
                conds.append(at[-1] < v.n)
                continue
            q = a.var + v.lo - kk * v.dilation
            i = q if v.stride == 1 else q // v.stride
            conds += [ZERO <= q, i < v.n]
            if v.stride > 1:
                conds.append((q % v.stride).eq(0))
            at.append(i)
        xv = load(x, (n.var, *at, channel) if last else (n.var, channel, *at), land(*conds))
        mo = m.var if g == 1 else m.var % oc
        wv = load(w, (*k, channel, mo) if last else (channel, mo, *k))
        e = widen(xv) * widen(wv)
        if reds:
            e = sum_(reds, e)
        if node.input(2) is not None:
            e = e + widen(must(ins, 2)[m.var])
        return make(node, ins, outs, [define(out, axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, w = up(arrays[0]), up(arrays[1])
        if channels_last(node):
            x, w = np.moveaxis(x, -1, 1), np.moveaxis(w, (-2, -1), (0, 1))
        g = int(node.attrs.get("group", 1))
        wins = self.windows(pinned(node, arrays))
        n, c = x.shape[:2]
        per_in, per_out = c // g, w.shape[1]
        full = [(s - 1) * v.stride + (v.k - 1) * v.dilation + 1 for s, v in zip(x.shape[2:], wins, strict=True)]
        size = [max(f, int(v.out.attr) + int(v.lo.attr)) for f, v in zip(full, wins, strict=True)]
        y = np.zeros((n, g * per_out, *size), x.dtype)
        for gi in range(g):
            for tap in np.ndindex(*w.shape[2:]):
                part = np.einsum("nc...,cm->nm...", x[:, gi * per_in : (gi + 1) * per_in], w[(slice(gi * per_in, (gi + 1) * per_in), slice(None), *tap)])
                sl = tuple(slice(t * v.dilation, t * v.dilation + (s - 1) * v.stride + 1, v.stride) for t, v, s in zip(tap, wins, x.shape[2:], strict=True))
                y[(slice(None), slice(gi * per_out, (gi + 1) * per_out), *sl)] += part
        y = y[(slice(None), slice(None), *(slice(int(v.lo.attr), int(v.lo.attr) + int(v.out.attr)) for v in wins))]
        if len(arrays) > 2 and arrays[2] is not None:
            y = y + up(arrays[2]).reshape(1, -1, *(1,) * (y.ndim - 2))
        return [(np.moveaxis(y, 1, -1) if channels_last(node) else y).astype(np.asarray(arrays[0]).dtype)]


