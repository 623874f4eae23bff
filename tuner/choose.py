"""Which of the kernels that several templates make of one Compute is used: the fastest on this machine, measured once.

    with Chooser(parse_target("cpu"), threads=1) as choose:
        build(compute, caps, constants, Record(choose=choose))

Where templates fit the same pattern (look-ups in tables or dot products for low-bit weights), the compiler makes all of their kernels
(:mod:`luthier.schedules.lowbit.rivals`) and asks. Candidates take turns in the isolated measurer, on as many threads as the module will have; their weights
go by as in a model, where other layers' come in between. Answers are kept in a file by processor, threads and the candidates' loop IR, in
which names are numbers: width, group, shape, rows and epilogue decide, so a kernel is measured once on a machine, whatever the model. Where the
number of rows is open, the geometric mean of the times with one and with 16 rows decides.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from luthier import settings
from luthier.codegen.targets.target import Target, usable_cores
from luthier.schedules.select import Kernels
from luthier.tuner.measure import Measurement, Measurer, compare

__all__ = ["Chooser"]

ROUNDS = 3
SPREAD = 2  # times the last-level cache
MANY = 16  # rows beside one where their number is open
MARGIN = 0.03  # by which another candidate has to be faster than the one that is taken without a measurement


class Chooser:
    """Called with kernels that compute the same, the default first; returns one of them. ``threads``: of the module (default: the cores
    this process may use). ``store``: JSON file of answers (default: ``choices.json`` in the folder of the kernel cache). ``measure``: takes the
    candidates and gives a time for each, for tests. ``asked``, ``measured``: kernels so far.

    Raises TuningError when code for ``target`` does not run on this machine."""

    def __init__(
        self, target: Target, store: Path | None = None, measure: Callable[[Sequence[Kernels]], Sequence[Measurement]] | None = None,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        self.target, self.threads = target, threads or usable_cores()
        self.store = store or settings.cache_dir.get() / "choices.json"
        self.known: dict[str, Any] = _read(self.store)
        self.measurer = None if measure else Measurer(target, threads=self.threads)
        self.measure = measure or self._measure
        self.asked = self.measured = 0

    def __enter__(self) -> Chooser:
        return self

    def __exit__(self, *_: object) -> None:
        if self.measurer is not None:
            self.measurer.close()

    def __call__(self, found: Sequence[Kernels]) -> Kernels:
        key = self.key(found)
        answer: dict[str, Any] | None = self.known.get(key)
        self.asked += 1
        if answer is None:
            self.measured += 1
            results = self.measure(found)
            times = [min(m.seconds, default=float("inf")) for m in results]
            best = min(range(len(found)), key=lambda i: times[i])
            if times[0] <= times[best] * (1 + MARGIN):  # also where none could be measured
                best = 0
            answer = {
                "processor": self.target.cpu, "threads": self.threads, "best": best,
                "candidates": [
                    {"made": [" ".join(map(str, t)) for t in k.trace] or [k.template], "seconds": s if m.seconds else None, "error": m.error}
                    for k, m, s in zip(found, results, times, strict=True)
                ],
            }  # fmt: skip
            self.known[key] = answer
            if min(times) < float("inf"):
                _add(self.store, key, answer)
        return found[int(answer["best"])]

    def key(self, found: Sequence[Kernels]) -> str:
        """Of the candidates in their order, the processor they are for and the threads."""
        h = hashlib.sha256(f"{self.target.cpu}\n{self.target.features}\n{self.threads}\n".encode())
        for k in found:
            h.update("\n".join([k.template, *(str(f) for f in k.funcs), ""]).encode())
        return h.hexdigest()

    def _measure(self, found: Sequence[Kernels]) -> list[Measurement]:
        assert self.measurer is not None
        opens = {v.attr[0] for k in found for f in k.funcs for v in f.scalars}

        def at(rows: int) -> list[Measurement]:
            assert self.measurer is not None
            return compare(self.measurer, found, None, dict.fromkeys(opens, rows), ROUNDS, SPREAD * self.target.caps.l3)

        one = at(1)
        if not opens:
            return one
        pairs = zip(one, at(MANY), strict=True)  # a prompt counts as much as a step of decoding
        return [Measurement(tuple(sqrt(x * y) for x, y in zip(sorted(a.seconds), sorted(b.seconds), strict=False)), a.error or b.error) for a, b in pairs]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or cut off: measured again
        return {}
    return found if isinstance(found, dict) else {}


def _add(path: Path, key: str, answer: dict[str, Any]) -> None:
    """Beside what others wrote meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path) | {key: answer}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as f:
        json.dump(known, f, indent=1)
    os.replace(name, path)
