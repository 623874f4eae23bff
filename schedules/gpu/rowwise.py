"""GPU template for softmax, normalisations, reductions and matrix-vector products: a group of threads for each row.

``out[r, c] = f(x[r, c], m[r], ...)`` with ``m[r] = reduce over c``: rows are the grid. The threads of a group walk a row in
steps, so that neighbours read neighbours; each keeps a partial result, and the partial results meet in shared memory, from where
each subgroup sums all of them (two steps where there are no subgroups, a square root of the group's size each). Intermediate rows
stay in shared memory when they fit, else they are computed again where they are read. Rows of whole vectors are walked four
neighbours a step. Rows that are short get one thread each, and so do rows that run across memory where they are many: neighbours of a
thread are neighbours in memory then.

Few rows that are long are reduced in two kernels: groups reduce parts of a row each, then a group merges what they found. So no
thread of a sum over everything has more than some hundred rounds, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from luthier.ir.compute import MONOIDS, Axis
from luthier.ir.dtypes import f32, i32, i64, u32
from luthier.ir.expr import Expr, as_expr, free_vars, is_const, loads, var, walk
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.reduction import contiguity
from luthier.schedules.base.schedule import Loop, Schedule, Stage, annotate, in_runs, inline, reorder, split, stage
from luthier.schedules.cpu.rowwise import contractions, positions
from luthier.schedules.gpu.elementwise import ENOUGH, LANES, THREADS, fuse_all, points, side_by_side, whole

SHORT = 32  # elements that one thread reduces by itself
ROW_SHARE = 4  # rows kept in shared memory use at most one part in so many of it each
FEW = 32  # rows up to which their groups alone do not fill a machine
LONG = 1 << 15  # elements of a row from which on it is reduced in parts, when rows are few or have one thread each
PARTS = 64  # of a row, about
PART = 1 << 12  # elements of a part, at least
UNKNOWN = 1 << 20  # what an extent that only the run knows is taken for


KNOBS = (Knob("threads", "of a group", (32, 64, 128, 256)),)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, threads: int | None = None) -> Schedule | None:
    if not caps.gpu or len(s.compute.outs) != 1 or any(st.push or st.fold or st.at is not None for st in s.stages.values()):
        return None
    out = s.stages[s.compute.outs[0]]
    if list(s.stages)[-1] != out.name or not any(st.reduction is not None for st in s.stages.values()):
        return None
    s = in_runs(s)
    if out.reduction is not None:
        return _root(s, caps, threads) if len(s.stages) == 1 else None
    pos = positions(s, out.name)
    if pos is None or contractions(s) > 1:
        return None
    reductions = [n for n in pos if s.stages[n].reduction is not None]
    rows = sorted({p for n in reductions for p in pos[n] if p is not None})
    for n in reductions:  # a reduction over fewer axes than its reader's rows would be done again for each of them
        if any(i not in pos[n] and not is_const(out.axes[i].extent, 1) for i in rows):
            return None
    free_axes = [i for i in range(len(out.axes)) if i not in rows]
    count = _count([out.axes[i].extent for i in rows])
    if any(_long(s.stages[n]) for n in reductions) and count <= FEW:
        if len(reductions) > 1:
            return None  # each in parts, by itself
        s = _in_parts(s, reductions[0], caps, threads)
        pos = {n: m for n, m in pos.items() if n in s.stages}
    for n in [n for n, m in pos.items() if s.stages[n].reduction is None and any(p in free_axes for p in m if p is not None)]:
        s = inline(s, n)
        del pos[n]
    across = rows[-1:] == [len(out.axes) - 1] and not is_const(out.axes[-1].extent, 1) and not any(_along(s.stages[n]) for n in reductions)
    longest = max(_length(s, n) for n in reductions)
    limit = caps.shared_bytes // ROW_SHARE
    if across and (longest <= SHORT or (longest <= PART and _count([out.axes[i].extent for i in rows], 1) >= ENOUGH)):
        limit = 0
    for n in list(pos):
        st = s.stages[n]
        size = st.buf.dtype.itemsize
        free = [a for a, p in zip(st.axes, pos[n], strict=True) if p is None]
        for a in free:
            size = size * a.extent.attr if a.extent.op == "const" and size >= 0 else -1
        if free and (not 0 <= size <= limit or st.buf.dtype.bits < 32):
            if st.reduction is not None:
                return None
            s = inline(s, n)
    inner = [n for n in pos if n in s.stages]
    named = [lp.name for lp in s.stages[out.name].loops]
    if rows != list(range(len(rows))):
        s = reorder(s, *(named[i] for i in (*rows, *free_axes)))
    s, row = _row(s, out.name, [named[i] for i in rows])
    if (longest <= SHORT or limit == 0) and rows and not any(p is None for n in inner for p in pos[n]):
        return _thread_per_row(s, inner, row)
    size = threads or _threads(longest, caps)
    s = annotate(s, row, "block.x")
    for n in inner:
        s = stage(s, n, at=row, scope="shared")
    for n in inner:
        if s.stages[n].reduction is not None:
            s = _reduce(s, n, row, size)
        else:
            s = _across(s, n, [i for i, p in enumerate(pos[n]) if p is None], size)
    return _across(s, out.name, free_axes, size)


def _count(extents: Iterable[Expr], unknown: int = UNKNOWN) -> int:
    """How many points there are; ``unknown`` stands for an extent that only the run knows."""
    n = 1
    for e in extents:
        n = n * (e.attr if e.op == "const" else unknown)
    return n


def _row(s: Schedule, name: str, loops: list[str]) -> tuple[Schedule, str]:
    """One loop over the rows of a tensor. A tensor that is a single row gets a loop of one round, the group that computes it."""
    if loops:
        return fuse_all(s, loops)
    st = s.stages[name]
    v = var(f"{name}.row", lo=None)
    return s.put(replace(st, loops=(Loop(v), *st.loops)), "row", name, ext={v: as_expr(1)}), v.attr[0]


def _in_parts(s: Schedule, name: str, caps: Capabilities, threads: int | None) -> Schedule:
    """Partial results of parts of a long reduction, a kernel of its own: a group for each part of each point."""
    k = _walked(s, name)
    rest = [lp for lp in s.stages[name].loops if lp.reduce and lp.name != k]
    far = max(rest, key=lambda lp: s.static_extent(lp.var) or UNKNOWN, default=None)
    n = None if far is None else s.static_extent(far.var)
    if far is not None and (n is None or n >= PARTS // 4):
        loop, factor = far.name, LANES if n is None else -(-n // PARTS)
    else:
        loop = k
        n = s.static_extent(next(lp.var for lp in s.stages[name].loops if lp.name == k))
        factor = 4 * PART if n is None else max(PART, -(-n // (PARTS * PART // 4)) * (PART // 4))
    s = stage(split(s, loop, factor), name, private=f"{loop}.0")
    return _group_per_point(s, _last_partial(s, name), caps, threads)


def _long(st: Stage) -> bool:
    """Whether a reduction is known to be too long for one group."""
    assert st.reduction is not None
    extents = [a.extent for a in st.reduction.attr[1]]
    return all(e.op == "const" for e in extents) and _count(extents) >= LONG


def _along(st: Stage) -> bool:
    """Whether a reduction walks memory along a row."""
    assert st.reduction is not None
    return any(_in_bytes(st, a) or (contiguity(st, a.var)[0] and not contiguity(st, a.var)[1]) for a in st.reduction.attr[1])


def _length(s: Schedule, name: str) -> int:
    """Elements that a reduction reads; a large number where only the run knows."""
    red = s.stages[name].reduction
    return _count(a.extent for a in (red.attr[1] if red is not None else ()))


def _threads(length: int, caps: Capabilities) -> int:
    """Threads of a group: about four elements each, and no thread idle where the length allows it."""
    vectors, rest = divmod(length, LANES)
    even = [n for n in range(32, caps.max_threads_per_block + 1, 32) if vectors % n == 0]
    if even and not rest and length < UNKNOWN:
        return even[-1]
    n = 32
    while n < caps.max_threads_per_block and n * 4 < length:
        n *= 2
    return n


def _thread_per_row(s: Schedule, inner: list[str], row: str) -> Schedule:
    s = split(s, row, THREADS)
    s = annotate(annotate(s, f"{row}.0", "block.x"), f"{row}.1", "thread.x")
    for n in inner:
        s = stage(s, n, at=f"{row}.1")
    return s


def _across(s: Schedule, name: str, axes: list[int], size: int) -> Schedule:
    """The loops over some axes of a tensor are shared out to the threads of the group."""
    st = s.stages[name]
    loops = [st.loops[i].name for i in axes] if st.at is not None else [lp.name for lp in st.loops if not lp.reduce and "." not in lp.kind]
    if not loops:
        return s
    wide = st.reduction is None and axes[-1:] == [len(st.axes) - 1] and side_by_side(st)
    s, loop = fuse_all(s, loops)
    n = s.static_extent(next(lp.var for lp in s.stages[name].loops if lp.name == loop))
    if wide:
        s = split(s, loop, LANES)
        s = annotate(s, f"{loop}.1", "vectorize")
        n, loop = None if n is None else n // LANES, f"{loop}.0"
    if n is not None and n <= size:
        return annotate(s, loop, "thread.x")
    s = split(s, loop, size)
    return annotate(s, f"{loop}.1", "thread.x")


def _reduce(s: Schedule, name: str, row: str, size: int) -> Schedule:
    """A reduction inside a row: partial results of the threads, then of all."""
    st = s.stages[name]
    red = st.reduction
    assert red is not None
    if red.attr[2] != 1 or MONOIDS[red.attr[0]].vector is None or _length(s, name) < 2:
        return stage(s, name, at=row, scope="local")  # every thread does the whole of it
    k = _walked(s, name)
    if len([lp for lp in st.loops if lp.reduce]) > 1:
        rest = [lp.name for lp in st.loops if lp.reduce and lp.name != k]
        s = reorder(s, *rest, k)
    s = _partial(s, name, k, size)
    p = _last_partial(s, name)
    s = stage(s, p, at=row, scope="shared")
    s = annotate(s, s.stages[p].loops[len(s.stages[p].axes) - 1].name, "thread.x")
    return stage(_merge(s, name), name, at=row, scope="local")


def _merge(s: Schedule, name: str) -> Schedule:
    """All threads merge the partial results, with what help of their subgroup there is."""
    st = s.stages[name]
    if st.buf.dtype not in (f32, i32, u32, i64):
        return s
    return annotate(s, next(lp.name for lp in st.loops if lp.reduce), "subgroup")


def _partial(s: Schedule, name: str, k: str, size: int) -> Schedule:
    """Partial results of ``size`` threads that take turns along loop ``k``, a vector each where it has whole ones."""
    st = s.stages[name]
    assert st.reduction is not None
    a = next(a for a in st.reduction.attr[1] if st.subst[a.var].attr[0] == k)
    good, bad = contiguity(st, a.var)
    packed = _packed(st, a, size)
    if packed is not None:
        few, n = packed
        s = split(split(s, k, n * few), f"{k}.1", few, into=(f"{k}.t", f"{k}.v"))
        s = stage(s, name, private=f"{k}.t")
        return annotate(s, [lp.name for lp in s.stages[_last_partial(s, name)].loops if lp.reduce][-1], "unroll")
    if not whole(a.extent) or not good or bad:
        return stage(split(s, k, size), name, private=f"{k}.1")
    s = split(split(s, k, size * LANES), f"{k}.1", LANES, into=(f"{k}.t", f"{k}.v"))
    s = stage(s, name, private=f"{k}.t")
    p = s.stages[_last_partial(s, name)]
    return annotate(s, [lp.name for lp in p.loops if lp.reduce][-1], "vectorize")


def _in_bytes(st: Stage, a: Axis) -> bool:
    """Whether neighbours along ``a`` are parts of bytes."""
    assert st.reduction is not None
    shifts = [e for e in walk(st.reduction) if e.op == "shr" and a.var in free_vars(e.args[1])]
    return any(ld.attr[0].dtype.bits == 8 for e in shifts for ld in loads(e.args[0]))


def _packed(st: Stage, a: Axis, size: int) -> tuple[int, int] | None:
    """(neighbours along ``a`` that a thread takes, threads) where they are parts of bytes: 16 bytes or fewer, whole words; else None."""
    if not _in_bytes(st, a) or a.extent.op != "const":
        return None
    counts = [(few, n) for few in (32, 16, 8) for n in range(size // 32 * 32, 0, -32)]
    return next((c for c in counts if a.extent.attr % (c[0] * c[1]) == 0), None)


def _last_partial(s: Schedule, name: str) -> str:
    """The partial results that were made private last."""
    red = s.stages[name].reduction
    assert red is not None
    return next(x.attr[0].name for x in loads(red))  # type: ignore[no-any-return]


def _walked(s: Schedule, name: str) -> str:
    """The reduction loop that neighbouring threads share: the one that loads walk contiguously, else the longest."""
    st = s.stages[name]
    assert st.reduction is not None
    best = None
    for a in st.reduction.attr[1]:
        loop = next(lp for lp in st.loops if lp.var is st.subst[a.var])
        n = s.static_extent(loop.var)
        score = (contiguity(st, a.var)[0], n if n is not None else UNKNOWN)
        if best is None or score > best[0]:
            best = (score, loop.name)
    assert best is not None
    return best[1]


def _root(s: Schedule, caps: Capabilities, threads: int | None) -> Schedule | None:
    """The output itself is a reduction: a group for each point, when the points alone would not fill the machine."""
    name = s.compute.outs[0]
    st = s.stages[name]
    red = st.reduction
    assert red is not None
    length = _length(s, name)
    count = _count(a.extent for a in st.axes)
    if length <= SHORT or red.attr[2] != 1 or MONOIDS[red.attr[0]].vector is None:
        return None
    alone = not _along(st) and count >= ENOUGH  # a thread for each point is enough of them
    if (_long(st) and (count <= FEW or alone)) or not st.axes:
        s = _in_parts(s, name, caps, threads)
        return points(s, name) if alone else _group_per_point(s, name, caps, threads)
    return None if alone else _group_per_point(s, name, caps, threads)


def _group_per_point(s: Schedule, name: str, caps: Capabilities, threads: int | None) -> Schedule:
    """A reduction whose result is stored: a group for each point of it."""
    st = s.stages[name]
    if st.reduction is None:  # a part of one element
        return points(s, name)
    size = threads or _threads(_length(s, name), caps)
    k = _walked(s, name)
    rest = [lp.name for lp in st.loops if lp.reduce and lp.name != k]
    if rest:
        s = reorder(s, *rest, k)
    s = _merge(_partial(s, name, k, size), name)
    s, row = _row(s, name, [lp.name for lp in s.stages[name].loops if not lp.reduce])
    s = annotate(s, row, "block.x")
    p = _last_partial(s, name)
    s = stage(s, p, at=row, scope="shared")
    return annotate(s, s.stages[p].loops[len(s.stages[p].axes) - 1].name, "thread.x")
