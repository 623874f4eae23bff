"""Angles of rotary embeddings as GGUF metadata describes them: plain, linear and YaRN scaling, factors of a tensor (Llama 3).

YaRN: arXiv 2309.00071, section 3 (wave lengths that turn more than ``beta_fast`` times in the original context stay, those below
``beta_slow`` are interpolated, a ramp between), with the attention factor ``0.1 ln(factor) + 1``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from luthier.importers.gguf.file import GGUF

Array = np.ndarray[Any, Any]


def rope_angles(g: GGUF, positions: int, head: int, base: float, context: int) -> tuple[Array, float]:
    """(angles f64 [positions, head / 2], factor of cosines and sines). A factor without a type, and the old key ``rope.scale_linear``, are linear."""
    half = np.arange(head // 2)
    rates = base ** -(half * 2 / head)
    kind, factor = g.value("rope.scaling.type"), g.value("rope.scaling.factor")
    if factor is None:
        factor = g.value("rope.scale_linear")
    if "rope_freqs.weight" in g.tensors:
        rates = rates / g.tensor("rope_freqs.weight", (head // 2,)).numpy()
    magnitude = g.value("rope.scaling.attn_factor")
    if kind != "none" and factor:
        if kind == "linear":
            rates = rates / factor
        else:
            original = float(g.value("rope.scaling.original_context_length") or context)
            low, high = (head * math.log(original / (g.value(f"rope.scaling.yarn_beta_{n}") * 2 * math.pi)) / (2 * math.log(base)) for n in ("fast", "slow"))
            low, high = max(0.0, math.floor(low)), min(head - 1.0, math.ceil(high))
            stay = 1 - np.clip((half - low) / max(0.001, high - low), 0, 1)
            rates = rates / factor * (1 - stay) + rates * stay
            magnitude *= 1 + 0.1 * math.log(factor)
    return np.arange(positions)[:, None] * rates, magnitude
