"""Convolutions whose weights are inputs or computed by the graph, of fixed and of open extents, against onnxruntime; nodes out of order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import luthier
from luthier.errors import InvalidModel, LuthierError, ShapeError

value = helper.make_tensor_value_info
F = TensorProto.FLOAT


def model(op: str, rank: int, weights: list[Any], attrs: dict[str, Any], bias: bool = False, kind: int = F, channels: int = 4) -> onnx.ModelProto:
    """``y = op(x, f(w), b)``: x with open spatial extents; f(w) = -tanh(w) for floats."""
    nodes = [helper.make_node(op, ["x", "v" if kind == F else "w", *(["b"] if bias else [])], ["y"], name="the conv", **attrs)]
    if kind == F:
        nodes += [helper.make_node("Neg", ["t"], ["v"]), helper.make_node("Tanh", ["w"], ["t"])]  # behind their reader: writers do that
    ins = [value("x", kind, ["n", channels, *[f"d{k}" for k in range(rank)]]), value("w", kind, weights)]
    ins += [value("b", F, ["o"])] if bias else []
    graph = helper.make_graph(nodes, "g", ins, [value("y", F if kind == F else TensorProto.INT32, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def check(m: onnx.ModelProto, runs: list[dict[str, Any]], target: str = "cpu") -> None:
    if target == "webgpu":
        pytest.importorskip("wgpu")
    session = onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
    module = luthier.compile(m, target=target)
    for feeds in runs:
        want, got = session.run(None, feeds)[0], module.run(feeds)["y"]
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


CASES: dict[str, tuple[str, list[Any], dict[str, Any], list[tuple[tuple[int, ...], tuple[int, ...]]]]] = {
    "line": ("Conv", ["o", 4, "k"], {"pads": [1, 2]}, [((2, 4, 11), (3, 4, 4)), ((1, 4, 5), (6, 4, 1)), ((1, 4, 9), (1, 4, 9))]),
    "plane": ("Conv", ["o", 4, "kh", "kw"], {"strides": [2, 1], "dilations": [1, 2]}, [((1, 4, 9, 8), (3, 4, 2, 3)), ((2, 4, 12, 17), (8, 4, 5, 1))]),
    "one open extent": ("Conv", [6, 4, 3, "kw"], {"pads": [1, 0, 1, 0]}, [((1, 4, 9, 8), (6, 4, 3, 2)), ((1, 4, 5, 30), (6, 4, 3, 16))]),
    "fixed": ("Conv", [6, 4, 3, 3], {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}, [((1, 4, 9, 8), (6, 4, 3, 3)), ((3, 4, 20, 33), (6, 4, 3, 3))]),
    "declared by the attribute": ("Conv", ["o", 4, "kh", "kw"], {"kernel_shape": [3, 2]}, [((1, 4, 9, 8), (5, 4, 3, 2))]),
    "groups": ("Conv", ["o", 2, "kh", "kw"], {"group": 2, "auto_pad": "SAME_UPPER"}, [((1, 4, 9, 8), (6, 2, 3, 3)), ((1, 4, 6, 6), (2, 2, 4, 2))]),
    "depthwise": ("Conv", [4, 1, "kh", "kw"], {"group": 4, "pads": [1, 1, 1, 1]}, [((1, 4, 9, 8), (4, 1, 3, 3)), ((2, 4, 7, 7), (4, 1, 1, 5))]),
    "volume": ("Conv", ["o", 4, "a", "b", "c"], {}, [((1, 4, 5, 6, 7), (2, 4, 2, 3, 1)), ((1, 4, 4, 4, 4), (3, 4, 4, 1, 2))]),
    "open channels": ("Conv", ["o", "i", "k", "k"], {}, [((1, 4, 9, 8), (3, 4, 2, 2)), ((1, 4, 9, 8), (1, 4, 3, 3))]),
    "transposed": ("ConvTranspose", [4, "o", "kh", "kw"], {"strides": [2, 2]}, [((1, 4, 5, 4), (4, 3, 2, 3)), ((1, 4, 3, 6), (4, 1, 4, 4))]),
    "transposed line": ("ConvTranspose", [4, 2, "k"], {"strides": [3], "dilations": [2], "pads": [1, 1]}, [((1, 4, 7), (4, 2, 3)), ((2, 4, 5), (4, 2, 2))]),
    "transposed groups": ("ConvTranspose", [4, 3, 3, 3], {"group": 2, "output_padding": [1, 1], "strides": [2, 2]}, [((1, 4, 5, 4), (4, 3, 3, 3))]),
}  # fmt: skip


def runs_of(case: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [{"x": rng.standard_normal(x).astype(np.float32), "w": rng.standard_normal(w).astype(np.float32)} for x, w in CASES[case][3]]


@pytest.mark.parametrize("case", CASES)
def test_extents(case: str) -> None:
    op, weights, attrs, shapes = CASES[case]
    check(model(op, len(shapes[0][0]) - 2, weights, attrs), runs_of(case))


@pytest.mark.parametrize("target", ["wasm", "webgpu"])
@pytest.mark.parametrize("case", ["plane", "depthwise", "fixed", "transposed"])
def test_other_targets(case: str, target: str) -> None:
    op, weights, attrs, shapes = CASES[case]
    check(model(op, len(shapes[0][0]) - 2, weights, attrs), runs_of(case), target)


def test_bias_and_integers() -> None:
    rng = np.random.default_rng(4)
    runs = [{**r, "b": rng.standard_normal(len(r["w"])).astype(np.float32)} for r in runs_of("plane")]
    check(model("Conv", 2, CASES["plane"][1], CASES["plane"][2], bias=True), runs)
    u8 = [{k: rng.integers(0, 256, a.shape).astype(np.uint8) for k, a in r.items()} for r in runs_of("plane")]
    check(model("ConvInteger", 2, CASES["plane"][1], CASES["plane"][2], kind=TensorProto.UINT8), u8)


def test_what_does_not_fit() -> None:
    m = luthier.compile(model("Conv", 2, ["o", 4, "kh", "kw"], {"kernel_shape": [3, 2]}))
    rng = np.random.default_rng(0)
    with pytest.raises(LuthierError):
        m.run({"x": rng.standard_normal((1, 4, 9, 9)).astype(np.float32), "w": rng.standard_normal((2, 4, 3, 3)).astype(np.float32)})
    with pytest.raises(ShapeError, match=r"kernel_shape \[3, 2\] contradicts the weights.*the conv"):
        luthier.compile(model("Conv", 2, ["o", 4, 3, 3], {"kernel_shape": [3, 2]}))


def test_circle() -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], name="first"), helper.make_node("Neg", ["a"], ["b"], name="second")]
    graph = helper.make_graph(nodes, "g", [value("x", F, [2])], [value("b", F, [2])])
    with pytest.raises(InvalidModel, match="'b' is produced by no earlier node.*first"):
        luthier.compile(helper.make_model(graph, ir_version=9))


def test_order_with_subgraphs() -> None:
    """A branch reads what stands behind its If; a long list written backwards."""
    branch = [helper.make_graph([helper.make_node(op, ["late", "x"], ["r"])], op, [], [value("r", F, None)]) for op in ("Add", "Sub")]
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch[0], else_branch=branch[1])]
    nodes += [helper.make_node("Abs", [f"t{k - 1}" if k else "x"], [f"t{k}" if k < 3000 else "late"]) for k in reversed(range(3001))]
    graph = helper.make_graph(nodes, "g", [value("x", F, [3]), value("c", TensorProto.BOOL, [])], [value("y", F, None)])
    m = luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    x = np.array([-1, 2, -3], np.float32)
    np.testing.assert_array_equal(m.run({"x": x, "c": np.array(True)})["y"], np.abs(x) + x)
    np.testing.assert_array_equal(m.run({"x": x, "c": np.array(False)})["y"], np.abs(x) - x)
