"""split_grid: a grid longer than a dimension may be becomes two dimensions.

Before: ``for b in 0..n block.x: S(b)``. After: ``for by in 0..(n + 65534) // 65535 block.y: for bx in 0..min(n, 65535) block.x: let g =
by * 65535 + bx: if g < n: let b = g: S(b)``. The condition is the same for all threads of a group, so barriers inside stay legal. A grid
that is known to be short enough, or that uses ``block.y`` already, is left alone.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.expr import bounds, const, minimum, var
from luthier.ir.loop import For, Func, If, Let, Stmt, block, map_children, walk_stmts


def split_grid(f: Func, limit: int = 65535) -> Func:
    """``limit``: groups that one dimension of the grid may have."""
    if any(isinstance(s, For) and s.kind == "block.y" for s in walk_stmts(f.body)):
        return f

    def st(s: Stmt) -> Stmt:
        if isinstance(s, For) and s.kind == "block.x":
            n = s.extent
            hi = bounds(n)[1]
            if isinstance(hi, int) and hi <= limit:
                return s
            rows = (n + (limit - 1)) // limit
            y, x = var(f"{s.var.attr[0]}.gy", lo=0, hi=rows - 1), var(f"{s.var.attr[0]}.gx", lo=0, hi=minimum(n, const(limit)) - 1)
            raw = var(f"{s.var.attr[0]}.g", lo=0)  # without the bounds of the loop's variable, by which the condition would be true
            body = block(Let(raw, s.lo + y * limit + x), If(raw < s.hi, block(Let(s.var, raw), s.body)))
            return For(y, const(0), rows, "block.y", For(x, const(0), minimum(n, const(limit)), "block.x", body))
        return map_children(s, st)

    body = st(f.body)
    return f if body is f.body else replace(f, body=body)
