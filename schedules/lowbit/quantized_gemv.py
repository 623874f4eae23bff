"""Template for products with grouped low-bit weights: integer dot products with the dequantization fused, or exact f32.

Pattern: :mod:`luthier.schedules.lowbit.layouts`. A lane is a row of the weights, with four columns in a word. The activations are rounded
to 8 bits by a first kernel (with their sums, for zero points and offsets); the second multiplies bytes, keeps 16-bit sums as
long as they cannot overflow and applies scales when a group ends. Several row blocks are walked at once, each a contiguous
stream with prefetch; a few activation rows share the unpacked weights. Exact activations multiply the masked fields as floats,
the position of the field folded into the activation.

NMSE against f64: 8-bit activations at most 2e-4 on normally distributed ones (groups of 32: 3e-5); exact ones 1e-11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, f16, f32, i8, i16, i32, i64, u8, u32
from luthier.ir.expr import (
    Expr,
    bcast,
    bitcast,
    call,
    cast,
    const,
    load,
    loads,
    maximum,
    ramp,
    rewrite,
    select,
    shuffle,
    substitute,
    unary,
    var,
    vreduce,
)
from luthier.ir.intrin import Instruction
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, If, Let, Stmt, Store, block
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.make_func import make_func
from luthier.schedules.base.schedule import Schedule
from luthier.schedules.intrin import usable
from luthier.schedules.intrin.byte_vectors import FEATURE, SPELLING, madd_bytes, madd_small, madd_words, sign_bytes
from luthier.schedules.lowbit.layouts import LowbitPacking, LowbitProduct, dim_of, group_stream, match, row_point
from luthier.schedules.lowbit.packed_layout import fields, pack_words, pieces

UNIT = 32
PREFETCH = 4096  # bytes ahead in every stream


KNOBS = (
    Knob("streams", "places of the weights that a loop walks at once", (2, 4)),
    Knob("rows", "of the activations whose sums are in registers at once", (1, 2, 4)),
)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, streams: int | None = None, rows: int | None = None) -> Any:
    """Kernels of a matching Compute, or None. ``streams``: row blocks at once; ``rows``: activation rows at once."""
    if caps.gpu or FEATURE not in caps.features:
        return None
    p = match(s.compute, constants)
    if p is None or p.columns % UNIT or p.outputs < 8 or p.bits not in (1, 2, 3, 4, 5, 6, 8) or p.group % 16:
        return None
    flush = gcd(gcd(p.group, p.act) if p.act else p.group, 64)
    if flush % 16 or (p.act and (p.act % 16 or p.act > 256)) or (p.offset is not None and _base(p)):
        return None
    if p.act and isinstance(p.zero_const, float):
        return None
    if p.act and p.bits == 8 and caps.vector_bits > 256:
        return None
    return GemvBuilder(s, p, caps, constants, flush, streams, rows).kernels()


def _base(p: LowbitProduct) -> int:
    """What is subtracted from a value before it is stored."""
    return p.low if p.bits < 8 else 128 if p.low >= 0 else 0


class Body:
    """Statements under construction; every value is named when it is made, so that it is computed where it stands."""

    def __init__(self) -> None:
        self.stmts: list[Stmt] = []
        self.n = 0

    def let(self, e: Expr, name: str = "v") -> Expr:
        self.n += 1
        v = var(f"{name}${self.n}", e.dtype, None)
        self.stmts.append(Let(v, e))
        return v

    def put(self, s: Stmt) -> None:
        self.stmts.append(s)

    def take(self) -> Stmt:
        out = block(*self.stmts)
        self.stmts = []
        return out


@dataclass
class GemvBuilder:
    """A kernel that prepares the activations and one that multiplies; what they share with look-up kernels."""

    s: Schedule
    p: LowbitProduct
    caps: Capabilities
    constants: Mapping[str, Any]
    flush: int
    streams: int | None
    rows: int | None
    template = "quantized_gemv"

    @property
    def lanes(self) -> int:
        """Rows of the weights in a register of 32-bit lanes."""
        return self.caps.vector_bits // 32

    @property
    def words(self) -> bool:
        """8-bit weights and activations are multiplied as 16-bit numbers, where no instruction gives a byte the sign of another."""
        p = self.p
        return bool(p.act) and p.bits == 8 and self.dot is None and self.caps.vector_bits not in SPELLING["bytes.sign"].get(self.caps.printer, {})

    @property
    def unit_words(self) -> int:
        """Words a lane of ``UNIT`` columns."""
        return self.p.bits

    @property
    def dot(self) -> Instruction | None:
        """An instruction that adds four byte products to 32 bits, for fields (never above 127) as either operand type."""
        found = [i for i in usable(self.caps) if i.group == 4 and i.adds and i.acc is i32 and i.a.bits == 8 and i.b is i8]
        found = [i for i in found if self.caps.printer == "llvm" and (self.p.bits < 8 or i.a is i8)]
        return next(iter(sorted(found, key=lambda i: i.a is i8)), None)

    def kernels(self) -> Any:
        from luthier.schedules.select import Kernels, build_kernel

        p = self.p
        self.prepare()
        funcs = (self.activations(), self.product())
        packed, packings = {}, {}
        for q in self.packs:
            packed[q.buf.name] = q.apply(self.constants[q.param])
            packings[q.buf.name] = q
        name = self.template
        done = tuple(build_kernel(replace(f, attrs={**f.attrs, "template": name}), self.caps) for f in funcs)
        trace = ((name, f"bits={p.bits}", f"group={p.group}", f"act={p.act}", f"streams={self.r}"),)
        return Kernels(done, tuple(replace(b, scope="global") for b in self.temps), packed, name, trace, packings)

    # ------------------------------------------------------------ buffers

    def prepare(self) -> None:
        p = self.p
        cols, b = p.columns, p.bits
        base = _base(p)
        self.prepare_groups(base)
        self.w = Buffer(f"{p.out.name}.words", i32, (const(self.blocks * (cols // UNIT) * b * self.lanes),), "param", False)
        words = pack_words(b, self.lanes)
        self.packs.insert(0, LowbitPacking(self.source(p.q), p.q, p.n, p.k, 1, lambda u: words(u.astype(np.int16) - base), self.w))
        r = self.streams or self.caps.streams
        while self.blocks % r:
            r //= 2
        self.r = r
        self.xper = len(pieces(b)) * 4 * (cols // UNIT) if not p.act else cols if self.words else cols // 4
        name = p.out.name
        self.xb = Buffer(f"{name}.x", i16 if self.words else i32 if p.act else f32, (self.m * self.xper,), "param", True)
        self.sx = Buffer(f"{name}.xscale", f32, (self.m * (cols // (p.act or UNIT)),), "param", True)
        self.sums = Buffer(f"{name}.xsum", i32 if p.act and self.zc is not None else f32, (self.m * (cols // self.flush),), "param", True)
        self.summed = self.zc != 0 or (not p.act and b == 8)
        self.temps = [self.xb, *([self.sx] if p.act else []), *([self.sums] if self.summed else [])]

    def prepare_groups(self, base: int) -> None:
        """Row blocks, and the streams of scales, zero points (less ``base``) and offsets."""
        p = self.p
        self.blocks = -(-p.outputs // (4 * self.lanes)) * 4
        self.m = dim_of(p.rows)
        self.groups = p.columns // p.group
        self.off = self.zero = None
        self.packs: list[LowbitPacking] = []
        self.sc = self.stream("scales", p.scale, self.stored(p.scale), 0)
        if p.offset is not None:
            self.off = self.stream("offsets", p.offset, self.stored(p.offset), 0)
        elif p.zero_const is None:
            assert p.zero is not None
            zd = (u8 if p.bits < 8 and not base else i16) if p.zero.dtype.is_int else self.stored(p.zero)
            self.zero = self.stream("zeros", p.zero, zd, base)
        self.zc = None if p.zero_const is None else p.zero_const - base

    def stream(self, suffix: str, e: Expr, dtype: DType, base: int) -> Buffer:
        """One value for eight rows of every group, packed in the order in which kernels read it."""
        buf = Buffer(f"{self.p.out.name}.{suffix}", dtype, (const(self.blocks * self.groups * self.lanes),), "param", False)

        def fn(a: Any) -> Any:
            return group_stream((a.astype(np.float64) - base if base else a).astype(dtype.numpy), self.lanes)

        self.packs.append(LowbitPacking(self.source(e), e, self.p.n, self.p.k, self.p.group, fn, buf))
        return buf

    def source(self, e: Expr) -> str:
        ls = loads(e)
        return ls[0].attr[0].name if ls else next(iter(self.constants))

    def stored(self, e: Expr) -> DType:
        """Half precision where the scale was given so, else f32."""
        return f16 if all(ld.dtype is f16 for ld in loads(e)) and loads(e) and len([x for x in (e, *e.args) if x.op == "load"]) else f32

    @property
    def shift(self) -> int:
        """Power of two by which integer sums are too large (fields read in place)."""
        return max((f.scale for f in fields(self.p.bits)), default=0) if self.p.act and self.p.bits < 8 else 0

    # ------------------------------------------------------------ activations

    def activations(self) -> Func:
        """Rounds (or re-arranges) the activations once: bytes, scale of a group, sum of a flush interval."""
        p, b = self.p, Body()
        m = var("m", lo=0, hi=self.m - 1)
        step, w = p.act or UNIT, self.lanes
        g = var("g", lo=0, hi=p.columns // step - 1)
        tile = Buffer("tile", f32, (const(step),), "local")
        lane = var("lane", lo=0, hi=self.lanes - 1)
        at = row_point(p.rows, m)
        fill: list[Stmt] = []
        for j in range(step // w):
            e = substitute(p.x, {**at, p.k.var: g * step + j * w + lane})
            fill.append(For(lane, const(0), const(w), "vectorize", Store(tile, (j * w + lane,), cast(e, f32))))
        v = [b.let(load(tile, [ramp(const(j * w), 1, w)]), "x") for j in range(step // w)]
        if p.act:
            self.round_group(b, v, m, g)
        else:
            self.spread_group(b, v, m, g)
        body = Alloc(tile, block(*fill, b.take()))
        nest = For(g, const(0), const(p.columns // step), "serial", body)
        kind = "serial" if self.m.op == "const" and self.m.attr == 1 else "parallel"
        return make_func(f"{self.s.compute.name}.act", For(m, const(0), self.m, kind, nest), self.s.compute.dims)

    def round_group(self, b: Body, v: list[Expr], m: Expr, g: Expr) -> None:
        p, w = self.p, self.lanes
        top = [unary("abs", x) for x in v]
        while len(top) > 1:
            top = [maximum(top[i], top[i + 1]) if i + 1 < len(top) else top[i] for i in range(0, len(top), 2)]
        amax = b.let(vreduce("max", top[0]), "amax")
        inv = b.let(select(const(0.0, f32) < amax, const(127.0, f32) / amax, const(0.0, f32)), "inv")
        b.put(Store(self.sx, (m * (p.columns // p.act) + g,), amax * const(1 / 127 / (1 << self.shift), f32)))
        q = [b.let(cast(unary("round", x * bcast(inv, w)), i32.vec(w)), "q") for x in v]
        self.store_rounded(b, q, m, g)
        if self.summed:
            self.store_sums(b, q, amax, m, g)

    def store_rounded(self, b: Body, q: list[Expr], m: Expr, g: Expr) -> None:
        """A group of rounded activations as bytes, or as 16-bit numbers."""
        p, w = self.p, self.lanes
        base = m * (p.columns // 4) + g * (p.act // 4)
        for j in range(0, len(q), 2) if self.words else ():
            whole = shuffle([cast(x, i16.vec(w)) for x in q[j : j + 2]], range(2 * w))
            b.put(Store(self.xb, (ramp(base * 4 + j * w, 1, 2 * w),), whole))
        for j in range(0, len(q), 4) if not self.words else ():
            some = q[j : j + 4]
            n = len(some) * w // 4
            whole = shuffle([cast(x, i8.vec(w)) for x in some], range(4 * n))
            b.put(Store(self.xb, (ramp(base + j * w // 4, 1, n),), bitcast(whole, i32.vec(n))))

    def store_sums(self, b: Body, q: list[Expr], amax: Expr, m: Expr, g: Expr) -> None:
        """The sum of every flush interval of a group."""
        p, w = self.p, self.lanes
        n = self.flush // w
        for f in range(p.act // self.flush):
            part = q[f * n]
            for x in q[f * n + 1 : (f + 1) * n]:
                part = part + x
            total = vreduce("add", part)
            where = m * (p.columns // self.flush) + g * (p.act // self.flush) + f
            if self.zc is not None:
                b.put(Store(self.sums, (where,), total * const(int(self.zc) << self.shift, i32)))
            elif self.off is not None:
                b.put(Store(self.sums, (where,), cast(total, f32) * (amax * const(1 / 127, f32))))
            else:
                b.put(Store(self.sums, (where,), cast(total * const(1 << self.shift, i32), f32)))

    def spread_group(self, b: Body, v: list[Expr], m: Expr, g: Expr) -> None:
        """Exact activations in the order of the pieces, times the power of two that undoes a piece's position."""
        p = self.p
        base = m * self.xper + g * (len(pieces(p.bits)) * 4)
        for i, c in enumerate(pieces(p.bits)):
            lo = c.quad * 4 % self.lanes
            quad = shuffle([v[c.quad * 4 // self.lanes]], range(lo, lo + 4))
            factor = [2.0 ** (c.low - _position(c.shift, j, c.count)) for j in range(4)]
            up = shuffle([const(f, f32) for f in factor], range(4))
            b.put(Store(self.xb, (ramp(base + i * 4, 1, 4),), quad * up))
        if self.summed:
            for f in range(UNIT // min(self.flush, UNIT)):
                n = min(self.flush, UNIT) // self.lanes
                part = v[f * n]
                for x in v[f * n + 1 : (f + 1) * n]:
                    part = part + x
                total = vreduce("add", part)
                if self.flush > UNIT:
                    where = m * (p.columns // self.flush) + g // (self.flush // UNIT)
                    b.put(If((g % (self.flush // UNIT)).eq(0), Store(self.sums, (where,), const(0.0, f32))))
                    b.put(Store(self.sums, (where,), load(self.sums, [where]) + total))
                else:
                    b.put(Store(self.sums, (m * (p.columns // self.flush) + g * (UNIT // self.flush) + f,), total))

    # ------------------------------------------------------------ product

    def product(self) -> Func:
        nb = var("nb", lo=0, hi=self.blocks // self.r - 1)
        per = self.rows or self.rows_at_once()
        if self.m.op == "const":
            n = self.m.attr
            parts: list[Stmt] = []
            if n >= per:
                mo = var("mo", lo=0, hi=n // per - 1)
                parts.append(For(mo, const(0), const(n // per), "serial", self.tile(nb, mo * per, per)))
            if n % per:
                parts.append(self.tile(nb, const(n // per * per), n % per))
            body = block(*parts)
        else:
            mo, mt = var("mo", lo=0, hi=self.m // per - 1), var("mt", lo=0, hi=self.m % per - 1)
            body = block(
                For(mo, const(0), self.m // per, "serial", self.tile(nb, mo * per, per)),
                For(mt, const(0), self.m % per, "serial", self.tile(nb, self.m // per * per + mt, 1)),
            )
        return make_func(self.s.compute.name, For(nb, const(0), const(self.blocks // self.r), "parallel", body), self.s.compute.dims)

    def rows_at_once(self) -> int:
        """Activation rows whose sums fit the registers beside the unpacked weights (measured: three with 16 registers)."""
        if self.p.bits <= 2 and self.p.act:
            return 4
        most = 3 if self.caps.registers <= 16 else 6
        return 2 if self.m.op == "const" and self.m.attr in (2, 4) else most

    def tile(self, nb: Expr, m0: Expr, rows: int) -> Stmt:
        """``rows`` activation rows from ``m0`` with ``self.r`` row blocks (two at a time when there are several rows)."""
        step = self.r if rows == 1 else min(2, self.r)
        parts = [self.blocks_of(nb * self.r + r0, step, m0, rows) for r0 in range(0, self.r, step)]
        return block(*parts)

    def blocks_of(self, first: Expr, r: int, m0: Expr, rows: int) -> Stmt:
        p = self.p
        acc = [[Buffer(f"acc{i}_{j}", f32.vec(self.lanes), (), "local") for j in range(rows)] for i in range(r)]
        span = max(self.flush, UNIT)
        g = var("g", lo=0, hi=p.columns // span - 1)
        b = Body()
        for i in range(r if self.caps.streams == 1 else 0):  # one stream runs ahead of the hardware's prefetch, several do not
            for u in range(span // UNIT):
                at = ((first + i) * (p.columns // UNIT) + g * (span // UNIT) + u) * (self.unit_words * self.lanes)
                for w in range(0, self.unit_words, 2):
                    b.put(Call("prefetch", ((self.w, at + (w * self.lanes + PREFETCH // 4)),)))
        emit = self.integer_span if p.act else self.exact_span
        emit(b, first, r, m0, rows, g, span, acc)
        loop = For(g, const(0), const(p.columns // span), "serial", b.take())
        flat = [x for row in acc for x in row]
        start = [Store(x, (), bcast(const(0.0, f32), self.lanes)) for x in flat]
        body = block(*start, loop, self.epilogue(first, r, m0, rows, acc))
        for x in reversed(flat):
            body = Alloc(x, body)
        return body

    def words_of(self, b: Body, first: Expr, i: int, g: Expr, span: int, u: int, w: int) -> Expr:
        p = self.p
        at = ((first + i) * (p.columns // UNIT) + g * (span // UNIT) + u) * (self.unit_words * self.lanes) + w * self.lanes
        return b.let(load(self.w, [ramp(at, 1, self.lanes)]), "w")

    def integer_span(self, b: Body, first: Expr, r: int, m0: Expr, rows: int, g: Expr, span: int, acc: list[list[Buffer]]) -> None:
        """Byte products over ``span`` columns; a flush interval ends in floats."""
        p = self.p
        wide: dict[tuple[int, ...], Expr] = {}
        pools: dict[tuple[int, int, int], tuple[Expr, int]] = {}
        order = fields(p.bits) if p.bits < 8 else ()
        top = (1 << p.bits) - 1
        done, dot = 0, self.dot
        for u in range(span // UNIT):
            words: list[list[Expr]] = [[] for _ in range(r)]
            for w in range(p.bits):
                for i in range(r):
                    words[i].append(bitcast(self.words_of(b, first, i, g, span, u, w), u8.vec(4 * self.lanes)))
                for f in [f for f in order if f.last == w] if p.bits < 8 else [w]:
                    quad = f if isinstance(f, int) else f.quad
                    if self.words:
                        self.add_words(b, wide, [x[w] for x in words], m0, rows, g * span + u * UNIT + w * 4, (u * UNIT + w * 4) // self.flush)
                        continue
                    if isinstance(f, int):
                        vs = [b.let(bitcast(x[w], i8.vec(4 * self.lanes)), "v") for x in words]
                    if isinstance(f, int) and dot is None:
                        mags = [b.let(bitcast(unary("abs", x), u8.vec(4 * self.lanes)), "v") for x in vs]
                    if not isinstance(f, int):
                        vs = [b.let(f.fn(x), "v") for x in words]
                    for j in range(rows):
                        at = (m0 + j) * (p.columns // 4) + g * (span // 4) + u * 8 + quad
                        x = b.let(bitcast(bcast(load(self.xb, [at]), self.lanes), i8.vec(4 * self.lanes)), "x")
                        for i in range(r):
                            sub = (u * UNIT + quad * 4) // self.flush
                            if dot is not None:
                                at32 = (i, j, sub, 0 if isinstance(f, int) else f.scale)
                                old = wide.get(at32, bcast(const(0, i32), self.lanes))
                                wide[at32] = b.let(call(dot.name, i32.vec(self.lanes), old, bitcast(vs[i], dot.a.vec(4 * self.lanes)), x), "d")
                            elif isinstance(f, int):
                                t = madd_words(madd_bytes(mags[i], sign_bytes(x, vs[i])), bcast(const(1, i16), 2 * self.lanes))
                                old = wide.get((i, j, sub))
                                wide[i, j, sub] = b.let(t if old is None else old + t, "d")
                            else:
                                self.add16(b, pools, wide, (i, j, sub), f.scale, madd_small(vs[i], x), 2 * 127 * (top << f.scale))
            while (done + 1) * self.flush <= (u + 1) * UNIT:
                if p.bits != 3 or self.flush >= UNIT or (u + 1) * UNIT >= (done + 1) * self.flush:
                    self.finish(b, pools, wide, done, first, r, m0, rows, g, span, acc)
                done += 1

    def add_words(self, b: Body, wide: dict[Any, Expr], words: list[Expr], m0: Expr, rows: int, col: Expr, sub: int) -> None:
        """One quad of 8-bit weights as 16-bit products: the pair sums of the lower and of the upper half of the rows."""
        n = self.lanes
        halves = [[b.let(cast(shuffle([bitcast(x, i8.vec(4 * n))], range(h * 2 * n, (h + 1) * 2 * n)), i16.vec(2 * n)), "v") for h in (0, 1)] for x in words]
        for j in range(rows):
            quad = bitcast(load(self.xb, [ramp((m0 + j) * self.xper + col, 1, 4)]), i64)
            x = b.let(bitcast(bcast(quad, n // 2), i16.vec(2 * n)), "x")
            for i, hs in enumerate(halves):
                for h, v in enumerate(hs):
                    t, key = madd_words(v, x), (i, j, sub, h)
                    wide[key] = b.let(wide[key] + t if key in wide else t, "d")

    def add16(self, b: Body, pools: dict[Any, tuple[Expr, int]], wide: dict[Any, Expr], key: tuple[int, int, int], scale: int, t: Expr, bound: int) -> None:
        """16-bit sums, moved to 32 bits before they can overflow."""
        k = (*key, scale)
        old = pools.get(k)
        if old is not None and old[1] + bound > 32767:
            self.widen(b, pools, wide, key, scale)
            old = None
        pools[k] = (b.let(t if old is None else old[0] + t, "a"), bound if old is None else old[1] + bound)

    def widen(self, b: Body, pools: dict[Any, tuple[Expr, int]], wide: dict[Any, Expr], key: tuple[int, int, int], scale: int) -> None:
        v, _ = pools.pop((*key, scale))
        t = madd_words(v, bcast(const(1 << (self.shift - scale), i16), 2 * self.lanes))
        wide[key] = b.let(wide[key] + t if key in wide else t, "d")

    def finish(self, b: Body, pools: dict[Any, tuple[Expr, int]], wide: dict[Any, Expr], sub: int, first: Expr, r: int, m0: Expr, rows: int, g: Expr, span: int, acc: list[list[Buffer]]) -> None:
        p = self.p
        col = g * span + sub * self.flush
        for i in range(r):
            s, z, o = self.group_values(b, first + i, col)
            for j in range(rows):
                key = (i, j, sub)
                for scale in sorted({k[3] for k in pools if k[:3] == key}):
                    self.widen(b, pools, wide, key, scale)
                if self.dot is not None:
                    parts = [wide.pop(k) << (self.shift - k[3]) if k[3] != self.shift else wide.pop(k) for k in [k for k in wide if k[:3] == key]]
                    dot = b.let(sum(parts[1:], parts[0]), "d")
                elif self.words:
                    n, (lo, hi) = self.lanes, (wide.pop((*key, h)) for h in (0, 1))
                    dot = b.let(shuffle([lo, hi], range(0, 2 * n, 2)) + shuffle([lo, hi], range(1, 2 * n, 2)), "d")
                else:
                    dot = wide.pop(key)
                sx = b.let(bcast(load(self.sx, [(m0 + j) * (p.columns // p.act) + col // p.act]), self.lanes), "sx")
                where = (m0 + j) * (p.columns // self.flush) + g * (span // self.flush) + sub
                total = None if self.zc == 0 else b.let(bcast(load(self.sums, [where]), self.lanes), "xs")
                if self.zc is not None:
                    t = cast(dot if total is None else dot - total, f32.vec(self.lanes))
                elif z is not None:
                    assert total is not None
                    t = cast(dot, f32.vec(self.lanes)) - z * total
                else:
                    t = cast(dot, f32.vec(self.lanes))
                v = load(acc[i][j], ()) + t * (s * sx)
                if o is not None:
                    assert total is not None
                    v = v + o * total
                b.put(Store(acc[i][j], (), v))

    def group_values(self, b: Body, blk: Expr, col: Expr) -> tuple[Expr, Expr | None, Expr | None]:
        """(scale, zero point, offset) of eight rows at a column, in f32."""
        p = self.p
        at = ramp((blk * self.groups + col // p.group) * self.lanes, 1, self.lanes)

        def get(buf: Buffer | None) -> Expr | None:
            return None if buf is None else b.let(cast(load(buf, [at]), f32), "s")

        s = get(self.sc)
        assert s is not None
        return s, get(self.zero), get(self.off)

    def exact_span(self, b: Body, first: Expr, r: int, m0: Expr, rows: int, g: Expr, span: int, acc: list[list[Buffer]]) -> None:
        p = self.p
        lay = pieces(p.bits)
        sums: dict[tuple[int, int, int, int], Expr] = {}
        lane = f32.vec(self.lanes)
        for u in range(span // UNIT):
            for w in range(p.bits):
                words = [self.words_of(b, first, i, g, span, u, w) for i in range(r)]
                if p.bits == 8:
                    words = [b.let(x ^ bcast(const(-2139062144, i32), self.lanes), "w") for x in words]
                for n, c in enumerate(lay):
                    if c.word != w:
                        continue
                    sub = (u * UNIT + c.quad * 4) // self.flush
                    for k in range(4):
                        low = 8 * k + c.shift
                        top = low + c.count == 32
                        fs = [b.let(cast((bitcast(bitcast(x, u32.vec(self.lanes)) >> low, i32.vec(self.lanes)) if top else x & bcast(const(((1 << c.count) - 1) << low, i32), self.lanes)), lane), "f") for x in words]
                        for j in range(rows):
                            at = (m0 + j) * self.xper + (g * (span // UNIT) + u) * (len(lay) * 4) + n * 4 + k
                            x = b.let(bcast(load(self.xb, [at]), self.lanes), "x")
                            for i in range(r):
                                key = (i, j, sub, k % 2)
                                sums[key] = b.let(sums[key] + fs[i] * x if key in sums else fs[i] * x, "a")
        for sub in range(span // self.flush):
            col = g * span + sub * self.flush
            for i in range(r):
                s, z, o = self.group_values(b, first + i, col)
                for j in range(rows):
                    dot = sums[i, j, sub, 0] + sums[i, j, sub, 1]
                    where = (m0 + j) * (p.columns // self.flush) + g * (span // self.flush) + sub
                    bias = 128 if p.bits == 8 else 0
                    v = load(acc[i][j], ())
                    if self.zc is not None:
                        zc = self.zc + bias
                        t = dot if zc == 0 else dot - bcast(load(self.sums, [where]) * const(float(zc), f32), self.lanes)
                        v = v + t * s
                    else:
                        total = b.let(bcast(load(self.sums, [where]), self.lanes), "xs")
                        if z is not None:
                            v = v + (dot - (z + bcast(const(float(bias), f32), self.lanes)) * total) * s
                        else:
                            assert o is not None
                            v = v + (dot if not bias else dot - bcast(const(float(bias), f32), self.lanes) * total) * s + o * total
                    b.put(Store(acc[i][j], (), v))

    # ------------------------------------------------------------ results

    def epilogue(self, first: Expr, r: int, m0: Expr, rows: int, acc: list[list[Buffer]]) -> Stmt:
        """The elementwise rest of the Compute on ``rows`` times ``r * 8`` results, in lanes."""
        p = self.p
        tile = Buffer("result", f32, (const(rows * r * self.lanes),), "local")
        out = replace(p.out.buf, scope="param")
        lane = var("lane", lo=0, hi=self.lanes - 1)
        parts: list[Stmt] = []
        for i in range(r):
            for j in range(rows):
                parts.append(Store(tile, (ramp(const((j * r + i) * self.lanes), 1, self.lanes),), load(acc[i][j], ())))
        for j in range(rows):
            for i in range(r):
                n = (first + i) * self.lanes + lane
                if p.out is p.acc:
                    at = [*[row_point(p.rows, m0 + j)[a.var] for a in p.rows], n]
                    value: Expr = load(tile, [(j * r + i) * self.lanes + lane])
                else:
                    env = {**row_point(p.out.axes[:-1], m0 + j), p.out.axes[-1].var: n}
                    at = [env[a.var] for a in p.out.axes]
                    value = substitute(rewrite(p.out.expr, _reader(p.acc.name, tile, (j * r + i) * self.lanes, p.out.axes[-1].var)), env)
                    value = substitute(value, {_LANE: lane})
                s: Stmt = Store(out, tuple(at), value)
                if p.outputs % (4 * self.lanes):
                    s = If(n < p.outputs, s)
                parts.append(For(lane, const(0), const(self.lanes), "vectorize", s))
        return Alloc(tile, block(*parts))


_LANE = var("result.lane", lo=0, hi=63)


def _reader(acc: str, tile: Buffer, base: int, n: Expr) -> Callable[[Expr], Expr | None]:
    def f(e: Expr) -> Expr | None:
        return load(tile, [base + _LANE]) if e.op == "load" and e.attr[0].name == acc else None

    return f


def _position(shift: int, byte: int, count: int) -> int:
    """Where a field's lowest bit stands when it is turned into a float: the topmost one is shifted down (a sign bit otherwise)."""
    low = 8 * byte + shift
    return 0 if low + count == 32 else low
