"""Factorisations of matrices, each a kernel in loop IR over the matrices of a batch.

LU, Cholesky, QR, triangular solves, symmetric eigenvalues, singular values.

Conventions of LAPACK: LU with partial pivoting and 1-based pivots, QR as Householder vectors below R with their factors. Symmetric
eigenvalues by cyclic Jacobi rotations, singular values by one-sided ones (Hestenes); source: Golub and Van Loan, Matrix Computations,
4th edition, 3.4, 4.2, 5.2, 8.5, 8.6. Sums in the type of the operand, f32 for narrower floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, boolean, i32, i64, index
from luthier.ir.expr import Expr, as_expr, cast, const, land, minimum, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer, If, Stmt, While, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, differ, must, need, product, shape_error, type_error, wide
from luthier.ir.ops.kernels import Reg, flat, for_, get, kernel, put, with_regs

SWEEPS = 30  # of rotations: convergence is quadratic, six to ten are what matrices need


class Matrix:
    """Element (i, j) of a row-major matrix in a flat buffer, ``base`` elements from its start."""

    def __init__(self, buf: Buffer, columns: Any, base: Any = 0) -> None:
        self.buf, self.columns, self.base = buf, as_expr(columns), as_expr(base)

    def __call__(self, i: Any, j: Any) -> Expr:
        return get(self.buf, self.base + as_expr(i) * self.columns + as_expr(j))

    def set(self, i: Any, j: Any, v: Any) -> Stmt:
        return put(self.buf, self.base + as_expr(i) * self.columns + as_expr(j), v)


def total(n: Any, term: Callable[[Expr], Expr], d: DType, use: Callable[[Expr], Stmt], lo: Any = 0, start: Expr | None = None) -> Stmt:
    """``use`` of ``start`` plus the sum of ``term(k)``."""
    acc = Reg("acc", d)
    body = block(acc.set(const(0.0, d) if start is None else start), for_("t", n, lambda k: acc.add(term(k)), lo=lo), use(acc()))
    return with_regs([acc], body)


class Factorization(Op):
    """``square``: takes square matrices only. Subclasses give ``results``, ``one`` (the statements for the matrix ``b``) and ``numpy``."""

    square = False
    workspace: int = 0

    def matrix(self, node: Node) -> tuple[tuple[Expr, ...], Expr, Expr, DType]:
        """Batch dimensions, rows, columns, type of input 0. Raises ShapeError, TypeMismatch."""
        x = need(node, 0)
        if not x.dtype.is_float:
            raise type_error(node, "takes floats")
        if x.rank < 2 or self.square and differ(x.shape[-1], x.shape[-2]):
            raise shape_error(node, f"takes {'square ' if self.square else ''}matrices")
        return x.shape[:-2], x.shape[-2], x.shape[-1], x.dtype

    def infer(self, node: Node) -> Sequence[TensorType]:
        batch, m, n, d = self.matrix(node)
        return [TensorType(t, (*batch, *s)) for t, s in self.results(node, m, n, d)]

    def results(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[tuple[DType, tuple[Expr, ...]]]:
        raise NotImplementedError

    def temps(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[Buffer]:
        return []

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        batch, m, n, d = self.matrix(node)
        temps = self.temps(node, m, n, wide(d))
        params = [flat(must(ins, i)) for i in range(len(ins))]
        results = [flat(o) for o in outs]
        body = for_("b", product(batch), lambda b: self.one(node, b, m, n, wide(d), params, results, temps))
        return kernel(node, ins, outs, temps, body)

    def one(
        self, node: Node, b: Expr, m: Expr, n: Expr, d: DType, ins: Sequence[Buffer], outs: Sequence[Buffer], temps: Sequence[Buffer],
    ) -> Stmt:
        raise NotImplementedError

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        xs = [np.asarray(a) for a in arrays]
        lead = xs[0].shape[:-2]
        d = xs[0].dtype
        flats = [x.reshape(-1, *x.shape[len(lead) :]).astype(np.float64) for x in xs]
        each = [self.numpy(node, *(f[k] for f in flats)) for k in range(len(flats[0]))]
        kinds = [o.type for o in node.outputs]
        if not each:
            shapes = [[int(s.attr) for s in t.shape] for t in kinds]
            return [np.empty(s, d) for s in shapes]
        return [np.stack(r).reshape((*lead, *r[0].shape)).astype(d if t.dtype.is_float else np.int32) for r, t in zip(zip(*each, strict=True), kinds, strict=True)]

    def numpy(self, node: Node, *matrices: Array) -> Sequence[Array]:
        raise NotImplementedError


def copied(a: Matrix, x: Matrix, m: Expr, n: Expr, d: DType) -> Stmt:
    return for_("i", m, lambda i: for_("j", n, lambda j: a.set(i, j, cast(x(i, j), d))))


@op("luthier::LU")
class LU(Factorization):
    """A [.., m, n] to (L below U [.., m, n], pivots i32 [.., min(m, n)] from 1, i32 [..]: the first column without a pivot, or 0)."""

    def results(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[tuple[DType, tuple[Expr, ...]]]:
        return [(d, (m, n)), (i32, (minimum(m, n),)), (i32, ())]

    def temps(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[Buffer]:
        return [Buffer("work", d, (m * n,), "param")]

    def one(
        self, node: Node, b: Expr, m: Expr, n: Expr, d: DType, ins: Sequence[Buffer], outs: Sequence[Buffer], temps: Sequence[Buffer],
    ) -> Stmt:
        a, x, y = Matrix(temps[0], n), Matrix(ins[0], n, b * m * n), Matrix(outs[0], n, b * m * n)
        r = minimum(m, n)
        best, old, info = Reg("best", index), Reg("old", d), Reg("info", i32)

        def column(k: Expr) -> Stmt:
            find = for_("i", m, lambda i: If(unary("abs", a(best(), k)) < unary("abs", a(i, k)), best.set(i)), lo=k + 1)
            swap = for_("j", n, lambda j: block(old.set(a(k, j)), a.set(k, j, a(best(), j)), a.set(best(), j, old())))

            def below(i: Expr) -> Stmt:
                f = Reg("f", d)
                rest = for_("j", n, lambda j: a.set(i, j, a(i, j) - f() * a(k, j)), lo=k + 1)
                return with_regs([f], block(f.set(a(i, k) / a(k, k)), a.set(i, k, f()), rest))

            empty = If(info().eq(0), info.set(cast(k + 1, i32)))
            return block(
                best.set(k), find, put(outs[1], b * r + k, cast(best() + 1, i32)), If(best().ne(k), swap),
                If(a(k, k).ne(0.0), for_("i", m, below, lo=k + 1), empty),
            )  # fmt: skip

        body = block(copied(a, x, m, n, d), info.set(0), for_("k", r, column), put(outs[2], b, info()), copied(y, a, m, n, y.buf.dtype))
        return with_regs([best, old, info], body)

    def numpy(self, node: Node, *matrices: Array) -> Sequence[Array]:
        a = matrices[0].copy()
        m, n = a.shape
        pivots, info = np.zeros(min(m, n)), 0
        for k in range(min(m, n)):
            p = k + int(np.argmax(np.abs(a[k:, k])))
            pivots[k] = p + 1
            a[[k, p]] = a[[p, k]]
            if a[k, k] == 0:
                info = info or k + 1
                continue
            a[k + 1 :, k] /= a[k, k]
            a[k + 1 :, k + 1 :] -= np.outer(a[k + 1 :, k], a[k, k + 1 :])
        return a, pivots, np.array(info)


@op("luthier::PivotsToPermutation")
class PivotsToPermutation(Op):
    """(pivots i32 [.., k] from 1) to the order i64 [.., rows] that they bring rows into; rows of input 1."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        p, like = need(node, 0), need(node, 1)
        return [TensorType(i64, (*p.shape[:-1], like.shape[-2]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        p, like = need(node, 0), need(node, 1)
        k, m = p.shape[-1], like.shape[-2]
        src, y = flat(must(ins, 0)), flat(outs[0])
        old, at = Reg("old", i64), Reg("at", index)

        def one(b: Expr) -> Stmt:
            def swap(i: Expr) -> Stmt:
                return block(at.set(cast(get(src, b * k + i), index) - 1), old.set(get(y, b * m + i)), put(y, b * m + i, get(y, b * m + at())), put(y, b * m + at(), old()))

            return block(for_("i", m, lambda i: put(y, b * m + i, cast(i, i64))), for_("i", k, swap))

        return kernel(node, [ins[0]], outs, [], with_regs([old, at], for_("b", product(p.shape[:-1]), one)))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        p, m = np.asarray(arrays[0]), arrays[1].shape[-2]
        rows = np.broadcast_to(np.arange(m), (*p.shape[:-1], m)).copy().reshape(-1, m)
        for line, pivots in zip(rows, p.reshape(-1, p.shape[-1]), strict=True):
            for i, at in enumerate(pivots):
                line[[i, at - 1]] = line[[at - 1, i]]
        return [rows.reshape(*p.shape[:-1], m)]


@op("luthier::TriangularSolve")
class TriangularSolve(Factorization):
    """(A [.., n, n], B [.., n, k]) to X with A X = B; ``upper``: which triangle of A counts, ``unit``: ones are its diagonal."""

    square = True

    def results(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[tuple[DType, tuple[Expr, ...]]]:
        rhs = need(node, 1)
        if rhs.rank != need(node, 0).rank or differ(rhs.shape[-2], n) or rhs.dtype is not d:
            raise shape_error(node, "the right-hand side is no matrix of as many rows and that type")
        return [(d, (n, rhs.shape[-1]))]

    def one(
        self, node: Node, b: Expr, m: Expr, n: Expr, d: DType, ins: Sequence[Buffer], outs: Sequence[Buffer], temps: Sequence[Buffer],
    ) -> Stmt:
        k = need(node, 1).shape[-1]
        a, rhs, x = Matrix(ins[0], n, b * n * n), Matrix(ins[1], k, b * n * k), Matrix(outs[0], k, b * n * k)
        upper, unit = bool(node.attrs.get("upper", 0)), bool(node.attrs.get("unit", 0))

        def row(step: Expr) -> Stmt:
            i = n - 1 - step if upper else step

            def column(j: Expr) -> Stmt:
                def use(s: Expr) -> Stmt:
                    return x.set(i, j, s if unit else s / cast(a(i, i), d))

                lo, hi = (i + 1, n) if upper else (as_expr(0), i)
                return total(hi, lambda t: -cast(a(i, t), d) * cast(x(t, j), d), d, use, lo=lo, start=cast(rhs(i, j), d))

            return for_("j", k, column)

        return for_("s", n, row)

    def numpy(self, node: Node, *matrices: Array) -> Sequence[Array]:
        a, rhs = matrices
        t = np.triu(a) if node.attrs.get("upper", 0) else np.tril(a)
        if node.attrs.get("unit", 0):
            np.fill_diagonal(t, 1)
        return (np.linalg.solve(t, rhs),)


@op("luthier::Cholesky")
class Cholesky(Factorization):
    """A [.., n, n], of which the lower triangle counts, to (L [.., n, n], i32 [..]: the first order that is not positive definite, or 0)."""

    square = True

    def results(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[tuple[DType, tuple[Expr, ...]]]:
        return [(d, (n, n)), (i32, ())]

    def one(
        self, node: Node, b: Expr, m: Expr, n: Expr, d: DType, ins: Sequence[Buffer], outs: Sequence[Buffer], temps: Sequence[Buffer],
    ) -> Stmt:
        x, y, info = Matrix(ins[0], n, b * n * n), Matrix(outs[0], n, b * n * n), Reg("info", i32)

        def column(k: Expr) -> Stmt:
            def below(i: Expr) -> Stmt:
                return total(k, lambda t: -cast(y(i, t) * y(k, t), d), d, lambda s: y.set(i, k, s / cast(y(k, k), d)), start=cast(x(i, k), d))

            def diagonal(s: Expr) -> Stmt:
                return block(If(land(s <= const(0.0, d), info().eq(0)), info.set(cast(k + 1, i32))), y.set(k, k, unary("sqrt", s)))

            head = total(k, lambda t: -cast(y(k, t) * y(k, t), d), d, diagonal, start=cast(x(k, k), d))
            return block(head, for_("i", n, below, lo=k + 1))

        clear = for_("i", n, lambda i: for_("j", n, lambda j: y.set(i, j, const(0.0, y.buf.dtype))))
        return with_regs([info], block(clear, info.set(0), for_("k", n, column), put(outs[1], b, info())))

    def numpy(self, node: Node, *matrices: Array) -> Sequence[Array]:
        low = np.tril(matrices[0])
        return np.linalg.cholesky(low + np.tril(low, -1).T), np.array(0)


@op("luthier::QR")
class QR(Factorization):
    """A [.., m, n] to (R and below it the Householder vectors [.., m, n], their factors [.., min(m, n)])."""

    def results(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[tuple[DType, tuple[Expr, ...]]]:
        return [(d, (m, n)), (d, (minimum(m, n),))]

    def one(
        self, node: Node, b: Expr, m: Expr, n: Expr, d: DType, ins: Sequence[Buffer], outs: Sequence[Buffer], temps: Sequence[Buffer],
    ) -> Stmt:
        x, a, r = Matrix(ins[0], n, b * m * n), Matrix(outs[0], n, b * m * n), minimum(m, n)
        beta, tau, f = Reg("beta", d), Reg("tau", d), Reg("f", d)
        zero, one = const(0.0, d), const(1.0, d)

        def column(k: Expr) -> Stmt:
            def alpha() -> Expr:
                return cast(a(k, k), d)

            def reflect(s: Expr) -> Stmt:
                size = unary("sqrt", alpha() * alpha() + s)
                some = block(
                    beta.set(select(alpha() < zero, size, -size)), tau.set((beta() - alpha()) / beta()), f.set(one / (alpha() - beta())),
                    for_("i", m, lambda i: a.set(i, k, cast(a(i, k), d) * f()), lo=k + 1), a.set(k, k, beta()),
                )  # fmt: skip
                return If(s.eq(0.0), tau.set(zero), some)

            def apply(j: Expr) -> Stmt:
                def subtract(s: Expr) -> Stmt:
                    rest = for_("i", m, lambda i: a.set(i, j, cast(a(i, j), d) - f() * cast(a(i, k), d)), lo=k + 1)
                    return block(f.set(s * tau()), a.set(k, j, cast(a(k, j), d) - f()), rest)

                return total(m, lambda t: cast(a(t, k), d) * cast(a(t, j), d), d, subtract, lo=k + 1, start=cast(a(k, j), d))

            head = total(m, lambda t: cast(a(t, k), d) * cast(a(t, k), d), d, reflect, lo=k + 1)
            return block(head, put(outs[1], b * r + k, tau()), for_("j", n, apply, lo=k + 1))

        return with_regs([beta, tau, f], block(copied(a, x, m, n, a.buf.dtype), for_("k", r, column)))

    def numpy(self, node: Node, *matrices: Array) -> Sequence[Array]:
        h, tau = np.linalg.qr(matrices[0], mode="raw")
        return h.T, tau


@op("luthier::HouseholderProduct")
class HouseholderProduct(Factorization):
    """(vectors below the diagonal [.., m, n], factors [.., k]) to the first n columns of the product of their reflections [.., m, n]."""

    def results(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[tuple[DType, tuple[Expr, ...]]]:
        return [(d, (m, n))]

    def one(
        self, node: Node, b: Expr, m: Expr, n: Expr, d: DType, ins: Sequence[Buffer], outs: Sequence[Buffer], temps: Sequence[Buffer],
    ) -> Stmt:
        k = need(node, 1).shape[-1]
        a, q, f = Matrix(ins[0], n, b * m * n), Matrix(outs[0], n, b * m * n), Reg("f", d)

        def reflection(step: Expr) -> Stmt:
            r = k - 1 - step

            def column(j: Expr) -> Stmt:
                def subtract(s: Expr) -> Stmt:
                    rest = for_("i", m, lambda i: q.set(i, j, cast(q(i, j), d) - f() * cast(a(i, r), d)), lo=r + 1)
                    return block(f.set(s * cast(get(ins[1], b * k + r), d)), q.set(r, j, cast(q(r, j), d) - f()), rest)

                return total(m, lambda t: cast(a(t, r), d) * cast(q(t, j), d), d, subtract, lo=r + 1, start=cast(q(r, j), d))

            return for_("j", n, column)

        unit = for_("i", m, lambda i: for_("j", n, lambda j: q.set(i, j, select(i.eq(j), const(1.0, d), const(0.0, d)))))
        return with_regs([f], block(unit, for_("s", k, reflection)))

    def numpy(self, node: Node, *matrices: Array) -> Sequence[Array]:
        a, tau = matrices
        m, n = a.shape
        q = np.eye(m, n)
        for r in reversed(range(len(tau))):
            v = np.concatenate([np.zeros(r), [1.0], a[r + 1 :, r]])
            q -= tau[r] * np.outer(v, v @ q)
        return (q,)


def rotation(d: DType, app: Expr, aqq: Expr, apq: Expr, c: Reg, s: Reg, t: Reg) -> Stmt:
    """Cosine and sine that annul ``apq`` of the symmetric pair (8.5.2); t: their tangent, of the smaller angle."""
    one = const(1.0, d)
    theta = (aqq - app) / (apq + apq)
    size = one / (unary("abs", theta) + unary("sqrt", theta * theta + one))
    return block(t.set(select(theta < const(0.0, d), -size, size)), c.set(one / unary("sqrt", t() * t() + one)), s.set(t() * c()))


def _order(values: Buffer, base: Expr, n: Expr, d: DType, swap: Callable[[Expr, Expr], Stmt], ascending: bool) -> Stmt:
    """Selection sort of ``values``; ``swap(i, j)`` exchanges what belongs to them."""
    best, old = Reg("best", index), Reg("held", d)

    def place(i: Expr) -> Stmt:
        def better(j: Expr) -> Expr:
            a, b = get(values, base + j), get(values, base + best())
            return a < b if ascending else b < a

        exchange = block(
            old.set(cast(get(values, base + i), d)), put(values, base + i, get(values, base + best())), put(values, base + best(), old()), swap(i, best()),
        )  # fmt: skip
        return block(best.set(i), for_("j", n, lambda j: If(better(j), best.set(j)), lo=i + 1), If(best().ne(i), exchange))

    return with_regs([best, old], for_("i", n, place))


@op("luthier::Eigh")
class Eigh(Factorization):
    """Symmetric A [.., n, n], of which the lower triangle counts, to (eigenvalues [.., n] ascending, vectors as columns [.., n, n])."""

    square = True

    def results(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[tuple[DType, tuple[Expr, ...]]]:
        return [(d, (n,)), (d, (n, n))]

    def temps(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[Buffer]:
        return [Buffer("work", d, (n * n,), "param")]

    def one(
        self, node: Node, b: Expr, m: Expr, n: Expr, d: DType, ins: Sequence[Buffer], outs: Sequence[Buffer], temps: Sequence[Buffer],
    ) -> Stmt:
        x, a, v = Matrix(ins[0], n, b * n * n), Matrix(temps[0], n), Matrix(outs[1], n, b * n * n)
        c, s, t, p_, q_ = (Reg(r, d) for r in ("c", "s", "t", "first", "second"))
        off, sweep = Reg("off", d), Reg("sweep", index)
        zero = const(0.0, d)

        def turn(at: Callable[[Expr], tuple[tuple[Expr, Expr], tuple[Expr, Expr]]], w: Matrix) -> Stmt:
            def pair(k: Expr) -> Stmt:
                (i0, j0), (i1, j1) = at(k)
                return block(
                    p_.set(cast(w(i0, j0), d)), q_.set(cast(w(i1, j1), d)), w.set(i0, j0, c() * p_() - s() * q_()), w.set(i1, j1, s() * p_() + c() * q_()),
                )  # fmt: skip

            return for_("k", n, pair)

        def rotate(p: Expr, q: Expr) -> Stmt:
            angle = rotation(d, a(p, p), a(q, q), a(p, q), c, s, t)
            both = block(angle, turn(lambda k: ((k, p), (k, q)), a), turn(lambda k: ((p, k), (q, k)), a), turn(lambda k: ((k, p), (k, q)), v))
            return block(off.set(off() + a(p, q) * a(p, q)), If(a(p, q).ne(0.0), both))

        every = for_("p", n, lambda p: for_("q", n, lambda q: rotate(p, q), lo=p + 1))
        fill = for_("i", n, lambda i: for_("j", n, lambda j: block(
            a.set(i, j, cast(select(j <= i, x(i, j), x(j, i)), d)), v.set(i, j, select(i.eq(j), const(1.0, d), zero)))))  # fmt: skip
        go = While(land(sweep() < SWEEPS, off() > zero), block(sweep.add(), off.set(zero), every))
        values = for_("i", n, lambda i: put(outs[0], b * n + i, a(i, i)))

        def swap(i: Expr, j: Expr) -> Stmt:
            return for_("k", n, lambda k: block(p_.set(cast(v(k, i), d)), v.set(k, i, v(k, j)), v.set(k, j, p_())))

        body = block(fill, sweep.set(0), off.set(const(1.0, d)), go, values, _order(outs[0], b * n, n, d, swap, True))
        return with_regs([c, s, t, p_, q_, off, sweep], body)

    def numpy(self, node: Node, *matrices: Array) -> Sequence[Array]:
        return np.linalg.eigh(matrices[0])


@op("luthier::SVD")
class SVD(Factorization):
    """A [.., m, n] with m >= n to (U [.., m, n], singular values [.., n] descending, V [.., n, n]): A = U diag(S) V'."""

    def results(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[tuple[DType, tuple[Expr, ...]]]:
        return [(d, (m, n)), (d, (n,)), (d, (n, n))]

    def temps(self, node: Node, m: Expr, n: Expr, d: DType) -> Sequence[Buffer]:
        return []

    def one(
        self, node: Node, b: Expr, m: Expr, n: Expr, d: DType, ins: Sequence[Buffer], outs: Sequence[Buffer], temps: Sequence[Buffer],
    ) -> Stmt:
        x, u, v = Matrix(ins[0], n, b * m * n), Matrix(outs[0], n, b * m * n), Matrix(outs[2], n, b * n * n)
        c, s, t, p_, q_ = (Reg(r, d) for r in ("c", "s", "t", "first", "second"))
        app, aqq, apq, off, sweep, moved = Reg("app", d), Reg("aqq", d), Reg("apq", d), Reg("off", d), Reg("sweep", index), Reg("moved", boolean)
        zero, one = const(0.0, d), const(1.0, d)
        eps = const(1e-7 if d.bits == 32 else 1e-15, d)

        def turn(w: Matrix, rows: Expr, p: Expr, q: Expr) -> Stmt:
            return for_("k", rows, lambda k: block(
                p_.set(cast(w(k, p), d)), q_.set(cast(w(k, q), d)), w.set(k, p, c() * p_() - s() * q_()), w.set(k, q, s() * p_() + c() * q_())))  # fmt: skip

        def rotate(p: Expr, q: Expr) -> Stmt:
            sums = for_("k", m, lambda k: block(
                app.add(cast(u(k, p), d) * cast(u(k, p), d)), aqq.add(cast(u(k, q), d) * cast(u(k, q), d)), apq.add(cast(u(k, p), d) * cast(u(k, q), d))))  # fmt: skip
            angle = block(moved.set(True), rotation(d, app(), aqq(), apq(), c, s, t), turn(u, m, p, q), turn(v, n, p, q))
            significant = unary("abs", apq()) > eps * unary("sqrt", app() * aqq())
            return block(app.set(zero), aqq.set(zero), apq.set(zero), sums, If(significant, angle))

        every = for_("p", n, lambda p: for_("q", n, lambda q: rotate(p, q), lo=p + 1))
        fill = block(copied(u, x, m, n, u.buf.dtype), for_("i", n, lambda i: for_("j", n, lambda j: v.set(i, j, select(i.eq(j), one, zero)))))
        go = While(land(sweep() < SWEEPS, moved()), block(sweep.add(), moved.set(False), every))

        def norm(j: Expr) -> Stmt:
            def use(sum_: Expr) -> Stmt:
                return block(off.set(unary("sqrt", sum_)), put(outs[1], b * n + j, off()), If(off() > zero, for_("i", m, lambda i: u.set(i, j, cast(u(i, j), d) / off()))))

            return total(m, lambda k: cast(u(k, j), d) * cast(u(k, j), d), d, use)

        def swap(i: Expr, j: Expr) -> Stmt:
            def exchanged(w: Matrix, rows: Expr) -> Stmt:
                return for_("k", rows, lambda k: block(p_.set(cast(w(k, i), d)), w.set(k, i, w(k, j)), w.set(k, j, p_())))

            return block(exchanged(u, m), exchanged(v, n))

        body = block(fill, sweep.set(0), moved.set(True), go, for_("j", n, norm), _order(outs[1], b * n, n, d, swap, False))
        return with_regs([c, s, t, p_, q_, app, aqq, apq, off, sweep, moved], body)

    def numpy(self, node: Node, *matrices: Array) -> Sequence[Array]:
        u, s, vt = np.linalg.svd(matrices[0], full_matrices=False)
        return u, s, vt.T
