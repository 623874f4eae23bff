"""What rules build with: nodes of the graph, element types and shapes as torch says them, and views that may be written to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind
from torch._prims_common import elementwise_dtypes

from luthier.importers.builder import GraphBuilder
from luthier.importers.torch.symbols import Symbols
from luthier.ir import dtypes as D
from luthier.ir.dtypes import DType, i64
from luthier.ir.errors import UnsupportedOperator
from luthier.ir.expr import Expr
from luthier.ir.graph import MAX_CONTENT, Node, TensorType, Value
from luthier.passes.graph.fold_constants import fold_node

__all__ = ["ALIASES", "DECOMPOSITIONS", "RULES", "VIEWS", "Emitter", "Kind", "Ref", "WRITERS", "alias", "array", "aten", "decomposed", "dtype_of", "view", "writer"]

DTYPES: dict[torch.dtype, DType] = {
    torch.float32: D.f32, torch.float64: D.f64, torch.float16: D.f16, torch.bfloat16: D.bf16, torch.int64: D.i64, torch.int32: D.i32,
    torch.int16: D.i16, torch.int8: D.i8, torch.uint8: D.u8, torch.uint16: D.u16, torch.uint32: D.u32, torch.uint64: D.u64,
    torch.bool: D.boolean, torch.float8_e4m3fn: D.f8e4m3fn, torch.float8_e4m3fnuz: D.f8e4m3fnuz, torch.float8_e5m2: D.f8e5m2,
    torch.float8_e5m2fnuz: D.f8e5m2fnuz,
}  # fmt: skip
TORCH_TYPES = {d: t for t, d in DTYPES.items()}
_BITS = {torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16), torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
         torch.float8_e4m3fnuz: (torch.uint8, ml_dtypes.float8_e4m3fnuz), torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
         torch.float8_e5m2fnuz: (torch.uint8, ml_dtypes.float8_e5m2fnuz)}  # fmt: skip

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
WRITERS: set[Rule] = set()  # rules that write to operands themselves, by the emitter's ``refs``
VIEWS: set[str] = set()  # operators whose result shares memory with their first operand
ALIASES: dict[str, str] = {}
DECOMPOSITIONS: dict[str, Callable[..., Any]] = {}  # operators written with others, before torch's own decompositions of them
# arguments that say where and how memory lies, which a compiled graph decides itself, and types, which results tell
IGNORED = {"memory_format", "layout", "device", "pin_memory", "non_blocking", "generator", "requires_grad", "copy", "sparse_grad", "dtype"}


def aten(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operators (``"add"``: all overloads, ``"pow.Scalar"``: one). A rule is called with the emitter and the
    arguments by their names in the schema; those that it does not name must have their defaults."""

    def wrap(rule: Rule) -> Rule:
        for n in names:
            RULES[n] = rule
        return rule

    return wrap


def writer(*names: str) -> Callable[[Rule], Rule]:
    """The same for operators that write to operands, by the emitter's ``refs``, besides giving results."""

    def wrap(rule: Rule) -> Rule:
        WRITERS.add(rule)
        return aten(*names)(rule)

    return wrap


def view(*names: str) -> Callable[[Rule], Rule]:
    """The same for operators that give views."""
    VIEWS.update(names)
    return aten(*names)


def decomposed(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of torch's that computes an ATen operator by others; it is traced for the operands of a use."""

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        DECOMPOSITIONS.update(dict.fromkeys(names, f))
        return f

    return wrap


def alias(**names: str) -> None:
    """Operators that mean another one: ``alias(absolute="abs")``."""
    ALIASES.update(names)


def dtype_of(t: torch.dtype) -> DType:
    """Raises UnsupportedOperator for types that no target has (complex, quantized)."""
    if t not in DTYPES:
        raise UnsupportedOperator(f"tensors of {t} are not supported", hint="complex numbers: keep real and imaginary parts apart (view_as_real)")
    return DTYPES[t]


def array(t: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's elements as numpy has them, without a copy where they are contiguous."""
    t = t.detach()
    dtype_of(t.dtype)
    if t.is_sparse or t.device.type == "meta":
        raise UnsupportedOperator("sparse tensors and tensors without data cannot be constants")
    t = t.cpu().contiguous()
    t = t.resolve_conj().resolve_neg()
    if t.dtype in _BITS:
        word, kind = _BITS[t.dtype]
        return t.view(word).numpy().view(kind)
    return t.numpy()


class Ref:
    """A tensor of the program. A view has a ``base``; writing to either is seen by the other."""

    def __init__(self, value: Value, base: Ref | None = None, again: Callable[[Value], Any] | None = None, example: Any = None) -> None:
        self.value, self.base, self.again, self.example = value, base, again, example
        self.version = 0  # of a root: writes so far
        self.seen = self.root.version

    @property
    def root(self) -> Ref:
        return self if self.base is None else self.base.root

    def behind(self) -> Ref:
        """Another tensor over the same memory, that this one may become a view of."""
        r = Ref(self.value, self.base, self.again, self.example)
        r.version, r.seen = self.version, self.seen
        return r

    def become(self, view: Ref) -> None:
        """This tensor takes another shape in place: its views go on seeing its memory."""
        self.value, self.base, self.again, self.seen = view.value, view.base, view.again, view.seen

    def read(self) -> Value:
        if self.base is not None and self.seen != self.root.version:
            assert self.again is not None
            self.value, self.seen = self.again(self.base.read()), self.root.version
        return self.value

    def write(self, e: Emitter, v: Value) -> None:
        if self.base is not None:
            assert self.again is not None
            self.base.write(e, e.put(self.base.read(), self.again, v))
        else:
            self.version += 1
        self.value, self.seen = v, self.root.version


class Emitter(GraphBuilder):
    """``out``: what torch says of the operator's result (a fake tensor, or several); ``where``: the line of the user that it came from."""

    def __init__(self, name: str, symbols: Symbols) -> None:
        super().__init__(name)
        self.symbols = symbols
        self.out: Any = None
        self.refs: dict[str, Any] = {}  # the operands of the operator by their names in its schema
        self.where = ""
        self.label = ""

    # ------------------------------------------------------------ nodes

    def ops(self, op: str, outputs: int, *inputs: Value | None, name: str = "", **attrs: Any) -> tuple[Value, ...]:
        """Nodes; those of constants are computed now where they are small."""
        outs = super().ops(op, outputs, *inputs, name=name or self.label, **attrs)
        n = self.nodes[-1]
        n.source = self.where
        if all(v is None or v.data is not None for v in n.inputs) and n.inputs and self._small(n):
            folded = fold_node(n)
            if folded is not None:
                self.nodes.pop()
                return tuple(Value.const(v.name, d) for v, d in zip(outs, folded, strict=True))
        return outs

    @staticmethod
    def _small(n: Node) -> bool:
        return all(s is not None and np.prod(s) <= 1 << 16 for s in (v.type.static_shape for v in n.outputs))

    def dims(self, sizes: Sequence[Any]) -> tuple[Expr, ...]:
        return tuple(s if isinstance(s, Expr) else self.symbols.expr(s) for s in sizes)

    def vector(self, items: Sequence[Any]) -> Value:
        """Integers, or index expressions, as a tensor of i64."""
        return self._content(self.dims(items), (len(items),))

    def _content(self, items: tuple[Expr, ...], shape: tuple[int, ...]) -> Value:
        if all(x.op == "const" for x in items):
            return self.const("ints", np.array([x.attr for x in items], np.int64).reshape(shape))
        assert len(items) <= MAX_CONTENT
        v = Value(self.names.fresh("sizes"), TensorType.of(i64, shape), content=items)
        self.nodes.append(Node("Content", (), (v,), {}, v.name, self.where))
        return v

    def number(self, x: Any, dtype: DType) -> Value:
        """A scalar: a Python number, an index expression, or a tensor of rank 0 of another type."""
        if isinstance(x, Value):
            return self.cast(x, dtype)
        if isinstance(x, Expr):
            return self.cast(self._content((x,), ()), dtype)
        return self.const("number", np.array(x).astype(_numpy(dtype)))

    def cast(self, v: Value, dtype: DType) -> Value:
        return v if v.dtype is dtype else self.op("Cast", v, to=dtype)

    def reshape(self, v: Value, shape: Sequence[Any]) -> Value:
        dims = self.dims(shape)
        if len(dims) == v.rank and all(a is b for a, b in zip(dims, v.shape, strict=True)):
            return v
        return self.op("Reshape", v, self.vector(dims), allowzero=1)

    def transpose(self, v: Value, perm: Sequence[int]) -> Value:
        return v if list(perm) == list(range(v.rank)) else self.op("Transpose", v, perm=tuple(perm))

    def expand(self, v: Value, shape: Sequence[Any]) -> Value:
        dims = self.dims(shape)
        if len(dims) == v.rank and all(a is b for a, b in zip(dims, v.shape, strict=True)):
            return v
        return self.op("Expand", v, self.vector(dims))

    def slice(self, v: Value, axis: int, start: Any, end: Any, step: int = 1) -> Value:
        return self.op("Slice", v, self.vector([start]), self.vector([end]), self.vector([axis]), self.vector([step]))

    def reduce(self, op: str, v: Value, axes: Sequence[int] | None, keep: bool) -> Value:
        if v.rank == 0:
            return v if op != "ReduceSumSquare" else self.op("Mul", v, v)
        which = list(range(v.rank)) if not axes and axes is not None or axes is None else [a % v.rank for a in axes]
        return self.op(op, v, self.vector(which), keepdims=int(keep))

    # ------------------------------------------------------------ types

    @property
    def dtype(self) -> DType:
        """Of the (first) result."""
        first = self.out[0] if isinstance(self.out, (tuple, list)) else self.out
        return dtype_of(first.dtype)

    @property
    def shape(self) -> tuple[Expr, ...]:
        return self.symbols.dims(self.out.shape)

    def promoted(self, kind: Kind, *args: Any) -> list[Value]:
        """Operands in the type of the result, or that comparisons are made in; numbers become scalars."""
        examples = [self.example(a) if isinstance(a, Value) else 1 if isinstance(a, Expr) else a for a in args]
        dtype = dtype_of(elementwise_dtypes(*examples, type_promotion_kind=kind)[0 if kind is Kind.ALWAYS_BOOL else 1])
        return [self.number(a, dtype) for a in args]

    def example(self, v: Value) -> Any:
        """What torch's rules of promotion read of a value: its type and rank."""
        return torch.empty((1,) * v.rank, dtype=TORCH_TYPES[v.dtype], device="meta")

    # ------------------------------------------------------------ views

    def put(self, base: Value, again: Callable[[Value], Any], new: Value) -> Value:
        """``base`` with the elements that the view shows replaced by ``new``."""
        inverse = getattr(again, "inverse", None)
        if inverse is not None and (done := inverse(base, new)) is not None:
            return done  # type: ignore[no-any-return]
        count = self.op("Size", base) if base.type.static_shape is None else self.number(int(np.prod(base.type.static_shape)), i64)
        flat = self.op("Range", self.number(0, i64), count, self.number(1, i64))
        where = self.reshape(again(self.reshape(flat, base.shape)), [-1])
        return self.reshape(self.op("ScatterElements", self.reshape(base, [-1]), where, self.reshape(self.cast(new, base.dtype), [-1]), axis=0), base.shape)


def _numpy(dtype: DType) -> Any:
    t = TORCH_TYPES[dtype]
    return _BITS[t][1] if t in _BITS else torch.empty((), dtype=t).numpy().dtype


def call_rule(e: Emitter, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The rule of an operator on its arguments. Raises UnsupportedOperator when there is none, or for an argument that it does not know."""
    rule, name = find_rule(target)
    if rule is None:
        raise UnsupportedOperator(f"the operator {target} has no rule", op=str(target), hint="decompose it before the export, or write it with others")
    schema = target._schema
    given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
    known = inspect.signature(rule).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    full: dict[str, Any] = {}
    for a in schema.arguments:
        v = given.get(a.name, a.default_value if a.has_default_value() else None)
        key = {"self": "x", "input": "x"}.get(a.name, a.name)
        if key in known or takes_all:
            full[key] = v
        elif a.name in given and v != (a.default_value if a.has_default_value() else None) and a.name not in IGNORED:
            raise UnsupportedOperator(f"{target} with {a.name}={v!r} is not supported", op=str(target))
    return rule(e, **full)


def find_rule(target: Any) -> tuple[Rule | None, str]:
    """The rule of an overload, and its name without a trailing underscore of operators in place."""
    space, _, full = target.name().partition("::")
    packet, _, overload = full.partition(".")
    prefix = "" if space == "aten" else f"{space}::"
    if packet.endswith("_") and not packet.startswith("__") and not packet.endswith("__"):
        packet = packet[:-1]
    elif packet.startswith("__i") and packet.endswith("__"):
        packet = "__" + packet[3:]
    packet = prefix + ALIASES.get(packet, packet)
    return RULES.get(f"{packet}.{overload}") or RULES.get(packet), packet
