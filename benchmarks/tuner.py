"""The autotuner judged: regret of its orders of trying against all points measured, and whole models tuned over untuned.

    python benchmarks/tuner.py --collect [--models A,B] [--targets cpu,cpu:x86-64-v3]     # measures every point; resumes
    python benchmarks/tuner.py --report [--save] [--train FILE]
    python benchmarks/tuner.py --whole [--models A,B] [--budget 30s] [--threads N] [--save]

Regret of a choice is its time over that of the best point of the kernel, by the geometric mean over kernels. A model's kernels are judged by
a ranker that saw none of them: it is trained on the other models' kernels. `best of n` takes the best of the first n that an order tries and
the default. Kernels that take less than 5 us or have fewer than four points are left out."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if p not in ("", str(ROOT))] + [str(ROOT)]
from benchmarks.models import get  # noqa: E402

MODELS = "rapidocr-det minilm mobilenetv2 silero vit-tiny resnet50 gpt2 rapidocr-rec nudenet minilm-dynamic".split()
STORE, OWNERS, RESULT = ROOT / "build" / "tuner.sqlite", ROOT / "build" / "tuner-owners.json", ROOT / "benchmarks" / "results" / "tuner.md"
SHORT = 5e-6
Group = list[tuple[str, float, list[float]]]
Order = Callable[[Group], Sequence[float]]


def collect(models: Sequence[str], targets: Sequence[str]) -> None:
    """Every point of every kernel, into the database, and which model a kernel is of."""
    from luthier.codegen.targets.target import parse_target
    from luthier.importers.onnx.importer import import_onnx
    from luthier.ir.op import load_all
    from luthier.pipeline import compile_program
    from luthier.tuner.tune import Tuner, Tuning

    load_all()
    owners: dict[str, list[str]] = json.loads(OWNERS.read_text()) if OWNERS.exists() else {}
    for target in targets:
        for name in models:
            case = get(name)
            shapes = {k: v.shape for k, v in case.make_inputs(0).items()}
            chosen = parse_target(target)
            started = time.perf_counter()
            with Tuner(chosen, Tuning(3600, exhaust=True, store=STORE), 1) as tuner:
                tuner.tune(lambda r, case=case, shapes=shapes, chosen=chosen: compile_program(import_onnx(str(case.path), shapes), chosen.caps, record=r))
                keys = [k.key for k in tuner.kernels]
            owners[name] = sorted({*owners.get(name, []), *keys})
            OWNERS.write_text(json.dumps(owners))
            print(f"{name} {target}: {len(keys)} kernels, {tuner.measured} measured in {time.perf_counter() - started:.0f} s", flush=True)


def mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else float("nan")


def regrets(groups: Sequence[Group], order: Order, tried: int) -> list[float]:
    """Of the best among the first ``tried`` of an order and the default; 0: what the order puts first, unmeasured."""
    out = []
    for g in groups:
        best = min(s for _, s, _ in g)
        score = order(g)
        ranked = sorted(range(len(g)), key=lambda i: score[i])
        picked = [ranked[0]] if tried == 0 else [0, *[i for i in ranked if i][:tried]]
        out.append(min(g[i][1] for i in picked) / best)
    return out


def report(save: bool, train: Path | None) -> None:
    """The table of regrets; ``train``: also writes a model trained on everything."""
    from luthier.tuner.database import Database
    from luthier.tuner.features import NAMES
    from luthier.tuner.model import analytic, describe
    from luthier.tuner.train import fit, groups, write

    with Database(STORE) as db:
        data = {k: g for k, g in groups(db.rows()).items() if g[0][1] >= SHORT}
    owners = json.loads(OWNERS.read_text())
    rng = np.random.default_rng(0)
    tries = (0, 4, 8)
    found: dict[str, dict[int, list[float]]] = {}
    rows, ratios = [], []
    for name in [m for m in MODELS if m in owners]:
        mine = [g for (key, _), g in data.items() if key in owners[name]]
        rest = [g for (key, _), g in data.items() if key not in owners[name]]
        if not mine or not rest:
            continue
        ranker = fit(rest)

        def learned(g: Group, ranker: Any = ranker) -> Sequence[float]:
            return list(ranker.score(np.array([describe(f, g[0][2]) for _, _, f in g])))

        orders: dict[str, Order] = {
            "XGBoost": learned, "analytic": lambda g: [analytic(f) for _, _, f in g], "random": lambda g: list(rng.random(len(g))),
            "as listed": lambda g: list(range(len(g))),
        }  # fmt: skip
        for label, order in orders.items():
            for n in tries:
                found.setdefault(label, {}).setdefault(n, []).extend(regrets(mine, order, n))
        default = [g[0][1] / min(s for _, s, _ in g) for g in mine]
        ratios += default
        one = regrets(mine, learned, 0)
        rows.append(f"| {name} | {len(mine)} | {mean(default):.3f} | {mean(one):.3f} | {max(one):.2f} | {mean(regrets(mine, learned, 4)):.3f} | {mean(regrets(mine, learned, 8)):.3f} |")
    count = len(ratios)
    lines = [
        f"{count} kernels of {len(rows)} models, {sum(map(len, data.values()))} points measured, {len(NAMES)} features. Targets: {', '.join(sorted({d.split(' ')[0] for _, d in data}))}.",
        "", "| order of trying | no measurement | worst | best of 4 | best of 8 |", "|---|---|---|---|---|",
        f"| the template's default | {mean(ratios):.3f} | {max(ratios):.2f} | | |",
        *(f"| {label} | {mean(f[0]):.3f} | {max(f[0]):.2f} | {mean(f[4]):.3f} | {mean(f[8]):.3f} |" for label, f in found.items()),
        "", "By model, with a ranker that was trained on the others:", "",
        "| model | kernels | default | first choice | worst | best of 4 | best of 8 |", "|---|---|---|---|---|---|---|", *rows,
    ]  # fmt: skip
    print("\n".join(lines))
    if train is not None:
        write(fit(list(data.values())), train)
        print(f"{train}: {train.stat().st_size / 1e3:.0f} KB")
    if save:
        keep("## Regret", lines)


def whole(models: Sequence[str], target: str, budget: str, threads: int, save: bool) -> None:
    """Models tuned over untuned, in turns."""
    import luthier
    from luthier.tuner.tune import Tuning

    lines = ["| model | untuned ms | tuned ms | ratio | tuning s | again s | untuned compile s | candidates |", "|---|---|---|---|---|---|---|---|"]
    ratios = []
    for name in models:
        case = get(name)
        inputs = case.make_inputs(0)
        shapes = {k: v.shape for k, v in inputs.items()}
        seconds: dict[str, float] = {}
        modules = {}
        tuning = Tuning.of(budget)
        for label, tune in (("untuned", False), ("tuned", tuning), ("again", Tuning.of(budget))):
            started = time.perf_counter()
            modules[label] = luthier.compile(case.path, target=target, shapes=shapes, threads=threads, tune=tune)
            seconds[label] = time.perf_counter() - started
        times: dict[str, list[float]] = {"untuned": [], "tuned": []}
        for turn in range(21):
            for label in ("untuned", "tuned") if turn % 2 else ("tuned", "untuned"):
                started = time.perf_counter()
                modules[label].run(inputs)
                times[label].append(time.perf_counter() - started)
        a, b = (statistics.median(times[k]) * 1e3 for k in ("untuned", "tuned"))
        ratios.append(a / b)
        lines.append(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.3f} | {seconds['tuned']:.1f} | {seconds['again']:.1f} | {seconds['untuned']:.1f} | {tuning.tried} |")
        print(lines[-1], flush=True)
    lines += ["", f"Geometric mean of {', '.join(models)}: {mean(ratios):.3f}. Target {target}, {threads} thread(s), budget {budget}."]
    print("\n".join(lines))
    if save:
        keep(f"## Whole models, {target}, {threads} thread(s)", lines)


def keep(title: str, lines: Sequence[str]) -> None:
    """Replaces one section of the kept results."""
    from benchmarks.cpu import machine

    text = RESULT.read_text() if RESULT.exists() else "# The autotuner (`python benchmarks/tuner.py`)\n"
    parts = [p for p in text.split("\n## ") if not p.startswith(title[3:] + "\n")]
    m = machine()
    parts.append(f"{title[3:]}\n\n{m['cpu']}, {m['date']}.\n\n" + "\n".join(lines) + "\n")
    RESULT.write_text("\n## ".join(p.rstrip("\n") + "\n" for p in parts))


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--collect", "--report", "--whole", "--save"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--targets", default="cpu,cpu:x86-64-v3")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--budget", default="30s")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.collect:
        collect(args.models.split(","), args.targets.split(","))
    if args.report:
        report(args.save, args.train)
    if args.whole:
        whole(args.models.split(","), args.targets.split(",")[0], args.budget, args.threads, args.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
