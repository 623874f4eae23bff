"""From a Program to a WasmModule."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np

from luthier import settings
from luthier.backends.cpu import manifest
from luthier.backends.native import aligned
from luthier.backends.wasm_module import WasmModule
from luthier.codegen.gpu.host_expr import check_extents
from luthier.codegen.targets.target import Target
from luthier.codegen.targets.wasm import BASELINE, CAPS
from luthier.codegen.wasm.encoder import Function, Module
from luthier.codegen.wasm.main import Binary, ProgramPrinter
from luthier.debug.collection import collection_paused
from luthier.errors import LuthierError
from luthier.ir.loop import Call, walk_stmts
from luthier.ir.program import Program
from luthier.schedules.select import Record

__all__ = ["build_module", "probes"]


def build_module(
    program: Program, target: Target, threads: int | None = None, record: Record | None = None
) -> WasmModule:
    """Prints the variant that the target names; the others are printed when they are asked for.

    ``record``: variants with and without relaxed SIMD like different register tiles, and this makes the others. Kernels whose weights
    or temporaries that would change are the same in all variants.
    Raises CompilationError naming the nodes of the kernel at fault, TargetError."""
    variant = target.name.partition(":")[2] or "relaxed"
    check_extents(program)
    try:
        printer = ProgramPrinter(program)
        first = _print(printer, variant)
    except LuthierError as error:  # printers know kernels; a user knows nodes
        raise error.at(node=_nodes_of(program, error.op or "")) from None
    w = printer.layout.weights
    weights = aligned(w.size)
    for name, offset in w.offsets.items():
        a = w.arrays[name]
        weights[offset : offset + a.size] = a
    m = manifest(program, target, list(first.calls), w.size, w.offsets)
    m["wasm"] = {**printer.describe(), "names": first.names, "probes": probes()}
    _dump(program, printer)
    printers = {"relaxed" in variant: printer}

    def other(v: str) -> bytes:
        relaxed = "relaxed" in v
        if relaxed not in printers:
            printers[relaxed] = printer
            if record is not None:
                with collection_paused():
                    second = ProgramPrinter(replace(program, kernels=record.retile(program.kernels, CAPS if relaxed else BASELINE)))
                    if _fits(second, printer, v, first.names):
                        printers[relaxed] = second
        return _print(printers[relaxed], v).code

    return WasmModule(m, {variant: first.code}, weights, threads, other)


def _fits(a: ProgramPrinter, b: ProgramPrinter, variant: str, names: list[str]) -> bool:
    """Whether two programs may share the manifest and the weights of one."""
    v, w = a.layout.weights, b.layout.weights
    if a.describe() != b.describe() or v.offsets != w.offsets or a.steps.calls != b.steps.calls:
        return False
    if not all(_equal(x, w.arrays[n]) for n, x in v.arrays.items()):
        return False
    return _print(a, variant).names == names


def _equal(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> bool:
    """Of flat arrays of bytes: mostly they are the same memory."""
    return x.size == y.size and (x.ctypes.data == y.ctypes.data or np.array_equal(x, y))


def _print(printer: ProgramPrinter, variant: str) -> Binary:
    return printer.print("relaxed" in variant, "threads" in variant, "profile" in variant)


def _nodes_of(program: Program, kernel: str) -> str | None:
    """The graph nodes that a kernel computes."""
    sites = [s for s in walk_stmts(program.body) if isinstance(s, Call) and s.callee in program.kernels]
    return next((", ".join(program.nodes.get(k, ())) or None for k, s in enumerate(sites) if s.callee == kernel), None)


def _dump(program: Program, printer: ProgramPrinter) -> None:
    """With LUTHIER_DUMP: the kernels as they are printed."""
    if settings.dump.get() is not None:
        for name, f in printer.kernels.items():
            settings.write_dump(f"wasm-{name}.txt", str(f))


def probes() -> dict[str, str]:
    """Tiny modules in base64, valid where an engine has what a variant needs; ``dot`` also exports ``check() -> i32``, 1 where relaxed
    dot products of 8-bit integers are right (baseline compilers had them wrong on some processors)."""

    def module(code: bytes, shared: bool, name: str = "f", results: tuple[str, ...] = ()) -> str:
        m = Module([Function(name, [], results, [], code)], pages=(1, 1 if shared else None), shared=shared)
        return base64.b64encode(m.encode()).decode()

    from luthier.codegen.wasm.encoder import Code

    simd, relaxed, threads = Code(), Code(), Code()
    simd.v128(bytes(16))
    simd.op("drop")
    for _ in range(3):
        relaxed.v128(bytes(16))
    relaxed.op("f32x4.relaxed_madd")
    relaxed.op("drop")
    threads.const("i32", 0)
    threads.mem("i32.atomic.load", 0, 2)
    threads.op("drop")
    a = np.array([-128, 127, -1, 5, -128, -128, -128, -128, 127, 127, 127, 127, 0, -3, 64, -77], np.int8)
    b = np.array([127, 127, 1, 0, 127, 127, 127, 127, 127, 127, 127, 127, 9, 100, 33, 2], np.int8)
    c = np.array([1, -2, 3, -4], np.int32)
    dot = Code()
    for x in (a, b, c):
        dot.v128(x.tobytes())
    dot.op("i32x4.relaxed_dot_i8x16_i7x16_add_s")
    dot.v128(((a.astype(np.int32) * b).reshape(4, 4).sum(1) + c).astype(np.int32).tobytes())
    dot.op("i32x4.eq")
    dot.op("i32x4.all_true")
    return {"dot": module(bytes(dot.b), False, "check", ("i32",)), "simd": module(bytes(simd.b), False), "relaxed": module(bytes(relaxed.b), False), "threads": module(bytes(threads.b), True)}
