"""Scalar operators of :mod:`luthier.ir.expr` as LLVM instructions: one small function per family, lane-wise on vectors."""

from __future__ import annotations

from typing import Protocol

from luthier.codegen.llvm.types import float_text, is_half, reg_type
from luthier.errors import CompilationError
from luthier.ir.dtypes import DType, f32, i32


class Emitter(Protocol):
    """What the operators need from the printer: ``ins(text)`` emits ``%n = text`` and returns ``%n``; ``declare`` adds a
    declaration once; ``f16c``: the target converts half precision itself."""

    f16c: bool

    def ins(self, text: str) -> str: ...

    def declare(self, name: str, signature: str) -> str: ...

    def need(self, helper: str) -> str: ...


def splat(value: str, d: DType, ty: str) -> str:
    """A constant in all lanes."""
    if d.lanes == 1:
        return value
    return "zeroinitializer" if value in ("0", "false") else f"splat ({ty} {value})"


def _ity(d: DType, bits: int) -> str:
    return f"i{bits}" if d.lanes == 1 else f"<{d.lanes} x i{bits}>"


def _k(d: DType, bits: int, v: int) -> str:
    return splat(str(v), d, f"i{bits}")


def suffix(t: str) -> str:
    """The mangling of an LLVM type in the name of an overloaded intrinsic."""
    if t.startswith("<"):
        n, e = t[1:-1].split(" x ")
        return f"v{n}{suffix(e)}"
    return {"float": "f32", "double": "f64", "half": "f16"}.get(t, t)


def intrinsic(p: Emitter, name: str, t: str, *args: str, ret: str | None = None, extra: str = "", flags: str = "") -> str:
    """``llvm.name.suffix`` on arguments of type ``t``."""
    r = ret or t
    full = p.declare(f"llvm.{name}.{suffix(r) + '.' if ret else ''}{suffix(t)}", f"{r} @({', '.join([t] * len(args))}{extra})")
    tail = ", i1 false" if extra == ", i1" else ""
    return p.ins(f"call {flags}{r} @{full}({', '.join(f'{t} {a}' for a in args)}{tail})")


# ---------------------------------------------------------------- half precision


def widen_half(p: Emitter, a: str, d: DType) -> str:
    """f16 or bf16 bits to float."""
    w, n = _ity(d, 32), _ity(d, 16)
    ft = reg_type(f32.vec(d.lanes))
    if d.kind == "bf":
        x = p.ins(f"zext {n} {a} to {w}")
        x = p.ins(f"shl {w} {x}, {_k(d, 32, 16)}")
        return p.ins(f"bitcast {w} {x} to {ft}")
    if p.f16c:
        h = "half" if d.lanes == 1 else f"<{d.lanes} x half>"
        return p.ins(f"fpext {h} {p.ins(f'bitcast {n} {a} to {h}')} to {ft}")
    # no F16C: exponent re-biased by a multiplication that also normalises subnormals
    x = p.ins(f"zext {n} {a} to {w}")
    sign = p.ins(f"shl {w} {p.ins(f'and {w} {x}, {_k(d, 32, 0x8000)}')}, {_k(d, 32, 16)}")
    mag = p.ins(f"shl {w} {p.ins(f'and {w} {x}, {_k(d, 32, 0x7FFF)}')}, {_k(d, 32, 13)}")
    big = splat(float_text(2.0**112, 32), d, "float")
    f = p.ins(f"fmul {ft} {p.ins(f'bitcast {w} {mag} to {ft}')}, {big}")
    fi = p.ins(f"bitcast {ft} {f} to {w}")
    special = p.ins(f"icmp uge {w} {mag}, {_k(d, 32, 0x7C00 << 13)}")
    inf = p.ins(f"or {w} {fi}, {_k(d, 32, 0x7F800000)}")
    c = "i1" if d.lanes == 1 else f"<{d.lanes} x i1>"
    r = p.ins(f"select {c} {special}, {w} {inf}, {w} {fi}")
    return p.ins(f"bitcast {w} {p.ins(f'or {w} {r}, {sign}')} to {ft}")


def narrow_half(p: Emitter, a: str, d: DType) -> str:
    """float to f16 or bf16 bits, to nearest even; NaN stays NaN. ``d`` is the narrow type."""
    w, n = _ity(d, 32), _ity(d, 16)
    ft = reg_type(f32.vec(d.lanes))
    c = "i1" if d.lanes == 1 else f"<{d.lanes} x i1>"
    if d.kind == "bf":
        x = p.ins(f"bitcast {ft} {a} to {w}")
        odd = p.ins(f"and {w} {p.ins(f'lshr {w} {x}, {_k(d, 32, 16)}')}, {_k(d, 32, 1)}")
        r = p.ins(f"add {w} {p.ins(f'add {w} {x}, {_k(d, 32, 0x7FFF)}')}, {odd}")
        nan = p.ins(f"fcmp uno {ft} {a}, {a}")
        q = p.ins(f"or {w} {x}, {_k(d, 32, 0x400000)}")
        r = p.ins(f"select {c} {nan}, {w} {q}, {w} {r}")
        return p.ins(f"trunc {w} {p.ins(f'lshr {w} {r}, {_k(d, 32, 16)}')} to {n}")
    if p.f16c:
        h = "half" if d.lanes == 1 else f"<{d.lanes} x half>"
        return p.ins(f"bitcast {h} {p.ins(f'fptrunc {ft} {a} to {h}')} to {n}")
    x = p.ins(f"bitcast {ft} {a} to {w}")
    mag = p.ins(f"and {w} {x}, {_k(d, 32, 0x7FFFFFFF)}")
    sign = p.ins(f"and {w} {p.ins(f'lshr {w} {x}, {_k(d, 32, 16)}')}, {_k(d, 32, 0x8000)}")
    # normal results: re-bias, round to nearest even on 13 dropped bits
    odd = p.ins(f"and {w} {p.ins(f'lshr {w} {mag}, {_k(d, 32, 13)}')}, {_k(d, 32, 1)}")
    up = p.ins(f"add {w} {p.ins(f'add {w} {mag}, {_k(d, 32, 0xFFF - (112 << 23))}')}, {odd}")
    norm = p.ins(f"lshr {w} {up}, {_k(d, 32, 13)}")
    # subnormal results: adding 0.5 aligns the mantissa so that the hardware rounds
    half = p.ins(f"fadd {ft} {p.ins(f'bitcast {w} {mag} to {ft}')}, {splat(float_text(0.5, 32), d, 'float')}")
    sub = p.ins(f"sub {w} {p.ins(f'bitcast {ft} {half} to {w}')}, {_k(d, 32, 0x3F000000)}")
    r = p.ins(f"select {c} {p.ins(f'icmp ult {w} {mag}, {_k(d, 32, 0x38800000)}')}, {w} {sub}, {w} {norm}")
    r = p.ins(f"select {c} {p.ins(f'icmp uge {w} {mag}, {_k(d, 32, 0x477FF000)}')}, {w} {_k(d, 32, 0x7C00)}, {w} {r}")
    r = p.ins(f"select {c} {p.ins(f'icmp ugt {w} {mag}, {_k(d, 32, 0x7F800000)}')}, {w} {_k(d, 32, 0x7E00)}, {w} {r}")
    return p.ins(f"trunc {w} {p.ins(f'or {w} {r}, {sign}')} to {n}")


def _round_to_odd(p: Emitter, a: str, d: DType) -> str:
    """f64 to float so that a second rounding to half precision is exact: inexact results get an odd last bit."""
    dt, ft, w = reg_type(d), reg_type(f32.vec(d.lanes)), _ity(d, 32)
    c = "i1" if d.lanes == 1 else f"<{d.lanes} x i1>"
    f = p.ins(f"fptrunc {dt} {a} to {ft}")
    back = p.ins(f"fpext {ft} {f} to {dt}")
    bits = p.ins(f"bitcast {ft} {f} to {w}")
    inexact = p.ins(f"fcmp one {dt} {back}, {a}")
    even = p.ins(f"icmp eq {w} {p.ins(f'and {w} {bits}, {_k(d, 32, 1)}')}, {_k(d, 32, 0)}")
    low = p.ins(f"fcmp olt {dt} {intrinsic(p, 'fabs', dt, back)}, {intrinsic(p, 'fabs', dt, a)}")
    step = p.ins(f"select {c} {low}, {w} {_k(d, 32, 1)}, {w} {_k(d, 32, -1)}")
    moved = p.ins(f"add {w} {bits}, {step}")
    fix = p.ins(f"and {c} {inexact}, {even}")
    return p.ins(f"bitcast {w} {p.ins(f'select {c} {fix}, {w} {moved}, {w} {bits}')} to {ft}")


# ---------------------------------------------------------------- conversions


def cast_value(p: Emitter, a: str, src: DType, dst: DType) -> str:
    """``cast`` of :mod:`luthier.ir.expr`: saturating float to int, wrapping int to int, nearest even to floats."""
    if src is dst:
        return a
    if is_half(src):
        return cast_value(p, widen_half(p, a, src), f32.vec(src.lanes), dst)
    st, dt = reg_type(src), reg_type(dst)
    if is_half(dst):
        if src.is_float and src.bits == 64:
            return narrow_half(p, _round_to_odd(p, a, src), dst)
        if not src.is_float and src.bits > 16 and not src.is_bool:  # exact in double, then one rounding
            wide = DType("f", 64, src.lanes)
            return narrow_half(p, _round_to_odd(p, cast_value(p, a, src, wide), wide), dst)
        return narrow_half(p, cast_value(p, a, src, f32.vec(src.lanes)), dst)
    if dst.is_bool:
        if src.is_float:
            return p.ins(f"fcmp une {st} {a}, zeroinitializer")
        return p.ins(f"icmp ne {st} {a}, {splat('0', src, 'i64')}")
    if src.is_bool:
        return p.ins(f"{'uitofp' if dst.is_float else 'zext'} {st} {a} to {dt}")
    if src.is_float and dst.is_float:
        return p.ins(f"{'fpext' if dst.bits > src.bits else 'fptrunc'} {st} {a} to {dt}")
    if src.is_float and (dst.bits <= 16 or dst.bits == 32 and dst.is_signed and dst.lanes > 1):
        return saturated(p, a, src, dst)
    if src.is_float:
        return intrinsic(p, "fptosi.sat" if dst.is_signed else "fptoui.sat", st, a, ret=dt)
    if dst.is_float:
        return p.ins(f"{'sitofp' if src.is_signed else 'uitofp'} {st} {a} to {dt}")
    if dst.bits == src.bits:
        return a
    if dst.bits < src.bits:
        return p.ins(f"trunc {st} {a} to {dt}")
    return p.ins(f"{'sext' if src.is_signed else 'zext'} {st} {a} to {dt}")


def saturated(p: Emitter, a: str, src: DType, dst: DType, nearest: bool = False) -> str:
    """Float to an integer of at most 16 bits, or to i32: clamped, truncated (``nearest``: rounded half to even) to i32, narrowed (LLVM's own
    saturating conversion of a vector goes lane by lane)."""
    t, w = reg_type(src), _ity(dst, 32)
    c = "i1" if dst.lanes == 1 else f"<{dst.lanes} x i1>"
    low, high = dst.scalar.limits()
    top = 2147483520.0 if dst.bits == 32 and src.bits == 32 else float(high)  # the largest float that fits
    lo, hi = (splat(float_text(x, src.bits), src, "float" if src.bits == 32 else "double") for x in (float(low), top))
    if nearest and low == 0 and dst.bits == 8 and dst.lanes > 1:  # below the range and NaN convert to what the packs below turn into 0
        x = p.ins(f"select {c} {p.ins(f'fcmp ogt {t} {a}, {hi}')}, {t} {hi}, {t} {a}")
    else:
        x = p.ins(f"select {c} {p.ins(f'fcmp ogt {t} {a}, {lo}')}, {t} {a}, {t} {lo}")
        x = p.ins(f"select {c} {p.ins(f'fcmp olt {t} {x}, {hi}')}, {t} {x}, {t} {hi}")
    r = intrinsic(p, "lrint", t, x, ret=w) if nearest else p.ins(f"fptosi {t} {x} to {w}")
    if top != high:
        r = p.ins(f"select {c} {p.ins(f'fcmp ogt {t} {a}, {hi}')}, {w} {_k(dst, 32, high)}, {w} {r}")
    if dst.is_signed:  # NaN gives 0, not the lowest value
        r = p.ins(f"select {c} {p.ins(f'fcmp ord {t} {a}, {a}')}, {w} {r}, {w} {_k(dst, 32, 0)}")
    if dst.bits == 8 and dst.lanes > 1 and not dst.is_signed:  # LLVM cannot see the bounds; with them it narrows with saturating packs
        r = intrinsic(p, "smin", w, intrinsic(p, "smax", w, r, _k(dst, 32, 0)), _k(dst, 32, high))
    return r if dst.bits == 32 else p.ins(f"trunc {w} {r} to {reg_type(dst)}")


# ---------------------------------------------------------------- arithmetic

_FLOAT = {"add": "fadd contract", "sub": "fsub contract", "mul": "fmul contract", "div": "fdiv"}
_INT = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor"}
_ROUND = {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "roundeven", "sqrt": "sqrt", "abs": "fabs"}


_DIVISION = {"div": "sdiv", "rem": "srem", "floordiv": "udiv", "mod": "urem"}


def binary_value(p: Emitter, op: str, a: str, b: str, d: DType) -> str:
    """Of integers what :mod:`luthier.passes.loop.legalize_arithmetic` leaves."""
    if is_half(d):
        w = f32.vec(d.lanes)
        return narrow_half(p, binary_value(p, op, widen_half(p, a, d), widen_half(p, b, d), w), d)
    t = reg_type(d)
    c = "i1" if d.lanes == 1 else f"<{d.lanes} x i1>"
    if d.is_float:
        if op in _FLOAT:
            return p.ins(f"{_FLOAT[op]} {t} {a}, {b}")
        if op in ("min", "max"):
            m = p.ins(f"fcmp {'olt' if op == 'min' else 'ogt'} {t} {a}, {b}")
            return p.ins(f"select {c} {m}, {t} {a}, {t} {b}")
        if op in ("rem", "floordiv", "mod"):
            return _float_mod(p, op, a, b, d)
        raise CompilationError(f"no LLVM form of {op} on {d}", hint="expand_math must run before the printer")
    if op in _INT:
        nsw = " nsw" if d.is_index and op in ("add", "sub", "mul") else ""
        return p.ins(f"{_INT[op]}{nsw} {t} {a}, {b}")
    if d.is_bool:
        raise CompilationError(f"no LLVM form of {op} on bool")
    if op in ("min", "max"):
        return intrinsic(p, f"{'s' if d.is_signed else 'u'}{op}", t, a, b)
    if op in ("shl", "shr"):
        return p.ins(f"{'shl' if op == 'shl' else 'ashr' if d.is_signed else 'lshr'} {t} {a}, {b}")
    if op in _DIVISION:
        return p.ins(f"{_DIVISION[op]} {t} {a}, {b}")
    raise CompilationError(f"no LLVM form of {op} on {d}")


def _float_mod(p: Emitter, op: str, a: str, b: str, d: DType) -> str:
    """C ``fmod`` by exact long division, lane by lane; ``mod`` takes the divisor's sign; ``floordiv`` the floor of the ratio."""
    t, s = reg_type(d), reg_type(d.scalar)
    c = "i1" if d.lanes == 1 else f"<{d.lanes} x i1>"
    if op == "floordiv":
        return intrinsic(p, "floor", t, p.ins(f"fdiv {t} {a}, {b}"))
    fn = p.need(f"lt.fmod.{'f32' if d.bits == 32 else 'f64'}")
    if d.lanes == 1:
        r = p.ins(f"call {s} @{fn}({s} {a}, {s} {b})")
    else:
        r = "poison"
        for k in range(d.lanes):
            x, y = p.ins(f"extractelement {t} {a}, i32 {k}"), p.ins(f"extractelement {t} {b}, i32 {k}")
            r = p.ins(f"insertelement {t} {r}, {s} {p.ins(f'call {s} @{fn}({s} {x}, {s} {y})')}, i32 {k}")
    if op == "rem":
        return r
    nz = p.ins(f"fcmp une {t} {r}, zeroinitializer")
    neg_r, neg_b = p.ins(f"fcmp olt {t} {r}, zeroinitializer"), p.ins(f"fcmp olt {t} {b}, zeroinitializer")
    fix = p.ins(f"and {c} {nz}, {p.ins(f'xor {c} {neg_r}, {neg_b}')}")
    fixed = p.ins(f"select {c} {fix}, {t} {p.ins(f'fadd {t} {r}, {b}')}, {t} {r}")
    signed = intrinsic(p, "copysign", t, fixed, b)
    return p.ins(f"select {c} {nz}, {t} {fixed}, {t} {signed}")


def unary_value(p: Emitter, op: str, a: str, d: DType) -> str:
    if is_half(d):
        w = f32.vec(d.lanes)
        x = widen_half(p, a, d)
        if op in ("isnan", "isinf"):
            return unary_value(p, op, x, w)
        return narrow_half(p, unary_value(p, op, x, w), d)
    t = reg_type(d)
    if op == "not":
        return p.ins(f"xor {t} {a}, {splat('true' if d.is_bool else '-1', d, 'i1' if d.is_bool else f'i{d.bits}')}")
    if d.is_float:
        if op == "neg":
            return p.ins(f"fneg {t} {a}")
        if op in _ROUND:
            return intrinsic(p, _ROUND[op], t, a)
        if op == "rsqrt":
            one = splat(float_text(1.0, d.bits), d, "float" if d.bits == 32 else "double")
            return p.ins(f"fdiv {t} {one}, {intrinsic(p, 'sqrt', t, a)}")
        if op == "isnan":
            return p.ins(f"fcmp uno {t} {a}, {a}")
        if op == "isinf":
            inf = splat(float_text(float("inf"), d.bits), d, "float" if d.bits == 32 else "double")
            return p.ins(f"fcmp oeq {t} {intrinsic(p, 'fabs', t, a)}, {inf}")
    elif op == "neg":
        return p.ins(f"sub {t} zeroinitializer, {a}" if d.lanes > 1 else f"sub {t} 0, {a}")
    elif op == "abs":
        return a if not d.is_signed else intrinsic(p, "abs", t, a, extra=", i1")
    elif op == "popcount":
        return intrinsic(p, "ctpop", t, a)
    raise CompilationError(f"no LLVM form of {op} on {d}", hint="expand_math must run before the printer")


def compare_value(p: Emitter, op: str, a: str, b: str, d: DType) -> str:
    """lt, le, eq, ne on operands of type ``d``: i1 lanes."""
    if is_half(d):
        w = f32.vec(d.lanes)
        return compare_value(p, op, widen_half(p, a, d), widen_half(p, b, d), w)
    t = reg_type(d)
    if d.is_float:
        return p.ins(f"fcmp {({'lt': 'olt', 'le': 'ole', 'eq': 'oeq', 'ne': 'une'})[op]} {t} {a}, {b}")
    if op in ("eq", "ne"):
        return p.ins(f"icmp {op} {t} {a}, {b}")
    return p.ins(f"icmp {'s' if d.is_signed else 'u'}{op} {t} {a}, {b}")


__all__ = [
    "Emitter", "binary_value", "cast_value", "compare_value", "i32", "intrinsic", "narrow_half", "splat", "suffix",
    "unary_value", "widen_half",
]  # fmt: skip
