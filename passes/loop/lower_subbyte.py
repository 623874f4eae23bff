"""lower_subbyte: elements of 1, 2 and 4 bits become parts of bytes.

Before: ``W: u4[N]``, ``W[i]``. After: ``W: u8[(N + 1) // 2]``, ``(W[i // 2] >> (i % 2 * 4)) & 15``.

The lowest bits of a byte hold its first element (ONNX's order); a buffer is dense over its whole flat extent, its last byte may
be partly unused. Lanes that start on a byte and fill whole bytes are one vector load, masked and interleaved. A store replaces
whole bytes, or reads and rewrites its byte (lane by lane) where no other thread can own a part of it; elsewhere it is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from luthier.ir.dtypes import DType, i8, u8
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, as_expr, bcast, binary, cast, const, linear, load, load_parts, ramp, rewrite, shuffle
from luthier.ir.loop import Alloc, Block, Buffer, For, Func, Stmt, Store, contents_of, map_children, map_exprs


def is_subbyte(d: DType) -> bool:
    return d.bits < 8 and d.kind in ("i", "u", "f4e2m1")


def byte_buffer(b: Buffer) -> Buffer:
    """The bytes that hold a flat sub-byte buffer."""
    per = 8 // b.dtype.bits
    return replace(b, dtype=u8, shape=((b.size() + (per - 1)) // per,))


def pack_array(a: Any, d: DType) -> Any:
    """A numpy array of sub-byte values (any integer dtype, or ml_dtypes' float of 4 bits) as ``uint8`` bytes, flat. Shape: ceil(size / (8 // bits))."""
    per = 8 // d.bits
    a = np.asarray(a)
    v = (a.view(np.uint8) if d.is_float else a.astype(np.int64)).astype(np.int64).reshape(-1) & ((1 << d.bits) - 1)
    v = np.concatenate([v, np.zeros(-len(v) % per, np.int64)]).reshape(-1, per)
    return (v << (np.arange(per) * d.bits)).sum(1).astype(np.uint8)


def unpack_array(raw: Any, d: DType, shape: tuple[int, ...]) -> Any:
    """The inverse of :func:`pack_array`: an array of ``shape`` in numpy's (ml_dtypes') type for ``d``, ``uint8`` for u1."""
    per = 8 // d.bits
    v = (np.asarray(raw).astype(np.int64)[:, None] >> (np.arange(per) * d.bits)) & ((1 << d.bits) - 1)
    v = v.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    if d.is_float:
        return v.astype(np.uint8).view(d.numpy)
    if d.is_signed:
        v = np.where(v >> (d.bits - 1), v - (1 << d.bits), v)
    return v.astype(np.uint8 if d.bits == 1 else d.numpy)


def _aligned(idx: Expr, per: int) -> Expr | None:
    """The first byte of lanes that fill whole bytes in order, None where they do not."""
    if idx.op != "ramp" or idx.attr[0] != 1 or idx.dtype.lanes % per:
        return None
    base = idx.args[0]
    return base // per if all(k % per == 0 for k in linear(base).values()) else None


def lower_subbyte(f: Func) -> Func:
    """Raises CompilationError for a store that may share its byte with another thread."""
    if not any(is_subbyte(b.dtype) for b in f.buffers) and not any(is_subbyte(b.dtype) for b in contents_of(f.body).allocated):
        return f
    exact: set[Expr] = set()
    memo: dict[Expr, Expr] = {}

    def part(byte: Expr, shift: Expr | int, d: DType) -> Expr:
        """Bits of ``byte`` as a value of ``d`` (carried in a byte)."""
        n = byte.dtype.lanes
        mask = (1 << d.bits) - 1
        v = binary("and", binary("shr", byte, shift), mask)
        if d.is_signed:
            k = bcast(const(8 - d.bits, i8), n)
            v = binary("shr", binary("shl", cast(v, i8), k), k)
        return v

    def narrow(v: Expr, d: DType) -> Expr:
        r = cast(v, d.vec(v.dtype.lanes))
        exact.add(r)
        return r

    def fix(e: Expr) -> Expr | None:
        if e.op == "cast" and e.args[0] in exact:
            return cast(e.args[0].args[0], e.dtype)
        if e.op != "load" or not is_subbyte(e.attr[0].dtype) or e.attr[0].rank == 0:
            return None
        b, idx, m, o = load_parts(e)
        d, nb = b.dtype, byte_buffer(b)
        per, lanes = 8 // d.bits, e.dtype.lanes
        first = _aligned(idx[0], per) if m is None else None
        if first is not None:
            n = lanes // per
            byte = load(nb, [ramp(first, 1, n)])
            parts = [part(byte, k * d.bits, d) for k in range(per)]
            w = max(n, 2)  # one byte is repeated: a shuffle wants vectors
            parts = [bcast(p, w) if n == 1 else p for p in parts]
            return narrow(shuffle(parts, [k * w + j for j in range(n) for k in range(per)]), d)
        shift = cast((idx[0] % bcast(as_expr(per), lanes)) * bcast(as_expr(d.bits), lanes), u8)
        if m is None:
            return narrow(part(load(nb, [idx[0] // bcast(as_expr(per), lanes)]), shift, d), d)
        from luthier.ir.expr import select

        assert o is not None
        byte = load(nb, [idx[0] // bcast(as_expr(per), lanes)], m)
        v = part(byte, shift, d)
        return narrow(select(m, v, cast(o, v.dtype.scalar)), d)

    def ex(e: Expr) -> Expr:
        return rewrite(e, fix, memo)

    def st(s: Stmt, shared: bool) -> Stmt:
        if isinstance(s, For):
            return replace(s, lo=ex(s.lo), hi=ex(s.hi), body=st(s.body, shared or s.kind not in ("serial", "unroll")))
        if isinstance(s, Alloc):
            nb = byte_buffer(s.buf) if is_subbyte(s.buf.dtype) and s.buf.rank else s.buf
            return Alloc(nb, st(s.body, shared and s.buf.scope != "local"))
        if isinstance(s, Store) and is_subbyte(s.buf.dtype) and s.buf.rank:
            return store(s, shared and s.buf.scope != "local")
        if isinstance(s, Store):
            return map_exprs(s, ex)
        body = map_children(s, lambda c: st(c, shared))
        return body if body is not s else map_exprs(s, ex)

    def store(s: Store, shared: bool) -> Stmt:
        d, nb = s.buf.dtype, byte_buffer(s.buf)
        per = 8 // d.bits
        idx, mask = ex(s.idx[0]), (1 << d.bits) - 1
        v = ex(s.value)
        v = cast(v.args[0] if v in exact else v, u8)
        v = binary("and", v, mask)
        first = _aligned(idx, per) if s.mask is None else None
        if first is not None:
            n = v.dtype.lanes // per
            out: Any = None
            for k in range(per):
                x = binary("shl", shuffle([v], [j * per + k for j in range(n)]), k * d.bits)
                out = x if out is None else binary("or", out, x)
            return Store(nb, (ramp(first, 1, n),), out)
        if not shared and idx.op == "ramp" and s.mask is None:  # lanes that leave a byte half: one by one
            base, stride = idx.args[0], idx.attr[0]
            lanes = [Store(s.buf, (base + k * stride,), cast(shuffle([s.value], [k]), d)) for k in range(v.dtype.lanes)]
            return Block(tuple(store(lane, shared) for lane in lanes))
        if shared or v.dtype.lanes > 1:
            raise CompilationError(
                f"a store of {d} elements to {s.buf.name} may share its byte with another thread or lane", op=f.name,
                hint="let each round own whole bytes (split by 2 for 4-bit elements) or keep the result in 8 bits",
            )
        at, shift = idx // per, cast((idx % per) * d.bits, u8)
        old = binary("and", load(nb, [at]), binary("xor", binary("shl", const(mask, u8), shift), 255))
        return Store(nb, (at,), binary("or", old, binary("shl", v, shift)), None if s.mask is None else ex(s.mask))

    params = tuple(byte_buffer(p) if isinstance(p, Buffer) and is_subbyte(p.dtype) else p for p in f.params)
    data = {n: pack_array(a, _dtype_of(f, n)) if _dtype_of(f, n) is not None else a for n, a in f.data.items()}
    return replace(f, params=params, body=st(f.body, False), data=data)


def _dtype_of(f: Func, name: str) -> Any:
    from luthier.ir.expr import loads
    from luthier.ir.loop import exprs_of, walk_stmts

    for s in walk_stmts(f.body):
        for e in exprs_of(s):
            for x in loads(e):
                if x.attr[0].name == name:
                    return x.attr[0].dtype if is_subbyte(x.attr[0].dtype) else None
    return None
