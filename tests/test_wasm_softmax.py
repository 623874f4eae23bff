"""Softmax on wasm: one division a row. References: numpy in f64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h

import luthier

pytest.importorskip("wasmtime")


def softmax(shape: list[Any], axis: int) -> Any:
    graph = h.make_graph(
        [h.make_node("Softmax", ["x"], ["y"], axis=axis)], "softmax", [h.make_tensor_value_info("x", T.FLOAT, shape)], [h.make_tensor_value_info("y", T.FLOAT, shape)]
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9)


def reference(x: Any, axis: int) -> Any:
    e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@pytest.mark.parametrize("variant", ["simd", "relaxed"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 64), -1), ((3, 12), 1), ((4, 1), 1), ((2, 37), -1), ((6, 16), 0), ((2, 3, 24), 1)])
def test_softmax(variant: str, shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(len(shape))
    module = luthier.compile(softmax(list(shape), axis), target=f"wasm:{variant}")
    for scale in (1.0, 30.0, 1e30):
        x = (rng.standard_normal(shape) * scale).astype(np.float32)
        np.testing.assert_allclose(module.run({"x": x})["y"], reference(x, axis), rtol=2e-6, atol=1e-12)


def test_lowest_and_infinite_values() -> None:
    module = luthier.compile(softmax([2, 16], -1), target="wasm")
    x = np.full((2, 16), -np.inf, np.float32)
    x[0, 3], x[1, :] = 7.0, -3e38
    np.testing.assert_allclose(module.run({"x": x})["y"], reference(x, -1), rtol=2e-6)
