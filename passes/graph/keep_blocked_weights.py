"""keep_blocked_weights: weights that DequantizeLinear restores block by block stay in their bits.

Before: ``y = MatMul(x, DequantizeLinear(const i4 [K, N], scales [K / 32, N], zeros, axis=0, block_size=32))``, its transposed form
``MatMul(x, Transpose(DequantizeLinear(const i4 [N, K], .., axis=1)))``, or Gemm. After: ``y = luthier::GroupedMatMul(x, bits, scales,
zeros)``, which multiplies without a copy of the weights in floats. Blocks that do not divide K, that are shorter than the kernels'
groups, and scales that are 0 or no numbers stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.builder import Names
from luthier.ir.graph import Graph, Node, Value
from luthier.passes.quantize.quantize_products import product_node
from luthier.passes.quantize.quantize_weights import QuantizedWeight

__all__ = ["keep_blocked_weights"]

SHORTEST = 16  # columns of a group
_BITS = {"i4": 4, "u4": 4, "i2": 2, "u2": 2, "i8": 8, "u8": 8}


def keep_blocked_weights(graph: Graph) -> bool:
    """In place; True when something changed. Products of the main graph."""
    made_by = {v: n for n in graph.nodes if n.op in ("DequantizeLinear", "Transpose") for v in n.outputs}
    if not any(n.op == "DequantizeLinear" and int(n.attrs.get("block_size", 0)) for n in made_by.values()):
        return False
    found = {n: q for n in graph.nodes if n.op in ("MatMul", "Gemm") and (q := _weight(n, made_by)) is not None}
    names = Names(graph)
    graph.nodes = [m for n in graph.nodes for m in ([n] if n not in found else product_node(n, found[n], names, 0))]
    return bool(found)


def _weight(n: Node, made_by: dict[Value, Node]) -> QuantizedWeight | None:
    """The blocked weights of a product as [N, K]; None for another form."""
    if n.op == "Gemm" and (int(n.attrs.get("transA", 0)) or float(n.attrs.get("alpha", 1.0)) != 1.0):
        return None
    columns_last = n.op == "Gemm" and bool(n.attrs.get("transB", 0))  # stored as [N, K]
    d = made_by.get(n.inputs[1]) if n.inputs[1] is not None else None
    if d is not None and d.op == "Transpose" and d.inputs[0] is not None and d.inputs[0].rank == 2 and tuple(d.attrs.get("perm", (1, 0))) == (1, 0):
        columns_last, d = not columns_last, made_by.get(d.inputs[0])
    if d is None or d.op != "DequantizeLinear":
        return None
    w, s, z = d.inputs[0], d.input(1), d.input(2)
    block, axis = int(d.attrs.get("block_size", 0)), int(d.attrs.get("axis", 1)) % 2
    if w is None or w.data is None or w.rank != 2 or s is None or s.data is None or s.data.ndim != 2 or w.dtype.name not in _BITS:
        return None
    if axis != int(columns_last) or block < SHORTEST or w.data.shape[axis] % block or (z is not None and z.data is None):
        return None
    scales = s.data if columns_last else s.data.T
    wide = scales.astype(np.float32)
    if scales.dtype.name not in ("float16", "bfloat16", "float32") or not np.isfinite(wide).all() or not wide.all():
        return None
    bits = _BITS[w.dtype.name]
    shift = 1 << (bits - 1) if w.dtype.is_signed else 0

    def codes(a: Any) -> Any:
        c = a.astype(np.int32) + shift
        return np.ascontiguousarray(c if columns_last else c.T).astype(np.uint8)

    zeros = None if z is None or z.data is None else codes(z.data)
    if zeros is not None and (zeros == zeros.flat[0]).all():
        zero, zeros = float(zeros.flat[0]), None
    else:
        zero = float(shift)
    return QuantizedWeight(codes(w.data), np.ascontiguousarray(scales), zeros, zero, bits, block)
