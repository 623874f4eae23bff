"""What rows share is computed once: the work of a normalisation grows with its elements, wherever its axis stands."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import luthier

AXES = [((1, 0), 0), ((1, 0, 0), 0), ((0, 1, 0), 1), ((1, 0), 1), ((0, 1, 0, 0), 1), ((0, 0, 1), 2)]


def softmax(op: str, shape: tuple[int, ...], axis: int) -> luthier.Module:
    io = [helper.make_tensor_value_info(name, 1, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], axis=axis)], "g", io[:1], io[1:])
    return luthier.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), target="cpu:x86-64-v2", threads=1)


def operations(m: luthier.Module) -> float:
    return float(sum(c["flops"] for c in m.manifest["calls"]))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("where", "axis"), AXES, ids=str)
def test_work_grows_with_the_axis(op: str, where: tuple[int, ...], axis: int) -> None:
    short, long = (softmax(op, tuple(n if w else 3 for w in where), axis) for n in (64, 256))
    assert 0 < operations(long) <= 4.5 * operations(short)
    x = np.random.default_rng(0).standard_normal(tuple(64 if w else 3 for w in where)).astype(np.float32)
    e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    want = e / e.sum(axis, keepdims=True)
    np.testing.assert_allclose(short.run({"x": x})["y"], np.log(want) if op == "LogSoftmax" else want, rtol=2e-5, atol=1e-6)
