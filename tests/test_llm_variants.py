"""Forms of the Llama architecture against their definitions in numpy: sliding windows, scaled rotation, mixtures of experts (synthetic weights)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier import llm
from luthier.build_graph import compile_graph
from luthier.errors import InputError, InvalidModel, ShapeError
from luthier.importers.builder import GraphBuilder
from luthier.importers.gguf.file import GGUF, read_gguf
from luthier.ir.dtypes import f32, i8, i64
from luthier.ir.expr import var
from luthier.ir.ops.experts import pack_experts
from tests.test_gguf import f32_tensor, q4_1, q8_0, write

Array = np.ndarray[Any, Any]
W, HIDDEN, HEADS, KV, HEAD, VOCABULARY, LAYERS = 64, 96, 4, 2, 16, 96, 2
TOKENS = [5, 17, 93, 0, 41, 41, 8, 60, 2, 77, 12, 33, 90, 4, 21, 66, 7, 7, 58]


def model(path: Path, extra: dict[str, Any] | None = None, experts: int = 0, kind: Any = q4_1, factors: Array | None = None) -> Path:
    rng = np.random.default_rng(3)
    meta: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": LAYERS, "llama.embedding_length": W, "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV, "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": HEAD, **(extra or {}),
    }  # fmt: skip
    t: dict[str, Any] = {"token_embd.weight": q8_0(VOCABULARY, W, rng), "output_norm.weight": f32_tensor(rng.uniform(0.5, 1.5, W))}
    if factors is not None:
        t["rope_freqs.weight"] = f32_tensor(factors)
    for i in range(LAYERS):
        p = f"blk.{i}."
        for name, rows, cols in (("attn_q", HEADS * HEAD, W), ("attn_k", KV * HEAD, W), ("attn_v", KV * HEAD, W), ("attn_output", W, HEADS * HEAD)):
            t[f"{p}{name}.weight"] = q4_1(rows, cols, rng)
        for name, rows, cols in (("gate", HIDDEN, W), ("up", HIDDEN, W), ("down", W, HIDDEN)):
            if experts:
                number, _, raw = kind(experts * rows, cols, rng)
                t[f"{p}ffn_{name}_exps.weight"] = number, (experts, rows, cols), raw
            else:
                t[f"{p}ffn_{name}.weight"] = q4_1(rows, cols, rng)
        if experts:
            t[f"{p}ffn_gate_inp.weight"] = f32_tensor(rng.standard_normal((experts, W)))
        for n in ("attn", "ffn"):
            t[f"{p}{n}_norm.weight"] = f32_tensor(rng.uniform(0.5, 1.5, W))
    return write(path, meta, t)


def angle(g: GGUF, position: int, i: int) -> tuple[float, float]:
    """(angle, factor) of pair ``i`` of a head, a number at a time."""
    m = g.metadata
    kind, factor = m.get("llama.rope.scaling.type"), m.get("llama.rope.scaling.factor", 1.0)
    plain = position / 10000 ** (2 * i / HEAD)
    if "rope_freqs.weight" in g.tensors:
        plain /= g.tensor("rope_freqs.weight").numpy()[i]
    if kind == "linear":
        return plain / factor, 1.0
    if kind != "yarn":
        return plain, 1.0
    original = m["llama.rope.scaling.original_context_length"]

    def dimension(turns: float) -> float:  # the pair that turns so many times within the original context
        return HEAD * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(10000))

    low, high = max(0, math.floor(dimension(32))), min(HEAD - 1, math.ceil(dimension(1)))
    ramp = min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
    return plain * (1 - ramp) + plain / factor * ramp, 0.1 * math.log(factor) + 1


def forward(path: Path, tokens: list[int], window: int = 0, experts: int = 0, chosen: int = 0) -> Array:
    g = read_gguf(path)
    n = len(tokens)

    def w(name: str) -> Array:
        return g.tensor(name + ".weight").numpy().astype(np.float64)

    def norm(x: Array, name: str) -> Array:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w(name))

    def rotate(x: Array) -> Array:
        y = np.empty_like(x)
        for p in range(n):
            for i in range(HEAD // 2):
                a, f = angle(g, p, i)
                c, s = np.cos(a) * f, np.sin(a) * f
                y[p, :, 2 * i] = x[p, :, 2 * i] * c - x[p, :, 2 * i + 1] * s
                y[p, :, 2 * i + 1] = x[p, :, 2 * i] * s + x[p, :, 2 * i + 1] * c
        return y

    def swiglu(h: Array, gate: Array, up: Array, down: Array) -> Array:
        a = h @ gate.T
        return np.asarray((a / (1 + np.exp(-a)) * (h @ up.T)) @ down.T)

    x = w("token_embd")[tokens]
    for layer in range(LAYERS):
        b = f"blk.{layer}."
        h = norm(x, b + "attn_norm")
        q, k = rotate((h @ w(b + "attn_q").T).reshape(n, HEADS, HEAD)), rotate((h @ w(b + "attn_k").T).reshape(n, KV, HEAD))
        v = (h @ w(b + "attn_v").T).reshape(n, KV, HEAD)
        a = np.zeros((n, HEADS, HEAD))
        for p in range(n):
            lo = max(0, p + 1 - window) if window else 0
            for j in range(HEADS):
                s = k[lo : p + 1, j // 2] @ q[p, j] / np.sqrt(HEAD)
                e = np.exp(s - s.max())
                a[p, j] = e / e.sum() @ v[lo : p + 1, j // 2]
        x = x + a.reshape(n, -1) @ w(b + "attn_output").T
        h = norm(x, b + "ffn_norm")
        if not experts:
            x = x + swiglu(h, *(w(f"{b}ffn_{m}") for m in ("gate", "up", "down")))
            continue
        scores = h @ w(b + "ffn_gate_inp").T
        parts = [w(f"{b}ffn_{m}_exps") for m in ("gate", "up", "down")]
        for p in range(n):
            best = np.argsort(-scores[p])[:chosen]
            share = np.exp(scores[p][best] - scores[p][best].max())
            x[p] += sum(f * swiglu(h[p], *(m[e] for m in parts)) for f, e in zip(share / share.sum(), best, strict=True))
    return np.asarray(norm(x, "output_norm") @ w("token_embd").T)


def check(path: Path, want: Array, target: str = "cpu", tolerance: float = 2e-3) -> None:
    """Prompt in chunks of 5, then single steps."""
    m = llm.load(path, target, threads=1, capacity=32, chunk=5, exact=True)
    assert np.abs(m.feed(TOKENS[:13]) - want[12]).max() < tolerance * np.abs(want).max()
    for i in range(13, len(TOKENS)):
        assert np.abs(m.feed(TOKENS[i : i + 1]) - want[i]).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("window", [1, 3, 8, 11])
def test_sliding_window(tmp_path: Path, window: int) -> None:
    path = model(tmp_path / "m.gguf", {"llama.attention.sliding_window": window})
    want = forward(path, TOKENS, window)
    assert np.abs(want[-1] - forward(path, TOKENS)[-1]).max() > 0.02 * np.abs(want).max()
    check(path, want)
    if window == 3:
        pytest.importorskip("wasmtime")
        check(path, want, "wasm")


@pytest.mark.parametrize("window", [0, 5])
def test_cache_of_8_bits(tmp_path: Path, window: int) -> None:
    """Against f64: rounding of keys and values to 8 bits moves logits by up to 2 %; the order of the best tokens stays."""
    path = model(tmp_path / "m.gguf", {"llama.attention.sliding_window": window})
    want = forward(path, TOKENS, window)
    whole = llm.load(path, threads=1, capacity=32, chunk=5, exact=True)
    for target in ("cpu", "wasm"):
        if target == "wasm":
            pytest.importorskip("wasmtime")
        m = llm.load(path, target, threads=2, capacity=32, chunk=5, exact=True, cache_bits=8)
        assert m.about["cache_bytes"] == LAYERS * 2 * KV * (HEAD + 4)
        got = [m.feed(TOKENS[:13]), *(m.feed([t]) for t in TOKENS[13:])]
        for y, w in zip(got, want[12:], strict=True):
            assert np.abs(y - w).max() < 0.02 * np.abs(want).max()
            assert int(np.argmax(y)) == int(np.argmax(w))
    assert whole.about["cache_bytes"] == LAYERS * 2 * KV * HEAD * 2
    with pytest.raises(InputError, match="cache of 4 bits"):
        llm.load(path, cache_bits=4)


@pytest.mark.parametrize("wanted", [("after", "q", "after.scales"), ("after", "q"), ("q", "after.scales"), ("q",), ("after.scales",)])
def test_rows_of_an_8_bit_cache(wanted: tuple[str, ...]) -> None:
    """The rows that RotateIntoCache writes, against numpy; others stay as they are, and it does not matter which outputs are read."""
    rng = np.random.default_rng(0)
    b = GraphBuilder("rows")
    n = var("S", lo=1)
    half = HEAD // 2
    cache, scales = b.input("cache", i8, [2, KV, 8, HEAD]), b.input("scales", f32, [2, KV, 8])
    qkv, pos = b.input("qkv", f32, [n, (HEADS + 2 * KV) * HEAD]), b.input("pos", i64, [1])
    cos, sin = (rng.standard_normal((8, half)).astype(np.float32) for _ in range(2))
    outs = b.ops("luthier::RotateIntoCache", 3, cache, qkv, b.const("cos", cos), b.const("sin", sin), pos, scales, heads=HEADS, kv_heads=KV)
    for name, v in zip(("after", "q", "after.scales"), outs, strict=True):
        if name in wanted:
            b.output(name, v)
    graph = b.graph()
    bytes_, rows = rng.integers(-9, 9, (2, KV, 8, HEAD)).astype(np.int8), np.ones((2, KV, 8), np.float32)
    before = bytes_.copy()
    x = rng.standard_normal((3, (HEADS + 2 * KV) * HEAD)).astype(np.float32)
    x[1, -HEAD:] = 0
    results = dict(zip(wanted, compile_graph(graph, threads=1)(bytes_, rows, x, np.array([4])), strict=True))
    assert all(np.array_equal(results[n], a) for n, a in (("after", bytes_), ("after.scales", rows)) if n in wanted)
    v = x.reshape(3, -1, HEAD).astype(np.float64)
    c, s = cos[4:7, None], sin[4:7, None]
    keys = np.concatenate([v[:, HEADS : HEADS + KV, :half] * c - v[:, HEADS : HEADS + KV, half:] * s, v[:, HEADS : HEADS + KV, :half] * s + v[:, HEADS : HEADS + KV, half:] * c], -1)
    want = np.stack([keys, v[:, HEADS + KV :]]).swapaxes(1, 2)
    top = np.abs(want).max(-1)
    assert np.allclose(rows[:, :, 4:7], top / 127, rtol=1e-5)
    assert np.abs(bytes_[:, :, 4:7] * rows[:, :, 4:7, None] - want).max(-1).max() <= (top / 127 * 0.51).max()
    assert np.array_equal(bytes_[:, :, :4], before[:, :, :4]) and np.array_equal(bytes_[:, :, 7:], before[:, :, 7:])
    with pytest.raises(ShapeError, match="needs scales"):
        wrong = b.input("wrong", f32, [2, KV, 9])
        b.ops("luthier::RotateIntoCache", 3, cache, qkv, b.const("c", cos), b.const("s", sin), pos, wrong, heads=HEADS, kv_heads=KV)


SCALINGS: list[dict[str, Any]] = [
    {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0, "llama.rope.scaling.original_context_length": 512},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["linear", "yarn"])
def test_scaled_rotation(tmp_path: Path, scaling: dict[str, Any]) -> None:
    path = model(tmp_path / "m.gguf", scaling)
    want = forward(path, TOKENS)
    plain = forward(model(tmp_path / "plain.gguf"), TOKENS)
    assert np.abs(want[-1] - plain[-1]).max() > 0.02 * np.abs(want).max()
    check(path, want)


def test_factors_of_a_tensor(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", factors=np.array([1, 1, 1, 1.5, 2, 4, 8, 8], np.float32))
    check(path, forward(path, TOKENS))


def test_bad_metadata(tmp_path: Path) -> None:
    for extra, text in (
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": -2.0}, "at least 0"),
        ({"llama.expert_count": 4, "llama.expert_used_count": 5}, "of which 5 are used"),
    ):
        with pytest.raises(InvalidModel, match=text):
            llm.load(model(tmp_path / "m.gguf", extra))


@pytest.mark.parametrize("kind", [q4_1, q8_0], ids=["Q4_1", "Q8_0"])
def test_mixture_of_experts(tmp_path: Path, kind: Any) -> None:
    """Synthetic weights: no trained mixture is small enough to be here."""
    path = model(tmp_path / "m.gguf", {"llama.expert_count": 6, "llama.expert_used_count": 2}, 6, kind)
    want = forward(path, TOKENS, 0, 6, 2)
    check(path, want)
    about = llm.load(path, capacity=8).about
    attention = 2 * W * W + 2 * KV * HEAD * W
    assert about["parameters"] == LAYERS * (attention + 6 * W + 2 * 3 * W * HIDDEN) + VOCABULARY * W  # two of six experts
    if kind is q8_0:
        pytest.importorskip("wasmtime")
        check(path, want, "wasm")


def expert_graph(experts: int, rows: int, k: int, top: int, q: Array, s: Array, o: Array | None, bits: int, zero: int = 0) -> Any:
    b = GraphBuilder("experts")
    n = var("S", lo=1)
    x, ids = b.input("x", f32, [n, k]), b.input("ids", i64, [n, top])
    more = [] if o is None else [b.const("o", o)]
    y = b.op("luthier::ExpertMatMul", x, ids, b.const("w", pack_experts(q, bits)), b.const("s", s), *more, bits=bits, group=16, zero=zero)
    b.output("y", y)
    return b.graph()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offset", [True, False])
def test_only_the_chosen_experts_are_read(bits: int, offset: bool) -> None:
    """Scales of the others are NaN, their numbers of bytes are a multiple of what is touched."""
    rng = np.random.default_rng(1)
    experts, rows, k, top = 7, 5, 48, 3
    q = rng.integers(0, 1 << bits, (experts, rows, k))
    s, o = rng.uniform(0.5, 2, (experts, rows, k // 16)).astype(np.float16), rng.standard_normal((experts, rows, k // 16)).astype(np.float16)
    ids = np.array([[5, 0, 2], [2, 5, 5], [0, 2, 0], [5, 2, 0]])
    for e in set(range(experts)) - set(ids.reshape(-1).tolist()):
        s[e] = np.nan
    zero = 1 << (bits - 1)
    x = rng.standard_normal((4, k)).astype(np.float32)
    y = compile_graph(expert_graph(experts, rows, k, top, q, s, o if offset else None, bits, zero), threads=2)(x, ids)[0]
    wide = np.repeat(s.astype(np.float64), 16, -1)
    w = q * wide + np.repeat(o.astype(np.float64), 16, -1) if offset else (q - zero) * wide
    want = np.einsum("stnk,sk->stn", w[ids], x.astype(np.float64))
    assert np.isfinite(y).all()
    assert np.abs(y - want).max() < 1e-5 * np.abs(want).max()
    with pytest.raises(ShapeError, match="scales a row"):
        expert_graph(experts, rows, k, top, q, s[..., :2], None, bits)
