"""Integer kernels against numpy in int32: shapes, zero points, odd sizes, types; in the interpreter and compiled; what QDQ graphs become."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.codegen.llvm.backend import assembly
from luthier.codegen.llvm.printer import print_kernels
from luthier.codegen.targets.target import parse_target
from luthier.ir.compute import Compute, axis, pull, sum_
from luthier.ir.dtypes import f32, from_numpy, i32, u8
from luthier.ir.expr import Expr, cast, const, load, maximum, minimum, unary
from luthier.ir.loop import Buffer
from luthier.schedules.select import build
from tests.schedules import cases

Array = np.ndarray[Any, Any]
TARGETS = ["cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:alderlake", "cpu:x86-64-v4+avx512vnni", "cpu:znver4"]


def bytes_of(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Random bytes over the whole range, extremes included."""
    lo, hi = (0, 255) if kind == "u8" else (-128, 127)
    a = rng.integers(lo, hi, shape, endpoint=True)
    a.reshape(-1)[: min(6, a.size)] = [lo, lo, hi, hi, lo, hi][: min(6, a.size)]
    return a.astype(np.uint8 if kind == "u8" else np.int8)


def centred(x: Expr, zero: int) -> Expr:
    return cast(x, i32) - const(zero, i32) if zero else cast(x, i32)


def requantized(acc: Expr, scale: Expr, zero: float = 3.0) -> Expr:
    y = unary("round", cast(acc, f32) * scale) + const(zero, f32)
    return cast(cast(minimum(maximum(y, const(0.0, f32)), const(255.0, f32)), i32), u8)


def requantized_ref(acc: Array, scale: Array, zero: float = 3.0) -> Array:
    return np.clip(np.rint(acc.astype(np.float32) * scale) + zero, 0, 255).astype(np.uint8)


def matmul(x: Array, w: Array, zx: int, zw: int) -> Compute:
    (m, k), n = x.shape, w.shape[1]
    a, b = Buffer.of("X", from_numpy(x.dtype), (m, k), writable=False), Buffer.of("W", from_numpy(w.dtype), (k, n), writable=False)
    s = Buffer.of("S", f32, (n,), writable=False)
    i, j, r = axis("i", m), axis("j", n), axis("k", k)
    acc = pull("acc", [i, j], sum_(r, centred(a[i.var, r.var], zx) * centred(b[r.var, j.var], zw)))
    y = pull("Y", [i, j], requantized(load(acc.buf, [i.var, j.var]), s[j.var]))
    return Compute("mm", (a, b, s), (), (acc, y), ("Y",))


def conv(x: Array, w: Array, zx: int, zw: int, stride: int, pad: int, depthwise: bool) -> Compute:
    """NHWC by [kh, kw, c, n]."""
    n, h, wd, c = x.shape
    kh, kw, ci, oc = w.shape
    ho, wo = (h + 2 * pad - kh) // stride + 1, (wd + 2 * pad - kw) // stride + 1
    a, b = Buffer.of("X", from_numpy(x.dtype), x.shape, writable=False), Buffer.of("W", from_numpy(w.dtype), w.shape, writable=False)
    s = Buffer.of("S", f32, (oc,), writable=False)
    ax = [axis("n", n), axis("oh", ho), axis("ow", wo), axis("oc", oc)]
    r = [axis("kh", kh), axis("kw", kw), *([] if depthwise else [axis("ic", ci)])]
    b_, oh, ow, o = (q.var for q in ax)
    ih, iw = oh * stride + r[0].var - pad, ow * stride + r[1].var - pad
    mask = (const(0) <= ih) & (ih < h) & (const(0) <= iw) & (iw < wd) if pad else None
    ch = o if depthwise else r[2].var
    xe = load(a, [b_, ih, iw, ch], mask, const(zx, a.dtype) if pad else None)
    we = load(b, [r[0].var, r[1].var, const(0) if depthwise else ch, o])
    acc = pull("acc", ax, sum_(r, centred(xe, zx) * centred(we, zw)))
    y = pull("Y", ax, requantized(load(acc.buf, [q.var for q in ax]), s[o]))
    return Compute("cv", (a, b, s), (), (acc, y), ("Y",))


def conv_ref(x: Array, w: Array, zx: int, zw: int, stride: int, pad: int, depthwise: bool) -> Array:
    xi = np.pad(x.astype(np.int32) - zx, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    wi = w.astype(np.int32) - zw
    kh, kw = w.shape[:2]
    ho, wo = (xi.shape[1] - kh) // stride + 1, (xi.shape[2] - kw) // stride + 1
    acc: Any = 0
    for i in range(kh):
        for j in range(kw):
            p = xi[:, i : i + stride * (ho - 1) + 1 : stride, j : j + stride * (wo - 1) + 1 : stride]
            acc = acc + (p * wi[i, j, 0] if depthwise else p @ wi[i, j])
    return np.asarray(acc, np.int32)


def interpret(c: Compute, arrays: dict[str, Array], target: str, shape: tuple[int, ...]) -> tuple[Array, str]:
    caps = parse_target(target).caps
    k = build(c, caps, {"W": arrays["W"], "S": arrays["S"]})
    return cases.run(k.funcs, {**arrays, **k.packed}, {}, "Y").reshape(shape), str(k.funcs[-1])


sizes = st.integers(1, 19)
kinds = st.sampled_from(["u8", "i8"])


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 41), k=st.integers(1, 23), xk=kinds, wk=kinds, zx=st.sampled_from([0, 0, 7, -3]), zw=st.sampled_from([0, 0, 5]), target=st.sampled_from(TARGETS), seed=st.integers(0, 99))
def test_matmul(m: int, n: int, k: int, xk: str, wk: str, zx: int, zw: int, target: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = bytes_of(xk, (m, k), rng), bytes_of(wk, (k, n), rng)
    zx, zw = abs(zx) if xk == "u8" else zx, zw
    s = (rng.random(n) * 2e-3).astype(np.float32)
    got, _ = interpret(matmul(x, w, zx, zw), {"X": x, "W": w, "S": s}, target, (m, n))
    np.testing.assert_array_equal(got, requantized_ref((x.astype(np.int32) - zx) @ (w.astype(np.int32) - zw), s))


@settings(max_examples=25, deadline=None)
@given(
    h=st.integers(3, 9), wd=st.integers(3, 9), c=st.integers(1, 9), oc=st.integers(1, 35), k=st.sampled_from([1, 2, 3]), stride=st.integers(1, 2), pad=st.integers(0, 1),
    depthwise=st.booleans(), xk=kinds, zx=st.sampled_from([0, 9]), zw=st.sampled_from([0, 0, 3]), target=st.sampled_from(TARGETS), seed=st.integers(0, 99),
)  # fmt: skip
def test_conv(h: int, wd: int, c: int, oc: int, k: int, stride: int, pad: int, depthwise: bool, xk: str, zx: int, zw: int, target: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if depthwise:
        c = oc
    x, w = bytes_of(xk, (1, h, wd, c), rng), bytes_of("i8", (k, k, 1 if depthwise else c, oc), rng)
    acc = conv_ref(x, w, zx, zw, stride, pad, depthwise)
    s = (rng.random(oc) * 3e-3).astype(np.float32)
    got, _ = interpret(conv(x, w, zx, zw, stride, pad, depthwise), {"X": x, "W": w, "S": s}, target, acc.shape)
    np.testing.assert_array_equal(got, requantized_ref(acc, s))


@pytest.mark.parametrize(
    ("target", "wk", "zw", "instruction"),
    [
        ("cpu:x86-64-v3", "i8", 0, "vpmaddwd.i32x8"), ("cpu:x86-64-v2", "u8", 9, "vpmaddwd.i32x4"), ("cpu:znver4", "i8", 0, "vpdpbusd.i32x16"),
        ("cpu:znver4", "i8", 4, "vpdpwssd.i32x16"), ("cpu:alderlake", "i8", 0, "vpdpbusd.i32x8"), ("cpu:aarch64+dotprod+i8mm", "i8", 0, "dot.i32x4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("xk", ["u8", "i8"])
def test_instruction_of_the_target(target: str, wk: str, zw: int, instruction: str, xk: str, rng: np.random.Generator) -> None:
    x, w = bytes_of(xk, (6, 37), rng), bytes_of(wk, (37, 40), rng)
    s = (rng.random(40) * 1e-3).astype(np.float32)
    got, text = interpret(matmul(x, w, 5, zw), {"X": x, "W": w, "S": s}, target, (6, 40))
    np.testing.assert_array_equal(got, requantized_ref((x.astype(np.int32) - 5) @ (w.astype(np.int32) - zw), s))
    assert instruction in text
    if target.startswith("cpu:aarch64"):  # each type of the activation has its own
        assert ("usdot" in text) == (xk == "u8")


@pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu:znver4"])
def test_merged_heads(target: str, rng: np.random.Generator) -> None:
    """An activation [head, row, d] that the product reads with head and d as one axis."""
    heads, rows, d, n = 3, 5, 10, 24
    x, w = bytes_of("u8", (heads, rows, d), rng), bytes_of("i8", (heads * d, n), rng)
    s = (rng.random(n) * 1e-3).astype(np.float32)
    a, b, sb = Buffer.of("X", u8, x.shape, writable=False), Buffer.of("W", from_numpy(w.dtype), w.shape, writable=False), Buffer.of("S", f32, (n,), writable=False)
    i, j, r = axis("i", rows), axis("j", n), axis("k", heads * d)
    acc = pull("acc", [i, j], sum_(r, centred(a[r.var // d, i.var, r.var % d], 9) * centred(b[r.var, j.var], 0)))
    y = pull("Y", [i, j], requantized(load(acc.buf, [i.var, j.var]), sb[j.var]))
    got, text = interpret(Compute("mh", (a, b, sb), (), (acc, y), ("Y",)), {"X": x, "W": w, "S": s}, target, (rows, n))
    ref = (x.transpose(1, 0, 2).reshape(rows, -1).astype(np.int32) - 9) @ w.astype(np.int32)
    np.testing.assert_array_equal(got, requantized_ref(ref, s))
    assert "@x86.vp" in text


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


# ---------------------------------------------------------------- through the compiler


def model(nodes: list[Any], ins: dict[str, tuple[int, list[Any]]], outs: dict[str, int], inits: dict[str, Array]) -> onnx.ModelProto:
    g = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, t, s) for n, (t, s) in ins.items()], [helper.make_tensor_value_info(n, t, None) for n, t in outs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in inits.items()],
    )  # fmt: skip
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("shape", [(1, 3, 9, 11, 8, 3, 2, 1), (2, 16, 7, 7, 24, 3, 1, 1), (1, 30, 6, 5, 17, 1, 1, 0)])
@pytest.mark.parametrize("zero_w", [False, True])
def test_conv_integer(shape: tuple[int, ...], zero_w: bool, rng: np.random.Generator) -> None:
    n, c, h, w, m, k, stride, pad = shape
    x, wt = bytes_of("u8", (n, c, h, w), rng), bytes_of("u8" if zero_w else "i8", (m, c, k, k), rng)
    inits = {"w": wt, "zx": np.uint8(131)} | ({"zw": np.uint8(120)} if zero_w else {})
    node = helper.make_node("ConvInteger", ["x", "w", "zx", *(["zw"] if zero_w else [])], ["y"], strides=[stride] * 2, pads=[pad] * 4)
    mod = luthier.compile(model([node], {"x": (TensorProto.UINT8, [n, c, h, w])}, {"y": TensorProto.INT32}, inits), threads=1)
    ref = conv_ref(x.transpose(0, 2, 3, 1), wt.transpose(2, 3, 1, 0), 131, 120 if zero_w else 0, stride, pad, False).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(mod.run({"x": x})["y"], ref)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("k", [32, 45])
def test_dynamic_quantization(rows: int, k: int, rng: np.random.Generator) -> None:
    """DynamicQuantizeLinear + MatMulInteger: exact sums of what the quantizer gives."""
    x = (rng.standard_normal((rows, k)) * 3).astype(np.float32)
    w = bytes_of("i8", (k, 40), rng)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "s"], ["y"]),
    ]  # fmt: skip
    outs = {"y": TensorProto.FLOAT, "q": TensorProto.UINT8, "s": TensorProto.FLOAT, "z": TensorProto.UINT8, "i": TensorProto.INT32}
    got = luthier.compile(model(nodes, {"x": (TensorProto.FLOAT, [rows, k])}, outs, {"w": w}), threads=1).run({"x": x})
    lo, hi = min(0.0, x.min()), max(0.0, x.max())
    scale = np.float32((np.float32(hi) - np.float32(lo)) / np.float32(255))
    assert got["s"] == pytest.approx(scale, rel=1e-6)
    zero = int(got["z"])
    assert abs(zero - round(-lo / float(scale))) <= 1
    assert np.abs(got["q"].astype(int) - np.clip(np.rint(x / scale) + zero, 0, 255)).max() <= 1
    acc = (got["q"].astype(np.int32) - zero) @ w.astype(np.int32)
    np.testing.assert_array_equal(got["i"], acc)
    np.testing.assert_array_equal(got["y"], acc.astype(np.float32) * got["s"])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_static_quantization(per_channel: bool, form: str, rng: np.random.Generator) -> None:
    """Conv then quantization, as QDQ and as QLinearConv: the value computed in f64 within one step, equal but for ties."""
    c, m = 8, 24
    x, w = bytes_of("u8", (1, c, 9, 9), rng), bytes_of("i8", (m, c, 3, 3), rng)
    sx, zx, sy, zy = np.float32(0.02), np.uint8(117), np.float32(0.31), np.uint8(101)
    sw = (rng.random(m if per_channel else 1) * 0.01 + 0.001).astype(np.float32).reshape(-1 if per_channel else ())
    zw = np.zeros(m if per_channel else (), np.int8)
    bias = rng.integers(-3000, 3000, m).astype(np.int32)
    inits: dict[str, Array] = {"w": w, "sx": sx, "zx": zx, "sw": sw, "zw": zw, "sy": sy, "zy": zy, "b": bias}
    if form == "qdq":
        inits["sb"] = np.asarray(sx * sw, np.float32)
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["xf"]), helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=0),
            helper.make_node("DequantizeLinear", ["b", "sb"], ["bf"], axis=0), helper.make_node("Conv", ["xf", "wf", "bf"], ["yf"], pads=[1] * 4),
            helper.make_node("QuantizeLinear", ["yf", "sy", "zy"], ["y"]),
        ]  # fmt: skip
    else:
        nodes = [helper.make_node("QLinearConv", ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy", "b"], ["y"], pads=[1] * 4)]
    got = luthier.compile(model(nodes, {"x": (TensorProto.UINT8, [1, c, 9, 9])}, {"y": TensorProto.UINT8}, inits), threads=1).run({"x": x})["y"]
    acc = conv_ref(x.transpose(0, 2, 3, 1), w.transpose(2, 3, 1, 0), int(zx), 0, 1, 1, False) + bias
    exact = acc * (np.float64(sx) * sw.astype(np.float64) / np.float64(sy))
    ref = np.clip(np.rint(exact) + int(zy), 0, 255).transpose(0, 3, 1, 2)
    diff = got.astype(int) != ref
    tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    assert (np.abs(got.astype(int) - ref) <= 1).all() and not (diff & ~tie.transpose(0, 3, 1, 2)).any()


def test_no_saturation_of_pairs() -> None:
    """Extreme bytes, on which an instruction with 16-bit sums (vpmaddubsw) would saturate."""
    x, w = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    w[:, 8:] = -128
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    got = luthier.compile(model([node], {"x": (TensorProto.UINT8, [4, 64])}, {"y": TensorProto.INT32}, {"w": w}), threads=1).run({"x": x})["y"]
    assert (got[:, :8] == 64 * 255 * 127).all() and (got[:, 8:] == -64 * 255 * 128).all()



@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize(("h", "c", "oc", "zx", "pad", "xk"), [(5, 16, 16, 0, 1, "u8"), (6, 16, 8, -5, 0, "i8"), (4, 32, 8, 200, 1, "u8")])
def test_winograd_is_exact(m: int, h: int, c: int, oc: int, zx: int, pad: int, xk: str, rng: np.random.Generator) -> None:
    """All extremes of the operands, sums that overflow on the way: the result is the convolution."""
    x, w = bytes_of(xk, (1, h, h, c), rng), bytes_of("i8", (3, 3, c, oc), rng)
    w[..., 0], w[..., 1] = 127, -128
    acc = conv_ref(x, w, zx, 0, 1, pad, False)
    s = (rng.random(oc) * 3e-4).astype(np.float32)
    arrays = {"X": x, "W": w, "S": s}
    k = build(conv(x, w, zx, 0, 1, pad, False), parse_target("cpu:x86-64-v3").caps, {"W": w, "S": s}, template="winograd_integer", tile=m)
    got = cases.run(k.funcs, {**arrays, **k.packed}, {}, "Y").reshape(acc.shape)
    np.testing.assert_array_equal(got, requantized_ref(acc, s))


def test_winograd_refuses_what_may_overflow(rng: np.random.Generator) -> None:
    """64 * y must fit 32 bits: 3 * 3 * 288 products of 255 and 127 do not, 16 do."""
    from luthier.schedules.base.schedule import schedule
    from luthier.schedules.cpu import winograd_integer

    caps = parse_target("cpu:x86-64-v3").caps
    for c, fits in ((16, True), (288, False)):
        x, w = bytes_of("u8", (1, 6, 6, c), rng), np.full((3, 3, c, 16), 127, np.int8)
        s = winograd_integer.apply(schedule(conv(x, w, 0, 0, 1, 1, False)), caps, {"W": w}, tile=4)
        assert (s is not None) == fits
        assert winograd_integer.apply(schedule(conv(x, w, 0, 0, 1, 1, False)), caps, {"W": w}, tile=2) is not None


@pytest.mark.parametrize("per_column", [False, True])
def test_qlinear_matmul(per_column: bool, rng: np.random.Generator) -> None:
    """QLinearMatMul takes the integer template and rounds like the value in f64, but for ties."""
    x, w = bytes_of("u8", (5, 48), rng), bytes_of("i8", (48, 24), rng)
    sw = (rng.random(24 if per_column else 1) * 0.01 + 0.001).astype(np.float32).reshape(-1 if per_column else ())
    inits = {"sx": np.float32(0.02), "zx": np.uint8(100), "w": w, "sw": sw, "zw": np.zeros(sw.shape, np.int8), "sy": np.float32(0.4), "zy": np.uint8(90)}
    node = helper.make_node("QLinearMatMul", ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy"], ["y"])
    m = luthier.compile(model([node], {"x": (TensorProto.UINT8, [5, 48])}, {"y": TensorProto.UINT8}, inits), threads=1)
    exact = ((x.astype(np.int32) - 100) @ w.astype(np.int32)) * (np.float64(np.float32(0.02)) * sw.astype(np.float64) / np.float64(np.float32(0.4)))
    got, ref = m.run({"x": x})["y"].astype(int), np.clip(np.rint(exact) + 90, 0, 255)
    tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    assert not ((got != ref) & ~tie).any() and (np.abs(got - ref) <= 1).all()


@pytest.mark.parametrize(
    ("target", "has", "never"),
    [
        ("cpu:x86-64-v2", r"\tpmaddwd\t", r"[yz]mm|\tv[a-z]+\t"), ("cpu:x86-64-v3", r"\tvpmaddwd\t.*ymm", r"zmm|vpdp|%k[1-7]"), ("cpu:alderlake", r"\{vex\}\s+vpdpbusd\t.*ymm", r"zmm|%k[1-7]"),
        ("cpu:x86-64-v4", r"\tvpmaddwd\t.*zmm", r"vpdp"), ("cpu:x86-64-v4+avx512vnni", r"\tvpdpbusd\t.*zmm", r"vdpbf16|vpermi2b"), ("cpu:znver4", r"\tvpdpbusd\t.*zmm", r"\{vex\}"),
    ],
)  # fmt: skip
def test_machine_code_of_targets(target: str, has: str, never: str, rng: np.random.Generator) -> None:
    """The inner loops of a quantized convolution have the target's dot product, and nothing that the target lacks."""
    x, w = bytes_of("u8", (1, 6, 6, 16), rng), bytes_of("i8", (3, 3, 16, 32), rng)
    t = parse_target(target)
    k = build(conv(x, w, 5, 0, 1, 1, False), t.caps, {"W": w, "S": np.ones(32, np.float32)}, template="contract_integer")
    text = assembly(print_kernels([(f"k{i}", f) for i, f in enumerate(k.funcs)], t), t)
    assert re.search(has, text)
    assert not (m := re.search(never, text)), m


@pytest.mark.parametrize(("c", "m", "k", "pad", "stride", "group"), [(16, 24, 3, 1, 1, 1), (3, 16, 3, 1, 2, 1), (8, 16, 1, 0, 1, 1), (5, 8, 3, 0, 1, 1), (16, 16, 3, 1, 1, 16), (12, 24, 3, 1, 1, 3)])
def test_runtime_extents(c: int, m: int, k: int, pad: int, stride: int, group: int, rng: np.random.Generator) -> None:
    """Batch, height and width known at run time only; groups; two threads."""
    wt = bytes_of("i8", (m, c // group, k, k), rng)
    node = helper.make_node("ConvInteger", ["x", "w", "zx"], ["y"], pads=[pad] * 4, strides=[stride] * 2, group=group)
    mod = luthier.compile(model([node], {"x": (TensorProto.UINT8, ["n", c, "h", "w"])}, {"y": TensorProto.INT32}, {"w": wt, "zx": np.uint8(131)}), threads=2)
    for n, h, w in ((1, 9, 8), (2, 17, 5)):
        x = bytes_of("u8", (n, c, h, w), rng)
        parts = [
            conv_ref(xs.transpose(0, 2, 3, 1), ws.transpose(2, 3, 1, 0), 131, 0, stride, pad, False)
            for xs, ws in zip(np.split(x, group, 1), np.split(wt, group, 0), strict=True)
        ]
        np.testing.assert_array_equal(mod.run({"x": x})["y"], np.concatenate(parts, 3).transpose(0, 3, 1, 2))
