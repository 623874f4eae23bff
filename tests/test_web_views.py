"""Views of a model's memory and outputs in arrays of the caller's, in Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")
W = np.arange(12, dtype=np.float32).reshape(3, 4) - 5

SCRIPT = """
import { load } from "./index.js";
const model = await load(undefined, JSON.parse(process.argv[2]));
const attempt = async (f) => { try { await f(); return "no error"; } catch (e) { return [e.name, e.code]; } };
const out = { open: await attempt(() => model.views()), unknown: await attempt(() => model.views({ x: [2, 3], q: [1] })), rank: await attempt(() => model.views({ x: [3] })) };
if (out.open[1] !== "NO_VIEWS") {
  const v = await model.views({ x: [2, 3] });
  out.names = Object.keys(v);
  v.s[0] = 10;
  out.first = [];
  for (const base of [0, 100]) {
    for (let i = 0; i < 6; i++) v.x[i] = base + i;
    out.first.push(Array.from((await model.run({ x: { data: v.x, shape: [2, 3] }, s: v.s })).y.data));
    out.first.push(Array.from((await model.run({ x: { data: Float32Array.from(v.x), shape: [2, 3] }, s: Float32Array.from(v.s) })).y.data));
  }
  await model.run({ x: { data: new Float32Array(300).fill(1), shape: [100, 3] }, s: v.s });
}
const x = { data: Float32Array.of(0, 1, 2, 3, 4, 5), shape: [2, 3] }, s = Float32Array.of(10);
const y = new Float32Array(8);
const r = await model.run({ x, s }, { into: { y } });
out.same = r.y.data === y;
out.into = Array.from(y);
out.dtype = await attempt(() => model.run({ x, s }, { into: { y: new Int32Array(8) } }));
out.length = await attempt(() => model.run({ x, s }, { into: { y: new Float32Array(7) } }));
out.name = await attempt(() => model.run({ x, s }, { into: { z: y } }));
await model.close();
out.closed = await attempt(() => model.views({ x: [2, 3] }));
console.log(JSON.stringify(out));
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y[n, 4] = x[n, 3] @ W + s."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["m"]), helper.make_node("Add", ["m", "s"], ["y"])], "views",
        [value("x", TensorProto.FLOAT, ["n", 3]), value("s", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, ["n", 4])], [numpy_helper.from_array(W, "W")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return luthier.compile(proto, target="wasm").save(tmp_path_factory.mktemp("views") / "wasm")


def node(package: Path, options: dict[str, Any]) -> dict[str, Any]:
    (package / "views.mjs").write_text(SCRIPT)
    assert NODE is not None
    done = subprocess.run([NODE, str(package / "views.mjs"), json.dumps(options)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("options", [{"variant": "simd"}, {"threads": 2}, {"worker": True, "threads": 1}], ids=str)
def test_views_and_into(package: Path, options: dict[str, Any]) -> None:
    out = node(package, options)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    want = x @ W + 10
    assert out["same"] and np.array_equal(np.array(out["into"]).reshape(2, 4), want)
    assert out["dtype"] == ["InputError", "WRONG_DTYPE"]
    assert out["length"] == ["InputError", "WRONG_SHAPE"]
    assert out["name"] == ["InputError", "UNKNOWN_OUTPUT"]
    assert out["closed"] == ["ClosedError", "CLOSED"]
    if options.get("worker"):
        assert out["open"] == ["UnsupportedError", "NO_VIEWS"]
        return
    assert out["open"] == ["InputError", "SHAPE_NEEDED"]
    assert out["unknown"] == ["InputError", "UNKNOWN_INPUT"]
    assert out["rank"] == ["InputError", "WRONG_SHAPE"]
    assert out["names"] == ["x", "s"]
    for k, got in enumerate(out["first"]):
        np.testing.assert_array_equal(np.array(got).reshape(2, 4), want if k < 2 else (x + 100) @ W + 10)
