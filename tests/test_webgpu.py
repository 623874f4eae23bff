"""The webgpu target: compiled models run through wgpu on whatever adapter is there, against numpy and onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier.backends.webgpu_module import WebGpuModule
from luthier.errors import InputError, KernelError, LuthierError, OutOfMemoryError, TargetError

pytest.importorskip("wgpu")
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module", autouse=True)
def _adapter() -> None:
    from luthier.backends.webgpu_device import device

    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))


def graph(nodes: Sequence[Any], inputs: dict[str, tuple[int, Sequence[Any]]], outputs: Sequence[str], weights: dict[str, Array] | None = None) -> onnx.ModelProto:
    """A model; ``inputs``: {name: (ONNX type, shape)}. Output types are inferred."""
    ins = [h.make_tensor_value_info(n, t, list(s)) for n, (t, s) in inputs.items()]
    outs = [h.make_empty_tensor_value_info(n) for n in outputs]
    g = h.make_graph(list(nodes), "g", ins, outs, [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()])
    m = onnx.shape_inference.infer_shapes(h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=8))
    for o in m.graph.output:
        if not o.type.tensor_type.elem_type:
            raise AssertionError(f"no type inferred for {o.name}")
    return m


def build(m: onnx.ModelProto) -> WebGpuModule:
    r = luthier.compile(m, target="webgpu")
    assert isinstance(r, WebGpuModule)
    return r


def with_needs(g: WebGpuModule) -> list[tuple[str, list[str]]]:
    """(text, features that it needs) of every shader."""
    return list(zip(g.shaders, g.host["features"], strict=True))


def peer(m: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    return ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got: Array, want: Array, tol: float = 1e-5) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=tol, atol=tol * max(1.0, float(np.abs(want.astype(np.float64)).max())))


F = T.FLOAT
CASES: dict[str, tuple[onnx.ModelProto, dict[str, tuple[int, ...]], int]] = {
    "softmax": (graph([h.make_node("Softmax", ["x"], ["y"])], {"x": (F, ["n", "m"])}, ["y"]), {"x": (7, 300)}, 1),
    "long row": (graph([h.make_node("Softmax", ["x"], ["y"])], {"x": (F, [2, 20000])}, ["y"]), {"x": (2, 20000)}, 1),
    "layer norm": (
        graph([h.make_node("LayerNormalization", ["x", "s", "b"], ["y"])], {"x": (F, [5, 6, 384])}, ["y"], {"s": normal(384), "b": normal(384, seed=1)}),
        {"x": (5, 6, 384)}, 1,
    ),
    "row sums": (graph([h.make_node("ReduceMean", ["x"], ["y"], axes=[2])], {"x": (F, [50, 6, 300])}, ["y"]), {"x": (50, 6, 300)}, 1),
    "column sums": (graph([h.make_node("ReduceMean", ["x"], ["y"], axes=[1])], {"x": (F, [9, 600, 30])}, ["y"]), {"x": (9, 600, 30)}, 1),
    "matrix and vector": (
        graph([h.make_node("Gemm", ["x", "w", "b"], ["a"], transB=1), h.make_node("Relu", ["a"], ["y"])], {"x": (F, [1, 512])}, ["y"], {"w": normal(300, 512), "b": normal(300)}),
        {"x": (1, 512)}, 1,
    ),
    "product, epilogue, tails": (
        graph([h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("Relu", ["a"], ["y"])], {"x": (F, [200, 99])}, ["y"], {"w": normal(99, 130)}), {"x": (200, 99)}, 1,
    ),
    "product of run-time rows": (graph([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": (F, ["n", 64])}, ["y"], {"w": normal(64, 128)}), {"x": (77, 64)}, 1),
    "batched products": (
        graph([h.make_node("Transpose", ["z"], ["t"], perm=[0, 1, 3, 2]), h.make_node("MatMul", ["x", "t"], ["y"])], {"x": (F, [3, 4, 70, 33]), "z": (F, [3, 4, 65, 33])}, ["y"]),
        {"x": (3, 4, 70, 33), "z": (3, 4, 65, 33)}, 1,
    ),
    "convolution": (
        graph([h.make_node("Conv", ["x", "w", "b"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]), h.make_node("Relu", ["a"], ["y"])], {"x": (F, [2, 16, 15, 14])}, ["y"], {"w": normal(40, 16, 3, 3), "b": normal(40)}),
        {"x": (2, 16, 15, 14)}, 3,
    ),
    "depthwise convolution": (
        graph([h.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], group=24)], {"x": (F, [1, 24, 12, 13])}, ["y"], {"w": normal(24, 1, 3, 3)}), {"x": (1, 24, 12, 13)}, 3,
    ),
    "pooling": (graph([h.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])], {"x": (F, [2, 8, 20, 20])}, ["y"]), {"x": (2, 8, 20, 20)}, 1),
    "attention": (
        graph(
            [
                h.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]), h.make_node("MatMul", ["q", "t"], ["s"]), h.make_node("Mul", ["s", "c"], ["r"]),
                h.make_node("Softmax", ["r"], ["p"]), h.make_node("MatMul", ["p", "v"], ["y"]),
            ],
            {n: (F, [1, 3, "s", 32]) for n in "qkv"}, ["y"], {"c": np.float32(0.17).reshape(())},
        ),
        {n: (1, 3, 50, 32) for n in "qkv"}, 1,
    ),
    "many points": (graph([h.make_node("Tanh", ["x"], ["y"])], {"x": (F, [300, 300, 50])}, ["y"]), {"x": (300, 300, 50)}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_onnxruntime(name: str) -> None:
    m, shapes, dispatches = CASES[name]
    g = build(m)
    feeds = {n: normal(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    for _ in range(2):  # the second run is a replay
        close(g.run(feeds)["y"], peer(m, feeds)[0])
        c = g.counters()
        assert c["submits"] == 1 and c["crossings"] == 0 and c["dispatches"] <= dispatches


ATTENTION = [
    h.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]), h.make_node("MatMul", ["q", "t"], ["s"]), h.make_node("Mul", ["s", "c"], ["r"]), h.make_node("Add", ["r", "m"], ["b"]),
    h.make_node("Softmax", ["b"], ["p"]), h.make_node("MatMul", ["p", "v"], ["y"]),
]  # fmt: skip


@pytest.mark.parametrize("open_lengths", [False, True])
@pytest.mark.parametrize("queries,keys,dim", [(50, 50, 32), (1, 77, 24), (37, 130, 40), (16, 900, 16), (5, 128, 200)])
def test_attention(queries: int, keys: int, dim: int, open_lengths: bool) -> None:
    """One kernel, with a mask; tails in every direction, lengths known when compiling or not; a row that sees one key only."""
    shapes = {"q": (2, 3, queries, dim), "k": (2, 3, keys, dim), "v": (2, 3, keys, dim), "m": (2, 1, queries, keys)}
    named = {"q": (2, 3, "s", dim), "k": (2, 3, "t", dim), "v": (2, 3, "t", dim), "m": (2, 1, "s", "t")}
    m = graph(ATTENTION, {n: (F, s) for n, s in (named if open_lengths else shapes).items()}, ["y"], {"c": np.float32(0.17).reshape(())})
    g = build(m)
    feeds = {n: normal(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    feeds["m"] = np.where(feeds["m"] > 1, np.float32(-1e9), 0).astype(np.float32)
    feeds["m"][1, 0, 0, :-1] = -np.inf
    feeds["k"][0, 0] *= 4  # scores far apart: the maximum changes from tile to tile
    close(g.run(feeds)["y"], peer(m, feeds)[0])
    assert g.counters()["dispatches"] == 1


def test_shapes_change_between_runs() -> None:
    m, _, _ = CASES["softmax"]
    g = build(m)
    for shape in ((3, 5), (40, 700), (3, 5), (1, 1), (0, 4)):
        x = normal(*shape)
        if x.size:
            close(g.run({"x": x})["y"], peer(m, {"x": x})[0])
        else:
            assert g.run({"x": x})["y"].shape == shape


def test_kernels_are_stored_once() -> None:
    """Three equal layers: three dispatches of one shader, weights in one buffer."""
    w = {f"w{k}": normal(64, 64, seed=k) for k in range(3)}
    m = graph([h.make_node("MatMul", [f"x{k}" if k else "x", f"w{k}"], [f"x{k + 1}"]) for k in range(3)], {"x": (F, [32, 64])}, ["x3"], w)
    g = build(m)
    assert len(g.shaders) == 1 and len(g.host["weights"]) == 1
    x = normal(32, 64)
    close(g.run({"x": x})["x3"], x @ w["w0"] @ w["w1"] @ w["w2"], 1e-4)
    assert g.counters()["dispatches"] == 3


def test_more_buffers_than_a_kernel_may_have() -> None:
    n = 13
    m = graph([h.make_node("Concat", [f"x{k}" for k in range(n)], ["y"], axis=0)], {f"x{k}": (F, [k + 1, 3]) for k in range(n)}, ["y"])
    g = build(m)
    assert all(len(p["bindings"]) <= 8 for p in g.host["pipelines"])
    feeds = {f"x{k}": normal(k + 1, 3, seed=k) for k in range(n)}
    np.testing.assert_array_equal(g.run(feeds)["y"], np.concatenate(list(feeds.values())))


INTS = [(T.INT8, np.int8), (T.UINT8, np.uint8), (T.INT16, np.int16), (T.UINT16, np.uint16), (T.INT32, np.int32), (T.INT64, np.int64), (T.BOOL, np.bool_), (T.FLOAT16, np.float16)]


@pytest.mark.parametrize("code,dtype", INTS, ids=lambda v: getattr(v, "__name__", ""))
def test_element_types(code: int, dtype: Any) -> None:
    """Elements narrower than a word share words; 64-bit ones take two."""
    m = graph([h.make_node("Transpose", ["x"], ["t"], perm=[1, 0]), h.make_node("Cast", ["t"], ["f"], to=F), h.make_node("Identity", ["t"], ["y"])], {"x": (code, [7, 5])}, ["y", "f"])
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((7, 5)) * 50).astype(dtype) if np.dtype(dtype).kind != "u" else rng.integers(0, 200, (7, 5)).astype(dtype)
    out = build(m).run({"x": x})
    np.testing.assert_array_equal(out["y"], x.T)
    np.testing.assert_array_equal(out["f"], x.T.astype(np.float32))


def test_half_is_rounded_after_every_operation() -> None:
    m = graph([h.make_node("Mul", ["x", "x"], ["a"]), h.make_node("Add", ["a", "x"], ["y"])], {"x": (T.FLOAT16, [1000])}, ["y"])
    x = (np.random.default_rng(0).standard_normal(1000) * 10).astype(np.float16)
    np.testing.assert_array_equal(build(m).run({"x": x})["y"], x * x + x)


def test_nan_and_infinity() -> None:
    m = graph([h.make_node("IsNaN", ["x"], ["a"]), h.make_node("IsInf", ["x"], ["b"])], {"x": (F, [5])}, ["a", "b"])
    x = np.array([1, np.nan, np.inf, -np.inf, 0], np.float32)
    out = build(m).run({"x": x})
    np.testing.assert_array_equal(out["a"], np.isnan(x))
    np.testing.assert_array_equal(out["b"], np.isinf(x))


def test_wrong_inputs() -> None:
    g = build(CASES["convolution"][0])
    with pytest.raises(InputError, match="axis 1"):
        g.run({"x": normal(2, 15, 15, 14)})
    with pytest.raises(InputError, match="rank"):
        g.run({"x": normal(2, 16)})
    with pytest.raises(InputError, match="dtype"):
        g.run({"x": normal(2, 16, 15, 14).astype(np.float64)})


def test_loop_with_a_condition_of_the_device() -> None:
    """``x`` doubles until its sum passes 1000: the condition is read back every round, and inspect says so."""
    body = h.make_graph(
        [
            h.make_node("Add", ["v", "v"], ["w"]), h.make_node("ReduceSum", ["w"], ["s"], keepdims=0), h.make_node("Less", ["s", "limit"], ["more"]),
        ],
        "body", [h.make_tensor_value_info("i", T.INT64, []), h.make_tensor_value_info("c", T.BOOL, []), h.make_tensor_value_info("v", F, [4])],
        [h.make_tensor_value_info("more", T.BOOL, []), h.make_tensor_value_info("w", F, [4])],
    )  # fmt: skip
    node = h.make_node("Loop", ["", "go", "x"], ["y"], body=body)
    weights = {"go": np.array(True), "limit": np.float32(1000).reshape(())}
    m = graph([node], {"x": (F, [4])}, ["y"], weights)
    g = build(m)
    x = np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_array_equal(g.run({"x": x})["y"], x * 128)
    c = g.counters()
    assert c["crossings"] >= 7 and not g.host["fixed"]


def test_data_dependent_extent() -> None:
    m = graph([h.make_node("NonZero", ["x"], ["y"])], {"x": (F, [6, 7])}, ["y"])
    x = (normal(6, 7) > 0.3).astype(np.float32)
    g = build(m)
    np.testing.assert_array_equal(g.run({"x": x})["y"], np.stack(np.nonzero(x)))
    assert g.counters()["crossings"] == 1


def test_artifact(tmp_path: Path) -> None:
    m, shapes, _ = CASES["attention"]
    g = build(m)
    g.save(tmp_path / "a")
    feeds = {n: normal(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    again = luthier.load(tmp_path / "a")
    np.testing.assert_array_equal(again.run(feeds)["y"], g.run(feeds)["y"])
    text = (tmp_path / "a" / "shaders.json").read_text()
    (tmp_path / "a" / "shaders.json").write_text(text.replace("fn main", "fn man"))
    with pytest.raises(luthier.ArtifactError, match="checksum"):
        luthier.load(tmp_path / "a")


def test_inspect_shows_crossings(tmp_path: Path) -> None:
    from luthier.debug.inspection import stages

    onnx.save(graph([h.make_node("NonZero", ["x"], ["y"])], {"x": (F, [6, 7])}, ["y"]), tmp_path / "m.onnx")
    text = dict(stages(tmp_path / "m.onnx", "webgpu", {}, None))
    main = next(t for n, t in text.items() if "webgpu-main" in n)
    assert "crossings: 1" in main and "READ" in main and "output buffer" in main and " [2, " in main
    assert any("wgsl-000" in n for n in text)


def test_shaders_are_accepted_by_dawn() -> None:
    from luthier.codegen.gpu.wgsl import Shader
    from luthier.ir.expr import const
    from tests.gate import dawn

    if dawn.missing():
        pytest.skip(str(dawn.missing()))
    one = const(1)
    shaders = [Shader(f"{name} {k}", s, (), (), (one, one, one), (1, 1, 1), tuple(fs)) for name, (m, _, _) in CASES.items() for k, (s, fs) in enumerate(with_needs(build(m)))]
    assert dawn.refused(shaders) == {}


def test_constant_larger_than_a_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bindings of 4 KB: a matrix in three pieces, one of another size beside it."""
    monkeypatch.setattr("luthier.codegen.gpu.webgpu.WebGpuBuilder.binding", 4096)
    w, b = normal(50, 60), normal(60)
    m = graph([h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("Add", ["a", "b"], ["y"])], {"x": (F, [20, 50])}, ["y"], {"w": w, "b": b})
    g = build(m)
    assert len(g.host["weights"]) == 4 and all(n <= 4096 for _, n in g.host["weights"])
    x = normal(20, 50)
    close(g.run({"x": x})["y"], x @ w + b)


def test_temporary_larger_than_a_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extent that only the run knows asks for more than the adapter can bind: a typed error that says so, and smaller inputs still run."""
    from luthier.backends import webgpu_device

    m = build(graph([h.make_node("Softmax", ["x"], ["y"])], {"x": (F, ["n", 64])}, ["y"]))
    monkeypatch.setattr(webgpu_device, "largest_binding", lambda: 64 * 64 * 4)
    x = normal(64, 64)
    close(m.run({"x": x})["y"], np.exp(x) / np.exp(x).sum(-1, keepdims=True))
    with pytest.raises(KernelError, match="16640 bytes in one binding, this adapter allows 16384"):
        m.run({"x": normal(65, 64)})


def test_recurrent_network_wider_than_a_group() -> None:
    """Hidden states of 160 numbers: more than a group has threads; one dispatch for all rounds."""
    n, t, k, d = 160, 5, 2, 24
    w, r, b = normal(1, 4 * n, d) * 0.2, normal(1, 4 * n, n, seed=1) * 0.1, normal(1, 8 * n, seed=2)
    m = graph([h.make_node("LSTM", ["x", "w", "r", "b"], ["y", "yh"], hidden_size=n)], {"x": (F, [t, k, d])}, ["y", "yh"], {"w": w, "r": r, "b": b})
    g = build(m)
    x = normal(t, k, d, seed=3)
    out = g.run({"x": x})
    for got, want in zip(out.values(), peer(m, {"x": x}), strict=True):
        close(got, want)
    assert any("var<workgroup>" in s for s in g.shaders)


@pytest.mark.parametrize("clock", ["queries", "waits"])
def test_profile_times_every_dispatch(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.backends import webgpu_device

    if clock == "waits":
        monkeypatch.setattr(webgpu_device, "_Queries", webgpu_device._Waits)
    elif "timestamp-query" not in webgpu_device.device().features:
        pytest.skip("this adapter has no timestamps")
    nodes = [h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("Softmax", ["a"], ["y"])]
    m = build(graph(nodes, {"x": (T.FLOAT, ["N", 256])}, ["y"], {"w": normal(256, 512)}))
    feeds = {"x": normal(300, 256)}
    before = m.run(feeds)["y"]
    rows = m.profile(feeds, 3)
    assert [r["kernel"] for r in rows] == [c["kernel"] for c in m.manifest["calls"]]
    assert len(rows) >= 2 and all(0 < r["ms"] < 60_000 for r in rows)
    np.testing.assert_array_equal(m.run(feeds)["y"], before)
    assert m.counters()["submits"] == 1


def outer() -> WebGpuModule:
    """y[n,n] = relu(x[n,1] @ x[1,n]), and the largest of each row."""
    nodes = [
        h.make_node("Unsqueeze", ["x", "one"], ["a"]), h.make_node("Unsqueeze", ["x", "zero"], ["b"]), h.make_node("MatMul", ["a", "b"], ["m"]),
        h.make_node("Relu", ["m"], ["y"]), h.make_node("ReduceMax", ["y"], ["z"], axes=[1], keepdims=0),
    ]  # fmt: skip
    return build(graph(nodes, {"x": (T.FLOAT, ["n"])}, ["y", "z"], {"one": np.array([1]), "zero": np.array([0])}))


def test_a_call_that_is_too_large_does_not_harm_the_next() -> None:
    g = outer()
    small, other = np.arange(5, dtype=np.float32) - 2, np.arange(7, dtype=np.float32)
    for x in (small, np.zeros(150_000, np.float32), other, np.zeros(400_000, np.float32), small):
        if len(x) > 10:
            with pytest.raises(OutOfMemoryError, match=f"{4 * len(x) ** 2} bytes"):
                g.run({"x": x})
            continue
        want = np.maximum(np.outer(x, x), 0)
        got = g.run({"x": x})
        np.testing.assert_allclose(got["y"], want)
        np.testing.assert_allclose(got["z"], want.max(1))


@pytest.mark.parametrize(("place", "error", "want"), [
    ("create_buffer", "GPUOutOfMemoryError", OutOfMemoryError), ("create_buffer", "GPUValidationError", OutOfMemoryError),
    ("create_command_encoder", "GPUOutOfMemoryError", OutOfMemoryError), ("create_bind_group", "GPUValidationError", KernelError),
])  # fmt: skip
def test_errors_of_the_device_are_our_own(monkeypatch: pytest.MonkeyPatch, place: str, error: str, want: type[LuthierError]) -> None:
    """Whatever the implementation raises, the caller sees a class of ours, and the next call runs."""
    import wgpu

    from luthier.backends.webgpu_device import device

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise getattr(wgpu, error)("refused")

    g = outer()
    for n in (3, 9):
        x = np.arange(n, dtype=np.float32)
        with monkeypatch.context() as patch:
            patch.setattr(type(device()), place, refuse)
            with pytest.raises(want, match="refused"):
                g.run({"x": x})
        np.testing.assert_allclose(g.run({"x": x})["y"], np.outer(x, x))
