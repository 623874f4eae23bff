"""A WebAssembly binary writer: LEB128, instructions by name, sections.

Source: the WebAssembly core specification, 3.0 (binary format; SIMD and relaxed SIMD included).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

VALTYPE = {"i32": 0x7F, "i64": 0x7E, "f32": 0x7D, "f64": 0x7C, "v128": 0x7B}


_SMALL = [bytes([n]) for n in range(128)]


def uleb(n: int) -> bytes:
    """Unsigned LEB128. Raises ValueError for a negative number."""
    if 0 <= n < 128:
        return _SMALL[n]
    if n < 0:
        raise ValueError(f"{n} is negative")
    out = bytearray()
    while True:
        b = n & 0x7F
        n >>= 7
        out.append(b | (0x80 if n else 0))
        if not n:
            return bytes(out)


def sleb(n: int) -> bytes:
    """Signed LEB128."""
    out = bytearray()
    while True:
        b = n & 0x7F
        n >>= 7
        done = (n == 0 and not b & 0x40) or (n == -1 and bool(b & 0x40))
        out.append(b | (0 if done else 0x80))
        if done:
            return bytes(out)


def _table() -> dict[str, bytes]:
    t: dict[str, bytes] = {}

    def run(start: int, names: str, prefix: bytes = b"") -> None:
        for k, n in enumerate(names.split()):
            if n != "-":
                t[n] = prefix + uleb(start + k) if prefix else bytes([start + k])

    run(0x00, "unreachable nop block loop if else")
    run(0x0B, "end br br_if - return call")
    run(0x1A, "drop select")
    run(0x20, "local.get local.set local.tee global.get global.set")
    run(0x28, "i32.load i64.load f32.load f64.load i32.load8_s i32.load8_u i32.load16_s i32.load16_u i64.load8_s i64.load8_u "
              "i64.load16_s i64.load16_u i64.load32_s i64.load32_u i32.store i64.store f32.store f64.store i32.store8 i32.store16 "
              "i64.store8 i64.store16 i64.store32 memory.size memory.grow i32.const i64.const f32.const f64.const")
    cmp = "eqz eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u"
    run(0x45, " ".join(f"i32.{c}" for c in cmp.split()) + " " + " ".join(f"i64.{c}" for c in cmp.split()))
    fc = "eq ne lt gt le ge".split()
    run(0x5B, " ".join(f"f32.{c}" for c in fc) + " " + " ".join(f"f64.{c}" for c in fc))
    ints = "clz ctz popcnt add sub mul div_s div_u rem_s rem_u and or xor shl shr_s shr_u rotl rotr".split()
    flts = "abs neg ceil floor trunc nearest sqrt add sub mul div min max copysign".split()
    run(0x67, " ".join(f"i32.{c}" for c in ints) + " " + " ".join(f"i64.{c}" for c in ints))
    run(0x8B, " ".join(f"f32.{c}" for c in flts) + " " + " ".join(f"f64.{c}" for c in flts))
    run(0xA7, "i32.wrap_i64 - - - - i64.extend_i32_s i64.extend_i32_u - - - - f32.convert_i32_s f32.convert_i32_u f32.convert_i64_s "
              "f32.convert_i64_u f32.demote_f64 f64.convert_i32_s f64.convert_i32_u f64.convert_i64_s f64.convert_i64_u f64.promote_f32 "
              "i32.reinterpret_f32 i64.reinterpret_f64 f32.reinterpret_i32 f64.reinterpret_i64 i32.extend8_s i32.extend16_s")
    run(0, "i32.trunc_sat_f32_s i32.trunc_sat_f32_u i32.trunc_sat_f64_s i32.trunc_sat_f64_u i64.trunc_sat_f32_s i64.trunc_sat_f32_u "
           "i64.trunc_sat_f64_s i64.trunc_sat_f64_u", b"\xfc")
    s = b"\xfd"
    run(0x00, "v128.load v128.load8x8_s v128.load8x8_u v128.load16x4_s v128.load16x4_u v128.load32x2_s v128.load32x2_u v128.load8_splat "
              "v128.load16_splat v128.load32_splat v128.load64_splat v128.store v128.const i8x16.shuffle i8x16.swizzle i8x16.splat "
              "i16x8.splat i32x4.splat i64x2.splat f32x4.splat f64x2.splat i8x16.extract_lane_s i8x16.extract_lane_u i8x16.replace_lane "
              "i16x8.extract_lane_s i16x8.extract_lane_u i16x8.replace_lane i32x4.extract_lane i32x4.replace_lane i64x2.extract_lane "
              "i64x2.replace_lane f32x4.extract_lane f32x4.replace_lane f64x2.extract_lane f64x2.replace_lane", s)
    vc = "eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u".split()
    run(0x23, " ".join(f"{v}.{c}" for v in ("i8x16", "i16x8", "i32x4") for c in vc), s)
    run(0x41, " ".join(f"{v}.{c}" for v in ("f32x4", "f64x2") for c in fc), s)
    run(0x4D, "v128.not v128.and v128.andnot v128.or v128.xor v128.bitselect v128.any_true v128.load8_lane v128.load16_lane "
              "v128.load32_lane v128.load64_lane v128.store8_lane v128.store16_lane v128.store32_lane v128.store64_lane v128.load32_zero "
              "v128.load64_zero f32x4.demote_f64x2_zero f64x2.promote_low_f32x4 i8x16.abs i8x16.neg i8x16.popcnt i8x16.all_true "
              "i8x16.bitmask i8x16.narrow_i16x8_s i8x16.narrow_i16x8_u f32x4.ceil f32x4.floor f32x4.trunc f32x4.nearest i8x16.shl "
              "i8x16.shr_s i8x16.shr_u i8x16.add i8x16.add_sat_s i8x16.add_sat_u i8x16.sub i8x16.sub_sat_s i8x16.sub_sat_u f64x2.ceil "
              "f64x2.floor i8x16.min_s i8x16.min_u i8x16.max_s i8x16.max_u f64x2.trunc i8x16.avgr_u", s)
    run(0x80, "i16x8.abs i16x8.neg - i16x8.all_true i16x8.bitmask i16x8.narrow_i32x4_s i16x8.narrow_i32x4_u i16x8.extend_low_i8x16_s "
              "i16x8.extend_high_i8x16_s i16x8.extend_low_i8x16_u i16x8.extend_high_i8x16_u i16x8.shl i16x8.shr_s i16x8.shr_u i16x8.add "
              "- - i16x8.sub - - f64x2.nearest i16x8.mul i16x8.min_s i16x8.min_u i16x8.max_s i16x8.max_u", s)
    run(0xA0, "i32x4.abs i32x4.neg - i32x4.all_true i32x4.bitmask - - i32x4.extend_low_i16x8_s i32x4.extend_high_i16x8_s "
              "i32x4.extend_low_i16x8_u i32x4.extend_high_i16x8_u i32x4.shl i32x4.shr_s i32x4.shr_u i32x4.add - - i32x4.sub - - - "
              "i32x4.mul i32x4.min_s i32x4.min_u i32x4.max_s i32x4.max_u i32x4.dot_i16x8_s", s)
    run(0xC0, "i64x2.abs i64x2.neg - i64x2.all_true i64x2.bitmask - - i64x2.extend_low_i32x4_s - i64x2.extend_low_i32x4_u - i64x2.shl "
              "i64x2.shr_s i64x2.shr_u i64x2.add - - i64x2.sub - - - i64x2.mul i64x2.eq i64x2.ne i64x2.lt_s i64x2.gt_s i64x2.le_s i64x2.ge_s", s)
    vf = "abs neg - sqrt add sub mul div min max pmin pmax".split()
    run(0xE0, " ".join(f"f32x4.{c}" if c != "-" else c for c in vf) + " " + " ".join(f"f64x2.{c}" if c != "-" else c for c in vf), s)
    run(0xF8, "i32x4.trunc_sat_f32x4_s i32x4.trunc_sat_f32x4_u f32x4.convert_i32x4_s f32x4.convert_i32x4_u i32x4.trunc_sat_f64x2_s_zero "
              "i32x4.trunc_sat_f64x2_u_zero f64x2.convert_low_i32x4_s f64x2.convert_low_i32x4_u i8x16.relaxed_swizzle", s)
    run(0x105, "f32x4.relaxed_madd f32x4.relaxed_nmadd f64x2.relaxed_madd f64x2.relaxed_nmadd", s)
    a = b"\xfe"
    run(0x00, "memory.atomic.notify memory.atomic.wait32 memory.atomic.wait64", a)
    run(0x10, "i32.atomic.load i64.atomic.load - - - - - i32.atomic.store i64.atomic.store", a)
    for k, n in enumerate("add sub and or xor xchg cmpxchg".split()):
        run(0x1E + 7 * k, f"i32.atomic.rmw.{n} i64.atomic.rmw.{n}", a)
    run(0x112, "i16x8.relaxed_dot_i8x16_i7x16_s i32x4.relaxed_dot_i8x16_i7x16_add_s", s)
    return t


OPCODE = _table()


_CONSTS: dict[tuple[str, int], bytes] = {}


def _const(ty: str, v: int | float) -> bytes:
    if len(_CONSTS) > 100_000:
        _CONSTS.clear()
    head = OPCODE[f"{ty}.const"]
    if ty == "i32":
        n = int(v) & 0xFFFFFFFF
        return head + sleb(n - (1 << 32) if n >> 31 else n)
    if ty == "i64":
        n = int(v) & 0xFFFFFFFFFFFFFFFF
        return head + sleb(n - (1 << 64) if n >> 63 else n)
    return head + struct.pack("<f" if ty == "f32" else "<d", v)


class Code:
    """The instructions of one function body, in order."""

    def __init__(self) -> None:
        self.b = bytearray()

    def op(self, name: str, *imm: int) -> None:
        """An instruction whose immediates are unsigned numbers (indices, lanes). Raises KeyError on an unknown name."""
        self.b += OPCODE[name]
        for i in imm:
            self.b += _SMALL[i] if 0 <= i < 128 else uleb(i)

    def get(self, n: int) -> None:
        """``local.get``, the most frequent instruction."""
        b = self.b
        b.append(0x20)
        if n < 128:
            b.append(n)
        else:
            b += uleb(n)

    def set(self, n: int) -> None:
        """``local.set``."""
        b = self.b
        b.append(0x21)
        if n < 128:
            b.append(n)
        else:
            b += uleb(n)

    def lane(self, name: str, lane: int) -> None:
        self.b += OPCODE[name]
        self.b.append(lane)

    def simd(self, code: int) -> None:
        """A vector instruction by its number after the prefix."""
        self.b += b"\xfd" + uleb(code)

    def mem(self, name: str, offset: int, align: int, lane: int | None = None) -> None:
        """A memory access; ``align``: log2 of the promised alignment in bytes; ``offset``: bytes, unsigned."""
        b = self.b
        b += OPCODE[name]
        b.append(align)
        b += _SMALL[offset] if offset < 128 else uleb(offset)
        if lane is not None:
            self.b.append(lane)

    def const(self, ty: str, v: int | float) -> None:
        raw = _CONSTS.get((ty, v)) if isinstance(v, int) else None
        if raw is None:
            raw = _const(ty, v)
            if isinstance(v, int):
                _CONSTS[ty, v] = raw
        self.b += raw

    def v128(self, data: bytes) -> None:
        self.b += OPCODE["v128.const"] + data

    def shuffle(self, picks: Sequence[int]) -> None:
        self.b += OPCODE["i8x16.shuffle"] + bytes(picks)

    def start(self, name: str, result: str | None = None) -> None:
        """``block``, ``loop`` or ``if``, with an optional result on the stack."""
        self.b += OPCODE[name]
        self.b.append(0x40 if result is None else VALTYPE[result])


def vec(items: Iterable[bytes]) -> bytes:
    xs = list(items)
    return uleb(len(xs)) + b"".join(xs)


def text(s: str) -> bytes:
    b = s.encode()
    return uleb(len(b)) + b


@dataclass
class Function:
    """``params``/``results``/``locals``: value type names; ``code``: body without the final ``end``."""

    name: str
    params: Sequence[str]
    results: Sequence[str]
    locals: Sequence[str]
    code: bytes

    def body(self) -> bytes:
        groups = [uleb(len(list(same))) + bytes((VALTYPE[t],)) for t, same in groupby(self.locals)]
        b = uleb(len(groups)) + b"".join(groups) + self.code + OPCODE["end"]
        return uleb(len(b)) + b


@dataclass
class Module:
    """A module that imports its memory (``env.memory``) and exports functions.

    ``imported``: globals imported from ``env``, (name, value type, mutable); ``globals``: own i32 globals, mutable, by their first
    values; they are numbered after the imported ones. ``hooks``: imported functions without results, (name, parameter types), numbered
    before all others. ``exports``: {name: index}, None for all functions. ``data``: (offset from the imported global 1, bytes).
    ``pages``: (least, most or None); ``shared``: the memory is, with ``most``."""

    functions: list[Function]
    data: list[tuple[int, bytes]] = field(default_factory=list)
    imported: Sequence[tuple[str, str, bool]] = ()
    globals: Sequence[int] = ()
    hooks: Sequence[tuple[str, Sequence[str]]] = ()
    exports: dict[str, int] | None = None
    pages: tuple[int, int | None] = (1, None)
    shared: bool = False
    names: bool = False

    def encode(self) -> bytes:
        sigs: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        for p, r in (*((tuple(t), ()) for _, t in self.hooks), *((tuple(f.params), tuple(f.results)) for f in self.functions)):
            sigs.setdefault((p, r), len(sigs))

        def types(ts: Iterable[str]) -> bytes:
            return vec(bytes([VALTYPE[t]]) for t in ts)

        def section(n: int, b: bytes) -> bytes:
            return bytes([n]) + uleb(len(b)) + b

        least, most = self.pages
        flag = (0 if most is None else 1) | (2 if self.shared else 0)
        limits = bytes([flag]) + uleb(least) + (b"" if most is None else uleb(most))
        imports = [text("env") + text("memory") + b"\x02" + limits]
        imports += [text("env") + text(n) + b"\x03" + bytes([VALTYPE[t], mutable]) for n, t, mutable in self.imported]
        imports += [text("env") + text(n) + b"\x00" + uleb(sigs[tuple(t), ()]) for n, t in self.hooks]
        exports = {f.name: i + len(self.hooks) for i, f in enumerate(self.functions)} if self.exports is None else self.exports
        out = b"\x00asm\x01\x00\x00\x00" + section(1, vec(b"\x60" + types(p) + types(r) for p, r in sigs)) + section(2, vec(imports))
        out += section(3, vec(uleb(sigs[tuple(f.params), tuple(f.results)]) for f in self.functions))
        if self.globals:
            out += section(6, vec(b"\x7f\x01\x41" + sleb(v) + b"\x0b" for v in self.globals))
        out += section(7, vec(text(n) + b"\x00" + uleb(i) for n, i in exports.items()))
        if self.data and not self.shared:
            out += section(12, uleb(len(self.data)))
        out += section(10, vec(f.body() for f in self.functions))
        if self.data:
            segs = [b"\x00" + b"\x23\x01" + self._offset(o) + b"\x0b" + uleb(len(d)) + d for o, d in self.data]
            out += section(11, vec(segs))
        if self.names:
            table = vec(uleb(i + len(self.hooks)) + text(f.name) for i, f in enumerate(self.functions))
            out += section(0, text("name") + section(1, table))
        return out

    @staticmethod
    def _offset(o: int) -> bytes:
        return b"" if o == 0 else b"\x41" + sleb(o) + b"\x6a"
