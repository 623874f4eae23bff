"""``luthier.compile``: a model in, a Module out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.module import Module


def compile(
    model: Any, target: str = "cpu", shapes: Mapping[str, Sequence[Any]] | None = None, threads: int | None = None,
) -> Module:
    """Compile ``model`` (path of an ONNX file or an ``onnx.ModelProto``) for ``target``.

    ``target``: ``cpu`` (this machine), ``wasm`` or a name such as ``cpu:x86-64-v3``. ``shapes``: {input name: extents} pins symbolic
    dimensions; None or -1 leaves one open. ``threads``: worker threads of the module (default: the cores this process may use).
    Raises InvalidModel, UnsupportedOperator, ShapeError, TypeMismatch or TargetError (all LuthierError)."""
    from luthier.codegen.target import parse_target
    from luthier.importers.onnx import import_onnx
    from luthier.pipeline import compile_program
    from luthier.targets import builder

    chosen = parse_target(target)
    program = compile_program(import_onnx(model, shapes), chosen.caps)
    module: Module = builder(chosen.kind).build_module(program, chosen, threads)
    return module
