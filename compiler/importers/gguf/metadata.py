"""What the metadata of a GGUF file may say: one table of keys with the type and range of each, and the function that reads them.

Keys of an architecture stand without its name (``block_count`` is ``llama.block_count`` in a Llama file).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import InvalidModel

__all__ = ["KEYS", "Key", "full_name", "read_metadata"]

_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Key:
    """``kind``: ``whole`` (an integer), ``number``, ``flag``, ``text``, or a list: ``texts``, ``wholes``, ``numbers``; ``low``, ``high``: range of a
    number (``above``: ``low`` itself is too small); ``each``: may be a list with a value for each layer; ``default``: of a key that is missing;
    ``known``: the texts there are."""

    kind: str
    low: float = -math.inf
    high: float = math.inf
    default: Any = _REQUIRED
    above: bool = False
    each: bool = False
    known: tuple[str, ...] = ()

    def expected(self) -> str:
        """The words of an error message."""
        words = {
            "whole": "a whole number", "number": "a number", "flag": "true or false", "text": "a text", "texts": "a list of texts",
            "wholes": "a list of whole numbers", "numbers": "a list of numbers",
        }[self.kind]  # fmt: skip
        if self.known:
            return f"one of {', '.join(self.known)}"
        if math.isfinite(self.low):
            words += f" above {self.low:g}" if self.above else f" of at least {self.low:g}"
        if math.isfinite(self.high):
            words += f" and at most {self.high:g}"
        return words + (", or one for each layer" if self.each else "")

    def fits(self, v: Any) -> bool:
        """Whether ``v`` is a value of this kind and range."""
        if self.kind == "text":
            return isinstance(v, str) and (not self.known or v in self.known)
        if self.kind == "flag":
            return isinstance(v, bool)
        if self.kind == "texts":
            return isinstance(v, list) and all(isinstance(x, str) for x in v)
        if self.kind in ("wholes", "numbers"):
            return isinstance(v, np.ndarray) and v.dtype.kind in ("iu" if self.kind == "wholes" else "iuf") and bool(np.isfinite(v).all())
        if isinstance(v, bool) or not isinstance(v, int if self.kind == "whole" else int | float):
            return False
        return math.isfinite(v) and (self.low < v if self.above else self.low <= v) and v <= self.high


def _whole(low: int = 1, default: Any = _REQUIRED, each: bool = False) -> Key:
    return Key("whole", low, (1 << 31) - 1, default, each=each)


def _positive(default: float) -> Key:
    return Key("number", 0, 1e6, default, above=True)


_ID = Key("whole", default=None)  # one outside of the vocabulary counts as none
KEYS: dict[str, Key] = {
    "general.architecture": Key("text"), "general.name": Key("text", default=None), "general.alignment": Key("whole", 1, 1 << 20, 32),
    "block_count": _whole(), "context_length": _whole(), "embedding_length": _whole(), "feed_forward_length": _whole(each=True),
    "attention.head_count": _whole(each=True), "attention.head_count_kv": _whole(default=None, each=True),
    "attention.key_length": _whole(default=None), "attention.value_length": _whole(default=None), "attention.sliding_window": _whole(0, 0),
    "attention.layer_norm_rms_epsilon": Key("number", 0, 1), "expert_count": _whole(0, 0), "expert_used_count": _whole(0, 0),
    "expert_feed_forward_length": _whole(default=None), "rope.dimension_count": _whole(default=None), "rope.freq_base": Key("number", 1, default=10000.0, above=True),
    "rope.scaling.type": Key("text", default="linear", known=("none", "linear", "yarn")), "rope.scaling.factor": Key("number", 0, 1e6, default=None),
    "rope.scale_linear": Key("number", 0, 1e6, default=None), "rope.scaling.original_context_length": _whole(default=None),
    "rope.scaling.yarn_beta_fast": _positive(32.0), "rope.scaling.yarn_beta_slow": _positive(1.0), "rope.scaling.attn_factor": _positive(1.0),
    "tokenizer.ggml.model": Key("text", default=None), "tokenizer.ggml.pre": Key("text", default="default"),
    "tokenizer.ggml.tokens": Key("texts", default=None), "tokenizer.ggml.merges": Key("texts", default=None),
    "tokenizer.ggml.scores": Key("numbers", default=None), "tokenizer.ggml.token_type": Key("wholes", default=None),
    "tokenizer.ggml.add_bos_token": Key("flag", default=None), "tokenizer.ggml.add_space_prefix": Key("flag", default=None),
    "tokenizer.chat_template": Key("text", default=None),
    **{f"tokenizer.ggml.{n}_token_id": _ID for n in ("bos", "eos", "eot", "eom", "unknown", "fim_pad", "fim_rep", "fim_sep")},
}  # fmt: skip


def full_name(metadata: Mapping[str, Any], key: str) -> str:
    """The key as it stands in the file."""
    return key if key.startswith(("general.", "tokenizer.")) else f"{metadata.get('general.architecture')}.{key}"


def read_metadata(path: str, metadata: Mapping[str, Any], key: str) -> Any:
    """The value of a key of the table, its default where the file lacks it; a tuple where there is one for each layer. Raises InvalidModel."""
    rule, name = KEYS[key], full_name(metadata, key)
    if name not in metadata:
        if rule.default is _REQUIRED:
            raise InvalidModel(f"{path} lacks the metadata {name!r}")
        return rule.default
    v = metadata[name]
    if rule.each and isinstance(v, np.ndarray) and v.ndim == 1 and v.size:
        values = v.tolist()
        if all(rule.fits(x) for x in values):
            return tuple(values)
    if not rule.fits(v):
        shown = repr(v) if len(repr(v)) < 80 else repr(v)[:80] + "..."
        raise InvalidModel(f"{path}: the metadata {name!r} is {shown}, expected {rule.expected()}")
    return float(v) if rule.kind == "number" else v
