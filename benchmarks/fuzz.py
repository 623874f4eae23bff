"""Mutated ONNX and GGUF files through the compiler: ``python -m benchmarks.fuzz --count 20000``.

A mutant is made of a small model (:mod:`benchmarks.fuzz_models`, or one of the ONNX suite's node tests) by one to three edits, of its structure
or its bytes (:mod:`benchmarks.fuzz_mutate`). Workers with a limit of memory compile it, run it on random inputs and ask onnxruntime; one that
dies or takes too long is replaced. Every result is a line of ``RESULTS``: started again, a run goes on where it stopped. What is found is shrunk
(edits left out) and kept beside the results; ``--report`` writes the table again.

Every fourth is compiled with bounds checks, and an access outside of a buffer counts as an internal error. Crashes, hangs and internal errors
are faults, and so are answers that differ from onnxruntime's for no reason of :data:`ARGUED`. A refusal is an error of
:mod:`luthier.errors` that is meant for users."""

from __future__ import annotations

import argparse
import json
import queue
import select
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from benchmarks.fuzz_models import WEIGHTS_FILE, weights_file
from benchmarks.fuzz_mutate import apply, graphs, mutant

FAULTS = ("crash", "hang", "internal")
RESULTS = Path("build/fuzz")
COMMAND = ["-m", "benchmarks.fuzz_worker"]
Result = dict[str, Any]
UNARGUED = "no reason known"


@dataclass(frozen=True)
class Argued:
    """A kind of answers that may differ from onnxruntime's: why, and whether a mutant is of it by its model and the
    difference."""

    text: str
    holds: Callable[[ModelProto, str], bool]


def _nodes(m: ModelProto) -> Iterator[NodeProto]:
    return (n for g in graphs(m.graph) for n in g.node)


def _odd_flag(m: ModelProto, _: str) -> bool:
    found = ((i for i in (*a.ints, a.i)) for n in _nodes(m) for a in n.attribute if a.name in FLAGS)
    return any(i not in (0, 1) for values in found for i in values)


def _has(m: ModelProto, op: str, attribute: str, odd: Callable[[AttributeProto], bool]) -> bool:
    """Whether a node of this operator has such an attribute."""
    return any(n.op_type == op and a.name == attribute and odd(a) for n in _nodes(m) for a in n.attribute)


def _not_finite(m: ModelProto, op: tuple[str, ...], limit: float = float("inf")) -> bool:
    """Whether a constant that such an operator reads has an element that is no number or not below ``limit``."""
    read = {i for n in _nodes(m) if n.op_type in op for i in n.input}
    floats = [t for t in m.graph.initializer if t.name in read and t.data_type == TensorProto.FLOAT and t.raw_data]
    return any(not bool(np.all(np.abs(np.frombuffer(t.raw_data, np.float32)) < limit)) for t in floats)


FLAGS = frozenset(
    "ceil_mode count_include_pad exclusive inverse is_causal keepdims largest noop_with_empty_axes onesided reverse saturate "
    "select_last_index sorted training_mode scan_input_directions scan_output_directions".split()
)
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Dropout")
RECURRENT = ("RNN", "GRU", "LSTM")
ARGUED = (
    Argued(
        "flags (`keepdims`, `largest`, `saturate`) that are neither 0 nor 1, of which ONNX says nothing: any other number counts "
        "as set here; as unset in onnxruntime, whose Cast and CastLike then leave the output's memory as it was",
        _odd_flag,
    ),
    Argued("random numbers without a `seed`", lambda m, _: any(n.op_type in RANDOM for n in _nodes(m))),
    Argued(
        "recurrent weights that are not finite: NaN here, as arithmetic says; onnxruntime leaves out the product with a state of "
        "zeros, and its sigmoid and tanh are clamped so that NaN becomes a number",
        lambda m, _: _not_finite(m, RECURRENT),
    ),
    Argued(
        "sequences of length 0: the last state is the first one here, zeros in onnxruntime; ONNX says nothing",
        lambda m, text: "against 0.0" in text and any(n.op_type in RECURRENT and any(n.input[4:5]) for n in _nodes(m)),
    ),
    Argued(
        "quantization scales that are not finite: 0 * inf is NaN",
        lambda m, _: _not_finite(m, ("QuantizeLinear", "DequantizeLinear", "QLinearMatMul")),
    ),
    Argued(
        "Attention whose `softcap` is NaN (none in onnxruntime, NaN here), or whose `scale` lets scores overflow",
        lambda m, _: (
            _has(m, "Attention", "softcap", lambda a: a.f != a.f) or _has(m, "Attention", "scale", lambda a: abs(a.f) > 1e30)
        ),
    ),
    Argued("Celu with `alpha` 0: torch refuses it", lambda m, _: _has(m, "Celu", "alpha", lambda a: a.f == 0)),
    Argued("TopK with `sorted` 0, whose order is anyone's", lambda m, _: _has(m, "TopK", "sorted", lambda a: a.i == 0)),
    Argued(
        "Clip with an infinite bound and no other: no bound is none here, as in onnx's evaluator and torch, the largest number of "
        "the type in onnxruntime",
        lambda m, _: _not_finite(m, ("Clip",)),
    ),
    Argued(
        "`clip` 0 of recurrent operators: no clipping here, all zeros in onnxruntime",
        lambda m, _: any(a.name == "clip" and a.f == 0 for n in _nodes(m) if n.op_type in RECURRENT for a in n.attribute),
    ),
    Argued(
        "GridSample at points that are not finite, or so far outside that no integer holds them: NaN here where padding does not "
        "clamp them; onnxruntime converts them to integers, which C++ leaves undefined",
        lambda m, _: _not_finite(m, ("GridSample",), 1e9),
    ),
    Argued(
        "scores that Attention hands out behind a mask: -inf here, as in ONNX's own tests, the lowest number in onnxruntime",
        lambda m, text: "-inf against -3.4028" in text and any(n.op_type == "Attention" for n in _nodes(m)),
    ),
)


class Worker:
    """One process that tries mutants, replaced when it ends or takes longer than ``timeout`` seconds."""

    def __init__(self, folder: Path, megabytes: int = 6000, timeout: float = 30.0, peer: bool = True) -> None:
        self.folder, self.megabytes, self.timeout, self.peer = folder, megabytes, timeout, peer
        self.process: subprocess.Popen[bytes] | None = None
        (folder / WEIGHTS_FILE).write_bytes(weights_file())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """Ends the process; its status."""
        p, self.process = self.process, None
        if p is None:
            return 0
        status = p.poll()
        p.kill()
        p.wait()
        for stream in (p.stdin, p.stdout):
            if stream is not None:
                stream.close()
        return p.returncode if status is None else status

    def _line(self) -> Result | str:
        """An answer, or ``crash`` or ``hang``."""
        assert self.process is not None and self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout)
        if not ready:
            self.stop()
            return "hang"
        text = self.process.stdout.readline()
        if text:
            return dict(json.loads(text))
        self.process.wait()
        return "crash"

    def attempt(self, data: bytes, suffix: str, checked: bool = False) -> Result:
        """What became of a file with these contents. ``checked``: kernels check every access; one that is outside is a fault as well."""
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, *COMMAND, str(self.megabytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        path = self.folder / f"mutant{suffix}"
        path.write_bytes(data)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"path": str(path), "peer": self.peer, "checked": checked}).encode() + b"\n")
        first = self._line()
        if isinstance(first, str):
            status = self.stop()
            return {"outcome": first, "signature": f"{first} {status if first == 'crash' else ''}", "detail": f"status {status}"}
        second = self._line()
        if isinstance(second, str):
            self.stop()
            second = {"peer": "dies" if second == "crash" else "hangs"}
        return {**first, **second}

    def try_edits(self, base: str, kind: str, edits: Sequence[int], checked: bool = False) -> Result:
        data, done = apply(base, kind, edits)
        return {**self.attempt(data, ".gguf" if base.endswith(".gguf") else ".onnx", checked), "edits": done}


def shrunk(worker: Worker, base: str, kind: str, edits: Sequence[int], found: Result, checked: bool) -> list[int]:
    """As few of the edits as still give the same fault."""
    left = list(edits)
    for e in list(left):
        fewer = [x for x in left if x != e]
        if fewer and worker.try_edits(base, kind, fewer, checked).get("signature") == found["signature"]:
            left = fewer
    return left


def one(worker: Worker, seed: int, number: int) -> Result:
    """Mutant ``number``: tried, and shrunk where it is a fault."""
    base, kind, edits = mutant(seed, number)
    checked = number % 4 == 3
    result = worker.try_edits(base, kind, edits, checked)
    if result["outcome"] == "hang":  # or the machine was busy: once more, with four times as long
        worker.timeout *= 4
        result = worker.try_edits(base, kind, edits, checked)
        worker.timeout /= 4
    if result["outcome"] in FAULTS:
        left = shrunk(worker, base, kind, edits, result, checked)
        if left != edits:
            edits, result = left, worker.try_edits(base, kind, left, checked)
    return {"number": number, "base": base, "kind": kind, "chosen": edits, **result}


def run(seed: int, numbers: Iterable[int], jobs: int, out: Path | None = None, **limits: Any) -> list[Result]:
    """All of ``numbers``; each result is appended to ``out`` as it comes."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for n in numbers:
        waiting.put(n)
    results: list[Result] = []
    lock = threading.Lock()

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder, Worker(Path(folder), **limits) as worker:
            while True:
                try:
                    n = waiting.get_nowait()
                except queue.Empty:
                    return
                result = one(worker, seed, n)
                with lock:
                    results.append(result)
                    if out is not None:
                        with out.open("a", encoding="utf-8") as f:
                            f.write(json.dumps(result) + "\n")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def read_results(path: Path) -> list[Result]:
    """A last line that was cut short is left out."""
    out = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                out.append(dict(json.loads(line)))
            except ValueError:
                continue
    return out


def family(result: Result) -> str:
    base = str(result["base"])
    return "ONNX suite" if base.startswith("suite/") else base


def argued(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Mutants whose answers differ, by the text of the first kind of :data:`ARGUED` that they are of; ``UNARGUED`` for the
    others."""
    out: dict[str, list[Result]] = {}
    for r in results:
        if r.get("peer") == "differs":
            data, _ = apply(str(r["base"]), str(r["kind"]), r["chosen"])
            try:
                model = onnx.load_from_string(data)
                text = next((k.text for k in ARGUED if k.holds(model, str(r["peer_detail"]))), UNARGUED)
            except DecodeError:
                text = UNARGUED
            out.setdefault(text, []).append(r)
    return out


def table(results: Sequence[Result], seed: int) -> str:
    """The results as Markdown."""
    columns = ("refused", "ran", "compiled", *FAULTS)
    lines = [
        f"Seed {seed}, {len(results)} mutants. *agrees*, *differs*: of those that ran, where onnxruntime ran them too.", "",
        "| model | mutants | " + " | ".join(columns) + " | agrees | differs |", "|---|---|" + "---|" * (len(columns) + 2),
    ]  # fmt: skip
    names = sorted({family(r) for r in results})
    for name in [*names, "all"]:
        mine = [r for r in results if name in (family(r), "all")]
        outcomes, peers = Counter(r["outcome"] for r in mine), Counter(r.get("peer") for r in mine)
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(str(outcomes[c]) for c in columns) + f" | {peers['agrees']} | {peers['differs']} |")
    kinds = argued(results)
    if kinds:
        lines += ["", "Answers that differ, by the reason:", ""]
        for text, rows in kinds.items():
            lines.append(f"* {text}: {', '.join(str(r['number']) for r in rows)}")
    died = Counter(r.get("peer") for r in results)
    lines += ["", f"onnxruntime itself died of {died['dies']} and hung on {died['hangs']} of them."]
    found: dict[str, list[Result]] = {}
    for r in results:
        if r["outcome"] in FAULTS:
            found.setdefault(str(r["signature"]), []).append(r)
    if found:
        lines += ["", "Faults, by what they end in:", ""]
        for text, rows in sorted(found.items(), key=lambda kv: -len(kv[1])):
            lines.append(f"* {len(rows)} x `{text[:200]}` (first: {rows[0]['number']}, {', '.join(rows[0]['edits'])} of {family(rows[0])})")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--megabytes", type=int, default=6000, help="address space of a worker")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for a mutant")
    parser.add_argument("--again", choices=("faults", "differs"), help="try only what was found before, and replace those results")
    parser.add_argument("--only", type=int, help="try this mutant alone and print what happens")
    parser.add_argument("--report", type=Path, help="write the table to this file")
    given = parser.parse_args()
    limits = {"megabytes": given.megabytes, "timeout": given.timeout}
    if given.only is not None:
        with tempfile.TemporaryDirectory() as folder, Worker(Path(folder), **limits) as worker:
            print(json.dumps(one(worker, given.seed, given.only), indent=1))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    out = given.folder / f"results-{given.seed}.jsonl"
    known = read_results(out)
    if given.again:
        stale = {r["number"] for r in known if (r["outcome"] in FAULTS if given.again == "faults" else r.get("peer") == "differs")}
        known = [r for r in known if r["number"] not in stale]
        out.write_text("".join(json.dumps(r) + "\n" for r in known), encoding="utf-8")
        numbers = sorted(stale)
    else:
        done = {r["number"] for r in known}
        numbers = [n for n in range(given.count) if n not in done]
    results = known + run(given.seed, numbers, given.jobs, out, **limits)
    text = table(results, given.seed)
    print(text)
    if given.report is not None:
        given.report.write_text("# Mutated models\n\n`python -m benchmarks.fuzz`: " + text, encoding="utf-8")
    sys.exit(1 if any(r["outcome"] in FAULTS for r in results) or UNARGUED in argued(results) else 0)


if __name__ == "__main__":
    main()
