"""Loop IR to WebAssembly, by the project's own binary encoder.

A kernel ``f(buffers..., scalars...)`` becomes ``f(i32 pointers..., scalars..., lo, hi)`` and ``f.range(pointers..., scalars...)``:
``range`` gives the number of rounds of the ``parallel`` loop (1 when there is none), and a call runs rounds ``lo <= r < hi`` of
it, so that threads may share the work. Register variables, Lets and loop variables are locals; other local buffers live on a
stack in linear memory (global ``env.sp``, which grows downward). Constant parts of indices become immediates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.codegen.program.sharing import parallel_loop
from luthier.codegen.wasm.encoder import Function, Module
from luthier.codegen.wasm.memory import MemoryPrinter, element_bytes
from luthier.codegen.wasm.scalar import valtype
from luthier.codegen.wasm.text import runtime_function
from luthier.codegen.wasm.vector import bits_of, full
from luthier.ir.errors import CompilationError
from luthier.ir.expr import (
    Expr,
    const,
    prove,
)
from luthier.ir.loop import (
    Alloc,
    Barrier,
    Block,
    Call,
    For,
    Func,
    If,
    Let,
    Stmt,
    Store,
    While,
    walk_stmts,
)
from luthier.passes.loop.legalize_arithmetic import legalize_arithmetic
from luthier.passes.loop.legalize_dtype import legalize_dtype
from luthier.passes.loop.lower_subbyte import lower_subbyte
from luthier.passes.loop.place_lets import place_lets
from luthier.passes.loop.split_vectors import split_vectors


class KernelPrinter(MemoryPrinter):
    """``consts``: places of const buffers, counted from global 1, or addresses when ``fixed``. Global 0 is the stack pointer."""

    def __init__(self, f: Func, functions: dict[str, int], consts: dict[str, int], relaxed: bool, fixed: bool = False) -> None:
        super().__init__(f.name, relaxed, consts, fixed)
        self.f, self.functions = f, functions
        self.params: list[str] = []
        for b in f.buffers:
            self.ptrs[b.name] = len(self.params)
            self.params.append("i32")
        for v in f.scalars:
            self.vars[v] = len(self.params)
            self.params.append(valtype(v.dtype))
        self.par: For | None = None
        self.bounds: tuple[int, int] = (0, 0)

    # ------------------------------------------------------------ whole functions

    def kernel(self) -> Function:
        p = parallel_loop(self.f)
        self.par = None if p is None else p[0]
        self.bounds = (len(self.params), len(self.params) + 1)
        self.params += ["i32", "i32"]
        self.nparams = len(self.params)
        if self.par is None:  # all rounds are round 0
            self.c.get(self.bounds[0])
            self.c.get(self.bounds[1])
            self.c.op("i32.ge_s")
            self.c.start("if")
            self.c.op("return")
            self.c.op("end")
        self.innermost(self.f.body)
        self.stmt(self.f.body)
        return Function(self.f.name, self.params, [], self.types, self.prologue() + bytes(self.c.b))

    def range(self) -> Function:
        self.nparams = len(self.params)
        p = parallel_loop(self.f)
        if p is None:
            self.c.const("i32", 1)
        else:
            self.emit(p[1])
        return Function(f"{self.f.name}.range", self.params, ["i32"], self.types, self.prologue() + bytes(self.c.b))

    def helper(self, name: str) -> int:
        return self.functions[name]

    # ------------------------------------------------------------ statements

    def stmt(self, s: Stmt) -> None:
        print_it = _PRINT.get(type(s))
        if print_it is None:
            raise TypeError(s)
        print_it(self, s)

    def block(self, s: Block) -> None:
        for x in s.stmts:
            _PRINT[type(x)](self, x)

    def branch_on(self, s: If) -> None:
        c = self.c
        self.emit(s.cond)
        c.start("if")
        self.scope(s.then)
        if s.orelse is not None:
            c.op("else")
            self.scope(s.orelse)
        c.op("end")

    def repeat_while(self, s: While) -> None:
        c = self.c
        c.start("block")
        c.start("loop")
        self.depth += 1
        self.enter()
        self.emit(s.cond)
        c.op("i32.eqz")
        c.op("br_if", 1)
        self.stmt(s.body)
        self.leave_scope()
        self.depth -= 1
        c.op("br", 0)
        c.op("end")
        c.op("end")

    def barrier(self, s: Barrier) -> None:
        raise CompilationError("WebAssembly kernels have no barriers", op=self.name)

    def scope(self, s: Stmt) -> None:
        self.enter()
        self.stmt(s)
        self.leave_scope()

    def let(self, s: Let) -> None:
        v, value = s.var, s.value
        if v in self.skip:
            self.vars.pop(v, None)
            return
        d = v.dtype
        if d.lanes == 1:
            self.scalar(value)
        else:
            if d.is_bool:  # accesses under this mask look at what it is
                self.masks[v] = self.masks.get(value, value)
            if not full(d):
                t = valtype(d.scalar)
                ls = []
                for k in range(d.lanes):
                    n = self.local(t)
                    self.emit(self.lane(value, k))
                    self.c.set(n)
                    ls.append(n)
                self.vars[v] = ls
                return
            self.vector(value)
        n = self.local(valtype(d))
        self.c.set(n)
        self.vars[v] = n

    def loop(self, s: For) -> None:
        c = self.c
        i = self.local("i32")
        self.vars[s.var] = i
        if s is self.par:
            self.emit(s.lo)
            c.get(self.bounds[0])
            c.op("i32.add")
            c.set(i)
            hi = self.local("i32")
            self.emit(s.lo)
            c.get(self.bounds[1])
            c.op("i32.add")
            c.set(hi)
            limit: Any = ("local.get", hi)
        else:
            self.emit(s.lo)
            c.set(i)
            if s.hi.op == "const":
                limit = s.hi.attr
            else:
                hi = self.local("i32")
                self.emit(s.hi)
                c.set(hi)
                limit = ("local.get", hi)

        def push_limit() -> None:
            if isinstance(limit, int):
                c.const("i32", limit)
            else:
                c.op(*limit)

        sure = s is not self.par and prove(s.lo < s.hi)
        if not sure:
            c.get(i)
            push_limit()
            c.op("i32.lt_s")
            c.start("if")
        outer = self.inner, self.bases, self.affine, self.skip, self.resolved, self.taken
        self.inner, self.bases, self.affine, self.skip, self.resolved, self.taken = set(), {}, dict(self.affine), set(), {}, {}
        self.hoist(s)
        c.start("loop")
        self.depth += 1
        self.scope(s.body)
        self.depth -= 1
        for n in self.bases.values():
            self.release("i32", n)
        self.inner, self.bases, self.affine, self.skip, self.resolved, self.taken = outer
        c.get(i)
        c.const("i32", 1)
        c.op("i32.add")
        c.op("local.tee", i)
        push_limit()
        c.op("i32.lt_s")
        c.op("br_if", 0)
        c.op("end")
        if not sure:
            c.op("end")
        self.release("i32", i)
        if not isinstance(limit, int):
            self.release("i32", limit[1])

    def alloc(self, s: Alloc) -> None:
        b, c = s.buf, self.c
        if b.rank == 0 and b.scope == "local":
            d = b.dtype
            if d.lanes == 1 or full(d):
                t = valtype(d)
                n = self.local(t)
                self.regs[b.name] = n
                self.stmt(s.body)
                self.release(t, n)
            else:
                t = valtype(d.scalar)
                ls = [self.local(t) for _ in range(d.lanes)]
                self.regs[b.name] = ls
                self.stmt(s.body)
                for n in ls:
                    self.release(t, n)
            return
        if b.name in self.consts:
            self.ptrs[b.name] = self.local("i32")
            self.constant(b.name)
            c.set(self.ptrs[b.name])
            self.stmt(s.body)
            return
        size = b.size() * (element_bytes(b.dtype) * b.dtype.lanes)
        saved, ptr = self.local("i32"), self.local("i32")
        c.op("global.get", 0)
        c.op("local.tee", saved)
        self.emit((size + 63) // 64 * 64)
        c.op("i32.sub")
        c.op("local.tee", ptr)
        c.op("global.set", 0)
        self.ptrs[b.name] = ptr
        self.stmt(s.body)
        c.get(saved)
        c.op("global.set", 0)
        # the pointer stays reserved: a cached address must not outlive its meaning
        self.release("i32", saved)

    def call(self, s: Call) -> None:
        if s.callee not in self.functions or s.callee == "fmod":
            raise CompilationError(f"call of unknown kernel {s.callee}", op=self.name)

        def args() -> None:
            for a in s.args:
                if isinstance(a, Expr):
                    self.emit(a)
                else:
                    b, off = a if isinstance(a, tuple) else (a, const(0))
                    self.pointer(b)
                    self.emit(off * element_bytes(b.dtype))
                    self.c.op("i32.add")

        args()
        self.c.const("i32", 0)
        args()
        self.c.op("call", self.functions[s.callee] + 1)
        self.c.op("call", self.functions[s.callee])


_PRINT: dict[type, Callable[[Any, Any], None]] = {
    Block: KernelPrinter.block, Let: KernelPrinter.let, Store: KernelPrinter.store, For: KernelPrinter.loop, If: KernelPrinter.branch_on,
    While: KernelPrinter.repeat_while, Alloc: KernelPrinter.alloc, Call: KernelPrinter.call, Barrier: KernelPrinter.barrier,
}  # fmt: skip


def const_data(funcs: Sequence[Func]) -> tuple[dict[str, int], list[tuple[int, bytes]], int]:
    """Offsets of const buffers, their data segments, and the bytes they need in all."""
    offs: dict[str, int] = {}
    segs: list[tuple[int, bytes]] = []
    at = 0
    for f in funcs:
        for name, a in f.data.items():
            if name not in offs:
                raw = np.ascontiguousarray(a).tobytes()
                offs[name] = at
                segs.append((at, raw))
                at += (len(raw) + 63) // 64 * 64
    return offs, segs, at


def legalize_wasm(f: Func) -> Func:
    """A kernel with the loop passes done, made printable: whole bytes, no 16-bit floats, vectors that fit, arithmetic that traps
    nowhere, shared parts named again."""
    g = legalize_arithmetic(split_vectors(legalize_dtype(lower_subbyte(f))))
    return f if g is f else place_lets(g)


def print_module(funcs: Sequence[Func], relaxed_simd: bool = True, shared_pages: int | None = None) -> bytes:
    """The module of some printable kernels; each exports ``name`` and ``name.range``. Kernels may ``Call`` each other.

    ``relaxed_simd``: multiply-adds may become ``relaxed_madd``. ``shared_pages``: the memory is shared and at most this many
    64 KiB pages. Raises CompilationError for what WebAssembly cannot express (a defect of the passes before)."""
    offs, segs, _ = const_data(funcs)
    index = {f.name: 2 * i for i, f in enumerate(funcs)} | {"fmod": 2 * len(funcs)}
    out: list[Function] = []
    for f in funcs:
        for s in walk_stmts(f.body):
            if isinstance(s, For) and s.kind in ("vectorize", "unroll"):
                raise CompilationError(f"loop {s.var!r} is still {s.kind}", op=f.name, hint="run the shared loop passes first")
        out.append(KernelPrinter(f, index, offs, relaxed_simd).kernel())
        out.append(KernelPrinter(f, index, offs, relaxed_simd).range())
    pages = (1, shared_pages)
    out.append(runtime_function("fmod"))
    return Module(out, segs, (("sp", "i32", True), ("data", "i32", False)), pages=pages, shared=shared_pages is not None).encode()


__all__ = ["legalize_wasm", "print_module", "const_data", "bits_of", "KernelPrinter"]
