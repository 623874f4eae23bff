"""What a schedule may know about a target: numbers and feature flags, never its name. Instances live in ``codegen/targets/target.py``."""

from __future__ import annotations

from dataclasses import dataclass

LOCAL_BYTES = 256 << 10  # of one local buffer on a thread's stack


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``vector_bits``: width of a SIMD register; ``registers``: how many of them a kernel may count on; ``features``: ISA facts
    that instructions in ``schedules/intrin`` ask for (``fma``, ``vnni``, ``vbmi``, ``bf16dot``, ``masked_store``, ``gather``,
    ``relaxed_simd``, ``dp4a``, ``subgroups``, ``f16`` ...). ``native``: transcendental operators the target has (with its ULP
    error), all others are expanded. ``issue``: instructions a cycle where loads do not fold into arithmetic, so that they can be the
    limit of a loop; 0 where they are not. ``printer``: whose spelling of an instruction is asked for. ``whole_registers``: no vector
    may be wider than ``vector_bits`` when a kernel is printed. ``shuffles``: lanes of several
    vectors of any length can be rearranged at once. ``streams``: places of memory that a loop without reuse walks at once (targets
    without prefetch leave it to the hardware, which fetches further ahead when there are several). Cache sizes in bytes.
    ``local_bytes``: what one local buffer may hold. ``merge_siblings``: products that share their left operand are one kernel (a launch costs more than rows further
    apart). ``gpu``: grid and group kinds are used instead of threads and lanes."""

    vector_bits: int = 256
    registers: int = 16
    features: frozenset[str] = frozenset()
    native: frozenset[str] = frozenset({"sqrt", "floor", "ceil", "round", "trunc", "abs", "neg"})
    l1: int = 32 << 10
    l2: int = 512 << 10
    l3: int = 16 << 20
    local_bytes: int = LOCAL_BYTES
    gpu: bool = False
    max_threads_per_block: int = 256
    shared_bytes: int = 16 << 10
    index_bits: int = 64
    issue: float = 0.0
    printer: str = "llvm"
    whole_registers: bool = False
    streams: int = 1
    shuffles: bool = False
    merge_siblings: bool = False

    def lanes(self, bits: int) -> int:
        """SIMD lanes for elements of ``bits``; 1 where the target has no vectors."""
        return max(1, self.vector_bits // bits)
