"""What WebAssembly costs to make: loop IR to bytes for every kernel of some models, and a whole model to a module, cold.

    python benchmarks/wasm_cost.py [MODEL.onnx ...] [--llvm]

``--llvm``: beside it, the same kernels through LLVM's wasm32 backend, in four ways; LLVM text of a kernel comes from the CPU printer
for a wasm32 target, the printing counts: the library in this process (llvmlite), warm, to an object; the same and a process of
``wasm-ld``, to a module; and what a user of Emscripten has in place of the library, a process of ``clang`` for each kernel, with -O0
and -O3, then ``wasm-ld`` (without Emscripten's own driver and ``wasm-opt``, which come on top). `apt-get install clang-22 lld-22`.
All times are CPU time in ms, of child processes too: ours the least of five rounds, LLVM's library of two, processes once. The last
line is the cold start: a fresh process from the model's file to all bytes of a variant.
"""

from __future__ import annotations

import argparse
import resource
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
    from luthier.codegen.wasm.printer import KernelPrinter, legalize_wasm
    from luthier.ir import loop

    loop._contents = None  # what an earlier round of this benchmark found out does not count
    g = legalize_wasm(f)
    KernelPrinter(g, {}, {n: 64 for n in g.data}, True, fixed=True).kernel().body()


def cpu_ms() -> float:
    """CPU time of this process and of its children that are over, ms."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages) * 1e3


def tool(name: str) -> str | None:
    """The newest installed program of LLVM of this name."""
    return next((p for p in map(shutil.which, (name, *(f"{name}-{v}" for v in range(30, 18, -1)))) if p), None)


def llvm(f: Any, linker: str | None, clang: str | None, work: Path) -> dict[str, float]:
    """CPU ms of the same kernel through LLVM's wasm32, by way (`WAYS`). Raises CompilationError where the CPU printer asks for more
    than wasm has, CalledProcessError when a tool refuses what another made."""
    from luthier.codegen.llvm.backend import compile_text
    from luthier.codegen.llvm.printer import legalize_llvm, print_kernels

    target, out = wasm32(), {}

    def text() -> str:
        return print_kernels([("k", legalize_llvm(f))], target)

    out["library"] = min(best([lambda: compile_text(text(), target)], 2))
    if not linker:
        return out
    source, obj, module = work / "k.ll", work / "k.o", work / "k.wasm"
    obj.write_bytes(compile_text(text(), target))

    def link() -> None:
        flags = ["--no-entry", "--export-all", "--allow-undefined"]
        subprocess.run([linker, *flags, str(obj), "-o", str(module)], check=True, capture_output=True)
        assert module.read_bytes()[:4] == b"\0asm"

    start = cpu_ms()
    link()
    out["library, wasm-ld"] = out["library"] + cpu_ms() - start
    for level in ("-O0", "-O3"):
        if not clang:
            break
        start = cpu_ms()
        source.write_text(text())
        flags = ["--target=wasm32", level, "-msimd128", "-mrelaxed-simd", "-Wno-override-module", "-c"]
        subprocess.run([clang, *flags, str(source), "-o", str(obj)], check=True, capture_output=True)
        link()
        out[f"clang {level}, wasm-ld"] = cpu_ms() - start
    return out


def wasm32() -> Any:
    from luthier.codegen.targets.target import Target, parse_target

    return Target("wasm32", "wasm32-unknown-unknown", "generic", "+simd128,+relaxed-simd", parse_target("wasm").caps)


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of printing WebAssembly.")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--llvm", action="store_true", help="beside LLVM's wasm32 backend")
    options = parser.parse_args()
    import gc

    from luthier.codegen.targets.target import parse_target
    from luthier.errors import LuthierError
    from luthier.importers.onnx.importer import import_onnx
    from luthier.pipeline import compile_program

    gc.disable()  # as luthier.compile does
    caps = parse_target("wasm").caps
    models = [m for m in options.models or MODELS if m.exists()]
    linker, clang = tool("wasm-ld"), tool("clang")
    every: list[float] = []
    pairs: list[tuple[float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for m in models:
            program = compile_program(import_onnx(str(m), None), caps)
            times = best([lambda f=f: own(f) for f in program.kernels.values()])  # type: ignore[misc]
            every += times
            line = f"{m.stem:16} {len(times):4} kernels, loop IR to bytes: median {statistics.median(times):6.2f} ms, mean {statistics.mean(times):6.2f}, most {max(times):7.2f}"
            if options.llvm:
                before = len(pairs)
                for f, t in zip(program.kernels.values(), times, strict=True):
                    try:
                        pairs.append((t, llvm(f, linker, clang, Path(folder))))
                    except LuthierError:
                        continue
                line += f"; {len(pairs) - before} of them through LLVM"
            print(line, flush=True)
    print(f"all: {len(every)} kernels, median {statistics.median(every):.2f} ms, mean {statistics.mean(every):.2f} ms")
    if pairs:
        print(f"{len(pairs)} kernels, CPU ms a kernel:  way, median, mean, times ours kernel by kernel (median), times ours in all")
        mine = sum(t for t, _ in pairs)
        print(f"  {'loop IR to bytes':24} {statistics.median(t for t, _ in pairs):8.2f} {mine / len(pairs):8.2f}")
        for way in pairs[0][1]:
            times = [w[way] for _, w in pairs]
            ratio = statistics.median(w[way] / t for t, w in pairs)
            print(f"  {way:24} {statistics.median(times):8.2f} {statistics.mean(times):8.2f} {ratio:7.0f}x {sum(times) / mine:7.0f}x")
        if not linker or not clang:
            print("  no clang or no wasm-ld is installed: their rows are missing")
    for m in models[:1]:
        out = subprocess.run([sys.executable, "-c", COLD, str(m)], capture_output=True, text=True, check=True).stdout.split()
        print(f"{m.stem}: file to complete module, fresh process: {float(out[0]):.2f} s, {int(out[1])} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
