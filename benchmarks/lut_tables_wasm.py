"""Look-ups (``i8x16.swizzle``) against dot products in Chromium, for every width and number of rows: ``lut_tables`` for wasm.

    python -m benchmarks.lut_tables_wasm build [--batch 1,4,16]    # artifacts into build/lut-wasm
    python -m benchmarks.lut_tables_wasm run --batch 1             # Markdown rows; nothing else should run on the machine
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lowbit import WIDTHS
from benchmarks.lut_tables import NAMES
from benchmarks.wasm_chromium import measure
from luthier import pipeline
from luthier.backends import wasm as build_wasm
from luthier.codegen.targets.target import parse_target
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.ops.lowbit import pack_bits
from luthier.ir.ops.lowbit_matmul import pack_trits
from luthier.schedules.select import Kernels, Record

OUT = Path(__file__).resolve().parent.parent / "build" / "lut-wasm"


def build(width: str, m: int, n: int = 4096, k: int = 4096) -> None:
    """An artifact for each template that fits, with its default knobs."""
    rng = np.random.default_rng(0)
    bits, group = WIDTHS[width]
    q = rng.integers(0, 3 if not bits else 1 << bits, (n, k), dtype=np.uint8)
    s = rng.uniform(0.5, 1.5, (n, k // group)).astype(np.float16)
    zero = float(1 << (bits - 1)) if bits else 1.0
    x = rng.standard_normal((m, k)).astype(np.float32)
    truth = x.astype(np.float64) @ ((q - zero) * np.repeat(s.astype(np.float64), group, 1)).T
    target = parse_target("wasm")
    for template, name in NAMES.items():

        def pick(found: Sequence[Kernels], template: str = template) -> Kernels:
            return next((c for c in found if c.template == template), found[0])

        b = GraphBuilder("gemv")
        ins = [b.input("x", f32, [m, k]), b.const("w", pack_bits(q, bits) if bits else pack_trits(q)), b.const("s", s)]
        b.output("y", b.op("luthier::GroupedMatMul", *ins, K=k, bits=bits, group=group, act_group=32, zero=zero))
        record = Record(pick)
        program = pipeline.compile_program(b.graph(), target.caps, record=record)
        if template not in {f.attrs.get("template") for f in program.kernels.values()}:
            continue
        module = build_wasm.build_module(program, target, 1, record)
        y = np.asarray(module.run({"x": x})["y"])
        error = float(((y - truth) ** 2).sum() / (truth**2).sum())
        folder = module.save(OUT / f"{m}-{width}-{name}")
        (folder / "shapes.json").write_text(json.dumps({"x": [m, k]}))
        module.weights.tofile(folder / "weights.bin")
        np.ascontiguousarray(y).tofile(folder / "output-0.bin")
        x.tofile(folder / "input-0.bin")
        print(f"{folder.name}: NMSE {error:.1e}", flush=True)


def run(m: int, runs: int) -> None:
    names = sorted(p.name for p in OUT.iterdir() if p.name.startswith(f"{m}-"))
    for variant in ("simd", "relaxed"):
        rows: dict[str, Any] = measure(OUT, names, variant, 1, runs)
        for width in WIDTHS:
            ms = {}
            for name in NAMES.values():
                got = rows.get(f"{m}-{width}-{name}", {})
                if "error" in got:
                    print(f"{m}-{width}-{name}: {got['error']}", file=sys.stderr)
                elif got:
                    ms[name] = got["least"]
            cells = [("**{:.1f}**" if ms[x] == min(ms.values()) else "{:.1f}").format(4096**2 * 1e-6 / ms[x]) if x in ms else "-" for x in NAMES.values()]
            print(f"| wasm:{variant} | {m} | {width} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=("build", "run"))
    ap.add_argument("--batch", default="1,4,16")
    ap.add_argument("--runs", type=int, default=12)
    a = ap.parse_args()
    for m in map(int, a.batch.split(",")):
        if a.what == "run":
            run(m, a.runs)
        else:
            for width in WIDTHS:
                build(width, m)


if __name__ == "__main__":
    main()
