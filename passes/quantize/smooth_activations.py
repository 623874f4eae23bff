"""smooth_activations: channels of large magnitude move from the activations into the weights (SmoothQuant, Xiao et al. 2022).

Before: ``y = MatMul(x, w)``. After: ``y = MatMul(x * (1 / s), s[:, None] * w)`` with ``s = max|x|^alpha / max|w|^(1 - alpha)`` for every channel:
the same product, but the range of ``x * (1 / s)`` is not that of one channel alone. Layers that read one value share its ``s``; the
multiplication joins the kernel that makes ``x``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from luthier.errors import QuantizationError
from luthier.ir.builder import Names, infer_node
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.ops.common import Array

__all__ = ["smooth_activations", "smoothing"]


def smoothing(peaks: Array, weights: Sequence[Array], alpha: float) -> Array:
    """``s`` [K] f32 for the largest magnitudes of an activation's channels [K] and the matrices [N, K] that multiply it. Channels that are
    never active or have no weights keep 1. Raises QuantizationError for an alpha outside of 0 to 1."""
    if not 0 <= alpha <= 1:
        raise QuantizationError(f"a smoothing strength of {alpha} is outside of 0 to 1")
    top = np.max([np.abs(w).max(0) for w in weights], 0).astype(np.float64)
    x = np.asarray(peaks, np.float64)
    usable = (x > 0) & (top > 0)
    s = np.where(usable, np.where(usable, x, 1) ** alpha / np.where(usable, top, 1) ** (1 - alpha), 1.0)
    return np.clip(s, 1e-5, 1e5).astype(np.float32)


def smooth_activations(graph: Graph, factors: Mapping[Value, Array], layers: Mapping[Node, bool]) -> bool:
    """In place; True when something changed. ``factors``: ``s`` [K] by activation; ``layers``: MatMul and Gemm nodes that read one of them
    on the left and a constant on the right, True where that constant is [N, K]."""
    names = Names(graph)
    scaled: dict[Value, Value] = {}
    nodes: list[Node] = []
    for n in graph.nodes:
        x = n.inputs[0] if n in layers else None
        s = factors.get(x) if x is not None else None
        if x is not None and s is not None:
            if x not in scaled:
                c = Value.const(names.fresh(f"{x.name}.smooth"), (1 / s).astype(x.dtype.numpy))
                v = scaled[x] = Value(names.fresh(f"{x.name}.smoothed"), TensorType(x.dtype, x.shape))
                nodes.append(infer_node(Node("Mul", (x, c), (v,), {}, f"{x.name}.smooth", n.source)))
            w = n.inputs[1]
            assert w is not None and w.data is not None
            data = w.data.astype(np.float32) * (s if layers[n] else s[:, None])
            n.inputs = (scaled[x], Value.const(names.fresh(f"{w.name}.smooth"), data.astype(w.data.dtype)), *n.inputs[2:])
        nodes.append(n)
    graph.nodes = nodes
    return bool(scaled)
