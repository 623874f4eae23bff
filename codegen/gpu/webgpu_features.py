"""Optional features of WebGPU: which there are, how a shader asks for one, and how implementations differ in that.

A shader's text holds no directives. What it needs stands beside it, and whoever gives it to an implementation writes the directives
of that implementation's :class:`Dialect` before it: ``enable subgroups;`` is required by Dawn and refused by wgpu-native, which has
another name for the feature, too. Needs neither ``onnx`` nor ``luthier.ir``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

F16 = "shader-f16"
SUBGROUPS = "subgroups"
PACKED_DOT = "packed_4x8_integer_dot_product"

ENABLE: Mapping[str, str] = {F16: "f16", SUBGROUPS: "subgroups"}  # features of a device: what ``enable`` calls them
LANGUAGE = (PACKED_DOT,)  # features of the language: on wherever they exist, without a directive
ALL = (*ENABLE, *LANGUAGE)

_HEAD = "@group(0) @binding(0) var<storage, read_write> o: array<u32>;\n@compute @workgroup_size(1)\nfn main() { "
PROBES: Mapping[str, str] = {PACKED_DOT: _HEAD + "o[0] = u32(dot4I8Packed(o[1], o[2])) + dot4U8Packed(o[1], o[2]); }\n"}


# A thread with more rounds than some implementations run (llvmpipe ends it without a word), and what it must find
LOOP_PROBE = """@group(0) @binding(0) var<storage, read_write> o: array<u32>;
@compute @workgroup_size(1)
fn main() {
  var n = o[0];
  for (var i = 0u; i < 70000u; i++) { n = n * 1664525u + 1013904223u; }
  o[0] = n;
}
"""
LOOP_ANSWER = 1724221232


@dataclass(frozen=True, slots=True)
class Dialect:
    """``names``: {WebGPU's name of a device's feature: the implementation's}, where they differ. ``silent``: features whose directive is
    refused because they are on without. ``lists_language``: whether it says which language features it has; if not, a shader
    that uses one is tried (``PROBES``)."""

    names: Mapping[str, str] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()

    def write(self, source: str, features: Iterable[str]) -> str:
        """``source`` behind the directives for ``features``."""
        return "".join(f"enable {ENABLE[f]};\n" for f in ENABLE if f in set(features) - self.silent) + source

    def device_features(self, offered: Iterable[str]) -> list[str]:
        """What to request, in the implementation's names, of what an adapter offers."""
        have = set(offered)
        return [n for n in (self.names.get(f, f) for f in ENABLE) if n in have]

    def usable(self, granted: Iterable[str], accepts: Callable[[str], bool]) -> tuple[str, ...]:
        """Features, in WebGPU's names, of a device that was ``granted`` some; ``accepts``: whether it compiles a text."""
        have = set(granted)
        found = [f for f in ENABLE if self.names.get(f, f) in have]
        return (*found, *(f for f in LANGUAGE if accepts(PROBES[f])))


STANDARD = Dialect()
NATIVE = Dialect(names={SUBGROUPS: "subgroup"}, silent=frozenset({SUBGROUPS}))


def subsets(wanted: Iterable[str]) -> list[tuple[str, ...]]:
    """Every choice of features, those with more of them first, the empty one last."""
    names = [f for f in ALL if f in set(wanted)]
    return [c for n in range(len(names), -1, -1) for c in itertools.combinations(names, n)]


def choose(alternatives: Sequence[int], needs: Sequence[Sequence[str]], have: Iterable[str]) -> int:
    """The first of the shaders ``alternatives`` whose ``needs`` are met; the last one needs nothing."""
    on = set(have)
    return next(s for s in alternatives if on.issuperset(needs[s]))


def in_use(pipelines: Sequence[Mapping[str, Any]], needs: Sequence[Sequence[str]], have: Iterable[str]) -> tuple[str, ...]:
    """Features that the chosen shaders need."""
    on = tuple(have)
    used = {f for p in pipelines for f in needs[choose(p["shaders"], needs, on)]}
    return tuple(f for f in ALL if f in used)
