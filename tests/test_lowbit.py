"""Products with grouped low-bit weights: every width, group and form against numpy, and the templates that must take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.build_graph import compile_graph
from luthier.codegen.targets.target import parse_target
from luthier.errors import LuthierError, TypeMismatch
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.expr import var
from luthier.ir.graph import Graph
from luthier.ir.ops.lowbit import pack_bits, unpack_bits
from luthier.ir.ops.lowbit_matmul import pack_trits, unpack_trits
from luthier.schedules.intrin.byte_vectors import FEATURE
from luthier.schedules.lowbit.lut_gemv import pack_triples, patterns, triple_bytes, triples
from luthier.schedules.lowbit.packed_layout import pack_words, pieces

Array = np.ndarray[Any, Any]
BYTES = {FEATURE, "pmaddwd"} <= parse_target("cpu").caps.features
ROUNDED, EXACT = 5e-4, 1e-10  # NMSE that the templates state


def nmse(y: Array, r: Array) -> float:
    return float(((y - r) ** 2).sum() / (r**2).sum())


def product(
    n: int, k: int, group: int, bits: int, act: int, rows: Any, rng: np.random.Generator, form: str = "symmetric", scale: Any = np.float16,
) -> tuple[Graph, Array]:
    """(a graph of one product, its weights in f64)."""
    q = rng.integers(0, 3 if bits == 0 else 1 << bits, (n, k)).astype(np.uint8)
    s = rng.uniform(0.5, 1.5, (n, k // group)).astype(scale)
    b = GraphBuilder("product")
    x = b.input("x", f32, [rows, k])
    ins = [x, b.const("w", pack_bits(q, bits) if bits else pack_trits(q)), b.const("s", s)]
    attrs: dict[str, Any] = {"K": k, "bits": bits, "group": group, "act_group": act}
    wide = np.repeat(s.astype(np.float64), group, 1)
    if form == "symmetric":
        zero = 1 if bits == 0 else 1 << (bits - 1)
        attrs["zero"] = zero
        w = (q - float(zero)) * wide
    elif form == "zeros":
        z = rng.integers(0, max(2, 1 << bits), (n, k // group)).astype(np.uint8)
        ins.append(b.const("z", z))
        w = (q - np.repeat(z.astype(np.float64), group, 1)) * wide
    else:
        o = rng.standard_normal((n, k // group)).astype(scale)
        ins.append(b.const("o", o))
        attrs["offset"] = 1
        w = q * wide + np.repeat(o.astype(np.float64), group, 1)
    b.output("y", b.op("luthier::GroupedMatMul", *ins, **attrs))
    return b.graph(), w


def templates(module: Any) -> str:
    return " ".join(module.manifest["kernels"])


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("act", [32, 16, 0])
def test_every_width(bits: int, act: int) -> None:
    rng = np.random.default_rng(bits)
    graph, w = product(72, 192, 32, bits, act, 1, rng)
    x = rng.standard_normal((1, 192)).astype(np.float32)
    (y,) = compile_graph(graph, threads=1)(x)
    assert nmse(y, x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)


@pytest.mark.parametrize("target", ["cpu:x86-64-v2", "cpu:x86-64-v4"])
@pytest.mark.parametrize(("bits", "act"), [(0, 32), (1, 32), (2, 32), (3, 32), (4, 32), (8, 32), (4, 16), (8, 16), (4, 0), (8, 0)])
def test_other_vector_widths(target: str, bits: int, act: int) -> None:
    rng = np.random.default_rng(bits)
    graph, w = product(72, 192, 64, bits, act, 3, rng)
    module = compile_graph(graph, target, threads=1)
    assert templates(module).count("groupedmatmul") >= 2
    if parse_target(target).missing_here():
        return  # compiled, cannot run here
    x = rng.standard_normal((3, 192)).astype(np.float32)
    assert nmse(module(x)[0], x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)


@pytest.mark.parametrize(("form", "bits", "group", "act"), [
    (form, *case) for form in ("symmetric", "zeros", "offsets")
    for case in ((4, 16, 32), (2, 64, 64), (1, 128, 32), (3, 256, 32), (8, 32, 0), (6, 16, 32), (4, 32, 16), (3, 64, 16), (5, 128, 16))
    if form != "offsets" or case[0] != 8  # 8-bit weights with offsets are signed ones with a zero point in every format that is read
])
def test_zero_points_and_offsets(form: str, bits: int, group: int, act: int) -> None:
    rng = np.random.default_rng(bits)
    graph, w = product(40, 512, group, bits, act, 5, rng, form)
    x = rng.standard_normal((5, 512)).astype(np.float32)
    (y,) = compile_graph(graph, threads=2)(x)
    assert nmse(y, x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)


@pytest.mark.parametrize("bits", [0, 1, 4])
def test_run_time_number_of_rows(bits: int) -> None:
    rng = np.random.default_rng(0)
    graph, w = product(64, 256, 64, bits, 32, var("rows", lo=1), rng)
    module = compile_graph(graph, threads=2)
    for rows in (1, 3, 4, 9):
        x = rng.standard_normal((rows, 256)).astype(np.float32)
        assert nmse(module(x)[0], x.astype(np.float64) @ w.T) < ROUNDED


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8]), st.sampled_from([16, 32, 64, 128, 256]), st.integers(1, 3), st.integers(8, 75),
    st.integers(1, 6), st.sampled_from([np.float16, np.float32]), st.sampled_from([0, 16, 32]), st.integers(0, 1 << 16),
)  # fmt: skip
def test_random_products(bits: int, group: int, blocks: int, n: int, rows: int, scale: Any, act: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = max(group * blocks, 32)
    act = act if k % 32 == 0 else 0
    graph, w = product(n, k, group, bits, act, rows, rng, "symmetric", scale)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    (y,) = compile_graph(graph, threads=1)(x)
    assert nmse(y, x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)


def test_activations_of_zero_and_of_one_large_value() -> None:
    rng = np.random.default_rng(0)
    for bits in (0, 1, 4):
        graph, w = product(32, 256, 64, bits, 32, 1, rng)
        module = compile_graph(graph, threads=1)
        assert not module(np.zeros((1, 256), np.float32))[0].any()
        x = np.zeros((1, 256), np.float32)
        x[0, 77] = 1000
        assert nmse(module(x)[0], x.astype(np.float64) @ w.T) < ROUNDED


@pytest.mark.parametrize(("bits", "block", "level"), [(4, 32, 4), (4, 128, 0), (2, 64, 4), (8, 32, 4)])
def test_matmul_nbits_beside_onnxruntime(bits: int, block: int, level: int) -> None:
    import onnxruntime as ort

    rng = np.random.default_rng(bits)
    n, k = 96, 256
    q = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    s = rng.uniform(0.5, 1.5, (n, k // block)).astype(np.float32)
    inits = [numpy_helper.from_array(pack_bits(q.reshape(n, k // block, block), bits), "b"), numpy_helper.from_array(s, "s")]
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block, accuracy_level=level)
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, d]) for name, d in (("x", k), ("y", n))]
    model = helper.make_model(helper.make_graph([node], "g", io[:1], io[1:], inits), opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    x = rng.standard_normal((3, k)).astype(np.float32)
    exact = x.astype(np.float64) @ ((q - float(1 << (bits - 1))) * np.repeat(s, block, 1)).T
    theirs = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    module = luthier.compile(model, threads=1)
    ours = module.run({"x": x})["y"]
    assert nmse(theirs, exact) < 1e-3
    assert nmse(ours, exact) < (ROUNDED if level == 4 else EXACT)


@pytest.mark.skipif(not BYTES, reason="the templates need byte instructions")
def test_the_templates_take_them() -> None:
    rng = np.random.default_rng(0)
    for bits, want in ((4, "_act"), (1, "_tables"), (0, "_tables"), (3, "_act")):
        graph, _ = product(64, 256, 64, bits, 32, 1, rng)
        assert want in templates(compile_graph(graph, threads=1))


def test_words_hold_every_bit_once() -> None:
    rng = np.random.default_rng(0)
    for bits in (1, 2, 3, 4, 5, 6, 8):
        u = rng.integers(0, 1 << bits, (32, 64)).astype(np.uint8)
        words = pack_words(bits, 8)(u).view(np.uint8).reshape(4, 2, bits, 8, 4)
        back = np.zeros((4, 2, 8, 8, 4), np.uint8)
        for c in pieces(bits):
            back[:, :, c.quad] |= ((words[:, :, c.word] >> c.shift) & ((1 << c.count) - 1)) << c.low
        assert np.array_equal(back.transpose(0, 3, 1, 2, 4).reshape(32, 64), u)


@pytest.mark.parametrize("flush", [32, 64, 256])
def test_ternary_triples_hold_every_value(flush: int) -> None:
    rng = np.random.default_rng(0)
    u = rng.integers(0, 3, (32, flush)).astype(np.uint8)
    order = triple_bytes(triples(flush))
    raw = pack_triples(flush, 32)(u).view(np.uint8).reshape(len(order), 32)
    rows = np.empty(32, int)
    rows[0::2], rows[1::2] = np.arange(16), np.arange(16, 32)
    table, at = patterns(True), {x: i for i, x in enumerate(order)}
    for t in range(triples(flush)):
        entry = table[(raw[at["pattern", t - t % 2]] >> (4 * (t % 2))) & 15]
        signs = raw[at["sign", t - t % 7]]
        assert (signs & 1).all()  # a shifted byte is never zero
        sign = 1 - 2 * ((signs >> (7 - t % 7)) & 1).astype(int)
        want = np.ones((32, 3), int)
        cols = u[rows][:, t * 3 : t * 3 + 3]
        want[:, : cols.shape[1]] = cols
        assert np.array_equal(entry * sign[:, None], want - 1)


def test_ternary_rounding_is_below_that_of_bytes_in_groups_of_256() -> None:
    """The error of a ternary product against that of activations rounded to 8 bits with a step for 256 columns."""
    rng = np.random.default_rng(0)
    graph, w = product(256, 4096, 256, 0, 32, 1, rng)
    x = rng.standard_normal((1, 4096)).astype(np.float32)
    step = np.abs(x.reshape(-1, 256)).max(1, keepdims=True) / 127
    rounded = (np.rint(x.reshape(-1, 256) / step) * step).reshape(1, 4096)
    exact = x.astype(np.float64) @ w.T
    assert nmse(compile_graph(graph, threads=1)(x)[0], exact) < nmse(rounded @ w.T, exact)


def test_streams_of_bits_and_trits() -> None:
    rng = np.random.default_rng(0)
    for bits in range(1, 9):
        if bits == 7:
            continue
        v = rng.integers(0, 1 << bits, (3, 40)).astype(np.uint8)
        assert np.array_equal(unpack_bits(pack_bits(v, bits), bits)[..., :40], v)
        assert pack_bits(v, bits).shape[-1] == -(-40 * bits // 8)
    v = rng.integers(0, 3, (3, 42)).astype(np.uint8)
    assert np.array_equal(unpack_trits(pack_trits(v), 42), v)
    assert pack_trits(v).shape[-1] == 9


def test_bad_groups_and_scales() -> None:
    with pytest.raises(TypeMismatch, match="groups of 48"):
        b = GraphBuilder("bad")
        b.op("luthier::GroupedMatMul", b.input("x", f32, [1, 128]), b.const("w", np.zeros((8, 64), np.uint8)), b.const("s", np.ones((8, 2), np.float32)), K=128, bits=4, group=48, act_group=0)
    with pytest.raises(TypeMismatch, match="weights of 7 bits"):
        b = GraphBuilder("bad")
        b.op("luthier::GroupedMatMul", b.input("x", f32, [1, 32]), b.const("w", np.zeros((8, 28), np.uint8)), b.const("s", np.ones((8, 1), np.float32)), K=32, bits=7, group=32, act_group=0)
    b = GraphBuilder("nan")
    s = np.ones((32, 2), np.float32)
    s[3, 1] = np.nan
    b.output("y", b.op("luthier::GroupedMatMul", b.input("x", f32, [1, 64]), b.const("w", np.zeros((32, 32), np.uint8)), b.const("s", s), K=64, bits=4, group=32, act_group=32, zero=8))
    if BYTES:
        with pytest.raises(LuthierError, match="not finite"):
            compile_graph(b.graph(), threads=1)
