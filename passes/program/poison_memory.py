"""poison_memory: new memory holds nothing that could pass for a result (LUTHIER_DEBUG=poison).

Before: ``call a(x -> t); call b(t -> y)``. After: ``call poison(t); call a(x -> t); call poison(y); call b(t -> y)``, and kernels fill their
local arrays first. A place that is read before it is written, or that nobody writes, shows as NaN or as an absurd integer; without
this it holds what an earlier kernel or call left there, which is often right.

Memory of known extents is poisoned before the statement that touches it first, memory of extents that the run finds where it is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from luthier.ir.compute import Compute, axis, pull
from luthier.ir.dtypes import DType
from luthier.ir.expr import Expr, bcast, const, var
from luthier.ir.loop import (
    EMPTY,
    Alloc,
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
    block,
    map_children,
    stmts_of,
    walk_stmts,
)
from luthier.ir.program import Program
from luthier.passes.loop.lower_subbyte import is_subbyte
from luthier.passes.program.plan_memory import roots, touched

PREFIX = "poison"


def poison(dtype: DType) -> Expr:
    """What memory of ``dtype`` holds before it is written."""
    one = dtype.scalar
    value = const(float("nan") if one.is_float else True if one.is_bool else (0x5A5A5A5A & ((1 << (one.bits - 1)) - 1)), one)
    return value if dtype.lanes == 1 else bcast(value, dtype.lanes)


def poison_memory(program: Program, schedule: Callable[[Compute], Sequence[Func]]) -> Program:
    """``schedule``: kernels of a Compute."""
    return _Poisoner(program, schedule).result()


class _Poisoner:
    def __init__(self, program: Program, schedule: Callable[[Compute], Sequence[Func]]) -> None:
        self.p, self.schedule = program, schedule
        self.owner = roots(program)
        self.new = {b.name: b for b in (*program.buffers, *program.outputs)}
        self.kernels = {n: replace(f, body=_fill_locals(f.body)) for n, f in program.kernels.items()}
        self.fillers: dict[DType, tuple[str, ...]] = {}
        self.done: set[str] = set()
        self.nodes: dict[int, tuple[str, ...]] = {}
        self.old_calls = self.calls = 0

    def result(self) -> Program:
        body = self.block(self.p.body, set(self.p.dims), True)
        return replace(self.p, kernels=self.kernels, body=body, nodes=self.nodes)

    def block(self, body: Stmt | None, known: set[Expr], outermost: bool = False) -> Stmt:
        known = set(known)
        out: list[Stmt] = []
        for s in stmts_of(body):
            if outermost:
                mine = {self.owner.get(b.name, b.name) for t in walk_stmts(s) for b in touched(t)} & self.new.keys() - self.done
                for name in sorted(mine):
                    if self.new[name].symbols() <= set(self.p.dims):
                        out += self.fill(self.new[name])
            if isinstance(s, Call) and s.callee in self.p.kernels:
                if self.old_calls in self.p.nodes:
                    self.nodes[self.calls] = self.p.nodes[self.old_calls]
                self.old_calls += 1
                self.calls += 1
            if isinstance(s, If):
                s = If(s.cond, self.block(s.then, known), None if s.orelse is None else self.block(s.orelse, known))
            elif isinstance(s, While):
                s = While(s.cond, self.block(s.body, known))
            elif isinstance(s, Block):
                s = self.block(s, known, outermost)
            out.append(s)
            if isinstance(s, Let):
                known.add(s.var)
                for b in self.new.values():
                    if s.var in b.symbols() and b.symbols() <= known:
                        out += self.fill(b)
        return block(*out) if out else EMPTY

    def fill(self, b: Buffer) -> list[Stmt]:
        self.done.add(b.name)
        if is_subbyte(b.dtype):
            return []  # no value of theirs is absurd
        names = self.fillers.get(b.dtype)
        n = var("n")
        if names is None:
            c = Compute(f"{PREFIX}_{b.dtype}", (), (n,), (pull("o0", [axis("i", n)], poison(b.dtype)),), ("o0",))
            made = [replace(f, name=f"{PREFIX}_{b.dtype}_{k}") for k, f in enumerate(self.schedule(c))]
            self.kernels |= {f.name: f for f in made}
            names = self.fillers[b.dtype] = tuple(f.name for f in made)
        out: list[Stmt] = []
        for name in names:
            self.nodes[self.calls] = (f"{PREFIX} {b.name}",)
            self.calls += 1
            out.append(Call(name, tuple(b if isinstance(q, Buffer) else b.size() for q in self.kernels[name].params)))
        return out


def _fill_locals(s: Stmt) -> Stmt:
    if isinstance(s, Alloc) and s.buf.scope == "local":
        b, body = s.buf, _fill_locals(s.body)
        loops = [var(f"{b.name}.{PREFIX}{k}", lo=0) for k in range(b.rank)]
        fill: Stmt = Store(b, tuple(loops), poison(b.dtype))
        for v, e in reversed(list(zip(loops, b.shape, strict=True))):
            fill = For(v, const(0), e, "serial", fill)
        return Alloc(b, block(fill, body))
    return map_children(s, _fill_locals)
