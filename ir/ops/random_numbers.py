"""Random numbers: RandomNormal(Like), RandomUniform(Like), Bernoulli, Multinomial; Dropout in training mode draws from here too.

The generator is counter-based, so that every element is a function of its position and no order of execution or number of threads
changes it: Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). It needs
only additions, rotations and exclusive ors of 32-bit words, which every target has.

* key: the bits of attribute ``seed`` as f32, and 0; without it the two words of input ``key``, which every call draws anew;
* counter: the element's row-major position (its lower 32 bits), and attribute ``stream``, which numbers the nodes without a seed;
* inside a Loop the number of the round, outermost first, enciphers the key (with a second word that no node has): each round draws
  numbers of its own.

So nodes with equal seeds draw equal numbers, in every call; nodes without one draw others, in every node and call.
After the inputs that ONNX declares come ``key`` (where there is no seed) and one integer a round; the importer adds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute, Fold, Pull, State, axis, max_, pull, sum_
from luthier.ir.dtypes import DType, bf16, f16, f32, f64, i32, index, u32
from luthier.ir.expr import Expr, binary, call, cast, const, load, select, unary
from luthier.ir.graph import Node, TensorType
from luthier.ir.intrin import register
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    Array,
    axes_of,
    define,
    element_type,
    flat_position,
    make,
    must,
    need,
    product,
    shape_error,
    type_error,
    wide,
    widen,
)

SECOND = 1 << 31  # of a counter's second word: another two words for the same element
ROUND = (1 << 32) - 1  # a counter's second word that enciphers the number of a round
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
Words = tuple[Any, Any]

# operators of this file: how many inputs come before the key
DECLARED = {"RandomNormal": 0, "RandomUniform": 0, "RandomNormalLike": 1, "RandomUniformLike": 1, "Bernoulli": 1, "Multinomial": 1, "Dropout": 3}


def threefry(key: Words, counter: Words, word: Callable[[int], Any], rotate: Callable[[Any, int], Any]) -> Words:
    """Two words of 32 bits, on expressions or arrays. ``word``: a constant; ``rotate``: to the left."""
    keys = (key[0], key[1], word(_PARITY) ^ key[0] ^ key[1])
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            a = a + b
            b = rotate(b, r) ^ a
        a = a + keys[(group + 1) % 3]
        b = b + keys[(group + 2) % 3] + word(group + 1)
    return a, b


def encipher_arrays(key: Words, counter: Words) -> Words:
    """Threefry on numpy's arrays of u32."""
    with np.errstate(over="ignore"):
        return threefry(key, counter, np.uint32, lambda x, r: (x << np.uint32(r)) | (x >> np.uint32(32 - r)))


def _evaluate(dtype: DType, attr: tuple[int], *words: Any) -> Any:
    return encipher_arrays(words[:2], words[2:])[attr[0]]  # type: ignore[arg-type]


def _expand(attr: tuple[int], *words: Expr) -> Expr:
    d = max((w.dtype for w in words), key=lambda t: t.lanes)

    def rotate(x: Expr, r: int) -> Expr:
        return binary("shl", x, const(r, d)) | binary("shr", x, const(32 - r, d))

    return threefry(words[:2], words[2:], lambda v: const(v, d), rotate)[attr[0]]  # type: ignore[arg-type, no-any-return]


register("threefry", _evaluate, "a word of Threefry-2x32 of (key, key, counter, counter)", expand=_expand)


def encipher(key: Words, counter: Words) -> Words:
    """Threefry on expressions: an intrinsic until loops are made, a few hundred operators afterwards."""
    return call("threefry", u32, *key, *counter, attr=(0,)), call("threefry", u32, *key, *counter, attr=(1,))


def _word(v: int) -> Expr:
    return const(v, u32)


def seed_words(node: Node) -> tuple[int, int] | None:
    """The key that attribute ``seed`` gives."""
    seed = node.attrs.get("seed")
    return None if seed is None else (int(np.float32(seed).view(np.uint32)), 0)


def stream_of(node: Node) -> int:
    return int(node.attrs.get("stream", 0)) % (SECOND - 1)


class Draws:
    """What one node draws, as expressions. ``first``: how many of its inputs are its operands."""

    def __init__(self, node: Node, ins: Sequence[Buffer | None], first: int) -> None:
        words = seed_words(node)
        rest = list(ins[first:])
        if words is None:
            b = rest.pop(0)
            assert b is not None
            self.key: Words = tuple(load(b, [const(k)]) for k in range(2))  # type: ignore[assignment]
        else:
            self.key = (_word(words[0]), _word(words[1]))
        for r in rest:
            assert r is not None
            t = load(r, [const(0)] * r.rank)
            self.key = encipher(self.key, (cast(t, u32), _word(ROUND)))
        self.stream = stream_of(node)

    def words(self, position: Expr, more: int = 0) -> Words:
        return encipher(self.key, (cast(position, u32), _word(self.stream | more)))

    def uniform(self, position: Expr, d: DType) -> Expr:
        """In [0, 1), a multiple of the type's spacing below 1."""
        x0, x1 = self.words(position)
        if d is f64:
            return (cast(binary("shr", x0, _word(5)), f64) * const(2.0**26, f64) + cast(binary("shr", x1, _word(6)), f64)) * const(2.0**-53, f64)
        bits = _digits(d)
        return cast(cast(binary("shr", x0, _word(32 - bits)), i32), f32) * const(2.0**-bits, f32)

    def normal(self, position: Expr, d: DType) -> Expr:
        """Box and Muller's: sqrt(-2 ln u) cos(2 pi v) with u in (0, 1]."""
        t = f64 if d is f64 else f32
        x0, x1 = self.words(position)
        if d is f64:
            y0, y1 = self.words(position, SECOND)
            u = (cast(x0, f64) * const(2.0**32, f64) + cast(x1, f64) + const(1.0, f64)) * const(2.0**-64, f64)
            v = (cast(y0, f64) * const(2.0**32, f64) + cast(y1, f64)) * const(2.0**-64, f64)
        else:
            u = cast(cast(binary("shr", x0, _word(1)), i32), f32) * const(2.0**-31, f32) + const(2.0**-32, f32)
            v = cast(cast(binary("shr", x1, _word(8)), i32), f32) * const(2.0**-24, f32)
        return unary("sqrt", unary("log", u) * const(-2.0, t)) * unary("cos", v * const(2 * math.pi, t))


def _digits(d: DType) -> int:
    """Binary digits of a uniform number that ``d`` holds exactly."""
    return {f16: 11, bf16: 8}.get(d, 24)


class DrawnArrays:
    """The same numbers as :class:`Draws`, in numpy."""

    def __init__(self, node: Node, arrays: Sequence[Any], first: int) -> None:
        words = seed_words(node)
        rest = [a for a in arrays[first:] if a is not None]
        if words is None:
            words = tuple(int(x) for x in np.asarray(rest.pop(0)).reshape(-1))  # type: ignore[assignment]
        self.key: Words = tuple(np.uint32(w) for w in words)  # type: ignore[assignment, union-attr]
        for r in rest:
            self.key = encipher_arrays(self.key, (np.uint32(int(np.asarray(r).reshape(-1)[0]) & 0xFFFFFFFF), np.uint32(ROUND)))
        self.stream = stream_of(node)

    def words(self, n: int, more: int = 0) -> Words:
        return encipher_arrays(self.key, (np.arange(n, dtype=np.uint32), np.full(n, self.stream | more, np.uint32)))

    def uniform(self, shape: Sequence[int], d: DType) -> Array:
        x0, x1 = self.words(math.prod(shape))
        if d is f64:
            return (((x0 >> np.uint32(5)) * 2.0**26 + (x1 >> np.uint32(6))) * 2.0**-53).reshape(shape)
        bits = _digits(d)
        return ((x0 >> np.uint32(32 - bits)).astype(np.float32) * np.float32(2.0**-bits)).reshape(shape)

    def normal(self, shape: Sequence[int], d: DType) -> Array:
        n = math.prod(shape)
        x0, x1 = self.words(n)
        if d is f64:
            y0, y1 = self.words(n, SECOND)
            u = (x0 * 2.0**32 + x1 + 1.0) * 2.0**-64
            v = (y0 * 2.0**32 + y1) * 2.0**-64
        else:
            u = (x0 >> np.uint32(1)).astype(np.float32).astype(np.float64) * 2.0**-31 + 2.0**-32
            v = (x1 >> np.uint32(8)) * 2.0**-24
        z = np.sqrt(-2 * np.log(u)) * np.cos(2 * math.pi * v)
        return z.astype(np.float64 if d is f64 else np.float32).reshape(shape)


def check_draws(node: Node, first: int) -> None:
    """Raises TypeMismatch or ShapeError unless the key and the numbers of rounds are there and are integers."""
    rest = node.inputs[first:]
    if node.attrs.get("seed") is None:
        key = need(node, first)
        if key.dtype is not u32 or key.type.static_shape != (2,):
            raise type_error(node, "a node without a seed takes a key of two u32")
        rest = rest[1:]
    for v in rest:
        if v is None or not v.dtype.is_int or product(v.shape).op != "const":
            raise type_error(node, "the number of a round is an integer")


def drawn_type(node: Node, default: DType | None) -> DType:
    """Attribute ``dtype``, else ``default``. Raises TypeMismatch for what is no float."""
    d = element_type(node, node.attrs["dtype"]) if "dtype" in node.attrs else default
    if d not in (f16, bf16, f32, f64):
        raise type_error(node, f"random numbers of type {d} are not supported: only f16, bf16, f32 and f64")
    return d


class _Random(Op):
    """Numbers of one distribution. The shape is attribute ``shape``, or that of the operand."""

    kind = "reduction"  # not elementwise: an element's value depends on its position, so no pass may move elements across it

    def infer(self, node: Node) -> Sequence[TensorType]:
        first = DECLARED[node.op]
        check_draws(node, first)
        if first:
            x = need(node, 0)
            return [TensorType(drawn_type(node, x.dtype), x.shape)]
        shape = node.attrs.get("shape")
        if shape is None or any(int(n) < 0 for n in shape):
            raise shape_error(node, f"attribute shape is {'missing' if shape is None else list(shape)}")
        return [TensorType.of(drawn_type(node, f32), [int(n) for n in shape])]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        first = DECLARED[node.op]
        axes = axes_of(outs[0].shape)
        e = self.number(node, Draws(node, ins, first), flat_position(axes), outs[0].dtype)
        return make(node, ins[first:], outs, [define(outs[0], axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        first = DECLARED[node.op]
        d = node.outputs[0].dtype
        shape = np.shape(arrays[0]) if first else tuple(int(n) for n in node.attrs["shape"])
        return [self.array(node, DrawnArrays(node, arrays, first), shape, d).astype(d.numpy)]

    def number(self, node: Node, draws: Draws, position: Expr, d: DType) -> Expr:
        raise NotImplementedError

    def array(self, node: Node, draws: DrawnArrays, shape: Sequence[int], d: DType) -> Array:
        raise NotImplementedError


@op("RandomUniform", "RandomUniformLike")
class RandomUniform(_Random):
    """low + (high - low) u."""

    def bounds(self, node: Node) -> tuple[float, float]:
        return float(node.attrs.get("low", 0.0)), float(node.attrs.get("high", 1.0))

    def number(self, node: Node, draws: Draws, position: Expr, d: DType) -> Expr:
        low, high = self.bounds(node)
        t = wide(d)
        return const(low, t) + const(high - low, t) * draws.uniform(position, d)

    def array(self, node: Node, draws: DrawnArrays, shape: Sequence[int], d: DType) -> Array:
        low, high = self.bounds(node)
        t = wide(d).numpy.type
        return np.asarray(t(low) + t(high - low) * draws.uniform(shape, d))


@op("RandomNormal", "RandomNormalLike")
class RandomNormal(_Random):
    """mean + scale z."""

    def number(self, node: Node, draws: Draws, position: Expr, d: DType) -> Expr:
        t = wide(d)
        return const(float(node.attrs.get("mean", 0.0)), t) + const(float(node.attrs.get("scale", 1.0)), t) * draws.normal(position, d)

    def array(self, node: Node, draws: DrawnArrays, shape: Sequence[int], d: DType) -> Array:
        t = wide(d).numpy.type
        return np.asarray(t(node.attrs.get("mean", 0.0)) + t(node.attrs.get("scale", 1.0)) * draws.normal(shape, d))


@op("Bernoulli")
class Bernoulli(Op):
    """1 with the probability that each element is, in attribute ``dtype`` or the operand's type."""

    kind = "reduction"

    def infer(self, node: Node) -> Sequence[TensorType]:
        check_draws(node, 1)
        x = need(node, 0)
        if not x.dtype.is_float:
            raise type_error(node, "the probabilities must be floats")
        d = element_type(node, node.attrs["dtype"]) if "dtype" in node.attrs else x.dtype
        return [TensorType(d, x.shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x = must(ins, 0)
        axes = axes_of(outs[0].shape)
        p = widen(x[tuple(a.var for a in axes)])
        u = Draws(node, ins, 1).uniform(flat_position(axes), p.dtype)
        return make(node, ins, outs, [define(outs[0], axes, select(u < p, const(1, p.dtype), const(0, p.dtype)))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        t = wide(need(node, 0).dtype)
        return [(DrawnArrays(node, arrays, 1).uniform(x.shape, t) < x.astype(t.numpy)).astype(node.outputs[0].dtype.numpy)]


@op("Multinomial")
class Multinomial(Op):
    """Classes [batch, sample_size] drawn by unnormalised log-probabilities [batch, classes]: the first whose running sum of
    probabilities exceeds u times their sum."""

    kind = "opaque"

    def infer(self, node: Node) -> Sequence[TensorType]:
        check_draws(node, 1)
        x = need(node, 0)
        if x.rank != 2 or not x.dtype.is_float:
            raise shape_error(node, "the operand must be [batch, classes] of floats")
        d = element_type(node, node.attrs.get("dtype", 6))
        if not d.is_int:
            raise type_error(node, f"classes of type {d} are not supported")
        return [TensorType.of(d, (x.shape[0], int(node.attrs.get("sample_size", 1))))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        t = wide(x.dtype)
        b, s = axes_of(out.shape)
        c, j = axis("c", x.shape[1]), axis("j", x.shape[1])
        top = pull(f"{out.name}.top", (b,), max_(j, widen(load(x, [b.var, j.var]))))
        p = unary("exp", widen(load(x, [b.var, c.var])) - load(top.buf, [b.var]))
        sums = Buffer(f"{out.name}.sums", t, (b.extent, c.extent), "global")
        total = Buffer(f"{out.name}.total", t, (b.extent,), "global")
        after = load(total, [b.var]) + p
        run = Fold(f"{out.name}.run", c, (State(total, (b,), const(0, t), after),), (), (Pull(sums, (b, c), after),), False, (b,))
        limit = pull(f"{out.name}.limit", (b, s), Draws(node, ins, 1).uniform(flat_position((b, s)), t) * load(total, [b.var]))
        below = select(load(sums, [b.var, j.var]) <= load(limit.buf, [b.var, s.var]), const(1, index), const(0, index))
        return make(node, ins, outs, [top, run, limit, define(out, (b, s), sum_(j, below))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        t = wide(need(node, 0).dtype)
        x = np.asarray(arrays[0]).astype(t.numpy)
        sums = np.cumsum(np.exp(x - x.max(1, keepdims=True)), 1, dtype=t.numpy)
        shape = (len(x), int(node.attrs.get("sample_size", 1)))
        limit = DrawnArrays(node, arrays, 1).uniform(shape, t) * sums[:, -1:]
        return [(sums[:, None, :] <= limit[:, :, None]).sum(-1).astype(node.outputs[0].dtype.numpy)]


__all__ = ["Bernoulli", "DECLARED", "DrawnArrays", "Draws", "Multinomial", "RandomNormal", "RandomUniform", "check_draws", "encipher_arrays"]
