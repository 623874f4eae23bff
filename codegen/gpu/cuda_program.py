"""A Program for CUDA: C++ for its kernels, and its main as plain data (:mod:`luthier.codegen.gpu.host_program`).

An argument whose place in its buffer is not a multiple of 16 bytes is given as its memory, and its kernel gets the offset as a
scalar, so that whole vectors stay aligned. The size of what a dispatch is given counts elements of the kernel's parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from luthier.codegen.gpu.cuda import CudaKernel, legalize_cuda, print_cuda
from luthier.codegen.gpu.host_program import Argument, HostBuilder, HostProgram, multiple, start_of
from luthier.codegen.targets.cuda import ALIGN
from luthier.ir.expr import Expr, const, free_vars, substitute
from luthier.ir.loop import Buffer, Call
from luthier.ir.program import Program
from luthier.passes.gpu.offset_buffers import offset_buffers, offset_scalars


@dataclass(slots=True)
class CudaProgram(HostProgram):
    """``kernels``: by symbol. A pipeline is ``symbol``, ``group`` (threads in x, y, z), ``buffers`` (name, bytes of an element
    and whether it is written), ``scalars`` (types), ``waits`` (whether its threads wait for each other), ``nodes``."""

    kernels: dict[str, CudaKernel] = field(default_factory=dict)


def build_cuda(program: Program) -> CudaProgram:
    """Raises CompilationError, naming the graph node, for what CUDA cannot hold or compute."""
    g = CudaProgram()
    CudaBuilder(program, g).build()
    return g


class CudaBuilder(HostBuilder):
    align = ALIGN
    binding = 1 << 62
    g: CudaProgram

    def __init__(self, program: Program, g: CudaProgram) -> None:
        super().__init__(program, g)
        self.variants: dict[Any, tuple[int, CudaKernel]] = {}

    def dispatch(self, s: Call, number: int, out: list[Any]) -> None:
        f = self.p.kernels[s.callee]
        env: dict[Expr, Expr] = {
            q: a for q, a in zip(f.params, s.args, strict=True) if isinstance(q, Expr) and isinstance(a, Expr)
        }
        args = {q.name: self.argument(q, a, f, env) for q, a in zip(f.params, s.args, strict=True) if isinstance(q, Buffer)}
        places = {n: start_of(x, x.offset + x.base) for n, x in args.items() if not multiple(x.offset + x.base, ALIGN)}
        names, units = tuple(places), {n: u for n, (_, u) in places.items()}
        key = (s.callee, tuple(units.items()), self.aliased(list(args.values())))
        if key not in self.variants:
            kernel = print_cuda(legalize_cuda(offset_buffers(f, names, units)), exclusive=not key[-1]).renamed()
            self.variants[key] = self.pipeline(kernel, list(self.p.nodes.get(number, ()))), kernel
        pipeline, kernel = self.variants[key]
        scalars = env | dict(zip(offset_scalars(f, names), (e for e, _ in places.values()), strict=True))
        by_name = {v.attr[0]: e for v, e in scalars.items()}

        def here(e: Expr) -> Any:
            return self.expr(substitute(e, {v: by_name[v.attr[0]] for v in free_vars(e)}))

        bound = []
        for b in kernel.buffers:
            x = args[b.name]
            bound.append([list(x.memory), self.expr(const(0) if b.name in places else x.offset + x.base), here(b.size())])
        words = [self.expr(by_name[v.attr[0]]) for v in kernel.scalars]
        out.append(["dispatch", pipeline, bound, words, *(here(e) for e in kernel.grid), number])

    @staticmethod
    def aliased(args: list[Argument]) -> bool:
        """Whether some memory is written through one argument and touched through another."""
        return any(x.memory == y.memory and (x.written or y.written) for k, x in enumerate(args) for y in args[k + 1 :])

    def pipeline(self, k: CudaKernel, nodes: list[str]) -> int:
        """Its number; of equal kernels the first one's nodes stay."""
        self.g.kernels[k.symbol] = k
        self.g.pipelines.append(pipeline_of(k, nodes))
        return len(self.g.pipelines) - 1


def pipeline_of(k: CudaKernel, nodes: list[str]) -> dict[str, Any]:
    """What a device must know to launch a kernel."""
    buffers = [[b.name, b.dtype.bits * b.dtype.lanes // 8, b.writable] for b in k.buffers]
    return {
        "symbol": k.symbol,
        "group": list(k.group),
        "buffers": buffers,
        "scalars": [v.dtype.name for v in k.scalars],
        "waits": k.waits,
        "nodes": nodes,
    }
