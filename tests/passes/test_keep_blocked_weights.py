"""Blocked DequantizeLinear in front of products: the same numbers as the standard's, without a copy of the weights in floats."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier

TYPES = {"i4": (TensorProto.INT4, -8, 8, ml_dtypes.int4), "u4": (TensorProto.UINT4, 0, 16, ml_dtypes.uint4), "i8": (TensorProto.INT8, -128, 128, np.int8), "u8": (TensorProto.UINT8, 0, 256, np.uint8)}


def blocked(kind: str, form: str, k: int, n: int, block: int, zero: bool, rng: np.random.Generator) -> tuple[onnx.ModelProto, np.ndarray]:
    """(model y = x @ w + b, w f64 [K, N])."""
    code, lo, hi, store = TYPES[kind]
    q = rng.integers(lo, hi, (k, n))
    s = (rng.random((-(-k // block), n)) * 0.05 + 0.01).astype(np.float32)
    z = rng.integers(lo, hi, s.shape) if zero else np.zeros(s.shape, int)
    w = (q - np.repeat(z, block, 0)[:k]) * np.repeat(s.astype(np.float64), block, 0)[:k]
    last = form in ("transposed", "gemm_t")
    turn = (lambda a: np.ascontiguousarray(a.T)) if last else (lambda a: a)

    def packed(name: str, a: np.ndarray) -> onnx.TensorProto:
        return helper.make_tensor(name, code, a.shape, a.astype(store).astype(np.int32).reshape(-1).tolist())

    inits = [packed("w", turn(q)), numpy_helper.from_array(turn(s), "s"), numpy_helper.from_array(rng.random(n).astype(np.float32), "b")]
    if zero:
        inits.append(packed("z", turn(z)))
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"] if zero else ["w", "s"], ["wf"], axis=int(last), block_size=block)]
    if form == "transposed":
        nodes.append(helper.make_node("Transpose", ["wf"], ["wt"], perm=[1, 0]))
    if form.startswith("gemm"):
        nodes.append(helper.make_node("Gemm", ["x", "wf", "b"], ["y"], transB=int(last)))
    else:
        nodes += [helper.make_node("MatMul", ["x", "wt" if last else "wf"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    io = [helper.make_tensor_value_info(v, TensorProto.FLOAT, [3, d]) for v, d in (("x", k), ("y", n))]
    return helper.make_model(helper.make_graph(nodes, "blocked", io[:1], io[1:], inits), opset_imports=[helper.make_opsetid("", 21)], ir_version=10), w


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


CASES: list[tuple[str, str, bool, int]] = [(kind, form, zero, 32) for kind in TYPES for form, zero in (("plain", False), ("gemm_t", True))]
CASES += [("i4", "transposed", True, 64), ("u4", "gemm", True, 32), *(("i4", "plain", zero, block) for zero in (False, True) for block in (16, 64, 128, 256))]


@pytest.mark.parametrize(("kind", "form", "zero", "block"), CASES)
def test_products_keep_their_bits(kind: str, form: str, zero: bool, block: int, rng: np.random.Generator) -> None:
    k, n = 256, 64  # whole vectors of any target: rows are not padded
    m, w = blocked(kind, form, k, n, block, zero, rng)
    x = rng.standard_normal((3, k)).astype(np.float32)
    module = luthier.compile(m, threads=1)
    bias = numpy_helper.to_array(m.graph.initializer[2]).astype(np.float64)
    want = x.astype(np.float64) @ w + bias
    assert np.square(module.run({"x": x})["y"] - want).sum() <= 1e-10 * np.square(want).sum()
    stored = k * n * (1 if kind.endswith("8") else 0.5)
    assert _weights_bytes(module) < stored + 5 * n * (k // block) + 4 * n + 4096 < 4 * k * n


def _weights_bytes(module: luthier.Module) -> int:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        module.save(Path(folder) / "m.luthier")
        return (Path(folder) / "m.luthier" / "weights.bin").stat().st_size


@pytest.mark.parametrize(("k", "block"), [(48, 8), (40, 16), (96, 48)])
def test_blocks_that_do_not_fit_are_still_right(k: int, block: int, rng: np.random.Generator) -> None:
    """Too short, with a rest, and not a power of two."""
    m, w = blocked("i4", "plain", k, 8, block, True, rng)
    x = rng.standard_normal((3, k)).astype(np.float32)
    want = x.astype(np.float64) @ w + numpy_helper.to_array(m.graph.initializer[2]).astype(np.float64)
    np.testing.assert_allclose(luthier.compile(m, threads=1).run({"x": x})["y"], want, rtol=1e-4, atol=1e-4)


def test_as_onnxruntime(rng: np.random.Generator) -> None:
    import onnxruntime

    m, _ = blocked("i4", "transposed", 128, 40, 32, True, rng)
    x = rng.standard_normal((3, 128)).astype(np.float32)
    want = onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(luthier.compile(m, threads=1).run({"x": x})["y"], want, rtol=1e-3, atol=1e-3)
