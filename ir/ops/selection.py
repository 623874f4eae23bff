"""Operators whose kernels choose elements: TopK, NonZero, Compress, Unique. Written in loop IR once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import boolean, i64, index
from luthier.ir.expr import Expr, as_expr, before, cast, const, land, lnot, lor, minimum
from luthier.ir.graph import Node, TensorType, content_or_symbols
from luthier.ir.loop import Buffer, If, Stmt, While, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, check_axis, known_array, must, need, product, shape_error, unsupported
from luthier.ir.ops.kernels import Heap, Reg, flat, for_, get, kernel, put, tail_symbol, with_regs
from luthier.ir.requirements import assume_at_most


def slices(shape: Sequence[Expr], axis: int) -> tuple[Expr, Expr, Expr]:
    """(elements before, along and after ``axis``)."""
    return product(shape[:axis]), shape[axis], product(shape[axis + 1 :])


@op("TopK")
class TopK(Op):
    """(X, k) to (values, indices i64): the k largest (or smallest) along ``axis``, best first, equal ones by position. NaN is larger than
    every number, as in torch and numpy."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        a = check_axis(node, int(node.attrs.get("axis", -1)), x.rank)
        k = as_expr(content_or_symbols(node, 1)[0])
        if k.op == "const" and x.shape[a].op == "const" and k.attr > x.shape[a].attr:
            raise shape_error(node, f"k = {k.attr} of {x.shape[a].attr} elements")
        assume_at_most(k, x.shape[a], "k and the elements it is taken of")
        shape = tuple(k if d == a else s for d, s in enumerate(x.shape))
        return [TensorType.of(x.dtype, shape), TensorType.of(i64, shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        x_, vals_ = must(ins, 0), outs[0]
        a = check_axis(node, int(node.attrs.get("axis", -1)), x_.rank)
        largest = bool(int(node.attrs.get("largest", 1)))
        outer, n, inner = slices(x_.shape, a)
        k = vals_.shape[a]
        x, vals = flat(x_), flat(vals_)
        temps = [] if len(outs) > 1 else [Buffer("ids", i64, (product(vals_.shape),), "param")]
        ids = flat(outs[1]) if len(outs) > 1 else temps[0]

        def row(r: Expr) -> Stmt:
            o, i = r // inner, r % inner

            def at(m: Expr) -> tuple[Expr, ...]:
                p = (o * k + m) * inner + i
                return get(vals, p), get(ids, p)

            def place(m: Expr, e: tuple[Expr, ...]) -> Stmt:
                p = (o * k + m) * inner + i
                return block(put(vals, p, e[0]), put(ids, p, e[1]))

            def behind(p: tuple[Expr, ...], q: tuple[Expr, ...]) -> Expr:
                return before(p[0], q[0]) if largest else before(q[0], p[0])

            def worse(p: tuple[Expr, ...], q: tuple[Expr, ...]) -> Expr:
                return lor(behind(p, q), land(lnot(behind(q, p)), q[1] < p[1]))

            h = Heap(at, place, worse, (x.dtype, i64))

            def entry(j: Expr) -> tuple[Expr, ...]:
                return get(x, (o * n + j) * inner + i), cast(j, i64)

            fill = for_("j", k, lambda j: h.push(j, entry(j)))
            more = for_("j", n, lambda j: If(behind(at(const(0)), entry(j)), h.replace(k, entry(j))), lo=k)  # of equal ones those held are earlier
            return with_regs(h.regs, If(const(0) < k, block(fill, more, h.sort(k))))

        return kernel(node, ins, outs, temps, for_("row", outer * inner, row, kind="parallel"))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, k = np.asarray(arrays[0]), int(np.asarray(arrays[1]).reshape(-1)[0])
        a = int(node.attrs.get("axis", -1))
        key = x.astype(np.float64) if x.dtype.kind not in "iu" else x.astype(object)
        largest = bool(int(node.attrs.get("largest", 1)))
        if largest and x.dtype.kind not in "iu":
            order = np.lexsort((-key, ~np.isnan(key)), axis=a)
        else:
            order = np.argsort(-key if largest else key, axis=a, kind="stable")
        idx = np.take(order, range(k), axis=a).astype(np.int64)
        return [np.take_along_axis(x, idx, a), idx]


@op("NonZero")
class NonZero(Op):
    """X to [rank, n] i64: coordinates of the elements that are not 0, in row-major order."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        return [TensorType.of(i64, (max(x.rank, 1), tail_symbol(node)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        x_ = must(ins, 0)
        x, size = flat(x_), product(x_.shape)
        rank = max(x_.rank, 1)
        y = flat(outs[0], size * rank)
        count, pos = Buffer("count", i64, (const(1),), "param"), Reg("pos")
        zero = const(0, x.dtype)

        def found(i: Expr) -> Stmt:
            out, rest = [], i
            for d in range(rank - 1, -1, -1):
                c = rest % x_.shape[d] if d and x_.rank else rest
                out.append(put(y, cast(get(count, 0), index) * d + pos(), c))
                rest = rest // x_.shape[d] if d else rest
            return If(get(x, i).ne(zero), block(*out, pos.add()))

        body = block(
            put(count, 0, 0),
            for_("i", size, lambda i: If(get(x, i).ne(zero), put(count, 0, get(count, 0) + 1))),
            pos.set(0),
            for_("i", size, found),
        )
        n = outs[0].shape[1]
        return kernel(node, ins, outs, [count], with_regs([pos], body), {n: ("count", 0)}, {outs[0].name: (const(rank), size)})

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        return [np.array(np.nonzero(x.reshape(-1) if x.ndim == 0 else x), np.int64)]


@op("Compress")
class Compress(Op):
    """(X, condition): the slices along ``axis`` (elements of the flattened X without it) whose condition is true."""

    def geometry(self, node: Node, shape: Sequence[Expr]) -> tuple[Expr, Expr, Expr, int | None]:
        a = node.attrs.get("axis")
        if a is None:
            return const(1), product(shape), const(1), None
        a = check_axis(node, int(a), len(shape))
        return (*slices(shape, a), a)

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, c = need(node, 0), need(node, 1)
        if c.rank != 1:
            raise shape_error(node, "the condition must be a vector")
        known = known_array(c)
        n = tail_symbol(node) if known is None else const(int(known.sum()))
        *_, a = self.geometry(node, x.shape)
        return [TensorType.of(x.dtype, (n,) if a is None else tuple(n if d == a else s for d, s in enumerate(x.shape)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        x_, c = must(ins, 0), flat(must(ins, 1))
        outer, n, inner, a = self.geometry(node, x_.shape)
        m = outs[0].shape[a or 0]
        top = minimum(n, c.shape[0])
        cap = {outs[0].name: tuple(top if d == (a or 0) else s for d, s in enumerate(outs[0].shape))} if m.op == "var" else {}
        x, y = flat(x_), flat(outs[0], product(cap[outs[0].name]) if cap else None)
        count, pos = Buffer("count", i64, (const(1),), "param"), Reg("pos")
        total = cast(get(count, 0), index)

        def copy(j: Expr) -> Stmt:
            move = for_("o", outer, lambda o: for_("i", inner, lambda i: put(y, (o * total + pos()) * inner + i, get(x, (o * n + j) * inner + i))))
            return If(get(c, j), block(move, pos.add()))

        body = block(
            put(count, 0, 0),
            for_("j", top, lambda j: If(get(c, j), put(count, 0, get(count, 0) + 1))),
            pos.set(0),
            for_("j", top, copy),
        )
        return kernel(node, ins, outs, [count], with_regs([pos], body), {m: ("count", 0)} if cap else {}, cap)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, c = np.asarray(arrays[0]), np.asarray(arrays[1]).astype(bool)
        a = node.attrs.get("axis")
        return [np.compress(c, x, None if a is None else int(a))]


@op("Unique")
class Unique(Op):
    """X to (Y, indices, inverse_indices, counts): distinct elements, or slices along ``axis``, sorted or by first occurrence.

    All NaN are one element, the largest, as in numpy."""

    def axis(self, node: Node) -> int | None:
        a = node.attrs.get("axis")
        return None if a is None else check_axis(node, int(a), need(node, 0).rank)

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, a, m = need(node, 0), self.axis(node), tail_symbol(node)
        n = product(x.shape) if a is None else x.shape[a]
        y = (m,) if a is None else tuple(m if d == a else s for d, s in enumerate(x.shape))
        return [TensorType.of(x.dtype, y), TensorType.of(i64, (m,)), TensorType.of(i64, (n,)), TensorType.of(i64, (m,))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        x_, a = must(ins, 0), self.axis(node)
        if x_.dtype.name == "str":
            raise unsupported(node, "strings are not supported")
        outer, n, inner = (const(1), product(x_.shape), const(1)) if a is None else slices(x_.shape, a)
        m_ = outs[0].shape[a or 0]
        caps = {b.name: tuple(n if s is m_ else s for s in b.shape) for b in outs if m_ in b.shape}
        x = flat(x_)
        o = {k: flat(b, product(caps[b.name]) if b.name in caps else None) for k, b in enumerate(outs)}
        by, group, first, rank = (Buffer(k, i64, (n,), "param") for k in ("order", "group", "first", "rank"))
        count = Buffer("count", i64, (const(1),), "param")
        cmp, e, m = Reg("cmp"), Reg("e"), Reg("m")
        length = outer * inner

        def compare(p: Expr, q: Expr) -> Stmt:
            """cmp = -1, 0, 1 as item p stands before, at or behind item q."""
            pos = (e() // inner, e() % inner)
            u, v = (get(x, (pos[0] * n + cast(i, index)) * inner + pos[1]) for i in (p, q))
            step = block(If(before(u, v), cmp.set(-1), If(before(v, u), cmp.set(1))), e.add())
            return block(cmp.set(0), e.set(0), While(land(cmp().eq(0), e() < length), step))

        h = _ItemHeap(by, compare, cmp)
        sort = block(for_("j", n, lambda j: h.push(j, cast(j, i64))), h.sort(n))

        def number(j: Expr) -> Stmt:
            """Groups of equal items in sorted order; the first of a group has the least position."""
            new = block(put(first, m(), get(by, j)), m.add())
            start = If(const(0) < j, block(compare(get(by, j - 1), get(by, j)), If(cmp().ne(0), new)), new)
            return block(start, put(group, cast(get(by, j), index), m() - 1))

        sorted_ = bool(int(node.attrs.get("sorted", 1)))
        seen = e  # free again after the comparisons

        def by_rank(j: Expr) -> Stmt:
            return put(rank, j, j)

        def by_first(j: Expr) -> Stmt:
            g = cast(get(group, j), index)
            return If(get(first, g).eq(cast(j, i64)), block(put(rank, g, seen()), seen.add()))

        ranks = for_("j", n, by_rank) if sorted_ else block(seen.set(0), for_("j", n, by_first))
        total = cast(get(count, 0), index)

        def emit(g: Expr) -> Stmt:
            u, f = cast(get(rank, g), index), cast(get(first, g), index)
            out = [for_("p", outer, lambda p: for_("i", inner, lambda i: put(o[0], (p * total + u) * inner + i, get(x, (p * n + f) * inner + i))))]
            if 1 in o:
                out.append(put(o[1], u, get(first, g)))
            if 3 in o:
                out.append(put(o[3], u, 0))
            return block(*out)

        def tally(j: Expr) -> Stmt:
            u = cast(get(rank, cast(get(group, j), index)), index)
            out = [put(o[2], j, u)] if 2 in o else []
            if 3 in o:
                out.append(put(o[3], u, get(o[3], u) + 1))
            return block(*out)

        body = block(sort, m.set(0), for_("j", n, number), put(count, 0, m()), ranks, for_("g", total, emit), for_("j", n, tally) if len(outs) > 2 else None)
        return kernel(node, ins, outs, [by, group, first, rank, count], with_regs([cmp, e, m, *h.regs], body), {m_: ("count", 0)}, caps)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, a = np.asarray(arrays[0]), self.axis(node)
        ranks = np.unique(x, return_inverse=True)[1].reshape(x.shape)  # one rank for all NaN, along an axis too
        y, idx, inv, cnt = np.unique(ranks, True, True, True, axis=a)
        y = np.take(x.reshape(-1) if a is None else x, idx, a or 0)
        inv = inv.reshape(-1)
        if not int(node.attrs.get("sorted", 1)):
            order = np.argsort(idx, kind="stable")
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            y, idx, cnt, inv = np.take(y, order, a or 0), idx[order], cnt[order], back[inv]
        return [y.astype(x.dtype), *(v.astype(np.int64) for v in (idx, inv, cnt))]


class _ItemHeap:
    """Heap sort of item numbers whose comparison takes statements (``compare`` leaves its result in ``cmp``)."""

    def __init__(self, by: Buffer, compare: Any, cmp: Reg) -> None:
        self.by, self.compare, self.cmp = by, compare, cmp
        self.p, self.c, self.go = Reg("hp"), Reg("hc"), Reg("hgo", boolean)
        self.held, self.top = Reg("held", i64), Reg("top", i64)

    @property
    def regs(self) -> list[Reg]:
        return [self.p, self.c, self.go, self.held, self.top]

    def _behind(self, p: Expr, q: Expr) -> Expr:
        """After compare(p, q): p comes after q."""
        return lor(const(0) < self.cmp(), land(self.cmp().eq(0), q < p))

    def push(self, n: Expr, item: Expr) -> Stmt:
        p, c = self.p, self.c
        parent = get(self.by, c())
        move = block(put(self.by, p(), parent), p.set(c()))
        climb = block(c.set((p() - 1) // 2), self.compare(self.held(), parent), If(self._behind(self.held(), parent), move, self.go.set(const(False, boolean))))
        return block(self.held.set(item), p.set(n), self.go.set(const(True, boolean)), While(land(self.go(), const(0) < p()), climb), put(self.by, p(), self.held()))

    def sort(self, n: Expr) -> Stmt:
        p, c, by = self.p, self.c, self.by

        def step(r: Expr) -> Stmt:
            m = n - 1 - r
            left, right = get(by, c()), get(by, c() + 1)
            move = block(put(by, p(), left), p.set(c()))
            sink = block(
                c.set(p() * 2 + 1),
                If(c() + 1 < m, block(self.compare(right, left), If(self._behind(right, left), c.add(1)))),
                self.compare(left, self.held()),
                If(self._behind(left, self.held()), move, self.go.set(const(False, boolean))),
            )
            return block(
                self.top.set(get(by, 0)), self.held.set(get(by, m)), p.set(0), self.go.set(const(True, boolean)),
                While(land(self.go(), p() * 2 + 1 < m), sink), put(by, p(), self.held()), put(by, m, self.top()),
            )

        return for_("r", n - 1, step)


__all__ = ["slices"]
