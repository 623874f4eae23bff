"""Which tests did not run, why, and what would bring them: the last line but one of every run; with ``--all-tools`` an error.

A pytest plugin (``tests/conftest.py`` registers it). ``.ci/run`` installs every tool that a test asks for and passes
``--all-tools``: from then on a test may be skipped only for a reason of :data:`ALLOWED`.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

# Reasons that no installation removes: they are about this processor, this adapter, or the memory that is free.
ALLOWED = (
    r"this machine has AVX-512$",  # refusals are tried on machines without it
    r"this machine cannot run ",  # levels above this processor; the emulators run their kernels
    r"no integer dot products are known for this processor",
    r"no byte shuffles on this machine",
    r"the templates need byte instructions",
    r"th(e|is) adapter (lacks|has no) ",
    r"needs 5 GB of free memory",
    r"NVIDIA.s driver",  # running on a GPU; the emulator runs the same kernels
    r"WGSL has no f64",
    r"benchmarks/models.py makes it",  # real models of some hundred MB, from packages
)
# (reason, what makes the tests run); the first that matches.
REMEDIES = (
    (r"bochs|BIOS", "apt-get install bochs bochsbios vgabios gcc binutils"),
    (r"qemu-aarch64|aarch64-linux-gnu", "apt-get install qemu-user gcc-aarch64-linux-gnu"),
    (r"[Cc]hromium", "apt-get install chromium"),
    (r"[Ff]irefox", "apt-get install firefox-esr"),
    (r"WebKit", "apt-get install webkit2gtk-driver"),
    (r"adapter|[Vv]ulkan", "apt-get install mesa-vulkan-drivers"),
    (r"npm package|playwright|node_modules", "python benchmarks/setup_web.py --tests"),
    (r"node is not installed", "apt-get install nodejs npm"),
    (r"no (C )?compiler|no cc|no c\+\+|C\+\+ compiler", "apt-get install g++"),
    (r"torch|transformers|xgboost", "pip install torch transformers xgboost (make tools)"),
    (r"could not import '([\w.]+)'", r"pip install 'luthier[dev]'"),
)


class Skips:
    """Collects skipped tests and says at the end what they lacked."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.note(report)

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """One test, or one file that was skipped as a whole."""
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.reasons[reason.removeprefix("Skipped: ")] += 1

    def unexpected(self) -> dict[str, int]:
        """{reason: tests} that a machine with all tools would not have."""
        return {reason: n for reason, n in self.reasons.items() if not is_allowed(reason)}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.strict and self.unexpected() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in summary(self.reasons):
            terminalreporter.write_line(line)
        if self.strict and self.unexpected():
            terminalreporter.write_line("--all-tools: a reason above is not one that tests/skips.py allows", red=True)


def is_allowed(reason: str) -> bool:
    """Whether a machine with every tool may still skip a test for ``reason``."""
    return any(re.search(pattern, reason) for pattern in ALLOWED)


def remedy(reason: str) -> str:
    """What would make a test with this reason run; empty where nothing that can be installed does."""
    if is_allowed(reason):
        return ""
    return next((text for pattern, text in REMEDIES if re.search(pattern, reason)), "")


def summary(reasons: Counter[str]) -> list[str]:
    """A line a reason, most tests first."""
    out = []
    for reason, count in reasons.most_common():
        text = remedy(reason)
        out.append(f"skipped {count}: {' '.join(reason.split())}" + (f"; to run them: {text}" if text else ""))
    return out
