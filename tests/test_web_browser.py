"""Web packages in headless Chromium: both targets, with and without isolation, in pages and workers, and everything that can fail.

Needs Chromium, Node and playwright-core (`python benchmarks/setup_web.py --tests`); skipped with the reason without them.
"""

from __future__ import annotations

import base64
import functools
import http.server
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import luthier
from benchmarks import browser as browsers
from benchmarks.browser import Browser, Page
from luthier.cli import serve

pytestmark = pytest.mark.skipif(bool(browsers.missing()), reason=browsers.missing() or "-")
TARGETS = ("wasm", "webgpu")
RNG = np.random.default_rng(3)
W1, W2 = RNG.standard_normal((96, 160)).astype(np.float32), RNG.standard_normal((160, 32)).astype(np.float32)


def model() -> onnx.ModelProto:
    """y[n,32] = softmax(relu(x[n,96] @ W1) @ W2); k[n] = its largest place, int64."""
    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["a"], name="first"), helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "W2"], ["c"], name="second"), helper.make_node("Softmax", ["c"], ["y"], name="softmax"),
        helper.make_node("ArgMax", ["c"], ["k"], name="place", axis=1, keepdims=0),
    ]  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "two layers", [value("x", TensorProto.FLOAT, ["n", 96])],
        [value("y", TensorProto.FLOAT, ["n", 32]), value("k", TensorProto.INT64, ["n"])],
        [onnx.numpy_helper.from_array(W1, "W1"), onnx.numpy_helper.from_array(W2, "W2")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site: packages of both targets, broken copies, inputs, the page's functions."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text('<!doctype html><title>tests</title><link rel="icon" href="data:,">')
    for name in ("page.js", "page_worker.js"):
        shutil.copy(Path(browsers.__file__).with_name(name), folder / name)
    for target in TARGETS:
        luthier.compile(model(), target=target).save(folder / target, shard_mb=0.1)
    for target in TARGETS:
        missing, corrupted = (shutil.copytree(folder / target, folder / f"{target}-{w}") for w in ("missing", "corrupted"))
        (missing / "weights.000.bin").unlink()
        data = bytearray((corrupted / "weights.000.bin").read_bytes())
        data[1000] ^= 255
        (corrupted / "weights.000.bin").write_bytes(data)
    for n in (1, 5, 33):
        (folder / f"x{n}.bin").write_bytes(inputs(n).tobytes())
    return folder


def inputs(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).standard_normal((n, 96)).astype(np.float32)


def expected(n: int) -> list[np.ndarray[Any, Any]]:
    return list(onnxruntime.InferenceSession(model().SerializeToString()).run(None, {"x": inputs(n)}))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as b:
        yield b


def start(root: Path, **options: Any) -> Iterator[str]:
    server = serve.make_server(root, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.url
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def site(root: Path) -> Iterator[str]:
    yield from start(root)


@pytest.fixture(scope="module")
def plain_site(root: Path) -> Iterator[str]:
    """A server that sends none of the special headers."""
    yield from start(root, isolated=False, policy=None)


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    p = browser.open(site)
    yield p
    p.close()


def load(page: Page, package: str, **options: Any) -> dict[str, Any]:
    return dict(page.call("/page.js", "load", {"url": f"/{package}/", "options": options}))


def run(page: Page, key: int, n: int) -> dict[str, Any]:
    return dict(page.call("/page.js", "run", {"key": key, "inputs": {"x": {"dtype": "float32", "shape": [n, 96], "file": f"/x{n}.bin"}}}))


def check(reply: dict[str, Any], n: int) -> None:
    assert "outputs" in reply, reply
    for name, want in zip(["y", "k"], expected(n), strict=True):
        t = reply["outputs"][name]
        assert t["shape"] == list(want.shape) and t["dtype"] == want.dtype.name
        got = np.frombuffer(base64.b64decode(t["base64"]), want.dtype).reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_demo_page(browser: Browser, root: Path, target: str) -> None:
    """The page runs at once, under a strict policy, without a word on the console."""
    for url in start(root / target):
        page = browser.open(url)
        page.wait_for("html[data-state=ran], html[data-state=failed]", 60)
        assert page.text("#error") == ""
        assert page.text("#name") == "two layers" and "Loaded in" in page.text("#status")
        assert "float32" in page.text("#outputs") and "[1, 32]" in page.text("#outputs")
        assert page.log() == []
        page.close()


OPEN_IMAGES = {  # a window wider than sixteen pixels; a picture of 64 pixels and no other
    "window": ([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": np.ones((1, 1, 20, 20), np.float32)}, ["a", "b"]),
    "product": ([helper.make_node("Reshape", ["x", "to"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
                {"to": np.array([1, -1]), "w": np.ones((64, 2), np.float32)}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPEN_IMAGES)
def test_demo_page_of_open_height_and_width(browser: Browser, tmp_path: Path, kind: str) -> None:
    """The page begins with extents that the model takes, and shows no error."""
    nodes, weights, out = OPEN_IMAGES[kind]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, kind, [value("x", TensorProto.FLOAT, [1, 1, "h", "w"])], [value("y", TensorProto.FLOAT, [1, 1, *out] if out else [1, 2])],
        [onnx.numpy_helper.from_array(a, name) for name, a in weights.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    for url in start(luthier.compile(proto, target="wasm").save(tmp_path / kind)):
        page = browser.open(url)
        page.wait_for("html[data-state=ran], html[data-state=failed]", 60)
        assert page.text("#error") == "" and "float32" in page.text("#outputs")
        page.close()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("worker", [True, False])
def test_results(page: Page, target: str, worker: bool) -> None:
    model = load(page, target, worker=worker)
    assert "key" in model, model
    for n in (1, 5, 33, 5):
        check(run(page, model["key"], n), n)
    loaded = [p["loaded"] for p in model["progress"]]
    assert loaded == sorted(loaded) and loaded[-1] == model["progress"][-1]["total"] > W1.nbytes
    page.call("/page.js", "close", {"key": model["key"]})
    assert page.log() == []


@pytest.mark.parametrize("target", TARGETS)
def test_own_worker(page: Page, target: str) -> None:
    """A page that loads the package in a worker of its own."""
    model = page.call("/page.js", "inWorker", {"name": "load", "argument": {"url": f"/{target}/", "options": {}}})
    assert "key" in model, model
    given = {"x": {"dtype": "float32", "shape": [5, 96], "file": "/x5.bin"}}
    check(page.call("/page.js", "inWorker", {"name": "run", "argument": {"key": model["key"], "inputs": given}}), 5)


@pytest.mark.parametrize("variant", ["simd", "relaxed", "simd-threads", "relaxed-threads"])
def test_variants(page: Page, variant: str) -> None:
    model = load(page, "wasm", variant=variant, threads=2)
    assert model["info"]["variant"] == variant
    assert model["info"]["threads"] == (2 if variant.endswith("threads") else 1)
    for n in (33, 1):
        check(run(page, model["key"], n), n)


def test_threads_need_isolation(browser: Browser, site: str, plain_site: str) -> None:
    page = browser.open(plain_site)
    model = load(page, "wasm", threads=2)
    assert model["info"]["variant"] == "relaxed" and model["info"]["threads"] == 1
    assert any("cross-origin isolated" in w for w in model["info"]["warnings"])
    check(run(page, model["key"], 5), 5)
    refused = load(page, "wasm", threads=2, requireThreads=True)
    assert (refused["error"], refused["code"]) == ("IsolationError", "NO_ISOLATION")
    assert "Cross-Origin-Opener-Policy" in refused["hint"]
    page.close()
    page = browser.open(site)
    assert load(page, "wasm", threads=2, requireThreads=True)["info"]["threads"] == 2
    page.close()


@pytest.mark.parametrize("target", TARGETS)
def test_broken_packages(page: Page, target: str) -> None:
    for what, code in (("missing", "FILE_MISSING"), ("corrupted", "FILE_CORRUPTED")):
        reply = load(page, f"{target}-{what}")
        assert (reply["error"], reply["code"]) == ("PackageError", code), reply
        assert "weights.000.bin" in reply["message"] and reply["hint"]
    reply = load(page, target, worker=False)
    assert "key" in reply


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_inputs(page: Page, target: str) -> None:
    key = load(page, target)["key"]
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "MISSING_INPUT"), ({"x": {"dtype": "float32", "shape": [4, 96], "file": "/x5.bin"}}, "WRONG_SHAPE"),
        ({"x": {"dtype": "int32", "shape": [5, 96], "file": "/x5.bin"}}, "WRONG_DTYPE"),
        ({"x": {"dtype": "float32", "shape": [480], "file": "/x5.bin"}}, "WRONG_SHAPE"),
    ]  # fmt: skip
    for given, code in bad:
        reply = page.call("/page.js", "run", {"key": key, "inputs": given})
        assert (reply["error"], reply["code"]) == ("InputError", code), reply
    check(run(page, key, 5), 5)


def test_stalled_download(browser: Browser, root: Path) -> None:
    """A server that stops sending in the middle of a shard is an error after the time that the page allows."""
    release = threading.Event()

    class Stalling(serve.Handler):
        def do_GET(self) -> None:
            if not self.path.endswith("weights.000.bin"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(bytes(1000))
            self.wfile.flush()
            release.wait(30)
            self.close_connection = True

    handler = functools.partial(Stalling, directory=str(root), headers=dict(serve.ISOLATION), quiet=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.open(f"http://localhost:{server.server_address[1]}/")
    begin = time.monotonic()
    reply = load(page, "wasm", stall=700)
    release.set()
    page.close()
    server.shutdown()
    assert (reply["error"], reply["code"]) == ("PackageError", "FILE_STALLED"), reply
    assert time.monotonic() - begin < 25


@pytest.mark.parametrize("worker", [True, False])
def test_lost_device(page: Page, worker: bool) -> None:
    """The device goes away between two calls: the next call loads the model again and is right."""
    key = load(page, "webgpu", worker=worker)["key"]
    check(run(page, key, 5), 5)
    page.call("/page.js", "debug", {"key": key, "action": "lose"})
    reply = run(page, key, 33)
    check(reply, 33)
    assert reply["info"]["restarts"] == 1


def test_lost_device_that_stays_away(page: Page, root: Path) -> None:
    """The device goes away and the package's files are gone as well."""
    shutil.copytree(root / "webgpu", root / "webgpu-gone")
    key = load(page, "webgpu-gone")["key"]
    shutil.rmtree(root / "webgpu-gone")
    page.call("/page.js", "debug", {"key": key, "action": "lose"})
    reply = run(page, key, 5)
    assert (reply["error"], reply["code"]) == ("DeviceLostError", "DEVICE_LOST"), reply


def test_no_webgpu(browser: Browser, site: str) -> None:
    page = browser.open(site, ("Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined });",))
    reply = load(page, "webgpu", worker=False)
    assert (reply["error"], reply["code"]) == ("UnsupportedError", "NO_WEBGPU")
    assert "wasm" in reply["hint"]
    page.close()


NO_ADAPTER = "if (navigator.gpu) navigator.gpu.requestAdapter = async () => null;"


def test_no_adapter(browser: Browser, site: str) -> None:
    """WebGPU is there, a GPU is not."""
    page = browser.open(site, (NO_ADAPTER,))
    reply = load(page, "webgpu", worker=False)
    assert (reply["error"], reply["code"]) == ("UnsupportedError", "NO_ADAPTER")
    assert "wasm" in reply["hint"]
    assert "key" in load(page, "wasm")
    page.close()


@pytest.mark.parametrize("worker", [True, False])
def test_gpu_too_small(page: Page, root: Path, worker: bool) -> None:
    """A package that needs more than the adapter has."""
    small = shutil.copytree(root / "webgpu", root / f"too-small-{worker}")
    text = (small / "program.js").read_text()
    head, needs, rest = text.partition("export const needs = ")
    assert needs
    asked = 'export const needs = {features: ["no-such-feature"], limits: {maxStorageBuffersPerShaderStage: 100000}};'
    (small / "program.js").write_text(head + asked + rest[rest.index("\n") :])
    reply = load(page, small.name, worker=worker)
    assert (reply["error"], reply["code"]) == ("UnsupportedError", "GPU_TOO_SMALL"), reply
    assert "no-such-feature" in reply["message"] and "maxStorageBuffersPerShaderStage 100000" in reply["message"]
    assert "wasm" in reply["hint"]


@pytest.mark.parametrize("worker", [True, False])
def test_lost_device_during_a_run(page: Page, worker: bool) -> None:
    """The device goes away while calls are under way: all of them answer, and rightly."""
    key = load(page, "webgpu", worker=worker)["key"]
    check(run(page, key, 5), 5)
    given = [{"x": {"dtype": "float32", "shape": [n, 96], "file": f"/x{n}.bin"}} for n in (33, 5, 1)]
    replies = page.call("/page.js", "runAndLose", {"key": key, "inputs": given})
    for reply, n in zip(replies, (33, 5, 1), strict=True):
        check(reply, n)
    assert replies[-1]["info"]["restarts"] == 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("worker", [True, False])
def test_strict_policy(page: Page, plain_site: str, browser: Browser, target: str, worker: bool) -> None:
    """A policy that refuses evaluated text is in force, and the package neither needs nor tries it."""
    assert page.call("/page.js", "evaluates") is False
    check(run(page, load(page, target, worker=worker)["key"], 5), 5)
    assert page.log() == []
    free = browser.open(plain_site)
    assert free.call("/page.js", "evaluates") is True
    free.close()


@pytest.mark.parametrize("target", TARGETS)
def test_server_out_of_reach(page: Page, target: str) -> None:
    """No one answers at the package's address."""
    reply = page.call("/page.js", "loadFrom", {"code": f"/{target}/", "url": "http://localhost:9/"})
    assert (reply["error"], reply["code"]) == ("PackageError", "FILE_UNREACHABLE"), reply
    assert reply["hint"]


def test_another_build(page: Page, root: Path) -> None:
    """Code and weights of different builds do not run together."""
    mixed = shutil.copytree(root / "wasm", root / "mixed")
    manifest = json.loads((mixed / "manifest.json").read_text())
    manifest["web"]["id"] = "0" * 16
    (mixed / "manifest.json").write_text(json.dumps(manifest))
    reply = load(page, "mixed")
    assert (reply["error"], reply["code"]) == ("PackageError", "OTHER_BUILD")


@pytest.fixture(scope="module")
def outer(root: Path) -> str:
    """A package in the site: y[n,n] = relu(x[n,1] @ x[1,n]), and the largest of each row."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "one"], ["a"]), helper.make_node("Unsqueeze", ["x", "zero"], ["b"]), helper.make_node("MatMul", ["a", "b"], ["m"]),
        helper.make_node("Relu", ["m"], ["y"]), helper.make_node("ReduceMax", ["y", "one"], ["z"], keepdims=0),
    ]  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "outer", [value("x", TensorProto.FLOAT, ["n"])], [value("y", TensorProto.FLOAT, ["n", "n"]), value("z", TensorProto.FLOAT, ["n"])],
        [onnx.numpy_helper.from_array(np.array([k]), name) for k, name in enumerate(("zero", "one"))],
    )  # fmt: skip
    luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), target="webgpu").save(root / "outer")
    return "outer"


def squares(page: Page, key: int, n: int, outputs: list[str] | None = None) -> dict[str, Any]:
    return dict(page.call("/page.js", "run", {"key": key, "inputs": {"x": {"dtype": "float32", "shape": [n], "fill": 3}}, "outputs": outputs}))


def check_squares(reply: dict[str, Any], n: int) -> None:
    assert "outputs" in reply, reply
    for name, count in (("y", n * n), ("z", n)):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(reply["outputs"][name]["base64"]), np.float32), np.full(count, 9, np.float32))


@pytest.mark.parametrize("worker", [True, False])
def test_too_large_a_call_does_not_harm_the_next(page: Page, outer: str, worker: bool) -> None:
    """Temporaries and outputs that no adapter has room for: an error of their own class each time, and small calls between them run."""
    key = load(page, outer, worker=worker)["key"]
    for n, outputs in ((5, None), (100_000, None), (5, None), (7, None), (300_000, ["z"]), (7, None)):
        reply = squares(page, key, n, outputs)
        if n < 10:
            check_squares(reply, n)
        else:
            assert (reply["error"], reply["code"]) == ("OutOfMemoryError", "NO_GPU_MEMORY"), reply
            assert "the adapter allows" in reply["message"] and reply["hint"]
    assert page.log() == []


# the page's device has no memory for buffers of a megabyte and more, as a real one says it: an invalid buffer and an error in the scope
NO_ROOM = """
const { createBuffer, popErrorScope } = GPUDevice.prototype;
let failed = 0;
GPUDevice.prototype.createBuffer = function (d) {
  if (d.size < 1 << 20) return createBuffer.call(this, d);
  failed += 1;
  this.pushErrorScope("validation");
  const buffer = createBuffer.call(this, { ...d, size: 2 ** 45, mappedAtCreation: false });
  popErrorScope.call(this);
  failed = 1;
  return buffer;
};
GPUDevice.prototype.popErrorScope = function () {
  const error = failed ? new GPUOutOfMemoryError("made up") : null;
  failed = 0;
  return popErrorScope.call(this).then((own) => error || own);
};
"""


def test_out_of_gpu_memory(browser: Browser, site: str, outer: str) -> None:
    """The GPU itself has no memory for a buffer: the buffer is not kept."""
    page = browser.open(site, (NO_ROOM,))
    key = load(page, outer, worker=False)["key"]
    for n in (5, 600, 5, 7, 700, 600, 7, 300_000, 5):  # the last but one: the input, too
        reply = squares(page, key, n, None if n < 1000 else ["z"])
        if n < 10:
            check_squares(reply, n)
        else:
            assert (reply["error"], reply["code"]) == ("OutOfMemoryError", "NO_GPU_MEMORY") and "made up" in reply["message"], reply
    page.close()
