"""Architectures beside Llama and every block type as a model's weights, with synthetic weights: against numpy written from their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier import llm
from luthier.errors import InvalidModel
from luthier.importers.gguf.blocks import BLOCKS
from luthier.importers.gguf.file import read_gguf
from luthier.importers.gguf_llama import llama_graph
from tests.test_gguf import f32_tensor, q4_1, q8_0, reference, write

Array = np.ndarray[Any, Any]
W, HIDDEN, HEADS, KV, HEAD, VOCABULARY, LAYERS = 64, 96, 4, 2, 24, 96, 2
EXPERTS, CHOSEN, INNER, SHARED = 6, 2, 32, 64
TOKENS = [5, 17, 93, 0, 41, 41, 8, 60, 2, 77, 12]
ALL = ("llama", "qwen2", "qwen3", "gemma", "phi3", "llama-moe", "qwen2moe", "qwen3moe")


def model(path: Path, arch: str) -> Path:
    rng = np.random.default_rng(4)
    moe = "moe" in arch
    name = arch.removesuffix("-moe")
    meta: dict[str, Any] = {
        "general.architecture": name, "block_count": LAYERS, "embedding_length": W, "feed_forward_length": INNER if arch == "llama-moe" else HIDDEN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.key_length": HEAD, "attention.value_length": HEAD, "context_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5000.0,
    }  # fmt: skip
    if moe:
        meta |= {"expert_count": EXPERTS, "expert_used_count": CHOSEN}
        if arch != "llama-moe":
            meta["expert_feed_forward_length"] = INNER
    meta = {k if k.startswith("general") else f"{name}.{k}": v for k, v in meta.items()}
    t: dict[str, Any] = {"token_embd.weight": q8_0(VOCABULARY, W, rng), "output_norm.weight": f32_tensor(rng.uniform(0.5, 1.5, W))}

    def vector(n: int) -> Any:
        return f32_tensor(rng.standard_normal(n) / 2)

    for i in range(LAYERS):
        p = f"blk.{i}."
        rows = {"q": HEADS * HEAD, "k": KV * HEAD, "v": KV * HEAD}
        if arch == "phi3":
            t[p + "attn_qkv.weight"] = q4_1(sum(rows.values()), W, rng)
        for n, r in rows.items():
            if arch != "phi3":
                t[f"{p}attn_{n}.weight"] = q4_1(r, W, rng)
            if arch in ("qwen2", "qwen2moe", "llama"):
                t[f"{p}attn_{n}.bias"] = vector(r)
            if arch in ("qwen3", "qwen3moe") and n != "v":
                t[f"{p}attn_{n}_norm.weight"] = f32_tensor(rng.uniform(0.5, 1.5, HEAD))
        t[p + "attn_output.weight"] = q4_1(W, HEADS * HEAD, rng)
        if arch == "llama":
            t[p + "attn_output.bias"] = vector(W)
        for n in ("attn", "ffn"):
            t[f"{p}{n}_norm.weight"] = f32_tensor(rng.uniform(0.5, 1.5, W))
        for n, r, c in (("gate", 1, 0), ("up", 1, 0), ("down", 0, 1)):
            if moe:
                a, b = (INNER, W) if r else (W, INNER)
                number, _, raw = q4_1(EXPERTS * a, b, rng)
                t[f"{p}ffn_{n}_exps.weight"] = number, (EXPERTS, a, b), raw
            if arch == "qwen2moe":
                t[f"{p}ffn_{n}_shexp.weight"] = q4_1(*((SHARED, W) if r else (W, SHARED)), rng)
            if not moe and not (arch == "phi3" and n == "gate"):
                t[f"{p}ffn_{n}.weight"] = q4_1(*((HIDDEN * (2 if arch == "phi3" else 1), W) if not c else (W, HIDDEN)), rng)
        if moe:
            t[p + "ffn_gate_inp.weight"] = f32_tensor(rng.standard_normal((EXPERTS, W)))
        if arch == "qwen2moe":
            t[p + "ffn_gate_inp_shexp.weight"] = vector(W)
    return write(path, meta, t)


def forward(path: Path, arch: str, tokens: list[int]) -> Array:
    g = read_gguf(path)
    n = len(tokens)

    def w(name: str) -> Array:
        return g.tensor(name).numpy().astype(np.float64)

    def rms(x: Array, scale: Array) -> Array:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale)

    def rotate(x: Array) -> Array:
        y = np.empty_like(x)
        for p in range(n):
            for i in range(HEAD // 2):
                c, s = np.cos(p / 5000 ** (2 * i / HEAD)), np.sin(p / 5000 ** (2 * i / HEAD))
                a, b = (2 * i, 2 * i + 1) if arch.startswith("llama") else (i, i + HEAD // 2)
                y[p, :, a], y[p, :, b] = x[p, :, a] * c - x[p, :, b] * s, x[p, :, a] * s + x[p, :, b] * c
        return y

    def gated(h: Array, gate: Array, up: Array, down: Array) -> Array:
        a = h @ gate.T
        f = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) if arch == "gemma" else a / (1 + np.exp(-a))
        return np.asarray((f * (h @ up.T)) @ down.T)

    x = w("token_embd.weight")[tokens] * (np.sqrt(W) if arch == "gemma" else 1)
    for layer in range(LAYERS):
        b = f"blk.{layer}."
        h = rms(x, w(b + "attn_norm.weight"))
        if arch == "phi3":
            q, k, v = np.split(h @ w(b + "attn_qkv.weight").T, [HEADS * HEAD, (HEADS + KV) * HEAD], -1)
        else:
            q, k, v = (h @ w(f"{b}attn_{m}.weight").T + (w(f"{b}attn_{m}.bias") if f"{b}attn_{m}.bias" in g.tensors else 0) for m in "qkv")
        q, k, v = (a.reshape(n, -1, HEAD) for a in (q, k, v))
        if arch.startswith("qwen3"):
            q, k = rms(q, w(b + "attn_q_norm.weight")), rms(k, w(b + "attn_k_norm.weight"))
        q, k = rotate(q), rotate(k)
        a = np.zeros((n, HEADS, HEAD))
        for p in range(n):
            for j in range(HEADS):
                s = k[: p + 1, j // 2] @ q[p, j] / np.sqrt(HEAD)
                e = np.exp(s - s.max())
                a[p, j] = e / e.sum() @ v[: p + 1, j // 2]
        x = x + a.reshape(n, -1) @ w(b + "attn_output.weight").T + (w(b + "attn_output.bias") if arch == "llama" else 0)
        h = rms(x, w(b + "ffn_norm.weight"))
        if "moe" not in arch:
            parts = np.split(w(b + "ffn_up.weight"), 2) if arch == "phi3" else [w(b + "ffn_gate.weight"), w(b + "ffn_up.weight")]
            x = x + gated(h, *parts, w(b + "ffn_down.weight"))
            continue
        scores = h @ w(b + "ffn_gate_inp.weight").T
        experts = [w(f"{b}ffn_{m}_exps.weight") for m in ("gate", "up", "down")]
        y = np.zeros_like(x)
        for p in range(n):
            share = np.exp(scores[p]) / np.exp(scores[p]).sum()
            best = np.argsort(-share)[:CHOSEN]
            for e in best:
                y[p] += gated(h[p], *(m[e] for m in experts)) * share[e] / (1 if arch == "qwen2moe" else share[best].sum())
        if arch == "qwen2moe":
            gate = 1 / (1 + np.exp(-(h @ w(b + "ffn_gate_inp_shexp.weight"))))
            y += gated(h, *(w(f"{b}ffn_{m}_shexp.weight") for m in ("gate", "up", "down"))) * gate[:, None]
        x = x + y
    return np.asarray(rms(x, w("output_norm.weight")) @ w("token_embd.weight").T)


@pytest.mark.parametrize("arch", ALL)
def test_architectures(tmp_path: Path, arch: str) -> None:
    path = model(tmp_path / "m.gguf", arch)
    want = forward(path, arch, TOKENS)
    m = llm.load(path, threads=1, capacity=32, chunk=4, exact=True, all_logits=True)
    assert np.abs(m.feed(TOKENS) - want).max() < 2e-3 * np.abs(want).max()  # keys and values in half precision
    for part, last in ((TOKENS[:7], 6), (TOKENS[7:8], 7), (TOKENS[8:], 10)):
        if not part:
            continue
        if last == 6:
            m.reset()
        assert np.abs(m.feed(part)[-1] - want[last]).max() < 2e-3 * np.abs(want).max()


def test_what_is_not_supported(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    with pytest.raises(InvalidModel, match=r"architecture 'mamba'.*known: gemma, llama, phi3, qwen2"):
        llm.load(write(bad, {"general.architecture": "mamba"}, {}))
    path = model(tmp_path / "m.gguf", "qwen2")
    g = read_gguf(path)
    t = {n: (next(k for k, v in {0: "F32", 3: "Q4_1", 8: "Q8_0"}.items() if v == x.kind), x.shape, x.raw.tobytes()) for n, x in g.tensors.items()}
    more = t | {"blk.0.post_attention_norm.weight": f32_tensor(np.ones(W))}
    with pytest.raises(InvalidModel, match=r"blk\.0\.post_attention_norm\.weight"):
        llm.load(write(bad, g.metadata, more))
    for key, value, text in (("rope.dimension_count", 8, "part of a head"), ("attention.value_length", 8, "values of another size")):
        with pytest.raises(InvalidModel, match=text):
            llm.load(write(bad, g.metadata | {f"qwen2.{key}": value}, t))
    with pytest.raises(InvalidModel, match="lacks tensor"):
        llm.load(write(bad, g.metadata, {n: v for n, v in t.items() if n != "blk.1.attn_k.bias"}))


STORED = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6, "TQ1_0": 1.6, "TQ2_0": 1.6}


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_weights_of_every_type(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's matrices keep their bits, and the model computes what the dequantized weights give."""
    rng = np.random.default_rng(9)
    monkeypatch.setattr("tests.test_gguf.RNG", np.random.default_rng(9))  # whatever ran before
    blocks = [reference(kind)[0] for _ in range(64)]
    width, heads = 256, 4
    block = BLOCKS[kind]

    def matrix(rows: int, columns: int) -> Any:
        raw = [blocks[k] for k in rng.integers(0, len(blocks), rows * columns // block.columns)]
        data = np.frombuffer(b"".join(raw), np.uint8).reshape(-1, block.size).copy()
        order = rng.permuted(np.tile(np.arange(8, block.size - 4), (len(data), 1)), axis=1) if kind == "Q8_0" else None
        if order is not None:
            data[:, 8 : block.size - 4] = np.take_along_axis(data, order, 1)
        return block.number, (rows, columns), data.tobytes()

    meta: dict[str, Any] = {
        "general.architecture": "qwen2", "qwen2.block_count": 1, "qwen2.embedding_length": width, "qwen2.feed_forward_length": width, "qwen2.context_length": 32,
        "qwen2.attention.head_count": heads, "qwen2.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    names = [f"blk.0.{n}.weight" for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]
    small = 1 / 256
    t: dict[str, Any] = {"token_embd.weight": f32_tensor(rng.standard_normal((32, width))), "output_norm.weight": f32_tensor(np.ones(width))}
    t |= {n: matrix(width, width) for n in names}
    t |= {f"blk.0.{n}_norm.weight": f32_tensor(np.full(width, small)) for n in ("attn", "ffn")}
    path = write(tmp_path / "m.gguf", meta, t)
    g = read_gguf(path)
    graph = llama_graph(g, 16, exact=True)
    kept = [n for n in graph.nodes if n.op == "luthier::GroupedMatMul"]
    assert sum(int(n.attrs["K"]) * len(n.inputs[1].data) for n in kept) == 7 * width * width
    for n in kept:
        raw = n.inputs[1].data
        assert raw.nbytes * 8 / (int(n.attrs["K"]) * len(raw)) <= STORED[kind] + 0.05, raw.shape

    def w(name: str) -> Array:
        return g.tensor(name).numpy().astype(np.float64)

    def rms(x: Array, scale: float) -> Array:
        return np.asarray(x / np.sqrt((x**2).mean() + 1e-5) * scale)

    x = w("token_embd.weight")[7]  # one token: attention gives its own value
    h = rms(x, small)
    x = x + w(names[3]) @ (w(names[2]) @ h)
    h = rms(x, small)
    a = w(names[4]) @ h
    x = x + w(names[6]) @ (a / (1 + np.exp(-a)) * (w(names[5]) @ h))
    want = w("token_embd.weight") @ rms(x, 1)
    got = llm.load(path, threads=1, capacity=16, exact=True).feed([7])
    assert np.abs(got - want).max() < 4e-3 * np.abs(want).max()  # scales and values in half precision
