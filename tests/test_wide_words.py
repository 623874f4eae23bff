"""Values of two 32-bit words on WebGPU: every function against numpy on numbers at the edges, the ranges that decide who needs them,
and models whose integers leave 32 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

import luthier
from luthier.codegen import wgsl_wide
from luthier.codegen.wgsl import legalize_wgsl, print_wgsl
from luthier.errors import InputError, TargetError
from luthier.ir.compute import axis
from luthier.ir.dtypes import DType, boolean, f16, f32, f64, i8, i16, i32, i64, u8, u32, u64
from luthier.ir.expr import Expr, binary, bitcast, cast, compare, const, load, maximum, minimum, select, unary, var
from luthier.ir.loop import Alloc, Buffer, For, Func, Let, Store, block
from luthier.ir.semantics import convert, evaluate
from luthier.passes.integer_ranges import IntegerRanges
from luthier.webgpu_module import WebGpuModule
from tests.gate import dawn

Array = np.ndarray[Any, Any]
N = 512


@pytest.fixture(scope="module")
def adapter() -> None:
    pytest.importorskip("wgpu")
    from luthier.webgpu_device import device

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
    assert [n for n in wgsl_wide.FUNCTIONS if f"{n}(" not in text] == ["w_u_near", "w_i_near"][::-1] or all(n in ("w_i_near", "w_u_near") for n in wgsl_wide.FUNCTIONS if f"{n}(" not in text)


@pytest.mark.parametrize(("name", "f", "ins", "out", "want"), KERNELS, ids=[k[0] for k in KERNELS])
def test_against_numpy(name: str, f: Func, ins: tuple[DType, ...], out: DType, want: Any, adapter: None) -> None:
    from luthier.codegen.wgsl_run import run_wgsl

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
