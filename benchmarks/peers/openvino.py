"""OpenVINO: f32 arithmetic, latency hint, one stream, threads set, tensors bound."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file shares its name with the package that it imports: its folder must not be on the path.
sys.path[0] = str(Path(__file__).resolve().parents[2])
import openvino as ov  # noqa: E402

from benchmarks.peers.worker import Bind, Inputs, Job, Loaded, serve  # noqa: E402


def load(job: Job) -> Bind:
    """Reads and compiles the model."""
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(job.threads),
    }
    compiled = ov.Core().compile_model(job.model, "CPU", config)

    def bind(sets: list[Inputs]) -> Loaded:
        calls: list[Callable[[], Any]] = []
        requests: list[Any] = []
        for inputs in sets:
            request = compiled.create_infer_request()
            for port in compiled.inputs:
                name = next(name for name in port.get_names() if name in inputs)  # it may have others too
                request.set_tensor(port, ov.Tensor(inputs[name], shared_memory=True))
            requests.append((request, inputs))
            calls.append(request.infer)
        return Loaded(ov.__version__, calls, lambda: [requests[0][0].get_tensor(p).data for p in compiled.outputs])

    return bind


if __name__ == "__main__":
    serve(load)
