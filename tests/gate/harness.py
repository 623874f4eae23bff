"""Running a gate case on any backend: lower, allocate what lies between the kernels, run them in order, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType
from luthier.ir.expr import Expr, free_vars, substitute
from luthier.ir.interpret.loops import evaluate_expr, run_func, storage
from luthier.ir.loop import Block, Buffer, Call, Func, Let, Stmt, stmts_of
from luthier.ir.program import Program
from luthier.schedules.base.lower import lower
from luthier.schedules.base.schedule import Schedule, schedule
from tests.gate.kernels import Arrays, Case

Runner = Callable[[Func, Mapping[str, Any], Mapping[str, int]], None]


def funcs_of(case: Case, sched: Callable[[Schedule], Schedule] | None = None) -> list[Func]:
    """All kernels of a case in the order in which they run, packing jobs first."""
    if case.program is not None:
        return list(case.program.kernels.values())
    if case.compute is None:
        return list(case.funcs)
    s = schedule(case.compute)
    if sched is not None:
        s = sched(s)
    return [f for p in s.packed.values() for f in lower(schedule(p.job))] + lower(s)


def extents(b: Buffer, env: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(evaluate_expr(e, {v: env[v.attr[0]] for v in free_vars(e)})) for e in b.shape)


def fresh(d: DType, shape: tuple[int, ...]) -> Any:
    """Poisoned memory: a kernel that forgets to write shows."""
    st = storage(d)
    if d.is_float:
        return np.full(shape, np.nan).astype(st)
    return np.ones(shape, st)


def run_case(case: Case, funcs: list[Func], inputs: Arrays, runner: Runner) -> Arrays:
    """Outputs by name. ``runner(func, arrays, scalars)`` executes one kernel and changes the arrays in place."""
    if case.program is not None:
        return run_program(case.program, {f.name: f for f in funcs}, inputs, runner)
    arrays: Arrays = {k: v.copy() for k, v in inputs.items()}
    env: dict[str, int] = dict(case.dims)
    for f in funcs:
        for b in f.buffers:
            if b.name in arrays and arrays[b.name].ndim == b.rank:
                for e, n in zip(b.shape, arrays[b.name].shape, strict=True):
                    if e.op == "var":
                        env[e.attr[0]] = n
    for f in funcs:
        for b in f.buffers:
            if b.name not in arrays:
                arrays[b.name] = fresh(b.dtype, extents(b, env))
        runner(f, {b.name: arrays[b.name] for b in f.buffers}, {v.attr[0]: env[v.attr[0]] for v in f.scalars})
    return arrays


def run_program(p: Program, kernels: Mapping[str, Func], inputs: Arrays, runner: Runner) -> Arrays:
    """A Program of Calls and Lets; buffers appear when their dimensions are known, views share their base's memory."""
    arrays: Arrays = {k: v.copy() for k, v in inputs.items()}
    env: dict[Expr, int] = {}

    def value(e: Expr) -> int:
        return int(evaluate_expr(substitute(e, {}), {**env, **{n: a for n, a in arrays.items()}}))

    def array(b: Buffer) -> Any:
        if b.name not in arrays:
            shape = tuple(value(e) for e in b.shape)
            if b.name in p.views:
                base, off = p.views[b.name]
                flat = arrays[base].reshape(-1)[value(off) :]
                arrays[b.name] = flat[: int(np.prod(shape))].reshape(shape)
            else:
                arrays[b.name] = fresh(b.dtype, shape)
        return arrays[b.name]

    def go(s: Stmt) -> None:
        if isinstance(s, Block):
            for c in stmts_of(s):
                go(c)
        elif isinstance(s, Let):
            env[s.var] = value(s.value)
        elif isinstance(s, Call):
            f = kernels[s.callee]
            bufs = [a for a in s.args if isinstance(a, Buffer)]
            vals = [value(a) for a in s.args if isinstance(a, Expr)]
            runner(f, {x.name: array(y) for x, y in zip(f.buffers, bufs, strict=True)}, {v.attr[0]: n for v, n in zip(f.scalars, vals, strict=True)})
        else:
            raise TypeError(f"the gate's programs have no {type(s).__name__}")

    go(p.body)
    return arrays


def interpret(f: Func, arrays: Mapping[str, Any], scalars: Mapping[str, int]) -> None:
    run_func(f, arrays, scalars)


def check(case: Case, got: Arrays, want: Arrays) -> float:
    """Largest error relative to the largest value of each output; raises AssertionError where it is above the case's bound."""
    worst = 0.0
    for name, w in want.items():
        g = got[name].astype(np.float64).reshape(w.shape)
        if w.dtype.kind in "iu":
            np.testing.assert_array_equal(g, w, err_msg=f"{case.name}.{name}")
            continue
        assert np.isfinite(g).all(), f"{case.name}.{name} is not finite"
        err = float(np.abs(g - w).max() / max(np.abs(w).max(), 1e-30))
        assert err <= case.tol, f"{case.name}.{name}: error {err:.3g} above {case.tol:.3g}"
        worst = max(worst, err)
    return worst
