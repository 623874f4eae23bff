"""What WebAssembly costs to make: loop IR to bytes for every kernel of some models, and a whole model to a module, cold.

    python benchmarks/wasm_cost.py [MODEL.onnx ...] [--llvm]

``--llvm``: beside it, the same kernels through LLVM's wasm32 backend (and ``wasm-ld``, where one is installed): LLVM text from the
CPU printer for a wasm32 target, optimised code generation, an object, a linked module. Times are process CPU time, the least of
five rounds, in ms; the last line is the cold start: a fresh process from the model's file to all bytes of a variant.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = [ROOT / "build" / "models" / n for n in ("minilm.onnx", "mobilenetv2.onnx", "magika.onnx", "rapidocr-rec.onnx", "silero.onnx")]
COLD = """
import sys, time
t = time.perf_counter()
import luthier
m = luthier.compile(sys.argv[1], target="wasm")
n = len(m.binary("relaxed"))
print(time.perf_counter() - t, n)
"""


def best(work: list[Any], rounds: int = 5) -> list[float]:
    """The least time of each, ms; every round runs all of them, so that a slow moment of the machine spoils one round."""
    times: list[list[float]] = [[] for _ in work]
    for _ in range(rounds):
        for f, ts in zip(work, times, strict=True):
            t = time.process_time()
            f()
            ts.append((time.process_time() - t) * 1e3)
    return [min(ts) for ts in times]


def own(f: Any) -> None:
    """Loop IR as the loop passes leave it to the bytes of one function."""
    from luthier.codegen.wasm import KernelPrinter, legalize_wasm
    from luthier.ir import loop

    loop._contents = None  # what an earlier round of this benchmark found out does not count
    g = legalize_wasm(f)
    KernelPrinter(g, {}, {n: 64 for n in g.data}, True, fixed=True).kernel().body()


def llvm(f: Any, linker: str | None, work: Path) -> None:
    """The same kernel through LLVM's wasm32. Raises CompilationError where the CPU printer asks for more than wasm has."""
    from luthier.codegen.llvm_backend import compile_text
    from luthier.codegen.llvm_printer import print_kernels
    from luthier.passes.legalize_dtype import LLVM_RULES, legalize_dtype
    from luthier.passes.lower_subbyte import lower_subbyte

    target = wasm32()
    data = compile_text(print_kernels([("k", legalize_dtype(lower_subbyte(f), LLVM_RULES))], target), target)
    if linker:
        (work / "k.o").write_bytes(data)
        flags = ["--no-entry", "--export-all", "--allow-undefined"]
        subprocess.run([linker, *flags, str(work / "k.o"), "-o", str(work / "k.wasm")], check=True, capture_output=True)


def wasm32() -> Any:
    from luthier.codegen.target import Target, parse_target

    return Target("wasm32", "wasm32-unknown-unknown", "generic", "+simd128,+relaxed-simd", parse_target("wasm").caps)


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of printing WebAssembly.")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--llvm", action="store_true", help="beside LLVM's wasm32 backend")
    options = parser.parse_args()
    import gc

    from luthier.codegen.target import parse_target
    from luthier.errors import LuthierError
    from luthier.importers.onnx import import_onnx
    from luthier.pipeline import compile_program

    gc.disable()  # as luthier.compile does
    caps = parse_target("wasm").caps
    models = [m for m in options.models or MODELS if m.exists()]
    linker = next((p for p in map(shutil.which, ("wasm-ld", "wasm-ld-19", "wasm-ld-14")) if p), None)
    every: list[float] = []
    theirs: list[float] = []
    ours: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for m in models:
            program = compile_program(import_onnx(str(m), None), caps)
            times = best([lambda f=f: own(f) for f in program.kernels.values()])  # type: ignore[misc]
            every += times
            line = f"{m.stem:16} {len(times):4} kernels, loop IR to bytes: median {statistics.median(times):6.2f} ms, mean {statistics.mean(times):6.2f}, most {max(times):7.2f}"
            if options.llvm:
                pairs = []
                for f, t in zip(program.kernels.values(), times, strict=True):
                    try:
                        start = time.perf_counter()
                        llvm(f, linker, Path(folder))
                        pairs.append((t, (time.perf_counter() - start) * 1e3))
                    except LuthierError:
                        continue
                ours += [a for a, _ in pairs]
                theirs += [b for _, b in pairs]
                line += f"; LLVM{' and ' + Path(linker).name if linker else ''} on {len(pairs)} of them: median {statistics.median(b for _, b in pairs):7.1f} ms"
            print(line, flush=True)
    print(f"all: {len(every)} kernels, median {statistics.median(every):.2f} ms, mean {statistics.mean(every):.2f} ms")
    if theirs:
        print(f"LLVM / ours, kernel by kernel: median {statistics.median(b / a for a, b in zip(ours, theirs, strict=True)):.0f}x, in all {sum(theirs) / sum(ours):.0f}x")
    for m in models[:1]:
        out = subprocess.run([sys.executable, "-c", COLD, str(m)], capture_output=True, text=True, check=True).stdout.split()
        print(f"{m.stem}: file to complete module, fresh process: {float(out[0]):.2f} s, {int(out[1])} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
