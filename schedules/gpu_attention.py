"""GPU template for attention: two products with a softmax between them.

Where the number of keys is known and the scores of a few query rows fit shared memory, one kernel: a group for each tile of rows of a
head computes its scores (a thread a key, all rows of the tile in registers), their maxima, exponentials and sums in shared
memory, and the weighted sum of the values (a thread an output element). Scores never reach memory.

Otherwise three kernels: ``s = q . k`` with its scale and mask is a tiled product, the softmax a kernel with a group for each row, ``o = p . v`` a
tiled product again. The division by the sum moves from the output to the probabilities (``sum(e * v) / l = sum((e / l) * v)``), which are
read once more anyway; so no kernel has only that to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Compute, Pull, reduce_
from luthier.ir.expr import Expr, free_vars, load, load_parts, loads, rewrite, substitute
from luthier.schedules.capabilities import Capabilities
from luthier.schedules.contract import _product
from luthier.schedules.gpu_elementwise import fuse_all
from luthier.schedules.rowwise import positions
from luthier.schedules.schedule import Schedule, annotate, inline, reorder, split, stage

ROWS = 8  # query rows of a tile at most
LANES = 16  # threads of each row


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, rows: int | None = None) -> Any:
    """A Schedule, Kernels, or None when the Compute is no attention. ``rows``: query rows of a tile, 0 for three kernels."""
    from luthier.schedules.select import build, cut, join_kernels

    if not caps.gpu:
        return None
    moved = divide_early(s.compute)
    if moved is None:
        return None
    if rows != 0:
        one = _fused(s, caps, rows)
        if one is not None:
            return one
    c, first, second = moved
    groups = [list(range(first + 1)), list(range(first + 1, second)), list(range(second, len(c.lets)))]
    return join_kernels([build(p, caps, constants) for p in cut(c, groups)], s.compute)


def _fused(s: Schedule, caps: Capabilities, rows: int | None) -> Schedule | None:
    """One kernel, or None where the scores of a tile do not fit shared memory."""
    out = s.compute.outs[0]
    prods = [n for n, st in s.stages.items() if st.reduction is not None and st.reduction.attr[0] == "sum" and _product(st.reduction.args[0]) is not None]
    first, second = prods
    o = s.stages[out]
    row = len(o.axes) - 2
    keys = s.stages[first].axes[-1].extent
    pos = positions(s, out)
    if row < 1 or keys.op != "const" or pos is None or pos[second] != list(range(len(o.axes))):
        return None
    if any(len(st.axes) > row + 2 or pos[n][: row + 1] != list(range(row + 1)) for n, st in s.stages.items() if n != out):
        return None
    wide = [n for n in s.stages if n != out and len(s.stages[n].axes) == row + 2 and n != second]
    for n in [n for n in s.stages if n != out and s.stages[n].reduction is None and n not in wide]:
        s = inline(s, n)  # corrections of a row's maximum
    maximum = next((st for n, st in s.stages.items() if st.reduction is not None and n not in prods), None)
    host = next((x.attr[0].name for x in loads(maximum.expr) if x.attr[0].name in wide), None) if maximum is not None else None
    if host is None:
        return None
    for n in [n for n in wide if n not in (first, host) and any(x.attr[0].name == n for x in loads(s.stages[host].expr))]:
        s = inline(s, n)  # a scale before the mask
    kept = [n for n in wide if n in s.stages and (n != first or host == first)]
    if kept[0] != host or len(kept) > 2 or any(s.stages[n].reduction is not None and n != first for n in kept):
        return None
    per_row = 4 * keys.attr * len(kept) + 4 * 2 * LANES
    tile = rows or ROWS
    while tile > 1 and tile * per_row > caps.shared_bytes - 1024:
        tile //= 2
    q = s.static_extent(o.loops[row].var)
    if tile * per_row > caps.shared_bytes - 1024 or (tile < 4 and (q is None or q > 1)):
        return None
    if q is not None:
        tile = min(tile, q)
    names = [lp.name for lp in o.loops]
    s = split(s, names[row], tile, into=(f"{out}.qo", f"{out}.qi"))
    s, block = fuse_all(s, [*names[:row], f"{out}.qo"])
    s = annotate(annotate(s, block, "block.x"), f"{out}.qi", "thread.y")
    s = _lanes(s, names[row + 1])
    s = stage(s, second, at=s.stages[out].loops[-1].name)
    for n in kept:
        s = stage(s, n, at=block, scope="shared")
    for n in [n for n in s.stages if n not in (out, first, second, *kept)]:
        s = _row_reduction(s, n, block, row)
    for n in kept[1:]:
        st = s.stages[n]
        s = _lanes(annotate(s, st.loops[row].name, "thread.y"), st.loops[row + 1].name)
    return _scores(s, first, kept[0], row)


def _scores(s: Schedule, first: str, host: str, row: int) -> Schedule:
    """A thread for each key, all rows of the tile in its registers. ``host``: the product itself or its scaled and masked form."""
    st = s.stages[host]
    r, k = st.loops[row].name, st.loops[row + 1].name
    s = split(s, k, LANES * ROWS)
    s = split(s, f"{k}.1", LANES)
    s = annotate(annotate(s, f"{k}.1.0", "thread.y"), f"{k}.1.1", "thread.x")
    keys = [f"{k}.0", f"{k}.1.0", f"{k}.1.1"]
    if host == first:
        s = reorder(s, *keys, *(lp.name for lp in st.loops if lp.reduce), r)
    else:
        s = reorder(s, *keys, r)
        s = stage(s, first, at=keys[-1])
        a = s.stages[first]
        inner = a.loops[row].name
        s = annotate(reorder(s, *(lp.name for lp in a.loops if lp.reduce), inner), inner, "unroll")
    return annotate(s, r, "unroll")


def _lanes(s: Schedule, loop: str) -> Schedule:
    """A loop shared out to the threads of a row."""
    s = split(s, loop, LANES)
    return annotate(s, f"{loop}.1", "thread.x")


def _row_reduction(s: Schedule, name: str, block: str, row: int) -> Schedule:
    """Maximum or sum of each row of the tile: the threads of the row keep partial results, and each of them merges all."""
    k = next(lp.name for lp in s.stages[name].loops if lp.reduce)
    s = split(s, k, LANES)
    s = stage(s, name, private=f"{k}.1")
    p = f"{name}.p"
    s = stage(s, p, at=block, scope="shared")
    s = stage(s, name, at=block, scope="local")
    ps = s.stages[p]
    s = annotate(s, ps.loops[row].name, "thread.y")
    s = annotate(s, ps.loops[len(ps.axes) - 1].name, "thread.x")
    return annotate(s, s.stages[name].loops[row].name, "thread.y")


def divide_early(c: Compute) -> tuple[Compute, int, int] | None:
    """(the Compute with normalised probabilities, number of the let that ends the scores, number of the second product)."""
    lets = list(c.lets)
    if not all(isinstance(x, Pull) for x in lets) or len(c.outs) != 1:
        return None
    pulls = [x for x in lets if isinstance(x, Pull)]
    prods = [i for i, x in enumerate(pulls) if x.expr.op == "reduce" and x.expr.attr[0] == "sum" and _product(x.expr.args[0]) is not None]
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
