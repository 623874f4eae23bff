"""Template for products with weights of which two in four are kept: activations picked by look-ups in registers, byte products.

A 32-bit lane is an output row; a *step* is eight columns, of which a lane keeps four codes. A 16-byte table holds the eight rounded activations
and their negatives: a code's sign is bit 3 of its index, its place and its half of the step the bits below, so that magnitudes (3 or 7
bits) are multiplied as unsigned bytes without zero points. 32 columns of a row take ``bits / 2`` words of codes and one of places; all else
(scales, rounding, row blocks) is as in :mod:`luthier.schedules.lowbit.quantized_gemv`, whose kernel serves the same Compute where this one does not fit.

Expected before it was measured: 3.5 bits a weight against 4.5 of the dense 4-bit kernel, 1.29 times from memory, for the same number of
instructions (a look-up and its index more, half of the products).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from luthier.ir.dtypes import i8, i32, u8, u16
from luthier.ir.expr import Expr, bitcast, cast, const, load, ramp, shuffle, walk
from luthier.ir.intrin import Instruction
from luthier.ir.loop import Buffer, Store
from luthier.ir.ops.two_of_four import kept_places
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule
from luthier.schedules.intrin.byte_vectors import FEATURE, lookup_bytes, madd_small
from luthier.schedules.lowbit.layouts import LowbitPacking, match
from luthier.schedules.lowbit.packed_layout import pad_rows
from luthier.schedules.lowbit.quantized_gemv import UNIT, Body, GemvBuilder

Array = np.ndarray[Any, Any]
STEP = 8  # columns of a table
STEPS = UNIT // STEP


KNOBS = (
    Knob("streams", "places of the weights that a loop walks at once", (1, 2, 4)),
    Knob("rows", "of the activations whose sums are in registers at once", (1, 2, 4)),
)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, streams: int | None = None, rows: int | None = None) -> Any:
    """Kernels of a matching Compute, or None. ``streams``: row blocks at once; ``rows``: activation rows at once."""
    if caps.gpu or FEATURE not in caps.features:
        return None
    p = match(s.compute, constants)
    if p is None or not any(e.op == "select" for e in walk(p.q)) or p.bits not in (4, 8) or p.zero_const != 1 << (p.bits - 1) or p.offset is not None:
        return None
    flush = np.gcd(np.gcd(p.group, p.act), 64) if p.act else 0
    if p.columns % UNIT or p.outputs < 8 or not flush or flush % 16 or p.act > 256:
        return None
    made = TwoOfFourBuilder(s, p, caps, constants, int(flush), streams, rows)
    return made.kernels() if made.fits() else None


def pack_steps(bits: int, lanes: int, zero: int) -> Callable[[Array], Array]:
    """[rows, columns] codes to words [rows / lanes, columns / 32, bits / 2 + 1, lanes] (i32), flat."""

    def go(u: Array) -> Array:
        v = u.astype(np.int32) - zero
        v = v.reshape(len(v), -1, 2, 4)
        at = kept_places(v)
        kept = np.take_along_axis(v, at, -1)
        codes = (np.abs(kept) | (kept < 0).astype(np.int32) << (bits - 1)).astype(np.uint8)
        c, w = (pad_rows(a.reshape(len(a), -1).astype(np.uint8), 4 * lanes).reshape(-1, lanes, v.shape[1] // STEPS, STEPS, 4).transpose(0, 2, 3, 1, 4) for a in (codes, at))
        words = [c[:, :, h] for h in range(STEPS)] if bits == 8 else [c[:, :, h] | c[:, :, h + 1] << 4 for h in range(0, STEPS, 2)]
        places = w[:, :, 0] | w[:, :, 1] << 2 | w[:, :, 2] << 4 | w[:, :, 3] << 6
        return np.ascontiguousarray(np.stack([*words, places], 2)).view(np.int32).reshape(-1)

    return go


class TwoOfFourBuilder(GemvBuilder):
    """Tables of activations and the product."""

    template = "two_of_four"

    def fits(self) -> bool:
        """Whether at most two of four weights are not zero, and all have a magnitude of ``bits - 1`` bits."""
        p = self.p
        v = LowbitPacking(self.source(p.q), p.q, p.n, p.k, 1, lambda u: u, Buffer("codes", i32, (), "param", False)).grid(self.constants[self.source(p.q)])
        v = v.astype(np.int32) - int(p.zero_const or 0)
        return bool(v.min() > -(1 << (p.bits - 1)) and (np.count_nonzero(v.reshape(-1, 4), axis=1) <= 2).all())

    @property
    def dot(self) -> Instruction | None:
        return None

    @property
    def words(self) -> bool:
        return False

    @property
    def shift(self) -> int:
        return 0

    @property
    def unit_words(self) -> int:
        return self.p.bits // 2 + 1

    def prepare_groups(self, base: int) -> None:
        super().prepare_groups(base)
        self.zc = 0  # signs are in the indices

    def prepare(self) -> None:
        super().prepare()
        p = self.p
        size = self.blocks * (p.columns // UNIT) * self.unit_words * self.lanes
        self.w = replace(self.w, shape=(const(size),))
        self.packs[0] = LowbitPacking(self.source(p.q), p.q, p.n, p.k, 1, pack_steps(p.bits, self.lanes, int(p.zero_const or 0)), self.w)
        self.summed = False
        self.xb = replace(self.xb, shape=(self.m * (p.columns // 2),))
        self.temps = [self.xb, self.sx]

    def store_rounded(self, b: Body, q: list[Expr], m: Expr, g: Expr) -> None:
        """Tables of eight columns: the activations and their negatives."""
        p, w = self.p, self.lanes
        for j in range(p.act // STEP):
            if w == STEP:
                x = q[j]
            else:
                x = b.let(shuffle(q[2 * j : 2 * j + 2], range(STEP)) if w < STEP else shuffle([q[j // 2]], range(j % 2 * STEP, (j % 2 + 1) * STEP)), "x")
            both = shuffle([cast(x, i8.vec(STEP)), cast(-x, i8.vec(STEP))], range(2 * STEP))
            b.put(Store(self.xb, (ramp(((m * p.columns + g * p.act) // STEP + j) * 4, 1, 4),), bitcast(both, i32.vec(4))))

    def integer_span(self, b: Body, first: Expr, r: int, m0: Expr, rows: int, g: Expr, span: int, acc: list[list[Buffer]]) -> None:
        p, n = self.p, 4 * self.lanes
        wide: dict[Any, Expr] = {}
        pools: dict[Any, tuple[Expr, int]] = {}
        half = shuffle([const(4 * (i // 2), u8) for i in range(4)] * self.lanes, range(n))
        most = (1 << (p.bits - 1)) - 1

        def moved(x: Expr, by: int) -> Expr:
            return bitcast(bitcast(x, u16.vec(n // 2)) >> by, u8.vec(n)) if by else x

        done = 0
        for u in range(span // UNIT):
            words = [[bitcast(self.words_of(b, first, i, g, span, u, w), u8.vec(n)) for w in range(self.unit_words)] for i in range(r)]
            for h in range(STEPS):
                tables = []
                for j in range(rows):
                    at = ((m0 + j) * (p.columns // STEP) + g * (span // STEP) + u * STEPS + h) * 4
                    raw = load(self.xb, [ramp(at, 1, 4)])
                    tables.append(b.let(bitcast(shuffle([raw], [0, 1, 2, 3] * (self.lanes // 4)), i8.vec(n)), "t"))
                for i in range(r):
                    code = words[i][h] if p.bits == 8 else b.let(moved(words[i][h // 2], h % 2 * 4), "code")
                    sign = (moved(code, 4) if p.bits == 8 else code) & 8
                    which = b.let((moved(words[i][-1], 2 * h) & 3) | sign | half, "which")
                    size = b.let(code & most, "size")
                    for j in range(rows):
                        self.add16(b, pools, wide, (i, j, (u * UNIT + h * STEP) // self.flush), 0, madd_small(size, lookup_bytes(tables[j], which)), 2 * 127 * most)
            while (done + 1) * self.flush <= (u + 1) * UNIT:
                self.finish(b, pools, wide, done, first, r, m0, rows, g, span, acc)
                done += 1
