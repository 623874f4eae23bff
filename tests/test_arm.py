"""Low-bit kernels of AArch64: their instructions, and their results under qemu's user mode (left out where it or the cross compiler
is missing)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier.pipeline as pipeline
import luthier.schedules.select as select
from luthier.codegen.llvm_backend import assembly, compile_text, kernel_text
from luthier.codegen.sharing import parallel_loop
from luthier.codegen.target import Target, parse_target
from luthier.ir.graph import Graph
from luthier.ir.interp import evaluate_expr
from luthier.ir.loop import Buffer
from luthier.passes.legalize_dtype import LLVM_RULES, legalize_dtype
from luthier.passes.lower_subbyte import lower_subbyte
from luthier.schedules.select import Kernels
from tests.schedules import cases
from tests.test_lowbit import EXACT, ROUNDED, nmse, product

Array = np.ndarray[Any, Any]
TOOLS = shutil.which("qemu-aarch64"), shutil.which("aarch64-linux-gnu-gcc")
ARM = ["cpu:aarch64", "cpu:aarch64+dotprod", "cpu:aarch64+dotprod+i8mm"]
CASES = [(0, 32), (1, 32), (2, 32), (3, 32), (4, 32), (5, 32), (8, 32), (4, 0)]


def kernels_of(graph: Graph, target: Target, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Kernels]:
    """The Compute of a graph of one product and its kernels."""
    found: list[tuple[Any, Kernels]] = []
    original = select.build

    def record(c: Any, caps: Any, consts: Any = None, *rest: Any, **knobs: Any) -> Kernels:
        k = original(c, caps, consts)
        found.append((c, k))
        return k

    monkeypatch.setattr(select, "build", record)
    pipeline.compile_program(graph, target.caps)
    return found[-1]


def arrays(k: Kernels, x: Array, out: str, rows: int) -> dict[str, Array]:
    """Contents of every buffer of the kernels, outputs and temporaries zero."""
    given: dict[str, Array] = dict(k.packed)
    for f in k.funcs:
        for b in f.buffers:
            if b.name not in given:
                n = int(evaluate_expr(b.size(), {}))
                given[b.name] = x.copy() if n == x.size and not b.writable else np.zeros(n, b.dtype.scalar.numpy)
    return given


def run_emulated(k: Kernels, memory: dict[str, Array], target: Target, folder: Path) -> dict[str, Array]:
    """Kernels one after another under qemu; the buffers afterwards."""
    objects, calls, declared = [], [], []
    names = list(memory)
    for n, f in enumerate(k.funcs):
        symbol, text = kernel_text(legalize_dtype(lower_subbyte(f), LLVM_RULES), target)
        (folder / f"k{n}.o").write_bytes(compile_text(text.replace("define hidden", "define"), target))
        objects.append(str(folder / f"k{n}.o"))
        args = [f"b[{names.index(p.name)}]" for p in f.params if isinstance(p, Buffer)]
        loop = parallel_loop(f)
        hi = int(evaluate_expr(loop[1], {})) if loop else 0
        declared.append(f"void {symbol}({', '.join(['void *'] * len(args))}, long, long);")
        calls.append(f"{symbol}({', '.join(args)}, 0, {hi});")
    sizes = ", ".join(str(memory[n].nbytes) for n in names)
    (folder / "main.c").write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n" + "\n".join(declared) + f"\nconst char lt_zero[4096] __asm__(\"lt.zero\");\nint main(void) {{ long s[] = {{{sizes}}}; void *b[{len(names)}];\n"
        f"for (int i = 0; i < {len(names)}; i++) {{ b[i] = aligned_alloc(64, (s[i] + 8191) / 64 * 64); if (fread(b[i], 1, s[i], stdin) != s[i]) return 1; }}\n"
        + "\n".join(calls) + f"\nfor (int i = 0; i < {len(names)}; i++) fwrite(b[i], 1, s[i], stdout);\nreturn 0; }}\n"
    )  # fmt: skip
    program = str(folder / "main")
    subprocess.run([str(TOOLS[1]), "-static", "-O1", "-o", program, str(folder / "main.c"), *objects, "-lm"], check=True)
    raw = b"".join(np.ascontiguousarray(memory[n]).tobytes() for n in names)
    got = subprocess.run([str(TOOLS[0]), "-cpu", "max", program], input=raw, stdout=subprocess.PIPE, check=True).stdout
    out, at = {}, 0
    for n in names:
        out[n] = np.frombuffer(got, memory[n].dtype, memory[n].size, at)
        at += memory[n].nbytes
    return out


@pytest.mark.parametrize("target", ARM)
@pytest.mark.parametrize(("bits", "act"), CASES)
def test_products_under_emulation(target: str, bits: int, act: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if None in TOOLS:
        pytest.skip("needs qemu-user and gcc-aarch64-linux-gnu")
    rng = np.random.default_rng(bits)
    graph, w = product(72, 192, 64, bits, act, 2, rng)
    t = parse_target(target)
    compute, k = kernels_of(graph, t, monkeypatch)
    x = rng.standard_normal((2, 192)).astype(np.float32)
    out = compute.outs[0]
    got = run_emulated(k, arrays(k, x, out, 2), t, tmp_path)[out].reshape(2, 72)
    assert nmse(got, x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)


@pytest.mark.parametrize(
    ("target", "bits", "template", "instruction"),
    [
        ("cpu:aarch64", 1, "lut_gemv", "tbl\t"), ("cpu:aarch64", 0, "lut_gemv", "tbl\t"), ("cpu:aarch64+dotprod", 4, "quantized_gemv", "sdot"),
        ("cpu:aarch64+dotprod", 8, "quantized_gemv", "sdot"), ("cpu:aarch64+dotprod+i8mm", 4, "quantized_gemv", "usdot"),
        ("cpu:znver4", 4, "quantized_gemv", "vpdpbusd"), ("cpu:alderlake", 3, "quantized_gemv", "vpdpbusd"), ("cpu:znver4", 1, "lut_gemv", "vpshufb"),
    ],
)  # fmt: skip
def test_instructions(target: str, bits: int, template: str, instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot run here: the instruction is in the machine code, and the interpreter gives the right product."""
    rng = np.random.default_rng(bits)
    graph, w = product(64, 128, 64, bits, 32, 2, rng)
    t = parse_target(target)
    compute, k = kernels_of(graph, t, monkeypatch)
    assert k.template == template
    text = assembly(kernel_text(legalize_dtype(lower_subbyte(k.funcs[-1]), LLVM_RULES), t)[1], t)
    assert instruction in text
    x = rng.standard_normal((2, 128)).astype(np.float32)
    out = compute.outs[0]
    given = arrays(k, x, out, 2)
    got = np.asarray(cases.run(k.funcs, {n: a for n, a in given.items() if n != out}, {}, out)).reshape(2, 64)
    assert nmse(got, x.astype(np.float64) @ w.T) < ROUNDED
