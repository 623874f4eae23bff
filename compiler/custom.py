"""Custom operators: a Python function that states the mathematics becomes an operator like any other.

>>> import luthier
>>> from luthier import custom as lc
>>> @luthier.op("example::swiglu")
... def swiglu(x, gate, *, beta=1.0):
...     return x * gate * lc.sigmoid(beta * gate)

The function is called with :class:`Tensor` objects that stand for its inputs and returns one Tensor. It may use operators (``+ - * /
** < <=``, with numpy's broadcasting), the functions of this module, reductions (``sum``, ``mean``, ``max``, ``min``, ``prod``), and index
notation: ``compute(shape, lambda i, j: x[i, j] - x[i, 0])`` with ``sum_over(extent, lambda k: ...)`` inside. Keyword arguments are
the node's attributes. Calling the operator on numpy arrays compiles it for this CPU; in an ONNX model it is a node of the custom
domain and is fused with its neighbours.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.errors import InputError, ShapeError, TypeMismatch
from luthier.ir.compute import Axis, Compute, LetStmt, Pull, axis, reduce_
from luthier.ir.dtypes import DType, f32, from_numpy
from luthier.ir.expr import Expr, as_expr, binary, cast, const, load, select, unary
from luthier.ir.expr import maximum as _max
from luthier.ir.expr import minimum as _min
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.interpret.computes import evaluate
from luthier.ir.loop import Buffer
from luthier.ir.op import REGISTRY, Op, load_all
from luthier.ir.ops.common import broadcast_dim, define, finish

__all__ = [
    "op", "Tensor", "compute", "sum_over", "max_over", "sum", "mean", "max", "min", "prod", "exp", "log", "tanh", "sigmoid", "erf", "sqrt",
    "sin", "cos", "abs", "floor", "ceil", "maximum", "minimum", "where", "astype",
]  # fmt: skip

Index = tuple[Expr, ...]


class _Trace:
    """What one call of the function has built: tensors that must be stored, and whether it did more than pointwise work."""

    def __init__(self, name: str) -> None:
        self.name, self.kind, self.count = name, "elementwise", 0
        self.lets: list[LetStmt] = []

    def axes(self, shape: Sequence[Expr]) -> tuple[Axis, ...]:
        self.count += 1
        return tuple(axis(f"c{self.count}_{k}", n) for k, n in enumerate(shape))

    def store(self, shape: Sequence[Expr], at: Callable[[Index], Expr]) -> Tensor:
        ax = self.axes(shape)
        e = at(tuple(a.var for a in ax))
        b = Buffer(f"{self.name}.c{self.count}", e.dtype, tuple(shape), "global")
        self.lets.append(Pull(b, ax, e))
        return Tensor(self, tuple(shape), e.dtype, lambda ix: load(b, ix))


class Tensor:
    """A tensor inside a custom operator. ``shape``: index expressions; ``dtype``: element type. Use it in arithmetic or index it."""

    __array_ufunc__ = None  # numpy scalars on the left leave arithmetic to us

    def __init__(self, trace: _Trace, shape: tuple[Expr, ...], dtype: DType, at: Callable[[Index], Expr]) -> None:
        self.trace, self.shape, self.dtype, self.at = trace, shape, dtype, at

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __getitem__(self, idx: Any) -> Expr:
        """One element, inside index notation. Raises ShapeError for a wrong number of indices."""
        ix = idx if isinstance(idx, tuple) else (idx,)
        if len(ix) != self.rank:
            raise ShapeError(f"{len(ix)} indices for a tensor of rank {self.rank}", hint="give one index for each axis")
        self.trace.kind = "injective" if self.trace.kind == "elementwise" else self.trace.kind
        return self.at(tuple(as_expr(i) for i in ix))

    def __add__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: a + b, self, o)

    def __radd__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: b + a, self, o)

    def __sub__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: a - b, self, o)

    def __rsub__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: b - a, self, o)

    def __mul__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: a * b, self, o)

    def __rmul__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: b * a, self, o)

    def __truediv__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: a / b, self, o)

    def __rtruediv__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: b / a, self, o)

    def __pow__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: a * a if b.op == "const" and b.attr == 2 else binary("pow", a, b), self, o)

    def __neg__(self) -> Tensor:
        return _pointwise(lambda a: -a, self)

    def __lt__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: a < b, self, o)

    def __le__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: a <= b, self, o)

    def __gt__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: b < a, self, o)

    def __ge__(self, o: Any) -> Tensor:
        return _pointwise(lambda a, b: b <= a, self, o)


def _pointwise(fn: Callable[..., Expr], *args: Any) -> Tensor:
    """``fn`` on elements, with numpy's broadcasting; Python numbers take the type of the tensors."""
    ts = [a for a in args if isinstance(a, Tensor)]
    if not ts:
        raise TypeMismatch("a function of luthier.custom needs at least one tensor", hint="use math or numpy on plain numbers")
    types = {t.dtype for t in ts if not t.dtype.is_bool} or {ts[0].dtype}
    if len(types) > 1:
        raise TypeMismatch(f"element types differ: {', '.join(sorted(map(str, types)))}", hint="convert with luthier.custom.astype")
    d = types.pop()
    rank = builtin_max(t.rank for t in ts)
    shape: list[Expr] = []
    for k in range(rank):
        n: Expr = const(1)
        for t in ts:
            if k >= rank - t.rank:
                r = broadcast_dim(n, t.shape[k - rank + t.rank])
                if r is None:
                    raise ShapeError("shapes do not broadcast", shapes=[tuple(x.shape) for x in ts])
                n = r
        shape.append(n)

    def at(ix: Index) -> Expr:
        vals = []
        for a in args:
            if not isinstance(a, Tensor):
                vals.append(const(a, d))
                continue
            own = ix[len(ix) - a.rank :]
            vals.append(a.at(tuple(const(0) if n.op == "const" and n.attr == 1 else i if n is m else select(n.eq(1), const(0), i)
                                   for i, n, m in zip(own, a.shape, shape[rank - a.rank :], strict=True))))  # fmt: skip
        return fn(*vals)

    probe = at(tuple(const(0) for _ in shape))
    return Tensor(ts[0].trace, tuple(shape), probe.dtype, at)


builtin_max = max


def _unary(name: str) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        return _pointwise(lambda a: unary(name, a), x)

    f.__name__ = name
    f.__doc__ = f"``{name}`` of every element."
    return f


exp, log, tanh, sigmoid, erf, sqrt = (_unary(n) for n in ("exp", "log", "tanh", "sigmoid", "erf", "sqrt"))
sin, cos, abs, floor, ceil = (_unary(n) for n in ("sin", "cos", "abs", "floor", "ceil"))


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of two elements (``b`` when either is NaN)."""
    return _pointwise(_max, a, b)


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of two elements (``b`` when either is NaN)."""
    return _pointwise(_min, a, b)


def where(cond: Tensor, a: Any, b: Any) -> Tensor:
    """``a`` where ``cond`` holds, else ``b``."""
    return _pointwise(select, cond, a, b)


def astype(x: Tensor, dtype: Any) -> Tensor:
    """Elements converted to a numpy dtype or a luthier DType."""
    d = dtype if isinstance(dtype, DType) else from_numpy(dtype)
    return _pointwise(lambda a: cast(a, d), x)


def compute(shape: Sequence[Any], fn: Callable[..., Expr]) -> Tensor:
    """Index notation: the tensor whose element at (i, j, ..) is ``fn(i, j, ..)``. ``shape``: numbers or extents of other tensors.

    The indices are integer expressions; elements of tensors are read with ``x[i, j]``. Only inside a custom operator."""
    tr = _current()
    tr.kind = "injective" if tr.kind == "elementwise" else tr.kind
    dims = tuple(as_expr(n) for n in shape)
    probe = fn(*(a.var for a in tr.axes(dims)))
    if not isinstance(probe, Expr):
        raise TypeMismatch(f"index notation must give one element, not {type(probe).__name__}")

    def at(ix: Index) -> Expr:
        _traces.append(tr)  # sums inside are traced when the element is asked for
        try:
            return fn(*ix)
        finally:
            _traces.pop()

    return Tensor(tr, dims, probe.dtype, at)


def _over(monoid: str, extent: Any, fn: Callable[[Expr], Expr]) -> Expr:
    tr = _current()
    tr.kind = "reduction"
    (k,) = tr.axes((as_expr(extent),))
    return reduce_(monoid, (k,), fn(k.var))


def sum_over(extent: Any, fn: Callable[[Expr], Expr]) -> Expr:
    """Inside index notation: the sum of ``fn(k)`` for k below ``extent``."""
    return _over("sum", extent, fn)


def max_over(extent: Any, fn: Callable[[Expr], Expr]) -> Expr:
    """Inside index notation: the largest ``fn(k)`` for k below ``extent``."""
    return _over("max", extent, fn)


def _reduce(monoid: str, x: Tensor, axis_: int | Sequence[int] | None, keepdims: bool) -> Tensor:
    x.trace.kind = "reduction"
    which = range(x.rank) if axis_ is None else (axis_,) if isinstance(axis_, int) else axis_
    red = sorted({a + x.rank if a < 0 else a for a in which})
    if any(not 0 <= a < x.rank for a in red):
        raise ShapeError(f"no axis {axis_} in a tensor of rank {x.rank}")
    shape = tuple(const(1) if d in red else n for d, n in enumerate(x.shape) if keepdims or d not in red)

    def at(ix: Index) -> Expr:
        ks = x.trace.axes([x.shape[d] for d in red])
        it, kt = iter(ix), iter(ks)
        full = []
        for d in range(x.rank):
            if d in red:
                full.append(next(kt).var)
                if keepdims:
                    next(it)
            else:
                full.append(next(it))
        return reduce_(monoid, ks, x.at(tuple(full)))

    return x.trace.store(shape, at)


def sum(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Sum over ``axis`` (all axes when None)."""
    return _reduce("sum", x, axis, keepdims)


def prod(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Product over ``axis``."""
    return _reduce("prod", x, axis, keepdims)


def max(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Largest element along ``axis``."""
    return _reduce("max", x, axis, keepdims)


def min(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Smallest element along ``axis``."""
    return _reduce("min", x, axis, keepdims)


def mean(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Sum over ``axis`` divided by the number of elements."""
    which = range(x.rank) if axis is None else (axis,) if isinstance(axis, int) else axis
    n: Expr = const(1)
    for a in which:
        n = n * x.shape[a]
    return _pointwise(lambda v: v / cast(n, v.dtype), _reduce("sum", x, axis, keepdims))


# ---------------------------------------------------------------- the operator

_traces: list[_Trace] = []


def _current() -> _Trace:
    if not _traces:
        raise InputError("index notation works only inside a custom operator")
    return _traces[-1]


class CustomOp(Op):
    """A traced function as an operator of the registry. Call it on numpy arrays, or name it in an ONNX model."""

    def __init__(self, name: str, fn: Callable[..., Any]) -> None:
        self.name, self.fn = name, fn
        self.__doc__ = fn.__doc__
        self.__name__ = fn.__name__
        self.modules: dict[Any, Any] = {}
        ps = inspect.signature(fn).parameters.values()
        self.arity = [p.name for p in ps if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.attrs = {p.name: p.default for p in ps if p.kind is p.KEYWORD_ONLY}

    def _trace(self, ins: Sequence[Buffer | None], attrs: dict[str, Any], prefix: str) -> tuple[_Trace, Tensor]:
        if len(ins) != len(self.arity) or any(b is None for b in ins):
            raise InputError(f"{self.name} takes {len(self.arity)} inputs ({', '.join(self.arity)}), not {len(ins)}", op=self.name)
        unknown = sorted(set(attrs) - set(self.attrs))
        if unknown:
            raise InputError(f"{self.name} has no attribute {unknown[0]!r}", op=self.name, hint=f"its attributes: {', '.join(self.attrs) or 'none'}")
        tr = _Trace(prefix)
        args = []
        for b in ins:
            assert b is not None
            args.append(Tensor(tr, b.shape, b.dtype, functools.partial(load, b)))
        given = {k: v.decode() if isinstance(v, bytes) else v for k, v in attrs.items()}
        _traces.append(tr)
        try:
            out = self.fn(*args, **given)
        finally:
            _traces.pop()
        if not isinstance(out, Tensor):
            raise TypeMismatch(f"{self.name} returned {type(out).__name__}, not a tensor", op=self.name, hint="return one Tensor")
        return tr, out

    def infer(self, node: Node) -> Sequence[TensorType]:
        ins = [None if v is None else Buffer(f"x{k}", v.dtype, v.shape) for k, v in enumerate(node.inputs)]
        tr, out = self._trace(ins, node.attrs, self.fn.__name__)
        self.kind = tr.kind
        return [TensorType(out.dtype, out.shape)]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Compute:
        tr, out = self._trace(ins, node.attrs, outs[0].name)
        ax = tr.axes(out.shape)
        last = define(outs[0], ax, out.at(tuple(a.var for a in ax)))
        return finish(node.op.split("::")[-1].lower(), [x for x in ins if x is not None], outs, (*tr.lets, last))

    def reference(self, node: Node, *arrays: Any) -> Sequence[np.ndarray[Any, Any]]:
        ins = [Buffer.of(f"x{k}", from_numpy(a.dtype), a.shape) for k, a in enumerate(arrays)]
        t = self.infer(node)[0]
        c = self.compute(node, ins, [Buffer("out", t.dtype, t.shape)])
        return [evaluate(c, {b.name: a for b, a in zip(ins, arrays, strict=True)})["out"]]

    def __call__(self, *arrays: Any, **attrs: Any) -> np.ndarray[Any, Any]:
        """The operator on numpy arrays, compiled for this CPU on the first call with these shapes and types."""
        xs = [np.asarray(a) for a in arrays]
        key = (tuple((a.dtype.str, a.shape) for a in xs), tuple(sorted(attrs.items())))
        m = self.modules.get(key)
        if m is None:
            from luthier.codegen.targets.target import host
            from luthier.ir.builder import infer_node
            from luthier.module import Module
            from luthier.pipeline import compile_program

            ins = [Value(f"x{k}", TensorType.of(from_numpy(a.dtype), a.shape)) for k, a in enumerate(xs)]
            node = infer_node(Node(self.name, tuple(ins), (Value("out", TensorType(f32, ())),), attrs, self.fn.__name__))
            program = compile_program(Graph(self.fn.__name__, ins, list(node.outputs), [node]), host().caps)
            m = self.modules[key] = Module.from_program(program, host(), None)
        return np.asarray(m(*xs)[0])


def op(name: str) -> Callable[[Callable[..., Any]], CustomOp]:
    """Decorator: register a function under ``"domain::name"``. Raises InputError for a name without a domain or one that is taken."""
    if name.count("::") != 1 or not all(name.split("::")):
        raise InputError(f"{name!r} is no operator name", hint='write "domain::name"')

    def wrap(fn: Callable[..., Any]) -> CustomOp:
        if not REGISTRY:
            load_all()
        old = REGISTRY.get(name)
        if old is not None and not isinstance(old, CustomOp):
            raise InputError(f"operator {name} exists", hint="choose another domain")
        c = CustomOp(name, fn)
        REGISTRY[name] = c
        return c

    return wrap

