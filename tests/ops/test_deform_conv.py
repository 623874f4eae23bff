"""DeformConv against onnx: groups, offset groups, mask, strides, dilations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ops.check import check_op

RNG = np.random.default_rng(6)


def f(*s: int) -> np.ndarray:
    return RNG.standard_normal(s).astype(np.float32)


@pytest.mark.parametrize(
    ("attrs", "out", "group", "offset_group"),
    [({}, (3, 4), 1, 1), ({"pads": (1, 1, 1, 1), "strides": (2, 1)}, (3, 6), 1, 2), ({"dilations": (2, 1), "pads": (1, 0, 1, 0)}, (3, 4), 2, 1)],
)
def test_deform_conv(attrs: dict[str, Any], out: tuple[int, int], group: int, offset_group: int) -> None:
    x, w, b = f(2, 4, 5, 6), f(6, 4 // group, 3, 3), f(6)
    off, mask = f(2, 18 * offset_group, *out), f(2, 9 * offset_group, *out)
    full = {**attrs, "group": group, "offset_group": offset_group}
    tol = {"rtol": 1e-4, "atol": 1e-4}
    check_op("DeformConv", [x, w, off, b, mask], full, symbolic=("",), oracle="onnx", **tol)
    check_op("DeformConv", [x, w, off], full, symbolic=("",), oracle="onnx", **tol)
