"""The LLVM printer against the meaning of the operators (numpy, ``luthier.ir.interpret.semantics``), and what it may never emit."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from luthier.codegen.llvm.backend import Library, assembly, compile_text
from luthier.codegen.llvm.printer import parallel_loop, print_kernels
from luthier.codegen.targets.target import Target, host, parse_target
from luthier.errors import CompilationError, TargetError
from luthier.ir.compute import Compute, axis, pull, sum_
from luthier.ir.dtypes import DType, bf16, boolean, f16, f32, f64, i8, i16, i32, i64, index, u8, u16, u32, u64
from luthier.ir.expr import (
    Expr,
    bcast,
    binary,
    cast,
    compare,
    const,
    extract,
    load,
    ramp,
    select,
    shuffle,
    unary,
    var,
    vreduce,
)
from luthier.ir.interpret.semantics import convert, evaluate
from luthier.ir.loop import Alloc, Block, Buffer, For, Func, If, Let, Store, While
from luthier.schedules.select import build

Array = np.ndarray[Any, Any]
V2 = "cpu:x86-64-v2"


def runnable(name: str) -> Target:
    t = parse_target(name)
    if t.missing_here():
        pytest.skip(f"this machine cannot run {name}: it lacks {sorted(t.missing_here())[:3]}")
    return t


def run(f: Func, arrays: Sequence[Array], scalars: Sequence[int] = (), target: Target | None = None, lo: int = 0, hi: int = 0) -> None:
    """Compile ``f`` and run it on the arrays of its buffers, which it changes in place."""
    text = print_kernels([("kernel", f)], target or host()).replace("define hidden", "define")
    lib = Library([compile_text(text, target or host())], ["kernel"])
    types = [ctypes.c_void_p] * len(arrays) + [ctypes.c_int64] * (len(scalars) + 2)
    ctypes.CFUNCTYPE(None, *types)(lib.address("kernel"))(*[a.ctypes.data for a in arrays], *scalars, lo, hi)


def lanewise(make: Any, ins: Sequence[tuple[Array, DType]], out: DType, lanes: int, target: Target | None = None) -> Array:
    """``y[i] = make(x0[i], x1[i], ...)`` computed ``lanes`` at a time, the rest one by one."""
    n = ins[0][0].size
    bufs = [Buffer.of(f"x{k}", d, (n,), writable=False) for k, (_, d) in enumerate(ins)]
    y = Buffer.of("y", out, (n,))
    i = var("i", lo=0, hi=n - 1)
    whole = n // lanes

    def store(at: Expr) -> Store:
        return Store(y, (at,), make(*(load(b, (at,)) for b in bufs)))

    body = Block((
        For(i, const(0), const(whole), "serial", store(ramp(i * lanes, 1, lanes) if lanes > 1 else i)),
        For(i, const(whole * lanes), const(n), "serial", store(i)),
    ))  # fmt: skip
    result = np.zeros(n, out.numpy)
    run(Func("f", (*bufs, y), body), [*(np.ascontiguousarray(a) for a, _ in ins), result], target=target)
    return result


def values(d: DType, seed: int) -> Array:
    """Random values and the corners of a type."""
    g = np.random.default_rng(seed)
    if d.is_bool:
        return g.integers(0, 2, 64).astype(bool)
    if d.is_float:
        x = np.concatenate([g.standard_normal(48) * 10.0 ** g.integers(-6, 6, 48), [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5]])
        x = np.concatenate([x, [np.inf, -np.inf, np.nan, 1e-40, 3e38, 65504.0, 65519.9, 6e-8]])
        with np.errstate(over="ignore"):
            return g.permutation(x).astype(d.numpy)
    lo, hi = d.limits()
    x = g.integers(lo, hi, 50, dtype=d.numpy, endpoint=True)
    return g.permutation(np.concatenate([x, np.array([lo, hi, 0, 1, 2, 3, 7], d.numpy), np.array([lo, hi, -1 if lo < 0 else 1, 5], d.numpy)]))


def same(got: Array, want: Array) -> None:
    """Bitwise equal but for the sign of zero; NaN with NaN."""
    want = np.asarray(want).astype(got.dtype)
    if got.dtype.kind in "iub":
        np.testing.assert_array_equal(got, want)
        return
    nan = np.isnan(want.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float64)), nan)
    np.testing.assert_array_equal(got[~nan], want[~nan])


INTS = (i8, u8, i16, u16, i32, u32, i64, u64)
FLOATS = (f32, f64, f16, bf16)
INT_OPS = ("add", "sub", "mul", "div", "rem", "floordiv", "mod", "min", "max", "and", "or", "xor", "shl", "shr")


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("dtype", INTS, ids=str)
def test_integer_operators(dtype: DType, lanes: int) -> None:
    a, b = values(dtype, 1), values(dtype, 2)
    n = min(a.size, b.size)
    a, b = a[:n], b[:n]
    shifts = (np.arange(n) % (dtype.bits + 3)).astype(dtype.numpy)
    for op in INT_OPS:
        y = shifts if op in ("shl", "shr") else b
        got = lanewise(lambda p, q, op=op: binary(op, p, q), [(a, dtype), (y, dtype)], dtype, lanes)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(got, evaluate(op, dtype, a, y), err_msg=op)


@pytest.mark.parametrize("dtype", (i32, i64, u8), ids=str)
@pytest.mark.parametrize("divisor", [-1, 0, 1, 3, -4])
def test_division_by_constants(dtype: DType, divisor: int) -> None:
    if divisor < 0 and not dtype.is_signed:
        divisor = -divisor
    a = values(dtype, 3)
    for op in ("div", "rem", "floordiv", "mod"):
        got = lanewise(lambda p, op=op: binary(op, p, const(divisor, p.dtype)), [(a, dtype)], dtype, 4)
        np.testing.assert_array_equal(got, evaluate(op, dtype, a, np.full_like(a, divisor)), err_msg=op)


@pytest.mark.parametrize("target", ["cpu", V2])
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_operators(dtype: DType, lanes: int, target: str) -> None:
    t = runnable(target)
    a, b = values(dtype, 4), values(dtype, 5)
    for op in ("add", "sub", "mul", "div", "min", "max"):
        got = lanewise(lambda p, q, op=op: binary(op, p, q), [(a, dtype), (b, dtype)], dtype, lanes, t)
        same(got, evaluate(op, dtype, a, b))
    for op in ("neg", "abs", "floor", "ceil", "round", "trunc", "sqrt"):
        same(lanewise(lambda p, op=op: unary(op, p), [(a, dtype)], dtype, lanes, t), evaluate(op, dtype, a))
    for op in ("isnan", "isinf"):
        same(lanewise(lambda p, op=op: unary(op, p), [(a, dtype)], boolean, lanes, t), evaluate(op, boolean, a.astype(np.float64)))
    for op in ("lt", "le", "eq", "ne"):
        same(lanewise(lambda p, q, op=op: compare(op, p, q), [(a, dtype), (b, dtype)], boolean, lanes, t), evaluate(op, boolean, a, b))


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("dtype", (f32, f64), ids=str)
def test_float_remainders(dtype: DType, lanes: int) -> None:
    a, b = values(dtype, 6), values(dtype, 7)
    a = np.concatenate([a, [5.5, -5.5, 5.5, -5.5, 6.0, -6.0, 1e30, 1e-44]]).astype(dtype.numpy)
    b = np.concatenate([b, [2.0, 2.0, -2.0, -2.0, 3.0, 3.0, 0.7, 3e-45]]).astype(dtype.numpy)
    with np.errstate(all="ignore"):
        same(lanewise(lambda p, q: binary("rem", p, q), [(a, dtype), (b, dtype)], dtype, lanes), np.fmod(a, b))
        ok = np.isfinite(a) & np.isfinite(b) & (b != 0)
        same(lanewise(lambda p, q: binary("mod", p, q), [(a[ok], dtype), (b[ok], dtype)], dtype, lanes), np.mod(a[ok], b[ok]))


@pytest.mark.parametrize("target", ["cpu", V2])
@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("src", (*INTS, *FLOATS, boolean), ids=str)
def test_conversions(src: DType, lanes: int, target: str) -> None:
    t = runnable(target)
    a = values(src, 8)
    for dst in (*INTS, *FLOATS, boolean):
        if dst is src:
            continue
        got = lanewise(lambda p, dst=dst: cast(p, dst), [(a, src)], dst, lanes, t)
        with np.errstate(all="ignore"):
            same(got, convert(a, dst))


def test_every_half_converts_without_f16c() -> None:
    t = runnable(V2)
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    same(lanewise(lambda p: cast(p, f32), [(bits, f16)], f32, 4, t), bits.astype(np.float32))
    g = np.random.default_rng(0)
    x = g.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    near = bits.astype(np.float32)
    with np.errstate(all="ignore"):
        x = np.concatenate([x, near, np.nextafter(near, np.float32(0)), (near + np.nextafter(bits, np.float16(0)).astype(np.float32)) / 2])
    with np.errstate(all="ignore"):
        same(lanewise(lambda p: cast(p, f16), [(x, f32)], f16, 4, t), x.astype(np.float16))
        d = x.astype(np.float64) * (1 + 1e-9)
        same(lanewise(lambda p: cast(p, f16), [(d, f64)], f16, 4, t), d.astype(np.float16))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", (f32, f64, i8, u8, boolean, f16, i64), ids=str)
@pytest.mark.parametrize("stride", [-2, -1, 1, 2, 3])
def test_strided_access(dtype: DType, stride: int) -> None:
    n, lanes = 40, 8
    a = values(dtype, 9)[:n]
    a = np.resize(a, n)
    x, y = Buffer.of("x", dtype, (n,), writable=False), Buffer.of("y", dtype, (n,))
    base = 30 if stride < 0 else 2
    at = ramp(const(base), stride, lanes)
    out = np.zeros(n, dtype.numpy)
    run(Func("f", (x, y), Store(y, (at,), load(x, (at,)))), [a, out])
    want = np.zeros(n, dtype.numpy)
    pick = base + stride * np.arange(lanes)
    want[pick] = a[pick]
    same(out, want)


@pytest.mark.parametrize("target", ["cpu", V2])
@pytest.mark.parametrize("dtype", (f32, i32, i8, boolean, f64), ids=str)
def test_masked_lanes_touch_no_memory(dtype: DType, target: str) -> None:
    """The arrays end at a page that may not be touched; masked lanes lie beyond it."""
    import mmap

    t = runnable(target)
    page, lanes, keep = mmap.PAGESIZE, 8, 5
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    arrays, maps = [], []
    size = np.dtype(dtype.numpy).itemsize
    for _ in range(2):
        m = mmap.mmap(-1, 2 * page)
        raw = np.frombuffer(m, np.uint8)
        assert libc.mprotect(raw.ctypes.data + page, page, 0) == 0
        maps.append((m, raw))
        arrays.append(raw[page - keep * size : page].view(dtype.numpy))
    arrays[0][:] = np.array([1, 0, 1, 1, 1]).astype(dtype.numpy)
    x, y = Buffer.of("x", dtype, (lanes,), writable=False), Buffer.of("y", dtype, (lanes,))
    n = var("n")
    at = ramp(const(0), 1, lanes)
    mask = compare("lt", at, bcast(n, lanes))
    v = load(x, (at,), mask, const(1, dtype))
    one = load(x, (const(6),), compare("lt", const(6) + n, const(3)), const(0, dtype))
    idx = at * 1 + bcast(n - keep, lanes)
    g = load(x, (select(mask, idx, bcast(const(0), lanes)),), mask, const(0, dtype))
    body = Block((
        Store(y, (at,), v, mask), Store(y, (const(7),), one, compare("lt", n, const(0))), Store(y, (at,), binary("or" if dtype.is_bool else "max", v, g), mask),
    ))  # fmt: skip
    run(Func("f", (x, y, n), body), arrays, [keep], t)
    same(arrays[1].copy(), arrays[0])
    for m, raw in maps:
        libc.mprotect(raw.ctypes.data + page, page, 3)
        del m


def test_gather_shuffle_and_vreduce() -> None:
    a = np.arange(32, dtype=np.float32) ** 2
    ix = np.array([5, 0, 31, 7, 7, 2, 9, 30], np.int64)
    x, p = Buffer.of("x", f32, (32,), writable=False), Buffer.of("p", i64, (8,), writable=False)
    y, s = Buffer.of("y", f32, (8,)), Buffer.of("s", f32, (4,))
    g = load(x, (cast(load(p, (ramp(const(0), 1, 8),)), index),))
    lo, hi = load(x, (ramp(const(0), 1, 4),)), load(x, (ramp(const(8), 1, 4),))
    third = load(x, (ramp(const(20), 1, 4),))
    body = Block((
        Store(y, (ramp(const(0), 1, 8),), shuffle((g,), (7, 6, 5, 4, 3, 2, 1, 0))),
        Store(s, (const(0),), vreduce("add", g)), Store(s, (const(1),), vreduce("max", load(x, (ramp(const(1), 1, 3),)))),
        Store(s, (const(2),), extract(shuffle((lo, hi, third), (8, 5, 0, 11)), 3)),
        Store(s, (const(3),), vreduce("add", load(x, (ramp(const(0), 1, 7),)))),
    ))  # fmt: skip
    out, sums = np.zeros(8, np.float32), np.zeros(4, np.float32)
    run(Func("f", (x, p, y, s), body), [a, ix, out, sums])
    np.testing.assert_array_equal(out, a[ix][::-1])
    np.testing.assert_array_equal(sums, np.array([a[ix].sum(), 9.0, a[23], a[:7].sum()], np.float32))


# ---------------------------------------------------------------- control flow and register variables


def test_register_variables_through_loops_and_conditions() -> None:
    """Collatz steps: a While in a For with an If, three register variables."""
    y, n = Buffer.of("y", i64, (64,)), var("n")
    v, steps, top = (Buffer.of(s, i64, (), "local") for s in ("v", "steps", "top"))
    i = var("i", lo=0)
    now = load(v, ())
    step = Block((
        If(
            compare("eq", binary("mod", now, const(2, i64)), const(0, i64)), Store(v, (), binary("div", now, const(2, i64))),
            Store(v, (), now * 3 + 1),
        ),
        Store(steps, (), load(steps, ()) + 1), If(compare("lt", load(top, ()), now), Store(top, (), now)),
    ))  # fmt: skip
    one = Block((
        Store(v, (), cast(i, i64) + 1), Store(steps, (), const(0, i64)), While(compare("ne", now, const(1, i64)), step),
        Store(y, (i,), load(steps, ()) * 100000 + load(top, ())),
    ))  # fmt: skip
    body: Any = Block((Store(top, (), const(0, i64)), For(i, const(0), n, "serial", one)))
    for b in (top, steps, v):
        body = Alloc(b, body)
    out = np.full(64, -1, np.int64)
    run(Func("f", (y, n), body), [out], [30])
    want = np.full(64, -1, np.int64)
    best = 0
    for k in range(30):
        c, count = k + 1, 0
        while c != 1:
            c, count = (c // 2 if c % 2 == 0 else 3 * c + 1), count + 1
            best = max(best, c)
        want[k] = count * 100000 + best
    np.testing.assert_array_equal(out, want)


def test_loop_of_no_rounds_keeps_values() -> None:
    y, n = Buffer.of("y", f32, (2,)), var("n", lo=0)
    acc, i = Buffer.of("acc", f32, (), "local"), var("i", lo=0)
    body = Alloc(acc, Block((
        Store(acc, (), const(7.0, f32)), For(i, const(0), n, "serial", Store(acc, (), load(acc, ()) + 1)), Store(y, (const(0),), load(acc, ())),
    )))  # fmt: skip
    for rounds in (0, 1, 5):
        out = np.zeros(2, np.float32)
        run(Func("f", (y, n), body), [out], [rounds])
        assert out[0] == 7 + rounds


def test_a_variable_bound_twice_means_its_last_value() -> None:
    y, t = Buffer.of("y", i64, (2,)), var("t", i64, None)
    a, b = const(5, i64), const(9, i64)
    body = Block((Let(t, a), Store(y, (const(0),), t * t), Let(t, b), Store(y, (const(1),), t * t)))
    out = np.zeros(2, np.int64)
    run(Func("f", (y,), body), [out])
    assert out.tolist() == [25, 81]


def test_parallel_loop_runs_its_share() -> None:
    y, i = Buffer.of("y", f32, (10,)), var("i", lo=2, hi=9)
    f = Func("f", (y,), For(i, const(2), const(10), "parallel", Store(y, (i,), const(1.0, f32))))
    found = parallel_loop(f)
    assert found is not None and found[1].attr == 8
    out = np.zeros(10, np.float32)
    run(f, [out], lo=1, hi=4)
    np.testing.assert_array_equal(np.flatnonzero(out), [3, 4, 5])


# ---------------------------------------------------------------- what comes out

TARGETS = ("cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:znver4", "cpu:aarch64")


def everything(dtypes: Sequence[DType], lanes: int) -> list[tuple[str, Func]]:
    """One kernel per type with all that could become a call of a library."""
    out = []
    for d in dtypes:
        n = 64
        x, y = Buffer.of("x", d, (n,), writable=False), Buffer.of("y", d, (n,))
        at = ramp(const(0), 1, lanes)
        v, w = load(x, (at,)), load(x, (ramp(const(lanes), 1, lanes),))
        stmts: list[Any] = []
        ops = ("add", "mul", "div", "min", "rem") if d.is_float else INT_OPS
        e = v
        for op in ops:
            e = binary(op, e, w)
        if d.is_float:
            for op in ("floor", "ceil", "round", "trunc", "sqrt", "abs"):
                e = unary(op, e)
        stmts.append(Store(y, (at,), e))
        for k, o in enumerate((f16, bf16, f32, f64, i8, u8, i32, u32, i64, u64)):
            stmts.append(Store(y, (ramp(const(2 * lanes + k), 1, lanes),), cast(cast(v, o), d)))
        out.append((f"k_{d}_{lanes}", Func(f"k_{d}_{lanes}", (x, y), Block(tuple(stmts)))))
    return out


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_call_no_library(name: str) -> None:
    t = parse_target(name)
    lanes = t.caps.lanes(32)
    text = assembly(print_kernels([*everything((f32, f64, f16, bf16, i8, i64, u32), 1), *everything((f32, f64, f16, bf16, i32), lanes)], t), t)
    called = set(re.findall(r"^\s*(?:callq?|bl|jmp|b)\s+([A-Za-z_][\w.@]*)", text, re.M))
    assert {c for c in called if not c.startswith(("lt.fmod", ".L"))} == set()


@pytest.mark.parametrize(("name", "forbidden"), [
    ("cpu:x86-64-v2", r"%[yz]mm|\bv[a-z]+ps\b|vfmadd|vcvtph2ps"), ("cpu:x86-64-v3", r"%zmm|%k[1-7]\b|%xmm(1[6-9]|2\d|3[01])\b"),
    ("cpu:x86-64-v3-fma", r"%zmm|vfmadd"), ("cpu:x86-64-v4", r"vpdpbusd|vdpbf16|vcvtneps2bf16"),
])  # fmt: skip
def test_no_instruction_that_the_target_lacks(name: str, forbidden: str) -> None:
    t = parse_target(name)
    text = assembly(print_kernels(everything((f32, f64, f16, bf16, i32), t.caps.lanes(32)), t), t)
    found = re.search(forbidden, text)
    assert found is None, text[max(0, found.start() - 60) : found.end() + 60]


def gemm(m: int, n: int, k: int) -> Compute:
    i, j, r = axis("i", m), axis("j", n), axis("k", k)
    a, b = Buffer.of("A", f32, (m, k), writable=False), Buffer.of("B", f32, (k, n), writable=False)
    return Compute("gemm", (a, b), (), (pull("C", [i, j], sum_(r, a[i.var, r.var] * b[r.var, j.var])),), ("C",))


@pytest.mark.parametrize("name", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
def test_gemm_inner_loops_touch_no_stack(name: str) -> None:
    """The innermost loops with FMAs read and write no stack slot: accumulators stay in registers."""
    t = parse_target(name)
    kernels = build(gemm(192, 192, 192), t.caps, {"B": np.zeros((192, 192), np.float32)})
    text = assembly(print_kernels([(f.name, f) for f in kernels.funcs], t), t)
    blocks = re.split(r"^(\.LBB\w+):", text, flags=re.M)
    loops = [
        body.split("\n\tj", 1)[0] for label, body in zip(blocks[1::2], blocks[2::2], strict=True) if re.search(rf"\bj\w+\s+{re.escape(label)}\b", body)
    ]
    hot = [x for x in loops if x.count("vfmadd") >= 8]
    assert hot, "no loop with FMAs found"
    for x in hot:
        assert "(%rsp" not in x and "(%rbp" not in x, x


def test_big_local_buffers_are_refused() -> None:
    b, y = Buffer.of("tile", f32, (1 << 20,), "local"), Buffer.of("y", f32, (4,))
    f = Func("huge", (y,), Alloc(b, Store(y, (const(0),), load(b, (const(0),)))))
    with pytest.raises(CompilationError, match="tile needs 4194304 bytes"):
        print_kernels([("k", f)], host())


def test_malformed_text_is_an_error_not_a_crash() -> None:
    with pytest.raises(CompilationError, match="LLVM refuses"):
        compile_text("define void @f() { ret i32 0 }", host())


# ---------------------------------------------------------------- targets


def test_targets_are_data() -> None:
    assert parse_target("cpu") is host()
    assert parse_target("cpu:x86-64-v2").caps.vector_bits == 128
    assert parse_target("cpu:x86-64-v3").caps.vector_bits == 256
    v4 = parse_target("cpu:x86-64-v4")
    assert v4.caps.vector_bits == 512 and v4.caps.registers == 32 and "vnni" not in v4.caps.features
    assert {"vnni", "bf16dot", "vbmi"} <= parse_target("cpu:znver4").caps.features
    assert "vnni" in parse_target("cpu:x86-64-v4+avx512vnni").caps.features
    assert "fma" not in parse_target("cpu:x86-64-v3-fma").caps.features
    assert parse_target("cpu:aarch64").triple.startswith("aarch64")


@pytest.mark.parametrize("name", ["gpu9000", "cpu:pentium", "cpu:x86-64-v3~fma", "cpu:x86-64-v9"])
def test_unknown_targets_name_the_known_ones(name: str) -> None:
    with pytest.raises(TargetError, match="known: cpu|cannot read"):
        parse_target(name)


def test_a_register_stored_only_in_dead_code_keeps_its_value() -> None:
    y, acc, i = Buffer.of("y", f32, (1,)), Buffer.of("acc", f32, (), "local"), var("i", lo=0)
    dead = For(i, const(0), const(3), "serial", If(const(False, boolean), Store(acc, (), const(1.0, f32)), Store(y, (const(0),), const(4.0, f32))))
    out = np.zeros(1, np.float32)
    run(Func("f", (y,), Alloc(acc, dead)), [out])
    assert out[0] == 4


def test_arguments_that_share_memory_are_not_promised_apart() -> None:
    from luthier.backends.cpu import aliased_kernels
    from luthier.ir.loop import Call
    from luthier.ir.program import Program

    n = 16
    x, y = Buffer.of("x", f32, (n,), writable=False), Buffer.of("y", f32, (n,))
    f = Func("shift", (x, y), Store(y, (const(1),), load(x, (const(0),))))
    a, b = Buffer.of("a", f32, (n,), "global"), Buffer.of("b", f32, (n,), "global")
    v = Buffer.of("v", f32, (n,), "global")
    views = {"v": ("a", const(0))}

    def program(*args: Buffer) -> Program:
        return Program("p", (), (), {}, {}, {"shift": f}, (a, b), Call("shift", args), views)

    assert aliased_kernels(program(a, b)) == set()
    assert aliased_kernels(program(a, v)) == {"shift"}
    assert "noalias" in print_kernels([("k", f)], host()) and "noalias" not in print_kernels([("k", f)], host(), noalias=False)
