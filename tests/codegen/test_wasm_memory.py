"""WebAssembly: encoding, vector loads and stores of every shape, local buffers, calls, parallel ranges; against the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from luthier.codegen.wasm.encoder import OPCODE, sleb, uleb
from luthier.codegen.wasm.printer import print_module
from luthier.errors import CompilationError
from luthier.ir.dtypes import DType, boolean, f32, f64, i8, i16, i32, i64, index, u8, u16, u32
from luthier.ir.expr import bcast, binary, bitcast, call, cast, const, extract, load, ramp, select, shuffle, var, vreduce
from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, If, Let, Store, While, block

wasmtime = pytest.importorskip("wasmtime")

from luthier.codegen.wasm.run import WasmKernel, run_wasm  # noqa: E402


@pytest.mark.parametrize(("n", "raw"), [(0, "00"), (127, "7f"), (128, "8001"), (624485, "e58e26")])
def test_unsigned_leb(n: int, raw: str) -> None:
    """624485 is the example of the DWARF standard."""
    assert uleb(n).hex() == raw


@pytest.mark.parametrize(("n", "raw"), [(0, "00"), (-1, "7f"), (63, "3f"), (64, "c000"), (-123456, "c0bb78"), (-64, "40")])
def test_signed_leb(n: int, raw: str) -> None:
    assert sleb(n).hex() == raw


@pytest.mark.parametrize(
    ("name", "raw"),
    [("i32.add", "6a"), ("f64.copysign", "a6"), ("i64.store32", "3e"), ("v128.load64_zero", "fd5d"), ("i16x8.mul", "fd9501"),
     ("f32x4.pmax", "fdeb01"), ("f64x2.convert_low_i32x4_u", "fdff01"), ("f32x4.relaxed_madd", "fd8502"), ("i64.trunc_sat_f64_u", "fc07")],
)  # fmt: skip
def test_opcodes(name: str, raw: str) -> None:
    """Spot checks against the specification's tables."""
    assert OPCODE[name].hex() == raw


def both(f: Func, arrays: dict[str, Any], scalars: dict[str, int] | None = None, relaxed: bool = False) -> None:
    want = {k: v.copy() for k, v in arrays.items()}
    got = {k: v.copy() for k, v in arrays.items()}
    run_func(f, want, scalars)
    run_wasm(f, got, scalars, relaxed)
    for k in want:
        np.testing.assert_array_equal(got[k], want[k], err_msg=k)


MEMORY = [(f32, 4), (f64, 2), (i32, 4), (u8, 16), (i8, 16), (u8, 8), (i8, 8), (u8, 4), (i8, 4), (u16, 8), (i16, 4), (u16, 4), (i64, 2), (i32, 2),
          (boolean, 16), (boolean, 4), (i16, 2), (f32, 8), (f32, 2), (i32, 8)]  # fmt: skip


def numbers(d: DType, n: int) -> Any:
    rng = np.random.default_rng(1)
    if d.is_bool:
        return rng.integers(0, 2, n).astype(np.bool_)
    return (rng.standard_normal(n) * 50).astype(d.numpy) if d.is_float else rng.integers(*d.limits(), n, dtype=d.numpy)


@pytest.mark.parametrize(("d", "lanes"), MEMORY, ids=lambda x: str(x))
def test_vector_memory(d: DType, lanes: int) -> None:
    """Contiguous, strided, reversed, gathered; masked both ways; as stores and through a vector variable."""
    n = 64
    a, ix = Buffer.of("A", d, (n,), writable=False), Buffer.of("I", i32, (lanes,), writable=False)
    out = [Buffer.of(f"Y{k}", d, (n,)) for k in range(7)]
    o = var("o", lo=0, hi=1)
    at = ramp(o * lanes, 1, lanes)
    tail = at < bcast(const(lanes + lanes // 2), lanes)
    odd = (at % bcast(const(2), lanes)).eq(bcast(const(1), lanes))
    gather = cast(load(ix, (ramp(const(0), 1, lanes),)), index)
    v = var("v", d.vec(lanes))
    body = block(
        Let(v, load(a, (at + bcast(const(3), lanes),))),
        Store(out[0], (at,), v),
        Store(out[1], (ramp(o * 16, 2, lanes) if lanes <= 8 else ramp(o * 16, 3, lanes),), load(a, (ramp(o + 40, -1, lanes),))),
        Store(out[2], (at,), load(a, (gather,))),
        Store(out[3], (at,), load(a, (at,), tail, const(1, d))),
        Store(out[4], (at,), v, tail),
        Store(out[5], (at,), load(a, (at,), odd, const(0, d)), odd),
        Store(out[6], (gather,), select(odd, v, load(a, (at,)))),
    )
    f = Func("mem", (a, ix, *out), For(o, const(0), const(2), "serial", body))
    idx = np.random.default_rng(2).permutation(40)[:lanes].astype(np.int32)
    arrays = {"A": numbers(d, n), "I": idx, **{b.name: np.zeros(n, d.numpy) for b in out}}
    both(f, arrays)


def test_shuffle_extract_reduce() -> None:
    a, y = Buffer.of("A", f32, (8,), writable=False), Buffer.of("Y", f32, (16,))
    p, q = load(a, (ramp(const(0), 1, 4),)), load(a, (ramp(const(4), 1, 4),))
    stores = [Store(y, (ramp(const(0), 1, 4),), shuffle([p, q], [7, 0, 5, 2])), Store(y, (ramp(const(4), 1, 4),), shuffle([p], [3, 3, 1, 0]))]
    stores += [Store(y, (const(8 + k),), vreduce(op, p * q)) for k, op in enumerate(("add", "mul", "min", "max"))]
    stores.append(Store(y, (const(12),), extract(p + q, 2)))
    both(Func("s", (a, y), block(*stores)), {"A": numbers(f32, 8), "Y": np.zeros(16, np.float32)})


def test_local_buffers_loops_conditions() -> None:
    """A histogram in a local array, a while loop, nested conditions, a run-time sized buffer."""
    n = var("n", lo=1)
    a, y = Buffer.of("A", u8, (n,), writable=False), Buffer.of("Y", i32, (16,))
    h, t, st = Buffer.of("h", i32, (16,), "local"), Buffer.of("t", i32, (n,), "global"), Buffer.of("st", i32, (), "local")
    i, j = var("i", lo=0), var("j", lo=0)
    b = cast(a[i], index) % 16
    body = block(
        For(j, const(0), const(16), "serial", Store(h, (j,), const(0, i32))),
        For(i, const(0), n, "serial", block(Store(h, (b,), h[b] + 1), Store(t, (i,), cast(a[i], i32)))),
        Store(st, (), const(0, i32)),
        While(st[()] < const(100, i32), Store(st, (), st[()] * 2 + 1)),
        For(j, const(0), const(16), "serial", If(h[j] < 3, Store(y, (j,), h[j] + st[()]), If(j < 8, Store(y, (j,), t[n - 1 - j])))),
    )
    f = Func("hist", (a, y, n), Alloc(h, Alloc(t, Alloc(st, body))))
    both(f, {"A": numbers(u8, 50), "Y": np.zeros(16, np.int32)}, {"n": 50})


def test_parallel_range_shares_the_work() -> None:
    a = Buffer.of("A", f32, (10,))
    i = var("i", lo=0)
    f = Func("p", (a,), For(i, const(2), const(9), "parallel", Store(a, (i,), cast(i, f32))))
    k = WasmKernel(f)
    x = np.zeros(10, np.float32)
    args = k.bind({"A": x}, {})
    assert k.range_(k.store, *args) == 7
    k.call_(k.store, *args, 1, 3)
    at, size = k.where["A"]
    assert np.frombuffer(bytes(k.memory.read(k.store, at, at + size)), np.float32).tolist() == [0, 0, 0, 3, 4, 0, 0, 0, 0, 0]


def test_calls_between_kernels_of_a_module() -> None:
    a = Buffer.of("A", f32, (4,))
    i = var("i", lo=0)
    inc = Func("inc", (a,), For(i, const(0), const(4), "parallel", Store(a, (i,), a[i] + 1.0)))
    b = Buffer.of("B", f32, (8,))
    main = Func("main", (b,), block(Call("inc", (b,)), Call("inc", ((b, const(4)),)), Call("inc", ((b, const(4)),))))
    raw = print_module([inc, main])
    eng = wasmtime.Engine()
    store = wasmtime.Store(eng)
    mem = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    i32t = wasmtime.ValType.i32()
    sp = wasmtime.Global(store, wasmtime.GlobalType(i32t, True), wasmtime.Val.i32(60000))
    data = wasmtime.Global(store, wasmtime.GlobalType(i32t, False), wasmtime.Val.i32(0))
    inst = wasmtime.Instance(store, wasmtime.Module(eng, raw), [mem, sp, data])
    inst.exports(store)["main"](store, 64, 0, 1)
    assert np.frombuffer(bytes(mem.read(store, 64, 96)), np.float32).tolist() == [1] * 4 + [2] * 4


def test_const_buffers_are_data() -> None:
    t = Buffer.of("T", f32, (3,), "const", False)
    y = Buffer.of("Y", f32, (3,))
    i = var("i", lo=0, hi=2)
    f = Func("c", (y,), For(i, const(0), const(3), "serial", Store(y, (i,), t[2 - i])), data={"T": np.array([1, 2, 3], np.float32)})
    out = np.zeros(3, np.float32)
    run_wasm(f, {"Y": out})
    assert out.tolist() == [3, 2, 1]


def test_relaxed_madd_is_close_and_used() -> None:
    a, y = Buffer.of("A", f32, (4,), writable=False), Buffer.of("Y", f32, (4,))
    ix = ramp(const(0), 1, 4)
    f = Func("m", (a, y), Store(y, (ix,), load(a, (ix,)) * load(a, (ix,)) + load(a, (ix,))))
    assert OPCODE["f32x4.relaxed_madd"] in print_module([f]) and OPCODE["f32x4.relaxed_madd"] not in print_module([f], relaxed_simd=False)
    x, out = numbers(f32, 4), np.zeros(4, np.float32)
    run_wasm(f, {"A": x, "Y": out})
    np.testing.assert_allclose(out, x.astype(np.float64) ** 2 + x, rtol=1e-6)


def test_what_passes_should_have_removed_is_named() -> None:
    a = Buffer.of("A", f32, (2, 2))
    with pytest.raises(CompilationError, match="flatten"):
        print_module([Func("f", (a,), Store(a, (const(0), const(0)), const(1, f32)))])
    i = var("i", lo=0)
    b = Buffer.of("B", f32, (4,))
    with pytest.raises(CompilationError, match="vectorize"):
        print_module([Func("f", (b,), For(i, const(0), const(4), "vectorize", Store(b, (i,), const(1, f32))))])


@pytest.mark.parametrize("d", [f32, f64])
def test_float_remainder(d: DType) -> None:
    """Exact for all magnitudes, subnormals, zeros and infinities: numpy's fmod is C's."""
    tiny = np.finfo(d.numpy).smallest_subnormal
    special = np.array([0.0, -0.0, 1.0, -1.0, 3.5, np.inf, -np.inf, np.nan, tiny, 7 * tiny, 1e30, -1e30, np.finfo(d.numpy).max, np.finfo(d.numpy).tiny], d.numpy)
    rng = np.random.default_rng(3)
    wide = (rng.standard_normal(200) * 10.0 ** rng.integers(-20, 20, 200)).astype(d.numpy)
    x, y = np.meshgrid(np.concatenate([special, wide[:60]]), np.concatenate([special, wide[60:120]]))
    n = x.size // 4 * 4
    a, b, o = (Buffer.of(k, d, (n,), writable=k == "O") for k in "ABO")
    i = var("i", lo=0, hi=n // 4 - 1)
    at = ramp(i * 4, 1, 4)
    f = Func("rem", (a, b, o), For(i, const(0), const(n // 4), "serial", Store(o, (at,), binary("rem", load(a, (at,)), load(b, (at,))))))
    arrays = {"A": x.reshape(-1)[:n].copy(), "B": y.reshape(-1)[:n].copy(), "O": np.zeros(n, d.numpy)}
    with np.errstate(all="ignore"):
        want = np.fmod(arrays["A"], arrays["B"])
    run_wasm(f, arrays, {})
    np.testing.assert_array_equal(arrays["O"], want)
    kept = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(arrays["O"][kept]), np.signbit(want[kept]))


def test_dot_product_of_pairs() -> None:
    """``i32x4.dot_i16x8_s`` with a broadcast pair read as one number, and bytes widened as they are loaded; against numpy."""
    rng = np.random.default_rng(5)
    x = rng.integers(-32768, 32767, 2, np.int16)
    w = rng.integers(-128, 127, 8).astype(np.int8)
    a, b, o = Buffer.of("X", i16, (2,), writable=False), Buffer.of("W", i8, (8,), writable=False), Buffer.of("O", i32, (4,))
    pair = bitcast(bcast(bitcast(load(a, (ramp(const(0), 1, 2),)), u32), 4), i16.vec(8))
    bytes_ = cast(load(b, (ramp(const(0), 1, 8),)), i16.vec(8))
    lanes = ramp(const(0), 1, 4)
    f = Func("dot", (a, b, o), Store(o, (lanes,), call("wasm.dot_i16x8", i32.vec(4), load(o, (lanes,)), pair, bytes_)))
    arrays = {"X": x, "W": w, "O": np.array([7, -7, 2**31 - 1, 0], np.int32)}
    want = arrays["O"].astype(np.int64) + (w.astype(np.int64).reshape(4, 2) * x.astype(np.int64)).sum(1)
    run_wasm(f, arrays, {})
    np.testing.assert_array_equal(arrays["O"], want.astype(np.int32))
