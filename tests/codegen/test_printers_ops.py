"""Every scalar operator in every type: WebAssembly (scalar and in lanes) and WGSL against the definitions in ir.semantics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from luthier.codegen.gpu.cuda import legalize_cuda, print_cuda
from luthier.errors import TargetError
from luthier.ir.dtypes import DType, bf16, boolean, f16, f32, f64, i8, i16, i32, i64, u8, u16, u32, u64
from luthier.ir.expr import COMPARE, Expr, binary, cast, compare, const, load, select, unary, var
from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import Buffer, For, Func, Store, block
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.select import build_kernel
from tests.cuda import need_compiler, run_cuda

INTS = [i8, u8, i16, u16, i32, u32, i64, u64]
FLOATS = [f32, f64]
N = 64
WASM = Capabilities(vector_bits=128, index_bits=32)
SCALAR = Capabilities(vector_bits=32, gpu=True, index_bits=32)


def values(d: DType, rng: np.random.Generator) -> Any:
    """Random values and every awkward one."""
    if d.is_bool:
        return rng.integers(0, 2, N).astype(np.bool_)
    if d.is_float:
        v = (rng.standard_normal(N) * 100).astype(d.numpy)
        special = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, np.inf, -np.inf, np.nan, 1e9, -1e9, 3e38 if d.bits > 16 else 6e4, 128.0, -129.0, 255.5, 70000.0]
        v[: len(special)] = np.array(special).astype(d.numpy)
        return v
    lo, hi = d.limits()
    v = rng.integers(lo, hi, N, endpoint=True, dtype=d.numpy)
    v[:12] = np.array([0, 1, lo, hi, lo + 1, hi - 1, 2, 3, 7, 8, 31, 64], dtype=object).astype(d.numpy)
    v[12:28] = rng.integers(0, 9, 16).astype(d.numpy)
    if d.is_signed:
        v[28:36] = -1
    return v


def kernel(ins: list[DType], group: list[Any], lanes: int, name: str = "ops") -> Func:
    """``Y<type>[k, i] = make_k(A[i], B[i])`` for the cases (out, make) of a group, in vectors of ``lanes``."""
    bufs = [Buffer.of(n, d, (N,), writable=False) for n, d in zip("AB", ins, strict=False)]
    outs: dict[DType, int] = {}
    stores: list[Any] = []
    o, v = var("o", lo=0, hi=N // lanes - 1), var("v", lo=0, hi=lanes - 1)
    i: Expr = o * lanes + v
    sizes = {d: sum(out is d for out, _, _ in group) for d in {out for out, _, _ in group}}
    for out, make, _ in group:
        y = Buffer.of(f"Y{out.name}", out, (sizes[out], N))
        stores.append(Store(y, (const(outs.setdefault(out, 0)), i), make(*(load(b, (i,)) for b in bufs))))
        outs[out] += 1
    ys = [Buffer.of(f"Y{d.name}", d, (sizes[d], N)) for d in outs]
    body = For(v, const(0), const(lanes), "vectorize" if lanes > 1 else "serial", block(*stores))
    return Func(name, (*bufs, *ys), For(o, const(0), const(N // lanes), "serial", body))


def cases() -> list[Any]:
    out: list[Any] = []
    for d in INTS + FLOATS:
        ops = ["add", "sub", "mul", "div", "rem", "min", "max"]
        if not d.is_float:
            ops += ["floordiv", "mod", "and", "or", "xor", "shl", "shr"]
        for op in ops:
            out.append(pytest.param(d, [d, d], lambda a, b, op=op: binary(op, a, b), id=f"{op}-{d}"))
        uns = ["neg", "abs"] + (["floor", "ceil", "round", "trunc", "sqrt"] if d.is_float else ["not", "popcount"])
        for op in uns:
            out.append(pytest.param(d, [d], lambda a, op=op: unary(op, a), id=f"{op}-{d}"))
        for op in sorted(COMPARE):
            out.append(pytest.param(boolean, [d, d], lambda a, b, op=op: compare(op, a, b), id=f"{op}-{d}"))
        out.append(pytest.param(d, [d, d], lambda a, b: select(a < b, a, b), id=f"select-{d}"))
        for to in [*INTS, *FLOATS, boolean]:
            if to is not d:
                out.append(pytest.param(to, [d], lambda a, to=to: cast(a, to), id=f"{d}-to-{to}"))
        out.append(pytest.param(d, [boolean], lambda a, d=d: cast(a, d), id=f"bool-to-{d}"))
        if not d.is_float:
            for k in (3, 8, 0 if d.is_float else 5):
                out.append(pytest.param(d, [d], lambda a, k=k: binary("floordiv", a, k) + binary("mod", a, k), id=f"by{k}-{d}"))
            out.append(pytest.param(d, [d], lambda a: binary("shl", a, 3) ^ binary("shr", a, 2), id=f"shift-{d}"))
    for d in FLOATS:
        out += [pytest.param(boolean, [d], lambda a, op=op: unary(op, a), id=f"{op}-{d}") for op in ("isnan", "isinf")]
    for op in ("and", "or", "xor"):
        out.append(pytest.param(boolean, [boolean, boolean], lambda a, b, op=op: binary(op, a, b), id=f"{op}-bool"))
    out.append(pytest.param(boolean, [boolean], lambda a: unary("not", a), id="not-bool"))
    for d in (f16, bf16):
        for op in ("add", "mul", "div", "max"):
            out.append(pytest.param(d, [d, d], lambda a, b, op=op: binary(op, a, b), id=f"{op}-{d}"))
        out.append(pytest.param(f32, [d], lambda a: cast(a, f32), id=f"{d}-to-f32"))
        out.append(pytest.param(d, [f32], lambda a, d=d: cast(a, d), id=f"f32-to-{d}"))
    return out


CASES = cases()
Group = tuple[list[DType], list[tuple[DType, Any, str]]]


def groups(by_out: bool) -> dict[str, Group]:
    """Cases that share their operands (and, for lanes of one width, their result type): {name: (ins, [(out, make, id)])}."""
    res: dict[str, Group] = {}
    for c in CASES:
        out, ins, make = c.values
        key = "-".join(d.name for d in ins) + (f"-to-{out.name}" if by_out else "")
        res.setdefault(key, (ins, []))[1].append((out, make, c.id))
    return res


BY_TYPES = groups(True)
BY_OPERANDS = groups(False)


def outputs(f: Func) -> dict[str, Any]:
    return {b.name: np.zeros([int(s.attr) for s in b.shape], b.dtype.numpy) for b in f.buffers if b.writable}


def same(got: dict[str, Any], want: dict[str, Any], group: list[tuple[DType, Any, str]], loose: Any = None) -> None:
    """Equal bit for bit (NaN equals NaN): all these operators are exact or correctly rounded. ``loose(id)``: allowed relative error."""
    at: dict[str, int] = {}
    for out, _, name in group:
        y = f"Y{out.name}"
        k = at[y] = at.get(y, -1) + 1
        g, w = got[y][k].astype(np.float64), want[y][k].astype(np.float64)
        tol = 0.0 if loose is None else loose(name)
        np.testing.assert_allclose(g, w, rtol=tol, atol=0, err_msg=name)


@pytest.mark.parametrize("lanes", [1, 4], ids=["scalar", "lanes"])
@pytest.mark.parametrize("name", list(BY_TYPES))
def test_wasm(name: str, lanes: int) -> None:
    pytest.importorskip("wasmtime")
    from luthier.codegen.wasm.printer import legalize_wasm
    from luthier.codegen.wasm.run import run_wasm

    ins, group = BY_TYPES[name]
    outs = [group[0][0]]
    wide = [32 if d in (f16, bf16) else d.bits for d in [*ins, *outs]]
    f = kernel(ins, group, 1 if lanes == 1 else 128 // max(wide))
    rng = np.random.default_rng(3)
    arrays: dict[str, Any] = {n: values(d, rng) for n, d in zip("AB", ins, strict=False)}
    want, got = outputs(f), outputs(f)
    run_func(f, {**arrays, **want})
    run_wasm(legalize_wasm(build_kernel(f, WASM)), {**arrays, **got}, relaxed_simd=False)
    same(got, want, group)


@pytest.fixture(scope="module")
def adapter() -> Iterator[None]:
    pytest.importorskip("wgpu")
    from luthier.codegen.gpu.wgsl_run import device

    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))
    yield


def _wgsl_defined(d: DType, v: Any) -> Any:
    """WGSL may assume that no infinity and NaN occur; 64-bit integers are carried in 32 bits."""
    if d.is_float:
        return np.where(np.isfinite(v.astype(np.float32)), v, np.array(3, v.dtype)).astype(v.dtype)
    if d.is_int and d.bits == 64:
        return (v % 1000).astype(v.dtype)
    return v


def _wgsl_loose(name: str) -> float:
    """WGSL grants division and square root 2.5 ULP; one step of the 16-bit types where that changes the rounding."""
    if name in ("div-f32", "sqrt-f32"):
        return 3e-7
    return {"div-f16": 1e-3, "div-bf16": 8e-3}.get(name, 0.0)


def _wgsl_group(name: str) -> tuple[list[DType], list[tuple[DType, Any, str]]]:
    """Without f64, and without results that do not fit the 32 bits in which 64-bit integers are carried."""
    ins, group = BY_OPERANDS[name]
    keep = [c for c in group if c[0] is not f64 and not c[2].startswith(("isnan", "isinf", "nan"))]
    if any(d.is_int and d.bits == 64 for d in ins):
        keep = [c for c in keep if not c[2].startswith(("sub", "neg", "not", "shl", "shift", "mul"))]
    elif any(d.is_float for d in ins) or ins == [u32] or ins == [i32] or ins[0].is_signed:
        keep = [c for c in keep if not (c[0].is_int and c[0].bits == 64)]
    return ins, keep


@pytest.mark.parametrize("name", [n for n, (ins, _) in BY_OPERANDS.items() if f64 not in ins])
def test_wgsl(name: str, adapter: None) -> None:
    from luthier.codegen.gpu.wgsl import legalize_wgsl, print_wgsl
    from luthier.codegen.gpu.wgsl_run import run_wgsl

    ins, group = _wgsl_group(name)
    rng = np.random.default_rng(3)
    arrays: dict[str, Any] = {n: _wgsl_defined(d, values(d, rng)) for n, d in zip("AB", ins, strict=False)}
    for d in dict.fromkeys(c[0] for c in group):  # one result type a shader: few bindings
        part = [c for c in group if c[0] is d]
        f = kernel(ins, part, 1)
        want, got = outputs(f), outputs(f)
        run_func(f, {**arrays, **want})
        run_wgsl(print_wgsl(legalize_wgsl(build_kernel(f, SCALAR))), {**arrays, **got}, {})
        same(got, want, part, _wgsl_loose)


@pytest.mark.parametrize("name", [n for n, (ins, group) in BY_OPERANDS.items() if f64 not in ins and f16 in {*ins, *(c[0] for c in group)}])
def test_wgsl_native_half(name: str, adapter: None) -> None:
    """f16 as a type of the device: the same results, but for one step of the type where the device rounds otherwise."""
    from luthier.codegen.gpu.webgpu_features import F16
    from luthier.codegen.gpu.wgsl import legalize_wgsl, print_wgsl
    from luthier.codegen.gpu.wgsl_run import features, run_wgsl

    if F16 not in features():
        pytest.skip("the adapter lacks shader-f16")
    ins, group = _wgsl_group(name)
    rng = np.random.default_rng(3)
    arrays: dict[str, Any] = {n: _wgsl_defined(d, values(d, rng)) for n, d in zip("AB", ins, strict=False)}
    for d in dict.fromkeys(c[0] for c in group):
        part = [c for c in group if c[0] is d]
        f = kernel(ins, part, 1)
        want, got = outputs(f), outputs(f)
        run_func(f, {**arrays, **want})
        shader = print_wgsl(legalize_wgsl(build_kernel(f, SCALAR), features=(F16,)))
        assert (shader.features == (F16,)) == (f16 in (d, *ins)) and "unpack2x16float" not in shader.source
        run_wgsl(shader, {**arrays, **got}, {})
        same(got, want, part, lambda c, d=d: 1e-3 if d is f16 else _wgsl_loose(c))


def test_wgsl_float_remainder(adapter: None) -> None:
    """Exact for all magnitudes: numpy's fmod is C's. Subnormals, which WGSL may flush, are left out."""
    from luthier.codegen.gpu.wgsl import legalize_wgsl, print_wgsl
    from luthier.codegen.gpu.wgsl_run import run_wgsl

    special = np.array([0.0, -0.0, 1.0, -1.0, 3.5, np.inf, -np.inf, np.nan, 1e30, -1e30, np.finfo(np.float32).max, np.finfo(np.float32).tiny], np.float32)
    rng = np.random.default_rng(3)
    wide = (rng.standard_normal(200) * 10.0 ** rng.integers(-20, 20, 200)).astype(np.float32)
    x, y = (v.reshape(-1) for v in np.meshgrid(np.concatenate([special, wide[:60]]), np.concatenate([special, wide[60:120]])))
    with np.errstate(all="ignore"):
        want = np.fmod(x, y)
    kept = ~((0 < np.abs(want)) & (np.abs(want) < np.finfo(np.float32).tiny))
    a, b, o = (Buffer.of(k, f32, (x.size,), writable=k == "O") for k in "ABO")
    i = var("i", lo=0, hi=x.size - 1)
    f = Func("rem", (a, b, o), For(i, const(0), const(x.size), "parallel", Store(o, (i,), binary("rem", load(a, (i,)), load(b, (i,))))))
    got = np.zeros_like(x)
    run_wgsl(print_wgsl(legalize_wgsl(f)), {"A": x, "B": y, "O": got}, {})
    np.testing.assert_array_equal(got[kept], want[kept])
    known = kept & ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(want[known]))


@pytest.mark.parametrize("name", list(BY_OPERANDS))
def test_cuda(name: str) -> None:
    """Emulated: the printed text, compiled for this processor."""
    need_compiler()
    ins, group = BY_OPERANDS[name]
    rng = np.random.default_rng(3)
    arrays: dict[str, Any] = {n: values(d, rng) for n, d in zip("AB", ins, strict=False)}
    f = kernel(ins, group, 1)
    want, got = outputs(f), outputs(f)
    run_func(f, {**arrays, **want})
    run_cuda(print_cuda(legalize_cuda(build_kernel(f, SCALAR))), {**arrays, **got}, {})
    same(got, want, group)


def test_cuda_compiles_every_operator() -> None:
    from luthier.codegen.gpu.nvrtc import compile_kernel, library

    try:
        library()
    except TargetError as e:
        pytest.skip(str(e))
    parts = []
    for k, (ins, group) in enumerate(BY_OPERANDS.values()):
        parts.append(print_cuda(legalize_cuda(build_kernel(kernel(ins, group, 1, f"op{k}"), SCALAR))).source)
    assert compile_kernel("\n".join(parts)).cubin[:4] == b"\x7fELF"
