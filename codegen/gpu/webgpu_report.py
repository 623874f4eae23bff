"""What a compiled WebGPU program does, as text: every dispatch, every crossing between host and device, and the totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.codegen.gpu.webgpu import GpuProgram


def totals(g: GpuProgram) -> dict[str, int]:
    """``dispatches`` in the text of main (a loop's count once), ``pipelines``, ``shaders``, ``wgsl_bytes``, ``weights_bytes``,
    ``crossings`` in the text of main, ``bytes_bound``: bytes of all bindings whose size is static."""
    dispatches = [s for s in _walk(g.body) if s[0] == "dispatch"]
    bound = [n for s in dispatches for _, _, n in s[2] if isinstance(n, int)]
    return {
        "dispatches": len(dispatches), "pipelines": len(g.pipelines), "shaders": len(g.shaders), "wgsl_bytes": sum(map(len, g.shaders)),
        "weights_bytes": int(g.blob.size), "crossings": len(g.crossings), "bytes_bound": sum(bound),
    }  # fmt: skip


def report(g: GpuProgram, nodes: Mapping[int, Sequence[str]]) -> str:
    """``nodes``: {number of a dispatch: names of the graph nodes it computes}."""
    lines = [f"{k}: {v}" for k, v in totals(g).items()]
    lines.append("one submit a call" if g.fixed or not g.crossings else "a submit before every crossing, one at the end")
    lines += ["", "crossings (the host waits for the device):", *(f"  {c}" for c in g.crossings or ["none"]), "", "main:"]
    _print(g, g.body, nodes, lines, 1)
    return "\n".join(lines)


def _walk(body: Sequence[Any]) -> list[Any]:
    out = []
    for s in body:
        out.append(s)
        if s[0] == "if":
            out += _walk(s[2]) + _walk(s[3])
        elif s[0] == "while":
            out += _walk(s[2])
    return out


def _text(e: Any) -> str:
    if not isinstance(e, list):
        return str(e)
    if e[0] == "read":
        return f"READ {_place(e[1])}+{_text(e[2])} {e[3]}"
    if len(e) == 3 and not e[0].isalpha():
        return f"({_text(e[1])} {e[0]} {_text(e[2])})"
    return f"{e[0]}({', '.join(map(_text, e[1:]))})"


def _place(m: Sequence[Any]) -> str:
    return f"{ {'b': 'buffer', 'w': 'weights', 'in': 'input'}[m[0]]}{m[1]}"


def _print(g: GpuProgram, body: Sequence[Any], nodes: Mapping[int, Sequence[str]], lines: list[str], depth: int) -> None:
    pad = "  " * depth
    for s in body:
        op = s[0]
        if op == "dispatch":
            _, p, bound, words, x, y, z, call = s
            places = ", ".join(f"{_place(m)}+{_text(o)}" if o else _place(m) for m, o, _ in bound)
            shader = " else ".join(f"{s} with {', '.join(g.features[s])}" if g.features[s] else str(s) for s in g.pipelines[p]["shaders"])
            grid = "x".join(_text(e) for e in (x, y, z))
            lines.append(f"{pad}dispatch {g.calls[call]} (shader {shader}) grid {grid} on {places}; {', '.join(nodes.get(call, ()))}")
        elif op == "if":
            lines.append(f"{pad}if {_text(s[1])}")
            _print(g, s[2], nodes, lines, depth + 1)
            if s[3]:
                lines.append(f"{pad}else")
                _print(g, s[3], nodes, lines, depth + 1)
        elif op == "while":
            lines.append(f"{pad}while {_text(s[1])}")
            _print(g, s[2], nodes, lines, depth + 1)
        elif op == "write":
            lines.append(f"{pad}write {_place(s[1])}+{_text(s[2])} {s[3]} {', '.join(_text(v) for v in s[4])} (host to device)")
        elif op == "copy":
            lines.append(f"{pad}copy {_place(s[1])} {_text(s[2])}")
        elif op == "output":
            lines.append(f"{pad}output {_place(s[2])} [{', '.join(map(_text, s[4]))}]")
        else:
            lines.append(f"{pad}{op} {' '.join(_text(e) for e in s[1:])}")
