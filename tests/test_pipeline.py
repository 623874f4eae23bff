"""From graph to program: the program, run by the loop-IR interpreter, equals the graph evaluated with numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from luthier.errors import KernelError
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.interpret.evaluate import evaluate_graph
from luthier.ir.interpret.programs import run_program
from luthier.ir.loop import Call, walk_stmts
from luthier.ir.program import Program
from luthier.pipeline import compile_program
from luthier.schedules.base.capabilities import Capabilities


def check(body: str, feeds: dict[str, Any], opset: int = 20, rtol: float = 1e-5) -> Program:
    """Compile, interpret, compare with the graph as imported."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{body}')
    want, _ = evaluate_graph(import_onnx(model), feeds)
    program = compile_program(import_onnx(model), Capabilities())
    got = run_program(program, feeds)
    assert set(got) == set(want)
    for k in want:
        assert got[k].shape == want[k].shape and got[k].dtype == want[k].dtype
        np.testing.assert_allclose(got[k], want[k], rtol=rtol, atol=1e-6)
    return program


def calls(p: Program) -> list[str]:
    return [s.callee for s in walk_stmts(p.body) if isinstance(s, Call)]


def f32(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_chain_is_one_kernel() -> None:
    p = check("g (float[N, 5] x) => (float[N, 5] y) { a = Relu(x)  b = Exp(a)  c = Neg(b)  y = Add(c, x) }", {"x": f32(3, 5)})
    assert calls(p) == ["relu_exp_neg_add"]


def test_equal_kernels_are_stored_once() -> None:
    p = check(
        "g (float[N, 5] x) => (float[N, 5] y, float[N, 5] a) { a = Exp(x)  y = Exp(a) }", {"x": f32(3, 5)}
    )
    assert len(calls(p)) == 2 and len(p.kernels) == 1


def test_a_view_of_an_output_and_a_view_as_an_output() -> None:
    p = check(
        """g (float[N, 6] x) => (float[M, 3] y, float[N, 6] z) {
          s = Constant<value_ints = [-1, 3]>()  t = Constant<value_ints = [-1, 6]>()
          a = Exp(x)  y = Reshape(a, s)  b = Neg(y)  z = Reshape(b, t) }""",
        {"x": f32(2, 6)},
    )
    assert calls(p) == ["exp", "neg"]


def test_outputs_that_are_inputs_constants_or_twice_the_same() -> None:
    check(
        """g (float[3] x) => (float[3] a, float[2] b, float[3] c, float[3] d) {
          a = Identity(x)  b = Constant<value_floats = [1.0, 2.0]>()  c = Exp(x)  d = Identity(c) }""",
        {"x": f32(3)},
    )


def test_shape_arithmetic_runs_as_scalars() -> None:
    p = check(
        """g (float[N, 6] x) => (float[M, 3] y, int64[2] s) {
          s = Shape(x)  i = Constant<value_int = 0>()  n = Gather(s, i)  two = Constant<value_int = 2>()
          m = Mul(n, two)  ax = Constant<value_ints = [0]>()  u = Unsqueeze(m, ax)  t = Constant<value_ints = [3]>()
          d = Concat<axis = 0>(u, t)  r = Reshape(x, d)  y = Neg(r) }""",
        {"x": f32(4, 6)},
    )
    assert calls(p) == ["neg"]


def test_a_shape_known_only_at_run_time() -> None:
    check("g (float[N] x, int64[2] s) => (float[A, B] y) { e = Exp(x)  r = Reshape(e, s)  y = Neg(r) }", {"x": f32(6), "s": np.array([2, 3], np.int64)})


@pytest.mark.parametrize("flag", [True, False])
def test_if_with_equal_shapes(flag: bool) -> None:
    check(
        """g (bool c, float[N] x) => (float[N] y, float[N] z) {
             h = Abs(x)
             y, z = If(c) <then_branch = t () => (float[N] a, float[N] p) { a = Neg(h)  p = Identity(x) },
                           else_branch = e () => (float[N] b, float[N] q) { b = Exp(h)  q = Exp(b) }>
           }""",
        {"c": np.array(flag), "x": f32(4)},
    )


@pytest.mark.parametrize("flag", [True, False])
def test_if_with_different_extents(flag: bool) -> None:
    check(
        """g (bool c, float[N] x) => (float[M] w) {
             y = If(c) <then_branch = t () => (float[A] a) { a = Concat<axis = 0>(x, x) }, else_branch = e () => (float[B] b) { b = Exp(x) }>
             w = Neg(y)
           }""",
        {"c": np.array(flag), "x": f32(4)},
    )


def test_nested_if() -> None:
    body = """g (bool c, bool d, float[N] x) => (float[N] y) {
         y = If(c) <then_branch = t () => (float[N] a) {
               a = If(d) <then_branch = tt () => (float[N] p) { p = Neg(x) }, else_branch = te () => (float[N] q) { q = Exp(x) }> },
             else_branch = e () => (float[N] b) { b = Abs(x) }> }"""
    for c in (True, False):
        for d in (True, False):
            check(body, {"c": np.array(c), "d": np.array(d), "x": f32(3)})


@pytest.mark.parametrize("n", [0, 1, 4])
def test_loop_with_state_and_slices(n: int) -> None:
    check(
        """g (int64 n, float[3] x) => (float[3] y, float[K, 3] s) <bool on = {1}> {
             y, s = Loop(n, on, x) <body = b (int64 i, bool c, float[3] v) => (bool d, float[3] w, float[3] o) {
               d = Identity(c)  w = Mul(v, v)  o = Neg(w) }>
           }""",
        {"n": np.array(n, np.int64), "x": f32(3) * 0.5},
    )


def test_loop_that_stops_by_itself() -> None:
    check(
        """g (float[3] x) => (float[3] y) <int64 n = {20}, bool on = {1}> {
             y = Loop(n, on, x) <body = b (int64 i, bool c, float[3] v) => (bool d, float[3] w) {
               k = Constant<value_int = 3>()  d = Less(i, k)  w = Add(v, v) }>
           }""",
        {"x": f32(3)},
    )


def test_loop_that_swaps_its_states() -> None:
    check(
        """g (float[3] x, float[3] z) => (float[3] y, float[3] w) <int64 n = {3}, bool on = {1}> {
             y, w = Loop(n, on, x, z) <body = b (int64 i, bool c, float[3] p, float[3] q) => (bool d, float[3] r, float[3] s) {
               d = Identity(c)  r = Identity(q)  s = Identity(p) }>
           }""",
        {"x": f32(3), "z": f32(3, seed=1)},
    )


@pytest.mark.parametrize(("axis_in", "axis_out", "back"), [(0, 0, 0), (1, 1, 0), (0, 1, 1)])
def test_scan(axis_in: int, axis_out: int, back: int) -> None:
    width = 4 if axis_in == 0 else 3
    check(
        f"""g (float[{width}] h, float[3, 4] x) => (float[{width}] y, float[A, B] s) {{
             y, s = Scan(h, x)
               <num_scan_inputs = 1, scan_input_axes = [{axis_in}], scan_output_axes = [{axis_out}], scan_input_directions = [{back}], body = b (float[{width}] st, float[{width}] e) => (float[{width}] n, float[{width}] o) {{ n = Add(st, e)  o = Identity(n) }}>
           }}""",
        {"h": f32(width), "x": f32(3, 4, seed=1)},
    )


def test_values_nobody_reads_have_no_kernel() -> None:
    p = check("g (float[3] x) => (float[3] y) { a = Exp(x)  b = Abs(a)  y = Neg(x) }", {"x": f32(3)})
    assert calls(p) == ["neg"]


def test_dump_writes_what_each_pass_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_DUMP", str(tmp_path / "d"))
    check("g (float[3] x) => (float[3] y) { a = Identity(x)  y = Exp(a) }", {"x": f32(3)})
    names = sorted(p.name for p in (tmp_path / "d").iterdir() if p.is_file())
    assert names[0].endswith("import.txt") and any("canonicalize" in n for n in names) and names[-1].endswith("program.txt")


RANKS = """g (float[N, M] x) => (float[N] z) {
     s = Shape(x)  i = Constant<value_int = 1>()  n = Gather(s, i)  one = Constant<value_int = 1>()  c = Equal(n, one)  ax = Constant<value_ints = [1]>()
     y = If(c) <then_branch = t () => (float[N] a) { a = Squeeze(x, ax) }, else_branch = e () => (float[N, M] b) { b = Identity(x) }>
     z = Neg(y)
   }"""


def test_an_if_that_decides_a_rank_is_checked_at_run_time() -> None:
    program = check(RANKS, {"x": f32(4, 1)})
    with pytest.raises(KernelError, match="is 2, the model needs 1"):
        run_program(program, {"x": f32(4, 2)})


def test_a_branch_that_does_not_fit_the_shapes_is_left_out_and_checked() -> None:
    body = """g (bool c, float[4] x) => (float[2, 2] y) {
         y = If(c) <then_branch = t () => (float[2, 2] a) { s = Constant<value_ints = [2, 2]>()  a = Reshape(x, s) },
                    else_branch = e () => (float[2, 2] b) { k = Constant<value_ints = [3, 3]>()  b = Reshape(x, k) }> }"""
    program = check(body, {"c": np.array(True), "x": f32(4)})
    with pytest.raises(KernelError, match="condition"):
        run_program(program, {"c": np.array(False), "x": f32(4)})


@pytest.mark.parametrize("size", [6, 64])
def test_a_rotary_embedding_is_rotated_right_by_the_compiled_module(size: int) -> None:
    h = size // 2
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3, S, {size}] x, float[S, {size}] c, float[S, {size}] s) => (float[2, 3, S, {size}] y) {{
      l = Constant<value_ints = [{h}, {h}]>()  a, b = Split<axis = -1>(x, l)  nb = Neg(b)  r = Concat<axis = -1>(nb, a)
      p = Mul(x, c)  q = Mul(r, s)  y = Add(p, q) }}"""
    import luthier

    rng = np.random.default_rng(5)
    x, c, s = (rng.standard_normal(d).astype(np.float32) for d in ((2, 3, 7, size), (7, size), (7, size)))
    module = luthier.compile(onnx.parser.parse_model(text))
    assert len(module.manifest["calls"]) == 1
    want = x * c + np.concatenate([-x[..., h:], x[..., :h]], axis=-1) * s
    np.testing.assert_allclose(module.run({"x": x, "c": c, "s": s})["y"], want, rtol=1e-5, atol=1e-6)
