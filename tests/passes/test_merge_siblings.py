"""Products with a common left operand become one where their results are only moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from luthier.codegen.targets.target import parse_target
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.interpret.programs import run_program
from luthier.passes.graph.merge_siblings import merge_siblings
from luthier.pipeline import compile_program, run_graph_passes

HEADS = np.array([0, 0, 3, 8], np.int64)
SPLIT = {"perm": [0, 2, 1, 3]}


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(last: list[Any], biased: str, outputs: list[str] | None = None) -> Any:
    """``x`` times the matrices q, k and v, each with its bias when named in ``biased``, in three heads; then ``last``."""
    weights: dict[str, Any] = {"heads": HEADS, "merged": np.array([0, 0, 24], np.int64)}
    nodes = []
    for i, n in enumerate("qkv"):
        weights[f"w{n}"] = normal(20, 24, seed=i) / 4
        weights[f"b{n}"] = normal(24, seed=9 + i)
        nodes.append(h.make_node("MatMul", ["x", f"w{n}"], [f"{n}0" if n in biased else f"{n}1"]))
        if n in biased:
            nodes.append(h.make_node("Add", [f"b{n}", f"{n}0"] if n == "k" else [f"{n}0", f"b{n}"], [f"{n}1"]))
    ins = [h.make_tensor_value_info("x", T.FLOAT, ["b", "s", 20])]
    outs = [h.make_tensor_value_info(n, T.FLOAT, None) for n in outputs or ["y"]]
    g = h.make_graph([*nodes, *last], "g", ins, outs, [numpy_helper.from_array(a, n) for n, a in weights.items()])
    return h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=8)


ATTENTION = [
    *(h.make_node("Reshape", [f"{n}1", "heads"], [f"{n}2"]) for n in "qkv"),
    h.make_node("Transpose", ["q2"], ["q3"], **SPLIT), h.make_node("Transpose", ["k2"], ["k3"], perm=[0, 2, 3, 1]), h.make_node("Transpose", ["v2"], ["v3"], **SPLIT),
    h.make_node("MatMul", ["q3", "k3"], ["s"]), h.make_node("Softmax", ["s"], ["p"]), h.make_node("MatMul", ["p", "v3"], ["o"]),
    h.make_node("Transpose", ["o"], ["o1"], **SPLIT), h.make_node("Reshape", ["o1", "merged"], ["y"]),
]  # fmt: skip


@pytest.mark.parametrize("biased", ["qkv", "qv", ""])
def test_projections_of_an_attention(biased: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.schedules.select.privatize_threads", lambda f: f)  # the interpreter has one copy of a local buffer
    m = model(ATTENTION, biased)
    g = run_graph_passes(import_onnx(m))
    before = sum(n.op == "MatMul" for n in g.nodes)
    assert merge_siblings(g)
    assert sum(n.op == "MatMul" for n in g.nodes) == before - 2 and not merge_siblings(g)
    x = normal(2, 7, 20, seed=30)
    program = compile_program(import_onnx(m), parse_target("webgpu").caps)
    want = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(run_program(program, {"x": x})["y"], want, rtol=2e-5, atol=2e-5)
    assert len(program.nodes) == 3  # product, attention, transposed output: no slice is a kernel of its own


def test_an_epilogue_is_not_given_up() -> None:
    gated = [h.make_node("Sigmoid", ["q1"], ["q2"]), h.make_node("Mul", ["q2", "k1"], ["z"]), h.make_node("Mul", ["z", "v1"], ["y"])]
    g = run_graph_passes(import_onnx(model(gated, "qkv")))
    assert not merge_siblings(g)


def test_outputs_stay_themselves() -> None:
    g = run_graph_passes(import_onnx(model(ATTENTION, "qkv", ["y", "q1"])))
    assert merge_siblings(g)  # k and v still share
    assert sorted(n.op for n in g.nodes).count("Slice") == 2


def test_only_where_the_target_says_so() -> None:
    m = model(ATTENTION, "qkv")
    assert not parse_target("cpu").caps.merge_siblings
    assert len(compile_program(import_onnx(m), parse_target("webgpu").caps).nodes) < len(compile_program(import_onnx(m), parse_target("cpu").caps).nodes)
