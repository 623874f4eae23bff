"""Elements moved by the contents of an index tensor: Gather*, Scatter*, OneHot, and running sums (CumSum, CumProd).

Negative indices count from the end. An index that is still out of range is refused by the run (``indexed``); the kernels themselves read
the nearest element (gathers) or skip it (scatters): no access leaves its tensor, checked or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, Fold, LetStmt, Pull, Push, State
from luthier.ir.expr import Expr, bounds, cast, const, land, load, maximum, minimum, select
from luthier.ir.graph import Node, TensorType, content_or_symbols
from luthier.ir.loop import Buffer
from luthier.ir.op import Indexed, Op, op
from luthier.ir.ops.common import (
    ZERO,
    Array,
    axes_of,
    check_axis,
    define,
    differ,
    dimension,
    expect_shape,
    known_array,
    like,
    make,
    moved,
    must,
    need,
    object_content,
    shape_error,
    static,
    to_index,
    type_error,
    wide,
)
from luthier.ir.requirements import assume_at_least, assume_at_most


def wrap(j: Expr, n: Expr) -> Expr:
    """A possibly negative index (index type) counted from the end."""
    lo = bounds(j)[0]
    return j if lo is not None and lo >= 0 else select(j < 0, j + n, j)


def clamp(j: Expr, n: Expr) -> Expr:
    """A possibly negative index forced into 0 .. n - 1."""
    return maximum(minimum(wrap(j, n), n - 1), 0)


def _along_axis(node: Node) -> list[Indexed]:
    x = need(node, 0)
    return [Indexed.of(1, x.shape[check_axis(node, node.attrs.get("axis", 0), x.rank)])]


def _check_index(node: Node, i: int) -> None:
    if not need(node, i).dtype.is_int:
        raise type_error(node, f"input {i} holds indices, it must be an integer tensor")


def position(node: Node, i: int, ins: Sequence[Buffer | None], idx: Sequence[Expr]) -> Expr:
    """Element of index tensor ``i`` in index type; a constant one-element tensor becomes a number."""
    a = known_array(node.input(i))
    if a is not None and a.size == 1:
        return const(int(a.reshape(-1)[0]))
    return to_index(load(must(ins, i), idx))


@op("Gather")
class Gather(Op):
    """data[..., indices, ...] along ``axis``."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, j = need(node, 0), need(node, 1)
        _check_index(node, 1)
        a = check_axis(node, node.attrs.get("axis", 0), x.rank)
        known = known_array(j)
        n = x.shape[a]
        if known is not None and n.op == "const" and known.size and not (-n.attr <= int(known.min()) and int(known.max()) < n.attr):
            raise shape_error(node, f"index {int(known.max()) if int(known.max()) >= n.attr else int(known.min())} is out of range for extent {n.attr}")
        if j.limits is not None:  # a table of positions that is read beyond its end
            assume_at_least(j.limits[0], -n, "the least index and the negated extent")
            assume_at_most(j.limits[1], n - 1, "the greatest index and the last element")
        return [like(x.type, (*x.shape[:a], *j.shape, *x.shape[a + 1 :]))]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return moved(self, node)

    def indexed(self, node: Node) -> Sequence[Indexed]:
        return _along_axis(node)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, j = must(ins, 0), must(ins, 1)
        a = check_axis(node, node.attrs.get("axis", 0), x.rank)
        axes = axes_of(outs[0].shape)
        at = tuple(ax.var for ax in axes[a : a + j.rank])
        pos = clamp(position(node, 1, ins, at), x.shape[a])
        idx = [*(ax.var for ax in axes[:a]), pos, *(ax.var for ax in axes[a + j.rank :])]
        return make(node, ins, outs, [define(outs[0], axes, load(x, idx))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.take(np.asarray(arrays[0]), np.asarray(arrays[1]).astype(np.int64), int(node.attrs.get("axis", 0)))]


@op("GatherElements")
class GatherElements(Op):
    """out[i, j] = data[indices[i, j], j] for axis 0."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, j = need(node, 0), need(node, 1)
        _check_index(node, 1)
        check_axis(node, node.attrs.get("axis", 0), x.rank)
        if x.rank != j.rank:
            raise shape_error(node, "data and indices differ in rank")
        return [like(x.type, j.shape)]

    def indexed(self, node: Node) -> Sequence[Indexed]:
        return _along_axis(node)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x = must(ins, 0)
        a = check_axis(node, node.attrs.get("axis", 0), x.rank)
        axes = axes_of(outs[0].shape)
        here = [ax.var for ax in axes]
        idx = [clamp(position(node, 1, ins, here), x.shape[a]) if k == a else ax.var for k, ax in enumerate(axes)]
        return make(node, ins, outs, [define(outs[0], axes, load(x, idx))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, j, a = np.asarray(arrays[0]), np.asarray(arrays[1]).astype(np.int64), int(node.attrs.get("axis", 0))
        cut = tuple(slice(None) if k == a % x.ndim else slice(0, n) for k, n in enumerate(j.shape))
        return [np.take_along_axis(x[cut], np.where(j < 0, j + x.shape[a], j), a)]


@op("GatherND")
class GatherND(Op):
    """indices[..., k] address the dimensions of ``data`` after the first ``batch_dims``."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, j = need(node, 0), need(node, 1)
        _check_index(node, 1)
        b = int(node.attrs.get("batch_dims", 0))
        if j.rank == 0 or not 0 <= b < j.rank:
            raise shape_error(node, f"{b} batch dimensions of indices of rank {j.rank}")
        k = static(node, j.shape[-1], "the last dimension of the indices")
        if b + k > x.rank:
            raise shape_error(node, f"{k} coordinates after {b} batch dimensions exceed rank {x.rank}")
        return [like(x.type, (*j.shape[:-1], *x.shape[b + k :]))]

    def indexed(self, node: Node) -> Sequence[Indexed]:
        b = int(node.attrs.get("batch_dims", 0))
        return [Indexed.of(1, *need(node, 0).shape[b : b + int(need(node, 1).shape[-1].attr)])]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, j = must(ins, 0), must(ins, 1)
        b, k = int(node.attrs.get("batch_dims", 0)), int(j.shape[-1].attr)
        axes = axes_of(outs[0].shape)
        lead = [ax.var for ax in axes[: j.rank - 1]]
        pos = [clamp(to_index(load(j, [*lead, const(c)])), x.shape[b + c]) for c in range(k)]
        return make(node, ins, outs, [define(outs[0], axes, load(x, [*lead[:b], *pos, *(ax.var for ax in axes[j.rank - 1 :])]))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, j = np.asarray(arrays[0]), np.asarray(arrays[1]).astype(np.int64)
        b = int(node.attrs.get("batch_dims", 0))
        grid = np.meshgrid(*(np.arange(n) for n in j.shape[:-1]), indexing="ij")[:b]
        return [x[(*grid, *(j[..., c] for c in range(j.shape[-1])))]]


_PUSH = {"none": "set", "add": "add", "mul": "mul", "max": "max", "min": "min"}
_NUMPY: dict[str, Any] = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _reduction(node: Node) -> str:
    r = str(node.attrs.get("reduction", "none"))
    if r not in _PUSH:
        raise shape_error(node, f"unknown reduction {r!r}")
    return r


class Scatter(Op):
    """Updates written into a copy of the data, in row-major order of the updates."""

    kind = "opaque"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, u = need(node, 0), need(node, 2)
        _check_index(node, 1)
        _reduction(node)
        if x.dtype is not u.dtype:
            raise type_error(node, "data and updates differ in type")
        self.check(node)
        return [x.type]

    def check(self, node: Node) -> None:
        raise NotImplementedError

    def push(self, node: Node, ins: Sequence[Buffer | None], out: Buffer, over: Sequence[Axis], idx: Sequence[Expr], where: Expr) -> Compute:
        axes = axes_of(out.shape)
        value = load(must(ins, 2), [a.var for a in over])
        p = Push(out, axes, load(must(ins, 0), [a.var for a in axes]), tuple(over), tuple(idx), value, _PUSH[_reduction(node)], where)
        return make(node, ins, [out], [p])


def inside(j: Expr, n: Expr) -> Expr:
    return land(ZERO <= j, j < n)


@op("ScatterElements")
class ScatterElements(Scatter):
    """out[indices[i, j], j] op= updates[i, j] for axis 0."""

    def check(self, node: Node) -> None:
        x, j, u = need(node, 0), need(node, 1), need(node, 2)
        check_axis(node, node.attrs.get("axis", 0), x.rank)
        if not x.rank == j.rank == u.rank:
            raise shape_error(node, "data, indices and updates differ in rank")

    def indexed(self, node: Node) -> Sequence[Indexed]:
        return _along_axis(node)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x = must(ins, 0)
        a = check_axis(node, node.attrs.get("axis", 0), x.rank)
        over = axes_of(must(ins, 1).shape, "u")
        j = wrap(to_index(load(must(ins, 1), [v.var for v in over])), x.shape[a])
        return self.push(node, ins, outs[0], over, [j if k == a else v.var for k, v in enumerate(over)], inside(j, x.shape[a]))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, j, u = np.array(arrays[0]), np.asarray(arrays[1]).astype(np.int64), np.asarray(arrays[2])
        a = int(node.attrs.get("axis", 0)) % x.ndim
        idx: list[Any] = list(np.indices(j.shape))
        idx[a] = np.where(j < 0, j + x.shape[a], j)
        return [_scatter(x, tuple(idx), u, _reduction(node))]


def _scatter(x: Array, idx: tuple[Array, ...], u: Array, reduction: str) -> Array:
    if reduction == "none":
        for p in np.ndindex(idx[0].shape):
            x[tuple(int(i[p]) for i in idx)] = u[p]
    else:
        _NUMPY[reduction].at(x, idx, u)
    return x


@op("ScatterND")
class ScatterND(Scatter):
    """out[indices[...]] op= updates[...], a slice for each index tuple."""

    def check(self, node: Node) -> None:
        x, j, u = need(node, 0), need(node, 1), need(node, 2)
        k = static(node, j.shape[-1], "the last dimension of the indices")
        if k > x.rank or u.rank != j.rank - 1 + x.rank - k:
            raise shape_error(node, f"updates of rank {u.rank} do not fit {k} coordinates into rank {x.rank}")

    def indexed(self, node: Node) -> Sequence[Indexed]:
        return [Indexed.of(1, *need(node, 0).shape[: int(need(node, 1).shape[-1].attr)])]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, j, u = must(ins, 0), must(ins, 1), must(ins, 2)
        k = int(j.shape[-1].attr)
        over = axes_of(u.shape, "u")
        lead = [v.var for v in over[: j.rank - 1]]
        pos = [wrap(to_index(load(j, [*lead, const(c)])), x.shape[c]) for c in range(k)]
        where = land(*(inside(p, x.shape[c]) for c, p in enumerate(pos)))
        return self.push(node, ins, outs[0], over, [*pos, *(v.var for v in over[j.rank - 1 :])], where)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, j, u = np.array(arrays[0]), np.asarray(arrays[1]).astype(np.int64), np.asarray(arrays[2])
        k = j.shape[-1]
        for p in np.ndindex(j.shape[:-1]):
            at = tuple(int(c) for c in j[p][:k])
            r = _reduction(node)
            x[at] = u[p] if r == "none" else _NUMPY[r](x[at], u[p])
        return [x]


@op("OneHot")
class OneHot(Op):
    """values[1] where the position along the new ``axis`` equals the index, values[0] elsewhere."""

    kind = "injective"

    def depth(self, node: Node) -> Expr:
        v = need(node, 1)
        if any(differ(s, const(1)) for s in v.shape):
            raise shape_error(node, "depth must have one element")
        if v.data is None:
            return content_or_symbols(node, 1)[0]
        depth = float(v.data.reshape(-1)[0])
        if not 0 <= depth < 1 << 48:
            raise shape_error(node, f"depth is {depth}")
        return const(int(depth))

    def infer(self, node: Node) -> Sequence[TensorType]:
        j, values = need(node, 0), need(node, 2)
        expect_shape(node, 2, (2,))
        a = check_axis(node, node.attrs.get("axis", -1), j.rank + 1)
        return [like(values.type, (*j.shape[:a], self.depth(node), *j.shape[a:]))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        j, values = must(ins, 0), must(ins, 2)
        a = check_axis(node, node.attrs.get("axis", -1), j.rank + 1)
        axes = axes_of(outs[0].shape)
        hot = wrap(to_index(load(j, [x.var for k, x in enumerate(axes) if k != a])), axes[a].extent)
        e = select(hot.eq(axes[a].var), load(values, (const(1),)), load(values, (ZERO,)))
        return make(node, ins, outs, [define(outs[0], axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        j, n, values = np.asarray(arrays[0]).astype(np.int64), int(np.asarray(arrays[1]).reshape(-1)[0]), np.asarray(arrays[2])
        a = int(node.attrs.get("axis", -1)) % (j.ndim + 1)
        hot = np.expand_dims(np.where(j < 0, j + n, j), a) == np.arange(n).reshape([-1 if k == a else 1 for k in range(j.ndim + 1)])
        return [np.where(hot, values[1], values[0])]


class Running(Op):
    """Sums or products of everything before each element along an axis (which may come at run time)."""

    kind = "opaque"
    start = 0

    def combine(self, a: Any, b: Any) -> Any:
        raise NotImplementedError

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, position = need(node, 0), content_or_symbols(node, 1)
        if len(position) != 1:
            raise shape_error(node, "axis must be one number")
        dimension(node, position[0], x.rank)
        return [x.type]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        x = need(node, 0)
        known = known_array(node.input(1))
        if x.content is None or known is None or x.type.static_shape is None or not x.dtype.is_int:
            return None
        a = np.empty(len(x.content), object)
        a[:] = x.content
        return object_content(self.run(node, a.reshape(x.type.static_shape), int(known.reshape(()))))

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        x, out = must(ins, 0), outs[0]
        axes = axes_of(out.shape)
        pos = content_or_symbols(node, 1)[0]
        if pos.op == "const":
            return make(node, ins, outs, self.fold(node, x, out, axes, check_axis(node, pos.attr, x.rank)))
        lets: list[LetStmt] = []
        e: Expr | None = None
        for k in range(x.rank):
            t = Buffer(f"{out.name}.by{k}", out.dtype, out.shape, "global")
            lets += self.fold(node, x, t, axes, k)
            here = load(t, [a.var for a in axes])
            e = here if e is None else select(wrap(pos, const(x.rank)).eq(k), here, e)
        assert e is not None
        return make(node, ins, outs, [*lets, Pull(out, axes, e)])

    def fold(self, node: Node, x: Buffer, out: Buffer, axes: Sequence[Axis], k: int) -> list[LetStmt]:
        rest = tuple(a for i, a in enumerate(axes) if i != k)
        t = wide(x.dtype)
        acc = Buffer(f"{out.name}.acc", t, tuple(a.extent for a in rest), "global")
        before = load(acc, [a.var for a in rest])
        after = self.combine(before, cast(load(x, [a.var for a in axes]), t))
        seen = before if int(node.attrs.get("exclusive", 0)) else after
        state = State(acc, rest, const(self.start, t), after)
        return [Fold(f"{out.name}.scan", axes[k], (state,), (), (Pull(out, tuple(axes), cast(seen, out.dtype)),), bool(int(node.attrs.get("reverse", 0))), rest)]

    def run(self, node: Node, x: Array, axis: int) -> Array:
        y = np.moveaxis(x, axis, 0)
        out = np.empty_like(y)
        order = range(len(y) - 1, -1, -1) if int(node.attrs.get("reverse", 0)) else range(len(y))
        acc: Any = np.full(y.shape[1:], self.start, y.dtype)
        for i in order:
            new = self.combine(acc, y[i])
            out[i] = acc if int(node.attrs.get("exclusive", 0)) else new
            acc = new
        return np.moveaxis(out, 0, axis)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        up = x if x.dtype.kind in "iu" or x.dtype == np.float64 else x.astype(np.float64)
        return [self.run(node, up, int(np.asarray(arrays[1]).reshape(()))).astype(x.dtype)]


@op("CumSum")
class CumSum(Running):
    def combine(self, a: Any, b: Any) -> Any:
        return a + b


@op("CumProd")
class CumProd(Running):
    start = 1

    def combine(self, a: Any, b: Any) -> Any:
        return a * b
