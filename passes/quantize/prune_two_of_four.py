"""prune_two_of_four: which two of four neighbouring weights are kept, and their quantized values.

The two of the largest ``w^2 E[x^2]`` stay. ``nearest`` rounds what is left; ``compensate`` chooses them and their values together, by what the
layer's outputs lose (:mod:`luthier.passes.quantize.alternate_directions`).
"""

from __future__ import annotations

from math import gcd

import numpy as np

from luthier.errors import QuantizationError
from luthier.ir.ops.two_of_four import TwoOfFour
from luthier.passes.quantize.alternate_directions import ColumnMoments, fit_kept, round_columns
from luthier.passes.quantize.weight_grid import Array

__all__ = ["prune_two_of_four"]

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's largest magnitude, tried as the end of its range


def prune_two_of_four(
    weight: Array, bits: int = 4, group: int = 32, hessian: Array | None = None, method: str = "nearest", moments: Array | None = None,
    cross: Array | None = None, rows: int | None = None,
) -> TwoOfFour:  # fmt: skip
    """``weight`` f32 [N, K] with two of every four columns kept in ``bits`` (4 or 8), symmetric, a scale for ``group`` columns (halved until they
    divide K). ``hessian``: ``X.T X`` [K, K] of the layer's inputs; ``moments``: their mean squares [K]; ``method``: nearest or compensate (needs
    ``hessian``); ``cross``, ``rows``: as for :func:`luthier.passes.quantize.prune_groups.prune_groups`. Raises QuantizationError."""
    w = np.array(weight, np.float32)
    if w.ndim != 2 or not w.size or not np.isfinite(w).all():
        raise QuantizationError(f"weights must be a matrix of finite numbers; given {list(w.shape)}")
    n, k = w.shape
    if k % 8 or bits not in (4, 8) or group < 8:
        raise QuantizationError(f"two of four: {k} columns, {bits} bits, groups of {group} are not supported", hint="columns must be a multiple of 8, bits 4 or 8")
    if method not in ("nearest", "compensate"):
        raise QuantizationError(f"unknown method {method!r}", hint="choose nearest or compensate")
    if method == "compensate" and hessian is None:
        raise QuantizationError("compensation needs activation statistics", hint="give calibration data")
    for given, want in ((hessian, (k, k)), (moments, (k,)), (cross, (k, n))):
        if given is not None and np.shape(given) != want:
            raise QuantizationError(f"activation statistics of {np.shape(given)} do not fit {k} columns")
    group = gcd(group, k)
    if method == "compensate":
        assert hessian is not None
        return _compensated(w, bits, group, ColumnMoments(hessian, cross, rows))
    seen = np.ones(k) if hessian is None and moments is None else np.diagonal(hessian) if hessian is not None else moments
    importance = np.asarray(seen, np.float32)
    kept = np.where(_keep(np.square(w) * importance), w, 0)
    cut = kept.reshape(-1, group)
    scales = _scale(cut, bits, np.tile(importance.reshape(-1, group), (n, 1)))
    return TwoOfFour(_codes(cut, scales, bits).reshape(n, k).astype(np.int16), scales.reshape(n, -1), bits, group)


def _keep(scores: Array) -> Array:
    """bool like ``scores`` [N, K]: the two largest of every four."""
    s = scores.reshape(-1, 4)
    keep = np.zeros(s.shape, bool)
    np.put_along_axis(keep, np.argsort(-s, axis=1, kind="stable")[:, :2], True, 1)
    return keep.reshape(scores.shape)


def _codes(cut: Array, scale: Array, bits: int) -> Array:
    top, wide = (1 << (bits - 1)) - 1, scale.astype(np.float32)[..., None]
    return np.asarray(np.clip(np.rint(np.divide(cut, wide, out=np.zeros_like(cut), where=wide != 0)), -top, top))


def _scale(cut: Array, bits: int, importance: Array) -> Array:
    """Scales f16 [N] of ``cut`` [N, group] with the smallest weighted loss."""
    largest = np.abs(cut).max(1) / ((1 << (bits - 1)) - 1)
    best, out = np.full(len(cut), np.inf), np.zeros(len(cut), np.float16)
    for f in SHRINK:
        s = (largest * f).astype(np.float16)
        loss = (np.square(_codes(cut, s, bits) * s.astype(np.float32)[:, None] - cut) * importance).sum(1)
        best, out = np.where(loss < best, loss, best), np.where(loss < best, s, out)
    return out


def _compensated(w: Array, bits: int, group: int, stats: ColumnMoments) -> TwoOfFour:
    n, k = w.shape
    aim = stats.aim(w)
    fitted, keep = fit_kept(aim, stats, lambda scores, share: _keep(scores) if share == 1 else np.ones(scores.shape, bool))
    scales = _scale(fitted.reshape(-1, group), bits, np.tile(stats.moments.astype(np.float32).reshape(-1, group), (n, 1))).reshape(n, -1)
    q = round_columns(fitted, aim, keep, np.repeat(scales, group, 1), stats, lambda x, s: _codes(x[..., None], s, bits)[..., 0])
    return TwoOfFour(q.astype(np.int16), scales, bits, group)
