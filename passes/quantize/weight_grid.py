"""Grids of weights: what all quantizers share. A row of a weight matrix [N, K] is cut into groups of columns; every group has a scale and
a zero point, and a weight is ``(code - zero) * scale`` with ``code`` in 0 .. levels - 1.

Arrays here have the shape [N, groups, group], parameters [N, groups, 1]. Scales and float zero points are rounded to the stored type before
codes are chosen, so codes fit what a kernel will read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import QuantizationError

__all__ = ["WIDTHS", "Grid", "decode", "encode", "floats", "minmax", "refit_scale", "squared_error"]

Array = np.ndarray[Any, Any]
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)  # 0: ternary


def floats(dtype: str) -> np.dtype[Any]:
    """The numpy type of ``f16``, ``bf16`` or ``f32``. Raises QuantizationError."""
    if dtype == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if dtype not in ("f16", "f32"):
        raise QuantizationError(f"scales of type {dtype!r} are not supported", hint="choose f16, bf16 or f32")
    return np.dtype(np.float16 if dtype == "f16" else np.float32)


@dataclass(frozen=True, slots=True)
class Grid:
    """``bits``: 1 to 6, 8, or 0 for ternary; ``symmetric``: one zero point for all groups, the middle; ``scale_dtype``: of :func:`floats`;
    ``float_zeros``: zero points keep a fraction (asymmetric only); ``narrow``: as many codes above the middle as below, and scales above 0
    (what QuantizeLinear's weights have; symmetric, 2 bits and more); ``reduced``: half as many codes, stored in the same bits."""

    bits: int
    symmetric: bool
    scale_dtype: np.dtype[Any]
    float_zeros: bool = False
    narrow: bool = False
    reduced: bool = False

    @property
    def levels(self) -> int:
        return (1 << (self.bits - self.reduced)) - self.narrow if self.bits else 3

    @property
    def middle(self) -> float:
        """Zero point of a symmetric grid: one of the codes, but for 1 bit, whose two weights are ``-scale / 2`` and ``scale / 2``."""
        return 0.5 if self.bits == 1 else 1.0 if self.bits == 0 else float((1 << (self.bits - self.reduced - 1)) - self.narrow)

    def stored_scale(self, scale: Array) -> Array:
        """f32 of ``scale`` as it will be stored: never 0, which a group of zeros would give. Raises QuantizationError when it does not fit."""
        scale = np.asarray(scale, np.float32)
        least = np.float32(2.0**-24 if self.scale_dtype == np.float16 else 2.0**-120)
        sign = np.where(scale < 0, np.float32(-1), np.float32(1))
        scale = np.where(np.abs(scale) < least, sign * np.where(scale == 0, np.float32(1), least), scale)
        with np.errstate(over="ignore"):
            stored = scale.astype(self.scale_dtype).astype(np.float32)
        if not np.isfinite(stored).all():
            raise QuantizationError(f"a scale of {np.abs(scale).max():.3g} does not fit {self.scale_dtype.name}", hint="store scales as bf16 or f32")
        return stored

    def stored_zero(self, zero: Array) -> Array:
        """f32 of a zero point as it will be stored."""
        if self.symmetric:
            return np.full_like(np.asarray(zero, np.float32), self.middle)
        if self.float_zeros:
            limit = np.float32(60000.0)
            return np.clip(np.asarray(zero, np.float32), -limit, limit).astype(self.scale_dtype).astype(np.float32)
        return np.clip(np.rint(zero), 0, self.levels - 1).astype(np.float32)


def encode(w: Array, scale: Array, zero: Array, levels: int) -> Array:
    """Nearest codes, f32."""
    return np.clip(np.rint(w / scale + zero), 0, levels - 1)


def decode(codes: Array, scale: Array, zero: Array) -> Array:
    return (codes - zero) * scale


def squared_error(w: Array, near: Array, weight: Array | None) -> Array:
    """Sum of squared differences of every group, [N, groups, 1]; ``weight``: importance of the columns, [1, groups, group]."""
    d = np.square(w - near)
    return (d if weight is None else d * weight).sum(-1, keepdims=True)


def minmax(w: Array, grid: Grid, shrink: float | Array = 1.0) -> tuple[Array, Array]:
    """(scale, zero) of a grid that covers the range of every group, times ``shrink``; 0 is always inside.

    Symmetric: the value of largest magnitude gets the code 0, which has one more step than the other end, so the scale's sign follows it.
    1 bit and ternary: the scale comes from the mean magnitude, since covering the range makes most weights wrong."""
    if grid.symmetric:
        if grid.narrow:
            scale = np.abs(w).max(-1, keepdims=True) * (shrink / grid.middle)
        elif grid.bits == 1:
            scale = 2 * np.abs(w).mean(-1, keepdims=True) * shrink
        elif grid.bits == 0:
            scale = np.abs(w).mean(-1, keepdims=True) * shrink
        else:
            at = np.abs(w).argmax(-1)[..., None]
            scale = np.take_along_axis(w, at, -1) * (-shrink / grid.middle)
        return grid.stored_scale(scale), grid.stored_zero(np.zeros_like(scale))
    low, high = np.minimum(w.min(-1, keepdims=True), 0) * shrink, np.maximum(w.max(-1, keepdims=True), 0) * shrink
    scale = grid.stored_scale((high - low) / (grid.levels - 1))
    return scale, grid.stored_zero(-low / scale)


def refit_scale(w: Array, codes: Array, zero: Array, grid: Grid, weight: Array | None, scale: Array) -> Array:
    """The scale of least squared error for fixed codes: ``<c, w> / <c, c>`` with ``c = codes - zero``; groups where all c are 0 keep theirs."""
    c = codes - zero
    cw = c if weight is None else c * weight
    below = (cw * c).sum(-1, keepdims=True)
    return grid.stored_scale(np.where(below > 0, (cw * w).sum(-1, keepdims=True) / np.where(below > 0, below, 1), scale))
