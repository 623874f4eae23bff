"""Sequences and optionals of ONNX as tensors: no value of the graph is anything else.

Where the structure is known, a sequence is a list of values (:class:`Elements`): inserting, erasing and indexing happen at import. Where
only a run knows it, it is two tensors (:class:`Packed`): the elements one behind the other, flat, and a row of ``MAX_RANK`` extents for
each of them, -1 behind the last; so it may be an input, an output, what a Loop carries and what an If chooses. An optional
(:class:`Maybe`) is a condition beside what it may hold.

Before: ``s = SplitToSequence(x, 3); y = SequenceAt(s, 1)``. After: ``y = Slice(x, 3, 6)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from luthier.importers.onnx.tensors import ELEMENT, element_type
from luthier.ir.dtypes import DType, boolean, f32, i64
from luthier.ir.errors import InvalidModel, ShapeError, TypeMismatch, UnsupportedOperator
from luthier.ir.expr import Expr, as_expr, is_const
from luthier.ir.graph import Node, TensorType, Value, content_or_symbols
from luthier.ir.ops.control_flow import condition
from luthier.ir.requirements import assume_equal

MAX_RANK = 8
_CODES = {d: code for code, d in ELEMENT.items()}
Dims = tuple["int | None", ...]
MIXED: Dims = (-1,)  # elements of several ranks, or of one that is not known
NOTHING: Dims = (-2,)  # no element yet: any dims fit


@dataclass(frozen=True, slots=True)
class Elements:
    """A sequence whose elements are known."""

    dtype: DType
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """A sequence as two tensors. ``dims``: extents that all elements have, None where they differ, MIXED or NOTHING."""

    dtype: DType
    data: Value
    shapes: Value
    dims: Dims


@dataclass(frozen=True, slots=True)
class Maybe:
    """An optional: ``value`` where ``has`` is true. ``tensor``: it holds a tensor, which is packed as the only element of a sequence
    where it is no Value; None stands for what is absent for certain."""

    dtype: DType
    has: Value
    value: Value | Elements | Packed | None
    tensor: bool


Structure = Elements | Packed | Maybe
Any_ = Value | Elements | Packed | Maybe


@dataclass(frozen=True, slots=True)
class Form:
    """What a structure is in every round of a Loop, in both branches of an If, in every run. ``tensor`` without ``optional``: a tensor
    whose rank only the run knows."""

    dtype: DType
    dims: Dims
    optional: bool
    tensor: bool

    def types(self, name: str, symbol: Callable[[str], Expr]) -> list[tuple[str, TensorType]]:
        """Names and types of the tensors that hold it."""
        has = [(f"{name}.has", TensorType(boolean, ()))] if self.optional else []
        shapes = TensorType(i64, (as_expr(1) if self.tensor and not self.optional else symbol(f"{name}.count"), as_expr(MAX_RANK)))
        return [(name, TensorType(self.dtype, (symbol(f"{name}.elements"),))), (f"{name}.shapes", shapes), *has]

    def build(self, values: Sequence[Value]) -> Structure:
        packed = Packed(self.dtype, values[0], values[1], self.dims)
        return Maybe(self.dtype, values[2], packed, self.tensor) if self.optional else packed

    def join(self, o: Form, what: str) -> Form:
        """What is both. Raises TypeMismatch."""
        if self.dtype is not o.dtype or self.tensor is not o.tensor:
            raise TypeMismatch(f"{what} is {self} here and {o} there", hint="make it a sequence, or a tensor, of one element type everywhere")
        return Form(self.dtype, join_dims(self.dims, o.dims), self.optional or o.optional, self.tensor)

    def __str__(self) -> str:
        return f"{'an optional ' if self.optional else 'a '}{'tensor' if self.tensor else 'sequence'} of {self.dtype}"


def join_dims(a: Dims, b: Dims) -> Dims:
    if a == NOTHING or b == NOTHING:
        return b if a == NOTHING else a
    if a == MIXED or b == MIXED or len(a) != len(b):
        return MIXED
    return tuple(x if x == y else None for x, y in zip(a, b, strict=True))


def dims_of(v: Value) -> Dims:
    return tuple(s.attr if s.op == "const" else None for s in v.shape)


def form_of(v: Any_) -> Form:
    if isinstance(v, Value):
        return Form(v.dtype, dims_of(v), False, True)
    if isinstance(v, Maybe):
        inner = NOTHING if v.value is None else form_of(v.value).dims
        return Form(v.dtype, inner, True, v.tensor)
    if isinstance(v, Packed):
        return Form(v.dtype, v.dims, False, False)
    dims = NOTHING
    for x in v.items:
        dims = join_dims(dims, dims_of(x))
    return Form(v.dtype, dims, False, False)


def declared(t: onnx.TypeProto, what: str) -> Form | None:
    """The form that a declaration says, None for a tensor. Raises UnsupportedOperator."""
    kind = t.WhichOneof("value")
    if kind == "tensor_type":
        return None
    optional = kind == "optional_type"
    if optional:
        t = t.optional_type.elem_type
    tensor = t.WhichOneof("value") == "tensor_type"
    if t.WhichOneof("value") == "sequence_type":
        t = t.sequence_type.elem_type
    if t.WhichOneof("value") != "tensor_type":
        raise UnsupportedOperator(f"{what} is a {kind or 'value without a type'}; tensors, sequences of tensors and optionals of both are supported")
    dtype = element_type(t.tensor_type.elem_type, what)
    if dtype.kind == "s":
        raise UnsupportedOperator(f"{what} holds strings; no target computes with them", hint="tokenise before the model")
    dims = t.tensor_type.shape.dim
    extents = tuple(d.dim_value if d.HasField("dim_value") and tensor else None for d in dims)
    known = tensor and t.tensor_type.HasField("shape") or len(extents) > 0  # sequences without extents are often declared as of scalars
    return Form(dtype, extents if known else MIXED, optional, tensor)


def type_text(v: Any_, tensor: str) -> str:
    """The type of ``v`` as the standard writes it; ``tensor``: that of its elements. What always holds a tensor passes for one."""
    if isinstance(v, Value):
        return tensor
    if not isinstance(v, Maybe):
        return f"seq({tensor})"
    inner = tensor if v.tensor else f"seq({tensor})"
    return inner if v.has.data is not None and bool(v.has.data) and v.tensor else f"optional({inner})"


def name_of(v: Any_) -> str:
    return v.name if isinstance(v, Value) else str(form_of(v))


def type_proto(v: Any_ | None) -> onnx.TypeProto:
    """The type of a value, as the standard's context-dependent functions want it."""
    t = onnx.TypeProto()
    if isinstance(v, Value):
        _tensor_type(t, v.dtype, v.shape)
    elif v is not None:
        at = t.optional_type.elem_type if isinstance(v, Maybe) else t
        _tensor_type(at if isinstance(v, Maybe) and v.tensor else at.sequence_type.elem_type, v.dtype, None)
    return t


def _tensor_type(t: onnx.TypeProto, dtype: DType, shape: Sequence[Expr] | None) -> None:
    t.tensor_type.elem_type = _CODES[dtype]
    if shape is None:
        return
    t.tensor_type.shape.SetInParent()
    for s in shape:
        d = t.tensor_type.shape.dim.add()
        if s.op == "const":
            d.dim_value = s.attr
        else:
            d.dim_param = repr(s)


class Steps:
    """Adds the tensor operators that sequence operators are made of. ``emit(op, inputs, attrs)`` adds a node and gives its outputs."""

    def __init__(self, emit: Callable[..., tuple[Value, ...]], constant: Callable[[Any], Value]) -> None:
        self.emit, self.constant = emit, constant
        self.checks: list[tuple[Value, str]] = []

    def op(self, op: str, *inputs: Value | None, **attrs: Any) -> Value:
        return self.emit(op, list(inputs), attrs)[0]

    def ints(self, *xs: int) -> Value:
        return self.constant(np.array(xs, np.int64))

    def flat(self, x: Value) -> Value:
        return self.op("Reshape", x, self.ints(-1))

    def concat(self, xs: Sequence[Value], axis: int = 0) -> Value:
        return xs[0] if len(xs) == 1 else self.op("Concat", *xs, axis=axis)

    def cut(self, x: Value, start: Value, end: Value, axis: int = 0) -> Value:
        return self.op("Slice", x, start, end, self.ints(axis))

    def count(self, p: Packed) -> Value:
        """How many elements, i64[1]."""
        return self.op("Shape", p.shapes, start=0, end=1)

    def row(self, x: Value) -> Value:
        """The extents of a tensor as a sequence keeps them, i64[1, 8]. Raises ShapeError."""
        if x.rank > MAX_RANK:
            raise ShapeError(f"an element of a sequence has rank {x.rank}, at most {MAX_RANK} are supported", shapes={x.name: x.shape})
        rest = self.ints(*[-1] * (MAX_RANK - x.rank))
        own = self.op("Shape", x)
        return self.op("Reshape", self.concat([own, rest]) if rest.data is not None and rest.data.size else own, self.ints(1, MAX_RANK))

    def pack(self, v: Value | Elements | Packed) -> Packed:
        if isinstance(v, Packed):
            return v
        items = (v,) if isinstance(v, Value) else v.items
        if not items:
            empty = self.constant(np.zeros(0, v.dtype.numpy))
            return Packed(v.dtype, empty, self.constant(np.zeros((0, MAX_RANK), np.int64)), NOTHING)
        return Packed(v.dtype, self.concat([self.flat(x) for x in items]), self.concat([self.row(x) for x in items]), form_of(v).dims)

    def flatten(self, v: Any_, form: Form) -> list[Value]:
        """The tensors that hold ``v`` as ``form`` names them."""
        has = v.has if isinstance(v, Maybe) else self.constant(np.array(True))
        inner = v.value if isinstance(v, Maybe) else v
        p = self.pack(Elements(v.dtype, ()) if inner is None else inner)
        if not form.optional and has.data is None:
            self.require(has, "the optional holds an element")
            p = Packed(p.dtype, self._behind(p.data), p.shapes, p.dims)
        return [p.data, p.shapes, *([has] if form.optional else [])]

    # ---------------------------------------------------------------- what a run finds out

    def sizes(self, p: Packed) -> Value:
        """How many numbers each element has."""
        zero, one = self.ints(0), self.ints(1)
        return self.op("ReduceProd", self.op("Where", self.op("Less", p.shapes, zero), one, p.shapes), one, keepdims=0)

    def number(self, v: Value) -> Value:
        v = self.op("Reshape", v, self.ints(1))
        return v if v.dtype is i64 else self.op("Cast", v, to=_CODES[i64])

    def position(self, p: Packed, at: Value, what: str, last: int = 0) -> Value:
        """The position that ``at`` says, i64[1]: below 0 from the end, at most ``last`` behind the last element, checked by the run."""
        at, n = self.number(at), self.count(p)
        k = self.op("Where", self.op("Less", at, self.ints(0)), self.op("Add", at, n), at)
        fits = self.op("And", self.op("Less", self.ints(-1), k), self.op("Less", k, self.op("Add", n, self.ints(last))))
        self.require(fits, f"{what} is in range")
        return self._behind(k)

    def require(self, fits: Value, what: str) -> None:
        """The run goes on only where ``fits`` is true. Raises ShapeError where it is known to be false."""
        if is_const(condition(fits), 0):
            raise ShapeError(f"it does not hold that {what}")
        if not is_const(condition(fits), 1):
            self.checks.append((fits, what))

    def checked(self, v: Any_) -> Any_:
        """``v`` behind what :meth:`require` was told since the last time."""
        if isinstance(v, Packed):
            return Packed(v.dtype, self._behind(v.data), v.shapes, v.dims)
        return self._behind(v) if isinstance(v, Value) else v

    def _behind(self, v: Value) -> Value:
        for fits, what in self.checks:
            v = self.op("luthier::Require", v, got=condition(fits), want=as_expr(1), what=f"whether {what}")
        self.checks.clear()
        return v

    def known(self, v: Value) -> Value:
        """``v``, whose elements are from now on symbols that extents may be made of."""
        content_or_symbols(Node("Shape", (v,), ()), 0)
        return v

    def window(self, x: Value, start: Value, extents: Value) -> Value:
        """Numbers of a flat tensor from ``start`` on, in these extents."""
        return self.op("luthier::Window", x, self.known(start), self.known(extents))

    def starts(self, p: Packed) -> Value:
        """Where each element starts among the numbers, and where the last one ends."""
        return self.concat([self.ints(0), self.op("CumSum", self.sizes(p), self.ints(0))])

    def at(self, p: Packed, k: Value, what: str) -> Value:
        """Element ``k`` (i64[1], in range). Raises ShapeError where its rank is not known."""
        if p.dims in (MIXED, NOTHING):
            raise ShapeError(
                f"the rank of {what} is not known when compiling", hint="declare the shape of the elements; the branches of an If must give one rank to what is computed with"
            )
        row = self.extents(p, k, len(p.dims))
        parts = []
        for axis, d in enumerate(p.dims):
            e = self.cut(row, self.ints(axis), self.ints(axis + 1))
            if d is not None:
                self.require(self.op("Equal", e, self.ints(d)), f"axis {axis} of {what} is {d}")
                e = self.ints(d)
            parts.append(e)
        return self.window(p.data, self.op("Gather", self.starts(p), k), self.concat(parts) if any(d is not None for d in p.dims) else row)

    def extents(self, p: Packed, k: Value, rank: int) -> Value:
        """The first ``rank`` extents of element ``k``."""
        return self.window(self.flat(p.shapes), self.op("Mul", self.known(k), self.ints(MAX_RANK)), self.ints(rank))

    def element(self, m: Maybe) -> Value | Elements | Packed:
        """What an optional holds; the run fails where it holds nothing. Raises InvalidModel."""
        if m.value is None or m.has.data is not None and not m.has.data:
            raise InvalidModel("the element of an optional that is empty", hint="ask OptionalHasElement before")
        value = m.value
        if m.has.data is None:
            self.require(m.has, "the optional holds an element")
            if isinstance(value, Packed):
                value = Packed(value.dtype, value.data, self._behind(value.shapes), value.dims)
        if m.tensor and isinstance(value, Packed):
            return self.at(value, self.ints(0), "the optional's element")
        return value

    def insert(self, p: Packed, x: Value, at: Value | None) -> Packed:
        dims = join_dims(p.dims, dims_of(x))
        if at is None:
            return Packed(p.dtype, self.concat([p.data, self.flat(x)]), self.concat([p.shapes, self.row(x)]), dims)
        k = self.position(p, at, "the position of SequenceInsert", 1)
        return self.spliced(p, k, k, self.flat(x), self.row(x), dims)

    def erase(self, p: Packed, at: Value | None) -> Packed:
        k = self.position(p, self.ints(-1) if at is None else at, "the position of SequenceErase")
        return self.spliced(p, k, self.op("Add", k, self.ints(1)), None, None, p.dims)

    def spliced(self, p: Packed, k: Value, then: Value, data: Value | None, row: Value | None, dims: Dims) -> Packed:
        """Elements before ``k``, one that is given, those from ``then``."""
        starts, width = self.starts(p), self.ints(MAX_RANK)
        cut = self.known(self.op("Gather", starts, self.known(k)))
        rest = cut if then is k else self.known(self.op("Gather", starts, then))
        head = self.window(p.data, self.ints(0), cut)
        tail = self.window(p.data, rest, self.op("Sub", self.op("Shape", p.data), rest))
        rows = self.flat(p.shapes)
        first = self.window(rows, self.ints(0), self.concat([k, width]))
        last = self.window(rows, self.op("Mul", then, width), self.concat([self.op("Sub", self.count(p), then), width]))
        parts = [self.concat([a, *([] if m is None else [m]), b]) for a, m, b in ((head, data, tail), (first, row, last))]
        return Packed(p.dtype, parts[0], parts[1], dims)

    def joined(self, p: Packed, axis: int, new_axis: bool) -> Value:
        """All elements along one axis. Every number knows its element and its place in it, so one Gather does it.

        Raises ShapeError where their rank is not known."""
        if p.dims in (MIXED, NOTHING):
            raise ShapeError("the rank of the elements of the sequence is not known when compiling", hint="declare the sequence with the shape of its elements")
        rank = len(p.dims)
        axis = axis + rank + new_axis if axis < 0 else axis
        if not 0 <= axis < rank + new_axis:
            raise ShapeError(f"axis {axis} of ConcatFromSequence for elements of rank {rank}")
        first = self.extents(p, self.ints(0), MAX_RANK)
        columns = self.op("Slice", p.shapes, self.ints(0), self.ints(rank), self.ints(1))
        same = self.op("Equal", columns, self.op("Slice", first, self.ints(0), self.ints(rank)))
        if not new_axis:
            same = self.op("Or", same, self.constant(np.arange(rank) == axis))
        self.require(self.op("Cast", self.op("ReduceMin", self.op("Cast", same, to=_CODES[i64]), keepdims=0), to=_CODES[boolean]), "the elements' extents agree")
        n = self.count(p)
        before = [self.ints(1), *(self.cut(first, self.ints(k), self.ints(k + 1)) for k in range(axis))]
        after = [self.cut(first, self.ints(k), self.ints(k + 1)) for k in range(axis if new_axis else axis + 1, rank)]
        along = self.op("Expand", self.ints(1), n) if new_axis else self.flat(self.cut(p.shapes, self.ints(axis), self.ints(axis + 1), 1))
        if axis == 0:
            return self.window(p.data, self.ints(0), self.concat([self.op("ReduceSum", along, self.ints(0), keepdims=1), *after]))
        outer = self.op("ReduceProd", self.concat(before), self.ints(0), keepdims=1)
        inner = self.op("ReduceProd", self.concat([self.ints(1), *after]), self.ints(0), keepdims=1)
        sizes = self.sizes(p)
        ends = self.op("CumSum", along, self.ints(0))
        starts = self.op("Sub", self.op("CumSum", sizes, self.ints(0)), sizes)
        total = self.op("ReduceSum", along, self.ints(0), keepdims=1)
        j = self.range(total)
        owner = self.op("ReduceSum", self.op("Cast", self.op("LessOrEqual", self.op("Unsqueeze", ends, self.ints(0)), self.op("Unsqueeze", j, self.ints(1))), to=_CODES[i64]), self.ints(1), keepdims=0)
        width = self.op("Gather", along, owner)
        place = self.op("Sub", j, self.op("Sub", self.op("Gather", ends, owner), width))
        o = self.op("Unsqueeze", self.range(outer), self.ints(1))
        rows = self.op("Add", self.op("Gather", starts, owner), self.op("Mul", self.op("Add", self.op("Mul", o, width), place), inner))
        index = self.op("Add", self.op("Unsqueeze", rows, self.ints(2)), self.range(inner))
        shape = self.concat([*before[1:], total, *after])
        return self.window(self.op("Gather", p.data, self.flat(index)), self.ints(0), shape)

    def range(self, n: Value) -> Value:
        zero, one = self.constant(np.array(0, np.int64)), self.constant(np.array(1, np.int64))
        return self.op("Range", zero, self.op("Reshape", n, self.ints()), one)

    def split(self, x: Value, parts: Value | None, axis: int, keepdims: bool) -> Elements | Packed:
        """Raises ShapeError."""
        if not -x.rank <= axis < x.rank:
            raise ShapeError(f"axis {axis} of SplitToSequence for a tensor of rank {x.rank}", shapes={x.name: x.shape})
        axis %= x.rank
        extent = x.shape[axis]
        chunk = 1 if parts is None else None
        if parts is not None and parts.rank == 0 and parts.data is not None:
            chunk = int(parts.data)
            if chunk <= 0:
                raise ShapeError(f"SplitToSequence in parts of {chunk}")
        if parts is not None and parts.rank == 1 and parts.shape[0].op == "const":
            sizes = [self.cut(parts, self.ints(k), self.ints(k + 1)) for k in range(parts.shape[0].attr)]
            total = as_expr(0)
            for k in range(len(sizes)):
                total = total + _content(parts)[k]
            if total.op == extent.op == "const" and total is not extent:
                raise ShapeError(f"the parts of SplitToSequence are {total!r} in sum, axis {axis} has {extent!r}", shapes={x.name: x.shape})
            assume_equal(total, extent, "the sum of the parts of SplitToSequence")
            at, items = self.ints(0), []
            for s in sizes:
                end = self.op("Add", at, s)
                items.append(self.cut(x, at, end, axis))
                at = end
            return Elements(x.dtype, tuple(items))
        if chunk is not None and extent.op == "const" and -(-extent.attr // chunk) <= 256:
            spans = [(k, min(k + chunk, extent.attr)) for k in range(0, extent.attr, chunk)]
            items = [self.cut(x, self.ints(a), self.ints(b), axis) for a, b in spans]
            if parts is None and not keepdims:
                items = [self.op("Squeeze", v, self.ints(axis)) for v in items]
            return Elements(x.dtype, tuple(items))
        if parts is not None and parts.rank != 0:
            raise ShapeError("the number of parts of SplitToSequence is not known when compiling", shapes={parts.name: parts.shape}, hint="give them as a constant")
        return self.chunks(x, self.ints(1) if parts is None else self.number(parts), axis, keepdims or parts is not None)

    def chunks(self, x: Value, size: Value, axis: int, keepdims: bool) -> Packed:
        """Parts of ``size`` (i64[1]) along ``axis``, the last one shorter."""
        self.require(self.op("Less", self.ints(0), size), "the size of the parts of SplitToSequence is above 0")
        size = self._behind(size)
        shape = self.op("Shape", x)
        extent = self.op("Shape", x, start=axis, end=axis + 1)
        n = self.op("Div", self.op("Sub", self.op("Add", extent, size), self.ints(1)), size)
        at = self.op("Mul", self.range(n), size)
        widths = self.op("Min", size, self.op("Sub", extent, at))
        columns = [self.op("Expand", self.op("Reshape", self.op("Shape", x, start=k, end=k + 1), self.ints(1, 1)), self.concat([n, self.ints(1)])) for k in range(x.rank)]
        columns[axis] = self.op("Unsqueeze", widths, self.ints(1))
        if not keepdims:
            del columns[axis]
        pad = MAX_RANK - len(columns)
        columns += [self.op("Expand", self.constant(np.full((1, pad), -1, np.int64)), self.concat([n, self.ints(pad)]))] * bool(pad)
        dims = tuple(None if k == axis else s.attr if s.op == "const" else None for k, s in enumerate(x.shape) if k != axis or keepdims)
        shapes = self.concat(columns, 1)
        if axis == 0:
            return Packed(x.dtype, self.flat(x), shapes, dims)
        outer = self.op("ReduceProd", self.cut(shape, self.ints(0), self.ints(axis)), self.ints(0), keepdims=1)
        inner = self.op("ReduceProd", self.concat([self.ints(1), self.op("Shape", x, start=axis + 1)]), self.ints(0), keepdims=1)
        j = self.range(extent)
        part = self.op("Div", j, size)
        width = self.op("Gather", widths, part)
        first = self.op("Mul", part, size)
        o = self.op("Unsqueeze", self.range(outer), self.ints(1))
        rows = self.op("Add", self.op("Mul", first, outer), self.op("Add", self.op("Mul", o, width), self.op("Sub", j, first)))
        index = self.op("Add", self.op("Unsqueeze", self.op("Mul", rows, inner), self.ints(2)), self.range(inner))
        data = self.flat(x)
        return Packed(x.dtype, self.op("ScatterElements", data, self.flat(index), data, axis=0), shapes, dims)


def _content(v: Value) -> tuple[Expr, ...]:
    return content_or_symbols(Node("SplitToSequence", (v,), ()), 0)


# ---------------------------------------------------------------- the operators


def _sequence(v: Any_ | None, op: str) -> Elements | Packed:
    if not isinstance(v, (Elements, Packed)):
        raise TypeMismatch(f"{op} takes a sequence, the model gives it {'nothing' if v is None else form_of(v)}")
    return v


def _tensor(v: Any_ | None, op: str) -> Value:
    if not isinstance(v, Value):
        raise TypeMismatch(f"{op} takes a tensor here, the model gives it {'nothing' if v is None else form_of(v)}")
    return v


def _fixed(at: Any_ | None) -> int | None:
    """A position that is a constant."""
    return int(at.data.reshape(-1)[0]) if isinstance(at, Value) and at.data is not None and at.data.size == 1 else None


def _place(k: int, n: int, op: str) -> int:
    if not -n <= k < n:
        raise ShapeError(f"position {k} of {op} for a sequence of length {n}")
    return k % n


def _get(inputs: Sequence[Any_ | None], i: int) -> Any_ | None:
    return inputs[i] if i < len(inputs) else None


def _construct(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    items = tuple(_tensor(v, "SequenceConstruct") for v in inputs)
    if not items or any(v.dtype is not items[0].dtype for v in items):
        raise TypeMismatch(f"SequenceConstruct of elements of types {sorted({str(v.dtype) for v in items})}")
    return Elements(items[0].dtype, items)


def _empty(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    return Elements(element_type(int(attrs["dtype"]), "SequenceEmpty") if "dtype" in attrs else f32, ())


def _insert(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    q, x, at = _sequence(_get(inputs, 0), "SequenceInsert"), _tensor(_get(inputs, 1), "SequenceInsert"), _get(inputs, 2)
    if x.dtype is not q.dtype:
        raise TypeMismatch(f"SequenceInsert of {x.dtype} into a sequence of {q.dtype}")
    if isinstance(q, Elements) and (at is None or _fixed(at) is not None):
        n, k = len(q.items), _fixed(at)
        k = n if k is None else k + n if k < 0 else k
        if not 0 <= k <= n:
            raise ShapeError(f"position {_fixed(at)} of SequenceInsert into a sequence of length {n}")
        return Elements(q.dtype, (*q.items[:k], x, *q.items[k:]))
    return s.insert(s.pack(q), x, None if at is None else _tensor(at, "SequenceInsert"))


def _erase(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    q, at = _sequence(_get(inputs, 0), "SequenceErase"), _get(inputs, 1)
    if isinstance(q, Elements) and (at is None or _fixed(at) is not None):
        k = _place(-1 if at is None else int(_fixed(at) or 0), len(q.items), "SequenceErase")
        return Elements(q.dtype, (*q.items[:k], *q.items[k + 1 :]))
    return s.erase(s.pack(q), None if at is None else _tensor(at, "SequenceErase"))


def _at(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    q, at = _sequence(_get(inputs, 0), "SequenceAt"), _tensor(_get(inputs, 1), "SequenceAt")
    if isinstance(q, Elements) and _fixed(at) is not None:
        return q.items[_place(int(_fixed(at) or 0), len(q.items), "SequenceAt")]
    p = s.pack(q)
    k = s.position(p, at, "the position of SequenceAt")
    if isinstance(q, Elements) and q.items and all(v.shape == q.items[0].shape for v in q.items):
        stack = s.concat([s.op("Unsqueeze", v, s.ints(0)) for v in q.items])
        return s.op("Squeeze", s.op("Gather", stack, k), s.ints(0))
    return s.at(p, k, "an element of the sequence")


def _length(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    q = _sequence(_get(inputs, 0), "SequenceLength")
    return s.constant(np.array(len(q.items), np.int64)) if isinstance(q, Elements) else s.op("Reshape", s.count(q), s.ints())


def _concat(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    q, new_axis, axis = _sequence(_get(inputs, 0), "ConcatFromSequence"), bool(attrs.get("new_axis", 0)), int(attrs["axis"])
    if isinstance(q, Packed):
        return s.joined(q, axis, new_axis)
    if not q.items:
        raise ShapeError("ConcatFromSequence of a sequence without elements")
    items = [s.op("Unsqueeze", v, s.ints(axis)) for v in q.items] if new_axis else list(q.items)
    return s.concat(items, axis)


def _split(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    parts = _get(inputs, 1)
    x = _tensor(_get(inputs, 0), "SplitToSequence")
    return s.split(x, None if parts is None else _tensor(parts, "SplitToSequence"), int(attrs.get("axis", 0)), bool(attrs.get("keepdims", 1)))


def _optional(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    v = _get(inputs, 0)
    if v is None:
        if "type" not in attrs:
            raise InvalidModel("an Optional without an input or a type")
        form = declared(attrs["type"], "the type of Optional")
        dtype = element_type(attrs["type"].tensor_type.elem_type, "the type of Optional") if form is None else form.dtype
        return Maybe(dtype, s.constant(np.array(False)), None, form is None)
    if isinstance(v, Maybe):
        raise TypeMismatch("an Optional of an optional")
    return Maybe(v.dtype, s.constant(np.array(True)), v, isinstance(v, Value))


def _has(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    v = _get(inputs, 0)
    return v.has if isinstance(v, Maybe) else s.constant(np.array(v is not None))


def _element(s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    v = _get(inputs, 0)
    if v is None:
        raise InvalidModel("OptionalGetElement without an input")
    return s.element(v) if isinstance(v, Maybe) else v


_OPS: dict[str, Callable[[Steps, Sequence[Any_ | None], dict[str, Any]], Any_]] = {
    "SequenceConstruct": _construct, "SequenceEmpty": _empty, "SequenceInsert": _insert, "SequenceErase": _erase, "SequenceAt": _at,
    "SequenceLength": _length, "ConcatFromSequence": _concat, "SplitToSequence": _split, "Optional": _optional,
    "OptionalHasElement": _has, "OptionalGetElement": _element,
}  # fmt: skip
SEQUENCE_OPS = frozenset(_OPS)


def apply(op: str, s: Steps, inputs: Sequence[Any_ | None], attrs: dict[str, Any]) -> Any_:
    """The value of a sequence operator. Raises ShapeError, TypeMismatch, InvalidModel, UnsupportedOperator."""
    return s.checked(_OPS[op](s, inputs, attrs))
