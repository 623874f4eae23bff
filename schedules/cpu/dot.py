"""Operands of a dot product instruction, read off the product that a schedule tensorizes."""

from __future__ import annotations

from dataclasses import replace

from luthier.ir.dtypes import DType
from luthier.ir.expr import Expr, bcast, bitcast, cast, free_vars, from_linear, linear, load, load_parts, ramp
from luthier.ir.intrin import Instruction
from luthier.passes.loop.flatten import flat_index
from luthier.schedules.base.schedule import ScheduleError


def dot_operands(product: Expr, instr: Instruction, t: Expr, j: Expr, lanes: int) -> tuple[Expr, Expr]:
    """``f[.. + t] * g[.. + group * j + t]`` as the two vectors that ``instr`` takes, in its order of types.

    ``t``: variable of the group, ``j``: of the lanes. A factor is a load, or a widening cast of one. Raises ScheduleError where a
    factor is something else, is not contiguous, or has another type than the instruction."""
    while product.op == "cast":
        product = product.args[0]
    if product.op != "mul":
        raise ScheduleError(f"{instr.name} needs a sum of products, not {product!r}")
    for x, y in (product.args, product.args[::-1]):
        a, b = _operand(x, instr.a, instr, t, j, lanes), _operand(y, instr.b, instr, t, j, lanes)
        if a is not None and b is not None:
            return a, b
    raise ScheduleError(f"{instr.name} takes {instr.a} times {instr.b} in groups of {instr.group} that stand together, not {product!r}")


def _operand(e: Expr, want: DType, instr: Instruction, t: Expr, j: Expr, lanes: int) -> Expr | None:
    while e.op == "cast":  # the type in memory may be narrower than the instruction's: it is widened in the register
        e = e.args[0]
    if e.op != "load" or (e.dtype is not want and not _fits(e.dtype, want)):
        return None
    buf, idx, mask, _ = load_parts(e)
    if mask is not None:
        return None
    (i,) = flat_index(buf, idx)
    base, step = {}, {t: 0, j: 0}
    for m, c in linear(i).items():
        if m in ((t,), (j,)):
            step[m[0]] = c
        elif any(free_vars(a) & {t, j} for a in m):
            return None
        else:
            base[m] = c
    if step[t] != 1 or step[j] not in (0, instr.group):
        return None
    flat = replace(buf, shape=(buf.size(),))
    at, g = from_linear(base), instr.group
    if step[j]:
        return cast(load(flat, (ramp(at, 1, g * lanes),)), want)
    one = cast(load(flat, (ramp(at, 1, g),)), want)
    word = DType("u", want.bits * g)
    return bitcast(bcast(bitcast(one, word), lanes), want.vec(g * lanes))


def _fits(a: DType, b: DType) -> bool:
    """Every value of integer type a is one of b."""
    (la, ha), (lb, hb) = a.limits(), b.limits()
    return a.is_int and b.is_int and lb <= la and ha <= hb
