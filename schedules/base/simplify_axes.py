"""Rewrites of a Compute that make its pattern visible to templates; what it means does not change."""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.compute import Axis, Compute, Pull, axis, reduce_
from luthier.ir.expr import Expr, const, is_const, load, load_parts, rewrite, substitute, walk
from luthier.ir.loop import Buffer


def drop_units(c: Compute) -> Compute:
    """Axes of extent 1 go away (one axis stays). Before ``t[b < 1, i] = x[b, i]``, after ``t[i] = x[0, i]``."""
    if not all(isinstance(x, Pull) for x in c.lets):
        return c
    keep: dict[str, list[int]] = {}
    bufs: dict[str, Buffer] = {}
    lets: list[Pull] = []

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0].name in bufs:
            b, idx, m, o = load_parts(e)
            nb = bufs[b.name]
            return None if nb.rank == b.rank else load(nb, [idx[d] for d in keep[b.name]], m, o)
        if e.op == "reduce":
            name, axes, n = e.attr
            left = tuple(a for a in axes if not is_const(a.extent, 1)) or axes[-1:]
            if len(left) == len(axes):
                return None
            args = [substitute(a, {x.var: const(0) for x in axes if x not in left}) for a in e.args]
            return reduce_(name, left, *args[:n], where=args[n] if len(args) > n else None)
        return None

    changed = False
    for x in c.lets:
        assert isinstance(x, Pull)
        kept = [d for d, a in enumerate(x.axes) if not is_const(a.extent, 1)] or [len(x.axes) - 1] if x.axes else []
        gone = {a.var: const(0) for d, a in enumerate(x.axes) if d not in kept}
        nb = replace(x.buf, shape=tuple(x.buf.shape[d] for d in kept)) if x.axes else x.buf
        e = rewrite(substitute(x.expr, gone), fix)
        changed = changed or e is not x.expr or len(kept) != len(x.axes)
        keep[x.name], bufs[x.name] = kept, nb
        lets.append(Pull(nb, tuple(x.axes[d] for d in kept), e))
    return replace(c, lets=tuple(lets)) if changed else c


def split_reduced_axes(axes: tuple[Axis, ...], value: Expr) -> tuple[tuple[Axis, ...], Expr]:
    """A reduction axis that loads read as ``k // c`` and ``k % c`` becomes two, so that indices are affine.

    Before ``sum[k < 384](x[k // 32, i, k % 32])``, after ``sum[k0 < 12, k1 < 32](x[k0, i, k1])``."""
    out: list[Axis] = []
    env: dict[Expr, Expr] = {}
    for a in axes:
        cs = {e.args[1].attr for e in walk(value) if e.op in ("floordiv", "mod") and e.args[0] is a.var and e.args[1].op == "const"}
        c = max(cs, default=0)
        if c and a.extent.op == "const" and a.extent.attr % c == 0 and all(c % x == 0 for x in cs):
            hi, lo = axis(f"{a.name}h", a.extent.attr // c), axis(f"{a.name}l", c)
            env[a.var] = hi.var * c + lo.var
            out += [hi, lo]
        else:
            out.append(a)
    return tuple(out), substitute(value, env) if env else value

