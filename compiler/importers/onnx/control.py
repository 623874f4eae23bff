"""If and Loop of ONNX: bodies to subgraphs, values that are no tensors or change their extents to what a subgraph can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from onnx import GraphProto, NodeProto

from luthier.importers.onnx.sequences import Any_, Elements, Form, Maybe, Packed, Steps, Structure, form_of
from luthier.ir.builder import Names
from luthier.ir.dtypes import boolean, i64
from luthier.ir.errors import InvalidModel, ShapeError, UnsupportedOperator
from luthier.ir.expr import var
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.requirements import Requirement

UNROLLED = 1024  # nodes that a Loop over sequences may become


@dataclass(slots=True)
class Body:
    """A subgraph on its way: ``results`` may be no tensors yet."""

    name: str
    inputs: list[Value]
    results: list[Any_]
    nodes: list[Node]
    requirements: list[Requirement]


class Importer(Protocol):
    """What an importer offers to what is imported here."""

    names: Names
    nodes: list[Node]
    requirements: list[Requirement]

    def open_body(self, g: GraphProto, outer: Any, inputs: Sequence[TensorType | Form | None] = (), op: str = "") -> Body: ...
    def inline(self, g: GraphProto, outer: Any, inputs: Sequence[Any_] = ()) -> list[Any_]: ...
    def steps(self, scope: Any, n: NodeProto) -> Steps: ...
    def emit_node(self, op: str, inputs: Sequence[Value | None], attrs: dict[str, Any], outs: list[str], name: str, proto: NodeProto) -> tuple[Value, ...]: ...


@contextmanager
def inside(imp: Importer, body: Body) -> Iterator[None]:
    """Nodes that are added meanwhile belong to ``body``."""
    outer = imp.nodes, imp.requirements
    imp.nodes, imp.requirements = body.nodes, body.requirements
    try:
        yield
    finally:
        imp.nodes, imp.requirements = outer


def close(body: Body, results: list[Value]) -> Graph:
    return Graph(body.name, body.inputs, results, body.nodes, requirements=body.requirements)


def import_if(imp: Importer, n: NodeProto, cond: Value, then: Body, other: Body, scope: Any) -> list[Any_]:
    """An If whose branches are open. Results that are no tensors in both, or of different ranks, become tensors that hold either."""
    if len(then.results) != len(other.results) or len(then.results) < len(n.output):
        raise ShapeError("the branches give different numbers of outputs")
    flat: tuple[list[Value], list[Value]] = ([], [])
    names: list[str] = []
    builders: list[Callable[[Sequence[Value]], Any_]] = []
    counts: list[int] = []
    for o, a, b in zip(n.output, then.results, other.results, strict=False):
        parts, build = _branches(imp, n, o, a, b, (then, other), scope)
        for side, values in zip(flat, parts, strict=True):
            side.extend(values)
        names += [f"{scope.prefix}{o}{f'.{k}' if k else ''}" for k in range(len(parts[0]))]
        builders.append(build)
        counts.append(len(parts[0]))
    attrs = {"then_branch": close(then, flat[0]), "else_branch": close(other, flat[1])}
    values = list(imp.emit_node("If", [cond], attrs, names, scope.prefix + n.name, n)) if names else []
    out = []
    for build, k in zip(builders, counts, strict=True):
        out.append(build(values[:k]))
        values = values[k:]
    return out


def _branches(
    imp: Importer, n: NodeProto, name: str, a: Any_, b: Any_, bodies: tuple[Body, Body], scope: Any,
) -> tuple[list[list[Value]], Callable[[Sequence[Value]], Any_]]:
    """The tensors of one result in each branch, and what they are after the If."""
    if isinstance(a, Value) and isinstance(b, Value) and (a.rank == b.rank or a.dtype is not b.dtype):
        return [[a], [b]], lambda v: v[0]
    if isinstance(a, Elements) and isinstance(b, Elements) and [(x.dtype, x.rank) for x in a.items] == [(x.dtype, x.rank) for x in b.items] and a.items:
        return [list(a.items), list(b.items)], lambda v: Elements(v[0].dtype, tuple(v))
    form = form_of(a).join(form_of(b), f"output {name} of the branches")
    parts = []
    for v, body in zip((a, b), bodies, strict=True):
        with inside(imp, body):
            parts.append(imp.steps(scope, n).flatten(v, form))
    return parts, lambda v: rebuilt(imp, n, form, v, scope)


def rebuilt(imp: Importer, n: NodeProto, form: Form, values: Sequence[Value], scope: Any) -> Structure:
    """A structure from its tensors; a tensor whose rank only the run knows is an optional that always holds one."""
    v = form.build(values)
    return Maybe(v.dtype, imp.steps(scope, n).constant(np.array(True)), v, True) if form.tensor and isinstance(v, Packed) else v


def import_loop(imp: Importer, n: NodeProto, proto: GraphProto, inputs: Sequence[Any_ | None], scope: Any) -> list[Any_]:
    """A Loop. An extent of a carried tensor that changes from round to round becomes a symbol of the body; carried sequences are packed,
    unless the Loop unrolls."""
    starts = list(inputs[2:])
    m, cond = (list(inputs) + [None, None])[:2]
    if any(not isinstance(v, Value) for v in (m, cond) if v is not None) or any(v is None for v in starts):
        raise InvalidModel("the trip count and the condition of a Loop are tensors, its carried values are there")
    if any(not isinstance(v, Value) for v in starts):
        unrolled = _unroll(imp, proto, m, cond, starts, scope)  # type: ignore[arg-type]
        if unrolled is not None:
            return _stacked(imp, n, unrolled, len(starts), scope)
    types: list[TensorType | Form] = [v.type if isinstance(v, Value) else form_of(v) for v in starts]  # type: ignore[arg-type]
    while True:
        body = imp.open_body(proto, scope, [TensorType(i64, ()), TensorType(boolean, ()), *types], "Loop")
        if len(body.results) < 1 + len(starts) or not isinstance(body.results[0], Value):
            raise InvalidModel(f"the body of the Loop gives {len(body.results)} values; it needs a condition and {len(starts)} carried values")
        wider = [_wider(imp, t, s, v) for t, s, v in zip(types, starts, body.results[1:], strict=False)]  # type: ignore[arg-type]
        if wider == types:
            break
        types = wider
    given: list[Value] = []
    results: list[Value] = [body.results[0]]
    spans: list[tuple[Form | None, int]] = []
    for t, s, v in zip(types, starts, body.results[1:], strict=False):
        if isinstance(t, TensorType):
            given.append(s)  # type: ignore[arg-type]
            results.append(v)  # type: ignore[arg-type]
            spans.append((None, 1))
            continue
        first = imp.steps(scope, n).flatten(s, t)  # type: ignore[arg-type]
        with inside(imp, body):
            results += imp.steps(scope, n).flatten(v, t)
        given += first
        spans.append((t, len(first)))
    for v in body.results[1 + len(starts) :]:
        if not isinstance(v, Value):
            raise UnsupportedOperator(f"a scan output of a Loop is {form_of(v)}; only tensors are stacked")
        results.append(v)
        spans.append((None, 1))
    names = [scope.prefix + (n.output[k] if k < len(n.output) and n.output[k] else f"{n.name or n.output[0]}.{k}") + (f".{j}" if j else "") for k, (_, c) in enumerate(spans) for j in range(c)]
    values = list(imp.emit_node("Loop", [m, cond, *given], {"body": close(body, results)}, names, scope.prefix + n.name, n))  # type: ignore[list-item]
    out: list[Any_] = []
    for form, c in spans:
        out.append(values[0] if form is None else rebuilt(imp, n, form, values[:c], scope))
        values = values[c:]
    return out


def _wider(imp: Importer, t: TensorType | Form, start: Any_, got: Any_) -> TensorType | Form:
    """The type that holds what a round takes and what it gives."""
    if isinstance(t, Form) or not isinstance(got, Value):
        return (t if isinstance(t, Form) else form_of(start)).join(form_of(got), "a carried value of the Loop")
    if t.rank != got.rank:
        return t  # Loop says what is wrong
    assert isinstance(start, Value)
    own = set(t.shape) - set(start.shape)
    dims = (a if a is b or a in own else var(imp.names.fresh(f"{got.name}.{i}.round"), lo=0) for i, (a, b) in enumerate(zip(t.shape, got.shape, strict=True)))
    return TensorType(t.dtype, tuple(dims))


def _known(v: Any_ | None) -> int | None:
    c = v.content if isinstance(v, Value) else None
    return int(c[0].attr) if c is not None and len(c) == 1 and c[0].op == "const" else None


def _unroll(imp: Importer, g: GraphProto, m: Value | None, cond: Value | None, starts: list[Any_], scope: Any) -> list[list[Any_]] | None:
    """[carried values at the end, slices of round 0, of round 1, ...] of a Loop whose rounds are known and few, else None."""
    trips, going = _known(m), 1 if cond is None else _known(cond)
    if trips is None or going is None or max(trips, 0) * max(len(g.node), 1) > UNROLLED:
        return None
    nodes, requirements = len(imp.nodes), len(imp.requirements)
    state, rounds = starts, []
    for i in range(max(trips, 0)):
        if not going:
            break
        index, on = (Value.const(imp.names.fresh(f"{scope.prefix}round"), np.array(x)) for x in (np.int64(i), True))
        results = imp.inline(g, scope, [index, on, *state])
        going = _known(results[0])
        if going is None:
            del imp.nodes[nodes:], imp.requirements[requirements:]
            return None
        state = results[1 : 1 + len(starts)]
        rounds.append(results[1 + len(starts) :])
    if not rounds and len(g.output) > 1 + len(starts):
        return None  # the types of slices that there are not
    return [state, *rounds]


def _stacked(imp: Importer, n: NodeProto, unrolled: list[list[Any_]], states: int, scope: Any) -> list[Any_]:
    """The outputs of a Loop that was unrolled."""
    s = imp.steps(scope, n)
    out = list(unrolled[0])
    for slices in zip(*unrolled[1:], strict=True):
        if not all(isinstance(v, Value) for v in slices):
            raise UnsupportedOperator("a scan output of a Loop is no tensor; only tensors are stacked")
        out.append(s.concat([s.op("Unsqueeze", v, s.ints(0)) for v in slices]))
    return out
