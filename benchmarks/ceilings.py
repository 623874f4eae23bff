"""What this machine can do: peak f32 FMA rate and read bandwidth by footprint (:mod:`luthier.codegen.targets.ceilings`).

    python benchmarks/ceilings.py [--threads 1,2]
"""

from __future__ import annotations

import argparse

import llvmlite.binding as llvm

from luthier.codegen.targets.ceilings import KINDS, bandwidth, compiled, fma_peak, lanes

__all__ = ["KINDS", "bandwidth", "compiled", "fma_peak", "lanes"]


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="peak f32 FMA rate and read bandwidth of this machine")
    parser.add_argument("--threads", default="1,2")
    args = parser.parse_args()
    print(f"{lanes()} f32 lanes, {llvm.get_host_cpu_name()}")
    for threads in (int(t) for t in args.threads.split(",")):
        rates = ", ".join(f"{kind} {bandwidth(size, threads):.0f}" for kind, size in KINDS.items())
        print(f"{threads} thread(s): {fma_peak(threads):.0f} GFLOP/s f32 FMA; reads, GB/s: {rates}")


if __name__ == "__main__":
    main()
