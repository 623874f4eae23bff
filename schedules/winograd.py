"""Winograd's minimal filtering for 3x3 convolutions of stride 1: input transform, batched product, output transform.

A tile of m x m outputs needs (m + 2)^2 products for each pair of channels instead of 9 m^2, a quarter of them for m = 4 (F(4x4,3x3))
and 1 / 2.25 for m = 2 (F(2x2,3x3)). The transforms are sums along the taps, so the Compute

    o[n,h,w,k] = epilogue(sum[i,j,c](x[n,h+i-p,w+j-q,c] * w[i,j,c,k]))

becomes three, each scheduled for itself::

    t[a,j] = sum_i B[i,a] x[m y + i - p, m x + j - q, c];  v[a,b,n,y,x,c] = sum_j B[j,b] t[a,j]
    z[f,r,k] = sum[c](v[f,r,c] * u[f,c,k])                      f = (a, b), r = (n, y, x); u is made at compile time in f64
    s[i,b] = sum_a A[a,i] z[a,b,..];  o[n,h,w,k] = epilogue(sum_b A[b,w%m] s[h%m,b])

Interpolation points are 0, +-1, infinity for m = 2 and 0, +-sqrt(1/2), +-sqrt(2), infinity for m = 4.

Error, relative to the largest output of a layer, normal data with 256 channels, against f64: 5e-7 for m = 2, 2.2e-6 for m = 4
(with the usual points 0, +-1, +-2: 6.4e-6); the direct sum has 2.5e-7. ``LUTHIER_WINOGRAD=0`` keeps the direct sum, ``2``
allows only m = 2. A model whose values leave +-1e35 may overflow in the transforms where the direct sum does not.

Which form: the one with the least estimated cycles (:func:`cycles`), for static shapes on targets with vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from luthier import settings
from luthier.ir.compute import Axis, Compute, Pull, axis, let_exprs, pull, sum_
from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, const, is_const, land, load, load_parts, loads, select
from luthier.ir.loop import Buffer
from luthier.schedules.capabilities import Capabilities
from luthier.schedules.contract import _is_box, _product
from luthier.schedules.schedule import Packing, Schedule, annotate, fuse, inline, reorder, schedule, split, stage

Array = np.ndarray[Any, Any]
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))}


@cache
def matrices(m: int) -> tuple[Array, Array, Array]:
    """(A [m+2, m], G [m+2, 3], B [m+2, m+2]) in f64: correlation of m outputs with 3 taps is ``A.T @ ((G @ w) * (B.T @ x))``."""
    pts = POINTS[m]
    n = m + 2
    a, g, b = np.zeros((n, m)), np.zeros((n, 3)), np.zeros((n, n))
    for k, p in enumerate(pts):
        rest = [q for q in pts if q != p]
        a[k] = [p**i for i in range(m)]
        g[k] = [p**i / np.prod([p - q for q in rest]) for i in range(3)]
        b[: n - 1, k] = np.poly(rest)[::-1]
    a[-1, -1] = g[-1, -1] = 1
    b[:, -1] = np.poly(pts)[::-1]
    for x in (a, g, b):  # sqrt(2)**2 is 2
        x[np.abs(x - np.round(x, 1)) < 1e-12] = np.round(x[np.abs(x - np.round(x, 1)) < 1e-12], 1)
    return a, g, b


def transformed_weights(w: Array, m: int) -> Array:
    """f32 [3, 3, C, K] to f32 [(m+2)^2, C, K], computed in f64."""
    g = matrices(m)[1]
    both = np.kron(g, g)  # [(m+2)^2, 9]
    flat = np.ascontiguousarray(w).reshape(9, -1)
    out = np.empty((len(both), flat.shape[1]), np.float32)
    for k in range(0, flat.shape[1], 1 << 15):  # in pieces: f64 is twice the size
        out[:, k : k + (1 << 15)] = both @ flat[:, k : k + (1 << 15)].astype(np.float64)
    return out.reshape(-1, *w.shape[2:])


@dataclass(frozen=True, slots=True)
class WinogradPacking:
    """Weights of a convolution to the panels of the product: transformed, then packed."""

    param: str
    m: int
    panels: Packing

    def apply(self, w: Array) -> Array:
        return self.panels.apply(transformed_weights(w, self.m))


@dataclass(frozen=True, slots=True)
class Conv:
    """A 3x3 convolution of stride 1 found in a Compute: ``acc`` is the sum; x[n, h + i - lo0, w + j - lo1, c]."""

    acc: Pull
    x: Buffer
    w: Buffer
    batch: Axis | None
    h: Axis
    wd: Axis
    k: Axis
    c: int
    lo: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Parts:
    """``transform_in``, ``product``, ``transform_out``: the three Computes in order; ``weights``: the product's constant operand."""

    m: int
    conv: Conv
    transform_in: Compute
    product: Compute
    transform_out: Compute
    weights: str


def rewrite_conv(c: Compute, caps: Capabilities, constants: Mapping[str, Any], m: int | None = None) -> Parts | None:
    """The three Computes when ``c`` is a convolution that they are estimated to run faster, else None. ``m`` forces a tile."""
    if caps.gpu or (m is None and settings.winograd.get() == 0):
        return None
    conv = find(c, constants)
    if conv is None:
        return None
    lanes = caps.lanes(32)
    k = conv.k.extent.attr
    if lanes < 4 or conv.c % lanes or k % lanes:
        return None
    if m is None:
        sizes = [s for s in (2, 4) if s <= settings.winograd.get()]
        n, h, w = (1 if a is None else a.extent.attr for a in (conv.batch, conv.h, conv.wd))
        best = min([0, *sizes], key=lambda s: cycles(s, n, h, w, conv.c, k, lanes, caps))
        if not best:
            return None
        m = best
    return _parts(c, conv, m)


def cycles(m: int, n: int, h: int, w: int, c: int, k: int, lanes: int, caps: Capabilities) -> float:
    """Estimated cycles of one core: m = 0 for the direct sum. Two FMAs a cycle at 85 % for products; a transform costs about 1.6
    instructions a cycle with four for each transformed vector; tensors beyond the second-level cache move 8 bytes a cycle."""
    if m == 0:
        return n * h * w * 9 * c * k / (2 * lanes * 0.85)
    f, r = (m + 2) ** 2, n * -(-h // m) * -(-w // m)
    rows = -(-r // 6) * 6 if r > 6 else max(r, 5)
    product = max(f * rows * c * k / (2 * lanes * 0.85), 4 * f * c * k / 5)
    transforms = 4 * f * r * (c + k) / lanes / 1.6
    moved = 2 * 4 * f * r * (c + k)
    return product + transforms + (moved / 8 if moved > caps.l2 else 0) + 2000


# ---------------------------------------------------------------- recognising


def find(c: Compute, constants: Mapping[str, Any]) -> Conv | None:
    """The convolution of a Compute with nothing but elementwise work behind it."""
    lets = [x for x in c.lets if isinstance(x, Pull)]
    if len(lets) != len(c.lets) or len(c.outs) != 1 or lets[-1].name != c.outs[0] or c.dims:
        return None
    reds = [x for x in lets if x.expr.op == "reduce"]
    if len(reds) != 1 or len(reds[0].axes) not in (3, 4):
        return None
    acc = reds[0]
    e = acc.expr
    if e.attr[0] != "sum" or len(e.args) != 1 or len(e.attr[1]) != 3:
        return None
    f = _product(e.args[0])
    if f is None or any(t.op != "load" for t in f):
        return None
    xs, ws = (f[0], f[1]) if f[1].attr[0].name in constants else (f[1], f[0])
    (x, xi, mask, _), (w, wi, wmask, _) = load_parts(xs), load_parts(ws)
    red = {a.var: a for a in e.attr[1]}
    if w.name not in constants or x.name in constants or w.rank != 4 or x.rank != 4 or wmask is not None or x.dtype is not f32 or w.dtype is not f32:
        return None
    *lead, h, wd, k = acc.axes
    if any(i not in red for i in wi[:3]) or len(set(wi[:3])) != 3 or wi[3] is not k.var or xi[3] is not wi[2]:
        return None
    if any(not is_const(s, 3) for s in w.shape[:2]) or any(s.op != "const" for s in (*w.shape, *x.shape)):
        return None
    if any(not is_const(red[i].extent, s.attr) for i, s in zip(wi[:3], w.shape[:3], strict=True)):
        return None
    batch = lead[0] if lead else None
    if not (xi[0] is batch.var if batch is not None else xi[0].op == "const" and is_const(x.shape[0], 1)):
        return None
    lo = [h.var + wi[0] - xi[1], wd.var + wi[1] - xi[2]]
    if any(p.op != "const" or p.attr < 0 for p in lo) or (mask is not None and not _is_box(mask, x, xi)):
        return None
    if not _only_pointwise(lets, acc):
        return None
    return Conv(acc, x, w, batch, h, wd, k, w.shape[2].attr, (lo[0].attr, lo[1].attr))


def _only_pointwise(lets: Sequence[Pull], acc: Pull) -> bool:
    """Everything behind ``acc`` has its axes and reads what it follows from at its own point."""
    after = {acc.name}
    for x in lets:
        mine = [load_parts(ld)[1] for ld in loads(*let_exprs(x)) if ld.attr[0].name in after]
        if mine:
            if len(x.axes) != len(acc.axes) or any(i is not a.var for idx in mine for i, a in zip(idx, x.axes, strict=True)):
                return False
            after.add(x.name)
    return lets[-1].name in after


# ---------------------------------------------------------------- rewriting


def _parts(c: Compute, conv: Conv, m: int) -> Parts:
    n = m + 2
    a_mat, _, b_mat = matrices(m)
    ty, tx = -(-conv.h.extent.attr // m), -(-conv.wd.extent.attr // m)
    nb = 1 if conv.batch is None else conv.batch.extent.attr
    k = conv.k.extent.attr
    a, b, j = axis("a", n), axis("b", n), axis("j", n)
    bn, y, x, ch = axis("n", nb), axis("y", ty), axis("x", tx), axis("c", conv.c)
    top, left = y.var * m - conv.lo[0], x.var * m + j.var - conv.lo[1]

    def source(i: int) -> Expr:
        inside = land(*(t for q, s in ((top + i, conv.x.shape[1]), (left, conv.x.shape[2])) for t in (const(0) <= q, q < s)))
        return load(conv.x, [bn.var, top + i, left, ch.var], inside)

    t = pull("wino.t", [bn, y, x, a, j, ch], cases(a.var, combine(b_mat.T, [source(i) for i in range(n)])))
    v = pull("wino.v", [a, b, bn, y, x, ch], cases(b.var, combine(b_mat.T, [load(t.buf, [bn.var, y.var, x.var, a.var, const(i), ch.var]) for i in range(n)])))
    first = Compute(f"{c.name}.tiles", (conv.x,), (), (t, v), (v.name,))

    f, r, kk, cc = axis("f", n * n), axis("r", nb * ty * tx), axis("k", k), axis("c", conv.c)
    vb = Buffer(v.name, f32, (f.extent, r.extent, cc.extent), "param", False)
    ub = Buffer(f"{conv.w.name}.wino", f32, (f.extent, cc.extent, kk.extent), "param", False)
    z = pull("wino.z", [f, r, kk], sum_(cc, load(vb, [f.var, r.var, cc.var]) * load(ub, [f.var, cc.var, kk.var])))
    second = Compute(f"{c.name}.products", (vb, ub), (), (z,), (z.name,))

    zb = Buffer(z.name, f32, (a.extent, b.extent, bn.extent, y.extent, x.extent, kk.extent), "param", False)
    i = axis("i", m)
    s = pull("wino.s", [bn, y, x, i, b, kk], cases(i.var, combine(a_mat.T, [load(zb, [const(q), b.var, bn.var, y.var, x.var, kk.var]) for q in range(n)])))
    at = [const(0) if conv.batch is None else conv.batch.var, conv.h.var // m, conv.wd.var // m, conv.h.var % m]
    taps = combine(a_mat.T, [load(s.buf, [*at, const(q), conv.k.var]) for q in range(n)])
    acc = Pull(conv.acc.buf, conv.acc.axes, cases(conv.wd.var % m, taps))
    lets = tuple(q for p in c.lets for q in ((s, acc) if p is conv.acc else (p,)))
    reads = {ld.attr[0].name for q in lets for ld in loads(*let_exprs(q))}
    third = Compute(c.name, (zb, *(p for p in c.params if p.name in reads)), (), lets, c.outs)
    return Parts(m, conv, first, second, third, ub.name)


def cases(v: Expr, values: Sequence[Expr]) -> Expr:
    """``values[v]``."""
    e = values[-1]
    for q in range(len(values) - 2, -1, -1):
        e = select(v.eq(q), values[q], e)
    return e


def combine(matrix: Array, xs: Sequence[Expr]) -> list[Expr]:
    """``matrix @ xs`` as expressions that share sums and differences: of columns that agree up to signs, and the even and odd
    parts of rows that differ in the sign of their odd part."""
    rows = [[(float(q), x) for q, x in zip(row, xs, strict=True)] for row in matrix]
    cols = matrix.shape[1]
    for p in range(1, cols - 1):
        q = p + 1
        same, other = matrix[:, p] == matrix[:, q], matrix[:, p] == -matrix[:, q]
        if p % 2 and np.all(same | other) and not np.all(same) and not np.all(other):
            plus, minus = xs[p] + xs[q], xs[p] - xs[q]
            for row, eq in zip(rows, same, strict=True):
                row[p], row[q] = (row[p][0], plus if eq else minus), (0.0, xs[q])
    out: list[Expr | None] = [None] * len(rows)
    for p in range(len(rows)):
        if out[p] is not None:
            continue
        signs = np.array([1.0, -1.0] * cols)[:cols]
        q = next((q for q in range(p + 1, len(rows)) if np.array_equal(matrix[p], matrix[q] * signs) and np.any(matrix[p][1::2]) and np.any(matrix[p][::2])), -1)
        if q < 0:
            out[p] = _sum(rows[p])
        else:
            even, odd = _sum(rows[p][::2]), _sum(rows[p][1::2])
            out[p], out[q] = even + odd, even - odd
    return [e for e in out if e is not None]


def _sum(terms: Sequence[tuple[float, Expr]]) -> Expr:
    left = sorted(((q, x) for q, x in terms if q), key=lambda t: (abs(t[0]) != 1, -t[0]))
    e: Expr | None = None
    for q, x in left:
        y = x if abs(q) == 1 else x * const(abs(q), f32)
        e = (y if q > 0 else -y) if e is None else e + y if q > 0 else e - y
    assert e is not None
    return e


# ---------------------------------------------------------------- scheduling


def schedule_in(c: Compute, caps: Capabilities) -> Schedule:
    """One round a tile and vector of channels: rows of the tile transformed into a local block, then its columns."""
    s = schedule(c)
    v, t = c.outs[0], "wino.t"
    s = _lanes(s, f"{v}.c", caps)
    s = reorder(s, *(f"{v}.{x}" for x in ("n", "y", "x", "c.0", "a", "b", "c.1")))
    s = annotate(s, f"{v}.b", "unroll")
    s = stage(s, t, at=f"{v}.c.0")
    s = reorder(s, f"{t}.j", f"{t}.a")
    s = annotate(annotate(s, f"{t}.a", "unroll"), f"{t}.c", "vectorize")
    return _parallel(s, v, ["n", "y", "x"])


def schedule_out(parts: Parts, caps: Capabilities) -> Schedule:
    """One round a tile and vector of channels: columns into a local block, then rows, epilogue and stores inside the image."""
    s = schedule(parts.transform_out)
    o, t, m = parts.transform_out.outs[0], "wino.s", parts.m
    for n in [n for n in s.stages if n not in (o, t)]:
        s = inline(s, n)
    *lead, h, w, k = [lp.name.removeprefix(f"{o}.") for lp in s.stages[o].loops]
    s = split(split(s, f"{o}.{h}", m), f"{o}.{w}", m)
    s = _lanes(s, f"{o}.{k}", caps)
    s = reorder(s, *(f"{o}.{x}" for x in (*lead, f"{h}.0", f"{w}.0", f"{k}.0", f"{h}.1", f"{w}.1", f"{k}.1")))
    s = annotate(s, f"{o}.{w}.1", "unroll")
    s = stage(s, t, at=f"{o}.{k}.0")
    s = reorder(s, f"{t}.b", f"{t}.i")
    s = annotate(annotate(s, f"{t}.i", "unroll"), f"{t}.k", "vectorize")
    return _parallel(s, o, [*lead, f"{h}.0", f"{w}.0"])


def _lanes(s: Schedule, loop: str, caps: Capabilities) -> Schedule:
    s = split(s, loop, caps.lanes(32))
    return annotate(s, f"{loop}.1", "vectorize")


def _parallel(s: Schedule, tensor: str, loops: Sequence[str]) -> Schedule:
    first, *rest = (f"{tensor}.{x}" for x in loops)
    for x in rest:
        s = fuse(s, first, x)
        first = s.stages[tensor].loops[0].name
    return annotate(s, first, "parallel")
