"""Matrix-vector products on wasm: several panels of the weights at once, odd sizes, epilogues. References: numpy in f64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier

pytest.importorskip("wasmtime")

Array = np.ndarray[Any, Any]


def gemv(k: int, n: int, transposed: bool) -> tuple[Any, Array, Array, Array]:
    """(model of y = relu(x w + b), x, w, b)."""
    rng = np.random.default_rng(k * n)
    x, w, b = (rng.standard_normal(s, dtype=np.float32) for s in ((1, k), (k, n), (n,)))
    stored = {"w": np.ascontiguousarray(w.T) if transposed else w, "b": b}
    nodes = [h.make_node("Gemm", ["x", "w", "b"], ["z"], transB=int(transposed)), h.make_node("Relu", ["z"], ["y"])]
    graph = h.make_graph(
        nodes, "gemv", [h.make_tensor_value_info("x", T.FLOAT, [1, k])], [h.make_tensor_value_info("y", T.FLOAT, None)],
        [numpy_helper.from_array(a, name) for name, a in stored.items()],
    )  # fmt: skip
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9), x, w, b


@pytest.mark.parametrize("variant", ["simd", "relaxed", "relaxed-threads"])
@pytest.mark.parametrize(("k", "n"), [(64, 96), (129, 48), (33, 32), (70, 40), (50, 37), (100, 16)])
def test_matrix_vector(variant: str, k: int, n: int) -> None:
    for transposed in (False, True):
        proto, x, w, b = gemv(k, n, transposed)
        got = luthier.compile(proto, target=f"wasm:{variant}", threads=2).run({"x": x})["y"]
        want = np.maximum(x.astype(np.float64) @ w + b, 0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

