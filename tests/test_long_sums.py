"""Long sums: every reduction of every template stays within a bound that hardly grows with the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper as h

import luthier
from luthier.schedules.base.schedule import RUN

Array = np.ndarray[Any, Any]
# Equal positive terms round to the same side: their sum is as wrong as a sum of its length gets. Two levels of runs, lanes, pieces.
BOUND = (2 * RUN + 64) * 2.0**-24
TENTH = float(np.float32(0.1))
Case = tuple[str, tuple[int, ...], tuple[int, ...] | None, Callable[[int], float]]

OPS: dict[str, Callable[[int], float]] = {
    "ReduceSum": lambda n: TENTH * n, "ReduceMean": lambda n: TENTH, "ReduceL1": lambda n: TENTH * n, "ReduceL2": lambda n: TENTH * n**0.5,
    "ReduceSumSquare": lambda n: TENTH * TENTH * n, "ReduceLogSum": lambda n: np.log(TENTH * n), "ReduceLogSumExp": lambda n: TENTH + np.log(n),
}
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [  # lengths of at least 150,000
    ((600_001,), None), ((700, 900), None), ((3, 300_000), (1,)), ((150_000, 3), (0,)), ((150_000, 16), (0,)), ((2, 150_000, 5), (1,)),
    ((500, 4, 400), (0, 2)), ((40, 50, 7, 90), (0, 1, 3)),
]  # fmt: skip


def compiled(nodes: list[onnx.NodeProto], feeds: dict[str, Array], weights: dict[str, Array], opened: bool, target: str = "cpu") -> Array:
    ins = [h.make_tensor_value_info(k, onnx.TensorProto.FLOAT, [f"{k}{d}" for d in range(a.ndim)] if opened else a.shape) for k, a in feeds.items()]
    held = [onnx.numpy_helper.from_array(a, k) for k, a in weights.items()]
    g = h.make_graph(nodes, "sums", ins, [h.make_empty_tensor_value_info(nodes[-1].output[0])], held)
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    (y,) = luthier.compile(m, target=target).run(feeds).values()
    return y


def error(got: Array, want: Any) -> float:
    return float(np.max(np.abs(got.astype(np.float64) - want) / np.abs(want)))


def reduced(op: str, shape: tuple[int, ...], axes: tuple[int, ...] | None, keep: int, opened: bool, target: str) -> None:
    weights = {} if axes is None else {"axes": np.array(axes, np.int64)}
    n = int(np.prod([shape[a] for a in axes or range(len(shape))]))
    y = compiled([h.make_node(op, ["x", *weights], ["y"], keepdims=keep)], {"x": np.full(shape, 0.1, np.float32)}, weights, opened, target)
    assert error(y, OPS[op](n)) < BOUND, f"{op} of {shape} over {axes}, keepdims {keep}, {'open' if opened else 'static'}"


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("shape, axes", SHAPES)
def test_reductions(shape: tuple[int, ...], axes: tuple[int, ...] | None, opened: bool) -> None:
    for k, op in enumerate(OPS):
        reduced(op, shape, axes, k % 2, opened, "cpu")


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceL2"])
@pytest.mark.parametrize("shape, axes", [((600_001,), None), ((150_000, 3), (0,))])
def test_reductions_on_wasm(op: str, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> None:
    pytest.importorskip("wasmtime")
    reduced(op, shape, axes, 0, True, "wasm")


@pytest.mark.parametrize("opened", [False, True])
def test_sums_inside_of_other_operators(opened: bool) -> None:
    image = {"x": np.full((1, 3, 500, 600), 0.1, np.float32)}
    assert error(compiled([h.make_node("GlobalAveragePool", ["x"], ["y"])], image, {}, opened), TENTH) < BOUND
    assert error(compiled([h.make_node("AveragePool", ["x"], ["y"], kernel_shape=[500, 600])], image, {}, False), TENTH) < BOUND
    row = {"x": np.full((2, 300_000), 0.1, np.float32)}
    assert error(compiled([h.make_node("Softmax", ["x"], ["y"])], row, {}, opened), 1 / 300_000) < BOUND
    assert error(compiled([h.make_node("LpNormalization", ["x"], ["y"], p=1)], row, {}, opened), 1 / 300_000) < BOUND
    pair = {"x": np.full(500_000, 0.1, np.float32), "w": np.full(500_000, 0.1, np.float32)}
    assert error(compiled([h.make_node("Einsum", ["x", "w"], ["y"], equation="i,i->")], pair, {}, opened), TENTH * TENTH * 500_000) < BOUND


@pytest.mark.parametrize("rows, columns", [(1, 1), (4, 16), (16, 1)])
def test_products_over_a_long_axis(rows: int, columns: int) -> None:
    a, b = np.full((rows, 100_000), 0.1, np.float32), np.full((100_000, columns), 0.1, np.float32)
    y = compiled([h.make_node("MatMul", ["a", "b"], ["y"])], {"a": a, "b": b}, {}, False)
    assert error(y, TENTH * TENTH * 100_000) < 2**-24 * (2048 + 64)


def test_results_do_not_depend_on_the_threads() -> None:
    x = np.random.default_rng(0).standard_normal(700_001).astype(np.float32)
    g = h.make_graph(
        [h.make_node("ReduceL2", ["x"], ["y"], keepdims=0)], "sums", [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])],
        [h.make_empty_tensor_value_info("y")],
    )
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    one, two, five = (luthier.compile(m, threads=t).run({"x": x})["y"] for t in (1, 2, 5))
    assert one == two == five
    np.testing.assert_allclose(one, np.sqrt((x.astype(np.float64) ** 2).sum()), rtol=BOUND)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"])
@pytest.mark.parametrize("n", [0, 1, 65_535, 65_536, 65_537, 131_072, 300_000])
def test_pieces_of_any_length(op: str, n: int) -> None:
    x = np.random.default_rng(n).choice(np.array([-1, 1], np.float32), n) + np.float32(0 if op == "ReduceProd" else 0.5)
    got = compiled([h.make_node(op, ["x"], ["y"], keepdims=0)], {"x": x}, {}, True)
    want = {"ReduceMax": lambda: x.max(initial=-np.inf), "ReduceMin": lambda: x.min(initial=np.inf), "ReduceProd": x.prod, "ReduceSum": x.sum}[op]()
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("opened", [False, True])
def test_normalisation_of_values_with_a_large_mean(opened: bool) -> None:
    """Mean 1e4, spread 1: what is lost is the rounding of the mean (half a place of 1e4), not digits of the variance."""
    r = np.random.default_rng(0)
    x = (r.standard_normal((2, 4, 90, 110)) + 1e4).astype(np.float32)
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    forms: list[tuple[str, tuple[int, ...], list[str], dict[str, Any]]] = [
        ("InstanceNormalization", (2, 3), ["x", "s", "b"], {}), ("GroupNormalization", (1, 2, 3), ["x", "s", "b"], {"num_groups": 1}),
        ("MeanVarianceNormalization", (0, 2, 3), ["x"], {}), ("BatchNormalization", (0, 2, 3), ["x", "s", "b", "b", "s"], {"training_mode": 1}),
        ("LayerNormalization", (1, 2, 3), ["x", "l"], {"axis": 1}),
    ]  # fmt: skip
    for op, over, names, attrs in forms:
        if opened and op == "GroupNormalization":  # it wants to know its channels
            continue
        weights = {k: v for k, v in (("s", one), ("b", zero), ("l", np.ones(x.shape[1:], np.float32))) if k in names}
        node = h.make_node(op, names, ["y", "m", "v"] if op == "BatchNormalization" else ["y"], **attrs)
        wide = x.astype(np.float64)
        d = wide - wide.mean(over, keepdims=True)
        want = d / np.sqrt((d * d).mean(over, keepdims=True) + (0 if op == "MeanVarianceNormalization" else 1e-5))
        got = compiled([node], {"x": x}, weights, opened and op == "MeanVarianceNormalization")
        assert np.abs(got - want).max() < 2e-3, op
