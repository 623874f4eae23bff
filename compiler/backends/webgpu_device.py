"""WebGPU in this process, through ``wgpu``: device, pipelines, and one run of a host program. Needs neither ``onnx`` nor ``luthier.ir``.

A run records all dispatches into one command encoder and submits once; a crossing (a value that main reads back) ends the
submit before it. A host program without crossings is recorded per set of input shapes and replayed.
"""

from __future__ import annotations

import functools
import math
import operator
import struct
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier import settings
from luthier.backends.host_run import FORMATS, Counters, HostRun, element
from luthier.codegen.gpu.webgpu_features import LOOP_ANSWER, LOOP_PROBE, NATIVE, choose, in_use
from luthier.errors import CompilationError, KernelError, OutOfMemoryError, TargetError

CHUNK = 1 << 16
ALIGN = 256
LOOP_LIMIT = 65535  # rounds after which an adapter that ends loops does so
OPTIONAL = ("timestamp-query",)  # asked for where the adapter has them; nothing needs them
TIMED = 2048  # dispatches whose times one query set holds
LARGER = ("max-buffer-size", "max-storage-buffer-binding-size")  # as much as the adapter has: temporaries may be larger than the default
SMALLER = "use smaller inputs, another adapter, or the targets cpu and wasm"


@functools.lru_cache(maxsize=1)
def device() -> Any:
    """The default device. Raises TargetError when wgpu or an adapter is missing."""
    try:
        import wgpu
    except ImportError as e:
        raise TargetError("running WebGPU modules needs the package wgpu", hint="pip install wgpu") from e
    settings.provide("XDG_RUNTIME_DIR", "/tmp")
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
        features = [f for f in OPTIONAL if f in adapter.features] + NATIVE.device_features(adapter.features)
        return adapter.request_device_sync(required_features=features, required_limits={name: adapter.limits[name] for name in LARGER})
    except Exception as e:  # wgpu raises several classes of its own here
        raise TargetError(f"no WebGPU adapter: {e}", hint="install a Vulkan driver, such as mesa-vulkan-drivers") from e


@functools.lru_cache(maxsize=1)
def features() -> tuple[str, ...]:
    """Optional features of the default device that shaders may use, in WebGPU's names."""
    import wgpu

    d = device()

    def accepts(text: str) -> bool:
        try:
            d.create_shader_module(code=text)
        except wgpu.GPUError:
            return False
        return True

    return NATIVE.usable(d.features, accepts)


def new_buffer(size: int, *usages: str) -> Any:
    """A buffer of the default device; ``usages``: names of ``wgpu.BufferUsage``. Raises OutOfMemoryError."""
    import wgpu

    most = int(device().limits["max-buffer-size"])
    if size > most:
        raise OutOfMemoryError(f"a buffer needs {size} bytes, this adapter allows {most}", hint=SMALLER)
    try:
        return device().create_buffer(size=size, usage=functools.reduce(operator.or_, (getattr(wgpu.BufferUsage, u) for u in usages)))
    except wgpu.GPUError as e:
        raise OutOfMemoryError(f"the GPU has no memory for a buffer of {size} bytes: {e}", hint=SMALLER) from e


def largest_binding() -> int:
    """Bytes that one binding may have on the default device."""
    return int(device().limits["max-storage-buffer-binding-size"])


@functools.lru_cache(maxsize=1)
def ends_loops() -> bool:
    """Whether the default device ends a thread that goes through many rounds of a loop."""
    import wgpu

    d, u = device(), wgpu.BufferUsage
    b = d.create_buffer_with_data(data=bytes(16), usage=u.STORAGE | u.COPY_SRC)
    pipeline = d.create_compute_pipeline(layout="auto", compute={"module": d.create_shader_module(code=LOOP_PROBE), "entry_point": "main"})
    group = d.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=[{"binding": 0, "resource": {"buffer": b, "offset": 0, "size": 16}}])
    enc = d.create_command_encoder()
    _encode(enc, [("d", pipeline, group, 0, 1, 1, 1)])
    d.queue.submit([enc.finish()])
    return struct.unpack_from("<I", bytes(d.queue.read_buffer(b)))[0] != LOOP_ANSWER


class Pipelines:
    """Compiled shaders with explicit layouts, each made when it is first used."""

    def __init__(self, shaders: Sequence[str], needs: Sequence[Sequence[str]], pipelines: Sequence[Mapping[str, Any]], have: Sequence[str]) -> None:
        self.shaders, self.needs, self.entries, self.have = shaders, needs, pipelines, have
        self.modules: dict[int, Any] = {}
        self.layouts: dict[tuple[str, bool], Any] = {}
        self.made: dict[int, tuple[Any, Any]] = {}

    def get(self, k: int) -> tuple[Any, Any]:
        """(pipeline, bind group layout). Raises CompilationError with the nodes and the implementation's message."""
        hit = self.made.get(k)
        if hit is None:
            hit = self.made[k] = self.make(self.entries[k])
        return hit

    def layout(self, letters: str, uniforms: bool) -> Any:
        hit = self.layouts.get((letters, uniforms))
        if hit is None:
            kinds = [{"r": "read-only-storage", "w": "storage"}[x] for x in letters] + ["uniform"] * uniforms
            entries = [{"binding": i, "visibility": 4, "buffer": {"type": t}} for i, t in enumerate(kinds)]
            hit = self.layouts[letters, uniforms] = device().create_bind_group_layout(entries=entries)
        return hit

    def make(self, e: Mapping[str, Any]) -> tuple[Any, Any]:
        import wgpu

        d = device()
        bgl = self.layout(e["bindings"], bool(e["uniforms"]))
        try:
            s = choose(e["shaders"], self.needs, self.have)
            if s not in self.modules:
                self.modules[s] = d.create_shader_module(code=NATIVE.write(self.shaders[s], self.needs[s]))
            layout = d.create_pipeline_layout(bind_group_layouts=[bgl])
            return d.create_compute_pipeline(layout=layout, compute={"module": self.modules[s], "entry_point": "main"}), bgl
        except wgpu.GPUError as error:
            raise CompilationError(f"this device refuses shader {s}: {error}", node=", ".join(e["nodes"]) or None) from error


@dataclass(slots=True)
class _Chunk:
    """A piece of the stream of uniforms and host values."""

    buffer: Any
    data: bytearray = field(default_factory=lambda: bytearray(CHUNK))
    used: int = 0
    sent: int = 0


class Runner:
    """One host program on the device; buffers are kept between runs and grown when they must."""

    def __init__(self, host: Mapping[str, Any], shaders: Sequence[str], blob: Any, allowed: Collection[str] | None = None) -> None:
        """``allowed``: optional features that may be used, all that the device has for None."""
        if allowed is None:
            allowed = settings.webgpu_features.get()
        have = [f for f in features() if allowed is None or f in allowed]
        self.host = host
        self.features = in_use(host["pipelines"], host["features"], have)
        self.pipelines = Pipelines(shaders, host["features"], host["pipelines"], have)
        self.blob = blob
        self.weights: list[Any] | None = None
        self.temporaries: dict[int, Any] = {}
        self.inputs: dict[int, Any] = {}
        self.chunks: list[_Chunk] = []
        self.groups: dict[Any, Any] = {}
        self.recorded: dict[Any, _Recorded] = {}
        self.counters = Counters()
        self.clock: _Queries | _Waits | None = None

    # ------------------------------------------------------------ memory

    def buffer(self, size: int, old: Any) -> Any:
        n = max(16, -(-size // 4) * 4)
        if old is not None and old.size >= n:
            return old
        self.recorded.clear()
        self.groups.clear()
        return new_buffer(n, "STORAGE", "COPY_SRC", "COPY_DST")

    def upload(self) -> list[Any]:
        if self.weights is None:
            weights = []
            for start, size in self.host["weights"]:
                b = self.buffer(size, None)
                device().queue.write_buffer(b, 0, np.ascontiguousarray(self.blob[start : start + size]))
                weights.append(b)
            self.weights = weights
        return self.weights

    # ------------------------------------------------------------ a run

    def timed(self, arrays: Sequence[np.ndarray[Any, Any]], raw: Sequence[np.ndarray[Any, Any]]) -> dict[int, float]:
        """A run whose dispatches are timed one by one: {call number: ms}."""
        self.clock = (_Queries if "timestamp-query" in device().features else _Waits)()
        self.recorded.clear()
        try:
            self.run(arrays, raw)
            return self.clock.times
        finally:
            self.clock = None
            self.recorded.clear()

    def run(self, arrays: Sequence[np.ndarray[Any, Any]], raw: Sequence[np.ndarray[Any, Any]]) -> list[tuple[tuple[int, ...], bytes]]:
        """``arrays``: the inputs with their shapes; ``raw``: their bytes as the device wants them. Returns (shape, bytes) of every
        output. Raises OutOfMemoryError, InputError, KernelError; a call that failed leaves nothing behind for the next one."""
        import wgpu

        try:
            return self.attempt(arrays, raw)
        except BaseException as e:
            for kept in (self.recorded, self.groups, self.temporaries, self.inputs):
                kept.clear()
            if isinstance(e, wgpu.GPUOutOfMemoryError):
                raise OutOfMemoryError(f"the GPU has no memory for the run: {e}", hint=SMALLER) from e
            if isinstance(e, wgpu.GPUError):
                raise KernelError(f"the GPU refused a command: {e}") from e
            raise

    def attempt(self, arrays: Sequence[np.ndarray[Any, Any]], raw: Sequence[np.ndarray[Any, Any]]) -> list[tuple[tuple[int, ...], bytes]]:
        """One call; what it raises may be the implementation's."""
        weights = self.upload()
        for j, r in enumerate(raw):
            self.inputs[j] = self.buffer(r.nbytes, self.inputs.get(j))
            if r.nbytes:
                padded = r if r.nbytes % 4 == 0 else np.concatenate([r, np.zeros(-r.nbytes % 4, np.uint8)])
                device().queue.write_buffer(self.inputs[j], 0, padded)
        key = tuple(a.shape for a in arrays)
        rec = self.recorded.get(key)
        if rec is None:
            rec = _Recorded()
            one = _Run(self, arrays, weights, rec)
            one.block(self.host["body"])
            one.finish_recording()
            if self.host["fixed"]:
                if len(self.recorded) >= 16:
                    self.recorded.clear()
                self.recorded[key] = rec
            self.counters = one.counters
            return one.results()
        one = _Run(self, arrays, weights, rec)
        one.counters = Counters(rec.dispatches, 0, 0, rec.bytes_bound)
        self.counters = one.counters
        return one.results()


@dataclass(slots=True)
class _Recorded:
    """Commands of one submit: ("d", pipeline, group, call, x, y, z) or ("c", from, offset, to, offset, bytes)."""

    commands: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: dict[int, tuple[Any, int, tuple[int, ...]]] = field(default_factory=dict)
    dispatches: int = 0
    bytes_bound: int = 0


class _Run(HostRun):
    def __init__(self, r: Runner, arrays: Sequence[np.ndarray[Any, Any]], weights: list[Any], rec: _Recorded) -> None:
        super().__init__(r.host, arrays)
        self.r, self.weights, self.rec = r, weights, rec
        self.chunk: _Chunk | None = None
        self.fresh_chunks: list[_Chunk] = []
        self.seen: dict[bytes, tuple[_Chunk, int]] = {}
        self.most = largest_binding()

    # statements --------------------------------------------------

    def do_buffer(self, k: int, size: Any) -> None:
        self.r.temporaries[k] = self.r.buffer(int(self.value(size)), self.r.temporaries.get(k))

    def do_write(self, mem: Any, offset: Any, dtype: str, values: Sequence[Any]) -> None:
        data = b"".join(element(self.value(v), dtype) for v in values)
        chunk, at = self.stream(data, 4)
        self.rec.commands.append(("c", chunk.buffer, at, self.memory(mem), int(self.value(offset)), -(-len(data) // 4) * 4))

    def do_copy(self, src: Any, so: Any, dst: Any, do: Any, size: Any) -> None:
        n = int(self.value(size))
        if n:
            self.rec.commands.append(("c", self.memory(src), int(self.value(so)), self.memory(dst), int(self.value(do)), n))

    def do_rounds(self, n: Any, what: str) -> None:
        rounds = int(self.value(n))
        if rounds > LOOP_LIMIT and ends_loops():
            raise KernelError(
                f"{what} takes {rounds} rounds in one thread, this adapter ends a thread after {LOOP_LIMIT}", node=what,
                hint="use smaller inputs, another adapter, or the targets cpu and wasm",
            )

    def do_output(self, j: int, mem: Any, offset: Any, shape: Sequence[Any]) -> None:
        self.rec.outputs[j] = (self.memory(mem), int(self.value(offset)), tuple(int(self.value(e)) for e in shape))

    def do_dispatch(self, p: int, bound: Sequence[Any], words: Sequence[Any], x: Any, y: Any, z: Any, call: int) -> None:
        grid = tuple(int(self.value(e)) for e in (x, y, z))
        if min(grid) <= 0:
            return
        pipeline, layout = self.r.pipelines.get(p)
        places = [(self.memory(m), int(self.value(o)), int(self.value(n))) for m, o, n in bound]
        entry = self.r.host["pipelines"][p]
        if entry["uniforms"]:
            data = b"".join(struct.pack("<I", int(self.value(w)) & 0xFFFFFFFF) for w in words)
            data += bytes(entry["uniforms"] - len(data))
            hit = self.seen.get(data)
            if hit is None:
                hit = self.seen[data] = self.stream(data, ALIGN)
            places.append((hit[0].buffer, hit[1], len(data)))
        for b, o, n in places:
            if o + n > b.size:
                raise KernelError(f"dispatch {call} binds bytes {o} to {o + n} of a buffer of {b.size}")
            if n > self.most:
                raise OutOfMemoryError(f"dispatch {call} needs {n} bytes in one binding, this adapter allows {self.most}", hint=SMALLER)
        entries = [{"binding": i, "resource": {"buffer": b, "offset": o, "size": n}} for i, (b, o, n) in enumerate(places)]
        group = device().create_bind_group(layout=layout, entries=entries)
        self.rec.commands.append(("d", pipeline, group, call, *grid))
        self.rec.dispatches += 1
        self.rec.bytes_bound += sum(n for _, _, n in places)

    # values ------------------------------------------------------

    def memory(self, m: Any) -> Any:
        kind, k = m
        if kind == "b":
            b = self.r.temporaries.get(k)
            if b is None:
                raise KernelError(f"temporary {k} is used before its size is known")
            return b
        return self.weights[k] if kind == "w" else self.r.inputs[k]

    def read(self, b: Any, offset: int, dtype: str) -> Any:
        """A crossing: everything recorded so far is submitted, then the host waits."""
        n = struct.calcsize("<" + FORMATS[dtype])
        start = offset // 4 * 4
        size = -(-(offset + n - start) // 4) * 4
        self.submit()
        raw = bytes(device().queue.read_buffer(b, start, size))
        self.counters.crossings += 1
        self.counters.submits += 1
        v = struct.unpack_from("<" + FORMATS[dtype], raw, offset - start)[0]
        return bool(v) if dtype == "bool" else v

    # the stream of host values -----------------------------------

    def stream(self, data: bytes, align: int) -> tuple[_Chunk, int]:
        """Where ``data`` will lie on the device when the next submit runs."""
        c = self.chunk
        at = 0 if c is None else -(-c.used // align) * align
        if c is None or at + len(data) + 4 > CHUNK:
            c = self.chunk = _Chunk(new_buffer(CHUNK, "UNIFORM", "COPY_SRC", "COPY_DST"))
            self.fresh_chunks.append(c)
            at = 0
        c.data[at : at + len(data)] = data
        c.used = -(-(at + len(data)) // 4) * 4
        return c, at

    def send(self) -> None:
        for c in self.fresh_chunks:
            if c.used > c.sent:
                device().queue.write_buffer(c.buffer, c.sent, bytes(c.data[c.sent : c.used]))
                c.sent = c.used

    def submit(self) -> None:
        """For a crossing: run what is recorded and forget it."""
        self.send()
        self.counters.dispatches += self.rec.dispatches
        self.counters.bytes_bound += self.rec.bytes_bound
        if self.r.clock is not None:
            self.r.clock.run(self.rec.commands)
        else:
            enc = device().create_command_encoder()
            _encode(enc, self.rec.commands)
            device().queue.submit([enc.finish()])
        self.counters.submits += 1
        self.rec.commands.clear()
        self.rec.dispatches = self.rec.bytes_bound = 0

    def finish_recording(self) -> None:
        self.send()
        self.counters.dispatches += self.rec.dispatches
        self.counters.bytes_bound += self.rec.bytes_bound

    def results(self) -> list[tuple[tuple[int, ...], bytes]]:
        """The last submit, with copies of all outputs into one buffer that the host can map."""
        import wgpu

        enc = device().create_command_encoder()
        if self.r.clock is not None:
            self.r.clock.run(self.rec.commands)
        else:
            _encode(enc, self.rec.commands)
        sizes = {}
        total = 0
        for j, (b, offset, shape) in sorted(self.rec.outputs.items()):
            bits = self.r.host["output_bits"][j]
            n = -(-math.prod(shape) * bits // 8)
            sizes[j] = (total, n, shape, b, offset)
            total += -(-n // 4) * 4
        stage = None
        if total:
            stage = new_buffer(total, "MAP_READ", "COPY_DST")
            for at, n, _, b, offset in sizes.values():
                if n:
                    enc.copy_buffer_to_buffer(b, offset, stage, at, -(-n // 4) * 4)
        device().queue.submit([enc.finish()])
        self.counters.submits += 1
        if stage is None:
            return [(s[2], b"") for s in sizes.values()]
        stage.map_sync(wgpu.MapMode.READ)
        raw = bytes(stage.read_mapped())
        stage.unmap()
        return [(shape, raw[at : at + n]) for at, n, shape, _, _ in sizes.values()]


def _encode(enc: Any, commands: Sequence[tuple[Any, ...]]) -> None:
    cp = None
    for c in commands:
        if c[0] == "d":
            if cp is None:
                cp = enc.begin_compute_pass()
            cp.set_pipeline(c[1])
            cp.set_bind_group(0, c[2])
            cp.dispatch_workgroups(*c[4:])
        else:
            if cp is not None:
                cp.end()
                cp = None
            enc.copy_buffer_to_buffer(*c[1:])
    if cp is not None:
        cp.end()


class _Queries:
    """Times of dispatches by timestamps of the device, nanoseconds as the specification has them: a pass for each."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}

    def run(self, commands: Sequence[tuple[Any, ...]]) -> None:
        parts: list[list[tuple[Any, ...]]] = [[]]
        for c in commands:
            if sum(x[0] == "d" for x in parts[-1]) == TIMED:
                parts.append([])
            parts[-1].append(c)
        for part in parts:
            self.part(part)

    def part(self, commands: Sequence[tuple[Any, ...]]) -> None:
        import wgpu

        calls = [c[3] for c in commands if c[0] == "d"]
        n = 2 * max(1, len(calls))
        queries = device().create_query_set(type="timestamp", count=n)
        ticks = new_buffer(8 * n, "QUERY_RESOLVE", "COPY_SRC")
        stage = new_buffer(8 * n, "MAP_READ", "COPY_DST")
        enc = device().create_command_encoder()
        k = 0
        for c in commands:
            if c[0] != "d":
                enc.copy_buffer_to_buffer(*c[1:])
                continue
            writes = {"query_set": queries, "beginning_of_pass_write_index": 2 * k, "end_of_pass_write_index": 2 * k + 1}
            cp = enc.begin_compute_pass(timestamp_writes=writes)
            cp.set_pipeline(c[1])
            cp.set_bind_group(0, c[2])
            cp.dispatch_workgroups(*c[4:])
            cp.end()
            k += 1
        if calls:
            enc.resolve_query_set(queries, 0, n, ticks, 0)
            enc.copy_buffer_to_buffer(ticks, 0, stage, 0, 8 * n)
        device().queue.submit([enc.finish()])
        if calls:
            stage.map_sync(wgpu.MapMode.READ)
            t = np.frombuffer(bytes(stage.read_mapped()), np.uint64).astype(np.int64).reshape(-1, 2)
            stage.unmap()
            for call, ns in zip(calls, (t[:, 1] - t[:, 0]).tolist(), strict=True):
                self.times[call] = self.times.get(call, 0.0) + max(0, ns) / 1e6


class _Waits:
    """Without timestamps: every dispatch is a submit of its own, timed by the host until a read behind it returns."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}
        self.word = new_buffer(4, "COPY_SRC", "COPY_DST")

    def run(self, commands: Sequence[tuple[Any, ...]]) -> None:
        for c in commands:
            enc = device().create_command_encoder()
            _encode(enc, [c])
            done = [enc.finish()]
            start = time.perf_counter()
            device().queue.submit(done)
            device().queue.read_buffer(self.word)
            if c[0] == "d":
                self.times[c[3]] = self.times.get(c[3], 0.0) + (time.perf_counter() - start) * 1e3
