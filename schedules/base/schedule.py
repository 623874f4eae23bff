"""Schedule: how a Compute is executed, and the eight primitives that change it.

A :class:`Schedule` holds one :class:`Stage` for every tensor that the Compute defines. A stage has an ordered list of loops
(spatial ones and, for a reduction, reduction ones), how each axis is rebuilt from the loops (``subst``), where its nest lives
(``at``: at the root, or inside a loop of the stage that consumes it) and in which scope its buffer lies. Primitives are pure:
each returns a new Schedule and appends itself to ``trace``, which is the schedule's serialised form.

Loops are named ``tensor.axis``; a split makes ``tensor.axis.0`` (outer) and ``tensor.axis.1`` (inner) unless ``into`` names
them. The extent of a loop ``v`` is known under a placeholder ``v#``, so that a tail, or a tile whose size follows from its
consumer, resolves all derived extents when the schedule is lowered (:mod:`luthier.schedules.base.lower`).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.ir.compute import MONOIDS, Axis, Compute, Fold, Pull, Push, let_exprs, normalize, reduce_
from luthier.ir.errors import LuthierError
from luthier.ir.expr import Expr, as_expr, bounds, const, load, load_parts, loads, rewrite, select, substitute, var, walk
from luthier.ir.intrin import Instruction
from luthier.ir.loop import KINDS, Buffer

RUN = 256  # terms that a reduction sums one after another, see `in_runs`


class ScheduleError(LuthierError):
    """A primitive that would not be legal here; the message says what stands in the way."""


@dataclass(frozen=True, slots=True)
class Loop:
    """``var``: schedule variable. ``cut``: variable of the inner loop whose extent shrinks in a separate tail iteration.
    ``instr``: the instruction that does this reduction loop and the vector loop inside it at once."""

    var: Expr
    kind: str = "serial"
    reduce: bool = False
    cut: Expr | None = None
    tail: str = ""
    instr: Instruction | None = None

    @property
    def name(self) -> str:
        return self.var.attr[0]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Stage:
    """The nest that computes one tensor. ``pad``: axes (numbers) whose overhang is computed in full because every operand is padded."""

    buf: Buffer
    axes: tuple[Axis, ...]
    expr: Expr
    loops: tuple[Loop, ...]
    subst: dict[Expr, Expr]
    guards: tuple[tuple[Expr, Expr], ...] = ()
    at: tuple[str, Expr] | None = None
    scope: str = "global"
    pad: frozenset[int] = frozenset()
    push: Push | None = None
    fold: Fold | None = None

    @property
    def name(self) -> str:
        return self.buf.name

    @property
    def reduction(self) -> Expr | None:
        e = self.expr
        return e if e.op == "reduce" else e.args[0] if e.op == "proj" else None

    def find(self, name: str) -> int:
        for i, lp in enumerate(self.loops):
            if lp.name == name or lp.name == f"{self.name}.{name}":
                return i
        raise ScheduleError(f"tensor {self.name} has no loop {name!r}; its loops are {[lp.name for lp in self.loops]}")


@functools.lru_cache(maxsize=4096)
def hash_var(v: Expr) -> Expr:
    """The placeholder for the extent of loop ``v``."""
    return var(v.attr[0] + "#", lo=0)


_packed: dict[Any, tuple[weakref.ref[Any], weakref.ref[Any]]] = {}


@dataclass(frozen=True, slots=True)
class Packing:
    """A re-laid-out copy of ``param``: dimensions in ``order`` (tiled ones in blocks), then the tiles; ``job`` computes it."""

    param: str
    order: tuple[int, ...]
    tile: tuple[tuple[int, int], ...]
    job: Compute
    buf: Buffer

    def apply(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The packed copy of an array, zero padded; raises ValueError when the rank does not fit. Nobody writes to it: while one is
        alive, the same packing of the same array is the same copy."""
        key = (id(a), self.order, self.tile)
        hit = _packed.get(key)
        if hit is not None:
            source, copy = hit[0](), hit[1]()
            if source is a and copy is not None:
                return copy
        out = self.copy(a)
        out.setflags(write=False)
        _packed[key] = weakref.ref(a, lambda _: _packed.pop(key, None)), weakref.ref(out)
        return out

    def copy(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if a.ndim != len(self.order):
            raise ValueError(f"{self.param} has {a.ndim} dimensions, its packing {len(self.order)}")
        tile = dict(self.tile)
        blocks = [-(-n // tile.get(d, 1)) for d, n in enumerate(a.shape)]
        whole = all(n % tile.get(d, 1) == 0 for d, n in enumerate(a.shape))
        shape = [blocks[d] for d in self.order] + [t for _, t in self.tile]
        out: np.ndarray[Any, Any] = (np.empty if whole else np.zeros)(shape, a.dtype)
        place = [self.order.index(d) for d in range(a.ndim)] + [a.ndim + k for k in range(len(self.tile))]
        to = out.transpose(place)  # blocks in the order of a's dimensions, then tiles
        parts = [[(slice(0, n), slice(None), None)] if d not in tile else _pieces(n, tile[d]) for d, n in enumerate(a.shape)]
        for piece in itertools.product(*parts):
            src = a[tuple(x for x, _, _ in piece)]
            cut = [(b.stop - b.start, t.stop) if t is not None else (n,) for (_, b, t), n in zip(piece, src.shape, strict=True)]
            tiled = [k for k, c in enumerate(cut) if len(c) == 2]
            src = src.reshape([x for c in cut for x in c])
            at = list(itertools.accumulate((len(c) for c in cut), initial=0))
            src = src.transpose([at[k] for k in range(a.ndim)] + [at[d] + 1 for d, _ in self.tile if d in tiled])
            to[tuple(b for _, b, _ in piece) + tuple(piece[d][2] for d, _ in self.tile)] = src
        return out


def _pieces(n: int, t: int) -> list[tuple[slice, slice, slice | None]]:
    """(elements, blocks, places in a block) of ``n`` elements in blocks of ``t``: the full blocks, then the rest."""
    full, rest = n // t, n % t
    out: list[tuple[slice, slice, slice | None]] = [(slice(0, full * t), slice(0, full), slice(0, t))] if full else []
    return out + ([(slice(full * t, n), slice(full, full + 1), slice(0, rest))] if rest else [])


@dataclass(frozen=True, slots=True)
class Schedule:
    compute: Compute
    stages: dict[str, Stage]
    ext: dict[Expr, Expr]
    packed: dict[str, Packing] = field(default_factory=dict)
    trace: tuple[tuple[Any, ...], ...] = ()
    special: tuple[Expr, ...] = ()  # conditions of a second version (:mod:`luthier.schedules.base.specialize`)
    run: int = 0  # a float sum adds at most so many terms to one accumulator before it starts another (0: any number); see `in_runs`

    def stage_of(self, loop: str) -> tuple[Stage, int]:
        for st in self.stages.values():
            for i, lp in enumerate(st.loops):
                if lp.name == loop:
                    return st, i
        raise ScheduleError(f"no loop named {loop!r}")

    def put(self, st: Stage, *entry: Any, ext: dict[Expr, Expr] | None = None) -> Schedule:
        stages = dict(self.stages)
        stages[st.name] = st
        e = self.ext if ext is None else {**self.ext, **ext}
        return replace(self, stages=stages, ext=e, trace=(*self.trace, entry) if entry else self.trace)

    def static_extent(self, v: Expr) -> int | None:
        """The extent of a loop when it is one number regardless of tails and regions."""
        e = substitute(self.ext[v], {hash_var(u): self.ext[u] for u in self.ext}) if self.ext[v].op != "const" else self.ext[v]
        return e.attr if e.op == "const" else None


def pull_stage(p: Pull, ext: dict[Expr, Expr], owner: str = "") -> Stage:
    name = p.buf.name
    loops: list[Loop] = []
    subst: dict[Expr, Expr] = {}

    def add(a: Axis, reduce: bool) -> None:
        base = a.name.rstrip("'")
        n, k = f"{name}.{base}", 1
        while any(lp.name == n for lp in loops):
            n, k = f"{name}.{base}{k}", k + 1
        v = var(n, lo=None)
        loops.append(Loop(v, reduce=reduce))
        subst[a.var] = v
        ext[v] = a.extent

    for a in p.axes:
        add(a, False)
    red = p.expr if p.expr.op == "reduce" else p.expr.args[0] if p.expr.op == "proj" else None
    if red is not None:
        for a in red.attr[1]:
            add(a, True)
    return Stage(p.buf, p.axes, p.expr, tuple(loops), subst)


def schedule(compute: Compute) -> Schedule:
    """The default schedule: every tensor at the root, loops serial in the order of its axes, reductions innermost."""
    c = normalize(compute)
    stages: dict[str, Stage] = {}
    ext: dict[Expr, Expr] = {}
    for x in c.lets:
        if isinstance(x, Pull):
            stages[x.name] = pull_stage(x, ext)
        elif isinstance(x, Push):
            stages[x.name] = replace(pull_stage(Pull(x.buf, x.axes, x.init), ext), push=x)
        else:
            _fold_stages(x, stages, ext)
    return Schedule(c, stages, ext)


def _fold_stages(f: Fold, stages: dict[str, Stage], ext: dict[Expr, Expr]) -> None:
    """A Fold is a stage of its own whose loops are the shared axes and the fold axis; steps, next values and emits live in it."""
    buf = Buffer(f.name, f.state[0].buf.dtype, (), "local")
    loops, subst = [], {}
    for a in (*f.axes, f.axis):
        v = var(f"{f.name}.{a.name}", lo=None)
        loops.append(Loop(v, reduce=a is f.axis))
        subst[a.var] = v
        ext[v] = a.extent
    t = loops[-1].var
    inner: list[Stage] = []
    for p in f.step:
        inner.append(replace(pull_stage(p, ext), at=(f.name, t), scope="local"))
    for e in f.emit:
        inner.append(replace(pull_stage(e, ext), at=(f.name, t), scope="global"))
    for s in f.state:
        nb = Buffer(s.buf.name + ".next", s.buf.dtype, s.buf.shape, "local")
        inner.append(replace(pull_stage(Pull(nb, s.axes, s.next), ext), at=(f.name, t), scope="local"))
    for st in inner:
        stages[st.name] = st
    stages[f.name] = Stage(buf, (*f.axes, f.axis), const(0, buf.dtype), tuple(loops), subst, fold=f)


# ---------------------------------------------------------------- the eight primitives


def split(s: Schedule, loop: str, factor: int, tail: str = "guard", into: tuple[str, str] | None = None) -> Schedule:
    """``for i < N`` -> ``for i.0 < ceil(N / factor): for i.1 < factor`` with ``i = i.0 * factor + i.1``.

    ``tail``: ``guard`` masks the overhang; ``cut`` peels the last round, whose inner extent is ``N mod factor``; ``min`` gives every
    round the extent ``min(factor, N - i.0 * factor)`` (for an outer loop whose rounds are large); ``pad`` computes
    the overhang in full (every operand must be staged with padding, and the result of the overhang must not be stored).
    Raises ScheduleError for a factor below 1 or an unknown loop."""
    if factor < 1:
        raise ScheduleError(f"split factor {factor} of {loop} must be at least 1")
    st, i = s.stage_of(loop)
    old = st.loops[i]
    no, ni = into or (f"{old.name}.0", f"{old.name}.1")
    vo, vi = (var(n if n.startswith(st.name + ".") else f"{st.name}.{n}", lo=None) for n in (no, ni))
    if vo in s.ext or vi in s.ext:
        raise ScheduleError(f"loop name {vo!r} or {vi!r} is taken")
    h = hash_var(old.var)
    ext = {vo: (h + (factor - 1)) // factor, vi: as_expr(factor)}
    lo = Loop(vo, old.kind, old.reduce, cut=vi if tail in ("cut", "min") else None, tail=tail)
    li = Loop(vi, "serial", old.reduce)
    sub = {k: substitute(e, {old.var: vo * factor + vi}) for k, e in st.subst.items()}
    guards = tuple((substitute(e, {old.var: vo * factor + vi}), b) for e, b in st.guards)
    n = s.static_extent(old.var)
    axis_root = next((k for k, a in enumerate(st.axes) if st.subst[a.var] is old.var), None)
    if n is None or n % factor or old.var not in st.subst.values():
        guards = (*guards, (vo * factor + vi, h))
    pad = st.pad
    if tail == "pad" and axis_root is not None:
        pad = pad | {axis_root}
    loops = (*st.loops[:i], lo, li, *st.loops[i + 1 :])
    st2 = replace(st, loops=loops, subst=sub, guards=guards, pad=pad)
    return s.put(st2, "split", loop, factor, tail, into, ext=ext)


def reorder(s: Schedule, *order: str) -> Schedule:
    """The named loops of one stage take the positions they hold together in the given order; other loops stay.

    Raises ScheduleError when loops belong to different stages."""
    st, _ = s.stage_of(order[0])
    idx = [st.find(n) for n in order]
    if len(set(idx)) != len(idx):
        raise ScheduleError(f"reorder names a loop twice: {order}")
    slots = sorted(idx)
    loops = list(st.loops)
    for slot, k in zip(slots, idx, strict=True):
        loops[slot] = st.loops[k]
    return s.put(replace(st, loops=tuple(loops)), "reorder", *order)


def fuse(s: Schedule, outer: str, inner: str, into: str | None = None) -> Schedule:
    """``for i < N: for j < M`` -> ``for f < N * M`` with ``i = f // M``, ``j = f % M``. The loops must be adjacent and of one sort."""
    st, a = s.stage_of(outer)
    b = st.find(inner)
    if b != a + 1 or st.loops[a].reduce != st.loops[b].reduce:
        raise ScheduleError(f"fuse needs adjacent loops of one sort, got {outer} and {inner}")
    lo, li = st.loops[a], st.loops[b]
    name = into or f"{lo.name.removeprefix(st.name + '.')}_{li.name.removeprefix(st.name + '.')}"
    v = var(f"{st.name}.{name}", lo=None)
    m = hash_var(li.var)
    env = {lo.var: v // m, li.var: v % m}
    sub = {k: substitute(e, env) for k, e in st.subst.items()}
    guards = tuple((substitute(e, env), h) for e, h in st.guards)
    loops = (*st.loops[:a], Loop(v, lo.kind, lo.reduce), *st.loops[b + 1 :])
    return s.put(replace(st, loops=loops, subst=sub, guards=guards), "fuse", outer, inner, into, ext={v: hash_var(lo.var) * m})


def annotate(s: Schedule, loop: str, kind: str) -> Schedule:
    """Changes how a loop runs: parallel, vectorize, unroll, serial, or a GPU grid or group index.

    Raises ScheduleError when a reduction loop is asked to be parallel (stage it with ``private`` first)."""
    if kind not in KINDS:
        raise ScheduleError(f"no loop kind {kind!r}; kinds are {KINDS}")
    st, i = s.stage_of(loop)
    if st.loops[i].reduce and kind not in ("serial", "unroll", "vectorize", "subgroup", "matrix"):
        raise ScheduleError(f"{loop} is a reduction: make its partial results private first (stage with private=)")
    loops = (*st.loops[:i], replace(st.loops[i], kind=kind), *st.loops[i + 1 :])
    return s.put(replace(st, loops=loops), "annotate", loop, kind)


def inline(s: Schedule, tensor: str) -> Schedule:
    """A tensor without reduction is substituted into its consumers and no longer stored.

    Before ``t[i] = f(i); u[i] = g(t[i+1])``, after ``u[i] = g(f(i+1))``."""
    st = s.stages[tensor]
    if st.reduction is not None or st.push or st.fold or tensor in s.compute.outs:
        raise ScheduleError(f"{tensor} cannot be inlined: it is a reduction, a push, a fold or an output")
    axes = [a.var for a in st.axes]

    def repl(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0].name == tensor:
            _, idx, mask, other = load_parts(e)
            v = substitute(st.expr, dict(zip(axes, idx, strict=True)))
            return v if mask is None else select(mask, _mask_loads(v, mask), other)
        return None

    out = s
    stages = {}
    for n, x in s.stages.items():
        if n == tensor:
            continue
        x = replace(x, expr=rewrite(x.expr, repl))
        if x.push is not None:
            p = x.push
            x = replace(x, push=replace(p, init=rewrite(p.init, repl), index=tuple(rewrite(i, repl) for i in p.index), value=rewrite(p.value, repl), where=None if p.where is None else rewrite(p.where, repl)))
        if x.fold is not None:
            x = replace(x, fold=replace(x.fold, state=tuple(replace(q, init=rewrite(q.init, repl)) for q in x.fold.state)))
        stages[n] = x
    out = replace(out, stages=stages, trace=(*s.trace, ("inline", tensor)))
    return out


def _mask_loads(v: Expr, mask: Expr) -> Expr:
    """Loads of ``v`` happen only under ``mask`` as well."""

    def f(e: Expr) -> Expr | None:
        if e.op == "load":
            buf, idx, m, o = load_parts(e)
            return load(buf, idx, mask if m is None else m & mask, o)
        return None

    return rewrite(v, f)


def stage(
    s: Schedule, tensor: str, at: str | None = None, scope: str = "local", *, private: str | None = None, pad: Iterable[int] = (),
) -> Schedule:
    """Where and in which memory a tensor is computed.

    ``stage(s, "t", at="u.i")``: t's nest moves inside loop ``i`` of its consumer u; only the box that this iteration of u reads is
    computed, into a buffer of ``scope`` with the box's size. ``stage(s, "t", private="t.k")`` (rfactor): the partial results of
    reduction loop ``k`` become a tensor ``t.p`` with ``k`` as an extra axis, merged by the monoid afterwards. ``pad``: axes whose
    overhang is computed because every operand is padded. For a copy of a parameter see :func:`cache` and :func:`pack`."""
    if private is not None:
        return _privatize(s, tensor, private)
    st = s.stages[tensor]
    if at is None:
        return s.put(replace(st, at=None, scope=scope, pad=st.pad | set(pad)), "stage", tensor, at, scope)
    consumer, i = s.stage_of(at)
    if tensor in s.compute.outs:
        raise ScheduleError(f"{tensor} is an output and cannot be staged inside {consumer.name}")
    st2 = replace(st, at=(consumer.name, consumer.loops[i].var), scope=scope, pad=st.pad | set(pad))
    return s.put(st2, "stage", tensor, at, scope)


def cache(s: Schedule, param: str, reader: str, at: str, scope: str = "local", name: str | None = None) -> Schedule:
    """A copy of the box of ``param`` that one iteration of ``at`` reads. Before ``u = f(A[..])``, after ``A.c = A; u = f(A.c[..])``."""
    rd = s.stages[reader]
    buf = next((ld.attr[0] for ld in loads(rd.expr) if ld.attr[0].name == param), None)
    if buf is None:
        raise ScheduleError(f"{reader} does not read {param}")
    axes = tuple(Axis(var(f"a{d}", lo=0, hi=n - 1), n) for d, n in enumerate(buf.shape))
    nb = Buffer(name or f"{param}.c", buf.dtype, buf.shape, scope)
    ext = dict(s.ext)
    st = pull_stage(Pull(nb, axes, load(buf, [a.var for a in axes])), ext)
    new = rewrite(rd.expr, lambda e: load(nb, *_rest(e)) if e.op == "load" and e.attr[0] is buf else None)
    stages: dict[str, Stage] = {}
    for n, x in s.stages.items():
        if n == reader:
            stages[nb.name] = st
            x = replace(x, expr=new)
        stages[n] = x
    out = replace(s, stages=stages, ext=ext, trace=(*s.trace, ("cache", param, reader, at, scope, name)))
    return stage(out, nb.name, at, scope)


def _rest(e: Expr) -> tuple[Any, ...]:
    _, idx, m, o = load_parts(e)
    return idx, m, o


def pack(s: Schedule, param: str, order: tuple[int, ...], tile: dict[int, int], name: str | None = None) -> Schedule:
    """A re-laid-out copy of a whole parameter, made before the kernel runs (at compile time when the parameter is constant).

    ``tile``: {dimension: t} splits a dimension into (blocks, t), zero padded; ``order`` permutes the dimensions of the blocks, tiles
    follow at the end in the order of ``tile``. Before ``u = f(B[k, j])``, after ``order=(1, 0), tile={1: 16}``:
    ``B.pack[j0, k, j1] = B[k, j0 * 16 + j1]``, ``u = f(B.pack[j // 16, k, j % 16])``."""
    buf = next((b for b in s.compute.params if b.name == param), None)
    if buf is None:
        raise ScheduleError(f"no parameter named {param}")
    n = name or f"{param}.pack"
    outer = [(buf.shape[d] + (tile[d] - 1)) // tile[d] if d in tile else buf.shape[d] for d in order]
    ax = [Axis(var(f"p{i}", lo=0, hi=x - 1), x) for i, x in enumerate([*outer, *(as_expr(t) for t in tile.values())])]
    src: list[Any] = [None] * buf.rank
    mask = as_expr(1).eq(1)
    for i, d in enumerate(order):
        src[d] = ax[i].var
    for i, (d, t) in enumerate(tile.items()):
        src[d] = src[d] * t + ax[len(order) + i].var
        mask = mask & (src[d] < buf.shape[d])
    nb = Buffer(n, buf.dtype, tuple(a.extent for a in ax), "param", False)
    job = Compute(n, (buf,), s.compute.dims, (Pull(replace(nb, scope="global"), tuple(ax), load(buf, src, mask)),), (n,))

    def repl(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0].name == param and e.attr[0].scope == "param":
            _, idx, m, o = load_parts(e)
            ix = [idx[d] // tile[d] if d in tile else idx[d] for d in order] + [idx[d] % t for d, t in tile.items()]
            return load(nb if e.dtype is nb.dtype else replace(nb, dtype=e.attr[0].dtype), ix, m, o)
        return None

    stages = {k: replace(x, expr=rewrite(x.expr, repl)) for k, x in s.stages.items()}
    return replace(s, stages=stages, packed={**s.packed, n: Packing(param, order, tuple(tile.items()), job, nb)}, trace=(*s.trace, ("pack", param, order, tuple(tile.items()), name)))


def _privatize(s: Schedule, tensor: str, loop: str) -> Schedule:
    st, i = s.stage_of(loop)
    red = st.reduction
    if st.name != tensor or red is None or not st.loops[i].reduce:
        raise ScheduleError(f"{loop} is not a reduction loop of {tensor}")
    if red.attr[2] != 1:
        raise ScheduleError(f"{tensor}: private partial results of a tuple reduction are not supported")
    monoid, axes, _ = red.attr
    inner = st.loops[i]
    rest = [lp for lp in st.loops if lp.reduce and lp is not inner]
    ext = dict(s.ext)

    def solid(e: Expr) -> Expr:
        while any(u.attr[0].endswith("#") for u in _vars(e)):
            e = substitute(e, {hash_var(u): ext[u] for u in ext})
        return e

    def extent(v: Expr) -> Expr:
        return solid(ext[v])

    pn = f"{tensor}.p"
    while pn in s.stages:  # partial results of partial results
        pn += "p"
    keep = {a.var: var(a.name + "^", lo=0, hi=a.extent - 1) for a in st.axes}
    pv = var(inner.name.rsplit(".", 1)[0].split(".")[-1] + "_p", lo=0, hi=extent(inner.var) - 1)
    rv = {lp.var: var(lp.name.split(".", 1)[-1].replace(".", "_") + "_r", lo=0, hi=extent(lp.var) - 1) for lp in rest}
    env = {**rv, inner.var: pv}
    body_env = {**keep, **{a.var: solid(substitute(st.subst[a.var], env)) for a in axes}}
    value = substitute(red.args[0], body_env)
    where = substitute(red.args[1], body_env) if len(red.args) > 1 else None
    for a in axes:
        ok = body_env[a.var] < a.extent
        if not (ok.op == "const" and ok.attr):
            where = ok if where is None else where & ok
    if where is not None:
        value = select(where, _mask_loads(value, where), MONOIDS[monoid].init((value.dtype,))[0])
    p_axes = tuple(Axis(keep[a.var], a.extent) for a in st.axes) + (Axis(pv, extent(inner.var)),)
    pexpr = reduce_(monoid, [Axis(rv[lp.var], extent(lp.var)) for lp in rest], value) if rest else value
    pbuf = Buffer(pn, st.buf.dtype, tuple(a.extent for a in p_axes), "global")
    pst = pull_stage(Pull(pbuf, p_axes, pexpr), ext)
    mv = var(pv.attr[0] + "m", lo=0, hi=extent(inner.var) - 1)
    merged = reduce_(monoid, [Axis(mv, extent(inner.var))], load(pbuf, [*(a.var for a in st.axes), mv]))
    mst = pull_stage(Pull(st.buf, st.axes, merged), ext)
    mst = replace(mst, at=st.at, scope=st.scope)
    stages: dict[str, Stage] = {}
    for k, x in s.stages.items():
        if k == tensor:
            stages[pn] = pst
            stages[tensor] = mst
        else:
            stages[k] = x
    return replace(s, stages=stages, ext=ext, trace=(*s.trace, ("stage", tensor, "private", loop)))


def in_runs(s: Schedule, run: int = RUN) -> Schedule:
    """Float sums add at most ``run`` terms to one accumulator before they start another, so that their error does not grow with their length
    (:meth:`luthier.schedules.base.nest.Nest.in_runs`). Shorter sums are as they were."""
    return replace(s, run=run, trace=(*s.trace, ("in_runs", run)))


def tensorize(s: Schedule, loop: str, instr: Instruction) -> Schedule:
    """A reduction loop of ``instr.group`` rounds around the innermost, vectorised loop becomes one dot product instruction.

    Before ``for t < 4: for j < 8 vectorize: acc[j] += i32(A[k + t]) * i32(B[8 k + 4 j + t])``, after
    ``acc[0..8] = dot(acc[0..8], bcast(A[k .. k + 4]), B[8 k .. 8 k + 32])``. One operand is the same in all lanes, the other has
    the groups of the lanes behind one another (what :func:`pack` with two tiles makes). Raises ScheduleError where the loops
    are not of that form; what depends on the operands' addresses is checked when the schedule is lowered."""
    st, i = s.stage_of(loop)
    red = st.reduction
    if red is None or red.attr[0] != "sum" or not st.loops[i].reduce or red.args[0].dtype is not instr.acc:
        raise ScheduleError(f"{loop} is no reduction loop of a sum in {instr.acc}")
    if s.static_extent(st.loops[i].var) != instr.group:
        raise ScheduleError(f"{loop} must have the {instr.group} rounds of a group of {instr.name}")
    if i != len(st.loops) - 2 or st.loops[-1].kind != "vectorize":
        raise ScheduleError(f"{loop} must stand right outside of the innermost, vectorised loop of {st.name}")
    loops = (*st.loops[:i], replace(st.loops[i], instr=instr), st.loops[-1])
    return s.put(replace(st, loops=loops), "tensorize", loop, instr.name)


def peel(s: Schedule, loop: str) -> Schedule:
    """The last round of a loop becomes straight code after it, so that conditions which only it needs vanish from the others.

    Before ``for i < n: S(i)``, after ``for i < n - 1: S(i); S(n - 1)``. A form of ``specialize`` on a loop interval."""
    st, i = s.stage_of(loop)
    loops = (*st.loops[:i], replace(st.loops[i], tail="peel"), *st.loops[i + 1 :])
    return s.put(replace(st, loops=loops), "peel", loop)


def _vars(e: Expr) -> list[Expr]:
    return [x for x in walk(e) if x.op == "var"]


def readers(s: Schedule, tensor: str) -> list[Stage]:
    out = []
    for st in s.stages.values():
        es: list[Expr] = [st.expr]
        if st.push is not None:
            es += let_exprs(st.push)
        if any(ld.attr[0].name == tensor for ld in loads(*es)):
            out.append(st)
    return out


__all__ = [
    "Schedule", "Stage", "Loop", "ScheduleError", "schedule", "split", "reorder", "fuse", "annotate", "inline", "stage", "cache", "pack",
    "peel", "tensorize", "in_runs", "RUN", "readers", "bounds",
]
