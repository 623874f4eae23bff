"""Nothing is read before it is written, nothing is left unwritten: what runs under LUTHIER_DEBUG=poison is as right as without."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

import luthier
from luthier.codegen.targets.target import parse_target
from luthier.ir.dtypes import f32
from luthier.ir.expr import const, load, var
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, Store, block
from luthier.ir.program import Program
from luthier.module import Module
from luthier.passes.program.poison_memory import poison_memory
from luthier.schedules.select import build
from tests import test_loops, test_open_extents, test_sequences
from tests.conformance.test_sample import PASSING, run
from tests.test_loops import need

N = 16


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_DEBUG", "poison")


def leaving(what: str) -> Program:
    """A program that leaves every second element of its output, of a temporary, or of a local array unwritten, and copies it."""
    x, y, t = Buffer("x", f32, (const(N),), "param", False), Buffer("y", f32, (const(N),), "param"), Buffer("t", f32, (const(N),), "global")
    i, j = var("i", lo=0, hi=N - 1), var("j", lo=0, hi=N // 2 - 1)
    a, o, w = Buffer("a", f32, (const(N),), "param", False), Buffer("o", f32, (const(N),), "param"), Buffer("w", f32, (const(N),), "local")
    half = Func("half", (a, o), For(j, const(0), const(N // 2), "serial", Store(o, (j * 2,), load(a, [j * 2]))))
    whole = Func("whole", (a, o), For(i, const(0), const(N), "serial", Store(o, (i,), load(a, [i]))))
    fill = For(j, const(0), const(N // 2), "serial", Store(w, (j * 2,), load(a, [j * 2])))
    inside = Func("inside", (a, o), Alloc(w, block(fill, For(i, const(0), const(N), "serial", Store(o, (i,), load(w, [i]))))))
    body = {
        "output": block(Call("half", (x, y))), "temporary": block(Call("half", (x, t)), Call("whole", (t, y))), "local": block(Call("inside", (x, y))),
    }[what]  # fmt: skip
    return Program("p", (x,), (y,), {}, {}, {f.name: f for f in (half, whole, inside)}, (t,), body, nodes={0: ("n",), 1: ("m",)})


@pytest.mark.parametrize("target", ["cpu", "wasm"])
@pytest.mark.parametrize("what", ["output", "temporary", "local"])
def test_what_is_left_unwritten_shows(what: str, target: str) -> None:
    need(target)
    chosen = parse_target(target)
    program = poison_memory(leaving(what), lambda c: build(c, chosen.caps).funcs)
    x = np.arange(N, dtype=np.float32)
    module = Module.from_program(program, chosen, 1)
    for _ in range(2):
        y = module.run({"x": x})["y"]
        np.testing.assert_array_equal(y[::2], x[::2])
        assert np.isnan(y[1::2]).all()


def test_profiles_still_name_the_nodes(poisoned: None) -> None:
    module = luthier.compile(onnx.parser.parse_model('<ir_version: 9, opset_import: ["": 18]> g (float[64] x) => (float[1] y) { a = Exp(x)  y = ReduceSum(a) }'))
    x = np.zeros(64, np.float32)
    rows = module.profile({"x": x}, 1)
    assert [r["nodes"] for r in rows if not r["nodes"][0].startswith("poison")] and any(r["nodes"][0].startswith("poison") for r in rows)
    np.testing.assert_array_equal(module.run({"x": x})["y"], [64])


@pytest.mark.parametrize("seed", range(8))
def test_random_models(seed: int, poisoned: None) -> None:
    drawn: list[Callable[[int], None]] = [
        test_loops.test_random_loops, test_sequences.test_random_sequences, lambda k: test_open_extents.test_random_graph("cpu", k),
        lambda k: test_open_extents.test_random_graph("wasm", k),
    ]  # fmt: skip

    drawn[seed % 4](300 + seed)


def test_a_sample_of_the_suite(tmp_path: Path, poisoned: None) -> None:
    names = random.Random(5).sample(sorted(PASSING), 32)
    (tmp_path / "tests.txt").write_text("\n".join(names))
    rows = run(tmp_path, "--tests", str(tmp_path / "tests.txt"))
    assert [f"{n}: {rows[n]['status']} {rows[n]['message']}" for n in names if rows[n]["status"] != "pass"] == []
