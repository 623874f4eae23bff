"""Group-sparse products: every block, width and form against numpy in f64, the split into tasks, the stream, and bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.build_graph import compile_graph
from luthier.codegen.targets.target import parse_target
from luthier.errors import LuthierError, ShapeError, TypeMismatch
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.expr import var
from luthier.ir.graph import Graph
from luthier.ir.interpret.programs import run_program
from luthier.ir.ops.sparse_matmul import BlockSparse, quantize_blocks
from luthier.pipeline import compile_program
from luthier.schedules.lowbit.sparse_pattern import BUNDLE_WORK, split_tasks

Array = np.ndarray[Any, Any]
FIXED, EXACT = 1e-8, 1e-10  # NMSE against f64 with the rounded activations: scales of 14 bits, f32 sums


def nmse(y: Array, r: Array) -> float:
    return float(((y - r) ** 2).sum() / max(float((r**2).sum()), 1e-30))


def rounded(x: Array, levels: int) -> Array:
    """The activations that the operator states, f64."""
    top = np.abs(x).max(-1, keepdims=True)
    inverse = np.divide(np.float32(levels), top, out=np.zeros_like(top), where=top > 0)
    return np.rint(x * inverse).astype(np.float64) * (top.astype(np.float64) / levels) if levels else x.astype(np.float64)


def agrees(y: Array, x: Array, w: BlockSparse, levels: int = 2047) -> bool:
    return nmse(y, rounded(x, levels) @ w.dense().astype(np.float64).T) < (FIXED if 0 < levels <= 2047 and w.bits == 4 else EXACT)


def random_blocks(n: int, k: int, block: int, bits: int, density: float, rng: np.random.Generator, zeros: bool = False, scale: Any = np.float16) -> BlockSparse:
    keep = rng.random((n, -(-k // block))) < density
    kept = int(keep.sum())
    ptr = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)
    values = rng.integers(0, 1 << bits, (kept, block), dtype=np.uint8)
    z = rng.integers(0, 1 << bits, kept, dtype=np.uint8) if zeros else None
    return BlockSparse(n, k, block, bits, ptr, np.nonzero(keep)[1].astype(np.int32), values, rng.uniform(0.5, 1.5, kept).astype(scale), z, 1 << (bits - 1))


def sparse_graph(w: BlockSparse, rows: Any, levels: int = 2047, bias: Array | None = None, relu: bool = False) -> Graph:
    b = GraphBuilder("product")
    x = b.input("x", f32, [rows, w.columns])
    ins = [None if a is None else b.const("w", a) for a in w.arrays()]
    y = b.op("luthier::SparseMatMul", x, *ins, *([b.const("bias", bias)] if bias is not None else []), **w.attrs(levels))
    b.output("y", b.op("Relu", y) if relu else y)
    return b.graph()


def check(w: BlockSparse, rows: int, rng: np.random.Generator, target: str = "cpu", threads: int = 1, levels: int = 2047) -> Any:
    module = compile_graph(sparse_graph(w, rows, levels), target, threads=threads)
    x = rng.standard_normal((rows, w.columns)).astype(np.float32)
    assert agrees(module(x)[0], x, w, levels)
    return module


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("levels", [2047, 8191])
def test_every_block_and_width(block: int, bits: int, rows: int, levels: int) -> None:
    rng = np.random.default_rng(block + bits)
    module = check(random_blocks(70, 192, block, bits, 0.5, rng), rows, rng, levels=levels)
    assert any(name.endswith("blocks") for name in module.manifest["kernels"]), "the template took it"


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [np.float16, np.float32])
@pytest.mark.parametrize("rows", [1, 3])
def test_zero_points_and_scales(zeros: bool, bits: int, scale: Any, rows: int) -> None:
    rng = np.random.default_rng(bits)
    for block in (8, 16, 32):
        check(random_blocks(33, 160, block, bits, 0.6, rng, zeros, scale), rows, rng)


@pytest.mark.parametrize("target", ["cpu:x86-64-v2", "cpu:x86-64-v4", "wasm"])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_targets(target: str, bits: int) -> None:
    rng = np.random.default_rng(0)
    for block in (8, 16, 32):
        w = random_blocks(40, 128, block, bits, 0.5, rng)
        if target.startswith("cpu") and parse_target(target).missing_here():
            compile_graph(sparse_graph(w, 2), target, threads=1)  # compiled, cannot run here
        else:
            check(w, 1, rng, target)
            check(w, 3, rng, target)
            check(w, 1, rng, target, levels=8191)


@pytest.mark.parametrize("levels", [0, 8191, 2047, 127])
def test_interpreter_and_reference_agree(levels: int) -> None:
    rng = np.random.default_rng(1)
    w = random_blocks(12, 72, 16, 4, 0.5, rng)  # the last block of a row is half a block
    bias = rng.standard_normal(12).astype(np.float32)
    graph = sparse_graph(w, 3, levels, bias)
    x = rng.standard_normal((3, 72)).astype(np.float32)
    from luthier.ir.op import lookup

    node = graph.nodes[0]
    (want,) = lookup(node.op).reference(node, x, *(None if v is None else v.data for v in node.inputs[1:]))  # type: ignore[union-attr]
    got = run_program(compile_program(graph, parse_target("cpu").caps), {"x": x})["y"]
    (native,) = compile_graph(sparse_graph(w, 3, levels, bias), threads=1)(x)
    # f32 sums; with 12-bit activations scales become multiples of 1/16383 of the row's largest: half a step of each block's sum
    codes = replace(w, scales=np.ones(len(w.cols), np.float16)).dense()
    step = np.abs(x) @ np.abs(codes).T * float(w.scales.max()) / 16383 / 2 if 0 < levels <= 2047 else 0.0
    for y in (got, native):
        assert (np.abs(y - want) <= 2e-5 * (1 + np.abs(want)) + step).all()
    exact = x.astype(np.float64) @ w.dense().astype(np.float64).T + bias
    assert nmse(want, exact) < (1e-12 if not levels else 2e-2 / levels)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([8, 16, 32]), st.sampled_from([4, 8]), st.integers(1, 90), st.integers(1, 300), st.sampled_from([0.0, 0.03, 0.3, 0.9, 1.0]),
    st.integers(1, 7), st.booleans(), st.sampled_from([0, 2047, 8191]), st.integers(0, 1 << 16),
)  # fmt: skip
def test_random_products(block: int, bits: int, n: int, k: int, density: float, rows: int, zeros: bool, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check(random_blocks(n, k, block, bits, density, rng, zeros), rows, rng, levels=levels)


def test_no_blocks_at_all_and_empty_rows() -> None:
    rng = np.random.default_rng(0)
    w = random_blocks(20, 64, 16, 4, 0.0, rng)
    bias = np.arange(20, dtype=np.float32)
    for rows in (1, 4):
        x = rng.standard_normal((rows, 64)).astype(np.float32)
        np.testing.assert_array_equal(compile_graph(sparse_graph(w, rows, bias=bias), threads=1)(x)[0], np.broadcast_to(bias, (rows, 20)))
        assert not compile_graph(sparse_graph(w, rows), threads=1)(x)[0].any()
    keep = np.zeros((2000, 16), bool)
    keep[::97] = True
    check(quantize_blocks(rng.standard_normal((2000, 256)).astype(np.float32), keep, 16, 4), 1, rng, threads=2)


@pytest.mark.parametrize("rows", [1, 3])
def test_all_blocks_in_few_rows_are_split_between_tasks(rows: int) -> None:
    """One row longer than a task: several tasks sum parts of it; the result does not depend on the number of threads."""
    rng = np.random.default_rng(0)
    keep = np.zeros((64, 4096), bool)
    keep[5] = keep[17] = True
    w = quantize_blocks(rng.standard_normal((64, 65536)).astype(np.float32), keep, 16, 4)
    x = rng.standard_normal((rows, 65536)).astype(np.float32)
    one, two = (compile_graph(sparse_graph(w, rows), threads=t) for t in (1, 2))
    assert any(name.endswith("fixup") for name in one.manifest["kernels"])
    np.testing.assert_array_equal(one(x)[0], two(x)[0])
    assert agrees(one(x)[0], x, w)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_tasks_cover_every_step_once_in_equal_shares(lengths: list[int], tasks: int) -> None:
    steps = np.concatenate([[0], np.cumsum(lengths)])
    t = split_tasks(steps, tasks)
    assert t.starts[0] == 0 and t.starts[-1] == steps[-1] and (np.diff(t.starts) >= 0).all()
    seen = np.zeros(int(steps[-1]), int)
    begun = np.zeros(len(lengths), int)
    work = (steps[-1] + BUNDLE_WORK * len(lengths)) / tasks
    for i in range(tasks):
        for r in range(t.first[i], t.last[i]):
            lo, hi = max(steps[r], t.starts[i]), min(steps[r + 1], t.starts[i + 1])
            seen[lo:hi] += 1
            if steps[r] >= t.starts[i]:
                begun[r] += 1
            else:
                assert t.continued[i] == r
        assert t.starts[i + 1] - t.starts[i] <= work + BUNDLE_WORK + 1
    assert (seen == 1).all() and (begun == 1).all()


def test_run_time_number_of_rows_and_epilogue() -> None:
    rng = np.random.default_rng(0)
    w = random_blocks(48, 128, 16, 4, 0.5, rng)
    bias = rng.standard_normal(48).astype(np.float32)
    module = compile_graph(sparse_graph(w, var("rows", lo=1), bias=bias, relu=True), threads=2)
    for rows in (1, 3, 4, 9):
        x = rng.standard_normal((rows, 128)).astype(np.float32)
        assert nmse(module(x)[0], np.maximum(rounded(x, 2047) @ w.dense().astype(np.float64).T + bias, 0)) < FIXED


@pytest.mark.parametrize("zeros", [False, True])
def test_dense_form_where_most_is_kept(zeros: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 256)).astype(np.float32)
    bias = rng.standard_normal(64).astype(np.float32)
    for density, allowed, dense in ((0.95, 32, True), (0.95, 0, False), (0.5, 32, False)):
        w = random_blocks(64, 256, 16, 4, density, rng, zeros)
        b = GraphBuilder("product")
        v = b.input("x", f32, [2, 256])
        ins = [None if a is None else b.const("w", a) for a in w.arrays()]
        b.output("y", b.op("luthier::SparseMatMul", v, *ins, b.const("bias", bias), **w.attrs(2047, allowed)))
        module = compile_graph(b.graph(), threads=1)
        assert any("groupedmatmul" in name for name in module.manifest["kernels"]) == dense
        assert nmse(module(x)[0], x.astype(np.float64) @ w.dense().astype(np.float64).T + bias) < (5e-4 if dense else 1e-6)


def test_layers_of_equal_shape_have_their_own_blocks() -> None:
    """Two layers whose constants have the same shapes but another structure."""
    rng = np.random.default_rng(0)
    keep = rng.permuted(np.tile(np.arange(8) % 2 == 0, (64, 1)), axis=1)
    first = quantize_blocks(rng.standard_normal((64, 128)).astype(np.float32), keep, 16, 4)
    second = quantize_blocks(rng.standard_normal((64, 128)).astype(np.float32), rng.permuted(keep.reshape(-1)).reshape(keep.shape), 16, 4)
    b = GraphBuilder("two")
    x = b.input("x", f32, [1, 128])
    for i, w in enumerate((first, second)):
        b.output(f"y{i}", b.op("luthier::SparseMatMul", x, *[None if a is None else b.const("w", a) for a in w.arrays()], **w.attrs()))
    v = rng.standard_normal((1, 128)).astype(np.float32)
    for y, w in zip(compile_graph(b.graph(), threads=1)(v), (first, second), strict=True):
        assert agrees(y, v, w)


def test_activations_of_zero_and_of_one_large_value() -> None:
    rng = np.random.default_rng(0)
    w = random_blocks(32, 256, 16, 4, 0.5, rng)
    module = compile_graph(sparse_graph(w, 1), threads=1)
    x = np.zeros((1, 256), np.float32)
    assert not module(x)[0].any()
    x[0, 77] = 1e6
    assert agrees(module(x)[0], x, w)
    extreme = replace(w, values=np.where(rng.random(w.values.shape) < 0.5, 0, 15).astype(np.uint8))
    full = np.where(extreme.dense() > 0, 1.0, -1.0)[0].astype(np.float32)[None]  # sums as large as they can be
    for levels in (2047, 8191):
        assert agrees(compile_graph(sparse_graph(extreme, 1, levels), threads=1)(full)[0], full, extreme, levels)


def test_accuracy_on_normal_activations() -> None:
    rng = np.random.default_rng(0)
    w = random_blocks(512, 1024, 16, 4, 0.5, rng)
    x = rng.standard_normal((4, 1024)).astype(np.float32)
    exact = x.astype(np.float64) @ w.dense().astype(np.float64).T
    for levels, bound in ((2047, 1e-6), (8191, 1e-7)):  # as the template states
        assert nmse(compile_graph(sparse_graph(w, 4, levels), threads=1)(x)[0], exact) < bound


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"cols": lambda c: c[[1, 0, *range(2, 24)]]}, ShapeError, "cols of row 0 must rise: 1 is followed by 0"),
        ({"cols": lambda c: np.where(np.arange(24) == 7, 4, c).astype(np.int32)}, ShapeError, r"cols must lie in 0..3; found 4"),
        ({"cols": lambda c: np.where(np.arange(24) == 4, -1, c).astype(np.int32)}, ShapeError, r"cols must lie in 0..3; found -1"),
        ({"row_ptr": lambda p: p + 1}, ShapeError, "row_ptr must rise from 0 to the number of blocks, 24"),
        ({"row_ptr": lambda p: np.array([0, 8, 4, 12, 16, 20, 24], np.int32)}, ShapeError, "falls in between"),
        ({"scales": lambda s: np.where(np.arange(24) == 3, np.nan, s).astype(np.float16)}, TypeMismatch, "the scale of block 3 is not finite"),
        ({"values": lambda v: v[:-1]}, ShapeError, "24 blocks need values"),
    ],
)
def test_bad_blocks(change: dict[str, Any], kind: type[LuthierError], message: str) -> None:
    w = random_blocks(6, 64, 16, 4, 1.0, np.random.default_rng(0))
    bad = replace(w, **{name: fn(getattr(w, name)) for name, fn in change.items()})
    with pytest.raises(kind, match=message):
        sparse_graph(bad, 1)


def test_bad_attributes() -> None:
    w = random_blocks(6, 64, 16, 4, 1.0, np.random.default_rng(0))
    b = GraphBuilder("bad")
    x = b.input("x", f32, [1, 64])
    ins = [None if a is None else b.const("w", a) for a in w.arrays()]
    for attrs, message in (({"block": 12}, "blocks of 12"), ({"bits": 3}, "of 3 bits"), ({"act_levels": 9000}, "act_levels = 9000")):
        with pytest.raises(TypeMismatch, match=message):
            b.op("luthier::SparseMatMul", x, *ins, **{**w.attrs(), **attrs})
    with pytest.raises(ShapeError, match="must be K = 80"):
        b.op("luthier::SparseMatMul", x, *ins, **{**w.attrs(), "K": 80})
    ptr = b.input("ptr", f32, [7])
    with pytest.raises(TypeMismatch, match="must be a constant"):
        b.op("luthier::SparseMatMul", x, ptr, *ins[1:], **w.attrs())
    with pytest.raises(ValueError, match="keep must be"):
        quantize_blocks(np.zeros((4, 64), np.float32), np.ones((4, 5), bool), 16, 4)


@pytest.mark.parametrize(("block", "k"), [(8, 96), (16, 96), (32, 96), (16, 72), (32, 80)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_saved_as_onnx_for_other_runtimes(block: int, k: int, bits: int, zeros: bool) -> None:
    """Dropped blocks are zeros of a dense product that onnxruntime runs; ``form="luthier"`` keeps what is stored."""
    import onnxruntime

    from luthier.importers.onnx.importer import import_onnx
    from luthier.quantization.export_onnx import export_onnx

    rng = np.random.default_rng(block + k)
    w = random_blocks(24, k, block, bits, 0.5, rng, zeros)
    bias = rng.standard_normal(24).astype(np.float32)
    x = rng.standard_normal((3, k)).astype(np.float32)
    want = x.astype(np.float64) @ w.dense().astype(np.float64).T + bias
    model = export_onnx(sparse_graph(w, 3, 0, bias))
    assert all(n.domain in ("", "com.microsoft") for n in model.graph.node)
    (got,) = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert nmse(got, want) < 1e-10
    own = export_onnx(sparse_graph(w, 3, 0, bias), "luthier")
    graph = import_onnx(own)
    (node,) = (n for n in graph.nodes if n.op == "luthier::SparseMatMul")
    np.testing.assert_array_equal(node.inputs[2].data, w.cols)  # type: ignore[union-attr]
    assert nmse(compile_graph(graph, threads=1)(x)[0], want) < 1e-10
