"""Matrix products, convolutions and pooling against onnxruntime; both layouts; static and symbolic shapes."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir import dtypes as D
from luthier.ir.builder import Names, make_node, operator
from luthier.ir.errors import ShapeError, TypeMismatch
from luthier.ir.expr import var
from luthier.ir.graph import TensorType, Value
from tests.ops.check import check_op, close, run_node

RNG = np.random.default_rng(11)
TOL = {"rtol": 1e-4, "atol": 1e-5}


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("a", "b"), [((3, 5), (5, 4)), ((5,), (5, 4)), ((3, 5), (5,)), ((5,), (5,)), ((2, 1, 3, 5), (7, 5, 4)), ((1, 3, 5), (6, 5, 4)), ((2, 3, 5), (5,))]
)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_op("MatMul", [f(*a), f(*b)], symbolic=("", "shared", "distinct"), **TOL)


def test_matmul_types() -> None:
    a, b = RNG.integers(-9, 9, (3, 5)).astype(np.int32), RNG.integers(-9, 9, (5, 4)).astype(np.int32)
    check_op("MatMul", [a, b])
    check_op("MatMul", [f(3, 64).astype(np.float16), f(64, 4).astype(np.float16)], oracle="", want=None, rtol=1e-3, atol=1e-3)
    check_op("com.microsoft::FusedMatMul", [f(2, 5, 3), f(2, 4, 5)], {"transA": 1, "transB": 1, "alpha": 0.5}, **TOL)


@pytest.mark.parametrize("ta", [0, 1])
@pytest.mark.parametrize("tb", [0, 1])
def test_gemm(ta: int, tb: int) -> None:
    a, b = f(3, 5), f(5, 4)
    attrs = {"transA": ta, "transB": tb, "alpha": 0.5, "beta": 2.0}
    for c in (None, f(4), f(3, 1), f(3, 4), np.array(1.5, np.float32)):
        check_op("Gemm", [a.T.copy() if ta else a, b.T.copy() if tb else b, c][: 2 if c is None else 3], attrs, **TOL)


@pytest.mark.parametrize("eq", ["ij,jk->ik", "bij,bjk->bik", "bhid,bhjd->bhij", "...ij,...jk->...ik", "ii->i", "ij->", "ij,jk,kl->il", "i,j->ij", "ij->ji"])
def test_einsum(eq: str) -> None:
    size = dict(zip("bhijkld", (2, 3, 4, 4, 5, 6, 7), strict=True))
    shapes = [[*(2, 3), *(size[c] for c in t[3:])] if t.startswith("...") else [size[c] for c in t] for t in eq.split("->")[0].split(",")]
    check_op("Einsum", [f(*s) for s in shapes], {"equation": eq}, symbolic=("", "shared"), **TOL)


CONVS = [
    ((2, 3, 9, 8), (4, 3, 3, 3), {"pads": (1, 1, 1, 1)}),
    ((1, 4, 9, 8), (6, 2, 3, 2), {"group": 2, "strides": (2, 1), "dilations": (1, 2)}),
    ((1, 4, 7, 7), (4, 1, 3, 3), {"group": 4, "strides": (2, 2), "pads": (0, 1, 2, 1)}),
    ((1, 5, 6, 6), (7, 5, 1, 1), {}),
    ((1, 3, 9, 8), (4, 3, 4, 3), {"auto_pad": "SAME_UPPER", "strides": (2, 3)}),
    ((1, 3, 9, 8), (4, 3, 4, 3), {"auto_pad": "SAME_LOWER", "strides": (2, 1)}),
    ((2, 3, 11), (4, 3, 5), {"pads": (2, 1), "strides": (2,)}),
    ((1, 2, 5, 6, 4), (3, 2, 2, 3, 2), {"pads": (1, 0, 0, 0, 1, 1)}),
]


@pytest.mark.parametrize(("x", "w", "attrs"), CONVS)
def test_conv(x: tuple[int, ...], w: tuple[int, ...], attrs: dict) -> None:
    xs, ws, b = f(*x), f(*w), f(w[0])
    want = check_op("Conv", [xs, ws, b], attrs, symbolic=("",), **TOL)[0]
    check_op("Conv", [xs, ws], attrs, symbolic=("",), **TOL)
    check_op("Conv", [xs, ws, b], attrs, symbolic=("distinct",), const=(1, 2), **TOL)
    k = tuple(range(2, len(w)))
    last = np.ascontiguousarray(np.moveaxis(xs, 1, -1)), np.ascontiguousarray(ws.transpose(*k, 1, 0)), b
    check_op("Conv", last, {**attrs, "layout": "NHWC"}, symbolic=("",), want=[np.moveaxis(want, 1, -1)], **TOL)


TRANSPOSED = [
    ((1, 2, 4, 5), (2, 3, 3, 3), {}),
    ((1, 2, 4, 5), (2, 3, 3, 3), {"strides": (2, 3), "pads": (1, 0, 1, 2), "output_padding": (1, 1)}),
    ((1, 4, 5, 5), (4, 2, 2, 2), {"group": 2, "strides": (2, 2)}),
    ((1, 2, 4, 5), (2, 3, 3, 3), {"strides": (2, 2), "auto_pad": "SAME_UPPER"}),
    ((1, 2, 4, 5), (2, 3, 3, 3), {"strides": (3, 2), "output_shape": (10, 8)}),
    ((1, 2, 5), (2, 3, 3), {"dilations": (2,), "strides": (2,)}),
]


@pytest.mark.parametrize(("x", "w", "attrs"), TRANSPOSED)
def test_conv_transpose(x: tuple[int, ...], w: tuple[int, ...], attrs: dict) -> None:
    xs, ws = f(*x), f(*w)
    b = f(w[1] * attrs.get("group", 1))
    want = check_op("ConvTranspose", [xs, ws, b], attrs, symbolic=("",), **TOL)[0]
    check_op("ConvTranspose", [xs, ws, b], attrs, symbolic=("distinct",), const=(1, 2), **TOL)
    k = tuple(range(2, len(w)))
    last = np.ascontiguousarray(np.moveaxis(xs, 1, -1)), np.ascontiguousarray(ws.transpose(*k, 0, 1)), b
    check_op("ConvTranspose", last, {**attrs, "layout": "NHWC"}, symbolic=("",), want=[np.moveaxis(want, 1, -1)], **TOL)


POOLS = [
    {"kernel_shape": (3, 3)},
    {"kernel_shape": (3, 2), "strides": (2, 2), "pads": (1, 0, 1, 1)},
    {"kernel_shape": (2, 2), "strides": (2, 2), "ceil_mode": 1},
    {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "ceil_mode": 1},
    {"kernel_shape": (2, 3), "dilations": (2, 1)},
    {"kernel_shape": (3, 3), "auto_pad": "SAME_LOWER", "strides": (2, 1)},
]


@pytest.mark.parametrize("attrs", POOLS)
def test_pool(attrs: dict) -> None:
    x = f(2, 3, 9, 8)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    for op, extra in (("MaxPool", {}), ("AveragePool", {}), ("AveragePool", {"count_include_pad": 1}), ("LpPool", {"p": 2}), ("LpPool", {"p": 3})):
        want = check_op(op, [x], {**attrs, **extra}, symbolic=("", "distinct"), **TOL)[0]
        check_op(op, [last], {**attrs, **extra, "layout": "NHWC"}, symbolic=("",), want=[np.moveaxis(want, 1, -1)], **TOL)


@pytest.mark.parametrize("order", [0, 1])
def test_max_pool_indices(order: int) -> None:
    x = f(2, 3, 9, 8)
    y, j = check_op("MaxPool", [x], {"kernel_shape": (3, 2), "strides": (2, 2), "pads": (1, 1, 1, 1), "storage_order": order}, outputs=2)
    if not order:
        check_op("MaxUnpool", [y, j], {"kernel_shape": (3, 2), "strides": (2, 2), "pads": (1, 1, 1, 1)}, oracle="")
    check_op("MaxPool", [x.astype(np.int8)], {"kernel_shape": (3, 3)})


def test_max_pool_of_minus_infinity_ignores_padding() -> None:
    x = np.full((1, 1, 3, 3), -np.inf, np.float32)
    _, j = check_op("MaxPool", [x], {"kernel_shape": (2, 2), "pads": (1, 1, 0, 0)}, outputs=2, oracle="")
    assert j.min() >= 0 and j[0, 0, 0, 0] == 0


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pool(op: str) -> None:
    x = f(2, 3, 5, 4)
    want = check_op(op, [x], symbolic=("", "distinct"), oracle="" if op == "GlobalLpPool" else "ort", **TOL)[0]
    if op == "GlobalLpPool":
        close(want.reshape(2, 3), np.sqrt((x.astype(np.float64) ** 2).sum((2, 3))).astype(np.float32), 1e-5, 1e-6, op)
    check_op(op, [np.ascontiguousarray(np.moveaxis(x, 1, -1))], {"layout": "NHWC"}, want=[np.moveaxis(want, 1, -1)], **TOL)


def test_symbolic_batch_and_size() -> None:
    n, h, w = var("n"), var("h"), var("w")
    x = Value("x", TensorType.of(D.f32, (n, 3, h, w)))
    node = make_node("Conv", [x, Value.const("w", f(8, 3, 3, 3))], {"strides": (2, 2), "pads": (1, 1, 1, 1)}, names=Names())
    assert node.outputs[0].shape[0] is n and node.outputs[0].shape[2] is (h - 1) // 2 + 1
    data = f(2, 3, 7, 6)
    got = run_node(node, [data, node.inputs[1].data], {"n": 2, "h": 7, "w": 6})[0]
    close(got, operator(node).reference(Node_static(node, data), data, node.inputs[1].data)[0], 1e-4, 1e-5, "conv")


def Node_static(node, data):  # type: ignore[no-untyped-def]
    return make_node("Conv", [Value("x", TensorType.of(D.f32, data.shape)), node.inputs[1]], node.attrs, names=Names())


def test_errors() -> None:
    def v(*shape: object, d: D.DType = D.f32) -> Value:
        return Value("v", TensorType.of(d, shape))

    with pytest.raises(ShapeError, match=r'inner dimensions differ: 3 and 4; node "fc" \(MatMul\)'):
        make_node("MatMul", [v(2, 3), v(4, 5)], names=Names(), name="fc")
    with pytest.raises(TypeMismatch):
        make_node("MatMul", [v(2, 3), v(3, 5, d=D.i32)], names=Names())
    with pytest.raises(ShapeError, match="input channels"):
        make_node("Conv", [v(1, 4, 5, 5), v(2, 3, 3, 3)], names=Names())
    with pytest.raises(ShapeError, match="kernel covers 7"):
        make_node("Conv", [v(1, 3, 5, 5), v(2, 3, 7, 7)], names=Names())
    with pytest.raises(ShapeError, match="label 'j'"):
        make_node("Einsum", [v(2, 3), v(4, 5)], {"equation": "ij,jk->ik"}, names=Names())
