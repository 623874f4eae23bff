"""The mathematics of products with grouped low-bit weights, shared by MatMulNBits and the GGUF operators.

``y[.., n] = sum_k x[.., k] * w[n, k]`` with ``w = (q - z) * s`` or ``q * s + o``; ``q`` small integers, ``s``, ``z``, ``o`` one
value for every group of columns. With ``act_group`` the activations are rounded to 8 bits first, one scale for every
``act_group`` of them: ``xq = round(x * 127 / amax)``, ``x ~ xq * amax / 127``. That is an approximation which the caller asks
for; its NMSE is about 3e-5 on normally distributed activations (groups of 32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, LetStmt, axis, max_, sum_
from luthier.ir.dtypes import f32, i8
from luthier.ir.expr import Expr, cast, const, load, select, unary
from luthier.ir.loop import Buffer
from luthier.ir.ops.common import temp

Array = np.ndarray[Any, Any]


def bit_field(bytes_of: Callable[[Expr], Expr], k: Expr, bits: int) -> Expr:
    """Element ``k`` (i32) of a little-endian stream of ``bits``-wide values; ``bytes_of(i)``: byte i as i32."""
    from luthier.ir.dtypes import i32

    if bits == 8:
        return bytes_of(k)
    mask = const((1 << bits) - 1, i32)
    if 8 % bits == 0:
        per = 8 // bits
        return (bytes_of(k // per) >> cast(k % per * bits, i32)) & mask
    at = k * bits
    last = (at + (bits - 1)) // 8
    pair = bytes_of(at // 8) | (bytes_of(last) << const(8, i32))
    return (pair >> cast(at % 8, i32)) & mask


def unpack_bits(raw: Array, bits: int) -> Array:
    """The values (uint8) of a little-endian stream of ``bits``-wide fields along the last axis of uint8 bytes."""
    if bits == 8:
        return raw
    if 8 % bits == 0:
        parts = (raw[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8((1 << bits) - 1)
        return np.asarray(parts.reshape(*raw.shape[:-1], -1))
    flat = np.unpackbits(raw, axis=-1, bitorder="little")
    n = flat.shape[-1] // bits
    fields = flat[..., : n * bits].reshape(*raw.shape[:-1], n, bits)
    return np.asarray((fields << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8))


def pack_bits(values: Array, bits: int) -> Array:
    """The inverse of :func:`unpack_bits`: unsigned values below ``2**bits`` to bytes along the last axis, zero padded."""
    v = np.asarray(values, np.uint8)
    per = 8 // bits if 8 % bits == 0 else 0
    if bits == 8:
        return v
    if per and v.shape[-1] % per == 0:
        out = v[..., 0::per].copy()
        for i in range(1, per):
            out |= v[..., i::per] << (i * bits)
        return out
    flat = ((v[..., None] >> np.arange(bits, dtype=np.uint8)) & 1).reshape(*v.shape[:-1], -1)
    return np.packbits(flat, axis=-1, bitorder="little")


def grouped_product(y: Buffer, axes: Sequence[Axis], k: Axis, x: Callable[[Sequence[Expr], Expr], Expr], w: Expr, act_group: int) -> list[LetStmt]:
    """Lets up to the accumulator, which is the last. ``axes``: of the output, columns last; ``x(rows, k)``: an activation in f32;
    ``w``: the weight at (axes[-1], k) in f32; ``act_group``: 0 for exact activations, else a divisor of k's extent."""
    rows = [a.var for a in axes[:-1]]
    if not act_group:
        return [temp(y, "acc", axes, sum_(k, x(rows, k.var) * w))]
    g, j = axis("g", k.extent // act_group), axis("j", act_group)
    own = [axis(f"r{d}", a.extent) for d, a in enumerate(axes[:-1])]
    rv = [a.var for a in own]
    amax = temp(y, "amax", [*own, g], max_(j, unary("abs", x(rv, g.var * act_group + j.var))))
    own2 = [axis(f"s{d}", a.extent) for d, a in enumerate(axes[:-1])]
    k2 = axis("k2", k.extent)
    rv2 = [a.var for a in own2]
    top = load(amax.buf, [*rv2, k2.var // act_group])
    inv = select(const(0.0, f32) < top, const(127.0, f32) / top, const(0.0, f32))
    xq = temp(y, "xq", [*own2, k2], cast(unary("round", x(rv2, k2.var) * inv), i8))
    near = cast(load(xq.buf, [*rows, k.var]), f32) * (load(amax.buf, [*rows, k.var // act_group]) * const(1 / 127, f32))
    return [amax, xq, temp(y, "acc", axes, sum_(k, near * w))]
