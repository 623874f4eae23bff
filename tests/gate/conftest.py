"""Fixtures of the gate."""

from __future__ import annotations

import os

import pytest

from luthier.errors import TargetError


@pytest.fixture(scope="session")
def adapter() -> None:
    """A WebGPU adapter; a software one (lavapipe) will do."""
    pytest.importorskip("wgpu")
    from luthier.codegen.gpu.wgsl_run import device

    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    try:
        device()
    except TargetError as e:
        pytest.skip(str(e))
