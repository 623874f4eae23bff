"""Look-up tables against dot products for every width, instruction set and number of rows: what the measured choice chooses from.

    python -m benchmarks.lowbit --tables [--targets cpu:x86-64-v2,cpu:x86-64-v3] [--batch 1] [--shape 4096x4096] [--place dram|l3]

Every kernel that the templates make of a product (``schedules/lowbit/rivals.py``), timed in turns by the isolated measurer. Look-ups of 4 bits are no
template: they are made here to show what they would cost. Rows are Markdown; the fastest of a width is marked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np

from luthier import pipeline
from luthier.codegen.targets.target import parse_target
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.ops.lowbit import pack_bits
from luthier.ir.ops.lowbit_matmul import pack_trits
from luthier.schedules import select
from luthier.schedules.lowbit import lut_gemv
from luthier.schedules.lowbit.layouts import match
from luthier.schedules.lowbit.rivals import rivals
from luthier.schedules.select import Kernels, Record
from luthier.tuner.measure import Measurer

NAMES = {"lut_gemv": "look-up", "quantized_gemv": "dot"}


def candidates(width: str, bits: int, group: int, n: int, k: int, m: int, target: str, rng: np.random.Generator) -> list[Kernels]:
    """All kernels for one product."""
    found: list[Kernels] = []

    def capture(made: Sequence[Kernels]) -> Kernels:
        found.extend(made)
        return made[0]

    def with_nibbles(s: Any, caps: Any, constants: Any) -> list[Kernels]:
        made = rivals(s, caps, constants)
        p = match(s.compute, constants)
        if p is not None and p.bits == 4:
            made.append(lut_gemv.TableBuilder(s, p, caps, constants, gcd(p.group, 32), None, None).kernels())
        return made

    q = rng.integers(0, 3 if not bits else 1 << bits, (n, k), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (n, k // group)).astype(np.float16)
    zero = float(1 << (bits - 1)) if bits else 1.0  # of one bit too: a half is nothing for a product of integers
    b = GraphBuilder("gemv")
    ins = [b.input("x", f32, [m, k]), b.const("w", pack_bits(q, bits) if bits else pack_trits(q)), b.const("s", scales)]
    b.output("y", b.op("luthier::GroupedMatMul", *ins, K=k, bits=bits, group=group, act_group=32, zero=zero))
    old, select.rivals = select.rivals, with_nibbles
    try:
        pipeline.compile_program(b.graph(), parse_target(target).caps, record=Record(capture))
    finally:
        select.rivals = old
    return found


def tables(widths: dict[str, tuple[int, int]], n: int, k: int, m: int, threads: int, place: str, targets: Sequence[str], wait: bool, rounds: int) -> None:
    """Prints the rows. All code is compiled before the first time is taken."""
    rng = np.random.default_rng(0)
    jobs: list[tuple[str, str, Kernels, Measurer, Any]] = []
    times: dict[int, list[float]] = {}
    for target in targets:
        measurer = Measurer(parse_target(target), timeout=120, repeats=3, threads=threads)
        for width, (bits, group) in widths.items():
            for c in candidates(width, bits, group, n, k, m, target, rng):
                job = measurer.prepare(c, None, {}, 64 << 20 if place == "dram" else 0)
                assert isinstance(job, dict), job
                first = measurer.run({**job, "least": 0, "repeats": 1}, keep=True)
                if first.error:
                    print(f"{target} {width} {c.trace}: {first.error}", file=sys.stderr)
                    continue
                jobs.append((target, width, c, measurer, job))
    if wait:
        print("ready", flush=True)
        sys.stdin.readline()
    for _ in range(rounds):
        for i, (_, _, _, measurer, job) in enumerate(jobs):
            times.setdefault(i, []).extend(measurer.run(job, keep=True).seconds)
    for target in targets:
        for width in widths:
            best: dict[str, tuple[float, str]] = {}
            for i, (t, w, c, _, _) in enumerate(jobs):
                if (t, w) == (target, width):
                    s = min(times[i])
                    best[c.template] = min(best.get(c.template, (s + 1, "")), (s, c.trace[0][-1]))
            fastest = min((s for s, _ in best.values()), default=0.0)
            cells = [f"{n * k * 1e-9 / best[x][0]:.1f} ({best[x][1]})" if x in best else "-" for x in NAMES]
            cells = [f"**{c}**" if x in best and best[x][0] == fastest else c for c, x in zip(cells, NAMES, strict=True)]
            print(f"| {target} | {m} | {width} | " + " | ".join(cells) + " |", flush=True)
    for m_ in {id(j[3]): j[3] for j in jobs}.values():
        m_.close()
