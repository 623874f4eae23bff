"""use_matrix: reductions of kind ``matrix`` become matrix instructions, of warps whose threads each keep a part of the result.

Before (flat; 128 threads: ``mt`` of 32, ``nt`` of 4)::

    for ki in 0..32 matrix: for mr in 0..4 unroll: for nr in 0..8 unroll: for nv in 0..2 vectorize:
      acc[mr * 16 + nr * 2 + nv] += f32(bitcast.f16(A[ki * 128 + mr * 32 + mt])) * f32(bitcast.f16(B[ki * 64 + nr * 8 + nt * 2 +
      nv]))

After::

    for ki in 0..2 unroll: call mma.m16n8k16.f16(acc, A, ki * 2048 + mt, 32, 128, B, ki * 1024 + nt * 2, 64) mi=2 ni=8

Products of small matrices that the 32 threads of a warp compute together (CUDA ``mma.sync``) are effects, ``MMA``: {element:
intrinsic}. What a thread gets is what it would have computed alone::

    for i < 2 mi: for j < 2 ni: for k < 16: acc[i * 2 ni + j] += A[a + i * am + k * ak] * B[b + (j // 2) * 8 + j % 2 + k * bk]

with ``A`` and ``B`` the bits of 16-bit floats, sums in f32, as ``call(acc, A, a, am, ak, B, b, bk)`` with the attributes ``mi``
and ``ni``. The threads must be so numbered that ``a`` is a warp's own plus ``thread // 4 % 8``, and ``b`` its own plus ``thread %
4 * 2``.

A loop that has not this form becomes serial. :func:`pad_tiles`, before ``flatten``: rows of such tiles are made as long as it
takes that eight rows, which one instruction loads, lie in different banks of shared memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, bf16, f16
from luthier.ir.expr import Expr, bounds, const, linear, load, load_parts, loads, rewrite_loads, substitute
from luthier.ir.intrin import register
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, Stmt, Store, map_children, map_exprs, stmts_of, walk_stmts

MMA = {f16: "mma.m16n8k16.f16", bf16: "mma.m16n8k16.bf16"}
BANKS = 8  # elements that a row of an instruction's operand takes: 16 bytes, of 128 that all banks give at once


def pad_tiles(f: Func) -> Func:
    new: dict[Buffer, Buffer] = {}
    for s in walk_stmts(f.body):
        if isinstance(s, For) and s.kind == "matrix":
            for ld in [ld for x in walk_stmts(s.body) if isinstance(x, Store) for ld in loads(x.value)]:
                b, idx, _, _ = load_parts(ld)
                top = bounds(idx[-1])[1] if b.scope == "shared" and b.rank > 1 else None
                if isinstance(top, int):  # whole pairs of tiles, whatever part of them is filled, and eight elements more
                    new[b] = replace(b, shape=(*b.shape[:-1], const(top // (2 * BANKS) * 2 * BANKS + 3 * BANKS)))
    if not new:
        return f

    def fix(e: Expr) -> Expr | None:
        if e.op != "load" or e.attr[0] not in new:
            return None
        b, idx, mask, other = load_parts(e)
        return load(new[b], idx, mask, other)

    def st(s: Stmt) -> Stmt:
        s = map_children(s, st)
        return replace(s, buf=new[s.buf]) if isinstance(s, (Alloc, Store)) and s.buf in new else s

    memo: dict[Expr, Expr] = {}
    return f.with_body(map_exprs(st(f.body), lambda e: rewrite_loads(e, fix, memo)))


def use_matrix(f: Func) -> Func:
    def st(s: Stmt) -> Stmt:
        if isinstance(s, For) and s.kind == "matrix":
            return _call(s) or replace(s, kind="serial")
        return map_children(s, st)

    return f.with_body(st(f.body))


def _call(s: For) -> Stmt | None:
    loops: list[For] = [s]
    while isinstance(inner := _only(loops[-1].body), For):
        loops.append(inner)
    if (
        not isinstance(inner, Store)
        or inner.mask is not None
        or any(lp.extent.op != "const" or lp.lo is not const(0) for lp in loops)
    ):
        return None
    v, acc = inner.value, inner.buf
    terms = [x for x in v.args if x.op == "mul"] if v.op == "add" else []
    if len(terms) != 1 or not any(x.op == "load" and x.attr[0] == acc and load_parts(x)[1] == inner.idx for x in v.args):
        return None
    operands = [_bits(x) for x in terms[0].args]
    if any(o is None for o in operands):
        return None
    k = s.var
    rows: list[For] = []
    cols: list[For] = []
    (a, kind), (b, other) = operands  # type: ignore[misc]
    steps = {lp.var: tuple(_stride(i, lp.var) for i in (inner.idx[0], load_parts(a)[1][0], load_parts(b)[1][0])) for lp in loops}
    if steps[loops[-1].var][2] != 1:  # the innermost loop walks B
        a, b = b, a
        steps = {x: (c, q, p) for x, (c, p, q) in steps.items()}
    for lp in loops[1:]:
        (cols if steps[lp.var][1] == 0 else rows).append(lp)
    wide = [lp for lp in rows if lp.extent.attr > 1]
    if (
        kind is not other
        or len(wide) != 1
        or len(cols) != 2
        or s.extent.attr % 16
        or wide[0].extent.attr % 2
        or cols[1].extent.attr != 2
    ):
        return None
    mr, (nr, nv) = wide[0], cols
    mi, ni = mr.extent.attr // 2, nr.extent.attr
    size = acc.size()
    if (
        steps[mr.var][0] != 2 * ni
        or steps[nr.var] != (2, 0, 8)
        or steps[nv.var] != (1, 0, 1)
        or steps[mr.var][2]
        or size is not const(4 * mi * ni)
    ):
        return None
    zero = {lp.var: const(0) for lp in loops[1:]}
    round_ = replace(s, hi=const(s.extent.attr // 16), kind="unroll")
    args: list[object] = [acc]
    pitches: list[list[int | None]] = [[steps[mr.var][1]], []]
    for x, extra in zip((a, b), pitches, strict=True):
        buf, idx, _, _ = load_parts(x)
        extra.append(steps[k][1 if x is a else 2])
        if None in extra:
            return None
        args += [buf, substitute(idx[0], {**zero, k: k * 16}), *(const(e) for e in extra if e is not None)]
    return replace(round_, body=Call(MMA[kind], tuple(args), (("mi", mi), ("ni", ni))))


def _only(s: Stmt) -> Stmt:
    stmts = stmts_of(s)
    return stmts[0] if len(stmts) == 1 else s


def _bits(x: Expr) -> tuple[Expr, DType] | None:
    """(the load of an operand's bits, the type that they are)."""
    if x.op == "cast" and x.args[0].op == "bitcast" and x.args[0].dtype in MMA and x.args[0].args[0].op == "load":
        e = x.args[0].args[0]
        return (e, x.args[0].dtype) if e.attr[0].scope == "shared" and load_parts(e)[2] is None else None
    return None


def _stride(i: Expr, v: Expr) -> int | None:
    """How far one round of ``v`` goes; None where that is no constant."""
    poly = linear(i)
    mine = {m: c for m, c in poly.items() if v in m}
    return None if any(m != (v,) for m in mine) else sum(mine.values())


def _product(kind: DType) -> Any:
    def run(acc: Any, a: Any, at: Any, am: Any, ak: Any, b: Any, bt: Any, bk: Any, mi: int, ni: int) -> None:
        k, i, j = np.arange(16), np.arange(2 * mi)[:, None], np.arange(2 * ni)[:, None]
        x = a.reshape(-1)[int(at) + i * int(am) + k * int(ak)].view(kind.numpy).astype(np.float32)
        y = b.reshape(-1)[int(bt) + j // 2 * 8 + j % 2 + k * int(bk)].view(kind.numpy).astype(np.float32)
        acc.reshape(-1)[...] += (x @ y.T).reshape(-1)

    return run


for _d, _name in MMA.items():
    register(_name, _product(_d), f"sums of 16 products of {_d} in f32", effect=True)
