"""Operators that choose elements: TopK, NonZero, Compress, Unique, NonMaxSuppression."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir.loop import Buffer
from luthier.ir.verify import verify
from tests.ops.check import build, check_op, operator
from tests.ops.suite import cases, run_case

R = np.random.default_rng(11)


def fl(*s: int) -> np.ndarray:
    return R.standard_normal(s).astype(np.float32)


def i64(*v: int) -> np.ndarray:
    return np.array(v, np.int64)


PREFIX = ("test_top_k", "test_nonzero", "test_compress", "test_unique", "test_nonmaxsuppression")


def test_onnx_suite():
    names = [n for n in cases() if n.startswith(PREFIX)]
    assert len(names) >= 28
    for n in names:
        run_case(cases()[n])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k(axis, largest, k):
    check_op("TopK", [fl(6, 7, 8), i64(k)], {"axis": axis, "largest": largest}, outputs=2, const=(1,))
    check_op("TopK", [R.integers(0, 4, (6, 7, 8)).astype(np.int64), i64(k)], {"axis": axis, "largest": largest}, outputs=2)


def test_nonzero():
    check_op("NonZero", [(R.random((3, 4, 5)) < 0.3).astype(np.float32)])
    check_op("NonZero", [R.random((7,)) < 0.5])
    check_op("NonZero", [np.zeros((2, 3), np.int32)])


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_compress(axis):
    x = fl(3, 4, 5)
    c = R.random(60 if axis is None else x.shape[axis] - 1) < 0.5
    attrs = {} if axis is None else {"axis": axis}
    check_op("Compress", [x, c], attrs, symbolic=("", "distinct"))
    check_op("Compress", [x, c], attrs, const=(1,))


@pytest.mark.parametrize("sort", [0, 1])
def test_unique(sort):
    for x in (R.integers(-3, 4, 40).astype(np.float32), R.integers(0, 5, (4, 6)).astype(np.int64)):
        check_op("Unique", [x], {"sorted": sort}, outputs=4)
    for axis in (0, 1, 2):
        check_op("Unique", [R.integers(0, 2, (4, 3, 2)).astype(np.float32)], {"axis": axis, "sorted": sort}, outputs=4)


@pytest.mark.parametrize("center", [0, 1])
@pytest.mark.parametrize("limit", [2, 100])
def test_non_max_suppression(center, limit):
    lo = R.random((2, 30, 2)) * 5
    boxes = np.concatenate([lo, lo + R.random((2, 30, 2)) * 3 if not center else R.random((2, 30, 2)) * 3], -1).astype(np.float32)
    scores = R.random((2, 3, 30)).astype(np.float32)
    args = [boxes, scores, i64(limit), np.array([0.4], np.float32), np.array([0.3], np.float32)]
    check_op("NonMaxSuppression", args, {"center_point_box": center}, const=(2,))
    check_op("NonMaxSuppression", args[:4], {"center_point_box": center})
    check_op("NonMaxSuppression", args[:2])


@pytest.mark.parametrize("op, arrays, attrs, n", [
    ("TopK", [fl(4, 5), i64(2)], {}, 2), ("NonZero", [fl(4, 5)], {}, 1), ("Compress", [fl(4, 5), np.ones(4, bool)], {"axis": 0}, 1),
    ("Unique", [fl(9)], {}, 4), ("NonMaxSuppression", [fl(1, 9, 4), fl(1, 2, 9), i64(3)], {}, 1),
])  # fmt: skip
def test_kernels_obey_the_rules_of_the_loop_ir(op, arrays, attrs, n):
    node = build(op, arrays, attrs, n, "distinct", ())
    ins = [Buffer(f"in{k}", v.dtype, v.shape, "param", False) for k, v in enumerate(node.inputs)]
    verify(operator(node).compute(node, ins, [Buffer(f"out{k}", v.dtype, v.shape, "param") for k, v in enumerate(node.outputs)]).func)
