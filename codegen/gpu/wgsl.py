"""Loop IR to WGSL, the shading language of WebGPU.

Buffers are storage buffers in the order of the parameters at ``@group(0) @binding(n)``, scalars are one uniform struct of
32-bit values at the binding after the last buffer. ``index`` is ``i32``. Narrow integers live in 32 bits; memory holds
32-bit elements only (``legalize_dtype`` packed the rest). Infinity and NaN come from bits in a private variable, because
WGSL refuses them in constant expressions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from luthier.codegen.gpu import wgsl_wide
from luthier.codegen.gpu.c_style import CStyle
from luthier.codegen.gpu.webgpu_features import ALL, F16, PACKED_DOT, STANDARD, SUBGROUPS, Dialect
from luthier.ir.dtypes import DType, f16, f32, i32
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr
from luthier.ir.loop import Alloc, Buffer, Call, For, Func, Store, contents_of, nodes_of, walk_stmts
from luthier.ir.words import WORDS
from luthier.passes.gpu.map_parallel import map_parallel
from luthier.passes.gpu.merge_bindings import merge_bindings
from luthier.passes.gpu.split_grid import split_grid
from luthier.passes.gpu.spread_subgroups import spread_subgroups
from luthier.passes.gpu.wide_words import PREFIX
from luthier.passes.loop.combine_accesses import combine_accesses
from luthier.passes.loop.flatten import flatten
from luthier.passes.loop.legalize_arithmetic import legalize_arithmetic
from luthier.passes.loop.legalize_dtype import CODES, WGSL_RULES, legalize_dtype
from luthier.passes.loop.place_lets import place_lets
from luthier.passes.loop.round_by_operator import round_by_operator
from luthier.passes.loop.scalarize import scalarize

KEYWORDS = frozenset(
    """alias break case const const_assert continue continuing default diagnostic discard else enable false fn for if let loop
    override requires return struct switch true var while array atomic bool f16 f32 i32 u32 vec2 vec3 vec4 ptr sampler texture select
    bitcast sg_lane sg_lanes min max abs floor ceil round trunc sqrt fma main dims wg lid target filter read write storage uniform workgroup private
    function active asm async await class common default demote do double enum explicit export extern final finally from get goto
    half handle impl import in inline input instance interface is layout mod module move mut namespace new nil noinline null operator
    out package partial pass patch precise precision premerge process protected pub public ref regardless register resource rest
    sample self set shared sizeof smooth static std super super_ switch template this throw trait try type typedef union unless use
    using varying virtual void volatile where with yield wgsl of""".split()
)

# C's fmod on the bits, because WGSL's % divides and rounds: a shift and a subtraction for every power of two between the operands
REMAINDER = """fn {name}(x: f32, y: f32) -> f32 {{
    let sign = bitcast<u32>(x) & 2147483648u;
    let a = bitcast<u32>(x) & 2147483647u;
    let b = bitcast<u32>(y) & 2147483647u;
    if (a >= 2139095040u || b > 2139095040u || b == 0u) {{ return {nan}; }}
    if (a < b) {{ return x; }}
    var r = select(a, (a & 8388607u) | 8388608u, a >= 8388608u);
    var m = select(b, (b & 8388607u) | 8388608u, b >= 8388608u);
    var up = countLeadingZeros(r) - 8u;
    r <<= up;
    var e = max(i32(a >> 23u), 1i) - i32(up);
    up = countLeadingZeros(m) - 8u;
    m <<= up;
    let low = max(i32(b >> 23u), 1i) - i32(up);
    for (; e > low; e--) {{
        r = select(r, r - m, r >= m) << 1u;
    }}
    r = select(r, r - m, r >= m);
    if (r == 0u) {{ return bitcast<f32>(sign); }}
    up = countLeadingZeros(r) - 8u;
    r <<= up;
    e = low - i32(up);
    r = select(r >> u32(1i - e), (r & 8388607u) | (u32(max(e, 0i)) << 23u), e > 0i);
    return bitcast<f32>(r | sign);
}}"""


@dataclass(frozen=True, slots=True)
class Shader:
    """``source``: WGSL with entry point ``main``, without directives. ``buffers``: parameters after legalisation, in binding order.
    ``scalars``: fields of the uniform struct. ``grid``: number of groups in x, y, z over the scalars; ``group``: threads of a group.
    ``features``: the optional ones that it needs (:mod:`luthier.codegen.gpu.webgpu_features`)."""

    name: str
    source: str
    buffers: tuple[Buffer, ...]
    scalars: tuple[Expr, ...]
    grid: tuple[Expr, Expr, Expr]
    group: tuple[int, int, int]
    features: tuple[str, ...] = ()

    def text(self, dialect: Dialect = STANDARD) -> str:
        """The source behind the directives that it needs."""
        return dialect.write(self.source, self.features)


class _Wgsl(CStyle):
    keywords: ClassVar[frozenset[str]] = KEYWORDS
    target: ClassVar[str] = "WGSL"

    def __init__(self, f: Func) -> None:
        super().__init__(f)
        self.features: set[str] = set()  # those that what is printed needs
        self.special: dict[str, int] = {}
        self.globals: list[str] = []
        self.words: set[str] = set()  # functions on values of two words
        self.functions: dict[str, str] = {}  # intrinsic -> the function that computes it
        self.atomic = {s.args[0].name for s in walk_stmts(f.body) if isinstance(s, Call) and s.callee == "atomic_store_bits"}

    def type(self, d: DType) -> str:
        if d.lanes > 1:
            return f"vec{d.lanes}<{self.type(d.scalar)}>"
        if d.is_bool:
            return "bool"
        if d.is_index:
            return "i32"
        if d.is_int and d.bits <= 32:
            return "i32" if d.is_signed else "u32"
        if d.kind == "f" and d.bits in (16, 32):
            if d.bits == 16:
                self.features.add(F16)
            return f"f{d.bits}"
        raise CompilationError(f"WGSL has no type {d}", op=self.f.name, hint="run legalize_dtype first")

    def literal(self, v: Any, d: DType) -> str:
        if d.lanes > 1:
            return self.vector([self.literal(v, d.scalar)], d)
        if d.is_bool:
            return "true" if v else "false"
        t = self.type(d)
        if d.is_float:
            v = float(np.float16(v)) if d.bits == 16 else v  # what the type cannot hold is an error
            if math.isfinite(v):
                suffix = "f" if t == "f32" else "h"
                return f"{v!r}{suffix}" if v else f"-0.0{suffix}" if math.copysign(1, v) < 0 else f"0.0{suffix}"
            bits = int(np.float32(v).view(np.uint32)) if not math.isnan(v) else 0x7FC00000
            n = self.special.setdefault(f"{bits:#x}", len(self.special))
            s = f"bitcast<f32>(special_{n})"
            return s if t == "f32" else f"f16({s})"
        if t == "u32":
            return f"{v}u"
        return "i32(-2147483648)" if v == -(1 << 31) else f"{v}i" if v >= 0 else f"({v}i)"

    def vector(self, parts: Sequence[str], d: DType) -> str:
        return f"{self.type(d)}({', '.join(parts if len(set(parts)) > 1 else parts[:1])})"

    def convert(self, x: str, s: DType, d: DType) -> str:
        t = self.type(d)
        if d.is_bool:
            return x if s.is_bool else f"({x} != {self.zero(s)})"
        if s.is_float and not d.is_float:  # t(x) stops at the largest float below the limit; NaN is whatever
            x = f"f32({x})" if s.bits == 16 else x  # f16 has no limits of integers
            r = self.choose(f"({x} == {x})", f"{t}({x})", f"{t}(0)")
            top = ("4294967295u", "4294967296.0") if t == "u32" else ("2147483647i", "2147483648.0")
            return self.choose(f"({x} >= {top[1]})", top[0], r)
        r = f"{t}({x})" if self.type(s) != t else x
        if not d.is_float and not s.is_bool and (d.bits < s.bits or d.is_signed != s.is_signed):
            return self.wrap(r, d)
        return r

    def reinterpret(self, x: str, s: DType, d: DType) -> str:
        if self.type(s) == self.type(d):
            return self.wrap(x, d) if not d.is_float else x
        if s.bits != 32 or d.bits != 32:
            return self.wrap(f"{self.type(d)}({x})", d)
        return f"bitcast<{self.type(d)}>({x})"

    def choose(self, c: str, a: str, b: str) -> str:
        return f"select({b}, {a}, {c})"

    def masked_load(self, c: str, a: str, b: str) -> str:
        return f"select({b}, {a}, {c})"  # reads outside a buffer are harmless by WebGPU's rules

    def wrap(self, x: str, d: DType) -> str:
        if d.bits >= 32 or d.is_index or d.is_bool or d.is_float:
            return x
        return f"extractBits({x}, 0u, {d.bits}u)"

    def math(self, op: str, x: str, d: DType) -> str | None:
        if op == "popcount":
            return f"countOneBits({x})" if d.bits >= 32 or not d.is_signed else f"countOneBits({x} & {(1 << d.bits) - 1})"
        if op in ("isinf", "isnan"):  # by bits: an implementation may assume that there are no infinities and NaNs
            bits = f"(bitcast<u32>({x if d.bits == 32 else f'f32({x})'}) & 2147483647u)"
            return f"({bits} {'==' if op == 'isinf' else '>'} 2139095040u)"
        names = {"abs": "abs", "floor": "floor", "ceil": "ceil", "round": "round", "trunc": "trunc", "sqrt": "sqrt"}
        if op in names and d.is_float:
            return f"{names[op]}({x})"
        return f"(1.0 / sqrt({x}))" if op == "rsqrt" else None

    def remainder(self, a: str, b: str, d: DType) -> str:
        name = self.functions.get("rem")
        if name is None:
            name = self.functions["rem"] = self.name("rem()")
            self.globals.append(REMAINDER.format(name=name, nan=self.literal(math.nan, f32)))
        return f"f16({name}(f32({a}), f32({b})))" if d.bits == 16 else f"{name}({a}, {b})"

    def shift_amount(self, x: str) -> str:
        return f"u32({x})"

    def read(self, b: Buffer, i: str) -> str:
        return f"atomicLoad(&{self.name(b.name)}[{i}])" if b.name in self.atomic else f"{self.name(b.name)}[{i}]"

    def write(self, b: Buffer, i: str, v: str) -> str:
        if b.name in self.atomic:
            return f"atomicStore(&{self.name(b.name)}[{i}], {v});"
        return super().write(b, i, v)

    def declare(self, name: str, d: DType, v: str) -> str:
        return f"let {name} = {v};"

    def declare_register(self, b: Buffer) -> str:
        return f"var {self.name(b.name)}: {self.type(b.dtype)};"

    def declare_array(self, b: Buffer, n: int) -> str:
        t = f"array<{self.type(b.dtype)}, {max(n, 1)}>"
        if b.scope == "shared":
            self.globals.append(f"var<workgroup> {self.name(b.name)}: {t};")
            return ""
        if b.scope == "global":
            raise CompilationError(f"WGSL kernels cannot allocate global memory ({b.name})", op=self.f.name)
        return f"var {self.name(b.name)}: {t};"

    def for_head(self, v: Expr, lo: str, hi: str) -> str:
        n = self.name(v)
        return f"for (var {n}: i32 = {lo}; {n} < {hi}; {n}++)"

    def barrier(self, scope: str) -> str:
        return "workgroupBarrier();" if scope != "global" else "storageBarrier();"

    def position(self, kind: str) -> str:
        return f"i32({'wg' if kind.startswith('block') else 'lid'}.{kind[-1]})"

    def share(self, s: For, acc: Buffer, op: str) -> bool:
        """Lanes are counted, not assumed: a subgroup may have any size, and the last one of a group fewer lanes than the others."""
        self.features.add(SUBGROUPS)
        v, a = self.name(s.var), self.name(acc.name)
        self.put(f"for (var {v} = sg_lane; {v} < {self.expr(s.hi)}; {v} += sg_lanes) {{")
        self.body(s.body)
        self.put("}")
        if op.startswith("nan"):
            lost = self.math("isnan", a, acc.dtype)
            self.put(f"{a} = select(subgroup{op[3:].capitalize()}({a}), {self.literal(math.nan, acc.dtype)}, subgroupAny({lost}));")
        else:
            self.put(f"{a} = subgroup{op.capitalize()}({a});")
        return True

    def instruction(self, e: Expr) -> str:
        name = e.attr[0]
        args = ", ".join(self.expr(a) for a in e.args)
        if name in WORDS:
            self.features.add(PACKED_DOT)
            return f"{WORDS[name].spelling['wgsl'][32]}({args})"
        if name.startswith(PREFIX):
            return self.wide(name.removeprefix(PREFIX), args)
        if name == "decode.f16":
            return f"unpack2x16float({args}).x"
        return f"{self.function(name)}({args})" if name in CODES else super().instruction(e)

    def wide(self, name: str, args: str) -> str:
        """An intrinsic on values of two words."""
        if name == "pair":
            return f"vec2<u32>({args})"
        for f in reversed(wgsl_wide.SPELLING[name]):
            self.words.add(f)
            args = f"{f}({args})"
        return args

    def function(self, intrinsic: str) -> str:
        """The name of a function that computes one of ``CODES``, printed when it is first needed."""
        name = self.functions.get(intrinsic)
        if name is None:
            v, value = CODES[intrinsic]
            name = self.functions[intrinsic] = self.name(f"{intrinsic}()")
            r = Buffer("r", value.dtype, (), "local")
            p = _Wgsl(place_lets(Func(intrinsic, (v,), Alloc(r, Store(r, (), value)))))
            p.special, p.functions, p.globals = self.special, self.functions, self.globals
            p.stmt(p.f.body)
            head = f"fn {name}({p.name(v)}: {self.type(v.dtype)}) -> {self.type(value.dtype)} {{"
            self.globals.append("\n".join([head, *p.lines, f"    return {p.name(r.name)};", "}"]))
        return name

    def effect(self, s: Call) -> str:
        if s.callee != "atomic_store_bits":
            return super().effect(s)
        b, at, mask, bits = s.args
        p = f"&{self.name(b.name)}[{self.expr(at)}]"
        v = self.name(f"bits~{len(self.used)}")  # before the word changes: it may be read from it
        return f"let {v} = {self.expr(bits)}; atomicAnd({p}, ~{self.expr(mask)}); atomicOr({p}, {v});"

    def shader(self) -> Shader:
        f = self.f
        head: list[str] = []
        lines, self.lines = self.lines, []
        self.stmt(f.body)
        body, self.lines = self.lines, lines
        stored = self.atomic | {s.buf.name for s in walk_stmts(f.body) if isinstance(s, Store)}
        buffers = tuple(replace(b, writable=b.name in stored) for b in f.buffers)
        for k, b in enumerate(buffers):
            t = f"atomic<{self.type(b.dtype)}>" if b.name in self.atomic else self.type(b.dtype)
            head.append(f"@group(0) @binding({k}) var<storage, {'read_write' if b.writable else 'read'}> {self.name(b.name)}: array<{t}>;")
        for name, a in f.data.items():
            d = _dtype(f, name)
            rows = np.asarray(a).reshape(-1, d.lanes).tolist()
            vals = ", ".join(self.vector([self.literal(v, d.scalar) for v in row], d) if d.lanes > 1 else self.literal(row[0], d) for row in rows)
            head.append(f"var<private> {self.name(name)} = array<{self.type(d)}, {len(rows)}>({vals});")
        if f.scalars:
            fields = ", ".join(f"{self.name(v)}: {self.type(v.dtype)}" for v in f.scalars)
            head.append(f"struct Dims {{ {fields} }}")
            head.append(f"@group(0) @binding({len(f.buffers)}) var<uniform> dims: Dims;")
            for v in f.scalars:
                self.put(f"let {self.name(v)} = dims.{self.name(v)};")
        if SUBGROUPS in self.features:
            self.put("let sg_lane = i32(subgroupExclusiveAdd(1u));")
            self.put("let sg_lanes = i32(subgroupAdd(1u));")
        self.lines += body
        group = tuple(self.group.get(f"thread.{d}", 1) for d in "xyz")
        head += [f"var<private> special_{n}: u32 = {bits}u;" for bits, n in self.special.items()]
        head += [*self.globals, *wgsl_wide.needed(self.words)]
        sig = f"@compute @workgroup_size({group[0]}, {group[1]}, {group[2]})\n"
        sig += "fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_id) lid: vec3<u32>) {"
        src = "\n".join([*head, "", sig, *self.lines, "}", ""])
        one = _one()
        grid = tuple(self.grid.get(f"block.{d}", one) for d in "xyz")
        features = tuple(x for x in ALL if x in self.features)
        return Shader(f.name, src, buffers, f.scalars, grid, group, features)  # type: ignore[arg-type]


def _one() -> Expr:
    from luthier.ir.expr import const

    return const(1)


def _dtype(f: Func, name: str) -> DType:
    for s in walk_stmts(f.body):
        if isinstance(s, Alloc) and s.buf.name == name:
            return s.buf.dtype
    return i32


def optional_features(f: Func) -> frozenset[str]:
    """Features that could change how a kernel is printed."""
    found = set()
    if any(isinstance(s, For) and s.kind == "subgroup" for s in walk_stmts(f.body)):
        found.add(SUBGROUPS)
    inside = contents_of(f.body)
    if any(d.scalar is f16 for d in (*(b.dtype for b in (*f.buffers, *inside.allocated)), *inside.dtypes)):
        found.add(F16)
    if any(d.bits == 8 for d in inside.dtypes) and any(e.op == "call" and e.attr[0] in WORDS for e in nodes_of(f.body)):
        found.add(PACKED_DOT)
    return frozenset(found)


def legalize_wgsl(f: Func, groups: Sequence[Sequence[str]] = (), features: Collection[str] = (), narrow: Collection[str] = ()) -> Func:
    """A kernel with the loop passes done, made printable as WGSL: one dimension, no vectors, 32-bit types, a grid, and one binding
    for each of ``groups`` of buffers. ``features``: the optional ones that the device has. ``narrow``: buffers of 64-bit integers that are
    known to fit 32."""
    if SUBGROUPS not in features:
        f = spread_subgroups(f)
    halves = {b.name for b in f.buffers if b.dtype.scalar is f16}
    shared = any(halves & {*g} for g in groups if len(g) > 1)  # a binding of several buffers has whole words
    rules = replace(WGSL_RULES, half=F16 in features and not shared, dots=PACKED_DOT in features)
    f = scalarize(split_grid(map_parallel(flatten(f))))
    f = legalize_dtype(combine_accesses(f, fits=lambda b: b.scope == "param" and b.dtype.bits < 32), rules, narrow)  # whole words of narrow elements
    f = combine_accesses(round_by_operator(merge_bindings(f, groups)), fits=lambda b: b.dtype.bits == 32 or b.dtype is f16)
    return place_lets(legalize_arithmetic(f))


def print_wgsl(f: Func) -> Shader:
    """Raises CompilationError for what WGSL cannot express (64-bit floats, run-time sized local memory, global scratch)."""
    return _Wgsl(f).shader()
