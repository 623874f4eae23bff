"""A test that is skipped for want of a tool fails a run that promises all tools, and is named with what would bring it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.skips import is_allowed, remedy, summary

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("reason", "tool"),
    [
        ("needs bochs and /usr/share/bochs/BIOS-bochs-latest", "bochs"),
        ("needs qemu-aarch64 and aarch64-linux-gnu-gcc", "qemu-user"),
        ("npm package webgpu is missing", "setup_web.py"),
        ("no Vulkan adapter was found", "mesa-vulkan-drivers"),
        ("could not import 'torch': No module named 'torch'", "torch"),
        ("could not import 'wasmtime': No module named 'wasmtime'", "luthier[dev]"),
    ],
)
def test_a_missing_tool_has_a_remedy(reason: str, tool: str) -> None:
    assert not is_allowed(reason)
    assert tool in remedy(reason)


@pytest.mark.parametrize("reason", ["this machine has AVX-512", "the adapter lacks shader-f16", "this machine cannot run cpu:x86-64-v4"])
def test_what_no_installation_brings_is_allowed(reason: str) -> None:
    assert is_allowed(reason) and remedy(reason) == ""


def test_reasons_are_counted_most_first() -> None:
    lines = summary(Counter({"this machine has AVX-512": 1, "needs bochs": 56}))
    assert lines == ["skipped 56: needs bochs; to run them: apt-get install bochs bochsbios vgabios gcc binutils", "skipped 1: this machine has AVX-512"]


@pytest.mark.parametrize(
    ("reason", "options", "exit_code"),
    [("needs bochs", ["--all-tools"], 1), ("this machine has AVX-512", ["--all-tools"], 0), ("needs bochs", [], 0)],
)
def test_a_run_that_promises_all_tools_fails(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, reason: str, options: list[str], exit_code: int,
) -> None:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile(f"import pytest\ndef test_a():\n    pytest.skip({reason!r})\ndef test_b():\n    pass\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = pytester.runpytest_subprocess(*options, "-p", "no:cacheprovider")
    assert done.ret == exit_code
    done.stdout.fnmatch_lines([f"skipped 1: {reason}*"])
