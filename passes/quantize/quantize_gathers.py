"""quantize_gathers: tables whose rows are picked (embeddings) are stored as bytes, with one scale a row.

Before: ``y = Gather(const f32 [V, D], i)``. After: ``y = Mul(Cast(Gather(const i8 [V, D], i)), Gather(const scales [V, 1], i))``: only the rows
that are picked are converted, and every runtime can run it. The scales keep the type of the table.
"""

from __future__ import annotations

import numpy as np

from luthier.ir.builder import Names, infer_node
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.ops.common import Array

__all__ = ["byte_rows", "quantize_gathers", "tables"]
_CODES = {"f32": 1, "f16": 10, "bf16": 16}


def tables(graph: Graph, least: int = 1 << 18) -> list[Node]:
    """Gather nodes along the first axis of a constant float matrix of at least so many elements that nothing else reads."""
    users = graph.users()
    found = []
    for n in graph.nodes:
        t = n.inputs[0] if n.op == "Gather" and n.inputs else None
        if t is None or t.data is None or t.rank != 2 or t.dtype.name not in _CODES or t.data.size < least or int(n.attrs.get("axis", 0)) not in (0, -2):
            continue
        if all(u.op == "Gather" for u in users[t]) and t not in graph.outputs:
            found.append(n)
    return found


def byte_rows(table: Array) -> tuple[Array, Array]:
    """(i8 [V, D], scales [V, 1] in the table's type): every row's largest magnitude is 127."""
    w = np.asarray(table, np.float32)
    top = np.abs(w).max(1, keepdims=True)
    scale = np.where(top > 0, top / 127, 1).astype(table.dtype)
    codes = np.clip(np.rint(w / np.where(scale > 0, scale, 1).astype(np.float32)), -127, 127)
    return codes.astype(np.int8), scale


def quantize_gathers(graph: Graph, chosen: list[Node]) -> bool:
    """In place; True when something changed. ``chosen``: of :func:`tables`."""
    if not chosen:
        return False
    names = Names(graph)
    shared: dict[Value, tuple[Value, Value]] = {}
    nodes: list[Node] = []
    for n in graph.nodes:
        if n not in chosen:
            nodes.append(n)
            continue
        table, out = n.inputs[0], n.outputs[0]
        assert table is not None and table.data is not None
        if table not in shared:
            codes, scale = byte_rows(table.data)
            shared[table] = (Value.const(names.fresh(f"{table.name}.i8"), codes), Value.const(names.fresh(f"{table.name}.scale"), scale))

        def value(part: str, like: TensorType = out.type, name: str = out.name) -> Value:
            return Value(names.fresh(f"{name}.{part}"), like)

        codes_v, scale_v = shared[table]
        picked, wide, scales = value("i8"), value("wide"), value("scale")
        nodes += [
            infer_node(Node("Gather", (codes_v, n.inputs[1]), (picked,), {"axis": 0}, n.name, n.source)),
            infer_node(Node("Cast", (picked,), (wide,), {"to": _CODES[table.dtype.name]}, f"{n.name}.cast", n.source)),
            infer_node(Node("Gather", (scale_v, n.inputs[1]), (scales,), {"axis": 0}, f"{n.name}.scale", n.source)),
            infer_node(Node("Mul", (wide, scales), (out,), {}, f"{n.name}.mul", n.source)),
        ]
    graph.nodes = nodes
    return True
