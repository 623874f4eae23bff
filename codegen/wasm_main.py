"""A whole Program as one WebAssembly module: its kernels, the runtime, and ``lt_bind``, ``lt_run`` and ``main`` around them.

The interface is described in ``docs/web.md``. ``main`` runs on every thread of a call and prints the steps of
:mod:`luthier.codegen.steps`; without threads nothing of waiting is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.codegen.sharing import useful_threads
from luthier.codegen.steps import Bind, Branch, Check, Layout, Meet, Place, Put, Repeat, Run, Step, Steps, Wait, steps
from luthier.codegen.wasm import KernelPrinter, legalize_wasm
from luthier.codegen.wasm_encoder import Function, Module
from luthier.codegen.wasm_layout import EXTENTS, WORDS, Memory, describe, stack_bytes
from luthier.codegen.wasm_scalar import valtype
from luthier.codegen.wasm_text import GLOBALS, assemble, runtime_function, source
from luthier.ir.dtypes import i64
from luthier.ir.errors import CompilationError, LuthierError
from luthier.ir.expr import Expr, binary, bounds, cast, const, free_vars, maximum, minimum
from luthier.ir.loop import EMPTY, Buffer, For, Func, Let, Store, walk_stmts
from luthier.ir.program import Program
from luthier.passes.plan_memory import ALIGN, byte_size

_WIDE = ("add", "sub", "mul", "min", "max", "floordiv", "mod")
_HUGE = (1 << 31) - 1
KINDS = {"equal": 4, "extent": 5, "value": 6}  # of errors, see docs/web.md


def wide(e: Expr) -> Expr:
    """An index expression in 64 bits: sizes in bytes and amounts of work pass 2 ** 31."""
    if e.dtype == i64:
        return e
    if e.op == "const":
        return const(int(e.attr), i64)
    if e.op in _WIDE:
        return binary(e.op, wide(e.args[0]), wide(e.args[1]))
    return cast(e, i64)


class _Host(KernelPrinter):
    """What ``main`` and ``lt_bind`` share: dims are read from the table, addresses from words of memory."""

    def __init__(self, m: ProgramPrinter, name: str, params: Sequence[str] = ()) -> None:
        super().__init__(Func(name, (), EMPTY), {}, {}, m.relaxed)
        self.m = m
        self.params = list(params)
        self.nparams = len(params)

    def function(self, results: Sequence[str] = ()) -> Function:
        return Function(self.f.name, self.params, results, self.types, bytes(self.c.b))

    def call_to(self, name: str) -> None:
        self.c.op("call", self.m.index[name])

    def load_dims(self, used: set[Expr]) -> None:
        for v, (i, axis) in self.m.program.dims.items():
            if v in used:
                n = self.vars[v] = self.local("i32")
                assert isinstance(n, int)
                self.extent(i, axis)
                self.c.set(n)

    def extent(self, i: int, axis: int) -> None:
        """An extent of input ``i`` as the caller gave it."""
        self.c.const("i32", 0)
        self.c.mem("i32.load", self.m.memory.inputs[self.m.program.inputs[i].name] + EXTENTS + 4 * axis, 2)

    def pointer(self, b: Buffer) -> None:
        root, parts = self.m.layout.origin(b.name)
        c = self.c
        at = self.m.layout.weights.offsets.get(root)
        if at is not None:
            c.const("i32", self.m.memory.weights + at)
        else:
            c.const("i32", 0)
            c.mem("i32.load", self.m.memory.pointer_word(root), 2)
        for e in parts:
            self.emit(byte_size(b.dtype, e))
            c.op("i32.add")

    def set_word(self, at: int, value: Callable[[], None]) -> None:
        self.c.const("i32", 0)
        value()
        self.c.mem("i32.store", at, 2)

    def low_word(self, at: int, n: int) -> None:
        """The lower half of an i64 local."""
        self.c.const("i32", 0)
        self.c.op("local.get", n)
        self.c.op("i32.wrap_i64")
        self.c.mem("i32.store", at, 2)

    def status(self) -> None:
        self.c.const("i32", 0)
        self.c.mem("i32.load", WORDS["ERROR"], 2)


class _Main(_Host):
    """``main``: the whole inference on one thread of the run."""

    def print_main(self, s: Steps) -> Function:
        self.load_dims(self.m.layout.used)
        self.steps(s.body)
        if self.m.threads:
            self.call_to("wait_all")
        return self.function()

    def steps(self, body: Sequence[Step]) -> None:
        for s in body:
            self.enter()
            _PRINT[type(s)](self, s)
            self.leave_scope()

    def inside(self, body: Sequence[Step]) -> None:
        before = dict(self.vars)
        self.steps(body)
        self.vars = before

    def wait(self, s: Wait) -> None:
        if self.m.threads:
            self.call_to("wait_all")

    def meet(self, s: Meet | None = None) -> None:
        if self.m.threads:
            self.call_to("meet")

    def leave(self) -> None:
        if self.m.threads:
            self.call_to("wait_all")
        self.c.op("return")

    def on_first(self, emit: Callable[[], None]) -> None:
        """What only thread 0 does: one chunk for those who wait."""
        if not self.m.threads:
            emit()
            return
        c = self.c
        c.const("i32", 1)
        self.call_to("count")
        c.op("global.get", GLOBALS.index("tid"))
        c.op("i32.eqz")
        c.start("if")
        self.enter()
        emit()
        self.leave_scope()
        c.const("i32", 1)
        self.call_to("finish")
        c.op("end")

    def define(self, s: Bind) -> None:
        self.let(Let(s.var, s.value))

    def put(self, s: Put) -> None:
        self.on_first(lambda: self.store(Store(s.store.buf, s.store.idx or (const(0),), s.store.value, s.store.mask)))

    def check(self, s: Check) -> None:
        c = self.c
        n = {k: self.local("i64") for k in ("got", "low", "high")}
        for k, e in (("got", s.got), ("low", s.low), ("high", s.high)):
            self.emit(const(0, i64) if e is None else wide(e))
            c.set(n[k])
        bad: list[tuple[str, str]] = [("low", "lt_s")] * (s.low is not None) + [("high", "gt_s")] * (s.high is not None)
        for k, op in bad:
            c.op("local.get", n["got"])
            c.op("local.get", n[k])
            c.op(f"i64.{op}")
        if len(bad) == 2:
            c.op("i32.or")
        c.start("if")

        def tell() -> None:
            for v in (1, KINDS[s.kind], self.m.name(s.what), s.axis):
                c.const("i32", v)
            for k in n.values():
                c.op("local.get", k)
            self.call_to("fail")

        self.on_first(tell)
        self.leave()
        c.op("end")
        for x in n.values():
            self.release("i64", x)

    def place(self, s: Place) -> None:  # type: ignore[override]
        c, m = self.c, self.m

        def make() -> None:
            for name, size in s.buffers:
                at = m.memory.pointer_word(name)
                c.const("i32", at)
                c.const("i32", at + 4)
                self.emit(wide(size))
                c.const("i32", m.name(name))
                self.call_to("grow")
            for _, b in s.outputs:
                at = m.memory.outputs[b.name]
                for k, e in enumerate(b.shape):
                    self.set_word(at + EXTENTS + 4 * k, lambda e=e: self.emit(e))  # type: ignore[misc]
                size = wide(byte_size(b.dtype, b.size()))
                c.const("i32", at)
                c.const("i32", at + 8)
                self.emit(size)
                c.const("i32", m.name(m.layout.public(b)))
                self.call_to("grow")
                c.const("i32", 0)
                self.emit(size)
                c.op("i32.wrap_i64")
                c.mem("i32.store", at + 4, 2)

        self.on_first(make)
        self.meet()
        self.status()
        c.start("if")
        self.leave()
        c.op("end")

    def run(self, s: Run) -> None:
        c, m = self.c, self.m
        f = m.program.kernels[s.call.callee]
        values: list[Callable[[], None]] = []
        for p, a in zip(m.kernels[s.call.callee].params, s.call.args):
            if isinstance(p, Buffer):
                values.append(lambda a=a: self.address_of(a))  # type: ignore[misc]
            else:
                e = a if valtype(a.dtype) == valtype(p.dtype) else cast(a, p.dtype)
                values.append(lambda e=e: self.emit(e))  # type: ignore[misc]
        target = m.kernel_index[s.call.callee]
        assert len(values) == len(f.params)

        def whole() -> None:
            for v in values:
                v()
            c.const("i32", 0)
            if s.extent is None:
                c.const("i32", 1)
            else:
                self.emit(s.extent)
            c.op("call", target)

        def guarded() -> None:
            if s.extent is None or (s.extent.op == "const" and s.extent.attr > 0):
                whole()
                return
            self.emit(s.extent)
            c.const("i32", 0)
            c.op("i32.gt_s")
            c.start("if")
            self.enter()
            whole()
            self.leave_scope()
            c.op("end")

        if s.shared and m.threads:
            self.share(s, values, target)
        else:
            self.on_first(guarded)
        if m.hooks:
            if m.threads:
                self.call_to("wait_all")
            c.const("i32", s.number)
            c.op("call", 0)

    def address_of(self, a: Any) -> None:
        b, o = (a, None) if isinstance(a, Buffer) else a
        self.pointer(b)
        if o is not None:
            self.emit(byte_size(b.dtype, o))
            self.c.op("i32.add")

    def share(self, s: Run, values: list[Callable[[], None]], target: int) -> None:
        """Chunks until none is left."""
        c = self.c
        assert s.extent is not None and s.grain is not None
        total, chunk, at, mine = (self.local("i32") for _ in range(4))
        self.emit(s.extent)
        c.op("local.tee", total)
        c.const("i32", 0)
        c.op("i32.gt_s")
        c.start("if")
        args: list[int] = []
        for v, t in zip(values, (*self.m.signature(s.call.callee),)):
            v()
            n = self.local(t)
            c.set(n)
            args.append(n)

        def call(lo: Callable[[], None], hi: Callable[[], None]) -> None:
            for n in args:
                c.op("local.get", n)
            lo()
            hi()
            c.op("call", target)

        c.op("global.get", GLOBALS.index("threads"))
        c.const("i32", 1)
        c.op("i32.eq")
        c.start("if")
        call(lambda: c.const("i32", 0), lambda: c.op("local.get", total))
        c.op("else")
        c.op("local.get", total)
        self.emit(minimum(maximum(wide(s.grain), const(1, i64)), const(_HUGE, i64)))
        c.op("i32.wrap_i64")
        self.call_to("begin_loop")
        c.set(chunk)
        c.const("i32", 0)
        c.set(mine)
        c.start("block")
        c.start("loop")
        c.op("local.get", total)
        c.op("local.get", chunk)
        self.call_to("claim")
        c.op("local.tee", at)
        c.const("i32", 0)
        c.op("i32.lt_s")
        c.op("br_if", 1)

        def end() -> None:  # min(at + chunk, total), without overflow
            c.op("local.get", at)
            c.op("local.get", chunk)
            c.op("i32.add")
            c.op("local.get", total)
            c.op("local.get", total)
            c.op("local.get", at)
            c.op("i32.sub")
            c.op("local.get", chunk)
            c.op("i32.gt_s")
            c.op("select")

        call(lambda: c.op("local.get", at), end)
        c.op("local.get", mine)
        c.const("i32", 1)
        c.op("i32.add")
        c.set(mine)
        c.op("br", 0)
        c.op("end")
        c.op("end")
        c.op("local.get", mine)
        self.call_to("finish")
        c.op("end")
        c.op("end")
        for n, t in zip((total, chunk, at, mine, *args), ("i32",) * 4 + (*self.m.signature(s.call.callee),)):
            self.release(t, n)

    def branch(self, s: Branch) -> None:
        self.emit(s.cond)
        self.c.start("if")
        self.inside(s.then)
        if s.orelse:
            self.c.op("else")
            self.inside(s.orelse)
        self.c.op("end")

    def repeat(self, s: Repeat) -> None:
        c = self.c
        c.start("block")
        c.start("loop")
        self.meet()
        self.enter()
        self.emit(s.cond)
        self.leave_scope()
        c.op("i32.eqz")
        c.op("br_if", 1)
        self.inside(s.body)
        c.op("br", 0)
        c.op("end")
        c.op("end")


_PRINT: dict[type, Callable[[Any, Any], None]] = {
    Wait: _Main.wait, Meet: _Main.meet, Bind: _Main.define, Put: _Main.put, Check: _Main.check, Place: _Main.place, Run: _Main.run,
    Branch: _Main.branch, Repeat: _Main.repeat,
}  # fmt: skip


class _Bind(_Host):
    """``lt_bind(threads)`` and ``lt_run(threads, may_wait)``."""

    def print_bind(self, s: Steps) -> Function:
        c, m, p = self.c, self.m, self.m.program
        dims = set(p.dims)
        self.set_word(WORDS["ERROR"], lambda: c.const("i32", 0))
        self.load_dims(dims)
        for v, (i, axis) in p.dims.items():
            lo, hi = v.attr[1], v.attr[2]
            for x in (m.name(p.inputs[i].name), axis):
                c.const("i32", x)
            self.emit(v)
            c.const("i32", 0 if not isinstance(lo, int) else lo)
            c.const("i32", hi if isinstance(hi, int) and hi < _HUGE else _HUGE)
            self.call_to("check_range")
        for j, b in enumerate(p.inputs):
            for axis, e in enumerate(b.shape):
                if p.dims.get(e) != (j, axis) and free_vars(e) <= dims:
                    for x in (m.name(b.name), axis):
                        c.const("i32", x)
                    self.extent(j, axis)
                    self.emit(e)
                    self.call_to("check_dim")
        for b in p.outputs:
            for axis, e in enumerate(b.shape):
                known = free_vars(e) <= dims
                self.set_word(m.memory.outputs[b.name] + EXTENTS + 4 * axis, lambda e=e, known=known: self.emit(e) if known else c.const("i32", -1))  # type: ignore[misc]
                low = bounds(e)[0]
                if known and (low is None or low < 0):
                    for x in (m.name(m.layout.public(b)), axis):
                        c.const("i32", x)
                    self.emit(e)
                    self.call_to("check_extent")
        self.status()
        c.start("if")
        self.status()
        c.op("return")
        c.op("end")
        self.place_static(s)
        self.status()
        return self.function(["i32"])

    def place_static(self, s: Steps) -> None:
        """Addresses of inputs, outputs and temporaries, one after the other."""
        c, m, p = self.c, self.m, self.m.program
        dims = set(p.dims)
        at = self.local("i64")
        c.const("i64", m.memory.heap)
        c.set(at)

        def take(word: int, size: Expr | None, length: int | None) -> None:
            """The word gets the address, ``length`` the bytes; what follows begins at the next multiple of 64."""
            self.low_word(word, at)
            n = self.local("i64")
            self.emit(wide(size) if size is not None else const(0, i64))
            c.set(n)
            if length is not None:
                self.low_word(length, n)
            c.op("local.get", at)
            c.op("local.get", n)
            c.op("i64.add")
            c.const("i64", ALIGN - 1)
            c.op("i64.add")
            c.const("i64", -ALIGN)
            c.op("i64.and")
            c.set(at)
            self.release("i64", n)

        for b in (*p.inputs, *p.outputs):
            word = m.memory.pointer_word(b.name)
            known = free_vars(b.size()) <= dims
            if known:
                take(word, byte_size(b.dtype, b.size()), word + 4)
        slots = m.layout.plan.slots
        members: dict[int, list[str]] = {}
        for n, k in m.layout.plan.slot_of.items():
            members.setdefault(k, []).append(n)
        for k, size in enumerate(slots):
            names = members.get(k, [])
            if not names:
                continue
            for n in names[1:]:
                self.low_word(m.memory.pointer_word(n), at)
            take(m.memory.pointer_word(names[0]), size, None)
        self.low_word(WORDS["STACKS"], at)
        c.op("local.get", at)
        c.op("local.get", 0)
        c.const("i32", 1)
        c.op("local.get", 0)
        c.const("i32", 1)
        c.op("i32.gt_s")
        c.op("select")
        c.op("i64.extend_i32_u")
        c.const("i64", m.memory.stack)
        c.op("i64.mul")
        c.op("i64.add")
        c.set(at)
        self.low_word(WORDS["HEAP_START"], at)
        useful = useful_threads(list(s.shared_work), dims)
        n = self.local("i64")
        self.emit(wide(useful))
        c.set(n)
        self.set_word(WORDS["WORTH"], lambda: self.clamp(n))
        c.op("local.get", at)
        self.call_to("ensure")
        c.op("i32.eqz")
        c.start("if")
        for v in (3, 3, m.name("inputs, outputs and temporaries"), 0):
            c.const("i32", v)
        c.op("local.get", at)
        c.const("i64", 0)
        c.const("i64", 0)
        self.call_to("fail")
        c.op("end")

    def clamp(self, n: int) -> None:
        c = self.c
        c.op("local.get", n)
        c.const("i64", _HUGE)
        c.op("local.get", n)
        c.const("i64", _HUGE)
        c.op("i64.lt_u")
        c.op("select")
        c.op("i32.wrap_i64")

    def print_run(self) -> Function:
        c, m = self.c, self.m
        self.set_word(WORDS["ERROR"], lambda: c.const("i32", 0))

        def start() -> None:
            c.const("i32", 0)
            c.mem("i32.load", WORDS["HEAP_START"], 2)

        self.set_word(WORDS["HEAP"], start)
        for n in m.layout.plan.dynamic:
            for k in (0, 4):
                self.set_word(m.memory.pointer_word(n) + k, lambda: c.const("i32", 0))
        for j in m.layout.dynamic_outputs:
            for k in (0, 4, 8):
                self.set_word(m.memory.outputs[m.program.outputs[j].name] + k, lambda: c.const("i32", 0))
        if m.threads:
            c.op("local.get", 1)
            c.op("global.set", GLOBALS.index("may_wait"))
            n = self.local("i32")
            c.op("local.get", 0)
            c.const("i32", 0)
            c.mem("i32.load", WORDS["WORTH"], 2)
            c.op("local.tee", n)
            c.op("local.get", 0)
            c.op("local.get", n)
            c.op("i32.lt_s")
            c.op("select")
            self.call_to("crowd")
        else:
            self.call_to("alone")
        self.status()
        return self.function(["i32"])


@dataclass(slots=True)
class Binary:
    """``code``: the module; ``names``: what errors refer to; ``calls``: the kernel of each call; ``parallel``: whether any kernel can
    be shared."""

    code: bytes
    names: list[str]
    calls: tuple[str, ...]
    parallel: bool
    kernels: dict[str, int] = field(default_factory=dict)  # bytes of each kernel's function


class ProgramPrinter:
    """Prints a Program in any variant. The layout of memory and the weights are the same for all.

    Raises CompilationError for what WebAssembly cannot express, naming the kernel in ``op``."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layout = Layout(program)
        self.steps = steps(self.layout)
        self.kernels: dict[str, Func] = {}
        self.tables: dict[str, dict[str, int]] = {}
        stack = 0
        for name in dict.fromkeys(self.steps.calls):
            try:
                f = self.kernels[name] = legalize_wasm(program.kernels[name])
                self.check(f)
                stack = max(stack, stack_bytes(f))
            except LuthierError as e:
                raise e.at(op=name) from None
            for n, a in f.data.items():
                self.layout.weights.add(f"{name}/{n}", a)
        self.memory = Memory(self.layout, stack)
        at = self.memory.weights
        for name, f in self.kernels.items():
            self.tables[name] = {n: at + self.layout.weights.offsets[f"{name}/{n}"] for n in f.data}
        self._names: dict[str, int] = {}
        self.index: dict[str, int] = {}
        self.kernel_index: dict[str, int] = {}
        self.relaxed = self.threads = self.hooks = False
        self.printed: dict[tuple[str, bool, int], Function] = {}

    def function(self, name: str, base: int) -> Function:
        """One kernel as it is in this kind of variant; ``base``: the number of imported functions."""
        key = (name, self.relaxed, base)
        if key not in self.printed:
            p = KernelPrinter(self.kernels[name], {"fmod": base}, self.tables[name], self.relaxed, fixed=True)
            self.printed[key] = p.kernel()
            if not p.relies:
                self.printed[name, not self.relaxed, base] = self.printed[key]
        return self.printed[key]

    @staticmethod
    def check(f: Func) -> None:
        for s in walk_stmts(f.body):
            if isinstance(s, For) and s.kind in ("vectorize", "unroll"):
                raise CompilationError(f"loop {s.var!r} is still {s.kind}", op=f.name, hint="run the shared loop passes first")

    def name(self, text: str) -> int:
        """The number of a name in the manifest's list."""
        return self._names.setdefault(text, len(self._names))

    def signature(self, kernel: str) -> tuple[str, ...]:
        return tuple("i32" if isinstance(p, Buffer) else valtype(p.dtype) for p in self.kernels[kernel].params)

    def describe(self) -> dict[str, Any]:
        """The part ``wasm`` of the manifest but its names, which printing collects."""
        return {**describe(self.memory), "dynamic": bool(self.layout.dynamic_outputs), "parallel": bool(self.steps.shared_work)}

    def print(self, relaxed: bool, threads: bool, profile: bool = False) -> Binary:
        """``profile``: the module imports ``env.mark(call number)`` and calls it after every kernel; function names are kept."""
        self.relaxed, self.threads, self.hooks = relaxed, threads, profile
        base = int(profile)
        functions = [runtime_function("fmod")]
        helpers = {"fmod": base}
        seen: dict[Any, int] = {}
        sizes: dict[str, int] = {}
        for name in self.kernels:
            try:
                g = self.function(name, base)
            except LuthierError as e:
                raise e.at(op=name) from None
            key = (tuple(g.params), tuple(g.locals), g.code)
            sizes[name] = len(g.code)
            if key not in seen:
                seen[key] = base + len(functions)
                functions.append(g)
            self.kernel_index[name] = seen[key]
        runtime = [(n, lines) for n, needs, lines in source() if (threads or not needs) and n not in helpers]
        self.index = {n: base + len(functions) + k for k, (n, _) in enumerate(runtime)}
        for k, n in enumerate(("main", "lt_bind", "lt_run")):
            self.index[n] = base + len(functions) + len(runtime) + k
        numbers = self.memory.names()
        functions += [assemble(lines, self.index, numbers) for _, lines in runtime]
        functions.append(_Main(self, "main").print_main(self.steps))
        functions.append(_Bind(self, "lt_bind", ["i32"]).print_bind(self.steps))
        functions.append(_Bind(self, "lt_run", ["i32", "i32"]).print_run())
        exports = ["lt_bind", "lt_run", *(("lt_worker", "lt_stop") if threads else ())]
        module = Module(
            functions, globals=(0,) * len(GLOBALS), hooks=(("mark", ("i32",)),) if profile else (), exports={n: self.index[n] for n in exports},
            pages=(self.memory.pages, self.memory.max_pages if threads else None), shared=threads, names=profile,
        )  # fmt: skip
        return Binary(module.encode(), list(self._names), self.steps.calls, bool(self.steps.shared_work), sizes)


def print_program(program: Program, relaxed: bool = True, threads: bool = False) -> Binary:
    """One variant of the module of ``program``."""
    return ProgramPrinter(program).print(relaxed, threads)


__all__ = ["Binary", "ProgramPrinter", "print_program", "wide"]
