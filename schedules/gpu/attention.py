"""GPU template for attention: two products with a softmax between them, in one kernel, whatever the number of keys.

A group has a tile of query rows of one head and walks the keys in tiles. For each tile a thread computes the scores of one key
with all rows (their products in registers), the threads of a row find its maximum in shared memory, what was summed so far is
scaled by ``exp(old maximum - new maximum)``, and each thread adds the tile's values to its elements of the output. Scores never
reach memory; ``exp(s - m)`` does not depend on which maximum ``m`` is in the end, because sum and output are scaled alike.

The kernel is built from the expressions of the Compute (scale, mask, epilogue, positions in merged or transposed tensors).
Where the head's size is known to the run only, three kernels take its place: scores, softmax with the division moved into the
probabilities (``sum(e * v) / l = sum((e / l) * v)``), product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from luthier.ir.compute import Axis, Compute, Pull, reduce_
from luthier.ir.dtypes import f32
from luthier.ir.expr import (
    Expr,
    as_expr,
    const,
    free_vars,
    is_const,
    load,
    load_parts,
    loads,
    maximum,
    minimum,
    prove,
    rewrite,
    select,
    substitute,
    unary,
    var,
)
from luthier.ir.loop import Alloc, Buffer, For, If, Stmt, Store, block
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.make_func import make_func
from luthier.schedules.base.schedule import Schedule, ScheduleError, inline
from luthier.schedules.cpu.contract import as_product, factors_of
from luthier.schedules.cpu.rowwise import positions
from luthier.schedules.gpu.elementwise import LANES

THREADS = 128  # of a group, and keys of a tile
ROWS = 8  # query rows of a tile, twice as many where a value is short
WIDE = 256  # the longest head that is kept in registers and shared memory


@dataclass(frozen=True, slots=True)
class Attention:
    """``axes``: of the output, the last two are the row and the position in a value. ``q``, ``k``: the factors of a score, summed over
    ``dims``; ``score``: the score with scale and mask, of the sum ``acc``; ``key``: the axis of the keys; ``v``: a value's element at
    ``key``; ``out``: the result of the quotient ``ratio``. All are over ``axes``."""

    axes: tuple[Axis, ...]
    key: Axis
    dims: tuple[Axis, ...]
    q: Expr
    k: Expr
    acc: Expr
    score: Expr
    v: Expr
    ratio: Expr
    out: Expr
    buf: Buffer


KNOBS = (Knob("rows", "query rows of a group", (8, 16)),)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, rows: int | None = None) -> Any:
    """Kernels, or None when the Compute is no attention. ``rows``: query rows of a tile, 0 for three kernels."""
    from luthier.schedules.select import Kernels, build, build_kernel, cut, join_kernels

    if not caps.gpu:
        return None
    moved = divide_early(s.compute)
    if moved is None:
        return None
    a = match(s) if rows != 0 else None
    if a is not None:
        f = make_func(s.compute.name, _kernel(a, rows), s.compute.dims)
        return Kernels((build_kernel(replace(f, attrs={**f.attrs, "template": "gpu_attention"}), caps),), template="gpu_attention")
    c, first, second = moved
    groups = [list(range(first + 1)), list(range(first + 1, second)), list(range(second, len(c.lets)))]
    return join_kernels([build(p, caps, constants) for p in cut(c, groups)], s.compute)


# ---------------------------------------------------------------- the pattern


def match(s: Schedule) -> Attention | None:
    """The parts of an attention whose result is exactly a softmax's, or None."""
    out = s.compute.outs[0]
    prods = [n for n, st in s.stages.items() if st.reduction is not None and st.reduction.attr[0] == "sum" and as_product(st.reduction.args[0]) is not None]
    sums = {n: st.reduction for n, st in s.stages.items() if st.reduction is not None and n not in prods}
    if len(prods) != 2 or sorted(r.attr[0] for r in sums.values() if r is not None) != ["max", "sum"]:
        return None
    first, second = prods
    top, total = sorted(sums, key=lambda n: sums[n].attr[0])  # type: ignore[union-attr]
    if any(len(s.stages[n].reduction.args) > 1 for n in (first, second, top, total)):  # type: ignore[union-attr]
        return None
    weights = {x.attr[0].name for x in loads(s.stages[total].expr)}
    if len(weights) != 1 or len(s.stages[total].reduction.attr[1]) != 1:  # type: ignore[union-attr]
        return None
    (p,) = weights
    if p not in s.stages:
        return None
    try:
        for n in [n for n in s.stages if n not in (out, p, first, second, top, total)]:
            s = inline(s, n)
    except ScheduleError:
        return None
    pos = positions(s, out)
    o, pt, acc = s.stages[out], s.stages[p], s.stages[second]
    row = len(o.axes) - 2
    if pos is None or row < 0 or pos[second] != list(range(row + 2)) or any(pos[n] != list(range(row + 1)) for n in (top, total)):
        return None
    if any(pos[n] != [*range(row + 1), None] for n in (p, first)) or any(s.stages[n].buf.dtype is not f32 for n in (first, p, second)):
        return None
    mine = {a.var: b.var for a, b in zip(pt.axes, o.axes[: row + 1], strict=False)}
    key = pt.axes[-1]
    e = pt.expr
    if e.op != "exp" or e.args[0].op != "sub":
        return None
    score, shift = e.args[0].args
    st = s.stages[top]
    (last,) = st.reduction.attr[1]  # type: ignore[union-attr]
    same = {a.var: b.var for a, b in zip(st.axes, pt.axes, strict=False)} | {last.var: key.var}
    if key.var in free_vars(shift) or substitute(st.reduction.args[0], same) is not score:  # type: ignore[union-attr]
        return None
    inner = s.stages[first]
    hits = [x for x in loads(score) if x.attr[0].name == first]
    if len(hits) != 1 or load_parts(hits[0])[1] != tuple(a.var for a in pt.axes):
        return None
    f_env = {a.var: b.var for a, b in zip(inner.axes, pt.axes, strict=True)} | mine
    q, k = factors_of(inner)
    if inner.axes[-1].var in free_vars(q):
        q, k = k, q
    if inner.axes[-1].var in free_vars(q) or inner.reduction.args[0].op != "mul":  # type: ignore[union-attr]
        return None
    value = acc.reduction.args[0]  # type: ignore[union-attr]
    (n_axis,) = acc.reduction.attr[1] if len(acc.reduction.attr[1]) == 1 else (None,)  # type: ignore[union-attr]
    if n_axis is None or value.op != "mul":
        return None
    w, v = factors_of(acc)
    if not any(x.attr[0].name == p for x in loads(w)):
        w, v = v, w
    if w.op != "load" or load_parts(w)[1] != (*(a.var for a in acc.axes[: row + 1]), n_axis.var) or any(x.attr[0].name == p for x in loads(v)):
        return None
    if any(x.op != "const" for x in (o.axes[-1].extent, *(a.extent for a in inner.reduction.attr[1]))):  # type: ignore[union-attr]
        return None
    dims = tuple(inner.reduction.attr[1])  # type: ignore[union-attr]
    if int(o.axes[-1].extent.attr) > WIDE or math.prod(int(a.extent.attr) for a in dims) > WIDE:
        return None
    found = _quotient(o.expr, second, total, tuple(a.var for a in o.axes))
    if found is None:
        return None
    ratio, result = found
    v_env = {a.var: b.var for a, b in zip(acc.axes, o.axes, strict=True)} | {n_axis.var: key.var}
    hit = var("score~", f32)
    score = substitute(rewrite(score, lambda x: hit if x is hits[0] else None), mine)
    made = set(s.stages)
    exprs = [substitute(q, f_env), substitute(k, f_env), score, substitute(v, v_env), result]
    if any(x.attr[0].name in made for e in exprs for x in loads(e)):
        return None
    return Attention(o.axes, key, dims, exprs[0], exprs[1], hit, score, exprs[3], ratio, result, o.buf)


def _quotient(e: Expr, acc: str, total: str, axes: tuple[Expr, ...]) -> tuple[Expr, Expr] | None:
    """(a variable for the weighted sum over the sum of weights, ``e`` with it); a sum of zero may be replaced by one."""
    ratio = var("ratio~", f32)

    def f(x: Expr) -> Expr | None:
        if x.op != "div" or x.args[0].op != "load" or x.args[0].attr[0].name != acc or load_parts(x.args[0])[1] != axes:
            return None
        t = x.args[1]
        if t.op == "select":
            c, one, t = t.args
            if c.op != "eq" or set(c.args) != {t, const(0.0, f32)} or not is_const(one, 1):
                return None
        ok = t.op == "load" and t.attr[0].name == total and load_parts(t)[1] == axes[:-1]
        return ratio if ok else None

    r = rewrite(e, f)
    return (ratio, r) if not any(x.attr[0].name in (acc, total) for x in loads(r)) else None


# ---------------------------------------------------------------- the kernel


class _Group:
    """Names and loops of a group of ``rows`` x ``lanes`` threads."""

    def __init__(self, rows: int, lanes: int) -> None:
        self.rows, self.lanes = rows, lanes
        self.count = 0

    def fresh(self, name: str, extent: Any) -> Expr:
        self.count += 1
        return var(f"{name}~{self.count}", lo=0, hi=as_expr(extent) - 1)

    def loop(self, name: str, n: Any, body: Callable[[Expr], Stmt], kind: str = "serial") -> Stmt:
        n = as_expr(n)
        if is_const(n, 1):
            return body(const(0))
        v = self.fresh(name, n)
        return For(v, const(0), n, kind, body(v))

    def threads(self, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
        return self.loop("y", self.rows, lambda y: self.loop("x", self.lanes, lambda x: body(y, x), "thread.x"), "thread.y")

    def each(self, n: int, body: Callable[[Expr], Stmt]) -> Stmt:
        return self.loop("u", n, body, "unroll")


def _local(name: str, *shape: int) -> Buffer:
    return Buffer(name, f32, tuple(as_expr(n) for n in shape), "local")


def _clamp(i: Expr, n: Expr) -> Expr:
    return i if prove(i < n) else minimum(i, n - 1)


def _within(cond: Expr, s: Stmt) -> Stmt:
    return s if prove(cond) else If(cond, s)


def _kernel(a: Attention, rows: int | None) -> Stmt:
    row, last = a.axes[-2], a.axes[-1]
    n_rows, n_keys, width = row.extent, a.key.extent, int(last.extent.attr)
    r = rows or (2 * ROWS if width * ROWS <= THREADS * LANES // 2 else ROWS)
    if row.var in free_vars(a.k) | free_vars(a.v):  # every row has keys of its own
        r = 1
    while r > 1 and n_rows.op == "const" and r // 2 >= n_rows.attr:
        r //= 2
    g = _Group(r, THREADS // r)
    own = LANES if width % LANES == 0 and width >= g.lanes * LANES else 1  # neighbours in a value that a thread has
    lanes, turns = g.lanes, -(-width // (g.lanes * own)) * own
    depth = math.prod(int(x.extent.attr) for x in a.dims)
    near = LANES if depth % LANES == 0 else 1
    lowest = const(f32.limits()[0] if math.isfinite(f32.limits()[0]) else -3.4028234663852886e38, f32)
    zero = const(0.0, f32)
    tiles = (n_rows + (r - 1)) // r
    grid = tiles
    for x in a.axes[:-2]:
        grid = grid * x.extent
    qs, sc, part = (Buffer(n, f32, tuple(as_expr(x) for x in shape), "shared") for n, shape in (("q.s", (r, depth)), ("s.s", (r, THREADS)), ("part", (r, lanes))))
    top, total, acc = _local("top", r, lanes), _local("total", r, lanes), _local("acc", r, lanes, turns)
    merged = _local("merged")  # of one row: what all threads have together
    whole = var("group", lo=0, hi=grid - 1)
    env: dict[Expr, Expr] = {}
    left = whole // tiles
    for x in reversed(a.axes[1:-2]):
        env[x.var] = left % x.extent
        left = left // x.extent
    if len(a.axes) > 2:
        env[a.axes[0].var] = left
    base = whole % tiles * r

    def at(e: Expr, y: Expr, key: Expr | None = None, col: Expr | None = None) -> Expr:
        here = {**env, row.var: _clamp(base + y, n_rows)}
        if key is not None:
            here[a.key.var] = _clamp(key, n_keys)
        if col is not None:
            here[last.var] = _clamp(col, last.extent)
        return substitute(e, here)

    def over(e: Expr, d: Expr) -> Expr:
        out: dict[Expr, Expr] = {}
        for x in reversed(a.dims):
            out[x.var] = d % x.extent
            d = d // x.extent
        return substitute(e, out)

    def column(j: Expr, x: Expr) -> Expr:
        """The element of a value that is the ``j``-th one of thread ``x``."""
        return (j // own * lanes + x) * own + j % own

    def fill(y: Expr, x: Expr) -> Stmt:
        def step(j: Expr) -> Stmt:
            d = (j * lanes + x) * near
            return _within(j * lanes + x < depth // near, g.each(near, lambda u: Store(qs, (y, d + u), over(at(a.q, y), d + u))))

        return g.loop("j", -(-depth // (lanes * near)), step)

    def start(y: Expr, x: Expr) -> Stmt:
        return block(Store(top, (y, x), lowest), Store(total, (y, x), zero), g.each(turns, lambda j: Store(acc, (y, x, j), zero)))

    def scores(first: Expr, y: Expr, x: Expr) -> Stmt:
        dot = _local("dot", r)
        me = y * lanes + x

        def add(u: Expr, d: Expr) -> Stmt:
            return Store(dot, (u,), load(dot, (u,)) + load(qs, (u, d)) * over(at(a.k, u, key=first + me), d))

        sums = g.loop("d", depth // near, lambda d: g.each(r, lambda u: g.each(near, lambda v: add(u, d * near + v))))
        done = g.each(r, lambda u: Store(sc, (u, me), substitute(at(a.score, u, key=first + me), {a.acc: load(dot, (u,))})))
        return Alloc(dot, block(g.each(r, lambda u: Store(dot, (u,), zero)), sums, done))

    def peak(first: Expr, y: Expr, x: Expr) -> Stmt:
        m = _local("m")
        step = g.loop("j", THREADS // lanes, lambda j: Store(m, (), select(first + j * lanes + x < n_keys, maximum(load(m, ()), load(sc, (y, j * lanes + x))), load(m, ()))))
        return Alloc(m, block(Store(m, (), lowest), step, Store(part, (y, x), load(m, ()))))

    def merge(start: Expr, op: Callable[[Expr, Expr], Expr]) -> Stmt | None:
        """The partial results of the only row, merged by all threads alike."""
        if r > 1:
            return None
        j = g.fresh("j", lanes)
        step = For(j, const(0), as_expr(lanes), "subgroup", Store(merged, (), op(load(merged, ()), load(part, (const(0), j)))))
        return block(Store(merged, (), start), step)

    def rescale(first: Expr, y: Expr, x: Expr) -> Stmt:
        m, c = _local("m"), _local("c")
        if r == 1:
            found: Stmt = Store(m, (), maximum(load(m, ()), load(merged, ())))
        else:
            found = g.loop("j", lanes, lambda j: Store(m, (), maximum(load(m, ()), load(part, (y, j)))))

        def weigh(j: Expr) -> Stmt:
            place = (y, j * lanes + x)
            w = select(first + j * lanes + x < n_keys, unary("exp", load(sc, place) - load(top, (y, x))), zero)
            return block(Store(sc, place, w), Store(total, (y, x), load(total, (y, x)) + load(sc, place)))

        return Alloc(m, Alloc(c, block(
            Store(m, (), load(top, (y, x))), found, Store(c, (), unary("exp", load(top, (y, x)) - load(m, ()))), Store(top, (y, x), load(m, ())),
            Store(total, (y, x), load(total, (y, x)) * load(c, ())),
            g.each(turns, lambda j: Store(acc, (y, x, j), load(acc, (y, x, j)) * load(c, ()))),
            g.loop("j", THREADS // lanes, weigh),
        )))  # fmt: skip

    def values(first: Expr, y: Expr, x: Expr) -> Stmt:
        count = const(THREADS) if prove((n_keys % THREADS).eq(0)) else minimum(const(THREADS), n_keys - first)
        return g.loop("n", count, lambda n: g.each(turns, lambda j: Store(acc, (y, x, j), load(acc, (y, x, j)) + load(sc, (y, n)) * at(a.v, y, key=first + n, col=column(j, x)))))

    def finish(y: Expr, x: Expr) -> Stmt:
        z = _local("z")

        def store(j: Expr) -> Stmt:
            e = column(j, x)
            value = at(substitute(a.out, {a.ratio: load(acc, (y, x, j)) / load(z, ())}), y, col=e)
            s: Stmt = Store(replace(a.buf, scope="param"), (*(env[b.var] for b in a.axes[:-2]), base + y, e), value)
            return _within((base + y < n_rows) & (e < last.extent), s)

        some = select(load(z, ()).eq(zero), const(1.0, f32), load(z, ()))
        summed = g.loop("j", lanes, lambda j: Store(z, (), load(z, ()) + load(part, (y, j)))) if r > 1 else Store(z, (), load(merged, ()))
        return Alloc(z, block(Store(z, (), zero), summed, Store(z, (), some), g.each(turns, store)))

    def tile(k: Expr) -> Stmt:
        f = k * THREADS
        do = [g.threads(lambda y, x, step=step: step(f, y, x)) for step in (scores, peak, rescale, values)]  # type: ignore[misc]
        return block(*do[:2], merge(lowest, maximum), *do[2:])

    body = block(
        g.threads(fill), g.threads(start), g.loop("tile", (n_keys + (THREADS - 1)) // THREADS, tile),
        g.threads(lambda y, x: Store(part, (y, x), load(total, (y, x)))), merge(zero, lambda a, b: a + b), g.threads(finish),
    )  # fmt: skip
    for b in (*((merged,) if r == 1 else ()), acc, total, top, part, sc, qs):
        body = Alloc(b, body)
    return For(whole, const(0), grid, "block.x", body)


# ---------------------------------------------------------------- three kernels


def divide_early(c: Compute) -> tuple[Compute, int, int] | None:
    """(the Compute with normalised probabilities, number of the let that ends the scores, number of the second product)."""
    lets = list(c.lets)
    if not all(isinstance(x, Pull) for x in lets) or len(c.outs) != 1:
        return None
    pulls = [x for x in lets if isinstance(x, Pull)]
    prods = [i for i, x in enumerate(pulls) if x.expr.op == "reduce" and x.expr.attr[0] == "sum" and as_product(x.expr.args[0]) is not None]
    if len(prods) != 2 or prods[1] != len(pulls) - 2 or pulls[-1].name != c.outs[0]:
        return None
    one, two = prods
    acc, out = pulls[two], pulls[-1]
    e = out.expr
    if e.op != "div" or e.args[0].op != "load" or e.args[0].attr[0].name != acc.name or out.axes[-1].var in free_vars(e.args[1]):
        return None
    if not all(i is a.var for i, a in zip(load_parts(e.args[0])[1], out.axes, strict=True)):
        return None
    made = {x.name for x in pulls[one + 1 : two]}
    weights = [x for x in loads(acc.expr) if x.attr[0].name in made]
    if len(weights) != 1 or len(acc.expr.args) > 1:
        return None
    source = next(x for x in pulls if x.name == weights[0].attr[0].name)
    idx = load_parts(weights[0])[1]
    if len(idx) != len(source.axes) or any(i.op != "var" for i in idx):
        return None
    back: dict[Expr, Expr] = {i: a.var for i, a in zip(idx, source.axes, strict=True)}
    total = substitute(e.args[1], {a.var: b.var for a, b in zip(out.axes, acc.axes, strict=True)})
    if not free_vars(total) & {a.var for a in acc.axes} <= back.keys():
        return None
    pb = replace(source.buf, name=f"{out.name}.p")
    probs = Pull(pb, source.axes, load(source.buf, [a.var for a in source.axes]) / substitute(total, back))
    body = rewrite(acc.expr.args[0], lambda x: load(pb, idx) if x is weights[0] else None)
    acc = Pull(acc.buf, acc.axes, reduce_("sum", acc.expr.attr[1], body))
    last = Pull(out.buf, out.axes, e.args[0])
    end = one
    while end + 1 < two and pulls[end + 1].expr.op != "reduce" and all(ld.attr[0].name not in made or ld.attr[0].name == pulls[end].name for ld in loads(pulls[end + 1].expr)):
        end += 1
    new = (*pulls[:two], probs, acc, last)
    return replace(c, lets=new), end, two + 1
