"""A whole Program as one WebAssembly module: its kernels, the runtime, and ``lt_bind``, ``lt_run`` and ``main`` around them.

The interface is described in ``docs/web.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from luthier.codegen.program.steps import Layout, steps
from luthier.codegen.wasm.encoder import Function, Module
from luthier.codegen.wasm.host import BindPrinter
from luthier.codegen.wasm.layout import Memory, describe, stack_bytes
from luthier.codegen.wasm.printer import KernelPrinter, legalize_wasm
from luthier.codegen.wasm.scalar import valtype
from luthier.codegen.wasm.steps import MainPrinter
from luthier.codegen.wasm.text import GLOBALS, assemble, runtime_function, source
from luthier.ir.errors import CompilationError, LuthierError
from luthier.ir.loop import Buffer, For, Func, walk_stmts
from luthier.ir.program import Program


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
        functions.append(MainPrinter(self, "main").print_main(self.steps))
        functions.append(BindPrinter(self, "lt_bind", ["i32"]).print_bind(self.steps))
        functions.append(BindPrinter(self, "lt_run", ["i32", "i32"]).print_run())
        exports = ["lt_bind", "lt_run", *(("lt_worker", "lt_stop") if threads else ())]
        module = Module(
            functions, globals=(0,) * len(GLOBALS), hooks=(("mark", ("i32",)),) if profile else (), exports={n: self.index[n] for n in exports},
            pages=(self.memory.pages, self.memory.max_pages if threads else None), shared=threads, names=profile,
        )  # fmt: skip
        return Binary(module.encode(), list(self._names), self.steps.calls, bool(self.steps.shared_work), sizes)


def print_program(program: Program, relaxed: bool = True, threads: bool = False) -> Binary:
    """One variant of the module of ``program``."""
    return ProgramPrinter(program).print(relaxed, threads)


__all__ = ["Binary", "ProgramPrinter", "print_program"]
