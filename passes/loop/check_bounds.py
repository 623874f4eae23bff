"""check_bounds: every access of a kernel is preceded by a check of its index, so that no access leaves its buffer.

Before: ``y[i] = x[j]``. After: ``call lt.check_index(&x, j, j, 4); call lt.check_index(&y, i, i, 4); y[i] = x[j]``.

``lt.check_index(buffer, lowest, highest, extent)`` fails the kernel unless ``0 <= lowest`` and ``highest < extent``. Lanes are
checked together by their least and greatest index; lanes that a mask switches off count as index 0 and -1. It is the last pass
before a printer: what is checked is what runs, and nothing is taken as proved but a constant inside a constant extent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from luthier.ir.errors import KernelError
from luthier.ir.expr import Expr, as_expr, bcast, const, load_parts, select, vreduce
from luthier.ir.intrin import register
from luthier.ir.loop import (
    Alloc,
    Block,
    Buffer,
    Call,
    For,
    Func,
    If,
    Stmt,
    Store,
    While,
    block,
    exprs_of,
    map_children,
    walk_stmts,
)

CHECK = "lt.check_index"


def check_bounds(f: Func) -> Func:
    """``f`` with a check in front of every access but those of register variables. Applied twice it changes nothing."""
    if is_checked(f):
        return f
    return f.with_body(_stmt(f.body))


def is_checked(f: Func) -> bool:
    """Whether the kernel can fail: it holds a check."""
    return any(isinstance(s, Call) and s.callee == CHECK for s in walk_stmts(f.body))


def _stmt(s: Stmt) -> Stmt:
    if isinstance(s, Block):
        return block(*(_stmt(c) for c in s.stmts))
    checks = list(_checks(exprs_of(s)))
    if isinstance(s, Store):
        checks += _access(s.buf, s.idx, s.mask)
        return block(*checks, s)
    if isinstance(s, While):  # the condition is evaluated before every round
        return block(*checks, While(s.cond, block(_stmt(s.body), *checks)))
    if isinstance(s, (For, If, Alloc)):
        return block(*checks, map_children(s, _stmt))
    return block(*checks, s)


def _checks(es: Iterable[Expr]) -> Iterator[Stmt]:
    """Checks of all loads in ``es``: the loads in an index or a mask come before the access that uses them."""
    seen: set[Expr] = set()

    def go(e: Expr) -> Iterator[Stmt]:
        if e in seen:
            return
        seen.add(e)
        for a in e.args:
            yield from go(a)
        if e.op == "load":
            buf, idx, mask, _ = load_parts(e)
            yield from _access(buf, idx, mask)

    for e in es:
        yield from go(e)


def _access(buf: Buffer, idx: tuple[Expr, ...], mask: Expr | None) -> list[Stmt]:
    out: list[Stmt] = []
    for i, n in zip(idx, buf.shape, strict=True):
        lo, hi = _range(i, mask)
        if lo.op == hi.op == n.op == "const" and 0 <= lo.attr and hi.attr < n.attr:
            continue
        out.append(Call(CHECK, (buf, lo, hi, n)))
    return out


def _range(i: Expr, mask: Expr | None) -> tuple[Expr, Expr]:
    """Least and greatest index of the lanes that ``mask`` leaves on; 0 and -1 when it leaves none."""
    lanes = max(i.dtype.lanes, mask.dtype.lanes if mask is not None else 1)
    if mask is None:
        if i.op == "ramp":
            base, last = i.args[0], i.args[0] + as_expr(i.attr[0] * (lanes - 1))
            return (base, last) if i.attr[0] >= 0 else (last, base)
        if i.op == "bcast":
            return i.args[0], i.args[0]
        return vreduce("min", i), vreduce("max", i)
    if lanes == 1:
        return select(mask, i, const(0)), select(mask, i, const(-1))
    i = i if i.dtype.lanes == lanes else bcast(i, lanes)
    m = mask if mask.dtype.lanes == lanes else bcast(mask, lanes)
    return vreduce("min", select(m, i, bcast(const(0), lanes))), vreduce("max", select(m, i, bcast(const(-1), lanes)))


def _evaluate(buffer: Any, lowest: Any, highest: Any, extent: Any) -> None:
    if lowest < 0 or highest >= extent:
        raise KernelError(f"index {lowest if lowest < 0 else highest} is outside the extent {extent} of a buffer of shape {list(buffer.shape)}")


register(CHECK, _evaluate, "(buffer, lowest, highest, extent): fails unless 0 <= lowest and highest < extent", effect=True)
