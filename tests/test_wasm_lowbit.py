"""Low-bit products on wasm, with and without relaxed SIMD: templates against numpy in f64, byte intrinsics and lane moves against
the interpreter's meaning of them in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.build_graph import compile_graph
from luthier.codegen.wasm.printer import legalize_wasm
from luthier.ir.dtypes import DType, f32, i8, i16, i32, u8, u16
from luthier.ir.expr import Expr, bitcast, call, cast, const, load, ramp, shuffle, var
from luthier.ir.intrin import lookup
from luthier.ir.loop import Buffer, Func, Store
from tests.test_lowbit import EXACT, ROUNDED, nmse, product, templates

pytest.importorskip("wasmtime")

Array = np.ndarray[Any, Any]
VARIANTS = ["simd", "relaxed"]


def computed(value: Expr, relaxed: bool, **inputs: Array) -> Array:
    """``value``, a vector that reads the buffers ``inputs``, by WebAssembly."""
    from luthier.codegen.wasm.run import run_wasm

    d = value.dtype
    out = Buffer("out", d.scalar, (const(d.lanes),), "param", True)
    types = {n: {"int8": i8, "uint8": u8, "int16": i16, "int32": i32}[str(a.dtype)] for n, a in inputs.items()}
    params = [Buffer(n, types[n], (const(a.size),), "param", False) for n, a in inputs.items()]
    func = Func("f", (*params, out), Store(out, (ramp(const(0), 1, d.lanes),), value))
    got = np.zeros(d.lanes, d.scalar.numpy)
    run_wasm(legalize_wasm(func), {**inputs, "out": got}, relaxed_simd=relaxed)
    return got


def vector(name: str, d: DType) -> Expr:
    return load(Buffer(name, d.scalar, (const(d.lanes),), "param", False), [ramp(const(0), 1, d.lanes)])


@pytest.mark.parametrize("relaxed", [False, True])
def test_byte_intrinsics(relaxed: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        small = rng.integers(0, 128, 16, dtype=np.uint8)
        signed = rng.integers(-128, 128, 16).astype(np.int8)
        signed[:4] = (-128, 127, -128, 127)
        small[:4] = (64, 64, 127, 127)  # the largest sums that fit 16 bits are among them
        got = computed(call("bytes.madd7", i16.vec(8), vector("a", u8.vec(16)), vector("b", i8.vec(16))), relaxed, a=small, b=signed)
        np.testing.assert_array_equal(got, lookup("bytes.madd7").evaluate(None, None, small, signed))
        words = [rng.integers(-32768, 32768, 8).astype(np.int16) for _ in range(2)]
        got = computed(call("words.madd", i32.vec(4), vector("a", i16.vec(8)), vector("b", i16.vec(8))), relaxed, a=words[0], b=words[1])
        np.testing.assert_array_equal(got, lookup("words.madd").evaluate(None, None, *words))
        any_byte = rng.integers(0, 256, 16, dtype=np.uint8)
        table, which = vector("a", i8.vec(16)), vector("b", u8.vec(16))
        got = computed(call("bytes.lookup", i8.vec(16), table, which), relaxed, a=signed, b=any_byte)
        np.testing.assert_array_equal(got, lookup("bytes.lookup").evaluate(None, None, signed, any_byte))
        got = computed(call("bytes.lookup", i8.vec(16), table, which & 15), relaxed, a=signed, b=any_byte)
        np.testing.assert_array_equal(got, signed[any_byte & 15])


def test_lane_moves() -> None:
    rng = np.random.default_rng(1)
    for d, part in ((i8, i16), (u8, u16), (i16, i32), (u16, i32)):
        lanes = 128 // d.bits
        a = rng.integers(*d.limits(), lanes, endpoint=True).astype(d.numpy)
        raw = a.view(np.int8) if d.bits == 8 else a.view(np.int16)
        source = bitcast(vector("a", i8.vec(16) if d.bits == 8 else i16.vec(8)), d.vec(lanes))
        for size in (lanes // 2, lanes // 4):
            if size < 4:
                continue
            for at in range(0, lanes, size):
                wide = part if size == lanes // 2 else i32
                got = computed(cast(shuffle([source], range(at, at + size)), wide.vec(size)), False, a=raw)
                np.testing.assert_array_equal(got, a[at : at + size])
    xs = {n: rng.integers(-(1 << 20), 1 << 20, 4).astype(np.int32) for n in "abcd"}
    for d, count in ((i8, 4), (u8, 4), (i16, 2), (u16, 2)):
        names = "abcd"[:count]
        joined = shuffle([cast(vector(n, i32.vec(4)), d.vec(4)) for n in names], range(4 * count))
        got = computed(joined, False, **{n: xs[n] for n in names})
        np.testing.assert_array_equal(got, np.concatenate([xs[n] for n in names]).astype(d.numpy))
    got = computed(vector("a", i32.vec(4)) + shuffle([const(k, i32) for k in (5, -6, 7, 1 << 30)], range(4)), False, a=xs["a"])
    np.testing.assert_array_equal(got, xs["a"] + np.array([5, -6, 7, 1 << 30], np.int32))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("act", [32, 16, 0])
def test_every_width(variant: str, bits: int, act: int) -> None:
    rng = np.random.default_rng(bits)
    for rows in (1, 3):
        graph, w = product(72, 192, 32, bits, act, rows, rng)
        module = compile_graph(graph, f"wasm:{variant}", threads=1)
        assert templates(module).count("groupedmatmul") >= 2
        x = rng.standard_normal((rows, 192)).astype(np.float32)
        assert nmse(module(x)[0], x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)


@pytest.mark.parametrize("variant", ["relaxed", "simd-threads"])
@pytest.mark.parametrize(("form", "bits", "group", "act"), [
    (form, *case) for form in ("zeros", "offsets")
    for case in ((4, 16, 32), (2, 64, 64), (1, 128, 32), (3, 256, 32), (8, 32, 0), (4, 32, 16))
    if form != "offsets" or case[0] != 8  # 8-bit weights with offsets are signed ones with a zero point in every format that is read
])
def test_zero_points_and_offsets(variant: str, form: str, bits: int, group: int, act: int) -> None:
    rng = np.random.default_rng(bits)
    graph, w = product(40, 512, group, bits, act, 2, rng, form)
    x = rng.standard_normal((2, 512)).astype(np.float32)
    (y,) = compile_graph(graph, f"wasm:{variant}", threads=2)(x)
    assert nmse(y, x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_run_time_number_of_rows(bits: int) -> None:
    rng = np.random.default_rng(0)
    graph, w = product(64, 256, 64, bits, 32, var("rows", lo=1), rng)
    module = compile_graph(graph, "wasm", threads=1)
    for rows in (1, 3, 5):
        x = rng.standard_normal((rows, 256)).astype(np.float32)
        assert nmse(module(x)[0], x.astype(np.float64) @ w.T) < ROUNDED


def test_lowest_8_bit_weights() -> None:
    """Weights and activations at the ends of their ranges: nothing overflows 16 or 32 bits on the way."""
    from luthier.importers.builder import GraphBuilder

    rng = np.random.default_rng(3)
    q = rng.choice(np.array([0, 255], np.uint8), (32, 256))
    s = np.ones((32, 8), np.float16)
    b = GraphBuilder("product")
    x = b.input("x", f32, [1, 256])
    b.output("y", b.op("luthier::GroupedMatMul", x, b.const("w", q), b.const("s", s), K=256, bits=8, group=32, act_group=32, zero=128))
    v = rng.choice(np.array([-1, 1], np.float32), (1, 256))
    for variant in VARIANTS:
        (y,) = compile_graph(b.graph(), f"wasm:{variant}", threads=1)(v)
        np.testing.assert_allclose(y, v.astype(np.float64) @ (q.astype(np.float64) - 128).T, rtol=1e-5, atol=1e-2)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8]), st.sampled_from([16, 32, 64, 128, 256]), st.integers(1, 3), st.integers(8, 75),
    st.integers(1, 4), st.sampled_from([np.float16, np.float32]), st.sampled_from([0, 32]), st.integers(0, 1 << 16), st.sampled_from(VARIANTS),
)  # fmt: skip
def test_random_products(bits: int, group: int, blocks: int, n: int, rows: int, scale: Any, act: int, seed: int, variant: str) -> None:
    rng = np.random.default_rng(seed)
    k = max(group * blocks, 32)
    act = act if k % 32 == 0 else 0
    graph, w = product(n, k, group, bits, act, rows, rng, "symmetric", scale)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    (y,) = compile_graph(graph, f"wasm:{variant}", threads=1)(x)
    assert nmse(y, x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)
