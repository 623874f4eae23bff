"""A Program's own part of a compiled module, as LLVM text: ``lt_bind``, ``lt_place`` and ``lt_main`` beside the runtime.

``lt_bind`` checks the inputs, reads the dims and writes output shapes; ``lt_place`` finds memory; ``lt_main`` runs on every
thread of a call. All addresses lie in a table of words in the context, so that ``lt_main`` holds nothing in registers between
two calls. A barrier stands only where a thread could see or destroy what another one still works on: kernels with a parallel loop
are shared by chunks, everything else runs on thread 0, and reads and writes are followed per piece of memory.
"""

from __future__ import annotations

import importlib.resources
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.codegen.llvm.intrin import HELPERS
from luthier.codegen.llvm.printer import KernelPrinter, quote
from luthier.codegen.llvm.share import SharePrinter, definition
from luthier.codegen.llvm.types import reg_type
from luthier.codegen.program.sharing import useful_threads
from luthier.codegen.program.steps import (
    DEFAULT,
    DTYPE_CODES,
    Bind,
    Branch,
    Check,
    Layout,
    Meet,
    Place,
    Put,
    Repeat,
    Run,
    Step,
    Wait,
    steps,
)
from luthier.codegen.targets.target import Target
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, bounds, free_vars
from luthier.ir.loop import (
    EMPTY,
    Buffer,
    Call,
    Func,
    walk_stmts,
)
from luthier.ir.program import Program
from luthier.passes.loop.check_bounds import is_checked
from luthier.passes.program.plan_memory import byte_size

ABI_VERSION = 1
WORDS = 1024  # byte of the context where the program's words start
TENSOR = 88  # bytes of an lt_tensor
MAX_BYTES = 1 << 46
_REAL = {"add": "fadd", "sub": "fsub", "mul": "fmul", "floordiv": "fdiv"}

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


# ---------------------------------------------------------------- main


def _double(v: float) -> str:
    """A constant as LLVM reads it exactly."""
    return f"0x{struct.pack('>d', float(v)).hex().upper()}"


class _Printer(KernelPrinter):
    """Shared by the three functions: dims and addresses come from the context's table."""

    def __init__(self, m: _Module, name: str) -> None:
        super().__init__(Func(name, (), EMPTY), m.target, name)
        self.m = m

    def word(self, k: int) -> str:
        return self.ins(f"getelementptr i8, ptr %ctx, i64 {WORDS + 8 * k}")

    def size(self, e: Expr) -> str:
        """A number of bytes; what exceeds 64 TiB, or 64 bits on the way there, becomes a number that no allocation gives."""
        v, high = self.value(e), bounds(e)[1]
        if high is not None and high < MAX_BYTES:
            return v
        ok = self.ins(f"fcmp ole double {self.real(e)}, {_double(MAX_BYTES)}")
        return self.ins(f"select i1 {ok}, i64 {v}, i64 {1 << 62}")

    def real(self, e: Expr) -> str:
        """An index expression in double precision, where nothing wraps around."""
        if e.op == "const":
            return _double(e.attr)
        if e.op in _REAL:
            return self.ins(f"{_REAL[e.op]} double {self.real(e.args[0])}, {self.real(e.args[1])}")
        if e.op in ("min", "max"):
            a, b = self.real(e.args[0]), self.real(e.args[1])
            c = self.ins(f"fcmp {'olt' if e.op == 'min' else 'ogt'} double {a}, {b}")
            return self.ins(f"select i1 {c}, double {a}, double {b}")
        return self.ins(f"sitofp i64 {self.value(e)} to double")

    def pointer(self, b: Buffer) -> str:
        """Where buffer ``b`` starts."""
        root, parts = self.m.layout.origin(b.name)
        at = self.m.layout.weights.offsets.get(root)
        if at is not None:
            w = self.ins("getelementptr %ctx, ptr %ctx, i32 0, i32 14")
            base = self.ins(f"load ptr, ptr {w}")
            p = self.ins(f"getelementptr i8, ptr {base}, i64 {at}") if at else base
        else:
            p = self.ins(f"load ptr, ptr {self.word(self.m.layout.table[root])}")
        for e in parts:
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
    """``lt_main``: the steps of the program, on every thread."""

    def __init__(self, m: _Module) -> None:
        super().__init__(m, "lt_main")

    def text(self) -> str:
        self.lines += ["%ctx = load ptr, ptr %st", "%tp = getelementptr %state, ptr %st, i32 0, i32 1", "%tid = load i64, ptr %tp", "%first = icmp eq i64 %tid, 0"]
        self.load_dims(self.m.layout.used)
        self.steps(self.m.steps.body)
        self.emit("br label %exit")
        self.start("exit")
        self.emit("call void @lt.wait_all(ptr %st)")
        self.emit("ret void")
        return definition(self, "hidden void @lt_main(ptr %st)")

    def steps(self, body: Iterable[Step]) -> None:
        for s in body:
            self.begin_statement()
            _PRINT[type(s)](self, s)

    def inside(self, body: Iterable[Step]) -> None:
        variables = dict(self.vars)
        self.push()
        self.steps(body)
        self.pop()
        self.vars = variables

    def wait(self, s: Wait | None = None) -> None:
        self.emit("call void @lt.wait_all(ptr %st)")
        self.begin_statement()

    def meet(self, s: Meet | None = None) -> None:
        self.emit("call void @lt.barrier(ptr %st)")
        self.begin_statement()

    def define(self, s: Bind) -> None:
        self.bind(s.var, self.value(s.value))

    def on_first(self, emit: Callable[[], None]) -> None:
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

    def put(self, s: Put) -> None:
        self.on_first(lambda: self.store(s.store))

    def check(self, s: Check) -> None:
        got, what = self.value(s.got), self.string(s.what)
        low, high = (None if e is None else self.value(e) for e in (s.low, s.high))
        if s.kind == "equal":
            self.leave_unless(self.ins(f"icmp eq i64 {got}, {low}"), f"@lt.check_equal(ptr %ctx, ptr {what}, i64 {got}, i64 {low})")
        elif s.kind == "extent":
            self.leave_unless(self.ins(f"icmp sge i64 {got}, 0"), f"@lt.check_extent(ptr %ctx, ptr {what}, i32 {s.axis}, i64 {got})")
        else:
            low, high = low or str(-(1 << 62)), high or str(1 << 62)
            ok = self.ins(f"and i1 {self.ins(f'icmp sge i64 {got}, {low}')}, {self.ins(f'icmp sle i64 {got}, {high}')}")
            self.leave_unless(ok, f"@lt.check_value(ptr %ctx, ptr {what}, i64 {got}, i64 {low}, i64 {high})")

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

    def run(self, s: Run) -> None:
        f = self.m.program.kernels[s.call.callee]
        args = []
        for p, a in zip(f.params, s.call.args):
            if isinstance(p, Buffer):
                b, o = (a, None) if isinstance(a, Buffer) else a
                q = self.pointer(b)
                if o is not None:
                    q = self.ins(f"getelementptr i8, ptr {q}, i64 {self.value(byte_size(b.dtype, o))}")
                args.append(f"ptr {q}")
            else:
                args.append(f"{reg_type(p.dtype)} {self.value(a)}")
        symbol, checked = self.m.symbols[s.call.callee], is_checked(f)
        total = "0" if s.extent is None else self.value(s.extent)
        if s.shared:
            assert s.grain is not None
            self.m.share(s.call.callee)
            self.emit(f"call void @{quote(symbol + '.share')}({', '.join(['ptr %st', *args, f'i64 {total}', f'i64 {self.value(s.grain)}'])})")
        else:

            def alone() -> None:
                done = ""
                if s.extent is not None and not (s.extent.op == "const" and s.extent.attr > 0):
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

            self.on_first(alone)
        self.emit(f"call void @lt.mark(ptr %st, i64 {s.number})")
        if checked:
            self.leave_on_fault(self.m.where(s.number, f, s.call))

    def leave_on_fault(self, where: str) -> None:
        """All threads leave when a kernel reported an index out of bounds; between the two barriers nobody can report another."""
        self.wait()
        self.meet()
        failed = self.ins("call i1 @lt.failed(ptr %ctx)")
        self.meet()
        bad, go = self.label("l"), self.label("l")
        self.emit(f"br i1 {failed}, label %{bad}, label %{go}")
        self.start(bad)
        self.push()
        self.on_first(lambda: self.emit(f"call void @lt.at(ptr %ctx, ptr {self.string(where)})"))
        self.pop()
        self.emit("br label %exit")
        self.start(go)
        self.begin_statement()

    def place(self, s: Place) -> None:
        m, table = self.m, self.m.layout.table
        sizes = {n: self.size(e) for n, e in s.buffers}
        shapes = {j: [self.value(e) for e in b.shape] for j, b in s.outputs}
        bytes_ = {j: self.size(byte_size(b.dtype, b.size())) for j, b in s.outputs}

        def make() -> None:
            for n, size in sizes.items():
                self.emit(f"call void @lt.grow(ptr %ctx, ptr {self.word(table[n])}, i64 {size}, ptr {self.string(n)})")
            for j, b in s.outputs:
                op = self.ins("getelementptr %ctx, ptr %ctx, i32 0, i32 18")
                t = self.ins(f"getelementptr i8, ptr {self.ins(f'load ptr, ptr {op}')}, i64 {TENSOR * j}")
                for k, x in enumerate(shapes[j]):
                    self.emit(f"store i64 {x}, ptr {self.ins(f'getelementptr i8, ptr {t}, i64 {24 + 8 * k}')}")
                self.emit(f"call void @lt.output(ptr %ctx, ptr {t}, ptr {self.string(m.layout.public(b))}, ptr {self.word(table[b.name])}, i64 {bytes_[j]})")

        self.on_first(make)
        self.meet()
        bad = self.ins("call i1 @lt.failed(ptr %ctx)")
        go = self.label("l")
        self.emit(f"br i1 {bad}, label %exit, label %{go}")
        self.start(go)

    def branch(self, s: Branch) -> None:
        c = self.value(s.cond)
        then, other, done = self.label("l"), self.label("l"), self.label("l")
        self.emit(f"br i1 {c}, label %{then}, label %{other}")
        for label, body in ((then, s.then), (other, s.orelse)):
            self.start(label)
            self.inside(body)
            self.emit(f"br label %{done}")
        self.start(done)
        self.begin_statement()

    def repeat(self, s: Repeat) -> None:
        head, body, done = self.label("l"), self.label("l"), self.label("l")
        self.emit(f"br label %{head}")
        self.start(head)
        self.push()
        self.meet()
        c = self.value(s.cond)
        self.emit(f"br i1 {c}, label %{body}, label %{done}")
        self.start(body)
        self.inside(s.body)
        self.emit(f"br label %{head}")
        self.pop()
        self.start(done)
        self.begin_statement()


_PRINT: dict[type, Callable[[Any, Any], None]] = {
    Wait: _Main.wait, Meet: _Main.meet, Bind: _Main.define, Put: _Main.put, Check: _Main.check, Place: _Main.place, Run: _Main.run,
    Branch: _Main.branch, Repeat: _Main.repeat,
}  # fmt: skip


class _Module:
    """Builds the texts of a Program."""

    def __init__(self, program: Program, target: Target, symbols: Mapping[str, str]) -> None:
        self.program, self.target, self.symbols = program, target, symbols
        self.layout = Layout(program)
        self.steps = steps(self.layout)
        self.strings: dict[str, str] = {}
        self.wrappers: dict[str, str] = {}  # by symbol
        self.declares: dict[str, str] = {}
        self.helpers: set[str] = set()

    def where(self, call: int, f: Func, s: Call) -> str:
        """What a message says about the place of a call: its nodes, and which tensors the kernel's buffers are."""
        bufs = [(p.name, a if isinstance(a, Buffer) else a[0]) for p, a in zip(f.params, s.args, strict=True) if isinstance(p, Buffer)]
        return f"node {', '.join(self.program.nodes.get(call, ())) or '(none)'}; " + ", ".join(f"{n} is {self.layout.public(b)}" for n, b in bufs)

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
        main, bind, place = _Main(self), _Bind(self, "lt_bind"), _Bind(self, "lt_place")
        texts = [self.finish(main, main.text()), self.finish(bind, bind.print_bind()), self.finish(place, place.print_place())]
        counts = [
            f"@lt.weights_bytes = hidden constant i64 {self.layout.weights.size}",
            f"@lt.ctx_bytes = hidden constant i64 {WORDS + 8 * max(self.layout.words, 1)}",
            f"@lt.parallel = hidden constant i32 {int(bool(self.wrappers))}",
            f"@lt.dyn_first = hidden constant i64 {self.layout.dyn_first}",
            f"@lt.dyn_count = hidden constant i64 {len(self.layout.plan.dynamic)}",
            "@lt.zero = internal constant [512 x i8] zeroinitializer, align 64",
        ]
        runtime = runtime_text(self.target)
        cpu = f'"target-cpu"="{self.target.cpu}" "target-features"="{self.target.features}"'
        text = "\n".join([
            f'target triple = "{self.target.triple}"', *_interface(runtime), *counts, *self.string_globals(),
            *sorted(self.declares.values()), *(HELPERS[h] for h in sorted(self.helpers)),
            *self.wrappers.values(), *texts, f"attributes #0 = {{ nounwind {cpu} }}", "",
        ])  # fmt: skip
        w = self.layout.weights
        return MainText(text, runtime, list(w.offsets.items()), w.arrays, w.size, list(self.steps.calls), bool(self.wrappers))

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

    def input(self, j: int) -> str:
        """The tensor of input ``j``: the caller's, or the default where it is left out (beyond the count, or all zeros)."""
        b = self.m.program.inputs[j]
        if b.name not in self.m.program.defaults:
            return self.tensor("%in", j)
        a = self.m.program.defaults[b.name]
        own = self.ins(f"alloca [{TENSOR} x i8], align 8")
        if a is None:
            data = self.ins(f"call ptr @lt.random(ptr %ctx, ptr {self.word(self.m.layout.random_word)})")
        else:
            w = self.ins("getelementptr %ctx, ptr %ctx, i32 0, i32 14")
            data = self.ins(f"getelementptr i8, ptr {self.ins(f'load ptr, ptr {w}')}, i64 {self.m.layout.weights.offsets[DEFAULT + b.name]}")
        for k, n in enumerate((2,) if a is None else a.shape):
            self.emit(f"store i64 {n}, ptr {self.ins(f'getelementptr i8, ptr {own}, i64 {24 + 8 * k}')}")
        t = self.ins(f"call ptr @lt.optional(ptr %in, i32 %n, i32 {j}, ptr {own}, ptr {data}, i32 {DTYPE_CODES[b.dtype.name]}, i32 {b.rank})")
        self.emit(f"store ptr {self.ins(f'load ptr, ptr {t}')}, ptr {self.word(self.m.layout.table[b.name])}")
        return t

    def print_bind(self) -> str:
        p = self.m.program
        count, least = "%n", len(p.inputs) - len(p.defaults)
        if p.defaults:
            few = self.ins(f"icmp ult i32 {self.ins(f'sub i32 %n, {least}')}, {len(p.defaults)}")
            count = self.ins(f"select i1 {few}, i32 {len(p.inputs)}, i32 %n")
        self.emit(f"call void @lt.check_count(ptr %ctx, i32 {count}, i32 {len(p.inputs)}, i32 0)")
        self.emit(f"call void @lt.check_count(ptr %ctx, i32 %m, i32 {len(p.outputs)}, i32 1)")
        ok, bad = self.label("l"), "fail"
        self.emit(f"br i1 {self.ins('call i1 @lt.failed(ptr %ctx)')}, label %{bad}, label %{ok}")
        self.start(ok)
        ts = [self.input(j) for j in range(len(p.inputs))]
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
                    self.emit(f"call void @lt.check_extent(ptr %ctx, ptr {self.string(self.m.layout.public(b))}, i32 {axis}, i64 {x})")
                self.emit(f"store i64 {x}, ptr {self.ins(f'getelementptr i8, ptr {t}, i64 {24 + 8 * axis}')}")
        self.emit(f"br label %{bad}")
        self.start(bad)
        s = self.ins("getelementptr %ctx, ptr %ctx, i32 0, i32 26")
        self.emit(f"ret i32 {self.ins(f'load i32, ptr {s}')}")
        return definition(self, "hidden i32 @lt_bind(ptr %ctx, ptr %in, i32 %n, ptr %out, i32 %m)")

    def print_place(self) -> str:
        p, m = self.m.program, self.m
        offsets = m.layout.plan.offsets()
        useful = useful_threads(list(m.steps.shared_work), set(p.dims))
        self.load_dims(set().union(*(free_vars(e) for b in (*p.inputs, *p.outputs) for e in b.shape), *(free_vars(e) for e in offsets), free_vars(useful)))
        for j, b in enumerate(p.inputs):
            known = free_vars(b.size()) <= set(p.dims)
            size = self.value(byte_size(b.dtype, b.size())) if known else "0"
            t = self.word(m.layout.table[b.name]) if b.name in p.defaults else self.tensor("%in", j)  # lt_bind has placed what is optional
            self.emit(f"call void @lt.input(ptr %ctx, ptr {t}, ptr {self.string(b.name)}, ptr {self.word(m.layout.table[b.name])}, i64 {size})")
        for j, b in enumerate(p.outputs):
            if j not in m.layout.dynamic_outputs:
                size = self.size(byte_size(b.dtype, b.size()))
                self.emit(f"call void @lt.output(ptr %ctx, ptr {self.tensor('%out', j)}, ptr {self.string(m.layout.public(b))}, ptr {self.word(m.layout.table[b.name])}, i64 {size})")
        if m.layout.plan.slots:
            base = self.ins(f"call ptr @lt.arena(ptr %ctx, i64 {self.size(offsets[-1])})")
            starts = [self.ins(f"getelementptr i8, ptr {base}, i64 {self.value(o)}") for o in offsets[:-1]]
            for n, slot in m.layout.plan.slot_of.items():
                self.emit(f"store ptr {starts[slot]}, ptr {self.word(m.layout.table[n])}")
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
