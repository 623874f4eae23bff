"""Calibration: data in, statistics out, against numpy and onnxruntime."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from luthier.errors import InputError
from luthier.quantization.calibrate import (
    collect,
    collect_outputs,
    load_graph,
    product_rows,
    read_data,
    run_batches,
    weight_layers,
)
from luthier.quantization.observers import SIDE, Histogram, choose_range

RNG = np.random.default_rng(3)


def two_layers(rows: int | str = "n") -> onnx.ModelProto:
    """x[n, 6] -> MatMul -> Relu -> Gemm(transB) -> y[n, 3]."""
    weights = {"w": RNG.standard_normal((6, 5)), "v": RNG.standard_normal((3, 5)), "b": RNG.standard_normal(3)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "v", "b"], ["y"], "second", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 3])],
        [numpy_helper.from_array(a.astype(np.float32), k) for k, a in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_moments_peaks_and_ranges_are_those_of_numpy() -> None:
    model = two_layers()
    graph = load_graph(model)
    xs = [RNG.standard_normal((4, 6)).astype(np.float32), RNG.standard_normal((7, 6)).astype(np.float32)]
    layers = weight_layers(graph)
    assert [(layer.name, layer.n, layer.k, layer.transposed) for layer in layers] == [("first", 5, 6, False), ("second", 3, 5, True)]
    stats = collect(graph, read_data([{"x": x} for x in xs], graph), histograms=[layers[1].x], peaks=layers, hessians=layers)
    w = numpy_helper.to_array(model.graph.initializer[0])
    r = np.maximum(np.concatenate(xs) @ w, 0)
    every = np.concatenate(xs).astype(np.float64)
    np.testing.assert_allclose(stats.hessian(layers[0]), every.T @ every / 11, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.second_moments(layers[1]), (r.astype(np.float64) ** 2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.peaks["r"], r.max(0), rtol=1e-5)
    assert stats.minimum["r"] == 0
    np.testing.assert_allclose(stats.maximum["r"], r.max(), rtol=1e-5)
    assert stats.histograms["r"].counts.sum() == r.size


def test_outputs_are_onnxruntimes() -> None:
    model = two_layers(2)
    graph = load_graph(model)
    data = read_data({"x": RNG.standard_normal((6, 6)).astype(np.float32)}, graph)  # three samples of two rows
    assert len(data) == 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for feed, got in zip(data, collect_outputs(graph, data), strict=True):
        np.testing.assert_allclose(got["y"], session.run(None, feed)[0], rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from([0, 1, 2]), st.integers(1, 2),
)
def test_rows_of_a_convolution(batch: int, group: int, tap: int, stride: int, pad: int, dilation: int) -> None:
    """``product_rows @ matrix.T`` is the convolution, for groups, strides, dilations and padding."""
    rng = np.random.default_rng(group * 100 + tap * 10 + stride)
    w = rng.standard_normal((4, 4 // group, tap, 2)).astype(np.float32)
    x = rng.standard_normal((batch, 4, 7, 8)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "c", group=group, strides=[stride, 1], pads=[pad, 0, 1, pad], dilations=[dilation, 1])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (want,) = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    (layer,) = weight_layers(load_graph(model))
    rows = product_rows(layer, x)
    if group == 1:
        got = rows @ layer.matrix().T
    else:
        got = np.matmul(rows, layer.matrix().reshape(group, -1, layer.k).swapaxes(1, 2)).transpose(1, 0, 2).reshape(rows.shape[1], -1)
    np.testing.assert_allclose(got, np.moveaxis(want, 1, -1).reshape(-1, 4), rtol=1e-4, atol=1e-4)


def test_data_of_files_and_folders(tmp_path: Path) -> None:
    graph = load_graph(two_layers())
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=np.full((2, 6), i, np.float32))
    assert [int(f["x"][0, 0]) for f in read_data(tmp_path, graph)] == [0, 1, 2]
    assert len(read_data(tmp_path / "1.npz", graph)) == 1
    assert len(read_data(tmp_path, graph, limit=2)) == 2
    np.savez(tmp_path / "many.npz", x=np.zeros((5, 2, 6), np.float32))  # one more axis: five samples
    assert len(read_data(tmp_path / "many.npz", graph)) == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "needs calibration data"), ([], "no calibration data"), ("/no/such.npz", "cannot read"), (3, "type int"), ([1], "not a mapping"),
        ({"z": np.zeros((1, 6), np.float32)}, 'no input "z"'), ({}, 'lacks the input "x"'), ({"x": np.zeros((2, 6), np.int32)}, "int32"),
        ({"x": np.full((2, 6), np.nan, np.float32)}, "NaN"), ({"x": np.zeros(6, np.float32)}, "does not fit"),
    ],
)  # fmt: skip
def test_bad_data(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_data(source, load_graph(two_layers()))


def test_values_that_are_not_finite_are_named() -> None:
    graph = load_graph(two_layers())
    layers = weight_layers(graph)
    with pytest.raises(InputError, match='"h"'):
        collect(graph, [{"x": np.full((1, 6), 3e38, np.float32)}], ranges=[layers[0].node.outputs[0]])


def test_an_interrupt_passes_through() -> None:
    def stop(number: int, arrays: object) -> None:
        raise KeyboardInterrupt

    graph = load_graph(two_layers())
    before = str(graph)
    with pytest.raises(KeyboardInterrupt):
        run_batches(graph, [{"x": np.zeros((1, 6), np.float32)}], [], stop)
    assert str(graph) == before


# ---------------------------------------------------------------- observers


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), st.integers(1, 4))
def test_histogram_counts_like_numpy(values: list[float], parts: int) -> None:
    """Merged bins hold what numpy counts in the same bins, however the values arrive."""
    h = Histogram()
    for chunk in np.array_split(np.array(values), parts):
        h.add(chunk)
    assert h.counts.sum() == len(values)
    assert h.lowest == min(0, *values) and h.highest == max(0, *values)
    want = np.bincount(np.clip(np.floor(np.array(values) / h.width).astype(int) + SIDE, 0, 2 * SIDE - 1), minlength=2 * SIDE)
    # a bin that is merged is a bin of the coarser grid: floor(floor(x / w) / 2) = floor(x / 2w)
    assert np.abs(np.cumsum(want) - np.cumsum(h.counts)).max() <= len(values) // 10 + 1


def test_percentile_is_numpys() -> None:
    x = RNG.standard_normal(200_000)
    h = Histogram()
    h.add(x)
    low, high = choose_range(h, "percentile", 99.0)
    np.testing.assert_allclose([low, high], np.percentile(x, [0.5, 99.5]), atol=2 * h.width)
    assert choose_range(h, "minmax") == (x.min(), x.max())
    a, b = choose_range(h, "minmax", symmetric=True)
    assert a == -b == -np.abs(x).max()


def test_entropy_leaves_outliers_out() -> None:
    """One value a hundred times further out than 100,000 others is not worth two bits of all others; a uniform distribution is kept."""
    h = Histogram()
    h.add(np.append(RNG.standard_normal(100_000), 100.0))
    assert 3 < choose_range(h, "entropy")[1] < 50  # three standard deviations hold 99.7 %
    flat = Histogram()
    flat.add(RNG.uniform(0, 1, 100_000))
    low, high = choose_range(flat, "entropy")
    assert low == 0 and high > 0.95


def test_unknown_observer() -> None:
    with pytest.raises(InputError, match="unknown observer"):
        choose_range(Histogram(), "mean")
    with pytest.raises(InputError, match="percentile"):
        choose_range(Histogram(), "percentile", 30)
