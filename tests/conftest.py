"""Shared by all tests: golden files, a private kernel cache, reproducible hypothesis runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.skips import Skips

GOLDEN = Path(__file__).resolve().parent / "golden"

settings.register_profile("luthier", deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "luthier"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files instead of comparing with them")
    parser.addoption("--all-tools", action="store_true", help="fail when a test is skipped that an installed tool would run (tests/skips.py)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Skips(bool(config.getoption("--all-tools"))), "luthier-skips")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's kernel cache; worker processes inherit the variable."""
    os.environ["LUTHIER_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden("passes/unroll.txt", text)`` compares with ``tests/golden/passes/unroll.txt``; ``--update-golden`` rewrites it."""
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} is missing: look at the text, then run pytest with --update-golden\n{text}"
        assert text == path.read_text(), f"differs from {path}; if the change is meant, run pytest with --update-golden"

    return check
