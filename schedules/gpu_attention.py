"""GPU template for attention: two products with a softmax between them, as three kernels.

``s = q . k`` with its scale and mask is a tiled product, the softmax a kernel with a group for each row, ``o = p . v`` a tiled product
again. The division by the sum moves from the output to the probabilities (``sum(e * v) / l = sum((e / l) * v)``), which are read
once more anyway; so no kernel has only that to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Compute, Pull, reduce_
from luthier.ir.expr import Expr, free_vars, load, load_parts, loads, rewrite, substitute
from luthier.schedules.capabilities import Capabilities
from luthier.schedules.contract import _product
from luthier.schedules.schedule import Schedule


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any]) -> Any:
    """Kernels, or None when the Compute is no attention."""
    from luthier.schedules.select import build, cut, join_kernels

    if not caps.gpu:
        return None
    moved = divide_early(s.compute)
    if moved is None:
        return None
    c, first, second = moved
    groups = [list(range(first + 1)), list(range(first + 1, second)), list(range(second, len(c.lets)))]
    return join_kernels([build(p, caps, constants) for p in cut(c, groups)], s.compute)


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
