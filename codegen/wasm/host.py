"""What runs around kernels in a WebAssembly module: ``lt_bind`` and ``lt_run``, and what they share with ``main``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from luthier.codegen.program.sharing import useful_threads
from luthier.codegen.program.steps import Steps
from luthier.codegen.wasm.encoder import Function
from luthier.codegen.wasm.layout import EXTENTS, WORDS
from luthier.codegen.wasm.printer import KernelPrinter
from luthier.codegen.wasm.text import GLOBALS
from luthier.ir.dtypes import i64
from luthier.ir.expr import Expr, binary, bounds, cast, const, free_vars, is_const, minimum
from luthier.ir.loop import EMPTY, Buffer, Func
from luthier.passes.loop.legalize_arithmetic import legal
from luthier.passes.program.plan_memory import ALIGN, byte_size

if TYPE_CHECKING:
    from luthier.codegen.wasm.main import ProgramPrinter

_WIDE = ("add", "sub", "mul", "min", "max", "floordiv", "mod")
HUGE = (1 << 31) - 1
KINDS = {"equal": 4, "extent": 5, "value": 6}  # of errors, see docs/web.md


FULL = (1 << 32) - 1  # bytes that no memory has left


def wide(e: Expr, size: bool = False) -> Expr:
    """An index expression in 64 bits: sizes in bytes and amounts of work pass 2 ** 31. ``size``: products stay below 2 ** 32, so that
    none of them wraps around; what reaches that is refused."""
    if e.dtype == i64:
        return e
    if e.op == "const":
        return const(int(e.attr), i64)
    if e.op in _WIDE:
        r = binary(e.op, wide(e.args[0], size), wide(e.args[1], size))
        return minimum(r, const(FULL, i64)) if size and e.op == "mul" and not is_const(e.args[1]) else r
    return cast(e, i64)


class HostPrinter(KernelPrinter):
    """What ``main`` and ``lt_bind`` share: dims are read from the table, addresses from words of memory. An i64 that becomes an index
    stays as large as it can: extents and ends of slices that no tensor has are refused or clipped, not taken modulo 2 ** 32."""

    saturates = True

    def __init__(self, m: ProgramPrinter, name: str, params: Sequence[str] = ()) -> None:
        super().__init__(Func(name, (), EMPTY), {}, {}, m.relaxed)
        self.m = m
        self.params = list(params)
        self.nparams = len(params)

    def function(self, results: Sequence[str] = ()) -> Function:
        return Function(self.f.name, self.params, results, self.types, bytes(self.c.b))

    def binary(self, e: Expr) -> None:
        lowered = legal(e, index_bits=32)
        if lowered is None:
            super().binary(e)
        else:
            self.emit(lowered)

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



class BindPrinter(HostPrinter):
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
            c.const("i32", hi if isinstance(hi, int) and hi < HUGE else HUGE)
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
            self.emit(wide(size, True) if size is not None else const(0, i64))
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
            known = b.symbols() <= dims
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
        c.const("i64", HUGE)
        c.op("local.get", n)
        c.const("i64", HUGE)
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
