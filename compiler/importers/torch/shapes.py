"""Rules of views, copies of other shapes, and new tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from luthier.importers.torch.emitter import Emitter, aten, view
from luthier.ir import dtypes as D
from luthier.ir.dtypes import i64
from luthier.ir.expr import Expr, as_expr, maximum, minimum
from luthier.ir.graph import Value

LAST = (1 << 63) - 1


@view("view", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "squeeze_copy", "unsqueeze_copy", "view_copy")
def reshape(e: Emitter, x: Value, **_: Any) -> Value:
    return e.reshape(x, e.out.shape)


@view("permute", "permute_copy")
def permute(e: Emitter, x: Value, dims: Sequence[int]) -> Value:
    return e.transpose(x, [d % x.rank for d in dims])


@view("transpose", "transpose_copy")
def transpose(e: Emitter, x: Value, dim0: int = 0, dim1: int = 1, axis0: int | None = None, axis1: int | None = None) -> Value:
    perm = list(range(x.rank))
    if x.rank:
        a, b = (axis0 if axis0 is not None else dim0) % x.rank, (axis1 if axis1 is not None else dim1) % x.rank
        perm[a], perm[b] = perm[b], perm[a]
    return e.transpose(x, perm)


@view("t", "t_copy", "mT", "mH", "matrix_H", "adjoint")
def t(e: Emitter, x: Value) -> Value:
    return e.transpose(x, [*range(x.rank - 2), *reversed(range(max(x.rank - 2, 0), x.rank))])


@view("numpy_T")
def numpy_t(e: Emitter, x: Value) -> Value:
    return e.transpose(x, list(reversed(range(x.rank))))


@view("movedim")
def movedim(e: Emitter, x: Value, source: Any, destination: Any) -> Value:
    src = [source] if isinstance(source, int) else source
    dst = [destination] if isinstance(destination, int) else destination
    placed = {d % x.rank: s % x.rank for s, d in zip(src, dst, strict=True)}
    rest = iter([k for k in range(x.rank) if k not in placed.values()])
    return e.transpose(x, [placed[k] if k in placed else next(rest) for k in range(x.rank)])


@view("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(e: Emitter, x: Value, **_: Any) -> Value:
    return e.expand(x, e.out.shape)


@view("alias", "detach")
def same(e: Emitter, x: Value) -> Value:
    return x


def clamp_index(k: Any, n: Expr) -> Expr:
    """A start or end of a slice as Python reads it."""
    k = as_expr(k)
    if k.op == "const":
        if k.attr >= LAST:
            return n
        k = n + k if k.attr < 0 else k
    return minimum(maximum(k, 0), n)


@view("slice", "slice_copy", "narrow")
def slice_(
    e: Emitter, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1, length: Any = None,
) -> Value:
    if length is not None:
        start = start if not isinstance(start, int) or start >= 0 else x.shape[dim] + start
        end = start + length
    first, last = (0 if start is None else start), (LAST if end is None else end)
    if isinstance(first, int) and first == 0 and isinstance(last, int) and last >= LAST and step == 1:
        return x
    return e.slice(x, dim, first, last, step)


@view("select", "select_copy")
def select(e: Emitter, x: Value, dim: int, index: Any) -> Value:
    if isinstance(index, Value):
        return e.op("Gather", x, index, axis=dim % x.rank)
    return e.op("Gather", x, e.reshape(e.vector([index]), []), axis=dim % x.rank)


@aten("slice_scatter")
def slice_scatter(e: Emitter, x: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim %= x.rank
    n = x.shape[dim]
    first = clamp_index(0 if start is None else start, n)
    last = maximum(clamp_index(LAST if end is None else end, n), first)
    src = e.cast(src, x.dtype)
    if step != 1:
        where = e.op("Range", e.number(first, i64), e.number(last, i64), e.number(step, i64))
        bent: list[Any] = [1] * x.rank
        bent[dim] = where.shape[0]
        moved = e.expand(e.reshape(where, bent), src.shape)
        return e.op("ScatterElements", x, moved, src, axis=dim)
    parts = []
    if first.op != "const" or first.attr > 0:
        parts.append(e.slice(x, dim, 0, first))
    parts.append(src)
    if last is not n:
        parts.append(e.slice(x, dim, last, LAST))
    return e.op("Concat", *parts, axis=dim) if len(parts) > 1 else src


@aten("select_scatter")
def select_scatter(e: Emitter, x: Value, src: Value, dim: int, index: Any) -> Value:
    dim %= x.rank
    if isinstance(index, int) and index < 0:
        index = x.shape[dim] + index
    return slice_scatter(e, x, e.reshape(src, [*src.shape[:dim], 1, *src.shape[dim:]]), dim, index, index + 1)


def inverse_of(name: str, e: Emitter, arguments: dict[str, Any]) -> Any:
    """How a write through a view of this operator is written to its base; None: by the positions of the elements."""
    if name in ("slice", "narrow"):
        a = dict(arguments)
        if "length" in a and a["length"] is not None:
            a["end"] = a.pop("start") + a.pop("length") if isinstance(a["start"], int) and a["start"] >= 0 else None
            if a["end"] is None:
                return None
            a["start"] = arguments["start"]
        return lambda base, new: slice_scatter(e, base, new, a.get("dim", 0), a.get("start"), a.get("end"), a.get("step", 1))
    if name == "select" and not isinstance(arguments["index"], Value):
        return lambda base, new: select_scatter(e, base, new, arguments["dim"], arguments["index"])
    if name in ("view", "unsqueeze", "squeeze", "flatten", "unflatten", "alias", "detach", "view_as", "ravel"):
        return lambda base, new: e.cast(e.reshape(new, base.shape), base.dtype)
    if name in ("permute", "transpose", "t"):
        def back(base: Value, new: Value) -> Value:
            r = base.rank
            if name == "permute":
                perm = [d % r for d in arguments["dims"]]
            else:
                a, b = (arguments.get("dim0", 0), arguments.get("dim1", 1)) if name == "transpose" else (0, max(r - 1, 0))
                perm = list(range(r))
                if r:
                    perm[a % r], perm[b % r] = perm[b % r], perm[a % r]
            return e.cast(e.transpose(new, [perm.index(k) for k in range(r)]), base.dtype)
        return back
    return None


def pieces(e: Emitter, x: Value, dim: int) -> tuple[Value, ...]:
    """Consecutive parts along ``dim``, as long as torch says that the results are."""
    if len(e.out) == 1:
        return (x,)
    lengths = [e.dims(o.shape)[dim] for o in e.out]
    return e.ops("Split", len(lengths), x, e.vector(lengths), axis=dim)


@view("split", "chunk", "split_with_sizes", "split_copy")
def split(e: Emitter, x: Value, dim: int = 0, **_: Any) -> tuple[Value, ...]:
    return pieces(e, x, dim % x.rank)


@view("tensor_split")
def tensor_split(e: Emitter, x: Value, dim: int = 0, **_: Any) -> tuple[Value, ...]:
    return pieces(e, x, dim % x.rank)


@view("hsplit")
def hsplit(e: Emitter, x: Value, **_: Any) -> tuple[Value, ...]:
    return pieces(e, x, 0 if x.rank == 1 else 1)


@view("vsplit")
def vsplit(e: Emitter, x: Value, **_: Any) -> tuple[Value, ...]:
    return pieces(e, x, 0)


@view("dsplit")
def dsplit(e: Emitter, x: Value, **_: Any) -> tuple[Value, ...]:
    return pieces(e, x, 2)


@view("unbind", "unbind_copy")
def unbind(e: Emitter, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim %= x.rank
    return tuple(e.op("Gather", x, e.const("index", np.array(k, np.int64)), axis=dim) for k in range(len(e.out)))


@view("linalg_diagonal")
def linalg_diagonal(e: Emitter, A: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    return diagonal(e, A, offset, dim1, dim2)


@view("diagonal")
def diagonal(e: Emitter, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    a, b = dim1 % x.rank, dim2 % x.rank
    y = e.transpose(x, [k for k in range(x.rank) if k not in (a, b)] + [a, b])
    n = e.shape[-1]
    k = e.op("Range", e.number(0, i64), e.number(n, i64), e.number(1, i64))
    rows = e.op("Add", k, e.number(max(-offset, 0), i64))
    columns = e.op("Add", k, e.number(max(offset, 0), i64))
    flat = e.reshape(y, [*y.shape[:-2], y.shape[-2] * y.shape[-1]])
    where = e.op("Add", e.op("Mul", rows, e.number(y.shape[-1], i64)), columns)
    return e.op("Gather", flat, where, axis=flat.rank - 1)


@view("as_strided", "as_strided_copy")
def as_strided(e: Emitter, x: Value, size: Sequence[Any], stride: Sequence[Any], storage_offset: Any = None) -> Value:
    where = e.number(0 if storage_offset is None else storage_offset, i64)
    for k, (n, s) in enumerate(zip(size, stride, strict=True)):
        steps = e.op("Mul", e.op("Range", e.number(0, i64), e.number(n, i64), e.number(1, i64)), e.number(s, i64))
        where = e.op("Add", where, e.reshape(steps, [n, *[1] * (len(size) - k - 1)]))
    return e.op("Gather", e.reshape(x, [-1]), e.expand(where, size), axis=0)


@view("unfold", "unfold_copy")
def unfold(e: Emitter, x: Value, dimension: int, size: int, step: int) -> Value:
    """Windows of ``size`` along a dimension, as a last dimension of their own."""
    if x.rank == 0:
        return e.reshape(x, [size])
    d = dimension % x.rank
    n = e.shape[d]
    first = e.reshape(e.op("Mul", e.op("Range", e.number(0, i64), e.number(n, i64), e.number(1, i64)), e.number(step, i64)), [n, 1])
    where = e.op("Add", first, e.vector(range(size)))
    y = e.op("Gather", x, where, axis=d)
    return e.transpose(y, [*range(d + 1), *range(d + 2, y.rank), d + 1])


# ---------------------------------------------------------------- joined, repeated, turned


@aten("cat")
def cat(e: Emitter, tensors: Sequence[Value], dim: int = 0) -> Value:
    shape = len(e.out.shape)
    parts = [e.cast(t, e.dtype) for t in tensors if not (t.rank == 1 and shape > 1)]
    return e.op("Concat", *parts, axis=dim % shape) if len(parts) > 1 else parts[0]


@aten("stack")
def stack(e: Emitter, tensors: Sequence[Value], dim: int = 0) -> Value:
    d = dim % len(e.out.shape)
    return e.op("Concat", *(e.reshape(e.cast(t, e.dtype), [*t.shape[:d], 1, *t.shape[d:]]) for t in tensors), axis=d)


def _joined(name: str, rank: int, axis: int, first: int) -> None:
    @aten(name)
    def rule(e: Emitter, tensors: Sequence[Value]) -> Value:
        raised = [e.reshape(t, _raised(t, rank, first)) for t in tensors]
        return e.op("Concat", *(e.cast(t, e.dtype) for t in raised), axis=axis if raised[0].rank > axis else 0)


def _raised(t: Value, rank: int, first: int) -> list[Any]:
    if t.rank >= rank:
        return list(t.shape)
    if rank == 3:
        return [1, 1, 1] if t.rank == 0 else [1, t.shape[0], 1] if t.rank == 1 else [*t.shape, 1]
    return [1] * (rank - t.rank) + list(t.shape) if first else [*t.shape, *[1] * (rank - t.rank)]


_joined("hstack", 1, 1, 1)
_joined("vstack", 2, 0, 1)
_joined("dstack", 3, 2, 1)


@aten("column_stack")
def column_stack(e: Emitter, tensors: Sequence[Value]) -> Value:
    columns = [e.reshape(t, [*t.shape, *[1] * (2 - t.rank)]) if t.rank < 2 else t for t in tensors]
    return e.op("Concat", *(e.cast(t, e.dtype) for t in columns), axis=1)


@aten("repeat", "tile")
def repeat(e: Emitter, x: Value, repeats: Sequence[Any] = (), dims: Sequence[Any] = ()) -> Value:
    times = list(repeats or dims)
    times = [1] * (x.rank - len(times)) + times
    lifted = e.reshape(x, [*[1] * (len(times) - x.rank), *x.shape])
    return e.op("Tile", lifted, e.vector(times)) if times else x


@aten("repeat_interleave")
def repeat_interleave(e: Emitter, x: Value, repeats: Any = None, dim: int | None = None, output_size: Any = None) -> Value:
    if repeats is None:  # the form that gives the indices of its one operand
        x, repeats = e.op("Range", e.number(0, i64), e.number(x.shape[0], i64), e.number(1, i64)), x
    if isinstance(repeats, Value) and repeats.data is not None and repeats.data.size == 1:
        repeats = int(repeats.data.reshape(-1)[0])
    if isinstance(repeats, Value):  # the k-th of the result is the element before whose end k lies
        x, d = (e.reshape(x, [-1]), 0) if dim is None else (x, dim % x.rank)
        times = e.expand(e.cast(e.reshape(repeats, [-1]), i64), [x.shape[d]])
        ends = e.op("CumSum", times, e.const("axis", np.array(0, np.int64)))
        size = e.reduce("ReduceSum", times, [0], False) if output_size is None else e.number(output_size, i64)
        k = e.op("Range", e.number(0, i64), size, e.number(1, i64))
        past = e.op("LessOrEqual", ends, e.reshape(k, [k.shape[0], 1]))
        return e.op("Gather", x, e.reduce("ReduceSum", e.cast(past, i64), [1], False), axis=d)
    if dim is None:
        x, dim = e.reshape(x, [-1]), 0
    d = dim % x.rank
    y = e.expand(e.reshape(x, [*x.shape[: d + 1], 1, *x.shape[d + 1 :]]), [*x.shape[: d + 1], repeats, *x.shape[d + 1 :]])
    return e.reshape(y, [*x.shape[:d], x.shape[d] * as_expr(repeats), *x.shape[d + 1 :]])


@aten("flip")
def flip(e: Emitter, x: Value, dims: Sequence[int] = ()) -> Value:
    axes = [d % x.rank for d in dims]
    if not axes:
        return x
    last = -LAST - 1
    return e.op("Slice", x, e.vector([-1] * len(axes)), e.vector([last] * len(axes)), e.vector(axes), e.vector([-1] * len(axes)))


@aten("fliplr")
def fliplr(e: Emitter, x: Value) -> Value:
    return flip(e, x, [1])


@aten("flipud")
def flipud(e: Emitter, x: Value) -> Value:
    return flip(e, x, [0])


@aten("roll")
def roll(e: Emitter, x: Value, shifts: Sequence[Any], dims: Sequence[int] = ()) -> Value:
    if not dims:
        return e.reshape(roll(e, e.reshape(x, [-1]), shifts, [0]), x.shape)
    for s, d in zip(shifts, dims, strict=True):
        d %= x.rank
        n = x.shape[d]
        if n.op == "const" and n.attr == 0:
            continue
        cut = (n - as_expr(s)) % n
        x = e.op("Concat", e.slice(x, d, cut, LAST), e.slice(x, d, 0, cut), axis=d)
    return x


@aten("rot90")
def rot90(e: Emitter, x: Value, k: int = 1, dims: Sequence[int] = (0, 1)) -> Value:
    a, b = dims[0] % x.rank, dims[1] % x.rank
    perm = list(range(x.rank))
    perm[a], perm[b] = b, a
    return [lambda: x, lambda: e.transpose(flip(e, x, [b]), perm), lambda: flip(e, x, [a, b]), lambda: e.transpose(flip(e, x, [a]), perm)][k % 4]()


def _triangle(name: str, upper: int) -> None:
    @aten(name)
    def rule(e: Emitter, x: Value, diagonal: int = 0) -> Value:
        return e.op("Trilu", x, e.const("diagonal", np.array(diagonal, np.int64)), upper=upper)

    @aten(f"{name}_indices")
    def indices(e: Emitter, row: int, col: int, offset: int = 0) -> Value:
        made = (torch.triu_indices if upper else torch.tril_indices)(row, col, offset)
        return e.const("indices", made.numpy().astype(np.int64 if e.out.dtype == torch.int64 else np.int32))


_triangle("tril", 0)
_triangle("triu", 1)


@aten("constant_pad_nd", "pad")
def pad(e: Emitter, x: Value, pad: Sequence[Any], mode: str = "constant", value: Any = 0) -> Value:
    """``pad`` counts from the last dimension: (before, after) of each."""
    pairs = [(pad[2 * k], pad[2 * k + 1]) for k in range(len(pad) // 2)][::-1]
    axes = list(range(x.rank - len(pairs), x.rank))
    if all(isinstance(p, int) and p == 0 for pair in pairs for p in pair):
        return x
    amounts = e.vector([b for b, _ in pairs] + [a for _, a in pairs])
    if mode == "circular" and any(isinstance(p, int) and p < 0 for p in pad):  # what is left turns around
        x = globals()["pad"](e, x, [min(p, 0) for p in pad])
        return globals()["pad"](e, x, [max(p, 0) for p in pad], mode)  # type: ignore[no-any-return]
    name = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    if x.dtype.is_bool:
        return e.cast(e.op("Pad", e.cast(x, D.u8), amounts, e.number(value or 0, D.u8), e.vector(axes), mode=name), D.boolean)
    return e.op("Pad", x, amounts, e.number(value or 0, x.dtype), e.vector(axes), mode=name)


def _padded(names: Sequence[str], mode: str) -> None:
    @aten(*names)
    def rule(e: Emitter, x: Value, padding: Sequence[Any] = (), pad: Sequence[Any] = ()) -> Value:
        return globals()["pad"](e, x, padding or pad, mode)


_padded(["reflection_pad1d", "reflection_pad2d", "reflection_pad3d"], "reflect")
_padded(["replication_pad1d", "replication_pad2d", "replication_pad3d"], "replicate")
_padded(["_pad_circular"], "circular")


@aten("pixel_shuffle")
def pixel_shuffle(e: Emitter, x: Value, upscale_factor: int) -> Value:
    r = upscale_factor
    *lead, c, h, w = x.shape
    y = e.reshape(x, [*lead, c // (r * r), r, r, h, w])
    k = len(lead)
    y = e.transpose(y, [*range(k), k, k + 3, k + 1, k + 4, k + 2])
    return e.reshape(y, [*lead, c // (r * r), h * r, w * r])


@aten("pixel_unshuffle")
def pixel_unshuffle(e: Emitter, x: Value, downscale_factor: int) -> Value:
    r = downscale_factor
    *lead, c, h, w = x.shape
    k = len(lead)
    y = e.transpose(e.reshape(x, [*lead, c, h // r, r, w // r, r]), [*range(k), k, k + 2, k + 4, k + 1, k + 3])
    return e.reshape(y, [*lead, c * (r * r), h // r, w // r])


@aten("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(e: Emitter, x: Value, groups: int) -> Value:
    b, c, *rest = x.shape
    y = e.reshape(x, [b, groups, c // groups, *rest])
    return e.reshape(e.transpose(y, [0, 2, 1, *range(3, y.rank)]), x.shape)


# ---------------------------------------------------------------- new tensors


@aten("full", "full_like", "new_full")
def full(e: Emitter, fill_value: Any, **_: Any) -> Value:
    return filled(e, fill_value)


def filled(e: Emitter, value: Any) -> Value:
    return e.expand(e.number(value, e.dtype), e.shape)


def _constant(names: Sequence[str], value: int) -> None:
    @aten(*names)
    def rule(e: Emitter, **_: Any) -> Value:
        return filled(e, value)


_constant(["zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "zero"], 0)
_constant(["ones", "ones_like", "new_ones"], 1)


@aten("scalar_tensor")
def scalar_tensor(e: Emitter, s: Any) -> Value:
    return e.number(s, e.dtype)


@aten("fill")
def fill(e: Emitter, x: Value, value: Any) -> Value:
    return e.expand(e.number(value, x.dtype), x.shape)


@aten("copy")
def copy(e: Emitter, x: Value, src: Value) -> Value:
    return e.expand(e.cast(src, x.dtype), x.shape)


@aten("arange")
def arange(e: Emitter, start: Any = 0, end: Any = None, step: Any = 1) -> Value:
    if all(isinstance(v, (int, float)) for v in (start, end, step)):
        return e.const("range", torch.arange(start, end, step, dtype=e.out.dtype).numpy() if e.dtype is not D.bf16 else None)
    kind = D.f64 if any(isinstance(v, float) for v in (start, end, step)) else i64
    return e.cast(e.op("Range", *(e.number(v, kind) for v in (start, end, step))), e.dtype)


@aten("arange.start_step")
def arange_(e: Emitter, start: Any, end: Any, step: Any = 1) -> Value:
    return arange(e, start, end, step)


@aten("linspace")
def linspace(e: Emitter, start: Any, end: Any, steps: int, base: float = 0) -> Value:
    if not isinstance(start, (int, float)) or not isinstance(end, (int, float)):
        a, b = e.cast(e.number(start, D.f64), D.f64), e.cast(e.number(end, D.f64), D.f64)
        part = e.const("parts", np.linspace(0, 1, steps))
        return e.cast(e.op("Add", a, e.op("Mul", part, e.op("Sub", b, a))), e.dtype)
    made = torch.logspace(start, end, steps, base, dtype=e.out.dtype) if base else torch.linspace(start, end, steps, dtype=e.out.dtype)
    return e.cast(e.const("space", made.double().numpy() if made.is_floating_point() else made.numpy()), e.dtype)


@aten("logspace")
def logspace(e: Emitter, start: Any, end: Any, steps: int, base: float = 10.0) -> Value:
    return linspace(e, start, end, steps, base)


@aten("eye")
def eye(e: Emitter, n: Any, m: Any = None) -> Value:
    return eye_of(e, *e.shape, e.dtype)


def eye_of(e: Emitter, rows: Any, columns: Any, dtype: D.DType) -> Value:
    k = e.op("Range", e.number(0, i64), e.number(rows, i64), e.number(1, i64))
    j = e.op("Range", e.number(0, i64), e.number(columns, i64), e.number(1, i64))
    return e.cast(e.op("Equal", e.reshape(k, [rows, 1]), j), dtype)


@aten("meshgrid")
def meshgrid(e: Emitter, tensors: Sequence[Value], indexing: str = "ij") -> tuple[Value, ...]:
    out = []
    for k, (t, o) in enumerate(zip(tensors, e.out, strict=True)):
        place = {0: 1, 1: 0}.get(k, k) if indexing == "xy" and len(e.out) > 1 else k
        shape: list[Any] = [1] * len(o.shape)
        shape[place] = t.shape[0] if t.rank else 1
        out.append(e.expand(e.reshape(t, shape), o.shape))
    return tuple(out)


@aten("diag_embed")
def diag_embed(e: Emitter, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    n = x.shape[-1] + abs(offset)
    k = e.op("Range", e.number(0, i64), e.number(n, i64), e.number(1, i64))
    on = e.op("Equal", e.op("Add", e.reshape(k, [n, 1]), e.number(offset, i64)), k)
    widths = [0] * (x.rank - 1)
    before = e.op("Pad", x, e.vector([*widths, max(offset, 0), *widths, max(-offset, 0)])) if offset else x
    y = e.op("Where", on, e.reshape(before, [*x.shape[:-1], 1, n]), e.number(0, x.dtype))
    r = y.rank
    a, b = dim1 % r, dim2 % r
    rest = iter(range(r - 2))
    return e.transpose(y, [r - 2 if k == a else r - 1 if k == b else next(rest) for k in range(r)])


@aten("diag")
def diag(e: Emitter, x: Value, diagonal: int = 0) -> Value:
    return diag_embed(e, x, diagonal) if x.rank == 1 else globals()["diagonal"](e, x, diagonal)


@aten("cartesian_prod")
def cartesian_prod(e: Emitter, tensors: Sequence[Value]) -> Value:
    if len(tensors) == 1:
        return tensors[0]
    columns = []
    for k, t in enumerate(tensors):
        shape: list[Any] = [1] * len(tensors)
        shape[k] = t.shape[0]
        columns.append(e.reshape(e.expand(e.reshape(t, shape), [u.shape[0] for u in tensors]), [-1, 1]))
    return e.op("Concat", *columns, axis=1)


@aten("broadcast_tensors")
def broadcast_tensors(e: Emitter, tensors: Sequence[Value]) -> tuple[Value, ...]:
    return tuple(e.expand(t, o.shape) for t, o in zip(tensors, e.out, strict=True))


def _at_least(rank: int) -> None:
    @view(f"atleast_{rank}d")
    def rule(e: Emitter, x: Value | None = None, tensors: Sequence[Value] | None = None) -> Any:
        if x is not None:
            return e.reshape(x, e.out.shape)
        assert tensors is not None
        return tuple(e.reshape(t, o.shape) for t, o in zip(tensors, e.out, strict=True))


for _r in (1, 2, 3):
    _at_least(_r)


@aten("block_diag")
def block_diag(e: Emitter, tensors: Sequence[Value]) -> Value:
    mats = [e.cast(e.reshape(t, [*[1] * (2 - t.rank), *t.shape]), e.dtype) for t in tensors]
    rows, done = [], as_expr(0)
    total = e.shape[1]
    for m in mats:
        rows.append(e.op("Pad", m, e.vector([0, done, 0, total - done - m.shape[1]]), e.number(0, m.dtype)))
        done = done + m.shape[1]
    return e.op("Concat", *rows, axis=0)

