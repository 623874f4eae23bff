"""A Program's main as an ES module for a page: the host statements of :mod:`luthier.codegen.gpu.webgpu` printed as JavaScript.

The result has the interface that ``docs/web.md`` calls ``program.js``. Straight-line code: nothing is interpreted in the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.codegen.gpu.webgpu_features import LOOP_ANSWER, LOOP_PROBE
from luthier.errors import CompilationError

__all__ = ["print_host_js"]

_HELPERS = {
    "mod": "const mod = (a, b) => ((a % b) + b) % b;",
    "fdiv": "const fdiv = (a, b) => (a - (((a % b) + b) % b)) / b;",
    "wrap": (
        "const wrap = (x, bits, signed) => {\n"
        "  if (bits === 32) return signed ? x | 0 : x >>> 0;\n"
        "  const v = x & ((1 << bits) - 1);\n"
        "  return signed && v >> (bits - 1) ? v - (1 << bits) : v;\n"
        "};"
    ),
}
_INFIX = {"+": "+", "-": "-", "*": "*", "<": "<", "<=": "<=", "==": "===", "!=": "!==", "and": "&&", "or": "||", "/": "/"}
_CALLS = {"min": "Math.min", "max": "Math.max", "abs": "Math.abs", "floor": "Math.floor", "ceil": "Math.ceil", "int": "Math.trunc", "bool": "Boolean"}


class _Printer:
    def __init__(self) -> None:
        self.used: set[str] = set()
        self.weights: set[int] = set()
        self.inputs: set[int] = set()
        self.buffers: set[int] = set()

    # values ------------------------------------------------------

    def value(self, e: Any) -> str:
        """JavaScript of a host expression (:mod:`luthier.codegen.gpu.host_expr`)."""
        if isinstance(e, bool):
            return "true" if e else "false"
        if isinstance(e, float) and not math.isfinite(e):
            return "NaN" if math.isnan(e) else "Infinity" if e > 0 else "-Infinity"
        if isinstance(e, (int, float)):
            return f"({e!r})" if e < 0 else repr(e)
        if isinstance(e, str):
            return e
        op, *args = e
        if op == "dim":
            return f"g.dim({args[0]}, {args[1]})"
        if op == "peek":
            return f"g.peek({args[0]}, {self.value(args[1])})"
        if op == "mirror":
            return f"m{args[0]}[{self.value(args[1])}]"
        if op == "read":
            return f'(await g.read({self.memory(args[0])}, {self.value(args[1])}, "{args[2]}"))'
        if op == "wrap":
            self.used.add("wrap")
            return f"wrap({self.value(args[0])}, {args[1]}, {self.value(bool(args[2]))})"
        a = [self.value(x) for x in args]
        if op == "?":
            return f"({a[0]} ? {a[1]} : {a[2]})"
        if op == "not":
            return f"!{a[0]}"
        if op == "neg":
            return f"(-{a[0]})"
        if op == "bits":
            return f"g.bits({a[0]})"
        if op in _INFIX:
            return f"({a[0]} {_INFIX[op]} {a[1]})"
        if op in _CALLS:
            return f"{_CALLS[op]}({', '.join(a)})"
        if op in ("//", "%"):
            name = "fdiv" if op == "//" else "mod"
            self.used.add(name)
            return f"{name}({a[0]}, {a[1]})"
        if op == "trunc/":
            return f"Math.trunc({a[0]} / {a[1]})"
        if op == "trunc%":
            return f"({a[0]} % {a[1]})"
        raise CompilationError(f"JavaScript has no host operator {op!r}")

    def memory(self, m: Sequence[Any]) -> str:
        kind, k = m
        {"in": self.inputs, "w": self.weights, "b": self.buffers}[kind].add(k)
        return {"in": "i", "w": "w", "b": "b"}[kind] + str(k)

    def array(self, es: Sequence[Any]) -> str:
        return f"[{', '.join(self.value(e) for e in es)}]"

    # statements --------------------------------------------------

    def block(self, stmts: Sequence[Any], depth: int) -> list[str]:
        out: list[str] = []
        pad = "  " * depth
        for op, *a in stmts:
            if op == "let":
                out.append(f"{pad}const {a[0]} = {self.value(a[1])};")
            elif op == "buffer":
                out.append(f"{pad}{self.memory(('b', a[0]))} = g.buffer({a[0]}, {self.value(a[1])});")
            elif op == "dispatch":
                p, bound, words, x, y, z = a[:6]
                places = ", ".join(f"[{self.memory(m)}, {self.value(o)}, {self.value(n)}]" for m, o, n in bound)
                grid = ", ".join(self.value(e) for e in (x, y, z))
                out.append(f"{pad}g.dispatch({p}, [{places}], {self.array(words)}, {grid});")
            elif op == "write":
                out.append(f'{pad}g.write({self.memory(a[0])}, {self.value(a[1])}, "{a[2]}", {self.array(a[3])});')
            elif op == "mirror":
                out.append(f"{pad}m{a[0]}[{self.value(a[1])}] = {self.value(a[2])};")
            elif op == "copy":
                out.append(f"{pad}g.copy({self.memory(a[0])}, {self.value(a[1])}, {self.memory(a[2])}, {self.value(a[3])}, {self.value(a[4])});")
            elif op == "check":
                out.append(f"{pad}g.check({self.value(a[0])}, {self.value(a[1])}, {json.dumps(a[2])});")
            elif op == "rounds":
                out.append(f"{pad}g.rounds({self.value(a[0])}, {json.dumps(a[1])});")
            elif op == "if":
                out += [f"{pad}if ({self.value(a[0])}) {{", *self.block(a[1], depth + 1)]
                if a[2]:
                    out += [f"{pad}}} else {{", *self.block(a[2], depth + 1)]
                out.append(f"{pad}}}")
            elif op == "while":
                out += [f"{pad}while ({self.value(a[0])}) {{", f"{pad}  await g.round();", *self.block(a[1], depth + 1), f"{pad}}}"]
            elif op == "output":
                out.append(f"{pad}g.output({a[0]}, {self.memory(a[1])}, {self.value(a[2])}, {self.array(a[3])});")
            else:
                raise CompilationError(f"JavaScript has no host statement {op!r}")
        return out


def print_host_js(host: Mapping[str, Any]) -> str:
    """``program.js`` of ``host`` (``pipelines``, ``features``, ``weights``, ``narrow``, ``within``, ``fixed``, ``mirrors``, ``body``).

    Raises CompilationError for a statement or operator that it does not know."""
    p = _Printer()
    body = p.block(host["body"], 1)
    names = [f"const {x}{k} = g.{f}({k});" for x, f, ks in (("i", "input", p.inputs), ("w", "weights", p.weights)) for k in sorted(ks)]
    if p.buffers:
        names.append(f"let {', '.join(f'b{k}' for k in sorted(p.buffers))};")
    names += [f"const m{k} = [];" for k in range(host["mirrors"])]
    within = [f"[{j}, {p.array(low)}, {p.array(high)}, {json.dumps(what)}]" for j, low, high, what in host.get("within", ())]
    needs = host.get("needs", {"features": [], "limits": {}})
    return "\n".join([
        "// Generated. What the model does with the GPU, for the engine beside it.",
        "export const pipelines = [",
        *(f"  {json.dumps(e)}," for e in host["pipelines"]),
        "];",
        f"export const features = {json.dumps(host['features'])};",
        f"export const weights = {json.dumps(host['weights'])};",
        f"export const needs = {json.dumps(needs)};",
        f"export const narrow = {json.dumps(host['narrow'])};",
        f"export const fixed = {json.dumps(bool(host['fixed']))};",
        f"export const loops = {json.dumps({'probe': LOOP_PROBE, 'answer': LOOP_ANSWER} if any('g.rounds(' in line for line in body) else None)};",
        f"export const within = (g) => [{', '.join(within)}];",
        *(_HELPERS[name] for name in sorted(p.used)),
        "export async function main(g) {",
        *(f"  {line}" for line in names),
        *body,
        "}",
        "",
    ])  # fmt: skip
