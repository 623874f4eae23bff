"""Template for products with weights of 1, 2 or 3 bits, or ternary ones, by tables of activation sums in registers.

Pattern: :mod:`luthier.schedules.lowbit` with activations that may be rounded. A first kernel makes a table of 16 bytes for every
four columns (every three of ternary weights): the sums of the activations for each pattern of bits, rounded to 8 bits with
one step for a flush interval. The second looks up 32 rows with one byte shuffle, a bit plane of the weights at a time. A ternary triple
is one of 13 patterns up to its sign: four bits and a sign bit, 5/3 bits a weight.

Two bits: both planes of a row stand in neighbouring bytes, so a byte product with (1, 2) sums their look-ups, signed, in 16 bits.
Otherwise bytes are summed in 16 bits without unpacking: ``A`` sums words, ``B`` their high bytes, so the low bytes' sum is ``A - 256 B``.
Complementing a byte negates an entry of a ternary table, because those are stored around 127.5.

NMSE against f64 on normally distributed activations: at most 5e-4 (about 4e-5 at 64 columns a flush, 1.2e-4 for ternary at 256). With one
activation that outweighs all others of its interval, ternary products reach 2e-3: entries of zero are half a step off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product as combinations
from math import gcd
from typing import Any

import numpy as np

from luthier.ir.dtypes import f32, i8, i16, i32, u8, u16
from luthier.ir.expr import (
    Expr,
    bcast,
    bitcast,
    cast,
    compare,
    const,
    load,
    maximum,
    ramp,
    select,
    shuffle,
    substitute,
    unary,
    var,
    vreduce,
)
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, Stmt, Store, block
from luthier.schedules.capabilities import Capabilities
from luthier.schedules.intrin.byte_vectors import FEATURE, lookup_bytes, madd_small
from luthier.schedules.lowbit import LowbitPacking, LowbitProduct, match, pad_rows, row_point
from luthier.schedules.make_func import make_func
from luthier.schedules.quantized_gemv import PREFETCH, Body, GemvBuilder
from luthier.schedules.schedule import Schedule

Array = np.ndarray[Any, Any]

def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, streams: int | None = None, widths: tuple[int, ...] = (1, 2)) -> Any:
    """Kernels of a matching Compute, or None. ``streams``: tiles of 32 rows at once; ``widths``: bits for which look-ups are chosen
    (measured, benchmarks/results); ternary weights (three values) count as 3 values, not as 2 bits, and always are."""
    if caps.gpu or FEATURE not in caps.features:
        return None
    p = match(s.compute, constants)
    if p is None or not p.act or p.low != 0 or p.outputs < 32:
        return None
    ternary = p.high == 2
    if not ternary and (p.bits not in widths or p.bits > 3) or p.columns % 32:
        return None
    flush = gcd(p.group, 256)
    if not ternary:
        while flush // 4 * 255 * ((1 << p.bits) - 1) >= 65536:
            flush //= 2
    if flush < 32:
        return None
    return _Tables(s, p, caps, constants, flush, streams, None).kernels()


def patterns(ternary: bool) -> Array:
    """[16, columns] coefficients of a table's entries: halves with the sign of a bit, or the 13 ternary triples whose first non-zero
    coefficient is 1 (entry 0: all zero; two are not used)."""
    if not ternary:
        bits = (np.arange(16)[:, None] >> np.arange(4)) & 1
        return np.asarray((bits - 0.5).astype(np.float32))
    rows = [t for t in combinations((0, 1, -1), repeat=3) if next((c for c in t if c), 1) == 1]
    return np.array(rows + [(0, 0, 0)] * (16 - len(rows)), np.float32)


def pack_planes(bits: int, size: int) -> Callable[[Array], Array]:
    """[rows, columns] values to bytes [rows / size, columns / 8, bits, size] (two quads a byte), flat, as i32 words."""

    def go(u: Array) -> Array:
        p = pad_rows(u.astype(np.uint8), size)
        v = p.reshape(-1, size, p.shape[1] // 8, 8)
        out = np.zeros((v.shape[0], v.shape[2], bits, size), np.uint8)
        for b in range(bits):
            plane = (((v >> b) & 1) << np.arange(8, dtype=np.uint8)).sum(-1, dtype=np.uint8)
            out[:, :, b] = plane.transpose(0, 2, 1)
        return _lanes(out).view(np.int32).reshape(-1)

    return go


def pack_pairs(size: int) -> Callable[[Array], Array]:
    """[rows, columns] values of two bits to bytes [rows / (size / 2), columns / 8, size] (two quads a byte, the planes of a row side by
    side), flat, as i32 words."""

    def go(u: Array) -> Array:
        p = pad_rows(u.astype(np.uint8), size)
        v = p.reshape(-1, size // 2, p.shape[1] // 8, 8)
        out = np.empty((v.shape[0], v.shape[2], size), np.uint8)
        for b in range(2):
            plane = (((v >> b) & 1) << np.arange(8, dtype=np.uint8)).sum(-1, dtype=np.uint8)
            out[:, :, b::2] = plane.transpose(0, 2, 1)
        return out.view(np.int32).reshape(-1)

    return go


def pack_triples(flush: int, size: int) -> Callable[[Array], Array]:
    """[rows, columns] values 0, 1, 2 to [rows / size, columns / flush, steps, size] bytes: for eight triples their signs and
    four bytes of pattern numbers."""
    table = patterns(True)[:14]
    code = np.zeros((3, 3, 3), np.uint8)
    for i, t in enumerate(table[:14]):
        a = tuple(int(c) for c in t)
        if i and not any(a):
            continue
        code[a[0] + 1, a[1] + 1, a[2] + 1] = i
        if any(a):
            code[1 - a[0], 1 - a[1], 1 - a[2]] = i | 16
    n, steps, signs = triple_steps(flush)

    def go(u: Array) -> Array:
        p = pad_rows(u.astype(np.uint8), size)
        rows = p.shape[0]
        v = p.reshape(rows, -1, flush)
        full = np.ones((rows, v.shape[1], n * 3), np.uint8)
        full[:, :, :flush] = v
        t = full.reshape(rows, v.shape[1], n, 3)
        c = code[t[..., 0], t[..., 1], t[..., 2]]
        odd = (np.arange(n) & 1).astype(np.uint8) * 16
        c = np.where(c == 0, odd, c)  # all zero: alternating signs, so that the half step of entry 0 cancels
        low = np.zeros((rows, v.shape[1], 2 * steps), np.uint8)
        low[:, :, :n] = c & 15
        sg = np.zeros((rows, v.shape[1], 8 * signs), np.uint8)
        sg[:, :, :n] = c >> 4
        out = np.empty((rows, v.shape[1], steps + signs), np.uint8)
        at = np.arange(steps)
        out[..., at + at // 4 + 1] = low[..., 0::2] | (low[..., 1::2] << 4)
        out[..., np.arange(signs) * 5] = np.packbits(sg, axis=-1, bitorder="little")
        out = out.reshape(-1, size, v.shape[1], steps + signs).transpose(0, 2, 3, 1)
        return _lanes(out).view(np.int32).reshape(-1)

    return go


def triple_steps(flush: int) -> tuple[int, int, int]:
    """(triples, bytes of pattern numbers, bytes of signs) of a flush interval."""
    n = -(-flush // 3)
    return n, -(-n // 2), -(-n // 8)


def _lanes(a: Array) -> Array:
    """Bytes of the rows of a register in the order in which even and odd bytes come out as its first and second half."""
    n = a.shape[-1]
    order = np.empty(n, np.int64)
    order[0::2], order[1::2] = np.arange(n // 2), np.arange(n // 2, n)
    return np.ascontiguousarray(a[..., order])


@dataclass
class _Tables(GemvBuilder):
    """Tables instead of rounded activations; scales, offsets and the epilogue are those of the dot-product kernels."""

    template = "lut_gemv"

    @property
    def bytes(self) -> int:
        """Rows looked up at once."""
        return 4 * self.lanes

    @property
    def ternary(self) -> bool:
        return self.p.high == 2

    @property
    def paired(self) -> bool:
        """The planes of a row stand side by side: half as many rows in a register."""
        return self.p.bits == 2 and not self.ternary

    @property
    def parts(self) -> int:
        """Registers of 32-bit lanes that the rows looked up at once take."""
        return 2 if self.paired else 4

    @property
    def width(self) -> int:
        """Columns of a table."""
        return 3 if self.ternary else 4

    @property
    def middle(self) -> float:
        """The byte of an entry of zero. A complement negates around 127.5; where nothing is negated zero is exact. Pairs are signed."""
        return 127.5 if self.ternary else 0.0 if self.paired else 128.0

    @property
    def tables(self) -> int:
        """Tables of a flush interval."""
        return triple_steps(self.flush)[0] if self.ternary else self.flush // 4

    @property
    def base(self) -> int:
        return 1 if self.ternary else 0  # a ternary pattern is made of -1, 0, 1

    def prepare(self) -> None:
        p: LowbitProduct = self.p
        self.prepare_groups(self.base)
        name, blocks = p.out.name, self.blocks // self.parts
        if self.ternary:
            _, steps, signs = triple_steps(self.flush)
            self.step_words = (steps + signs) * self.lanes
            fn = pack_triples(self.flush, self.bytes)
        elif self.paired:
            self.step_words = self.flush // 8 * self.lanes
            fn = pack_pairs(self.bytes)
        else:
            self.step_words = self.flush // 8 * p.bits * self.lanes
            fn = pack_planes(p.bits, self.bytes)
        size = blocks * (p.columns // self.flush) * self.step_words
        self.w = Buffer(f"{name}.words", i32, (const(size),), "param", False)
        self.packs.insert(0, LowbitPacking(self.source(p.q), p.q, p.n, p.k, 1, fn, self.w))
        r = self.streams or (self.caps.streams if self.paired or self.ternary else max(1, self.caps.streams // p.bits))  # sums stay in registers
        while blocks % r:
            r //= 2
        self.r = r
        spans = p.columns // self.flush
        self.xb = Buffer(f"{name}.tables", i32, (self.m * (spans * self.tables * 4),), "param", True)
        self.sx = Buffer(f"{name}.xscale", f32, (self.m * spans,), "param", True)
        self.sums = Buffer(f"{name}.xsum", f32, (self.m * spans,), "param", True)
        self.corr = Buffer(f"{name}.xbase", f32, (self.m * spans,), "param", True)
        streamed = self.zero is not None or self.off is not None
        self.temps = [self.xb, self.sx, self.corr, *([self.sums] if streamed else [])]

    # ------------------------------------------------------------ tables

    def activations(self) -> Func:
        p, b, f = self.p, Body(), self.lanes
        m = var("m", lo=0, hi=self.m - 1)
        spans = p.columns // self.flush
        g = var("g", lo=0, hi=spans - 1)
        cols = self.tables * self.width
        tile = Buffer("tile", f32, (const(-(-max(cols, self.flush) // f) * f),), "local")
        sums = Buffer("entries", f32, (const(self.tables * 16),), "local")
        lane = var("lane", lo=0, hi=f - 1)
        at = row_point(p.rows, m)
        jv = var("j", lo=0, hi=self.flush // f - 1)
        x = cast(substitute(p.x, {**at, p.k.var: g * self.flush + jv * f + lane}), f32)
        fill: list[Stmt] = [For(jv, const(0), const(self.flush // f), "serial", For(lane, const(0), const(f), "vectorize", Store(tile, (jv * f + lane,), x)))]
        fill += [Store(tile, (const(i),), const(0.0, f32)) for i in range(self.flush, cols)]
        top, total = Buffer("top", f32.vec(f), (), "local"), Buffer("total", f32.vec(f), (), "local")
        t = var("t", lo=0, hi=self.tables - 1)
        rows = patterns(self.ternary)
        halves = [[shuffle([const(float(c), f32) for c in rows[h * f : h * f + f, i]], range(f)) for i in range(self.width)] for h in range(16 // f)]
        xs = [b.let(bcast(load(tile, [t * self.width + i]), f), "x") for i in range(self.width)]
        for h in range(16 // f):
            e = xs[0] * halves[h][0]
            for i in range(1, self.width):
                e = e + xs[i] * halves[h][i]
            v = b.let(e, "e")
            b.put(Store(sums, (ramp(t * 16 + h * f, 1, f),), v))
            b.put(Store(top, (), maximum(load(top, ()), unary("abs", v))))
        make = For(t, const(0), const(self.tables), "serial", b.take())
        add = For(jv, const(0), const(self.flush // f), "serial", Store(total, (), load(total, ()) + load(tile, [ramp(jv * f, 1, f)])))
        amax = b.let(vreduce("max", load(top, ())), "amax")
        step = b.let(amax * const(1 / 127, f32), "step")
        inv = b.let(select(const(0.0, f32) < amax, const(127.0, f32) / amax, const(0.0, f32)), "inv")
        whole = b.let(vreduce("add", load(total, ())), "sum")
        where = m * spans + g
        b.put(Store(self.sx, (where,), step))
        weight = 1 if self.ternary else (1 << p.bits) - 1
        part = step * const(-self.middle * self.tables * weight, f32) if self.middle else const(0.0, f32)
        mean = 0.0 if self.ternary else weight / 2
        const_zero = mean - (self.zc or 0)
        b.put(Store(self.corr, (where,), part + whole * const(const_zero, f32) if const_zero else part))
        if self.zero is not None or self.off is not None:
            b.put(Store(self.sums, (where,), whole))
        t2 = var("t2", lo=0, hi=self.tables - 1)
        scale, body = b.take(), Body()
        parts = []
        for h in range(16 // f):
            e = load(sums, [ramp(t2 * 16 + h * f, 1, f)]) * bcast(inv, f)
            if self.middle:
                e = e + bcast(const(self.middle, f32), f)
            parts.append(body.let(cast(cast(unary("round", e), i32.vec(f)), i8.vec(f)), "q"))
        body.put(Store(self.xb, (ramp((where * self.tables + t2) * 4, 1, 4),), bitcast(shuffle(parts, range(16)), i32.vec(4))))
        write = For(t2, const(0), const(self.tables), "serial", body.take())
        zero = bcast(const(0.0, f32), f)
        nest: Stmt = block(*fill, Store(top, (), zero), Store(total, (), zero), make, add, scale, write)
        for buf in (total, top, sums, tile):
            nest = Alloc(buf, nest)
        kind = "serial" if self.m.op == "const" and self.m.attr == 1 else "parallel"
        loop = For(m, const(0), self.m, kind, For(g, const(0), const(spans), "serial", nest))
        return make_func(f"{self.s.compute.name}.tables", loop, self.s.compute.dims)

    # ------------------------------------------------------------ product

    def product(self) -> Func:
        nb = var("nb", lo=0, hi=self.blocks // self.parts // self.r - 1)
        mv = var("m", lo=0, hi=self.m - 1)
        one = self.m.op == "const" and self.m.attr == 1
        m: Expr = const(0) if one else mv
        body = self.tiles(nb * self.r, m)
        if not one:
            body = For(mv, const(0), self.m, "serial", body)
        return make_func(self.s.compute.name, For(nb, const(0), const(self.blocks // self.parts // self.r), "parallel", body), self.s.compute.dims)

    def tiles(self, first: Expr, m: Expr) -> Stmt:
        p, r = self.p, self.r
        acc = [[Buffer(f"acc{i}_{c}", f32.vec(self.lanes), (), "local") for c in range(self.parts)] for i in range(r)]
        spans = p.columns // self.flush
        g = var("g", lo=0, hi=spans - 1)
        b = Body()
        base = [b.let(((first + i) * spans + g) * self.step_words, "at") for i in range(r)]
        look_up = self.look_up_triples if self.ternary else self.look_up_pairs if self.paired else self.look_up_planes
        look_up(b, base, r, m, g, acc, first)
        loop = For(g, const(0), const(spans), "serial", b.take())
        flat = [x for row in acc for x in row]
        start = [Store(x, (), bcast(const(0.0, f32), self.lanes)) for x in flat]
        body = block(*start, loop, self.epilogue(first * self.parts, r * self.parts, m, 1, [[x] for x in flat]))
        for x in reversed(flat):
            body = Alloc(x, body)
        return body

    def word(self, b: Body, at: Expr, step: int) -> Expr:
        if step % 2 == 0 and self.caps.streams == 1:  # beside the loads, so that requests do not come in bursts; the distance is measured
            ahead = 3 * PREFETCH if self.ternary else PREFETCH
            b.put(Call("prefetch", ((self.w, at + (step * self.lanes + ahead // 4)),)))
        return b.let(bitcast(load(self.w, [ramp(at + step * self.lanes, 1, self.lanes)]), u8.vec(self.bytes)), "w")

    def table(self, b: Body, m: Expr, g: Expr, t: int) -> Expr:
        spans = self.p.columns // self.flush
        raw = load(self.xb, [ramp(((m * spans + g) * self.tables + t) * 4, 1, 4)])
        return b.let(bitcast(shuffle([raw], [0, 1, 2, 3] * (self.lanes // 4)), u8.vec(self.bytes)), "t")

    def add(self, b: Body, sums: dict[Any, Expr], key: Any, v: Expr) -> None:
        """Bytes into the two running sums of words."""
        words = bitcast(v, u16.vec(2 * self.lanes))
        for which, x in (("A", words), ("B", words >> 8)):
            old = sums.get((which, key))
            sums[which, key] = b.let(x if old is None else old + x, which)

    def look_up_planes(self, b: Body, base: list[Expr], r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        p = self.p
        sums: dict[Any, Expr] = {}
        for s in range(self.flush // 8):
            ts = [self.table(b, m, g, 2 * s + h) for h in (0, 1)]
            for i in range(r):
                for plane in range(p.bits):
                    w = self.word(b, base[i], s * p.bits + plane)
                    for h in (0, 1):
                        which = (w if not h else bitcast(bitcast(w, u16.vec(2 * self.lanes)) >> 4, u8.vec(self.bytes))) & 15
                        self.add(b, sums, (i, plane), b.let(lookup_bytes(ts[h], which), "v"))
        for i in range(r):
            low = high = None
            for plane in range(p.bits):
                hb = sums["B", (i, plane)]
                lb = sums["A", (i, plane)] - (hb << 8)
                low = lb if low is None else low + (lb << plane)
                high = hb if high is None else high + (hb << plane)
            assert low is not None and high is not None
            self.flush_rows(b, [b.let(low, "lo"), b.let(high, "hi")], acc[i], first + i, m, g)

    def look_up_pairs(self, b: Body, base: list[Expr], r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        weights = shuffle([const(1, u8), const(2, u8)] * (self.bytes // 2), range(self.bytes))
        sums: dict[int, Expr] = {}
        for s in range(self.flush // 8):
            ts = [bitcast(self.table(b, m, g, 2 * s + h), i8.vec(self.bytes)) for h in (0, 1)]
            for i in range(r):
                w = self.word(b, base[i], s)
                for h in (0, 1):
                    which = (w if not h else bitcast(bitcast(w, u16.vec(2 * self.lanes)) >> 4, u8.vec(self.bytes))) & 15
                    v = madd_small(weights, b.let(lookup_bytes(ts[h], which), "v"))
                    sums[i] = b.let(sums[i] + v if i in sums else v, "s")
        for i in range(r):
            self.flush_rows(b, [sums[i]], acc[i], first + i, m, g)

    def look_up_triples(self, b: Body, base: list[Expr], r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        n, *_ = triple_steps(self.flush)
        sums: dict[Any, Expr] = {}
        sign: dict[int, Expr] = {}
        for t in range(n):
            table = self.table(b, m, g, t)
            for i in range(r):
                if t % 8 == 0:
                    sign[i] = self.word(b, base[i], t // 8 * 5)
                if t % 2 == 0:
                    sign[-1 - i] = self.word(b, base[i], t // 2 + t // 8 + 1)
                w = sign[-1 - i]
                which = (w if t % 2 == 0 else bitcast(bitcast(w, u16.vec(2 * self.lanes)) >> 4, u8.vec(self.bytes))) & 15
                up = bitcast(sign[i], u16.vec(2 * self.lanes))
                moved = bitcast(bitcast(up << (7 - t % 8), i16.vec(2 * self.lanes)) if t % 8 < 7 else up, i8.vec(self.bytes))
                mask = cast(compare("lt", moved, bcast(const(0, i8), self.bytes)), i8.vec(self.bytes))
                flip = bitcast(unary("neg", mask), u8.vec(self.bytes))
                self.add(b, sums, i, b.let(lookup_bytes(table, which) ^ flip, "v"))
        for i in range(r):
            hb = sums["B", i]
            self.flush_rows(b, [b.let(sums["A", i] - (hb << 8), "lo"), hb], acc[i], first + i, m, g)

    def flush_rows(self, b: Body, halves: list[Expr], acc: list[Buffer], tile: Expr, m: Expr, g: Expr) -> None:
        """The rows of a register over an interval: sums of table entries to floats, scaled."""
        p = self.p
        where = m * (p.columns // self.flush) + g
        step, corr = (b.let(bcast(load(x, [where]), self.lanes), "c") for x in (self.sx, self.corr))
        total = b.let(bcast(load(self.sums, [where]), self.lanes), "xs") if self.zero is not None or self.off is not None else None
        for c in range(self.parts):
            part = shuffle([halves[c // 2]], range(c % 2 * self.lanes, (c % 2 + 1) * self.lanes))
            v = cast(cast(part, i32.vec(self.lanes)), f32.vec(self.lanes)) * step + corr
            s, z, o = self.group_values(b, tile * self.parts + c, g * self.flush)
            if z is not None:
                assert total is not None
                v = v - z * total
            v = load(acc[c], ()) + v * s
            if o is not None:
                assert total is not None
                v = v + o * total
            b.put(Store(acc[c], (), v))
