"""Layers are pruned in the order in which a model computes them, each for what the pruned ones before it let through.

A layer is fitted to the original's outputs, not to those of its own weights on other inputs: with X of the pruned and Y of the original model,
``X.T X`` and ``X.T Y`` are what :func:`luthier.passes.quantize.prune_groups.prune_groups` takes. Where the output is added to another value (a residual), it aims
at what brings the sum to the original's, rows relative to the size of that sum; so a layer makes up for what was lost before it.

Every group of layers with one input costs two runs of the model on each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from luthier.ir.graph import Graph, Value
from luthier.quantization.calibrate import Feed, Layer, check_finite, tracked
from luthier.quantization.mixed import FedModel, spend

__all__ = ["choose_sparsities", "prune_sequence"]

Array = np.ndarray[Any, Any]
W = TypeVar("W")
ROWS = 4096  # of one batch, evenly spaced
STEPS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75)  # sparsities from which a layer's is chosen


def prune_sequence(
    graph: Graph, layers: Sequence[Layer], data: Sequence[Feed], make: Callable[[Layer, Array, Array, int], W], dense: Callable[[W], Array], progress: bool = False,
) -> dict[Layer, W]:  # fmt: skip
    """``make(layer, X.T X / rows, X.T Y / rows, rows)`` gives a layer's weights, ``dense`` those as f32 [N, K]. Raises what compiling and running raise,
    and InputError for values that are not finite."""
    added = {x: v for x in layers if (v := residual(graph, x)) is not None}
    model = FedModel(graph, layers, data, [*(x.x for x in layers), *added.values()])
    made: dict[Layer, W] = {}
    now: dict[Layer, Array] = {}
    groups = [list(g) for _, g in groupby(layers, lambda x: x.x)]
    for group in tracked(groups, "pruning", progress):
        sums: dict[Layer, list[Array]] = {}
        rows = 0
        for number in range(len(data)):
            was, here = model.values({}, number), model.values(now, number)
            first = group[0].x
            before, x = (_rows(check_finite(first.name, v[first]), group[0].k) for v in (was, here))
            rows += len(x)
            for layer in group:
                y, share = before @ layer.matrix().T, None
                r = added.get(layer)
                if r is not None:
                    old, new = (_rows(v[r], layer.n) for v in (was, here))
                    share = np.square(old + y).sum(1, keepdims=True)
                    share = np.divide(1, share, out=np.zeros_like(share), where=share > 0)
                    y = y + (old - new)
                parts = _moments(x, y, share)
                sums[layer] = [a + b for a, b in zip(sums[layer], parts, strict=True)] if layer in sums else parts
        for layer in group:
            made[layer] = make(layer, sums[layer][0] / rows, sums[layer][1] / rows, rows)
            now[layer] = dense(made[layer])
    return made


def _moments(x: Array, y: Array, share: Array | None) -> list[Array]:
    left = x.T if share is None else (x * share).T
    return [(left @ x).astype(np.float64), (left @ y).astype(np.float64)]


def _rows(x: Array, n: int) -> Array:
    rows = x.reshape(-1, n)
    return rows[:: -(-len(rows) // ROWS)]


def residual(graph: Graph, layer: Layer) -> Value | None:
    """The value that is added to the layer's output, after additions of constants, and is known before it; None for other uses."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    made = {v: n for n in graph.nodes for v in n.outputs}
    v = layer.node.outputs[0]
    for _ in range(3):
        users = [n for n in graph.nodes if v in n.inputs]
        if len(users) != 1 or users[0].op != "Add" or v in graph.outputs:
            return None
        a, b = users[0].inputs
        other = b if a is v else a
        if other is None or other is v:
            return None
        if other.data is None:
            early = other not in made or order[made[other]] < order[layer.node]
            return other if early and tuple(map(str, other.shape)) == tuple(map(str, v.shape)) else None
        v = users[0].outputs[0]
    return None


def choose_sparsities(
    graph: Graph, layers: Sequence[Layer], data: Sequence[Feed], near: Callable[[Layer, float], Array], sparsity: float, progress: bool = False, batches: int = 2,
) -> dict[Layer, float]:  # fmt: skip
    """Sparsities whose mean over all weights is ``sparsity`` or, by less than a step of one layer, more; by the error of the model's outputs when one layer alone is pruned
    (on at most ``batches`` batches): what was dropped last costs about as much everywhere. ``near(layer, sparsity)``: its pruned weights."""
    fed = FedModel(graph, layers, data[:batches])
    options: dict[Layer, list[tuple[int | None, float, float]]] = {}
    for x in tracked(layers, "sensitivity", progress):
        size = float(x.n * x.k)
        options[x] = [(None, size, 0.0), *((i, size * (1 - s), fed.error(x, near(x, s))) for i, s in enumerate(STEPS))]
    room = -sparsity * sum(float(x.n * x.k) for x in layers)
    plan: Mapping[Layer, int | None] = spend(options, room)
    return {x: 0.0 if i is None else STEPS[i] for x, i in plan.items()}
