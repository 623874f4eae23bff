"""Mixture of experts with top-k routing (SE-MoE, MoE-Lens, ExpertFlow): tokens are sorted by expert and multiplied in groups, so that a call
reads the matrices of the chosen experts and no others: a token costs the same among 8 experts as among 64. Experts are bf16; weights are
seeded, not trained.

    python examples/papers/experts.py
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import luthier

WIDTH, HIDDEN, CHOSEN = 256, 512, 2


class Experts(nn.Module):
    """[T, WIDTH] to [T, WIDTH]: the CHOSEN best of ``count`` experts for each token, weighted by the softmax of their scores."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.router = count, nn.Linear(WIDTH, count, bias=False)
        self.up = nn.Parameter((torch.randn(count, WIDTH, HIDDEN) * WIDTH**-0.5).bfloat16())
        self.down = nn.Parameter((torch.randn(count, HIDDEN, WIDTH) * HIDDEN**-0.5).bfloat16())

    def forward(self, x: Any) -> Any:
        scores, chosen = torch.topk(self.router(x), CHOSEN, dim=-1)
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = (flat[:, None] <= torch.arange(self.count)).sum(0).to(torch.int32)  # of each expert's rows in that order
        rows = nn.functional.silu(nn.functional.grouped_mm(x[order // CHOSEN].bfloat16(), self.up, offs=ends))
        y = nn.functional.grouped_mm(rows, self.down, offs=ends).float()
        share = torch.softmax(scores, -1).reshape(-1)[order]
        return torch.zeros_like(x).index_add(0, order // CHOSEN, y * share[:, None])


def build(count: int, seed: int = 0) -> tuple[Experts, Any]:
    """The module and an example of its argument."""
    torch.manual_seed(seed)
    return Experts(count).eval().requires_grad_(False), torch.randn(6, WIDTH)


def milliseconds(f: Any, x: Any, rounds: int = 200) -> float:
    """The least time of a call."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        f(x)
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


def main() -> None:
    for count in (8, 64):
        module, x = build(count)
        compiled = luthier.compile(module, args=(x,), dynamic_shapes=({0: torch.export.Dim("tokens")},), threads=1)
        for tokens in (1, 32):
            x = torch.randn(tokens, WIDTH)
            off = (compiled(x) - module(x)).abs().max().item()
            print(f"{count} experts, {tokens} tokens: {milliseconds(compiled, x):.3f} ms, eager {milliseconds(module, x):.3f} ms, off by {off:.1e}")


if __name__ == "__main__":
    main()
