"""The grammar gate: twelve kernels, written once, through the interpreter and four printers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from luthier.errors import TargetError
from luthier.ir.parser import parse_func
from luthier.ir.printer import format_func, format_stmt
from luthier.passes.gpu.privatize_threads import privatize_threads
from luthier.passes.loop.place_barriers import place_barriers
from luthier.schedules.base.capabilities import Capabilities
from tests.cuda import need_compiler
from tests.gate import backends, dawn
from tests.gate.harness import Runner, check, funcs_of, interpret, run_case
from tests.gate.kernels import Case, cases
from tests.gate.schedules import Scheduler, cpu, gpu

CASES = cases()
BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
SCHEDULED = pytest.mark.parametrize("case", [c for c in CASES if c.compute is not None], ids=lambda c: c.name)  # the others are written in loop IR
FIXED = Capabilities()  # golden text must not depend on the machine


def run(case: Case, sched: Scheduler | None, runner: Runner) -> float:
    x = case.inputs(np.random.default_rng(7))
    return check(case, run_case(case, funcs_of(case, sched), x, runner), case.reference(x))


@BY_NAME
def test_text(case: Case, golden: Callable[[str, str], None]) -> None:
    """The Compute, its plain lowering and its scheduled lowering."""
    parts: list[str] = []
    if case.compute is not None:
        parts += ["# compute", str(case.compute)]
    if case.program is not None:
        parts += ["# main", *format_stmt(case.program.body), ""]
    parts += ["# lowered", *map(str, funcs_of(case))]
    if case.compute is not None:
        parts += ["# scheduled", *map(str, funcs_of(case, cpu(case, FIXED)))]
    golden(f"gate/{case.name}.txt", "\n".join(parts))


def test_grid_text(golden: Callable[[str, str], None]) -> None:
    """Shared memory: the GEMM as scheduled for a grid, and what the shared passes make of it."""
    case = CASES[0]
    assert case.name == "gemm"
    f = funcs_of(case, gpu(case))[-1]
    golden("gate/gemm_grid.txt", f"# scheduled\n{f}\n# with barriers, without thread dimensions\n{place_barriers(privatize_threads(f))}")


@BY_NAME
def test_text_is_parsed_back(case: Case) -> None:
    for sched in (None, cpu(case, FIXED), gpu(case)):
        for f in funcs_of(case, sched):
            text = format_func(f)
            assert format_func(parse_func(text)) == text


@pytest.mark.parametrize(
    ("case", "how"), [pytest.param(c, how, id=f"{c.name}-{how}") for c in CASES for how in ("unscheduled", "cpu", "gpu") if how == "unscheduled" or c.compute],
)
def test_interpreter(case: Case, how: str) -> None:
    run(case, None if how == "unscheduled" else cpu(case, FIXED) if how == "cpu" else gpu(case), interpret)


@SCHEDULED
@pytest.mark.parametrize("caps", [backends.WASM, Capabilities(vector_bits=512, registers=32)], ids=["128", "512"])
def test_interpreter_other_widths(case: Case, caps: Capabilities) -> None:
    """A schedule is written for any number of lanes; the passed functions are interpreted, vectors included."""
    from luthier.schedules.select import build_kernel

    run(case, cpu(case, caps), lambda f, a, s: interpret(build_kernel(f, caps), a, s))


@BY_NAME
@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "scheduled"])
def test_llvm(case: Case, scheduled: bool) -> None:
    from luthier.codegen.targets.target import host

    run(case, cpu(case, host().caps) if scheduled else None, backends.llvm)


@BY_NAME
@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "scheduled"])
def test_wasm(case: Case, scheduled: bool) -> None:
    pytest.importorskip("wasmtime")
    run(case, cpu(case, backends.WASM) if scheduled else None, backends.wasm)


@BY_NAME
@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "scheduled"])
def test_wgsl_runs_on_wgpu(case: Case, scheduled: bool, adapter: None) -> None:
    run(case, gpu(case) if scheduled else None, backends.wgsl)


def test_wgsl_is_accepted_by_dawn() -> None:
    if dawn.missing():
        pytest.skip(dawn.missing())
    shaders = [backends.shader(f) for c in CASES for f in funcs_of(c, gpu(c))]
    assert len({s.name for s in shaders}) == len(shaders)
    assert dawn.refused(shaders) == {}


def test_dawn_refuses_what_is_wrong() -> None:
    """The check above can fail."""
    if dawn.missing():
        pytest.skip(dawn.missing())
    from dataclasses import replace

    s = backends.shader(funcs_of(CASES[0])[0])
    assert "bool" in dawn.refused([replace(s, source=s.source.replace("0.0f", "true"))])[s.name]


@BY_NAME
@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "scheduled"])
@pytest.mark.parametrize("checks", ["orders", "races"])
def test_cuda_runs_emulated(case: Case, scheduled: bool, checks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_compiler()
    monkeypatch.setenv("LUTHIER_CUDA_CHECKS", checks)
    run(case, gpu(case) if scheduled else None, backends.cuda)


@BY_NAME
def test_cuda_compiles(case: Case) -> None:
    from luthier.codegen.gpu.nvrtc import library

    try:
        library()
    except TargetError as e:
        pytest.skip(str(e))
    for f in funcs_of(case, gpu(case)):
        assert backends.cubin(f)[:4] == b"\x7fELF"
