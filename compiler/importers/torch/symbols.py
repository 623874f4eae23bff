"""torch's symbolic sizes (sympy expressions) as index expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from luthier.ir.dtypes import f64, index
from luthier.ir.errors import UnsupportedOperator
from luthier.ir.expr import Expr, as_expr, binary, cast, maximum, minimum, select, unary, var
from luthier.ir.ops.common import flag

_DIVISIONS = {"FloorDiv", "CleanDiv", "PythonFloorDiv"}
_REMAINDERS = {"Mod", "PythonMod"}
_COMPARED = {sympy.Eq: "eq", sympy.Ne: "ne", sympy.Lt: "lt", sympy.Le: "le"}
HUGE = 1 << 31  # bounds beyond it are torch's word for none


class Symbols:
    """The variable of every symbol of a program. ``ranges``: {symbol: torch's value range}."""

    def __init__(self, ranges: Mapping[Any, Any] | None = None) -> None:
        self.known: dict[Any, Expr] = {}
        self.ranges = dict(ranges or {})

    def open(self, symbol: Any) -> Expr:
        """A new variable for an extent that calls bring, with the bounds that torch proved: from 2 on means no 0 or 1 in the trace, and
        a call with 1 is as good, in torch as here."""
        r = self.ranges.get(symbol)
        lo = int(r.lower) if r is not None and r.lower.is_finite and r.lower > 0 else 0
        lo = 1 if lo == 2 else lo
        hi = int(r.upper) if r is not None and r.upper.is_finite and r.upper < HUGE else None
        self.known[symbol] = var(str(symbol), lo=lo, hi=hi)
        return self.known[symbol]

    def expr(self, size: Any) -> Expr:
        """An int, SymInt or sympy expression. Raises UnsupportedOperator for arithmetic that index expressions do not have."""
        if isinstance(size, int):
            return as_expr(size)
        return self._of(size.node.expr if isinstance(size, (torch.SymInt, torch.SymBool, torch.SymFloat)) else size)

    def dims(self, sizes: Sequence[Any]) -> tuple[Expr, ...]:
        return tuple(self.expr(s) for s in sizes)

    def bind(self, sizes: Sequence[Any], shape: Sequence[Expr]) -> None:
        """What an operator's own symbol is: torch counts in ``sizes``, the graph in ``shape``."""
        for s, e in zip(sizes, shape, strict=True):
            if isinstance(s, torch.SymInt) and isinstance(s.node.expr, sympy.Symbol):
                self.known.setdefault(s.node.expr, e)

    def _of(self, s: Any) -> Expr:
        if s in self.known:
            return self.known[s]
        if isinstance(s, sympy.Symbol):
            raise UnsupportedOperator(f"the size {s} depends on data in a way that is not followed", hint="export with shapes that inputs decide")
        if s in (sympy.true, sympy.false):
            return as_expr(int(bool(s)))
        if s.is_Integer:
            return as_expr(int(s))
        name, args = type(s).__name__, s.args
        if isinstance(s, sympy.Add):
            return sum((self._of(a) for a in args), as_expr(0))
        if isinstance(s, sympy.Mul):
            top = [a for a in args if not (a.is_Rational and not a.is_Integer)]
            below = math.prod(int(1 / a) for a in args if a.is_Rational and not a.is_Integer)
            product = math.prod((self._of(a) for a in top), start=as_expr(1))
            return product if below == 1 else product // as_expr(below)
        if isinstance(s, sympy.Pow) and args[1].is_Integer and int(args[1]) > 0 or name == "PowByNatural":
            return math.prod([self._of(args[0])] * int(args[1]), start=as_expr(1))
        if name in _DIVISIONS:
            return self._of(args[0]) // self._of(args[1])
        if name in _REMAINDERS:
            return self._of(args[0]) % self._of(args[1])
        if name == "ModularIndexing":
            return (self._of(args[0]) // self._of(args[1])) % self._of(args[2])
        if name == "Max":
            return _fold(maximum, [self._of(a) for a in args])
        if name == "Min":
            return _fold(minimum, [self._of(a) for a in args])
        if name in ("Where", "Piecewise") and len(args) == 3:
            return select(self._of(args[0]).ne(0), self._of(args[1]), self._of(args[2]))
        if type(s) in _COMPARED:
            a, b = self._of(args[0]), self._of(args[1])
            return flag({"eq": a.eq, "ne": a.ne, "lt": a.__lt__, "le": a.__le__}[_COMPARED[type(s)]](b))
        if isinstance(s, (sympy.Gt, sympy.Ge)):
            return self._of(s.reversed)
        if name in ("TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt") and not args[0].free_symbols:
            whole: dict[str, Callable[[float], int]] = {"F": math.floor, "C": math.ceil, "R": round, "T": math.trunc}
            return as_expr(whole[name[0]](float(args[0])))
        if name in ("TruncToInt", "FloorToInt", "CeilToInt"):
            op = {"T": "trunc", "F": "floor", "C": "ceil"}[name[0]]
            return cast(unary(op, self._float(args[0])), index)
        if name == "Identity":
            return self._of(args[0])
        raise UnsupportedOperator(f"the size {s} is computed with {name}, which index expressions do not have", hint="pin the dimension")

    def _float(self, s: Any) -> Expr:
        """A real-valued sympy expression in f64."""
        name, args = type(s).__name__, s.args
        if s.is_number:
            return as_expr(float(s), f64)
        if isinstance(s, (sympy.Add, sympy.Mul)):
            return _fold(lambda a, b: a + b if isinstance(s, sympy.Add) else a * b, [self._float(a) for a in args])
        if name in ("IntTrueDiv", "FloatTrueDiv"):
            return self._float(args[0]) / self._float(args[1])
        if name in ("ToFloat", "Identity"):
            return self._float(args[0])
        if name in ("FloatPow", "Pow"):
            return binary("pow", self._float(args[0]), self._float(args[1]))
        return cast(self._of(s), f64)


def _fold(f: Any, args: list[Expr]) -> Expr:
    out = args[0]
    for a in args[1:]:
        out = f(out, a)
    return out
