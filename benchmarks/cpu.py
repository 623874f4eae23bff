"""The speed table: Luthier against other CPU runtimes on real models, f32 arithmetic, the same static shapes.

    python benchmarks/cpu.py [--models A,B] [--peers A,B] [--threads 1,2] [--rounds N] [--json FILE] [--save] [--profile]
                             [--stat median|min] [--realtime] [--merge JSON ...] [--report [JSON]]

Every runtime has a process of its own, pinned to as many cores as it has threads. In each round every runtime takes
one turn, in an order that alternates, while all others are stopped (SIGSTOP). Each call gets other inputs than the
call before. Shown are medians, or minima; on a machine that others use too, `--realtime` keeps them off the cores of
the runtime whose turn it is (their share of caches and memory bandwidth remains); the ratio of a row is best peer / luthier, and the geometric mean counts a row at most
at 1.5.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.models import ModelCase, get  # noqa: E402
from benchmarks.peers_driver import PEERS, Peer, PeerError  # noqa: E402
from benchmarks.roofline_report import below_level, profile  # noqa: E402
from benchmarks.roofline_report import write as write_report  # noqa: E402
from luthier.cli.tools import summary as roofline_summary  # noqa: E402
from luthier.cli.tools import table as roofline_table  # noqa: E402

MODELS = (
    "minilm resnet50 mobilenetv2 vit-tiny gpt2 rapidocr-det rapidocr-rec rapidocr-cls silero silero-ifless mlp".split()
)
# The rows of the geometric mean.
SCORED = "minilm resnet50 mobilenetv2 vit-tiny gpt2 rapidocr-det rapidocr-rec rapidocr-cls silero".split()
CAP = 1.5
TURN_MS = 250.0
ROOF_RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """Names this machine: processor, cores, vector extensions, system."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", text)
    family = re.search(r"cpu family\s*: (\d+)", text)
    flags = set((re.search(r"flags\s*: (.*)", text) or [""])[0].split())
    known = "sse4_2 avx2 fma avx512f avx512_vnni avx512_bf16 avx_vnni amx_tile".split()
    return {
        "cpu": (name[1] if name else platform.processor()) + (f" (family {family[1]})" if family else ""),
        "cores": len(os.sched_getaffinity(0)),
        "extensions": [flag for flag in known if flag in flags],
        "system": platform.platform(),
        "date": datetime.date.today().isoformat(),
    }


def difference(ours: list[np.ndarray[Any, Any]], theirs: list[np.ndarray[Any, Any]]) -> float:
    """The largest difference of any output, over that output's largest magnitude; infinity where shapes differ."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=False):
        if a.size != b.size:
            return math.inf
        scale = float(np.abs(b.astype(np.float64)).max(initial=1e-30))
        gap = float(np.abs(a.astype(np.float64).ravel() - b.astype(np.float64).ravel()).max(initial=0.0))
        worst = max(worst, gap / scale if math.isfinite(gap) else math.inf)
    return worst


def measure(case: ModelCase, labels: list[str], threads: int, rounds: int, console: Console, realtime: bool = False) -> Row:
    """Times one model on every runtime: {'model', 'threads', 'peers': {label: result or error}}."""
    model = case.name
    available = sorted(os.sched_getaffinity(0))
    if len(available) < threads:
        raise SystemExit(f"{threads} threads asked for, {len(available)} cores to be had")
    cpus = available[-threads:]
    peers: list[Peer] = []
    row: Row = {"model": model, "threads": threads, "peers": {}}
    reference: list[np.ndarray[Any, Any]] | None = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for label in labels:
                log = ROOT / "build" / "peers" / "logs" / f"{model}-{label}-{threads}.log"
                try:
                    peer = Peer(label, case, threads, cpus, log)
                    got = peer.outputs(Path(folder) / "out.npz")
                except PeerError as error:
                    row["peers"][label] = {"error": str(error)}
                    console.print(f"[dim]{model}, {label}: {str(error)[:200]}[/dim]", markup=True, highlight=False)
                    continue
                if label == "onnxruntime" or reference is None:
                    reference = got
                peers.append(peer)
                row["peers"][label] = {**peer.loaded, "agrees": difference(got, reference) <= case.agreement}
        counts: dict[str, int] = {}
        for peer in peers:
            typical = peer.turn(1, 0, realtime)[0]
            if typical < 500:
                typical = statistics.median(peer.turn(3, 2, realtime))
            counts[peer.label] = max(3 if typical < 500 else 1, min(300, math.ceil(TURN_MS / max(typical, 1e-3))))
        for round_ in range(rounds):
            for peer in peers if round_ % 2 == 0 else peers[::-1]:
                count = counts[peer.label]
                warm = 0 if count == 1 else max(1, min(20, count // 8))
                peer.times.append(peer.turn(count, warm, realtime))
        for peer in peers:
            everything = [t for times in peer.times for t in times]
            by_round = [statistics.median(times) for times in peer.times]
            result = row["peers"][peer.label]
            result["median_ms"] = statistics.median(everything)
            result["min_ms"] = min(everything)
            result["rounds_ms"] = by_round
    finally:
        for peer in peers:
            peer.close()
    return row


def best_peer(row: Row, key: str) -> tuple[str, float] | None:
    """The fastest runtime of a row that is not Luthier, among those whose results agree."""
    times = {
        label: result[key]
        for label, result in row["peers"].items()
        if label != "luthier" and key in result and result["agrees"]
    }
    label = min(times, key=lambda name: times[name], default=None)
    return None if label is None else (label, times[label])


def mean_ratio(rows: list[Row], key: str) -> tuple[float, int] | None:
    """The geometric mean of min(CAP, best peer / luthier) over the scored rows, and how many there are."""
    logs = []
    for row in rows:
        ours = row["peers"].get("luthier", {}).get(key)
        best = best_peer(row, key)
        if row["model"] in SCORED and ours is not None and best is not None:
            logs.append(math.log(min(CAP, best[1] / ours)))
    return (math.exp(sum(logs) / len(logs)), len(logs)) if logs else None


def cell(result: dict[str, Any] | None, key: str, best: bool) -> str:
    """A runtime's time, marked when it is the best, when its result disagrees, and `-` when it failed."""
    if result is None or key not in result:
        return "-"
    text = f"{result[key]:.3g}" if result[key] < 100 else f"{result[key]:.0f}"
    if not result["agrees"]:
        return f"{text} (wrong)"
    return f"*{text}*" if best else text


def table_rows(rows: list[Row], labels: list[str], key: str) -> list[list[str]]:
    """The cells of the table, header first."""
    head = ["model", *labels, *(["ratio"] if "luthier" in labels else [])]
    lines = [head]
    for row in rows:
        best = best_peer(row, key)
        line = [row["model"]]
        for label in labels:
            line.append(cell(row["peers"].get(label), key, best is not None and best[0] == label))
        ours = row["peers"].get("luthier", {}).get(key)
        if "luthier" in labels:
            line.append(f"{best[1] / ours:.2f}" if ours is not None and best is not None else "-")
        lines.append(line)
    return lines


def markdown(lines: list[list[str]]) -> str:
    """A table of cells in Markdown."""
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "---|" * len(lines[0]))
    return "\n".join(text)


def report(rows: list[Row], labels: list[str], how: str) -> str:
    """The whole result as Markdown: conditions, then a table of medians, minima and load times per thread count."""
    about = machine()
    versions = {n: r["version"] for row in rows for n, r in row["peers"].items() if "version" in r}
    text = [
        f"# CPU runtimes, {about['date']}",
        f"{about['cpu']}, {about['cores']} cores, {' '.join(about['extensions'])}; {about['system']}.",
        f"{', '.join(f'{n} {v}' for n, v in versions.items())}.",
        f"{how}, every other runtime stopped between turns, pinned, other inputs each call; milliseconds. "
        "The best peer of a row is marked with *; ratio: best peer / luthier.",
    ]
    for threads in sorted({row["threads"] for row in rows}):
        chosen = [row for row in rows if row["threads"] == threads]
        for key, title in (("median_ms", "median"), ("min_ms", "minimum")):
            text.append(f"## {threads} thread{'s' if threads > 1 else ''}, {title}")
            text.append(markdown(table_rows(chosen, labels, key)))
            mean = mean_ratio(chosen, key)
            if mean:
                text.append(f"Geometric mean over {mean[1]} rows, each at most {CAP}: **{mean[0]:.3f}**")
        text.append(f"## {threads} thread{'s' if threads > 1 else ''}, seconds to load or compile")
        load = [["model", *labels]]
        for row in chosen:
            found = [row["peers"].get(label, {}).get("load_s") for label in labels]
            load.append([row["model"], *("-" if s is None else f"{s:.2f}" for s in found)])
        text.append(markdown(load))
    failures = [
        f"- {row['model']}, {label}: {result['error'].splitlines()[0][:160]}"
        for row in rows
        for label, result in row["peers"].items()
        if "error" in result and row["threads"] == rows[0]["threads"]
    ]
    if failures:
        text += ["## What did not run", "\n".join(failures)]
    return "\n\n".join(text) + "\n"


def merged(files: list[Path]) -> list[Row]:
    """The rows of several saved runs; of a runtime measured more than once, the run with the lowest median."""
    rows: dict[tuple[str, int], Row] = {}
    for file in files:
        for row in json.loads(file.read_text())["rows"]:
            kept = rows.setdefault((row["model"], row["threads"]), {**row, "peers": {}})
            for label, result in row["peers"].items():
                before = kept["peers"].get(label, {}).get("median_ms", math.inf)
                if result.get("median_ms", math.inf) < before or label not in kept["peers"]:
                    kept["peers"][label] = result
    return list(rows.values())


def main() -> int:
    """Command line; see the module's docstring. Exit code 1 when Luthier was asked for and failed somewhere."""
    parser = argparse.ArgumentParser(description="Luthier against other CPU runtimes")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--stat", choices=("median", "min"), default="median", help="what the printed tables show")
    parser.add_argument("--realtime", action="store_true", help="precedence over other processes during a turn; needs root")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--save", nargs="?", const="cpu", metavar="NAME", help="write benchmarks/results/NAME.md and .json")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="show runs written before instead of measuring")
    parser.add_argument("--profile", action="store_true", help="only Luthier's kernels, against the measured roofline")
    parser.add_argument(
        "--report", nargs="?", type=Path, const=ROOF_RESULTS / "cpu_zen3.json", metavar="JSON",
        help="explain the rows of this saved table that another runtime wins, kernel by kernel: results/roofline_<threads>.md",
    )  # fmt: skip
    args = parser.parse_args()
    console = Console(width=int(os.environ.get("COLUMNS", "150")))
    models, labels = args.models.split(","), args.peers.split(",")
    unknown = [label for label in labels if label not in PEERS]
    if unknown:
        parser.error(f"no peers named {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if args.profile:
        for threads in (int(t) for t in args.threads.split(",")):
            for model in models:
                kernels = profile(model, threads)
                console.print(roofline_table(kernels, 40))
                console.print(roofline_summary(kernels), highlight=False)
        return 0
    if args.report:
        saved = merged([args.report])
        chosen = [r for r in below_level(saved, best_peer) if r[0] in models and str(r[1]) in args.threads.split(",")]
        for path in write_report(chosen, ROOF_RESULTS, machine()):
            console.print(f"saved {path}")
        return 0
    rows: list[Row] = merged(args.merge) if args.merge else []
    for threads in () if args.merge else tuple(int(t) for t in args.threads.split(",")):
        for model in models:
            row = measure(get(model), labels, threads, args.rounds, console, args.realtime)
            rows.append(row)
            line = "  ".join(
                f"{label} {result['median_ms']:.3g} ({result['min_ms']:.3g})"
                for label, result in row["peers"].items()
                if "median_ms" in result
            )
            console.print(f"{model}, {threads} thr: {line}", highlight=False)
            if args.json:
                args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    for threads in sorted({row["threads"] for row in rows}):
        chosen = [row for row in rows if row["threads"] == threads]
        lines = table_rows(chosen, labels, f"{args.stat}_ms")
        table = Table(*lines[0], title=f"{threads} thread{'s' if threads > 1 else ''}, {args.stat} ms")
        for line in lines[1:]:
            table.add_row(*line)
        console.print(table)
        mean = mean_ratio(chosen, f"{args.stat}_ms")
        if mean:
            console.print(f"geometric mean over {mean[1]} rows, each at most {CAP}: {mean[0]:.3f}")
    if args.save:
        how = f"{args.rounds} rounds"
        if args.merge:
            how = f"{len(args.merge)} runs, of which the one with the lowest median counts for each runtime and row"
        elif args.realtime:
            how += ", real-time priority during a turn"
        folder = ROOT / "benchmarks" / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{args.save}.md").write_text(report(rows, labels, how))
        (folder / f"{args.save}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        console.print(f"saved {folder / args.save}.md and .json")
    failed = [row["model"] for row in rows if "error" in row["peers"].get("luthier", {})]
    if failed:
        console.print(f"luthier failed on {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
