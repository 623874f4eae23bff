"""From a Compute to kernels: the template whose pattern fits schedules it, lowering and the shared loop passes follow.

A template is one file of this folder with ``match(compute, caps) -> bool`` and ``apply(schedule, caps, constants, **knobs) ->
Schedule``; ``TEMPLATES`` is the order in which they are tried. The last one fits everything.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.ir.compute import Compute
from luthier.ir.loop import Buffer, For, Func, walk_stmts
from luthier.passes.flatten import flatten
from luthier.passes.place_lets import place_lets
from luthier.passes.promote_locals import promote_locals
from luthier.passes.unroll import unroll
from luthier.passes.vectorize import vectorize
from luthier.schedules.capabilities import Capabilities
from luthier.schedules.lower import lower
from luthier.schedules.schedule import Schedule, schedule

TEMPLATES = ("contract", "rowwise", "elementwise")


@dataclass(slots=True)
class Kernels:
    """``funcs``: in order of execution, parameters named like the Compute's tensors; ``temps``: tensors that pass between them;
    ``packed``: {name: array} constants repacked now; ``template``, ``schedule``: what made them, for inspection."""

    funcs: tuple[Func, ...]
    temps: tuple[Buffer, ...] = ()
    packed: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    template: str = ""
    trace: tuple[tuple[Any, ...], ...] = ()


def loop_passes(caps: Capabilities) -> list[Callable[[Func], Func]]:
    """The shared passes between a schedule and every printer, in order."""
    try:
        from luthier.passes.expand_math import expand
    except ImportError:
        return [flatten, unroll, vectorize, promote_locals, place_lets]
    return [flatten, unroll, vectorize, promote_locals, functools.partial(expand, native=caps.native), place_lets]


def build_kernel(f: Func, caps: Capabilities) -> Func:
    """A loop-IR function in the form that printers take."""
    for p in loop_passes(caps):
        f = p(f)
    return f


def build(compute: Compute, caps: Capabilities, constants: Mapping[str, np.ndarray[Any, Any]] | None = None, **knobs: Any) -> Kernels:
    """Schedules, lowers and prepares ``compute`` for printing. ``constants``: contents of parameters known now.

    ``knobs`` go to the template (``template="name"`` forces one)."""
    consts = constants or {}
    s0 = schedule(compute)
    forced = knobs.pop("template", None)
    for name in (forced,) if forced else TEMPLATES:
        t = importlib.import_module(f"luthier.schedules.{name}")
        s = t.apply(s0, caps, consts, **knobs)
        if s is not None:
            return finish(s, caps, consts, name)
    raise AssertionError("the elementwise template fits everything")


def finish(s: Schedule, caps: Capabilities, consts: Mapping[str, np.ndarray[Any, Any]], template: str = "") -> Kernels:
    """Lowering, run-time packing kernels, loop passes."""
    packed: dict[str, np.ndarray[Any, Any]] = {}
    pre: list[Func] = []
    temps: list[Buffer] = []
    for n, p in s.packed.items():
        if p.param in consts:
            packed[n] = p.apply(consts[p.param])
        else:
            k = build(p.job, caps)
            pre += k.funcs
            temps.append(replace(p.buf, scope="global", writable=True))
    funcs = []
    written: dict[str, Buffer] = {}
    for f in lower(s):
        f = replace(f, attrs={**f.attrs, "template": template})
        funcs.append(build_kernel(f, caps))
        for b in f.buffers:
            if b.writable:
                written.setdefault(b.name, b)
    outs = set(s.compute.outs)
    temps += [replace(b, scope="global") for n, b in written.items() if n not in outs]
    return Kernels((*pre, *funcs), tuple(temps), packed, template, s.trace)


def parallel_extent(f: Func) -> Any:
    """The outermost parallel loop of a kernel, or None."""
    for s in walk_stmts(f.body):
        if isinstance(s, For) and s.kind == "parallel":
            return s
    return None
