"""Vector expressions as 128-bit SIMD. A vector of N lanes is *full* when its elements fit 128 / N bits (floats: exactly).

Integers and bools of a full vector are kept sign- or zero-extended in lanes of 128 / N bits, a bool as all ones or zeros, so
that all vectors of N lanes line up. Whatever is not full or has no instruction is computed lane by lane (:meth:`Vector.lane`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from luthier.codegen.wasm.encoder import OPCODE
from luthier.codegen.wasm.scalar import Emitter, signed, valtype
from luthier.ir.dtypes import DType
from luthier.ir.expr import (
    COMPARE,
    Expr,
    binary,
    bitcast,
    cast,
    const,
    extract,
    is_const,
    load,
    load_parts,
    make_node,
    rebuild,
    select,
)
from luthier.ir.intrin import DOTS

_ARITH = frozenset(("add", "sub", "mul", "div"))
_NAMES = {8: "i8x16", 16: "i16x8", 32: "i32x4", 64: "i64x2"}


@cache
def bits_of(d: DType) -> int:
    return 32 if d.is_index else 1 if d.is_bool else d.bits


@cache
def full(d: DType) -> bool:
    w = 128 // d.lanes
    if d.lanes not in (2, 4, 8, 16):
        return False
    return bits_of(d) == w if d.is_float else bits_of(d) <= w


@cache
def prefix(d: DType) -> str:
    w = 128 // d.lanes
    return f"f{w}x{d.lanes}" if d.is_float else _NAMES[w]


@cache
def _code(op: str, d: DType) -> bytes:
    return OPCODE[f"{prefix(d)}.{op}"]


def width(d: DType) -> int:
    return 128 // d.lanes


def splat_value(e: Expr) -> Expr | None:
    """The scalar that all lanes hold, if that is plain."""
    return e.args[0] if e.op == "bcast" else None


class Vector(Emitter):
    """Vector expressions on top of scalar ones."""

    def lane(self, e: Expr, k: int) -> Expr:
        """Lane ``k`` as a scalar expression."""
        op, d = e.op, e.dtype
        if d.lanes == 1:
            return e
        if op in ("ramp", "bcast"):
            return extract(e, k)
        if op == "var":
            return make_node("extract", d.scalar, (e,), k)
        if op == "load":
            buf, idx, m, o = load_parts(e)
            if buf.rank == 0:
                return make_node("extract", d.scalar, (e,), k)
            mk, ok = None if m is None else self.lane(m, k), None if o is None else self.lane(o, k)
            if buf.dtype.lanes > 1:
                return load(replace(buf, dtype=buf.dtype.scalar), [idx[0] * buf.dtype.lanes + k], mk, ok)
            return load(buf, [self.lane(i, k) for i in idx], mk, ok)
        if op == "select":
            return select(self.lane(e.args[0], k), self.lane(e.args[1], k), self.lane(e.args[2], k))
        if op == "cast":
            return cast(self.lane(e.args[0], k), d.scalar)
        if op == "bitcast" and e.args[0].dtype.lanes == d.lanes:
            return bitcast(self.lane(e.args[0], k), d.scalar)
        if op == "shuffle":
            p = max(e.attr[k], 0)
            for a in e.args:
                if p < a.dtype.lanes:
                    return self.lane(a, p)
                p -= a.dtype.lanes
        if op in ("bitcast", "call", "shuffle"):
            raise self.fail(e, f"no instruction for {e.attr[0] if op == 'call' else op}")
        return rebuild(e, tuple(self.lane(a, k) for a in e.args))

    def assemble(self, d: DType, part: Callable[[int], None]) -> None:
        """A full vector from its lanes; ``part(k)`` pushes lane k as a scalar of ``d.scalar``."""
        p = prefix(d)
        for k in range(d.lanes):
            part(k)
            self.into_lane(d)
            if k == 0:
                self.c.op(f"{p}.splat")
            else:
                self.c.lane(f"{p}.replace_lane", k)

    def into_lane(self, d: DType) -> None:
        """A scalar on the stack becomes what a lane holds."""
        if d.is_bool:
            n = self.local("i32")
            self.c.set(n)
            self.c.const("i32", 0)
            self.c.get(n)
            self.c.op("i32.sub")
            self.release("i32", n)
        if width(d) == 64 and not d.is_float and valtype(d.scalar) == "i32":
            self.c.op("i64.extend_i32_s" if signed(d) or d.is_bool else "i64.extend_i32_u")

    def by_lanes(self, e: Expr) -> None:
        self.assemble(e.dtype, lambda k: self.emit(self.lane(e, k)))

    def pick(self, d: DType, k: int) -> None:
        """Lane ``k`` of the full vector on the stack, as a scalar."""
        p, c = prefix(d), self.c
        if d.is_float or width(d) >= 32:
            c.lane(f"{p}.extract_lane", k)
        else:
            c.lane(f"{p}.extract_lane_{'s' if signed(d) else 'u'}", k)
        if width(d) == 64 and not d.is_float and valtype(d.scalar) == "i32":
            c.op("i32.wrap_i64")
        if d.is_bool:
            c.const("i32", 1)
            c.op("i32.and")

    def extract(self, e: Expr) -> None:
        a = e.args[0]
        store = self.place(a)
        if isinstance(store, list):
            self.c.get(store[e.attr])
        elif full(a.dtype) and (a.op in ("var", "load") or store is not None):
            self.emit(a)
            self.pick(a.dtype, e.attr)
        else:
            self.emit(self.lane(a, e.attr))

    def place(self, a: Expr) -> int | list[int] | None:
        """Locals of a variable or register buffer."""
        raise NotImplementedError

    # ------------------------------------------------------------ expressions

    def vector(self, e: Expr) -> None:
        op, d, c = e.op, e.dtype, self.c
        n: Any = None
        if op == "var":
            n = self.vars.get(e)
            if n is None:
                raise self.fail(e, "variable without a value")
        elif op == "load" and not e.args:
            n = self.regs.get(e.attr[0].name)
        if n.__class__ is int:
            c.get(n)
            return
        if not full(d):
            raise self.fail(e, f"vectors of type {d} do not fit 128 bits")
        if op in _ARITH:
            if d.is_float:
                self.arith(e)
                return
        elif op == "load":
            self.load(e)
            return
        elif op == "bcast":
            self.broadcast(e)
            return
        if op == "ramp":
            self.emit(e.args[0])
            self.into_lane(d)
            c.op(f"{prefix(d)}.splat")
            self.pattern(d, [e.attr[0] * k for k in range(d.lanes)])
            c.op(f"{prefix(d)}.add")
            return
        if op == "shuffle" and self.shuffle(e):
            return
        if op == "call" and self.dot(e):
            return
        if not all(x.dtype.lanes == 1 or full(x.dtype) for x in e.args) or not self.simd(e):
            self.by_lanes(e)

    def dot(self, e: Expr) -> bool:
        """A dot product that is an instruction; False for any other call."""
        i = DOTS.get(e.attr[0])
        code = None if i is None else i.spelling.get("wasm", {}).get(128)
        if i is None or code is None or e.dtype.lanes * e.dtype.bits != 128:
            return False
        acc, a, b = e.args
        self.vector(a)
        self.vector(b)
        if i.adds:
            self.vector(acc)
        self.c.simd(int(code, 16))
        if not i.adds:
            self.vector(acc)
            self.c.op(f"{prefix(e.dtype)}.add")
        return True

    def pattern(self, d: DType, values: list[int]) -> None:
        w = width(d)
        self.v128_const(b"".join((v & ((1 << w) - 1)).to_bytes(w // 8, "little") for v in values))

    def broadcast(self, e: Expr) -> None:
        a, d, c = e.args[0], e.dtype, self.c
        w = width(d)
        if a.op == "const":
            if d.is_float:
                self.v128_const(struct.pack("<f" if w == 32 else "<d", a.attr) * d.lanes)
            else:
                self.pattern(d, [-1 if d.is_bool and a.attr else int(a.attr)] * d.lanes)
            return
        if a.op == "load" and a.attr[0].rank and not a.attr[1] and bits_of(d) == w and not d.is_index and not d.is_bool:
            self.access(a.attr[0], a.args[0], f"v128.load{w}_splat", w // 8)
            return
        if a.op == "bitcast" and a.args[0].dtype.lanes > 1 and bits_of(d) == w:
            found = self.packed(a)
            if found is not None:
                self.access(found[0], found[1], f"v128.load{w}_splat", w // 8)
                return
        self.emit(a)
        self.into_lane(d)
        c.op(f"{prefix(d)}.splat")

    def packed(self, e: Expr) -> Any:
        raise NotImplementedError

    def access(self, buf, idx: Expr, ins: str, size: int, lane: int | None = None) -> None:  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def shuffle(self, e: Expr) -> bool:
        if len(e.args) > 2 or not all(full(a.dtype) and a.dtype.lanes == e.dtype.lanes for a in e.args):
            return False
        n = width(e.dtype) // 8
        self.emit(e.args[0])
        self.emit(e.args[-1])
        self.c.shuffle([max(p, 0) * n + b for p in e.attr for b in range(n)])
        return True

    def fixup(self, d: DType) -> None:
        """After lane arithmetic: back into the range of a narrower integer."""
        w, b = width(d), bits_of(d)
        if d.is_float or d.is_index or d.is_bool or b == w:
            return
        c = self.c
        if signed(d):
            for o in ("shl", "shr_s"):
                c.const("i32", w - b)
                c.op(f"{prefix(d)}.{o}")
        else:
            self.pattern(d, [(1 << b) - 1] * d.lanes)
            c.op("v128.and")

    def simd(self, e: Expr) -> bool:
        """``e`` with vector instructions; False (and nothing emitted) where there are none."""
        op, d, c = e.op, e.dtype, self.c
        p, w = prefix(d), width(d)
        args = e.args

        def go(ins: str, fix: bool = False) -> bool:
            for a in args:
                self.emit(a)
            c.op(ins)
            if fix:
                self.fixup(d)
            return True

        if op == "select":
            if args[0].dtype.lanes == 1:
                self.emit(args[1])
                self.emit(args[2])
                self.emit(args[0])
                c.op("select")
            else:
                self.emit(args[1])
                self.emit(args[2])
                self.emit(args[0])
                c.op("v128.bitselect")
            return True
        if op in COMPARE:
            s = args[0].dtype
            if s.is_bool:
                go("v128.xor")
                if op == "eq":
                    c.op("v128.not")
                return op in ("eq", "ne")
            if s.is_float:
                return go(f"{prefix(s)}.{op}")
            if op in ("eq", "ne"):
                return go(f"{prefix(s)}.{op}")
            uns = not signed(s) and bits_of(s) == width(s)
            return not (uns and w == 64) and go(f"{prefix(s)}.{op}_{'u' if uns else 's'}")
        if op == "cast":
            return self.vcast(e)
        if op == "bitcast":
            a = args[0].dtype
            if bits_of(a) == width(a) and bits_of(d) == w:
                self.emit(args[0])
                return True
            return False
        if d.is_bool and op in ("isnan", "isinf"):
            a = args[0]
            pa = prefix(a.dtype)
            if op == "isnan":

                def differs(g: Callable[[], None]) -> None:
                    g()
                    g()
                    c.op(f"{pa}.ne")

                self.twice(a, differs)
            else:
                self.emit(a)
                c.op(f"{pa}.abs")
                self.emit(make_node("bcast", a.dtype, (const(float("inf"), a.dtype.scalar),)))
                c.op(f"{pa}.eq")
            return True
        if op == "not":
            self.emit(args[0])
            c.op("v128.not")
            self.fixup(d)
            return True
        if op in ("and", "or", "xor"):
            return go(f"v128.{op}")
        if d.is_float:
            return self.float_op(e, go)
        if d.is_bool:
            return False
        if op in ("add", "sub") or (op == "mul" and w > 8):
            return go(f"{p}.{op}", True)
        if op in ("neg", "abs"):
            if op == "abs" and not signed(d):
                self.emit(args[0])
                return True
            return go(f"{p}.{op}", True)
        if op in ("min", "max") and w < 64:
            return go(f"{p}.{op}_{'s' if signed(d) else 'u'}")
        b = splat_value(args[1]) if len(args) == 2 else None
        if op in ("shl", "shr") and b is not None and b.op == "const" and 0 <= b.attr < bits_of(d):
            self.emit(args[0])
            c.const("i32", b.attr)
            c.op(f"{p}.{'shl' if op == 'shl' else 'shr_s' if signed(d) else 'shr_u'}")
            if op == "shl":
                self.fixup(d)
            return True
        if op in ("floordiv", "mod") and b is not None and b.op == "const" and b.attr > 0 and b.attr & (b.attr - 1) == 0:
            self.emit(args[0])
            if op == "mod":
                self.pattern(d, [b.attr - 1] * d.lanes)
                c.op("v128.and")
            else:
                c.const("i32", b.attr.bit_length() - 1)
                c.op(f"{p}.shr_{'s' if signed(d) else 'u'}")
            return True
        if op == "popcount" and w == 8:
            return go("i8x16.popcnt")
        return False

    def arith(self, e: Expr) -> None:
        """Add, sub, mul, div of floats; a product that is added becomes a relaxed multiply-add."""
        op, (x, y) = e.op, e.args
        if (op == "add" or op == "sub") and (y.op == "mul" or (op == "add" and x.op == "mul")) and self.relaxed:
            if op == "add" and x.op != "mul":
                x, y = y, x
            mul, add = (x, y) if op == "add" else (y, x)
            if mul.op == "mul":
                self.vector(mul.args[0])
                self.vector(mul.args[1])
                self.vector(add)
                self.c.b += _code("relaxed_madd" if op == "add" else "relaxed_nmadd", e.dtype)
                return
            x, y = e.args
        self.vector(x)
        self.vector(y)
        self.c.b += _code(op, e.dtype)

    def float_op(self, e: Expr, go: Callable[[str], bool]) -> bool:
        op, d, c, p = e.op, e.dtype, self.c, prefix(e.dtype)
        if op in ("min", "max"):  # pmin(b, a) is a < b ? a : b
            self.emit(e.args[1])
            self.emit(e.args[0])
            c.op(f"{p}.p{op}")
            return True
        names = {"neg": "neg", "abs": "abs", "sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "nearest"}
        if op in names:
            return go(f"{p}.{names[op]}")
        if op == "rsqrt":
            self.emit(make_node("bcast", d, (const(1, d.scalar),)))
            self.emit(e.args[0])
            c.op(f"{p}.sqrt")
            c.op(f"{p}.div")
            return True
        if op == "rem":
            return False
        raise self.fail(e, f"{op} must be expanded first")

    def vcast(self, e: Expr) -> bool:
        a, d, c = e.args[0], e.dtype, self.c
        s, w = a.dtype, width(d)
        if d.is_bool:
            self.emit(a)
            self.emit(make_node("bcast", s, (const(0, s.scalar),)))
            c.op(f"{prefix(s)}.ne")
            return True
        if s.is_bool:
            self.emit(a)
            if d.is_float:
                self.emit(make_node("bcast", d, (const(1, d.scalar),)))
            else:
                self.pattern(d, [1] * d.lanes)
            c.op("v128.and")
            return True
        if s.is_float and d.is_float:
            self.emit(a)
            return True
        if d.is_float:
            if w == 32:
                self.emit(a)
                c.op(f"f32x4.convert_i32x4_{'u' if not signed(s) and bits_of(s) == 32 else 's'}")
                return True
            if bits_of(s) <= 32:
                self.emit(a)
                self.emit(a) if a.op == "var" else c.v128(bytes(16))
                c.shuffle([*range(0, 4), *range(8, 12), *range(16, 24)])
                c.op(f"f64x2.convert_low_i32x4_{'u' if not signed(s) and bits_of(s) == 32 else 's'}")
                return True
            return False
        if s.is_float:
            if w != 32 or bits_of(d) != 32:
                return False
            self.emit(a)
            c.op(f"i32x4.trunc_sat_f32x4_{'s' if signed(d) else 'u'}")
            return True
        self.emit(a)
        if bits_of(d) < bits_of(s) or (signed(s) and not signed(d)) or (signed(d) and not signed(s) and bits_of(d) == bits_of(s)):
            self.fixup(d)
        return True

    def vreduce(self, e: Expr) -> None:
        """Pairwise halving: lane i with lane i + half."""
        a, op, c = e.args[0], e.attr, self.c
        d = a.dtype
        if d.is_bool and op in ("and", "or") and full(d):
            self.emit(a)
            c.op("v128.any_true" if op == "or" else f"{prefix(d)}.all_true")
            return
        n = self.local("v128") if full(d) else -1
        if n < 0 or (op == "mul" and width(d) == 8) or (width(d) == 64 and op in ("min", "max") and not d.is_float):
            xs = [self.lane(a, k) for k in range(d.lanes)]
            while len(xs) > 1:
                h = len(xs) // 2
                xs = [binary(op, xs[k], xs[k + h]) for k in range(h)] + xs[2 * h :]
            self.emit(xs[0])
            return
        self.emit(a)
        lanes, size = d.lanes, width(d) // 8
        while lanes > 1:
            half = lanes // 2
            c.set(n)
            hi = [(k ^ half) * size + b for k in range(16 // size) for b in range(size)]  # a pattern that engines know
            for first in ([False, True] if op in ("min", "max") and d.is_float else [True, False]):
                c.get(n)
                if not first:
                    c.get(n)
                    c.shuffle(hi)
            c.op({"and": "v128.and", "or": "v128.or"}.get(op) or f"{prefix(d)}.{'p' + op if d.is_float and op in ('min', 'max') else op + ('_s' if signed(d) else '_u') if op in ('min', 'max') else op}")
            self.fixup(d)
            lanes = half
        self.release("v128", n)
        self.pick(d, 0)


__all__ = ["Vector", "full", "prefix", "width", "bits_of", "is_const"]
