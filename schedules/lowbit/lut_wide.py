"""Template for products with low-bit weights by tables of 128 bytes, two registers that one ``vpermi2b`` looks up.

The pattern and the frame (scales, sums, epilogue) are :mod:`luthier.schedules.lowbit.lut_gemv`'s. A table is for eight columns of a bit plane, or five
of ternary weights: half of the patterns, because a pattern and its complement differ in the sign alone. A byte of the weights is the number
of the pattern in seven bits and the sign in the eighth, complemented offline where it is set; the look-up ignores it. Entries are bytes
with 128 for zero, whose negation is the byte's own, so a sign costs one masked subtraction, and sums are those of unsigned bytes.

A look-up serves eight columns (five) in place of four (three), for the same price; tables take 128 entries in place of 16 to make. Needs
the capability ``vbmi``. It has run in an emulator only, so no width is given to it without a measurement
(:mod:`luthier.schedules.lowbit.rivals`).

NMSE against f64 on normally distributed activations: at most 5e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

import numpy as np

from luthier.ir.dtypes import f32, i8, i32, u8
from luthier.ir.expr import Expr, bcast, bitcast, cast, compare, const, load, ramp, select, shuffle, unary
from luthier.ir.loop import Buffer, Stmt, Store, block
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule
from luthier.schedules.intrin.byte_vectors import lookup_wide
from luthier.schedules.lowbit.layouts import match, pad_rows
from luthier.schedules.lowbit.lut_gemv import Array, TableBuilder, lane_order, pack_planes, trits
from luthier.schedules.lowbit.quantized_gemv import Body

WIDTH, ENTRIES = 512, 128


KNOBS = (Knob("streams", "places of the weights that a loop walks at once", (1, 4)),)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, streams: int | None = None) -> Any:
    """Kernels of a matching Compute, or None. ``streams``: tiles of 64 rows at once."""
    if caps.gpu or "vbmi" not in caps.features or caps.vector_bits != WIDTH:
        return None
    p = match(s.compute, constants)
    if p is None or not p.act or p.low != 0 or p.outputs < 64 or p.columns % 32 or p.bits > 3:
        return None
    flush = gcd(p.group, 256)
    return None if flush < 32 else _Wide(s, p, caps, constants, flush, streams, None).kernels()


def pack_quintuples(flush: int, size: int) -> Callable[[Array], Array]:
    """[rows, columns] values 0, 1, 2 to bytes [rows / size, columns / flush, tables, size], flat, as i32 words."""
    code = np.zeros((3,) * 5, np.uint8)
    for i, t in enumerate(trits(5, ENTRIES)):
        a = tuple(int(c) for c in t)
        if any(a):
            code[tuple(c + 1 for c in a)] = i
            code[tuple(1 - c for c in a)] = i | 128
    n = -(-flush // 5)

    def go(u: Array) -> Array:
        p = pad_rows(u.astype(np.uint8), size)
        full = np.ones((p.shape[0], p.shape[1] // flush, n * 5), np.uint8)
        full[:, :, :flush] = p.reshape(p.shape[0], -1, flush)
        t = full.reshape(*full.shape[:2], n, 5)
        out = code[tuple(t[..., j] for j in range(5))]
        return lane_order(out.reshape(-1, size, *out.shape[1:]).transpose(0, 2, 3, 1)).view(np.int32).reshape(-1)

    return go


class _Wide(TableBuilder):
    template = "lut_wide"

    @property
    def paired(self) -> bool:
        return False

    @property
    def joined(self) -> bool:
        return False

    @property
    def parts(self) -> int:
        return 4

    @property
    def width(self) -> int:
        return 5 if self.ternary else 8

    @property
    def tables(self) -> int:
        return -(-self.flush // self.width)

    @property
    def middle(self) -> float:
        return 128.0

    @property
    def multiples(self) -> int:
        return 1

    @property
    def table_words(self) -> int:
        return ENTRIES // self.xb_bytes

    @property
    def xb_bytes(self) -> int:
        return 2 if self.ternary else 4

    @property
    def planes(self) -> int:
        return 1 if self.ternary else self.p.bits

    def layout(self) -> tuple[int, Callable[[Array], Array]]:
        if self.ternary:
            return self.tables, pack_quintuples(self.flush, self.bytes)
        return self.tables * self.p.bits, pack_planes(self.p.bits, self.bytes, signed=True)

    def entries(self, b: Body, xs: list[Expr], mag: Expr, inv: Expr, where: Expr) -> Stmt:
        f = self.lanes
        scaled = [b.let(x * inv, "x") for x in xs]
        rows = trits(5, ENTRIES) if self.ternary else (np.arange(ENTRIES)[:, None] >> np.arange(8) & 1) - 0.5
        each = 1 if self.ternary else 4  # columns whose coefficients are the same in every register of a table

        def vector(row: Array) -> Expr:
            return shuffle([const(float(c), f32) for c in row], range(f))

        shared: Expr | None = None
        if not self.ternary:
            for j in range(each):
                term = scaled[j] * vector(rows[:f, j])
                shared = term if shared is None else shared + term
            assert shared is not None
            shared = b.let(shared, "e")
        stores: list[Stmt] = []
        n = f // self.xb_bytes
        for h in range(ENTRIES // f):
            e = shared
            for j in range(each if shared is not None else 0, self.width):
                c = rows[h * f : h * f + f, j]
                term = scaled[j] * (bcast(const(float(c[0]), f32), f) if (c == c[0]).all() else vector(c))
                e = term if e is None else e + term
            assert e is not None
            q = b.let(cast(cast(unary("round", e + bcast(const(self.middle, f32), f)), i32.vec(f)), i8.vec(f)), "q")
            stores.append(Store(self.xb, (ramp(where * self.table_words + h * n, 1, n),), bitcast(q, self.xb.dtype.vec(n))))
        return block(*stores)

    def look_up(self, b: Body, r: int, m: Expr, g: Expr, acc: list[list[Buffer]], first: Expr) -> None:
        self.zero16(b, *[(w, i, plane) for i in range(r) for plane in range(self.planes) for w in "AB"])
        half, spans = self.table_words // 2, self.p.columns // self.flush
        zero = bcast(const(0, u8), self.bytes)

        def steps(count: int, before: int) -> Callable[[Body, Expr], None]:
            def go(b: Body, u: Expr) -> None:
                for s in range(count):
                    t = u * before + s
                    at = ((m * spans + g) * self.tables + t) * self.table_words
                    low, high = (b.let(bitcast(load(self.xb, [ramp(at + k * half, 1, half)]), u8.vec(self.bytes)), "t") for k in (0, 1))
                    for i in range(r):
                        for plane in range(self.planes):
                            w = self.word(b, i, t * self.planes + plane)
                            v = b.let(lookup_wide(low, w, high), "v")
                            below = compare("lt", bitcast(w, i8.vec(self.bytes)), bcast(const(0, i8), self.bytes))
                            self.add_bytes(b, (i, plane), b.let(select(below, zero - v, v), "v"))

            return go

        self.repeat(b, self.tables // 4, steps(4, 4))
        if self.tables % 4:
            steps(self.tables % 4, 4)(b, const(self.tables // 4))
        self.flush_planes(b, r, m, g, acc, first)
