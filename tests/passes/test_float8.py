"""8-bit floats on the bits, against ml_dtypes: every code, and f32 values around every boundary."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from luthier.ir.dtypes import DType, f8e4m3fn, f8e4m3fnuz, f8e5m2, f8e5m2fnuz, f8e8m0, f32, u32
from luthier.ir.expr import Expr, var
from luthier.ir.interpret.loops import evaluate_expr
from luthier.passes.loop.float8 import DECODE, ENCODE

TYPES = {
    f8e4m3fn: ml_dtypes.float8_e4m3fn, f8e4m3fnuz: ml_dtypes.float8_e4m3fnuz, f8e5m2: ml_dtypes.float8_e5m2,
    f8e5m2fnuz: ml_dtypes.float8_e5m2fnuz, f8e8m0: ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


def values(e: Expr, x: Expr, xs: Any) -> Any:
    return np.asarray(evaluate_expr(e, {x.attr[0]: xs})).reshape(-1)


@pytest.mark.parametrize("t", TYPES, ids=str)
def test_every_code(t: DType) -> None:
    codes = np.arange(256, dtype=np.uint8)
    x = var("x", u32)
    got = values(DECODE[t](x), x, codes.astype(np.uint32)).astype(np.float32)
    want = codes.view(TYPES[t]).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()


@pytest.mark.parametrize("t", [t for t in TYPES if t is not f8e8m0], ids=str)
def test_encode_rounds_as_ml_dtypes(t: DType) -> None:
    codes = np.arange(256, dtype=np.uint8).view(TYPES[t]).astype(np.float32)
    exact = np.sort(codes[np.isfinite(codes)])
    middle = (exact[1:] + exact[:-1]) / 2
    near = [f(v, np.float32(d)) for v in (exact, middle) for f, d in ((np.nextafter, -np.inf), (np.nextafter, np.inf))]
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-30, -1e-30, 463.9, 464, 464.1, 1e5, 61440, 61439, 3e38], np.float32)
    xs = np.concatenate([exact, middle, *near, special]).astype(np.float32)
    x = var("x", f32)
    got = values(ENCODE[t](x), x, xs).astype(np.uint8).view(TYPES[t]).astype(np.float32)
    with np.errstate(all="ignore"):
        want = xs.astype(TYPES[t]).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()


def test_powers_of_two() -> None:
    codes = np.arange(256, dtype=np.uint8)
    floats = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    x = var("x", f32)
    np.testing.assert_array_equal(values(ENCODE[f8e8m0](x), x, floats), codes)
