"""Detection: NonMaxSuppression, a kernel in loop IR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import boolean, i64, index
from luthier.ir.expr import Expr, before, cast, const, land, lnot, lor, maximum, minimum
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer, If, Stmt, While, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, const_value, must, need, padded, shape_error
from luthier.ir.ops.common import get as optional
from luthier.ir.ops.kernels import Heap, Reg, flat, for_, get, kernel, put, tail_symbol, with_regs


@op("NonMaxSuppression")
class NonMaxSuppression(Op):
    """(boxes [B, N, 4], scores [B, C, N], max_output_boxes_per_class, iou_threshold, score_threshold) to [n, 3] i64: rows
    (batch, class, box), in each class by falling score. A box goes when it overlaps a better one by more than the threshold."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        if need(node, 0).rank != 3 or need(node, 1).rank != 3:
            raise shape_error(node, "NonMaxSuppression takes boxes [B, N, 4] and scores [B, C, N]")
        return [TensorType.of(i64, (tail_symbol(node), 3))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        boxes, scores = flat(must(ins, 0)), flat(must(ins, 1))
        nb, nc, n = must(ins, 1).shape
        limit, iou, floor = (None if b is None else flat(b) for b in (optional(ins, 2), optional(ins, 3), optional(ins, 4)))
        most = const_value(node.input(2))
        per = n if most is None else minimum(n, const(max(int(most), 0)))
        if limit is None:
            per = const(0)
        cap = (nb * nc * per, const(3))
        y = flat(outs[0], cap[0] * 3)
        cand, count = Buffer("candidates", i64, (n,), "param"), Buffer("count", i64, (const(1),), "param")
        t = boxes.dtype
        left, at, taken, q, ok = Reg("left"), Reg("at"), Reg("taken"), Reg("q"), Reg("ok", boolean)
        corner = [Reg(f"c{k}", t) for k in range(4)]
        area = Reg("area", t)
        thr = const(0.0, t) if iou is None else get(iou, 0)
        center = bool(int(node.attrs.get("center_point_box", 0)))

        def edges(b: Expr, i: Expr) -> list[Expr]:
            """Low y, low x, high y, high x of box i."""
            v = [get(boxes, (b * n + i) * 4 + k) for k in range(4)]
            if center:
                x, yc, w, h = v
                return [yc - h * 0.5, x - w * 0.5, yc + h * 0.5, x + w * 0.5]
            return [minimum(v[0], v[2]), minimum(v[1], v[3]), maximum(v[0], v[2]), maximum(v[1], v[3])]

        def one_class(r: Expr) -> Stmt:
            b, base = r // nc, r * n

            def score(i: Expr) -> Expr:
                return get(scores, base + cast(i, index))

            def better(p: tuple[Expr, ...], r: tuple[Expr, ...]) -> Expr:
                return lor(before(score(r[0]), score(p[0])), land(lnot(before(score(p[0]), score(r[0]))), p[0] < r[0]))

            heap = Heap(lambda i: (get(cand, i),), lambda i, e: put(cand, i, e[0]), better, (i64,))  # the best on top

            def gather(i: Expr) -> Stmt:
                add = block(heap.push(left(), (cast(i, i64),)), left.add())
                return add if floor is None else If(get(floor, 0) < score(i), add)

            def overlap() -> Stmt:
                """ok = False when the box overlaps the q-th one taken in this class too much."""
                row = cast(get(count, 0), index) - taken() + q()
                c = edges(b, cast(get(y, row * 3 + 2), index))
                h = maximum(minimum(c[2], corner[2]()) - maximum(c[0], corner[0]()), const(0.0, t))
                w = maximum(minimum(c[3], corner[3]()) - maximum(c[1], corner[1]()), const(0.0, t))
                inter = h * w
                union = area() + (c[2] - c[0]) * (c[3] - c[1]) - inter
                drop = land(const(0.0, t) < inter, const(0.0, t) < union, thr * union < inter)
                return block(If(drop, ok.set(const(False, boolean))), q.add())

            row = cast(get(count, 0), index) * 3
            take = block(put(y, row, b), put(y, row + 1, r % nc), put(y, row + 2, at()), put(count, 0, get(count, 0) + 1), taken.add())
            choose = block(
                at.set(cast(get(cand, 0), index)), left.set(left() - 1), heap.replace(left(), (get(cand, left()),)),
                *(k.set(e) for k, e in zip(corner, edges(b, at()), strict=True)),
                area.set((corner[2]() - corner[0]()) * (corner[3]() - corner[1]())),
                q.set(0), ok.set(const(True, boolean)), While(land(ok(), q() < taken()), overlap()), If(ok(), take),
            )
            more = const(0) < left() if limit is None else land(const(0) < left(), taken() < cast(get(limit, 0), index))
            return with_regs(heap.regs, block(left.set(0), taken.set(0), for_("i", n, gather), While(more, choose)))

        body = block(put(count, 0, 0), for_("r", nb * nc, one_class) if limit is not None else None)
        regs = [left, at, taken, q, ok, area, *corner]
        return kernel(node, ins, outs, [cand, count], with_regs(regs, body), {outs[0].shape[0]: ("count", 0)}, {outs[0].name: cap})

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        boxes, scores, limit, iou, floor = padded(arrays, 5)
        boxes, scores = np.asarray(boxes), np.asarray(scores)
        most = 0 if limit is None else int(np.asarray(limit).reshape(-1)[0])
        thr = np.float32(0 if iou is None else np.asarray(iou).reshape(-1)[0])
        low = None if floor is None else np.asarray(floor).reshape(-1)[0]
        out = []
        for b in range(scores.shape[0]):
            v = boxes[b]
            if int(node.attrs.get("center_point_box", 0)):
                half = v[:, [3, 2]] / 2
                e = np.concatenate([v[:, [1, 0]] - half, v[:, [1, 0]] + half], 1)
            else:
                e = np.concatenate([np.minimum(v[:, :2], v[:, 2:]), np.maximum(v[:, :2], v[:, 2:])], 1)
            area = (e[:, 2] - e[:, 0]) * (e[:, 3] - e[:, 1])
            for c in range(scores.shape[1]):
                s = scores[b, c]
                order = [int(i) for i in np.lexsort((-s, ~np.isnan(s))) if low is None or s[i] > low]
                taken = 0
                while order and taken < most:
                    i = order.pop(0)
                    out.append((b, c, i))
                    taken += 1
                    inter = np.maximum(np.minimum(e[order, 2:], e[i, 2:]) - np.maximum(e[order, :2], e[i, :2]), 0).prod(1)
                    union = area[order] + area[i] - inter
                    order = [o for o, x, u in zip(order, inter, union, strict=True) if not (x > 0 and u > 0 and x > thr * u)]
        return [np.array(out, np.int64).reshape(-1, 3)]
