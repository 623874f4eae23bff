"""What a call of a web package takes: numbers and (nested) arrays, small views of large buffers, when it reads them; options; f16; names for npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import luthier
from benchmarks.browser import NODE_MODULES
from luthier.errors import ArtifactError
from tests.test_cli import cli

NODE = shutil.which("node")
DENO = next(iter(sorted(NODE_MODULES.glob("@deno/*/deno"))), None)
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
TYPES = {
    "f": TensorProto.FLOAT, "h": TensorProto.FLOAT16, "b": TensorProto.BOOL, "i": TensorProto.INT32, "l": TensorProto.INT64, "u": TensorProto.UINT8,
    "q": TensorProto.UINT64, "n": TensorProto.BFLOAT16,
}  # fmt: skip


def model(shape: list[Any], name: str = "main_graph") -> onnx.ModelProto:
    """Every input X of `TYPES`, [shape], comes out as oX; s is a scalar."""
    ins = [helper.make_tensor_value_info(n, t, shape) for n, t in TYPES.items()] + [helper.make_tensor_value_info("s", TensorProto.FLOAT, [])]
    outs = [helper.make_tensor_value_info(f"o{v.name}", v.type.tensor_type.elem_type, None if v.name == "s" else shape) for v in ins]
    nodes = [helper.make_node("Identity", [v.name], [f"o{v.name}"]) for v in ins]
    return helper.make_model(helper.make_graph(nodes, name, ins, outs), opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


SCRIPT = """
import { load } from "./index.js";
const attempt = async (f) => { try { await f(); return "no error"; } catch (e) { return [e.name, e.code, e.message]; } };
const base = () => ({
  f: Float32Array.of(1, 2), h: Uint16Array.of(0x3c00, 0x4000), b: Uint8Array.of(1, 0), i: Int32Array.of(-3, 4), l: BigInt64Array.of(-5n, 6n),
  u: Uint8Array.of(7, 255), q: BigUint64Array.of(8n, 9n), n: Uint16Array.of(0x3f80, 0), s: Float32Array.of(2.5),
});
const shown = (r) => Object.fromEntries(Object.entries(r).map(([k, t]) => [k, [t.shape, Array.from(t.data, String), t.data.constructor.name]]));
"""


def node(folder: Path, text: str, *command: str) -> Any:
    file = folder / "try.mjs"
    file.write_text(f"{SCRIPT}\nconst out = {{}};\n{text}\nconsole.log(JSON.stringify(out));")
    done = subprocess.run([*(command or [str(NODE)]), str(file)], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return luthier.compile(model([2]), target="wasm").save(tmp_path_factory.mktemp("inputs") / "wasm")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with open extents [a, c]."""
    return luthier.compile(model(["a", "c"]), target="wasm").save(tmp_path_factory.mktemp("inputs") / "rows")


@needs_node
@pytest.mark.parametrize("worker", [False, True])
def test_numbers_and_arrays(package: Path, worker: bool) -> None:
    out = node(package, f"""
const m = await load(undefined, {{ threads: 1, worker: {json.dumps(worker)} }});
out.typed = shown(await m.run(base()));
out.plain = shown(await m.run({{ ...base(), f: [1, 2], b: [true, false], i: [-3, 4n], l: [-5, 6n], u: [7, 255], q: {{ data: [8n, 9], shape: [2] }}, s: 2.5 }}));
const wrong = {{ f: "12", b: [2, 0], i: [1.5, 0], l: [2n ** 63n, 0], u: [256, 0], q: [-1, 0], n: [1, 2], s: [1, 2] }};
out.errors = {{}};
for (const [name, value] of Object.entries(wrong)) out.errors[name] = await attempt(() => m.run({{ ...base(), [name]: value }}));
out.kinds = [];
for (const value of [[1, [2]], [1, null], [NaN, "x"], new DataView(new ArrayBuffer(8)), new ArrayBuffer(8), {{}}, {{ shape: [2] }}, {{ data: null }}, BigInt64Array.of(1n, 2n), new Map(), true]) {{
  out.kinds.push(await attempt(() => m.run({{ ...base(), f: value }})));
}}
out.after = shown(await m.run(base()));
await m.close();
""")  # fmt: skip
    assert out["plain"] == out["typed"] == out["after"]
    assert out["typed"]["os"][1] == ["2.5"] and out["typed"]["os"][0] == []
    codes = {k: v[:2] for k, v in out["errors"].items()}
    assert codes == {
        "f": ["InputError", "WRONG_DTYPE"], "b": ["InputError", "OUT_OF_RANGE"], "i": ["InputError", "OUT_OF_RANGE"], "l": ["InputError", "OUT_OF_RANGE"],
        "u": ["InputError", "OUT_OF_RANGE"], "q": ["InputError", "OUT_OF_RANGE"], "n": ["InputError", "WRONG_DTYPE"], "s": ["InputError", "WRONG_SHAPE"],
    }  # fmt: skip
    assert "1.5" in out["errors"]["i"][2] and "int32" in out["errors"]["i"][2]
    for name, code, message in out["kinds"]:
        assert name == "InputError" and code in ("WRONG_DTYPE", "WRONG_SHAPE") and "undefined" not in message, (code, message)
    words = ("lengths", "missing", "string", "DataView", "ArrayBuffer", "Object", "Object", "missing", "BigInt64Array", "Map", "1 elements")
    for (_, _, message), word in zip(out["kinds"], words, strict=True):
        assert word in message, (word, message)


@needs_node
def test_nested_arrays_have_a_shape(rows: Path) -> None:
    nested = {name: "[[1, 0, 1], [0, 1, 1]]" for name in "fbiluq"}
    text = ", ".join(f"{k}: {v}" for k, v in nested.items())
    out = node(rows, f"""
const m = await load(undefined, {{ threads: 1 }});
const half = {{ data: new Uint16Array(6), shape: [2, 3] }};
out.values = shown(await m.run({{ {text}, h: half, n: half, s: 1 }}));
out.flat = await attempt(() => m.run({{ {text}, h: half, n: half, s: 1, f: [1, 0, 1, 0, 1, 1] }}));
out.other = await attempt(() => m.run({{ {text}, h: half, n: half, s: 1, f: [[1, 0], [1, 0], [1, 1]] }}));
""")  # fmt: skip
    for name in nested:
        shape, values, _ = out["values"][f"o{name}"]
        assert shape == [2, 3] and values == ["1", "0", "1", "0", "1", "1"], name
    assert out["flat"][1] == "SHAPE_NEEDED" and out["other"][1] == "WRONG_SHAPE"


@needs_node
@pytest.mark.parametrize("options", ["{ threads: 1, worker: false }", "{ threads: 1, worker: true }", "{ threads: 2, worker: false }"])
def test_inputs_are_read_when_run_is_called(package: Path, options: str) -> None:
    """What is written into an input afterwards does not count, not even of calls that wait for others."""
    out = node(package, f"""
const m = await load(undefined, {options});
const given = base();
const calls = [1, 2, 3, 4].map((k) => {{ given.f.fill(k); given.s[0] = k; return m.run(given); }});
given.f.fill(99);
out.values = (await Promise.all(calls)).map((r) => [r.of.data[0], r.os.data[0]]);
out.kept = [given.f.length, given.l.length];
""")  # fmt: skip
    assert out["values"] == [[k, k] for k in (1, 2, 3, 4)]
    assert out["kept"] == [2, 2]  # nothing of the caller's was taken away


@needs_node
def test_a_view_of_a_large_buffer_is_sent_alone(package: Path) -> None:
    out = node(package, """
import { performance } from "node:perf_hooks";
const m = await load(undefined, { threads: 1, worker: true });
const time = async (given) => {
  const times = [];
  for (let k = 0; k < 7; k++) { const start = performance.now(); await m.run(given); times.push(performance.now() - start); }
  return Math.min(...times);
};
const large = new Float32Array(1 << 26); // 256 MB
large.set([5, 6], 12345);
out.small = await time(base());
const given = { ...base(), f: large.subarray(12345, 12347) };
out.large = await time(given);
out.value = Array.from((await m.run(given)).of.data);
const shared = new Float32Array(new SharedArrayBuffer(64), 8, 2);
shared.set([7, 8]);
const call = m.run({ ...base(), f: shared });
shared.fill(0);
out.shared = Array.from((await call).of.data);
await m.close();
""")  # fmt: skip
    assert out["value"] == [5, 6] and out["shared"] == [7, 8]
    assert out["large"] < 20 * out["small"] + 5, out  # a copy of 256 MB takes longer on any machine


@needs_node
def test_unknown_options_are_named(package: Path) -> None:
    out = node(package, """
out.load = await attempt(() => load(undefined, { thread: 2 }));
out.first = await attempt(() => load({ threads: 1 }));
const m = await load(undefined, { threads: 1 });
out.run = await attempt(() => m.run(base(), { output: ["of"] }));
out.into = await attempt(() => m.run(base(), { into: { of: [1, 2] } }));
""")  # fmt: skip
    assert out["load"][:2] == ["InputError", "UNKNOWN_OPTION"] and '"thread"' in out["load"][2] and "requireThreads" in out["load"][2]
    assert out["first"][:2] == ["InputError", "UNKNOWN_OPTION"]
    assert out["run"][:2] == ["InputError", "UNKNOWN_OPTION"] and '"output"' in out["run"][2] and "outputs, into" in out["run"][2]
    assert out["into"][:2] == ["InputError", "WRONG_DTYPE"]


HALVES = """
const m = await load(undefined, { threads: 1, worker: WORKER });
const into = new Uint16Array(2);
const r = await m.run({ ...base(), h: Uint16Array.of(0x3e00, 0xc000) });
const back = await m.run({ ...base(), h: r.oh.data }, { into: { oh: into } });
out.kinds = [r.oh.data.constructor.name, r.on.data.constructor.name, back.oh.data === into];
out.bits = [Array.from(new Uint16Array(r.oh.data.buffer, r.oh.data.byteOffset, 2)), Array.from(into)];
out.numbers = await attempt(async () => (out.value = Array.from((await m.run({ ...base(), h: [1.5, -2] })).oh.data)));
out.native = typeof Float16Array !== "undefined";
await m.close();
"""


@pytest.mark.parametrize("worker", ["false", "true"])
@pytest.mark.parametrize("command", [NODE and [NODE], DENO and [str(DENO), "run", "--no-prompt", "--allow-read"]], ids=["node", "deno"])
def test_halves(package: Path, command: list[str] | None, worker: str) -> None:
    """f16 outputs are Float16Arrays where these exist (in Deno); both kinds are taken, as inputs and for outputs."""
    if command is None:
        pytest.skip("node or deno is not installed (python benchmarks/setup_web.py --tests)")
    out = node(package, HALVES.replace("WORKER", worker), *command)
    assert out["bits"] == [np.array([1.5, -2], np.float16).view(np.uint16).tolist()] * 2
    assert out["kinds"] == ["Float16Array" if out["native"] else "Uint16Array", "Uint16Array", True]
    if out["native"]:
        assert out["value"] == [1.5, -2]
    else:
        assert out["numbers"][:2] == ["InputError", "WRONG_DTYPE"] and "Uint16Array of its bits" in out["numbers"][2]


# ---------------------------------------------------------------- names


def package_json(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "package.json").read_text()))


def test_packages_are_named_as_their_folders(tmp_path: Path) -> None:
    """Every torch export calls its graph `main_graph`."""
    first, second = (luthier.compile(model([2]), target="wasm") for _ in range(2))
    names = [package_json(m.save(tmp_path / folder))["name"] for m, folder in ((first, "detector"), (second, "My Net v2.luthier"), (second, "--"))]
    assert names == ["detector", "my-net-v2", "model"]
    about = package_json(first.save(tmp_path / "x", name="@me/net", version="2.1.0-beta.1"))
    assert (about["name"], about["version"]) == ("@me/net", "2.1.0-beta.1")
    for wrong in ({"name": "My Net"}, {"name": "a/b"}, {"name": ""}, {"version": "1"}, {"version": "1.0.0 "}, {"version": ""}):
        with pytest.raises(ArtifactError, match="npm package"):
            first.save(tmp_path / "y", **wrong)
    assert not (tmp_path / "y").exists()


def test_names_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(model([2]).SerializeToString())
    done = cli("compile", str(tmp_path / "net.onnx"), "--target=wasm", "-o", str(tmp_path / "out"), "--name", "named", "--version", "3.0.0", "--shard-mb", "1")
    assert done.returncode == 0, done.stderr
    about = package_json(tmp_path / "out")
    assert (about["name"], about["version"]) == ("named", "3.0.0")
    done = cli("compile", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "native"), "--name", "named")
    assert done.returncode == 2 and "no npm package" in done.stderr
