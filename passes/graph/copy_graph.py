"""copy_graph: a graph that can be changed without changing the one it came from.

Before: ``g``. After: ``g`` and an equal graph whose Values, Nodes and subgraphs are its own. Contents of constants are shared (passes
replace them, they never write into them), names and symbols are the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luthier.ir.graph import Graph, Node, Value

__all__ = ["copy_graph"]


def copy_graph(graph: Graph) -> tuple[Graph, dict[Value, Value]]:
    """The copy, and {value: its copy} for every value that the graph or a subgraph of it mentions. Raises nothing."""
    made: dict[Value, Value] = {}
    return _graph(graph, made), made


def _value(v: Value, made: dict[Value, Value]) -> Value:
    new = made.get(v)
    if new is None:
        new = made[v] = Value(v.name, v.type, v.data)
        new.bound, new.limits = v.bound, v.limits
        if v._content is not None:
            new.content = v._content
    return new


def _graph(graph: Graph, made: dict[Value, Value]) -> Graph:
    inputs = [_value(v, made) for v in graph.inputs]
    nodes = [_node(n, made) for n in graph.nodes]
    outputs = [_value(v, made) for v in graph.outputs]
    return replace(graph, inputs=inputs, outputs=outputs, nodes=nodes, aliases=dict(graph.aliases), requirements=list(graph.requirements), within=list(graph.within), defaults=dict(graph.defaults))


def _node(n: Node, made: dict[Value, Value]) -> Node:
    attrs: dict[str, Any] = {k: _graph(a, made) if isinstance(a, Graph) else a for k, a in n.attrs.items()}
    inputs = tuple(None if v is None else _value(v, made) for v in n.inputs)
    return Node(n.op, inputs, tuple(_value(v, made) for v in n.outputs), attrs, n.name, n.source)
