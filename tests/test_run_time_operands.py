"""Operands that only a run knows and that do not fit: the call says which, on every target; onnxruntime refuses them too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest

import luthier
from luthier.errors import InputError, LuthierError

ort = pytest.importorskip("onnxruntime")

AGAINST = "(?: against|, the model needs) "  # two wordings of one fact
X = np.arange(8, dtype=np.float32)
# name: (inputs and the node, good feeds, bad feeds, what the message says)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "step of 0": (
        "(float[n] x, int64[1] a, int64[1] b, int64[1] t) => (float[k] y) { ax = Constant<value_ints=[0]>() y = Slice(x, a, b, ax, t) }",
        {"x": X, "a": [1], "b": [7], "t": [2]}, {"x": X, "a": [1], "b": [7], "t": [0]}, rf"Slice.*steps.*0{AGAINST}1",
    ),
    "second step of 0": (
        "(float[n, 2] x, int64[2] t) => (float[k, l] y) { a = Constant<value_ints=[0, 0]>() b = Constant<value_ints=[4, 2]>() ax = Constant<value_ints=[0, 1]>() y = Slice(x, a, b, ax, t) }",
        {"x": X.reshape(4, 2), "t": [1, -1]}, {"x": X.reshape(4, 2), "t": [1, 0]}, r"Slice.*number 1 is 0",
    ),
    "parts too long": (
        "(float[n] x, int64[2] p) => (float[k] y, float[l] z) { y, z = Split<axis=0>(x, p) }",
        {"x": X, "p": [3, 5]}, {"x": X, "p": [3, 6]}, rf"Split.*9{AGAINST}8",
    ),
    "parts too short": (
        "(float[m, n] x, int64[3] p) => (float[k, q] y, float[l, r] z, float[o, s] w) { y, z, w = Split<axis=1>(x, p) }",
        {"x": X.reshape(2, 4), "p": [1, 0, 3]}, {"x": X.reshape(2, 4), "p": [1, 0, 2]}, rf"Split.*3{AGAINST}4",
    ),
    "a negative part": (
        "(float[n] x, int64[2] p) => (float[k] y, float[l] z) { y, z = Split<axis=0>(x, p) }",
        {"x": X, "p": [0, 8]}, {"x": X, "p": [-1, 9]}, rf"Split.*length 0.*-1{AGAINST}0",
    ),
    "an extent and constant parts": (
        "(float[n] x) => (float[3] y, float[5] z) { p = Constant<value_ints=[3, 5]>() y, z = Split<axis=0>(x, p) }",
        {"x": X}, {"x": X[:7]}, rf"Split.*8{AGAINST}7",
    ),
    "cropped to less than nothing": (
        "(float[n] x, int64[2] p) => (float[k] y) { y = Pad(x, p) }",
        {"x": X, "p": [-3, -5]}, {"x": X, "p": [-3, -6]}, rf"Pad.*dimension 0.*-1{AGAINST}0",
    ),
    "cropped by constants": (
        "(float[n] x) => (float[k] y) { p = Constant<value_ints=[-2, -2]>() y = Pad(x, p) }", {"x": X[:4]}, {"x": X[:3]}, rf"Pad.*-1{AGAINST}0",
    ),
    "a kernel larger than its input": (
        "(float[1, 1, h, w] x, float[1, 1, 3, 2] k) => (float[1, 1, p, q] y) { y = Conv(x, k) }",
        {"x": X.reshape(1, 1, 4, 2), "k": X[:6].reshape(1, 1, 3, 2)}, {"x": X.reshape(1, 1, 2, 4), "k": X[:6].reshape(1, 1, 3, 2)}, rf"Conv.*dimension 0.*2{AGAINST}3",
    ),
    "a dilated kernel": (
        "(float[1, 1, n] x, float[1, 1, 3] k) => (float[1, 1, p] y) { y = Conv<dilations=[3], pads=[1, 0]>(x, k) }",
        {"x": X.reshape(1, 1, 8), "k": X[:3].reshape(1, 1, 3)}, {"x": X[:5].reshape(1, 1, 5), "k": X[:3].reshape(1, 1, 3)}, rf"Conv.*6{AGAINST}7",
    ),
    "positions beyond their table": (
        "(float[m, 2] table, float[n] x) => (float[k, 2] y) { zero = Constant<value=int64 {0}>() one = Constant<value=int64 {1}>() s = Shape(x) n = Squeeze(s) "
        "p = Range(zero, n, one) y = Gather(table, p) }",
        {"table": X.reshape(4, 2), "x": X[:4]}, {"table": X.reshape(4, 2), "x": X[:5]}, rf"Gather.*greatest index.*3{AGAINST}4",
    ),
    "positions from where a cache ends": (
        "(float[8, 2] table, float[n] x, float[q, 3] cache) => (float[1, k, 2] y) { zero = Constant<value=int64 {0}>() one = Constant<value=int64 {1}>() "
        "two = Constant<value=int64 {2}>() axes = Constant<value_ints=[0]>() s = Shape(x) n = Squeeze(s) c = Shape<start=0, end=1>(cache) q = Squeeze(c) end = Add(q, n) "
        "r = Range(q, end, one) p = Add(r, two) u = Unsqueeze(p, axes) i = Cast<to=6>(u) y = Gather(table, i) }",
        {"table": np.arange(16, dtype=np.float32).reshape(8, 2), "x": X[:4], "cache": X[:6].reshape(2, 3)},
        {"table": np.arange(16, dtype=np.float32).reshape(8, 2), "x": X[:4], "cache": np.zeros((3, 3), np.float32)}, rf"Gather.*greatest index.*7{AGAINST}8",
    ),
    "positions that fall below their table": (
        "(float[5, 2] table, float[n] x) => (float[k, 2] y) { zero = Constant<value=int64 {-1}>() one = Constant<value=int64 {-1}>() s = Shape(x) t = Neg(s) n = Squeeze(t) "
        "p = Range(zero, n, one) y = Gather(table, p) }",
        {"table": np.arange(10, dtype=np.float32).reshape(5, 2), "x": X[:6]}, {"table": np.arange(10, dtype=np.float32).reshape(5, 2), "x": X[:7]}, rf"Gather.*least index.*-6{AGAINST}-5",
    ),
    "a window larger than its input": (
        "(float[1, 1, n] x) => (float[1, 1, p] y) { y = MaxPool<kernel_shape=[4], strides=[2]>(x) }",
        {"x": X.reshape(1, 1, 8)}, {"x": X[:3].reshape(1, 1, 3)}, rf"MaxPool.*3{AGAINST}4",
    ),
}  # fmt: skip

TAKEN = ("parts too short", "a window larger than its input")  # by onnxruntime, though the specification has no answer


def arrays(feeds: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, np.ndarray) else np.array(v, np.int64) for k, v in feeds.items()}


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
@pytest.mark.parametrize("name", CASES)
def test_operand(name: str, target: str) -> None:
    body, good, bad, message = CASES[name]
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\ng {body}')
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # optimized, it clips a Range in silence
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    module = luthier.compile(model, target=target)
    for _ in range(2):  # a call that fails leaves nothing behind
        for got, want in zip(module.run(arrays(good)).values(), session.run(None, arrays(good)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)
        with pytest.raises(InputError, match=message):
            module.run(arrays(bad))
    if name not in TAKEN:
        with pytest.raises(Exception):  # noqa: B017
            session.run(None, arrays(bad))


@pytest.mark.parametrize(
    "body",
    [
        "(float[8] x) => (float[k] y) { p = Constant<value_ints=[-3, -6]>() y = Pad(x, p) }",
        "(float[n] x) => (float[k] y, float[l] z) { p = Constant<value_ints=[-1, 9]>() y, z = Split<axis=0>(x, p) }",
        "(float[n] x) => (float[k] y) { a = Constant<value_ints=[0]>() y = Slice(x, a, a, a, a) }",
    ],
)
def test_operands_that_are_known_are_refused_when_compiling(body: str) -> None:
    with pytest.raises(LuthierError, match="node"):
        luthier.compile(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\ng {body}'))
