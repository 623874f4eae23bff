"""Shapes: views of the same bytes (Reshape, Flatten, Squeeze, Unsqueeze), queries (Shape, Size), and tensors made from a shape
(ConstantOfShape, Range, EyeLike, Expand, Tile)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.dtypes import DType, from_numpy, i64, index
from luthier.ir.expr import Expr, as_expr, bounds, cast, const, land, lnot, load, lor, maximum, minimum, select, unary
from luthier.ir.graph import MAX_CONTENT, Node, TensorType, content_or_symbols
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import (
    ONE,
    ZERO,
    Array,
    at,
    axes_of,
    broadcast,
    ceil_div,
    check_axis,
    const_value,
    contents,
    define,
    differ,
    dimension,
    element_type,
    flag,
    float_content,
    is_one,
    like,
    make,
    moved,
    must,
    need,
    product,
    reindex,
    same,
    shape_error,
    type_error,
)
from luthier.ir.requirements import assume_equal


class View(Op):
    """The same elements in the same order under another shape."""

    kind = "view"

    def limits(self, node: Node) -> tuple[Expr, Expr] | None:
        return need(node, 0).limits

    def shape(self, node: Node) -> Sequence[Expr]:
        raise NotImplementedError

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [like(need(node, 0).type, self.shape(node))]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return [need(node, 0).content]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        return make(node, ins, outs, [define(outs[0], axes, must(ins, 0)[reindex(must(ins, 0).shape, axes)])])


@op("Reshape")
class Reshape(View):
    """(data, shape): 0 keeps the extent (unless ``allowzero``), -1 takes what is left."""

    def shape(self, node: Node) -> Sequence[Expr]:
        x, want = need(node, 0), content_or_symbols(node, 1)
        keep = not int(node.attrs.get("allowzero", 0))
        dims: list[Expr] = []
        free: list[int] = []
        unsure: list[int] = []
        for k, e in enumerate(want):
            if e.op == "const":
                if e.attr == 0 and keep:
                    if k >= x.rank:
                        raise shape_error(node, f"dimension {k} is to be kept, but the input has rank {x.rank}")
                    e = x.shape[k]
                elif e.attr == -1:
                    free.append(k)
                elif e.attr < -1:
                    raise shape_error(node, f"extent {e.attr} in the new shape")
            elif bounds(e)[0] is None:  # decided at run time: may be 0 or -1
                if keep and k < x.rank:
                    e = select(e.eq(0), x.shape[k], e)
                unsure.append(k)
            dims.append(e)
        if len(free) > 1:
            raise shape_error(node, "more than one -1 in the new shape")
        total = product(x.shape)
        if free:
            rest = product(d for k, d in enumerate(dims) if k != free[0])
            dims[free[0]] = self._left(node, list(x.shape), [d for k, d in enumerate(dims) if k != free[0]])
            if total.op == "const" and rest.op == "const" and not unsure and (total.attr % rest.attr if rest.attr else total.attr):
                raise shape_error(node, f"{total.attr} elements do not fit into {[repr(d) for d in want]}")
        elif unsure:
            rest = product(select(d.eq(-1), ONE, d) if k in unsure else d for k, d in enumerate(dims))
            for k in unsure:
                dims[k] = select(dims[k].eq(-1), total // maximum(rest, 1), dims[k])
        elif differ(total, product(dims)):
            raise shape_error(node, f"{total!r} elements do not fit into {[repr(d) for d in dims]}")
        assume_equal(product(dims), total, "elements of the new and the old shape")
        return dims

    @staticmethod
    def _left(node: Node, have: list[Expr], used: list[Expr]) -> Expr:
        """The product of ``have`` over that of ``used``, with equal factors cancelled first."""
        used = list(used)
        for d in list(have):
            for u in used:
                if d is u:
                    have.remove(d)
                    used.remove(u)
                    break
        return product(have) // product(used)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        dims = [int(d) for d in np.asarray(arrays[1])]
        if not int(node.attrs.get("allowzero", 0)):
            dims = [x.shape[k] if d == 0 else d for k, d in enumerate(dims)]
        if x.size == 0 and -1 in dims:
            rest = int(np.prod([d for d in dims if d != -1]))
            dims = [(0 if rest else 1) if d == -1 else d for d in dims]
        return [x.reshape(dims)]


@op("Flatten")
class Flatten(View):
    """To a matrix split before dimension ``axis``."""

    def shape(self, node: Node) -> Sequence[Expr]:
        x = need(node, 0)
        a = int(node.attrs.get("axis", 1))
        if not -x.rank <= a <= x.rank:
            raise shape_error(node, f"axis {a} is out of range for rank {x.rank}")
        a = a + x.rank if a < 0 else a
        return [product(x.shape[:a]), product(x.shape[a:])]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        a = int(node.attrs.get("axis", 1))
        a = a + x.ndim if a < 0 else a
        return [x.reshape(int(np.prod(x.shape[:a])), int(np.prod(x.shape[a:])))]


def given_axes(node: Node, i: int, rank: int) -> list[Expr]:
    """Dimension numbers from input ``i``, counted from the front; symbols where they come at run time."""
    return [dimension(node, a, rank) for a in content_or_symbols(node, i)]


def total_of(terms: Iterable[Expr]) -> Expr:
    out: Expr = ZERO
    for t in terms:
        out = out + t
    return out


@op("Squeeze")
class Squeeze(View):
    """Unit dimensions ``axes`` (default: all that are 1) removed."""

    def shape(self, node: Node) -> Sequence[Expr]:
        x = need(node, 0)
        axes = None if node.input(1) is None else given_axes(node, 1, x.rank)
        if axes is not None and not all(a.op == "const" for a in axes):
            hits = [lor(*(a.eq(m) for a in axes)) for m in range(x.rank)]
            at = [const(m) - total_of(flag(h) for h in hits[:m]) for m in range(x.rank)]
            return [total_of(select(land(lnot(hits[m]), at[m].eq(k)), s, ZERO) for m, s in enumerate(x.shape)) for k in range(x.rank - len(axes))]
        if axes is None:
            if any(s.op != "const" for s in x.shape):
                raise shape_error(node, "without axes it is not known which dimensions are 1", hint="pin the dimensions or give axes")
            drop = {k for k, s in enumerate(x.shape) if is_one(s)}
        else:
            drop = {check_axis(node, a.attr, x.rank) for a in axes}
            for k in drop:
                if differ(x.shape[k], ONE):
                    raise shape_error(node, f"dimension {k} is {x.shape[k]!r}, not 1")
        return [s for k, s in enumerate(x.shape) if k not in drop]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        if len(arrays) < 2 or arrays[1] is None:
            return [np.squeeze(x)]
        return [np.squeeze(x, tuple(int(a) for a in np.asarray(arrays[1]).reshape(-1)))]


@op("Unsqueeze")
class Unsqueeze(View):
    """Unit dimensions inserted at ``axes`` of the result."""

    def shape(self, node: Node) -> Sequence[Expr]:
        x = need(node, 0)
        need(node, 1)
        n = x.rank + len(content_or_symbols(node, 1))
        axes = given_axes(node, 1, n)
        if not all(a.op == "const" for a in axes):
            out = []
            for k in range(n):
                before = total_of(flag(a < k) for a in axes)
                out.append(select(lor(*(a.eq(k) for a in axes)), ONE, choose(x.shape, const(k) - before) if x.rank else ONE))
            return out
        put = {check_axis(node, a.attr, n) for a in axes}
        if len(put) != len(axes):
            raise shape_error(node, f"axes {[a.attr for a in axes]} name a dimension twice")
        rest = iter(x.shape)
        return [ONE if k in put else next(rest) for k in range(n)]

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.expand_dims(np.asarray(arrays[0]), tuple(int(a) for a in np.asarray(arrays[1]).reshape(-1)))]


def choose(values: Sequence[Expr], pos: Expr) -> Expr:
    """values[pos] as a chain of selects."""
    out = values[-1] if values else const(0, i64)
    for k in range(len(values) - 2, -1, -1):
        out = select(pos.eq(k), values[k], out)
    return out


@op("Shape")
class ShapeOf(Op):
    """Extents ``start`` to ``end`` of the input as i64[n]."""

    kind = "elementwise"

    def dims(self, node: Node) -> Sequence[Any]:
        x = need(node, 0)
        start, end = int(node.attrs.get("start", 0)), node.attrs.get("end")
        return x.shape[slice(start, None if end is None else int(end))]

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [TensorType.of(i64, [len(self.dims(node))])]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return [tuple(self.dims(node))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        return make(node, ins, outs, [define(outs[0], axes, choose([cast(d, i64) for d in self.dims(node)], axes[0].var))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        start, end = int(node.attrs.get("start", 0)), node.attrs.get("end")
        return [np.array(np.shape(arrays[0])[slice(start, None if end is None else int(end))], np.int64)]


@op("Size")
class Size(Op):
    """Number of elements as an i64 scalar."""

    kind = "elementwise"

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [TensorType(i64, ())]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return [(product(need(node, 0).shape),)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        return make(node, ins, outs, [define(outs[0], (), product(need(node, 0).shape))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.array(np.size(arrays[0]), np.int64)]


@op("ConstantOfShape")
class ConstantOfShape(Op):
    """A tensor of the given shape filled with ``value`` (one element, default f32 0)."""

    kind = "elementwise"

    def value(self, node: Node) -> Array:
        return np.asarray(node.attrs.get("value", np.zeros(1, np.float32))).reshape(-1)[:1]

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [TensorType.of(from_numpy(self.value(node).dtype), content_or_symbols(node, 0))]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        t = node.outputs[0].type
        if t.static_shape is None or not (t.dtype.is_int or t.dtype.is_bool) or int(np.prod(t.static_shape)) > MAX_CONTENT:
            return None
        return [(as_expr(int(self.value(node)[0])),) * int(np.prod(t.static_shape))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        v = self.value(node)[0]
        return make(node, ins, outs, [define(outs[0], axes, const(v.item() if v.dtype.kind in "fiub" else float(v), outs[0].dtype))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        v = self.value(node)
        return [np.full([int(d) for d in np.asarray(arrays[0])], v[0], v.dtype)]


@op("Range")
class Range(Op):
    """start, start + delta, ... below limit: scalars. All three may come at run time."""

    kind = "elementwise"

    def infer(self, node: Node) -> Sequence[TensorType]:
        d = need(node, 0).dtype
        if any(need(node, k).dtype is not d for k in (1, 2)):
            raise type_error(node, "start, limit and delta differ in type")
        if d.is_float:
            s, l, t = (const_value(need(node, k)) for k in range(3))
            if s is not None and l is not None and t is not None:
                return [TensorType.of(d, [max(int(np.ceil((l - s) / t)), 0)])]
            a, b, c = (float_content(node, k)[0] for k in range(3))
            return [TensorType.of(d, [maximum(cast(unary("ceil", (b - a) / c), index), 0)])]
        s, l, t = (content_or_symbols(node, k)[0] for k in range(3))
        if t.op == "const" and t.attr == 0:
            raise shape_error(node, "delta is 0")
        return [TensorType.of(d, [maximum(ceil_div(l - s, t), 0)])]

    def limits(self, node: Node) -> tuple[Expr, Expr] | None:
        if need(node, 0).dtype.is_float:
            return None
        s, _, t = (content_or_symbols(node, k)[0] for k in range(3))
        last = s + t * maximum(node.outputs[0].shape[0] - 1, 0)
        return minimum(s, last), maximum(s, last)

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        n = node.outputs[0].shape[0]
        if need(node, 0).dtype.is_float or n.op != "const" or n.attr > MAX_CONTENT:
            return None
        s, _, t = (content_or_symbols(node, k)[0] for k in range(3))
        return [tuple(s + t * k for k in range(n.attr))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        d = outs[0].dtype
        axes = axes_of(outs[0].shape)
        if d.is_float:
            s, step = (float_content(node, k)[0] for k in (0, 2))
            e = s + cast(axes[0].var, s.dtype) * step
        else:
            s, step = (content_or_symbols(node, k)[0] for k in (0, 2))
            e = s + axes[0].var * step
        return make(node, ins, outs, [define(outs[0], axes, e)])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        s, l, t = (np.asarray(a).reshape(()) for a in arrays)
        n = max(int(np.ceil((float(l) - float(s)) / float(t))), 0)
        k = np.arange(n)
        if s.dtype.kind in "iu":
            return [(int(s) + k * int(t)).astype(s.dtype)]
        return [(float(s) + k * float(t)).astype(s.dtype)]


@op("EyeLike")
class EyeLike(Op):
    """Ones on diagonal ``k`` of a matrix shaped like the input."""

    kind = "elementwise"

    def dtype(self, node: Node) -> DType:
        return element_type(node, node.attrs["dtype"]) if "dtype" in node.attrs else need(node, 0).dtype

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        if x.rank != 2:
            raise shape_error(node, f"EyeLike takes a matrix, the input has rank {x.rank}")
        return [TensorType(self.dtype(node), x.shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        r, c = axes_of(outs[0].shape)
        hit = c.var.eq(r.var + int(node.attrs.get("k", 0)))
        return make(node, ins, outs, [define(outs[0], (r, c), cast(hit, outs[0].dtype))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.eye(np.shape(arrays[0])[0], np.shape(arrays[0])[1], k=int(node.attrs.get("k", 0))).astype(self.dtype(node).numpy)]


@op("Expand")
class Expand(Op):
    """Broadcast to (the broadcast of the input's and) the given shape."""

    kind = "elementwise"

    def limits(self, node: Node) -> tuple[Expr, Expr] | None:
        return need(node, 0).limits

    def infer(self, node: Node) -> Sequence[TensorType]:
        x = need(node, 0)
        return [like(x.type, broadcast(node, x.shape, tuple(content_or_symbols(node, 1))))]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        x, s = contents(node, 0), node.outputs[0].type.static_shape
        if x is None or s is None or int(np.prod(s)) > MAX_CONTENT:
            return None
        return [tuple(np.broadcast_to(x[0], s).reshape(-1))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        return make(node, ins, outs, [define(outs[0], axes, at(must(ins, 0), axes))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x = np.asarray(arrays[0])
        return [np.array(np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(d) for d in np.asarray(arrays[1])))))]


@op("Tile")
class Tile(Op):
    """The input repeated ``repeats`` times along each dimension."""

    kind = "injective"

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, reps = need(node, 0), content_or_symbols(node, 1)
        if len(reps) != x.rank:
            raise shape_error(node, f"{len(reps)} repeats for rank {x.rank}")
        return [like(x.type, (s * r for s, r in zip(x.shape, reps, strict=True)))]

    def content(self, node: Node) -> Sequence[tuple[Expr, ...] | None] | None:
        return moved(self, node)

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        axes = axes_of(outs[0].shape)
        x = must(ins, 0)
        idx = [a.var if same(s, a.extent) else ZERO if is_one(s) else a.var % s for s, a in zip(x.shape, axes, strict=True)]
        return make(node, ins, outs, [define(outs[0], axes, load(x, idx))])

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        return [np.tile(arrays[0], [int(r) for r in np.asarray(arrays[1])])]
