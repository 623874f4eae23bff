"""What decides how threads share a program: the work in a kernel, and which memory a place of the program may touch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from luthier.ir.expr import Expr, const, floordiv, free_vars, loads, maximum, substitute
from luthier.ir.loop import Alloc, Block, For, Func, If, Let, Stmt, Store, While, exprs_of

SMALL_WORK = 16384  # loop-IR operations below which a kernel is not worth a second thread (a hand-over costs microseconds)
THREAD_WORK = 400_000  # loop-IR operations (about a tenth of a millisecond) that a thread more is worth
UNKNOWN_TRIPS = 16  # assumed for a loop whose bounds are read from memory
UNKNOWN_EXTENT = 4096  # assumed for an extent that only the run finds


class _Operations:
    """Operations of statements over the kernel's scalars, in units of eight lanes; bounds of inner loops as in the first round
    of outer ones. ``bodies``: the count of one round of every loop."""

    def __init__(self, scalars: tuple[Expr, ...]) -> None:
        self.scalars = set(scalars)
        self.env: dict[Expr, Expr] = {}
        self.memo: dict[Expr, int] = {}
        self.bodies: dict[int, Expr] = {}

    def ops(self, e: Expr) -> int:
        n = self.memo.get(e)
        if n is None:
            n = 0 if e.op in ("const", "var") else max(1, e.dtype.lanes // 8)
            for a in e.args:
                n += self.ops(a)
            self.memo[e] = n
        return n

    def count(self, s: Stmt) -> Expr:
        own = 0
        for e in exprs_of(s):
            own += self.ops(e)
        if isinstance(s, (Let, Store)):
            return const(own)
        n: Expr = const(own)
        if isinstance(s, Block):
            plain = 0
            for c in s.stmts:
                if isinstance(c, Let) and c.var.dtype.is_index:
                    self.env[c.var] = c.value
                if isinstance(c, (Let, Store)):
                    plain += sum([self.ops(e) for e in exprs_of(c)])
                else:
                    n = n + self.count(c)
            n = n + plain
        elif isinstance(s, For):
            lo = resolve(s.lo, self.env)
            trips = maximum(resolve(s.hi, self.env) - lo, const(0))
            if loads(trips) or not free_vars(trips) <= self.scalars:
                trips = const(UNKNOWN_TRIPS)
            self.env[s.var] = lo
            self.bodies[id(s)] = once = self.count(s.body)
            n = n + once * trips
        elif isinstance(s, If):
            n = n + self.count(s.then)
            if s.orelse is not None:
                n = n + self.count(s.orelse)
        elif isinstance(s, (Alloc, While)):
            n = n + self.count(s.body)
        return n


def resolve(e: Expr, env: dict[Expr, Expr]) -> Expr:
    """``e`` with Lets and outer loop variables replaced until none is left."""
    for _ in range(32):
        known = {v: env[v] for v in free_vars(e) if v in env}
        if not known:
            break
        e = substitute(e, known)
    return e


def parallel_loop(f: Func) -> tuple[For, Expr] | None:
    """The loop that is distributed, and its extent over the kernel's scalar parameters; None when there is none.

    It must be the last statement, below pure Lets and local Allocs only; any other parallel loop runs serially."""
    env: dict[Expr, Expr] = {}
    s: Stmt = f.body
    while True:
        if isinstance(s, Block):
            *pre, last = s.stmts if s.stmts else (s,)
            for x in pre:
                if not isinstance(x, Let) or loads(x.value):
                    return None
                env[x.var] = substitute(x.value, env)
            if last is s:
                return None
            s = last
        elif isinstance(s, Alloc) and s.buf.scope == "local":
            s = s.body
        elif isinstance(s, For) and s.kind == "parallel":
            n = substitute(s.extent, env)
            known = {p for p in f.params if isinstance(p, Expr)}
            return None if loads(n) or not free_vars(n) <= known else (s, n)
        else:
            return None


@dataclass(slots=True)
class KernelWork:
    """``total`` operations of a kernel, ``each`` of one iteration of its parallel loop (None: it has none), over its scalars."""

    total: Expr
    each: Expr | None

    @staticmethod
    def of(f: Func, loop: For | None) -> KernelWork:
        counter = _Operations(f.scalars)
        total = counter.count(f.body)
        return KernelWork(total, None if loop is None else counter.bodies[id(loop)])

    def small(self, args: dict[Expr, Expr]) -> bool:
        """Whether a call with these arguments is known to be too little to share."""
        n = substitute(self.total, args)
        return n.op == "const" and int(n.attr) < SMALL_WORK

    def grain(self, args: dict[Expr, Expr], least: int) -> Expr:
        """Iterations that a chunk should have at least."""
        assert self.each is not None
        each = substitute(self.each, args)
        return maximum(floordiv(const(SMALL_WORK // 4), maximum(each, const(1))), const(max(least, 1)))


def useful_threads(shared: list[Expr], dims: set[Expr]) -> Expr:
    """How many threads the calls that can be shared are worth, over the program's dims."""
    total = const(0)
    for e in shared:
        total = total + substitute(e, {v: const(UNKNOWN_EXTENT, v.dtype) for v in free_vars(e) if v not in dims})
    return floordiv(total, const(THREAD_WORK)) + 1 if not loads(total) else const(1 << 30)


@dataclass(slots=True)
class Hazards:
    """Memory touched since the last wait, by all threads (``shared``) and by thread 0 alone; ``steering``: memory that lt_main
    itself read since the last barrier: it may not change before every thread has read it."""

    shared_read: set[Any] = field(default_factory=set)
    shared_written: set[Any] = field(default_factory=set)
    own_read: set[Any] = field(default_factory=set)
    own_written: set[Any] = field(default_factory=set)
    steering: set[Any] = field(default_factory=set)

    def conflict(self, reads: set[Any], writes: set[Any], shared: bool) -> bool:
        written = self.shared_written | self.own_written if shared else self.shared_written
        read = self.shared_read | self.own_read if shared else self.shared_read
        return bool((reads & written) or (writes & (written | read)))

    def note(self, reads: set[Any], writes: set[Any], shared: bool) -> None:
        (self.shared_read if shared else self.own_read).update(reads)
        (self.shared_written if shared else self.own_written).update(writes)

    def waited(self) -> None:
        for s in (self.shared_read, self.shared_written, self.own_read, self.own_written):
            s.clear()

    def copy(self) -> Hazards:
        return Hazards(*(set(getattr(self, f.name)) for f in fields(self)))

    def merge(self, o: Hazards) -> None:
        for f in fields(self):
            getattr(self, f.name).update(getattr(o, f.name))
