"""Training the cost model from databases of measurements. Needs the extra ``luthier[tune]`` (xgboost)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier import settings
from luthier.errors import TuningError
from luthier.tuner.database import Database
from luthier.tuner.features import NAMES
from luthier.tuner.model import FILE, Ranker, describe

Array = np.ndarray[Any, Any]
GRADES = 31  # of a point as fast as the best of its kernel; half as fast: half of them
LEAST = 4  # points of a kernel from which anything can be learned


def groups(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[tuple[str, float, list[float]]]]:
    """{(kernel, device and version of the templates): [(point, seconds, features)]}, the default first; kernels without a default or with few
    points are left out."""
    out: dict[tuple[str, str], list[tuple[str, float, list[float]]]] = {}
    for r in rows:
        if r["seconds"] is not None and r["features"]:
            found = json.loads(r["features"])
            if len(found) == len(NAMES):
                out.setdefault((r["kernel"], f"{r['device']} {r['version']}"), []).append((r["point"], r["seconds"], found))
    for points in out.values():
        points.sort(key=lambda p: p[0] != "default")
    return {k: p for k, p in out.items() if len(p) >= LEAST and p[0][0] == "default"}


def fit(data: Sequence[list[tuple[str, float, list[float]]]], rounds: int = 120, depth: int = 5) -> Ranker:
    """An XGBoost ranker (pairwise) over groups of points. Raises TuningError without xgboost or without data."""
    try:
        import xgboost
    except ImportError as e:
        raise TuningError("training needs xgboost", hint='pip install "luthier[tune]"') from e
    if not data:
        raise TuningError("there are no measurements to train from", hint="luthier tune --exhaust makes some")
    x = np.array([describe(f, g[0][2]) for g in data for _, _, f in g], np.float32)
    y = np.array([GRADES * min(s for _, s, _ in g) / t for g in data for _, t, _ in g])
    table = xgboost.DMatrix(x, y, qid=np.repeat(np.arange(len(data)), [len(g) for g in data]))
    options = {
        "objective": "rank:pairwise", "max_depth": depth, "eta": 0.1, "subsample": 0.8, "colsample_bytree": 0.7, "min_child_weight": 2, "seed": 0,
        "nthread": 2, "lambdarank_num_pair_per_sample": 8, "lambdarank_pair_method": "mean",
    }  # fmt: skip
    return from_booster(xgboost.train(options, table, rounds))


def from_booster(booster: Any) -> Ranker:
    """XGBoost's trees as arrays; scores are negated, so that low is fast."""
    roots: list[int] = []
    nodes: list[tuple[int, float, int, int, float]] = []

    def add(n: dict[str, Any]) -> int:
        at = len(nodes)
        nodes.append((-1, 0.0, 0, 0, 0.0))
        if "leaf" in n:
            nodes[at] = (-1, 0.0, at, at, -float(n["leaf"]))
        else:
            by_id = {c["nodeid"]: c for c in n["children"]}
            left, right = add(by_id[n["yes"]]), add(by_id[n["no"]])
            nodes[at] = (int(str(n["split"]).removeprefix("f")), float(n["split_condition"]), left, right, 0.0)
        return at

    for text in booster.get_dump(dump_format="json"):
        roots.append(add(json.loads(text)))
    f, t, left, right, v = zip(*nodes, strict=True)
    return Ranker(np.array(roots), np.array(f), np.array(t, np.float32), np.array(left), np.array(right), np.array(v, np.float32), NAMES)


def write(ranker: Ranker, path: Path) -> None:
    data = ranker.to_json()
    data["threshold"] = [round(float(x), 5) for x in data["threshold"]]
    data["value"] = [round(float(x), 5) for x in data["value"]]
    path.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")


def train_from(path: Path, databases: Sequence[Path] = ()) -> str:
    """Trains on ``databases`` (default: the one of this user) and writes the model; returns a line about it."""
    data: list[list[tuple[str, float, list[float]]]] = []
    for p in databases or [settings.cache_dir.get() / "tuned.sqlite"]:
        with Database(p) as db:
            data += groups(db.rows()).values()
    write(fit(data), path)
    return f"{path}: trained on {sum(map(len, data))} points of {len(data)} kernels, {path.stat().st_size / 1e3:.0f} KB (the package's own: {FILE.name})"
