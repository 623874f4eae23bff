"""transpose_blocks: strided vector loads that read the columns of a square block together become loads of its rows and shuffles.

Before (4 lanes, straight code; T may be known to the run only)::

    y[ramp(i, 1, 4)] = x[ramp(j, T, 4)]
    y[ramp(i + S, 1, 4)] = x[ramp(j + 1, T, 4)]
    ... j + 2, j + 3

After::

    let r0 = x[ramp(j, 1, 4)]; let r1 = x[ramp(j + T, 1, 4)]; let r2 = ..; let r3 = ..
    let a = shuffle(r0, r1; 0, 4, 1, 5); ...
    y[ramp(i, 1, 4)] = c0; y[ramp(i + S, 1, 4)] = c1; ...

The same elements are read, each once, by whole vectors. Blocks have 4, 8 or 16 elements of 32 bits a side: the register width of the
vectorised loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.ir.expr import (
    Expr,
    const,
    free_vars,
    is_const,
    load,
    load_parts,
    loads,
    poly_const,
    ramp,
    rewrite_loads,
    shuffle,
    var,
)
from luthier.ir.loop import Block, Buffer, Func, Let, Stmt, Store, block, map_children, map_own_exprs

SIDES = (4, 8, 16)


def transpose_blocks(f: Func) -> Func:
    return f.with_body(_Transposer().stmt(f.body))


class _Transposer:
    def __init__(self) -> None:
        self.count = 0

    def stmt(self, s: Stmt) -> Stmt:
        if not isinstance(s, Block):
            return map_children(s, self.stmt)
        out: list[Stmt] = []
        run: list[Store | Let] = []
        for c in (*s.stmts, None):
            if isinstance(c, (Store, Let)):
                run.append(c)
                continue
            out += self.straight(run)
            run = []
            if c is not None:
                out.append(self.stmt(c))
        return block(*out)

    def straight(self, run: list[Store | Let]) -> list[Stmt]:
        """A run of stores and definitions, with what their blocks need before it."""
        if len(run) < SIDES[0]:
            return list(run)
        written = {s.buf.name for s in run if isinstance(s, Store)}
        bound = {s.var for s in run if isinstance(s, Let)}
        groups: dict[tuple[Buffer, int, Expr, Expr], dict[int, Expr]] = {}
        for s in run:
            for x in loads(*((s.value, *s.idx) if isinstance(s, Store) else (s.value,))):
                buf, idx, mask, _ = load_parts(x)
                n = x.dtype.lanes
                if mask is not None or n not in SIDES or x.dtype.bits != 32 or len(idx) != 1 or buf.dtype.lanes > 1 or buf.name in written or bound & free_vars(x):
                    continue
                at = line(idx[0])
                if at is None or at[1].op == "const" and abs(at[1].attr) < n:
                    continue
                c = poly_const(at[0])
                groups.setdefault((buf, n, at[0] - c, at[1]), {})[c] = x
        before: list[Stmt] = []
        env: dict[Expr, Expr] = {}
        for (buf, n, base, step), found in groups.items():
            for c in sorted(found):
                columns = [found.get(c + k) for k in range(n)]
                if all(x is not None and x not in env for x in columns):
                    rows = [load(buf, (ramp(base + c + step * k, 1, n),)) for k in range(n)]
                    before += self.network(rows, [x for x in columns if x is not None], env)
        if not env:
            return list(run)
        memo: dict[Expr, Expr] = {}
        return [*before, *(map_own_exprs(s, lambda e: rewrite_loads(e, env.get, memo)) for s in run)]

    def let(self, e: Expr, out: list[Stmt]) -> Expr:
        self.count += 1
        v = var(f"block~{self.count}", e.dtype, None)
        out.append(Let(v, e))
        return v

    def network(self, rows: Sequence[Expr], columns: Sequence[Expr], env: dict[Expr, Expr]) -> list[Stmt]:
        """Definitions of the columns: four rows at a time within 128 bits, then whole parts of 128 bits change places."""
        n = len(rows)
        out: list[Stmt] = []
        rows = [self.let(r, out) for r in rows]

        def pick(a: Expr, b: Expr, lanes: Sequence[int]) -> Expr:
            """Per 128 bits: ``lanes`` of (four of a, four of b)."""
            return self.let(shuffle((a, b), [4 * part + (k if k < 4 else n + k - 4) for part in range(n // 4) for k in lanes]), out)

        quads: list[list[Expr]] = [[] for _ in range(4)]  # [column modulo 4][group of four rows]
        for g in range(0, n, 4):
            low, high = ([pick(rows[g + k], rows[g + k + 1], order) for k in (0, 2)] for order in ((0, 4, 1, 5), (2, 6, 3, 7)))
            for c, (a, b) in enumerate((low, low, high, high)):
                quads[c].append(pick(a, b, (0, 1, 4, 5) if c % 2 == 0 else (2, 3, 6, 7)))
        for c, parts in enumerate(quads):
            for k, v in enumerate(self.parts(parts, n, out)):
                env[columns[4 * k + c]] = v
        return out

    def parts(self, v: list[Expr], n: int, out: list[Stmt]) -> list[Expr]:
        """The transposition of a square of parts of 128 bits."""

        def pick(a: Expr, b: Expr, which: tuple[int, ...]) -> Expr:
            """Parts of a, then as many of b."""
            return self.let(shuffle((a, b), [4 * p + k + (n if side else 0) for side in (0, 1) for p in which for k in range(4)]), out)

        if len(v) == 1:
            return v
        if len(v) == 2:
            return [pick(v[0], v[1], (0,)), pick(v[0], v[1], (1,))]
        halves = [[pick(v[0], v[1], w), pick(v[2], v[3], w)] for w in ((0, 1), (2, 3))]
        return [pick(a, b, w) for a, b in halves for w in ((0, 2), (1, 3))]


def line(e: Expr) -> tuple[Expr, Expr] | None:
    """(base, step) of lanes that are ``base + step * lane``; None for others."""
    if e.op == "ramp":
        return e.args[0], const(e.attr[0])
    if e.op == "bcast":
        return e.args[0], const(0)
    if e.op not in ("add", "sub", "mul") or len(e.args) != 2:
        return None
    a, b = line(e.args[0]), line(e.args[1])
    if a is None or b is None:
        return None
    if e.op == "mul":
        if is_const(a[1], 0):
            a, b = b, a
        return (a[0] * b[0], a[1] * b[0]) if is_const(b[1], 0) else None
    return (a[0] + b[0], a[1] + b[1]) if e.op == "add" else (a[0] - b[0], a[1] - b[1])
