"""A graph to a Module: all of a compilation but the import and the wrapping of errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from luthier.debug.collection import collection_paused

if TYPE_CHECKING:
    from luthier.codegen.targets.target import Target
    from luthier.ir.graph import Graph
    from luthier.module import Module


def build_graph(graph: Callable[[], Graph], target: Target, threads: int | None = None, checked: bool = False, tune: object = False) -> Module:
    """All of a compilation but the errors' wrapping: ``graph`` imports, ``checked`` asks for bounds checks, ``tune`` for measurements (a time
    such as ``"30s"``, True, or a :class:`luthier.tuner.tune.Tuning`)."""
    from luthier.pipeline import compile_program
    from luthier.schedules.select import Record
    from luthier.targets import builder

    make = builder(target.kind)
    module: Module
    with ExitStack() as stack:
        choose = None
        if tune and (not getattr(make, "MEASURES", False) or target.missing_here()):
            warnings.warn(f"kernels for {target.name} cannot be measured on this machine: templates are taken in their default order", stacklevel=3)
        elif tune:
            from luthier.tuner.choose import Chooser

            choose = stack.enter_context(Chooser(target, threads=threads))
            if not checked:
                from luthier.tuned import build_tuned

                return build_tuned(graph, target, threads, choose, tune)
        stack.enter_context(collection_paused())
        record = Record(choose) if choose is not None or getattr(make, "RETILES", False) else None
        if hasattr(make, "Ahead") and not checked:
            with make.Ahead(target) as ahead:
                module = make.build_module(compile_program(graph(), target.caps, ahead.kernel, record), target, threads, ahead)
            return module
        program = compile_program(graph(), target.caps, record=record)
        program.checked = checked
        module = make.build_module(program, target, threads, **({"record": record} if getattr(make, "RETILES", False) else {}))
    return module


def compile_graph(graph: Graph, target: str = "cpu", threads: int | None = None, tune: object = False) -> Module:
    """A graph to a module, as :func:`luthier.compile` does for a model. Raises its errors."""
    from luthier.codegen.targets.target import parse_target
    from luthier.passes.graph.copy_graph import copy_graph

    return build_graph((lambda: copy_graph(graph)[0]) if tune else lambda: graph, parse_target(target), threads, tune=tune)
