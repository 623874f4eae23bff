"""The grammar gate's table: kernel x {interpreter, LLVM, WASM, WGSL, CUDA}, and the GEMM's share of the measured FMA peak.

    python -m benchmarks.gate [--rounds 40] [--sizes 384,512,768] [kernel ...]

A cell is the largest error relative to the output's largest value (0 for integers), ``ok`` where only compilation is checked, a
reason where the backend is missing. WGSL is run through wgpu (naga) and shown to Dawn. Both columns of LLVM and WASM use the same
Compute and schedule; they differ in capabilities. The GEMM (f32, bias and GELU epilogue, B packed ahead) alternates with an FMA
loop, so that both see the same machine; processor time is counted, the best of each.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks import ceilings
from luthier.codegen.targets.target import host
from luthier.errors import LuthierError
from luthier.schedules.base.capabilities import Capabilities
from tests.gate import backends, dawn
from tests.gate.harness import Runner, check, extents, funcs_of, interpret, run_case
from tests.gate.kernels import Case, cases, gemm_case
from tests.gate.schedules import Scheduler, cpu, gemm, gpu

FMA_STEPS = 300_000  # about a millisecond: short enough to run undisturbed on a shared machine
TILES = ((6, 2, 4), (4, 3, 4))  # rows, vectors, unrolled steps: both use 12 accumulators


def cell(case: Case, sched: Scheduler | None, runner: Runner) -> str:
    x = case.inputs(np.random.default_rng(0))
    err = check(case, run_case(case, funcs_of(case, sched), x, runner), case.reference(x))
    return f"{err:.1e}" if err else "exact"


def guarded(work: Callable[[], str]) -> str:
    try:
        return work()
    except ImportError as e:
        return f"no {e.name}"
    except AssertionError as e:
        return f"WRONG {e}"
    except LuthierError as e:
        return f"FAIL {e}"


def row(case: Case) -> dict[str, str]:
    def cuda() -> str:
        sizes = [len(backends.cubin(f)) for f in funcs_of(case, gpu(case))]
        return f"sm_90 {sum(sizes) / 1024:.0f} KiB"

    def tint() -> str:
        if dawn.missing():
            return "no dawn"
        bad = dawn.refused([backends.shader(f) for f in funcs_of(case, gpu(case))])
        return f"FAIL {bad}" if bad else "ok"

    return {
        "plain": guarded(lambda: cell(case, None, interpret)),
        "scheduled": guarded(lambda: cell(case, cpu(case, Capabilities()), interpret)),
        "LLVM": guarded(lambda: cell(case, cpu(case, host().caps), backends.llvm)),
        "WASM": guarded(lambda: cell(case, cpu(case, backends.WASM), backends.wasm)),
        "WGSL": guarded(lambda: cell(case, gpu(case), backends.wgsl)),
        "Dawn": guarded(tint),
        "CUDA": guarded(cuda),
    }


def gemm_share(n: int, rounds: int) -> tuple[float, float, tuple[int, int, int]]:
    """(GFLOP/s of the best tile, GFLOP/s of the FMA loop, that tile); one thread."""
    lanes = host().caps.lanes(32)
    case = gemm_case(n, n, n)
    x = case.inputs(np.random.default_rng(0))
    _, fma, _ = ceilings.compiled()
    ready = []
    for t in TILES:
        funcs = funcs_of(case, lambda s, t=t: gemm(s, lanes, *t))
        kernels = [backends.LlvmKernel(f) for f in funcs]
        arrays = {**x, "B.pack": np.zeros(extents(funcs[0].buffers[-1], {}), np.float32), "C": np.zeros((n, n), np.float32)}
        for k in kernels:
            k(arrays, {})
        case_out = case.reference(x)["C"]
        assert np.abs(arrays["C"] - case_out).max() <= case.tol * np.abs(case_out).max()
        ready.append((t, kernels[-1], arrays))
    best = {t: float("inf") for t in TILES}
    peak = 0.0
    for _ in range(rounds * max(1, (768 // n) ** 2)):  # small ones are as likely to be disturbed
        for _ in range(8):
            start = time.thread_time()
            fma(FMA_STEPS, 0.5)
            peak = max(peak, FMA_STEPS * 12 * ceilings.lanes() * 2 / (time.thread_time() - start) / 1e9)
        for t, k, arrays in ready:
            start = time.thread_time()
            k(arrays, {})
            best[t] = min(best[t], time.thread_time() - start)
    t = min(best, key=lambda q: best[q])
    return 2 * n**3 / best[t] / 1e9, peak, t


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    ap.add_argument("kernels", nargs="*", help="only these rows")
    ap.add_argument("--rounds", type=int, default=40)
    ap.add_argument("--sizes", default="384,512,768")
    args = ap.parse_args()
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    shown = [c for c in cases() if not args.kernels or c.name in args.kernels]
    bad = 0
    head: list[str] | None = None
    for c in shown:
        r = row(c)
        if head is None:
            head = list(r)
            print(f"{'kernel':<16}" + "".join(f"{h:>13}" for h in head))
        print(f"{c.name:<16}" + "".join(f"{v:>13}" for v in r.values()), flush=True)
        bad += sum(v.startswith(("FAIL", "WRONG")) for v in r.values())
    if not args.kernels or "gemm" in args.kernels:
        print(f"\nGEMM with bias and GELU, f32, 1 thread, {host().name}, {args.rounds} rounds, best of each")
        for n in map(int, args.sizes.split(",")):
            got, peak, t = gemm_share(n, args.rounds)
            print(f"  {n:>5}^3  {got:6.1f} GFLOP/s  {100 * got / peak:5.1f} % of the FMA loop's {peak:6.1f}   tile {t[0]} x {t[1] * host().caps.lanes(32)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
