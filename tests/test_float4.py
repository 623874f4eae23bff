"""Floats of 4 bits: conversions against ml_dtypes, moves, weights and (de)quantization, on every target."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier

F4, T4, F = ml_dtypes.float4_e2m1fn, TensorProto.FLOAT4E2M1, TensorProto.FLOAT
value = helper.make_tensor_value_info
ALL = np.arange(16, dtype=np.uint8).view(F4)


def compiled(nodes: list[Any], ins: list[Any], outs: list[Any], constants: dict[str, Any], target: str) -> Any:
    if target == "webgpu":
        pytest.importorskip("wgpu")
    graph = helper.make_graph(nodes, "g", ins, outs, [numpy_helper.from_array(a, n) for n, a in constants.items()])
    return luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), target=target)


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
def test_conversions(target: str) -> None:
    """Every code, its neighbours, ties, and what is out of range; there and back in one kernel as well."""
    nodes = [
        helper.make_node("Cast", ["x"], ["q"], to=T4), helper.make_node("Cast", ["c"], ["f"], to=F),
        helper.make_node("Cast", ["x"], ["t"], to=T4), helper.make_node("Cast", ["t"], ["back"], to=F),
    ]  # fmt: skip
    m = compiled(nodes, [value("x", F, ["n"]), value("c", T4, ["k"])], [value("q", T4, ["n"]), value("f", F, ["k"]), value("back", F, ["n"])], {}, target)
    grid = ALL.astype(np.float32)
    middle = (grid[:7] + grid[1:8]) / 2
    x = np.concatenate([grid, middle, -middle, np.nextafter(middle, np.float32(9)), np.nextafter(middle, np.float32(-9)), [7, -100, np.inf, -np.inf, np.nan, 1e-30]])
    got = m.run({"x": x.astype(np.float32), "c": ALL[:15]})
    np.testing.assert_array_equal(got["q"].view(np.uint8), x.astype(F4).view(np.uint8))
    np.testing.assert_array_equal(got["f"], ALL[:15].astype(np.float32))
    np.testing.assert_array_equal(got["back"], x.astype(F4).astype(np.float32))


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
def test_moves_and_weights(target: str) -> None:
    """Odd extents, a transpose; blocks of weights with scales (NVFP4's form)."""
    rng = np.random.default_rng(2)
    w, s = rng.integers(0, 16, (7, 32)).astype(np.uint8).view(F4), rng.uniform(0.5, 2, (7, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["c"], ["t"], perm=[1, 0]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1, block_size=16),
        helper.make_node("MatMul", ["x", "d"], ["y"]), helper.make_node("QuantizeLinear", ["x", "one"], ["q"], output_dtype=T4),
    ]  # fmt: skip
    ins = [value("c", T4, [3, "n"]), value("x", F, ["b", 7])]
    outs = [value("t", T4, None), value("y", F, None), value("q", T4, None)]
    m = compiled(nodes, ins, outs, {"w": w, "s": s, "one": np.float32(0.5)}, target)
    c, x = rng.integers(0, 16, (3, 5)).astype(np.uint8).view(F4), rng.standard_normal((4, 7)).astype(np.float32)
    got = m.run({"c": c, "x": x})
    for name, want in {"t": c.T, "q": (x / np.float32(0.5)).astype(F4)}.items():
        np.testing.assert_array_equal(got[name].view(np.uint8), np.ascontiguousarray(want).view(np.uint8), err_msg=name)
    np.testing.assert_allclose(got["y"], x @ (w.astype(np.float32) * np.repeat(s, 16, 1)), rtol=1e-5, atol=1e-5)
