"""Weights fitted to what may stay of them: against least squares, exhaustive moves, and the sequential form of SparseGPT, all in f64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from luthier.errors import QuantizationError
from luthier.passes.quantize.alternate_directions import ColumnMoments, fit_kept, round_columns
from luthier.passes.quantize.prune_groups import prune_groups, select_groups
from luthier.passes.quantize.prune_two_of_four import prune_two_of_four
from luthier.passes.quantize.quantize_weights import output_error

Array = np.ndarray[Any, Any]


def layer(n: int, k: int, seed: int) -> tuple[Array, Array]:
    """Weights f32 [n, k] and inputs [4 k, k] whose columns share directions and differ in size, one of them a hundred times as large."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((4 * k, max(2, k // 4))) @ rng.standard_normal((max(2, k // 4), k))
    x = (base + 0.5 * rng.standard_normal((4 * k, k))) * rng.uniform(0.2, 3, k)
    x[:, k // 3] *= 100
    return (rng.standard_normal((n, k)) / np.sqrt(np.square(x).mean(0))).astype(np.float32), x


def halves(scores: Array, share: float) -> Array:
    return np.repeat(select_groups(scores.reshape(len(scores), -1, 4).sum(2), share / 2, "row"), 4, 1)


def test_kept_weights_are_the_least_squares_solution() -> None:
    w, x = layer(6, 48, 0)
    damping = 1e-2
    stats = ColumnMoments(x.T @ x, damping=damping)
    fitted, keep = fit_kept(stats.aim(w), stats, halves)
    assert (keep.sum(1) == 24).all() and not fitted[~keep].any()
    size = np.sqrt(np.square(x).sum(0) * damping)  # the damping as rows of their own
    a, y = np.vstack([x, np.diag(size)]), np.vstack([x, np.diag(size)]) @ w.T.astype(np.float64)
    for row, (f, m) in enumerate(zip(fitted, keep, strict=True)):
        best = np.linalg.lstsq(a[:, m], y[:, row], rcond=None)[0]
        ours, least = (np.square(a[:, m] @ v - y[:, row]).sum() for v in (f[m], best))
        assert least <= ours < 1.001 * least


def test_rounding_leaves_no_better_move_of_one_weight() -> None:
    w, x = layer(4, 12, 1)
    h = x.T @ x
    step = (np.abs(w).max(1) / 3).astype(np.float32)
    values = step[:, None] * np.arange(-4, 4, dtype=np.float32)
    keep = np.random.default_rng(0).random(w.shape) < 0.7
    scales = np.repeat(step[:, None], 12, 1)

    def codes(v: Array, s: Array) -> Array:
        return np.asarray(np.clip(np.rint(v / s), -4, 3))

    start = np.where(keep, codes(w, scales) * scales, 0)
    found = start
    stats = ColumnMoments(h, damping=1e-9)
    for _ in range(20):
        found = round_columns(found, stats.aim(w), keep, scales, stats, codes) * scales

    def loss(q: Array) -> Array:
        return np.asarray(np.square(x @ (q - w).T.astype(np.float64)).sum(0))

    assert not found[~keep].any() and (loss(found) <= loss(start) * (1 + 1e-6)).all()
    for j in range(12):
        for v in range(8):
            other = found.copy()
            other[:, j] = np.where(keep[:, j], values[:, v], found[:, j])
            assert (loss(found) <= loss(other) * (1 + 1e-5)).all()


def sequential(w: Array, h: Array, sparsity: float, block: int) -> Array:
    """SparseGPT with blocks of one row, without rounding: losses of a column go to the later ones."""
    w = w.astype(np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.diagonal(h).mean() * np.eye(len(h)))
    u = np.linalg.cholesky(inverse).T
    for lo in range(0, w.shape[1], 32):
        part = np.square(w[:, lo : lo + 32]) / np.square(np.diagonal(u)[lo : lo + 32])
        keep = np.repeat(select_groups(part.reshape(len(w), -1, block).sum(2), sparsity, "layer"), block, 1)
        for j in range(lo, lo + 32):
            e = np.where(keep[:, j - lo], 0, w[:, j]) / u[j, j]
            w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
            w[:, j] = np.where(keep[:, j - lo], w[:, j], 0)
    return w


@pytest.mark.parametrize("block", [8, 16])
def test_less_is_lost_than_one_column_after_another(block: int) -> None:
    w, x = layer(64, 128, block)
    h = x.T @ x
    ours = output_error(w, prune_groups(w, 0.5, block, 8, h, "compensate").dense(), h)
    theirs = output_error(w, sequential(w, h, 0.5, block).astype(np.float32), h)
    assert ours < 0.9 * theirs


def test_two_of_four_gains_by_compensation() -> None:
    w, x = layer(48, 96, 3)
    h = x.T @ x
    plain, better = (output_error(w, prune_two_of_four(w, 4, 32, h, how).dense(), h) for how in ("nearest", "compensate"))
    assert better < 0.5 * plain


def test_wanted_outputs_replace_those_of_the_weights() -> None:
    """A layer whose inputs have changed can still give the outputs of before."""
    w, x = layer(24, 64, 4)
    y = x @ w.T.astype(np.float64)
    seen = x + np.random.default_rng(1).standard_normal(x.shape) * x.std(0) * 0.4
    h = seen.T @ seen

    def loss(cross: Array | None) -> float:
        made = prune_groups(w, 0.25, 8, 8, h, "compensate", cross=cross).dense().astype(np.float64)
        return float(np.square(seen @ made.T - y).sum() / np.square(y).sum())

    aimed, plain = loss(seen.T @ y), loss(None)
    assert aimed < 0.8 * plain


def test_few_samples_pull_less_towards_wanted_outputs() -> None:
    """Outputs that are nothing but noise: what is learnt from them hurts on other samples, and less where the number of samples is known."""
    w, x = layer(32, 64, 6)
    rng = np.random.default_rng(2)
    some, other = x[:80], x[80:]
    y = some @ w.T.astype(np.float64)
    y += rng.standard_normal(y.shape) * y.std() * 0.5
    lost = []
    for rows in (None, 80):
        made = prune_groups(w, 0.25, 8, 8, some.T @ some, "compensate", cross=some.T @ y, rows=rows).dense().astype(np.float64)
        lost.append(np.square(other @ (made - w).T).sum())
    assert lost[1] < 0.9 * lost[0]


def test_columns_that_are_never_active() -> None:
    w, x = layer(8, 32, 5)
    x[:, [3, 17]] = 0
    made = prune_groups(w, 0.5, 8, 4, x.T @ x, "compensate")
    assert np.isfinite(made.dense()).all() and made.density == 0.5
    assert not prune_groups(w, 1.0, 8, 4, x.T @ x, "compensate").dense().any()


@pytest.mark.parametrize("change", ["nan", "negative"])
def test_statistics_that_are_no_squares(change: str) -> None:
    h = np.eye(16)
    h[2, 2] = np.nan if change == "nan" else -1
    with pytest.raises(QuantizationError, match="NaN, infinite or negative"):
        prune_groups(np.ones((4, 16), np.float32), 0.5, 8, 4, h, "compensate")
    with pytest.raises(QuantizationError, match="do not fit 16 columns"):
        prune_groups(np.ones((4, 16), np.float32), 0.5, 8, 4, np.eye(16), "compensate", cross=np.eye(16))
