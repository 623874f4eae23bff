"""``main`` of a WebAssembly module: the steps of :mod:`luthier.codegen.program.steps`, on every thread of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.codegen.program.steps import Bind, Branch, Check, Meet, Place, Put, Repeat, Run, Step, Steps, Wait
from luthier.codegen.wasm.encoder import Function
from luthier.codegen.wasm.host import HUGE, KINDS, HostPrinter, wide
from luthier.codegen.wasm.layout import EXTENTS
from luthier.codegen.wasm.scalar import valtype
from luthier.codegen.wasm.text import GLOBALS
from luthier.ir.dtypes import i64
from luthier.ir.expr import cast, const, maximum, minimum
from luthier.ir.loop import Buffer, Let, Store
from luthier.passes.program.plan_memory import byte_size


class MainPrinter(HostPrinter):
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
                self.emit(wide(size, True))
                c.const("i32", m.name(name))
                self.call_to("grow")
            for _, b in s.outputs:
                at = m.memory.outputs[b.name]
                for k, e in enumerate(b.shape):
                    self.set_word(at + EXTENTS + 4 * k, lambda e=e: self.emit(e))  # type: ignore[misc]
                size = wide(byte_size(b.dtype, b.size()), True)
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
        self.emit(minimum(maximum(wide(s.grain), const(1, i64)), const(HUGE, i64)))
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
    Wait: MainPrinter.wait, Meet: MainPrinter.meet, Bind: MainPrinter.define, Put: MainPrinter.put, Check: MainPrinter.check, Place: MainPrinter.place, Run: MainPrinter.run,
    Branch: MainPrinter.branch, Repeat: MainPrinter.repeat,
}  # fmt: skip
