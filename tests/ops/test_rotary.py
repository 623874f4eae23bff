"""Rotary embedding against onnx and onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.check import check_op

RNG = np.random.default_rng(9)


def f(*s: int) -> np.ndarray:
    return RNG.standard_normal(s).astype(np.float32)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("partial", [0, 4])
def test_rotary(interleaved: int, partial: int) -> None:
    r = partial or 8
    attrs = {"interleaved": interleaved, "rotary_embedding_dim": partial}
    pos = RNG.integers(0, 10, (2, 3)).astype(np.int64)
    check_op("RotaryEmbedding", [f(2, 4, 3, 8), f(10, r // 2), f(10, r // 2), pos], attrs, symbolic=("",), oracle="onnx")
    check_op("RotaryEmbedding", [f(2, 3, 32), f(2, 3, r // 2), f(2, 3, r // 2)], {**attrs, "num_heads": 4}, symbolic=("",), oracle="onnx")


def test_microsoft_rotary() -> None:
    x = f(2, 4, 3, 8)
    for pos in (np.array([2], np.int64), RNG.integers(0, 10, (2, 3)).astype(np.int64)):
        check_op("com.microsoft::RotaryEmbedding", [x, pos, f(10, 4), f(10, 4)], symbolic=("",))
