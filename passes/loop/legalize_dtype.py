"""legalize_dtype: types that a target cannot compute with or address become types that it can.

Rules (each is data in :class:`Rules`):

* ``f16``, ``bf16`` without native arithmetic: values are carried in f32 and rounded after every operation that may be inexact
  (f32 has more than twice the bits, so one operation and one rounding is the correctly rounded result); memory keeps 16 bits.
* 8-bit floats: the same, memory keeps 8 bits (:mod:`luthier.passes.loop.float8`).
* values of 2 and 4 bits: carried in 8, wrapped by every cast to them (memory is :mod:`luthier.passes.loop.lower_subbyte`'s).
* 64-bit integers where there are none: values that are known to fit (:mod:`luthier.passes.loop.integer_ranges`) are carried in 32 bits, all
  others as two words (:mod:`luthier.passes.gpu.wide_words`). Memory keeps 64 bits: the low word is read of what fits, both are written.
* ``f64`` where there is none: two words, computed with integers.
* memory without 8- and 16-bit elements, or without those below a byte: a parameter becomes 32-bit words, a load extracts its part, a store is
  ``atomic_store_bits(word, mask, bits)``, because another thread may own the rest of the word. Elements that are vectors of whole
  words (:mod:`luthier.passes.loop.combine_accesses`) are stored as such. Buffers of a kernel's own get 32-bit elements.
* dot products of bytes in words (:mod:`luthier.ir.words`) without the instruction: the bytes are taken apart.

Before (WGSL): ``Y: bool[n]``, ``Y[i] = X[i] < 0``. After: ``Y: u32[(n + 3) // 4]``, ``call atomic_store_bits(&Y, i // 4, 255 <<
(i % 4 * 8), u32(X[i] < 0) << (i % 4 * 8))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.ir import intrin
from luthier.ir.dtypes import DType, bf16, f16, f32, f64, i8, i32, u8, u16, u32
from luthier.ir.errors import CompilationError
from luthier.ir.expr import (
    BINARY,
    COMPARE,
    UNARY,
    Expr,
    binary,
    bitcast,
    call,
    cast,
    compare,
    const,
    extract,
    load,
    load_parts,
    loads,
    rebuild,
    select,
    shuffle,
    unary,
    var,
    vreduce,
)
from luthier.ir.loop import Alloc, Block, Buffer, Call, For, Func, If, Let, Stmt, Store, While, block, contents_of, nodes_of
from luthier.ir.words import WORD, WORDS, word_dot, word_of_bytes
from luthier.passes.gpu.wide_words import PAIR, compare_pairs, is_wide, narrow_of, operate, pair, to_odd, wide_const, wide_of
from luthier.passes.loop import float8
from luthier.passes.loop.integer_ranges import IntegerRanges


@dataclass(frozen=True, slots=True)
class Rules:
    """What a target has. ``half``, ``bfloat``: f16 and bf16 as types of its own, in memory as well; ``subbyte``: values of 2 and 4 bits;
    ``word_memory``: elements of fewer bits are parts of words in memory, stored atomically; ``whole_words``: vectors of
    short elements are words as well. ``codes``: the printer knows the intrinsics ``CODES``, so that bits of short
    floats need not be taken apart wherever there are some. ``dots``: dot products of the bytes of two words are instructions."""

    int64: bool = True
    float64: bool = True
    half: bool = False
    bfloat: bool = False
    subbyte: bool = True
    word_memory: int = 0
    whole_words: bool = False
    codes: bool = False
    dots: bool = True


WGSL_RULES = Rules(int64=False, float64=False, subbyte=False, word_memory=32, codes=True, dots=False)
DEFAULT_RULES = Rules()
CUDA_RULES = Rules(word_memory=8, whole_words=True, codes=True)
LLVM_RULES = Rules(half=True, bfloat=True, subbyte=False)


def _store_bits(buf: Any, at: Any, mask: Any, bits: Any) -> None:
    flat = buf.reshape(-1)
    flat[int(at)] = (flat[int(at)] & ~np.uint32(mask)) | np.uint32(bits)


intrin.register("atomic_store_bits", _store_bits, "buf[at] = (buf[at] & ~mask) | bits, the bits under mask written atomically", effect=True)


# ---------------------------------------------------------------- 16-bit floats, on the bits


def half_to_f32(h: Expr) -> Expr:
    """IEEE half (``u32`` holding 16 bits) to f32, exact; no subnormal f32 occurs on the way."""
    n = h.dtype.lanes
    sign, x = binary("shl", h & 0x8000, 16), binary("shl", h & 0x7FFF, 13)
    normal = bitcast(x + 0x38000000, f32.vec(n))
    tiny = cast(h & 0x3FF, f32) * 2.0**-24
    huge = bitcast(x | 0x7F800000, f32.vec(n))
    v = select((h & 0x7C00).eq(0x7C00), huge, select((h & 0x7C00).eq(0), tiny, normal))
    return bitcast(bitcast(v, u32.vec(n)) | sign, f32.vec(n))


def f32_to_half(v: Expr) -> Expr:
    """f32 to IEEE half, round to nearest even, as ``u32`` holding 16 bits."""
    n = v.dtype.lanes
    b = bitcast(v, u32.vec(n))
    sign, a = binary("shr", b, 16) & 0x8000, b & 0x7FFFFFFF
    tiny = cast(unary("round", bitcast(a, f32.vec(n)) * 2.0**24), u32)
    normal = binary("shr", a + 0xFFF + (binary("shr", a, 13) & 1) - 0x38000000, 13)
    huge = select(const(0x7F800000, a.dtype) < a, const(0x7E00, a.dtype), const(0x7C00, a.dtype))
    r = select(const(0x47800000, a.dtype) <= a, huge, select(a < const(0x38800000, a.dtype), tiny, normal))
    return r | sign


def bfloat_to_f32(h: Expr) -> Expr:
    """bfloat16 (``u32`` holding 16 bits) to f32, exact."""
    return bitcast(binary("shl", h, 16), f32.vec(h.dtype.lanes))


def f32_to_bfloat(v: Expr) -> Expr:
    """f32 to bfloat16, round to nearest even, as ``u32`` holding 16 bits."""
    b = bitcast(v, u32.vec(v.dtype.lanes))
    r = binary("shr", b + 0x7FFF + (binary("shr", b, 16) & 1), 16)
    return select(const(0x7F800000, b.dtype) < (b & 0x7FFFFFFF), binary("shr", b, 16) | 0x40, r)


_DECODE = {f16: half_to_f32, bf16: bfloat_to_f32} | float8.DECODE
_ENCODE = {f16: f32_to_half, bf16: f32_to_bfloat} | float8.ENCODE
CODES: dict[str, tuple[Expr, Expr]] = {}  # intrinsic -> (its argument, what it is of that)


def _declare(name: str, make: Callable[[Expr], Expr], given: DType) -> None:
    v = var("v", given, None)
    value = make(v)

    def evaluate(dtype: DType, attr: Any, x: Any) -> Any:
        from luthier.ir.interpret.loops import evaluate_expr

        return evaluate_expr(value, {v: x})

    CODES[name] = v, value
    intrin.register(name, evaluate, "the bits of a short float in a word and its value in f32")


for _d in _DECODE:
    _declare(f"decode.{_d.name}", _DECODE[_d], u32)
    _declare(f"encode.{_d.name}", _ENCODE[_d], f32)
_EXACT = frozenset("neg abs floor ceil round trunc min max".split())


def legalize_dtype(f: Func, rules: Rules = DEFAULT_RULES, narrow: Collection[str] = ()) -> Func:
    """``narrow``: parameters of 64-bit integers whose contents are known to fit 32 bits. Raises CompilationError for a type that has no
    rule (strings)."""
    lg = _Legalizer(f, rules, narrow)
    if not lg.needed():
        return f
    return lg.run()


class _Legalizer:
    def __init__(self, f: Func, rules: Rules, narrow: Collection[str]) -> None:
        self.f, self.r = f, rules
        self.ranges = None if rules.int64 else IntegerRanges(f, narrow)
        self.memo: dict[Expr, Expr] = {}
        self.vars: dict[Expr, Expr] = {}
        self.bufs: dict[Buffer, Buffer] = {}
        self.fresh: list[Expr] = []  # names of values that are stored in two words

    # types -------------------------------------------------------

    def carried(self, d: DType) -> DType:
        """The type that holds a value of ``d``."""
        s = d.scalar
        if self.soft(s):
            return f32.vec(d.lanes)
        if self.narrow(s):
            return (i8 if s.kind == "i" else u8).vec(d.lanes)
        if s.kind in "iu" and s.bits == 64 and not self.r.int64:
            return (i32 if s.kind == "i" else u32).vec(d.lanes)
        if s is f64 and not self.r.float64:
            return PAIR
        if s.kind == "s":
            raise CompilationError(f"no rule for {s}", op=self.f.name)
        return d

    def wide(self, e: Expr) -> bool:
        """Whether a value is carried as two words."""
        if e.dtype.scalar is f64:
            return not self.r.float64
        return self.ranges is not None and self.ranges.wide(e)

    def soft(self, d: DType) -> bool:
        s = d.scalar
        return s in _DECODE and not (s is f16 and self.r.half) and not (s is bf16 and self.r.bfloat)

    def unpacked(self, d: DType, bits: Expr) -> Expr:
        """The f32 of a value of ``d`` that a word holds."""
        return call(f"decode.{d.scalar.name}", f32, bits) if self.r.codes and bits.dtype.lanes == 1 else _DECODE[d.scalar](bits)

    def packed(self, d: DType, v: Expr) -> Expr:
        """An f32 as the bits of ``d`` in a word."""
        return call(f"encode.{d.scalar.name}", u32, v) if self.r.codes and v.dtype.lanes == 1 else _ENCODE[d.scalar](v)

    def narrow(self, d: DType) -> bool:
        return not self.r.subbyte and d.is_int and d.bits < 8

    def wrap(self, v: Expr, d: DType) -> Expr:
        """An integer, or a float that saturates, as a value of ``d`` carried in 8 bits."""
        c = self.carried(d)
        if v.dtype.is_float:
            lo, hi = (-(1 << (d.bits - 1)), (1 << (d.bits - 1)) - 1) if d.is_signed else (0, (1 << d.bits) - 1)
            v = cast(v, c)
            return binary("max", binary("min", v, const(hi, c)), const(lo, c))
        v = cast(v, c)
        if not d.is_signed:
            return v & ((1 << d.bits) - 1)
        k = const(8 - d.bits, c)
        return binary("shr", binary("shl", v, k), k)

    @staticmethod
    def cell(d: DType) -> DType:
        """What holds a carried value in memory."""
        return u8 if d.bits == 8 else u16

    def words(self, d: DType) -> int:
        """Elements of a parameter per 32-bit word: 4, 2, or 1; 0 for two words an element."""
        if d.is_index or (d.is_int and d.bits == 64):
            return 0 if not self.r.int64 else 1
        if d.scalar is f64 and not self.r.float64:
            return 0
        if d.scalar is f16 and self.r.half:  # a type of its own is one of memory, too
            return 1
        most = 32 if d.lanes > 1 and self.r.whole_words else self.r.word_memory
        return 32 // d.bits if d.bits < most else 1

    def needed(self) -> bool:
        def bad(d: DType) -> bool:
            s = d.scalar
            return self.soft(s) or self.narrow(s) or (s is f64 and not self.r.float64) or (s.is_int and s.bits == 64 and not self.r.int64)

        if any(bad(b.dtype) or self.words(b.dtype) != 1 for b in self.f.buffers):
            return True
        if any(e.op == "call" and (e.attr[0] == WORD or e.attr[0] in WORDS) for e in nodes_of(self.f.body)):
            return True
        inside = contents_of(self.f.body)
        return any(bad(b.dtype) or self.words(b.dtype) != 1 for b in inside.allocated) or any(bad(d) for d in inside.dtypes)

    def buffer(self, b: Buffer) -> Buffer:
        nb = self.bufs.get(b)
        if nb is None:
            d = b.dtype
            if b.scope == "param":
                w = self.words(d)
                if w > 1 and d.lanes > 1:
                    nb = replace(b, dtype=u32, shape=(b.size() * (d.lanes // w),))
                elif w == 0:
                    nb = replace(b, dtype=u32, shape=(b.size() * 2,))
                elif w > 1:
                    nb = replace(b, dtype=u32, shape=((b.size() + (w - 1)) // w,))
                else:
                    nb = replace(b, dtype=self.cell(d)) if self.soft(d) else replace(b, dtype=self.carried(d))
            elif self.ranges is not None and self.ranges.wide_buffer(b):
                nb = replace(b, dtype=PAIR)
            else:
                c = self.carried(d)
                if c.bits < self.r.word_memory and b.rank and not (c.scalar is f16 and self.r.half):
                    c = (i32 if c.kind == "i" else u32).vec(c.lanes)
                nb = replace(b, dtype=c)
            self.bufs[b] = nb
        return nb

    # expressions -------------------------------------------------

    def expr(self, e: Expr) -> Expr:
        r = self.memo.get(e)
        if r is None:
            r = self.memo[e] = self._expr(e)
        return r

    def rnd(self, v: Expr, d: DType) -> Expr:
        """A carried f32 rounded to what ``d`` can hold."""
        s = d.scalar
        return self.unpacked(s, self.packed(s, v))

    def _expr(self, e: Expr) -> Expr:
        op, d = e.op, e.dtype
        wide = self.wide(e)
        if wide and d.lanes > 1:
            raise CompilationError(f"lanes of {d}, which this target has not", op=self.f.name, hint="scalarize first")
        if op == "const":
            return wide_const(e.attr, d) if wide else const(e.attr, self.carried(d))
        if op == "var":
            c = PAIR if wide else self.carried(d)
            return e if c is d else self.vars.setdefault(e, var(e.attr[0], c, e.attr[1], e.attr[2]))
        if op == "load":
            return self.load(e)
        if op == "bitcast" and self.bits_in_memory(e):
            return self.load_bits(e)
        args = tuple(self.expr(a) for a in e.args)
        if wide or any(a.dtype is PAIR for a in args):
            return self.wide_expr(e, args, wide)
        c = self.carried(d)
        src = e.args[0].dtype
        if op == "call" and e.attr[0] == WORD:
            return self.word(e.args, args)
        if op == "call" and e.attr[0] in WORDS and not self.r.dots:
            return word_dot(WORDS[e.attr[0]], *args)
        if op == "cast":
            if self.soft(d):
                v = cast(args[0], f32)
                return v if self.soft(src) and src.scalar is d.scalar else self.rnd(v, d)
            return self.wrap(args[0], d) if self.narrow(d) else cast(args[0], c)
        if op == "bitcast":
            if self.soft(d):
                return self.unpacked(d.scalar, cast(bitcast(args[0], self.cell(d).vec(d.lanes)), u32))
            if self.soft(src):
                return bitcast(cast(self.packed(src.scalar, args[0]), self.cell(src)), d)
            return bitcast(args[0], c)
        if self.soft(d) and op in BINARY | UNARY:
            v = binary(op, *args) if op in BINARY else unary(op, args[0])
            return v if op in _EXACT else self.rnd(v, d)
        if op in COMPARE:
            return compare(op, *args)
        if all(x is y for x, y in zip(args, e.args, strict=True)):
            return e
        if op == "vreduce" and self.soft(d):
            if e.attr in _EXACT:
                return vreduce(e.attr, args[0])
            raise CompilationError(f"a reduction over lanes of {d} must be accumulated in f32", op=self.f.name)
        return rebuild(e, args)

    @staticmethod
    def pair(v: Expr, d: DType) -> Expr:
        """A carried value of the 64-bit type ``d`` as two words."""
        return v if v.dtype is PAIR else wide_const(v.attr, d) if v.op == "const" else wide_of(v, d, d)

    def wide_expr(self, e: Expr, args: tuple[Expr, ...], wide: bool) -> Expr:
        """An operator of which the result or an operand is two words."""
        op, d, src = e.op, e.dtype, e.args[0].dtype.scalar
        if op == "cast":
            if wide:
                return wide_of(args[0], src, d)
            if self.soft(d):
                return self.rnd(to_odd(args[0], src), d)
            return narrow_of(args[0], src, self.carried(d) if is_wide(d) else d)
        if op == "bitcast":
            return self.pair(args[0], src)
        if op == "select":
            return select(args[0], self.pair(args[1], d), self.pair(args[2], d))
        operands = [self.pair(a, src) for a in args]
        if op in COMPARE:
            return compare_pairs(op, src, *operands)
        r = operate(op, src, *operands)
        if r is None:
            raise CompilationError(f"this target has no {op} of {src}", op=self.f.name, hint="use a type of 32 bits, or another target")
        return r if wide or r.dtype is not PAIR else narrow_of(r, src, self.carried(d))

    def wide_load(self, e: Expr, nb: Buffer, ix: tuple[Expr, ...], mask: Expr | None, other: Expr | None) -> Expr:
        b, d = e.attr[0], e.dtype
        if b.scope != "param":
            v = self.pair(load(nb, ix, mask), d)
        elif d.scalar is f64 or (self.ranges is not None and self.ranges.wide_buffer(b)):
            v = pair(load(nb, (ix[0] * 2,), mask), load(nb, (ix[0] * 2 + 1,), mask))
        else:
            v = self.pair(cast(load(nb, (ix[0] * 2,), mask), self.carried(d)), d)
        return v if mask is None or other is None else select(mask, v, self.pair(other, d))

    def load(self, e: Expr) -> Expr:
        b, idx, m, o = load_parts(e)
        nb = self.buffer(b)
        ix = tuple(self.expr(i) for i in idx)
        mm, oo = None if m is None else self.expr(m), None if o is None else self.expr(o)
        n = e.dtype.lanes
        if self.wide(e):
            return self.wide_load(e, nb, ix, mm, oo)
        c = self.carried(e.dtype)
        if b.scope != "param":
            v = load(nb, ix, mm, None if oo is None else cast(oo, nb.dtype.scalar))
            if not b.rank:
                return v
            return v.ne(0) if e.dtype.is_bool and not nb.dtype.is_bool else cast(v, c)
        w = self.words(b.dtype)
        if w > 1 and b.dtype.lanes > 1:
            return self.lanes(b, nb, ix[0], mm, oo)
        if w == 1:
            if not self.soft(b.dtype):
                return load(nb, ix, mm, oo)
            v = self.unpacked(b.dtype.scalar, cast(load(nb, ix, mm), u32))
            return v if mm is None or oo is None else select(mm, v, oo)
        if w == 0:
            v = cast(load(nb, (ix[0] * 2,), mm), c)
            return v if mm is None or oo is None else select(mm, v, oo)
        word = load(nb, (binary("floordiv", ix[0], w),), mm)
        shift = cast(binary("mod", ix[0], w) * (32 // w), u32)
        v = self.decode(binary("shr", word, shift) & ((1 << (32 // w)) - 1), b.dtype.vec(n))
        return v if mm is None or oo is None else select(mm, v, oo)

    def word(self, old: tuple[Expr, ...], new: tuple[Expr, ...]) -> Expr:
        """Four bytes in a word: the word itself where they are the lanes of one in memory."""
        v = old[0].args[0] if old[0].op == "extract" else None
        if v is not None and v.op == "load" and v.dtype.lanes == 4 and all(x.op == "extract" and x.attr == k and x.args[0] is v for k, x in enumerate(old)):
            b, idx, mask, other = load_parts(v)
            if b.scope == "param" and self.words(b.dtype) == 4:
                one = None if mask is None else extract(self.expr(mask), 0) if mask.dtype.lanes > 1 else self.expr(mask)
                w = load(self.buffer(b), (self.expr(idx[0]),), one)
                if one is None or other is None:
                    return w
                o = self.expr(other)
                return select(one, w, word_of_bytes([cast(cast(extract(o, k) if o.dtype.lanes > 1 else o, i32), u32) for k in range(4)]))
        return word_of_bytes([cast(x if x.dtype is u32 else cast(x, i32), u32) for x in new])

    def decode(self, bits: Expr, d: DType) -> Expr:
        """A value of ``d`` from the low bits of a word."""
        if self.soft(d):
            return self.unpacked(d.scalar, bits)
        if d.is_bool:
            return bits.ne(0)
        return self.wrap(bits, d) if self.narrow(d) else cast(bits, d)

    def lanes(self, b: Buffer, words: Buffer, at: Expr, mask: Expr | None, other: Expr | None) -> Expr:
        """Element ``at`` of a buffer of vectors, each of which is whole words."""
        d = b.dtype
        w = self.words(d)
        one = None if mask is None else extract(mask, 0)
        parts = [load(words, (at * (d.lanes // w) + k,), one) for k in range(d.lanes // w)]
        bits = [binary("shr", parts[k // w], k % w * (32 // w)) & ((1 << (32 // w)) - 1) for k in range(d.lanes)]
        vs = [self.decode(x, d.scalar) for x in bits]
        return shuffle(vs if one is None or other is None else [select(one, v, extract(other, k)) for k, v in enumerate(vs)], range(d.lanes))

    def bits_in_memory(self, e: Expr) -> bool:
        """Whether a bitcast takes what memory holds of a short float."""
        x = e.args[0].args[0] if e.args[0].op == "extract" else e.args[0]
        if x.op != "load" or not self.soft(x.dtype) or x.attr[0].scope != "param":
            return False
        other = load_parts(x)[3]
        other = other.args[0] if other is not None and other.op == "bcast" else other
        if other is not None and not (other.op == "const" and other.attr == 0 and math.copysign(1, other.attr) > 0):
            return False
        return self.words(x.attr[0].dtype) == (1 if x is e.args[0] else 2)

    def load_bits(self, e: Expr) -> Expr:
        x, lane = (e.args[0].args[0], e.args[0].attr) if e.args[0].op == "extract" else (e.args[0], None)
        b, idx, mask, other = load_parts(x)
        at, m = self.expr(idx[0]), None if mask is None else self.expr(mask)
        if lane is None:
            bits = bitcast(load(self.buffer(b), (at,), m), e.dtype)
        else:
            m = m if m is None or m.dtype.lanes == 1 else extract(m, 0)
            word = load(self.buffer(b), (at * (b.dtype.lanes // 2) + lane // 2,), m)
            bits = bitcast(cast(binary("shr", word, lane % 2 * 16) & 0xFFFF, u16), e.dtype)
        return bits if m is None or other is None else select(m, bits, const(0, e.dtype))

    # statements --------------------------------------------------

    def stmt(self, s: Stmt) -> Stmt:
        if isinstance(s, Block):
            return block(*(self.stmt(x) for x in s.stmts))
        if isinstance(s, For):
            return For(s.var, self.expr(s.lo), self.expr(s.hi), s.kind, self.stmt(s.body))
        if isinstance(s, While):
            return While(self.expr(s.cond), self.stmt(s.body))
        if isinstance(s, If):
            return If(self.expr(s.cond), self.stmt(s.then), None if s.orelse is None else self.stmt(s.orelse))
        if isinstance(s, Let):
            return Let(self.expr(s.var), self.expr(s.value))
        if isinstance(s, Alloc):
            return Alloc(self.buffer(s.buf), self.stmt(s.body))
        if isinstance(s, Call):
            args = tuple(
                self.expr(a) if isinstance(a, Expr) else (self.buffer(a[0]), self.expr(a[1])) if isinstance(a, tuple) else self.buffer(a)
                for a in s.args
            )
            return Call(s.callee, args, s.attrs)
        return self.store(s) if isinstance(s, Store) else s

    def store(self, s: Store) -> Stmt:
        b, nb = s.buf, self.buffer(s.buf)
        ix = tuple(self.expr(i) for i in s.idx)
        v, m = self.expr(s.value), None if s.mask is None else self.expr(s.mask)
        if nb.dtype is PAIR:
            return Store(nb, ix, self.pair(v, b.dtype), m)
        if b.scope != "param":
            if v.dtype.scalar is not nb.dtype.scalar:
                v = cast(v, nb.dtype.scalar)
            return Store(nb, ix, v, m)
        w = self.words(b.dtype)
        if w == 0 and v.op != "const" and any(ld.attr[0].name == b.name for ld in loads(s.value)):  # the first word stored must not change the second
            name = var(f"{b.name}.word~{len(self.fresh)}", v.dtype, None)
            self.fresh.append(name)
            return block(Let(name, v), *self.words_of(nb, ix[0], name, m, b.dtype))
        if w > 1 and b.dtype.lanes > 1:
            return self.store_words(nb, b.dtype, ix[0], v, m)
        if self.soft(b.dtype):
            v = self.packed(b.dtype.scalar, v)
        if w == 1:
            return Store(nb, ix, cast(v, nb.dtype.scalar) if self.soft(b.dtype) else v, m)
        if v.dtype.lanes > 1 and v.dtype is not PAIR:
            raise CompilationError(f"lanes stored to packed buffer {b.name}", op=self.f.name, hint="scalarize first")
        if w == 0:
            return block(*self.words_of(nb, ix[0], v, m, b.dtype))
        full = (1 << (32 // w)) - 1
        shift = cast(binary("mod", ix[0], w) * (32 // w), u32)
        bits = self.bits(v, full)
        call: Stmt = Call(
            "atomic_store_bits", (nb, binary("floordiv", ix[0], w), binary("shl", const(full, u32), shift), binary("shl", bits, shift)),
        )
        return call if m is None else If(m, call)

    @staticmethod
    def words_of(nb: Buffer, i: Expr, v: Expr, m: Expr | None, d: DType) -> list[Stmt]:
        """Both words of element ``i`` of a buffer of 64-bit elements."""
        if v.dtype is PAIR:
            lo, hi = extract(v, 0), extract(v, 1)
        else:
            lo = cast(cast(v, i32), u32)
            hi = cast(binary("shr", cast(v, i32), 31), u32) if d.is_signed else const(0, u32)
        return [Store(nb, (i * 2,), lo, m), Store(nb, (i * 2 + 1,), hi, m)]

    @staticmethod
    def bits(v: Expr, full: int) -> Expr:
        return cast(cast(v, u32) if v.dtype.is_bool or v.dtype is u32 else cast(cast(v, i32), u32), u32) & full

    def store_words(self, nb: Buffer, d: DType, at: Expr, v: Expr, mask: Expr | None) -> Stmt:
        """A vector that is whole words, all of them this thread's own."""
        w = self.words(d)
        out: list[Stmt] = []
        for k in range(d.lanes // w):
            word = const(0, u32)
            for j in range(w):
                x = extract(v, k * w + j)
                x = self.packed(d.scalar, x) if self.soft(d) else x
                word = word | binary("shl", self.bits(x, (1 << (32 // w)) - 1), j * (32 // w))
            out.append(Store(nb, (at * (d.lanes // w) + k,), word, mask))
        return block(*out)

    def run(self) -> Func:
        params = tuple(self.buffer(p) if isinstance(p, Buffer) else self.expr(p) for p in self.f.params)
        body = self.stmt(self.f.body)
        pairs = {b.name for b in contents_of(body).allocated if b.dtype is PAIR} & self.f.data.keys()
        data = {n: np.ascontiguousarray(a).view(np.uint32).reshape(-1, 2) if n in pairs else a for n, a in self.f.data.items()}
        return replace(self.f, params=params, body=body, data=data)


