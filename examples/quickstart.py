"""The API on a model built here: compile, run at two batch sizes, save, load.

python examples/quickstart.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

import luthier


def build_model() -> onnx.ModelProto:
    """y = softmax(relu(x @ w + b)), f32, batch open."""
    generator = np.random.default_rng(0)
    constants = [
        onnx.numpy_helper.from_array(generator.standard_normal((16, 4)).astype(np.float32), "w"),
        onnx.numpy_helper.from_array(generator.standard_normal(4).astype(np.float32), "b"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"], name="product"),
        helper.make_node("Add", ["xw", "b"], ["biased"], name="bias"),
        helper.make_node("Relu", ["biased"], ["hidden"], name="activation"),
        helper.make_node("Softmax", ["hidden"], ["y"], name="probabilities", axis=-1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "quickstart", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def main() -> None:
    module = luthier.compile(build_model(), target="cpu")
    print("inputs ", [(v.name, str(v.dtype), v.shape) for v in module.inputs])
    print("outputs", [(v.name, str(v.dtype), v.shape) for v in module.outputs])
    for batch in (1, 3):
        y = module.run({"x": np.ones((batch, 16), np.float32)})["y"]
        print(f"batch {batch}: y {y.shape}, rows sum to {y.sum(axis=1)}")
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "quickstart.luthier"
        module.save(artifact)
        print("saved  ", sorted(p.name for p in artifact.iterdir()))
        again = luthier.load(artifact)
        np.testing.assert_array_equal(again.run({"x": np.ones((3, 16), np.float32)})["y"], y)
        print("loaded: same result")


if __name__ == "__main__":
    main()
