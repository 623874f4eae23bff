"""``luthier.quantization.sparsify``: a model in, the same model with group-sparse quantized weights out, with an accuracy report.

>>> from luthier.quantization.sparsify import sparsify
>>> small = sparsify("model.onnx", 0.5, calibration="data.npz")          # doctest: +SKIP
>>> small.report.print()                                                 # doctest: +SKIP
>>> module = small.compile()                                             # doctest: +SKIP

``recover=True`` (needs torch) adds the two stages of arXiv 2412.17560: block by block, values and scales are fitted to the outputs of the
original on the calibration data; then all scales are tuned end to end, values fixed. See ``docs/sparsity.md``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import QuantizationError
from luthier.ir.graph import Graph, Node
from luthier.ir.ops.sparse_matmul import LEVELS, BlockSparse
from luthier.ir.ops.two_of_four import TwoOfFour
from luthier.passes.graph.copy_graph import copy_graph
from luthier.passes.graph.eliminate_dead import eliminate_dead
from luthier.passes.quantize.prune_groups import prune_groups, sparsify_products
from luthier.passes.quantize.prune_two_of_four import prune_two_of_four
from luthier.passes.quantize.quantize_weights import output_error
from luthier.quantization.calibrate import Layer, collect, load_graph, read_data, weight_layers
from luthier.quantization.prune_sequence import choose_sparsities, prune_sequence
from luthier.quantization.quantize import Quantized
from luthier.quantization.report import LayerReport, Report, compare_graphs, constant_bytes

__all__ = ["Sparsified", "sparsify"]


@dataclass(eq=False)
class Sparsified(Quantized):
    """``weights``: by name of the node; ``steps``: NMSE of every output on the calibration data after each step of recovery."""

    weights: dict[str, BlockSparse | TwoOfFour] = field(default_factory=dict)
    steps: dict[str, dict[str, float]] = field(default_factory=dict)


def sparsify(
    model: Any, sparsity: float = 0.5, *, calibration: Any = None, shapes: Mapping[str, Sequence[Any]] | None = None, block: int = 16, bits: int = 4,
    method: str | None = None, scope: str = "layer", recover: bool = False, exclude: Sequence[str] = (), samples: int | None = None,
    act_levels: int = LEVELS, epochs: int = 4, progress: bool = False, pattern: str = "blocks",
) -> Sparsified:  # fmt: skip
    """Drop ``sparsity`` of the ``1 x block`` blocks of every matrix product's weights and store the others in ``bits`` (4 or 8).

    ``model``: path, ``onnx.ModelProto`` or Graph. ``calibration``: see :func:`luthier.quantization.calibrate.read_data`, at most ``samples`` of it; without it
    magnitudes decide. ``method``, ``scope``: see :func:`luthier.passes.quantize.prune_groups.prune_groups` (``method``: default compensate with calibration data,
    which goes through the layers in order, :mod:`luthier.quantization.prune_sequence`); ``scope`` ``model`` chooses a sparsity for every layer by what it does to the outputs.
    ``recover``: tune on the calibration data, ``epochs`` passes a stage; needs torch. ``exclude``: patterns of node names that stay.
    ``pattern``: ``blocks``, or ``2:4`` (two of four neighbouring weights stay; ``block`` and ``scope`` do not matter, no recovery).
    ``act_levels``: steps of the rounded activations (2047 fastest, up to 8191; 0 keeps them exact, slowly).

    Raises QuantizationError, InputError, and what ``luthier.compile`` raises."""
    if pattern not in ("blocks", "2:4"):
        raise QuantizationError(f"unknown pattern {pattern!r}", hint="choose blocks or 2:4")
    if pattern == "2:4" and (sparsity != 0.5 or recover):
        raise QuantizationError("2:4 keeps half of the weights and has no recovery", hint="leave sparsity= and recover= out")
    if recover and calibration is None:
        raise QuantizationError("recovery needs calibration data", hint="give calibration= an iterable of {input: array}, or a file")
    if recover:
        from luthier.quantization.recover import require_torch

        require_torch()
    graph = load_graph(model, shapes)
    data = [] if calibration is None else read_data(calibration, graph, samples)
    how = method or ("compensate" if data else "nearest")
    layers = [x for x in weight_layers(graph, ("MatMul", "Gemm")) if not any(fnmatch.fnmatch(x.name, p) for p in exclude)]
    if scope == "model" and (how != "compensate" or pattern != "blocks"):
        raise QuantizationError("sparsities by layer need compensation, and blocks", hint="give calibration data, leave method= and pattern= out")
    stats = collect(graph, data, hessians=layers, progress=progress) if data else None
    report = Report(f"w{bits}s{round(sparsity * 100)}" if pattern == "blocks" else f"w{bits} 2:4", {"block": block, "method": how, "scope": scope, "recover": recover}, batches=len(data))
    report.bytes_before = constant_bytes(graph)
    original, _ = copy_graph(graph)

    def pruned(x: Layer, share: float, h: Any, cross: Any = None, rows: int | None = None) -> Any:
        try:
            if pattern == "blocks":
                return prune_groups(x.matrix(), share, block, bits, h, how, "layer" if scope == "model" else scope, cross=cross, rows=rows)
            return prune_two_of_four(x.matrix(), bits, hessian=h, method=how, cross=cross, rows=rows)
        except QuantizationError as error:
            raise error.at(node=x.name, op=x.node.op) from None

    shares = dict.fromkeys(layers, sparsity)
    if scope == "model":
        assert stats is not None
        near = stats
        shares = choose_sparsities(graph, layers, data, lambda x, s: pruned(x, s, near.hessian(x)).dense(), sparsity, progress)
    if how == "compensate" and data:
        found = prune_sequence(graph, layers, data, lambda x, h, c, rows: pruned(x, shares[x], h, c, rows), lambda w: w.dense(), progress)
        weights: dict[Node, Any] = {x.node: w for x, w in found.items()}
    else:
        weights = {x.node: pruned(x, sparsity, None if stats is None else stats.hessian(x)) for x in layers}
    steps: dict[str, dict[str, float]] = {}
    if data:
        steps[how] = _outputs(original, graph, weights, data, act_levels)
    if recover:
        from luthier.quantization.recover import Recovery

        r = Recovery(graph, {x.node: x for x in layers}, weights, data, progress)
        r.reconstruct_blocks(epochs)
        steps["block-wise"] = _outputs(original, graph, r.weights(), data, act_levels)
        r.tune_scales(epochs)
        weights = r.weights()
        steps["end-to-end"] = _outputs(original, graph, weights, data, act_levels)
    report.layers = [_row(x, weights[x.node], None if stats is None else stats.hessian(x)) for x in layers]
    by_name = {n.name: w for n, w in weights.items()}
    sparsify_products(graph, weights, act_levels)
    eliminate_dead(graph)
    report.bytes_after = constant_bytes(graph)
    if data:
        report.outputs = compare_graphs(original, graph, data, {}, 0)[0]
    return Sparsified(graph, report, by_name, steps)


def _outputs(original: Graph, graph: Graph, weights: Mapping[Node, BlockSparse | TwoOfFour], data: list[Any], act_levels: int) -> dict[str, float]:
    """NMSE of every output with ``weights`` in place."""
    sparse, values = copy_graph(graph)
    made = {v: n for n in sparse.nodes for v in n.outputs}
    sparsify_products(sparse, {made[values[n.outputs[0]]]: w for n, w in weights.items()}, act_levels)
    return {name: d.nmse for name, d in compare_graphs(original, sparse, data, {}, 0)[0].items()}


def _row(x: Layer, w: BlockSparse | TwoOfFour, hessian: Any) -> LayerReport:
    assert x.weight.data is not None
    size = sum(a.nbytes for a in w.arrays() if a is not None)
    form = f"w{w.bits} 2:4, g{w.group}" if isinstance(w, TwoOfFour) else f"w{w.bits} g{w.block}, {w.density:.0%} kept"
    return LayerReport(
        x.name, x.node.op, form, x.n, x.k, x.weight.data.nbytes, size, output_error(x.matrix(), w.dense(), hessian)
    )
