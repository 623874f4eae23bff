"""Run the ONNX backend suite against luthier, from the saved artifact.

    python benchmarks/conformance.py [--filter REGEX] [--sample N --seed S] [--jobs 2] [--resume] [--update]

Phase 1 compiles a test's model and saves the artifact, in a worker process. Phase 2 loads the artifact in another process, in
which importing ``onnx``, ``onnxruntime`` or ``luthier.ir`` raises, runs the test's data and compares with the test's own
tolerances. Workers take many tests each; a crash or a timeout costs only the test at hand, and its worker is replaced.

Statuses: ``pass``; ``wrong`` (an output differs); ``refused`` (a luthier error from compile or save, the message is recorded);
``error`` (any other exception, or a luthier error at run time); ``crash`` (the process died); ``timeout``; ``drawn`` (an operator of random
numbers: the expected values are what numpy's generator drew, so that only shapes and types can agree).
Writes ``build/conformance.csv``, row by row; ``--resume`` keeps the rows that the file has of an earlier run and runs the rest.
``--update`` rewrites the target's list in ``tests/conformance``. Exits 1 if a test crashed.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import importlib.abc
import json
import os
import pickle
import random
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path = [str(HERE), *[p for p in sys.path if p != str(HERE)]]

import onnx_suite  # noqa: E402

ROOT = HERE.parent
WORK = ROOT / "build" / "conformance"
PASSING = ROOT / "tests" / "conformance" / "passing.txt"  # of the default target; others have passing-KIND.txt beside it
BLOCKED = ("onnx", "onnxruntime", "luthier.ir")
RECYCLE = 250
STATUSES = ("pass", "wrong", "refused", "error", "crash", "timeout", "drawn")
RANDOM = re.compile(r"^node/test_(bernoulli|training_dropout)(?!.*zero_ratio)")


@dataclass
class Result:
    """One test. ``phase``: where it ended (compile, run). Times in milliseconds, -1 where the phase was not reached. ``dispatches``:
    of a GPU in all runs, -1 on other targets."""

    test: str
    status: str
    phase: str
    op: str = ""
    node: str = ""
    kind: str = ""
    message: str = ""
    compile_ms: float = -1.0
    run_ms: float = -1.0
    dispatches: int = -1


# Worker side


class _Blocker(importlib.abc.MetaPathFinder):
    """Makes this process a machine on which the compiler's own packages are not installed."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if any(fullname == b or fullname.startswith(b + ".") for b in BLOCKED):
            raise ModuleNotFoundError(f"import of {fullname} is blocked: artifacts must load without it", name=fullname)


def _compile_job(job: dict[str, Any]) -> dict[str, Any]:
    import luthier

    start = time.perf_counter()
    try:
        module = luthier.compile(job["model"], target=job["target"], threads=job["threads"])
        module.save(job["artifact"])
    except luthier.LuthierError as error:
        return {
            "status": "refused", "op": error.op or "", "node": error.node or "", "kind": type(error).__name__, "message": str(error),
        }  # fmt: skip
    return {"status": "ok", "ms": (time.perf_counter() - start) * 1e3}


def _run_job(job: dict[str, Any]) -> dict[str, Any]:
    import luthier

    data = pickle.loads(Path(job["data"]).read_bytes())
    start = time.perf_counter()
    module = luthier.load(job["artifact"])
    dispatches = 0 if hasattr(module, "counters") else -1
    for inputs, expected in data["sets"]:
        feeds = {name: value for name, value in zip(data["inputs"], inputs) if value is not None}
        outputs = module.run(feeds)
        if hasattr(module, "counters"):
            dispatches += module.counters()["dispatches"]
        try:
            onnx_suite.check_outputs(expected, [outputs[name] for name in data["outputs"][: len(expected)]], data["rtol"], data["atol"])
        except AssertionError as error:
            same = all(outputs[n].shape == e.shape and outputs[n].dtype == e.dtype for n, e in zip(data["outputs"], expected))
            return {"status": "drawn" if same and RANDOM.match(job["test"]) else "wrong", "message": str(error)}
    return {"status": "ok", "ms": (time.perf_counter() - start) * 1e3, "dispatches": dispatches}


def worker(phase: str) -> None:
    """Answer jobs, one JSON line each, on the original standard output; whatever else prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.enable()
    if phase == "run":
        sys.meta_path.insert(0, _Blocker())
    do = _compile_job if phase == "compile" else _run_job
    for line in sys.stdin:
        try:
            reply = do(json.loads(line))
        except KeyboardInterrupt:
            return
        except BaseException as error:  # reported to the parent: any exception but a refusal is a finding
            import traceback

            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())
            reply = {
                "status": "error", "kind": type(error).__name__,
                "message": f"{text} ({Path(where.filename).name}:{where.lineno})",
                "op": getattr(error, "op", None) or "", "node": getattr(error, "node", None) or "",
            }  # fmt: skip
        replies.write(json.dumps(reply) + "\n")


# Parent side


class Worker:
    """A worker process that is replaced when it dies, hangs, or has answered ``RECYCLE`` jobs."""

    def __init__(self, phase: str, log: Path) -> None:
        self.phase, self.log = phase, log
        self.process: subprocess.Popen[bytes] | None = None
        self.jobs = 0
        self.buffer = b""

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", self.phase]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self.jobs, self.buffer = 0, b""
        return self.process

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()
            self.process = None

    def ask(self, job: dict[str, Any], limit: float) -> dict[str, Any]:
        if self.process is not None and self.jobs >= RECYCLE:
            self.close()
        process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        self.jobs += 1
        deadline = time.monotonic() + limit
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._died()
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                return {"status": "timeout", "message": f"no answer in {limit:.0f} s"}
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return self._died()
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    def _died(self) -> dict[str, Any]:
        assert self.process is not None
        code = self.process.wait()
        self.close()
        tail = [t.strip() for t in self.log.read_text(errors="replace").splitlines() if t.strip()]
        reason = next((t for t in tail if "rror" in t or "ssert" in t), tail[0] if tail else "")
        return {"status": "crash", "message": f"exit status {code}: {reason[:300]}"}


def run_one(name: str, options: argparse.Namespace, compiler: Worker, runner: Worker) -> Result:
    """Both phases of one test."""
    folder = onnx_suite.case_folder(WORK, name)
    artifact = WORK / f"artifacts-{options.target.replace(':', '-')}" / name
    shutil.rmtree(artifact, ignore_errors=True)
    artifact.parent.mkdir(parents=True, exist_ok=True)
    job = {
        "model": str(folder / "model.onnx"), "data": str(folder / "data.pkl"), "artifact": str(artifact),
        "target": options.target, "threads": options.threads, "test": name,
    }  # fmt: skip
    result = Result(name, "pass", "compile")
    for phase, process in (("compile", compiler), ("run", runner)):
        result.phase = phase
        reply = process.ask(job, options.limit)
        if reply["status"] != "ok":
            result.status = reply["status"]
            for key in ("op", "node", "kind", "message"):
                setattr(result, key, reply.get(key, ""))
            break
        setattr(result, f"{phase}_ms", round(reply["ms"], 2))
        result.dispatches = reply.get("dispatches", -1)
    if not options.keep:
        shutil.rmtree(artifact, ignore_errors=True)
    return result


def run_suite(names: Iterable[str], options: argparse.Namespace) -> list[Result]:
    """All tests, ``options.jobs`` at a time, in the order of ``names``; each is added to ``options.csv`` when it is over."""
    queue = list(enumerate(names))[::-1]
    results: dict[int, Result] = {}
    lock = threading.Lock()
    total = len(queue)

    def loop(number: int) -> None:
        kind = options.target.replace(":", "-")
        compiler = Worker("compile", WORK / f"compile-{kind}-{number}.log")
        runner = Worker("run", WORK / f"run-{kind}-{number}.log")
        try:
            while True:
                with lock:
                    if not queue:
                        return
                    position, name = queue.pop()
                result = run_one(name, options, compiler, runner)
                with lock:
                    results[position] = result
                    add_csv(result, options.csv)
                    if options.verbose or result.status in ("crash", "timeout"):
                        print(f"{result.status:8} {name} {result.message[:160]}", flush=True)
                    elif len(results) % 100 == 0:
                        good = sum(r.status == "pass" for r in results.values())
                        print(f"{len(results)}/{total} done, {good} pass", flush=True)
        finally:
            compiler.close()
            runner.close()

    WORK.mkdir(parents=True, exist_ok=True)
    threads = [threading.Thread(target=loop, args=(n,), daemon=True) for n in range(options.jobs)]
    for t in threads:
        t.start()
    for t in threads:
        while t.is_alive():
            t.join(0.2)
    return [results[k] for k in sorted(results)]


# Reports


def print_report(results: list[Result], seconds: float) -> None:
    counts = Counter(r.status for r in results)
    refused = [r for r in results if r.status == "refused"]
    if refused:
        print("\nrefusals by operator")
        by_op: dict[str, list[Result]] = {}
        for r in refused:
            by_op.setdefault(r.op or "(no operator named)", []).append(r)
        for op, group in sorted(by_op.items(), key=lambda item: (-len(item[1]), item[0])):
            print(f"  {len(group):4} {op:28} {group[0].message[:120]}")
    for status in ("wrong", "error", "crash", "timeout"):
        group = [r for r in results if r.status == status]
        if group:
            print(f"\n{status}: {len(group)}")
            for r in group[:40]:
                print(f"  {r.test} [{r.phase}] {r.kind + ': ' if r.kind else ''}{r.message[:150]}")
            if len(group) > 40:
                print(f"  and {len(group) - 40} more in the csv file")
    idle = [r.test for r in results if r.status == "pass" and r.dispatches == 0]
    if idle:
        print(f"\npassed without a dispatch (nothing but shapes and constants to compute): {len(idle)}")
        print("  " + " ".join(idle))
    unnamed = [r for r in refused if not (r.node and r.op)]
    print(f"\nrefusals that do not name node and operator: {len(unnamed)} of {len(refused)}")
    for r in unnamed[:10]:
        print(f"  {r.test}: {r.message[:150]}")
    print(f"{len(results)} tests in {seconds:.0f} s: " + ", ".join(f"{counts[s]} {s}" for s in STATUSES))


def add_csv(result: Result, path: Path) -> None:
    """One more row at the end of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(result))


def read_csv(path: Path) -> list[Result]:
    """The rows that an earlier run, whole or interrupted, has left."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [dict(r) for r in csv.DictReader(file)]
    numbers = [(float(r.pop("compile_ms")), float(r.pop("run_ms")), int(r.pop("dispatches", -1))) for r in rows]
    return [Result(**r, compile_ms=c, run_ms=t, dispatches=d) for r, (c, t, d) in zip(rows, numbers, strict=True)]


def write_csv(results: list[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in results)


def passing_file(target: str) -> Path:
    """The list of tests that pass on a target."""
    kind = target.partition(":")[0]
    return PASSING if kind == "cpu" else PASSING.with_name(f"passing-{kind}.txt")


def update_passing(results: list[Result], path: Path) -> None:
    """Tests that ran now replace what the list says about them; the others keep their line."""
    known = set(path.read_text().split()) if path.exists() else set()
    known -= {r.test for r in results}
    known |= {r.test for r in results if r.status == "pass"}
    path.write_text("".join(f"{name}\n" for name in sorted(known)))
    print(f"{path.relative_to(ROOT)}: {len(known)} tests")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the ONNX backend suite against luthier, from the saved artifact.")
    parser.add_argument("--filter", metavar="REGEX", help="only tests whose name, kind/test_name, matches")
    parser.add_argument("--tests", metavar="FILE", type=Path, help="only the tests named in this file, one a line")
    parser.add_argument("--sample", metavar="N", type=int, help="only N tests, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, default=1, help="threads of the compiled modules")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one phase of one test")
    parser.add_argument("--csv", type=Path, default=ROOT / "build" / "conformance.csv")
    parser.add_argument("--resume", action="store_true", help="keep what the CSV file has of an earlier run")
    parser.add_argument("--update", action="store_true", help="rewrite the target's list in tests/conformance")
    parser.add_argument("--keep", action="store_true", help="keep the artifacts in build/conformance/artifacts-TARGET")
    parser.add_argument("--verbose", "-v", action="store_true", help="print every test")
    parser.add_argument("--worker", choices=("compile", "run"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def select_tests(options: argparse.Namespace) -> list[str]:
    names = onnx_suite.prepare(WORK)
    if options.tests is not None:
        wanted = set(options.tests.read_text().split())
        missing = wanted - set(names)
        if missing:
            raise SystemExit(f"no such tests in this onnx version: {', '.join(sorted(missing)[:5])}")
        names = [n for n in names if n in wanted]
    if options.filter:
        names = [n for n in names if re.search(options.filter, n)]
    if options.sample is not None and options.sample < len(names):
        names = sorted(random.Random(options.seed).sample(names, options.sample))
    return names


def main() -> int:
    options = parse()
    if options.worker:
        worker(options.worker)
        return 0
    names = select_tests(options)
    start = time.monotonic()
    earlier = {r.test: r for r in read_csv(options.csv)} if options.resume else {}
    if not options.resume:
        options.csv.unlink(missing_ok=True)
    try:
        results = run_suite([n for n in names if n not in earlier], options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    done = earlier | {r.test: r for r in results}
    results = [done[n] for n in names]
    print_report(results, time.monotonic() - start)
    write_csv(results, options.csv)
    if options.update:
        update_passing(results, passing_file(options.target))
    return 1 if any(r.status == "crash" for r in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
