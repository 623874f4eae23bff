"""Template for products with weights of 1, 2 or 3 bits, or ternary ones, by tables of activation sums in registers.

Pattern: :mod:`luthier.schedules.lowbit.layouts` with activations that may be rounded. A first kernel makes a table of 16 bytes for every
four columns (every three of ternary weights): the sums of the activations for each pattern of bits, rounded to 8 bits with
one step for a flush interval. The second looks up 32 rows with one byte shuffle, a bit plane of the weights at a time.

* One bit: the look-ups of two neighbouring tables are summed in a byte (their step is chosen for the sum). Bytes are summed in 16 bits
  without unpacking: ``A`` sums words, ``B`` their high bytes, so the low bytes' sum is ``A - 256 B``. Three bits: the same, one table a time.
* Two bits: both planes of a row stand in neighbouring bytes, so a byte product with (1, 2) sums their look-ups, signed, in 16 bits.
* Ternary: a triple is one of 13 patterns up to its sign, four bits and a sign bit. Signs stand seven to a byte above a bit that is always
  set, so a shifted byte is never zero and one instruction gives it to a look-up. Every table has a step of its own, a small multiple of the
  interval's, kept in the table's two unused entries; byte products with (multiple, 0) and (0, multiple) widen and scale in one.

Rows of several registers stand interleaved in one stream where they share the tables' loads.

NMSE against f64 on normally distributed activations: at most 5e-4 (3.5e-5 for two bits at 64 columns a flush, 1.3e-4 for one bit at 128,
3e-5 for ternary at 256).
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
    minimum,
    ramp,
    select,
    shuffle,
    substitute,
    unary,
    var,
    vreduce,
)
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, Stmt, Store, block
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.make_func import make_func
from luthier.schedules.base.schedule import Schedule
from luthier.schedules.intrin.byte_vectors import FEATURE, SPELLING, lookup_bytes, madd_small, sign_bytes
from luthier.schedules.lowbit.layouts import LowbitPacking, LowbitProduct, match, pad_rows, row_point
from luthier.schedules.lowbit.quantized_gemv import Body, GemvBuilder

Array = np.ndarray[Any, Any]
AHEAD = 8192  # bytes that are fetched ahead of the loads


KNOBS = (
    Knob("widths", "bits of weights that are looked up", ((1, 2, 3),), (1, 2)),
    Knob("streams", "places of the weights that a loop walks at once", (1, 2, 4)),
)


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
    return TableBuilder(s, p, caps, constants, flush, streams, None).kernels()


def patterns(ternary: bool) -> Array:
    """[16, columns] coefficients of a table's entries: halves with the sign of a bit, or the 13 ternary triples whose first non-zero
    coefficient is 1 (entry 0: all zero; two are not used)."""
    if not ternary:
        bits = (np.arange(16)[:, None] >> np.arange(4)) & 1
        return np.asarray((bits - 0.5).astype(np.float32))
    return trits(3, 16)


def trits(width: int, entries: int) -> Array:
    """[entries, width] coefficients of ternary tables: the tuples whose first non-zero coefficient is 1, all zero first; the rest is zero."""
    rows = [t for t in combinations((0, 1, -1), repeat=width) if next((c for c in t if c), 1) == 1]
    return np.array(rows + [(0,) * width] * (entries - len(rows)), np.float32)


def pack_planes(bits: int, size: int, signed: bool = False) -> Callable[[Array], Array]:
    """[rows, columns] values to bytes [rows / size, columns / 8, bits, size] (two quads a byte), flat, as i32 words. ``signed``: a byte's
    highest bit inverts the other seven, so that they number half a table and its sign."""

    def go(u: Array) -> Array:
        p = pad_rows(u.astype(np.uint8), size)
        v = p.reshape(-1, size, p.shape[1] // 8, 8)
        out = np.zeros((v.shape[0], v.shape[2], bits, size), np.uint8)
        for b in range(bits):
            plane = (((v >> b) & 1) << np.arange(8, dtype=np.uint8)).sum(-1, dtype=np.uint8)
            out[:, :, b] = (np.where(plane & 128, plane ^ 127, plane) if signed else plane).transpose(0, 2, 1)
        return lane_order(out).view(np.int32).reshape(-1)

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
    """[rows, columns] values 0, 1, 2 to [rows / size, columns / flush, bytes, size] in the order of :func:`triple_bytes`."""
    table = patterns(True)[:14]
    code = np.zeros((3, 3, 3), np.uint8)
    for i, t in enumerate(table):
        a = tuple(int(c) for c in t)
        if any(a):
            code[a[0] + 1, a[1] + 1, a[2] + 1] = i
            code[1 - a[0], 1 - a[1], 1 - a[2]] = i | 16
    n, order = triples(flush), triple_bytes(triples(flush))

    def go(u: Array) -> Array:
        p = pad_rows(u.astype(np.uint8), size)
        rows = p.shape[0]
        v = p.reshape(rows, -1, flush)
        full = np.ones((rows, v.shape[1], n * 3), np.uint8)
        full[:, :, :flush] = v
        t = full.reshape(rows, v.shape[1], n, 3)
        c = np.zeros((rows, v.shape[1], n + 7), np.uint8)
        c[..., :n] = code[t[..., 0], t[..., 1], t[..., 2]]
        out = np.empty((rows, v.shape[1], len(order)), np.uint8)
        for i, (kind, at) in enumerate(order):
            if kind == "pattern":
                out[..., i] = (c[..., at] & 15) | ((c[..., at + 1] & 15) << 4)
            else:
                out[..., i] = 1 | np.bitwise_or.reduce([(c[..., at + j] >> 4) << (7 - j) for j in range(7)])
        out = out.reshape(-1, size, v.shape[1], len(order)).transpose(0, 2, 3, 1)
        return lane_order(out).view(np.int32).reshape(-1)

    return go


def triples(flush: int) -> int:
    """Triples of a flush interval; the last one may reach beyond it (columns of zero)."""
    return -(-flush // 3)


def triple_bytes(n: int) -> list[tuple[str, int]]:
    """The bytes of ``n`` triples of a row: ``("sign", t)`` holds bit ``7 - j`` for triple ``t + j`` (seven of them) and a set bit 0,
    ``("pattern", t)`` the numbers of the patterns of two triples. 14 triples take nine bytes."""
    return [(kind, t) for t in range(n) for kind, every in (("sign", 7), ("pattern", 2)) if t % every == 0]


def interleave(fn: Callable[[Array], Array], steps: int, width: int, count: int) -> Callable[[Array], Array]:
    """``fn``'s stream of ``steps`` registers of ``width`` words a block, with ``count`` blocks side by side."""
    return lambda u: np.ascontiguousarray(fn(u).reshape(-1, count, steps, width).transpose(0, 2, 1, 3)).reshape(-1)


def lane_order(a: Array) -> Array:
    """Bytes of the rows of a register in the order in which even and odd bytes come out as its first and second half."""
    n = a.shape[-1]
    order = np.empty(n, np.int64)
    order[0::2], order[1::2] = np.arange(n // 2), np.arange(n // 2, n)
    return np.ascontiguousarray(a[..., order])


@dataclass
class TableBuilder(GemvBuilder):
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
    def joined(self) -> bool:
        """Look-ups of two neighbouring tables are summed in a byte."""
        return self.p.bits == 1

    @property
    def middle(self) -> float:
        """The byte of an entry of zero; 0 where bytes are signed."""
        return 0.0 if self.ternary or self.paired else 64.0 if self.joined else 128.0

    @property
    def multiples(self) -> int:
        """Highest multiple of the interval's step that a ternary table may have: 16-bit sums stay in range."""
        return min(15, 32767 // (127 * self.tables))

    @property
    def tables(self) -> int:
        """Tables of a flush interval."""
        return triples(self.flush) if self.ternary else self.flush // 4

    @property
    def planes(self) -> int:
        """Bit planes with sums of their own."""
        return self.p.bits

    @property
    def base(self) -> int:
        return 1 if self.ternary else 0  # a ternary pattern is made of -1, 0, 1

    @property
    def table_words(self) -> int:
        """Elements of the tables' buffer that a table takes."""
        return 8 if self.ternary else 4

    def layout(self) -> tuple[int, Callable[[Array], Array]]:
        """(registers of an interval of the stream, what packs values into it)."""
        if self.ternary:
            return len(triple_bytes(self.tables)), pack_triples(self.flush, self.bytes)
        if self.paired:
            return self.flush // 8, pack_pairs(self.bytes)
        return self.flush // 8 * self.p.bits, pack_planes(self.p.bits, self.bytes)

    def look_up(self, b: Body, r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        """An interval of ``r`` tiles of rows."""
        how = self.look_up_triples if self.ternary else self.look_up_pairs if self.paired else self.look_up_planes
        how(b, r, m, g, acc, first)

    def prepare(self) -> None:
        p: LowbitProduct = self.p
        self.prepare_groups(self.base)
        name, blocks = p.out.name, self.blocks // self.parts
        steps, fn = self.layout()
        self.step_words = steps * self.lanes
        spans = p.columns // self.flush
        # one stream: several registers of rows share the tables' loads; several streams are as many registers
        r = self.streams or (4 if self.paired else 1 if p.bits == 3 else 2)
        if self.caps.streams > 1:
            r = self.streams or (self.caps.streams if self.paired or self.ternary else max(1, self.caps.streams // p.bits))
        while blocks % r:
            r //= 2
        self.r = r
        self.shared = self.caps.streams == 1
        if self.shared and r > 1:
            fn = interleave(fn, spans * steps, self.lanes, r)
        size = blocks * spans * self.step_words
        self.w = Buffer(f"{name}.words", i32, (const(size),), "param", False)
        self.packs.insert(0, LowbitPacking(self.source(p.q), p.q, p.n, p.k, 1, lambda u: fn(pad_rows(u, 4 * self.bytes)), self.w))
        self.xb = Buffer(f"{name}.tables", i16 if self.ternary else i32, (self.m * (spans * self.tables * self.table_words),), "param", True)
        self.sx = Buffer(f"{name}.xscale", f32, (self.m * spans,), "param", True)
        self.sums = Buffer(f"{name}.xsum", f32, (self.m * spans,), "param", True)
        self.corr = Buffer(f"{name}.xbase", f32, (self.m * spans,), "param", True)
        streamed = self.zero is not None or self.off is not None
        self.plain = self.middle == 0 and self.mean == 0  # a sum of entries needs no correction
        self.temps = [self.xb, self.sx, *([] if self.plain else [self.corr]), *([self.sums] if streamed else [])]

    @property
    def mean(self) -> float:
        """What every weight lacks in the tables' sums, in steps of the weights."""
        return (0.0 if self.ternary else ((1 << self.p.bits) - 1) / 2) - (self.zc or 0)

    # ------------------------------------------------------------ tables

    def activations(self) -> Func:
        p, b, f = self.p, Body(), self.lanes
        m = var("m", lo=0, hi=self.m - 1)
        spans = p.columns // self.flush
        g = var("g", lo=0, hi=spans - 1)
        cols = self.tables * self.width
        tile = Buffer("tile", f32, (const(-(-max(cols, self.flush) // f) * f),), "local")
        lane = var("lane", lo=0, hi=f - 1)
        at = row_point(p.rows, m)
        jv = var("j", lo=0, hi=self.flush // f - 1)
        x = cast(substitute(p.x, {**at, p.k.var: g * self.flush + jv * f + lane}), f32)
        fill: list[Stmt] = [For(jv, const(0), const(self.flush // f), "serial", For(lane, const(0), const(f), "vectorize", Store(tile, (jv * f + lane,), x)))]
        fill += [Store(tile, (const(i),), const(0.0, f32)) for i in range(self.flush, cols)]
        top, total = Buffer("top", f32.vec(f), (), "local"), Buffer("total", f32.vec(f), (), "local")
        whole = 1.0 if self.ternary else 0.5  # the largest entry of a table is that part of the sum of magnitudes

        def read(b: Body, t: Expr) -> tuple[list[Expr], Expr]:
            """The columns of a table in every lane, and its largest entry."""
            xs = [b.let(bcast(load(tile, [t * self.width + i]), f), "x") for i in range(self.width)]
            mag = unary("abs", xs[0])
            for v in xs[1:]:
                mag = mag + unary("abs", v)
            return xs, b.let(mag * bcast(const(whole, f32), f) if whole != 1 else mag, "m")

        per = 2 if self.joined else 1
        t = var("t", lo=0, hi=self.tables // per - 1)
        mags = [read(b, t * per + i)[1] for i in range(per)]
        b.put(Store(top, (), maximum(load(top, ()), sum(mags[1:], mags[0]))))
        find = For(t, const(0), const(self.tables // per), "serial", b.take())
        add = For(jv, const(0), const(self.flush // f), "serial", Store(total, (), load(total, ()) + load(tile, [ramp(jv * f, 1, f)])))
        amax = b.let(vreduce("max", load(top, ())), "amax")
        levels = 127.0 * self.multiples if self.ternary else 126.0 if self.joined else 127.0  # two roundings stay below 128
        step = b.let(amax * const(1 / levels, f32), "step")
        inv = b.let(bcast(select(const(0.0, f32) < amax, const(levels, f32) / amax, const(0.0, f32)), f), "inv")
        where = m * spans + g
        b.put(Store(self.sx, (where,), step))
        weight = 1 if self.ternary else (1 << p.bits) - 1
        if not self.plain or self.zero is not None or self.off is not None:
            every = b.let(vreduce("add", load(total, ())), "sum")
            if not self.plain:
                b.put(Store(self.corr, (where,), step * const(-self.middle * self.tables * weight, f32) + every * const(self.mean, f32)))
            if self.zero is not None or self.off is not None:
                b.put(Store(self.sums, (where,), every))
        scale, body = b.take(), Body()
        t2 = var("table", lo=0, hi=self.tables - 1)
        body.put(self.entries(body, *read(body, t2), inv, where * self.tables + t2))
        write = For(t2, const(0), const(self.tables), "serial", body.take())
        zero = bcast(const(0.0, f32), f)
        nest: Stmt = block(*fill, Store(top, (), zero), Store(total, (), zero), find, add, scale, write)
        for buf in (total, top, tile):
            nest = Alloc(buf, nest)
        kind = "serial" if self.m.op == "const" and self.m.attr == 1 else "parallel"
        loop = For(m, const(0), self.m, kind, For(g, const(0), const(spans), "serial", nest))
        return make_func(f"{self.s.compute.name}.tables", loop, self.s.compute.dims)

    def entries(self, b: Body, xs: list[Expr], mag: Expr, inv: Expr, where: Expr) -> Stmt:
        """Table number ``where`` of the columns ``xs``, rounded to bytes."""
        f, rows = self.lanes, patterns(self.ternary)
        times: Expr | None = None
        if self.ternary:  # the smallest multiple of the step that holds the table
            most = self.multiples
            need = unary("ceil", mag * inv * bcast(const(1 / 127, f32), f))
            times = b.let(maximum(minimum(need, bcast(const(float(most), f32), f)), bcast(const(1.0, f32), f)), "times")
            inv = b.let(inv / times, "inv")
        parts = []
        for h in range(16 // f):
            cs = [shuffle([const(float(c), f32) for c in rows[h * f : h * f + f, i]], range(f)) for i in range(self.width)]
            e = xs[0] * cs[0]
            for x, c in zip(xs[1:], cs[1:], strict=True):
                e = e + x * c
            e = e * inv
            if self.middle:
                e = e + bcast(const(self.middle, f32), f)
            e = unary("round", e)
            if times is not None and h == 14 // f:
                e = e + times * shuffle([const(float(i == 14 % f), f32) for i in range(f)], range(f))
            parts.append(b.let(cast(cast(e, i32.vec(f)), i8.vec(f)), "q"))
        n = 8 if self.ternary else 4
        return Store(self.xb, (ramp(where * n, 1, n),), bitcast(shuffle(parts, range(16)), self.xb.dtype.vec(n)))

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
        if self.shared:
            start = b.let((first * spans + g * r) * self.step_words, "at")
            self.starts = [start + i * self.lanes for i in range(r)]
        else:
            self.starts = [b.let(((first + i) * spans + g) * self.step_words, "at") for i in range(r)]
        self.sums16: dict[Any, Buffer] = {}
        self.read = 0
        self.look_up(b, r, m, g, acc, first)
        nest = b.take()
        for buf in self.sums16.values():
            nest = Alloc(buf, nest)
        flat = [x for row in acc for x in row]
        begin = [Store(x, (), bcast(const(0.0, f32), self.lanes)) for x in flat]
        body = block(*begin, For(g, const(0), const(spans), "serial", nest), self.epilogue(first * self.parts, r * self.parts, m, 1, [[x] for x in flat]))
        for x in reversed(flat):
            body = Alloc(x, body)
        return body

    def word(self, b: Body, i: int, step: Expr) -> Expr:
        """Register ``i`` of step ``step`` of the interval."""
        at = self.starts[i] + step * (self.lanes * (self.r if self.shared else 1))
        if self.shared and self.read % max(1, 16 // self.lanes) == 0:  # one for a line, beside the loads, so that requests do not come in bursts
            b.put(Call("prefetch", ((self.w, at + AHEAD // 4),)))
        self.read += 1
        return b.let(bitcast(load(self.w, [ramp(at, 1, self.lanes)]), u8.vec(self.bytes)), "w")

    def table(self, b: Body, m: Expr, g: Expr, t: Expr) -> Expr:
        spans, n = self.p.columns // self.flush, 8 if self.ternary else 4
        raw = load(self.xb, [ramp(((m * spans + g) * self.tables + t) * n, 1, n)])
        return b.let(bitcast(shuffle([raw], [*range(n)] * (self.lanes // 4)), u8.vec(self.bytes)), "t")

    def zero16(self, b: Body, *keys: Any) -> None:
        """Running sums of 16 bits that start at zero."""
        for key in keys:
            self.sums16[key] = buf = Buffer("sum." + ".".join(str(k) for k in key), u16.vec(2 * self.lanes), (), "local")
            b.put(Store(buf, (), bcast(const(0, u16), 2 * self.lanes)))

    def add16s(self, b: Body, key: Any, v: Expr) -> None:
        buf = self.sums16[key]
        b.put(Store(buf, (), load(buf, ()) + bitcast(v, u16.vec(2 * self.lanes))))

    def add_bytes(self, b: Body, key: tuple[Any, ...], v: Expr) -> None:
        """Bytes into the two running sums of words."""
        words = bitcast(v, u16.vec(2 * self.lanes))
        self.add16s(b, ("A", *key), words)
        self.add16s(b, ("B", *key), words >> 8)

    def repeat(self, b: Body, count: int, body: Callable[[Body, Expr], None]) -> None:
        """``body`` for 0 .. count - 1, as a loop: whole intervals in one block of code are more than a register allocator copes with."""
        if count == 1:
            body(b, const(0))
        elif count:
            u, inner = var("u", lo=0, hi=count - 1), Body()
            inner.n = b.n + 1000
            body(inner, u)
            b.put(For(u, const(0), const(count), "serial", inner.take()))

    def nibble(self, w: Expr, half: int) -> Expr:
        return (w if not half else bitcast(bitcast(w, u16.vec(2 * self.lanes)) >> 4, u8.vec(self.bytes))) & 15

    def look_up_planes(self, b: Body, r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        p = self.p
        self.zero16(b, *[(w, i, plane) for i in range(r) for plane in range(p.bits) for w in "AB"])

        def steps(b: Body, u: Expr) -> None:
            for s in range(4):
                ts = [self.table(b, m, g, u * 8 + (2 * s + h)) for h in (0, 1)]
                for i in range(r):
                    for plane in range(p.bits):
                        w = self.word(b, i, u * (4 * p.bits) + (s * p.bits + plane))
                        vs = [b.let(lookup_bytes(ts[h], self.nibble(w, h)), "v") for h in (0, 1)]
                        for v in [vs[0] + vs[1]] if self.joined else vs:
                            self.add_bytes(b, (i, plane), b.let(v, "v"))

        self.repeat(b, self.flush // 32, steps)
        self.flush_planes(b, r, m, g, acc, first)

    def flush_planes(self, b: Body, r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        """The sums ``A`` and ``B`` of every plane to floats."""
        for i in range(r):
            low = high = None
            for plane in range(self.planes):
                a, hb = (b.let(load(self.sums16[w, i, plane], ()), "s") for w in "AB")
                lb = a - (hb << 8)
                low = lb if low is None else low + (lb << plane)
                high = hb if high is None else high + (hb << plane)
            assert low is not None and high is not None
            self.flush_rows(b, [b.let(low, "lo"), b.let(high, "hi")], acc[i], first + i, m, g)

    def look_up_pairs(self, b: Body, r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        weights = shuffle([const(1, u8), const(2, u8)] * (self.bytes // 2), range(self.bytes))
        self.zero16(b, *[("A", i) for i in range(r)])

        def steps(b: Body, u: Expr) -> None:
            for s in range(4):
                ts = [bitcast(self.table(b, m, g, u * 8 + (2 * s + h)), i8.vec(self.bytes)) for h in (0, 1)]
                for i in range(r):
                    w = self.word(b, i, u * 4 + s)
                    for h in (0, 1):
                        self.add16s(b, ("A", i), madd_small(weights, b.let(lookup_bytes(ts[h], self.nibble(w, h)), "v")))

        self.repeat(b, self.flush // 32, steps)
        for i in range(r):
            self.flush_rows(b, [b.let(bitcast(load(self.sums16["A", i], ()), i16.vec(2 * self.lanes)), "s")], acc[i], first + i, m, g)

    def look_up_triples(self, b: Body, r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        self.zero16(b, *[(w, i) for i in range(r) for w in "AB"])
        spans = self.p.columns // self.flush

        def steps(count: int) -> Callable[[Body, Expr], None]:
            def go(b: Body, u: Expr) -> None:
                sign: list[Expr] = []
                which: list[Expr] = []
                at = {x: i for i, x in enumerate(triple_bytes(count))}
                for t in range(count):
                    table = bitcast(self.table(b, m, g, u * 14 + t), i8.vec(self.bytes))
                    times = load(self.xb, [((m * spans + g) * self.tables + u * 14 + t) * 8 + 7])
                    low = b.let(bcast(bitcast(times, u16), 2 * self.lanes), "k")
                    high = b.let(low << 8, "k")
                    if t % 7 == 0:
                        sign = [self.word(b, i, u * 9 + at["sign", t]) for i in range(r)]
                    if t % 2 == 0:
                        which = [self.word(b, i, u * 9 + at["pattern", t]) for i in range(r)]
                    for i in range(r):
                        moved = bitcast(bitcast(sign[i], u16.vec(2 * self.lanes)) << (t % 7), i8.vec(self.bytes))
                        v = b.let(self.signed(b.let(lookup_bytes(table, self.nibble(which[i], t % 2)), "v"), moved), "v")
                        for part, k in (("A", low), ("B", high)):
                            self.add16s(b, (part, i), madd_small(bitcast(k, u8.vec(self.bytes)), v))

            return go

        n = self.tables
        self.repeat(b, n // 14, steps(14))
        if n % 14:
            steps(n % 14)(b, const(n // 14))
        for i in range(r):
            self.flush_rows(b, [b.let(bitcast(load(self.sums16[w, i], ()), i16.vec(2 * self.lanes)), "s") for w in "AB"], acc[i], first + i, m, g)

    def signed(self, v: Expr, s: Expr) -> Expr:
        """``v`` with the sign of ``s``, which is never zero."""
        if self.caps.vector_bits in SPELLING["bytes.sign"].get(self.caps.printer, {}):
            return sign_bytes(v, s)
        return select(compare("lt", s, bcast(const(0, i8), self.bytes)), unary("neg", v), v)

    def flush_rows(self, b: Body, halves: list[Expr], acc: list[Buffer], tile: Expr, m: Expr, g: Expr) -> None:
        """The rows of a register over an interval: sums of table entries to floats, scaled."""
        p = self.p
        where = m * (p.columns // self.flush) + g
        step = b.let(bcast(load(self.sx, [where]), self.lanes), "c")
        corr = None if self.plain else b.let(bcast(load(self.corr, [where]), self.lanes), "c")
        total = b.let(bcast(load(self.sums, [where]), self.lanes), "xs") if self.zero is not None or self.off is not None else None
        for c in range(self.parts):
            part = shuffle([halves[c // 2]], range(c % 2 * self.lanes, (c % 2 + 1) * self.lanes))
            v = cast(cast(part, i32.vec(self.lanes)), f32.vec(self.lanes)) * step
            v = v if corr is None else v + corr
            s, z, o = self.group_values(b, tile * self.parts + c, g * self.flush)
            if z is not None:
                assert total is not None
                v = v - z * total
            v = load(acc[c], ()) + v * s
            if o is not None:
                assert total is not None
                v = v + o * total
            b.put(Store(acc[c], (), v))
