"""Template for Computes with a Fold (recurrent networks): the work of one round uses lanes.

The loop over time stays serial. Inside it, elementwise steps put their innermost axis in lanes, sums over a state run in lanes
with private partial results. What stands outside of the Fold is scheduled like any pointwise tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.reduction import use_lanes
from luthier.schedules.base.schedule import Schedule, annotate, split
from luthier.schedules.cpu import elementwise
from luthier.schedules.cpu.elementwise import widest_bits


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], **knobs: Any) -> Schedule | None:
    """None when the Compute has no Fold."""
    hosts = {n for n, st in s.stages.items() if st.fold is not None}
    if not hosts or caps.gpu:
        return None
    inside = [n for n, st in s.stages.items() if st.at is not None and st.at[0] in hosts]
    out = elementwise.apply(s, caps, constants, **knobs)
    assert out is not None
    for n in inside:
        out = _lanes(out, n, caps)
    return out


def _lanes(s: Schedule, name: str, caps: Capabilities) -> Schedule:
    st = s.stages[name]
    if st.reduction is not None:
        return use_lanes(s, name, caps)
    if not st.axes:
        return s
    loop = next((lp for lp in st.loops if lp.var is st.subst[st.axes[-1].var]), None)
    lanes = caps.lanes(widest_bits(st))
    n = None if loop is None else s.static_extent(loop.var)
    if loop is None or lanes == 1 or n is None or n < lanes:
        return s
    s = split(s, loop.name, lanes, "cut")
    return annotate(s, f"{loop.name}.1", "vectorize")
