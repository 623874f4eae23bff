"""Scalar expressions as WebAssembly. Values narrower than 32 bits live in an ``i32``, sign- or zero-extended; index is ``i32``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from luthier.codegen.wasm.encoder import OPCODE, Code
from luthier.ir.dtypes import DType, f32, f64, index
from luthier.ir.errors import CompilationError
from luthier.ir.expr import Expr, is_const

_UNARY_F = {"neg": "neg", "abs": "abs", "floor": "floor", "ceil": "ceil", "round": "nearest", "trunc": "trunc", "sqrt": "sqrt"}
_ARITH = {"add", "sub", "mul"}
_BITS = {"and", "or", "xor"}


@cache
def valtype(d: DType) -> str:
    """The value type of a scalar. Raises CompilationError for types that ``legalize_dtype`` must have removed."""
    if d.lanes > 1:
        return "v128"
    if d.is_float:
        if d in (f32, f64):
            return d.name
        raise CompilationError(f"WebAssembly has no arithmetic in {d}", hint="run legalize_dtype first")
    return "i64" if d.bits == 64 and not d.is_index else "i32"


def signed(d: DType) -> bool:
    return d.kind in "ix"


class Emitter:
    """State of one function: its code, its locals and where variables live. ``_Vector`` and ``_Func`` build on it."""

    saturates = False  # an i64 that becomes an index: the nearest one, instead of its lower half

    def __init__(self, name: str, relaxed: bool) -> None:
        self.name, self._relaxed = name, relaxed
        self.regs: dict[str, int | list[int]] = {}  # register variables
        self.by_operator: dict[str, Callable[[Expr], None]] = {
            "var": self.variable, "const": self.constant_value, "load": self.load, "select": self.choose, "cast": self.cast, "bitcast": self.bitcast,
            "extract": self.extract, "vreduce": self.vreduce, "add": self.arithmetic, "sub": self.arithmetic, "mul": self.arithmetic,
            "lt": self.compare, "le": self.compare, "eq": self.compare, "ne": self.compare,
        }  # fmt: skip
        self.relies = False  # whether the code is another one without relaxed SIMD
        self.c = Code()
        self.types: list[str] = []
        self.nparams = 0
        self.free: dict[str, list[int]] = {}
        self.vars: dict[Expr, int | list[int]] = {}
        self.depth = 0  # loops around what is being emitted
        self.pool: dict[tuple[str, bytes], int] = {}  # constants that loops use, by value: locals set at the start of the function

    @property
    def relaxed(self) -> bool:
        """Whether relaxed SIMD may be used; asked only where that decides something."""
        self.relies = True
        return self._relaxed

    # locals ------------------------------------------------------

    def local(self, ty: str) -> int:
        pool = self.free.get(ty)
        if pool:
            return pool.pop()
        self.types.append(ty)
        return self.nparams + len(self.types) - 1

    def release(self, ty: str, n: int) -> None:
        self.free.setdefault(ty, []).append(n)

    def own_local(self, ty: str) -> int:
        """A local that is never handed out again."""
        self.types.append(ty)
        return self.nparams + len(self.types) - 1

    def v128_const(self, data: bytes) -> None:
        """A vector constant. Engines build one from three instructions wherever it stands, so loops read it from a local; zeros and
        ones are one instruction anyway."""
        if not self.depth or data in (bytes(16), b"\xff" * 16):
            self.c.v128(data)
            return
        key = ("v128", data)
        if key not in self.pool:
            self.pool[key] = self.own_local("v128")
        self.c.get(self.pool[key])

    def prologue(self) -> bytes:
        """Sets the locals of :attr:`pool`."""
        c = Code()
        for (_, data), n in self.pool.items():
            c.v128(data)
            c.set(n)
        return bytes(c.b)

    def fail(self, e: Expr, why: str) -> CompilationError:
        return CompilationError(f"WebAssembly: {why}: {e!r}", op=self.name)

    def emit(self, e: Expr) -> None:
        """The value of ``e`` on the stack."""
        if e.dtype.lanes > 1:
            self.vector(e)
        else:
            self.scalar(e)

    def vector(self, e: Expr) -> None:
        raise NotImplementedError

    def load(self, e: Expr) -> None:
        raise NotImplementedError

    def packed_load(self, e: Expr) -> None:
        raise NotImplementedError

    def helper(self, name: str) -> int:
        """The index of a function of the runtime."""
        raise NotImplementedError

    def extract(self, e: Expr) -> None:
        raise NotImplementedError

    def vreduce(self, e: Expr) -> None:
        raise NotImplementedError

    # scalars -----------------------------------------------------

    def scalar(self, e: Expr) -> None:
        f = self.by_operator.get(e.op)
        if f is not None:
            f(e)
        elif len(e.args) == 1:
            self.unary(e)
        elif len(e.args) == 2 and e.op != "call":
            self.binary(e)
        else:
            raise self.fail(e, f"no instruction for {e.attr[0] if e.op == 'call' else e.op}")

    def variable(self, e: Expr) -> None:
        n = self.vars.get(e)
        if n.__class__ is not int:
            raise self.fail(e, "variable without a value")
        self.c.get(n)  # type: ignore[arg-type]

    def constant_value(self, e: Expr) -> None:
        self.c.const(valtype(e.dtype), e.attr)

    def arithmetic(self, e: Expr) -> None:
        if not e.dtype.is_index:
            self.binary(e)
            return
        a, b = e.args
        self.scalar(a)
        self.scalar(b)
        self.c.b += _INDEX[e.op]

    def choose(self, e: Expr) -> None:
        self.emit(e.args[1])
        self.emit(e.args[2])
        self.emit(e.args[0])
        self.c.op("select")

    def cast(self, e: Expr) -> None:
        self.emit(e.args[0])
        self.convert(e.args[0].dtype, e.dtype)

    def normalize(self, d: DType) -> None:
        """After arithmetic in 32 bits: back into the range of a narrower integer."""
        if d.is_index or d.is_bool or d.bits >= 32 or d.is_float:
            return
        c = self.c
        if not signed(d):
            c.const("i32", (1 << d.bits) - 1)
            c.op("i32.and")
        elif d.bits in (8, 16):
            c.op(f"i32.extend{d.bits}_s")
        else:
            for o in ("shl", "shr_s"):
                c.const("i32", 32 - d.bits)
                c.op(f"i32.{o}")

    def compare(self, e: Expr) -> None:
        a, b = e.args
        t = valtype(a.dtype)
        if is_const(b, 0) and e.op == "eq" and t in ("i32", "i64"):
            self.emit(a)
            self.c.op(f"{t}.eqz")
            return
        self.emit(a)
        self.emit(b)
        suffix = "" if a.dtype.is_float or e.op in ("eq", "ne") else "_s" if signed(a.dtype) else "_u"
        self.c.op(f"{t}.{e.op}{suffix}")

    def unary(self, e: Expr) -> None:
        op, a, c, d = e.op, e.args[0], self.c, e.dtype
        t = valtype(a.dtype)
        if op == "isnan":

            def differs(g: Callable[[], None]) -> None:
                g()
                g()
                c.op(f"{t}.ne")

            self.twice(a, differs)
        elif op == "isinf":
            self.emit(a)
            c.op(f"{t}.abs")
            c.const(t, float("inf"))
            c.op(f"{t}.eq")
        elif op == "not":
            self.emit(a)
            if d.is_bool:
                c.op("i32.eqz")
            else:
                c.const(t, -1)
                c.op(f"{t}.xor")
                self.normalize(d)
        elif op == "rsqrt" and d.is_float:
            c.const(t, 1.0)
            self.emit(a)
            c.op(f"{t}.sqrt")
            c.op(f"{t}.div")
        elif op in _UNARY_F and d.is_float:
            self.emit(a)
            c.op(f"{t}.{_UNARY_F[op]}")
        elif op == "neg":
            c.const(t, 0)
            self.emit(a)
            c.op(f"{t}.sub")
            self.normalize(d)
        elif op == "abs":
            if not signed(d):
                self.emit(a)
                return

            def magnitude(g: Callable[[], None]) -> None:
                c.const(t, 0)
                g()
                c.op(f"{t}.sub")
                g()
                g()
                c.const(t, 0)
                c.op(f"{t}.lt_s")
                c.op("select")

            self.twice(a, magnitude)
            self.normalize(d)
        elif op == "popcount":
            self.emit(a)
            if d.bits < 32:
                c.const("i32", (1 << d.bits) - 1)
                c.op("i32.and")
            c.op(f"{t}.popcnt")
            self.normalize(d)
        else:
            raise self.fail(e, f"{op} must be expanded first")

    def twice(self, a: Expr, body: Callable[[Callable[[], None]], None]) -> None:
        """``body`` with a way to push the value of ``a`` as often as it likes."""
        if a.op in ("var", "const"):
            body(lambda: self.emit(a))
            return
        t = valtype(a.dtype)
        n = self.local(t)
        self.emit(a)
        self.c.set(n)
        body(lambda: self.c.get(n))
        self.release(t, n)

    def binary(self, e: Expr) -> None:
        op, (a, b), c, d = e.op, e.args, self.c, e.dtype
        t = valtype(d)
        if op in ("min", "max"):
            rel = "lt" if op == "min" else "gt"
            s = "" if d.is_float else "_s" if signed(d) else "_u"

            def pick(x: Callable[[], None], y: Callable[[], None]) -> None:
                x()
                y()
                x()
                y()
                c.op(f"{t}.{rel}{s}")
                c.op("select")

            self.twice(a, lambda x: self.twice(b, lambda y: pick(x, y)))
        elif op in _ARITH or (op == "div" and d.is_float):
            self.emit(a)
            self.emit(b)
            c.op(f"{t}.{op}")
            self.normalize(d)
        elif op in _BITS:
            self.emit(a)
            self.emit(b)
            c.op(f"{t}.{op}")
        elif op in ("shl", "shr"):
            self.emit(a)
            self.emit(b)
            c.op(f"{t}.{'shl' if op == 'shl' else 'shr_s' if signed(d) else 'shr_u'}")
            self.normalize(d)
        elif op in ("div", "rem", "floordiv", "mod") and not d.is_float:
            self.divide(e)
        elif op == "rem":
            for x in (a, b):
                self.emit(x)
                if t == "f32":
                    c.op("f64.promote_f32")
            c.op("call", self.helper("fmod"))
            if t == "f32":
                c.op("f32.demote_f64")
        else:
            raise self.fail(e, f"{op} must be expanded first")

    def divide(self, e: Expr) -> None:
        """Integer divisions that ``legalize_arithmetic`` left; engines need not know that one by a power of two is a shift."""
        (a, b), d, c = e.args, e.dtype, self.c
        t, quot = valtype(d), e.op in ("div", "floordiv")
        plain = e.op in ("floordiv", "mod")
        self.emit(a)
        if plain and b.op == "const" and b.attr & (b.attr - 1) == 0:
            c.const(t, b.attr.bit_length() - 1 if quot else b.attr - 1)
            c.op(f"{t}.shr_{'s' if signed(d) else 'u'}" if quot else f"{t}.and")
        else:
            self.emit(b)
            c.op(f"{t}.{'div' if quot else 'rem'}_{'u' if plain else 's'}")

    # conversions -------------------------------------------------

    def convert(self, s: DType, d: DType) -> None:
        """The value on the stack from ``s`` to ``d`` (scalars), with the meaning of ``cast``."""
        c = self.c
        st, dt = valtype(s), valtype(d)
        if d.is_bool:
            if not s.is_bool:
                c.const(st, 0)
                c.op(f"{st}.ne")
        elif d.is_float:
            if s.is_float:
                if st != dt:
                    c.op("f64.promote_f32" if dt == "f64" else "f32.demote_f64")
            else:
                c.op(f"{dt}.convert_{st}_{'s' if signed(s) or (st == 'i32' and s.bits < 32) else 'u'}")
        elif s.is_float:
            c.op(f"{dt}.trunc_sat_{st}_{'s' if signed(d) else 'u'}")
        else:
            if st == "i32" and dt == "i64":
                c.op("i64.extend_i32_s" if signed(s) else "i64.extend_i32_u")
            elif st == "i64" and dt == "i32":
                if d.is_index and self.saturates:
                    for rel, limit in (("lt_s", (1 << 31) - 1), ("gt_s", -(1 << 31))):
                        n = self.local("i64")
                        c.op("local.tee", n)
                        c.const("i64", limit)
                        c.get(n)
                        c.const("i64", limit)
                        c.op(f"i64.{rel}")
                        c.op("select")
                        self.release("i64", n)
                c.op("i32.wrap_i64")
            if dt == "i32" and (d.bits < s.bits or signed(s) != signed(d)) and not s.is_bool:
                self.normalize(d)

    def bitcast(self, e: Expr) -> None:
        a = e.args[0]
        if a.dtype.lanes > 1:
            self.packed_load(e)
            return
        self.emit(a)
        s, d = valtype(a.dtype), valtype(e.dtype)
        if s != d:
            self.c.op(f"{d}.reinterpret_{s}")
        if d == "i32" and a.dtype.is_int:
            self.normalize(e.dtype)


_INDEX = {op: OPCODE[f"i32.{op}"] for op in _ARITH}
__all__ = ["Emitter", "valtype", "signed", "index"]
