"""The pattern of products with group-sparse weights, and how their blocks become one stream.

``acc[.., n] = sum(i, j) where i < ptr[n + 1] - ptr[n]: xq[.., cols[b] * block + j] * ((q[b, j] - z[b]) * s[b])`` with ``b = ptr[n] + i``; all but
``xq`` (activations rounded to integers) reads constants (:mod:`luthier.ir.ops.sparse_matmul` states it). As for dense low-bit
weights, how the graph stores the bits is not looked at: they are evaluated when the blocks are packed.

The stream is a list of *units* of 16-bit words, each the blocks of four registers: ``[column offsets][scales][zero points][values]``. Rows
are padded to whole units with blocks of scale 0. Four rows of about the same length make a *bundle*: a *step* is one unit of each. The units of the
four places in a bundle are stored apart, as four streams that are read at once: one stream alone does not fill a core's share of the memory.
*Tasks* cut the streams by work, not by rows (:func:`split_tasks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.ir.compute import Axis, Compute, Pull
from luthier.ir.expr import Expr, free_vars, load_parts, loads, rewrite, substitute, var, walk
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.ops.sparse_matmul import MAX_LEVELS
from luthier.schedules.lowbit.layouts import value_range

Array = np.ndarray[Any, Any]
SLOTS = 4  # registers of values in a unit
BUNDLE = 4  # rows that are walked in step
FIXED = 16383  # largest integer scale: four sums of two products stay below 2**31
STEP = 4  # elements that a column offset counts: block offsets up to 2**18 columns fit 16 bits


@dataclass(frozen=True, slots=True)
class SparseProduct:
    """A matched Compute. ``xq``: the activations rounded to ``levels`` steps, read at ``rows`` and a column; ``block``: columns of a block; ``kept``: number of
    stored blocks; ``ptr``: {name of the row pointers}; ``col``, ``q``, ``zero``, ``scale``: expressions over ``b`` (and ``j``)."""

    acc: Pull
    rows: tuple[Axis, ...]
    n: Axis
    xq: Any
    levels: int
    block: int
    bits: int
    ptr: str
    b: Expr
    j: Expr
    col: Expr
    q: Expr
    zero: Expr | None
    scale: Expr

    @property
    def outputs(self) -> int:
        return int(self.n.extent.attr)


def match(c: Compute, constants: Mapping[str, Any]) -> SparseProduct | None:
    """The group-sparse product inside ``c``, or None."""
    found = [x for x in c.lets if isinstance(x, Pull) and x.expr.op == "reduce" and x.expr.attr[0] == "sum" and len(x.expr.args) == 2 and len(x.expr.attr[1]) == 2]
    if len(found) != 1 or not found[0].axes:
        return None
    acc = found[0]
    (i, j), (value, where) = acc.expr.attr[1], acc.expr.args
    n = acc.axes[-1]
    if where.op != "lt" or where.args[0] is not i.var or n.extent.op != "const" or j.extent.op != "const":
        return None
    tables = {ld.attr[0].name for ld in loads(where)}
    if len(tables) != 1 or not tables <= set(constants):
        return None
    blocks = {e for ld in loads(value) for x in load_parts(ld)[1] for e in walk(x) if e.op == "min" and i.var in free_vars(e)}
    if len(blocks) != 1:
        return None
    at = next(iter(blocks))
    b = var("block", lo=0, hi=at.args[1].attr if at.args[1].op == "const" else None)
    value = rewrite(value, lambda e: b if e is at else None)
    if {i.var, n.var} & free_vars(value) or value.op != "mul":
        return None
    for xf, wf in (value.args, value.args[::-1]):
        parts = _factors(xf, wf, acc, b, j, constants)
        if parts is not None:
            xq, col, q, zero, scale = parts
            span = value_range(q)
            levels = _levels(c, xq.name)
            if span is None or span[0] < 0 or span[1] > 255 or levels is None:
                return None
            return SparseProduct(acc, acc.axes[:-1], n, xq, levels, int(j.extent.attr), 4 if span[1] <= 15 else 8, next(iter(tables)), b, j.var, col, q, zero, scale)
    return None


def _factors(xf: Expr, wf: Expr, acc: Pull, b: Expr, j: Axis, constants: Mapping[str, Any]) -> tuple[Any, Expr, Expr, Expr | None, Expr] | None:
    x = xf.args[0] if xf.op == "cast" else xf
    if x.op != "load" or x.dtype.name != "i16" or wf.op != "mul" or any(ld.attr[0].name not in constants for ld in loads(wf)):
        return None
    buf, idx, mask, _ = load_parts(x)
    rows = tuple(a.var for a in acc.axes[:-1])
    column = substitute(idx[-1], {j.var: 0 * j.var})
    if mask is not None or idx[:-1] != rows or idx[-1] is not column + j.var or any(ld.attr[0].name not in constants for ld in loads(column)):
        return None
    for qf, sf in (wf.args, wf.args[::-1]):
        if j.var not in free_vars(qf) or j.var in free_vars(sf) or qf.op != "cast" or not loads(sf):
            continue
        q, zero = qf.args[0], None
        if q.op in ("sub", "add") and j.var not in free_vars(q.args[1]):
            zero = q.args[1] if q.op == "sub" else None
            if zero is None:
                if q.args[1].op != "const":
                    return None
                zero = -q.args[1]
            q = q.args[0]
        return buf, column // int(j.extent.attr), q, zero, sf
    return None


def _levels(c: Compute, name: str) -> int | None:
    """L where the activations are divided by their largest magnitude and multiplied by L <= MAX_LEVELS."""
    for x in c.lets:
        if isinstance(x, Pull) and x.name == name:
            found = [int(e.args[0].attr) for e in walk(x.expr) if e.op == "div" and e.args[0].op == "const" and 0 < e.args[0].attr <= MAX_LEVELS]
            return found[0] if len(found) == 1 else None
    return None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Evaluated weights: ``ptr`` i64 [rows + 1], ``col`` [kept], ``q`` [kept, block] and ``zero`` i16 [kept] (None: ``q`` is signed and
    fits ``bits``), ``scale`` f16 or f32 [kept]."""

    ptr: Array
    col: Array
    q: Array
    zero: Array | None
    scale: Array


def evaluate_blocks(p: SparseProduct, constants: Mapping[str, Any]) -> Blocks:
    """The constants of a product, one row a block."""
    ptr = np.asarray(constants[p.ptr]).astype(np.int64)
    kept = int(ptr[-1])
    env: dict[Any, Any] = {ld.attr[0].name: np.asarray(constants[ld.attr[0].name]) for e in (p.col, p.q, p.scale, *([p.zero] if p.zero is not None else [])) for ld in loads(e)}
    b, j = np.arange(kept, dtype=np.int64)[:, None], np.arange(p.block, dtype=np.int64)[None, :]
    env |= {p.b: b, p.j: j}
    col = np.broadcast_to(evaluate_expr(p.col, env), (kept, 1))[:, 0].astype(np.int64)
    q = np.broadcast_to(evaluate_expr(p.q, env), (kept, p.block)).astype(np.int16)
    s = np.broadcast_to(evaluate_expr(p.scale, env), (kept, 1))[:, 0]
    half = np.array_equal(s, s.astype(np.float16)) and all(ld.dtype.name == "f16" for ld in loads(p.scale))
    s = s.astype(np.float16 if half else np.float32)
    zeros = np.zeros((kept, 1), np.int16) if p.zero is None else np.broadcast_to(evaluate_expr(p.zero, env), (kept, 1)).astype(np.int16)
    zero: Array | None = zeros[:, 0]
    signed = q - zeros
    half_range = 1 << (p.bits - 1)
    if not kept or (signed.min() >= -half_range and signed.max() < half_range):
        q, zero = signed, None
    return Blocks(ptr, col, q, zero, s)


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """Places in a unit, in 16-bit words, for registers of ``words`` 16-bit lanes. ``per``: blocks of a unit.

    ``fixed``: a scale is a 14-bit integer times a number of its row."""

    words: int
    block: int
    bits: int
    wide_scales: bool
    zeros: bool
    fixed: bool = False

    @property
    def per(self) -> int:
        return SLOTS * self.words // self.block

    def lane_blocks(self) -> list[int]:
        """The block that each 32-bit lane belongs to once the four registers are summed: lane ``j`` of every four is register ``j``."""
        return [(j * self.words + h * 8) // self.block for h in range(self.words // 8) for j in range(SLOTS)]

    def scale_order(self) -> list[int]:
        """Blocks in the order in which their scales are stored: that of the lanes that need them."""
        return list(range(self.per)) if self.fixed else list(dict.fromkeys(self.lane_blocks()))

    @property
    def scales(self) -> int:
        return self.per

    @property
    def zero_points(self) -> int:
        return self.scales + self.per * (2 if self.wide_scales else 1)

    @property
    def values(self) -> int:
        return self.zero_points + (self.per if self.zeros else 0)

    @property
    def size(self) -> int:
        return self.values + SLOTS * self.words * self.bits // 16


@dataclass(frozen=True, slots=True)
class Stream:
    """``units`` u16 [BUNDLE, steps, size]; ``steps`` i64 [bundles + 1]: first step of every bundle; ``rows`` [bundles * BUNDLE]: the row of
    each place in a bundle, -1 where there is none; ``factors`` f32 [bundles * BUNDLE]: what the integer scales of a row are multiples of."""

    units: Array
    steps: Array
    rows: Array
    factors: Array


def pack_units(b: Blocks, lay: UnitLayout) -> Stream:
    """Blocks to units. Rows are sorted by their number of units, so that those of a bundle are about equally long: what is
    padded to the longest of four is at most three times the longest row in all."""
    per, rows = lay.per, len(b.ptr) - 1
    count = np.diff(b.ptr)
    own = -(-count // per)
    order = np.argsort(-own, kind="stable")
    bundles = -(-rows // BUNDLE)
    padded = np.zeros(bundles * BUNDLE, np.int64)
    padded[:rows] = own[order]
    steps = np.concatenate([[0], np.cumsum(padded.reshape(bundles, BUNDLE).max(1))])
    total = int(steps[-1]) * BUNDLE
    position = np.empty(rows, np.int64)  # of a row among the sorted
    position[order] = np.arange(rows)
    nth = np.arange(len(b.col)) - np.repeat(b.ptr[:-1], count)  # of a block in its row
    at = np.repeat(position, count)
    place = ((steps[at // BUNDLE] + nth // per) * BUNDLE + at % BUNDLE) * per + nth % per

    def spread(a: Array) -> Array:
        out = np.zeros((total * per, *a.shape[1:]), a.dtype)
        out[place] = a
        return out

    factors = np.zeros(bundles * BUNDLE, np.float32)
    scale = b.scale
    if lay.fixed:
        top = np.zeros(rows)
        np.maximum.at(top, np.repeat(np.arange(rows), count), np.abs(b.scale.astype(np.float64)))
        factors[:rows] = top[order] / FIXED
        inverse = np.divide(FIXED, top, out=np.zeros(rows), where=top > 0)
        scale = np.rint(b.scale.astype(np.float64) * np.repeat(inverse, count)).astype(np.int16)
    stream = np.zeros((total, lay.size), np.uint16)
    stream[:, :per] = spread((b.col * lay.block // STEP).astype(np.uint16)).reshape(total, per)
    stream[:, lay.scales : lay.zero_points] = np.ascontiguousarray(spread(scale).reshape(total, per)[:, lay.scale_order()]).view(np.uint16)
    if lay.zeros:
        assert b.zero is not None
        stream[:, lay.zero_points : lay.values] = spread(b.zero).view(np.uint16).reshape(total, per)
    v = spread(b.q).reshape(total, SLOTS, lay.words)
    if lay.bits == 4:
        nibbles = (v & 15).astype(np.uint16)
        stream[:, lay.values :] = sum(nibbles[:, s] << (4 * s) for s in range(SLOTS))
    else:
        low = (v & 255).astype(np.uint16)
        stream[:, lay.values :] = (low[:, 0::2] | low[:, 1::2] << 8).reshape(total, -1)
    return Stream(stream.reshape(-1, BUNDLE, lay.size).swapaxes(0, 1), steps, np.where(np.arange(bundles * BUNDLE) < rows, np.pad(order, (0, bundles * BUNDLE - rows)), -1), factors)


@dataclass(frozen=True, slots=True)
class Tasks:
    """``starts`` [tasks + 1]: steps; ``first``, ``last`` [tasks]: bundles that a task works on; ``continued`` [tasks]: the bundle whose beginning
    belongs to an earlier task (its sums go to a place of the task's own and are added afterwards), or -1."""

    starts: Array
    first: Array
    last: Array
    continued: Array


BUNDLE_WORK = 1  # steps' worth of time that a bundle costs besides its steps


def split_tasks(steps: Array, tasks: int) -> Tasks:
    """Equal work for every task: steps and bundles are merged in order, the merged path is cut evenly. ``steps`` i64 [bundles + 1]."""
    bundles, own = len(steps) - 1, np.diff(steps, append=steps[-1])
    work = steps + BUNDLE_WORK * np.arange(bundles + 1)  # at the start of a bundle
    cut = np.arange(tasks + 1) * int(work[-1]) // tasks
    at = np.clip(np.searchsorted(work, cut, side="right") - 1, 0, bundles)
    inside = np.minimum(cut - work[at], own[at])
    behind = (inside == own[at]) & (inside > 0)  # the cut falls behind the last step of its bundle
    at, inside = np.where(behind, at + 1, at), np.where(behind, 0, inside)
    at[0], inside[0], at[-1], inside[-1] = 0, 0, bundles, 0
    return Tasks(steps[at] + inside, at[:-1], at[1:] + (inside[1:] > 0), np.where(inside[:-1] > 0, at[:-1], -1))
