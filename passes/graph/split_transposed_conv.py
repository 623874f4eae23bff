"""A transposed convolution is a convolution per output phase, then a rearrangement.

Before: ``y = ConvTranspose{strides=[s, s]}(x, w, b)`` with a k by k kernel. With ``J = ceil(k / s)`` taps that reach an output (``w``
padded with zeros to J s), after::

    y = Slice(DepthToSpace{blocksize=s, mode=DCR}(Conv{pads=J-1}(x, w', b')))
    w'[(i s + j) M + m, c, t, u] = w[c, m, i + (J-1-t) s, j + (J-1-u) s]

and ``b'`` repeats ``b`` s s times; the Slice crops the padding and is left out where there is none. Where the last dimension alone has
a stride (one-dimensional ones above all), phases stand behind one another in a channels-last convolution's output, which is read as
s times as many positions without moving anything::

    y = Transpose(Slice(Reshape(Conv{layout=NHWC, pads=J-1}(Transpose(x), w', b'))))

No output walks taps that cannot reach it. Results change by nothing but the order of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.graph import Graph, Node, Value
from luthier.passes.graph.rewrite import Context, rewrite_graph

END = np.iinfo(np.int64).max


def split_transposed_conv(graph: Graph) -> bool:
    """In place; True when something changed."""
    return rewrite_graph(graph, _rule)


def _rule(n: Node, ctx: Context) -> Value | None:
    if n.op != "ConvTranspose" or not _plain(n):
        return None
    x, w, b = n.inputs[0], n.inputs[1], n.input(2)
    if x is None or w is None or w.data is None or (b is not None and b.data is None):
        return None
    r = x.rank - 2
    strides = tuple(int(v) for v in n.attrs.get("strides") or (1,) * r)
    kernel = w.data.shape[2:]
    square = r == 2 and strides[0] == strides[1] > 1 and kernel[0] == kernel[1]
    if not square and (strides[-1] == 1 or any(s != 1 for s in strides[:-1])):
        return None
    taps = [-(-k // s) for k, s in zip(kernel, strides, strict=True)]
    pads = [int(p) for p in n.attrs.get("pads") or (0,) * 2 * r] if n.attrs.get("auto_pad", "NOTSET") == "NOTSET" else [0] * 2 * r
    more = [int(p) for p in n.attrs.get("output_padding") or (0,) * r]
    cut = [t * s - k + pads[d + r] - more[d] for d, (t, s, k) in enumerate(zip(taps, strides, kernel, strict=True))]  # surplus elements at the ends
    if any(k < s for k, s in zip(kernel, strides, strict=True)) or min(cut) < 0 or min(pads) < 0:
        return None
    phases = _phases(w.data, strides, taps)
    count = int(np.prod(strides))
    bias = [] if b is None or b.data is None else [ctx.const(b.name, np.tile(b.data, count))]
    ends = [*pads[:r], *cut]
    whole = [min(e // s, t - 1) for e, s, t in zip(ends, strides * 2, taps * 2, strict=True)]  # positions of the convolution that are not made at all
    around = {"pads": tuple(t - 1 - q for t, q in zip(taps * 2, whole, strict=True))}
    ends = [e - q * s for e, q, s in zip(ends, whole, strides * 2, strict=True)]
    axes = [*range(2, 2 + r)]
    last = tuple(range(2, 2 + r))
    if square:
        y = ctx.make("Conv", [x, ctx.const(w.name, phases), *bias], around, n)
        y = ctx.make("DepthToSpace", [y], {"blocksize": strides[0], "mode": "DCR"}, n)
    else:
        x = ctx.make("Transpose", [x], {"perm": (0, *last, 1)}, n)
        y = ctx.make("Conv", [x, ctx.const(w.name, np.ascontiguousarray(phases.transpose(*last, 1, 0))), *bias], {**around, "layout": "NHWC"}, n)
        y = ctx.make("Reshape", [y, ctx.const("shape", np.array([*[0] * r, -1, w.data.shape[1]], np.int64))], {}, n)
        axes = [*range(1, 1 + r)]
    if any(ends):
        start, end = np.array(ends[:r], np.int64), np.array([-v if v else END for v in ends[r:]], np.int64)
        y = ctx.make("Slice", [y, ctx.const("start", start), ctx.const("end", end), ctx.const("axes", np.array(axes, np.int64))], {}, n)
    return y if square else ctx.make("Transpose", [y], {"perm": (0, r + 1, *range(1, r + 1))}, n)


def _plain(n: Node) -> bool:
    """Whether the node has none of the attributes that a split does not know."""
    a = n.attrs
    return (
        all(d == 1 for d in a.get("dilations") or ()) and a.get("output_shape") is None and int(a.get("group", 1)) == 1
        and a.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and a.get("layout", "NCHW") == "NCHW"
    )  # fmt: skip


def _phases(w: np.ndarray[Any, Any], strides: Sequence[int], taps: Sequence[int]) -> np.ndarray[Any, Any]:
    """Weights [C, M, K...] as those of a convolution, [phases * M, C, J...]."""
    c, m, *kernel = w.shape
    r = len(kernel)
    full = np.zeros((c, m, *(t * s for t, s in zip(taps, strides, strict=True))), w.dtype)
    full[(slice(None), slice(None), *(slice(0, k) for k in kernel))] = w
    cut = full.reshape(c, m, *(v for t, s in zip(taps, strides, strict=True) for v in (t, s)))
    cut = cut[(slice(None), slice(None), *(slice(None, None, -1) if d % 2 == 0 else slice(None) for d in range(2 * r)))]
    order = (*(3 + 2 * d for d in range(r)), 1, 0, *(2 + 2 * d for d in range(r)))
    return np.ascontiguousarray(cut.transpose(order).reshape(-1, c, *taps))
