"""A Program's main as plain data for a host to run, and what it needs to know of kernels: what all GPU targets share.

Every slot of the memory plan is a buffer of its own; constants share one or a few large ones. Buffers that main itself reads are
mirrored on the host as far as only main writes them; any other read of a buffer is a crossing.

Host statements (lists): ``let name expr``; ``buffer k bytes``; ``dispatch pipeline [[memory, offset, size]..] [scalar..] x y z
call``; ``write memory offset dtype [value..]``; ``mirror k index value``; ``copy memory offset memory offset bytes``; ``check got
want what``; ``rounds n what``, before a dispatch whose threads may go through more rounds of loops than some devices run;
``if cond then else``; ``while cond body``; ``output j memory offset [extent..]``. A memory is ``["in", j]``, ``["w", k]`` or
``["b", k]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from luthier.codegen.gpu.host_expr import host_expr
from luthier.codegen.program.steps import DEFAULT
from luthier.ir.dtypes import DType
from luthier.ir.errors import CompilationError, LuthierError
from luthier.ir.expr import Expr, const, floordiv, free_vars, linear, load_parts, loads, substitute
from luthier.ir.loop import Block, Buffer, Call, Func, If, Let, Stmt, Store, While, children, exprs_of, stmts_of, walk_stmts
from luthier.ir.program import Program
from luthier.passes.loop.lower_subbyte import is_subbyte, pack_array
from luthier.passes.program.plan_memory import byte_size, plan_memory, round_up, touched

SMALL = 64 << 10  # bytes up to which a constant counts as small


@dataclass(slots=True)
class HostProgram:
    """``pipelines``: what a dispatch launches, as the target's builder says; ``weights``: [offset, bytes] of the blob for each
    buffer of constants; ``narrow``: inputs of 64-bit integers that must fit 32; ``within``: [input, low, high, what] of inputs
    whose elements are indices; ``fixed``: the same launches for the same shapes; ``body``: host statements; ``blob``: all
    constants, flat ``uint8``; ``calls``: the kernel of each dispatch in the program; ``mirrors``: how many buffers are mirrored
    on the host; ``crossings``: what main reads back."""

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
    defaults: dict[str, int] = field(default_factory=dict)  # where the blob holds what inputs are that a call leaves out


@dataclass(frozen=True, slots=True)
class Argument:
    """One buffer argument of a call: parameter, memory, byte offset of the memory's own place, byte offset in it, bytes."""

    param: Buffer
    memory: tuple[str, int]
    base: Expr
    offset: Expr
    size: Expr
    written: bool


class HostBuilder:
    """``align``: bytes from a multiple of which an argument may start without its kernel being told; ``binding``: the most bytes
    of a buffer of constants. A subclass says how a call becomes a ``dispatch``."""

    align: ClassVar[int]
    binding: ClassVar[int]

    def __init__(self, program: Program, result: HostProgram) -> None:
        self.p = program
        self.g = result
        self.plan = plan_memory(program)
        self.names: dict[Expr, str] = {}
        self.taken: set[str] = set()
        self.place: dict[str, tuple[tuple[str, int], Expr]] = {}
        self.declared = {b.name: b for b in (*program.inputs, *program.outputs, *program.buffers)}
        self.pending: list[tuple[int, Expr]] = []  # buffers whose size waits for a value of the run
        self.known: set[Expr] = set(program.dims)
        self.written: dict[str, set[str]] = {}
        self.mirror: dict[str, int] = {}
        self.large: dict[str, int] = {}  # constants larger than a binding: how many weight buffers they fill
        self.calls = 0

    # ------------------------------------------------------------ memory

    def build(self) -> None:
        """Fills the result."""
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
                total = total + round_up(byte_size(b.dtype, b.size()), self.align)
        if pooled:
            sizes.append(total)
            n += 1
        g.buffers = n
        for j, b in enumerate(p.inputs):
            self.place[b.name] = (("in", j), zero)
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

    def pooled(self) -> set[str]:
        """Buffers and outputs that share one buffer of the device."""
        return set()

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
        order = sorted(
            self.p.constants.items(), key=lambda c: c[1].nbytes > SMALL
        )  # small ones side by side: one binding may hold several
        for name, a in order:
            d = dtypes.get(name)
            if d is None:
                continue
            if is_subbyte(d) and a.dtype != np.uint8:
                a = pack_array(a, d)
            raw = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
            size = -(-max(raw.size, 4) // self.align) * self.align
            if size > self.binding:  # whole weight buffers of its own, the last one shorter
                self.place[name] = (("w", len(g.weights)), const(0))
                self.large[name] = -(-size // self.binding)
                for start in range(0, size, self.binding):
                    g.weights.append([at + start, min(self.binding, size - start)])
                g.weights.append([at + size, 0])
                parts += [raw, np.zeros(size - raw.size, np.uint8)]
                at += size
                continue
            if not g.weights or at + size - g.weights[-1][0] > self.binding:
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
                parts += [raw, np.zeros(-raw.size % self.align, np.uint8)]
                at += raw.size + -raw.size % self.align
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
            out += [
                ["buffer", k, 0] for k, _ in waiting if not any(k == j for j, _ in self.pending)
            ]  # no round, no branch: they are empty
            out.append(
                ["while", cond, *bodies] if isinstance(s, While) else ["if", cond, *bodies, *([[]] if s.orelse is None else [])]
            )
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
        """Scalars that main writes: neighbours in one buffer become one copy to the device. Returns how many statements it
        took."""
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
            self.check_store(b, at, size, len(run))
            out.append(["write", list(memory), self.expr(at), b.dtype.name, values])
        return len(run)

    def check_store(self, b: Buffer, at: Expr, size: int, count: int) -> None:
        """Whether ``count`` elements of ``size`` bytes can be written from byte ``at``. Raises CompilationError."""

    def on_device(self, root: str) -> bool:
        """Whether a kernel or the caller reads the buffer (main alone may use the mirror)."""
        if root not in self.mirror or any(b.name == root for b in self.p.outputs):
            return True
        return any(
            self.root(a if isinstance(a, Buffer) else a[0])[0] == root
            for s in walk_stmts(self.p.body) if isinstance(s, Call) and s.callee in self.p.kernels
            for a in s.args if not isinstance(a, Expr)
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
        raise NotImplementedError

    def argument(self, q: Buffer, a: Any, f: Func, env: dict[Expr, Expr]) -> Argument:
        """What a call gives for the buffer ``q``."""
        b, more = (a, const(0)) if isinstance(a, Buffer) else a
        root, offset = self.root(b)
        memory, base = self.memory_of(root)
        n = substitute(byte_size(q.dtype, q.size()), env)
        return Argument(q, memory, base, offset + byte_size(b.dtype, more), n, q.name in self.written[f.name])


def start_of(x: Argument, start: Expr) -> tuple[Expr, int]:
    """The place ``start`` (bytes) of an argument in what is bound: (how many units, elements of a unit), so that an aligned start
    is known to be one."""
    bits = x.param.dtype.bits
    unit = 128 // bits if multiple(start, 16) else 1
    return floordiv(start * 8, const(bits * unit)), unit


def multiple(e: Expr, k: int) -> bool:
    """Whether an index expression is a multiple of ``k`` whatever its variables are."""
    return all(c % k == 0 for c in linear(e).values())
