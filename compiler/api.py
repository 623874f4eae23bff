"""``luthier.compile``: a model in, a Module out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.ir.graph import Graph
    from luthier.ir.program import Program
    from luthier.module import Module
    from luthier.schedules.capabilities import Capabilities
    from luthier.schedules.select import Earlier


def compile(
    model: Any, target: str = "cpu", shapes: Mapping[str, Sequence[Any]] | None = None, threads: int | None = None,
    debug: str | None = None,
) -> Module:
    """Compile ``model`` (path of an ONNX file or an ``onnx.ModelProto``; path of a GGUF file, see :mod:`luthier.llm`) for ``target``.

    ``target``: ``cpu`` (this machine), ``wasm`` or a name such as ``cpu:x86-64-v3``. ``shapes``: {input name: extents} pins symbolic
    dimensions; None or -1 leaves one open. ``threads``: worker threads of the module (default: the cores this process may use).
    ``debug="bounds"``: every access of every kernel is checked, and a call raises KernelError naming kernel, buffer, index, extent
    and node instead of touching other memory (slower; also the setting LUTHIER_DEBUG=bounds).
    Raises InvalidModel, UnsupportedOperator, ShapeError, TypeMismatch, TargetError or SettingError (all LuthierError). Any other
    error is a defect and names a folder, the repro bundle, from which ``luthier reduce`` makes a small case."""
    from luthier import settings
    from luthier.codegen.target import parse_target
    from luthier.errors import TargetError
    from luthier.importers.onnx import import_onnx
    from luthier.pipeline import compile_program
    from luthier.targets import builder

    if str(model).endswith(".gguf"):
        from luthier.llm import compile_gguf

        return compile_gguf(model, target, shapes, threads, debug)
    chosen = parse_target(target)
    make = builder(chosen.kind)
    checked = "bounds" in (settings.debug.get() if debug is None else settings.debug.read(debug))
    if checked and not getattr(make, "CHECKS_BOUNDS", False):
        raise TargetError(f"modules for {target} have no bounds checks", hint="compile for cpu with debug='bounds'")
    def build() -> Module:
        with collection_paused():
            if checked or not hasattr(make, "Ahead"):
                graph = import_onnx(model, shapes)
                earlier = None
                if getattr(make, "RELOWERS", False):
                    from luthier.schedules.select import Earlier

                    earlier = Earlier()
                program = compile_program(graph, chosen.caps, earlier=earlier)
                program.checked = checked
                module: Module = make.build_module(program, chosen, threads, **({} if earlier is None else {"again": lambda caps: relower(graph, caps, earlier)}))
                return module
            with make.Ahead(chosen) as ahead:
                program = compile_program(import_onnx(model, shapes), chosen.caps, ahead.kernel)
                return make.build_module(program, chosen, threads, ahead)  # type: ignore[no-any-return]

    try:
        return build()
    except Exception as error:
        from luthier.repro import USER_ERRORS, record

        if not isinstance(error, USER_ERRORS):  # a defect of this package
            record(error, model, {"target": target, "shapes": shapes, "threads": threads, "debug": debug}, build)
        raise


def relower(graph: Graph, caps: Capabilities, earlier: Earlier) -> Program:
    """The program of an optimised graph for another number of registers."""
    from luthier.pipeline import lower_graph

    earlier.at = 0
    return lower_graph(graph, caps, earlier=earlier)


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection: expressions make no cycles, and looking for some costs a tenth of a compilation."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
