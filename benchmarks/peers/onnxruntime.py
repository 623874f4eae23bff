"""ONNX Runtime: I/O binding, intra-op threads set, spinning on, all graph optimizations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file shares its name with the package that it imports: its folder must not be on the path.
sys.path[0] = str(Path(__file__).resolve().parents[2])
import onnxruntime as ort  # noqa: E402

from benchmarks.peers.worker import Bind, Inputs, Job, Loaded, serve  # noqa: E402


def load(job: Job) -> Bind:
    """Creates the session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.log_severity_level = 3
    session = ort.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])

    def bind(sets: list[Inputs]) -> Loaded:
        kept: list[Any] = []
        calls: list[Callable[[], Any]] = []
        latest: list[Any] = []
        for inputs in sets:
            binding = session.io_binding()
            for entry in session.get_inputs():
                value = ort.OrtValue.ortvalue_from_numpy(inputs[entry.name])
                kept.append(value)
                binding.bind_ortvalue_input(entry.name, value)
            for result in session.get_outputs():
                binding.bind_output(result.name)
            session.run_with_iobinding(binding)
            values = binding.get_outputs()  # now that their shapes are known, bind them: no allocation in the calls
            for result, value in zip(session.get_outputs(), values, strict=True):
                binding.bind_ortvalue_output(result.name, value)
            latest.append(binding)
            calls.append(lambda binding=binding: session.run_with_iobinding(binding))
        try:
            for call in calls * 2:
                call()
        except RuntimeError:  # lengths that are drawn: a binding keeps its outputs' shapes
            calls = [lambda inputs=inputs: session.run(None, inputs) for inputs in sets]
        return Loaded(ort.__version__, calls, lambda: [v.numpy() for v in latest[0].get_outputs()])

    return bind


if __name__ == "__main__":
    serve(load)
