"""Quantized layers of the sizes at which the integer templates cut rows into blocks and depthwise inputs into rows of bytes, and every
static form of weights and activations, against integers in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import luthier
from tests.test_integer_kernels import bytes_of, conv_ref, model

CODE = {"u8": TensorProto.UINT8, "i8": TensorProto.INT8}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def extremes(a: Any) -> Any:
    """``a`` with its type's limits at both ends."""
    a.reshape(-1)[:4], a.reshape(-1)[-4:] = np.iinfo(a.dtype).min, np.iinfo(a.dtype).max
    return a


@pytest.mark.parametrize(("h", "w", "c", "m"), [(28, 28, 16, 96), (24, 28, 24, 144), (32, 32, 32, 40), (20, 20, 144, 24), (13, 17, 16, 96)])
@pytest.mark.parametrize(("kind", "zx", "target"), [("u8", 0, "cpu"), ("u8", 131, "cpu:x86-64-v2"), ("i8", -7, "cpu")])
def test_rows_in_blocks(h: int, w: int, c: int, m: int, kind: str, zx: int, target: str, rng: np.random.Generator) -> None:
    x, wt = extremes(bytes_of(kind, (1, c, h, w), rng)), extremes(bytes_of("i8", (m, c, 1, 1), rng))
    node = helper.make_node("ConvInteger", ["x", "w", "zx"], ["y"])
    inits = {"w": wt, "zx": np.array(zx, x.dtype)}
    module = luthier.compile(model([node], {"x": (CODE[kind], [1, c, h, w])}, {"y": TensorProto.INT32}, inits), target=target, threads=2)
    np.testing.assert_array_equal(module.run({"x": x})["y"], conv_ref(x.transpose(0, 2, 3, 1), wt.transpose(2, 3, 1, 0), zx, 0, 1, 0, False).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("h", "w", "c", "k", "stride"), [(14, 14, 32, 3, 1), (15, 13, 48, 3, 2), (7, 7, 160, 3, 1), (9, 12, 16, 5, 1), (28, 28, 96, 3, 2)])
@pytest.mark.parametrize(("kind", "zx"), [("u8", 0), ("u8", 77), ("i8", -7)])
def test_depthwise(h: int, w: int, c: int, k: int, stride: int, kind: str, zx: int, rng: np.random.Generator) -> None:
    x, wt = extremes(bytes_of(kind, (1, c, h, w), rng)), extremes(bytes_of("i8", (c, 1, k, k), rng))
    pad = k // 2
    node = helper.make_node("ConvInteger", ["x", "w", "zx"], ["y"], group=c, pads=[pad] * 4, strides=[stride] * 2)
    module = luthier.compile(model([node], {"x": (CODE[kind], [1, c, h, w])}, {"y": TensorProto.INT32}, {"w": wt, "zx": np.array(zx, x.dtype)}), threads=2)
    np.testing.assert_array_equal(module.run({"x": x})["y"], conv_ref(x.transpose(0, 2, 3, 1), wt.transpose(2, 3, 1, 0), zx, 0, stride, pad, True).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize(("xk", "wk"), [("u8", "i8"), ("i8", "i8"), ("u8", "u8"), ("i8", "u8")])
@pytest.mark.parametrize("zeros", ["none", "one", "channels"])
def test_static_forms(form: str, xk: str, wk: str, zeros: str, rng: np.random.Generator) -> None:
    """Activations and weights of either sign, zero points of the weights for none, all or each of the channels."""
    c, m = 16, 24
    x, w = extremes(bytes_of(xk, (1, c, 6, 5), rng)), extremes(bytes_of(wk, (m, c, 3, 3), rng))
    sx, sy, zx, zy = np.float32(0.02), np.float32(0.3), np.array(-5 if xk == "i8" else 117, x.dtype), np.array(9, x.dtype)
    sw = (rng.random(m) * 0.01 + 0.001).astype(np.float32)
    zw = np.zeros(m, w.dtype) if zeros == "none" else np.full(m, 7, w.dtype) if zeros == "one" else rng.integers(0, 30, m).astype(w.dtype)
    inits = {"w": w, "sx": sx, "zx": zx, "sw": sw, "zw": zw, "sy": sy, "zy": zy}
    if form == "qdq":
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["xf"]), helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=0),
            helper.make_node("Conv", ["xf", "wf"], ["yf"]), helper.make_node("QuantizeLinear", ["yf", "sy", "zy"], ["y"]),
        ]  # fmt: skip
    else:
        nodes = [helper.make_node("QLinearConv", ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy"], ["y"])]
    got = luthier.compile(model(nodes, {"x": (CODE[xk], [1, c, 6, 5])}, {"y": CODE[xk]}, inits), threads=1).run({"x": x})["y"].astype(int)
    acc = conv_ref(x.transpose(0, 2, 3, 1), (w.astype(np.int32) - zw.astype(np.int32)[:, None, None, None]).transpose(2, 3, 1, 0), int(zx), 0, 1, 0, False)
    exact = (acc * (np.float64(sx) * sw.astype(np.float64) / np.float64(sy))).transpose(0, 3, 1, 2)
    info = np.iinfo(x.dtype)
    ref = np.clip(np.rint(exact) + int(zy), info.min, info.max)
    tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    assert not ((got != ref) & ~tie).any() and (np.abs(got - ref) <= 1).all()
    assert len(np.unique(got)) > 50


def test_infinite_and_huge_values_saturate_in_vectors() -> None:
    """What lies outside of the bytes or is no number goes to the ends: the vector form has no lower clamp before its packs."""
    x = np.array([-np.inf, np.inf, np.nan, -3e38, 3e38, -2.0**31, 2.0**31, -1e10, 1e10, -0.5, 0.5, 1.5, 254.5, 255.5, -128.5, 300.0], np.float32)
    x = np.tile(x, 4).reshape(4, 16)
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])]
    for kind in ("u8", "i8"):
        dt = np.uint8 if kind == "u8" else np.int8
        got = luthier.compile(model(nodes, {"x": (TensorProto.FLOAT, [4, 16])}, {"y": CODE[kind]}, {"s": np.float32(1), "z": dt(0)}), threads=1).run({"x": x})["y"]
        info = np.iinfo(dt)
        want = np.clip(np.rint(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30)), info.min, info.max)
        np.testing.assert_array_equal(got[~np.isnan(x)], want[~np.isnan(x)])
