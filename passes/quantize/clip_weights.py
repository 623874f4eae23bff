"""MSE clipping: the range of every group that gives the least squared error, instead of the whole range.

Before: a group ``[-1, .., 1, 9]`` in 4 bits has steps of 0.67. After: 9 is clipped where that makes the sum of squared errors smaller. The
range is shrunk in steps; with the codes of the best one the scale is fitted by least squares, and codes follow again. ``weight`` (the mean
squares of the activations) makes it the error of the layer's output under independent columns.
"""

from __future__ import annotations

import numpy as np

from luthier.passes.quantize.weight_grid import Array, Grid, decode, encode, minmax, refit_scale, squared_error

__all__ = ["clip_weights"]


def clip_weights(w: Array, grid: Grid, weight: Array | None = None, steps: int = 24, rounds: int = 3) -> tuple[Array, Array]:
    """(scale, zero) [N, groups, 1] f32 for ``w`` [N, groups, group]. Never worse than the whole range in (weighted) squared error."""
    if grid.bits == 0:
        return _ternary(w, grid, weight)
    lowest = {1: 0.05, 2: 0.15, 3: 0.3}.get(grid.bits, 0.45 if grid.bits < 6 else 0.8)
    best = np.full((*w.shape[:2], 1), np.inf, np.float32)
    scale = np.ones_like(best)
    zero = np.zeros_like(best)
    for shrink in np.linspace(1.0, lowest, steps, dtype=np.float32):
        for sign in (1, -1) if grid.symmetric and grid.bits > 1 and not grid.narrow else (1,):
            s, z = minmax(w, grid, shrink)
            _keep(w, s * np.float32(sign), z, grid, weight, best, scale, zero)
    for _ in range(rounds):
        s = refit_scale(w, encode(w, scale, zero, grid.levels), zero, grid, weight, scale)
        _keep(w, s, zero.copy(), grid, weight, best, scale, zero)
        if not grid.symmetric:
            codes = encode(w, scale, zero, grid.levels)
            _keep(w, scale.copy(), grid.stored_zero(_mean(codes - w / scale, weight)), grid, weight, best, scale, zero)
    return scale, zero


def _mean(x: Array, weight: Array | None) -> Array:
    if weight is None:
        return x.mean(-1, keepdims=True)
    return (x * weight).sum(-1, keepdims=True) / np.maximum(weight.sum(-1, keepdims=True), np.float32(1e-30))


def _keep(w: Array, s: Array, z: Array, grid: Grid, weight: Array | None, best: Array, scale: Array, zero: Array) -> None:
    """Take ``s`` and ``z`` where they are better; ``best``, ``scale`` and ``zero`` are changed in place."""
    e = squared_error(w, decode(encode(w, s, z, grid.levels), s, z), weight)
    better = e < best
    np.copyto(best, e, where=better)
    np.copyto(scale, s, where=better)
    np.copyto(zero, z, where=better)


def _ternary(w: Array, grid: Grid, weight: Array | None) -> tuple[Array, Array]:
    """The best ternary code of a group keeps its k largest magnitudes: of all k the one that maximises ``(sum of them)^2 / k``. Exact without
    ``weight``; with it the same order is searched, which is close."""
    a = np.abs(w)
    order = np.argsort(-a, -1)
    m = np.ones_like(w) if weight is None else np.broadcast_to(weight, w.shape)
    m = np.take_along_axis(m, order, -1)
    top = np.cumsum(np.take_along_axis(a, order, -1) * m, -1)
    count = np.maximum(np.cumsum(m, -1), np.float32(1e-30))
    k = np.argmax(np.square(top) / count, -1)[..., None]
    scale = grid.stored_scale(np.take_along_axis(top, k, -1) / np.take_along_axis(count, k, -1))
    return scale, grid.stored_zero(np.zeros_like(scale))
