"""The printer that WGSL and CUDA C++ share: expressions and statements of C-like syntax over scalar loop IR.

Vectors must have been taken apart (``scalarize``); whole ones are only loaded, stored, put together and taken apart
(``combine_accesses``). A subclass says how types, constants, conversions, buffers and the few
operators that differ are written; what an operator means is kept exactly (:mod:`luthier.ir.expr`): NaN in ``min`` and ``max``,
saturating conversions, wrapping narrow integers. Zero divisors and shifts of the
width or more are gone (``legalize_arithmetic``).

GPU loops: all ``block.*`` loops together are the grid and all ``thread.*`` loops of one dimension share the group's size (the
largest extent); a shorter one is guarded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from luthier.codegen.program.ranges import most_elements
from luthier.ir.dtypes import DType
from luthier.ir.errors import CompilationError
from luthier.ir.expr import COMPARE, Expr, bounds, const, free_vars, load_parts, prove, substitute
from luthier.ir.loop import Alloc, Barrier, Block, Buffer, Call, For, Func, If, Let, Stmt, Store, While, exprs_of, walk_stmts
from luthier.passes.gpu.spread_subgroups import merge_of

_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
_COMPARE = {"lt": "<", "le": "<=", "eq": "==", "ne": "!="}


class CStyle:
    """One function as text. ``keywords``: names that the language forbids."""

    keywords: ClassVar[frozenset[str]] = frozenset()
    target: ClassVar[str] = ""

    def __init__(self, f: Func) -> None:
        self.f = f
        self.names: dict[Any, str] = {}
        self.used: set[str] = set(self.keywords)
        self.lines: list[str] = []
        self.depth = 1
        self.declared: set[str] = set()
        self.declared_size: dict[str, Expr] = {}
        self.grid: dict[str, Expr] = {}
        self.group: dict[str, int] = {}
        self.find_launch()
        self.live = live_variables(f)
        self.hoist = True  # False where nothing may stand before the expression at hand

    # ------------------------------------------------------------ what a language decides

    def type(self, d: DType) -> str:
        raise NotImplementedError

    def literal(self, v: Any, d: DType) -> str:
        raise NotImplementedError

    def vector(self, parts: Sequence[str], d: DType) -> str:
        """Scalars as one vector of type ``d``."""
        raise NotImplementedError

    def convert(self, x: str, s: DType, d: DType) -> str:
        raise NotImplementedError

    def reinterpret(self, x: str, s: DType, d: DType) -> str:
        raise NotImplementedError

    def choose(self, c: str, a: str, b: str) -> str:
        """``a`` where ``c``, else ``b``; both are harmless to evaluate."""
        raise NotImplementedError

    def masked_load(self, c: str, a: str, b: str) -> str:
        """``a`` is a load that is only valid where ``c``."""
        raise NotImplementedError

    def wrap(self, x: str, d: DType) -> str:
        """The result of integer arithmetic back into the range of ``d``."""
        raise NotImplementedError

    def math(self, op: str, x: str, d: DType) -> str | None:
        """A unary float operator or popcount."""
        raise NotImplementedError

    def shift_amount(self, x: str) -> str:
        return x

    def arithmetic(self, op: str, a: str, b: str, d: DType) -> str:
        """add, sub, mul with wrap-around, before ``wrap``."""
        return f"({a} {_INFIX[op]} {b})"

    def read(self, b: Buffer, i: str) -> str:
        return f"{self.name(b.name)}[{i}]"

    def write(self, b: Buffer, i: str, v: str) -> str:
        return f"{self.name(b.name)}[{i}] = {v};"

    def declare(self, name: str, d: DType, v: str) -> str:
        raise NotImplementedError

    def declare_register(self, b: Buffer) -> str:
        raise NotImplementedError

    def declare_array(self, b: Buffer, n: int) -> str:
        raise NotImplementedError

    def let(self, v: Expr, value: str) -> str:
        """A variable of the function."""
        return self.declare(self.name(v), v.dtype, value)

    def for_head(self, v: Expr, lo: str, hi: str) -> str:
        raise NotImplementedError

    def barrier(self, scope: str) -> str:
        raise NotImplementedError

    def position(self, kind: str) -> str:
        """The value of ``block.x`` and so on, as an index."""
        raise NotImplementedError

    def instruction(self, e: Expr) -> str:
        """A pure intrinsic."""
        raise CompilationError(f"{self.target}: no instruction for {e.attr[0]}", op=self.f.name)

    def effect(self, s: Call) -> str:
        raise CompilationError(f"{self.target}: no instruction for {s.callee}", op=self.f.name)

    def zero(self, d: DType) -> str:
        return self.literal(False if d.is_bool else 0.0 if d.is_float else 0, d)

    # ------------------------------------------------------------ names and launch

    def name(self, key: Any) -> str:
        """A legal, unique name for a variable (Expr) or buffer (its name)."""
        n = self.names.get(key)
        if n is None:
            base = re.sub(r"[^A-Za-z0-9_]", "_", key.attr[0] if isinstance(key, Expr) else key)
            base = re.sub(r"__+", "_", base).strip("_") or "v"
            if not base[0].isalpha():
                base = "v" + base
            n, k = base, 1
            while n in self.used:
                n, k = f"{base}_{k}", k + 1
            self.used.add(n)
            self.names[key] = n
        return n

    def find_launch(self) -> None:
        """Grid extents (Exprs of the scalar parameters) and group sizes."""
        for s in walk_stmts(self.f.body):
            if not isinstance(s, For) or "." not in s.kind:
                continue
            if s.kind.startswith("block"):
                e = self.scalar_form(s.extent)
                old = self.grid.get(s.kind)
                if old is not None and old is not e:
                    raise CompilationError(f"two {s.kind} loops differ in extent: {old!r} and {e!r}", op=self.f.name)
                self.grid[s.kind] = e
            else:
                hi = s.extent.attr if s.extent.op == "const" else bounds(s.extent)[1]
                if hi is None:
                    raise CompilationError(f"{s.kind} loop {s.var!r} has no constant bound", op=self.f.name)
                self.group[s.kind] = max(self.group.get(s.kind, 1), hi)

    def scalar_form(self, e: Expr) -> Expr:
        """``e`` over the function's parameters only: Lets on the way are put in."""
        lets = {s.var: s.value for s in walk_stmts(self.f.body) if isinstance(s, Let)}
        while free_vars(e) & lets.keys():
            e = substitute(e, lets)
        return e

    # ------------------------------------------------------------ expressions

    def expr(self, e: Expr) -> str:
        op, d = e.op, e.dtype
        if d.lanes > 1 and op not in ("var", "load", "shuffle", "bcast", "call", "select"):
            raise CompilationError(f"{self.target}: vector {e!r}", op=self.f.name, hint="scalarize first")
        if op == "extract":
            return f"{self.expr(e.args[0])}.{'xyzw'[e.attr]}"
        if op == "bcast":
            return self.vector([self.expr(e.args[0])] * d.lanes, d)
        if op == "shuffle":
            return self.vector([self.expr(x) for x in e.args], d)
        if op == "const":
            return self.literal(e.attr, d)
        if op == "var":
            return self.name(e)
        if op == "load":
            buf, idx, m, o = load_parts(e)
            if buf.rank and outside(buf, idx[0]):  # never reached: some languages refuse the index even so
                return self.zero(d) if o is None else self.expr(o)
            x = self.name(buf.name) if buf.rank == 0 else self.read(buf, self.expr(idx[0]))
            if m is not None and m.op == "bcast":
                m = m.args[0]
            return x if m is None or o is None else self.masked_load(self.expr(m), x, self.expr(o))
        if op == "call":
            return self.instruction(e)
        a = [self.expr(x) for x in e.args]
        s = e.args[0].dtype
        if op in COMPARE:
            return f"({a[0]} {_COMPARE[op]} {a[1]})"
        if op == "select":
            return self.choose(a[0], a[1], a[2])
        if op == "cast":
            return self.convert(self.once(a[0], s) if s.is_float and not d.is_float and not d.is_bool else a[0], s, d)
        if op == "bitcast":
            return self.reinterpret(a[0], s, d)
        if len(a) == 1:
            return self.unary(e, a[0])
        return self.binary(e, a[0], a[1])

    def unary(self, e: Expr, x: str) -> str:
        op, d = e.op, e.dtype
        if op == "not":
            return f"(!{x})" if d.is_bool else self.wrap(f"(~{x})", d)
        if op == "isnan":
            return self.math(op, x, e.args[0].dtype) or f"({x} != {x})"
        if op == "neg":
            return f"(-{x})" if d.is_float else self.wrap(self.arithmetic("sub", self.zero(d), x, d), d)
        if op == "abs" and not d.is_float:
            x = self.once(x, d) if d.is_signed else x
            return x if not d.is_signed else self.choose(f"({x} < {self.zero(d)})", self.wrap(self.arithmetic("sub", self.zero(d), x, d), d), x)
        r = self.math(op, x, e.args[0].dtype)
        if r is None:
            raise CompilationError(f"{self.target}: {op} must be expanded first: {e!r}", op=self.f.name)
        return r

    def once(self, x: str, d: DType) -> str:
        """``x`` as text that may be repeated: a name, where it is long."""
        if not self.hoist or len(x) <= 12 or re.fullmatch(r"\w+", x):
            return x
        v = self.name(f"u{len(self.used)}")
        self.put(self.declare(v, d, x))
        return v

    def binary(self, e: Expr, a: str, b: str) -> str:
        op, d = e.op, e.dtype
        if op in ("min", "max"):
            a, b = self.once(a, d), self.once(b, d)
            return self.choose(f"({a} {'<' if op == 'min' else '>'} {b})", a, b)
        if op in ("and", "or", "xor"):
            if d.is_bool:
                return f"({a} != {b})" if op == "xor" else f"({a} {'&&' if op == 'and' else '||'} {b})"
            return f"({a} {_INFIX[op]} {b})"
        if op in _INFIX:
            return f"({a} {_INFIX[op]} {b})" if d.is_float or d.is_index else self.wrap(self.arithmetic(op, a, b, d), d)
        if op == "div" and d.is_float:
            return f"({a} / {b})"
        if op in ("shl", "shr"):
            r = f"({a} {'<<' if op == 'shl' else '>>'} {self.shift_amount(b)})"
            return self.wrap(r, d) if op == "shl" else r
        if op in ("div", "rem", "floordiv", "mod") and not d.is_float:
            return f"({a} {'/' if op in ('div', 'floordiv') else '%'} {b})"
        if op == "rem":
            return self.remainder(a, b, d)
        raise CompilationError(f"{self.target}: {op} must be expanded first: {e!r}", op=self.f.name)

    def remainder(self, a: str, b: str, d: DType) -> str:
        """C's ``fmod`` of floats, which is exact."""
        raise NotImplementedError

    # ------------------------------------------------------------ statements

    def put(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    def body(self, s: Stmt) -> None:
        self.depth += 1
        self.stmt(s)
        self.depth -= 1

    def stmt(self, s: Stmt) -> None:
        if isinstance(s, Block):
            for c in s.stmts:
                self.stmt(c)
        elif isinstance(s, Let):
            if s.var not in self.live:
                return
            v = self.expr(s.value)
            self.put(self.let(s.var, v))
        elif isinstance(s, Store):
            if s.buf.rank and outside(s.buf, s.idx[0]):
                return
            v = self.expr(s.value)
            line = f"{self.name(s.buf.name)} = {v};" if s.buf.rank == 0 else self.write(s.buf, self.expr(s.idx[0]), v)
            self.put(line if s.mask is None else f"if ({self.expr(s.mask)}) {{ {line} }}")
        elif isinstance(s, For):
            self.loop(s)
        elif isinstance(s, If):
            self.put(f"if ({self.expr(s.cond)}) {{")
            self.body(s.then)
            if s.orelse is not None:
                self.put("} else {")
                self.body(s.orelse)
            self.put("}")
        elif isinstance(s, While):
            self.hoist = False
            cond = self.expr(s.cond)
            self.hoist = True
            self.put(f"while ({cond}) {{")
            self.body(s.body)
            self.put("}")
        elif isinstance(s, Alloc):
            self.alloc(s)
        elif isinstance(s, Barrier):
            self.put(self.barrier(s.scope))
        elif isinstance(s, Call):
            self.put(self.effect(s))
        else:
            raise TypeError(s)

    def loop(self, s: For) -> None:
        if s.kind == "subgroup":
            merge = merge_of(s)
            if merge is not None and self.share(s, *merge):
                return
        if s.kind in ("vectorize", "unroll"):
            raise CompilationError(f"loop {s.var!r} is still {s.kind}", op=self.f.name, hint="run the shared loop passes first")
        if "." in s.kind:
            at = self.position(s.kind)
            lo = "" if s.lo.op == "const" and s.lo.attr == 0 else f" + {self.expr(s.lo)}"
            self.put(self.let(s.var, f"{at}{lo}"))
            short = s.kind.startswith("thread") and not prove(const(self.group[s.kind]) <= s.extent)
            if short:
                if any(isinstance(x, Barrier) for x in walk_stmts(s.body)):
                    raise CompilationError(f"a barrier inside {s.kind} loop {s.var!r}, which not all threads run", op=self.f.name)
                self.put(f"if ({self.name(s.var)} < {self.expr(s.hi)}) {{")
                self.body(s.body)
                self.put("}")
            else:
                self.stmt(s.body)
            return
        hi = self.expr(s.hi)
        if s.hi.op not in ("const", "var"):
            h = self.name(f"{s.var.attr[0]}.end~{len(self.used)}")
            self.put(self.declare(h, s.var.dtype, hi))
            hi = h
        self.put(self.for_head(s.var, self.expr(s.lo), hi) + " {")
        self.body(s.body)
        self.put("}")

    def share(self, s: For, acc: Buffer, op: str) -> bool:
        """A loop of kind ``subgroup``, its rounds shared out to the lanes of each subgroup. False where the language has none."""
        return False

    def alloc(self, s: Alloc) -> None:
        b = s.buf
        again = b.name in self.declared  # by unrolling: a scope of its own
        self.declared.add(b.name)
        if again and b.scope != "shared":
            self.put("{")
            self.depth += 1
        elif again:
            if self.declared_size[b.name] is not b.size():
                raise CompilationError(f"{self.target}: shared buffer {b.name} has two sizes", op=self.f.name)
            self.stmt(s.body)
            return
        self.declared_size[b.name] = b.size()
        if b.rank == 0:
            self.put(self.declare_register(b))
        else:
            n = most_elements(b)
            if n is None:
                raise CompilationError(f"{self.target}: buffer {b.name} has the run-time size {b.size()!r}", op=self.f.name)
            line = self.declare_array(b, n)
            if line:
                self.put(line)
        self.stmt(s.body)
        if again:
            self.depth -= 1
            self.put("}")


def live_variables(f: Func) -> set[Expr]:
    """Variables that something printed reads; the extents of the grid are the launch's, not the kernel's."""
    live: set[Expr] = set()
    for s in reversed(list(walk_stmts(f.body))):
        if isinstance(s, Let):
            if s.var in live:
                live |= free_vars(s.value)
        elif isinstance(s, For) and s.kind.startswith("block"):
            live |= free_vars(s.lo)
        else:
            for e in exprs_of(s):
                live |= free_vars(e)
    return live


def outside(b: Buffer, i: Expr) -> bool:
    """A constant index that no element has: only ever met under a condition that is false."""
    n = b.size()
    return i.op == "const" and n.op == "const" and not 0 <= i.attr < n.attr
