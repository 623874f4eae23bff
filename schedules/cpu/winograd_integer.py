"""Winograd's filtering of 8-bit 3x3 convolutions of stride 1, exact: 4 (m = 4) or 2.25 times fewer products, all in integers.

The transforms of F(m x m, 3 x 3) with whole points (0, +-1, +-2, infinity) have whole coefficients but for ``G``, which is multiplied
by 24 (m = 4) or 2 (m = 2); its last row takes half of that and the output transform the other half, so that transformed
weights fit 16 bits. Transformed inputs do too: rows of ``B`` sum to at most 10, and ``10 * 10 * 255 < 2**15``. Products of 16-bit
pairs accumulate in i32 **modulo 2**32**: what overflows on the way does no harm, for ``scale**2 * y`` comes out modulo 2**32,
where ``scale**2`` is ``9 * 64`` or ``4``; the odd factor has an inverse modulo 2**32, the power of two is a shift. The result is
the convolution itself as long as ``|y| * 64 < 2**31``, which is checked on the weights at compile time.

The Compute takes the form that :mod:`luthier.schedules.cpu.winograd` describes, with i16 operands and a dot product instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier import settings
from luthier.ir.compute import Axis, Compute, Pull, axis, pull, sum_
from luthier.ir.dtypes import i16, i32
from luthier.ir.expr import Expr, cast, const, is_const, land, load, load_parts
from luthier.ir.intrin import Instruction
from luthier.ir.loop import Buffer
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Packing, Schedule, annotate, fuse, inline, pack, reorder, schedule, split, stage
from luthier.schedules.cpu import contract, contract_integer
from luthier.schedules.cpu.contract_integer import Operand, operand
from luthier.schedules.cpu.integer_epilogue import simplify_epilogue
from luthier.schedules.cpu.winograd import cases, combine, only_pointwise, stage_locally, vectorize_tail
from luthier.schedules.intrin import usable

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """``y * odd * 2**shift = at @ ((g w g') * (bt x bt')) @ at'`` for tiles of m x m outputs; ``inverse``: of ``odd`` modulo 2**32."""

    m: int
    at: Array
    g: Array
    bt: Array
    shift: int
    inverse: int


FORMS = {
    2: Form(
        2, np.array([[1, 1, 1, 0], [0, 1, -1, -1]]), np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]),
        np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]), 2, 1,
    ),
    4: Form(
        4, np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 2]]),
        np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 12]]),
        np.array([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]),
        6, pow(9, -1, 1 << 32),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class IntegerWinogradPacking:
    """Weights [3, 3, C, K] to panels of the product (their first axis is the tap), transformed, as i16."""

    param: str
    m: int
    panels: Packing

    def apply(self, w: Array) -> Array:
        """i16 [(m + 2)^2, ...] of i8 or u8 taps."""
        p = self.panels.apply(w.reshape(9, *w.shape[2:]))
        g, flat = FORMS[self.m].g, p.reshape(9, -1)
        n = len(g)
        out = np.empty((n * n, flat.shape[1]), np.int16)
        for k in range(0, flat.shape[1], 16384):  # pieces that stay in cache; everything fits 16 bits (see _fits)
            x = flat[:, k : k + 16384].astype(np.int16)
            half = [_times(g, x[j::3]) for j in range(3)]  # half[j][a] = sum_i g[a, i] x[i, j]
            for a in range(n):
                for b, y in enumerate(_times(g, [half[j][a] for j in range(3)])):
                    out[a * n + b, k : k + 16384] = y
        return out.reshape(-1, *p.shape[1:])


def _times(g: Array, xs: Any) -> list[Array]:
    """``g @ xs`` for a matrix of small whole numbers and i16 rows."""
    out = []
    for row in g:
        terms = [x if q == 1 else x * np.int16(q) for q, x in zip(row, xs, strict=True) if q]
        out.append(sum(terms[1:], terms[0]))
    return out


@dataclass(frozen=True, slots=True)
class Conv:
    """``acc`` is the sum over x[n, h + i - lo0, w + j - lo1, c] (less its zero point) and w[i, j, c, k]."""

    acc: Pull
    x: Operand
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
    instr = next((i for i in usable(caps) if i.a is i16 and i.b is i16), None)
    conv = None if instr is None else find(s.compute, constants)
    if conv is None or instr is None:
        return None
    n, h, w = (1 if a is None else a.extent.attr for a in (conv.batch, conv.h, conv.wd))
    k = conv.k.extent.attr
    if caps.lanes(32) < 4 or conv.c % caps.lanes(16) or k % caps.lanes(32):
        return None
    forms = [(m, b) for m in ((2, 4) if tile is None else (tile,)) for b in ((0,) if block is None else (block,))]
    if tile is None:
        forms = [(0, 0), *(x for x in forms if x[0] <= settings.winograd.get())]
    bytewise = any(i.group == 4 for i in usable(caps))
    forms = [x for x in forms if not x[0] or _fits(FORMS[x[0]], conv, constants)]
    m, b = min(forms, key=lambda x: cycles(x[0], x[1], n, h, w, conv.c, k, caps, bytewise), default=(0, 0))
    return None if not m else _schedule(schedule(_rewrite(s.compute, conv, FORMS[m])), conv, FORMS[m], b, instr, caps, constants)


def _fits(f: Form, conv: Conv, constants: Mapping[str, Any]) -> bool:
    """Operands stay within 16 bits, results within the bits that the shift leaves."""
    w = np.asarray(constants[conv.w.name]).astype(np.int32).reshape(-1, conv.k.extent.attr)
    zero = 0 if conv.x.zero is None else int(conv.x.zero.attr)
    lo, hi = (int(q) - zero for q in conv.x.buf.dtype.limits())
    rows = int(np.abs(f.bt).sum(1).max()), int(np.abs(f.g).sum(1).max())
    small = rows[0] ** 2 * max(hi, -lo) < 1 << 15 and rows[1] ** 2 * int(np.abs(w).max(initial=0)) < 1 << 15
    up, down = np.maximum(w, 0).sum(0), np.minimum(w, 0).sum(0)  # of each filter: what it makes of the largest and smallest inputs
    top, low = int((hi * up + lo * down).max(initial=0)), int((lo * up + hi * down).min(initial=0))
    return small and max(top, -low) < 1 << (31 - f.shift)


def cycles(m: int, block: int, n: int, h: int, w: int, c: int, k: int, caps: Capabilities, bytewise: bool) -> float:
    """Estimated cycles of one core: m = 0 for the direct sum, block = 0 for three kernels. A dot product of 16-bit pairs takes two of
    three slots of a cycle (measured on Zen 3), one of bytes does twice as many products in one; the rest as for floats."""
    lanes = caps.lanes(32)
    pairs = 3.0 * lanes * 0.95
    if m == 0:
        return n * h * w * 9 * c * k / (pairs * (4 if bytewise else 1))
    f, r = (m + 2) ** 2, n * -(-h // m) * -(-w // m)
    rows = -(-r // 6) * 6 if r > 6 else max(r, 5)
    product = f * rows * c * k / pairs
    weights = 2 * f * c * k
    transforms = 4 * f * r * (c / 2 + k) / lanes / 1.6
    if block:
        return max(product, -(-r // block) * weights / 8) * 1.05 + transforms + 2000
    moved = 2 * f * r * (2 * c + 4 * k)
    speed = 3 if moved > 2 * caps.l3 else 8
    return max(product, weights / 5) + transforms + (moved / speed if moved > caps.l2 else 0) + 2000


# ---------------------------------------------------------------- recognising


def find(c: Compute, constants: Mapping[str, Any]) -> Conv | None:
    """The quantized convolution of a Compute with nothing but elementwise work behind it."""
    lets = [x for x in c.lets if isinstance(x, Pull)]
    if len(lets) != len(c.lets) or len(c.outs) != 1 or lets[-1].name != c.outs[0] or c.dims:
        return None
    reds = [x for x in lets if x.expr.op == "reduce"]
    if len(reds) != 1 or len(reds[0].axes) not in (3, 4):
        return None
    acc = reds[0]
    e = acc.expr
    if e.attr[0] != "sum" or len(e.args) != 1 or len(e.attr[1]) != 3 or e.dtype is not i32:
        return None
    f = contract.as_product(e.args[0])
    ops = None if f is None else [operand(q) for q in f]
    if ops is None or ops[0] is None or ops[1] is None:
        return None
    x, w = (ops[0], ops[1]) if ops[1].buf.name in constants else (ops[1], ops[0])
    (xb, xi, mask, _), (wb, wi, wmask, _) = load_parts(x.ld), load_parts(w.ld)
    red = {a.var: a for a in e.attr[1]}
    if wb.name not in constants or xb.name in constants or w.zero is not None or wb.rank != 4 or xb.rank != 4 or wmask is not None:
        return None
    if x.zero is not None and x.zero.op != "const":
        return None
    *lead, h, wd, k = acc.axes
    if any(i not in red for i in wi[:3]) or len(set(wi[:3])) != 3 or wi[3] is not k.var or xi[3] is not wi[2]:
        return None
    if any(not is_const(s, 3) for s in wb.shape[:2]) or any(s.op != "const" for s in (*wb.shape, *xb.shape)):
        return None
    if any(not is_const(red[i].extent, s.attr) for i, s in zip(wi[:3], wb.shape[:3], strict=True)):
        return None
    batch = lead[0] if lead else None
    if not (xi[0] is batch.var if batch is not None else xi[0].op == "const" and is_const(xb.shape[0], 1)):
        return None
    lo = [h.var + wi[0] - xi[1], wd.var + wi[1] - xi[2]]
    if any(p.op != "const" or p.attr < 0 for p in lo) or (mask is not None and not contract.is_box(mask, xb, xi)):
        return None
    if not only_pointwise(lets, acc) or any(a.extent.op != "const" for a in acc.axes):
        return None
    return Conv(acc, x, wb, batch, h, wd, k, wb.shape[2].attr, (lo[0].attr, lo[1].attr))


# ---------------------------------------------------------------- rewriting


def _rewrite(c: Compute, conv: Conv, fm: Form) -> Compute:
    """The Compute with the sum replaced by transforms and products; tiles are numbered r = (n * ny + y) * nx + x."""
    m, n = fm.m, fm.m + 2
    ny, nx = -(-conv.h.extent.attr // m), -(-conv.wd.extent.attr // m)
    tiles = (1 if conv.batch is None else conv.batch.extent.attr) * ny * nx
    a, b, j, i, f = axis("a", n), axis("b", n), axis("j", n), axis("i", m), axis("f", n * n)
    r, ch, k = axis("r", tiles), axis("c", conv.c), axis("k", conv.k.extent)
    top, left = r.var // nx % ny * m - conv.lo[0], r.var % nx * m + j.var - conv.lo[1]
    xb = conv.x.buf
    zero = 0 if conv.x.zero is None else int(conv.x.zero.attr)

    def source(q: int) -> Expr:
        inside = land(*(t for e, s in ((top + q, xb.shape[1]), (left, xb.shape[2])) for t in (const(0) <= e, e < s)))
        v = cast(load(xb, [r.var // (nx * ny), top + q, left, ch.var], inside, const(zero, xb.dtype)), i16)
        return v - const(zero, i16) if zero else v

    t = pull("wino.t", [r, a, j, ch], cases(a.var, combine(fm.bt, [source(q) for q in range(n)])))
    v = pull("wino.v", [a, b, r, ch], cases(b.var, combine(fm.bt, [load(t.buf, [r.var, a.var, const(q), ch.var]) for q in range(n)])))
    u = Buffer(f"{conv.w.name}.wino", i16, (f.extent, ch.extent, k.extent), "param", False)
    product = cast(load(v.buf, [f.var // n, f.var % n, r.var, ch.var]), i32) * cast(load(u, [f.var, ch.var, k.var]), i32)
    acc = pull("wino.z.acc", [f, r, k], sum_(ch, product))
    z = pull("wino.z", [f, r, k], load(acc.buf, [f.var, r.var, k.var]))
    s = pull("wino.s", [r, i, b, k], cases(i.var, combine(fm.at, [load(z.buf, [b.var + q * n, r.var, k.var]) for q in range(n)])))
    at = (conv.h.var // m) * nx + conv.wd.var // m
    if conv.batch is not None:
        at = at + conv.batch.var * (nx * ny)
    taps = combine(fm.at, [load(s.buf, [at, conv.h.var % m, const(q), conv.k.var]) for q in range(n)])
    whole = cases(conv.wd.var % m, taps) * const(fm.inverse, i32) >> const(fm.shift, i32)
    y = Pull(conv.acc.buf, conv.acc.axes, whole)
    lets = tuple(q for p in c.lets for q in ((t, v, acc, z, s, y) if p is conv.acc else (p,)))
    return replace(c, params=(*c.params, u), lets=lets)


# ---------------------------------------------------------------- scheduling


def _schedule(s: Schedule, conv: Conv, fm: Form, block: int, instr: Instruction, caps: Capabilities, constants: Mapping[str, Any]) -> Schedule:
    """Three kernels over all tiles, or (``block``) one over blocks of tiles whose transformed values stay in cache."""
    o, m = s.compute.outs[0], fm.m
    for n in [n for n in s.stages if n != o and not n.startswith("wino.")]:
        s = inline(s, n)
    s = simplify_epilogue(s, o, constants)
    s = _products(s, conv, fm, block, instr, caps)
    # input: a round a tile and vector of channels; rows of the tile into a local block, then its columns
    s = vectorize_tail(s, "wino.v.c", caps.lanes(16))
    s = reorder(s, *(f"wino.v.{x}" for x in ("r", "c.0", "a", "b", "c.1")))
    s = annotate(s, "wino.v.b", "unroll")
    s = stage_locally(s, "wino.t", "wino.v.c.0", ("j", "a", "c"))
    # output: columns into a local block, then rows, epilogue and stores inside the image
    *lead, h, w, k = [lp.name for lp in s.stages[o].loops]
    s = vectorize_tail(split(split(s, h, m), w, m), k, caps.lanes(32))
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


def _products(s: Schedule, conv: Conv, fm: Form, block: int, instr: Instruction, caps: Capabilities) -> Schedule:
    """Register tiles of the batched dot products over panels of transformed weights."""
    lanes, acc = caps.lanes(32), "wino.z.acc"
    _, r, k = s.stages[acc].axes
    mu, nr = contract_integer.tile(const(block) if block else r.extent, k.extent, lanes, caps.registers, instr, False)
    s = pack(s, f"{conv.w.name}.wino", (0, 2, 1), {2: nr * lanes, 1: instr.group})
    s = split(s, f"{acc}.c", instr.group, "guard")
    s = contract.register_tile(s, acc, "wino.z", k.var, [r], mu, nr * lanes, lanes, 1, caps, True, False, None, None)
    s = contract_integer.dotted(s, acc, f"{acc}.c", instr, 4)
    if block:
        s = stage(s, acc, at="wino.z.uo", pad=(1, 2))
    name = f"{conv.w.name}.wino.pack"
    return replace(s, packed={**s.packed, name: IntegerWinogradPacking(conv.w.name, fm.m, s.packed[name])})  # type: ignore[dict-item]


