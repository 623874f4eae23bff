"""How types and constants of the loop IR are spelled in LLVM text.

In registers: ``bool`` is ``i1``, ``index`` is ``i64``; ``f16`` and ``bf16`` are carried as ``i16`` bits and computed in
``float`` (so no conversion routine of a run-time library is ever called). In memory: ``bool`` is one byte.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from luthier.errors import CompilationError
from luthier.ir.dtypes import DType

_SCALAR = {"f32": "float", "f64": "double", "f16": "i16", "bf16": "i16", "bool": "i1", "index": "i64"}


def scalar_type(d: DType) -> str:
    """Register type of one lane. Raises CompilationError for types that passes should have lowered."""
    s = d.scalar
    t = _SCALAR.get(s.name)
    if t is not None:
        return t
    if s.is_int and s.bits >= 8:
        return f"i{s.bits}"
    raise CompilationError(f"the LLVM printer has no {s.name} values", hint="lower_subbyte and legalize_dtype run before it")


def reg_type(d: DType) -> str:
    t = scalar_type(d)
    return t if d.lanes == 1 else f"<{d.lanes} x {t}>"


def mem_scalar(d: DType) -> str:
    return "i8" if d.is_bool else scalar_type(d)


def mem_type(d: DType) -> str:
    t = mem_scalar(d)
    return t if d.lanes == 1 else f"<{d.lanes} x {t}>"


def item_bytes(d: DType) -> int:
    """Bytes of one lane in memory."""
    return 1 if d.is_bool else d.bits // 8


def mem_bytes(d: DType) -> int:
    """Bytes of one element of a buffer, all lanes."""
    return item_bytes(d) * d.lanes


def is_half(d: DType) -> bool:
    return d.kind == "bf" or (d.kind == "f" and d.bits == 16)


def float_text(v: float, bits: int) -> str:
    """LLVM's hexadecimal spelling (of the double that equals the value)."""
    if math.isnan(v):
        return "0x7FF8000000000000"
    if bits == 32 and not math.isinf(v):
        v = struct.unpack("<f", struct.pack("<f", v))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', v))[0]:016X}"


def half_bits(v: float, d: DType) -> int:
    import numpy as np

    return int(np.asarray(v).astype(d.scalar.numpy).view(np.uint16))


def const_text(v: Any, d: DType) -> str:
    """A scalar constant of type ``d``."""
    s = d.scalar
    if s.is_bool:
        return "true" if v else "false"
    if is_half(s):
        return str(half_bits(float(v), s))
    if s.is_float:
        return float_text(float(v), s.bits)
    return str(int(v))


def splat_text(v: Any, d: DType) -> str:
    """A constant of type ``d`` in every lane."""
    t = const_text(v, d)
    if d.lanes == 1:
        return t
    if (isinstance(v, (int, bool)) and not v) or (isinstance(v, float) and v == 0 and math.copysign(1, v) > 0):
        return "zeroinitializer"
    return f"splat ({scalar_type(d)} {t})"
