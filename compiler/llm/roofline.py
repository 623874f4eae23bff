"""``luthier roofline MODEL.gguf``: decoded tokens a second against the bandwidth limit, by precision and length of the context.

A step reads every weight but the embedding once (a row of that), and the keys and values of all positions so far. No step is faster than
these bytes at the bandwidth of the place where they all lie, measured on this machine. Arithmetic is not counted: at batch 1 it is not the
limit of a good kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.codegen.targets.ceilings import KINDS, bandwidth
from luthier.errors import TargetError

__all__ = ["PRECISIONS", "LanguageRoofline", "LanguageRow", "analyse_language", "table"]

# bits a weight with f16 scales (and, where marked, offsets) for groups of 32
PRECISIONS: dict[str, float] = {"f32": 32, "f16": 16, "8": 8.5, "6": 6.5, "5": 5.5, "4": 4.5, "3": 3.5, "2": 2.5, "ternary": 1.6 + 0.0625, "1": 1.5}


@dataclass
class LanguageRow:
    """``weights``, ``cache``: bytes that one step reads; ``limit``: tokens a second; ``measured``: the same, None where nothing was run."""

    precision: str
    context: int
    weights: float
    cache: float
    place: str
    limit: float
    measured: float | None = None


@dataclass
class LanguageRoofline:
    """``reads``: GB/s by place; ``parameters``: weights that a step reads."""

    model: str
    target: str
    threads: int
    parameters: int
    cache_bytes: int
    reads: dict[str, float]
    rows: list[LanguageRow] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _place(nbytes: float) -> str:
    return next((name for name, size in KINDS.items() if nbytes <= size), "DRAM")


def analyse_language(
    path: Path, target: str = "cpu", threads: int | None = None, contexts: Sequence[int] = (), runs: int = 30, reads: dict[str, float] | None = None
) -> LanguageRoofline:
    """Compile the file, time single steps after ``contexts`` positions (default: 1, 256, 1024, 2048 as far as the model goes), and tell the
    limits of it and of other precisions. ``reads``: bandwidths in GB/s, measured now when not given. Raises as :func:`luthier.llm.model.load`."""
    from luthier.codegen.targets.target import parse_target, usable_cores
    from luthier.importers.gguf.file import read_gguf
    from luthier.importers.gguf_llama import config
    from luthier.llm import model as llm

    chosen = parse_target(target)
    if not chosen.backend.measures_ceilings or chosen.missing_here():
        raise TargetError(f"the ceilings of {target} cannot be measured on this machine", hint="name a cpu target that runs here")
    c = config(read_gguf(path))
    lengths = [n for n in contexts or (1, 256, 1024, 2048) if n <= c.context]
    lm = llm.load(path, target, threads, capacity=max(lengths))
    n = threads or lm.module.threads or usable_cores()
    roof = reads or {name: bandwidth(size, n) for name, size in KINDS.items()}
    about = lm.about
    stored = lm.module.manifest["weights_bytes"] - about["picked_bytes"]
    out = LanguageRoofline(Path(path).stem, target, n, about["parameters"], about["cache_bytes"], roof)
    for length in lengths:
        out.rows.append(_row(f"file ({8 * stored / about['parameters']:.2f} bits)", length, stored, about["cache_bytes"], roof, _steps(lm, length, runs)))
    for name, bits in PRECISIONS.items():
        out.rows += [_row(name, length, about["parameters"] * bits / 8, about["cache_bytes"], roof) for length in lengths]
    return out


def _row(precision: str, context: int, weights: float, per_position: int, reads: dict[str, float], measured: float | None = None) -> LanguageRow:
    cache = float(context * per_position)
    place = _place(weights + cache)
    return LanguageRow(precision, context, weights, cache, place, reads[place] * 1e9 / (weights + cache), measured)


def _steps(lm: Any, context: int, runs: int) -> float:
    """Tokens a second of a step that is the sequence's token number ``context``."""
    times = []
    for _ in range(runs + 3):
        lm.tokens = [0] * (context - 1)
        start = time.perf_counter()
        lm.feed([0])
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times[3:])


def table(report: LanguageRoofline) -> Any:
    """A rich table."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for title in ("bits", "context", "weights, MB", "cache, MB", "from", "limit, tokens/s", "measured", "of the limit"):
        out.add_column(title, justify="left" if title in ("bits", "from") else "right")
    for r in report.rows:
        more = ("", "") if r.measured is None else (f"{r.measured:.1f}", f"{100 * r.measured / r.limit:.0f} %")
        out.add_row(r.precision, str(r.context), f"{r.weights / 1e6:.1f}", f"{r.cache / 1e6:.2f}", r.place, f"{r.limit:.1f}", *more)
    return out


def summary(report: LanguageRoofline) -> str:
    reads = ", ".join(f"{k} {v:.0f}" for k, v in report.reads.items())
    return f"{report.model}: {report.parameters / 1e6:.1f} million weights a step, {report.cache_bytes} bytes of cache a position; {report.threads} thread(s), reads, GB/s: {reads}"
