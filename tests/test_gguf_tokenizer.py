"""Tokenizers of GGUF files against their references: byte-pair encodings trained here with each published cut, SentencePiece models trained
here; which tokens begin and end a text."""

from __future__ import annotations

import functools
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier import llm
from luthier.errors import InvalidModel
from luthier.importers.gguf.file import read_gguf
from luthier.importers.gguf_tokenizer import begin_token, end_tokens, make_tokenizer
from tests.test_gguf import tiny, write

tokenizers = pytest.importorskip("tokenizers")

WORDS = (
    "the The THE don't DON'T it's I'LL we've they'd o'clock 'tis rock'n'roll naïve café e\u0301te\u0301 straße ΑΒΓ αβγ привет Мир हिन्दी ไทย 日本語 中文字符 한국어 "
    "עברית العربية 👍🏽 👨‍👩‍👧 😀 🇩🇪 1 12 123 1234 12345 3.14 1,000,000 0x1F ２３ ½ ² Ⅷ x=1; foo_bar fooBar HTTPServer a+b==c != ... --- «quoted» “smart” ‘s \u017f "
    "http://example.com/?q=1&r=2 user@host #tag $5.00 100% [x](y) {z} <b> \\n \\t `code` ~ ^ | § € \u200b \ufeff \u0000 \u0085 \u00a0 \u2028 \u3000 \ufffd hello world hellohello"
).split(" ")
SPACES = ["", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\r\n", "\t", "\t\t", " \t ", "\u00a0", "\u3000", "      ", "\r"]


@functools.cache
def odd_texts() -> list[str]:
    """Three hundred texts: words of many scripts, digits, apostrophes and marks between blanks of every kind."""
    rng = random.Random(5)
    fixed = [*SPACES, *WORDS, "'s", "'S", " 's", "''s", "a's'll", "\n's", "1's", "x\n\n\n  y", "  \n  \n", "a " * 20, "." * 30, "0" * 17, "é" * 9, "\u0301\u0301", "a\u0300\u0301b"]
    made = ["".join(rng.choice(SPACES) + rng.choice(WORDS) for _ in range(rng.randrange(1, 9))) + rng.choice(SPACES) for _ in range(320 - len(fixed))]
    return fixed + made


# as the models' own tokenizer.json files have them
CUTS: dict[str, list[tuple[str, Any]]] = {
    "qwen2": [("Qwen 2", r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")],
    "llama-bpe": [("Llama 3", r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")],
    "tekken": [("Mistral Nemo", r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""")],
    "gpt-2": [("GPT-2", None)],
    "smollm": [("digits", "digits"), ("GPT-2", None)],
}  # fmt: skip


def reference(cut: str, whole: bool) -> Any:
    """A tokenizer trained on the texts with the cut of a model."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=whole))
    pre = tokenizers.pre_tokenizers
    steps: list[Any] = []
    for _, pattern in CUTS[cut]:
        if pattern == "digits":
            steps.append(pre.Digits(individual_digits=True))
        elif pattern is None:
            steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=True))
        else:
            steps += [pre.Split(tokenizers.Regex(pattern), behavior="isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    t.pre_tokenizer = pre.Sequence(steps)
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre.ByteLevel.alphabet(), special_tokens=["<|begin|>", "<|im_end|>"], show_progress=False)
    t.train_from_iterator(odd_texts() * 2 + [Path(__file__).read_text(encoding="utf-8")], trainer)
    return t


def as_metadata(t: Any, cut: str) -> dict[str, Any]:
    """What a converter writes of a byte-pair tokenizer."""
    import json

    model = json.loads(t.to_str())["model"]
    tokens = [s for s, _ in sorted(model["vocab"].items(), key=lambda x: x[1])]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.token_type": np.array([3 if s.startswith("<|") and len(s) > 2 else 1 for s in tokens], np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("cut", sorted(CUTS))
def test_byte_pairs(tmp_path: Path, cut: str) -> None:
    """300 odd texts, and texts with control tokens in them, cut as the reference cuts them."""
    want = reference(cut, cut in ("llama-bpe", "tekken"))
    got = make_tokenizer(read_gguf(write(tmp_path / "t.gguf", as_metadata(want, cut), {})))
    texts = odd_texts()
    assert len(texts) >= 300
    for text in [*texts, *(f"<|begin|>{a}<|im_end|>{b}" for a, b in zip(texts[::3], texts[1::3], strict=False))]:
        ids = want.encode(text, add_special_tokens=False).ids
        assert got.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert got.decode(ids, skip_special_tokens=False) == want.decode(ids, skip_special_tokens=False) == text


def test_the_cuts_differ(tmp_path: Path) -> None:
    """A cut taken for another one would be seen by these texts."""
    made = {c: make_tokenizer(read_gguf(write(tmp_path / "t.gguf", as_metadata(reference("gpt-2", False), c), {}))) for c in CUTS}
    for a in made:
        for b in made:
            if a < b:
                assert any(made[a].encode(x).ids != made[b].encode(x).ids for x in odd_texts()), (a, b)


def test_whole_tokens_come_before_merges(tmp_path: Path) -> None:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    meta = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [*letters, "wo", "world", "word"], "tokenizer.ggml.merges": ["w o", "x y"]}
    for cut, whole in (("llama-bpe", True), ("tekken", True), ("qwen2", False), ("smaug-bpe", False)):
        t = make_tokenizer(read_gguf(write(tmp_path / "t.gguf", {**meta, "tokenizer.ggml.pre": cut}, {})))
        assert [t.id_to_token(i) for i in t.encode("world").ids] == (["world"] if whole else ["wo", "r", "l", "d"])


# ---------------------------------------------------------------- SentencePiece


def pieces(**options: Any) -> Any:
    """A SentencePiece model trained on the texts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    text = [line for x in odd_texts() * 3 + Path(__file__).read_text(encoding="utf-8").split("\n") for line in x.split("\n") if line.strip() and "\0" not in line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=out, model_type="bpe", vocab_size=900, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=0.98, allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def as_piece_metadata(sp: Any) -> dict[str, Any]:
    n = sp.get_piece_size()
    kind = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 5 if sp.is_unused(i) else 1 for i in range(n)]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(n)], "tokenizer.ggml.scores": np.array([sp.get_score(i) for i in range(n)], np.float32),
        "tokenizer.ggml.token_type": np.array(kind, np.int32), "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces(tmp_path: Path, prefix: bool) -> None:
    sp = pieces(add_dummy_prefix=prefix)
    meta = as_piece_metadata(sp) | ({} if prefix else {"tokenizer.ggml.add_space_prefix": False})
    got = make_tokenizer(read_gguf(write(tmp_path / "t.gguf", meta, {})))
    rng = random.Random(3)
    runs = ["".join(rng.choice("aab  .1") for _ in range(rng.randrange(1, 30))) for _ in range(200)]  # many joints of equal pieces
    for text in [*odd_texts(), *runs]:
        if "\0" in text:
            continue  # ends a text there
        ids = sp.encode(text)
        assert got.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert got.decode(ids) == sp.decode(ids), repr(text)


def test_pieces_around_control_tokens(tmp_path: Path) -> None:
    """A blank is put before every part, as the runtimes of such files do; an unknown character without byte tokens is one unknown token."""
    letters = ["<unk>", "<s>", "</s>", "\u2581", "h", "i", "\u2581h", "\u2581hi", "hi"]
    meta = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": letters, "tokenizer.ggml.scores": -np.arange(9, dtype=np.float32), "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1, 1], np.int32)}
    t = make_tokenizer(read_gguf(write(tmp_path / "t.gguf", meta, {})))
    assert t.encode("hi</s>hi hi").ids == [7, 2, 7, 7]
    assert t.encode("h語語i").ids == [6, 0, 5]


# ---------------------------------------------------------------- the ends of a text


def about(path: Path, **more: Any) -> Any:
    names = ["<unk>", "<s>", "</s>", *"abcdefgh"]
    return read_gguf(write(path, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": names, "tokenizer.ggml.bos_token_id": 5, **{f"tokenizer.ggml.{k}": v for k, v in more.items()}}, {}))


@pytest.mark.parametrize(("more", "want"), [
    ({}, None), ({"add_bos_token": True}, 5), ({"pre": "llama-bpe"}, 5), ({"pre": "tekken"}, 5), ({"pre": "qwen2"}, None), ({"pre": "llama-bpe", "add_bos_token": False}, None),
    ({"model": "llama"}, 5), ({"model": "llama", "add_bos_token": False}, None), ({"model": "llama", "bos_token_id": 99}, 1), ({"model": "bert"}, None),
    ({"add_bos_token": True, "bos_token_id": 2**32 - 1}, None), ({"pre": "unheard of", "add_bos_token": True}, 5),
])  # fmt: skip
def test_what_begins_a_text(tmp_path: Path, more: dict[str, Any], want: int | None) -> None:
    assert begin_token(about(tmp_path / "t.gguf", **more), 11) == want


@pytest.mark.parametrize(("tokens", "more", "want"), [
    (["a", "b"], {"eos_token_id": 1}, [1]), (["a", "b"], {"eos_token_id": 7, "eot_token_id": 0}, [0]), (["a", "<|im_end|>", "</s>"], {"eos_token_id": 0}, [0, 1, 2]),
    (["<end_of_turn>", "<eos>", "x"], {}, [0, 1]), (["<|end|>", "x"], {}, [0]), (["<|end|>", "<|return|>", "<|call|>"], {"eos_token_id": 1}, [1, 2]),
    (["a", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"], {"eom_token_id": 2}, [1, 2, 3]),
])  # fmt: skip
def test_what_ends_a_text(tmp_path: Path, tokens: list[str], more: dict[str, Any], want: list[int]) -> None:
    meta = {"tokenizer.ggml.tokens": tokens, **{f"tokenizer.ggml.{k}": v for k, v in more.items()}}
    assert end_tokens(read_gguf(write(tmp_path / "t.gguf", meta, {})), len(tokens)) == want


@pytest.mark.parametrize(("more", "why"), [
    ({"tokenizer.ggml.model": "bert"}, "of kind 'bert'"), ({"tokenizer.ggml.pre": "unheard of"}, "cuts texts as 'unheard of'"), ({"tokenizer.ggml.merges": None}, "without merges"),
    ({"tokenizer.ggml.model": "llama"}, "without scores"), ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "1 are there twice"),
    ({"tokenizer.ggml.token_type": np.array([1], np.int32)}, "1 types of tokens for 3"),
])  # fmt: skip
def test_unknown_tokenizers(tmp_path: Path, more: dict[str, Any], why: str) -> None:
    """The model compiles, is saved and takes token numbers; texts are refused."""
    known = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "c"], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 95, **more}
    g = read_gguf(tiny(tmp_path / "plain.gguf"))
    tensors = {n: ({"F32": 0, "Q4_1": 3, "Q8_0": 8}[t.kind], t.shape, t.raw.tobytes()) for n, t in g.tensors.items()}
    path = write(tmp_path / "m.gguf", g.metadata | {k: v for k, v in known.items() if v is not None}, tensors)
    with pytest.warns(UserWarning, match=why):
        module = llm.compile_model(path, threads=1, capacity=16)
    m = llm.LanguageModel(module)
    assert len(list(m.decode_tokens([1, 2, 3], 2))) == 2
    with pytest.raises(InvalidModel, match="without a tokenizer"):
        list(m.generate("a"))
    with pytest.raises(InvalidModel, match=why):
        make_tokenizer(read_gguf(path))
