"""Low-bit kernels of AArch64: their instructions, and their results under qemu's user mode (left out where it or the cross compiler
is missing)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from luthier.codegen.llvm.backend import assembly, kernel_text
from luthier.codegen.llvm.printer import legalize_llvm
from luthier.codegen.targets.target import parse_target
from tests.emulated import arrays, kernels_of, missing, run_emulated
from tests.schedules import cases
from tests.test_lowbit import EXACT, ROUNDED, nmse, product

ARM = ["cpu:aarch64", "cpu:aarch64+dotprod", "cpu:aarch64+dotprod+i8mm"]
CASES = [(0, 32), (1, 32), (2, 32), (3, 32), (4, 32), (5, 32), (8, 32), (4, 0)]


@pytest.mark.parametrize("target", ARM)
@pytest.mark.parametrize(("bits", "act"), CASES)
def test_products_under_emulation(target: str, bits: int, act: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = parse_target(target)
    if missing(t):
        pytest.skip(missing(t))
    rng = np.random.default_rng(bits)
    graph, w = product(72, 192, 64, bits, act, 2, rng)
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
    text = assembly(kernel_text(legalize_llvm(k.funcs[-1]), t)[1], t)
    assert instruction in text
    x = rng.standard_normal((2, 128)).astype(np.float32)
    out = compute.outs[0]
    given = arrays(k, x, out, 2)
    got = np.asarray(cases.run(k.funcs, {n: a for n, a in given.items() if n != out}, {}, out)).reshape(2, 64)
    assert nmse(got, x.astype(np.float64) @ w.T) < ROUNDED
