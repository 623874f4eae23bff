"""Matrix-vector products with group-sparse weights beside the dense low-bit kernels of this project.

    python -m benchmarks.sparse [--shape 4096x4096] [--threads 1] [--batch 1] [--place dram|l3] [--cases ...] [--markdown]

Interleaved rounds as in :mod:`benchmarks.lowbit`: ``dram`` is eight layers in rotation, ``l3`` one layer. Weights a second count the whole
matrix, dropped ones included. ``vs W4``: the median over rounds of the ratio to the dense 4-bit kernel in the same round, of medians and of
the rounds' best times (a machine with neighbours disturbs the first more). Cases:
``w4``, ``w2``, ``w8``, ``w4x`` (dense, exact activations), ``4:2:4`` and ``8:2:4`` (two of four weights kept, groups of 32), ``BITSxBLOCK@DENSITY`` (blocks at random places), with ``!`` behind it all of them in as few
rows as possible.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.lowbit import first, nmse
from luthier.build_graph import compile_graph
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.graph import Value
from luthier.ir.ops.lowbit import pack_bits
from luthier.ir.ops.sparse_matmul import BlockSparse
from luthier.ir.ops.two_of_four import TwoOfFour

Array = np.ndarray[Any, Any]
CASES = "w4,4x16@0.5,4x16@0.5!,4:2:4,w2,4x16@0.25,4x16@0.1,4x8@0.5,4x32@0.5,8x16@0.5"
Layer = Callable[[GraphBuilder, Value, int], Value]


@dataclass
class Case:
    """``run``: all layers once. ``bits``: stored, for a weight of the whole matrix. ``times``: seconds, a list a round."""

    name: str
    bits: float
    nmse: float
    run: Callable[[], Any]
    times: list[list[float]] = field(default_factory=list)

    def median(self, r: int) -> float:
        return float(np.median(self.times[r]))


def random_blocks(n: int, k: int, block: int, bits: int, density: float, few_rows: bool, rng: np.random.Generator) -> BlockSparse:
    count = k // block
    if few_rows:
        keep = np.zeros((n, count), bool)
        keep[rng.permutation(n)[: round(n * density)]] = True
    else:
        keep = rng.random((n, count)) < density
    kept = int(keep.sum())
    ptr = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)
    values = rng.integers(0, 1 << bits, (kept, block), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1.5, kept) / np.sqrt(k * density) / (1 << bits) * 4).astype(np.float16)
    return BlockSparse(n, k, block, bits, ptr, np.nonzero(keep)[1].astype(np.int32), values, scales, None, 1 << (bits - 1))


def dense_case(n: int, k: int, bits: int, act: int, rng: np.random.Generator) -> tuple[Layer, float, Array]:
    group = 32 if bits == 4 else 64
    q = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    s = (rng.uniform(0.5, 1.5, (n, k // group)) / np.sqrt(k) / (1 << bits) * 4).astype(np.float16)
    raw, zero = pack_bits(q, bits), 1 << (bits - 1)

    def layer(b: GraphBuilder, v: Value, i: int) -> Value:
        return b.op("luthier::GroupedMatMul", v, b.const("w", np.roll(raw, i, 0)), b.const("s", np.roll(s, i, 0)), K=k, bits=bits, group=group, act_group=act, zero=zero)

    return layer, bits + 16 / group, (q - float(zero)) * np.repeat(s.astype(np.float64), group, 1)


def sparse_case(n: int, k: int, name: str, rng: np.random.Generator) -> tuple[Layer, float, Array]:
    few = name.endswith("!")
    shape, density = name.rstrip("!").split("@")
    bits, block = (int(v) for v in shape.split("x"))
    made: dict[int, BlockSparse] = {}

    def blocks(i: int) -> BlockSparse:
        if i not in made:
            made[i] = random_blocks(n, k, block, bits, float(density), few, rng)
        return made[i]

    def layer(b: GraphBuilder, v: Value, i: int) -> Value:
        w = blocks(i)
        return b.op("luthier::SparseMatMul", v, *[None if a is None else b.const("w", a) for a in w.arrays()], **w.attrs())

    return layer, blocks(0).density * (bits + 32 / block), blocks(0).dense().astype(np.float64)


def two_of_four_case(n: int, k: int, bits: int, rng: np.random.Generator) -> tuple[Layer, float, Array]:
    top = (1 << (bits - 1)) - 1
    keep = rng.random((n, k // 4, 4)).argsort(-1) < 2
    v = np.where(keep.reshape(n, k), rng.integers(-top, top + 1, (n, k)), 0).astype(np.int16)
    w = TwoOfFour(v, (rng.uniform(0.5, 1.5, (n, k // 32)) / np.sqrt(k / 2) / (1 << bits) * 4).astype(np.float16), bits, 32)
    raw, s = w.arrays()

    def layer(b: GraphBuilder, x: Value, i: int) -> Value:
        return b.op("luthier::TwoOfFourMatMul", x, b.const("w", np.roll(raw, i, 0)), b.const("s", np.roll(s, i, 0)), **w.attrs())

    return layer, bits / 2 + 1 + 0.5, w.dense().astype(np.float64)


def build_case(name: str, n: int, k: int, m: int, layers: int, threads: int, x: Array, rng: np.random.Generator) -> Case:
    dense = {"w4": (4, 32), "w2": (2, 32), "w8": (8, 32), "w4x": (4, 0)}
    if name in dense:
        layer, bits, w = dense_case(n, k, *dense[name], rng)
    elif name.endswith(":2:4"):
        layer, bits, w = two_of_four_case(n, k, int(name[0]), rng)
    else:
        layer, bits, w = sparse_case(n, k, name, rng)

    def build(count: int) -> Any:
        b = GraphBuilder("gemv")
        v = b.input("x", f32, [m, k])
        for i in range(count):
            y = layer(b, v, i)
            if n == k:
                v = y
            else:
                b.output(f"y{i}", y)
        if n == k:
            b.output("y", v)
        return compile_graph(b.graph(), threads=threads)

    module = build(layers)
    one = module if layers == 1 else build(1)
    return Case(name, bits, nmse(first(one(x)), x.astype(np.float64) @ w.T), lambda: module(x))


def measure(cases: list[Case], rounds: int, seconds: float) -> None:
    """Interleaved rounds: all times of all cases."""
    for _ in range(rounds):
        for c in cases:
            c.run()
            c.times.append([])
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                t = time.perf_counter()
                c.run()
                c.times[-1].append(time.perf_counter() - t)


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--shape", default="4096x4096", help="columns x rows of the weights")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--place", choices=("dram", "l3"), default="dram")
    ap.add_argument("--cases", default=CASES)
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--seconds", type=float, default=0.1)
    ap.add_argument("--wait", action="store_true", help="read a line from standard input before measuring")
    a = ap.parse_args(argv)
    k, n = (int(v) for v in a.shape.split("x"))
    layers = 8 if a.place == "dram" else 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((a.batch, k)).astype(np.float32)
    cases = [build_case(name, n, k, a.batch, layers, a.threads, x, rng) for name in a.cases.split(",")]
    if a.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    measure(cases, a.rounds, a.seconds)
    base = next((c for c in cases if c.name == "w4"), cases[0])
    print(f"\n## {a.shape}, batch {a.batch}, {a.threads} thread(s), {a.place}\n")
    print("| weights | Gw/s, median | best | GB/s, best | stored bits | vs W4, medians | vs W4, best | NMSE |\n|---|---|---|---|---|---|---|---|")
    for c in cases:
        gw = [n * k * layers * 1e-9 / t for t in (float(np.median([c.median(r) for r in range(a.rounds)])), min(min(t) for t in c.times))]
        ratio = float(np.median([base.median(r) / c.median(r) for r in range(a.rounds)]))
        fast = float(np.median([min(base.times[r]) / min(c.times[r]) for r in range(a.rounds)]))
        print(f"| {c.name} | {gw[0]:.1f} | {gw[1]:.1f} | {gw[1] * c.bits / 8:.1f} | {c.bits:.2f} | {ratio:.2f} | {fast:.2f} | {c.nmse:.1e} |")


if __name__ == "__main__":
    main()
