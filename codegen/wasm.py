"""Loop IR to WebAssembly, by the project's own binary encoder.

A kernel ``f(buffers..., scalars...)`` becomes ``f(i32 pointers..., scalars..., lo, hi)`` and ``f.range(pointers..., scalars...)``:
``range`` gives the number of rounds of the ``parallel`` loop (1 when there is none), and a call runs rounds ``lo <= r < hi`` of
it, so that threads may share the work. Register variables, Lets and loop variables are locals; other local buffers live on a
stack in linear memory (global ``env.sp``, which grows downward). Constant parts of indices become immediates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.codegen.sharing import parallel_loop
from luthier.codegen.wasm_encoder import Function, Module
from luthier.codegen.wasm_scalar import signed, valtype
from luthier.codegen.wasm_vector import Vector, bits_of, full, prefix, width
from luthier.ir.dtypes import DType
from luthier.ir.errors import CompilationError
from luthier.ir.expr import (
    Expr,
    binary,
    bounds,
    const,
    free_vars,
    from_linear,
    linear,
    load,
    load_parts,
    loads,
    prove,
    substitute,
)
from luthier.ir.loop import (
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
    stmts_of,
    walk_stmts,
)
from luthier.passes.legalize_dtype import legalize_dtype
from luthier.passes.lower_subbyte import lower_subbyte
from luthier.passes.place_lets import place_lets
from luthier.passes.split_vectors import split_vectors


def element_bytes(d: DType) -> int:
    """Bytes of one lane in memory. Raises CompilationError below one byte (``lower_subbyte`` comes first)."""
    if d.bits < 8:
        raise CompilationError(f"WebAssembly has no memory elements of type {d}", hint="run lower_subbyte first")
    return d.bits // 8


class KernelPrinter(Vector):
    """``consts``: places of const buffers, counted from global 1, or addresses when ``fixed``. Global 0 is the stack pointer."""

    def __init__(self, f: Func, functions: dict[str, int], consts: dict[str, int], relaxed: bool, fixed: bool = False) -> None:
        super().__init__(f.name, relaxed)
        self.f, self.functions, self.consts, self.fixed = f, functions, consts, fixed
        self.regs: dict[str, int | list[int]] = {}
        self.ptrs: dict[str, int] = {}
        self.cache: list[dict[tuple[str, Expr], int]] = [{}]
        self.inner: set[Expr] = set()  # what the innermost loop defines
        self.bases: dict[tuple[str, Expr], int] = {}  # pointers that it leaves alone, by buffer and part of the index
        self.affine: dict[Expr, Expr] = {}  # what index Lets stand for
        self.params: list[str] = []
        for b in f.buffers:
            self.ptrs[b.name] = len(self.params)
            self.params.append("i32")
        for v in f.scalars:
            self.vars[v] = len(self.params)
            self.params.append(valtype(v.dtype))
        self.par: For | None = None
        self.bounds: tuple[int, int] = (0, 0)

    # ------------------------------------------------------------ whole functions

    def kernel(self) -> Function:
        p = parallel_loop(self.f)
        self.par = None if p is None else p[0]
        self.bounds = (len(self.params), len(self.params) + 1)
        self.params += ["i32", "i32"]
        self.nparams = len(self.params)
        if self.par is None:  # all rounds are round 0
            self.c.op("local.get", self.bounds[0])
            self.c.op("local.get", self.bounds[1])
            self.c.op("i32.ge_s")
            self.c.start("if")
            self.c.op("return")
            self.c.op("end")
        self.stmt(self.f.body)
        return Function(self.f.name, self.params, [], self.types, self.prologue() + bytes(self.c.b))

    def range(self) -> Function:
        self.nparams = len(self.params)
        p = parallel_loop(self.f)
        if p is None:
            self.c.const("i32", 1)
        else:
            self.emit(p[1])
        return Function(f"{self.f.name}.range", self.params, ["i32"], self.types, self.prologue() + bytes(self.c.b))

    # ------------------------------------------------------------ statements

    def stmt(self, s: Stmt) -> None:
        c = self.c
        if isinstance(s, Block):
            for x in stmts_of(s):
                self.stmt(x)
        elif isinstance(s, Let):
            self.bind(s.var, s.value)
        elif isinstance(s, Store):
            self.store(s)
        elif isinstance(s, For):
            self.loop(s)
        elif isinstance(s, If):
            self.emit(s.cond)
            c.start("if")
            self.scope(s.then)
            if s.orelse is not None:
                c.op("else")
                self.scope(s.orelse)
            c.op("end")
        elif isinstance(s, While):
            c.start("block")
            c.start("loop")
            self.depth += 1
            self.cache.append({})
            self.emit(s.cond)
            c.op("i32.eqz")
            c.op("br_if", 1)
            self.stmt(s.body)
            self.cache.pop()
            self.depth -= 1
            c.op("br", 0)
            c.op("end")
            c.op("end")
        elif isinstance(s, Alloc):
            self.alloc(s)
        elif isinstance(s, Call):
            self.call(s)
        elif isinstance(s, Barrier):
            raise CompilationError("WebAssembly kernels have no barriers", op=self.name)
        else:
            raise TypeError(s)

    def scope(self, s: Stmt) -> None:
        self.cache.append({})
        self.stmt(s)
        self.cache.pop()

    def bind(self, v: Expr, value: Expr) -> None:
        if v.dtype.lanes > 1 and not full(v.dtype):
            t = valtype(v.dtype.scalar)
            ls = []
            for k in range(v.dtype.lanes):
                n = self.local(t)
                self.emit(self.lane(value, k))
                self.c.op("local.set", n)
                ls.append(n)
            self.vars[v] = ls
            return
        self.emit(value)
        n = self.local(valtype(v.dtype))
        self.c.op("local.set", n)
        self.vars[v] = n

    def loop(self, s: For) -> None:
        c = self.c
        i = self.local("i32")
        self.vars[s.var] = i
        if s is self.par:
            self.emit(s.lo)
            c.op("local.get", self.bounds[0])
            c.op("i32.add")
            c.op("local.set", i)
            hi = self.local("i32")
            self.emit(s.lo)
            c.op("local.get", self.bounds[1])
            c.op("i32.add")
            c.op("local.set", hi)
            limit: Any = ("local.get", hi)
        else:
            self.emit(s.lo)
            c.op("local.set", i)
            if s.hi.op == "const":
                limit = s.hi.attr
            else:
                hi = self.local("i32")
                self.emit(s.hi)
                c.op("local.set", hi)
                limit = ("local.get", hi)

        def push_limit() -> None:
            if isinstance(limit, int):
                c.const("i32", limit)
            else:
                c.op(*limit)

        sure = s is not self.par and prove(s.lo < s.hi)
        if not sure:
            c.op("local.get", i)
            push_limit()
            c.op("i32.lt_s")
            c.start("if")
        outer = self.inner, self.bases, dict(self.affine)
        self.inner, self.bases = set(), {}
        self.hoist(s)
        c.start("loop")
        self.depth += 1
        self.scope(s.body)
        self.depth -= 1
        for n in self.bases.values():
            self.release("i32", n)
        self.inner, self.bases, self.affine = outer
        c.op("local.get", i)
        c.const("i32", 1)
        c.op("i32.add")
        c.op("local.tee", i)
        push_limit()
        c.op("i32.lt_s")
        c.op("br_if", 0)
        c.op("end")
        if not sure:
            c.op("end")
        self.release("i32", i)
        if not isinstance(limit, int):
            self.release("i32", limit[1])

    def alloc(self, s: Alloc) -> None:
        b, c = s.buf, self.c
        if b.rank == 0 and b.scope == "local":
            d = b.dtype
            if d.lanes == 1 or full(d):
                t = valtype(d)
                n = self.local(t)
                self.regs[b.name] = n
                self.stmt(s.body)
                self.release(t, n)
            else:
                t = valtype(d.scalar)
                ls = [self.local(t) for _ in range(d.lanes)]
                self.regs[b.name] = ls
                self.stmt(s.body)
                for n in ls:
                    self.release(t, n)
            return
        if b.name in self.consts:
            self.ptrs[b.name] = self.local("i32")
            self.constant(b.name)
            c.op("local.set", self.ptrs[b.name])
            self.stmt(s.body)
            return
        size = b.size() * (element_bytes(b.dtype) * b.dtype.lanes)
        saved, ptr = self.local("i32"), self.local("i32")
        c.op("global.get", 0)
        c.op("local.tee", saved)
        self.emit((size + 63) // 64 * 64)
        c.op("i32.sub")
        c.op("local.tee", ptr)
        c.op("global.set", 0)
        self.ptrs[b.name] = ptr
        self.stmt(s.body)
        c.op("local.get", saved)
        c.op("global.set", 0)
        # the pointer stays reserved: a cached address must not outlive its meaning
        self.release("i32", saved)

    def call(self, s: Call) -> None:
        if s.callee not in self.functions:
            raise CompilationError(f"call of unknown kernel {s.callee}", op=self.name)

        def args() -> None:
            for a in s.args:
                if isinstance(a, Expr):
                    self.emit(a)
                else:
                    b, off = a if isinstance(a, tuple) else (a, const(0))
                    self.pointer(b)
                    self.emit(off * element_bytes(b.dtype))
                    self.c.op("i32.add")

        args()
        self.c.const("i32", 0)
        args()
        self.c.op("call", self.functions[s.callee] + 1)
        self.c.op("call", self.functions[s.callee])

    # ------------------------------------------------------------ memory

    def place(self, a: Expr) -> int | list[int] | None:
        if a.op == "var":
            return self.vars.get(a)
        if a.op == "load" and a.attr[0].rank == 0:
            return self.regs.get(a.attr[0].name)
        return None

    def pointer(self, b: Buffer) -> None:
        if b.name not in self.ptrs:
            if b.name not in self.consts:
                raise CompilationError(f"buffer {b.name} is neither a parameter nor allocated", op=self.name)
            self.constant(b.name)
            return
        self.c.op("local.get", self.ptrs[b.name])

    def constant(self, name: str) -> None:
        """Where a table of the kernel's own lies: at a place known now, or counted from global 1."""
        if not self.fixed:
            self.c.op("global.get", 1)
        self.c.const("i32", self.consts[name])
        if not self.fixed:
            self.c.op("i32.add")

    def hoist(self, s: For) -> None:
        """Before an innermost loop: for every access of its body, pointer + the part of the index that the loop leaves alone."""
        inner = {s.var}
        for x in walk_stmts(s.body):
            if isinstance(x, (For, While)):
                return
            if isinstance(x, Let):
                inner.add(x.var)
        self.inner = inner
        found: dict[tuple[str, Expr], tuple[Buffer, int]] = {}
        for x in walk_stmts(s.body):
            if isinstance(x, Let) and x.var.dtype.is_index:
                self.note_affine(x.var, x.value)
            places = [(x.buf, x.idx)] if isinstance(x, Store) else []
            for e in loads(*exprs_of(x)):
                b, idx, _, _ = load_parts(e)
                places.append((b, idx))
            for b, idx in places:
                if (b.rank or b.scope != "local") and len(idx) == 1 and b.name in self.ptrs:
                    i = idx[0].args[0] if idx[0].op == "ramp" else idx[0]
                    if i.dtype.lanes == 1:
                        inv, rest = self.split(substitute(i, self.affine))
                        if inv is not None and rest is not None and len(found) < 8:
                            found[b.name, inv] = (b, element_bytes(b.dtype) * b.dtype.lanes)
        c = self.c
        for (name, inv), (b, size) in found.items():
            self.pointer(b)
            self.emit(inv * size)
            c.op("i32.add")
            n = self.local("i32")
            c.op("local.set", n)
            self.bases[name, inv] = n

    def note_affine(self, v: Expr, value: Expr) -> None:
        if value.op in ("add", "sub", "mul"):
            e = substitute(value, self.affine)
            if not loads(e):
                self.affine[v] = e
                return
        self.affine.pop(v, None)

    def split(self, e: Expr) -> tuple[Expr | None, Expr | None]:
        """The variable parts of an index that the innermost loop leaves alone and that it changes; None for nothing."""
        same: dict[tuple[Expr, ...], int] = {}
        rest: dict[tuple[Expr, ...], int] = {}
        for m, k in linear(e).items():
            if m:
                (rest if any(x in self.inner if x.op == "var" else x.op == "load" or loads(x) or free_vars(x) & self.inner for x in m) else same)[m] = k
        return from_linear(same) if same else None, from_linear(rest) if rest else None

    def address(self, b: Buffer, idx: Expr) -> int:
        """Pushes the address of element ``idx`` without its constant part; returns that part in bytes for the immediate."""
        size = element_bytes(b.dtype) * b.dtype.lanes
        if self.bases:
            whole = substitute(idx, self.affine)
            inv, rest = self.split(whole)
            base = None if inv is None else self.bases.get((b.name, inv))
            if base is not None and rest is not None:
                return self.from_base(b, base, whole, rest, size)
        k = linear(idx).get((), 0)
        dyn = idx - k
        lo = bounds(dyn)[0]
        if k < 0 or (k > 0 and dyn.op != "const" and (lo is None or lo < 0)):
            dyn, k = idx, 0
        c = self.c
        if dyn.op == "const":
            self.pointer(b)
            if dyn.attr:
                c.const("i32", dyn.attr * size)
                c.op("i32.add")
            return k * size
        key = (b.name, dyn)
        for m in reversed(self.cache):
            if key in m:
                c.op("local.get", m[key])
                return k * size
        self.pointer(b)
        self.emit(binary("mul", dyn, const(size)) if dyn.op in ("add", "sub", "mul") else dyn)
        if dyn.op not in ("add", "sub", "mul") and size > 1:
            c.const("i32", size.bit_length() - 1 if size & (size - 1) == 0 else size)
            c.op("i32.shl" if size & (size - 1) == 0 else "i32.mul")
        c.op("i32.add")
        if not loads(dyn):
            n = self.own_local("i32")  # valid until its scope ends
            c.op("local.tee", n)
            self.cache[-1][key] = n
        return k * size

    def from_base(self, b: Buffer, base: int, whole: Expr, rest: Expr, size: int) -> int:
        """As :meth:`address`, from a pointer that :meth:`hoist` made."""
        c = self.c
        k = linear(whole).get((), 0)
        lo = bounds(whole - k)[0]
        if k < 0 or (k > 0 and (lo is None or lo < 0)):
            rest, k = rest + k, 0
        key = (f"{b.name}@{base}", rest)
        for m in reversed(self.cache):
            if key in m:
                c.op("local.get", m[key])
                return k * size
        c.op("local.get", base)
        self.emit(rest * size)
        c.op("i32.add")
        n = self.own_local("i32")
        c.op("local.tee", n)
        self.cache[-1][key] = n
        return k * size

    def access(self, buf: Buffer, idx: Expr, ins: str, size: int, lane: int | None = None) -> None:
        off = self.address(buf, idx)
        self.c.mem(ins, off, min(size, element_bytes(buf.dtype)).bit_length() - 1, lane)

    def load(self, e: Expr) -> None:
        buf, idx, m, o = load_parts(e)
        d, c = e.dtype, self.c
        if buf.rank == 0 and buf.scope == "local":
            n = self.regs.get(buf.name)
            if not isinstance(n, int):
                raise self.fail(e, "register variable used before it is allocated" if n is None else "a vector this wide is only usable by lanes")
            c.op("local.get", n)
            return
        if len(idx) != 1:
            raise self.fail(e, "buffers must be flat; run flatten first")
        if m is None:
            self.plain_load(buf, idx[0], e)
            return
        assert o is not None
        scalar = m if m.dtype.lanes == 1 else m.args[0] if m.op == "bcast" else None
        if scalar is not None:
            self.emit(scalar)
            self.c.start("if", valtype(d))
            self.cache.append({})
            self.plain_load(buf, idx[0], load(buf, idx))
            self.cache.pop()
            c.op("else")
            self.emit(o)
            c.op("end")
            return
        n = self.local("v128")
        self.emit(o)
        c.op("local.set", n)
        mono = m.op in ("lt", "le") and m.args[0].op == "ramp" and m.args[0].attr[0] > 0 and m.args[1].op == "bcast" and _unit(idx[0])
        if mono:
            self.emit(self.lane(m, d.lanes - 1))
            c.start("if")
            self.cache.append({})
            self.plain_load(buf, idx[0], load(buf, idx))
            self.cache.pop()
            c.op("local.set", n)
            c.op("else")
        for k in range(d.lanes):
            self.emit(self.lane(m, k))
            c.start("if")
            self.cache.append({})
            c.op("local.get", n)
            self.emit(self.lane(load(buf, idx), k))
            self.into_lane(d)
            c.lane(f"{prefix(d)}.replace_lane", k)
            c.op("local.set", n)
            self.cache.pop()
            c.op("end")
        if mono:
            c.op("end")
        c.op("local.get", n)
        self.release("v128", n)

    def plain_load(self, buf: Buffer, idx: Expr, e: Expr) -> None:
        d, s = e.dtype, buf.dtype
        if d.lanes == 1:
            ins = f"{valtype(d)}.load"
            if not d.is_float and d.bits < 32:
                ins += f"{max(d.bits, 8)}_{'s' if signed(d) else 'u'}"
            self.access(buf, idx, ins, element_bytes(d))
            return
        w, b = width(d), s.bits
        if s.lanes > 1:  # a local array of vectors
            if b * s.lanes != 128:
                self.by_lanes(e)
                return
            self.access(buf, idx, "v128.load", 16)
            return
        if not _unit(idx) or s.is_index or (w == 64 and b < 32):
            self.by_lanes(e)
            return
        base = idx.args[0]
        c = self.c
        u = "s" if signed(s) else "u"
        if b == w:
            self.access(buf, base, "v128.load", 16)
        elif b * 2 == w:
            self.access(buf, base, f"v128.load{b}x{d.lanes}_{u}", 8)
        else:  # bytes in lanes of 32 bits
            self.access(buf, base, "v128.load32_zero", 4)
            c.op(f"i16x8.extend_low_i8x16_{u}")
            c.op(f"i32x4.extend_low_i16x8_{u}")
        if s.is_bool:
            c.v128(bytes(16))
            c.op(f"{prefix(d)}.ne")

    def store(self, s: Store) -> None:
        b, c, d = s.buf, self.c, s.value.dtype
        if b.rank == 0 and b.scope == "local":
            self.store_register(s)
            return
        if len(s.idx) != 1:
            raise CompilationError(f"buffers must be flat, {b.name} is not; run flatten first", op=self.name)
        idx, m = s.idx[0], s.mask
        if m is not None:
            scalar = m if m.dtype.lanes == 1 else m.args[0] if m.op == "bcast" else None
            mono = m.op in ("lt", "le") and m.args[0].op == "ramp" and m.args[0].attr[0] > 0 and m.args[1].op == "bcast" and _unit(idx)
            if scalar is not None or mono:
                self.emit(scalar if scalar is not None else self.lane(m, m.dtype.lanes - 1))
                c.start("if")
                self.cache.append({})
                self.store(Store(b, s.idx, s.value))
                self.cache.pop()
                if mono and scalar is None:
                    c.op("else")
                    self.store_lanes(b, idx, s.value, m)
                c.op("end")
                return
        if d.lanes == 1:
            off = self.address(b, idx)
            self.emit(s.value)
            self.store_scalar(b, off)
            return
        lw, bb = width(d), b.dtype.bits
        if m is not None or not full(d) or (b.dtype.lanes == 1 and (not _unit(idx) or b.dtype.is_index or (lw == 64 and bb < 64))):
            self.store_lanes(b, idx, s.value, m)
            return
        if b.dtype.lanes > 1:
            if bb * b.dtype.lanes != 128:
                self.store_lanes(b, idx, s.value, m)
                return
            off = self.address(b, idx)
            self.emit(s.value)
            c.mem("v128.store", off, 2)
            return
        off = self.address(b, idx.args[0])
        self.emit(s.value)
        if b.dtype.is_bool:
            self.pattern(d, [1] * d.lanes)
            c.op("v128.and")
        a = element_bytes(b.dtype).bit_length() - 1
        if bb == lw:
            c.mem("v128.store", off, a)
            return
        u = "s" if signed(b.dtype) else "u"
        if lw == 32:
            c.v128(bytes(16))
            c.op(f"i16x8.narrow_i32x4_{u}")
        if bb == 8:
            c.v128(bytes(16))
            c.op(f"i8x16.narrow_i16x8_{u}")
        c.mem("v128.store64_lane" if bb * 2 == lw else "v128.store32_lane", off, a, 0)

    def store_scalar(self, b: Buffer, off: int) -> None:
        d = b.dtype.scalar
        size = element_bytes(d)
        if d.is_index:
            self.c.op("i64.extend_i32_s")
            self.c.mem("i64.store", off, 3)
            return
        t = valtype(d)
        self.c.mem(f"{t}.store" + (str(d.bits) if not d.is_float and d.bits < 32 else ""), off, size.bit_length() - 1)

    def store_lanes(self, b: Buffer, idx: Expr, value: Expr, m: Expr | None) -> None:
        """One scalar store for each lane, under its mask."""
        c, d = self.c, value.dtype
        n = -1
        if full(d) and value.op not in ("var", "bcast"):
            n = self.local("v128")
            self.emit(value)
            c.op("local.set", n)
        for k in range(d.lanes):
            if m is not None:
                self.emit(self.lane(m, k))
                c.start("if")
                self.cache.append({})
            off = self.address(b if b.dtype.lanes == 1 else _scalars(b), self.lane(idx, k) if b.dtype.lanes == 1 else idx * b.dtype.lanes + k)
            if n >= 0:
                c.op("local.get", n)
                self.pick(d, k)
            else:
                self.emit(self.lane(value, k))
            self.store_scalar(b, off)
            if m is not None:
                self.cache.pop()
                c.op("end")
        if n >= 0:
            self.release("v128", n)

    def store_register(self, s: Store) -> None:
        n = self.regs.get(s.buf.name)
        if n is None:
            raise CompilationError(f"register variable {s.buf.name} is not allocated", op=self.name)
        c = self.c
        if s.mask is not None:
            self.emit(s.mask)
            c.start("if")
            self.cache.append({})
        if isinstance(n, int):
            self.emit(s.value)
            c.op("local.set", n)
        else:
            for k in range(len(n)):
                self.emit(self.lane(s.value, k))
            for x in reversed(n):
                c.op("local.set", x)
        if s.mask is not None:
            self.cache.pop()
            c.op("end")


def _scalars(b: Buffer) -> Buffer:
    return Buffer(b.name, b.dtype.scalar, b.shape, b.scope, b.writable)


def _unit(idx: Expr) -> bool:
    return idx.op == "ramp" and bool(idx.attr[0] == 1)


def const_data(funcs: Sequence[Func]) -> tuple[dict[str, int], list[tuple[int, bytes]], int]:
    """Offsets of const buffers, their data segments, and the bytes they need in all."""
    offs: dict[str, int] = {}
    segs: list[tuple[int, bytes]] = []
    at = 0
    for f in funcs:
        for name, a in f.data.items():
            if name not in offs:
                raw = np.ascontiguousarray(a).tobytes()
                offs[name] = at
                segs.append((at, raw))
                at += (len(raw) + 63) // 64 * 64
    return offs, segs, at


def legalize_wasm(f: Func) -> Func:
    """A kernel with the loop passes done, made printable: whole bytes, no 16-bit floats, vectors that fit, shared parts named again."""
    g = split_vectors(legalize_dtype(lower_subbyte(f)))
    return f if g is f else place_lets(g)


def print_module(funcs: Sequence[Func], relaxed_simd: bool = True, shared_pages: int | None = None) -> bytes:
    """The module of some printable kernels; each exports ``name`` and ``name.range``. Kernels may ``Call`` each other.

    ``relaxed_simd``: multiply-adds may become ``relaxed_madd``. ``shared_pages``: the memory is shared and at most this many
    64 KiB pages. Raises CompilationError for what WebAssembly cannot express (a defect of the passes before)."""
    offs, segs, _ = const_data(funcs)
    index = {f.name: 2 * i for i, f in enumerate(funcs)}
    out: list[Function] = []
    for f in funcs:
        for s in walk_stmts(f.body):
            if isinstance(s, For) and s.kind in ("vectorize", "unroll"):
                raise CompilationError(f"loop {s.var!r} is still {s.kind}", op=f.name, hint="run the shared loop passes first")
        out.append(KernelPrinter(f, index, offs, relaxed_simd).kernel())
        out.append(KernelPrinter(f, index, offs, relaxed_simd).range())
    pages = (1, shared_pages)
    return Module(out, segs, (("sp", "i32", True), ("data", "i32", False)), pages=pages, shared=shared_pages is not None).encode()


__all__ = ["legalize_wasm", "print_module", "const_data", "bits_of", "KernelPrinter"]
