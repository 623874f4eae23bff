"""Error compensation: columns are quantized one after another, and what one loses is added to those that are still to come.

With ``H = X.T X`` of the layer's inputs, rounding column j by d costs least when the columns after it change by
``-d * Hinv[j, j+1:] / Hinv[j, j]`` (optimal brain surgeon; the form with the Cholesky factor of ``Hinv`` is GPTQ's, Frantar et al. 2022).
Columns that matter most (largest ``H[j, j]``) come first; the groups' scales are fixed before, by clipping weighted with H's diagonal, so the
stored order stays.
"""

from __future__ import annotations

import numpy as np

from luthier.errors import QuantizationError
from luthier.passes.quantize.clip_weights import clip_weights
from luthier.passes.quantize.weight_grid import Array, Grid

__all__ = ["column_moments", "compensate_errors", "inverse_factor", "shrink_correlations"]


def column_moments(hessian: Array) -> tuple[Array, Array, float]:
    """(a copy of ``hessian`` [K, K] in f64, its diagonal where columns that were never active count as average, that average).

    Raises QuantizationError for statistics that are no numbers."""
    h = np.array(hessian, np.float64)
    d = np.diagonal(h)
    if not np.isfinite(h).all() or (d < 0).any():
        raise QuantizationError("the activation statistics hold NaN, infinite or negative squares", hint="check the calibration data")
    mean = float(d[d > 0].mean()) if (d > 0).any() else 1.0
    return h, np.where(d > 0, d, mean), mean


def inverse_factor(hessian: Array, damping: float = 0.01) -> Array:
    """Upper triangular U with ``U.T U = inv(H + damping * mean(diag H) * I)``, f64 [K, K]. Columns never active count as average.

    Raises QuantizationError for a Hessian that is no number or not positive."""
    h, moments, mean = column_moments(hessian)
    h[np.diag_indices_from(h)] = moments
    for factor in (damping, 10 * damping, 100 * damping):  # rank-deficient statistics of few rows need more
        try:
            # of the last column first: H = R R.T with an upper R, whose inverse it is
            lower = np.linalg.cholesky((h + factor * mean * np.eye(len(h)))[::-1, ::-1])
            return np.ascontiguousarray(np.linalg.inv(lower)[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
    raise QuantizationError("the activation statistics of this layer are not positive definite", hint="calibrate with more data")


def shrink_correlations(hessian: Array, rows: int) -> Array:
    """``hessian`` with its off-diagonal part smaller by the share of it that ``rows`` samples of independent columns would show.

    A sampled correlation of nothing has the variance 1 / rows; where the sum of squared correlations is not much above that, compensation
    would only fit the calibration data (the shrinkage estimator of Schaefer and Strimmer 2005, with that variance for all)."""
    h = np.asarray(hessian, np.float64)
    d = np.sqrt(np.maximum(np.diagonal(h), 0))
    live = d > 0
    r = h / np.where(live, d, 1)[:, None] / np.where(live, d, 1)
    k = int(live.sum())
    seen = float(np.square(r).sum()) - k
    share = min(1.0, k * (k - 1) / max(1, rows) / seen) if seen > 0 else 1.0
    out = h * (1 - share)
    out[np.diag_indices_from(out)] = np.diagonal(h)
    return out


def compensate_errors(w: Array, grid: Grid, hessian: Array, damping: float = 0.01, block: int = 96) -> tuple[Array, Array, Array]:
    """(codes, scale, zero) for ``w`` [N, groups, group] and ``hessian`` [K, K] (any multiple of ``X.T X``); codes [N, K] f32, parameters
    [N, groups, 1]. Cost: N * K^2 operations, and K^3 once for the factor."""
    n, groups, group = w.shape
    k = groups * group
    if hessian.shape != (k, k):
        raise QuantizationError(f"activation statistics of shape {list(hessian.shape)} do not fit {k} columns")
    d = np.diagonal(hessian)
    importance = (np.maximum(d, 0) / max(float(d.mean()), 1e-30) + 1e-6).astype(np.float32).reshape(1, groups, group)
    scale, zero = clip_weights(w, grid, importance)
    order = np.argsort(-d, kind="stable")
    u = inverse_factor(hessian[np.ix_(order, order)], damping)
    left = w.reshape(n, k)[:, order].T.astype(np.float64)  # [K, N]: a column is a contiguous row
    s = scale[:, order // group, 0].T.astype(np.float64)
    z = zero[:, order // group, 0].T.astype(np.float64)
    out = np.empty((k, n), np.float32)
    for lo in range(0, k, block):
        hi = min(lo + block, k)
        errors = np.empty((hi - lo, n))
        for j in range(lo, hi):
            q = np.clip(np.rint(left[j] / s[j] + z[j]), 0, grid.levels - 1)
            out[j] = q
            e = errors[j - lo] = (left[j] - (q - z[j]) * s[j]) / u[j, j]
            if j + 1 < hi:
                left[j + 1 : hi] -= u[j, j + 1 : hi, None] * e
        if hi < k:
            left[hi:] -= u[lo:hi, hi:].T @ errors
    codes = np.empty((n, k), np.float32)
    codes[:, order] = out.T
    return codes, scale, zero
