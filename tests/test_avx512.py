"""Machine code of processors with AVX-512, VNNI and VBMI, run in bochs (left out where it is missing)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.codegen.targets.target import parse_target
from luthier.ir.compute import Compute
from luthier.schedules.select import build
from tests.emulated import Array, arrays, kernels_of, missing, run_emulated
from tests.schedules import cases
from tests.test_integer_kernels import bytes_of, conv, conv_ref, matmul, requantized_ref
from tests.test_lowbit import EXACT, ROUNDED, nmse, product

TARGETS = ["cpu:x86-64-v4", "cpu:cascadelake", "cpu:icelake-server"]
pytestmark = pytest.mark.skipif(bool(missing(parse_target(TARGETS[0]))), reason=missing(parse_target(TARGETS[0])))


def run(c: Compute, given: dict[str, Array], constants: list[str], target: str, folder: Path) -> Array:
    """The output of a Compute of fixed sizes."""
    t = parse_target(target)
    k = build(c, t.caps, {n: given[n] for n in constants})
    (out,) = c.outs
    memory = arrays(k, np.zeros(0), out, 0)
    memory |= {n: np.ascontiguousarray(a).reshape(-1) for n, a in given.items() if n in memory}
    return run_emulated(k, memory, t, folder)[out]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("bits", "act", "group"), [(0, 32, 64), (1, 32, 32), (1, 32, 64), (2, 32, 64), (3, 32, 64), (4, 32, 64), (5, 32, 32), (8, 32, 64), (4, 0, 64), (1, 0, 64)])
def test_low_bits(target: str, bits: int, act: int, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(bits)
    graph, w = product(72, 192, group, bits, act, 2, rng)
    t = parse_target(target)
    compute, k = kernels_of(graph, t, monkeypatch)
    x = rng.standard_normal((2, 192)).astype(np.float32)
    out = compute.outs[0]
    got = run_emulated(k, arrays(k, x, out, 2), t, tmp_path)[out].reshape(2, 72)
    assert nmse(got, x.astype(np.float64) @ w.T) < (ROUNDED if act else EXACT)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kinds", ["u8 i8", "i8 i8", "u8 u8"])
def test_integer_product(target: str, kinds: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    xk, wk = kinds.split()
    x, w = bytes_of(xk, (9, 131), rng), bytes_of(wk, (131, 75), rng)
    s = (rng.random(75) * 2e-3).astype(np.float32)
    got = run(matmul(x, w, 7, 3 if wk == "u8" else 0), {"X": x, "W": w, "S": s}, ["W", "S"], target, tmp_path)
    want = requantized_ref((x.astype(np.int32) - 7) @ (w.astype(np.int32) - (3 if wk == "u8" else 0)), s)
    np.testing.assert_array_equal(got.reshape(want.shape), want)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("c", "oc", "k", "stride", "depthwise"), [(16, 48, 3, 1, False), (24, 40, 1, 2, False), (40, 40, 3, 1, True), (40, 40, 3, 2, True)])
def test_integer_convolution(target: str, c: int, oc: int, k: int, stride: int, depthwise: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    x, w = bytes_of("u8", (1, 9, 11, c), rng), bytes_of("i8", (k, k, 1 if depthwise else c, oc), rng)
    want = conv_ref(x, w, 9, 0, stride, k // 2, depthwise)
    s = (rng.random(oc) * 3e-3).astype(np.float32)
    got = run(conv(x, w, 9, 0, stride, k // 2, depthwise), {"X": x, "W": w, "S": s}, ["W", "S"], target, tmp_path)
    np.testing.assert_array_equal(got.reshape(want.shape), requantized_ref(want, s))


FLOATS: dict[str, Callable[[Any], cases.Case]] = {
    "matmul": lambda rng: cases.matmul(13, 75, 31, {}, rng),
    "conv": lambda rng: cases.conv(9, 16, 40, 3, 1, 1, rng),
    "depthwise": lambda rng: cases.conv(9, 48, 48, 3, 2, 1, rng, depthwise=True),
    "softmax": lambda rng: cases.softmax(6, 77, {}, rng),
    "attention": lambda rng: cases.attention(1, 2, 13, 37, 8, {}, rng),
}


@pytest.mark.parametrize("case", FLOATS)
def test_floats(case: str, tmp_path: Path) -> None:
    compute, given, want = FLOATS[case](np.random.default_rng(3))
    got = run(compute, given, [n for n in ("B", "W") if n in given], "cpu:x86-64-v4", tmp_path)
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=2e-5, atol=2e-5)
