"""IREE: data tiling, host CPU, parameters in an external archive, `local-sync` for one thread and `local-task` for more."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# This file shares its name with the package that it imports: its folder must not be on the path.
sys.path[0] = str(Path(__file__).resolve().parents[2])
import iree.compiler as compiler  # noqa: E402
import iree.runtime as runtime  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.peers.worker import Bind, Inputs, Job, Loaded, serve  # noqa: E402

FLAGS = ("--iree-llvmcpu-target-cpu=host", "--iree-opt-data-tiling", "--iree-llvmcpu-stack-allocation-limit=262144")


def load(job: Job) -> Bind:
    """Imports and compiles (kept in the cache for the next run), then creates the context."""
    import onnx

    model = onnx.load(job.model)
    # The names of the model's ports are not in the compiled module: the importer keeps their order.
    known = {entry.name for entry in model.graph.initializer}
    names = [entry.name for entry in model.graph.input if entry.name not in known]
    del model
    digest = hashlib.sha256(Path(job.model).read_bytes() + repr(FLAGS).encode()).hexdigest()[:16]
    folder = job.cache / "iree" / f"{job.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    seconds = folder / "seconds"
    mlir, params, binary = folder / "model.mlir", folder / "params.irpa", folder / "model.vmfb"
    kept = float(seconds.read_text()) if seconds.exists() else 0.0
    if not binary.exists():
        started = time.perf_counter()
        importer = [sys.executable, "-m", "iree.compiler.tools.import_onnx", job.model, "-o", str(mlir)]
        importer += ["--externalize-params", "--save-params-to", str(params)]
        done = subprocess.run(importer, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the importer failed: {done.stderr.strip()[-400:]}")
        scratch = binary.with_suffix(".part")
        compiler.compile_file(
            str(mlir), output_file=str(scratch), target_backends=["llvm-cpu"], input_type="onnx", extra_args=list(FLAGS)
        )
        scratch.rename(binary)
        seconds.write_text(str(time.perf_counter() - started))
    if job.threads > 1:
        runtime.flags.parse_flags("--task_topology_mode=physical_cores", f"--task_topology_group_count={job.threads}")
    config = runtime.Config("local-sync" if job.threads == 1 else "local-task")
    modules = []
    if params.exists():
        index = runtime.ParameterIndex()
        index.load(str(params))
        provider = index.create_provider("model")
        modules.append(runtime.create_io_parameters_module(config.vm_instance, provider))
    modules.append(runtime.create_hal_module(config.vm_instance, config.device))
    modules.append(runtime.VmModule.mmap(config.vm_instance, str(binary)))
    vm = runtime.load_vm_modules(*modules, config=config)[-1]
    entry = next(name for name in vm.vm_module.function_names if not name.endswith("$async") and name != "__init")
    function = vm[entry]

    def bind(sets: list[Inputs]) -> Loaded:
        calls: list[Callable[[], Any]] = []
        for inputs in sets:
            args = [runtime.asdevicearray(config.device, inputs[name]) for name in names]
            calls.append(lambda args=args: function(*args))

        def outputs() -> list[Any]:
            results = calls[0]()
            results = results if isinstance(results, tuple | list) else (results,)
            return [np.asarray(r.to_host()) for r in results]

        return Loaded(version("iree-base-runtime"), calls, outputs, kept_s=kept)

    return bind


if __name__ == "__main__":
    serve(load)
