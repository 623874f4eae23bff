"""A Program for WebGPU: WGSL for its kernels, and its main as plain data (:mod:`luthier.codegen.gpu.host_program`, ``docs/web.md``).

A kernel may not read and write one GPUBuffer through two bindings. An argument whose place in its buffer is not a multiple of 256 bytes is
bound from the start and its kernel gets the offset as a scalar; arguments that share memory which the kernel writes, and constants where a
kernel has too many buffers, become one binding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.codegen.gpu.host_program import Argument, HostBuilder, HostProgram, multiple, start_of
from luthier.codegen.gpu.webgpu_features import subsets
from luthier.codegen.gpu.wgsl import Shader, legalize_wgsl, optional_features, print_wgsl
from luthier.codegen.targets.webgpu import BINDING_BYTES, LOOP_LIMIT, OFFSET_ALIGN, STORAGE_BUFFERS
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, const, floordiv, free_vars, maximum, prove, substitute
from luthier.ir.loop import Buffer, Call, Func, Store, walk_stmts
from luthier.ir.program import Program
from luthier.passes.gpu.count_rounds import count_rounds
from luthier.passes.gpu.find_wide_buffers import find_wide_buffers, narrow_params
from luthier.passes.gpu.offset_buffers import offset_buffers, offset_scalars
from luthier.passes.gpu.split_buffers import split_buffers
from luthier.passes.program.plan_memory import byte_size


@dataclass(slots=True)
class GpuProgram(HostProgram):
    """``shaders``: WGSL, entry point ``main``, without directives; ``features``: the optional ones that each of them needs; ``pipelines``,
    ``weights``, ``narrow``, ``within``, ``fixed``: as in ``docs/web.md``; ``names``: the kernel of each shader."""

    shaders: list[str] = field(default_factory=list)
    features: list[list[str]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)


def build_webgpu(program: Program) -> GpuProgram:
    """Raises CompilationError, naming the graph node, for what WebGPU cannot hold or compute."""
    g = GpuProgram()
    WebGpuBuilder(program, g).build()
    return g


class WebGpuBuilder(HostBuilder):
    align = OFFSET_ALIGN
    binding = BINDING_BYTES
    g: GpuProgram

    def __init__(self, program: Program, g: GpuProgram) -> None:
        super().__init__(program, g)
        self.variants: dict[Any, tuple[int, Shader, tuple[int, ...]]] = {}
        self.shader_ids: dict[str, int] = {}
        self.wide = find_wide_buffers(program, lambda b: self.root(b)[0])
        g.narrow += [j for j, b in enumerate(program.inputs) if b.dtype.is_int and b.dtype.bits == 64 and b.name not in self.wide]

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

    def check_store(self, b: Buffer, at: Expr, size: int, count: int) -> None:
        if size < 4 and not multiple(at, 4):
            raise CompilationError(f"main stores {b.dtype} to {b.name} inside of a word")
        if size < 4 and count * size % 4 and not (b.size().op == "const" and b.size().attr == count):
            raise CompilationError(f"main stores a part of a word to {b.name}")

    def dispatch(self, s: Call, number: int, out: list[Any]) -> None:
        f = self.p.kernels[s.callee]
        env = {q: a for q, a in zip(f.params, s.args, strict=True) if isinstance(q, Expr)}
        args: list[Argument] = []
        pieces: dict[str, tuple[int, int]] = {}
        for q, a in zip(f.params, s.args, strict=True):
            if isinstance(q, Buffer):
                x = self.argument(q, a, f, env)
                root, offset = self.root(a if isinstance(a, Buffer) else a[0])
                if root in self.large:
                    if not (offset.op == "const" and offset.attr == 0):
                        raise CompilationError(f"a part of constant {root}, which is larger than a WebGPU binding")
                    count = self.large[root]
                    pieces[q.name] = (self.binding * 8 // q.dtype.bits, count)
                    for k in range(count):
                        part = replace(q, name=f"{q.name}.{k}" if k else q.name)
                        args.append(Argument(part, ("w", x.memory[1] + k), const(0), const(0), const(self.g.weights[x.memory[1] + k][1]), False))
                    continue
                args.append(x)
        roots = {q.name: self.root(a if isinstance(a, Buffer) else a[0])[0] for q, a in zip(f.params, s.args, strict=True) if isinstance(q, Buffer) and not isinstance(a, Expr)}
        narrow = narrow_params(f, roots, self.wide)
        narrow |= {f"{n}.{k}" for n in narrow & pieces.keys() for k in range(1, pieces[n][1])}
        f = split_buffers(f, pieces)
        groups, moved = self.groups(args, out)
        args = moved or args
        member = {n for g in groups for n in g}
        shifted = [x for x in args if x.param.name in member or not multiple(x.offset + x.base, OFFSET_ALIGN)]
        starts = {g: self.start(x for x in args if x.param.name in g) for g in groups}
        places: dict[str, tuple[Expr, int]] = {}
        for x in shifted:
            start = x.offset + x.base - next(e for g, e in starts.items() if x.param.name in g) if x.param.name in member else x.offset
            places[x.param.name] = start_of(x, start)
        names = tuple(places)
        units = {n: u for n, (_, u) in places.items()}
        key = (s.callee, groups, tuple(units.items()), tuple(pieces), narrow)
        variant = self.variants.get(key)
        if variant is None:
            variant = self.variants[key] = self.pipeline(offset_buffers(f, names, units), groups, narrow, self.p.nodes.get(number, ()))
        pipeline, shader, least = variant
        scalars = env | dict(zip(offset_scalars(f, names), (e for e, _ in places.values()), strict=True))
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
    def start(members: Iterable[Argument]) -> Expr:
        """Where the binding of a group starts: at its first member where all places are known, else at the start of the memory."""
        places = [x.base + x.offset for x in members]
        if any(e.op != "const" for e in places):
            return const(0)
        return const(min(int(e.attr) for e in places) // OFFSET_ALIGN * OFFSET_ALIGN)

    def groups(self, args: list[Argument], out: list[Any]) -> tuple[tuple[tuple[str, ...], ...], list[Argument]]:
        """Which parameters share a binding, and the arguments after copies that a kernel with too many buffers needs."""
        by_memory: dict[tuple[str, int], list[Argument]] = {}
        for x in args:
            by_memory.setdefault(x.memory, []).append(x)
        groups = [tuple(y.param.name for y in xs) for xs in by_memory.values() if len(xs) > 1 and any(y.written for y in xs)]

        def count() -> int:
            return len(args) - sum(len(g) - 1 for g in groups)

        for m, xs in by_memory.items():
            if count() > STORAGE_BUFFERS and len(xs) > 1 and m[0] == "w":  # the smallest ones, no more than must be
                few = sorted(xs, key=lambda y: y.size.attr if y.size.op == "const" else self.binding)[: count() - STORAGE_BUFFERS + 1]
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
            y = Argument(x.param, ("b", k), const(0), total, x.size, False)
            copies.append(["copy", list(x.memory), self.expr(x.offset + x.base), ["b", k], self.expr(total), self.expr(size)])
            moved[moved.index(x)] = y
            total = total + size
            if not multiple(x.offset + x.base, 4):
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


def _words(e: Expr, least: int = 4) -> Expr:
    """Bytes rounded up to whole words, at least ``least``: a binding holds one element or more."""
    n = e if multiple(e, 4) else floordiv(e + 3, const(4)) * 4
    if n.op == "const":
        return const(max(n.attr, least))
    return maximum(n, const(least))
