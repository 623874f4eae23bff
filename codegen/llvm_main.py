"""A Program's own part of a compiled module, as LLVM text: ``lt_bind``, ``lt_place`` and ``lt_main`` beside the runtime.

``lt_bind`` checks the inputs, reads the dims and writes output shapes; ``lt_place`` finds memory; ``lt_main`` runs on every
thread of a call. All addresses lie in a table of words in the context, so that ``lt_main`` holds nothing in registers between
two calls. A barrier stands only where a thread could see or destroy what another one still works on: kernels with a parallel loop
are shared by chunks, everything else runs on thread 0, and reads and writes are followed per piece of memory.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.codegen.llvm_intrin import HELPERS
from luthier.codegen.llvm_printer import KernelPrinter, parallel_loop, quote
from luthier.codegen.llvm_share import SharePrinter, definition
from luthier.codegen.llvm_types import reg_type
from luthier.codegen.sharing import Hazards, KernelWork, useful_threads
from luthier.codegen.target import Target
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, bounds, free_vars, loads, substitute
from luthier.ir.loop import (
    EMPTY,
    Buffer,
    Call,
    For,
    Func,
    If,
    Let,
    Stmt,
    Store,
    While,
    exprs_of,
    stmts_of,
    walk_stmts,
)
from luthier.ir.program import Program
from luthier.passes.check_bounds import is_checked
from luthier.passes.lower_subbyte import is_subbyte, pack_array
from luthier.passes.plan_memory import ALIGN, Plan, byte_size, plan_memory

ABI_VERSION = 1
MAX_RANK = 8
WORDS = 1024  # byte of the context where the program's words start
TENSOR = 88  # bytes of an lt_tensor

# Codes of element types in the ABI, those of ONNX.
DTYPE_CODES = {
    "f32": 1, "u8": 2, "i8": 3, "u16": 4, "i16": 5, "i32": 6, "i64": 7, "bool": 9, "f16": 10, "f64": 11, "u32": 12, "u64": 13,
    "bf16": 16, "f8e4m3fn": 17, "f8e4m3fnuz": 18, "f8e5m2": 19, "f8e5m2fnuz": 20, "u4": 21, "i4": 22, "f8e8m0": 24, "u2": 25, "i2": 26,
}  # fmt: skip

# processor: number of the futex system call, name and argument types of the intrinsic that pauses, its arguments
_SYSTEM = {"x86_64": ("202", "llvm.x86.sse2.pause", "", ""), "aarch64": ("98", "llvm.aarch64.hint", "i32", "i32 1")}


@dataclass(slots=True)
class MainText:
    """``text``: the program's module, which calls the kernels by their symbols and ``runtime``, a module that depends only on the
    target; it is not worth optimising. ``weights``: (constant, byte offset), 64-byte
    aligned; ``arrays``: {constant: its bytes, flat uint8, sub-byte elements packed}; ``weights_bytes``: the size of all;
    ``calls``: the kernel of each call, in the order of profiles; ``parallel``: whether threads share any kernel."""

    text: str
    runtime: str
    weights: list[tuple[str, int]]
    arrays: dict[str, np.ndarray[Any, Any]]
    weights_bytes: int
    calls: list[str]
    parallel: bool


@dataclass(slots=True)
class _Weights:
    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    size: int = 0


def lay_out(program: Program) -> _Weights:
    """Bytes of every constant, sub-byte elements packed."""
    w = _Weights()
    dtypes = {b.name: b.dtype for s in walk_stmts(program.body) for b in _mentioned(s)}
    for name, a in program.constants.items():
        d = dtypes.get(name)
        if d is not None and is_subbyte(d) and a.dtype != np.uint8:
            a = pack_array(a, d)
        w.arrays[name] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        w.offsets[name] = w.size
        w.size += -(-w.arrays[name].size // ALIGN) * ALIGN
    return w


def _mentioned(s: Stmt) -> list[Buffer]:
    out = [e.attr[0] for x in exprs_of(s) for e in loads(x)]
    if isinstance(s, Store):
        out.append(s.buf)
    elif isinstance(s, Call):
        out += [a if isinstance(a, Buffer) else a[0] for a in s.args if not isinstance(a, Expr)]
    return out


# ---------------------------------------------------------------- kernels


def stored(f: Func) -> set[str]:
    return {s.buf.name for s in walk_stmts(f.body) if isinstance(s, Store)}


# ---------------------------------------------------------------- main


class _Printer(KernelPrinter):
    """Shared by the three functions: dims and addresses come from the context's table."""

    def __init__(self, m: _Module, name: str) -> None:
        super().__init__(Func(name, (), EMPTY), m.target, name)
        self.m = m

    def word(self, k: int) -> str:
        return self.ins(f"getelementptr i8, ptr %ctx, i64 {WORDS + 8 * k}")

    def pointer(self, b: Buffer) -> str:
        """Where buffer ``b`` starts."""
        root, offset = self.m.program.views.get(b.name, (b.name, None))
        parts = [] if offset is None else [offset]
        while root in self.m.program.views:
            root, offset = self.m.program.views[root]
            parts.append(offset)
        if root in self.m.weights.offsets:
            w = self.ins("getelementptr %ctx, ptr %ctx, i32 0, i32 14")
            base = self.ins(f"load ptr, ptr {w}")
            o = self.m.weights.offsets[root]
            p = self.ins(f"getelementptr i8, ptr {base}, i64 {o}") if o else base
        else:
            if root not in self.m.table:
                raise CompilationError(f"program {self.m.program.name}: buffer {root} has no memory")
            p = self.ins(f"load ptr, ptr {self.word(self.m.table[root])}")
        for e in parts:
            if not (e.op == "const" and e.attr == 0):
                p = self.ins(f"getelementptr i8, ptr {p}, i64 {self.value(byte_size(b.dtype, e))}")
        return p


    def load_dims(self, used: Iterable[Expr]) -> None:
        want = set(used)
        for k, v in enumerate(self.m.program.dims):
            if v in want:
                self.bind(v, self.ins(f"load i64, ptr {self.word(k)}"))

    def string(self, text: str) -> str:
        return self.m.string(text)


class _Main(_Printer):
    def __init__(self, m: _Module) -> None:
        super().__init__(m, "lt_main")
        self.hazards = Hazards()
        self.known = set(m.program.dims)
        self.placed: set[str] = set()
        self.checked: set[Expr] = set()  # extents known to be no less than 0

    def text(self) -> str:
        self.lines += ["%ctx = load ptr, ptr %st", "%tp = getelementptr %state, ptr %st, i32 0, i32 1", "%tid = load i64, ptr %tp", "%first = icmp eq i64 %tid, 0"]
        self.load_dims(self.m.used)
        for s in stmts_of(self.m.program.body):
            self.stmt(s)
        self.emit("br label %exit")
        self.start("exit")
        self.emit("call void @lt.wait_all(ptr %st)")
        self.emit("ret void")
        return definition(self, "hidden void @lt_main(ptr %st)")

    def memory(self, b: Buffer) -> Any:
        """What a barrier protects: a slot, an input, an output; None for constants, which nobody writes."""
        root = self.m.plan.root(b.name)
        if root in self.m.weights.offsets:
            return None
        return self.m.plan.slot_of.get(root, root)

    def barrier(self) -> None:
        """All threads arrive."""
        self.emit("call void @lt.barrier(ptr %st)")
        self.hazards = Hazards()
        self.begin_statement()

    def wait(self) -> None:
        """All work before this place is complete."""
        self.emit("call void @lt.wait_all(ptr %st)")
        self.hazards.waited()
        self.begin_statement()

    def access(self, reads: Iterable[Buffer], writes: Iterable[Buffer], shared: bool) -> None:
        r = {self.memory(b) for b in reads} - {None}
        w = {self.memory(b) for b in writes} - {None}
        if w & self.hazards.steering:
            self.barrier()
        elif self.hazards.conflict(r, w, shared):
            self.wait()
        self.hazards.note(r, w, shared)

    def read_by_all(self, *es: Expr) -> None:
        """Values that lt_main itself needs, on every thread."""
        memory = {self.memory(e.attr[0]) for e in loads(*es)} - {None}
        if self.hazards.conflict(memory, set(), True):
            self.wait()
        self.hazards.steering |= memory

    def stmt(self, s: Stmt) -> None:
        if isinstance(s, Let):
            self.begin_statement()
            self.read_by_all(s.value)
            self.bind(s.var, self.value(s.value))
            self.known.add(s.var)
            self.check_value(s)
            self.place_dynamic()
        elif isinstance(s, Call):
            self.begin_statement()
            self.call_kernel(s)
        else:
            super().stmt(s)

    def on_first(self, emit: Any) -> None:
        """What only thread 0 does: one chunk for those who wait."""
        self.emit("call void @lt.count(ptr %st, i32 1)")
        then, done = self.label("l"), self.label("l")
        self.emit(f"br i1 %first, label %{then}, label %{done}")
        self.start(then)
        self.push()
        emit()
        self.pop()
        self.emit("call void @lt.finish(ptr %st, i32 1)")
        self.emit(f"br label %{done}")
        self.start(done)
        self.begin_statement()

    def store(self, s: Store) -> None:
        self.access([e.attr[0] for x in exprs_of(s) for e in loads(x)], [s.buf], False)
        self.on_first(lambda: super(_Main, self).store(s))

    def require(self, s: Call) -> None:
        """``lt.check(got, want)``: the call fails when two extents differ. Every thread sees the same values, so all leave."""
        self.read_by_all(*s.args)
        got, want = (self.value(a) for a in s.args)
        what = dict(s.attrs).get("what", "an extent")
        self.leave_unless(self.ins(f"icmp eq i64 {got}, {want}"), f"@lt.check_equal(ptr %ctx, ptr {self.string(what)}, i64 {got}, i64 {want})")

    def leave_unless(self, ok: str, report: str) -> None:
        """All threads leave when ``ok`` is false, which all see alike; one calls ``report``."""
        bad, go = self.label("l"), self.label("l")
        self.emit(f"br i1 {ok}, label %{go}, label %{bad}")
        self.start(bad)
        self.push()
        self.on_first(lambda: self.emit(f"call void {report}"))
        self.pop()
        self.emit("br label %exit")
        self.start(go)
        self.begin_statement()

    def check_extents(self, bufs: Iterable[Buffer]) -> None:
        """A kernel is not called for tensors of negative extents, which inputs that are too small give."""
        for b in bufs:
            for axis, e in enumerate(b.shape):
                low = bounds(e)[0]
                if (low is None or low < 0) and e not in self.checked and not loads(e):
                    self.checked.add(e)
                    x = self.value(e)
                    self.leave_unless(self.ins(f"icmp sge i64 {x}, 0"), f"@lt.check_extent(ptr %ctx, ptr {self.string(self.m.public(b))}, i32 {axis}, i64 {x})")

    def check_value(self, s: Let) -> None:
        """What memory holds is no larger or smaller than the variable says: everything proved about indices rests on it."""
        _, lo, hi = s.var.attr
        if not loads(s.value) or not s.var.dtype.is_index or (lo is None and hi is None):
            return
        x = self.value(s.var)
        if isinstance(hi, Expr) and not (free_vars(hi) <= self.known and not loads(hi)):
            hi = None
        low = str(lo) if lo is not None else str(-(1 << 62))
        high = self.value(hi) if isinstance(hi, Expr) else str(hi) if hi is not None else str(1 << 62)
        ok = self.ins(f"and i1 {self.ins(f'icmp sge i64 {x}, {low}')}, {self.ins(f'icmp sle i64 {x}, {high}')}")
        self.leave_unless(ok, f"@lt.check_value(ptr %ctx, ptr {self.string(s.var.attr[0])}, i64 {x}, i64 {low}, i64 {high})")

    def call_kernel(self, s: Call) -> None:
        if s.callee == "lt.check":
            self.require(s)
            return
        f = self.m.program.kernels.get(s.callee)
        if f is None:
            raise CompilationError(f"program {self.m.program.name} calls the unknown kernel {s.callee}")
        if len(f.params) != len(s.args):
            raise CompilationError(f"kernel {s.callee} takes {len(f.params)} arguments, the program passes {len(s.args)}")
        written = stored(f)
        reads: list[Buffer] = []
        writes: list[Buffer] = []
        for p, a in zip(f.params, s.args):
            if isinstance(p, Buffer):
                b = a if isinstance(a, Buffer) else a[0]
                (writes if p.name in written else reads).append(b)
        scalars = [a if isinstance(a, Expr) else a[1] for a in s.args if not isinstance(a, Buffer)]
        self.read_by_all(*scalars)
        self.check_extents((*reads, *writes))
        env = {p: a for p, a in zip(f.params, s.args) if isinstance(p, Expr)}
        loop = self.m.loops[s.callee]
        load = self.m.work[s.callee]
        shared = loop is not None and not load.small(env)
        self.access(reads, writes, shared)
        args = []
        for p, a in zip(f.params, s.args):
            if isinstance(p, Buffer):
                b, o = (a, None) if isinstance(a, Buffer) else a
                q = self.pointer(b)
                if o is not None:
                    q = self.ins(f"getelementptr i8, ptr {q}, i64 {self.value(byte_size(b.dtype, o))}")
                args.append(f"ptr {q}")
            else:
                args.append(f"{reg_type(p.dtype)} {self.value(a)}")
        symbol, checked = self.m.symbols[s.callee], is_checked(f)
        extent = None if loop is None else substitute(loop[1], env)
        total = "0" if extent is None else self.value(extent)
        if shared:
            self.m.share(s.callee)
            self.m.shared_work.append(substitute(load.total, env))
            grain = self.value(load.grain(env, int(f.attrs.get("grain", 1))))
            self.emit(f"call void @{quote(symbol + '.share')}({', '.join(['ptr %st', *args, f'i64 {total}', f'i64 {grain}'])})")
        else:

            def run() -> None:
                done = ""
                if extent is not None and not (extent.op == "const" and extent.attr > 0):
                    some, done = self.label("l"), self.label("l")
                    self.emit(f"br i1 {self.ins(f'icmp sgt i64 {total}, 0')}, label %{some}, label %{done}")
                    self.start(some)
                if checked:  # the status is in the context as well
                    self.emit(f"call i32 @{quote(symbol)}({', '.join([*args, 'i64 0', f'i64 {total}', 'ptr %ctx'])})")
                else:
                    self.emit(f"call void @{quote(symbol)}({', '.join([*args, 'i64 0', f'i64 {total}'])})")
                if done:
                    self.emit(f"br label %{done}")
                    self.start(done)

            self.on_first(run)
        self.emit(f"call void @lt.mark(ptr %st, i64 {len(self.m.calls)})")
        if checked:
            self.leave_on_fault(self.m.where(len(self.m.calls), f, s))
        self.m.calls.append(s.callee)

    def leave_on_fault(self, where: str) -> None:
        """All threads leave when a kernel reported an index out of bounds; between the two barriers nobody can report another."""
        self.wait()
        self.barrier()
        failed = self.ins("call i1 @lt.failed(ptr %ctx)")
        self.barrier()
        bad, go = self.label("l"), self.label("l")
        self.emit(f"br i1 {failed}, label %{bad}, label %{go}")
        self.start(bad)
        self.push()
        self.on_first(lambda: self.emit(f"call void @lt.at(ptr %ctx, ptr {self.string(where)})"))
        self.pop()
        self.emit("br label %exit")
        self.start(go)
        self.begin_statement()

    def place_dynamic(self) -> None:
        """Memory of buffers and outputs whose last unknown extent was just read."""
        m = self.m
        names = [n for n, e in m.plan.dynamic.items() if n not in self.placed and n in m.table and free_vars(e) <= self.known]
        outs = [(j, b) for j, b in enumerate(m.program.outputs) if j in m.dynamic_outputs and b.name not in self.placed and free_vars(b.size()) <= self.known]
        if not names and not outs:
            return
        sizes = {n: self.value(m.plan.dynamic[n]) for n in names}
        shapes = {j: [self.value(e) for e in b.shape] for j, b in outs}
        bytes_ = {j: self.value(byte_size(b.dtype, b.size())) for j, b in outs}
        self.barrier()

        def make() -> None:
            for n in names:
                self.emit(f"call void @lt.grow(ptr %ctx, ptr {self.word(m.table[n])}, i64 {sizes[n]}, ptr {self.string(n)})")
            for j, b in outs:
                op = self.ins("getelementptr %ctx, ptr %ctx, i32 0, i32 18")
                t = self.ins(f"getelementptr i8, ptr {self.ins(f'load ptr, ptr {op}')}, i64 {TENSOR * j}")
                for k, x in enumerate(shapes[j]):
                    self.emit(f"store i64 {x}, ptr {self.ins(f'getelementptr i8, ptr {t}, i64 {24 + 8 * k}')}")
                self.emit(f"call void @lt.output(ptr %ctx, ptr {t}, ptr {self.string(m.public(b))}, ptr {self.word(m.table[b.name])}, i64 {bytes_[j]})")

        self.on_first(make)
        self.barrier()
        bad = self.ins("call i1 @lt.failed(ptr %ctx)")
        go = self.label("l")
        self.emit(f"br i1 {bad}, label %exit, label %{go}")
        self.start(go)
        self.placed |= {*names, *(b.name for _, b in outs)}

    def condition(self, s: If) -> None:
        self.read_by_all(s.cond)
        c = self.value(s.cond)
        then, other, done = self.label("l"), self.label("l"), self.label("l")
        self.emit(f"br i1 {c}, label %{then}, label %{other}")
        before = self.hazards.copy()
        ends = []
        for label, body in ((then, s.then), (other, s.orelse)):
            self.hazards = before.copy()
            self.start(label)
            self.inside(body)
            self.emit(f"br label %{done}")
            ends.append(self.hazards)
        self.start(done)
        self.hazards = ends[0]
        self.hazards.merge(ends[1])
        self.begin_statement()

    def inside(self, body: Stmt | None) -> None:
        known, placed, checked, variables = set(self.known), set(self.placed), set(self.checked), dict(self.vars)
        self.push()
        for c in stmts_of(body):
            self.stmt(c)
        self.pop()
        self.known, self.placed, self.checked = known, placed, checked
        self.vars = variables

    def while_loop(self, s: While) -> None:
        head, body, done = self.label("l"), self.label("l"), self.label("l")
        self.emit(f"br label %{head}")
        self.start(head)
        self.push()
        self.barrier()
        self.read_by_all(s.cond)
        c = self.value(s.cond)
        self.emit(f"br i1 {c}, label %{body}, label %{done}")
        after = self.hazards.copy()
        self.start(body)
        self.inside(s.body)
        self.emit(f"br label %{head}")
        self.pop()
        self.start(done)
        self.hazards = after
        self.begin_statement()


class _Module:
    """Builds the texts of a Program."""

    def __init__(self, program: Program, target: Target, symbols: Mapping[str, str]) -> None:
        self.program, self.target, self.symbols = program, target, symbols
        self.plan: Plan = plan_memory(program)
        self.weights = lay_out(program)
        self.strings: dict[str, str] = {}
        self.calls: list[str] = []
        self.loops: dict[str, tuple[For, Expr] | None] = {}
        self.work: dict[str, KernelWork] = {}
        self.shared_work: list[Expr] = []
        self.wrappers: dict[str, str] = {}  # by symbol
        self.declares: dict[str, str] = {}
        self.helpers: set[str] = set()
        dims = set(program.dims)
        self.dynamic_outputs = {j for j, b in enumerate(program.outputs) if not free_vars(b.size()) <= dims}
        # words: dims, addresses of inputs, outputs and temporaries in slots, then (address, capacity) of dynamic temporaries
        k = len(program.dims)
        self.table: dict[str, int] = {}
        for n in (*(b.name for b in program.inputs), *(b.name for b in program.outputs), *self.plan.slot_of):
            self.table[n] = k
            k += 1
        self.dyn_first = k
        for n in self.plan.dynamic:
            self.table[n] = k
            k += 2
        self.words = k
        self.used = set().union(*(free_vars(e) for s in walk_stmts(program.body) for e in exprs_of(s)), set())
        for e in (*self.plan.dynamic.values(), *(e for b in program.outputs for e in b.shape), *(o for _, o in program.views.values())):
            self.used |= free_vars(e)
        self.check_ranks()

    def check_ranks(self) -> None:
        for what, bs in (("input", self.program.inputs), ("output", self.program.outputs)):
            for b in bs:
                if b.rank > MAX_RANK:
                    raise CompilationError(f"{what} {b.name} has rank {b.rank}, the ABI of artifacts allows {MAX_RANK}")
                if b.dtype.name not in DTYPE_CODES:
                    raise CompilationError(f"{what} {b.name}: elements of type {b.dtype} cannot cross the ABI")

    def public(self, b: Buffer) -> str:
        return self.program.output_names.get(b.name, b.name)

    def where(self, call: int, f: Func, s: Call) -> str:
        """What a message says about the place of a call: its nodes, and which tensors the kernel's buffers are."""
        bufs = [(p.name, a if isinstance(a, Buffer) else a[0]) for p, a in zip(f.params, s.args, strict=True) if isinstance(p, Buffer)]
        return f"node {', '.join(self.program.nodes.get(call, ())) or '(none)'}; " + ", ".join(f"{n} is {self.public(b)}" for n, b in bufs)

    def string(self, text: str) -> str:
        name = self.strings.get(text)
        if name is None:
            name = self.strings[text] = f"@lt.s.{len(self.strings)}"
        return name

    def string_globals(self) -> list[str]:
        out = []
        for text, name in self.strings.items():
            raw = text.encode() + b"\0"
            out.append(f"{name} = private constant [{len(raw)} x i8] c\"{''.join(chr(c) if 32 <= c < 127 and c not in (34, 92) else f'{chr(92)}{c:02X}' for c in raw)}\"")
        return out

    def build(self) -> MainText:
        p = self.program
        called = {s.callee for s in walk_stmts(p.body) if isinstance(s, Call)}
        for name in sorted(called & set(p.kernels)):
            f = p.kernels[name]
            if name not in self.symbols:
                raise CompilationError(f"kernel {name} has no symbol")
            symbol = self.symbols[name]
            params = ["ptr" if isinstance(q, Buffer) else reg_type(q.dtype) for q in f.params]
            result, ctx = ("i32", ["ptr"]) if is_checked(f) else ("void", [])
            self.declares[symbol] = f"declare hidden {result} @{quote(symbol)}({', '.join([*params, 'i64', 'i64', *ctx])})"
            self.loops[name] = found = parallel_loop(f)
            self.work[name] = KernelWork.of(f, found[0] if found else None)
        main, bind, place = _Main(self), _Bind(self, "lt_bind"), _Bind(self, "lt_place")
        texts = [self.finish(main, main.text()), self.finish(bind, bind.print_bind()), self.finish(place, place.print_place())]
        counts = [
            f"@lt.weights_bytes = hidden constant i64 {self.weights.size}",
            f"@lt.ctx_bytes = hidden constant i64 {WORDS + 8 * max(self.words, 1)}",
            f"@lt.parallel = hidden constant i32 {int(bool(self.wrappers))}",
            f"@lt.dyn_first = hidden constant i64 {self.dyn_first}",
            f"@lt.dyn_count = hidden constant i64 {len(self.plan.dynamic)}",
            "@lt.zero = internal constant [512 x i8] zeroinitializer, align 64",
        ]
        runtime = runtime_text(self.target)
        cpu = f'"target-cpu"="{self.target.cpu}" "target-features"="{self.target.features}"'
        text = "\n".join([
            f'target triple = "{self.target.triple}"', *_interface(runtime), *counts, *self.string_globals(),
            *sorted(self.declares.values()), *(HELPERS[h] for h in sorted(self.helpers)),
            *self.wrappers.values(), *texts, f"attributes #0 = {{ nounwind {cpu} }}", "",
        ])  # fmt: skip
        w = self.weights
        return MainText(text, runtime, list(w.offsets.items()), w.arrays, w.size, self.calls, bool(self.wrappers))

    def share(self, callee: str) -> None:
        """The function by which threads share a kernel, once."""
        symbol = self.symbols[callee]
        if symbol not in self.wrappers:
            w = SharePrinter(self.program.kernels[callee], self.target)
            self.wrappers[symbol] = self.finish(w, w.share(symbol))

    def finish(self, p: KernelPrinter, text: str) -> str:
        """Collects what a printed function needs from the module."""
        self.declares |= {n: f"declare {sig.replace('@', '@' + n)}" for n, sig in p.declarations.items()}
        self.helpers |= p.helpers
        return text


class _Bind(_Printer):
    def tensor(self, base: str, j: int) -> str:
        return self.ins(f"getelementptr i8, ptr {base}, i64 {TENSOR * j}") if j else base

    def extent(self, t: str, k: int) -> str:
        return self.ins(f"load i64, ptr {self.ins(f'getelementptr i8, ptr {t}, i64 {24 + 8 * k}')}")

    def print_bind(self) -> str:
        p = self.m.program
        self.emit(f"call void @lt.check_count(ptr %ctx, i32 %n, i32 {len(p.inputs)}, i32 0)")
        self.emit(f"call void @lt.check_count(ptr %ctx, i32 %m, i32 {len(p.outputs)}, i32 1)")
        ok, bad = self.label("l"), "fail"
        self.emit(f"br i1 {self.ins('call i1 @lt.failed(ptr %ctx)')}, label %{bad}, label %{ok}")
        self.start(ok)
        ts = [self.tensor("%in", j) for j in range(len(p.inputs))]
        for b, t in zip(p.inputs, ts):
            self.emit(f"call void @lt.check_tensor(ptr %ctx, ptr {t}, ptr {self.string(b.name)}, i32 {DTYPE_CODES[b.dtype.name]}, i32 {b.rank})")
        for k, (v, (i, axis)) in enumerate(p.dims.items()):
            x = self.extent(ts[i], axis)
            self.bind(v, x)
            self.emit(f"store i64 {x}, ptr {self.word(k)}")
            lo, hi = v.attr[1], v.attr[2]
            lo = 0 if lo is None else lo
            hi = hi if isinstance(hi, int) else (1 << 62)
            self.emit(f"call void @lt.check_range(ptr %ctx, ptr {self.string(p.inputs[i].name)}, i32 {axis}, i64 {x}, i64 {lo}, i64 {hi})")
        for j, (b, t) in enumerate(zip(p.inputs, ts)):
            for axis, e in enumerate(b.shape):
                if p.dims.get(e) == (j, axis) or not free_vars(e) <= set(p.dims):
                    continue
                self.emit(f"call void @lt.check_dim(ptr %ctx, ptr {self.string(b.name)}, i32 {axis}, i64 {self.extent(t, axis)}, i64 {self.value(e)})")
        for j, b in enumerate(p.outputs):
            t = self.tensor("%out", j)
            self.emit(f"store i32 {DTYPE_CODES[b.dtype.name]}, ptr {self.ins(f'getelementptr i8, ptr {t}, i64 16')}")
            self.emit(f"store i32 {b.rank}, ptr {self.ins(f'getelementptr i8, ptr {t}, i64 20')}")
            for axis, e in enumerate(b.shape):
                known = free_vars(e) <= set(p.dims)
                x = self.value(e) if known else "-1"
                low = bounds(e)[0]
                if known and (low is None or low < 0):
                    self.emit(f"call void @lt.check_extent(ptr %ctx, ptr {self.string(self.m.public(b))}, i32 {axis}, i64 {x})")
                self.emit(f"store i64 {x}, ptr {self.ins(f'getelementptr i8, ptr {t}, i64 {24 + 8 * axis}')}")
        self.emit(f"br label %{bad}")
        self.start(bad)
        s = self.ins("getelementptr %ctx, ptr %ctx, i32 0, i32 26")
        self.emit(f"ret i32 {self.ins(f'load i32, ptr {s}')}")
        return definition(self, "hidden i32 @lt_bind(ptr %ctx, ptr %in, i32 %n, ptr %out, i32 %m)")

    def print_place(self) -> str:
        p, m = self.m.program, self.m
        offsets = m.plan.offsets()
        useful = useful_threads(m.shared_work, set(p.dims))
        self.load_dims(set().union(*(free_vars(e) for b in (*p.inputs, *p.outputs) for e in b.shape), *(free_vars(e) for e in offsets), free_vars(useful)))
        for j, b in enumerate(p.inputs):
            known = free_vars(b.size()) <= set(p.dims)
            size = self.value(byte_size(b.dtype, b.size())) if known else "0"
            self.emit(f"call void @lt.input(ptr %ctx, ptr {self.tensor('%in', j)}, ptr {self.string(b.name)}, ptr {self.word(m.table[b.name])}, i64 {size})")
        for j, b in enumerate(p.outputs):
            if j not in m.dynamic_outputs:
                size = self.value(byte_size(b.dtype, b.size()))
                self.emit(f"call void @lt.output(ptr %ctx, ptr {self.tensor('%out', j)}, ptr {self.string(m.public(b))}, ptr {self.word(m.table[b.name])}, i64 {size})")
        if m.plan.slots:
            base = self.ins(f"call ptr @lt.arena(ptr %ctx, i64 {self.value(offsets[-1])})")
            starts = [self.ins(f"getelementptr i8, ptr {base}, i64 {self.value(o)}") for o in offsets[:-1]]
            for n, slot in m.plan.slot_of.items():
                self.emit(f"store ptr {starts[slot]}, ptr {self.word(m.table[n])}")
        self.emit(f"store i64 {self.value(useful)}, ptr {self.ins('getelementptr %ctx, ptr %ctx, i32 0, i32 29')}")
        s = self.ins("getelementptr %ctx, ptr %ctx, i32 0, i32 26")
        self.emit(f"ret i32 {self.ins(f'load i32, ptr {s}')}")
        return definition(self, "hidden i32 @lt_place(ptr %ctx, ptr %in, ptr %out)")


def runtime_text(target: Target) -> str:
    """The runtime for a target, a module of its own."""
    cpu = target.triple.split("-")[0]
    if cpu not in _SYSTEM:
        raise CompilationError(f"no runtime for {target.triple}", hint=f"known processors: {', '.join(_SYSTEM)}")
    text = importlib.resources.files("luthier.codegen.runtime").joinpath("runtime.ll").read_text(encoding="utf-8")
    futex, pause, types, args = _SYSTEM[cpu]
    text = text.replace("@SYS_FUTEX@", futex).replace("@PAUSE@", f"call void @{pause}({args})")
    return f'target triple = "{target.triple}"\n{text}declare void @{pause}({types})\n'


def _interface(runtime: str) -> list[str]:
    """What a program's module must repeat of the runtime: types and declarations of the functions named ``lt.*``."""
    types = re.findall(r"^%\w+ = type \{.*?\}[^\n]*$", runtime, re.M | re.S)
    functions = re.findall(r"^define hidden (\S+) (@lt\.[\w.]+\(.*?\)) \{$", runtime, re.M)
    return [*types, *(f"declare hidden {ret} {sig}" for ret, sig in functions)]


def print_main(program: Program, target: Target, symbols: Mapping[str, str]) -> MainText:
    """The module that runs ``program``, whose kernels are linked in under ``symbols`` {kernel: symbol}.

    Raises CompilationError or TargetError for what the backend cannot print."""
    return _Module(program, target, symbols).build()
