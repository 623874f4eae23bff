"""GGUF: blocks written here from their published layouts, files damaged on purpose, a small Llama against numpy."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier
from luthier import llm
from luthier.errors import InputError, InvalidModel, KernelError, TargetError
from luthier.importers.gguf.blocks import BLOCKS, read_blocks
from luthier.importers.gguf.file import read_gguf

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(7)


def half(v: float) -> bytes:
    return np.float16(v).tobytes()


def reference(kind: str) -> tuple[bytes, Array]:
    """(bytes of one random block, its weights), element by element as the layouts say."""
    d, m = float(np.float16(0.37)), float(np.float16(-1.25))
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        five, offset = kind[1] == "5", kind[3] == "1"
        q = RNG.integers(0, 32 if five else 16, 32)
        qs = bytes(int(q[j] & 15) | int(q[j + 16] & 15) << 4 for j in range(16))
        high = struct.pack("<I", sum(int(q[j] >> 4) << j for j in range(32))) if five else b""
        head = half(d) + (half(m) if offset else b"")
        return head + high + qs, q * d + m if offset else (q - (16 if five else 8)) * d
    if kind == "Q8_0":
        q = RNG.integers(-127, 128, 32)
        return half(d) + q.astype(np.int8).tobytes(), q * d
    w = np.empty(256)
    if kind == "Q2_K":
        sc, qs = RNG.integers(0, 256, 16), RNG.integers(0, 256, 64)
        for i in range(256):
            half_, shift, lane = i // 128, i % 128 // 32, i % 32
            w[i] = d * (sc[i // 16] & 15) * (qs[half_ * 32 + lane] >> (2 * shift) & 3) - m * (sc[i // 16] >> 4)
        return bytes(sc.tolist()) + bytes(qs.tolist()) + half(d) + half(m), w
    if kind == "Q3_K":
        hm, qs, sc = RNG.integers(0, 256, 32), RNG.integers(0, 256, 64), RNG.integers(0, 64, 16)
        raw = [0] * 12
        for j in range(16):
            raw[j % 8] |= (int(sc[j]) & 15) << (4 * (j // 8))
            raw[8 + j % 4] |= (int(sc[j]) >> 4) << (2 * (j // 4))
        for i in range(256):
            half_, shift, lane = i // 128, i % 128 // 32, i % 32
            low = qs[half_ * 32 + lane] >> (2 * shift) & 3
            w[i] = d * (sc[i // 16] - 32) * (low - (0 if hm[lane] >> (half_ * 4 + shift) & 1 else 4))
        return bytes(hm.tolist()) + bytes(qs.tolist()) + bytes(raw) + half(d), w
    if kind in ("Q4_K", "Q5_K"):
        sc, mn = RNG.integers(0, 64, 8), RNG.integers(0, 64, 8)
        raw = [0] * 12
        for j in range(4):
            raw[j], raw[j + 4] = int(sc[j]) | (int(sc[j + 4]) >> 4) << 6, int(mn[j]) | (int(mn[j + 4]) >> 4) << 6
            raw[j + 8] = int(sc[j + 4]) & 15 | (int(mn[j + 4]) & 15) << 4
        qs, qh = RNG.integers(0, 256, 128), RNG.integers(0, 256, 32)
        for i in range(256):
            pair, upper, lane = i // 64, i % 64 // 32, i % 32
            q = qs[pair * 32 + lane] >> (4 * upper) & 15
            if kind == "Q5_K":
                q += 16 * (qh[lane] >> (2 * pair + upper) & 1)
            w[i] = d * sc[i // 32] * q - m * mn[i // 32]
        extra = bytes(qh.tolist()) if kind == "Q5_K" else b""
        return half(d) + half(m) + bytes(raw) + extra + bytes(qs.tolist()), w
    if kind == "Q6_K":
        ql, qh, sc = RNG.integers(0, 256, 128), RNG.integers(0, 256, 64), RNG.integers(-128, 128, 16)
        for i in range(256):
            h, part, lane = i // 128, i % 128 // 32, i % 32
            low = ql[h * 64 + lane + 32 * (part % 2)] >> (4 * (part // 2)) & 15
            w[i] = d * sc[i // 16] * ((low | (qh[h * 32 + lane] >> (2 * part) & 3) << 4) - 32)
        return bytes(ql.tolist()) + bytes(qh.tolist()) + sc.astype(np.int8).tobytes() + half(d), w
    t = RNG.integers(-1, 2, 256)
    if kind == "TQ2_0":
        q2 = [0] * 64
        for i in range(256):
            q2[i // 128 * 32 + i % 32] |= int(t[i] + 1) << (2 * (i % 128 // 32))
        return bytes(q2) + half(d), t * d
    digits = [0] * 52  # TQ1_0: the byte is the ceiling of 256 / 243 times five base-3 digits, the first one the highest
    places = [(i % 32, i // 32) for i in range(160)] + [(32 + i % 16, i // 16) for i in range(80)] + [(48 + i % 4, i // 4) for i in range(16)]
    for i, (byte, digit) in enumerate(places):
        digits[byte] += int(t[i] + 1) * 3 ** (4 - digit)
    return bytes(-(-v * 256 // 243) for v in digits) + half(d), t * d


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks(kind: str) -> None:
    blocks = [reference(kind) for _ in range(4)]
    raw = np.frombuffer(b"".join(b for b, _ in blocks), np.uint8)
    n = len(blocks[0][1])
    want = np.concatenate([w for _, w in blocks]).reshape(2, 2 * n)
    g = read_blocks(kind, raw, 2, 2 * n)
    assert np.allclose(g.dequantized(), want, rtol=1e-6, atol=1e-6)
    assert g.scale.shape == (2, 2 * n // g.group)
    with pytest.raises(ValueError, match="bytes"):
        read_blocks(kind, raw[:-1], 2, 2 * n)
    with pytest.raises(ValueError, match="do not fill"):
        read_blocks(kind, raw, 2, 2 * n - 1)


# ---------------------------------------------------------------- files


def value(v: Any) -> bytes:
    if isinstance(v, str):
        return struct.pack("<IQ", 8, len(v.encode())) + v.encode()
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, bool):
        return struct.pack("<IB", 7, v)
    if isinstance(v, np.ndarray):
        kind = {"i": 5, "f": 6}[v.dtype.kind]
        return struct.pack("<IIQ", 9, kind, v.size) + v.astype("<i4" if kind == 5 else "<f4").tobytes()
    if isinstance(v, list):
        items = b"".join(struct.pack("<Q", len(s.encode())) + s.encode() for s in v)
        return struct.pack("<IIQ", 9, 8, len(v)) + items
    return struct.pack("<II", 4, v)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for k, v in metadata.items():
        head += struct.pack("<Q", len(k)) + k.encode() + value(v)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, len(data))
        data += raw
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def f32_tensor(a: Array) -> tuple[int, tuple[int, ...], bytes]:
    return 0, a.shape, a.astype("<f4").tobytes()


def q4_1(rows: int, columns: int, rng: np.random.Generator) -> tuple[int, tuple[int, ...], bytes]:
    n = rows * columns // 32
    d = (rng.uniform(0.5, 1.5, n) / 8 / np.sqrt(columns)).astype(np.float16)
    m = (-8 * d.astype(np.float32)).astype(np.float16)
    b = np.empty((n, 20), np.uint8)
    b[:, :2], b[:, 2:4] = d.view(np.uint8).reshape(n, 2), m.view(np.uint8).reshape(n, 2)
    b[:, 4:] = rng.integers(0, 256, (n, 16))
    return 3, (rows, columns), b.tobytes()


def q8_0(rows: int, columns: int, rng: np.random.Generator) -> tuple[int, tuple[int, ...], bytes]:
    n = rows * columns // 32
    d = (rng.uniform(0.5, 1.5, n) / 64 / np.sqrt(columns)).astype(np.float16)
    b = np.empty((n, 34), np.uint8)
    b[:, :2] = d.view(np.uint8).reshape(n, 2)
    b[:, 2:] = rng.integers(-127, 128, (n, 32)).astype(np.int8).view(np.uint8)
    return 8, (rows, columns), b.tobytes()


def tiny(path: Path) -> Path:
    """A Llama of two layers with random weights: Q4_1 matrices, Q8_0 embedding tied to the output."""
    rng = np.random.default_rng(3)
    w, hidden, heads, kv, head, vocabulary = 64, 96, 4, 2, 16, 96
    meta = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": w, "llama.feed_forward_length": hidden,
        "llama.attention.head_count": heads, "llama.attention.head_count_kv": kv, "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": head,
    }  # fmt: skip
    tensors = {"token_embd.weight": q8_0(vocabulary, w, rng), "output_norm.weight": f32_tensor(rng.uniform(0.5, 1.5, w))}
    for i in range(2):
        for name, rows, cols in (("attn_q", heads * head, w), ("attn_k", kv * head, w), ("attn_v", kv * head, w), ("attn_output", w, heads * head), ("ffn_gate", hidden, w), ("ffn_up", hidden, w), ("ffn_down", w, hidden)):
            tensors[f"blk.{i}.{name}.weight"] = q4_1(rows, cols, rng)
        tensors[f"blk.{i}.attn_norm.weight"] = f32_tensor(rng.uniform(0.5, 1.5, w))
        tensors[f"blk.{i}.ffn_norm.weight"] = f32_tensor(rng.uniform(0.5, 1.5, w))
    return write(path, meta, tensors)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def forward(path: Path, tokens: list[int]) -> Array:
    """Logits of every row in f64, straight from the definition of the architecture."""
    g = read_gguf(path)
    n, heads, kv, head = len(tokens), 4, 2, 16

    def w(name: str) -> Array:
        return g.tensor(name + ".weight").numpy().astype(np.float64)

    def norm(x: Array, name: str) -> Array:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w(name))

    def rotate(x: Array) -> Array:
        y = np.empty_like(x)
        for p in range(n):
            for i in range(head // 2):
                a = p / 10000 ** (2 * i / head)
                c, s = np.cos(a), np.sin(a)
                y[p, :, 2 * i] = x[p, :, 2 * i] * c - x[p, :, 2 * i + 1] * s
                y[p, :, 2 * i + 1] = x[p, :, 2 * i] * s + x[p, :, 2 * i + 1] * c
        return y

    x = w("token_embd")[tokens]
    for i in range(2):
        b = f"blk.{i}."
        h = norm(x, b + "attn_norm")
        q, k = rotate((h @ w(b + "attn_q").T).reshape(n, heads, head)), rotate((h @ w(b + "attn_k").T).reshape(n, kv, head))
        v = (h @ w(b + "attn_v").T).reshape(n, kv, head)
        a = np.zeros((n, heads, head))
        for p in range(n):
            for j in range(heads):
                s = k[: p + 1, j // 2] @ q[p, j] / np.sqrt(head)
                e = np.exp(s - s.max())
                a[p, j] = e / e.sum() @ v[: p + 1, j // 2]
        x = x + a.reshape(n, -1) @ w(b + "attn_output").T
        h = norm(x, b + "ffn_norm")
        gate = h @ w(b + "ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w(b + "ffn_up").T)) @ w(b + "ffn_down").T
    return np.asarray(norm(x, "output_norm") @ w("token_embd").T)


def test_a_small_llama(small: Path) -> None:
    tokens = [5, 17, 93, 0, 41, 41, 8, 60, 2, 77, 12]
    want = forward(small, tokens)
    exact = llm.load(small, threads=1, capacity=32, chunk=4, exact=True, all_logits=True)
    got = exact.feed(tokens)  # three chunks
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()  # keys and values in half precision
    rounded = llm.load(small, threads=2, capacity=32)
    for part, last in (([5, 17, 93], 2), ([0], 3), ([41, 41, 8, 60], 7), ([2], 8)):
        y = rounded.feed(part)
        assert np.abs(y - want[last]).max() < 0.06 * np.abs(want).max()
    rounded.reset()
    assert np.abs(rounded.feed(tokens) - want[-1]).max() < 0.06 * np.abs(want).max()


def test_on_wasm(small: Path, tmp_path: Path) -> None:
    """The cache lives in the module's memory, at an address that does not depend on the number of tokens of a call."""
    pytest.importorskip("wasmtime")
    tokens = [5, 17, 93, 0, 41, 41, 8, 60, 2, 77, 12]
    want = forward(small, tokens)
    made = llm.load(small, "wasm", capacity=32, exact=True)
    made.module.save(tmp_path / "package")
    for m in (made, llm.load(tmp_path / "package")):
        m.feed([9, 9])
        m.reset()
        for part, last in (([5, 17, 93], 2), ([0], 3), ([41, 41, 8, 60], 7), ([2], 8), ([77, 12], 10)):
            assert np.abs(m.feed(part) - want[last]).max() < 2e-3 * np.abs(want).max()
    with pytest.raises(InputError, match="the cache holds 32 positions"):
        made.feed([1] * 22)
    with pytest.raises(InputError, match="expected tokens, pos, last"):
        made.step({"tokens": np.array([1])})
    with pytest.raises(InputError, match="no shape batch"):
        luthier.compile(small, target="wasm", shapes={"batch": [3]})
    assert luthier.compile(small, target="cpu", shapes={"cache": [16]}).manifest["language"]["capacity"] == 16


def test_roofline(small: Path) -> None:
    from luthier.llm.roofline import analyse_language

    r = analyse_language(small, threads=1, contexts=(1, 64), runs=2, reads={"L1": 100.0, "L2": 50.0, "L3": 25.0, "DRAM": 10.0})
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64
    assert r.parameters == 2 * layer + 96 * 64  # two layers and the output, which is the embedding as well
    assert r.cache_bytes == 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head, bytes
    four = [x for x in r.rows if x.precision == "4"]
    assert [x.cache for x in four] == [r.cache_bytes, 64 * r.cache_bytes]
    assert four[0].limit == pytest.approx(50e9 / (r.parameters * 4.5 / 8 + r.cache_bytes)) and four[0].place == "L2"
    file = [x for x in r.rows if x.measured is not None]
    packed = 2 * layer * 5 / 8 + 96 * 64 * 8.5 / 8  # Q4_1 and Q8_0 with half-precision scales; norms are f32
    assert len(file) == 2 and packed <= file[0].weights < 1.2 * packed + 4096
    with pytest.raises(TargetError, match="cannot be measured"):
        analyse_language(small, "wasm")


def test_sequences_and_their_limits(small: Path) -> None:
    m = llm.load(small, threads=1, capacity=8)
    out = list(m.decode_tokens([1, 2, 3], max_tokens=4))
    m.reset()
    assert out == list(m.decode_tokens([1, 2, 3], max_tokens=4)) and len(out) == 4
    with pytest.raises(InputError, match="the cache holds 8 positions"):
        m.feed([1] * 9)
    m.reset()
    assert len(list(m.decode_tokens([1] * 6, max_tokens=50))) == 3  # the cache is full
    with pytest.raises(InputError, match="no tokens"):
        m.feed([])
    with pytest.raises(InputError, match="token 96 is outside"):
        m.feed([96])
    with pytest.raises(InputError, match="tokens are whole numbers, not float64"):
        m.feed([1.5])
    with pytest.raises(InputError, match="capacity of 65"):
        llm.load(small, capacity=65)
    with pytest.raises(InputError, match="seed -1"):
        llm.Sampling(seed=-1)
    with pytest.raises(InputError, match="top_p"):
        llm.Sampling(top_p=0)


def test_sampling() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)
    assert llm.Sampling().pick(logits, rng) == 0
    assert {llm.Sampling(1.0, 2, 1.0).pick(logits, rng) for _ in range(50)} == {0, 1}
    assert {llm.Sampling(1.0, 0, 0.6).pick(logits, rng) for _ in range(50)} == {0, 1}
    counts = np.bincount([llm.Sampling(1.0, 0, 1.0).pick(logits, rng) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - np.exp(logits)).max() < 0.04
    warm = [llm.Sampling(t, 0, 1.0).pick(logits, rng) for t in (0.01, 1e-300) for _ in range(50)]
    assert set(warm) == {0}


def test_sums_that_do_not_reach_one() -> None:
    """Whatever the sum of the rounded probabilities is, every setting picks a token."""
    for k in range(200):
        rng = np.random.default_rng(k)
        logits = (rng.standard_normal(1000) * rng.choice([0.01, 1, 30])).astype(np.float32)
        logits[rng.integers(0, 1000, 5)] = -np.inf
        for top_k, top_p in ((0, 1.0), (40, 1.0), (0, np.nextafter(1, 0)), (1000, 0.999999)):
            assert np.isfinite(logits[llm.Sampling(float(rng.choice([0.1, 1, 1e300])), top_k, top_p).pick(logits, rng)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(small: Path, bad: float, temperature: float) -> None:
    logits = np.full(96, -np.inf if bad < 0 else 0.0, np.float32)
    logits[17] = bad
    how = llm.Sampling(temperature)
    with pytest.raises(KernelError, match=f"is {bad}"):
        how.pick(logits, np.random.default_rng(0))
    m = llm.load(small, threads=1, capacity=8)
    feed, calls = m.feed, []

    def spoiled(tokens: Any) -> Array:
        calls.append(len(tokens))
        y = feed(tokens)
        return logits if len(calls) == 3 else y

    m.feed = spoiled  # type: ignore[method-assign]
    with pytest.raises(KernelError, match="step 2 of this call, after 5 tokens"):
        list(m.decode_tokens([1, 2, 3], 8, how))


def test_damaged_files(small: Path, tmp_path: Path) -> None:
    raw = small.read_bytes()
    bad = tmp_path / "bad.gguf"
    for n in (0, 3, 10, 30, 200, 700, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:n])
        with pytest.raises(InvalidModel):
            read_gguf(bad)
    bad.write_bytes(b"ONNX" + raw[4:])
    with pytest.raises(InvalidModel, match="no GGUF file"):
        read_gguf(bad)
    bad.write_bytes(raw[:4] + struct.pack("<I", 1) + raw[8:])
    with pytest.raises(InvalidModel, match="version 1"):
        read_gguf(bad)
    with pytest.raises(InvalidModel, match="cannot read"):
        read_gguf(tmp_path / "missing.gguf")
    with pytest.raises(InvalidModel, match="type number 99"):
        read_gguf(write(bad, {}, {"w": (99, (4,), b"")}))
    with pytest.raises(InvalidModel, match="do not fill"):
        read_gguf(write(bad, {}, {"w": (3, (2, 33), bytes(80))}))
    twice = {"a": f32_tensor(np.zeros(2)), "b": f32_tensor(np.ones(2))}
    bad.write_bytes(write(bad, {}, twice).read_bytes().replace(b"\1\0\0\0\0\0\0\0b", b"\1\0\0\0\0\0\0\0a"))
    with pytest.raises(InvalidModel, match="the tensor 'a' twice"):
        read_gguf(bad)
    bad.write_bytes(write(bad, {"a": 1, "b": 2}, {}).read_bytes().replace(b"\1\0\0\0\0\0\0\0b", b"\1\0\0\0\0\0\0\0a"))
    with pytest.raises(InvalidModel, match="the metadata 'a' twice"):
        read_gguf(bad)
    with pytest.raises(InvalidModel, match="architecture 'rwkv'"):
        llm.load(write(bad, {"general.architecture": "rwkv"}, {}))
    with pytest.raises(InvalidModel, match="lacks"):
        llm.load(write(bad, {"general.architecture": "llama"}, {}))


def test_plain_tensors(tmp_path: Path) -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3) / 3
    wide = (a.view(np.uint32) >> 16).astype("<u2")
    g = read_gguf(write(tmp_path / "p.gguf", {"a": "text", "b": ["x", "yy"], "c": 2.5}, {"f": f32_tensor(a), "h": (1, (2, 3), a.astype("<f2").tobytes()), "b": (30, (2, 3), wide.tobytes())}))
    assert g.metadata == {"a": "text", "b": ["x", "yy"], "c": 2.5}
    assert np.array_equal(g.tensor("f").numpy(), a)
    assert np.array_equal(g.tensor("h").numpy(), a.astype(np.float16))
    assert np.array_equal(g.tensor("b").numpy(), (wide.astype(np.uint32) << 16).view(np.float32))
    with pytest.raises(InvalidModel, match="not a matrix"):
        g.tensor("f").grouped()
