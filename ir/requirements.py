"""What type inference takes for granted about extents that only a run knows, so that the program can check it.

``Op.infer`` refuses extents that certainly do not fit. Where it cannot know, it goes on under an assumption and states it with
:func:`assume_equal`; the importer collects what the nodes of a graph state (:func:`collecting`) into ``Graph.requirements``, and the
program checks them before any kernel of that graph reads memory. Outside of ``collecting`` nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from luthier.ir.expr import Expr, maximum, minimum, select

_open: ContextVar[list[Requirement] | None] = ContextVar("requirements", default=None)


@dataclass(frozen=True, slots=True)
class Requirement:
    """``got`` equals ``want`` in every run. ``what``: which extents of which node they are, for the message. ``needed``: symbols in it are
    read for this check alone, if nothing else needs them."""

    got: Expr
    want: Expr
    what: str
    needed: bool = False


@dataclass(frozen=True, slots=True)
class Within:
    """Every element of input number ``input`` lies in ``low .. high`` (over the extents of inputs; a pair for all or one for each place along
    the last axis): a check that the caller's side makes before a run, where reading back what a kernel found is too dear."""

    input: int
    low: tuple[Expr, ...]
    high: tuple[Expr, ...]
    what: str


@contextmanager
def collecting(what: str) -> Iterator[list[Requirement]]:
    """The list that assumptions go to meanwhile, without repetitions; ``what`` stands in front of their descriptions."""
    mine: list[Requirement] = []
    token = _open.set(mine)
    try:
        yield mine
    finally:
        _open.reset(token)
    seen: dict[tuple[Expr, Expr], Requirement] = {}
    for r in mine:
        seen.setdefault((r.got, r.want), Requirement(r.got, r.want, f"{what}: {r.what}"))
    mine[:] = seen.values()


def assume_equal(got: Expr, want: Expr, what: str = "an extent") -> None:
    """Two extents that must be the same."""
    mine = _open.get()
    if mine is not None and got is not want and not (got.op == want.op == "const"):
        mine.append(Requirement(got, want, what))


def assume_at_most(got: Expr, limit: Expr, what: str) -> None:
    """``got <= limit``."""
    assume_equal(minimum(got, limit), got, what)


def assume_at_least(got: Expr, limit: Expr, what: str) -> None:
    """``got >= limit``."""
    assume_equal(got, maximum(got, limit), what)


def assume_broadcast(a: Expr, b: Expr, what: str = "extents that broadcast") -> None:
    """Equal, or one of them is 1."""
    assume_equal(select(a.eq(1), b, a), select(b.eq(1), a, b), what)
