"""CPUs: a triple, a processor, its features and the numbers that schedules may ask for.

``cpu`` is this machine; ``cpu:x86-64-v2``, ``cpu:x86-64-v3``, ``cpu:x86-64-v4`` and ``cpu:aarch64`` are portable levels; a
processor of ``_NAMED`` (``cpu:znver3``) is tuned for. Features are added and removed with ``cpu:x86-64-v4+avx512vnni`` or
``cpu:znver3-fma``. No instruction outside the feature list is ever emitted: the list is what the code generator is given.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from luthier.codegen.targets.target import Target
from luthier.errors import TargetError
from luthier.schedules.base.capabilities import Capabilities

_V2 = frozenset("sse sse2 sse3 ssse3 sse4.1 sse4.2 popcnt cx16 sahf fxsr mmx cmov cx8".split())
_V3 = _V2 | frozenset("avx avx2 bmi bmi2 f16c fma lzcnt movbe xsave".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
_ICE = frozenset("avx512vnni avx512vbmi avx512vbmi2 avx512bitalg avx512vpopcntdq".split())
_LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}
_NAMED: dict[str, frozenset[str]] = {
    "haswell": _V3,
    "skylake": _V3,
    "alderlake": _V3 | {"avxvnni"},
    "znver1": _V3 | {"sse4a"},
    "znver2": _V3 | {"sse4a"},
    "znver3": _V3 | {"sse4a", "vaes", "vpclmulqdq"},
    "znver4": _V4 | _ICE | {"avx512bf16"},
    "znver5": _V4 | _ICE | {"avx512bf16", "avxvnni"},
    "skylake-avx512": _V4,
    "cascadelake": _V4 | {"avx512vnni"},
    "icelake-server": _V4 | _ICE,
    "sapphirerapids": _V4 | _ICE | {"avx512bf16", "avx512fp16", "avxvnni"},
}  # fmt: skip
# processor feature -> what schedules call it (Capabilities.features)
_FACTS = {
    "fma": "fma", "f16c": "f16", "avx512vbmi": "vbmi", "avx512bf16": "bf16dot",
    "avx2": "masked_store", "avx512vl": "wide_masks", "ssse3": "bytes_shuffle", "popcnt": "popcnt",
}  # fmt: skip
_ALL = frozenset().union(_V4, *_NAMED.values())
KNOWN = ("cpu", *(f"cpu:{k}" for k in (*_LEVELS, *_NAMED, "aarch64")))


def parse(rest: str) -> Target:
    """LEVEL or PROCESSOR, with ``+feature`` and ``-feature``; this machine when empty. Raises TargetError naming the known ones."""
    known = "known: " + ", ".join(KNOWN)
    if rest in ("", "native"):
        return host()
    name = max((n for n in (*_LEVELS, *_NAMED, "aarch64") if rest == n or rest.startswith((n + "+", n + "-"))), key=len, default="")
    if not name:
        raise TargetError(f"no CPU {rest!r}", hint=known)
    tail = rest[len(name) :]
    edits = re.findall(r"[+-][a-z0-9._]+", tail)
    if "".join(edits) != tail:
        raise TargetError(f"cannot read {tail!r} in the target 'cpu:{rest}'", hint="write cpu:NAME+feature-feature")
    on, off = {e[1:] for e in edits if e[0] == "+"}, {e[1:] for e in edits if e[0] == "-"}
    if name == "aarch64":
        return _aarch64(f"cpu:{rest}", frozenset({"neon", "fp-armv8"} | on) - off)
    flags = (_LEVELS.get(name) or _NAMED[name]) | on
    if off & {"avx2", "fma"}:
        off |= {f for f in flags if f.startswith("avx512")}
    return _x86(f"cpu:{rest}", "x86-64" if name in _LEVELS else name, flags - off)


@functools.lru_cache(maxsize=1)
def host() -> Target:
    """This machine, by what LLVM detects. Raises TargetError on an architecture without a code generator."""
    import platform

    import llvmlite.binding as llvm

    machine = platform.machine().lower()
    have = frozenset(k for k, v in llvm.get_host_cpu_features().items() if v)
    if machine in ("aarch64", "arm64"):
        return _aarch64("cpu", have | {"neon", "fp-armv8"})
    if machine not in ("x86_64", "amd64"):
        raise TargetError(f"no code generator for {machine}", hint="x86_64 and aarch64 are supported")
    if "sse4.2" not in have:
        raise TargetError("this CPU is older than x86-64-v2", hint="name another target, such as cpu:x86-64-v3")
    return _x86("cpu", llvm.get_host_cpu_name(), have)


def _x86(name: str, cpu: str, flags: frozenset[str]) -> Target:
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    bits = 512 if wide else 256 if {"avx2", "fma"} <= flags else 128
    facts = {v for k, v in _FACTS.items() if k in flags} | {"pmaddwd"}
    if ("avx512vnni" if wide else "avxvnni") in flags:  # the form in the registers that kernels use
        facts.add("vnni")
    if not wide:
        facts.discard("bf16dot")
    l1, l2, l3 = _caches() if name == "cpu" else (32 << 10, (1 << 20) if wide else (512 << 10), 16 << 20)
    caps = Capabilities(vector_bits=bits, registers=32 if wide else 16, features=frozenset(facts), l1=l1, l2=l2, l3=l3, shuffles=True)
    words = [f"+{f}" for f in sorted(flags)]
    if cpu != "x86-64":
        words += [f"-{f}" for f in sorted(_ALL - flags)]
    if wide:
        words.append("-prefer-256-bit")
    return Target(name, "x86_64-unknown-linux-gnu", cpu, ",".join(words), caps, flags)


def _aarch64(name: str, flags: frozenset[str]) -> Target:
    facts = {"fma", "f16", "bytes_shuffle"} | ({"dot"} if "dotprod" in flags else set()) | ({"i8mm"} if "i8mm" in flags else set())
    caps = Capabilities(vector_bits=128, registers=32, features=frozenset(facts), l1=64 << 10, l2=512 << 10, l3=4 << 20, shuffles=True)
    return Target(name, "aarch64-unknown-linux-gnu", "generic", ",".join(f"+{f}" for f in sorted(flags)), caps, flags)


def _caches() -> tuple[int, int, int]:
    """Data cache sizes of the first core in bytes, where the operating system tells them."""
    sizes = {1: 32 << 10, 2: 512 << 10, 3: 16 << 20}
    root = Path("/sys/devices/system/cpu/cpu0/cache")
    for d in sorted(root.glob("index*")) if root.is_dir() else ():
        try:
            if (d / "type").read_text().strip() == "Instruction":
                continue
            text = (d / "size").read_text().strip()
            sizes[int((d / "level").read_text())] = int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return sizes[1], sizes[2], sizes[3]
