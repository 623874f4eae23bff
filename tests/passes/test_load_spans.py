"""load_spans: lanes at known distances within a short span become whole loads and a shuffle, with the same values; others stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from luthier.ir.dtypes import f32
from luthier.ir.expr import Expr, const, load, var, walk
from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import Buffer, For, Func, Store, exprs_of, walk_stmts
from luthier.passes.loop.load_spans import load_spans
from luthier.passes.loop.vectorize import vectorize

N = 8
MAPS: dict[str, tuple[Callable[[Expr], Expr], bool]] = {
    "halves": (lambda j: j // 2, True), "thirds": (lambda j: (j + 5) // 3, False), "period": (lambda j: j % 4 + 3, True), "three": (lambda j: j * 3 + 1, True),
    "four": (lambda j: j * 4, True), "far": (lambda j: j * 5, False), "two": (lambda j: j * 2, False), "one": (lambda j: j // 8, True), "back": (lambda j: const(90) - j // 2, True),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_values(name: str) -> None:
    at, found = MAPS[name]
    x, y = Buffer("x", f32, (const(200),), "param", False), Buffer("y", f32, (const(32),), "param")
    i, j = var("i", lo=0, hi=3), var("j", lo=0, hi=N - 1)
    f = vectorize(Func("f", (x, y), For(i, const(0), const(4), "serial", For(j, const(0), const(N), "vectorize", Store(y, (i * N + j,), load(x, (at(i * N + j),)))))))
    g = load_spans(f)
    assert found == any(e.op == "shuffle" or e.op == "bcast" and e.args[0].op == "load" for s in walk_stmts(g.body) for r in exprs_of(s) for e in walk(r))
    data = np.arange(200, dtype=np.float32)
    want, got = np.zeros(32, np.float32), np.zeros(32, np.float32)
    run_func(f, [data, want])
    run_func(g, [data, got])
    np.testing.assert_array_equal(got, want)
