"""Language models: a GGUF file compiled to one function over a key-value cache, sampling, streamed text.

>>> from luthier import llm
>>> model = llm.load("SmolLM2-135M-Instruct.Q4_1.gguf")                    # doctest: +SKIP
>>> for piece in model.generate("The capital of France is", max_tokens=20):  # doctest: +SKIP
...     print(piece, end="", flush=True)

Text needs the ``tokenizers`` package (``pip install luthier[llm]``); :meth:`LanguageModel.decode_tokens` works on token numbers without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import InputError, InvalidModel

if TYPE_CHECKING:
    from luthier.importers.gguf import GGUF
    from luthier.importers.gguf_llama import LlamaConfig
    from luthier.module import Module

__all__ = ["LanguageModel", "Sampling", "load"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Sampling:
    """``temperature`` 0 picks the most likely token. ``top_k``: only the k most likely (0: all); ``top_p``: only the most likely ones
    that together have this probability. Raises InputError for values out of range."""

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature {self.temperature} must be at least 0")
        if self.top_k < 0:
            raise InputError(f"top_k {self.top_k} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} must be above 0 and at most 1")

    def pick(self, logits: Array, rng: np.random.Generator) -> int:
        """A token by f32 logits [vocabulary]."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        x = logits[order].astype(np.float64) / self.temperature
        p = np.exp(x - x.max())
        p /= p.sum()
        keep = int(np.searchsorted(np.cumsum(p), self.top_p)) + 1
        p = p[:keep] / p[:keep].sum()
        return int(order[rng.choice(keep, p=p) if keep > 1 else 0])


class LanguageModel:
    """A compiled model and one sequence: the cache holds the first ``length`` tokens. ``capacity``: positions of the cache."""

    def __init__(self, module: Module, config: LlamaConfig, capacity: int, file: GGUF, chunk: int) -> None:
        self.module, self.config, self.capacity, self.file, self.chunk = module, config, capacity, file, chunk
        shape = (2, config.kv_heads, capacity, config.head)
        self.caches = [np.zeros(shape, np.float16) for _ in range(config.layers)]
        self.length = 0
        self._tokenizer: Any = None

    # ------------------------------------------------------------ tokens

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the file. Raises LuthierError without the ``tokenizers`` package, InvalidModel for an unknown kind."""
        if self._tokenizer is None:
            from luthier.importers.gguf_tokenizer import make_tokenizer

            self._tokenizer = make_tokenizer(self.file)
        return self._tokenizer

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        return frozenset(int(self.file.metadata[k]) for k in (f"tokenizer.ggml.{n}" for n in keys) if k in self.file.metadata)

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = 0

    def feed(self, tokens: Sequence[int]) -> Array:
        """Append tokens to the sequence, in chunks; the logits f32 [vocabulary] after the last one (every row's, [n, vocabulary], where
        the model was loaded with ``all_logits``). Raises InputError for an empty list, an unknown token or a full cache."""
        ids = np.asarray(tokens, np.int64).reshape(-1)
        if not ids.size:
            raise InputError("no tokens to feed", hint="give at least one")
        if ids.min() < 0 or ids.max() >= self.config.vocabulary:
            bad = int(ids[(ids < 0) | (ids >= self.config.vocabulary)][0])
            raise InputError(f"token {bad} is outside of the vocabulary of {self.config.vocabulary}")
        if self.length + ids.size > self.capacity:
            raise InputError(
                f"the cache holds {self.capacity} positions; {self.length} are used and {ids.size} more were given",
                hint="load the model with a larger capacity, or reset() it",
            )
        parts = []
        every = len(self.module.inputs) == len(self.caches) + 2
        for lo in range(0, ids.size, self.chunk):
            part = ids[lo : lo + self.chunk]
            head = (part, np.array([self.length], np.int64))
            last = () if every else (np.array([part.size - 1], np.int64),)
            (out,) = self.module(*head, *last, *self.caches)
            self.length += part.size
            parts.append(out)
        return np.concatenate(parts) if every else np.asarray(parts[-1][0])

    def decode_tokens(self, prompt: Sequence[int], max_tokens: int = 128, sampling: Sampling | None = None) -> Iterator[int]:
        """Tokens that continue the sequence after ``prompt``, until an end token, ``max_tokens`` or a full cache."""
        how = sampling or Sampling()
        rng = np.random.default_rng(how.seed)
        logits = self.feed(prompt)
        for k in range(max_tokens):
            t = how.pick(logits if logits.ndim == 1 else logits[-1], rng)
            if t in self.end_tokens:
                return
            yield t
            if self.length >= self.capacity or k + 1 == max_tokens:
                return
            logits = self.feed([t])

    def generate(self, prompt: str, max_tokens: int = 128, sampling: Sampling | None = None, chat: bool = False) -> Iterator[str]:
        """Pieces of text as they are decided. ``chat``: the prompt is a user's message in the model's own format. Raises InputError
        when the prompt does not fit the cache."""
        text = self.chat_prompt(prompt) if chat else prompt
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.file.metadata.get("tokenizer.ggml.add_bos_token") and "tokenizer.ggml.bos_token_id" in self.file.metadata:
            ids = [int(self.file.metadata["tokenizer.ggml.bos_token_id"]), *ids]
        yield from self.stream_text(self.decode_tokens(ids, max_tokens, sampling))

    def stream_text(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as tokens arrive; bytes of a character that is not complete yet are held back."""
        seen: list[int] = []
        shown = ""
        for t in tokens:
            seen.append(t)
            text = self.tokenizer.decode(seen, skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        rest = self.tokenizer.decode(seen, skip_special_tokens=True)[len(shown) :]
        if rest:
            yield rest

    def chat_prompt(self, message: str) -> str:
        """A user's message between the marks of the ChatML format. Raises InvalidModel for a model of another format."""
        template = str(self.file.metadata.get("tokenizer.chat_template", ""))
        if "<|im_start|>" not in template:
            raise InvalidModel(f"{self.file.path} has no ChatML template; only that chat format is supported", hint="give the whole prompt instead")
        return f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"


def load(
    path: str | Path, target: str = "cpu", threads: int | None = None, capacity: int | None = None, chunk: int = 256, exact: bool = False,
    all_logits: bool = False,
) -> LanguageModel:
    """Compile a GGUF file of the Llama architecture. ``capacity``: positions of the cache (default: the model's context, at most 2048);
    ``chunk``: prompt tokens of one call; ``exact``: f32 activations instead of 8 bits in groups of 32; ``all_logits``: :meth:`feed`
    gives the logits of every token. Raises InvalidModel, InputError, TargetError."""
    from luthier.importers.builder import compile_graph
    from luthier.importers.gguf import read_gguf
    from luthier.importers.gguf_llama import config, llama_graph

    file = read_gguf(path)
    c = config(file)
    n = capacity or min(c.context, 2048)
    if n < 1 or n > c.context:
        raise InputError(f"a capacity of {n} positions is outside of 1 to {c.context}, the model's context")
    if chunk < 1:
        raise InputError(f"a chunk of {chunk} tokens is too short")
    module = compile_graph(llama_graph(file, n, exact, all_logits), target, threads)
    return LanguageModel(module, c, n, file, min(chunk, n))
