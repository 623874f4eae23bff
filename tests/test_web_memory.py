"""A wasm package whose memory grows past 2 GB, in Node: addresses there are unsigned. Needs 5 GB of free memory, not on CI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier

NODE = shutil.which("node")
ROWS = 80_000_000  # of 16 bytes: 1.28 GB of input, as much for y
W = np.array([[1, 2, 0, -1], [0, 1, 3, 0], [2, 0, 1, 1], [-1, 1, 0, 2]], np.float32)

SCRIPT = """
import { load } from "./index.js";
const { rows, options, at } = JSON.parse(process.argv[2]);
const model = await load(undefined, options);
const { x } = await model.views({ x: [rows, 4] });
x.fill(1);
for (const i of at) for (let k = 0; k < 4; k++) x[4 * i + k] = (i % 1000) + k;
const out = await model.run({ x: { data: x, shape: [rows, 4] } }, { outputs: ["picked", "peak"] });
console.log(JSON.stringify({
  picked: Array.from(out.picked.data), peak: Array.from(out.peak.data), variant: model.info.variant,
  bytes: x.buffer.byteLength, threads: model.info.threads,
}));
await model.close();
"""


def free_memory() -> int:
    """Bytes that a new process may take, 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), 0)


pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
    pytest.mark.skipif("CI" in os.environ or free_memory() < 5 << 30, reason="needs 5 GB of free memory"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y[n, 4] = x[n, 4] @ W; picked = y[at]; peak[1] = max(y): y lies behind x."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["y"]), helper.make_node("Gather", ["y", "at"], ["picked"]),
        helper.make_node("ReduceMax", ["y"], ["peak"], keepdims=0),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "large", [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("y", TensorProto.FLOAT, ["n", 4]), value("picked", TensorProto.FLOAT, [len(AT), 4]), value("peak", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(W, "W"), numpy_helper.from_array(np.array(AT), "at")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return luthier.compile(proto, target="wasm").save(tmp_path_factory.mktemp("large") / "wasm")


AT = [0, 7, ROWS // 2 + 1, 54_000_123, ROWS - 2, ROWS - 1]


@pytest.mark.parametrize("options", [{"variant": "simd", "worker": False}, {"threads": 2, "worker": False}], ids=str)
def test_memory_beyond_2_gb(package: Path, options: dict[str, Any]) -> None:
    """Rows of ``y`` on both sides of the 2 GB line equal numpy's; integers in f32, so exactly."""
    (package / "large.mjs").write_text(SCRIPT)
    assert NODE is not None
    job = json.dumps({"rows": ROWS, "options": options, "at": AT})
    done = subprocess.run([NODE, str(package / "large.mjs"), job], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["bytes"] > 2 * ROWS * 16 > 2**31
    assert out["variant"].endswith("threads") == ("threads" in options)
    rows = np.array([[i % 1000 + k for k in range(4)] for i in AT], np.float32)
    np.testing.assert_array_equal(np.array(out["picked"], np.float32).reshape(-1, 4), rows @ W)
    assert out["peak"] == [max((rows @ W).max(), np.ones(4, np.float32).dot(W).max())]
