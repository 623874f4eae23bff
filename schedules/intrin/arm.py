"""Arm dot products: ``sdot`` / ``udot`` (FEAT_DotProd) and ``usdot`` (FEAT_I8MM)."""

from __future__ import annotations

from luthier.ir.dtypes import i8, i32, u8, u32
from luthier.ir.intrin import Instruction, declare

SDOT = declare(Instruction("arm.sdot", i8, i8, i32, 4, "dot", {"llvm": {128: "llvm.aarch64.neon.sdot.v4i32.v16i8"}}, doc="Four products of i8."))
UDOT = declare(Instruction("arm.udot", u8, u8, u32, 4, "dot", {"llvm": {128: "llvm.aarch64.neon.udot.v4i32.v16i8"}}, doc="Four products of u8."))
USDOT = declare(Instruction("arm.usdot", u8, i8, i32, 4, "i8mm", {"llvm": {128: "llvm.aarch64.neon.usdot.v4i32.v16i8"}}, doc="Four products of u8 and i8."))
