"""Graph IR: a model as tensor operators in SSA form.

A :class:`Value` is produced once (by a node, as a graph input, or as a constant). Integer values of up to 64 elements may
carry their ``content`` as expressions: that is how shapes computed by Shape/Gather/Concat/... chains stay symbolic.
Operators are looked up in :mod:`luthier.ir.op`; attributes follow the newest ONNX version of each operator, importers
normalise older forms. Subgraphs (If, Loop, Scan) are attributes of type :class:`Graph` and may read outer Values directly.

**Dimensions that only the data decides.** Two ways, both used from ``Op.infer``:

* :func:`new_dim` gives an operator whose *own output* has an extent that its kernel finds out (NonZero, Unique, Compress) a
  symbol; ``Op.compute`` returns a ``Kernel`` whose ``symbols`` say which buffer element holds its value. ``infer`` may run
  many times: the symbol depends on the node's output name only, and ``compute`` finds it in ``node.outputs[k].shape``.
* :func:`content_or_symbols` gives an operator that needs the *values* of a small integer input (Reshape, Slice, Expand, Tile,
  Pad, Range ...) its elements as index expressions: constants, symbolic shape arithmetic, or, when nothing is known before
  run time, symbols that the program reads from the tensor before it runs the node.

Value names are unique in a graph and its subgraphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, from_numpy
from luthier.ir.errors import ShapeError
from luthier.ir.expr import Expr, as_expr, free_vars, var
from luthier.ir.requirements import Requirement, Within

MAX_CONTENT = 64


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape; each dimension an index expression (a constant, a symbol, or arithmetic on symbols)."""

    dtype: DType
    shape: tuple[Expr, ...]

    @staticmethod
    def of(dtype: DType, shape: Iterable[Any]) -> TensorType:
        return TensorType(dtype, tuple(as_expr(s) for s in shape))

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def static_shape(self) -> tuple[int, ...] | None:
        """The shape as integers, or None when a dimension is symbolic."""
        return tuple(s.attr for s in self.shape) if all(s.op == "const" for s in self.shape) else None

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(repr, self.shape))}]"


class Value:
    """One tensor. Compared by identity. ``data``: contents when constant; ``content``: elements as Exprs when known symbolically.

    ``bound``: the content consists of symbols that the program loads from this tensor at run time (see ``content_or_symbols``).
    ``limits``: least and greatest element of positions counted by the model itself (Range), both taken on wherever there are elements."""

    __slots__ = ("name", "type", "data", "_content", "bound", "limits")

    def __init__(self, name: str, type: TensorType, data: np.ndarray[Any, Any] | None = None, content: tuple[Expr, ...] | None = None) -> None:
        self.name, self.type, self.data, self._content, self.bound = name, type, data, content, False
        self.limits: tuple[Expr, Expr] | None = None

    @staticmethod
    def const(name: str, data: np.ndarray[Any, Any]) -> Value:
        data = np.asarray(data)
        return Value(name, TensorType.of(from_numpy(data.dtype), data.shape), data)

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def shape(self) -> tuple[Expr, ...]:
        return self.type.shape

    @property
    def rank(self) -> int:
        return len(self.type.shape)

    @property
    def content(self) -> tuple[Expr, ...] | None:
        """Elements in row-major order as index expressions (integer and bool tensors of at most 64 elements), if known."""
        if self._content is None and self.data is not None and self.data.dtype.kind in "iub" and self.data.size <= MAX_CONTENT:
            self._content = tuple(as_expr(int(x)) for x in self.data.reshape(-1))
        return self._content

    @content.setter
    def content(self, c: tuple[Expr, ...] | None) -> None:
        self._content = c

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(eq=False, slots=True)
class Node:
    """One operator application. ``inputs``: None marks an omitted optional input. ``source``: where it came from in the model."""

    op: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    source: str = ""

    def input(self, i: int) -> Value | None:
        return self.inputs[i] if i < len(self.inputs) else None

    def __str__(self) -> str:
        outs = ", ".join(map(repr, self.outputs))
        ins = ", ".join("_" if v is None else f"%{v.name}" for v in self.inputs)
        at = ", ".join(f"{k}={'{...}' if isinstance(v, Graph) else v}" for k, v in sorted(self.attrs.items()))
        return f"{outs} = {self.op}({ins}){' {' + at + '}' if at else ''}"


@dataclass(frozen=True, slots=True)
class Structured:
    """An input or output that is a sequence, or a ``tensor`` whose rank only the run knows. ``ports``: the tensors that it is: all elements,
    flat; a row of extents for each of them, -1 behind the last; for an optional whether there is one."""

    ports: tuple[str, ...]
    tensor: bool


@dataclass(eq=False, slots=True)
class Graph:
    """``nodes`` in topological order. ``aliases``: {output name: input name} for state that may be updated in place.

    ``output_names``: what callers call the outputs, in order (default: the values' own names). An output may be any value: an
    input, a constant, or the same value twice. ``requirements``: what type inference assumed about extents, checked by every run; ``within``: of elements of
    inputs, checked before it.
    ``defaults``: {name of an input that a call may leave out: the array it is then, or None for random bits that every call draws};
    those inputs come last. ``structured_inputs``, ``structured_outputs``: those that callers give or get as something else than one
    tensor."""

    name: str
    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]
    aliases: dict[str, str] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()
    requirements: list[Requirement] = field(default_factory=list)
    defaults: dict[str, np.ndarray[Any, Any] | None] = field(default_factory=dict)
    structured_inputs: dict[str, Structured] = field(default_factory=dict)
    structured_outputs: dict[str, Structured] = field(default_factory=dict)
    within: list[Within] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"graph {self.name}({', '.join(map(repr, self.inputs))}) -> ({', '.join('%' + v.name for v in self.outputs)}):"]
        return "\n".join(lines + [f"  {n}" for n in self.nodes]) + "\n"

    def results(self) -> list[tuple[str, Value]]:
        """(name for callers, value) of the outputs in order."""
        return list(zip(self.output_names or tuple(v.name for v in self.outputs), self.outputs, strict=True))

    def producers(self) -> dict[Value, Node]:
        return {v: n for n in self.nodes for v in n.outputs}

    def users(self) -> dict[Value, list[Node]]:
        """Every use, subgraphs included (a node whose subgraph reads a value is a user of it)."""
        out: dict[Value, list[Node]] = {}
        for n in self.nodes:
            for v in set(node_reads(n)):
                out.setdefault(v, []).append(n)
        return out


def subgraphs(n: Node) -> Iterator[Graph]:
    for a in n.attrs.values():
        if isinstance(a, Graph):
            yield a


def node_reads(n: Node) -> list[Value]:
    """Values read by a node, including those its subgraphs capture from outside."""
    out = [v for v in n.inputs if v is not None]
    for g in subgraphs(n):
        inner = set(g.inputs) | {v for m in g.nodes for v in m.outputs}
        reads = [v for m in g.nodes for v in node_reads(m)] + g.outputs
        out += [v for v in reads if v not in inner]
    return out


def new_dim(node: Node, key: str = "n", hi: Expr | int | None = None) -> Expr:
    """The symbol (at least 0, at most ``hi``) for an extent that the kernel of ``node`` decides.

    The same node and key always give the same symbol. Raises nothing."""
    return var(f"{node.outputs[0].name}.{key}", lo=0, hi=hi)


def content_or_symbols(node: Node, i: int) -> tuple[Expr, ...]:
    """The elements of integer input ``i`` in row-major order as index expressions, always.

    Known contents (constants, symbolic shape arithmetic) come as they are. Otherwise every element becomes a symbol without
    bounds, the input is marked ``bound``, and the program loads the symbols from the tensor before the node's kernels run; the
    number of elements must then be a constant of at most 64.

    Raises ShapeError when the number of elements itself is unknown or too large."""
    v = node.input(i)
    if v is None:
        raise ShapeError(f"input {i} is needed", node=node.name, op=node.op)
    if v.content is not None:
        return v.content
    n = 1
    for s in v.shape:
        if s.op != "const":
            raise ShapeError(
                f"the length of input {i} ({v.name}) must be known to infer shapes", node=node.name, op=node.op,
                shapes={v.name: v.shape}, hint="pin the dimensions with shapes= or --shape",
            )
        n *= s.attr
    if v.data is not None:
        return tuple(as_expr(int(x)) for x in v.data.reshape(-1))
    if n > MAX_CONTENT:
        raise ShapeError(f"input {i} ({v.name}) has {n} elements; at most {MAX_CONTENT} can decide a shape", node=node.name, op=node.op)
    v.content = tuple(var(f"{v.name}.{k}", lo=None) for k in range(n))
    v.bound = True
    return v.content


def type_symbols(t: TensorType) -> set[Expr]:
    """Symbols that a shape depends on."""
    return set().union(*(free_vars(s) for s in t.shape)) if t.shape else set()


def all_nodes(g: Graph) -> Iterator[Node]:
    """Every node, subgraphs included, outer first."""
    for n in g.nodes:
        yield n
        for sub in subgraphs(n):
            yield from all_nodes(sub)
