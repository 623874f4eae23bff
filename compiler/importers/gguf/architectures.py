"""What the architectures of GGUF files add to Llama's: one table, read by :mod:`luthier.importers.gguf_llama`.

Biases, norms of queries and keys, experts and shared experts are taken where the file has their tensors; the table says what no tensor does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from luthier.errors import InvalidModel
from luthier.importers.gguf.file import GGUF
from luthier.importers.gguf.metadata import full_name

__all__ = ["Architecture", "architecture", "check_tensors"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """``pairs``: queries and keys rotate neighbouring elements (otherwise halves of a head); ``gelu``: in place of SiLU (tanh form); ``scaled``:
    embeddings times the root of the width; ``joined``: ``attn_qkv`` and ``ffn_up`` hold three and two matrices; ``share``: of an expert, the
    softmax over the ``chosen`` scores or over ``all``."""

    pairs: bool = False
    gelu: bool = False
    scaled: bool = False
    joined: bool = False
    share: str = "chosen"


_KNOWN = {
    "llama": Architecture(pairs=True), "qwen2": Architecture(), "qwen3": Architecture(), "qwen2moe": Architecture(share="all"), "qwen3moe": Architecture(),
    "gemma": Architecture(gelu=True, scaled=True), "phi3": Architecture(joined=True),
}  # fmt: skip

_LAYER = re.compile(
    r"(attn_norm|ffn_norm|attn_q_norm|attn_k_norm|attn_qkv|ffn_gate_inp|ffn_gate_inp_shexp|ffn_(gate|up|down)(_exps|_shexp)?)\.weight"
    r"|attn_(q|k|v|output)\.(weight|bias)"
)
_OUTSIDE = frozenset({"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"})
# parts that other architectures have: a model that has one of them and is computed without it is another model
_MEANT = re.compile(
    r"(attn|ffn|layer|post|pre|output|token_embd|position|rope|ssm|time_mix|channel_mix|cross|enc|dec|exp_probs|altup|laurel|per_layer|inp_gate|proj|hc|indexer|cls|cvec|nextn)"
    r"[a-z0-9_]*(\.[a-z_]+)*\.(weight|bias|scale)|(ssm_[a-z]+)"
)


def architecture(g: GGUF) -> tuple[str, Architecture]:
    """(name, what it adds). Raises InvalidModel for one that is not known."""
    name = g.value("general.architecture")
    if name not in _KNOWN:
        raise InvalidModel(f"{g.path} holds a model of architecture {name!r}, which is not supported", hint="known: " + ", ".join(sorted(_KNOWN)))
    return name, _KNOWN[name]


def check_tensors(g: GGUF, layers: int) -> list[str]:
    """Notes on tensors that nothing reads. Raises InvalidModel for a part of another architecture, without which the model would be another
    one, and where the file has tensors of more or fewer than ``layers`` layers."""
    notes, there = [], set()
    for name in g.tensors:
        layer = re.match(r"blk\.(\d+)\.", name)
        part = name[layer.end() :] if layer else name
        if layer:
            there.add(int(layer[1]))
        if name in _OUTSIDE or (layer and _LAYER.fullmatch(part)):
            continue
        if _MEANT.fullmatch(part):
            raise InvalidModel(f"{g.path}: tensor {name!r} belongs to no part of the architecture {g.value('general.architecture')!r} that is supported")
        notes.append(f"tensor {name!r} is not read: no known architecture has such a part")
    if len(there) != layers or max(there, default=-1) != layers - 1:
        raise InvalidModel(
            f"{g.path}: the metadata {full_name(g.metadata, 'block_count')!r} is {layers}, and there are tensors of {len(there)} layers",
            hint="the file must hold a whole model, not a part of a split one",
        )
    return notes
