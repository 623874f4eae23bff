"""Loop IR to CUDA C++, as NVRTC compiles it: no headers, one ``extern "C"`` kernel a function."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from luthier.codegen.gpu.c_style import CStyle
from luthier.ir.dtypes import DType, i32
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, bounds, const
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, Store, walk_stmts
from luthier.ir.words import WORDS
from luthier.passes.gpu.clamp_loads import clamp_loads
from luthier.passes.gpu.map_parallel import map_parallel
from luthier.passes.gpu.spread_subgroups import spread_subgroups
from luthier.passes.gpu.use_matrix import MMA
from luthier.passes.loop.combine_accesses import combine_accesses
from luthier.passes.loop.flatten import flatten
from luthier.passes.loop.legalize_arithmetic import legalize_arithmetic
from luthier.passes.loop.legalize_dtype import CODES, CUDA_RULES, legalize_dtype
from luthier.passes.loop.place_lets import place_lets
from luthier.passes.loop.scalarize import scalarize

KEYWORDS = frozenset(
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr const_cast continue
    decltype default delete do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long
    mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast return
    short signed sizeof static static_assert static_cast struct switch template this throw true try typedef typeid typename union
    unsigned using virtual void volatile wchar_t while xor xor_eq half threadIdx blockIdx blockDim gridDim warpSize sqrtf floorf
    ceilf rintf truncf fabsf lane lane_add lane_mul lane_min lane_max sqrt floor ceil rint trunc fabs min max log exp erf y0 y1 yn
    j0 j1 jn gamma""".split()
)
LIMIT = 1 << 31

# What CUDA C++ has no words for without headers, by name: for a GPU as here, for the emulator as in cuda_builtins.h.
DEVICE = {
    "lt_half_to_float": (
        "float lt_half_to_float(unsigned x) {\n"
        '  float r;\n  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((unsigned short)x));\n  return r;\n}'
    ),
    "lt_float_to_half": (
        "unsigned lt_float_to_half(float x) {\n"
        '  unsigned short r;\n  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));\n  return r;\n}'
    ),
    "lt_ldmatrix": (
        "void lt_ldmatrix(unsigned* r, const unsigned short* p) {\n"
        '  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"\n'
        '    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((unsigned)__cvta_generic_to_shared(p)) : "memory");\n}'
    ),
} | {
    f"lt_mma_{kind}": (
        f"void lt_mma_{kind}(float* c, int pitch, const unsigned* a, const unsigned* b) {{\n"
        f'  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "\n'
        '    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"\n'
        '    : "+f"(c[0]), "+f"(c[1]), "+f"(c[pitch]), "+f"(c[pitch + 1])\n'
        '    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));\n}'
    )
    for kind in ("f16", "bf16")
}  # fmt: skip

# ldmatrix takes eight rows of 16 bytes from addresses that eight lanes give, four times: of A the halves of k for rows and rows + am,
# of B the halves of k for two tiles of columns. A lane then holds what mma wants of it (PTX ISA, fragments of m16n8k16).
MATRIX = """template <int MI, int NI> __device__ __forceinline__
void matrix_{kind}(float* c, const unsigned short* a, int am, int ak, const unsigned short* b, int bk) {{
  const int l = (threadIdx.x + blockDim.x * threadIdx.y) & 31;
  a += (l >> 4) * 8 * ak + (l & 7) * ak + ((l >> 3) & 1) * am - (l >> 2);
  b += (l & 15) * bk + (l >> 4) * 8 - (l & 3) * 2;
  unsigned fa[MI][4], fb[4];
#pragma unroll
  for (int i = 0; i < MI; ++i) lt_ldmatrix(fa[i], a + 2 * i * am);
#pragma unroll
  for (int j = 0; j < NI; j += 2) {{
    lt_ldmatrix(fb, b + 8 * j);
#pragma unroll
    for (int i = 0; i < MI; ++i) {{
      lt_mma_{kind}(c + 4 * i * NI + 2 * j, 2 * NI, fa[i], fb);
      if (j + 1 < NI) lt_mma_{kind}(c + 4 * i * NI + 2 * j + 2, 2 * NI, fa[i], fb + 2);
    }}
  }}
}}"""
_HALF = {"decode.f16": "lt_half_to_float", "encode.f16": "lt_float_to_half"}
_INTS = {8: "char", 16: "short", 32: "int", 64: "long long"}


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """A kernel as C++. ``device``: names of ``DEVICE`` that it uses; ``params``: (type of an element or scalar, name); one
    pointer a buffer, then the scalars (index as 64 bits). ``before``: constants and functions; ``body``: lines. ``grid``: blocks
    in x, y, z over the scalars; ``group``: threads of a block. ``exclusive``: no two buffers share memory that is written."""

    name: str
    symbol: str
    device: tuple[str, ...]
    before: tuple[str, ...]
    params: tuple[tuple[str, str], ...]
    body: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    scalars: tuple[Expr, ...]
    grid: tuple[Expr, Expr, Expr]
    group: tuple[int, int, int]
    exclusive: bool = True

    def pointers(self) -> list[str]:
        """The types that buffers point to."""
        return [f"{'' if b.writable else 'const '}{t}" for b, (t, _) in zip(self.buffers, self.params, strict=False)]

    def text(self, ps: Sequence[str], before: Sequence[str] = ()) -> str:
        """The kernel with these parameters for its buffers. ``before``: functions for a GPU alone."""
        before = [*before, *self.before]
        ps = [*ps, *(f"{t} {n}" for t, n in self.params[len(self.buffers) :])]
        head = f'extern "C" __global__ void __launch_bounds__({math.prod(self.group)}) {self.symbol}({", ".join(ps)}) {{'
        text = "\n".join([*before, head, *self.body, "}", ""])
        return (
            f"namespace in_{self.symbol} {{\n{text}}}\n" if before else text
        )  # names that other kernels of a source may have too

    @property
    def source(self) -> str:
        """For a GPU."""
        restrict = " __restrict__" if self.exclusive else ""
        return self.text(
            [f"{t}*{restrict} {n}" for t, (_, n) in zip(self.pointers(), self.params, strict=False)],
            [f"__device__ __forceinline__ {DEVICE[n]}" for n in self.device],
        )

    @property
    def emulated(self) -> str:
        """For a host compiler, behind ``cuda_builtins.h``: buffers that know their extent, and ``call_SYMBOL`` with the arguments
        in an array."""
        types = self.pointers()
        text = self.text([f"lt_span<{t}> {n}" for t, (_, n) in zip(types, self.params, strict=False)])
        args = [f'{{({t}*)a[{k}].p, a[{k}].n, "{b.name}"}}' for k, (t, b) in enumerate(zip(types, self.buffers, strict=True))]
        args += [f"lt_value<{t}>(a[{k}])" for k, (t, _) in enumerate(self.params) if k >= len(args)]
        name = f"in_{self.symbol}::{self.symbol}" if self.before else self.symbol
        return f'{text}extern "C" void call_{self.symbol}(const lt_arg* a) {{ {name}({", ".join(args)}); }}\n'

    @property
    def waits(self) -> bool:
        """Whether threads wait for each other."""
        return any("__sync" in x or "__shfl" in x or "lt_mma" in x for x in (*self.before, *self.body))

    def renamed(self) -> CudaKernel:
        """Named by what it is, so that equal kernels have one symbol."""
        anonymous = replace(self, symbol="k")
        return replace(self, symbol=f"{self.symbol[:40]}_{hashlib.sha256(anonymous.source.encode()).hexdigest()[:12]}")


class _Cuda(CStyle):
    keywords: ClassVar[frozenset[str]] = KEYWORDS
    target: ClassVar[str] = "CUDA"

    def __init__(self, f: Func) -> None:
        super().__init__(f)
        self.helpers: dict[str, str] = {}
        self.device: set[str] = set()
        self.tiles = {
            x.name
            for s in walk_stmts(f.body)
            if isinstance(s, Call) and s.callee in MMA.values()
            for x in s.args
            if isinstance(x, Buffer)
        }
        self.shares = False  # lanes of a warp share a loop
        self.functions: dict[str, str] = {}  # intrinsic -> the function that computes it
        self.atomic = {s.args[0].name for s in walk_stmts(f.body) if isinstance(s, Call) and s.callee == "atomic_store_bits"}

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
        if d.lanes > 1:
            return self.vector([self.literal(v, d.scalar)] * d.lanes, d)
        if d.is_bool:
            return "true" if v else "false"
        if d.is_float:
            f = d.bits == 32
            if math.isfinite(v):
                t = f"{v!r}f" if f else repr(v)
                return f"({t})" if v < 0 or math.copysign(1, v) < 0 else t
            bits = (
                (0x7FC00000 if math.isnan(v) else int(np.float32(v).view(np.uint32)))
                if f
                else (0x7FF8 << 48 if math.isnan(v) else int(np.float64(v).view(np.uint64)))
            )
            return f"__int_as_float((int){bits:#x}u)" if f else f"__longlong_as_double((long long){bits:#x}ull)"
        if (d.is_int and d.bits <= 32 and d.is_signed) or (d.is_index and -LIMIT < v < LIMIT):
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
            return (
                f"__popcll({x})"
                if d.bits == 64
                else f"({self.type(d)})__popc((unsigned)({x}){'' if d.bits >= 32 else f' & {(1 << d.bits) - 1}u'})"
            )
        if not d.is_float:
            return None
        if op == "isinf":
            return f"(fabs{'f' if d.bits == 32 else ''}({x}) == {self.literal(math.inf, d)})"
        names = {
            "abs": "fabs",
            "floor": "floor",
            "ceil": "ceil",
            "round": "rint",
            "trunc": "trunc",
            "sqrt": "sqrt",
            "rsqrt": "rsqrt",
        }
        return f"{names[op]}{'f' if d.bits == 32 else ''}({x})" if op in names else None

    def remainder(self, a: str, b: str, d: DType) -> str:
        return f"fmod{'f' if d.bits == 32 else ''}({a}, {b})"

    def declare(self, name: str, d: DType, v: str) -> str:
        return f"const {self.type(d)} {name} = {v};"

    def declare_register(self, b: Buffer) -> str:
        return f"{self.type(b.dtype)} {self.name(b.name)};"

    def declare_array(self, b: Buffer, n: int) -> str:
        align = "__align__(16) " if b.scope == "shared" and b.dtype.bits * b.dtype.lanes < 128 else ""
        if b.scope == "global":
            raise CompilationError(f"CUDA kernels cannot allocate global memory ({b.name})", op=self.f.name)
        where = f"__shared__ {align if b.name in self.tiles else ''}" if b.scope == "shared" else ""
        return f"{where}{self.type(b.dtype)} {self.name(b.name)}[{max(n, 1)}];"

    def let(self, v: Expr, value: str) -> str:
        return f"const {self.index_type(v)} {self.name(v)} = {value};" if v.dtype.is_index else super().let(v, value)

    def for_head(self, v: Expr, lo: str, hi: str) -> str:
        n = self.name(v)
        return f"for ({self.index_type(v)} {n} = {lo}; {n} < {hi}; ++{n})"

    @staticmethod
    def index_type(e: Expr) -> str:
        """Indices that are known to fit take 32 bits: half the registers."""
        lo, hi = bounds(e)
        fits = isinstance(lo, int) and isinstance(hi, int) and -LIMIT <= lo and hi < LIMIT
        return "int" if fits and e.dtype.lanes == 1 else "long long"

    def binary(self, e: Expr, a: str, b: str) -> str:
        if (
            e.dtype.is_index
            and e.op in ("add", "sub", "mul", "shl")
            and self.index_type(e) != "int"
            and all(self.index_type(x) == "int" for x in e.args)
        ):
            a = f"(long long){a}"
        return super().binary(e, a, b)

    def barrier(self, scope: str) -> str:
        return "__syncthreads();"

    def position(self, kind: str) -> str:
        return f"(int){'blockIdx' if kind.startswith('block') else 'threadIdx'}.{kind[-1]}"

    def instruction(self, e: Expr) -> str:
        name = e.attr[0]
        args = ", ".join(self.expr(a) for a in e.args)
        if name in WORDS:  # an int accumulator takes signed bytes, an unsigned one the others
            spelling, t = WORDS[name].spelling["cuda"][32], "int" if WORDS[name].a.is_signed else "unsigned"
            return f"{spelling}({', '.join(f'({t})({self.expr(a)})' for a in e.args)}, ({t})0)"
        if name in _HALF:
            self.device.add(_HALF[name])
            return f"{_HALF[name]}({args})"
        return f"{self.function(name)}({args})" if name in CODES else super().instruction(e)

    def function(self, intrinsic: str) -> str:
        """The name of a function that computes one of ``CODES``, printed when it is first needed."""
        name = self.functions.get(intrinsic)
        if name is None:
            v, value = CODES[intrinsic]
            name = self.functions[intrinsic] = self.name(f"{intrinsic}()")
            r = Buffer("r", value.dtype, (), "local")
            p = _Cuda(place_lets(Func(intrinsic, (v,), Alloc(r, Store(r, (), value)))))
            p.stmt(p.f.body)
            head = f"__device__ __forceinline__ {self.type(value.dtype)} {name}({self.type(v.dtype)} {p.name(v)}) {{"
            self.helpers[intrinsic] = "\n".join([head, *p.lines, f"  return {p.name(r.name)};", "}"])
        return name

    def effect(self, s: Call) -> str:
        kind = next((d.name for d, name in MMA.items() if name == s.callee), None)
        if kind is not None:
            return self.matrix(s, kind)
        if s.callee != "atomic_store_bits":
            return super().effect(s)
        b, at, mask, bits = s.args
        p, v = (
            f"&{self.name(b.name)}[{self.expr(at)}]",
            self.name(f"bits~{len(self.used)}"),
        )  # bits: before the word changes, it may be read from it
        return f"const unsigned {v} = {self.expr(bits)}; atomicAnd({p}, ~{self.expr(mask)}); atomicOr({p}, {v});"

    def matrix(self, s: Call, kind: str) -> str:
        """Products of matrices by a warp (:mod:`luthier.passes.gpu.use_matrix`)."""
        acc, a, at, am, ak, b, bt, bk = s.args
        n = dict(s.attrs)
        self.device |= {"lt_ldmatrix", f"lt_mma_{kind}"}
        self.helpers[s.callee] = MATRIX.format(kind=kind)
        places = [
            f"(const unsigned short*){self.name(x.name)} + {self.expr(i)}, {', '.join(self.expr(p) for p in pitches)}"
            for x, i, pitches in ((a, at, (am, ak)), (b, bt, (bk,)))
        ]
        return f"matrix_{kind}<{n['mi']}, {n['ni']}>({self.name(acc.name)}, {', '.join(places)});"

    def share(self, s: For, acc: Buffer, op: str) -> bool:
        """Warps are whole (``legalize_cuda``): 32 lanes, whose sums cross in five steps."""
        self.shares = True
        v, a, t = self.name(s.var), self.name(acc.name), self.type(acc.dtype)
        self.put(f"for (int {v} = lane; {v} < {self.expr(s.hi)}; {v} += 32) {{")
        self.body(s.body)
        self.put("}")
        self.put(f"{a} = lane_{op}({a});")
        better = f"x {'<' if op.endswith('min') else '>'} y"
        if op.endswith(("min", "max")):
            other = self.choose(f"(x != x || {better})" if op.startswith("nan") else f"({better})", "x", "y")
        else:
            other = self.arithmetic(op, "x", "y", acc.dtype)
        step = f"const {t} y = __shfl_xor_sync(0xffffffffu, x, k); x = {other};"
        self.helpers[f"{op} {t}"] = (
            f"__device__ __forceinline__ {t} lane_{op}({t} x) {{ for (int k = 16; k; k >>= 1) {{ {step} }} return x; }}"
        )
        return True

    def kernel(self, exclusive: bool) -> CudaKernel:
        f = self.f
        stored = {s.buf.name for s in walk_stmts(f.body) if isinstance(s, Store)} | self.atomic
        buffers = tuple(replace(b, writable=b.name in stored) for b in f.buffers)
        params = [(self.type(b.dtype), self.name(b.name)) for b in buffers] + [
            (self.type(v.dtype), self.name(v)) for v in f.scalars
        ]
        before = []
        for name, a in f.data.items():
            d = next((s.buf.dtype for s in walk_stmts(f.body) if isinstance(s, Alloc) and s.buf.name == name), i32)
            vals = ", ".join(self.literal(v, d) for v in np.asarray(a).reshape(-1).tolist())
            before.append(f"__device__ const {self.type(d)} {self.name(name)}[{np.asarray(a).size}] = {{{vals}}};")
        symbol = self.name(("kernel_" + f.name).replace(".", "_"))
        self.stmt(f.body)
        x, y, z = (self.group.get(f"thread.{d}", 1) for d in "xyz")
        if self.shares:
            self.lines.insert(0, "  const int lane = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;")
        bx, by, bz = (self.grid.get(f"block.{d}", const(1)) for d in "xyz")
        return CudaKernel(
            f.name,
            symbol,
            tuple(sorted(self.device)),
            (*before, *self.helpers.values()),
            tuple(params),
            tuple(self.lines),
            buffers,
            f.scalars,
            (bx, by, bz),
            (x, y, z),
            exclusive,
        )


def legalize_cuda(f: Func) -> Func:
    """A kernel with the loop passes done, made printable as CUDA C++: one dimension, no vectors, a grid."""
    size: dict[str, int] = {}
    for s in walk_stmts(f.body):
        if isinstance(s, For) and s.kind.startswith("thread"):
            size[s.kind] = max(size.get(s.kind, 1), s.extent.attr if s.extent.op == "const" else 1)
    if math.prod(size.values()) % 32:  # the last warp would be a part of one
        f = spread_subgroups(f)
    f = combine_accesses(scalarize(map_parallel(flatten(f))), fits=lambda b: b.scope == "param" and 8 <= b.dtype.bits < 32)  # whole words
    f = combine_accesses(legalize_dtype(f, CUDA_RULES))
    return place_lets(legalize_arithmetic(clamp_loads(f), index_bits=64))


def print_cuda(f: Func, exclusive: bool = True) -> CudaKernel:
    """``exclusive``: no two arguments share memory that the kernel writes. Raises CompilationError for what a CUDA kernel cannot
    express (run-time sized local memory, global scratch)."""
    return _Cuda(f).kernel(exclusive)
