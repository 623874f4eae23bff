"""``luthier::GroupedMatMul``: a product with grouped low-bit weights in the general form that importers of weight files build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, axis
from luthier.ir.dtypes import f32, i32
from luthier.ir.expr import Expr, cast, const, load
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import Array, axes_of, define, get, make, must, need, padded, shape_error, type_error
from luthier.ir.ops.lowbit import bit_field, grouped_product, pack_bits, unpack_bits


def pack_trits(values: Array) -> Array:
    """Values 0, 1, 2 along the last axis to bytes, five a byte, the first one in the lowest digit."""
    v = np.asarray(values, np.uint8)
    extra = -v.shape[-1] % 5
    v = np.concatenate([v, np.zeros((*v.shape[:-1], extra), np.uint8)], -1) if extra else v
    return np.asarray((v.reshape(*v.shape[:-1], -1, 5) * np.array([1, 3, 9, 27, 81], np.uint8)).sum(-1, dtype=np.uint8))


def unpack_trits(raw: Array, n: int) -> Array:
    """The first ``n`` values along the last axis."""
    v = np.asarray(raw, np.int32)[..., None] // np.array([1, 3, 9, 27, 81]) % 3
    return np.asarray(v.reshape(*raw.shape[:-1], -1)[..., :n].astype(np.uint8))


@op("luthier::GroupedMatMul")
class GroupedMatMul(Op):
    """(x [.., K], bytes u8 [N, ..], scales [N, K / group], zeros or offsets, bias) -> ``x @ w.T``.

    ``w = (q - zero) * scale``, or ``q * scale + offset`` when ``offset`` is 1. ``q`` is a stream of ``bits``-wide values a row, or of
    ternary digits (``bits`` = 0); ``zero``: one number for all when input 3 is left out. ``act_group``: 0 keeps the activations
    exact, else they are rounded to 8 bits in groups of so many columns. Accumulates in f32."""

    kind = "contraction"

    def geometry(self, node: Node) -> tuple[int, int, int, int]:
        """(columns, bits, group, act_group). Raises TypeMismatch."""
        k, bits, group, act = (int(node.attrs[n]) for n in ("K", "bits", "group", "act_group"))
        if bits not in (0, 1, 2, 3, 4, 5, 6, 8):
            raise type_error(node, f"weights of {bits} bits are not supported, only of 0 (ternary), 1 to 6 and 8")
        if group < 1 or k % group or (act and k % act):
            raise type_error(node, f"groups of {group} weights and {act} activations must divide the {k} columns")
        return k, bits, group, act

    def infer(self, node: Node) -> Sequence[TensorType]:
        a, b = need(node, 0), need(node, 1)
        k, *_ = self.geometry(node)
        if a.shape[-1].op == "const" and a.shape[-1].attr != k:
            raise shape_error(node, f"the last extent of x must be K = {k}")
        return [TensorType(a.dtype, (*a.shape[:-1], b.shape[0]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b, s, y = must(ins, 0), must(ins, 1), must(ins, 2), outs[0]
        k_, bits, group, act = self.geometry(node)
        axes = axes_of(y.shape)
        n, k = axes[-1].var, axis("k", k_)
        at = k.var // group

        def byte(i: Expr) -> Expr:
            return cast(load(b, [n, i]), i32)

        if bits:
            q = bit_field(byte, k.var, bits)
        else:
            power = const(0, i32)
            for digit, p in enumerate((1, 3, 9, 27, 81)):
                power = power + cast((k.var % 5).eq(digit), i32) * const(p, i32)
            q = (byte(k.var // 5) // power) % const(3, i32)
        sc = cast(load(s, [n, at]), f32)
        z = get(ins, 3)
        if z is None:
            zero = float(node.attrs.get("zero", 0))
            w = (cast(q - const(int(zero), i32), f32) if zero == int(zero) else cast(q, f32) - const(zero, f32)) * sc
        elif int(node.attrs.get("offset", 0)):
            w = cast(q, f32) * sc + cast(load(z, [n, at]), f32)
        else:
            zs = load(z, [n, at])
            w = (cast(q, f32) - cast(zs, f32) if z.dtype.is_float else cast(q - cast(zs, i32), f32)) * sc
        lets = grouped_product(y, axes, k, lambda rows, i: cast(load(a, [*rows, i]), f32), w, act)
        r = load(lets[-1].buf, [v.var for v in axes])  # type: ignore[union-attr]
        bias = get(ins, 4)
        if bias is not None:
            r = r + cast(load(bias, [n]), f32)
        return make(node, ins, outs, [*lets, define(y, axes, r)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, b, s, z, bias = padded(arrays, 5)
        w = self.dequantized(node, b, s, z)
        r = np.asarray(a).astype(np.float32) @ w.T
        return [(r if bias is None else r + np.asarray(bias)).astype(np.asarray(a).dtype)]

    def dequantized(self, node: Node, b: Any, s: Any, z: Any = None) -> Array:
        """The weights [N, K] in f32."""
        k, bits, group, _ = self.geometry(node)
        raw = np.asarray(b)
        q = (unpack_bits(raw, bits)[..., :k] if bits else unpack_trits(raw, k)).astype(np.float32)
        sc = np.repeat(np.asarray(s).astype(np.float32), group, 1)
        if z is None:
            return np.asarray((q - np.float32(node.attrs.get("zero", 0))) * sc)
        zz = np.repeat(np.asarray(z).astype(np.float32), group, 1)
        return np.asarray(q * sc + zz if int(node.attrs.get("offset", 0)) else (q - zz) * sc)


__all__ = ["GroupedMatMul", "pack_bits", "pack_trits", "unpack_trits"]
