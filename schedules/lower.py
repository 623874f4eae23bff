"""Lowering: Schedule -> loop IR, one Func for each root stage.

For each root stage the loops are opened in order. At every loop the stages attached there are computed first, each on the box
that the rest of this iteration reads (``_region``). A reduction keeps its partial results in a local tile over the spatial
loops inside its first reduction loop: initialised once, written out once after the last reduction step. An axis that may
overrun its extent is masked where it is vectorised or stored, and clamped to the last valid element elsewhere (the value is
computed twice rather than out of bounds). Nothing here knows a target.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import MONOIDS, Fold, Push
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
    load_parts,
    loads,
    maximum,
    minimum,
    prove,
    ramp,
    rewrite,
    substitute,
    var,
)
from luthier.ir.loop import Alloc, Buffer, For, Func, If, Let, Stmt, Store, block
from luthier.schedules.dot import dot_operands
from luthier.schedules.schedule import Loop, Schedule, ScheduleError, Stage, hash_var, readers

Env = dict[Expr, Expr]
Region = list[tuple[Expr, Expr]]


def lower(s: Schedule) -> list[Func]:
    """Root stages in order, each a Func whose params are the buffers it touches (written ones last) and the dims it reads."""
    _check_stages(s)
    out = []
    for st in s.stages.values():
        if st.at is None and (st.fold is not None or st.buf.scope == "global" or st.name in s.compute.outs):
            out.append(_Lower(s).func(st))
            if st.push is not None:
                out.append(make_func(f"{s.compute.name}.{st.name}.push", push_nest(st.push, st.buf), s.compute.dims))
    return out


def _check_stages(s: Schedule) -> None:
    """A staged tensor has no reader outside the loop that it is staged in. Raises ScheduleError."""
    for t in s.stages.values():
        if t.at is None or t.fold is not None:
            continue
        host, loop = t.at
        if s.stages[host].fold is not None:
            continue
        depth = s.stages[host].find(loop.attr[0])
        for u in readers(s, t.name):
            w = u
            while w.name != host and w.at is not None and w.at[0] != host:
                w = s.stages[w.at[0]]
            inside = w.name == host or (w.at is not None and s.stages[host].find(w.at[1].attr[0]) >= depth)
            if not inside:
                raise ScheduleError(f"{t.name} is staged inside {loop!r} but {u.name} reads it outside of that loop")


def push_nest(p: Push, buf: Buffer) -> Stmt:
    """The scatter loops of a Push, serial in axis order (its initialisation is an ordinary nest before it)."""
    dst = replace(buf, scope="param")
    value = p.value
    if p.op != "set":
        old = load(dst, p.index)
        value = old + value if p.op == "add" else old * value if p.op == "mul" else maximum(old, value) if p.op == "max" else minimum(old, value)
    s: Stmt = Store(dst, p.index, value)
    ok = as_expr(0).eq(0) if p.where is None else p.where
    if not prove(ok):
        s = If(ok, s)
    for a in reversed(p.over):
        s = For(a.var, const(0), a.extent, "serial", s)
    return s


class _Lower:
    def __init__(self, s: Schedule) -> None:
        self.s = s
        self.placed: dict[str, tuple[Buffer, list[Expr]]] = {}
        self.names: dict[str, int] = {}
        self.children: dict[tuple[str, Expr], list[Stage]] = {}
        self.byname = {v.attr[0]: v for v in s.ext}
        self.byhash = {hash_var(v): v for v in s.ext}
        for st in s.stages.values():
            if st.at is not None:
                if all(lp.var is not st.at[1] for lp in s.stages[st.at[0]].loops):
                    raise ScheduleError(f"{st.name} is staged at {st.at[1]!r}, a loop that {st.at[0]} no longer has: stage it after the split")
                self.children.setdefault(st.at, []).append(st)

    # ------------------------------------------------------------ entry

    def func(self, st: Stage) -> Func:
        region = [(const(0), a.extent) for a in st.axes]
        body = self.nest(st, {}, region)
        return make_func(self.s.compute.name + "." + st.name if len(self.s.stages) > 1 else self.s.compute.name, body, self.s.compute.dims)

    def fresh(self, name: str, extent: Expr) -> Expr:
        k = self.names.get(name, 0)
        self.names[name] = k + 1
        return var(name if k == 0 else f"{name}~{k}", lo=0, hi=extent - 1)

    def resolve(self, v: Expr, env: Env) -> Expr:
        """The extent of schedule loop ``v`` in this context."""
        h = hash_var(v)
        if h in env:
            return env[h]
        return self.eval_ext(self.s.ext[v], env)

    def eval_ext(self, e: Expr, env: Env) -> Expr:
        hs = [u for u in free_vars(e) if u.attr[0].endswith("#")]
        if not hs:
            return e
        return substitute(e, {h: self.resolve(self.byhash[h], env) for h in hs})

    def sub(self, e: Expr, env: Env) -> Expr:
        hs = {u: self.eval_ext(u, env) for u in free_vars(e) if u.attr[0].endswith("#") and u not in env}
        return substitute(e, {**env, **hs})

    # ------------------------------------------------------------ regions

    def region(self, t: Stage, at: tuple[str, Expr], env: Env, known: dict[str, Region]) -> Region:
        """The box of ``t`` that one iteration of loop ``at`` reads: (base, extent) for every axis."""
        full = [(const(0), a.extent) for a in t.axes]
        found: list[list[Expr]] = []
        unbound: dict[Expr, Expr] = {}
        for u in self.s.stages.values():
            reads = [x for x in loads(u.expr) if x.attr[0].name == t.name]
            if u.fold is not None:
                reads += [x for x in loads(*(q.init for q in u.fold.state)) if x.attr[0].name == t.name]
            if u.push is not None:
                reads += [x for x in loads(u.push.value, *u.push.index) if x.attr[0].name == t.name]
            if not reads:
                continue
            sub: Env = {}
            if u.name == at[0]:
                pos = self.known_bases.get(u.name, [const(0)] * len(u.axes))
                loop_env = {}
                for lp in u.loops:
                    if lp.var in env:
                        loop_env[lp.var] = env[lp.var]
                    else:
                        ext = self.resolve(lp.var, env)
                        y = var("?" + lp.name, lo=0, hi=ext - 1)
                        unbound[y] = ext
                        loop_env[lp.var] = y
                for d, a in enumerate(u.axes):
                    sub[a.var] = pos[d] + self.sub(u.subst[a.var], {**env, **loop_env})
                for a in self.red_axes(u):
                    sub[a.var] = self.sub(u.subst[a.var], {**env, **loop_env})
            else:
                r = known.get(u.name) or self.region(u, at, env, known)
                for d, a in enumerate(u.axes):
                    y = var(f"?{u.name}.{d}", lo=0, hi=r[d][1] - 1)
                    unbound[y] = r[d][1]
                    sub[a.var] = r[d][0] + y
                for a in self.red_axes(u):
                    y = var(f"?{u.name}.{a.name}", lo=0, hi=a.extent - 1)
                    unbound[y] = a.extent
                    sub[a.var] = y
            for x in reads:
                _, idx, _, _ = load_parts(x)
                found.append([substitute(i, sub) for i in idx])
        out: Region = []
        for d in range(len(t.axes)):
            box: tuple[Expr, Expr] | None = None
            for idx in found:
                b = _box(idx[d], unbound)
                box = b if box is None else _union(box, b) if b is not None and box is not None else None
                if box is None:
                    break
            n = t.axes[d].extent
            if box is None or prove(n <= box[1]):
                box = full[d] if box is None or not (box[1].op == "const" and n.op == "const" and bounds(box[0])[0] is not None and (bounds(box[0])[0] or 0) < 0) else box
            out.append(box)
        return out

    def red_axes(self, u: Stage) -> tuple:  # type: ignore[type-arg]
        return u.reduction.attr[1] if u.reduction is not None else ()

    known_bases: dict[str, list[Expr]] = {}

    # ------------------------------------------------------------ nests

    def nest(self, st: Stage, env: Env, region: Region) -> Stmt:
        """All loops of ``st`` over ``region``; ``env`` holds the loops and extents of the enclosing stages."""
        env = dict(env)
        for d, a in enumerate(st.axes):
            root = self.root_var(st, a.var)
            if root is not None and st.at is not None:
                env[hash_var(root)] = region[d][1]
        self.known_bases = {**self.known_bases, st.name: [b for b, _ in region]}
        if st.fold is not None:
            return _FoldNest(self, st, region).go(0, env)
        return _Nest(self, st, region).go(0, env)

    def root_var(self, st: Stage, axis: Expr) -> Expr | None:
        """The loop variable an axis started with (``tensor.axis``), by which its extent is overridden."""
        return self.byname.get(self.axis_loop_name(st, axis))

    def axis_loop_name(self, st: Stage, axis: Expr) -> str:
        seen: dict[str, int] = {}
        for a in (*st.axes, *self.red_axes(st)):
            base = f"{st.name}.{a.name.rstrip(chr(39))}"
            k = seen.get(base, 0)
            seen[base] = k + 1
            if a.var is axis:
                return base if k == 0 else f"{base}{k}"
        return ""

    def attached(self, at: tuple[str, Expr], env: Env, rest: Stmt | None, make_rest) -> Stmt:  # type: ignore[no-untyped-def]
        """Stages attached at this loop, in order, then the rest of the iteration; their buffers live around both."""
        kids = self.children.get(at, [])
        if not kids:
            return make_rest()  # type: ignore[no-any-return]
        known: dict[str, Region] = {}
        for k in reversed(kids):
            known[k.name] = self.region(k, at, env, known)
        saved = dict(self.placed)
        parts: list[Stmt] = []
        bufs: list[Buffer] = []
        for k in kids:
            shape = self.tile_shape(k, env, known[k.name])
            b = Buffer(k.name, k.buf.dtype, shape, k.scope)
            parts_here = self.nest(k, env, known[k.name])
            self.placed[k.name] = (b, [x for x, _ in known[k.name]])
            parts.append(self.redirect_store(parts_here, k.name, b))
            bufs.append(b)
        parts.append(make_rest())
        self.placed = saved
        body = block(*parts)
        for b in reversed(bufs):
            body = Alloc(b, body)
        return body

    def redirect_store(self, s: Stmt, name: str, b: Buffer) -> Stmt:
        from luthier.ir.loop import map_children

        if isinstance(s, Store):
            return replace(s, buf=b) if s.buf.name == name else s
        return map_children(s, lambda c: self.redirect_store(c, name, b))

    def tile_shape(self, k: Stage, env: Env, region: Region) -> tuple[Expr, ...]:
        """Extents of a staged buffer: the region, rounded up to what the stage's own splits may overrun."""
        e2 = dict(env)
        for d, a in enumerate(k.axes):
            root = self.root_var(k, a.var)
            if root is not None:
                e2[hash_var(root)] = region[d][1]
        out = []
        for d, a in enumerate(k.axes):
            loop_env = {lp.var: var("?" + lp.name, lo=0, hi=self.resolve(lp.var, e2) - 1) for lp in k.loops}
            hi = bounds(self.sub(k.subst[a.var], {**e2, **loop_env}))[1]
            ext = region[d][1]
            out.append(const(max(hi + 1, ext.attr)) if hi is not None and ext.op == "const" else ext)
        return tuple(out)

    def loads_placed(self, e: Expr) -> Expr:
        """Loads of staged tensors go to their tiles."""
        if not self.placed:
            return e

        def f(x: Expr) -> Expr | None:
            if x.op == "load" and x.attr[0].name in self.placed:
                buf, idx, m, o = load_parts(x)
                b, base = self.placed[buf.name]
                if b is buf:
                    return None
                return load(b, [i - p for i, p in zip(idx, base, strict=True)], m, o)
            return None

        return rewrite(e, f)


def _box(e: Expr, unbound: Env) -> tuple[Expr, Expr] | None:
    """(lowest value, number of values) of an index over the unbound variables; None where it is not affine in them."""
    base = {}
    extent = const(1)
    for m, c in linear(_rejoin(e)).items():
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


def _rejoin(e: Expr) -> Expr:
    """``x // d * d + x % d`` is ``x`` (an index of fused loops that is taken apart and put together again)."""
    terms = linear(e)
    for m, c in terms.items():
        if len(m) == 1 and m[0].op == "mod" and m[0].args[1].op == "const":
            x, d = m[0].args
            if terms.get((x // d,)) == c * d.attr:
                return _rejoin(e - m[0] * c - x // d * (c * d.attr) + x * c)
    return e


def _union(a: tuple[Expr, Expr], b: tuple[Expr, Expr]) -> tuple[Expr, Expr] | None:
    if a[0] is b[0]:
        return a[0], maximum(a[1], b[1])
    d = b[0] - a[0]
    if d.op != "const":
        return None
    if d.attr < 0:
        a, b, d = b, a, const(-d.attr)
    return a[0], maximum(a[1], b[1] + d)


class _Nest:
    """One stage's loops. ``go(i, env)`` emits loops[i:] with the loops before bound in ``env``."""

    def __init__(self, lo: _Lower, st: Stage, region: Region) -> None:
        self.lo, self.st, self.region = lo, st, region
        self.first_red = next((i for i, lp in enumerate(st.loops) if lp.reduce), len(st.loops))
        self.vector = {lp.var for lp in st.loops if lp.kind == "vectorize"}
        self.roots = {lo.root_var(st, a.var) for a in st.axes}
        self.acc: list[Buffer] | None = None

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
        if ext.op == "const" and ext.attr == 1 and lp.kind not in ("parallel",):
            return body({**env, lp.var: const(0)})  # type: ignore[no-any-return]
        v = self.lo.fresh(lp.name, ext)
        one = ext.op == "const" and ext.attr == 1
        return For(v, const(0), ext, lp.kind, body({**env, lp.var: const(0) if one else v}))

    def spatial(self, loops: list[int], env: Env, leaf) -> Stmt:  # type: ignore[no-untyped-def]
        if not loops:
            return leaf(env)  # type: ignore[no-any-return]
        return self.one_loop(self.st.loops[loops[0]], self.lo.resolve(self.st.loops[loops[0]].var, env), env, lambda e: self.spatial(loops[1:], e, leaf))

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
        """The group loop and the vector loop inside it as one instruction (see :func:`luthier.schedules.schedule.tensorize`)."""
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


class _FoldNest(_Nest):
    """The loop of a Fold: states initialised before it, steps and next values inside, finals written after it."""

    def go(self, i: int, env: Env) -> Stmt:
        if i == self.first_red:
            return self.fold(i, env)
        return self.loop(i, env, lambda e: self.go(i + 1, e))

    def state_region(self, st_axes: tuple, env: Env, f: Fold) -> Region:  # type: ignore[type-arg]
        """Shared axes at the outer loops' point (times the spatial loops inside the fold's loop), own axes in full."""
        out: Region = []
        inner_env = dict(env)
        unbound: Env = {}
        for k in range(self.first_red, len(self.st.loops)):
            lp = self.st.loops[k]
            if not lp.reduce:
                ext = self.lo.resolve(lp.var, env)
                y = var("?" + lp.name, lo=0, hi=ext - 1)
                unbound[y] = ext
                inner_env[lp.var] = y
        shared = {a.var for a in f.axes}
        for a in st_axes:
            if a.var in shared:
                b = _box(self.lo.sub(self.st.subst[a.var], inner_env), unbound)
                out.append((const(0), a.extent) if b is None else b)
            else:
                out.append((const(0), a.extent))
        return out

    def fold(self, i: int, env: Env) -> Stmt:
        st, lo = self.st, self.lo
        f = st.fold
        assert f is not None
        t = st.loops[i]
        saved = dict(lo.placed)
        bufs: list[Buffer] = []
        pre: list[Stmt] = []
        regions: dict[str, Region] = {}
        for q in f.state:
            r = self.state_region(q.axes, env, f)
            regions[q.buf.name] = r
            b = Buffer(q.buf.name + ".s", q.buf.dtype, tuple(x for _, x in r), "local")
            bufs.append(b)
            ax = [lo.fresh(f"{q.buf.name}.{a.name}", x) for a, (_, x) in zip(q.axes, r, strict=True)]
            sub = {a.var: minimum(base + v, a.extent - 1) for a, v, (base, _) in zip(q.axes, ax, r, strict=True)}
            s: Stmt = Store(b, tuple(ax), lo.loads_placed(substitute(q.init, sub)))
            for v, (_, x) in reversed(list(zip(ax, r, strict=True))):
                s = For(v, const(0), x, "serial", s)
            pre.append(s)
        for q, b in zip(f.state, bufs, strict=True):
            lo.placed[q.buf.name] = (b, [x for x, _ in regions[q.buf.name]])
        ext = lo.resolve(t.var, env)
        v = lo.fresh(t.name, ext)
        tv = ext - 1 - v if f.reverse else v

        def rest() -> Stmt:
            copies: list[Stmt] = []
            for q, b in zip(f.state, bufs, strict=True):
                nb, nbase = lo.placed[q.buf.name + ".next"]
                ax = [lo.fresh(f"{q.buf.name}.{a.name}", x) for a, (_, x) in zip(q.axes, regions[q.buf.name], strict=True)]
                s2: Stmt = Store(b, tuple(ax), load(nb, ax))
                for y, (_, x) in reversed(list(zip(ax, regions[q.buf.name], strict=True))):
                    s2 = For(y, const(0), x, "serial", s2)
                copies.append(s2)
            return block(*copies)

        e2 = {**env, t.var: tv}
        self.regions = regions
        body = self.attached_fold((st.name, t.var), e2, f, rest)
        loop = For(v, const(0), ext, t.kind, body)
        post: list[Stmt] = []
        wanted = {ld.attr[0].name for u in lo.s.stages.values() if u.at != (st.name, t.var) and u.fold is not f for ld in loads(u.expr)} | set(lo.s.compute.outs)
        for q, b in zip(f.state, bufs, strict=True):
            if q.buf.name in wanted:
                r = regions[q.buf.name]
                ax = [lo.fresh(f"{q.buf.name}.{a.name}", x) for a, (_, x) in zip(q.axes, r, strict=True)]
                dst = Buffer(q.buf.name, q.buf.dtype, q.buf.shape, "param")
                idx = tuple(base + y for y, (base, _) in zip(ax, r, strict=True))
                s = Store(dst, idx, load(b, ax))
                cond = as_expr(0).eq(0)
                for x, a in zip(idx, q.axes, strict=True):
                    cond = cond & (x < a.extent)
                if not prove(cond):
                    s = If(cond, s)
                for y, (_, x) in reversed(list(zip(ax, r, strict=True))):
                    s = For(y, const(0), x, "serial", s)
                post.append(s)
        lo.placed = saved
        out = block(*pre, loop, *post)
        for b in reversed(bufs):
            out = Alloc(b, out)
        return out

    def attached_fold(self, at: tuple[str, Expr], env: Env, f: Fold, make_rest) -> Stmt:  # type: ignore[no-untyped-def]
        """Steps, emits and next values of one round. Emits store to their whole tensor, the others to tiles."""
        lo = self.lo
        kids = lo.children.get(at, [])
        emits = {e.buf.name for e in f.emit}
        parts: list[Stmt] = []
        bufs: list[Buffer] = []
        last: list[Stmt] = []
        for k in kids:
            r = self.state_region(k.axes, env, f) if k.name not in emits else [
                (env[self.st.subst[f.axis.var]], const(1)) if a.var is f.axis.var else x
                for a, x in zip(k.axes, self.state_region(k.axes, env, f), strict=True)
            ]
            if k.name in emits:
                body = lo.nest(replace(k, expr=substitute(k.expr, {})), {**env}, r)
                dst = Buffer(k.name, k.buf.dtype, k.buf.shape, "param")
                parts.append(_shift_store(lo.redirect_store(body, k.name, dst), k.name, [b for b, _ in r]))
                continue
            b = Buffer(k.name, k.buf.dtype, lo.tile_shape(k, env, r), "local")
            sub_axis = {f.axis.var: env[self.st.subst[f.axis.var]]}
            body = lo.nest(replace(k, expr=substitute(k.expr, sub_axis)), env, r)
            lo.placed[k.name] = (b, [x for x, _ in r])
            parts.append(lo.redirect_store(body, k.name, b))
            bufs.append(b)
        body = block(*parts, *last, make_rest())
        for b in reversed(bufs):
            body = Alloc(b, body)
        return body


def _shift_store(s: Stmt, name: str, base: list[Expr]) -> Stmt:
    from luthier.ir.loop import map_children

    if isinstance(s, Store) and s.buf.name == name:
        return replace(s, idx=tuple(i + b for i, b in zip(s.idx, base, strict=True)))
    return map_children(s, lambda c: _shift_store(c, name, base))


def make_func(name: str, body: Stmt, dims: tuple[Expr, ...]) -> Func:
    """A Func around ``body``: buffers that it uses but does not allocate become parameters (read ones first, then written)."""
    from luthier.ir.loop import exprs_of, walk_stmts

    local: set[str] = set()
    read: dict[str, Buffer] = {}
    written: dict[str, Buffer] = {}
    used: set[Expr] = set()
    bound: set[Expr] = set()
    for s in walk_stmts(body):
        if isinstance(s, Alloc):
            local.add(s.buf.name)
            used |= {v for e in s.buf.shape for v in free_vars(e)}
        if isinstance(s, Store):
            written.setdefault(s.buf.name, s.buf)
        if isinstance(s, For):
            bound.add(s.var)
        for e in exprs_of(s):
            used |= free_vars(e)
            for x in loads(e):
                read.setdefault(x.attr[0].name, x.attr[0])
    for b in [*read.values(), *written.values()]:
        for e in b.shape:
            used |= free_vars(e)
    ins = [replace(b, scope="param", writable=False) for n, b in read.items() if n not in local and n not in written]
    outs = [replace(b, scope="param") for n, b in written.items() if n not in local]
    dimset = [d for d in dims if d in used]
    env = {b.name: b for b in (*ins, *outs)}
    body = _rebind(body, env)
    return Func(name, (*ins, *outs, *dimset), body)


def _rebind(s: Stmt, env: dict[str, Buffer]) -> Stmt:
    """Loads and stores refer to the parameter buffers by the very same Buffer."""
    from luthier.ir.loop import map_children, rewrite_stmt

    def f(x: Expr) -> Expr | None:
        if x.op == "load" and x.attr[0].name in env and x.attr[0] is not env[x.attr[0].name] and x.attr[0].scope != "local":
            if x.attr[0].rank != env[x.attr[0].name].rank:
                return None
            _, idx, m, o = load_parts(x)
            return load(env[x.attr[0].name], idx, m, o)
        return None

    def st(x: Stmt) -> Stmt:
        if isinstance(x, Store) and x.buf.name in env and x.buf.rank == env[x.buf.name].rank:
            return replace(x, buf=env[x.buf.name])
        return map_children(x, st)

    return st(rewrite_stmt(s, f))


