"""WebAssembly with 128-bit SIMD. ``wasm`` is ``wasm:relaxed``, and every module can be printed in all variants.

``wasm:simd`` (SIMD128 alone), ``wasm:relaxed`` (relaxed SIMD), ``wasm:simd-threads``, ``wasm:relaxed-threads`` (shared memory and
atomics): which variant of a module Python runs. Layout of memory and weights are the same for all four; the
sizes of register tiles may differ.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.codegen.targets.target import Target
from luthier.errors import TargetError
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.intrin.byte_vectors import FEATURE

VARIANTS = ("simd", "relaxed", "simd-threads", "relaxed-threads")
KNOWN = ("wasm", *(f"wasm:{v}" for v in VARIANTS))

# V8 has 16 vector registers on x86-64 and keeps one of them for itself: the one that schedules leave free. Without relaxed SIMD a
# product needs a register before it is added, so tiles are smaller.
CAPS = Capabilities(
    vector_bits=128, registers=16, features=frozenset({"simd128", FEATURE}), l1=32 << 10, l2=512 << 10, l3=8 << 20, index_bits=32,
    issue=5.0, printer="wasm", whole_registers=True, streams=4,
)  # fmt: skip
BASELINE = replace(CAPS, registers=15)


def parse(rest: str) -> Target:
    """A variant; ``relaxed`` when empty. Raises TargetError naming the known ones."""
    variant = rest.replace("simd128", "simd") or "relaxed"
    if variant not in VARIANTS:
        raise TargetError(f"no WebAssembly variant {rest!r}", hint="known: " + ", ".join(KNOWN))
    flags = {"simd128"} | {f for f, on in (("relaxed-simd", "relaxed" in variant), ("threads", "threads" in variant)) if on}
    caps = CAPS if "relaxed" in variant else BASELINE
    return Target(f"wasm:{variant}" if rest else "wasm", "", "", "", caps, frozenset(flags), "wasm")
