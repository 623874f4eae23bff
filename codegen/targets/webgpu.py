"""WebGPU: kernels in WGSL within the default limits of the standard, run by a browser or, in Python, by ``wgpu``.

``webgpu`` is a profile of a discrete or integrated GPU. What schedules may use never depends on the adapter at hand: an adapter
that lacks an optional feature gets the fallback that is in the package.
"""

from __future__ import annotations

from luthier.codegen.targets.target import Target
from luthier.errors import TargetError
from luthier.schedules.base.capabilities import Capabilities

KNOWN = ("webgpu",)

# The defaults of the standard: 8 storage buffers a stage, 128 MB a binding, 256 threads and 16 KB of shared memory a group.
STORAGE_BUFFERS = 8
BINDING_BYTES = 128 << 20
OFFSET_ALIGN = 256
LOOP_LIMIT = 65535  # rounds of all its loops after which a thread may end: not by the standard, but llvmpipe does so

CAPS = Capabilities(
    vector_bits=32, registers=128, features=frozenset({"fma", "dp4a"}), l1=16 << 10, l2=4 << 20, l3=4 << 20, gpu=True, max_threads_per_block=256,
    shared_bytes=16 << 10, index_bits=32, merge_siblings=True, printer="wgsl",
)


def parse(rest: str) -> Target:
    """Nothing may follow ``webgpu``. Raises TargetError."""
    if rest:
        raise TargetError(f"no WebGPU variant {rest!r}", hint="known: " + ", ".join(KNOWN))
    return Target("webgpu", "", "", "", CAPS, frozenset(), "webgpu")
