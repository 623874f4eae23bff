"""specialize: two versions of a kernel mean the same as one, and the special one has lost what its condition makes unnecessary."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hsettings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import cases

from luthier.codegen.program.sharing import parallel_loop
from luthier.ir.compute import Compute, axis, pull
from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, var
from luthier.ir.loop import Buffer, Func, If, walk_stmts
from luthier.ir.printer import format_stmt
from luthier.ir.verify import verify
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.lower import lower
from luthier.schedules.base.schedule import Schedule, ScheduleError, annotate, fuse, peel, reorder, schedule, split, stage
from luthier.schedules.base.specialize import specialize
from luthier.schedules.select import build_kernel

Golden = Callable[[str, str], None]
N, M = var("N", lo=1), var("M", lo=1)


def scale() -> Compute:
    x = Buffer.of("x", f32, (N,))
    a = axis("i", N)
    return Compute("scale", (x,), (N,), (pull("y", [a], x[a.var] * 2.0 + 1.0),), ("y",))


def vectorized(tail: str = "guard") -> Schedule:
    s = split(schedule(scale()), "y.i", 8, tail)
    return annotate(annotate(s, "y.i.1", "vectorize"), "y.i.0", "parallel")


def versions(f: Func) -> tuple[str, str]:
    """Texts of the special and the general version."""
    choice = next(s for s in walk_stmts(f.body) if isinstance(s, If) and s.orelse is not None)
    return "\n".join(format_stmt(choice.then)), "\n".join(format_stmt(choice.orelse))  # type: ignore[arg-type]


def test_golden_text(golden: Golden) -> None:
    parts = []
    for cond in ((N % 8).eq(0), N >= 64, N.eq(32)):
        (f,) = lower(specialize(vectorized(), cond))
        parts.append(f"# {cond!r}\n{f}")
    golden("schedules/specialize.txt", "\n".join(parts))


def test_the_mask_is_gone_and_threads_still_share() -> None:
    (f,) = lower(specialize(vectorized(), (N % 8).eq(0)))
    f = build_kernel(f, Capabilities())
    special, general = versions(f)
    assert "; " not in special and " if " not in special and " if " in general
    loop = parallel_loop(f)
    assert loop is not None and loop[0].kind == "parallel"


def test_a_lower_bound_removes_a_guard() -> None:
    """A peeled last round needs no condition where there is a round at all."""
    n = var("K", lo=0)
    x, a = Buffer.of("x", f32, (n,)), axis("i", n)
    c = Compute("scale", (x,), (n,), (pull("y", [a], x[a.var] * 2.0),), ("y",))
    (f,) = lower(specialize(peel(schedule(c), "y.i"), n >= 1))
    special, general = versions(f)
    assert "if 0 <" in general and "if" not in special


@pytest.mark.parametrize("cond", [(N % 8).eq(0), N >= 20, N.eq(24), (N % 3).eq(0)], ids=repr)
@pytest.mark.parametrize("tail", ["guard", "cut", "min"])
def test_both_versions_compute_the_same(tail: str, cond: Expr) -> None:
    funcs = [build_kernel(f, Capabilities()) for f in lower(specialize(vectorized(tail), cond))]
    for f in funcs:
        verify(f)
    for n in (1, 7, 8, 9, 16, 19, 20, 21, 24, 64, 65):
        x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
        np.testing.assert_array_equal(cases.run(funcs, {"x": x}, {"N": n}, "y"), x * 2 + 1)


@pytest.mark.parametrize(
    ("cond", "message"),
    [(M >= 4, "for a dim of the Compute"), ((N * 2).eq(8), "must be"), ((N % 8).eq(1), "must be"), (N < 9, "must be")],
)
def test_other_conditions_are_refused(cond: Expr, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        specialize(schedule(scale()), cond)


def test_twice_on_one_dim_is_refused() -> None:
    with pytest.raises(ScheduleError, match="already"):
        specialize(specialize(schedule(scale()), N >= 4), (N % 2).eq(0))


def test_the_trace_records_it() -> None:
    assert specialize(schedule(scale()), N >= 4).trace[-1][0] == "specialize"


def random_step(s: Schedule, draw: Any) -> Schedule:
    name = draw(st.sampled_from(sorted(s.stages)))
    sg = s.stages[name]
    loops = [lp.name for lp in sg.loops]
    loop = draw(st.sampled_from(loops))
    hosts = any(x.at is not None and x.at[0] == name for x in s.stages.values())
    kind = draw(st.sampled_from(["split", "split", "lanes", "reorder", "fuse", "unroll", "stage", "parallel", "peel"]))
    try:
        if kind == "split" and len(loops) < 7:
            return split(s, loop, draw(st.integers(1, 6)), draw(st.sampled_from(["guard", "cut", "min"])))
        if kind == "lanes" and not hosts and not sg.loops[sg.find(loop)].reduce:
            return annotate(split(s, loop, 4), f"{loop}.1", "vectorize")
        if kind == "reorder" and not hosts and not any(lp.cut is not None for lp in sg.loops):
            group = [lp.name for lp in sg.loops if lp.reduce == sg.loops[sg.find(loop)].reduce]
            return reorder(s, *draw(st.permutations(group)))
        if kind == "fuse" and len(loops) > 1 and not hosts and not any(lp.cut is not None for lp in sg.loops):
            i = draw(st.integers(0, len(loops) - 2))
            return fuse(s, loops[i], loops[i + 1])
        if kind == "unroll":
            return annotate(s, loop, "unroll")
        if kind == "parallel" and loop == loops[0] and sg.at is None:
            return annotate(s, loop, "parallel")
        if kind == "peel" and sg.loops[sg.find(loop)].tail == "":
            return peel(s, loop)
        if kind == "stage" and name not in s.compute.outs and sg.at is None:
            out = s.stages[s.compute.outs[0]]
            return stage(s, name, at=draw(st.sampled_from([lp.name for lp in out.loops if not lp.reduce])))
    except ScheduleError:
        pass
    return s


@pytest.mark.parametrize("which", ["mm", "softmax"])
@hsettings(max_examples=40)
@given(data=st.data())
def test_random_schedules(which: str, data: st.DataObject) -> None:
    """A random schedule, then one or two conditions; sizes for which they hold and others."""
    n = data.draw(st.sampled_from([1, 3, 4, 6, 8, 11, 12]))
    m = data.draw(st.sampled_from([1, 2, 5, 8]))
    rng = np.random.default_rng(0)
    comp, arrays, ref = cases.matmul(N, M, 5, {"N": n, "M": m}, rng) if which == "mm" else cases.softmax(N, M, {"N": n, "M": m}, rng)
    s = schedule(comp)
    for _ in range(data.draw(st.integers(1, 5))):
        s = random_step(s, data.draw)
    for d in data.draw(st.sampled_from([(N,), (M,), (N, M)])):
        k = data.draw(st.integers(1, 8))
        s = specialize(s, data.draw(st.sampled_from([(d % k).eq(0) if k > 1 else d >= 1, d >= k, d.eq(k)])) if k > 1 else d.eq(1))
    try:
        plain = lower(Schedule(s.compute, s.stages, s.ext, s.packed, s.trace))
    except ScheduleError:
        return  # not legal without conditions either
    assert plain
    funcs = [build_kernel(f, Capabilities()) for f in lower(s)]
    for f in funcs:
        verify(f)
    np.testing.assert_allclose(cases.run(funcs, arrays, {"N": n, "M": m}, "C").reshape(ref.shape), ref, rtol=1e-4, atol=1e-5, err_msg=str(s.trace))


