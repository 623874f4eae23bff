"""The loops of one stage, opened in order (:mod:`luthier.schedules.base.lower`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.ir.compute import MONOIDS
from luthier.ir.dtypes import f16, f32
from luthier.ir.expr import (
    Expr,
    as_expr,
    bcast,
    bounds,
    call,
    const,
    free_vars,
    from_linear,
    linear,
    load,
    maximum,
    minimum,
    prove,
    ramp,
    rejoin,
    substitute,
    var,
)
from luthier.ir.loop import Alloc, Buffer, For, If, Let, Stmt, Store, block
from luthier.schedules.base.schedule import Loop, ScheduleError, Stage, hash_var
from luthier.schedules.cpu.dot import dot_operands

if TYPE_CHECKING:
    from luthier.schedules.base.lower import Lower

Env = dict[Expr, Expr]
Region = list[tuple[Expr, Expr]]


def box_of(e: Expr, unbound: Env) -> tuple[Expr, Expr] | None:
    """(lowest value, number of values) of an index over the unbound variables; None where it is not affine in them."""
    base = {}
    extent = const(1)
    for m, c in linear(rejoin(e)).items():
        hit = [a for a in m if free_vars(a) & unbound.keys()]
        if not hit:
            base[m] = c
            continue
        if len(m) != 1 or m[0] not in unbound:
            return None
        n = unbound[m[0]]
        extent = extent + (n - 1) * abs(c)
        if c < 0:
            for mm, cc in linear((n - 1) * c).items():
                base[mm] = base.get(mm, 0) + cc
    return from_linear({m: c for m, c in base.items() if c}), extent


def union_of(a: tuple[Expr, Expr], b: tuple[Expr, Expr]) -> tuple[Expr, Expr] | None:
    if a[0] is b[0]:
        return a[0], maximum(a[1], b[1])
    d = b[0] - a[0]
    if d.op != "const":
        return None
    if d.attr < 0:
        a, b, d = b, a, const(-d.attr)
    return a[0], maximum(a[1], b[1] + d)


class Nest:
    """One stage's loops. ``go(i, env)`` emits loops[i:] with the loops before bound in ``env``."""

    def __init__(self, lo: Lower, st: Stage, region: Region) -> None:
        self.lo, self.st, self.region = lo, st, region
        self.first_red = next((i for i, lp in enumerate(st.loops) if lp.reduce), len(st.loops))
        self.vector = {lp.var for lp in st.loops if lp.kind == "vectorize"}
        self.roots = {lo.root_var(st, a.var) for a in st.axes}
        self.acc: list[Buffer] | None = None
        self.inner: list[int] = []
        self.parts = 0

    # indices -----------------------------------------------------

    def local(self, d: int, env: Env) -> Expr:
        return self.lo.sub(self.st.subst[self.st.axes[d].var], env)

    def point(self, env: Env, store: bool) -> tuple[Env, Expr]:
        """Substitution for the stage's axes at this point, and the condition under which the point exists."""
        st = self.st
        cond = as_expr(0).eq(0)
        out: Env = {}
        for d, a in enumerate(st.axes):
            x = self.region[d][0] + self.local(d, env)
            hi_ok, lo_ok = x < a.extent, as_expr(0) <= x
            raw = st.subst[a.var]
            if prove(hi_ok) and prove(lo_ok) or d in st.pad and (not store or st.at is not None):
                pass
            elif (store and st.at is None) or free_vars(raw) & self.vector:
                if not (d in st.pad and st.at is not None):
                    cond = cond & hi_ok & lo_ok
            else:
                if not prove(hi_ok):
                    x = minimum(x, a.extent - 1)
                if not prove(lo_ok):
                    x = maximum(x, const(0))
            out[a.var] = x
        for a in self.lo.red_axes(st):
            x = self.lo.sub(st.subst[a.var], env)
            out[a.var] = x
            cond = cond & (x < a.extent)
        for e, h in st.guards:
            root = next((r for r in self.roots if r is not None and hash_var(r) is h), None)
            if root is None:
                cond = cond & (self.lo.sub(e, env) < self.lo.eval_ext(h, env))
        return out, cond

    def expr(self, e: Expr, pt: Env, env: Env) -> Expr:
        return self.lo.loads_placed(substitute(e, {**env, **pt}))

    def index(self, env: Env) -> tuple[Expr, ...]:
        return tuple((self.local(d, env) if self.st.at is not None else self.region[d][0] + self.local(d, env)) for d in range(len(self.st.axes)))

    # loops -------------------------------------------------------

    def go(self, i: int, env: Env) -> Stmt:
        st = self.st
        if i == self.first_red and st.reduction is not None and self.acc is None:
            return self.reduce(i, env)
        if i == len(st.loops):
            return self.leaf(env)
        if st.loops[i].instr is not None:
            return self.tensorized(i, env)
        return self.loop(i, env, lambda e: self.go(i + 1, e))

    def loop(self, i: int, env: Env, inner, plain: bool = False) -> Stmt:  # type: ignore[no-untyped-def]
        lp = self.st.loops[i]
        ext = self.lo.resolve(lp.var, env)

        def body(e: Env) -> Stmt:
            if plain:
                return inner(e)  # type: ignore[no-any-return]
            return self.lo.attached((self.st.name, lp.var), e, None, lambda: inner(e))

        parts: list[Stmt] = []
        if lp.tail == "peel":
            if not (ext.op == "const" and ext.attr <= 1):
                parts.append(self.one_loop(lp, ext - 1, env, body))
            last = body({**env, lp.var: ext - 1})
            parts.append(last if bounds(ext)[0] not in (None, 0) else If(const(0) < ext, last))
            return block(*parts)
        if lp.cut is not None:
            h = hash_var(lp.var)
            n = self.lo.resolve(self.whole(lp), env)
            f = self.lo.s.ext[lp.cut]
            if lp.tail == "min":
                return self.one_loop(lp, ext, env, lambda e: body({**e, hash_var(lp.cut): minimum(f, n - e[lp.var] * f)}))
            if not (n.op == "const" and n.attr % f.attr == 0):
                full = n // f
                if lp.kind == "parallel" and not (full.op == "const" and full.attr == 0):
                    return self.parallel_cut(lp, n, f, full, env, body)
                parts = []
                if not (full.op == "const" and full.attr == 0):
                    parts.append(self.one_loop(lp, full, {**env, h: full}, body))
                e2 = {**env, lp.var: full}
                if n.op == "const":
                    parts.append(body({**e2, hash_var(lp.cut): n % f}))
                else:
                    parts.append(If(full * f < n, body(e2)))
                return block(*parts)
        return self.one_loop(lp, ext, env, body)

    def parallel_cut(self, lp: Loop, n: Expr, f: Expr, full: Expr, env: Env, body) -> Stmt:  # type: ignore[no-untyped-def]
        """A parallel loop keeps its tail inside, as the last round: nothing follows a parallel loop."""
        v = self.lo.fresh(lp.name, (n + f - 1) // f)
        w = self.lo.fresh(lp.name, full)
        main = block(Let(w, v), body({**env, hash_var(lp.var): full, lp.var: w}))
        e2 = {**env, lp.var: full}
        tail = body({**e2, hash_var(lp.cut): n % f} if n.op == "const" and lp.cut is not None else e2)
        return For(v, const(0), (n + f - 1) // f, lp.kind, If(v < full, main, tail))

    def whole(self, lp: Loop) -> Expr:
        """The loop that ``lp`` was split from."""
        for u in free_vars(self.lo.s.ext[lp.var]):
            if u in self.lo.byhash:
                return self.lo.byhash[u]
        raise AssertionError("a cut loop comes from a split")

    def one_loop(self, lp: Loop, ext: Expr, env: Env, body) -> Stmt:  # type: ignore[no-untyped-def]
        if lp.reduce and lp.kind == "serial" and self.sums() and self.terms(self.st.loops.index(lp) + 1, env, ext)[1]:
            return self.in_runs(lp, ext, env, body)
        return self.plain_loop(lp, ext, env, body)

    def plain_loop(self, lp: Loop, ext: Expr, env: Env, body) -> Stmt:  # type: ignore[no-untyped-def]
        if ext.op == "const" and ext.attr == 1 and lp.kind not in ("parallel",):
            return body({**env, lp.var: const(0)})  # type: ignore[no-any-return]
        v = self.lo.fresh(lp.name, ext)
        one = ext.op == "const" and ext.attr == 1
        return For(v, const(0), ext, lp.kind, body({**env, lp.var: const(0) if one else v}))

    def spatial(self, loops: list[int], env: Env, leaf) -> Stmt:  # type: ignore[no-untyped-def]
        if not loops:
            return leaf(env)  # type: ignore[no-any-return]
        return self.one_loop(self.st.loops[loops[0]], self.lo.resolve(self.st.loops[loops[0]].var, env), env, lambda e: self.spatial(loops[1:], e, leaf))

    # long sums ---------------------------------------------------

    def sums(self) -> bool:
        """Whether this is a sum of narrow floats whose runs are limited."""
        red = self.st.reduction
        return bool(self.lo.s.run) and self.acc is not None and red is not None and red.attr[0] == "sum" and red.args[0].dtype in (f32, f16)

    def terms(self, i: int, env: Env, ext: Expr | None = None) -> tuple[int, bool]:
        """How many terms the loops from ``i`` on add to the accumulator, and whether the outermost of them goes in runs.
        ``ext``: rounds of one more loop around them. Where only the run knows the extent, a loop ends with one term (or a few)."""
        inner, n = 1, ext
        if n is None:
            k = next((k for k in range(i, len(self.st.loops)) if self.st.loops[k].reduce), None)
            if k is None:
                return 1, False
            i, n = k + 1, self.lo.resolve(self.st.loops[k].var, env)
            if self.st.loops[k].kind == "vectorize":  # lanes are summed pairwise
                n = const(1)
        inner, _ = self.terms(i, env)
        if n.op != "const":
            return 1, True
        if inner * n.attr <= self.lo.s.run:
            return inner * n.attr, False
        blocks = -(-n.attr // max(self.lo.s.run // inner, 1))
        return -(-blocks // self.lo.s.run) if blocks > self.lo.s.run else blocks, True

    def in_runs(self, lp: Loop, ext: Expr, env: Env, body) -> Stmt:  # type: ignore[no-untyped-def]
        """A long sum in runs, and a long sum of runs in runs.

        Before ``for k < n: acc += x[k]``, after ``for b < ceil(n / R): { part = 0; for R b <= k < min(R b + R, n): part += x[k]; acc += part }``.
        With u the rounding of a term, the error is at most ``(R + blocks) u`` times the sum of magnitudes, not ``n u``."""
        run = self.lo.s.run
        size = max(run // self.terms(self.st.loops.index(lp) + 1, env)[0], 1)
        blocks = (ext + (size - 1)) // size

        def rounds(name: str, count: Expr, number: Expr, step: int, inner) -> Stmt:  # type: ignore[no-untyped-def]
            """The rounds of a loop of ``count`` that belong to block ``number``: bounded as if they were all, so that masks vanish."""
            k, lo = self.lo.fresh(name, count), number * step
            hi = lo + step if count.op == "const" and count.attr % step == 0 else minimum(lo + step, count)
            return For(k, lo, hi, "serial", inner(k))

        def one_run(b: Expr) -> Stmt:
            return self.part(lp, env, lambda: rounds(lp.name, ext, b, size, lambda k: body({**env, lp.var: k})))

        nested = any(x.reduce for x in self.st.loops[: self.st.loops.index(lp)])  # images and the like: 65,536 elements a row are enough
        if blocks.op == "const" and blocks.attr <= run or blocks.op != "const" and nested:
            return self.every(lp.name + ".b", blocks, one_run)
        return self.every(lp.name + ".o", (blocks + (run - 1)) // run, lambda o: self.part(lp, env, lambda: rounds(lp.name + ".b", blocks, o, run, one_run)))

    def every(self, name: str, count: Expr, inner) -> Stmt:  # type: ignore[no-untyped-def]
        k = self.lo.fresh(name, count)
        return For(k, const(0), count, "serial", inner(k))

    def part(self, lp: Loop, env: Env, make) -> Stmt:  # type: ignore[no-untyped-def]
        """What ``make`` sums into an accumulator of its own, added to the present one."""
        assert self.acc is not None
        outer, all_inner = self.acc[0], self.inner
        at = self.st.loops.index(lp)
        self.inner = [k for k in all_inner if k > at]
        shape = tuple(self.lo.resolve(self.st.loops[k].var, env) for k in self.inner)
        self.parts += 1
        own = Buffer(f"{self.st.name}.s{self.parts}", outer.dtype, shape, "local")

        def here(e: Env, inner: list[int]) -> tuple[Expr, ...]:
            return tuple(e[self.st.loops[k].var] for k in inner)

        self.acc = [own]
        zero = self.spatial(self.inner, env, lambda e: Store(own, here(e, self.inner), const(0, own.dtype)))
        main = make()
        add = self.spatial(
            self.inner, env, lambda e: Store(outer, here(e, all_inner), load(outer, here(e, all_inner)) + load(own, here(e, self.inner)))
        )
        self.acc, self.inner = [outer], all_inner
        return Alloc(own, block(zero, main, add))

    # bodies ------------------------------------------------------

    def leaf(self, env: Env) -> Stmt:
        st = self.st
        if self.acc is not None:
            return self.update(env)
        pt, cond = self.point(env, True)
        value = self.expr(st.expr, pt, env)
        s: Stmt = Store(self.target(), self.index(env), value)
        if not prove(cond):
            s = If(cond, s)
        return s

    def target(self) -> Buffer:
        st = self.st
        scope = "param" if st.at is None else st.scope
        return Buffer(st.name, st.buf.dtype, st.buf.shape, scope)

    def reduce(self, i: int, env: Env) -> Stmt:
        """init; reduction loops; write-out. The tile ``name.r`` spans the spatial loops inside the first reduction loop."""
        st = self.st
        red = st.reduction
        assert red is not None
        mono = MONOIDS[red.attr[0]]
        n = red.attr[2]
        inner = [k for k in range(i, len(st.loops)) if not st.loops[k].reduce]
        shape = tuple(self.lo.resolve(st.loops[k].var, env) for k in inner)
        dts = tuple(a.dtype for a in red.args[:n])
        self.acc = [Buffer(f"{st.name}.r{c}" if n > 1 else f"{st.name}.r", d, shape, "local") for c, d in enumerate(dts)]
        self.inner = inner

        def idx(e: Env) -> tuple[Expr, ...]:
            return tuple(e[st.loops[k].var] for k in inner)

        init = self.spatial(inner, env, lambda e: block(*(Store(b, idx(e), v) for b, v in zip(self.acc, mono.init(dts), strict=True))))  # type: ignore[arg-type]
        main = self.go(i, env)
        which = st.expr.attr if st.expr.op == "proj" else 0
        acc = self.acc

        def out(e: Env) -> Stmt:
            pt, cond = self.store_point(e)
            s: Stmt = Store(self.target(), self.index(e), load(acc[which], idx(e)))
            return s if prove(cond) else If(cond, s)

        final = self.spatial(inner, env, out)
        self.acc = None
        body = block(init, main, final)
        for b in reversed(acc):
            body = Alloc(b, body)
        return body

    def store_point(self, env: Env) -> tuple[Env, Expr]:
        cond = as_expr(0).eq(0)
        st = self.st
        if st.at is None:
            for d, a in enumerate(st.axes):
                x = self.region[d][0] + self.local(d, env)
                cond = cond & (x < a.extent)
        red_vars = {lp.var for lp in st.loops if lp.reduce}
        for e, h in st.guards:
            if not free_vars(e) & red_vars and not any(r is not None and hash_var(r) is h for r in self.roots):
                cond = cond & (self.lo.sub(e, env) < self.lo.eval_ext(h, env))
        return {}, cond

    def update(self, env: Env) -> Stmt:
        st, acc = self.st, self.acc
        red = st.reduction
        assert red is not None and acc is not None
        n = red.attr[2]
        pt, cond = self.point(env, False)
        vals = tuple(self.expr(a, pt, env) for a in red.args[:n])
        if len(red.args) > n:
            cond = cond & self.expr(red.args[n], pt, env)
        at = tuple(env[st.loops[k].var] for k in self.inner)
        old = tuple(load(b, at) for b in acc)
        new = MONOIDS[red.attr[0]].combine(old, vals)
        if n == 1:
            s: Stmt = Store(acc[0], at, new[0])
        else:  # components read each other's old values
            tmp = [var(f"{b.name}~t{k}", v.dtype) for k, (b, v) in enumerate(zip(acc, new, strict=True))]
            s = block(*(Let(t, v) for t, v in zip(tmp, new, strict=True)), *(Store(b, at, t) for b, t in zip(acc, tmp, strict=True)))
        return s if prove(cond) else If(cond, s)


    def tensorized(self, i: int, env: Env) -> Stmt:
        """The group loop and the vector loop inside it as one instruction (see :func:`luthier.schedules.base.schedule.tensorize`)."""
        group, lane = self.st.loops[i], self.st.loops[i + 1]
        assert group.instr is not None and self.acc is not None and self.st.reduction is not None
        lanes = self.lo.resolve(lane.var, env)
        if lanes.op != "const":
            raise ScheduleError(f"{lane.name} needs a constant extent for {group.instr.name}")
        t, j = self.lo.fresh(group.name, const(group.instr.group)), self.lo.fresh(lane.name, lanes)
        e2 = {**env, group.var: t, lane.var: j}
        pt, cond = self.point(e2, False)
        if not prove(cond):
            raise ScheduleError(f"{self.st.name}: {group.instr.name} reads whole groups and vectors, pad the operands ({cond!r} is not certain)")
        x, y = dot_operands(self.expr(self.st.reduction.args[0], pt, e2), group.instr, t, j, lanes.attr)
        at = [e2[self.st.loops[k].var] for k in self.inner]
        idx = tuple(bcast(a, lanes.attr) for a in at[:-1]) + (ramp(const(0), 1, lanes.attr),)
        old = load(self.acc[0], idx)
        return Store(self.acc[0], idx, call(group.instr.name, old.dtype, old, x, y))
