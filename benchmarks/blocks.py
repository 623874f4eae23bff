"""Usual building blocks by themselves, each beside onnxruntime and beside what this machine can do at most; worst first.

    python benchmarks/blocks.py [NAME ...] [--threads N] [--rounds N] [--before PYTHON] [--wasm] [--json FILE] [--save NAME]

A name may be a pattern (`conv*`). Runtimes take turns in processes of their own, as in `cpu.py`; the open extents of a block stay open
for both. `--before`: the interpreter of another tree's environment, measured in the same turns. `--wasm`: in headless Chromium, relaxed
SIMD, beside onnxruntime-web (`web.py prepare`'s files; open extents are those of the call there).

`of ceiling` is the least time of a block over Luthier's: its products at the measured peak of f32 multiply-adds, or its inputs, outputs
and weights, each byte once, at the measured bandwidth of the level that holds them, whichever is longer. It can exceed 100 % where a
product takes fewer operations than its sum has (Winograd). The error is the largest difference from onnxruntime's answer over its
largest magnitude.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.block_nets import BLOCKS, Block, build  # noqa: E402
from benchmarks.models import ModelCase, model_dir  # noqa: E402

Row = dict[str, Any]
LOW = 0.9  # ratios below are listed at the end


def case_of(name: str) -> ModelCase:
    """The block as a model of the speed table, its file written."""
    import onnx

    block = build(name)
    path = model_dir() / ".blocks" / f"{name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(block.model, str(path))
    free = any(d.dim_param for v in block.model.graph.input for d in v.type.tensor_type.shape.dim)
    return ModelCase(f"block-{name}", path, lambda seed: build(name, seed).inputs, "", speed=True, pin=False, open=free, agreement=1e-3)


def least_ms(block: Block, ceilings: Any) -> tuple[float, str]:
    """(the time that no run goes below, what limits it)."""
    level = ceilings.level(block.moved)
    flops, moved = block.flops / ceilings.flops / 1e6, block.moved / ceilings.reads[level] / 1e6
    return (flops, "operations") if flops > moved else (moved, level)


def on_cpu(names: list[str], threads: int, rounds: int, realtime: bool) -> list[Row]:
    """One row a block: times by runtime, the ceiling."""
    from rich.console import Console

    from benchmarks.cpu import measure
    from luthier.codegen.targets.ceilings import measure as measure_ceilings

    console, ceilings = Console(width=150), measure_ceilings(threads)
    labels = ["luthier", *(["before"] if "LUTHIER_BEFORE" in os.environ else []), "onnxruntime"]
    rows = []
    for name in names:
        case, block = case_of(name), build(name)
        peers = measure(case, labels, threads, rounds, console, realtime)["peers"]
        row: Row = {"name": name, **{k: p["median_ms"] for k, p in peers.items() if "median_ms" in p}}
        row["least"], row["bound"] = least_ms(block, ceilings)
        row["wrong"] = [k for k, p in peers.items() if not p.get("agrees", True)]
        row["failed"] = {k: p["error"][:200] for k, p in peers.items() if "error" in p}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def on_wasm(names: list[str], rounds: int) -> list[Row]:
    """The same in Chromium, one thread."""
    import onnx

    from benchmarks import web
    from benchmarks.web_rows import RowSpec

    specs = []
    for name in names:
        block = build(name)
        sizes = {d.dim_param: n for v in block.model.graph.input for d, n in zip(v.type.tensor_type.shape.dim, block.inputs[v.name].shape, strict=True)}
        for v in block.model.graph.input:
            for d in v.type.tensor_type.shape.dim:
                d.dim_value = d.dim_value or sizes[d.dim_param]
        path = model_dir() / ".blocks" / f"{name}.static.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(block.model, str(path))
        specs.append(RowSpec(f"block-{name}", path, block.inputs))
    web.prepare(specs, ["wasm"])
    runtimes = [r for r in web.WASM if r[0] in ("luthier relaxed", "onnxruntime-web")]
    rows = []
    with web.Bench() as bench:
        for name, spec in zip(names, specs, strict=True):
            found = web.measure(bench, spec, runtimes, rounds, web.TURN_MS)
            row: Row = {"name": name, "failed": {k: r["failed"] for k, r in found.items() if "failed" in r}, "wrong": []}
            row |= {k.removesuffix(" relaxed").removesuffix("-web"): r["median"] for k, r in found.items() if "median" in r}
            row["wrong"] = [k for k, r in found.items() if r.get("error", 0) > 1e-3]
            rows.append(row)
            print(line(row), flush=True)
    return rows


def ratio(row: Row, other: str) -> float | None:
    """How many times faster than ``other``; None where one of the two did not run."""
    return row[other] / row["luthier"] if other in row and "luthier" in row else None


def line(row: Row) -> str:
    text = f"{row['name']:22s}" + "".join(f" {k} {row[k]:.4f}" for k in ("luthier", "before", "onnxruntime") if k in row)
    text += "".join(f"  {r:.2f}x {k}" for k in ("onnxruntime", "before") if (r := ratio(row, k)) is not None)
    return text + (f"  WRONG {row['wrong']}" if row["wrong"] else "") + "".join(f"  {k} failed: {e}" for k, e in row["failed"].items())


def mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if values else math.nan


def table(rows: list[Row]) -> list[list[str]]:
    """Cells, header first, worst ratio first."""
    before = any("before" in r for r in rows)
    out = [["block", "ms", "of ceiling", "bound", "onnxruntime", "ratio", *(["before", "gain"] if before else [])]]
    for r in sorted(rows, key=lambda r: ratio(r, "onnxruntime") or 0.0):
        ms = [f"{r[k]:.4g}" if k in r else "-" for k in ("luthier", "onnxruntime", "before")]
        share = f"{100 * r['least'] / r['luthier']:.0f} %" if "least" in r and "luthier" in r else "-"
        rel = [f"{x:.2f}" if x is not None else "-" for x in (ratio(r, "onnxruntime"), ratio(r, "before"))]
        out.append([r["name"], ms[0], share, r.get("bound", "-"), ms[1], rel[0], *([ms[2], rel[1]] if before else [])])
    return out


def summary(rows: list[Row]) -> str:
    """Means and the rows below the bar, in sentences."""
    found = {k: [(x, r["name"]) for r in rows if (x := ratio(r, k)) is not None] for k in ("onnxruntime", "before")}
    peer = sorted(found["onnxruntime"])
    low = ", ".join(f"{n} {x:.2f}" for x, n in peer if x < LOW)
    text = f"{len(rows)} blocks: {mean([x for x, _ in peer]):.3f}x of onnxruntime in the geometric mean; {sum(x < 1 for x, _ in peer)} under 1.0x; under {LOW}x: {low or 'none'}."
    if found["before"]:
        slower = ", ".join(f"{n} {x:.2f}" for x, n in sorted(found["before"]) if x < 0.95)
        text += f" {mean([x for x, _ in found['before']]):.3f}x of the tree before; slower by more than 5 %: {slower or 'none'}."
    bad = [r["name"] for r in rows if r["wrong"] or r["failed"]]
    return text + (f" Wrong or failed: {', '.join(bad)}." if bad else "")


def main() -> int:
    """Command line; see the module's docstring. Exit code 1 when a block failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names or patterns; default: all")
    parser.add_argument("--list", action="store_true", help="only list the names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", metavar="PYTHON", help="the interpreter of another tree's environment")
    parser.add_argument("--realtime", action="store_true", help="precedence over other processes during a turn; needs root")
    parser.add_argument("--wasm", action="store_true", help="in Chromium, beside onnxruntime-web")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.md")
    args = parser.parse_args()
    if args.before:
        os.environ["LUTHIER_BEFORE"] = args.before  # read when peers_driver is imported
    from benchmarks.cpu import machine, markdown

    names = [n for n in BLOCKS if not args.names or any(fnmatch.fnmatch(n, p) for p in args.names)]
    if not names:
        parser.error(f"no block matches {' '.join(args.names)}; --list names them")
    if args.list:
        print("\n".join(names))
        return 0
    rows = on_wasm(names, args.rounds) if args.wasm else on_cpu(names, args.threads, args.rounds, args.realtime)
    cells = table(rows)
    widths = [max(len(r[k]) for r in cells) for k in range(len(cells[0]))]
    print("\n" + "\n".join("  ".join(c.ljust(w) if k in (0, 3) else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True))) for r in cells))
    print("\n" + summary(rows))
    about = machine()
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
    if args.save:
        where = "Chromium, wasm with relaxed SIMD" if args.wasm else f"{args.threads} thread{'s' if args.threads > 1 else ''}"
        head = f"# Building blocks, {about['date']}\n\n{about['cpu']}, {' '.join(about['extensions'])}; {where}, {args.rounds} rounds, medians in milliseconds.\n\n"
        (ROOT / "benchmarks" / "results" / f"{args.save}.md").write_text(head + summary(rows) + "\n\n" + markdown(cells) + "\n")
    return 1 if any(r["failed"] or r["wrong"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
