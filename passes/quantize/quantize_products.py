"""quantize_products: matrix products take their weights in few bits.

Before: ``y = MatMul(x, const f32 [K, N])``, or Gemm with bias. After: ``y = luthier::GroupedMatMul(x, bits, scales, zeros, bias)``, the form that
the low-bit kernels execute. The value ``y`` stays the same one, so statistics by value name fit before and after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.ir.builder import Names, infer_node
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.ops.lowbit import pack_bits
from luthier.ir.ops.lowbit_matmul import pack_trits
from luthier.passes.quantize.quantize_weights import QuantizedWeight

__all__ = ["product_node", "quantize_products"]


def quantize_products(graph: Graph, weights: Mapping[Node, QuantizedWeight], act_group: int = 0) -> bool:
    """In place; True when something changed. ``weights``: for MatMul and Gemm nodes of the main graph with constant weights [N, K] and
    without transA; ``act_group``: activations are rounded to 8 bits in groups of so many columns where that divides K (0: exact)."""
    if not weights:
        return False
    names = Names(graph)
    nodes: list[Node] = []
    for n in graph.nodes:
        q = weights.get(n)
        nodes += [n] if q is None else product_node(n, q, names, act_group)
    graph.nodes = nodes
    return True


def product_node(n: Node, q: QuantizedWeight, names: Names, act_group: int) -> list[Node]:
    """The nodes that take the place of ``n`` and make its output."""
    k = q.codes.shape[1]
    raw = pack_bits(q.codes, q.bits) if q.bits else pack_trits(q.codes)

    def const(part: str, data: Any) -> Value:
        return Value.const(names.fresh(f"{n.name}.{part}"), np.ascontiguousarray(data))

    attrs: dict[str, Any] = {"K": k, "bits": q.bits, "group": q.group, "act_group": act_group if act_group and k % act_group == 0 else 0}
    ins: list[Value | None] = [n.inputs[0], const("bits", raw), const("scale", q.scales)]
    if q.zeros is None:
        attrs["zero"] = int(q.zero) if q.zero == int(q.zero) else q.zero
    elif q.zeros.dtype == np.uint8:
        ins.append(const("zero", q.zeros))
    else:  # zero points with a fraction are offsets: (q - z) s = q s - z s
        attrs["offset"] = 1
        ins.append(const("offset", (-q.zeros.astype(np.float32) * q.scales.astype(np.float32)).astype(q.scales.dtype)))
    bias = n.input(2)
    beta = float(n.attrs.get("beta", 1.0))
    vector = bias is not None and bias.data is not None and bias.data.size == q.codes.shape[0] and bias.rank <= 2
    out = n.outputs[0]
    if vector:
        assert bias is not None and bias.data is not None
        ins += [None] * (4 - len(ins)) + [const("bias", bias.data.reshape(-1) * bias.data.dtype.type(beta))]
    if bias is None or vector or beta == 0:
        return [infer_node(Node("luthier::GroupedMatMul", tuple(ins), (out,), attrs, n.name, n.source))]
    product = Value(names.fresh(f"{n.name}.product"), TensorType(out.dtype, out.shape))
    done = [infer_node(Node("luthier::GroupedMatMul", tuple(ins), (product,), attrs, n.name, n.source))]
    if beta != 1.0:
        scaled = Value(names.fresh(f"{n.name}.beta"), bias.type)
        done.append(infer_node(Node("Mul", (bias, const("factor", np.array(beta, bias.dtype.numpy))), (scaled,), {}, f"{n.name}.beta", n.source)))
        bias = scaled
    return [*done, infer_node(Node("Add", (product, bias), (out,), {}, f"{n.name}.add", n.source))]
