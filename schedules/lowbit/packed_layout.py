"""Where the bits of low-bit weights stand in a kernel's registers.

A 32-bit lane holds one row of the weights; a *unit* is 32 columns, eight quads of four. Byte ``j`` of a lane belongs to column
``j`` of a quad, so one multiplication of bytes takes four columns of as many rows as there are lanes. A unit of ``bits``-wide values takes
``bits`` words of a lane. Values are stored without their base (``u = q - base``); 8-bit ones are signed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.ir.dtypes import u8, u16
from luthier.ir.expr import Expr, bitcast
from luthier.schedules.lowbit.layouts import pad_rows

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bits ``[low, low + count)`` of the values of ``quad`` stand at ``[shift, shift + count)`` of the bytes of word ``word``."""

    word: int
    shift: int
    quad: int
    low: int
    count: int


def pieces(bits: int) -> tuple[Piece, ...]:
    """The layout of a unit. Three bits: two values a byte and the rest of the bits for the last two quads."""
    if bits in (1, 2, 4, 8):
        per = 8 // bits
        return tuple(Piece(q // per, q % per * bits, q, 0, bits) for q in range(8))
    if bits == 3:
        whole = [Piece(q // 2, q % 2 * 3, q, 0, 3) for q in range(6)]
        return (*whole, Piece(0, 6, 6, 0, 2), Piece(1, 6, 6, 2, 1), Piece(2, 6, 7, 0, 2), Piece(1, 7, 7, 2, 1))
    if bits in (5, 6):  # the low four bits as such, the rest in words of its own
        n = bits - 4
        low4 = [Piece(q // 2, q % 2 * 4, q, 0, 4) for q in range(8)]
        return (*low4, *(Piece(4 + q * n // 8, q * n % 8, q, 4, n) for q in range(8)))
    raise ValueError(f"no layout for {bits} bits")


def pack_words(bits: int, lanes: int) -> Callable[[Array], Array]:
    """[rows, columns] values to words [rows / lanes, columns / 32, bits, lanes] (i32), flat."""

    def go(u: Array) -> Array:
        p = pad_rows(u.astype(np.uint8), 4 * lanes)
        units = p.shape[1] // 32
        v = p.reshape(-1, lanes, units, 8, 4).transpose(0, 2, 3, 1, 4)  # blocks, units, quads, rows, 4
        out = np.zeros((v.shape[0], units, bits, lanes, 4), np.uint8)
        for c in pieces(bits):
            out[:, :, c.word] |= ((v[:, :, c.quad] >> c.low) & ((1 << c.count) - 1)) << c.shift
        return np.ascontiguousarray(out).view(np.int32).reshape(-1)

    return go


@dataclass(frozen=True, slots=True)
class Field:
    """A quad as unsigned bytes: ``fn(words)`` gives its values times ``2**scale``. ``last``: the highest word that it reads."""

    quad: int
    last: int
    scale: int
    fn: Callable[[list[Expr]], Expr]


def _shr(v: Expr, n: int) -> Expr:
    """Bytes moved down by ``n`` bits (up when negative); bits of the neighbour come in and are masked by the caller."""
    if not n:
        return v
    words = bitcast(v, u16.vec(v.dtype.lanes // 2))
    return bitcast(words >> n if n > 0 else words << -n, u8.vec(v.dtype.lanes))


def _take(word: int, shift: int, bits: int) -> Callable[[list[Expr]], Expr]:
    return lambda ws: _shr(ws[word], shift) & ((1 << bits) - 1)


def fields(bits: int) -> tuple[Field, ...]:
    """How the quads of a unit are read (not for 8 bits). Values that leave room in 16-bit sums stay where they are in the byte."""
    if bits in (1, 2, 4):
        out = []
        for c in pieces(bits):
            at = c.shift % 4 if bits < 4 else 0  # in place within its half byte
            move = c.shift - at
            mask = ((1 << bits) - 1) << at
            out.append(Field(c.quad, c.word, at, lambda ws, w=c.word, m=mask, n=move: _shr(ws[w], n) & m))  # type: ignore[misc]
        return tuple(out)
    if bits in (5, 6):
        out = []
        for c in pieces(bits)[8:]:
            mask = ((1 << c.count) - 1) << 4
            out.append(Field(c.quad, c.word, 0, lambda ws, c=c, m=mask: _take(c.quad // 2, c.quad % 2 * 4, 4)(ws) | (_shr(ws[c.word], c.shift - 4) & m)))  # type: ignore[misc]
        return tuple(out)
    whole = [Field(q, q // 2, 0, _take(q // 2, q % 2 * 3, 3)) for q in range(6)]
    six = Field(6, 1, 0, lambda ws: (_shr(ws[0], 6) & 3) | (_shr(ws[1], 4) & 4))
    seven = Field(7, 2, 0, lambda ws: (_shr(ws[2], 6) & 3) | (_shr(ws[1], 5) & 4))
    return tuple(sorted((*whole, six, seven), key=lambda f: f.last))
