"""Operators that move elements: views, slices, pads, gathers, scatters; static, symbolic and run-time shapes."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir import dtypes as D
from luthier.ir.builder import Names, make_node
from luthier.ir.errors import ShapeError, TypeMismatch
from luthier.ir.expr import var
from luthier.ir.graph import TensorType, Value
from tests.ops.check import check_op

RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
BOTH = ("", "distinct")


def ints(*v: int) -> np.ndarray:
    return np.array(v, np.int64)


@pytest.mark.parametrize("const", [(), (1,)])
@pytest.mark.parametrize("shape", [(6, 4), (0, -1), (2, 12), (4, 3, 2), (-1,), (1, 2, 3, 1, 4), (8, 3)])
def test_reshape(shape: tuple[int, ...], const: tuple[int, ...]) -> None:
    check_op("Reshape", [X, ints(*shape)], const=const, symbolic=BOTH)


def test_reshape_keeps_symbolic_dimensions_apart() -> None:
    b, s = var("b"), var("s")
    x = Value("x", TensorType.of(D.f32, (b, s, 768)))
    node = make_node("Reshape", [x, Value.const("shape", ints(0, 0, 12, 64))], names=Names())
    assert node.outputs[0].shape[:2] == (b, s)
    node = make_node("Reshape", [x, Value.const("shape", ints(-1, 768))], names=Names())
    assert node.outputs[0].shape[0] is b * s


def test_shape_arithmetic_stays_symbolic() -> None:
    names = Names()
    n = var("n")
    x = Value("x", TensorType.of(D.f32, (n, 8)))
    shape = make_node("Shape", [x], names=names).outputs[0]
    first = make_node("Gather", [shape, Value.const("zero", np.array(0, np.int64))], {"axis": 0}, names=names).outputs[0]
    un = make_node("Unsqueeze", [first, Value.const("ax", ints(0))], names=names).outputs[0]
    cat = make_node("Concat", [un, Value.const("rest", ints(2, 4))], {"axis": 0}, names=names).outputs[0]
    y = make_node("Reshape", [x, cat], names=names).outputs[0]
    assert y.shape[0] is n and [d.attr for d in y.shape[1:]] == [2, 4]


def test_shape_errors() -> None:
    x = Value("x", TensorType.of(D.f32, (2, 3)))
    with pytest.raises(ShapeError, match="6 elements do not fit"):
        make_node("Reshape", [x, Value.const("s", ints(4, -1))], names=Names())
    with pytest.raises(ShapeError, match="6 elements do not fit"):
        make_node("Reshape", [x, Value.const("s", ints(5))], names=Names())
    with pytest.raises(ShapeError, match="not 1"):
        make_node("Squeeze", [x, Value.const("s", ints(1))], names=Names())
    with pytest.raises(ShapeError, match="perm"):
        make_node("Transpose", [x], {"perm": (0, 0)}, names=Names())
    with pytest.raises(ShapeError, match="differ in dimension 1"):
        make_node("Concat", [x, Value("y", TensorType.of(D.f32, (2, 4)))], {"axis": 0}, names=Names())
    with pytest.raises(TypeMismatch, match="indices"):
        make_node("Gather", [x, x], names=Names())
    with pytest.raises(ShapeError, match="out of range for extent 2"):
        make_node("Gather", [x, Value.const("j", ints(2))], names=Names())


@pytest.mark.parametrize("const", [(), (1,)])
def test_squeeze_unsqueeze(const: tuple[int, ...]) -> None:
    check_op("Unsqueeze", [X, ints(0, -1)], const=const, symbolic=BOTH)
    check_op("Squeeze", [X.reshape(2, 1, 12, 1), ints(1, -1)], const=const, symbolic=BOTH)


def test_simple_movement() -> None:
    check_op("Flatten", [X], {"axis": 2})
    check_op("Transpose", [X], {"perm": (2, 0, 1)})
    check_op("Shape", [X], {"start": 1})
    check_op("Size", [X])
    check_op("Concat", [X, X[:, :1], X[:, :2]], {"axis": 1}, symbolic=BOTH)
    check_op("Tile", [X, ints(1, 2, 3)])
    check_op("Tile", [X, ints(1, 2, 3)], const=(1,))
    check_op("Expand", [X[:, :1], ints(5, 1, 3, 1)])
    check_op("Expand", [X[:, :1], ints(5, 1, 3, 1)], const=(1,), symbolic=("", "shared"))
    check_op("EyeLike", [X[0]], {"k": 1, "dtype": 6})
    check_op("DepthToSpace", [RNG.standard_normal((1, 8, 2, 3)).astype(np.float32)], {"blocksize": 2, "mode": "CRD"})
    check_op("SpaceToDepth", [RNG.standard_normal((1, 2, 4, 6)).astype(np.float32)], {"blocksize": 2})


def test_split() -> None:
    check_op("Split", [X, ints(1, 3)], {"axis": 2}, outputs=2, const=(1,))
    check_op("Split", [X, ints(1, 3)], {"axis": -1}, outputs=2)
    check_op("Split", [X], {"axis": 1, "num_outputs": 2}, outputs=2)


@pytest.mark.parametrize("const", [(), (1, 2, 3, 4)])
@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ((0, 1), (2, 3), (0, 2), (1, 1)), ((1,), (1000,), (1,), (1,)), ((-2,), (-1,), (2,), (1,)), ((3,), (-100,), (2,), (-1,)),
        ((-1,), (0,), (-1,), (-2,)), ((0,), (2**63 - 1,), (2,), (3,)), ((2,), (1,), (1,), (1,)),
    ],
)  # fmt: skip
def test_slice(starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...], steps: tuple[int, ...], const: tuple[int, ...]) -> None:
    check_op("Slice", [X, ints(*starts), ints(*ends), ints(*axes), ints(*steps)], const=const, symbolic=BOTH)


@pytest.mark.parametrize("const", [(), (1, 3)])
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
def test_pad(mode: str, const: tuple[int, ...]) -> None:
    check_op("Pad", [X, ints(1, 0, 2, 0, 2, 1), np.array(7, np.float32)], {"mode": mode} if mode != "reflect" else {"mode": "edge"}, const=const)
    check_op("Pad", [X, ints(2, 1, 1, 2), np.array(0, np.float32), ints(1, 2)], {"mode": mode}, const=const)


def test_negative_pad_crops() -> None:
    check_op("Pad", [X, ints(0, -1, 1, 0, 0, -2)])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_gather(dtype: type) -> None:
    j = np.array([[0, -1], [2, 1]], dtype)
    for const in ((), (1,)):
        check_op("Gather", [X, j], {"axis": 1}, const=const, symbolic=BOTH)
    check_op("Gather", [X, np.array(-1, dtype)], {"axis": 2}, const=(1,))
    check_op("GatherElements", [X, np.array([[[0, 1, -1, 2], [1, 0, 0, -3]]], dtype)], {"axis": 1}, symbolic=BOTH)
    check_op("GatherND", [X, np.array([[0, 1], [1, -1]], np.int64)], symbolic=("",))
    check_op("GatherND", [X, np.array([[1], [0]], np.int64)], {"batch_dims": 1}, symbolic=("",))


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(reduction: str) -> None:
    j = np.array([[0, 1, 1], [2, -1, 0]], np.int64)
    u = RNG.standard_normal((2, 3)).astype(np.float32)
    data = RNG.standard_normal((3, 3)).astype(np.float32)
    if reduction == "none":
        j = np.array([[0, 1, 2], [2, -1, 0]], np.int64)
        j[1, 1] = 2
    check_op("ScatterElements", [data, j, u], {"axis": 0, "reduction": reduction}, symbolic=("",))
    check_op("ScatterND", [data, np.array([[0], [2]], np.int64), u], {"reduction": reduction}, symbolic=("",))


def test_scatter_skips_and_gather_clamps_bad_indices() -> None:
    x = np.arange(4, dtype=np.float32)
    node = make_node("ScatterND", [Value("x", TensorType.of(D.f32, (4,))), Value("j", TensorType.of(D.i64, (2, 1))), Value("u", TensorType.of(D.f32, (2,)))], names=Names())
    from tests.ops.check import run_node

    got = run_node(node, [x, np.array([[9], [1]], np.int64), np.array([5, 6], np.float32)], {})
    np.testing.assert_array_equal(got[0], [0, 6, 2, 3])
    node = make_node("Gather", [Value("x", TensorType.of(D.f32, (4,))), Value("j", TensorType.of(D.i64, (2,)))], names=Names())
    np.testing.assert_array_equal(run_node(node, [x, np.array([99, -99], np.int64)], {})[0], [3, 0])


def test_range_and_fill() -> None:
    for const in ((), (0, 1, 2)):
        check_op("Range", [np.array(10, np.int64), np.array(-3, np.int64), np.array(-4, np.int64)], const=const)
        check_op("Range", [np.array(3, np.int32), np.array(3, np.int32), np.array(1, np.int32)], const=const)
    check_op("Range", [np.array(1, np.float32), np.array(2, np.float32), np.array(0.3, np.float32)], const=(0, 1, 2))
    check_op("ConstantOfShape", [ints(2, 3)], oracle="", want=[np.zeros((2, 3), np.float32)])


def test_one_hot_trilu_reverse() -> None:
    check_op("OneHot", [ints(1, -1, 5), np.array(4, np.int64), np.array([2, 3], np.float32)], const=(1,), symbolic=("",))
    check_op("OneHot", [np.array([[1], [0]], np.int64), np.array(3, np.int64), np.array([0, 1], np.float32)], {"axis": 0})
    for up in (0, 1):
        check_op("Trilu", [X, np.array(-1, np.int64)], {"upper": up})
        check_op("Trilu", [X], {"upper": up})
    check_op("ReverseSequence", [RNG.standard_normal((4, 3)).astype(np.float32), ints(2, 4, 1)], {"time_axis": 0, "batch_axis": 1})


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_running_sum(exclusive: int, reverse: int) -> None:
    for const in ((), (1,)):
        check_op("CumSum", [X, np.array(1, np.int64)], {"exclusive": exclusive, "reverse": reverse}, const=const)
    check_op("CumProd", [X, np.array(-1, np.int64)], {"exclusive": exclusive, "reverse": reverse}, const=(1,), oracle="")
