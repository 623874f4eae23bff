"""GPU schedules without a GPU: the interpreter runs their kernels, NVRTC compiles them; passes that only GPU printers use."""

from __future__ import annotations

from collections.abc import Callable
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
from luthier.ir.dtypes import f32, i32, u32
from luthier.ir.expr import bitcast, const, load, var
from luthier.ir.interpret.loops import run_func
from luthier.ir.interpret.programs import run_program
from luthier.ir.loop import Alloc, Barrier, Buffer, For, Func, Store, block, walk_stmts
from luthier.ir.program import Program
from luthier.passes.gpu.merge_bindings import merge_bindings
from luthier.passes.gpu.offset_buffers import offset_buffers
from luthier.passes.gpu.privatize_threads import privatize_threads
from luthier.passes.gpu.split_grid import split_grid
from luthier.passes.loop.place_barriers import place_barriers
from luthier.pipeline import compile_program

Array = np.ndarray[Any, Any]


Make = Callable[[], Program]


def program(nodes: Any, inputs: dict[str, tuple[Any, ...]], weights: dict[str, Array] | None = None) -> Make:
    ins = [h.make_tensor_value_info(n, T.FLOAT, list(s)) for n, s in inputs.items()]
    g = h.make_graph(nodes, "g", ins, [h.make_tensor_value_info("y", T.FLOAT, None)], [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()])
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    return lambda: compile_program(import_onnx(m), parse_target("webgpu").caps)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


W = normal(37, 41, seed=5)
Q = [normal(1, 2, 9, 8, seed=k) for k in range(3)]
CASES: dict[str, tuple[Make, dict[str, Array], Array, str]] = {
    "softmax": (program([h.make_node("Softmax", ["x"], ["y"])], {"x": ("n", 70)}), {"x": normal(3, 70)}, softmax(normal(3, 70)), "gpu_rowwise"),
    "product": (program([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": ("n", 37)}, {"w": W}), {"x": normal(19, 37)}, normal(19, 37) @ W, "gpu_contract"),
    "vector": (program([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": (1, 37)}, {"w": W}), {"x": normal(1, 37)}, normal(1, 37) @ W, "gpu_rowwise"),
    "attention": (
        program(
            [h.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]), h.make_node("MatMul", ["q", "t"], ["s"]), h.make_node("Softmax", ["s"], ["p"]), h.make_node("MatMul", ["p", "v"], ["y"])],
            {n: (1, 2, 9, 8) for n in "qkv"},
        ),
        dict(zip("qkv", Q, strict=True)), softmax(Q[0] @ Q[1].transpose(0, 1, 3, 2)) @ Q[2], "gpu_attention",
    ),
    "points": (program([h.make_node("Abs", ["x"], ["y"])], {"x": (5, 33)}), {"x": normal(5, 33)}, np.abs(normal(5, 33)), "gpu_elementwise"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the schedules mean: threads in lock-step between barriers, poisoned memory. The interpreter has one copy of a local
    buffer for all threads of a group, so its dimension for the threads stays."""
    monkeypatch.setattr("luthier.schedules.select.privatize_threads", lambda f: f)
    make, feeds, want, template = CASES[name]
    p = make()
    assert template in {f.attrs.get("template") for f in p.kernels.values()}
    assert all(any(isinstance(s, For) and "." in s.kind for s in walk_stmts(f.body)) for f in p.kernels.values())
    got = run_program(p, feeds)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_same_kernels_in_cuda(name: str) -> None:
    from luthier.codegen.gpu.nvrtc import compile_kernel, library

    try:
        library()
    except TargetError as e:
        pytest.skip(str(e))
    for f in CASES[name][0]().kernels.values():
        k = print_cuda(legalize_cuda(f))
        assert compile_kernel(k.source, name=f.name).cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", CASES)
def test_within_the_default_limits(name: str) -> None:
    for f in CASES[name][0]().kernels.values():
        sh = print_wgsl(legalize_wgsl(f))
        assert sh.group[0] * sh.group[1] * sh.group[2] <= 256 and len(sh.buffers) <= 8
        shared = sum(s.buf.size().attr * 4 for s in walk_stmts(f.body) if isinstance(s, Alloc) and s.buf.scope == "shared")
        assert shared <= 16 << 10


# ---------------------------------------------------------------- passes


def loop(name: str, n: Any, kind: str, body: Any) -> For:
    e = const(n) if isinstance(n, int) else n
    v = var(name, lo=0, hi=e - 1)
    return For(v, const(0), e, kind, body(v))


def test_split_grid() -> None:
    """65,537 groups do not fit one dimension of 65,535; every element is still written once."""
    n = var("n", lo=1)
    y = Buffer.of("Y", i32, (n,))
    f = Func("f", (y, n), loop("b", n, "block.x", lambda b: Store(y, (b,), load(y, (b,)) + 1)))
    g = split_grid(f, limit=7)
    assert {s.kind for s in walk_stmts(g.body) if isinstance(s, For)} == {"block.x", "block.y"}
    a = np.zeros(17, np.int32)
    run_func(g, {"Y": a}, {"n": 17})
    np.testing.assert_array_equal(a, np.ones(17, np.int32))
    small = Func("s", (Buffer.of("Y", i32, (5,)),), loop("b", 5, "block.x", lambda b: Store(Buffer.of("Y", i32, (5,)), (b,), const(1, i32))))
    assert split_grid(small) is small


def test_offsets_and_merged_bindings() -> None:
    """``Y = A + bits(B)`` with all three in one array of words, each from its own offset."""
    a, b, y = Buffer.of("A", f32, (4,), writable=False), Buffer.of("B", u32, (4,), writable=False), Buffer.of("Y", f32, (4,))
    f = Func("f", (a, b, y), loop("i", 4, "serial", lambda i: Store(y, (i,), a[i] + bitcast(b[i], f32))))
    g = merge_bindings(offset_buffers(f, ["A", "B", "Y"]), [["A", "B", "Y"]])
    assert [p.name for p in g.buffers] == ["A"] and [v.attr[0] for v in g.scalars] == ["A.at", "B.at", "Y.at"]
    words = np.zeros(20, np.float32)
    words[1:5], words[6:10] = normal(4), normal(4, seed=1)
    run_func(g, {"A": words.view(np.uint32)}, {"A.at": 1, "B.at": 6, "Y.at": 12})
    np.testing.assert_array_equal(words[12:16], words[1:5] + words[6:10])


def test_tiles_of_threads_are_private() -> None:
    """``acc[r * 4 + t]`` of four threads becomes ``acc[r]``, an index that threads do not own stays."""
    y = Buffer.of("Y", f32, (12,))
    acc = Buffer.of("acc", f32, (12,), "local")
    fill = loop("t", 4, "thread.x", lambda t: loop("r", 3, "serial", lambda r: Store(acc, (r * 4 + t,), const(2.0, f32))))
    read = loop("u", 4, "thread.x", lambda t: loop("q", 3, "serial", lambda r: Store(y, (r * 4 + t,), acc[r * 4 + t])))
    g = privatize_threads(Func("f", (y,), Alloc(acc, block(fill, read))))
    assert next(s.buf.shape for s in walk_stmts(g.body) if isinstance(s, Alloc)) == (const(3),)
    other = loop("u", 4, "thread.x", lambda t: loop("q", 3, "serial", lambda r: Store(y, (r * 4 + t,), acc[t * 3 + r])))
    h2 = Func("f", (y,), Alloc(acc, block(fill, other)))
    assert privatize_threads(h2) is h2


def test_filling_a_tile_needs_one_barrier() -> None:
    s = Buffer.of("s", f32, (64,), "shared")
    y = Buffer.of("Y", f32, (64,))
    fill = loop("k", 4, "serial", lambda k: loop("t", 16, "thread.x", lambda t: Store(s, (k * 16 + t,), const(1.0, f32))))
    use = loop("u", 16, "thread.x", lambda t: Store(y, (t,), s[63 - t]))
    f = place_barriers(Func("f", (y,), Alloc(s, block(fill, use))))
    assert sum(isinstance(x, Barrier) for x in walk_stmts(f.body)) == 1
    mixed = loop("k", 4, "serial", lambda k: loop("t", 16, "thread.x", lambda t: Store(s, (t,), s[(t + 1) % 16] + 1.0)))
    g = place_barriers(Func("g", (y,), Alloc(s, block(mixed, use))))
    assert sum(isinstance(x, Barrier) for x in walk_stmts(g.body)) == 2
