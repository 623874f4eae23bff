"""A Program executed by the loop-IR interpreter: slow, exact about the rules, the oracle between graph and machine code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.ir.errors import InputError, KernelError
from luthier.ir.expr import Expr, load_parts, walk
from luthier.ir.interpret.loops import evaluate_expr, run_func
from luthier.ir.loop import Block, Buffer, Call, If, Let, Stmt, Store, While, stmts_of
from luthier.ir.program import Program

Array = np.ndarray[Any, Any]
MAX_ROUNDS = 1_000_000
POISON = 0xFF  # what new memory holds: NaN, -1


def run_program(program: Program, feeds: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs by the names that callers use. Raises InputError for a missing input, KernelError for what a kernel reports."""
    return _Run(program, feeds).result()


class _Run:
    def __init__(self, program: Program, feeds: Mapping[str, Any]) -> None:
        self.p = program
        self.env: dict[Expr, Any] = {}
        self.memory: dict[str, Array] = dict(program.constants)
        self.declared: dict[str, Buffer] = {b.name: b for b in (*program.buffers, *program.outputs)}
        self.sized: dict[Expr, list[str]] = {}
        for b in self.declared.values():
            for v in b.symbols():
                self.sized.setdefault(v, []).append(b.name)
        for b in program.inputs:
            if b.name not in feeds:
                raise InputError(f"input {b.name!r} is missing; expected {[x.name for x in program.inputs]}")
            self.memory[b.name] = np.ascontiguousarray(np.asarray(feeds[b.name]).astype(b.dtype.numpy, copy=False))
        for s, (i, k) in program.dims.items():
            self.env[s] = self.memory[program.inputs[i].name].shape[k]

    def result(self) -> dict[str, Array]:
        self.run(self.p.body)
        out = {}
        for b in self.p.outputs:
            shape = tuple(int(self.value(s)) for s in b.shape)
            out[self.p.output_names.get(b.name, b.name)] = self.array(b).reshape(-1)[: int(np.prod(shape))].reshape(shape)
        return out

    def value(self, e: Expr) -> Any:
        env: dict[Any, Any] = dict(self.env)
        for t in walk(e):
            if t.op == "load":
                env[load_parts(t)[0].name] = self.array(load_parts(t)[0]).reshape(-1)
        return evaluate_expr(e, env)[()]

    def array(self, b: Buffer) -> Array:
        """The memory behind a buffer, from its offset on."""
        root, offset = self.p.views.get(b.name, (b.name, None))
        a = self.memory.get(root)
        if a is None:
            d = self.declared.get(root)
            if d is None:
                raise KernelError(f"buffer {root!r} is neither declared nor computed")
            known = d.symbols() <= self.env.keys()  # memory that no round of a loop has asked for is empty
            size = int(np.prod([int(self.value(s)) for s in d.shape], dtype=np.int64)) if known else 0
            a = self.memory[root] = np.empty(size, d.dtype.numpy)
            a.view(np.uint8)[:] = POISON
        flat = a.reshape(-1)
        return flat if offset is None else flat[int(self.value(offset)) :]

    def argument(self, a: Any) -> Array:
        """An array for a kernel's parameter."""
        if isinstance(a, tuple):
            return self.array(a[0])[int(self.value(a[1])) :]
        return self.array(a)

    def run(self, s: Stmt) -> None:
        if isinstance(s, Block):
            for c in stmts_of(s):
                self.run(c)
        elif isinstance(s, Let):
            v = self.value(s.value)
            self.env[s.var] = float(v) if s.var.dtype.is_float else int(v)
            for name in self.sized.get(s.var, ()):  # memory of these extents is found now
                self.memory.pop(name, None)
        elif isinstance(s, Store):
            self.array(s.buf)[int(self.value(s.idx[0]))] = self.value(s.value)
        elif isinstance(s, If):
            if bool(self.value(s.cond)):
                self.run(s.then)
            elif s.orelse is not None:
                self.run(s.orelse)
        elif isinstance(s, While):
            rounds = 0
            while bool(self.value(s.cond)):
                self.run(s.body)
                rounds += 1
                if rounds > MAX_ROUNDS:
                    raise KernelError("a loop ran for more than a million rounds")
        elif isinstance(s, Call):
            self.call(s)
        else:
            raise KernelError(f"a program cannot hold {type(s).__name__}")

    def call(self, s: Call) -> None:
        if s.callee == "lt.check":
            got, want = (int(self.value(a)) for a in s.args)
            if got != want:
                raise KernelError(f"{dict(s.attrs).get('what', 'an extent')} is {got}, the model needs {want} here")
            return
        f = self.p.kernels[s.callee]
        scalars, arrays = {}, {}
        for p, a in zip(f.params, s.args, strict=True):
            if isinstance(p, Expr):
                v = self.value(a)
                scalars[p] = float(v) if p.dtype.is_float else int(v)
        for p, a in zip(f.params, s.args, strict=True):
            if isinstance(p, Buffer):
                env = {**self.env, **scalars}
                shape = tuple(int(evaluate_expr(e, env)) for e in p.shape)
                flat = self.argument(a)
                n = int(np.prod(shape, dtype=np.int64))
                if flat.size < n:
                    raise KernelError(f"{s.callee}: buffer {p.name} needs {n} elements, got {flat.size}")
                arrays[p.name] = flat[:n].reshape(shape)
        run_func(f, arrays, scalars)
