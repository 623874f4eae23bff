"""``luthier::TwoOfFourMatMul``: a product with weights of which two in four neighbouring columns are kept, in 4 or 8 bits.

Eight columns of a row take ``bits / 2 + 1`` bytes: their four kept codes, then a byte of four 2-bit places (the lowest bits are
those of the first code). A code ``q`` stands for ``(q - zero) * scale``; ``zero`` is the middle of the range, what is dropped is 0. A scale
holds for ``group`` columns. 4 bits are stored as 3 bits a weight, and the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, axis
from luthier.ir.dtypes import f32, i32
from luthier.ir.expr import Expr, cast, const, load, select
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import Array, axes_of, define, get, make, must, need, padded, shape_error, type_error
from luthier.ir.ops.lowbit import grouped_product

__all__ = ["TwoOfFour", "TwoOfFourMatMul", "kept_places", "pack_two_of_four", "unpack_two_of_four"]


def kept_places(values: Array) -> Array:
    """[.., 2] ascending places in the last axis (4) that hold all non-zero ``values``. Raises ValueError where three are not zero."""
    if (np.count_nonzero(values, axis=-1) > 2).any():
        raise ValueError("more than two of four weights are not zero")
    return np.asarray(np.sort(np.argsort(values == 0, axis=-1, kind="stable")[..., :2], axis=-1))


def pack_two_of_four(values: Array, bits: int) -> Array:
    """Signed ``values`` [N, K], K a multiple of 8, to u8 [N, K / 8 * (bits / 2 + 1)]. Raises ValueError for other contents."""
    n, k = values.shape
    if k % 8 or bits not in (4, 8) or (np.abs(values.astype(np.int32)) > (1 << (bits - 1))).any():
        raise ValueError(f"{k} columns must be a multiple of 8 and values must fit 4 or 8 bits")
    v = values.reshape(n, -1, 2, 4).astype(np.int32)
    at = kept_places(v)
    codes = (np.take_along_axis(v, at, -1) + (1 << (bits - 1))).astype(np.uint8).reshape(n, -1, 4)
    places = (at.reshape(n, -1, 4) << np.array([0, 2, 4, 6])).sum(-1, keepdims=True).astype(np.uint8)
    body = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    return np.concatenate([body, places], -1).reshape(n, -1)


def unpack_two_of_four(raw: Array, k: int, bits: int) -> Array:
    """i32 [N, K]: the signed values."""
    n = len(raw)
    r = raw.reshape(n, k // 8, bits // 2 + 1).astype(np.int32)
    codes = r[..., :4] if bits == 8 else np.stack([r[..., :2] & 15, r[..., :2] >> 4], -1).reshape(n, -1, 4)
    at = r[..., -1:] >> np.array([0, 2, 4, 6]) & 3
    out = np.zeros((n, k // 8, 2, 4), np.int32)
    np.put_along_axis(out, at.reshape(n, -1, 2, 2), codes.reshape(n, -1, 2, 2) - (1 << (bits - 1)), -1)
    return out.reshape(n, k)


@dataclass(frozen=True, slots=True)
class TwoOfFour:
    """Weights [rows, columns]: ``values`` i8 [rows, columns], at most two of four not zero; ``scales`` f16 or f32 [rows, columns / group]."""

    values: Array
    scales: Array
    bits: int
    group: int

    def dense(self) -> Array:
        """The weights in f32."""
        return np.asarray(self.values.astype(np.float32) * np.repeat(self.scales.astype(np.float32), self.group, 1))

    def arrays(self) -> list[Array]:
        """Inputs 1 and 2 of the operator."""
        return [pack_two_of_four(self.values, self.bits), self.scales]

    def attrs(self, act_group: int = 32) -> dict[str, int]:
        """Attributes of the operator."""
        return {"K": self.values.shape[1], "bits": self.bits, "group": self.group, "act_group": act_group}


@op("luthier::TwoOfFourMatMul")
class TwoOfFourMatMul(Op):
    """(x [.., K], bytes u8 [N, K / 8 * (bits / 2 + 1)], scales [N, K / group], bias [N]?) -> [.., N].

    ``act_group``: 0 keeps the activations exact, else they are rounded to 8 bits in groups of so many columns. Accumulates in f32."""

    kind = "contraction"

    def geometry(self, node: Node) -> tuple[int, int, int, int]:
        """(columns, bits, group, act_group). Raises TypeMismatch."""
        k, bits, group, act = (int(node.attrs[n]) for n in ("K", "bits", "group", "act_group"))
        if bits not in (4, 8):
            raise type_error(node, f"two of four weights of {bits} bits are not supported, only of 4 and 8")
        if k < 8 or k % 8 or group < 1 or k % group or (act and k % act):
            raise type_error(node, f"8, groups of {group} weights and {act} activations must divide the {k} columns")
        return k, bits, group, act

    def infer(self, node: Node) -> Sequence[TensorType]:
        a, b, s = need(node, 0), need(node, 1), need(node, 2)
        k, bits, group, _ = self.geometry(node)
        if a.shape[-1].op == "const" and a.shape[-1].attr != k:
            raise shape_error(node, f"the last extent of x must be K = {k}")
        for i, (v, want) in enumerate(((b, k // 8 * (bits // 2 + 1)), (s, k // group)), 1):
            if v.rank != 2 or v.shape[1].op != "const" or v.shape[1].attr != want:
                raise shape_error(node, f"input {i} must have {want} columns")
        return [TensorType(a.dtype, (*a.shape[:-1], b.shape[0]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b, s, y = must(ins, 0), must(ins, 1), must(ins, 2), outs[0]
        columns, bits, group, act = self.geometry(node)
        axes = axes_of(y.shape)
        n, k = axes[-1].var, axis("k", columns)
        per, half, place = bits // 2 + 1, k.var % 8 // 4, k.var % 4

        def byte(i: Expr | int) -> Expr:
            return cast(load(b, [n, k.var // 8 * per + i]), i32)

        at = byte(bits // 2) >> cast(half * 4, i32)
        codes = [byte(half * 2), byte(half * 2 + 1)] if bits == 8 else [byte(half) & 15, byte(half) >> 4]
        zero = const(1 << (bits - 1), i32)
        which = cast(place, i32)
        q = select((at & 3).eq(which), codes[0], select(((at >> 2) & 3).eq(which), codes[1], zero)) & ((1 << bits) - 1)
        w = cast(q - zero, f32) * cast(load(s, [n, k.var // group]), f32)
        lets = grouped_product(y, axes, k, lambda rows, i: cast(load(a, [*rows, i]), f32), w, act)
        r = load(lets[-1].buf, [v.var for v in axes])  # type: ignore[union-attr]
        bias = get(ins, 3)
        if bias is not None:
            r = r + cast(load(bias, [n]), f32)
        return make(node, ins, outs, [*lets, define(y, axes, r)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, b, s, bias = padded(arrays, 4)
        k, bits, group, _ = self.geometry(node)
        w = unpack_two_of_four(np.asarray(b), k, bits).astype(np.float64) * np.repeat(np.asarray(s).astype(np.float64), group, 1)
        r = np.asarray(a).astype(np.float64) @ w.T
        return [(r if bias is None else r + np.asarray(bias)).astype(np.asarray(a).dtype)]
