"""Canonical forms: what exporters write in many ways becomes one.

Before: ``b = Identity(a); c = Transpose[0,2,1](Transpose[0,2,1](b)); d = Mul(c, 1); e = Pow(d, 2)``. After: ``e = Mul(a, a)``.
Every rule is a function below with its equation as its docstring; none changes a result by more than the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.builder import Names
from luthier.ir.dtypes import i64
from luthier.ir.expr import Expr, as_expr
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.passes.graph.materialize_contents import CONTENT
from luthier.passes.graph.rewrite import Context, rewrite_graph


def canonicalize(graph: Graph) -> bool:
    """In place; True when something changed."""
    return rewrite_graph(graph, lambda n, c: RULES[n.op](n, c) if n.op in RULES else None, Names(graph))


def shape_value(ctx: Context, shape: Sequence[Expr]) -> Value:
    """A shape as an i64 tensor: a constant, or a Content node."""
    if all(s.op == "const" for s in shape):
        return ctx.const("shape", np.array([s.attr for s in shape], np.int64))
    v = Value(ctx.names.fresh("shape"), TensorType.of(i64, (len(shape),)), None, tuple(shape))
    ctx.add(Node(CONTENT, (), (v,), {}, v.name, ""))
    return v


def reshape(ctx: Context, x: Value, shape: Sequence[Expr], like: Node) -> Value:
    """``x`` with another shape of the same size."""
    return ctx.make("Reshape", [x, shape_value(ctx, shape)], {"allowzero": 1}, like)


def scalar(v: Value | None) -> Any:
    """The value of a constant whose elements are all equal, else None."""
    if v is None or v.data is None or v.data.size == 0 or v.data.dtype.kind not in "fiub":
        return None
    if v.data.size > 4096:
        return None
    flat = v.data.reshape(-1)
    return flat[0].item() if (flat == flat[0]).all() else None


def is_unit(s: Expr) -> bool:
    return s.op == "const" and s.attr == 1


def identity(n: Node, ctx: Context) -> Value | None:
    """Identity(x) = x"""
    return n.inputs[0]


def dropout(n: Node, ctx: Context) -> Value | None:
    """Dropout(x) = x in inference, when its mask is not read"""
    training = n.input(2)
    if training is not None and scalar(training) != 0:
        return None
    return None if len(n.outputs) > 1 and ctx.uses.get(n.outputs[1], 0) else n.inputs[0]


def cast_noop(n: Node, ctx: Context) -> Value | None:
    """Cast(x, T) = x for x of type T"""
    x = n.inputs[0]
    return x if x is not None and x.dtype is n.outputs[0].dtype else None


def same_shape(n: Node, ctx: Context) -> Value | None:
    """Reshape, Squeeze, Unsqueeze, Flatten, Expand to the shape that x has = x"""
    x = n.inputs[0]
    return x if x is not None and x.shape == n.outputs[0].shape and not n.outputs[0].bound else None


def perm_of(n: Node) -> tuple[int, ...]:
    r = n.outputs[0].rank
    return tuple(int(p) for p in n.attrs.get("perm", range(r - 1, -1, -1)))


def transpose(n: Node, ctx: Context) -> Value | None:
    """Transpose[p](Transpose[q](x)) = Transpose[q o p](x); identity and unit-only permutations move nothing"""
    x = n.inputs[0]
    assert x is not None
    p = perm_of(n)
    if p == tuple(range(len(p))):
        return x
    inner = ctx.producer(x, "Transpose")
    if inner is not None:
        q = perm_of(inner)
        both = tuple(q[i] for i in p)
        u = inner.inputs[0]
        assert u is not None
        return u if both == tuple(range(len(p))) else ctx.make("Transpose", [u], {"perm": both}, n)
    flat = channels_flat(n, ctx)
    if flat is not None:
        return flat
    moved = [i for i in p if not is_unit(x.shape[i])]
    if moved == sorted(moved):
        return reshape(ctx, x, n.outputs[0].shape, n)
    return None


def channels_flat(n: Node, ctx: Context) -> Value | None:
    """Transpose[0,2,1](Reshape[N, C, H W](Transpose[channels first](x[N, H, W, C]))) = Reshape[N, H W, C](x)"""
    if perm_of(n) != (0, 2, 1):
        return None
    r = ctx.producer(n.inputs[0], "Reshape", "Flatten")
    t = None if r is None else ctx.producer(r.inputs[0], "Transpose")
    if r is None or t is None or t.inputs[0] is None or r.inputs[0] is None:
        return None
    x, first = t.inputs[0], r.inputs[0]
    if perm_of(t) != (0, x.rank - 1, *range(1, x.rank - 1)) or r.outputs[0].shape[:2] != first.shape[:2]:
        return None
    return reshape(ctx, x, n.outputs[0].shape, n)


def batched_transpose(n: Node, ctx: Context) -> Value | None:
    """Reshape[b.., n, m](Transpose[0,2,1](Reshape[p, m, n](x[b.., m, n]))) = Transpose[.., r, r-1](x), with p the product of b"""
    t = ctx.producer(n.inputs[0], "Transpose")
    if t is None or perm_of(t) != (0, 2, 1):
        return None
    inner = ctx.producer(t.inputs[0], "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    if inner is None:
        return None
    x = inner.inputs[0]
    assert x is not None and t.inputs[0] is not None
    y = n.outputs[0]
    r = x.rank
    if r != y.rank or r < 3 or y.shape[: r - 2] != x.shape[: r - 2] or (y.shape[r - 2], y.shape[r - 1]) != (x.shape[r - 1], x.shape[r - 2]):
        return None
    if t.inputs[0].shape[1:] != x.shape[r - 2 :]:
        return None
    return ctx.make("Transpose", [x], {"perm": (*range(r - 2), r - 1, r - 2)}, n)


def reshape_rule(n: Node, ctx: Context) -> Value | None:
    """Views of views are views of the first"""
    r = same_shape(n, ctx)
    if r is None:
        r = batched_transpose(n, ctx)
    if r is None:
        inner = ctx.producer(n.inputs[0], "Reshape", "Squeeze", "Unsqueeze", "Flatten")
        if inner is not None and inner.inputs[0] is not None and not n.outputs[0].bound:
            x = inner.inputs[0]
            if x.shape == n.outputs[0].shape:
                return x
            if n.attrs.get("allowzero") and n.input(1) is not None and n.input(1).content is not None:  # type: ignore[union-attr]
                return ctx.make("Reshape", [x, n.inputs[1]], {"allowzero": 1}, n)
            return reshape(ctx, x, n.outputs[0].shape, n)
    return r


def concat(n: Node, ctx: Context) -> Value | None:
    """Concat(x) = x; empty operands vanish"""
    y = n.outputs[0]
    axis = int(n.attrs["axis"])
    axis = axis + y.rank if axis < 0 else axis
    keep = [v for v in n.inputs if v is not None and not (v.shape[axis].op == "const" and v.shape[axis].attr == 0)]
    if len(keep) == 1:
        return keep[0]
    if keep and len(keep) < len(n.inputs):
        return ctx.make("Concat", keep, {"axis": axis}, n)
    return None


def slice_all(n: Node, ctx: Context) -> Value | None:
    """Slice(x, everything) = x"""
    x, steps = n.inputs[0], n.input(4)
    assert x is not None
    if x.shape != n.outputs[0].shape:
        return None
    if steps is not None and (steps.data is None or (steps.data < 0).any()):
        return None
    starts = n.input(1)
    return x if starts is not None and starts.data is not None else None


def pad_nothing(n: Node, ctx: Context) -> Value | None:
    """Pad(x, 0) = x"""
    return n.inputs[0] if scalar(n.input(1)) == 0 else None


def split(n: Node, ctx: Context) -> list[Value] | None:
    """Split(x) = Slices of x: each can be read in place by its reader"""
    x = n.inputs[0]
    assert x is not None
    axis = int(n.attrs.get("axis", 0))
    axis = axis + x.rank if axis < 0 else axis
    if any(v.bound for v in n.outputs):
        return None
    out = []
    at: Expr = as_expr(0)
    for v in n.outputs:
        end = at + v.shape[axis]
        bounds = [shape_value(ctx, [e]) for e in (at, end)]
        out.append(ctx.make("Slice", [x, *bounds, ctx.const("axes", np.array([axis], np.int64))], {}, n))
        at = end
    return out


def neutral(value: float, side: int = 1) -> Callable[[Node, Context], Value | None]:
    def rule(n: Node, ctx: Context) -> Value | None:
        """x + 0 = x, x - 0 = x, x * 1 = x, x / 1 = x"""
        for i in (1, 0) if side == 2 else (1,):
            x, c = n.inputs[1 - i], n.inputs[i]
            if x is not None and c is not None and c.data is not None and scalar(c) == value and x.shape == n.outputs[0].shape:
                return x
        return None

    return rule


def power(n: Node, ctx: Context) -> Value | None:
    """x ** 1 = x, x ** 2 = x * x, x ** 3 = x * x * x, x ** 0.5 = sqrt(x)"""
    x = n.inputs[0]
    p = scalar(n.inputs[1])
    assert x is not None
    if p is None or x.shape != n.outputs[0].shape or not x.dtype.is_float:
        return None
    if p == 1:
        return x
    if p == 0.5:
        return ctx.make("Sqrt", [x], {}, n)
    if p == 2:
        return ctx.make("Mul", [x, x], {}, n)
    if p == 3:
        return ctx.make("Mul", [ctx.make("Mul", [x, x], {}, n), x], {}, n)
    return None


def clip(n: Node, ctx: Context) -> Value | None:
    """Clip(x) without bounds = x"""
    return n.inputs[0] if n.input(1) is None and n.input(2) is None else None


def expand(n: Node, ctx: Context) -> Value | None:
    """Expand to the same shape = x"""
    return same_shape(n, ctx)


def gather_one(n: Node, ctx: Context) -> Value | None:
    """Gather(x, constant scalar i, axis) = Squeeze(Slice(x, i, i + 1)): an index that a reader can absorb"""
    x, i = n.inputs[0], n.inputs[1]
    if x is None or i is None or i.data is None or i.data.size != 1:
        return None
    axis = int(n.attrs.get("axis", 0))
    axis = axis + x.rank if axis < 0 else axis
    at = int(i.data.reshape(-1)[0])
    end = at + 1 if at != -1 else np.iinfo(np.int64).max
    one = [ctx.const("index", np.array([k], np.int64)) for k in (at, end, axis)]
    s = ctx.make("Slice", [x, *one], {}, n)
    return reshape(ctx, s, n.outputs[0].shape, n)


def sum_inputs(n: Node, ctx: Context) -> Value | None:
    """Sum(a, b, ...) = a + b + ..., Max and Min of one value = the value"""
    ins = [v for v in n.inputs if v is not None]
    if len(ins) == 1 and ins[0].shape == n.outputs[0].shape:
        return ins[0]
    if n.op != "Sum":
        return None
    out = ins[0]
    for v in ins[1:]:
        out = ctx.make("Add", [out, v], {}, n)
    return out


RULES: dict[str, Callable[[Node, Context], Any]] = {
    "Identity": identity, "Dropout": dropout, "Cast": cast_noop, "Reshape": reshape_rule, "Squeeze": reshape_rule, "Unsqueeze": reshape_rule,
    "Flatten": reshape_rule, "Expand": expand, "Transpose": transpose, "Concat": concat, "Slice": slice_all, "Pad": pad_nothing,
    "Split": split, "Add": neutral(0, 2), "Sub": neutral(0), "Mul": neutral(1, 2), "Div": neutral(1), "Pow": power, "Clip": clip,
    "Gather": gather_one, "Sum": sum_inputs, "Max": sum_inputs, "Min": sum_inputs,
}  # fmt: skip

__all__ = ["canonicalize", "perm_of", "reshape", "scalar", "shape_value"]
