"""The loops of a Fold: states before, steps and next values inside, finals after the loop that carries them."""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import Fold
from luthier.ir.expr import (
    Expr,
    as_expr,
    const,
    load,
    loads,
    minimum,
    prove,
    substitute,
    var,
)
from luthier.ir.loop import Alloc, Buffer, For, If, Stmt, Store, block, map_children, substitute_stmt
from luthier.schedules.base.nest import Env, Nest, Region, box_of

LANES = 8  # of a copied state
FOLD_THREADS = 128  # threads of a group that keeps the states of a Fold in shared memory


class FoldNest(Nest):
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
                b = box_of(self.lo.sub(self.st.subst[a.var], inner_env), unbound)
                out.append((const(0), a.extent) if b is None else b)
            else:
                out.append((const(0), a.extent))
        return out

    def walk(self, axes: list[Expr], extents: list[Expr], body: Stmt, shared: bool = False) -> Stmt:
        """Loops over a state; the longest one is shared out to the threads of a group where states lie in shared memory. ``shared``: the
        last axis is the Fold's own; where a block of it lies inside the Fold's loop, it runs as that block does."""
        inner = self.st.loops[-1]
        if shared and not inner.reduce and inner.kind in ("vectorize", "unroll"):
            body = For(axes[-1], const(0), extents[-1], inner.kind, body)
            axes, extents = axes[:-1], extents[:-1]
        far = max(range(len(axes)), key=lambda k: extents[k].attr if extents[k].op == "const" else 0, default=-1)
        for k in reversed(range(len(axes))):
            v, n = axes[k], extents[k]
            if self.st.scope != "shared" and k == len(axes) - 1 and n.op == "const" and n.attr % LANES == 0 and n.attr > LANES:
                o, t = self.lo.fresh(f"{v.attr[0]}.o", n // LANES), self.lo.fresh(f"{v.attr[0]}.t", const(LANES))
                body = For(o, const(0), n // LANES, "serial", For(t, const(0), const(LANES), "vectorize", substitute_stmt(body, {v: o * LANES + t})))
            elif self.st.scope != "shared" or k != far:
                body = For(v, const(0), n, "serial", body)
            elif n.op == "const" and n.attr <= FOLD_THREADS:
                body = For(v, const(0), n, "thread.x", body)
            else:
                rounds = (n + (FOLD_THREADS - 1)) // FOLD_THREADS
                o, t = self.lo.fresh(f"{v.attr[0]}.o", rounds), self.lo.fresh(f"{v.attr[0]}.t", const(FOLD_THREADS))
                at = o * FOLD_THREADS + t
                body = substitute_stmt(body, {v: at})
                body = For(t, const(0), const(FOLD_THREADS), "thread.x", body if prove(at < n) else If(at < n, body))
                body = For(o, const(0), rounds, "serial", body)
        return body

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
            b = Buffer(q.buf.name + ".s", q.buf.dtype, tuple(x for _, x in r), "shared" if st.scope == "shared" else "local")
            bufs.append(b)
            ax = [lo.fresh(f"{q.buf.name}.{a.name}", x) for a, (_, x) in zip(q.axes, r, strict=True)]
            sub = {a.var: minimum(base + v, a.extent - 1) for a, v, (base, _) in zip(q.axes, ax, r, strict=True)}
            s: Stmt = Store(b, tuple(ax), lo.loads_placed(substitute(q.init, sub)))
            pre.append(self.walk(ax, [x for _, x in r], s, q.axes[-1:] == f.axes[-1:]))
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
                copies.append(self.walk(ax, [x for _, x in regions[q.buf.name]], s2, q.axes[-1:] == f.axes[-1:]))
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
                post.append(self.walk(ax, [x for _, x in r], s, q.axes[-1:] == f.axes[-1:]))
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
            b = Buffer(k.name, k.buf.dtype, lo.tile_shape(k, env, r), k.scope)
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
    if isinstance(s, Store) and s.buf.name == name:
        idx = tuple(i + b for i, b in zip(s.idx, base, strict=True))
        inside = as_expr(0).eq(0)
        for i, n in zip(idx, s.buf.shape, strict=True):
            inside = inside & (i < n)
        s = replace(s, idx=idx)
        return s if prove(inside) else If(inside, s)  # loops outside of the Fold's may run past the end of a shared axis
    return map_children(s, lambda c: _shift_store(c, name, base))
