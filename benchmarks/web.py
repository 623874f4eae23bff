"""The speed table of the web targets: one headless Chromium, Luthier beside onnxruntime-web, TF.js and jax-js, in turns.

    python benchmarks/web.py run [--rows A,B] [--backend wasm|webgpu] [--rounds N]     # speed
    python benchmarks/web.py gpu [--rows minilm]                                       # dispatches, bytes, shaders
    python benchmarks/web.py first [--rows minilm] [--backend wasm|webgpu] [--rounds N]
    python benchmarks/web.py prepare [--rows A,B]                                      # only compile
    python benchmarks/web.py report                                                    # benchmarks/results/web_*.md

Each compiles the packages of its rows first (`--prepared`: takes those in build/web/packages), adds its rows to the JSON file
(`--json`) one by one, so that it may be run in pieces, and ends with the tables of all that is in the file (`--no-report`: without).

`run`: every runtime has a page of its own in one browser; all are set up, warmed up, and then take turns of a quarter of a second in
an order that alternates; shown are medians of all calls. A call takes inputs as typed arrays and gives outputs as typed arrays; weights
are constants. `first`: milliseconds from navigation to the first result with an empty cache, all files from one server, and the
browser's long-task entries. `gpu`: dispatches of one call, bytes that they are bound to, distinct shaders (`browser/gpu_hooks.js`).
The report adds the sizes of code. Nothing else should run on the machine. `LUTHIER_BEFORE` names the interpreter of another tree of
Luthier, whose packages then take turns as the runtime `before`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if p not in ("", str(ROOT))] + [str(ROOT)]
from benchmarks.browser import NODE_MODULES, Browser, BrowserError  # noqa: E402
from benchmarks.web_models import PACKAGES, Site  # noqa: E402
from benchmarks.web_rows import FOLDER, RowSpec, rows, unread  # noqa: E402

ROWS = "matmul-512 matmul-1024 gemv-4096 softmax layernorm minilm mobilenetv2 gemv-4096-q8 gemv-4096-q4 gemv-4096-q2 gemv-4096-q8a8 gemv-4096-q4a8 gemv-4096-q2a8".split()
GPU_ROWS = "matmul-512 softmax minilm mobilenetv2".split()
JSON = ROOT / "build" / "web" / "results.json"
TURN_MS = 250.0
Runtime = tuple[str, str, dict[str, Any]]
BEFORE = os.environ.get("LUTHIER_BEFORE")

WASM: list[Runtime] = [
    ("luthier relaxed", "luthier", {"target": "wasm", "variant": "relaxed", "threads": 1}),
    *([("before relaxed", "luthier", {"target": "before-wasm", "variant": "relaxed", "threads": 1})] if BEFORE else []),
    ("luthier relaxed, in place", "luthier", {"target": "wasm", "variant": "relaxed", "threads": 1, "resident": True}),
    ("luthier simd", "luthier", {"target": "wasm", "variant": "simd", "threads": 1}),
    ("luthier relaxed, 2 threads", "luthier", {"target": "wasm", "variant": "relaxed-threads", "threads": 2}),
    ("onnxruntime-web", "onnxruntime", {"backend": "wasm", "threads": 1}),
    ("onnxruntime-web, 2 threads", "onnxruntime", {"backend": "wasm", "threads": 2}),
    ("TF.js", "tensorflow", {"backend": "wasm", "threads": 1}),
    ("TF.js, 2 threads", "tensorflow", {"backend": "wasm", "threads": 2}),
    ("jax-js", "jaxjs", {"backend": "wasm"}),
]
WEBGPU: list[Runtime] = [
    ("luthier", "luthier", {"target": "webgpu"}),
    *([("before", "luthier", {"target": "before-webgpu"})] if BEFORE else []),
    ("onnxruntime-web", "onnxruntime", {"backend": "webgpu", "threads": 1}),
    ("TF.js", "tensorflow", {"backend": "webgpu", "threads": 1}),
    ("jax-js", "jaxjs", {"backend": "webgpu"}),
]


def prepare(specs: list[RowSpec], targets: list[str]) -> None:
    """Compiles what the rows need. A package that cannot be made is missing afterwards, which its row then says."""
    import luthier

    for spec in specs:
        for target in targets:
            folder = PACKAGES / f"row-{spec.name}-{target}"
            try:
                luthier.compile(spec.model, target=target).save(folder)
                print(f"{spec.name} for {target}", flush=True)
            except luthier.LuthierError as e:
                shutil.rmtree(folder, ignore_errors=True)
                print(f"{spec.name} for {target}: {e}", flush=True)
            if BEFORE:
                before = PACKAGES / f"row-{spec.name}-before-{target}"
                code = "import luthier, sys; luthier.compile(sys.argv[1], target=sys.argv[2]).save(sys.argv[3])"
                shutil.rmtree(before, ignore_errors=True)
                subprocess.run([BEFORE, "-c", code, str(spec.model), target, str(before)], cwd=PACKAGES, check=False)


class Bench:
    """A site with rows, packages and the peers' files, and one browser. ``with Bench() as b``."""

    def __init__(self) -> None:
        from luthier.cli.serve import make_server

        self.site = Site()
        root = self.site.root
        for name in ("bench.js", "first.html", "first.js", "first_tasks.js"):
            (root / name).symlink_to(ROOT / "benchmarks" / "browser" / name)
        (root / "node_modules").symlink_to(NODE_MODULES)
        FOLDER.mkdir(parents=True, exist_ok=True)
        (root / "rows").symlink_to(FOLDER)
        (root / "models").mkdir()
        self.site.server.shutdown()
        self.site.server = make_server(root, policy=None, links=True)  # peers evaluate text
        import threading

        threading.Thread(target=self.site.server.serve_forever, daemon=True).start()
        self.url = self.site.server.url
        self.browser = Browser()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.browser.close()
        self.site.close()

    def row(self, spec: RowSpec) -> dict[str, Any]:
        """A row as the page takes it, its files on the site; expected is onnxruntime's first output."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(spec.model), providers=["CPUExecutionProvider"])
        name = session.get_outputs()[0].name
        expected = session.run([name], spec.inputs)[0]
        link = self.site.root / "models" / f"{spec.name}.onnx"
        if not link.exists():
            link.symlink_to(spec.model)
        return {
            "name": spec.name, "operator": spec.operator, "model": f"/models/{spec.name}.onnx", "output": name,
            "packages": {t: f"/packages/row-{spec.name}-{t}/" for t in ("wasm", "webgpu", "before-wasm", "before-webgpu")},
            "inputs": {n: self.site.tensor(a) for n, a in spec.inputs.items()},
            "constants": {n: self.site.tensor(a) for n, a in spec.constants.items() if a.dtype == np.float32},
            "expected": self.site.tensor(expected),
        }  # fmt: skip


def measure(bench: Bench, spec: RowSpec, runtimes: list[Runtime], rounds: int, turn_ms: float) -> dict[str, Any]:
    """One row: {runtime: {median, min, calls, error, ...} or {failed}}."""
    row = bench.row(spec)
    out: dict[str, Any] = {}
    pages = {}
    for label, runtime, options in runtimes:
        page = bench.browser.open(bench.url)
        try:
            reply = page.call("/bench.js", "setup", {"runtime": runtime, "options": options, "row": row})
        except BrowserError as e:
            reply = {"failed": str(e).splitlines()[0][:200]}
        if "failed" in reply:
            out[label] = {"failed": reply["failed"]}
            page.close()
            continue
        out[label] = reply
        pages[label] = page
        page.call("/bench.js", "turn", {"ms": 2 * turn_ms, "least": 1})  # tiers of the compiler
    times: dict[str, list[float]] = {label: [] for label in pages}
    for k in range(rounds):
        for label in list(pages)[:: 1 if k % 2 == 0 else -1]:
            times[label] += pages[label].call("/bench.js", "turn", {"ms": turn_ms, "least": 1})
    for label, page in pages.items():
        t = times[label]
        out[label] |= {"median": statistics.median(t), "min": min(t), "calls": len(t)}
        page.close()
    return out


def first(bench: Bench, spec: RowSpec, backend: str, rounds: int) -> dict[str, Any]:
    """Time to the first result, in a fresh profile each time."""
    row = bench.row(spec)
    sides = [(r, t, n) for t, n in (("wasm", 1), ("wasm", 2), ("webgpu", 1)) if t == backend for r in ("luthier", "onnxruntime")]
    out: dict[str, list[Any]] = {}
    for _ in range(rounds):
        for runtime, target, threads in sides:
            job = bench.site.root / "data" / f"job-{runtime}-{target}-{threads}.json"
            job.write_text(json.dumps({"row": row, "runtime": runtime, "target": target, "threads": threads}))
            page = bench.browser.open(f"{bench.url}first.html?job=/data/{job.name}")
            label = f"{runtime} {target}" + (f" {threads} threads" if target == "wasm" else "")
            try:
                page.wait_for("#result", 180)
                out.setdefault(label, []).append(json.loads(page.text("#result")))
            except BrowserError as e:
                out.setdefault(label, []).append({"failed": str(e).splitlines()[0]})
            page.close()
    return out


def gpu(bench: Bench, spec: RowSpec) -> dict[str, Any]:
    """What one call makes of the GPU."""
    row = bench.row(spec)
    hooks = (ROOT / "benchmarks" / "browser" / "gpu_hooks.js").read_text()
    out = {}
    for label, runtime, options in WEBGPU:
        if runtime in ("tensorflow", "jaxjs") and not spec.operator:
            continue
        page = bench.browser.open(bench.url, (hooks,))
        reply = page.call("/bench.js", "setup", {"runtime": runtime, "options": options, "row": row})
        if "failed" not in reply:
            page.call("/bench.js", "turn", {"ms": 0, "least": 1})
            reply |= page.call("/bench.js", "counted")
        out[label] = reply | {"unread": unread(spec)}
        page.close()
    return out


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "gpu", "first", "prepare", "report"))
    parser.add_argument("--rows", default="")
    parser.add_argument("--backend", choices=("wasm", "webgpu"), default="wasm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=TURN_MS, help="milliseconds of a turn")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--prepared", action="store_true", help="take the packages as they are")
    parser.add_argument("--no-report", action="store_true")
    args = parser.parse_args()
    default = {"run": ROWS if args.backend == "wasm" else GPU_ROWS, "first": ["minilm"], "gpu": ["minilm"]}.get(args.what, ROWS)
    specs = rows(args.rows.split(",") if args.rows else default) if args.what != "report" else []
    targets = ["webgpu"] if args.what == "gpu" else [args.backend] if args.what != "prepare" else ["wasm", "webgpu"]
    if not args.prepared:
        prepare(specs, targets)
    data = reread(args.json)
    if args.what in ("run", "gpu", "first"):
        data = tables(data, specs, args)
    if args.what != "prepare" and not args.no_report:
        from benchmarks.web_report import report

        report(data)
    return 0


def reread(path: Path) -> dict[str, Any]:
    """What the JSON file holds now: another process may have added rows."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return data


def tables(data: dict[str, Any], specs: list[RowSpec], args: argparse.Namespace) -> dict[str, Any]:
    """Measures the rows; ``data`` with them, which is also what the JSON file then holds."""
    from benchmarks.cpu import machine

    runtimes = WASM if args.backend == "wasm" else WEBGPU
    with Bench() as bench:
        here = machine()
        data |= {"version": bench.browser.version, "machine": f"{here['cpu']}, {here['cores']} cores"}
        for spec in specs:
            if args.what == "run":
                result = measure(bench, spec, runtimes, args.rounds, args.turn)
                data = reread(args.json) | {k: data[k] for k in ("version", "machine")}
                data.setdefault(f"run-{args.backend}", {})[spec.name] = result
                for label, r in result.items():
                    print(f"{spec.name:14} {label:28}", r["failed"] if "failed" in r else f"{r['median']:8.3f} ms  min {r['min']:8.3f}  {r['calls']} calls  error {r['error']:.1e}", flush=True)
            else:
                result = first(bench, spec, args.backend, args.rounds) if args.what == "first" else gpu(bench, spec)
                data = reread(args.json) | {k: data[k] for k in ("version", "machine")}
                data.setdefault(args.what, {}).setdefault(spec.name, {}).update(result)
                print(json.dumps(result, indent=1), flush=True)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(data, indent=1))
    return data


if __name__ == "__main__":
    sys.exit(main())
