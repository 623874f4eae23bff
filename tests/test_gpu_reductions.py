"""Reductions, positions of extreme values and running sums on GPUs: right over any axis and any length, and no thread that goes on for long.

llvmpipe ends a thread after 65,535 rounds of its loops without a word, so that a long serial loop there is a wrong number.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier.backends import webgpu_device
from luthier.backends.webgpu_module import WebGpuModule
from luthier.codegen.targets.webgpu import CAPS
from luthier.errors import KernelError, TargetError
from luthier.ir.compute import Axis, Compute, Fold, Pull, State, axis
from luthier.ir.dtypes import f32
from luthier.ir.expr import const, free_vars, load, loads, maximum, var
from luthier.ir.interpret.computes import evaluate
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.loop import Block, Buffer, For, Func, If, Let, Stmt, Store, block, children
from luthier.passes.gpu.count_rounds import count_rounds
from luthier.schedules import select
from luthier.schedules.base.split_scan import split_scan

Array = np.ndarray[Any, Any]
ENDS = 65535  # rounds


@pytest.fixture(scope="module")
def adapter() -> None:
    pytest.importorskip("wgpu")
    from luthier.backends.webgpu_device import device

    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))


def one_node(op: str, shape: Sequence[int | str], inputs: dict[str, Array] | None = None, dtype: int = T.FLOAT, **attrs: Any) -> onnx.ModelProto:
    inits = [numpy_helper.from_array(a, n) for n, a in (inputs or {}).items()]
    g = h.make_graph([h.make_node(op, ["x", *(inputs or {})], ["y"], **attrs)], "g", [h.make_tensor_value_info("x", dtype, list(shape))], [h.make_empty_tensor_value_info("y")], inits)
    return onnx.shape_inference.infer_shapes(h.make_model(g, opset_imports=[h.make_opsetid("", 18)], ir_version=8))


def build(m: onnx.ModelProto) -> WebGpuModule:
    r = luthier.compile(m, target="webgpu")
    assert isinstance(r, WebGpuModule)
    return r


def axes(*a: int) -> dict[str, Array]:
    return {"axes": np.array(a, np.int64)}


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def normalized(x: Array, over: tuple[int, ...]) -> Array:
    return (x - x.mean(over, keepdims=True)) / np.sqrt(x.var(over, keepdims=True) + 1e-5)


# name -> (model, shape, what numpy says in f64, error in units of the largest result)
CASES: dict[str, tuple[onnx.ModelProto, tuple[int, ...], Any, float]] = {
    "softmax of channels": (one_node("Softmax", [1, 21, 64, 64], axis=1), (1, 21, 64, 64), lambda x: softmax(x, 1), 1e-6),
    "softmax of channels, open": (one_node("Softmax", [1, 21, "h", "w"], axis=1), (1, 21, 30, 50), lambda x: softmax(x, 1), 1e-6),
    "softmax across memory, few rows": (one_node("Softmax", [2, 3000, 9], axis=1), (2, 3000, 9), lambda x: softmax(x, 1), 1e-6),
    "softmax of the outermost axis": (one_node("Softmax", [90, 70, 70], axis=0), (90, 70, 70), lambda x: softmax(x, 0), 1e-6),
    "softmax of a long row": (one_node("Softmax", [1, 151936], axis=1), (1, 151936), lambda x: softmax(x, 1), 2e-6),
    "sum of all": (one_node("ReduceSum", [700, 1100], keepdims=0), (700, 1100), np.sum, 1e-6),
    "sum of all, one axis, odd": (one_node("ReduceSum", [777777], keepdims=1), (777777,), lambda x: x.sum(keepdims=True), 1e-6),
    "sum of all, open": (one_node("ReduceSum", ["n", "m"], keepdims=0), (301, 997), np.sum, 1e-6),
    "mean of all": (one_node("ReduceMean", [3, 100, 400], keepdims=0), (3, 100, 400), np.mean, 1e-6),
    "norm of few rows": (one_node("ReduceL2", [2, 70001], axes(1), keepdims=0), (2, 70001), lambda x: np.sqrt((x * x).sum(1)), 1e-6),
    "product of few": (one_node("ReduceProd", [40000], keepdims=0), (40000,), np.prod, 1e-4),
    "largest of all": (one_node("ReduceMax", [200, 300, 4], keepdims=0), (200, 300, 4), np.max, 0),
    "columns": (one_node("ReduceSum", [70000, 3], axes(0), keepdims=0), (70000, 3), lambda x: x.sum(0), 1e-6),
    "many columns": (one_node("ReduceMean", [300, 5000], axes(0), keepdims=0), (300, 5000), lambda x: x.mean(0), 1e-6),
    "outer and inner": (one_node("ReduceSum", [300, 7, 200], axes(0, 2), keepdims=0), (300, 7, 200), lambda x: x.sum((0, 2)), 1e-6),
    "pooling of all": (one_node("GlobalAveragePool", [1, 2, 400, 200]), (1, 2, 400, 200), lambda x: x.mean((2, 3), keepdims=True), 1e-6),
    "one long row normalised": (one_node("LayerNormalization", [1, 50000], {"s": np.ones(50000, np.float32)}), (1, 50000), lambda x: normalized(x, (1,)), 2e-6),
    "three planes normalised": (
        one_node("InstanceNormalization", [1, 3, 200, 300], {"s": np.ones(3, np.float32), "b": np.zeros(3, np.float32)}), (1, 3, 200, 300), lambda x: normalized(x, (2, 3)), 2e-6,
    ),
    "position in a long row": (one_node("ArgMax", [1, 151936], axis=1, keepdims=0), (1, 151936), lambda x: x.argmax(1), 0),
    "position, open": (one_node("ArgMin", ["n", "m"], axis=1, keepdims=0), (3, 70001), lambda x: x.argmin(1), 0),
    "position across memory": (one_node("ArgMax", [1, 50, 70, 60], axis=1, keepdims=0), (1, 50, 70, 60), lambda x: x.argmax(1), 0),
    "position in a column": (one_node("ArgMax", [70000, 3], axis=0, keepdims=1), (70000, 3), lambda x: x.argmax(0)[None], 0),
    "last position": (one_node("ArgMax", [2, 40000], axis=1, keepdims=0, select_last_index=1), (2, 40000), lambda x: 39999 - x[:, ::-1].argmax(1), 0),
    "running sum": (one_node("CumSum", [200000], {"k": np.array(0)}), (200000,), np.cumsum, 1e-5),
    "running sum from the end, without its own": (
        one_node("CumSum", [70000, 2], {"k": np.array(0)}, reverse=1, exclusive=1), (70000, 2), lambda x: np.cumsum(x[::-1], 0)[::-1] - x, 1e-5,
    ),
    "running sum, open": (one_node("CumSum", ["n", "m"], {"k": np.array(1)}), (3, 70001), lambda x: np.cumsum(x, 1), 1e-5),
    "running sum of a short open row": (one_node("CumSum", ["n", "m"], {"k": np.array(1)}), (5, 7), lambda x: np.cumsum(x, 1), 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name: str, adapter: None) -> None:
    m, shape, want, error = CASES[name]
    x = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    if m.graph.node[0].op_type.startswith("Arg"):
        x = np.round(x * 8) / 8  # many are equal: the first one counts, or the last one
    if m.graph.node[0].op_type == "ReduceProd":
        x = (1 + x * 1e-3).astype(np.float32)
    got = build(m).run({"x": x})["y"]
    expected = np.asarray(want(x.astype(np.float64)))
    assert got.shape == expected.shape
    # the sum that a result was made of is as large as the numbers in it, not as the result
    scale = max(1.0, float(np.abs(expected).max())) * (math.sqrt(x.size) if "um" in name else 1.0)
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=0, atol=error * scale)


def rounds(s: Stmt, env: dict[Any, int]) -> int:
    """Most rounds of serial loops that one thread goes through."""
    if isinstance(s, Let):
        if s.var.dtype.is_index and s.var.dtype.lanes == 1 and free_vars(s.value) <= env.keys() and not loads(s.value):
            env[s.var] = int(evaluate_expr(s.value, env))
        return 0
    if isinstance(s, Block):
        return sum(rounds(c, env) for c in s.stmts)
    if isinstance(s, If):
        return max(rounds(c, env) for c in (s.then, s.orelse) if c is not None)
    if isinstance(s, For):
        n = int(evaluate_expr(s.hi, env)) - int(evaluate_expr(s.lo, env))
        env[s.var] = 0
        inside = rounds(s.body, env)
        return inside if "." in s.kind else n * (1 + inside)
    return sum(rounds(c, env) for c in children(s))


@pytest.mark.parametrize("name", CASES)
def test_no_thread_goes_on_for_long(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, shape, _, _ = CASES[name]
    made: list[Func] = []
    finish = select.finish

    def note(*args: Any, **kw: Any) -> Any:
        k = finish(*args, **kw)
        made.extend(k.funcs)
        return k

    monkeypatch.setattr(select, "finish", note)
    build(m)
    assert made
    for f in made:
        most = rounds(f.body, dict.fromkeys(f.scalars, max(shape)))
        assert most < ENDS // 8, (f.name, most)


def test_a_scan_in_blocks_is_the_scan() -> None:
    """Every step of the rewritten Compute, by the interpreter of Computes."""
    x, y = Buffer.of("x", f32, (3, 1100)), Buffer("y", f32, (const(3), const(1100)), "global")
    for reverse in (False, True):
        for exclusive in (False, True):
            r, t = axis("r", 3), axis("t", 1100)
            acc = Buffer("acc", f32, (const(3),), "global")
            before = load(acc, [r.var])
            after = before + load(x, [r.var, t.var]) * 2.0
            scan = Fold("scan", t, (State(acc, (r,), const(0.0, f32), after),), (), (Pull(y, (r, t), before if exclusive else after),), reverse, (r,))
            c = Compute("c", (x,), (), (scan,), ("y",))
            cut = split_scan(c)
            assert len(cut.lets) == 4
            data = np.random.default_rng(0).integers(-8, 8, (3, 1100)).astype(np.float32)
            want, got = (evaluate(q, {"x": data})["y"] for q in (c, cut))
            np.testing.assert_array_equal(got, want)


def test_what_is_no_sum_stays_a_scan() -> None:
    x, y = Buffer.of("x", f32, (5000,)), Buffer("y", f32, (const(5000),), "global")
    t: Axis = axis("t", 5000)
    acc = Buffer("acc", f32, (), "global")
    before = load(acc, [])
    for after in (maximum(before * 0.5, load(x, [t.var])), before + before * load(x, [t.var])):
        c = Compute("c", (x,), (), (Fold("scan", t, (State(acc, (), const(0.0, f32), after),), (), (Pull(y, (t,), after),)),), ("y",))
        assert split_scan(c) is c
    short = axis("t", 500)
    z = Buffer("z", f32, (const(500),), "global")
    after = before + load(x, [short.var])
    c = Compute("c", (x,), (), (Fold("scan", short, (State(acc, (), const(0.0, f32), after),), (), (Pull(z, (short,), after),)),), ("z",))
    assert split_scan(c) is c and CAPS.gpu


# ---------------------------------------------------------------- what still takes many rounds


def test_rounds_of_a_kernel() -> None:
    n, m = var("n", lo=1), var("m", lo=1)
    x = Buffer.of("x", f32, (n, m))
    b, i, j, k = var("b", lo=0, hi=n - 1), var("i", lo=0, hi=m - 1), var("j", lo=0), var("k", lo=0)
    store = Store(x, (b, i), const(0.0, f32))
    triangle = For(i, const(0), m, "serial", For(j, const(0), i, "serial", store))
    tail = For(k, const(0), const(7), "serial", store)
    f = Func("f", (x, n, m), For(b, const(0), n, "block.x", block(triangle, If(b < 3, tail))))
    got = count_rounds(f)
    assert free_vars(got) == {m}
    assert int(evaluate_expr(got, {m: 50})) == 50 * 50 + 7  # the last round of i has 49 of j


def test_a_thread_that_takes_too_many(adapter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names the node where the adapter ends loops, and only for lengths that need so many; the right answer elsewhere."""
    m = one_node("NonZero", ["n"])
    m.graph.node[0].name = "places"
    x = np.zeros(90000, np.float32)
    x[[5, 70000]] = 1
    monkeypatch.setattr(webgpu_device, "ends_loops", lambda: True)
    r = build(m)
    np.testing.assert_array_equal(r.run({"x": x[:9000]})["y"], [[5]])
    with pytest.raises(KernelError, match="rounds in one thread") as e:
        r.run({"x": x})
    assert e.value.node == "places"
    monkeypatch.undo()
    if not webgpu_device.ends_loops():
        np.testing.assert_array_equal(build(m).run({"x": x})["y"], [[5, 70000]])
    assert all(s[0] != "rounds" for s in build(CASES["sum of all"][0]).host["body"])


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_thread_that_takes_too_many_in_javascript(tmp_path: Path) -> None:
    build(one_node("NonZero", ["n"])).save(tmp_path / "p")
    assert "g.rounds((d_n * 2), " in (tmp_path / "p" / "program.js").read_text()
    (tmp_path / "run.mjs").write_text(
        """import { Recorder } from "./p/runtime/gpu_recorder.js";
import { loops } from "./p/program.js";
const said = [];
for (const [n, endsLoops] of [[65535, true], [65536, true], [1e9, false]]) {
  try { Recorder.prototype.rounds.call({ engine: { endsLoops } }, n, "places"); said.push("ran"); } catch (e) { said.push(`${e.code} ${e.message}`); }
}
console.log(JSON.stringify([said, loops.answer]));
"""
    )
    done = subprocess.run(["node", str(tmp_path / "run.mjs")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (first, second, third), answer = json.loads(done.stdout)
    assert first == third == "ran" and second.startswith("LONG_LOOP places takes 65536 rounds")
    n = 0
    for _ in range(70000):
        n = (n * 1664525 + 1013904223) & 0xFFFFFFFF
    assert n == answer
