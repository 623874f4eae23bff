"""Loop IR to CUDA C++, as NVRTC compiles it: no headers, one ``extern "C"`` kernel a function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from luthier.codegen.gpu.c_style import CStyle
from luthier.ir.dtypes import DType, i32
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, const
from luthier.ir.loop import Alloc, Buffer, For, Func, walk_stmts
from luthier.passes.gpu.map_parallel import map_parallel
from luthier.passes.gpu.spread_subgroups import spread_subgroups
from luthier.passes.loop.combine_accesses import combine_accesses
from luthier.passes.loop.flatten import flatten
from luthier.passes.loop.legalize_arithmetic import legalize_arithmetic
from luthier.passes.loop.legalize_dtype import DEFAULT_RULES, legalize_dtype
from luthier.passes.loop.place_lets import place_lets
from luthier.passes.loop.scalarize import scalarize

KEYWORDS = frozenset(
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr const_cast continue
    decltype default delete do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast return short signed
    sizeof static static_assert static_cast struct switch template this throw true try typedef typeid typename union unsigned using
    virtual void volatile wchar_t while xor xor_eq half threadIdx blockIdx blockDim gridDim warpSize sqrtf floorf ceilf rintf truncf
    fabsf lane lane_add lane_mul lane_min lane_max sqrt floor ceil rint trunc fabs min max log exp erf y0 y1 yn j0 j1 jn gamma""".split()
)
_INTS = {8: "char", 16: "short", 32: "int", 64: "long long"}


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """``source``: C++ with ``symbol``. Arguments: one pointer a buffer, then the scalars (index as 64 bits). ``grid``: blocks in x,
    y, z over the scalars; ``group``: threads of a block."""

    name: str
    symbol: str
    source: str
    buffers: tuple[Buffer, ...]
    scalars: tuple[Expr, ...]
    grid: tuple[Expr, Expr, Expr]
    group: tuple[int, int, int]


class _Cuda(CStyle):
    keywords: ClassVar[frozenset[str]] = KEYWORDS
    target: ClassVar[str] = "CUDA"

    def __init__(self, f: Func) -> None:
        super().__init__(f)
        self.arrays: list[str] = []
        self.helpers: dict[str, str] = {}

    def type(self, d: DType) -> str:
        if d.lanes > 1:
            return f"{self.short(d)}{d.lanes}"
        if d.is_bool:
            return "bool"
        if d.is_index:
            return "long long"
        if d.is_int:
            bits = max(d.bits, 8)
            return ("signed char" if bits == 8 else _INTS[bits]) if d.is_signed else f"unsigned {_INTS[bits]}"
        if d.kind == "f" and d.bits in (32, 64):
            return "float" if d.bits == 32 else "double"
        raise CompilationError(f"CUDA kernels compute without {d}", op=self.f.name, hint="run legalize_dtype first")

    def literal(self, v: Any, d: DType) -> str:
        if d.is_bool:
            return "true" if v else "false"
        if d.is_float:
            f = d.bits == 32
            if math.isfinite(v):
                t = f"{v!r}f" if f else repr(v)
                return f"({t})" if v < 0 or math.copysign(1, v) < 0 else t
            bits = (0x7FC00000 if math.isnan(v) else int(np.float32(v).view(np.uint32))) if f else (0x7FF8 << 48 if math.isnan(v) else int(np.float64(v).view(np.uint64)))
            return f"__int_as_float((int){bits:#x}u)" if f else f"__longlong_as_double((long long){bits:#x}ull)"
        if d.is_int and d.bits <= 32 and d.is_signed:
            return "(-2147483647 - 1)" if v == -(1 << 31) else f"({v})" if v < 0 else str(v)
        if d.is_signed:
            return "(-9223372036854775807ll - 1)" if v == -(1 << 63) else f"({v}ll)" if v < 0 else f"{v}ll"
        return f"{v}u" if d.bits <= 32 else f"{v}ull"

    def short(self, d: DType) -> str:
        """The name that vector types begin with."""
        return "float" if d.is_float else ("" if d.is_signed else "u") + _INTS[d.bits]

    def vector(self, parts: Sequence[str], d: DType) -> str:
        return f"make_{self.type(d)}({', '.join(parts)})"

    def convert(self, x: str, s: DType, d: DType) -> str:
        t = self.type(d)
        if d.is_bool:
            return x if s.is_bool else f"({x} != {self.zero(s)})"
        if s.is_float and not d.is_float:
            n = "ll" if d.bits == 64 else "int"
            r = f"__{self.type(s)}2{n if d.is_signed else 'u' + n}_rz({x})"
            if d.bits == 64:
                r = f"(({x}) != ({x}) ? ({t})0 : {r})"
            return r
        return self.wrap(f"({t})({x})", d)

    def reinterpret(self, x: str, s: DType, d: DType) -> str:
        if s.is_float == d.is_float:
            return f"({self.type(d)})({x})"
        if s.is_float:
            return f"({self.type(d)})__{'float_as_int' if s.bits == 32 else 'double_as_longlong'}({x})"
        return f"__int_as_float((int)({x}))" if s.bits == 32 else f"__longlong_as_double((long long)({x}))"

    def choose(self, c: str, a: str, b: str) -> str:
        return f"({c} ? {a} : {b})"

    def masked_load(self, c: str, a: str, b: str) -> str:
        return f"({c} ? {a} : {b})"

    def wrap(self, x: str, d: DType) -> str:
        if d.is_index or d.is_bool or d.is_float:
            return x
        if d.bits < 8:
            return f"((signed char)({x} << {8 - d.bits}) >> {8 - d.bits})" if d.is_signed else f"({x} & {(1 << d.bits) - 1})"
        return f"({self.type(d)})({x})"

    def arithmetic(self, op: str, a: str, b: str, d: DType) -> str:
        sym = {"add": "+", "sub": "-", "mul": "*"}[op]
        u = "unsigned long long" if d.bits == 64 else "unsigned"  # signed overflow is undefined in C++
        return f"(({u})({a}) {sym} ({u})({b}))" if d.is_signed and not d.is_index else f"({a} {sym} {b})"

    def math(self, op: str, x: str, d: DType) -> str | None:
        if op == "popcount":
            return f"__popcll({x})" if d.bits == 64 else f"({self.type(d)})__popc((unsigned)({x}){'' if d.bits >= 32 else f' & {(1 << d.bits) - 1}u'})"
        if not d.is_float:
            return None
        if op == "isinf":
            return f"(fabs{'f' if d.bits == 32 else ''}({x}) == {self.literal(math.inf, d)})"
        names = {"abs": "fabs", "floor": "floor", "ceil": "ceil", "round": "rint", "trunc": "trunc", "sqrt": "sqrt", "rsqrt": "rsqrt"}
        return f"{names[op]}{'f' if d.bits == 32 else ''}({x})" if op in names else None

    def remainder(self, a: str, b: str, d: DType) -> str:
        return f"fmod{'f' if d.bits == 32 else ''}({a}, {b})"

    def declare(self, name: str, d: DType, v: str) -> str:
        return f"const {self.type(d)} {name} = {v};"

    def declare_register(self, b: Buffer) -> str:
        return f"{self.type(b.dtype)} {self.name(b.name)};"

    def declare_array(self, b: Buffer, n: int) -> str:
        if b.scope == "global":
            raise CompilationError(f"CUDA kernels cannot allocate global memory ({b.name})", op=self.f.name)
        return f"{'__shared__ ' if b.scope == 'shared' else ''}{self.type(b.dtype)} {self.name(b.name)}[{max(n, 1)}];"

    def for_head(self, v: str, lo: str, hi: str) -> str:
        return f"for (long long {v} = {lo}; {v} < {hi}; ++{v})"

    def barrier(self, scope: str) -> str:
        return "__syncthreads();"

    def position(self, kind: str) -> str:
        return f"(long long){'blockIdx' if kind.startswith('block') else 'threadIdx'}.{kind[-1]}"

    def share(self, s: For, acc: Buffer, op: str) -> bool:
        """Warps are whole (``legalize_cuda``): 32 lanes, whose sums cross in five steps."""
        v, a, t = self.name(s.var), self.name(acc.name), self.type(acc.dtype)
        self.put(f"for (long long {v} = lane; {v} < {self.expr(s.hi)}; {v} += 32) {{")
        self.body(s.body)
        self.put("}")
        self.put(f"{a} = lane_{op}({a});")
        better = f"x {'<' if op.endswith('min') else '>'} y"
        if op.endswith(("min", "max")):
            other = self.choose(f"(x != x || {better})" if op.startswith("nan") else f"({better})", "x", "y")
        else:
            other = self.arithmetic(op, "x", "y", acc.dtype)
        step = f"const {t} y = __shfl_xor_sync(0xffffffffu, x, k); x = {other};"
        self.helpers[f"{op} {t}"] = f"__device__ __forceinline__ {t} lane_{op}({t} x) {{ for (int k = 16; k; k >>= 1) {{ {step} }} return x; }}"
        return True

    def kernel(self) -> CudaKernel:
        f = self.f
        ps = [f"{'' if b.writable else 'const '}{self.type(b.dtype)}* __restrict__ {self.name(b.name)}" for b in f.buffers]
        ps += [f"{self.type(v.dtype)} {self.name(v)}" for v in f.scalars]
        head = []
        for name, a in f.data.items():
            d = next((s.buf.dtype for s in walk_stmts(f.body) if isinstance(s, Alloc) and s.buf.name == name), i32)
            vals = ", ".join(self.literal(v, d) for v in np.asarray(a).reshape(-1).tolist())
            head.append(f"__device__ const {self.type(d)} {self.name(name)}[{np.asarray(a).size}] = {{{vals}}};")
        symbol = self.name(("kernel_" + f.name).replace(".", "_"))
        self.stmt(f.body)
        group = tuple(self.group.get(f"thread.{d}", 1) for d in "xyz")
        n = group[0] * group[1] * group[2]
        if self.helpers:
            self.lines.insert(0, "  const long long lane = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;")
        src = "\n".join([*head, *self.helpers.values(), f'extern "C" __global__ void __launch_bounds__({n}) {symbol}({", ".join(ps)}) {{', *self.lines, "}", ""])
        grid = tuple(self.grid.get(f"block.{d}", const(1)) for d in "xyz")
        return CudaKernel(f.name, symbol, src, f.buffers, f.scalars, grid, group)  # type: ignore[arg-type]


def legalize_cuda(f: Func) -> Func:
    """A kernel with the loop passes done, made printable as CUDA C++: one dimension, no vectors, a grid."""
    size: dict[str, int] = {}
    for s in walk_stmts(f.body):
        if isinstance(s, For) and s.kind.startswith("thread"):
            size[s.kind] = max(size.get(s.kind, 1), s.extent.attr if s.extent.op == "const" else 1)
    if math.prod(size.values()) % 32:  # the last warp would be a part of one
        f = spread_subgroups(f)
    f = combine_accesses(legalize_dtype(scalarize(map_parallel(flatten(f))), DEFAULT_RULES))
    return place_lets(legalize_arithmetic(f, index_bits=64))


def print_cuda(f: Func) -> CudaKernel:
    """Raises CompilationError for what a CUDA kernel cannot express (run-time sized local memory, global scratch)."""
    return _Cuda(f).kernel()
