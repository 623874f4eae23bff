"""GPU template for everything without a better one: one thread for each point of a root tensor, reductions inside the thread.

Axes that all accesses walk as one are fused first; all spatial loops become one loop, cut into groups of ``threads``. The loops
of a Fold (recurrent networks) over its shared axes are threads too, its own loop stays serial inside. Where most accesses walk the
innermost axis side by side, a thread has four neighbours, which it loads and stores as one vector where they are aligned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.ir.expr import Expr, linear
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.reduction import contiguity
from luthier.schedules.base.schedule import Schedule, Stage, annotate, fuse, in_runs, split
from luthier.schedules.cpu.elementwise import collapse

THREADS = 64
LANES = 4  # elements of a vector in memory
ENOUGH = 4096  # points from which on fewer threads still fill a machine


KNOBS = (Knob("threads", "of a group", (32, 64, 128, 256), THREADS),)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, threads: int = THREADS) -> Schedule | None:
    if not caps.gpu:
        return None
    s = in_runs(s)
    for name, st in list(s.stages.items()):
        if st.at is None:
            s = points(s, name, threads)
    return s


def whole(n: Expr) -> bool:
    """Whether an extent is a multiple of ``LANES`` whatever the dims are."""
    return all(c % LANES == 0 for c in linear(n).values())


def side_by_side(st: Stage) -> bool:
    """Whether the innermost axis has whole vectors and most of the loads walk it so, or not at all."""
    if not st.axes or not whole(st.axes[-1].extent):
        return False
    good, bad = contiguity(st, st.axes[-1].var)
    return good >= bad


def points(s: Schedule, name: str, threads: int = THREADS) -> Schedule:
    """All spatial loops of a root tensor become the grid and the threads of its groups."""
    if s.stages[name].reduction is None and s.stages[name].push is None and s.stages[name].fold is None:
        s = collapse(s, name)
    st = s.stages[name]
    outer = []
    for lp in st.loops:
        if lp.reduce:
            break
        outer.append(lp.name)
    if not outer:
        return s
    wide = st.reduction is None and st.push is None and st.fold is None and side_by_side(st)
    s, loop = fuse_all(s, outer)
    n = s.static_extent(next(lp.var for lp in s.stages[name].loops if lp.name == loop))
    if wide and (n is None or n >= ENOUGH):
        s = split(s, loop, LANES)
        s = annotate(s, f"{loop}.1", "vectorize")
        n, loop = None if n is None else n // LANES, f"{loop}.0"
    if n is not None and n <= threads:
        return annotate(s, loop, "thread.x")
    s = split(s, loop, threads)
    s = annotate(s, f"{loop}.0", "block.x")
    return annotate(s, f"{loop}.1", "thread.x")


def fuse_all(s: Schedule, loops: list[str]) -> tuple[Schedule, str]:
    """Neighbouring loops, outermost first, as one; its name."""
    first, rest = loops[0], loops[1:]
    for nxt in rest:
        owner, _ = s.stage_of(first)
        before = {lp.name for lp in owner.loops}
        s = fuse(s, first, nxt)
        first = next(lp.name for lp in s.stages[owner.name].loops if lp.name not in before)
    return s, first
