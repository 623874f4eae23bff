"""Files whose metadata or tensors say something else than a model needs: one error that names key and value, or the meaning that it has elsewhere."""

from __future__ import annotations

import struct
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier import llm
from luthier.errors import InvalidModel
from luthier.importers.gguf.file import GGUF, read_gguf
from luthier.importers.gguf.metadata import KEYS, full_name, read_metadata
from luthier.importers.gguf_llama import config, llama_graph
from luthier.importers.gguf_tokenizer import tokenizer_json
from tests import test_gguf_architectures as architectures
from tests.test_gguf import f32_tensor, forward, tiny, write

Array = np.ndarray[Any, Any]
TOKENS = [5, 17, 93, 0, 41, 41, 8, 60, 2, 77, 12]
STRANGE: dict[str, Any] = {
    "text": "abc", "empty text": "", "list": np.array([2, 3], np.int32), "texts": ["a", "b"], "lists": [["a"], ["b"]], "zero": 0, "minus": -1,
    "huge": 1 << 31, "fraction": 2.5, "nan": float("nan"), "infinite": float("inf"), "empty list": np.zeros(0, np.int32), "flag": True,
    "fractions": np.array([0.5, np.nan], np.float32),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> GGUF:
    return read_gguf(tiny(tmp_path_factory.mktemp("metadata") / "tiny.gguf"))


def rewritten(g: GGUF, path: Path, metadata: dict[str, Any] | None = None, more: dict[str, Any] | None = None) -> Path:
    """The file with other metadata or more tensors."""
    number = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8}
    tensors = {n: (number[t.kind], t.shape, t.raw.tobytes()) for n, t in g.tensors.items()}
    return write(path, g.metadata | (metadata or {}), tensors | (more or {}))


@pytest.mark.parametrize("key", sorted(KEYS))
def test_strange_values(small: GGUF, key: str) -> None:
    """Every key of the table with every strange value: nothing but InvalidModel that names the key, or a model."""
    name = full_name(small.metadata, key)
    refused = 0
    for v in STRANGE.values():
        g = GGUF("m.gguf", 3, small.metadata | {"tokenizer.ggml.model": "gpt2"} | {name: v}, small.tensors)
        try:
            llama_graph(g, min(config(g).context, 8), True)
            tokenizer_json(g)
        except InvalidModel as e:
            refused += 1
            if not KEYS[key].fits(v) and not isinstance(v, np.ndarray):
                assert (name in str(e) and str(v)[:20] in str(e)) or "architecture" in str(e), str(e)
    assert refused >= 10


def test_values_of_the_table() -> None:
    for key, rule in KEYS.items():
        if rule.kind == "number":
            assert read_metadata("m", {"general.architecture": "x", full_name({"general.architecture": "x"}, key): 1 if rule.high <= 1 else 2}, key) in (1.0, 2.0)
    assert read_metadata("m", {"general.architecture": "x", "x.attention.head_count": np.array([4, 2])}, "attention.head_count") == (4, 2)
    with pytest.raises(InvalidModel, match=r"'x.attention.head_count' is array\(\[4, 0\]\), expected a whole number of at least 1"):
        read_metadata("m", {"general.architecture": "x", "x.attention.head_count": np.array([4, 0])}, "attention.head_count")


def test_more_or_fewer_layers_than_tensors(small: GGUF, tmp_path: Path) -> None:
    for count in (1, 3, 2**31 - 1):
        raw = Path(small.path).read_bytes()
        at = raw.index(b"llama.block_count") + len("llama.block_count") + 4
        bad = tmp_path / "m.gguf"
        bad.write_bytes(raw[:at] + struct.pack("<I", count) + raw[at + 4 :])
        start = time.perf_counter()
        with pytest.raises(InvalidModel, match=f"'llama.block_count' is {count}, and there are tensors of 2 layers"):
            llm.load(bad)
        assert time.perf_counter() - start < 5


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "attention.key_length", "embedding_length", "feed_forward_length"])
def test_extents_that_the_tensors_contradict(small: GGUF, key: str) -> None:
    """Before anything is made by the number."""
    for v in (1, 2**31 - 2, 48):
        g = GGUF("m.gguf", 3, small.metadata | {f"llama.{key}": v, "llama.rope.dimension_count": 16}, small.tensors)
        with pytest.raises(InvalidModel):
            llama_graph(g, 2048)


def test_lists_with_a_value_for_each_layer(small: GGUF, tmp_path: Path) -> None:
    each = {"llama.attention.head_count": np.array([4, 4]), "llama.attention.head_count_kv": np.array([2, 2]), "llama.feed_forward_length": np.array([96, 96])}
    m = llm.load(rewritten(small, tmp_path / "m.gguf", each), threads=1, capacity=16, exact=True)
    want = forward(Path(small.path), TOKENS)
    assert np.abs(m.feed(TOKENS) - want[-1]).max() < 2e-3 * np.abs(want).max()
    with pytest.raises(InvalidModel, match="has 3 values for 2 layers"):
        llm.load(rewritten(small, tmp_path / "bad.gguf", {"llama.attention.head_count_kv": np.array([2, 2, 2])}))
    with pytest.raises(InvalidModel, match=r"attn_k.weight' has shape \[32, 64\], expected \[16, 64\]"):
        llm.load(rewritten(small, tmp_path / "bad.gguf", {"llama.attention.head_count_kv": np.array([2, 1])}))


def test_layers_that_differ(small: GGUF, tmp_path: Path) -> None:
    """The second layer with one head of keys instead of two: as if both of its heads were the first."""
    one = {f"blk.1.attn_{n}.weight": f32_tensor(small.tensor(f"blk.1.attn_{n}.weight").numpy()[:16]) for n in "kv"}
    both = {n: f32_tensor(np.tile(small.tensor(n).numpy()[:16], (2, 1))) for n in one}
    want = forward(rewritten(small, tmp_path / "both.gguf", None, both), TOKENS)
    m = llm.load(rewritten(small, tmp_path / "m.gguf", {"llama.attention.head_count_kv": np.array([2, 1])}, one), threads=1, capacity=16, exact=True)
    assert np.abs(m.feed(TOKENS) - want[-1]).max() < 2e-3 * np.abs(want).max()
    assert m.about["cache_bytes"] == (2 + 1) * 2 * 16 * 2


def test_tensors_that_nobody_reads(small: GGUF, tmp_path: Path) -> None:
    """Unknown ones are ignored with a note; parts that other architectures have are not."""
    extra = {n: f32_tensor(np.ones(3)) for n in ("made.up", "blk.0.my_statistics", "mm.0.weight")}
    with pytest.warns(UserWarning) as seen:
        m = llm.load(rewritten(small, tmp_path / "m.gguf", None, extra), threads=1, capacity=16, exact=True)
    assert [n for n in extra if any(n in str(w.message) for w in seen)] == list(extra) and len(m.about["notes"]) == 3
    want = forward(Path(small.path), TOKENS)
    assert np.abs(m.feed(TOKENS) - want[-1]).max() < 2e-3 * np.abs(want).max()
    for name in ("blk.0.attn_sinks.weight", "blk.1.ffn_gate.bias", "blk.1.ffn_norm.bias", "output.bias", "position_embd.weight", "blk.0.attn_q.scale", "blk.0.ssm_a", "blk.0.post_ffw_norm.weight"):
        with pytest.raises(InvalidModel, match=name.replace(".", r"\.")):
            llm.load(rewritten(small, tmp_path / "bad.gguf", None, {name: f32_tensor(np.ones(3))}))


@pytest.mark.parametrize("extra", [
    {"llama.rope.scaling.factor": 4.0}, {"llama.rope.scale_linear": 4.0}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 7.0},
], ids=["without a type", "the old key", "the new key before the old"])  # fmt: skip
def test_a_factor_alone_is_linear(small: GGUF, tmp_path: Path, extra: dict[str, Any]) -> None:
    """A factor of 4: token p stands where p / 4 stood, so every fourth place agrees with the plain model's."""
    m = llm.load(rewritten(small, tmp_path / "m.gguf", extra), threads=1, capacity=16, exact=True)
    plain = llm.load(small.path, threads=1, capacity=16, exact=True)
    scaled, whole = (next(v.data for n in llama_graph(g, 16).nodes for v in n.inputs if v is not None and v.name == "cos") for g in (read_gguf(tmp_path / "m.gguf"), small))
    assert np.allclose(scaled[::4], whole[:4], atol=1e-6)
    assert np.abs(m.feed(TOKENS) - plain.feed(TOKENS)).max() > 1e-3


@pytest.mark.parametrize("extra", [{"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"llama.rope.scaling.type": "yarn"}, {"llama.rope.scaling.factor": 0.0}])
def test_no_scaling(small: GGUF, tmp_path: Path, extra: dict[str, Any]) -> None:
    m = llm.load(rewritten(small, tmp_path / "m.gguf", extra), threads=1, capacity=16, exact=True)
    want = forward(Path(small.path), TOKENS)
    assert np.abs(m.feed(TOKENS) - want[-1]).max() < 2e-3 * np.abs(want).max()


@pytest.mark.parametrize(("arch", "head"), [("llama", 6), ("llama", 18), ("qwen2", 20), ("qwen3", 10), ("gemma", 44), ("phi3", 12), ("qwen2moe", 2)])
def test_heads_of_any_even_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, head: int) -> None:
    monkeypatch.setattr(architectures, "HEAD", head)
    monkeypatch.setattr(architectures, "W", 64)
    path = architectures.model(tmp_path / "m.gguf", arch) if head * 4 % 32 == 0 else plain_weights(architectures.model, tmp_path, arch, monkeypatch)
    want = architectures.forward(path, arch, TOKENS)
    m = llm.load(path, threads=1, capacity=16, chunk=4, exact=True, all_logits=True)
    assert np.abs(m.feed(TOKENS) - want).max() < (2e-2 if "moe" in arch else 2e-3) * np.abs(want).max()


def plain_weights(make: Any, folder: Path, arch: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same model with f32 matrices, whose columns need fill no blocks."""
    monkeypatch.setattr(architectures, "q4_1", lambda rows, columns, rng: f32_tensor(rng.standard_normal((rows, columns)) / np.sqrt(columns)))
    return make(folder / "m.gguf", arch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", [20, 36, 80])
def test_experts_of_any_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: int) -> None:
    monkeypatch.setattr(architectures, "INNER", inner)
    path = plain_weights(architectures.model, tmp_path, "qwen3moe", monkeypatch)
    want = architectures.forward(path, "qwen3moe", TOKENS)
    m = llm.load(path, threads=1, capacity=16, exact=True, all_logits=True)
    assert np.abs(m.feed(TOKENS) - want).max() < 2e-2 * np.abs(want).max()  # experts of 64 columns are rounded to 8 bits


@pytest.mark.parametrize("embedding", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("rest", ["F16", "BF16", "file"])
def test_types_of_plain_tensors(small: GGUF, tmp_path: Path, embedding: str, rest: str) -> None:
    def stored(name: str, kind: str) -> tuple[int, tuple[int, ...], bytes]:
        a = small.tensor(name).numpy().astype("<f4")
        if kind == "F16":
            return 1, a.shape, a.astype("<f2").tobytes()
        return (30, a.shape, (a.view("<u4") >> 16).astype("<u2").tobytes()) if kind == "BF16" else f32_tensor(a)

    more = {"token_embd.weight": stored("token_embd.weight", embedding)}
    if rest != "file":
        more |= {n: stored(n, rest) for n, t in small.tensors.items() if len(t.shape) == 2 and n != "token_embd.weight"}
    path = rewritten(small, tmp_path / "m.gguf", None, more)
    want = forward(path, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = llm.load(path, threads=1, capacity=16, exact=True)
    assert np.abs(m.feed(TOKENS) - want[-1]).max() < 2e-3 * np.abs(want).max()
