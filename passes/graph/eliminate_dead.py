"""Remove nodes whose outputs nobody reads.

Before: ``a = Relu(x); b = Exp(x); return b``. After: ``b = Exp(x); return b``. A value whose elements decide shapes (``bound``)
stays as long as one of its symbols is used.
"""

from __future__ import annotations

from luthier.ir.expr import Expr, free_vars
from luthier.ir.graph import Graph, Value, node_reads, subgraphs


def eliminate_dead(graph: Graph) -> bool:
    """In place, subgraphs included; True when a node was removed."""
    symbols = used_symbols(graph)
    return _sweep(graph, symbols)


def used_symbols(graph: Graph) -> set[Expr]:
    """Symbols in the shapes and known contents of the graph's values, and in attributes."""
    out: set[Expr] = set()
    for n in graph.nodes:
        for v in n.outputs:
            for s in v.shape:
                out |= free_vars(s)
            if v.content is not None and not v.bound:
                for s in v.content:
                    out |= free_vars(s)
        for a in n.attrs.values():
            if isinstance(a, Expr):
                out |= free_vars(a)
        for g in subgraphs(n):
            out |= used_symbols(g)
    return out


def _sweep(graph: Graph, symbols: set[Expr]) -> bool:
    live: set[Value] = set(graph.outputs)
    kept = []
    changed = False
    for n in reversed(graph.nodes):
        if not any(v in live or (v.bound and v.content and symbols & set(v.content)) for v in n.outputs):
            changed = True
            continue
        for g in subgraphs(n):
            changed |= _sweep(g, symbols)
        live.update(node_reads(n))
        kept.append(n)
    graph.nodes = kept[::-1]
    return changed
