"""TensorScatter against onnx; entries past the end of a linear cache are dropped."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.check import build, check_op, run_node

RNG = np.random.default_rng(4)


@pytest.mark.parametrize("mode", ["linear", "circular"])
@pytest.mark.parametrize("axis", [-2, 1])
def test_tensor_scatter(mode: str, axis: int) -> None:
    past = RNG.standard_normal((2, 6, 6, 3)).astype(np.float32)
    new = RNG.standard_normal((2, 6, 2, 3) if axis == -2 else (2, 2, 6, 3)).astype(np.float32)
    at = np.array([4, 0 if mode == "linear" else 5], np.int64)
    check_op("TensorScatter", [past, new, at], {"mode": mode, "axis": axis}, symbolic=("",), oracle="onnx")
    check_op("TensorScatter", [past, new], {"mode": mode, "axis": axis}, symbolic=("",), oracle="onnx")


def test_linear_cache_that_is_full() -> None:
    past, new = np.zeros((1, 3, 1), np.float32), np.ones((1, 2, 1), np.float32)
    args = [past, new, np.array([2], np.int64)]
    got = run_node(build("TensorScatter", args, {}, 1, "", ()), args, {})[0]
    np.testing.assert_array_equal(got.reshape(-1), [0, 0, 1])
