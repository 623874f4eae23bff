"""Static 8-bit quantization: ranges from calibration, weights by output channel, QDQ pairs around every layer and chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import QuantizationError
from luthier.ir.graph import Graph, Value
from luthier.passes.quantize.insert_qdq import Activation, IntegerLayer, chain_inputs, insert_qdq, moved_from, parameters
from luthier.passes.quantize.quantize_weights import METHODS, QuantizedWeight, quantize
from luthier.passes.quantize.smooth_activations import smooth_activations, smoothing
from luthier.quantization.calibrate import Feed, Layer, Statistics, collect, weight_layers
from luthier.quantization.observers import Histogram, choose_range

__all__ = ["StaticOptions", "quantize_static"]


@dataclass(frozen=True)
class StaticOptions:
    """``observer``: minmax, percentile or entropy; ``percentile``: what the second keeps, in percent; ``symmetric``: activations as i8 without
    zero point; ``smooth``: strength of activation smoothing in front of matrix products, 0 to 1, None for none; ``method``: rtn, mse or gptq
    for the weights; ``chains``: residual sums and poolings between convolutions in integers as well; ``reduced``: weights of -63 to 63, of which two
    products with an activation fit 16 bits."""

    observer: str = "minmax"
    percentile: float = 99.99
    symmetric: bool = False
    smooth: float | None = None
    method: str = "rtn"
    chains: bool = True
    reduced: bool = False


def quantize_static(graph: Graph, layers: Sequence[Layer], data: Sequence[Feed], options: StaticOptions, progress: bool = False) -> dict[str, QuantizedWeight]:
    """Change ``graph`` in place; what each layer's weights became, by layer name. Raises QuantizationError and InputError."""
    if options.method not in METHODS or options.method == "hqq":
        raise QuantizationError(f"method {options.method!r} does not make 8-bit weights with one scale a channel", hint="choose rtn, mse or gptq")
    choose_range(Histogram(), options.observer, options.percentile)  # refuses unknown observers before anything is run
    nodes = {layer.node for layer in layers}
    if options.smooth is not None:
        _smooth(graph, [x for x in layers if not x.is_conv], data, options.smooth, progress)
    now = [x for x in weight_layers(graph) if x.node in nodes]
    others = chain_inputs(graph, [x.node for x in now]) if options.chains else []
    read: list[Value] = [x.x for x in now]
    for n, i in others:
        v = n.inputs[i]
        assert v is not None
        read.append(v)
    sources = {v: moved_from(graph, v) for v in read}
    stats = collect(graph, data, histograms=list(sources.values()), hessians=now if options.method == "gptq" else (), progress=progress)
    activations = {v: _activation(stats, source, options) for v, source in sources.items()}
    weights = {x.name: _weights(x, stats, options) for x in now}
    integer = [IntegerLayer(x.node, weights[x.name], _restorer(x), 0 if x.transposed else 1) for x in now]
    insert_qdq(graph, integer, activations, others)
    return weights


def _restorer(layer: Layer) -> Any:
    assert layer.weight.data is not None
    shape = layer.weight.data.shape
    return lambda codes: np.ascontiguousarray(codes if layer.transposed else codes.T).reshape(shape)


def _activation(stats: Statistics, v: Value, options: StaticOptions) -> Activation:
    if v.name not in stats.histograms:
        raise QuantizationError(f'value "{v.name}" was empty on all calibration data', hint="calibrate with data that reaches it")
    low, high = choose_range(stats.histograms[v.name], options.observer, options.percentile, options.symmetric)
    return parameters(low, high, options.symmetric)


def _weights(layer: Layer, stats: Statistics, options: StaticOptions) -> QuantizedWeight:
    w = layer.matrix()
    how: dict[str, Any] = {"bits": 8, "group": 0, "scale_dtype": "f32", "narrow": True, "reduced": options.reduced}
    if options.method != "gptq":
        return quantize(w, method=options.method, **how)
    h = stats.hessian(layer)
    if layer.group == 1:
        return quantize(w, method="gptq", hessian=h, rows=stats.samples(layer), **how)
    if h.shape[-1] <= 32:  # depthwise: one small system a group
        per = layer.n // layer.group
        parts = [quantize(w[g * per : (g + 1) * per], method="gptq", hessian=h[g], rows=stats.samples(layer), **how) for g in range(layer.group)]
        return QuantizedWeight(np.concatenate([p.codes for p in parts]), np.concatenate([p.scales for p in parts]), None, parts[0].zero, 8, layer.k)
    return quantize(w, method="mse", **how)


def _smooth(graph: Graph, layers: Sequence[Layer], data: Sequence[Feed], alpha: float, progress: bool) -> None:
    if not layers:
        return
    stats = collect(graph, data, peaks=layers, progress=progress)
    by_input: dict[Value, list[Layer]] = {}
    for x in layers:
        by_input.setdefault(x.x, []).append(x)
    factors = {v: smoothing(stats.peaks[v.name], [x.matrix() for x in mine], alpha) for v, mine in by_input.items()}
    smooth_activations(graph, factors, {x.node: x.transposed for x in layers})
