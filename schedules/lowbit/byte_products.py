"""Template for exact sums of byte products on targets whose byte instruction saturates and whose 16-bit one is half as wide.

Pattern: that of :mod:`luthier.schedules.cpu.contract_integer` with 8-bit activations and constant i8 weights without zero point. Which
weights may go through ``bytes.madd`` together is found on the constants (:mod:`luthier.schedules.lowbit.byte_chains`): a panel of the
weights is a list of *chains* (two quads of columns, added in 16 bits) and of single quads, each with the offset of its
activations. The sums are exact; the list takes the place of the reduction loop, so that any order of the columns will do.

A block of rows gets its activations in planes of permuted bytes in a local buffer (which is also where a convolution's rows are
collected); then every panel walks the block with its sums in registers. Chosen where the lists take fewer vector operations than
16-bit products would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, Pull, axis
from luthier.ir.dtypes import i8, i16, i32, index, u8, u32
from luthier.ir.expr import (
    Expr,
    bcast,
    bitcast,
    cast,
    const,
    free_vars,
    is_const,
    load,
    load_parts,
    loads,
    minimum,
    ramp,
    rewrite,
    shuffle,
    substitute,
    var,
)
from luthier.ir.loop import Alloc, Buffer, For, If, Stmt, Store, block
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.make_func import make_func
from luthier.schedules.base.schedule import Schedule
from luthier.schedules.cpu import contract
from luthier.schedules.cpu.contract_integer import (
    Operand,
    group_axis,
    merge_taps,
    operand,
    split_heads,
    widened_copy,
    zero_into_epilogue,
)
from luthier.schedules.cpu.elementwise import flat
from luthier.schedules.cpu.integer_epilogue import simplify_epilogue
from luthier.schedules.intrin.byte_vectors import FEATURE, SPELLING, madd_bytes, madd_words
from luthier.schedules.lowbit.byte_chains import PLANES, Chains, chains
from luthier.schedules.lowbit.layouts import dim_of, row_point
from luthier.schedules.lowbit.quantized_gemv import Body

RUN = 8  # columns that stand together are a multiple of this
SAMPLE = 4  # panels from which the number of operations is estimated
ROOM = 24 << 10  # bytes of planes that stay in the first cache beside weights
LEAST = 16  # rows that pay for collecting the activations
GAIN = 0.84  # share of the operations of 16-bit products at which the lists are chosen (measured)


@dataclass(frozen=True, slots=True)
class ChainPacking:
    """One of the four streams of :class:`Chains` of a weight tensor. ``order``: its dimensions as (reduced ones .., column), others are
    taken at 0; ``pad``: columns of the last reduced dimension; ``shape``: how the tensor is seen, where it is given."""

    param: str
    which: str
    order: tuple[int, ...]
    pad: int
    shape: tuple[int, ...]
    lanes: int
    planes: int
    buf: Buffer

    def matrix(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """i8 [k, n]."""
        a = a.reshape(self.shape) if self.shape else a
        a = a[tuple(slice(None) if d in self.order else 0 for d in range(a.ndim))]
        kept = sorted(self.order)
        a = a.transpose([kept.index(d) for d in self.order])
        a = np.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, self.pad - a.shape[-2]), (0, 0)])
        return a.reshape(-1, a.shape[-1])

    def fits(self, a: np.ndarray[Any, Any]) -> bool:
        """Whether the kernel has room for the lists of weights ``a``."""
        return bool(getattr(self.lists(a), self.which).size <= self.buf.shape[0].attr)

    def lists(self, a: np.ndarray[Any, Any]) -> Chains:
        """The chains of weights ``a``; those of the last ones are kept, since there is a packing for each stream."""
        global _latest
        key = (self.order, self.pad, self.shape, self.lanes, self.planes)
        if _latest is None or _latest[0] is not a or _latest[1] != key:
            _latest = (a, key, chains(self.matrix(a), self.lanes, self.planes))
        return _latest[2]

    def apply(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The stream for weights ``a``, filled up with zeros. Raises ValueError where it does not fit."""
        c = np.ascontiguousarray(getattr(self.lists(a), self.which)).reshape(-1)
        if c.size > self.buf.shape[0].attr:
            raise ValueError(f"{self.param}: these weights need longer lists than the kernel has room for")
        return np.concatenate([c, np.zeros(self.buf.shape[0].attr - c.size, c.dtype)])


_latest: tuple[Any, Any, Chains] | None = None


KNOBS = (
    Knob("planes", "forms of a quad of bytes, 1 to 3", (1, 2, 3), group="tile"),
    Knob("rows", "of a register tile", (2, 4, 6, 8, 12), group="tile"),
    Knob("tiles", "register tiles of a block of rows", (1, 2, 4, 8)),
    Knob("always", "whatever the number of operations", (), False),
)


def apply(
    s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, planes: int | None = None, rows: int | None = None, tiles: int | None = None, always: bool = False,
) -> Any:
    """Kernels of a matching Compute, or None. ``planes``: forms of a quad (1 to 3); ``rows``: of a register tile; ``always``: whatever
    the number of operations."""
    lanes = caps.vector_bits // 32
    bytewise = {n: SPELLING[n].get(caps.printer, {}) for n in ("bytes.madd", "words.madd")}
    if caps.gpu or not {FEATURE, "pmaddwd"} <= caps.features or "vnni" in caps.features or any(caps.vector_bits not in x for x in bytewise.values()):
        return None
    prepared = contract.prepare(s)
    if prepared is None:
        return None
    s, acc, out = prepared
    if s.stages[acc].buf.dtype is not i32:
        return None
    s = simplify_epilogue(s, out, constants)
    found = _operands(s, acc, out, constants, always)
    if found is None:
        return None
    s, x, w, k = found
    order = _order(s, acc, w, k)
    if order is None:
        return None
    shape = tuple(e.attr for e in load_parts(w.ld)[0].shape) if w.viewed else ()
    whole = -(-k.extent.attr // RUN) * RUN
    make = ChainPacking(w.buf.name, "pairs", order, whole, shape, lanes, 1, w.buf)
    a = np.asarray(constants[w.buf.name])
    m = make.matrix(a)
    some = m[:, : SAMPLE * lanes]  # a few panels tell what all of them will take
    options = [(chains(some, lanes, d).operations + 0.3 * d * m.shape[0] * some.shape[1] / m.shape[1], d) for d in ((planes,) if planes else (1, 2, 3) if 3 * 10 * m.shape[0] <= ROOM else (1, 2))]
    cost, d = min(options, key=lambda o: o[0] * (1 + 0.02 * o[1]))
    if not always and cost > GAIN * m.shape[0] * -(-some.shape[1] // lanes):
        return None
    make = replace(make, planes=d)
    c = make.lists(a)
    return Builder(s, acc, out, x, w, k, whole, caps, constants, make, c, rows, tiles).kernels()


def _operands(s: Schedule, acc: str, out: str, constants: Mapping[str, Any], always: bool) -> tuple[Schedule, Operand, Operand, Axis] | None:
    st = s.stages[acc]
    factors = contract.factors_of(st)
    a, b = (operand(f) for f in factors)
    v = st.axes[-1].var
    if a is None or b is None or (v in free_vars(a.ld)) == (v in free_vars(b.ld)):
        return None
    w, x = (a, b) if v in free_vars(a.ld) else (b, a)
    if w.buf.name not in constants or w.buf.dtype is not i8 or w.zero is not None or (x.zero is not None and free_vars(x.zero)):
        return None
    if load_parts(w.ld)[2] is not None or any(e.op != "const" for e in w.buf.shape):
        return None
    m = dim_of(st.axes[:-1])
    if not always and (m.op == "const" and m.attr < LEAST or st.axes[-1].extent.op != "const" or st.axes[-1].extent.attr < 8):
        return None
    if st.axes[-1].extent.op != "const" or any(a.extent.op != "const" for a in st.reduction.attr[1]):  # type: ignore[union-attr]
        return None
    s, x, w = split_heads(s, acc, x, w, constants)
    s, x, w = merge_taps(s, acc, x, w, RUN, constants)
    red = s.stages[acc].reduction
    assert red is not None
    k = group_axis(red.attr[1], x.ld, w.ld)
    return None if k is None else (s, x, w, k)


def _order(s: Schedule, acc: str, w: Operand, k: Axis) -> tuple[int, ...] | None:
    """Dimensions of the weights: the reduced ones in the order of the axes with ``k`` last, then the columns."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    _, idx, _, _ = load_parts(w.ld)
    axes = [*(a for a in red.attr[1] if a is not k), k]
    out = []
    for v in (*(a.var for a in axes), st.axes[-1].var):
        at = [n for n, i in enumerate(idx) if i is v]
        if len(at) != 1:
            return None
        out.append(at[0])
    return tuple(out) if all(n in out or is_const(i, 0) for n, i in enumerate(idx)) else None


@dataclass
class Builder:
    """The kernel: a block of rows collected, all panels over it."""

    s: Schedule
    acc: str
    out: str
    x: Operand
    w: Operand
    k: Axis
    whole: int
    caps: Capabilities
    constants: Mapping[str, Any]
    packing: ChainPacking
    chains: Chains
    rows: int | None
    tiles: int | None

    def kernels(self) -> Any:
        from luthier.schedules.select import Kernels, build, build_kernel

        s, acc, out = self.s, self.acc, self.out
        red = s.stages[acc].reduction
        assert red is not None
        self.taps = [a for a in red.attr[1] if a is not self.k]
        self.flip = 128 if self.x.buf.dtype is i8 else 0
        before = set(s.stages)
        group = self.k if self.whole == self.k.extent.attr else axis(f"{self.k.name}g", self.whole)
        s, ld = widened_copy(s, self.x, (self.k, group), self.x.buf.dtype, 0)
        if ld is None:
            return None
        s = zero_into_epilogue(s, acc, out, self.x, self.w, self.flip)
        made = [n for n in s.stages if n not in before]
        copies = [build(_compute(s, n), self.caps) for n in made]
        s = replace(s, stages={n: st for n, st in s.stages.items() if n not in made})
        wide = axis(f"{self.k.name}w", self.whole)
        self.ld = substitute(ld, {group.var: wide.var})
        if not self.taps:
            s, self.ld = self.merged(s)
        self.s = s
        p = self.place(wide)
        if p is None:
            return None
        packed: dict[str, Any] = {}
        packings: dict[str, Any] = {}
        for n, q in s.packed.items():
            packed[n], packings[n] = q.apply(self.constants[q.param]), q
        for b, which in self.streams:
            packings[b.name] = replace(self.packing, which=which, buf=b)
            packed[b.name] = packings[b.name].apply(np.asarray(self.constants[self.packing.param]))
        func = make_func(s.compute.name, p, s.compute.dims)
        done = build_kernel(replace(func, attrs={"template": "byte_products"}), self.caps)
        temps = {b.name: b for c in copies for b in c.temps}
        temps |= {n: replace(b, scope="global") for c in copies for f in c.funcs for b in f.buffers if b.writable for n in (b.name,)}
        trace = (*s.trace, ("byte_products", f"planes={self.packing.planes}", f"chains={len(self.chains.pairs)}", f"singles={len(self.chains.singles)}", f"rows={self.mu}"))
        return Kernels((*(f for c in copies for f in c.funcs), done), tuple(temps.values()), packed, "byte_products", trace, packings)

    def merged(self, s: Schedule) -> tuple[Schedule, Expr]:
        """Row axes that every access walks as one become one."""
        st = s.stages[self.acc]
        probe = replace(st, expr=cast(self.ld, i32))
        t = contract.merge_rows(replace(s, stages={**s.stages, self.acc: probe}), [self.acc, self.out], [a.var for a in st.axes[:-1]])
        if t.stages[self.acc] is probe:
            return s, self.ld
        return t, next(iter(loads(t.stages[self.acc].expr)))

    # ------------------------------------------------------------ loops

    def place(self, k: Axis) -> Stmt | None:
        st, lanes, d = self.s.stages[self.acc], self.packing.lanes, self.packing.planes
        self.row_axes, self.n = st.axes[:-1], st.axes[-1]
        self.m = dim_of(self.row_axes)
        self.columns = self.whole
        for a in self.taps:
            self.columns *= a.extent.attr
        self.mu = self.rows or best_rows(self.m)
        tiles = self.tiles or max(1, min(ROOM // (self.mu * d * self.columns), 8))
        count = -(-self.m.attr // self.mu) if self.m.op == "const" else None
        while count is not None and tiles > 1 and count % tiles:
            tiles -= 1
        self.block = tiles * self.mu
        self.pitch = d * self.columns + (64 if d * self.columns % 256 == 0 else 0)  # rows a power of two apart fall into the same sets of the cache
        self.local = Buffer("planes", u8, (const(self.block * self.pitch),), "local")
        if self.block * self.pitch > self.caps.l2 // 3:
            return None
        name = self.s.compute.outs[0]
        c = self.chains
        steps = {"pairs": len(c.pairs) + len(c.pairs) // 12 + 16, "singles": len(c.singles) * 5 // 4 + 32}  # room for weights of another layer
        quad = 4 * lanes
        sizes = {"pairs": steps["pairs"] * 2 * quad, "singles": steps["singles"] * quad, "pair_at": steps["pairs"] * 2, "single_at": steps["singles"], "counts": c.counts.size}
        types = {"pairs": i8, "singles": i8, "pair_at": i32, "single_at": i32, "counts": i32}
        bufs = {w: Buffer(f"{name}.{w}", types[w], (const(n),), "param", False) for w, n in sizes.items()}
        self.bufs = bufs
        self.streams = [(b, w) for w, b in bufs.items()]
        blocks = (self.m + (self.block - 1)) // self.block
        panels = -(-int(self.n.extent.attr) // lanes)
        shares = 1
        if blocks.op == "const" and blocks.attr < 8:
            shares = min(panels, -(-8 // blocks.attr))
        per = -(-panels // shares)
        shares = -(-panels // per)
        f = var("rb", lo=0, hi=blocks * shares - 1)
        rb = f if shares == 1 else f // shares
        first = rb * self.block
        fill = self.collect(k, first)
        pv = var("p", lo=0, hi=per - 1)
        panel = pv if shares == 1 else f % shares * per + pv
        tv = var("t", lo=0, hi=tiles - 1)
        tile = self.tile(panel, tv * self.mu, first + tv * self.mu)
        walk: Stmt = For(tv, const(0), const(tiles), "serial", tile) if tiles > 1 else substitute_stmt(tile, {tv: const(0)})
        if shares > 1 and panels % per:
            walk = If(panel < panels, walk)
        body = For(pv, const(0), const(per), "serial", walk)
        return For(f, const(0), blocks * shares, "parallel", Alloc(self.local, block(fill, body)))

    def start(self, panel: Expr, of: int, which: int) -> Expr:
        return cast(load(self.bufs["counts"], [panel * 2 + (2 * of + which)]), index)

    def collect(self, k: Axis, first: Expr) -> Stmt:
        """The activations of a block of rows, a plane after the other in each row."""
        d, chunk = self.packing.planes, 32 if self.whole % 32 == 0 else 16 if self.whole % 16 == 0 else 8
        r = var("r", lo=0, hi=self.block - 1)
        row = first + r
        whole = self.m.op == "const" and self.m.attr % self.block == 0
        env = row_point(self.row_axes, row if whole else minimum(row, self.m - 1))
        cv = var("c", lo=0, hi=self.whole // chunk - 1)
        buf, idx, _, _ = load_parts(self.ld)
        at = substitute(flat(buf, idx), {**env, k.var: cv * chunk})
        source = replace(buf, shape=(buf.size(),))
        b = Body()
        v = load(source, [ramp(at, 1, chunk)])
        v = b.let(bitcast(v, u8.vec(chunk)) if buf.dtype is not u8 else v, "x")
        if self.flip:
            v = b.let(v ^ bcast(const(128, u8), chunk), "x")
        tap: Expr = const(0)
        for a in self.taps:
            tap = tap * a.extent + a.var
        to = r * self.pitch + tap * self.whole + cv * chunk
        for p in range(d):
            form = v if p == 0 else shuffle([v], [4 * q + int(o) for q in range(chunk // 4) for o in PLANES[p]])
            b.put(Store(self.local, (ramp(to + p * self.columns, 1, chunk),), form))
        nest: Stmt = For(cv, const(0), const(self.whole // chunk), "serial", b.take())
        for a in reversed(self.taps):
            nest = For(a.var, const(0), a.extent, "serial", nest)
        return For(r, const(0), const(self.block), "serial", nest)

    def tile(self, panel: Expr, local_row: Expr, row: Expr) -> Stmt:
        """``mu`` rows of a panel: chains, single quads, epilogue."""
        lanes = self.packing.lanes
        acc = [Buffer(f"acc{i}", i32.vec(lanes), (), "local") for i in range(self.mu)]
        one = bcast(const(1, i16), 2 * lanes)
        base = local_row * self.pitch

        def quad(b: Body, at: Expr, i: int) -> Expr:
            word = bitcast(load(self.local, [ramp(at + i * self.pitch, 1, 4)]), u32)
            return bitcast(bcast(word, lanes), u8.vec(4 * lanes))

        parts: list[Stmt] = [Store(a, (), bcast(const(0, i32), lanes)) for a in acc]
        for which, n in (("pair", 2), ("single", 1)):
            stream_ = self.bufs["pairs" if n == 2 else "singles"]
            cv = var(f"{which}", lo=0, hi=stream_.shape[0].attr // (n * 4 * lanes) - 1)
            b = Body()
            at = [b.let(cast(load(self.bufs[f"{which}_at"], [cv * n + h]), index) + base, "at") for h in range(n)]
            ws = [b.let(load(stream_, [ramp((cv * n + h) * (4 * lanes), 1, 4 * lanes)]), "w") for h in range(n)]
            for i, a in enumerate(acc):
                t = [madd_bytes(quad(b, at[h], i), ws[h]) for h in range(n)]
                total = b.let(t[0] + t[1] if n == 2 else t[0], "s")
                b.put(Store(a, (), load(a, ()) + madd_words(total, one)))
            lo, hi = (self.start(panel, o, n == 1) for o in (0, 1))
            parts.append(For(cv, lo, hi, "serial", b.take()))
        body = block(*parts, self.epilogue(panel, row, acc))
        for a in reversed(acc):
            body = Alloc(a, body)
        return body

    def epilogue(self, panel: Expr, row: Expr, acc: list[Buffer]) -> Stmt:
        """The elementwise rest of the Compute, a row of a panel at a time."""
        st, lanes = self.s.stages[self.out], self.packing.lanes
        out = replace(st.buf, scope="param")
        tile = Buffer("result", i32, (const(len(acc) * lanes),), "local")
        lane = var("lane", lo=0, hi=lanes - 1)
        parts: list[Stmt] = [Store(tile, (ramp(const(i * lanes), 1, lanes),), load(a, ())) for i, a in enumerate(acc)]
        n = panel * lanes + lane
        for i in range(len(acc)):
            env = {**row_point(st.axes[:-1], row + i), st.axes[-1].var: n}

            def read(e: Expr, i: int = i) -> Expr | None:
                return load(tile, [_LANE + i * lanes]) if e.op == "load" and e.attr[0].name == self.acc else None

            value = substitute(substitute(rewrite(st.expr, read), env), {_LANE: lane})
            s: Stmt = Store(out, tuple(env[a.var] for a in st.axes), value)
            if self.n.extent.attr % lanes:
                s = If(n < self.n.extent, s)
            s = For(lane, const(0), const(lanes), "vectorize", s)
            if not (self.m.op == "const" and self.m.attr % self.block == 0):
                s = If(row + i < self.m, s)
            parts.append(s)
        return Alloc(tile, block(*parts))


_LANE = var("result.lane", lo=0, hi=63)


def substitute_stmt(s: Stmt, env: dict[Expr, Expr]) -> Stmt:
    from luthier.ir.loop import rewrite_stmt

    return rewrite_stmt(s, lambda e: env.get(e))


def best_rows(m: Expr) -> int:
    """Rows of a register tile: few that are left over, and many to share the weights' registers."""
    if m.op != "const":
        return 10
    return min(range(4, 11), key=lambda r: (-(-m.attr // r) * r) * (1 + 0.4 / r))


def _compute(s: Schedule, name: str) -> Compute:
    """The stage ``name`` as a Compute of its own."""
    st = s.stages[name]
    read = {ld.attr[0].name: ld.attr[0] for ld in loads(st.expr)}
    params = tuple(replace(b, scope="param", writable=False) for b in read.values())
    return Compute(f"{s.compute.name}.{name}", params, s.compute.dims, (Pull(st.buf, st.axes, st.expr),), (name,))
