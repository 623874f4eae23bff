"""How long a cold compilation takes, and how much memory: one fresh process a measurement, an empty object cache.

    python benchmarks/compile_time.py [MODEL ...] [--rounds 5] [--save NAME]
    python benchmarks/compile_time.py [MODEL ...] --packages   # luthier compile MODEL --target=wasm|webgpu, all files written

The clock starts when the process starts, imports of Python packages included, and stops when the module (onnxruntime: the
session) can be called. Rounds of both runtimes alternate. Shapes are pinned as in ``cpu.py``. Peak memory is the resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks import models
from benchmarks.peers_driver import pinned_model

BARS = {"minilm": 1.5, "mobilenetv2": 1.5, "resnet50": 2.5}  # seconds

_WORK = {
    "luthier": "import luthier; m = luthier.compile(path, shapes=shapes)",
    "onnxruntime": "import onnxruntime; m = onnxruntime.InferenceSession(pinned, providers=['CPUExecutionProvider'])",
}
_SCRIPT = """
import json, os, resource, sys, time
path, pinned, shapes = json.loads(sys.argv[1])
{work}
ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
now = time.clock_gettime(time.CLOCK_BOOTTIME)
print(json.dumps([now - ticks / os.sysconf("SC_CLK_TCK"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def once(runtime: str, job: str) -> tuple[float, float]:
    """(seconds, MB) of one fresh process. Raises CalledProcessError when it fails."""
    with tempfile.TemporaryDirectory() as cache:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"LUTHIER_CACHE_DIR": cache}
        r = subprocess.run([sys.executable, "-c", _SCRIPT.format(work=_WORK[runtime]), job], env=env, capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(r.stdout.splitlines()[-1])
    return seconds, megabytes


def packages(names: list[str], rounds: int) -> Table:
    """Wall time of the command line from its start to its end, a complete package in a new folder each time, extents left open."""
    table = Table("model", "target", "s", "(least)", "bar s", title="cold compilation to a web package, medians")
    for name in names:
        for target in ("wasm", "webgpu"):
            times: list[float] = []
            for k in range(rounds + 1):
                with tempfile.TemporaryDirectory() as folder:
                    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"LUTHIER_CACHE_DIR": f"{folder}/cache"}
                    command = [sys.executable, "-m", "luthier", "compile", str(models.get(name).path), f"--target={target}", "-o", f"{folder}/out"]
                    start = time.perf_counter()
                    subprocess.run(command, env=env, capture_output=True, check=True)
                    if k:  # the first fills the file cache and writes bytecode
                        times.append(time.perf_counter() - start)
            table.add_row(name, target, f"{statistics.median(times):.2f}", f"{min(times):.2f}", "2.0" if name == "minilm" else "")
    return table


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", default=list(BARS))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json")
    p.add_argument("--packages", action="store_true", help="web packages by the command line")
    args = p.parse_args()
    console = Console()
    if args.packages:
        console.print(packages(args.models if args.models != list(BARS) else ["minilm"], args.rounds))
        return 0
    table = Table("model", "file MB", "luthier s", "(least)", "bar s", "onnxruntime s", "luthier MB", "bar MB", title="cold compilation, medians")
    rows: list[dict[str, Any]] = []
    for name in args.models:
        case = models.get(name)
        shapes = case.shapes
        job = json.dumps([str(case.path), str(pinned_model(case)), {k: list(v) for k, v in (shapes or {}).items()} or None])
        once("luthier", job)  # bytecode and file cache, as after an installation
        runs: dict[str, list[tuple[float, float]]] = {r: [] for r in _WORK}
        for _ in range(args.rounds):
            for r in _WORK:
                runs[r].append(once(r, job))
        times = {r: [t for t, _ in v] for r, v in runs.items()}
        size = case.path.stat().st_size / 1e6
        row = {
            "model": name, "file_mb": size, "seconds": times["luthier"], "onnxruntime_seconds": times["onnxruntime"],
            "peak_mb": max(m for _, m in runs["luthier"]), "bar_seconds": BARS.get(name), "bar_mb": 3 * size + 300,
        }  # fmt: skip
        rows.append(row)
        bar = BARS.get(name)
        table.add_row(
            name, f"{size:.0f}", f"{statistics.median(times['luthier']):.2f}", f"{min(times['luthier']):.2f}", "" if bar is None else f"{bar}",
            f"{statistics.median(times['onnxruntime']):.2f}", f"{row['peak_mb']:.0f}", f"{row['bar_mb']:.0f}",
        )  # fmt: skip
    console.print(table)
    if args.save:
        out = Path(__file__).parent / "results" / f"{args.save}.json"
        out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
