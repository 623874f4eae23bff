"""Makes ``tests.ops.check`` importable however pytest was started; every operator test also runs compiled, as a slow test."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = str(Path(__file__).resolve().parents[2])
if _ROOT not in sys.path:
    sys.path.append(_ROOT)


@pytest.fixture(autouse=True, params=["interpreted", pytest.param("compiled", marks=pytest.mark.slow)])
def how(request: pytest.FixtureRequest) -> Iterator[None]:
    from tests.ops import check

    check.COMPILED = request.param == "compiled"
    yield
    check.COMPILED = False
