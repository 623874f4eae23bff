"""The loop IR: what schedules produce, shared passes rewrite and every backend prints.

::

    Func = func name(params) body
    Stmt = For(var, lo, hi, kind, body)      # lo <= var < hi, step 1; bounds are read once; kinds below
         | While(cond, body)                 # cond is re-evaluated before each round
         | If(cond, then, orelse)
         | Let(var, value)                   # names a value for the rest of the enclosing Block
         | Store(buf, idx, value, mask)      # lanes of idx and value agree; a false lane of mask makes no access
         | Alloc(buf, body)                  # buf lives in its scope while body runs
         | Call(callee, args)                # a kernel (Func by name), a runtime function or an instruction with effects
         | Barrier(scope)                    # all threads that share `scope` arrive; their stores are visible afterwards
         | Block(stmts)

``For.kind``: ``serial``, ``parallel`` (iterations independent, distributed over threads), ``vectorize`` (iterations
independent, become lanes), ``unroll``, ``block.x|y|z`` and ``thread.x|y|z`` (GPU grid and group), ``subgroup`` (all threads of a
group run it alike, to merge the same partial results into an accumulator that holds the neutral element before),
``matrix`` (a reduction whose products a subgroup may compute together, with matrix instructions).
``Buffer.scope``: ``param`` (argument), ``global`` (scratch in the arena), ``shared`` (one per thread group), ``local`` (one
per thread; rank 0 means a register variable, possibly of vector type), ``const`` (compile-time data).
A buffer is dense and row-major over ``shape``; after ``flatten`` it has one dimension and one index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, types_in
from luthier.ir.expr import Expr, as_expr, free_vars, is_const, load, rewrite, substitute

KINDS = ("serial", "parallel", "vectorize", "unroll", "block.x", "block.y", "block.z", "thread.x", "thread.y", "thread.z", "subgroup", "matrix")
SCOPES = ("param", "global", "shared", "local", "const")


@dataclass(frozen=True, slots=True)
class Buffer:
    """A dense array. ``shape``: Exprs (elements). ``writable``: False promises that no kernel stores to it."""

    name: str
    dtype: DType
    shape: tuple[Expr, ...]
    scope: str = "param"
    writable: bool = True

    @staticmethod
    def of(name: str, dtype: DType, shape: Any, scope: str = "param", writable: bool = True) -> Buffer:
        return Buffer(name, dtype, tuple(as_expr(s) for s in shape), scope, writable)

    @property
    def rank(self) -> int:
        return len(self.shape)

    def size(self) -> Expr:
        """Number of elements."""
        n = as_expr(1)
        for s in self.shape:
            n = n * s
        return n

    def symbols(self) -> set[Expr]:
        """Variables of the extents; the size may have fewer, where one extent is 0."""
        return set().union(*(free_vars(s) for s in self.shape))

    def __getitem__(self, idx: Any) -> Expr:
        return load(self, idx if isinstance(idx, tuple) else (idx,))


@dataclass(frozen=True, slots=True)
class For:
    var: Expr
    lo: Expr
    hi: Expr
    kind: str
    body: Stmt

    @property
    def extent(self) -> Expr:
        return self.hi - self.lo


@dataclass(frozen=True, slots=True)
class While:
    cond: Expr
    body: Stmt


@dataclass(frozen=True, slots=True)
class If:
    cond: Expr
    then: Stmt
    orelse: Stmt | None = None


@dataclass(frozen=True, slots=True)
class Let:
    var: Expr
    value: Expr


@dataclass(frozen=True, slots=True)
class Store:
    buf: Buffer
    idx: tuple[Expr, ...]
    value: Expr
    mask: Expr | None = None


@dataclass(frozen=True, slots=True)
class Alloc:
    buf: Buffer
    body: Stmt


@dataclass(frozen=True, slots=True)
class Call:
    """``args``: Exprs (scalars) or Buffers, optionally (Buffer, offset Expr) to pass an interior pointer."""

    callee: str
    args: tuple[Any, ...]
    attrs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Barrier:
    scope: str


@dataclass(frozen=True, slots=True)
class Block:
    stmts: tuple[Stmt, ...]


Stmt = For | While | If | Let | Store | Alloc | Call | Barrier | Block


@dataclass(frozen=True, slots=True)
class Func:
    """A kernel. ``params``: Buffers (scope param) and scalar variables. ``data``: contents of const buffers by name."""

    name: str
    params: tuple[Any, ...]
    body: Stmt
    attrs: dict[str, Any] = field(default_factory=dict, compare=False)
    data: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict, compare=False)

    def with_body(self, body: Stmt) -> Func:
        return replace(self, body=body)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return tuple(p for p in self.params if isinstance(p, Buffer))

    @property
    def scalars(self) -> tuple[Expr, ...]:
        return tuple(p for p in self.params if isinstance(p, Expr))


def block(*stmts: Stmt | None) -> Stmt:
    """A Block with nested Blocks spliced and None dropped; a single statement stays itself."""
    out: list[Stmt] = []
    for s in stmts:
        if isinstance(s, Block):
            out.extend(s.stmts)
        elif s is not None:
            out.append(s)
    return out[0] if len(out) == 1 else Block(tuple(out))


EMPTY = Block(())


def stmts_of(s: Stmt | None) -> tuple[Stmt, ...]:
    return () if s is None else s.stmts if isinstance(s, Block) else (s,)


def children(s: Stmt) -> tuple[Stmt, ...]:
    t = type(s)
    if t is Store or t is Let:
        return ()
    if t is Block:
        return s.stmts  # type: ignore[union-attr]
    if t is If:
        return (s.then,) if s.orelse is None else (s.then, s.orelse)  # type: ignore[union-attr]
    return (s.body,) if t in (For, While, Alloc) else ()  # type: ignore[union-attr]


def exprs_of(s: Stmt) -> tuple[Expr, ...]:
    """Expressions evaluated by this statement itself, in order of evaluation (children excluded)."""
    if isinstance(s, Store):
        return (*s.idx, s.value) if s.mask is None else (*s.idx, s.value, s.mask)
    if isinstance(s, For):
        return (s.lo, s.hi)
    if isinstance(s, (While, If)):
        return (s.cond,)
    if isinstance(s, Let):
        return (s.value,)
    if isinstance(s, Call):
        out: list[Expr] = []
        for a in s.args:
            if isinstance(a, Expr):
                out.append(a)
            elif isinstance(a, tuple):
                out.append(a[1])
        return tuple(out)
    return ()


def walk_stmts(s: Stmt) -> Iterator[Stmt]:
    """Every statement, outside in."""
    stack = [s]
    while stack:
        s = stack.pop()
        yield s
        c = children(s)
        if c:
            stack.extend(reversed(c))


def loads_of(s: Stmt) -> set[Expr]:
    """Every distinct load that a statement and its children evaluate."""
    out: set[Expr] = set()
    seen: set[Expr] = set()
    stack: list[Expr] = []
    for x in walk_stmts(s):
        stack.extend([e for e in exprs_of(x) if e.loading])
    while stack:
        e = stack.pop()
        if e not in seen:
            seen.add(e)
            if e.op == "load":
                out.add(e)
            stack.extend([a for a in e.args if a.loading])
    return out


@dataclass(frozen=True, slots=True)
class Contents:
    """What a statement and its children hold: types of expressions, what is allocated, whether anything is called."""

    dtypes: frozenset[DType]
    allocated: tuple[Buffer, ...]
    calls: bool


_contents: tuple[Stmt, Contents] | None = None  # passes that change nothing ask about one statement in turn


def contents_of(s: Stmt) -> Contents:
    global _contents
    if _contents is not None and _contents[0] is s:
        return _contents[1]
    allocated: list[Buffer] = []
    calls = False
    types = 0
    todo: list[Any] = [s]
    while todo:
        x = todo.pop()
        t = type(x)
        if t is Block:
            todo.extend(x.stmts)
        elif t is Store:
            types |= x.value.types
            for i in x.idx:
                types |= i.types
            if x.mask is not None:
                types |= x.mask.types
        elif t is Let:
            types |= x.value.types
        elif t is Alloc:
            allocated.append(x.buf)
            todo.append(x.body)
        else:
            calls = calls or t is Call
            for e in exprs_of(x):
                types |= e.types
            todo.extend(children(x))
    out = Contents(types_in(types), tuple(allocated), calls)
    _contents = s, out
    return out


def nodes_of(s: Stmt) -> set[Expr]:
    """Every distinct expression node in a statement and its children; of index arithmetic without loads only the root."""
    stack: list[Expr] = []
    for x in walk_stmts(s):
        stack.extend(exprs_of(x))
    seen: set[Expr] = set()
    while stack:
        e = stack.pop()
        if e not in seen:
            seen.add(e)
            if e.loading or not e.dtype.is_index or e.dtype.lanes > 1:
                stack.extend(e.args)
    return seen


def map_children(s: Stmt, fn: Callable[[Stmt], Stmt | None]) -> Stmt:
    """``s`` with each child statement replaced (None removes it)."""
    if isinstance(s, (For, While, Alloc)):
        b = fn(s.body)
        if b is s.body:
            return s
        if b is None:
            b = EMPTY
        return For(s.var, s.lo, s.hi, s.kind, b) if isinstance(s, For) else Alloc(s.buf, b) if isinstance(s, Alloc) else While(s.cond, b)
    if isinstance(s, If):
        t = fn(s.then)
        e = None if s.orelse is None else fn(s.orelse)
        return s if t is s.then and e is s.orelse else If(s.cond, EMPTY if t is None else t, e)
    if isinstance(s, Block):
        out = [fn(c) for c in s.stmts]
        if all(x is y for x, y in zip(out, s.stmts, strict=True)):
            return s
        return block(*out)
    return s


def map_own_exprs(s: Stmt, fn: Callable[[Expr], Expr]) -> Stmt:
    """``s`` with ``fn`` applied to each whole expression that it evaluates itself; a store whose mask becomes true loses it."""
    if isinstance(s, Store):
        m = None if s.mask is None else fn(s.mask)
        return Store(s.buf, tuple([fn(i) for i in s.idx]), fn(s.value), None if m is None or is_const(m, True) else m)
    if isinstance(s, Let):
        return Let(s.var, fn(s.value))
    if isinstance(s, For):
        return For(s.var, fn(s.lo), fn(s.hi), s.kind, s.body)
    if isinstance(s, While):
        return While(fn(s.cond), s.body)
    if isinstance(s, If):
        return If(fn(s.cond), s.then, s.orelse)
    if isinstance(s, Call):
        return Call(s.callee, tuple(fn(a) if isinstance(a, Expr) else (a[0], fn(a[1])) if isinstance(a, tuple) else a for a in s.args), s.attrs)
    return s


def map_exprs(s: Stmt, fn: Callable[[Expr], Expr]) -> Stmt:
    """``s`` with ``fn`` applied to each whole expression that it and its children evaluate."""
    if isinstance(s, Block):
        return block(*[map_exprs(c, fn) for c in s.stmts])
    s = map_own_exprs(s, fn)
    if isinstance(s, (Store, Let)):
        return s
    return map_children(s, lambda c: map_exprs(c, fn))


def rewrite_stmt(s: Stmt, fn: Callable[[Expr], Expr | None]) -> Stmt:
    """Bottom-up expression rewriting (see :func:`luthier.ir.expr.rewrite`) in every statement, one memo for all."""
    memo: dict[Expr, Expr] = {}
    return map_exprs(s, lambda e: rewrite(e, fn, memo))


def substitute_stmt(s: Stmt, env: dict[Expr, Expr]) -> Stmt:
    return map_exprs(s, lambda e: substitute(e, env)) if env else s
