"""Custom operators: on arrays, in index notation, as nodes fused with their neighbours, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import luthier
from luthier import custom as lc
from luthier.errors import InputError, ShapeError, TypeMismatch
from luthier.ir.op import REGISTRY

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = set(REGISTRY)
    yield
    for k in [k for k in REGISTRY if k.startswith("test::") and k not in before]:
        del REGISTRY[k]


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def test_elementwise_broadcasts() -> None:
    @luthier.op("test::f")
    def f(x: Any, y: Any, *, c: float = 2.0) -> Any:
        return lc.where(x > 0, x * c, lc.exp(x)) - y / 3 + 1

    x, y = normal(5, 1, 7), normal(4, 1)
    want = np.where(x > 0, x * 2, np.exp(x)) - y / 3 + 1
    np.testing.assert_allclose(f(x, y), want, rtol=2e-6, atol=2e-6)
    want = np.where(x > 0, x * 5, np.exp(x)) - y / 3 + 1
    np.testing.assert_allclose(f(x, y, c=5.0), want, rtol=2e-6, atol=2e-6)


def test_reductions() -> None:
    @luthier.op("test::norm")
    def norm(x: Any, *, eps: float = 1e-5) -> Any:
        d = x - lc.mean(x, -1, keepdims=True)
        return d / lc.sqrt(lc.mean(d * d, -1, keepdims=True) + eps)

    x = normal(3, 6, 33)
    d = x.astype("d") - x.mean(-1, keepdims=True, dtype="d")
    np.testing.assert_allclose(norm(x), d / np.sqrt((d * d).mean(-1, keepdims=True) + 1e-5), rtol=1e-5, atol=1e-5)

    @luthier.op("test::peak")
    def peak(x: Any) -> Any:
        return lc.max(x, (0, 2)) - lc.min(x, (0, 2))

    np.testing.assert_array_equal(peak(x), x.max((0, 2)) - x.min((0, 2)))


def test_index_notation() -> None:
    @luthier.op("test::outer")
    def outer(a: Any, b: Any) -> Any:
        n, k = a.shape
        return lc.compute((n, b.shape[1]), lambda i, j: lc.sum_over(k, lambda t: a[i, t] * b[t, j]))

    a, b = normal(9, 20), normal(20, 17)
    np.testing.assert_allclose(outer(a, b), a.astype("d") @ b, rtol=1e-5, atol=1e-5)

    @luthier.op("test::rotate")
    def rotate(x: Any) -> Any:
        n = x.shape[0]
        return lc.compute((n,), lambda i: x[(i + 1) % n] - x[i])

    x = normal(50)
    np.testing.assert_array_equal(rotate(x), np.roll(x, -1) - x)


def test_node_is_fused_with_its_neighbours() -> None:
    @luthier.op("test::gate")
    def gate(x: Any, g: Any, *, beta: float = 1.0) -> Any:
        return x * lc.sigmoid(g * beta)

    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"]),
        helper.make_node("gate", ["a", "g"], ["b"], domain="test", beta=0.5),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 40]) for n in ("x", "g", "y")]
    model = helper.make_model(helper.make_graph(nodes, "m", io[:2], io[2:]), opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("test", 1)])
    m = luthier.compile(model)
    for n in (1, 7):
        x, g = normal(n, 40), normal(n, 40)
        want = np.maximum(2 * x / (1 + np.exp(-0.5 * g)), 0)
        np.testing.assert_allclose(m.run({"x": x, "g": g})["y"], want, rtol=2e-6, atol=2e-6)
    assert len(m.profile({"x": x, "g": g}, runs=1)) == 1


def test_refusals() -> None:
    @luthier.op("test::add")
    def add(x: Any, y: Any) -> Any:
        return x + y

    with pytest.raises(ShapeError, match="broadcast"):
        add(normal(3), normal(4))
    with pytest.raises(TypeMismatch, match="element types differ"):
        add(normal(3), np.ones(3))
    with pytest.raises(InputError, match="takes 2 inputs"):
        add(normal(3))
    with pytest.raises(InputError, match="no attribute 'gamma'"):
        add(normal(3), normal(3), gamma=1)
    with pytest.raises(InputError, match="domain::name"):
        luthier.op("plain")
    with pytest.raises(InputError, match="exists"):
        luthier.op("com.microsoft::Gelu")(lambda x: x)

    @luthier.op("test::bad")
    def bad(x: Any) -> Any:
        return 1

    with pytest.raises(TypeMismatch, match="not a tensor"):
        bad(normal(3))

    @luthier.op("test::rank")
    def rank(x: Any) -> Any:
        return lc.compute((3,), lambda i: x[i])

    with pytest.raises(ShapeError, match="1 indices for a tensor of rank 2"):
        rank(normal(3, 3))
