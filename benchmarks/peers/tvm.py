"""TVM (Relax): host CPU named, static shapes; MetaSchedule's database of the model if TVM_TRIALS ever filled one.

`TVM_TRIALS=240 python benchmarks/cpu.py --peers tvm ...` tunes that long per model and thread count (minutes) and
keeps the result under `build/peers/tvm`; later runs use it. Without it TVM's default schedules run, far slower.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file shares its name with the package that it imports: its folder must not be on the path.
sys.path[0] = str(Path(__file__).resolve().parents[2])
import onnx  # noqa: E402
import tvm  # noqa: E402
from tvm import relax  # noqa: E402
from tvm.relax.frontend.onnx import from_onnx  # noqa: E402

from benchmarks.peers.worker import Bind, Inputs, Job, Loaded, serve  # noqa: E402


def host_cpu() -> str:
    """LLVM's name of this processor, from gcc's where that is the same; `x86-64-v3` when it cannot be asked."""
    done = subprocess.run(
        ["cc", "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        if line.strip().startswith("-march="):
            return line.split()[-1]
    return "x86-64-v3"


def load(job: Job) -> Bind:
    """Imports, tunes or takes the database, compiles."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": host_cpu(), "num-cores": job.threads})
    model = onnx.load(job.model)
    known = {entry.name for entry in model.graph.initializer}
    names = [entry.name for entry in model.graph.input if entry.name not in known]
    started = time.perf_counter()
    module = from_onnx(model)
    folder = job.cache / "tvm" / f"{job.name}-{job.threads}"
    trials = int(job.options.get("trials", 0))
    note = folder / "tuned.json"
    kept = 0.0
    if trials and not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with target:
            module = relax.get_pipeline(
                "static_shape_tuning", target=target, total_trials=trials, work_dir=str(folder)
            )(module)
        note.write_text(json.dumps({"trials": trials, "seconds": time.perf_counter() - started}))
    elif note.exists():
        kept = float(json.loads(note.read_text())["seconds"])
        with target:
            module = relax.get_pipeline("zero")(module)
            module = relax.transform.MetaScheduleApplyDatabase(str(folder))(module)
    else:
        module = relax.get_pipeline("zero")(module)
    with tvm.transform.PassContext(opt_level=3):
        compiled = tvm.compile(module, target)
    device = tvm.cpu(0)
    machine = relax.VirtualMachine(compiled, device)
    version = tvm.__version__ + (" tuned" if note.exists() else " untuned")

    def bind(sets: list[Inputs]) -> Loaded:
        calls: list[Callable[[], Any]] = []
        for inputs in sets:
            args = [tvm.runtime.tensor(inputs[name], device) for name in names]
            calls.append(lambda args=args: machine["main"](*args))

        def flatten(result: Any) -> list[Any]:
            return [result.numpy()] if hasattr(result, "numpy") else [a for part in result for a in flatten(part)]

        return Loaded(version, calls, lambda: flatten(calls[0]()), kept_s=kept)

    return bind


if __name__ == "__main__":
    serve(load)
