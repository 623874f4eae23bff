"""Prints a kernel as LLVM text: SSA by construction, so that the code generator alone (no LLVM passes) makes good code.

Register variables (rank-0 ``local`` buffers) become SSA values; phis are placed at loops and conditions as they are printed.
Loops are rotated, with a guard only where the trip count may be 0. An address is pointer + invariant part, then a constant
``getelementptr`` that the processor's addressing mode absorbs. Multiplications and additions carry ``contract`` and nothing else.

A kernel is ``void name(ptr buffers..., scalars..., i64 lo, i64 hi)``: the outermost parallel loop runs its iterations
``lo <= i < hi`` (counted from 0); without one the whole body runs. A kernel with checks (:mod:`luthier.passes.loop.check_bounds`) has
``ptr ctx`` as its last parameter and returns a status, 0 or LT_ERROR_INDEX.
"""

from __future__ import annotations

from collections.abc import Iterable

from luthier.codegen.llvm.expr import ExprPrinter
from luthier.codegen.llvm.memory import MemoryPrinter
from luthier.codegen.llvm.types import mem_bytes, mem_type, reg_type
from luthier.codegen.program.ranges import most_elements
from luthier.codegen.program.sharing import parallel_loop
from luthier.codegen.targets.target import Target, host
from luthier.errors import CompilationError
from luthier.ir.expr import bounds
from luthier.ir.loop import (
    Alloc,
    Barrier,
    Block,
    Buffer,
    Call,
    For,
    Func,
    If,
    Let,
    Stmt,
    Store,
    While,
    children,
    loads_of,
    walk_stmts,
)
from luthier.passes.loop.check_bounds import is_checked
from luthier.passes.loop.legalize_dtype import LLVM_RULES, legalize_dtype
from luthier.passes.loop.lower_subbyte import lower_subbyte
from luthier.schedules.base.capabilities import LOCAL_BYTES


def quote(name: str) -> str:
    """A symbol name as LLVM spells it."""
    return '"' + "".join(c if c.isalnum() or c in "._-" else f"\\{ord(c):02X}" for c in name) + '"'


def is_register(b: Buffer) -> bool:
    return b.scope == "local" and b.rank == 0


class KernelPrinter(MemoryPrinter, ExprPrinter):
    """One kernel to text; ``text()`` does it all."""

    def __init__(self, f: Func, target: Target | None = None, name: str | None = None, noalias: bool = True) -> None:
        super().__init__(target or host())
        self.noalias = "noalias " if noalias else ""  # False: some call passes memory that it writes twice
        self.f = f
        self.name = name or f.name
        par = parallel_loop(f)
        self.parallel = par[0] if par else None
        self.stored: dict[int, frozenset[str]] = {}

    # ------------------------------------------------------------ whole

    def text(self) -> str:
        params: list[str] = []
        checked = is_checked(self.f)
        written = self._written()
        reads = self._read()
        for p in self.f.params:
            if isinstance(p, Buffer):
                n = f"%p{len(params)}"
                self.buffers[p.name] = n
                align = mem_bytes(p.dtype.scalar)
                attrs = f"ptr {self.noalias}align {align}"
                if p.name not in written:
                    attrs += " readonly"
                elif p.name not in reads:
                    attrs += " writeonly"
                params.append(f"{attrs} {n}")
            else:
                n = f"%p{len(params)}"
                self.bind(p, n)
                params.append(f"{reg_type(p.dtype)} {n}")
        self.stmt(self.f.body)
        self.emit("ret i32 0" if checked else "ret void")
        params += ["i64 %lo", "i64 %hi", *["ptr %ctx"] * checked]
        head = f"define hidden {'i32' if checked else 'void'} @{quote(self.name)}({', '.join(params)}) local_unnamed_addr #0 {{\nentry:\n"
        body = "".join(f"  {x}\n" for x in self.entry) + "".join(x if x.endswith(":\n") else f"  {x}\n" for x in self.lines)
        return "".join(self.globals) + head + body + "}\n"

    def _written(self) -> set[str]:
        return set().union(*(self._stores_all(self.f.body)))

    def _stores_all(self, s: Stmt) -> list[set[str]]:
        out = [set[str]()]
        if isinstance(s, Store):
            out[0].add(s.buf.name)
        elif isinstance(s, Call):
            for a in s.args:
                b = a[0] if isinstance(a, tuple) else a
                if isinstance(b, Buffer):
                    out[0].add(b.name)
        for c in children(s):
            out += self._stores_all(c)
        return out

    def _read(self) -> set[str]:
        out = {e.attr[0].name for e in loads_of(self.f.body)}
        for s in walk_stmts(self.f.body):
            if isinstance(s, Call):
                out |= {b.name for a in s.args for b in [a[0] if isinstance(a, tuple) else a] if isinstance(b, Buffer)}
        return out

    # ------------------------------------------------------------ statements

    def stmt(self, s: Stmt) -> None:
        if isinstance(s, Block):
            for c in s.stmts:
                self.stmt(c)
        elif isinstance(s, Store):
            self.store(s)
        elif isinstance(s, Let):
            self.let(s)
        elif isinstance(s, For):
            self.loop(s)
        elif isinstance(s, If):
            self.condition(s)
        elif isinstance(s, While):
            self.while_loop(s)
        elif isinstance(s, Alloc):
            self.alloc(s)
        elif isinstance(s, Call):
            self.call(s)
        elif isinstance(s, Barrier):
            raise CompilationError(f"a barrier in kernel {self.f.name}: kernels for the processor have no thread groups")
        else:
            raise TypeError(s)

    def let(self, s: Let) -> None:
        self.begin_statement()
        self.uniform.pop(s.var, None)
        if s.value.op == "bcast" and s.value.dtype.is_bool and not s.value.loading:
            self.uniform[s.var] = s.value  # masks of whole vectors: accesses ask for the scalar
        self.bind(s.var, self.value(s.value))

    def alloc(self, s: Alloc) -> None:
        b = s.buf
        if is_register(b):
            self.regs[b.name], self.reg_types[b.name] = "poison", reg_type(b.dtype)
            self.stmt(s.body)
            self.regs.pop(b.name, None)
            return
        n = most_elements(b)
        if b.scope == "global":
            raise CompilationError(f"{self.f.name}: scratch {b.name} must be a parameter", hint="the program allocates it in the arena")
        if n is None:
            raise CompilationError(f"{self.f.name}: local buffer {b.name} has no constant size {b.size()!r}", hint="use a global buffer")
        size = n * mem_bytes(b.dtype)
        if size > LOCAL_BYTES:
            raise CompilationError(
                f"{self.f.name}: local buffer {b.name} needs {size} bytes of stack, at most {LOCAL_BYTES} are allowed",
                hint="stage a smaller tile, or use a global buffer with one slice per parallel iteration",
            )
        ptr = self.fresh()
        self.entry.append(f"{ptr} = alloca [{max(n, 1)} x {mem_type(b.dtype)}], align 64")
        old = self.buffers.get(b.name)
        self.buffers[b.name] = ptr
        self.forget_addresses(b.name)
        self.stmt(s.body)
        if old is not None:
            self.buffers[b.name] = old
            self.forget_addresses(b.name)

    def call(self, s: Call) -> None:
        from luthier.codegen.llvm.intrin import EFFECT

        f = EFFECT.get(s.callee)
        if f is None:
            raise CompilationError(f"{self.f.name} calls {s.callee!r}, which the LLVM backend does not know")
        self.begin_statement()
        f(self, s)

    # ------------------------------------------------------------ control flow

    def changed(self, s: Stmt) -> frozenset[str]:
        """Register variables that are live here and stored in ``s``."""
        return frozenset(n for n in self._stores(s) if n in self.regs)

    def _stores(self, s: Stmt) -> frozenset[str]:
        if isinstance(s, Store):
            return frozenset((s.buf.name,)) if is_register(s.buf) else frozenset()
        hit = self.stored.get(id(s))
        if hit is None:
            hit = frozenset().union(*(self._stores(c) for c in children(s)))
            self.stored[id(s)] = hit
        return hit

    def loop(self, s: For) -> None:
        if s.kind not in ("serial", "parallel", "unroll", "vectorize"):
            raise CompilationError(f"a {s.kind} loop in kernel {self.f.name}: this target has no thread groups")
        self.begin_statement()
        if s is self.parallel:
            base = self.value(s.lo)
            zero = s.lo.op == "const" and s.lo.attr == 0
            lo = "%lo" if zero else self.ins(f"add nsw i64 {base}, %lo")
            hi = "%hi" if zero else self.ins(f"add nsw i64 {base}, %hi")
            guard = False  # the caller gives at least one iteration
        else:
            if s.extent.op == "const" and s.extent.attr <= 0:
                return
            lo, hi = self.value(s.lo), self.value(s.hi)
            low = bounds(s.extent)[0]
            guard = low is None or low < 1
        names = sorted(self.changed(s.body))
        start = {n: self.regs[n] for n in names}
        head, exit_ = self.label("loop"), self.label("done")
        if guard:
            c = self.ins(f"icmp slt i64 {lo}, {hi}")
            pre = self.block
            self.emit(f"br i1 {c}, label %{head}, label %{exit_}")
        else:
            pre = self.block
            self.emit(f"br label %{head}")
        self.start(head)
        v = self.fresh()
        nxt = self.fresh()
        at = len(self.lines)
        phis = {n: self.fresh() for n in names}
        self.regs.update(phis)
        self.push()
        self.bind(s.var, v)
        self.stmt(s.body)
        self.pop()
        latch = self.block
        self.emit(f"{nxt} = add nsw i64 {v}, 1")
        c = self.ins(f"icmp slt i64 {nxt}, {hi}")
        self.emit(f"br i1 {c}, label %{head}, label %{exit_}")
        end = {n: self.regs[n] for n in names}
        text = [f"{v} = phi i64 [ {lo}, %{pre} ], [ {nxt}, %{latch} ]"]
        for n in names:
            text.append(f"{phis[n]} = phi {self.reg_types[n]} [ {start[n]}, %{pre} ], [ {end[n]}, %{latch} ]")
        self.lines[at:at] = text
        self.start(exit_)
        for n in names:
            if guard:
                self.regs[n] = self.ins(f"phi {self.reg_types[n]} [ {start[n]}, %{pre} ], [ {end[n]}, %{latch} ]")
            else:
                self.regs[n] = end[n]

    def while_loop(self, s: While) -> None:
        names = sorted(self.changed(s.body))
        start = {n: self.regs[n] for n in names}
        head, exit_ = self.label("while"), self.label("done")
        self.begin_statement()
        self.push()
        c = self.value(s.cond)
        self.pop()
        pre = self.block
        self.emit(f"br i1 {c}, label %{head}, label %{exit_}")
        self.start(head)
        at = len(self.lines)
        phis = {n: self.fresh() for n in names}
        self.regs.update(phis)
        self.push()
        self.stmt(s.body)
        self.begin_statement()
        c = self.value(s.cond)
        self.pop()
        latch = self.block
        self.emit(f"br i1 {c}, label %{head}, label %{exit_}")
        end = {n: self.regs[n] for n in names}
        self.lines[at:at] = [f"{phis[n]} = phi {self.reg_types[n]} [ {start[n]}, %{pre} ], [ {end[n]}, %{latch} ]" for n in names]
        self.start(exit_)
        for n in names:
            self.regs[n] = self.ins(f"phi {self.reg_types[n]} [ {start[n]}, %{pre} ], [ {end[n]}, %{latch} ]")

    def condition(self, s: If) -> None:
        if s.cond.op == "const":
            taken = s.then if s.cond.attr else s.orelse
            if taken is not None:
                self.stmt(taken)
            return
        self.begin_statement()
        c = self.value(s.cond)
        names = sorted(self.changed(s.then) | (self.changed(s.orelse) if s.orelse is not None else frozenset()))
        start = {n: self.regs[n] for n in names}
        then, orelse, exit_ = self.label("then"), self.label("else"), self.label("fi")
        pre = self.block
        self.emit(f"br i1 {c}, label %{then}, label %{exit_ if s.orelse is None else orelse}")
        self.start(then)
        self.push()
        self.stmt(s.then)
        self.pop()
        then_end, then_regs = self.block, {n: self.regs[n] for n in names}
        self.emit(f"br label %{exit_}")
        if s.orelse is not None:
            self.regs.update(start)
            self.start(orelse)
            self.push()
            self.stmt(s.orelse)
            self.pop()
            pre, start = self.block, {n: self.regs[n] for n in names}
            self.emit(f"br label %{exit_}")
        self.start(exit_)
        for n in names:
            self.regs[n] = self.ins(f"phi {self.reg_types[n]} [ {then_regs[n]}, %{then_end} ], [ {start[n]}, %{pre} ]")


def legalize_llvm(f: Func) -> Func:
    """A kernel of the shared passes in the types that LLVM has: what is printed, for every CPU."""
    return legalize_dtype(lower_subbyte(f), LLVM_RULES)


def print_kernels(funcs: Iterable[tuple[str, Func]], target: Target, noalias: bool = True) -> str:
    """One LLVM module with the kernels under the given symbol names. Raises CompilationError naming the kernel."""
    bodies: list[str] = []
    declares: dict[str, str] = {}
    helpers: set[str] = set()
    for name, f in funcs:
        p = KernelPrinter(f, target, name, noalias)
        bodies.append(p.text())
        declares.update(p.declarations)
        helpers |= p.helpers
    return module_text(bodies, declares, helpers, target)


def module_text(bodies: list[str], declares: dict[str, str], helpers: set[str], target: Target) -> str:
    from luthier.codegen.llvm.intrin import HELPERS

    extra = [HELPERS[h] for h in sorted(helpers)]
    lines = [f'target triple = "{target.triple}"', ""]
    lines += [f"declare {sig.replace('@', '@' + n)}" for n, sig in sorted(declares.items())]
    wide = '"prefer-vector-width"="512" "min-legal-vector-width"="512" ' if target.caps.vector_bits == 512 else ""
    attrs = f'attributes #0 = {{ nounwind {wide}"target-cpu"="{target.cpu}" "target-features"="{target.features}" }}'
    return "\n".join([*lines, "@lt.zero = internal constant [512 x i8] zeroinitializer, align 64", "", *extra, *bodies, attrs, ""])


__all__ = ["KernelPrinter", "is_register", "module_text", "parallel_loop", "print_kernels", "quote"]
