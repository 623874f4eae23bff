"""A host program (:mod:`luthier.codegen.gpu.host_program`) run in Python: its statements and values, whatever the device is.
Needs neither ``onnx`` nor ``luthier.ir``."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import InputError, KernelError

MAX_ROUNDS = 1_000_000
FORMATS = {
    "bool": "?", "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "u64": "Q", "i64": "q",
    "f16": "e", "f32": "f", "f64": "d",
}  # fmt: skip


@dataclass(slots=True)
class Counters:
    """What the last run did: dispatches, command submits, crossings, bytes that kernels were bound to."""

    dispatches: int = 0
    submits: int = 0
    crossings: int = 0
    bytes_bound: int = 0


class HostRun:
    """One run of ``host`` for ``arrays``. A subclass has the statements that touch a device: ``do_buffer``, ``do_write``,
    ``do_copy``, ``do_rounds``, ``do_output``, ``do_dispatch``, and ``memory`` and ``read``."""

    def __init__(self, host: Mapping[str, Any], arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        self.host, self.arrays = host, arrays
        self.env: dict[str, Any] = {}
        self.mirrors: list[dict[int, Any]] = [{} for _ in range(host["mirrors"])]
        self.counters = Counters()
        self.flat: dict[int, np.ndarray[Any, Any]] = {}

    # statements --------------------------------------------------

    def block(self, stmts: Sequence[Any]) -> None:
        for s in stmts:
            getattr(self, f"do_{s[0]}")(*s[1:])

    def do_let(self, name: str, e: Any) -> None:
        self.env[name] = self.value(e)

    def do_mirror(self, k: int, i: Any, v: Any) -> None:
        self.mirrors[k][int(self.value(i))] = self.value(v)

    def do_check(self, got: Any, want: Any, what: str) -> None:
        a, b = self.value(got), self.value(want)
        if a != b:
            raise InputError(f"{what} is {a}, the model needs {b} here")

    def do_if(self, cond: Any, then: Any, orelse: Any) -> None:
        self.block(then if self.value(cond) else orelse)

    def do_while(self, cond: Any, body: Any) -> None:
        rounds = 0
        while self.value(cond):
            self.block(body)
            rounds += 1
            if rounds > MAX_ROUNDS:
                raise KernelError("a loop ran for more than a million rounds")

    # values ------------------------------------------------------

    def memory(self, m: Any) -> Any:
        """What the device has under ``["in", j]``, ``["w", k]`` or ``["b", k]``."""
        raise NotImplementedError

    def read(self, memory: Any, offset: int, dtype: str) -> Any:
        """A crossing: an element that the device holds."""
        raise NotImplementedError

    def value(self, e: Any) -> Any:
        if not isinstance(e, list):
            return self.env[e] if isinstance(e, str) else e
        op = e[0]
        if op == "dim":
            return self.arrays[e[1]].shape[e[2]]
        if op == "peek":
            a = self.flat.get(e[1])
            if a is None:
                a = self.flat[e[1]] = np.ascontiguousarray(self.arrays[e[1]]).reshape(-1)
            return a[int(self.value(e[2]))].item()
        if op == "mirror":
            return self.mirrors[e[1]][int(self.value(e[2]))]
        if op == "read":
            return self.read(self.memory(e[1]), int(self.value(e[2])), e[3])
        if op == "?":
            return self.value(e[2]) if self.value(e[1]) else self.value(e[3])
        if op == "and":
            return bool(self.value(e[1])) and bool(self.value(e[2]))
        if op == "or":
            return bool(self.value(e[1])) or bool(self.value(e[2]))
        if op == "wrap":
            v = int(self.value(e[1])) & ((1 << e[2]) - 1)
            return v - (1 << e[2]) if e[3] and v >> (e[2] - 1) else v
        return OPS[op](*(self.value(a) for a in e[1:]))


def within(host: Mapping[str, Any], arrays: Sequence[np.ndarray[Any, Any]]) -> list[tuple[int, list[int], list[int], str]]:
    """(number of an input, least, greatest elements that it may hold, what they are) for these inputs; one pair, or one for each
    place along the last axis."""
    if not host.get("within"):
        return []
    one = HostRun(host, arrays)
    return [
        (j, [int(one.value(e)) for e in low], [int(one.value(e)) for e in high], what) for j, low, high, what in host["within"]
    ]


def element(v: Any, dtype: str) -> bytes:
    """A host value as an element of ``dtype`` in memory."""
    return struct.pack("<" + FORMATS[dtype], _fit(v, dtype))


def _fit(v: Any, dtype: str) -> Any:
    """A host value as an element of ``dtype``."""
    if dtype == "bool":
        return bool(v)
    if dtype[0] == "f":
        return float(v)
    bits = int(dtype[1:])
    n = int(v) & ((1 << bits) - 1)
    return n - (1 << bits) if dtype[0] == "i" and n >> (bits - 1) else n


def _div(a: Any, b: Any) -> Any:
    return 0 if b == 0 else a // b


def _mod(a: Any, b: Any) -> Any:
    return 0 if b == 0 else a % b


def _tdiv(a: Any, b: Any) -> Any:
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _trem(a: Any, b: Any) -> Any:
    return 0 if b == 0 else a - b * _tdiv(a, b)


def _fdiv(a: Any, b: Any) -> Any:
    return float(np.float64(a) / np.float64(b))


OPS: dict[str, Any] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "//": _div, "%": _mod,
    "trunc/": _tdiv, "trunc%": _trem,
    "/": _fdiv, "min": lambda a, b: a if a < b else b, "max": lambda a, b: a if a > b else b, "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "not": lambda a: not a, "neg": lambda a: -a,
    "abs": abs, "floor": math.floor, "ceil": math.ceil, "int": int, "bool": bool,
    "bits": lambda a: struct.unpack("<i", struct.pack("<f", a))[0],
}  # fmt: skip
