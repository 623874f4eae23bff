"""Language models: a GGUF file or an ONNX decoder compiled to one function over a key-value cache (machine code or wasm), sampling, streamed text.

>>> from luthier import llm
>>> model = llm.load("SmolLM2-135M-Instruct.Q4_1.gguf")                    # doctest: +SKIP
>>> for piece in model.generate("The capital of France is", max_tokens=20):  # doctest: +SKIP
...     print(piece, end="", flush=True)

Text needs the ``tokenizers`` package (``pip install luthier[llm]``); :meth:`LanguageModel.decode_tokens` works on token numbers without.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import InputError, InvalidModel, KernelError, TargetError
from luthier.llm.chat_template import Message, render_chat
from luthier.llm.onnx_models import stepper

if TYPE_CHECKING:
    from luthier.importers.gguf.file import GGUF
    from luthier.importers.gguf.requantize import Weights
    from luthier.ir.graph import Graph
    from luthier.module import Module

__all__ = ["LanguageModel", "Sampling", "compile_gguf", "compile_model", "load"]

TOKENIZER = "tokenizer.json"

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
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed {self.seed} must be at least 0")

    def pick(self, logits: Array, rng: np.random.Generator) -> int:
        """A token by f32 logits [vocabulary]. Raises KernelError when one of them is no number, or none is finite."""
        best = int(np.argmax(logits))  # NaN counts as the largest
        if not np.isfinite(logits[best]):
            raise KernelError(f"the logit of token {best} is {logits[best]}", hint="the model's weights are damaged, or its numbers leave their range: try exact=True")
        if self.temperature == 0:
            return best
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        x = logits[order].astype(np.float64)
        p = np.exp((x - x.max()) / self.temperature)
        p /= p.sum()
        keep = min(int(np.searchsorted(np.cumsum(p), self.top_p)) + 1, p.size)  # the sum of all need not reach 1
        p = p[:keep] / p[:keep].sum()
        return int(order[rng.choice(keep, p=p) if keep > 1 else 0])


class LanguageModel:
    """A compiled language model and one sequence: the cache holds ``tokens``, ``length`` of at most ``capacity``. ``waiting``: the last token that
    :meth:`decode_tokens` decided, where it was not fed yet (the mark that ended the text, or the last of ``max_tokens``); the next call begins with it.
    ``messages``: of the chat so far.

    ``module``: what :func:`compile_model` made, or the artifact of it; ``about``: its description (``module.manifest["language"]``)."""

    def __init__(self, module: Module) -> None:
        if "language" not in module.manifest:
            raise InvalidModel(f"{module.manifest['name']} is no language model", hint="make one from a GGUF file with luthier compile, or from an ONNX decoder with luthier.llm.model.compile_model")
        self.module = module
        self.about: dict[str, Any] = module.manifest["language"]
        self.capacity, self.chunk, self.vocabulary = (int(self.about[k]) for k in ("capacity", "chunk", "vocabulary"))
        self.step, self._forget = stepper(module, self.about)
        self.given: dict[str, Any] = {}
        self.tokens: list[int] = []
        self.waiting: list[int] = []
        self.messages: list[Message] = []
        self._tokenizer: Any = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.tokens)

    # ------------------------------------------------------------ tokens

    @property
    def tokenizer(self) -> Any:
        """A ``tokenizers.Tokenizer``. Raises LuthierError without that package, InvalidModel where the model came without one."""
        if self._tokenizer is None:
            from luthier.importers.gguf_tokenizer import read_tokenizer

            make = self.module.files.get(TOKENIZER)
            if make is None:
                raise InvalidModel(f"{self.module.manifest['name']} came without a tokenizer", hint="use decode_tokens(), or compile the GGUF file with the package tokenizers installed")
            self._tokenizer = read_tokenizer(make())
        return self._tokenizer

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset(self.about["end"])

    def reset(self, length: int = 0) -> None:
        """Forget the sequence, or all but its first ``length`` tokens (all where the model cannot keep a part). Raises InputError."""
        if not 0 <= length <= self.length:
            raise InputError(f"the sequence has {self.length} tokens, {length} cannot be kept")
        if length < self.length:
            keep = length if self.about.get("by", "pos") in ("pos", "past") else 0
            if not keep:
                self._forget()
            del self.tokens[keep:]
        self.waiting = []
        if not length:
            self.messages = []

    def give(self, **inputs: Any) -> None:
        """Arrays for further inputs of the model (``about["given"]``, such as the states of an encoder), used by every call from now on.
        Raises InputError for other names."""
        bad = sorted(set(inputs) - set(self.about.get("given", ())))
        if bad:
            raise InputError(f"{self.module.manifest['name']} has no further input {bad[0]}", hint=f"it has {', '.join(self.about.get('given', ())) or 'none'}")
        self.given |= inputs

    def feed(self, tokens: Sequence[int]) -> Array:
        """Append tokens to the sequence, in chunks; the logits f32 [vocabulary] after the last one (every row's, [n, vocabulary], where
        the model was loaded with ``all_logits``). Raises InputError for an empty list, an unknown token or a full cache."""
        ids = np.asarray(tokens).reshape(-1)
        if not ids.size:
            raise InputError("no tokens to feed", hint="give at least one")
        if ids.dtype.kind not in "iu":
            raise InputError(f"tokens are whole numbers, not {ids.dtype.name}")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            bad = int(ids[(ids < 0) | (ids >= self.vocabulary)][0])
            raise InputError(f"token {bad} is outside of the vocabulary of {self.vocabulary}")
        if self.length + ids.size > self.capacity:
            raise InputError(
                f"the cache holds {self.capacity} positions; {self.length} are used and {ids.size} more were given",
                hint="load the model with a larger capacity, or reset() it",
            )
        lacking = [n for n in self.about.get("given", ()) if n not in self.given]
        if lacking:
            raise InputError(f"{self.module.manifest['name']} needs the input {lacking[0]}", hint=f"give it with give({lacking[0]}=array)")
        by = self.about.get("by", "pos")
        parts = []
        every = bool(self.about["all_logits"])
        for lo in range(0, ids.size, self.chunk):
            part = ids[lo : lo + self.chunk].astype(np.int64)
            given = {"tokens": part, **self.given}
            if by == "pos":
                given["pos"] = np.array([self.length], np.int64)
            elif by != "whole":
                given["past"] = np.zeros(self.length, np.uint8)  # only its extent counts
            if not every:
                given["last"] = np.array([part.size - 1], np.int64)
            parts.append(self.step(given)["logits"])
            self.tokens += part.tolist()
        self.waiting = []
        return np.concatenate(parts) if every else np.asarray(parts[-1][0])

    def decode_tokens(self, prompt: Sequence[int], max_tokens: int = 128, sampling: Sampling | None = None) -> Iterator[int]:
        """Tokens that continue the sequence after ``prompt``, until an end token, ``max_tokens`` or a full cache. Raises KernelError, naming the
        step, when logits are no numbers."""
        how = sampling or Sampling()
        rng = np.random.default_rng(how.seed)
        logits = self.feed([*self.waiting, *prompt])
        for k in range(max_tokens):
            try:
                t = how.pick(logits if logits.ndim == 1 else logits[-1], rng)
            except KernelError as e:
                raise KernelError(f"step {k} of this call, after {self.length} tokens of the sequence: {e.message}", hint=e.hint) from None
            self.waiting = [t]
            if t in self.end_tokens:
                return
            yield t
            if self.length >= self.capacity or k + 1 == max_tokens:
                return
            logits = self.feed([t])

    def generate(self, prompt: str | Sequence[Message], max_tokens: int = 128, sampling: Sampling | None = None, chat: bool = False) -> Iterator[str]:
        """Pieces of text as they are decided, after a text that continues the sequence, or in a chat: ``chat``: the prompt is what the user says next;
        ``messages``, each with ``role`` and ``content``, are a whole conversation. A chat is the whole sequence, as the model's own template writes it; what the
        cache holds of it already is kept. Raises InputError when the prompt does not fit the cache."""
        if not chat and isinstance(prompt, str):
            ids = self.encode(prompt)
            yield from self.stream_text(self.decode_tokens(ids, max_tokens, sampling), ids)
            return
        messages: list[Message] = [*self.messages, {"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        ids = self._begun(self.tokenizer.encode(self.chat_prompt(messages), add_special_tokens=False).ids)
        same = next((k for k, (a, b) in enumerate(zip(self.tokens, ids)) if a != b), min(self.length, len(ids)))
        self.reset(min(same, len(ids) - 1))  # one at least has to be fed
        answer = ""
        for piece in self.stream_text(self.decode_tokens(ids[self.length :], max_tokens, sampling), ids):
            answer += piece
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with the mark that begins one where the sequence is empty."""
        first = not self.tokens and not self.waiting
        ids = list(self.tokenizer.encode(text, add_special_tokens=first and bool(self.about.get("special", False))).ids)
        return self._begun(ids) if first else ids

    def _begun(self, ids: list[int]) -> list[int]:
        begin = self.about["begin"]
        return ids if begin is None or ids[:1] == [begin] else [begin, *ids]

    def stream_text(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """Text as tokens arrive, after the tokens ``before``; bytes of a character that is not complete yet are held back, and left out where it never is."""

        def text(ids: Sequence[int]) -> str:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

        def more(shown: Sequence[int], held: Sequence[int]) -> str:
            whole = text([*shown, *held])
            return whole[len(os.path.commonprefix([text(shown), whole])) :]

        shown: Sequence[int] = before[-8:]  # a few tokens decide whether a blank stands before the next one
        held: list[int] = []
        for t in tokens:
            held.append(t)
            piece = more(shown, held)
            if piece.endswith("\ufffd") and len(held) < 8:  # so many are no character
                continue
            if piece:
                yield piece
            shown, held = held if not text(shown).endswith("\ufffd") else [*shown, *held], []  # what is shown begins with a whole character
        rest = more(shown, held).rstrip("\ufffd")
        if rest:
            yield rest

    def chat_prompt(self, messages: str | Sequence[Message]) -> str:
        """The messages (or one of the user) as the model's own template writes them, ready for the answer. Raises InvalidModel for a model without one."""
        chat = self.about["chat"]
        if not isinstance(chat, dict):
            raise InvalidModel(f"{self.module.manifest['name']} has no chat template", hint="give the whole prompt instead")
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return render_chat(chat["template"], given, {k: v for k, v in chat.items() if k != "template"})


def compile_model(
    path: str | Path, target: str = "cpu", threads: int | None = None, capacity: int | None = None, chunk: int = 256, exact: bool = False,
    all_logits: bool = False, cache_bits: int = 16, precision: str | None = None, weights: Weights | None = None, tune: object = False,
) -> Module:
    """A GGUF file or an ONNX decoder (:mod:`luthier.importers.onnx.language`) as a Module that :class:`LanguageModel` runs and ``save`` writes.

    ``capacity``: positions of the cache (default: the model's context, at most 2048); ``chunk``: prompt tokens of one call; ``exact``: f32
    activations instead of 8 bits in groups of 16; ``all_logits``: the logits of every token; ``cache_bits``: 16, or 8 (half
    the memory and bandwidth of keys and values). ``precision``: the layers' matrices are quantized anew, ``w8`` to ``w1`` or ``ternary``; ``weights``: or these are
    taken, by tensor name (:func:`luthier.importers.gguf.requantize.requantizer`). ``tune``: as in :func:`luthier.compile`. Raises InvalidModel, InputError, QuantizationError, TargetError."""
    from luthier.codegen.targets.target import parse_target

    if parse_target(target).caps.gpu:
        raise TargetError(f"language models do not run on {target}: their caches are updated in place, which kernels for GPUs cannot do", hint="compile for cpu or wasm")
    if Path(path).suffix == ".onnx":
        if cache_bits != 16 or precision is not None or weights is not None:
            raise InputError("an ONNX export states the types of its weights and caches", hint="leave cache_bits, precision and weights out; luthier quantize changes an export")
        from luthier.llm.onnx_models import compile_onnx

        return compile_onnx(path, target, threads, capacity, chunk, all_logits, tune)
    from luthier.build_graph import compile_graph
    from luthier.importers.gguf.file import read_gguf
    from luthier.importers.gguf.requantize import requantizer
    from luthier.importers.gguf_llama import config, llama_graph
    from luthier.importers.gguf_tokenizer import begin_token, end_tokens, supported, tokenizer_json

    file = read_gguf(path)
    c = config(file)
    n = capacity or min(c.context, 2048)
    if n < 1 or n > c.context:
        raise InputError(f"a capacity of {n} positions is outside of 1 to {c.context}, the model's context")
    if chunk < 1:
        raise InputError(f"a chunk of {chunk} tokens is too short")
    if cache_bits not in (8, 16):
        raise InputError(f"a cache of {cache_bits} bits is not supported", hint="8 or 16")
    graph = llama_graph(file, n, exact, all_logits, cache_bits, requantizer(precision, weights))
    module = compile_graph(graph, target, threads, tune)
    why = supported(file)
    notes = [*c.notes, *([f"the file {why}: the model takes token numbers alone"] if why and file.value("tokenizer.ggml.model") else ())]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    module.manifest["name"] = file.value("general.name") or Path(path).stem
    module.manifest["language"] = {
        "vocabulary": c.vocabulary, "capacity": n, "chunk": min(chunk, n), "all_logits": all_logits,
        "state": [s.name for s in module.inputs if s.name.startswith("cache.")],
        "end": end_tokens(file, c.vocabulary), "begin": begin_token(file, c.vocabulary), **_sizes(graph), "chat": _chat(file), "notes": notes,
    }  # fmt: skip
    if why is None and importlib.util.find_spec("tokenizers"):
        module.files[TOKENIZER] = lambda: tokenizer_json(file)
    return module


def _chat(file: GGUF) -> dict[str, str] | None:
    """The file's chat template and the texts of the tokens that it may name."""
    template, tokens = file.value("tokenizer.chat_template"), file.value("tokenizer.ggml.tokens") or ()
    if template is None:
        return None
    numbers = {name: file.value(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return {"template": template, **{f"{name}_token": tokens[i] if i is not None and 0 <= i < len(tokens) else "" for name, i in numbers.items()}}


def _sizes(graph: Graph) -> dict[str, int]:
    """``parameters`` of matrices that a step reads whole, ``picked_bytes`` of the constants of which it reads rows, ``cache_bytes`` of a position."""
    constants = {v.name: v for n in graph.nodes for v in n.inputs if v is not None and v.data is not None}
    picked = sum(v.data.nbytes for name, v in constants.items() if v.data is not None and name.split(".")[0] in ("embedding", "cos", "sin"))
    products = [n for n in graph.nodes if n.op in ("luthier::GroupedMatMul", "MatMul")]
    parameters = 0
    for n in products:
        w = n.inputs[1]
        assert w is not None and w.data is not None
        parameters += int(n.attrs["K"]) * len(w.data) if "K" in n.attrs else int(w.data.size)
    for n in (n for n in graph.nodes if n.op == "luthier::ExpertMatMul"):  # of the chosen experts
        _, rows, groups = (int(x.attr) for x in n.inputs[3].shape)  # type: ignore[union-attr]
        parameters += int(n.inputs[1].shape[1].attr) * rows * groups * int(n.attrs["group"])  # type: ignore[union-attr]
    for n in (n for n in graph.nodes if n.op == "luthier::ExpertProduct"):
        _, rows, columns = (int(x.attr) for x in n.inputs[2].shape)  # type: ignore[union-attr]
        parameters += int(n.inputs[1].shape[1].attr) * rows * columns  # type: ignore[union-attr]
    for n in (n for n in graph.nodes if n.op == "luthier::SparseMatMul"):  # of the kept blocks
        parameters += int(n.attrs["block"]) * int(n.inputs[2].shape[0].attr)  # type: ignore[union-attr]
    state = [v for v in graph.inputs if v.name.startswith("cache.")]
    sizes = [[int(e.attr) for e in v.shape] for v in state]
    cache = sum(int(np.prod(x)) // x[2] * v.dtype.bits // 8 for x, v in zip(sizes, state, strict=True))
    return {"parameters": parameters, "picked_bytes": picked, "cache_bytes": cache}


def compile_gguf(path: Any, target: str, shapes: Any, threads: int | None, debug: str | None, tune: object = False) -> Module:
    """What ``luthier.compile`` does for a GGUF file (and ``luthier compile --language`` for an ONNX decoder): :func:`compile_model` with the extents that ``shapes`` may pin: ``cache`` (positions)
    and ``tokens`` (of one call). Raises its errors, InputError for other names."""
    given = {k: tuple(v) for k, v in (shapes or {}).items()}
    bad = [k for k, v in given.items() if k not in ("cache", "tokens") or len(v) != 1 or not isinstance(v[0], int)]
    if bad:
        raise InputError(f"a language model has no shape {bad[0]} to pin", hint="cache=POSITIONS and tokens=N (of one call) may be given")
    if debug:
        raise InputError("language models have no bounds checks", hint="leave debug out")
    more = {name: given[k][0] for k, name in (("cache", "capacity"), ("tokens", "chunk")) if k in given}
    return compile_model(path, target, threads, **more, tune=tune)


def load(
    path: str | Path, target: str = "cpu", threads: int | None = None, capacity: int | None = None, chunk: int = 256, exact: bool = False,
    all_logits: bool = False, cache_bits: int = 16, precision: str | None = None, weights: Weights | None = None, tune: object = False,
) -> LanguageModel:
    """A GGUF file or an ONNX decoder compiled by :func:`compile_model`, whose arguments these are, or the folder of one that was saved. Raises its errors,
    ArtifactError."""
    if Path(path).is_dir():
        from luthier.artifact import load as load_artifact

        if precision is not None or weights is not None:
            raise InputError(f"{path} is compiled already; its weights stay as they are", hint="give the GGUF file")

        return LanguageModel(load_artifact(Path(path), threads))
    return LanguageModel(compile_model(path, target, threads, capacity, chunk, exact, all_logits, cache_bits, precision, weights, tune))
