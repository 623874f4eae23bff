"""Expressions of a kernel as LLVM instructions: values are named once per region, loads once per statement."""

from __future__ import annotations

from luthier.codegen.llvm.ops import (
    binary_value,
    cast_value,
    compare_value,
    saturated,
    splat,
    unary_value,
)
from luthier.codegen.llvm.types import const_text, float_text, reg_type, scalar_type, splat_text
from luthier.codegen.targets.target import Target
from luthier.errors import CompilationError
from luthier.ir.dtypes import DType
from luthier.ir.expr import BINARY, COMPARE, UNARY, Expr, free_vars, is_const
from luthier.passes.loop.legalize_arithmetic import legal


class ExprPrinter:
    """State of one function being printed, and the printing of expressions.

    ``regs``: register variables to their current SSA value. ``scopes``: memo tables of pure expressions, one per open region."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.f16c = not target.is_x86 or "f16c" in target.flags
        self.lines: list[str] = []
        self.entry: list[str] = []
        self.globals: list[str] = []
        self.texts: dict[str, str] = {}  # strings among them
        self.declarations: dict[str, str] = {}
        self.helpers: set[str] = set()
        self.count = 0
        self.block = "entry"
        self.vars: dict[Expr, str] = {}
        self.uniform: dict[Expr, Expr] = {}  # vector variables that hold one scalar in all lanes
        self.regs: dict[str, str] = {}
        self.reg_types: dict[str, str] = {}
        self.scopes: list[dict[Expr, str]] = [{}]
        self.bound: list[list[Expr]] = [[]]
        self.memo: dict[Expr, str] = {}
        self.buffers: dict[str, str] = {}
        self.addresses: list[dict[tuple[str, Expr], str]] = [{}]

    # ------------------------------------------------------------ text

    def fresh(self) -> str:
        self.count += 1
        return f"%v{self.count}"

    def ins(self, text: str) -> str:
        self.count += 1
        n = f"%v{self.count}"
        self.lines.append(f"{n} = {text}")
        return n

    def emit(self, text: str) -> None:
        self.lines.append(text)

    def label(self, base: str) -> str:
        self.count += 1
        return f"{base}{self.count}"

    def start(self, label: str) -> None:
        self.lines.append(f"{label}:\n")
        self.block = label

    def declare(self, name: str, signature: str) -> str:
        self.declarations[name] = signature
        return name

    def need(self, helper: str) -> str:
        self.helpers.add(helper)
        return helper

    # ------------------------------------------------------------ scopes

    def push(self) -> None:
        self.scopes.append({})
        self.bound.append([])
        self.addresses.append({})

    def pop(self) -> None:
        self.scopes.pop()
        self.addresses.pop()
        for v in self.bound.pop():
            self.vars.pop(v, None)
        self.memo = {}

    def begin_statement(self) -> None:
        self.memo = {}

    def bind(self, v: Expr, name: str) -> None:
        if v in self.vars:  # bound again in the same region: what was computed from the old value is void
            for k in [k for k, m in self.uniform.items() if v in free_vars(m)]:
                del self.uniform[k]
            for s in self.scopes:
                for e in [e for e in s if v in free_vars(e)]:
                    del s[e]
            for t in self.addresses:
                for k in [k for k in t if v in free_vars(k[1])]:
                    del t[k]
        else:
            self.bound[-1].append(v)
        self.vars[v] = name

    # ------------------------------------------------------------ values

    def value(self, e: Expr) -> str:
        """The SSA name (or constant) of an expression, emitting what is not yet available here."""
        op = e.op
        if op == "const":
            return splat_text(e.attr, e.dtype)
        if op == "var":
            n = self.vars.get(e)
            if n is None:
                raise CompilationError(f"variable {e!r} is used before it is bound")
            return n
        if op == "bcast" and e.args[0].op == "const":
            return splat_text(e.args[0].attr, e.dtype)
        if e.loading:
            r = self.memo.get(e)
            if r is None:
                r = self.memo[e] = self.node(e)
            return r
        for s in reversed(self.scopes):
            r = s.get(e)
            if r is not None:
                return r
        r = self.node(e)
        self.scopes[-1][e] = r
        return r

    def node(self, e: Expr) -> str:
        op, d = e.op, e.dtype
        if op == "load":
            return self.load(e)
        if op in COMPARE:
            return compare_value(self, op, self.value(e.args[0]), self.value(e.args[1]), e.args[0].dtype)
        if op in BINARY:
            lowered = legal(e)
            if lowered is not None:
                return self.value(lowered)
            return binary_value(self, op, self.value(e.args[0]), self.value(e.args[1]), d)
        if op in UNARY:
            return unary_value(self, op, self.value(e.args[0]), e.args[0].dtype)
        if op == "select":
            c, a, b = e.args
            ct = "i1" if c.dtype.lanes == 1 else f"<{c.dtype.lanes} x i1>"
            t = reg_type(d)
            return self.ins(f"select {ct} {self.value(c)}, {t} {self.value(a)}, {t} {self.value(b)}")
        if op == "cast":
            if d.is_int and d.bits == 32 and d.is_signed and _clamped(e.args[0]):
                return self.ins(f"fptosi {reg_type(e.args[0].dtype)} {self.value(e.args[0])} to {reg_type(d)}")
            x = _byte_source(e.args[0]) if d.lanes > 1 and d.scalar.name == "u8" else e.args[0]
            if x.op == "round" and x.dtype.bits == 32 and d.is_int and d.bits == 8 and d.lanes > 1:  # clamped first, the conversion rounds
                return saturated(self, self.value(x.args[0]), x.dtype, d, nearest=True)
            return cast_value(self, self.value(x), x.dtype, d)
        if op == "bitcast":
            s, t = reg_type(e.args[0].dtype), reg_type(d)
            a = self.value(e.args[0])
            return a if s == t else self.ins(f"bitcast {s} {a} to {t}")
        if op == "bcast":
            return self.splat_value(self.value(e.args[0]), d)
        if op == "ramp":
            steps = ", ".join(f"i64 {k * e.attr[0]}" for k in range(d.lanes))
            return self.ins(f"add nsw {reg_type(d)} {self.splat_value(self.value(e.args[0]), d)}, <{steps}>")
        if op == "extract":
            return self.ins(f"extractelement {reg_type(e.args[0].dtype)} {self.value(e.args[0])}, i32 {e.attr}")
        if op == "shuffle":
            return self.shuffle(e)
        if op == "vreduce":
            return self.vreduce(e.attr, self.value(e.args[0]), e.args[0].dtype)
        if op == "call":
            from luthier.codegen.llvm.intrin import PURE

            f = PURE.get(e.attr[0])
            if f is None:
                raise CompilationError(f"the LLVM backend has no intrinsic {e.attr[0]!r}")
            return f(self, e, [self.value(a) for a in e.args])
        raise CompilationError(f"the LLVM printer has no {op}")

    def load(self, e: Expr) -> str:
        raise NotImplementedError

    def splat_value(self, a: str, d: DType) -> str:
        """A scalar in all lanes of ``d``."""
        if d.lanes == 1:
            return a
        t, s = reg_type(d), scalar_type(d)
        if not a.startswith("%"):
            return splat(a, d, s)
        one = self.ins(f"insertelement {t} poison, {s} {a}, i64 0")
        return self.ins(f"shufflevector {t} {one}, {t} poison, <{d.lanes} x i32> zeroinitializer")

    def pick(self, a: str, b: str, t: str, perm: list[int]) -> str:
        """shufflevector of two vectors of type ``t``; -1 is a lane that does not matter."""
        p = ", ".join("i32 poison" if k < 0 else f"i32 {k}" for k in perm)
        return self.ins(f"shufflevector {t} {a}, {t} {b}, <{len(perm)} x i32> <{p}>")

    def shuffle(self, e: Expr) -> str:
        args = e.args
        s = scalar_type(e.dtype)
        widest = max(a.dtype.lanes for a in args)
        vals: list[tuple[str, int]] = []
        for a in args:
            n, v = a.dtype.lanes, self.value(a)
            if n == 1:
                v = self.ins(f"insertelement <{widest} x {s}> poison, {s} {v}, i64 0") if widest > 1 else v
            elif n < widest:
                v = self.pick(v, "poison", f"<{n} x {s}>", [*range(n), *([-1] * (widest - n))])
            vals.append((v, n))
        where: list[tuple[int, int]] = [(i, k) for i, (_, n) in enumerate(vals) for k in range(n)]
        used = sorted({where[p][0] for p in e.attr if p >= 0})
        if widest == 1:
            out = "poison"
            for lane, p in enumerate(e.attr):
                if p >= 0:
                    out = self.ins(f"insertelement <{len(e.attr)} x {s}> {out}, {s} {vals[where[p][0]][0]}, i32 {lane}")
            return out
        t = f"<{widest} x {s}>"
        out, out_t, done = "", "", [-1] * len(e.attr)
        for i in range(0, max(len(used), 1), 2):
            pair = used[i : i + 2] or [0]
            second = vals[pair[1]][0] if len(pair) > 1 else "poison"
            perm = []
            for p in e.attr:
                src, lane = where[p] if p >= 0 else (-1, 0)
                perm.append(lane if src == pair[0] else widest + lane if len(pair) > 1 and src == pair[1] else -1)
            part = self.pick(vals[pair[0]][0], second, t, perm)
            if not out:
                out, out_t, done = part, f"<{len(perm)} x {s}>", perm
            else:
                n = len(perm)
                out = self.pick(out, part, out_t, [k if done[k] >= 0 else n + k if perm[k] >= 0 else -1 for k in range(n)])
                done = [a if a >= 0 else b for a, b in zip(done, perm, strict=True)]
        return out

    def vreduce(self, op: str, a: str, d: DType) -> str:
        """Pairwise halving: lane i with lane i + half, an odd last lane waits. Conditions have no order: a mask is tested at once."""
        n, s = d.lanes, scalar_type(d)
        if d.is_bool and op in ("and", "or"):
            fn = self.declare(f"llvm.vector.reduce.{op}.v{n}i1", f"i1 @(<{n} x i1>)")
            return self.ins(f"call i1 @{fn}(<{n} x i1> {a})")
        while n > 1:
            h = n // 2
            t = f"<{n} x {s}>"
            hd = d.scalar.vec(h)
            if h == 1:
                x, y = self.ins(f"extractelement {t} {a}, i32 0"), self.ins(f"extractelement {t} {a}, i32 1")
            else:
                x, y = self.pick(a, "poison", t, list(range(h))), self.pick(a, "poison", t, list(range(h, 2 * h)))
            r = binary_value(self, op, x, y, hd)
            if n % 2:
                last = self.ins(f"extractelement {t} {a}, i32 {n - 1}")
                if h == 1:
                    r = self.ins(f"insertelement <2 x {s}> poison, {s} {r}, i32 0")
                else:
                    r = self.pick(r, "poison", f"<{h} x {s}>", [*range(h), -1])
                r = self.ins(f"insertelement <{h + 1} x {s}> {r}, {s} {last}, i32 {h}")
            a, n = r, h + n % 2
        return a


def _clamped(e: Expr) -> bool:
    """``min(max(x, lo), hi)`` between constants that i32 holds: no NaN, no overflow."""
    if e.op != "min" or not e.dtype.is_float or e.args[0].op != "max":
        return False
    ends = (e.args[0].args[1], e.args[1])
    return all(is_const(x) and abs((x.args[0] if x.op == "bcast" else x).attr) < 2**31 - 128 for x in ends)


def _byte_source(e: Expr) -> Expr:
    """What a conversion to u8, which saturates, may read in place of ``i32(min(max(x, 0), 255))``."""
    if e.op == "cast" and e.dtype.scalar.name == "i32" and _clamped(e.args[0]):
        inner = e.args[0].args[0]
        low, high = (x.args[0] if x.op == "bcast" else x for x in (inner.args[1], e.args[0].args[1]))
        if low.attr == 0 and high.attr == 255:
            return inner.args[0]
    return e


__all__ = ["ExprPrinter", "const_text", "float_text"]
