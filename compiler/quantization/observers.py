"""Observers: which range of a value 8-bit numbers should cover, from the distribution seen in calibration.

``minmax`` covers everything seen. ``percentile`` leaves out the outermost share of both ends. ``entropy`` picks the range whose
quantized distribution has the least Kullback-Leibler divergence from the clipped one. Every range contains 0, so that padding and
ReLU are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.errors import InputError

__all__ = ["OBSERVERS", "Histogram", "choose_range"]

Array = np.ndarray[Any, Any]
SIDE = 4096  # bins on each side of 0
ENOUGH = 64  # values that a bin must hold on average before its height means something
OBSERVERS = ("minmax", "percentile", "entropy")


@dataclass
class Histogram:
    """Counts in bins of equal ``width`` around 0: bin ``i`` covers ``[(i - SIDE) * width, (i - SIDE + 1) * width)``. When a value does not
    fit, widths double by merging neighbours, which loses nothing but resolution."""

    width: float = 0.0
    counts: Array = field(default_factory=lambda: np.zeros(2 * SIDE, np.int64))
    lowest: float = 0.0
    highest: float = 0.0

    def add(self, x: Array) -> None:
        """Count the finite values of ``x``."""
        x = np.asarray(x, np.float64).reshape(-1)
        if not x.size:
            return
        self.lowest, self.highest = min(self.lowest, float(x.min())), max(self.highest, float(x.max()))
        top = max(-self.lowest, self.highest)
        if top == 0:
            top = 1e-30 if not self.width else self.width
        if not self.width:
            self.width = top / (SIDE - 1)
        while top >= self.width * SIDE:
            self._double()
        at = np.floor(x / self.width).astype(np.int64) + SIDE
        self.counts += np.bincount(np.clip(at, 0, 2 * SIDE - 1), minlength=2 * SIDE)

    def _double(self) -> None:
        pairs = self.counts.reshape(SIDE, 2).sum(1)
        self.counts = np.zeros_like(self.counts)
        self.counts[SIDE // 2 : SIDE // 2 + SIDE] = pairs
        self.width *= 2

    def edges(self) -> Array:
        """The 2 * SIDE + 1 borders of the bins."""
        return np.arange(-SIDE, SIDE + 1) * self.width


def choose_range(h: Histogram, method: str, percentile: float = 99.99, symmetric: bool = False, levels: int = 256) -> tuple[float, float]:
    """(low, high) with low <= 0 <= high. ``percentile``: share of the values in percent that stays inside, above 50; ``symmetric``: the
    range is [-a, a]; ``levels``: how many numbers there are to quantize to. Raises InputError for an unknown method or percentile."""
    if method not in OBSERVERS:
        raise InputError(f"unknown observer {method!r}", hint=f"choose one of {', '.join(OBSERVERS)}")
    if not 50 < percentile <= 100:
        raise InputError(f"a percentile of {percentile} is not above 50 and at most 100")
    if not h.counts.any() or h.highest == h.lowest:
        return h.lowest, h.highest
    if method == "minmax":
        low, high = h.lowest, h.highest
    elif method == "percentile":
        low, high = _percentile(h, percentile)
    else:
        low, high = _entropy(h, levels)
    low, high = min(0.0, max(low, h.lowest)), max(0.0, min(high, h.highest))
    if symmetric:
        a = max(-low, high)
        return -a, a
    return low, high


def _percentile(h: Histogram, percentile: float) -> tuple[float, float]:
    total = h.counts.sum()
    outside = (1 - percentile / 100) * total / 2
    c = np.cumsum(h.counts)
    edges = h.edges()
    first = int(np.searchsorted(c, outside, side="right"))
    last = int(np.searchsorted(c, total - outside, side="left"))
    return float(edges[first]), float(edges[last + 1])


def _entropy(h: Histogram, levels: int) -> tuple[float, float]:
    """Clipping magnitudes above a threshold, the one of least divergence; thresholds from all that was seen down to a 64th of it.

    Bins are joined until one holds about ``ENOUGH`` values: what differs between emptier ones is chance, and would count as a cost of
    coarse levels. Where fewer bins than levels are left there is no evidence for clipping, and nothing is clipped."""
    join = 1
    while join < SIDE and h.counts.sum() < ENOUGH * np.count_nonzero(h.counts.reshape(-1, join).sum(1)):
        join *= 2
    counts, side, width = h.counts.reshape(-1, join).sum(1), SIDE // join, h.width * join
    seen = np.flatnonzero(counts)
    left, right = min(int(seen[0]) - side, 0), max(int(seen[-1]) + 1 - side, 0)
    reach = max(-left, right)
    best, found = np.inf, (left, right)
    for top in dict.fromkeys(np.ceil(reach * np.geomspace(1.0, 1 / 64, 97)).astype(int).tolist()):
        lo, hi = max(left, -top), min(right, top)
        if hi - lo < levels:
            break
        d = _divergence(counts, lo + side, hi + side, levels)
        if d < best:
            best, found = d, (lo, hi)
    return found[0] * width, found[1] * width


def _divergence(counts: Array, lo: int, hi: int, levels: int) -> float:
    """KL(P || Q): P has the clipped mass in its outermost bins, Q is P's inner part spread evenly over the non-empty bins of a level.

    Q lacks the clipped mass, so clipping costs; coarse levels cost where the distribution varies inside one."""
    inner = counts[lo:hi].astype(np.float64)
    p = inner.copy()
    p[0] += counts[:lo].sum()
    p[-1] += counts[hi:].sum()
    level = np.arange(hi - lo) * min(levels, hi - lo) // (hi - lo)
    mass = np.bincount(level, inner)
    filled = np.bincount(level, (inner > 0).astype(np.float64))
    q = np.where(inner > 0, mass[level] / np.maximum(filled[level], 1), 0.0)
    if not q.sum():
        return float(np.inf)
    p, q = p / p.sum(), q / q.sum()
    q = np.where((p > 0) & (q == 0), 1e-12, q)
    keep = p > 0
    return float((p[keep] * np.log(p[keep] / q[keep])).sum())
