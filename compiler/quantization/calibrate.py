"""Calibration: a graph is run on real inputs, and statistics of its intermediate values are collected.

>>> from luthier.quantization.calibrate import collect, load_graph, read_data, weight_layers
>>> graph = load_graph("model.onnx")                                               # doctest: +SKIP
>>> layers = weight_layers(graph)                                                  # doctest: +SKIP
>>> stats = collect(graph, read_data("calibration.npz", graph), hessians=layers)   # doctest: +SKIP
>>> stats.hessian(layers[0])                                                       # doctest: +SKIP

The values of interest become additional outputs of a compiled copy of the graph; batches are run one by one and reduced at once, so memory
holds one batch and the statistics. Ctrl-C between or within batches raises KeyboardInterrupt and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from luthier.errors import InputError
from luthier.ir.graph import Graph, Node, Value
from luthier.quantization.observers import Histogram

__all__ = ["Layer", "Statistics", "collect", "collect_outputs", "load_graph", "product_rows", "read_data", "run_batches", "tap", "weight_layers"]

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]


def load_graph(model: Any, shapes: Mapping[str, Sequence[Any]] | None = None) -> Graph:
    """Import ``model`` (a path or ``onnx.ModelProto``) and prepare it for quantization: composite operators are spelled out and batch
    normalisation lies in the weights. A Graph is copied. Every operator is ONNX's own. Raises what ``luthier.compile`` raises."""
    from luthier.importers.onnx.importer import import_onnx
    from luthier.passes.graph.copy_graph import copy_graph
    from luthier.passes.graph.eliminate_dead import eliminate_dead
    from luthier.passes.graph.fold_batch_norm import fold_batch_norm
    from luthier.passes.graph.legalize_operators import legalize_operators

    graph = copy_graph(model)[0] if isinstance(model, Graph) else import_onnx(model, shapes)
    for p in (legalize_operators, eliminate_dead, fold_batch_norm, eliminate_dead):
        p(graph)
    return graph


# ---------------------------------------------------------------- layers


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with constant weights: ``y = x w.T`` for MatMul and Gemm, a convolution otherwise.

    ``x``: the activations; ``weight``: the constant as the node reads it; ``transposed``: it lies as [N, K] (else [K, N]).
    ``n``, ``k``: output features, and columns of the weight matrix (for Conv: channels of a group times the taps)."""

    node: Node
    x: Value
    weight: Value
    transposed: bool
    n: int
    k: int

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def is_conv(self) -> bool:
        return self.node.op == "Conv"

    @property
    def group(self) -> int:
        """Groups of channels; 1 but for grouped and depthwise convolutions."""
        return int(self.node.attrs.get("group", 1)) if self.is_conv else 1

    @property
    def pointwise(self) -> bool:
        """A convolution that is a matrix product of the channels at every place."""
        if not self.is_conv or self.group != 1:
            return False
        assert self.weight.data is not None
        return self.weight.data.size == self.n * self.k == self.n * self.weight.data.shape[1]

    def matrix(self) -> Array:
        """The weights as f32 [N, K]."""
        assert self.weight.data is not None
        w = np.asarray(self.weight.data, np.float32)
        if self.is_conv:
            return w.reshape(self.n, self.k)
        return np.ascontiguousarray(w if self.transposed else w.T)

    def restore(self, matrix: Array) -> Array:
        """[N, K] in the shape and type of the node's own constant."""
        assert self.weight.data is not None
        w = matrix if self.transposed else matrix.T
        return np.ascontiguousarray(w).reshape(self.weight.data.shape).astype(self.weight.data.dtype)


def weight_layers(graph: Graph, ops: Sequence[str] = ("MatMul", "Gemm", "Conv")) -> list[Layer]:
    """The layers of the main graph in order: MatMul and Gemm with a constant matrix on the right, Conv with constant weights.

    Gemm with ``transA`` or ``alpha`` other than 1 is left out, and everything that is not f32, f16 or bf16."""
    found = []
    for n in graph.nodes:
        if n.op not in ops or len(n.inputs) < 2:
            continue
        x, w = n.inputs[0], n.inputs[1]
        if x is None or w is None or w.data is None or x.data is not None or not w.dtype.is_float or w.dtype.bits > 32:
            continue
        if n.op == "Conv":
            found.append(Layer(n, x, w, True, w.data.shape[0], int(np.prod(w.data.shape[1:]))))
        elif w.rank == 2 and (n.op == "MatMul" or not n.attrs.get("transA", 0) and n.attrs.get("alpha", 1.0) == 1.0):
            t = n.op == "Gemm" and bool(n.attrs.get("transB", 0))
            a, b = w.data.shape
            found.append(Layer(n, x, w, t, a if t else b, b if t else a))
    return found


def product_rows(layer: Layer, x: Array) -> Array:
    """The activations as the rows that the weight matrix multiplies, f32 [rows, K]; for Conv every window of every image (with
    several groups [groups, rows, K]). The layer's output is ``product_rows(layer, x) @ layer.matrix().T`` without the bias."""
    x = np.asarray(x, np.float32)
    if not layer.is_conv:
        return x.reshape(-1, layer.k)
    assert layer.weight.data is not None
    kernel = layer.weight.data.shape[2:]
    a, rank = layer.node.attrs, len(kernel)
    strides, dilations = a.get("strides") or (1,) * rank, a.get("dilations") or (1,) * rank
    spans = [(t - 1) * d + 1 for t, d in zip(kernel, dilations)]
    pads = _pads(a, x.shape[2:], spans, strides)
    if any(p for pair in pads for p in pair):
        x = np.pad(x, [(0, 0), (0, 0), *pads])
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, tuple(range(2, 2 + rank)))
    picked = windows[(slice(None), slice(None), *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))]
    # [image, channel, place.., tap..] -> [image, place.., channel, tap..]
    order = [0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank)]
    rows = picked.transpose(order)
    count = int(np.prod(rows.shape[: 1 + rank]))
    if layer.group == 1:
        return rows.reshape(count, layer.k)
    return np.ascontiguousarray(rows.reshape(count, layer.group, layer.k).transpose(1, 0, 2))


def _pads(attrs: Mapping[str, Any], size: Sequence[int], spans: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    auto, rank = attrs.get("auto_pad", "NOTSET"), len(size)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        out = []
        for n, span, s in zip(size, spans, strides):
            total = max(0, (-(-n // s) - 1) * s + span - n)
            small = total // 2
            out.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
        return out
    p = attrs.get("pads") or (0,) * (2 * rank)
    return [(0, 0)] * rank if auto == "VALID" else list(zip(p[:rank], p[rank:]))


# ---------------------------------------------------------------- data


def read_data(source: Any, graph: Graph, limit: int | None = None) -> list[Feed]:
    """Calibration batches for a graph's inputs, at most ``limit``.

    ``source``: an ``.npz`` file (arrays by input name), a folder of them in order of their names, one mapping, or an iterable of mappings
    ({input: array}). A batch may hold many samples: where an array has one more axis than the input, or where the input's first extent
    is fixed and divides it, it is cut into samples. Raises InputError for a missing file, an unknown, missing or misshapen input, NaN
    or infinite numbers, and for no data at all."""
    batches: list[Feed] = []
    for number, (name, raw) in enumerate(_batches(source)):
        if limit is not None and len(batches) >= limit:
            break
        label = name or f"calibration batch {number}"
        batches += _samples(_checked(raw, graph, label), graph, label)
    if not batches:
        raise InputError("there is no calibration data", hint="give an .npz file, a folder of them, or an iterable of {input: array}")
    return batches[:limit]


def _batches(source: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if source is None:
        raise InputError("this quantization needs calibration data", hint="give --calibration FILE.npz (or calibration=...)")
    if isinstance(source, (str, Path)):
        path = Path(source)
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"the folder {path} holds no .npz file", hint="save each batch with numpy.savez(file, **inputs)")
        for file in files:
            yield str(file), _read_npz(file)
    elif isinstance(source, Mapping):
        yield "", source
    elif isinstance(source, Iterable):
        for item in source:
            if not isinstance(item, Mapping):
                raise InputError(f"a calibration batch is a {type(item).__name__}, not a mapping of input names to arrays")
            yield "", item
    else:
        raise InputError(f"calibration data of type {type(source).__name__} is not supported", hint="give a path or an iterable of {input: array}")


def _read_npz(file: Path) -> Mapping[str, Any]:
    import zipfile

    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise InputError(f"{file} holds one array without a name", hint="save batches with numpy.savez(file, **inputs)")
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read the calibration data {file}: {error}", hint="give an .npz file or a folder of them") from error


def _checked(raw: Mapping[str, Any], graph: Graph, label: str) -> Feed:
    names = [v.name for v in graph.inputs]
    for name in raw:
        if name not in names:
            raise InputError(f'{label}: the model has no input "{name}"', hint=f"its inputs are {', '.join(names)}")
    feed = {}
    for v in graph.inputs:
        if v.name not in raw:
            raise InputError(f'{label} lacks the input "{v.name}"', hint=f"the inputs are {', '.join(names)}")
        a = np.asarray(raw[v.name])
        want = v.dtype.numpy
        if a.dtype != want:
            if a.dtype.kind not in "fiub" or (a.dtype.kind == "f") != v.dtype.is_float:
                raise InputError(f'{label}: input "{v.name}" is {a.dtype}, the model takes {v.dtype}')
            a = a.astype(want)
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            raise InputError(f'{label}: input "{v.name}" holds NaN or infinite numbers')
        feed[v.name] = np.ascontiguousarray(a)
    return feed


def _samples(feed: Feed, graph: Graph, label: str) -> list[Feed]:
    """One feed for every sample where arrays carry more of them than the model takes at once."""
    counts = set()
    parts: dict[str, Array] = {}
    for v in graph.inputs:
        a = feed[v.name]
        first = v.shape[0].attr if v.rank and v.shape[0].op == "const" else None
        if a.ndim == v.rank + 1:
            parts[v.name] = a
        elif a.ndim != v.rank or (first is not None and (a.shape[0] % first or not a.shape[0])):
            raise InputError(f'{label}: the shape of input "{v.name}" does not fit', shapes={"given": a.shape, "model": tuple(v.shape)})
        elif first is not None:
            parts[v.name] = a.reshape(a.shape[0] // first, first, *a.shape[1:])
        else:
            parts[v.name] = a[None]
        counts.add(parts[v.name].shape[0])
    if len(counts) > 1:
        raise InputError(f"{label}: inputs hold different numbers of samples", shapes={k: a.shape for k, a in feed.items()})
    return [{k: np.ascontiguousarray(a[i]) for k, a in parts.items()} for i in range(next(iter(counts), 0))]


# ---------------------------------------------------------------- running


def run_batches(
    graph: Graph, data: Sequence[Feed], values: Sequence[Value], visit: Callable[[int, dict[str, Array]], None], progress: bool = False,
    title: str = "calibration",
) -> None:
    """Compile a copy of ``graph`` with ``values`` as additional outputs and run every batch; ``visit(number, {value name: array})`` sees the
    values and, by their own names, the graph's outputs. The graph is not changed. Raises what compiling and running raise."""
    run = tap(graph, values)
    for number, feed in enumerate(tracked(data, title, progress)):
        visit(number, run(feed))


def tap(graph: Graph, values: Sequence[Value] = ()) -> Callable[[Feed], dict[str, Array]]:
    """A function from inputs to outputs and ``values``, by name (an output has its name for callers). The graph is not changed; values
    that an equal name of an output hides are left out. Raises what compiling raises."""
    from luthier.build_graph import compile_graph
    from luthier.passes.graph.copy_graph import copy_graph

    copy, own = copy_graph(graph)
    names = [name for name, _ in copy.results()]
    wanted = list(dict.fromkeys(v for v in values if v.data is None and v in own))
    copy.outputs = [*copy.outputs, *(own[v] for v in wanted)]
    copy.output_names = (*names, *(f"tap.{i}" for i in range(len(wanted))))
    module = compile_graph(copy)

    def run(feed: Feed) -> dict[str, Array]:
        result = module.run(feed)
        arrays = {v.name: result[f"tap.{i}"] for i, v in enumerate(wanted)}
        arrays.update({name: result[name] for name in names})
        return arrays

    return run


def tracked(items: Sequence[Any], title: str, progress: bool) -> Iterable[Any]:
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=title, console=Console(stderr=True), transient=True)


def collect_outputs(graph: Graph, data: Sequence[Feed], progress: bool = False) -> list[dict[str, Array]]:
    """The graph's outputs for every batch."""
    found: list[dict[str, Array]] = []
    run_batches(graph, data, (), lambda number, arrays: found.append({k: np.array(a) for k, a in arrays.items()}), progress, "running")
    return found


# ---------------------------------------------------------------- statistics


@dataclass
class Statistics:
    """What calibration found, by value name. ``minimum``, ``maximum``: over everything seen; ``peaks``: largest magnitude of every
    channel (last axis of a product's input, axis 1 of a convolution's); ``moments``: ``X.T X`` in f64 over the rows of
    :func:`product_rows`, [K, K] (with groups [groups, K, K]); ``rows``: how many; ``smallest``: least magnitude that is not 0."""

    minimum: dict[str, float] = field(default_factory=dict)
    maximum: dict[str, float] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    peaks: dict[str, Array] = field(default_factory=dict)
    moments: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    batches: int = 0

    def hessian(self, layer: Layer) -> Array:
        """``X.T X / rows`` of the layer's input, f64 [K, K] or [groups, K, K]. Raises InputError when it was not collected."""
        key = _moment_key(layer)
        if key not in self.moments:
            raise InputError("no activation statistics were collected for this layer", node=layer.name, op=layer.node.op, hint="pass it to collect(hessians=...)")
        return self.moments[key] / max(1, self.rows[key])

    def samples(self, layer: Layer) -> int:
        """Rows behind :meth:`hessian`."""
        return self.rows.get(_moment_key(layer), 0)

    def second_moments(self, layer: Layer) -> Array:
        """Mean square of every column of the layer's input, f64 [K] or [groups, K]."""
        return np.ascontiguousarray(np.diagonal(self.hessian(layer), axis1=-2, axis2=-1))


def _moment_key(layer: Layer) -> str:
    if not layer.is_conv:
        return layer.x.name
    assert layer.weight.data is not None
    a = layer.node.attrs
    return f"{layer.x.name}|{layer.weight.data.shape[1:]}{[a.get(k) for k in ('strides', 'pads', 'dilations', 'group', 'auto_pad')]}"


def collect(
    graph: Graph, data: Sequence[Feed], *, ranges: Sequence[Value] = (), histograms: Sequence[Value] = (), peaks: Sequence[Layer] = (),
    hessians: Sequence[Layer] = (), max_rows: int = 4096, progress: bool = False,
) -> Statistics:
    """Run ``data`` (of :func:`read_data`) and reduce. ``ranges``: values whose extremes are wanted; ``histograms``: values whose distribution
    is; ``peaks``, ``hessians``: layers whose inputs' statistics are (layers that read one value share them). ``max_rows``: rows of
    one batch and layer that go into a Hessian, evenly spaced.

    Raises InputError when a value turns out NaN or infinite, naming it; and what compiling and running raise."""
    stats = Statistics()
    by_peak = {layer.x.name: layer for layer in peaks}
    by_moment = {_moment_key(layer): layer for layer in hessians}
    limits = {v.name for v in (*ranges, *histograms)}
    shapes = {v.name for v in histograms}
    wanted = [*ranges, *histograms, *(layer.x for layer in by_peak.values()), *(layer.x for layer in by_moment.values())]

    def visit(number: int, arrays: dict[str, Array]) -> None:
        stats.batches += 1
        for name in limits:
            _reduce_range(stats, name, arrays[name], name in shapes)
        for name, layer in by_peak.items():
            x = np.abs(check_finite(name, arrays[name]))
            axis = 1 if layer.is_conv else x.ndim - 1
            top = x.max(tuple(i for i in range(x.ndim) if i != axis))
            stats.peaks[name] = np.maximum(stats.peaks[name], top) if name in stats.peaks else top
        for key, layer in by_moment.items():
            rows = product_rows(layer, check_finite(layer.x.name, arrays[layer.x.name]))
            step = -(-rows.shape[-2] // max_rows)
            rows = rows[..., ::step, :]
            moment = np.matmul(np.swapaxes(rows, -1, -2), rows).astype(np.float64)
            stats.moments[key] = stats.moments[key] + moment if key in stats.moments else moment
            stats.rows[key] = stats.rows.get(key, 0) + rows.shape[-2]

    run_batches(graph, data, wanted, visit, progress)
    return stats


def check_finite(name: str, x: Array) -> Array:
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all():
        raise InputError(f'value "{name}" is NaN or infinite on the calibration data', hint="check the data and the model in f32 first")
    return x


def _reduce_range(stats: Statistics, name: str, x: Array, shape: bool) -> None:
    if not x.size:
        return
    x = check_finite(name, x)
    stats.minimum[name] = min(stats.minimum.get(name, np.inf), float(x.min()))
    stats.maximum[name] = max(stats.maximum.get(name, -np.inf), float(x.max()))
    magnitude = np.abs(x)
    nonzero = magnitude[magnitude > 0]
    if nonzero.size:
        stats.smallest[name] = min(stats.smallest.get(name, np.inf), float(nonzero.min()))
    if shape:
        stats.histograms.setdefault(name, Histogram()).add(x)
