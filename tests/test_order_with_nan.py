"""Order and NaN: every operator that compares elements, on every target, against numpy's order (NaN is largest, the first one wins)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper as h

import luthier
from luthier.errors import TargetError

Array = np.ndarray[Any, Any]
VALUES = (np.nan, -np.nan, np.inf, -np.inf, 0.0, 1.0, 2.0, -3.0)


def odd(r: np.random.Generator, shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """Rows of few values with many ties; some rows without NaN, some of nothing else."""
    x = r.choice(np.array(VALUES), shape)
    kind = r.integers(0, 4, (*shape[:-1], 1))
    x = np.where((kind == 0) & np.isnan(x), 1.5, x)
    return np.where((kind == 1) & (r.random(shape) < 0.9), np.nan, x).astype(dtype)


def single(op: str, arrays: Sequence[Array], outputs: int, attrs: dict[str, Any], opened: bool) -> onnx.ModelProto:
    names = [f"x{k}" for k in range(len(arrays))]
    shapes = [[f"{n}d{d}" for d in range(a.ndim)] if opened and a.dtype.kind == "f" else a.shape for n, a in zip(names, arrays, strict=True)]
    held = [onnx.numpy_helper.from_array(a, n) for n, a in zip(names, arrays, strict=True) if a.dtype.kind != "f"]
    ins = [h.make_tensor_value_info(n, h.np_dtype_to_tensor_dtype(a.dtype), s) for n, a, s in zip(names, arrays, shapes, strict=True) if a.dtype.kind == "f"]
    outs = [f"y{k}" for k in range(outputs)]
    g = h.make_graph([h.make_node(op, names, outs, **attrs)], "one", ins, [h.make_empty_tensor_value_info(o) for o in outs], held)
    return h.make_model(g, opset_imports=[h.make_opsetid("", 20)], ir_version=10)


def top_k(x: Array, axis: int, k: int, largest: int) -> tuple[Array, Array]:
    key = np.where(np.isnan(x), np.inf, x)
    at = np.lexsort((-key, ~np.isnan(x)) if largest else (key, np.isnan(x)), axis=axis)
    at = np.take(at, range(k), axis)
    return np.take_along_axis(x, at, axis), at


def arg(x: Array, axis: int, low: bool, last: int) -> Array:
    f = np.argmin if low else np.argmax
    return x.shape[axis] - 1 - f(np.flip(x, axis), axis) if last else f(x, axis)


def hard_max(x: Array, axis: int) -> Array:
    hit = np.zeros_like(x)
    np.put_along_axis(hit, np.expand_dims(x.argmax(axis), axis), 1, axis)
    return hit


def windows(x: Array, k: int, step: int) -> tuple[Array, Array]:
    """Largest elements of windows of the last two axes, and their positions in the tensor."""
    n, c, height, width = x.shape
    view = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::step, ::step]
    ids = np.lib.stride_tricks.sliding_window_view(np.arange(x.size).reshape(x.shape), (k, k), (2, 3))[:, :, ::step, ::step]
    rows = view.reshape(*view.shape[:4], -1)
    at = rows.argmax(-1)[..., None]
    return np.take_along_axis(rows, at, -1)[..., 0], np.take_along_axis(ids.reshape(rows.shape), at, -1)[..., 0]


Drawn = tuple[str, list[Array], dict[str, Any], list[Array]]


def draw_top_k(r: np.random.Generator, x: Array) -> Drawn:
    axis, largest = int(r.integers(-x.ndim, x.ndim)), int(r.integers(0, 2))
    k = int(r.integers(1, x.shape[axis] + 1))
    return "TopK", [x, np.array([k], np.int64)], {"axis": axis, "largest": largest}, list(top_k(x, axis, k, largest))


def draw_arg(r: np.random.Generator, x: Array) -> Drawn:
    axis, low, last = int(r.integers(-x.ndim, x.ndim)), bool(r.integers(0, 2)), int(r.integers(0, 2))
    return "ArgMin" if low else "ArgMax", [x], {"axis": axis, "keepdims": 0, "select_last_index": last}, [arg(x, axis, low, last)]


def draw_reduction(r: np.random.Generator, x: Array) -> Drawn:
    low = bool(r.integers(0, 2))
    axes = tuple(int(a) for a in r.permutation(x.ndim)[: r.integers(1, x.ndim + 1)])
    want = (np.min if low else np.max)(x, axis=axes)
    return "ReduceMin" if low else "ReduceMax", [x, np.array(axes, np.int64)], {"keepdims": 0}, [np.asarray(want)]


def draw_elementwise(r: np.random.Generator, x: Array) -> Drawn:
    low, y = bool(r.integers(0, 2)), np.flip(x).copy()
    return "Min" if low else "Max", [x, y], {}, [(np.minimum if low else np.maximum)(x, y)]


def draw_hard_max(r: np.random.Generator, x: Array) -> Drawn:
    axis = int(r.integers(-x.ndim, x.ndim))
    return "Hardmax", [x], {"axis": axis}, [hard_max(x, axis)]


def draw_unique(r: np.random.Generator, x: Array) -> Drawn:
    y, first, back, count = np.unique(x, True, True, True)
    return "Unique", [x], {}, [y, first, back.reshape(-1), count]


def draw_scatter(r: np.random.Generator, x: Array) -> Drawn:
    axis, low = int(r.integers(0, x.ndim)), bool(r.integers(0, 2))
    at = r.integers(0, x.shape[axis], x.shape)
    want = x.copy()
    place = list(np.indices(x.shape))
    place[axis] = at
    with np.errstate(invalid="ignore"):
        (np.minimum if low else np.maximum).at(want, tuple(place), np.flip(x))
    return "ScatterElements", [x, at, np.flip(x).copy()], {"axis": axis, "reduction": "min" if low else "max"}, [want]


def draw_pool(r: np.random.Generator, x: Array) -> Drawn:
    k, step = int(r.integers(1, 4)), int(r.integers(1, 3))
    return "MaxPool", [x], {"kernel_shape": [k, k], "strides": [step, step]}, list(windows(x, k, step))[: int(r.integers(1, 3))]


def draw_global_pool(r: np.random.Generator, x: Array) -> Drawn:
    return "GlobalMaxPool", [x], {}, [x.max((2, 3), keepdims=True)]


FLAT = (draw_top_k, draw_arg, draw_reduction, draw_elementwise, draw_hard_max, draw_unique, draw_scatter)
IMAGE = (draw_pool, draw_global_pool)


def module(m: onnx.ModelProto, target: str) -> Any:
    if target.startswith("wasm"):
        pytest.importorskip("wasmtime")
    elif target == "webgpu":
        pytest.importorskip("wgpu")
        from luthier.backends.webgpu_device import device

        try:
            device()
        except TargetError as e:
            pytest.skip(str(e))
    return luthier.compile(m, target=target)


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
@pytest.mark.parametrize("draw", [*FLAT, *IMAGE], ids=lambda d: d.__name__[5:])
def test_nan_is_largest_and_the_first_one_wins(draw: Callable[[np.random.Generator, Array], Drawn], target: str) -> None:
    r = np.random.default_rng(len(draw.__name__))
    for number in range(6 if target == "cpu" else 2):
        shape = (2, 3, int(r.integers(5, 9)), int(r.integers(5, 40))) if draw in IMAGE else tuple(r.integers(1, 5, r.integers(0, 3))) + (int(r.integers(2, 90)),)
        x = odd(r, shape, np.float64 if target == "cpu" and number == 4 else np.float32)
        op, arrays, attrs, want = draw(r, x)
        opened = bool(number % 2) and draw is not draw_pool
        got = module(single(op, arrays, len(want), attrs, opened), target).run({f"x{k}": a for k, a in enumerate(arrays) if a.dtype.kind == "f"})
        for k, w in enumerate(want):
            np.testing.assert_array_equal(got[f"y{k}"], w, err_msg=f"{op} {attrs} of {arrays}, output {k}")


def test_boxes_with_nan_scores_hide_no_others() -> None:
    """Every box stands alone: all are taken, those with the score NaN first, then by score."""
    r = np.random.default_rng(3)
    n = 40
    at = np.arange(n, dtype=np.float32)[:, None] * 10
    boxes = np.concatenate([at, at, at + 1, at + 1], 1)[None]
    scores = r.permutation(n).astype(np.float32)
    scores[r.permutation(n)[:7]] = np.nan
    m = single("NonMaxSuppression", [boxes, scores[None, None], np.array([n], np.int64)], 1, {}, False)
    got = luthier.compile(m).run({"x0": boxes, "x1": scores[None, None]})["y0"]
    np.testing.assert_array_equal(got[:, 2], np.lexsort((-scores, ~np.isnan(scores))))
