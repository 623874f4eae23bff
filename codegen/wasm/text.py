"""A small assembler for the model-independent part of a WebAssembly module (``codegen/runtime/wasm.txt``).

``func name param:type ... -> result | local:type ...`` up to ``end``; ``threads func``: only with shared memory. One instruction a
line, its operands as names: locals, globals, functions, labels (``block``, ``loop`` and ``if`` may have one), and numbers, which may
be written as a name of an address, with ``+n``. ``;`` begins a comment.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from functools import cache

from luthier.codegen.wasm.encoder import Code, Function
from luthier.ir.errors import CompilationError

GLOBALS = ("sp", "threads", "counted", "loops", "may_wait", "tid")  # all i32 and mutable


@cache
def source() -> tuple[tuple[str, bool, tuple[str, ...]], ...]:
    """The functions of the runtime: (name, whether it needs threads, its lines, the head first)."""
    text = importlib.resources.files("luthier.codegen.runtime").joinpath("wasm.txt").read_text(encoding="utf-8")
    out: list[tuple[str, bool, tuple[str, ...]]] = []
    lines: list[str] = []
    depth = 0
    for raw in text.splitlines():
        line = raw.split(";")[0].strip()
        if not line:
            continue
        lines.append(line)
        word = line.split()[0]
        if word in ("func", "threads", "block", "loop", "if"):
            depth += 1
        elif word == "end":
            depth -= 1
            if depth == 0:
                head = lines[0].split()
                out.append((head[head.index("func") + 1], head[0] == "threads", tuple(lines[:-1])))
                lines = []
    return tuple(out)


def assemble(lines: tuple[str, ...], functions: Mapping[str, int], addresses: Mapping[str, int]) -> Function:
    """One function; ``functions``: {name: index}; ``addresses``: values of the names in numbers. Raises CompilationError."""
    head = lines[0].split("|")
    words = head[0].split()
    name, rest = words[words.index("func") + 1], words[words.index("func") + 2 :]
    result = [rest[rest.index("->") + 1]] if "->" in rest else []
    params = [w.split(":") for w in (rest[: rest.index("->")] if result else rest)]
    own = [w.split(":") for w in head[1].split()] if len(head) > 1 else []
    places = {n: k for k, (n, _) in enumerate([*params, *own])}
    c, labels = Code(), [""]

    def number(text: str) -> int:
        base, _, more = text.partition("+")
        return (addresses[base] if base in addresses else int(base)) + int(more or 0)

    for line in lines[1:]:
        op, *args = line.split()
        try:
            if op in ("block", "loop", "if"):
                labels.append(args[0] if args else "")
                c.start(op)
            elif op == "end":
                labels.pop()
                c.op(op)
            elif op.startswith("local."):
                c.op(op, places[args[0]])
            elif op.startswith("global."):
                c.op(op, GLOBALS.index(args[0]))
            elif op == "call":
                c.op(op, functions[args[0]])
            elif op in ("br", "br_if"):
                c.op(op, len(labels) - 1 - labels.index(args[0]))
            elif op.endswith(".const"):
                c.const(op[:3], number(args[0]))
            elif op in ("memory.size", "memory.grow"):
                c.op(op, 0)
            elif args:
                bits = int(op[1:3]) if op[0] == "i" else 32
                if "load32" in op:
                    bits = 32
                c.mem(op, number(args[0]), bits.bit_length() - 4)
            else:
                c.op(op)
        except (KeyError, ValueError) as e:
            raise CompilationError(f"runtime function {name}: cannot assemble {line!r}: {e}") from e
    return Function(name, [t for _, t in params], result, [t for _, t in own], bytes(c.b))


def runtime_function(name: str) -> Function:
    """A function of the runtime that calls no other and uses no address. Raises CompilationError when there is none."""
    lines = next((text for n, _, text in source() if n == name), None)
    if lines is None:
        raise CompilationError(f"the runtime has no function {name}")
    return assemble(lines, {}, {})
