"""Loop and Scan as ``While`` statements with state in buffers.

Before: ``y, s = Loop(n, true, x) {body}``. After: ``copy(x, y); i = 0; while cond & i < n: body(y) -> next; copy(next, y); copy(slice,
s + i * size); i += 1``. Slices are stacked along a new first axis and moved where Scan wants them; where only the run knows how many
there will be, their memory doubles when it is full. A state whose extents change lives in memory that is found anew each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from luthier.ir.compute import Compute, axis, pull
from luthier.ir.dtypes import boolean, i64, index
from luthier.ir.expr import Expr, as_expr, cast, const, free_vars, land, load, maximum, substitute, var
from luthier.ir.graph import Graph, Node, Value
from luthier.ir.loop import Block, Buffer, Call, If, Let, Stmt, Store, While
from luthier.ir.ops.control_flow import states

if TYPE_CHECKING:
    from luthier.schedules.program.build_program import Builder


def emit_loop(build: Builder, it: Any, stmts: list[Stmt], defined: set[Expr]) -> None:
    n = it.node
    m, c0 = n.input(0), n.input(1)
    counter, going = build.temp(f"{n.name}.i", i64, (as_expr(1),)), build.temp(f"{n.name}.cond", boolean, (as_expr(1),))
    stmts.append(_put(counter, const(0)))
    stmts.append(Store(going, (const(0),), const(True, boolean) if c0 is None else build.at(build.buffer_of(c0), 0)))
    scans = n.outputs[states(n) :]
    exact = bool(scans) and free_vars(scans[0].shape[0]) <= defined
    cond = load(going, [const(0)])
    limit = None
    if exact:
        limit = cast(scans[0].shape[0], i64)  # no more rounds than there is room for
        if m is not None and m.bound and m.content is not None:
            stmts.append(Call("lt.check", (cast(m.content[0], i64), build.at(build.buffer_of(m), 0)), (("what", f"the trip count of {n.name}"),)))
    elif m is not None:
        limit = const(int(m.data.reshape(-1)[0]), i64) if m.data is not None else build.at(build.buffer_of(m), 0)
    if limit is not None:
        cond = land(cond, load(counter, [const(0)]) < limit)
    loop = _Loop(build, n, var(f"{n.name}.round", lo=0), counter, stmts)
    loop.rounds(going, exact, set(defined))
    stmts.append(While(cond, Block(tuple(loop.inner))))
    if scans and not exact:
        loop.after.insert(0, Let(scans[0].shape[0], cast(load(counter, [const(0)]), index)))
    stmts += loop.after
    defined |= {s.var for s in loop.after if isinstance(s, Let)}


def _put(b: Buffer, e: Expr) -> Store:
    return Store(b, (const(0),), cast(e, b.dtype))


@dataclass(slots=True)
class _Loop:
    """Statements of a Loop: ``before`` it, ``inner`` those of a round, ``after`` it. ``t``: the round, which is kept in ``counter``."""

    build: Builder
    node: Node
    t: Expr
    counter: Buffer
    before: list[Stmt]
    inner: list[Stmt] = field(default_factory=list)
    after: list[Stmt] = field(default_factory=list)

    def rounds(self, going: Buffer, exact: bool, defined: set[Expr]) -> None:
        """The statements of a round. ``exact``: how many there will be is known before."""
        build, n = self.build, self.node
        body: Graph = n.attrs["body"]
        ns = states(n)
        build.storage[body.inputs[0]] = alias(build, self.counter, body.inputs[0].shape)
        build.storage[body.inputs[1]] = alias(build, going, body.inputs[1].shape)
        nxt = [build.temp(f"{n.name}.next{k}", v.dtype, v.shape) for k, v in enumerate(body.outputs)]
        self.inner.append(Let(self.t, cast(load(self.counter, [const(0)]), index)))
        defined.add(self.t)
        ends: list[Stmt] = []
        for start, v, end, got in zip(n.inputs[2:], body.inputs[2:], nxt[1 : 1 + ns], n.outputs, strict=False):
            assert start is not None
            if v.shape == start.shape:
                b = build.buffer_of(got)
                build.copy(build.buffer_of(start), b, self.before, (n.name,))
                build.storage[v] = alias(build, b, v.shape)
                build.copy(end, b, ends, (n.name,))
            else:
                self.carry(start, v, end, got, ends)
                defined |= {s for s in v.shape if s.op == "var"}
        self.inner += read_bound(build, body.inputs, defined)
        self.inner += build.block(body, list(zip(body.outputs, nxt, strict=True)), defined)
        for v, s, src in zip(n.outputs[ns:], body.outputs[1 + ns :], nxt[1 + ns :], strict=False):
            if exact and v.shape[1:] == s.shape:
                build.copy(src, (build.buffer_of(v), self.t * v_size(s)), self.inner, (n.name,))
            else:
                self.append(v, s, src)
        self.inner += ends
        self.inner.append(Store(going, (const(0),), build.at(nxt[0], 0)))
        self.inner.append(_put(self.counter, self.t + 1))

    def word(self, name: str, start: Expr) -> Buffer:
        """A word that main keeps from round to round."""
        b = self.build.temp(f"{self.node.name}.{name}", i64, (as_expr(1),))
        self.before.append(_put(b, start))
        return b

    def carry(self, start: Value, v: Value, end: Buffer, got: Value, ends: list[Stmt]) -> None:
        """State ``v``, whose extents change: a round copies it from ``end`` of the round before into memory of its extents.

        That memory is found before the extents get the names under which the body knows them: with them all memory that the body needs is
        found, ``end`` too, whose contents are lost."""
        build, n = self.build, self.node
        held: dict[Expr, Expr] = {}
        result: list[Stmt] = []
        for k, (a, s, r) in enumerate(zip(start.shape, v.shape, got.shape, strict=True)):
            if a is s:
                continue
            w = self.word(f"extent.{v.name}.{k}", a)
            ends.append(_put(w, end.shape[k]))
            held[s] = var(f"{s.attr[0]}.held", lo=0)
            self.inner.append(Let(held[s], cast(build.at(w, 0), index)))
            result.append(Let(r, cast(build.at(w, 0), index)))
        b = build.temp(f"{n.name}.state.{v.name}", v.dtype, [substitute(s, held) for s in v.shape])
        first = build.buffer_of(start)
        self.inner.append(self.either(self.t.eq(0), first, end, b))
        self.inner += [Let(s, h) for s, h in held.items()]
        build.storage[v] = alias(build, b, v.shape)
        self.after += result
        self.after.append(self.either(build.at(self.counter, 0).eq(const(0, i64)), first, end, build.buffer_of(got)))

    def either(self, cond: Expr, a: Buffer, b: Buffer, dst: Buffer) -> Stmt:
        """``dst = cond ? a : b``, of the extents of ``dst``."""
        sides: list[list[Stmt]] = [[], []]
        for out, src in zip(sides, (a, b), strict=True):
            self.build.copy(alias(self.build, src, dst.shape), dst, out, (self.node.name,))
        return If(cond, Block(tuple(sides[0])), Block(tuple(sides[1])))

    def kept_extents(self, v: Value, s: Value) -> None:
        """Extents of a slice that only the body knows: those of the first round hold for all."""
        for k, (d, r) in enumerate(zip(s.shape, v.shape[1:], strict=True)):
            if d is r:
                continue
            w = self.word(f"extent.{s.name}.{k}", const(0))
            what = (("what", f"axis {k} of {s.name}, which {self.node.name} stacks,"),)
            same = Call("lt.check", (cast(d, i64), self.build.at(w, 0)), what)
            self.inner.append(If(self.t.eq(0), _put(w, d), same))
            self.after.append(Let(r, cast(self.build.at(w, 0), index)))

    def append(self, v: Value, s: Value, src: Buffer) -> None:
        """A slice behind those of earlier rounds, in memory that doubles."""
        build, n = self.build, self.node
        self.kept_extents(v, s)
        room = self.word(f"room.{v.name}", const(0))
        more, now = (var(f"{n.name}.{v.name}.{x}", lo=0) for x in ("more", "now"))
        old, new = (build.temp(f"{v.name}.{x}", v.dtype, (e,)) for x, e in (("rows", now), ("copy", more)))
        size, have = v_size(s), build.at(room, 0)
        grown: list[Stmt] = [Let(more, maximum(cast(have, index) * 2, (self.t + 1) * size))]
        build.copy(old, new, grown, (n.name,), self.t * size)
        grown.append(Let(now, more))
        build.copy(new, old, grown, (n.name,), self.t * size)
        grown.append(_put(room, now))
        self.inner.append(If(have < cast((self.t + 1) * size, i64), Block(tuple(grown))))
        build.copy(src, (old, self.t * size), self.inner, (n.name,))
        build.storage[v] = alias(build, old, v.shape)


def emit_scan(build: Builder, it: Any, stmts: list[Stmt], defined: set[Expr]) -> None:
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
        build.storage[v] = alias(build, b, v.shape)
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
        build.copy(src, (b, ((length - 1 - t) if rev else t) * v_size(s)), inner, (n.name,))
    for src, dst in zip(nxt[:ns], state, strict=True):
        build.copy(src, dst, inner, (n.name,))
    inner.append(Store(i, (const(0),), cast(t + 1, i64)))
    stmts.append(While(cast(load(i, [const(0)]), index) < length, Block(tuple(inner))))
    for v, b, a in zip(outs, stacks, out_axes, strict=True):
        if a != 0:
            move_axis(build, b, v, a, stmts, n.name)


def start_states(build: Builder, n: Node, starts: Sequence[Value | None], results: Sequence[Value], stmts: list[Stmt]) -> list[Buffer]:
    state = []
    for v, r in zip(starts, results, strict=False):
        assert v is not None
        b = build.buffer_of(r)
        build.copy(build.buffer_of(v), b, stmts, (n.name,))
        state.append(b)
    return state


def alias(build: Builder, b: Buffer, shape: Sequence[Expr]) -> Buffer:
    """``b`` seen with another shape."""
    w = replace(b, name=build.fresh(b.name), shape=tuple(shape))
    root, offset = build.views.get(b.name, (b.name, const(0)))
    build.views[w.name] = (root, offset)
    return w


def read_bound(build: Builder, values: Iterable[Value], defined: set[Expr]) -> list[Stmt]:
    out: list[Stmt] = []
    for v in values:
        if v.bound and v.content is not None:
            for k, s in enumerate(v.content):
                out.append(Let(s, cast(build.at(build.buffer_of(v), k), s.dtype)))
                defined.add(s)
    return out


def gather_call(build: Builder, name: str, src: Buffer, dst: Buffer, index_of: Callable[[list[Expr]], list[Expr]], scalars: Mapping[Expr, Expr], stmts: list[Stmt], node: str) -> None:
    axes = [axis(f"i{k}", s) for k, s in enumerate(dst.shape)]
    p = Buffer("p0", src.dtype, src.shape, "param", False)
    x = pull("o0", axes, load(p, index_of([a.var for a in axes])))
    dims = {s for e in (*src.shape, *dst.shape, *x.expr.args) for s in free_vars(e)} - {a.var for a in axes}
    c = Compute(name, (p,), tuple(sorted(dims, key=lambda e: e.key)), (x,), ("o0",))
    for f in build.schedule(c, {}).funcs:
        build.call(f, {"p0": src, "o0": dst}, scalars, stmts, (node,))


def slice_sequence(build: Builder, seq: Value, v: Value, a: int, position: Expr, t: Expr, stmts: list[Stmt], node: str) -> None:
    """``v = seq[..., position, ...]`` (axis ``a``)."""
    k = var("position", lo=0)
    gather_call(build, "slice", build.buffer_of(seq), build.buffer_of(v), lambda ix: [*ix[:a], k, *ix[a:]], {k: position}, stmts, node)


def move_axis(build: Builder, src: Buffer, v: Value, a: int, stmts: list[Stmt], node: str) -> None:
    """``v[..., t, ...] = src[t, ...]`` (axis ``a``)."""
    gather_call(build, "move_axis", src, build.buffer_of(v), lambda ix: [ix[a], *ix[:a], *ix[a + 1 :]], {}, stmts, node)


def v_size(v: Value) -> Expr:
    n = as_expr(1)
    for s in v.shape:
        n = n * s
    return n
