"""What ``--precision`` may say."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from luthier.errors import QuantizationError

PRECISIONS = ("f32", "f16", "bf16", "int8", "w8", "w6", "w5", "w4", "w3", "w2", "w1", "ternary", "auto")


@dataclass(frozen=True)
class Precision:
    """``kind``: f32, f16, bf16, int8, weights or auto; ``bits``: of weights, 0 for ternary; ``round``: activations are rounded to 8 bits
    in groups as the products read them (``w4a8``), which is faster."""

    kind: str
    bits: int = 32
    round: bool = False


def parse_precision(text: str) -> Precision:
    """``w4``, ``w4a8``, ``ternary``, ``ternarya8``, ``int8``, ``f16``, ``auto``, ... Raises QuantizationError for anything else."""
    match = re.fullmatch(r"(w[1-68]|ternary|auto)(a8)?", text)
    if match:
        word, rounded = match[1], match[2] is not None
        if word == "auto":
            return Precision("auto", round=rounded)
        return Precision("weights", 0 if word == "ternary" else int(word[1]), rounded)
    if text in ("f32", "f16", "bf16", "int8"):
        return Precision(text)
    near = difflib.get_close_matches(text, PRECISIONS, 1)
    hint = f"choose one of {', '.join(PRECISIONS)}; w4a8 also rounds activations" + (f"; did you mean {near[0]}?" if near else "")
    raise QuantizationError(f"unknown precision {text!r}", hint=hint)
