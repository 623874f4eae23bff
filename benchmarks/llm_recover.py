"""The two steps of recovery of a quantized language model, after arXiv 2412.17560, in torch over :mod:`benchmarks.llama_torch`.

1. Layer by layer: codes, scales and zero points of a layer's matrices are tuned so that the layer gives what the original's gives, with inputs from
   the layers already tuned. Rounding passes gradients straight through. The error of a token counts relative to the size of its vector.
2. End to end: codes are fixed; scales and zero points of all layers are tuned on the divergence of the next token's distribution from the original's.

Some windows are kept apart: a layer, and the whole model in the second step, keeps the best of what was seen on those windows, the start included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.llama_torch import TorchLlama
from luthier.ir.ops.sparse_matmul import BlockSparse
from luthier.passes.quantize.quantize_weights import QuantizedWeight

Array = np.ndarray[Any, Any]
Weight = QuantizedWeight | BlockSparse
CODE_RATE, ZERO_RATE, SCALE_RATE = 0.02, 0.02, 2e-3  # steps of a code, of a zero point; parts of a scale's mean magnitude
SHARE = 0.15  # of these rates in the second step, where the scales of all layers move at once
WARM = 10  # steps over which they rise to that
APART = 4  # windows that decide in the second step


class Tunable:
    """A matrix as parameters: ``codes`` f32 [rows, groups, group] before rounding, ``scale`` [rows, groups, 1], ``zero`` the same or a number. Dropped
    blocks of sparse weights have the scale 0 and stay dropped."""

    def __init__(self, w: Weight) -> None:
        self.w = w
        self.keep: torch.Tensor | None = None
        if isinstance(w, BlockSparse):
            groups = -(-w.columns // w.block)
            keep = np.zeros((w.rows, groups, 1), np.float32)
            codes = np.zeros((w.rows, groups, w.block), np.float32)
            scale = np.ones((w.rows, groups, 1), np.float32)
            self.place = np.repeat(np.arange(w.rows), np.diff(w.row_ptr)), w.cols
            keep[self.place], codes[self.place], scale[self.place] = 1, w.values, w.scales.astype(np.float32)[:, None]
            self.keep, self.columns = torch.from_numpy(keep), w.columns
            self.zero: Any = float(w.zero)
            self.high = (1 << w.bits) - 1
        else:
            n, k = w.codes.shape
            codes, self.columns = w.codes.reshape(n, -1, w.group).astype(np.float32), k
            scale = w.scales.astype(np.float32)[:, :, None]
            self.zero = w.zero if w.zeros is None else torch.from_numpy(w.zeros.astype(np.float32)[:, :, None])
            self.high = (1 << w.bits) - 1 if w.bits else 2
        self.codes, self.scale = torch.from_numpy(codes), torch.from_numpy(np.ascontiguousarray(scale))

    def matrix(self, fixed: bool = False) -> torch.Tensor:
        """The weights [rows, columns]; gradients of codes pass the rounding unless they are ``fixed``."""
        q = self.codes
        if not fixed:
            inside = q.clamp(0, self.high)
            q = inside + (inside.round() - inside).detach()
        s = self.scale if self.keep is None else self.scale * self.keep
        return ((q - self.zero) * s).reshape(len(q), -1)[:, : self.columns]

    def tuned(self, codes: bool, share: float = 1.0) -> list[dict[str, Any]]:
        """Parameter groups for Adam, their rates times ``share``."""
        size = float(self.scale.detach().abs().mean())
        out: list[dict[str, Any]] = [{"params": [self.scale], "lr": share * SCALE_RATE * size}]
        if codes:
            out.append({"params": [self.codes], "lr": share * CODE_RATE})
        if isinstance(self.zero, torch.Tensor):
            out.append({"params": [self.zero], "lr": share * ZERO_RATE})
        return out

    def round_codes(self) -> None:
        self.codes = self.codes.detach().clamp(0, self.high).round()

    def stored(self) -> Weight:
        """As kernels read it: scales and zero points in f16."""
        q = self.codes.detach().clamp(0, self.high).round().numpy().astype(np.uint8)
        s = self.scale.detach().numpy().astype(np.float16)
        if isinstance(self.w, BlockSparse):
            return replace(self.w, values=q[self.place], scales=s[self.place][:, 0])
        s = np.where(s == 0, np.float16(2.0**-24), s)[:, :, 0]
        zeros = self.zero.detach().numpy()[:, :, 0].astype(np.float16) if isinstance(self.zero, torch.Tensor) else None
        return QuantizedWeight(q.reshape(len(q), -1), s, zeros, self.w.zero, self.w.bits, self.w.group)


def descend(loss: Callable[[int], torch.Tensor], groups: list[dict[str, Any]], order: list[int]) -> None:
    """Adam with rates that fall to zero on a cosine, one step for every number of ``order``."""
    for g in groups:
        for p in g["params"]:
            p.requires_grad_(True)
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, len(order))
    for i in order:
        adam.zero_grad()
        loss(i).backward()
        adam.step()
        schedule.step()
    for g in groups:
        for p in g["params"]:
            p.requires_grad_(False)


def fit_layers(
    model: TorchLlama, calibration: Array, start: Mapping[str, Weight], save: Callable[[int, dict[str, Weight]], None],
    known: Callable[[int], dict[str, Weight] | None], epochs: int = 1, batch: int = 2,
) -> None:  # fmt: skip
    """Step 1. ``calibration``: token numbers [windows, n]; ``save`` is given every layer's weights, ``known`` gives those that exist already."""
    torch.manual_seed(0)
    with torch.no_grad():
        want = here = model.embed(calibration)
    held = max(1, len(calibration) // 8)
    parts = list(range(0, len(calibration) - held, batch))
    for i in range(model.c.layers):
        t = time.perf_counter()
        with torch.no_grad():
            want = model.block(i, want, model.product)
        made = known(i)
        if made is None:
            names = [n for n in start if n.startswith(f"blk.{i}.")]
            tuned = {n: Tunable(start[n]) for n in names}

            def loss(lo: int, size: int = batch, tuned: Mapping[str, Tunable] = tuned, i: int = i, here: torch.Tensor = here, want: torch.Tensor = want) -> torch.Tensor:
                y = want[lo : lo + size]
                d = model.block(i, here[lo : lo + size], model.using({n: w.matrix() for n, w in tuned.items()})) - y
                return (d.square().sum(-1) / y.square().sum(-1)).mean()

            with torch.no_grad():
                before = float(loss(len(here) - held, held))
            order = [p for _ in range(epochs) for p in np.random.default_rng(i).permutation(parts).tolist()]
            descend(loss, [g for w in tuned.values() for g in w.tuned(True)], order)
            with torch.no_grad():
                after = float(loss(len(here) - held, held))
            made = {n: w.stored() if after < before else start[n] for n, w in tuned.items()}
            save(i, made)
            print(f"  layer {i}: {before:.2e} -> {after:.2e} in {time.perf_counter() - t:.0f} s", flush=True)
        with torch.no_grad():
            here = model.block(i, here, model.using({n: Tunable(w).matrix() for n, w in made.items()}))


def fit_end_to_end(model: TorchLlama, calibration: Array, start: Mapping[str, Weight], state: Path, every: int = 28) -> dict[str, Weight]:
    """Step 2, once over ``calibration`` less its last ``APART`` windows. ``state``: file from which it goes on, written after ``every`` steps."""
    torch.manual_seed(0)
    tuned = {n: Tunable(w) for n, w in start.items()}
    groups = [g for w in tuned.values() for g in w.tuned(False, SHARE)]
    params = [p for g in groups for p in g["params"]]
    order = np.random.default_rng(0).permutation(len(calibration) - APART).tolist()
    decisive = list(range(len(calibration) - APART, len(calibration)))
    with torch.no_grad():
        known = {i: torch.log_softmax(model.forward(calibration[i]), -1) for i in decisive}

    def loss(i: int) -> torch.Tensor:
        with torch.no_grad():
            p = known[i] if i in known else torch.log_softmax(model.forward(calibration[i]), -1)
        q = torch.log_softmax(model.forward(calibration[i], model.using({n: w.matrix(True) for n, w in tuned.items()})), -1)
        return (p.exp() * (p - q)).sum(-1).mean()

    def apart() -> float:
        with torch.no_grad():
            return float(np.mean([float(loss(i)) for i in decisive]))

    for p in params:
        p.requires_grad_(True)
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: min(1.0, (i + 1) / WARM) * (1 + np.cos(np.pi * i / len(order))) / 2)
    first = 0
    if state.exists():
        kept = torch.load(state)
        first, least, best = int(kept["step"]), float(kept["least"]), kept["best"]
        with torch.no_grad():
            for p, k in zip(params, kept["params"], strict=True):
                p.copy_(k)
        adam.load_state_dict(kept["adam"])
        schedule.load_state_dict(kept["schedule"])
    else:
        least, best = apart(), [p.detach().clone() for p in params]
        print(f"  divergence on windows kept apart: {least:.3f}", flush=True)
    t = time.perf_counter()
    for step in range(first, len(order)):
        adam.zero_grad()
        y = loss(order[step])
        y.backward()
        adam.step()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == len(order):
            now = apart()
            if now < least:
                least, best = now, [p.detach().clone() for p in params]
            state.parent.mkdir(parents=True, exist_ok=True)
            kept = {"step": step + 1, "params": [p.detach() for p in params], "adam": adam.state_dict(), "schedule": schedule.state_dict()}
            torch.save(kept | {"least": least, "best": best}, state)
            took = (time.perf_counter() - t) / (step + 1 - first)
            print(f"  step {step + 1} of {len(order)}: {float(y.detach()):.3f}, {now:.3f} on windows kept apart, {took:.1f} s each", flush=True)
    with torch.no_grad():
        for p, k in zip(params, best, strict=True):
            p.requires_grad_(False)
            p.copy_(k)
    return {n: w.stored() for n, w in tuned.items()}
