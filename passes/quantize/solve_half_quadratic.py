"""Half-quadratic quantization: zero points (or scales, of symmetric grids) that minimise ``sum |w - deq(w)|^p`` with p < 1, so that a few
outliers may be wrong for the sake of all others. No calibration data (the method of HQQ, Badri and Shaji 2023).

With an auxiliary error ``e`` the problem splits: ``min |e|_p^p + beta/2 |e - (w - deq)|^2``. Alternately, ``e`` is the generalised soft
threshold of the residual, and the zero point is the mean of ``codes - (w - e) / scale``; beta grows every round.
"""

from __future__ import annotations

import numpy as np

from luthier.passes.quantize.clip_weights import clip_weights
from luthier.passes.quantize.weight_grid import Array, Grid, decode, encode, refit_scale

__all__ = ["solve_half_quadratic"]


def solve_half_quadratic(w: Array, grid: Grid, p: float = 0.7, beta: float = 10.0, growth: float = 1.05, rounds: int = 24) -> tuple[Array, Array]:
    """(scale, zero) [N, groups, 1] f32 for ``w`` [N, groups, group]; the best of all rounds by ``sum |w - deq|^p`` of every group.

    Starts at the clipped range (the whole range is too far away below 4 bits)."""
    scale, zero = clip_weights(w, grid)
    best = _loss(w, scale, zero, grid, p)
    s, z = scale.copy(), zero.copy()
    for _ in range(rounds):
        codes = encode(w, s, z, grid.levels)
        step = np.abs(s)
        r = (w - decode(codes, s, z)) / step  # in steps of the grid, so that beta means the same for every layer
        e = np.sign(r) * np.maximum(np.abs(r) - np.power(np.abs(r) + np.float32(1e-8), p - 1) / beta, 0) * step
        if grid.symmetric:
            s = refit_scale(w - e, codes, z, grid, None, s)
        else:
            z = grid.stored_zero((codes - (w - e) / s).mean(-1, keepdims=True))
        now = _loss(w, s, z, grid, p)
        better = now < best
        np.copyto(best, now, where=better)
        np.copyto(scale, s, where=better)
        np.copyto(zero, z, where=better)
        beta *= growth
    return scale, zero


def _loss(w: Array, s: Array, z: Array, grid: Grid, p: float) -> Array:
    return np.power(np.abs(w - decode(encode(w, s, z, grid.levels), s, z)), np.float32(p)).sum(-1, keepdims=True)
