"""Constants of integer kernels in the form that they read, made at compile time: weights less their zero point, sums, quotients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.schedules.base.schedule import Packing


@dataclass(frozen=True, slots=True)
class CenteredPacking(Packing):
    """A packing of weights, seen in another ``shape`` where it is given, less their zero point, in the type of its buffer; what pads
    stays 0."""

    zero: int = 0
    shape: tuple[int, ...] = ()

    def apply(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The packed copy of an array of 8-bit integers."""
        to = self.buf.dtype.numpy
        a = a.reshape(self.shape) if self.shape else a
        return Packing.apply(self, a.astype(to) - to.type(self.zero))


@dataclass(frozen=True, slots=True)
class SumPacking(Packing):
    """Sums of the weights over the reduced dimensions ``over``, as i32. ``shape``: how the weights are seen, where it is given."""

    over: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def apply(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """One sum for every element of the dimensions that remain."""
        a = a.reshape(self.shape) if self.shape else a
        return np.ascontiguousarray(a.sum(axis=self.over, dtype=np.int32))


@dataclass(frozen=True, slots=True)
class ScaledPacking(Packing):
    """Constants divided by a number, in f64 and rounded once."""

    by: float = 1.0

    def apply(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The quotients in the type of ``a``."""
        return np.asarray((a.astype(np.float64) / self.by).astype(a.dtype))
