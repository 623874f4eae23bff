"""Template for sums of products of half-precision operands (f16, bf16), accumulated in f32.

The pattern is ``acc[..] = sum(f32(x) * f32(w))``. Where the target multiplies bf16 pairs (``vdpbf16ps``), the operands are packed and
tensorized like those of :mod:`luthier.schedules.cpu.contract_integer`. Elsewhere the activation, which the products read one element at a
time, gets a copy in f32, converted in vectors; the weights stay as they are and are widened in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.ir.compute import Pull, axis, reduce_
from luthier.ir.dtypes import bf16, f32
from luthier.ir.expr import Expr, cast, free_vars, substitute
from luthier.ir.intrin import Instruction
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.knobs import Knob
from luthier.schedules.base.schedule import Schedule, pull_stage
from luthier.schedules.cpu import contract
from luthier.schedules.cpu.contract_integer import Operand, blocked, group_axis, schedule_pads, widened_copy
from luthier.schedules.intrin import usable

KNOBS = (*contract.KNOBS, Knob("instr", "the instruction of the target; its own choice where it is left out"))


def apply(s: Schedule, caps: Capabilities, constants: Mapping[str, Any], *, instr: Instruction | None = None, **knobs: Any) -> Schedule | None:
    prepared = None if caps.gpu or caps.lanes(32) < 2 else contract.prepare(s)
    if prepared is None:
        return None
    s, acc, out = prepared
    st = s.stages[acc]
    if st.buf.dtype is not f32 or (contract.work(st) or 2048) < 2048:
        return None
    a, b = (_operand(f) for f in contract.factors_of(st))
    v = st.axes[-1].var
    if a is None or b is None or v in free_vars(a.ld) and v in free_vars(b.ld):
        return None
    w, x = (a, b) if v in free_vars(a.ld) else (b, a)
    if v not in free_vars(w.ld) or x.buf.dtype is f32:
        return None
    for i in [instr] if instr else usable(caps):
        ready = _pairs(s, acc, x, w, i, constants)
        if ready is not None:
            return blocked(ready[0], acc, out, w, ready[1], i, caps, None, None, 4, None)
    s, xl = widened_copy(s, x, None, f32, None)
    if xl is None:
        return None
    made = contract.product(_with(s, acc, xl * cast(w.ld, f32)), acc, out, caps, constants, **knobs)
    return None if made is None else schedule_pads(made, caps)


def _operand(e: Expr) -> Operand | None:
    """A load of f16, bf16 or f32, widened to f32."""
    while e.op == "cast" and e.dtype is f32:
        e = e.args[0]
    return Operand(e, None) if e.op == "load" and e.dtype.name in ("f16", "bf16", "f32") else None


def _pairs(s: Schedule, acc: str, x: Operand, w: Operand, i: Instruction, constants: Mapping[str, Any]) -> tuple[Schedule, Expr] | None:
    """(schedule with operands in the pairs of ``i``, variable of the axis that is cut into them); None where they do not fit it."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    if i.acc is not f32 or x.buf.dtype is not bf16 or w.buf.dtype is not bf16 or i.a is not bf16:
        return None
    k = group_axis(red.attr[1], x.ld, w.ld)
    if k is None or k.extent.op != "const" or not contract.is_packable(s, cast(w.ld, f32), st.axes[-1].var, constants):
        return None
    whole = axis(k.name + "g", -(-k.extent.attr // i.group) * i.group)
    s, xl = widened_copy(s, x, (k, whole), bf16, 0)
    if xl is None:
        return None
    wl = substitute(w.ld, {k.var: whole.var})
    return _with(s, acc, cast(xl, f32) * cast(wl, f32), {k: whole}), whole.var


def _with(s: Schedule, acc: str, product: Expr, axes: Mapping[Any, Any] | None = None) -> Schedule:
    """The accumulator as a sum of another product, over other axes where ``axes`` names them."""
    st = s.stages[acc]
    red = st.reduction
    assert red is not None
    ext = {a: b for a, b in s.ext.items() if a.attr[0].rsplit(".", 1)[0] != acc}
    over = [(axes or {}).get(y, y) for y in red.attr[1]]
    new = pull_stage(Pull(st.buf, st.axes, reduce_("sum", over, product)), ext)
    return replace(s, stages={**s.stages, acc: new}, ext=ext, trace=(*s.trace, ("half", acc)))
