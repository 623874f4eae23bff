"""Groups to a Program: kernels scheduled and deduplicated, tensors in buffers, control flow as statements.

Before: a graph. After: ``call matmul_add(x, w, b, t); view u = t; call softmax(u, y)`` over buffers. Groups nobody needs are
never scheduled: need is propagated backwards from the outputs through what the kernels really read, so that shape arithmetic
costs nothing at run time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from luthier.ir.compute import Compute, axis, pull
from luthier.ir.dtypes import DType, i64, index, u8
from luthier.ir.errors import CompilationError, LuthierError
from luthier.ir.expr import Expr, as_expr, cast, const, free_vars, load, substitute, var
from luthier.ir.graph import Graph, Node, Value, node_reads, type_symbols
from luthier.ir.loop import Block, Buffer, Call, Func, If, Let, Stmt, Store, block, children, exprs_of, walk_stmts
from luthier.ir.op import Kernel
from luthier.ir.program import Program
from luthier.ir.requirements import Requirement
from luthier.passes.graph.materialize_contents import CONTENT
from luthier.passes.loop.lower_subbyte import is_subbyte
from luthier.passes.program.abstract_extents import abstract_extents
from luthier.passes.program.fuse_operators import VIEW, Group, fuse_operators, kind_of
from luthier.passes.program.join_computes import Joined, join
from luthier.passes.program.retype_float4 import retype_float4
from luthier.passes.program.widen_subbyte import carrier, packing, widen_subbyte
from luthier.schedules.program import build_loops

Array = np.ndarray[Any, Any]
REQUIRE = "luthier::Require"


class Scheduled(Protocol):
    """What the scheduler returns for a Compute (:class:`luthier.schedules.select.Kernels`)."""

    funcs: tuple[Func, ...]
    temps: tuple[Buffer, ...]
    packed: dict[str, Array]


ScheduleFn = Callable[[Compute, Mapping[str, Array]], Scheduled]
KernelFn = Callable[[Func], Func]


def build_program(graph: Graph, schedule: ScheduleFn, finish_kernel: KernelFn, on_kernel: Callable[[Func], None] | None = None) -> Program:
    """``schedule``: Compute and constant parameters to kernels; ``finish_kernel``: loop passes for hand-written kernels;
    ``on_kernel`` is told of every kernel of the program.

    Raises UnsupportedOperator for control flow that has no lowering, and whatever the operators raise."""
    return Builder(graph, schedule, finish_kernel, on_kernel).program()


@dataclass(slots=True)
class _Item:
    """One group on its way to statements. ``work``: Joined, Kernel, or None for views, contents and control flow."""

    group: Group
    work: Joined | Kernel | None
    reads: list[Value]
    symbols: set[Expr]
    forwarded: bool = False
    wanted: list[Value] = field(default_factory=list)

    @property
    def node(self) -> Node:
        return self.group.nodes[0]


class Builder:
    def __init__(self, graph: Graph, schedule: ScheduleFn, finish_kernel: KernelFn, on_kernel: Callable[[Func], None] | None = None) -> None:
        self.graph, self.schedule, self.finish_kernel, self.on_kernel = graph, schedule, finish_kernel, on_kernel
        self.names: set[str] = set()
        self.storage: dict[Value, Buffer] = {}
        self.buffers: list[Buffer] = []
        self.views: dict[str, tuple[str, Expr]] = {}
        self.constants: dict[str, Array] = {}
        self.const_keys: dict[Any, Buffer] = {}
        self.alive: list[Array] = []
        self.kernels: dict[str, Func] = {}
        self.kernel_texts: dict[Any, str] = {}
        self.kernel_ids: dict[int, tuple[Func, str]] = {}
        self.cache: dict[Any, Scheduled] = {}  # by all that decides the kernels: a text would say a variable's name and not its bounds
        self.nodes: dict[int, tuple[str, ...]] = {}
        self.calls = 0
        self.required: set[tuple[Expr, Expr]] = set()  # checks that were made already

    # ---------------------------------------------------------------- the whole

    def program(self) -> Program:
        inputs: list[Buffer] = []
        dims: dict[Expr, tuple[int, int]] = {}
        for i, v in enumerate(self.graph.inputs):
            b = Buffer(v.name, v.dtype, v.shape, "param", False)
            self.names.add(v.name)
            self.storage[v] = b
            inputs.append(b)
            for k, s in enumerate(v.shape):
                if s.op == "var":
                    dims.setdefault(s, (i, k))
        outputs, outs, output_names = [], [], {}
        for name, v in self.graph.results():
            b = Buffer(self.fresh(name), v.dtype, v.shape, "param", True)
            if b.name != name:
                output_names[b.name] = name
            outputs.append(b)
            outs.append((v, b))
        defined = set(dims)
        read = [Let(s, cast(self.at(self.storage[v], k), s.dtype)) for v in self.graph.inputs for k, s in enumerate(v.content or ()) if v.bound]
        defined |= {s.var for s in read}
        body = self.block(self.graph, outs, defined)
        used = self._used_symbols(body)
        body = [*(s for s in read if s.var in used), *body]
        _check_bound(body, set(dims), self.nodes)
        return Program(
            self.graph.name, tuple(inputs), tuple(outputs), dims, self.constants, self.kernels, tuple(self.buffers),
            block(*body), self.views, self.nodes, output_names, defaults=self.graph.defaults,
            structured_inputs=dict(self.graph.structured_inputs), structured_outputs=dict(self.graph.structured_outputs),
            within=tuple(self.graph.within),
        )  # fmt: skip

    def _used_symbols(self, body: Iterable[Stmt]) -> set[Expr]:
        out: set[Expr] = set()
        for s in body:
            for t in walk_stmts(s):
                for e in exprs_of(t):
                    out |= free_vars(e)
        for b in self.buffers:
            for e in b.shape:
                out |= free_vars(e)
        for v in self.graph.outputs:
            out |= type_symbols(v.type)
        return out

    def fresh(self, base: str) -> str:
        base = re.sub(r"[^\w.:/-]", "_", base) or "t"
        name, k = base, 0
        while name in self.names:
            k += 1
            name = f"{base}.{k}"
        self.names.add(name)
        return name

    # ---------------------------------------------------------------- a block: backwards for need, forwards for statements

    def block(self, graph: Graph, outs: Sequence[tuple[Value, Buffer]], defined: set[Expr]) -> list[Stmt]:
        """Statements that compute ``graph`` and leave each output value in its buffer. ``defined``: symbols known outside."""
        groups = fuse_operators(graph)
        makes = self._makers(groups, defined)
        needed = {v for v, _ in outs}
        symbols = set().union(*(type_symbols(v.type) for v, _ in outs)) if outs else set()
        symbols |= {s for r in graph.requirements if r.needed for e in (r.got, r.want) for s in free_vars(e)}
        items: list[_Item] = []
        for g in reversed(groups):
            wanted = [v for n in g.nodes for v in n.outputs if v in needed]
            if not wanted and not symbols & makes.get(g, set()):
                continue
            it = self._prepare(g)
            it.wanted = wanted
            needed.update(it.reads)
            symbols |= it.symbols
            items.append(it)
        items.reverse()
        self._bind_outputs(items, outs, makes)
        stmts: list[Stmt] = []
        outside, self.required = self.required, set(self.required)
        pending = self._require(graph.requirements, stmts, defined)
        for it in items:
            try:
                self._emit(it, stmts, symbols, defined)
                pending = self._require(pending, stmts, defined)
            except LuthierError as e:
                raise e.at(node=it.node.name, op=it.node.op) from None
        self.required = outside  # a check inside a branch says nothing about the code after it
        done: set[str] = set()
        for v, b in outs:
            s = self.storage.get(v)
            if (s is b or (s is not None and self.views.get(s.name, ("",))[0] == b.name)) and b.name not in done:
                done.add(b.name)
                continue
            self.copy(self.buffer_of(v), b, stmts, (f"copy to {b.name}",))
        return stmts

    def _require(self, requirements: Sequence[Requirement], stmts: list[Stmt], defined: set[Expr]) -> list[Requirement]:
        """Checks those whose symbols are all known; returns the others (a symbol that nothing needs is never read)."""
        later = []
        for r in requirements:
            key = (r.got, r.want)
            if key in self.required:
                continue
            if free_vars(r.got) | free_vars(r.want) <= defined:
                self.required.add(key)
                stmts.append(Call("lt.check", key, (("what", r.what),)))
            else:
                later.append(r)
        return later

    def _makers(self, groups: Sequence[Group], defined: set[Expr]) -> dict[Group, set[Expr]]:
        """Symbols that each group decides: loaded from a value it stores, or extents that its kernel finds."""
        seen = set(defined)
        out: dict[Group, set[Expr]] = {}
        for g in groups:
            mine: set[Expr] = set()
            for n in g.nodes:
                for v in n.outputs:
                    mine |= type_symbols(v.type) - seen
                    if v.bound and v.content is not None:
                        mine |= set(v.content) - seen
            seen |= mine
            if mine:
                out[g] = mine
        return out

    def _prepare(self, g: Group) -> _Item:
        n = g.nodes[0]
        shapes = set().union(*(type_symbols(v.type) for v in g.outputs))
        if n.op == CONTENT:
            return _Item(g, None, [], shapes | {s for v in n.outputs for e in v.content or () for s in free_vars(e)})
        if n.op in _CONTROL:
            reads = [v for v in node_reads(n) if v.data is None]
            return _Item(g, None, reads, shapes | _graph_symbols(n))
        if all(kind_of(m) == VIEW for m in g.nodes):
            v = n.inputs[0]
            assert v is not None
            checked = {s for key in ("got", "want") if n.op == REQUIRE for s in free_vars(n.attrs[key])}
            return _Item(g, None, [v], shapes | checked)
        work = join(g.name, g.nodes, g.outputs)
        if isinstance(work, Kernel):
            reads = [v for v in n.inputs if v is not None and v.data is None]
            extra = {s for b in work.temps for e in b.shape for s in free_vars(e)} | {s for c in work.capacity.values() for e in c for s in free_vars(e)}
            return _Item(g, work, reads, (shapes | extra | set(work.func.scalars)) - set(work.symbols))
        reads = [v for v in work.params.values() if v.data is None]
        return _Item(g, work, reads, shapes | set(work.compute.dims))

    def _bind_outputs(self, items: Sequence[_Item], outs: Sequence[tuple[Value, Buffer]], makes: Mapping[Group, set[Expr]]) -> None:
        """Producers write straight into output buffers, through views where the shape differs and its extents are known by then."""
        makers = {v: it for it in items for n in it.group.nodes for v in n.outputs}
        place = {it.group: k for k, it in enumerate(items)}
        decided = {s: k for k, it in enumerate(items) for s in makes.get(it.group, ())}
        taken: set[Value] = set(self.storage)
        for v, b in outs:
            it = makers.get(v)
            chain: list[Value] = []
            while it is not None and it.work is None and it.node.op not in _CONTROL and it.node.op != CONTENT and v not in taken:
                chain.append(v)
                u = it.node.inputs[0]
                assert u is not None
                v, it = u, makers.get(u)
            if it is None or v in taken or any(c in taken for c in chain):
                continue
            if isinstance(it.work, Kernel) and it.work.capacity or (it.node.op in _CONTROL and type_symbols(v.type) - {s for s in type_symbols(b_type(b))}):
                continue
            if it.node.op in ("Loop", "Scan") or any(decided.get(s, -1) > place[it.group] for s in b.symbols()):
                continue
            top = chain[0] if chain else v
            self.storage[top] = b
            taken.add(top)
            for c in [*chain[1:], *([v] if chain else [])]:
                self.storage[c] = self._view(c, b)
                taken.add(c)
            for c in chain:
                makers[c].forwarded = True

    # ---------------------------------------------------------------- buffers

    def buffer_of(self, v: Value) -> Buffer:
        """Where ``v`` lives; constants are added on first use."""
        b = self.storage.get(v)
        if b is None:
            if v.data is not None:
                b = self.constant(v.name, v.data, v.dtype)
            else:
                b = self.temp(v.name, v.dtype, v.shape)
            self.storage[v] = b
        return b

    def temp(self, name: str, dtype: DType, shape: Sequence[Expr]) -> Buffer:
        b = Buffer(self.fresh(name), dtype, tuple(shape), "global", True)
        self.buffers.append(b)
        return b

    def constant(self, name: str, data: Array, dtype: DType) -> Buffer:
        """The constant as a buffer; equal small ones and the very same large ones are stored once."""
        key: Any = (data.tobytes(), dtype, data.shape) if data.nbytes <= 4096 and data.dtype != object else (id(data), dtype, data.shape)
        b = self.const_keys.get(key)
        if b is None:
            b = Buffer(self.fresh(name), dtype, tuple(as_expr(s) for s in data.shape), "const", False)
            self.const_keys[key] = b
            self.alive.append(data)
            self.constants[b.name] = np.ascontiguousarray(data).reshape(data.shape)
        return b

    def _view(self, v: Value, base: Buffer) -> Buffer:
        root, offset = self.views.get(base.name, (base.name, const(0)))
        b = Buffer(self.fresh(v.name), v.dtype, v.shape, base.scope if base.scope != "const" else "global", base.writable)
        self.views[b.name] = (root, offset)
        return b

    def at(self, b: Buffer, k: int | Expr) -> Expr:
        """Element ``k`` in row-major order."""
        return load(replace(b, shape=(b.size(),)), [as_expr(k)])

    # ---------------------------------------------------------------- statements

    def _emit(self, it: _Item, stmts: list[Stmt], symbols: set[Expr], defined: set[Expr]) -> None:
        n = it.node
        if n.op == CONTENT:
            for v in it.wanted:
                b = self.buffer_of(v)
                flat = replace(b, shape=(b.size(),))
                for k, e in enumerate(v.content or ()):
                    stmts.append(Store(flat, (const(k),), cast(e, v.dtype)))
        elif n.op in _CONTROL:
            _CONTROL[n.op](self, it, stmts, defined)
        elif it.work is None:
            self._emit_views(it, stmts)
        elif isinstance(it.work, Kernel):
            self._emit_kernel(it, it.work, stmts)
        else:
            self._emit_compute(it, it.work, stmts)
        for m in it.group.nodes:
            for v in m.outputs:
                if v.bound and v.content is not None:
                    for k, s in enumerate(v.content):
                        if s in symbols:
                            stmts.append(Let(s, cast(self.at(self.buffer_of(v), k), s.dtype)))
                            defined.add(s)

    def _emit_views(self, it: _Item, stmts: list[Stmt]) -> None:
        if it.node.op == REQUIRE:
            a = it.node.attrs
            stmts.append(Call("lt.check", (a["got"], a["want"]), (("what", str(a["what"])),)))
        if it.forwarded:
            return
        for n in it.group.nodes:
            (u, v) = n.inputs[0], n.outputs[0]
            assert u is not None
            src = self.buffer_of(u)
            if v in self.storage:
                self.copy(src, self.storage[v], stmts, (n.name,))
            elif u.data is not None:
                self.storage[v] = self.constant(v.name, u.data, u.dtype)
            else:
                self.storage[v] = self._view(v, src)

    def _emit_compute(self, it: _Item, work: Joined, stmts: list[Stmt]) -> None:
        args: dict[str, Buffer] = {}
        consts: dict[str, Array] = {}
        joined, narrow = widen_subbyte(retype_float4(work.compute))
        compute, scalars = abstract_extents(joined)
        for name, v in work.params.items():
            if v.data is not None:
                consts[name] = v.data
            else:
                args[name] = self.buffer_of(v)
        for name, v in work.outs.items():
            args[name] = self.buffer_of(v) if name not in narrow else self.temp(f"{v.name}.bytes", carrier(narrow[name]), v.shape)
        key = (replace(compute, name="k"), *sorted(consts))
        k = self.cache.get(key)
        if k is None:
            k = self.schedule(compute, consts)
            packed = k.packed
            if getattr(k, "reusable", True):
                self.cache[key] = k
        elif not self._fits(k, consts):
            k = self.schedule(compute, consts)
            packed = k.packed
        elif k.packed:
            packed = self._repack(k, compute, consts)
        else:
            packed = {}
        for name, a in packed.items():
            args[name] = self.constant(f"{it.node.name}.{name}", a, work_dtype(k, name, a))
        read = {b.name for f in k.funcs for b in f.buffers}
        for name, v in work.params.items():
            if v.data is not None and name in read:
                args[name] = self.buffer_of(v)
        for t in k.temps:
            args[t.name] = self.temp(f"{it.node.name}.{t.name}", t.dtype, [substitute(s, scalars) for s in t.shape])
        names = tuple(m.name for m in it.group.nodes)
        for f in k.funcs:
            self.call(f, args, scalars, stmts, names)
        for name, d in narrow.items():
            self._pack(args[name], self.buffer_of(work.outs[name]), d.bits, stmts, names)

    def _pack(self, src: Buffer, dst: Buffer, bits: int, stmts: list[Stmt], names: tuple[str, ...]) -> None:
        """Elements one to a byte to those of ``bits`` bits."""
        c = packing(bits)
        k = self.cache.get(c.name)
        if k is None:
            k = self.cache[c.name] = self.schedule(c, {})
        for f in k.funcs:
            self.call(f, {"p0": src, "o0": dst}, {c.dims[0]: src.size()}, stmts, names)

    def _fits(self, k: Scheduled, consts: Mapping[str, Array]) -> bool:
        """Whether kernels made for one layer's weights have room for those of another."""
        packings = getattr(k, "packings", None) or {}
        return all(p.fits(consts[p.param]) for p in packings.values() if p.param in consts and hasattr(p, "fits"))

    def _repack(self, k: Scheduled, compute: Compute, consts: Mapping[str, Array]) -> dict[str, Array]:
        """The packed constants of an equal Compute with other weights."""
        packings = getattr(k, "packings", None)
        if packings is not None:
            return {name: p.apply(consts[p.param]) for name, p in packings.items() if p.param in consts}
        return self.schedule(compute, consts).packed

    def call(self, f: Func, args: Mapping[str, Buffer | tuple[Buffer, Expr]], scalars: Mapping[Expr, Expr], stmts: list[Stmt], names: tuple[str, ...]) -> None:
        callee = self.kernel(f)
        actual = [scalars.get(p, p) if isinstance(p, Expr) else args[p.name] for p in f.params]
        self.nodes[self.calls] = names
        self.calls += 1
        stmts.append(Call(callee, tuple(actual)))

    def kernel(self, f: Func) -> str:
        """The name under which ``f`` is stored; equal kernels once."""
        known = self.kernel_ids.get(id(f))
        if known is not None:
            return known[1]
        text = (f.params, f.body, tuple((n, str(a.dtype), a.tobytes()) for n, a in sorted(f.data.items())))
        name = self.kernel_texts.get(text)
        if name is None:
            base = re.sub(r"\W", "_", f.name)
            name, k = base, 1
            while name in self.kernels:
                k += 1
                name = f"{base}_{k}"
            self.kernel_texts[text] = name
            self.kernels[name] = replace(f, name=name)
            if self.on_kernel is not None:
                self.on_kernel(self.kernels[name])
        self.kernel_ids[id(f)] = (f, name)
        return name

    def _emit_kernel(self, it: _Item, work: Kernel, stmts: list[Stmt]) -> None:
        n = it.node
        args: dict[str, Buffer] = {}
        order: list[Value] = []
        for v in n.inputs:
            if v is not None and v not in order:
                args[f"p{len(order)}"] = self.buffer_of(v)
                order.append(v)
        later: list[tuple[Value, Buffer]] = []
        for v, name in zip(it.group.outputs, [f"o{i}" for i in range(len(it.group.outputs))], strict=True):
            cap = work.capacity.get(name)
            if name in work.in_place:
                state = n.inputs[work.in_place[name]]
                assert state is not None
                self.storage[v] = args[name] = replace(self._view(v, self.buffer_of(state)), writable=True)
            elif cap is not None:
                args[name] = self.temp(v.name + ".capacity", v.dtype, cap)
                later.append((v, args[name]))
            else:
                args[name] = self.buffer_of(v)
        for name, i in work.in_place.items():
            if name not in args:  # nothing reads that output: the memory is changed all the same
                state = n.inputs[i]
                assert state is not None
                args[name] = replace(self.buffer_of(state), writable=True)
        for b in work.func.buffers:
            if b.name not in args:
                args[b.name] = self.temp(f"{n.name}.{b.name}", b.dtype, b.shape)
        self.call(self.finish_kernel(work.func), args, {}, stmts, (n.name,))
        for s, (name, k) in work.symbols.items():
            stmts.append(Let(s, cast(self.at(args[name], k), index)))
        for v, b in later:
            self.storage[v] = self._view(v, b)

    def copy(self, src: Buffer | tuple[Buffer, Expr], dst: Buffer | tuple[Buffer, Expr], stmts: list[Stmt], names: tuple[str, ...], size: Expr | None = None) -> None:
        """All elements of ``src`` to ``dst`` in row-major order."""
        b = src if isinstance(src, Buffer) else src[0]
        n = var("n")
        a = axis("i", n)
        total = size if size is not None else b.size()
        dtype = b.dtype
        if is_subbyte(dtype) and isinstance(src, Buffer) and isinstance(dst, Buffer):  # whole bytes: threads share none
            dtype, total = u8, (total * dtype.bits + 7) // 8
        c = Compute("copy", (Buffer("p0", dtype, (n,), "param", False),), (n,), (pull("o0", [a], load(Buffer("p0", dtype, (n,), "param", False), [a.var])),), ("o0",))
        key = f"copy {dtype}"
        k = self.cache.get(key)
        if k is None:
            k = self.cache[key] = self.schedule(c, {})
        for f in k.funcs:
            self.call(f, {"p0": src, "o0": dst}, {n: total}, stmts, names)  # type: ignore[dict-item]

    # ---------------------------------------------------------------- control flow

    def _emit_if(self, it: _Item, stmts: list[Stmt], defined: set[Expr]) -> None:
        n = it.node
        assert n.inputs[0] is not None
        cond = self.at(self.buffer_of(n.inputs[0]), 0)
        branches = (n.attrs["then_branch"], n.attrs["else_branch"])
        own = [sorted({s for s in type_symbols(v.type)} - defined, key=lambda e: e.key) for v in n.outputs]
        if not any(own):
            outs = [self.buffer_of(v) for v in n.outputs]
            blocks = [Block(tuple(self.block(g, list(zip(g.outputs, outs, strict=False)), set(defined)))) for g in branches]
            stmts.append(If(cond, blocks[0], blocks[1]))
            return
        extents = [(v, k) for v in n.outputs for k, s in enumerate(v.shape) if s.op == "var" and s not in defined]
        dims = self.temp(f"{n.name}.extents", i64, (as_expr(len(extents)),))
        parts, results = [], []
        for g in branches:
            temps = [self.temp(f"{n.name}.{w.name}", w.dtype, w.shape) for w in g.outputs[: len(n.outputs)]]
            inner = self.block(g, list(zip(g.outputs, temps, strict=False)), set(defined))
            for j, (v, k) in enumerate(extents):
                inner.append(Store(dims, (const(j),), cast(g.outputs[n.outputs.index(v)].shape[k], i64)))
            parts.append(Block(tuple(inner)))
            results.append(temps)
        stmts.append(If(cond, parts[0], parts[1]))
        seen: set[Expr] = set()
        for j, (v, k) in enumerate(extents):
            if v.shape[k] not in seen:
                seen.add(v.shape[k])
                stmts.append(Let(v.shape[k], cast(self.at(dims, j), index)))
        defined |= seen
        copies: list[list[Stmt]] = [[], []]
        for k, v in enumerate(n.outputs):
            b = self.buffer_of(v)
            for side in (0, 1):
                self.copy(results[side][k], b, copies[side], (n.name,), b.size())
        stmts.append(If(cond, Block(tuple(copies[0])), Block(tuple(copies[1]))))


_CONTROL: dict[str, Callable[[Builder, _Item, list[Stmt], set[Expr]], None]] = {
    "If": Builder._emit_if, "Loop": build_loops.emit_loop, "Scan": build_loops.emit_scan,
}  # fmt: skip


def _check_bound(body: Iterable[Stmt], known: set[Expr], nodes: Mapping[int, tuple[str, ...]]) -> None:
    """Every extent that a statement reads is one that the run knows there; ``nodes``: those that each call of a kernel computes.

    Raises CompilationError."""
    calls = 0

    def visit(stmts: Iterable[Stmt], known: set[Expr]) -> None:
        nonlocal calls
        for s in stmts:
            missing = set().union(*(free_vars(e) for e in exprs_of(s))) - known
            kernel = isinstance(s, Call) and not s.callee.startswith("lt.")
            if missing:
                names = ", ".join(sorted(repr(v) for v in missing))
                raise CompilationError(f"a defect of luthier: the extent {names} is read before it is known", node=", ".join(nodes.get(calls, ())) or None)
            calls += kernel
            if isinstance(s, Let):
                known.add(s.var)
            elif isinstance(s, Block):
                visit(s.stmts, known)
            else:
                for c in children(s):
                    visit((c,), set(known))

    visit(body, known)


def _graph_symbols(n: Node) -> set[Expr]:
    from luthier.ir.graph import subgraphs

    out: set[Expr] = set()
    for g in subgraphs(n):
        for m in g.nodes:
            out |= set().union(*(type_symbols(v.type) for v in m.outputs)) if m.outputs else set()
            for v in m.outputs:
                if v.content is not None:
                    out |= {s for e in v.content for s in free_vars(e)}
            out |= _graph_symbols(m)
    return out


def b_type(b: Buffer) -> Any:
    from luthier.ir.graph import TensorType

    return TensorType(b.dtype, b.shape)


def work_dtype(k: Scheduled, name: str, a: Array) -> DType:
    """The element type that the kernels declare for a packed constant."""
    for f in k.funcs:
        for b in f.buffers:
            if b.name == name:
                return b.dtype
    from luthier.ir.dtypes import from_numpy

    return from_numpy(a.dtype)



