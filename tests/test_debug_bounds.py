"""Nothing leaves its buffer: checked modules (``debug="bounds"``) report an index out of range, unchecked ones clamp what comes from
data and refuse extents that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

import luthier
from luthier.cli.commands import entry
from luthier.cli.commands import luthier as command
from luthier.codegen.targets.backend import all_backends
from luthier.errors import InputError, KernelError, SettingError, TargetError
from luthier.ir.dtypes import f32, i64, index
from luthier.ir.expr import Expr, bcast, cast, const, load, ramp, var, vreduce
from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, Let, Stmt, Store, While, block
from luthier.ir.ops import gather
from luthier.ir.program import Program
from luthier.ir.verify import verify
from luthier.module import Module
from luthier.passes.loop.check_bounds import check_bounds, is_checked
from tests.replay.models import MODELS, model

Golden = Callable[[str, str], None]
N = 64
n = var("n")
X, Y = Buffer("x", f32, (n,), "param", False), Buffer("y", f32, (n,), "param")
J = Buffer("j", i64, (n,), "param", False)
LOCAL = Buffer("w", f32, (const(8),), "local")
LANES = ramp(const(0), 1, 4)


def each(body: Callable[[Expr], Stmt], kind: str = "parallel") -> For:
    i = var("i", lo=0, hi=n - 1)
    return For(i, const(0), n, kind, body(i))


# name: (body, the index that the message names, its buffer, its extent), on x and y of N elements, j the numbers 0 .. N - 1
BAD: dict[str, tuple[Stmt, int, str, int]] = {
    "load_above": (each(lambda i: Store(Y, (i,), load(X, [i + 1]))), N, "x", N),
    "load_below": (each(lambda i: Store(Y, (i,), load(X, [i - 2]))), -2, "x", N),
    "store": (each(lambda i: Store(Y, (i * 2,), load(X, [i])), "serial"), N, "y", N),
    "index_from_data": (each(lambda i: Store(Y, (i,), load(X, [cast(load(J, [i]), index) + 60])), "serial"), N, "x", N),
    "lanes": (Store(Y, (ramp(n - 3, 1, 4),), load(X, [LANES])), N, "y", N),
    "lanes_backwards": (Store(Y, (LANES,), load(X, [ramp(const(2), -1, 4)])), -1, "x", N),
    "one_lane_of_a_gather": (Store(Y, (LANES,), load(X, [LANES * bcast(const(30), 4)])), 90, "x", N),
    "masked_lane": (Store(Y, (LANES,), load(X, [ramp(n - 2, 1, 4)], ramp(n - 2, 1, 4) < bcast(n + 1, 4))), N, "x", N),
    "masked_store": (Store(Y, (n,), const(1.0, f32), const(0) < n), N, "y", N),
    "local": (Alloc(LOCAL, block(each(lambda i: Store(LOCAL, (i,), load(X, [i])), "serial"), Store(Y, (const(0),), load(LOCAL, [const(0)])))), 8, "w", 8),
    "loop_bound": (For(var("k", lo=0), const(0), cast(load(J, [n]), index), "serial", Store(Y, (const(0),), const(0.0, f32))), N, "j", N),
    "while": (block(Store(Y, (const(0),), const(0.0, f32)), While(load(Y, [cast(load(Y, [const(0)]), index)]).eq(load(Y, [const(0)])), Store(Y, (const(0),), load(Y, [const(0)]) + 64.0))), 64, "y", N),
}  # fmt: skip


def program(body: Stmt) -> Program:
    f = Func("bad", (X, J, Y, n), body)
    return Program("p", (X, J), (Y,), {n: (0, 0)}, {}, {"bad": f}, (), Call("bad", (X, J, Y, n)), nodes={0: ("the_node", "another")}, checked=True)


def feeds() -> dict[str, Any]:
    return {"x": np.zeros(N, np.float32), "j": np.arange(N)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", BAD)
def test_a_checked_kernel_reports(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.codegen.program.sharing.THREAD_WORK", 1)
    monkeypatch.setattr("luthier.codegen.program.sharing.SMALL_WORK", 1)
    body, where, buffer, extent = BAD[name]
    module = Module.from_program(program(body), "cpu", threads)
    with pytest.raises(KernelError) as e:
        module.run(feeds())
    assert f"kernel bad: index {where} of buffer {buffer} is outside its extent {extent}; node the_node, another; x is x, j is j, y is y" in str(e.value)
    with pytest.raises(KernelError):  # the context can be used again
        module.run(feeds())


@pytest.mark.parametrize("name", BAD)
def test_the_interpreter_reports_as_well(name: str) -> None:
    f = check_bounds(program(BAD[name][0]).kernels["bad"])
    verify(f)
    with pytest.raises(KernelError, match=f"index {BAD[name][1]} "):
        run_func(f, {**feeds(), "y": np.zeros(N, np.float32)}, {"n": N})


def test_other_threads_go_on_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the middle of a chain: later kernels do not run, good inputs work again."""
    monkeypatch.setattr("luthier.codegen.program.sharing.THREAD_WORK", 1)
    t = Buffer("t", f32, (n,), "global")
    gather_ = Func("pick", (X, J, Y, n), each(lambda i: Store(Y, (i,), load(X, [cast(load(J, [i]), index)]))))
    twice = Func("twice", (X, Y, n), each(lambda i: Store(Y, (i,), load(X, [i]) * 2.0)))
    body = block(Call("pick", (X, J, t, n)), Call("twice", (t, Y, n)))
    p = Program("p", (X, J), (Y,), {n: (0, 0)}, {}, {"pick": gather_, "twice": twice}, (t,), body, nodes={0: ("a",), 1: ("b",)}, checked=True)
    module = Module.from_program(p, "cpu", 4)
    x, j = np.arange(50_000, dtype=np.float32), np.arange(50_000)[::-1].copy()
    for k in range(20):
        bad = j.copy()
        bad[k * 2000] = -1 - k
        with pytest.raises(KernelError, match=f"kernel pick: index {-1 - k} of buffer x .* node a; "):
            module.run({"x": x, "j": bad})
        np.testing.assert_array_equal(module.run({"x": x, "j": j})["y"], x[j] * 2)


def test_masks_that_are_off_are_no_access() -> None:
    i = ramp(const(-1), 1, 4)
    body = Store(Y, (LANES,), load(X, [i], bcast(const(0), 4) <= i, 5.0))
    out = Module.from_program(program(body), "cpu", 1).run({"x": np.arange(N, dtype=np.float32), "j": np.arange(N)})["y"]
    np.testing.assert_array_equal(out[:4], [5, 0, 1, 2])


def test_pass_text(golden: Golden) -> None:
    v = var("v", f32)
    i = ramp(n - 2, 1, 4)
    body = block(
        Let(v, load(X, [cast(load(J, [const(0)]), index)])),
        Store(Y, (i,), bcast(v, 4), i < bcast(n, 4)),
        Alloc(LOCAL, block(Store(LOCAL, (const(7),), v), Store(Y, (const(0),), load(LOCAL, [const(7)]) + vreduce("add", load(X, [LANES]))))),
    )
    f = Func("k", (X, J, Y, n), body)
    g = check_bounds(f)
    golden("passes/check_bounds.txt", f"# before\n{f}\n# after\n{g}")
    assert check_bounds(g) is g and is_checked(g) and not is_checked(f)


@pytest.mark.parametrize("name", MODELS)
def test_checked_models_give_the_same_bits(name: str) -> None:
    from luthier.feeds import random_inputs

    shapes = {"speech": {"x": (1, 300)}, "convnet_dynamic": {"x": (1, 3, 37, 50)}, "indexing": {"ids": (7,), "where": (3, 1), "up": (3, 32)}}
    plain = luthier.compile(model(name))
    given = random_inputs(plain.inputs, shapes.get(name, {}), seed=0)
    want = plain.run(given)
    got = luthier.compile(model(name), debug="bounds").run(given)
    assert all(np.array_equal(got[k], want[k], equal_nan=True) for k in want)


# ---------------------------------------------------------------- what the data decides


def parsed(text: str) -> Any:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]>\n{text}')


def test_a_defect_in_an_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Gather forgot to clamp: the message names the node and its tensors."""
    monkeypatch.setattr(gather, "clamp", lambda j, n: j)
    monkeypatch.setenv("LUTHIER_CHECK_INDICES", "0")
    m = parsed("g (float[10, 4] table, int64[N] ids) => (float[N, 4] rows) { [lookup] rows = Gather(table, ids) }")
    module = luthier.compile(m, debug="bounds")
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    np.testing.assert_array_equal(module.run({"table": table, "ids": np.array([9, 0])})["rows"], table[[9, 0]])
    with pytest.raises(KernelError, match=r"kernel gather: index 4\d of buffer p\d is outside its extent 40; node lookup; .*is table"):
        module.run({"table": table, "ids": np.array([1, 10])})


WILD = np.array([0, -1, 3, 10, -11, 2**40, -(2**40), 2**63 - 1, -(2**63)])
INDEXED = {
    "Gather": "g (float[10, 4] x, int64[N] j) => (float[N, 4] y) { y = Gather(x, j) }",
    "Gather1": "g (float[4, 10] x, int64[N] j) => (float[4, N] y) { y = Gather<axis = 1>(x, j) }",
    "GatherElements": "g (float[10] x, int64[N] j) => (float[N] y) { y = GatherElements(x, j) }",
    "GatherND": "g (float[10, 4] x, int64[N] j) => (float[N, 4] y) { a = Constant<value_ints = [-1, 1]>() k = Reshape(j, a) y = GatherND(x, k) }",
    "ScatterElements": "g (float[10] x, int64[N] j, float[N] u) => (float[10] y) { y = ScatterElements(x, j, u) }",
    "ScatterAdd": 'g (float[10] x, int64[N] j, float[N] u) => (float[10] y) { y = ScatterElements<reduction = "add">(x, j, u) }',
    "ScatterND": "g (float[10] x, int64[N] j, float[N] u) => (float[10] y) { a = Constant<value_ints = [-1, 1]>() k = Reshape(j, a) y = ScatterND(x, k, u) }",
    "OneHot": "g (int64[N] j) => (float[N, 10] y) { d = Constant<value_int = 10>() v = Constant<value_floats = [0.0, 1.0]>() y = OneHot(j, d, v) }",
}  # fmt: skip


@pytest.mark.parametrize("debug", [None, "bounds"])
@pytest.mark.parametrize("name", INDEXED)
def test_wild_indices_touch_nothing_else(name: str, debug: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of range, gathers read the nearest element and scatters skip where the run does not refuse it: never other memory, with and without checks."""
    monkeypatch.setenv("LUTHIER_CHECK_INDICES", "0")
    shape = (4, 10) if name == "Gather1" else (10, 4) if name in ("Gather", "GatherND") else (10,)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    u = np.arange(100, 100 + len(WILD), dtype=np.float32)
    module = luthier.compile(parsed(INDEXED[name]), debug=debug)
    names = {s.name for s in module.inputs}
    got = module.run({k: v for k, v in {"x": x, "j": WILD, "u": u}.items() if k in names})["y"]
    at = np.array([j + 10 if j < 0 else j for j in WILD.tolist()], dtype=object)
    inside = np.array([0 <= j < 10 for j in at])
    near = np.array([min(max(j, 0), 9) for j in at])
    if name.startswith("Gather"):
        np.testing.assert_array_equal(got, x[:, near] if name == "Gather1" else x[near])
    elif name == "OneHot":
        np.testing.assert_array_equal(got, (near[:, None] == np.arange(10)) & inside[:, None])
    else:
        want = x.copy()
        (np.add.at if name == "ScatterAdd" else lambda a, i, v: a.__setitem__(i, v))(want, near[inside], u[inside])
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("g (float[1, 1, S] x, float[4, 1, 16] k) => (float[1, 4, T] y) { c = Conv(x, k) y = Relu(c) }",
         {"x": np.zeros((1, 1, 3), np.float32), "k": np.zeros((4, 1, 16), np.float32)}, "dimension 2 would be -12"),
        ("g (float[1, 1, S] x, float[4, 1, 16] k) => (float[1, 4] y) { c = Conv(x, k) y = ReduceSum<keepdims = 0>(c, a) }",
         {"x": np.zeros((1, 1, 3), np.float32), "k": np.zeros((4, 1, 16), np.float32)}, "Conv.* do not fit: 3 against 16"),
        ("g (int64[2] s) => (float[A, B] y) { y = ConstantOfShape(s) }", {"s": np.array([2, -3])}, "-3"),
        ("g (float[4] x, int64[1] r) => (float[M] y) { y = Tile(x, r) }", {"x": np.zeros(4, np.float32), "r": np.array([-2])}, "-"),
        ("g (float[4] x, int64[2] s) => (float[A, B] y) { y = Reshape(x, s) }", {"x": np.zeros(4, np.float32), "s": np.array([3, 2])}, "6"),
        ("g (float[4, 1] x, int64[2] s) => (float[A, B] y) { y = Expand(x, s) }", {"x": np.zeros((4, 1), np.float32), "s": np.array([3, 2])}, "."),
        ("g (float[N] x, float[M] z) => (float[A] y) { y = Add(x, z) }", {"x": np.zeros(4, np.float32), "z": np.zeros(3, np.float32)}, r'node "y" \(Add\).*4 against 3'),
        ("g (float[N] x, float[4] z) => (float[A] y) { y = Add(x, z) }", {"x": np.zeros(3, np.float32), "z": np.zeros(4, np.float32)}, "Add.*3 against 4"),
        ("g (float[2, K] x, float[L, 2] z) => (float[2, 2] y) { y = MatMul(x, z) }", {"x": np.zeros((2, 4), np.float32), "z": np.zeros((3, 2), np.float32)}, "inner dimensions do not fit: 4 against 3"),
        ("g (float[A, 2] x, float[B, 2] z) => (float[C, D] y) { y = Concat<axis = 1>(x, z) }", {"x": np.zeros((2, 2), np.float32), "z": np.zeros((1, 2), np.float32)}, "dimension 0 of its inputs do not fit: 2 against 1"),
        ("g (float[N] x, int64[1] k) => (float[C] y, int64[C] i) { y, i = TopK(x, k) }", {"x": np.zeros(2, np.float32), "k": np.array([5])}, "TopK.*2 against 5"),
        ("g (float[N] x) => (float[C, 4] y) { s = Constant<value_ints = [-1, 4]>() y = Reshape(x, s) }", {"x": np.zeros(6, np.float32)}, "elements of the new and the old shape do not fit: 4 against 6"),
        ("g (float[N, A, 3, 3] x, float[4, B, 3, 3] k) => (float[N, 4, 1, 1] y) { y = Conv(x, k) }", {"x": np.zeros((1, 2, 3, 3), np.float32), "k": np.zeros((4, 5, 3, 3), np.float32)}, "Conv.* do not fit: 2 against 5"),
    ],
)  # fmt: skip
def test_impossible_extents_are_refused(text: str, given: dict[str, Any], message: str) -> None:
    m = parsed(text)
    if " a)" in text:
        m.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "a"))
    module = luthier.compile(m)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            module.run(given)


# ---------------------------------------------------------------- how it is asked for


MLP = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"


def checked(module: Module) -> bool:
    return bool(module.manifest.get("checked"))


def test_the_setting_and_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not checked(luthier.compile(parsed(MLP)))
    assert checked(luthier.compile(parsed(MLP), debug="bounds"))
    monkeypatch.setenv("LUTHIER_DEBUG", "bounds")
    assert checked(luthier.compile(parsed(MLP)))
    assert not checked(luthier.compile(parsed(MLP), debug="trace"))
    with pytest.raises(SettingError, match="bounds"):
        luthier.compile(parsed(MLP), debug="limits")


@pytest.mark.parametrize("kind", [k for k, b in all_backends().items() if not b.checks_bounds])
def test_a_target_without_checks_refuses(kind: str) -> None:
    with pytest.raises(TargetError, match="bounds"):
        luthier.compile(parsed(MLP), target=kind, debug="bounds")


def test_the_artifact_checks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "clamp", lambda j, n: j)
    m = parsed("g (float[10, 4] table, int64[N] ids) => (float[N, 4] rows) { [lookup] rows = Gather(table, ids) }")
    module = luthier.load(luthier.compile(m, debug="bounds").save(tmp_path / "a"))
    assert checked(module)
    with pytest.raises(KernelError, match="node lookup"):
        module.run({"table": np.zeros((10, 4), np.float32), "ids": np.array([-1])})
    assert "LT_ERROR_INDEX = 4" in (tmp_path / "a" / "model.h").read_text()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(parsed(MLP), tmp_path / "m.onnx")
    for words, code in ((["--debug", str(tmp_path / "m.onnx")], 0), (["--debug=bounds", str(tmp_path / "m.onnx")], 0), (["--debug=limits", str(tmp_path / "m.onnx")], 2)):
        with pytest.raises(SystemExit) as e:
            entry(command, ["compile", "-o", str(tmp_path / f"a{len(words[0])}"), *words])
        assert e.value.code == code
    assert "limits" in capsys.readouterr().err
    assert checked(luthier.load(tmp_path / f"a{len('--debug=bounds')}")) and not checked(luthier.load(tmp_path / f"a{len('--debug')}"))


def test_a_branch_that_is_not_taken_requires_nothing() -> None:
    """What an operator assumes inside an If holds for that branch only."""
    m = parsed("""g (bool c, float[N] x, float[M] z) => (float[A] y) {
      y = If (c) <then_branch = t () => (float[A] a) { a = Add(x, z) }, else_branch = e () => (float[A] b) { b = Neg(x) }> }""")
    module = luthier.compile(m)
    x, z = np.arange(4, dtype=np.float32), np.ones(3, np.float32)
    np.testing.assert_array_equal(module.run({"c": np.array(False), "x": x, "z": z})["y"], -x)
    with pytest.raises(InputError, match="Add.*4 against 3"):
        module.run({"c": np.array(True), "x": x, "z": z})
    np.testing.assert_array_equal(module.run({"c": np.array(True), "x": x, "z": x})["y"], x + x)
    np.testing.assert_array_equal(module.run({"c": np.array(True), "x": x[:1], "z": x})["y"], x)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("g (int64[2] s) => (float[A, B] y) { y = ConstantOfShape(s) }", {"s": np.array([2**31, 2**31])}),
        ("g (int64[2] s) => (float[A, B] y) { y = ConstantOfShape(s) }", {"s": np.array([2**40, 2**40])}),
        ("g (int64[2] s) => (float[A, B] y) { t = ConstantOfShape(s) u = Expand(t, s) y = Softmax(u) }", {"s": np.array([2**32, 2**32])}),
        ("g (int64 a, int64 b, int64 c) => (int64[C] y) { y = Range(a, b, c) }", {"a": np.array(0), "b": np.array(2**61), "c": np.array(1)}),
    ],
)
def test_sizes_that_overflow_are_out_of_memory(text: str, given: dict[str, Any], threads: int) -> None:
    """Extents of a run whose product does not fit 64 bits give no small array that kernels then overrun."""
    module = luthier.compile(parsed(text), threads=threads)
    for _ in range(2):
        with pytest.raises(KernelError, match="out of memory: 4611686018427387904 bytes for "):
            module.run(given)


def test_integer_division_by_zero_is_defined() -> None:
    x, z = np.array([5, -(2**31), 0, 7], np.int32), np.array([0, -1, 0, 2], np.int32)
    for op in ("Div", "Mod"):
        got = luthier.compile(parsed(f"g (int32[N] x, int32[N] z) => (int32[N] y) {{ y = {op}(x, z) }}"), debug="bounds").run({"x": x, "z": z})["y"]
        assert got[3] == (3 if op == "Div" else 1)
