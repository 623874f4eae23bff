"""split_buffers: a parameter that is larger than a binding may be becomes several.

Before: ``func k(W: f32[n])``, ``W[i]``. After, with pieces of p elements: ``func k(W: f32[p], W.1: f32[n - p])``, ``i < p ? W[i] : W.1[i - p]``.
Parameters that the kernel writes are not split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, bcast, const, load, load_parts, rewrite, select
from luthier.ir.loop import Buffer, Func, Store, map_exprs, walk_stmts


def split_buffers(f: Func, pieces: Mapping[str, tuple[int, int]]) -> Func:
    """``pieces``: {parameter: (elements of a piece, number of pieces)}; ``f`` must be flat. Raises CompilationError for a parameter that
    is stored to."""
    if not pieces:
        return f
    for s in walk_stmts(f.body):
        if isinstance(s, Store) and s.buf.scope == "param" and s.buf.name in pieces:
            raise CompilationError(f"buffer {s.buf.name} is written and larger than a binding", op=f.name)
    parts: dict[str, list[Buffer]] = {}
    params: list[object] = []
    for p in f.params:
        if isinstance(p, Buffer) and p.name in pieces:
            size, count = pieces[p.name]
            rest = p.size() - size * (count - 1)
            parts[p.name] = [replace(p, name=f"{p.name}.{k}" if k else p.name, shape=(const(size) if k < count - 1 else rest,)) for k in range(count)]
            params += parts[p.name]
        else:
            params.append(p)

    def fix(e: Expr) -> Expr | None:
        if e.op != "load" or e.attr[0].scope != "param" or e.attr[0].name not in parts or len(e.attr[0].shape) != 1:
            return None
        b, idx, m, o = load_parts(e)
        if b in parts[b.name]:
            return None
        size, count = pieces[b.name]
        lanes = idx[0].dtype.lanes

        def at(k: int) -> Expr:
            start = const(size * k)
            return idx[0] - (start if lanes == 1 else bcast(start, lanes))

        v = load(parts[b.name][count - 1], (at(count - 1),), m, o)
        for k in reversed(range(count - 1)):
            end = const(size * (k + 1))
            inside = idx[0] < (end if lanes == 1 else bcast(end, lanes))
            v = select(inside, load(parts[b.name][k], (at(k),), m, o), v)
        return v

    memo: dict[Expr, Expr] = {}
    return replace(f, params=tuple(params), body=map_exprs(f.body, lambda e: rewrite(e, fix, memo)))
