"""The tokenizer that a GGUF file describes, as an object of the ``tokenizers`` library: byte-pair encoding over bytes ("gpt2") and
SentencePiece's byte-pair form ("llama"); which tokens begin and end a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luthier.errors import InvalidModel, LuthierError
from luthier.importers.gguf.file import GGUF

__all__ = ["END_NAMES", "begin_token", "end_tokens", "make_tokenizer", "read_tokenizer", "supported", "tokenizer_json"]


@dataclass(frozen=True, slots=True)
class Cut:
    """How texts are cut before merging: by one regular expression after the other. ``whole``: a piece that is a token is taken without merges;
    ``begins``: texts begin with a mark unless the file says otherwise."""

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH}"
_GPT4O = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|{_SLASH}"
_DEEPSEEK3 = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DIGITS = Cut((r"\p{N}", _GPT2))
_CUTS: dict[str, Cut] = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4", "granite-docling"), Cut((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone", "codeshell", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), Cut((_LLAMA3,), True, True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Cut((_LLAMA3,))), **dict.fromkeys(("glm4", "glm5"), Cut((_LLAMA3,), True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"), Cut((_QWEN2,))),
    "tekken": Cut((_TEKKEN,), True, True), **dict.fromkeys(("gpt-4o", "llama4"), Cut((_GPT4O,))),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), Cut((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3))),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), Cut((_BLOOM,))), "viking": Cut((_BLOOM, r"\p{N}")),
}  # fmt: skip
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # types of tokens in the file
_SPACE = "\u2581"  # SentencePiece writes a blank so

# texts of tokens that end an answer, whatever number the file gives for the end
END_NAMES = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


def _tokens(g: GGUF) -> list[str]:
    """Texts of the tokens, by number."""
    return [s or f"[EMPTY_{i}]" for i, s in enumerate(g.value("tokenizer.ggml.tokens") or ())]


def _types(g: GGUF) -> list[int]:
    found = g.value("tokenizer.ggml.token_type")
    return [_NORMAL] * len(_tokens(g)) if found is None else found.tolist()


def _numbered(g: GGUF, key: str, tokens: int) -> int | None:
    """The token that the metadata names, None where there is none or its number is outside of the vocabulary."""
    v = g.value(f"tokenizer.ggml.{key}_token_id")
    return v if v is not None and 0 <= v < tokens else None


def end_tokens(g: GGUF, vocabulary: int) -> list[int]:
    """Tokens that end a text: by the numbers in the file, and by their texts."""
    tokens = g.value("tokenizer.ggml.tokens") or ()
    named = {s: i for i, s in enumerate(tokens) if s in END_NAMES and i < vocabulary}
    if "<|end|>" in named and ("<|return|>" in named and "<|call|>" in named or "<|calls|>" in named and "<|flush|>" in named):
        del named["<|end|>"]  # there it ends a message within an answer
    given = (_numbered(g, k, vocabulary) for k in _END_KEYS)
    return sorted({*named.values(), *(i for i in given if i is not None)})


def begin_token(g: GGUF, vocabulary: int) -> int | None:
    """The token that a text begins with, None where it begins without: as the file says, else by the kind of tokenizer."""
    kind, adds = g.value("tokenizer.ggml.model"), g.value("tokenizer.ggml.add_bos_token")
    if adds is None:
        adds = kind == "llama" or kind == "gpt2" and _CUTS.get(g.value("tokenizer.ggml.pre"), _DIGITS).begins
    number = _numbered(g, "bos", vocabulary)
    return None if not adds else 1 if number is None and kind == "llama" and vocabulary > 1 else number


def supported(g: GGUF) -> str | None:
    """None where :func:`make_tokenizer` can make this one, else why not."""
    kind, tokens = g.value("tokenizer.ggml.model"), _tokens(g)
    if kind is None:
        return "has no tokenizer"
    if kind not in ("gpt2", "llama"):
        return f"has a tokenizer of kind {kind!r}; byte-pair encoding ('gpt2') and SentencePiece ('llama') are known"
    if kind == "gpt2" and g.value("tokenizer.ggml.pre") not in _CUTS:
        return f"cuts texts as {g.value('tokenizer.ggml.pre')!r}, which is not known"
    if not tokens or len(set(tokens)) != len(tokens):
        return f"has {len(tokens)} tokens, of which {len(tokens) - len(set(tokens))} are there twice"
    if len(_types(g)) < len(tokens):
        return f"has {len(_types(g))} types of tokens for {len(tokens)} tokens"
    if kind == "gpt2" and g.value("tokenizer.ggml.merges") is None:
        return "has a tokenizer without merges"
    scores = g.value("tokenizer.ggml.scores")
    if kind == "llama" and (scores is None or len(scores) < len(tokens)):
        return "has a tokenizer without scores"
    return None


def make_tokenizer(g: GGUF) -> Any:
    """A ``tokenizers.Tokenizer``. Raises LuthierError when the package is missing, InvalidModel for a kind that is not supported."""
    try:
        from tokenizers import AddedToken
    except ImportError:
        raise LuthierError("text needs the package tokenizers", hint="pip install luthier[llm]") from None
    why = supported(g)
    if why is not None:
        raise InvalidModel(f"{g.path} {why}", hint="give token numbers, or a tokenizer of your own")
    tokens, types, pieces = _tokens(g), _types(g), g.value("tokenizer.ggml.model") == "llama"
    try:
        t = _sentence_pieces(g, tokens, types) if pieces else _byte_pairs(g, tokens)
        control = [s for s, k in zip(tokens, types, strict=False) if k == _CONTROL or s in END_NAMES or pieces and k == _UNKNOWN]
        t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in control])
        given = [s for s, k in zip(tokens, types, strict=False) if k == _USER and s not in END_NAMES]
        t.add_tokens([AddedToken(s, normalized=pieces and not _prefixed(g)) for s in given])
    except Exception as e:  # the library raises nothing more special
        raise InvalidModel(f"{g.path} describes no tokenizer: {e}") from None
    return t


def _byte_pairs(g: GGUF, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    cut, merges = _CUTS[g.value("tokenizer.ggml.pre")], g.value("tokenizer.ggml.merges")
    number = {s: i for i, s in enumerate(tokens)}
    split = [(m[:at], m[at + 1 :]) for m in merges if (at := m.find(" ", 1)) > 0]
    pairs = [(a, b) for a, b in split if a in number and b in number and a + b in number]  # the library refuses others, which no text can use
    t = Tokenizer(models.BPE(vocab=number, merges=pairs, ignore_merges=cut.whole))
    steps: list[Any] = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in cut.patterns]
    t.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    return t


def _prefixed(g: GGUF) -> bool:
    """Whether a blank is put before a text."""
    return g.value("tokenizer.ggml.add_space_prefix") is not False


def _sentence_pieces(g: GGUF, tokens: list[str], types: list[int]) -> Any:
    """SentencePiece joins the neighbours whose joint piece scores best, which is byte-pair encoding with merges in the order of the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = g.value("tokenizer.ggml.scores")
    number = {s: i for i, s in enumerate(tokens)}
    known = {s for s, k in zip(tokens, types, strict=False) if k in (_NORMAL, _USER)}
    merges = []
    for s in known:
        for at in range(1, len(s)):
            a, b = s[:at], s[at:]
            if a in known and b in known:
                merges.append((-float(scores[number[s]]), -len(a), number[a], number[b], a, b))
    unknown = _numbered(g, "unknown", len(tokens))
    bytes_there = all(f"<0x{i:02X}>" in number for i in range(256))
    t = Tokenizer(models.BPE(
        vocab=number, merges=[m[4:] for m in sorted(merges)], unk_token=tokens[0 if unknown is None else unknown], fuse_unk=True, byte_fallback=bytes_there,
    ))  # fmt: skip
    before = [normalizers.Prepend(_SPACE)] if _prefixed(g) else []
    t.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if before else []
    t.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return t


def tokenizer_json(g: GGUF) -> bytes:
    """The tokenizer as the file ``tokenizer.json`` that the ``tokenizers`` libraries of Python and JavaScript read. Raises as :func:`make_tokenizer`."""
    return str(make_tokenizer(g).to_str()).encode()


def read_tokenizer(data: bytes) -> Any:
    """A ``tokenizers.Tokenizer`` of such a file. Raises LuthierError when the package is missing, InvalidModel for other contents."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise LuthierError("text needs the package tokenizers", hint="pip install luthier[llm]") from None
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as e:  # the library raises nothing more special
        raise InvalidModel(f"tokenizer.json describes no tokenizer: {e}") from None
