"""The math rules against numpy in a wider type, in units in the last place, and at the special values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from luthier.ir.dtypes import bf16, f16, f32, f64, i8, i32, u32
from luthier.ir.expr import UNARY, bcast, binary, const, load, unary, var, walk
from luthier.ir.interpret.loops import evaluate_expr, run_func
from luthier.ir.loop import Buffer, For, Func, Store
from luthier.ir.math_rules import RULES, expand_expr, expand_op
from luthier.ir.verify import TRANSCENDENTAL, verify
from luthier.passes.loop.expand_math import expand_math

REF = {
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log1p": np.log1p, "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "erf": np.vectorize(math.erf, otypes=[np.float64]), "sin": np.sin, "cos": np.cos,
    "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "rsqrt": lambda x: 1 / np.sqrt(x),
}
# operator: (ULP in f32, ULP in f64, samples from, to)
LIMITS = {
    "exp": (2, 2, -87, 88), "exp2": (2, 2, -125, 127), "expm1": (3, 3, -20, 88), "log": (3, 3, 1e-30, 1e30), "log2": (3, 3, 1e-30, 1e30),
    "log1p": (3, 3, -0.999, 1e6), "tanh": (4, 4, -12, 12), "sigmoid": (4, 4, -80, 80), "erf": (4, 4, -7, 7), "sin": (4, 4, -8192, 8192),
    "cos": (4, 4, -8192, 8192), "tan": (4, 4, -8192, 8192), "asin": (4, 4, -1, 1), "acos": (4, 4, -1, 1), "atan": (4, 4, -1e4, 1e4),
    "sinh": (5, 5, -88, 88), "cosh": (5, 5, -88, 88), "asinh": (5, 5, -1e10, 1e10), "acosh": (5, 5, 1, 1e10), "atanh": (5, 5, -0.9999, 0.9999),
    "rsqrt": (2, 2, 1e-30, 1e30),
}


def samples(lo: float, hi: float, dt: type, n: int = 40_000) -> np.ndarray:
    """Dense: even, logarithmic towards 0 and towards +-1, and around 1."""
    r = np.random.default_rng(7)
    t = r.uniform(lo, hi, n)
    mag = 10.0 ** r.uniform(-12, math.log10(max(abs(lo), abs(hi))), n) * np.where(r.random(n) < 0.5, -1, 1)
    near = 1 + r.uniform(-0.3, 0.3, n) * 10.0 ** r.uniform(-6, 0, n)
    x = np.concatenate([t, mag, near, -near]).astype(dt)
    return x[(x >= lo) & (x <= hi)]


def ulps(got: np.ndarray, want: np.ndarray, dt: type) -> float:
    """Largest error in units in the last place of the (normal) exact value."""
    fin = np.finfo(dt)
    ok = (np.abs(want) >= fin.tiny) & (np.abs(want) <= fin.max)
    _, e = np.frexp(want[ok])
    unit = np.ldexp(want.dtype.type(1), e - 1 - fin.nmant)
    return float(np.max(np.abs(got[ok].astype(want.dtype) - want[ok]) / unit))


def test_every_transcendental_has_a_rule_and_a_bound():
    basic = set("neg abs floor ceil round trunc sqrt not isnan isinf popcount".split())
    assert set(RULES) == (set(UNARY) - basic) | {"pow", "atan2"} == TRANSCENDENTAL
    assert set(LIMITS) == set(RULES) - {"pow", "atan2"}


@pytest.mark.parametrize("op", sorted(LIMITS))
@pytest.mark.parametrize("bits", [32, 64])
def test_ulp(op, bits):
    d, dt, wide = (f32, np.float32, np.float64) if bits == 32 else (f64, np.float64, np.longdouble)
    a, b, lo, hi = LIMITS[op]
    x = samples(lo, hi, dt)
    e = expand_op(op, var("x", d))
    assert not any(n.op in RULES for n in walk(e))
    with np.errstate(all="ignore"):
        if op == "erf":
            got, want = evaluate_expr(e, {"x": x}), REF[op](x.astype(np.float64))
        else:
            got, want = evaluate_expr(e, {"x": x}), REF[op](x.astype(wide))
    assert got.dtype == dt
    assert ulps(got, want, dt) <= (a if bits == 32 else b)


@pytest.mark.parametrize("op", sorted(LIMITS))
@pytest.mark.parametrize("d", [f32, f64], ids=str)
def test_special_values(op, d):
    dt = d.numpy.type
    fin = np.finfo(dt)
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 2, -2, fin.max, -fin.max, fin.tiny, fin.smallest_subnormal, -fin.smallest_subnormal * 5], dt)
    if op in ("sin", "cos", "tan"):
        x = x[np.abs(x) != fin.max]
    with np.errstate(all="ignore"):
        want = REF[op](x.astype(np.float64 if d is f32 or op == "erf" else np.longdouble)).astype(dt)
    got = evaluate_expr(expand_op(op, var("x", d)), {"x": x})
    np.testing.assert_allclose(got, want, rtol=6 * fin.eps, atol=fin.smallest_subnormal * 3)


@pytest.mark.parametrize("d", [f32, f64], ids=str)
def test_exp_of_denormal_results_and_masked_scores(d):
    dt = d.numpy.type
    x = np.linspace(-104 if d is f32 else -745.2, -87 if d is f32 else -708, 20_000).astype(dt)
    got = evaluate_expr(expand_op("exp", var("x", d)), {"x": x})
    want = np.exp(x.astype(np.longdouble))
    assert np.max(np.abs(got - want)) <= 1.01 * np.finfo(dt).smallest_subnormal * np.maximum(1, want / np.finfo(dt).tiny).max()
    assert evaluate_expr(expand_op("exp", var("x", d)), {"x": np.array(-np.inf, dt)}) == 0


@pytest.mark.parametrize("d, top, tol", [(f32, 2.0**24, 2.0**-22), (f64, 2.0**52, 2.0**-50)], ids=["f32", "f64"])
@pytest.mark.parametrize("op", ["sin", "cos"])
def test_large_angles(op, d, top, tol):
    dt = d.numpy.type
    x = np.random.default_rng(1).uniform(-top, top, 20_000).astype(dt)
    got = evaluate_expr(expand_op(op, var("x", d)), {"x": x})
    want = REF[op](x.astype(np.longdouble))
    assert np.max(np.abs(got - want)) <= tol
    huge = np.array([1e30, -3e38, np.finfo(dt).max], dt)
    assert np.all(np.abs(evaluate_expr(expand_op(op, var("x", d)), {"x": huge})) <= 1)


@pytest.mark.parametrize("d", [f32, f64], ids=str)
def test_pow_ulp(d):
    dt, wide = d.numpy.type, np.float64 if d is f32 else np.longdouble
    r = np.random.default_rng(3)
    n = 100_000
    x = np.concatenate([10 ** r.uniform(-30, 30, n), 1 + r.uniform(-1, 1, n) * 10.0 ** r.uniform(-7, 0, n), r.uniform(0, 20, n)]).astype(dt)
    y = np.concatenate([r.uniform(-10, 10, n), r.uniform(-1, 1, n) * 10.0 ** r.uniform(-2, 7, n), r.integers(-10, 10, n)]).astype(dt)
    e = expand_op("pow", var("x", d), var("y", d))
    with np.errstate(all="ignore"):
        want = np.power(x.astype(wide), y.astype(wide))
    assert ulps(evaluate_expr(e, {"x": x, "y": y}), want, dt) <= 2


@pytest.mark.parametrize("op", ["pow", "atan2"])
@pytest.mark.parametrize("d", [f32, f64], ids=str)
def test_binary_special_values(op, d):
    dt = d.numpy.type
    v = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 2, -2, 3, -3, 0.5, -0.5, 2.5, -2.5, 1e30, -1e30, 1e-30, 1e-42, 7, -7], dt)
    a, b = np.meshgrid(v, v)
    with np.errstate(all="ignore"):
        want = (np.power if op == "pow" else np.arctan2)(a.astype(np.longdouble), b.astype(np.longdouble)).astype(dt)
    got = evaluate_expr(expand_op(op, var("a", d), var("b", d)), {"a": a, "b": b})
    np.testing.assert_allclose(got, want, rtol=4 * np.finfo(dt).eps, atol=np.finfo(dt).smallest_subnormal * 2)


@pytest.mark.parametrize("p", [0, 1, 2, 3, 4, -1, -2, 0.5, -0.5, 2.5])
def test_pow_of_constant_exponent(p):
    x = np.array([0.5, 2, 3, 10, 0, np.inf, 1e-20], np.float32)
    got = evaluate_expr(expand_expr(binary("pow", var("x", f32), const(p, f32))), {"x": x})
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(got, np.power(x, np.float32(p)), rtol=4e-7)


@pytest.mark.parametrize("d", [i8, i32, u32], ids=str)
def test_integer_pow_wraps(d):
    lo = 0 if d is u32 else -7
    a, b = np.meshgrid(np.arange(lo, 12).astype(d.numpy), np.arange(lo, 40).astype(d.numpy))
    got = evaluate_expr(expand_op("pow", var("a", d, None), var("b", d, None)), {"a": a, "b": b})
    m = 1 << d.bits
    for x, y, g in zip(a.ravel().tolist(), b.ravel().tolist(), got.ravel().tolist(), strict=True):
        want = x**y if y >= 0 else {1: 1, -1: -1 if y % 2 else 1}.get(x, 0)
        assert (g - want) % m == 0, (x, y)
    assert evaluate_expr(expand_expr(binary("pow", var("a", d), const(5, d))), {"a": np.array([3], d.numpy)})[0] == 243 - (256 if d is i8 else 0)


@pytest.mark.parametrize("op", sorted(set(LIMITS) - {"acosh"}))
@pytest.mark.parametrize("d", [f16, bf16], ids=str)
def test_narrow_floats_are_rounded_once(op, d):
    x = np.linspace(0.02, 0.98, 97).astype(d.numpy)
    got = evaluate_expr(expand_op(op, var("x", d)), {"x": x})
    want = REF[op](x.astype(np.float64)).astype(d.numpy)
    assert got.dtype == d.numpy
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=2.0 ** -(10 if d is f16 else 7))
    assert np.mean(got == want) > 0.98


def test_lanes_and_the_pass():
    """Vectors give the bits of scalars; ``native`` operators stay, and rules use them."""
    x = np.linspace(-5, 5, 16, dtype=np.float32)
    for op in sorted(RULES):
        args = [unary("abs", load(Buffer.of("X", f32, (16,)), (var("i"),))) + 0.5] * (2 if op in ("pow", "atan2") else 1)
        e = binary(op, *args) if len(args) == 2 else unary(op, args[0])
        i = var("i")
        a, b = Buffer.of("X", f32, (16,)), Buffer.of("Y", f32, (16,))
        f = verify(expand_math(Func("f", (a, b), For(i, const(0), const(16), "serial", Store(b, (i,), e)))), ("no_math",))
        v = var("v", f32.vec(4))
        y, z = np.zeros(16, np.float32), x.reshape(4, 4)
        run_func(f, [x, y])
        va = unary("abs", v) + bcast(const(0.5, f32), 4)
        lanes = evaluate_expr(expand_op(op, *([va] * len(args))), {"v": z})
        np.testing.assert_array_equal(lanes.reshape(-1), y)
    kept = expand_expr(unary("sigmoid", var("x", f32)), native=("exp",))
    assert {n.op for n in walk(kept)} & set(RULES) == {"exp"}


COMPILED = {
    "exp": "Exp", "log": "Log", "tanh": "Tanh", "sigmoid": "Sigmoid", "erf": "Erf", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin",
    "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(COMPILED))
def test_compiled_code_keeps_the_bounds(op):
    """Multiply and add may be contracted there."""
    from onnx import TensorProto, helper

    import luthier

    limit, _, lo, hi = LIMITS[op]
    x = samples(lo, hi, np.float32)
    v = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [len(x)]) for n in "xy"]
    model = helper.make_model(helper.make_graph([helper.make_node(COMPILED[op], ["x"], ["y"])], "g", v[:1], v[1:]), opset_imports=[helper.make_opsetid("", 20)])
    y = luthier.compile(model)(x)
    with np.errstate(all="ignore"):
        assert ulps(y[0] if isinstance(y, tuple) else y, REF[op](x.astype(np.float64)), np.float32) <= limit
