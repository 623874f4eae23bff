"""Loads and stores of a kernel: addresses, masks, strides, gathers, bytes of bool."""

from __future__ import annotations

from luthier.codegen.llvm.expr import ExprPrinter
from luthier.codegen.llvm.ops import splat, suffix
from luthier.codegen.llvm.types import item_bytes, mem_scalar, mem_type, reg_type
from luthier.errors import CompilationError
from luthier.ir.dtypes import DType
from luthier.ir.expr import Expr, is_const, load_parts, poly_const, ramp
from luthier.ir.loop import Buffer, Store
from luthier.passes.loop.load_spans import lane_at


class MemoryPrinter(ExprPrinter):
    """Everything that touches a buffer."""

    def pointer(self, b: Buffer) -> str:
        """The base pointer of a buffer; constant data of the kernel becomes a global on first use."""
        p = self.buffers.get(b.name)
        if p is not None:
            return p
        data = getattr(self, "f", None) and self.f.data.get(b.name)  # type: ignore[attr-defined]
        if data is None:
            raise CompilationError(f"buffer {b.name} is neither a parameter nor allocated")
        import numpy as np

        self.buffers[b.name] = name = self.constant_bytes(np.ascontiguousarray(data).tobytes())
        return name

    def constant_bytes(self, raw: bytes) -> str:
        """A global of the kernel's module."""
        name = f"@lt.data.{self.kernel_symbol()}.{len(self.globals)}"
        text = "".join(f"\\{x:02X}" for x in raw)
        self.globals.append(f'{name} = internal constant [{max(len(raw), 1)} x i8] c"{text or chr(92) + "00"}", align 64\n')
        return name

    def text_constant(self, text: str) -> str:
        """A string that ends with a zero byte, once."""
        if text not in self.texts:
            self.texts[text] = self.constant_bytes(text.encode() + b"\0")
        return self.texts[text]

    def kernel_symbol(self) -> str:
        name = getattr(self, "name", "k")
        return "".join(c if c.isalnum() else "_" for c in name)

    def forget_addresses(self, name: str) -> None:
        for t in self.addresses:
            for k in [k for k in t if k[0] == name]:
                del t[k]

    def address(self, b: Buffer, i: Expr) -> str:
        """Pointer to element ``i``: (base + variable part), kept for other constants, + constant part."""
        base = self.pointer(b)
        c = poly_const(i)
        rest = i - c if c else i
        if rest.op == "const":
            p = base
        else:
            key = (b.name, rest)
            p = ""
            if not rest.loading:
                for t in reversed(self.addresses):
                    if key in t:
                        p = t[key]
                        break
            if not p:
                p = self.ins(f"getelementptr {self.element(b)}, ptr {base}, i64 {self.value(rest)}")
                if not rest.loading:
                    self.addresses[-1][key] = p
        return self.ins(f"getelementptr i8, ptr {p}, i64 {c * self.element_bytes(b)}") if c else p

    def element(self, b: Buffer) -> str:
        if b.dtype.lanes == 1:
            return mem_type(b.dtype)
        return f"[{b.dtype.lanes} x {mem_scalar(b.dtype)}]"

    def element_bytes(self, b: Buffer) -> int:
        return item_bytes(b.dtype) * b.dtype.lanes

    def align(self, b: Buffer) -> int:
        """Alignment that every element of the buffer has."""
        a = item_bytes(b.dtype)
        if b.scope == "local" and b.dtype.lanes > 1:
            n = a * b.dtype.lanes
            return min(n & -n, 64)
        return a

    # ------------------------------------------------------------ loads

    def load(self, e: Expr) -> str:
        b, idx, mask, other = load_parts(e)
        if b.scope == "local" and b.rank == 0:
            v = self.regs.get(b.name)
            if v is None:
                raise CompilationError(f"register variable {b.name} is read outside its Alloc")
            return v
        if len(idx) != 1:
            raise CompilationError(f"buffer {b.name} is not flat", hint="flatten must run before the printer")
        d = e.dtype
        i = idx[0]
        if mask is not None:
            assert other is not None
            mask = self.uniform.get(mask, mask)
            if not is_const(mask, True):
                return self._masked(b, i, d, mask, other)
        v = self._plain(b, i, d)
        return self.from_memory(v, d)

    def from_memory(self, v: str, d: DType) -> str:
        """Bytes of bool to conditions."""
        return self.ins(f"icmp ne {mem_type(d)} {v}, {splat('0', d, 'i8')}") if d.is_bool else v

    def to_memory(self, v: str, d: DType) -> str:
        return self.ins(f"zext {reg_type(d)} {v} to {mem_type(d)}") if d.is_bool else v

    def _plain(self, b: Buffer, i: Expr, d: DType) -> str:
        n = d.lanes
        if n == 1 or b.dtype.lanes > 1:
            return self.ins(f"load {mem_type(d)}, ptr {self.address(b, i)}, align {self.align(b)}")
        s = mem_scalar(d)
        if i.op == "ramp":
            st, base = i.attr[0], i.args[0]
            if st == 1:
                return self.ins(f"load {mem_type(d)}, ptr {self.address(b, base)}, align {self.align(b)}")
            if st == -1:
                v = self.ins(f"load {mem_type(d)}, ptr {self.address(b, base - (n - 1))}, align {self.align(b)}")
                return self.pick(v, "poison", mem_type(d), list(range(n - 1, -1, -1)))
            if st == 2 and n % 2 == 0:  # two overlapping vectors that end at the last element needed
                lo = self.ins(f"load {mem_type(d)}, ptr {self.address(b, base)}, align {self.align(b)}")
                hi = self.ins(f"load {mem_type(d)}, ptr {self.address(b, base + (n - 1))}, align {self.align(b)}")
                h = n // 2
                return self.pick(lo, hi, mem_type(d), [*range(0, n, 2), *(n + 2 * k + 1 for k in range(h))])
        if i.op == "bcast":
            v = self.ins(f"load {s}, ptr {self.address(b, i.args[0])}, align {self.align(b)}")
            one = self.ins(f"insertelement {mem_type(d)} poison, {s} {v}, i64 0")
            return self.pick(one, "poison", mem_type(d), [0] * n)
        if i.loading and n >= 8 and (first := lane_at(i, 0)) is not None:
            return self._perhaps_whole(b, i, d, first)
        return self._lanes(b, i, d)

    def _lanes(self, b: Buffer, i: Expr, d: DType) -> str:
        """One lane after another."""
        v = "poison"
        for k, p in enumerate(self.lane_addresses(b, i)):
            x = self.ins(f"load {mem_scalar(d)}, ptr {p}, align {self.align(b)}")
            v = self.ins(f"insertelement {mem_type(d)} {v}, {mem_scalar(d)} {x}, i32 {k}")
        return v

    def _perhaps_whole(self, b: Buffer, i: Expr, d: DType, first: Expr) -> str:
        """A load at positions from memory: of one vector where they follow one another (the middle of a padded or rolled row)."""
        n, t = d.lanes, mem_type(d)
        fn = self.declare(f"llvm.vector.reduce.and.v{n}i1", f"i1 @(<{n} x i1>)")
        same = self.ins(f"icmp eq <{n} x i64> {self.value(i)}, {self.value(ramp(first, 1, n))}")
        whole, parts, join = self.label("whole"), self.label("parts"), self.label("join")
        self.emit(f"br i1 {self.ins(f'call i1 @{fn}(<{n} x i1> {same})')}, label %{whole}, label %{parts}")
        ends = []
        for name, make in ((whole, lambda: self.ins(f"load {t}, ptr {self.address(b, first)}, align {self.align(b)}")), (parts, lambda: self._lanes(b, i, d))):
            self.start(name)
            self.push()
            ends.append((make(), self.block))
            self.pop()
            self.emit(f"br label %{join}")
        self.start(join)
        return self.ins(f"phi {t} " + ", ".join(f"[ {v}, %{k} ]" for v, k in ends))

    def lane_addresses(self, b: Buffer, i: Expr) -> list[str]:
        """One pointer per lane of a vector index."""
        n = i.dtype.lanes
        if i.op == "ramp":
            return [self.address(b, i.args[0] + k * i.attr[0]) for k in range(n)]
        if i.op == "bcast":
            return [self.address(b, i.args[0])] * n
        if i.loading:
            lanes = [lane_at(i, k) for k in range(n)]
            if None not in lanes:  # an index from memory: no vector of indices to take apart
                return [self.address(b, x) for x in lanes if x is not None]
        const = 0
        if i.op == "add":  # a constant common to all lanes goes into the displacement
            for x, y in (i.args, reversed(i.args)):
                if y.op == "bcast" and y.args[0].op == "const":
                    i, const = x, y.args[0].attr
                    break
        v = self.value(i)
        base, el = self.pointer(b), self.element(b)
        out = []
        for k in range(n):
            lane = self.ins(f"extractelement <{n} x i64> {v}, i32 {k}")
            p = self.ins(f"getelementptr {el}, ptr {base}, i64 {lane}")
            out.append(self.ins(f"getelementptr i8, ptr {p}, i64 {const * self.element_bytes(b)}") if const else p)
        return out

    def _masked(self, b: Buffer, i: Expr, d: DType, mask: Expr, instead: Expr) -> str:
        n, t, s = d.lanes, mem_type(d), mem_scalar(d)
        m, other = self.value(mask), self.value(instead)
        zero = is_const(instead, 0)  # what the redirected access reads anyway
        if n == 1 or (b.dtype.lanes > 1) or (i.dtype.lanes == 1):
            if mask.dtype.lanes > 1:
                if i.dtype.lanes == 1 and mask.op != "bcast":
                    raise CompilationError(f"a lane mask on one element of {b.name}")
                mask, m = mask.args[0], self.value(mask.args[0])
            p = self.ins(f"select i1 {m}, ptr {self.address(b, i)}, ptr @lt.zero")
            v = self.from_memory(self.ins(f"load {t}, ptr {p}, align {item_bytes(d)}"), d)
            if zero:
                return v
            return self.ins(f"select i1 {m}, {reg_type(d)} {v}, {reg_type(d)} {other}")
        if mask.op == "bcast" and i.op in ("ramp", "bcast") and d.bits * n // 8 <= 64 and (i.op == "bcast" or i.attr[0] in (1, -1)):
            c = self.value(mask.args[0])  # one condition for all lanes: redirect the whole access
            first = i.args[0] if i.op == "bcast" or i.attr[0] == 1 else i.args[0] - (n - 1)
            p = self.ins(f"select i1 {c}, ptr {self.address(b, first)}, ptr @lt.zero")
            if i.op == "bcast":
                x = self.ins(f"insertelement {t} poison, {s} {self.ins(f'load {s}, ptr {p}, align {self.align(b)}')}, i64 0")
                v = self.pick(x, "poison", t, [0] * n)
            else:
                v = self.ins(f"load {t}, ptr {p}, align {self.align(b)}")
                if i.attr[0] == -1:
                    v = self.pick(v, "poison", t, list(range(n - 1, -1, -1)))
            if zero:
                return self.from_memory(v, d)
            return self.ins(f"select i1 {c}, {reg_type(d)} {self.from_memory(v, d)}, {reg_type(d)} {other}")
        if i.op == "ramp" and i.attr[0] == 1 and self.vector_masks(d):
            if d.is_bool:
                other = self.to_memory(other, d)
            fn = self.declare(f"llvm.masked.load.{suffix(t)}.p0", f"{t} @(ptr, <{n} x i1>, {t})")
            v = self.ins(f"call {t} @{fn}(ptr align {self.align(b)} {self.address(b, i.args[0])}, <{n} x i1> {m}, {t} {other})")
            return self.from_memory(v, d)
        if i.op == "ramp" and i.attr[0] == 1 and n >= 8:
            return self._mostly_whole(b, i, d, m, other)
        v = self._by_lane(b, i, d, m)
        return self.ins(f"select <{n} x i1> {m}, {reg_type(d)} {self.from_memory(v, d)}, {reg_type(d)} {other}")

    def _by_lane(self, b: Buffer, i: Expr, d: DType, m: str) -> str:
        n, t, s = d.lanes, mem_type(d), mem_scalar(d)
        v = "poison"
        for k, p in enumerate(self.lane_addresses(b, i)):
            c = self.ins(f"extractelement <{n} x i1> {m}, i32 {k}")
            q = self.ins(f"select i1 {c}, ptr {p}, ptr @lt.zero")
            v = self.ins(f"insertelement {t} {v}, {s} {self.ins(f'load {s}, ptr {q}, align {self.align(b)}')}, i32 {k}")
        return v

    def _mostly_whole(self, b: Buffer, i: Expr, d: DType, m: str, other: str) -> str:
        """A contiguous load under a lane mask without an instruction for it: all lanes at once where the mask is true throughout."""
        n, t, r = d.lanes, mem_type(d), reg_type(d)
        fn = self.declare(f"llvm.vector.reduce.and.v{n}i1", f"i1 @(<{n} x i1>)")
        whole, parts, join = self.label("whole"), self.label("parts"), self.label("join")
        self.emit(f"br i1 {self.ins(f'call i1 @{fn}(<{n} x i1> {m})')}, label %{whole}, label %{parts}")
        self.start(whole)
        self.push()
        x = self.from_memory(self.ins(f"load {t}, ptr {self.address(b, i.args[0])}, align {self.align(b)}"), d)
        self.pop()
        ends = [(x, self.block)]
        self.emit(f"br label %{join}")
        self.start(parts)
        self.push()
        y = self.from_memory(self._by_lane(b, i, d, m), d)
        y = self.ins(f"select <{n} x i1> {m}, {r} {y}, {r} {other}")
        self.pop()
        ends.append((y, self.block))
        self.emit(f"br label %{join}")
        self.start(join)
        return self.ins(f"phi {r} " + ", ".join(f"[ {v}, %{k} ]" for v, k in ends))

    def vector_masks(self, d: DType) -> bool:
        """Whether the target masks memory accesses of this element size in one instruction."""
        flags = self.target.flags
        if not self.target.is_x86:
            return False
        return item_bytes(d) >= 4 and "avx2" in flags or "avx512bw" in flags

    # ------------------------------------------------------------ stores

    def store(self, s: Store) -> None:
        self.begin_statement()
        b = s.buf
        if b.scope == "local" and b.rank == 0:
            v = self.value(s.value)
            if s.value.dtype.lanes != b.dtype.lanes:
                v = self.splat_value(v, b.dtype)
            if s.mask is not None:
                c = "i1" if s.mask.dtype.lanes == 1 else f"<{s.mask.dtype.lanes} x i1>"
                t = reg_type(b.dtype)
                v = self.ins(f"select {c} {self.value(s.mask)}, {t} {v}, {t} {self.regs[b.name]}")
            self.reg_types[b.name] = reg_type(b.dtype)
            self.regs[b.name] = v
            return
        if len(s.idx) != 1:
            raise CompilationError(f"buffer {b.name} is not flat", hint="flatten must run before the printer")
        i, d = s.idx[0], s.value.dtype
        v = self.to_memory(self.value(s.value), d)
        if s.mask is None:
            self._store(b, i, d, v)
            return
        n, mask = d.lanes, s.mask
        if mask.op == "bcast":
            mask = mask.args[0]
        m = self.value(mask)
        if mask.dtype.lanes == 1:
            then, exit_ = self.label("then"), self.label("fi")
            self.emit(f"br i1 {m}, label %{then}, label %{exit_}")
            self.start(then)
            self.push()
            self._store(b, i, d, v)
            self.pop()
            self.emit(f"br label %{exit_}")
            self.start(exit_)
            return
        if i.op == "ramp" and i.attr[0] == 1 and self.vector_masks(d):
            t = mem_type(d)
            fn = self.declare(f"llvm.masked.store.{suffix(t)}.p0", f"void @({t}, ptr, <{n} x i1>)")
            self.emit(f"call void @{fn}({t} {v}, ptr align {self.align(b)} {self.address(b, i.args[0])}, <{n} x i1> {m})")
            return
        addresses = self.lane_addresses(b, i)
        for k, p in enumerate(addresses):
            x = self.ins(f"extractelement {mem_type(d)} {v}, i32 {k}")
            c = self.ins(f"extractelement <{n} x i1> {m}, i32 {k}")
            then, exit_ = self.label("then"), self.label("fi")
            self.emit(f"br i1 {c}, label %{then}, label %{exit_}")
            self.start(then)
            self.emit(f"store {mem_scalar(d)} {x}, ptr {p}, align {self.align(b)}")
            self.emit(f"br label %{exit_}")
            self.start(exit_)

    def _store(self, b: Buffer, i: Expr, d: DType, v: str) -> None:
        n, t = d.lanes, mem_type(d)
        if n == 1 or b.dtype.lanes > 1:
            self.emit(f"store {t} {v}, ptr {self.address(b, i)}, align {self.align(b)}")
            return
        if i.op == "ramp" and i.attr[0] == 1:
            self.emit(f"store {t} {v}, ptr {self.address(b, i.args[0])}, align {self.align(b)}")
            return
        if i.op == "ramp" and i.attr[0] == -1:
            r = self.pick(v, "poison", t, list(range(n - 1, -1, -1)))
            self.emit(f"store {t} {r}, ptr {self.address(b, i.args[0] - (n - 1))}, align {self.align(b)}")
            return
        if i.op == "bcast":  # every lane writes the same element: the last one stays
            x = self.ins(f"extractelement {t} {v}, i32 {n - 1}")
            self.emit(f"store {mem_scalar(d)} {x}, ptr {self.address(b, i.args[0])}, align {self.align(b)}")
            return
        for k, p in enumerate(self.lane_addresses(b, i)):
            x = self.ins(f"extractelement {t} {v}, i32 {k}")
            self.emit(f"store {mem_scalar(d)} {x}, ptr {p}, align {self.align(b)}")


__all__ = ["MemoryPrinter"]
