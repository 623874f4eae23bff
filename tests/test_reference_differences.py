"""The places of docs/reference_differences.md: ours is onnxruntime's (and torch's, where it has the operator), the reference's is another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper as h
from onnx.reference import ReferenceEvaluator

import luthier

Array = np.ndarray[Any, Any]
R = np.random.default_rng(4)


def normal(*shape: int) -> Array:
    return R.standard_normal(shape).astype(np.float32)


def floats(*v: float) -> Array:
    return np.array(v, np.float32)


def ints(*v: int) -> Array:
    return np.array(v, np.int64)


X, IMAGE = normal(2, 3, 5, 7), normal(1, 2, 9, 8)
GRID = np.concatenate([normal(2, 6, 4, 2) * np.float32(1.7), np.full((2, 1, 4, 2), 3.3, np.float32)], 1)


def bicubic(corners: bool) -> Array:
    torch = pytest.importorskip("torch")
    y = torch.nn.functional.grid_sample(torch.tensor(X), torch.tensor(GRID), mode="bicubic", padding_mode="border", align_corners=corners)
    return np.asarray(y)


# (operator, inputs, attributes, outputs, opset, torch): small integers and scales are constants
CASES: list[tuple[str, list[Array | None], dict[str, Any], int, int, Callable[[], Array] | None]] = [
    ("GridSample", [X, GRID], {"mode": "cubic", "padding_mode": "border", "align_corners": 0}, 1, 20, lambda: bicubic(False)),
    ("GridSample", [X, GRID], {"mode": "cubic", "padding_mode": "border", "align_corners": 1}, 1, 20, lambda: bicubic(True)),
    ("Resize", [X, None, None, ints(2, 3, 1, 1)], {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"}, 1, 20, None),
    ("Resize", [X, None, None, ints(2, 3, 1, 9)], {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel", "exclude_outside": 1}, 1, 20, None),
    ("Resize", [X, None, None, ints(2, 3, 1, 7)], {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel", "antialias": 1}, 1, 20, None),
    ("Resize", [normal(1, 2, 5, 6), None, floats(1, 1, 0.6, 0.7)], {"mode": "nearest"}, 1, 20, None),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, 2, 20, None),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}, 1, 20, None),
    ("LpPool", [IMAGE], {"kernel_shape": [3, 3], "p": 3, "strides": [2, 2], "ceil_mode": 1}, 1, 20, None),
    ("LpNormalization", [IMAGE], {"p": 1, "axis": 1}, 1, 20, None),
    *((op, [np.round(IMAGE * 9)], {"axis": 1}, 1, 11, None) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    ("ReduceLogSumExp", [np.full((2, 3), -np.inf, np.float32), ints(1)], {}, 1, 20, None),
]  # fmt: skip


def model(op: str, arrays: list[Array | None], attrs: dict[str, Any], outputs: int, opset: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    names = ["" if a is None else f"x{k}" for k, a in enumerate(arrays)]
    given = {n: a for n, a in zip(names, arrays, strict=True) if a is not None}
    feeds = {n: a for n, a in given.items() if a.ndim > 1}
    held = [onnx.numpy_helper.from_array(a, n) for n, a in given.items() if n not in feeds]
    ins = [h.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in feeds.items()]
    outs = [f"y{k}" for k in range(outputs)]
    g = h.make_graph([h.make_node(op, names, outs, **attrs)], "one", ins, [h.make_empty_tensor_value_info(o) for o in outs], held)
    return h.make_model(g, opset_imports=[h.make_opsetid("", opset)], ir_version=10), feeds


def onnxruntime(m: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)  # type: ignore[no-any-return]


def equal(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[4]}")
def test_the_world_is_followed(case: tuple[str, list[Array | None], dict[str, Any], int, int, Callable[[], Array] | None]) -> None:
    op, arrays, attrs, outputs, opset, torch = case
    m, feeds = model(op, arrays, attrs, outputs, opset)
    got = luthier.compile(m).run(feeds)
    for k, w in enumerate(onnxruntime(m, feeds)):
        np.testing.assert_allclose(got[f"y{k}"], w, rtol=1e-4, atol=2e-5)
    if torch is not None:
        np.testing.assert_allclose(got["y0"], torch(), rtol=1e-4, atol=2e-5)
    with np.errstate(all="ignore"):
        other = ReferenceEvaluator(m).run(None, feeds)
    same = all(equal(np.asarray(o), got[f"y{k}"]) for k, o in enumerate(other))
    assert not same, f"onnx's reference of {op} {attrs} agrees now: take it off docs/reference_differences.md"


@pytest.mark.parametrize("scales", [(0.6, 0.7), (1.5, 2.3), (0.4, 3.0), (0.3, 1.0), (1.0, 0.8)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_opset_10(mode: str, scales: tuple[float, float]) -> None:
    m, feeds = model("Resize", [normal(1, 2, 7, 9), floats(1, 1, *scales)], {"mode": mode}, 1, 10)
    np.testing.assert_allclose(luthier.compile(m).run(feeds)["y0"], onnxruntime(m, feeds)[0], rtol=1e-5, atol=1e-6)
