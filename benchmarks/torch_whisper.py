"""Whisper (Radford et al. 2022) in plain torch, in the three graphs that exporters make of it, with weights out of a CTranslate2
file.

Imported only by the peers' environment, as `torch_models.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.ctranslate2_file import read_variables


def heads_of(x: Tensor, heads: int) -> Tensor:
    """f32[N,T,C] -> f32[N,heads,T,C/heads]"""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """f32[N,heads,T,D] -> f32[N,T,heads*D]"""
    return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Pre-norm, GELU, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer_norm, self.linear_0, self.linear_1 = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear_1(F.gelu(self.linear_0(self.layer_norm(x))))


class SelfAttention(nn.Module):
    """Pre-norm; query, key and value in one product."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm, self.linear_0, self.linear_1 = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_of(part, self.heads) for part in self.linear_0(self.layer_norm(x)).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return x + self.linear_1(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))), k, v


class CrossAttention(nn.Module):
    """Pre-norm; keys and values are of the encoder's result, and the same at every step."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm, self.linear_0 = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.linear_1, self.linear_2 = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (heads_of(part, self.heads) for part in self.linear_1(hidden).chunk(2, -1))
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = heads_of(self.linear_0(self.layer_norm(x)), self.heads)
        return x + self.linear_2(joined(F.scaled_dot_product_attention(q, k, v)))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attention, self.ffn = SelfAttention(dim, heads), FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.self_attention(x, None, None)[0])


class Encoder(nn.Module):
    """input_features f32[N,80,3000] -> last_hidden_state f32[N,1500,C]."""

    def __init__(self, dim: int, heads: int, depth: int, positions: int, bands: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(bands, dim, 3, padding=1), nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.zeros(positions, dim))
        self.layer = nn.ModuleList([EncoderLayer(dim, heads) for _ in range(depth)])
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, input_features: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).transpose(1, 2) + self.positions
        for layer in self.layer:
            x = layer(x)
        return self.layer_norm(x)


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attention, self.attention, self.ffn = SelfAttention(dim, heads), CrossAttention(dim, heads), FeedForward(dim)


class Decoder(nn.Module):
    """Tokens i64[N,T] after P earlier ones -> logits f32[N,T,vocabulary], keys and values of each layer."""

    def __init__(self, dim: int, heads: int, depth: int, positions: int, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(torch.zeros(positions, dim))
        self.layer = nn.ModuleList([DecoderLayer(dim, heads) for _ in range(depth)])
        self.layer_norm = nn.LayerNorm(dim)

    def run(
        self, ids: Tensor, cross: list[tuple[Tensor, Tensor]], past: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        before = past[0][0].shape[2] if past is not None else 0
        at = torch.arange(before, before + ids.shape[1])
        mask = torch.arange(before + ids.shape[1])[None, :] <= at[:, None]
        x = self.embeddings(ids) + self.positions[at]
        made = []
        for i, layer in enumerate(self.layer):
            x, k, v = layer.self_attention(x, mask, past[i] if past is not None else None)
            made.append((k, v))
            x = layer.ffn(layer.attention(x, *cross[i]))
        return self.layer_norm(x) @ self.embeddings.weight.T, made


class FirstStep(nn.Module):
    """input_ids i64[N,T], encoder_hidden_states f32[N,S,C] -> logits and, a layer, the keys and values of the decoder
    (f32[N,H,T,D]) and of the encoder's result (f32[N,H,S,D])."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        cross = [layer.attention.keys(encoder_hidden_states) for layer in self.decoder.layer]
        logits, made = self.decoder.run(input_ids, cross, None)
        return (logits, *(t for own, other in zip(made, cross, strict=True) for t in (*own, *other)))


class NextStep(nn.Module):
    """input_ids i64[N,T] and four tensors a layer, as FirstStep returns them -> logits and the decoder's keys and values
    (f32[N,H,P+T,D])."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, past_key_values: list[Tensor]) -> tuple[Tensor, ...]:
        pairs = list(zip(past_key_values[::2], past_key_values[1::2], strict=True))
        logits, made = self.decoder.run(input_ids, pairs[1::2], pairs[::2])
        return (logits, *(t for pair in made for t in pair))


def _filled(module: nn.Module, variables: dict[str, NDArray[Any]], scope: str) -> nn.Module:
    """Fills a module with the variables under a scope. Raises KeyError or RuntimeError when these do not fit it."""
    state = {}
    for name, now in module.state_dict().items():
        key = name.replace(".", "/").replace("layer/", "layer_")
        if "layer_norm" in key:
            key = key.replace("/weight", "/gamma").replace("/bias", "/beta")
        key = {"positions": "position_encodings/encodings"}.get(key, key)
        state[name] = torch.from_numpy(variables[f"{scope}/{key}"].copy()).to(now.dtype)
    module.load_state_dict(state)
    return module.eval()


def from_ctranslate2(path: Path) -> tuple[Encoder, Decoder]:
    """Both halves of the model in a `model.bin`; sizes are those of its weights."""
    found = read_variables(path)
    bands, vocabulary = found["encoder/conv1/weight"].shape[1], found["decoder/embeddings/weight"].shape[0]

    def sizes(scope: str) -> tuple[int, int, int, int]:
        positions, dim = found[f"{scope}/position_encodings/encodings"].shape
        depth = len(
            {
                n.split("/")[1]
                for n in found
                if n.startswith(f"{scope}/layer_") and "/layer_norm/" not in n.removeprefix(scope)[:12]
            }
        )
        return dim, int(found[f"{scope}/num_heads"]), depth, positions

    encoder, decoder = Encoder(*sizes("encoder"), bands), Decoder(*sizes("decoder"), vocabulary)
    _filled(encoder, found, "encoder"), _filled(decoder, found, "decoder")
    return encoder, decoder
