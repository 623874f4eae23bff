"""Byte operations of :mod:`luthier.schedules.intrin.byte_vectors` and moves between lanes as 128-bit SIMD.

A full vector keeps narrow integers extended in its lanes, so a half of a vector is one ``extend`` and joined vectors are
``narrow`` instructions. What SIMD128 lacks (pair sums of byte products) is made of 16-bit products there.
"""

from __future__ import annotations

import struct

from luthier.codegen.wasm.scalar import signed
from luthier.codegen.wasm.vector import Vector, full, width
from luthier.ir.expr import Expr

_NAMES = {8: "i8x16", 16: "i16x8", 32: "i32x4", 64: "i64x2"}


class ByteVectors(Vector):
    """Vector expressions of low-bit kernels."""

    def dot(self, e: Expr) -> bool:
        return self.byte_call(e) or super().dot(e)

    def shuffle(self, e: Expr) -> bool:
        return self.moved(e) or super().shuffle(e)

    def byte_call(self, e: Expr) -> bool:
        """A byte intrinsic in a register's width; False for any other call."""
        name, c = e.attr[0], self.c
        if e.dtype.lanes * e.dtype.bits != 128:
            return False
        if name == "words.madd":
            self.emit(e.args[0])
            self.emit(e.args[1])
            c.op("i32x4.dot_i16x8_s")
            return True
        if name == "bytes.lookup":
            table, which = e.args
            self.emit(table)
            self.emit(which)
            if not _below_16(which):
                self.v128_const(b"\x8f" * 16)
                c.op("v128.and")
            c.op("i8x16.relaxed_swizzle" if self.relaxed else "i8x16.swizzle")
            return True
        if name == "bytes.madd7":
            self.madd7(*e.args)
            return True
        return False

    def madd7(self, a: Expr, b: Expr) -> None:
        """``a`` below 128, so that the relaxed dot product is exact. Without it: even and odd bytes as 16-bit products."""
        c = self.c
        if self.relaxed:
            self.emit(b)
            self.emit(a)
            c.op("i16x8.relaxed_dot_i8x16_i7x16_s")
            return
        x, y = self.local("v128"), self.local("v128")
        self.emit(a)
        c.set(x)
        self.emit(b)
        c.set(y)
        c.get(x)
        self.v128_const(b"\xff\x00" * 8)
        c.op("v128.and")
        c.get(y)
        for op in ("shl", "shr_s"):
            c.const("i32", 8)
            c.op(f"i16x8.{op}")
        c.op("i16x8.mul")
        for v, op in ((x, "shr_u"), (y, "shr_s")):
            c.get(v)
            c.const("i32", 8)
            c.op(f"i16x8.{op}")
        c.op("i16x8.mul")
        c.op("i16x8.add")
        self.release("v128", x)
        self.release("v128", y)

    def moved(self, e: Expr) -> bool:
        """Halves and quarters of a vector, vectors side by side, constant lanes; False for any other shuffle."""
        a, lanes, n = e.args[0], e.dtype.lanes, len(e.args)
        if all(x.op == "const" for x in e.args):
            if e.dtype.is_float:
                self.v128_const(b"".join(struct.pack("<f" if width(e.dtype) == 32 else "<d", e.args[max(p, 0)].attr) for p in e.attr))
            else:
                self.pattern(e.dtype, [int(e.args[max(p, 0)].attr) for p in e.attr])
            return True
        if not full(a.dtype) or not full(e.dtype) or any(x.dtype is not a.dtype for x in e.args):
            return False
        first = e.attr[0]
        run = first >= 0 and all(p == first + i for i, p in enumerate(e.attr))
        if n == 1 and run and a.dtype.lanes == lanes:
            self.emit(a)
            return True
        if not run or not (a.dtype.is_int or a.dtype.is_bool):
            return False
        s = "s" if signed(a.dtype) or a.dtype.is_bool else "u"
        if n == 1 and a.dtype.lanes in (2 * lanes, 4 * lanes) and first % lanes == 0:
            self.emit(a)
            w, at = width(a.dtype), a.dtype.lanes
            while at > lanes:
                at //= 2
                high = first % (2 * at) >= at
                self.c.op(f"{_NAMES[2 * w]}.extend_{'high' if high else 'low'}_{_NAMES[w]}_{s}")
                w *= 2
            return True
        if first == 0 and n in (2, 4) and lanes == n * a.dtype.lanes and not a.dtype.is_bool and width(a.dtype) <= 32:
            self.join(list(e.args), width(a.dtype), s)
            return True
        return False

    def join(self, xs: list[Expr], w: int, s: str) -> None:
        half = len(xs) // 2
        if half == 0:
            self.emit(xs[0])
            return
        self.join(xs[:half], w, s)
        self.join(xs[half:], w, s)
        w = w * 2 // len(xs)  # of the lanes that are joined here
        self.c.op(f"{_NAMES[w // 2]}.narrow_{_NAMES[w]}_{s}")


def _below_16(e: Expr) -> bool:
    """A mask keeps every byte below 16."""
    if e.op == "and":
        m = e.args[1]
        m = m.args[0] if m.op == "bcast" else m
        return m.op == "const" and 0 <= m.attr < 16
    return e.op == "bitcast" and e.args[0].dtype.bits == e.dtype.bits and _below_16(e.args[0])
