"""From a Program to a Module: texts, objects (cached), one library in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier import settings
from luthier.backends.native import ABI_VERSION, EXPORTS, aligned
from luthier.cache import ObjectCache
from luthier.codegen.llvm.backend import Library, Objects, assembly, compile_texts, kernel_text
from luthier.codegen.llvm.main import DTYPE_CODES, print_main, runtime_text
from luthier.codegen.llvm.printer import legalize_llvm
from luthier.codegen.program.sharing import resolve
from luthier.codegen.program.steps import DEFAULT
from luthier.codegen.targets.target import Target, parse_target
from luthier.errors import LuthierError
from luthier.ir.expr import Expr, const, free_vars, substitute, tree_size, walk
from luthier.ir.loop import Alloc, Block, Buffer, Call, For, Func, If, Let, Stmt, Store, While, exprs_of, walk_stmts
from luthier.ir.program import Program
from luthier.module import Module
from luthier.passes.loop.check_bounds import check_bounds
from luthier.passes.program.plan_memory import roots

__all__ = ["build_module"]


class Ahead:
    """Machine code for kernels while others are still being scheduled: give :meth:`kernel` to ``build_program`` and the whole to
    :func:`build_module`. Use as a context manager."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.objects = Objects(target, ObjectCache())
        self.texts: dict[int, tuple[Func, str, str]] = {}

    def __enter__(self) -> Ahead:
        self.objects.add(runtime_text(self.target))
        return self

    def __exit__(self, *_: object) -> None:
        self.objects.__exit__()

    def kernel(self, f: Func) -> None:
        """Starts on ``f``; what is wrong with it is said when the program is built."""
        with contextlib.suppress(LuthierError):
            self.objects.add(self.text(f)[1])

    def text(self, f: Func) -> tuple[str, str]:
        """(symbol, LLVM module) of a kernel whose arguments do not share memory, printed once."""
        known = self.texts.get(id(f.body))
        if known is None or known[0].params != f.params:
            known = self.texts[id(f.body)] = (f, *kernel_text(legalize_llvm(f), self.target))
        return known[1:]


def build_module(program: Program, target: Target | str = "cpu", threads: int | None = None, ahead: Ahead | None = None) -> Module:
    """Compiles what the cache does not have and links in memory; for another machine's target the module can only be saved.

    ``ahead``: what has been compiled already."""
    chosen = parse_target(target) if isinstance(target, str) else target
    if ahead is None:
        with Ahead(chosen) as ahead:
            return build_module(program, chosen, threads, ahead)
    if program.checked:
        program = replace(program, kernels={name: check_bounds(legalize_llvm(f)) for name, f in program.kernels.items()})
    symbols: dict[str, str] = {}
    texts: dict[str, str] = {}
    aliased = aliased_kernels(program)
    for name, f in program.kernels.items():
        try:
            symbols[name], text = kernel_text(legalize_llvm(f), chosen, False) if name in aliased else ahead.text(f)
        except LuthierError as error:  # backends know kernels; a user knows nodes
            raise error.at(op=name).at(node=_nodes_of(program, name)) from None
        texts[symbols[name]] = text
    main = print_main(program, chosen, symbols)
    _dump(symbols, texts, main.text, chosen)
    objects = ahead.objects.get([main.runtime, *texts.values()])
    objects += compile_texts([main.text], chosen, ahead.objects.cache, opt=0)  # runs once a call: the quickest code generation is enough
    weights = aligned(main.weights_bytes)
    for name, offset in main.weights:
        a = main.arrays[name]
        weights[offset : offset + a.size] = a
    native = None if chosen.missing_here() else Library(objects, EXPORTS)
    return Module(manifest(program, chosen, main.calls, main.weights_bytes, dict(main.weights)), native, weights, threads, objects)


def aliased_kernels(program: Program) -> set[str]:
    """Kernels that some call gives memory which it writes through one argument and touches through another (views, state)."""
    root_of = roots(program)
    out: set[str] = set()
    written = {n: {s.buf.name for s in walk_stmts(f.body) if isinstance(s, Store)} for n, f in program.kernels.items()}
    for s in walk_stmts(program.body):
        if isinstance(s, Call) and s.callee in program.kernels:
            seen: dict[str, bool] = {}
            for p, a in zip(program.kernels[s.callee].params, s.args, strict=True):
                if isinstance(p, Buffer):
                    b = a if isinstance(a, Buffer) else a[0]
                    root, writes = root_of.get(b.name, b.name), p.name in written[s.callee]
                    if root in seen and (writes or seen[root]):
                        out.add(s.callee)
                    seen[root] = seen.get(root, False) or writes
    return out


def _dump(symbols: Mapping[str, str], texts: Mapping[str, str], main: str, target: Target) -> None:
    """With LUTHIER_DUMP: the LLVM text of the program and of every kernel, and the kernels' assembly."""
    if settings.dump.get() is None:
        return
    names = {symbol: name for name, symbol in symbols.items()}
    settings.write_dump("llvm-main.txt", main)
    for symbol, text in texts.items():
        settings.write_dump(f"llvm-{names[symbol]}.txt", text)
        settings.write_dump(f"machine-{names[symbol]}.txt", assembly(text, target))


def _nodes_of(program: Program, kernel: str) -> str | None:
    """The graph nodes that a kernel computes."""
    sites = [s for s in walk_stmts(program.body) if isinstance(s, Call) and s.callee in program.kernels]
    return next((", ".join(program.nodes.get(k, ())) or None for k, s in enumerate(sites) if s.callee == kernel), None)


def manifest(program: Program, target: Target, calls: list[str], weights_bytes: int, offsets: Mapping[str, int]) -> dict[str, Any]:
    """Everything about a module but its code and weights, as JSON data. ``offsets``: where the weights hold the defaults of inputs."""
    flops = {n: kernel_flops(f) for n, f in program.kernels.items()}
    sites = [s for s in walk_stmts(program.body) if isinstance(s, Call) and s.callee in program.kernels]
    rows = []
    for k, (callee, s) in enumerate(zip(calls, sites, strict=True)):
        f = program.kernels[callee]
        env = {p: a for p, a in zip(f.params, s.args, strict=True) if isinstance(p, Expr) and isinstance(a, Expr)}
        size: Expr = const(0)
        for p in f.buffers:
            size = size + p.size() * max(1, p.dtype.bits * p.dtype.lanes // 8)
        rows.append({
            "kernel": callee, "nodes": list(program.nodes.get(k, ())), "flops": formula(substitute(flops[callee], env)),
            "bytes": formula(substitute(size, env)),
        })  # fmt: skip
    return {
        "format": 1, "abi": ABI_VERSION, "name": program.name,
        "target": {"kind": target.kind, "name": target.name, "triple": target.triple, "cpu": target.cpu, "features": sorted(target.flags)},
        "inputs": [_io(b, b.name) | _default(program, b, offsets) for b in program.inputs],
        "outputs": [_io(b, program.output_names.get(b.name, b.name)) for b in program.outputs],
        "dims": {v.attr[0]: [i, axis] for v, (i, axis) in program.dims.items()},
        "kernels": sorted(program.kernels), "calls": rows, "weights_bytes": weights_bytes, "checked": program.checked,
        **_structured(program),
    }  # fmt: skip


def _structured(program: Program) -> dict[str, Any]:
    """What callers give and get as something else than one tensor."""
    kinds = (("inputs", program.structured_inputs), ("outputs", program.structured_outputs))
    if not any(d for _, d in kinds):
        return {}
    return {"structured": {k: {n: {"ports": list(s.ports), "tensor": s.tensor} for n, s in d.items()} for k, d in kinds}}


def _io(b: Buffer, name: str) -> dict[str, Any]:
    shape = [int(e.attr) if e.op == "const" else e.attr[0] if e.op == "var" else repr(e) for e in b.shape]
    return {"name": name, "code": DTYPE_CODES[b.dtype.name], "shape": shape}


def _default(program: Program, b: Buffer, offsets: Mapping[str, int]) -> dict[str, Any]:
    """What an input is that a call leaves out."""
    if b.name not in program.defaults:
        return {}
    a = program.defaults[b.name]
    if a is None:
        return {"default": "random"}
    return {"default": {"offset": offsets[DEFAULT + b.name], "bytes": -(-a.size * b.dtype.bits // 8), "shape": list(a.shape)}}


MAX_FORMULA = 100_000  # nodes
_OPS = {"add": "+", "sub": "-", "mul": "*", "min": "min", "max": "max", "floordiv": "//", "mod": "%"}


def formula(e: Expr) -> Any:
    """An index expression as JSON: a number, the name of a dim, or [operator, left, right]; 0 for anything else, or too long to write out."""
    if tree_size(e) > MAX_FORMULA:
        return 0
    if e.op == "const":
        return int(e.attr)
    if e.op == "var":
        return e.attr[0]
    if e.op in _OPS:
        return [_OPS[e.op], formula(e.args[0]), formula(e.args[1])]
    return 0


_FLOAT_OPS = frozenset("add sub mul div min max sqrt neg abs".split())


def kernel_flops(f: Func) -> Expr:
    """Floating-point operations of one run over the kernel's scalars; loops count with their extent at the first outer round."""

    memo: dict[Expr, int] = {}
    env: dict[Expr, Expr] = {}
    known = set(f.scalars)

    def flops(e: Expr) -> int:
        n = memo.get(e)
        if n is None:
            n = e.dtype.lanes if e.op in _FLOAT_OPS and e.dtype.is_float else 0
            for a in e.args:
                n += flops(a)
            memo[e] = n
        return n

    def go(s: Stmt) -> Expr:
        own = sum([flops(e) for e in exprs_of(s)])
        if isinstance(s, Let) and s.var.dtype.is_index:
            env[s.var] = s.value
        n: Expr = const(own)
        if isinstance(s, Block):
            for c in s.stmts:
                if isinstance(c, Store):
                    own += sum([flops(e) for e in exprs_of(c)])
                else:
                    n = n + go(c)
            n = n + own
        elif isinstance(s, For):
            lo = resolve(s.lo, env)
            count = resolve(s.hi, env) - lo
            env[s.var] = lo
            n = n + go(s.body) * (count if free_vars(count) <= known and _plain(count) else 0)
        elif isinstance(s, If):
            n = n + go(s.then)
            if s.orelse is not None:
                n = n + go(s.orelse)
        elif isinstance(s, (Alloc, While)):
            n = n + go(s.body)
        return n

    return go(f.body)


def _plain(e: Expr) -> bool:
    return all(x.op in _OPS or x.op in ("const", "var") for x in walk(e))
