"""A host program's launches on a CUDA device, which is a GPU or the emulator. Needs neither ``onnx`` nor ``luthier.ir``."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from luthier.backends.host_run import FORMATS, Counters, HostRun, element
from luthier.errors import KernelError

Array = np.ndarray[Any, Any]


class Device(Protocol):
    """Memory and launches. Memory is whatever ``allocate`` gives."""

    def allocate(self, size: int) -> Any:
        """``size`` bytes from a multiple of 16. Raises OutOfMemoryError."""

    def upload(self, to: Any, offset: int, data: Any) -> None: ...

    def copy(self, src: Any, so: int, dst: Any, do: int, n: int) -> None: ...

    def download(self, src: Any, offset: int, n: int) -> bytes: ...

    def launch(
        self, p: Mapping[str, Any], bound: Sequence[tuple[Any, int, int]], scalars: Sequence[bytes], grid: tuple[int, int, int]
    ) -> None:
        """Pipeline ``p`` on ``bound``: (memory, byte, elements) of each buffer. Raises KernelError."""

    def wait(self) -> None:
        """Until all launches are over."""


class Runner:
    """One host program on a device; buffers are kept between runs and grown when they must."""

    def __init__(self, host: Mapping[str, Any], device: Device, blob: Any) -> None:
        self.host, self.device, self.blob = host, device, blob
        self.memory: dict[tuple[str, int], tuple[Any, int]] = {}
        self.counters = Counters()
        self.times: dict[int, float] | None = None

    def buffer(self, key: tuple[str, int], size: int) -> Any:
        """The memory of ``key``, with room for ``size`` bytes."""
        have = self.memory.get(key)
        if have is None or have[1] < size:
            self.memory.pop(key, None)
            n = max(16, -(-size // 16) * 16)
            have = self.memory[key] = self.device.allocate(n), n
        return have[0]

    def timed(self, arrays: Sequence[Array], raw: Sequence[Array]) -> dict[int, float]:
        """A run whose dispatches are timed one by one: {call number: ms}."""
        times: dict[int, float] = {}
        self.times = times
        try:
            self.run(arrays, raw)
        finally:
            self.times = None
        return times

    def run(self, arrays: Sequence[Array], raw: Sequence[Array]) -> list[tuple[tuple[int, ...], bytes]]:
        """``arrays``: the inputs with their shapes; ``raw``: their bytes. Returns (shape, bytes) of every output. Raises
        OutOfMemoryError, InputError, KernelError."""
        for k, (start, size) in enumerate(self.host["weights"]):
            if ("w", k) not in self.memory:
                self.device.upload(self.buffer(("w", k), size), 0, np.ascontiguousarray(self.blob[start : start + size]))
        for j, r in enumerate(raw):
            self.device.upload(self.buffer(("in", j), r.nbytes), 0, r)
        one = _Run(self, arrays)
        one.block(self.host["body"])
        self.counters = one.counters
        return [one.results[j] for j in sorted(one.results)]


class _Run(HostRun):
    def __init__(self, r: Runner, arrays: Sequence[Array]) -> None:
        super().__init__(r.host, arrays)
        self.r = r
        self.results: dict[int, tuple[tuple[int, ...], bytes]] = {}

    def memory(self, m: Any) -> Any:
        have = self.r.memory.get((m[0], m[1]))
        if have is None:
            raise KernelError(f"memory {m} is used before its size is known")
        return have[0]

    def read(self, memory: Any, offset: int, dtype: str) -> Any:
        self.counters.crossings += 1
        fmt = "<" + FORMATS[dtype]
        v = struct.unpack(fmt, self.r.device.download(memory, offset, struct.calcsize(fmt)))[0]
        return bool(v) if dtype == "bool" else v

    def do_buffer(self, k: int, size: Any) -> None:
        self.r.buffer(("b", k), int(self.value(size)))

    def do_write(self, mem: Any, offset: Any, dtype: str, values: Sequence[Any]) -> None:
        self.r.device.upload(self.memory(mem), int(self.value(offset)), b"".join(element(self.value(v), dtype) for v in values))

    def do_copy(self, src: Any, so: Any, dst: Any, do: Any, size: Any) -> None:
        self.r.device.copy(self.memory(src), int(self.value(so)), self.memory(dst), int(self.value(do)), int(self.value(size)))

    def do_output(self, j: int, mem: Any, offset: Any, shape: Sequence[Any]) -> None:
        extents = tuple(int(self.value(e)) for e in shape)
        n = -(-math.prod(extents) * self.host["output_bits"][j] // 8)
        self.results[j] = extents, self.r.device.download(self.memory(mem), int(self.value(offset)), n)

    def do_dispatch(self, p: int, bound: Sequence[Any], scalars: Sequence[Any], x: Any, y: Any, z: Any, call: int) -> None:
        grid = int(self.value(x)), int(self.value(y)), int(self.value(z))
        if min(grid) <= 0:
            return
        entry = self.host["pipelines"][p]
        places = [(self.memory(m), int(self.value(o)), int(self.value(n))) for m, o, n in bound]
        for ((kind, k), _, _), (_, at, count), (name, width, _) in zip(bound, places, entry["buffers"], strict=True):
            if at + count * width > self.r.memory[kind, k][1]:
                raise KernelError(
                    f"dispatch {call} is given bytes {at} to {at + count * width} for {name}, "
                    f"of a buffer of {self.r.memory[kind, k][1]}"
                )
        words = [element(self.value(v), {"index": "i64"}.get(d, d)) for v, d in zip(scalars, entry["scalars"], strict=True)]
        start = time.perf_counter()
        self.r.device.launch(entry, places, words, grid)
        if self.r.times is not None:
            self.r.device.wait()
            self.r.times[call] = self.r.times.get(call, 0.0) + (time.perf_counter() - start) * 1e3
        self.counters.dispatches += 1
        self.counters.bytes_bound += sum(n * width for (_, _, n), (_, width, _) in zip(places, entry["buffers"], strict=True))
