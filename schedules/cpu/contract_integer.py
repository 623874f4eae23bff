"""Template for sums of integer products: quantized matrix products and convolutions, through the target's dot product.

The pattern is ``acc[..] = sum((i32(x) - zx) * (i32(w) - zw))`` over 8-bit operands with an elementwise epilogue. The activation
gets a copy in the form that the instruction reads: padded to whole groups, zero point subtracted where the instruction takes
16-bit operands (a padded element is then 0). The weights are packed into panels whose groups stand together; where the
instruction takes bytes, ``zx`` moves into the epilogue as ``- zx * sum(w)``, summed at compile time. All of it is exact.

Depthwise: a lane has a filter to itself, so that there is nothing for a dot product to share; while every partial sum stays below
2**24, sums of f32 are exact and the float template computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from luthier.ir.compute import Axis, Pull, axis, reduce_
from luthier.ir.dtypes import DType, f32, i16, i32
from luthier.ir.expr import (
    Expr,
    as_expr,
    bounds,
    cast,
    const,
    free_vars,
    is_const,
    linear,
    load,
    load_parts,
    loads,
    maximum,
    rewrite,
    substitute,
)
from luthier.ir.intrin import Instruction
from luthier.ir.loop import Buffer
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule, annotate, pack, pull_stage, reorder, split, stage, tensorize
from luthier.schedules.base.simplify_axes import split_reduced_axes
from luthier.schedules.cpu import contract
from luthier.schedules.cpu.elementwise import collapse, pointwise, stride
from luthier.schedules.cpu.integer_epilogue import EXACT, simplify_epilogue
from luthier.schedules.cpu.integer_packing import CenteredPacking, SumPacking
from luthier.schedules.intrin import usable

COPY_LANES = 16  # elements that a copy of the activation widens at once


@dataclass(frozen=True, slots=True)
class Operand:
    """``i32(ld) - zero``. ``viewed``: the load sees the tensor in another shape than it has."""

    ld: Expr
    zero: Expr | None
    viewed: bool = False

    @property
    def buf(self) -> Buffer:
        return self.ld.attr[0]  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        """Largest magnitude of a value."""
        lo, hi = self.buf.dtype.limits()
        if self.zero is None:
            return max(-lo, hi)
        zl, zh = bounds(self.zero.args[0]) if self.zero.op == "cast" else bounds(self.zero)
        if zl is None or zh is None:
            zl, zh = lo, hi
        return max(abs(lo - zh), abs(hi - zl))


KNOBS = (
    Knob("mu", "rows of the register tile", (1, 2, 3, 4, 5, 6, 8, 10, 12), group="tile"),
    Knob("nv", "columns of the register tile", lambda caps, _: tuple(n * caps.lanes(32) for n in (1, 2, 3, 4)), group="tile"),
    Knob("ku", "rounds of the innermost reduction loop that are unrolled", (1, 2), 4),
    Knob("order", "the outer loop: rows or panels of columns", ("rows", "panels")),
    Knob("instr", "the instruction of the target; its own choice where it is left out"),
)


def apply(
    s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, mu: int | None = None, nv: int | None = None, ku: int = 4,
    order: str | None = None, instr: Instruction | None = None,
) -> Schedule | None:
    if caps.gpu:
        return None
    prepared = contract.prepare(s)
    if prepared is None:
        return None
    s, acc, out = prepared
    st = s.stages[acc]
    factors = contract.factors_of(st)
    if st.buf.dtype is not i32:
        return None
    s = simplify_epilogue(s, out, constants)
    a, b = (operand(f) for f in factors)
    if a is None or b is None:
        return None
    v = st.axes[-1].var
    if v in free_vars(a.ld) and v in free_vars(b.ld):
        return _in_floats(s, acc, out, a, b, caps, constants)
    w, x = (a, b) if v in free_vars(a.ld) else (b, a)
    if v not in free_vars(w.ld) or contract.work(st) is not None and contract.work(st) < 2048:  # type: ignore[operator]
        return None
    n_ext = st.axes[-1].extent
    lanes = caps.lanes(32)
    if n_ext.op == "const" and n_ext.attr < lanes and w.buf.name not in constants:
        return None
    found = [instr] if instr else sorted(usable(caps), key=lambda i: (-i.group, i.a.bits == 8 and i.a is not x.buf.dtype))
    for i in found:
        ready = _operands(s, acc, out, x, w, i, constants)
        if ready is not None:
            return blocked(ready[0], acc, out, ready[2], ready[1], i, caps, mu, nv, ku, order)
    return None


def plausible(knobs: Mapping[str, Any], caps: Capabilities) -> bool:
    """As for sums of floats."""
    return contract.plausible(knobs, caps)


def operand(e: Expr) -> Operand | None:
    """An 8-bit load widened to i32, less a zero point; None for anything else."""
    zero = None
    if e.op == "sub" and e.dtype is i32:
        e, zero = e.args
    if e.op != "cast" or e.dtype is not i32 or e.args[0].op != "load" or e.args[0].dtype.name not in ("i8", "u8"):
        return None
    return Operand(e.args[0], None if zero is None or is_const(zero, 0) else zero)


# ---------------------------------------------------------------- operands in the instruction's form


def _operands(s: Schedule, acc: str, out: str, x: Operand, w: Operand, i: Instruction, constants: Mapping[str, Any]) -> tuple[Schedule, Expr, Operand] | None:
    """(schedule with the accumulator over operands that ``i`` takes, variable of the axis that is cut into groups, weights); None
    where this instruction does not fit."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    s, x, w = split_heads(s, acc, x, w, constants)
    s, x, w = merge_taps(s, acc, x, w, i.group, constants)
    red = s.stages[acc].reduction
    assert red is not None
    k = group_axis(red.attr[1], x.ld, w.ld)
    if k is None or k.extent.op != "const" or not contract.is_packable(s, cast(w.ld, i32), st.axes[-1].var, constants):
        return None
    g = i.group
    whole = axis(k.name + "g", -(-k.extent.attr // g) * g)
    bytewise = i.a.bits == 8
    if bytewise and (i.b is not w.buf.dtype or w.zero is not None or w.buf.name not in constants):
        return None
    if not bytewise and (i.a is not i16 or w.zero is not None and (w.zero.op != "const" or w.buf.name not in constants)):
        return None
    if x.zero is not None and free_vars(x.zero):
        return None
    if bytewise:
        flip = _flip(x.buf.dtype, i.a)
        if flip is None:
            return None
        s, xl = widened_copy(s, x, (k, whole), i.a, flip)
        s = zero_into_epilogue(s, acc, out, x, w, flip)
    else:
        s, xl = widened_copy(s, x, (k, whole), i16, None)
    if xl is None:
        return None
    wl = substitute(w.ld, {k.var: whole.var})
    if not bytewise and w.zero is not None:
        wl = load(replace(w.buf, dtype=i16), load_parts(wl)[1])
    axes = [whole if y is k else y for y in red.attr[1]]
    st = s.stages[acc]
    ext = {a: b for a, b in s.ext.items() if a.attr[0].rsplit(".", 1)[0] != acc}
    new = pull_stage(Pull(st.buf, st.axes, reduce_("sum", axes, cast(xl, i32) * cast(wl, i32))), ext)
    s = replace(s, stages={**s.stages, acc: new}, ext=ext, trace=(*s.trace, ("integer", acc, i.name)))
    return s, whole.var, w


def group_axis(axes: tuple[Axis, ...], x: Expr, w: Expr) -> Axis | None:
    """The reduction axis along which the activation is contiguous: groups are cut from it."""
    buf, idx, _, _ = load_parts(x)
    for a in reversed(axes):
        alone = idx and a.var not in free_vars(idx[-1] - a.var) and all(a.var not in free_vars(i) for i in idx[:-1])
        if alone and sum(i is a.var for i in load_parts(w)[1]) == 1:
            return a
    return None


def merge_taps(s: Schedule, acc: str, x: Operand, w: Operand, group: int, constants: Mapping[str, Any]) -> tuple[Schedule, Operand, Operand]:
    """Few channels do not fill a group: taps along a row and channels, which stand together in memory, become one axis.

    Before ``x[h, 2 ow + kw - 1, c] * w[kh, kw, c, n]`` over kw < 3, c < 3, after ``x[h, 6 ow + j - 3] * w[kh, j, n]`` over j < 9."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    axes = list(red.attr[1])
    buf, idx, mask, other = load_parts(x.ld)
    wbuf, widx, wmask, _ = load_parts(w.ld)
    if len(axes) < 2 or len(idx) < 2 or w.buf.name not in constants or w.zero is not None and w.zero.op != "const":
        return s, x, w
    t, c = axes[-2], axes[-1]
    n = buf.shape[-1]
    fits = idx[-1] is c.var and n is c.extent and n.op == "const" and n.attr % group and t.extent.op == "const" and wmask is None
    if not fits or t.var in free_vars(idx[-2] - t.var) or any(t.var in free_vars(i) for i in idx[:-2]):
        return s, x, w
    at = [d for d, i in enumerate(widx) if i is t.var]
    if len(at) != 1 or at[0] + 1 >= len(widx) or widx[at[0] + 1] is not c.var or (mask is not None and not contract.is_box(mask, buf, idx)):
        return s, x, w
    d = at[0]
    j = axis(t.name + c.name, t.extent * n)
    view = replace(buf, shape=(*buf.shape[:-2], buf.shape[-2] * n))
    i2 = (*idx[:-2], (idx[-2] - t.var) * n + j.var)
    if mask is not None:
        mask = const(0).eq(0)
        for i, m in zip(i2, view.shape, strict=True):
            mask = mask & (const(0) <= i) & (i < m)
    wview = replace(wbuf, shape=(*wbuf.shape[:d], j.extent, *wbuf.shape[d + 2 :]))
    wl = load(wview, (*widx[:d], j.var, *widx[d + 2 :]))
    x2, w2 = Operand(load(view, i2, mask, other), x.zero), Operand(wl, w.zero, True)
    params = tuple(wview if p.name == wview.name else p for p in s.compute.params)
    new = replace(st, expr=reduce_("sum", [*axes[:-2], j], _value(x2) * _value(w2)))
    compute = replace(s.compute, params=params)
    return replace(s, compute=compute, stages={**s.stages, acc: new}, trace=(*s.trace, ("merge_taps", acc))), x2, w2


def split_heads(s: Schedule, acc: str, x: Operand, w: Operand, constants: Mapping[str, Any]) -> tuple[Schedule, Operand, Operand]:
    """A reduction axis that the activation reads as ``k // c`` and ``k % c`` (merged heads) becomes two, and so does the weights' dimension."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    axes, e = split_reduced_axes(red.attr[1], red.args[0])
    if e is red.args[0] or w.buf.name not in constants or w.zero is not None and w.zero.op != "const":
        return s, x, w
    f = contract.as_product(e)
    pair = None if f is None else [operand(q) for q in f]
    if pair is None or pair[0] is None or pair[1] is None:
        return s, x, w
    x2, w2 = (pair[1], pair[0]) if pair[0].buf.name == w.buf.name else (pair[0], pair[1])
    ext = {a.var: a.extent for a in axes}
    shape: list[Expr] = []
    idx: list[Expr] = []
    for i, n in zip(load_parts(w2.ld)[1], w2.buf.shape, strict=True):
        parts = sorted(((c, m[0]) for m, c in linear(i).items() if len(m) == 1 and m[0] in ext), key=lambda t: -t[0])
        if len(parts) == 2 and parts[1][0] == 1 and is_const(ext[parts[1][1]], parts[0][0]) and i is parts[0][1] * parts[0][0] + parts[1][1]:
            shape += [n // parts[0][0], const(parts[0][0])]
            idx += [parts[0][1], parts[1][1]]
        else:
            shape.append(n)
            idx.append(i)
    w3 = Operand(load(replace(w2.buf, shape=tuple(shape)), idx), w2.zero, True)
    new = replace(st, expr=reduce_("sum", axes, _value(x2) * _value(w3)))
    compute = replace(s.compute, params=tuple(w3.buf if p.name == w3.buf.name else p for p in s.compute.params))
    return replace(s, compute=compute, stages={**s.stages, acc: new}, trace=(*s.trace, ("split_heads", acc))), x2, w3


def _value(o: Operand) -> Expr:
    return cast(o.ld, i32) if o.zero is None else cast(o.ld, i32) - o.zero


def _flip(have: DType, want: DType) -> int | None:
    """What to add to a byte of type ``have`` to get one of type ``want`` (i8 + 128 is a u8); None when neither is 8 bits wide."""
    if have.bits != 8 or want.bits != 8:
        return None
    return 0 if have is want else 128 if want.kind == "u" else -128


def widened_copy(s: Schedule, x: Operand, groups: tuple[Axis, Axis] | None, to: DType, flip: int | None) -> tuple[Schedule, Expr | None]:
    """The activation as ``to`` in a tensor without masks; (schedule, load of it, None where it cannot be made).

    Values are ``x - zx``, for bytes ``x + flip``. ``groups``: the axis of the last dimension and the one of whole groups that takes
    its place. The tensor itself where it already is all that."""
    buf, idx, mask, other = load_parts(x.ld)
    env = {} if groups is None else {groups[0].var: groups[1].var}
    if flip == 0 and mask is None and (groups is None or groups[1].extent is groups[0].extent):
        return s, substitute(x.ld, env)
    if mask is not None and not contract.is_box(mask, buf, idx):
        return s, None
    base, shape = [], []
    idx = tuple(substitute(i, env) for i in idx)
    for i, m in zip(idx, buf.shape, strict=True):
        lo, hi = _corner(i, 0), _corner(i, 1)
        if lo is None or hi is None or lo.op != "const":
            return s, None
        b = min(lo.attr, 0)
        base.append(b)
        shape.append(hi + (1 - b) if mask is not None else maximum(hi + (1 - b), m))
    ax = [axis(f"x{d}", e) for d, e in enumerate(shape)]
    src = [a.var + b for a, b in zip(ax, base, strict=True)]
    inside = const(0).eq(0)
    for i, m in zip(src, buf.shape, strict=True):
        inside = inside & (const(0) <= i) & (i < m)
    pad = other if mask is not None and other is not None else x.zero.args[0] if x.zero is not None and x.zero.op == "cast" else None
    if pad is None:
        pad = const(0 if x.zero is None else x.zero.attr, buf.dtype)
    between = f32 if to.is_float else i16
    value = cast(load(buf, src, inside, pad), between)
    if flip is not None:
        value = value + const(flip, between)
    elif x.zero is not None:
        value = value - cast(x.zero, between)
    copy = Buffer(f"{buf.name}.pad", to, tuple(shape), "global", True)
    ext = dict(s.ext)
    made = pull_stage(Pull(copy, tuple(ax), cast(value, to)), ext)
    s = replace(s, stages={copy.name: made, **s.stages}, ext=ext, trace=(*s.trace, ("widen", buf.name, to.name)))
    return s, load(copy, [i - b for i, b in zip(idx, base, strict=True)])


def _corner(e: Expr, end: int) -> Expr | None:
    """An index with all its variables at their first (0) or last (1) value; None where it falls with one of them."""
    vs = free_vars(e)
    for u in vs:
        d = stride(e, u)
        if d is None or d.op != "const" or d.attr < 0 or u.attr[1] != 0 or (end and u.attr[2] is None):
            return None
    return substitute(e, {u: as_expr(u.attr[2]) if end else const(0) for u in vs})


def zero_into_epilogue(s: Schedule, acc: str, out: str, x: Operand, w: Operand, flip: int) -> Schedule:
    """``sum((x - zx) * w)`` is ``sum((x + flip) * w) - (zx + flip) * sum(w)``; the last sum is a constant for each column."""
    zero = (const(0, i32) if x.zero is None else x.zero) + const(flip, i32)
    if is_const(zero, 0):
        return s
    st, ep = s.stages[acc], s.stages[out]
    _, idx, _, _ = load_parts(w.ld)
    red = st.reduction
    assert red is not None
    inner = {a.var for a in red.attr[1]}
    over = tuple(d for d, i in enumerate(idx) if i in inner)
    kept = [d for d in range(len(idx)) if d not in over]
    sums = Buffer(f"{w.buf.name}.sum", i32, tuple(w.buf.shape[d] for d in kept), "param", False)
    p = SumPacking(w.buf.name, (), (), s.compute, sums, over, _static(w.ld.attr[0].shape) if w.viewed else ())

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0].name == acc:
            env = {a.var: i for a, i in zip(st.axes, load_parts(e)[1], strict=True)}
            return e - zero * load(sums, [substitute(idx[d], env) for d in kept])
        return None

    new = replace(ep, expr=rewrite(ep.expr, fix))
    return replace(s, stages={**s.stages, out: new}, packed={**s.packed, sums.name: p}, trace=(*s.trace, ("zero_point", acc)))


def _packed(s: Schedule, acc: str, w: Operand, k: Expr, i: Instruction, nv: int) -> Schedule:
    """Weights in panels of ``nv`` columns, groups of the reduction innermost."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    v = st.axes[-1].var
    x = next(y for y in loads(st.expr) if v in free_vars(y))
    buf, idx, _, _ = load_parts(x)
    rank = {a.var: n for n, a in enumerate(red.attr[1])}
    d = next(n for n, e in enumerate(idx) if e is v)
    kd = next(n for n, e in enumerate(idx) if e is k)
    batch = [n for n, e in enumerate(idx) if n != d and e not in rank]
    inner = sorted((n for n, e in enumerate(idx) if e in rank), key=lambda n: rank[idx[n]])
    s = pack(s, buf.name, (*batch, d, *inner), {d: nv, kd: i.group})
    viewed = _static(buf.shape) if w.viewed else ()
    if buf.dtype is w.buf.dtype and not viewed:
        return s
    return _recentred(s, acc, f"{buf.name}.pack", buf.dtype, 0 if w.zero is None else w.zero.attr, viewed)


def _static(shape: tuple[Expr, ...]) -> tuple[int, ...]:
    return tuple(e.attr for e in shape)


def _recentred(s: Schedule, acc: str, name: str, to: DType, zero: int, shape: tuple[int, ...] = ()) -> Schedule:
    """The packing ``name`` of constant weights in type ``to``, less their zero point."""
    p = s.packed[name]
    wide = replace(p.buf, dtype=to)
    centered = CenteredPacking(p.param, p.order, p.tile, p.job, wide, zero, shape)
    st = s.stages[acc]

    def fix(e: Expr) -> Expr | None:
        return load(wide, load_parts(e)[1]) if e.op == "load" and e.attr[0].name == name else None

    stages = {**s.stages, acc: replace(st, expr=rewrite(st.expr, fix))}
    return replace(s, stages=stages, packed={**s.packed, name: centered})


# ---------------------------------------------------------------- blocking


def tile(m: Expr, n: Expr, lanes: int, registers: int, i: Instruction, narrow: bool) -> tuple[int, int]:
    """(rows, vectors) of the register tile with the least estimated cycles per group over an m x n output.

    Two dot products and two loads a cycle, six micro-operations in all (measured on Zen 3). ``narrow``: the weights are widened
    in the register, one more operation for each of their vectors."""
    mm = m.attr if m.op == "const" else 96
    nn = n.attr if n.op == "const" else 256
    best: tuple[float, int, int] | None = None
    for nr in range(1, 9):
        if nr > 1 and (nr - 1) * lanes >= nn:
            break
        for mu in range(1, 29):
            if mu * nr + nr + (1 if i.adds else 2) > registers or mu > mm:
                break
            c = 0.0
            for rows, times in ((mu, mm // mu), (mm % mu, 1)):
                if rows:
                    ops = rows * nr * (1 if i.adds else 2) + rows + nr * (2 if narrow else 1)
                    c += times * max(rows * nr / 2, (rows + nr) / 1.6, ops / 5, 1.0)
            c *= -(-nn // (nr * lanes))
            if best is None or c < best[0] * 0.999:
                best = (c, mu, nr)
    assert best is not None
    return best[1], best[2]


def blocked(
    s: Schedule, acc: str, out: str, weights: Operand, k: Expr, i: Instruction, caps: Capabilities, mu: int | None, nv: int | None, ku: int, order: str | None,
) -> Schedule:
    st = s.stages[acc]
    lanes = caps.vector_bits // i.acc.bits
    a, b = contract.factors_of(st)
    v = st.axes[-1].var
    w, x = (a, b) if v in free_vars(a) else (b, a)
    us = [y for y in st.axes[:-1] if y.var in free_vars(x) and y.var not in free_vars(w)]
    s = contract.merge_rows(s, [acc, out], [y.var for y in us])
    st = s.stages[acc]
    us = [y for y in st.axes[:-1] if y.var in {z.var for z in us} or y.name.startswith("_u")]
    m = us[-1].extent if us else const(1)
    narrow = loads(w)[0].dtype.bits < i.b.bits
    mu_, nr = tile(m, st.axes[-1].extent, lanes, caps.registers, i, narrow)
    mu, nv = mu or mu_, nv or nr * lanes
    s = _packed(s, acc, weights, k, i, nv)
    st = s.stages[acc]
    group = next(lp.name for lp in st.loops if st.subst[k] is lp.var)
    s = split(s, group, i.group, "guard")
    s = contract.register_tile(s, acc, out, v, us, mu, nv, lanes, 1, caps, True, False, _block(s, acc, out, w, x, caps), order)
    s = dotted(s, acc, group, i, ku)
    return schedule_pads(_local_copies(s, acc, out), caps)


def _block(s: Schedule, acc: str, out: str, w: Expr, x: Expr, caps: Capabilities) -> int:
    """Rows whose activations and results stay in the first cache while all panels of columns pass: narrow results would otherwise be
    written a part of a cache line at a time."""
    st = s.stages[acc]
    assert st.reduction is not None
    terms = 1
    for a in st.reduction.attr[1]:
        if a.extent.op != "const":
            return 0
        terms *= a.extent.attr
    n = st.axes[-1].extent
    if n.op != "const" or terms > 512:
        return 0
    row = terms * loads(x)[0].dtype.itemsize + n.attr * s.stages[out].buf.dtype.itemsize
    return int(max(24, caps.l1 // 2 // row))


def dotted(s: Schedule, acc: str, group: str, i: Instruction, ku: int) -> Schedule:
    """The inner part of the split reduction loop ``group`` and the vector loop become ``i``; up to ``ku`` rounds of the outer part are
    unrolled where that divides them."""
    st = s.stages[acc]
    names = [lp.name for lp in st.loops]
    inner = names[names.index(f"{group}.1") + 1 :]
    s = reorder(s, *inner[:-1], f"{group}.1", inner[-1])
    s = annotate(s, f"{group}.1", "serial")
    s = tensorize(s, f"{group}.1", i)
    rounds = s.static_extent(next(lp.var for lp in st.loops if lp.name == f"{group}.0"))
    if not i.adds or rounds is None:  # the code generator would add the products of several rounds first, and runs out of registers
        return s
    if rounds <= ku:
        return annotate(s, f"{group}.0", "unroll")
    while rounds % ku:
        ku -= 1
    if ku > 1:
        s = split(s, f"{group}.0", ku)
        s = annotate(s, f"{group}.0.1", "unroll")
    return s


def _local_copies(s: Schedule, acc: str, out: str) -> Schedule:
    """Where rows come in blocks, the activation's copy is made for a block, in memory that stays in cache. Only for flat copies:
    before ``pad[f] = x[f]`` for the whole tensor, after the same for the rows of a block."""
    block = f"{out}.ub"
    if not s.stages[out].loops or s.stages[out].loops[0].name != block:
        return s
    for ld in loads(s.stages[acc].expr):
        name = ld.attr[0].name
        idx = load_parts(ld)[1]
        if not name.endswith(".pad") or len(idx) != 1:
            continue
        t = collapse(s, name)
        st = t.stages[name]
        if len(st.axes) != 1 or any(load_parts(x)[2] is not None for x in loads(st.expr)):
            continue
        t = stage(t, name, at=block)
        last = t.stages[name].loops[-1]
        t = split(t, last.name, COPY_LANES, "guard")
        s = annotate(t, f"{last.name}.1", "vectorize")
    return s


def schedule_pads(s: Schedule, caps: Capabilities) -> Schedule:
    for n, y in s.stages.items():
        if n.endswith(".pad") and y.at is None:
            s = pointwise(s, n, caps)
    return s


# ---------------------------------------------------------------- depthwise


def _in_floats(s: Schedule, acc: str, out: str, a: Operand, b: Operand, caps: Capabilities, constants: Mapping[str, Any]) -> Schedule | None:
    """The sum in f32, where no partial sum can leave the integers that f32 holds."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    terms = 1
    for y in red.attr[1]:
        if y.extent.op != "const":
            return None
        terms *= y.extent.attr
    if terms * a.size * b.size > EXACT:
        return None

    x, w = (b, a) if a.buf.name in constants else (a, b)
    n = st.axes[-1].extent
    wide = n.op == "const" and n.attr % (2 * caps.lanes(32)) == 0  # two vectors of bytes fill more of each line that is fetched
    bytewise = wide and caps.registers >= 16 and load_parts(x.ld)[2] is not None and all(e.op == "const" for e in x.buf.shape) and len(st.axes) > 2
    s, xl = widened_copy(s, x, None, x.buf.dtype, 0) if bytewise else widened_copy(s, x, None, f32, None)
    if xl is None:
        return None
    if bytewise:
        xl = cast(xl, f32) if x.zero is None else cast(xl, f32) - cast(x.zero, f32)
    constant = w.buf.name in constants and (w.zero is None or w.zero.op == "const")
    wl = load(replace(w.buf, dtype=f32), load_parts(w.ld)[1]) if constant else cast(w.ld, f32)
    if w.zero is not None and not constant:
        wl = wl - cast(w.zero, f32)

    buf = replace(st.buf, dtype=f32)
    ext = {k: v for k, v in s.ext.items() if k.attr[0].rsplit(".", 1)[0] != acc}
    new = pull_stage(Pull(buf, st.axes, reduce_("sum", red.attr[1], xl * wl)), ext)
    ep = s.stages[out]

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0].name == acc:
            return cast(load(buf, load_parts(e)[1]), i32)
        if e.op == "cast" and e.dtype is f32 and e.args[0].op == "cast" and e.args[0].args[0].op == "load" and e.args[0].args[0].attr[0] is buf:
            return e.args[0].args[0]
        return None

    s = replace(s, stages={**s.stages, acc: new, out: replace(ep, expr=rewrite(ep.expr, fix))}, ext=ext, trace=(*s.trace, ("exact_floats", acc)))
    if constant:
        s = pack(s, w.buf.name, tuple(range(w.buf.rank)), {})
        s = _recentred(s, acc, f"{w.buf.name}.pack", f32, 0 if w.zero is None else w.zero.attr)
    if bytewise:  # bytes are converted in registers: one vector of channels leaves room for the row's converted inputs
        return contract.product(s, acc, out, caps, constants, mu=7, nv=caps.lanes(32))
    if wide and caps.registers >= 16:
        return contract.product(s, acc, out, caps, constants, mu=6, nv=2 * caps.lanes(32))
    return contract.product(s, acc, out, caps, constants)
