"""unroll: loops of kind ``unroll`` with a constant number of rounds become straight code; others become serial.

Before: ``for i in 0..3 unroll: A[i] = i``. After: ``A[0] = 0; A[1] = 1; A[2] = 2``.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import Expr, const, var
from luthier.ir.loop import For, Func, Let, Stmt, block, map_children, substitute_stmt, walk_stmts

LIMIT = 512


def unroll(f: Func) -> Func:
    count = [0]

    def st(s: Stmt) -> Stmt:
        if isinstance(s, For) and s.kind == "unroll":
            body = st(s.body)
            n = s.extent
            if n.op != "const" or s.lo.op != "const" or n.attr > LIMIT:
                return replace(s, kind="serial", body=body)
            lets = [x.var for x in walk_stmts(body) if isinstance(x, Let)]
            out = []
            for k in range(n.attr):
                env: dict[Expr, Expr] = {s.var: const(s.lo.attr + k)}
                piece = body
                if lets and k:
                    count[0] += 1
                    ren = {v: var(f"{v.attr[0]}~u{count[0]}", v.dtype, v.attr[1], v.attr[2]) for v in lets}
                    piece = _rename(piece, ren)
                    env |= ren
                out.append(substitute_stmt(piece, env))
            return block(*out)
        return map_children(s, st)

    return f.with_body(st(f.body))


def _rename(s: Stmt, ren: dict[Expr, Expr]) -> Stmt:
    if isinstance(s, Let):
        return Let(ren.get(s.var, s.var), s.value)
    return map_children(s, lambda c: _rename(c, ren))
