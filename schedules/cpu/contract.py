"""Template for contractions: matrix products, convolutions (implicit GEMM, grouped, depthwise) and matrix-vector products.

The pattern is ``acc[..] = sum(f(P) * g(Q))`` with an elementwise epilogue. The innermost output axis ``v`` goes to lanes; the
factor that contains it is ``P`` (packed into panels of the tile's width when it is constant), the other factor is broadcast.
``u`` is the innermost axis that only the broadcast factor has. The register tile is ``mu`` rows of ``u`` by ``nv`` lanes of
``v``, kept in registers over the whole reduction; both sizes minimise a cycle estimate over the actual extents, so a tile
that divides the extent beats a larger one that does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Axis, Pull, axis, reduce_
from luthier.ir.expr import (
    Expr,
    bounds,
    const,
    free_vars,
    is_const,
    linear,
    load,
    load_parts,
    loads,
    prove,
    rewrite,
    substitute,
    var,
    vars_outside_loads,
)
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import (
    Schedule,
    Stage,
    annotate,
    fuse,
    in_runs,
    inline,
    pack,
    pull_stage,
    reorder,
    split,
    stage,
)
from luthier.schedules.base.simplify_axes import split_reduced_axes
from luthier.schedules.cpu.elementwise import flat, pointwise, stride
from luthier.schedules.cpu.rowwise import positions

ROWS = (7, 10, 14, 20, 28, 40, 56, 80)  # what a number of rows may be that only the run knows: widths of images
LONG, RUN_OF_TILE = 1 << 14, 2048  # products of a sum from where on it goes in runs, and their length: a register tile is added up seldom


KNOBS = (
    Knob("mu", "rows of the register tile", (1, 2, 3, 4, 5, 6, 8, 10, 12), group="tile"),
    Knob("nv", "columns of the register tile", lambda caps, _: tuple(n * caps.lanes(32) for n in (1, 2, 3, 4)), group="tile"),
    Knob("ku", "rounds of the innermost reduction loop that are unrolled", (1, 4), 2),
    Knob("mblock", "rows that all panels of columns pass over while they are in the cache; 0: all", (0, 48, 192)),
    Knob("order", "the outer loop: rows or panels of columns", ("rows", "panels")),
)


def apply(
    s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, mu: int | None = None, nv: int | None = None, ku: int = 2,
    mblock: int | None = None, order: str | None = None,
) -> Schedule | None:
    prepared = None if caps.gpu else prepare(s)
    if prepared is None:
        return None
    s, acc, out = prepared
    return product(s, acc, out, caps, constants, mu=mu, nv=nv, ku=ku, mblock=mblock, order=order)


def plausible(knobs: Mapping[str, Any], caps: Capabilities) -> bool:
    """Whether a register tile fits the registers and fills half of them at least; only one side of it is no tile."""
    if not (knobs.get("mu") and knobs.get("nv")):
        return not (knobs.get("mu") or knobs.get("nv"))
    vectors = knobs["nv"] // caps.lanes(32)
    used = knobs["mu"] * vectors + vectors + 1
    return bool(min(caps.registers, 16) // 2 <= used < caps.registers)


def product(
    s: Schedule, acc: str, out: str, caps: Capabilities, constants: Mapping[str, Any], *, mu: int | None = None, nv: int | None = None, ku: int = 2,
    mblock: int | None = None, order: str | None = None,
) -> Schedule | None:
    """The template on a prepared schedule: ``acc`` is the sum of products, ``out`` the epilogue that reads it."""
    st = s.stages[acc]
    if work(st) is not None and work(st) < 2048:  # type: ignore[operator]
        return None
    if st.reduction is not None and all(a.extent.op == "const" for a in st.reduction.attr[1]):
        if math.prod(a.extent.attr for a in st.reduction.attr[1]) > LONG:
            s = in_runs(s, RUN_OF_TILE)
    lanes = caps.lanes(max(st.buf.dtype.bits, 32))
    v = _vector_axis(s, st, lanes, constants)
    if v is st.axes[-1].var and not any(is_packable(s, f, v, constants) for f in factors_of(st)):
        s = merge_lanes(s, [acc, out])
        v = s.stages[acc].axes[-1].var
    s = pad_input(s, acc, caps)
    st = s.stages[acc]
    p, q = factors_of(st)
    if v not in free_vars(p):
        p, q = q, p
    if v not in free_vars(p):
        return None
    depthwise = v in free_vars(q)
    spatial = {a.var for a in st.axes}
    if free_vars(p) & spatial == free_vars(q) & spatial:  # nothing is shared, each element read once
        if any(_strided(x, v) for x in loads(p, q)):
            return None  # rows: lanes along them
        s = in_runs(s)
    rest = [a for a in st.axes if a.var is not v]
    us = [a for a in rest if a.var in free_vars(q if not depthwise else p) and a.var not in free_vars(p if not depthwise else q)]
    if depthwise and not us:
        us = [a for a in rest if a.var in free_vars(q) and a.var not in free_vars(p)]
    if not us and len(rest) and rest[-1].extent.op == "const" and not depthwise:  # rows that share nothing still fill the pipeline
        us = [rest[-1]]
    n_ext = next(a.extent for a in st.axes if a.var is v)
    if n_ext.op == "const" and n_ext.attr < lanes and not is_packable(s, p, v, constants):
        return None
    s = merge_rows(s, [acc, out], [a.var for a in us])
    st = s.stages[acc]
    us = [a for a in st.axes if a.var is not v and (a.var in {x.var for x in us} or a.name.startswith("_u"))]
    m_ext = us[-1].extent if us else const(1)
    packs = not depthwise and is_packable(s, p, v, constants)
    alone = n_ext.op == "const" and len(st.axes) == 2 and not depthwise  # panels and a narrower last one, in a loop that is fused with no other
    mu_, nr = tile(m_ext, n_ext, lanes, caps.registers, exact=not packs and not alone, cut=alone and not packs, shared=not depthwise, issue=caps.issue)
    panel = _stream_panel(m_ext, n_ext, lanes, packs and not (mu or nv), caps)
    mu, nv = mu or mu_, nv or panel * caps.streams or nr * lanes
    packs = packs or (not depthwise and _wastes_lines(s, p, v, m_ext, nv, caps))
    padded = False
    if packs:
        s, padded = pack_panel(s, acc, p, v, panel or nv)
    s = _merge_reduce(s, acc)
    s = register_tile(s, acc, out, v, us, mu, nv, lanes, ku, caps, padded, depthwise, mblock, order, panel)
    for n, x in s.stages.items():
        if n.endswith(".pad") and x.at is None:
            s = pointwise(_flat_rows(s, n), n, caps)
    return s


def prepare(s: Schedule) -> tuple[Schedule, str, str] | None:
    """(schedule, sum of products, output) with everything else inlined and an epilogue of its own; None for another pattern."""
    if len(s.compute.outs) != 1 or any(st.push or st.fold for st in s.stages.values()):
        return None
    out = s.compute.outs[0]
    acc = accumulator_of(s)
    if acc is None or list(s.stages)[-1] != out:
        return None
    for n in [n for n in s.stages if n not in (out, acc)]:
        if s.stages[n].reduction is not None:
            return None
        s = inline(s, n)
    if accumulator_of(s) != acc:  # a factor was no load but a table computed on the way
        return None
    if acc != out:
        pos = positions(s, out)
        if pos is None or pos[acc] != list(range(len(s.stages[out].axes))):
            return None
    st = s.stages[acc]
    if not st.axes or is_const(st.axes[-1].extent, 1) and len(st.axes) == 1:
        return None
    if acc == out:  # a trivial epilogue gives the tile a place to be stored from
        s, acc = split_epilogue(s, out)
    return s, acc, out


def _vector_axis(s: Schedule, st: Stage, lanes: int, constants: Mapping[str, Any]) -> Expr:
    """The innermost output axis, unless it is too short for lanes or no factor walks it well and a constant factor has a longer
    axis to itself (output channels of a channels-first convolution): then that one, at the price of strided stores."""
    last = st.axes[-1]
    f = factors_of(st)

    def good(v: Expr) -> bool:
        for p, q in (f, f[::-1]):
            if v in free_vars(p) and v not in free_vars(q):
                if is_packable(s, p, v, constants):
                    return True
                ls = [x for x in loads(p) if v in free_vars(x)]
                d = [stride(flat(x.attr[0], load_parts(x)[1]), v) for x in ls]
                return all(x is not None and is_const(x, 1) for x in d)
        return v in free_vars(f[0]) and v in free_vars(f[1])

    if not (last.extent.op == "const" and last.extent.attr < lanes) and good(last.var):
        return last.var
    for a in reversed(st.axes[:-1]):
        for p, q in (f, f[::-1]):
            long = a.extent.op == "const" and a.extent.attr >= lanes
            if long and a.var in free_vars(p) and a.var not in free_vars(q) and is_packable(s, p, a.var, constants) and any(x.attr[0].name in constants for x in loads(p)):
                return a.var
    return last.var


def work(st: Stage) -> int | None:
    """Multiply-adds when all extents are known."""
    assert st.reduction is not None
    n = 1
    for a in (*st.axes, *st.reduction.attr[1]):
        if a.extent.op != "const":
            return None
        n *= a.extent.attr
    return n


def accumulator_of(s: Schedule) -> str | None:
    """The one reduction stage, if it is a plain sum of products."""
    reds = [st for st in s.stages.values() if st.reduction is not None]
    if len(reds) != 1:
        return None
    r = reds[0].reduction
    assert r is not None
    if r.attr[0] != "sum" or len(r.args) != 1 or as_product(r.args[0]) is None:
        return None
    return reds[0].name


def as_product(e: Expr) -> tuple[Expr, Expr] | None:
    while e.op == "cast":
        e = e.args[0]
    if e.op != "mul" or not loads(e.args[0]) or not loads(e.args[1]):
        return None
    return e.args[0], e.args[1]


def _strided(x: Expr, v: Expr) -> bool:
    d = stride(flat(*load_parts(x)[:2]), v)
    return d is None or not (is_const(d, 0) or is_const(d, 1))


def factors_of(st: Stage) -> tuple[Expr, Expr]:
    assert st.reduction is not None
    f = as_product(st.reduction.args[0])
    assert f is not None
    return f


def split_epilogue(s: Schedule, out: str) -> tuple[Schedule, str]:
    """``O = sum(..)`` becomes ``O.acc = sum(..); O = O.acc``."""
    st = s.stages[out]
    ren = {a.var: var(a.name + "'", lo=0, hi=a.extent - 1) for a in st.axes}
    ab = replace(st.buf, name=f"{out}.acc", scope="global", writable=True)
    ext = dict(s.ext)
    for k in [k for k in ext if k.attr[0].startswith(out + ".")]:
        del ext[k]
    a_st = pull_stage(Pull(ab, tuple(Axis(ren[a.var], a.extent) for a in st.axes), substitute(st.expr, ren)), ext)
    o_st = pull_stage(Pull(st.buf, st.axes, load(ab, [a.var for a in st.axes])), ext)
    return replace(s, stages={ab.name: a_st, out: o_st}, ext=ext, trace=(*s.trace, ("epilogue", out))), ab.name


# ---------------------------------------------------------------- tile choice


def tile(m: Expr, n: Expr, lanes: int, registers: int, *, exact: bool = False, cut: bool = False, shared: bool = True, issue: float = 0.0, width: int = 0) -> tuple[int, int]:
    """(rows, vectors) of the register tile with the least estimated cycles per reduction step over an m x n output.

    Two FMAs and 1.4 loads a cycle, at least five cycles a step (FMA latency; both measured on Zen 3), beside them a tenth of a cycle a
    broadcast and a quarter a vector, which may come from the second-level cache (with 32 registers of 512 bits, tiles of 20 to 24 accumulators are 6 to 9 % faster than those of 12); accumulators, the panel's
    vectors and one broadcast share the registers, with one to spare (the code generator spills without it). ``exact``: columns are not padded, so a width that divides them avoids masks
    in the reduction. ``cut``: the last columns have a narrower tile of their own. ``shared``: False when every row loads its own vectors (depthwise), so rows save no loads. ``width``: the number of vectors where it is given. ``issue``: see
    :class:`Capabilities`; a broadcast is a load and its address, a step has four instructions of its own. Rows that only the run counts
    are made in whole tiles: the mean over usual numbers decides."""
    usual = (m.attr,) if m.op == "const" else ROWS if m.op == "var" else tuple(r * r for r in ROWS)
    nn = n.attr if n.op == "const" else 256
    exact = exact and nn % lanes == 0
    best: tuple[float, int, int] | None = None
    for nr in range(width or 1, (width or 8) + 1):
        if nr > max(width, 1) and (nr - 1) * lanes >= nn:
            break
        if exact and nn % (nr * lanes):
            continue
        for mu in range(1, 29):
            if mu * nr + nr + 1 >= registers or mu > max(usual):
                break

            def step(rows: int, nr: int) -> float:
                fetched = rows + nr if shared else rows * nr + nr
                cycles = max(rows * nr / 2, fetched / 1.4, 5.0) + 0.1 * rows + 0.25 * nr
                return max(cycles, (rows * nr + fetched + rows + 4) / issue) if issue else cycles

            def strip(nr: int, mu: int = mu) -> float:
                if m.op == "const":
                    return m.attr // mu * step(mu, nr) + (step(m.attr % mu, nr) if m.attr % mu else 0.0)
                return sum(-(-r // mu) * step(mu, nr) / r for r in usual)

            panels, rest = divmod(nn, nr * lanes)
            c = panels * strip(nr) + (strip(-(-rest // lanes) if cut else nr) if rest else 0.0)
            c *= 1 + 0.01 * (mu == 1)
            if best is None or c < best[0] * 0.999:
                best = (c, mu, nr)
    assert best is not None
    return best[1], best[2]


# ---------------------------------------------------------------- rewriting towards a GEMM


def pad_input(s: Schedule, acc: str, caps: Capabilities) -> Schedule:
    """A masked (padded) load of the contraction becomes a plain load of a padded copy, made by a stage of its own."""
    st = s.stages[acc]
    for x in loads(st.expr):
        buf, idx, mask, other = load_parts(x)
        if mask is None or other is None or not is_const(other):
            continue
        box = [_extremes(st, i) for i in idx]
        if any(b is None for b in box) or not is_box(mask, buf, idx):
            continue
        base = [min(b[0], 0) for b in box if b is not None]
        shape = [b[1] - lo + 1 for b, lo in zip(box, base, strict=True) if b is not None]
        shape = [n if lo == 0 and prove(k <= n) else k for k, n, lo in zip(shape, buf.shape, base, strict=True)]
        ax = [axis(f"x{d}", n) for d, n in enumerate(shape)]
        src = [a.var + b for a, b in zip(ax, base, strict=True)]
        inside = const(0).eq(0)
        for i, n in zip(src, buf.shape, strict=True):
            inside = inside & (const(0) <= i) & (i < n)
        pb = replace(buf, name=f"{buf.name}.pad", shape=tuple(a.extent for a in ax), scope="global", writable=True)
        ext = dict(s.ext)
        pst = pull_stage(Pull(pb, tuple(ax), load(buf, src, inside, other)), ext)

        def repl(e: Expr, x: Expr = x, pb: Any = pb, idx: Any = idx, base: Any = base) -> Expr | None:
            return load(pb, [i - b for i, b in zip(idx, base, strict=True)]) if e is x else None

        stages = {pb.name: pst, **s.stages, acc: replace(st, expr=rewrite(st.expr, repl))}
        s = replace(s, stages=stages, ext=ext, trace=(*s.trace, ("pad", buf.name)))
        st = s.stages[acc]
    return s


def _extremes(st: Stage, i: Expr) -> tuple[int, Expr] | None:
    """The least value of an index over the stage's loops, a number, and the greatest, which may need extents of the run; None for
    an index that is not monotone in every loop."""
    low, high = bounds(i)
    if low is not None and high is not None:
        return low, const(high)
    last = {a.var: a.extent - 1 for a in (*st.axes, *(st.reduction.attr[1] if st.reduction is not None else ()))}
    if low is None or any(c < 0 or (m and (len(m) != 1 or m[0] not in last)) for m, c in linear(i).items() if m):
        return None
    return low, substitute(i, last)


def _flat_rows(s: Schedule, name: str) -> Schedule:
    """A padded copy whose innermost axis (channels) is not padded walks it together with the axis around it, so that few channels fill
    lanes as well. Before ``t[h, w < W, c < C] = x[h - 1, w - 1, c]``, after ``t[h, f < W * C] = x[h - 1, f - C]``."""
    st = s.stages[name]
    if st.expr.op != "load" or len(st.axes) < 2:
        return s
    src, idx, mask, other = load_parts(st.expr)
    *lead, w, c = st.axes
    by = idx[-2] - w.var
    if mask is None or idx[-1] is not c.var or c.extent is not src.shape[-1] or by.op != "const" or any({w.var, c.var} & free_vars(i) for i in idx[:-2]):
        return s
    f = axis(f"{w.name}{c.name}", w.extent * c.extent)
    wide = replace(src, shape=(*src.shape[:-2], src.shape[-2] * src.shape[-1]))
    at = (*idx[:-2], f.var + by * c.extent)
    inside = const(0).eq(0)
    for i, n in zip(at, wide.shape, strict=True):
        inside = inside & (const(0) <= i) & (i < n)
    ext = {k: v for k, v in s.ext.items() if k.attr[0].rsplit(".", 1)[0] != name}
    buf = replace(st.buf, shape=(*st.buf.shape[:-2], f.extent))
    return replace(s, stages={**s.stages, name: pull_stage(Pull(buf, (*lead, f), load(wide, at, inside, other)), ext)}, ext=ext, trace=(*s.trace, ("rows", name)))


def _local_padding(s: Schedule, acc: str, out: str, row: str, rest: list[str], nv: int, lanes: int, caps: Capabilities) -> tuple[Schedule, list[str], str | None]:
    """For a depthwise convolution, whose input is read once: the padded rows of one block of output rows and one panel of
    channels (all of them for bytes, and where an output channel reads another input channel than its own) are made in a local buffer,
    instead of a padded copy of the whole input in memory, unless one row's do not fit.

    Returns (schedule, loops between the panel and the tile, name of the padded tensor); the name is None when it stays outside."""
    st = s.stages[acc]
    pads = [x for x in loads(st.expr) if x.attr[0].name.endswith(".pad") and len(load_parts(x)[1]) == len(s.stages[x.attr[0].name].axes)]
    n = s.static_extent(next(lp.var for lp in s.stages[out].loops if lp.name == row))
    if len(pads) != 1 or n is None:
        return s, rest, None
    name = pads[0].attr[0].name
    shape = s.stages[name].axes
    if any(a.extent.op != "const" for a in shape) or len(shape) < 3:
        return s, rest, None
    rows_in = shape[-3].extent.attr
    itemsize = int(s.stages[name].buf.dtype.itemsize)
    own = itemsize > 1 and any(load_parts(pads[0])[1][-1] is a.var for a in st.axes)
    per_row = shape[-2].extent.attr * itemsize * (nv if own else shape[-1].extent.attr)
    size = max(1, min(n, (caps.l2 // 8 // per_row) * n // max(rows_in, 1)))
    fits = [k for k in range(1, size + 1) if n % k == 0 and (rows_in - (n - k) * (rows_in // n)) * per_row <= caps.local_bytes]
    if not fits:
        return s, rest, None
    s = split(s, row, fits[-1], into=(f"{out}.ro", f"{out}.ri"))
    return s, [f"{out}.ri" if x == row else x for x in rest], name


def is_box(mask: Expr, buf: Any, idx: Sequence[Expr]) -> bool:
    """True when ``mask`` says no more than that ``idx`` is inside ``buf`` (a transposed convolution's also asks for divisibility)."""
    if mask.op == "and":
        return all(is_box(m, buf, idx) for m in mask.args)
    return any(mask is c for i, n in zip(idx, buf.shape, strict=True) for c in (const(0) <= i, i < n))


def merge_rows(s: Schedule, names: list[str], allowed: list[Expr]) -> Schedule:
    """Adjacent row axes that every access of accumulator and epilogue walks as one become one axis."""
    stages = [s.stages[n] for n in names]
    rank = len(stages[0].axes)
    ok_pos = {i for i, a in enumerate(stages[0].axes) if a.var in allowed}
    k = rank - 2
    while k > 0:
        if k in ok_pos and k - 1 in ok_pos and all(_walks_as_one(st, k) for st in stages):
            stages = [_join_axes(st, k) for st in stages]  # the accumulator's buffer lost a dimension: the epilogue loads it so
            ok_pos = {i if i < k else i - 1 for i in ok_pos if i != k}
            s = replace(s, trace=(*s.trace, ("merge", names[0], k)))
        k -= 1
    return s if len(stages[0].axes) == rank else _with_stages(s, stages)


def merge_lanes(s: Schedule, names: list[str]) -> Schedule:
    """The innermost axes that every access of accumulator and epilogue walks as one become one: the pixels of a channels-first image under
    a kernel of one element."""
    stages = [s.stages[n] for n in names]
    rank = len(stages[0].axes)
    while len(stages[0].axes) > 1 and all(_walks_as_one(st, len(st.axes) - 1) for st in stages):
        stages = [_join_axes(st, len(st.axes) - 1) for st in stages]
    return s if len(stages[0].axes) == rank else replace(_with_stages(s, stages), trace=(*s.trace, ("merge_lanes", names[0])))


def _with_stages(s: Schedule, stages: Sequence[Stage]) -> Schedule:
    """The schedule with stages whose axes were joined, in their default loops."""
    names = {st.name for st in stages}
    ext = {k: e for k, e in s.ext.items() if k.attr[0].rsplit(".", 1)[0] not in names}
    new = {st.name: pull_stage(Pull(st.buf, st.axes, st.expr), ext) for st in stages}
    return replace(s, stages={**s.stages, **new}, ext=ext)


def _walks_as_one(st: Stage, k: int) -> bool:
    a, b = st.axes[k - 1], st.axes[k]
    for x in loads(st.expr):
        buf, idx, m, _ = load_parts(x)
        if m is not None:
            return False
        e = flat(buf, idx)
        da, db = stride(e, a.var), stride(e, b.var)
        if da is None or db is None or (da is not db * b.extent and not is_const(b.extent, 1)):
            return False
    return vars_outside_loads(st.expr).isdisjoint((a.var, b.var))


def _join_axes(st: Stage, k: int) -> Stage:
    a, b = st.axes[k - 1], st.axes[k]
    f = axis(f"_u{a.name.lstrip('_u')}{b.name.lstrip('_u')}", a.extent * b.extent)
    env = {a.var: f.var, b.var: const(0)} if is_const(b.extent, 1) else {a.var: const(0), b.var: f.var}

    def view(x: Expr) -> Expr | None:
        if x.op != "load":
            return None
        lb, idx, m, o = load_parts(x)
        if not any(free_vars(i) & env.keys() for i in idx):
            return None
        fb = replace(lb, shape=(lb.size(),))
        return load(fb, (substitute(flat(lb, idx), env),), m, o)

    axes = (*st.axes[: k - 1], f, *st.axes[k + 1 :])
    buf = replace(st.buf, shape=tuple(x.extent for x in axes))

    def own(x: Expr) -> Expr | None:  # the epilogue's load of the accumulator keeps one index per axis
        if x.op == "load" and x.attr[0].name != st.name and x.attr[0].scope == "global" and x.attr[0].rank == len(st.axes):
            lb, idx, m, o = load_parts(x)
            if all(i is y.var for i, y in zip(idx, st.axes, strict=True)):
                nb = replace(lb, shape=buf.shape)
                return load(nb, [y.var for y in axes])
        return None

    e = _rewrite_loads(st.expr, own, view)
    return replace(st, buf=buf, axes=axes, expr=e)


def _rewrite_loads(e: Expr, own: Any, view: Any) -> Expr:
    def f(x: Expr) -> Expr | None:
        r = own(x)
        return view(x) if r is None else r

    return rewrite(e, f)


def _merge_reduce(s: Schedule, acc: str) -> Schedule:
    """Adjacent reduction axes that both factors walk as one become one (kw and ic of an unpadded row, for instance)."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    new_axes, e = split_reduced_axes(red.attr[1], red.args[0])
    axes = list(new_axes)
    k = len(axes) - 1
    apart = vars_outside_loads(e)
    while k > 0:
        a, b = axes[k - 1], axes[k]
        good = apart.isdisjoint((a.var, b.var))
        for x in loads(e):
            buf, idx, m, _ = load_parts(x)
            f = flat(buf, idx)
            da, db = stride(f, a.var), stride(f, b.var)
            good = good and m is None and da is not None and db is not None and (da is db * b.extent or is_const(b.extent, 1))
        if good:
            j = axis(f"{a.name}{b.name}", a.extent * b.extent)
            env = {a.var: j.var, b.var: const(0)} if is_const(b.extent, 1) else {a.var: const(0), b.var: j.var}

            def view(x: Expr, env: Any = env) -> Expr | None:
                if x.op != "load":
                    return None
                lb, idx, m, o = load_parts(x)
                if not any(free_vars(i) & env.keys() for i in idx):
                    return None
                return load(replace(lb, shape=(lb.size(),)), (substitute(flat(lb, idx), env),), m, o)

            e = rewrite(e, view)
            axes[k - 1 : k + 1] = [j]
        k -= 1
    if e is red.args[0]:
        return s
    ext = {k2: v2 for k2, v2 in s.ext.items() if k2.attr[0].rsplit(".", 1)[0] != acc}
    st2 = pull_stage(Pull(st.buf, st.axes, reduce_("sum", axes, e)), ext)
    return replace(s, stages={**s.stages, acc: st2}, ext=ext, trace=(*s.trace, ("merge_reduce", acc)))


# ---------------------------------------------------------------- packing and tiling


def _whole_parameter(p: Expr, v: Expr) -> tuple[Any, tuple[Expr, ...]] | None:
    """The one parameter that P reads along ``v`` and its index, if that dimension is indexed by v alone."""
    ls = [x for x in loads(p) if v in free_vars(x)]
    if len(ls) != 1:
        return None
    buf, idx, m, _ = load_parts(ls[0])
    if m is not None or buf.scope != "param" or sum(i is v for i in idx) != 1 or sum(v in free_vars(i) for i in idx) != 1:
        return None
    return None if any(i.op not in ("var", "const") for i in idx) else (buf, idx)


def is_packable(s: Schedule, p: Expr, v: Expr, constants: Mapping[str, Any]) -> bool:
    """P reads one parameter whose dimension along ``v`` is indexed by v alone, and either it is constant or its lanes are strided."""
    found = _whole_parameter(p, v)
    if found is None:
        return False
    buf, idx = found
    if buf.name in constants:
        return True
    d = stride(flat(buf, idx), v)
    return d is None or not is_const(d, 1)


LINE = 64  # bytes of a cache line
BLOCKS = 8  # blocks of rows that threads can share evenly
REUSE = 64  # rows that pay for a copy of the other factor


def _wastes_lines(s: Schedule, p: Expr, v: Expr, m: Expr, nv: int, caps: Capabilities) -> bool:
    """The strip of P that a tile reads in every step is narrower than a cache line, and P is large and read often: a copy in panels
    costs less than fetching every line several times."""
    found = _whole_parameter(p, v)
    if found is None or m.op != "const" or m.attr < REUSE:
        return False
    size = found[0].size()
    bytes_ = found[0].dtype.bits // 8
    return nv * bytes_ < LINE and size.op == "const" and size.attr * bytes_ > caps.l1


def _stream_panel(m: Expr, n: Expr, lanes: int, packs: bool, caps: Capabilities) -> int:
    """Columns of a panel when a single row walks ``caps.streams`` panels of a constant factor at once, 0 when it walks one."""
    if caps.streams < 2 or not packs or not is_const(m, 1) or n.op != "const":
        return 0
    return next((w for w in (2 * lanes, lanes) if n.attr % (w * caps.streams) == 0 and w // lanes * caps.streams + 2 < caps.registers), 0)


def pack_panel(s: Schedule, acc: str, p: Expr, v: Expr, nv: int) -> tuple[Schedule, bool]:
    x = next(x for x in loads(p) if v in free_vars(x))
    buf, idx, _, _ = load_parts(x)
    d = next(k for k, i in enumerate(idx) if i is v)
    red = s.stages[acc].reduction
    assert red is not None
    rank = {a.var: n for n, a in enumerate(red.attr[1])}
    batch = [k for k, i in enumerate(idx) if k != d and i not in rank]
    inner = sorted((k for k, i in enumerate(idx) if i in rank), key=lambda k: rank[idx[k]])
    s = pack(s, buf.name, (*batch, d, *inner), {d: nv})
    return s, all(v not in free_vars(y) or y.attr[0].name == f"{buf.name}.pack" for y in loads(s.stages[acc].expr))


def register_tile(
    s: Schedule, acc: str, out: str, v_axis: Expr, us: list[Axis], mu: int, nv: int, lanes: int, ku: int, caps: Capabilities, padded: bool, depthwise: bool,
    mblock: int | None, order: str | None, panel: int = 0,
) -> Schedule:
    """``panel``: columns that stand together in memory where they are fewer than ``nv`` (0: ``nv``); ``mblock``: rows that all panels
    walk before the next rows come, at most (0: all rows)."""
    o = s.stages[out]
    names = [lp.name for lp in o.loops]
    upos = [i for i, a in enumerate(s.stages[acc].axes) if a.var in {u.var for u in us}]
    vpos = next(i for i, a in enumerate(s.stages[acc].axes) if a.var is v_axis)
    v = names[vpos]
    n = s.static_extent(o.loops[vpos].var)
    outer = [x for i, x in enumerate(names) if i not in upos and i != vpos]
    s = split(s, v, nv, "cut" if n is not None and not padded and not outer and len(upos) == 1 else "guard", into=(f"{out}.vo", f"{out}.vi"))
    rows = [names[i] for i in upos]
    tail_rows: list[str] = []
    blocks: list[str] = []
    weights = _bytes(s, acc)
    panels_outer = order == "panels" if order else not depthwise and (weights is None or weights > caps.l2 // 2)
    if rows:
        u = rows.pop()
        m = s.static_extent(s.stages[out].loops[s.stages[out].find(u)].var)
        size = _row_block(m, mu, mblock) if mblock and not rows and not panels_outer and n is not None and n > nv else 0
        if size:
            s = split(s, u, size, into=(f"{out}.ub", f"{out}.ur"))
            u, blocks = f"{out}.ur", [f"{out}.ub"]
        s = split(s, u, mu, "cut" if m is not None else "guard", into=(f"{out}.uo", f"{out}.ui"))
        s = annotate(s, f"{out}.ui", "unroll")
        tail_rows = [f"{out}.uo", f"{out}.ui"]
    padding: str | None = None
    if depthwise and rows:
        s, rows, padding = _local_padding(s, acc, out, rows[-1], rows, nv, lanes, caps)
    at = f"{out}.uo" if tail_rows else f"{out}.vo"
    whole = padding is not None and s.stages[padding].buf.dtype.bits == 8
    if padding is not None and whole:
        inner = [f"{out}.vo", f"{out}.uo"] if _window(s, acc, padding) <= caps.l1 * 3 // 4 else [f"{out}.uo", f"{out}.vo"]
        seq = [*outer, *rows[:-1], f"{out}.ro", rows[-1], *inner, f"{out}.ui", f"{out}.vi"]
        par = [*outer, *rows[:-1], f"{out}.ro"]
        at = inner[1]
    elif padding is not None:
        seq = [*outer, *rows[:-1], f"{out}.ro", f"{out}.vo", rows[-1], *tail_rows, f"{out}.vi"]
        par = [*outer, *rows[:-1], f"{out}.ro", f"{out}.vo"]
    elif panels_outer:
        seq = [*outer, f"{out}.vo", *rows, *tail_rows, f"{out}.vi"]
        par = [*outer, f"{out}.vo"]
    else:
        seq = [*outer, *rows, *blocks, f"{out}.vo", *tail_rows, f"{out}.vi"]
        par = [*outer, *rows, *(blocks or [f"{out}.vo"])]
    s = reorder(s, *seq)
    if len(par) == 1 and n is not None and n <= nv and not rows and f"{out}.uo" in seq:
        m = s.static_extent(s.stages[out].loops[s.stages[out].find(f"{out}.uo")].var)
        if m is None or m > 2:  # one panel only: share the rows out
            s = reorder(s, f"{out}.uo", f"{out}.vo")
            par = [f"{out}.uo"]
    if par == [f"{out}.uo"]:
        at = f"{out}.vo"
    while len(par) > 1:
        s = fuse(s, par[0], par[1])
        f = s.stages[out].loops[0].name
        if at == par[1]:
            at = f
        par = [f, *par[2:]]
    if par:
        s = annotate(s, par[0], "parallel")
    s = unroll_lanes(s, f"{out}.vi", nv, lanes, panel)
    if padding is not None:
        s = stage(s, padding, at=par[0])
        last = s.stages[padding].loops[-1].name
        if whole:
            s = split(s, last, 4 * lanes if s.static_extent(s.stages[padding].loops[-1].var) % (4 * lanes) == 0 else 2 * lanes, "cut")  # type: ignore[operator]
            s = annotate(s, f"{last}.1", "vectorize")
        else:
            s = unroll_lanes(s, last, nv, lanes)
    s = stage(s, acc, at=at, pad=(vpos,) if padded else ())
    a = s.stages[acc]
    reds = [lp.name for lp in a.loops if lp.reduce]
    vl = a.loops[vpos].name
    ul = [lp.name for lp in a.loops[: len(a.axes)]]
    s = reorder(s, *[x for i, x in enumerate(ul) if i not in upos[-1:] and i != vpos], *reds, *[x for i, x in enumerate(ul) if i in upos[-1:]], vl)
    s = unroll_lanes(s, vl, nv, lanes, panel)
    if upos:
        s = annotate(s, ul[upos[-1]], "unroll")
    small = 1
    for r in reversed(reds):
        k = s.static_extent(next(lp.var for lp in a.loops if lp.name == r))
        if k is not None and small * k <= (9 if depthwise else ku):
            s = annotate(s, r, "unroll")
            small *= k
        else:
            if k is not None and r == reds[-1] and ku > 1 and k % ku == 0 and k > ku:
                s = split(s, r, ku)
                s = annotate(s, f"{r}.1", "unroll")
            break
    return s


def _window(s: Schedule, acc: str, padding: str) -> int:
    """Bytes of the padded rows that one output row of a depthwise convolution reads."""
    red = s.stages[acc].reduction
    assert red is not None
    shape = s.stages[padding].axes
    return int(red.attr[1][0].extent.attr * shape[-2].extent.attr * shape[-1].extent.attr)


def _row_block(m: int | None, mu: int, most: int) -> int:
    """Rows of a block: a divisor of ``m``, at most ``most`` and such that threads can share the blocks, that leaves few rows over after
    tiles of ``mu``; 0 for none."""
    if m is None:
        return 0
    sizes = [b for b in range(max(mu, most // 4), min(most, m // BLOCKS) + 1) if m % b == 0]
    return min(sizes, key=lambda b: (1 + 0.1 * (mu - b % mu) * (b % mu) / b if b % mu else 1.0) + 2 / b, default=0)


def unroll_lanes(s: Schedule, loop: str, width: int, lanes: int, panel: int = 0) -> Schedule:
    """A loop over ``width`` columns becomes unrolled vectors of ``lanes``, by panels of ``panel`` columns when that is not 0."""
    if panel and panel < width:
        s = split(s, loop, panel)
        s = annotate(s, f"{loop}.0", "unroll")
        loop, width = f"{loop}.1", panel
    if width > lanes:
        s = split(s, loop, lanes)
        s = annotate(s, f"{loop}.0", "unroll")
        loop = f"{loop}.1"
    return annotate(s, loop, "vectorize")


def _bytes(s: Schedule, acc: str) -> int | None:
    """Bytes of the packed factor, when static."""
    for x in loads(s.stages[acc].expr):
        b = x.attr[0]
        if b.name.endswith(".pack"):
            n = b.size()
            return int(n.attr * b.dtype.itemsize) if n.op == "const" else None
    return None
