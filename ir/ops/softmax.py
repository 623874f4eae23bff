"""Softmax, LogSoftmax, Hardmax along one axis. Computed in f32 (f64 stays)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, LetStmt, axis, reduce_
from luthier.ir.dtypes import i64
from luthier.ir.expr import Expr, cast, const, load, proj, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import Array, axes_of, check_axis, define, make, must, need, temp, type_error, widen


class AlongAxis(Op):
    kind = "reduction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        check_axis(node, node.attrs.get("axis", -1), x.rank)
        if not x.dtype.is_float:
            raise type_error(node, f"{node.op} takes floats")
        return [x.type]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        a = check_axis(node, node.attrs.get("axis", -1), max(x.rank, 1))
        axes = axes_of(out.shape)
        if not axes:
            return make(node, ins, outs, [define(out, axes, const(0.0 if node.op == "LogSoftmax" else 1.0, out.dtype))])
        rows = [ax for k, ax in enumerate(axes) if k != a]
        k = axis("k0", axes[a].extent)
        inner = widen(load(x, [k.var if i == a else ax.var for i, ax in enumerate(axes)]))
        here = widen(load(x, [ax.var for ax in axes]))
        return make(node, ins, outs, self.lets(out, axes, rows, a, k, here, inner))

    def lets(self, out: Buffer, axes: Sequence[Axis], rows: Sequence[Axis], a: int, k: Axis, here: Expr, inner: Expr) -> list[LetStmt]:
        raise NotImplementedError


def shifted(out: Buffer, rows: Sequence[Axis], k: Axis, inner: Expr) -> tuple[LetStmt, Expr]:
    top = temp(out, "max", rows, reduce_("max", (k,), inner))
    return top, load(top.buf, [r.var for r in rows])


@op("Softmax")
class Softmax(AlongAxis):
    """exp(x - max) / sum(exp(x - max))."""

    def lets(self, out: Buffer, axes: Sequence[Axis], rows: Sequence[Axis], a: int, k: Axis, here: Expr, inner: Expr) -> list[LetStmt]:
        top, m = shifted(out, rows, k, inner)
        e = temp(out, "exp", axes, unary("exp", here - m))
        total = temp(out, "sum", rows, reduce_("sum", (k,), load(e.buf, [k.var if i == a else ax.var for i, ax in enumerate(axes)])))
        y = load(e.buf, [ax.var for ax in axes]) / load(total.buf, [r.var for r in rows])
        return [top, e, total, define(out, axes, y)]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        a = int(node.attrs.get("axis", -1))
        if not x.ndim:
            return [np.ones_like(x)]
        y = x.astype(np.float64)
        e = np.exp(y - y.max(a, keepdims=True)) if y.size else y
        return [(e / e.sum(a, keepdims=True)).astype(x.dtype)]


@op("LogSoftmax")
class LogSoftmax(AlongAxis):
    """x - max - log(sum(exp(x - max)))."""

    def lets(self, out: Buffer, axes: Sequence[Axis], rows: Sequence[Axis], a: int, k: Axis, here: Expr, inner: Expr) -> list[LetStmt]:
        top, m = shifted(out, rows, k, inner)
        total = temp(out, "sum", rows, reduce_("sum", (k,), unary("exp", inner - m)))
        shift = temp(out, "log", rows, unary("log", load(total.buf, [r.var for r in rows])) + m)
        return [top, total, shift, define(out, axes, here - load(shift.buf, [r.var for r in rows]))]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        a = int(node.attrs.get("axis", -1))
        if not x.ndim:
            return [np.zeros_like(x)]
        y = x.astype(np.float64)
        if y.size:
            y = y - y.max(a, keepdims=True)
        return [(y - np.log(np.exp(y).sum(a, keepdims=True))).astype(x.dtype)]


@op("Hardmax")
class Hardmax(AlongAxis):
    """1 at the first largest element, 0 elsewhere."""

    def lets(self, out: Buffer, axes: Sequence[Axis], rows: Sequence[Axis], a: int, k: Axis, here: Expr, inner: Expr) -> list[LetStmt]:
        best = temp(out, "arg", rows, proj(reduce_("argmax", (k,), inner, cast(k.var, i64)), 1, i64))
        hit = load(best.buf, [r.var for r in rows]).eq(cast(axes[a].var, i64))
        return [best, define(out, axes, select(hit, const(1, out.dtype), const(0, out.dtype)))]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        if not x.ndim:
            return [np.ones_like(x)]
        a = int(node.attrs.get("axis", -1)) % x.ndim
        j = np.expand_dims(x.argmax(a), a)
        return [(j == np.arange(x.shape[a]).reshape([-1 if k == a else 1 for k in range(x.ndim)])).astype(x.dtype)]
