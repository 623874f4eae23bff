"""Rules that every graph keeps, checked after each pass when LUTHIER_DEBUG is set."""

from __future__ import annotations

from luthier.ir.errors import VerificationError
from luthier.ir.graph import Graph, Value, subgraphs
from luthier.ir.op import lookup


def verify_graph(graph: Graph, outer: frozenset[Value] | None = None) -> None:
    """Raises VerificationError when a value is read before it is made or made twice, when a name stands for two values, when an
    operator is unknown, or when inference gives a node other output types than it carries."""
    known: set[Value] = set(outer or ())
    names = {v.name: v for v in known}

    def define(v: Value, where: str) -> None:
        if v in known:
            raise VerificationError(f"value {v.name!r} is made twice", node=where)
        if names.setdefault(v.name, v) is not v:
            raise VerificationError(f"two values are called {v.name!r}", node=where)
        known.add(v)

    for v in graph.inputs:
        define(v, graph.name)
    for n in graph.nodes:
        for u in n.inputs:
            if u is not None and u.data is None and u not in known:
                raise VerificationError(f"value {u.name!r} is read before it is made", node=n.name, op=n.op)
        o = lookup(n.op)
        if o is None:
            raise VerificationError(f"operator {n.op} is not registered", node=n.name, op=n.op)
        for g in subgraphs(n):
            verify_graph(g, frozenset(known))
        for v, t in zip(n.outputs, o.infer(n), strict=False):
            if t.dtype is not v.dtype or t.rank != v.rank:
                raise VerificationError(f"output {v.name!r} is {v.type}, inference says {t}", node=n.name, op=n.op)
            if t.static_shape is not None and v.type.static_shape is not None and t.static_shape != v.type.static_shape:
                raise VerificationError(f"output {v.name!r} has shape {list(v.type.static_shape)}, inference says {list(t.static_shape)}", node=n.name, op=n.op)
        for v in n.outputs:
            define(v, n.name)
    for v in graph.outputs:
        if v.data is None and v not in known:
            raise VerificationError(f"output {v.name!r} is never made", node=graph.name)
