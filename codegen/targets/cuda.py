"""CUDA: kernels in C++, compiled by NVRTC for an architecture, or by a host compiler that runs them thread by thread
(``cuda:emulate``)."""

from __future__ import annotations

from luthier.codegen.targets.target import Target
from luthier.errors import TargetError
from luthier.schedules.base.capabilities import Capabilities

EMULATE = "emulate"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
KNOWN = (*(f"cuda:{a}" for a in ARCHITECTURES), f"cuda:{EMULATE}")
ALIGN = 16  # bytes of the widest access: an argument that starts elsewhere is given by its memory and an offset

# 48 KB of shared memory a block are what a kernel has without asking for more
CAPS = Capabilities(
    vector_bits=32, registers=128, features=frozenset({"dp4a", "fma", "mma"}), l1=128 << 10, l2=4 << 20, l3=40 << 20, gpu=True,
    max_threads_per_block=256,
    shared_bytes=48 << 10, index_bits=64, merge_siblings=True, printer="cuda",
)  # fmt: skip


def parse(rest: str) -> Target:
    """An architecture, or ``emulate``; the architecture is the target's ``cpu``. Raises TargetError naming the known ones."""
    name = rest or ARCHITECTURES[0]
    if name != EMULATE and name not in ARCHITECTURES:
        raise TargetError(f"no CUDA architecture {rest!r}", hint="known: " + ", ".join(KNOWN))
    return Target(f"cuda:{name}", "", name, "", CAPS, frozenset(), "cuda")
