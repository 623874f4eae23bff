"""The interpreter of the loop IR: the meaning that every backend is tested against.

A :class:`~luthier.ir.loop.Func` is turned into Python source once (cached per Func) and run on numpy arrays; every scalar
operator means what :mod:`luthier.ir.interpret.semantics` says. Loops of all kinds run serially, except that the iterations of a
``thread.*`` loop which contains a ``Barrier`` advance in lock-step from barrier to barrier. Every access is checked against
the shape of its buffer. Memory that an ``Alloc`` gives is poisoned (NaN, or a pattern of ones and zeros), so that a read of
something never written shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from luthier.ir import intrin
from luthier.ir.dtypes import DType, to_numpy
from luthier.ir.errors import KernelError, VerificationError
from luthier.ir.expr import COMPARE, Expr, load_parts, walk
from luthier.ir.interpret.semantics import evaluate
from luthier.ir.loop import (
    Alloc,
    Barrier,
    Block,
    Buffer,
    Call,
    For,
    Func,
    If,
    Let,
    Stmt,
    Store,
    While,
    exprs_of,
    walk_stmts,
)

Array = np.ndarray[Any, Any]
_MAX_DEPTH = 24  # operands nested in one line of Python
_MAX_LOOPS = 14  # loops nested in one Python function


def run_func(
    func: Func, arrays: Mapping[str, Array] | Sequence[Array], scalars: Mapping[Any, Any] | None = None,
    kernels: Mapping[str, Func] | None = None,
) -> None:
    """Execute ``func`` on ``arrays`` (by buffer name, or in the order of its Buffer parameters), which it changes in place.

    ``scalars``: values of the scalar parameters by name or variable; dimensions that are plain variables of a buffer's shape
    are read from the arrays when not given. ``kernels``: Funcs that ``Call`` may name. An array may have any shape of the
    right size (a buffer is dense and row-major). Raises KernelError (buffer, index and function named) for an access out of
    bounds and VerificationError for a Func that is not well-formed."""
    given = dict(zip((b.name for b in func.buffers), arrays, strict=True)) if not isinstance(arrays, Mapping) else dict(arrays)
    env: dict[str, Any] = {(k if isinstance(k, str) else k.attr[0]): v for k, v in (scalars or {}).items()}
    for b in func.buffers:
        if b.name not in given:
            raise KernelError(f"{func.name}: no array for buffer {b.name}")
        if given[b.name].ndim == b.rank:
            for s, n in zip(b.shape, given[b.name].shape, strict=True):
                if s.op == "var":
                    env.setdefault(s.attr[0], n)
    for v in func.scalars:
        if v.attr[0] not in env:
            raise KernelError(f"{func.name}: no value for scalar {v.attr[0]}")
    with np.errstate(all="ignore"):
        _compiled(func)([given[b.name] for b in func.buffers], [env[v.attr[0]] for v in func.scalars], kernels or {})


def evaluate_intrinsic(e: Expr, *args: Any) -> Any:
    """The value of a pure call. Raises VerificationError when nobody registered it."""
    name, attr = e.attr
    known = intrin.lookup(name)
    if known.evaluate is not None:
        return known.evaluate(e.dtype, attr, *args)
    instruction = intrin.DOTS[name]
    operands = instruction.operands(e.dtype.lanes)
    return evaluate_expr(instruction.semantics(*operands), dict(zip(operands, args, strict=True)))


def evaluate_expr(expr: Expr, env: Mapping[Any, Any]) -> Array:
    """``expr`` over numpy arrays: ``env`` gives each variable (by name or Expr) an array (all broadcast together), and each
    loaded buffer (by name) its contents. The lanes of a vector expression are the last axis. Returns an array of the result."""
    memo: dict[Expr, Any] = {}
    with np.errstate(all="ignore"):
        for e in walk(expr):
            memo[e] = _eval_node(e, [memo[a] for a in e.args], env)
    return np.asarray(memo[expr])


def _eval_node(e: Expr, a: list[Any], env: Mapping[Any, Any]) -> Any:
    op = e.op
    if op == "var":
        v = np.asarray(env[e] if e in env else env[e.attr[0]])
        return v if v.dtype == e.dtype.scalar.numpy else v.astype(e.dtype.scalar.numpy)
    if op == "const":
        return np.asarray(e.attr).astype(e.dtype.numpy)
    if op == "load":
        buf, masked = e.attr
        data = np.asarray(env[buf.name])
        idx = a[:-2] if masked else a
        if not masked:
            return data[tuple(idx)]
        mask = a[-2]
        got = data[tuple(np.where(mask, i, 0) for i in idx)]
        return np.where(mask, got, a[-1].astype(got.dtype))
    if e.dtype.lanes > 1 or op in ("extract", "vreduce"):
        r = vector_node(e, a)
        if r is not None:
            return r
        lanes = e.dtype.lanes
        if op == "select":  # a scalar condition applies to all lanes
            a = [a[0][..., None] if e.args[0].dtype.lanes == 1 else a[0], *a[1:]]
        elif lanes > 1:
            a = [x[..., None] if y.dtype.lanes == 1 else x for x, y in zip(a, e.args, strict=True)]
    if op == "bitcast":
        return np.ascontiguousarray(a[0]).view(e.dtype.numpy)
    if op == "call":
        return evaluate_intrinsic(e, *a)
    return evaluate(op, e.dtype, *a)


def vector_node(e: Expr, a: list[Any]) -> Any:
    """The operators that treat lanes specially, on arrays whose last axis is the lanes; None for lane-wise operators."""
    op, n = e.op, e.dtype.lanes
    if op == "ramp":
        return np.asarray(a[0], np.int64)[..., None] + e.attr[0] * np.arange(n)
    if op == "bcast":
        v = np.asarray(a[0])
        return np.broadcast_to(v[..., None], (*v.shape, n))
    if op == "extract":
        return a[0][..., e.attr]
    if op == "shuffle":
        whole = [np.asarray(v)[..., None] if x.dtype.lanes == 1 else v for x, v in zip(e.args, a, strict=True)]
        return np.concatenate(whole, -1)[..., [max(p, 0) for p in e.attr]]
    if op == "vreduce":
        v = a[0]
        while v.shape[-1] > 1:  # pairwise halving: lane i with lane i + half, an odd last lane waits
            h = v.shape[-1] // 2
            rest = v[..., 2 * h :]
            v = np.concatenate([evaluate(e.attr, e.dtype, v[..., :h], v[..., h : 2 * h]), rest], -1)
        return v[..., 0]
    if op == "bitcast":
        v = np.ascontiguousarray(a[0])
        if e.args[0].dtype.lanes == 1:
            v = v[..., None]
        return v.view(e.dtype.scalar.numpy)
    return None


# ---------------------------------------------------------------- helpers of the generated code


def _oob(buf: str, idx: Any, shape: Any, func: str, what: str) -> KernelError:
    at = ", ".join(str(i) for i in idx)
    return KernelError(f"{what} {buf}[{at}] out of bounds", shapes={buf: tuple(shape)}, op=func)


def _ld1(b: Array, i: Any, nm: str, fn: str) -> Any:
    if 0 <= i < b.shape[0]:
        return b[i]
    raise _oob(nm, (i,), b.shape, fn, "load")


def _ld(b: Array, idx: tuple[Any, ...], nm: str, fn: str) -> Any:
    for i, n in zip(idx, b.shape):
        if not 0 <= i < n:
            raise _oob(nm, idx, b.shape, fn, "load")
    v = b[idx]
    return v.copy() if isinstance(v, np.ndarray) else v


def _check(b: Array, idx: tuple[Any, ...], mask: Any, nm: str, fn: str, what: str) -> None:
    for i, n in zip(idx, b.shape):
        bad = (i < 0) | (i >= n)
        if mask is not True:
            bad = bad & mask
        if np.any(bad):
            k = int(np.argmax(np.atleast_1d(bad)))
            at = [np.atleast_1d(j)[k if np.size(j) > 1 else 0] for j in idx]
            raise _oob(nm, at, b.shape, fn, what)


def _vld(b: Array, idx: tuple[Any, ...], nm: str, fn: str) -> Any:
    _check(b, idx, True, nm, fn, "load")
    return b[idx]


def _vldm(b: Array, idx: tuple[Any, ...], mask: Any, other: Any, nm: str, fn: str) -> Any:
    _check(b, idx, mask, nm, fn, "load")
    got = b[tuple(np.where(mask, i, 0) for i in idx)] if b.size else np.zeros(np.shape(mask), b.dtype)
    return np.where(mask, got, other).astype(b.dtype)


def _st(b: Array, idx: tuple[Any, ...], v: Any, nm: str, fn: str) -> None:
    for i, n in zip(idx, b.shape):
        if not 0 <= i < n:
            raise _oob(nm, idx, b.shape, fn, "store")
    b[idx] = v


def _vst(b: Array, idx: tuple[Any, ...], v: Any, mask: Any, nm: str, fn: str) -> None:
    _check(b, idx, mask, nm, fn, "store")
    if mask is True:
        b[idx] = v
    else:
        n = len(mask)
        b[tuple(np.broadcast_to(i, (n,))[mask] for i in idx)] = np.broadcast_to(v, (n,))[mask]


def _ev(op: str, dtype: DType, *a: Any) -> Any:
    return evaluate(op, dtype, *a)[()]


def _evx(op: str, dtype: DType, *a: Any) -> int:
    return int(evaluate(op, dtype, *a))


def storage(d: DType) -> np.dtype[Any]:
    """The numpy dtype that holds one element; types that numpy lacks are kept one to a byte."""
    return np.dtype(np.uint8) if d.scalar.name == "u1" else to_numpy(d)


def _alloc(d: DType, shape: tuple[int, ...]) -> Array:
    if any(n < 0 for n in shape):
        raise KernelError(f"allocation of negative extent {list(shape)}")
    if d.lanes > 1:
        shape = (*shape, d.lanes)
    dt = storage(d)
    if dt.kind == "b":
        return np.ones(shape, dt)
    if d.is_float:
        return np.full(shape, np.nan).astype(dt)
    if d.bits < 8:
        return np.full(shape, 1, np.int8).astype(dt)
    return np.frombuffer(b"\x55" * (int(np.prod(shape, dtype=np.int64)) * dt.itemsize), dt).reshape(shape).copy()


def _lock(gens: Iterable[Generator[None, None, None]], func: str) -> Generator[None, None, None]:
    """All threads to the next barrier, then one round for the enclosing group; all must arrive or all must end."""
    live = list(gens)
    while live:
        left = []
        for g in live:
            try:
                next(g)
                left.append(g)
            except StopIteration:
                pass
        if left and len(left) != len(live):
            raise KernelError(f"{len(live) - len(left)} of {len(live)} threads ended while the others wait at a barrier", op=func)
        if left:
            yield
        live = left


def _flat(b: Array, off: Any = 0) -> Array:
    return b.reshape(-1)[off:]


def _call(callee: str, args: list[Any], attrs: tuple[Any, ...], kernels: Mapping[str, Func]) -> None:
    f = kernels.get(callee)
    if f is None:
        intrin.lookup_effect(callee).evaluate(*args, **dict(attrs))  # type: ignore[misc]
        return
    bufs = [a for a in args if isinstance(a, np.ndarray)]
    scal = [a for a in args if not isinstance(a, np.ndarray)]
    if len(bufs) != len(f.buffers) or len(scal) != len(f.scalars):
        raise KernelError(f"call of {callee} with {len(bufs)} buffers and {len(scal)} scalars, it takes {len(f.buffers)} and {len(f.scalars)}")
    _compiled(f)(bufs, scal, kernels)


def _param(a: Array, d: DType, shape: tuple[int, ...], nm: str, fn: str) -> Array:
    if d.lanes > 1:
        shape = (*shape, d.lanes)
    if a.dtype != storage(d):
        raise KernelError(f"buffer {nm} needs {storage(d)}, the array has {a.dtype}", op=fn)
    if a.shape == shape:
        return a
    if not a.flags.c_contiguous:
        raise KernelError(f"buffer {nm} needs a dense array of shape {list(shape)}", shapes={nm: a.shape}, op=fn)
    n = int(np.prod(shape, dtype=np.int64))
    if a.size < n:
        raise KernelError(f"buffer {nm} needs shape {list(shape)}", shapes={nm: a.shape}, op=fn)
    return a.reshape(-1)[:n].reshape(shape)


# ---------------------------------------------------------------- code generation

_INFIX = {"add": "+", "sub": "-", "mul": "*"}
_CMP = {"lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_BOOL = {"and": "&", "or": "|", "xor": "^"}


class _Compiled:
    def __init__(self, func: Func, run: Callable[..., None]) -> None:
        self.func, self.run = func, run


_by_id: dict[int, _Compiled] = {}


def _compiled(func: Func) -> Callable[..., None]:
    hit = _by_id.get(id(func))
    if hit is None or hit.func is not func:
        if len(_by_id) > 512:
            _by_id.clear()
        hit = _by_id[id(func)] = _Compiled(func, _Gen(func).compile())
    return hit.run


def python_source(func: Func) -> str:
    """The Python text that :func:`run_func` executes, for debugging."""
    g = _Gen(func)
    g.compile()
    return g.text


class _Gen:
    """Writes one Func as Python. Index values are Python ints, everything else numpy scalars, vectors are 1-d arrays."""

    def __init__(self, func: Func) -> None:
        self.func, self.text = func, ""
        self.ns: dict[str, Any] = {
            "np": np, "_ld1": _ld1, "_ld": _ld, "_vld": _vld, "_vldm": _vldm, "_st": _st, "_vst": _vst, "_ev": _ev, "_evx": _evx,
            "_alloc": _alloc, "_lock": _lock, "_flat": _flat, "_call": _call, "_param": _param, "_fn": func.name,
        }
        self.lines: list[str] = []
        self.vars: dict[Expr, str] = {}
        self.bufs: dict[str, str] = {}
        self.n = self.threads = 0

    def fresh(self, base: str) -> str:
        self.n += 1
        return f"{re.sub(r'[^A-Za-z0-9_]', '_', base)}_{self.n}"

    def k(self, v: Any, base: str = "k") -> str:
        name = self.fresh(base)
        self.ns[name] = v
        return name

    def put(self, depth: int, line: str) -> None:
        self.lines.append(" " * depth + line)

    def compile(self) -> Callable[..., None]:
        self.put(0, "def _run(_arrays, _scalars, _kernels):")
        for i, v in enumerate(self.func.scalars):
            self.vars[v] = self.fresh(v.attr[0])
            conv = f"int(_scalars[{i}])" if v.dtype.is_index else f"{self.k(storage(v.dtype).type)}(_scalars[{i}])"
            self.put(1, f"{self.vars[v]} = {conv}")
        for i, b in enumerate(self.func.buffers):
            shape = self.tuple_of(b.shape, 1)
            self.bufs[b.name] = self.fresh(b.name)
            self.put(1, f"{self.bufs[b.name]} = _param(_arrays[{i}], {self.k(b.dtype)}, {shape}, {b.name!r}, _fn)")
        for name, data in self.func.data.items():
            self.bufs[name] = self.k(np.ascontiguousarray(data), name)
        self.stmt(self.func.body, 1, 0)
        self.put(1, "return")
        self.text = "\n".join(self.lines)
        exec(compile(self.text, f"<{self.func.name}>", "exec"), self.ns)
        run: Callable[..., None] = self.ns["_run"]
        return run

    # -- expressions

    def exprs(self, es: Sequence[Expr], depth: int) -> list[str]:
        """Text of each expression; shared or deeply nested operands are assigned to names first."""
        uses: dict[Expr, int] = {}
        order = list(walk(*es))
        for e in order:
            for a in e.args:
                uses[a] = uses.get(a, 0) + 1
        for e in es:
            uses[e] = uses.get(e, 0) + 1
        text: dict[Expr, str] = {}
        nest: dict[Expr, int] = {}
        for e in order:
            text[e] = self.node(e, [text[a] for a in e.args])
            nest[e] = 1 + max((nest[a] for a in e.args), default=0)
            if e.args and (uses[e] > 1 or nest[e] > _MAX_DEPTH):
                name = self.fresh("t")
                self.put(depth, f"{name} = {text[e]}")
                text[e], nest[e] = name, 0
        return [text[e] for e in es]

    def tuple_of(self, es: Sequence[Expr], depth: int) -> str:
        return "(" + "".join(t + ", " for t in self.exprs(es, depth)) + ")"

    def node(self, e: Expr, a: list[str]) -> str:
        op, d = e.op, e.dtype
        vec = d.lanes > 1
        if op == "var":
            if e not in self.vars:
                raise VerificationError(f"variable {e.attr[0]} is used but not defined in {self.func.name}")
            return self.vars[e]
        if op == "const":
            if d.is_index or d.is_bool:
                return f"({e.attr!r})"
            return self.k(np.asarray(e.attr).astype(storage(d))[()])
        if op == "load":
            return self.load(e, a)
        if op in ("ramp", "bcast", "extract", "shuffle", "vreduce"):
            f = self.k(lambda *v, e=e: vector_node(e, list(v)), op)
            t = f"{f}({', '.join(a)})"
            return f"int({t})" if d.is_index and not vec else t
        if op == "bitcast":
            f = self.k(lambda v, e=e: _bitcast(v, e), op)
            return f"{f}({a[0]})"
        if op == "call":
            f = self.k(lambda *v, e=e: evaluate_intrinsic(e, *v), e.attr[0])
            return f"{f}({', '.join(a)})"
        if op in ("reduce", "proj"):
            raise VerificationError(f"{op} belongs in a Compute, not in the loop IR of {self.func.name}")
        if op == "select" and not vec:
            return f"({a[1]} if {a[0]} else {a[2]})"
        simple = d.is_index or (d.bits >= 8 and (d.is_float or d.is_int))
        if op in _INFIX and simple:
            return f"({a[0]} {_INFIX[op]} {a[1]})"
        if op in COMPARE and e.args[0].dtype.bits >= 8:
            return f"({a[0]} {_CMP[op]} {a[1]})"
        if op in _BOOL and (d.is_bool or (d.is_int and d.bits >= 8)):
            return f"({a[0]} {_BOOL[op]} {a[1]})"
        if op == "not" and d.is_bool:
            return f"(~{a[0]})" if vec else f"(not {a[0]})"
        if d.is_index and not vec:
            if op in ("floordiv", "mod") and e.args[1].op == "const" and e.args[1].attr:
                return f"({a[0]} {'//' if op == 'floordiv' else '%'} {a[1]})"
            if op in ("min", "max"):
                return f"{op}({a[0]}, {a[1]})"
            if op == "cast" and not e.args[0].dtype.is_float:
                return f"int({a[0]})"
        if op == "cast" and not vec and d.is_float and d.bits >= 32 and not (e.args[0].dtype.is_float and e.args[0].dtype.bits > d.bits):
            return f"np.{d.numpy.name}({a[0]})"
        f = "_evx" if d.is_index and not vec else "_ev"
        return f"{f}({op!r}, {self.k(d)}, {', '.join(a)})"

    def buf(self, b: Buffer) -> str:
        if b.name not in self.bufs:
            raise VerificationError(f"buffer {b.name} is not in scope in {self.func.name}")
        return self.bufs[b.name]

    def load(self, e: Expr, a: list[str]) -> str:
        b, idx, mask, _ = load_parts(e)
        arr, nm = self.buf(b), f"{b.name!r}, _fn"
        n = len(idx)
        tup = "(" + "".join(t + ", " for t in a[:n]) + ")"
        if b.dtype.lanes > 1 and mask is not None and mask.op == "bcast":  # a whole element or none of it
            return f"(_ld({arr}, {tup}, {nm}) if {a[n]}[0] else {a[n + 1]})"
        if any(i.dtype.lanes > 1 for i in idx) or (mask is not None and mask.dtype.lanes > 1):
            return f"_vld({arr}, {tup}, {nm})" if mask is None else f"_vldm({arr}, {tup}, {a[n]}, {a[n + 1]}, {nm})"
        if b.dtype.lanes == 1 and n == 1:
            t = f"_ld1({arr}, {a[0]}, {nm})"
        elif n == 0 and b.dtype.lanes == 1:
            t = f"{arr}[()]"
        else:
            t = f"_ld({arr}, {tup}, {nm})"
        if e.dtype.is_index and e.dtype.lanes == 1:
            t = f"int({t})"
        return t if mask is None else f"({t} if {a[n]} else {a[n + 1]})"

    # -- statements

    def stmt(self, s: Stmt, depth: int, loops: int) -> None:
        if isinstance(s, Block):
            for c in s.stmts:
                self.stmt(c, depth, loops)
        elif isinstance(s, For):
            self.loop(s, depth, loops)
        elif isinstance(s, While):
            self.put(depth, "while True:")
            (c,) = self.exprs([s.cond], depth + 1)
            self.put(depth + 1, f"if not {c}: break")
            self.nested(s.body, depth + 1, loops + 1)
        elif isinstance(s, If):
            (c,) = self.exprs([s.cond], depth)
            self.put(depth, f"if {c}:")
            self.put(depth + 1, "pass")
            self.stmt(s.then, depth + 1, loops)
            if s.orelse is not None:
                self.put(depth, "else:")
                self.put(depth + 1, "pass")
                self.stmt(s.orelse, depth + 1, loops)
        elif isinstance(s, Let):
            (v,) = self.exprs([s.value], depth)
            self.vars[s.var] = self.fresh(s.var.attr[0])
            self.put(depth, f"{self.vars[s.var]} = {v}")
        elif isinstance(s, Store):
            self.store(s, depth)
        elif isinstance(s, Alloc):
            shape = self.tuple_of(s.buf.shape, depth)
            old = self.bufs.get(s.buf.name)
            name = self.bufs[s.buf.name] = self.fresh(s.buf.name)
            if s.buf.scope == "const":
                self.put(depth, f"{name} = {self.k(np.ascontiguousarray(self.func.data[s.buf.name]))}")
            else:
                self.put(depth, f"{name} = _alloc({self.k(s.buf.dtype)}, {shape})")
            self.stmt(s.body, depth, loops)
            if old is None:
                del self.bufs[s.buf.name]
            else:
                self.bufs[s.buf.name] = old
        elif isinstance(s, Barrier):
            self.put(depth, "yield" if self.threads else "pass")
        elif isinstance(s, Call):
            texts = iter(self.exprs(exprs_of(s), depth))
            args = []
            for x in s.args:
                if isinstance(x, Expr):
                    args.append(next(texts))
                elif isinstance(x, tuple):
                    args.append(f"_flat({self.buf(x[0])}, {next(texts)})")
                else:
                    args.append(self.buf(x))
            self.put(depth, f"_call({s.callee!r}, [{', '.join(args)}], {self.k(s.attrs)}, _kernels)")
        else:
            raise VerificationError(f"{self.func.name}: not a statement: {s!r}")

    def store(self, s: Store, depth: int) -> None:
        texts = self.exprs(exprs_of(s), depth)
        n = len(s.idx)
        tup = "(" + "".join(t + ", " for t in texts[:n]) + ")"
        arr, v, nm = self.buf(s.buf), texts[n], f"{s.buf.name!r}, _fn"
        vec = any(i.dtype.lanes > 1 for i in s.idx) or (s.mask is not None and s.mask.dtype.lanes > 1)
        if vec:
            self.put(depth, f"_vst({arr}, {tup}, {v}, {'True' if s.mask is None else texts[n + 1]}, {nm})")
            return
        if s.mask is not None:
            self.put(depth, f"if {texts[n + 1]}:")
            depth += 1
        self.put(depth, f"{arr}[()] = {v}" if n == 0 else f"_st({arr}, {tup}, {v}, {nm})")

    def loop(self, s: For, depth: int, loops: int) -> None:
        lo, hi = self.exprs([s.lo, s.hi], depth)
        v = self.vars[s.var] = self.fresh(s.var.attr[0])
        if s.kind.startswith("thread") and any(isinstance(c, Barrier) for c in walk_stmts(s.body)):
            g = self.fresh("thread")
            self.put(depth, f"def {g}({v}):")
            self.put(depth + 1, "if False: yield")
            self.threads += 1
            self.stmt(s.body, depth + 1, 0)
            self.threads -= 1
            run = f"_lock([{g}({v}) for {v} in range({lo}, {hi})], _fn)"
            self.put(depth, f"yield from {run}" if self.threads else f"for _ in {run}: pass")
            return
        self.put(depth, f"for {v} in range({lo}, {hi}):")
        self.put(depth + 1, "pass")
        self.nested(s.body, depth + 1, loops + 1)

    def nested(self, s: Stmt, depth: int, loops: int) -> None:
        """A loop body; past the number of loops that Python nests it continues in an inner function."""
        if loops < _MAX_LOOPS:
            self.stmt(s, depth, loops)
            return
        f = self.fresh("body")
        yields = self.threads and any(isinstance(c, Barrier) for c in walk_stmts(s))
        self.put(depth, f"def {f}():")
        self.put(depth + 1, "if False: yield" if yields else "pass")
        self.stmt(s, depth + 1, 0)
        self.put(depth, f"yield from {f}()" if yields else f"{f}()")


def _bitcast(v: Any, e: Expr) -> Any:
    src, dst = e.args[0].dtype, e.dtype
    a = np.ascontiguousarray(np.asarray(v).astype(storage(src), copy=False)).reshape(src.lanes)
    r = a.view(storage(dst))
    return r if dst.lanes > 1 else r[0]


__all__ = ["run_func", "evaluate_expr", "python_source", "storage"]
