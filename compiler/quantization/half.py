"""f16 and bf16 with sums in f32, and the audit that names the nodes whose values f16 cannot hold.

f16 holds magnitudes from 6e-8 to 65504; bf16 has the range of f32. The audit runs the model in f32 on calibration data and looks at every
value; without data only constants are known. Nodes that read or make a value out of range stay in f32.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.ir.dtypes import f32
from luthier.ir.graph import Graph, Node, Value
from luthier.passes.quantize.cast_half import OPERATORS, cast_half
from luthier.quantization.calibrate import Feed, run_batches
from luthier.quantization.report import LayerReport

__all__ = ["Finding", "audit_range", "quantize_half"]

Array = np.ndarray[Any, Any]
LARGEST, LEAST_NORMAL, LEAST = 65504.0, 2.0**-14, 2.0**-24


@dataclass(frozen=True)
class Finding:
    """``what``: ``overflows`` (the magnitude exceeds half of 65504, so that other data may exceed it), ``underflows`` (all of the value lies
    below the normal numbers of f16) or ``vanishes`` (a constant other than 0 becomes 0); ``value``, ``magnitude``: which and how large."""

    node: Node
    what: str
    value: str
    magnitude: float

    def __str__(self) -> str:
        return f'node "{self.node.name}" ({self.node.op}) stays in f32: {self.value} {self.what} in f16 (magnitude {self.magnitude:.3g})'


def audit_range(graph: Graph, data: Sequence[Feed] = (), progress: bool = False) -> list[Finding]:
    """Nodes of the main graph that f16 would break, each with its worst value; in graph order. Raises what running raises."""
    nodes = [n for n in graph.nodes if n.op in OPERATORS]
    watched = list(dict.fromkeys(v for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and v.dtype is f32))
    tops: dict[str, float] = {v.name: _top(v.data) for v in watched if v.data is not None}
    if data:

        def visit(number: int, arrays: dict[str, Array]) -> None:
            for v in watched:
                if v.name in arrays:
                    tops[v.name] = max(tops.get(v.name, 0.0), _top(arrays[v.name]))

        run_batches(graph, data, [v for v in watched if v.data is None and v not in graph.inputs], visit, progress, "range audit")
    found = []
    for n in nodes:
        worst: Finding | None = None
        for v in dict.fromkeys((*n.inputs, *n.outputs)):
            if v is None or v.dtype is not f32 or v.name not in tops:
                continue
            f = _judge(n, v, tops[v.name])
            if f is not None and (worst is None or f.magnitude > worst.magnitude):
                worst = f
        if worst is not None:
            found.append(worst)
    return found


def _top(a: Array) -> float:
    """Largest finite magnitude; infinities are infinities in f16 as well."""
    b = np.abs(np.asarray(a, np.float32))
    b = b[np.isfinite(b)]
    return float(b.max()) if b.size else 0.0


def _judge(n: Node, v: Value, top: float) -> Finding | None:
    if top > LARGEST / (1 if v.data is not None else 2):
        return Finding(n, "overflows", v.name, top)
    if v.data is not None and 0 < top < LEAST:
        return Finding(n, "vanishes", v.name, top)
    if 0 < top < LEAST_NORMAL:
        return Finding(n, "underflows", v.name, top)
    return None


def quantize_half(graph: Graph, kind: str, data: Sequence[Feed], exclude: Sequence[str], rows: dict[str, LayerReport], progress: bool = False) -> list[str]:
    """Change ``graph`` in place; notes for the report."""
    notes = []
    keep = [n for n in graph.nodes if any(fnmatch.fnmatch(n.name, p) for p in exclude)]
    if kind == "f16":
        findings = audit_range(graph, data, progress)
        keep += [f.node for f in findings]
        notes += [str(f) for f in findings]
        if not data:
            notes.append("without calibration data the range audit saw constants only")
    kept = {n.name for n in keep}
    cast_half(graph, kind, keep)
    for name, row in rows.items():
        if name in kept:
            row.note = row.note or "out of the range of f16"
        else:
            row.precision, row.bytes_after, row.note = kind, row.bytes_before // 2, ""
    return notes
