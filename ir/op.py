"""The operator registry. An operator owns its type inference, its mathematics and its numpy oracle; one family a file in ``ops/``.

To add an operator: a class in a file of ``ir/ops/`` with the :func:`op` decorator. Names and attributes are those of the
newest ONNX version (domain ``ai.onnx`` has no prefix, others are ``com.microsoft::Name``).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.expr import Expr
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.loop import Buffer, Func


class Kernel:
    """An operator that is no affine nest, written in loop IR once (NonZero, TopK, NonMaxSuppression ...).

    ``func``: its parameters are the inputs (as given to ``Op.compute``), then the outputs, then ``temps``, then scalar dims.
    ``symbols``: dimensions that the kernel decides: {symbol: (name of an i64 output or temp buffer, element)}; outputs are
    allocated with ``capacity`` (upper bounds of the output shapes) and their true extents read after the kernel ran."""

    def __init__(
        self, func: Func, temps: Sequence[Buffer] = (), symbols: dict[Expr, tuple[str, int]] | None = None,
        capacity: dict[str, tuple[Expr, ...]] | None = None,
    ) -> None:
        self.func, self.temps, self.symbols, self.capacity = func, tuple(temps), symbols or {}, capacity or {}
        self.in_place: dict[str, int] = {}  # outputs that are an input's own memory, changed: {output buffer: number of the input}


@dataclass(frozen=True, slots=True)
class Indexed:
    """Elements of input ``operand`` that must lie in ``low .. high``: one pair for all, or one for each place along the last axis."""

    operand: int
    low: tuple[Expr, ...]
    high: tuple[Expr, ...]

    @staticmethod
    def of(operand: int, *extents: Expr) -> Indexed:
        """Indices into extents; negative ones count from the end."""
        return Indexed(operand, tuple(-n for n in extents), tuple(n - 1 for n in extents))


class Op:
    """Base class. ``name``: registry key. ``kind`` tells fusion how outputs depend on inputs:

    ``elementwise`` (same index or broadcast), ``injective`` (each output element reads O(1) elements: transpose, slice, gather),
    ``reduction``, ``contraction`` (matmul, conv), ``view`` (same bytes, other shape), ``opaque`` (everything else).
    ``permutes``: of an elementwise operator, that its operands broadcast like numpy's and no value depends on where it stands, so that
    transposed operands give the transposed result."""

    name: str = ""
    kind: str = "opaque"
    permutes: bool = False

    def infer(self, node: Node) -> Sequence[TensorType]:
        """Types of the outputs from ``node.inputs`` (their types, constant data, symbolic content) and ``node.attrs``.

        Raises ShapeError or TypeMismatch (luthier.ir.errors) naming the node."""
        raise NotImplementedError

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        """Symbolic contents of small integer outputs, when those of the inputs are known (shape data-flow)."""
        return None

    def limits(self, node: Node) -> tuple[Expr, Expr] | None:
        """``Value.limits`` of the one output."""
        return None

    def indexed(self, node: Node) -> Sequence[Indexed]:
        """Which inputs say where another one is read or written: a run checks them (:mod:`luthier.passes.program.check_indices`)."""
        return ()

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute | Kernel | Graph:
        """The mathematics: lets over ``ins`` that define every buffer of ``outs`` by name. A Graph means: legalised into other
        operators (same inputs and outputs, in order)."""
        raise NotImplementedError

    def reference(self, node: Node, *arrays: Any) -> Sequence[np.ndarray[Any, Any]]:
        """numpy oracle and constant folder; never called by a compiled module."""
        raise NotImplementedError


REGISTRY: dict[str, Op] = {}
T = TypeVar("T", bound=type[Op])


def op(*names: str) -> Callable[[T], T]:
    """Register a class under one or several names (an instance per name, ``self.name`` set)."""

    def wrap(cls: T) -> T:
        for n in names:
            inst = cls()
            inst.name = n
            REGISTRY[n] = inst
        return cls

    return wrap


def lookup(name: str) -> Op | None:
    """The operator of that name; every family is loaded on the first call."""
    if not _loaded:
        load_all()
    return REGISTRY.get(name)


_loaded: list[bool] = []


def load_all() -> None:
    """Import every family in ``luthier.ir.ops``."""
    import luthier.ir.ops as ops

    for m in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"luthier.ir.ops.{m.name}")
    _loaded.append(True)


__all__ = ["Op", "Indexed", "Kernel", "op", "lookup", "load_all", "REGISTRY", "Graph", "Value"]
