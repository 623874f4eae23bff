"""Signal processing: DFT, STFT, MelWeightMatrix. Transforms are sums with a table of twiddle factors, O(N^2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, Pull, axis, pull, sum_
from luthier.ir.dtypes import DType, f32, f64, i32
from luthier.ir.expr import Expr, as_expr, binary, cast, const, land, load, minimum, prove, select, unary
from luthier.ir.graph import Node, TensorType, content_or_symbols
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    define,
    dimension,
    element_type,
    get,
    make,
    must,
    need,
    padded,
    shape_error,
    wide,
)
from luthier.ir.requirements import assume_at_least, assume_at_most


def twiddles(name: str, n: Expr, d: DType, inverse: bool) -> Pull:
    """``t[p, q, m]``: what part q (real, imaginary) of the input adds to part p of the output at angle 2 pi m / n."""
    p, q, m = axis("p", 2), axis("q", 2), axis("m", n)
    angle = cast(m.var, f64) * const(2 * math.pi, f64) / cast(n, f64)
    c, s = unary("cos", angle), unary("sin", angle)
    if inverse:
        s = -s
    return pull(f"{name}.twiddle", (p, q, m), cast(select(p.var.eq(q.var), c, select(p.var.eq(0), s, -s)), d))


def chosen(a: Expr, values: Sequence[Expr]) -> Expr:
    """``values[a]``."""
    out = values[-1]
    for d in range(len(values) - 2, -1, -1):
        out = select(a.eq(d), values[d], out)
    return out


@op("DFT")
class DFT(Op):
    """(x [..., 1 or 2], dft_length, axis): discrete Fourier transform along ``axis``; ``inverse``, ``onesided``."""

    def geometry(self, node: Node) -> tuple[Expr, Expr, bool, bool]:
        """(axis, transform length, inverse, onesided); an axis that is known only at run time is a symbol."""
        x = need(node, 0)
        if x.rank < 2:
            raise shape_error(node, "DFT takes [..., length, 1 or 2]")
        if prove(x.shape[-1] > 2) or prove(x.shape[-1] < 1):
            raise shape_error(node, f"the last extent of x is {x.shape[-1]!r}, it should be 1 or 2: real and imaginary parts")
        assume_at_most(x.shape[-1], const(2), "the last extent of x and that of complex numbers")
        assume_at_least(x.shape[-1], const(1), "the last extent of x and that of real numbers")
        a = as_expr(content_or_symbols(node, 2)[0]) if node.input(2) is not None else const(-2)
        a = dimension(node, a, x.rank, x.rank - 1)  # the last dimension holds real and imaginary parts
        inv, one = bool(int(node.attrs.get("inverse", 0))), bool(int(node.attrs.get("onesided", 0)))
        if node.input(1) is not None:
            n = as_expr(content_or_symbols(node, 1)[0])
        else:
            n = chosen(a, x.shape[:-1])
            n = (n - 1) * 2 if inv and one else n
        return a, n, inv, one

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        a, n, inv, one = self.geometry(node)
        m = n // 2 + 1 if one and not inv else n
        return [TensorType.of(x.dtype, (*(select(a.eq(d), m, s) for d, s in enumerate(x.shape[:-1])), 1 if one and inv else 2))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, y = must(ins, 0), outs[0]
        a, n, inv, one = self.geometry(node)
        w = wide(y.dtype)
        axes = axes_of(y.shape)
        t = twiddles(y.name, n, w, inv)
        r, q = axis("n", n), axis("q", x.shape[-1])
        have, pos, sign = chosen(a, x.shape[:-1]), r.var, None
        if inv and one:  # the other half is the conjugate of this one
            have = minimum(have, n // 2 + 1)
            front = r.var < have
            pos = select(front, r.var, n - r.var)
            sign = land(q.var.eq(1), have <= r.var)
        idx = [select(a.eq(d), pos, v.var) for d, v in enumerate(axes[:-1])]
        v = cast(load(x, [*idx, q.var], land(ZERO <= pos, pos < have)), w)
        if sign is not None:
            v = select(sign, -v, v)
        k = chosen(a, [v.var for v in axes[:-1]])
        s = sum_((r, q), v * load(t.buf, [axes[-1].var, q.var, k * r.var % n]))
        return make(node, ins, outs, [t, define(y, axes, s / cast(n, w) if inv else s)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        given = arrays[2] if len(arrays) > 2 else None
        a = -2 if given is None else int(np.asarray(given).reshape(-1)[0])
        a = a + x.ndim if a < 0 else a
        inv, one = bool(int(node.attrs.get("inverse", 0))), bool(int(node.attrs.get("onesided", 0)))
        n = x.shape[a] if not (inv and one) else 2 * (x.shape[a] - 1)
        if len(arrays) > 1 and arrays[1] is not None:
            n = int(np.asarray(arrays[1]).reshape(-1)[0])
        z = x[..., 0].astype(np.float64) + (1j * x[..., 1] if x.shape[-1] == 2 else 0)
        if inv and one:
            return [np.fft.irfft(z, n, axis=a)[..., None].astype(x.dtype)]
        r = np.fft.ifft(z, n, axis=a) if inv else np.fft.fft(z, n, axis=a)
        if one:
            r = np.take(r, range(n // 2 + 1), axis=a)
        return [np.stack([r.real, r.imag], -1).astype(x.dtype)]


@op("STFT")
class STFT(Op):
    """(signal [B, L] or [B, L, 1 or 2], frame_step, window, frame_length) to [B, frames, bins, 2]; ``onesided`` (default 1)."""

    def geometry(self, node: Node) -> tuple[Expr, Expr, Expr, Expr]:
        """(step, frame length, frames, bins)."""
        x = need(node, 0)
        if x.rank not in (2, 3):
            raise shape_error(node, "STFT takes a signal [batch, length] or [batch, length, 1 or 2]")
        step = as_expr(content_or_symbols(node, 1)[0])
        win = node.input(2)
        n = as_expr(content_or_symbols(node, 3)[0]) if node.input(3) is not None else win.shape[0] if win is not None else x.shape[1]
        return step, n, (x.shape[1] - n) // step + 1, n // 2 + 1 if int(node.attrs.get("onesided", 1)) else n

    def infer(self, node: Node) -> Sequence[TensorType]:
        _, _, frames, bins = self.geometry(node)
        x = need(node, 0)
        return [TensorType.of(x.dtype, (x.shape[0], frames, bins, 2))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, y = must(ins, 0), outs[0]
        step, n, *_ = self.geometry(node)
        w = wide(y.dtype)
        t = twiddles(y.name, n, w, False)
        b, f, k, p = axes = axes_of(y.shape)
        r, q = axis("n", n), axis("q", x.shape[2] if x.rank == 3 else 1)
        v = cast(load(x, [b.var, f.var * step + r.var, q.var][: x.rank]), w)
        win = get(ins, 2)
        if win is not None:
            v = v * cast(load(win, [r.var]), w)
        return make(node, ins, outs, [t, define(y, axes, sum_((r, q), v * load(t.buf, [p.var, q.var, k.var * r.var % n])))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, step, win, length = padded(arrays, 4)
        x = np.asarray(x)
        x = x if x.ndim == 3 else x[..., None]
        s = int(np.asarray(step).reshape(-1)[0])
        n = int(np.asarray(length).reshape(-1)[0]) if length is not None else len(win) if win is not None else x.shape[1]
        z = x[..., 0].astype(np.float64) + (1j * x[..., 1] if x.shape[-1] == 2 else 0)
        frames = (x.shape[1] - n) // s + 1
        cut = np.stack([z[:, f * s : f * s + n] for f in range(frames)], 1)
        r = np.fft.fft(cut if win is None else cut * np.asarray(win).astype(np.float64), axis=-1)
        if int(node.attrs.get("onesided", 1)):
            r = r[..., : n // 2 + 1]
        return [np.stack([r.real, r.imag], -1).astype(x.dtype)]


@op("MelWeightMatrix")
class MelWeightMatrix(Op):
    """(num_mel_bins, dft_length, sample_rate, lower_hertz, upper_hertz) to [dft_length // 2 + 1, num_mel_bins]."""

    def target(self, node: Node) -> DType:
        return element_type(node, node.attrs.get("output_datatype", 1))

    def infer(self, node: Node) -> Sequence[TensorType]:
        bins, n = (as_expr(content_or_symbols(node, i)[0]) for i in (0, 1))
        return [TensorType.of(self.target(node), (n // 2 + 1, bins))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        y = outs[0]
        bins, n = y.shape[1], as_expr(content_or_symbols(node, 1)[0])
        rate, low, high = (cast(load(must(ins, i), [ZERO] * must(ins, i).rank), f64) for i in (2, 3, 4))

        def mel(hz: Expr) -> Expr:
            return unary("log", hz / 700.0 + 1.0) * (2595.0 / math.log(10.0))

        k = axis("k", bins + 2)
        at = cast(k.var, f64) * ((mel(high) - mel(low)) / cast(bins + 2, f64)) + mel(low)
        hz = (binary("pow", const(10.0, f64), at / 2595.0) - 1.0) * 700.0
        edge = pull(f"{y.name}.edges", (k,), cast(unary("floor", cast(n + 1, f64) * hz / rate), i32))
        row, col = axes = axes_of(y.shape)
        a, c, b = (load(edge.buf, [col.var + d]) for d in range(3))
        j = cast(row.var, i32)
        up = select(c.eq(a), select(j.eq(c), const(1.0, f32), const(0.0, f32)), cast(j - a, f32) / cast(c - a, f32))
        v = select((a <= j) & (j <= c), up, const(0.0, f32))
        v = select((c <= j) & (j < b), cast(b - j, f32) / cast(b - c, f32), v)
        return make(node, ins, outs, [edge, define(y, axes, v)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        bins, n, rate, low, high = (np.asarray(a).reshape(-1)[0] for a in arrays)
        bins, n = int(bins), int(n)
        lo, hi = (2595 * np.log10(1 + np.float64(h) / 700) for h in (low, high))
        at = np.arange(bins + 2) * ((hi - lo) / (bins + 2)) + lo
        edges = np.floor((n + 1) * (700 * (np.power(10, at / 2595) - 1)) / rate).astype(int)
        out = np.zeros((n // 2 + 1, bins))
        for i in range(bins):
            a, c, b = edges[i : i + 3]
            if a == c:
                out[c, i] = 1
            else:
                out[a : c + 1, i] = (np.arange(a, c + 1) - a) / (c - a)
            if b > c:
                out[c:b, i] = (b - np.arange(c, b)) / (b - c)
        return [out.astype(self.target(node).numpy)]


__all__ = ["twiddles"]
