"""Intrinsics: named operations that a target has as one instruction (dot products, table look-ups, tile loads).

A pure one is used as ``call(name, dtype, *args)`` in an expression, one with effects as a ``Call`` statement. What it means
is stated here in numpy; which instruction it is stands with the target. Modules in ``schedules/intrin`` register theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.ir.errors import VerificationError


@dataclass(frozen=True, slots=True)
class Intrinsic:
    """``evaluate(dtype, attr, *args)`` for a pure one: the result as a numpy value of ``dtype`` (lanes on the last axis).
    ``evaluate(*args, **attrs)`` for one with effects: arrays are changed in place."""

    name: str
    evaluate: Callable[..., Any]
    doc: str = ""


PURE: dict[str, Intrinsic] = {}
EFFECT: dict[str, Intrinsic] = {}


def register(name: str, evaluate: Callable[..., Any], doc: str = "", effect: bool = False) -> None:
    """Declare an intrinsic; the same name may be registered again only with the same meaning (last one wins)."""
    (EFFECT if effect else PURE)[name] = Intrinsic(name, evaluate, doc)


def lookup(name: str) -> Intrinsic:
    """The pure intrinsic ``name``. Raises VerificationError when nobody registered it."""
    if name not in PURE:
        raise VerificationError(f"no intrinsic named {name!r}; known: {', '.join(sorted(PURE)) or 'none'}")
    return PURE[name]


def lookup_effect(name: str) -> Intrinsic:
    """The intrinsic with effects ``name``. Raises VerificationError when it is neither that nor a kernel of the module."""
    if name not in EFFECT:
        raise VerificationError(f"{name!r} is neither a kernel of this module nor a registered intrinsic")
    return EFFECT[name]
