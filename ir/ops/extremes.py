"""``luthier::Extremes``, ``luthier::PartialExtremes``: what a program must know of index tensors to check them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import i64
from luthier.ir.expr import Expr, bcast, cast, const, maximum, minimum, ramp, vreduce
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer, Stmt, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, ceil_div, must, need, product
from luthier.ir.ops.kernels import Reg, flat, for_, get, kernel, put, with_regs

LANES = 16
CHUNK = 1 << 15  # elements that are worth a task of their own
StoreFn = Callable[[Expr, Expr], Stmt]
WHOLE = (np.iinfo(np.int64).max, np.iinfo(np.int64).min)  # those of no elements


def _ends(x: Buffer, lo: Expr, hi: Expr, store: StoreFn, name: str) -> Stmt:
    """Least and greatest of the elements ``lo .. hi - 1`` of a flat buffer, given to ``store``; those of none are the other end of the type."""
    most, least = (const(v, x.dtype) for v in reversed(x.dtype.limits()))
    a, b = Reg(f"{name}.a", x.dtype), Reg(f"{name}.b", x.dtype)
    av, bv = Reg(f"{name}.av", x.dtype.vec(LANES)), Reg(f"{name}.bv", x.dtype.vec(LANES))
    whole = (hi - lo) // LANES

    def step(k: Expr) -> Stmt:
        v = get(x, ramp(lo + k * LANES, 1, LANES))
        return block(av.set(minimum(av(), v)), bv.set(maximum(bv(), v)))

    def last(k: Expr) -> Stmt:
        return block(a.set(minimum(a(), get(x, k))), b.set(maximum(b(), get(x, k))))

    vectors = block(av.set(bcast(most, LANES)), bv.set(bcast(least, LANES)), for_("k", whole, step), a.set(vreduce("min", av())), b.set(vreduce("max", bv())))
    return with_regs([a, b, av, bv], block(vectors, for_("k", hi, last, lo=lo + whole * LANES), store(a(), b())))


def _column(x: Buffer, size: Expr, columns: int, c: int, store: StoreFn, name: str) -> Stmt:
    """The same of every ``columns``-th element from ``c`` on."""
    lo, hi = Reg(f"{name}.a", x.dtype), Reg(f"{name}.b", x.dtype)

    def step(k: Expr) -> Stmt:
        v = get(x, k * columns + c)
        return block(lo.set(minimum(lo(), v)), hi.set(maximum(hi(), v)))

    least, most = x.dtype.limits()
    return with_regs([lo, hi], block(lo.set(most), hi.set(least), for_("k", size // columns, step), store(lo(), hi())))


def _into(out: Buffer, place: int, distance: int, bits: int) -> StoreFn:
    """Both ends at ``place`` and ``distance`` behind it, as close as ``bits`` come to them."""
    end = (1 << (bits - 1)) - 1

    def saturated(e: Expr) -> Expr:
        return cast(e, i64) if e.dtype.bits <= bits else maximum(minimum(cast(e, i64), const(end, i64)), const(-end, i64))

    return lambda lo, hi: block(put(out, place, saturated(lo)), put(out, place + distance, saturated(hi)))


@op("luthier::Extremes")
class Extremes(Op):
    """Least and greatest element of every input, i64, one after the other: of all elements, or where ``columns`` is not 0, of each of so many
    places along the last axis (all least ones first). ``bits``: of the integers that read them; beyond, they saturate."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [TensorType.of(i64, (sum(2 * max(k, 1) for k in node.attrs["columns"]),))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        bits, body, place = int(node.attrs["bits"]), [], 0
        for i, columns in enumerate(node.attrs["columns"]):
            b = must(ins, i)
            x, size, n = flat(b), product(b.shape), max(columns, 1)
            if not columns:
                body.append(_ends(x, const(0), size, _into(outs[0], place, n, bits), f"x{i}"))
            for c in range(columns):
                body.append(_column(x, size, columns, c, _into(outs[0], place + c, n, bits), f"x{i}.{c}"))
            place += 2 * n
        return kernel(node, ins, outs, (), block(*body))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        found = []
        for a, k in zip(arrays, node.attrs["columns"], strict=True):
            rows = np.asarray(a).astype(np.int64).reshape(-1, k or 1)
            found += [np.min(rows, axis=0, initial=WHOLE[0]), np.max(rows, axis=0, initial=WHOLE[1])]
        return [np.concatenate(found)]


@op("luthier::PartialExtremes")
class PartialExtremes(Op):
    """X to [parts, 2]: least and greatest element of every part of X, for threads to share."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        return [TensorType.of(x.dtype, (ceil_div(product(x.shape), CHUNK), 2))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        x, size = flat(must(ins, 0)), product(must(ins, 0).shape)

        def part(c: Expr) -> Stmt:
            lo = c * CHUNK
            return _ends(x, lo, minimum(lo + CHUNK, size), lambda a, b: block(put(flat(outs[0]), c * 2, a), put(flat(outs[0]), c * 2 + 1, b)), "x")

        return kernel(node, ins, outs, (), for_("c", ceil_div(size, CHUNK), part, kind="parallel"))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0]).reshape(-1)
        return [np.array([[p.min(), p.max()] for p in (x[i : i + CHUNK] for i in range(0, x.size, CHUNK))], x.dtype).reshape(-1, 2)]
