"""A graph evaluated node by node with numpy (``Op.reference``): the oracle of the graph passes and the constant folder's model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.ir.builder import operator
from luthier.ir.dtypes import f32
from luthier.ir.errors import InputError, LuthierError
from luthier.ir.expr import Expr
from luthier.ir.graph import Graph, Node, TensorType, Value

Array = np.ndarray[Any, Any]


def evaluate_graph(graph: Graph, feeds: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """(outputs by name, every intermediate value by name) for inputs by name. Raises InputError when an input is missing."""
    env: dict[Value, Array] = {}
    env[SYMBOLS] = {}  # type: ignore[assignment]
    for v in graph.inputs:
        if v.name not in feeds:
            raise InputError(f"input {v.name!r} is missing; expected {[i.name for i in graph.inputs]}")
        env[v] = np.asarray(feeds[v.name]).astype(v.dtype.numpy, copy=False)
        bind_symbols(env, v)
    outs = run_nodes(graph, env)
    return {n: a for (n, _), a in zip(graph.results(), outs, strict=True)}, {v.name: a for v, a in env.items() if v is not SYMBOLS}


SYMBOLS = Value("symbols", TensorType.of(f32, ()))


def bind_symbols(env: dict[Value, Array], v: Value) -> None:
    """Learn the values of symbols that stand alone as a dimension of ``v``, or that are read from its elements."""
    table: dict[Expr, Any] = env[SYMBOLS]  # type: ignore[assignment]
    a = env[v]
    for s, n in zip(v.shape, a.shape, strict=False):
        if s.op == "var":
            table[s] = n
    if v.bound and v.content is not None:
        for s, x in zip(v.content, a.reshape(-1), strict=True):
            table[s] = float(x) if s.dtype.is_float else int(x)  # type: ignore[assignment]


def run_nodes(graph: Graph, env: dict[Value, Array]) -> list[Array]:
    """Evaluate ``graph`` in ``env`` (outer values included; extended in place). Returns the outputs in order."""
    for n in graph.nodes:
        for v, a in zip(n.outputs, evaluate_node(n, env), strict=False):
            env[v] = np.asarray(a)
            bind_symbols(env, v)
    return [read(env, v) for v in graph.outputs]


def read(env: Mapping[Value, Array], v: Value) -> Array:
    return v.data if v.data is not None else env[v]


def evaluate_node(n: Node, env: dict[Value, Array]) -> list[Array]:
    """The outputs of one node. Raises LuthierError naming it."""
    args = [None if v is None else read(env, v) for v in n.inputs]
    if n.op == "Content":
        from luthier.ir.interpret.loops import evaluate_expr

        table: dict[Expr, Any] = env[SYMBOLS]  # type: ignore[assignment]
        return [np.array([evaluate_expr(e, table) for e in v.content or ()]).astype(v.dtype.numpy).reshape([int(evaluate_expr(s, table)) for s in v.shape]) for v in n.outputs]
    if n.op in _CONTROL:
        return _CONTROL[n.op](n, args, env)
    try:
        return [np.asarray(a) for a in operator(n).reference(n, *args)]
    except LuthierError as e:
        raise e.at(node=n.name, op=n.op) from None


def _if(n: Node, args: list[Any], env: dict[Value, Array]) -> list[Array]:
    return run_nodes(n.attrs["then_branch" if bool(np.asarray(args[0]).reshape(())) else "else_branch"], dict(env))


def _loop(n: Node, args: list[Any], env: dict[Value, Array]) -> list[Array]:
    body: Graph = n.attrs["body"]
    trips = None if args[0] is None else int(np.asarray(args[0]).reshape(()))
    going = True if len(args) < 2 or args[1] is None else bool(np.asarray(args[1]).reshape(()))
    state = list(args[2:])
    slices: list[list[Array]] = [[] for _ in body.outputs[1 + len(state) :]]
    i = 0
    while going and (trips is None or i < trips):
        inner = dict(env)
        for v, a in zip(body.inputs, [np.array(i, np.int64), np.array(going), *state], strict=True):
            inner[v] = np.asarray(a)
            bind_symbols(inner, v)
        outs = run_nodes(body, inner)
        going = bool(np.asarray(outs[0]).reshape(()))
        state = outs[1 : 1 + len(state)]
        for s, a in zip(slices, outs[1 + len(state) :], strict=True):
            s.append(a)
        i += 1
    stacked = []
    for v, s in zip(body.outputs[1 + len(state) :], slices, strict=True):
        if s:
            stacked.append(np.stack(s))
        else:
            stacked.append(np.zeros((0, *(d.attr if d.op == "const" else 0 for d in v.shape)), v.dtype.numpy))
    return [*state, *stacked]


def _scan(n: Node, args: list[Any], env: dict[Value, Array]) -> list[Array]:
    body: Graph = n.attrs["body"]
    m = int(n.attrs["num_scan_inputs"])
    k = len(args) - m
    state, seqs = list(args[:k]), args[k:]
    in_axes = n.attrs.get("scan_input_axes", (0,) * m)
    in_rev = n.attrs.get("scan_input_directions", (0,) * m)
    outs_n = len(body.outputs) - k
    out_axes = n.attrs.get("scan_output_axes", (0,) * outs_n)
    out_rev = n.attrs.get("scan_output_directions", (0,) * outs_n)
    length = seqs[0].shape[in_axes[0]]
    slices: list[list[Array]] = [[] for _ in range(outs_n)]
    for t in range(length):
        inner = dict(env)
        items = [np.take(s, length - 1 - t if r else t, axis=a) for s, a, r in zip(seqs, in_axes, in_rev, strict=True)]
        for v, a in zip(body.inputs, [*state, *items], strict=True):
            inner[v] = np.asarray(a)
        outs = run_nodes(body, inner)
        state = outs[:k]
        for s, a in zip(slices, outs[k:], strict=True):
            s.append(a)
    stacked = [np.stack(s[::-1] if r else s, axis=a) for s, a, r in zip(slices, out_axes, out_rev, strict=True)]
    return [*state, *stacked]


_CONTROL = {"If": _if, "Loop": _loop, "Scan": _scan}
