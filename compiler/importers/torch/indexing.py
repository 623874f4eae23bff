"""Rules of gathers, scatters and index lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.importers.torch.emitter import Emitter, aten
from luthier.ir import dtypes as D
from luthier.ir.dtypes import i64
from luthier.ir.errors import UnsupportedOperator
from luthier.ir.expr import minimum
from luthier.ir.graph import Value

_REDUCTIONS = {"sum": "add", "add": "add", "prod": "mul", "multiply": "mul", "amax": "max", "amin": "min", None: "none"}


def _least(x: Value) -> Any:
    return False if x.dtype.is_bool else -np.inf if x.dtype.is_float else -(1 << (x.dtype.bits - 1)) if x.dtype.is_signed else 0


def _most(x: Value) -> Any:
    return True if x.dtype.is_bool else np.inf if x.dtype.is_float else (1 << (x.dtype.bits - x.dtype.is_signed)) - 1


@aten("embedding")
def embedding(e: Emitter, weight: Value, indices: Value, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False) -> Value:
    return e.op("Gather", weight, indices, axis=0)


@aten("index_select")
def index_select(e: Emitter, x: Value, dim: int, index: Value) -> Value:
    if x.rank == 0:
        return x
    return e.op("Gather", x, e.reshape(index, [-1]), axis=dim % x.rank)


@aten("gather")
def gather(e: Emitter, x: Value, dim: int, index: Value) -> Value:
    if x.rank == 0:
        return e.expand(x, e.out.shape)
    if index.rank < x.rank:  # one number into a vector
        return e.op("Gather", x, index, axis=0)
    if index.rank > x.rank:  # of no elements
        return e.expand(e.number(0, x.dtype), e.out.shape)
    return e.op("GatherElements", x, index, axis=dim % x.rank)


@aten("take_along_dim")
def take_along_dim(e: Emitter, x: Value, indices: Value, dim: int | None = None) -> Value:
    if dim is None:
        return e.op("Gather", e.reshape(x, [-1]), e.reshape(indices, [-1]), axis=0)
    d = dim % x.rank
    shape = list(e.shape)
    wide = list(shape)
    wide[d] = x.shape[d]
    return e.op("GatherElements", e.expand(x, wide), e.expand(indices, shape), axis=d)


@aten("take")
def take(e: Emitter, x: Value, index: Value) -> Value:
    return e.op("Gather", e.reshape(x, [-1]), index, axis=0)


@aten("scatter", "scatter_reduce")
def scatter(
    e: Emitter, x: Value, dim: int, index: Value, src: Any = None, value: Any = None, reduce: str | None = None, include_self: bool = True,
) -> Value:
    if x.rank == 0 or index.rank == 0:
        flat = scatter(e, e.reshape(x, [-1]), 0, e.reshape(index, [-1]), e.reshape(src, [-1]) if isinstance(src, Value) else src, value, reduce, include_self)
        return e.reshape(flat, x.shape)
    updates = src if isinstance(src, Value) else e.expand(e.number(src if value is None else value, x.dtype), index.shape)
    if isinstance(src, Value) and any(a is not b for a, b in zip(src.shape, index.shape, strict=True)):
        n = e.vector(index.shape)
        updates = e.op("Slice", src, e.vector([0] * x.rank), n, e.vector(range(x.rank)), e.vector([1] * x.rank))
    if not include_self and reduce is not None:  # places that are written to begin with what changes nothing
        neutral = {"sum": 0, "mean": 0, "prod": 1, "amax": _least(x), "amin": _most(x)}[reduce]
        x = _scattered(e, x, index, e.expand(e.number(neutral, x.dtype), index.shape), dim % x.rank, "none")
    if reduce == "mean":
        total = _scattered(e, x, index, e.cast(updates, x.dtype), dim % x.rank, "add")
        one = e.number(1, x.dtype)
        begin = e.expand(one, x.shape)
        if not include_self:
            begin = _scattered(e, begin, index, e.expand(e.number(0, x.dtype), index.shape), dim % x.rank, "none")
        counted = _scattered(e, begin, index, e.expand(one, index.shape), dim % x.rank, "add")
        return e.op("Div" if x.dtype.is_float else "aten::floor_divide", total, counted)
    return _scattered(e, x, index, e.cast(updates, x.dtype), dim % x.rank, _REDUCTIONS[reduce])


def _scattered(e: Emitter, x: Value, index: Value, updates: Value, axis: int, reduction: str) -> Value:
    """Truth values are counted: true where any of them is."""
    if x.dtype.is_bool and reduction != "none":
        op = {"add": "max", "mul": "min"}.get(reduction, reduction)
        return e.cast(e.op("ScatterElements", e.cast(x, D.u8), index, e.cast(updates, D.u8), axis=axis, reduction=op), D.boolean)
    return e.op("ScatterElements", x, index, updates, axis=axis, reduction=reduction)


@aten("scatter_add")
def scatter_add(e: Emitter, x: Value, dim: int, index: Value, src: Value) -> Value:
    return scatter(e, x, dim, index, src, reduce="sum")


@aten("index_copy")
def index_copy(e: Emitter, x: Value, dim: int, index: Value, source: Value) -> Value:
    if x.rank == 0 or x.dtype.bits < 8 or x.dtype.is_bool:
        return _along(e, x, dim, index, source, "none")
    return e.op("luthier::IndexCopy", x, e.cast(e.reshape(index, [-1]), i64), e.cast(source, x.dtype), axis=dim % x.rank)


@aten("index_add")
def index_add(e: Emitter, x: Value, dim: int, index: Value, source: Value, alpha: Any = 1) -> Value:
    if alpha != 1:
        source = e.op("And" if source.dtype.is_bool else "Mul", source, e.number(alpha, source.dtype))
    return _along(e, x, dim, index, source, "add")


@aten("index_fill")
def index_fill(e: Emitter, x: Value, dim: int, index: Value, value: Any) -> Value:
    shape = list(x.shape)
    if x.rank:
        shape[dim] = e.reshape(index, [-1]).shape[0]
    return _along(e, x, dim, index, e.expand(e.number(value, x.dtype), shape), "none")


def _along(e: Emitter, x: Value, dim: int, index: Value, source: Value, reduction: str) -> Value:
    if x.rank == 0:
        return e.reshape(_along(e, e.reshape(x, [1]), 0, index, e.reshape(source, [1]), reduction), [])
    d = dim % x.rank
    shape = [1] * x.rank
    flat = e.reshape(index, [-1])
    shape[d] = flat.shape[0]  # type: ignore[call-overload]
    where = e.expand(e.reshape(flat, shape), source.shape)
    return _scattered(e, x, where, e.cast(source, x.dtype), d, reduction)


@aten("nonzero")
def nonzero(e: Emitter, x: Value) -> Value:
    if x.rank == 0:
        return e.slice(e.transpose(e.op("NonZero", e.reshape(x, [1])), [1, 0]), 1, 0, 0)
    return e.transpose(e.op("NonZero", x), [1, 0])


@aten("nonzero_static")
def nonzero_static(e: Emitter, x: Value, size: Any, fill_value: int = -1) -> Value:
    fill = e.expand(e.number(fill_value, i64), [size, x.rank])
    return e.slice(e.op("Concat", nonzero(e, x), fill, axis=0), 0, 0, size)


@aten("_unique2")
def unique(e: Emitter, x: Value, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False) -> tuple[Value, ...]:
    return _unique(e, x, None, return_inverse, return_counts)


@aten("unique_dim")
def unique_dim(
    e: Emitter, x: Value, dim: int, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False,
) -> tuple[Value, ...]:
    return _unique(e, x, dim % x.rank, return_inverse, return_counts)


def _unique(e: Emitter, x: Value, axis: int | None, inverse: bool, counts: bool) -> tuple[Value, ...]:
    v = e.cast(x, D.u8) if x.dtype.is_bool else x
    v = e.reshape(v, [-1]) if axis is None else v
    y, _, where, times = e.ops("Unique", 4, v, sorted=1, **({} if axis is None else {"axis": axis}))
    empty = e.const("none", np.zeros(0, np.int64))
    return e.cast(y, x.dtype), (e.reshape(where, x.shape) if axis is None else where) if inverse else empty, times if counts else empty


@aten("unique_consecutive")
def unique_consecutive(e: Emitter, x: Value, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None) -> tuple[Value, ...]:
    """Heads of runs: where an element differs from the one before."""
    if dim is not None and x.rank != 1:
        raise UnsupportedOperator("unique_consecutive along a dimension is not supported", hint="without dim it takes all elements in a row")
    v = e.reshape(x, [-1])
    n = v.shape[0]
    empty = e.const("none", np.zeros(0, np.int64))
    differs = e.op("Not", e.op("Equal", e.slice(v, 0, 1, 1 << 62), e.slice(v, 0, 0, -1)))
    head = e.op("Concat", e.expand(e.const("first", np.array(True)), [minimum(n, 1)]), differs, axis=0)
    at = e.op("NonZero", head)
    at = e.reshape(at, [at.shape[1]])
    y = e.op("Gather", v, at, axis=0)
    inverse, counts = empty, empty
    if return_inverse:
        order = e.op("CumSum", e.cast(head, i64), e.const("axis", np.array(0, np.int64)))
        inverse = e.reshape(e.op("Sub", order, e.number(1, i64)), x.shape)
    if return_counts:
        end = e.op("Concat", e.slice(at, 0, 1, 1 << 62), e.expand(e.number(n, i64), [minimum(at.shape[0], 1)]), axis=0)
        counts = e.op("Sub", end, at)
    return y, inverse, counts


@aten("bincount")
def bincount(e: Emitter, x: Value, weights: Value | None = None, minlength: Any = 0) -> Value:
    """As many as the largest number says, which the run finds."""
    top = e.op("Concat", x, e.reshape(e.number(-1, x.dtype), [1]), axis=0)
    size = e.op("Max", e.op("Add", e.cast(e.reduce("ReduceMax", top, [0], False), i64), e.number(1, i64)), e.number(minlength, i64))
    zero = e.op("Expand", e.number(0, e.dtype), e.reshape(size, [1]))
    one = e.expand(e.number(1, e.dtype), x.shape) if weights is None else e.cast(weights, e.dtype)
    return e.op("ScatterElements", zero, e.cast(x, i64), one, axis=0, reduction="add")


@aten("argwhere")
def argwhere(e: Emitter, x: Value) -> Value:
    return nonzero(e, x)


@aten("nonzero_numpy")
def nonzero_numpy(e: Emitter, x: Value) -> tuple[Value, ...]:
    found = e.op("NonZero", e.reshape(x, [1]) if x.rank == 0 else x)
    return tuple(e.reshape(e.slice(found, 0, k, k + 1), [found.shape[1]]) for k in range(max(x.rank, 1)))


@aten("masked_select")
def masked_select(e: Emitter, x: Value, mask: Value) -> Value:
    shape = e.op("Add", e.op("Mul", e.cast(mask, i64), e.number(0, i64)), e.op("Mul", e.cast(x, i64), e.number(0, i64))).shape
    return e.op("Compress", e.reshape(e.expand(x, shape), [-1]), e.reshape(e.expand(mask, shape), [-1]))


@aten("masked_scatter")
def masked_scatter(e: Emitter, x: Value, mask: Value, source: Value) -> Value:
    """The k-th true element takes the k-th element of the source."""
    m = e.expand(e.cast(mask, D.boolean), e.out.shape)
    x = e.expand(x, e.out.shape)
    flat = e.reshape(m, [-1])
    order = e.op("Sub", e.op("CumSum", e.cast(flat, i64), e.const("axis", np.array(0, np.int64))), e.number(1, i64))
    values = e.op("Gather", e.reshape(source, [-1]), e.op("Max", order, e.number(0, i64)), axis=0)
    return e.op("Where", m, e.reshape(e.cast(values, x.dtype), x.shape), x)


def split_masks(e: Emitter, indices: Sequence[Value | None]) -> list[Value | None]:
    """Boolean masks as the lists of positions that they mean."""
    out: list[Value | None] = []
    for v in indices:
        if v is not None and v.dtype in (D.boolean, D.u8):
            found = e.op("NonZero", v)
            out += [e.reshape(e.slice(found, 0, k, k + 1), [found.shape[1]]) for k in range(v.rank)]
        else:
            out.append(v)
    return out


@aten("index", "_unsafe_index")
def index(e: Emitter, x: Value, indices: Sequence[Value | None]) -> Value:
    given = split_masks(e, indices)
    where = [k for k, v in enumerate(given) if v is not None]
    if len(where) == 1:
        v = given[where[0]]
        return e.op("Gather", x, v, axis=where[0])
    y, joined = _joined(e, x, given, where)
    out = e.op("GatherND", y, joined)
    r = joined.rank - 1
    if where != list(range(where[0], where[-1] + 1)) or where[0] == 0:
        return out
    return e.transpose(out, [*range(r, r + where[0]), *range(r), *range(r + where[0], out.rank)])


def _joined(e: Emitter, x: Value, given: Sequence[Value | None], where: Sequence[int]) -> tuple[Value, Value]:
    """``x`` with the indexed dimensions first, and the tuples of indices into them."""
    y = e.transpose(x, [*where, *(k for k in range(x.rank) if k not in where)])
    lists = [e.cast(v, i64) for v in given if v is not None]
    shape = lists[0]
    for v in lists[1:]:
        shape = e.op("Add", e.op("Mul", shape, e.number(0, i64)), e.op("Mul", v, e.number(0, i64)))
    full = [e.reshape(e.expand(v, shape.shape), [*shape.shape, 1]) for v in lists]
    return y, e.op("Concat", *full, axis=shape.rank) if len(full) > 1 else full[0]


@aten("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(e: Emitter, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False, unsafe: bool = False) -> Value:
    values = e.cast(values, x.dtype)
    masks = [v for v in indices if v is not None]
    if len(masks) == 1 and indices[0] is masks[0] and masks[0].dtype is D.boolean and values.rank == 0:
        mask = e.reshape(masks[0], [*masks[0].shape, *[1] * (x.rank - masks[0].rank)])
        return e.op("Where", mask, e.op("Add", x, values) if accumulate else values, x)
    given = split_masks(e, indices)
    where = [k for k, v in enumerate(given) if v is not None]
    y, joined = _joined(e, x, given, where)
    r = joined.rank - 1
    rest = [x.shape[k] for k in range(x.rank) if k not in where]
    adjacent = where == list(range(where[0], where[-1] + 1))
    if adjacent and where[0] > 0:
        lead = where[0]
        full = e.expand(values, [*rest[:lead], *joined.shape[:-1], *rest[lead:]])
        updates = e.transpose(full, [*range(lead, lead + r), *range(lead), *range(lead + r, full.rank)])
    else:
        updates = e.expand(values, [*joined.shape[:-1], *rest])
    if accumulate and x.dtype.is_bool:
        new = e.cast(e.op("ScatterND", e.cast(y, D.u8), joined, e.cast(updates, D.u8), reduction="max"), D.boolean)
    else:
        new = e.op("ScatterND", y, joined, updates, reduction="add" if accumulate else "none")
    order = [*where, *(k for k in range(x.rank) if k not in where)]
    return e.transpose(new, [order.index(k) for k in range(x.rank)])


@aten("put")
def put(e: Emitter, x: Value, index: Value, source: Value, accumulate: bool = False) -> Value:
    flat = e.op("ScatterElements", e.reshape(x, [-1]), e.reshape(index, [-1]), e.reshape(source, [-1]), axis=0, reduction="add" if accumulate else "none")
    return e.reshape(flat, x.shape)


@aten("one_hot")
def one_hot(e: Emitter, x: Value, num_classes: int = -1) -> Value:
    n = e.shape[-1]
    k = e.op("Range", e.number(0, i64), e.number(n, i64), e.number(1, i64))
    return e.cast(e.op("Equal", e.reshape(x, [*x.shape, 1]), k), i64)


@aten("bucketize")
def bucketize(e: Emitter, x: Value, boundaries: Value, out_int32: bool = False, right: bool = False) -> Value:
    """How many boundaries lie below (or at, with ``right``)."""
    v = e.reshape(x, [*x.shape, 1])
    a, b = v, boundaries
    if a.dtype is not b.dtype:
        a, b = e.cast(a, D.f64), e.cast(b, D.f64)
    below = e.op("LessOrEqual" if right else "Less", b, a)
    return e.cast(e.reduce("ReduceSum", e.cast(below, i64), [x.rank], False), e.dtype)


@aten("searchsorted")
def searchsorted(
    e: Emitter, sorted_sequence: Value, x: Any, out_int32: bool = False, right: bool = False, side: str | None = None, sorter: Value | None = None,
) -> Value:
    v = x if isinstance(x, Value) else e.number(x, sorted_sequence.dtype)
    if sorter is not None:
        sorted_sequence = e.op("GatherElements", sorted_sequence, sorter, axis=sorted_sequence.rank - 1)
    right = side == "right" if side is not None else right
    if sorted_sequence.rank == 1:
        return bucketize(e, v, sorted_sequence, out_int32, right)
    s = e.reshape(sorted_sequence, [*sorted_sequence.shape[:-1], 1, sorted_sequence.shape[-1]])
    return bucketize(e, v, s, out_int32, right)


@aten("isin")
def isin(e: Emitter, elements: Any, test_elements: Any, assume_unique: bool = False, invert: bool = False, **more: Any) -> Value:
    a = elements if isinstance(elements, Value) else e.number(elements, test_elements.dtype)
    b = test_elements if isinstance(test_elements, Value) else e.number(test_elements, a.dtype)
    if a.dtype is not b.dtype:
        a, b = e.cast(a, D.f64), e.cast(b, D.f64)
    hit = e.op("Equal", e.reshape(a, [*a.shape, 1]), e.reshape(b, [-1]))
    found = e.cast(e.reduce("ReduceMax", e.cast(hit, D.u8), [a.rank], False), D.boolean)
    return e.op("Not", found) if invert else found

