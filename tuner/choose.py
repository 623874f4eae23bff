"""Which of the kernels that several templates make of one Compute is used: the fastest on this machine, measured once.

    with Chooser(parse_target("cpu")) as choose:
        build(compute, caps, constants, Record(choose=choose))

Where templates fit the same pattern (look-ups in tables or dot products for low-bit weights), the compiler makes all of their kernels and
asks. Candidates take turns in the isolated measurer; their weights go by as in a model, where other layers' come in between. Answers
are kept in a file by the candidates' loop IR and the processor, so that a kernel is measured once on a machine, whatever the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier import settings
from luthier.codegen.target import Target
from luthier.schedules.select import Kernels
from luthier.tuner.measure import Measurement, Measurer, compare

__all__ = ["Chooser"]

ROUNDS = 3
SPREAD = 2  # times the last-level cache


class Chooser:
    """Called with kernels that compute the same; returns one of them. ``store``: JSON file of answers (default: ``choices.json`` in the
    folder of the kernel cache). ``measure``: takes the candidates and gives a time for each, for tests.

    Raises TuningError when code for ``target`` does not run on this machine."""

    def __init__(self, target: Target, store: Path | None = None, measure: Callable[[Sequence[Kernels]], Sequence[Measurement]] | None = None) -> None:
        self.target = target
        self.store = store or settings.cache_dir.get() / "choices.json"
        self.known: dict[str, Any] = _read(self.store)
        self.measurer = None if measure else Measurer(target)
        self.measure = measure or self._measure

    def __enter__(self) -> Chooser:
        return self

    def __exit__(self, *_: object) -> None:
        if self.measurer is not None:
            self.measurer.close()

    def __call__(self, found: Sequence[Kernels]) -> Kernels:
        key = self.key(found)
        answer: dict[str, Any] | None = self.known.get(key)
        if answer is None:
            results = self.measure(found)
            times = [m.median for m in results]
            best = min(range(len(found)), key=lambda i: times[i])  # the first one where none could be measured
            answer = {
                "best": best,
                "candidates": [{"template": k.template, "seconds": m.median if m.seconds else None, "error": m.error} for k, m in zip(found, results, strict=True)],
            }
            self.known[key] = answer
            if min(times) < float("inf"):
                _add(self.store, key, answer)
        return found[int(answer["best"])]

    def key(self, found: Sequence[Kernels]) -> str:
        """Of the candidates in their order, and the processor they are for."""
        h = hashlib.sha256(f"{self.target.cpu}\n{self.target.features}\n".encode())
        for k in found:
            h.update("\n".join([k.template, *(str(f) for f in k.funcs), ""]).encode())
        return h.hexdigest()

    def _measure(self, found: Sequence[Kernels]) -> list[Measurement]:
        assert self.measurer is not None
        dims = {v.attr[0]: 1 for k in found for f in k.funcs for v in f.scalars}  # open extents: a single row, as in decoding
        return compare(self.measurer, found, None, dims, ROUNDS, SPREAD * self.target.caps.l3)


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
