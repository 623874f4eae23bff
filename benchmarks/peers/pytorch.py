"""torch, eager, on the module that the ONNX file was exported from (silero: on the package's TorchScript file)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
import torch  # noqa: E402

from benchmarks.peers.worker import Bind, Inputs, Job, Loaded, serve  # noqa: E402


def flatten(result: Any) -> list[Any]:
    """The tensors of a possibly nested result, in order, as numpy arrays."""
    if isinstance(result, torch.Tensor):
        return [result.numpy()]
    return [array for part in result for array in flatten(part)]


def module_for(job: Job) -> tuple[torch.nn.Module, list[str]]:
    """The torch module of a model and its inputs' names. Raises RuntimeError where there is none."""
    from benchmarks.export_model import build

    if job.name not in ("mobilenetv2", "resnet50", "minilm", "vit-tiny", "gpt2", "mlp"):
        raise RuntimeError("no torch form of this model")
    weights = Path(job.original).parent / ".packages" / "minilm" / "model.safetensors"
    module, _, names, *_ = build(job.name, weights)
    return module.eval(), names


def bind_module(run: Callable[..., Any], names: list[str], gathered: bool, version: str) -> Bind:
    """Binds tensors that share the inputs' memory; `gathered` passes all inputs but the first as one list."""

    def bind(sets: list[Inputs]) -> Loaded:
        calls: list[Callable[[], Any]] = []
        for inputs in sets:
            tensors = [torch.from_numpy(inputs[name]) for name in names]
            args = [tensors[0], tensors[1:]] if gathered else tensors

            def call(args: list[Any] = args) -> Any:
                with torch.inference_mode():
                    return run(*args)

            calls.append(call)
        return Loaded(version, calls, lambda: flatten(calls[0]()))

    return bind


def load(job: Job) -> Bind:
    """Builds the module; `options["compile"]` puts it through torch.compile with weights frozen."""
    torch.set_num_threads(job.threads)
    module, names = module_for(job)
    if not job.options.get("compile"):
        return bind_module(module, names, job.name == "gpt2", torch.__version__)
    import torch._inductor.config as inductor

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(job.cache / "inductor"))
    inductor.freezing = True
    compiled = torch.compile(module, mode=job.options.get("mode", "default"), dynamic=False)
    bind = bind_module(compiled, names, job.name == "gpt2", torch.__version__)
    from benchmarks.models import get

    bind([get(job.name).make_inputs(0)]).calls[0]()  # the first call compiles: part of loading
    return bind


if __name__ == "__main__":
    serve(load)
