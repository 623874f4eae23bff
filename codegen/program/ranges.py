"""What a printer may know of an integer expression's value."""

from __future__ import annotations

from luthier.ir.expr import Expr, bounds
from luthier.ir.loop import Buffer


def value_range(e: Expr) -> tuple[int | None, int | None]:
    """Inclusive bounds of an integer, through a conversion that keeps the value; None where unbounded."""
    if e.op == "cast" and e.dtype.is_int and (e.args[0].dtype.is_int or e.args[0].dtype.is_index):
        lo, hi = bounds(e.args[0])
        low, high = e.dtype.limits()
        if lo is not None and hi is not None and low <= lo and hi <= high:
            return lo, hi
    return bounds(e)


def most_elements(b: Buffer) -> int | None:
    """The largest number of elements of a buffer, from the bounds of its extents; None where there is none."""
    return bounds(b.size())[1]
