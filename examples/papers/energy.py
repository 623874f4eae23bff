"""Prediction by minimising an energy (Energy-Based Transformers): a network scores a context and a candidate, and the candidate goes down
its gradient. The gradient is a part of the exported program: one compile, no autograd when it runs. Weights are seeded, not trained.

    python examples/papers/energy.py
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import luthier

WIDTH, STEPS = 32, 6


class Energy(nn.Module):
    """(context [B, T, WIDTH], candidate [B, WIDTH]) to energies [B]: a transformer layer over both, read at the candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, context: Any, candidate: Any) -> Any:
        y = self.layer(torch.cat([context, candidate[:, None]], 1))[:, -1]
        return self.score(y)[:, 0] + 0.05 * candidate.square().sum(-1)


class Minimise(nn.Module):
    """(context, start [B, WIDTH]) to (the candidate after STEPS of gradient descent, energies [STEPS + 1, B])."""

    def __init__(self, energy: Energy, rate: float = 0.5) -> None:
        super().__init__()
        self.energy, self.rate = energy, rate

    def forward(self, context: Any, start: Any) -> Any:
        def total(y: Any) -> Any:
            e = self.energy(context, y)
            return e.sum(), e

        y, seen = start, []
        for _ in range(STEPS):
            slope, e = torch.func.grad(total, has_aux=True)(y)
            seen.append(e)
            y = y - self.rate * slope
        return y, torch.stack([*seen, self.energy(context, y)])


def build(seed: int = 0) -> tuple[Minimise, tuple[Any, Any]]:
    """The module and example arguments."""
    torch.manual_seed(seed)
    torch.backends.mha.set_fastpath_enabled(False)
    return Minimise(Energy()).eval().requires_grad_(False), (torch.randn(2, 10, WIDTH), torch.randn(2, WIDTH))


def compile_minimiser(module: Minimise, args: tuple[Any, Any]) -> Any:
    """``make_fx`` traces through torch.func.grad; attention in its plain form has a gradient of plain operators."""
    with sdpa_kernel(SDPBackend.MATH):
        traced = make_fx(module)(*args)
    return luthier.compile(traced, args=args)


def main() -> None:
    module, (context, start) = build()
    compiled = compile_minimiser(module, (context, start))
    y, energies = compiled(context, start)
    want, _ = module(context, start)
    print("energies", energies.mean(1).tolist(), "largest difference from eager", (y - want).abs().max().item())
    for name, f in (("eager", module), ("luthier", compiled)):
        begin = time.perf_counter()
        for _ in range(50):
            f(context, start)
        print(f"{name}: {(time.perf_counter() - begin) * 20:.2f} ms for {STEPS} steps")


if __name__ == "__main__":
    main()
