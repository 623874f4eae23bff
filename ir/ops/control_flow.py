"""Control flow: If, Loop, Scan. Their mathematics is their bodies; the program builder lowers them to ``If`` and ``While``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.ir.dtypes import index
from luthier.ir.errors import InvalidModel, ShapeError, TypeMismatch
from luthier.ir.expr import Expr, as_expr, cast, free_vars, is_const, maximum, var
from luthier.ir.graph import Graph, Node, TensorType, Value, content_or_symbols, new_dim, node_reads, type_symbols
from luthier.ir.op import Op, op
from luthier.ir.ops.common import check_axis, need


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
    """The type of state ``k`` of a Scan. Raises ShapeError when its shape changes from round to round."""
    if start.dtype is not end.dtype:
        raise TypeMismatch(f"loop-carried value {k} changes its type from {start.dtype} to {end.dtype}", node=node.name, op=node.op)
    if start.shape != end.shape:
        raise ShapeError(
            f"loop-carried value {k} changes its shape between rounds, which is not supported", node=node.name, op=node.op,
            shapes={"before": start.shape, "after": end.shape},
        )
    return start


def carried(node: Node, k: int, start: TensorType, inside: TensorType, end: TensorType) -> TensorType:
    """The type of loop-carried value ``k`` after a Loop. ``inside``: what the body takes; an extent that changes from round to round is
    a symbol of its own there, and one of the node's afterwards. Raises ShapeError, TypeMismatch when the body takes something else."""
    if start.dtype is not inside.dtype or inside.dtype is not end.dtype:
        raise TypeMismatch(f"loop-carried value {k} changes its type from {start.dtype} to {end.dtype}", node=node.name, op=node.op)
    if not start.rank == inside.rank == end.rank:
        raise ShapeError(
            f"loop-carried value {k} changes its rank between rounds", node=node.name, op=node.op,
            shapes={"before": start.shape, "after": end.shape}, hint="carry it in one rank and reshape it after the loop",
        )
    dims = []
    for i, (a, b, c) in enumerate(zip(start.shape, inside.shape, end.shape, strict=True)):
        if a is b and b is not c or a is not b and b.op != "var":
            raise ShapeError(
                f"axis {i} of loop-carried value {k} changes between rounds, the body takes {b!r}", node=node.name, op=node.op,
                shapes={"before": start.shape, "after": end.shape},
            )
        dims.append(a if a is b else new_dim(node, f"{k}.{i}"))
    return TensorType(start.dtype, tuple(dims))


def states(node: Node) -> int:
    """How many loop-carried values a Loop or Scan has."""
    return max(0, len(node.inputs) - (2 if node.op == "Loop" else int(node.attrs["num_scan_inputs"])))


@op("Loop")
class Loop(Op):
    """(M, cond, v...) -> (v..., scan outputs...); body: (i, cond, v...) -> (cond, v..., slices...)."""

    def infer(self, node: Node) -> Sequence[TensorType]:
        body: Graph = node.attrs["body"]
        n = states(node)
        m, going = node.input(0), node.input(1)
        if m is None and keeps_going(body) and (going is None or is_const(condition(going), 1)):
            raise InvalidModel("the loop never ends: it has no trip count and its condition stays true", node=node.name, op=node.op)
        out = []
        for k in range(n):
            v = node.inputs[2 + k]
            if v is None:
                raise ShapeError(f"loop-carried value {k} is missing", node=node.name, op=node.op)
            out.append(carried(node, k, v.type, body.inputs[2 + k].type, body.outputs[1 + k].type))
        scans = body.outputs[1 + n :]
        rounds = self.rounds(node) if scans else None
        outer = _outer_symbols(node)
        for k, s in enumerate(scans):
            dims = (d if free_vars(d) <= outer else new_dim(node, f"slice{k}.{i}") for i, d in enumerate(s.shape))
            out.append(TensorType(s.dtype, (as_expr(rounds), *dims)))
        return out

    def rounds(self, node: Node) -> Expr:
        """How many slices the scan outputs have: the trip count where nothing can stop the loop earlier, none where the condition is false
        from the start, a symbol where only the run knows."""
        m, going = node.input(0), node.input(1)
        if m is None or not keeps_going(node.attrs["body"]):
            return new_dim(node, "rounds")
        (trip,) = content_or_symbols(node, 0)
        return maximum(trip, 0) * (as_expr(1) if going is None else cast(condition(going), index))


def condition(v: Value) -> Expr:
    """A condition as an index expression, 0 or 1; a symbol that the program reads from ``v`` when nothing is known."""
    if v.content is None:
        v.content = (var(f"{v.name}.0", lo=0, hi=1),)
        v.bound = True
    return v.content[0]


def _outer_symbols(node: Node) -> set[Expr]:
    """Symbols that are known before a Loop runs: of what it takes and of what its body captures."""
    known: set[Expr] = set()
    for v in node_reads(node):
        known |= type_symbols(v.type)
        for e in v.content or ():
            known |= free_vars(e)
    return known


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
        at = [check_axis(node, a, need(node, n + k).rank, "scan_input_axes:") for k, a in enumerate(axes)]
        length = first.shape[at[0]]
        out = []
        for k in range(n):
            v = node.inputs[k]
            if v is None:
                raise ShapeError(f"state {k} is missing", node=node.name, op=node.op)
            out.append(invariant(node, k, v.type, body.outputs[k].type))
        out_axes = node.attrs.get("scan_output_axes", (0,) * (len(body.outputs) - n))
        for s, a in zip(body.outputs[n:], out_axes, strict=True):
            a = check_axis(node, a, s.type.rank + 1, "scan_output_axes:")
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
