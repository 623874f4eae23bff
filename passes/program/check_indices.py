"""check_indices: a run refuses indices that are data and lie outside of what they index.

Before: ``y = Gather(table, Reshape(ids))``. After: ``lo, hi = luthier::Extremes(ids); y = Gather(table, Reshape(ids))`` and the requirements
``-n <= lo`` and ``hi <= n - 1``, whose symbols the program reads from ``lo`` and ``hi`` before it goes on. Operators say which inputs
are indices (``Op.indexed``). Nothing is added where the range is proved: constants, positions that the model counts, ArgMax, TopK, NonZero,
Clip, Mod and what moves or joins those. Indices of one tensor into the same extents are checked once.

``before``: only inputs are checked, by the caller's side before a run (``Graph.within``), for targets where a run that waits for
a value of its own costs too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from luthier.ir.builder import Names, infer_node
from luthier.ir.dtypes import i64
from luthier.ir.expr import Expr, const, free_vars, maximum, minimum, prove, var
from luthier.ir.graph import Graph, Node, TensorType, Value, subgraphs
from luthier.ir.op import Indexed, lookup
from luthier.ir.ops.common import product
from luthier.ir.requirements import Requirement, Within, assume_at_least, assume_at_most, collecting

LARGE = 1 << 16  # elements from which on threads share the work of looking at them
Span = tuple[Expr | None, Expr | None]  # least and greatest element, as far as they are known
UNKNOWN: Span = (None, None)
_SAME = frozenset({  # whose elements are some of the first input's
    "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Transpose", "Slice", "Expand", "Tile", "Gather", "GatherElements", "GatherND",
    "ReverseSequence", "Split", "Compress", "ReduceMax", "ReduceMin", "luthier::Require",
})  # fmt: skip
_WHOLE = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Transpose", "Cast"})  # whose elements are all of the first input's


def check_indices(graph: Graph, before: bool = False, index_bits: int = 64) -> bool:
    """In place, subgraphs included; True when a check was added. ``index_bits``: of the integers that ``main`` computes with."""
    c = _Checker(graph, before, index_bits)
    c.visit(graph)
    return c.changed


@dataclass(slots=True)
class _Ask:
    """One tensor and the ranges that its elements must be in: {(columns or not, low, high): which node wants it}."""

    value: Value
    ranges: dict[tuple[tuple[Expr, ...], tuple[Expr, ...]], str] = field(default_factory=dict)


class _Checker:
    def __init__(self, graph: Graph, before: bool, index_bits: int) -> None:
        self.top, self.before, self.bits = graph, before, index_bits
        self.names = Names(graph)
        self.producer: dict[Value, Node] = {}
        self.spans: dict[Value, Span] = {}
        self.changed = False

    def visit(self, graph: Graph) -> None:
        own = graph.producers()
        self.producer |= own
        nodes: list[Node] = []
        first: list[_Ask] = []
        done: set[tuple[Value, tuple[Expr, ...], tuple[Expr, ...]]] = set()
        for n in graph.nodes:
            op = lookup(n.op)
            late: list[_Ask] = []
            for x in op.indexed(n) if op is not None else ():
                v = n.input(x.operand)
                if v is None:
                    continue
                for w, low, high in self.open(v, x):
                    while w in own and own[w].op in _WHOLE and w.dtype.is_int and (len(low) == 1 or own[w].op in ("Cast", "Identity")):
                        u = own[w].inputs[0]
                        if u is None or not u.dtype.is_int or u.data is not None:
                            break
                        w = u
                    if (w, low, high) in done:
                        continue
                    done.add((w, low, high))
                    given = graph is self.top and w in graph.inputs
                    asks = first if given else late
                    ask = next((a for a in asks if a.value is w), None)
                    if ask is None:
                        asks.append(ask := _Ask(w))
                    ask.ranges[low, high] = f'node "{n.name}" ({n.op})'
            if self.before:
                late = [a for a in late if self.free(a)]
            if late:
                nodes += self.measure(graph, late)
            nodes.append(n)
            for g in subgraphs(n):
                self.visit(g)
        if first and self.before:
            self.tell(first)
        elif first:
            nodes[:0] = self.measure(graph, first)
        graph.nodes = nodes

    # ---------------------------------------------------------------- what is known

    def open(self, v: Value, x: Indexed) -> list[tuple[Value, tuple[Expr, ...], tuple[Expr, ...]]]:
        """The tensors whose elements a run must look at, and the ranges."""
        if not x.low or any(prove(s.eq(0)) for s in v.shape):
            return []
        if len(set(x.high)) == 1 and len(set(x.low)) == 1:
            return [] if self.proved(v, x.low[0], x.high[0]) else [(v, x.low[:1], x.high[:1])]
        parts = self.columns(v, len(x.low))
        if parts is not None:
            return [(w, (lo,), (hi,)) for w, lo, hi in zip(parts, x.low, x.high, strict=True) if not self.proved(w, lo, hi)]
        extents = self.positions(v)
        if extents is not None and all(prove(n - 1 <= hi) and prove(lo <= 0) for n, lo, hi in zip(extents, x.low, x.high, strict=False)):
            return []
        if v.data is not None and v.data.size:
            least, most = (f(v.data.reshape(-1, len(x.low)), axis=0) for f in (np.min, np.max))
            if all(prove(lo <= int(a)) and prove(const(int(b)) <= hi) for lo, hi, a, b in zip(x.low, x.high, least, most, strict=True)):
                return []
        return [] if self.proved(v, max_of(x.low), min_of(x.high)) else [(v, x.low, x.high)]

    def columns(self, v: Value, k: int) -> list[Value] | None:
        """Tensors joined along the last axis, one for each place along it."""
        p = self.producer.get(v)
        if p is None or p.op != "Concat" or int(p.attrs.get("axis", 0)) not in (-1, v.rank - 1) or len(p.inputs) != k:
            return None
        parts = [u for u in p.inputs if u is not None and prove(u.shape[-1].eq(1))]
        return parts if len(parts) == k else None

    def positions(self, v: Value) -> Sequence[Expr] | None:
        """The extents of the tensor whose positions NonZero found, when ``v`` has one position a row."""
        p = self.producer.get(v)
        while p is not None and p.op in ("Cast", "Identity"):
            p = self.producer.get(p.inputs[0]) if p.inputs[0] is not None else None
        if p is None or p.op != "Transpose" or v.rank != 2 or list(p.attrs.get("perm", (1, 0))) != [1, 0] or p.inputs[0] is None:
            return None
        q = self.producer.get(p.inputs[0])
        return q.inputs[0].shape if q is not None and q.op == "NonZero" and q.inputs[0] is not None else None

    def proved(self, v: Value, low: Expr, high: Expr) -> bool:
        lo, hi = self.span(v)
        return lo is not None and hi is not None and prove(low <= lo) and prove(hi <= high)

    def span(self, v: Value) -> Span:
        known = self.spans.get(v)
        if known is None:
            self.spans[v] = UNKNOWN  # a value that depends on itself
            known = self.spans[v] = self._span(v)
        return known

    def _span(self, v: Value) -> Span:
        if v.data is not None:
            if v.data.dtype.kind not in "iub" or not v.data.size:
                return UNKNOWN
            return const(int(v.data.min())), const(int(v.data.max()))
        if v.limits is not None:
            return v.limits
        if v.content:
            return min_of(v.content), max_of(v.content)
        p = self.producer.get(v)
        span = self._made(p, v) if p is not None else UNKNOWN
        if v.dtype.is_int and v.dtype.bits <= 16:
            least, most = (const(int(x)) for x in v.dtype.limits())
            return least if span[0] is None else span[0], most if span[1] is None else span[1]
        return span

    def _made(self, p: Node, v: Value) -> Span:
        ins = [u for u in p.inputs if u is not None]
        if p.op in _SAME and ins:
            return self.span(ins[0])
        if p.op == "Cast":
            if ins[0].dtype.is_bool:
                return const(0), const(1)
            return self.span(ins[0]) if ins[0].dtype.is_int and ins[0].dtype.bits <= v.dtype.bits and ins[0].dtype.is_signed <= v.dtype.is_signed else UNKNOWN
        if p.op in ("ArgMax", "ArgMin"):
            return const(0), ins[0].shape[int(p.attrs.get("axis", 0))] - 1
        if p.op == "TopK":
            return self.span(ins[0]) if v is p.outputs[0] else (const(0), ins[0].shape[int(p.attrs.get("axis", -1))] - 1)
        if p.op == "MaxPool" and v is not p.outputs[0]:
            return const(0), product(ins[0].shape) - 1
        if p.op == "NonZero":
            return (const(0), max_of(ins[0].shape) - 1) if ins[0].rank else UNKNOWN
        spans = [self.span(u) for u in ins]
        if p.op in ("Concat", "Where"):
            return _either(spans[p.op == "Where" :])
        if p.op == "Clip" and len(p.inputs) == 3:
            low, high = (UNKNOWN if u is None else self.span(u) for u in p.inputs[1:])
            return low[0], high[1]
        if p.op == "Mod" and v.dtype.is_int and not int(p.attrs.get("fmod", 0)):
            a, b = spans[1]
            return (const(0), b - 1) if a is not None and b is not None and prove(a > 0) else UNKNOWN
        if p.op == "Max":
            lows = [s[0] for s in spans if s[0] is not None]
            return max_of(lows) if lows else None, _either(spans)[1]
        if p.op == "Min":
            highs = [s[1] for s in spans if s[1] is not None]
            return _either(spans)[0], min_of(highs) if highs else None
        if p.op == "Add" and v.dtype.is_int:
            return _sum(spans[0][0], spans[1][0]), _sum(spans[0][1], spans[1][1])
        if p.op == "Sub" and v.dtype.is_int:
            return _sum(spans[0][0], spans[1][1], -1), _sum(spans[0][1], spans[1][0], -1)
        return UNKNOWN

    # ---------------------------------------------------------------- checks

    def measure(self, graph: Graph, asks: Sequence[_Ask]) -> list[Node]:
        """Nodes that find what must be known, and what is then required; what the program has as scalars needs no node."""
        pairs: list[tuple[Value, tuple[Expr, ...], tuple[Expr, ...], str, Sequence[Expr], Sequence[Expr]]] = []
        tensors: list[Value] = []
        columns: list[int] = []
        waiting = []
        for a in asks:
            self.read(graph, a.value)
            for (low, high), what in a.ranges.items():
                lo, hi = self.span(a.value)
                if len(low) == 1 and lo is not None and hi is not None and (a.value.data is not None or a.value.limits is not None or a.value.content):
                    pairs.append((a.value, low, high, what, (lo,), (hi,)))
                    continue
                key = (a.value, len(low) if len(low) > 1 else 0)
                known = next((k for k, t in enumerate(zip(tensors, columns, strict=True)) if t == key), None)
                if known is None:
                    known = len(tensors)
                    tensors.append(a.value)
                    columns.append(key[1])
                waiting.append((a.value, low, high, what, known))
        nodes: list[Node] = []
        if tensors:
            nodes, ends = self.extremes(tensors, columns)
            pairs += [(v, low, high, what, *ends[k]) for v, low, high, what, k in waiting]
        for v, low, high, what, los, his in pairs:
            with collecting(what) as found:
                for c, (lo, hi, a, b) in enumerate(zip(low, high, los, his, strict=True)):
                    at = f" at place {c} of the last axis" if len(low) > 1 else ""
                    assume_at_least(a, lo, f"the least index in {v.name}{at} and the first element")
                    assume_at_most(b, hi, f"the greatest index in {v.name}{at} and the last element")
            graph.requirements = [*graph.requirements, *(Requirement(r.got, r.want, r.what, not self.before) for r in found)]
            self.changed = True
        return nodes

    def free(self, a: _Ask) -> bool:
        """Whether its ends follow from extents, so that nothing of the run is looked at."""
        v = a.value
        return (v.data is not None or v.limits is not None or (bool(v.content) and not v.bound)) and all(len(low) == 1 for low, _ in a.ranges)

    def read(self, graph: Graph, v: Value) -> None:
        """One number needs no kernel: the program reads it."""
        here = v in graph.inputs or v in (u for n in graph.nodes for u in n.outputs)
        size = v.type.static_shape
        if here and v.content is None and v.data is None and v.limits is None and size is not None and prod(size) == 1 and v.dtype.bits <= self.bits:
            v.content, v.bound = (var(f"{v.name}.0", lo=None),), True
            self.spans.pop(v, None)

    def extremes(self, tensors: Sequence[Value], columns: Sequence[int]) -> tuple[list[Node], list[tuple[Sequence[Expr], Sequence[Expr]]]]:
        """Nodes, and for each tensor its least and its greatest elements as symbols."""
        nodes: list[Node] = []
        ins: list[Value] = []
        places: list[int] = []
        for v, k in zip(tensors, columns, strict=True):
            size = v.type.static_shape
            if not k and size is not None and prod(size) > LARGE:
                part = Value(self.names.fresh(f"{v.name}.parts"), v.type)
                nodes.append(infer_node(Node("luthier::PartialExtremes", (v,), (part,), {}, part.name)))
                v, k = part, 2
            ins.append(v)
            places.append(k)
        out = Value(self.names.fresh(f"{tensors[0].name}.extremes"), TensorType.of(i64, ()))
        nodes.append(infer_node(Node("luthier::Extremes", tuple(ins), (out,), {"columns": places, "bits": self.bits}, out.name)))
        symbols = tuple(var(f"{out.name}.{c}", lo=None) for c in range(2 * sum(max(k, 1) for k in places)))
        out.content, out.bound = symbols, True
        ends: list[tuple[Sequence[Expr], Sequence[Expr]]] = []
        at = 0
        for k, asked in zip(places, columns, strict=True):
            n = max(k, 1)
            least, most = symbols[at : at + n], symbols[at + n : at + 2 * n]
            ends.append((least, most) if k == asked else (least[:1], most[1:]))
            at += 2 * n
        return nodes, ends

    def tell(self, asks: Sequence[_Ask]) -> None:
        dims = {s for v in self.top.inputs for s in v.shape if s.op == "var"}
        for a in asks:
            for (low, high), what in a.ranges.items():
                if all(free_vars(e) <= dims for e in (*low, *high)):
                    self.top.within.append(Within(self.top.inputs.index(a.value), low, high, f"{what}: an index"))
                    self.changed = True


def max_of(es: Sequence[Expr]) -> Expr:
    out = es[0]
    for e in es[1:]:
        out = maximum(out, e)
    return out


def min_of(es: Sequence[Expr]) -> Expr:
    out = es[0]
    for e in es[1:]:
        out = minimum(out, e)
    return out


def _either(spans: Sequence[Span]) -> Span:
    lows, highs = [s[0] for s in spans], [s[1] for s in spans]
    low = None if not lows or None in lows else min_of([e for e in lows if e is not None])
    return low, None if not highs or None in highs else max_of([e for e in highs if e is not None])


def _sum(a: Expr | None, b: Expr | None, sign: int = 1) -> Expr | None:
    return None if a is None or b is None else a + b * sign
