"""Windows along rows, positions along rows and transposes at sizes that fill vectors, against onnxruntime; the template that took them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import luthier

RNG = np.random.default_rng(21)


def run(op: str, x: np.ndarray[Any, Any], dtype: int = 1, **attrs: Any) -> tuple[Any, Any]:
    """(ours, onnxruntime's)"""
    node = helper.make_node(op, ["x"], ["y"], **attrs)
    g = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", 1, x.shape)], [helper.make_tensor_value_info("y", dtype, None)])
    m = helper.make_model(g, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    want = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    del m.graph.output[:]
    m.graph.output.append(helper.make_tensor_value_info("y", dtype, want.shape))
    onnx.checker.check_model(m)
    return luthier.compile(m, threads=2).run({"x": x})["y"], want


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize("shape", [(1, 3, 19, 24), (2, 5, 17, 41), (1, 1, 200, 130)], ids=str)
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2]},
        {"kernel_shape": [2, 2], "strides": [2, 2]}, {"kernel_shape": [1, 5], "strides": [1, 2], "pads": [0, 2, 0, 2]}, {"kernel_shape": [6, 7]},
    ],
    ids=["3s2p1", "3p", "2s2", "1x5", "6x7"],
)  # fmt: skip
def test_pooling_along_rows(op: str, shape: tuple[int, ...], window: dict[str, Any]) -> None:
    got, want = run(op, RNG.standard_normal(shape).astype("f"), **window)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_average_that_counts_padding(count: int) -> None:
    x = RNG.standard_normal((1, 2, 30, 33)).astype("f")
    got, want = run("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=count)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_one_dimension() -> None:
    got, want = run("MaxPool", RNG.standard_normal((2, 4, 300)).astype("f"), kernel_shape=[5], strides=[2], pads=[2, 2])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("shape", [(5, 1000), (3, 4, 37), (2, 8)], ids=str)
def test_positions_with_ties(op: str, last: int, shape: tuple[int, ...]) -> None:
    x = RNG.integers(-3, 4, shape).astype("f")
    got, want = run(op, x, 7, axis=-1, select_last_index=last)
    np.testing.assert_array_equal(got, want)


def test_position_of_infinities_and_nan_is_inside_the_row() -> None:
    x = np.full((4, 40), -np.inf, "f")
    x[1, 7], x[2] = np.inf, np.nan
    got, _ = run("ArgMax", x, 7, axis=-1)
    assert got[0, 0] == 0 and got[1, 0] == 7 and got[3, 0] == 0 and 0 <= got[2, 0] < 40


@pytest.mark.parametrize("shape", [(64, 64), (100, 37), (129, 264), (3, 50, 70)], ids=str)
def test_transposes_in_blocks(shape: tuple[int, ...]) -> None:
    x = RNG.standard_normal(shape).astype("f")
    got, want = run("Transpose", x, perm=[*range(len(shape) - 2), len(shape) - 1, len(shape) - 2])
    np.testing.assert_array_equal(got, want)
