"""The Llama architecture in numpy over the dequantized weights of a GGUF file: the reference for language models. f32, f64 sums in norms."""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.importers.gguf.file import GGUF
from luthier.importers.gguf_llama import config

Array = np.ndarray[Any, Any]


class Reference:
    """Weights are dequantized once. ``replace``: {tensor name: values} of matrices to be used instead of the file's."""

    def __init__(self, g: GGUF, dtype: Any = np.float32, replace: dict[str, Array] | None = None) -> None:
        self.g, self.c, self.dtype = g, config(g), dtype
        self.known: dict[str, Array] = {k: v.astype(dtype) for k, v in (replace or {}).items()}

    def w(self, name: str) -> Array:
        if name not in self.known:
            self.known[name] = self.g.tensor(name).numpy().astype(self.dtype)
        return self.known[name]

    def norm(self, x: Array, name: str) -> Array:
        rms = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + self.c.epsilon)
        return np.asarray((x / rms).astype(self.dtype) * self.w(name))

    def forward(self, tokens: Array) -> Array:
        """Logits [n, vocabulary] of all rows of one sequence, rotation on neighbouring pairs as the file's weights expect."""
        c, w, dtype = self.c, self.w, self.dtype
        n = len(tokens)
        angle = np.arange(n)[:, None] / c.rope_base ** (np.arange(c.head // 2) * 2 / c.head)
        cos, sin = np.cos(angle)[:, None].astype(dtype), np.sin(angle)[:, None].astype(dtype)

        def rotate(x: Array) -> Array:
            y = np.empty_like(x)
            y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
            y[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
            return y

        x = w("token_embd.weight")[tokens]
        causal = np.triu(np.full((n, n), -np.inf, dtype), 1)
        for i in range(c.layers):
            p = f"blk.{i}."
            h = self.norm(x, p + "attn_norm.weight")
            q = rotate((h @ w(p + "attn_q.weight").T).reshape(n, c.heads, c.head))
            k = rotate((h @ w(p + "attn_k.weight").T).reshape(n, c.kv_heads, c.head))
            v = (h @ w(p + "attn_v.weight").T).reshape(n, c.kv_heads, c.head)
            k, v = (np.repeat(a, c.heads // c.kv_heads, 1) for a in (k, v))
            s = np.einsum("shd,thd->hst", q, k, optimize=True) / np.sqrt(c.head) + causal
            e = np.exp(s - s.max(-1, keepdims=True))
            a = np.einsum("hst,thd->shd", e / e.sum(-1, keepdims=True), v, optimize=True).reshape(n, -1).astype(dtype)
            x = x + a @ w(p + "attn_output.weight").T
            h = self.norm(x, p + "ffn_norm.weight")
            gate = h @ w(p + "ffn_gate.weight").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w(p + "ffn_up.weight").T)) @ w(p + "ffn_down.weight").T
        out = "output.weight" if "output.weight" in self.g.tensors else "token_embd.weight"
        return np.asarray(self.norm(x, "output_norm.weight") @ w(out).T)


def forward(g: GGUF, tokens: Array, dtype: Any = np.float32) -> Array:
    """Logits [n, vocabulary] of one sequence."""
    return Reference(g, dtype).forward(tokens)
