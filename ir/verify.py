"""The rules that loop IR obeys, one function each, and a checker that walks a Func with them.

``verify(func)`` checks the rules of every stage; ``after`` names flags that hold once a pass has run (``flat``,
``no_vectorize_loops``, ...), so that a pass manager can check that what a pass removed stays removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from luthier.ir.dtypes import boolean
from luthier.ir.errors import VerificationError
from luthier.ir.expr import BINARY, COMPARE, Expr, load_parts, walk
from luthier.ir.loop import (
    KINDS,
    SCOPES,
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
    exprs_of,
)
from luthier.ir.math_rules import RULES
from luthier.ir.printer import format_stmt

TRANSCENDENTAL = frozenset(RULES)  # what expand_math removes, unless the target has it


@dataclass
class Scope:
    """What is visible at a point: variables, buffers by name, and the flags asked for."""

    vars: set[Expr] = field(default_factory=set)
    bufs: dict[str, Buffer] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()
    native: frozenset[str] = frozenset()
    data: frozenset[str] = frozenset()

    def inner(self) -> Scope:
        return Scope(set(self.vars), dict(self.bufs), self.flags, self.native, self.data)


# ---------------------------------------------------------------- rules on expressions: (node, scope) -> complaint or None


def _defined(e: Expr, s: Scope) -> str | None:
    return f"variable {e.attr[0]} ({e.dtype}) is not defined here" if e.op == "var" and e not in s.vars else None


def _load_scope(e: Expr, s: Scope) -> str | None:
    return _buffer(e.attr[0], s) if e.op == "load" else None


def _load_shape(e: Expr, s: Scope) -> str | None:
    if e.op != "load":
        return None
    buf, idx, mask, other = load_parts(e)
    bad = _indices(buf, idx)
    if bad:
        return bad
    if mask is not None and (not mask.dtype.is_bool or mask.dtype.lanes not in (1, e.dtype.lanes)):
        return f"mask of {buf.name} is {mask.dtype}, expected bool of {e.dtype.lanes} lanes"
    if other is not None and other.dtype is not e.dtype:
        return f"the masked value of {buf.name} is {other.dtype}, expected {e.dtype}"
    return None


def _operands(e: Expr, s: Scope) -> str | None:
    if e.op in BINARY and (e.args[0].dtype is not e.dtype or e.args[1].dtype is not e.dtype):
        return f"{e.op} of {e.args[0].dtype} and {e.args[1].dtype} gives {e.dtype}"
    if e.op in COMPARE and e.args[0].dtype is not e.args[1].dtype:
        return f"{e.op} compares {e.args[0].dtype} with {e.args[1].dtype}"
    if e.op == "select" and (not e.args[0].dtype.is_bool or e.args[1].dtype is not e.dtype or e.args[2].dtype is not e.dtype):
        return f"select of {', '.join(str(a.dtype) for a in e.args)} gives {e.dtype}"
    if e.op == "select" and e.args[0].dtype.lanes not in (1, e.dtype.lanes):
        return f"select on {e.args[0].dtype.lanes} lanes gives {e.dtype.lanes}"
    return None


def _no_reduce(e: Expr, s: Scope) -> str | None:
    return f"{e.op} appears only in a Compute" if e.op in ("reduce", "proj") else None


def _flag_math(e: Expr, s: Scope) -> str | None:
    return f"{e.op} should have been expanded" if "no_math" in s.flags and e.op in TRANSCENDENTAL and e.dtype.is_float and e.op not in s.native else None


def _flag_subbyte(e: Expr, s: Scope) -> str | None:
    return f"{e.op} of {e.dtype}: types below 8 bits should have been lowered" if "no_subbyte" in s.flags and e.dtype.bits < 8 and not e.dtype.is_bool else None


EXPR_RULES: dict[str, Callable[[Expr, Scope], str | None]] = {
    "variables are defined before use": _defined,
    "buffers are in scope": _load_scope,
    "indices are scalars or lanes of index, one per dimension": _load_shape,
    "operand types agree": _operands,
    "no reductions in loop IR": _no_reduce,
    "flag no_math: no transcendental operators": _flag_math,
    "flag no_subbyte: no types below 8 bits": _flag_subbyte,
}


# ---------------------------------------------------------------- rules on statements


def _buffer(b: Buffer, s: Scope) -> str | None:
    seen = s.bufs.get(b.name)
    if seen is None and b.scope == "const" and b.name in s.data:
        return None
    if seen is None:
        return f"buffer {b.name} is not in scope"
    if (seen.dtype, seen.shape, seen.scope) != (b.dtype, b.shape, b.scope):
        return f"buffer {b.name} is declared as {seen} and used as {b}"
    return None


def _indices(b: Buffer, idx: tuple[Expr, ...]) -> str | None:
    if len(idx) != b.rank:
        return f"{b.name} has {b.rank} dimensions and {len(idx)} indices"
    for i in idx:
        if not i.dtype.is_index:
            return f"index {i!r} of {b.name} is {i.dtype}, expected index"
    return None


def _store(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, Store)
    bad = _buffer(s.buf, c) or _indices(s.buf, s.idx)
    if bad:
        return bad
    if not s.buf.writable or s.buf.scope == "const":
        return f"store to {s.buf.name}, which is read-only"
    lanes = max((i.dtype.lanes for i in s.idx), default=1)
    want = s.buf.dtype if lanes == 1 else s.buf.dtype.vec(lanes)
    if s.buf.dtype.lanes > 1 and lanes > 1:
        return f"{s.buf.name} holds vectors and takes scalar indices"
    if s.value.dtype is not want:
        return f"a value of {s.value.dtype} is stored to {s.buf.name}, expected {want}"
    if any(i.dtype.lanes not in (1, lanes) for i in s.idx):
        return f"the indices of {s.buf.name} differ in lanes"
    if s.mask is not None and (not s.mask.dtype.is_bool or s.mask.dtype.lanes not in (1, lanes)):
        return f"mask of {s.buf.name} is {s.mask.dtype}, expected {boolean.vec(lanes)}"
    return None


def _for(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, For)
    if s.kind not in KINDS:
        return f"no loop kind {s.kind!r}"
    if s.var.op != "var" or not s.var.dtype.is_index or s.var.dtype.lanes != 1:
        return f"loop variable {s.var!r} is {s.var.dtype}, expected a variable of type index"
    for e in (s.lo, s.hi):
        if not e.dtype.is_index or e.dtype.lanes != 1:
            return f"loop bound {e!r} is {e.dtype}, expected index"
    if s.var in c.vars:
        return f"loop variable {s.var!r} is already in use here"
    return None


def _flag_loops(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, For)
    for kind in ("vectorize", "unroll"):
        if s.kind == kind and f"no_{kind}_loops" in c.flags:
            return f"a loop of kind {kind} should be gone"
    return None


def _cond(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, (If, While))
    return None if s.cond.dtype is boolean else f"the condition is {s.cond.dtype}, expected bool"


def _let(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, Let)
    if s.var.op != "var" or s.var.dtype is not s.value.dtype:
        return f"{s.var!r} is {s.var.dtype}, its value {s.value.dtype}"
    return f"{s.var!r} is already defined here" if s.var in c.vars else None


def _alloc(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, Alloc)
    if s.buf.scope not in SCOPES or s.buf.scope == "param":
        return f"{s.buf.name} cannot be allocated in scope {s.buf.scope!r}"
    return f"buffer {s.buf.name} is already in scope" if s.buf.name in c.bufs else None


def _flag_flat(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, Alloc)
    return f"{s.buf.name} has {s.buf.rank} dimensions after flatten" if "flat" in c.flags and s.buf.rank > 1 else None


def _barrier(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, Barrier)
    return None if s.scope in ("global", "shared", "local") else f"no barrier scope {s.scope!r}"


def _call(s: Stmt, c: Scope) -> str | None:
    assert isinstance(s, Call)
    for a in s.args:
        if isinstance(a, tuple):
            bad = _buffer(a[0], c) or (None if a[1].dtype.is_index else f"offset {a[1]!r} is {a[1].dtype}, expected index")
        elif isinstance(a, Buffer):
            bad = _buffer(a, c)
        elif isinstance(a, Expr):
            bad = None if a.dtype.lanes == 1 else f"argument {a!r} has lanes"
        else:
            bad = f"argument {a!r} is neither a buffer nor an expression"
        if bad:
            return bad
    return None


STMT_RULES: tuple[tuple[str, tuple[type, ...], Callable[[Stmt, Scope], str | None]], ...] = (
    ("stores fit their buffer", (Store,), _store),
    ("loops have a legal kind, an index variable and index bounds", (For,), _for),
    ("flags no_vectorize_loops, no_unroll_loops", (For,), _flag_loops),
    ("conditions are one bool", (If, While), _cond),
    ("a Let defines a new variable of its value's type", (Let,), _let),
    ("allocations have a legal scope and a new name", (Alloc,), _alloc),
    ("flag flat: buffers have at most one dimension", (Alloc,), _flag_flat),
    ("barriers name a shared scope", (Barrier,), _barrier),
    ("call arguments are buffers in scope or scalars", (Call,), _call),
)
FLAGS = frozenset({"flat", "no_vectorize_loops", "no_unroll_loops", "no_math", "no_subbyte"})


def verify(func: Func, after: Iterable[str] = (), native: Iterable[str] = ()) -> Func:
    """Check ``func`` and return it. ``after``: flags that must hold (``FLAGS``); ``native``: transcendentals allowed under ``no_math``.

    Raises VerificationError naming the rule, the function and the statement."""
    flags = frozenset(after)
    if flags - FLAGS:
        raise VerificationError(f"no verifier flag {sorted(flags - FLAGS)}; flags are {sorted(FLAGS)}")
    top = Scope(flags=flags, native=frozenset(native), data=frozenset(func.data))
    for p in func.params:
        if isinstance(p, Expr):
            top.vars.add(p)
        elif p.name in top.bufs:
            raise VerificationError(f"{func.name}: two parameters are named {p.name}")
        else:
            top.bufs[p.name] = p
            if "flat" in flags and p.rank > 1:
                raise VerificationError(f"{func.name}: parameter {p.name} has {p.rank} dimensions after flatten")

    def fail(s: Stmt, rule: str, what: str) -> None:
        text = format_stmt(s)[0].strip()
        raise VerificationError(f"{func.name}: {what}; in `{text if len(text) < 300 else text[:300] + '...'}` (rule: {rule})")

    def visit(s: Stmt, c: Scope) -> None:
        if isinstance(s, Block):
            for x in s.stmts:
                visit(x, c)
            return
        es = (*exprs_of(s), *s.buf.shape) if isinstance(s, Alloc) else exprs_of(s)
        for e in walk(*es):
            for rule, f in EXPR_RULES.items():
                bad = f(e, c)
                if bad:
                    fail(s, rule, bad)
        for rule, types, g in STMT_RULES:
            if isinstance(s, types):
                bad = g(s, c)
                if bad:
                    fail(s, rule, bad)
        if isinstance(s, Let):
            c.vars.add(s.var)
            return
        inner = c.inner()
        if isinstance(s, For):
            inner.vars.add(s.var)
            visit(s.body, inner)
        elif isinstance(s, Alloc):
            inner.bufs[s.buf.name] = s.buf
            visit(s.body, inner)
        elif isinstance(s, While):
            visit(s.body, inner)
        elif isinstance(s, If):
            visit(s.then, inner)
            if s.orelse is not None:
                visit(s.orelse, c.inner())

    visit(func.body, top)
    return func


__all__ = ["verify", "EXPR_RULES", "STMT_RULES", "FLAGS", "TRANSCENDENTAL"]
