"""Functions that take a loop an element, and factorisations of matrices, against torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.check import build, check_op, run_node

rng = np.random.default_rng(0)


def fl(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


X = np.array([0.5, 1.0, 1.5, 3.0, 7.5, 0.0, -1.0, np.nan], np.float32)
SPECIAL = {
    "zeta": ("zeta", np.array([2, 3, 1.5, 1, 0.5, 4, 2, 3], np.float32), np.array([1, 2.5, 10, 2, 2, -1.5, -2, 0.25], np.float32)),
    "igamma": ("gammainc", np.abs(X), np.array([0.1, 1, 3, 2.5, 9, 1, 2, 1], np.float32)),
    "igammac": ("gammaincc", np.array([0, 1, 30, 2, 50, 5, -1, 2], np.float32), np.array([1, 0, 25, 8, 55, np.inf, 1, np.nan], np.float32)),
    "hermite_polynomial_h": ("hermite_polynomial_h", X, np.array([0, 1, 5, 4, 3, 7, -1, 2], np.float32)),
    "hermite_polynomial_he": ("hermite_polynomial_he", X, np.array([0, 1, 5, 4, 3, 7, 2, 200], np.float32)),
    "laguerre_polynomial_l": ("laguerre_polynomial_l", X[:7], np.array([0, 1, 5, 4, 3, 7, -3], np.float32)),
    "legendre_polynomial_p": ("legendre_polynomial_p", X[:7], np.array([0, 1, 5, 4, 3, 7, 9], np.float32)),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_functions_of_two_numbers(name):
    torch = pytest.importorskip("torch")
    theirs, a, b = SPECIAL[name]
    want = getattr(torch.special, theirs)(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    # exp(a log x - x - log gamma(a)) of a = x = 50: each term is about 200, whose rounding is 1e-5
    check_op(f"aten::{name}", [a, b], want=[want], rtol=1e-4 if "igamma" in name else 2e-5, atol=2e-6)


def test_greatest_common_divisors():
    a, b = np.array([12, -18, 0, 7, 0, 1 << 40], np.int64), np.array([18, 12, 5, 0, 0, 3 << 20], np.int64)
    check_op("aten::gcd", [a, b], want=[np.gcd(a, b)])


@pytest.mark.parametrize("shape", [(4, 4), (2, 5, 3), (3, 5)])
def test_lu_and_qr(shape):
    torch = pytest.importorskip("torch")
    a = fl(*shape)
    lu, pivots, info = torch.linalg.lu_factor_ex(torch.from_numpy(a))
    symbolic = ("",)
    check_op("luthier::LU", [a], outputs=3, want=[lu.numpy(), pivots.numpy(), info.numpy()], symbolic=symbolic, rtol=1e-4, atol=1e-5)
    h, tau = torch.geqrf(torch.from_numpy(a))
    check_op("luthier::QR", [a], outputs=2, want=[h.numpy(), tau.numpy()], symbolic=symbolic, rtol=1e-4, atol=1e-5)
    if shape[-2] >= shape[-1]:
        q = torch.linalg.householder_product(h, tau).numpy()
        check_op("luthier::HouseholderProduct", [h.numpy(), tau.numpy()], want=[q], symbolic=symbolic, rtol=1e-4, atol=1e-5)
    p, _, _ = torch.lu_unpack(lu, pivots)
    check_op("luthier::PivotsToPermutation", [pivots.numpy(), a], want=[p.numpy().argmax(-2)], symbolic=symbolic)


def test_a_column_without_a_pivot_is_named():
    a = np.array([[4, 8, 3], [2, 4, 7], [1, 2, 1]], np.float32)
    assert check_op("luthier::LU", [a], outputs=3, symbolic=("",), oracle="")[2] == 2


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("unit", [0, 1])
def test_triangular_solve(upper, unit):
    a, b = fl(2, 4, 4) + 4 * np.eye(4, dtype=np.float32), fl(2, 4, 3)
    t = np.triu(a) if upper else np.tril(a)
    if unit:
        t = t - t * np.eye(4) + np.eye(4)
    attrs = {"upper": upper, "unit": unit}
    check_op("luthier::TriangularSolve", [a, b], attrs, want=[np.linalg.solve(t, b).astype(np.float32)], symbolic=("",), rtol=1e-4, atol=1e-5)


def test_cholesky():
    a = fl(2, 5, 5)
    a = a @ a.swapaxes(1, 2) + np.eye(5, dtype=np.float32)
    check_op("luthier::Cholesky", [a], outputs=2, want=[np.linalg.cholesky(a), np.zeros(2, np.int32)], symbolic=("",), rtol=1e-4, atol=1e-5)


def run(op: str, a: np.ndarray, outputs: int) -> list[np.ndarray]:
    return run_node(build(op, [a], {}, outputs, "", ()), [a], {})


@pytest.mark.parametrize("n", [1, 2, 6])
def test_symmetric_eigenvalues(n):
    a = fl(3, n, n)
    a = a + a.swapaxes(1, 2)
    values, v = run("luthier::Eigh", a, 2)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v * values[:, None] @ v.swapaxes(1, 2), a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v.swapaxes(1, 2) @ v, np.broadcast_to(np.eye(n), a.shape), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (6, 4), (2, 5, 5)])
def test_singular_values(shape):
    a = fl(*shape)
    u, s, v = run("luthier::SVD", a, 3)
    np.testing.assert_allclose(s, np.linalg.svd(a, compute_uv=False), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(u * s[..., None, :] @ v.swapaxes(-1, -2), a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(u.swapaxes(-1, -2) @ u, np.broadcast_to(np.eye(shape[-1]), v.shape), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_copied_to_positions(axis):
    x, where = fl(5, 6, 11), np.array([4, 1, 4, 9], np.int64)
    shape = [5, 6, 11]
    shape[axis] = len(where)
    check_op("luthier::IndexCopy", [x, where, fl(*shape)], {"axis": axis}, oracle="")
