"""Making nodes: outputs named, types inferred, small integer contents propagated."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from luthier.ir.dtypes import f32
from luthier.ir.errors import LuthierError, ShapeError, UnsupportedOperator
from luthier.ir.expr import tree_size
from luthier.ir.graph import MAX_CONTENT, Graph, Node, TensorType, Value, all_nodes
from luthier.ir.op import Op, lookup

MAX_TREE = 5000  # nodes of the expressions of a content; longer arithmetic is done by the run, as on any other tensor
MAX_ELEMENTS = 1 << 47  # of a tensor
_UNKNOWN = TensorType(f32, ())


class Names:
    """Unique value names of one graph."""

    def __init__(self, graph: Graph | None = None) -> None:
        self.used: set[str] = set()
        self.counter: dict[str, int] = {}
        if graph is not None:
            self.reserve(graph)

    def reserve(self, graph: Graph) -> None:
        self.used |= {v.name for v in graph.inputs}
        for n in all_nodes(graph):
            self.used |= {v.name for v in n.inputs if v is not None} | {v.name for v in n.outputs}
            for a in n.attrs.values():
                if isinstance(a, Graph):
                    self.used |= {v.name for v in a.inputs}

    def fresh(self, base: str) -> str:
        """``base`` itself when it is free, else ``base`` with a number."""
        name = base
        while name in self.used:
            k = self.counter[base] = self.counter.get(base, 0) + 1
            name = f"{base}.{k}"
        self.used.add(name)
        return name


def operator(node: Node) -> Op:
    """The registered operator of a node. Raises UnsupportedOperator."""
    o = lookup(node.op)
    if o is None:
        raise UnsupportedOperator(f"operator {node.op} is not implemented", node=node.name, op=node.op)
    return o


def infer_node(node: Node) -> Node:
    """Set the types (and contents, where known) of ``node.outputs``. Returns the node.

    Raises the operator's ShapeError, TypeMismatch or UnsupportedOperator with node, operator and input shapes filled in."""
    o = operator(node)
    try:
        types = o.infer(node)
        for v, t in zip(node.outputs, types, strict=False):
            v.type = t
            if (n := prod(s.attr if s.op == "const" else 1 for s in t.shape)) > MAX_ELEMENTS:
                raise ShapeError(f"a tensor of {n} elements or more", hint="nothing holds so many: look at the extents that its shape is computed from")
        contents = o.content(node)
        node.outputs[0].limits = o.limits(node)
    except LuthierError as e:
        shapes = {v.name: tuple(v.shape) for v in node.inputs if v is not None}
        raise e.at(node=node.name, op=node.op, shapes=shapes) from None
    if contents is not None:
        for v, c in zip(node.outputs, contents, strict=False):
            if c is not None and len(c) <= MAX_CONTENT and not v.bound and sum(map(tree_size, c)) <= MAX_TREE:
                v.content = tuple(c)
    return node


def make_node(
    op: str, inputs: Sequence[Value | None], attrs: dict[str, Any] | None = None, *, names: Names, name: str = "",
    outputs: Sequence[str] | int = 1, source: str = "",
) -> Node:
    """A new node with inferred outputs. ``outputs``: how many, or their names (made unique)."""
    base = name or op.split("::")[-1].lower()
    outs = [base if outputs == 1 else f"{base}.{k}" for k in range(outputs)] if isinstance(outputs, int) else list(outputs)
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    values = tuple(Value(names.fresh(o), _UNKNOWN) for o in outs)
    return infer_node(Node(op, tuple(inputs), values, dict(attrs or {}), name or values[0].name, source))
