"""The twelve kernels of the grammar gate: mathematics, inputs and numpy references.

Eleven are Computes or loop-IR kernels of one step; the last one is a Program, because its dimension is known only after its
first kernel ran. Shapes are small and mostly no multiples of a vector, so that every tail is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, Fold, Pull, Push, State, axis, max_, pull, reduce_, sum_
from luthier.ir.dtypes import f32, i32, i64, index, u4
from luthier.ir.expr import Expr, as_expr, cast, const, load, maximum, proj, select, unary, var
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, If, Let, Store, block
from luthier.ir.program import Program

Arrays = dict[str, Any]
INF = float("inf")


@dataclass(frozen=True)
class Case:
    """``compute`` or ``program``; ``inputs(rng)``: arrays by name; ``reference(inputs)``: outputs in f64 (or exact integers) by name;
    ``dims``: values of symbolic dimensions; ``tol``: absolute and relative error allowed for f32 arithmetic."""

    name: str
    inputs: Callable[[np.random.Generator], Arrays]
    reference: Callable[[Arrays], Arrays]
    compute: Compute | None = None
    funcs: tuple[Func, ...] = ()
    program: Program | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    tol: float = 2e-5


def _f32(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape, np.float32)


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def gelu(x: Expr) -> Expr:
    return x * 0.5 * (unary("erf", x * (1 / math.sqrt(2))) + 1.0)


# ---------------------------------------------------------------- dense


def gemm(m: Any = 33, n: Any = 40, k: Any = 37) -> Compute:
    """``C[m, n] = gelu(A[m, k] @ B[k, n] + bias[n])``, f32; any extent may be a symbol."""
    a, b, bias = Buffer.of("A", f32, (m, k)), Buffer.of("B", f32, (k, n)), Buffer.of("bias", f32, (n,))
    i, j, r = axis("i", m), axis("j", n), axis("k", k)
    acc = pull("acc", (i, j), sum_(r, a[i.var, r.var] * b[r.var, j.var]))
    i2, j2 = axis("i", m), axis("j", n)
    out = pull("C", (i2, j2), gelu(acc.buf[i2.var, j2.var] + bias[j2.var]))
    dims = tuple(x for x in (m, n, k) if isinstance(x, Expr) and x.op == "var")
    return Compute("gemm", (a, b, bias), dims, (acc, out), ("C",))


def gemm_case(m: int = 33, n: int = 40, k: int = 37) -> Case:
    def ref(x: Arrays) -> Arrays:
        y = x["A"].astype(np.float64) @ x["B"] + x["bias"]
        return {"C": 0.5 * y * (1 + _erf(y / math.sqrt(2)))}

    return Case("gemm", lambda r: {"A": _f32(r, m, k), "B": _f32(r, k, n), "bias": _f32(r, n)}, ref, gemm(m, n, k))


def conv3x3() -> Case:
    """``Y[n, o, h, w] = sum X[n, c, h + r - 1, w + s - 1] * W[o, c, r, s]``, one row and column of zero padding: masked loads."""
    N, C, H, W, O = 1, 5, 9, 11, 12
    x, w = Buffer.of("X", f32, (N, C, H, W)), Buffer.of("W", f32, (O, C, 3, 3))
    n, o, h, v = axis("n", N), axis("o", O), axis("h", H), axis("w", W)
    c, r, s = axis("c", C), axis("r", 3), axis("s", 3)
    ih, iw = h.var + r.var - 1, v.var + s.var - 1
    ok = (as_expr(0) <= ih) & (ih < as_expr(H)) & (as_expr(0) <= iw) & (iw < as_expr(W))
    y = pull("Y", (n, o, h, v), sum_((c, r, s), load(x, (n.var, c.var, ih, iw), ok) * w[o.var, c.var, r.var, s.var]))

    def ref(a: Arrays) -> Arrays:
        p = np.pad(a["X"].astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
        win = np.lib.stride_tricks.sliding_window_view(p, (3, 3), (2, 3))
        return {"Y": np.einsum("nchwrs,ocrs->nohw", win, a["W"])}

    return Case("conv3x3", lambda g: {"X": _f32(g, N, C, H, W), "W": _f32(g, O, C, 3, 3)}, ref, Compute("conv3x3", (x, w), (), (y,), ("Y",)))


def depthwise() -> Case:
    """3x3, stride 2, one filter per channel, padding 1, channels last."""
    C, H, W = 19, 10, 9
    OH, OW = (H + 1) // 2, (W + 1) // 2
    x, w = Buffer.of("X", f32, (H, W, C)), Buffer.of("W", f32, (3, 3, C))
    h, v, c, r, s = axis("h", OH), axis("w", OW), axis("c", C), axis("r", 3), axis("s", 3)
    ih, iw = h.var * 2 + r.var - 1, v.var * 2 + s.var - 1
    ok = (as_expr(0) <= ih) & (ih < as_expr(H)) & (as_expr(0) <= iw) & (iw < as_expr(W))
    y = pull("Y", (h, v, c), sum_((r, s), load(x, (ih, iw, c.var), ok) * w[r.var, s.var, c.var]))

    def ref(a: Arrays) -> Arrays:
        p = np.pad(a["X"].astype(np.float64), ((1, 2), (1, 2), (0, 0)))
        out = sum(p[i : i + 2 * OH : 2, j : j + 2 * OW : 2] * a["W"][i, j] for i in range(3) for j in range(3))
        return {"Y": out}

    return Case("depthwise", lambda g: {"X": _f32(g, H, W, C), "W": _f32(g, 3, 3, C)}, ref, Compute("depthwise", (x, w), (), (y,), ("Y",)))


def layernorm() -> Case:
    """Two-pass statistics of each row, then scale and shift."""
    R, N = 7, 45
    x, g, b = Buffer.of("X", f32, (R, N)), Buffer.of("G", f32, (N,)), Buffer.of("B", f32, (N,))
    i, k = axis("i", R), axis("k", N)
    mean = pull("mean", (i,), sum_(k, x[i.var, k.var]) * (1 / N))
    i2, k2 = axis("i", R), axis("k", N)
    d = x[i2.var, k2.var] - mean.buf[i2.var]
    inv = pull("inv", (i2,), unary("rsqrt", sum_(k2, d * d) * (1 / N) + 1e-5))
    i3, j = axis("i", R), axis("j", N)
    y = pull("Y", (i3, j), (x[i3.var, j.var] - mean.buf[i3.var]) * inv.buf[i3.var] * g[j.var] + b[j.var])

    def ref(a: Arrays) -> Arrays:
        t = a["X"].astype(np.float64)
        t = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, keepdims=True) + 1e-5)
        return {"Y": t * a["G"] + a["B"]}

    c = Compute("layernorm", (x, g, b), (), (mean, inv, y), ("Y",))
    return Case("layernorm", lambda r: {"X": _f32(r, R, N) * 3 + 1, "G": _f32(r, N), "B": _f32(r, N)}, ref, c)


# ---------------------------------------------------------------- loop-carried state


def attention() -> Case:
    """Online softmax over blocks of keys; the last block is partly masked, and each query sees only the keys up to its length."""
    H, Q, T, D, KB = 2, 10, 27, 16, 8
    NB = (T + KB - 1) // KB
    q, k, v = Buffer.of("Q", f32, (H, Q, D)), Buffer.of("K", f32, (H, T, D)), Buffer.of("V", f32, (H, T, D))
    ln = Buffer.of("L", i32, (Q,))
    h, i, ko = axis("h", H), axis("q", Q), axis("ko", NB)

    def key(kk: Axis) -> tuple[Expr, Expr]:
        t = ko.var * KB + kk.var
        return t, t < as_expr(T)

    sh = (h, i)
    m = Buffer("m", f32, (h.extent, i.extent), "local")
    l = Buffer("l", f32, (h.extent, i.extent), "local")
    dd = axis("d", D)
    o = Buffer("o", f32, (h.extent, i.extent, dd.extent), "local")
    kk, e = axis("kk", KB), axis("e", D)
    t, ok = key(kk)
    dot = sum_(e, q[h.var, i.var, e.var] * load(k, (h.var, t, e.var), ok))
    dots = pull("s0", (h, i, kk), dot)
    k1 = axis("kk", KB)
    t1, ok1 = key(k1)
    seen = ok1 & (t1 < cast(ln[i.var], index))
    s = pull("s", (h, i, k1), select(seen, dots.buf[h.var, i.var, k1.var] * (1 / math.sqrt(D)), const(-INF, f32)))
    k2 = axis("kk", KB)
    m2 = pull("m2", sh, maximum(m[h.var, i.var], max_(k2, s.buf[h.var, i.var, k2.var])))
    new = m2.buf[h.var, i.var]
    dead = new.eq(const(-INF, f32))  # a row that has seen no key yet: -inf minus -inf
    a = pull("a", sh, select(dead, const(0, f32), unary("exp", m[h.var, i.var] - new)))
    k3 = axis("kk", KB)
    p = pull("p", (h, i, k3), select(dead, const(0, f32), unary("exp", s.buf[h.var, i.var, k3.var] - new)))
    k4, k5 = axis("kk", KB), axis("kk", KB)
    t5, ok5 = key(k5)
    pv = sum_(k5, p.buf[h.var, i.var, k5.var] * load(v, (h.var, t5, dd.var), ok5))
    state = (
        State(m, sh, const(-INF, f32), new),
        State(l, sh, const(0, f32), l[h.var, i.var] * a.buf[h.var, i.var] + sum_(k4, p.buf[h.var, i.var, k4.var])),
        State(o, (h, i, dd), const(0, f32), o[h.var, i.var, dd.var] * a.buf[h.var, i.var] + pv),
    )
    fold = Fold("flash", ko, state, (dots, s, m2, a, p), axes=sh)
    h2, i2, d2 = axis("h", H), axis("q", Q), axis("d", D)
    lv = l[h2.var, i2.var]
    y = pull("Y", (h2, i2, d2), select(lv.eq(0.0), const(0, f32), o[h2.var, i2.var, d2.var] / lv))

    def inputs(r: np.random.Generator) -> Arrays:
        lens = r.integers(1, T + 1, Q).astype(np.int32)
        lens[0], lens[1] = 0, T
        return {"Q": _f32(r, H, Q, D), "K": _f32(r, H, T, D), "V": _f32(r, H, T, D), "L": lens}

    def ref(x: Arrays) -> Arrays:
        s = np.einsum("hqd,htd->hqt", x["Q"].astype(np.float64), x["K"]) / math.sqrt(D)
        live = np.arange(T)[None, :] < x["L"][:, None]
        p = np.where(live, np.exp(s - s.max(-1, keepdims=True)), 0)
        den = p.sum(-1, keepdims=True)
        return {"Y": np.einsum("hqt,htd->hqd", np.divide(p, den, out=np.zeros_like(p), where=den > 0), x["V"])}

    return Case("attention", inputs, ref, Compute("attention", (q, k, v, ln), (), (fold, y), ("Y",)))


def lstm() -> Case:
    """ONNX's gate order i, o, f, c; every hidden state is emitted, the last states are outputs."""
    T, B, I, U = 6, 3, 10, 13
    x, w, r = Buffer.of("X", f32, (T, B, I)), Buffer.of("W", f32, (4, U, I)), Buffer.of("R", f32, (4, U, U))
    bias = Buffer.of("Bias", f32, (4, U))
    t, b = axis("t", T), axis("b", B)
    hu, cu = axis("u", U), axis("u", U)
    h, c = Buffer("H", f32, (b.extent, as_expr(U)), "local"), Buffer("Cell", f32, (b.extent, as_expr(U)), "local")
    g, u, k, k2 = axis("g", 4), axis("u", U), axis("k", I), axis("k", U)
    zx = pull("zx", (b, g, u), sum_(k, x[t.var, b.var, k.var] * w[g.var, u.var, k.var]))
    g2, u2 = axis("g", 4), axis("u", U)
    zh = pull("zh", (b, g2, u2), sum_(k2, h[b.var, k2.var] * r[g2.var, u2.var, k2.var]))

    def gate(n: int, uu: Axis) -> Expr:
        return zx.buf[b.var, n, uu.var] + zh.buf[b.var, n, uu.var] + bias[n, uu.var]

    u3, u4 = axis("u", U), axis("u", U)
    sg, th = (lambda e: unary("sigmoid", e)), (lambda e: unary("tanh", e))
    cn = pull("cn", (b, u3), sg(gate(2, u3)) * c[b.var, u3.var] + sg(gate(0, u3)) * th(gate(3, u3)))
    hn = pull("hn", (b, u4), sg(gate(1, u4)) * th(cn.buf[b.var, u4.var]))
    ue = axis("u", U)
    y = Pull(Buffer("Y", f32, (t.extent, b.extent, ue.extent), "global"), (t, b, ue), hn.buf[b.var, ue.var])
    state = (
        State(h, (b, hu), const(0, f32), hn.buf[b.var, hu.var]),
        State(c, (b, cu), const(0, f32), cn.buf[b.var, cu.var]),
    )
    fold = Fold("lstm", t, state, (zx, zh, cn, hn), (y,), axes=(b,))

    def ref(a: Arrays) -> Arrays:
        hh, cc, ys = np.zeros((B, U)), np.zeros((B, U)), []
        for s in range(T):
            z = np.einsum("bi,gui->gbu", a["X"][s].astype(np.float64), a["W"]) + np.einsum("bk,guk->gbu", hh, a["R"]) + a["Bias"][:, None]
            cc = _sigmoid(z[2]) * cc + _sigmoid(z[0]) * np.tanh(z[3])
            hh = _sigmoid(z[1]) * np.tanh(cc)
            ys.append(hh)
        return {"Y": np.stack(ys), "H": hh, "Cell": cc}

    def inputs(n: np.random.Generator) -> Arrays:
        return {"X": _f32(n, T, B, I), "W": _f32(n, 4, U, I) * 0.3, "R": _f32(n, 4, U, U) * 0.3, "Bias": _f32(n, 4, U)}

    return Case("lstm", inputs, ref, Compute("lstm", (x, w, r, bias), (), (fold,), ("Y", "H", "Cell")))


# ---------------------------------------------------------------- tuple reductions, scatter


def argmax() -> Case:
    """The first of equal maxima; a tuple reduction whose second component is wanted."""
    R, N = 9, 50
    x = Buffer.of("X", f32, (R, N))
    i, k = axis("i", R), axis("k", N)
    best = reduce_("argmax", (k,), x[i.var, k.var], cast(k.var, i32))
    y = pull("Y", (i,), proj(best, 1, i32))

    def inputs(r: np.random.Generator) -> Arrays:
        a = _f32(r, R, N)
        a[0, 7] = a[0, 31] = 9.0
        return {"X": a}

    return Case("argmax", inputs, lambda a: {"Y": a["X"].argmax(1).astype(np.int32)}, Compute("argmax", (x,), (), (y,), ("Y",)))


def scatter_add() -> Case:
    """``Y = X; Y[I[p], d] += U[p, d]``; repeated rows add up, rows outside are dropped."""
    N, P, D = 8, 20, 6
    x, ix, up = Buffer.of("X", f32, (N, D)), Buffer.of("I", i32, (P,)), Buffer.of("U", f32, (P, D))
    i, d = axis("i", N), axis("d", D)
    p, e = axis("p", P), axis("e", D)
    row = cast(ix[p.var], index)
    y = Push(Buffer("Y", f32, (i.extent, d.extent), "global"), (i, d), x[i.var, d.var], (p, e), (row, e.var), up[p.var, e.var], "add",
             where=(as_expr(0) <= row) & (row < as_expr(N)))

    def ref(a: Arrays) -> Arrays:
        out = a["X"].astype(np.float64)
        ok = (a["I"] >= 0) & (a["I"] < N)
        np.add.at(out, a["I"][ok], a["U"][ok])
        return {"Y": out}

    def inputs(r: np.random.Generator) -> Arrays:
        return {"X": _f32(r, N, D), "I": r.integers(-1, N + 1, P).astype(np.int32), "U": _f32(r, P, D)}

    return Case("scatter_add", inputs, ref, Compute("scatter_add", (x, ix, up), (), (y,), ("Y",)))


# ---------------------------------------------------------------- low bit weights


def gemv_u4() -> Case:
    """4-bit weights with a scale and a 4-bit zero point for each group of 32."""
    N, K, G = 18, 128, 32
    w, s, z, x = Buffer.of("W", u4, (N, K)), Buffer.of("S", f32, (N, K // G)), Buffer.of("Z", u4, (N, K // G)), Buffer.of("X", f32, (K,))
    n, k = axis("n", N), axis("k", K)
    g = k.var // G
    deq = (cast(w[n.var, k.var], f32) - cast(z[n.var, g], f32)) * s[n.var, g]
    y = pull("Y", (n,), sum_(k, deq * x[k.var]))

    def ref(a: Arrays) -> Arrays:
        w = a["W"].astype(np.float64).reshape(N, K // G, G) - a["Z"].astype(np.float64)[:, :, None]
        return {"Y": (w * a["S"][:, :, None]).reshape(N, K) @ a["X"]}

    def inputs(r: np.random.Generator) -> Arrays:
        return {"W": r.integers(0, 16, (N, K)).astype(u4.numpy), "S": _f32(r, N, K // G) * 0.1, "Z": r.integers(0, 16, (N, K // G)).astype(u4.numpy), "X": _f32(r, K)}

    return Case("gemv_u4", inputs, ref, Compute("gemv_u4", (w, s, z, x), (), (y,), ("Y",)))


def lut_gemv() -> Case:
    """2-bit weights, bit by bit: four bits of one plane index a table of the 16 partial sums of four activations.

    ``P[b, n, g]`` packs bit b of weights ``W[n, 4g .. 4g+3]``; ``Y[n] = S[n] * sum_b 2^b sum_g T[g, P[b, n, g]]``."""
    N, K, BITS = 21, 64, 2
    GR = K // 4
    pk, s, x = Buffer.of("P", u4, (BITS, N, GR)), Buffer.of("S", f32, (N,)), Buffer.of("X", f32, (K,))
    g, c, j = axis("g", GR), axis("c", 16), axis("j", 4)
    bit = (cast(c.var, i32) >> cast(j.var, i32)) & 1
    table = pull("T", (g, c), sum_(j, select(bit.ne(0), x[g.var * 4 + j.var], const(0, f32))))
    n, b, g2 = axis("n", N), axis("b", BITS), axis("g", GR)
    weight = cast(const(1, i32) << cast(b.var, i32), f32)
    acc = pull("acc", (n,), sum_((b, g2), weight * table.buf[g2.var, cast(pk[b.var, n.var, g2.var], index)]))
    n2 = axis("n", N)
    y = pull("Y", (n2,), acc.buf[n2.var] * s[n2.var])

    def ref(a: Arrays) -> Arrays:
        p = a["P"].astype(np.int64)
        w = sum(((p[q][..., None] >> np.arange(4)) & 1) << q for q in range(BITS)).reshape(N, K)
        return {"Y": (w @ a["X"].astype(np.float64)) * a["S"]}

    def inputs(r: np.random.Generator) -> Arrays:
        return {"P": r.integers(0, 16, (BITS, N, GR)).astype(u4.numpy), "S": _f32(r, N), "X": _f32(r, K)}

    return Case("lut_gemv", inputs, ref, Compute("lut_gemv", (pk, s, x), (), (table, acc, y), ("Y",)))


# ---------------------------------------------------------------- loops whose bounds are data


def csr_gemv() -> Case:
    """``Y = A X`` with A in compressed rows: the bounds of the inner loop are read from the row pointers."""
    R, C = 12, 15
    nnz = var("nnz", lo=0)
    rp, ci, va = Buffer.of("rowptr", i32, (R + 1,), writable=False), Buffer.of("col", i32, (nnz,), writable=False), Buffer.of("val", f32, (nnz,), writable=False)
    x, y = Buffer.of("X", f32, (C,), writable=False), Buffer.of("Y", f32, (R,))
    i = var("i", lo=0, hi=R - 1)
    p = var("p", lo=0, hi=nnz - 1)
    acc = Buffer("acc", f32, (), "local")
    inner = For(p, cast(rp[i], index), cast(rp[i + 1], index), "serial", Store(acc, (), acc[()] + va[p] * x[cast(ci[p], index)]))
    body = For(i, const(0), const(R), "parallel", Alloc(acc, block(Store(acc, (), const(0, f32)), inner, Store(y, (i,), acc[()]))))

    def inputs(r: np.random.Generator) -> Arrays:
        dense = np.where(r.random((R, C)) < 0.3, _f32(r, R, C), 0)
        dense[3] = 0  # an empty row
        rows, cols = np.nonzero(dense)
        ptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=R))]).astype(np.int32)
        return {"rowptr": ptr, "col": cols.astype(np.int32), "val": dense[rows, cols].astype(np.float32), "X": _f32(r, C)}

    def ref(a: Arrays) -> Arrays:
        out = np.zeros(R)
        for n in range(R):
            sl = slice(a["rowptr"][n], a["rowptr"][n + 1])
            out[n] = a["val"][sl].astype(np.float64) @ a["X"][a["col"][sl]]
        return {"Y": out}

    return Case("csr_gemv", inputs, ref, funcs=(Func("csr_gemv", (rp, ci, va, x, y, nnz), body),))


def nonzero() -> Case:
    """``Reshape(NonZero(X), S)`` as f32: NonZero's count becomes a dimension, the reshape's target comes from run-time data.

    One kernel counts, ``main`` reads the count back, a second one fills ``I[2, n]``, the reshape is a view, a third casts."""
    R, C = 5, 7
    x, s = Buffer.of("X", f32, (R, C), writable=False), Buffer.of("S", i64, (2,), writable=False)
    cnt = Buffer.of("count", i64, (1,))
    i, j = var("i", lo=0, hi=R - 1), var("j", lo=0, hi=C - 1)
    hit = x[i, j].ne(0.0)

    def nest(body: Any) -> Any:
        return For(i, const(0), const(R), "serial", For(j, const(0), const(C), "serial", If(hit, body)))

    zero, one = const(0), const(1, i64)
    count = Func("count", (x, cnt), block(Store(cnt, (zero,), const(0, i64)), nest(Store(cnt, (zero,), cnt[0] + one))))
    n = var("n", lo=0)
    out = Buffer.of("I", i64, (2, n))
    at = Buffer.of("at", i64, (1,), "local")
    pos = cast(at[0], index)
    fill_body = block(
        Store(out, (zero, pos), cast(i, i64)), Store(out, (const(1), pos), cast(j, i64)), Store(at, (zero,), at[0] + one),
    )
    fill = Func("fill", (x, out, n), Alloc(at, block(Store(at, (zero,), const(0, i64)), nest(fill_body))))
    r0, r1 = var("r0", lo=0), var("r1", lo=0)
    view, y = Buffer.of("V", i64, (r0, r1), writable=False), Buffer.of("Y", f32, (r0, r1))
    a, b = var("a", lo=0, hi=r0 - 1), var("b", lo=0, hi=r1 - 1)
    conv = Func("convert", (view, y, r0, r1), For(a, const(0), r0, "parallel", For(b, const(0), r1, "serial", Store(y, (a, b), cast(view[a, b], f32)))))
    total = n * 2
    s0, s1 = cast(s[0], index), cast(s[1], index)

    def known(me: Expr, other: Expr) -> Expr:  # -1 takes what is left
        return select(me < const(0), total // maximum(other, const(1)), me)

    main = block(
        Call("count", (x, cnt)), Let(n, cast(cnt[0], index)), Call("fill", (x, out, n)),
        Let(r0, known(s0, s1)), Let(r1, known(s1, s0)), Call("convert", (view, y, r0, r1)),
    )
    prog = Program(
        "nonzero_reshape", (x, s), (y,), {}, {}, {"count": count, "fill": fill, "convert": conv}, (cnt, out, view), main, {"V": ("I", zero)},
    )

    def inputs(r: np.random.Generator) -> Arrays:
        return {"X": np.where(r.random((R, C)) < 0.4, _f32(r, R, C), 0).astype(np.float32), "S": np.array([-1, 2], np.int64)}

    return Case("nonzero_reshape", inputs, lambda v: {"Y": np.stack(np.nonzero(v["X"])).reshape(v["S"]).astype(np.float32)}, program=prog)


def cases() -> list[Case]:
    return [
        gemm_case(), conv3x3(), depthwise(), layernorm(), attention(), lstm(), argmax(), scatter_add(), gemv_u4(), lut_gemv(), csr_gemv(), nonzero(),
    ]


__all__ = ["Case", "cases", "gemm", "gemm_case", "gelu"]
