"""A Program for WebGPU: WGSL for its kernels, and its main as plain data for a host to run (``docs/web.md``).

Every slot of the memory plan is a GPUBuffer of its own, because a kernel may not read and write one GPUBuffer through two
bindings; constants share a few large ones. An argument whose place in its buffer is not a multiple of 256 bytes is bound from
the start and its kernel gets the offset as a scalar; arguments that share memory which the kernel writes, and constants where a
kernel has too many buffers, become one binding. Buffers that main itself reads are mirrored on the host as far as only main
writes them; any other read of a buffer is a crossing.

Host statements (lists): ``let name expr``; ``buffer k bytes``; ``dispatch pipeline [[memory, offset, bytes]..] [word..] x y z call``;
``write memory offset dtype [value..]``; ``mirror k index value``; ``copy memory offset memory offset bytes``; ``check got want what``;
``rounds n what``, before a dispatch whose threads may go through more rounds of loops than some adapters run;
``if cond then else``; ``while cond body``; ``output j memory offset [extent..]``. A memory is ``["in", j]``, ``["w", k]`` or ``["b", k]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.codegen.gpu.host_expr import host_expr
from luthier.codegen.gpu.webgpu_features import subsets
from luthier.codegen.gpu.wgsl import Shader, legalize_wgsl, optional_features, print_wgsl
from luthier.codegen.program.steps import DEFAULT
from luthier.codegen.targets.webgpu import BINDING_BYTES, LOOP_LIMIT, OFFSET_ALIGN, STORAGE_BUFFERS
from luthier.ir.dtypes import DType
from luthier.ir.errors import CompilationError, LuthierError
from luthier.ir.expr import Expr, const, floordiv, free_vars, linear, load_parts, loads, maximum, prove, substitute
from luthier.ir.loop import Block, Buffer, Call, Func, If, Let, Stmt, Store, While, children, exprs_of, stmts_of, walk_stmts
from luthier.ir.program import Program
from luthier.passes.gpu.count_rounds import count_rounds
from luthier.passes.gpu.find_wide_buffers import find_wide_buffers, narrow_params
from luthier.passes.gpu.offset_buffers import offset_buffers
from luthier.passes.gpu.split_buffers import split_buffers
from luthier.passes.loop.lower_subbyte import is_subbyte, pack_array
from luthier.passes.program.plan_memory import byte_size, plan_memory, round_up, touched

SMALL = 64 << 10  # bytes up to which a constant counts as small


@dataclass(slots=True)
class GpuProgram:
    """``shaders``: WGSL, entry point ``main``, without directives; ``features``: the optional ones that each of them needs; ``pipelines``, ``weights``, ``narrow``, ``within``, ``fixed``: as in ``docs/web.md``; ``body``: host
    statements; ``blob``: all constants, flat ``uint8``; ``calls``: the kernel of each dispatch in the program; ``mirrors``: how many
    buffers are mirrored on the host; ``crossings``: what main reads back."""

    shaders: list[str] = field(default_factory=list)
    features: list[list[str]] = field(default_factory=list)
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    weights: list[list[int]] = field(default_factory=list)
    narrow: list[int] = field(default_factory=list)
    within: list[list[Any]] = field(default_factory=list)
    fixed: bool = True
    body: list[Any] = field(default_factory=list)
    blob: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.uint8))
    calls: list[str] = field(default_factory=list)
    mirrors: int = 0
    buffers: int = 0
    crossings: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    defaults: dict[str, int] = field(default_factory=dict)  # where the blob holds what inputs are that a call leaves out


def build_webgpu(program: Program) -> GpuProgram:
    """Raises CompilationError, naming the graph node, for what WebGPU cannot hold or compute."""
    return _Builder(program).build()


@dataclass(frozen=True, slots=True)
class _Arg:
    """One buffer argument of a call: parameter, memory, byte offset of the memory's own place, byte offset in it, bytes."""

    param: Buffer
    memory: tuple[str, int]
    base: Expr
    offset: Expr
    size: Expr
    written: bool


class _Builder:
    def __init__(self, program: Program) -> None:
        self.p = program
        self.g = GpuProgram()
        self.plan = plan_memory(program)
        self.names: dict[Expr, str] = {}
        self.taken: set[str] = set()
        self.place: dict[str, tuple[tuple[str, int], Expr]] = {}
        self.declared = {b.name: b for b in (*program.inputs, *program.outputs, *program.buffers)}
        self.pending: list[tuple[int, Expr]] = []  # buffers whose size waits for a value of the run
        self.known: set[Expr] = set(program.dims)
        self.written: dict[str, set[str]] = {}
        self.variants: dict[Any, tuple[int, Shader, tuple[int, ...]]] = {}
        self.shader_ids: dict[str, int] = {}
        self.mirror: dict[str, int] = {}
        self.large: dict[str, int] = {}  # constants larger than a binding: how many weight buffers they fill
        self.calls = 0
        self.wide = find_wide_buffers(program, lambda b: self.root(b)[0])

    # ------------------------------------------------------------ memory

    def build(self) -> GpuProgram:
        p, g = self.p, self.g
        pooled = self.pooled()
        zero = const(0)
        for k, slot in self.plan.slot_of.items():
            self.place[k] = (("b", slot), zero)
        n = len(self.plan.slots)
        sizes: list[Expr] = list(self.plan.slots)
        for name, size in self.plan.dynamic.items():
            self.place[name] = (("b", n), zero)
            sizes.append(size)
            n += 1
        for b in p.outputs:
            self.place[b.name] = (("b", n), zero)
            sizes.append(byte_size(b.dtype, b.size()))
            n += 1
        total = zero
        for b in (*p.buffers, *p.outputs):
            if b.name in pooled:
                self.place[b.name] = (("b", n), total)
                total = total + round_up(byte_size(b.dtype, b.size()), OFFSET_ALIGN)
        if pooled:
            sizes.append(total)
            n += 1
        g.buffers = n
        for j, b in enumerate(p.inputs):
            self.place[b.name] = (("in", j), zero)
            if b.dtype.is_int and b.dtype.bits == 64 and b.name not in self.wide:
                g.narrow.append(j)
        for w in p.within:
            low, high = ([host_expr(e, lambda v: ["dim", *p.dims[v]], self.load) for e in es] for es in (w.low, w.high))
            g.within.append([w.input, low, high, w.what])
        self.lay_out_weights()
        self.find_mirrors()
        for f in p.kernels.values():
            self.written[f.name] = {s.buf.name for s in walk_stmts(f.body) if isinstance(s, Store)}
        for v, (j, axis) in p.dims.items():
            g.body.append(["let", self.name(v), ["dim", j, axis]])
        self.check_inputs()
        for k, size in enumerate(sizes):
            if free_vars(size) <= self.known:
                g.body.append(["buffer", k, self.expr(size)])
            else:
                self.pending.append((k, size))
        for s in stmts_of(p.body):
            self.stmt(s, g.body)
        for j, b in enumerate(p.outputs):
            memory, base = self.place[b.name]
            g.body.append(["output", j, list(memory), self.expr(base), [self.expr(e) for e in b.shape]])
        return g

    def pooled(self) -> set[str]:
        """Buffers of kernels that have too many: they share a GPUBuffer, so that one binding serves all of them."""
        p = self.p
        sizes = {b.name: byte_size(b.dtype, b.size()) for b in (*p.buffers, *p.outputs)}
        out: set[str] = set()
        for s in walk_stmts(p.body):
            if isinstance(s, Call) and s.callee in p.kernels:
                roots = {self.root(a if isinstance(a, Buffer) else a[0])[0] for a in s.args if not isinstance(a, Expr)}
                constant = roots & p.constants.keys()
                many = len(roots) - max(len(constant) - 1, 0) > STORAGE_BUFFERS
                written = {x.buf.name for x in walk_stmts(p.kernels[s.callee].body) if isinstance(x, Store)}
                if many and len(written) > 1:
                    out |= {r for r in roots if r in sizes and free_vars(sizes[r]) <= set(p.dims)}
        return out

    def check_inputs(self) -> None:
        """Extents that two inputs share."""
        for j, b in enumerate(self.p.inputs):
            for axis, e in enumerate(b.shape):
                if self.p.dims.get(e) != (j, axis) and free_vars(e) <= self.known:
                    self.g.body.append(["check", ["dim", j, axis], self.expr(e), f"input {b.name}, axis {axis}"])

    def lay_out_weights(self) -> None:
        """Constants one after the other in ranges that a binding can hold, each from a multiple of 256 bytes."""
        g = self.g
        dtypes = {self.root(b)[0]: b.dtype for s in walk_stmts(self.p.body) for b in touched(s)}
        parts: list[np.ndarray[Any, Any]] = []
        at = 0
        order = sorted(self.p.constants.items(), key=lambda c: c[1].nbytes > SMALL)  # small ones side by side: one binding may hold several
        for name, a in order:
            d = dtypes.get(name)
            if d is None:
                continue
            if is_subbyte(d) and a.dtype != np.uint8:
                a = pack_array(a, d)
            raw = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
            size = -(-max(raw.size, 4) // OFFSET_ALIGN) * OFFSET_ALIGN
            if size > BINDING_BYTES:  # whole weight buffers of its own, the last one shorter
                self.place[name] = (("w", len(g.weights)), const(0))
                self.large[name] = -(-size // BINDING_BYTES)
                for start in range(0, size, BINDING_BYTES):
                    g.weights.append([at + start, min(BINDING_BYTES, size - start)])
                g.weights.append([at + size, 0])
                parts += [raw, np.zeros(size - raw.size, np.uint8)]
                at += size
                continue
            if not g.weights or at + size - g.weights[-1][0] > BINDING_BYTES:
                g.weights.append([at, 0])
            self.place[name] = (("w", len(g.weights) - 1), const(at - g.weights[-1][0]))
            parts += [raw, np.zeros(size - raw.size, np.uint8)]
            at += size
            g.weights[-1][1] += size
        if g.weights and not g.weights[-1][1]:
            g.weights.pop()
        for b in self.p.inputs:
            default = self.p.defaults.get(b.name)
            if default is not None:
                a = pack_array(default, b.dtype) if is_subbyte(b.dtype) else default
                raw = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
                g.defaults[DEFAULT + b.name] = at
                parts += [raw, np.zeros(-raw.size % OFFSET_ALIGN, np.uint8)]
                at += raw.size + -raw.size % OFFSET_ALIGN
        g.blob = np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def root(self, b: Buffer) -> tuple[str, Expr]:
        """The buffer that owns the memory of ``b`` and how many bytes into it ``b`` starts."""
        root, offset = b.name, const(0)
        while root in self.p.views:
            root, more = self.p.views[root]
            offset = offset + byte_size(b.dtype, more)
        return root, offset

    def find_mirrors(self) -> None:
        """Buffers that main reads and that only main writes are kept on the host as well."""
        read = {self.root(ld.attr[0])[0] for s in walk_stmts(self.p.body) for e in exprs_of(s) for ld in loads(e)}
        stored: set[str] = set()
        device: set[str] = set()
        for s in walk_stmts(self.p.body):
            if isinstance(s, Store):
                stored.add(self.root(s.buf)[0])
            elif isinstance(s, Call) and s.callee in self.p.kernels:
                f = self.p.kernels[s.callee]
                w = {x.buf.name for x in walk_stmts(f.body) if isinstance(x, Store)}
                for q, a in zip(f.params, s.args, strict=True):
                    if isinstance(q, Buffer) and q.name in w:
                        device.add(self.root(a if isinstance(a, Buffer) else a[0])[0])
        for name in sorted((read & stored) - device):
            self.mirror[name] = len(self.mirror)
        self.g.mirrors = len(self.mirror)

    # ------------------------------------------------------------ expressions of main

    def name(self, v: Expr) -> str:
        n = self.names.get(v)
        if n is None:
            base = "".join(c if c.isalnum() and c.isascii() else "_" for c in v.attr[0]).strip("_") or "v"
            base = f"d_{base}"
            n, k = base, 1
            while n in self.taken:
                n, k = f"{base}_{k}", k + 1
            self.taken.add(n)
            self.names[v] = n
        return n

    def expr(self, e: Expr) -> Any:
        return host_expr(e, self.name, self.load)

    def load(self, e: Expr) -> Any:
        b, idx, mask, other = load_parts(e)
        root, offset = self.root(b)
        i = idx[0] if idx else const(0)
        at = offset + byte_size(b.dtype, i)
        d = b.dtype
        if is_subbyte(d):
            raise CompilationError(f"main reads {b.name}, whose elements of {d} share bytes")
        if root in self.mirror:
            r: Any = ["mirror", self.mirror[root], self.expr(floordiv(at, const(self.bytes_of(d))))]
        elif root in self.p.constants:
            a = self.p.constants[root].reshape(-1)
            if at.op != "const":
                raise CompilationError(f"main reads the constant {root} at an index of the run")
            r = a.view(d.numpy)[at.attr // self.bytes_of(d)].item()
        else:
            memory, base = self.memory_of(root)
            if memory[0] == "in":
                self.g.fixed = False
                r = ["peek", memory[1], self.expr(floordiv(at, const(self.bytes_of(d))))]
            else:
                self.g.fixed = False
                self.g.crossings.append(f"{root}[{i!r}]: {d}")
                r = ["read", list(memory), self.expr(at + base), d.name]
        if mask is not None and other is not None:
            return ["?", self.expr(mask), r, self.expr(other)]
        return r

    @staticmethod
    def bytes_of(d: DType) -> int:
        return 1 if d.is_bool else d.bits // 8

    def memory_of(self, root: str) -> tuple[tuple[str, int], Expr]:
        if root not in self.place:
            raise CompilationError(f"buffer {root} has no memory")
        return self.place[root]

    # ------------------------------------------------------------ statements of main

    def stmt(self, s: Stmt, out: list[Any]) -> None:
        if isinstance(s, Block):
            k = 0
            while k < len(s.stmts):
                k += self.stores(s.stmts, k, out) or self.one(s.stmts[k], out)
        else:
            self.one(s, out)

    def one(self, s: Stmt, out: list[Any]) -> int:
        if isinstance(s, Let):
            out.append(["let", self.name(s.var), self.expr(s.value)])
            self.known.add(s.var)
            ready = [(k, e) for k, e in self.pending if free_vars(e) <= self.known]
            self.pending = [x for x in self.pending if x not in ready]
            out += [["buffer", k, self.expr(e)] for k, e in ready]
        elif isinstance(s, Store):
            self.stores((s,), 0, out)
        elif isinstance(s, (If, While)):
            waiting, cond = self.pending, self.expr(s.cond)
            bodies: list[list[Any]] = [[] for _ in children(s)]
            for body, c in zip(bodies, children(s), strict=True):
                self.stmt(c, body)
            out += [["buffer", k, 0] for k, _ in waiting if not any(k == j for j, _ in self.pending)]  # no round, no branch: they are empty
            out.append(["while", cond, *bodies] if isinstance(s, While) else ["if", cond, *bodies, *([[]] if s.orelse is None else [])])
        elif isinstance(s, Call):
            if s.callee == "lt.check":
                out.append(["check", self.expr(s.args[0]), self.expr(s.args[1]), str(dict(s.attrs).get("what", "an extent"))])
            else:
                self.call(s, out)
        elif isinstance(s, Block):
            self.stmt(s, out)
        else:
            raise CompilationError(f"a program cannot hold {type(s).__name__}")
        return 1

    def stores(self, stmts: Sequence[Stmt], k: int, out: list[Any]) -> int:
        """Scalars that main writes: neighbours in one buffer become one copy to the device. Returns how many statements it took."""
        first = stmts[k]
        if not isinstance(first, Store):
            return 0
        run: list[Store] = []
        start = first.idx[0] if first.idx else const(0)
        for s in stmts[k:]:
            if not isinstance(s, Store) or s.buf.name != first.buf.name or s.mask is not None:
                break
            if s.idx and s.idx[0] is not start + len(run):
                break
            run.append(s)
        if not run:
            raise CompilationError(f"main stores to {first.buf.name} under a mask")
        b = first.buf
        root, offset = self.root(b)
        memory, base = self.memory_of(root)
        size = self.bytes_of(b.dtype)
        values = [self.expr(s.value) for s in run]
        if root in self.mirror:
            at = floordiv(offset, const(size)) + start
            out += [["mirror", self.mirror[root], self.expr(at + j), v] for j, v in enumerate(values)]
            values = [["mirror", self.mirror[root], self.expr(at + j)] for j in range(len(values))]
        if self.on_device(root):
            at = offset + byte_size(b.dtype, start) + base
            if size < 4 and not _multiple(at, 4):
                raise CompilationError(f"main stores {b.dtype} to {b.name} inside of a word")
            if size < 4 and len(run) * size % 4 and not (b.size().op == "const" and b.size().attr == len(run)):
                raise CompilationError(f"main stores a part of a word to {b.name}")
            out.append(["write", list(memory), self.expr(at), b.dtype.name, values])
        return len(run)

    def on_device(self, root: str) -> bool:
        """Whether a kernel or the caller reads the buffer (main alone may use the mirror)."""
        if root not in self.mirror or any(b.name == root for b in self.p.outputs):
            return True
        return any(
            self.root(a if isinstance(a, Buffer) else a[0])[0] == root
            for s in walk_stmts(self.p.body) if isinstance(s, Call) and s.callee in self.p.kernels for a in s.args if not isinstance(a, Expr)
        )  # fmt: skip

    # ------------------------------------------------------------ kernels

    def call(self, s: Call, out: list[Any]) -> None:
        number = self.calls
        self.calls += 1
        self.g.calls.append(s.callee)
        try:
            self.dispatch(s, number, out)
        except LuthierError as e:
            raise e.at(node=", ".join(self.p.nodes.get(number, ())) or None) from None

    def dispatch(self, s: Call, number: int, out: list[Any]) -> None:
        f = self.p.kernels[s.callee]
        env = {q: a for q, a in zip(f.params, s.args, strict=True) if isinstance(q, Expr)}
        args: list[_Arg] = []
        pieces: dict[str, tuple[int, int]] = {}
        for q, a in zip(f.params, s.args, strict=True):
            if isinstance(q, Buffer):
                b, more = (a, const(0)) if isinstance(a, Buffer) else a
                root, offset = self.root(b)
                memory, base = self.memory_of(root)
                n = substitute(byte_size(q.dtype, q.size()), env)
                if root in self.large:
                    if not (offset.op == "const" and offset.attr == 0):
                        raise CompilationError(f"a part of constant {root}, which is larger than a WebGPU binding")
                    count = self.large[root]
                    pieces[q.name] = (BINDING_BYTES * 8 // q.dtype.bits, count)
                    for k in range(count):
                        part = replace(q, name=f"{q.name}.{k}" if k else q.name)
                        args.append(_Arg(part, ("w", memory[1] + k), const(0), const(0), const(self.g.weights[memory[1] + k][1]), False))
                    continue
                args.append(_Arg(q, memory, base, offset + byte_size(b.dtype, more), n, q.name in self.written[s.callee]))
        roots = {q.name: self.root(a if isinstance(a, Buffer) else a[0])[0] for q, a in zip(f.params, s.args, strict=True) if isinstance(q, Buffer) and not isinstance(a, Expr)}
        narrow = narrow_params(f, roots, self.wide)
        narrow |= {f"{n}.{k}" for n in narrow & pieces.keys() for k in range(1, pieces[n][1])}
        f = split_buffers(f, pieces)
        groups, moved = self.groups(args, out)
        args = moved or args
        member = {n for g in groups for n in g}
        shifted = [x for x in args if x.param.name in member or not _multiple(x.offset + x.base, OFFSET_ALIGN)]
        starts = {g: self.start(x for x in args if x.param.name in g) for g in groups}
        places: dict[str, tuple[Expr, int]] = {}  # of the elements that are bound: where the argument starts, in units of so many of them
        for x in shifted:
            start = x.offset + x.base - next(e for g, e in starts.items() if x.param.name in g) if x.param.name in member else x.offset
            bits = 8 * self.bytes_of(x.param.dtype) if x.param.dtype.bits >= 8 else x.param.dtype.bits
            places[x.param.name] = (start, 128 // bits if _multiple(start, 16) else 1)
        names = tuple(places)
        units = {n: u for n, (_, u) in places.items()}
        key = (s.callee, groups, tuple(units.items()), tuple(pieces), narrow)
        variant = self.variants.get(key)
        if variant is None:
            variant = self.variants[key] = self.pipeline(offset_buffers(f, names, units), groups, narrow, self.p.nodes.get(number, ()))
        pipeline, shader, least = variant
        scalars = dict(env)
        for x in shifted:
            v = next(v for v in offset_scalars(f, names) if v.attr[0] == f"{x.param.name}.at")
            start, unit = places[x.param.name]
            bits = 8 * self.bytes_of(x.param.dtype) if x.param.dtype.bits >= 8 else x.param.dtype.bits
            scalars[v] = floordiv(start * 8, const(bits * unit))
        by_name = {v.attr[0]: e for v, e in scalars.items()}
        first = {g[0]: g for g in groups}
        bound = []
        for b, few in zip(shader.buffers, least, strict=True):
            mine = [x for x in args if x.param.name in first.get(b.name, (b.name,))]
            x = mine[0]
            if b.name in first:
                at: Expr = starts[first[b.name]]
                size: Expr = const(0)
                for y in mine:
                    size = maximum(size, y.offset + y.base + y.size - at)
            elif b.name in names:
                at, size = x.base, x.offset + x.size
            else:
                at, size = x.offset + x.base, x.size
            bound.append([list(x.memory), self.expr(at), self.expr(_words(size, few))])
        words = []
        for v in shader.scalars:
            e = self.expr(by_name[v.attr[0]])
            words.append(["bits", e] if v.dtype.is_float else e)
        rounds = substitute(count_rounds(f), env)
        if not prove(rounds <= LOOP_LIMIT):
            out.append(["rounds", self.expr(rounds), ", ".join(self.p.nodes.get(number, ())) or s.callee])
        grid = [self.expr(substitute(e, {v: by_name[v.attr[0]] for v in free_vars(e)})) for e in shader.grid]
        out.append(["dispatch", pipeline, bound, words, *grid, number])

    @staticmethod
    def start(members: Iterable[_Arg]) -> Expr:
        """Where the binding of a group starts: at its first member where all places are known, else at the start of the memory."""
        places = [x.base + x.offset for x in members]
        if any(e.op != "const" for e in places):
            return const(0)
        return const(min(int(e.attr) for e in places) // OFFSET_ALIGN * OFFSET_ALIGN)

    def groups(self, args: list[_Arg], out: list[Any]) -> tuple[tuple[tuple[str, ...], ...], list[_Arg]]:
        """Which parameters share a binding, and the arguments after copies that a kernel with too many buffers needs."""
        by_memory: dict[tuple[str, int], list[_Arg]] = {}
        for x in args:
            by_memory.setdefault(x.memory, []).append(x)
        groups = [tuple(y.param.name for y in xs) for xs in by_memory.values() if len(xs) > 1 and any(y.written for y in xs)]

        def count() -> int:
            return len(args) - sum(len(g) - 1 for g in groups)

        for m, xs in by_memory.items():
            if count() > STORAGE_BUFFERS and len(xs) > 1 and m[0] == "w":  # the smallest ones, no more than must be
                few = sorted(xs, key=lambda y: y.size.attr if y.size.op == "const" else BINDING_BYTES)[: count() - STORAGE_BUFFERS + 1]
                groups.append(tuple(y.param.name for y in xs if y in few))
        if count() <= STORAGE_BUFFERS:
            return tuple(groups), []
        free = [x for x in args if not x.written and not any(x.param.name in g for g in groups)]
        extra = count() - STORAGE_BUFFERS + 1
        if len(free) < extra:
            raise CompilationError(f"a kernel with {len(args)} buffers, WebGPU allows {STORAGE_BUFFERS}")
        chosen = free[-extra:]
        k = self.g.buffers
        self.g.buffers += 1
        total: Expr = const(0)
        moved = list(args)
        copies = []
        for x in chosen:
            size = _words(x.size)
            y = _Arg(x.param, ("b", k), const(0), total, x.size, False)
            copies.append(["copy", list(x.memory), self.expr(x.offset + x.base), ["b", k], self.expr(total), self.expr(size)])
            moved[moved.index(x)] = y
            total = total + size
            if not _multiple(x.offset + x.base, 4):
                raise CompilationError(f"a kernel with {len(args)} buffers, one of which starts inside of a word")
        out.append(["buffer", k, self.expr(total)])
        out += copies
        groups.append(tuple(x.param.name for x in chosen))
        return tuple(groups), moved

    def pipeline(self, f: Func, groups: Sequence[Sequence[str]], narrow: frozenset[str], nodes: Sequence[str]) -> tuple[int, Shader, tuple[int, ...]]:
        """(its number, its shader without optional features, the least bytes of each binding). What a device may have is printed again
        with it; equal texts are one shader. ``nodes``: what it computes, for messages; of equal pipelines the first one's stay."""
        g = self.g
        made = [print_wgsl(legalize_wgsl(f, groups, features, narrow)) for features in subsets(optional_features(f))]
        shader = made[-1]
        letters = ["".join("w" if b.writable else "r" for b in s.buffers) for s in made]
        if len({(x, s.scalars, s.grid) for x, s in zip(letters, made, strict=True)}) > 1:
            raise CompilationError("the alternatives of a shader differ in their bindings", op=f.name)
        ids = list(dict.fromkeys(self.shader(s) for s in made))
        entry = {"shaders": ids, "bindings": letters[-1], "uniforms": -(-4 * len(shader.scalars) // 16) * 16}
        same = [k for k, p in enumerate(g.pipelines) if p.items() >= entry.items()]
        if not same:
            same = [len(g.pipelines)]
            g.pipelines.append({**entry, "nodes": list(nodes)})
        least = tuple(max(4, *(int(b.dtype.itemsize) * b.dtype.lanes for b in bs)) for bs in zip(*(s.buffers for s in made), strict=True))
        return same[0], shader, least

    def shader(self, s: Shader) -> int:
        """The number of a text."""
        g = self.g
        k = self.shader_ids.get(s.source)
        if k is None:
            k = self.shader_ids[s.source] = len(g.shaders)
            g.shaders.append(s.source)
            g.features.append(list(s.features))
            g.names[k] = s.name
        return k


def offset_scalars(f: Func, names: Sequence[str]) -> tuple[Expr, ...]:
    return offset_buffers(f, names).scalars[len(f.scalars) :]


def _words(e: Expr, least: int = 4) -> Expr:
    """Bytes rounded up to whole words, at least ``least``: a binding holds one element or more."""
    n = e if _multiple(e, 4) else floordiv(e + 3, const(4)) * 4
    if n.op == "const":
        return const(max(n.attr, least))
    return maximum(n, const(least))


def _multiple(e: Expr, k: int) -> bool:
    """Whether an index expression is a multiple of ``k`` whatever its variables are."""
    return all(c % k == 0 for c in linear(e).values())


__all__ = ["GpuProgram", "build_webgpu"]
