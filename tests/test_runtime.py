"""The runtime under a compiled module: threads, fork, concurrent callers, control flow, memory, refusals.

Expected values come from numpy; that results do not depend on the number of threads is checked bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier.errors import CompilationError, InputError
from luthier.ir.dtypes import f32, i64, index
from luthier.ir.expr import Expr, const, load, var
from luthier.ir.loop import Block, Buffer, Call, For, Func, Let, Store, While
from luthier.ir.program import Program
from luthier.module import Module
from luthier.passes.program.plan_memory import plan_memory

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _every_thread_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small as the models here are, all threads take part."""
    monkeypatch.setattr("luthier.codegen.program.sharing.THREAD_WORK", 1)


def model(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[tuple[str, int]], weights: dict[str, Array] | None = None) -> Any:
    initializers = [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()]
    outs = [h.make_tensor_value_info(n, t, None) for n, t in outputs]
    graph = h.make_graph(list(nodes), "test", list(inputs), outs, initializers)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9)


def value(name: str, dtype: int, shape: Sequence[Any]) -> Any:
    return h.make_tensor_value_info(name, dtype, list(shape))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def deep_model(layers: int = 4, width: int = 192) -> tuple[Any, dict[str, Array]]:
    """x -> (tanh(x @ w))..., with a residual every layer: kernels that threads share, with data crossing between them."""
    weights = {f"w{k}": normal(width, width, seed=k) / np.float32(np.sqrt(width)) for k in range(layers)}
    nodes, last = [], "x"
    for k in range(layers):
        nodes += [
            h.make_node("MatMul", [last, f"w{k}"], [f"m{k}"]), h.make_node("Tanh", [f"m{k}"], [f"t{k}"]),
            h.make_node("Add", [f"t{k}", last], [f"a{k}"]), h.make_node("Softmax", [f"a{k}"], [f"s{k}"], axis=0),
        ]  # fmt: skip
        last = f"s{k}"
    nodes.append(h.make_node("Transpose", [last], ["y"], perm=[1, 0]))
    return model(nodes, [value("x", T.FLOAT, ["n", width])], [("y", T.FLOAT)], weights), weights


def deep_reference(x: Array, weights: dict[str, Array]) -> Array:
    v = x.astype(np.float64)
    for w in weights.values():
        v = np.tanh(v @ w.astype(np.float64)) + v
        e = np.exp(v - v.max(0))
        v = e / e.sum(0)
    return v.T


@pytest.fixture(scope="module")
def deep() -> tuple[Any, dict[str, Array]]:
    return deep_model()


def test_results_do_not_depend_on_threads(deep: tuple[Any, dict[str, Array]]) -> None:
    proto, weights = deep
    x = normal(150, 192, seed=9)
    expected = deep_reference(x, weights)
    one = luthier.compile(proto, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(one, expected, rtol=2e-4, atol=1e-6)
    for threads in (2, 3, 5):
        many = luthier.compile(proto, threads=threads)
        for _ in range(10):
            np.testing.assert_array_equal(many.run({"x": x})["y"], one)


def test_one_module_serves_many_shapes(deep: tuple[Any, dict[str, Array]]) -> None:
    """The arena grows and shrinks with the symbolic dimension, 0 included."""
    proto, weights = deep
    module = luthier.compile(proto, threads=2)
    for n in (1, 64, 7, 300, 2):
        x = normal(n, 192, seed=n)
        np.testing.assert_allclose(module.run({"x": x})["y"], deep_reference(x, weights), rtol=2e-4, atol=1e-6)
    assert module.run({"x": normal(0, 192)})["y"].shape == (192, 0)


def test_concurrent_callers(deep: tuple[Any, dict[str, Array]]) -> None:
    proto, _ = deep
    module = luthier.compile(proto, threads=2)
    xs = [normal(20 + 5 * k, 192, seed=k) for k in range(4)]
    expected = [module.run({"x": x})["y"] for x in xs]
    wrong: list[int] = []

    def caller(k: int) -> None:
        for _ in range(25):
            if not np.array_equal(module.run({"x": xs[k]})["y"], expected[k]):
                wrong.append(k)

    callers = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_forked_child_computes(deep: tuple[Any, dict[str, Array]]) -> None:
    """The child has none of the parent's threads and starts its own; the parent's go on."""
    proto, _ = deep
    module = luthier.compile(proto, threads=3)
    x = normal(60, 192)
    expected = module.run({"x": x})["y"]
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if all(np.array_equal(module.run({"x": x})["y"], expected) for _ in range(5)) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_array_equal(module.run({"x": x})["y"], expected)


def _scan_body() -> Any:
    return h.make_graph(
        [h.make_node("Add", ["s", "x"], ["s2"]), h.make_node("Identity", ["cin"], ["cout"]), h.make_node("Tanh", ["s2"], ["slice"])],
        "body", [value("i", T.INT64, []), value("cin", T.BOOL, []), value("s", T.FLOAT, ["n", 3])],
        [value("cout", T.BOOL, []), value("s2", T.FLOAT, ["n", 3]), value("slice", T.FLOAT, ["n", 3])],
    )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
def test_loop(threads: int) -> None:
    node = h.make_node("Loop", ["k", "", "x"], ["y", "ys"], body=_scan_body())
    proto = model([node], [value("x", T.FLOAT, ["n", 3]), value("k", T.INT64, [])], [("y", T.FLOAT), ("ys", T.FLOAT)])
    module = luthier.compile(proto, threads=threads)
    x = normal(5, 3)
    for rounds in (4, 1, 0):
        got = module.run({"x": x, "k": np.array(rounds)})
        states = [x * np.float32(r + 2) for r in range(rounds)]
        np.testing.assert_allclose(got["y"], states[-1] if rounds else x, rtol=1e-6)
        assert got["ys"].shape == (rounds, 5, 3)
        if rounds:
            np.testing.assert_allclose(got["ys"], np.tanh(np.stack(states)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 3])
def test_if(threads: int) -> None:
    then = h.make_graph([h.make_node("Add", ["x", "x"], ["a"])], "then", [], [value("a", T.FLOAT, ["n", 300])])
    other = h.make_graph([h.make_node("MatMul", ["x", "w"], ["b"])], "else", [], [value("b", T.FLOAT, ["n", 300])])
    nodes = [h.make_node("If", ["c"], ["z"], then_branch=then, else_branch=other), h.make_node("Tanh", ["z"], ["y"])]
    w = normal(300, 300) / np.float32(17)
    proto = model(nodes, [value("x", T.FLOAT, ["n", 300]), value("c", T.BOOL, [])], [("y", T.FLOAT)], {"w": w})
    module = luthier.compile(proto, threads=threads)
    x = normal(90, 300)
    for c in (True, False, True):
        want = np.tanh(x + x if c else x.astype(np.float64) @ w)
        np.testing.assert_allclose(module.run({"x": x, "c": np.array(c)})["y"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_extents_read_from_an_input(threads: int) -> None:
    """Reshape to a shape given at run time: the output is allocated when the extents are known."""
    nodes = [h.make_node("Reshape", ["x", "s"], ["z"]), h.make_node("Exp", ["z"], ["y"])]
    proto = model(nodes, [value("x", T.FLOAT, ["n", 4]), value("s", T.INT64, [2])], [("y", T.FLOAT)])
    module = luthier.compile(proto, threads=threads)
    for n, s in ((6, (8, 3)), (6, (2, 12)), (50, (10, 20)), (1, (4, 1))):
        x = normal(n, 4)
        got = module.run({"x": x, "s": np.array(s)})["y"]
        assert got.shape == s
        np.testing.assert_allclose(got, np.exp(x).reshape(s), rtol=1e-5)


def test_refusals_name_the_input_and_the_dimension(deep: tuple[Any, dict[str, Array]]) -> None:
    module = luthier.compile(deep[0], threads=1)
    with pytest.raises(InputError, match=r"input x.*dimension 1 is 191, expected 192"):
        module.run({"x": normal(3, 191)})
    with pytest.raises(InputError, match=r"input x.*rank 3"):
        module.run({"x": normal(3, 192, 1)})
    two = model([h.make_node("Add", ["a", "b"], ["y"])], [value("a", T.FLOAT, ["n", 2]), value("b", T.FLOAT, ["n", 2])], [("y", T.FLOAT)])
    with pytest.raises(InputError, match=r"input b: dimension 0 is 4, expected 3"):
        luthier.compile(two).run({"a": normal(3, 2), "b": normal(4, 2)})


def test_outputs_are_the_callers() -> None:
    """Two calls never share an output, and ``out=`` is written in place."""
    proto = model([h.make_node("Tanh", ["x"], ["y"])], [value("x", T.FLOAT, ["n"])], [("y", T.FLOAT)])
    module = luthier.compile(proto)
    x = normal(1000)
    first = module.run({"x": x})["y"]
    kept = first.copy()
    module.run({"x": -x})
    np.testing.assert_array_equal(first, kept)
    mine = np.empty(1000, np.float32)
    got = module.run({"x": x}, out={"y": mine})["y"]
    assert got is mine
    np.testing.assert_array_equal(mine, kept)


# ---------------------------------------------------------------- hand-made programs


def _fill(name: str, scale: float) -> Func:
    """out[i] = in[i] * scale + 1 over n elements."""
    n, i = var("n"), var("i")
    src, dst = Buffer("p0", f32, (n,), "param", False), Buffer("o0", f32, (n,), "param")
    body = For(i, const(0), n, "parallel", Store(dst, (i,), load(src, [i]) * const(scale, f32) + const(1.0, f32)))
    return Func(name, (src, dst, n), body)


def _chain(length: int) -> tuple[Program, Expr]:
    n = var("n")
    x, y = Buffer("x", f32, (n,), "param", False), Buffer("y", f32, (n,), "param")
    temps = [Buffer(f"t{k}", f32, (n,), "global") for k in range(length - 1)]
    places = [x, *temps, y]
    calls = [Call("step", (a, b, n)) for a, b in zip(places, places[1:])]
    body = Block(tuple(calls))
    return Program("chain", (x,), (y,), {n: (0, 0)}, {}, {"step": _fill("step", 0.5)}, tuple(temps), body), n


def test_slots_are_reused() -> None:
    program, n = _chain(12)
    plan = plan_memory(program)
    assert len(plan.slots) == 2
    assert all(plan.slot_of[f"t{k}"] != plan.slot_of[f"t{k + 1}"] for k in range(10))
    assert plan.offsets()[-1] is plan.slots[0] + plan.slots[1]


@pytest.mark.parametrize("threads", [1, 4])
def test_chain_through_two_slots(threads: int) -> None:
    """Every step reads what other threads wrote and overwrites what others may still read."""
    program, _ = _chain(40)
    module = Module.from_program(program, "cpu", threads)
    x = normal(100_000)
    want = x
    for _ in range(40):
        want = want * np.float32(0.5) + np.float32(1)
    for _ in range(10):
        np.testing.assert_allclose(module.run({"x": x})["y"], want, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 4])
def test_while_with_values_read_from_memory(threads: int) -> None:
    """The trip count lives in memory that thread 0 writes and all threads read; the buffer is carried between rounds."""
    n, k = var("n"), var("k", lo=None)
    x, y = Buffer("x", f32, (n,), "param", False), Buffer("y", f32, (n,), "param")
    rounds, i, t = Buffer("rounds", i64, (const(1),), "param", False), Buffer("i", i64, (const(1),), "global"), Buffer("t", f32, (n,), "global")
    zero = (const(0),)
    body = Block((
        Store(i, zero, const(0, i64)),
        Call("step", (x, y, n)),
        While(load(i, zero) < load(rounds, zero), Block((
            Let(k, load(i, zero).cast(index)),
            Call("step", (y, t, n)),
            Call("step", (t, y, n)),
            Store(i, zero, (k + 1).cast(i64)),
        ))),
    ))  # fmt: skip
    program = Program("loop", (x, rounds), (y,), {n: (0, 0)}, {}, {"step": _fill("step", 0.25)}, (i, t), body)
    module = Module.from_program(program, "cpu", threads)
    a = normal(50_000)
    for r in (0, 1, 7):
        want = a
        for _ in range(2 * r + 1):
            want = want * np.float32(0.25) + np.float32(1)
        np.testing.assert_allclose(module.run({"x": a, "rounds": np.array([r])})["y"], want, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_buffer_of_an_extent_that_the_run_decides(threads: int) -> None:
    """A temporary and an output whose size is read from a tensor, inside a loop in which it grows."""
    n, m, r = var("n"), var("m"), var("r", lo=None)
    zero = (const(0),)
    x, count = Buffer("x", f32, (n,), "param", False), Buffer("count", i64, (const(1),), "param", False)
    y = Buffer("y", f32, (m,), "param")
    t, i = Buffer("t", f32, (m,), "global"), Buffer("i", i64, (const(1),), "global")
    s, u = var("s"), Buffer("u", f32, (var("s"),), "global")
    body = Block((
        Let(m, load(count, zero).cast(index)),
        Call("step", (x, t, m)),
        Call("step", (t, y, m)),
        Store(i, zero, const(1, i64)),
        While(load(i, zero) <= load(count, zero), Block((
            Let(r, load(i, zero).cast(index)),
            Let(s, load(i, zero).cast(index) * const(1)),
            Call("step", (x, u, s)),
            Call("step", (u, y, s)),
            Store(i, zero, (r * 4).cast(i64)),
        ))),
    ))  # fmt: skip
    program = Program("grow", (x, count), (y,), {n: (0, 0)}, {}, {"step": _fill("step", 0.5)}, (t, i, u), body)
    module = Module.from_program(program, "cpu", threads)
    a = normal(70_000)
    for c in (1, 40_000, 5, 70_000):
        want = (a * np.float32(0.5) + 1) * np.float32(0.5) + 1
        got = module.run({"x": a, "count": np.array([c])})["y"]
        assert got.shape == (c,)
        np.testing.assert_allclose(got, want[:c], rtol=1e-6)


def test_unknown_kernels_are_refused() -> None:
    program, _ = _chain(3)
    program.kernels.clear()
    with pytest.raises(CompilationError, match="unknown kernel step"):
        Module.from_program(program)


def test_profile_counts_every_call() -> None:
    program, _ = _chain(5)
    rows = Module.from_program(program, "cpu", 2).profile({"x": normal(100_000)}, runs=3)
    assert len(rows) == 5
    assert all(r["kernel"] == "step" and r["ms"] > 0 and r["bytes"] == 800_000 and r["flops"] == 200_000 for r in rows)


def test_model_without_inputs() -> None:
    proto = model([h.make_node("ConstantOfShape", ["s"], ["y"])], [], [("y", T.FLOAT)], {"s": np.array([2, 3])})
    np.testing.assert_array_equal(luthier.compile(proto).run({})["y"], np.zeros((2, 3), np.float32))


def test_kernels_that_differ_only_in_their_extent() -> None:
    """Equal code under another trip count is one object but two calls."""
    s = normal(96, seed=3)
    nodes = [h.make_node("Mul", ["x", "s"], ["a"]), h.make_node("Mul", ["y", "s"], ["b"])]
    ins = [value("x", T.FLOAT, (529, 96)), value("y", T.FLOAT, (2116, 96))]
    m = luthier.compile(model(nodes, ins, [("a", T.FLOAT), ("b", T.FLOAT)], {"s": s}), threads=2)
    x, y = normal(529, 96, seed=4), normal(2116, 96, seed=5)
    out = m.run({"x": x, "y": y})
    np.testing.assert_array_equal(out["a"], x * s)
    np.testing.assert_array_equal(out["b"], y * s)


def test_small_models_use_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads follows the extents of the call; the results do not."""
    monkeypatch.setattr("luthier.codegen.program.sharing.THREAD_WORK", 20_000)
    program, _ = _chain(6)
    many, one = Module.from_program(program, "cpu", 4), Module.from_program(program, "cpu", 1)
    for n in (1, 500, 3000, 9000, 200_000, 10):
        x = normal(n)
        np.testing.assert_array_equal(many.run({"x": x})["y"], one.run({"x": x})["y"])


@pytest.mark.parametrize("name", ["cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:aarch64"])
def test_compiles_for_other_machines(name: str) -> None:
    """In a process of its own: what LLVM cannot print ends the process."""
    code = f"""
from luthier.codegen.llvm.backend import compile_text
from luthier.codegen.llvm.main import runtime_text
from luthier.codegen.targets.target import parse_target
t = parse_target({name!r})
data = compile_text(runtime_text(t), t)
assert data[:4] == b"\\x7fELF", data[:4]
assert int.from_bytes(data[18:20], "little") == {183 if "aarch64" in name else 62}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
