"""LLVM text IR of one kernel.

Structured loop IR needs no allocas for its register variables: they are SSA values, with phis made where a loop or a branch
assigns them. Addresses are a pointer plus the variable part of the index plus, as a separate constant, the rest, which x86 and
AArch64 fold into the displacement. Loops are rotated. Only ``contract`` is allowed on floating point. A kernel is
``void name(ptr buffers..., i64 scalars..., i64 lo, i64 hi)``; its parallel loop, if it has one, runs from lo to hi.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, boolean, f32, i16, index
from luthier.ir.errors import TargetError
from luthier.ir.expr import COMPARE, Expr, _from_poly, bounds, const, linear, load_parts, rebuild
from luthier.ir.loop import Alloc, Barrier, Block, Buffer, Call, For, Func, If, Let, Stmt, Store, While, walk_stmts

LOCAL_LIMIT = 1 << 20  # bytes of local arrays in a kernel, on the stack of a thread

_FLOAT = {16: "half", 32: "float", 64: "double"}


def llvm_type(d: DType, memory: bool = False) -> str:
    """Register (or memory) type. bool is i1 in registers and i8 in memory; bfloat16 is carried as its 16 bits."""
    if d.kind == "f":
        t = _FLOAT[d.bits]
    elif d.is_bool:
        t = "i8" if memory else "i1"
    elif d.kind == "bf":
        t = "i16"
    elif d.kind == "x":
        t = "i64"
    elif d.is_int and d.bits >= 8:
        t = f"i{d.bits}"
    elif d.kind.startswith("f8"):
        t = "i8"
    else:
        raise TargetError(f"the LLVM backend has no type for {d}")
    return t if d.lanes == 1 else f"<{d.lanes} x {t}>"


def llvm_const(v: Any, d: DType) -> str:
    if d.is_bool:
        return "true" if v else "false"
    if d.kind == "f":
        if d.bits == 16:
            return f"0xH{np.float16(v).view(np.uint16):04X}"
        return f"0x{struct.unpack('<Q', struct.pack('<d', v))[0]:016X}"
    if d.kind == "bf" or d.kind.startswith("f8"):
        return str(int(np.asarray(v).astype(d.numpy).view(np.uint16 if d.kind == "bf" else np.uint8)))
    return str(int(v))


class LLVMPrinter:
    """Prints one Func; ``text()`` is the definition, ``globals`` its constant data, ``declares`` the intrinsics it needs."""

    def __init__(self, func: Func, name: str | None = None, intrinsics: dict[str, Any] | None = None) -> None:
        self.f, self.name = func, name or func.name
        self.intrinsics = intrinsics or {}
        self.lines: list[str] = []
        self.entry: list[str] = []
        self.declares: set[str] = set()
        self.globals: list[str] = []
        self.n = 0
        self.scopes: list[dict[Any, str]] = [{}]
        self.vars: dict[Expr, str] = {}
        self.regs: dict[Buffer, str] = {}
        self.ptrs: dict[str, str] = {}
        self.block = "entry"
        self.pure_memo: dict[Expr, bool] = {}
        self.stmt_memo: dict[Expr, str] = {}
        self.local_bytes = 0

    # ------------------------------------------------------------ entry

    def text(self) -> str:
        f = self.f
        stored = {s.buf.name for s in walk_stmts(f.body) if isinstance(s, Store)}
        params = []
        for k, b in enumerate(f.buffers):
            self.ptrs[b.name] = f"%b{k}"
            ro = "" if b.name in stored else " readonly"
            params.append(f"ptr noalias nocapture{ro} %b{k}".replace(" nocapture", ""))
        for k, v in enumerate(f.scalars):
            self.vars[v] = f"%d{k}"
            params.append(f"{llvm_type(v.dtype)} %d{k}")
        for n, a in f.data.items():
            self.ptrs[n] = self.constant(n, a)
        params += ["i64 %lo", "i64 %hi"]
        self.stmt(f.body)
        self.emit("ret void")
        head = f"define void @\"{self.name}\"({', '.join(params)}) #0 {{"
        return "\n".join([*self.globals, head, "entry:", *self.entry, *self.lines, "}", ""])

    def constant(self, n: str, a: np.ndarray[Any, Any]) -> str:
        raw = np.ascontiguousarray(a).view(np.uint8).reshape(-1)
        g = f"@\"{self.name}.{n}\""
        data = "".join(f"\\{x:02X}" for x in raw)
        self.globals.append(f"{g} = private unnamed_addr constant [{raw.size} x i8] c\"{data}\", align 64")
        return g

    # ------------------------------------------------------------ helpers

    def emit(self, s: str) -> None:
        self.lines.append("  " + s)

    def val(self, s: str) -> str:
        self.n += 1
        self.lines.append(f"  %v{self.n} = {s}")
        return f"%v{self.n}"

    def label(self) -> str:
        self.n += 1
        return f"l{self.n}"

    def start(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self.block = label

    def intr(self, name: str, ret: str, *args: tuple[str, str]) -> str:
        self.declares.add(f"declare {ret} @{name}({', '.join(t for t, _ in args)})")
        return self.val(f"call {ret} @{name}({', '.join(f'{t} {v}' for t, v in args)})")

    def pure(self, e: Expr) -> bool:
        r = self.pure_memo.get(e)
        if r is None:
            r = e.op != "load" and all(self.pure(a) for a in e.args)
            self.pure_memo[e] = r
        return r

    # ------------------------------------------------------------ expressions

    def expr(self, e: Expr) -> str:
        """The SSA value (or constant) of an expression at this point."""
        if e.op == "const":
            return llvm_const(e.attr, e.dtype)
        if e.op == "var":
            return self.vars[e]
        if e.op == "load" and e.attr[0].rank == 0 and e.attr[0] in self.regs:
            return self.regs[e.attr[0]]
        if self.pure(e):
            for sc in reversed(self.scopes):
                hit = sc.get(e)
                if hit is not None:
                    return hit
            r = self.compute(e)
            self.scopes[-1][e] = r
            return r
        r2 = self.stmt_memo.get(e)
        if r2 is None:
            r2 = self.stmt_memo[e] = self.compute(e)
        return r2

    def compute(self, e: Expr) -> str:
        op, d = e.op, e.dtype
        if op == "load":
            return self.load(e)
        if op == "bcast":
            return self.splat(e.args[0], d.lanes)
        if op == "ramp":
            return self.ramp(e)
        if d.kind == "bf" and op not in ("select", "shuffle", "extract", "cast", "bitcast"):
            wide = rebuild(e, tuple(a.cast(f32) if a.dtype.kind == "bf" else a for a in e.args))
            return self.expr(wide.cast(d.scalar))
        args = [self.expr(a) for a in e.args]
        t = llvm_type(d)
        at = e.args[0].dtype if e.args else d
        if op in ("add", "sub", "mul"):
            if d.is_float:
                return self.val(f"f{op} contract {t} {args[0]}, {args[1]}")
            return self.val(f"{op} {'nsw ' if d.is_index else ''}{t} {args[0]}, {args[1]}")
        if op in ("div", "rem", "floordiv", "mod"):
            return self.division(e, args)
        if op in ("min", "max"):
            return self.minmax(op, d, args)
        if op in ("and", "or", "xor"):
            return self.val(f"{op} {t} {args[0]}, {args[1]}")
        if op in ("shl", "shr"):
            return self.shift(e, args)
        if op in COMPARE:
            return self.compare(op, at, args)
        if op == "select":
            ct = llvm_type(e.args[0].dtype)
            return self.val(f"select {ct} {args[0]}, {t} {args[1]}, {t} {args[2]}")
        if op == "cast":
            return self.cast(e.args[0], args[0], d)
        if op == "bitcast":
            return self.val(f"bitcast {llvm_type(at)} {args[0]} to {t}") if llvm_type(at) != t else args[0]
        if op == "neg":
            return self.val(f"fneg {t} {args[0]}") if d.is_float else self.val(f"sub {t} {self.splat_const(0, d)}, {args[0]}")
        if op == "not":
            return self.val(f"xor {t} {args[0]}, {self.splat_const(True if d.is_bool else -1, d)}")
        if op == "abs":
            if d.is_float:
                return self.intr(f"llvm.fabs.{suffix(d)}", t, (t, args[0]))
            return self.intr(f"llvm.abs.{suffix(d)}", t, (t, args[0]), ("i1", "false")) if d.is_signed else args[0]
        names = {"sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "roundeven"}
        if op in names:
            return self.intr(f"llvm.{names[op]}.{suffix(d)}", t, (t, args[0]))
        if op == "popcount":
            return self.intr(f"llvm.ctpop.{suffix(d)}", t, (t, args[0]))
        if op == "isnan":
            return self.val(f"fcmp uno {llvm_type(at)} {args[0]}, {args[0]}")
        if op == "isinf":
            a = self.intr(f"llvm.fabs.{suffix(at)}", llvm_type(at), (llvm_type(at), args[0]))
            return self.val(f"fcmp oeq {llvm_type(at)} {a}, {self.splat_const(math.inf, at)}")
        if op == "extract":
            return self.val(f"extractelement {llvm_type(at)} {args[0]}, i64 {e.attr}")
        if op == "shuffle":
            return self.shuffle(e, args)
        if op == "vreduce":
            return self.vreduce(e.attr, e.args[0].dtype, args[0])
        if op == "call" and e.attr[0] in self.intrinsics:
            return str(self.intrinsics[e.attr[0]](self, e, args))
        raise TargetError(f"the LLVM backend cannot print {op} on {d} (kernel {self.f.name})")

    def splat_const(self, v: Any, d: DType) -> str:
        c = llvm_const(v, d.scalar)
        return c if d.lanes == 1 else "<" + ", ".join(f"{llvm_type(d.scalar)} {c}" for _ in range(d.lanes)) + ">"

    def splat(self, a: Expr, lanes: int) -> str:
        if a.op == "const":
            return self.splat_const(a.attr, a.dtype.vec(lanes))
        s, t = self.expr(a), llvm_type(a.dtype)
        v = self.val(f"insertelement <{lanes} x {t}> poison, {t} {s}, i64 0")
        return self.val(f"shufflevector <{lanes} x {t}> {v}, <{lanes} x {t}> poison, <{lanes} x i32> zeroinitializer")

    def ramp(self, e: Expr) -> str:
        n, s = e.dtype.lanes, e.attr[0]
        t = llvm_type(e.dtype)
        steps = "<" + ", ".join(f"i64 {k * s}" for k in range(n)) + ">"
        if e.args[0].op == "const" and e.args[0].attr == 0:
            return steps
        return self.val(f"add nsw {t} {self.splat(e.args[0], n)}, {steps}")

    def minmax(self, op: str, d: DType, a: list[str]) -> str:
        t = llvm_type(d)
        c = self.compare("lt", d, a if op == "min" else [a[1], a[0]])
        return self.val(f"select {llvm_type(boolean.vec(d.lanes))} {c}, {t} {a[0]}, {t} {a[1]}")

    def compare(self, op: str, d: DType, a: list[str]) -> str:
        t = llvm_type(d)
        if d.kind == "bf":
            raise TargetError("comparison of bfloat16 is widened before")
        if d.is_float:
            return self.val(f"fcmp {dict(lt='olt', le='ole', eq='oeq', ne='une')[op]} {t} {a[0]}, {a[1]}")
        s = "s" if d.is_signed else "u"
        return self.val(f"icmp {dict(lt=s + 'lt', le=s + 'le', eq='eq', ne='ne')[op]} {t} {a[0]}, {a[1]}")

    def division(self, e: Expr, a: list[str]) -> str:
        op, d = e.op, e.dtype
        t = llvm_type(d)
        if d.is_float:
            if op == "div":
                return self.val(f"fdiv contract {t} {a[0]}, {a[1]}")
            raise TargetError(f"{op} on {d} is expanded before printing")
        x, y = a
        (xl, _), (yl, yh) = (bounds(e.args[0]), bounds(e.args[1])) if d.lanes == 1 else ((None, None), (None, None))
        cst = e.args[1]
        cst = cst.args[0] if cst.op == "bcast" else cst
        known = cst.op == "const" and cst.attr != 0 or (yl is not None and yl > 0) or (yh is not None and yh < 0)
        unsigned = not d.is_signed or (xl is not None and xl >= 0 and yl is not None and yl >= 0)
        zero = self.splat_const(0, d)
        bt = llvm_type(boolean.vec(d.lanes))
        z = ""
        if not known:
            z = self.val(f"icmp eq {t} {y}, {zero}")
            y = self.val(f"select {bt} {z}, {t} {self.splat_const(1, d)}, {t} {y}")
        if unsigned:
            r = self.val(f"{'udiv' if op in ('div', 'floordiv') else 'urem'} {t} {x}, {y}")
        else:
            if not (cst.op == "const" and cst.attr != -1) and not (yl is not None and yl >= 0) and not d.is_index:
                m1 = self.val(f"icmp eq {t} {y}, {self.splat_const(-1, d)}")  # lowest / -1 traps: negate instead
                lowest = self.val(f"icmp eq {t} {x}, {self.splat_const(d.scalar.limits()[0], d)}")
                both = self.val(f"and {bt} {m1}, {lowest}")
                y = self.val(f"select {bt} {both}, {t} {self.splat_const(1, d)}, {t} {y}")
            if op in ("div", "rem"):
                r = self.val(f"{'sdiv' if op == 'div' else 'srem'} {t} {x}, {y}")
            else:
                m = self.val(f"srem {t} {x}, {y}")
                nz = self.val(f"icmp ne {t} {m}, {zero}")
                sg = self.val(f"xor {t} {m}, {y}")
                neg = self.val(f"icmp slt {t} {sg}, {zero}")
                fix = self.val(f"and {bt} {nz}, {neg}")
                if op == "mod":
                    add = self.val(f"select {bt} {fix}, {t} {y}, {t} {zero}")
                    r = self.val(f"add {t} {m}, {add}")
                else:
                    q = self.val(f"sdiv {t} {x}, {y}")
                    add = self.val(f"select {bt} {fix}, {t} {self.splat_const(-1, d)}, {t} {zero}")
                    r = self.val(f"add {t} {q}, {add}")
        return self.val(f"select {bt} {z}, {t} {zero}, {t} {r}") if z else r

    def shift(self, e: Expr, a: list[str]) -> str:
        d = e.dtype
        t = llvm_type(d)
        ins = "shl" if e.op == "shl" else "ashr" if d.is_signed else "lshr"
        c = e.args[1].args[0] if e.args[1].op == "bcast" else e.args[1]
        if c.op == "const" and 0 <= c.attr < d.bits:
            return self.val(f"{ins} {t} {a[0]}, {a[1]}")
        big = self.val(f"icmp uge {t} {a[1]}, {self.splat_const(d.bits, d)}")
        bt = llvm_type(boolean.vec(d.lanes))
        s = self.val(f"select {bt} {big}, {t} {self.splat_const(d.bits - 1 if ins == 'ashr' else 0, d)}, {t} {a[1]}")
        r = self.val(f"{ins} {t} {a[0]}, {s}")
        return r if ins == "ashr" else self.val(f"select {bt} {big}, {t} {self.splat_const(0, d)}, {t} {r}")

    def cast(self, src: Expr, v: str, d: DType) -> str:
        s = src.dtype
        st, dt = llvm_type(s), llvm_type(d)
        n = d.lanes
        if s.kind.startswith("f8") or d.kind.startswith("f8"):
            raise TargetError(f"the LLVM backend has no conversion between {s} and {d}")
        if s.kind == "bf":
            if d.kind == "bf":
                return v
            w = self.val(f"zext {st} {v} to {llvm_type(DType('i', 32, n))}")
            w = self.val(f"shl {llvm_type(DType('i', 32, n))} {w}, {self.splat_const(16, DType('i', 32, n))}")
            fv = self.val(f"bitcast {llvm_type(DType('i', 32, n))} {w} to {llvm_type(f32.vec(n))}")
            return self.convert(f32.vec(n), fv, d)
        if d.kind == "bf":
            fv = self.convert(s, v, f32.vec(n))
            return self.round_bf16(fv, n)
        del st, dt
        return self.convert(s, v, d)

    def round_bf16(self, v: str, n: int) -> str:
        """f32 to the upper 16 bits, to nearest even; NaN stays NaN."""
        it, ft = DType("i", 32, n), f32.vec(n)
        t = llvm_type(it)
        b = self.val(f"bitcast {llvm_type(ft)} {v} to {t}")
        odd = self.val(f"and {t} {self.val(f'lshr {t} {b}, {self.splat_const(16, it)}')}, {self.splat_const(1, it)}")
        r = self.val(f"add {t} {self.val(f'add {t} {b}, {odd}')}, {self.splat_const(0x7FFF, it)}")
        nan = self.val(f"fcmp uno {llvm_type(ft)} {v}, {v}")
        quiet = self.val(f"or {t} {b}, {self.splat_const(0x400000, it)}")
        r = self.val(f"select {llvm_type(boolean.vec(n))} {nan}, {t} {quiet}, {t} {r}")
        r = self.val(f"lshr {t} {r}, {self.splat_const(16, it)}")
        return self.val(f"trunc {t} {r} to {llvm_type(i16.vec(n))}")

    def convert(self, s: DType, v: str, d: DType) -> str:
        st, dt = llvm_type(s), llvm_type(d)
        if d.is_bool:
            if s.is_bool:
                return v
            return self.compare("ne", s, [v, self.splat_const(0, s)])
        if s.is_bool:
            return self.val(f"{'uitofp' if d.is_float else 'zext'} {st} {v} to {dt}")
        if s.is_float and d.is_float:
            if s.bits == d.bits:
                return v
            if s.bits == 64 and d.bits == 16:  # through f32 would round twice
                pass
            return self.val(f"{'fpext' if d.bits > s.bits else 'fptrunc'} {st} {v} to {dt}")
        if s.is_float:
            u = "s" if d.is_signed else "u"
            return self.intr(f"llvm.fpto{u}i.sat.{suffix(d)}.{suffix(s)}", dt, (st, v))
        if d.is_float:
            return self.val(f"{'sitofp' if s.is_signed else 'uitofp'} {st} {v} to {dt}")
        if st == dt:
            return v
        if s.bits > d.bits:
            return self.val(f"trunc {st} {v} to {dt}")
        return self.val(f"{'sext' if s.is_signed else 'zext'} {st} {v} to {dt}")

    def shuffle(self, e: Expr, a: list[str]) -> str:
        if len(a) == 1:
            a = [a[0], "poison"]
        if len(a) > 2:
            raise TargetError("shuffle of more than two vectors")
        t = llvm_type(e.args[0].dtype)
        m = "<" + ", ".join(f"i32 {k if k >= 0 else 'poison'}" for k in e.attr) + ">"
        return self.val(f"shufflevector {t} {a[0]}, {t} {a[1]}, <{len(e.attr)} x i32> {m}")

    def vreduce(self, op: str, d: DType, v: str) -> str:
        n = d.lanes
        odd: list[str] = []
        while n > 1:
            t = llvm_type(d.scalar.vec(n))
            if n % 2:
                odd.append(self.val(f"extractelement {t} {v}, i64 {n - 1}"))
            h = n // 2

            def half(lo: int, h: int = h, t: str = t, v: str = v) -> str:
                m = "<" + ", ".join(f"i32 {lo + k}" for k in range(h)) + ">"
                return self.val(f"shufflevector {t} {v}, {t} poison, <{h} x i32> {m}")

            v = self.lanewise(op, d.scalar.vec(h), half(0), half(h)) if h > 1 else self.lanewise(
                op, d.scalar, self.val(f"extractelement {t} {v}, i64 0"), self.val(f"extractelement {t} {v}, i64 1")
            )
            n = h
        for o in odd:
            v = self.lanewise(op, d.scalar, v, o)
        return v

    def lanewise(self, op: str, d: DType, a: str, b: str) -> str:
        if op in ("min", "max"):
            return self.minmax(op, d, [a, b])
        if d.is_float:
            return self.val(f"f{op} {llvm_type(d)} {a}, {b}")
        return self.val(f"{op} {llvm_type(d)} {a}, {b}")

    # ------------------------------------------------------------ memory

    def address(self, b: Buffer, i: Expr) -> str:
        """Pointer to element ``i``: variable part first, constant part as a displacement."""
        base = self.ptrs[b.name]
        size = int(b.dtype.scalar.itemsize) if not b.dtype.is_bool else 1
        size *= b.dtype.lanes
        c = linear(i).get((), 0)
        rest = i - c if c else i
        if not (rest.op == "const" and rest.attr == 0):
            key = (b.name, rest)
            hit = next((sc[key] for sc in reversed(self.scopes) if key in sc), None)
            if hit is None:
                v = self.expr(rest)
                t = "i8" if size == 1 else f"[{size} x i8]"
                hit = self.val(f"getelementptr inbounds {t}, ptr {base}, i64 {v}")
                if self.pure(rest):
                    self.scopes[-1][key] = hit
            base = hit
        if c:
            base = self.val(f"getelementptr inbounds i8, ptr {base}, i64 {c * size}")
        return base

    def align(self, d: DType) -> int:
        return max(1, d.bits // 8) if not d.is_bool else 1

    def load(self, e: Expr) -> str:
        b, idx, mask, other = load_parts(e)
        if b.rank == 0 and b in self.regs:
            return self.regs[b]
        i = idx[0]
        d = e.dtype
        mt, rt = llvm_type(d, True), llvm_type(d)
        if d.lanes == 1 or b.dtype.lanes > 1:
            if mask is None:
                return self.from_memory(self.val(f"load {mt}, ptr {self.address(b, i)}, align {self.align(d)}"), d)
            return self.guarded_load(b, i, mask, other, d)
        if i.op == "ramp" and i.attr[0] == 1:
            p = self.address(b, i.args[0])
            if mask is None:
                return self.from_memory(self.val(f"load {mt}, ptr {p}, align {self.align(d)}"), d)
            m = self.expr(mask)
            o = self.expr(other)  # type: ignore[arg-type]
            if d.is_bool:
                o = self.val(f"zext {rt} {o} to {mt}")
            name = f"llvm.masked.load.v{d.lanes}{scalar_suffix(d, True)}.p0"
            a = self.align(d)
            self.declares.add(f"declare {mt} @{name}(ptr, <{d.lanes} x i1>, {mt})")
            v = self.val(f"call {mt} @{name}(ptr align {a} {p}, <{d.lanes} x i1> {m}, {mt} {o})")
            return self.from_memory(v, d)
        if i.op == "bcast":
            raise TargetError("a load with a uniform index is scalar")
        if mask is None:
            return self.gather(b, i, d)
        n = d.lanes
        ptrs = self.pointers(b, i)
        m, o = self.expr(mask), self.expr(other)  # type: ignore[arg-type]
        if d.is_bool:
            o = self.val(f"zext {rt} {o} to {mt}")
        name = f"llvm.masked.gather.v{n}{scalar_suffix(d, True)}.v{n}p0"
        self.declares.add(f"declare {mt} @{name}(<{n} x ptr>, <{n} x i1>, {mt})")
        v = self.val(f"call {mt} @{name}(<{n} x ptr> align {self.align(d)} {ptrs}, <{n} x i1> {m}, {mt} {o})")
        return self.from_memory(v, d)

    def pointers(self, b: Buffer, i: Expr) -> str:
        n = i.dtype.lanes
        size = max(1, int(b.dtype.itemsize))
        t = "i8" if size == 1 else f"[{size} x i8]"
        return self.val(f"getelementptr inbounds {t}, ptr {self.ptrs[b.name]}, <{n} x i64> {self.expr(i)}")

    def gather(self, b: Buffer, i: Expr, d: DType) -> str:
        """Lane by lane."""
        mt = llvm_type(d, True)
        et = llvm_type(d.scalar, True)
        out = "poison"
        iv = None if i.op == "ramp" else self.expr(i)
        for k in range(d.lanes):
            if iv is None:
                p = self.address(b, i.args[0] + k * i.attr[0])
            else:
                x = self.val(f"extractelement <{d.lanes} x i64> {iv}, i64 {k}")
                size = max(1, int(b.dtype.itemsize))
                p = self.val(f"getelementptr inbounds {'i8' if size == 1 else f'[{size} x i8]'}, ptr {self.ptrs[b.name]}, i64 {x}")
            v = self.val(f"load {et}, ptr {p}, align {self.align(d)}")
            out = self.val(f"insertelement {mt} {out}, {et} {v}, i64 {k}")
        return self.from_memory(out, d)

    def guarded_load(self, b: Buffer, i: Expr, mask: Expr, other: Expr | None, d: DType) -> str:
        """A scalar load under a condition: a branch."""
        c = self.expr(mask)
        o = self.expr(other)  # type: ignore[arg-type]
        here, then, done = self.block, self.label(), self.label()
        self.emit(f"br i1 {c}, label %{then}, label %{done}")
        self.start(then)
        self.scopes.append({})
        saved, self.stmt_memo = self.stmt_memo, dict(self.stmt_memo)
        v = self.from_memory(self.val(f"load {llvm_type(d, True)}, ptr {self.address(b, i)}, align {self.align(d)}"), d)
        self.stmt_memo = saved
        self.scopes.pop()
        end = self.block
        self.emit(f"br label %{done}")
        self.start(done)
        return self.val(f"phi {llvm_type(d)} [ {v}, %{end} ], [ {o}, %{here} ]")

    def from_memory(self, v: str, d: DType) -> str:
        if d.is_bool:
            return self.val(f"icmp ne {llvm_type(d, True)} {v}, {'0' if d.lanes == 1 else 'zeroinitializer'}")
        return v

    def store(self, s: Store) -> None:
        b = s.buf
        if b.rank == 0 and b in self.regs:
            v = self.expr(s.value)
            self.regs[b] = v
            return
        d = s.value.dtype
        i = s.idx[0]
        v = self.expr(s.value)
        mt = llvm_type(d, True)
        if d.is_bool:
            v = self.val(f"zext {llvm_type(d)} {v} to {mt}")
        a = self.align(d)
        if d.lanes == 1 or b.dtype.lanes > 1:
            if s.mask is None:
                self.emit(f"store {mt} {v}, ptr {self.address(b, i)}, align {a}")
                return
            c = self.expr(s.mask)
            then, done = self.label(), self.label()
            self.emit(f"br i1 {c}, label %{then}, label %{done}")
            self.start(then)
            self.scopes.append({})
            self.emit(f"store {mt} {v}, ptr {self.address(b, i)}, align {a}")
            self.scopes.pop()
            self.emit(f"br label %{done}")
            self.start(done)
            return
        n = d.lanes
        if i.op == "ramp" and i.attr[0] == 1:
            p = self.address(b, i.args[0])
            if s.mask is None:
                self.emit(f"store {mt} {v}, ptr {p}, align {a}")
            else:
                m = self.expr(s.mask)
                name = f"llvm.masked.store.v{n}{scalar_suffix(d, True)}.p0"
                self.declares.add(f"declare void @{name}({mt}, ptr, <{n} x i1>)")
                self.emit(f"call void @{name}({mt} {v}, ptr align {a} {p}, <{n} x i1> {m})")
            return
        if s.mask is None:
            et = llvm_type(d.scalar, True)
            iv = None if i.op == "ramp" else self.expr(i)
            for k in range(n):
                x = self.val(f"extractelement {mt} {v}, i64 {k}")
                if iv is None:
                    p = self.address(b, i.args[0] + k * i.attr[0])
                else:
                    j = self.val(f"extractelement <{n} x i64> {iv}, i64 {k}")
                    size = max(1, int(b.dtype.itemsize))
                    p = self.val(f"getelementptr inbounds {'i8' if size == 1 else f'[{size} x i8]'}, ptr {self.ptrs[b.name]}, i64 {j}")
                self.emit(f"store {et} {x}, ptr {p}, align {a}")
            return
        ptrs, m = self.pointers(b, i), self.expr(s.mask)
        name = f"llvm.masked.scatter.v{n}{scalar_suffix(d, True)}.v{n}p0"
        self.declares.add(f"declare void @{name}({mt}, <{n} x ptr>, <{n} x i1>)")
        self.emit(f"call void @{name}({mt} {v}, <{n} x ptr> align {a} {ptrs}, <{n} x i1> {m})")

    # ------------------------------------------------------------ statements

    def stmt(self, s: Stmt) -> None:
        self.stmt_memo = {}
        if isinstance(s, Block):
            for c in s.stmts:
                self.stmt(c)
        elif isinstance(s, Store):
            self.store(s)
        elif isinstance(s, Let):
            self.vars[s.var] = self.expr(s.value)
        elif isinstance(s, Alloc):
            self.alloc(s)
        elif isinstance(s, For):
            self.loop(s)
        elif isinstance(s, If):
            self.branch(s)
        elif isinstance(s, While):
            self.while_(s)
        elif isinstance(s, (Barrier, Call)):
            raise TargetError(f"{type(s).__name__} inside a CPU kernel ({self.f.name})")
        else:
            raise TypeError(s)

    def alloc(self, s: Alloc) -> None:
        b = s.buf
        if b.rank == 0 and b.scope == "local":
            self.regs[b] = "zeroinitializer" if b.dtype.lanes > 1 else llvm_const(0, b.dtype)
            self.stmt(s.body)
            del self.regs[b]
            return
        n = b.size()
        if n.op != "const":
            raise TargetError(f"{self.f.name}: local buffer {b.name} has the run-time size {n!r}")
        size = n.attr * max(1, int(b.dtype.scalar.itemsize)) * b.dtype.lanes
        self.local_bytes += size
        if self.local_bytes > LOCAL_LIMIT:
            raise TargetError(f"{self.f.name}: {self.local_bytes} bytes of local buffers, the limit is {LOCAL_LIMIT}; stage {b.name} in global scope")
        self.n += 1
        p = f"%a{self.n}"
        self.entry.append(f"  {p} = alloca [{size} x i8], align 64")
        saved = self.ptrs.get(b.name)
        self.ptrs[b.name] = p
        self.scopes.append({})
        self.stmt(s.body)
        self.scopes.pop()
        if saved is not None:
            self.ptrs[b.name] = saved

    def assigned(self, s: Stmt) -> list[Buffer]:
        out = {x.buf for x in walk_stmts(s) if isinstance(x, Store) and x.buf.rank == 0 and x.buf in self.regs}
        return sorted(out, key=lambda b: b.name)

    def loop(self, s: For) -> None:
        if s.kind == "parallel":
            lo, hi = "%lo", "%hi"
        else:
            lo, hi = self.expr(s.lo), self.expr(s.hi)
        regs = self.assigned(s.body)
        blo = bounds(s.extent)[0]
        sure = s.kind != "parallel" and blo is not None and blo > 0
        pre = self.block
        body, done = self.label(), self.label()
        start = {b: self.regs[b] for b in regs}
        if sure:
            self.emit(f"br label %{body}")
        else:
            c = self.val(f"icmp slt i64 {lo}, {hi}")
            self.emit(f"br i1 {c}, label %{body}, label %{done}")
        self.start(body)
        at = len(self.lines)
        self.n += 1
        iv = f"%i{self.n}"
        phis: dict[Buffer, str] = {}
        for b in regs:
            self.n += 1
            phis[b] = f"%r{self.n}"
            self.regs[b] = phis[b]
        self.scopes.append({})
        self.vars[s.var] = iv
        self.stmt(s.body)
        self.scopes.pop()
        nxt = self.val(f"add nuw nsw i64 {iv}, 1")
        c = self.val(f"icmp slt i64 {nxt}, {hi}")
        end = self.block
        self.emit(f"br i1 {c}, label %{body}, label %{done}")
        heads = [f"  {iv} = phi i64 [ {lo}, %{pre} ], [ {nxt}, %{end} ]"]
        heads += [f"  {phis[b]} = phi {llvm_type(b.dtype)} [ {start[b]}, %{pre} ], [ {self.regs[b]}, %{end} ]" for b in regs]
        self.lines[at:at] = heads
        self.start(done)
        if not sure:
            for b in regs:
                self.regs[b] = self.val(f"phi {llvm_type(b.dtype)} [ {start[b]}, %{pre} ], [ {self.regs[b]}, %{end} ]")

    def branch(self, s: If) -> None:
        c = self.expr(s.cond)
        then, other, done = self.label(), self.label(), self.label()
        regs = self.assigned(s)
        start = {b: self.regs[b] for b in regs}
        pre = self.block
        self.emit(f"br i1 {c}, label %{then}, label %{other if s.orelse is not None else done}")
        self.start(then)
        self.scopes.append({})
        self.stmt(s.then)
        self.scopes.pop()
        t_end, t_regs = self.block, {b: self.regs[b] for b in regs}
        self.emit(f"br label %{done}")
        e_end, e_regs = pre, start
        if s.orelse is not None:
            for b in regs:
                self.regs[b] = start[b]
            self.start(other)
            self.scopes.append({})
            self.stmt(s.orelse)
            self.scopes.pop()
            e_end, e_regs = self.block, {b: self.regs[b] for b in regs}
            self.emit(f"br label %{done}")
        self.start(done)
        for b in regs:
            self.regs[b] = self.val(f"phi {llvm_type(b.dtype)} [ {t_regs[b]}, %{t_end} ], [ {e_regs[b]}, %{e_end} ]")

    def while_(self, s: While) -> None:
        regs = self.assigned(s.body)
        pre = self.block
        head, body, done = self.label(), self.label(), self.label()
        self.emit(f"br label %{head}")
        self.start(head)
        at = len(self.lines)
        start = {b: self.regs[b] for b in regs}
        phis = {}
        for b in regs:
            self.n += 1
            phis[b] = f"%r{self.n}"
            self.regs[b] = phis[b]
        self.scopes.append({})
        self.stmt_memo = {}
        c = self.expr(s.cond)
        self.emit(f"br i1 {c}, label %{body}, label %{done}")
        self.scopes.append({})
        self.start(body)
        self.stmt(s.body)
        end = self.block
        self.emit(f"br label %{head}")
        self.scopes.pop()
        self.scopes.pop()
        self.lines[at:at] = [f"  {phis[b]} = phi {llvm_type(b.dtype)} [ {start[b]}, %{pre} ], [ {self.regs[b]}, %{end} ]" for b in regs]
        for b in regs:
            self.regs[b] = phis[b]
        self.start(done)


def scalar_suffix(d: DType, memory: bool = False) -> str:
    t = llvm_type(d.scalar, memory)
    return {"float": "f32", "double": "f64", "half": "f16"}.get(t, t)


def suffix(d: DType) -> str:
    """Overload suffix of an intrinsic: f32, v8f32, i64 ..."""
    s = scalar_suffix(d)
    return s if d.lanes == 1 else f"v{d.lanes}{s}"


_ = (const, index, _from_poly)
