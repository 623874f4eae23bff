"""Random programs: machine code with several threads against the interpreter, which knows neither slots, nor threads, nor waits."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from luthier.ir.dtypes import f32, i64, index
from luthier.ir.expr import Expr, const, load, var
from luthier.ir.interpret.programs import run_program
from luthier.ir.loop import Block, Buffer, Call, For, Func, If, Let, Stmt, Store, While
from luthier.ir.program import Program
from luthier.module import Module

ZERO = (const(0),)


@pytest.fixture(autouse=True)
def _share_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.codegen.program.sharing.THREAD_WORK", 1)
    monkeypatch.setattr("luthier.codegen.program.sharing.SMALL_WORK", 0)


def mix(kind: str) -> Func:
    """o[i] = a[i] / 2 + b[n - 1 - i], so that a chunk reads what other chunks wrote; ``kind``: the loop's."""
    n, i = var("n"), var("i")
    a, b = Buffer("p0", f32, (n,), "param", False), Buffer("p1", f32, (n,), "param", False)
    o = Buffer("o0", f32, (n,), "param")
    value = load(a, [i]) * const(0.5, f32) + load(b, [n - 1 - i])
    return Func(f"mix_{kind}", (a, b, o, n), For(i, const(0), n, kind, Store(o, (i,), value)))


def random_program(seed: int) -> Program:
    """Calls over ``n`` elements, in branches and counted loops, over temporaries, views and an extent read from memory."""
    r = random.Random(seed)
    n, m = var("n"), var("m")
    x, flags = Buffer("x", f32, (n,), "param", False), Buffer("flags", i64, (const(4),), "param", False)
    outs = [Buffer("y0", f32, (n,), "param"), Buffer("y1", f32, (m,), "param")]
    temps: list[Buffer] = []
    views: dict[str, tuple[str, Expr]] = {}
    counter = 0

    def fresh(size: Expr) -> Buffer:
        b = Buffer(f"t{len(temps)}", f32, (size,), "global")
        temps.append(b)
        return b

    def call(a: Buffer, b: Buffer, o: Buffer, size: Expr) -> Call:
        return Call(r.choice(("mix_parallel", "mix_parallel", "mix_serial")), (a, b, o, size))

    def block(ready: list[Buffer], depth: int, size: Expr) -> list[Stmt]:
        """Statements; ``ready``: tensors that have a value, extended by those that have one afterwards."""
        nonlocal counter
        out: list[Stmt] = []
        for _ in range(r.randint(2, 6)):
            what = r.random()
            if what < 0.15 and depth < 2:
                target = fresh(size)
                sides = []
                for _ in range(2):
                    mine = list(ready)
                    inner = block(mine, depth + 1, size)
                    sides.append(Block((*inner, call(r.choice(mine), r.choice(mine), target, size))))
                out.append(If(load(flags, [const(r.randint(0, 3))]) < const(r.randint(0, 3), i64), sides[0], sides[1]))
                ready.append(target)
            elif what < 0.3 and depth < 2:
                i = Buffer(f"i{counter}", i64, (const(1),), "global")
                counter += 1
                temps.append(i)
                state, other = fresh(size), fresh(size)
                out += [Store(i, ZERO, const(0, i64)), call(r.choice(ready), r.choice(ready), state, size)]
                k = var(f"k{counter}", lo=None)
                mine = [*ready, state]
                inner = block(mine, depth + 1, size)
                body = [
                    Let(k, load(i, ZERO).cast(index)), *inner, call(r.choice(mine), state, other, size),
                    call(other, r.choice(ready), state, size), Store(i, ZERO, (k + 1).cast(i64)),
                ]  # fmt: skip
                out.append(While(load(i, ZERO) < load(flags, [const(r.randint(0, 3))]), Block(tuple(body))))
                ready.append(state)
            elif what < 0.4:
                source = r.choice([b for b in ready if b.scope == "global"] or [fresh(size)])
                if source in ready:
                    view = Buffer(f"v{len(views)}", f32, (size,), "global")
                    views[view.name] = (views.get(source.name, (source.name, const(0)))[0], const(0))
                    ready.append(view)
            else:
                target = fresh(size)
                out.append(call(r.choice(ready), r.choice(ready), target, size))
                ready.append(target)
                if len(ready) > 4 and r.random() < 0.5:
                    ready.pop(r.randrange(1, len(ready) - 1))
        return out

    ready = [x]
    body = block(ready, 0, n)
    body.append(call(ready[-1], r.choice(ready), outs[0], n))
    body.append(Let(m, load(flags, [const(3)]).cast(index)))
    late = [x, ready[-1]]
    body += block(late, 1, m)
    body.append(call(late[-1], r.choice(late), outs[1], m))
    kernels = {f.name: f for f in (mix("parallel"), mix("serial"))}
    return Program(f"random{seed}", (x, flags), tuple(outs), {n: (0, 0)}, {}, kernels, tuple(temps), Block(tuple(body)), views)


@pytest.mark.parametrize("seed", range(12))
def test_random_program(seed: int) -> None:
    program = random_program(seed)
    feeds: list[dict[str, Any]] = []
    generator = np.random.default_rng(seed)
    for n, count in ((37, 37), (12, 5), (64, 20)):
        flags = np.array([*generator.integers(0, 4, 3), count])
        feeds.append({"x": generator.standard_normal(n, dtype=np.float32), "flags": flags})
    expected = [run_program(program, f) for f in feeds]
    for threads in (1, 2, 5):
        module = Module.from_program(program, "cpu", threads)
        for _ in range(10):
            for f, want in zip(feeds, expected):
                got = module.run(f)
                for name in want:
                    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=f"{name}, {threads} threads")
