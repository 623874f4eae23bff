"""The passes between the shared loop passes and a printer: before and after, and the same results in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from luthier.errors import CompilationError
from luthier.ir.dtypes import DType, bf16, boolean, f16, f32, i2, i4, i8, i32, i64, u1, u2, u4, u32
from luthier.ir.expr import bcast, bitcast, cast, const, load, ramp, shuffle, var, vreduce
from luthier.ir.interpret.loops import evaluate_expr, run_func
from luthier.ir.loop import Alloc, Block, Buffer, For, Func, Let, Stmt, Store, block, walk_stmts
from luthier.passes.gpu.map_parallel import map_parallel
from luthier.passes.gpu.privatize_threads import privatize_threads
from luthier.passes.loop.expand_math import expand_math
from luthier.passes.loop.legalize_dtype import (
    WGSL_RULES,
    bfloat_to_f32,
    f32_to_bfloat,
    f32_to_half,
    half_to_f32,
    legalize_dtype,
)
from luthier.passes.loop.lower_subbyte import lower_subbyte, pack_array, unpack_array
from luthier.passes.loop.place_barriers import place_barriers
from luthier.passes.loop.place_lets import place_lets
from luthier.passes.loop.round_by_operator import round_by_operator
from luthier.passes.loop.scalarize import scalarize

Golden = Callable[[str, str], None]


def each(n: Any, body: Callable[[Any], Stmt], kind: str = "serial") -> For:
    i = var("i", lo=0, hi=(n if isinstance(n, int) else n) - 1)
    return For(i, const(0), n if not isinstance(n, int) else const(n), kind, body(i))


def before_after(golden: Golden, name: str, f: Func, pass_: Callable[[Func], Func]) -> Func:
    g = pass_(f)
    golden(f"passes/{name}.txt", f"# before\n{f}\n# after\n{g}")
    again = pass_(g)
    assert str(again) == str(g), "the pass changes its own result"
    return g


# ---------------------------------------------------------------- scalarize


def test_scalarize(golden: Golden) -> None:
    a, c = Buffer.of("A", f32, (8,), writable=False), Buffer.of("C", f32, (8,))
    r = Buffer.of("r", f32.vec(4), (), "local")
    w = Buffer.of("w", f32.vec(4), (2,), "local")
    v = var("v", f32.vec(4))
    ix = ramp(const(0), 1, 4)
    body = block(
        Let(v, load(a, (ix,))), Store(r, (), v + shuffle([v, load(a, (ramp(const(4), 1, 4),))], [7, 0, 2, 5])),
        Store(w, (const(1),), r[()] * 2.0), Store(c, (ix,), w[1], ix < bcast(const(3), 4)),
        Store(c, (ramp(const(4), 1, 4),), shuffle([load(c, (ramp(const(0), 1, 4),)), v], [3, 2, 5, 0])),
        Store(c, (const(6),), vreduce("add", v)),
    )
    f = Func("f", (a, c), Alloc(r, Alloc(w, body)))
    g = before_after(golden, "scalarize", f, scalarize)
    x = np.arange(1, 9, dtype=np.float32)
    want, got = np.zeros(8, np.float32), np.zeros(8, np.float32)
    run_func(f, [x, want])
    run_func(g, [x, got])
    np.testing.assert_array_equal(got, want)


def test_scalarize_store_reads_before_it_writes() -> None:
    """``A[0:2] = (A[1], A[0])`` swaps."""
    a = Buffer.of("A", f32, (2,))
    ix = ramp(const(0), 1, 2)
    f = Func("swap", (a,), Store(a, (ix,), shuffle([load(a, (ix,))], [1, 0])))
    x = np.array([1, 2], np.float32)
    run_func(scalarize(f), [x])
    assert x.tolist() == [2, 1]


# ---------------------------------------------------------------- legalize_dtype


def test_legalize_packed_bool_and_bytes(golden: Golden) -> None:
    n = var("n", lo=1)
    x, b, y = Buffer.of("X", i8, (n,), writable=False), Buffer.of("B", i64, (n,), writable=False), Buffer.of("Y", boolean, (n,))
    f = Func("neg", (x, b, y, n), each(n, lambda i: Store(y, (i,), cast(x[i], i64) < b[i]), "parallel"))
    g = before_after(golden, "legalize_wgsl", f, lambda q: legalize_dtype(q, WGSL_RULES, narrow={"B"}))
    xs, bs = np.array([3, -4, 5, 127, -128, 0], np.int8), np.array([0, 0, 9, -(1 << 20), 1, 1], np.int64)
    out = np.full(2, 0xFFFFFFFF, np.uint32)
    run_func(g, {"X": np.frombuffer(xs.tobytes() + b"\0\0", np.uint32), "B": bs.view(np.uint32), "Y": out}, {"n": 6})
    assert out.view(np.uint8)[:6].tolist() == (xs < bs).astype(int).tolist()
    assert out.view(np.uint8)[6:].tolist() == [255, 255], "bytes outside the tensor are someone else's"


@pytest.mark.parametrize("d", [f16, bf16])
def test_legalize_half(d: DType, golden: Golden) -> None:
    x, y = Buffer.of("X", d, (64,), writable=False), Buffer.of("Y", d, (64,))
    f = Func("h", (x, y), each(64, lambda i: Store(y, (i,), x[i] * x[i] + x[i])))
    g = place_lets(legalize_dtype(f))
    one = Func("h", (x, y), each(64, lambda i: Store(y, (i,), x[i] * x[i])))
    golden(f"passes/legalize_{d.name}.txt", f"# before\n{one}\n# after, with names for shared parts\n{place_lets(legalize_dtype(one))}")
    v = np.random.default_rng(0).standard_normal(64).astype(d.numpy)
    want, got = np.zeros(64, d.numpy), np.zeros(64, np.uint16)
    run_func(f, [v, want])
    run_func(g, [v.view(np.uint16), got])
    np.testing.assert_array_equal(got, want.view(np.uint16))


def test_half_conversions_are_exact_for_every_value() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32)
    h, v = var("h", u32), var("v", f32)
    for decode, dt in ((half_to_f32, np.float16), (bfloat_to_f32, ml_dtypes.bfloat16)):
        want = bits.astype(np.uint16).view(dt).astype(np.float32)
        np.testing.assert_array_equal(evaluate_expr(decode(h), {h: bits}), want)
    rng = np.random.default_rng(0)
    f = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    f = np.concatenate([f, np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32), [65519.9, 65520, 2**-25, 3 * 2**-26, -0.0]]).astype(np.float32)
    with np.errstate(all="ignore"):
        for encode, dt in ((f32_to_half, np.float16), (f32_to_bfloat, ml_dtypes.bfloat16)):
            got = evaluate_expr(encode(v), {v: f}).astype(np.uint16)
            want = f.astype(dt).view(np.uint16)
            nan = np.isnan(f)
            np.testing.assert_array_equal(got[~nan], want[~nan])
            assert np.isnan(got[nan].view(dt).astype(np.float32)).all()


def test_legalize_carries_64_bits_as_two_words() -> None:
    """Nothing is known about B, and a target without f64: the interpreter runs what comes out, on words."""
    from luthier.ir.dtypes import f64

    b, x, y, z = Buffer.of("B", i64, (4,)), Buffer.of("X", f64, (4,)), Buffer.of("Y", i64, (4,)), Buffer.of("Z", f64, (4,))
    i = var("i", lo=0, hi=3)
    body = block(Store(y, (i,), b[i] * 3 - 5), Store(z, (i,), x[i] * cast(b[i], f64)))
    g = legalize_dtype(Func("f", (b, x, y, z), For(i, const(0), const(4), "serial", body)), WGSL_RULES)
    assert {p.dtype for p in g.buffers} == {u32}
    bs, xs = np.array([2**40 + 1, -(2**62), 5, -1], np.int64), np.array([1 / 3, 1e-300, -2.5, np.inf])
    ys, zs = np.zeros(8, np.uint32), np.zeros(8, np.uint32)
    run_func(g, {"B": bs.view(np.uint32), "X": xs.view(np.uint32), "Y": ys, "Z": zs})
    with np.errstate(all="ignore"):
        assert ys.view(np.int64).tolist() == (bs * 3 - 5).tolist() and zs.view(np.float64).tolist() == (xs * bs).tolist()


# ---------------------------------------------------------------- lower_subbyte


@pytest.mark.parametrize("d", [u4, i4, u2, i2, u1])
def test_pack_and_unpack(d: DType) -> None:
    lo, hi = d.limits()
    v = np.random.default_rng(0).integers(lo, hi, 37, endpoint=True)
    raw = pack_array(v, d)
    assert raw.dtype == np.uint8 and len(raw) == -(-37 // (8 // d.bits))
    np.testing.assert_array_equal(unpack_array(raw, d, (37,)).astype(int), v)
    assert pack_array(np.array([1, 2, 3]), u4).tolist() == [0x21, 0x03]


@pytest.mark.parametrize("d", [u4, i4, u2, u1])
@pytest.mark.parametrize("lanes", [1, 8])
def test_subbyte_loads(d: DType, lanes: int, golden: Golden) -> None:
    n = 64
    x, y = Buffer.of("X", d, (n,), writable=False), Buffer.of("Y", i32, (n,))

    def body(i: Any) -> Stmt:
        ix = i if lanes == 1 else ramp(i * lanes, 1, lanes)
        return Store(y, (ix,), cast(load(x, (ix,)), i32))

    f = Func("get", (x, y), each(n // lanes, body))
    g = before_after(golden, f"subbyte_load_{d.name}_{lanes}", f, lower_subbyte) if d in (u4, i4) else lower_subbyte(f)
    lo, hi = d.limits()
    v = np.random.default_rng(0).integers(lo, hi, n, endpoint=True)
    out = np.zeros(n, np.int32)
    run_func(g, [pack_array(v, d), out])
    np.testing.assert_array_equal(out, v)


def test_subbyte_stores(golden: Golden) -> None:
    n = 16
    x, y = Buffer.of("X", i32, (n,), writable=False), Buffer.of("Y", u4, (n,))
    v = np.arange(n, dtype=np.int32)
    f = Func("put", (x, y), each(n, lambda i: Store(y, (i,), cast(x[i], u4))))
    g = before_after(golden, "subbyte_store", f, lower_subbyte)
    out = np.full(n // 2, 0xAA, np.uint8)
    run_func(g, [v, out])
    np.testing.assert_array_equal(out, pack_array(v, u4))
    ix = ramp(var("i", lo=0, hi=1) * 8, 1, 8)
    h = Func("put8", (x, y), each(2, lambda i: Store(y, (ix,), cast(load(x, (ix,)), u4)), "parallel"))
    out[:] = 0
    run_func(lower_subbyte(h), [v, out])
    np.testing.assert_array_equal(out, pack_array(v, u4))


@pytest.mark.parametrize("d", [u2, u4])
def test_subbyte_store_of_lanes_that_leave_a_byte_half(d: DType) -> None:
    """7 elements in vectors of 4 and 3: the last byte is written element by element, and keeps what else is in it."""
    x, y = Buffer.of("X", i32, (7,), writable=False), Buffer.of("Y", d, (7,))
    body = [Store(y, (ramp(const(at), 1, n),), cast(load(x, (ramp(const(at), 1, n),)), d)) for at, n in ((0, 4), (4, 3))]
    v = np.array([3, 1, 2, 0, 1, 3, 2], np.int32)
    want = pack_array(np.append(v, [(1 << d.bits) - 1] * (-7 % (8 // d.bits))), d)
    out = np.full(want.size, 0xFF, np.uint8)
    run_func(lower_subbyte(Func("put", (x, y), Block(tuple(body)))), [v, out])
    np.testing.assert_array_equal(out, want)


def test_subbyte_store_that_shares_a_byte_is_refused() -> None:
    y = Buffer.of("Y", u4, (16,))
    f = Func("put", (y,), each(16, lambda i: Store(y, (i,), const(1, u4)), "parallel"))
    with pytest.raises(CompilationError, match="share its byte"):
        lower_subbyte(f)


# ---------------------------------------------------------------- map_parallel, round_by_operator


def test_map_parallel(golden: Golden) -> None:
    n = var("n", lo=1)
    x, y = Buffer.of("X", f32, (n,), writable=False), Buffer.of("Y", f32, (n,))
    f = Func("double", (x, y, n), each(n, lambda i: Store(y, (i,), x[i] * 2.0), "parallel"))
    g = before_after(golden, "map_parallel", f, map_parallel)
    v, out = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    run_func(g, [v, out])
    np.testing.assert_array_equal(out, v * 2)


def test_round_by_operator(golden: Golden) -> None:
    x, y = Buffer.of("X", f32, (4,), writable=False), Buffer.of("Y", f32, (4,))
    t = var("t", f32)
    magic = 1.5 * 2.0**23
    body = each(4, lambda i: block(Let(t, x[i] * 3.0 + magic), Store(y, (i,), (t - magic) + cast(bitcast(t, i32), f32))))
    f = Func("r", (x, y), body)
    g = before_after(golden, "round_by_operator", f, round_by_operator)
    v = np.array([0.5, -1.3, 1000.25, 7], np.float32)
    want, got = np.zeros(4, np.float32), np.zeros(4, np.float32)
    run_func(f, [v, want])
    run_func(g, [v, got])
    np.testing.assert_array_equal(got, want)
    e = expand_math(Func("e", (x, y), each(4, lambda i: Store(y, (i,), unary_exp(x[i])))))
    run_func(round_by_operator(e), [v[:3].repeat(2)[:4] / 100, got])
    np.testing.assert_allclose(got, np.exp(v[:3].repeat(2)[:4] / 100), rtol=3e-7)
    assert "12582912" not in str(round_by_operator(e)).replace("1262485504", "")


def unary_exp(x: Any) -> Any:
    from luthier.ir.expr import unary

    return unary("exp", x)




# ---------------------------------------------------------------- GPU: privatize_threads, place_barriers


def _blocked_sum() -> Func:
    """Each thread adds its column of shared tiles, loaded by all threads together."""
    a, y = Buffer.of("A", f32, (3, 4, 4), writable=False), Buffer.of("Y", f32, (4,))
    s, acc = Buffer.of("s", f32, (4, 4), "shared"), Buffer.of("acc", f32, (4,), "local")
    k, j = var("k", lo=0, hi=2), var("j", lo=0, hi=3)
    t = [var(f"t{n}", lo=0, hi=3) for n in range(4)]

    def threads(n: int, body: Stmt) -> For:
        return For(t[n], const(0), const(4), "thread.x", body)

    rows = For(j, const(0), const(4), "serial", Store(acc, (t[2],), acc[t[2]] + s[j, t[2]]))
    load_tile = threads(1, For(j, const(0), const(4), "serial", Store(s, (t[1], j), a[k, t[1], j])))
    step = Alloc(s, block(load_tile, threads(2, rows)))
    body = block(threads(0, Store(acc, (t[0],), const(0, f32))), For(k, const(0), const(3), "serial", step), threads(3, Store(y, (t[3],), acc[t[3]])))
    return Func("blocked", (a, y), Alloc(acc, body))


def test_place_barriers(golden: Golden) -> None:
    f = _blocked_sum()
    g = before_after(golden, "place_barriers", f, place_barriers)
    x = np.arange(48, dtype=np.float32).reshape(3, 4, 4)
    out = np.zeros(4, np.float32)
    run_func(g, [x, out])
    np.testing.assert_array_equal(out, x.sum((0, 1)))


def test_privatize_threads(golden: Golden) -> None:
    g = before_after(golden, "privatize_threads", _blocked_sum(), privatize_threads)
    accs = [s.buf for s in walk_stmts(g.body) if isinstance(s, Alloc) and s.buf.name == "acc"]
    assert [b.shape for b in accs] == [()]


def test_privatize_threads_keeps_what_another_index_reads() -> None:
    y, acc = Buffer.of("Y", f32, (4,)), Buffer.of("acc", f32, (4,), "local")
    t = var("t", lo=0, hi=3)
    f = Func("f", (y,), Alloc(acc, block(Store(acc, (const(0),), const(1, f32)), For(t, const(0), const(4), "thread.x", Store(y, (t,), acc[t])))))
    assert privatize_threads(f) is f
