"""Lowering: Schedule -> loop IR, one Func for each root stage.

For each root stage the loops are opened in order. At every loop the stages attached there are computed first, each on the box
that the rest of this iteration reads (``_region``). A reduction keeps its partial results in a local tile over the spatial
loops inside its first reduction loop: initialised once, written out once after the last reduction step. An axis that may
overrun its extent is masked where it is vectorised or stored, and clamped to the last valid element elsewhere (the value is
computed twice rather than out of bounds). Nothing here knows a target.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import (
    Expr,
    bounds,
    const,
    free_vars,
    load,
    load_parts,
    loads,
    prove,
    rewrite,
    substitute,
    var,
)
from luthier.ir.loop import Alloc, Buffer, Func, Stmt, Store, block
from luthier.schedules.base.fold_nest import FoldNest
from luthier.schedules.base.make_func import make_func, push_nest
from luthier.schedules.base.nest import Env, Nest, Region, box_of, union_of
from luthier.schedules.base.schedule import Schedule, ScheduleError, Stage, hash_var, readers
from luthier.schedules.base.specialize import choose, special_version


def lower(s: Schedule) -> list[Func]:
    """Root stages in order, each a Func whose params are the buffers it touches (written ones last) and the dims it reads."""
    _check_stages(s)
    out = []
    for st in s.stages.values():
        if st.at is None and (st.fold is not None or st.buf.scope == "global" or st.name in s.compute.outs):
            out.append(_two_versions(s, st) if s.special else Lower(s).func(st))
            if st.push is not None:
                out.append(make_func(f"{s.compute.name}.{st.name}.push", push_nest(st.push, st.buf), s.compute.dims))
    return out


def _two_versions(s: Schedule, st: Stage) -> Func:
    """The kernel of ``st``: what it is under the conditions of ``s.special``, and what it is otherwise."""
    general, lo = Lower(s), [(const(0), a.extent) for a in st.axes]
    body = general.nest(st, {}, lo)
    t, lets = special_version(s)
    mine = t.stages[st.name]
    known = Lower(t)
    known.names = {v.attr[0]: 1 for v in s.ext} | general.names  # loops of the two versions have names of their own
    other = known.nest(mine, {}, [(const(0), a.extent) for a in mine.axes])
    return make_func(general.name_of(st), choose(body, other, s, lets), s.compute.dims)


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


class Lower:
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
        return make_func(self.name_of(st), body, self.s.compute.dims)

    def name_of(self, st: Stage) -> str:
        return self.s.compute.name + "." + st.name if len(self.s.stages) > 1 else self.s.compute.name

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
                b = box_of(idx[d], unbound)
                box = b if box is None else union_of(box, b) if b is not None and box is not None else None
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
            return FoldNest(self, st, region).go(0, env)
        return Nest(self, st, region).go(0, env)

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
