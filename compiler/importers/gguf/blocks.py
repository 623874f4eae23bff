"""Blocks of quantized weights as GGUF files store them: their fields as integers, scales and offsets.

A weight is ``w = (q - zero) * scale`` or ``w = q * scale + offset`` with one scale (and offset) for ``group`` columns. Scales of the K
forms are products of a half-precision number and a 4 to 8-bit integer, exact in f32. Layouts: the ggml project's block structures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Grouped:
    """``q``: uint8 or int8 [rows, columns]; ``scale``, ``offset``: f32 [rows, columns / group]; ``bits``: of ``q`` (0: ternary); ``zeros``: a
    zero point for every group, u8 or f16, in place of ``zero``."""

    q: Array
    bits: int
    group: int
    scale: Array
    zero: int = 0
    offset: Array | None = None
    zeros: Array | None = None

    @property
    def rows(self) -> int:
        return int(self.q.shape[0])

    @property
    def columns(self) -> int:
        return int(self.q.shape[1])

    def dequantized(self) -> Array:
        """f32 [rows, columns]."""
        s = np.repeat(self.scale, self.group, 1)
        if self.offset is not None:
            return np.asarray(self.q.astype(np.float32) * s + np.repeat(self.offset, self.group, 1))
        zero = np.float32(self.zero) if self.zeros is None else np.repeat(self.zeros.astype(np.float32), self.group, 1)
        return np.asarray((self.q.astype(np.float32) - zero) * s)


@dataclass(frozen=True, slots=True)
class BlockType:
    """``number``: the type's number in files; ``columns``, ``size``: weights and bytes of a block."""

    number: int
    columns: int
    size: int
    read: Callable[[Array], Grouped]


def _f16(b: Array) -> Array:
    return np.ascontiguousarray(b).view(np.float16).astype(np.float32)


def _nibbles(b: Array) -> Array:
    """Low halves, then high halves, along the last axis."""
    return np.concatenate([b & 15, b >> 4], -1)


def _rows(q: Array, like: Array) -> Array:
    return np.ascontiguousarray(q.reshape(like.shape[0], -1))


def _q4_0(b: Array) -> Grouped:
    return Grouped(_rows(_nibbles(b[..., 2:]), b), 4, 32, _f16(b[..., :2])[..., 0], 8)


def _q4_1(b: Array) -> Grouped:
    d = _f16(b[..., :4])
    return Grouped(_rows(_nibbles(b[..., 4:]), b), 4, 32, d[..., 0], 0, d[..., 1])


def _fifth(b: Array) -> Array:
    return np.unpackbits(b, axis=-1, bitorder="little") << 4


def _q5_0(b: Array) -> Grouped:
    return Grouped(_rows(_nibbles(b[..., 6:]) | _fifth(b[..., 2:6]), b), 5, 32, _f16(b[..., :2])[..., 0], 16)


def _q5_1(b: Array) -> Grouped:
    d = _f16(b[..., :4])
    return Grouped(_rows(_nibbles(b[..., 8:]) | _fifth(b[..., 4:8]), b), 5, 32, d[..., 0], 0, d[..., 1])


def _q8_0(b: Array) -> Grouped:
    return Grouped(_rows(b[..., 2:].view(np.int8), b), 8, 32, _f16(b[..., :2])[..., 0])


def _quarters(b: Array) -> Array:
    """[.., 64] bytes -> 256 values of 2 bits: of every 32 bytes the lowest bits first."""
    h = b.reshape(*b.shape[:-1], 2, 1, 32)
    return np.asarray(((h >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).reshape(*b.shape[:-1], 256))


def _q2_k(b: Array) -> Grouped:
    sc, d = b[..., :16], _f16(b[..., 80:84])
    s = d[..., :1] * (sc & 15).astype(np.float32)
    o = -d[..., 1:] * (sc >> 4).astype(np.float32)
    return Grouped(_rows(_quarters(b[..., 16:80]), b), 2, 16, _rows(s, b), 0, _rows(o, b))


def _q3_k(b: Array) -> Grouped:
    high = np.unpackbits(b[..., :32, None], axis=-1, bitorder="little").swapaxes(-1, -2).reshape(*b.shape[:-1], 256)
    q = _quarters(b[..., 32:96]) | (high << 2)
    raw = b[..., 96:108]
    low = _nibbles(raw[..., :8])
    top = np.concatenate([(raw[..., 8:12] >> (2 * i)) & 3 for i in range(4)], -1)
    sc = (low | (top << 4)).astype(np.float32) - 32
    return Grouped(_rows(q, b), 3, 16, _rows(_f16(b[..., 108:110]) * sc, b), 4)


def _six_bit_scales(raw: Array) -> tuple[Array, Array]:
    """(scales, minima) of eight groups from twelve bytes."""
    lo, mid, hi = raw[..., :4], raw[..., 4:8], raw[..., 8:12]
    sc = np.concatenate([lo & 63, (hi & 15) | ((lo >> 6) << 4)], -1)
    mn = np.concatenate([mid & 63, (hi >> 4) | ((mid >> 6) << 4)], -1)
    return sc.astype(np.float32), mn.astype(np.float32)


def _halves(b: Array) -> Array:
    """[.., 128] bytes -> 256 values of 4 bits: of every 32 bytes the low halves first."""
    return _nibbles(b.reshape(*b.shape[:-1], 4, 32)).reshape(*b.shape[:-1], 256)


def _q4_k(b: Array) -> Grouped:
    d = _f16(b[..., :4])
    sc, mn = _six_bit_scales(b[..., 4:16])
    return Grouped(_rows(_halves(b[..., 16:]), b), 4, 32, _rows(d[..., :1] * sc, b), 0, _rows(-d[..., 1:] * mn, b))


def _q5_k(b: Array) -> Grouped:
    d = _f16(b[..., :4])
    sc, mn = _six_bit_scales(b[..., 4:16])
    high = np.unpackbits(b[..., 16:48, None], axis=-1, bitorder="little").swapaxes(-1, -2).reshape(*b.shape[:-1], 256)
    return Grouped(_rows(_halves(b[..., 48:]) | (high << 4), b), 5, 32, _rows(d[..., :1] * sc, b), 0, _rows(-d[..., 1:] * mn, b))


def _q6_k(b: Array) -> Grouped:
    low = _nibbles(b[..., :128].reshape(*b.shape[:-1], 2, 64)).reshape(*b.shape[:-1], 256)
    high = _quarters(b[..., 128:192])
    sc = b[..., 192:208].view(np.int8).astype(np.float32)
    return Grouped(_rows(low | (high << 4), b), 6, 16, _rows(_f16(b[..., 208:210]) * sc, b), 32)


def _tq1_0(b: Array) -> Grouped:
    def digits(x: Array, n: int) -> Array:
        p = np.array([3**i for i in range(n)], np.uint16)[:, None]
        return np.asarray(((((x[..., None, :] * p) & 255) * 3) >> 8).astype(np.uint8).reshape(*x.shape[:-1], -1))

    w = b.astype(np.uint16)
    q = np.concatenate([digits(w[..., :32], 5), digits(w[..., 32:48], 5), digits(w[..., 48:52], 4)], -1)
    return Grouped(_rows(q, b), 0, 256, _f16(b[..., 52:54])[..., 0], 1)


def _tq2_0(b: Array) -> Grouped:
    return Grouped(_rows(_quarters(b[..., :64]), b), 0, 256, _f16(b[..., 64:66])[..., 0], 1)


BLOCKS: dict[str, BlockType] = {
    "Q4_0": BlockType(2, 32, 18, _q4_0), "Q4_1": BlockType(3, 32, 20, _q4_1), "Q5_0": BlockType(6, 32, 22, _q5_0),
    "Q5_1": BlockType(7, 32, 24, _q5_1), "Q8_0": BlockType(8, 32, 34, _q8_0), "Q2_K": BlockType(10, 256, 84, _q2_k),
    "Q3_K": BlockType(11, 256, 110, _q3_k), "Q4_K": BlockType(12, 256, 144, _q4_k), "Q5_K": BlockType(13, 256, 176, _q5_k),
    "Q6_K": BlockType(14, 256, 210, _q6_k), "TQ1_0": BlockType(34, 256, 54, _tq1_0), "TQ2_0": BlockType(35, 256, 66, _tq2_0),
}  # fmt: skip


def read_blocks(kind: str, raw: Array, rows: int, columns: int) -> Grouped:
    """The tensor [rows, columns] behind the bytes ``raw``. Raises ValueError when the columns do not fill blocks or bytes lack."""
    t = BLOCKS[kind]
    if columns % t.columns:
        raise ValueError(f"rows of {columns} columns do not fill {kind} blocks of {t.columns}")
    n = columns // t.columns
    if raw.size != rows * n * t.size:
        raise ValueError(f"{rows} x {columns} weights of {kind} take {rows * n * t.size} bytes, there are {raw.size}")
    return t.read(np.ascontiguousarray(raw, np.uint8).reshape(rows, n, t.size))
