"""GPU dot products of four bytes in one 32-bit word: CUDA ``__dp4a``, WGSL ``dot4I8Packed`` (packed_4x8_integer_dot_product).

GPUs compute with words, so both exist as intrinsics on words, too (:mod:`luthier.ir.words`).
"""

from __future__ import annotations

from luthier.ir.dtypes import i8, i32, u8, u32
from luthier.ir.intrin import Instruction, declare
from luthier.ir.words import declare_words

DP4A_S = declare_words(declare(Instruction("gpu.dp4a.s8", i8, i8, i32, 4, "dp4a", {"cuda": {32: "__dp4a"}, "wgsl": {32: "dot4I8Packed"}}, doc="Four products of i8.")))
DP4A_U = declare_words(declare(Instruction("gpu.dp4a.u8", u8, u8, u32, 4, "dp4a", {"cuda": {32: "__dp4a"}, "wgsl": {32: "dot4U8Packed"}}, doc="Four products of u8.")))
