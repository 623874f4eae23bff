"""Templates: what `build` makes equals numpy, for static and run-time extents, several vector widths, packed and unpacked weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cases

from luthier.ir.compute import Compute, Pull, axis, sum_
from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, var
from luthier.ir.loop import Buffer
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.select import build

N, M = var("N", lo=0), var("M", lo=0)
SSE = Capabilities(vector_bits=128, registers=16)
AVX2 = Capabilities(vector_bits=256, registers=16)
AVX512 = Capabilities(vector_bits=512, registers=32)
SCALAR = Capabilities(vector_bits=32, registers=16)
SIZES = {"N": 13, "M": 21}


def check(case: cases.Case, caps: Capabilities, constants: tuple[str, ...] = (), template: str | None = None, tol: float = 3e-5) -> None:
    comp, arrays, ref = case
    k = build(comp, caps, {n: arrays[n] for n in constants})
    if template is not None:
        assert k.template == template
    got = cases.run(k.funcs, {**arrays, **k.packed}, SIZES, "C")
    np.testing.assert_allclose(got, ref.reshape(-1), rtol=tol, atol=tol)
    assert not [f.attrs["scalar_loops"] for f in k.funcs if f.attrs.get("scalar_loops")]


@pytest.mark.parametrize("caps", [SSE, AVX2, AVX512], ids=["128", "256", "512"])
@pytest.mark.parametrize("mnk", [(6, 16, 8), (14, 40, 20), (7, 33, 9), (1, 48, 64), (25, 8, 30)], ids=str)
def test_matmul_packed(mnk: tuple[int, int, int], caps: Capabilities) -> None:
    check(cases.matmul(*mnk, SIZES, np.random.default_rng(1)), caps, ("B",))


@pytest.mark.parametrize("shape", [(N, 24, 16), (14, N, 16), (14, 24, N), (N, M, 9), (N, M, N)], ids=["m", "n", "k", "mn", "mnk"])
def test_matmul_runtime_extents(shape: tuple[object, ...]) -> None:
    check(cases.matmul(*shape, SIZES, np.random.default_rng(2)), AVX2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(N, M, 24, 16), (N, 5, 24, M), (2, M, N, 16)], ids=["rows", "k", "n"])
def test_rows_of_two_axes_without_epilogue(shape: tuple[object, ...], packed: bool) -> None:
    """The sum is the output itself (a parameter): its tile has rows of the merged axis all the same."""
    b, m, n, k = shape
    x, w, o = Buffer.of("A", f32, (b, m, k)), Buffer.of("B", f32, (k, n)), Buffer.of("C", f32, (b, m, n))
    i, j, c, r = axis("b", b), axis("m", m), axis("n", n), axis("k", k)
    comp = Compute("mm", (x, w), cases.dims_of(*shape), (Pull(o, (i, j, c), sum_(r, x[i.var, j.var, r.var] * w[r.var, c.var])),), ("C",))
    size = [SIZES[e.attr[0]] if isinstance(e, Expr) else e for e in shape]
    rng = np.random.default_rng(9)
    a, u = rng.standard_normal((*size[:2], size[3])).astype("f"), rng.standard_normal((size[3], size[2])).astype("f")
    check((comp, {"A": a, "B": u}, a.astype("d") @ u), AVX2, ("B",) if packed and not isinstance(n, Expr) and not isinstance(k, Expr) else (), "contract")


def test_matmul_no_lanes() -> None:
    check(cases.matmul(9, 20, 15, SIZES, np.random.default_rng(3)), SCALAR, ("B",))


@pytest.mark.parametrize("c", [(8, 8, 16, 3, 1, 1), (9, 8, 16, 3, 2, 1), (7, 16, 24, 1, 1, 0), (6, 5, 7, 3, 1, 0), (7, 16, 20, 1, 2, 0)], ids=str)
def test_conv(c: tuple[int, int, int, int, int, int]) -> None:
    check(cases.conv(*c, np.random.default_rng(4)), AVX2, ("W",))


@pytest.mark.parametrize("c", [(8, 16, 16, 3, 1, 1), (9, 16, 16, 3, 2, 1), (6, 24, 24, 5, 1, 2), (5, 8, 8, 3, 1, 1)], ids=str)
def test_depthwise(c: tuple[int, int, int, int, int, int]) -> None:
    check(cases.conv(*c, np.random.default_rng(5), depthwise=True), AVX2, ("W",))


@pytest.mark.parametrize("shape", [(6, 43), (6, 64), (N, 43), (6, N), (N, M), (1, 5)], ids=["6x43", "6x64", "Nx43", "6xN", "NxM", "1x5"])
def test_softmax(shape: tuple[object, ...]) -> None:
    check(cases.softmax(*shape, SIZES, np.random.default_rng(6)), AVX2, template="rowwise")


def test_attention() -> None:
    rng = np.random.default_rng(7)
    check(cases.attention(2, 3, 10, 20, 16, SIZES, rng), AVX2, template="attention")
    check(cases.attention(1, 2, 13, 37, 8, SIZES, rng), AVX512)
    check(cases.attention(1, 2, 1, 37, 16, SIZES, rng), AVX2)


def test_attention_runtime_lengths() -> None:
    check(cases.attention(1, 2, N, M, 8, SIZES, np.random.default_rng(8)), AVX2)
