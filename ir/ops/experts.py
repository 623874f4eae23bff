"""``luthier::ExpertMatMul``: rows times the low-bit matrices of the experts that were chosen for them; no other expert is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import f32, index
from luthier.ir.expr import Expr, bcast, cast, const, load, maximum, minimum, ramp, var, vreduce
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Alloc, Buffer, Let, Stmt, Store, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, must, need, shape_error, static, type_error
from luthier.ir.ops.kernels import flat, for_, kernel, put

LANES = 8


def pack_experts(q: Array, bits: int) -> Array:
    """Values u8 [.., K] as bytes: with 4 bits, byte ``j`` of a block of 16 columns holds column ``j`` low and ``8 + j`` high."""
    v = np.asarray(q, np.uint8)
    if bits == 8:
        return np.ascontiguousarray(v)
    b = v.reshape(*v.shape[:-1], -1, 2, LANES)
    return np.ascontiguousarray(b[..., 0, :] | b[..., 1, :] << 4).reshape(*v.shape[:-1], -1)


def unpack_experts(raw: Array, bits: int) -> Array:
    """The inverse of :func:`pack_experts`."""
    v = np.asarray(raw, np.uint8)
    if bits == 8:
        return v
    b = v.reshape(*v.shape[:-1], -1, LANES)
    return np.stack([b & 15, b >> 4], -2).reshape(*v.shape[:-1], -1)


@op("luthier::ExpertMatMul")
class ExpertMatMul(Op):
    """(x f32 [S, K] or [S, T, K], chosen i64 [S, T], bytes u8 [E, N, ..], scales [E, N, K / group], offsets) -> f32 [S, T, N].

    ``y[s, t] = x[s(, t)] @ w[chosen[s, t]].T`` with ``w = (q - zero) * scale``, or ``q * scale + offset`` where input 4 is given; ``q`` of
    ``bits`` 4 or 8 as :func:`pack_experts` lays them. Activations and sums in f32. A number of an expert outside of 0 .. E - 1 counts as
    the nearest one. Raises ShapeError, TypeMismatch."""

    def geometry(self, node: Node) -> tuple[int, int, int, int, int, int]:
        """(experts, N, K, T, bits, group)."""
        b, s, ids, x = need(node, 2), need(node, 3), need(node, 1), need(node, 0)
        if b.rank != 3 or s.rank != 3 or ids.rank != 2 or x.rank not in (2, 3):
            raise shape_error(node, "takes x [S, K] or [S, T, K], numbers [S, T], bytes [E, N, ..] and scales [E, N, groups]")
        bits, group = int(node.attrs["bits"]), int(node.attrs["group"])
        if bits not in (4, 8) or group % 16:
            raise type_error(node, f"experts have 4 or 8 bits and groups of a multiple of 16 columns, not {bits} and {group}")
        e, n, raw = (static(node, v, "extents of experts") for v in b.shape)
        k = raw * 8 // bits
        if k % group or static(node, s.shape[2], "groups") != k // group:
            raise shape_error(node, f"{k} columns in groups of {group} need {k // group} scales a row")
        if x.shape[-1].op == "const" and x.shape[-1].attr != k:
            raise shape_error(node, f"the last extent of x must be {k}")
        return e, n, k, static(node, ids.shape[1], "chosen experts"), bits, group

    def infer(self, node: Node) -> Sequence[TensorType]:
        _, n, _, t, _, _ = self.geometry(node)
        return [TensorType(f32, (need(node, 1).shape[0], const(t), const(n)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        experts, n, k, t, bits, group = self.geometry(node)
        each = need(node, 0).rank == 3
        x, ids, raw, scales = (flat(must(ins, i)) for i in range(4))
        offsets = flat(must(ins, 4)) if len(ins) > 4 and ins[4] is not None else None
        zero = const(float(node.attrs.get("zero", 0)), f32)
        out, lane = flat(outs[0]), f32.vec(LANES)
        rows = must(ins, 1).shape[0]
        step = LANES * 8 // bits  # columns of a vector of bytes
        per = k * bits // 8

        def vector(b: Buffer, i: Expr) -> Expr:
            return load(b, [ramp(i, 1, LANES)])

        def choice(r: Expr) -> Stmt:
            e = var("expert", lo=0, hi=experts - 1)
            number = maximum(minimum(cast(load(ids, [r]), index), const(experts - 1)), const(0))
            row = r if each else r // t

            def line(i: Expr) -> Stmt:
                acc, part, total = (Buffer(b, lane, (), "local") for b in ("acc", "part", "total"))

                def columns(g: Expr, c: Expr) -> Stmt:
                    at = g * group + c * step
                    word = var("word", raw.dtype.vec(LANES), None)
                    halves = [word] if bits == 8 else [word & 15, word >> 4]
                    body: list[Stmt] = [Let(word, vector(raw, (e * n + i) * per + g * (group * bits // 8) + c * LANES))]
                    for j, h in enumerate(halves):
                        v = var(f"x{j}", lane, None)
                        body += [Let(v, vector(x, row * k + at + j * LANES)), Store(part, (), load(part, ()) + cast(h, lane) * v), Store(total, (), load(total, ()) + v)]
                    return block(*body)

                def groups(g: Expr) -> Stmt:
                    at = (e * n + i) * (k // group) + g
                    s = bcast(cast(load(scales, [at]), f32), LANES)
                    shift = s * bcast(const(0.0, f32) - zero, LANES) if offsets is None else bcast(cast(load(offsets, [at]), f32), LANES)
                    nothing = bcast(const(0.0, f32), LANES)
                    return block(
                        Store(part, (), nothing), Store(total, (), nothing), for_("c", group // step, lambda c: columns(g, c)),
                        Store(acc, (), load(acc, ()) + load(part, ()) * s + load(total, ()) * shift),
                    )  # fmt: skip

                body = block(Store(acc, (), bcast(const(0.0, f32), LANES)), for_("g", k // group, groups), put(out, r * n + i, vreduce("add", load(acc, ()))))
                for b in (acc, part, total):
                    body = Alloc(b, body)
                return body

            return block(Let(e, number), for_("i", n, line))

        return kernel(node, ins, outs, (), for_("r", rows * t, choice, kind="parallel"))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, ids, raw, scales = (np.asarray(a) for a in arrays[:4])
        _, _, _, _, bits, group = self.geometry(node)
        w = unpack_experts(raw, bits).astype(np.float64)
        s = np.repeat(scales.astype(np.float64), group, -1)
        if len(arrays) > 4 and arrays[4] is not None:
            w = w * s + np.repeat(np.asarray(arrays[4]).astype(np.float64), group, -1)
        else:
            w = (w - float(node.attrs.get("zero", 0))) * s
        picked = w[np.clip(ids, 0, len(w) - 1)]
        return [np.einsum("stnk,stk->stn" if x.ndim == 3 else "stnk,sk->stn", picked, x.astype(np.float64)).astype(np.float32)]
