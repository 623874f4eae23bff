"""merge_bindings: parameters that lie in one piece of memory become one parameter.

Before: ``func k(A: f32[8], B: u32[4], C: f32[8])`` with groups ``[[A, B]]``. After: ``func k(A: u32[max(8, 4)], C: f32[8])``, loads of
A and B are loads of the merged buffer, their bits taken as the type they had. Where in the memory each one starts was added to the
indices before (:mod:`luthier.passes.gpu.offset_buffers`).

WebGPU needs it twice: a buffer that a kernel writes may be bound once only, and a kernel may have eight storage buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from luthier.ir.dtypes import u32
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, bitcast, load, load_parts, maximum, rewrite, select
from luthier.ir.loop import Buffer, Call, Func, Stmt, Store, map_children, map_exprs


def merge_bindings(f: Func, groups: Sequence[Sequence[str]]) -> Func:
    """``f`` is flat, scalar and has 32-bit elements only. The merged buffer stands where the first of its group stood and has its
    name. Raises CompilationError for elements of another width."""
    bufs = {b.name: b for b in f.buffers}
    target: dict[str, Buffer] = {}
    first: dict[str, Buffer] = {}
    for g in groups:
        if len(g) < 2:
            continue
        members = [bufs[n] for n in g]
        for b in members:
            if b.dtype.bits * b.dtype.lanes != 32 or b.dtype.is_index:
                raise CompilationError(f"buffer {b.name} of {b.dtype} cannot share a binding", op=f.name)
        dtypes = {b.dtype for b in members}
        size = members[0].size()
        for b in members[1:]:
            size = maximum(size, b.size())
        merged = replace(members[0], dtype=dtypes.pop() if len(dtypes) == 1 else u32, shape=(size,), writable=any(b.writable for b in members))
        first[g[0]] = merged
        target |= dict.fromkeys(g, merged)
    if not target:
        return f

    def cast(v: Expr, d: object) -> Expr:
        return v if v.dtype is d else bitcast(v, d)  # type: ignore[arg-type]

    def fix(e: Expr) -> Expr | None:
        if e.op == "load" and e.attr[0].scope == "param" and e.attr[0].name in target:
            b, idx, m, o = load_parts(e)
            t = target[b.name]
            if t.dtype is b.dtype:
                return load(t, idx, m, o)
            v = cast(load(t, idx, m), b.dtype)
            return v if m is None or o is None else select(m, v, o)
        return None

    memo: dict[Expr, Expr] = {}

    def st(s: Stmt) -> Stmt:
        if isinstance(s, Store) and s.buf.scope == "param" and s.buf.name in target:
            t = target[s.buf.name]
            return Store(t, s.idx, cast(s.value, t.dtype), s.mask)
        if isinstance(s, Call):
            return Call(s.callee, tuple(target.get(a.name, a) if isinstance(a, Buffer) else a for a in s.args), s.attrs)
        return map_children(s, st)

    body = map_exprs(st(f.body), lambda e: rewrite(e, fix, memo))
    params: list[object] = []
    for p in f.params:
        if not isinstance(p, Buffer) or p.name not in target:
            params.append(p)
        elif p.name in first:
            params.append(first[p.name])
    return replace(f, params=tuple(params), body=body)
