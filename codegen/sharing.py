"""What decides how threads share a program: the work in a kernel, and which memory a place of the program may touch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from luthier.ir.expr import Expr, const, floordiv, free_vars, loads, maximum, substitute, walk
from luthier.ir.loop import Alloc, Block, For, Func, If, Let, Stmt, While, exprs_of

SMALL_WORK = 16384  # loop-IR operations below which a kernel is not worth a second thread (a hand-over costs microseconds)
THREAD_WORK = 400_000  # loop-IR operations (about a tenth of a millisecond) that a thread more is worth
UNKNOWN_TRIPS = 16  # assumed for a loop whose bounds are read from memory
UNKNOWN_EXTENT = 4096  # assumed for an extent that only the run finds


def work(s: Stmt, scalars: tuple[Expr, ...], env: dict[Expr, Expr] | None = None) -> Expr:
    """Operations of a statement over the kernel's scalars, in units of eight lanes; bounds of inner loops as in the first round
    of outer ones."""
    env = {} if env is None else env
    own = sum(max(1, e.dtype.lanes // 8) for e in walk(*exprs_of(s)) if e.op not in ("const", "var"))
    n: Expr = const(own)
    if isinstance(s, Block):
        for c in s.stmts:
            if isinstance(c, Let) and c.var.dtype.is_index:
                env[c.var] = c.value
            n = n + work(c, scalars, env)
    elif isinstance(s, For):
        lo = _resolve(s.lo, env)
        trips = maximum(_resolve(s.hi, env) - lo, const(0))
        if loads(trips) or not free_vars(trips) <= set(scalars):
            trips = const(UNKNOWN_TRIPS)
        env[s.var] = lo
        n = n + work(s.body, scalars, env) * trips
    elif isinstance(s, If):
        n = n + work(s.then, scalars, env)
        if s.orelse is not None:
            n = n + work(s.orelse, scalars, env)
    elif isinstance(s, (Alloc, While)):
        n = n + work(s.body, scalars, env)
    return n


def _resolve(e: Expr, env: dict[Expr, Expr]) -> Expr:
    """``e`` with Lets and outer loop variables replaced until none is left."""
    for _ in range(32):
        known = {v: env[v] for v in free_vars(e) if v in env}
        if not known:
            break
        e = substitute(e, known)
    return e


@dataclass(slots=True)
class KernelWork:
    """``total`` operations of a kernel, ``each`` of one iteration of its parallel loop (None: it has none), over its scalars."""

    total: Expr
    each: Expr | None

    @staticmethod
    def of(f: Func, loop: For | None) -> KernelWork:
        env: dict[Expr, Expr] = {}
        total = work(f.body, f.scalars, env)  # leaves what is bound outside the parallel loop in env
        return KernelWork(total, None if loop is None else work(loop.body, f.scalars, env))

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
