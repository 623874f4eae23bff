"""Luthier: static shapes, outputs donated, the whole model in one native call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# This file shares its name with the package that it imports: its folder must not be on the path, and neither may
# the repository's root, whose folders would be found under bare names.
_root = str(Path(__file__).resolve().parents[2])
sys.path[:] = [p for p in sys.path[1:] if p not in ("", _root)]
import luthier  # noqa: E402

sys.path.append(_root)
from benchmarks.peers.worker import Bind, Inputs, Job, Loaded, serve  # noqa: E402


def load(job: Job) -> Bind:
    """Compiles for this CPU, or for `options["target"]`."""
    target = job.options.get("target", "cpu")
    module = luthier.compile(job.original, target=target, shapes=job.shapes, threads=job.threads)

    def bind(sets: list[Inputs]) -> Loaded:
        calls: list[Callable[[], Any]] = []
        for inputs in sets:
            out = {name: np.empty_like(array) for name, array in module.run(inputs).items()}
            calls.append(lambda inputs=inputs, out=out: module.run(inputs, out=out))
        version = str(getattr(luthier, "__version__", "?"))
        return Loaded(version, calls, lambda: list(calls[0]().values()))

    return bind


if __name__ == "__main__":
    serve(load)
