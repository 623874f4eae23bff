"""Exact products through the saturating byte instruction: the lists against numpy, no sum out of 16 bits, kernels in the interpreter and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.codegen.targets.target import parse_target
from luthier.schedules.lowbit.byte_chains import LIMIT, PLANES, Chains, chains
from luthier.schedules.lowbit.byte_products import ChainPacking
from luthier.schedules.select import build
from tests.schedules import cases
from tests.test_integer_kernels import bytes_of, conv, conv_ref, matmul, requantized_ref

Array = np.ndarray[Any, Any]


def weights(kind: str, k: int, n: int, rng: np.random.Generator) -> Array:
    """Columns as quantizers leave them (each reaches 127), or the worst ones: all at one end, both ends in turn."""
    if kind == "gauss":
        f = rng.standard_normal((k, n))
        return np.asarray(np.rint(f / np.abs(f).max(0) * 127).astype(np.int8))
    if kind == "uniform":
        return rng.integers(-128, 127, (k, n), endpoint=True).astype(np.int8)
    return np.full((k, n), 127 if kind == "top" else -128, np.int8)


def product(c: Chains, x: Array, k: int, lanes: int, n: int) -> Array:
    """What the lists compute, with every 16-bit sum checked."""
    planes = np.concatenate([x.reshape(-1, 4)[:, p].reshape(-1) for p in PLANES]).astype(np.int64)
    y = np.zeros((len(c.counts) - 1, lanes), np.int64)
    for panel in range(len(y)):
        for i in range(c.counts[panel, 0], c.counts[panel + 1, 0]):
            sums = [_pairs(c.pairs[i, h], planes[c.pair_at[2 * i + h] :][:4]) for h in (0, 1)]
            assert np.abs(np.stack([*sums, sums[0] + sums[1]])).max() < 1 << 15
            y[panel] += (sums[0] + sums[1]).sum(1)
        for i in range(c.counts[panel, 1], c.counts[panel + 1, 1]):
            s = _pairs(c.singles[i], planes[c.single_at[i] :][:4])
            assert np.abs(s).max() < 1 << 15
            y[panel] += s.sum(1)
    return y.reshape(-1)[:n]


def _pairs(w: Array, x: Array) -> Array:
    p = w.astype(np.int64) * x
    return np.stack([p[:, 0] + p[:, 1], p[:, 2] + p[:, 3]], 1)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 40).map(lambda v: 4 * v), n=st.integers(1, 20), planes=st.integers(1, 3), lanes=st.sampled_from([4, 8]),
    kind=st.sampled_from(["gauss", "gauss", "uniform", "top", "bottom"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_lists_are_exact(k: int, n: int, planes: int, lanes: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = weights(kind, k, n, rng)
    c = chains(w, lanes, planes)
    for x in (rng.integers(0, 256, k), np.full(k, 255), np.where(np.arange(k) % 2, 255, 0)):
        np.testing.assert_array_equal(product(c, x, k, lanes, n), x @ w.astype(np.int64))


def test_chains_are_found_where_weights_allow_them() -> None:
    """Weights within 7 bits less one make a chain of any two quads; those of quantizers take fewer operations than 16-bit products."""
    rng = np.random.default_rng(0)
    small = rng.integers(-LIMIT // 4, LIMIT // 4, (64, 16), endpoint=True).astype(np.int8)
    c = chains(small, 8, 1)
    assert len(c.singles) == 0 and len(c.pairs) == 64 // 8 * 2
    assert chains(weights("gauss", 512, 64, rng), 8, 2).operations < 0.8 * 512 * 8


@pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu:x86-64-v2"])
@pytest.mark.parametrize(("m", "k", "n", "xk", "zx"), [(20, 64, 16, "u8", 0), (19, 40, 20, "u8", 7), (33, 24, 9, "i8", -3), (17, 23, 8, "u8", 5)])
def test_matmul(target: str, m: int, k: int, n: int, xk: str, zx: int) -> None:
    rng = np.random.default_rng(k)
    x, w = bytes_of(xk, (m, k), rng), weights("gauss", k, n, rng)
    s = (rng.random(n) * 2e-3).astype(np.float32)
    made = build(matmul(x, w, zx, 0), parse_target(target).caps, {"W": w, "S": s}, template="byte_products", always=True)
    got = cases.run(made.funcs, {"X": x, "W": w, "S": s, **made.packed}, {}, "Y").reshape(m, n)
    np.testing.assert_array_equal(got, requantized_ref((x.astype(np.int32) - zx) @ w.astype(np.int32), s))


@pytest.mark.parametrize(
    ("h", "c", "oc", "kernel", "stride", "pad", "xk", "zx"),
    [(7, 8, 16, 3, 2, 1, "u8", 9), (9, 3, 12, 3, 2, 1, "u8", 0), (6, 16, 8, 1, 2, 0, "i8", 4), (6, 12, 8, 3, 1, 1, "i8", 0)],
)
def test_conv(h: int, c: int, oc: int, kernel: int, stride: int, pad: int, xk: str, zx: int) -> None:
    rng = np.random.default_rng(h)
    x, w = bytes_of(xk, (1, h, h, c), rng), weights("gauss", kernel * kernel * c, oc, rng).reshape(kernel, kernel, c, oc)
    acc = conv_ref(x, w, zx, 0, stride, pad, False)
    s = (rng.random(oc) * 3e-3).astype(np.float32)
    made = build(conv(x, w, zx, 0, stride, pad, False), parse_target("cpu:x86-64-v3").caps, {"W": w, "S": s}, template="byte_products", always=True)
    got = cases.run(made.funcs, {"X": x, "W": w, "S": s, **made.packed}, {}, "Y").reshape(acc.shape)
    np.testing.assert_array_equal(got, requantized_ref(acc, s))


def test_kernels_for_other_weights() -> None:
    """A kernel serves another layer's weights while their lists fit; where they do not, the packing says so."""
    rng = np.random.default_rng(3)
    x, s = bytes_of("u8", (32, 256), rng), (rng.random(32) * 2e-3).astype(np.float32)
    w, w2 = (weights("gauss", 256, 32, rng) for _ in range(2))
    made = build(matmul(x, w, 0, 0), parse_target("cpu:x86-64-v3").caps, {"W": w, "S": s}, template="byte_products", always=True)
    mine = {n: p for n, p in made.packings.items() if isinstance(p, ChainPacking)}
    assert len(mine) == 5 and all(p.fits(w2) for p in mine.values())
    got = cases.run(made.funcs, {"X": x, "S": s, **{n: p.apply(w2 if n in mine else s) for n, p in made.packings.items()}}, {}, "Y").reshape(32, 32)
    np.testing.assert_array_equal(got, requantized_ref(x.astype(np.int32) @ w2.astype(np.int32), s))
    worst = weights("top", 256, 32, rng)
    assert not all(p.fits(worst) for p in mine.values())
    with pytest.raises(ValueError, match="longer lists"):
        for p in mine.values():
            p.apply(worst)


def test_chosen_by_the_weights() -> None:
    """The lists for wide layers, 16-bit products where too many weights are large and where an exact byte instruction is there."""
    rng = np.random.default_rng(4)
    x, s = bytes_of("u8", (64, 512), rng), np.ones(64, np.float32)
    for kind, target, name in (("gauss", "cpu:x86-64-v3", "byte_products"), ("uniform", "cpu:x86-64-v3", "contract_integer"), ("gauss", "cpu:znver4", "contract_integer")):
        w = weights(kind, 512, 64, rng)
        assert build(matmul(x, w, 0, 0), parse_target(target).caps, {"W": w, "S": s}).template == name
