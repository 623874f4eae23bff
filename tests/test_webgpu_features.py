"""Optional features of WebGPU: a program carries a shader with and one without; what the adapter has decides, and both are right."""

from __future__ import annotations

import base64
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h

import luthier
from benchmarks import browser as browsers
from benchmarks.browser import Browser, Page
from luthier.backends.webgpu_module import WebGpuModule
from luthier.cli import serve
from luthier.codegen.gpu import webgpu_features as wf
from luthier.codegen.gpu.wgsl import Shader
from luthier.errors import InputError, SettingError, TargetError
from luthier.ir.expr import const
from tests.gate import dawn
from tests.test_webgpu import close, graph, normal, peer

pytest.importorskip("wgpu")
Array = np.ndarray[Any, Any]
H = T.FLOAT16


def half(*shape: int, seed: int = 0) -> Array:
    return normal(*shape, seed=seed).astype(np.float16)


def bytes_of(dtype: Any, *shape: int, seed: int = 0, lo: int | None = None, hi: int | None = None) -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min if lo is None else lo, info.max if hi is None else hi, shape, endpoint=True).astype(dtype)


def product_of(x: Array, zx: int, w: Array, zw: int) -> Array:
    return ((x.astype(np.int64) - zx) @ (w.astype(np.int64) - zw)).astype(np.int32)


def integer_product(x: int, w: Array, zw: int, k: int) -> onnx.ModelProto:
    """MatMulInteger with a zero point of the run for x and a constant one for w."""
    zero = np.array(zw, w.dtype)
    return graph([h.make_node("MatMulInteger", ["x", "w", "zx", "zw"], ["y"])], {"x": (x, ["n", k]), "zx": (x, [])}, ["y"], {"w": w, "zw": zero})


CASES: dict[str, tuple[onnx.ModelProto, dict[str, Array], str]] = {  # model, inputs, feature
    "rows": (graph([h.make_node("Softmax", ["x"], ["y"])], {"x": (T.FLOAT, ["n", 600])}, ["y"]), {"x": normal(9, 600)}, wf.SUBGROUPS),
    "half product": (graph([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": (H, ["n", 256])}, ["y"], {"w": half(256, 128)}), {"x": half(96, 256)}, wf.F16),
    "half rows": (graph([h.make_node("Softmax", ["x"], ["y"])], {"x": (H, [9, 600])}, ["y"]), {"x": half(9, 600)}, wf.F16),
    "half chain": (
        graph([h.make_node("Mul", ["x", "x"], ["a"]), h.make_node("Add", ["a", "x"], ["b"]), h.make_node("Sqrt", ["b"], ["y"])], {"x": (H, [999])}, ["y"]),
        {"x": np.abs(half(999))}, wf.F16,
    ),
    "half convolution": (
        graph([h.make_node("Conv", ["x", "w", "b"], ["a"], pads=[1, 1, 1, 1]), h.make_node("Relu", ["a"], ["y"])], {"x": (H, [2, 16, 15, 14])}, ["y"], {"w": half(40, 16, 3, 3), "b": half(40)}),
        {"x": half(2, 16, 15, 14)}, wf.F16,
    ),
    "bytes": (integer_product(T.UINT8, bytes_of(np.int8, 256, 128), 0, 256), {"x": bytes_of(np.uint8, 96, 256), "zx": np.array(7, np.uint8)}, wf.PACKED_DOT),
    "signed bytes": (integer_product(T.INT8, bytes_of(np.int8, 64, 40), 0, 64), {"x": bytes_of(np.int8, 33, 64), "zx": np.array(-5, np.int8)}, wf.PACKED_DOT),
    "unsigned weights": (integer_product(T.UINT8, bytes_of(np.uint8, 128, 96), 128, 128), {"x": bytes_of(np.uint8, 50, 128), "zx": np.array(200, np.uint8)}, wf.PACKED_DOT),
    "bytes and a tail": (integer_product(T.UINT8, bytes_of(np.int8, 99, 37), 0, 99), {"x": bytes_of(np.uint8, 41, 99), "zx": np.array(0, np.uint8)}, wf.PACKED_DOT),
}
EXACT = {  # onnxruntime saturates products of u8 and i8 on processors without a dot product
    "bytes": (7, 0), "signed bytes": (-5, 0), "unsigned weights": (200, 128), "bytes and a tail": (0, 0),
}  # fmt: skip
TOLERANCE = {wf.SUBGROUPS: 1e-5, wf.PACKED_DOT: 0.0, wf.F16: 1e-3}
USES = {wf.SUBGROUPS: re.compile(r"\bsubgroup(Add|Max|Min)\("), wf.PACKED_DOT: re.compile(r"\bdot4[IU]8Packed\("), wf.F16: re.compile(r"\bf16\b")}


def wanted(name: str) -> Array:
    """onnxruntime's result, numpy's for integer products."""
    model, feeds, _ = CASES[name]
    if name in EXACT:
        w = onnx.numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == "w"))
        return product_of(feeds["x"], EXACT[name][0], w, EXACT[name][1])
    return peer(model, feeds)[0]


def build(name: str) -> WebGpuModule:
    m = luthier.compile(CASES[name][0], target="webgpu")
    assert isinstance(m, WebGpuModule)
    return m


def here() -> tuple[str, ...]:
    """What the adapter of this machine has."""
    from luthier.backends.webgpu_device import features

    try:
        return features()
    except TargetError as e:
        pytest.skip(str(e))


def compiled(m: WebGpuModule) -> str:
    """The texts that the last run compiled."""
    return "".join(m.shaders[s] for s in m.runner.pipelines.modules)


@pytest.mark.parametrize("name", CASES)
def test_chosen_by_the_adapter(name: str) -> None:
    """All that is there, then nothing: results against onnxruntime, by the shaders that were meant."""
    _, feeds, feature = CASES[name]
    if feature not in here():
        pytest.skip(f"the adapter lacks {feature}")
    m, want = build(name), wanted(name)
    for allowed in (None, [], [feature]):
        m.allow_features(allowed)
        close(m.run(feeds)["y"], want, TOLERANCE[feature])
        assert (feature in m.features) == (allowed != []) == bool(USES[feature].search(compiled(m)))


def test_half_sums_are_f32() -> None:
    """4096 products of 1: a sum in f16 would stop at 2048."""
    if wf.F16 not in here():
        pytest.skip("the adapter lacks shader-f16")
    ones = np.ones((64, 4096), np.float16)
    g = luthier.compile(graph([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": (H, [64, 4096])}, ["y"], {"w": ones.T.copy()}), target="webgpu")
    s = luthier.compile(graph([h.make_node("ReduceMean", ["x"], ["y"], axes=[1])], {"x": (H, [64, 4096])}, ["y"]), target="webgpu")
    assert (g.run({"x": ones})["y"] == 4096).all() and (s.run({"x": ones})["y"] == 1).all()
    assert isinstance(g, WebGpuModule) and g.features == (wf.F16,)


def test_convolution_of_bytes() -> None:
    """Padded with the zero point, strides, three channels; the same integers with the dot product and without."""
    x, w = bytes_of(np.uint8, 2, 3, 15, 14), bytes_of(np.int8, 40, 3, 3, 3, seed=1)
    node = h.make_node("ConvInteger", ["x", "w", "zx"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2])
    m = luthier.compile(graph([node], {"x": (T.UINT8, [2, 3, 15, 14])}, ["y"], {"w": w, "zx": np.array(9, np.uint8)}), target="webgpu")
    assert isinstance(m, WebGpuModule)
    p = np.pad(x.astype(np.int64) - 9, ((0, 0), (0, 0), (1, 1), (1, 1)))
    want = np.zeros((2, 40, 8, 7), np.int64)
    for i in range(3):
        for j in range(3):
            want += np.einsum("bchw,oc->bohw", p[:, :, i : i + 15 : 2, j : j + 14 : 2], w[:, :, i, j].astype(np.int64))
    for allowed in (None, []):
        m.allow_features(allowed)
        np.testing.assert_array_equal(m.run({"x": x})["y"], want)
    assert any(wf.PACKED_DOT in fs for fs in m.host["features"])


def test_quantized_product_with_weights_that_do_not_fit() -> None:
    """Weights less their zero point need nine bits: no words, right results."""
    w, x = bytes_of(np.uint8, 64, 48), bytes_of(np.uint8, 40, 64, seed=2)
    m = luthier.compile(integer_product(T.UINT8, w, 3, 64), target="webgpu")
    assert isinstance(m, WebGpuModule) and not any(wf.PACKED_DOT in fs for fs in m.host["features"])
    np.testing.assert_array_equal(m.run({"x": x, "zx": np.array(11, np.uint8)})["y"], product_of(x, 11, w, 3))


def test_meaning_of_words() -> None:
    """The dot products of two words in the interpreter, in plain operations, and in numpy."""
    from luthier.ir import words
    from luthier.ir.dtypes import i8, u8
    from luthier.ir.expr import call, var
    from luthier.ir.interpret.loops import evaluate_expr

    a, b = bytes_of(np.uint8, 400), bytes_of(np.uint8, 400, seed=1)
    assert {i.a for i in words.WORDS.values()} == {i8, u8}
    for name, i in words.WORDS.items():
        x, y = var("x", words.u32, None), var("y", words.u32, None)
        want = (a.view(i.a.numpy).astype(np.int64) * b.view(i.b.numpy).astype(np.int64)).reshape(-1, 4).sum(1)
        for e in (call(name, i.acc, x, y), words.word_dot(i, x, y)):
            got = [evaluate_expr(e, {x: p, y: q}) for p, q in zip(a.view(np.uint32), b.view(np.uint32), strict=True)]
            np.testing.assert_array_equal(np.array(got, np.int64).reshape(-1), want)
    parts = [var(f"b{k}", words.u32, None) for k in range(4)]
    for e in (call(words.WORD, words.u32, *parts), words.word_of_bytes(parts)):
        assert int(evaluate_expr(e, dict(zip(parts, np.array([1, 2, 3, 255], np.uint32), strict=True)))) == 0xFF030201


def test_switched_off_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    have = here()
    m = build("rows")
    for text, want in (("none", ()), ("shader-f16", ()), ("subgroups, shader-f16", tuple(f for f in ("subgroups",) if f in have))):
        monkeypatch.setenv("LUTHIER_WEBGPU_FEATURES", text)
        m.allow_features(None)
        assert m.features == want
    with pytest.raises(InputError, match=r"no optional WebGPU feature 'f16'"):
        m.allow_features(["f16"])
    monkeypatch.setenv("LUTHIER_WEBGPU_FEATURES", "f16")
    m.allow_features(None)
    with pytest.raises(SettingError, match="shader-f16"):
        m.run(CASES["rows"][1])


@pytest.mark.parametrize("name", CASES)
def test_only_what_would_use_a_feature_is_there_twice(name: str) -> None:
    m = build(name)
    needs = m.host["features"]
    assert len(set(m.shaders)) == len(m.shaders) == len(needs)
    for p in m.host["pipelines"]:
        assert needs[p["shaders"][-1]] == [] and all(needs[s] for s in p["shaders"][:-1])
    assert any(len(p["shaders"]) > 1 for p in m.host["pipelines"])
    for text, fs in zip(m.shaders, needs, strict=True):
        assert "enable" not in text and all(bool(USES[f].search(text)) == (f in fs) for f in USES)


def test_nothing_is_printed_twice_without_a_use() -> None:
    m = luthier.compile(graph([h.make_node("Relu", ["x"], ["y"])], {"x": (T.FLOAT, [64])}, ["y"]), target="webgpu")
    assert isinstance(m, WebGpuModule) and m.host["features"] == [[]] and m.host["pipelines"][0]["shaders"] == [0]


def test_dialects() -> None:
    """Dawn wants the directive and WebGPU's name, wgpu-native neither."""
    assert wf.STANDARD.write("x", ["subgroups", "shader-f16"]) == "enable f16;\nenable subgroups;\nx"
    assert wf.NATIVE.write("x", ["subgroups", "shader-f16"]) == "enable f16;\nx"
    assert wf.NATIVE.device_features({"subgroup", "shader-f16", "other"}) == ["shader-f16", "subgroup"]
    assert wf.STANDARD.device_features({"subgroup"}) == []
    assert wf.NATIVE.usable({"subgroup"}, lambda text: "dot4" in text) == ("subgroups", wf.PACKED_DOT)
    assert wf.NATIVE.usable({"subgroups"}, lambda text: False) == ()


def test_order_of_choice() -> None:
    assert wf.subsets({"subgroups", "shader-f16"}) == [("shader-f16", "subgroups"), ("shader-f16",), ("subgroups",), ()]
    needs = [[], ["subgroups"], ["shader-f16", "subgroups"]]
    assert [wf.choose([2, 1, 0], needs, have) for have in ((), ("subgroups",), ("shader-f16",), ("subgroups", "shader-f16"))] == [0, 1, 0, 2]
    assert wf.in_use([{"shaders": [1, 0]}, {"shaders": [0]}], needs, ("subgroups", "shader-f16")) == ("subgroups",)


def test_dawn_accepts_all_alternatives() -> None:
    if dawn.missing():
        pytest.skip(str(dawn.missing()))
    one = const(1)
    shaders = []
    for name in CASES:
        m = build(name)
        shaders += [Shader(f"{name} {k}", s, (), (), (one, one, one), (1, 1, 1), tuple(fs)) for k, (s, fs) in enumerate(zip(m.shaders, m.host["features"], strict=True))]
    assert dawn.refused(shaders) == {}


# ---------------------------------------------------------------- in Chromium

WATCH = """
globalThis.texts = [];
const make = GPUDevice.prototype.createShaderModule;
GPUDevice.prototype.createShaderModule = function (d) { globalThis.texts.push(d.code); return make.call(this, d); };
"""
PAGE = """
export const texts = () => globalThis.texts.splice(0);
export async function features() {
  const adapter = await navigator.gpu.requestAdapter();
  return [...adapter.features, ...navigator.gpu.wgslLanguageFeatures];
}
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if browsers.missing():
        pytest.skip(browsers.missing())
    root = tmp_path_factory.mktemp("site")
    (root / "index.html").write_text('<!doctype html><title>tests</title><link rel="icon" href="data:,">')
    (root / "watch.js").write_text(PAGE)
    shutil.copy(Path(browsers.__file__).with_name("page.js"), root / "page.js")
    for name in CASES:
        build(name).save(root / name.replace(" ", "-"))
        for i, a in CASES[name][1].items():
            (root / f"{name.replace(' ', '-')}-{i}.bin").write_bytes(a.tobytes())
    server = serve.make_server(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Browser() as b:
        p = b.open(server.url, scripts=(WATCH,))
        yield p
        p.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", CASES)
def test_in_chromium(page: Page, name: str) -> None:
    """The browser's adapter decides (SwiftShader has no f16, so there the shaders without it run); ``features: []`` switches all off."""
    _, feeds, feature = CASES[name]
    have = page.call("/watch.js", "features")
    folder, want = name.replace(" ", "-"), wanted(name)
    page.call("/watch.js", "texts")
    for options, on in (({}, feature in have), ({"features": []}, False)):
        loaded = page.call("/page.js", "load", {"url": f"/{folder}/", "options": {"worker": False, **options}})
        assert "key" in loaded, loaded
        texts = page.call("/watch.js", "texts")
        assert (feature in loaded["info"]["features"]) == on == any(USES[feature].search(t) is not None for t in texts)
        if feature in wf.ENABLE:
            assert any(f"enable {wf.ENABLE[feature]};" in t for t in texts) == on
        inputs = {i: {"dtype": a.dtype.name, "shape": list(a.shape), "file": f"/{folder}-{i}.bin"} for i, a in feeds.items()}
        reply = page.call("/page.js", "run", {"key": loaded["key"], "inputs": inputs})
        assert "outputs" in reply, reply
        got = np.frombuffer(base64.b64decode(reply["outputs"]["y"]["base64"]), want.dtype).reshape(want.shape)
        close(got, want, TOLERANCE[feature])
        page.call("/page.js", "close", {"key": loaded["key"]})
