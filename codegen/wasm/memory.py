"""Memory in WebAssembly kernels: addresses, loads, stores.

An address is a pointer, a variable part and a constant that becomes the instruction's immediate. Before an innermost loop, pointer and
the part of an index that the loop leaves alone become one local (:meth:`MemoryPrinter.hoist`): engines do not move code out of loops.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from luthier.codegen.wasm.bytes import ByteVectors
from luthier.codegen.wasm.scalar import signed, valtype
from luthier.codegen.wasm.vector import full, prefix, width
from luthier.ir.dtypes import DType, types_in
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, Poly, bounds, const, free_vars, from_linear, linear, load, load_parts, substitute
from luthier.ir.loop import Block, Buffer, For, Let, Stmt, Store, While, children, exprs_of, walk_stmts

GUARD = 1 << 18  # bytes before the first buffer of a program


def element_bytes(d: DType) -> int:
    """Bytes of one lane in memory. Raises CompilationError below one byte (``lower_subbyte`` comes first)."""
    if d.bits < 8:
        raise CompilationError(f"WebAssembly has no memory elements of type {d}", hint="run lower_subbyte first")
    return d.bits // 8


@cache
def _indices_in(types: int) -> bool:
    """Whether a set of types (``Expr.types``) holds one of indices: without, nothing is read from memory."""
    return any(d.is_index for d in types_in(types))


class MemoryPrinter(ByteVectors):
    """``consts``: places of const buffers, counted from global 1, or addresses when ``fixed``."""

    def __init__(self, name: str, relaxed: bool, consts: dict[str, int], fixed: bool) -> None:
        super().__init__(name, relaxed)
        self.consts, self.fixed = consts, fixed
        self.ptrs: dict[str, int] = {}
        self.known: dict[Any, int] = {}  # addresses in locals, of all scopes around what is being emitted
        self.scopes: list[list[Any]] = [[]]  # which of them each scope made
        self.inner: set[Expr] = set()  # what the innermost loop defines
        self.bases: dict[tuple[str, Expr], int] = {}  # pointers that it leaves alone, by buffer and part of the index
        self.affine: dict[Expr, Poly] = {}  # what index Lets stand for
        self.masks: dict[Expr, Expr] = {}  # what Lets of masks stand for
        self.skip: set[Expr] = set()  # those of the innermost loop that nothing needs
        self.bodies: dict[int, list[Stmt]] = {}  # statements of every innermost loop
        self.taken: dict[Expr, tuple[Expr | None, Expr | None, int]] = {}  # indices of the innermost loop, without constants, taken apart
        self.resolved: dict[Any, tuple[Expr, Expr | None, Expr | None, int, bool]] = {}

    def enter(self) -> None:
        """A scope begins: code that may not run, or runs again."""
        self.scopes.append([])

    def leave_scope(self) -> None:
        for key in self.scopes.pop():
            del self.known[key]

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
        self.c.get(self.ptrs[b.name])

    def constant(self, name: str) -> None:
        """Where a table of the kernel's own lies: at a place known now, or counted from global 1."""
        if not self.fixed:
            self.c.op("global.get", 1)
        self.c.const("i32", self.consts[name])
        if not self.fixed:
            self.c.op("i32.add")

    def innermost(self, s: Stmt) -> bool:
        """Notes the loops without loops inside, with all their statements; whether there is a loop in ``s``."""
        found = False
        for x in children(s):
            t = type(x)
            if t is not Store and t is not Let and self.innermost(x):
                found = True
        if isinstance(s, (For, While)):
            if not found and isinstance(s, For):
                self.bodies[id(s)] = list(walk_stmts(s.body))
            found = True
        return found

    def hoist(self, s: For) -> None:
        """Before an innermost loop: for every access of its body, pointer + the part of the index that the loop leaves alone. Index
        Lets that only such accesses need are not printed."""
        body = self.bodies.get(id(s))
        if body is None:
            return
        defined = [x for x in body if type(x) is Let]
        self.inner = {s.var, *[x.var for x in defined]}
        for x in defined:
            if x.var.dtype.is_index:
                self.note_affine(x.var, x.value)
        found: dict[tuple[str, Expr], tuple[Buffer, int]] = {}
        needed: set[Expr] = set()
        seen: set[Expr] = set()
        lets: list[Let] = []
        taken: dict[Expr, tuple[Expr | None, Expr | None, int]] = {}

        def place(b: Buffer, idx: tuple[Expr, ...]) -> None:
            i = idx[0].args[0] if len(idx) == 1 and idx[0].op == "ramp" else idx[0] if len(idx) == 1 else None
            if i is not None and (b.rank or b.scope != "local") and b.name in self.ptrs and i.dtype.lanes == 1:
                key = _without_constant(i)[0]
                parts = taken.get(key)
                if parts is None:
                    parts = taken[key] = self.split(key)
                inv, rest, _ = parts
                if inv is not None and rest is not None and ((b.name, inv) in found or len(found) < 8):
                    found[b.name, inv] = (b, element_bytes(b.dtype) * b.dtype.lanes)
                    needed.update(free_vars(rest))
                    return
            for x in idx:
                scan(x)

        def scan(e: Expr) -> None:
            stack = [e]
            while stack:
                e = stack.pop()
                if e in seen or not _indices_in(e.types):
                    continue
                seen.add(e)
                if not e.loading:
                    needed.update(free_vars(e))
                elif e.op == "load":
                    if e.args:  # not a register
                        b, idx, m, o = load_parts(e)
                        place(b, idx)
                        if o is not None:
                            stack.append(o)
                        if m is not None:
                            stack.append(m)
                else:
                    stack.extend(e.args[::-1])

        for x in body:
            if type(x) is Let:
                if x.var in self.affine:
                    lets.append(x)
                else:
                    scan(x.value)
            elif type(x) is Store:
                if x.idx:
                    place(x.buf, x.idx)
                scan(x.value)
                if x.mask is not None:
                    scan(x.mask)
            elif type(x) is not Block:
                for e in exprs_of(x):
                    scan(e)
        for x in reversed(lets):
            if x.var in needed:
                scan(x.value)
            else:
                self.skip.add(x.var)
        c = self.c
        bases: dict[tuple[str, Expr], int] = {}
        for (name, inv), (b, size) in found.items():
            self.pointer(b)
            self.scalar(inv * size)
            c.op("i32.add")
            n = self.local("i32")
            c.set(n)
            bases[name, inv] = n
        self.bases, self.taken = bases, taken
        self.resolved = {}

    def expand(self, e: Expr) -> Poly:
        """An index with the Lets in it replaced by what they stand for, as a sum."""
        p, affine = linear(e), self.affine
        if not affine:
            return p
        out: Poly = {}
        for m, k in p.items():
            q = affine.get(m[0]) if len(m) == 1 else None
            if q is not None:
                for n, j in q.items():
                    out[n] = out.get(n, 0) + j * k
            elif m and not all(affine.keys().isdisjoint(free_vars(x)) for x in m):
                return linear(substitute(e, {v: from_linear(affine[v]) for v in free_vars(e) if v in affine}))
            else:
                out[m] = out.get(m, 0) + k
        return {m: k for m, k in out.items() if k}

    def note_affine(self, v: Expr, value: Expr) -> None:
        if value.op in ("add", "sub", "mul") and not value.loading:
            self.affine[v] = self.expand(value)
        else:
            self.affine.pop(v, None)

    def split(self, e: Expr) -> tuple[Expr | None, Expr | None, int]:
        """The variable parts of an index that the innermost loop leaves alone and that it changes, None for nothing; its constant. Lets
        are expanded."""
        same: dict[tuple[Expr, ...], int] = {}
        rest: dict[tuple[Expr, ...], int] = {}
        inner = self.inner
        constant = 0
        for m, k in self.expand(e).items():
            if not m:
                constant = k
            else:
                changes = False
                for x in m:
                    if x in inner if x.op == "var" else x.loading or not inner.isdisjoint(free_vars(x)):
                        changes = True
                (rest if changes else same)[m] = k
        return from_linear(same) if same else None, from_linear(rest) if rest else None, constant

    def resolve(self, idx: Expr) -> tuple[Expr, Expr | None, Expr | None, int, int, bool]:
        """An index taken apart for the current loop: what it adds to a constant, of that the parts which the loop leaves alone and
        changes, the constant with and without the Lets expanded, whether the rest cannot be negative. Remembered by all but the
        constant, which unrolled code varies."""
        dyn, k = _without_constant(idx)
        r = self.resolved.get(dyn)
        if r is None:
            inv, rest, extra = None, None, 0
            if self.bases:
                inv, rest, extra = self.taken.get(dyn) or self.split(dyn)
            lo = 0 if self.fixed or dyn.op == "const" else bounds(dyn)[0]
            r = self.resolved[dyn] = (dyn, inv, rest, extra, lo is not None and lo >= max(extra, 0))
        return r[0], r[1], r[2], k, k + r[3], r[4]

    def foldable(self, k: int, positive: bool) -> bool:
        """Whether a constant of ``k`` bytes may be an immediate: adding it must not cross 2 ** 32. Either what it is added to is no
        less than the pointer; or, because an access is inside its buffer, it is less by ``k`` at most, and buffers of a program
        start at GUARD or later. (A negative constant is added to GUARD.)"""
        return -GUARD < k <= GUARD if self.fixed else k == 0 or (k > 0 and positive)

    def address(self, b: Buffer, idx: Expr) -> int:
        """Pushes the address of element ``idx`` without its constant part; returns that part in bytes for the immediate."""
        size = element_bytes(b.dtype) * b.dtype.lanes
        c = self.c
        dyn, inv, rest, k, whole_k, positive = self.resolve(idx)
        base = self.bases.get((b.name, inv)) if inv is not None and rest is not None else None
        if base is not None and rest is not None:
            if not self.foldable(whole_k * size, positive):
                rest, whole_k = rest + whole_k, 0
            dyn, k = rest, whole_k
        else:
            if self.skip and free_vars(dyn) & self.skip:
                dyn, k, positive = from_linear(self.expand(idx)), 0, False
            elif not self.foldable(k * size, positive or dyn.op == "const"):
                dyn, k = idx, 0
            if dyn.op == "const":
                self.pointer(b)
                away = dyn.attr * size + min(k * size, 0)  # below 0 only where a mask is never true
                if away:
                    c.const("i32", away)
                    c.op("i32.add")
                return max(k * size, 0)
        offset = k * size
        key = (b.name, base, dyn, offset < 0)
        if offset < 0:
            offset += GUARD
        n = self.known.get(key)
        if n is not None:
            c.get(n)
            return offset
        if base is not None:
            c.get(base)
        else:
            self.pointer(b)
        if dyn.op in ("add", "sub", "mul"):
            self.scalar(dyn * size if size > 1 else dyn)
        else:
            self.scalar(dyn)
            if size > 1:
                c.const("i32", size.bit_length() - 1 if size & (size - 1) == 0 else size)
                c.op("i32.shl" if size & (size - 1) == 0 else "i32.mul")
        c.op("i32.add")
        if k < 0:
            c.const("i32", -GUARD)
            c.op("i32.add")
        if base is not None or not dyn.loading:
            n = self.own_local("i32")  # valid until its scope ends
            c.op("local.tee", n)
            self.known[key] = n
            self.scopes[-1].append(key)
        return offset

    def packed(self, e: Expr) -> tuple[Buffer, Expr] | None:
        """Buffer and first index of neighbouring elements that are read as one number of 32 or 64 bits."""
        a = e.args[0]
        if a.op != "load" or a.dtype.lanes * a.dtype.bits != e.dtype.bits or e.dtype.bits not in (32, 64):
            return None
        buf, idx, m, _ = load_parts(a)
        return (buf, idx[0].args[0]) if m is None and len(idx) == 1 and _unit(idx[0]) and buf.dtype.lanes == 1 else None

    def packed_load(self, e: Expr) -> None:
        found = self.packed(e)
        if found is None:
            raise self.fail(e, "bitcast of a vector to a scalar")
        self.access(*found, f"{valtype(e.dtype)}.load", e.dtype.bits // 8)

    def access(self, buf: Buffer, idx: Expr, ins: str, size: int, lane: int | None = None) -> None:
        off = self.address(buf, idx)
        self.c.mem(ins, off, min(size, element_bytes(buf.dtype)).bit_length() - 1, lane)

    def load(self, e: Expr) -> None:
        buf, idx, m, o = load_parts(e)
        d, c = e.dtype, self.c
        if not buf.shape and buf.scope == "local":
            n = self.regs.get(buf.name)
            if not isinstance(n, int):
                raise self.fail(e, "register variable used before it is allocated" if n is None else "a vector this wide is only usable by lanes")
            c.get(n)
            return
        if len(idx) != 1:
            raise self.fail(e, "buffers must be flat; run flatten first")
        if m is None:
            self.plain_load(buf, idx[0], e)
            return
        assert o is not None
        m = self.masks.get(m, m)
        scalar = m if m.dtype.lanes == 1 else m.args[0] if m.op == "bcast" else None
        if scalar is not None:
            self.emit(scalar)
            self.c.start("if", valtype(d))
            self.enter()
            self.plain_load(buf, idx[0], load(buf, idx))
            self.leave_scope()
            c.op("else")
            self.emit(o)
            c.op("end")
            return
        n = self.local("v128")
        self.emit(o)
        c.set(n)
        mono = m.op in ("lt", "le") and m.args[0].op == "ramp" and m.args[0].attr[0] > 0 and m.args[1].op == "bcast" and _unit(idx[0])
        if mono:
            self.emit(self.lane(m, d.lanes - 1))
            c.start("if")
            self.enter()
            self.plain_load(buf, idx[0], load(buf, idx))
            self.leave_scope()
            c.set(n)
            c.op("else")
        for k in range(d.lanes):
            self.emit(self.lane(m, k))
            c.start("if")
            self.enter()
            c.get(n)
            self.emit(self.lane(load(buf, idx), k))
            self.into_lane(d)
            c.lane(f"{prefix(d)}.replace_lane", k)
            c.set(n)
            self.leave_scope()
            c.op("end")
        if mono:
            c.op("end")
        c.get(n)
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
        b = s.buf
        if not b.shape and b.scope == "local":
            n = self.regs.get(b.name)
            if s.mask is None and n.__class__ is int:
                self.emit(s.value)
                self.c.set(n)
            else:
                self.store_register(s)
            return
        c, d = self.c, s.value.dtype
        if len(s.idx) != 1:
            raise CompilationError(f"buffers must be flat, {b.name} is not; run flatten first", op=self.name)
        idx, m = s.idx[0], s.mask
        if m is not None:
            m = self.masks.get(m, m)
            scalar = m if m.dtype.lanes == 1 else m.args[0] if m.op == "bcast" else None
            mono = m.op in ("lt", "le") and m.args[0].op == "ramp" and m.args[0].attr[0] > 0 and m.args[1].op == "bcast" and _unit(idx)
            if scalar is not None or mono:
                self.emit(scalar if scalar is not None else self.lane(m, m.dtype.lanes - 1))
                c.start("if")
                self.enter()
                self.store(Store(b, s.idx, s.value))
                self.leave_scope()
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
            c.set(n)
        for k in range(d.lanes):
            if m is not None:
                self.emit(self.lane(m, k))
                c.start("if")
                self.enter()
            off = self.address(b if b.dtype.lanes == 1 else _scalars(b), self.lane(idx, k) if b.dtype.lanes == 1 else idx * b.dtype.lanes + k)
            if n >= 0:
                c.get(n)
                self.pick(d, k)
            else:
                self.emit(self.lane(value, k))
            self.store_scalar(b, off)
            if m is not None:
                self.leave_scope()
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
            self.enter()
        if isinstance(n, int):
            self.emit(s.value)
            c.set(n)
        else:
            for k in range(len(n)):
                self.emit(self.lane(s.value, k))
            for x in reversed(n):
                c.set(x)
        if s.mask is not None:
            self.leave_scope()
            c.op("end")


def _without_constant(i: Expr) -> tuple[Expr, int]:
    """An index without the constant that stands last in a normalized sum, and the constant."""
    if i.op == "add" and i.args[1].op == "const":
        return i.args[0], i.args[1].attr
    return (const(0), i.attr) if i.op == "const" else (i, 0)


def _scalars(b: Buffer) -> Buffer:
    return Buffer(b.name, b.dtype.scalar, b.shape, b.scope, b.writable)


def _unit(idx: Expr) -> bool:
    return idx.op == "ramp" and bool(idx.attr[0] == 1)
