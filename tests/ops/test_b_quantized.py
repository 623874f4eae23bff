"""Quantization, matrix products and convolutions of quantized tensors."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.check import check_op
from tests.ops.suite import cases, run_case

R = np.random.default_rng(5)


def u8(*s: int) -> np.ndarray:
    return R.integers(0, 256, s).astype(np.uint8)


def i8(*s: int) -> np.ndarray:
    """Seven bits: onnxruntime's u8 by i8 products saturate in i16 on machines without dot product instructions."""
    return R.integers(-64, 64, s).astype(np.int8)


def fl(*s: int) -> np.ndarray:
    return R.standard_normal(s).astype(np.float32)


F = np.float32
PREFIX = ("test_quantizelinear", "test_dequantizelinear", "test_matmulinteger", "test_qlinearmatmul", "test_convinteger", "test_basic_convinteger", "test_qlinearconv", "test_dynamicquantizelinear")
REFUSED = ("float4e2m1",)


def test_onnx_suite():
    names = [n for n in cases() if n.startswith(PREFIX) and not any(r in n for r in (*REFUSED, "_expanded"))]
    assert len(names) >= 35
    for n in names:
        run_case(cases()[n])


@pytest.mark.parametrize("dt", [np.uint8, np.int8, np.int16, np.uint16])
def test_quantize_rounds_half_to_even_and_saturates(dt):
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, 3.49, np.inf, -np.inf], F)
    check_op("QuantizeLinear", [x, F(1), dt(3)])
    check_op("QuantizeLinear", [fl(3, 4, 5) * 40, np.array([0.1, 0.2, 0.3, 0.4], F), np.array([1, 2, 3, 4], dt)], {"axis": 1})
    check_op("QuantizeLinear", [fl(3, 4) * 40, F(0.25), dt(0)], const=(1, 2))
    check_op("DequantizeLinear", [u8(3, 4).astype(dt), F(0.3), dt(7)])
    check_op("DequantizeLinear", [u8(3, 4).astype(dt), np.array([0.1, 0.2, 0.3], F), np.array([1, 2, 3], dt)], {"axis": 0})


def test_dynamic_quantize_linear():
    check_op("DynamicQuantizeLinear", [fl(3, 4, 5) * 3], outputs=3)
    check_op("DynamicQuantizeLinear", [np.abs(fl(7))], outputs=3)
    check_op("DynamicQuantizeLinear", [np.zeros((2, 2), F)], outputs=3)


def test_blocked():
    check_op("QuantizeLinear", [fl(2, 6, 3) * 9, np.abs(fl(2, 2, 3)) + F(0.1), u8(2, 2, 3)], {"axis": 1, "block_size": 3}, oracle="onnx", symbolic=("",))
    check_op("DequantizeLinear", [i8(2, 7), np.abs(fl(2, 3)) + F(0.1)], {"axis": 1, "block_size": 3}, oracle="onnx", symbolic=("",))


@pytest.mark.parametrize("a, b", [((3, 5), (5, 4)), ((2, 3, 5), (5, 4)), ((5,), (5, 4)), ((2, 1, 3, 5), (3, 5, 2))])
def test_matmul_integer(a, b):
    check_op("MatMulInteger", [u8(*a), i8(*b)])
    check_op("MatMulInteger", [u8(*a), u8(*b), np.uint8(120), np.uint8(7)])
    check_op("MatMulInteger", [i8(*a), i8(*b), np.int8(-3), np.int8(0)], const=(2, 3))


def test_matmul_integer_vector_zero_points():
    check_op("MatMulInteger", [u8(3, 5), u8(5, 4), np.uint8(3), u8(4)], symbolic=("",))


def test_integer_convolution_of_channels_last():
    """The layout pass may ask for it: the same numbers, transposed."""
    x, w = u8(2, 4, 7, 6), i8(6, 2, 3, 3)
    attrs = {"pads": (1, 0, 1, 2), "group": 2}
    args = [x.transpose(0, 2, 3, 1), w.transpose(2, 3, 1, 0), np.uint8(9)]
    (got,) = check_op("ConvInteger", args, {**attrs, "layout": "NHWC"}, const=(1,), oracle="")
    (plain,) = check_op("ConvInteger", [x, w, np.uint8(9)], attrs, const=(1,))
    np.testing.assert_array_equal(got, plain.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("dt", [np.uint8, np.int8])
def test_qlinear_matmul(dt):
    a, b = u8(4, 16).astype(dt), i8(16, 6)
    check_op("QLinearMatMul", [a, F(0.02), dt(11), b, F(0.03), np.int8(-2), F(0.5), dt(9)])
    check_op("QLinearMatMul", [a, F(0.02), dt(11), b, np.abs(fl(6)) / 9, np.zeros(6, np.int8), F(0.5), dt(9)], symbolic=("",))


def test_microsoft_matmuls():
    a, b = u8(4, 16), i8(16, 6)
    sb, zb = np.abs(fl(6)) / 9, np.zeros(6, np.int8)
    check_op("com.microsoft::MatMulIntegerToFloat", [a, b, F(0.02), F(0.03), np.uint8(11), np.int8(2), fl(6)], rtol=1e-4)
    check_op("com.microsoft::MatMulIntegerToFloat", [a, b, F(0.02), sb, np.uint8(11), zb], rtol=1e-4, symbolic=("",))
    check_op("com.microsoft::DynamicQuantizeMatMul", [fl(2, 4, 16), b, F(0.03), np.int8(2), fl(6)], rtol=1e-3, atol=1e-3)
    check_op("com.microsoft::DynamicQuantizeMatMul", [fl(4, 16) * 3, b, sb, zb], rtol=1e-3, atol=1e-3, symbolic=("",))
    c = R.integers(-500, 500, (6,)).astype(np.int32)
    check_op("com.microsoft::QGemm", [a, F(0.02), np.uint8(3), b, F(0.01), np.int8(1), c, F(0.05), np.uint8(8)], {"alpha": 1.0})
    check_op("com.microsoft::QGemm", [a, F(0.02), np.uint8(3), i8(6, 16), F(0.01), np.int8(1), c], {"transB": 1}, rtol=1e-4)


@pytest.mark.parametrize("bits, block", [(4, 16), (4, 32), (8, 32)])
@pytest.mark.parametrize("zero", [False, True])
def test_matmul_nbits(bits, block, zero):
    k, n = 64, 5
    blocks = k // block
    args = [fl(3, k), u8(n, blocks, block * bits // 8), np.abs(fl(n, blocks)) / 8]
    if zero:
        args.append(u8(n, -(-blocks * bits // 8)))
    check_op("com.microsoft::MatMulNBits", args, {"K": k, "N": n, "bits": bits, "block_size": block}, rtol=1e-4, atol=1e-4, symbolic=("",))


@pytest.mark.parametrize(
    "attrs", [{}, {"pads": (1, 1, 1, 1), "strides": (2, 2)}, {"auto_pad": "SAME_UPPER"}, {"pads": (0, 2, 1, 0), "dilations": (2, 1)}, {"auto_pad": "SAME_LOWER", "strides": (2, 3)}],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(attrs, groups):
    attrs = {**attrs, "group": groups}
    x, w = u8(2, 4, 7, 6), i8(6, 4 // groups, 3, 3)
    check_op("ConvInteger", [x, w, np.uint8(9)], attrs, const=(1,))
    check_op("ConvInteger", [x, w], attrs, const=(1,))
    check_op("QLinearConv", [x, F(0.02), np.uint8(11), w, F(0.03), np.int8(0), F(0.4), np.uint8(100)], attrs, const=(1, 2, 3, 4, 5, 6, 7))
    bias = R.integers(-900, 900, 6).astype(np.int32)
    check_op("QLinearConv", [x, F(0.02), np.uint8(11), w, np.abs(fl(6)) / 20 + F(0.01), np.zeros(6, np.int8), F(0.4), np.uint8(100), bias], attrs, symbolic=("",))


def test_microsoft_elementwise():
    a, b = u8(2, 3, 4), u8(3, 1)
    q = [a, F(1 / 64), np.uint8(3), b, F(1 / 16), np.uint8(200)]  # powers of two: ties are exact in every order of operations
    check_op("com.microsoft::QLinearAdd", [*q, F(1 / 32), np.uint8(128)])
    check_op("com.microsoft::QLinearMul", [*q, F(1 / 32), np.uint8(128)])
    check_op("com.microsoft::QLinearSigmoid", [a, F(0.05), np.uint8(128), F(1 / 256), np.uint8(0)])
    check_op("com.microsoft::QLinearLeakyRelu", [a, F(0.05), np.uint8(128), F(0.06), np.uint8(9)], {"alpha": 0.1})
    check_op("com.microsoft::QLinearGlobalAveragePool", [u8(2, 3, 5, 4), F(0.05), np.uint8(7), F(0.02), np.uint8(9)])
    check_op("com.microsoft::QLinearConcat", [F(0.05), np.uint8(9), a, F(0.02), np.uint8(3), u8(2, 5, 4), F(0.07), np.uint8(100)], {"axis": 1})
