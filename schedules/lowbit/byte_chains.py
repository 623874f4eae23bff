"""Weights of exact byte products: which columns may share a saturating instruction, found on the constants at compile time.

``bytes.madd`` adds two products u8 * i8 in 16 bits with saturation. A pair of weights (a, b) never saturates when the positive ones
and the negative ones add up to at most 128 in magnitude (255 * 128 < 2**15); as long as that holds for the four weights of two
such pairs, their 16-bit sums can be added as well (a *chain*) before they are widened. Sums over k may be taken in any order, so that

* four consecutive k (a *quad*, one 32-bit broadcast) have three ways to form two pairs, each a *plane* of the activations: a
  copy in which the bytes of every quad stand in that order,
* a quad that saturates in each of its three forms is multiplied in two halves,
* any two quads of a panel of columns make a chain; a greedy matching finds partners, least choice first.

Everything is decided for a panel (the columns of a register) by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PLANES = np.array([[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2]])  # bytes of a quad: pairs (0, 1) and (2, 3), (0, 2) and (1, 3), (0, 3) and (1, 2)
LIMIT = 128  # what weights of one sign may add up to in 16 bits
WINDOW = 32  # quads among which partners are sought


@dataclass(frozen=True, slots=True)
class Chains:
    """``pairs``: i8 [chains, 2, lanes, 4], ``singles``: i8 [quads, lanes, 4]; ``pair_at``, ``single_at``: i32 offsets of their activations in the
    planes of a row (``plane * columns + k``); ``counts``: i32 [panels + 1, 2], where the chains and quads of a panel start."""

    pairs: Array
    singles: Array
    pair_at: Array
    single_at: Array
    counts: Array

    @property
    def operations(self) -> float:
        """Vector operations for a row of activations: five a chain, three a quad by itself."""
        return 5.0 * len(self.pairs) + 3.0 * len(self.singles)


def chains(w: Array, lanes: int, planes: int) -> Chains:
    """The chains of weights i8 [k, n], k a multiple of 4 (n is padded), for activations in ``planes`` planes."""
    k, n = w.shape
    panels, quads = -(-n // lanes), k // 4
    full = np.zeros((quads, 4, panels * lanes), np.int16)
    full[:, :, :n] = w.reshape(quads, 4, n)
    q = full.reshape(quads, 4, panels, lanes).transpose(2, 0, 1, 3)  # panels, quads, 4, lanes
    plane = np.full((panels, quads), -1, np.int8)
    for v in range(planes - 1, -1, -1):
        fits = (_sums(q[:, :, PLANES[v]]) <= LIMIT).all((2, 3))
        plane[fits] = v
    halves = plane < 0
    p, j, part = np.nonzero(np.stack([np.ones_like(halves), halves], -1))
    v = np.maximum(plane[p, j], 0).astype(np.int64)
    nodes = np.take_along_axis(q[p, j], PLANES[v][:, :, None], 1)  # nodes, 4, lanes
    both = halves[p, j]
    nodes[both & (part == 0), 1::2] = 0
    nodes[both & (part == 1), 0::2] = 0
    at = (v * k + 4 * j).astype(np.int32)
    return _emit(nodes, at, p, _partners(_sums(nodes[:, None])[:, 0].reshape(len(p), -1), p), panels)


def _sums(q: Array) -> Array:
    """Magnitudes of the positive and of the negative weights of both pairs: [..., 4, lanes] of [..., 4 slots, lanes]."""
    up, down = np.maximum(q, 0), np.maximum(-q, 0)
    return np.concatenate([up[:, :, 0::2] + up[:, :, 1::2], down[:, :, 0::2] + down[:, :, 1::2]], 2)


def _partners(sums: Array, panel: Array) -> Array:
    """For each node its partner in a chain, -1 for none; nodes of a panel stand together."""
    size = np.minimum(sums, LIMIT).astype(np.uint8)
    out = np.full(len(size), -1, np.int64)
    left = np.arange(len(size))
    for _ in range(2):  # what finds none among its neighbours tries among others that are left
        if not len(left):
            break
        of = panel[left]
        start = np.searchsorted(of, of)
        window = np.cumsum(np.concatenate([[0], (of[1:] != of[:-1]) | ((np.arange(1, len(of)) - start[1:]) % WINDOW == 0)]))
        first = np.searchsorted(window, window)
        slot = np.arange(len(left)) - first
        table = np.full((int(window[-1]) + 1, WINDOW), -1, np.int64)
        table[window, slot] = left
        for lo in range(0, len(table), 512):
            t = table[lo : lo + 512]
            mate = _match(size[t], t >= 0)
            found = mate >= 0
            out[t[found]] = np.take_along_axis(t, np.maximum(mate, 0), 1)[found]
        left = left[out[left] < 0]
    return out


def _match(size: Array, there: Array) -> Array:
    """Partners within windows: [b, w] of u8 [b, w, sums]. Greedy: the node with fewest choices takes the choice with fewest others."""
    b, w, n = size.shape
    room = LIMIT - size
    ok = there[:, :, None] & there[:, None, :] & ~np.eye(w, dtype=bool)
    for c in range(n):
        ok &= size[:, :, None, c] <= room[:, None, :, c]
    degree = ok.sum(2, dtype=np.int16)
    mate = np.full((b, w), -1, np.int64)
    rows = np.arange(b)
    none = np.int16(w + 1)
    for _ in range(w // 2):
        i = np.where(degree > 0, degree, none).argmin(1)
        j = np.where(ok[rows, i], degree, none).argmin(1)
        live = ok[rows, i, j]
        if not live.any():
            break
        r, a, c = rows[live], i[live], j[live]
        mate[r, a], mate[r, c] = c, a
        degree[r] -= ok[r, :, a].astype(np.int16) + ok[r, :, c]
        for x in (a, c):
            ok[r, x] = False
            ok[r, :, x] = False
            degree[r, x] = 0
    return mate


def _emit(nodes: Array, at: Array, panel: Array, mate: Array, panels: int) -> Chains:
    mine = np.arange(len(nodes))
    a = np.nonzero(mate > mine)[0]
    alone = np.nonzero(mate < 0)[0]
    alone = alone[(nodes[alone] != 0).any((1, 2))]
    laid = np.ascontiguousarray(nodes.transpose(0, 2, 1)).astype(np.int8)
    counts = np.stack([np.searchsorted(panel[x], np.arange(panels + 1)) for x in (a, alone)], 1).astype(np.int32)
    return Chains(
        np.stack([laid[a], laid[mate[a]]], 1), laid[alone], np.stack([at[a], at[mate[a]]], 1).reshape(-1), at[alone], counts,
    )  # fmt: skip
