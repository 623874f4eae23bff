"""WebAssembly dot products: ``i32x4.dot_i16x8_s`` of SIMD128 and the relaxed 7-bit one of Relaxed SIMD.

The spelling is the opcode after the 0xFD prefix. ``i32x4.relaxed_dot_i8x16_i7x16_add_s`` gives the same result on all machines
only while the second operand is within 0..127, which its type (i8) does not say: a schedule must prove it.
"""

from __future__ import annotations

from luthier.ir.dtypes import i8, i16, i32
from luthier.ir.intrin import Instruction, declare

DOT = declare(Instruction("wasm.dot_i16x8", i16, i16, i32, 2, "simd128", {"wasm": {128: "0xBA"}}, adds=False, doc="Products of 16-bit pairs, summed."))
RELAXED_DOT = declare(Instruction("wasm.relaxed_dot_i7x16", i8, i8, i32, 4, "relaxed_simd", {"wasm": {128: "0x113"}}, doc="Four products of i8 and i7."))
