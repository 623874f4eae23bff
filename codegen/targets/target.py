"""Targets as data: what schedules may ask for and what printers need to know. No other file asks for a target by name.

Every kind of target is one file, ``codegen/target_KIND.py``, entered in ``KINDS``. It has ``parse(text) -> Target`` for what
follows ``KIND:`` (empty for the kind alone; TargetError for what it does not know) and ``KNOWN``, the names it takes. What turns
a Program into a Module for a kind is entered in ``luthier/targets.py``.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import TargetError
from luthier.schedules.base.capabilities import Capabilities

KINDS = {kind: f"luthier.codegen.targets.{kind}" for kind in ("cpu", "wasm", "webgpu", "cuda")}


@dataclass(frozen=True, slots=True)
class Target:
    """``name``: what the user wrote. ``triple``, ``cpu``, ``features``: LLVM's words, empty where LLVM has no part. ``caps``: what
    schedules may use. ``flags``: the processor features that are on. ``kind``: the entry of the registry that made it."""

    name: str
    triple: str
    cpu: str
    features: str
    caps: Capabilities
    flags: frozenset[str] = frozenset()
    kind: str = "cpu"

    @property
    def is_x86(self) -> bool:
        return self.triple.startswith("x86_64")

    @property
    def key(self) -> str:
        """What decides the machine code: part of every cache key."""
        return f"{self.triple}|{self.cpu}|{self.features}"

    def missing_here(self) -> frozenset[str]:
        """Features that this machine lacks: code for the target runs here when there are none."""
        if not self.triple:
            return frozenset({self.name})
        h = host()
        if h.triple.split("-")[0] != self.triple.split("-")[0]:
            return frozenset({self.triple})
        return self.flags - h.flags


@functools.lru_cache(maxsize=64)
def parse_target(text: str = "cpu") -> Target:
    """``KIND`` or ``KIND:DETAILS``, as the files of the kinds say. Raises TargetError naming the known ones."""
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        names = [n for m in KINDS.values() for n in importlib.import_module(m).KNOWN]
        raise TargetError(f"no target {text!r}", hint="known: " + ", ".join(names))
    target = importlib.import_module(KINDS[kind]).parse(rest)
    assert isinstance(target, Target)
    return target


def host() -> Target:
    """This machine, by what LLVM detects. Raises TargetError on an architecture without a code generator."""
    return parse_target("cpu")


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, limited by the control group's quota."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            n = min(n, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return max(1, n)
    return max(1, n)
