"""Products of one tensor with several constant matrices as one product (horizontal fusion).

Before: ``q = Add(MatMul(x, Wq), bq); k = Add(MatMul(x, Wk), bk); v = MatMul(x, Wv)``.
After: ``t = Add(MatMul(x, [Wq Wk Wv]), [bq bk 0]); q = Slice(t); k = Slice(t); v = Slice(t)``: x is read once, one kernel is launched, and
the slices become indices of whatever reads them.

Only results that are moved (transposed, reshaped on the way to an attention) or reduced next take part: an elementwise reader would have
joined its product's kernel, a graph output or a concatenation would need a copy of the slice. Whether it pays is the
target's word (``Capabilities.merge_siblings``): rows of the merged tensor are further apart.
"""

from __future__ import annotations

import numpy as np

from luthier.ir.builder import Names, infer_node
from luthier.ir.graph import Graph, Node, TensorType, Value, node_reads, subgraphs
from luthier.passes.program.fuse_operators import ALONE, CONTRACTION, INJECTIVE, NO_PROLOGUE, REDUCTION, VIEW, kind_of

__all__ = ["merge_siblings"]


def merge_siblings(graph: Graph) -> bool:
    """In place; True when something was merged."""
    names = Names(graph)
    return _merge_in(graph, names)


def _merge_in(graph: Graph, names: Names) -> bool:
    changed = False
    readers: dict[Value, list[Node]] = {}
    for n in graph.nodes:
        for v in node_reads(n):
            readers.setdefault(v, []).append(n)
        for g in subgraphs(n):
            changed |= _merge_in(g, names)
    kept = set(graph.outputs)
    families: dict[tuple[Value, object], list[tuple[Node, Node | None]]] = {}
    for n in graph.nodes:
        x, w = (n.inputs[0], n.inputs[1]) if n.op == "MatMul" else (None, None)
        if x is None or w is None or w.data is None or w.rank != 2 or x.data is not None or x.rank < 2 or not w.dtype.is_float:
            continue
        bias = _bias(n, readers, kept)
        y = (bias or n).outputs[0]
        if y not in kept and _moved(y, readers, kept):
            families.setdefault((x, w.dtype), []).append((n, bias))
    gone: set[Node] = set()
    before: dict[Node, list[Node]] = {}
    for (x, _), family in families.items():
        if len(family) > 1:
            before[family[0][0]] = _merged(x, family, names)
            gone |= {m for pair in family for m in pair if m is not None}
    if not before:
        return changed
    graph.nodes = [m for n in graph.nodes for m in (*before.get(n, ()), n) if m not in gone]
    return True


def _bias(n: Node, readers: dict[Value, list[Node]], kept: set[Value]) -> Node | None:
    """The addition of a constant vector that is the only reader of a product."""
    y = n.outputs[0]
    nexts = readers.get(y, [])
    if len(nexts) != 1 or y in kept or nexts[0].op != "Add":
        return None
    other = next((v for v in nexts[0].inputs if v is not y), None)
    size = y.shape[-1]
    fits = other is not None and other.data is not None and size.op == "const" and other.data.size == size.attr and other.data.shape[-1:] == (size.attr,)
    return nexts[0] if fits and nexts[0].outputs[0].shape == y.shape else None


def _moved(y: Value, readers: dict[Value, list[Node]], kept: set[Value]) -> bool:
    """The only reader of ``y``, past views, can take a slice as part of its indices and is no epilogue of the product."""
    while True:
        nexts = readers.get(y, [])
        if len(nexts) != 1 or y in kept or any(True for _ in subgraphs(nexts[0])):
            return False
        n = nexts[0]
        kind = kind_of(n)
        if kind != VIEW:
            return kind in (INJECTIVE, CONTRACTION, REDUCTION) and n.op not in ALONE and n.op not in NO_PROLOGUE
        if n.inputs[0] is not y:
            return False
        y = n.outputs[0]


def _merged(x: Value, family: list[tuple[Node, Node | None]], names: Names) -> list[Node]:
    first = family[0][0]
    weights, biases = [], []
    for n, b in family:
        w = n.inputs[1]
        assert w is not None and w.data is not None
        weights.append(w.data)
        other = None if b is None else next(v for v in b.inputs if v is not n.outputs[0])
        biases.append(np.zeros(w.data.shape[1], w.data.dtype) if other is None or other.data is None else other.data.reshape(-1))
    matrix = Value.const(names.fresh(f"{first.name}.siblings"), np.concatenate(weights, axis=1))
    out = [_node("MatMul", [x, matrix], first, names)]
    if any(b is not None for _, b in family):
        out.append(_node("Add", [out[0].outputs[0], Value.const(names.fresh(f"{first.name}.biases"), np.concatenate(biases))], first, names))
    whole = out[-1].outputs[0]
    start = 0
    for (n, b), w in zip(family, weights, strict=True):
        bounds = [Value.const(names.fresh(f"{n.name}.{k}"), np.array([v], np.int64)) for k, v in (("start", start), ("end", start + w.shape[1]), ("axis", whole.rank - 1))]
        out.append(infer_node(Node("Slice", (whole, *bounds), (b or n).outputs, {}, n.name, n.source)))
        start += w.shape[1]
    return out


def _node(op: str, inputs: list[Value], like: Node, names: Names) -> Node:
    y = Value(names.fresh(f"{like.outputs[0].name}.merged"), TensorType(inputs[0].dtype, ()))
    return infer_node(Node(op, tuple(inputs), (y,), {}, like.name, like.source))
