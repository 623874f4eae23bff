"""Higher-order operators: torch.cond, while_loop, scan, map, and those that only wrap a body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from luthier.importers.torch.emitter import Ref
from luthier.ir import dtypes as D
from luthier.ir.errors import UnsupportedOperator
from luthier.ir.expr import Expr
from luthier.ir.graph import Graph, Node, TensorType, Value

if TYPE_CHECKING:
    from luthier.importers.torch.program import Walk

Rule = Callable[..., Any]
HIGHER: dict[str, Rule] = {}


def higher(*names: str) -> Callable[[Rule], Rule]:
    """Registers what a higher-order operator becomes: called with the walk and the operands, values of tensors and graph modules."""

    def wrap(rule: Rule) -> Rule:
        HIGHER.update(dict.fromkeys(names, rule))
        return rule

    return wrap


def operands(walk: Walk, items: Sequence[Any]) -> list[Value]:
    """Present values, read before a body begins. Raises UnsupportedOperator for numbers and sizes that a loop would have to carry."""
    out = []
    for x in items:
        if isinstance(x, Ref):
            x = x.read()
        elif isinstance(x, Expr) and x.op != "const":
            x = walk.e.number(x, D.i64)
        elif isinstance(x, (bool, int, float, Expr)):
            x = x.attr if isinstance(x, Expr) else x
            x = walk.e.number(x, D.boolean if isinstance(x, bool) else D.i64 if isinstance(x, int) else D.f64)
        out.append(x)
    return out


def inline(walk: Walk, gm: fx.GraphModule, args: Sequence[Any]) -> list[Any]:
    """The results of a body in place; its arguments are seen and may be written to as they are."""
    for p, a in zip([n for n in gm.graph.nodes if n.op == "placeholder"], args, strict=True):
        walk.env[p] = Ref(a) if isinstance(a, Value) else a
    return list(walk.body(gm))


def nested(walk: Walk, gm: fx.GraphModule, args: Sequence[Value]) -> tuple[list[Node], list[Value]]:
    """The nodes of a body and its results. Raises UnsupportedOperator where it writes to what it is given."""
    e, refs = walk.e, [Ref(a) for a in args]
    outside, e.nodes = e.nodes, []
    try:
        results = operands(walk, inline(walk, gm, refs))
    finally:
        inside, e.nodes = e.nodes, outside
    if any(r.version for r in refs):
        raise UnsupportedOperator("a body of control flow writes to its operands", hint="return the new value instead")
    return inside, results


def _scalar(walk: Walk, v: Any) -> Value:
    return walk.e.cast(walk.e.reshape(v, []), D.boolean)


@higher("cond")
def cond(walk: Walk, pred: Any, then: fx.GraphModule, other: fx.GraphModule, args: Sequence[Any] = ()) -> Any:
    if isinstance(pred, bool):
        return inline(walk, then if pred else other, args)
    given = operands(walk, args)
    branches = []
    for gm, name in ((then, "then"), (other, "else")):
        nodes, results = nested(walk, gm, given)
        branches.append(Graph(name, [], results, nodes))
    flag = _scalar(walk, pred.read() if isinstance(pred, Ref) else operands(walk, [pred])[0])
    return walk.e.ops("If", len(branches[0].outputs), flag, then_branch=branches[0], else_branch=branches[1])


@higher("while_loop")
def while_loop(walk: Walk, test: fx.GraphModule, body: fx.GraphModule, carried: Sequence[Any], more: Sequence[Any] = ()) -> Any:
    """The condition is a part of the body's end, and runs once before."""
    e = walk.e
    start, fixed = operands(walk, carried), operands(walk, more)
    first = operands(walk, inline(walk, test, [*start, *fixed]))[0]
    inside = [Value(e.names.fresh("carried"), v.type) for v in start]
    counters = [Value(e.names.fresh("round"), TensorType.of(D.i64, ())), Value(e.names.fresh("go"), TensorType.of(D.boolean, ()))]
    nodes, results = nested(walk, body, [*inside, *fixed])
    outside, e.nodes = e.nodes, nodes
    try:
        again = _scalar(walk, operands(walk, inline(walk, test, [*results, *fixed]))[0])
    finally:
        e.nodes = outside
    graph = Graph("body", [*counters, *inside], [again, *results], nodes)
    return e.ops("Loop", len(start), None, _scalar(walk, first), *start, body=graph)


@higher("scan")
def scan(walk: Walk, body: fx.GraphModule, init: Sequence[Any], xs: Sequence[Any], more: Sequence[Any] = ()) -> Any:
    e = walk.e
    start, lines, fixed = operands(walk, init), operands(walk, xs), operands(walk, more)
    inside = [Value(e.names.fresh("carried"), v.type) for v in start]
    inside += [Value(e.names.fresh("slice"), TensorType(v.dtype, v.shape[1:])) for v in lines]
    nodes, results = nested(walk, body, [*inside, *fixed])
    return e.ops("Scan", len(results), *start, *lines, body=Graph("body", inside, results, nodes), num_scan_inputs=len(lines))


@higher("map_impl")
def map_(walk: Walk, body: fx.GraphModule, xs: Sequence[Any], more: Sequence[Any] = ()) -> Any:
    return scan(walk, body, (), xs, more)


@higher("wrap_with_set_grad_enabled")
def with_grad(walk: Walk, enabled: bool, body: fx.GraphModule, *args: Any) -> Any:
    return inline(walk, body, args)


@higher("wrap_with_autocast")
def with_autocast(walk: Walk, device: str, dtype: Any, enabled: bool, cached: Any, body: fx.GraphModule, *args: Any) -> Any:
    return inline(walk, body, args)  # casts are operators of the body


@higher("invoke_subgraph")
def invoke_subgraph(walk: Walk, body: fx.GraphModule, identifier: str, *args: Any) -> Any:
    return inline(walk, body, args)
