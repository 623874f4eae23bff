"""THE ordered lists of passes, from a graph to a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from luthier import settings
from luthier.debug.override import override_kernels, write_kernels
from luthier.ir.graph import Graph
from luthier.ir.loop import Func
from luthier.ir.program import Program
from luthier.ir.verify_graph import verify_graph
from luthier.passes.graph.attend_cache import attend_cache
from luthier.passes.graph.canonicalize import canonicalize
from luthier.passes.graph.choose_layout import choose_layout
from luthier.passes.graph.densify_sparse import densify_sparse
from luthier.passes.graph.eliminate_dead import eliminate_dead
from luthier.passes.graph.eliminate_transposes import eliminate_transposes
from luthier.passes.graph.fold_batch_norm import fold_batch_norm
from luthier.passes.graph.fold_constants import fold_constants
from luthier.passes.graph.fold_dequantize import fold_dequantize
from luthier.passes.graph.keep_blocked_weights import keep_blocked_weights
from luthier.passes.graph.legalize_operators import legalize_operators
from luthier.passes.graph.materialize_contents import materialize_contents
from luthier.passes.graph.merge_common import merge_common
from luthier.passes.graph.merge_siblings import merge_siblings
from luthier.passes.graph.quantize_integer import quantize_integer
from luthier.passes.graph.recognise_activations import recognise_activations
from luthier.passes.graph.recognise_attention import recognise_attention
from luthier.passes.graph.recognise_norms import recognise_norms
from luthier.passes.graph.recognise_rotary import recognise_rotary
from luthier.passes.graph.recognise_softmax import recognise_softmax
from luthier.passes.graph.split_transposed_conv import split_transposed_conv
from luthier.passes.program.check_indices import check_indices
from luthier.passes.program.poison_memory import poison_memory
from luthier.schedules.program.build_program import build_program

if TYPE_CHECKING:
    from luthier.schedules.base.capabilities import Capabilities
    from luthier.schedules.select import Record

GraphPass = Callable[[Graph], bool]

GRAPH_PASSES: tuple[GraphPass, ...] = (
    legalize_operators,
    materialize_contents,  # first: no tensor is kept alive for its shape
    eliminate_dead,
    canonicalize,
    merge_common,
    eliminate_dead,
    recognise_activations,
    recognise_norms,
    recognise_softmax,
    recognise_rotary,
    recognise_attention,
    attend_cache,
    fold_batch_norm,
    split_transposed_conv,
    eliminate_dead,
    densify_sparse,
    keep_blocked_weights,
    quantize_integer,
    fold_dequantize,
    choose_layout,
    eliminate_transposes,
    canonicalize,  # transposes that only move unit dimensions become views
    merge_common,
    fold_constants,
    eliminate_dead,
)  # fmt: skip


TARGET_PASSES: tuple[tuple[str, GraphPass], ...] = (("merge_siblings", merge_siblings),)  # behind a flag of the target's Capabilities


class Dump:
    """Writes the IR after each pass that changed it into the folder named by LUTHIER_DUMP."""

    def __init__(self) -> None:
        self.on = settings.dump.get() is not None
        self.count = 0

    def write(self, name: str, text: Callable[[], str]) -> None:
        if self.on:
            settings.write_dump(f"{self.count:03d}-{name}.txt", text())
            self.count += 1


def run_graph_passes(graph: Graph, dump: Dump | None = None, passes: tuple[GraphPass, ...] = GRAPH_PASSES) -> Graph:
    """Each pass once, in order, in place."""
    dump = dump or Dump()
    dump.write("import", lambda: str(graph))
    debug = settings.debug.get()
    for p in passes:
        if p(graph):
            dump.write(getattr(p, "__name__", "pass"), lambda: str(graph))
            if debug:
                verify_graph(graph)
    return graph


def lower_graph(
    graph: Graph, caps: Capabilities, dump: Dump | None = None, on_kernel: Callable[[Func], None] | None = None, record: Record | None = None,
) -> Program:
    """Groups, schedules and kernels for an already optimised graph. ``on_kernel`` is called with every kernel when it is made;
    ``record``: notes what register tiles decide."""
    from luthier.schedules.select import build, build_kernel

    dump = dump or Dump()
    for flag, p in TARGET_PASSES:
        if getattr(caps, flag) and p(graph):
            dump.write(flag, lambda: str(graph))
    if settings.check_indices.get() and check_indices(graph, before=caps.gpu, index_bits=caps.index_bits):
        dump.write("check_indices", lambda: str(graph))
    program = build_program(graph, lambda c, consts: build(c, caps, consts, record), lambda f: build_kernel(f, caps), on_kernel)
    if "poison" in settings.debug.get():
        program = poison_memory(program, lambda c: build(c, caps).funcs)
    override_kernels(program)
    dump.write("program", lambda: str(program))
    if dump.on:
        write_kernels(program)
    return program


def compile_program(
    graph: Graph, caps: Capabilities, on_kernel: Callable[[Func], None] | None = None, record: Record | None = None,
) -> Program:
    """All of it: graph passes, then lowering."""
    dump = Dump()
    return lower_graph(run_graph_passes(graph, dump), caps, dump, on_kernel, record)
