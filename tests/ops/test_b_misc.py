"""Signal, linear algebra, optimizer steps, ai.onnx.ml."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.check import check_op
from tests.ops.suite import cases, run_case

R = np.random.default_rng(13)
PREFIX = (
    "test_dft", "test_stft", "test_melweightmatrix", "test_det", "test_adam", "test_adagrad", "test_momentum", "test_nesterov",
    "test_ai_onnx_ml_array_feature_extractor", "test_ai_onnx_ml_binarizer",
)  # fmt: skip

def fl(*s: int) -> np.ndarray:
    return R.standard_normal(s).astype(np.float32)


def i64(v: int) -> np.ndarray:
    return np.array(v, np.int64)


def test_onnx_suite():
    names = [n for n in cases() if n.startswith(PREFIX) and "expanded" not in n]
    assert len(names) >= 24
    for n in names:
        run_case(cases()[n], 1e-6 if "dft" in n else 0.0)  # numpy's f32 transforms leave noise where the exact value is 0


@pytest.mark.parametrize("inverse", [0, 1])
@pytest.mark.parametrize("length", [None, 5, 12])
@pytest.mark.parametrize("axis", [1, -2])
def test_dft(inverse, length, axis):
    args = [fl(2, 8, 7, 2), None if length is None else i64(length), i64(axis)]
    check_op("DFT", args, {"inverse": inverse}, const=(2,), oracle="onnx", rtol=1e-4, atol=1e-4)


def test_real_transforms():
    check_op("DFT", [fl(2, 9, 1)], {"onesided": 1}, oracle="onnx", rtol=1e-4, atol=1e-4)
    want = np.fft.irfft(np.fft.rfft(x := fl(2, 10)))
    z = np.fft.rfft(x)
    z = np.stack([z.real, z.imag], -1).astype(np.float32)
    check_op("DFT", [z, None, i64(1)], {"inverse": 1, "onesided": 1}, const=(2,), want=[want[..., None].astype(np.float32)], rtol=1e-4, atol=1e-4)


def test_stft():
    check_op("STFT", [fl(2, 40, 1), i64(5), np.hanning(16).astype(np.float32), i64(16)], const=(1, 3), rtol=1e-4, atol=1e-4)
    check_op("STFT", [fl(2, 40, 1), i64(5), None, i64(11)], {"onesided": 0}, const=(1, 3), rtol=1e-4, atol=1e-4)
    check_op("STFT", [fl(2, 40), i64(5), np.hanning(16).astype(np.float32), i64(16)], const=(1, 3), rtol=1e-4, atol=1e-4)


def test_mel_weights():
    check_op("MelWeightMatrix", [i64(12), i64(64), i64(16000), np.float32(20), np.float32(7000)], const=(0, 1, 2, 3, 4), oracle="onnx")


@pytest.mark.parametrize("n", [1, 2, 5])
def test_det(n):
    check_op("Det", [fl(3, 2, n, n)], rtol=1e-4, atol=1e-5)
    singular = np.ones((4, n + 1, n + 1), np.float32)
    check_op("Det", [singular])


def test_classical():
    check_op("ai.onnx.ml::ArrayFeatureExtractor", [fl(3, 7), np.array([0, 6, 2], np.int64)], symbolic=("",))
    check_op("ai.onnx.ml::Binarizer", [fl(3, 4)], {"threshold": 0.2})
    check_op("ai.onnx.ml::Scaler", [fl(3, 4)], {"offset": (1.0, 2.0, 3.0, 4.0), "scale": (0.5, 1.0, 2.0, 3.0)})
    for norm in ("MAX", "L1", "L2"):
        check_op("ai.onnx.ml::Normalizer", [np.abs(fl(3, 4))], {"norm": norm})
