"""Resize and sampling operators against onnxruntime and onnx; compile-time and run-time scales, both layouts."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir import dtypes as D
from luthier.ir.builder import Names, make_node
from luthier.ir.errors import ShapeError, UnsupportedOperator
from luthier.ir.expr import var
from luthier.ir.graph import TensorType, Value
from tests.ops.check import check_op

RNG = np.random.default_rng(2)
TOL = {"rtol": 1e-4, "atol": 1e-5}
X = RNG.standard_normal((1, 2, 5, 6)).astype(np.float32)


def fl(*v: float) -> np.ndarray:
    return np.array(v, np.float32)


def ints(*v: int) -> np.ndarray:
    return np.array(v, np.int64)


HOW = ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest(how: str, rounding: str) -> None:
    attrs = {"mode": "nearest", "coordinate_transformation_mode": how, "nearest_mode": rounding}
    for sizes in (ints(1, 2, 10, 18), ints(1, 2, 7, 4), ints(1, 2, 15, 6)):
        check_op("Resize", [X, None, None, sizes], attrs, const=(3,))
        check_op("Resize", [X, None, None, sizes], attrs)
    if how != "align_corners":
        check_op("Resize", [X, None, fl(1, 1, 2, 3)], attrs, const=(2,), symbolic=("", "distinct"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_interpolation(how: str, mode: str) -> None:
    attrs = {"mode": mode, "coordinate_transformation_mode": how}
    for sizes in (ints(1, 2, 10, 18), ints(1, 2, 7, 4)):
        check_op("Resize", [X, None, None, sizes], attrs, const=(3,), **TOL)
        check_op("Resize", [X, None, None, sizes], attrs, symbolic=("",), **TOL)
    for scales in (fl(1, 1, 2, 2), fl(1, 1, 1.5, 0.75)):
        check_op("Resize", [X, None, scales], attrs, const=(2,), symbolic=("", "distinct"), oracle="onnx", **TOL)
        check_op("Resize", [X, None, scales], attrs, symbolic=("", "distinct"), oracle="onnx", **TOL)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_antialias(mode: str) -> None:
    x = RNG.standard_normal((1, 1, 12, 9)).astype(np.float32)
    for sizes in (ints(1, 1, 5, 4), ints(1, 1, 3, 12)):
        check_op("Resize", [x, None, None, sizes], {"mode": mode, "antialias": 1}, const=(3,), symbolic=("",), oracle="onnx", **TOL)
        check_op("Resize", [x, None, None, sizes], {"mode": mode, "antialias": 1}, symbolic=("",), oracle="onnx", **TOL)


def test_options() -> None:
    check_op("Resize", [X, None, None, ints(1, 2, 7, 4)], {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}, const=(3,), oracle="onnx", **TOL)
    check_op("Resize", [X, None, fl(2, 1.5)], {"mode": "linear", "axes": (2, 3)}, const=(2,), oracle="onnx", **TOL)
    check_op("Resize", [X, None, None, ints(7, 9)], {"axes": (2, 3), "keep_aspect_ratio_policy": "not_larger"}, const=(3,), oracle="onnx")
    roi = fl(0, 0, 0.2, 0.3, 1, 1, 0.7, 1.2)
    attrs = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 9.0}
    check_op("Resize", [X, roi, None, ints(1, 2, 3, 4)], attrs, const=(1, 3), oracle="onnx", **TOL)
    check_op("Resize", [X, roi, None, ints(1, 2, 3, 4)], attrs, oracle="onnx", **TOL)


def test_channels_last_and_integers() -> None:
    last = np.ascontiguousarray(np.moveaxis(X, 1, -1))
    want = check_op("Resize", [X, None, fl(1, 1, 2, 2)], {"mode": "linear"}, const=(2,), **TOL)[0]
    check_op("Resize", [last, None, fl(1, 2, 2, 1)], {"mode": "linear"}, const=(2,), want=[np.moveaxis(want, 1, -1)], **TOL)
    check_op("Resize", [RNG.integers(0, 255, (1, 1, 4, 4)).astype(np.uint8), None, fl(1, 1, 2, 2)], {}, const=(2,))


def test_integer_scale_is_index_arithmetic() -> None:
    h = var("h")
    node = make_node("Resize", [Value("x", TensorType.of(D.f32, (1, 3, h, 8))), None, Value.const("s", fl(1, 1, 2, 0.5))], names=Names())
    assert node.outputs[0].shape[2] is h * 2 and node.outputs[0].shape[3].attr == 4


def test_errors() -> None:
    x = Value("x", TensorType.of(D.f32, (1, 3, 4, 8)))
    with pytest.raises(ShapeError, match="either scales or sizes"):
        make_node("Resize", [x], names=Names())
    with pytest.raises(ShapeError, match="2 scales for 4 axes"):
        make_node("Resize", [x, None, Value.const("s", fl(1, 2))], names=Names())
    with pytest.raises(UnsupportedOperator, match="sampling_ratio 0"):
        make_node("RoiAlign", [x, Value("r", TensorType.of(D.f32, (2, 4))), Value("b", TensorType.of(D.i64, (2,)))], names=Names())


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("pad", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("corners", [0, 1])
def test_grid_sample(mode: str, pad: str, corners: int) -> None:
    g = (RNG.random((1, 4, 5, 2)) * 3 - 1.5).astype(np.float32)
    oracle = "ort" if (mode, pad) == ("cubic", "border") else "onnx"  # docs/reference_differences.md
    check_op("GridSample", [X, g], {"mode": mode, "padding_mode": pad, "align_corners": corners}, symbolic=("",), oracle=oracle, **TOL)


def test_grid_sample_volume() -> None:
    x = RNG.standard_normal((2, 2, 3, 4, 5)).astype(np.float32)
    g = (RNG.random((2, 2, 3, 2, 3)) * 2 - 1).astype(np.float32)
    check_op("GridSample", [x, g], {}, symbolic=("",), oracle="onnx", **TOL)


@pytest.mark.parametrize("corners", [0, 1])
def test_affine_grid(corners: int) -> None:
    theta = RNG.standard_normal((2, 2, 3)).astype(np.float32)
    check_op("AffineGrid", [theta, ints(2, 3, 5, 4)], {"align_corners": corners}, symbolic=("",), **TOL)
    theta = RNG.standard_normal((1, 3, 4)).astype(np.float32)
    check_op("AffineGrid", [theta, ints(1, 3, 5, 4, 2)], {"align_corners": corners}, symbolic=("",), **TOL)


def test_centre_crop_pad_and_col2im() -> None:
    check_op("CenterCropPad", [X, ints(3, 9)], {"axes": (2, 3)}, symbolic=("", "distinct"))
    x = RNG.standard_normal((1, 2 * 6, 12)).astype(np.float32)
    check_op("Col2Im", [x, ints(4, 6), ints(2, 3)], {}, symbolic=("",), **TOL)
    check_op("Col2Im", [RNG.standard_normal((1, 4, 9)).astype(np.float32), ints(5, 5), ints(2, 2)], {"strides": (2, 2), "pads": (0, 0, 1, 1)}, symbolic=("",), **TOL)


@pytest.mark.parametrize("how", ["half_pixel", "output_half_pixel"])
def test_roi_align(how: str) -> None:
    rois = np.array([[0, 0, 4, 3], [1, 1, 5, 4.5], [-2, -1, 9, 9]], np.float32)
    x = RNG.standard_normal((2, 2, 5, 6)).astype(np.float32)
    attrs = {"output_height": 2, "output_width": 3, "sampling_ratio": 2, "spatial_scale": 0.9, "coordinate_transformation_mode": how}
    check_op("RoiAlign", [x, rois, ints(0, 1, 1)], attrs, symbolic=("",), oracle="onnx", **TOL)
    check_op("RoiAlign", [x, rois, ints(0, 1, 1)], {**attrs, "mode": "max"}, symbolic=("",), oracle="onnx", **TOL)
