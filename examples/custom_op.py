"""A custom operator: SwiGLU, stated once, called on arrays and used as a node of an ONNX model, where it is fused with its neighbours.

    python examples/custom_op.py
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

import luthier
from luthier import custom as lc


@luthier.op("example::swiglu")
def swiglu(x, gate, *, beta=1.0):  # type: ignore[no-untyped-def]
    """x * gate * sigmoid(beta * gate), element by element."""
    return x * gate * lc.sigmoid(gate * beta)


def expected(x: np.ndarray, gate: np.ndarray, beta: float) -> np.ndarray:
    return x * gate / (1 + np.exp(-beta * gate))


def main() -> None:
    rng = np.random.default_rng(0)
    x, gate = (rng.standard_normal((4, 256), dtype=np.float32) for _ in range(2))
    print("on arrays, largest error", np.abs(swiglu(x, gate, beta=1.5) - expected(x, gate, 1.5)).max())

    nodes = [
        helper.make_node("Add", ["x", "bias"], ["shifted"]),
        helper.make_node("swiglu", ["shifted", "gate"], ["y"], domain="example", beta=1.5),
        helper.make_node("Relu", ["y"], ["out"]),
    ]
    shape = ["rows", 256]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "gate", "out")]
    bias = rng.standard_normal(256).astype(np.float32)
    graph = helper.make_graph(nodes, "custom", io[:2], io[2:], [onnx.numpy_helper.from_array(bias, "bias")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("example", 1)])
    module = luthier.compile(model)
    out = module.run({"x": x, "gate": gate})["out"]
    print("in a model, largest error ", np.abs(out - np.maximum(expected(x + bias, gate, 1.5), 0)).max())
    print("kernels called:", [row["nodes"] for row in module.profile({"x": x, "gate": gate}, runs=1)])


if __name__ == "__main__":
    main()
