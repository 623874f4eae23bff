"""The part that all workers share: a line protocol of JSON on standard input and output.

    {"cmd": "load", "name", "model", "original", "shapes", "inputs": FILE.npz, "threads", "cache", "options"}
        -> {"ok": true, "load_s", "version", "rss_mb", "kept_s"}
    {"cmd": "run", "count", "warm"} -> {"ok": true, "ms": [one per call]}
    {"cmd": "outputs", "path"}      -> {"ok": true}     writes the outputs for the first set of inputs
    {"cmd": "quit"}
A failure answers {"ok": false, "error"}. Whatever a runtime prints goes to standard error. Times are of the call
alone: inputs and outputs are bound beforehand, and each call takes the next of several sets of inputs.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Inputs = dict[str, NDArray[Any]]


@dataclass
class Job:
    """What to load: `model` has its input shapes pinned, `original` is the file as it came, `sets` are the inputs."""

    name: str
    model: str
    original: str
    shapes: dict[str, tuple[int, ...]]
    threads: int
    cache: Path
    options: dict[str, Any]
    sets: list[Inputs] = field(default_factory=list)


@dataclass
class Loaded:
    """A runtime's answer: one call per set of inputs, and how to fetch what the latest call computed."""

    version: str
    calls: list[Callable[[], Any]]
    outputs: Callable[[], list[NDArray[Any]]]
    kept_s: float = 0.0  # what an earlier run spent on a result that this one took from the cache


def read_sets(path: str) -> list[Inputs]:
    """The sets of inputs in a file of arrays named `0/input`, `1/input`, ..."""
    sets: dict[int, Inputs] = {}
    with np.load(path) as file:
        for key in file.files:
            index, _, name = key.partition("/")
            sets.setdefault(int(index), {})[name] = np.require(file[key], requirements=["C", "A", "W"])
    return [sets[i] for i in sorted(sets)]


Bind = Callable[[list[Inputs]], Loaded]


def serve(load: Callable[[Job], Bind]) -> None:
    """Answers requests until `quit` or the end of input. `load(job)` compiles and returns `bind(sets) -> Loaded`."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    loaded: Loaded | None = None
    turn = 0
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["cmd"] == "quit":
                return
            if request["cmd"] == "load":
                shapes = {k: tuple(v) for k, v in request["shapes"].items()}
                job = Job(
                    request["name"],
                    request["model"],
                    request["original"],
                    shapes,
                    request["threads"],
                    Path(request["cache"]),
                    request["options"],
                )
                sets = read_sets(request["inputs"])
                started = time.perf_counter()
                bind = load(job)
                seconds = time.perf_counter() - started
                loaded = bind(sets)
                loaded.calls[0]()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                answer: dict[str, Any] = {"load_s": seconds, "version": loaded.version, "rss_mb": peak, "kept_s": loaded.kept_s}
            elif loaded is None:
                raise RuntimeError("nothing is loaded")
            elif request["cmd"] == "run":
                times: list[float] = []
                for i in range(-request["warm"], request["count"]):
                    call = loaded.calls[turn % len(loaded.calls)]
                    turn += 1
                    begin = time.perf_counter()
                    call()
                    if i >= 0:
                        times.append((time.perf_counter() - begin) * 1e3)
                answer = {"ms": times}
            elif request["cmd"] == "outputs":
                loaded.calls[0]()
                arrays = {str(i): np.asarray(a) for i, a in enumerate(loaded.outputs())}
                np.savez(request["path"], **arrays)  # type: ignore[arg-type]
                answer = {}
            else:
                raise RuntimeError(f"no command {request['cmd']!r}")
            channel.write(json.dumps({"ok": True, **answer}) + "\n")
        except Exception as error:  # reported to the driver, which shows it and goes on without this runtime
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            channel.write(json.dumps({"ok": False, "error": text[:600]}) + "\n")
