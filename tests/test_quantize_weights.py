"""Weight quantizers against brute force, numpy's linear algebra and their own bounds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import QuantizationError
from luthier.passes.quantize.compensate_errors import inverse_factor
from luthier.passes.quantize.quantize_weights import METHODS, QuantizedWeight, fit_group, output_error, quantize
from luthier.passes.quantize.weight_grid import WIDTHS


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Normal with a few outliers, as trained layers have."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)) * 0.05
    w[rng.random((n, k)) < 0.01] *= 6
    return w.astype(np.float32)


def hessian(k: int, seed: int = 0, rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Correlated activations of unequal size, and their ``X.T X``."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k // 2)) @ rng.standard_normal((k // 2, k)) + 0.1 * rng.standard_normal((rows, k))
    x = (x * rng.uniform(0.1, 3, k)).astype(np.float64)
    return x, x.T @ x


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WIDTHS), st.sampled_from([0, 16, 32, 64, 128, 256]), st.booleans(), st.sampled_from(METHODS), st.sampled_from(["f16", "bf16", "f32"]),
    st.integers(1, 9), st.integers(1, 3), st.integers(0, 5),
)  # fmt: skip
def test_any_form(bits: int, group: int, symmetric: bool, method: str, dtype: str, n: int, groups: int, seed: int) -> None:
    k = (group or 24) * groups
    w = weights(n, k, seed)
    x, h = hessian(k, seed)
    q = quantize(w, bits, group, symmetric, method, h, dtype)
    assert q.codes.shape == w.shape and q.codes.max() < (1 << bits if bits else 3)
    assert q.scales.shape == (n, groups if group else 1) and q.scales.dtype.name == {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[dtype]
    assert (q.zeros is None) == (symmetric or bits == 0 or (bits == 1 and method != "hqq"))
    near = q.dequantize()
    error = np.square(x @ (near - w).T.astype(np.float64)).sum() / np.square(x @ w.T.astype(np.float64)).sum()
    np.testing.assert_allclose(output_error(w, near, h), error, rtol=1e-6, atol=1e-12)
    if method == "rtn" and bits >= 2:
        # half a step; another half where a zero point was rounded, or at the short end of a symmetric grid; and the scale's own rounding
        step = np.abs(np.repeat(q.scales.astype(np.float32), q.group, 1))
        assert (np.abs(near - w) <= step * (1 + 2.0**bits * {"f16": 2**-11, "bf16": 2**-8, "f32": 2**-20}[dtype])).all()
    if method == "mse":
        rounded = quantize(w, bits, group, symmetric, "rtn", None, dtype).dequantize()
        assert np.square(near - w).sum() <= np.square(rounded - w).sum() * (1 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.booleans(), st.integers(0, 99))
def test_rounding_is_to_the_nearest_code(bits: int, symmetric: bool, seed: int) -> None:
    """Nothing that the stored scale and zero point can express is nearer (all codes tried)."""
    w = weights(3, 32, seed)
    for method in ("rtn", "mse", "hqq"):
        q = quantize(w, bits, 16, symmetric, method)
        s = np.repeat(q.scales.astype(np.float64), 16, 1)
        z = np.repeat(q.zeros.astype(np.float64), 16, 1) if q.zeros is not None else q.zero
        every = np.stack([(c - z) * s for c in range(1 << bits)])
        best = np.abs(every - w).min(0)
        assert (np.abs(q.dequantize() - w) <= best + 1e-6 * np.abs(s)).all()


@pytest.mark.parametrize("bits", [0, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_better_methods_are_better(bits: int, symmetric: bool) -> None:
    """Clipping is at least as good as rounding on the weights, compensation at least as good as clipping on the outputs, on data apart."""
    w = weights(48, 256, 1)
    x, h = hessian(256, 1, 2000)
    h1, h2 = x[:1000].T @ x[:1000], x[1000:].T @ x[1000:]
    near = {m: quantize(w, bits, 64, symmetric, m, h1).dequantize() for m in METHODS}
    mse = {m: output_error(w, v) for m, v in near.items()}
    out = {m: output_error(w, v, h2) for m, v in near.items()}
    assert mse["mse"] <= mse["rtn"]
    if not symmetric or bits == 0:  # its own objective; zero points with a fraction only help (but for their rounding to f16)
        assert np.power(np.abs(near["hqq"] - w), 0.7).sum() <= 1.001 * np.power(np.abs(near["mse"] - w), 0.7).sum()
    assert out["gptq"] < 0.5 * out["mse"]


@pytest.mark.parametrize("importance", [False, True])
def test_ternary_clipping_is_the_best_of_all(importance: bool) -> None:
    """Brute force over every code of 6 columns, the scale fitted to each."""
    rng = np.random.default_rng(2)
    for _ in range(10):
        w = rng.standard_normal((1, 6)).astype(np.float32)
        q = quantize(w, 0, 0, method="mse", scale_dtype="f32")
        best = np.inf
        for code in itertools.product((-1, 0, 1), repeat=6):
            c = np.array(code, float)
            if c.any():
                best = min(best, np.square(w[0] - c * (c @ w[0]) / (c @ c)).sum())
        np.testing.assert_allclose(np.square(q.dequantize() - w).sum(), best, rtol=1e-5)


def test_independent_columns_need_no_compensation() -> None:
    """A diagonal Hessian: error compensation is rounding to the grid that clipping chose for those importances."""
    w = weights(8, 64)
    d = np.random.default_rng(0).uniform(0.5, 2, 64)
    a = quantize(w, 4, 32, method="gptq", hessian=np.diag(d))
    b = quantize(w, 4, 32, method="mse", importance=d / d.mean() + 1e-6)
    assert (a.codes == b.codes).all() and (a.scales == b.scales).all()


def test_factor_of_the_inverse() -> None:
    _, h = hessian(40)
    u = inverse_factor(h, 0.01)
    damped = h + 0.01 * np.diag(h).mean() * np.eye(40)
    np.testing.assert_allclose(u.T @ u @ damped, np.eye(40), atol=1e-8)
    assert np.allclose(u, np.triu(u))
    assert np.isfinite(inverse_factor(np.zeros((4, 4)))).all()  # nothing was ever active


def test_zero_weights_and_dead_columns() -> None:
    w = np.zeros((4, 32), np.float32)
    for bits, method in itertools.product((0, 1, 2, 4, 8), METHODS):
        q = quantize(w, bits, 16, False, method, np.zeros((32, 32)))
        assert np.abs(q.dequantize()).max() <= (1.0 if bits == 1 else 0.0)  # 1 bit has no zero


def test_stored_size() -> None:
    q = quantize(weights(8, 128), 4, 64, True)
    assert q.nbytes == 8 * (64 + 2 * 2) and q.bits_per_weight == 4.25
    assert quantize(weights(8, 128), 0, 64).nbytes == 8 * (26 + 4)
    assert quantize(weights(8, 128), 4, 64, method="hqq").bits_per_weight == 4.5


def test_groups_that_fit() -> None:
    assert [fit_group(k, 64) for k in (576, 1536, 96, 48, 100, 24)] == [64, 64, 32, 16, None, None]
    assert fit_group(100, 0) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "7 bits"), ({"bits": 4, "group": 48}, "do not divide"), ({"bits": 4, "group": -1}, "do not divide"), ({"bits": 4, "method": "awq"}, "unknown method"),
        ({"bits": 4, "method": "gptq"}, "needs activation statistics"), ({"bits": 4, "scale_dtype": "f8"}, "f8"), ({"bits": 4, "method": "gptq", "hessian": np.eye(3)}, "do not fit"),
        ({"bits": 4, "method": "gptq", "hessian": np.full((64, 64), np.nan)}, "NaN"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize(weights(4, 64), **{"group": 32, **options})  # type: ignore[arg-type]


def test_bad_weights_and_scales() -> None:
    with pytest.raises(QuantizationError, match="16 weights are NaN"):
        quantize(np.array([[1, np.nan] * 16], np.float32), 4, 16)
    with pytest.raises(QuantizationError, match="matrix"):
        quantize(np.zeros(16, np.float32), 4, 16)
    with pytest.raises(QuantizationError, match="does not fit float16"):
        quantize(np.full((1, 16), 1e9, np.float32), 4, 16)
    codes, ones = np.zeros((2, 32), np.uint8), np.ones((2, 2), np.float16)
    for scales in (ones * 0, ones * np.nan, ones * np.inf):
        with pytest.raises(QuantizationError, match="scales are NaN or infinite"):
            QuantizedWeight(codes, scales.astype(np.float16), None, 8, 4, 16)
    with pytest.raises(QuantizationError, match="do not fit"):
        QuantizedWeight(codes, ones, None, 8, 4, 24)
    with pytest.raises(QuantizationError, match="do not fit 4 bits"):
        QuantizedWeight(codes + 16, ones, None, 8, 4, 16)
    with pytest.raises(QuantizationError, match="zero point is NaN"):
        QuantizedWeight(codes, ones, ones * np.nan, 8, 4, 16)
