"""The space of a kernel: templates that fit its Compute with values of their declared knobs, pruned; the default is always in it.

The lite space has at most ``LITE`` points: the template that is taken by default and its alternatives, the knobs of one group in
all combinations, others one at a time, and of those only what the template finds plausible on the target (``plausible(knobs, caps)``).
The wide space crosses all knobs: the yardstick of ``benchmarks/tuner.py``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from luthier.ir.compute import Compute
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import ScheduleError
from luthier.schedules.select import Constants, Point, build, template_module

LITE = 64
# templates whose patterns overlap: where one is the default, the others are worth a try
ALTERNATIVES = (("winograd", "contract"), ("byte_products", "winograd_integer", "contract_integer"), ("contract_half", "contract"))


def lite(template: str, compute: Compute, caps: Capabilities, constants: Constants) -> list[Point]:
    """At most ``LITE`` points, the default first. ``template``: what is taken by default."""
    names = (template, *alternatives(template, compute, caps, constants))
    found = dict.fromkeys([*(Point(t) for t in names), *itertools.chain(*(_lite(t, compute, caps) for t in names))])
    return list(found)[:LITE]


def wide(template: str, compute: Compute, caps: Capabilities, constants: Constants) -> list[Point]:
    """All combinations of all knobs of the template and its alternatives, the default first."""
    names = (template, *alternatives(template, compute, caps, constants))
    found = [p for t in names for p in _crossed(t, template_module(t).KNOBS, compute, caps)]
    return list(dict.fromkeys([Point(template), *found]))


def alternatives(template: str, compute: Compute, caps: Capabilities, constants: Constants) -> list[str]:
    """Other templates that fit the Compute."""
    out = []
    for t in dict.fromkeys(t for group in ALTERNATIVES if template in group for t in group if t != template):
        with contextlib.suppress(ScheduleError):
            build(compute, caps, constants, template=t)
            out.append(t)
    return out


def _lite(template: str, compute: Compute, caps: Capabilities) -> Iterator[Point]:
    knobs = template_module(template).KNOBS
    alone = [[k] for k in knobs if not k.group]
    together = [[k for k in knobs if k.group == g] for g in dict.fromkeys(k.group for k in knobs if k.group)]
    for group in (*alone, *together):
        yield from _crossed(template, group, compute, caps)


def _crossed(template: str, knobs: Iterable[Knob], compute: Compute, caps: Capabilities) -> Iterator[Point]:
    plausible = getattr(template_module(template), "plausible", None)
    knobs = list(knobs)
    for values in itertools.product(*(k.worth(caps, compute) for k in knobs)):
        given: dict[str, Any] = {k.name: v for k, v in zip(knobs, values, strict=True) if v != k.default}
        if plausible is None or plausible(given, caps):
            yield Point(template, tuple(given.items()))
