"""The benchmark tools' own logic: the f64 reference's convolution, the score, the tokenizer, the roofline loops."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

ROOT = str(Path(__file__).resolve().parents[1])


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks` is a folder of the repository, not part of the installed package."""
    monkeypatch.setattr(sys, "path", [*sys.path, ROOT])


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "attributes"),
    [
        ((2, 6, 9, 11), (4, 3, 3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2], "group": 2}),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"pads": [1] * 4, "strides": [1, 2], "dilations": [1, 1], "group": 4}),
        ((1, 2, 20), (3, 2, 5), {"pads": [2, 2], "strides": [3], "dilations": [1], "group": 1}),
    ],
)
def test_convolve_equals_the_evaluators_own(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    from benchmarks.reference_f64 import convolve

    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(x_shape), rng.standard_normal(w_shape)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.DOUBLE, x_shape),
        helper.make_tensor_value_info("w", TensorProto.DOUBLE, w_shape),
    ]
    result = helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], "g", inputs, [result])
    (expected,) = ReferenceEvaluator(helper.make_model(graph)).run(None, {"x": x, "w": w})
    np.testing.assert_allclose(convolve(x, w, **attributes), expected, rtol=0, atol=1e-13)


def row(model: str, luthier: float, **others: tuple[float, bool]) -> dict[str, Any]:
    peers: dict[str, Any] = {"luthier": {"median_ms": luthier, "agrees": True}}
    peers |= {name: {"median_ms": ms, "agrees": agrees} for name, (ms, agrees) in others.items()}
    return {"model": model, "threads": 1, "peers": peers}


def test_score_takes_the_best_agreeing_peer_and_caps_a_row() -> None:
    from benchmarks.cpu import best_peer, mean_ratio

    slow = row("minilm", 20.0, openvino=(10.0, True), onnxruntime=(12.0, True), iree=(1.0, False))
    fast = row("gpt2", 1.0, openvino=(9.0, True))
    beside = row("mlp", 1.0, openvino=(0.1, True))
    assert best_peer(slow, "median_ms") == ("openvino", 10.0)
    mean = mean_ratio([slow, fast, beside], "median_ms")
    assert mean is not None and mean[1] == 2
    assert mean[0] == pytest.approx(math.sqrt(0.5 * 1.5))


def test_word_pieces_are_the_longest_matches(tmp_path: Path) -> None:
    from benchmarks.model_inputs import WordPiece

    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "##i", ".", "plays"]) + "\n")
    assert WordPiece(vocab).encode("Playing. Zzz plays") == [2, 4, 5, 7, 1, 8, 3]


def test_error_sees_shapes_and_lost_nans() -> None:
    from benchmarks.compare_models import error

    reference = {"y": np.array([2.0, -4.0, np.nan])}
    assert error({"y": np.array([2.0, -4.4, np.nan])}, reference) == pytest.approx(0.1)
    assert error({"y": np.array([2.0, -4.0, 0.0])}, reference) == math.inf
    assert error({"y": np.zeros((3, 1))}, reference) == math.inf
    assert error({}, reference) == math.inf


def test_top_five_with_ties() -> None:
    from benchmarks.compare_models import same_top5

    def outputs(*values: float) -> dict[str, Any]:
        return {"y": np.array([values])}

    first = outputs(9, 8, 7, 6, 5, 5, 1)
    assert same_top5(first, outputs(9, 8, 7, 6, 4, 5, 1))  # the tie for the fifth place decided
    assert same_top5(first, outputs(8, 9, 7, 5, 6, 5, 1))  # the order within the five is free
    assert not same_top5(first, outputs(9, 8, 7, 6, 5, 5, 10))
    assert not same_top5(outputs(9, 8, 7, 6, 5, 4, 1), outputs(9, 8, 7, 6, 4, 5, 1))


def test_ceilings_are_of_this_world() -> None:
    from benchmarks.ceilings import bandwidth, fma_peak

    assert 1 < fma_peak(tries=1) < 2000
    assert 0.5 < bandwidth(16 << 10, tries=1) < 5000


def quantized_layers() -> Any:
    """x -> quantize -> dequantize -> MatMul -> quantize -> dequantize -> y, 8 bits."""
    w = np.random.default_rng(2).standard_normal((64, 48)).astype(np.float32)
    scale = {"s1": np.float32(0.03), "s2": np.float32(0.2), "z": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s1", "z"], ["xq"]), helper.make_node("DequantizeLinear", ["xq", "s1", "z"], ["xd"]),
        helper.make_node("MatMul", ["xd", "w"], ["a"]), helper.make_node("QuantizeLinear", ["a", "s2", "z"], ["aq"]),
        helper.make_node("DequantizeLinear", ["aq", "s2", "z"], ["y"]),
    ]  # fmt: skip
    value = helper.make_tensor_value_info
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in (scale | {"w": w}).items()]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["n", 64])], [value("y", TensorProto.FLOAT, ["n", 48])], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_step_by_step_sees_every_piece(tmp_path: Path) -> None:
    """The model in pieces equals itself; a piece that truncates, one that is a hundredth off, and a missing tensor fail."""
    import onnx

    from benchmarks.step_by_step import in_steps, run_onnxruntime

    onnx.save(quantized_layers(), str(tmp_path / "m.onnx"))
    x = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    pieces = in_steps(tmp_path / "m.onnx", {"x": x}, tmp_path)
    assert set(pieces.inputs) == {"x", "xq", "aq"}
    got = run_onnxruntime(pieces.path, pieces.inputs, rewrites=False)
    assert pieces.judge(got).ok(1e-3) and pieces.judge(got).total == 200 * (64 + 48)
    one = got | {"aq.made": got["aq.made"].copy()}
    one["aq.made"][3, 4] += 1
    assert pieces.judge(one).ok(1e-3) and pieces.judge(one).flipped == 1  # a tie
    one["aq.made"][3, 4] += 1
    assert not pieces.judge(one).ok(1e-3)
    xd = (pieces.reference["xq"].astype(np.float32) - 128) * np.float32(0.03)
    w = next(numpy_helper.to_array(t) for t in quantized_layers().graph.initializer if t.name == "w")
    a = xd @ w / np.float32(0.2)
    assert pieces.judge(got | {"aq.made": (np.rint(a) + 128).clip(0, 255).astype(np.uint8)}).ok(1e-3)
    assert not pieces.judge(got | {"aq.made": (np.floor(a) + 128).clip(0, 255).astype(np.uint8)}).ok(1e-3)
    assert not pieces.judge(got | {"aq.made": (np.rint(a * 1.01) + 128).clip(0, 255).astype(np.uint8)}).ok(1e-3)
    assert not pieces.judge(got | {"y": got["y"] * np.float32(1.01)}).ok(1e-3)
    assert not pieces.judge({n: v for n, v in got.items() if n != "xq.made"}).ok(1e-3)


def test_ctranslate2_file(tmp_path: Path) -> None:
    """Weights of each type, quantized by row, and an alias, as CTranslate2's own writer lays them out."""
    import struct

    from benchmarks.ctranslate2_file import read_variables

    def text(s: str) -> bytes:
        return struct.pack("<H", len(s) + 1) + s.encode() + b"\0"

    def variable(name: str, kind: int, array: Any) -> bytes:
        head = text(name) + struct.pack("<B", array.ndim) + b"".join(struct.pack("<I", d) for d in array.shape)
        return head + struct.pack("<BI", kind, array.nbytes) + array.tobytes()

    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 5)).astype(np.float32)
    scale = 127 / np.abs(w).max(1)
    stored = [
        variable("a/bias", 4, w[0].astype(np.float16)), variable("a/heads", 2, np.array(6, np.int16)),
        variable("a/weight", 1, np.rint(w * scale[:, None]).astype(np.int8)),
        variable("a/weight_scale", 0, scale.astype(np.float32)),
        variable("b/weight", 5, (w.view(np.uint32) >> 16).astype(np.uint16)),
    ]  # fmt: skip
    data = struct.pack("<I", 6) + text("Spec") + struct.pack("<II", 3, len(stored)) + b"".join(stored)
    data += struct.pack("<I", 2) + text("c/weight") + text("a/weight") + text("c/weight_scale") + text("a/weight_scale")
    (tmp_path / "model.bin").write_bytes(data)
    got = read_variables(tmp_path / "model.bin")
    assert set(got) == {"a/bias", "a/heads", "a/weight", "b/weight", "c/weight"} and got["a/heads"] == 6
    np.testing.assert_allclose(got["a/bias"], w[0], rtol=1e-3)
    np.testing.assert_allclose(got["a/weight"], w, atol=float(np.abs(w).max()) / 250)
    np.testing.assert_allclose(got["b/weight"], w, rtol=2**-7)
    np.testing.assert_array_equal(got["c/weight"], got["a/weight"])
    (tmp_path / "short.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="ends at byte"):
        read_variables(tmp_path / "short.bin")


def test_whisper_features() -> None:
    """A tone is largest in the band around it, silence is flat."""
    from benchmarks.model_inputs import log_mel

    t = np.arange(16000) / 16000
    for hz in (440.0, 1000.0, 3000.0):
        bands = log_mel((0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32), normalized=False).mean(1)
        mel = hz * 3 / 200 if hz < 1000 else 15 + np.log(hz / 1000) * 27 / np.log(6.4)
        top = 15 + np.log(8) * 27 / np.log(6.4)
        assert abs(int(bands.argmax()) - (mel / (top / 81) - 1)) <= 1
    assert np.ptp(log_mel(np.zeros(1600, np.float32), normalized=False)) == 0
