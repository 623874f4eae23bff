"""Join the Computes of a group of nodes into one.

Before: ``MatMul: o[i,j] = sum[k](a[i,k] * b[k,j])`` and ``Relu: o[i,j] = max(x[i,j], 0)`` with ``x`` the MatMul's output.
After: ``t0[i,j] = sum[k](p0[i,k] * p1[k,j]); o0[i,j] = max(t0[i,j], 0)``.

Tensors get canonical names (``p*`` parameters in order of first use, ``o*`` outputs, the rest by their operator), so that equal
groups print equal text. Lets that only move elements, or that one let reads once per element, are inlined into their readers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from luthier.ir.compute import Axis, Compute, Fold, LetStmt, Pull, Push, State, buffers_of, let_exprs, map_let, normalize
from luthier.ir.errors import LuthierError
from luthier.ir.expr import Expr, const, free_vars, land, load, load_parts, rewrite, select, substitute, walk
from luthier.ir.graph import Graph, Node, Value
from luthier.ir.loop import Buffer
from luthier.ir.op import Kernel, lookup
from luthier.ir.ops.common import inlines_scalar


@dataclass(slots=True)
class Joined:
    """``compute``; ``params``: the Value behind each of its parameters; ``outs``: the Value behind each output tensor."""

    compute: Compute
    params: dict[str, Value]
    outs: dict[str, Value]


def node_compute(node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute | Kernel | Graph:
    """The operator's mathematics, errors naming the node."""
    o = lookup(node.op)
    assert o is not None
    try:
        return o.compute(node, ins, outs)
    except LuthierError as e:
        shapes = {v.name: tuple(v.shape) for v in node.inputs if v is not None}
        raise e.at(node=node.name, op=node.op, shapes=shapes) from None


def join(name: str, nodes: Sequence[Node], outputs: Sequence[Value]) -> Joined | Kernel:
    """One Compute for ``nodes`` (in topological order) that defines ``outputs``. A group of one may give a Kernel instead.

    Raises the operators' own errors."""
    produced = {v for n in nodes for v in n.outputs}
    outer: dict[Value, Buffer] = {}
    inner: dict[Value, Buffer] = {}
    out_names = {v: f"o{k}" for k, v in enumerate(outputs)}
    lets: list[LetStmt] = []
    used: set[str] = set(out_names.values())
    scalars: dict[str, Expr] = {}

    def fresh(base: str) -> str:
        n, k = base, 0
        while n in used:
            k += 1
            n = f"{base}_{k}"
        used.add(n)
        return n

    def buffer(v: Value, node: Node) -> Buffer:
        if v in inner:
            return inner[v]
        b = outer.get(v)
        if b is None:
            b = outer[v] = Buffer(fresh(f"p{len(outer)}"), v.dtype, v.shape, "param", False)
            if v.data is not None and v.data.size == 1 and inlines_scalar(node, v.data.reshape(-1)[0]):
                scalars[b.name] = const(v.data.reshape(-1)[0].item(), v.dtype)
        return b

    for node in nodes:
        ins = [None if v is None else buffer(v, node) for v in node.inputs]
        outs = []
        for v in node.outputs:
            b = Buffer(out_names.get(v) or fresh(f"t{len(inner)}"), v.dtype, v.shape, "param" if v in out_names else "global")
            inner[v] = b
            outs.append(b)
        c = node_compute(node, ins, outs)
        if isinstance(c, Graph):
            raise AssertionError(f"{node.op} must be legalised before groups are joined")
        if isinstance(c, Kernel):
            if len(nodes) != 1:
                raise AssertionError(f"{node.op} is a kernel and cannot join a group")
            return c
        keep = {b.name for b in outs} | {b.name for b in ins if b is not None}
        names: dict[str, Buffer] = {}
        c = normalize(c)
        for x in c.lets:
            for b in _all_buffers(x):
                if b.name not in names:
                    names[b.name] = b if b.name in keep else replace(b, name=fresh(b.name))
        lets += [_rename(x, names) for x in c.lets]
    lets = _drop_unused(lets, set(out_names.values()))
    if scalars:
        lets = [map_let(x, lambda e: rewrite(e, lambda t: scalars.get(t.attr[0].name) if t.op == "load" else None)) for x in lets]
    count = 0
    while count != len(lets):  # inlining one let can leave another with a single reader
        count = len(lets)
        lets = inline_lets(lets, set(out_names.values()))
    back = {b.name: v for v, b in outer.items()}
    return _canonical(name, lets, back, {b: v for v, b in out_names.items()}, {v: outer[v] for v in outer if v not in produced})


def _all_buffers(x: LetStmt) -> tuple[Buffer, ...]:
    return buffers_of(x) + (tuple(p.buf for p in x.step) if isinstance(x, Fold) else ())


def map_buffers(x: LetStmt, fb: Callable[[Buffer], Buffer], fe: Callable[[Expr], Expr]) -> LetStmt:
    """A let with its own buffers through ``fb`` and its expressions through ``fe``."""
    if isinstance(x, Pull):
        return Pull(fb(x.buf), x.axes, fe(x.expr))
    if isinstance(x, Push):
        y = map_let(x, fe)
        assert isinstance(y, Push)
        return replace(y, buf=fb(x.buf))
    return replace(
        x,
        state=tuple(State(fb(s.buf), s.axes, fe(s.init), fe(s.next)) for s in x.state),
        step=tuple(Pull(fb(p.buf), p.axes, fe(p.expr)) for p in x.step),
        emit=tuple(Pull(fb(p.buf), p.axes, fe(p.expr)) for p in x.emit),
    )


def _rename(x: LetStmt, names: Mapping[str, Buffer]) -> LetStmt:
    memo: dict[Expr, Expr] = {}

    def fn(e: Expr) -> Expr | None:
        if e.op != "load":
            return None
        buf, idx, mask, other = load_parts(e)
        new = names.get(buf.name)
        return None if new is None or new == buf else load(new, idx, mask, other)

    return map_buffers(x, lambda b: names.get(b.name, b), lambda e: rewrite(e, fn, memo))


def reads(x: LetStmt) -> dict[str, list[Expr]]:
    """{tensor name: its loads} in a let, a Fold's own tensors included."""
    out: dict[str, list[Expr]] = {}
    for e in walk(*let_exprs(x)):
        if e.op == "load":
            out.setdefault(e.attr[0].name, []).append(e)
    return out


def _drop_unused(lets: Sequence[LetStmt], outs: set[str]) -> list[LetStmt]:
    need = set(outs)
    kept: list[LetStmt] = []
    for x in reversed(lets):
        if any(b.name in need for b in _all_buffers(x)):
            kept.append(x)
            need |= set(reads(x))
    return kept[::-1]


def is_copy(e: Expr) -> bool:
    """Only moves elements: loads, constants, and selections between them by position."""
    if e.op == "load" or e.op == "const":
        return True
    if e.op == "select":
        return not any(t.op == "load" for t in walk(e.args[0])) and is_copy(e.args[1]) and is_copy(e.args[2])
    return False


def inline_lets(lets: Sequence[LetStmt], outs: set[str]) -> list[LetStmt]:
    """Before: ``t[i] = f(x[i]); o[i] = g(t[i])``. After: ``o[i] = g(f(x[i]))`` where no work is repeated by it."""
    uses: dict[str, list[LetStmt]] = {}
    for x in lets:
        for n in reads(x):
            uses.setdefault(n, []).append(x)
    table: dict[str, Pull] = {}
    out: list[LetStmt] = []
    for x in lets:
        fold_inner = isinstance(x, Fold)
        x = map_buffers(x, lambda b: b, _inliner(table)) if table else x
        if isinstance(x, Pull) and x.name not in outs and not fold_inner and x.expr.op not in ("reduce", "proj"):
            readers = uses.get(x.name, [])
            if is_copy(x.expr) or (len(readers) == 1 and _reads_once(readers[0], x.name)):
                table[x.name] = x
                continue
        out.append(x)
    return out


def _reads_once(x: LetStmt, name: str) -> bool:
    """Each element of ``name`` is read at most once by ``x`` (every axis of ``x`` occurs in the indices), or x is pointwise."""
    if not isinstance(x, Pull):
        return False
    if x.expr.op not in ("reduce", "proj"):
        return _size_ratio_one(x, name)
    red = x.expr if x.expr.op == "reduce" else x.expr.args[0]
    axes = {a.var for a in x.axes} | {a.var for a in red.attr[1]}
    if any(i.loading for e in reads(x)[name] for i in load_parts(e)[1]):  # an index from memory may repeat
        return False
    return all(axes <= {v for i in load_parts(e)[1] for v in free_vars(i)} | _unit(x.axes, red.attr[1]) for e in reads(x)[name])


def _unit(*groups: Sequence[Axis]) -> set[Expr]:
    return {a.var for g in groups for a in g if a.extent.op == "const" and a.extent.attr == 1}


def _size_ratio_one(x: Pull, name: str) -> bool:
    """A pointwise reader computes the inlined value once per element of its own: fine when it reads all axes, in one place."""
    axes = {a.var for a in x.axes} - _unit(x.axes)
    places = {load_parts(e)[1] for e in reads(x)[name]}
    return len(places) == 1 and all(axes <= {v for i in idx for v in free_vars(i)} for idx in places)


def _inliner(table: Mapping[str, Pull]) -> Callable[[Expr], Expr]:
    def fn(e: Expr) -> Expr | None:
        if e.op != "load":
            return None
        buf, idx, mask, other = load_parts(e)
        p = table.get(buf.name)
        if p is None:
            return None
        body = substitute(p.expr, {a.var: i for a, i in zip(p.axes, idx, strict=True)})
        if mask is None:
            return body
        assert other is not None
        if body.op == "load" and load_parts(body)[2] is None:
            return load(body.attr[0], load_parts(body)[1], mask, other)
        return select(mask, _masked(body, mask), other)

    memo: dict[Expr, Expr] = {}
    return lambda e: rewrite(e, fn, memo)


def _masked(e: Expr, mask: Expr) -> Expr:
    def fn(t: Expr) -> Expr | None:
        if t.op != "load":
            return None
        buf, idx, m, other = load_parts(t)
        return load(buf, idx, mask if m is None else land(m, mask), other)

    return rewrite(e, fn)


def _canonical(name: str, lets: list[LetStmt], back: Mapping[str, Value], outs: Mapping[str, Value], outer: Mapping[Value, Buffer]) -> Joined:
    """Number the parameters in order of first use and collect the scalar dimensions."""
    order: list[str] = []
    for x in lets:
        for n in reads(x):
            if n in back and n not in order:
                order.append(n)
    names: dict[str, Buffer] = {}
    taken = {b.name for x in lets for b in _all_buffers(x)}
    k = 0
    for n in order:
        while f"p{k}" in taken:
            k += 1
        names[n] = replace(outer[back[n]], name=f"p{k}")
        k += 1
    if any(n != b.name for n, b in names.items()):
        lets = [_rename(x, names) for x in lets]
    params = tuple(names[n] for n in order)
    bound: set[Expr] = set()
    dims: list[Expr] = []

    def note(e: Expr) -> None:
        for v in sorted(free_vars(e), key=lambda t: t.key):
            if v not in bound and v not in dims:
                dims.append(v)

    def axes(ax: Sequence[Axis]) -> None:
        for a in ax:
            note(a.extent)
            bound.add(a.var)

    for b in params:
        for s in b.shape:
            note(s)
    for x in lets:
        for b in _all_buffers(x):
            for s in b.shape:
                note(s)
        if isinstance(x, Fold):
            axes((*x.axes, x.axis))
            for s2 in x.state:
                axes(s2.axes)
            for p in (*x.step, *x.emit):
                axes(p.axes)
        else:
            axes(x.axes)
            if isinstance(x, Push):
                axes(x.over)
        for e in walk(*let_exprs(x)):
            if e.op == "reduce":
                axes(e.attr[1])
            elif e.op == "load":
                for s in e.attr[0].shape:
                    note(s)
        for e in let_exprs(x):
            note(e)
    c = Compute(name, params, tuple(d for d in dims if d not in bound), tuple(lets), tuple(outs))
    return Joined(c, {names[n].name: back[n] for n in order}, dict(outs))
