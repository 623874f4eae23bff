"""Template for everything without a better one: elementwise and injective tensors, small reductions, pushes and folds.

Root tensors become parallel loops over their outer axes with the innermost axis in lanes; adjacent axes that all accesses walk
contiguously are fused first, so that ``f32[2, 3, 5, 7]`` is one loop of 210.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Pull, axis
from luthier.ir.expr import Expr, const, free_vars, load, load_parts, loads, rewrite, substitute, walk
from luthier.passes.loop.flatten import flat_index
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule, Stage, annotate, fuse, in_runs, pull_stage, reorder, split
from luthier.schedules.cpu.tabulate import tabulate

PIECE = 1024  # elements of a row that a transposition walks before it takes the next rows


KNOBS = (Knob("grain", "elements of a chunk that one thread takes", (1024, 16384, 65536), 4096),)


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, grain: int = 4096) -> Schedule | None:
    s = in_runs(s)
    for name, st in list(s.stages.items()):
        if st.at is None and st.fold is None:
            before = set(s.stages)
            s = tabulate(s, name)
            for n in [n for n in s.stages if n not in before]:
                s = pointwise(s, n, caps, grain)
            s = pointwise(s, name, caps, grain)
    return s


def flat(buf: Any, idx: tuple[Expr, ...]) -> Expr:
    ix = flat_index(buf, idx)
    return ix[0] if ix else const(0)


def stride(e: Expr, v: Expr) -> Expr | None:
    """How much an index grows with ``v`` (None when not affine in it)."""
    d = substitute(e, {v: v + 1}) - e
    return None if v in free_vars(d) else d


def collapse(s: Schedule, name: str) -> Schedule:
    """Adjacent axes that every access walks as one become one axis; buffers are then viewed in fewer dimensions.

    Before ``O[a, b] = X[a, b] + y[0]``, after ``O[f] = X[f] + y[0]`` with f < A * B."""
    st = s.stages[name]
    if st.reduction is not None or st.push or st.fold or len(st.axes) < 2:
        return s
    uses = _axis_uses(st)
    axes, expr, buf = list(st.axes), st.expr, st.buf
    k = len(axes) - 1
    while k > 0:
        a, b = axes[k - 1], axes[k]
        one = b.extent.op == "const" and b.extent.attr == 1
        flats = [flat(*load_parts(x)[:2]) for x in loads(expr)]
        ok = a.var not in uses and b.var not in uses
        for e in flats:
            do, di = stride(e, a.var), stride(e, b.var)
            ok = ok and do is not None and di is not None and (one or do is di * b.extent)
        if not ok:
            k -= 1
            continue
        f = axis(f"{a.name}{b.name}", a.extent * b.extent)
        env = {a.var: f.var, b.var: const(0)} if one else {a.var: const(0), b.var: f.var}

        def view(x: Expr, env: dict[Expr, Expr] = env) -> Expr | None:
            if x.op != "load":
                return None
            lb, idx, m, o = load_parts(x)
            if not any(free_vars(i) & env.keys() for i in idx):
                return None
            fb = replace(lb, shape=(lb.size(),))
            return load(fb, (substitute(flat(lb, idx), env),), m, o)

        expr = rewrite(expr, view)
        axes[k - 1 : k + 1] = [f]
        uses = uses | ({f.var} & uses)
        k -= 1
    if len(axes) == len(st.axes):
        return s
    buf = replace(buf, shape=tuple(a.extent for a in axes))
    ext = dict(s.ext)
    new = pull_stage(Pull(buf, tuple(axes), expr), ext)
    return replace(s, stages={**s.stages, name: replace(new, scope=st.scope)}, ext=ext, trace=(*s.trace, ("collapse", name)))


def _axis_uses(st: Stage) -> set[Expr]:
    """Axis variables that the expression reads outside of load indices (iota, masks, conditions)."""
    inside: set[Expr] = set()
    outside: set[Expr] = set()
    for e in walk(st.expr):
        if e.op == "load":
            _, idx, m, o = load_parts(e)
            for i in idx:
                inside |= free_vars(i)
                if any(x.op not in ("var", "const", "add", "mul", "sub") for x in walk(i)):
                    outside |= free_vars(i)
            continue
        for a in e.args:
            if a.op == "var":
                outside.add(a)
    return outside & {a.var for a in st.axes}


def pointwise(s: Schedule, name: str, caps: Capabilities, grain: int = 4096) -> Schedule:
    """Lanes on the innermost spatial axis, the rest fused into one parallel loop."""
    st = s.stages[name]
    if not st.axes:
        return s
    has_red = st.reduction is not None
    if not has_red:
        s = collapse(s, name)
    st = s.stages[name]
    sp = [lp for lp in st.loops if not lp.reduce]
    inner = sp[-1]
    lanes = caps.lanes(widest_bits(st))
    n = s.static_extent(inner.var)
    vec = lanes > 1 and (n is None or n >= lanes) and not has_red
    if vec and not has_red:
        tiled = _transposed(s, name, lanes)
        if tiled is not None:
            return tiled
    outer = [lp.name for lp in sp[:-1]]
    total = 1
    for lp in sp:
        e = s.static_extent(lp.var)
        total = -1 if e is None or total < 0 else total * e
    if vec:
        lane_loop = inner.name
        if not outer and (n is None or n > 2 * lanes * 128):
            s = split(s, inner.name, lanes * 128, "min")
            outer = [s.stages[name].loops[0].name]
            lane_loop = s.stages[name].loops[1].name
        s = split(s, lane_loop, lanes, "cut")
        s = annotate(s, f"{lane_loop}.1", "vectorize")
    elif not vec and n is not None and len(outer) == 0 and not has_red:
        return s
    elif has_red and not outer:
        outer = [inner.name]
    while len(outer) > 1:
        s = fuse(s, outer[0], outer[1])
        outer = [s.stages[name].loops[0].name, *outer[2:]]
    if outer and not (0 <= total < grain and not has_red):
        s = annotate(s, outer[0], "parallel")
    return s


def _transposed(s: Schedule, name: str, lanes: int) -> Schedule | None:
    """Loads that walk another axis contiguously than the store does are made in square blocks of both axes, of a vector's length, so that
    each cache line that is fetched is used up and :mod:`luthier.passes.loop.transpose_blocks` finds them. None when there is no such load
    or an axis is short."""
    st = s.stages[name]
    last = st.axes[-1].var
    other = None
    for x in loads(st.expr):
        b, idx, _, _ = load_parts(x)
        e = flat(b, idx)
        d = stride(e, last)
        if d is None or (d.op == "const" and d.attr in (0, 1)):
            continue
        for k, a in enumerate(st.axes[:-1]):
            da = stride(e, a.var)
            if da is not None and da.op == "const" and da.attr == 1 and st.subst[a.var] is st.loops[k].var:
                other = k
    if other is None or st.subst[last] is not st.loops[-1].var:
        return None
    u, v = st.loops[other].name, st.loops[-1].name
    nu, nv = s.static_extent(st.loops[other].var), s.static_extent(st.loops[-1].var)
    if nu is not None and nu < 4 or nu is not None and nv is not None and nu * nv < 1024:
        return None
    side = min(lanes, 16)
    rest = [lp.name for k, lp in enumerate(st.loops[:-1]) if k != other]
    far, near = (u, v) if nv is not None and (nu is None or nu >= nv) else (v, u)  # rows far apart are walked along the longer axis, a line at a time
    s = split(s, far, PIECE, "min", into=(f"{far}.p", f"{far}.q"))
    s = split(split(s, f"{far}.q", side, "cut"), near, max(side, 16), "min", into=(f"{near}.p", f"{near}.q"))
    s = split(s, f"{near}.q", side, "cut")
    s = annotate(annotate(s, f"{v}.q.1", "vectorize"), f"{u}.q.1", "unroll")
    s = reorder(s, *rest, f"{far}.p", f"{near}.p", f"{far}.q.0", f"{near}.q.0", f"{u}.q.1", f"{v}.q.1")
    first = next((n for n in rest if (s.static_extent(_loop_var(s, name, n)) or 1) > 1), f"{far}.p")
    return annotate(s, first, "parallel")


def _loop_var(s: Schedule, name: str, loop: str) -> Expr:
    return next(lp.var for lp in s.stages[name].loops if lp.name == loop)


def widest_bits(st: Stage) -> int:
    """Bits of the widest type that the expression computes with (bools and indices aside)."""
    bits = max(8, st.buf.dtype.bits)
    for e in walk(st.expr):
        if e.dtype.is_float or e.dtype.is_int:
            bits = max(bits, e.dtype.bits)
    return bits

