"""Intrinsics: named operations that a target has as one instruction (dot products, table look-ups, tile loads).

A pure one is used as ``call(name, dtype, *args)`` in an expression, one with effects as a ``Call`` statement. What it means
is stated here; which instruction it is stands with the target. Modules in ``schedules/intrin`` register theirs: an
:class:`Instruction` is a dot product stated as an expression, with the fact that it needs and its spelling for every printer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.ir.dtypes import DType
from luthier.ir.errors import VerificationError
from luthier.ir.expr import Expr, cast, shuffle, var


@dataclass(frozen=True, slots=True)
class Intrinsic:
    """``evaluate(dtype, attr, *args)`` for a pure one: the result as a numpy value of ``dtype`` (lanes on the last axis).
    ``evaluate(*args, **attrs)`` for one with effects: arrays are changed in place. None for an
    :class:`Instruction`, which has an expression. ``lanewise``: on vectors it is the same in every lane.
    ``expand(attr, *args)``: a lane-wise one in basic operators, which ``expand_math`` puts in its place."""

    name: str
    evaluate: Callable[..., Any] | None
    doc: str = ""
    lanewise: bool = False
    expand: Callable[..., Expr] | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    """A dot product in lanes: ``r[j] = acc[j] + sum(t < group) a[j * group + t] * b[j * group + t]`` for every lane j of ``acc``.

    Operands are widened to the type of ``acc`` before they are multiplied; integer sums wrap. ``feature``: the capability that it
    needs. ``spelling``: {printer: {bits of the register: what the printer writes}}. ``adds``: False when the machine only
    multiplies and sums the groups, so that the printer adds ``acc``. ``vector_bits``: register widths it exists in, widest first."""

    name: str
    a: DType
    b: DType
    acc: DType
    group: int
    feature: str
    spelling: Mapping[str, Mapping[int, str]] = field(default_factory=dict, hash=False)
    adds: bool = True
    doc: str = ""

    @property
    def vector_bits(self) -> tuple[int, ...]:
        return tuple(sorted({w for t in self.spelling.values() for w in t}, reverse=True))

    def semantics(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        """The same value in plain vector operations: what the interpreter runs and a printer without the instruction prints."""
        n, out = acc.dtype.lanes, acc
        for t in range(self.group):
            lane = [j * self.group + t for j in range(n)]
            out = out + cast(shuffle([a], lane), self.acc) * cast(shuffle([b], lane), self.acc)
        return out

    def operands(self, lanes: int) -> tuple[Expr, Expr, Expr]:
        """Variables (acc, a, b) of the types that ``lanes`` accumulators take."""
        n = lanes * self.group
        return var("acc", self.acc.vec(lanes), None), var("a", self.a.vec(n), None), var("b", self.b.vec(n), None)


PURE: dict[str, Intrinsic] = {}
EFFECT: dict[str, Intrinsic] = {}
DOTS: dict[str, Instruction] = {}


def register(
    name: str, evaluate: Callable[..., Any] | None, doc: str = "", effect: bool = False, lanewise: bool = False, expand: Callable[..., Expr] | None = None,
) -> None:
    """Declare an intrinsic; the same name may be registered again only with the same meaning (last one wins)."""
    (EFFECT if effect else PURE)[name] = Intrinsic(name, evaluate, doc, lanewise or expand is not None, expand)


def declare(i: Instruction) -> Instruction:
    """Registers a dot product; its meaning is its expression, which the interpreter evaluates."""
    DOTS[i.name] = i
    register(i.name, None, i.doc)
    return i


def lookup(name: str) -> Intrinsic:
    """The pure intrinsic ``name``. Raises VerificationError when nobody registered it."""
    if name not in PURE:
        raise VerificationError(f"no intrinsic named {name!r}; known: {', '.join(sorted(PURE)) or 'none'}")
    return PURE[name]


def lookup_effect(name: str) -> Intrinsic:
    """The intrinsic with effects ``name``. Raises VerificationError when it is neither that nor a kernel of the module."""
    if name not in EFFECT:
        raise VerificationError(f"{name!r} is neither a kernel of this module nor a registered intrinsic")
    return EFFECT[name]


register("prefetch", lambda *place: None, "asks the memory system for the cache line of a place in a buffer, which may lie behind its end", effect=True)
