"""integer_ranges: between which numbers the 64-bit integers of a kernel lie, so that those that fit need no more than 32 bits.

Interval arithmetic over the loop IR: constants, bounds of loop variables, parameters whose contents are known to fit, conversions from
narrower types. A local buffer has the hull of all that is stored to it, found by rounds; what still grows after a few (an
accumulator) may be anything. What wraps may be anything, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from luthier.ir.dtypes import DType, i32
from luthier.ir.expr import COMPARE, Expr, bounds, load_parts
from luthier.ir.loop import Buffer, Call, Func, Let, Store, walk_stmts

Range = tuple[int, int]
ROUNDS = 4


def fits32(r: Range, d: DType) -> bool:
    """Whether a value of the 64-bit type ``d`` in this range has the same number in 32 bits of the same signedness."""
    lo, hi = (-(1 << 31), (1 << 31) - 1) if d.is_signed else (0, (1 << 32) - 1)
    return lo <= r[0] and r[1] <= hi


def is_int64(d: DType) -> bool:
    return d.is_int and d.bits == 64


class IntegerRanges:
    """``narrow``: parameters of 64-bit integers whose contents fit 32 bits. ``known``: ranges of buffers from elsewhere. ``stored``: {parameter:
    hull of what is stored to it}."""

    def __init__(self, f: Func, narrow: Collection[str], known: Mapping[str, Range] | None = None) -> None:
        self.narrow = narrow
        self.values: dict[Expr, Range] = {}  # of Lets
        self.locals: dict[str, Range] = dict(known or {})
        self.stored: dict[str, Range] = {}
        self.memo: dict[Expr, Range] = {}
        for n in f.data:
            self.locals[n] = (int(np.min(f.data[n])), int(np.max(f.data[n]))) if np.asarray(f.data[n]).dtype.kind in "iu" else (0, 0)
        stmts = [s for s in walk_stmts(f.body) if isinstance(s, (Let, Store, Call))]
        unknown = {a.name for s in stmts if isinstance(s, Call) for a in _buffers(s)}
        for n in {s.buf.name: s.buf for s in stmts if isinstance(s, Store)}.values():
            if n.name in unknown and is_int64(n.dtype):
                self.locals[n.name] = n.dtype.limits()
        for k in range(2 * ROUNDS):
            before = dict(self.locals)
            self.memo.clear()
            for s in stmts:
                if isinstance(s, Let) and s.value.dtype.is_int:
                    self.values[s.var] = self.of(s.value)
                elif isinstance(s, Store) and is_int64(s.buf.dtype):
                    r = self.of(s.value)
                    if s.buf.scope == "param":
                        self.stored[s.buf.name] = _hull(self.stored.get(s.buf.name), r)
                    else:
                        self.locals[s.buf.name] = _hull(self.locals.get(s.buf.name), r)
            if self.locals == before:
                break
            if k >= ROUNDS:
                self.locals |= {s.buf.name: s.buf.dtype.limits() for s in stmts if isinstance(s, Store) and self.locals.get(s.buf.name) != before.get(s.buf.name)}

    def wide(self, e: Expr) -> bool:
        """Whether a 64-bit integer needs both of its words."""
        return is_int64(e.dtype.scalar) and not fits32(self.of(e), e.dtype.scalar)

    def wide_buffer(self, b: Buffer) -> bool:
        """Whether the elements of a buffer do."""
        if not is_int64(b.dtype.scalar):
            return False
        if b.scope == "param":
            return b.name not in self.narrow
        return b.name in self.locals and not fits32(self.locals[b.name], b.dtype.scalar)

    def of(self, e: Expr) -> Range:
        """The range of an integer; nothing is remembered about a type of less than 64 bits beyond its limits."""
        r = self.memo.get(e)
        if r is None:
            r = self.memo[e] = self._of(e)
        return r

    def _of(self, e: Expr) -> Range:
        d = e.dtype.scalar
        limits = (0, 1) if d.is_bool else i32.limits() if d.is_index else d.limits()
        if d.is_float:
            return limits
        r = self._raw(e)
        if r is None:
            return limits
        return r if limits[0] <= r[0] and r[1] <= limits[1] else limits

    def _raw(self, e: Expr) -> Range | None:
        op, d = e.op, e.dtype.scalar
        if op == "const":
            return int(e.attr), int(e.attr)
        if op == "var":
            if e in self.values:
                return self.values[e]
            lo, hi = bounds(e)
            low, high = i32.limits() if is_int64(d) or d.is_index else (0, 1) if d.is_bool else d.limits()
            return low if lo is None else lo, high if hi is None else hi
        if op == "load":
            b, _, _, other = load_parts(e)
            if not is_int64(b.dtype):
                return None
            if b.scope != "param" and b.name not in self.locals:  # nothing is stored to it yet: the other rounds say more
                return (0, 0) if other is None else self.of(other)
            r = b.dtype.limits() if self.wide_buffer(b) else self.locals.get(b.name, i32.limits() if d.is_signed else (0, (1 << 32) - 1))
            return r if other is None else _hull(r, self.of(other))
        if op in COMPARE or d.is_bool:
            return 0, 1
        if op == "cast":
            s = e.args[0].dtype.scalar
            return None if s.is_float else self.of(e.args[0])
        if op in ("bcast", "extract") or op == "vreduce":
            return self.of(e.args[0]) if op != "vreduce" else None
        if op == "select":
            return _hull(self.of(e.args[1]), self.of(e.args[2]))
        if not e.args or op in ("call", "bitcast", "shuffle", "ramp"):
            return None
        a = self.of(e.args[0])
        if op == "neg":
            return -a[1], -a[0]
        if op == "abs":
            return (0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))), max(abs(a[0]), abs(a[1]))
        if op == "popcount":
            return 0, 64
        if len(e.args) < 2:
            return None
        return _binary(op, a, self.of(e.args[1]))


def _binary(op: str, a: Range, b: Range) -> Range | None:
    if op == "add":
        return a[0] + b[0], a[1] + b[1]
    if op == "sub":
        return a[0] - b[1], a[1] - b[0]
    if op == "mul":
        ps = [x * y for x in a for y in b]
        return min(ps), max(ps)
    if op in ("min", "max"):
        pick = min if op == "min" else max
        return pick(a[0], b[0]), pick(a[1], b[1])
    if op == "and" and (a[0] >= 0 or b[0] >= 0):
        return 0, min(x[1] for x in (a, b) if x[0] >= 0)
    if op in ("or", "xor") and a[0] >= 0 and b[0] >= 0:
        return 0, (1 << max(a[1], b[1]).bit_length()) - 1
    if op == "shr" and a[0] >= 0:
        return 0, a[1]
    if op == "shr":
        return min(a[0], 0), max(a[1], 0)
    if op in ("div", "floordiv") and b[0] > 0:
        qs = [x // y if op == "floordiv" or x >= 0 else -(-x // y) for x in a for y in b]
        return min(qs), max(qs)
    if op in ("div", "floordiv"):  # no quotient is farther from zero than the number by more than the floor
        m = max(abs(a[0]), abs(a[1]))
        return (0 if a[0] >= 0 and b[0] >= 0 else -m), m
    if op in ("rem", "mod"):
        m = max(abs(b[0]), abs(b[1]), 1) - 1
        if op == "mod":
            return (0 if b[0] >= 0 else -m), (m if b[1] > 0 else 0)
        return max(-m, min(a[0], 0)), min(m, max(a[1], 0))
    return None


def _hull(a: Range | None, b: Range) -> Range:
    return b if a is None else (min(a[0], b[0]), max(a[1], b[1]))


def _buffers(s: Call) -> list[Buffer]:
    return [a if isinstance(a, Buffer) else a[0] for a in s.args if not isinstance(a, Expr)]
