"""The Llama architecture in torch, f32, over the dequantized weights of a GGUF file: whole batches of windows, block by block, with gradients.

The same mathematics as :mod:`benchmarks.llama_numpy` (rotation on neighbouring pairs, as the file's rows are stored), several times as fast. Every
matrix product goes through a function of the caller, ``product(name, x)``, so that weights can be replaced, inputs looked at and activations rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from luthier.importers.gguf.file import GGUF
from luthier.importers.gguf_llama import config

Array = np.ndarray[Any, Any]
Tensor = torch.Tensor
Product = Callable[[str, Tensor], Tensor]
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SOURCES = {"attn_q": "attn", "attn_k": "attn", "attn_v": "attn", "attn_output": "mix", "ffn_gate": "ffn", "ffn_up": "ffn", "ffn_down": "hidden"}  # equal: one input


class TorchLlama:
    """``weights``: f32 tensors by the file's names, made on first use."""

    def __init__(self, g: GGUF) -> None:
        self.g, self.c = g, config(g)
        self.weights: dict[str, Tensor] = {}
        self.head = "output.weight" if "output.weight" in g.tensors else "token_embd.weight"

    def w(self, name: str) -> Tensor:
        if name not in self.weights:
            self.weights[name] = torch.from_numpy(np.array(self.g.tensor(name).numpy(), np.float32))
        return self.weights[name]

    def product(self, name: str, x: Tensor) -> Tensor:
        """``x`` times the transpose of the file's matrix."""
        return x @ self.w(name).T

    def using(self, replaced: Mapping[str, Tensor]) -> Product:
        """A product with other matrices where ``replaced`` names some."""
        return lambda name, x: x @ (replaced[name] if name in replaced else self.w(name)).T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.c.epsilon) * self.w(name)

    def embed(self, tokens: Array) -> Tensor:
        """f32 [.., width] of token numbers [..]."""
        return self.w("token_embd.weight")[torch.from_numpy(np.asarray(tokens, np.int64))]

    def rotate(self, x: Tensor) -> Tensor:
        """``x`` [batch, heads, n, head], positions from 0."""
        c, n = self.c, x.shape[-2]
        angle = torch.arange(n, dtype=torch.float64)[:, None] / c.rope_base ** (torch.arange(c.head // 2, dtype=torch.float64) * 2 / c.head)
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def block(self, i: int, x: Tensor, product: Product) -> Tensor:
        """Layer ``i`` on ``x`` [batch, n, width]."""
        c, p = self.c, f"blk.{i}."
        size, n = x.shape[:2]

        def heads(y: Tensor, count: int) -> Tensor:
            return y.reshape(size, n, count, c.head).transpose(1, 2)

        h = self.norm(x, p + "attn_norm.weight")
        q = self.rotate(heads(product(p + "attn_q.weight", h), c.heads))
        k = self.rotate(heads(product(p + "attn_k.weight", h), c.kv_heads))
        v = heads(product(p + "attn_v.weight", h), c.kv_heads)
        more = c.heads // c.kv_heads
        a = scaled_dot_product_attention(q, k.repeat_interleave(more, 1), v.repeat_interleave(more, 1), is_causal=True)
        x = x + product(p + "attn_output.weight", a.transpose(1, 2).reshape(size, n, -1))
        h = self.norm(x, p + "ffn_norm.weight")
        hidden = torch.nn.functional.silu(product(p + "ffn_gate.weight", h)) * product(p + "ffn_up.weight", h)
        return x + product(p + "ffn_down.weight", hidden)

    def logits(self, x: Tensor, product: Product | None = None) -> Tensor:
        """f32 [.., vocabulary] of what the last block gives."""
        return (product or self.product)(self.head, self.norm(x, "output_norm.weight"))

    def forward(self, tokens: Array, product: Product | None = None) -> Tensor:
        """Logits [.., n, vocabulary] of token numbers [.., n], every row a sequence of its own."""
        use = product or self.product
        t = np.asarray(tokens)
        x = self.embed(t.reshape(-1, t.shape[-1]))
        for i in range(self.c.layers):
            x = self.block(i, x, use)
        return self.logits(x, use).reshape(*t.shape, -1)
