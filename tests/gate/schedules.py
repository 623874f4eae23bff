"""How the gate's Computes are scheduled: by the primitives alone, no template takes part.

``cpu(case, caps)`` fits any number of lanes (LLVM and WebAssembly use it with their own capabilities), ``gpu(case)`` maps loops
to grid and group. Each returns a function from Schedule to Schedule, or None where the kernel is written in loop IR.
"""

from __future__ import annotations

from collections.abc import Callable

from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.schedule import Schedule, annotate, cache, fuse, pack, reorder, split, stage
from tests.gate.kernels import Case

Scheduler = Callable[[Schedule], Schedule]


def lanes_of(s: Schedule, loop: str, lanes: int, tail: str = "guard") -> Schedule:
    """``loop`` in vectors of ``lanes``; its outer part keeps the place, the vector goes to the end of the spatial loops."""
    s = split(s, loop, lanes, tail)
    return annotate(s, f"{loop}.1", "vectorize")


def gemm(s: Schedule, n: int, rows: int = 6, vectors: int = 2, unroll: int = 1) -> Schedule:
    """B packed in panels of ``vectors * n`` columns; a register tile of ``rows`` by one panel lives through the whole reduction.

    Panels are parallel. The last panel's overhang is padded with zeros in the packed copy and masked when C is stored."""
    width = vectors * n
    s = pack(s, "B", (1, 0), {1: width})
    s = split(s, "C.j", width)
    s = split(s, "C.i", rows, "cut")
    s = reorder(s, "C.j.0", "C.i.0", "C.i.1", "C.j.1")
    s = annotate(s, "C.i.1", "unroll")
    s = stage(s, "acc", at="C.i.0", pad=(1,))
    s = reorder(s, "acc.k", "acc.i", "acc.j")
    s = annotate(s, "acc.i", "unroll")
    for loop in ("C.j.1", "acc.j"):
        s = split(s, loop, n)
        s = annotate(annotate(s, f"{loop}.0", "unroll"), f"{loop}.1", "vectorize")
    if unroll > 1:
        s = annotate(split(s, "acc.k", unroll), "acc.k.1", "unroll")
    return annotate(s, "C.j.0", "parallel")


def conv3x3(s: Schedule, n: int) -> Schedule:
    """Output columns in lanes, channels parallel; the padding makes masked vector loads."""
    s = split(s, "Y.w", n)
    s = reorder(s, "Y.o", "Y.h", "Y.w.0", "Y.c", "Y.r", "Y.s", "Y.w.1")
    s = annotate(s, "Y.s", "unroll")
    s = annotate(s, "Y.w.1", "vectorize")
    return annotate(s, "Y.o", "parallel")


def depthwise(s: Schedule, n: int) -> Schedule:
    """Channels in lanes, the filter unrolled."""
    s = split(s, "Y.c", n)
    s = reorder(s, "Y.h", "Y.w", "Y.c.0", "Y.r", "Y.s", "Y.c.1")
    for k in ("Y.r", "Y.s"):
        s = annotate(s, k, "unroll")
    s = annotate(s, "Y.c.1", "vectorize")
    return annotate(s, "Y.h", "parallel")


def layernorm(s: Schedule, n: int) -> Schedule:
    """Statistics live in the loop over rows; sums have one private partial result a lane."""
    for t in ("mean.acc", "inv.acc"):
        s = split(s, f"{t}.k", n)
        s = stage(s, t, private=f"{t}.k.1")
        p = s.stages[f"{t}.p"]
        lane, red = p.loops[len(p.axes) - 1].name, next(lp.name for lp in p.loops if lp.reduce)
        s = reorder(s, red, lane)
        s = annotate(s, lane, "vectorize")
    for t in ("mean.acc.p", "mean.acc", "mean", "inv.acc.p", "inv.acc", "inv"):
        s = stage(s, t, at="Y.i")
    s = lanes_of(s, "Y.j", n, "cut")
    return annotate(s, "Y.i", "parallel")


def attention(s: Schedule, n: int) -> Schedule:
    """Heads and queries are shared by the whole fold; keys of a block and the head's width run in lanes."""
    s = fuse(s, "flash.h", "flash.q", into="row")
    s = annotate(s, "flash.row", "parallel")
    for t, a in (("s", "kk"), ("p", "kk"), ("o.next", "d")):
        s = lanes_of(s, f"{t}.{a}", n)
    s = lanes_of(s, "o.acc.d", n)
    s = reorder(s, "o.acc.d.0", "o.acc.kk", "o.acc.d.1")
    return annotate(lanes_of(s, "Y.d", n, "cut"), "Y.h", "parallel")


def lstm(s: Schedule, n: int) -> Schedule:
    """Batch rows are independent; hidden units of the activations run in lanes."""
    s = annotate(s, "lstm.b", "parallel")
    for t in ("cn", "hn"):
        s = lanes_of(s, f"{t}.u", n)
    return s


def argmax(s: Schedule, n: int) -> Schedule:
    """Rows in lanes, each with its own (value, index) pair."""
    s = lanes_of(s, "Y.i", n)
    return reorder(s, "Y.i.0", "Y.k", "Y.i.1")


def scatter_add(s: Schedule, n: int) -> Schedule:
    """The initial copy in lanes; the pushes keep their order."""
    return annotate(lanes_of(s, "Y.d", n), "Y.i", "parallel")


def gemv_u4(s: Schedule, n: int) -> Schedule:
    """Private sums over the lanes of a group; a group is 32 weights."""
    s = split(s, "Y.k", 32, into=("Y.g", "Y.kk"))
    s = split(s, "Y.kk", n, into=("Y.kv", "Y.l"))
    s = stage(s, "Y", private="Y.l")
    p = s.stages["Y.p"]
    lane = p.loops[len(p.axes) - 1].name
    reds = [lp.name for lp in p.loops if lp.reduce]
    s = reorder(s, *reds, lane)
    s = annotate(s, lane, "vectorize")
    s = stage(s, "Y.p", at="Y.n")
    return annotate(s, "Y.n", "parallel")


def lut_gemv(s: Schedule, n: int) -> Schedule:
    """The table is staged once for all rows; its 16 entries are computed in lanes."""
    s = lanes_of(s, "T.c", n)
    s = reorder(s, "T.c.0", "T.j", "T.c.1")
    s = annotate(s, "T.j", "unroll")
    s = stage(s, "acc", at="Y.n")
    return annotate(s, "Y.n", "parallel")


_CPU = {
    "conv3x3": conv3x3, "depthwise": depthwise, "layernorm": layernorm, "attention": attention, "lstm": lstm, "argmax": argmax,
    "scatter_add": scatter_add, "gemv_u4": gemv_u4, "lut_gemv": lut_gemv,
}


def cpu(case: Case, caps: Capabilities) -> Scheduler | None:
    if case.compute is None:
        return None
    if case.name == "gemm":  # 12 or 8 accumulators, what is left holds a row of the panel and one element of A
        return lambda s: gemm(s, caps.lanes(32), 6 if caps.registers >= 16 else 4)
    f = _CPU[case.name]
    return lambda s: f(s, caps.lanes(32))


# ---------------------------------------------------------------- grid and group


def tiles(s: Schedule, y: tuple[str, int], x: tuple[str, int]) -> Schedule:
    """Two spatial loops of a stage become blocks of ``y[1]`` by ``x[1]`` threads."""
    for loop, n in (y, x):
        s = split(s, loop, n)
    s = reorder(s, f"{y[0]}.0", f"{x[0]}.0", f"{y[0]}.1", f"{x[0]}.1")
    for part, kind in ((f"{y[0]}.0", "block.y"), (f"{x[0]}.0", "block.x"), (f"{y[0]}.1", "thread.y"), (f"{x[0]}.1", "thread.x")):
        s = annotate(s, part, kind)
    return s


def line(s: Schedule, loop: str, n: int = 64) -> Schedule:
    s = split(s, loop, n)
    return annotate(annotate(s, f"{loop}.0", "block.x"), f"{loop}.1", "thread.x")


def _gemm_gpu(s: Schedule) -> Schedule:
    """Tiles of 16 by 16 through shared memory, one thread an element; the last tiles overhang and are masked."""
    n = 16
    s = tiles(s, ("C.i", n), ("C.j", n))
    s = stage(s, "acc", at="C.j.0")
    s = split(s, "acc.k", n)
    s = reorder(s, "acc.k.0", "acc.i", "acc.j", "acc.k.1")
    s = annotate(annotate(s, "acc.i", "thread.y"), "acc.j", "thread.x")
    for p, y, x in (("A", "a0", "a1"), ("B", "a0", "a1")):
        s = cache(s, p, "acc", at="acc.k.0", scope="shared")
        s = annotate(annotate(s, f"{p}.c.{y}", "thread.y"), f"{p}.c.{x}", "thread.x")
    return s


def _rows_gpu(*inside: str) -> Callable[[Schedule], Schedule]:
    """One thread a row of Y, everything else inside it."""

    def go(s: Schedule) -> Schedule:
        for t in inside:
            s = stage(s, t, at="Y.i")
        return line(s, "Y.i") if not inside else annotate(s, "Y.i", "block.x")

    return go


def _attention_gpu(s: Schedule) -> Schedule:
    s = annotate(annotate(s, "flash.h", "block.x"), "flash.q", "thread.x")
    return tiles(annotate(s, "Y.h", "serial"), ("Y.q", 4), ("Y.d", 16))


_GPU: dict[str, Scheduler] = {
    "gemm": _gemm_gpu,
    "conv3x3": lambda s: annotate(tiles(s, ("Y.h", 4), ("Y.w", 16)), "Y.o", "block.z"),
    "depthwise": lambda s: annotate(tiles(s, ("Y.w", 2), ("Y.c", 32)), "Y.h", "block.z"),
    "layernorm": _rows_gpu("mean.acc", "mean", "inv.acc", "inv"),
    "attention": _attention_gpu,
    "lstm": lambda s: annotate(s, "lstm.b", "thread.x"),
    "argmax": lambda s: line(s, "Y.i"),
    "scatter_add": lambda s: tiles(s, ("Y.i", 4), ("Y.d", 16)),
    "gemv_u4": lambda s: line(s, "Y.n"),
    "lut_gemv": lambda s: stage(line(tiles(s, ("T.g", 4), ("T.c", 16)), "Y.n"), "acc", at="Y.n.1"),
}


def gpu(case: Case) -> Scheduler | None:
    return _GPU[case.name] if case.compute is not None else None


__all__ = ["cpu", "gpu", "gemm", "lanes_of", "tiles", "line"]
