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

Which form: the one with the least estimated cycles (:func:`cycles`), for static heights and widths (the batch may be known at run time
only and counts as 1) on targets with vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from luthier import settings
from luthier.ir.compute import Axis, Compute, Pull, axis, let_exprs, pull, sum_
from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, const, is_const, land, load, load_parts, loads, select
from luthier.ir.loop import Buffer
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Packing, Schedule, annotate, fuse, inline, reorder, schedule, split, stage
from luthier.schedules.cpu.contract import as_product, is_box, pack_panel, register_tile
from luthier.schedules.cpu.contract import tile as tile_of

Array = np.ndarray[Any, Any]
TYPICAL = 2560  # the height of an image whose extents only the run knows, times its channels
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
    """f32 [9, ...] taps to f32 [(m+2)^2, ...], computed in f64."""
    g = matrices(m)[1]
    both, flat = np.kron(g, g), w.reshape(9, -1)
    out = np.empty((len(both), flat.shape[1]), np.float32)
    for k in range(0, flat.shape[1], 2048):  # pieces that stay in cache
        out[:, k : k + 2048] = both @ flat[:, k : k + 2048].astype(np.float64)
    return out.reshape(-1, *w.shape[1:])


@dataclass(frozen=True, slots=True)
class WinogradPacking:
    """Weights [3, 3, C, K] of a convolution to the panels of the product: packed (the panels' first axis is the tap), then
    transformed."""

    param: str
    m: int
    panels: Packing

    def apply(self, w: Array) -> Array:
        return transformed_weights(self.panels.apply(w.reshape(9, *w.shape[2:])), self.m)


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


KNOBS = (
    Knob("tile", "outputs along one side of a transformed tile: 2 or 4", (2, 4), group="form"),
    Knob("block", "tiles of a block whose three steps are one kernel, 0: three kernels", (0, 12, 24, 48), group="form"),
)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, tile: int | None = None, block: int | None = None) -> Schedule | None:
    """``tile``: m, else the fastest of what ``LUTHIER_WINOGRAD`` allows; ``block``: tiles of a block, 0 for three kernels."""
    if caps.gpu or (tile is None and settings.winograd.get() == 0):
        return None
    conv = find(s.compute, constants)
    if conv is None:
        return None
    lanes = caps.lanes(32)
    n = conv.batch.extent.attr if conv.batch is not None and conv.batch.extent.op == "const" else 1
    k = conv.k.extent.attr
    h, w = (a.extent.attr if a.extent.op == "const" else min(max(TYPICAL // max(conv.c, k), 8), 160) for a in (conv.h, conv.wd))
    if lanes < 4 or conv.c % lanes or k % lanes:
        return None
    forms = [(m, b) for m in ((2, 4) if tile is None else (tile,)) for b in (blocks(m, n, h, w, conv.c, k, caps) if block is None else (block,))]
    if tile is None:
        forms = [(0, 0), *(x for x in forms if x[0] <= settings.winograd.get())]
    m, b = min(forms, key=lambda x: cycles(x[0], x[1], n, h, w, conv.c, k, lanes, caps))
    return None if not m else _schedule(schedule(_rewrite(s.compute, conv, m)), conv, m, b, caps)


def blocks(m: int, n: int, h: int, w: int, c: int, k: int, caps: Capabilities) -> tuple[int, ...]:
    """Tiles of a block that are worth a try: what half the second-level cache and a stack hold, if that leaves work for threads."""
    b = min(caps.l2 * 7 // 16, caps.local_bytes) // (4 * (m + 2) ** 2 * max(c, k)) // 6 * 6
    return (0, min(b, 48)) if b >= 12 and n * -(-h // m) * -(-w // m) >= 8 * b else (0,)


def cycles(m: int, block: int, n: int, h: int, w: int, c: int, k: int, lanes: int, caps: Capabilities) -> float:
    """Estimated cycles of one core: m = 0 for the direct sum, block = 0 for three kernels. Two FMAs a cycle at 85 % for products; a
    transform costs four instructions for each transformed vector at 1.6 a cycle; the third-level cache moves 8 bytes a cycle, memory 3."""
    if m == 0:
        return n * h * w * 9 * c * k / (2 * lanes * 0.85)
    f, r = (m + 2) ** 2, n * -(-h // m) * -(-w // m)
    rows = -(-r // 6) * 6 if r > 6 else max(r, 5)
    product = f * rows * c * k / (2 * lanes * 0.85)
    weights = 4 * f * c * k
    transforms = 4 * f * r * (c + k) / lanes / 1.6
    if block:
        return max(product, -(-r // block) * weights / 8) * 1.05 + transforms + 2000
    moved = 8 * f * r * (c + k)
    speed = 3 if moved > 2 * caps.l3 else 8
    return max(product, weights / 5) + transforms + (moved / speed if moved > caps.l2 else 0) + 2000


# ---------------------------------------------------------------- recognising


def find(c: Compute, constants: Mapping[str, Any]) -> Conv | None:
    """The convolution of a Compute with nothing but elementwise work behind it."""
    lets = [x for x in c.lets if isinstance(x, Pull)]
    if len(lets) != len(c.lets) or len(c.outs) != 1 or lets[-1].name != c.outs[0]:
        return None
    reds = [x for x in lets if x.expr.op == "reduce"]
    if len(reds) != 1 or len(reds[0].axes) not in (3, 4):
        return None
    acc = reds[0]
    e = acc.expr
    if e.attr[0] != "sum" or len(e.args) != 1 or len(e.attr[1]) != 3:
        return None
    f = as_product(e.args[0])
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
    if any(not is_const(s, 3) for s in w.shape[:2]) or any(s.op != "const" for s in (*w.shape, x.shape[3])):
        return None
    if any(not is_const(red[i].extent, s.attr) for i, s in zip(wi[:3], w.shape[:3], strict=True)):
        return None
    if k.extent.op != "const":
        return None
    batch = lead[0] if lead else None
    if not (xi[0] is batch.var if batch is not None else xi[0].op == "const" and is_const(x.shape[0], 1)):
        return None
    lo = [h.var + wi[0] - xi[1], wd.var + wi[1] - xi[2]]
    if any(p.op != "const" or p.attr < 0 for p in lo) or (mask is not None and not is_box(mask, x, xi)):
        return None
    if not only_pointwise(lets, acc):
        return None
    return Conv(acc, x, w, batch, h, wd, k, w.shape[2].attr, (lo[0].attr, lo[1].attr))


def only_pointwise(lets: Sequence[Pull], acc: Pull) -> bool:
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


def _rewrite(c: Compute, conv: Conv, m: int) -> Compute:
    """The Compute with the sum replaced by transforms and products; tiles are numbered r = (n * ny + y) * nx + x."""
    n = m + 2
    a_mat, _, b_mat = matrices(m)
    ny, nx = ((a.extent + (m - 1)) // m for a in (conv.h, conv.wd))
    tiles = (const(1) if conv.batch is None else conv.batch.extent) * (ny * nx)
    a, b, j, i, f = axis("a", n), axis("b", n), axis("j", n), axis("i", m), axis("f", n * n)
    r, ch, k = axis("r", tiles), axis("c", conv.c), axis("k", conv.k.extent)
    top, left = r.var // nx % ny * m - conv.lo[0], r.var % nx * m + j.var - conv.lo[1]

    def source(q: int) -> Expr:
        inside = land(*(t for e, s in ((top + q, conv.x.shape[1]), (left, conv.x.shape[2])) for t in (const(0) <= e, e < s)))
        return load(conv.x, [r.var // (nx * ny), top + q, left, ch.var], inside)

    t = pull("wino.t", [r, a, j, ch], cases(a.var, combine(b_mat.T, [source(q) for q in range(n)])))
    v = pull("wino.v", [a, b, r, ch], cases(b.var, combine(b_mat.T, [load(t.buf, [r.var, a.var, const(q), ch.var]) for q in range(n)])))
    u = Buffer(f"{conv.w.name}.wino", f32, (f.extent, ch.extent, k.extent), "param", False)
    acc = pull("wino.z.acc", [f, r, k], sum_(ch, load(v.buf, [f.var // n, f.var % n, r.var, ch.var]) * load(u, [f.var, ch.var, k.var])))
    z = pull("wino.z", [f, r, k], load(acc.buf, [f.var, r.var, k.var]))
    s = pull("wino.s", [r, i, b, k], cases(i.var, combine(a_mat.T, [load(z.buf, [b.var + q * n, r.var, k.var]) for q in range(n)])))
    at = (conv.h.var // m) * nx + conv.wd.var // m
    if conv.batch is not None:
        at = at + conv.batch.var * (nx * ny)
    taps = combine(a_mat.T, [load(s.buf, [at, conv.h.var % m, const(q), conv.k.var]) for q in range(n)])
    y = Pull(conv.acc.buf, conv.acc.axes, cases(conv.wd.var % m, taps))
    lets = tuple(q for p in c.lets for q in ((t, v, acc, z, s, y) if p is conv.acc else (p,)))
    return replace(c, params=(*c.params, u), lets=lets)


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
        y = x if abs(q) == 1 else x * const(abs(q), x.dtype)
        e = (y if q > 0 else -y) if e is None else e + y if q > 0 else e - y
    assert e is not None
    return e


# ---------------------------------------------------------------- scheduling


def _schedule(s: Schedule, conv: Conv, m: int, block: int, caps: Capabilities) -> Schedule:
    """Three kernels over all tiles, or (``block``) one over blocks of tiles whose transformed values stay in cache."""
    o, lanes = s.compute.outs[0], caps.lanes(32)
    for n in [n for n in s.stages if n != o and not n.startswith("wino.")]:
        s = inline(s, n)
    s = _products(s, conv, m, block, caps)
    # input: a round a tile and vector of channels; rows of the tile into a local block, then its columns
    s = vectorize_tail(s, "wino.v.c", lanes)
    s = reorder(s, *(f"wino.v.{x}" for x in ("r", "c.0", "a", "b", "c.1")))
    s = annotate(s, "wino.v.b", "unroll")
    s = stage_locally(s, "wino.t", "wino.v.c.0", ("j", "a", "c"))
    # output: columns into a local block, then rows, epilogue and stores inside the image
    *lead, h, w, k = [lp.name for lp in s.stages[o].loops]
    s = vectorize_tail(split(split(s, h, m), w, m), k, lanes)
    s = reorder(s, *lead, f"{h}.0", f"{w}.0", f"{k}.0", f"{h}.1", f"{w}.1", f"{k}.1")
    s = annotate(s, f"{w}.1", "unroll")
    s = stage_locally(s, "wino.s", f"{k}.0", ("b", "i", "k"))
    for x in (*lead, f"{h}.0")[1:] + (f"{w}.0",):
        s = fuse(s, s.stages[o].loops[0].name, x)
    tiles = s.stages[o].loops[0].name
    if not block:
        return annotate(annotate(s, tiles, "parallel"), "wino.v.r", "parallel")
    s = split(s, tiles, block)
    s = annotate(annotate(s, f"{tiles}.0", "parallel"), s.stages["wino.z"].loops[0].name, "serial")
    return stage(stage(s, "wino.v", at=f"{tiles}.0", pad=(2,)), "wino.z", at=f"{tiles}.0", pad=(1, 2))


def _products(s: Schedule, conv: Conv, m: int, block: int, caps: Capabilities) -> Schedule:
    """Register tiles of the batched product over panels of transformed weights."""
    lanes = caps.lanes(32)
    _, r, k = s.stages["wino.z.acc"].axes
    mu, nr = tile_of(const(block) if block else r.extent, k.extent, lanes, caps.registers)
    u = next(x for x in loads(s.stages["wino.z.acc"].expr) if k.var in load_parts(x)[1])
    s, padded = pack_panel(s, "wino.z.acc", u, k.var, nr * lanes)
    s = register_tile(s, "wino.z.acc", "wino.z", k.var, [r], mu, nr * lanes, lanes, 2, caps, padded, False, None, None)
    if block:
        s = stage(s, "wino.z.acc", at="wino.z.uo", pad=(1, 2))
    return replace(s, packed={n: WinogradPacking(conv.w.name, m, p) for n, p in s.packed.items()})  # type: ignore[misc]


def vectorize_tail(s: Schedule, loop: str, lanes: int) -> Schedule:
    return annotate(split(s, loop, lanes), f"{loop}.1", "vectorize")


def stage_locally(s: Schedule, tensor: str, at: str, order: tuple[str, str, str]) -> Schedule:
    """A block of one tile and one vector: a serial loop, the cases of the transform unrolled, lanes."""
    s = stage(s, tensor, at=at)
    outer, inner, lane = (f"{tensor}.{x}" for x in order)
    s = reorder(s, outer, inner, lane)
    return annotate(annotate(s, inner, "unroll"), lane, "vectorize")
