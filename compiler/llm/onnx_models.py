"""ONNX decoders as language models: compilation, and how a call learns of the tokens before it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import InputError, InvalidModel, TargetError
from luthier.importers.gguf_tokenizer import END_NAMES

if TYPE_CHECKING:
    from luthier.module import Module

__all__ = ["Fed", "Whole", "compile_onnx", "stepper"]

CAPACITY = 1024  # positions where no configuration beside the model says how many it knows

Array = np.ndarray[Any, Any]


class Fed:
    """A module whose ``present`` outputs are the next call's ``past`` inputs."""

    def __init__(self, module: Module, fed: list[list[Any]]) -> None:
        self.module, self.pairs = module, fed
        self.past: dict[str, Array] = {}
        self.forget()

    def forget(self) -> None:
        """Back to an empty past."""
        specs = {s.name: s for s in self.module.inputs}
        for name, _, axis in self.pairs:
            s = specs[name]
            shape = [0 if k == axis else int(e) for k, e in enumerate(s.shape)]
            self.past[name] = np.zeros(shape, s.dtype)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        out = self.module.run({**inputs, **self.past})
        self.past = {a: out[b] for a, b, _ in self.pairs}
        return out


class Whole:
    """A module without a past: every call computes the whole sequence again."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.tokens = np.zeros(0, np.int64)

    def forget(self) -> None:
        """Back to an empty sequence."""
        self.tokens = np.zeros(0, np.int64)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        new = inputs["tokens"]
        tokens = np.concatenate([self.tokens, new])
        given = {**inputs, "tokens": tokens}
        if "last" in given:
            given["last"] = given["last"] + len(self.tokens)
        logits = self.module.run(given)["logits"]
        self.tokens = tokens
        return {"logits": logits if "last" in given else logits[-len(new) :]}


def _json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises InvalidModel."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InvalidModel(f"cannot read {file}: {e}") from None
    if not isinstance(data, dict):
        raise InvalidModel(f"{file} is no JSON object")
    return data


def read_settings(folder: Path) -> dict[str, Any]:
    """What the files beside an export say: ``context``, ``end``, ``chat``. Raises InvalidModel for a file that is no JSON object."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "genai_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        data = _json(folder / name)
        if name == "genai_config.json":
            data = data.get("model", {})
        found |= {k: v for k, v in data.items() if v is not None}
    context = next((found[k] for k in ("max_position_embeddings", "n_positions", "n_ctx", "context_length") if isinstance(found.get(k), int)), None)
    end = found.get("eos_token_id", [])
    ends = [end] if isinstance(end, int) else [t for t in end if isinstance(t, int)] if isinstance(end, list) else []
    if (folder / "tokenizer.json").is_file():  # marks that end a turn, which configurations often lack
        added = _json(folder / "tokenizer.json").get("added_tokens") or []
        ends += [t["id"] for t in added if isinstance(t, dict) and t.get("content") in END_NAMES and isinstance(t.get("id"), int)]
    return {"context": context, "end": ends, "chat": _chat(folder, found)}


def _chat(folder: Path, found: Mapping[str, Any]) -> dict[str, str] | None:
    """The chat template and the texts of the tokens that it may name."""
    file, template = folder / "chat_template.jinja", found.get("chat_template")
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    elif isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    named = {k: found.get(k) for k in ("bos_token", "eos_token", "unk_token", "pad_token")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {"template": template, **{k: v for k, v in texts.items() if isinstance(v, str)}}


def compile_onnx(
    path: str | Path, target: str = "cpu", threads: int | None = None, capacity: int | None = None, chunk: int = 256, all_logits: bool = False, tune: object = False,
) -> Module:
    """An ONNX decoder as a Module that ``LanguageModel`` runs, with ``tokenizer.json`` and the configuration of the folder it lies in.

    ``capacity``: positions of the caches (default: what config.json says, at most 2048, or 1024); the rest as :func:`luthier.llm.model.compile_model`.
    Raises InvalidModel, InputError, TargetError (a model without caches in place runs on cpu alone) and the importer's errors."""
    from luthier.build_graph import compile_graph
    from luthier.codegen.targets.target import parse_target
    from luthier.importers.onnx.language import decoder_graph

    path = Path(path)
    about = read_settings(path.parent)
    n = capacity or min(about["context"] or CAPACITY, 2048)
    if n < 1 or about["context"] and n > about["context"]:
        raise InputError(f"a capacity of {n} positions is outside of 1 to {about['context']}, the model's context")
    if chunk < 1:
        raise InputError(f"a chunk of {chunk} tokens is too short")
    d = decoder_graph(path, n, all_logits)
    kind = parse_target(target).kind
    if kind != "cpu" and (d.by != "past" or d.given):
        why = f"has the further inputs {', '.join(d.given)}" if d.given else "keeps no cache in place"
        raise TargetError(f"{path.name} {why}, which language models on {kind} cannot have", hint="compile it for cpu, or as an ordinary model with luthier compile")
    parameters = sum(int(v.data.size) for m in d.graph.nodes for v in m.inputs[1:2] if m.op in ("MatMul", "Gemm") and v is not None and v.data is not None)
    state = [v for v in d.graph.inputs if v.name in d.state]
    module = compile_graph(d.graph, target, threads, tune)
    module.manifest["name"] = path.stem
    module.manifest["language"] = {
        "vocabulary": d.vocabulary, "capacity": n, "chunk": min(chunk, n), "all_logits": all_logits, "state": d.state,
        "end": sorted({t for t in about["end"] if 0 <= t < d.vocabulary}), "begin": None, "chat": about["chat"], "by": d.by, "fed": [list(x) for x in d.fed], "given": d.given,
        "parameters": parameters, "picked_bytes": 0, "special": True,
        "cache_bytes": sum(int(v.shape[0].attr * v.shape[1].attr * v.shape[3].attr) * v.dtype.bits // 8 for v in state),
    }  # fmt: skip
    tokenizer = path.parent / "tokenizer.json"
    if tokenizer.is_file():
        data = tokenizer.read_bytes()
        module.files["tokenizer.json"] = lambda: data
    return module


def stepper(module: Module, about: Mapping[str, Any]) -> tuple[Callable[[Mapping[str, Any]], dict[str, Array]], Callable[[], None]]:
    """(a call of the module for new tokens, what forgets the sequence)."""
    by = about.get("by", "pos")
    if by == "present":
        fed = Fed(module, about["fed"])
        return fed, fed.forget
    if by == "whole":
        whole = Whole(module)
        return whole, whole.forget
    return module.keep(about["state"]), lambda: None
