"""Integer operators after legalisation: the same values in the interpreter, and nothing left that an instruction would trap on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from luthier.ir.dtypes import DType, f32, f64, i8, i16, i32, i64, index, u8, u16, u32, u64
from luthier.ir.expr import binary, cast, const, load, var, walk
from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import Buffer, For, Func, Store, nodes_of
from luthier.passes.loop.legalize_arithmetic import legal, legalize_arithmetic
from luthier.passes.loop.place_lets import place_lets
from tests.codegen.test_printers_ops import N, groups, kernel, outputs, same, values

INTS = [i8, u8, i16, u16, i32, u32, i64, u64]
CASES_BY_TYPES = groups(True)


@pytest.mark.parametrize("name", list(CASES_BY_TYPES))
def test_values_stay(name: str) -> None:
    ins, group = CASES_BY_TYPES[name]
    f = kernel(ins, group, 1)
    g = place_lets(legalize_arithmetic(f))
    rng = np.random.default_rng(5)
    arrays: dict[str, Any] = {n: values(d, rng) for n, d in zip("AB", ins, strict=False)}
    want, got = outputs(f), outputs(f)
    run_func(f, {**arrays, **want})
    run_func(g, {**arrays, **got})
    same(got, want, group)


def both(op: str, d: DType, divisor: int | None = None) -> Func:
    a, b, y = (Buffer.of(n, d, (N,), writable=n == "Y") for n in "ABY")
    i = var("i", lo=0, hi=N - 1)
    r = load(b, (i,)) if divisor is None else const(divisor, d)
    return Func("f", (a, b, y), For(i, const(0), const(N), "serial", Store(y, (i,), binary(op, load(a, (i,)), r))))


@pytest.mark.parametrize("d", INTS, ids=str)
def test_no_operand_traps(d: DType) -> None:
    """What is left is evaluated operator by operator: divisors, quotients and amounts are those that instructions take."""
    rng = np.random.default_rng(6)
    low, high = d.limits()
    for op in ("div", "rem", "floordiv", "mod", "shl", "shr"):
        for given in (None, 0, 1, 2, 7, 8, low, high, *(() if low == 0 else (-1, -3))):
            f = both(op, d, given)
            g = legalize_arithmetic(f)
            assert legalize_arithmetic(g) is g, (op, given)
            a, b = values(d, rng), values(d, rng)
            want, got = np.zeros(N, d.numpy), np.zeros(N, d.numpy)
            run_func(f, {"A": a, "B": b, "Y": want})
            run_func(g, {"A": a, "B": b, "Y": got})
            np.testing.assert_array_equal(got, want, err_msg=f"{op} {given}")
            for e in nodes_of(g.body):
                if e.op in ("div", "rem", "floordiv", "mod", "shl", "shr"):
                    parts = []
                    for x in e.args:
                        v = np.zeros(N, d.numpy)
                        y, i = g.buffers[2], g.body.var  # type: ignore[attr-defined]
                        part = For(i, const(0), const(N), "serial", Store(y, (i,), x))
                        run_func(Func("p", g.params, part), {"A": a, "B": b, "Y": v})
                        parts.append(v)
                    x, z = parts
                    if e.op in ("shl", "shr"):
                        assert ((z >= 0) & (z < d.bits)).all()
                    else:
                        assert (z != 0).all() and not ((x == low) & (z == -1) & (low < 0)).any()
                        assert e.op in ("div", "rem") or ((x >= 0) & (z > 0)).all()


def test_what_is_known_is_not_tested() -> None:
    i, n = var("i", index, 0, 99), var("n", index, 1, 50)
    j = var("j", index, -5, 99)
    assert legal(binary("floordiv", i, n)) is None and legal(binary("mod", i, const(7))) is None
    assert repr(legal(binary("floordiv", j, const(8)))) == repr(binary("shr", j, const(3)))
    x = var("x", i32, None)
    assert legal(binary("shl", x, const(31, i32))) is None and legal(binary("shl", x, const(32, i32))) is const(0, i32)
    masked = binary("shr", x, binary("and", var("s", i32, None), const(31, i32)))
    assert legal(masked) is None

    assert legal(binary("div", x, const(-3, i32))) is None
    found = legal(binary("mod", x, const(7, i32)))
    assert found is not None and not {"eq", "and", "xor"} & {e.op for e in walk(found)}


@pytest.mark.parametrize("s", [f32, f64], ids=str)
def test_conversions_saturate(s: DType) -> None:
    edges = [0, -0.0, 0.5, -0.5, 127.5, -128.9, 255.9, 256, 32767.6, 65536, 3e9, -3e9, 1e30, np.inf, -np.inf, np.nan, 1e-40, -1e-40]
    x = np.array(edges, s.numpy)
    a = Buffer.of("A", s, x.shape, writable=False)
    i = var("i", lo=0, hi=x.size - 1)
    for d in (i8, u8, i16, u16):
        y = Buffer.of("Y", d, x.shape)
        f = Func("f", (a, y), For(i, const(0), const(x.size), "serial", Store(y, (i,), cast(load(a, (i,)), d))))
        got = np.zeros(x.shape, d.numpy)
        run_func(legalize_arithmetic(f), {"A": x, "Y": got})
        low, high = d.limits()
        want = np.nan_to_num(np.clip(np.trunc(x.astype(np.float64)), low, high), nan=0)
        np.testing.assert_array_equal(got, want.astype(d.numpy))
