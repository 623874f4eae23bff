"""The tables of `benchmarks/web.py` as Markdown: `results/web_wasm.md`, `web_webgpu.md`, `web_first.md`."""

from __future__ import annotations

import datetime
import gzip
import math
import statistics
from typing import Any

from benchmarks.browser import NODE_MODULES
from benchmarks.web import ROOT, ROWS, WASM, WEBGPU, Runtime
from benchmarks.web_models import MODELS, PACKAGES, code_size

RESULTS = ROOT / "benchmarks" / "results"
BAR = 1e-3
ROUNDED = 2e-2  # rows a8: their node lets a runtime round activations to 8 bits (NMSE up to 5e-4), and runtimes differ in whether and how


def report(data: dict[str, Any]) -> None:
    """Writes and prints what ``data`` (the JSON file of `web.py`) holds."""
    if not data:
        raise SystemExit("nothing measured yet: run, gpu or first comes before report")
    head = f"{data['machine']}, Chromium {data['version']}, {datetime.date.today().isoformat()}. Milliseconds.\n"
    texts = {}
    if "run-wasm" in data:
        texts["web_wasm"] = ["# wasm in the browser\n", head, *speed(data["run-wasm"], WASM, True)]
    if "run-webgpu" in data or "gpu" in data:
        lines = ["# webgpu in the browser\n", head, *work(data.get("gpu", {}))]
        texts["web_webgpu"] = [*lines, *(speed(data["run-webgpu"], WEBGPU, False) if "run-webgpu" in data else [])]
    texts["web_first"] = ["# First result, sizes\n", head, *first_results(data.get("first", {})), *sizes()]
    for name, lines in texts.items():
        text = "\n".join(lines)
        (RESULTS / f"{name}.md").write_text(text)
        print(text)


def speed(measured: dict[str, Any], runtimes: list[Runtime], judged: bool) -> list[str]:
    """Times of every row, with the error of every runtime beside its time where it is above the bar."""
    labels = [label for label, _, _ in runtimes]
    note = (
        "Every runtime in a page of its own of one browser, in turns of a quarter of a second; medians; weights are constants, inputs and outputs "
        "typed arrays. Error: Luthier's largest difference from onnxruntime's CPU provider over the largest output. Ratio: best peer on one "
        "thread whose result agrees / luthier relaxed on one thread. Scaling: one thread / two threads.\n\n"
        "*In place*: inputs are views of the model's memory (`model.views()`), as tensors of TF.js and jax-js always are in theirs, and one array of "
        "the caller's takes the output (`into`); in every other column luthier and onnxruntime copy inputs in, and outputs are new arrays. "
        "*q8, q4, q2*: weights of so many bits in groups of 32 (*g64*: of 64), activations exact; *a8*: activations rounded to 8 bits (`accuracy_level` 4) by "
        "Luthier; onnxruntime-web does not round them, so that its exact rows are the ones that compare like with like."
        if judged
        else "## Times, for information\n\nThe adapter is software (SwiftShader): times rank nothing. Inputs and outputs are typed arrays, so uploads and reads count."
    )
    tail = ["error", "ratio", "scaling"] if judged else ["error"]
    lines = [note, "", f"| row | {' | '.join(labels + tail)} |", "|---" * (len(labels) + len(tail) + 1) + "|"]
    ratios: list[float] = []
    floats: list[float] = []
    for name in [*(n for n in ROWS if n in measured), *(n for n in measured if n not in ROWS)]:
        r, bar = measured[name], ROUNDED if name.endswith("a8") else BAR
        ours = r.get(labels[0], {})
        cells = [f"{r[x]['median']:.2f}" + ("" if r[x]["error"] < bar else f" WRONG ({r[x]['error']:.0e})") if "median" in r.get(x, {}) else "-" for x in labels]
        worst = max((r[x]["error"] for x in labels if x.startswith("luthier") and "error" in r.get(x, {})), default=math.nan)
        cells.append(f"{worst:.1e}")
        if judged:
            peers = [r[x]["median"] for x in labels if not x.startswith("luthier") and "2 threads" not in x and "median" in r.get(x, {}) and r[x]["error"] < bar]
            ratio = min(peers) / ours["median"] if peers and "median" in ours else math.nan
            ratios += [] if math.isnan(ratio) else [ratio]
            floats += [] if math.isnan(ratio) or "-q" in name else [ratio]
            two = r.get("luthier relaxed, 2 threads", {}).get("median", math.nan)
            cells += [f"{ratio:.2f}", f"{ours.get('median', math.nan) / two:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if ratios:
        mean, plain = (math.exp(statistics.fmean(map(math.log, some or [math.nan]))) for some in (ratios, floats))
        lines += ["", f"Geometric mean of the {len(floats)} rows without low-bit weights: **{plain:.2f}**; of all {len(ratios)}: {mean:.2f}"]
    failed = {f"{x}, {n}: {r[x]['failed']}" for n, r in measured.items() for x in r if "failed" in r[x] and "cannot read ONNX" not in r[x]["failed"]}
    return [*lines, "", *(f"* not run: {f}" for f in sorted(failed)), ""]


def work(measured: dict[str, Any]) -> list[str]:
    """What one call makes of the GPU."""
    lines = []
    for name, sides in measured.items():
        lines += [
            f"## {name}: one call", "",
            "| runtime | dispatches | bytes moved, MB | bytes bound, MB | submits | distinct shaders | pipelines | error |", "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for label, r in sides.items():
            if "failed" in r:
                lines.append(f"| {label} | {r['failed'][:100]} | | | | | | |")
            else:
                lines.append(f"| {label} | {r['dispatches']} | {(r['bytes'] - r['unread']) / 1e6:.1f} | {r['bytes'] / 1e6:.1f} | {r['submits']} | {r['shaders']} | {r['pipelines']} | {r['error']:.1e} |")
        ours, theirs = sides.get("luthier", {}), sides.get("onnxruntime-web", {})
        if "dispatches" in ours and "dispatches" in theirs:
            moved = [x["bytes"] - x["unread"] for x in (ours, theirs)]
            lines += [
                "", f"Of onnxruntime-web's: {ours['dispatches'] / theirs['dispatches']:.2f} of the dispatches, {moved[0] / moved[1]:.2f} of the bytes moved (bar: 0.5 each), "
                f"{ours['bytes'] / theirs['bytes']:.2f} of the bytes bound. Moved: what is bound, but of a table that a Gather reads by rows only those rows; "
                f"both runtimes bind {ours['unread'] / 1e6:.1f} MB of such tables that they do not read.",
            ]  # fmt: skip
        lines.append("")
    return lines


def first_results(measured: dict[str, Any]) -> list[str]:
    """Time to the first result and what it did to the page."""
    lines = []
    for name, sides in measured.items():
        lines += [
            f"## {name}: from navigation to the first result, cold cache", "",
            "| runtime | first result ms | long tasks | longest block of the main thread ms | runs |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for label, runs in sides.items():
            good = sorted((r for r in runs if not r.get("failed")), key=lambda r: r["ms"])
            if not good:
                lines.append(f"| {label} | {runs[0]['failed'][:100]} | | | {len(runs)} |")
                continue
            m = good[len(good) // 2]
            tasks = max(len(r["long_tasks"]) for r in good)
            lines.append(f"| {label} | {m['ms']:.0f} | {tasks} | {max(r['blocked_ms'] for r in good):.0f} | {len(good)} |")
        lines.append("")
    return lines


def sizes() -> list[str]:
    """Gzip kilobytes of code: the models' packages as they lie under build/web/packages, the peers' runtimes as their documentation
    loads them."""
    dist, tf = NODE_MODULES / "onnxruntime-web" / "dist", NODE_MODULES / "@tensorflow"
    peers = {
        "onnxruntime-web wasm": [dist / "ort.wasm.min.mjs", dist / "ort-wasm-simd-threaded.mjs", dist / "ort-wasm-simd-threaded.wasm"],
        "onnxruntime-web webgpu": [dist / "ort.webgpu.min.mjs", dist / "ort-wasm-simd-threaded.asyncify.mjs", dist / "ort-wasm-simd-threaded.asyncify.wasm"],
        "TF.js wasm": [tf / "tfjs/dist/tf.min.js", tf / "tfjs-backend-wasm/dist/tf-backend-wasm.min.js", tf / "tfjs-backend-wasm/dist/tfjs-backend-wasm-threaded-simd.wasm"],
        "jax-js": [p for p in (NODE_MODULES / "@jax-js/jax/dist").glob("*.js")],
    }  # fmt: skip
    lines = ["## Code, gzip KB", "", "| what | wasm | webgpu |", "|---|---|---|"]
    for name in MODELS:
        found = [PACKAGES / f"{name}-{t}" for t in ("wasm", "webgpu")]
        cells = [f"{code_size(p) / 1e3:.0f}" if (p / "manifest.json").is_file() else "-" for p in found]
        if cells != ["-", "-"]:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| runtime without a model | |", "|---|---|"]
    for name, files in peers.items():
        if files and all(p.is_file() for p in files):
            lines.append(f"| {name} | {sum(len(gzip.compress(p.read_bytes(), 9)) for p in files) / 1e3:.0f} |")
    return [*lines, ""]
