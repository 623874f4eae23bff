"""A module with tuned kernels; the default where the whole model is not faster with them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from luthier.codegen.targets.target import Target
from luthier.debug.collection import collection_paused
from luthier.errors import LuthierError
from luthier.feeds import random_inputs
from luthier.ir.graph import Graph
from luthier.module import Module
from luthier.pipeline import compile_program
from luthier.targets import builder
from luthier.tuner.choose import Chooser
from luthier.tuner.tune import Tuner, Tuning

HURTS = 0.99  # below it the default is kept
ROUNDS, LEAST = 9, 0.01  # seconds of a turn


def build_tuned(graph: Callable[[], Graph], target: Target, threads: int | None, choose: Chooser, tune: object) -> Module:
    """The module with the points that were found for its kernels, or the default where the whole model is not faster with them."""
    tuning = Tuning.of(tune)
    make = builder(target.kind)

    def program(record: Any) -> Any:
        with collection_paused():
            return compile_program(graph(), target.caps, record=record)

    with Tuner(target, tuning, threads, choose) as tuner:
        found = tuner.tune(program)
        if not any(k.best for k in tuner.kernels):
            return make.build_module(found, target, threads)
        known = tuner.database.verdict(tuner.identity(), tuner.device)
        if known is not None and known < HURTS:
            tuning.gain, tuning.note = known, "the whole model was faster without"
            return make.build_module(tuner.default(program), target, threads)
        module = make.build_module(found, target, threads)
        if known is None and not tuner.interrupted:
            default = make.build_module(tuner.default(program), target, threads)
            known = gain_of(default, module, tuning.sizes)
            if known is not None:
                tuner.database.judge(tuner.identity(), tuner.device, known)
            if known is not None and known < HURTS:
                tuning.note = "the whole model is faster without"
                module = default
        tuning.gain = known
    return module


def gain_of(default: Module, tuned: Module, sizes: Mapping[str, int]) -> float | None:
    """The default's time over the tuned one's, medians of turns; None where the model does not run on random inputs."""
    shapes = {s.name: [d if isinstance(d, int) else int(sizes.get(str(d), 1 if k == 0 else 64)) for k, d in enumerate(s.shape)] for s in default.inputs}
    try:
        feeds = random_inputs(default.inputs, shapes)
        runs = max(1, int(LEAST / max(_seconds(default, feeds, 1), 1e-6)))
        _seconds(tuned, feeds, 1)
        times: list[tuple[float, float]] = []
        for k in range(ROUNDS):
            pair = [_seconds(m, feeds, runs) for m in ((default, tuned) if k % 2 else (tuned, default))]
            times.append((pair[0], pair[1]) if k % 2 else (pair[1], pair[0]))
    except LuthierError:
        return None
    return statistics.median(a / b for a, b in times)


def _seconds(module: Module, feeds: Mapping[str, Any], runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        module.run(feeds)
    return (time.perf_counter() - start) / runs
