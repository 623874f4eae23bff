"""Packing of constants against its definition: element by element, zeros where a block overhangs."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.ir.compute import Compute
from luthier.ir.dtypes import f32
from luthier.ir.loop import Buffer
from luthier.schedules.base.schedule import Packing


@st.composite
def packings(draw: st.DrawFn) -> tuple[Packing, tuple[int, ...]]:
    rank = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=rank, max_size=rank)))
    order = tuple(draw(st.permutations(range(rank))))
    tiled = draw(st.lists(st.sampled_from(range(rank)), unique=True, max_size=2))
    tile = tuple((d, draw(st.integers(1, 5))) for d in tiled)
    return Packing("w", order, tile, Compute("none", (), (), (), ()), Buffer("w.pack", f32, ())), shape


@settings(deadline=None, max_examples=150)
@given(packings())
def test_packed_elements_are_where_they_belong(case: tuple[Packing, tuple[int, ...]]) -> None:
    p, shape = case
    a = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    tile = dict(p.tile)
    want = np.zeros([-(-shape[d] // tile.get(d, 1)) for d in p.order] + [t for _, t in p.tile], np.float32)
    for at in itertools.product(*(range(n) for n in shape)):
        want[tuple(at[d] // tile.get(d, 1) for d in p.order) + tuple(at[d] % t for d, t in p.tile)] = a[at]
    np.testing.assert_array_equal(p.apply(a), want)
