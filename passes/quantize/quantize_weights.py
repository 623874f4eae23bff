"""Weights to few bits, on plain arrays: round-to-nearest, MSE clipping, half-quadratic, error compensation.

>>> q = quantize(weight, bits=4, group=64, method="gptq", hessian=x.T @ x)   # doctest: +SKIP
>>> q.codes, q.scales, q.zeros                                               # doctest: +SKIP
>>> error = np.square(q.dequantize() - weight).mean()                        # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luthier.errors import QuantizationError
from luthier.passes.quantize.clip_weights import clip_weights
from luthier.passes.quantize.compensate_errors import compensate_errors, shrink_correlations
from luthier.passes.quantize.solve_half_quadratic import solve_half_quadratic
from luthier.passes.quantize.weight_grid import WIDTHS, Array, Grid, encode, floats, minmax

__all__ = ["METHODS", "QuantizedWeight", "check_group", "fit_group", "output_error", "quantize"]

METHODS = ("rtn", "mse", "hqq", "gptq")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """``w[n, k] = (codes[n, k] - zero[n, k // group]) * scales[n, k // group]``.

    ``codes``: u8 [N, K], below 2**bits (3 for ternary, ``bits`` = 0); ``scales``: f16, bf16 or f32 [N, K / group]; ``zeros``: u8 (a code) or
    the scales' type [N, K / group], None where ``zero`` is the zero point of all. Raises QuantizationError for parts that do not fit each
    other, codes out of range, scales that are 0 or no numbers."""

    codes: Array
    scales: Array
    zeros: Array | None
    zero: float
    bits: int
    group: int

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if self.bits not in WIDTHS:
            raise QuantizationError(f"weights of {self.bits} bits are not supported", hint=f"choose one of {', '.join(map(str, WIDTHS))} (0: ternary)")
        if self.group < 1 or k % self.group or self.scales.shape != (n, k // self.group) or (self.zeros is not None and self.zeros.shape != self.scales.shape):
            raise QuantizationError(
                f"groups of {self.group} columns do not fit", shapes={"codes": self.codes.shape, "scales": self.scales.shape, "zeros": () if self.zeros is None else self.zeros.shape}
            )
        s = self.scales.astype(np.float32)
        if not np.isfinite(s).all() or not s.all():
            raise QuantizationError(f"{int((~np.isfinite(s)).sum())} scales are NaN or infinite and {int((s == 0).sum())} are zero")
        if self.zeros is not None and not np.isfinite(self.zeros.astype(np.float32)).all():
            raise QuantizationError("a zero point is NaN or infinite")
        if self.codes.dtype != np.uint8 or (self.codes.size and int(self.codes.max()) >= (1 << self.bits if self.bits else 3)):
            raise QuantizationError(f"codes of {self.codes.dtype} up to {self.codes.max()} do not fit {self.bits or 'ternary'} bits")

    def dequantize(self) -> Array:
        """The weights, f32 [N, K]."""
        s = np.repeat(self.scales.astype(np.float32), self.group, 1)
        z = self.zero if self.zeros is None else np.repeat(self.zeros.astype(np.float32), self.group, 1)
        return np.asarray((self.codes.astype(np.float32) - np.float32(z)) * s, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes in streams of bits a row (ternary five a byte), scales, zero points."""
        n, k = self.codes.shape
        row = -(-k // 5) if self.bits == 0 else -(-k * self.bits // 8)
        return n * row + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / max(1, self.codes.size)


def check_group(columns: int, group: int) -> int:
    """``group``, or ``columns`` for 0 (one group a row). Raises QuantizationError when it does not divide the columns."""
    if group == 0:
        return columns
    if group < 0 or columns % group:
        raise QuantizationError(f"groups of {group} do not divide {columns} columns", hint="choose a divisor, or 0 for one group a row")
    return group


def fit_group(columns: int, group: int, least: int = 16) -> int | None:
    """The largest of ``group``, ``group / 2``, ... that divides the columns; None when that would be below ``least``. 0 stays one group a row."""
    if group == 0:
        return columns
    while group >= least:
        if columns % group == 0:
            return group
        group //= 2
    return None


def quantize(
    weight: Array, bits: int, group: int = 64, symmetric: bool = False, method: str = "rtn", hessian: Array | None = None, scale_dtype: str = "f16",
    importance: Array | None = None, narrow: bool = False, reduced: bool = False, rows: int | None = None,
) -> QuantizedWeight:
    """Quantize ``weight`` f32 [N, K].

    ``bits``: 1 to 6 or 8, 0 for ternary (which is symmetric). ``group``: columns that share a scale, a divisor of K; 0: the whole row.
    ``symmetric``: the middle code means 0 in every group. ``method``: ``rtn`` (nearest code in the group's whole range), ``mse`` (range of
    least squared error), ``hqq`` (half-quadratic, robust against outliers, zero points keep a fraction), ``gptq`` (error compensation;
    needs ``hessian``, ``X.T X`` [K, K] of the layer's inputs or any multiple). ``scale_dtype``: f16, bf16 or f32. ``importance``: weight of
    each column's squared error [K], for ``mse``. ``narrow``: symmetric with the zero point in the middle of ``2**bits - 1`` codes and scales
    above 0, as QuantizeLinear wants weights (2 bits and more); ``reduced``: with codes of one bit less. ``rows``: of activations behind ``hessian``; few of them say little about correlations,
    which then count less (see :func:`shrink_correlations`). Raises QuantizationError."""
    w = np.asarray(weight, np.float32)
    if w.ndim != 2 or not w.size:
        raise QuantizationError(f"weights must be a matrix, not of shape {list(w.shape)}")
    if bits not in WIDTHS:
        raise QuantizationError(f"weights of {bits} bits are not supported", hint=f"choose one of {', '.join(map(str, WIDTHS))} (0: ternary)")
    if method not in METHODS:
        raise QuantizationError(f"unknown method {method!r}", hint=f"choose one of {', '.join(METHODS)}")
    if not np.isfinite(w).all():
        raise QuantizationError(f"{int((~np.isfinite(w)).sum())} weights are NaN or infinite")
    if method == "gptq" and hessian is None:
        raise QuantizationError("error compensation (gptq) needs activation statistics", hint="give calibration data")
    n, k = w.shape
    group = check_group(k, group)
    symmetric = symmetric or bits == 0 or (bits == 1 and method != "hqq")  # two codes, one of them 0, would be half a grid
    grid = Grid(bits, symmetric or narrow, floats(scale_dtype), method == "hqq" and not symmetric, narrow and bits > 1, reduced and bits > 1)
    symmetric = grid.symmetric
    cut = w.reshape(n, k // group, group)
    wide = None if importance is None else np.asarray(importance, np.float32).reshape(1, k // group, group)
    if method == "gptq":
        assert hessian is not None
        h = np.asarray(hessian)
        codes, scale, zero = compensate_errors(cut, grid, h if rows is None or h.shape != (k, k) else shrink_correlations(h, rows))
    else:
        if method == "rtn":
            scale, zero = minmax(cut, grid)
        elif method == "mse":
            scale, zero = clip_weights(cut, grid, wide)
        else:
            scale, zero = solve_half_quadratic(cut, grid)
        codes = encode(cut, scale, zero, grid.levels).reshape(n, k)
    zeros = None if symmetric else zero[..., 0].astype(grid.scale_dtype if grid.float_zeros else np.uint8)
    return QuantizedWeight(codes.astype(np.uint8), scale[..., 0].astype(grid.scale_dtype), zeros, grid.middle if symmetric else 0.0, bits, group)


def output_error(weight: Array, near: Array, hessian: Array | None = None) -> float:
    """``|X w.T - X near.T|^2 / |X w.T|^2`` over the inputs behind ``hessian`` (None: independent inputs of equal size): the layer's NMSE."""
    d = np.asarray(near, np.float64) - weight
    w = np.asarray(weight, np.float64)
    if hessian is None:
        below, above = float(np.square(w).sum()), float(np.square(d).sum())
    else:
        below, above = float(np.einsum("nk,nk->", w @ hessian, w)), float(np.einsum("nk,nk->", d @ hessian, d))
    return max(above, 0.0) / below if below > 0 else 0.0 if above <= 0 else float("inf")
