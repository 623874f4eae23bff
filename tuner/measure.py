"""Measuring kernels in a process of its own: LLVM may refuse a candidate, die on it, or the candidate may never end.

    with Measurer(parse_target("cpu")) as m:
        for knobs in ({"mu": 4, "nv": 24}, {"mu": 6, "nv": 16}):
            print(knobs, m.measure(build(compute, target.caps, **knobs)))

The parent schedules; the worker gets loop IR as text, compiles it, makes inputs and runs it alone, on one thread or with the rounds of
parallel loops shared out to several. A worker that dies or exceeds its time is replaced, and the candidate gets an error instead of
a time. What a time is good for is a comparison: candidates of one comparison should alternate (:func:`compare`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.codegen.llvm.backend import Library, compile_text, kernel_text
from luthier.codegen.program.sharing import parallel_loop
from luthier.codegen.targets.target import Target, parse_target
from luthier.errors import LuthierError, TuningError
from luthier.ir.expr import Expr
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.loop import Buffer, Func
from luthier.ir.parser import parse_funcs
from luthier.passes.loop.legalize_dtype import LLVM_RULES, legalize_dtype
from luthier.passes.loop.lower_subbyte import lower_subbyte
from luthier.schedules.select import Kernels

Array = np.ndarray[Any, Any]
HUGE = 2 << 20  # bytes of a huge page


@dataclass(frozen=True, slots=True)
class Measurement:
    """``seconds``: of one run, several times; empty when there is an ``error``."""

    seconds: tuple[float, ...] = ()
    error: str = ""

    @property
    def median(self) -> float:
        """Infinite for a candidate that failed."""
        return statistics.median(self.seconds) if self.seconds else float("inf")


class Measurer:
    """``timeout``: seconds for compiling and running one candidate. ``repeats``: times taken, each over at least ``least`` seconds.
    ``threads``: run a kernel's parallel loop at once.

    Raises TuningError when the target's code cannot run on this machine."""

    def __init__(self, target: Target, timeout: float = 30.0, repeats: int = 5, least: float = 0.01, threads: int = 1) -> None:
        if target.missing_here():
            raise TuningError(f"code for {target.name} does not run on this machine", hint="measure on a machine that has it")
        self.target, self.timeout, self.repeats, self.least, self.threads = target, timeout, repeats, least, threads
        self.worker: subprocess.Popen[str] | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="luthier-measure-")
        self.count = 0

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop()
        self.folder.cleanup()

    def measure(
        self, kernels: Kernels, constants: Mapping[str, Array] | None = None, dims: Mapping[str, int] | None = None, spread: int = 0
    ) -> Measurement:
        """All kernels of a Compute, one after another. ``constants``: contents of parameters (others are random); ``dims``: values of the
        kernels' scalars by name. ``spread``: bytes of constants that go by before the same ones are read again, as the weights of a
        model's other layers do: copies of them take turns."""
        job = self.prepare(kernels, constants, dims, spread)
        return job if isinstance(job, Measurement) else self.run(job)

    def prepare(
        self, kernels: Kernels, constants: Mapping[str, Array] | None = None, dims: Mapping[str, int] | None = None, spread: int = 0
    ) -> dict[str, Any] | Measurement:
        """What :meth:`run` takes, or an error; arguments as for :meth:`measure`."""
        if any(f.data for f in kernels.funcs):
            return Measurement(error="kernels with constant tables cannot be measured")
        self.count += 1
        base = Path(self.folder.name) / str(self.count)
        base.with_suffix(".txt").write_text("\n".join(str(f) for f in kernels.funcs), encoding="utf-8")
        np.savez(base.with_suffix(".npz"), **{**(constants or {}), **kernels.packed})  # type: ignore[arg-type]
        return {
            "base": str(base), "dims": dict(dims or {}), "target": self.target.name, "repeats": self.repeats, "least": self.least,
            "spread": spread, "threads": self.threads,
        }  # fmt: skip

    def run(self, job: Mapping[str, Any], keep: bool = False) -> Measurement:
        """Times of a prepared job. ``keep``: its code and memory stay in the worker for the next run, which need not compile it again;
        a run without lets all of them go."""
        answer = self._ask(json.dumps({**job, "keep": keep}))
        return Measurement(tuple(answer.get("seconds", ())), answer.get("error", ""))

    def results(
        self, kernels: Kernels, names: Sequence[str], constants: Mapping[str, Array] | None = None, dims: Mapping[str, int] | None = None
    ) -> dict[str, Array] | str:
        """Tensors ``names`` after one run, the same inputs for kernels that read the same; a text says why there are none."""
        job = self.prepare(kernels, constants, dims)
        if isinstance(job, Measurement):
            return job.error
        answer = self._ask(json.dumps({**job, "keep": False, "results": list(names)}))
        if "error" in answer:
            return str(answer["error"])
        with np.load(job["base"] + ".out.npz") as found:
            return {n: found[n] for n in found.files}

    def _ask(self, line: str) -> dict[str, Any]:
        w = self.worker
        if w is None:
            w = self.worker = subprocess.Popen(
                [sys.executable, "-c", "from luthier.tuner.measure import serve; serve()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, bufsize=1,
            )  # fmt: skip
        assert w.stdin is not None and w.stdout is not None
        try:
            w.stdin.write(line + "\n")
            w.stdin.flush()
            ready, _, _ = select.select([w.stdout], [], [], self.timeout)
            text = w.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, text = [w.stdout], ""
        if text:
            answer: dict[str, Any] = json.loads(text)
            return answer
        self._stop()
        return {"error": f"the worker died (status {w.returncode})" if ready else f"not done after {self.timeout} s"}

    def _stop(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()
            for stream in (self.worker.stdin, self.worker.stdout):
                if stream is not None:
                    stream.close()
            self.worker = None


def compare(
    measurer: Measurer, candidates: Sequence[Kernels], constants: Mapping[str, Array] | None = None, dims: Mapping[str, int] | None = None,
    rounds: int = 3, spread: int = 0,
) -> list[Measurement]:  # fmt: skip
    """Every candidate in every round, in turns; the times of all rounds together. A candidate that fails is not tried again."""
    jobs = [measurer.prepare(c, constants, dims, spread) for c in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    errors = [""] * len(candidates)
    for turn in range(rounds):
        for k, job in enumerate(jobs):
            if not errors[k]:
                m = job if isinstance(job, Measurement) else measurer.run(job, keep=turn < rounds - 1 or k < len(jobs) - 1)
                times[k] += m.seconds
                errors[k] = m.error
    return [Measurement(() if e else tuple(t), e) for t, e in zip(times, errors, strict=True)]


# ---------------------------------------------------------------- the worker


def serve() -> None:
    """Jobs from standard input, one JSON object a line; an answer for each."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    kept: dict[str, _Job] = {}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            ready = kept.get(job["base"]) or _Job(job)
            answer: dict[str, Any] = {}
            if job.get("results"):
                ready.once(1)
                np.savez(job["base"] + ".out.npz", **{n: ready.rest[n] for n in job["results"]})  # type: ignore[arg-type]
            else:
                answer["seconds"] = ready.times(job["repeats"], job["least"])
            kept = {**kept, job["base"]: ready} if job["keep"] else {}
        except (LuthierError, TypeError, ValueError) as e:
            answer = {"error": str(e)}
        out.write(json.dumps(answer) + "\n")


class _Job:
    """Compiled kernels with their arguments, ready to run."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        base = Path(job["base"])
        target = parse_target(job["target"])
        funcs = parse_funcs(base.with_suffix(".txt").read_text(encoding="utf-8"))
        with np.load(base.with_suffix(".npz")) as given:
            size = sum(given[n].nbytes for n in given.files)
            copies = min(64, max(1, -(-job["spread"] // max(size, 1))))
            self.sets = [{n: _aligned(given[n]) for n in given.files} for _ in range(copies)]
        self.rest: dict[str, Array] = {}
        self.libraries: list[Library] = []
        self.turn, self.threads = 0, job["threads"]
        # [thread][set of constants]: calls. A kernel without a parallel loop is the first thread's
        self.calls: list[list[list[tuple[Any, tuple[Any, ...]]]]] = [[[] for _ in self.sets] for _ in range(self.threads)]
        for f in funcs.values():
            symbol, text = kernel_text(legalize_dtype(lower_subbyte(f), LLVM_RULES), target)
            lib = Library([compile_text(text.replace("define hidden", "define"), target)], [symbol])
            self.libraries.append(lib)
            env = {v: job["dims"][v.attr[0]] for v in f.scalars}
            for i, memory in enumerate(self.sets):
                fn, args, n = _call(lib.address(symbol), f, env, memory, self.rest)
                for k, mine in enumerate(self.calls[: self.threads if n else 1]):
                    mine[i].append((fn, (*args, n * k // self.threads, n * (k + 1) // self.threads)))

    def times(self, repeats: int, least: float) -> list[float]:
        """Seconds a run, ``repeats`` times over at least ``least`` seconds."""
        self.once(1)
        n = max(1, int(least / max(self.once(1), 1e-7)))
        return [self.once(n) / n for _ in range(repeats)]

    def once(self, n: int) -> float:
        """``n`` runs, each with the next set of constants. Threads take their shares without waiting for each other between runs: a
        kernel's rounds are independent of each other, and results are of no interest here."""
        others = [threading.Thread(target=self.share, args=(n, c)) for c in self.calls[1:]]
        t = time.perf_counter()
        for o in others:
            o.start()
        self.share(n, self.calls[0])
        for o in others:
            o.join()
        took = time.perf_counter() - t
        self.turn = (self.turn + n) % len(self.sets)
        return took

    def share(self, n: int, calls: list[list[tuple[Any, tuple[Any, ...]]]]) -> None:
        """A thread's part of ``n`` runs."""
        for i in range(self.turn, self.turn + n):
            for fn, args in calls[i % len(calls)]:
                fn(*args)


def _call(address: int, f: Func, env: Mapping[Expr, int], memory: dict[str, Array], rest: dict[str, Array]) -> tuple[Any, list[Any], int]:
    """(function, arguments, rounds of its parallel loop: 0 without). ``memory``: constants; ``rest``: every other buffer, made here when
    it is first met."""
    types: list[Any] = []
    args: list[Any] = []
    for p in f.params:
        if isinstance(p, Buffer):
            if p.name not in memory and p.name not in rest:
                n = int(evaluate_expr(p.size(), env))
                rest[p.name] = _aligned(_random(n * max(1, p.dtype.lanes), p))
            types.append(ctypes.c_void_p)
            args.append((memory if p.name in memory else rest)[p.name].ctypes.data)
        else:
            types.append(ctypes.c_double if p.dtype.is_float and p.dtype.bits == 64 else ctypes.c_float if p.dtype.is_float else ctypes.c_int64)
            args.append(env[p])
    loop = parallel_loop(f)
    return ctypes.CFUNCTYPE(None, *types, ctypes.c_int64, ctypes.c_int64)(address), args, int(evaluate_expr(loop[1], env)) if loop else 0


def _random(n: int, b: Buffer) -> Array:
    d = b.dtype.scalar
    if d.bits < 8:
        return np.random.default_rng(0).integers(0, 256, -(-n * d.bits // 8), np.uint8)
    if d.is_float and d.bits in (32, 64):
        return np.random.default_rng(0).standard_normal(n).astype(d.numpy)
    return np.zeros(n, d.numpy)


def _aligned(a: Array) -> Array:
    """A copy whose memory starts at a multiple of 64 bytes, with 64 bytes to spare; in huge pages where it is large and the system has
    them, as the weights of a module are."""
    if a.nbytes >= HUGE:
        m = mmap.mmap(-1, a.nbytes + 2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # ordinary pages serve
                m.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(m, np.uint8)
    else:
        raw = np.empty(a.nbytes + 128, np.uint8)
    at = -raw.ctypes.data % 64
    out = raw[at : at + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out
