"""GPU template for products with few rows, ``out[m, n] = sum over k of A[m, k] * B[k, n]`` where memory walks n (ONNX's order of a weight).

A group has a strip of 32 columns. Eight threads side by side read a row of the strip, four columns each, so that a line of memory is
used up at once; the other threads do the same for other k. Each keeps sums of four columns for all rows; the sums meet in shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Pull, axis, reduce_
from luthier.ir.expr import Expr, const, free_vars, is_const, load, load_parts, loads, prove, select, substitute
from luthier.ir.loop import Buffer
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule, annotate, pull_stage, reorder, split, stage
from luthier.schedules.cpu.contract import factors_of
from luthier.schedules.cpu.elementwise import flat, stride
from luthier.schedules.gpu.contract import FEW_ROWS, guard_loads, sum_of_products
from luthier.schedules.gpu.elementwise import LANES, fuse_all, whole

COLUMNS = 8  # threads side by side
DEPTH = 32  # threads along k
SHORTEST = 64  # steps of a sum that are worth sharing out


KNOBS: tuple[Knob, ...] = ()


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any]) -> Schedule | None:
    parts = sum_of_products(s, caps)
    if parts is None:
        return None
    s, acc, out = parts
    a = s.stages[acc]
    red = a.reduction
    assert red is not None
    if not a.axes or len(red.attr[1]) != 1 or len(red.args) > 1 or not whole(a.axes[-1].extent):
        return None
    k, last = red.attr[1][0], a.axes[-1]
    if (k.extent.op == "const" and k.extent.attr < SHORTEST) or (last.extent.op == "const" and last.extent.attr < COLUMNS * LANES):
        return None
    many = next((f for f, g in (factors_of(a), factors_of(a)[::-1]) if last.var in free_vars(f) and last.var not in free_vars(g)), None)
    if many is None or not _walks(many, last.var):
        return None
    few = [x for x in a.axes[:-1] if x.var not in free_vars(many)]
    rows = math.prod(int(x.extent.attr) if x.extent.op == "const" else FEW_ROWS + 1 for x in few)
    if rows > FEW_ROWS:
        return None
    depth = DEPTH
    while depth * rows * COLUMNS * LANES * a.buf.dtype.itemsize > caps.shared_bytes // 2:
        depth //= 2
    return _tile(_parts(s, acc, out, depth), acc, out, [i for i, x in enumerate(a.axes) if x in few])


def _walks(f: Expr, v: Expr) -> bool:
    """Whether all loads of a factor that depend on ``v`` walk it side by side, and nothing else depends on it."""
    mine = [x for x in loads(f) if v in free_vars(x)]
    steps = [stride(flat(*load_parts(x)[:2]), v) for x in mine]
    return bool(mine) and all(d is not None and is_const(d, 1) for d in steps)


def _parts(s: Schedule, acc: str, out: str, depth: int) -> Schedule:
    """The sum over k as ``depth`` sums, ``acc.p[t, ..] = sum over j of A[.., j * depth + t] * B[j * depth + t, ..]``, and their sum."""
    a = s.stages[acc]
    red = a.reduction
    assert red is not None
    (k,) = red.attr[1]
    j, t, u = axis("j", (k.extent + (depth - 1)) // depth), axis("t", depth), axis("u", depth)
    own = [axis(f"{x.name}^", x.extent) for x in a.axes]
    at = j.var * depth + t.var
    value = substitute(red.args[0], {k.var: at, **{x.var: y.var for x, y in zip(a.axes, own, strict=True)}})
    inside = at < k.extent
    if not prove(inside):
        value = select(inside, guard_loads(value, inside), const(0, value.dtype))
    ext = {v: e for v, e in s.ext.items() if not v.attr[0].startswith(f"{acc}.")}
    pb = Buffer(f"{acc}.p", a.buf.dtype, (const(depth), *(x.extent for x in a.axes)), "shared")
    p = pull_stage(Pull(pb, (t, *own), reduce_("sum", [j], value)), ext)
    total = pull_stage(Pull(a.buf, a.axes, reduce_("sum", [u], load(pb, [u.var, *(x.var for x in a.axes)]))), ext)
    return replace(s, stages={p.name: p, acc: total, out: s.stages[out]}, ext=ext, trace=(*s.trace, ("parts", acc, depth)))


def _tile(s: Schedule, acc: str, out: str, rows: list[int]) -> Schedule:
    """``rows``: positions of the axes whose elements a thread has all of."""
    names = [lp.name for lp in s.stages[out].loops]
    n = len(names) - 1
    s = split(s, names[n], COLUMNS * LANES, into=(f"{out}.no", f"{out}.ni"))
    s = split(s, f"{out}.ni", LANES, into=(f"{out}.nt", f"{out}.nv"))
    grid = [x for i, x in enumerate(names[:n]) if i not in rows]
    s = reorder(s, *grid, f"{out}.no", f"{out}.nt", *(names[i] for i in rows), f"{out}.nv")
    s, block = fuse_all(s, [*grid, f"{out}.no"])
    s = annotate(annotate(annotate(s, block, "block.x"), f"{out}.nt", "thread.x"), f"{out}.nv", "vectorize")
    p = f"{acc}.p"
    s = stage(s, p, at=block, scope="shared")
    loops = [lp.name for lp in s.stages[p].loops if not lp.reduce]
    (j,) = [lp.name for lp in s.stages[p].loops if lp.reduce]
    s = split(s, loops[n + 1], LANES)
    columns, lane = f"{loops[n + 1]}.0", f"{loops[n + 1]}.1"
    mine = [loops[i + 1] for i in rows]
    s = reorder(s, *(x for i, x in enumerate(loops[1 : n + 1]) if i not in rows), loops[0], columns, j, *mine, lane)
    s, thread = fuse_all(s, [loops[0], columns])
    s = annotate(annotate(s, thread, "thread.x"), lane, "vectorize")
    s = stage(s, acc, at=f"{out}.nt")
    loops = [lp.name for lp in s.stages[acc].loops if not lp.reduce]
    (u,) = [lp.name for lp in s.stages[acc].loops if lp.reduce]
    s = reorder(s, *(x for i, x in enumerate(loops[:n]) if i not in rows), u, *(loops[i] for i in rows), loops[n])
    s = annotate(s, loops[n], "vectorize")
    for x in [*(names[i] for i in rows), *mine, *(loops[i] for i in rows)]:
        s = annotate(s, x, "unroll")
    return s
