"""Templates that fit one pattern, with the knobs worth measuring: the search space of a choice by measurement.

Which of them is fastest depends on the machine, the width, the group and the number of activation rows. Without a measurement the first
that fits with its own defaults is taken (what was fastest where it was written); with one (:mod:`luthier.tuner.choose`) all of them are made
and timed. They read the same stored bits: each packs them for itself when the model is compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.ir.dtypes import i32
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.schedule import Schedule
from luthier.schedules.intrin import usable

if TYPE_CHECKING:
    from luthier.schedules.select import Kernels

# {template: knobs of each candidate}, in the order of preference without a measurement. ``widths``: look-ups for 3 bits as well.
RIVALS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "lut_gemv": tuple({"widths": (1, 2, 3), "streams": n} for n in (None, 1, 2, 4)),
    "lut_wide": tuple({"streams": n} for n in (None, 1, 4)),  # never without a measurement
    "quantized_gemv": (*({"streams": n} for n in (None, 2, 4)), *({"rows": n} for n in (1, 2, 4))),
}


def defaults(name: str, caps: Capabilities) -> Mapping[str, Any]:
    """Knobs of a template where nothing is measured (benchmarks/results/lut_choice.md): three bits are looked up as well where registers have
    128 bits and no instruction sums four products of bytes into the accumulator."""
    dots = caps.printer == "llvm" and any(i.group == 4 and i.adds and i.acc is i32 for i in usable(caps))
    return {"widths": (1, 2, 3)} if name == "lut_gemv" and caps.vector_bits == 128 and not dots else {}


def rivals(s: Schedule, caps: Capabilities, constants: Mapping[str, Any]) -> list[Kernels]:
    """The kernels of every template of ``RIVALS`` that fits, with each of its knobs, once each; the one that is taken without
    a measurement comes first. Empty when none fits."""
    tries = [(name, defaults(name, caps)) for name in RIVALS]
    tries += [(name, knobs) for name, all_knobs in RIVALS.items() for knobs in all_knobs]
    out: dict[str, Kernels] = {}
    for name, knobs in tries:
        k = importlib.import_module(f"luthier.schedules.lowbit.{name}").apply(s, caps, constants, **knobs)
        if k is not None:
            out.setdefault("\n".join(str(f) for f in k.funcs), k)
    return list(out.values())
