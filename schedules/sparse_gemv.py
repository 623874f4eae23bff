"""Template for products with group-sparse quantized weights: 16-bit dot products over a stream of kept blocks.

Pattern: :mod:`luthier.schedules.sparse_pattern`. A register holds 16-bit weights of one block (or parts or several of them, by its
width) and is multiplied with the activations at the block's columns, rounded to 14 bits, one scale a row: no gather, no zero point, and
one ``i16 x i16 -> i32`` product takes what the instruction takes. 4-bit values are used where they stand in the word, times 2**12.
Sums go to f32 block by block with the block's scale.

The work is split over stored blocks, not rows (``split_tasks``): a row that a cut divides is summed by several tasks, whose
parts a last small kernel adds in order, so that results do not depend on the number of threads.

NMSE against f64: 1e-7 on normally distributed activations (the rounding of activations that the operator states, f32 sums).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, Pull, let_exprs
from luthier.ir.dtypes import f16, f32, i8, i16, i32, index, u16
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
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, If, Let, Stmt, Store, block
from luthier.schedules.capabilities import Capabilities
from luthier.schedules.intrin import usable
from luthier.schedules.lowbit import dim_of
from luthier.schedules.make_func import make_func
from luthier.schedules.quantized_gemv import Body
from luthier.schedules.schedule import Schedule
from luthier.schedules.sparse_pattern import (
    SLOTS,
    STEP,
    Blocks,
    SparseProduct,
    UnitLayout,
    evaluate_blocks,
    match,
    pack_units,
    split_tasks,
)

PREFETCH = 4096  # bytes ahead in the stream
TASK_UNITS = 256  # a task is worth handing out from here on
MAX_TASKS = 64
ROUND_UNITS = 256  # stored lengths are rounded up, so that layers of about the same density share kernels


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

        before, after = self.around()
        first, _, *rest = cut(self.c, [before, [self.c.lets.index(self.p.acc)], *([after] if after else [])])
        self.prepare()
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

    # ------------------------------------------------------------ buffers

    def prepare(self) -> None:
        p, blocks = self.p, evaluate_blocks(self.p, self.constants)
        self.words = self.caps.vector_bits // 16
        self.lay = UnitLayout(self.words, p.block, p.bits, blocks.scale.dtype == np.float32, blocks.zero is not None)
        stream, units = self.stream(blocks)
        total = int(units[-1])
        self.count = self.tasks or max(1, min(MAX_TASKS, total // TASK_UNITS))
        t = split_tasks(units, self.count)
        self.split = bool((t.continued >= 0).any())
        name = p.acc.name
        self.packed = {
            f"{name}.units": stream.reshape(-1), f"{name}.rows": units.astype(np.int32), f"{name}.starts": t.starts.astype(np.int32),
            f"{name}.first": t.first.astype(np.int32), f"{name}.last": t.last.astype(np.int32), f"{name}.continued": t.continued.astype(np.int32),
        }  # fmt: skip
        bufs = {n.rpartition(".")[2]: Buffer(n, u16 if a.dtype == np.uint16 else i32, (const(len(a)),), "param", False) for n, a in self.packed.items()}
        self.units, self.row_units, self.starts = bufs["units"], bufs["rows"], bufs["starts"]
        self.first, self.last, self.continued = bufs["first"], bufs["last"], bufs["continued"]
        self.m = dim_of(p.rows)
        self.width = int(p.xq.shape[-1].attr)
        self.xq = Buffer(p.xq.name, i16, (self.m * self.width,), "param", False)
        self.out = Buffer(name, f32, (self.m * p.outputs,), "param", True)
        self.parts = Buffer(f"{name}.parts", f32, (self.m * self.count,), "param", True)

    def stream(self, blocks: Blocks) -> tuple[Any, Any]:
        stream, units = pack_units(blocks, self.lay, self.p.block)
        extra = -len(stream) % ROUND_UNITS if len(stream) > ROUND_UNITS else max(1, len(stream)) - len(stream)
        return np.concatenate([stream, np.zeros((extra, self.lay.size), np.uint16)]), units

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
        """All rows of a task for ``rows`` activation rows from ``m0``."""
        p, b = self.p, Body()
        u0, u1 = self.int_at(b, self.starts, t, "u0"), self.int_at(b, self.starts, t + 1, "u1")
        r0, r1 = self.int_at(b, self.first, t, "r0"), self.int_at(b, self.last, t, "r1")
        head = b.take()
        r = var("r", lo=0, hi=p.outputs - 1)
        start, end = self.int_at(b, self.row_units, r, "start"), self.int_at(b, self.row_units, r + 1, "end")
        lo, hi = b.let(maximum(start, u0), "lo"), b.let(minimum(end, u1), "hi")
        products = self.lay.per * p.block // max(p.block, self.words)  # sums that a unit adds
        chains = max(1, min(products, 4 // rows))
        acc = [[Buffer(f"acc{j}_{i}", f32.vec(self.words // 2), (), "local") for i in range(chains)] for j in range(rows)]
        flat = [x for row in acc for x in row]
        bounds = b.take()
        u = var("u", lo=0)
        self.unit(b, u, m0, rows, acc)
        loop = For(u, lo, hi, "serial", b.take())
        for j in range(rows):
            total = [load(x, ()) for x in acc[j]]
            while len(total) > 1:
                total = [total[i] + total[i + 1] if i + 1 < len(total) else total[i] for i in range(0, len(total), 2)]
            v = b.let(vreduce("add", total[0]) * const(self.unscale, f32), "sum")
            own = Store(self.out, ((m0 + j) * p.outputs + r,), v)
            b.put(If(start < u0, Store(self.parts, ((m0 + j) * self.count + t,), v), own) if self.split else own)
        start_at = [Store(x, (), bcast(const(0.0, f32), self.words // 2)) for x in flat]
        body = block(bounds, *start_at, loop, b.take())
        for x in reversed(flat):
            body = Alloc(x, body)
        return block(head, For(r, r0, r1, "serial", body))

    @property
    def unscale(self) -> float:
        """4-bit values stand in the topmost bits of a word unless zero points are subtracted."""
        return 2.0**-12 if self.p.bits == 4 and not self.lay.zeros else 1.0

    def unit(self, b: Body, u: Expr, m0: Expr, rows: int, acc: list[list[Buffer]]) -> None:
        """One unit of the stream into the sums of ``rows`` activation rows."""
        lay, p, w = self.lay, self.p, self.words
        base = u * lay.size
        if self.caps.streams == 1:
            for line in range(0, lay.size, 32):
                b.put(Call("prefetch", ((self.units, base + (PREFETCH // 2 + line)),)))
        at = [b.let(cast(load(self.units, [base + i]), index) * STEP, "at") for i in range(lay.per)]
        kind = f32 if lay.wide_scales else f16
        raw = load(self.units, [ramp(base + lay.scales, 1, lay.zero_points - lay.scales)])
        scales = b.let(cast(bitcast(raw, kind.vec(lay.per)), f32.vec(lay.per)), "scales") if lay.zero_points - lay.scales > 1 else b.let(cast(bitcast(raw, f16), f32), "scale")
        per_register, per_block = max(1, w // p.block), max(1, p.block // w)
        zero = [b.let(bitcast(load(self.units, [base + (lay.zero_points + i)]), i16), "zero") for i in range(lay.per)] if lay.zeros else []
        values = self.values(b, base)
        done = 0
        for first in range(0, SLOTS, per_block):
            blocks = range(first * w // p.block, first * w // p.block + per_register)
            parts = []
            for s in range(first, first + per_block):
                v = values[s]
                if zero:
                    v = b.let(v - self.spread([zero[i] for i in blocks], w), "q")
                parts.append(v)
            scale = b.let(self.spread([extract(scales, i) if lay.per > 1 else scales for i in blocks], w // 2), "scale")
            for j in range(rows):
                d: Expr = bcast(const(0, i32), w // 2)
                for n, v in enumerate(parts):
                    xs = [load(self.xq, [ramp((m0 + j) * self.width + at[i] + n * w, 1, min(w, p.block))]) for i in blocks]
                    x = xs[0] if len(xs) == 1 else shuffle(xs, range(w))
                    d = call(self.dot.name, i32.vec(w // 2), d, v, x)
                sum_ = acc[j][done % len(acc[j])]
                b.put(Store(sum_, (), load(sum_, ()) + cast(d, f32.vec(w // 2)) * scale))
            done += 1

    def spread(self, values: list[Expr], lanes: int) -> Expr:
        """Each value in its share of the lanes."""
        if len(values) == 1:
            return bcast(values[0], lanes)
        each = [bcast(v, lanes // len(values)) for v in values]
        while len(each) > 1:
            each = [shuffle(each[i : i + 2], range(2 * each[i].dtype.lanes)) for i in range(0, len(each), 2)]
        return each[0]

    def values(self, b: Body, base: Expr) -> list[Expr]:
        """The four registers of a unit in i16."""
        lay, w = self.lay, self.words
        if lay.bits == 8:
            out = []
            for s in range(SLOTS):
                raw = bitcast(load(self.units, [ramp(base + (lay.values + s * w // 2), 1, w // 2)]), i8.vec(w))
                v = cast(raw, i16.vec(w))
                out.append(b.let(v if not lay.zeros else v & bcast(const(255, i16), w), "v"))
            return out
        raw = b.let(load(self.units, [ramp(base + lay.values, 1, w)]), "raw")
        if lay.zeros:
            return [b.let(bitcast((raw >> (4 * s)) & 15, i16.vec(w)), "v") for s in range(SLOTS)]
        top = bcast(const(0xF000, u16), w)
        return [b.let(bitcast((raw << (12 - 4 * s)) & top if s else raw << 12, i16.vec(w)), "v") for s in range(SLOTS)]

    # ------------------------------------------------------------ fix-up

    def fix_up(self) -> Func:
        """Adds the parts of divided rows, in the order of the tasks."""
        t, m = var("task", lo=0, hi=self.count - 1), var("m", lo=0, hi=self.m - 1)
        row = var("row", lo=0, hi=self.p.outputs - 1)
        at = (m * self.p.outputs + row,)
        add = Store(self.out, at, load(self.out, at) + load(self.parts, [m * self.count + t]))
        some = const(0, i32) <= load(self.continued, [t])
        body = For(t, const(0), const(self.count), "serial", If(some, block(Let(row, cast(load(self.continued, [t]), index)), add)))
        return make_func(f"{self.c.name}.fixup", For(m, const(0), self.m, "serial", body), self.c.dims)


__all__ = ["SparseBuilder", "apply"]
