"""Graphs written by hand: a few lines for each operator, types inferred as they are made. Importers of weight files use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.builder import Names, make_node
from luthier.ir.dtypes import DType
from luthier.ir.graph import Graph, Node, TensorType, Value


class GraphBuilder:
    """Nodes in order; :meth:`graph` closes it. Shapes may hold symbols (:func:`luthier.ir.expr.var`)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.names = Names()
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self.outputs: list[tuple[str, Value]] = []
        self.aliases: dict[str, str] = {}

    def input(self, name: str, dtype: DType, shape: Sequence[Any]) -> Value:
        v = Value(self.names.fresh(name), TensorType.of(dtype, shape))
        self.inputs.append(v)
        return v

    def const(self, name: str, data: Any) -> Value:
        return Value.const(self.names.fresh(name), np.asarray(data))

    def ints(self, *values: int) -> Value:
        return self.const("ints", np.array(values, np.int64))

    def op(self, op: str, *inputs: Value | None, name: str = "", **attrs: Any) -> Value:
        """One node with one output. Raises the operator's own errors."""
        return self.ops(op, 1, *inputs, name=name, **attrs)[0]

    def ops(self, op: str, outputs: int, *inputs: Value | None, name: str = "", **attrs: Any) -> tuple[Value, ...]:
        n = make_node(op, list(inputs), attrs, names=self.names, name=name, outputs=outputs)
        self.nodes.append(n)
        return n.outputs

    def output(self, name: str, v: Value, alias: str | None = None) -> None:
        """``alias``: the input whose memory the output updates."""
        self.outputs.append((name, v))
        if alias is not None:
            self.aliases[name] = alias

    def graph(self) -> Graph:
        return Graph(self.name, self.inputs, [v for _, v in self.outputs], self.nodes, self.aliases, tuple(n for n, _ in self.outputs))
