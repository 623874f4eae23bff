"""Partition a graph into groups; each group becomes one Compute.

Before: ``a = MatMul(x, w); b = Add(a, bias); c = Gelu(b)``. After: one group ``{MatMul, Add, Gelu}`` whose only output is ``c``.

The cost rule. Storing a tensor costs a write and a read of its bytes; recomputing it costs its arithmetic once per reader. So:

1. **Epilogue**: an elementwise node joins the group of an operand when that operand has no other reader and has the node's
   own shape (one iteration space): the value never leaves registers. A chain that forks and meets again (``x * sigmoid(x)``)
   joins as a whole, when every branch keeps that shape.
2. **Prologue**: a group that only moves elements (Transpose, Slice, Reshape in front of one) and has one reader dissolves into
   that reader's indices, unless the reader is a convolution (of more than a few channels) or an operator that is opaque. A group with arithmetic dissolves
   into an elementwise reader of the same shape, or into a reduction or a permutation, which read each element once; never into
   a contraction, which would repeat it.
3. A view (Reshape, Squeeze, Identity ...) alone is no group: it aliases its operand.
4. Values that decide shapes at run time, outputs of the graph and outputs of multi-output nodes are always stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.ir.graph import Graph, Node, Value, node_reads, subgraphs
from luthier.ir.op import lookup
from luthier.passes.graph.materialize_contents import CONTENT

MAX_NODES = 24
MAX_REGION = 12
FEW = 4  # channels of an image
CONTRACTION, REDUCTION, ELEMENTWISE, INJECTIVE, VIEW, OPAQUE = "contraction", "reduction", "elementwise", "injective", "view", "opaque"
_POINTWISE = (ELEMENTWISE,)
ALONE = frozenset({"Concat", "If", "Loop", "Scan", CONTENT, "Pad", "luthier::Require"})
ONCE = frozenset({"Transpose", "DepthToSpace", "SpaceToDepth"})  # move elements and read each once
NO_PROLOGUE = frozenset({"Conv", "ConvTranspose", "ConvInteger", "DeformConv", "Resize", "GridSample", "GatherElements", "Tile"})


@dataclass(eq=False, slots=True)
class Group:
    """``nodes`` in topological order; ``kind``: of the strongest member; ``root``: the node whose outputs leave the group."""

    nodes: list[Node]
    kind: str
    root: Node
    outputs: list[Value] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Names of the operators, for kernels and profiles."""
        ops = [n.op.split("::")[-1].lower() for n in self.nodes if kind_of(n) != VIEW] or ["copy"]
        return "_".join(ops[:4]) + (f"_{len(ops) - 4}" if len(ops) > 4 else "")


def _few_channels(n: Node) -> bool:
    """A channels-last convolution of an image with so few channels that their order does not matter to it: one element of the image
    at a time meets all output channels. A transposition of such images fills no lanes."""
    x = n.inputs[0] if n.op == "Conv" and n.attrs.get("layout") == "NHWC" else None
    return x is not None and x.shape[-1].op == "const" and x.shape[-1].attr <= FEW


def kind_of(n: Node) -> str:
    o = lookup(n.op)
    return o.kind if o is not None and not any(True for _ in subgraphs(n)) else OPAQUE


def fuse_operators(graph: Graph, keep: set[Value] | None = None) -> list[Group]:
    """Groups in an order of execution. ``keep``: further values that must be stored (read by enclosing graphs)."""
    return _Fuser(graph, keep or set()).run()


class _Fuser:
    def __init__(self, graph: Graph, keep: set[Value]) -> None:
        self.graph = graph
        self.keep = set(graph.outputs) | keep
        self.readers: dict[Value, list[Node]] = {}
        self.position: dict[Node, int] = {}
        for i, n in enumerate(graph.nodes):
            self.position[n] = i
            for v in dict.fromkeys(node_reads(n)):
                self.readers.setdefault(v, []).append(n)
            for g in subgraphs(n):
                self.keep.update(node_reads(n))
                self.keep.update(v for m in g.nodes for v in m.outputs)
        self.group: dict[Node, Group] = {}
        self.producer: dict[Value, Node] = {}

    def stored(self, v: Value) -> bool:
        return v in self.keep or v.bound

    def run(self) -> list[Group]:
        for n in self.graph.nodes:
            for v in n.outputs:
                self.producer[v] = n
            if n in self.group:
                continue
            kind = kind_of(n)
            g = self.group[n] = Group([n], kind, n)
            if n.op in ALONE or kind == VIEW and not self._inside_chain(n):
                continue
            if kind == ELEMENTWISE:
                g = self._epilogue(n, g)
            self._prologue(n, g)
            self._region(n)
        groups = list(dict.fromkeys(self.group[n] for n in self.graph.nodes))
        for g in groups:
            g.nodes.sort(key=self.position.__getitem__)
            inside = set(g.nodes)
            g.outputs = [v for n in g.nodes for v in n.outputs if self.stored(v) or any(r not in inside for r in self.readers.get(v, ()))]
            if not g.outputs:
                g.outputs = [g.nodes[-1].outputs[0]]
        return sorted(groups, key=lambda g: self.position[g.nodes[-1]])

    def _inside_chain(self, n: Node) -> bool:
        """A view between an injective producer and its only reader takes part in index arithmetic."""
        v = n.inputs[0]
        p = self.producer.get(v) if v is not None else None
        return p is not None and kind_of(p) == INJECTIVE and p.op not in ALONE and self._only(v, n)

    def _only(self, v: Value | None, n: Node) -> bool:
        return v is not None and not self.stored(v) and all(r is n for r in self.readers.get(v, ()))

    # ---------------------------------------------------------------- rule 1

    def _epilogue(self, n: Node, g: Group) -> Group:
        best: Group | None = None
        rank = {CONTRACTION: 3, REDUCTION: 2, ELEMENTWISE: 1, INJECTIVE: 0}
        for v in n.inputs:
            p = self.producer.get(v) if v is not None else None
            if v is None or p is None or not self._only(v, n) or len(p.outputs) != 1 or v.shape != n.outputs[0].shape:
                continue
            q = self.group[p]
            if q.kind not in rank or p.op in ALONE or len(q.nodes) >= MAX_NODES or p is not q.root:
                continue
            if best is None or rank[q.kind] > rank[best.kind]:
                best = q
        return g if best is None else self._merge(best, g, n)

    def _merge(self, a: Group, b: Group, root: Node) -> Group:
        a.root = root
        if a is b:
            return a
        order = (OPAQUE, VIEW, INJECTIVE, ELEMENTWISE, REDUCTION, CONTRACTION)
        a.kind = max(a.kind, b.kind, key=order.index)
        a.nodes += b.nodes
        for m in b.nodes:
            self.group[m] = a
        return a

    def _region(self, n: Node) -> None:
        """A fork behind ``n`` whose branches are all elementwise of one shape and meet again joins n's group as a whole."""
        if len(n.outputs) != 1 or n.op in ALONE:
            return
        x = n.outputs[0]
        g = self.group[n]
        if self.stored(x) or len(self.readers.get(x, ())) < 2 or g.kind not in (CONTRACTION, REDUCTION, ELEMENTWISE, INJECTIVE):
            return
        open_: set[Value] = {x}
        region: list[Node] = []
        while True:
            pending = sorted({r for v in open_ for r in self.readers.get(v, ())} - set(region), key=self.position.__getitem__)
            if not pending:
                return
            m = pending[0]
            if kind_of(m) != ELEMENTWISE or len(m.outputs) != 1 or m.outputs[0].shape != x.shape or len(region) >= MAX_REGION:
                return
            region.append(m)
            members = set(region)
            open_ = {v for v in open_ | {m.outputs[0]} if any(r not in members for r in self.readers.get(v, ())) or self.stored(v)}
            if any(self.stored(v) for v in open_ if v is not m.outputs[0]):
                return
            if open_ <= {m.outputs[0]}:
                break
        for m in region:
            if m in self.group:
                return
        for m in region:
            self.group[m] = g
            g.nodes.append(m)
            for v in m.outputs:
                self.producer[v] = m
        g.root = region[-1]
        if g.kind == INJECTIVE:
            g.kind = ELEMENTWISE
        for m in region:
            self._prologue(m, g)

    # ---------------------------------------------------------------- rule 2

    def _prologue(self, n: Node, g: Group) -> None:
        kind = kind_of(n)
        few = _few_channels(n)
        if kind == OPAQUE or n.op in NO_PROLOGUE and not few or n.op in ALONE:
            return
        for v in n.inputs[:1] if few else n.inputs:
            p = self.producer.get(v) if v is not None else None
            if v is None or p is None or not self._only(v, n) or len(p.outputs) != 1:
                continue
            if kind == INJECTIVE and n.inputs.count(v) > 1:  # x[x]: data that are their own indices would be looked up twice as deep a step
                continue
            q = self.group[p]
            if q is g or p.op in ALONE or len(q.nodes) + len(g.nodes) > MAX_NODES or any(len(m.outputs) != 1 for m in q.nodes):
                continue
            moves = all(kind_of(m) in (INJECTIVE, VIEW) and m.op not in NO_PROLOGUE and m.op not in ALONE for m in q.nodes)
            if moves and not all(kind_of(m) == VIEW for m in q.nodes):
                self._merge(g, q, g.root)
            elif few:
                continue
            elif q.kind in (ELEMENTWISE, INJECTIVE) and not moves:
                if (kind == ELEMENTWISE and v.shape == n.outputs[0].shape) or kind == REDUCTION or n.op in ONCE:
                    self._merge(g, q, g.root)
