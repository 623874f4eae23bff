"""Tuning a model: its kernels, most costly first, are built with other values of their knobs and measured on this machine.

    with Tuner(parse_target("cpu"), Tuning(budget=30.0), threads=1) as t:
        program = t.tune(compile_once)   # compile_once(record) -> Program

1. The default of every kernel is compiled and timed; its calls in the program weigh it.
2. Points of the lite space (:mod:`luthier.tuner.space`) are tried in the order of the cost model (:mod:`luthier.tuner.model`) while the
   kernel's share of the budget lasts. Each runs in a process of its own, ended after a multiple of the best time.
3. The fastest few and the default take turns; the default runs twice. A winner must be faster by ``MARGIN``, and by twice what the two
   runs of the default are apart: on a machine that others use nothing is chosen. Its results must be the default's.

Measurements and choices are kept (:mod:`luthier.tuner.database`): a run that is ended goes on where it was, a second one measures nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from luthier import settings
from luthier.codegen.targets.target import Target, usable_cores
from luthier.errors import InputError
from luthier.ir.compute import Compute
from luthier.ir.expr import Expr
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.loop import Call, walk_stmts
from luthier.ir.program import Program
from luthier.schedules.base.schedule import ScheduleError
from luthier.schedules.lowbit.rivals import RIVALS
from luthier.schedules.select import Constants, Kernels, Point, Record, build
from luthier.tuner.choose import SPREAD
from luthier.tuner.database import Database, fingerprint, signature
from luthier.tuner.features import features
from luthier.tuner.measure import Measurement, Measurer, compare
from luthier.tuner.model import describe, shipped
from luthier.tuner.space import lite

__all__ = ["BUDGET", "Kernel", "Progress", "Tuner", "Tuning"]

BUDGET = 10.0  # seconds where none is named
MARGIN = 0.03
FINALISTS, TURNS = 3, 5
BUILDING = 0.5  # share of a kernel's time after which no more candidates are built
PATIENCE = 8  # candidates in a row that are no faster than the best so far
SMALL = 0.005  # share of the model's time below which a kernel is left alone
UNKNOWN = 16  # a scalar that only the run knows
AGREE = 1e-3  # of the largest magnitude: sums of floats in another order
Compile = Callable[[Record], Program]


@dataclass
class Kernel:
    """A kernel of the model: ``calls`` of it, ``seconds`` of its default, what was tried (point -> seconds) and ``best``."""

    compute: Compute
    constants: Constants
    default: Kernels
    calls: int
    dims: dict[str, int]
    key: str
    seconds: float = float("inf")
    tried: dict[str, float] = field(default_factory=dict)
    best: Point | None = None
    gain: float = 1.0
    why: str = ""
    known: bool = False

    @property
    def cost(self) -> float:
        return self.calls * self.seconds if self.seconds < float("inf") else 0.0


@dataclass(frozen=True)
class Progress:
    """``done`` of ``kernels`` are tuned; ``tried`` points so far, ``measured`` of them now; ``seconds`` the model's kernels take and
    ``best`` what they take with what was found; ``left`` seconds of the budget; ``doing``: the kernel at hand."""

    done: int
    kernels: int
    tried: int
    measured: int
    seconds: float
    best: float
    left: float
    doing: str


@dataclass
class Tuning:
    """``budget``: seconds of measuring; ``exact``: only points whose results are the default's bit for bit; ``exhaust``: all points of every
    kernel, however long; ``sizes``: values of open dimensions by name (default: 1 along the first axis of an input, 64 along others);
    ``report``: told of every step; ``store``: the database (default: ``tuned.sqlite`` in the folder of the kernel cache).

    After a compilation: ``kernels``, ``tried`` and ``measured`` points, ``gain`` of the whole model (None: not measured), ``note``."""

    budget: float = BUDGET
    exact: bool = False
    exhaust: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    report: Callable[[Progress], None] = lambda p: None
    store: Path | None = None
    kernels: list[Kernel] = field(default_factory=list)
    tried: int = 0
    measured: int = 0
    gain: float | None = None
    note: str = ""

    @classmethod
    def of(cls, value: object) -> Tuning:
        """``"30s"``, ``"2m"``, ``30`` or True (``BUDGET``), or a Tuning. Raises InputError."""
        if isinstance(value, Tuning):
            return value
        if value is True:
            return cls()
        text = str(value).strip().lower()
        scale = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
        try:
            budget = float(text if scale is None else text[:-1]) * (scale or 1.0)
        except ValueError:
            budget = 0.0
        if not 0 < budget < float("inf"):
            raise InputError(f"{value!r} is no time to tune", hint='write seconds: tune="30s"')
        return cls(budget)


class Tuner:
    """``threads``: of the module (default: the cores this process may use); ``choose``: between low-bit templates
    (:mod:`luthier.tuner.choose`). Raises TuningError where code for ``target`` does not run here."""

    def __init__(
        self, target: Target, tuning: Tuning, threads: int | None = None, choose: Callable[[Sequence[Kernels]], Kernels] | None = None,
        measurer: Measurer | None = None,
    ) -> None:  # fmt: skip
        self.target, self.tuning, self.threads, self.choose = target, tuning, threads or usable_cores(), choose
        self.measurer = measurer or Measurer(target, threads=self.threads, repeats=2, least=2e-3)
        self.database = Database(tuning.store or settings.cache_dir.get() / "tuned.sqlite")
        self.device = fingerprint(target, self.threads)
        self.kernels: list[Kernel] = []
        self.tried = self.measured = 0
        self.end = 0.0
        self.interrupted = False

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        t = self.tuning
        t.kernels, t.tried, t.measured = self.kernels, self.tried, self.measured
        self.measurer.close()
        self.database.__exit__()

    # ------------------------------------------------------------ the model

    def tune(self, compile: Compile) -> Program:
        """The program with the points that were found. An interrupt ends tuning and keeps what was found; what was found before is not
        measured again."""
        record = self.record()
        program = compile(record)
        self.kernels = self._kernels(record, program)
        if all(k.known for k in self.kernels):
            return program
        if any(k.best for k in self.kernels):  # found earlier, for other models: times are those of the default
            record = Record(self.choose, everything=True)
            program = compile(record)
            self.kernels = self._kernels(record, program)
        self.end = time.monotonic() + self.tuning.budget
        try:
            self._time_defaults()
            total = sum(k.cost for k in self.kernels)
            work = sorted((k for k in self.kernels if not k.known), key=lambda k: -k.cost)
            for i, k in enumerate(work):
                self._tell(i, len(work), k)
                if k.cost <= SMALL * total:
                    self._choose(k, Point(k.default.template), 1.0)
                    continue
                left, rest = self.end - time.monotonic(), sum(x.cost for x in work[i:])
                self._kernel(k, left * k.cost / rest if rest else 0.0)
        except KeyboardInterrupt:
            self.interrupted = True
        self._tell(len(self.kernels), len(self.kernels), None)
        return compile(self.record()) if any(k.best for k in self.kernels) else program

    def record(self) -> Record:
        """For a compilation with the points that are known."""

        def tuned(compute: Compute, constants: Constants) -> Point | None:
            key = signature(compute, constants)
            mine = next((k for k in self.kernels if k.key == key), None)
            found = self._chosen(key) if mine is None else (mine.best, mine.gain)
            return None if found is None else found[0]

        return Record(self.choose, tuned, everything=True)

    def default(self, compile: Compile) -> Program:
        """The program without any point."""
        return compile(Record(self.choose))

    def identity(self) -> str:
        """Of the model with its points: what a comparison of both is remembered by."""
        h = hashlib.sha256()
        for k in self.kernels:
            h.update(f"{k.key} {k.calls} {k.best}\n".encode())
        return h.hexdigest()

    def _chosen(self, key: str) -> tuple[Point | None, float] | None:
        """(point, None for the default, gain) of a kernel on which this much time was spent before; None for another."""
        found = None if self.tuning.exhaust else self.database.chosen(key, self.device, self.tuning.budget)
        return None if found is None else (found[0] if found[1] != 1.0 else None, found[1])

    def _kernels(self, record: Record, program: Program) -> list[Kernel]:
        values: dict[Expr, int] = {v: int(self.tuning.sizes.get(v.attr[0], 1 if k == 0 else 64)) for v, (_, k) in program.dims.items()}
        sites: dict[int, list[dict[str, int]]] = {}
        for s in walk_stmts(program.body):
            if isinstance(s, Call) and s.callee in program.kernels:
                f = program.kernels[s.callee]
                dims = {p.attr[0]: _evaluate(a, values) for p, a in zip(f.params, s.args, strict=True) if isinstance(p, Expr)}
                sites.setdefault(id(f.body), []).append(dims)
        out: dict[str, Kernel] = {}
        for compute, constants, k in record.made:
            called = [sites[id(f.body)] for f in k.funcs if id(f.body) in sites]
            if not called or not k.template or "+" in k.template or k.template in RIVALS:
                continue
            dims = {n: v for c in called for n, v in c[0].items()}
            key = signature(compute, constants)
            if key in out:
                out[key].calls += max(map(len, called))
            else:
                x = out[key] = Kernel(compute, constants, k, max(map(len, called)), dims, key)
                found = self._chosen(key)
                if found is not None:
                    x.known, x.best, x.gain = True, *found
        return list(out.values())

    # ------------------------------------------------------------ a kernel

    def _time_defaults(self) -> None:
        for k in self.kernels:
            known = self.database.measured(k.key, self._device(k)).get("default")
            if known is not None and known[0] is not None:
                k.seconds = known[0]
                continue
            m = self._measure(k, k.default, "default")
            k.seconds = min(m.seconds, default=float("inf"))

    def _device(self, k: Kernel) -> str:
        return f"{self.device} {sorted(k.dims.items())}"

    def _measure(self, k: Kernel, made: Kernels, name: str) -> Measurement:
        m = self.measurer.measure(made, self._inputs(k, made), k.dims, self._spread(made))
        self.measured += 1
        found = features(made, self.target.caps, k.dims) if m.seconds else None
        self.database.add(k.key, self._device(k), name, min(m.seconds, default=None), m.error, found)
        return m

    def _inputs(self, k: Kernel, made: Kernels) -> dict[str, np.ndarray[Any, Any]]:
        """Constants that the kernels read as they stand: tables of indices must not be random."""
        read = {b.name for f in made.funcs for b in f.buffers} - set(made.packed)
        return {n: np.ascontiguousarray(a) for n, a in k.constants.items() if n in read}

    def _spread(self, made: Kernels) -> int:
        """Weights pass by as they do in a model, where other layers' come in between, where those of one kernel are worth it."""
        size = sum(a.nbytes for a in made.packed.values())
        return SPREAD * self.target.caps.l3 if size > self.target.caps.l2 else 0

    def _kernel(self, k: Kernel, budget: float) -> None:
        known = self.database.measured(k.key, self._device(k))
        end = time.monotonic() + budget
        k.tried = {"default": k.seconds}
        made = self._candidates(k, end - (1 - BUILDING) * budget, known)
        since = 0
        for p, candidate in made.items():
            if (time.monotonic() > end or since >= PATIENCE) and not self.tuning.exhaust:
                break
            earlier = known.get(str(p))
            if earlier is None:
                self.measurer.timeout = max(5.0, 200 * k.seconds)
                m = self._measure(k, candidate, str(p))
                took = min(m.seconds, default=float("inf"))
            else:
                took = float("inf") if earlier[0] is None else earlier[0]
            since = 0 if took < min(k.tried.values()) else since + 1
            k.tried[str(p)] = took
            self.tried += 1
            self._tell(-1, -1, k)
        self._decide(k, made)

    def _candidates(self, k: Kernel, end: float, known: Mapping[str, tuple[float | None, str]]) -> dict[Point, Kernels]:
        """Kernels of the points that differ from each other and from the default, the likely fast ones first."""
        caps = self.target.caps
        texts, rows = {_text(k.default)}, []
        made: dict[Point, Kernels] = {}
        base = features(k.default, caps, k.dims)
        for p in lite(k.default.template, k.compute, caps, k.constants)[1:]:
            if time.monotonic() > end and not self.tuning.exhaust:
                break
            if known.get(str(p), (0.0, ""))[0] is None:  # it failed before
                continue
            try:
                candidate = build(k.compute, caps, k.constants, template=p.template, **dict(p.knobs))
            except (ScheduleError, AssertionError, ValueError, KeyError, TypeError, NotImplementedError, ZeroDivisionError) as e:
                self.database.add(k.key, self._device(k), str(p), None, f"{type(e).__name__}: {e}")
                continue
            text = _text(candidate)
            if text not in texts:
                texts.add(text)
                made[p] = candidate
                rows.append(describe(features(candidate, caps, k.dims), base))
        ranker = shipped()
        if ranker is None or not rows:
            return made
        score = ranker.score(np.array(rows))
        return {p: made[p] for _, p in sorted(zip(score, made, strict=True), key=lambda x: x[0])}

    def _decide(self, k: Kernel, made: Mapping[Point, Kernels]) -> None:
        """The finalists in turns with the default, which runs twice."""
        ranked = sorted((p for p in made if k.tried.get(str(p), float("inf")) < k.seconds * (1 + MARGIN)), key=lambda p: k.tried[str(p)])[:FINALISTS]
        default = Point(k.default.template)
        if ranked:
            both = [k.default, k.default, *(made[p] for p in ranked)]
            constants = {n: a for m in both for n, a in self._inputs(k, m).items()}
            results = compare(self.measurer, both, constants, k.dims, TURNS, self._spread(k.default))
            times = [m.median for m in results]
            apart = abs(times[0] / times[1] - 1) if times[1] < float("inf") else float("inf")
            base = min(times[:2])
            best = min(range(len(ranked)), key=lambda i: times[2 + i])
            gain = base / times[2 + best] if times[2 + best] > 0 else 0.0
            if apart > MARGIN:
                k.why = f"the machine is busy: the default differs from itself by {100 * apart:.0f} %"
                return
            if gain > 1 + max(MARGIN, 2 * apart):
                k.why = self._differs(k, made[ranked[best]])
                if not k.why:
                    self._choose(k, ranked[best], gain)
                    return
        elif made:  # was the default's own time taken in a quiet moment, and those of the others in a busy one?
            again = min(self.measurer.measure(k.default, self._inputs(k, k.default), k.dims, self._spread(k.default)).seconds, default=float("inf"))
            if again > k.seconds * (1 + 2 * MARGIN):
                k.why = f"the machine is busy: the default takes {again / k.seconds:.2f} times what it took"
                return
        self._choose(k, default, 1.0)

    def _choose(self, k: Kernel, point: Point, gain: float) -> None:
        k.best, k.gain = None if gain == 1.0 else point, gain
        self.database.choose(k.key, self.device, point, gain, self.tuning.budget)

    def _differs(self, k: Kernel, candidate: Kernels) -> str:
        """Why the results are not the default's; empty where they are."""
        outs = list(k.compute.outs)
        want = self.measurer.results(k.default, outs, {**k.constants}, k.dims)
        got = self.measurer.results(candidate, outs, {**k.constants}, k.dims)
        if isinstance(want, str) or isinstance(got, str):
            return f"not checked: {want if isinstance(want, str) else got}"
        for n in outs:
            a, b = want[n], got[n]
            if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
                continue
            if self.tuning.exact or a.dtype.kind != "f":
                return f"{n} differs"
            gap = np.abs(a.astype(np.float64) - b).max(initial=0)
            if not gap <= AGREE * max(float(np.abs(a[np.isfinite(a)]).max(initial=0)), 1e-30):
                return f"{n} is off by {gap:.2g}"
        return ""

    def _tell(self, done: int, count: int, k: Kernel | None) -> None:
        if done >= 0:
            self._at = (done, count)
        now = sum(x.cost for x in self.kernels)
        best = sum(x.cost / x.gain for x in self.kernels)
        self.tuning.report(Progress(*self._at, self.tried, self.measured, now, best, max(0.0, self.end - time.monotonic()), "" if k is None else k.compute.name))

    _at = (0, 0)


def _evaluate(e: Any, values: Mapping[Expr, int]) -> int:
    try:
        return int(evaluate_expr(e, values))
    except (KeyError, TypeError, ValueError, NotImplementedError, AttributeError):
        return UNKNOWN


def _text(k: Kernels) -> str:
    return "\n".join(str(f) for f in k.funcs)
