"""Random legal schedules do not change what a Compute means: interpreter(scheduled) equals numpy and interpreter(unscheduled)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hsettings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import cases

from luthier.ir.expr import var
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.lower import lower
from luthier.schedules.base.schedule import Schedule, ScheduleError, annotate, fuse, pack, peel, reorder, schedule, split, stage
from luthier.schedules.select import build_kernel

CAPS = Capabilities()
N = var("N", lo=0)
SIZES = {"N": 11}


def random_step(s: Schedule, draw: st.DrawFn) -> Schedule:
    """One primitive with drawn operands; operands that are not legal leave the schedule as it was."""
    name = draw(st.sampled_from(sorted(s.stages)))
    sg = s.stages[name]
    loops = [lp.name for lp in sg.loops]
    loop = draw(st.sampled_from(loops))
    kind = draw(st.sampled_from(["split", "split", "reorder", "fuse", "annotate", "stage", "private", "pack", "peel"]))
    try:
        if kind == "split" and len(loops) < 7:
            return split(s, loop, draw(st.integers(1, 6)), draw(st.sampled_from(["guard", "cut", "min"])))
        if kind == "reorder":
            group = [lp.name for lp in sg.loops if lp.reduce == sg.loops[sg.find(loop)].reduce and lp.cut is None]
            moved = {x.at[1].attr[0] for x in s.stages.values() if x.at is not None}
            if not moved & set(loops) and not any(lp.cut is not None for lp in sg.loops):
                return reorder(s, *draw(st.permutations(group)))
        if kind == "fuse" and len(loops) > 1 and not any(lp.cut is not None for lp in sg.loops):
            i = draw(st.integers(0, len(loops) - 2))
            if not any(x.at is not None and x.at[0] == name for x in s.stages.values()):
                return fuse(s, loops[i], loops[i + 1])
        if kind == "annotate":
            return annotate(s, loop, draw(st.sampled_from(["unroll", "serial"])))
        if kind == "private":
            if not any(x.at is not None and x.at[0] == name for x in s.stages.values()):
                return stage(s, name, private=loop)
        if kind == "pack" and "B.pack" not in s.packed and any(p.name == "B" for p in s.compute.params):
            return pack(s, "B", draw(st.sampled_from([(0, 1), (1, 0)])), {draw(st.integers(0, 1)): draw(st.integers(2, 9))})
        if kind == "peel" and sg.loops[sg.find(loop)].tail == "":
            return peel(s, loop)
        if kind == "stage" and name not in s.compute.outs and sg.at is None:
            out = s.stages[s.compute.outs[0]]
            target = draw(st.sampled_from([lp.name for lp in out.loops if not lp.reduce]))
            return stage(s, name, at=target)
    except ScheduleError:
        pass
    return s


@pytest.mark.parametrize("which", ["mm", "mm_runtime", "conv", "softmax"])
@hsettings(max_examples=40)
@given(data=st.data())
def test_random_schedule(which: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    comp, arrays, ref = {
        "mm": lambda: cases.matmul(5, 7, 6, SIZES, rng),
        "mm_runtime": lambda: cases.matmul(N, 7, 6, SIZES, rng),
        "conv": lambda: cases.conv(5, 3, 4, 3, 1, 1, rng),
        "softmax": lambda: cases.softmax(4, 9, SIZES, rng),
    }[which]()
    s = schedule(comp)
    for _ in range(data.draw(st.integers(1, 6))):
        s = random_step(s, data.draw)
    packed = {n: p.apply(arrays[p.param]) for n, p in s.packed.items()}
    try:
        funcs = lower(s)
    except ScheduleError:  # staged away from a reader: refused
        return
    got = cases.run(funcs, {**arrays, **packed}, SIZES, "C")
    np.testing.assert_allclose(got, ref.reshape(-1), rtol=1e-4, atol=1e-4, err_msg=str(s.trace))
    if not any("alloc" in str(f) and "N" in str(f).split("alloc", 1)[1].split("\n")[0] for f in funcs):
        got = cases.run([build_kernel(f, CAPS) for f in funcs], {**arrays, **packed}, SIZES, "C")
        np.testing.assert_allclose(got, ref.reshape(-1), rtol=1e-4, atol=1e-4, err_msg=str(s.trace))
