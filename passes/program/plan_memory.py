"""plan_memory: which bytes of which arena slot every temporary of a Program owns.

Before: buffers ``t0[n, 64], t1[n, 64], t2[n, 64]``, each read only by the next call.
After: ``t0 -> slot 0, t1 -> slot 1, t2 -> slot 0``; a slot's size is the maximum of its members' sizes, an Expr over the
program's dims that is evaluated once per call (a constant when all shapes are static). Buffers whose shape needs a value that
is computed at run time own a dynamic slot: allocated where that value becomes known, kept by the context, grown on demand.

A buffer lives from the first to the last statement that touches it (through any view); one that a ``While`` touches lives as
long as the outermost such loop, because its contents may be carried from one round to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.ir.dtypes import DType
from luthier.ir.expr import Expr, bounds, const, floordiv, free_vars, is_const, loads, maximum, substitute
from luthier.ir.loop import Block, Buffer, Call, If, Stmt, Store, While, exprs_of
from luthier.ir.program import Program

ALIGN = 64
REFERENCE = 128  # extent assumed for an unbounded dimension when slots are chosen


@dataclass(slots=True)
class Plan:
    """``slots``: sizes in bytes, multiples of 64, Exprs over the dims; ``slot_of``: {buffer: slot}; ``dynamic``: {buffer: size in
    bytes}; ``root_of``: {buffer or view: the buffer that owns the memory}."""

    slots: list[Expr] = field(default_factory=list)
    slot_of: dict[str, int] = field(default_factory=dict)
    dynamic: dict[str, Expr] = field(default_factory=dict)
    root_of: dict[str, str] = field(default_factory=dict)

    def offsets(self) -> list[Expr]:
        """Where each slot starts in the arena; the last entry is the arena's size."""
        out = [const(0)]
        for s in self.slots:
            low = bounds(s)[0]
            out.append(out[-1] + (s if low is not None and low >= 0 else maximum(s, 0)))  # an extent of -1 moves no other slot
        return out

    def root(self, name: str) -> str:
        return self.root_of.get(name, name)


def byte_size(dtype: DType, elements: Expr) -> Expr:
    """Bytes of ``elements`` elements (sub-byte types fill whole bytes)."""
    bits = (8 if dtype.is_bool else dtype.bits) * dtype.lanes
    if bits % 8 == 0:
        return elements * (bits // 8)
    return floordiv(elements * bits + 7, const(8))


def round_up(e: Expr, align: int = ALIGN) -> Expr:
    return floordiv(e + (align - 1), const(align)) * align


def touched(s: Stmt) -> list[Buffer]:
    """Buffers that a statement itself reads or writes (children excluded)."""
    out = [e.attr[0] for x in exprs_of(s) for e in loads(x)]
    if isinstance(s, Store):
        out.append(s.buf)
    if isinstance(s, Call):
        out += [a if isinstance(a, Buffer) else a[0] for a in s.args if not isinstance(a, Expr)]
    return out


def roots(program: Program) -> dict[str, str]:
    """{view: the buffer that owns its memory}, chains followed."""
    out: dict[str, str] = {}
    for name in program.views:
        r = name
        while r in program.views and program.views[r][0] != r:
            r = program.views[r][0]
        out[name] = r
    return out


def lifetimes(program: Program, root_of: dict[str, str]) -> dict[str, tuple[int, int]]:
    """{buffer: (first, last) statement}, numbered in the order of the program."""
    spans: dict[str, tuple[int, int]] = {}
    clock = 0

    def touch(name: str, at: int) -> None:
        lo, hi = spans.get(name, (at, at))
        spans[name] = (min(lo, at), max(hi, at))

    def visit(s: Stmt) -> set[str]:
        nonlocal clock
        if isinstance(s, Block):
            return set().union(*(visit(c) for c in s.stmts)) if s.stmts else set()
        clock += 1
        start = clock
        mine = {root_of.get(b.name, b.name) for b in touched(s)}
        for n in mine:
            touch(n, clock)
        if isinstance(s, If):
            mine |= visit(s.then)
            if s.orelse is not None:
                mine |= visit(s.orelse)
        elif isinstance(s, While):
            mine |= visit(s.body)
            clock += 1
            for n in mine:
                touch(n, start)
                touch(n, clock)
        return mine

    visit(program.body)
    return spans


def plan_memory(program: Program) -> Plan:
    """Slots by best fit over lifetimes, largest buffers first. Buffers that nothing touches get no memory."""
    plan = Plan(root_of=roots(program))
    spans = lifetimes(program, plan.root_of)
    dims = set(program.dims)
    static: list[tuple[int, int, Buffer, Expr]] = []
    for k, b in enumerate(program.buffers):
        if b.name not in spans or b.name in plan.root_of:
            continue
        size = round_up(byte_size(b.dtype, b.size()))
        if free_vars(size) <= dims:
            static.append((-_reference(size), k, b, size))
        else:
            plan.dynamic[b.name] = size
    members: list[list[tuple[int, int]]] = []
    weights: list[int] = []
    for neg, _, b, size in sorted(static, key=lambda t: t[:2]):
        lo, hi = spans[b.name]
        free = [j for j, taken in enumerate(members) if all(hi < a or z < lo for a, z in taken)]
        fit = min(free, key=lambda j: (abs(weights[j] + neg), j), default=None)
        if fit is None:
            fit = len(members)
            members.append([])
            weights.append(-neg)
            plan.slots.append(size)
        else:
            plan.slots[fit] = _larger(plan.slots[fit], size)
        members[fit].append((lo, hi))
        plan.slot_of[b.name] = fit
    return plan


def _larger(a: Expr, b: Expr) -> Expr:
    if a is b or is_const(maximum(a, b) - a, 0):
        return a
    return maximum(a, b)


def _reference(size: Expr) -> int:
    """The size under reference dimensions, to order buffers."""
    env = {}
    for v in free_vars(size):
        hi = v.attr[2]
        env[v] = const(min(hi, REFERENCE) if isinstance(hi, int) else REFERENCE)
    e = substitute(size, env)
    return int(e.attr) if e.op == "const" else 0
