"""Byte intrinsics of :mod:`luthier.schedules.intrin.byte_vectors` in LLVM: x86 has most as instructions; elsewhere look-ups are the
table instruction and the rest is said in vector operations that LLVM knows how to select (widening multiplications, pair sums)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.errors import CompilationError
from luthier.ir.expr import Expr
from luthier.schedules.intrin.byte_vectors import SPELLING


def print_bytes(p: Any, e: Expr, args: list[str]) -> str:
    """The target's instructions for the width of the operands. Raises CompilationError where there are none."""
    from luthier.codegen.llvm.types import reg_type

    bits = e.args[0].dtype.bits * e.args[0].dtype.lanes
    name = SPELLING[e.attr[0]].get("llvm", {}).get(bits)
    if not p.target.is_x86 and bits == 128 and e.attr[0] in _PLAIN:
        return _PLAIN[e.attr[0]](p, e.args[0].dtype.lanes, args)
    if name is None or not p.target.is_x86:
        raise CompilationError(f"{e.attr[0]} of {bits} bits is no instruction of {p.target.name}")
    types = [reg_type(a.dtype) for a in e.args]
    fn = p.declare(name, f"{reg_type(e.dtype)} @({', '.join(types)})")
    return str(p.ins(f"call {reg_type(e.dtype)} @{fn}({', '.join(f'{t} {v}' for t, v in zip(types, args, strict=True))})"))


def _splat(value: int, lanes: int, bits: int) -> str:
    return "<" + ", ".join([f"i{bits} {value}"] * lanes) + ">"


def _lookup(p: Any, n: int, args: list[str]) -> str:
    """``tbl`` gives 0 for every index above 15: bits 4 to 6 go, bit 7 stays."""
    which = p.ins(f"and <{n} x i8> {args[1]}, {_splat(0x8F - 256, n, 8)}")
    fn = p.declare("llvm.aarch64.neon.tbl1.v16i8", "<16 x i8> @(<16 x i8>, <16 x i8>)")
    return str(p.ins(f"call <16 x i8> @{fn}(<16 x i8> {args[0]}, <16 x i8> {which})"))


def _halves(p: Any, v: str, n: int, bits: int) -> tuple[str, str]:
    """Lanes with even and with odd numbers."""
    t = f"<{n} x i{bits}>"
    a, b = (p.ins(f"shufflevector {t} {v}, {t} poison, <{n // 2} x i32> <{', '.join(f'i32 {i}' for i in range(h, n, 2))}>") for h in (0, 1))
    return a, b


def _pair_sums(p: Any, n: int, args: list[str], bits: int, widen: tuple[str, str], saturate: bool) -> str:
    narrow, wide = f"<{n // 2} x i{bits}>", f"<{n // 2} x i{2 * bits}>"
    (a0, a1), (b0, b1) = (_halves(p, v, n, bits) for v in args)
    x = [p.ins(f"{w} {narrow} {v} to {wide}") for v, w in ((a0, widen[0]), (b0, widen[1]), (a1, widen[0]), (b1, widen[1]))]
    even, odd = p.ins(f"mul {wide} {x[0]}, {x[1]}"), p.ins(f"mul {wide} {x[2]}, {x[3]}")
    if not saturate:
        return str(p.ins(f"add {wide} {even}, {odd}"))
    fn = p.declare(f"llvm.sadd.sat.v{n // 2}i{2 * bits}", f"{wide} @({wide}, {wide})")
    return str(p.ins(f"call {wide} @{fn}({wide} {even}, {wide} {odd})"))


def _sign(p: Any, n: int, args: list[str]) -> str:
    t, c = f"<{n} x i8>", f"<{n} x i1>"
    below, zero = (p.ins(f"icmp {op} {t} {args[1]}, zeroinitializer") for op in ("slt", "eq"))
    r = p.ins(f"select {c} {below}, {t} {p.ins(f'sub {t} zeroinitializer, {args[0]}')}, {t} {args[0]}")
    return str(p.ins(f"select {c} {zero}, {t} zeroinitializer, {t} {r}"))


_PLAIN: dict[str, Callable[[Any, int, list[str]], str]] = {
    "bytes.lookup": _lookup,
    "bytes.sign": _sign,
    "bytes.madd": lambda p, n, args: _pair_sums(p, n, args, 8, ("zext", "sext"), True),
    "bytes.madd7": lambda p, n, args: _pair_sums(p, n, args, 8, ("zext", "sext"), False),
    "words.madd": lambda p, n, args: _pair_sums(p, n, args, 16, ("sext", "sext"), False),
}
