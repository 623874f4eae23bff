"""clamp_loads: threads behind the last row read nothing outside of a buffer.

Such threads compute with the last row's data and store nothing. What they hold of a staged tensor stands at their own place,
which the clamped row's index misses; and what only masked stores need has no clamp. Before: ``alloc m: f32[1] local: .. let v =
m[min(t, 2) - t]; Y[t] = v + b[t] if t < n``. After: ``let v = m[0]; Y[t] = v + b[min(t, n - 1)] if t < n``. Indices that are
known to be inside, and stores, are left alone. Runs on flat scalar code, before values that several stores share are named, which
takes them from under the mask.
"""

from __future__ import annotations

from luthier.ir.expr import Expr, bounds, const, free_vars, load, load_parts, maximum, minimum, prove, rewrite_loads
from luthier.ir.loop import Block, Func, If, Let, Stmt, Store, block, exprs_of, map_children, map_own_exprs, walk_stmts


def clamp_loads(f: Func) -> Func:
    needed = variables_needed(f)
    memos: dict[frozenset[str], dict[Expr, Expr]] = {}

    def fix(e: Expr, scopes: frozenset[str]) -> Expr | None:
        if e.op != "load" or not e.attr[0].rank or e.attr[0].scope not in scopes:
            return None
        b, (i,), mask, other = load_parts(e)
        lo, hi = bounds(i)
        n = b.size()
        low = isinstance(lo, int) and lo >= 0
        if low and (isinstance(hi, int) and n.op == "const" and hi < n.attr or prove(i < n)):
            return None
        inside = const(0) if n.op == "const" and n.attr == 1 else minimum(i, n - 1)
        return load(b, (inside if low or inside.op == "const" else maximum(const(0), inside),), mask, other)

    def st(s: Stmt, inside: bool) -> Stmt:
        """``inside``: of an If, which may be what keeps an index in range."""
        if isinstance(s, Block):
            return block(*(st(x, inside) for x in s.stmts))
        masked = s.mask is not None if isinstance(s, Store) else isinstance(s, Let) and s.var not in needed
        scopes = frozenset({"local", "shared", "param"} if masked else {"local"} if inside else {"local", "shared"})
        s = map_own_exprs(s, lambda e: rewrite_loads(e, lambda x: fix(x, scopes), memos.setdefault(scopes, {})))
        return s if isinstance(s, (Store, Let)) else map_children(s, lambda x: st(x, inside or isinstance(s, If)))

    return f.with_body(st(f.body, False))


def variables_needed(f: Func) -> set[Expr]:
    """The variables that something else than masked stores needs."""
    needed: set[Expr] = set()
    for s in reversed(list(walk_stmts(f.body))):
        if isinstance(s, Let):
            if s.var in needed:
                needed |= free_vars(s.value)
        elif isinstance(s, Store) and s.mask is not None:
            needed |= free_vars(s.mask)
        else:
            for e in exprs_of(s):
                needed |= free_vars(e)
    return needed
