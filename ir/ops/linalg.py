"""Linear algebra: Det, by Gaussian elimination with partial pivoting in a loop IR kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import index
from luthier.ir.expr import Expr, cast, const, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer, If, Stmt, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, differ, must, need, product, shape_error, wide
from luthier.ir.ops.kernels import Reg, flat, for_, get, kernel, put, with_regs


@op("Det")
class Det(Op):
    """X [..., n, n] to [...]: determinants."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if x.rank < 2 or differ(x.shape[-1], x.shape[-2]):
            raise shape_error(node, "Det takes square matrices")
        return [TensorType.of(x.dtype, x.shape[:-2])]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        x_, y = must(ins, 0), flat(outs[0])
        x, n = flat(x_), x_.shape[-1]
        d = wide(x.dtype)
        a = Buffer("a", d, (n * n,), "param")
        det, best = Reg("det", d), Reg("best", index)

        def cell(i: Expr, j: Expr) -> Expr:
            return get(a, i * n + j)

        def column(k: Expr) -> Stmt:
            find = for_("i", n, lambda i: If(unary("abs", cell(best(), k)) < unary("abs", cell(i, k)), best.set(i)), lo=k + 1)
            old = Reg("old", d)
            swap = for_("j", n, lambda j: block(old.set(cell(k, j)), put(a, k * n + j, cell(best(), j)), put(a, best() * n + j, old())))

            def eliminate(i: Expr) -> Stmt:
                f = Reg("f", d)
                return with_regs([f], block(f.set(cell(i, k) / cell(k, k)), for_("j", n, lambda j: put(a, i * n + j, cell(i, j) - f() * cell(k, j)), lo=k)))

            return block(
                best.set(k), find, If(best().ne(k), with_regs([old], block(swap, det.set(-det())))), det.set(det() * cell(k, k)),
                If(cell(k, k).ne(0.0), for_("i", n, eliminate, lo=k + 1)),
            )

        def one(b: Expr) -> Stmt:
            fill = for_("e", n * n, lambda e: put(a, e, cast(get(x, b * n * n + e), d)))
            return block(fill, det.set(const(1.0, d)), for_("k", n, column), put(y, b, det()))

        return kernel(node, ins, outs, [a], with_regs([det, best], for_("b", product(x_.shape[:-2]), one)))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        return [np.asarray(np.linalg.det(x.astype(np.float64))).astype(x.dtype)]
