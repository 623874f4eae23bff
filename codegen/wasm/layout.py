"""Where everything lies in the linear memory of a WebAssembly module (see ``docs/web.md``). Addresses are in bytes."""

from __future__ import annotations

from luthier.codegen.program.ranges import most_elements
from luthier.codegen.program.steps import Layout
from luthier.codegen.wasm.memory import GUARD
from luthier.ir.errors import CompilationError
from luthier.ir.loop import Alloc, Block, For, Func, If, Stmt, While

PAGE = 65536
RECORD = 48  # bytes of an input or output in the table: address, bytes, capacity, -, extents [8]
EXTENTS = 16
MAX_LOCAL_BYTES = 1 << 20

# The words of the runtime, each group on a cache line of its own.
WORDS = {
    "LOOP": 64, "DONE": 128, "ARRIVED": 192, "MET": 256, "GATE": 320, "STOP": 384, "CREW": 388, "WORTH": 392, "HEAP_START": 396,
    "HEAP": 400, "STACKS": 404, "ERROR": 448, "SPIN": 20000,
}  # fmt: skip
IO = 512


def element_bytes(bits: int, is_bool: bool) -> int:
    return 1 if is_bool else max(1, bits // 8)


def stack_bytes(f: Func) -> int:
    """Bytes of local buffers that are alive at the same time. Raises CompilationError when a size is not known."""

    def go(s: Stmt | None) -> int:
        if s is None:
            return 0
        if isinstance(s, Block):
            return max((go(c) for c in s.stmts), default=0)
        if isinstance(s, (For, While)):
            return go(s.body)
        if isinstance(s, If):
            return max(go(s.then), go(s.orelse))
        if isinstance(s, Alloc):
            b = s.buf
            if (b.rank == 0 and b.scope == "local") or b.name in f.data:
                return go(s.body)
            n = most_elements(b)
            if n is None:
                raise CompilationError(
                    f"{f.name}: local buffer {b.name} has no constant size {b.size()!r}", op=f.name, hint="use a global buffer"
                )
            size = n * element_bytes(b.dtype.bits, b.dtype.is_bool) * b.dtype.lanes
            if size > MAX_LOCAL_BYTES:
                raise CompilationError(f"{f.name}: local buffer {b.name} needs {size} bytes of stack, at most {MAX_LOCAL_BYTES} are allowed", op=f.name)
            return go(s.body) + (size + 63) // 64 * 64
        return 0

    return go(f.body)


class Memory:
    """``words``: where the program's words start (addresses of temporaries); ``weights``: the blob; ``heap``: the rest.
    ``record(j)``: the table's entry of input j, or of output j - inputs."""

    def __init__(self, layout: Layout, stack: int) -> None:
        p = layout.program
        self.layout = layout
        self.inputs = {b.name: IO + RECORD * j for j, b in enumerate(p.inputs)}
        self.outputs = {b.name: IO + RECORD * (len(p.inputs) + j) for j, b in enumerate(p.outputs)}
        self.words = IO + RECORD * (len(p.inputs) + len(p.outputs))
        self.stack = (stack + 1024 + 63) // 64 * 64
        self.weights = max(GUARD, (self.words + 4 * layout.words + 4095) // 4096 * 4096)
        self.heap = (self.weights + layout.weights.size + 63) // 64 * 64
        self.pages = max(1, -(-self.heap // PAGE))
        self.max_pages = 65536  # all that 32-bit addresses reach; a host that has no room for as much asks for less
        if self.pages > 65535:
            raise CompilationError(f"the constants need {layout.weights.size} bytes, WebAssembly has 4 GiB of memory in all")

    def pointer_word(self, name: str) -> int:
        """The address of the word that holds where buffer ``name`` lies."""
        for t in (self.inputs, self.outputs):
            if name in t:
                return t[name]
        return self.words + 4 * self.layout.table[name]

    def names(self) -> dict[str, int]:
        """Numbers for the runtime's assembly."""
        return {**WORDS, "STACK_BYTES": self.stack}


def describe(memory: Memory) -> dict[str, int]:
    """What a loader needs to know."""
    return {
        "io": IO, "error": WORDS["ERROR"], "weights": memory.weights, "heap": memory.heap, "pages": memory.pages, "max_pages": memory.max_pages,
    }  # fmt: skip
