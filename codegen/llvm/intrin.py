"""Intrinsics of the LLVM backend: name -> how to print it. Meanings are registered in :mod:`luthier.ir.intrin`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from luthier.codegen.llvm.intrin_bytes import print_bytes
from luthier.ir.expr import Expr
from luthier.ir.intrin import DOTS
from luthier.ir.loop import Call
from luthier.schedules.intrin import ALL
from luthier.schedules.intrin.byte_vectors import SPELLING

if TYPE_CHECKING:
    from luthier.codegen.llvm.printer import KernelPrinter

PurePrinter = Callable[[Any, Expr, list[str]], str]
EffectPrinter = Callable[["KernelPrinter", Call], None]

PURE: dict[str, PurePrinter] = {}
EFFECT: dict[str, EffectPrinter] = {}


def _fma(p: Any, e: Expr, args: list[str]) -> str:
    from luthier.codegen.llvm.ops import intrinsic
    from luthier.codegen.llvm.types import reg_type

    return intrinsic(p, "fma", reg_type(e.dtype), *args)


def _prefetch(p: Any, s: Call) -> None:
    buf, offset = s.args[0] if isinstance(s.args[0], tuple) else (s.args[0], None)
    ptr = p.pointer(buf) if offset is None else p.address(buf, offset)
    fn = p.declare("llvm.prefetch.p0", "void @(ptr, i32, i32, i32)")
    p.emit(f"call void @{fn}(ptr {ptr}, i32 0, i32 3, i32 1)")


def _check_index(p: Any, s: Call) -> None:
    """Leaves the kernel with LT_ERROR_INDEX unless 0 <= lowest and highest < extent."""
    buf, lo, hi, n = s.args
    low, high, extent = p.value(lo), p.value(hi), p.value(n)
    under = p.ins(f"icmp slt i64 {low}, 0")
    over = p.ins(f"icmp sge i64 {high}, {extent}")
    bad, go = p.label("l"), p.label("l")
    p.emit(f"br i1 {p.ins(f'or i1 {under}, {over}')}, label %{bad}, label %{go}")
    p.start(bad)
    which = p.ins(f"select i1 {under}, i64 {low}, i64 {high}")
    fn = p.declare("lt.fault", "hidden void @(ptr, ptr, ptr, i64, i64)")
    p.emit(f"call void @{fn}(ptr %ctx, ptr {p.text_constant(p.f.name)}, ptr {p.text_constant(buf.name)}, i64 {which}, i64 {extent})")
    p.emit("ret i32 4")
    p.start(go)


def _dot(p: Any, e: Expr, args: list[str]) -> str:
    """A dot product: the target's instruction for this width, else its meaning in plain operations."""
    from luthier.codegen.llvm.types import reg_type

    i = DOTS[e.attr[0]]
    acc, a, b = e.args
    name = i.spelling.get("llvm", {}).get(i.acc.bits * e.dtype.lanes)
    if name is None or i.feature not in p.target.caps.features:
        return str(p.value(i.semantics(acc, a, b)))
    t = reg_type(e.dtype)
    types, values = [], []
    for x, v in ((a, args[1]), (b, args[2])):
        xt = reg_type(x.dtype)
        if x.dtype.kind == "bf":
            xt, v = f"<{x.dtype.lanes} x bfloat>", p.ins(f"bitcast {xt} {v} to <{x.dtype.lanes} x bfloat>")
        types.append(xt)
        values.append(f"{xt} {v}")
    if i.adds:
        fn = p.declare(name, f"{t} @({t}, {', '.join(types)})")
        return str(p.ins(f"call {t} @{fn}({t} {args[0]}, {', '.join(values)})"))
    fn = p.declare(name, f"{t} @({', '.join(types)})")
    r = p.ins(f"call {t} @{fn}({', '.join(values)})")
    return str(p.ins(f"add {t} {args[0]}, {r}"))


PURE["fma"] = _fma
PURE |= {i.name: _dot for i in ALL}
PURE |= {name: print_bytes for name in SPELLING}
EFFECT["lt.check_index"] = _check_index
EFFECT["prefetch"] = _prefetch


def _fmod(bits: int) -> str:
    """Exact remainder by shift and subtract on mantissas; sign of the dividend; NaN for x infinite, y zero or NaN."""
    t, i, man = ("float", "i32", 23) if bits == 32 else ("double", "i64", 52)
    emask = (1 << (bits - 1 - man)) - 1
    implicit, mmask, smask, inf = 1 << man, (1 << man) - 1, 1 << (bits - 1), emask << man
    mag = smask - 1
    return f"""declare {i} @llvm.ctlz.{i}({i}, i1)

define internal {t} @lt.fmod.f{bits}({t} %x, {t} %y) nounwind {{
entry:
  %xb = bitcast {t} %x to {i}
  %yb = bitcast {t} %y to {i}
  %sx = and {i} %xb, {-smask}
  %ax = and {i} %xb, {mag}
  %ay = and {i} %yb, {mag}
  %y0 = icmp eq {i} %ay, 0
  %yn = icmp ugt {i} %ay, {inf}
  %xi = icmp uge {i} %ax, {inf}
  %b1 = or i1 %y0, %yn
  %bad = or i1 %b1, %xi
  br i1 %bad, label %nan, label %small
nan:
  %p = fmul {t} %x, %y
  %q = fdiv {t} %p, %p
  ret {t} %q
small:
  %lt = icmp ult {i} %ax, %ay
  br i1 %lt, label %same, label %norm
same:
  ret {t} %x
norm:
  %xe0 = lshr {i} %ax, {man}
  %ye0 = lshr {i} %ay, {man}
  %xm0 = and {i} %ax, {mmask}
  %ym0 = and {i} %ay, {mmask}
  %xs = icmp eq {i} %xe0, 0
  %ys = icmp eq {i} %ye0, 0
  %xm1 = or {i} %xm0, {implicit}
  %ym1 = or {i} %ym0, {implicit}
  %xm2 = select i1 %xs, {i} %xm0, {i} %xm1
  %ym2 = select i1 %ys, {i} %ym0, {i} %ym1
  %xe2 = select i1 %xs, {i} 1, {i} %xe0
  %ye2 = select i1 %ys, {i} 1, {i} %ye0
  %xz = call {i} @llvm.ctlz.{i}({i} %xm2, i1 true)
  %yz = call {i} @llvm.ctlz.{i}({i} %ym2, i1 true)
  %xl = sub {i} %xz, {bits - 1 - man}
  %yl = sub {i} %yz, {bits - 1 - man}
  %xm = shl {i} %xm2, %xl
  %ym = shl {i} %ym2, %yl
  %xe = sub {i} %xe2, %xl
  %ye = sub {i} %ye2, %yl
  br label %step
step:
  %e = phi {i} [ %xe, %norm ], [ %e1, %next ]
  %m = phi {i} [ %xm, %norm ], [ %m2, %next ]
  %d = sub {i} %m, %ym
  %neg = icmp slt {i} %d, 0
  %r = select i1 %neg, {i} %m, {i} %d
  %more = icmp sgt {i} %e, %ye
  br i1 %more, label %next, label %done
next:
  %m2 = shl {i} %r, 1
  %e1 = sub {i} %e, 1
  br label %step
done:
  %z = icmp eq {i} %r, 0
  br i1 %z, label %zero, label %fit
zero:
  %zs = bitcast {i} %sx to {t}
  ret {t} %zs
fit:
  %fe = phi {i} [ %e, %done ], [ %fe1, %up ]
  %fm = phi {i} [ %r, %done ], [ %fm1, %up ]
  %low = icmp ult {i} %fm, {implicit}
  %can = icmp sgt {i} %fe, 1
  %go = and i1 %low, %can
  br i1 %go, label %up, label %pack
up:
  %fm1 = shl {i} %fm, 1
  %fe1 = sub {i} %fe, 1
  br label %fit
pack:
  %tiny = icmp slt {i} %fe, 1
  %gap = sub {i} 1, %fe
  %by = select i1 %tiny, {i} %gap, {i} 0
  %pm = lshr {i} %fm, %by
  %isn = icmp uge {i} %pm, {implicit}
  %pe = select i1 %tiny, {i} 1, {i} %fe
  %ne = select i1 %isn, {i} %pe, {i} 0
  %nm = and {i} %pm, {mmask}
  %es = shl {i} %ne, {man}
  %b = or {i} %es, %nm
  %bs = or {i} %b, %sx
  %res = bitcast {i} %bs to {t}
  ret {t} %res
}}
"""


HELPERS: dict[str, str] = {"lt.fmod.f32": _fmod(32), "lt.fmod.f64": _fmod(64)}
