"""x86 dot products: ``vpmaddwd`` (SSE2 on), VNNI (AVX-512 and AVX) and BF16.

``vpmaddubsw`` is left out: it adds two products of 8-bit operands with signed saturation to 16 bits, which is wrong for about
one weight pair in a thousand of ordinary networks; ``vpmaddwd`` on operands widened to 16 bits is exact (two products of 9-bit
values are far below 2**31) and needs the same number of multiplications: two for 32 products in a 256-bit register.
"""

from __future__ import annotations

from luthier.ir.dtypes import bf16, f32, i8, i16, i32, u8
from luthier.ir.intrin import Instruction, declare


def _widths(pattern: str, *bits: int) -> dict[str, dict[int, str]]:
    return {"llvm": {b: pattern.format(b) for b in bits}}


PMADDWD = declare(Instruction(
    "x86.vpmaddwd", i16, i16, i32, 2, "pmaddwd",
    {"llvm": {128: "llvm.x86.sse2.pmadd.wd", 256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}},
    adds=False, doc="Products of 16-bit pairs, summed; an addition follows.",
))  # fmt: skip
VPDPBUSD = declare(Instruction(
    "x86.vpdpbusd", u8, i8, i32, 4, "vnni", _widths("llvm.x86.avx512.vpdpbusd.{}", 128, 256, 512),
    doc="VNNI: four products of u8 and i8, no saturation.",
))  # fmt: skip
VPDPWSSD = declare(Instruction(
    "x86.vpdpwssd", i16, i16, i32, 2, "vnni", _widths("llvm.x86.avx512.vpdpwssd.{}", 128, 256, 512),
    doc="VNNI: two products of i16, no saturation.",
))  # fmt: skip
VDPBF16PS = declare(Instruction(
    "x86.vdpbf16ps", bf16, bf16, f32, 2, "bf16dot", _widths("llvm.x86.avx512bf16.dpbf16ps.{}", 128, 256, 512),
    doc="Two products of bf16 in f32. The instruction flushes denormals and rounds to nearest even in its own order.",
))  # fmt: skip
