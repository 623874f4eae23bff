"""A transposed convolution is a convolution per output phase, then a rearrangement.

Before: ``y = ConvTranspose{strides=[s, s]}(x, w, b)`` with a k by k kernel. With ``J = ceil(k / s)`` taps that reach an output (``w``
padded with zeros to J s), after::

    y = Slice(DepthToSpace{blocksize=s, mode=DCR}(Conv{pads=J-1}(x, w', b')))
    w'[(i s + j) M + m, c, t, u] = w[c, m, i + (J-1-t) s, j + (J-1-u) s]

and ``b'`` repeats ``b`` s s times; the Slice crops the padding and is left out where there is none. No output pixel walks taps that
cannot reach it. Results change by nothing but the order of the sum.
"""

from __future__ import annotations

import numpy as np

from luthier.ir.graph import Graph, Node, Value
from luthier.passes.graph.rewrite import Context, rewrite_graph

END = np.iinfo(np.int64).max


def split_transposed_conv(graph: Graph) -> bool:
    """In place; True when something changed."""
    return rewrite_graph(graph, _rule)


def _stride(n: Node) -> int | None:
    """The stride when the node has a form that can be split."""
    a = n.attrs
    s = tuple(int(v) for v in a.get("strides") or (1, 1))
    plain = (
        all(d == 1 for d in a.get("dilations") or ()) and a.get("output_shape") is None and int(a.get("group", 1)) == 1
        and a.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and a.get("layout", "NCHW") == "NCHW"
    )  # fmt: skip
    return s[0] if plain and len(s) == 2 and s[0] == s[1] and s[0] > 1 else None


def _rule(n: Node, ctx: Context) -> Value | None:
    s = _stride(n) if n.op == "ConvTranspose" else None
    x, w, b = (n.inputs[0], n.inputs[1], n.input(2)) if s is not None else (None, None, None)
    if s is None or x is None or w is None or w.data is None or x.rank != 4 or (b is not None and b.data is None):
        return None
    c, m, k, k2 = w.data.shape
    taps = -(-k // s)
    pads = [int(p) for p in n.attrs.get("pads") or (0, 0, 0, 0)] if n.attrs.get("auto_pad", "NOTSET") == "NOTSET" else [0] * 4
    more = [int(p) for p in n.attrs.get("output_padding") or (0, 0)]
    cut = [taps * s - k + pads[d + 2] - more[d] for d in (0, 1)]  # surplus elements at the ends
    if k != k2 or k < s or min(cut) < 0 or min(pads) < 0:
        return None
    full = np.zeros((c, m, taps * s, taps * s), w.data.dtype)
    full[:, :, :k, :k] = w.data
    phases = full.reshape(c, m, taps, s, taps, s)[:, :, ::-1, :, ::-1].transpose(3, 5, 1, 0, 2, 4)
    ins: list[Value | None] = [x, ctx.const(w.name, np.ascontiguousarray(phases.reshape(s * s * m, c, taps, taps)))]
    if b is not None and b.data is not None:
        ins.append(ctx.const(b.name, np.tile(b.data, s * s)))
    y = ctx.make("Conv", ins, {"pads": (taps - 1,) * 4} if taps > 1 else {}, n)
    y = ctx.make("DepthToSpace", [y], {"blocksize": s, "mode": "DCR"}, n)
    if not any(pads[:2]) and not any(cut):
        return y
    start, end = np.array(pads[:2], np.int64), np.array([-v if v else END for v in cut], np.int64)
    return ctx.make("Slice", [y, ctx.const("start", start), ctx.const("end", end), ctx.const("axes", np.array([2, 3], np.int64))], {}, n)
