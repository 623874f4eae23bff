"""Weights of which two in four are kept: storage, kernels against numpy in f64, the dense form, pruning, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.build_graph import compile_graph
from luthier.codegen.targets.target import parse_target
from luthier.errors import ShapeError, TypeMismatch
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.expr import var
from luthier.ir.graph import Graph
from luthier.ir.interpret.programs import run_program
from luthier.ir.ops.two_of_four import TwoOfFour, pack_two_of_four, unpack_two_of_four
from luthier.passes.quantize.prune_two_of_four import prune_two_of_four
from luthier.pipeline import compile_program

Array = np.ndarray[Any, Any]


def nmse(y: Array, r: Array) -> float:
    return float(((y - r) ** 2).sum() / max(float((r**2).sum()), 1e-30))


def random_weights(n: int, k: int, bits: int, group: int, rng: np.random.Generator, lowest: bool = False) -> TwoOfFour:
    top = (1 << (bits - 1)) - 1
    v = rng.integers(-top - lowest, top + 1, (n, k)).astype(np.int32)
    keep = rng.permuted(np.tile(np.arange(4) < 2, (n * k // 4, 1)), axis=1).reshape(n, k)
    return TwoOfFour(np.where(keep, v, 0).astype(np.int16), rng.uniform(0.5, 1.5, (n, k // group)).astype(np.float16), bits, group)


def rounded(x: Array, act: int) -> Array:
    """The activations that the operator states, f64."""
    if not act:
        return x.astype(np.float64)
    g = x.reshape(len(x), -1, act)
    top = np.abs(g).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    return (np.rint(g * inverse).astype(np.float64) * (top.astype(np.float64) / 127)).reshape(x.shape)


def product_graph(w: TwoOfFour, rows: Any, act: int, bias: Array | None = None) -> Graph:
    b = GraphBuilder("product")
    x = b.input("x", f32, [rows, w.values.shape[1]])
    y = b.op("luthier::TwoOfFourMatMul", x, *[b.const("w", a) for a in w.arrays()], *([] if bias is None else [b.const("bias", bias)]), **w.attrs(act))
    b.output("y", y)
    return b.graph()


def check(w: TwoOfFour, rows: int, rng: np.random.Generator, act: int = 32, target: str = "cpu", threads: int = 1) -> Any:
    bias = rng.standard_normal(len(w.values)).astype(np.float32)
    module = compile_graph(product_graph(w, rows, act, bias), target, threads=threads)
    x = rng.standard_normal((rows, w.values.shape[1])).astype(np.float32)
    assert nmse(module(x)[0], rounded(x, act) @ w.dense().astype(np.float64).T + bias) < 1e-10  # f32 sums
    return module


def templates(w: TwoOfFour, rows: int, act: int, target: str = "cpu") -> set[str]:
    program = compile_program(product_graph(w, rows, act), parse_target(target).caps)
    return {str(f.attrs.get("template")) for f in program.kernels.values()}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([4, 8]), st.integers(0, 999))
def test_what_is_stored_comes_back(n: int, units: int, bits: int, seed: int) -> None:
    w = random_weights(n, 8 * units, bits, 8, np.random.default_rng(seed), lowest=True)
    raw = pack_two_of_four(w.values, bits)
    assert raw.shape == (n, units * (bits // 2 + 1))
    np.testing.assert_array_equal(unpack_two_of_four(raw, 8 * units, bits), w.values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("group", "act"), [(16, 16), (32, 32), (64, 32), (64, 0), (128, 64)])
def test_every_width_and_group(bits: int, rows: int, group: int, act: int) -> None:
    rng = np.random.default_rng(group + rows)
    check(random_weights(70, 256, bits, group, rng), rows, rng, act)


def test_the_template_takes_what_fits_and_the_dense_one_the_rest() -> None:
    rng = np.random.default_rng(0)
    assert "two_of_four" in templates(random_weights(64, 256, 4, 32, rng), 1, 32)
    assert "two_of_four" not in templates(random_weights(64, 256, 4, 32, rng), 1, 0), "exact activations"
    lowest = random_weights(64, 256, 4, 32, rng, lowest=True)
    assert lowest.values.min() == -8 and "quantized_gemv" in templates(lowest, 1, 32)
    check(lowest, 3, rng)


@pytest.mark.parametrize("target", ["cpu:x86-64-v2", "cpu:x86-64-v4", "cpu:alderlake", "wasm", "wasm:simd"])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_targets(target: str, bits: int) -> None:
    rng = np.random.default_rng(0)
    w = random_weights(40, 128, bits, 32, rng)
    if target.startswith("cpu") and parse_target(target).missing_here():
        compile_graph(product_graph(w, 2, 32), target, threads=1)  # compiled, cannot run here
    else:
        check(w, 1, rng, target=target)
        check(w, 3, rng, target=target)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([4, 8]), st.integers(1, 90), st.integers(1, 9), st.sampled_from([8, 16, 32]), st.integers(1, 5), st.sampled_from([0, 16, 32]), st.integers(0, 999))
def test_random_products(bits: int, n: int, groups: int, group: int, rows: int, act: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check(random_weights(n, 32 * groups, bits, group, rng), rows, rng, act, threads=2)


def test_interpreter_and_reference_agree() -> None:
    from luthier.ir.op import lookup

    rng = np.random.default_rng(1)
    w = random_weights(12, 64, 4, 16, rng)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    graph = product_graph(w, 3, 0)
    node = graph.nodes[0]
    (want,) = lookup(node.op).reference(node, x, *(v.data for v in node.inputs[1:]))  # type: ignore[union-attr]
    got = run_program(compile_program(graph, parse_target("cpu").caps), {"x": x})["y"]
    np.testing.assert_allclose(want, x.astype(np.float64) @ w.dense().astype(np.float64).T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_run_time_number_of_rows_and_largest_sums() -> None:
    rng = np.random.default_rng(0)
    for bits in (4, 8):
        w = random_weights(48, 128, bits, 32, rng)
        top = (1 << (bits - 1)) - 1
        w = TwoOfFour((np.sign(w.values) * top).astype(np.int16), w.scales, bits, 32)
        module = compile_graph(product_graph(w, var("rows", lo=1), 32), threads=1)
        for rows in (1, 3, 8):
            x = np.broadcast_to(np.sign(w.values[0]) * 127.0, (rows, 128)).astype(np.float32)
            assert nmse(module(x)[0], x.astype(np.float64) @ w.dense().astype(np.float64).T) < 1e-10


def test_bad_input() -> None:
    rng = np.random.default_rng(0)
    w = random_weights(8, 64, 4, 16, rng)
    with pytest.raises(ValueError, match="more than two of four"):
        pack_two_of_four(np.ones((4, 8), np.int32), 4)
    with pytest.raises(ValueError, match="must fit 4 or 8 bits"):
        pack_two_of_four(np.full((4, 8), 9) * (np.arange(8) % 2), 4)
    b = GraphBuilder("bad")
    x = b.input("x", f32, [1, 64])
    ins = [b.const("w", a) for a in w.arrays()]
    for attrs, kind, message in (
        ({"bits": 2}, TypeMismatch, "of 2 bits"), ({"group": 24}, TypeMismatch, "must divide the 64 columns"), ({"K": 128}, ShapeError, "must be K = 128"),
        ({"bits": 8}, ShapeError, "input 1 must have 40 columns"), ({"group": 32}, ShapeError, "input 2 must have 2 columns"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            b.op("luthier::TwoOfFourMatMul", x, *ins, **{**w.attrs(), **attrs})


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 16), (4, 8)])
def test_saved_as_onnx_for_other_runtimes(bits: int, group: int) -> None:
    import onnxruntime

    from luthier.quantization.export_onnx import export_onnx

    rng = np.random.default_rng(bits)
    w = random_weights(24, 96, bits, group, rng)
    bias, x = rng.standard_normal(24).astype(np.float32), rng.standard_normal((3, 96)).astype(np.float32)
    model = export_onnx(product_graph(w, 3, 0, bias))
    (got,) = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert nmse(got, x.astype(np.float64) @ w.dense().astype(np.float64).T + bias) < 1e-10


def test_the_most_salient_two_are_kept_and_compensation_gains() -> None:
    rng = np.random.default_rng(0)
    moments = rng.uniform(0.1, 9, 64)
    weight = rng.standard_normal((40, 64)).astype(np.float32)
    w = prune_two_of_four(weight, 8, moments=moments)
    score = (np.square(weight) * moments).reshape(40, 16, 4)
    dropped = w.values.reshape(40, 16, 4) == 0
    assert (dropped.sum(-1) == 2).all()
    assert (np.where(dropped, score, 0).max(-1) <= np.where(dropped, np.inf, score).min(-1)).all()
    kept = w.values != 0
    step = np.repeat(w.scales.astype(np.float32), 32, 1)
    assert (np.abs(w.dense() - weight)[kept] <= np.maximum(0.5001 * step, 0.3 * np.abs(weight))[kept]).all()
    x = rng.standard_normal((500, 16)) @ rng.standard_normal((16, 64)) + 0.3 * rng.standard_normal((500, 64))
    hessian = x.T @ x
    errors = [nmse(x @ prune_two_of_four(weight, 4, hessian=hessian, method=m).dense().T, x @ weight.T) for m in ("nearest", "compensate")]
    assert errors[1] < 0.7 * errors[0]


def test_a_model_is_pruned_compiled_and_saved(tmp_path: Any) -> None:
    import onnxruntime

    from luthier.errors import QuantizationError
    from luthier.quantization.sparsify import sparsify

    rng = np.random.default_rng(0)
    b = GraphBuilder("mlp")
    v = b.input("x", f32, [4, 64])
    for i in range(2):
        w = (rng.standard_normal((64, 64)) / 8).astype(np.float32)
        v = b.op("Tanh", b.op("Gemm", v, b.const("w", w), b.const("c", rng.standard_normal(64).astype(np.float32)), name=f"product{i}"))
    b.output("y", v)
    graph = b.graph()
    data = [{"x": rng.standard_normal((4, 64)).astype(np.float32)} for _ in range(8)]
    small = sparsify(graph, calibration=data, pattern="2:4", act_levels=0)
    assert [n.op for n in small.graph.nodes].count("luthier::TwoOfFourMatMul") == 2
    (y,) = small.compile(threads=1)(data[0]["x"])
    session = onnxruntime.InferenceSession(str(small.save(tmp_path / "m.onnx")), providers=["CPUExecutionProvider"])
    assert nmse(session.run(None, data[0])[0], y) < 1e-9
    for options, message in (({"pattern": "1:4"}, "unknown pattern"), ({"pattern": "2:4", "sparsity": 0.6}, "keeps half")):
        with pytest.raises(QuantizationError, match=message):
            sparsify(graph, **options)
    with pytest.raises(QuantizationError, match="multiple of 8"):
        prune_two_of_four(np.ones((4, 12), np.float32))
