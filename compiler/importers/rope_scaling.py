"""Angles of rotary embeddings as GGUF metadata describes them: plain, linear and YaRN scaling, factors of a tensor (Llama 3).

YaRN: arXiv 2309.00071, section 3 (wave lengths that turn more than ``beta_fast`` times in the original context stay, those below
``beta_slow`` are interpolated, a ramp between), with the attention factor ``0.1 ln(factor) + 1``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from luthier.errors import InvalidModel
from luthier.importers.gguf import GGUF

Array = np.ndarray[Any, Any]


def check_scaling(g: GGUF, arch: str) -> None:
    """Raises InvalidModel for a form of scaling that is not known."""
    kind = g.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise InvalidModel(f"{g.path} uses rope scaling {kind!r}, which is not supported", hint="known: none, linear, yarn, and the factors of the tensor rope_freqs.weight")
    if kind != "none" and not float(g.metadata.get(f"{arch}.rope.scaling.factor", 0)) > 0:
        raise InvalidModel(f"{g.path} uses rope scaling {kind!r} without a positive factor")


def rope_angles(g: GGUF, arch: str, positions: int, head: int, base: float, context: int) -> tuple[Array, float]:
    """(angles f64 [positions, head / 2], factor of cosines and sines)."""
    check_scaling(g, arch)
    half = np.arange(head // 2)
    rates = base ** -(half * 2 / head)
    key = f"{arch}.rope.scaling."
    kind = g.metadata.get(f"{key}type", "none")
    if "rope_freqs.weight" in g.tensors:
        rates = rates / g.tensor("rope_freqs.weight", (head // 2,)).numpy()
    magnitude = 1.0
    if kind != "none":
        factor = float(g.metadata[f"{key}factor"])
        if kind == "linear":
            rates = rates / factor
        else:
            original = float(g.metadata.get(f"{key}original_context_length", context))
            fast, slow = float(g.metadata.get(f"{key}yarn_beta_fast", 32.0)), float(g.metadata.get(f"{key}yarn_beta_slow", 1.0))
            low, high = (head * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow))
            low, high = max(0.0, math.floor(low)), min(head - 1.0, math.ceil(high))
            stay = 1 - np.clip((half - low) / max(0.001, high - low), 0, 1)
            rates = rates / factor * (1 - stay) + rates * stay
            magnitude = float(g.metadata.get(f"{key}attn_factor", 1.0)) * (1 + 0.1 * math.log(factor))
    return np.arange(positions)[:, None] * rates, magnitude
