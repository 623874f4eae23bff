"""Loop and Scan as ``While`` statements with state in buffers.

Before: ``y, s = Loop(n, true, x) {body}``. After: ``copy(x, y); i = 0; while cond & i < n: body(y) -> next; copy(next, y); copy(slice,
s + i * size); i += 1``. States keep their shapes; slices are stacked along a new first axis and moved where Scan wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier.ir.compute import Compute, axis, pull
from luthier.ir.dtypes import boolean, i64, index
from luthier.ir.errors import UnsupportedOperator
from luthier.ir.expr import Expr, as_expr, cast, const, free_vars, land, load, var
from luthier.ir.graph import Graph, Node, Value
from luthier.ir.loop import Block, Buffer, Let, Stmt, Store, While
from luthier.ir.ops.control_flow import keeps_going, states

if TYPE_CHECKING:
    from luthier.passes.build_program import _Builder


def emit_loop(build: _Builder, it: Any, stmts: list[Stmt], defined: set[Expr]) -> None:
    n = it.node
    body: Graph = n.attrs["body"]
    ns = states(n)
    m, c0 = n.input(0), n.input(1)
    i, going = build.temp(f"{n.name}.i", i64, (as_expr(1),)), build.temp(f"{n.name}.cond", boolean, (as_expr(1),))
    stmts.append(Store(i, (const(0),), const(0, i64)))
    stmts.append(Store(going, (const(0),), const(True, boolean) if c0 is None else build.at(build.buffer_of(c0), 0)))
    cond = load(going, [const(0)])
    limit = None if m is None else build.at(build.buffer_of(m), 0)
    if limit is not None:
        cond = land(cond, load(i, [const(0)]) < limit)
    state = start_states(build, n, n.inputs[2:], n.outputs[:ns], stmts)
    scans = n.outputs[ns:]
    slices = body.outputs[1 + ns :]
    stacks: list[Buffer] = []
    for v in scans:
        if keeps_going(body) and m is not None:
            stacks.append(build.buffer_of(v))
            continue
        if m is None or m.content is None:
            raise UnsupportedOperator("a Loop with scan outputs needs a trip count that is known when it starts", node=n.name, op=n.op)
        cap = (m.content[0], *v.shape[1:])
        stacks.append(build.temp(f"{v.name}.capacity", v.dtype, cap))
    it_var = var(f"{n.name}.round", lo=0)
    build.storage[body.inputs[0]] = alias(build, i, body.inputs[0])
    build.storage[body.inputs[1]] = alias(build, going, body.inputs[1])
    for v, b in zip(body.inputs[2:], state, strict=True):
        build.storage[v] = alias(build, b, v)
    nxt = [build.temp(f"{n.name}.next{k}", v.dtype, v.shape) for k, v in enumerate(body.outputs)]
    inner_defined = set(defined) | {it_var}
    inner: list[Stmt] = [Let(it_var, cast(load(i, [const(0)]), index))]
    inner += read_bound(build, body.inputs, inner_defined)
    inner += build.block(body, list(zip(body.outputs, nxt, strict=True)), inner_defined)
    for v, src, dst in zip(slices, nxt[1 + ns :], stacks, strict=True):
        build._copy(src, (dst, it_var * v_size(v)), inner, (n.name,))
    for src, dst in zip(nxt[1 : 1 + ns], state, strict=True):
        build._copy(src, dst, inner, (n.name,))
    inner.append(Store(going, (const(0),), build.at(nxt[0], 0)))
    inner.append(Store(i, (const(0),), cast(it_var + 1, i64)))
    stmts.append(While(cond, Block(tuple(inner))))
    for v, b in zip(scans, stacks, strict=True):
        if build.storage.get(v) is not b:
            s = v.shape[0]
            if s not in defined:
                stmts.append(Let(s, cast(load(i, [const(0)]), index)))
                defined.add(s)
            build.storage[v] = build._view(v, b)


def emit_scan(build: _Builder, it: Any, stmts: list[Stmt], defined: set[Expr]) -> None:
    n = it.node
    body: Graph = n.attrs["body"]
    ns = states(n)
    seqs = [v for v in n.inputs[ns:] if v is not None]
    in_axes = [a + v.rank if a < 0 else a for a, v in zip(n.attrs.get("scan_input_axes", (0,) * len(seqs)), seqs, strict=True)]
    in_rev = n.attrs.get("scan_input_directions", (0,) * len(seqs))
    outs = n.outputs[ns:]
    out_axes = [a + v.rank if a < 0 else a for a, v in zip(n.attrs.get("scan_output_axes", (0,) * len(outs)), outs, strict=True)]
    out_rev = n.attrs.get("scan_output_directions", (0,) * len(outs))
    length = seqs[0].shape[in_axes[0]]
    i = build.temp(f"{n.name}.i", i64, (as_expr(1),))
    t = var(f"{n.name}.round", lo=0)
    stmts.append(Store(i, (const(0),), const(0, i64)))
    state = start_states(build, n, n.inputs[:ns], n.outputs[:ns], stmts)
    for v, b in zip(body.inputs[:ns], state, strict=True):
        build.storage[v] = alias(build, b, v)
    inner_defined = set(defined) | {t}
    inner: list[Stmt] = [Let(t, cast(load(i, [const(0)]), index))]
    for seq, v, a, rev in zip(seqs, body.inputs[ns:], in_axes, in_rev, strict=True):
        slice_sequence(build, seq, v, a, (length - 1 - t) if rev else t, t, inner, n.name)
    inner += read_bound(build, body.inputs, inner_defined)
    nxt = [build.temp(f"{n.name}.next{k}", v.dtype, v.shape) for k, v in enumerate(body.outputs)]
    inner += build.block(body, list(zip(body.outputs, nxt, strict=True)), inner_defined)
    stacks = []
    for v, s, src, a, rev in zip(outs, body.outputs[ns:], nxt[ns:], out_axes, out_rev, strict=True):
        b = build.buffer_of(v) if a == 0 else build.temp(f"{v.name}.stack", v.dtype, (length, *s.shape))
        stacks.append(b)
        build._copy(src, (b, ((length - 1 - t) if rev else t) * v_size(s)), inner, (n.name,))
    for src, dst in zip(nxt[:ns], state, strict=True):
        build._copy(src, dst, inner, (n.name,))
    inner.append(Store(i, (const(0),), cast(t + 1, i64)))
    stmts.append(While(cast(load(i, [const(0)]), index) < length, Block(tuple(inner))))
    for v, b, a in zip(outs, stacks, out_axes, strict=True):
        if a != 0:
            move_axis(build, b, v, a, stmts, n.name)


def start_states(build: _Builder, n: Node, starts: Sequence[Value | None], results: Sequence[Value], stmts: list[Stmt]) -> list[Buffer]:
    state = []
    for v, r in zip(starts, results, strict=False):
        assert v is not None
        b = build.buffer_of(r)
        build._copy(build.buffer_of(v), b, stmts, (n.name,))
        state.append(b)
    return state


def alias(build: _Builder, b: Buffer, v: Value) -> Buffer:
    """``b`` seen with the shape of ``v``."""
    w = replace(b, name=build.fresh(v.name), shape=v.shape)
    root, offset = build.views.get(b.name, (b.name, const(0)))
    build.views[w.name] = (root, offset)
    return w


def read_bound(build: _Builder, values: Iterable[Value], defined: set[Expr]) -> list[Stmt]:
    out: list[Stmt] = []
    for v in values:
        if v.bound and v.content is not None:
            for k, s in enumerate(v.content):
                out.append(Let(s, cast(build.at(build.buffer_of(v), k), s.dtype)))
                defined.add(s)
    return out


def gather_call(build: _Builder, name: str, src: Buffer, dst: Buffer, index_of: Callable[[list[Expr]], list[Expr]], scalars: Mapping[Expr, Expr], stmts: list[Stmt], node: str) -> None:
    axes = [axis(f"i{k}", s) for k, s in enumerate(dst.shape)]
    p = Buffer("p0", src.dtype, src.shape, "param", False)
    x = pull("o0", axes, load(p, index_of([a.var for a in axes])))
    dims = {s for e in (*src.shape, *dst.shape, *x.expr.args) for s in free_vars(e)} - {a.var for a in axes}
    c = Compute(name, (p,), tuple(sorted(dims, key=lambda e: e.key)), (x,), ("o0",))
    for f in build.schedule(c, {}).funcs:
        build._call(f, {"p0": src, "o0": dst}, scalars, stmts, (node,))


def slice_sequence(build: _Builder, seq: Value, v: Value, a: int, position: Expr, t: Expr, stmts: list[Stmt], node: str) -> None:
    """``v = seq[..., position, ...]`` (axis ``a``)."""
    k = var("position", lo=0)
    gather_call(build, "slice", build.buffer_of(seq), build.buffer_of(v), lambda ix: [*ix[:a], k, *ix[a:]], {k: position}, stmts, node)


def move_axis(build: _Builder, src: Buffer, v: Value, a: int, stmts: list[Stmt], node: str) -> None:
    """``v[..., t, ...] = src[t, ...]`` (axis ``a``)."""
    gather_call(build, "move_axis", src, build.buffer_of(v), lambda ix: [ix[a], *ix[:a], *ix[a + 1 :]], {}, stmts, node)


def v_size(v: Value) -> Expr:
    n = as_expr(1)
    for s in v.shape:
        n = n * s
    return n
