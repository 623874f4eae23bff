"""What operator families share: attribute and shape checks, broadcasting by index expressions, symbolic contents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from luthier.ir import dtypes as D
from luthier.ir.compute import Axis, Compute, Fold, LetStmt, Pull, Push, axis, let_exprs
from luthier.ir.dtypes import DType, f32, index
from luthier.ir.errors import ShapeError, TypeMismatch, UnsupportedOperator
from luthier.ir.expr import Expr, as_expr, cast, const, free_vars, land, load, prove, select, var, walk
from luthier.ir.graph import MAX_CONTENT, Node, TensorType, Value
from luthier.ir.loop import Buffer
from luthier.ir.op import REGISTRY, Op
from luthier.ir.requirements import assume_at_least, assume_at_most, assume_broadcast, assume_equal

Array = np.ndarray[Any, Any]
Shape = tuple[Expr, ...]
ZERO, ONE = const(0), const(1)

# element types as ONNX numbers them (attributes `to`, `dtype`)
ELEMENT_TYPES: dict[int, DType] = {
    1: D.f32, 2: D.u8, 3: D.i8, 4: D.u16, 5: D.i16, 6: D.i32, 7: D.i64, 8: D.string, 9: D.boolean, 10: D.f16, 11: D.f64, 12: D.u32,
    13: D.u64, 16: D.bf16, 17: D.f8e4m3fn, 18: D.f8e4m3fnuz, 19: D.f8e5m2, 20: D.f8e5m2fnuz, 21: D.u4, 22: D.i4, 23: D.f4e2m1, 24: D.f8e8m0,
    25: D.u2, 26: D.i2,
}  # fmt: skip


LONGEST = 1 << 24  # elements that a window may span; with padding as the window wants it nothing else bounds its work


def register(name: str, instance: Op) -> None:
    """Register an operator instance (families that are tables of instances rather than classes)."""
    instance.name = name
    REGISTRY[name] = instance


def element_type(node: Node, code: Any) -> DType:
    """The type that attribute ``to`` or ``dtype`` names (ONNX number or DType). Raises UnsupportedOperator."""
    if isinstance(code, DType):
        return code
    d = ELEMENT_TYPES.get(int(code))
    if d is None or d is D.string:
        raise UnsupportedOperator(f"element type number {code} is not supported", node=node.name, op=node.op)
    return d


def shape_error(node: Node, message: str, hint: str | None = None) -> ShapeError:
    """A ShapeError that names the node and the shapes of its inputs."""
    shapes = {v.name: tuple(v.shape) for v in node.inputs if v is not None}
    return ShapeError(message, node=node.name, op=node.op, shapes=shapes, hint=hint)


def type_error(node: Node, message: str) -> TypeMismatch:
    types = ", ".join(f"{v.name} {v.dtype}" for v in node.inputs if v is not None)
    return TypeMismatch(f"{message} (inputs: {types})", node=node.name, op=node.op)


def unsupported(node: Node, message: str, hint: str | None = None) -> UnsupportedOperator:
    return UnsupportedOperator(message, node=node.name, op=node.op, hint=hint)


def need(node: Node, i: int) -> Value:
    """Input ``i``. Raises ShapeError when it was left out."""
    v = node.input(i)
    if v is None:
        raise shape_error(node, f"input {i} is missing")
    return v


def expect_shape(node: Node, i: int, shape: Sequence[Expr | int]) -> None:
    """Input ``i``, where it is given, has this shape. Raises ShapeError; extents that only a run knows are checked then."""
    v = node.input(i)
    want = tuple(as_expr(s) for s in shape)
    if v is not None and (v.rank != len(want) or any(differ(a, b) for a, b in zip(v.shape, want, strict=True))):
        raise shape_error(node, f"input {i} ({v.name}) has the shape {list(v.shape)}, it should have {list(want)}")


def expect_one(node: Node, *which: int) -> None:
    """Inputs ``which``, where they are given, have one element. Raises ShapeError; extents that only a run knows are checked
    then."""
    for i in which:
        v = node.input(i)
        if v is not None:
            expect_shape(node, i, [1] * v.rank)


def get(ins: Sequence[Buffer | None], i: int) -> Buffer | None:
    return ins[i] if i < len(ins) else None


def must(ins: Sequence[Buffer | None], i: int) -> Buffer:
    b = get(ins, i)
    assert b is not None, f"input {i} is missing"
    return b


def padded(arrays: Sequence[Any], n: int) -> list[Any]:
    """The arguments of a ``reference`` with None for the ``n - len`` optional ones that were left out."""
    return [*arrays, *[None] * (n - len(arrays))]


def check_axis(node: Node, a: int, rank: int, what: str = "axis") -> int:
    """``a`` in 0 .. rank - 1 (negative counts from the end). Raises ShapeError."""
    a = int(a)
    if not -rank <= a < max(rank, 1):
        raise shape_error(node, f"{what} {a} is out of range for rank {rank}")
    return a + rank if a < 0 else a


def dimension(node: Node, a: Expr, rank: int, count: int | None = None) -> Expr:
    """The dimension that an operand names, counted from the front: one of ``count`` (all where it is left out) of ``rank``.
    Raises ShapeError; what only a run knows is checked then."""
    if rank == 0:
        raise shape_error(node, f"{node.op} along an axis takes no scalar")
    last = rank - 1 if count is None else count - 1
    if a.op == "const":
        k = check_axis(node, a.attr, rank)
        if k > last:
            raise shape_error(node, f"axis {k} is out of range, the last one that counts is {last}")
        return const(k)
    assume_at_least(a, const(-rank), "an axis and the least possible")
    assume_at_most(a, const(last), "an axis and the last one")
    return select(a < 0, a + rank, a)


def window_size(node: Node, name: str, square: bool = False) -> int:
    """Attribute ``name``: the elements of a window (``square``: along each of two axes). Raises ShapeError when that is none, or
    more than LONGEST."""
    n = int(node.attrs.get(name, 0))
    if n < 1 or (n * n if square else n) > LONGEST:
        raise shape_error(node, f"{name} is {n}; a window holds at least 1 and at most {LONGEST} elements")
    return n


def const_value(v: Value | None) -> Any:
    """The Python value of a one-element constant, else None."""
    if v is None or v.data is None or v.data.size != 1:
        return None
    x = v.data.reshape(-1)[0]
    return x.item() if v.data.dtype.kind in "fiub" else float(x)


def is_one(e: Expr) -> bool:
    return e.op == "const" and e.attr == 1


def same(a: Expr, b: Expr) -> bool:
    """Provably equal."""
    return a is b or prove((a - b).eq(0))


def differ(a: Expr, b: Expr) -> bool:
    """Provably unequal. Where that is not known, every run checks that they are equal."""
    if a is b:
        return False
    if prove(a.ne(b)):
        return True
    assume_equal(a, b)
    return False


def broadcast_dim(a: Expr, b: Expr) -> Expr | None:
    """The extent that ``a`` and ``b`` broadcast to; None when they cannot."""
    if same(a, b) or is_one(b):
        return a
    if is_one(a):
        return b
    if a.op == "const" and b.op == "const":
        return None
    assume_broadcast(a, b)
    if a.op == "const":
        return a
    if b.op == "const":
        return b
    if clipped(a, b):
        return b
    if clipped(b, a):
        return a
    return select(a.eq(1), b, a)


def clipped(a: Expr, b: Expr) -> bool:
    """``a`` is min(b, c) with a constant c above 1: where the two broadcast at all they are equal."""
    return a.op == "min" and b in a.args and any(x.op == "const" and x.attr > 1 for x in a.args)


def broadcast(node: Node, *shapes: Shape) -> Shape:
    """Numpy's broadcasting on symbolic shapes. A symbol against a constant other than 1 gives the constant.

    Raises ShapeError."""
    out: Shape = ()
    for s in shapes:
        n = max(len(out), len(s))
        x, y = (ONE,) * (n - len(out)) + out, (ONE,) * (n - len(s)) + tuple(s)
        dims = []
        for a, b in zip(x, y, strict=True):
            d = broadcast_dim(a, b)
            if d is None:
                raise shape_error(node, f"cannot broadcast extent {a!r} against {b!r}")
            dims.append(d)
        out = tuple(dims)
    return out


def axes_of(shape: Iterable[Any], prefix: str = "i") -> tuple[Axis, ...]:
    """One axis a dimension: ``i0``, ``i1`` ..."""
    return tuple(axis(f"{prefix}{k}", s) for k, s in enumerate(shape))


def bcast_index(shape: Shape, axes: Sequence[Axis]) -> tuple[Expr, ...]:
    """Indices into a tensor of ``shape`` for a point of ``axes`` that it is broadcast to, aligned at the right."""
    out = []
    for s, a in zip(shape, axes[len(axes) - len(shape) :], strict=True):
        if is_one(s):
            out.append(ZERO)
        elif s.op == "const" or same(s, a.extent) or clipped(s, a.extent):
            out.append(a.var)
        else:
            out.append(select(s.eq(1), ZERO, a.var))
    return tuple(out)


def at(buf: Buffer, axes: Sequence[Axis]) -> Expr:
    """``buf`` read at a point of ``axes``, broadcast. Where an extent is only assumed to fit, the access is masked."""
    mask = land(*(a.var < s for s, a in zip(buf.shape, axes[len(axes) - buf.rank :], strict=True) if clipped(s, a.extent)))
    return load(buf, bcast_index(buf.shape, axes), mask)


def operand(node: Node, i: int, ins: Sequence[Buffer | None], axes: Sequence[Axis]) -> Expr:
    """Input ``i`` at a point of ``axes``, broadcast; without axes its one element. A one-element constant becomes a number in the
    expression."""
    b = must(ins, i)
    v = node.input(i)
    x = const_value(v)
    if x is not None and v is not None and b.dtype.bits >= 8 and inlines_scalar(node, x):
        return const(x, b.dtype)
    return at(b, axes) if axes else load(b, [ZERO] * b.rank)


def inlines_scalar(node: Node, value: Any) -> bool:
    """Round constants (0, 3, 0.5, -inf) become part of the kernel. Learned ones and quantization parameters differ from layer to
    layer: they stay parameters, so that layers share a kernel."""
    if node.op in ("QuantizeLinear", "DequantizeLinear") or node.attrs.get("keep_scalars", False):
        return False
    x = float(value)
    return node.op in ("Clip", "Pow") or not np.isfinite(x) or (x * 64 == int(x * 64) and abs(x) <= 1 << 20)


def wide(d: DType) -> DType:
    """The type to compute in: f32 for narrow floats, else ``d`` itself."""
    return f32 if d.is_float and d.bits < 32 else d


def widen(e: Expr) -> Expr:
    return cast(e, wide(e.dtype))


def make(node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer], lets: Iterable[LetStmt]) -> Compute:
    """A Compute whose dims are the symbols that its shapes and expressions mention."""
    params: list[Buffer] = []
    for b in ins:
        if b is not None and all(p.name != b.name for p in params):
            params.append(b)
    return finish(outs[0].name, params, outs, tuple(lets))


def finish(name: str, params: Sequence[Buffer], outs: Sequence[Buffer], lets: tuple[LetStmt, ...]) -> Compute:
    bound: set[Expr] = set()
    used: set[Expr] = set()

    def see(e: Expr) -> None:
        used.update(free_vars(e))
        for x in walk(e):
            if x.op == "reduce":
                for a in x.attr[1]:
                    used.update(free_vars(a.extent))

    def see_axes(axes: Iterable[Axis]) -> None:
        for a in axes:
            bound.add(a.var)
            used.update(free_vars(a.extent))

    for b in params:
        for s in b.shape:
            see(s)
    for x in lets:
        for e in let_exprs(x):
            see(e)
        if isinstance(x, Push):
            see_axes(x.over)
        see_axes(x.axes)
        if isinstance(x, Fold):
            see_axes((x.axis,))
            for s in x.state:
                see_axes(s.axes)
            for p in (*x.step, *x.emit):
                see_axes(p.axes)
    dims = sorted(used - bound, key=lambda v: v.key)
    return Compute(name, tuple(params), tuple(dims), lets, tuple(b.name for b in outs))


def define(out: Buffer, axes: Sequence[Axis], e: Expr) -> Pull:
    """``out[axes] = e``, converted to the type of ``out``."""
    return Pull(out, tuple(axes), cast(e, out.dtype))


def temp(out: Buffer, suffix: str, axes: Sequence[Axis], e: Expr) -> Pull:
    """An intermediate tensor named after ``out``."""
    from luthier.ir.compute import pull

    return pull(f"{out.name}.{suffix}", axes, e)


# ---------------------------------------------------------------- symbolic contents


def contents(node: Node, *which: int) -> list[Array] | None:
    """Contents of inputs ``which`` (all when none is given) as object arrays of index expressions, if all are known."""
    out = []
    for i in which or range(len(node.inputs)):
        v = node.input(i)
        s = None if v is None else v.type.static_shape
        if v is None or s is None or v.content is None:
            return None
        a = np.empty(len(v.content), object)
        a[:] = v.content
        out.append(a.reshape(s))
    return out


def map_content(node: Node, fn: Callable[..., Any], *which: int) -> list[tuple[Expr, ...] | None] | None:
    """``fn`` applied element by element to the (broadcast) contents of the inputs."""
    if not (node.outputs[0].dtype.is_int or node.outputs[0].dtype.is_bool):
        return None
    arrays = contents(node, *which)
    if arrays is None:
        return None
    if max(int(np.prod(np.broadcast_shapes(*(a.shape for a in arrays)))), 1) > MAX_CONTENT:
        return None
    full = np.broadcast_arrays(*arrays)
    return [tuple(as_expr(fn(*p)) for p in zip(*(a.reshape(-1) for a in full), strict=True))]


def flag(cond: Expr) -> Expr:
    """A condition as 0 or 1 in index arithmetic."""
    return select(cond, ONE, ZERO)


def object_content(a: Array) -> list[tuple[Expr, ...] | None] | None:
    """Content from an object array, when it is small enough."""
    return [tuple(as_expr(x) for x in a.reshape(-1))] if a.size <= MAX_CONTENT else None


def to_index(e: Expr) -> Expr:
    return cast(e, index)


def like(t: TensorType, shape: Iterable[Any]) -> TensorType:
    return TensorType.of(t.dtype, shape)


def static(node: Node, e: Expr, what: str) -> int:
    """A dimension that must be a constant. Raises ShapeError."""
    if e.op != "const":
        raise shape_error(node, f"{what} must be a constant, it is {e!r}", hint="pin the dimension with shapes= or --shape")
    return int(e.attr)


def known_array(v: Value | None) -> Array | None:
    """The elements of a value when they are known at compile time."""
    if v is None:
        return None
    if v.data is not None:
        return v.data
    c, s = v.content, v.type.static_shape
    if c is None or s is None or not all(e.op == "const" for e in c):
        return None
    return np.array([e.attr for e in c], v.dtype.numpy).reshape(s)


def moved(op: Op, node: Node) -> list[tuple[Expr, ...] | None] | None:
    """Contents of the outputs of an operator that only moves elements: its numpy reference on arrays of expressions."""
    first = contents(node, 0)
    if first is None:
        return None
    rest = [known_array(v) for v in node.inputs[1:]]
    if any(a is None and v is not None for a, v in zip(rest, node.inputs[1:], strict=True)):
        return None
    sizes = [v.type.static_shape for v in node.outputs]
    if any(s is None or int(np.prod(s)) > MAX_CONTENT for s in sizes):
        return None
    return [tuple(as_expr(x) for x in np.asarray(a).reshape(-1)) for a in op.reference(node, first[0], *rest)]


def product(dims: Iterable[Expr]) -> Expr:
    out = ONE
    for d in dims:
        out = out * d
    return out


def flat_position(axes: Sequence[Axis]) -> Expr:
    """Row-major position of a point."""
    pos = ZERO
    for a in axes:
        pos = pos * a.extent + a.var
    return pos


def unravel(pos: Expr, shape: Sequence[Expr]) -> list[Expr]:
    """Coordinates of row-major position ``pos`` (known to be inside) in ``shape``."""
    out: list[Expr] = []
    for s in reversed(shape[1:]):
        out.append(pos % s)
        pos = pos // s
    return [pos, *reversed(out)] if shape else []


def reindex(src: Shape, axes: Sequence[Axis]) -> tuple[Expr, ...]:
    """Coordinates in a tensor of shape ``src`` of the element at the same row-major position as a point of ``axes``.

    Extents that match between the two shapes keep their own index; only what was merged or split is divided."""
    out: list[Expr] = [ZERO] * len(src)
    left = [k for k, s in enumerate(src) if not is_one(s)]
    right = [a for a in axes if not is_one(a.extent)]
    while left:
        di, dj = _group(src, left, right)
        for k, e in zip(left[:di], unravel(flat_position(right[:dj]), [src[k] for k in left[:di]]), strict=True):
            out[k] = e
        left, right = left[di:], right[dj:]
    return tuple(out)


def _group(src: Shape, left: list[int], right: list[Axis]) -> tuple[int, int]:
    """The smallest leading runs of source dimensions and of axes with provably equal products."""
    for total in range(2, len(left) + len(right)):
        for di in range(1, total):
            dj = total - di
            if di <= len(left) and 1 <= dj <= len(right):
                if same(product(src[k] for k in left[:di]), product(a.extent for a in right[:dj])):
                    return di, dj
    return len(left), len(right)


def ceil_div(a: Expr, b: Expr | int) -> Expr:
    """Rounded up, for either sign of ``b``."""
    return ZERO - (ZERO - a) // b


def pinned(node: Node, arrays: Sequence[Any]) -> Node:
    """``node`` with its inputs' types taken from arrays: references use it where they reason about shapes."""
    ins = tuple(None if a is None or v is None else Value(v.name, TensorType.of(v.dtype, np.shape(a)), np.asarray(a)) for v, a in zip(node.inputs, arrays, strict=False))
    return Node(node.op, ins, node.outputs, node.attrs, node.name, node.source)


def float_content(node: Node, i: int) -> tuple[Expr, ...]:
    """The elements of a small float input as scalars: constants, or symbols of its (widened) type that the program reads from the
    tensor before it runs the node. Raises ShapeError when their number is unknown or above 64."""
    v = need(node, i)
    t = wide(v.dtype)
    if v.data is not None:
        return tuple(const(float(x), t) for x in v.data.reshape(-1))
    if v.content is not None:
        return tuple(cast(e, t) for e in v.content)
    n = product(v.shape)
    if n.op != "const" or n.attr > MAX_CONTENT:
        raise shape_error(node, f"input {i} ({v.name}) decides a shape: it must have a known number of elements, at most {MAX_CONTENT}")
    v.content = tuple(var(f"{v.name}.{k}", t) for k in range(n.attr))
    v.bound = True
    return v.content
