"""Which weights to drop and what the others become, for the outputs of a layer to change least.

With ``H = X.T X`` of the layer's inputs the change is ``tr((W - W0) H (W - W0).T)``. Where only some weights may stay, alternating directions (ADMM,
after Boza 2024, arXiv 2401.02938) go back and forth between the best weights at all and the nearest allowed ones; the choice of what stays gets
stricter over the rounds and is then fixed, and conjugate gradients bring the kept weights to the optimum for it. Rounding moves one column after
another to the grid's value that is best given all others (coordinate descent), so no step makes the layer worse.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from luthier.errors import QuantizationError
from luthier.passes.quantize.compensate_errors import column_moments
from luthier.passes.quantize.weight_grid import Array

__all__ = ["ColumnMoments", "fit_kept", "round_columns"]

ROUNDS, STEPS, SWEEPS = 30, 25, 2
PENALTY = 0.1  # on the distance from allowed weights, of columns scaled to unit moments
BATCH = 128  # columns whose moves reach the others together


class ColumnMoments:
    """``hessian``: ``X.T X`` [K, K] or any multiple of it; ``cross``: ``X.T Y`` [K, N] of the wanted outputs, the same multiple (None: those of the
    given weights); ``rows``: samples behind them. Columns are scaled to unit second moments, so ``damping`` means the same for large and small
    activations. Columns that were never active count as average. What the wanted outputs ask for beyond the given weights is fitted with a ridge of
    K / rows, the share of noise that K coefficients take up. Raises QuantizationError for statistics that are no numbers."""

    def __init__(self, hessian: Array, cross: Array | None = None, rows: int | None = None, damping: float = 0.01) -> None:
        h, self.moments, _ = column_moments(hessian)
        if cross is not None and not np.isfinite(cross).all():
            raise QuantizationError("the activation statistics hold NaN or infinite values", hint="check the calibration data")
        self.size = np.sqrt(self.moments).astype(np.float32)
        h /= np.sqrt(np.outer(self.moments, self.moments))
        h[np.diag_indices_from(h)] = 1 + damping
        self.h = h.astype(np.float32)
        self.rows = rows
        self.cross = None if cross is None else np.ascontiguousarray((cross / np.sqrt(self.moments)[:, None]).T, np.float32)

    def aim(self, w: Array) -> Array:
        """[N, K]: the scaled weights that would do best if all stayed and none were rounded. ``w`` f32 [N, K]."""
        scaled = np.asarray(w * self.size, np.float32)
        if self.cross is None:
            return scaled
        gap = (self.cross - scaled @ self.h + (self.h[0, 0] - 1) * scaled).astype(np.float64)
        k = len(self.h)
        ridge = self.h.astype(np.float64) + (k / self.rows if self.rows else 0.0) * np.eye(k)
        return np.asarray(scaled + np.linalg.solve(ridge, gap.T).T, np.float32)


def fit_kept(aim: Array, stats: ColumnMoments, select: Callable[[Array, float], Array]) -> tuple[Array, Array]:
    """(weights f32 [N, K], kept bool [N, K]). ``aim``: of ``stats``; ``select(scores, share)``: what stays where a share (0..1] of all that must go has to."""
    k = aim.shape[1]
    near = best = aim
    right = best @ stats.h
    inverse = np.linalg.inv(stats.h.astype(np.float64) + PENALTY * np.eye(k)).astype(np.float32)
    dual = np.zeros_like(best)
    keep = np.ones(aim.shape, bool)
    for i in range(ROUNDS):
        ahead = best + dual
        if i < 0.7 * ROUNDS:
            keep = select(np.square(ahead), min(1.0, (i + 1) / (0.6 * ROUNDS)))
        near = np.where(keep, ahead, 0)
        dual = ahead - near
        best = (right + PENALTY * (near - dual)) @ inverse
    residual = np.where(keep, right - near @ stats.h, 0)
    way = residual.copy()
    left = np.square(residual).sum(1, keepdims=True)
    for _ in range(STEPS):
        moved = np.where(keep, way @ stats.h, 0)
        step = left / np.maximum((way * moved).sum(1, keepdims=True), 1e-20)
        near += step * way
        residual -= step * moved
        now = np.square(residual).sum(1, keepdims=True)
        way = residual + now / np.maximum(left, 1e-20) * way
        left = now
    return near / stats.size, keep


def round_columns(
    fitted: Array, aim: Array, keep: Array, scales: Array, stats: ColumnMoments, codes: Callable[[Array, Array], Array],
) -> Array:  # fmt: skip
    """Codes f32 [N, K]; 0 where ``keep`` is False. ``fitted``: weights to begin with; ``aim``: of ``stats``; ``scales`` [N, K] of every weight;
    ``codes(x, scales)``: the nearest ones, elementwise."""
    wide = scales.astype(np.float32)
    q = np.where(keep, codes(fitted, scales), 0).astype(np.float32)
    gap = (aim - q * wide * stats.size) @ stats.h
    own = stats.h[0, 0]
    for _ in range(SWEEPS):
        for lo in range(0, q.shape[1], BATCH):
            hi = min(lo + BATCH, q.shape[1])
            moved = np.zeros((len(q), hi - lo), np.float32)
            here = gap[:, lo:hi].copy()
            for j in range(lo, hi):
                best = q[:, j] * wide[:, j] + here[:, j - lo] / (own * stats.size[j])
                to = np.where(keep[:, j], codes(best, scales[:, j]), 0)
                d = (to - q[:, j]) * wide[:, j] * stats.size[j]
                here -= d[:, None] * stats.h[j, lo:hi]
                q[:, j], moved[:, j - lo] = to, d
            gap -= moved @ stats.h[lo:hi]
            gap[:, lo:hi] = here
    return q
