"""GPU template for Computes with a Fold (recurrent networks): a group of threads for each point of the shared axes.

States and the steps of a round lie in shared memory; the threads share out the longest axis of each step, and meet before
they read what others wrote. The loop over time stays serial. A Fold whose states are single numbers (cumulative sums) is left to
:mod:`luthier.schedules.gpu.elementwise`, a thread for each point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.fold_nest import FOLD_THREADS
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule, annotate, split, stage
from luthier.schedules.gpu.elementwise import fuse_all, points

WIDE = 16  # elements of a state from which a group is worth it


KNOBS: tuple[Knob, ...] = ()


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any]) -> Schedule | None:
    """None when the Compute has no Fold, or its states do not fit shared memory."""
    hosts = [n for n, st in s.stages.items() if st.fold is not None]
    if not hosts or not caps.gpu or any(st.at is not None and st.at[0] not in hosts for st in s.stages.values()):
        return None
    if not all(_fits(s, n, caps) for n in hosts):
        return None
    for n in hosts:
        s = _group(s, n)
    for n, st in list(s.stages.items()):
        if st.at is None and st.fold is None:
            s = points(s, n)
    return s


def _fits(s: Schedule, name: str, caps: Capabilities) -> bool:
    f = s.stages[name].fold
    assert f is not None
    shared = {a.var for a in f.axes} | {f.axis.var}
    total = 0
    widest = 0
    for st in [x for x in s.stages.values() if x.at is not None and x.at[0] == name]:
        size = 1
        for a in st.axes:
            if a.var in shared:
                continue
            if a.extent.op != "const":
                return False
            size *= int(a.extent.attr)
        widest = max(widest, size)
        total += 4 * size * (2 if st.name.endswith(".next") else 1)
    return widest >= WIDE and total <= caps.shared_bytes


def _group(s: Schedule, name: str) -> Schedule:
    host = s.stages[name]
    f = host.fold
    assert f is not None
    at = next(lp.name for lp in host.loops if lp.reduce)
    emits = {e.buf.name for e in f.emit}
    shared = {a.var for a in f.axes} | {f.axis.var}
    inner = [n for n, st in s.stages.items() if st.at is not None and st.at[0] == name]
    outer = [lp.name for lp in host.loops if not lp.reduce]
    if outer:
        s, row = fuse_all(s, outer)
        s = annotate(s, row, "block.x")
    s = stage(s, name, scope="shared")
    for n in inner:
        if n not in emits:
            s = stage(s, n, at=at, scope="shared")
        st = s.stages[n]
        own = [st.loops[i].name for i, a in enumerate(st.axes) if a.var not in shared]
        if not own:
            continue
        far = max(own, key=lambda x: s.static_extent(next(lp.var for lp in s.stages[n].loops if lp.name == x)) or 0)
        k = s.static_extent(next(lp.var for lp in st.loops if lp.name == far))
        if k is None or k > FOLD_THREADS:
            size = FOLD_THREADS
            while n in emits and k is not None and k % size:  # what is stored outside has no room for an overhang
                size -= 1
            s = split(s, far, size)
            far = f"{far}.1"
        s = annotate(s, far, "thread.x")
    return s
