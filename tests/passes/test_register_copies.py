"""Register variables that are only copied, and rounds under one condition: gone after the pass, the same numbers in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir.interpret.loops import run_func
from luthier.ir.loop import Alloc, Func, If, walk_stmts
from luthier.ir.parser import parse_func
from luthier.passes.loop.promote_locals import promote_locals
from luthier.passes.loop.unroll import unroll

COPIED = """func f(x: f32[4] readonly, y: f32[4]):
  alloc t: f32[4] local:
    alloc r: f32[4] local:
      r[0] = 1.0:f32
      r[1] = 2.0:f32
      for i in 0..4:
        r[0] = r[0] + x[i]
        r[1] = r[1] * x[i]
      t[0] = r[0]
      t[1] = r[1]
    y[0] = t[0]
    y[1] = t[1] + t[0]
"""


def results(f: Func, x: np.ndarray) -> np.ndarray:
    y = np.zeros(4, np.float32)
    run_func(f, {"x": x, "y": y})
    return y


def allocated(f: Func) -> set[str]:
    return {s.buf.name for s in walk_stmts(f.body) if isinstance(s, Alloc)}


def test_an_accumulator_that_is_only_copied_is_the_tile() -> None:
    f = parse_func(COPIED)
    g = promote_locals(f)
    assert allocated(g) == {"t.0", "t.1"}
    x = np.array([1.5, 2, -3, 4], np.float32)
    np.testing.assert_array_equal(results(f, x), results(g, x))
    np.testing.assert_array_equal(results(g, x)[:2], [1 + x.sum(), 2 * x.prod() + 1 + x.sum()])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    y[1] = t[1] + t[0]\n", "    t[1] = t[0]\n    y[1] = t[1] + t[0]\n"),  # written by something else as well
        ("      r[0] = 1.0:f32\n", "      t[0] = 7.0:f32\n      r[0] = 1.0:f32\n      y[2] = t[0]\n"),  # read before the copy
        ("      t[1] = r[1]\n", "      t[1] = r[1]\n      r[0] = 3.0:f32\n      y[3] = r[0]\n"),  # the copies are not the end
        ("      t[0] = r[0]\n      t[1] = r[1]\n", "      t[0] = r[1]\n      t[1] = r[0]\n"),  # the pieces change places
    ],
)
def test_other_copies_stay(old: str, new: str) -> None:
    assert old in COPIED
    f = parse_func(COPIED.replace(old, new))
    g = promote_locals(f)
    assert allocated(g) == {"t.0", "t.1", "r.0", "r.1"}
    x = np.array([0.5, 3, -1, 2], np.float32)
    np.testing.assert_array_equal(results(f, x), results(g, x))


def test_rounds_share_a_condition_and_lose_one_that_is_decided() -> None:
    f = parse_func("""func f(x: f32[4] readonly, y: f32[4], n: index):
  for j in 0..2:
    for i in 0..2 unroll:
      if i < 1:
        y[i] = x[0]
      if j < n:
        y[i + 2] = x[j] + x[i]
""")
    g = unroll(f)
    assert sum(isinstance(s, If) for s in walk_stmts(g.body)) == 1, str(g)
    joined = unroll(parse_func("""func f(x: f32[4] readonly, y: f32[4], n: index):
  for j in 0..2:
    for i in 0..4 unroll:
      if j < n:
        y[i] = x[j] + x[i]
"""))
    assert sum(isinstance(s, If) for s in walk_stmts(joined.body)) == 1, str(joined)
    x = np.array([1, 2, 3, 4], np.float32)
    for n in range(3):
        y, z = np.zeros(4, np.float32), np.zeros(4, np.float32)
        run_func(joined, {"x": x, "y": y}, {"n": n})
        if n:
            z = x[n - 1] + x
        np.testing.assert_array_equal(y, z)


def test_a_condition_that_reads_memory_is_asked_again() -> None:
    f = parse_func("""func f(x: f32[4] readonly, y: f32[4]):
  for i in 0..3 unroll:
    if y[0] < 1.0:f32:
      y[0] = y[0] + x[0]
""")
    g = unroll(f)
    assert sum(isinstance(s, If) for s in walk_stmts(g.body)) == 3
    np.testing.assert_array_equal(results(g, np.array([0.75, 0, 0, 0], np.float32))[:1], [1.5])
