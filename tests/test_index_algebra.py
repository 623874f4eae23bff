"""Index arithmetic against plain integers: every rule must hold for every value that the variables may take."""

import itertools

import pytest

from luthier.ir.dtypes import index
from luthier.ir.expr import Expr, const, linear, maximum, minimum, prove, rejoin, substitute, var


def value(e: Expr, env: dict[Expr, int]) -> int:
    e = substitute(e, {v: const(k) for v, k in env.items()})
    assert e.op == "const", e
    return int(e.attr)


def dims() -> tuple[Expr, Expr]:
    return var("m", index, 0), var("n", index, 0)


def fused(m: Expr, n: Expr) -> Expr:
    """A loop variable over m * n."""
    return var("x", index, 0, m * n - 1)


def points(m: Expr, n: Expr, x: Expr):  # type: ignore[no-untyped-def]
    for a, b in itertools.product(range(4), range(4)):
        for k in range(a * b):
            yield {m: a, n: b, x: k}


def test_parts_of_a_fused_index_are_below_their_extents() -> None:
    m, n = dims()
    x = fused(m, n)
    assert prove(x // n < m)
    assert prove(x % n < n)
    assert minimum(x // n, m - 1) is x // n
    assert minimum(n - 1, x % n) is x % n
    assert maximum(x % n, n - 1) is n - 1
    for env in points(m, n, x):
        assert 0 <= value(x // n, env) < env[m] and 0 <= value(x % n, env) < env[n]


def test_what_does_not_follow_is_not_proved() -> None:
    m, n = dims()
    x, free = fused(m, n), var("y", index, 0)
    for claim in (free // n < m, free % n < n, x // m < n - 1, x % n < m, x // n < m - 1, (x + 1) // n < m, (x + n) // n < m):
        assert not prove(claim), claim
    assert minimum(x // n, m - 2) is not x // n


@pytest.mark.parametrize("scale", [1, 3])
def test_rejoin_is_the_same_number(scale: int) -> None:
    m, n = dims()
    x = fused(m, n)
    k = var("k", index, 0, 4)
    e = (x // n * n + x % n) * (5 * scale) + k
    r = rejoin(e)
    assert r is x * (5 * scale) + k
    for env in points(m, n, x):
        assert value(e, {**env, k: 2}) == value(r, {**env, k: 2})


def test_rejoin_by_a_product_of_dims_and_by_a_number() -> None:
    m, n = dims()
    x = fused(m, n)
    d = n * 7
    assert rejoin((x // d) * d * 2 + x % d * 2) is x * 2
    assert rejoin((x // 6) * 6 * m + x % 6 * m) is x * m
    other = (x // n) * n * 2 + x % n  # coefficients differ: nothing to join
    assert linear(rejoin(other)) == linear(other)
