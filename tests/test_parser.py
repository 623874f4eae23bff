"""Text of the loop IR parses back to the same function, and the verifier names what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir.dtypes import bf16, boolean, f32, i8, i32, i64, index, u8
from luthier.ir.errors import VerificationError
from luthier.ir.expr import (
    bcast,
    binary,
    bitcast,
    call,
    cast,
    const,
    extract,
    load,
    make_node,
    maximum,
    ramp,
    select,
    shuffle,
    unary,
    var,
    vreduce,
)
from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import EMPTY, Alloc, Barrier, Buffer, Call, For, Func, If, Let, Store, While, block
from luthier.ir.parser import parse_func, parse_funcs
from luthier.ir.verify import verify

n, m = var("n", lo=1), var("m", lo=None, hi=100)
A, B = Buffer.of("A", f32, (n, 8), writable=False), Buffer.of("B", f32, (n * 8,))
C = Buffer.of("/model/out:0", i8, (n,))
T = Buffer.of("T", f32, (4,), "const", False)
i, j = var("i", lo=0, hi=n - 1), var("u.j.0'", lo=None)
s = Buffer.of("s", f32.vec(4), (), "local")
sh = Buffer.of("sh", bf16, (16,), "shared")


def sample() -> Func:
    ix = ramp(i * 8, 1, 4)
    row = load(A, (bcast(i, 4), ramp(const(0), 2, 4)), ramp(const(0), 2, 4) < bcast(const(7), 4), -0.5)
    v, w = var("v", f32), var("w", i64, lo=-3, hi=9)
    k = var("k", lo=0, hi=3)
    body = block(
        Let(v, A[i, 0] * 2.0 - (A[i, 1] - A[i, 2]) / const(3.0, f32)),
        Let(w, cast(v, i64)),
        Store(s, (), row * bcast(v, 4) + bcast(const(float("-inf"), f32), 4)),
        Store(B, (ix,), maximum(s[()], shuffle([s[()], s[()]], [0, 5, -1, 3])), ix < bcast(n * 8, 4)),
        Store(B, (i * 8 + 7,), select((v < 0.0) | unary("isnan", v), vreduce("add", s[()]), extract(s[()], 2) + T[i % 4])),
        If(w < const(3, i64), Store(C, (i,), const(-3, i8)), block(Store(C, (i,), cast(bitcast(v, i32) >> const(3, i32), i8)))),
        While(B[i] < 1e-5, Store(B, (i,), B[i] + 1.0)),
        For(k, const(0), const(4), "vectorize", Store(B, (k,), binary("pow", unary("exp", B[k]), const(2, f32)))),
        For(j, i, n - 1, "thread.x", block(Store(sh, (j,), cast(v, bf16)), Barrier("shared"))),
        If(n.eq(4), EMPTY),
        Call("dot", ((B, i * 8), A, i, const(1.5, f32)), (("width", 4), ("how", "fast"))),
    )
    one = call("dp4", i32.vec(4), bcast(const(1, u8), 4), attr=(2, "x"))
    return Func("kern.0", (A, B, C, m, n), For(i, const(0), n, "parallel", Alloc(s, Alloc(sh, block(body, Let(var("q", i32.vec(4)), one))))))


def test_round_trip_is_exact():
    f = sample()
    g = parse_func(str(f))
    assert str(g) == str(f)
    assert g == f


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "floordiv", "mod", "and", "or", "xor", "shl", "shr", "min", "rem", "lt", "ne"])
def test_precedence(op):
    """Both nestings of every operator pair stay apart."""
    a, b, c = (var(x, i32) for x in "abc")
    out = Buffer.of("O", i32, (1,))
    for other in ("add", "mul", "sub", "and", "shl", "div"):
        for e in (make_node(other, i32, (make_node("add", i32, (a, b)), c)), make_node(other, i32, (a, make_node("sub", i32, (b, c))))):
            x = make_node(op, boolean if op in ("lt", "ne") else i32, (e, a))
            f = Func("f", (out, a, b, c), Store(out, (const(0),), x if x.dtype is i32 else cast(x, i32)))
            assert parse_func(str(f)) == f


def test_const_data_and_several_functions():
    f = Func("f", (B, n), Store(B, (const(0),), T[const(2)]), {}, {"T": np.arange(4, dtype=np.float32)})
    out = np.zeros(8, np.float32)
    run_func(verify(parse_func(str(f), f.data)), [out], {"n": 1})
    assert out[0] == 2
    both = parse_funcs(str(f) + str(sample()))
    assert list(both) == ["f", "kern.0"] and both["kern.0"] == sample()


@pytest.mark.parametrize(
    "text, what",
    [
        ("func f(A: f32[4]):\n  A[x] = 1.0:f32\n", "line 2: variable x is not defined"),
        ("func f(A: f32[4]):\n  B[0] = 1.0:f32\n", "buffer B is not in scope"),
        ("func f(A: f32[4]):\n  A[0] = A[0] + 1\n", "add of f32 and index"),
        ("func f(A: f32[4]):\n  A[0] = \n", "expression expected"),
        ("func f(A: f33[4]):\n  pass\n", "no type named 'f33'"),
    ],
)
def test_errors_name_the_line(text, what):
    with pytest.raises(VerificationError, match=what.replace("+", r"\+")):
        parse_func(text)


X, Y = Buffer.of("X", f32, (4,)), Buffer.of("Y", f32, (2, 2), "local")
z, h = var("z"), var("h", i32)


@pytest.mark.parametrize(
    "body, what, flags",
    [
        (Store(X, (z,), const(0, f32)), "variable z .* not defined", ()),
        (Store(X, (const(0),), const(0, i32)), "i32 is stored to X, expected f32", ()),
        (Store(X, (const(0), const(1)), const(0, f32)), "1 dimensions and 2 indices", ()),
        (Store(Y, (const(0), const(1)), const(0, f32)), "Y is not in scope", ()),
        (block(Let(h, const(0, i32)), Store(X, (h,), const(0, f32))), "is i32, expected index", ()),
        (Store(X, (ramp(const(0), 1, 4),), const(0, f32)), "expected f32x4", ()),
        (Store(X, (const(0),), const(0, f32), const(1, i32)), "mask of X is i32", ()),
        (Let(h, const(0, f32)), "h is i32, its value f32", ()),
        (If(X[0], EMPTY), "the condition is f32", ()),
        (For(z, const(0), const(4), "diagonal", EMPTY), "no loop kind 'diagonal'", ()),
        (For(z, const(0), const(4), "serial", For(z, const(0), const(4), "serial", EMPTY)), "already in use", ()),
        (For(z, const(0), const(4), "vectorize", EMPTY), "kind vectorize should be gone", ("no_vectorize_loops",)),
        (Alloc(Y, EMPTY), "2 dimensions after flatten", ("flat",)),
        (Alloc(Buffer.of("P", f32, (4,)), EMPTY), "scope 'param'", ()),
        (Alloc(Buffer.of("X", f32, (4,), "local"), EMPTY), "already in scope", ()),
        (Store(X, (const(0),), unary("exp", X[0])), "exp should have been expanded", ("no_math",)),
        (Barrier("moon"), "no barrier scope", ()),
        (block(If(const(True, boolean), Let(z, const(1, index))), Store(X, (z,), const(0, f32))), "z .* not defined", ()),
    ],
)
def test_verifier_names_what_is_wrong(body, what, flags):
    with pytest.raises(VerificationError, match=what):
        verify(Func("f", (X,), body), flags)


def test_verifier_accepts():
    f = Func("f", (X,), Alloc(Y, For(z, const(0), const(2), "serial", block(Store(Y, (z, z), X[z]), Store(X, (z,), unary("exp", Y[z, z]))))))
    assert verify(f) is f
    assert verify(f, ("no_math", "no_vectorize_loops"), native=("exp",)) is f
