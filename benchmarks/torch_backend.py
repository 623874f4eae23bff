"""torch.compile with the backends inductor and luthier beside eager torch, in one run: time of the first call and of later ones.

    python benchmarks/torch_backend.py [NAME ...] [--threads 1] [--seconds 6] [--report FILE]

Random weights. Each model is called by the three in turn, round after round, for ``--seconds``; the table has the median and the least of
the rounds, and the geometric means. First calls are those of this process (kernel caches of both backends as they are: ``--cold`` turns them
off).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.torch_zoo import define_schemas
from luthier.torch_backend import luthier

TOLERANCE = 2e-4


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(5000, 128), nn.LSTM(128, 128, bidirectional=True, batch_first=True), nn.Linear(256, 20)

    def forward(self, ids: Any) -> Any:
        return self.out(self.lstm(self.words(ids))[0])


class UNetBlock(nn.Module):
    def __init__(self, c: int = 64) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c), nn.Conv2d(c, c, 3, padding=1)
        self.norm2, self.conv2, self.step = nn.GroupNorm(8, c), nn.Conv2d(c, c, 3, padding=1), nn.Linear(128, c)

    def forward(self, x: Any, t: Any) -> Any:
        y = self.conv1(nn.functional.silu(self.norm1(x))) + self.step(nn.functional.silu(t))[:, :, None, None]
        return x + self.conv2(nn.functional.silu(self.norm2(y)))


class Decode(nn.Module):
    """One step of a causal language model over a static cache that begins half full."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        import transformers

        self.model, self.cache = model, transformers.StaticCache(config=model.config, max_cache_len=128)
        with torch.no_grad():
            model(torch.randint(3, 200, (1, 64)), past_key_values=self.cache, use_cache=True)

    def forward(self, ids: Any, at: Any) -> Any:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(64)
        return self.model(ids, position_ids=at, past_key_values=self.cache, use_cache=True).logits


def vision(name: str) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
    def make() -> tuple[Any, tuple[Any, ...]]:
        import torchvision

        return getattr(torchvision.models, name)(weights=None), (torch.randn(1, 3, 224, 224),)

    return make


def bert() -> tuple[Any, tuple[Any, ...]]:
    import transformers

    c = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return transformers.BertModel(c), (torch.randint(3, 5000, (1, 64)),)


def vit() -> tuple[Any, tuple[Any, ...]]:
    import timm

    return timm.create_model("deit_tiny_patch16_224", pretrained=False), (torch.randn(1, 3, 224, 224),)


def language(name: str, **config: Any) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
    def make() -> tuple[Any, tuple[Any, ...]]:
        import transformers

        m = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **config)).eval()
        return Decode(m), (torch.randint(3, 200, (1, 1)), torch.tensor([[64]]))

    return make


MODELS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "resnet50": vision("resnet50"), "mobilenet_v2": vision("mobilenet_v2"), "minilm": bert, "deit_tiny": vit,
    "gpt2_step": language("gpt2", n_embd=384, n_layer=6, n_head=6), "unet_block": lambda: (UNetBlock(), (torch.randn(1, 64, 32, 32), torch.randn(1, 128))),
    "lstm_tagger": lambda: (Tagger(), (torch.randint(0, 5000, (1, 40)),)),
    "llama_step": language("llama", hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, intermediate_size=1024),
}  # fmt: skip


def measure(name: str, threads: int, seconds: float) -> dict[str, Any]:
    """{'error', 'first': {backend: s}, 'median', 'least': {backend: ms}}."""
    torch.manual_seed(0)
    model, args = MODELS[name]()
    model.eval()
    torch._dynamo.reset()
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(*args)}
    inductor, own = torch.compile(model, backend="inductor"), torch.compile(model, backend=luthier, options={"threads": threads})
    calls |= {"inductor": lambda: inductor(*args), "luthier": lambda: own(*args)}
    first, results = {}, {}
    for k, f in calls.items():
        begin = time.perf_counter()
        out = f()
        first[k] = time.perf_counter() - begin
        f()
        out = out if isinstance(out, torch.Tensor) else out[0]
        results[k] = out.double()
    error = float((results["luthier"] - results["eager"]).abs().max() / results["eager"].abs().max())
    times: dict[str, list[float]] = {k: [] for k in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for k, f in calls.items():
            begin = time.perf_counter()
            f()
            times[k].append((time.perf_counter() - begin) * 1e3)
    return {
        "error": error, "first": first, "median": {k: statistics.median(v) for k, v in times.items()}, "least": {k: min(v) for k, v in times.items()},
    }  # fmt: skip


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--report", type=Path, help="the table is added to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.cold:
        os.environ |= {"LUTHIER_CACHE_MB": "0", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    define_schemas()
    torch.set_num_threads(args.threads)
    lines, ratios, sooner = [], [], []
    with torch.no_grad():
        for name in args.names or MODELS:
            r = measure(name, args.threads, args.seconds)
            m, f = r["median"], r["first"]
            ratios.append(m["inductor"] / m["luthier"])
            sooner.append(f["inductor"] / f["luthier"])
            cells = [f"{m[k]:.2f} ({r['least'][k]:.2f})" for k in m] + [f"{ratios[-1]:.2f}", f"{f['inductor']:.1f}", f"{f['luthier']:.1f}", f"{r['error']:.0e}"]
            lines.append(f"| {name} | {args.threads} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    mean = [math.exp(statistics.fmean(map(math.log, v))) for v in (ratios, sooner)]
    print(f"geometric means: {mean[0]:.2f} times inductor's speed, first call {mean[1]:.1f} times sooner")
    if args.report:
        head = "| model | threads | eager ms, median (least) | inductor | luthier | inductor / luthier | first call s, inductor | luthier | error |\n|---|---:|" + "---:|" * 7 + "\n"
        text = f"# Backends of torch.compile\n\ntorch {torch.__version__}; `python benchmarks/torch_backend.py --report`.\n\n{head}" + "\n".join(lines)
        args.report.write_text(f"{text}\n\nGeometric means: {mean[0]:.2f} times inductor's speed, first call {mean[1]:.1f} times sooner.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
