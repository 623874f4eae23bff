"""Rules of reductions, running sums, sorting, norms of vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.importers.torch.emitter import Emitter, Kind, aten
from luthier.ir import dtypes as D
from luthier.ir.dtypes import i64
from luthier.ir.expr import as_expr
from luthier.ir.graph import Value

Axes = int | Sequence[int] | None


def axes_of(x: Value, dim: Axes) -> list[int]:
    """The dimensions of a reduction, all for None or none given."""
    dims = [dim] if isinstance(dim, int) else list(dim or [])
    return sorted({d % x.rank for d in dims}) if dims and x.rank else list(range(x.rank))


def count(e: Emitter, x: Value, axes: Sequence[int], dtype: D.DType) -> Value:
    """How many elements are reduced into one."""
    n = as_expr(1)
    for a in axes:
        n = n * x.shape[a]
    return e.number(n.attr if n.op == "const" else n, dtype)


def reduced(e: Emitter, op: str, x: Value, dim: Axes, keepdim: bool) -> Value:
    return e.reduce(op, x, axes_of(x, dim), keepdim) if x.rank else x


def _reduction(names: Sequence[str], op: str) -> None:
    @aten(*names)
    def rule(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Value:
        return reduced(e, op, e.cast(x, e.dtype), dim, keepdim)


_reduction(["sum"], "ReduceSum")
_reduction(["mean"], "ReduceMean")
_reduction(["prod"], "ReduceProd")


@aten("sum_to_size")
def sum_to_size(e: Emitter, x: Value, size: Sequence[Any]) -> Value:
    want = e.dims(size)
    lead = x.rank - len(want)
    axes = [*range(lead), *(lead + k for k, n in enumerate(want) if n is not x.shape[lead + k])]
    x = e.cast(x, e.dtype)
    return e.reshape(e.reduce("ReduceSum", x, axes, True), size) if axes else x


@aten("nansum")
def nansum(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Value:
    v = e.cast(x, e.dtype)
    if not v.dtype.is_float:
        return reduced(e, "ReduceSum", v, dim, keepdim)
    return reduced(e, "ReduceSum", e.op("Where", e.op("IsNaN", v), e.number(0.0, v.dtype), v), dim, keepdim)


@aten("nanmean")
def nanmean(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Value:
    v = e.cast(x, e.dtype)
    there = reduced(e, "ReduceSum", e.cast(e.op("Not", e.op("IsNaN", v)), v.dtype), dim, keepdim)
    return e.op("Div", nansum(e, v, dim, keepdim), there)


def _extreme(name: str, op: str, arg: str) -> None:
    def best(e: Emitter, x: Value, axes: Sequence[int], keep: bool) -> Value:
        if x.rank == 0:
            return x
        if x.dtype.is_bool:
            return e.cast(e.reduce(op, e.cast(x, D.u8), axes, keep), D.boolean)
        return e.reduce(op, x, axes, keep)

    @aten(f"a{name}")
    def over(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
        return best(e, x, axes_of(x, dim), keepdim)

    @aten(f"{name}.dim")
    def along(e: Emitter, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        return over(e, x, dim, keepdim), position(e, arg, x, dim, keepdim)

    @aten(name)
    def either(e: Emitter, x: Value, other: Value | None = None) -> Value:
        if other is None:
            return best(e, x, axes_of(x, None), False)
        a, b = e.promoted(Kind.DEFAULT, x, other)
        if a.dtype.is_bool:
            return e.op("Or" if name == "max" else "And", a, b)
        return e.op(name.capitalize(), a, b)

    @aten(f"arg{name}")
    def where(e: Emitter, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        return position(e, arg, x, dim, keepdim)


def position(e: Emitter, op: str, x: Value, dim: int | None, keepdim: bool) -> Value:
    if x.rank == 0:
        return e.number(0, i64)
    v = e.cast(x, D.u8) if x.dtype.is_bool else x
    if dim is not None:
        return e.op(op, v, axis=dim % x.rank, keepdims=int(keepdim))
    flat = e.op(op, e.reshape(v, [-1]), axis=0, keepdims=0)
    return e.reshape(flat, [1] * x.rank) if keepdim else flat


_extreme("max", "ReduceMax", "ArgMax")
_extreme("min", "ReduceMin", "ArgMin")


@aten("aminmax")
def aminmax(e: Emitter, x: Value, dim: int | None = None, keepdim: bool = False) -> tuple[Value, Value]:
    v = e.cast(x, D.u8) if x.dtype.is_bool else x
    return tuple(e.cast(reduced(e, op, v, dim, keepdim), x.dtype) for op in ("ReduceMin", "ReduceMax"))  # type: ignore[return-value]


def _logic(name: str, op: str) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
        truth = e.cast(e.cast(x, D.boolean), D.u8)
        return e.cast(truth if x.rank == 0 else reduced(e, op, truth, dim, keepdim), e.dtype)


_logic("any", "ReduceMax")
_logic("all", "ReduceMin")


@aten("count_nonzero")
def count_nonzero(e: Emitter, x: Value, dim: Axes = None) -> Value:
    return reduced(e, "ReduceSum", e.cast(e.cast(x, D.boolean), i64), dim, False)


def _variance(name: str, root: bool, pair: bool) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value, dim: Axes = None, unbiased: bool | None = None, correction: Any = None, keepdim: bool = False) -> Any:
        axes = axes_of(x, dim)
        less = (1 if correction is None else correction) if unbiased is None else int(unbiased)
        mean = e.reduce("ReduceMean", x, axes, True) if x.rank else x
        d = e.op("Sub", x, mean)
        total = e.reduce("ReduceSum", e.op("Mul", d, d), axes, keepdim) if x.rank else e.op("Mul", d, d)
        n = count(e, x, axes, x.dtype)
        v = e.op("Div", total, e.op("Max", e.op("Sub", n, e.number(less, x.dtype)), e.number(0, x.dtype)))
        v = e.op("Sqrt", v) if root else v
        return (v, mean if keepdim or not x.rank else e.reshape(mean, v.shape)) if pair else v


for _n in ("var", "std"):
    _variance(_n, _n == "std", False)
    _variance(f"{_n}_mean", _n == "std", True)


@aten("logsumexp")
def logsumexp(e: Emitter, x: Value, dim: Axes, keepdim: bool = False) -> Value:
    return reduced(e, "ReduceLogSumExp", e.cast(x, e.dtype), dim, keepdim)


@aten("norm", "linalg_vector_norm")
def norm(e: Emitter, x: Value, p: Any = 2, ord: Any = None, dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Value:
    k = 2 if p is None and ord is None else ord if ord is not None else p
    v = e.cast(x, e.dtype)
    if x.rank == 0:
        return e.op("Abs", v) if k != 0 else e.cast(e.cast(v, D.boolean), v.dtype)
    axes = axes_of(x, dim)
    size = e.op("Abs", v)
    if k == math.inf:
        return e.reduce("ReduceMax", size, axes, keepdim)
    if k == -math.inf:
        return e.reduce("ReduceMin", size, axes, keepdim)
    if k == 0:
        return e.reduce("ReduceSum", e.cast(e.cast(v, D.boolean), v.dtype), axes, keepdim)
    if k in (1, 2):
        return e.reduce("ReduceL1" if k == 1 else "ReduceL2", v, axes, keepdim)
    total = e.reduce("ReduceSum", e.op("Pow", size, e.number(float(k), v.dtype)), axes, keepdim)
    return e.op("Pow", total, e.number(1 / k, v.dtype))


@aten("dist")
def dist(e: Emitter, x: Value, other: Value, p: Any = 2) -> Value:
    a, b = e.promoted(Kind.DEFAULT, x, other)
    return norm(e, e.op("Sub", a, b), p)


@aten("trace")
def trace(e: Emitter, x: Value) -> Value:
    rows, columns = x.shape
    k = e.reshape(e.op("Range", e.number(0, i64), e.number(rows, i64), e.number(1, i64)), [rows, 1])
    on = e.op("Equal", k, e.op("Range", e.number(0, i64), e.number(columns, i64), e.number(1, i64)))
    return e.reduce("ReduceSum", e.op("Where", on, e.cast(x, e.dtype), e.number(0, e.dtype)), [0, 1], False)


def _running(name: str, op: str) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value, dim: int, dtype: Any = None) -> Value:
        v = e.cast(x, e.dtype)
        return e.op(op, v, e.const("axis", np.array(dim % x.rank, np.int64))) if x.rank else v


_running("cumsum", "CumSum")
_running("cumprod", "CumProd")


@aten("diff")
def diff(e: Emitter, x: Value, n: int = 1, dim: int = -1, prepend: Value | None = None, append: Value | None = None) -> Value:
    d = dim % x.rank
    parts = [p for p in (prepend, x, append) if p is not None]
    x = e.op("Concat", *parts, axis=d) if len(parts) > 1 else x
    for _ in range(n):
        a, b = e.slice(x, d, 1, (1 << 63) - 1), e.slice(x, d, 0, -1)
        x = e.op("Xor", a, b) if x.dtype.is_bool else e.op("Sub", a, b)
    return x


@aten("topk")
def topk(e: Emitter, x: Value, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Value, ...]:
    if x.rank == 0:
        return x, e.number(0, i64)
    return e.ops("TopK", 2, x, e.vector([k]), axis=dim % x.rank, largest=int(largest), sorted=1)


@aten("sort")
def sort(e: Emitter, x: Value, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    if x.rank == 0:
        return x, e.number(0, i64)
    v = e.cast(x, D.u8) if x.dtype.is_bool else x
    values, where = e.ops("TopK", 2, v, e.vector([x.shape[dim]]), axis=dim % x.rank, largest=int(descending), sorted=1)
    return e.cast(values, x.dtype), where


@aten("msort")
def msort(e: Emitter, x: Value) -> Value:
    return sort(e, x, 0)[0] if x.rank else x


@aten("argsort")
def argsort(e: Emitter, x: Value, dim: int = -1, descending: bool = False, stable: bool = False) -> Value:
    return sort(e, x, dim, descending)[1]


@aten("kthvalue")
def kthvalue(e: Emitter, x: Value, k: Any, dim: int = -1, keepdim: bool = False) -> tuple[Value, ...]:
    if x.rank == 0:
        return x, e.number(0, i64)
    at = e.vector([as_expr(k) - 1])
    pair = [e.op("Gather", v, at, axis=dim % x.rank) for v in sort(e, x, dim)]
    return tuple(v if keepdim else e.reshape(v, o.shape) for v, o in zip(pair, e.out, strict=True))
