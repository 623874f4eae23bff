"""Byte operations in lanes that low-bit kernels are built from: pair sums of byte products, look-ups in 16-byte tables, signs.

Each is a pure intrinsic whose meaning is registered here in numpy; ``SPELLING`` is {intrinsic: {printer: {bits of the register:
what the printer writes}}}; the WebAssembly printer knows them by name. ``bytes.madd`` saturates: whoever uses it keeps its sums below 2**15 (the low-bit templates do, by
the ranges of their operands).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.ir.dtypes import i16, i32
from luthier.ir.expr import Expr, call
from luthier.ir.intrin import register

FEATURE = "bytes_shuffle"  # the capability that all of them need

SPELLING: Mapping[str, Mapping[str, Mapping[int, str]]] = {
    "bytes.madd": {"llvm": {128: "llvm.x86.ssse3.pmadd.ub.sw.128", 256: "llvm.x86.avx2.pmadd.ub.sw", 512: "llvm.x86.avx512.pmaddubs.w.512"}},
    "bytes.madd7": {"llvm": {128: "llvm.x86.ssse3.pmadd.ub.sw.128", 256: "llvm.x86.avx2.pmadd.ub.sw", 512: "llvm.x86.avx512.pmaddubs.w.512"}},
    "words.madd": {"llvm": {128: "llvm.x86.sse2.pmadd.wd", 256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}},
    "bytes.lookup": {"llvm": {128: "llvm.x86.ssse3.pshuf.b.128", 256: "llvm.x86.avx2.pshuf.b", 512: "llvm.x86.avx512.pshuf.b.512"}},
    "bytes.lookup128": {"llvm": {512: "llvm.x86.avx512.vpermi2var.qi.512"}},  # capability "vbmi"
    "bytes.sign": {"llvm": {128: "llvm.x86.ssse3.psign.b.128", 256: "llvm.x86.avx2.psign.b"}},
}


def _bytes_madd(dtype: Any, attr: Any, a: Any, b: Any) -> Any:
    p = np.asarray(a).view(np.uint8).astype(np.int64) * np.asarray(b).view(np.int8).astype(np.int64)
    return np.clip(p[..., 0::2] + p[..., 1::2], -32768, 32767).astype(np.int16)


def _words_madd(dtype: Any, attr: Any, a: Any, b: Any) -> Any:
    p = np.asarray(a).astype(np.int64) * np.asarray(b).astype(np.int64)
    return (p[..., 0::2] + p[..., 1::2]).astype(np.int32)


def _bytes_lookup(dtype: Any, attr: Any, table: Any, which: Any) -> Any:
    t, w = np.asarray(table), np.asarray(which).view(np.uint8).astype(np.int64)
    lane = np.arange(w.shape[-1]) // 16 * 16
    picked = np.take_along_axis(t, (w & 15) + lane, -1)
    return np.where(w & 128, np.zeros_like(picked), picked)


def _bytes_lookup128(dtype: Any, attr: Any, low: Any, which: Any, high: Any) -> Any:
    t, w = np.concatenate([np.asarray(low), np.asarray(high)], -1), np.asarray(which).view(np.uint8).astype(np.int64)
    return np.take_along_axis(t, w & 127, -1)


def _bytes_sign(dtype: Any, attr: Any, a: Any, s: Any) -> Any:
    x, y = np.asarray(a).astype(np.int64), np.asarray(s).view(np.int8)
    return (x * np.sign(y)).astype(np.int8)


register("bytes.madd", _bytes_madd, "i16 sums, saturating, of adjacent products u8 * i8")
register("bytes.madd7", _bytes_madd, "bytes.madd where every u8 is below 128")
register("words.madd", _words_madd, "i32 sums of adjacent products i16 * i16")
register("bytes.lookup", _bytes_lookup, "table[which & 15] in each 16-byte lane, 0 where bit 7 of which is set")
register("bytes.lookup128", _bytes_lookup128, "(low, high)[which & 127]: a table of 128 bytes in two registers of 64")
register("bytes.sign", _bytes_sign, "a, 0 or -a by the sign of s")


def madd_bytes(a: Expr, b: Expr) -> Expr:
    """``r[j] = a[2j] * b[2j] + a[2j + 1] * b[2j + 1]`` of u8 and i8 in i16."""
    return call("bytes.madd", i16.vec(a.dtype.lanes // 2), a, b)


def madd_small(a: Expr, b: Expr) -> Expr:
    """:func:`madd_bytes` of an ``a`` that stays below 128, which more targets have."""
    return call("bytes.madd7", i16.vec(a.dtype.lanes // 2), a, b)


def madd_words(a: Expr, b: Expr) -> Expr:
    """``r[j] = a[2j] * b[2j] + a[2j + 1] * b[2j + 1]`` of i16 in i32."""
    return call("words.madd", i32.vec(a.dtype.lanes // 2), a, b)


def lookup_bytes(table: Expr, which: Expr) -> Expr:
    """Bytes of ``table`` (one of 16 in every 16 lanes) picked by ``which``."""
    return call("bytes.lookup", table.dtype, table, which)


def lookup_wide(low: Expr, which: Expr, high: Expr) -> Expr:
    """Bytes of the table (``low``, ``high``) of 128 picked by the low seven bits of ``which``; all of 64 lanes."""
    return call("bytes.lookup128", low.dtype, low, which, high)


def sign_bytes(a: Expr, s: Expr) -> Expr:
    """``a * sign(s)`` of i8."""
    return call("bytes.sign", a.dtype, a, s)
