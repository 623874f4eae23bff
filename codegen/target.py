"""Targets: a name, what LLVM must be told, and capabilities as data. No other file asks for a target by name.

``cpu`` is this machine; ``cpu:x86-64-v3``, ``cpu:znver4``, ``cpu:aarch64`` name another one. To add a CPU add a row to ``_LEVELS``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from luthier.ir.errors import TargetError
from luthier.schedules.capabilities import Capabilities

_V2 = "+cx8,+cmov,+mmx,+fxsr,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+sahf"
_V3 = _V2 + ",+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe,+xsave"
_V4 = _V3 + ",+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"


@dataclass(frozen=True, slots=True)
class Target:
    """``triple``, ``cpu``, ``features``: LLVM's; ``caps``: what schedules may use."""

    name: str
    triple: str
    cpu: str
    features: str
    caps: Capabilities


def _caps(bits: int, registers: int, *features: str) -> Capabilities:
    return Capabilities(vector_bits=bits, registers=registers, features=frozenset(features))


_LEVELS: dict[str, tuple[str, str, str, Capabilities]] = {
    "x86-64-v2": ("x86_64-unknown-linux-gnu", "x86-64", _V2, _caps(128, 16, "popcnt")),
    "x86-64-v3": ("x86_64-unknown-linux-gnu", "x86-64", _V3, _caps(256, 16, "fma", "f16", "masked_store", "gather", "popcnt")),
    "x86-64-v4": ("x86_64-unknown-linux-gnu", "x86-64", _V4, _caps(512, 32, "fma", "f16", "masked_store", "gather", "popcnt", "wide_masks")),
    "aarch64": ("aarch64-unknown-linux-gnu", "generic", "+neon,+fp-armv8", _caps(128, 32, "fma", "popcnt")),
}
_EXTRA = {"avx512vnni": "vnni", "avxvnni": "vnni", "avx512bf16": "bf16dot", "avx512vbmi": "vbmi"}


@functools.lru_cache(maxsize=8)
def parse_target(name: str) -> Target:
    """``cpu``, ``cpu:LEVEL`` or ``cpu:CPU`` to a Target. Raises TargetError naming the known ones."""
    kind, _, level = name.partition(":")
    if kind != "cpu":
        raise TargetError(f"no target {name!r}", hint=f"known: cpu, {', '.join('cpu:' + k for k in _LEVELS)}")
    if not level:
        return host()
    if level in _LEVELS:
        triple, cpu, features, caps = _LEVELS[level]
        return Target(name, triple, cpu, features, caps)
    raise TargetError(f"no CPU level {level!r}", hint=f"known: {', '.join(_LEVELS)}; plain 'cpu' is this machine")


@functools.lru_cache(maxsize=1)
def host() -> Target:
    """This machine, by what LLVM detects."""
    import llvmlite.binding as llvm

    triple = llvm.get_default_triple()
    feats = llvm.get_host_cpu_features()
    has = {k for k, v in feats.items() if v}
    if triple.startswith("aarch64"):
        base = _LEVELS["aarch64"]
    elif {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= has:
        base = _LEVELS["x86-64-v4"]
    elif {"avx2", "fma"} <= has:
        base = _LEVELS["x86-64-v3"]
    elif "sse4.2" in has:
        base = _LEVELS["x86-64-v2"]
    else:
        raise TargetError("this CPU is older than x86-64-v2", hint="name another target, such as cpu:x86-64-v3")
    from dataclasses import replace

    caps = replace(base[3], features=base[3].features | {v for k, v in _EXTRA.items() if k in has})
    return Target("cpu", triple, llvm.get_host_cpu_name(), feats.flatten(), caps)
