"""Values of two 32-bit words on WebGPU: every function against numpy on numbers at the edges, the ranges that decide who needs them,
and models whose integers leave 32 bits."""

from __future__ import annotations

import base64
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from benchmarks import browser as browsers
from luthier.backends.webgpu_module import WebGpuModule
from luthier.cli import serve
from luthier.codegen.gpu import wgsl_wide
from luthier.codegen.gpu.wgsl import legalize_wgsl, print_wgsl
from luthier.errors import InputError, TargetError
from luthier.ir.dtypes import DType, boolean, f16, f32, f64, i8, i16, i32, i64, u8, u32, u64
from luthier.ir.expr import binary, bitcast, cast, compare, const, load, maximum, minimum, select, unary, var
from luthier.ir.interpret.semantics import convert, evaluate
from luthier.ir.loop import Alloc, Buffer, For, Func, Let, Store, block
from luthier.passes.loop.integer_ranges import IntegerRanges
from tests.gate import dawn

Array = np.ndarray[Any, Any]
N = 512


@pytest.fixture(scope="module")
def adapter() -> None:
    pytest.importorskip("wgpu")
    from luthier.backends.webgpu_device import device

    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))


def numbers(d: DType, seed: int) -> Array:
    """Edges, and random numbers of every magnitude."""
    rng = np.random.default_rng(seed)
    if d is f64:
        bits = rng.integers(0, 1 << 64, N, np.uint64).view(np.float64)
        near = rng.standard_normal(N) * 2.0 ** rng.integers(-40, 40, N)
        edges = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, np.inf, -np.inf, np.nan, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 2.0**31, -(2.0**31), 2.0**63, 2.0**64, 2.0**52 + 0.5, 2.0**53]
        tiny = rng.integers(0, 1 << 54, N, np.uint64).view(np.float64)
        pool = np.concatenate([edges, bits, near, np.rint(near), tiny, near.astype(np.float32).astype(np.float64)])
    elif d is f32:
        pool = np.concatenate([np.array([0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3e38, 2.0**31, 2.0**63, 2.0**64, -1.5, 2.5], np.float32), rng.integers(0, 1 << 32, N, np.uint32).view(np.float32)])
    else:
        lo, hi = d.limits()
        shifted = rng.integers(lo, hi, N, d.numpy, endpoint=True) >> rng.integers(0, d.bits, N).astype(d.numpy)
        pool = np.concatenate([np.array([0, 1, 2, 3, 7, 31, 32, 33, 63, lo, hi, hi - 1, lo + 1, hi // 2], d.numpy), np.array([2**31, 2**32, 2**31 - 1, 2**32 - 1, 2**53 + 1], np.int64).astype(d.numpy), shifted])
        if d.is_signed:
            pool = np.concatenate([pool, -pool])
    return rng.choice(pool, N).astype(d.numpy)


def kernel(out: DType, ins: Sequence[DType], expr: Any) -> Func:
    """``O[i] = expr(A[i], B[i], ..)``."""
    bufs = [Buffer.of(f"A{k}", d, (N,)) for k, d in enumerate(ins)]
    o = Buffer.of("O", out, (N,))
    i, g = var("i", lo=0, hi=63), var("g", lo=0, hi=N // 64 - 1)
    at = g * 64 + i
    body = For(g, const(0), const(N // 64), "block.x", For(i, const(0), const(64), "thread.x", Store(o, (at,), expr(*(load(b, (at,)) for b in bufs)))))
    return Func("k", (*bufs, o), body)


BINARY = {
    **{(d, op): (lambda a, b, op=op: binary(op, a, b)) for d in (i64, u64) for op in ("add", "sub", "mul", "div", "rem", "floordiv", "mod", "and", "or", "xor", "shl", "shr", "min", "max")},
    **{(f64, op): (lambda a, b, op=op: binary(op, a, b)) for op in ("add", "sub", "mul", "div", "rem", "min", "max")},
}
UNARY = {**{(d, op): (lambda a, op=op: unary(op, a)) for d in (i64, u64) for op in ("neg", "not", "popcount")}, (i64, "abs"): lambda a: unary("abs", a), **{(f64, op): (lambda a, op=op: unary(op, a)) for op in ("neg", "abs", "sqrt", "floor", "ceil", "round", "trunc", "isnan", "isinf")}}
COMPARES = {(d, op): (lambda a, b, op=op: compare(op, a, b)) for d in (i64, u64, f64) for op in ("lt", "le", "eq", "ne")}
CASTS = [(s, d) for s in (i64, u64, f64) for d in (f32, f16, i32, u32, i8, u8, i16, boolean, i64, u64, f64) if s is not d]
CASTS += [(s, d) for s in (f32, i32, u32, i8, boolean) for d in (i64, u64, f64)]


def kernels() -> list[tuple[str, Func, tuple[DType, ...], DType, Any]]:
    out: list[tuple[str, Func, tuple[DType, ...], DType, Any]] = []
    for table, n in ((BINARY, 2), (UNARY, 1), (COMPARES, 2)):
        for (d, op), e in table.items():
            r = boolean if table is COMPARES or op in ("isnan", "isinf") else d
            out.append((f"{d} {op}", kernel(r, (d,) * n, e), (d,) * n, r, lambda *a, op=op, r=r: evaluate(op, r, *a)))
    for s, d in CASTS:
        out.append((f"{s} to {d}", kernel(d, (s,), lambda a, d=d: cast(a, d)), (s,), d, lambda a, d=d: convert(a, d)))
    for s, d in ((i64, f64), (f64, i64), (u64, f64)):
        out.append((f"bits of {s} as {d}", kernel(d, (s,), lambda a, d=d: bitcast(a, d)), (s,), d, lambda a, d=d: a.view(d.numpy)))
    return out


KERNELS = kernels()


def test_every_function_is_tested() -> None:
    text = "".join(print_wgsl(legalize_wgsl(f)).source for _, f, _, _, _ in KERNELS)
    assert [n for n in wgsl_wide.FUNCTIONS if f"{n}(" not in text] == ["w__i_near", "w__u_near"]  # the index of a gather, below


@pytest.mark.parametrize(("name", "f", "ins", "out", "want"), KERNELS, ids=[k[0] for k in KERNELS])
def test_against_numpy(name: str, f: Func, ins: tuple[DType, ...], out: DType, want: Any, adapter: None) -> None:
    from luthier.codegen.gpu.wgsl_run import run_wgsl

    arrays = {f"A{k}": numbers(d, 10 * k + len(name)) if not d.is_bool else np.arange(N) % 3 == 0 for k, d in enumerate(ins)}
    if len(ins) == 2 and name.split()[1] in ("shl", "shr"):
        arrays["A1"] = np.random.default_rng(1).integers(0, 80, N).astype(out.numpy)
    got = np.zeros(N, out.numpy)
    with np.errstate(all="ignore"):
        expected = np.asarray(want(*arrays.values())).astype(out.numpy)
    run_wgsl(print_wgsl(legalize_wgsl(f)), {**arrays, "O": got}, {})
    same = (got == expected) | ((got != got) & (expected != expected))
    if out.is_float and name.split()[-1] not in ("min", "max"):
        same &= (np.signbit(got) == np.signbit(expected)) | (expected != expected)
    bad = np.flatnonzero(~same)
    assert not bad.size, [(*(a[k] for a in arrays.values()), got[k], expected[k]) for k in bad[:4]]


def test_dawn_accepts_them() -> None:
    if dawn.missing():
        pytest.skip(str(dawn.missing()))
    from dataclasses import replace

    assert dawn.refused([replace(print_wgsl(legalize_wgsl(f)), name=name) for name, f, _, _, _ in KERNELS]) == {}


# ---------------------------------------------------------------- which integers need two words


def test_ranges() -> None:
    """What is carried in 32 bits, and what is not, around the limits."""
    b, y = Buffer.of("B", i64, (9,)), Buffer.of("Y", i64, (9,))
    i = var("i", lo=0, hi=8)
    x = load(b, (i,))
    top = (1 << 31) - 1
    for e, fits in [
        (x, True), (x + 1, False), (cast(i, i64) + 1, True), (minimum(maximum(x * 3, const(-5, i64)), const(9, i64)), True), (unary("neg", x), False),
        (binary("floordiv", x, const(7, i64)), True), (x * x, False), (binary("mod", x * x, const(1 << 31, i64)), True), (binary("mod", x * x, const((1 << 31) + 2, i64)), False),
        (cast(i, i64) * (top // 8), True), (cast(i, i64) * (top // 8 + 2), False), (binary("and", x * x, const(255, i64)), True), (binary("shr", x, const(3, i64)), True),
        (binary("shl", x, const(3, i64)), False), (select(x < 0, x, cast(i, i64)), True), (cast(load(Buffer.of("F", f32, (9,)), (i,)), i64), False),
    ]:
        r = IntegerRanges(Func("f", (b, y), For(i, const(0), const(9), "serial", Store(y, (i,), e))), {"B"})
        assert r.wide(e) != fits, e


def test_range_of_an_accumulator() -> None:
    """A sum over a loop grows without a bound that is known; the best of a loop stays inside."""
    b, y = Buffer.of("B", i64, (9,)), Buffer.of("Y", i64, (1,))
    i, acc = var("i", lo=0, hi=8), Buffer("acc", i64, (), "local")
    for step, fits in (((lambda a, x: a + x), False), ((lambda a, x: maximum(a, x)), True)):
        t = var("t", i64, None)
        loop = For(i, const(0), const(9), "serial", block(Let(t, step(load(acc, ()), load(b, (i,)))), Store(acc, (), t)))
        f = Func("f", (b, y), Alloc(acc, block(Store(acc, (), const(0, i64)), loop, Store(y, (const(0),), load(acc, ())))))
        r = IntegerRanges(f, {"B"})
        assert r.wide_buffer(acc) != fits and r.wide(t) != fits
        assert IntegerRanges(f, ()).wide_buffer(acc)


# ---------------------------------------------------------------- models


def graph(nodes: Sequence[Any], inputs: dict[str, tuple[int, Sequence[Any]]], outputs: Sequence[str] = ("y",), weights: dict[str, Array] | None = None) -> onnx.ModelProto:
    ins = [h.make_tensor_value_info(n, t, list(s)) for n, (t, s) in inputs.items()]
    outs = [h.make_empty_tensor_value_info(n) for n in outputs]
    g = h.make_graph(list(nodes), "g", ins, outs, [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()])
    return onnx.shape_inference.infer_shapes(h.make_model(g, opset_imports=[h.make_opsetid("", 18)], ir_version=8))


def build(m: onnx.ModelProto) -> WebGpuModule:
    r = luthier.compile(m, target="webgpu")
    assert isinstance(r, WebGpuModule)
    return r


BIG = np.array([1 << 30, -(1 << 31), 3, (1 << 40) + 5, -(1 << 62)], np.int64)
INTEGER_MODELS = {
    "times a constant": ([h.make_node("Mul", ["x", "c"], ["y"])], {"c": np.array(2)}, lambda x: x * 2),
    "a large constant": ([h.make_node("Add", ["x", "c"], ["y"])], {"c": np.arange(5) << 33}, lambda x: x + (np.arange(5) << 33)),
    "over two kernels": (
        [h.make_node("Mul", ["x", "c"], ["a"]), h.make_node("ReduceSum", ["a"], ["s"], keepdims=1), h.make_node("Mod", ["s", "d"], ["y"])],
        {"c": np.array(1 << 20), "d": np.array([1000003])}, lambda x: np.mod(np.sum(x * (1 << 20), keepdims=True), 1000003),
    ),
    "largest": ([h.make_node("ReduceMax", ["x"], ["y"], keepdims=1)], {}, lambda x: x.max(keepdims=True)),
    "copied": ([h.make_node("Concat", ["x", "x"], ["y"], axis=0)], {}, lambda x: np.concatenate([x, x])),
    "compared": ([h.make_node("Less", ["x", "c"], ["y"])], {"c": np.array(1 << 33)}, lambda x: x < (1 << 33)),
    "quotient": ([h.make_node("Div", ["x", "c"], ["y"])], {"c": np.array(1000003)}, lambda x: np.trunc(x / np.longdouble(1000003)).astype(np.int64)),
    "added up in place": (
        [h.make_node("ScatterElements", ["z", "i", "x"], ["y"], axis=0, reduction="add")], {"z": np.zeros(8, np.int64), "i": np.array([0, 4, 4, 4, 7])},
        lambda x: np.array([x[0], 0, 0, 0, x[1] + x[2] + x[3], 0, 0, x[4]]),
    ),
    "product of matrices": ([h.make_node("Unsqueeze", ["x", "a"], ["u"]), h.make_node("MatMul", ["u", "w"], ["y"])], {"a": np.array([0]), "w": np.arange(40).reshape(5, 8) << 18}, lambda x: x[None] @ (np.arange(40).reshape(5, 8) << 18)),
    "as f32": ([h.make_node("Mul", ["x", "c"], ["a"]), h.make_node("Cast", ["a"], ["y"], to=T.FLOAT)], {"c": np.array(3)}, lambda x: (x * 3).astype(np.float32)),
    "running sum": ([h.make_node("CumSum", ["x", "k"], ["y"])], {"k": np.array(0)}, np.cumsum),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGER_MODELS)
def test_integers_beyond_32_bits(name: str, adapter: None) -> None:
    nodes, weights, want = INTEGER_MODELS[name]
    g = build(graph(nodes, {"x": (T.INT64, [5])}, weights=weights))
    x = np.array([1 << 30, -(1 << 31), 3, 17, -5]) if g.host["narrow"] else BIG
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(g.run({"x": x})["y"], want(x))
    if g.host["narrow"]:
        with pytest.raises(InputError, match="32 bits"):
            g.run({"x": BIG})


def test_indices_stay_in_32_bits(adapter: None) -> None:
    """An embedding, a mask and positions of the run: no shader has two words; the same index computed with more than 32 bits has."""
    table, x = np.arange(60, dtype=np.float32).reshape(20, 3), np.array([[3, -1, 19]])
    nodes = [h.make_node("Gather", ["t", "x"], ["e"], axis=0), h.make_node("Cast", ["x"], ["f"], to=T.FLOAT), h.make_node("Unsqueeze", ["f", "k"], ["u"]), h.make_node("Add", ["e", "u"], ["y"])]
    g = build(graph(nodes, {"x": (T.INT64, [1, "n"])}, weights={"t": table, "k": np.array([2])}))
    assert g.host["narrow"] == [0] and not any("W__64" in s for s in g.shaders)
    np.testing.assert_array_equal(g.run({"x": x})["y"], table[x] + x[..., None])
    g = build(graph([h.make_node("Mul", ["x", "c"], ["i"]), h.make_node("Div", ["i", "d"], ["j"]), h.make_node("Gather", ["t", "j"], ["y"], axis=0)], {"x": (T.INT64, [1, 3])}, weights={"t": table, "c": np.array(1 << 40), "d": np.array(1 << 40)}))
    assert g.host["narrow"] == [] and any("near(" in s for s in g.shaders)
    np.testing.assert_array_equal(g.run({"x": np.array([[3, 1, 19]])})["y"], table[[[3, 1, 19]]])


def doubles() -> tuple[onnx.ModelProto, Array, Array]:
    """Two kernels of doubles, a reduction between them: model, input, result."""
    nodes = [h.make_node("Mul", ["x", "x"], ["a"]), h.make_node("ReduceSum", ["a", "k"], ["s"], keepdims=1), h.make_node("Sqrt", ["s"], ["r"]), h.make_node("Div", ["x", "r"], ["y"])]
    x = np.random.default_rng(0).standard_normal((3, 70)) * [[1], [1e100], [1e-150]]
    return graph(nodes, {"x": (T.DOUBLE, [3, 70])}, weights={"k": np.array([1])}), x, x / np.sqrt((x * x).sum(1, keepdims=True))


def test_doubles(adapter: None) -> None:
    """The error is that of doubles."""
    m, x, want = doubles()
    np.testing.assert_allclose(build(m).run({"x": x})["y"], want, rtol=1e-14)


def test_in_chromium(tmp_path: Path) -> None:
    """Another implementation, and the runtime in JavaScript: doubles, and integers of 64 bits from input to output."""
    if browsers.missing():
        pytest.skip(browsers.missing())
    nodes, weights, integers = INTEGER_MODELS["over two kernels"]
    with np.errstate(over="ignore"):
        cases = {"d": doubles(), "i": (graph(nodes, {"x": (T.INT64, [5])}, weights=weights), BIG, integers(BIG))}
    (tmp_path / "index.html").write_text('<!doctype html><title>tests</title><link rel="icon" href="data:,">')
    shutil.copy(Path(browsers.__file__).with_name("page.js"), tmp_path / "page.js")
    for name, (m, x, _) in cases.items():
        build(m).save(tmp_path / name)
        (tmp_path / f"{name}.bin").write_bytes(x.tobytes())
    server = serve.make_server(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with browsers.Browser() as b:
            page = b.open(server.url)
            for name, (_, x, want) in cases.items():
                loaded = page.call("/page.js", "load", {"url": f"/{name}/", "options": {}})
                assert "key" in loaded, loaded
                reply = page.call("/page.js", "run", {"key": loaded["key"], "inputs": {"x": {"dtype": x.dtype.name, "shape": list(x.shape), "file": f"/{name}.bin"}}})
                assert "outputs" in reply, reply
                got = np.frombuffer(base64.b64decode(reply["outputs"]["y"]["base64"]), want.dtype).reshape(want.shape)
                np.testing.assert_allclose(got, want, rtol=1e-14)
            page.close()
    finally:
        server.shutdown()
        server.server_close()
