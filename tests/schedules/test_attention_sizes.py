"""Attention over more keys than a thread's stack holds, of which a copy or the scores would be; with a batch that is open: it
compiles, and is right."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import luthier


def attention(batch: int | str, rows: int, keys: int, size: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]), helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1), helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, 2, t, size])
        for n, t in (("q", rows), ("k", keys), ("v", keys))
    ]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("batch", [1, "b"])
@pytest.mark.parametrize("target", ["cpu:x86-64-v3", "wasm"])
@pytest.mark.parametrize(
    ("rows", "keys", "size"),
    [(300, 1024, 64), (300, 1025, 64), (256, 1500, 64), (8, 1500, 64), (1, 70000, 8), (4, 9000, 8), (5, 12, 16)],
    ids=["stack", "one more", "memory", "few rows", "one row", "scores", "small"],
)
def test_attention_over_many_keys(batch: int | str, target: str, rows: int, keys: int, size: int) -> None:
    rng = np.random.default_rng(keys)
    q, k, v = (rng.standard_normal((1 if batch == 1 else 2, 2, t, size)).astype(np.float32) for t in (rows, keys, keys))
    s = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    got = luthier.compile(attention(batch, rows, keys, size), target=target, threads=1).run({"q": q, "k": k, "v": v})["y"]
    assert float(np.abs(got - p @ v).max()) < 2e-5 * float(np.abs(v).max())
