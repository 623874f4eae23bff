"""The accuracy report of a quantization: error of every layer, error of the outputs on calibration data, size, expected speed.

Errors are normalised mean squares (NMSE): ``|got - want|^2 / |want|^2``; in decibels, ``-10 log10(NMSE)``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.codegen.targets.ceilings import Ceilings
    from luthier.ir.graph import Graph

__all__ = ["Difference", "LayerReport", "Report", "compare_graphs", "constant_bytes", "decibels"]

Array = np.ndarray[Any, Any]


def decibels(nmse: float) -> float:
    """Signal to noise; infinite for no error."""
    return math.inf if nmse <= 0 else -10 * math.log10(nmse)


@dataclass
class Difference:
    """Sums over everything added: ``error``: of squared differences; ``power``: of the squared reference; ``largest``: difference;
    ``dot``, ``other``: for the cosine; ``agree``: rows (last axis) whose largest element is at the same place."""

    error: float = 0.0
    power: float = 0.0
    largest: float = 0.0
    dot: float = 0.0
    other: float = 0.0
    rows: int = 0
    agree: int = 0
    elements: int = 0

    def add(self, want: Array, got: Array) -> None:
        if not want.size:
            return
        a, b = np.asarray(want, np.float64), np.asarray(got, np.float64)
        d = b - a
        self.error += float(np.square(d).sum())
        self.power += float(np.square(a).sum())
        self.other += float(np.square(b).sum())
        self.dot += float((a * b).sum())
        self.largest = max(self.largest, float(np.abs(d).max()))
        if a.ndim:
            same = a.reshape(-1, a.shape[-1]).argmax(1) == b.reshape(-1, a.shape[-1]).argmax(1)
            self.rows, self.agree = self.rows + same.size, self.agree + int(same.sum())
        self.elements += a.size

    @property
    def nmse(self) -> float:
        return self.error / self.power if self.power else 0.0 if not self.error else math.inf

    @property
    def cosine(self) -> float:
        below = math.sqrt(self.power * self.other)
        return self.dot / below if below else 1.0 if not self.error else 0.0

    def as_json(self) -> dict[str, float]:
        top = self.agree / self.rows if self.rows else 1.0
        return {"nmse": self.nmse, "snr_db": _finite(decibels(self.nmse)), "cosine": self.cosine, "largest": self.largest, "same_argmax": top}


def _finite(v: float) -> float:
    return v if math.isfinite(v) else 999.0 if v > 0 else -999.0


@dataclass
class LayerReport:
    """``precision``: what its weights became; ``own``: NMSE of its output when only its weights are quantized (without calibration data of
    its weights); ``measured``: NMSE of its output inside the quantized model; ``note``: why it was left as it is."""

    name: str
    op: str
    precision: str
    rows: int
    columns: int
    bytes_before: int
    bytes_after: int
    own: float | None = None
    measured: float | None = None
    operations: float = 0.0
    note: str = ""


@dataclass
class Report:
    """``precision``, ``options``: what was asked for; ``outputs``: {output: error on the calibration data}; sizes in bytes of all
    constants; ``notes``: what the user should know (values kept in f32, bytes of tables)."""

    precision: str
    options: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    outputs: dict[str, Difference] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    batches: int = 0
    notes: list[str] = field(default_factory=list)
    speed: dict[str, float] = field(default_factory=dict)

    def estimate_speed(self, ceilings: Ceilings) -> None:
        """Fill ``speed``: an estimate from bytes and measured ceilings, no measurement of the model.

        Reading all constants once from where they fit, and the layers' f32 operations at the FMA peak; whichever is longer bounds a run. Integer
        kernels may go below the second number, nothing goes below the first."""
        compute = sum(layer.operations for layer in self.layers) / ceilings.flops / 1e6

        def reading(size: int) -> float:
            return size / ceilings.reads[ceilings.level(size)] / 1e6

        before, after = reading(self.bytes_before), reading(self.bytes_after)
        self.speed = {
            "weights_ms_before": before, "weights_ms_after": after, "f32_operations_ms": compute, "bound_ms_before": max(before, compute),
            "bound_ms_after": max(after, compute) if self.precision != "int8" else after, "threads": float(ceilings.threads),
        }  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Plain data; :meth:`save` writes it."""
        return {
            "precision": self.precision, "options": self.options, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "batches": self.batches,
            "outputs": {k: d.as_json() for k, d in self.outputs.items()}, "layers": [asdict(r) for r in self.layers], "notes": self.notes,
            "estimated_speed": self.speed,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write JSON. Raises InputError when that fails."""
        path = Path(path)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            scratch.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
            os.replace(scratch, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error}") from error

    def print(self, console: Console | None = None, top: int = 40) -> None:
        """Tables for a terminal; the ``top`` layers of largest error."""
        from rich.console import Console
        from rich.table import Table

        console = console or Console(highlight=False)
        table = Table(box=None, pad_edge=False)
        for title, justify in (("layer", "left"), ("operator", "left"), ("weights", "left"), ("kB before", "right"), ("after", "right"), ("own NMSE", "right"), ("in the model", "right"), ("dB", "right")):
            table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
        ranked = sorted(self.layers, key=lambda r: -(r.measured if r.measured is not None else r.own or 0.0))
        for r in ranked[:top]:
            error = r.measured if r.measured is not None else r.own
            table.add_row(
                r.name, f"{r.op} {r.rows}x{r.columns}", r.precision + (f" ({r.note})" if r.note else ""), f"{r.bytes_before / 1e3:.1f}", f"{r.bytes_after / 1e3:.1f}",
                "-" if r.own is None else f"{r.own:.2e}", "-" if r.measured is None else f"{r.measured:.2e}", "-" if error is None else f"{decibels(error):.1f}",
            )  # fmt: skip
        console.print(table)
        if len(ranked) > top:
            console.print(f"and {len(ranked) - top} more layers")
        for name, d in self.outputs.items():
            share = 100 * d.agree / d.rows if d.rows else 100.0
            console.print(
                f"output {name}: NMSE {d.nmse:.3e} ({decibels(d.nmse):.1f} dB), cosine {d.cosine:.6f}, largest difference {d.largest:.4g}, "
                f"same largest element in {share:.1f} % of {d.rows} rows ({self.batches} calibration batches)"
            )
        if not self.outputs:
            console.print("no calibration data: errors are those of the weights alone")
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        console.print(f"constants: {self.bytes_before / 1e6:.2f} MB -> {self.bytes_after / 1e6:.2f} MB ({ratio:.2f}x smaller)")
        if self.speed:
            s = self.speed
            console.print(
                f"expected speed (an estimate from bytes and measured ceilings, {s['threads']:.0f} thread(s), not a measurement): reading the weights "
                f"{s['weights_ms_before']:.3f} -> {s['weights_ms_after']:.3f} ms a run, f32 operations {s['f32_operations_ms']:.3f} ms"
            )
        for note in self.notes:
            console.print(f"note: {note}")


def constant_bytes(graph: Graph) -> int:
    """Bytes of all constants that nodes read, each once."""
    from luthier.ir.graph import all_nodes

    seen = {v: int(math.ceil(v.data.size * v.dtype.itemsize)) for n in all_nodes(graph) for v in n.inputs if v is not None and v.data is not None}
    return sum(seen.values())


def compare_graphs(
    reference: Graph, quantized: Graph, data: Sequence[Mapping[str, Array]], layers: Mapping[str, tuple[Any, Any]], detail: int = 4,
    track: Callable[[Sequence[Any], str, bool], Any] | None = None, progress: bool = False,
) -> tuple[dict[str, Difference], dict[str, Difference], dict[str, int]]:
    """({output: difference}, {layer: difference}, {layer: elements of its output in a batch}).

    ``layers``: {name: (value of the reference, value of the quantized graph)}, compared on the first ``detail`` batches; outputs on all,
    from a module without additional outputs."""
    from luthier.quantization.calibrate import tap, tracked

    want, plain = tap(reference, [a for a, _ in layers.values()]), tap(quantized)
    inner = tap(quantized, [b for _, b in layers.values()]) if layers and detail else None
    outputs: dict[str, Difference] = {}
    inside = {name: Difference() for name in layers}
    sizes: dict[str, int] = {}
    for number, feed in enumerate((track or tracked)(data, "measuring the error", progress)):
        feed = dict(feed)
        left, right = want(feed), plain(feed)
        for name, _ in reference.results():
            if left[name].dtype.kind == "f" or "float" in left[name].dtype.name:
                outputs.setdefault(name, Difference()).add(left[name], right[name])
        if inner is not None and number < detail:
            taps = inner(feed)
            for name, (a, b) in layers.items():
                if a.name in left and b.name in taps:
                    inside[name].add(left[a.name], taps[b.name])
                    sizes[name] = left[a.name].size
    return outputs, {k: d for k, d in inside.items() if d.elements}, sizes
