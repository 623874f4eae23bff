"""Knobs of templates, declared as data: what a tuner reads, what ``luthier inspect --knobs`` prints, what :func:`check` refuses.

A template's file has ``KNOBS``, a tuple of :class:`Knob`; each is a keyword argument of its ``apply`` whose default means the template's
own choice. Values worth trying depend on the target and on what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.ir.compute import Compute
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.schedule import ScheduleError

Values = Callable[[Capabilities, Compute], tuple[Any, ...]]


@dataclass(frozen=True)
class Knob:
    """``name``: the keyword; ``about``: what it decides, with its unit; ``default``: what stands for the template's own choice; ``values``:
    what else is worth trying, a tuple or a function of (capabilities, Compute). ``group``: knobs of one group are tried in all combinations, others
    one at a time."""

    name: str
    about: str
    values: tuple[Any, ...] | Values = ()
    default: Any = None
    group: str = ""

    def worth(self, caps: Capabilities, compute: Compute) -> tuple[Any, ...]:
        """The default first, then what else is worth trying; each once."""
        more = self.values(caps, compute) if callable(self.values) else self.values
        return (self.default, *(v for v in dict.fromkeys(more) if v != self.default))


def check(template: str, knobs: tuple[Knob, ...], given: Mapping[str, Any]) -> None:
    """Raises ScheduleError for a knob that ``template`` does not declare."""
    known = [k.name for k in knobs]
    for name in given:
        if name not in known:
            raise ScheduleError(f"template {template} has no knob {name!r}; it has {', '.join(known) or 'none'}")
