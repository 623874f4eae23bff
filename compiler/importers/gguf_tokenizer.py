"""The tokenizer that a GGUF file describes, as an object of the ``tokenizers`` library."""

from __future__ import annotations

from typing import Any

from luthier.errors import InvalidModel, LuthierError
from luthier.importers.gguf import GGUF

# how texts are cut before byte-pair merging, by the name in the file: (digits stand alone, regular expression or None for GPT-2's)
_CUTS: dict[str, tuple[bool, str | None]] = {
    "gpt-2": (False, None), "default": (False, None), "smollm": (True, None), "starcoder": (True, None), "refact": (True, None),
    "command-r": (True, None), "exaone": (True, None),
    "llama-bpe": (False, r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
}  # fmt: skip
_CONTROL = 3  # token types of the file: 1 normal, 3 control, 4 defined by users
_USER = 4


def make_tokenizer(g: GGUF) -> Any:
    """A ``tokenizers.Tokenizer``. Raises LuthierError when the package is missing, InvalidModel for a kind that is not supported."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise LuthierError("text needs the package tokenizers", hint="pip install luthier[llm]") from None
    kind = g.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise InvalidModel(f"{g.path} has a tokenizer of kind {kind!r}; only byte-pair encoding ('gpt2') is supported")
    cut = str(g.metadata.get("tokenizer.ggml.pre", "default"))
    if cut not in _CUTS:
        raise InvalidModel(f"{g.path} cuts texts as {cut!r}, which is not supported", hint="known: " + ", ".join(sorted(_CUTS)))
    tokens: list[str] = g.get("tokenizer.ggml.tokens", list)
    merges = [tuple(m.split(" ", 1)) for m in g.get("tokenizer.ggml.merges", list)]
    t = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(tokens)}, merges=merges))
    digits, pattern = _CUTS[cut]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    t.pre_tokenizer = pre_tokenizers.Sequence(steps)
    t.decoder = decoders.ByteLevel()
    types = g.metadata.get("tokenizer.ggml.token_type")
    if types is not None:
        t.add_special_tokens([AddedToken(tokens[i], special=True) for i, k in enumerate(types) if k == _CONTROL])
        t.add_tokens([AddedToken(tokens[i]) for i, k in enumerate(types) if k == _USER])
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
