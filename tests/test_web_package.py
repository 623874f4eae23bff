"""Web packages without a browser: what the folder holds, its JavaScript under Node, the printer of GPU programs."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import luthier
from luthier.backends.web_package import read_weights, write_package
from luthier.cli.serve import make_server
from luthier.codegen.gpu.host_js import print_host_js
from luthier.errors import ArtifactError

NODE = shutil.which("node")
node = pytest.mark.skipif(NODE is None, reason="node is not installed")
RNG = np.random.default_rng(7)
W = RNG.standard_normal((64, 48)).astype(np.float32)


def model() -> onnx.ModelProto:
    """y[n,48] = relu(x[n,64] @ W), z[n] = sum of the int64 input t[n,2] over its second axis, flags kept as they are."""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["m"], name="product"),
        helper.make_node("Relu", ["m"], ["y"], name="relu"),
        helper.make_node("ReduceSum", ["t", "axes"], ["z"], name="sum", keepdims=0),
        helper.make_node("Not", ["b"], ["c"], name="not"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "small/model", [value("x", TensorProto.FLOAT, ["n", 64]), value("t", TensorProto.INT64, ["n", 2]), value("b", TensorProto.BOOL, [3])],
        [value("y", TensorProto.FLOAT, ["n", 48]), value("z", TensorProto.INT64, ["n"]), value("c", TensorProto.BOOL, [3])],
        [onnx.numpy_helper.from_array(W, "W"), onnx.numpy_helper.from_array(np.array([1]), "axes")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def feeds(n: int) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    return {"x": rng.standard_normal((n, 64)).astype(np.float32), "t": rng.integers(-9, 9, (n, 2)), "b": np.array([True, False, True])}


def expected(x: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(model().SerializeToString())
    return dict(zip(["y", "z", "c"], session.run(None, x), strict=True))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    return {t: luthier.compile(model(), target=t).save(folder / t, shard_mb=0.1) for t in ("wasm", "webgpu")}


@pytest.mark.parametrize("target", ["wasm", "webgpu"])
def test_folder(packages: dict[str, Path], target: str) -> None:
    folder = packages[target]
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("package.json", "index.js", "index.d.ts", "index.html", "runtime/model.js", "runtime/worker.js", f"runtime/engine_{target}.js"):
        assert (folder / name).is_file()
    for name, want in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == want["sha256"]
    shards = manifest["web"]["shards"]
    assert sum(s["bytes"] for s in shards) == len(read_weights(folder, manifest)) >= W.nbytes
    package = json.loads((folder / "package.json").read_text())
    assert package["name"] == target and package["type"] == "module" and (folder / package["main"]).is_file()
    types = (folder / "index.d.ts").read_text()
    assert '"x": Float32Array | TensorLike<Float32Array, [number, 64]>' in types
    assert '"z": Tensor<BigInt64Array, [number], "int64">' in types
    text = "".join(p.read_text() for p in folder.rglob("*.js"))
    assert "eval(" not in text and "new Function" not in text


def test_shards(tmp_path: Path) -> None:
    manifest: dict[str, Any] = {"name": "m", "target": {"kind": "wasm", "name": "wasm"}, "inputs": [], "outputs": []}
    weights = RNG.integers(0, 256, 250_001, dtype=np.uint8)
    names = write_package(tmp_path, manifest, weights, {"model.simd.wasm": b""}, shard_mb=0.1)
    assert [n for n in names if n.startswith("weights")] == ["weights.000.bin", "weights.001.bin", "weights.002.bin"]
    assert all(s["bytes"] <= 100_000 and s["offset"] % 256 == 0 for s in manifest["web"]["shards"])
    np.testing.assert_array_equal(read_weights(tmp_path, manifest), weights)
    (tmp_path / "weights.001.bin").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="weights.001.bin has 5 bytes"):
        read_weights(tmp_path, manifest)
    with pytest.raises(ArtifactError, match="no web package for targets of kind 'cpu'"):
        write_package(tmp_path, {**manifest, "target": {"kind": "cpu"}}, weights, {})
    with pytest.raises(ArtifactError, match="too small"):
        write_package(tmp_path, manifest, weights, {}, shard_mb=0)


def test_shard_size_is_for_web_packages(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no shards"):
        luthier.compile(model()).save(tmp_path / "m", shard_mb=1)


def test_saved_package_loads_in_python(packages: dict[str, Path]) -> None:
    pytest.importorskip("wasmtime")
    x = feeds(3)
    for name, want in expected(x).items():
        np.testing.assert_allclose(luthier.load(packages["wasm"]).run(x)[name], want, rtol=1e-5, atol=1e-5)


def test_code_is_small(packages: dict[str, Path]) -> None:
    for folder in packages.values():
        code = [p for p in folder.rglob("*") if p.suffix in (".js", ".json", ".wasm") and p.name != "host.json"]
        assert sum(len(gzip.compress(p.read_bytes())) for p in code) < 60_000


# ---------------------------------------------------------------- Node

SCRIPT = """
import { load } from "./index.js";
import { readFileSync } from "node:fs";
const read = (name, Type) => { const b = readFileSync(`${process.argv[2]}/${name}.bin`); return new Type(b.buffer.slice(b.byteOffset, b.byteOffset + b.length)); };
const out = {};
const model = await load(undefined, JSON.parse(process.argv[3]));
const plain = (t) => ({ ...t, data: Array.from(t.data, Number) });
const attempt = async (f) => { try { await f(); return "no error"; } catch (e) { return [e.name, e.code, e.message]; } };
const b = new Uint8Array([1, 0, 1]);
for (const n of [3, 1, 40]) {
  const r = await model.run({ x: read(`x${n}`, Float32Array), t: { data: read(`t${n}`, BigInt64Array), shape: [n, 2] }, b });
  out[n] = Object.fromEntries(Object.entries(r).map(([k, t]) => [k, plain(t)]));
}
const x = read("x3", Float32Array);
const t = read("t3", BigInt64Array);
out.one = Object.keys(await model.run({ x, t, b }, { outputs: ["z"] }));
out.errors = {
  missing: await attempt(() => model.run({ x, t })),
  unknown: await attempt(() => model.run({ x, t, b, q: x })),
  dtype: await attempt(() => model.run({ x: t, t, b })),
  rank: await attempt(() => model.run({ x: { data: x, shape: [3, 8, 8] }, t, b })),
  extent: await attempt(() => model.run({ x: { data: x, shape: [4, 48] }, t, b })),
  elements: await attempt(() => model.run({ x: x.subarray(1), t, b })),
  batch: await attempt(() => model.run({ x, t: t.subarray(2), b })),
  output: await attempt(() => model.run({ x, t, b }, { outputs: ["q"] })),
};
out.info = model.info;
await model.close();
out.errors.closed = await attempt(() => model.run({ x, t, b }));
console.log(JSON.stringify(out));
"""


def run_node(folder: Path, tmp_path: Path, options: dict[str, Any], timeout: float = 60) -> dict[str, Any]:
    for n in (3, 1, 40):
        x = feeds(n)
        (tmp_path / f"x{n}.bin").write_bytes(x["x"].tobytes())
        (tmp_path / f"t{n}.bin").write_bytes(x["t"].tobytes())
    script = folder / "check.mjs"
    script.write_text(SCRIPT)
    assert NODE is not None
    done = subprocess.run([NODE, str(script), str(tmp_path), json.dumps(options)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@node
@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}, {"threads": 2, "worker": True}, {"variant": "simd"}], ids=str)
def test_node(packages: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    out = run_node(packages["wasm"], tmp_path, options)
    for n in (3, 1, 40):
        want = expected(feeds(n))
        for name, a in want.items():
            got = out[str(n)][name]
            assert got["shape"] == list(a.shape) and got["dtype"] == a.dtype.name
            np.testing.assert_allclose(np.array(got["data"]).reshape(a.shape), a, rtol=1e-5, atol=1e-5)
    assert out["one"] == ["z"]
    codes = {k: v[:2] for k, v in out["errors"].items()}
    assert codes == {
        "missing": ["InputError", "MISSING_INPUT"], "unknown": ["InputError", "UNKNOWN_INPUT"], "dtype": ["InputError", "WRONG_DTYPE"],
        "rank": ["InputError", "WRONG_SHAPE"], "extent": ["InputError", "WRONG_SHAPE"], "elements": ["InputError", "WRONG_SHAPE"],
        "batch": ["InputError", "WRONG_SHAPE"], "output": ["InputError", "UNKNOWN_OUTPUT"], "closed": ["ClosedError", "CLOSED"],
    }  # fmt: skip
    assert '"t"' in out["errors"]["batch"][2]
    assert out["info"]["backend"] == "wasm"


@node
def test_node_bad_packages(packages: dict[str, Path], tmp_path: Path) -> None:
    """Every way in which a folder can be broken is an error with a code, never a hang or a wrong result."""
    assert NODE is not None
    script = 'import { load } from "./index.js"; try { await load(undefined, {threads: 1}); console.log("loaded") } catch (e) { console.log(e.name, e.code, e.message) }'

    def attempt(name: str, change: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(packages["wasm"], folder)
        change(folder)
        (folder / "try.mjs").write_text(script)
        return subprocess.run([NODE, str(folder / "try.mjs")], capture_output=True, text=True, timeout=60, check=True).stdout

    def flip(folder: Path) -> None:
        data = bytearray((folder / "weights.000.bin").read_bytes())
        data[100] ^= 1
        (folder / "weights.000.bin").write_bytes(data)

    assert attempt("good", lambda f: None) == "loaded\n"
    assert attempt("missing", lambda f: (f / "weights.000.bin").unlink()).startswith("PackageError FILE_MISSING")
    assert attempt("flipped", flip).startswith("PackageError FILE_CORRUPTED")
    assert "instead of" in attempt("short", lambda f: (f / "weights.000.bin").write_bytes(b"abc"))
    assert attempt("code", lambda f: [p.write_bytes(b"\0asm") for p in f.glob("*.wasm")]).startswith("PackageError FILE_CORRUPTED")
    assert attempt("manifest", lambda f: (f / "manifest.json").write_text("<html>")).startswith("PackageError FILE_CORRUPTED")
    other = json.loads((packages["webgpu"] / "manifest.json").read_text())
    assert attempt("build", lambda f: (f / "manifest.json").write_text(json.dumps(other))).startswith("PackageError OTHER_BUILD")


@node
def test_a_call_that_fails_does_not_harm_the_next(packages: dict[str, Path]) -> None:
    """A trap, too little memory, inputs that do not fit, an output that JavaScript has no array for: the next call is right."""
    assert NODE is not None
    script = packages["wasm"] / "fail.mjs"
    script.write_text("""
const { instantiate } = WebAssembly;
let fault = null;
WebAssembly.instantiate = async (...words) => {
  const { exports } = await instantiate(...words);
  const lt_run = (...a) => {
    if (!fault) return exports.lt_run(...a);
    const error = fault;
    fault = null;
    if (error instanceof WebAssembly.RuntimeError) new Uint8Array(words[1].env.memory.buffer).fill(255); // whatever it did to the memory
    throw error;
  };
  return { exports: { ...exports, lt_run } };
};
const { load } = await import("./index.js");
const m = await load(undefined, { threads: 2, variant: process.argv[2] });
const inputs = (n) => ({ x: new Float32Array(64 * n).fill(0.5), t: { data: new BigInt64Array(2 * n).fill(3n), shape: [n, 2] }, b: new Uint8Array(3) });
const attempt = async (f) => { try { await f(); return "no error"; } catch (e) { return [e.name, e.code]; } };
const good = async (n) => { const r = await m.run(inputs(n)); return [Array.from(r.y.data), Array.from(r.z.data, Number)]; };
const out = { rows: [await good(3)], errors: [] };
const trap = () => { fault = new WebAssembly.RuntimeError("unreachable"); return m.run(inputs(5)); };
const memory = () => { fault = new RangeError("Array buffer allocation failed"); return m.run(inputs(5)); };
for (const f of [trap, memory, trap, () => m.run({ ...inputs(3), t: new BigInt64Array(8) }), trap]) {
  out.errors.push(await attempt(f));
  out.rows.push(await good(3));
}
const calls = [trap(), m.run(inputs(3)), m.run(inputs(3))]; // those that wait run on the new one
out.waiting = (await Promise.allSettled(calls)).map((r) => (r.status === "fulfilled" ? Array.from(r.value.y.data) : r.reason.code));
out.threads = m.info.threads;
await m.close();
console.log(JSON.stringify(out));
""")
    for variant in ("simd", "simd-threads"):
        done = subprocess.run([NODE, str(script), variant], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        out = json.loads(done.stdout)
        assert out["errors"] == [
            ["KernelError", "TRAP"], ["OutOfMemoryError", "NO_MEMORY"], ["KernelError", "TRAP"], ["InputError", "WRONG_SHAPE"], ["KernelError", "TRAP"],
        ]  # fmt: skip
        want = np.maximum(np.full((3, 64), 0.5, np.float32) @ W, 0).ravel()
        for y, z in out["rows"]:
            np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
            assert z == [6, 6, 6]
        assert out["waiting"][0] == "TRAP" and np.allclose(out["waiting"][1:], want, atol=1e-5)
        assert out["threads"] == (2 if "threads" in variant else 1)


@node
def test_node_has_no_webgpu(packages: dict[str, Path]) -> None:
    assert NODE is not None
    script = packages["webgpu"] / "try.mjs"
    script.write_text('import { load } from "./index.js"; try { await load() } catch (e) { console.log(e.name, e.code, e.hint) }')
    done = subprocess.run([NODE, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("UnsupportedError NO_WEBGPU") and "wasm" in done.stdout


def test_probe_of_dot_products() -> None:
    """The module with which the loader tries relaxed dot products gives 1 under wasmtime."""
    wasmtime = pytest.importorskip("wasmtime")
    from luthier.backends.wasm import probes

    store = wasmtime.Store()
    module = wasmtime.Module(store.engine, base64.b64decode(probes()["dot"]))
    memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    assert wasmtime.Instance(store, module, [memory]).exports(store)["check"](store) == 1


@node
def test_checksum_in_javascript() -> None:
    """The fallback for pages without crypto.subtle, against hashlib."""
    assert NODE is not None
    path = Path(__file__).resolve().parents[1] / "codegen" / "web_runtime" / "sha256.js"
    script = f"""
    import {{ digest }} from {json.dumps(path.as_uri())};
    for (const n of [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, 65537]) console.log(digest(Uint8Array.from({{ length: n }}, (_, i) => i * 7)));
    """
    done = subprocess.run([NODE, "--input-type=module", "-e", script], capture_output=True, text=True, timeout=60, check=True)
    sizes = (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, 65537)
    assert done.stdout.split() == [hashlib.sha256(bytes(i * 7 % 256 for i in range(n))).hexdigest() for n in sizes]


# ---------------------------------------------------------------- GPU programs

G = """
const log = [];
const g = {
  dim: (j, axis) => 5 + j + axis, peek: (j, k) => 10 * j + k, input: (j) => `in${j}`, weights: (k) => `w${k}`, bits: (v) => v * 2,
  buffer: (k, bytes) => { log.push(["buffer", k, bytes]); return `b${k}`; }, check: (...a) => log.push(["check", ...a]),
  dispatch: (...a) => log.push(["dispatch", ...a]), write: (...a) => log.push(["write", ...a]), copy: (...a) => log.push(["copy", ...a]),
  output: (...a) => log.push(["output", ...a]), round: async () => log.push(["round"]), read: async (h, o, t) => { log.push(["read", h, o, t]); return 3; },
};
await program.main(g);
console.log(JSON.stringify(log));
"""


@node
def test_host_program(tmp_path: Path) -> None:
    """Every statement and operator of the host language, against the values that Python gives them."""
    assert NODE is not None
    n = ["dim", 0, 1]  # 6
    cases: list[tuple[Any, Any]] = [
        (["+", n, 1], 7), (["-", 1, n], -5), (["*", n, -2], -12), (["//", ["-", 1, n], 4], -2), (["%", ["-", 1, n], 4], 3),
        (["trunc/", ["-", 1, n], 4], -1), (["trunc%", ["-", 1, n], 4], -1), (["/", n, 4], 1.5), (["min", n, 2], 2), (["max", n, 2], 6),
        (["abs", ["neg", n]], 6), (["floor", -1.5], -2), (["ceil", -1.5], -1), (["int", -1.5], -1), (["wrap", 300, 8, True], 44),
        (["wrap", 200, 8, True], -56), (["wrap", -1, 32, False], 4294967295), (["wrap", 4294967295, 32, True], -1), (["peek", 1, 2], 12),
        (["?", ["<", n, 7], 1, 2], 1), (["?", ["and", ["<=", n, 6], ["not", ["==", n, 6]]], 1, 2], 2), (["?", ["or", ["!=", n, 6], False], 1, 2], 2),
        (["bits", 1.5], 3), (["mirror", 0, 1], 8), (["//", 9007199254740991, 2], 4503599627370495),
    ]  # fmt: skip
    body: list[Any] = [
        ["let", "d_n", n], ["buffer", 3, ["*", "d_n", 4]], ["mirror", 0, 1, 8], ["check", "d_n", 6, 'the "n"'],
        ["write", ["b", 3], 4, "i32", [case for case, _ in cases]],
        ["let", "d_v", ["read", ["b", 3], 8, "i64"]],
        ["mirror", 1, 0, 0],
        ["while", ["<", ["mirror", 1, 0], "d_v"], [["mirror", 1, 0, ["+", ["mirror", 1, 0], 2]], ["copy", ["in", 0], 0, ["b", 3], 4, 8]]],
        ["if", ["<", "d_n", 3], [["copy", ["b", 3], 0, ["b", 3], 0, 1]], [["dispatch", 0, [[["w", 0], 256, 16], [["b", 3], 0, "d_n"]], ["d_n", ["bits", 1.5]], 2, 1, 1, 0]]],
        ["output", 0, ["b", 3], 12, ["d_n", 2]],
    ]  # fmt: skip
    host = {"pipelines": [{"shaders": [1, 0], "bindings": "rw", "uniforms": 16}], "features": [[], ["shader-f16"]], "weights": [[0, 512]], "narrow": [1], "fixed": False, "mirrors": 2, "body": body}
    (tmp_path / "program.mjs").write_text(print_host_js(host))
    (tmp_path / "run.mjs").write_text(f'import * as program from "./program.mjs";\nconsole.log(JSON.stringify([program.needs, program.features, program.pipelines]));\n{G}')
    done = subprocess.run([NODE, str(tmp_path / "run.mjs")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    needs, log = map(json.loads, done.stdout.splitlines())
    assert needs == [{"features": [], "limits": {}}, [[], ["shader-f16"]], host["pipelines"]]
    values = next(entry for entry in log if entry[0] == "write")
    assert values[1:4] == ["b3", 4, "i32"]
    assert values[4] == [want for _, want in cases]
    rest = [entry for entry in log if entry[0] != "write"]
    assert rest == [
        ["buffer", 3, 24], ["check", 6, 6, 'the "n"'], ["read", "b3", 8, "i64"],
        ["round"], ["copy", "in0", 0, "b3", 4, 8], ["round"], ["copy", "in0", 0, "b3", 4, 8],
        ["dispatch", 0, [["w0", 256, 16], ["b3", 0, 6]], [6, 3], 2, 1, 1], ["output", 0, "b3", 12, [6, 2]],
    ]  # fmt: skip


# ---------------------------------------------------------------- serve


def test_serve(packages: dict[str, Path]) -> None:
    server = make_server(packages["wasm"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with urllib.request.urlopen(server.url) as reply:
            assert reply.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert reply.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert "wasm-unsafe-eval" in reply.headers["Content-Security-Policy"]
        for name, kind in (("model.simd.wasm", "application/wasm"), ("index.js", "text/javascript"), ("manifest.json", "application/json")):
            with urllib.request.urlopen(server.url + name) as reply:
                assert reply.headers["Content-Type"] == kind
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(server.url, headers={"Host": "example.org"}))
        with pytest.raises(ArtifactError, match="--port"):
            make_server(packages["wasm"], server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
