"""WasmModule: a model as a WebAssembly module that wasmtime runs here (the extra ``luthier[web]``) and a browser elsewhere.

The interface of the code is described in ``docs/web.md``. Imports neither ``onnx`` nor ``luthier.ir``.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import struct
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from luthier.backends.native import pack_bits, unpack_bits
from luthier.errors import InputError, KernelError, LuthierError, OutOfMemoryError, TargetError
from luthier.module import Array, Module, check_out, convert, evaluate

__all__ = ["VARIANTS", "WasmModule", "load_module"]

VARIANTS = ("simd", "relaxed", "simd-threads", "relaxed-threads")
RECORD = 48
EXTENTS = 16


@cache
def _engine() -> Any:
    """One engine for this process. Raises TargetError when wasmtime is not installed."""
    try:
        import wasmtime
    except ImportError as e:
        raise TargetError("running WebAssembly needs wasmtime", hint="pip install 'luthier[web]'") from e
    c = wasmtime.Config()
    c.wasm_simd = c.wasm_relaxed_simd = c.wasm_threads = c.shared_memory = True
    engine = wasmtime.Engine(c)
    atexit.register(engine.close)  # before the interpreter takes wasmtime apart
    return engine


def _shared_memory(engine: Any, limits: Any) -> Any:
    """A shared memory that can be imported: wasmtime 50's own class hands over a pointer too much."""
    import wasmtime as wt
    from wasmtime import _ffi as ffi

    class Shared(wt.SharedMemory):  # type: ignore[misc]
        def _as_extern(self) -> Any:
            return ffi.wasmtime_extern_t(ffi.WASMTIME_EXTERN_SHAREDMEMORY, ffi.wasmtime_extern_union(sharedmemory=self.ptr()))

    return Shared(engine, wt.MemoryType(limits, shared=True))


class Instance:
    """One caller's memory, main instance and workers. ``view()``: the memory as bytes, to be taken again after a call."""

    def __init__(self, module: WasmModule, threads: int, mark: Callable[[int], None] | None = None) -> None:
        import wasmtime as wt

        engine, spec = _engine(), module.manifest["wasm"]
        self.spec, self.threads = spec, threads
        self.shared = "threads" in module.variant
        limits = wt.Limits(spec["pages"], spec["max_pages"] if self.shared else None)
        self.store = wt.Store(engine)
        try:
            if self.shared:
                self.memory: Any = _shared_memory(engine, limits)
            else:
                self.memory = wt.Memory(self.store, wt.MemoryType(limits))
        except wt.WasmtimeError as e:
            raise LuthierError(f"no memory for the module: {e}") from e
        code = module.compiled(mark is not None)
        imports = [self.memory]
        if mark is not None:
            imports.append(wt.Func(self.store, wt.FuncType([wt.ValType.i32()], []), mark))
        exports = wt.Instance(self.store, code, imports).exports(self.store)
        self.bind_, self.run_ = exports["lt_bind"], exports["lt_run"]
        at = spec["weights"]
        n = module.manifest["weights_bytes"]
        self.view()[at : at + n] = module._weights[:n]
        self.key: Any = None
        self.workers: list[threading.Thread] = []
        if self.shared and threads > 1:
            for k in range(1, threads):
                store = wt.Store(engine)
                entry: Any = wt.Instance(store, code, [self.memory]).exports(store)["lt_worker"]
                t = threading.Thread(target=entry, args=(store, k), daemon=True)
                t.start()
                self.workers.append(t)
            stop = exports["lt_stop"]
            self.close = weakref.finalize(self, _stop, stop, self.store, self.workers)

    def view(self) -> Array:
        if self.shared:
            p, n = self.memory.data_ptr(), self.memory.data_len()
        else:
            p, n = self.memory.data_ptr(self.store), self.memory.data_len(self.store)
        address = ctypes.cast(p, ctypes.c_void_p).value or 0
        return np.frombuffer((ctypes.c_uint8 * n).from_address(address), np.uint8)

    def call(self, f: Any, *args: int) -> int:
        import wasmtime as wt

        try:
            return int(f(self.store, *args))
        except wt.Trap as e:
            raise KernelError(f"the module trapped: {e.message.splitlines()[-1].strip()}") from e

    def check(self, status: int) -> None:
        """Raise what a status other than 0 means."""
        if not status:
            return
        at = self.spec["error"]
        _, kind, name, axis, got, want, want2 = struct.unpack("<4i3q", self.view()[at : at + 40].tobytes())
        names = self.spec["names"]
        who = names[name] if 0 <= name < len(names) else "?"
        if kind == 1:
            raise InputError(f"input {who}: dimension {axis} is {got}, expected {want}")
        if kind == 2:
            raise InputError(f"input {who}: dimension {axis} is {got}, allowed are {want} to {want2}")
        if kind == 4:
            raise InputError(f"{who} do not fit: {got} against {want}")
        if kind == 5:
            raise InputError(f"{who}: dimension {axis} would be {got}; the inputs do not allow it")
        if kind == 6:
            raise InputError(f"{who} is {got} in the data of this run, allowed are {want} to {want2}")
        raise OutOfMemoryError(f"out of memory: {got} bytes for {who}")


def _stop(stop: Any, store: Any, workers: list[threading.Thread]) -> None:
    stop(store)
    for t in workers:
        t.join()


class WasmModule(Module):
    """A Module whose code is WebAssembly. ``binary(variant)``: the bytes of a variant; ``weights``: the blob that every variant reads;
    ``variant``: what ``run`` uses."""

    is_package = True

    def __init__(
        self, manifest: dict[str, Any], binaries: dict[str, bytes], weights: Array, threads: int | None = None,
        printer: Callable[[str], bytes] | None = None, source: Path | None = None,
    ) -> None:
        super().__init__(manifest, None, weights, threads, source)
        self.variant = manifest["target"]["name"].partition(":")[2] or "relaxed"
        self._binaries, self._printer = binaries, printer
        self._compiled: dict[str, Any] = {}
        self._pool: list[Instance] = []

    @property
    def weights(self) -> Array:
        return self._weights[: self.manifest["weights_bytes"]]

    def binary(self, variant: str) -> bytes:
        """The WebAssembly module of a variant. Raises TargetError for one that is not known."""
        if variant not in self._binaries:
            known = variant.removesuffix("-profile") in VARIANTS
            if not known or self._printer is None:
                raise TargetError(f"no WebAssembly variant {variant!r}", hint=f"known: {', '.join(VARIANTS)}")
            self._binaries[variant] = self._printer(variant)
        return self._binaries[variant]

    def compiled(self, profile: bool = False) -> Any:
        """The variant that runs here, as wasmtime's machine code. Raises TargetError, KernelError."""
        name = self.variant + ("-profile" if profile else "")
        if name not in self._compiled:
            engine = _engine()
            import wasmtime as wt

            try:
                self._compiled[name] = wt.Module(engine, self.binary(name))
            except wt.WasmtimeError as e:
                raise KernelError(f"wasmtime refuses the module: {e}") from e
        return self._compiled[name]

    def _threads(self) -> int:
        if self.threads is None:
            from luthier.codegen.targets.target import usable_cores

            self.threads = usable_cores()
        return self.threads if "threads" in self.variant and self.manifest["wasm"]["parallel"] else 1

    def _run(self, arrays: Sequence[Any], out: Mapping[str, Array] | None, profile: int = 0) -> dict[str, Array]:
        try:
            inst = self._pool.pop()
        except IndexError:
            inst = Instance(self, self._threads())
        try:
            result = self._call(inst, arrays, out)
        except KernelError:
            raise  # an instance that trapped is thrown away
        except BaseException:
            self._pool.append(inst)
            raise
        self._pool.append(inst)
        return result

    def keep(self, state: Sequence[str]) -> Callable[[Mapping[str, Any]], dict[str, Array]]:
        """As :meth:`Module.keep`; the state never leaves the memory of an instance. Its inputs must be the module's first ones: then their
        addresses do not depend on the others' extents."""
        n = len(state)
        if [p.name for p in self._ins[:n]] != list(state) or not all(isinstance(e, int) for p in self._ins[:n] for e in p.shape):
            raise InputError("state must be the first inputs, of fixed extents", hint=f"the inputs are {self._describe()}")
        inst: list[Instance] = []
        rest = self._ins[n:]

        def run(inputs: Mapping[str, Any]) -> dict[str, Array]:
            if inputs.keys() != {p.name for p in rest}:
                raise InputError(f"got the inputs {', '.join(sorted(map(repr, inputs)))}, expected {', '.join(p.name for p in rest)}")
            if not inst:
                inst.append(Instance(self, self._threads()))
            return self._call(inst[0], [*[None] * n, *(inputs[p.name] for p in rest)], None)

        return run

    def _call(self, inst: Instance, arrays: Sequence[Any], out: Mapping[str, Array] | None) -> dict[str, Array]:
        io = inst.spec["io"]
        keep: list[Array | None] = []
        for p, a in zip(self._ins, arrays, strict=True):
            if a is None:  # state: it lies in the memory
                keep.append(None)
                continue
            a = convert(a, p)
            if a.ndim != p.rank:
                raise InputError(f"input {p.name} has rank {a.ndim}, expected {p.rank}", shapes={"given": a.shape, "expected": p.shape})
            keep.append(a)
        key: tuple[tuple[Any, ...], ...] = tuple(p.shape if a is None else a.shape for p, a in zip(self._ins, keep, strict=True))
        if inst.key != key:
            inst.key = None
            view = inst.view()
            for j, shape in enumerate(key):
                if any(x >= 1 << 31 for x in shape):
                    raise InputError(f"input {self._ins[j].name} has shape {list(shape)}: WebAssembly counts to 2 ** 31 - 1")
                at = io + RECORD * j + EXTENTS
                view[at : at + 4 * len(shape)] = np.array(shape, "<i4").view(np.uint8)
            inst.check(inst.call(inst.bind_, inst.threads))
            inst.key = key
        view = inst.view()
        for j, (p, a) in enumerate(zip(self._ins, keep, strict=True)):
            if a is None:
                continue
            at, n = struct.unpack_from("<2I", view.data, io + RECORD * j)
            raw = (pack_bits(a, p.bits) if p.bits < 8 else a).reshape(-1).view(np.uint8)
            view[at : at + raw.size] = raw
        inst.check(inst.call(inst.run_, inst.threads, 1))
        view = inst.view()
        result: dict[str, Array] = {}
        own: list[Array] = []
        for j, q in enumerate(self._outs):
            base = io + RECORD * (len(self._ins) + j)
            at, n = struct.unpack_from("<2I", view.data, base)
            shape = struct.unpack_from(f"<{q.rank}i", view.data, base + EXTENTS)
            raw = view[at : at + n]
            if q.bits < 8:
                a = unpack_bits(raw, q.bits, shape, q.dtype, not q.dtype.name.startswith("u"))
            else:
                size = math.prod(shape) * q.dtype.itemsize
                a = raw[:size].copy().view(q.dtype).reshape(shape) if size else np.empty(shape, q.dtype)
            given = None if out is None else out.get(q.name)
            if given is not None:
                check_out(given, q, a.shape, outs=own)
                given[...] = a
                own.append(given)
                a = given
            result[q.name] = a
        return result

    def profile(self, inputs: Mapping[str, Any], runs: int = 20) -> list[dict[str, Any]]:
        """As :meth:`Module.profile`; a module of its own that calls a clock after every kernel."""
        import time

        calls = self.manifest["calls"]
        arrays = self._given(inputs)
        times = np.zeros((max(len(calls), 1), 2), np.int64)
        last = 0

        def mark(k: int) -> None:
            nonlocal last
            now = time.perf_counter_ns()
            times[k, 0] += now - last
            times[k, 1] += 1
            last = time.perf_counter_ns()

        inst = Instance(self, 1, mark)
        self._call(inst, arrays, None)
        times[:] = 0
        for _ in range(max(1, runs)):
            last = time.perf_counter_ns()
            self._call(inst, arrays, None)
        dims = {n: int(np.shape(arrays[i])[axis]) for n, (i, axis) in self.manifest["dims"].items()}
        return [
            {
                "kernel": c["kernel"], "nodes": tuple(c["nodes"]), "ms": float(times[k, 0]) / max(1, runs) / 1e6,
                "flops": int(evaluate(c["flops"], dims) * times[k, 1] / max(1, runs)),
                "bytes": int(evaluate(c["bytes"], dims) * times[k, 1] / max(1, runs)),
            }
            for k, c in enumerate(calls)
        ]  # fmt: skip

    def write_files(self, folder: Path, shard_mb: float | None = None) -> tuple[str, ...]:
        """An npm package with ``model.VARIANT.wasm`` for every variant."""
        from luthier.backends.web_package import SHARD_MB, write_package

        files = {f"model.{v}.wasm": partial(self.binary, v) for v in VARIANTS}
        return write_package(folder, self.manifest, self.weights, files, SHARD_MB if shard_mb is None else shard_mb, self.files)


def load_module(path: Path, manifest: dict[str, Any], threads: int | None) -> WasmModule:
    """A WasmModule from its folder. Raises ArtifactError for missing or damaged files."""
    from luthier.artifact import check_files
    from luthier.backends.web_package import read_weights
    from luthier.manifest import demand

    demand(manifest, path, "web", "wasm")
    files = [f"model.{v}.wasm" for v in VARIANTS]
    check_files(path, manifest, [*files, *(s["file"] for s in manifest["web"]["shards"])])
    binaries = {v: (path / f).read_bytes() for v, f in zip(VARIANTS, files, strict=True)}
    return WasmModule(manifest, binaries, read_weights(path, manifest), threads, source=path)
