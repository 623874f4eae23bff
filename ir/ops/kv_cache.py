"""Operators of a decoder over a cache of keys and values that a caller keeps: rows rotated and written, attention over what is there.

The cache of a layer is ``[2, kv_heads, capacity, head]`` (keys, then values), row ``t`` of a head belongs to position ``t``. Both operators
take ``pos`` i64 [1], the position of the first of the S new rows; rows up to it must have been written. A cache of i8 comes with ``scales``
f32 ``[2, kv_heads, capacity]``: a row is 127 times its values over the largest one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import f32, i8, i32, index
from luthier.ir.expr import Expr, bcast, cast, const, load, maximum, minimum, ramp, select, unary, var, vreduce
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Alloc, Buffer, If, Let, Stmt, Store, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, must, need, shape_error, static, type_error
from luthier.ir.ops.kernels import flat, for_, get, kernel, put

LANES = 8


def _heads(node: Node) -> tuple[int, int]:
    return int(node.attrs["heads"]), int(node.attrs["kv_heads"])


def _cache_shape(node: Node, i: int) -> tuple[int, int, int]:
    """(kv heads, capacity, head size) of the cache input. Raises ShapeError, TypeMismatch."""
    c = need(node, i)
    if c.rank != 4 or not (c.dtype.is_float or c.dtype is i8):
        raise type_error(node, "a cache is a tensor of floats or i8 [2, kv_heads, capacity, head]")
    _, h, t, d = (static(node, s, "extents of a cache") for s in c.shape)
    if d % LANES or h != _heads(node)[1]:
        raise shape_error(node, f"heads must have a size that is a multiple of {LANES}, and there must be kv_heads of them")
    return h, t, d


def _scaled(node: Node, i: int) -> bool:
    """Whether the cache is one of i8, whose scales are input ``i``. Raises ShapeError."""
    if need(node, 0).dtype is not i8:
        return False
    h, t, _ = _cache_shape(node, 0)
    s = need(node, i)
    if s.dtype is not f32 or [static(node, e, "extents of scales") for e in s.shape] != [2, h, t]:
        raise shape_error(node, f"a cache of i8 needs scales f32 [2, {h}, {t}]")
    return True


@op("luthier::RotateIntoCache")
class RotateIntoCache(Op):
    """(cache, qkv [S, (heads + 2 kv_heads) head], cos, sin [positions, head / 2], pos, scales) -> (cache, q [S, heads, head], scales).

    Queries and keys are rotated by halves (``x1 cos - x2 sin``, ``x1 sin + x2 cos``); queries are multiplied by ``scale``. Keys and values
    are written into the cache **in place**: the first output is the first input, and the third the sixth (of an i8 cache). Rows behind the
    capacity are dropped."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        h, _, d = _cache_shape(node, 0)
        qkv, n = need(node, 1), _heads(node)[0]
        if qkv.rank != 2 or qkv.shape[1].op == "const" and qkv.shape[1].attr != (n + 2 * h) * d:
            raise shape_error(node, f"qkv must be [S, {(n + 2 * h) * d}]")
        more = [need(node, 5).type] if _scaled(node, 5) else []
        return [need(node, 0).type, TensorType(f32, (qkv.shape[0], const(n), const(d))), *more]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        h, cap, d = _cache_shape(node, 0)
        n, half, width = _heads(node)[0], d // 2, (_heads(node)[0] + 2 * h) * d
        rows = must(ins, 1).shape[0]
        qkv, cos, sin, at = (flat(must(ins, i)) for i in (1, 2, 3, 4))
        cache, q = flat(outs[0]), flat(outs[1])
        scale = const(float(node.attrs.get("scale", 1.0)), f32)
        pos = var("pos", lo=0)
        scales = flat(outs[2]) if _scaled(node, 5) else None
        line = Buffer("line", f32, (const(d),), "local")

        def rounded(which: Expr, s: Expr, fill: Stmt) -> Stmt:
            """``fill`` writes a row to ``line``; it goes to row ``which`` (of keys, then values) of the cache in 8 bits."""
            top, inv = var("top", f32), var("inv", f32)
            parts = [unary("abs", load(line, [ramp(const(i * LANES), 1, LANES)])) for i in range(d // LANES)]
            while len(parts) > 1:
                parts = [maximum(parts[i], parts[i + 1]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
            at = which * cap + pos + s

            def vector(i: Expr) -> Stmt:
                q = unary("round", load(line, [ramp(i * LANES, 1, LANES)]) * bcast(inv, LANES))
                return Store(cache, (ramp(at * d + i * LANES, 1, LANES),), cast(cast(q, i32.vec(LANES)), i8.vec(LANES)))

            assert scales is not None
            return Alloc(line, block(
                fill, Let(top, vreduce("max", parts[0])), Let(inv, select(const(0.0, f32) < top, const(127.0, f32) / top, const(0.0, f32))),
                put(scales, at, top * const(1 / 127, f32)), for_("iv", d // LANES, vector),
            ))  # fmt: skip

        def rotated(s: Expr, first: Expr, store: Any) -> Stmt:
            def lane(i: Expr) -> Stmt:
                a, b = get(qkv, first + i), get(qkv, first + half + i)
                c, w = get(cos, (pos + s) * half + i), get(sin, (pos + s) * half + i)
                return block(store(i, a * c - b * w), store(i + half, a * w + b * c))

            whole = half // LANES
            parts = [for_("io", whole, lambda io: for_("ii", LANES, lambda ii: lane(io * LANES + ii), kind="vectorize"))] if whole else []
            if half % LANES:  # heads of 8 k, k odd
                parts.append(for_("ir", half % LANES, lambda i: lane(whole * LANES + i)))
            return block(*parts)

        def row(s: Expr) -> Stmt:
            base = s * width
            queries = for_("h", n, lambda x: rotated(s, base + x * d, lambda i, v: put(q, (s * n + x) * d + i, v * scale)))
            if scales is None:
                keys = for_("k", h, lambda x: rotated(s, base + (n + x) * d, lambda i, v: put(cache, (x * cap + pos + s) * d + i, v)))
            else:
                keys = for_("k", h, lambda x: rounded(x, s, rotated(s, base + (n + x) * d, lambda i, v: put(line, i, v))))

            def value(x: Expr) -> Stmt:
                first = base + (n + h + x) * d
                if scales is not None:
                    copy = for_("io", d // LANES, lambda io: Store(line, (ramp(io * LANES, 1, LANES),), load(qkv, [ramp(first + io * LANES, 1, LANES)])))
                    return rounded(x + h, s, copy)
                return for_("io", d // LANES, lambda io: for_("ii", LANES, lambda ii: put(cache, ((h + x) * cap + pos + s) * d + io * LANES + ii, get(qkv, first + io * LANES + ii)), kind="vectorize"))

            return block(queries, If(pos + s < cap, block(keys, for_("v", h, value))))

        # positions behind the tables are a caller's error, but must not leave memory
        limit = must(ins, 2).shape[0] - rows
        p = maximum(minimum(cast(load(at, [const(0)]), index), limit), const(0))
        k = kernel(node, ins, outs, (), block(Let(pos, p), for_("s", rows, row, kind="parallel")))
        k.in_place = {outs[0].name: 0} if scales is None else {outs[0].name: 0, outs[2].name: 5}
        return k

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        cache, qkv, cos, sin, at = (np.array(a) for a in arrays[:5])
        n, h = _heads(node)
        d, pos = cache.shape[-1], int(at[0])
        x = qkv.reshape(len(qkv), -1, d).astype(np.float32)
        c, w = cos[pos : pos + len(x), None], sin[pos : pos + len(x), None]
        a, b = x[:, : n + h, : d // 2], x[:, : n + h, d // 2 :]
        r = np.concatenate([a * c - b * w, a * w + b * c], -1)
        q = (r[:, :n] * np.float32(node.attrs.get("scale", 1.0))).astype(np.float32)
        new = np.stack([r[:, n:], x[:, n + h :]]).swapaxes(1, 2)
        if cache.dtype != np.int8:
            cache[:, :, pos : pos + len(x)] = new
            return [cache, q]
        scales = np.array(arrays[5])
        top = np.abs(new).max(-1)
        cache[:, :, pos : pos + len(x)] = np.round(new * (127 / np.where(top == 0, 1, top))[..., None])
        scales[:, :, pos : pos + len(x)] = top / np.float32(127)
        return [cache, q, scales]


@op("luthier::CachedAttention")
class CachedAttention(Op):
    """(cache, q [S, heads, head], pos, scales) -> [S, heads head] f32: causal attention of row s over the positions 0 .. pos + s.

    Query heads share the keys of ``heads / kv_heads`` consecutive ones; the scale is in ``q``. Scores and sums in f32. ``window``: only the last
    so many positions are looked at (its own is one of them); 0: all."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        _, _, d = _cache_shape(node, 0)
        n, h = _heads(node)
        if n % h:
            raise shape_error(node, f"{n} query heads cannot share {h} heads of keys")
        _scaled(node, 3)
        return [TensorType(f32, (need(node, 1).shape[0], const(n * d)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        h, cap, d = _cache_shape(node, 0)
        n = _heads(node)[0]
        window = int(node.attrs.get("window", 0))
        per = n // h
        rows = must(ins, 1).shape[0]
        cache, q, at = (flat(must(ins, i)) for i in (0, 1, 2))
        scales = flat(must(ins, 3)) if _scaled(node, 3) else None
        out = flat(outs[0])
        pos = var("pos", lo=0)
        padded = -(-cap // LANES) * LANES
        score = Buffer("score", f32, (const(per * padded),), "local")
        lane = f32.vec(LANES)

        def vector(b: Buffer, i: Expr) -> Expr:
            return cast(load(b, [ramp(i, 1, LANES)]), lane)

        def head(r: Expr) -> Stmt:
            s, k = r // h, r % h
            last, first = var("last", lo=0), var("first", lo=0) if window else const(0)
            start = first // LANES * LANES  # whole vectors of scores

            def scores(t: Expr) -> Stmt:
                keys = [var(f"key{i}", lane, None) for i in range(d // LANES)]
                load_keys = [Let(v, vector(cache, (k * cap + t) * d + i * LANES)) for i, v in enumerate(keys)]
                dots: list[Stmt] = []
                for g in range(per):
                    acc = [vector(q, (s * n + k * per + g) * d + i * LANES) * keys[i] for i in range(d // LANES)]
                    while len(acc) > 1:
                        acc = [acc[i] + acc[i + 1] if i + 1 < len(acc) else acc[i] for i in range(0, len(acc), 2)]
                    dot = vreduce("add", acc[0])
                    dots.append(Store(score, (g * padded + t,), dot if scales is None else dot * load(scales, [k * cap + t])))
                return block(*load_keys, *dots)

            blocks = (last + LANES) // LANES  # last + 1 positions
            parts: list[Stmt] = [for_("t", last + 1, scores, lo=first)]
            sums = [Buffer(f"sum{g}", lane, (), "local") for g in range(per)]
            tops = [Buffer(f"top{g}", lane, (), "local") for g in range(per)]

            def hide(t: Expr) -> Stmt:
                return block(*(Store(score, (g * padded + t,), const(float("-inf"), f32)) for g in range(per)))

            parts.append(for_("p", blocks * LANES, hide, lo=last + 1))
            if window:
                parts.append(for_("p", first, hide, lo=start))
            parts += [Store(b, (), bcast(const(float("-inf"), f32), LANES)) for b in tops]
            parts.append(for_("b", blocks, lambda b: block(*(Store(x, (), maximum(load(x, ()), vector(score, g * padded + b * LANES))) for g, x in enumerate(tops))), lo=start // LANES))
            highs = [var(f"high{g}", f32) for g in range(per)]
            parts += [Let(v, vreduce("max", load(x, ()))) for v, x in zip(highs, tops, strict=True)]
            parts += [Store(b, (), bcast(const(0.0, f32), LANES)) for b in sums]

            def weights(b: Expr) -> Stmt:
                out_: list[Stmt] = []
                for g in range(per):
                    i = g * padded + b * LANES
                    e = var(f"e{g}", lane, None)
                    out_ += [Let(e, unary("exp", vector(score, i) - bcast(highs[g], LANES))), Store(score, (ramp(i, 1, LANES),), e), Store(sums[g], (), load(sums[g], ()) + e)]
                return block(*out_)

            parts.append(for_("b", blocks, weights, lo=start // LANES))
            inverse = [var(f"inv{g}", f32) for g in range(per)]
            parts += [Let(v, const(1.0, f32) / vreduce("add", load(x, ()))) for v, x in zip(inverse, sums, strict=True)]
            step = max(1, 12 // per)
            for low in range(0, d // LANES, step):
                cols = range(low, min(low + step, d // LANES))
                acc = {(g, c): Buffer(f"o{g}_{c}", lane, (), "local") for g in range(per) for c in cols}

                def sum_values(t: Expr, cols: Any = cols, acc: Any = acc) -> Stmt:
                    vs = {c: var(f"value{c}", lane, None) for c in cols}
                    ps = [var(f"p{g}", lane, None) for g in range(per)]
                    lets: list[Stmt] = [Let(v, vector(cache, ((h + k) * cap + t) * d + c * LANES)) for c, v in vs.items()]
                    scale = None if scales is None else load(scales, [(h + k) * cap + t])
                    lets += [Let(v, bcast(load(score, [g * padded + t]) if scale is None else load(score, [g * padded + t]) * scale, LANES)) for g, v in enumerate(ps)]
                    return block(*lets, *(Store(a, (), load(a, ()) + ps[g] * vs[c]) for (g, c), a in acc.items()))

                body = block(
                    *(Store(a, (), bcast(const(0.0, f32), LANES)) for a in acc.values()),
                    for_("t", last + 1, sum_values, lo=first),
                    *(Store(out, (ramp((s * n + k * per + g) * d + c * LANES, 1, LANES),), load(a, ()) * bcast(inverse[g], LANES)) for (g, c), a in acc.items()),
                )
                for a in acc.values():
                    body = Alloc(a, body)
                parts.append(body)
            begin = [Let(first, maximum(last - (window - 1), const(0)))] if window else []
            whole = block(Let(last, minimum(pos + s, const(cap - 1))), *begin, *parts)
            for b in (*tops, *sums, score):
                whole = Alloc(b, whole)
            return whole

        p = maximum(cast(load(at, [const(0)]), index), const(0))
        return kernel(node, ins, outs, (), block(Let(pos, p), for_("r", rows * h, head, kind="parallel")))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        cache, q, at = (np.asarray(a) for a in arrays[:3])
        n, h = _heads(node)
        if cache.dtype == np.int8:
            cache = cache * np.asarray(arrays[3])[..., None]
        window = int(node.attrs.get("window", 0))
        k, v = (np.repeat(c.astype(np.float64), n // h, 0) for c in cache)
        out = np.empty(q.shape, np.float64)
        for s in range(len(q)):
            t = int(at[0]) + s + 1
            lo = max(0, t - window) if window else 0
            x = np.einsum("hd,htd->ht", q[s].astype(np.float64), k[:, lo:t])
            p = np.exp(x - x.max(-1, keepdims=True))
            out[s] = np.einsum("ht,htd->hd", p / p.sum(-1, keepdims=True), v[:, lo:t])
        return [out.reshape(len(q), -1).astype(np.float32)]
