"""``luthier.compile``: a model in, a Module out."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from luthier.at_fork import whole
from luthier.build_graph import build_graph

if TYPE_CHECKING:
    from luthier.ir.graph import Graph
    from luthier.module import Module
    from luthier.torch_module import TorchModule
    from luthier.tuner.tune import Tuning


@overload
def compile(
    model: str | os.PathLike[str] | Graph, target: str = ..., shapes: Mapping[str, Sequence[Any]] | None = ..., threads: int | None = ...,
    debug: str | None = ..., tune: bool | str | float | Tuning = ..., overridable: bool | Sequence[str] | None = ...,
) -> Module: ...


@overload
def compile(
    model: Any, target: str = ..., shapes: Mapping[str, Sequence[Any]] | None = ..., threads: int | None = ..., debug: str | None = ...,
    tune: bool | str | float | Tuning = ..., overridable: bool | Sequence[str] | None = ..., *, args: Sequence[Any] | None = ..., kwargs: Mapping[str, Any] | None = ...,
    dynamic_shapes: Any = ...,
) -> Module | TorchModule: ...


def compile(
    model: Any, target: str = "cpu", shapes: Mapping[str, Sequence[Any]] | None = None, threads: int | None = None,
    debug: str | None = None, tune: bool | str | float | Tuning = False, overridable: bool | Sequence[str] | None = None, *, args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None,
) -> Module | TorchModule:
    """Compile ``model`` (path of an ONNX file or an ``onnx.ModelProto``; path of a GGUF file, see :mod:`luthier.llm.model`; a Graph,
    such as ``luthier.quantize`` gives; a ``torch.export.ExportedProgram``, or an ``nn.Module``, which is exported for the example arguments
    ``args`` and ``kwargs`` with ``dynamic_shapes`` as :func:`torch.export.export` takes them) for ``target``.

    A torch program gives a :class:`luthier.torch_module.TorchModule`, which is called as the module was.

    ``target``: ``cpu`` (this machine), ``wasm`` or a name such as ``cpu:x86-64-v3``. ``shapes``: {input name: extents} pins symbolic
    dimensions; None or -1 leaves one open. ``threads``: worker threads of the module (default: the cores this process may use).
    ``debug="bounds"``: every access of every kernel is checked, and a call raises KernelError naming kernel, buffer, index, extent
    and node instead of touching other memory (slower; also the setting LUTHIER_DEBUG=bounds).
    ``tune``: a time such as ``"30s"`` (True: ten seconds), or a :class:`luthier.tuner.tune.Tuning`: kernels are built in several ways and measured on this machine,
    once (``docs/tuning.md``); without it, and for a target whose code does not run here (a warning says so), each has its default.
    ``overridable``: initializers that the model lists among its inputs (from IR version 4) are defaults, and a call may replace those named
    here; True all, False none. Without it all, when together they are no more than 64 KiB: larger ones are weights that an exporter listed.
    Raises InvalidModel, UnsupportedOperator, ShapeError, TypeMismatch, TargetError or SettingError (all LuthierError). Any other
    error is a defect and names a folder, the repro bundle, from which ``luthier reduce`` makes a small case."""
    with whole:
        from luthier import settings
        from luthier.codegen.targets.target import parse_target
        from luthier.errors import InputError, TargetError
        from luthier.importers.onnx.importer import import_onnx
        from luthier.ir.op import lookup
        from luthier.targets import builder

        lookup("")  # imports every operator
        builder(parse_target(target).kind)
        for name in ("luthier.pipeline", "luthier.schedules.select", "luthier.passes.graph.copy_graph", "numpy.random"):  # what would be imported on the way
            importlib.import_module(name)

    if isinstance(model, (str, os.PathLike)) and os.fspath(model).endswith(".gguf"):
        from luthier.llm.model import compile_gguf

        return compile_gguf(os.fspath(model), target, shapes, threads, debug, tune)
    exported = None
    if "torch" in sys.modules and hasattr(model, "state_dict"):
        from luthier.importers.torch.exported import export

        if shapes is not None or overridable is not None:
            raise InputError("shapes and overridable are for models in ONNX", hint="a torch program's shapes are those of its export: dynamic_shapes")
        exported = export(model, args, kwargs, dynamic_shapes)
        model = exported.program.graph
    elif args is not None or kwargs is not None or dynamic_shapes is not None:
        raise InputError("args, kwargs and dynamic_shapes are for torch programs", hint="pin dimensions of other models with shapes")
    chosen = parse_target(target)
    make = builder(chosen.kind)
    checked = "bounds" in (settings.debug.get() if debug is None else settings.debug.read(debug))
    if checked and not getattr(make, "CHECKS_BOUNDS", False):
        raise TargetError(f"modules for {target} have no bounds checks", hint="compile for cpu with debug='bounds'")

    def imported() -> Graph:
        from luthier.ir.graph import Graph
        from luthier.passes.graph.copy_graph import copy_graph

        return copy_graph(model)[0] if isinstance(model, Graph) else import_onnx(model, shapes, overridable=overridable)

    def build() -> Module:
        return build_graph(imported, chosen, threads, checked, tune)

    try:
        module = build()
    except Exception as error:
        from luthier.debug.repro import USER_ERRORS, record

        if not isinstance(error, USER_ERRORS):  # a defect of this package
            record(error, model, {"target": target, "shapes": shapes, "threads": threads, "debug": debug}, build)
        raise
    if exported is None:
        return module
    from luthier.torch_module import TorchModule

    return TorchModule(module, exported)
