"""A Compute evaluated with numpy, tensor by tensor: what the mathematics says before any schedule touches it.

Scalar operators mean what :mod:`luthier.ir.interpret.semantics` says. Every unmasked access is checked against its buffer, so a Compute
that reads out of bounds fails here, also where ``select`` would have dropped the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import MONOIDS, Axis, Compute, Fold, Pull, Push
from luthier.ir.dtypes import DType
from luthier.ir.errors import KernelError, VerificationError
from luthier.ir.expr import Expr, load_parts, var
from luthier.ir.interpret.loops import evaluate_expr, evaluate_intrinsic, storage
from luthier.ir.interpret.semantics import evaluate as evaluate_op
from luthier.ir.loop import Buffer

Array = np.ndarray[Any, Any]
_CHUNK = 1 << 24  # points of one evaluation grid; larger ones are cut along the first axis


def evaluate(compute: Compute, arrays: Mapping[str, Array], dims: Mapping[str, int] | None = None) -> dict[str, Array]:
    """The tensors that ``compute`` defines, by name, intermediates included.

    ``arrays``: contents of the params by name. ``dims``: values of symbolic dimensions by name; those that are plain extents of
    a param are read from its array. Raises KernelError (tensor, index) for an access out of bounds, VerificationError for a
    Compute that is not well-formed."""
    env: dict[str, Any] = dict(dims or {})
    for b in compute.params:
        if b.name not in arrays:
            raise VerificationError(f"{compute.name}: no array for parameter {b.name}")
        a = arrays[b.name]
        if a.ndim != b.rank:
            raise VerificationError(f"{compute.name}: parameter {b.name} has rank {b.rank}, its array {a.ndim}")
        for s, n in zip(b.shape, a.shape, strict=True):
            if s.op == "var":
                env.setdefault(s.attr[0], n)
    run = _Run(compute.name, env, {b.name: np.asarray(arrays[b.name]) for b in compute.params})
    for b in compute.params:
        want = tuple(run.scalar(s) for s in b.shape)
        if run.bufs[b.name].shape != want:
            raise VerificationError(f"{compute.name}: parameter {b.name} needs shape {list(want)}", shapes={b.name: run.bufs[b.name].shape})
    out: dict[str, Array] = {}
    with np.errstate(all="ignore"):
        for x in compute.lets:
            run.let(x, out)
    return out


class _Run:
    def __init__(self, name: str, env: dict[str, Any], bufs: dict[str, Array]) -> None:
        self.name, self.env, self.bufs = name, env, bufs

    def scalar(self, e: Expr) -> int:
        try:
            return int(evaluate_expr(e, self.env | self.bufs))
        except KeyError as k:
            raise VerificationError(f"{self.name}: no value for {k} in {e!r}") from None

    def let(self, x: Any, out: dict[str, Array]) -> None:
        if isinstance(x, Pull):
            self.define(x.buf, self.pull(x), out)
        elif isinstance(x, Push):
            self.define(x.buf, self.push(x), out)
        elif isinstance(x, Fold):
            self.fold(x, out)
        else:
            raise VerificationError(f"{self.name}: not a let: {x!r}")

    def define(self, b: Buffer, a: Array, out: dict[str, Array]) -> None:
        want = tuple(self.scalar(s) for s in b.shape)
        if a.shape != want:
            raise VerificationError(f"{self.name}: {b.name} is declared {list(want)} but its axes give {list(a.shape)}")
        if a.dtype != storage(b.dtype):
            raise VerificationError(f"{self.name}: {b.name} is declared {b.dtype} but its expression gives {a.dtype}")
        self.bufs[b.name] = out[b.name] = a

    def grid(self, axes: Sequence[Axis], first: slice | None = None) -> tuple[dict[Expr, Array], tuple[int, ...]]:
        """Index arrays that broadcast to the axes' extents, and the extents."""
        shape = [max(self.scalar(a.extent), 0) for a in axes]
        points: dict[Expr, Array] = {}
        for k, a in enumerate(axes):
            r = np.arange(shape[k], dtype=np.int64)
            if k == 0 and first is not None:
                r = r[first]
                shape[0] = len(r)
            points[a.var] = r.reshape([-1 if i == k else 1 for i in range(len(axes))])
        return points, tuple(shape)

    def pull(self, p: Pull) -> Array:
        points, shape = self.grid(p.axes)
        total = int(np.prod(shape, dtype=np.int64)) * _reduced(p.expr, self)
        if total > _CHUNK and shape and shape[0] > 1:
            step = max(1, shape[0] * _CHUNK // total)
            parts = []
            for s in range(0, shape[0], step):
                pts, sh = self.grid(p.axes, slice(s, s + step))
                parts.append(_Eval(self, pts, sh).value(p.expr))
            return np.concatenate(parts)
        return np.array(_Eval(self, points, shape).value(p.expr), order="C")

    def push(self, p: Push) -> Array:
        points, shape = self.grid(p.axes)
        dst = np.array(_Eval(self, points, shape).value(p.init))
        points, shape = self.grid(p.over)
        ev = _Eval(self, points, shape)
        idx = [ev.value(i).reshape(-1) for i in p.index]
        val = ev.value(p.value).reshape(-1).astype(dst.dtype, copy=False)
        if p.where is not None:
            keep = ev.value(p.where).reshape(-1)
            idx, val = [i[keep] for i in idx], val[keep]
        for k, (i, n) in enumerate(zip(idx, dst.shape, strict=True)):
            if i.size and (i.min() < 0 or i.max() >= n):
                raise KernelError(f"{self.name}: {p.name} is written out of bounds in dimension {k}", shapes={p.name: dst.shape})
        if p.op == "set":
            for j in range(len(val)):
                dst[tuple(i[j] for i in idx)] = val[j]
            return dst
        f = {"add": "add", "mul": "mul", "max": "max", "min": "min"}.get(p.op)
        if f in ("max", "min"):
            best = np.maximum if f == "max" else np.minimum  # NaN stays
            for j in range(len(val)):
                at = tuple(i[j] for i in idx)
                dst[at] = best(dst[at], val[j])
            return dst
        if f is None:
            raise VerificationError(f"{self.name}: Push with the unknown operation {p.op!r}")
        for j in range(len(val)):
            at = tuple(i[j] for i in idx)
            dst[at] = evaluate_op(f, p.buf.dtype, dst[at], val[j])
        return dst

    def fold(self, f: Fold, out: dict[str, Array]) -> None:
        state: dict[str, Array] = {}
        for s in f.state:
            state[s.buf.name] = self.pull(Pull(s.buf, s.axes, s.init))
        emitted: dict[str, Array] = {}
        for e in f.emit:
            emitted[e.buf.name] = np.zeros(tuple(self.scalar(d) for d in e.buf.shape), storage(e.buf.dtype))
        n = self.scalar(f.axis.extent)
        rounds = range(n - 1, -1, -1) if f.reverse else range(n)
        for t in rounds:
            self.env[f.axis.name] = t
            self.bufs |= state
            for p in f.step:
                self.bufs[p.buf.name] = self.pull(p)
            for e in f.emit:
                at = [k for k, a in enumerate(e.axes) if a.var is f.axis.var]
                if len(at) != 1:
                    raise VerificationError(f"{self.name}: {e.buf.name} is emitted without the axis {f.axis.name}")
                rest = tuple(a for a in e.axes if a.var is not f.axis.var)
                sl = self.pull(Pull(e.buf, rest, e.expr))
                emitted[e.buf.name][(slice(None),) * at[0] + (t,)] = sl
            state = {s.buf.name: self.pull(Pull(s.buf, s.axes, s.next)) for s in f.state}
        self.env.pop(f.axis.name, None)
        for s in f.state:
            self.define(s.buf, state[s.buf.name], out)
        for e in f.emit:
            self.define(e.buf, emitted[e.buf.name], out)


def _reduced(e: Expr, run: _Run) -> int:
    """The largest number of points that one reduction of ``e`` (nested ones multiplied) adds to each output point."""
    best, seen = 1, set()
    stack = [(e, 1)]
    while stack:
        x, n = stack.pop()
        if (x, n) in seen:
            continue
        seen.add((x, n))
        if x.op == "reduce":
            for a in x.attr[1]:
                n *= max(run.scalar(a.extent), 1)
        best = max(best, n)
        stack.extend((a, n) for a in x.args)
    return best


class _Eval:
    """Expressions over one grid of points; the result of ``value`` has the grid's full shape."""

    def __init__(self, run: _Run, points: Mapping[Expr, Array], shape: tuple[int, ...]) -> None:
        self.run, self.points, self.shape = run, points, shape
        self.memo: dict[Expr, Any] = {}

    def value(self, e: Expr) -> Array:
        return np.broadcast_to(self.eval(e), self.shape)

    def eval(self, e: Expr) -> Any:
        """Iterative postorder, so that long expressions do not exhaust the stack."""
        stack: list[tuple[Expr, bool]] = [(e, False)]
        while stack:
            x, ready = stack.pop()
            if x in self.memo:
                continue
            if ready or not x.args or x.op in ("reduce", "proj"):
                self.memo[x] = self.node(x)
            else:
                stack.append((x, True))
                stack.extend((a, False) for a in x.args)
        return self.memo[e]

    def node(self, e: Expr) -> Any:
        op = e.op
        if op == "var":
            if e in self.points:
                return self.points[e]
            if e.attr[0] not in self.run.env:
                raise VerificationError(f"{self.run.name}: no value for {e.attr[0]}")
            return np.asarray(self.run.env[e.attr[0]]).astype(storage(e.dtype))
        if op == "const":
            return np.asarray(e.attr).astype(storage(e.dtype))
        if op == "load":
            return self.load(e)
        if op == "reduce":
            return self.reduce(e)[0]
        if op == "proj":
            if e.args[0].op != "reduce":
                raise VerificationError(f"{self.run.name}: proj of {e.args[0].op}")
            return self.reduce(e.args[0])[e.attr]
        args = [self.memo[a] for a in e.args]
        if op == "bitcast":
            return np.ascontiguousarray(args[0]).view(storage(e.dtype)).reshape(np.shape(args[0]))
        if op == "call":
            return evaluate_intrinsic(e, *args)
        return evaluate_op(op, e.dtype, *args)

    def load(self, e: Expr) -> Any:
        buf, idx, mask, other = load_parts(e)
        if buf.name not in self.run.bufs:
            raise VerificationError(f"{self.run.name}: {buf.name} is read before it is defined")
        data = self.run.bufs[buf.name]
        ix = [np.asarray(self.memo[i]) for i in idx]
        if mask is not None:
            m = np.asarray(self.memo[mask])
            ix = [np.where(m, i, 0) for i in ix]
        # a point outside of an empty grid makes no access; broadcasting first keeps such points out of the check
        empty = 0 in self.shape
        for k, (i, n) in enumerate(zip(ix, data.shape, strict=True)):
            live = i if mask is None else i[np.broadcast_to(m, i.shape)]
            if not empty and live.size and (live.min() < 0 or live.max() >= n):
                bad = int(live.min() if live.min() < 0 else live.max())
                raise KernelError(f"{self.run.name}: {buf.name} is read at {bad} in dimension {k}", shapes={buf.name: data.shape})
        if data.size == 0 or empty:
            shape = np.broadcast_shapes(*(i.shape for i in ix)) if ix else ()
            got = np.zeros(shape, data.dtype)
        else:
            got = data[tuple(ix)]
        if mask is None:
            return got
        assert other is not None
        return np.where(m, got, np.asarray(self.memo[other]).astype(got.dtype))

    def reduce(self, e: Expr) -> tuple[Any, ...]:
        key = ("tuple", e)
        if key in self.memo:  # type: ignore[comparison-overlap]
            return self.memo[key]  # type: ignore[index,no-any-return]
        name, axes, n = e.attr
        pts, ext = self.run.grid(axes)
        tail = (1,) * len(axes)
        points = {v: a.reshape(a.shape + tail) for v, a in self.points.items()}
        points |= {v: a.reshape((1,) * len(self.shape) + a.shape) for v, a in pts.items()}
        inner = _Eval(self.run, points, self.shape + ext)
        vals = [inner.value(a).reshape(*self.shape, int(np.prod(ext, dtype=np.int64))) for a in e.args]
        where = vals.pop() if len(vals) > n else None
        m = MONOIDS[name]
        types = tuple(a.dtype for a in e.args[:n])
        start = [np.asarray(i.attr).astype(storage(i.dtype)) for i in m.init(types)]
        if where is not None:
            vals = [np.where(where, v, s) for v, s in zip(vals, start, strict=True)]
        out = _combine(name, vals, start, types)
        self.memo[key] = out  # type: ignore[index]
        return out


def _combine(name: str, vals: list[Array], start: list[Array], types: tuple[DType, ...]) -> tuple[Array, ...]:
    """All elements of the last axis by the monoid."""
    v = vals[0]
    fast: dict[str, Callable[..., Any]] = {"sum": np.sum, "prod": np.prod, "any": np.any, "all": np.all}
    if name in fast and len(vals) == 1 and v.dtype.kind in "fiub":
        kw = {} if name in ("any", "all") else {"dtype": v.dtype}
        return (np.asarray(fast[name](v, axis=-1, **kw)),)
    m = MONOIDS[name]
    acc = [np.broadcast_to(s, v.shape[:-1]) for s in start]
    left = tuple(var(f"a{k}", t, None) for k, t in enumerate(types))
    right = tuple(var(f"b{k}", t, None) for k, t in enumerate(types))
    exprs = m.combine(left, right)
    for j in range(v.shape[-1]):
        env = {f"a{k}": a for k, a in enumerate(acc)} | {f"b{k}": x[..., j] for k, x in enumerate(vals)}
        acc = [np.asarray(evaluate_expr(x, env)) for x in exprs]
    return tuple(acc)


__all__ = ["evaluate"]
