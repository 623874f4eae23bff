"""Starts, feeds, stops and resumes the workers of `benchmarks/peers/`; used by `cpu.py`."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.models import ModelCase, model_dir  # noqa: E402
from benchmarks.setup_peers import peers_python  # noqa: E402

# Runtime -> (worker script, options for it). "luthier" runs in this interpreter's environment, the others in theirs;
# "before" is another tree of Luthier, whose interpreter LUTHIER_BEFORE names.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "luthier": ("luthier", {}),
    **({"before": ("luthier", {})} if "LUTHIER_BEFORE" in os.environ else {}),
    "onnxruntime": ("onnxruntime", {}),
    "openvino": ("openvino", {}),
    "torch": ("pytorch", {}),
    "torch.compile": ("pytorch", {"compile": True}),
    "tvm": ("tvm", {"trials": int(os.environ.get("TVM_TRIALS", "0"))}),
    "iree": ("iree", {}),
}


PRCTL = ctypes.CDLL(None).prctl


class PeerError(Exception):
    """A runtime could not do what it was asked; the text is its own message."""


def pinned_model(case: ModelCase) -> Path:
    """The model with the shapes of its inputs replaced by `case.shapes`, cached. For runtimes that read shapes there."""
    import onnx
    import onnxruntime

    if not case.pin:
        return case.path
    assert case.shapes is not None
    stat = case.path.stat()
    key = hashlib.sha256(f"{case.shapes}{stat.st_size}{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    out = model_dir() / ".pinned" / f"{case.name}-{key}.onnx"
    if out.exists():
        return out
    model = onnx.load(str(case.path))
    known = {entry.name for entry in model.graph.initializer}
    for entry in model.graph.input:
        if entry.name not in known:
            dims = entry.type.tensor_type.shape.dim
            for dim, size in zip(dims, case.shapes[entry.name], strict=True):
                dim.dim_value = size
    session = onnxruntime.InferenceSession(str(case.path), providers=["CPUExecutionProvider"])
    results = session.run(None, case.make_inputs(0))
    for entry, result in zip(model.graph.output, results, strict=True):  # in place of the file's own symbols
        entry.type.tensor_type.ClearField("shape")
        for size in np.shape(result):
            entry.type.tensor_type.shape.dim.add().dim_value = size
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_suffix(f".{os.getpid()}")
    onnx.save(model, str(scratch))
    os.replace(scratch, out)
    return out


def folded_model(case: ModelCase) -> Path:
    """The pinned model with its shape arithmetic folded, at opset 17 or newer, for runtimes that stumble over it; standard operators only."""
    import onnx.version_converter
    import onnxruntime

    pinned = case.static_twin or pinned_model(case)
    out = model_dir() / ".pinned" / f"{pinned.stem}.folded.onnx"
    if not out.exists():
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        scratch = out.with_suffix(f".{os.getpid()}.onnx")
        options.optimized_model_filepath = str(scratch)
        out.parent.mkdir(parents=True, exist_ok=True)
        onnxruntime.InferenceSession(str(pinned), options, providers=["CPUExecutionProvider"])
        model = onnx.load(str(scratch))
        if all(entry.version < 17 for entry in model.opset_import if entry.domain == ""):
            onnx.save(onnx.version_converter.convert_version(model, 17), str(scratch))
        os.replace(scratch, out)
    return out


def file_for(label: str, case: ModelCase) -> Path:
    """The form of a model that suits a runtime best."""
    if label in ("tvm", "iree"):
        return folded_model(case)
    if label == "openvino" and case.static_twin is not None:
        return case.static_twin
    return pinned_model(case)


def input_sets(case: ModelCase, count: int) -> Path:
    """`count` sets of inputs of the pinned shapes in one file, cached."""
    stamp = int(max((Path(__file__).parent / f"{n}.py").stat().st_mtime for n in ("model_inputs", "block_nets")))
    out = model_dir() / ".inputs" / f"{case.name}-{count}-{stamp}.npz"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"{i}/{k}": v for i in range(count) for k, v in case.make_inputs(i).items()}
        scratch = out.with_name(f".{os.getpid()}-{out.name}")
        np.savez(scratch, **arrays)  # type: ignore[arg-type]
        os.replace(scratch, out)
    return out


def prepare_worker(cpus: list[int]) -> None:
    """In the new process: pins it, and has the kernel end it with its parent (it may be stopped, and deaf, just then)."""
    os.sched_setaffinity(0, cpus)
    PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Peer:
    """One runtime with one model in one process, stopped (SIGSTOP) whenever it is not its turn."""

    def __init__(self, label: str, case: ModelCase, threads: int, cpus: list[int], log: Path, sets: int = 8) -> None:
        self.label = label
        script, options = PEERS[label]
        python = os.environ["LUTHIER_BEFORE"] if label == "before" else sys.executable if script == "luthier" else peers_python()
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), OPENVINO_TELEMETRY="0", TVM_NUM_THREADS=str(threads), TVM_BIND_THREADS="0")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "peers" / f"{script}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            env=environment,
            preexec_fn=lambda: prepare_worker(cpus),
        )
        self.pending = b""
        self.times: list[list[float]] = []
        assert case.shapes is not None
        self.loaded = self._ask(
            {
                "cmd": "load",
                "name": case.name,
                "model": str(file_for(label, case)),
                "original": str(case.path),
                "shapes": {} if case.open else case.shapes,
                "inputs": str(input_sets(case, sets)),
                "threads": threads,
                "cache": str(ROOT / "build" / "peers"),
                "options": options,
            },
            limit=1800.0,
        )
        self.loaded["load_s"] += self.loaded.pop("kept_s")
        self.stop()

    def _ask(self, request: dict[str, Any], limit: float = 300.0) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its end of output, below, tells of it
        end = time.monotonic() + limit
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                self.close()
                tail = " / ".join(self.log.read_text(errors="replace").strip().splitlines()[-2:])[-300:]
                why = "ended" if ready else f"took over {limit:.0f} s"
                raise PeerError(f"its process {why}: {tail}")
            self.pending += part
        line, _, self.pending = self.pending.partition(b"\n")
        answer = json.loads(line)
        if not answer.pop("ok"):
            self.close()
            raise PeerError(answer["error"])
        return dict(answer)

    def stop(self) -> None:
        """Stops the process where it stands, spinning threads included."""
        self.process.send_signal(signal.SIGSTOP)

    def schedule(self, policy: int, priority: int) -> None:
        """Sets the scheduling policy of every thread of the process. Raises PermissionError without the right to."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread that ended meanwhile
                os.sched_setscheduler(int(task.name), policy, os.sched_param(priority))

    def turn(self, count: int, warm: int, realtime: bool = False) -> list[float]:
        """Resumes, runs `warm` untimed and `count` timed calls, stops; milliseconds of each.

        With `realtime` the process takes precedence over all ordinary ones during its turn.
        """
        if realtime:
            self.schedule(os.SCHED_RR, 1)
        self.process.send_signal(signal.SIGCONT)
        times = list(self._ask({"cmd": "run", "count": count, "warm": warm})["ms"])
        self.stop()
        if realtime:
            self.schedule(os.SCHED_OTHER, 0)
        return times

    def outputs(self, path: Path) -> list[np.ndarray[Any, Any]]:
        """The outputs for the first set of inputs, in the model's order."""
        self.process.send_signal(signal.SIGCONT)
        self._ask({"cmd": "outputs", "path": str(path)})
        self.stop()
        with np.load(path) as file:
            return [file[str(i)] for i in range(len(file.files))]

    def close(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
