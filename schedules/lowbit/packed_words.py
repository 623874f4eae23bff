"""A sum of integer products as a sum of dot products of four bytes in a word, where the target has an instruction for that.

Before: ``acc[m, n] = sum over k < K of (i32(x[m, k]) - zx) * (i32(w[k, n]) - zw)``.
After: ``acc[m, n] = sum over q < K / 4 of dot(word(x[m, 4 q], .., x[m, 4 q + 3]), words[q, n])`` in 8-bit signed integers, with
``words`` made of the constant ``w`` when compiling, and ``- zx * sum over k of (w[k, n] - zw)`` in the epilogue, a constant for each
column. A ``u8`` becomes an ``i8`` by flipping its highest bit, which moves its zero point by 128. All of it is exact modulo 2**32.

A word of either factor is one 32-bit element, so every template for sums of products takes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.ir.compute import Pull, axis, reduce_
from luthier.ir.dtypes import i8, i32, u8, u32
from luthier.ir.expr import Expr, binary, call, const, free_vars, is_const, load, load_parts, rewrite, substitute
from luthier.ir.intrin import Instruction
from luthier.ir.loop import Buffer
from luthier.ir.words import WORD, WORDS, of_words
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.schedule import Packing, Schedule, Stage, pull_stage
from luthier.schedules.cpu.contract import factors_of
from luthier.schedules.cpu.contract_integer import Operand, operand
from luthier.schedules.intrin import usable

SHORTEST = 16  # products in a sum that are worth it
FLIP = 0x80808080


@dataclass(frozen=True, slots=True)
class WordPacking(Packing):
    """Bytes less ``zero`` as signed 8-bit integers, four along the merged dimensions ``over`` in a word: ``[words, other dimensions..]``.
    What pads the last word is 0."""

    over: tuple[int, ...] = ()
    zero: int = 0

    def apply(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The words of an array of 8-bit integers."""
        kept = [d for d in range(a.ndim) if d not in self.over]
        b = (a.astype(np.int16) - self.zero).astype(np.int8).transpose(*kept, *self.over).reshape(*(a.shape[d] for d in kept), -1)
        b = np.pad(b, [(0, 0)] * len(kept) + [(0, -b.shape[-1] % 4)])
        return np.ascontiguousarray(np.moveaxis(np.ascontiguousarray(b).view(np.uint32), -1, 0))


@dataclass(frozen=True, slots=True)
class WordSums(Packing):
    """Sums of the same integers over the dimensions ``over``, as i32."""

    over: tuple[int, ...] = ()
    zero: int = 0

    def apply(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """One sum for every element of the dimensions that remain."""
        return np.ascontiguousarray((a.astype(np.int32) - self.zero).sum(axis=self.over, dtype=np.int32))


def pack_words(s: Schedule, acc: str, out: str, caps: Capabilities, constants: Mapping[str, Any]) -> Schedule:
    """``s`` with words in its accumulator ``acc``; ``s`` itself where the target has no such instruction or the pattern is another."""
    found = [i for i in usable(caps) if i.a is i8 and i.b is i8 and of_words(i) in WORDS]
    st = s.stages[acc]
    red = st.reduction
    if not found or red is None or st.buf.dtype is not i32 or len(red.args) > 1:
        return s
    pair = [operand(f) for f in factors_of(st)]
    for x, w in (pair, pair[::-1]):
        if x is not None and w is not None and w.buf.name in constants and x.buf.name not in constants:
            return _rewritten(s, acc, out, x, w, found[0], np.asarray(constants[w.buf.name]))
    return s


def _rewritten(s: Schedule, acc: str, out: str, x: Operand, w: Operand, i: Instruction, values: np.ndarray[Any, Any]) -> Schedule:
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    axes = red.attr[1]
    _, widx, wmask, _ = load_parts(w.ld)
    zero = _constant(w.zero)
    over = [d for a in axes for d, e in enumerate(widx) if e is a.var]
    rest = [e for d, e in enumerate(widx) if d not in over]
    inner = {a.var for a in axes}
    total = const(1)
    for a in axes:
        total = total * a.extent
    fits = zero is not None and values.size and values.ndim == len(widx) and int(values.min()) - zero >= -128 and int(values.max()) - zero <= 127
    plain = len(over) == len(axes) and all(w.ld.attr[0].shape[d] is a.extent for a, d in zip(axes, over, strict=False)) and not any(free_vars(e) & inner for e in rest)
    if not fits or not plain or wmask is not None or total.op != "const" or total.attr < SHORTEST or (x.zero is not None and free_vars(x.zero)):
        return s
    assert zero is not None
    count = -(-int(total.attr) // 4)
    q = axis("q", const(count))
    kept = [d for d in range(len(widx)) if d not in over]
    words = Buffer(f"{w.buf.name}.words", u32, (const(count), *(w.buf.shape[d] for d in kept)), "param", False)
    packed: dict[str, Packing] = {**s.packed, words.name: WordPacking(w.buf.name, (), (), s.compute, words, tuple(over), zero)}
    xs = call(WORD, u32, *(_byte(x, axes, q.var * 4 + t, total) for t in range(4)))
    if x.buf.dtype is u8:
        xs = binary("xor", xs, const(FLIP, u32))
    ws = load(words, (q.var, *(widx[d] for d in kept)))
    ext = {k: v for k, v in s.ext.items() if k.attr[0].rsplit(".", 1)[0] != acc}
    new = pull_stage(Pull(st.buf, st.axes, reduce_("sum", [q], call(of_words(i), i32, xs, ws))), ext)
    stages = {**s.stages, acc: new}
    moved = (const(0, i32) if x.zero is None else x.zero) - const(128 if x.buf.dtype is u8 else 0, i32)
    if not is_const(moved, 0):
        sums = Buffer(f"{w.buf.name}.wordsum", i32, tuple(w.buf.shape[d] for d in kept), "param", False)
        packed[sums.name] = WordSums(w.buf.name, (), (), s.compute, sums, tuple(over), zero)

        def fix(e: Expr) -> Expr | None:
            if e.op == "load" and e.attr[0].name == acc:
                env = {a.var: k for a, k in zip(st.axes, load_parts(e)[1], strict=True)}
                return e - moved * load(sums, [substitute(widx[d], env) for d in kept])
            return None

        ep = stages[out]
        stages[out] = replace(ep, expr=rewrite(ep.expr, fix))
    return replace(s, stages=stages, ext=ext, packed=packed, trace=(*s.trace, ("words", acc, i.name)))


def factors(st: Stage) -> tuple[Expr, Expr]:
    """Of a sum of products, or of dot products of words."""
    assert st.reduction is not None
    e = st.reduction.args[0]
    return (e.args[0], e.args[1]) if e.op == "call" and e.attr[0] in WORDS else factors_of(st)


def _constant(zero: Expr | None) -> int | None:
    while zero is not None and zero.op == "cast":
        zero = zero.args[0]
    return 0 if zero is None else int(zero.attr) if zero.op == "const" else None


def _byte(x: Operand, axes: tuple[Any, ...], k: Expr, total: Expr) -> Expr:
    """The operand at place ``k`` of the merged reduction axes, 0 behind the last."""
    env: dict[Expr, Expr] = {}
    inner = const(1)
    for j, a in reversed(list(enumerate(axes))):
        e = k // inner if not is_const(inner, 1) else k
        env[a.var] = e % a.extent if j else e
        inner = inner * a.extent
    e = substitute(x.ld, env)
    if total.attr % 4 == 0:
        return e
    buf, idx, mask, other = load_parts(e)
    inside = k < total
    return load(buf, idx, inside if mask is None else mask & inside, other)
