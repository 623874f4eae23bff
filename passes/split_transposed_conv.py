"""A transposed convolution whose windows do not overlap is a 1x1 convolution and a rearrangement.

Before: ``y = ConvTranspose{strides=[k, k]}(x, w, b)`` with a k by k kernel, no padding. After:
``y = DepthToSpace{blocksize=k, mode=DCR}(Conv(x, w', b'))`` with ``w'[(i k + j) M + m, c, 0, 0] = w[c, m, i, j]`` and ``b`` repeated
k k times: every output pixel has one tap, so the sum over taps that finds it is not walked. Results change by nothing but the order
of the sum.
"""

from __future__ import annotations

import numpy as np

from luthier.ir.graph import Graph, Node, Value
from luthier.passes.rewrite import Context, rewrite_graph


def split_transposed_conv(graph: Graph) -> bool:
    """In place; True when something changed."""
    return rewrite_graph(graph, _rule)


def _plain(n: Node, k: int) -> bool:
    a = n.attrs
    return (
        tuple(a.get("strides") or (1, 1)) == (k, k) and not any(a.get("pads") or ()) and all(d == 1 for d in a.get("dilations") or ())
        and not any(a.get("output_padding") or ()) and a.get("output_shape") is None and int(a.get("group", 1)) == 1
        and a.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and a.get("layout", "NCHW") == "NCHW"
    )  # fmt: skip


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.op != "ConvTranspose":
        return None
    x, w, b = n.inputs[0], n.inputs[1], n.input(2)
    if x is None or w is None or w.data is None or x.rank != 4 or (b is not None and b.data is None):
        return None
    c, m, k, k2 = w.data.shape
    if k != k2 or k < 2 or not _plain(n, k):
        return None
    weights = np.ascontiguousarray(w.data.transpose(2, 3, 1, 0)).reshape(k * k * m, c, 1, 1)
    ins: list[Value | None] = [x, ctx.const(w.name, weights)]
    if b is not None and b.data is not None:
        ins.append(ctx.const(b.name, np.tile(b.data, k * k)))
    y = ctx.make("Conv", ins, {}, n)
    return ctx.make("DepthToSpace", [y], {"blocksize": k, "mode": "DCR"}, n)
