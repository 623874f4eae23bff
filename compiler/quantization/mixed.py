"""Mixed precision: a width for every layer under a size budget, least error first.

Sensitivity of a layer at a width is the error of the model's outputs when only that layer is quantized (``output``: measured on calibration
data, with the weights fed as inputs so that one compiled module serves every layer and width), or the layer's own output error
(``proxy``: from its weights and Hessian, no run). For every layer the lower convex hull of error over bytes is walked, and the steps of
all layers are taken in the order of error per byte saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luthier.errors import QuantizationError
from luthier.ir.graph import Graph, Value
from luthier.passes.graph.copy_graph import copy_graph
from luthier.passes.quantize.quantize_weights import fit_group, output_error, quantize
from luthier.quantization.calibrate import Feed, Layer, Statistics, tracked
from luthier.quantization.report import Report

__all__ = ["FedModel", "WIDTHS", "choose_widths", "hull_steps", "spend"]

Array = np.ndarray[Any, Any]
WIDTHS = (8, 4, 3, 2)


def choose_widths(
    graph: Graph, layers: Sequence[Layer], data: Sequence[Feed], stats: Statistics, how: Any, budget: float, size: float, sensitivity: str, report: Report,
    progress: bool = False, batches: int = 2,
) -> dict[Layer, int | None]:
    """{layer: bits, None for f32} so that the constants take at most ``budget`` bytes. ``size``: bytes of all constants with these layers in
    f32. Sensitivities are taken with clipped weights on at most ``batches`` batches. Raises QuantizationError when 2 bits are too many."""
    fed = FedModel(graph, layers, data[:batches]) if sensitivity == "output" else None
    options: dict[Layer, list[tuple[int | None, float, float]]] = {}
    for x in tracked(layers, f"sensitivity ({sensitivity})", progress):
        assert x.weight.data is not None
        options[x] = [(None, float(x.weight.data.nbytes), 0.0)]
        group = fit_group(x.k, how.group)
        if group is None:
            continue
        w, h = x.matrix(), stats.hessian(x)
        for bits in WIDTHS:
            q = quantize(w, bits, group, how.symmetric, "mse", None, how.scale_dtype, importance=np.diagonal(h) + 1e-12)
            near = q.dequantize()
            error = fed.error(x, near) if fed is not None else output_error(w, near, h)
            options[x].append((bits, float(q.nbytes), error))
    plan = spend(options, budget - size)
    counts = {b: sum(1 for v in plan.values() if v == b) for b in (None, *WIDTHS)}
    report.notes.append(
        f"budget {budget / 1e6:.2f} MB by {sensitivity} sensitivity: "
        + ", ".join(f"{n} layers {'f32' if b is None else f'{b} bits'}" for b, n in counts.items() if n)
    )
    return plan


def hull_steps(points: Sequence[tuple[int | None, float, float]]) -> list[tuple[float, float, int | None]]:
    """(error per byte saved, bytes saved, width) along the lower convex hull of (width, bytes, error), from the largest to the smallest; the
    first number never falls."""
    ordered = sorted(points, key=lambda p: -p[1])
    hull: list[tuple[int | None, float, float]] = [ordered[0]]
    for p in ordered[1:]:
        while hull and hull[-1][1] <= p[1]:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], p):
            hull.pop()
        hull.append(p)
    return [(_slope(a, b), a[1] - b[1], b[0]) for a, b in zip(hull, hull[1:])]


def _slope(a: tuple[int | None, float, float], b: tuple[int | None, float, float]) -> float:
    return max(0.0, b[2] - a[2]) / max(a[1] - b[1], 1e-9)


def spend(options: Mapping[Layer, Sequence[tuple[int | None, float, float]]], room: float) -> dict[Layer, int | None]:
    """The width of every layer. ``room``: bytes by which the sizes may grow; negative: what has to be saved. Raises QuantizationError when
    the narrowest widths do not save enough."""
    plan: dict[Layer, int | None] = {x: max(points, key=lambda p: p[1])[0] for x, points in options.items()}
    steps = [(rate, number, saved, width, x) for x, points in options.items() for number, (rate, saved, width) in enumerate(hull_steps(points))]
    steps.sort(key=lambda s: s[0])  # along one hull the rates rise, so a stable sort keeps its order
    missing = -room
    for _, _, saved, width, x in steps:
        if missing <= 0:
            break
        plan[x] = width
        missing -= saved
    chosen = {x: next(p for p in points if p[0] == plan[x]) for x, points in options.items()}
    for x in sorted(options, key=lambda x: -chosen[x][2]):  # the last step may have saved more than was needed
        better = [p for p in options[x] if p[1] - chosen[x][1] <= -missing and p[2] < chosen[x][2]]
        if better:
            best = min(better, key=lambda p: p[2])
            missing += best[1] - chosen[x][1]
            plan[x] = best[0]
    if missing > 0:
        raise QuantizationError(f"the budget cannot be met: with every layer at its narrowest {missing / 1e6:.2f} MB are too many", hint="raise --budget-mb")
    return plan


class FedModel:
    """The model with the weights of its layers as inputs: any of them can be replaced from run to run. ``taps``: values that
    :meth:`values` gives beside the outputs."""

    def __init__(self, graph: Graph, layers: Sequence[Layer], data: Sequence[Feed], taps: Sequence[Value] = ()) -> None:
        from luthier.build_graph import compile_graph

        copy, own = copy_graph(graph)
        self.data, self.names = list(data), [name for name, _ in copy.results()]
        self.taps = {v: f"tap.{i}" for i, v in enumerate(dict.fromkeys(taps))}
        copy.outputs = [*copy.outputs, *(own[v] for v in self.taps)]
        copy.output_names = (*self.names, *self.taps.values())
        self.weights: dict[str, Array] = {}
        self.input: dict[Layer, str] = {}
        for x in layers:
            v = own[x.weight]
            self.input[x] = v.name
            if v.data is not None:
                self.weights[v.name] = np.ascontiguousarray(v.data)
                v.data = None
                copy.inputs.append(v)
        self.module = compile_graph(copy)
        self.want = self.run({})

    @staticmethod
    def _floats(outputs: Mapping[str, Array]) -> dict[str, Array]:
        return {k: np.array(a, np.float64) for k, a in outputs.items() if "float" in a.dtype.name}

    def run(self, near: Mapping[Layer, Array]) -> list[dict[str, Array]]:
        """The float outputs, in f64, for every batch, with ``near`` [N, K] in the place of some layers' weights."""
        fed = {**self.weights, **{self.input[x]: x.restore(w) for x, w in near.items()}}
        found = (self.module.run({**feed, **fed}) for feed in self.data)
        return [self._floats({name: a for name, a in r.items() if name in self.names}) for r in found]

    def values(self, near: Mapping[Layer, Array], number: int) -> dict[Value, Array]:
        """The tapped values for batch ``number``, f32."""
        fed = {**self.weights, **{self.input[x]: x.restore(w) for x, w in near.items()}}
        result = self.module.run({**self.data[number], **fed})
        return {v: np.array(result[name], np.float32) for v, name in self.taps.items()}

    def error(self, layer: Layer, near: Array) -> float:
        """Mean NMSE of the float outputs with ``near`` in the place of one layer's weights."""
        total = 0.0
        for got, want in zip(self.run({layer: near}), self.want):
            for name, a in want.items():
                power = float(np.square(a).sum())
                total += float(np.square(got[name] - a).sum()) / power if power else 0.0
        return total / max(1, len(self.data) * len(self.want[0]))
