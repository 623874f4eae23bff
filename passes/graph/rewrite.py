"""The frame of the graph passes: nodes are visited once in order, a rule replaces a node by others.

A rule is ``rule(node, context) -> Replacement | None``. It looks backwards through ``context.producer``; what it leaves
without a reader is removed by ``eliminate_dead``. Linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from luthier.ir.builder import Names, make_node
from luthier.ir.graph import Graph, Node, Value, subgraphs


class Context:
    """What a rule may ask and do while a graph is rewritten."""

    def __init__(self, graph: Graph, names: Names, outer: Context | None = None) -> None:
        self.graph, self.names, self.outer = graph, names, outer
        self.producers: dict[Value, Node] = {} if outer is None else dict(outer.producers)
        self.uses: dict[Value, int] = {} if outer is None else outer.uses
        if outer is None:
            count_uses(graph, self.uses)
        self.new: list[Node] = []

    def producer(self, v: Value | None, *ops: str) -> Node | None:
        """The node that makes ``v``, when it is one of ``ops`` (any operator without them)."""
        n = None if v is None else self.producers.get(v)
        return n if n is not None and (not ops or n.op in ops) else None

    def single(self, v: Value | None, *ops: str) -> Node | None:
        """Like ``producer``, but only when nothing else reads ``v``."""
        n = self.producer(v, *ops)
        return n if n is not None and v is not None and self.uses.get(v, 0) == 1 else None

    def make(self, op: str, inputs: Iterable[Value | None], attrs: dict[str, Any] | None = None, like: Node | None = None, outputs: int = 1) -> Value:
        """Add a node before the current one; its first output. ``like``: the node whose place in the model it takes."""
        n = make_node(op, list(inputs), attrs, names=self.names, name="" if like is None else like.name, outputs=outputs, source="" if like is None else like.source)
        self.add(n)
        return n.outputs[0]

    def const(self, name: str, data: Any) -> Value:
        return Value.const(self.names.fresh(name), data)

    def add(self, n: Node) -> None:
        self.new.append(n)
        for v in n.outputs:
            self.producers[v] = n
        for w in n.inputs:
            if w is not None:
                self.uses[w] = self.uses.get(w, 0) + 1


def count_uses(graph: Graph, uses: dict[Value, int]) -> None:
    for n in graph.nodes:
        for v in n.inputs:
            if v is not None:
                uses[v] = uses.get(v, 0) + 1
        for g in subgraphs(n):
            count_uses(g, uses)
    for v in graph.outputs:
        uses[v] = uses.get(v, 0) + 1


Rule = Callable[[Node, Context], "list[Value] | Value | None"]


def rewrite_graph(graph: Graph, rule: Rule, names: Names | None = None, _outer: Context | None = None, _replaced: dict[Value, Value] | None = None) -> bool:
    """Apply ``rule`` to every node, in place. The rule returns None (keep the node) or the values that replace its outputs,
    made with ``context.make``. True when something changed."""
    names = names or Names(graph)
    ctx = Context(graph, names, _outer)
    replaced: dict[Value, Value] = {} if _replaced is None else _replaced
    changed = False

    def now(v: Value | None) -> Value | None:
        while v in replaced:
            v = replaced[v]
        return v

    for n in graph.nodes:
        if any(v in replaced for v in n.inputs):
            n.inputs = tuple(now(v) for v in n.inputs)
        for g in list(n.attrs.values()):
            if isinstance(g, Graph):
                changed |= rewrite_graph(g, rule, names, ctx, replaced)
        for v in n.outputs:
            ctx.producers[v] = n
        out = rule(n, ctx)
        values = [] if out is None else [out] if isinstance(out, Value) else list(out)
        if out is None or not all(_takes_over(old, new) for old, new in zip(n.outputs, values, strict=False)):
            ctx.new.append(n)
            continue
        changed = True
        for old, new in zip(n.outputs, values, strict=False):
            if old is new:
                continue
            replaced[old] = new
            ctx.uses[new] = ctx.uses.get(new, 0) + ctx.uses.get(old, 0)
    graph.nodes = ctx.new
    if changed or replaced:
        graph.outputs = [_require(now(v)) for v in graph.outputs]
    return changed


def _takes_over(old: Value, new: Value) -> bool:
    """Symbols that the program reads from ``old`` are read from ``new`` from now on; False when ``new`` has contents of its own."""
    if old is new or not old.bound:
        return True
    if new.data is not None or new.content is not None:
        return False
    new.content, new.bound = old.content, True
    return True


def _require(v: Value | None) -> Value:
    assert v is not None
    return v
