"""What the low-bit templates share: the pattern, and how weights, scales and offsets are laid out for a kernel.

The pattern is ``acc[.., n] = sum_k x[.., k] * w[n, k]`` with ``w = (q - z) * s`` or ``q * s + o``, ``q`` an integer of few values
that only reads constants, ``s``, ``z``, ``o`` constant over groups of columns, and an elementwise epilogue. ``x`` is exact, or
rounded to 8 bits by groups (:mod:`luthier.ir.ops.lowbit`). How the graph stores the bits is not looked at: they are evaluated when
the weights are packed, so every storage form that means the same gets the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, Pull
from luthier.ir.errors import InvalidModel
from luthier.ir.expr import (
    Expr,
    bounds,
    const,
    free_vars,
    is_const,
    load_parts,
    loads,
    rewrite,
    select,
    substitute,
    var,
)
from luthier.ir.loop import Buffer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class LowbitProduct:
    """A matched Compute. ``x``: source of the activations over ``rows`` and ``k``; ``act``: columns that share a scale when they
    are rounded to 8 bits, 0 when exact; ``q``, ``scale``, ``zero``, ``offset``: expressions over ``n`` and ``k``;
    ``low``, ``high``: range of ``q``; ``group``: columns that share a scale; ``zero_const``: the zero point when it is one number."""

    out: Pull
    acc: Pull
    rows: tuple[Axis, ...]
    n: Axis
    k: Axis
    x: Expr
    act: int
    q: Expr
    low: int
    high: int
    scale: Expr
    zero: Expr | None
    zero_const: float | None
    offset: Expr | None
    group: int

    @property
    def columns(self) -> int:
        return int(self.k.extent.attr)

    @property
    def outputs(self) -> int:
        return int(self.n.extent.attr)

    @property
    def bits(self) -> int:
        return max(1, (self.high - self.low).bit_length())


def match(c: Compute, constants: Mapping[str, Any]) -> LowbitProduct | None:
    """The low-bit product that ``c`` is, or None. ``c`` is normalised: every reduction is a Pull of its own."""
    if len(c.outs) != 1 or not all(isinstance(x, Pull) for x in c.lets):
        return None
    pulls: dict[str, Pull] = {x.name: x for x in c.lets}  # type: ignore[union-attr, misc]
    sums = [p for p in pulls.values() if p.expr.op == "reduce" and p.expr.attr[0] == "sum"]
    others = [p for p in pulls.values() if p.expr.op in ("reduce", "proj") and p not in sums]
    if len(sums) != 1 or len(others) > 1:
        return None
    acc, out = sums[0], pulls[c.outs[0]]
    red = acc.expr
    if len(red.attr[1]) != 1 or len(red.args) != 1 or not acc.axes or red.args[0].op != "mul":
        return None
    k, n = red.attr[1][0], acc.axes[-1]
    if k.extent.op != "const" or n.extent.op != "const":
        return None
    quantized = [p for p in pulls.values() if p.buf.dtype.name == "i8" and p.expr.op == "cast" and p.expr.args[0].op == "round"]
    keep = {p.name for p in (*quantized, *sums, *others)}
    value = _inline(red.args[0], pulls, keep)
    for xf, wf in (value.args, value.args[::-1]):
        if _reads_constants(wf, constants) and n.var in free_vars(wf) and n.var not in free_vars(xf):
            break
    else:
        return None
    if loads(xf) and all(ld.attr[0].name in constants for ld in loads(xf)):
        return None
    parts = _weights(wf, k)
    if parts is None:
        return None
    q, scale, zero, offset = parts
    if k.var not in free_vars(q):
        return None
    span = value_range(q)
    if span is None or span[1] - span[0] > 255 or any(len({ld.attr[0].name for ld in loads(e)}) != 1 for e in (q, scale)):
        return None
    for e in (zero, offset):
        if e is not None and loads(e) and len({ld.attr[0].name for ld in loads(e)}) != 1:
            return None
    group = _group(k, [e for e in (scale, zero, offset) if e is not None])
    if group is None or k.extent.attr % group:
        return None
    zc = float(zero.attr) if zero is not None and zero.op == "const" else 0 if zero is None and offset is None else None
    zc = int(zc) if zc is not None and zc == int(zc) else zc
    act, x = 0, xf
    if others or quantized:
        found = _rounded(xf, pulls, k, quantized, others)
        if found is None:
            return None
        x, act = found
    epilogue = _inline(out.expr, pulls, keep) if out is not acc else None
    if epilogue is not None and any(ld.attr[0].name in keep - {acc.name} for ld in loads(epilogue)):
        return None
    if out is not acc and not _same_point(epilogue, out, acc):
        return None
    o = out if epilogue is None else replace(out, expr=epilogue)
    return LowbitProduct(o, acc, acc.axes[:-1], n, k, x, act, q, *span, scale, zero, zc, offset, group)


def _same_point(e: Expr | None, out: Pull, acc: Pull) -> bool:
    """The epilogue reads the accumulator at its own point, and the axes agree."""
    if e is None or len(out.axes) != len(acc.axes) or any(a.extent is not b.extent for a, b in zip(out.axes, acc.axes, strict=True)):
        return False
    at = tuple(a.var for a in out.axes)
    return all(all(i is a or (is_const(i, 0) and is_const(ax.extent, 1)) for i, a, ax in zip(load_parts(x)[1], at, out.axes, strict=True)) for x in loads(e) if x.attr[0].name == acc.name)


def _inline(e: Expr, pulls: Mapping[str, Pull], keep: set[str]) -> Expr:
    """``e`` with every tensor outside ``keep`` substituted."""

    def f(x: Expr) -> Expr | None:
        if x.op != "load" or x.attr[0].name not in pulls or x.attr[0].name in keep:
            return None
        _, idx, mask, other = load_parts(x)
        p = pulls[x.attr[0].name]
        v = _inline(substitute(p.expr, dict(zip([a.var for a in p.axes], idx, strict=True))), pulls, keep)
        return v if mask is None else select(mask, v, other)

    return rewrite(e, f)


def _reads_constants(e: Expr, constants: Mapping[str, Any]) -> bool:
    ls = loads(e)
    return bool(ls) and all(x.attr[0].name in constants for x in ls)


def _strip(e: Expr) -> Expr:
    while e.op == "cast" and e.dtype.is_float and e.args[0].dtype.is_float:
        e = e.args[0]
    return e


def _integer(e: Expr) -> Expr | None:
    """The integer that a cast to float shows."""
    e = _strip(e)
    if e.op == "cast" and e.args[0].dtype.is_int:
        e = e.args[0]
        while e.op == "cast" and e.args[0].dtype.is_int and _grows(e.args[0], e):
            e = e.args[0]
        return e
    return None


def _grows(a: Expr, b: Expr) -> bool:
    (la, ha), (lb, hb) = a.dtype.limits(), b.dtype.limits()
    return bool(lb <= la and ha <= hb)


def _weights(wf: Expr, k: Axis) -> tuple[Expr, Expr, Expr | None, Expr | None] | None:
    """(q, s, z, o) of a weight factor."""
    wf = _strip(wf)
    if wf.op == "add":
        for a, o in (wf.args, wf.args[::-1]):
            inner = _weights(a, k) if a.op == "mul" else None
            if inner is not None and inner[2] is None and _grouped(o, k):
                return inner[0], inner[1], None, o
        return None
    if wf.op != "mul":
        return None
    for a, s in (wf.args, wf.args[::-1]):
        if not _grouped(s, k) or not loads(s):
            continue
        q = _integer(a)
        if q is not None:
            if q.op in ("sub", "add"):
                left, right = q.args
                if q.op == "add" and right.op == "const":
                    right = const(-right.attr, right.dtype)
                elif q.op == "add":
                    return None
                if _grouped(right, k):
                    inner_q = left
                    while inner_q.op == "cast" and inner_q.args[0].dtype.is_int and _grows(inner_q.args[0], inner_q):
                        inner_q = inner_q.args[0]
                    return inner_q, s, right, None
            return q, s, None, None
        a = _strip(a)
        if a.op == "sub":
            q, z = _integer(a.args[0]), a.args[1]
            if q is not None and _grouped(z, k):
                return q, s, z, None
    return None


def _grouped(e: Expr, k: Axis) -> bool:
    """``k`` occurs only under a floor division by a constant."""
    return k.var not in free_vars(_replace_groups(e, k, {}))


def _replace_groups(e: Expr, k: Axis, found: dict[int, Expr]) -> Expr:
    def f(x: Expr) -> Expr | None:
        if x.op == "floordiv" and x.args[0] is k.var and x.args[1].op == "const":
            c = int(x.args[1].attr)
            return found.setdefault(c, var(f"{k.name}.{c}", lo=0))
        return None

    return rewrite(e, f)


def _group(k: Axis, es: list[Expr]) -> int | None:
    found: dict[int, Expr] = {}
    for e in es:
        _replace_groups(e, k, found)
    if not found:
        return int(k.extent.attr)
    g = min(found)
    return g if all(c % g == 0 for c in found) else None


def _rounded(xf: Expr, pulls: Mapping[str, Pull], k: Axis, quantized: list[Pull], others: list[Pull]) -> tuple[Expr, int] | None:
    """(source of the activations in the accumulator's variables, columns per scale) of activations rounded to 8 bits."""
    if len(quantized) != 1 or len(others) != 1 or others[0].expr.attr[0] != "max" or xf.op != "mul":
        return None
    xq, amax = quantized[0], others[0]
    q = next((ld for ld in loads(xf) if ld.attr[0].name == xq.name), None)
    top = next((ld for ld in loads(xf) if ld.attr[0].name == amax.name), None)
    if q is None or top is None or len(loads(xf)) != 2:
        return None
    at = load_parts(top)[1][-1]
    group = int(k.extent.attr) if is_const(at, 0) else int(at.args[1].attr) if at.op == "floordiv" and at.args[0] is k.var and at.args[1].op == "const" else 0
    inner = _inline(xq.expr, pulls, {xq.name, amax.name}).args[0].args[0]
    if not group or inner.op != "mul":
        return None
    for src, inv in (inner.args, inner.args[::-1]):
        if any(ld.attr[0].name == amax.name for ld in loads(inv)) and not any(ld.attr[0].name == amax.name for ld in loads(src)):
            env = dict(zip([a.var for a in xq.axes], load_parts(q)[1], strict=True))
            return substitute(src, env), group
    return None


def value_range(e: Expr) -> tuple[int, int] | None:
    """(lowest, highest) value of an integer expression by its masks, remainders and types."""
    if e.op == "const":
        return int(e.attr), int(e.attr)
    if e.op == "and" and e.args[1].op == "const" and e.args[1].attr >= 0:
        return 0, int(e.args[1].attr)
    if e.op in ("mod", "rem") and e.args[1].op == "const" and e.args[1].attr > 0:
        r = value_range(e.args[0])
        return (0, int(e.args[1].attr) - 1) if r is not None and r[0] >= 0 else None
    if e.op in ("add", "sub"):
        a, b = value_range(e.args[0]), value_range(e.args[1])
        if a is None or b is None:
            return None
        return (a[0] + b[0], a[1] + b[1]) if e.op == "add" else (a[0] - b[1], a[1] - b[0])
    if e.op in ("floordiv", "div", "shr"):
        a = value_range(e.args[0])
        return (0, a[1]) if a is not None and a[0] >= 0 else None
    if e.op == "cast" and e.args[0].dtype.is_int:
        return value_range(e.args[0]) if _grows(e.args[0], e) else None
    if e.op == "load":
        lo, hi = e.dtype.limits()
        return int(lo), int(hi)
    lo, hi = bounds(e)
    return (lo, hi) if isinstance(lo, int) and isinstance(hi, int) else None


# ---------------------------------------------------------------- packing


@dataclass(frozen=True, slots=True)
class LowbitPacking:
    """One packed stream: ``fn(values)`` lays out ``expr`` evaluated over (rows of the weights, columns in steps of ``step``).

    The interface of :class:`luthier.schedules.base.schedule.Packing`: ``param`` and ``apply(array)``."""

    param: str
    expr: Expr
    n: Axis
    k: Axis
    step: int
    fn: Callable[[Array], Array]
    buf: Buffer

    def apply(self, a: Array) -> Array:
        """The packed stream of parameter contents ``a``. Raises InvalidModel when a value is not finite."""
        return self.fn(self.grid(a))

    def grid(self, a: Array) -> Array:
        """[rows, columns / step] of the expression."""
        from luthier.ir.interpret.loops import evaluate_expr

        rows, cols = int(self.n.extent.attr), int(self.k.extent.attr) // self.step
        env: dict[Any, Any] = {ld.attr[0].name: a for ld in loads(self.expr)}
        if not env:
            env = {self.param: a}
        kv = (np.arange(cols, dtype=np.int64) * self.step)[None, :]
        parts = []
        block = max(1, (1 << 22) // max(cols, 1))
        for lo in range(0, rows, block):
            nv = np.arange(lo, min(rows, lo + block), dtype=np.int64)[:, None]
            v = np.broadcast_to(np.asarray(evaluate_expr(self.expr, {**env, self.n.var: nv, self.k.var: kv})), (len(nv), cols))
            parts.append(v.astype(np.float32) if v.dtype.kind not in "iub" else v.astype(np.int16 if v.dtype.kind == "i" else np.uint8) if v.dtype.itemsize > 2 else v)
        out = np.concatenate(parts)
        if out.dtype.kind not in "iub" and not np.isfinite(out.astype(np.float32)).all():
            raise InvalidModel(f"{self.param} holds values that are not finite", hint="scales, zero points and offsets of low-bit weights must be finite")
        return out


def pad_rows(a: Array, multiple: int) -> Array:
    """Rows padded with zeros to a multiple."""
    extra = -a.shape[0] % multiple
    return a if not extra else np.concatenate([a, np.zeros((extra, *a.shape[1:]), a.dtype)])


def group_stream(a: Array, lanes: int) -> Array:
    """[rows, groups] -> [rows / lanes, groups, lanes]: the values of one group of a row block stand together."""
    p = pad_rows(a, 4 * lanes)
    return np.ascontiguousarray(p.reshape(-1, lanes, p.shape[1]).transpose(0, 2, 1)).reshape(-1)


def dim_of(rows: tuple[Axis, ...]) -> Expr:
    """Number of rows of the activations."""
    m = const(1)
    for a in rows:
        m = m * a.extent
    return m


def row_point(rows: tuple[Axis, ...], m: Expr) -> dict[Expr, Expr]:
    """The row axes at row number ``m``."""
    env: dict[Expr, Expr] = {}
    inner = const(1)
    for i, a in reversed(list(enumerate(rows))):
        at = m if is_const(inner, 1) else m // inner
        env[a.var] = const(0) if is_const(a.extent, 1) else at if i == 0 else at % a.extent
        inner = inner * a.extent
    return env
