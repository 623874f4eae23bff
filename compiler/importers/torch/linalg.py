"""Rules of factorisations of matrices, and what torch computes by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from luthier.importers.torch.emitter import Emitter, aten, decomposed
from luthier.importers.torch.shapes import eye_of
from luthier.ir import dtypes as D
from luthier.ir.graph import Value

Tensor = torch.Tensor

# ---------------------------------------------------------------- kernels


def _swapped(e: Emitter, x: Value) -> Value:
    return e.transpose(x, [*range(x.rank - 2), x.rank - 1, x.rank - 2])


@aten("linalg_lu_factor_ex")
def lu_factor_ex(e: Emitter, A: Value, pivot: bool = True, check_errors: bool = False) -> tuple[Value, ...]:
    return e.ops("luthier::LU", 3, A)


@aten("lu_unpack")
def lu_unpack(e: Emitter, LU_data: Value, LU_pivots: Value, unpack_data: bool = True, unpack_pivots: bool = True) -> tuple[Value, ...]:
    x = LU_data
    m, n = x.shape[-2:]
    k = e.out[2].shape[-2] if unpack_data else 0
    order = e.op("luthier::PivotsToPermutation", LU_pivots, x)
    rows = e.op("Range", e.number(0, D.i64), e.number(m, D.i64), e.number(1, D.i64))
    p = e.cast(e.op("Equal", e.reshape(rows, [m, 1]), e.reshape(order, [*order.shape[:-1], 1, m])), x.dtype)
    below = e.op("Trilu", e.slice(x, x.rank - 1, 0, k), e.number(-1, D.i64), upper=0)
    low = e.op("Add", below, eye_of(e, m, k, x.dtype))
    up = e.op("Trilu", e.slice(x, x.rank - 2, 0, k), e.number(0, D.i64), upper=1)
    return p, low, up


@aten("linalg_solve_triangular")
def solve_triangular(e: Emitter, x: Value, B: Value, upper: bool, left: bool = True, unitriangular: bool = False) -> Value:
    a, b = x, B
    if not left:
        a, b, upper = _swapped(e, a), _swapped(e, b), not upper
    lead = list(e.shape[:-2])
    a, b = e.expand(a, [*lead, *a.shape[-2:]]), e.expand(b, [*lead, *b.shape[-2:]])
    y = e.op("luthier::TriangularSolve", a, b, upper=int(upper), unit=int(unitriangular))
    return y if left else _swapped(e, y)


@aten("linalg_cholesky_ex")
def cholesky_ex(e: Emitter, x: Value, upper: bool = False, check_errors: bool = False) -> tuple[Value, Value]:
    low, info = e.ops("luthier::Cholesky", 2, _swapped(e, x) if upper else x)
    return _swapped(e, low) if upper else low, info


@aten("geqrf")
def geqrf(e: Emitter, x: Value) -> tuple[Value, ...]:
    return e.ops("luthier::QR", 2, x)


@aten("linalg_householder_product")
def householder_product(e: Emitter, x: Value, tau: Value) -> Value:
    return e.op("luthier::HouseholderProduct", x, tau)


@aten("linalg_qr")
def qr(e: Emitter, A: Value, mode: str = "reduced") -> tuple[Value, Value]:
    m, n = A.shape[-2:]
    h, tau = e.ops("luthier::QR", 2, A)
    r = e.op("Trilu", h, e.number(0, D.i64), upper=1)
    rows = e.dims(e.out[1].shape)[-2]
    r = e.slice(r, r.rank - 2, 0, rows)
    if mode == "r":
        return e.expand(e.number(0, A.dtype), e.out[0].shape), r
    wide = e.dims(e.out[0].shape)[-1]
    if mode == "complete" and wide is not n:
        fill = e.expand(e.number(0, A.dtype), [*A.shape[:-2], m, m])
        h = e.slice(e.op("Concat", h, fill, axis=h.rank - 1), h.rank - 1, 0, wide)
    else:
        h = e.slice(h, h.rank - 1, 0, wide)
    return e.op("luthier::HouseholderProduct", h, tau), r


@aten("_linalg_eigh")
def eigh(e: Emitter, A: Value, UPLO: str = "L", compute_v: bool = True) -> tuple[Value, Value]:
    values, vectors = e.ops("luthier::Eigh", 2, _swapped(e, A) if UPLO.upper() == "U" else A)
    return values, vectors if compute_v else e.expand(e.number(0, A.dtype), e.out[1].shape)


@aten("_linalg_svd")
def svd(e: Emitter, A: Value, full_matrices: bool = False, compute_uv: bool = True, driver: str | None = None) -> tuple[Value, Value, Value]:
    """U's columns of zero singular values, and those of a full U, are completed by a QR: its reflections keep the others up to signs."""
    m, n = A.shape[-2:]
    flat = m.op == "const" and n.op == "const" and m.attr < n.attr
    u, s, v = e.ops("luthier::SVD", 3, _swapped(e, A) if flat else A)
    if not compute_uv:
        zero = e.number(0, A.dtype)
        return e.expand(zero, e.out[0].shape), s, e.expand(zero, e.out[2].shape)
    wide = e.dims(e.out[2].shape)[-2] if flat else e.dims(e.out[0].shape)[-1]
    h, tau = e.ops("luthier::QR", 2, u)
    sign = e.op("Less", e.reduce("ReduceSum", e.op("Mul", h, eye_of(e, h.shape[-2], h.shape[-1], h.dtype)), [h.rank - 2], True), e.number(0, h.dtype))
    if wide is not h.shape[-1]:
        rest = e.expand(e.number(0, h.dtype), [*h.shape[:-1], wide - h.shape[-1]])
        sign = e.op("Concat", sign, e.expand(e.const("no", _false()), [*sign.shape[:-1], wide - h.shape[-1]]), axis=h.rank - 1)
        h = e.op("Concat", h, rest, axis=h.rank - 1)
    q = e.op("luthier::HouseholderProduct", h, tau)
    u = e.op("Where", sign, e.op("Neg", q), q)
    return (v, s, _swapped(e, u)) if flat else (u, s, _swapped(e, v))


def _false() -> Any:
    return torch.zeros((), dtype=torch.bool).numpy()


# ---------------------------------------------------------------- what is computed by them


def _vectors(A: Tensor, B: Tensor) -> bool:
    """Whether a right-hand side is a batch of vectors."""
    return B.dim() == 1 or A.dim() - 1 == B.dim() and B.shape == A.shape[:-1]


def _lu_solved(LU: Tensor, pivots: Tensor, B: Tensor) -> Tensor:
    p, low, up = torch.lu_unpack(LU, pivots)
    y = torch.linalg.solve_triangular(low, p.mT @ B, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(up, y, upper=True)


@decomposed("linalg_lu_solve")
def lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    if not left:
        return lu_solve(LU, pivots, B.mT, adjoint=not adjoint).mT
    if not adjoint:
        return _lu_solved(LU, pivots, B)
    p, low, up = torch.lu_unpack(LU, pivots)
    y = torch.linalg.solve_triangular(up.mT, B, upper=False)
    return p @ torch.linalg.solve_triangular(low.mT, y, upper=True, unitriangular=True)


@decomposed("linalg_lu")
def lu(A: Tensor, *, pivot: bool = True) -> Any:
    LU, pivots, _ = torch.linalg.lu_factor_ex(A, pivot=pivot)
    return torch.lu_unpack(LU, pivots)


@decomposed("_linalg_solve_ex")
def solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    LU, pivots, info = torch.linalg.lu_factor_ex(A if left else A.mT)
    if _vectors(A, B):
        return _lu_solved(LU, pivots, B.unsqueeze(-1)).squeeze(-1), LU, pivots, info
    return (_lu_solved(LU, pivots, B) if left else _lu_solved(LU, pivots, B.mT).mT), LU, pivots, info


@decomposed("linalg_inv_ex")
def inv_ex(A: Tensor, *, check_errors: bool = False) -> Any:
    LU, pivots, info = torch.linalg.lu_factor_ex(A)
    return _lu_solved(LU, pivots, torch.eye(A.shape[-1], dtype=A.dtype).expand(A.shape)), info


def _parity(LU: Tensor, pivots: Tensor) -> Tensor:
    moved = (pivots != torch.arange(1, pivots.shape[-1] + 1, dtype=pivots.dtype)).sum(-1)
    return (1 - 2 * (moved % 2)).to(LU.dtype)


@decomposed("_linalg_det")
def det(A: Tensor) -> Any:
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    return _parity(LU, pivots) * LU.diagonal(dim1=-2, dim2=-1).prod(-1), LU, pivots


@decomposed("_linalg_slogdet")
def slogdet(A: Tensor) -> Any:
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    d = LU.diagonal(dim1=-2, dim2=-1)
    return _parity(LU, pivots) * d.sign().prod(-1), d.abs().log().sum(-1), LU, pivots


@decomposed("cholesky")
def cholesky(A: Tensor, upper: bool = False) -> Tensor:
    return torch.linalg.cholesky_ex(A, upper=upper)[0]


@decomposed("cholesky_solve")
def cholesky_solve(B: Tensor, L: Tensor, upper: bool = False) -> Tensor:
    low = L.mT if upper else L
    return torch.linalg.solve_triangular(low.mT, torch.linalg.solve_triangular(low, B, upper=False), upper=True)


@decomposed("cholesky_inverse")
def cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:
    return cholesky_solve(torch.eye(L.shape[-1], dtype=L.dtype).expand(L.shape), L, upper)


@decomposed("triangular_solve")
def triangular_solve(B: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False) -> Any:
    a, up = (A.mT, not upper) if transpose else (A, upper)
    lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    return torch.linalg.solve_triangular(a, B, upper=up, unitriangular=unitriangular), A.expand(*lead, *A.shape[-2:]).clone()


@decomposed("ormqr")
def ormqr(A: Tensor, tau: Tensor, C: Tensor, left: bool = True, transpose: bool = False) -> Tensor:
    m = A.shape[-2]
    q = torch.linalg.householder_product(torch.cat([A, A.new_zeros(*A.shape[:-1], max(m - A.shape[-1], 0))], -1)[..., :m], tau)
    q = q.mT if transpose else q
    return q @ C if left else C @ q


def _threshold(top: Tensor, shape: Sequence[int], atol: Any, rtol: Any) -> Tensor:
    if rtol is None:
        given = atol is not None and not (isinstance(atol, float) and atol == 0)
        default = torch.finfo(top.dtype).eps * max(shape[-2:])
        rtol = torch.where(atol > 0, 0.0, default) if isinstance(atol, Tensor) else 0.0 if given else default
    return torch.maximum(torch.as_tensor(0.0 if atol is None else atol, dtype=top.dtype).expand(top.shape), rtol * top)


@decomposed("linalg_pinv")
def pinv(A: Tensor, *, atol: Any = None, rtol: Any = None, hermitian: bool = False, rcond: Any = None) -> Tensor:
    rtol = rcond if rtol is None else rtol
    if 0 in A.shape:
        return A.new_zeros((*A.shape[:-2], A.shape[-1], A.shape[-2]))
    if hermitian:
        values, v = torch.linalg.eigh(A)
        size, u = values.abs(), v
    else:
        u, values, vh = torch.linalg.svd(A, full_matrices=False)
        size, v = values, vh.mT
    keep = size > _threshold(size.amax(-1), A.shape, atol, rtol).unsqueeze(-1)
    return (v * torch.where(keep, 1 / values, 0.0).unsqueeze(-2)) @ u.mT


@decomposed("linalg_lstsq")
def lstsq(A: Tensor, B: Tensor, rcond: Any = None, *, driver: str | None = None) -> Any:
    """By the pseudoinverse: the same as a QR's where the rank is full."""
    m, n = A.shape[-2:]
    vector = _vectors(A, B)
    b = B.unsqueeze(-1) if vector else B
    u, s, vh = torch.linalg.svd(A, full_matrices=False)
    rank_revealing = driver in ("gelsy", "gelsd", "gelss")
    cut = torch.finfo(A.dtype).eps * max(m, n) if rcond is None else rcond
    keep = s > (cut if rank_revealing or driver is None else 0.0) * s[..., :1]
    x = vh.mT @ (torch.where(keep, 1 / s, 0.0).unsqueeze(-1) * (u.mT @ b))
    full = keep.sum(-1)
    residuals = (A @ x - b).square().sum(-2) if m > n else A.new_zeros(0)
    rank = full if rank_revealing or driver is None else torch.zeros(0, dtype=torch.int64)
    return (x.squeeze(-1) if vector else x), residuals, rank, s if driver in ("gelsd", "gelss") else A.new_zeros(0)


@decomposed("linalg_matrix_exp", "matrix_exp")
def matrix_exp(A: Tensor) -> Tensor:
    """Taylor's series of degree 18 of A / 2^s with a norm of at most 3, squared s times; s up to 24."""
    norm = A.abs().sum(-2).amax(-1) if A.numel() else A.new_zeros(A.shape[:-2])
    s = torch.clamp(torch.ceil(torch.log2(torch.clamp(norm, min=1e-30) / 3)), 0, 24)
    scaled = A * torch.exp2(-s)[..., None, None]
    unit = torch.eye(A.shape[-1], dtype=A.dtype).expand(A.shape)
    y = unit
    for k in range(18, 0, -1):
        y = unit + scaled @ y / k
    for k in range(24):
        y = torch.where((s > k)[..., None, None], y @ y, y)
    return y
