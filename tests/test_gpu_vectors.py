"""Whole vectors in memory and subgroups on GPUs: which accesses become vectors, what is printed, and the results, odd sizes included."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from luthier.codegen.gpu.cuda import legalize_cuda, print_cuda
from luthier.codegen.gpu.wgsl import legalize_wgsl, print_wgsl
from luthier.codegen.targets.target import parse_target
from luthier.errors import TargetError
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, const, load, var
from luthier.ir.interpret.loops import run_func
from luthier.ir.interpret.programs import run_program
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, If, Let, Stmt, Store, block, walk_stmts
from luthier.ir.program import Program
from luthier.passes.gpu.privatize_threads import privatize_threads
from luthier.passes.gpu.spread_subgroups import spread_subgroups
from luthier.passes.loop.combine_accesses import combine_accesses
from luthier.passes.loop.flatten import flatten
from luthier.passes.loop.place_barriers import place_barriers
from luthier.passes.loop.scalarize import scalarize
from luthier.passes.loop.unroll import unroll
from luthier.pipeline import compile_program

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loop(name: str, n: Any, kind: str, body: Any) -> For:
    e = const(n) if isinstance(n, int) else n
    v = var(name, lo=0, hi=e - 1)
    return For(v, const(0), e, kind, body(v))


# ---------------------------------------------------------------- the pass


def copy(at: Any, n: Any = 32, size: Any = 64) -> Func:
    """``Y[at(q, v)] = X[at(q, v)] * 2`` for q < n // 4, v < 4."""
    x, y = Buffer.of("X", f32, (size,), writable=False), Buffer.of("Y", f32, (size,))
    q = loop("q", n // 4, "serial", lambda q: loop("v", 4, "unroll", lambda v: Store(y, (at(q, v),), x[at(q, v)] * 2.0)))
    return scalarize(unroll(Func("f", (x, y), q)))


def types(f: Func) -> dict[str, int]:
    return {b.name: b.dtype.lanes for b in f.buffers}


def test_four_neighbours_become_a_vector() -> None:
    f = combine_accesses(copy(lambda q, v: q * 4 + v))
    assert types(f) == {"X": 4, "Y": 4}
    assert sum(isinstance(s, Store) for s in walk_stmts(f.body)) == 1
    y = np.zeros(64, np.float32)
    run_func(f, {"X": normal(64), "Y": y}, {})
    np.testing.assert_array_equal(y[:32], normal(64)[:32] * 2)
    np.testing.assert_array_equal(y[32:], 0)


@pytest.mark.parametrize("at", [lambda q, v: q * 4 + v + 1, lambda q, v: q + v, lambda q, v: q * 8 + v * 2, lambda q, v: q * 6 + v])
def test_what_is_not_aligned_stays(at: Any) -> None:
    f = copy(at)
    assert combine_accesses(f) is f


def test_alignment_is_found_through_names_and_choices() -> None:
    """A row number that is clamped, times a stride of whole vectors, behind names."""
    n = var("n", lo=1)
    x, y = Buffer.of("X", f32, (n * 8,), writable=False), Buffer.of("Y", f32, (n * 8,))

    def row(r: Expr) -> Stmt:
        start, twice = var("start", lo=0), var("twice", lo=0)
        clamped = (r + 1 < n).eq(False)
        first = block(Let(start, const(8) * r), Let(twice, start + 4))
        stores = [Store(y, (twice + k,), x[twice + k] + 1.0) for k in range(4)]
        return block(first, If(clamped, block(*stores)))

    f = Func("f", (x, y, n), loop("r", n, "serial", row))
    g = combine_accesses(f)
    assert types(g) == {"X": 4, "Y": 4}
    outs = []
    for k in (f, g):
        out = np.zeros(24, np.float32)
        run_func(k, {"X": normal(24), "Y": out}, {"n": 3})
        outs.append(out)
    np.testing.assert_array_equal(outs[0], outs[1])
    assert outs[0].any()


def test_one_scalar_access_keeps_a_buffer_scalar() -> None:
    x, y = Buffer.of("X", f32, (32,), writable=False), Buffer.of("Y", f32, (32,))
    q = loop("q", 8, "serial", lambda q: loop("v", 4, "unroll", lambda v: Store(y, (q * 4 + v,), x[q * 4 + v] + x[q])))
    f = combine_accesses(scalarize(unroll(Func("f", (x, y), q))))
    assert types(f) == {"X": 1, "Y": 4}
    out = np.zeros(32, np.float32)
    run_func(f, {"X": normal(32), "Y": out}, {})
    np.testing.assert_array_equal(out, normal(32) + np.repeat(normal(32)[:8], 4))


def test_stores_that_feed_each_other_stay_apart() -> None:
    """Each element is made from the one stored before it: a vector store would read the old one."""
    y = Buffer.of("Y", f32, (33,))

    def step(k: int, q: Expr) -> Stmt:
        return Store(y, (q * 4 + k,), load(y, (q * 4 + (k - 1 if k else 3),)) + 1.0)

    f = Func("f", (y,), loop("q", 8, "serial", lambda q: block(*(step(k, q) for k in range(4)))))
    assert combine_accesses(f) is f


# ---------------------------------------------------------------- kernels


def program(nodes: Any, inputs: dict[str, tuple[Any, ...]], weights: dict[str, Array] | None = None) -> Program:
    return compile_program(import_onnx(model(nodes, inputs, weights)), parse_target("webgpu").caps)


def model(nodes: Any, inputs: dict[str, tuple[Any, ...]], weights: dict[str, Array] | None = None) -> Any:
    ins = [h.make_tensor_value_info(n, T.FLOAT, list(s)) for n, s in inputs.items()]
    g = h.make_graph(nodes, "g", ins, [h.make_tensor_value_info("y", T.FLOAT, None)], [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()])
    return h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=8)


def attention(b: Any, n: Any, d: int) -> Any:
    nodes = [
        h.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]), h.make_node("MatMul", ["q", "t"], ["s"]), h.make_node("Softmax", ["s"], ["p"]),
        h.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    return nodes, {x: (b, 2, n, d) for x in "qkv"}, None


def one_query(n: Any, d: int) -> Any:
    nodes, inputs, w = attention(1, n, d)
    return nodes, inputs | {"q": (1, 2, 1, d)}, w


def softmax(n: Any, m: Any) -> Any:
    return [h.make_node("Softmax", ["x"], ["y"])], {"x": (n, m)}, None


def product(n: Any, k: int, m: int) -> Any:
    return [h.make_node("MatMul", ["x", "w"], ["y"])], {"x": (n, k)}, {"w": normal(k, m, seed=3)}


def rows(n: int, k: int) -> Any:
    """A matrix-vector product whose matrix has its rows side by side."""
    return [h.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"x": (1, k)}, {"w": normal(n, k, seed=3)}


def layer_norm(n: Any, m: int) -> Any:
    return [h.make_node("LayerNormalization", ["x", "s", "b"], ["y"])], {"x": (n, m)}, {"s": normal(m, seed=1), "b": normal(m, seed=2)}


def bias(n: Any, m: int) -> Any:
    return [h.make_node("Add", ["x", "b"], ["t"]), h.make_node("Abs", ["t"], ["y"])], {"x": (n, m)}, {"b": normal(m, seed=1)}


def conv(n: Any, c: int, hw: tuple[Any, Any], o: int, k: int) -> Any:
    p = k // 2
    return [h.make_node("Conv", ["x", "w"], ["y"], pads=[p, p, p, p])], {"x": (n, c, *hw)}, {"w": normal(o, c, k, k, seed=4)}


def declared(text: str) -> tuple[int, int, int]:
    """(storage buffers of vectors, of scalars, workgroup arrays of vectors) in WGSL."""
    storage = re.findall(r"var<storage, \w+> \w+: array<(\w+)", text)
    return storage.count("vec4"), len(storage) - storage.count("vec4"), len(re.findall(r"var<workgroup> \w+: array<vec4<", text))


# kernel, declared types of its only shader
DECLARED: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "points": (bias(64, 384), (3, 0, 0)),
    "points, open rows": (bias("n", 384), (3, 0, 0)),
    "points, odd": (bias("n", 387), (0, 3, 0)),
    "points, open": (([h.make_node("Abs", ["x"], ["y"])], {"x": ("n", "m")}, None), (0, 2, 0)),
    "softmax": (softmax("n", 384), (2, 0, 1)),
    "softmax, odd": (softmax("n", 385), (0, 2, 0)),
    "softmax, open": (softmax("n", "m"), (0, 2, 0)),
    "layer norm": (layer_norm("n", 384), (4, 0, 0)),
    "product": (product("n", 384, 1152), (3, 0, 2)),
    "product, small tiles": (product(40, 64, 96), (3, 0, 2)),
    "vector": (product(1, 512, 96), (2, 1, 1)),
    "vectors": (product(3, 512, 96), (2, 1, 1)),
    "vector, rows": (rows(96, 512), (2, 1, 0)),
    "product, odd columns": (product(64, 64, 97), (1, 2, 2)),
    "product, odd sum": (product(64, 63, 96), (2, 1, 2)),
    "attention": (attention("b", "n", 32), (4, 0, 1)),
    "attention, odd head": (attention("b", "n", 10), (0, 4, 0)),
}


@pytest.mark.parametrize("name", DECLARED)
def test_declared_types(name: str) -> None:
    args, want = DECLARED[name]
    (f,) = program(*args).kernels.values()
    assert declared(print_wgsl(legalize_wgsl(f)).source) == want


RUN: dict[str, tuple[Any, Any]] = {
    "points": (bias("n", 384), (37, 384)), "points, odd": (bias("n", 387), (37, 387)), "softmax": (softmax("n", 500), (5, 500)),
    "softmax, odd": (softmax("n", 501), (5, 501)), "softmax, open": (softmax("n", "m"), (5, 260)), "softmax, long": (softmax(3, 4096), (3, 4096)),
    "layer norm": (layer_norm("n", 384), (7, 384)), "product": (product("n", 384, 200), (37, 384)), "product, odd": (product("n", 63, 97), (130, 63)),
    "product, few columns": (product("n", 64, 10), (70, 64)), "vector": (product(1, 512, 96), (1, 512)),
    "vectors": (product(3, 500, 132), (3, 500)), "vectors, short": (product(4, 70, 36), (4, 70)), "vector, rows": (rows(96, 512), (1, 512)),
    "attention": (attention("b", "n", 32), (2, 2, 37, 32)),
    "attention, wide": (attention("b", "n", 64), (1, 2, 150, 64)), "attention, odd": (attention("b", "n", 10), (1, 2, 19, 10)),
    "attention, one row": (one_query(200, 64), {"q": (1, 2, 1, 64), "k": (1, 2, 200, 64), "v": (1, 2, 200, 64)}),
    "conv": (conv("n", 16, (20, 20), 32, 3), (2, 16, 20, 20)), "conv, 1x1": (conv(1, 32, (14, 14), 64, 1), (1, 32, 14, 14)),
    "conv, open": (conv(1, 8, ("h", "w"), 16, 3), (1, 8, 9, 11)),
}  # fmt: skip


def feeds_of(args: Any, shape: Any) -> dict[str, Array]:
    """``shape``: of all inputs, or {input: shape}."""
    return {n: normal(*(shape[n] if isinstance(shape, dict) else shape), seed=7 + k) for k, n in enumerate(args[1])}


@pytest.mark.parametrize("name", RUN)
def test_results(name: str) -> None:
    """Against onnxruntime, on whatever adapter is there."""
    pytest.importorskip("wgpu")
    import onnxruntime as ort

    import luthier
    from luthier.backends.webgpu_device import device

    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))
    args, shape = RUN[name]
    m, feeds = model(*args), feeds_of(*RUN[name])
    want = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    got = luthier.compile(m, target="webgpu").run(feeds)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize("name", ["softmax", "softmax, odd", "layer norm", "product", "product, odd", "vector", "vector, rows", "attention", "attention, one row"])
def test_cuda(name: str) -> None:
    """The same kernels compile to a cubin; those of whole vectors take pointers to them, and rows sum with shuffles."""
    from luthier.codegen.gpu.nvrtc import compile_kernel, library

    try:
        library()
    except TargetError as e:
        pytest.skip(str(e))
    for f in program(*RUN[name][0]).kernels.values():
        k = print_cuda(legalize_cuda(f))
        assert ("float4* __restrict__" in k.source) == ("odd" not in name)
        assert ("__shfl_xor_sync" in k.source) == (name in ROWS)
        assert compile_kernel(k.source, name=f.name).cubin[:4] == b"\x7fELF"


# ---------------------------------------------------------------- elements narrower than a word


def narrow(kind: str, n: Any, m: int) -> tuple[Any, Any]:
    """(a model with an output of ``kind``, the same in numpy)."""
    if kind == "half":
        nodes, d = [h.make_node("Add", ["x", "x"], ["y"])], T.FLOAT16
        ins, want = d, lambda x: x + x
    elif kind == "bool":
        nodes, d = [h.make_node("Less", ["x", "zero"], ["y"])], T.BOOL
        ins, want = T.FLOAT, lambda x: x < 0
    else:
        nodes, d = [h.make_node("QuantizeLinear", ["x", "step", "point"], ["y"])], T.UINT8
        ins, want = T.FLOAT, lambda x: np.clip(np.rint(x / np.float32(0.02)) + 128, 0, 255).astype(np.uint8)
    weights = {"zero": np.float32(0), "step": np.float32(0.02), "point": np.uint8(128)}
    used = {i for node in nodes for i in node.input}
    init = [numpy_helper.from_array(np.asarray(a), k) for k, a in weights.items() if k in used]
    g = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", ins, [n, m])], [h.make_tensor_value_info("y", d, [n, m])], init)
    return h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=8), want


@pytest.mark.parametrize("kind", ["half", "bool", "byte"])
@pytest.mark.parametrize("m", [384, 387])
def test_whole_words_need_no_atomics(kind: str, m: int) -> None:
    """Four neighbours are one word, or two: nobody else writes it. Otherwise bits are set atomically."""
    pytest.importorskip("wgpu")
    import luthier
    from luthier.backends.webgpu_device import device

    made, want = narrow(kind, "n", m)
    (f,) = compile_program(import_onnx(made), parse_target("webgpu").caps).kernels.values()
    assert ("atomicOr" in print_wgsl(legalize_wgsl(f)).source) == (m == 387)
    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))
    x = normal(21, m).astype(np.float16 if kind == "half" else np.float32)
    np.testing.assert_array_equal(luthier.compile(made, target="webgpu").run({"x": x})["y"], want(x))


# ---------------------------------------------------------------- subgroups

ROWS = ["softmax", "softmax, odd", "softmax, open", "softmax, long", "layer norm", "vector, rows", "attention, one row"]


@pytest.mark.parametrize("name", ROWS)
def test_interpreted_with_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loop over a subgroup means, and the two steps that take its place."""
    monkeypatch.setattr("luthier.schedules.select.privatize_threads", lambda f: f)
    p = program(*RUN[name][0])
    feeds = feeds_of(*RUN[name])
    loops = [s for f in p.kernels.values() for s in walk_stmts(f.body) if isinstance(s, For)]
    assert any(s.kind == "subgroup" for s in loops)
    one = run_program(p, feeds)["y"]
    p.kernels.update({n: spread_subgroups(f) for n, f in p.kernels.items()})
    assert not any(s.kind == "subgroup" for f in p.kernels.values() for s in walk_stmts(f.body) if isinstance(s, For))
    other = run_program(p, feeds)["y"]
    want = exact(name, feeds)
    for got in (one, other):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(np.abs(want).max()))


def exact(name: str, feeds: dict[str, Array]) -> Array:
    """The result in f64."""
    if name.startswith("attention"):
        q, k, v = (feeds[n].astype(np.float64) for n in "qkv")
        e = np.exp(q @ k.transpose(0, 1, 3, 2))
        return e / e.sum(-1, keepdims=True) @ v
    x = feeds["x"].astype(np.float64)
    w: dict[str, Array] = RUN[name][0][2] or {}
    if name.startswith("softmax"):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    if name == "layer norm":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["s"] + w["b"]
    return x @ w["w"].astype(np.float64).T


@pytest.mark.parametrize("name", ROWS)
def test_subgroups_on_a_device(name: str) -> None:
    """The kernel with subgroup operations, whatever the size of a subgroup is, beside the one without."""
    pytest.importorskip("wgpu")
    from luthier.codegen.gpu.wgsl_run import device, run_wgsl

    try:
        d = device()
    except TargetError as e:
        pytest.skip(str(e))
    if "subgroup" not in d.features:
        pytest.skip("the adapter has no subgroups")
    feeds = feeds_of(*RUN[name])
    want = exact(name, feeds)
    p = program(*RUN[name][0])
    (call,) = [s for s in walk_stmts(p.body) if isinstance(s, Call) and s.callee in p.kernels]
    f = p.kernels[call.callee]
    outs: list[Array] = []
    for on in (True, False):
        sh = print_wgsl(legalize_wgsl(f, features=("subgroups",) if on else ()))
        assert ("subgroupAdd(" in sh.source) == on and (sh.features == ("subgroups",)) == on
        outs.append(np.zeros(want.shape, np.float32))
        known = {**p.constants, **feeds, "y": outs[-1]}
        args = dict(zip(f.params, call.args, strict=True))
        sizes = {v: feeds[p.inputs[j].name].shape[axis] for v, (j, axis) in p.dims.items()}
        run_wgsl(sh, {b.name: known[a.name] for b, a in args.items() if isinstance(b, Buffer)}, {v.attr[0]: sizes[a] for v, a in args.items() if isinstance(v, Expr)})
    for out in outs:
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5 * float(np.abs(want).max()))


def test_spread_has_its_barriers() -> None:
    """160 partial results in shared memory, merged by threads of which only sixteen do the first step."""
    x, y = Buffer.of("X", f32, (160,), writable=False), Buffer.of("Y", f32, (1,))
    p, acc = Buffer.of("p", f32, (160,), "shared"), Buffer("acc", f32, (), "local")
    fill = loop("t", 160, "thread.x", lambda t: Store(p, (t,), x[t]))
    merge = loop("i", 160, "subgroup", lambda i: Store(acc, (), load(acc, ()) + p[i]))
    body = Alloc(p, Alloc(acc, block(fill, Store(acc, (), const(0.0, f32)), merge, Store(y, (const(0),), load(acc, ())))))
    f = spread_subgroups(place_barriers(privatize_threads(flatten(Func("f", (x, y), body)))))
    out = np.zeros(1, np.float32)
    run_func(f, {"X": normal(160), "Y": out}, {})
    np.testing.assert_allclose(out[0], normal(160).astype(np.float64).sum(), rtol=1e-5)


def test_dawn_accepts_them() -> None:
    """Every kernel of this file, with and without subgroups: their operations stand where control flow is uniform."""
    from tests.gate import dawn

    if dawn.missing():
        pytest.skip(str(dawn.missing()))
    shaders = [
        replace(print_wgsl(legalize_wgsl(f, features=("subgroups",) if on else ())), name=f"{name}, {on}")
        for name, (args, _) in RUN.items() for f in program(*args).kernels.values() for on in (True, False)
    ]  # fmt: skip
    assert dawn.refused(shaders) == {}
