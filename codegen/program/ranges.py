"""What a printer may know of an buffer's size."""

from __future__ import annotations

from luthier.ir.expr import bounds
from luthier.ir.loop import Buffer


def most_elements(b: Buffer) -> int | None:
    """The largest number of elements of a buffer, from the bounds of its extents; None where there is none."""
    return bounds(b.size())[1]
