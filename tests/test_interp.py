"""The loop IR interpreter: statements, lanes, barriers, bounds."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir.dtypes import bf16, boolean, f32, i8, i32, i64, index
from luthier.ir.errors import KernelError, VerificationError
from luthier.ir.expr import (
    bcast,
    bitcast,
    cast,
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
from luthier.ir.interpret.loops import evaluate_expr, run_func
from luthier.ir.loop import Alloc, Barrier, Buffer, Call, For, Func, If, Let, Store, While, block

n = var("n", lo=1)
i, j, k = var("i", lo=0), var("j", lo=0), var("k", lo=0)


def loop(v, hi, *body, kind="serial", lo=0):
    return For(v, const(lo), hi if not isinstance(hi, int) else const(hi), kind, block(*body))


def test_matmul_with_accumulator_and_symbolic_dim():
    a, b, c = Buffer.of("A", f32, (n, 5)), Buffer.of("B", f32, (5, 3)), Buffer.of("C", f32, (n, 3))
    acc = Buffer.of("acc", f32, (), "local")
    inner = block(Store(acc, (), const(0, f32)), loop(k, 5, Store(acc, (), acc[()] + a[i, k] * b[k, j])), Store(c, (i, j), acc[()]))
    f = Func("mm", (a, b, c, n), loop(i, n, loop(j, 3, Alloc(acc, inner)), kind="parallel"))
    x, y = np.random.default_rng(0).standard_normal((4, 5), np.float32), np.ones((5, 3), np.float32)
    out = np.zeros((4, 3), np.float32)
    run_func(f, {"A": x, "B": y, "C": out})
    np.testing.assert_allclose(out, x @ y, rtol=1e-6)
    out[:] = 0
    run_func(f, [x, y, out.reshape(-1)], {"n": 4})
    np.testing.assert_allclose(out, x @ y, rtol=1e-6)


def test_lanes_masks_and_tail():
    a, b = Buffer.of("A", f32, (10,)), Buffer.of("B", f32, (10,))
    ix = ramp(i * 4, 1, 4)
    m = ix < bcast(const(10), 4)
    f = Func("f", (a, b), loop(i, 3, Store(b, (ix,), load(a, (ix,), m, 7.0) * 2.0, m)))
    x, out = np.arange(10, dtype=np.float32), np.zeros(10, np.float32)
    run_func(f, [x, out])
    np.testing.assert_array_equal(out, x * 2)


def test_vector_register_shuffle_reduce():
    a, b = Buffer.of("A", f32, (8,)), Buffer.of("B", f32, (3,))
    r = Buffer.of("r", f32.vec(4), (), "local")
    body = block(
        Store(r, (), load(a, (ramp(const(0), 1, 4),)) + load(a, (ramp(const(4), 1, 4),))),
        Store(b, (const(0),), vreduce("add", r[()])),
        Store(b, (const(1),), extract(shuffle([r[()], r[()]], [3, 2, 5, 4]), 2)),
        Store(b, (const(2),), vreduce("max", r[()])),
    )
    x, out = np.arange(8, dtype=np.float32), np.zeros(3, np.float32)
    run_func(Func("f", (a, b), Alloc(r, body)), [x, out])
    np.testing.assert_array_equal(out, [28, 6, 10])


def test_barrier_runs_threads_in_lock_step():
    """A tree reduction in shared memory gives the sum only when all threads pass each barrier together."""
    a, b = Buffer.of("A", f32, (2, 8)), Buffer.of("B", f32, (2,))
    s = Buffer.of("s", f32, (8,), "shared")
    g, t = var("g"), var("t")
    step = [
        block(If(t < const(h), Store(s, (t,), s[t] + s[t + h])), Barrier("shared")) for h in (4, 2, 1)
    ]
    thread = loop(t, 8, Store(s, (t,), a[g, t]), Barrier("shared"), *step, If(t.eq(0), Store(b, (g,), s[0])), kind="thread.x")
    f = Func("f", (a, b), loop(g, 2, Alloc(s, thread), kind="block.x"))
    x, out = np.arange(16, dtype=np.float32).reshape(2, 8), np.zeros(2, np.float32)
    run_func(f, [x, out])
    np.testing.assert_array_equal(out, x.sum(1))


def test_barrier_in_nested_threads_and_divergence():
    s, b = Buffer.of("s", i32, (6,), "shared"), Buffer.of("B", i32, (6,))
    t, u = var("t"), var("u")
    flat = u * 3 + t
    body = loop(u, 2, loop(t, 3, Store(s, (flat,), cast(flat, i32)), Barrier("shared"), Store(b, (flat,), s[5 - flat]), kind="thread.x"), kind="thread.y")
    out = np.zeros(6, np.int32)
    run_func(Func("f", (b,), Alloc(s, body)), [out])
    np.testing.assert_array_equal(out, [5, 4, 3, 2, 1, 0])
    bad = loop(t, 3, If(t < const(1), Barrier("shared")), kind="thread.x")
    with pytest.raises(KernelError, match="barrier"):
        run_func(Func("f", (b,), bad), [out])


def test_while_let_and_call():
    """Collatz steps of 27 is 111."""
    b, st = Buffer.of("B", i64, (1,)), Buffer.of("st", i64, (1,), "local")
    v, w = var("v", i64), st[0]
    body = block(
        Store(st, (const(0),), const(27, i64)), Store(b, (const(0),), const(0, i64)),
        While(w.ne(1), block(
            Let(v, w), Store(st, (const(0),), select((v & const(1, i64)).eq(0), v >> const(1, i64), v * 3 + 1)),
            Store(b, (const(0),), b[0] + const(1, i64)),
        )),
    )
    f = Func("collatz", (b,), Alloc(st, body))
    out = np.zeros(1, np.int64)
    run_func(f, [out])
    assert out[0] == 111
    c, off = Buffer.of("C", i64, (4,)), var("off")
    two = np.zeros(4, np.int64)
    run_func(Func("main", (c, off), Call("collatz", ((c, off),))), [two], {"off": 2}, {"collatz": f})
    np.testing.assert_array_equal(two, [0, 0, 111, 0])
    with pytest.raises(VerificationError, match="nobody"):
        run_func(Func("main", (c,), Call("nobody", (c,))), [two])


@pytest.mark.parametrize("at", [-1, 4])
@pytest.mark.parametrize("vec", [False, True])
def test_out_of_bounds_is_named(at, vec):
    a, b = Buffer.of("A", f32, (4,)), Buffer.of("B", f32, (4,))
    ix = const(at) if not vec else ramp(const(at if at < 0 else at - 1), 1, 2)
    x = np.zeros(4, np.float32)
    with pytest.raises(KernelError, match=r"load A\[") as e:
        run_func(Func("kern", (a, b), Store(b, (ramp(const(0), 1, 2) if vec else const(0),), load(a, (ix,)))), [x, x])
    assert "kern" in str(e.value)
    with pytest.raises(KernelError, match=r"store B\["):
        run_func(Func("kern", (a, b), Store(b, (ix,), bcast(const(1, f32), 2) if vec else const(1, f32))), [x, x])


def test_integers_wrap_and_deep_nests():
    b = Buffer.of("B", i8, (1,))
    f: object = Store(b, (const(0),), b[0] + const(100, i8))
    for d in range(25):
        f = loop(var(f"v{d}"), 1, f)
    out = np.array([100], np.int8)
    run_func(Func("f", (b,), f), [out])
    assert out[0] == -56


def test_evaluate_expr_matches_numpy():
    x, y = var("x", f32), var("y", f32.vec(4))
    v = np.linspace(-2, 2, 9, dtype=np.float32)
    np.testing.assert_array_equal(evaluate_expr(select(x < 0.0, -x, x * x), {x: v}), np.where(v < 0, -v, v * v))
    w = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(evaluate_expr(vreduce("add", y + 1.0), {"y": w}), (w + 1).sum(1))
    np.testing.assert_array_equal(evaluate_expr(bitcast(x, i32), {x: v}), v.view(np.int32))
    np.testing.assert_array_equal(evaluate_expr(cast(x, bf16), {x: v}).astype(np.float32), v)
    p = var("p", index)
    np.testing.assert_array_equal(evaluate_expr(load(Buffer.of("T", f32, (4,)), (p,), p < const(4), 9.0), {p: np.arange(6), "T": v[:4]}), [*v[:4], 9, 9])
    assert evaluate_expr(unary("not", var("c", boolean)), {"c": np.array([True])}).tolist() == [False]
