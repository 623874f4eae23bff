"""``luthier::Attention``: what ``recognise_attention`` makes of the many spellings of scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, axis, reduce_, sum_
from luthier.ir.expr import const, load, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import Array, axes_of, bcast_index, define, get, make, must, need, shape_error, temp, type_error, widen


@op("luthier::Attention")
class FusedAttention(Op):
    """(Q [B, H, S, D], K [B, H, T, D], V [B, H, T, E], mask?) -> [B, H, S, E]: softmax(scale Q K' + mask) V.

    ``mask`` broadcasts to [B, H, S, T] and is added. A row whose scores are all -inf gives zeros. Computed in f32 (f64 stays)."""

    kind = "contraction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        q, k, v = (need(node, i) for i in range(3))
        if q.rank != 4 or k.rank != 4 or v.rank != 4:
            raise shape_error(node, "Q, K and V must have rank 4")
        if not q.dtype.is_float or q.dtype is not k.dtype or q.dtype is not v.dtype:
            raise type_error(node, "Q, K and V must be floats of one type")
        return [TensorType(q.dtype, (*q.shape[:3], v.shape[3]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        q, k, v, mask, out = must(ins, 0), must(ins, 1), must(ins, 2), get(ins, 3), outs[0]
        b, h, s, e = axes_of(out.shape)
        t, d = axis("t", k.shape[2]), axis("d", q.shape[3])
        row, cell = [b.var, h.var, s.var], [b.var, h.var, s.var, t.var]
        product = sum_(d, widen(load(q, [*row, d.var])) * widen(load(k, [b.var, h.var, t.var, d.var])))
        raw = temp(out, "scores", (b, h, s, t), product)
        y = load(raw.buf, cell) * const(float(node.attrs.get("scale", 1.0)), product.dtype)
        if mask is not None:
            y = y + load(mask, bcast_index(mask.shape, (b, h, s, t))).cast(product.dtype)
        scaled = temp(out, "scaled", (b, h, s, t), y)
        k2, k3, k4 = (axis(n, k.shape[2]) for n in ("t1", "t2", "t3"))
        top = temp(out, "max", (b, h, s), reduce_("max", (k2,), load(scaled.buf, [*row, k2.var])))
        m = load(top.buf, row)
        lets = [raw, scaled, top]
        if mask is not None:  # -inf minus -inf
            safe = temp(out, "top", (b, h, s), select(m.eq(const(float("-inf"), m.dtype)), const(0.0, m.dtype), m))
            lets.append(safe)
            m = load(safe.buf, row)
        p = temp(out, "exp", (b, h, s, t), unary("exp", load(scaled.buf, cell) - m))
        total = temp(out, "sum", (b, h, s), sum_(k3, load(p.buf, [*row, k3.var])))
        acc = temp(out, "acc", (b, h, s, e), sum_(k4, load(p.buf, [*row, k4.var]) * widen(load(v, [b.var, h.var, k4.var, e.var]))))
        z = load(total.buf, row)
        if mask is not None:
            z = select(z.eq(const(0.0, z.dtype)), const(1.0, z.dtype), z)
        return make(node, ins, outs, [*lets, p, total, acc, define(out, (b, h, s, e), load(acc.buf, [*row, e.var]) / z)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        q, k, v = (np.asarray(a).astype(np.float64) for a in arrays[:3])
        s = q @ k.swapaxes(-1, -2) * float(node.attrs.get("scale", 1.0))
        if len(arrays) > 3 and arrays[3] is not None:
            s = s + np.asarray(arrays[3]).astype(np.float64)
        top = s.max(-1, keepdims=True)
        p = np.exp(s - np.where(np.isneginf(top), 0, top))
        total = p.sum(-1, keepdims=True)
        return [((p / np.where(total == 0, 1, total)) @ v).astype(np.asarray(arrays[0]).dtype)]
