"""Numbers that a cost model reads off kernels: about 25 of the scheduled loop IR, before any code is generated.

Counts are of a whole run, with every loop at its trip count (values of scalars are given); they enter as log2(1 + count). What a
processor feels is among them: vector and scalar operations, loads by kind, bytes moved, accumulators that live in registers, what the
innermost loop does in a round and how often it goes round, masks and tails, local memory, the grain of the parallel loop, code size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any

from luthier.ir.expr import Expr, walk
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.loop import Alloc, Buffer, For, Func, If, Let, Stmt, Store, children, exprs_of, walk_stmts
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.select import Kernels

NAMES = (
    "kernels", "vector_ops", "scalar_ops", "multiply_adds", "divisions", "vector_loads", "scalar_loads", "masked_loads", "stores",
    "masked_stores", "loaded_bytes", "stored_bytes", "tensor_bytes", "local_bytes", "branches", "innermost_trips", "innermost_ops",
    "innermost_loads", "innermost_accumulators", "loads_an_op", "ops_a_byte", "parallel_rounds", "rounds_of_all_loops", "statements",
    "registers_used", "lanes_used", "wide_vectors",
)  # fmt: skip
UNKNOWN = 8  # rounds of a loop whose extent is not known


@dataclass
class _Counts:
    total: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    inner: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)  # weight, trips, operations, loads, accumulators


def features(kernels: Kernels, caps: Capabilities, dims: Mapping[str, int]) -> list[float]:
    """One number for each of ``NAMES``. ``dims``: values of the kernels' scalars by name."""
    c = _Counts()
    t = c.total
    tensors: dict[str, float] = {}
    lanes: list[float] = []
    for f in kernels.funcs:
        env: dict[Expr, Any] = {v: dims.get(v.attr[0], UNKNOWN) for v in f.scalars}
        for b in f.buffers:
            tensors[b.name] = _value(b.size(), env) * _bytes(b)
        t["kernels"] += 1
        t["statements"] += sum(1 for _ in walk_stmts(f.body))
        _statement(f.body, 1.0, env, c, caps, lanes)
        t["parallel_rounds"] = max(t["parallel_rounds"], _parallel(f, env))
    t["tensor_bytes"] = sum(tensors.values())
    _, t["innermost_trips"], t["innermost_ops"], t["innermost_loads"], t["innermost_accumulators"] = c.inner
    ops = t["vector_ops"] + t["scalar_ops"]
    t["loads_an_op"] = (t["vector_loads"] + t["scalar_loads"]) / max(ops, 1.0)
    t["ops_a_byte"] = ops / max(t["tensor_bytes"], 1.0)
    t["registers_used"] = t["innermost_accumulators"] / caps.registers
    t["lanes_used"] = sum(lanes) / len(lanes) if lanes else 1.0
    return [log2(1 + t[n]) for n in NAMES]


def _bytes(b: Buffer) -> float:
    return b.dtype.bits * max(1, b.dtype.lanes) / 8


def _value(e: Expr, env: Mapping[Expr, Any]) -> float:
    try:
        return float(evaluate_expr(e, env))
    except (KeyError, TypeError, ValueError, NotImplementedError):
        return float(UNKNOWN)


def _parallel(f: Func, env: Mapping[Expr, Any]) -> float:
    return max((_value(s.hi, env) - _value(s.lo, env) for s in walk_stmts(f.body) if isinstance(s, For) and s.kind == "parallel"), default=0.0)


def _statement(s: Stmt, times: float, env: dict[Expr, Any], c: _Counts, caps: Capabilities, lanes: list[float]) -> None:
    t = c.total
    if isinstance(s, For):
        lo, hi = _value(s.lo, env), _value(s.hi, env)
        trips = max(hi - lo, 0.0)
        env[s.var] = int((lo + hi) / 2)
        t["rounds_of_all_loops"] += times * trips
        if not any(isinstance(x, For) for x in walk_stmts(s.body) if x is not s):
            _innermost(s, times * trips, trips, c)
        _statement(s.body, times * trips, env, c, caps, lanes)
        return
    if isinstance(s, If):
        t["branches"] += times
    if isinstance(s, Alloc):
        t["local_bytes"] += _value(s.buf.size(), env) * _bytes(s.buf) if s.buf.rank else 0.0
    for e in exprs_of(s):
        for x in walk(e):
            _expression(x, times, c, caps, lanes)
    if isinstance(s, Let) and s.var.dtype.is_index:
        env[s.var] = int(_value(s.value, env))
    if isinstance(s, Store) and not (s.buf.scope == "local" and not s.buf.rank):
        t["stores"] += times
        t["stored_bytes"] += times * s.value.dtype.bits * max(1, s.value.dtype.lanes) / 8
        t["masked_stores"] += times if s.mask is not None else 0.0
    for child in children(s):
        _statement(child, times, env, c, caps, lanes)


def _expression(e: Expr, times: float, c: _Counts, caps: Capabilities, lanes: list[float]) -> None:
    t = c.total
    if e.op in ("const", "var"):
        return
    n = max(1, e.dtype.lanes)
    registers = max(1.0, n * e.dtype.bits / caps.vector_bits)
    if e.op == "load":
        if e.attr[0].scope == "local" and not e.attr[0].rank:
            return
        t["vector_loads" if n > 1 else "scalar_loads"] += times * registers
        t["loaded_bytes"] += times * n * e.dtype.bits / 8
        t["masked_loads"] += times if len(e.args) > e.attr[0].rank else 0.0
    elif n > 1:
        t["vector_ops"] += times * registers
        t["wide_vectors"] += times if registers > 1 else 0.0
        lanes.append(min(1.0, n * e.dtype.bits / caps.vector_bits))
    elif not e.dtype.is_index:
        t["scalar_ops"] += times
    if e.op == "mul" and e.dtype.is_float:
        t["multiply_adds"] += times * registers
    if e.op in ("div", "sqrt"):
        t["divisions"] += times * registers


def _innermost(s: For, weight: float, trips: float, c: _Counts) -> None:
    """The loop that goes round most often stands for the kernel."""
    if weight < c.inner[0]:
        return
    ops = loads = 0.0
    written: set[str] = set()
    for x in walk_stmts(s.body):
        if isinstance(x, Store) and x.buf.scope == "local" and not x.buf.rank:
            written.add(x.buf.name)
        for e in exprs_of(x):
            found: Sequence[Expr] = list(walk(e))
            ops += sum(y.op not in ("const", "var", "load") for y in found)
            loads += sum(y.op == "load" and y.attr[0].rank > 0 for y in found)
    c.inner = (weight, trips, ops, loads, float(len(written)))
