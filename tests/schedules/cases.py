"""Small Computes with their numpy meaning, and how to run kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, axis, max_, pull, sum_
from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, const, free_vars, load, maximum, substitute, unary
from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import Buffer, Func

Array = np.ndarray[Any, Any]
Case = tuple[Compute, dict[str, Array], Array]


def dims_of(*extents: Any) -> tuple[Expr, ...]:
    return tuple(dict.fromkeys(e for e in extents if isinstance(e, Expr)))


def run(funcs: tuple[Func, ...] | list[Func], arrays: Mapping[str, Array], dims: Mapping[str, int], out: str) -> Array:
    """Kernels one after another in the interpreter; tensors that pass between them are made here."""
    env = {n: np.ascontiguousarray(a).reshape(-1) for n, a in arrays.items()}
    sub = {n: v for n, v in dims.items()}
    for f in funcs:
        for b in f.buffers:
            if b.name not in env:
                size = b.size()
                size = substitute(size, {v: const(sub[v.attr[0]]) for v in free_vars(size)})
                env[b.name] = np.full(size.attr, 77, b.dtype.numpy)
        run_func(f, {b.name: env[b.name] for b in f.buffers}, {v.attr[0]: sub[v.attr[0]] for v in f.scalars})
    return env[out]


def matmul(m: Any, n: Any, k: Any, sizes: Mapping[str, int], rng: np.random.Generator) -> Case:
    a, b, c = Buffer.of("A", f32, (m, k)), Buffer.of("B", f32, (k, n)), Buffer.of("bias", f32, (n,))
    i, j, r = axis("m", m), axis("n", n), axis("k", k)
    i2, j2 = axis("m", m), axis("n", n)
    acc = pull("acc", (i, j), sum_(r, a[i.var, r.var] * b[r.var, j.var]))
    out = pull("C", (i2, j2), maximum(acc.buf[i2.var, j2.var] + c[j2.var], 0.0))
    s = [sizes[x.attr[0]] if isinstance(x, Expr) else x for x in (m, n, k)]
    x, y, z = (rng.standard_normal(sh).astype("f") for sh in ((s[0], s[2]), (s[2], s[1]), (s[1],)))
    comp = Compute("mm", (a, b, c), dims_of(m, n, k), (acc, out), ("C",))
    return comp, {"A": x, "B": y, "bias": z}, np.maximum(x.astype("d") @ y + z, 0)


def conv(h: int, ic: int, oc: int, k: int, s: int, p: int, rng: np.random.Generator, depthwise: bool = False) -> Case:
    o = (h + 2 * p - k) // s + 1
    x = Buffer.of("X", f32, (1, h, h, ic))
    ax = [axis(n, e) for n, e in zip(("n", "oh", "ow", "oc"), (1, o, o, oc), strict=True)]
    n, y, z, c = (a.var for a in ax)
    kh, kw, ci = axis("kh", k), axis("kw", k), axis("ic", ic)
    iy, ix = y * s + kh.var - p, z * s + kw.var - p
    m = (const(0) <= iy) & (iy < h) & (const(0) <= ix) & (ix < h)
    if depthwise:
        w = Buffer.of("W", f32, (k, k, ic))
        e = sum_([kh, kw], load(x, (n, iy, ix, c), m) * w[kh.var, kw.var, c])
    else:
        w = Buffer.of("W", f32, (k, k, ic, oc))
        e = sum_([kh, kw, ci], load(x, (n, iy, ix, ci.var), m) * w[kh.var, kw.var, ci.var, c])
    xs = rng.standard_normal((1, h, h, ic)).astype("f")
    ws = rng.standard_normal((k, k, ic) if depthwise else (k, k, ic, oc)).astype("f")
    pad = np.pad(xs, ((0, 0), (p, p), (p, p), (0, 0))).astype("d")
    ref = np.zeros((1, o, o, oc))
    for i in range(k):
        for j in range(k):
            sl = pad[:, i : i + (o - 1) * s + 1 : s, j : j + (o - 1) * s + 1 : s]
            ref = ref + (sl * ws[i, j] if depthwise else sl @ ws[i, j].astype("d"))
    return Compute("conv", (x, w), (), (pull("C", ax, maximum(e, 0.0)),), ("C",)), {"X": xs, "W": ws}, np.maximum(ref, 0)


def softmax(r: Any, c: Any, sizes: Mapping[str, int], rng: np.random.Generator) -> Case:
    x = Buffer.of("X", f32, (r, c))
    i, j, k, j1 = axis("r", r), axis("c", c), axis("k", c), axis("c1", c)
    m = pull("m", [i], max_(k, x[i.var, k.var]))
    e = pull("e", [i, j1], unary("exp", x[i.var, j1.var] - m.buf[i.var]))
    s = pull("s", [i], sum_(k, e.buf[i.var, k.var]))
    o = pull("C", [i, j], e.buf[i.var, j.var] / s.buf[i.var])
    sh = [sizes[v.attr[0]] if isinstance(v, Expr) else v for v in (r, c)]
    a = rng.standard_normal(sh).astype("f")
    ref = np.exp(a.astype("d") - a.max(1, keepdims=True))
    return Compute("softmax", (x,), dims_of(r, c), (m, e, s, o), ("C",)), {"X": a}, ref / ref.sum(1, keepdims=True)


def attention(b: int, h: int, q: Any, k: Any, d: int, sizes: Mapping[str, int], rng: np.random.Generator) -> Case:
    tq, tk, tv = Buffer.of("Q", f32, (b, h, q, d)), Buffer.of("K", f32, (b, h, k, d)), Buffer.of("V", f32, (b, h, k, d))

    def rows() -> list[Axis]:
        return [axis("b", b), axis("h", h), axis("i", q)]

    r, j, dd = rows(), axis("j", k), axis("d", d)
    ix = tuple(a.var for a in r)
    s = pull("s", [*r, j], sum_(dd, tq[(*ix, dd.var)] * tk[(*ix[:2], j.var, dd.var)]) * 0.25)
    r, k2 = rows(), axis("k", k)
    m = pull("m", r, max_(k2, s.buf[(*(a.var for a in r), k2.var)]))
    r, j2 = rows(), axis("j", k)
    ix = tuple(a.var for a in r)
    p = pull("p", [*r, j2], unary("exp", s.buf[(*ix, j2.var)] - m.buf[ix]))
    r, k3 = rows(), axis("k", k)
    ll = pull("l", r, sum_(k3, p.buf[(*(a.var for a in r), k3.var)]))
    r, k4, d2 = rows(), axis("k", k), axis("d", d)
    ix = tuple(a.var for a in r)
    o = pull("C", [*r, d2], sum_(k4, p.buf[(*ix, k4.var)] * tv[(*ix[:2], k4.var, d2.var)]) / ll.buf[ix])
    nq, nk = (sizes[v.attr[0]] if isinstance(v, Expr) else v for v in (q, k))
    x, y, z = (rng.standard_normal((b, h, n, d)).astype("f") for n in (nq, nk, nk))
    sc = np.einsum("bhqd,bhkd->bhqk", x.astype("d"), y.astype("d")) * 0.25
    pr = np.exp(sc - sc.max(-1, keepdims=True))
    pr /= pr.sum(-1, keepdims=True)
    comp = Compute("attention", (tq, tk, tv), dims_of(q, k), (s, m, p, ll, o), ("C",))
    return comp, {"Q": x, "K": y, "V": z}, np.einsum("bhqk,bhkd->bhqd", pr, z.astype("d"))
