"""The correctness table: real models on meaningful inputs, Luthier and onnxruntime both against an f64 evaluation.

    python benchmarks/compare_models.py [NAME ...] [--threads N] [--target T] [--runtime luthier|none] [--json FILE]

Each model runs in a process of its own, compiled once with the shapes that it declares, then run at every size of
its registry entry: other batches, lengths and pictures without recompiling, 50 steps with the state carried for
silero, and a decode loop for GPT-2. The error of an output is the largest difference over the output's largest
magnitude. It passes when it is at most twice onnxruntime's own, or 1e-3. A QDQ model passes
when it ranks the same five classes first as onnxruntime without its graph rewrites, on pictures where rounding does not decide;
other quantized models step by step (`step_by_step.py`), against onnxruntime's exact modes: the one that the row names; the error
of the output from the inputs alone, against the nearer one of the two modes, is shown beside how far onnxruntime's own results
are apart: of these modes, and of one mode for inputs that are two units in the last place larger.
Exit code 1 when any model fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if p not in ("", str(ROOT))] + [str(ROOT)]
from benchmarks.models import ModelCase, get, model_dir, names  # noqa: E402

Array = NDArray[Any]
Outputs = dict[str, Array]
Runner = Callable[[Outputs], Outputs]
STEPS = {"silero": 50, "silero-ifless": 50, "gpt2": 6}
BAR = 1e-3


def ort_runner(path: Path, threads: int, rewrites: bool = True) -> Runner:
    """onnxruntime, with or without its graph rewrites."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not rewrites:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    results = [entry.name for entry in session.get_outputs()]
    return lambda inputs: dict(zip(results, session.run(None, inputs), strict=True))


def f64_runner(case: ModelCase) -> Callable[[str, Outputs], Outputs]:
    """`run(key, inputs)`: the f64 evaluation, kept on disk under the key."""
    from benchmarks import model_inputs, reference_f64

    stamps = [p.stat().st_mtime_ns for p in (case.path, Path(model_inputs.__file__), Path(reference_f64.__file__))]
    folder = model_dir() / ".f64" / f"{case.name}-{hash(tuple(stamps)) & 0xFFFFFFFFFFFF:x}"
    made: list[reference_f64.Reference] = []

    def run(key: str, inputs: Outputs) -> Outputs:
        file = folder / f"{key}.npz"
        if not file.exists():
            if not made:
                made.append(reference_f64.Reference(case.path))
            outputs = made[0].run(inputs)
            folder.mkdir(parents=True, exist_ok=True)
            scratch = folder / f".{os.getpid()}.npz"
            np.savez(scratch, **outputs)  # type: ignore[arg-type]
            os.replace(scratch, file)
        with np.load(file) as kept:
            return {name: kept[name] for name in kept.files}

    return run


def error(ours: Outputs, reference: Outputs) -> float:
    """The worst relative error of the outputs; infinity for a missing one, another shape, or NaN in another place."""
    worst = 0.0
    for name, expected in reference.items():
        got = ours.get(name)
        if got is None or got.shape != expected.shape:
            return float("inf")
        if expected.size == 0:
            continue
        a, b = got.astype(np.float64), expected.astype(np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        finite = np.isfinite(b)
        scale = max(float(np.abs(b[finite]).max(initial=0.0)), 1e-30)
        worst = max(worst, float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / scale)
    return worst


def same_top5(ours: Outputs, theirs: Outputs) -> bool:
    """Whether the first output's rows rank the same five classes first; equal values may be ranked either way.

    (The logits of a QDQ model are multiples of one step, so that equal ones are common.)
    """
    for a, b in zip(next(iter(ours.values())), next(iter(theirs.values())), strict=True):
        sure, possible = set(), set(range(a.size))
        for row in (a, b):
            fifth = np.sort(row)[-5]
            sure |= set(np.flatnonzero(row > fifth).tolist())
            possible &= set(np.flatnonzero(row >= fifth).tolist())
        if not (sure <= possible and len(sure) <= 5 <= len(possible)):
            return False
    return True


def verdict(label: str, ours: float, theirs: float) -> dict[str, Any]:
    """A row of the table."""
    return {"case": label, "error": ours, "onnxruntime": theirs, "ok": bool(ours <= max(2 * theirs, BAR))}


def single_runs(case: ModelCase, run: Runner | None, threads: int) -> Iterator[dict[str, Any]]:
    """Every size of the model, one run each."""
    peer, exact = ort_runner(case.path, threads), f64_runner(case)
    for size in case.sizes:
        label = ", ".join(f"{k} {v}" for k, v in size.items()) or "pinned shape"
        inputs = case.make_inputs(1, **size)
        reference = exact(label.replace(", ", "-").replace(" ", ""), inputs)
        theirs = error(peer(inputs), reference)
        yield verdict(label, error(run(inputs), reference) if run else theirs, theirs)


def carried_runs(case: ModelCase, run: Runner | None, threads: int, steps: int) -> Iterator[dict[str, Any]]:
    """`steps` steps, each runtime with the state that it made itself; the worst step counts."""
    assert case.stream is not None
    peer, exact = ort_runner(case.path, threads), f64_runner(case)
    size = {"past": 16} if "past_key_values.0.key" in case.carry else {}
    start = case.make_inputs(3, **size)
    if not size:  # a recording starts from silence
        start = {k: np.zeros_like(v) for k, v in start.items()}
    states = [{k: start[k] for k in case.carry} for _ in range(3)]
    worst = [0.0, 0.0]
    for step, fresh in enumerate(case.stream(5, steps)):
        reference = exact(f"step{step}", {**fresh, **states[0]})
        states[0] = {k: reference[v] for k, v in case.carry.items()}
        for i, runner in ((1, peer), (2, run)):
            if runner is not None:
                outputs = {k: np.array(v) for k, v in runner({**fresh, **states[i]}).items()}
                states[i] = {k: outputs[v] for k, v in case.carry.items()}
                worst[i - 1] = max(worst[i - 1], error(outputs, reference))
    yield verdict(f"{steps} steps, state carried", worst[1] if run else worst[0], worst[0])


def decided_pictures(case: ModelCase, plain: Runner, wanted: int = 4, tries: int = 40) -> list[int]:
    """Seeds of pictures whose first five classes do not hang on rounding: kept on disk.

    Two evaluations that follow the QDQ model to the letter, onnxruntime without rewrites and onnx's own evaluator,
    still round differently here and there, and depth multiplies it. A picture counts when its fifth and sixth class
    are further apart than these two differ on any of the eight leading classes.
    """
    from onnx.reference import ReferenceEvaluator

    from benchmarks import model_inputs, reference_f64

    stamps = (case.path.stat().st_mtime_ns, Path(model_inputs.__file__).stat().st_mtime_ns)
    file = model_dir() / ".f64" / f"{case.name}-{stamps[0] ^ stamps[1]:x}-{wanted}.json"
    if file.exists():
        return list(json.loads(file.read_text()))
    evaluator = ReferenceEvaluator(str(case.path), new_ops=[reference_f64.Conv])
    seeds: list[int] = []
    for seed in range(tries):
        inputs = case.make_inputs(seed)
        first, second = next(iter(plain(inputs).values()))[0], evaluator.run(None, inputs)[0][0]
        leading = np.argsort(-first)[:8]
        if first[leading[4]] - first[leading[5]] > np.abs(first - second)[leading].max():
            seeds.append(seed)
        if len(seeds) == wanted:
            break
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(seeds))
    return seeds


def ranked_runs(case: ModelCase, run: Runner | None, threads: int) -> Iterator[dict[str, Any]]:
    """A QDQ model: the same five classes on pictures where rounding does not decide about them."""
    plain, fast = ort_runner(case.path, threads, rewrites=False), ort_runner(case.path, threads)
    seeds = decided_pictures(case, plain)
    if len(seeds) < 2:
        raise RuntimeError(f"only {len(seeds)} pictures on which the five classes are decided")
    for seed in seeds:
        inputs = case.make_inputs(seed)
        exact, rewritten = plain(inputs), fast(inputs)
        ours = run(inputs) if run else exact
        yield {
            "case": f"picture {seed}",
            "error": error(ours, exact),
            "onnxruntime": error(rewritten, exact),
            "ok": same_top5(ours, exact),
        }


def stepwise_runs(case: ModelCase, build: Callable[[Path], Runner] | None, run: Runner | None) -> Iterator[dict[str, Any]]:
    """Another quantized model, step by step; ``build`` compiles the model in pieces. Without ``run`` onnxruntime's mode with
    rewrites is judged as if it were ours."""
    from benchmarks.step_by_step import in_steps, run_onnxruntime

    for size in case.sizes:
        inputs = case.make_inputs(1, **size)
        modes = [run_onnxruntime(case.path, inputs, rewrites) for rewrites in (True, False)]
        nudged = {k: v * np.float32(1 + 2**-22) if v.dtype == np.float32 else v for k, v in inputs.items()}
        apart = max(error(modes[0], modes[1]), error(run_onnxruntime(case.path, nudged, rewrites=True), modes[0]))
        ours = min(error(run(inputs), m) for m in modes) if run else apart
        label = ", ".join(f"{k} {v}" for k, v in size.items()) or "pinned shape"
        yield {"case": f"{label}, from the inputs alone (the nearer mode)", "error": ours, "onnxruntime": apart, "ok": True, "judged": False}
        with tempfile.TemporaryDirectory() as folder:
            pieces = in_steps(case.path, inputs, Path(folder))
            runner = build(pieces.path) if build else lambda i, p=pieces: run_onnxruntime(p.path, i, rewrites=True)
            judged = pieces.judge(runner(pieces.inputs))
        yield {"case": f"{label}, step by step ({pieces.mode}): {judged}", "error": judged.error, "ok": judged.ok(BAR)}


def check(name: str, runtime: str, target: str, threads: int) -> Iterator[dict[str, Any]]:
    """All rows of one model."""
    case = get(name)
    run: Runner | None = None
    if runtime == "luthier":
        import luthier

        started = time.perf_counter()
        shapes = None
        try:
            module = luthier.compile(str(case.path), target=target, threads=threads)
        except luthier.ShapeError:
            if len(case.sizes) > 1:  # every other model has to serve all of its sizes with one module
                raise
            shapes = {k: v.shape for k, v in case.make_inputs(0).items()}
            module = luthier.compile(str(case.path), target=target, shapes=shapes, threads=threads)
        note = ", shapes pinned" if shapes else ""
        yield {"case": "compile", "seconds": time.perf_counter() - started, "note": note, "ok": True}
        run = module.run
    if case.check != "f64":
        if case.check == "rank":
            yield from ranked_runs(case, run, threads)
            return

        def build(path: Path) -> Runner:
            import luthier

            return luthier.compile(str(path), target=target, threads=threads).run

        yield from stepwise_runs(case, build if run else None, run)
        return
    yield from single_runs(case, run, threads)
    if case.stream is not None:
        yield from carried_runs(case, run, threads, STEPS.get(name, 6))


def child(args: argparse.Namespace) -> int:
    """Prints the rows of one model as lines of JSON; every row stands for itself when a later one fails."""
    try:
        for row in check(args.names[0], args.runtime, args.target, args.threads):
            print("ROW " + json.dumps(row), flush=True)
    except Exception as problem:  # shown in the table as a failed row
        traceback.print_exc()
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        print("ROW " + json.dumps({"case": "stopped", "ok": False, "why": text[:400]}), flush=True)
        return 1
    return 0


def collect(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs a model in a process of its own and returns its rows; a crash or time-out is a failed row."""
    command = [sys.executable, __file__, name, "--child", "--runtime", args.runtime, "--target", args.target]
    command += ["--threads", str(args.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, check=False)
        out, code, log = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as expired:
        out = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        code, log = None, f"took over {args.timeout} s"
    rows = [json.loads(line[4:]) for line in out.splitlines() if line.startswith("ROW ")]
    if not rows or (code != 0 and rows[-1]["ok"]):
        tail = " ".join(log.strip().splitlines()[-1:])
        rows.append({"case": "stopped", "ok": False, "why": f"exit code {code}: {tail[-300:]}"})
    return rows


def main() -> int:
    """Command line; see the module's docstring."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="real models against onnxruntime and f64")
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--runtime", choices=("luthier", "none"), default="luthier", help="none: only onnxruntime's error")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    console = Console(width=int(os.environ.get("COLUMNS", "130")))
    everything: dict[str, list[dict[str, Any]]] = {}
    table = Table("model", "case", "error", "onnxruntime's", "")
    for name in args.names or names():
        rows = everything[name] = collect(name, args)
        for row in rows:
            if row["case"] == "compile":
                table.add_row(name, f"compiled in {row['seconds']:.2f} s{row['note']}", "", "", "")
            elif "error" in row:
                mark = "ok" if row["ok"] else "[red]FAIL[/red]"
                theirs = f"{row['onnxruntime']:.1e}" if "onnxruntime" in row else ""
                table.add_row(name, row["case"], f"{row['error']:.1e}", theirs, mark if row.get("judged", True) else "told only")
            else:
                table.add_row(name, row["why"], "", "", "[red]FAIL[/red]")
        good = all(row["ok"] for row in rows)
        console.print(f"{name}: {'ok' if good else 'FAIL ' + str(rows[-1].get('why', ''))[:200]}", highlight=False, markup=False)
        if args.json:
            args.json.write_text(json.dumps(everything, indent=1))
    console.print(table)
    failed = [name for name, rows in everything.items() if not all(row["ok"] for row in rows)]
    console.print(f"{len(everything) - len(failed)} of {len(everything)} models pass" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
