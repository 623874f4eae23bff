"""WGSL against Dawn, the compiler of Chrome, and what reaches the user of a shader that an implementation refuses."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h

import luthier
from benchmarks import onnx_suite
from luthier.backends.webgpu_module import WebGpuModule
from luthier.codegen.gpu.wgsl import Shader
from luthier.errors import CompilationError, TargetError
from luthier.ir.expr import const
from tests.gate import dawn

ROOT = Path(__file__).resolve().parents[1]
PASSING = sorted((ROOT / "tests" / "conformance" / "passing-webgpu.txt").read_text().split())
SAMPLE, SEED = 120, 20261201
NAMES = sorted({*(n for n in PASSING if n.startswith("node/test_mod_")), *random.Random(SEED).sample([n for n in PASSING if n.startswith("node/")], SAMPLE)})


def shaders_of(m: WebGpuModule, name: str) -> list[Shader]:
    one = const(1)
    return [Shader(f"{name} {k}", s, (), (), (one, one, one), (1, 1, 1), tuple(fs)) for k, (s, fs) in enumerate(zip(m.shaders, m.host["features"], strict=True))]


def compiled(model: object) -> WebGpuModule:
    m = luthier.compile(model, target="webgpu")  # type: ignore[arg-type]
    assert isinstance(m, WebGpuModule)
    return m


def test_dawn_accepts_the_suite() -> None:
    """A seeded sample, and all tests of the one operator whose helper function was refused once."""
    if dawn.missing():
        pytest.skip(str(dawn.missing()))
    work = ROOT / "build" / "conformance"
    onnx_suite.prepare(work)
    texts: dict[str, Shader] = {}
    for name in NAMES:
        for s in shaders_of(compiled(onnx_suite.case_folder(work, name) / "model.onnx"), name):
            texts.setdefault(s.text(), s)
    assert len(texts) > SAMPLE // 2
    assert dawn.refused(list(texts.values())) == {}


def broken() -> WebGpuModule:
    """A model whose second shader is no WGSL."""
    nodes = [h.make_node("Softmax", ["x"], ["p"], name="probabilities"), h.make_node("CumSum", ["p", "axis"], ["y"], name="running")]
    axis = h.make_tensor("axis", T.INT64, [], [1])
    ins, outs = [h.make_tensor_value_info("x", T.FLOAT, [2, 70])], [h.make_tensor_value_info("y", T.FLOAT, [2, 70])]
    m = compiled(h.make_model(h.make_graph(nodes, "g", ins, outs, [axis]), opset_imports=[h.make_opsetid("", 17)], ir_version=8))
    last = next(s for s in reversed(m.host["body"]) if s[0] == "dispatch")
    for k in m.host["pipelines"][last[1]]["shaders"]:
        m.shaders[k] += "\nfn wrong() -> f32 { return missing_name; }\n"
    return m


def test_a_refused_shader_names_its_node() -> None:
    pytest.importorskip("wgpu")
    from luthier.backends.webgpu_device import device

    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))
    with pytest.raises(CompilationError, match="missing_name") as e:
        broken().run({"x": np.ones((2, 70), np.float32)})
    assert e.value.node == "running"


def test_a_refused_shader_names_its_node_in_javascript(tmp_path: Path) -> None:
    """Dawn under Node: what ``getCompilationInfo`` says, place included, and the node."""
    if dawn.missing():
        pytest.skip(str(dawn.missing()))
    broken().save(tmp_path / "p")
    (tmp_path / "run.mjs").write_text(
        f"""import {{ create }} from {json.dumps(dawn.MODULE.as_uri())};
import {{ load }} from "./p/index.js";
import {{ writeFileSync }} from "node:fs";
globalThis.gpu = create(["backend=null"]);
let text = "loaded";
try {{ await load(new URL("./p/", import.meta.url), {{ gpu: globalThis.gpu, worker: false }}); }}
catch (e) {{ text = JSON.stringify([e.code, e.message, e.details]); }}
writeFileSync(new URL("./said.json", import.meta.url), text); // Dawn itself writes to the standard output
process.exit(0);
"""
    )
    done = subprocess.run(["node", str(tmp_path / "run.mjs")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, message, details = json.loads((tmp_path / "said.json").read_text())
    assert code == "SHADER" and "missing_name" in message and details["nodes"] == ["running"] and '"running"' in message
    line = next(i for i, t in enumerate(broken().shaders[details["shader"]].split("\n"), 1) if "missing_name" in t)
    assert f"{line}:" in message
