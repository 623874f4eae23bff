"""GPU template for contractions: matrix products and convolutions of any kind as one tiled product.

``acc[b, m, n] = sum over k of A[b, k, m] * B[b, k, n]`` with an elementwise epilogue. The output axes that only one factor has are
``m``, those that only the other one has are ``n``; all reduction axes are one axis ``k``, padded with zeros to whole tiles. A and B
are whatever expressions the factors are (a padded image, dequantized weights): as tensors of their own they are staged into
shared memory, tile by tile, each element computed once a group. A thread keeps a register tile of vectors that are a stride of
threads apart, so that shared memory and the output are walked by neighbouring threads side by side, a vector each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Pull, axis, reduce_
from luthier.ir.dtypes import DType, f32, u16
from luthier.ir.expr import (
    UNARY,
    Expr,
    bitcast,
    cast,
    const,
    free_vars,
    is_const,
    load,
    load_parts,
    loads,
    rewrite,
    select,
    substitute,
    walk,
)
from luthier.ir.loop import Buffer
from luthier.passes.gpu.use_matrix import MMA
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule, Stage, annotate, inline, pull_stage, reorder, split, stage
from luthier.schedules.cpu.contract import accumulator_of, split_epilogue
from luthier.schedules.cpu.elementwise import flat, stride
from luthier.schedules.cpu.rowwise import positions
from luthier.schedules.gpu.elementwise import LANES, fuse_all, whole
from luthier.schedules.lowbit.packed_words import factors, pack_words

ROWS = 8  # threads of a group in each direction
WARPS = 4  # of a group whose products are matrix instructions, no more; 8 by 4 threads each
FEW_ROWS = 4  # up to so many rows of output the product is one of a matrix and a vector
STEP = 16  # tile of the reduction
SHORT = 24  # nodes of an epilogue that is written out for every element of the register tile


KNOBS = (
    Knob("tm", "rows of a thread's register tile", (4, 8), group="tile"),
    Knob("tn", "columns of a thread's register tile", (4, 8), group="tile"),
    Knob("step", "of the reduction that is staged in shared memory at once", (8, 16, 32)),
)


def apply(
    s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, tm: int | None = None, tn: int | None = None, step: int | None = None,
) -> Schedule | None:
    """``tm``, ``tn``: rows and columns of a thread's register tile; ``step``: reduction steps between two barriers."""
    parts = sum_of_products(s, caps)
    if parts is None:
        return None
    s, acc, out = parts
    kinds = _classify(s.stages[acc])
    if kinds is None:
        return None
    us, vs = kinds
    rows, cols = _product(s, acc, us), _product(s, acc, vs)
    if min(rows or 1 << 20, cols or 1 << 20) <= FEW_ROWS:
        return None
    length = _reduced(s, acc)
    if length is not None and length < 8:
        return None
    half = _halves(s.stages[acc]) if "mma" in caps.features and min(rows or 1 << 20, cols or 1 << 20) >= 16 and (length or 1 << 20) >= 16 else None
    if half is not None:
        s, m, n = _normal_form(s, acc, out, us, vs, 32, half)
        warps = next((w for w in (1, 2) if (rows or 512) <= 16 * w), WARPS)
        return _tile(s, acc, out, m, n, 2 if (rows or 512) <= 96 else 4, 8 if (cols or 512) <= 32 else 16, 32, caps, warps)
    s = pack_words(s, acc, out, caps, constants)
    auto_m, auto_n = tile(rows, cols, _product(s, acc, [i for i in range(len(s.stages[acc].axes)) if i not in (*us, *vs)]))
    tm, tn = tm or auto_m, tn or auto_n
    step = step or _step(tm, tn, _reduced(s, acc))
    s, m, n = _normal_form(s, acc, out, us, vs, step)
    return _tile(s, acc, out, m, n, tm, tn, step, caps)


def sum_of_products(s: Schedule, caps: Capabilities) -> tuple[Schedule, str, str] | None:
    """(the schedule with nothing but a sum of products and what reads it, their names), or None."""
    if not caps.gpu or len(s.compute.outs) != 1 or any(st.push or st.fold or st.at is not None for st in s.stages.values()):
        return None
    out = s.compute.outs[0]
    acc = accumulator_of(s)
    if acc is None or list(s.stages)[-1] != out:
        return None
    for n in [n for n in s.stages if n not in (out, acc)]:
        if s.stages[n].reduction is not None:
            return None
        s = inline(s, n)
    if accumulator_of(s) != acc:
        return None
    if acc != out:
        pos = positions(s, out)
        if pos is None or pos[acc] != list(range(len(s.stages[out].axes))):
            return None
    else:
        s, acc = split_epilogue(s, out)
    return s, acc, out


def _halves(st: Stage) -> DType | None:
    """The 16-bit float type whose elements a sum in f32 multiplies, or None."""
    kinds = {f.args[0].dtype if f.op == "cast" and f.dtype is f32 else None for f in factors(st)}
    red = st.reduction
    assert red is not None
    return kinds.pop() if len(kinds) == 1 and kinds <= MMA.keys() and red.args[0].op == "mul" and len(red.args) == 1 else None


def _step(tm: int, tn: int, length: int | None) -> int:
    """Smaller tiles are deeper, so that filling them keeps all threads busy, unless that would add many zeros."""
    if tm * tn >= 64 or length is None or 0 < length % (2 * STEP) <= STEP:
        return STEP
    return 2 * STEP


def tile(rows: int | None, cols: int | None, batch: int | None) -> tuple[int, int]:
    """Register tile: 8 by 8 where the groups of that size still fill a large GPU (about a hundred), else smaller ones."""
    r, c, b = rows or 512, cols or 512, batch or 4
    for tm, tn in ((8, 8), (8, 4), (4, 4)):
        if -(-r // (ROWS * tm)) * -(-c // (ROWS * tn)) * b >= 96:
            return _fit(tm, r), _fit(tn, c)
    return _fit(4, r), _fit(4, c)


def _fit(t: int, extent: int) -> int:
    """No more rows than there are."""
    while t > 1 and ROWS * t // 2 >= extent:
        t //= 2
    return t


def _classify(st: Stage) -> tuple[list[int], list[int]] | None:
    """Positions of the axes that only the first, and only the second factor has: each a run of neighbours. None when one has none."""
    p, q = factors(st)
    fp, fq = free_vars(p), free_vars(q)
    only_p = [i for i, a in enumerate(st.axes) if a.var in fp and a.var not in fq and not is_const(a.extent, 1)]
    only_q = [i for i, a in enumerate(st.axes) if a.var in fq and a.var not in fp and not is_const(a.extent, 1)]
    if not only_p or not only_q:
        return None
    us, vs = (only_p, only_q) if only_p[-1] < only_q[-1] else (only_q, only_p)
    return _run(us), _run(vs)


def _run(axes: list[int]) -> list[int]:
    """The last run of neighbouring positions; axes before it are walked as batches."""
    k = len(axes) - 1
    while k > 0 and axes[k - 1] == axes[k] - 1:
        k -= 1
    return axes[k:]


def _product(s: Schedule, name: str, axes: Sequence[int]) -> int | None:
    n = 1
    for i in axes:
        e = s.stages[name].axes[i].extent
        if e.op != "const":
            return None
        n *= int(e.attr)
    return n


def _reduced(s: Schedule, acc: str) -> int | None:
    red = s.stages[acc].reduction
    assert red is not None
    ext = [a.extent for a in red.attr[1]]
    return math.prod(int(e.attr) for e in ext) if all(e.op == "const" for e in ext) else None


# ---------------------------------------------------------------- the normal form


def _normal_form(s: Schedule, acc: str, out: str, us: list[int], vs: list[int], step: int, half: DType | None = None) -> tuple[Schedule, int, int]:
    """Runs of axes become one axis in accumulator and output, the reduction axes become one, the factors become tensors ``acc.A`` and
    ``acc.B``, of their bits where they are ``half``. Returns the positions of m and n."""
    stages = {acc: s.stages[acc], out: s.stages[out]}
    for run in sorted((us, vs), key=lambda r: -r[0]):
        for _ in range(len(run) - 1):
            stages = {k: _merge(st, run[0]) for k, st in stages.items()}
    a_st, o_st = stages[acc], stages[out]
    o_st = replace(o_st, expr=rewrite(o_st.expr, lambda e: load(replace(a_st.buf, scope=e.attr[0].scope), [a.var for a in o_st.axes]) if e.op == "load" and e.attr[0].name == acc else None))
    first, second = (us, vs) if us[0] < vs[0] else (vs, us)
    lo = first[0]
    hi = second[0] - (len(first) - 1)
    m, n = (lo, hi) if first is us else (hi, lo)
    red = a_st.reduction
    assert red is not None
    total = const(1)
    for a in red.attr[1]:
        total = total * a.extent
    padded = (total + (step - 1)) // step * step
    k = axis("k", padded)
    env: dict[Expr, Expr] = {}
    inner = const(1)
    for j, a in reversed(list(enumerate(red.attr[1]))):
        x = k.var // inner if not is_const(inner, 1) else k.var
        env[a.var] = x % a.extent if j else x
        inner = inner * a.extent
    p, q = factors(a_st)
    inside = None if padded is total else k.var < total
    new: dict[str, Stage] = {}
    ext = {key: v for key, v in s.ext.items() if key.attr[0].rsplit(".", 1)[0] not in (acc, out)}
    value = red.args[0]
    for tag, f in (("A", p), ("B", q)):
        own = [a for a in a_st.axes if a.var in free_vars(f)]
        x = substitute(f if half is None else bitcast(f.args[0], u16), env)
        if inside is not None:
            x = select(inside, guard_loads(x, inside), const(0, x.dtype))
        ax = [axis(f"{a.name}{tag.lower()}", a.extent) for a in own]
        ka = axis(f"k{tag.lower()}", padded)
        x = substitute(x, {k.var: ka.var, **{a.var: b.var for a, b in zip(own, ax, strict=True)}})
        buf = Buffer(f"{acc}.{tag}", x.dtype, (padded, *(a.extent for a in ax)), "shared")
        new[buf.name] = pull_stage(Pull(buf, (ka, *ax), x), ext)
        ld = load(buf, [k.var, *(a.var for a in own)])
        value = _replace_once(value, f, ld if half is None else cast(bitcast(ld, half), f32))
    if len(red.args) > 1:  # a condition of the reduction: only over axes that the factors carry
        value = select(substitute(red.args[1], env), value, const(0, value.dtype))
    a_st = pull_stage(Pull(a_st.buf, a_st.axes, reduce_("sum", [k], value)), ext)
    o_st = pull_stage(Pull(o_st.buf, o_st.axes, o_st.expr), ext)
    stages = {**new, acc: a_st, out: o_st}
    return replace(s, stages=stages, ext=ext, trace=(*s.trace, ("product", acc))), m, n


def guard_loads(e: Expr, cond: Expr) -> Expr:
    def f(x: Expr) -> Expr | None:
        if x.op == "load":
            buf, idx, m, o = load_parts(x)
            return load(buf, idx, cond if m is None else m & cond, o)
        return None

    return rewrite(e, f)


def _replace_once(e: Expr, old: Expr, new: Expr) -> Expr:
    return rewrite(e, lambda x: new if x is old else None)


def _merge(st: Stage, i: int) -> Stage:
    """Axes ``i`` and ``i + 1`` as one; accesses that walk both as one stay plain, others get a division and a remainder."""
    a, b = st.axes[i], st.axes[i + 1]
    f = axis(f"{a.name}{b.name}", a.extent * b.extent)
    one = is_const(b.extent, 1)
    walk_env: dict[Expr, Expr] = {a.var: f.var, b.var: const(0)} if one else {a.var: const(0), b.var: f.var}
    apart: dict[Expr, Expr] = {a.var: f.var // b.extent, b.var: f.var % b.extent}

    def view(x: Expr) -> Expr | None:
        if x.op != "load" or x.attr[0].name == st.name:
            return None
        lb, idx, mask, _ = load_parts(x)
        if mask is not None or not any(free_vars(j) & walk_env.keys() for j in idx):
            return None
        e = flat(lb, idx)
        da, db = stride(e, a.var), stride(e, b.var)
        if da is None or db is None or (not one and da is not db * b.extent):
            return None
        return load(replace(lb, shape=(lb.size(),)), (substitute(e, walk_env),))

    expr = substitute(rewrite(st.expr, view), apart)
    axes = (*st.axes[:i], f, *st.axes[i + 2 :])
    buf = replace(st.buf, shape=tuple(x.extent for x in axes))
    return replace(st, buf=buf, axes=axes, expr=expr)


# ---------------------------------------------------------------- tiling


def _tile(s: Schedule, acc: str, out: str, m: int, n: int, tm: int, tn: int, step: int, caps: Capabilities, warps: int = 0) -> Schedule:
    """``warps``: of a group, whose threads and register tiles are as matrix instructions want them (:data:`luthier.passes.gpu.use_matrix.MMA`)."""
    group = (8 * warps, 4) if warps else (ROWS, ROWS)
    names = [lp.name for lp in s.stages[out].loops]
    fill = [LANES if t % LANES == 0 else 1 for t in (tm, tn)]
    vm, vn = (1, 2) if warps else fill
    s = _turns(split(s, names[m], group[0] * tm, into=(f"{out}.mo", f"{out}.mi")), f"{out}.mi", f"{out}.m", group[0], vm)
    s = _turns(split(s, names[n], group[1] * tn, into=(f"{out}.no", f"{out}.ni")), f"{out}.ni", f"{out}.n", group[1], vn)
    outer = [x for i, x in enumerate(names) if i not in (m, n)]
    s = reorder(s, *outer, *(f"{out}.{x}" for x in ("mo", "no", "mt", "nt", "mr", "mv", "nr", "nv")))
    if outer:
        s, batch = fuse_all(s, outer)
        s = annotate(s, batch, "block.z")
    for loop, kind in (("mo", "block.y"), ("no", "block.x"), ("mt", "thread.y"), ("nt", "thread.x"), ("nv", "vectorize")):
        s = annotate(s, f"{out}.{loop}", kind)
    nodes = list(walk(s.stages[out].expr))
    if len(nodes) <= SHORT and all(e.op not in UNARY or e.op in caps.native for e in nodes):  # else a loop, so that its text stays short
        for loop in ("mr", "mv", "nr"):
            s = annotate(s, f"{out}.{loop}", "unroll")
    s = stage(s, acc, at=f"{out}.no", pad=(m, n))
    a = s.stages[acc]
    loops = [lp.name for lp in a.loops if not lp.reduce]
    k = next(lp.name for lp in a.loops if lp.reduce)
    s = _turns(s, loops[m], f"{acc}.m", group[0], vm)
    s = _turns(s, loops[n], f"{acc}.n", group[1], vn)
    s = split(s, k, step, into=(f"{acc}.ko", f"{acc}.ki"))
    rest = [x for i, x in enumerate(loops) if i not in (m, n)]
    s = reorder(s, *rest, *(f"{acc}.{x}" for x in ("ko", "mt", "nt", "ki", "mr", "mv", "nr", "nv")))
    for loop, kind in (("mt", "thread.y"), ("nt", "thread.x"), ("mr", "unroll"), ("mv", "unroll"), ("nr", "unroll"), ("nv", "vectorize"), ("ki", "matrix" if warps else "serial")):
        s = annotate(s, f"{acc}.{loop}", kind)
    for x in [x for x in loads(a.expr) if x.attr[0].name in (f"{acc}.A", f"{acc}.B")]:
        last = load_parts(x)[1][-1]
        s = _fill(s, x.attr[0].name, f"{acc}.ko", group, fill[0] if last is a.axes[m].var else fill[1] if last is a.axes[n].var else 1)
    return s


def _turns(s: Schedule, loop: str, base: str, threads: int, v: int) -> Schedule:
    """``loop`` is shared out to ``threads`` ``t`` that take turns ``r``, with ``v`` neighbours each."""
    s = split(s, loop, threads * v, into=(f"{base}r", f"{base}x"))
    return split(s, f"{base}x", v, into=(f"{base}t", f"{base}v"))


def _fill(s: Schedule, name: str, at: str, group: tuple[int, int], v: int) -> Schedule:
    """A tile is filled by all threads, neighbours side by side along the axis that memory walks; it is stored in vectors of ``v``."""
    st = s.stages[name]
    s = stage(s, name, at=at, scope="shared")
    loops = [lp.name for lp in st.loops]
    last = st.axes[-1]
    along = [stride(flat(*load_parts(x)[:2]), last.var) for x in loads(st.expr) if last.var in free_vars(x)]
    inner: list[str] = []
    if not any(d is not None and is_const(d, 1) for d in along):  # memory walks k: it is the inner loop
        s = reorder(s, *loops[1:], loops[0])
        loops = [*loops[1:], loops[0]]
        if v > 1:  # a square of elements a thread: loads go along k, stores along the other axis
            across, k = loops[-2:]
            s = split(split(s, across, v), k, v)
            loops, inner = [*loops[:-2], f"{across}.0", f"{k}.0"], [f"{k}.1", f"{across}.1"]
            s = annotate(s, inner[0], "unroll")
    elif v > 1:
        s = split(s, loops[-1], v)
        loops, inner = [*loops[:-1], f"{loops[-1]}.0"], [f"{loops[-1]}.1"]
    if inner:
        s = reorder(s, *loops, *inner)
        s = annotate(s, inner[-1], "vectorize" if whole(last.extent) else "unroll")
    s, loop = fuse_all(s, loops)
    s = split(s, loop, group[0] * group[1])
    s = split(s, f"{loop}.1", group[1])
    s = annotate(s, f"{loop}.1.0", "thread.y")
    return annotate(s, f"{loop}.1.1", "thread.x")
