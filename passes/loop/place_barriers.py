"""place_barriers: threads of a group meet between writing shared memory and using it.

Before: ``for k: { for t thread.x: s[t] = A[t]; for t thread.x: acc += s[..] }``.
After: ``for k: { barrier shared; for t thread.x: s[t] = A[t]; barrier shared; for t thread.x: acc += s[..] }`` (the first one because
the next round must not overwrite what another thread still reads).

Statements outside thread loops are executed by all threads alike, so a barrier may stand there; inside a thread loop none is
placed, its iterations are independent by the meaning of ``thread``. Neither are rounds of a loop separated that reads nothing it
writes: it fills a tile, each element once. Barriers that are there already count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from luthier.ir.expr import loads
from luthier.ir.loop import Alloc, Barrier, Block, For, Func, If, Stmt, Store, While, block, exprs_of, walk_stmts


@dataclass(frozen=True)
class _Pending:
    """Shared buffers read and written since the last barrier."""

    read: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()

    def conflicts(self, o: _Pending) -> bool:
        return bool(self.written & (o.read | o.written) or self.read & o.written)

    def __or__(self, o: _Pending) -> _Pending:
        return _Pending(self.read | o.read, self.written | o.written)


def place_barriers(f: Func) -> Func:
    if not any(isinstance(s, Alloc) and s.buf.scope == "shared" for s in walk_stmts(f.body)):
        return f
    return f.with_body(_place(f.body, _Pending())[0])


def _uses(s: Stmt) -> _Pending:
    read: set[str] = set()
    written: set[str] = set()
    for x in walk_stmts(s):
        if isinstance(x, Store) and x.buf.scope == "shared":
            written.add(x.buf.name)
        read |= {ld.attr[0].name for e in exprs_of(x) for ld in loads(e) if ld.attr[0].scope == "shared"}
    return _Pending(frozenset(read), frozenset(written))


def _uniform(s: Stmt) -> bool:
    """A statement whose parts may be separated by barriers: a loop or block with thread loops somewhere inside."""
    if isinstance(s, For) and s.kind.startswith("thread"):
        return False
    return any(isinstance(x, For) and x.kind.startswith("thread") for x in walk_stmts(s)) and not isinstance(s, (If, While))


def _place(s: Stmt, p: _Pending) -> tuple[Stmt, _Pending]:
    """``s`` with barriers, and what is pending after it."""
    if isinstance(s, Block):
        out: list[Stmt] = []
        for c in s.stmts:
            if isinstance(c, Barrier):
                p = _Pending()
            elif not _uniform(c):
                u = _uses(c)
                if p.conflicts(u):
                    out.append(Barrier("shared"))
                    p = _Pending()
                p = p | u
            else:
                c, p = _place(c, p)
            out.append(c)
        return block(*out), p
    if isinstance(s, Alloc):
        body, p = _place(s.body, p)
        return Alloc(s.buf, body), p
    if isinstance(s, For) and _uniform(s):
        u = _uses(s)
        if not u.read & u.written:  # a tile being filled: its rounds write different elements
            return (block(Barrier("shared"), s), u) if p.conflicts(u) else (s, p | u)
        _, end = _place(s.body, p)
        body, end = _place(s.body, p if s.kind.startswith("block") else p | end)
        return replace(s, body=body), end
    u = _uses(s)
    if p.conflicts(u):
        return block(Barrier("shared"), s), u
    return s, p | u
