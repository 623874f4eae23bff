"""Why a row of the speed table is below level: each kernel of the model against the measured ceilings of the same session.

`benchmarks/cpu.py --report` writes `benchmarks/results/roofline_<threads>.md` for the rows of a saved table in which another
runtime is faster. Times of kernels are those of a profile, in which all threads meet after every kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.models import get
from luthier.codegen.targets.ceilings import Ceilings, measure
from luthier.debug.roofline import KernelRow, Roofline, analyse

TOP = 12


def below_level(rows: list[dict[str, Any]], best: Any) -> list[tuple[str, int, float, str, float]]:
    """(model, threads, our ms, the best peer, its ms) of every row that another runtime wins."""
    out = []
    for row in rows:
        ours = row["peers"].get("luthier", {}).get("median_ms")
        peer = best(row, "median_ms")
        if ours is not None and peer is not None and peer[1] < ours:
            out.append((row["model"], row["threads"], ours, *peer))
    return out


def profile(model: str, threads: int, ceilings: Ceilings | None = None) -> Roofline:
    """The roofline of a model of the speed table, at the table's shapes."""
    case = get(model)
    return analyse(case.path, case.make_inputs(0), shapes=case.shapes, threads=threads, ceilings=ceilings or measure(threads))


def grouped(rows: list[KernelRow]) -> list[dict[str, Any]]:
    """Calls of the same kernel in one line, those that lose most first."""
    groups: dict[str, list[KernelRow]] = {}
    for r in rows:
        groups.setdefault(r.kernel, []).append(r)
    out = []
    for name, calls in groups.items():
        ms, ideal = sum(r.ms for r in calls), sum(r.ideal_ms for r in calls)
        bounds = sorted({r.bound for r in calls})
        out.append({
            "kernel": name, "calls": len(calls), "ms": ms, "ideal": ideal, "lost": ms - ideal, "flops": sum(r.flops for r in calls),
            "bytes": sum(r.bytes for r in calls), "bound": "/".join(bounds), "nodes": calls[0].nodes,
        })  # fmt: skip
    return sorted(out, key=lambda g: -g["lost"])


def section(report: Roofline, row: tuple[str, int, float, str, float] | None) -> str:
    """One model as Markdown."""
    lines = [f"## {report.model}", ""]
    if row is not None:
        lines.append(f"The table has luthier at {row[2]:.3g} ms and {row[3]} at {row[4]:.3g} ms (ratio {row[4] / row[2]:.2f}).")
    run, ideal, prof = report.run_ms, report.ideal_ms, report.profile_ms
    small = [r for r in report.rows if r.ideal_ms < 1e-3]
    lines += [
        f"Measured for this report: {run:.3f} ms a run; {len(report.rows)} kernel calls take {prof:.3f} ms, at the ceilings they would take {ideal:.3f} ms: "
        f"**{100 * ideal / run:.0f} % of the roofline**. {len(small)} calls with less than a microsecond of work take {sum(r.ms for r in small):.3f} ms.",
        "", "| lost ms | ms | ideal | of ceiling | Mop | MB | op/byte | GFLOP/s | bound | calls | kernel | first nodes |", "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    groups = grouped(report.rows)
    for g in groups[:TOP]:
        lines.append(
            f"| {g['lost']:.3f} | {g['ms']:.3f} | {g['ideal']:.3f} | {100 * g['ideal'] / g['ms'] if g['ms'] else 0:.0f} % | {g['flops'] / 1e6:.1f} | {g['bytes'] / 1e6:.2f} | "
            f"{g['flops'] / max(g['bytes'], 1):.1f} | {g['flops'] / g['ms'] / 1e6 if g['ms'] else 0:.1f} | {g['bound']} | {g['calls']} | `{g['kernel']}` | {', '.join(g['nodes'])[:60]} |"
        )
    rest = groups[TOP:]
    if rest:
        lines.append(f"| {sum(g['lost'] for g in rest):.3f} | {sum(g['ms'] for g in rest):.3f} | {sum(g['ideal'] for g in rest):.3f} | | | | | | | {sum(g['calls'] for g in rest)} | {len(rest)} more kernels | |")
    return "\n".join(lines) + "\n"


def write(rows: list[tuple[str, int, float, str, float]], folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """A file for each number of threads; returns them."""
    out = []
    for threads in sorted({r[1] for r in rows}):
        ceilings = measure(threads)
        reads = ", ".join(f"{k} {v:.0f}" for k, v in ceilings.reads.items())
        text = [
            f"# Rows below level, {threads} thread{'s' if threads > 1 else ''}: kernels against the roofline, {about['date']}\n",
            f"{about['cpu']}, {about['cores']} cores, {' '.join(about['extensions'])}. Ceilings measured first: {ceilings.flops:.0f} GFLOP/s of f32 FMA; "
            f"reads, GB/s: {reads}. The ideal time of a kernel is the larger of its operations at that rate and its bytes, each once, at the bandwidth of the "
            "level that holds them (weights: the level that holds all weights). Lost: time minus ideal. Kernels with integer products count no operations here.\n",
        ]
        for row in rows:
            if row[1] == threads:
                text.append(section(profile(row[0], threads, ceilings), row))
        path = folder / f"roofline_{threads}.md"
        path.write_text("\n".join(text), encoding="utf-8")
        out.append(path)
    return out
