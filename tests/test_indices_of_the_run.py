"""Indices that are data: right to the last element at either end, negative ones and none at all; a run refuses one beyond, as onnxruntime does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.parser
import pytest

import luthier
from luthier.codegen.targets.target import parse_target
from luthier.errors import InputError
from luthier.importers.onnx.importer import import_onnx
from luthier.pipeline import compile_program

ort = pytest.importorskip("onnxruntime")
NODE = shutil.which("node")
RNG = np.random.default_rng(3)


def floats(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """``text``: the graph, ``I`` is the input with the indices; ``shape``: of the indices for m of them; ``ends``: least and greatest
    (one pair, or one for each place of the last axis); ``others``: further inputs for m indices; ``host``: whether they reach the node as the
    caller gave them, so that WebGPU checks them."""

    text: str
    shape: Any
    ends: tuple[tuple[int, int], ...]
    others: Any
    dtype: Any = np.int64
    host: bool = True
    sizes: tuple[int, ...] = (0, 1, 2, 5, 40)


X = floats(7, 5)
SEVEN = ((-7, 6),)
CASES = {
    "rows": Case("(float[n, 5] x, int64[m] I) => (float[m, 5] y) { y = Gather(x, I) }", lambda m: (m,), SEVEN, lambda m: {"x": X}),
    "one row": Case("(float[n, 5] x, int64 I) => (float[5] y) { y = Gather(x, I) }", lambda m: (), SEVEN, lambda m: {"x": X}, sizes=(1,)),
    "columns": Case("(float[7, 5] x, int32[m, k] I) => (float[7, m, k] y) { y = Gather<axis=1>(x, I) }", lambda m: (m, 3), ((-5, 4),), lambda m: {"x": X}, np.int32),
    "ids by steps": Case(
        "(float[7, 5] x, int64[m] I) => (float[m, 1, 5] y) { a = Constant<value_ints=[1]>() u = Unsqueeze(I, a) c = Cast<to=6>(u) y = Gather(x, c) }",
        lambda m: (m,), SEVEN, lambda m: {"x": X},
    ),
    "one more": Case(
        "(float[n, 5] x, int64[m] I) => (float[m, 5] y) { a = Constant<value_ints=[1]>() u = Add(I, a) y = Gather(x, u) }",
        lambda m: (m,), ((-8, 5),), lambda m: {"x": X}, host=False,
    ),
    "from floats": Case(
        "(float[n, 5] x, float[m] I) => (float[m, 5] y) { u = Cast<to=7>(I) y = Gather(x, u) }", lambda m: (m,), SEVEN, lambda m: {"x": X}, np.float32, False,
    ),
    "two tables": Case(
        "(float[7, 5] x, float[9, 5] z, int64[m] I) => (float[m, 5] y, float[m, 5] w) { w = Gather(z, I) y = Gather(x, I) }",
        lambda m: (m,), SEVEN, lambda m: {"x": X, "z": floats(9, 5)},
    ),
    "element-wise": Case(
        "(float[n, 5] x, int64[m, 5] I) => (float[m, 5] y) { y = GatherElements(x, I) }", lambda m: (m, 5), SEVEN, lambda m: {"x": X},
    ),
    "many element-wise": Case(
        "(float[7, 300] x, int64[300, 300] I) => (float[300, 300] y) { y = GatherElements(x, I) }", lambda m: (300, 300), SEVEN, lambda m: {"x": floats(7, 300)}, sizes=(1,),
    ),
    "points": Case("(float[n, 5] x, int64[m, 2] I) => (float[m] y) { y = GatherND(x, I) }", lambda m: (m, 2), ((-7, 6), (-5, 4)), lambda m: {"x": X}),
    "points of a batch": Case(
        "(float[b, 7, 5] x, int64[b, m, 1] I) => (float[b, m, 5] y) { y = GatherND<batch_dims=1>(x, I) }", lambda m: (2, m, 1), SEVEN, lambda m: {"x": floats(2, 7, 5)},
    ),
    "written element-wise": Case(
        "(float[n, 5] x, int64[m, 5] I, float[m, 5] u) => (float[n, 5] y) { y = ScatterElements<reduction=\"add\">(x, I, u) }",
        lambda m: (m, 5), SEVEN, lambda m: {"x": X, "u": floats(m, 5)},
    ),
    "written rows": Case(
        "(float[n, 5] x, int64[m, 1] I, float[m, 5] u) => (float[n, 5] y) { y = ScatterND<reduction=\"add\">(x, I, u) }",
        lambda m: (m, 1), SEVEN, lambda m: {"x": X, "u": floats(m, 5)},
    ),
    "written points": Case(
        "(float[n, 5] x, int64[m, 2] I, float[m] u) => (float[n, 5] y) { y = ScatterND<reduction=\"max\">(x, I, u) }",
        lambda m: (m, 2), ((-7, 6), (-5, 4)), lambda m: {"x": X, "u": floats(m)},
    ),
    "lengths of a GRU": Case(
        "(float[4, m, 3] x, float[1, 6, 3] w, float[1, 6, 2] r, int32[m] I) => (float[4, 1, m, 2] y) { y = GRU<hidden_size=2>(x, w, r, , I) }",
        lambda m: (m,), ((0, 4),), lambda m: {"x": floats(4, m, 3), "w": floats(1, 6, 3), "r": floats(1, 6, 2)}, np.int32, sizes=(1, 2, 5),
    ),
    "lengths of an LSTM": Case(
        "(float[t, m, 3] x, float[1, 8, 3] w, float[1, 8, 2] r, int32[m] I) => (float[t, 1, m, 2] y) { y = LSTM<hidden_size=2>(x, w, r, , I) }",
        lambda m: (m,), ((0, 4),), lambda m: {"x": floats(4, m, 3), "w": floats(1, 8, 3), "r": floats(1, 8, 2)}, np.int32, sizes=(1, 2, 5),
    ),
    "reversed": Case(
        "(float[4, m] x, int64[m] I) => (float[4, m] y) { y = ReverseSequence<time_axis=0, batch_axis=1>(x, I) }", lambda m: (m,), ((0, 4),), lambda m: {"x": floats(4, m)}, sizes=(1, 2, 5),
    ),
    "regions of a batch": Case(
        "(float[2, 1, 4, 4] x, float[m, 4] r, int64[m] I) => (float[m, 1, 1, 1] y) { y = RoiAlign<output_height=1, output_width=1, sampling_ratio=1>(x, r, I) }",
        lambda m: (m,), ((0, 1),), lambda m: {"x": floats(2, 1, 4, 4), "r": np.tile(np.array([[0, 0, 2, 3]], np.float32), (m, 1))}, sizes=(1, 2, 5),
    ),
    "unpooled": Case(
        "(float[1, 1, m, 3] x, int64[1, 1, m, 3] I) => (float[1, 1, a, 6] y) { y = MaxUnpool<kernel_shape=[2, 2], strides=[2, 2]>(x, I) }",
        lambda m: (1, 1, 2, 3), ((0, 23),), lambda m: {"x": floats(1, 1, 2, 3)}, sizes=(1, 2),
    ),
    "turned": Case(
        "(float[b, 1, m, 4] x, float[n, 2] c, float[n, 2] s, int64[b, m] I) => (float[b, 1, m, 4] y) { y = RotaryEmbedding(x, c, s, I) }",
        lambda m: (2, m), ((0, 6),), lambda m: {"x": floats(2, 1, m, 4), "c": floats(7, 2), "s": floats(7, 2)}, sizes=(1, 2, 5),
    ),
    "in a branch": Case(
        "(float[n, 5] x, int64[m] I, bool c) => (float[m, 5] y) { y = If(c) <then_branch = t () => (float[m, 5] p) { p = Gather(x, I) }, "
        "else_branch = e () => (float[m, 5] q) { z = Gather(x, I) q = Neg(z) }> }",
        lambda m: (m,), SEVEN, lambda m: {"x": X, "c": np.array(m % 2 > 0)}, host=False, sizes=(1, 2, 5),
    ),
    "in a loop": Case(
        "(float[n, 5] x, int64[m] I, int64 N) => (float[5] y) { s = Constant<value_floats=[0.0, 0.0, 0.0, 0.0, 0.0]>() c = Constant<value=bool {1}>() "
        "y = Loop(N, c, s) <body = b (int64 i, bool go, float[5] a) => (bool g, float[5] o) { g = Identity(go) j = Gather(I, i) v = Gather(x, j) o = Add(a, v) }> }",
        lambda m: (m,), SEVEN, lambda m: {"x": X, "N": np.array(m)}, host=False, sizes=(1, 2, 5),
    ),
}  # fmt: skip


def model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {23 if "RotaryEmbedding" in text else 18}]>\ng {text}')


def session(m: onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"])


def draw(case: Case, m: int) -> Any:
    """Indices from end to end, both ends among them where there is room."""
    shape = case.shape(m)
    lows, highs = zip(*case.ends, strict=True)
    a = RNG.integers(lows, [h + 1 for h in highs], (int(np.prod(shape)) // len(lows), len(lows)))
    if len(a):
        a[0], a[-1] = (highs, lows) if m % 2 else (lows, highs)
    return a.reshape(shape).astype(case.dtype)


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
@pytest.mark.parametrize("name", CASES)
def test_indices(name: str, target: str) -> None:
    case = CASES[name]
    module, want = luthier.compile(model(case.text), target=target), session(model(case.text))
    for m in case.sizes:
        feeds = {**case.others(m), "I": draw(case, m)}
        for got, expected in zip(module.run(feeds).values(), want.run(None, feeds), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        if not feeds["I"].size or (target == "webgpu" and not case.host):
            continue
        for end in (0, 1):
            for k, pair in enumerate(case.ends):
                wrong = feeds["I"].copy()
                at = int(RNG.integers(wrong.size // len(case.ends))) * len(case.ends) + k
                wrong.reshape(-1)[at] = pair[end] + (1 if end else -1)
                bad = {**feeds, "I": wrong}
                beyond = int(wrong.reshape(-1)[at]) + (name == "one more")
                with pytest.raises(InputError, match=rf'node "\S+" \(\w+\): .*(against|is) {beyond}\b|: {beyond} against'):
                    module.run(bad)
                with pytest.raises(Exception):  # noqa: B017
                    want.run(None, bad)
        for got, expected in zip(module.run(feeds).values(), want.run(None, feeds), strict=True):  # a call that fails leaves nothing behind
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


PROVED = {
    "the greatest of each row": "(float[n, 7] x, float[7, 5] z) => (float[n, 5] y) { i = ArgMax<axis=1, keepdims=0>(x) y = Gather(z, i) }",
    "the first few": "(float[7] x, float[7, 5] z) => (float[3, 5] y) { k = Constant<value_ints=[3]>() v, i = TopK<axis=0>(x, k) y = Gather(z, i) }",
    "what is not 0": "(float[7, n] x) => (float[k] y) { i = NonZero(x) t = Transpose<perm=[1, 0]>(i) y = GatherND(x, t) }",
    "clipped": "(float[7, 5] z, int64[n] i) => (float[n, 5] y) { a = Constant<value=int64 {-7}>() b = Constant<value=int64 {6}>() c = Clip(i, a, b) y = Gather(z, c) }",
    "a remainder": "(float[7, 5] z, int64[n] i) => (float[n, 5] y) { d = Constant<value_ints=[7]>() c = Mod(i, d) y = Gather(z, c) }",
    "bytes": "(float[256, 5] z, uint8[n] i) => (float[n, 5] y) { c = Cast<to=7>(i) y = Gather(z, c) }",
    "flags": "(float[2, 5] z, bool[n] i) => (float[n, 5] y) { c = Cast<to=7>(i) y = Gather(z, c) }",
    "a part of a constant": "(float[9, 5] z, int64[1] i) => (float[k, 5] y) { t = Constant<value_ints=[0, 8, -9]>() a = Constant<value_ints=[0]>() s = Slice(t, a, i, a) y = Gather(z, s) }",
    "one or another": "(float[7, 5] z, bool[n] c) => (float[n, 5] y) { a = Constant<value_ints=[-7]>() b = Constant<value_ints=[6]>() i = Where(c, a, b) y = Gather(z, i) }",
}  # fmt: skip


def kernels(text: str) -> set[str]:
    return set(compile_program(import_onnx(model(text), None), parse_target("cpu").caps).kernels)


@pytest.mark.parametrize("name", PROVED)
def test_what_is_proved_costs_nothing(name: str) -> None:
    assert not any("extremes" in k for k in kernels(PROVED[name]))


@pytest.mark.parametrize(
    ("name", "old", "new"), [("the greatest of each row", "float[n, 7]", "float[n, 8]"), ("clipped", "{6}", "{7}"), ("a remainder", "[7]>", "[8]>"), ("bytes", "256", "255")]
)
def test_one_more_is_not_proved(name: str, old: str, new: str) -> None:
    assert any("extremes" in k for k in kernels(PROVED[name].replace(old, new)))


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
def test_constants_into_open_extents(target: str) -> None:
    module = luthier.compile(model("(float[n, 5] x) => (float[2, 5] y) { i = Constant<value_ints=[0, 6]>() y = Gather(x, i) }"), target=target)
    np.testing.assert_array_equal(module.run({"x": X})["y"], X[[0, 6]])
    with pytest.raises(InputError, match="Gather.*5.* 6"):
        module.run({"x": X[:6]})


def test_one_tensor_is_looked_at_once() -> None:
    two = kernels("(float[7, 5] x, float[9, 5] z, int64[m] I) => (float[m, 5] y, float[m, 5] w) { w = Gather(z, I) y = Gather(x, I) }")
    assert sum("extremes" in k for k in two) == 1


def test_checks_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CHECK_INDICES", "0")
    module = luthier.compile(model(CASES["rows"].text))
    np.testing.assert_array_equal(module.run({"x": X, "I": np.array([9, -9])})["y"], X[[6, 0]])


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_a_page_checks_before_it_uploads(tmp_path: Any) -> None:
    """The engine of a WebGPU package, as far as it goes without a GPU."""
    text = "(float[n, 5] x, int64[m, 2] I, int32[m] J) => (float[m] y, float[m, 5] z) { y = GatherND(x, I) z = Gather(x, J) }"
    folder = luthier.compile(model(text), target="webgpu").save(tmp_path / "p")
    cases = [([0, 0, -7, 4], [6, -7]), ([], []), ([7, 0], [0]), ([0, 5], [0]), ([6, -6], [0]), ([0, 0], [7]), ([0, 0, 0, 0], [0, -8])]
    (folder / "try.mjs").write_text(f"""
import {{ Engine }} from "./runtime/engine_webgpu.js";
const manifest = {{ inputs: [{{ name: "x" }}, {{ name: "I" }}, {{ name: "J" }}] }};
const said = [];
for (const [a, b] of {json.dumps(cases)}) {{
  const ins = [{{ data: new Float32Array(35), shape: [7, 5] }}, {{ data: BigInt64Array.from(a, BigInt), shape: [a.length / 2, 2] }}, {{ data: Int32Array.from(b), shape: [b.length] }}];
  try {{ Engine.prototype.within.call({{ manifest }}, ins); said.push(""); }} catch (e) {{ said.push(`${{e.name}} ${{e.code}} ${{e.message}}`); }}
}}
console.log(JSON.stringify(said));
""")
    done = subprocess.run([str(NODE), str(folder / "try.mjs")], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said[:2] == ["", ""]
    for got, (node, values) in zip(said[2:], [("GatherND", "7.*-7 to 6"), ("GatherND", "5.*-5 to 4"), ("GatherND", "-6.*-5 to 4"), ("Gather", "7.*-7 to 6"), ("Gather", "-8.*-7 to 6")], strict=True):
        assert re.fullmatch(rf'InputError OUT_OF_RANGE node ".*" \({node}\): an index in input "[IJ]" is {values}\b.*', got), got
