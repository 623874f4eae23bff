"""Byte intrinsics of :mod:`luthier.schedules.intrin.byte_vectors` as LLVM calls."""

from __future__ import annotations

from typing import Any

from luthier.errors import CompilationError
from luthier.ir.expr import Expr
from luthier.schedules.intrin.byte_vectors import SPELLING


def print_bytes(p: Any, e: Expr, args: list[str]) -> str:
    """The target's instruction for the width of the operands. Raises CompilationError where there is none."""
    from luthier.codegen.llvm_types import reg_type

    bits = e.args[0].dtype.bits * e.args[0].dtype.lanes
    name = SPELLING[e.attr[0]].get("llvm", {}).get(bits)
    if name is None or not p.target.is_x86:
        raise CompilationError(f"{e.attr[0]} of {bits} bits is no instruction of {p.target.name}")
    types = [reg_type(a.dtype) for a in e.args]
    fn = p.declare(name, f"{reg_type(e.dtype)} @({', '.join(types)})")
    return str(p.ins(f"call {reg_type(e.dtype)} @{fn}({', '.join(f'{t} {v}' for t, v in zip(types, args, strict=True))})"))
