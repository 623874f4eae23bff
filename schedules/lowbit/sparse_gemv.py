"""Template for products with group-sparse quantized weights: 16-bit dot products over a stream of kept blocks.

Pattern and stream: :mod:`luthier.schedules.lowbit.sparse_pattern`. A register holds 16-bit weights of one block (or parts or several of them, by
its width) and is multiplied with the activations at the block's columns, which have one scale a row: no gather, no zero point, and
one ``i16 x i16 -> i32`` product takes what the instruction takes. 4-bit values are used where they stand in the word, times 2**12.
How a block meets its scale is what the time goes into, one activation row at a time:

* 12-bit activations (``act_levels`` up to 2047) and 4-bit values without zero points: sums of two products fit 16 bits, so two
  blocks share a register and a second integer product applies scales of 14 bits, multiples of a number of the row;
* else four registers are summed by transposition, which leaves a block's sum in one lane, and scales are f16 or f32.

Several activation rows share unpacked weights and scales in all lanes. The work is split over stored blocks, not rows
(``split_tasks``): rows that a cut divides are summed by several tasks, whose parts a last small kernel adds in order, so that results do
not depend on the number of threads.

NMSE against f64, normally distributed activations: 1e-6 with 12 bits, 1e-7 with 14.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, Pull, let_exprs
from luthier.ir.dtypes import f16, f32, i16, i32, index, u16, u32
from luthier.ir.expr import (
    Expr,
    bcast,
    bitcast,
    call,
    cast,
    const,
    extract,
    load,
    loads,
    maximum,
    minimum,
    ramp,
    shuffle,
    var,
    vreduce,
)
from luthier.ir.intrin import Instruction
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, If, Stmt, Store, block
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.make_func import make_func
from luthier.schedules.base.schedule import Schedule
from luthier.schedules.intrin import usable
from luthier.schedules.lowbit.layouts import dim_of
from luthier.schedules.lowbit.quantized_gemv import Body
from luthier.schedules.lowbit.sparse_pattern import (
    BUNDLE,
    SLOTS,
    STEP,
    SparseProduct,
    UnitLayout,
    evaluate_blocks,
    match,
    pack_units,
    split_tasks,
)

FAST_LEVELS = 2047  # activations of 12 bits: sums of two products with 4-bit values fit 16 bits
PREFETCH = 1024  # bytes ahead in every stream: four of them also keep the hardware's prefetchers busy (one: 17 GB/s, four: 24 to 30)
TASK_STEPS = 64  # a task is worth handing out from here on
MAX_TASKS = 64
ROUND_STEPS = 64  # stored lengths are rounded up, so that layers of about the same density share kernels


KNOBS = (
    Knob("tasks", "pieces of the stream of weights that threads share out", (2, 4, 8, 16, 32)),
    Knob("rows", "of the activations whose sums are in registers at once", (1, 2, 4)),
)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, tasks: int | None = None, rows: int | None = None) -> Any:
    """Kernels of a matching Compute, or None. ``tasks``: pieces of the stream; ``rows``: activation rows at once."""
    if caps.gpu:
        return None
    dots = [d for d in usable(caps) if d.a is i16 and d.b is i16 and d.acc is i32 and d.group == 2]
    p = match(s.compute, constants) if dots else None
    if p is None or p.block * SLOTS * 16 % caps.vector_bits or p.block > SLOTS * caps.vector_bits // 16:
        return None
    return SparseBuilder(s.compute, p, caps, constants, dots[0], tasks, rows).kernels()


@dataclass
class SparseBuilder:
    """Kernels around one group-sparse product: what prepares the activations, the product, the fix-up, the rest of the Compute."""

    c: Compute
    p: SparseProduct
    caps: Capabilities
    constants: Mapping[str, Any]
    dot: Instruction
    tasks: int | None
    rows: int | None

    def kernels(self) -> Any:
        from luthier.schedules.select import Kernels, build, build_kernel, cut, join_kernels

        self.prepare()
        before, after = self.around()
        first, _, *rest = cut(self.enlarged() if self.lay.fixed else self.c, [before, [self.c.lets.index(self.p.acc)], *([after] if after else [])])
        funcs = [self.product(), *([self.fix_up()] if self.split else [])]
        name = "sparse_gemv"
        done = tuple(build_kernel(replace(f, attrs={**f.attrs, "template": name}), self.caps) for f in funcs)
        trace = ((name, f"bits={self.p.bits}", f"block={self.p.block}", f"tasks={self.count}", f"dot={self.dot.name}"),)
        mine = Kernels(done, (), self.packed, name, trace)
        out = join_kernels([build(first, self.caps, self.constants), mine, *(build(r, self.caps, self.constants) for r in rest)], self.c)
        return replace(out, reusable=False)

    def around(self) -> tuple[list[int], list[int]]:
        """Numbers of the lets that the product needs, and of those that come after it."""
        lets = list(self.c.lets)
        here = lets.index(self.p.acc)
        later = {self.p.acc.name}
        after = []
        for i, x in enumerate(lets):
            if i != here and isinstance(x, Pull) and later & {ld.attr[0].name for ld in loads(*let_exprs(x))}:
                later.add(x.name)
                after.append(i)
        return [i for i in range(len(lets)) if i != here and i not in after], after

    def enlarged(self) -> Compute:
        """The activations times 16, so that sums of two products stand in the upper half of a word."""
        lets = [Pull(x.buf, x.axes, x.expr * const(16, i16)) if isinstance(x, Pull) and x.name == self.p.xq.name else x for x in self.c.lets]
        return replace(self.c, lets=tuple(lets))

    # ------------------------------------------------------------ buffers

    def prepare(self) -> None:
        p, blocks = self.p, evaluate_blocks(self.p, self.constants)
        self.words = self.caps.vector_bits // 16
        self.lay = UnitLayout(self.words, p.block, p.bits, blocks.scale.dtype == np.float32, blocks.zero is not None)
        if p.bits == 4 and p.levels <= FAST_LEVELS and blocks.zero is None:
            self.lay = replace(self.lay, wide_scales=False, fixed=True)
        st = pack_units(blocks, self.lay)
        self.count = self.tasks or max(1, min(MAX_TASKS, int(st.steps[-1]) // TASK_STEPS))
        t = split_tasks(st.steps, self.count)
        self.split = bool((t.continued >= 0).any())
        self.whole = p.outputs % BUNDLE == 0
        name = p.acc.name
        tables: dict[str, Any] = {"steps": st.steps, "rows": st.rows, "starts": t.starts, "first": t.first, "last": t.last, "continued": t.continued}
        units = self.rounded(st.units)
        self.stream = units.shape[1]
        self.packed = {f"{name}.units": units.reshape(-1), **{f"{name}.{k}": v.astype(np.int32) for k, v in tables.items()}}
        if self.lay.fixed:
            self.packed[f"{name}.factors"] = st.factors
        kinds = {np.dtype(np.uint16): u16, np.dtype(np.int32): i32, np.dtype(np.float32): f32}
        bufs = {n.rpartition(".")[2]: Buffer(n, kinds[a.dtype], (const(len(a)),), "param", False) for n, a in self.packed.items()}
        self.units, self.steps, self.row_of, self.starts = bufs["units"], bufs["steps"], bufs["rows"], bufs["starts"]
        self.first, self.last, self.continued = bufs["first"], bufs["last"], bufs["continued"]
        self.factors = bufs.get("factors")
        self.bundles = len(st.steps) - 1
        self.m = dim_of(p.rows)
        self.width = int(p.xq.shape[-1].attr)
        self.xq = Buffer(p.xq.name, i16, (self.m * self.width,), "param", False)
        self.out = Buffer(name, f32, (self.m * p.outputs,), "param", True)
        self.parts = Buffer(f"{name}.parts", f32, (self.m * (self.count * BUNDLE),), "param", True)

    def rounded(self, units: Any) -> Any:
        """Layers of about the same density share kernels when their streams have the same declared length."""
        n = units.shape[1]
        extra = -n % ROUND_STEPS if n > ROUND_STEPS else max(1, n) - n
        return np.concatenate([units, np.zeros((BUNDLE, extra, self.lay.size), np.uint16)], axis=1)

    def int_at(self, b: Body, buf: Buffer, at: Expr, name: str) -> Expr:
        return b.let(cast(load(buf, [at]), index), name)

    # ------------------------------------------------------------ product

    def product(self) -> Func:
        t = var("task", lo=0, hi=self.count - 1)
        per = self.rows or 4
        if self.m.op == "const":
            n = int(self.m.attr)
            parts: list[Stmt] = []
            per = min(per, n) if n % per != 1 or n == 1 else per
            if n >= per:
                mo = var("mo", lo=0, hi=n // per - 1)
                parts.append(self.tile(t, const(0), per) if n == per else For(mo, const(0), const(n // per), "serial", self.tile(t, mo * per, per)))
            if n % per:
                parts.append(self.tile(t, const(n // per * per), n % per))
            body = block(*parts)
        else:
            mo, mt = var("mo", lo=0, hi=self.m // per - 1), var("mt", lo=0, hi=self.m % per - 1)
            body = block(
                For(mo, const(0), self.m // per, "serial", self.tile(t, mo * per, per)),
                For(mt, const(0), self.m % per, "serial", self.tile(t, self.m // per * per + mt, 1)),
            )
        return make_func(f"{self.c.name}.blocks", For(t, const(0), const(self.count), "parallel", body), self.c.dims)

    def tile(self, t: Expr, m0: Expr, rows: int) -> Stmt:
        """All bundles of a task for ``rows`` activation rows from ``m0``."""
        b = Body()
        u0, u1 = self.int_at(b, self.starts, t, "u0"), self.int_at(b, self.starts, t + 1, "u1")
        r0, r1 = self.int_at(b, self.first, t, "r0"), self.int_at(b, self.last, t, "r1")
        head = b.take()
        r = var("bundle", lo=0, hi=self.bundles - 1)
        start, end = self.int_at(b, self.steps, r, "start"), self.int_at(b, self.steps, r + 1, "end")
        lo, hi = b.let(maximum(start, u0), "lo"), b.let(minimum(end, u1), "hi")
        b.put(self.together(t, m0, r, lo, hi, start < u0) if rows == 1 else self.apart(t, m0, rows, r, lo, hi, start < u0))
        return block(head, For(r, r0, r1, "serial", b.take()))

    def together(self, t: Expr, m: Expr, r: Expr, lo: Expr, hi: Expr, later: Expr) -> Stmt:
        """One activation row: the rows of a bundle in step."""
        b, lanes = Body(), self.words // 2
        acc = [Buffer(f"acc{q}", f32.vec(lanes), (), "local") for q in range(BUNDLE)]
        u = var("u", lo=0)
        for q in range(BUNDLE):
            self.unit(b, u, q, m, 1, [[acc[q]]])
        loop = For(u, lo, hi, "serial", b.take())
        v = self.transposed(b, [load(x, ()) for x in acc])
        while v.dtype.lanes > 4:
            n = v.dtype.lanes // 2
            v = b.let(shuffle([v], range(n)) + shuffle([v], range(n, 2 * n)), "v")
        v = b.let(v * (bcast(const(self.unscale, f32), 4) if self.factors is None else load(self.factors, [ramp(r * BUNDLE, 1, BUNDLE)])), "sums")
        own = block(*(self.result(r, q, m, extract(v, q)) for q in range(BUNDLE)))
        b.put(If(later, Store(self.parts, (ramp((m * self.count + t) * BUNDLE, 1, BUNDLE),), v), own) if self.split else own)
        return _with(acc, lanes, loop, b.take())

    def apart(self, t: Expr, m0: Expr, rows: int, r: Expr, lo: Expr, hi: Expr, later: Expr) -> Stmt:
        """Several activation rows: one row of a bundle after the other, its sums in registers."""
        parts, lanes = [], self.words // 2
        for q in range(BUNDLE):
            b, u = Body(), var("u", lo=0)
            acc = [[Buffer(f"acc{j}_{i}", f32.vec(lanes), (), "local") for i in range(2 if rows < 4 else 1)] for j in range(rows)]
            self.unit(b, u, q, m0, rows, acc)
            loop = For(u, lo, hi, "serial", b.take())
            for j in range(rows):
                total = load(acc[j][0], ())
                for x in acc[j][1:]:
                    total = total + load(x, ())
                factor = const(self.unscale, f32) if self.factors is None else load(self.factors, [r * BUNDLE + q]) * const(2.0**-16, f32)
                v = b.let(vreduce("add", total) * factor, "sum")
                own = self.result(r, q, m0 + j, v)
                b.put(If(later, Store(self.parts, (((m0 + j) * self.count + t) * BUNDLE + q,), v), own) if self.split else own)
            parts.append(_with([x for row in acc for x in row], lanes, loop, b.take()))
        return block(*parts)

    def result(self, r: Expr, q: int, m: Expr, v: Expr) -> Stmt:
        at = load(self.row_of, [r * BUNDLE + q])
        s = Store(self.out, (m * self.p.outputs + cast(at, index),), v)
        return s if self.whole else If(const(0, i32) <= at, s)

    @property
    def unscale(self) -> float:
        """4-bit values stand in the topmost bits of a word unless zero points are subtracted."""
        return 2.0**-12 if self.p.bits == 4 and not self.lay.zeros else 1.0

    def unit(self, b: Body, u: Expr, q: int, m0: Expr, rows: int, acc: list[list[Buffer]]) -> None:
        """Unit ``q`` of step ``u`` into the sums of ``rows`` activation rows."""
        lay, p, w = self.lay, self.p, self.words
        base = (self.stream * q + u) * lay.size
        if self.caps.streams == 1:
            for line in range(-(-lay.size // 32)):
                b.put(Call("prefetch", ((self.units, base + (PREFETCH // 2 + 32 * line)),)))
        at = [b.let(cast(load(self.units, [base + i]), index) * STEP, "at") for i in range(lay.per)]
        values = self.values(b, base)
        if lay.zeros:
            z = [b.let(bitcast(load(self.units, [base + (lay.zero_points + i)]), i16), "zero") for i in range(lay.per)]
            values = [b.let(v - self.spread([z[i] for i in self.blocks_of(s)], w), "q") for s, v in enumerate(values)]

        def product(j: int, s: int, start: Expr) -> Expr:
            """Pair sums of register ``s`` and its columns of activation row ``j``."""
            parts = [load(self.xq, [ramp((m0 + j) * self.width + at[i] + s * w % p.block, 1, min(w, p.block))]) for i in self.blocks_of(s)]
            return call(self.dot.name, i32.vec(w // 2), start, values[s], parts[0] if len(parts) == 1 else shuffle(parts, range(w)))

        none = bcast(const(0, i32), w // 2)
        if rows == 1 and lay.fixed:
            b.put(Store(acc[0][0], (), load(acc[0][0], ()) + cast(self.scaled_pairs(b, base, [product(0, s, none) for s in range(SLOTS)]), f32.vec(w // 2))))
            return
        if rows == 1:
            sums = [b.let(product(0, s, none), "d") for s in range(SLOTS)]
            self.add(b, acc[0][0], self.transposed(b, sums), self.scales(b, base, lay.lane_blocks()))
            return
        each = max(1, p.block // w) if not lay.fixed else 1
        scales = [self.scales(b, base, [i for i in self.blocks_of(s) for _ in range(w // 2 // len(self.blocks_of(s)))]) for s in range(0, SLOTS, each)]
        for k, scale in enumerate(scales):
            for j in range(rows):
                d = none
                for s in range(k * each, (k + 1) * each):
                    d = product(j, s, d)
                self.add(b, acc[j][k % len(acc[j])], d, scale)

    def add(self, b: Body, acc: Buffer, d: Expr, scale: Expr) -> None:
        b.put(Store(acc, (), load(acc, ()) + cast(d, f32.vec(self.words // 2)) * scale))

    def blocks_of(self, s: int) -> range:
        """Blocks of a unit that register ``s`` holds."""
        first = s * self.words // self.p.block
        return range(first, first + max(1, self.words // self.p.block))

    def scales(self, b: Body, base: Expr, which: list[int]) -> Expr:
        """Scales of blocks in lanes."""
        lay = self.lay
        n = lay.zero_points - lay.scales
        if lay.fixed:
            raw = load(self.units, [ramp(base + (lay.scales + min(which)), 1, max(which) - min(which) + 1)])
            if raw.dtype.lanes == 1:
                return b.let(bcast(cast(bitcast(raw, i16), f32), len(which)), "scale")
            return b.let(cast(bitcast(shuffle([raw], [i - min(which) for i in which]), i16.vec(len(which))), f32), "scale")
        raw = load(self.units, [ramp(base + lay.scales, 1, n)])
        order = lay.scale_order()
        lanes = [order.index(i) for i in which]
        if lay.wide_scales:
            return b.let(shuffle([bitcast(raw, f32.vec(lay.per))], lanes), "scale")
        if n == 1:
            return b.let(bcast(cast(bitcast(raw, f16), f32), len(lanes)), "scale")
        return b.let(cast(bitcast(shuffle([raw], lanes), f16.vec(len(lanes))), f32), "scale")

    def scaled_pairs(self, b: Body, base: Expr, d: list[Expr]) -> Expr:
        """Sums of two products, 16 bits in the upper halves of ``d``, times their integer scales: i32 lanes over all four registers."""
        w, pairs = self.words, []
        for s in range(0, SLOTS, 2):
            x, y = (bitcast(b.let(v, "d"), u32.vec(w // 2)) for v in d[s : s + 2])
            both = b.let(bitcast((x >> 16) | y, i16.vec(w)), "both")
            which = [(s + t % 2) * w // self.p.block + t // 8 * 8 // self.p.block % max(1, w // self.p.block) for t in range(w)]
            low = min(which)
            raw = load(self.units, [ramp(base + (self.lay.scales + low), 1, max(which) - low + 1)])
            scale = bcast(raw, w) if raw.dtype.lanes == 1 else shuffle([raw], [i - low for i in which])
            pairs.append(call(self.dot.name, i32.vec(w // 2), bcast(const(0, i32), w // 2), both, bitcast(scale, i16.vec(w))))
        return pairs[0] + pairs[1]

    def transposed(self, b: Body, r: list[Expr]) -> Expr:
        """Lane ``j`` of every four: the sum over the four lanes of register ``j`` in the same place."""
        n = self.words // 2

        def pick(x: Expr, y: Expr, lanes: tuple[int, ...]) -> Expr:
            return shuffle([x, y], [h + i if i < 4 else n + h + i - 4 for h in range(0, n, 4) for i in lanes])

        def add(x: Expr, y: Expr, first: tuple[int, ...], second: tuple[int, ...]) -> Expr:
            return b.let(pick(x, y, first) + pick(x, y, second), "h")

        low, high = (add(x, y, (0, 1, 6, 7), (2, 3, 4, 5)) for x, y in ((r[0], r[1]), (r[2], r[3])))
        return add(low, high, (0, 2, 4, 6), (1, 3, 5, 7))

    def spread(self, values: list[Expr], lanes: int) -> Expr:
        """Each value in its share of the lanes."""
        each = [bcast(v, lanes // len(values)) for v in values]
        while len(each) > 1:
            each = [shuffle(each[i : i + 2], range(2 * each[i].dtype.lanes)) for i in range(0, len(each), 2)]
        return each[0]

    def values(self, b: Body, base: Expr) -> list[Expr]:
        """The four registers of a unit in i16."""
        lay, w = self.lay, self.words
        if lay.bits == 8:
            out = []
            for s in range(0, SLOTS, 2):  # two bytes a word
                raw = b.let(load(self.units, [ramp(base + (lay.values + s * w // 2), 1, w)]), "raw")
                if lay.zeros:
                    out += [b.let(bitcast(v, i16.vec(w)), "v") for v in (raw & 255, raw >> 8)]
                else:
                    out += [b.let(bitcast(v, i16.vec(w)) >> 8, "v") for v in (raw << 8, raw)]
            return out
        raw = b.let(load(self.units, [ramp(base + lay.values, 1, w)]), "raw")
        if lay.zeros:
            return [b.let(bitcast((raw >> (4 * s)) & 15, i16.vec(w)), "v") for s in range(SLOTS)]
        top = bcast(const(0xF000, u16), w)
        return [b.let(bitcast((raw << (12 - 4 * s)) & top if s else raw << 12, i16.vec(w)), "v") for s in range(SLOTS)]

    # ------------------------------------------------------------ fix-up

    def fix_up(self) -> Func:
        """Adds the parts of divided bundles, in the order of the tasks."""
        t, m, q = var("task", lo=0, hi=self.count - 1), var("m", lo=0, hi=self.m - 1), var("q", lo=0, hi=BUNDLE - 1)
        part, row = load(self.parts, [(m * self.count + t) * BUNDLE + q]), load(self.row_of, [cast(load(self.continued, [t]), index) * BUNDLE + q])
        at = (m * self.p.outputs + cast(row, index),)
        add: Stmt = Store(self.out, at, load(self.out, at) + part)
        each = For(q, const(0), const(BUNDLE), "serial", If(const(0, i32) <= row, add))
        body = For(t, const(0), const(self.count), "serial", If(const(0, i32) <= load(self.continued, [t]), each))
        return make_func(f"{self.c.name}.fixup", For(m, const(0), self.m, "serial", body), self.c.dims)


def _with(acc: list[Buffer], lanes: int, *body: Stmt) -> Stmt:
    """Statements with registers that start at zero."""
    s = block(*(Store(x, (), bcast(const(0.0, f32), lanes)) for x in acc), *body)
    for x in reversed(acc):
        s = Alloc(x, s)
    return s


__all__ = ["SparseBuilder", "apply"]
