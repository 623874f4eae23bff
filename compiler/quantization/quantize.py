"""``luthier.quantize``: a model in, the same model in fewer bits out, with an accuracy report.

>>> import luthier
>>> small = luthier.quantize("model.onnx", "w4", calibration="data.npz", method="gptq")   # doctest: +SKIP
>>> small.report.print()                                                                  # doctest: +SKIP
>>> module = small.compile()                                                              # doctest: +SKIP
>>> small.save("model.w4.onnx")                                                           # doctest: +SKIP
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import QuantizationError
from luthier.ir.graph import Graph, Node
from luthier.passes.graph.copy_graph import copy_graph
from luthier.passes.graph.eliminate_dead import eliminate_dead
from luthier.passes.quantize.quantize_gathers import quantize_gathers, tables
from luthier.passes.quantize.quantize_products import quantize_products
from luthier.passes.quantize.quantize_weights import METHODS, QuantizedWeight, fit_group, output_error
from luthier.passes.quantize.quantize_weights import quantize as quantize_matrix
from luthier.passes.quantize.weight_grid import floats
from luthier.quantization.calibrate import Feed, Layer, Statistics, collect, load_graph, read_data, weight_layers
from luthier.quantization.precision import PRECISIONS, Precision, parse_precision
from luthier.quantization.report import LayerReport, Report, compare_graphs, constant_bytes
from luthier.quantization.static import StaticOptions, quantize_static

if TYPE_CHECKING:
    from luthier.module import Module

__all__ = ["PRECISIONS", "Precision", "Quantized", "WeightOptions", "parse_precision", "quantize"]

REDUCED = (
    "weights of 7 bits (-63 to 63): runtimes on CPUs without VNNI add two products of bytes in 16 bits, which saturate with 8; "
    "--full-range (reduce_range=False) makes 8 bits, for this package and for CPUs with VNNI"
)
FULL = "weights of 8 bits: exact in this package; other runtimes saturate on CPUs without VNNI, --reduce-range (reduce_range=True) makes a file for them"
BF16 = "bf16: this package runs it; onnxruntime's CPU kernels refuse MatMul and Conv of bf16 (1.32: NOT_IMPLEMENTED): choose f16 for a file that it runs"


@dataclass(frozen=True)
class WeightOptions:
    """``group``: columns that share a scale (halved for a layer until it divides; 0: one scale a row); ``symmetric``: without zero points;
    ``method``: rtn, mse, hqq or gptq; ``scale_dtype``: f16, bf16 or f32."""

    group: int = 64
    symmetric: bool = False
    method: str = "mse"
    scale_dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.group and not 8 <= self.group <= 1 << 16:
            raise QuantizationError(f"groups of {self.group} columns are not supported", hint="choose 16 to 256, or 0 for one group a row")
        if self.method not in METHODS:
            raise QuantizationError(f"unknown method {self.method!r}", hint=f"choose one of {', '.join(METHODS)}")
        floats(self.scale_dtype)


@dataclass(eq=False)
class Quantized:
    """``graph``: with ONNX's operators and luthier::GroupedMatMul; ``report``: what it cost."""

    graph: Graph
    report: Report

    def compile(self, target: str = "cpu", threads: int | None = None, debug: str | None = None) -> Module:
        """As ``luthier.compile``; the graph stays as it is. Raises its errors."""
        from luthier.api import compile

        return compile(self.graph, target, None, threads, debug)

    def model(self, form: str = "portable") -> Any:
        """An ``onnx.ModelProto``; see :mod:`luthier.quantization.export_onnx` for the forms."""
        from luthier.quantization.export_onnx import export_onnx

        return export_onnx(self.graph, form)

    def save(self, path: str | Path, form: str = "portable") -> Path:
        """Write ONNX that onnxruntime runs (``form="luthier"``: in its own bits, for this package). Raises InputError."""
        from luthier.quantization.export_onnx import save_onnx

        return save_onnx(self.graph, path, form)


def quantize(
    model: Any, precision: str = "w4", *, calibration: Any = None, shapes: Mapping[str, Sequence[Any]] | None = None, group: int = 64, symmetric: bool = False,
    method: str | None = None, scale_dtype: str = "f16", embeddings: bool = True, observer: str = "minmax", percentile: float = 99.99, smooth: float | None = None, reduce_range: bool = True,
    budget_mb: float | None = None, sensitivity: str = "output", exclude: Sequence[str] = (), samples: int | None = None, detail: int | None = 4, progress: bool = False,
) -> Quantized:  # fmt: skip
    """Quantize ``model`` (path, ``onnx.ModelProto`` or Graph).

    ``precision``: ``w8``, ``w6`` .. ``w1``, ``ternary`` (weights of matrix products; ``w4a8``: activations rounded as well), ``int8`` (static, weights
    and activations), ``f16``, ``bf16`` (sums in f32), ``auto`` (a width for every product so that all constants take at most ``budget_mb``
    million bytes, by ``sensitivity``: ``output``, measured, or ``proxy``, from the layers' own errors), ``f32`` (nothing).
    ``calibration``: see :func:`luthier.quantization.calibrate.read_data`; at most ``samples`` of it. Needed by int8, auto and gptq, else only for the report.
    ``group``, ``symmetric``, ``method``, ``scale_dtype``: see :class:`WeightOptions` (``method``: default gptq with calibration data, else mse; for
    int8 rtn). ``embeddings``: large tables become bytes. ``observer``, ``percentile``, ``smooth``: see :class:`StaticOptions`.
    ``reduce_range``: int8 weights of 7 bits, for a file that other runtimes read (:data:`REDUCED`); False: of 8 bits, for :meth:`Quantized.compile`. ``exclude``: patterns
    of node names that stay. ``detail``: batches on which the errors inside the model are measured; 0: of the outputs only; None: nothing is run for the report.

    Raises QuantizationError, InputError, and what ``luthier.compile`` raises. Ctrl-C leaves nothing behind."""
    want = parse_precision(precision)
    _check(want, calibration, method, budget_mb, sensitivity, samples, percentile)
    graph = load_graph(model, shapes)
    data = [] if calibration is None else read_data(calibration, graph, samples)
    asked = {"group": group, "symmetric": symmetric, "method": method, "scale_dtype": scale_dtype, "observer": observer, "smooth": smooth, "budget_mb": budget_mb}
    report = Report(precision, {k: v for k, v in asked.items() if v is not None}, batches=len(data))
    before = copy_graph(graph)[0]
    report.bytes_before = constant_bytes(graph)
    layers, left = _split(weight_layers(graph), exclude, want.kind)
    rows = {x.name: _row(x) for x in [*layers, *left]}
    for x in left:
        rows[x.name].note = "excluded" if any(fnmatch.fnmatch(x.name, p) for p in exclude) else "a convolution stays f32"
    if want.kind == "weights":
        how = WeightOptions(group, symmetric, method or ("gptq" if data else "mse"), scale_dtype)
        stats = collect(graph, data, hessians=layers, progress=progress) if data else None
        chosen = _quantize_layers(layers, {x: want.bits for x in layers}, how, stats, rows, progress)
        quantize_products(graph, chosen, 32 if want.round else 0)
    elif want.kind == "auto":
        from luthier.quantization.mixed import choose_widths

        how = WeightOptions(group, symmetric, method or "gptq", scale_dtype)
        stats = collect(graph, data, hessians=layers, progress=progress)
        assert budget_mb is not None
        table_bytes = _table_savings(graph) if embeddings else 0
        plan = choose_widths(graph, layers, data, stats, how, budget_mb * 1e6, report.bytes_before - table_bytes, sensitivity, report, progress)
        chosen = _quantize_layers(layers, plan, how, stats, rows, progress)
        quantize_products(graph, chosen, 32 if want.round else 0)
    elif want.kind == "int8":
        options = StaticOptions(observer, percentile, False, smooth, method or "rtn", reduced=reduce_range)
        report.notes.append(REDUCED if reduce_range else FULL)
        for name, q in quantize_static(graph, layers, data, options, progress).items():
            _fill(rows[name], q, "int8")
            rows[name].own = output_error(next(x for x in layers if x.name == name).matrix(), q.dequantize()) if smooth is None else None
    elif want.kind in ("f16", "bf16"):
        from luthier.quantization.half import quantize_half

        report.notes += [BF16] if want.kind == "bf16" else []
        report.notes += quantize_half(graph, want.kind, data, exclude, rows, progress)
    if embeddings and want.kind in ("weights", "auto", "int8"):
        _embeddings(graph, exclude, report)
    eliminate_dead(graph)
    report.bytes_after = constant_bytes(graph)
    report.layers = [*rows.values(), *report.layers]
    _measure(before, graph, data, report, rows, detail, progress)
    return Quantized(graph, report)


def _check(want: Precision, calibration: Any, method: str | None, budget: float | None, sensitivity: str, samples: int | None, percentile: float) -> None:
    """Everything that can be refused before the model is read. Raises QuantizationError."""
    if calibration is None and (want.kind in ("int8", "auto") or method == "gptq"):
        what = "error compensation (gptq)" if method == "gptq" else f"precision {want.kind}"
        raise QuantizationError(f"{what} needs calibration data", hint="give --calibration FILE.npz, or calibration= an iterable of {input: array}")
    if want.kind == "auto":
        if budget is None:
            raise QuantizationError("precision auto needs a size budget", hint="give --budget-mb, for example half of the model's size")
        if not budget > 0:
            raise QuantizationError(f"a budget of {budget} MB is not above 0")
        if sensitivity not in ("output", "proxy"):
            raise QuantizationError(f"unknown sensitivity {sensitivity!r}", hint="choose output or proxy")
    elif budget is not None:
        raise QuantizationError("a size budget goes with precision auto only", hint="give --precision auto, or leave --budget-mb out")
    if samples is not None and samples < 1:
        raise QuantizationError(f"{samples} calibration samples are too few")
    if not 50 < percentile <= 100:
        raise QuantizationError(f"a percentile of {percentile} is not above 50 and at most 100")


def _split(layers: list[Layer], exclude: Sequence[str], kind: str) -> tuple[list[Layer], list[Layer]]:
    """(layers to quantize, layers that stay)."""
    chosen: list[Layer] = []
    left: list[Layer] = []
    for x in layers:
        stays = any(fnmatch.fnmatch(x.name, p) for p in exclude) or (x.is_conv and kind in ("weights", "auto"))
        (left if stays else chosen).append(x)
    return chosen, left


def _row(x: Layer) -> LayerReport:
    assert x.weight.data is not None
    shape = x.node.outputs[0].type.static_shape
    size = 1
    for s in shape or (x.n,):
        size *= s
    return LayerReport(x.name, x.node.op, x.weight.dtype.name, x.n, x.k, x.weight.data.nbytes, x.weight.data.nbytes, operations=2.0 * size * x.k)


def _fill(row: LayerReport, q: QuantizedWeight, precision: str) -> None:
    row.precision, row.bytes_after = precision, q.nbytes


def width_name(bits: int) -> str:
    return "ternary" if bits == 0 else f"w{bits}"


def _quantize_layers(
    layers: list[Layer], plan: Mapping[Layer, int | None], how: WeightOptions, stats: Statistics | None, rows: dict[str, LayerReport], progress: bool
) -> dict[Node, QuantizedWeight]:
    """Each layer at its width (None: left). Fills the rows."""
    from luthier.quantization.calibrate import tracked

    out: dict[Node, QuantizedWeight] = {}
    for x in tracked(layers, f"quantizing weights ({how.method})", progress):
        bits, group = plan[x], fit_group(x.k, how.group)
        if bits is None:
            continue
        if group is None:
            rows[x.name].note = f"{x.k} columns are no multiple of 16"
            continue
        h = None if stats is None else stats.hessian(x)
        w = x.matrix()
        try:
            q = quantize_matrix(w, bits, group, how.symmetric, how.method, h, how.scale_dtype, rows=None if stats is None else stats.samples(x))
        except QuantizationError as error:
            raise error.at(node=x.name, op=x.node.op) from None
        out[x.node] = q
        _fill(rows[x.name], q, f"{width_name(bits)} g{group}")
        rows[x.name].own = output_error(w, q.dequantize(), h)
    return out


def _table_savings(graph: Graph) -> int:
    """Bytes that tables lose when their rows become bytes."""
    seen = {n.inputs[0] for n in tables(graph)}
    return sum(v.data.nbytes - v.data.size - v.data.shape[0] * v.data.itemsize for v in seen if v is not None and v.data is not None)


def _embeddings(graph: Graph, exclude: Sequence[str], report: Report) -> None:
    chosen = [n for n in tables(graph) if not any(fnmatch.fnmatch(n.name, p) for p in exclude)]
    for n in chosen:
        t = n.inputs[0]
        assert t is not None and t.data is not None
        v, d = t.data.shape
        report.layers.append(LayerReport(n.name, "Gather", "i8 rows", v, d, t.data.nbytes, v * d + v * t.data.itemsize))
        report.notes.append(f"table {t.name} [{v}, {d}] is stored as bytes with a scale a row")
    quantize_gathers(graph, chosen)


def _measure(before: Graph, graph: Graph, data: list[Feed], report: Report, rows: dict[str, LayerReport], detail: int | None, progress: bool) -> None:
    """Errors inside the model and of its outputs."""
    if not data or detail is None:
        return
    made = {n.name: n.outputs[0] for n in before.nodes if n.name in rows and n.outputs}
    now = {v.name: v for n in graph.nodes for v in n.outputs}
    pairs = {name: (v, now[v.name]) for name, v in made.items() if v.name in now} if detail else {}
    report.outputs, inside, sizes = compare_graphs(before, graph, data, pairs, detail, progress=progress)
    for name, d in inside.items():
        rows[name].measured = d.nmse
        rows[name].operations = 2.0 * sizes[name] * rows[name].columns
