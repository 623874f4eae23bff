"""Helpers to write a kernel in loop IR: loops from functions, register variables, flat views of buffers, a heap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.ir.dtypes import DType, boolean, index
from luthier.ir.expr import Expr, as_expr, cast, const, free_vars, land, load, var
from luthier.ir.graph import Node
from luthier.ir.loop import Alloc, Buffer, For, Func, If, Let, Stmt, Store, While, block
from luthier.ir.op import Kernel
from luthier.ir.ops.common import product


def for_(name: str, hi: Any, body: Callable[[Expr], Stmt | None], lo: Any = 0, kind: str = "serial") -> Stmt:
    """``for name in lo..hi``; ``body`` gets the variable."""
    lo, hi = as_expr(lo), as_expr(hi)
    v = var(name, lo=0, hi=hi - 1)
    return For(v, lo, hi, kind, block(body(v)))


class Reg:
    """A register variable: ``r()`` reads, ``r.set(e)`` is the statement that writes it."""

    def __init__(self, name: str, dtype: DType = index) -> None:
        self.buf = Buffer(name, dtype, (), "local")

    def __call__(self) -> Expr:
        return load(self.buf, ())

    def set(self, e: Any) -> Stmt:
        return Store(self.buf, (), as_expr(e, self.buf.dtype))

    def add(self, e: Any = 1) -> Stmt:
        return self.set(self() + as_expr(e, self.buf.dtype))


def with_regs(regs: Sequence[Reg], body: Stmt) -> Stmt:
    """``body`` with the registers allocated around it."""
    for r in reversed(regs):
        body = Alloc(r.buf, body)
    return body


def flat(b: Buffer, size: Expr | None = None) -> Buffer:
    """A parameter seen as one dimension (``size``: its capacity where that is not its own extent)."""
    return Buffer(b.name, b.dtype, (product(b.shape) if size is None else size,), "param", b.writable)


def get(b: Buffer, i: Any) -> Expr:
    return load(b, [as_expr(i)])


def put(b: Buffer, i: Any, v: Any) -> Stmt:
    return Store(b, (as_expr(i),), cast(as_expr(v, b.dtype), b.dtype))


def kernel(
    node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer], temps: Sequence[Buffer], body: Stmt,
    symbols: dict[Expr, tuple[str, int]] | None = None, capacity: dict[str, tuple[Expr, ...]] | None = None,
) -> Kernel:
    """A Kernel whose scalar parameters are the symbols that shapes and bounds mention."""
    params: list[Buffer] = []
    for b in ins:
        if b is not None and all(b.name != p.name for p in params):
            params.append(flat(b))
    cap = capacity or {}
    params += [flat(b, product(cap[b.name]) if b.name in cap else None) for b in outs]
    params += temps
    decided = set(symbols or {})
    used = _free(body) | {v for p in params for s in p.shape for v in free_vars(s)}
    scalars = sorted(used - decided, key=lambda v: v.key)
    name = node.op.split("::")[-1].lower()
    return Kernel(Func(name, (*params, *scalars), body), temps, symbols, cap)


def _free(s: Stmt) -> set[Expr]:
    from luthier.ir.loop import children, exprs_of

    out: set[Expr] = set()
    bound: set[Expr] = {s.var} if isinstance(s, For) else set()
    for e in exprs_of(s):
        out |= free_vars(e)
    if isinstance(s, Alloc):
        for d in s.buf.shape:
            out |= free_vars(d)
    for c in children(s):
        out |= _free(c)
        if isinstance(c, Let):
            bound.add(c.var)
    return out - bound


class Heap:
    """A binary heap of positions with the least wanted on top; sorting it leaves the most wanted first.

    ``at(i)``: the entries at i, one Expr an array. ``place(i, entries)``: writes them. ``worse(a, b)``: whether entries a
    are less wanted than b (a total order makes the result unique)."""

    def __init__(
        self, at: Callable[[Expr], tuple[Expr, ...]], place: Callable[[Expr, tuple[Expr, ...]], Stmt],
        worse: Callable[[tuple[Expr, ...], tuple[Expr, ...]], Expr], types: Sequence[DType],
    ) -> None:
        self.at, self.place, self.worse = at, place, worse
        self.p, self.c, self.go = Reg("p"), Reg("c"), Reg("go", boolean)
        self.held = [Reg(f"held{k}", d) for k, d in enumerate(types)]
        self.top = [Reg(f"top{k}", d) for k, d in enumerate(types)]

    @property
    def regs(self) -> list[Reg]:
        return [self.p, self.c, self.go, *self.held, *self.top]

    def _hold(self, entries: tuple[Expr, ...], regs: list[Reg] | None = None) -> Stmt:
        return block(*(r.set(e) for r, e in zip(regs or self.held, entries, strict=True)))

    def _entry(self) -> tuple[Expr, ...]:
        return tuple(r() for r in self.held)

    def push(self, n: Expr, entries: tuple[Expr, ...]) -> Stmt:
        """Add entries to a heap of n."""
        up = (self.p() - 1) // 2
        move = block(self.place(self.p(), self.at(self.c())), self.p.set(self.c()))
        climb = While(
            land(self.go(), const(0) < self.p()),
            block(self.c.set(up), If(self.worse(self._entry(), self.at(self.c())), move, self.go.set(const(False, boolean)))),
        )
        return block(self._hold(entries), self.p.set(n), self.go.set(const(True, boolean)), climb, self.place(self.p(), self._entry()))

    def replace(self, n: Expr, entries: tuple[Expr, ...]) -> Stmt:
        """Put entries in place of the top of a heap of n."""
        c = self.c
        move = block(self.place(self.p(), self.at(c())), self.p.set(c()))
        sink = While(
            land(self.go(), self.p() * 2 + 1 < n),
            block(
                c.set(self.p() * 2 + 1),
                If(c() + 1 < n, If(self.worse(self.at(c() + 1), self.at(c())), c.add(1))),
                If(self.worse(self.at(c()), self._entry()), move, self.go.set(const(False, boolean))),
            ),
        )
        return block(self._hold(entries), self.p.set(0), self.go.set(const(True, boolean)), sink, self.place(self.p(), self._entry()))

    def sort(self, n: Expr) -> Stmt:
        """The heap of n becomes a sequence, most wanted first."""

        def step(r: Expr) -> Stmt:
            m = n - 1 - r
            return block(self._hold(self.at(const(0)), self.top), self.replace(m, self.at(m)), self.place(m, tuple(t() for t in self.top)))

        return for_("r", n - 1, step)


def tail_symbol(node: Node, suffix: str = "n") -> Expr:
    """The symbol of an extent that the kernel of ``node`` decides."""
    return var(f"{node.outputs[0].name}.{suffix}", lo=0)


__all__ = ["for_", "Reg", "with_regs", "flat", "get", "put", "kernel", "Heap", "tail_symbol"]
