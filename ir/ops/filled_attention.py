"""``luthier::AttendFilled``: attention over the filled positions of caches in the layout of ONNX decoders (:mod:`luthier.ir.ops.cache_append`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, bcast, cast, const, load, maximum, minimum, ramp, select, unary, var, vreduce
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Alloc, Buffer, If, Let, Stmt, Store, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, get, must, need, shape_error, static
from luthier.ir.ops.kernels import flat, for_, kernel

LANES = 8
ROWS = 4  # query rows that share the keys and values that are loaded
NOTHING = float("-inf")


@op("luthier::AttendFilled")
class AttendFilled(Op):
    """(keys [1, h, capacity, D], values, q [1, H, S, D], past [P], mask?) -> [1, H, S, D]: ``softmax(scale q k' + mask) v`` over the first P + S
    positions, ``H / h`` consecutive query heads on one head of keys. ``mask`` broadcasts to [1, H, S, P + S] and is added; a row whose scores are
    all -inf gives zeros. Scores and sums in f32. D must be a multiple of 8. Raises ShapeError."""

    def sizes(self, node: Node) -> tuple[int, int, int, int]:
        """(query heads, key heads, capacity, head size)."""
        k, v, q = (need(node, i) for i in range(3))
        if k.rank != 4 or q.rank != 4 or k.type != v.type:
            raise shape_error(node, "takes keys and values [1, heads, capacity, head] of one type and queries [1, heads, S, head]")
        b, h, cap, d = (static(node, e, "extents of a cache") for e in k.shape)
        heads = static(node, q.shape[1], "query heads")
        if b != 1 or heads % h or d % LANES:
            raise shape_error(node, f"a batch of 1, heads in groups and a head size that is a multiple of {LANES} are needed")
        return heads, h, cap, d

    def infer(self, node: Node) -> Sequence[TensorType]:
        self.sizes(node)
        return [need(node, 2).type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        heads, h, cap, d = self.sizes(node)
        per = heads // h
        keys, values, q, out = *(flat(must(ins, i)) for i in range(3)), flat(outs[0])
        mask = get(ins, 4)
        length = must(ins, 2).shape[2]
        total = minimum(must(ins, 3).shape[0] + length, const(cap))
        scale = const(float(node.attrs.get("scale", 1.0)), f32)
        padded = -(-cap // LANES) * LANES
        lane = f32.vec(LANES)
        many = max(1, ROWS // per)

        def vector(b: Buffer, i: Expr) -> Expr:
            return cast(load(b, [ramp(i, 1, LANES)]), lane)

        def biased(score: Expr, head: Expr, s: Expr, t: Expr) -> Expr:
            if mask is None:
                return score
            at = (const(0), head, s, t)[4 - len(mask.shape) :]
            return score + cast(load(mask, [const(0) if e.op == "const" and e.attr == 1 else i for e, i in zip(mask.shape, at, strict=True)]), f32)

        def attend(first: Expr, k: Expr, rows: int) -> Stmt:
            """The query rows ``first`` .. first + rows - 1 of the heads that read head ``k`` of the keys."""
            work = [(first + r, k * per + g) for r in range(rows) for g in range(per)]
            n = len(work)
            score = Buffer("score", f32, (const(n * padded),), "local")
            tops, sums = ([Buffer(f"{name}{g}", lane, (), "local") for g in range(n)] for name in ("top", "sum"))

            def scores(t: Expr) -> Stmt:
                key = [var(f"key{i}", lane, None) for i in range(d // LANES)]
                made: list[Stmt] = [Let(v, vector(keys, (k * cap + t) * d + i * LANES)) for i, v in enumerate(key)]
                for g, (s, head) in enumerate(work):
                    acc = [vector(q, (head * length + s) * d + i * LANES) * key[i] for i in range(d // LANES)]
                    while len(acc) > 1:
                        acc = [acc[i] + acc[i + 1] if i + 1 < len(acc) else acc[i] for i in range(0, len(acc), 2)]
                    made.append(Store(score, (g * padded + t,), biased(vreduce("add", acc[0]) * scale, head, s, t)))
                return block(*made)

            blocks = (total + LANES - 1) // LANES
            parts: list[Stmt] = [for_("t", total, scores)]
            parts.append(for_("p", blocks * LANES, lambda t: block(*(Store(score, (g * padded + t,), const(NOTHING, f32)) for g in range(n))), lo=total))
            parts += [Store(b, (), bcast(const(NOTHING, f32), LANES)) for b in tops]
            parts.append(for_("b", blocks, lambda b: block(*(Store(x, (), maximum(load(x, ()), vector(score, g * padded + b * LANES))) for g, x in enumerate(tops)))))
            highs = [var(f"high{g}", f32) for g in range(n)]
            for v, x in zip(highs, tops, strict=True):
                top = vreduce("max", load(x, ()))
                parts.append(Let(v, top if mask is None else select(top.eq(const(NOTHING, f32)), const(0.0, f32), top)))
            parts += [Store(b, (), bcast(const(0.0, f32), LANES)) for b in sums]

            def weights(b: Expr) -> Stmt:
                made: list[Stmt] = []
                for g in range(n):
                    i, e = g * padded + b * LANES, var(f"e{g}", lane, None)
                    made += [Let(e, unary("exp", vector(score, i) - bcast(highs[g], LANES))), Store(score, (ramp(i, 1, LANES),), e), Store(sums[g], (), load(sums[g], ()) + e)]
                return block(*made)

            parts.append(for_("b", blocks, weights))
            inverse = [var(f"inv{g}", f32) for g in range(n)]
            for v, x in zip(inverse, sums, strict=True):
                z = vreduce("add", load(x, ()))
                parts.append(Let(v, const(1.0, f32) / (z if mask is None else select(z.eq(const(0.0, f32)), const(1.0, f32), z))))
            step = max(1, 12 // n)
            for low in range(0, d // LANES, step):
                cols = range(low, min(low + step, d // LANES))
                acc = {(g, c): Buffer(f"o{g}_{c}", lane, (), "local") for g in range(n) for c in cols}

                def add(t: Expr, cols: Any = cols, acc: Any = acc) -> Stmt:
                    vs = {c: var(f"value{c}", lane, None) for c in cols}
                    ps = [var(f"p{g}", lane, None) for g in range(n)]
                    lets: list[Stmt] = [Let(v, vector(values, (k * cap + t) * d + c * LANES)) for c, v in vs.items()]
                    lets += [Let(v, bcast(load(score, [g * padded + t]), LANES)) for g, v in enumerate(ps)]
                    return block(*lets, *(Store(a, (), load(a, ()) + ps[g] * vs[c]) for (g, c), a in acc.items()))

                stores = [
                    Store(out, (ramp((work[g][1] * length + work[g][0]) * d + c * LANES, 1, LANES),), cast(load(a, ()) * bcast(inverse[g], LANES), out.dtype.vec(LANES)))
                    for (g, c), a in acc.items()
                ]
                body = block(*(Store(a, (), bcast(const(0.0, f32), LANES)) for a in acc.values()), for_("t", total, add), *stores)
                for a in acc.values():
                    body = Alloc(a, body)
                parts.append(body)
            whole = block(*parts)
            for b in (*tops, *sums, score):
                whole = Alloc(b, whole)
            return whole

        if many == 1:
            return kernel(node, ins, outs, (), for_("r", length * h, lambda r: attend(r // h, r % h, 1), kind="parallel"))
        full = length // many

        def step(r: Expr) -> Stmt:
            i = r // h
            return If(i < full, attend(i * many, r % h, many), attend(full * many + (i - full), r % h, 1))

        return kernel(node, ins, outs, (), for_("r", (full + length % many) * h, step, kind="parallel"))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        k, v, q = (np.asarray(a).astype(np.float64) for a in arrays[:3])
        heads, h, _, _ = self.sizes(node)
        n = len(arrays[3]) + q.shape[2]
        k, v = (np.repeat(a[:, :, :n], heads // h, 1) for a in (k, v))
        s = q @ k.swapaxes(-1, -2) * float(node.attrs.get("scale", 1.0))
        if len(arrays) > 4 and arrays[4] is not None:
            s = s + np.asarray(arrays[4]).astype(np.float64)
        top = s.max(-1, keepdims=True)
        p = np.exp(s - np.where(np.isneginf(top), 0, top))
        z = p.sum(-1, keepdims=True)
        return [(p / np.where(z == 0, 1, z) @ v).astype(np.asarray(arrays[2]).dtype)]
