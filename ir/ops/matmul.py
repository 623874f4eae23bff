"""Matrix products: MatMul, Gemm, com.microsoft::FusedMatMul, Einsum. Narrow floats accumulate in f32.

Every product is one sum of ``a * b``, so that one schedule template serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, axis, sum_
from luthier.ir.dtypes import DType
from luthier.ir.expr import Expr, const, load
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    Array,
    Shape,
    axes_of,
    bcast_index,
    broadcast,
    broadcast_dim,
    define,
    is_one,
    make,
    must,
    need,
    operand,
    shape_error,
    type_error,
    unsupported,
    widen,
)
from luthier.ir.requirements import assume_equal


def inner_extent(node: Node, a: Expr, b: Expr) -> Expr:
    """The common reduction extent. Raises ShapeError when the two certainly differ."""
    if a.op == "const" and b.op == "const" and a.attr != b.attr:
        raise shape_error(node, f"inner dimensions differ: {a!r} and {b!r}")
    assume_equal(a, b, "the inner dimensions")
    return a if a.op == "const" else b if b.op == "const" else a


def same_number_type(node: Node, *which: int) -> DType:
    types = [need(node, i).dtype for i in which]
    if any(t is not types[0] for t in types) or not (types[0].is_float or types[0].is_int):
        raise type_error(node, "the operands must have one number type")
    return types[0]


def up(a: Any) -> Array:
    """Narrow floats as f64 for a reference sum; everything else as it is."""
    a = np.asarray(a)
    return a if a.dtype.kind in "iub" or a.dtype == np.float64 else a.astype(np.float64)


@op("MatMul")
class MatMul(Op):
    """numpy.matmul: [..., m, k] by [..., k, n], batch dimensions broadcast, vectors on either side."""

    kind = "contraction"

    def shapes(self, node: Node) -> tuple[Shape, Shape]:
        """Shapes of the operands as matrices."""
        return need(node, 0).shape, need(node, 1).shape

    def infer(self, node: Node) -> Sequence[TensorType]:
        t = same_number_type(node, 0, 1)
        a, b = self.shapes(node)
        if not a or not b:
            raise shape_error(node, "MatMul takes no scalars")
        inner_extent(node, a[-1], b[-2] if len(b) > 1 else b[0])
        batch = broadcast(node, a[:-2], b[:-2])
        return [TensorType(t, (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ())))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b, out = must(ins, 0), must(ins, 1), outs[0]
        axes = axes_of(out.shape)
        na, nb = min(a.rank, 2) - 1, min(b.rank, 2) - 1  # output axes that A and B give
        batch = axes[: len(axes) - na - nb]
        k = axis("k0", inner_extent(node, a.shape[-1], b.shape[-2] if b.rank > 1 else b.shape[0]))
        m = [x.var for x in axes[len(batch) : len(batch) + na]]
        n = [x.var for x in axes[len(batch) + na :]]
        x = load(a, (*bcast_index(a.shape[:-2], batch), *m, k.var))
        y = load(b, (*bcast_index(b.shape[:-2], batch), k.var, *n))
        return make(node, ins, outs, [define(out, axes, sum_(k, widen(x) * widen(y)))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a = np.asarray(arrays[0])
        return [np.asarray(np.matmul(up(arrays[0]), up(arrays[1]))).astype(a.dtype)]


@op("com.microsoft::FusedMatMul")
class FusedMatMul(Op):
    """alpha * op(A) op(B); ``transA``/``transB`` swap the last two dimensions."""

    kind = "contraction"

    def matrices(self, node: Node) -> tuple[Shape, Shape]:
        a, b = need(node, 0).shape, need(node, 1).shape
        if len(a) < 2 or len(b) < 2 or int(node.attrs.get("transBatchA", 0)) or int(node.attrs.get("transBatchB", 0)):
            raise unsupported(node, "FusedMatMul takes matrices without transposed batches")
        a = (*a[:-2], a[-1], a[-2]) if int(node.attrs.get("transA", 0)) else a
        b = (*b[:-2], b[-1], b[-2]) if int(node.attrs.get("transB", 0)) else b
        return a, b

    def infer(self, node: Node) -> Sequence[TensorType]:
        t = same_number_type(node, 0, 1)
        a, b = self.matrices(node)
        inner_extent(node, a[-1], b[-2])
        return [TensorType(t, (*broadcast(node, a[:-2], b[:-2]), a[-2], b[-1]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b = must(ins, 0), must(ins, 1)
        sa, sb = self.matrices(node)
        *batch, m, n = axes_of(outs[0].shape)
        k = axis("k0", inner_extent(node, sa[-1], sb[-2]))
        x = load(a, (*bcast_index(a.shape[:-2], batch), *_swap((m.var, k.var), node, "transA")))
        y = load(b, (*bcast_index(b.shape[:-2], batch), *_swap((k.var, n.var), node, "transB")))
        s = sum_(k, widen(x) * widen(y))
        return make(node, ins, outs, [define(outs[0], (*batch, m, n), s * const(float(node.attrs.get("alpha", 1.0)), s.dtype))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, b = (up(x) for x in arrays)
        a = np.swapaxes(a, -1, -2) if int(node.attrs.get("transA", 0)) else a
        b = np.swapaxes(b, -1, -2) if int(node.attrs.get("transB", 0)) else b
        return [(a @ b * float(node.attrs.get("alpha", 1.0))).astype(np.asarray(arrays[0]).dtype)]


def _swap(pair: tuple[Expr, Expr], node: Node, attr: str) -> tuple[Expr, Expr]:
    return (pair[1], pair[0]) if int(node.attrs.get(attr, 0)) else pair


@op("Gemm")
class Gemm(Op):
    """alpha * op(A) op(B) + beta * C for matrices; C broadcasts."""

    kind = "contraction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        t = same_number_type(node, 0, 1)
        a, b = need(node, 0).shape, need(node, 1).shape
        if len(a) != 2 or len(b) != 2:
            raise shape_error(node, "Gemm takes matrices")
        ta, tb = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
        inner_extent(node, a[0] if ta else a[1], b[1] if tb else b[0])
        shape = (a[1] if ta else a[0], b[0] if tb else b[1])
        c = node.input(2)
        if c is not None:
            if c.dtype is not t:
                raise type_error(node, "C has another type than A and B")
            if c.rank > 2 or any(broadcast_dim(s, x) is None or (is_one(s) and not is_one(x) and x.op == "const") for s, x in zip(shape[2 - c.rank :], c.shape, strict=True)):
                raise shape_error(node, "C does not broadcast to the product")
        return [TensorType(t, shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        a, b = must(ins, 0), must(ins, 1)
        m, n = axes_of(outs[0].shape)
        ta, tb = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
        k = axis("k0", inner_extent(node, a.shape[0 if ta else 1], b.shape[1 if tb else 0]))
        e = sum_(k, widen(load(a, _swap((m.var, k.var), node, "transA"))) * widen(load(b, _swap((k.var, n.var), node, "transB"))))
        e = e * const(float(node.attrs.get("alpha", 1.0)), e.dtype)
        beta = float(node.attrs.get("beta", 1.0))
        if node.input(2) is not None and beta != 0:
            c = widen(operand(node, 2, ins, (m, n)))
            e = e + c * const(beta, c.dtype)
        return make(node, ins, outs, [define(outs[0], (m, n), e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a, b = up(arrays[0]), up(arrays[1])
        a = a.T if int(node.attrs.get("transA", 0)) else a
        b = b.T if int(node.attrs.get("transB", 0)) else b
        y = a @ b * np.asarray(node.attrs.get("alpha", 1.0)).astype(a.dtype)
        if len(arrays) > 2 and arrays[2] is not None:
            y = y + up(arrays[2]) * np.asarray(node.attrs.get("beta", 1.0)).astype(a.dtype)
        return [y.astype(np.asarray(arrays[0]).dtype)]


@op("Einsum")
class Einsum(Op):
    """A sum of products by ``equation``; repeated letters in a term take the diagonal, ``...`` broadcasts."""

    kind = "contraction"

    def terms(self, node: Node) -> tuple[list[list[str]], list[str]]:
        """Labels of every dimension of the operands and of the result; ``...`` becomes labels ``.0``, ``.1`` ... from the left."""
        text = str(node.attrs["equation"]).replace(" ", "")
        left, arrow, right = text.partition("->")
        raw = left.split(",")
        if len(raw) != len(node.inputs):
            raise shape_error(node, f"the equation {text!r} has {len(raw)} terms for {len(node.inputs)} inputs")
        spare = [need(node, i).rank - len(t.replace("...", "")) for i, t in enumerate(raw)]
        most = max((s for s, t in zip(spare, raw, strict=True) if "..." in t), default=0)
        terms = []
        for t, s, i in zip(raw, spare, range(len(raw)), strict=True):
            if s < 0 or (s and "..." not in t):
                raise shape_error(node, f"term {t!r} does not fit input {i}")
            dots = [f".{k}" for k in range(most - s, most)]
            head, _, tail = t.partition("...")
            terms.append([*head, *(dots if "..." in t else ()), *tail])
        dots = [f".{k}" for k in range(most)]
        if arrow:
            head, has, tail = right.partition("...")
            out = [*head, *(dots if has else ()), *tail]
        else:
            flat = [c for t in terms for c in t if not c.startswith(".")]
            out = dots + sorted(c for c in set(flat) if flat.count(c) == 1)
        return terms, out

    def extents(self, node: Node) -> dict[str, Expr]:
        ext: dict[str, Expr] = {}
        for i, t in enumerate(self.terms(node)[0]):
            for c, s in zip(t, need(node, i).shape, strict=True):
                d = broadcast_dim(ext[c], s) if c in ext else s
                if d is None:
                    raise shape_error(node, f"label {c!r} stands for extents {ext[c]!r} and {s!r}")
                ext[c] = d
        return ext

    def infer(self, node: Node) -> Sequence[TensorType]:
        t = same_number_type(node, *range(len(node.inputs)))
        ext = self.extents(node)
        out = self.terms(node)[1]
        for c in out:
            if c not in ext:
                raise shape_error(node, f"label {c!r} of the result is in no term")
        return [TensorType(t, tuple(ext[c] for c in out))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        terms, out = self.terms(node)
        ext = self.extents(node)
        axes = axes_of(ext[c] for c in out)
        by: dict[str, Axis] = dict(zip(out, axes, strict=True))
        rest = [c for c in ext if c not in by]
        by |= {c: axis(f"k{k}", ext[c]) for k, c in enumerate(rest)}
        e: Expr | None = None
        for i, t in enumerate(terms):
            b = must(ins, i)
            x = widen(load(b, bcast_index(b.shape, [by[c] for c in t])))
            e = x if e is None else e * x
        assert e is not None
        if rest:
            e = sum_([by[c] for c in rest], e)
        return make(node, ins, outs, [define(outs[0], axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        equation = str(node.attrs["equation"]).replace(" ", "")
        return [np.asarray(np.einsum(equation, *(up(a) for a in arrays))).astype(np.asarray(arrays[0]).dtype)]


