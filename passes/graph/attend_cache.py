"""attend_cache: attention over caches that are kept in place reads them where they are.

Before: ``k = FilledCache(..); v = FilledCache(..); y = luthier::Attention(q, k, v, mask)``, with or without heads of keys repeated for groups of
query heads (Reshape(Expand(Unsqueeze(k)))), or the grouped product of rank 5 that GroupQueryAttention becomes.
After: ``y = luthier::AttendFilled(keys, values, q, past, mask)``: one kernel for prompts and single tokens, no copy of a key.
"""

from __future__ import annotations

import numpy as np

from luthier.ir.graph import Graph, Node, Value
from luthier.passes.graph.canonicalize import perm_of, scalar
from luthier.passes.graph.rewrite import Context, rewrite_graph

LANES = 8


def attend_cache(graph: Graph) -> bool:
    """In place; True when something changed."""
    return any(n.op == "luthier::FilledCache" for n in graph.nodes) and rewrite_graph(graph, _rule)


def _filled(v: Value | None, ctx: Context) -> Node | None:
    """The FilledCache behind ``v``, through a repetition of its heads: [1, h, T, D] -> [1, h, g, T, D] -> [1, h g, T, D]."""
    n = ctx.producer(v, "luthier::FilledCache")
    if n is not None or v is None or v.rank != 4:
        return n
    flat = ctx.producer(v, "Reshape")
    wide = ctx.producer(flat.inputs[0], "Expand") if flat is not None else None
    if wide is None or wide.inputs[0] is None or wide.outputs[0].rank != 5:
        return None
    x = wide.inputs[0]
    narrow = ctx.producer(x, "Unsqueeze", "Reshape")
    n = ctx.producer(narrow.inputs[0], "luthier::FilledCache") if narrow is not None else None
    if n is None:
        return None
    a = n.outputs[0].shape
    fits = x.shape == (a[0], a[1], _one(x), a[2], a[3]) and wide.outputs[0].shape[:2] == a[:2] and wide.outputs[0].shape[3:] == a[2:]
    return n if fits and v.shape[2:] == a[2:] else None


def _one(x: Value) -> object:
    """The third extent of ``x`` when it is 1."""
    return x.shape[2] if x.rank == 5 and x.shape[2].op == "const" and x.shape[2].attr == 1 else None


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.op == "luthier::Attention":
        keys, values = _filled(n.inputs[1], ctx), _filled(n.inputs[2], ctx)
        q = n.inputs[0]
        if keys is None or values is None or q is None:
            return None
        return _attend(q, keys, values, n.input(3), float(n.attrs.get("scale", 1.0)), n, ctx)
    if n.op == "MatMul" and n.outputs[0].rank == 5:
        return _grouped(n, ctx)
    return None


def _attend(q: Value, keys: Node, values: Node, mask: Value | None, scale: float, n: Node, ctx: Context) -> Value | None:
    cache = keys.inputs[0]
    if cache is None or values.inputs[0] is None or cache.type != values.inputs[0].type or keys.inputs[2] is not values.inputs[2]:
        return None
    b, h, _, d = cache.shape
    fixed = all(e.op == "const" for e in (b, h, d, q.shape[1]))
    rows = keys.inputs[1]
    if not fixed or b.attr != 1 or d.attr % LANES or q.shape[1].attr % h.attr or rows is None or q.shape[2] != rows.shape[2] or not cache.dtype.is_float:
        return None
    return ctx.make("luthier::AttendFilled", [cache, values.inputs[0], q, keys.inputs[2], mask], {"scale": scale}, n)


def _grouped(n: Node, ctx: Context) -> Value | None:
    """softmax(c MatMul(groups [1, h, g, S, D], keys) + mask) times values, both with an axis of 1 for the group."""
    values = _one_group(n.inputs[1], ctx)
    soft = ctx.single(n.inputs[0], "Softmax")
    add = ctx.single(soft.inputs[0], "Add") if soft is not None and soft.attrs.get("axis", -1) in (-1, 4) else None
    if values is None or add is None:
        return None
    for i in (0, 1):
        mul = ctx.single(add.inputs[i], "Mul")
        c = scalar(mul.inputs[1]) if mul is not None else None
        product = ctx.single(mul.inputs[0], "MatMul") if mul is not None and c is not None else None
        if product is not None:
            break
    else:
        return None
    mask = add.inputs[1 - i]
    keys = _one_group(product.inputs[1], ctx, True)
    groups = product.inputs[0]
    if keys is None or groups is None or mask is None or groups.rank != 5 or mask.rank != 5 or any(e.op != "const" or e.attr != 1 for e in mask.shape[:3]):
        return None
    assert c is not None
    h, g, d = groups.shape[1], groups.shape[2], groups.shape[4]
    if any(e.op != "const" for e in (h, g, d)) or groups.shape[3] != n.outputs[0].shape[3]:
        return None
    q = ctx.make("Reshape", [groups, ctx.const(f"{n.name}.heads", _ints(1, h.attr * g.attr, -1, d.attr))], {}, n)
    if q.shape[2] != groups.shape[3]:
        return None
    flat = ctx.make("Squeeze", [mask, ctx.const(f"{n.name}.axes", _ints(0, 1))], {}, n)
    y = _attend(q, keys, values, flat, float(c), n, ctx)
    if y is None:
        return None
    out = ctx.make("Reshape", [y, ctx.const(f"{n.name}.groups", _ints(1, h.attr, g.attr, -1, d.attr))], {}, n)
    return out if out.shape == n.outputs[0].shape else None


def _one_group(v: Value | None, ctx: Context, transposed: bool = False) -> Node | None:
    """The FilledCache that ``v`` [1, h, 1, T, D] (or [1, h, 1, D, T]) shows."""
    u = ctx.producer(v, "Unsqueeze", "Reshape")
    x = u.inputs[0] if u is not None else None
    if v is None or x is None or x.rank != 4 or v.rank != 5 or v.shape != (*x.shape[:2], _one(v), *x.shape[2:]):
        return None
    if transposed:
        t = ctx.producer(x, "Transpose")
        if t is None or perm_of(t) != (0, 1, 3, 2):
            return None
        x = t.inputs[0]
    return ctx.producer(x, "luthier::FilledCache")


def _ints(*values: int) -> object:
    return np.array(values, np.int64)
