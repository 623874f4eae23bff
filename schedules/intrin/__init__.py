"""Instructions as data: one file an ISA family, each a list of :class:`luthier.ir.intrin.Instruction`.

``usable(caps)`` is what a template chooses from; no template names an instruction.
"""

from __future__ import annotations

from luthier.ir.intrin import Instruction
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.intrin import arm, gpu, wasm, x86

ALL: tuple[Instruction, ...] = tuple(i for m in (x86, arm, wasm, gpu) for i in vars(m).values() if isinstance(i, Instruction))


def usable(caps: Capabilities) -> list[Instruction]:
    """Dot products that the target has in its register width, those that do most first."""
    found = [i for i in ALL if i.feature in caps.features and caps.vector_bits in i.spelling.get(caps.printer, {})]
    return sorted(found, key=lambda i: (-i.group, not i.adds))
