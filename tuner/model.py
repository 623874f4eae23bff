"""The cost model: which of several ways to build a kernel is the fastest, from the numbers of :mod:`luthier.tuner.features`.

Trees that XGBoost was trained to (``luthier tune --train``), shipped as ``ranker.json`` and read here in numpy: using them needs no
xgboost. A candidate is described by how its numbers differ from the default's, beside the default's own; the score is low for what is
likely to be fast. ``analytic`` is the rank without learning: cycles from operations, loads and bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from luthier.tuner.features import NAMES

__all__ = ["Ranker", "analytic", "describe", "shipped"]

Array = np.ndarray[Any, Any]
FILE = Path(__file__).with_name("ranker.json")


@dataclass(frozen=True)
class Ranker:
    """``feature``, ``threshold``, ``left``, ``right``, ``value``: of all nodes of all trees; leaves have feature -1; ``roots``: where the
    trees begin. ``names``: of the features that it was trained on."""

    roots: Array
    feature: Array
    threshold: Array
    left: Array
    right: Array
    value: Array
    names: tuple[str, ...]

    def score(self, rows: Array) -> Array:
        """f64[n] of f32[n, features]."""
        x = np.asarray(rows, np.float32)
        total = np.zeros(len(x))
        lines = np.arange(len(x))
        for root in self.roots:
            at = np.full(len(x), root)
            while True:
                f = self.feature[at]
                inner = f >= 0
                if not inner.any():
                    break
                smaller = x[lines, np.maximum(f, 0)] < self.threshold[at]
                at = np.where(inner, np.where(smaller, self.left[at], self.right[at]), at)
            total += self.value[at]
        return total

    def to_json(self) -> dict[str, Any]:
        columns = ("roots", "feature", "threshold", "left", "right", "value")
        return {"names": list(self.names), **{c: getattr(self, c).tolist() for c in columns}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ranker:
        whole = {c: np.asarray(data[c], np.int64) for c in ("roots", "feature", "left", "right")}
        return cls(**whole, **{c: np.asarray(data[c], np.float32) for c in ("threshold", "value")}, names=tuple(data["names"]))


def describe(candidate: Sequence[float], default: Sequence[float]) -> list[float]:
    """What the model reads of a candidate: its features less the default's, then the default's."""
    return [*(a - b for a, b in zip(candidate, default, strict=True)), *default]


def analytic(candidate: Sequence[float]) -> float:
    """log2 of estimated cycles: two vector operations and 1.4 loads a cycle, a cycle a round of a loop, 8 bytes a cycle."""
    t = {n: 2.0**v - 1 for n, v in zip(NAMES, candidate, strict=True)}
    work = max(t["vector_ops"] / 2 + t["scalar_ops"] / 3, (t["vector_loads"] + t["scalar_loads"]) / 1.4, t["loaded_bytes"] / 64)
    return float(np.log2(1 + work + t["rounds_of_all_loops"] + t["masked_stores"] * 4 + t["branches"] + t["divisions"] * 4))


@cache
def shipped() -> Ranker | None:
    """The model inside the package; None where it was trained on other features."""
    try:
        found = Ranker.from_json(json.loads(FILE.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return None
    return found if found.names == NAMES else None
