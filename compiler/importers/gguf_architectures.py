"""What the architectures of GGUF files add to Llama's: one table, read by :mod:`luthier.importers.gguf_llama`.

Biases, norms of queries and keys, experts and shared experts are taken where the file has their tensors; the table says what no tensor does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from luthier.errors import InvalidModel
from luthier.importers.gguf import GGUF

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


def architecture(g: GGUF) -> tuple[str, Architecture]:
    """(name, what it adds). Raises InvalidModel for one that is not known."""
    name = g.get("general.architecture", str)
    if name not in _KNOWN:
        raise InvalidModel(f"{g.path} holds a model of architecture {name!r}, which is not supported", hint="known: " + ", ".join(sorted(_KNOWN)))
    return name, _KNOWN[name]


def check_tensors(g: GGUF) -> None:
    """Raises InvalidModel for a tensor that nothing would read: the model would be another one."""
    for name in g.tensors:
        if name not in _OUTSIDE and not _LAYER.fullmatch(re.sub(r"^blk\.\d+\.", "", name)):
            raise InvalidModel(f"{g.path}: tensor {name!r} belongs to no part of the architecture {g.metadata.get('general.architecture')!r} that is supported")
