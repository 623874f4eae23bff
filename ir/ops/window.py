"""Window: a part of a flat tensor, in the extents that another tensor holds. What sequences are taken apart with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.expr import Expr, as_expr, load, maximum
from luthier.ir.graph import Node, TensorType, content_or_symbols
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import Array, axes_of, define, like, make, must, need, product, shape_error
from luthier.ir.requirements import assume_at_most, assume_equal


@op("luthier::Window")
class Window(Op):
    """(x[n], start[1], extents[r]) -> ``x[start : start + prod(extents)]`` in these extents; the run fails where that leaves x."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if x.rank != 1:
            raise shape_error(node, "a window of a tensor that is not flat")
        start, shape = content_or_symbols(node, 1)[0], content_or_symbols(node, 2)
        assume_equal(maximum(start, 0), start, "the start of an element of a sequence or optional")
        assume_at_most(start + product(shape), x.shape[0], "the end of an element of a sequence or optional, which may be empty,")
        return [like(x.type, shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        at: Expr = as_expr(0)
        for a in axes:
            at = at * a.extent + a.var
        return make(node, ins, outs, [define(outs[0], axes, load(must(ins, 0), [content_or_symbols(node, 1)[0] + at]))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, start, shape = (np.asarray(a) for a in arrays)
        k = int(start.reshape(-1)[0])
        return [x[k : k + int(np.prod(shape))].reshape([int(e) for e in shape])]

