"""Text of expressions, Computes and loop IR. The loop IR text is parsed back by :mod:`luthier.ir.parser`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from luthier.ir.compute import Compute, Fold, Pull, Push
from luthier.ir.expr import Expr, load_parts, loads, tree_size, var, walk
from luthier.ir.loop import Alloc, Barrier, Block, Buffer, Call, For, Func, If, Let, Stmt, Store, While, exprs_of, walk_stmts

INFIX = {
    "add": ("+", 6), "sub": ("-", 6), "mul": ("*", 7), "div": ("/", 7), "floordiv": ("//", 7), "mod": ("%", 7), "and": ("&", 3),
    "or": ("|", 2), "xor": ("^", 2), "shl": ("<<", 5), "shr": (">>", 5), "lt": ("<", 4), "le": ("<=", 4), "eq": ("==", 4), "ne": ("!=", 4),
}


_NAME = re.compile(r"[A-Za-z_][\w'^#]*(?:\.[\w'^#]+)*\Z")
MAX_TREE = 20_000  # nodes that are written out as a tree
SHARED_TREE = 8  # nodes of an operand that is worth a name
KEYWORDS = frozenset("func for in while if else let alloc barrier call pass const true false inf nan readonly".split())


def format_name(n: str) -> str:
    """A name as it stands; quoted where the parser could not tell it from something else."""
    return n if _NAME.match(n) and n not in KEYWORDS else json.dumps(n)


def format_bounds(v: Expr, default: tuple[Any, Any] = (0, None)) -> str:
    """``{lo..hi}`` of a variable's declaration, nothing when they are the default."""
    _, lo, hi = v.attr
    if not (v.dtype.is_index or v.dtype.is_int) or (lo, hi) == default:
        return ""
    return f"{{{'' if lo is None else lo}..{'' if hi is None else format_expr(hi) if isinstance(hi, Expr) else hi}}}"


def format_const(e: Expr) -> str:
    if e.dtype.is_bool:
        return "true" if e.attr else "false"
    if e.dtype.is_index:
        return str(e.attr)
    v = e.attr
    if isinstance(v, float):
        t = "nan" if math.isnan(v) else ("inf" if v > 0 else "-inf") if math.isinf(v) else repr(v)
    else:
        t = str(v)
    return f"{t}:{e.dtype}"


def format_expr(e: Expr, prec: int = 0) -> str:
    """Precedence-aware text; types appear on constants, casts, loads of nothing else. Where nearly the same would be written again and
    again, operands that occur several times are named first: ``(t0 = a // b; t1 = t0 * t0; t1 % 7)``."""
    if tree_size(e) <= MAX_TREE:
        return _format_tree(e, prec)
    uses: dict[Expr, int] = {}
    for x in walk(e):
        for a in x.args:
            uses[a] = uses.get(a, 0) + 1
    names: dict[Expr, Expr] = {}
    parts = []
    for x in walk(e):
        if uses.get(x, 0) > 1 and tree_size(x) > SHARED_TREE:
            parts.append(f"t{len(names)} = {_format_tree(x, 0, names)}")
            names[x] = var(f"t{len(names)}")
    return f"({'; '.join([*parts, _format_tree(e, 0, names)])})"


def _format_tree(e: Expr, prec: int, names: Mapping[Expr, Expr] = MappingProxyType({})) -> str:
    op = e.op
    if e in names:
        return format_expr(names[e])

    def f(a: Expr, prec: int = 0) -> str:
        return _format_tree(a, prec, names)

    if op == "const":
        return format_const(e)
    if op == "var":
        return format_name(e.attr[0])
    if op in INFIX:
        sym, p = INFIX[op]
        s = f"{f(e.args[0], p)} {sym} {f(e.args[1], p + 1)}"
        return f"({s})" if p < prec else s
    if op == "load":
        buf, idx, mask, other = load_parts(e)
        s = f"{format_name(buf.name)}[{', '.join(f(i) for i in idx)}"
        return s + "]" if mask is None else f"{s}; {f(mask)}; {f(other)}]"  # type: ignore[arg-type]
    if op in ("cast", "bitcast"):
        return f"{'' if op == 'cast' else 'bitcast.'}{e.dtype}({f(e.args[0])})"
    if op == "ramp":
        return f"ramp({f(e.args[0])}, {e.attr[0]}, {e.dtype.lanes})"
    if op == "bcast":
        return f"bcast({f(e.args[0])}, {e.dtype.lanes})"
    if op == "vreduce":
        return f"vreduce.{e.attr}({f(e.args[0])})"
    if op == "extract":
        return f"extract({f(e.args[0])}, {e.attr})"
    if op == "shuffle":
        return f"shuffle({', '.join(f(a) for a in e.args)}; {', '.join(map(str, e.attr))})"
    if op == "reduce":
        name, axes, n = e.attr
        where = f" where {f(e.args[n])}" if len(e.args) > n else ""
        ax = ", ".join(f"{a.name} < {f(a.extent)}" for a in axes)
        return f"{name}[{ax}]({', '.join(f(a) for a in e.args[:n])}{where})"
    if op == "proj":
        return f"{f(e.args[0], 9)}.{e.attr}"
    if op == "call":
        name, attr = e.attr
        at = f"<{', '.join(map(str, attr))}>" if attr else ""
        return f"@{name}{at}.{e.dtype}({', '.join(f(a) for a in e.args)})"
    return f"{op}({', '.join(f(a) for a in e.args)})"


def format_buffer(b: Buffer) -> str:
    ro = "" if b.writable else " readonly"
    return f"{format_name(b.name)}: {b.dtype}[{', '.join(format_expr(s) for s in b.shape)}]{'' if b.scope == 'param' else ' ' + b.scope}{ro}"


def format_stmt(s: Stmt, depth: int = 0) -> list[str]:
    pad = "  " * depth
    f = format_expr
    if isinstance(s, Block):
        return [line for c in s.stmts for line in format_stmt(c, depth)]
    if isinstance(s, For):
        head = f"for {f(s.var)}{format_bounds(s.var, loop_bounds(s.hi))} in {f(s.lo)}..{f(s.hi)}{'' if s.kind == 'serial' else ' ' + s.kind}:"
        return [pad + head, *format_stmt(s.body, depth + 1)]
    if isinstance(s, While):
        return [f"{pad}while {f(s.cond)}:", *format_stmt(s.body, depth + 1)]
    if isinstance(s, If):
        out = [f"{pad}if {f(s.cond)}:", *format_stmt(s.then, depth + 1)]
        return out if s.orelse is None else [*out, f"{pad}else:", *format_stmt(s.orelse, depth + 1)]
    if isinstance(s, Let):
        return [f"{pad}let {f(s.var)}: {s.var.dtype}{format_bounds(s.var)} = {f(s.value)}"]
    if isinstance(s, Store):
        mask = "" if s.mask is None else f" if {f(s.mask)}"
        return [f"{pad}{format_name(s.buf.name)}[{', '.join(f(i) for i in s.idx)}] = {f(s.value)}{mask}"]
    if isinstance(s, Alloc):
        return [f"{pad}alloc {format_buffer(s.buf)}:", *format_stmt(s.body, depth + 1)]
    if isinstance(s, Barrier):
        return [f"{pad}barrier {s.scope}"]
    if isinstance(s, Call):
        at = "" if not s.attrs else " {" + ", ".join(f"{k}={v}" for k, v in s.attrs) + "}"
        return [f"{pad}call {format_name(s.callee)}({', '.join(_arg(a) for a in s.args)}){at}"]
    raise TypeError(f"not a statement: {s!r}")


def _arg(a: Any) -> str:
    if isinstance(a, Expr):
        return format_expr(a)
    if isinstance(a, tuple):
        return f"&{format_name(a[0].name)}[{format_expr(a[1])}]"
    return f"&{format_name(a.name)}"


def loop_bounds(hi: Expr) -> tuple[Any, Any]:
    """What the variable of a loop below ``hi`` that starts at 0 records."""
    h = hi - 1
    return 0, int(h.attr) if h.op == "const" else h


def const_buffers(body: Stmt) -> list[Buffer]:
    """Buffers of scope const that ``body`` reads, in order of first use."""
    out: dict[str, Buffer] = {}
    for s in walk_stmts(body):
        for e in loads(*exprs_of(s)):
            if e.attr[0].scope == "const":
                out.setdefault(e.attr[0].name, e.attr[0])
    return list(out.values())


def format_func(fn: Func) -> str:
    ps = ", ".join(format_buffer(p) if isinstance(p, Buffer) else f"{format_expr(p)}: {p.dtype}{format_bounds(p)}" for p in fn.params)
    body = format_stmt(fn.body, 1) or ["  pass"]
    data = [f"  const {format_buffer(b)}" for b in const_buffers(fn.body)]
    return "\n".join([f"func {format_name(fn.name)}({ps}):", *data, *body, ""])


def format_compute(c: Compute) -> str:
    def axes(ax: Any) -> str:
        return ", ".join(f"{a.name} < {format_expr(a.extent)}" for a in ax)

    def one(x: Any, pad: str) -> list[str]:
        if isinstance(x, Pull):
            return [f"{pad}{x.name}[{axes(x.axes)}]: {x.buf.dtype} = {format_expr(x.expr)}"]
        if isinstance(x, Push):
            where = "" if x.where is None else f" where {format_expr(x.where)}"
            return [
                f"{pad}{x.name}[{axes(x.axes)}]: {x.buf.dtype} = {format_expr(x.init)}",
                f"{pad}push [{axes(x.over)}]: {x.name}[{', '.join(format_expr(i) for i in x.index)}] {x.op}= {format_expr(x.value)}{where}",
            ]
        assert isinstance(x, Fold)
        out = [f"{pad}fold {x.axis.name} < {format_expr(x.axis.extent)}{' reverse' if x.reverse else ''}:"]
        out += [f"{pad}  state {s.buf.name}[{axes(s.axes)}]: {s.buf.dtype} = {format_expr(s.init)}" for s in x.state]
        for p in x.step:
            out += one(p, pad + "  ")
        out += [f"{pad}  emit {p.name}[{axes(p.axes)}]: {p.buf.dtype} = {format_expr(p.expr)}" for p in x.emit]
        return out + [f"{pad}  next {s.buf.name} = {format_expr(s.next)}" for s in x.state]

    ps = ", ".join([format_buffer(b) for b in c.params] + [format_expr(d) for d in c.dims])
    lines = [f"compute {c.name}({ps}) -> {', '.join(c.outs)}:"]
    for x in c.lets:
        lines += one(x, "  ")
    return "\n".join(lines) + "\n"


# The classes know nothing of their text: from here on repr() and str() give it (luthier.ir imports this file).
Expr.__repr__ = lambda e: format_expr(e)  # type: ignore[method-assign, arg-type]
Func.__str__ = format_func  # type: ignore[method-assign, assignment]
Compute.__str__ = format_compute  # type: ignore[method-assign, assignment]
