"""Elementwise operators: types, broadcasting, corner values, errors."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir import dtypes as D
from luthier.ir.builder import Names, make_node
from luthier.ir.errors import ShapeError, TypeMismatch
from luthier.ir.expr import var
from luthier.ir.graph import TensorType, Value
from tests.ops.check import check_op

RNG = np.random.default_rng(7)
ALL = ("", "shared", "distinct")
A = RNG.standard_normal((3, 1, 5)).astype(np.float32)
B = RNG.standard_normal((4, 5)).astype(np.float32)
SPECIAL = np.array([0.0, -0.0, 1.5, -2.5, 0.5, np.inf, -np.inf, np.nan, 3.0], np.float32)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Less", "GreaterOrEqual", "Equal", "PRelu", "Mean", "Sum"])
def test_binary_float(op: str) -> None:
    check_op(op, [A, B if op != "PRelu" else RNG.standard_normal((1, 5)).astype(np.float32)], symbolic=ALL)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int8, np.uint64])
@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div", "Max", "Less"])
def test_binary_int(op: str, dtype: type) -> None:
    lo = 1 if np.dtype(dtype).kind == "u" else -9
    a, b = RNG.integers(lo, 10, (2, 7)).astype(dtype), RNG.integers(1, 5, (7,)).astype(dtype)
    check_op(op, [a, b], oracle="ort" if dtype in (np.int32, np.int64) else "", want=None if dtype in (np.int32, np.int64) else [_np(op)(a, b)])


def _np(op: str):  # type: ignore[no-untyped-def]
    return {
        "Add": np.add, "Mul": np.multiply, "Sub": np.subtract, "Max": np.maximum, "Less": np.less,
        "Div": lambda a, b: np.trunc(a.astype(np.float64) / b).astype(a.dtype),
    }[op]  # fmt: skip


@pytest.mark.parametrize("fmod", [0, 1])
def test_mod_signs(fmod: int) -> None:
    a, b = np.array([-7, 7, -7, 7, 6], np.int32), np.array([3, -3, -3, 3, 2], np.int32)
    check_op("Mod", [a, b], {"fmod": fmod})
    check_op("Mod", [a.astype(np.float32) * 1.1, b.astype(np.float32)], {"fmod": 1})


@pytest.mark.parametrize("exponent", [np.array(2.0, np.float32), np.array(0.5, np.float32), np.array(3, np.int64), np.array(-1.5, np.float32)])
def test_pow_constant(exponent: np.ndarray) -> None:
    check_op("Pow", [np.abs(A), exponent], const=(1,))
    check_op("Pow", [np.abs(A), exponent])


def test_pow_mixed() -> None:
    check_op("Pow", [np.array([1, 2, -3], np.int32), np.array([2.0, 3.0, 2.0], np.float32)])
    check_op("Pow", [np.array([1, 2, -3], np.int64), np.array([2, 10, 3], np.int64)])


UNARY = (
    "Relu Sigmoid Tanh Erf Exp Abs Neg Floor Ceil Round Sign Softplus Softsign Elu Selu Celu LeakyRelu HardSigmoid HardSwish "
    "Mish ThresholdedRelu Gelu Sin Cos Tan Atan Sinh Cosh Asinh IsNaN IsInf Identity Shrink com.microsoft::QuickGelu com.microsoft::Gelu "
    "com.microsoft::FastGelu"
).split()


@pytest.mark.parametrize("op", UNARY)
def test_unary(op: str) -> None:
    check_op(op, [np.concatenate([A.reshape(-1) * 3, np.array([0, 0.5, 1.5, 2.5, -0.5, 9, -9], np.float32)])], rtol=2e-5)


@pytest.mark.parametrize("op", ["Relu", "Abs", "Sign", "Floor", "Round", "IsNaN", "IsInf", "Sqrt", "Neg"])
def test_special_values(op: str) -> None:
    check_op(op, [SPECIAL])


@pytest.mark.parametrize("op", ["Sqrt", "Log", "Reciprocal", "Acosh"])
def test_positive_domain(op: str) -> None:
    check_op(op, [np.abs(A) + 1])


@pytest.mark.parametrize("op", ["Asin", "Acos", "Atanh"])
def test_unit_domain(op: str) -> None:
    check_op(op, [np.linspace(-0.99, 0.99, 23, dtype=np.float32)])


def test_nan_propagates_through_max_and_clip() -> None:
    check_op("Max", [SPECIAL, np.zeros(9, np.float32)])
    check_op("Min", [np.zeros(9, np.float32), SPECIAL])
    lo, hi = np.array(-1, np.float32), np.array(1, np.float32)
    check_op("Clip", [SPECIAL, lo, hi], oracle="onnx")
    check_op("Clip", [SPECIAL, lo, hi], const=(1, 2), oracle="onnx")
    check_op("Clip", [SPECIAL, None, hi], oracle="onnx")


def test_where_and_logic() -> None:
    c = RNG.integers(0, 2, (3, 4, 1)).astype(bool)
    check_op("Where", [c, A, B], symbolic=ALL)
    check_op("Xor", [c, ~c])
    check_op("And", [c, RNG.integers(0, 2, (4, 5)).astype(bool)], symbolic=ALL)
    check_op("Not", [c])


def test_bits() -> None:
    a, b = RNG.integers(0, 255, 20).astype(np.uint8), RNG.integers(0, 8, 20).astype(np.uint8)
    check_op("BitShift", [a, b], {"direction": "LEFT"})
    check_op("BitShift", [a, b], {"direction": "RIGHT"})
    check_op("BitwiseXor", [a, b])
    check_op("BitwiseNot", [a])


@pytest.mark.parametrize("src", [np.float32, np.float16, np.float64, np.int32, np.uint8, np.bool_, np.int64])
@pytest.mark.parametrize("to", [1, 2, 3, 6, 7, 9, 10, 11])
def test_cast(src: type, to: int) -> None:
    check_op("Cast", [np.array([0, 1, 2.7, 100, 5.5]).astype(src)], {"to": to})


def test_float_to_int_saturates_and_nan_is_zero() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1e20, -1e20, -1.9], np.float32)
    check_op("Cast", [x], {"to": 6}, want=[np.array([0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), -1], np.int32)])


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_narrow_floats_round_once(dtype: object) -> None:
    import ml_dtypes

    d = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    a, b = A.astype(d), B.astype(d)
    want = (a.astype(np.float64) * b.astype(np.float64)).astype(np.float32).astype(d)
    check_op("Mul", [a, b], want=[want], rtol=0, atol=0)


def values(*types: tuple[D.DType, tuple[object, ...]]) -> list[Value]:
    return [Value(f"x{k}", TensorType.of(d, s)) for k, (d, s) in enumerate(types)]


def test_broadcast_error_names_the_node() -> None:
    with pytest.raises(ShapeError, match=r'broadcast.*node "sum1" \(Add\).*x0 \[2, 3\]'):
        make_node("Add", values((D.f32, (2, 3)), (D.f32, (4, 3))), names=Names(), name="sum1")


def test_type_errors() -> None:
    with pytest.raises(TypeMismatch, match="differ in type"):
        make_node("Add", values((D.f32, (2,)), (D.f64, (2,))), names=Names())
    with pytest.raises(TypeMismatch, match="takes float"):
        make_node("Exp", values((D.i32, (2,))), names=Names())


def test_symbolic_broadcast_keeps_equal_symbols() -> None:
    n, m = var("n"), var("m")
    node = make_node("Add", values((D.f32, (n, 1, 4)), (D.f32, (m, 4))), names=Names())
    assert node.outputs[0].shape[:2] == (n, m)
    node = make_node("Add", values((D.f32, (n,)), (D.f32, (8,))), names=Names())
    assert node.outputs[0].type.static_shape == (8,)
