"""densify_sparse: a group-sparse product that keeps too much is computed as a dense one.

Before: ``y = luthier::SparseMatMul(x, row_ptr, cols, values, ..)`` with 90 % of its blocks. After: ``y = luthier::GroupedMatMul(x, bits, scales, ..)`` whose
groups are the blocks, dropped ones with scale 0. The dense kernels round activations to 8 bits in groups, so this is done only where the
operator allows it (attribute ``dense_act``), and where the density is above the one at which both kernels measured the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.builder import Names, infer_node
from luthier.ir.graph import Graph, Node, Value
from luthier.ir.ops.lowbit import pack_bits, unpack_bits

__all__ = ["dense_form", "densify_sparse"]

Array = np.ndarray[Any, Any]

# (bits, block): kept weights a second over weights a second of the dense kernel of that width, one thread, from memory, 4096 x 4096 on Zen 3
# (benchmarks/results/sparse_zen3.md). A density above it is faster dense. Blocks of 8 have no dense kernel.
MEASURED = {(4, 16): 0.61, (4, 32): 0.68, (8, 16): 0.82}


def densify_sparse(graph: Graph) -> bool:
    """In place; True when something changed."""
    names: Names | None = None
    nodes: list[Node] = []
    for n in graph.nodes:
        if n.op == "luthier::SparseMatMul" and _faster_dense(n):
            names = names or Names(graph)
            n = _dense(n, names)
        nodes.append(n)
    graph.nodes = nodes
    return names is not None


def _faster_dense(n: Node) -> bool:
    a, ptr, cols = n.attrs, n.input(1), n.input(2)
    act, k = int(a.get("dense_act", 0)), int(a["K"])
    limit = MEASURED.get((int(a["bits"]), int(a["block"])))
    if not act or limit is None or k % act or k % int(a["block"]) or ptr is None or cols is None or cols.data is None or ptr.data is None:
        return False
    return bool(len(cols.data) > limit * (len(ptr.data) - 1) * (k // int(a["block"])))


def dense_form(n: Node) -> tuple[Array, Array, Array | None]:
    """(codes u8 [rows, K], scales [rows, blocks], zero points u8 [rows, blocks] or None where attribute ``zero`` holds for all) of a
    ``luthier::SparseMatMul``: dropped blocks have the code of zero and scale 0."""
    ptr, cols, values, scales = (v.data for v in n.inputs[1:5] if v is not None)
    assert ptr is not None and cols is not None and values is not None and scales is not None
    k, block, bits, zero = (int(n.attrs[name]) for name in ("K", "block", "bits", "zero"))
    rows, count = len(ptr) - 1, -(-k // block)
    at = np.repeat(np.arange(rows), np.diff(ptr)), cols
    q = np.full((rows, count, block), zero, np.uint8)
    q[at] = unpack_bits(values, bits)
    s = np.zeros((rows, count), scales.dtype)
    s[at] = scales
    zeros = n.input(5)
    if zeros is None:
        return q.reshape(rows, -1)[:, :k], s, None
    assert zeros.data is not None
    z = np.full((rows, count), zero, np.uint8)
    z[at] = zeros.data
    return q.reshape(rows, -1)[:, :k], s, z


def _dense(n: Node, names: Names) -> Node:
    codes, scales, zeros = dense_form(n)
    k, block, bits = (int(n.attrs[name]) for name in ("K", "block", "bits"))

    def const(part: str, data: Array) -> Value:
        return Value.const(names.fresh(f"{n.name}.{part}"), data)

    ins: list[Value | None] = [n.inputs[0], const("bits", pack_bits(codes, bits)), const("scale", scales)]
    bias = n.input(6)
    attrs = {"K": k, "bits": bits, "group": block, "act_group": int(n.attrs["dense_act"])}
    if zeros is None:
        attrs["zero"] = int(n.attrs["zero"])
    else:
        ins.append(const("zero", zeros))
    if bias is not None:
        ins += [None] * (4 - len(ins)) + [bias]
    return infer_node(Node("luthier::GroupedMatMul", tuple(ins), n.outputs, attrs, n.name, n.source))
