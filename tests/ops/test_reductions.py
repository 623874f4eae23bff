"""Reductions, softmax family and normalisations against onnxruntime or onnx; run-time axes; numerical corner cases."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir import dtypes as D
from luthier.ir.builder import Names, make_node
from luthier.ir.errors import ShapeError, TypeMismatch
from luthier.ir.graph import TensorType, Value
from tests.ops.check import check_op

RNG = np.random.default_rng(5)
X = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
TOL = {"rtol": 2e-5, "atol": 2e-6}
REDUCE = "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare".split()


def ints(*v: int) -> np.ndarray:
    return np.array(v, np.int64)


@pytest.mark.parametrize("op", REDUCE)
@pytest.mark.parametrize("keep", [0, 1])
def test_reduce(op: str, keep: int) -> None:
    x = np.abs(X) if op == "ReduceLogSum" else X
    for axes in (ints(1), ints(-1, 0), ints(0, 1, 2, 3)):
        check_op(op, [x, axes], {"keepdims": keep}, const=(1,), symbolic=("", "distinct"), **TOL)
        check_op(op, [x, axes], {"keepdims": keep}, symbolic=("",), **TOL)
    check_op(op, [x], {"keepdims": keep}, **TOL)
    check_op(op, [x, ints()], {"keepdims": keep, "noop_with_empty_axes": 1}, const=(1,), oracle="onnx", **TOL)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMax", "ReduceProd", "ReduceMin", "ReduceMean"])
def test_reduce_int(op: str) -> None:
    check_op(op, [RNG.integers(-4, 5, (3, 4)).astype(np.int32), ints(1)], const=(1,), oracle="ort" if op != "ReduceMean" else "")


def test_reduce_of_nothing_gives_the_identity() -> None:
    x = np.zeros((2, 0, 3), np.float32)
    check_op("ReduceSum", [x, ints(1)], const=(1,), want=[np.zeros((2, 1, 3), np.float32)])
    check_op("ReduceProd", [x, ints(1)], const=(1,), want=[np.ones((2, 1, 3), np.float32)])
    check_op("ReduceMax", [x, ints(1)], const=(1,), want=[np.full((2, 1, 3), -np.inf, np.float32)])


def test_log_sum_exp_does_not_overflow() -> None:
    x = np.array([[1000.0, 1000.0], [-1000.0, -1001.0], [-np.inf, -np.inf]], np.float32)
    want = np.array([1000 + np.log(2), -1000 + np.log1p(np.exp(-1.0)), -np.inf], np.float32)
    check_op("ReduceLogSumExp", [x, ints(1)], {"keepdims": 0}, const=(1,), want=[want])


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_arg(op: str, last: int) -> None:
    x = np.array([[1, 3, 3, -2, -2], [-np.inf] * 5, [5, 4, 3, 2, 1]], np.float32)
    for axis, keep in ((1, 1), (0, 0), (-1, 0)):
        check_op(op, [x], {"axis": axis, "keepdims": keep, "select_last_index": last}, symbolic=("", "distinct"), oracle="onnx")


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [0, 2, -1])
def test_softmax(op: str, axis: int) -> None:
    check_op(op, [X], {"axis": axis}, symbolic=("", "distinct"), **TOL)


def test_softmax_is_stable_and_takes_minus_infinity() -> None:
    x = np.array([[1e30, 1e30, -np.inf], [0, -np.inf, -np.inf]], np.float32)
    check_op("Softmax", [x], want=[np.array([[0.5, 0.5, 0], [1, 0, 0]], np.float32)])


@pytest.mark.parametrize("axis", [-1, 2, 1])
def test_layer_norm(axis: int) -> None:
    shape = X.shape[axis:]
    s, b = RNG.standard_normal(shape).astype(np.float32), RNG.standard_normal(shape).astype(np.float32)
    check_op("LayerNormalization", [X, s, b], {"axis": axis, "epsilon": 1e-3}, outputs=3, symbolic=("", "shared"), **TOL)
    check_op("LayerNormalization", [X, s], {"axis": axis}, **TOL)
    check_op("RMSNormalization", [X, s], {"axis": axis}, oracle="onnx", **TOL)


def test_layer_norm_of_large_offsets_keeps_its_digits() -> None:
    x = (RNG.standard_normal((4, 256)) + 1e4).astype(np.float32)
    check_op("LayerNormalization", [x, np.ones(256, np.float32)], rtol=1e-3, atol=1e-3)


def test_skip_layer_norm() -> None:
    x, skip = RNG.standard_normal((2, 3, 8)).astype(np.float32), RNG.standard_normal((2, 3, 8)).astype(np.float32)
    g, b, c = (RNG.standard_normal(8).astype(np.float32) for _ in range(3))
    check_op("com.microsoft::SkipLayerNormalization", [x, skip, g, b, c], {"epsilon": 1e-5}, **TOL)
    check_op("com.microsoft::SkipSimplifiedLayerNormalization", [x, skip, g], {"epsilon": 1e-5}, **TOL)


def test_channel_norms() -> None:
    s, b = RNG.standard_normal(3).astype(np.float32), RNG.standard_normal(3).astype(np.float32)
    m, v = RNG.standard_normal(3).astype(np.float32), RNG.random(3).astype(np.float32) + 0.1
    check_op("InstanceNormalization", [X, s, b], symbolic=("",), **TOL)
    check_op("BatchNormalization", [X, s, b, m, v], **TOL)
    check_op("BatchNormalization", [X, s, b, m, v], {"training_mode": 1, "momentum": 0.8}, outputs=3, oracle="onnx", **TOL)
    x = RNG.standard_normal((2, 6, 3, 4)).astype(np.float32)
    check_op("GroupNormalization", [x, RNG.standard_normal(6).astype(np.float32), np.ones(6, np.float32)], {"num_groups": 3}, symbolic=("",), **TOL)


def test_other_norms() -> None:
    for p in (1, 2):
        check_op("LpNormalization", [X], {"axis": 1, "p": p}, **TOL)
    check_op("LpNormalization", [np.zeros((2, 2), np.float32)], want=[np.zeros((2, 2), np.float32)])
    check_op("MeanVarianceNormalization", [X], {"axes": (0, 2, 3)}, **TOL)
    for size in (1, 3, 5):
        check_op("LRN", [X], {"size": size, "alpha": 0.01}, **TOL)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "Softmax"])
def test_half_precision_accumulates_in_f32(op: str) -> None:
    x = np.full((4, 4096), 1.0, np.float16)
    args = [x, ints(1)] if op != "Softmax" else [x]
    want = {"ReduceSum": np.full((4, 1), 4096.0), "ReduceMean": np.ones((4, 1)), "Softmax": np.full((4, 4096), 1 / 4096)}[op]
    check_op(op, args, const=(1,) if op != "Softmax" else (), want=[want.astype(np.float16)], rtol=0, atol=0)


def test_errors() -> None:
    x = Value("x", TensorType.of(D.f32, (2, 3)))
    with pytest.raises(ShapeError, match="axis 2 is out of range for rank 2"):
        make_node("ReduceSum", [x, Value.const("a", ints(2))], names=Names())
    with pytest.raises(ShapeError, match="does not broadcast"):
        make_node("LayerNormalization", [x, Value("s", TensorType.of(D.f32, (2, 2, 3)))], names=Names())
    with pytest.raises(TypeMismatch):
        make_node("Softmax", [Value("i", TensorType.of(D.i32, (2,)))], names=Names())
