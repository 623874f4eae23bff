"""transpose_blocks: columns of a square block become rows and shuffles, with the same values; other loads stay."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir.compute import Compute, axis, pull
from luthier.ir.dtypes import f32
from luthier.ir.expr import const, load, var
from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import Buffer, For, Func, Let, Store, block, walk_stmts
from luthier.passes.loop.transpose_blocks import transpose_blocks
from luthier.passes.loop.unroll import unroll
from luthier.passes.loop.vectorize import vectorize
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.select import build

RNG = np.random.default_rng(0)


def block_of(n: int, step: object, first: int = 0, count: int | None = None) -> Func:
    """``y[i, j] = x[first + i + j * step] + 1`` for count rows of n lanes."""
    x, y = Buffer("x", f32, (const(4096),), "param", False), Buffer("y", f32, (const(4096),), "param")
    i, j = var("i", lo=0, hi=(count or n) - 1), var("j", lo=0, hi=n - 1)
    store = Store(y, (i * n + j,), load(x, (j * step + i + first,)) + const(1.0, f32))  # type: ignore[operator]
    lanes = For(j, const(0), const(n), "vectorize", store)
    dims = () if isinstance(step, int) else (step,)
    return unroll(vectorize(Func("f", (x, y, *dims), For(i, const(0), const(count or n), "unroll", lanes))))


def shuffles(f: Func) -> int:
    return sum(isinstance(s, Let) and s.value.op == "shuffle" for s in walk_stmts(f.body))


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("open_", [False, True])
def test_square_blocks(n: int, open_: bool) -> None:
    step = var("T", lo=n, hi=200) if open_ else 37
    f = block_of(n, step, 5)
    g = transpose_blocks(f)
    assert shuffles(g) == n * {4: 2, 8: 3, 16: 4}[n]
    x = RNG.standard_normal(4096).astype(np.float32)
    got = np.zeros(4096, np.float32)
    run_func(g, {"x": x, "y": got}, {"T": 37} if open_ else {})
    rows = np.arange(n)[:, None] + 5 + np.arange(n)[None] * 37
    np.testing.assert_array_equal(got[: n * n].reshape(n, n), x[rows] + 1)


def test_others_stay() -> None:
    assert shuffles(transpose_blocks(block_of(8, 37, count=7))) == 0  # columns are missing
    assert shuffles(transpose_blocks(block_of(8, 2))) == 0  # rows overlap
    assert shuffles(transpose_blocks(block_of(8, 37, count=20))) == 48  # two whole blocks of three


def test_written_between() -> None:
    """A buffer that the block writes is not read before."""
    y = Buffer("y", f32, (const(4096),), "param")
    i, j = var("i", lo=0, hi=3), var("j", lo=0, hi=3)
    store = Store(y, (i * 4 + j + 1000,), load(y, (j * 50 + i,)))
    f = unroll(vectorize(Func("f", (y,), For(i, const(0), const(4), "unroll", block(For(j, const(0), const(4), "vectorize", store))))))
    assert shuffles(transpose_blocks(f)) == 0


@pytest.mark.parametrize(("c", "n"), [(64, 784), (17, 100), (100, 33), (5, 1000), (256, 1024)])
@pytest.mark.parametrize("open_", [False, True])
def test_transposition(c: int, n: int, open_: bool) -> None:
    rows, cols = (var("C", lo=0, hi=1 << 20), var("N", lo=0, hi=1 << 20)) if open_ else (const(c), const(n))
    x = Buffer("x", f32, (rows, cols), "param", False)
    a, b = axis("a", cols), axis("b", rows)
    out = pull("o", [a, b], load(x, (b.var, a.var)))
    k = build(Compute("t", (x,), (rows, cols) if open_ else (), (out,), ("o",)), Capabilities())
    data, got = RNG.standard_normal((c, n)).astype(np.float32), np.zeros((n, c), np.float32)
    (f,) = k.funcs
    run_func(f, {"x": data, "o": got}, {"C": c, "N": n} if open_ else {})
    np.testing.assert_array_equal(got, data.T)
