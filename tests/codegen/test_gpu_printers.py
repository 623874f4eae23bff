"""WGSL and CUDA: shared memory and barriers, uniforms, packed elements, names, launch shapes, refusals."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from luthier.codegen.gpu.cuda import legalize_cuda, print_cuda
from luthier.codegen.gpu.wgsl import legalize_wgsl, print_wgsl
from luthier.errors import CompilationError, TargetError
from luthier.ir.dtypes import DType, boolean, f16, f32, i4, i8, i64, u4, u8, u16
from luthier.ir.expr import Expr, cast, const, free_vars, load, select, var
from luthier.ir.interpret.loops import evaluate_expr, run_func
from luthier.ir.loop import Alloc, Barrier, Buffer, For, Func, If, Store, block
from luthier.passes.loop.lower_subbyte import is_subbyte, pack_array, unpack_array
from tests.cuda import need_compiler, run_cuda
from tests.gate import dawn


def loop(v: Expr, n: Any, kind: str, *body: Any) -> For:
    return For(v, const(0), const(n) if isinstance(n, int) else n, kind, block(*body))


def tree_sum() -> Func:
    """Sums of rows of 64: each thread loads one element, then halves meet in shared memory. The number of rows is a scalar."""
    n = var("rows", lo=1)
    a, y = Buffer.of("A", f32, (n, 64), writable=False), Buffer.of("Y", f32, (n,))
    s = Buffer.of("s", f32, (64,), "shared")
    b, t = var("b", lo=0, hi=n - 1), var("t", lo=0, hi=63)
    steps = [x for h in (32, 16, 8, 4, 2, 1) for x in (If(t < const(h), Store(s, (t,), s[t] + s[t + h])), Barrier("shared"))]
    thread = loop(t, 64, "thread.x", Store(s, (t,), a[b, t]), Barrier("shared"), *steps, If(t.eq(0), Store(y, (b,), s[0])))
    return Func("tree_sum", (a, y, n), loop(b, n, "block.x", Alloc(s, thread)))


def names() -> Func:
    """Names that are keywords or illegal in the languages, and two that become equal when cleaned."""
    a, c = Buffer.of("let", f32, (8,), writable=False), Buffer.of("x.y", f32, (8,))
    d = Buffer.of("x_y", f32, (8,))
    i = var("for~1", lo=0, hi=7)
    return Func("names", (a, c, d), loop(i, 8, "parallel", Store(c, (i,), a[i] + 1.0), Store(d, (i,), a[i] * 2.0)))


def two_sizes() -> Func:
    """Two thread loops of different extents in one group: the shorter one is guarded."""
    a, y = Buffer.of("A", f32, (3, 10), writable=False), Buffer.of("Y", f32, (3, 10))
    s = Buffer.of("s", f32, (10,), "shared")
    b, t, u = var("b", lo=0, hi=2), var("t", lo=0, hi=9), var("u", lo=0, hi=4)
    body = block(
        loop(t, 10, "thread.x", Store(s, (t,), a[b, t])), Barrier("shared"),
        loop(u, 5, "thread.x", Store(y, (b, u), s[9 - u]), Store(y, (b, u + 5), s[u])),
    )
    return Func("two_sizes", (a, y), loop(b, 3, "block.x", Alloc(s, body)))


def packed(d: DType, out: DType) -> Func:
    n = 37
    x, y = Buffer.of("X", d, (n,), writable=False), Buffer.of("Y", out, (n,))
    i = var("i", lo=0, hi=n - 1)
    v = load(x, (i,))
    value = select(v < const(3, d), v, const(3, d)) if out is d else cast(v < const(3, d), out)
    return Func(f"packed_{d}_{out}", (x, y), loop(i, n, "parallel", Store(y, (i,), value)))


PACKED = [packed(u8, u8), packed(i8, boolean), packed(u16, u16), packed(f16, f16), packed(i64, i64), packed(f32, boolean), packed(i64, f32)]
ALL = [tree_sum(), names(), two_sizes(), *PACKED]


def arrays_of(f: Func, dims: dict[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    res = {}
    for b in f.buffers:
        shape = [int(evaluate_expr(s, {v: dims[v.attr[0]] for v in free_vars(s)})) for s in b.shape]
        d = b.dtype
        v = rng.standard_normal(shape) * 5
        res[b.name] = np.zeros(shape, d.numpy) if b.writable else v.astype(d.numpy) if d.is_float or d.is_signed else np.abs(v).astype(d.numpy)
    return res


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_wgsl_runs(f: Func) -> None:
    pytest.importorskip("wgpu")
    from luthier.codegen.gpu.wgsl_run import device, run_wgsl

    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))
    dims = {"rows": 5}
    want = arrays_of(f, dims)
    got = {k: v.copy() for k, v in want.items()}
    run_func(f, want, dims)
    run_wgsl(print_wgsl(legalize_wgsl(f)), got, dims)
    for k in want:
        np.testing.assert_array_equal(got[k], want[k], err_msg=k)


@pytest.mark.parametrize("f", [*ALL, packed(u4, u4), packed(i4, i4)], ids=lambda f: f.name)
def test_cuda_runs(f: Func) -> None:
    """Elements of four bits are parts of words, of which two threads store."""
    need_compiler()
    dims = {"rows": 5}
    want = arrays_of(f, dims)
    got = {b.name: pack_array(want[b.name], b.dtype) if is_subbyte(b.dtype) else want[b.name].copy() for b in f.buffers}
    run_func(f, want, dims)
    k = print_cuda(legalize_cuda(f))
    run_cuda(k, got, dims)
    for b in f.buffers:
        a = unpack_array(got[b.name], b.dtype, want[b.name].shape) if is_subbyte(b.dtype) else got[b.name]
        np.testing.assert_array_equal(a, want[b.name].astype(a.dtype), err_msg=b.name)
    assert ("atomicOr" in k.source) == any(is_subbyte(b.dtype) for b in f.buffers)


def test_sum_is_the_sum() -> None:
    """The interpreter's tree sum against numpy."""
    f, dims = tree_sum(), {"rows": 3}
    a = arrays_of(f, dims)
    run_func(f, a, dims)
    np.testing.assert_allclose(a["Y"], a["A"].astype(np.float64).sum(1), rtol=1e-5, atol=1e-5)


def test_dawn_accepts() -> None:
    if dawn.missing():
        pytest.skip(dawn.missing())
    assert dawn.refused([print_wgsl(legalize_wgsl(f)) for f in ALL]) == {}


def test_nvrtc_accepts() -> None:
    from luthier.codegen.gpu.nvrtc import compile_kernel, library

    try:
        library()
    except TargetError as e:
        pytest.skip(str(e))
    for f in ALL:
        assert compile_kernel(print_cuda(legalize_cuda(f)).source, name=f.name).cubin[:4] == b"\x7fELF"
    with pytest.raises(CompilationError, match="undefined"):
        compile_kernel("__global__ void k() { nothing_of_this_name(); }")


def test_launch_shape() -> None:
    sh = print_wgsl(legalize_wgsl(tree_sum()))
    assert sh.group == (64, 1, 1)
    assert [int(evaluate_expr(e, {v: 7 for v in free_vars(e)})) for e in sh.grid] == [7, 1, 1]
    k = print_cuda(legalize_cuda(two_sizes()))
    assert k.group == (10, 1, 1) and "__shared__ float" in k.source and k.source.count("__syncthreads") == 1


def test_text(golden: Any) -> None:
    golden("codegen/tree_sum.wgsl", print_wgsl(legalize_wgsl(tree_sum())).source)
    golden("codegen/tree_sum.cu", print_cuda(legalize_cuda(tree_sum())).source)
    golden("codegen/packed.wgsl", print_wgsl(legalize_wgsl(packed(i8, boolean))).source)


def test_refusals() -> None:
    y = Buffer.of("Y", f32, (8,))
    t = var("t", lo=0, hi=3)
    u = var("u", lo=0, hi=7)
    bad = Func("b", (y,), block(loop(t, 4, "thread.x", Store(y, (t,), const(1, f32)), Barrier("shared")), loop(u, 8, "thread.x", Store(y, (u,), const(2, f32)))))
    with pytest.raises(CompilationError, match="barrier"):
        print_wgsl(legalize_wgsl(bad))
    n = var("n", lo=1)
    scratch = Buffer.of("w", f32, (n,), "local")
    dyn = Func("d", (y, n), Alloc(scratch, block(Store(scratch, (const(0),), const(1, f32)), Store(y, (const(0),), scratch[0]))))
    with pytest.raises(CompilationError, match="run-time size"):
        print_wgsl(legalize_wgsl(dyn))
    with pytest.raises(CompilationError, match="run-time size"):
        print_cuda(legalize_cuda(dyn))
