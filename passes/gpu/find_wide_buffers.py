"""find_wide_buffers: which buffers of a program hold 64-bit integers that 32 bits may not hold, for a target that carries those as two words.

A buffer is narrow while everything that a kernel or main stores to it is proven to fit (:mod:`luthier.passes.loop.integer_ranges`), given that what
they read is narrow; the proof starts with all of them narrow and ends when none is lost any more. Constants say what they hold.
Inputs are narrow, and whoever runs the program checks them, as long as no kernel that reads one makes 64-bit integers of it: an index or a
mask costs nothing, a sum of inputs or a transposed input may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from luthier.ir.dtypes import i32, i64, u64
from luthier.ir.expr import Expr
from luthier.ir.loop import Buffer, Call, Func, Let, Store, nodes_of, walk_stmts
from luthier.ir.program import Program
from luthier.passes.loop.integer_ranges import IntegerRanges, Range, fits32, is_int64


def find_wide_buffers(p: Program, root: Callable[[Buffer], str]) -> set[str]:
    """Names of roots. ``root``: the buffer that owns the memory of a buffer."""
    declared = {b.name: b for b in (*p.inputs, *p.outputs, *p.buffers)}
    calls = [(p.kernels[s.callee], s) for s in walk_stmts(p.body) if isinstance(s, Call) and s.callee in p.kernels]
    calls = [(f, s) for f, s in calls if any(isinstance(q, Buffer) and is_int64(q.dtype) for q in f.params)]
    wide: set[str] = set()
    for name, a in p.constants.items():
        if a.dtype.kind not in "iu" or a.dtype.itemsize != 8:
            wide.add(name)
        elif a.size and not fits32((int(np.min(a)), int(np.max(a))), i64 if a.dtype.kind == "i" else u64):
            wide.add(name)
    wide |= {n for n, b in declared.items() if not is_int64(b.dtype)}
    seen: dict[tuple[str, frozenset[str]], tuple[set[str], set[str]]] = {}

    def effects(f: Func, narrow: frozenset[str]) -> tuple[set[str], set[str]]:
        key = (f.name, narrow)
        if key not in seen:
            r = IntegerRanges(f, narrow)
            seen[key] = {n for n, x in r.stored.items() if not fits32(x, _param(f, n).dtype)}, _demanding(f, r)
        return seen[key]

    ins = {b.name for b in p.inputs if is_int64(b.dtype)}
    while True:
        before = len(wide)
        wanted: set[str] = set()
        for f, s in calls:
            roots = {q.name: root(a if isinstance(a, Buffer) else a[0]) for q, a in zip(f.params, s.args, strict=True) if isinstance(q, Buffer) and not isinstance(a, Expr)}
            narrow = narrow_params(f, roots, wide)
            grown, demanding = effects(f, narrow)
            wide |= {roots[n] for n in grown}
            wanted |= {roots[n] for n in demanding} & ins
        wide |= _by_main(p, root, wide, declared)
        if len(wide) == before:
            if wanted <= wide:
                return wide
            wide |= wanted


def narrow_params(f: Func, roots: dict[str, str], wide: set[str]) -> frozenset[str]:
    """Parameters of 64-bit integers that lie in narrow buffers."""
    return frozenset(q.name for q in f.buffers if is_int64(q.dtype) and roots[q.name] not in wide)


def _param(f: Func, name: str) -> Buffer:
    return next(b for b in f.buffers if b.name == name)


def _demanding(f: Func, r: IntegerRanges) -> set[str]:
    """Narrow parameters that would be worth more than 32 bits: the kernel computes with more anyway, or what it stores in 64 bits is made
    of their elements."""
    mine = {b.name for b in f.buffers if b.name in r.narrow}
    if any(r.wide(e) or (e.op == "bitcast" and is_int64(e.args[0].dtype)) for e in nodes_of(f.body)):
        return mine
    lets = {s.var: s.value for s in walk_stmts(f.body) if isinstance(s, Let)}
    out: set[str] = set()
    for s in walk_stmts(f.body):
        if isinstance(s, Store) and is_int64(s.buf.dtype):
            out |= _sources(s.value, lets)
    return out & mine


def _sources(e: Expr, lets: dict[Expr, Expr]) -> set[str]:
    """Buffers of the 64-bit integers that a value is computed from."""
    found: set[str] = set()
    seen: set[Expr] = set()
    todo = [e]
    while todo:
        x = todo.pop()
        if x in seen or not is_int64(x.dtype):
            continue
        seen.add(x)
        if x.op == "load":
            found.add(x.attr[0].name)
        todo += [lets[x]] if x in lets else x.args[-1:] if x.op == "load" else x.args
    return found


def _by_main(p: Program, root: Callable[[Buffer], str], wide: set[str], declared: dict[str, Buffer]) -> set[str]:
    """Buffers to which main itself stores more."""
    stores = [s for s in walk_stmts(p.body) if isinstance(s, Store) and is_int64(s.buf.dtype)]
    if not stores:
        return set()
    used = {ld.attr[0].name: ld.attr[0] for e in nodes_of(p.body) for ld in ([e] if e.op == "load" else []) if is_int64(ld.attr[0].dtype)}
    used |= {s.buf.name: s.buf for s in stores}
    known: dict[str, Range] = {n: b.dtype.limits() if root(b) in wide else i32.limits() if b.dtype.is_signed else (0, (1 << 32) - 1) for n, b in used.items()}
    r = IntegerRanges(Func("main", (), p.body), {n for n, b in used.items() if root(b) not in wide}, known)
    return {root(s.buf) for s in stores if not fits32(r.of(s.value), s.buf.dtype)}
