"""Random legal schedules of the gate's Computes: LLVM and WebAssembly still give what numpy gives."""

from __future__ import annotations

import random

import numpy as np
import pytest

from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.schedule import Schedule, ScheduleError, annotate, fuse, pack, reorder, schedule, split, stage
from tests.gate import backends
from tests.gate.harness import check, funcs_of, run_case
from tests.gate.kernels import Case, cases

CASES = [c for c in cases() if c.compute is not None]


def step(s: Schedule, rng: random.Random, lanes: int) -> Schedule:
    """One primitive with drawn operands. Raises ScheduleError when they are not legal."""
    name = rng.choice(list(s.stages))
    st = s.stages[name]
    loops = [lp.name for lp in st.loops]
    if not loops:
        return s
    loop = rng.choice(loops)
    hosts = any(x.at is not None and x.at[0] == name for x in s.stages.values())
    what = rng.choice(["split", "lanes", "lanes", "reorder", "fuse", "unroll", "parallel", "stage", "private", "pack"])
    if what == "split" and not hosts and len(loops) < 7:
        return split(s, loop, rng.choice([2, 3, 4, 5]), rng.choice(["guard", "cut"]))
    if what == "lanes" and not hosts and not st.loops[st.find(loop)].reduce:
        s = split(s, loop, lanes)
        return annotate(s, f"{loop}.1", "vectorize")
    if what == "reorder" and not hosts and st.fold is None and not any(lp.cut is not None for lp in st.loops):
        kind = st.loops[st.find(loop)].reduce
        same = [lp.name for lp in st.loops if lp.reduce == kind]
        return reorder(s, *rng.sample(same, len(same)))
    if what == "fuse" and not hosts and len(loops) > 1:
        i = rng.randrange(len(loops) - 1)
        return fuse(s, loops[i], loops[i + 1])
    if what == "unroll" and (s.static_extent(st.loops[st.find(loop)].var) or 99) <= 8:
        return annotate(s, loop, "unroll")
    if what == "parallel" and st.loops[0].name == loop and st.at is None:
        return annotate(s, loop, "parallel")
    if what == "private" and not hosts and st.fold is None and st.at is None:
        return stage(s, name, private=loop)
    if what == "pack":
        p = rng.choice([b for b in s.compute.params if b.rank == 2] or [None])  # type: ignore[list-item]
        if p is not None and not s.packed:
            return pack(s, p.name, rng.choice([(0, 1), (1, 0)]), {rng.randrange(2): rng.choice([3, 4, 8])})
    if what == "stage" and st.at is None and st.fold is None and name not in s.compute.outs:
        readers = [u for u in s.stages.values() if u.at is None and u.fold is None and u.push is None and u.name != name]
        if readers:
            u = rng.choice(readers)
            return stage(s, name, at=rng.choice([lp.name for lp in u.loops if not lp.reduce]))
    return s


def random_schedule(case: Case, seed: int, lanes: int) -> Schedule:
    """Up to eight steps; one that makes the schedule impossible to lower is taken back."""
    rng = random.Random(f"{case.name}/{seed}")
    assert case.compute is not None
    s = schedule(case.compute)
    for _ in range(rng.randint(2, 8)):
        try:
            t = step(s, rng, lanes)
            funcs_of(case, lambda _, t=t: t)
        except ScheduleError:
            continue
        s = t
    return s


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_random_schedule(case: Case, seed: int) -> None:
    x = case.inputs(np.random.default_rng(seed))
    want = case.reference(x)
    runners = [(backends.llvm, Capabilities().lanes(32))]
    try:
        import wasmtime  # noqa: F401

        runners.append((backends.wasm, backends.WASM.lanes(32)))
    except ImportError:
        pass
    for runner, lanes in runners:
        s = random_schedule(case, seed, lanes)
        try:
            check(case, run_case(case, funcs_of(case, lambda _, s=s: s), x, runner), want)
        except Exception as e:
            e.add_note(f"schedule of {case.name}, seed {seed}: {s.trace}")
            raise


@pytest.mark.parametrize("seed", range(100, 103))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_random_schedule_as_wgsl(case: Case, seed: int, adapter: None) -> None:
    """Without a grid of their own: parallel loops become one, vectors are taken apart."""
    x = case.inputs(np.random.default_rng(seed))
    s = random_schedule(case, seed, 4)
    try:
        check(case, run_case(case, funcs_of(case, lambda _: s), x, backends.wgsl), case.reference(x))
    except Exception as e:
        e.add_note(f"schedule of {case.name}, seed {seed}: {s.trace}")
        raise
