"""Four bytes in a 32-bit word: how machines without byte registers see the operands of a dot product of bytes.

A dot product of the registry (:class:`luthier.ir.intrin.Instruction`) with groups of four bytes also exists as a pure intrinsic on two
words, without an accumulator (:func:`of_words`); :data:`WORD` puts a word together from its bytes, the first one lowest. Both are
lane-wise. What they mean is stated here in numpy and, for targets that lack them, in plain operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, i32, u32
from luthier.ir.expr import Expr, binary, bitcast, const, var
from luthier.ir.intrin import Instruction, register

WORD = "bytes.word"
WORDS: dict[str, Instruction] = {}  # intrinsic on words -> the instruction that it is


def of_words(i: Instruction) -> str:
    """The intrinsic ``dot(a, b)`` of two words, in the type of the accumulator of ``i``."""
    return f"{i.name}.words"


def word_dot(i: Instruction, a: Expr, b: Expr) -> Expr:
    """What :func:`of_words` means, in plain operations on words: for targets without the instruction."""
    out: Expr | None = None
    for t in range(4):
        p = byte(a, t, i.a) * byte(b, t, i.b)
        out = p if out is None else out + p
    assert out is not None
    return out


def byte(word: Expr, t: int, d: DType) -> Expr:
    """Byte ``t`` of a word, widened to 32 bits as a value of ``d``."""
    if not d.is_signed:
        return binary("shr", word, 8 * t) & 255
    return binary("shr", binary("shl", bitcast(word, i32), const(24 - 8 * t, i32)), const(24, i32))


def word_of_bytes(parts: list[Expr]) -> Expr:
    """What :data:`WORD` means, of parts widened to u32."""
    out = parts[0] & 255
    for t, p in enumerate(parts[1:], 1):
        out = out | binary("shl", p & 255, 8 * t)
    return out


def declare_words(i: Instruction) -> Instruction:
    """Registers the dot product of two words that ``i`` makes."""
    a, b = var("a", u32, None), var("b", u32, None)
    value = word_dot(i, a, b)

    def evaluate(dtype: DType, attr: Any, x: Any, y: Any) -> Any:
        from luthier.ir.interpret.loops import evaluate_expr

        return evaluate_expr(value, {a: x, b: y})

    register(of_words(i), evaluate, f"{i.doc} In two words.", lanewise=True)
    WORDS[of_words(i)] = i
    return i


def _word(dtype: DType, attr: Any, *parts: Any) -> Any:
    out: Any = np.uint32(0)
    for t, p in enumerate(parts):
        out = out | (np.asarray(p).astype(np.uint32) & np.uint32(255)) << np.uint32(8 * t)
    return out


register(WORD, _word, "four bytes as a word, the first one lowest", lanewise=True)
