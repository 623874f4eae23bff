"""Control flow: If, Loop, Scan. Their mathematics is their bodies; the program builder lowers them to ``If`` and ``While``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.ir.errors import ShapeError, TypeMismatch
from luthier.ir.expr import Expr, maximum
from luthier.ir.graph import Graph, Node, TensorType, content_or_symbols, new_dim
from luthier.ir.op import Op, op
from luthier.ir.ops.common import need


def _merge(node: Node, k: int, a: TensorType, b: TensorType) -> TensorType:
    if a.dtype is not b.dtype:
        raise TypeMismatch(f"the branches give output {k} different types, {a.dtype} and {b.dtype}", node=node.name, op=node.op)
    if a.rank != b.rank:
        raise ShapeError(
            f"the branches give output {k} different ranks", node=node.name, op=node.op, shapes={"then": a.shape, "else": b.shape},
            hint="pin the input shapes so that the condition is known",
        )
    dims = [x if x is y else new_dim(node, f"{k}.{i}") for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True))]
    return TensorType(a.dtype, tuple(dims))


@op("If")
class If(Op):
    """``cond`` bool[1] chooses the branch. Output extents that differ between the branches become symbols."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        then, other = node.attrs["then_branch"], node.attrs["else_branch"]
        if len(then.outputs) != len(other.outputs) or len(then.outputs) < len(node.outputs):
            raise ShapeError("the branches give different numbers of outputs", node=node.name, op=node.op)
        return [_merge(node, k, a.type, b.type) for k, (a, b) in enumerate(zip(then.outputs, other.outputs, strict=True))]


def invariant(node: Node, k: int, start: TensorType, end: TensorType) -> TensorType:
    """The type of loop-carried value ``k``. Raises ShapeError when its shape changes from round to round."""
    if start.dtype is not end.dtype:
        raise TypeMismatch(f"loop-carried value {k} changes its type from {start.dtype} to {end.dtype}", node=node.name, op=node.op)
    if start.shape != end.shape:
        raise ShapeError(
            f"loop-carried value {k} changes its shape between rounds, which is not supported", node=node.name, op=node.op,
            shapes={"before": start.shape, "after": end.shape},
        )
    return start


def states(node: Node) -> int:
    """How many loop-carried values a Loop or Scan has."""
    return len(node.inputs) - (2 if node.op == "Loop" else int(node.attrs["num_scan_inputs"]))


@op("Loop")
class Loop(Op):
    """(M, cond, v...) -> (v..., scan outputs...); body: (i, cond, v...) -> (cond, v..., slices...)."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        body: Graph = node.attrs["body"]
        n = states(node)
        out = []
        for k in range(n):
            v = node.inputs[2 + k]
            if v is None:
                raise ShapeError(f"loop-carried value {k} is missing", node=node.name, op=node.op)
            out.append(invariant(node, k, v.type, body.outputs[1 + k].type))
        for k, s in enumerate(body.outputs[1 + n :]):
            out.append(TensorType(s.dtype, (self.rounds(node, k), *s.shape)))
        return out

    def rounds(self, node: Node, k: int) -> Expr:
        """How many slices scan output ``k`` has: the trip count, unless the body may stop earlier."""
        m = node.input(0)
        body: Graph = node.attrs["body"]
        if m is not None and keeps_going(body):
            (trip,) = content_or_symbols(node, 0)
            return maximum(trip, 0)
        return new_dim(node, "rounds")


def keeps_going(body: Graph) -> bool:
    """The body of a Loop never turns its condition off: it returns true, or the condition it was given."""
    c = body.outputs[0]
    known = c.content
    if known is not None and len(known) == 1 and known[0].op == "const":
        return bool(known[0].attr)
    producer = {v: n for n in body.nodes for v in n.outputs}
    while c in producer and producer[c].op == "Identity":
        c = producer[c].inputs[0]  # type: ignore[assignment]
    return len(body.inputs) > 1 and c is body.inputs[1]


@op("Scan")
class Scan(Op):
    """(states..., sequences...) -> (states..., stacked slices...)."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        body: Graph = node.attrs["body"]
        n = states(node)
        first = node.inputs[n]
        if first is None:
            raise ShapeError("the first scan input is missing", node=node.name, op=node.op)
        axes = node.attrs.get("scan_input_axes", (0,) * (len(node.inputs) - n))
        length = first.shape[axes[0]]
        out = []
        for k in range(n):
            v = node.inputs[k]
            if v is None:
                raise ShapeError(f"state {k} is missing", node=node.name, op=node.op)
            out.append(invariant(node, k, v.type, body.outputs[k].type))
        out_axes = node.attrs.get("scan_output_axes", (0,) * (len(body.outputs) - n))
        for s, a in zip(body.outputs[n:], out_axes, strict=True):
            a = a + s.type.rank + 1 if a < 0 else a
            out.append(TensorType(s.dtype, (*s.shape[:a], length, *s.shape[a:])))
        return out


@op("Content")
class Content(Op):
    """No inputs; the outputs' elements are the index expressions that they carry as ``content``."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [v.type for v in node.outputs]


@op("luthier::Require")
class Require(Op):
    """x -> x, on the condition that index expression ``got`` equals ``want`` (attributes; ``what`` says what they are).

    Stands where an If over shapes was decided at import: the run fails when the other branch would have been right."""

    kind = "view"

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [need(node, 0).type]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return [need(node, 0).content]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Any]:
        return [arrays[0]]
