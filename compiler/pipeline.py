"""THE ordered lists of passes, from a graph to a program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from luthier import settings
from luthier.ir.graph import Graph
from luthier.ir.program import Program
from luthier.passes.build_program import build_program
from luthier.passes.eliminate_dead import eliminate_dead
from luthier.passes.fold_constants import fold_constants
from luthier.passes.materialize_contents import materialize_contents
from luthier.passes.merge_common import merge_common

if TYPE_CHECKING:
    from luthier.schedules.capabilities import Capabilities

GraphPass = Callable[[Graph], bool]

GRAPH_PASSES: tuple[GraphPass, ...] = (
    materialize_contents,
    eliminate_dead,
    merge_common,
    fold_constants,
    eliminate_dead,
)  # fmt: skip


class Dump:
    """Writes the IR after each pass that changed it into the folder named by LUTHIER_DUMP."""

    def __init__(self) -> None:
        self.folder: Path | None = settings.dump.get()
        self.count = 0
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, text: Callable[[], str]) -> None:
        if self.folder is not None:
            (self.folder / f"{self.count:03d}-{name}.txt").write_text(text(), encoding="utf-8")
            self.count += 1


def run_graph_passes(graph: Graph, dump: Dump | None = None, passes: tuple[GraphPass, ...] = GRAPH_PASSES) -> Graph:
    """Each pass once, in order, in place."""
    dump = dump or Dump()
    dump.write("import", lambda: str(graph))
    for p in passes:
        if p(graph):
            dump.write(getattr(p, "__name__", "pass"), lambda: str(graph))
    return graph


def lower_graph(graph: Graph, caps: Capabilities, dump: Dump | None = None) -> Program:
    """Groups, schedules and kernels for an already optimised graph."""
    from luthier.schedules.select import build, build_kernel

    program = build_program(graph, lambda c, consts: build(c, caps, consts), lambda f: build_kernel(f, caps))
    (dump or Dump()).write("program", lambda: str(program))
    return program


def compile_program(graph: Graph, caps: Capabilities) -> Program:
    """All of it: graph passes, then lowering."""
    dump = Dump()
    return lower_graph(run_graph_passes(graph, dump), caps, dump)
