"""In which order points are tried."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.ir.compute import Compute
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.select import Point


def order(points: Sequence[Point], compute: Compute, caps: Capabilities) -> list[Point]:
    return list(points)
