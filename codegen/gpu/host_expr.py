"""Scalar expressions of a Program's main as plain data, for hosts that are not machine code (Python, JavaScript).

A number, a boolean, the name of a variable, or ``[operator, operand, ...]``. Operators: ``+ - * // % min max < <= == != and or not ?``
(choose), ``trunc/`` and ``trunc%`` (C's division), ``/`` (float), ``neg abs floor ceil int`` (truncate towards zero), ``bool``, ``wrap`` (to an integer type:
``["wrap", x, bits, signed]``), and what a caller makes of loads. Integers are exact up to 2**53, which JavaScript's numbers are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, tree_size
from luthier.ir.program import Program

_SAME = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "min": "min", "max": "max", "lt": "<", "le": "<=", "eq": "==",
    "ne": "!=", "select": "?", "rem": "trunc%", "neg": "neg", "abs": "abs", "floor": "floor", "ceil": "ceil",
}  # fmt: skip


MAX_TREE = 100_000  # nodes of an extent that a host writes out


def check_extents(program: Program) -> None:
    """Extents are written out as trees, so that arithmetic which shares its parts again and again would never end.

    Raises CompilationError."""
    for b in (*program.outputs, *program.buffers):
        if sum(map(tree_size, b.shape)) > MAX_TREE:
            raise CompilationError(f"the extents of {b.name} are an expression of more than {MAX_TREE} operations", hint="pin the dimensions with shapes= or --shape")


def host_expr(e: Expr, name: Callable[[Expr], Any], load: Callable[[Expr], Any]) -> Any:
    """``name``: of a variable, or what stands for it; ``load``: what stands for a load. Raises CompilationError for operators that a host does not have."""

    def go(x: Expr) -> Any:
        op, d = x.op, x.dtype
        if op == "const":
            return bool(x.attr) if d.is_bool else float(x.attr) if d.is_float else int(x.attr)
        if op == "var":
            return name(x)
        if op == "load":
            return load(x)
        a = [go(y) for y in x.args]
        if op == "cast":
            s = x.args[0].dtype
            if d.is_bool:
                return a[0] if s.is_bool else ["bool", a[0]]
            if d.is_float:
                return ["+", a[0], 0] if s.is_bool else a[0]
            v = ["int", a[0]] if s.is_float or s.is_bool else a[0]
            return ["wrap", v, d.bits, d.is_signed] if d.is_int and d.bits < 64 and not s.is_bool else v
        if op in ("shr", "and") and d.is_index:  # by a power of two, as legalize_arithmetic writes divisions
            return ["//", a[0], 1 << a[1]] if op == "shr" else ["%", a[0], a[1] + 1]
        if op in ("and", "or", "not") and d.is_bool:
            return [op, *a]
        if op == "div":
            return ["/" if d.is_float else "trunc/", *a]
        if op in _SAME:
            return [_SAME[op], *a]
        raise CompilationError(f"the host cannot evaluate {op} in {e!r}")

    return go(e)
