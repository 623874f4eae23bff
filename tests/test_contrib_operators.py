"""Operators of com.microsoft, as onnxruntime's optimizer and quantizer write them, against onnxruntime, on every target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import luthier
from luthier.errors import UnsupportedOperator

RNG = np.random.default_rng(5)
F, U8, I8, I32 = np.float32, np.uint8, np.int8, np.int32
TARGETS = ("cpu", "wasm", "webgpu")


def real(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(F)


def byte(*shape: int, dtype: Any = U8) -> np.ndarray[Any, Any]:
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max + 1, shape).astype(dtype)


def model(op: str, arrays: Sequence[Any], feed: Sequence[int], outputs: int, attrs: dict[str, Any], domain: str = "com.microsoft") -> onnx.ModelProto:
    """One node; arrays at ``feed`` are inputs with an open first extent, the others constants, None is left out."""
    names = ["" if a is None else f"x{k}" for k, a in enumerate(arrays)]
    node = helper.make_node(op, names, [f"y{k}" for k in range(outputs)], name="the node", domain=domain, **attrs)
    ins = []
    for k in feed:
        code = helper.np_dtype_to_tensor_dtype(np.asarray(arrays[k]).dtype)
        shape = arrays[k].shape
        ins.append(helper.make_tensor_value_info(f"x{k}", code, [f"n{k}_{d}" if d == 0 and len(shape) > 1 else e for d, e in enumerate(shape)]))
    constants = [numpy_helper.from_array(np.asarray(a), f"x{k}") for k, a in enumerate(arrays) if a is not None and k not in feed]
    outs = [onnx.ValueInfoProto(name=f"y{k}") for k in range(outputs)]
    graph = helper.make_graph([node], "g", ins, outs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)


def session(m: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(target: str, op: str, arrays: Sequence[Any], feed: Sequence[int], tol: float = 1e-5, outputs: int = 1, **attrs: Any) -> None:
    """Integers may differ by one step where onnxruntime rounds a quotient in other arithmetic; floats by ``tol`` of the largest."""
    if target == "webgpu":
        pytest.importorskip("wgpu")
    m = model(op, arrays, feed, outputs, attrs)
    feeds = {f"x{k}": arrays[k] for k in feed}
    want = session(m).run(None, feeds)
    got = luthier.compile(m, target=target).run(feeds)
    for (name, a), w in zip(got.items(), want, strict=True):
        assert a.shape == w.shape and a.dtype == w.dtype, name
        d = np.abs(a.astype(np.float64) - w.astype(np.float64))
        if w.dtype.kind in "iu":
            assert d.max(initial=0) <= 1 and np.mean(d > 0) < 0.05, (name, d.max(), np.mean(d > 0))
        else:
            assert d.max(initial=0) <= tol * max(1.0, float(np.abs(w).max(initial=0))), (name, d.max())


S, Z = F(0.0313), U8(120)
CASES: dict[str, tuple[Any, ...]] = {
    "average pool": ("QLinearAveragePool", [byte(2, 4, 7, 6), S, Z, F(0.0217), U8(100)], [0], {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [0, 1, 1, 1]}),
    "average pool, pads counted": ("QLinearAveragePool", [byte(1, 3, 6, 6), S, Z, S, Z], [0], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    "average pool, channels last": ("QLinearAveragePool", [byte(2, 6, 7, 4), S, Z, F(0.0217), U8(100)], [0], {"kernel_shape": [2, 2], "channels_last": 1}),
    "average pool i8": ("QLinearAveragePool", [byte(1, 4, 6, 6, dtype=I8), S, I8(-3), F(0.0217), I8(7)], [0], {"kernel_shape": [3, 3], "ceil_mode": 1, "strides": [2, 2]}),
    "global average pool": ("QLinearGlobalAveragePool", [byte(2, 5, 6, 7), S, Z, F(0.0217), U8(100)], [0], {}),
    "global average pool, channels last": ("QLinearGlobalAveragePool", [byte(2, 6, 7, 5), S, Z, F(0.0217), U8(100)], [0], {"channels_last": 1}),
    "softmax": ("QLinearSoftmax", [byte(3, 4, 10), F(0.05), Z, F(1 / 256), U8(0)], [0], {"axis": -1, "opset": 13}),
    "softmax of an inner axis": ("QLinearSoftmax", [byte(3, 4, 10), F(0.05), Z, F(1 / 256), U8(0)], [0], {"axis": 1, "opset": 13}),
    "softmax of opset 12": ("QLinearSoftmax", [byte(3, 4, 5, dtype=I8), F(0.05), I8(2), F(1 / 256), I8(-128)], [0], {"axis": 1, "opset": 12}),
    "where": ("QLinearWhere", [RNG.integers(0, 2, (4, 5)).astype(bool), byte(4, 5), S, Z, byte(4, 5), F(0.02), U8(3), F(0.04), U8(60)], [0, 1, 4], {}),
    "conv, channels last": (
        "QLinearConv", [byte(1, 8, 9, 3), S, Z, byte(6, 3, 3, 3), F(0.01), U8(128), F(0.2), U8(110), byte(6, dtype=I8).astype(I32) * 50], [0],
        {"channels_last": 1, "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]},
    ),
    "nhwc max pool": ("NhwcMaxPool", [byte(2, 7, 8, 3)], [0], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    "quantize u16": ("QuantizeLinear", [real(3, 40) * 500, F(0.02), np.uint16(30000)], [0], {}),
    "quantize i16 by rows": ("QuantizeLinear", [real(3, 4) * 50, F([0.01, 0.02, 0.03]), np.int16([5, -300, 0])], [0], {"axis": 0}),
    "dequantize u16": ("DequantizeLinear", [byte(3, 40, dtype=np.uint16), F(0.02), np.uint16(30000)], [0], {}),
    "dequantize i32": ("DequantizeLinear", [byte(3, 40, dtype=np.int16).astype(I32), F(0.02)], [0], {}),
    "fused conv relu": ("FusedConv", [real(2, 3, 7, 8), real(4, 3, 3, 3), real(4)], [0], {"activation": "Relu", "pads": [1, 1, 1, 1]}),
    "fused conv sum": ("FusedConv", [real(2, 3, 7, 8), real(4, 3, 1, 1), real(4), real(2, 4, 7, 8)], [0, 3], {"activation": "Relu"}),
    "fused conv leaky": ("FusedConv", [real(2, 4, 7), real(4, 2, 3), None], [0], {"activation": "LeakyRelu", "activation_params": [0.2], "group": 2}),
    "fused conv clip": ("FusedConv", [real(2, 3, 7, 8), real(4, 3, 3, 3)], [0], {"activation": "Clip", "activation_params": [-0.5, 1.5]}),
    "fused conv hard sigmoid": ("FusedConv", [real(2, 3, 7, 8), real(4, 3, 3, 3)], [0], {"activation": "HardSigmoid", "activation_params": [0.1, 0.4]}),
    "fused gemm": ("FusedGemm", [real(5, 6), real(7, 6), real(7)], [0], {"activation": "LeakyRelu", "activation_alpha": 0.1, "transB": 1, "alpha": 0.5}),
    "distances": ("CDist", [real(5, 6), real(7, 6)], [0, 1], {"metric": "euclidean"}),
    "squared distances": ("CDist", [real(5, 6), real(7, 6)], [0], {"metric": "sqeuclidean"}),
    "grid sample": ("GridSample", [real(2, 3, 5, 6), real(2, 4, 3, 2) * F(0.6)], [0, 1], {"mode": "bilinear", "padding_mode": "border"}),
    "expand dims": ("ExpandDims", [real(2, 3), np.array(1, I32)], [0], {}),
    "pad": ("Pad", [real(2, 3), np.array([0, 1, 1, 2]), F([4.0])], [0], {"mode": "constant"}),
    "transposed product": ("TransposeMatMul", [real(2, 5, 4), real(2, 5, 3)], [0, 1], {"transA": 1, "alpha": 0.5}),
    "triangle": ("Trilu", [real(2, 4, 5)], [0], {"upper": 0}),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_operator(case: str, target: str) -> None:
    op, arrays, feed, attrs = CASES[case]
    check(target, op, arrays, feed, **attrs)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["u4", "i4", "u8 of two", "u4 without zero points", "u8 of two without zero points", "u8 of one"])
@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2), (2, 0)], ids=str)
def test_gather_block_quantized(kind: str, axes: tuple[int, int], target: str) -> None:
    gather, quantize = axes
    if kind.startswith("u8") and axes != (0, 2):
        return  # onnxruntime takes bytes with these axes only
    shape, block = [6, 5, 6], 16
    shape[quantize] = 40  # two blocks and a half: an odd number of zero points
    parts = [-(-n // block) if d == quantize else n for d, n in enumerate(shape)]
    low, high = (-8, 8) if kind == "i4" else (0, 256) if kind == "u8 of one" else (0, 16)
    q, zero = (RNG.integers(low, high, s) for s in (shape, parts))
    scale = RNG.uniform(0.05, 0.2, parts).astype(F)
    if kind.startswith("u8 of two"):
        pack = lambda a: (np.pad(a, [(0, 0), (0, 0), (0, a.shape[-1] % 2)]).reshape(*a.shape[:-1], -1, 2) << [0, 4]).sum(-1).astype(U8)  # noqa: E731
        q, zero = pack(q), pack(zero)
    else:
        d = {"u4": ml_dtypes.uint4, "i4": ml_dtypes.int4, "u8": U8}[kind[:2]]
        q, zero = q.astype(d), zero.astype(d)
    index = np.array([[0, 4], [2, 1]], np.int64)
    bits = {"bits": 8} if kind == "u8 of one" else {}
    zeros = [] if "without" in kind else [zero]
    check(target, "GatherBlockQuantized", [q, index, scale, *zeros], [1], gather_axis=gather, quantize_axis=quantize, block_size=block, **bits)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("more", ["", "mask", "past", "causal", "columns"])
def test_qattention(more: str, target: str) -> None:
    b, s, d, heads = 2, 5, 16, 4
    per = (3 * d,) if more == "columns" else ()
    weights, scale = byte(d, 3 * d, dtype=I8), (np.full(per, 0.01) * RNG.uniform(0.5, 1, per)).astype(F)
    mask = {"mask": np.array([5, 3], I32), "past": None}.get(more)
    past = real(2, b, heads, 3, d // heads) if more == "past" else None
    arrays = [byte(b, s, d), weights, real(3 * d), F(0.02), scale, mask, U8(127), np.zeros(per, I8), past]
    while arrays[-1] is None:
        arrays.pop()
    feed = [0, *([5] if mask is not None else []), *([8] if past is not None else [])]
    check(target, "QAttention", arrays, feed, num_heads=heads, unidirectional=int(more == "causal"), outputs=2 if past is not None else 1, tol=2e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_qembed_layer_normalization(target: str) -> None:
    v, p, d = 30, 12, 16
    ids, segments = RNG.integers(0, v, (2, 6)).astype(I32), RNG.integers(0, 2, (2, 6)).astype(I32)
    tables = [byte(v, d), byte(p, d), byte(2, d), byte(d), byte(d)]
    scales, zeros = [F(x) for x in (0.02, 0.01, 0.03, 0.005, 0.004)], [U8(x) for x in (128, 120, 130, 10, 128)]
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], I32)
    arrays = [ids, segments, *tables, mask, *scales, *zeros]
    check(target, "QEmbedLayerNormalization", arrays, [0, 1, 7], outputs=2, epsilon=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("direction", "per", "batch"), [("forward", "tensor", 1), ("reverse", "column", 1), ("bidirectional", "column", 1), ("bidirectional", "tensor", 3)])
def test_dynamic_quantize_lstm(direction: str, per: str, batch: int, target: str) -> None:
    """With more than one row onnxruntime takes one scale for the rows of a thread, where each has its own here."""
    dirs, i, h, t = (2 if direction == "bidirectional" else 1), 8, 6, 5
    shape = (dirs,) if per == "tensor" else (dirs, 4 * h)
    w, r = byte(dirs, i, 4 * h, dtype=I8), byte(dirs, h, 4 * h, dtype=I8)
    sw, sr = (RNG.uniform(0.002, 0.006, shape).astype(F) for _ in range(2))
    x, bias = real(t, batch, i), real(dirs, 8 * h)
    arrays = [x, w, r, bias, None, None, None, None, sw, np.zeros(shape, I8), sr, np.zeros(shape, I8)]
    check(target, "DynamicQuantizeLSTM", arrays, [0], outputs=3, tol=1e-5 if batch == 1 else 0.02, hidden_size=h, direction=direction)


def test_dynamic_quantize_lstm_in_numpy() -> None:
    from tests.ops.check import check_op

    x, w, r = real(4, 2, 5), byte(1, 5, 12, dtype=I8), byte(1, 3, 12)
    parameters = [F([0.004]), I8([3]), RNG.uniform(0.002, 0.006, (1, 12)).astype(F), byte(1, 12)]
    arrays = [x, w, r, real(1, 24), None, real(1, 2, 3), real(1, 2, 3), None, *parameters]
    check_op("com.microsoft::DynamicQuantizeLSTM", arrays, {"hidden_size": 3}, outputs=3, const=(1, 2), oracle="", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("more", ["smooth", "sink", "bias of heads", "one bias", "positions"])
def test_group_query_attention(more: str, target: str) -> None:
    b, s, past, heads, kv, d = 1, 4, 3, 4, 2, 16
    q, k, v = real(b, s, heads * d), real(b, s, kv * d), real(b, s, kv * d)
    cache = [real(b, kv, past, d), real(b, kv, past, d)]
    lengths = [np.full(b, past + s - 1, I32), np.array(past + s, I32)]
    angles = RNG.uniform(0, 6, (40, d // 2))
    rotary: list[Any] = [np.cos(angles).astype(F), np.sin(angles).astype(F)] if more == "positions" else [None, None]
    positions = np.array([[9, 4, 30, 1]], np.int64) if more == "positions" else None
    bias = real(1, heads, s, past + s) if more == "bias of heads" else real(1, 1, s, past + s) if more == "one bias" else None
    sink = real(heads) if more == "sink" else None
    arrays = [q, k, v, *cache, *lengths, *rotary, positions, bias, sink]
    while arrays[-1] is None:
        arrays.pop()
    attrs = {"num_heads": heads, "kv_num_heads": kv, "do_rotary": int(more == "positions"), "smooth_softmax": int(more == "smooth")}
    check(target, "GroupQueryAttention", arrays, [0, 1, 2, 3, 4], outputs=3, tol=2e-5, **attrs)


def test_refusals() -> None:
    with pytest.raises(UnsupportedOperator, match="activation 'Elu'.*the node"):
        luthier.compile(model("FusedConv", [real(1, 3, 5, 5), real(2, 3, 3, 3)], [0], 1, {"activation": "Elu"}))
    with pytest.raises(UnsupportedOperator, match="the same.*the node"):
        arrays = [byte(4, 32), np.array([1]), real(4, 2)]
        luthier.compile(model("GatherBlockQuantized", arrays, [1], 1, {"gather_axis": 1, "quantize_axis": 1, "block_size": 16, "bits": 8}))
