"""Module: a compiled model that can be run, saved and profiled. ``load`` needs neither ``onnx`` nor ``luthier.ir``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from luthier import dlpack, settings
from luthier.backends.native import (
    DTYPES,
    WORDS,
    Context,
    Functions,
    Native,
    SharedObject,
    address,
    map_file,
    numpy_dtype,
    owned,
    pack_bits,
    unpack_bits,
)
from luthier.errors import ArtifactError, InputError, KernelError, LuthierError, TargetError
from luthier.structures import pack, unpack

if TYPE_CHECKING:
    from luthier.codegen.targets.target import Target
    from luthier.ir.program import Program

__all__ = ["Module", "TensorSpec", "load"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TensorSpec:
    """``dtype``: name of the numpy (or ml_dtypes) type; ``shape``: integers, or text for what a call decides (``"n"``, ``"2*n"``).
    ``optional``: an input that a call may leave out."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    optional: bool = False


@dataclass(frozen=True)
class _Port:
    """An input or output, prepared for calls. ``bits``: width of an element in the ABI; ``word``: dtype and rank together; ``default``:
    what an input is that a call leaves out, as the manifest says it."""

    name: str
    dtype: np.dtype[Any]
    rank: int
    bits: int
    word: int
    shape: tuple[int | str, ...]
    default: Any = None


def _port(d: Mapping[str, Any]) -> _Port:
    name, bits = DTYPES[d["code"]]
    return _Port(d["name"], numpy_dtype(name), len(d["shape"]), bits, d["code"] | len(d["shape"]) << 32, tuple(d["shape"]), d.get("default"))


class Module:
    """``inputs``, ``outputs``: what a call takes and gives. ``manifest``: all that is known about the module, as plain data.

    A module may be called from several threads at once; each concurrent call has its own context. ``threads``: workers of a
    call (None: the setting LUTHIER_THREADS, else the cores that this process may use). ``files``: what ``save`` writes beside the code.
    ``is_package``: whether ``save`` writes an npm package."""

    is_package: ClassVar[bool] = False

    def __init__(
        self, manifest: dict[str, Any], native: Native | None, weights: Array, threads: int | None = None, source: Any = None,
        intact: Callable[[], None] | None = None,
    ) -> None:
        self.manifest = manifest
        self.inputs = tuple(_spec(d) for d in manifest["inputs"])
        self.outputs = tuple(_spec(d) for d in manifest["outputs"])
        self.threads = threads if threads is not None else settings.threads.get()
        self._weights = weights
        self._source = source  # objects to link, or the folder that the module was loaded from
        self._intact = intact  # raises when the weights can no longer be read
        self._fns = Functions(native) if native is not None else None
        self._ins = tuple(_port(d) for d in manifest["inputs"])
        self._outs = tuple(_port(d) for d in manifest["outputs"])
        self._packed = any(p.bits < 8 for p in self._ins)
        self._names = {p.name for p in self._ins}
        self._out_names = {p.name for p in self._outs}
        self._structured = manifest.get("structured", {"inputs": {}, "outputs": {}})
        self.files: dict[str, Callable[[], bytes]] = {}
        self._idle: list[Context] = []
        self._shapes: dict[Any, list[tuple[int, ...] | None]] = {}

    @staticmethod
    def from_program(program: Program, target: Target | str = "cpu", threads: int | None = None) -> Module:
        """Code for ``program``. Raises CompilationError, TargetError."""
        from luthier.codegen.targets.target import parse_target

        chosen = parse_target(target) if isinstance(target, str) else target
        module: Module = chosen.backend.build_module(program, chosen, threads)
        return module

    # ------------------------------------------------------------ calls

    def keep(self, state: Sequence[str]) -> Callable[[Mapping[str, Any]], dict[str, Array]]:
        """A function like :meth:`run` for the inputs but ``state``, which are updated in place and belong to it: zeros at first. Raises
        InputError for a name that is no input or an extent that is not fixed."""
        own: dict[str, Array] = {}
        for name in state:
            p = next((p for p in self._ins if p.name == name), None)
            if p is None or not all(isinstance(e, int) for e in p.shape):
                raise InputError(f"{name} is no input of fixed extents", hint=f"the inputs are {self._describe()}")
            own[name] = np.zeros(p.shape, p.dtype)  # type: ignore[arg-type]
        return lambda inputs: self.run({**inputs, **own})

    def __call__(self, *arrays: Any) -> tuple[Array, ...]:
        """Inputs by position; the outputs in order, as a tuple."""
        if self._structured["inputs"] or self._structured["outputs"]:
            owner = {port: name for name, s in self._structured["inputs"].items() for port in s["ports"]}
            names = list(dict.fromkeys(owner.get(p.name, p.name) for p in self._ins if p.default is None))
            if len(arrays) != len(names):
                raise InputError(f"the module takes {len(names)} inputs ({', '.join(names)}), got {len(arrays)}")
            return tuple(self.run(dict(zip(names, arrays, strict=True))).values())
        least = sum(p.default is None for p in self._ins)
        if not least <= len(arrays) <= len(self._ins):
            many = str(least) if least == len(self._ins) else f"{least} to {len(self._ins)}"
            raise InputError(f"the module takes {many} inputs ({', '.join(p.name for p in self._ins)}), got {len(arrays)}")
        return tuple(self._run([*arrays, *(self._default(p) for p in self._ins[len(arrays) :])], None).values())

    def run(self, inputs: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """``{input name: array}`` to ``{output name: array}``.

        Arrays are numpy's or anything with DLPack or ``__array_interface__``, in the processor's memory (not copied when
        contiguous). Outputs are numpy arrays, which other libraries take by DLPack. ``out``: arrays, numpy's or DLPack's, to write
        outputs into and to return (contiguous, writable, right dtype, right shape, apart from the inputs). Raises InputError for a
        wrong name, dtype, rank, extent or device, KernelError when a kernel fails.

        A sequence is a list of arrays, an optional may be None or left out, as an input and as an output."""
        arrays = self._given(inputs)
        if out is not None and not (isinstance(out, Mapping) and out.keys() <= self._out_names):
            if not isinstance(out, Mapping):
                raise InputError(f"out takes arrays by name, got {type(out).__name__}", hint=f"the outputs are {', '.join(sorted(self._out_names))}")
            extra = sorted(repr(n) for n in out if n not in self._out_names)
            raise InputError(f"the model has no output {', '.join(extra)}", hint=f"the outputs are {', '.join(sorted(self._out_names))}")
        results = self._run(arrays, out)
        return unpack(self._structured["outputs"], results) if self._structured["outputs"] else results

    def _given(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The inputs in order; those that are left out and have a default are that. Raises InputError for a wrong name."""
        if self._structured["inputs"]:
            inputs = pack(self._structured["inputs"], inputs, {p.name: p.dtype for p in self._ins})
        try:
            arrays = [inputs[p.name] for p in self._ins]
            left = 0
        except (KeyError, TypeError, IndexError, AttributeError):
            if not isinstance(inputs, Mapping):
                raise InputError(f"run takes inputs by name, got {type(inputs).__name__}", hint=f"the inputs are {self._describe()}; call the module itself to give them in order") from None
            missing = [p.name for p in self._ins if p.name not in inputs and p.default is None]
            if missing:
                raise InputError(f"missing input {', '.join(missing)}", hint=f"the inputs are {self._describe()}") from None
            arrays = [inputs[p.name] if p.name in inputs else self._default(p) for p in self._ins]
            left = sum(p.name not in inputs for p in self._ins)
        if len(inputs) + left != len(arrays):
            extra = sorted(repr(n) for n in inputs if n not in self._names)
            raise InputError(f"the model has no input {', '.join(extra)}", hint=f"the inputs are {self._describe()}")
        return arrays

    def _default(self, p: _Port) -> Array:
        """What input ``p`` is in a call that leaves it out."""
        if p.default == "random":
            return np.frombuffer(os.urandom(8), p.dtype)
        raw = self._weights[p.default["offset"] : p.default["offset"] + p.default["bytes"]]
        shape = tuple(p.default["shape"])
        if p.bits < 8:
            return unpack_bits(raw, p.bits, shape, p.dtype, not p.dtype.name.startswith("u"))
        return raw.view(p.dtype).reshape(shape)

    def _describe(self) -> str:
        return ", ".join(f"{s.name} {s.dtype}[{', '.join(map(str, s.shape))}]{' (optional)' if s.optional else ''}" for s in self.inputs)

    def _context(self) -> Context:
        try:
            return self._idle.pop()
        except IndexError:
            if self._fns is None:
                raise TargetError(f"code for {self.manifest['target']['name']} does not run on this machine", hint="save it and load it there") from None
            if self.threads is None:
                from luthier.codegen.targets.target import usable_cores

                self.threads = usable_cores()
            return Context(self._fns, self._weights, self.threads, len(self._ins), len(self._outs))

    def _run(self, arrays: Sequence[Any], out: Mapping[str, Array] | None, profile: int = 0) -> dict[str, Array]:
        if self._intact is not None:
            self._intact()
        ctx = self._context()
        try:
            keep = []  # arrays must live until the call returns
            key = []
            ins = ctx.ins
            for i, (p, a) in enumerate(zip(self._ins, arrays, strict=True)):
                if type(a) is not np.ndarray or a.dtype != p.dtype or not a.flags.c_contiguous or p.bits < 8:
                    a = convert(a, p)
                shape = a.shape
                if len(shape) != p.rank:
                    raise InputError(f"input {p.name} has rank {len(shape)}, expected {p.rank}", shapes={"given": shape, "expected": p.shape})
                keep.append(a)
                key.append(shape)
                ins[WORDS * i] = address(a)
            tkey = tuple(key)
            if self._packed:
                for i, (p, a) in enumerate(zip(self._ins, tuple(keep), strict=True)):
                    if p.bits < 8:
                        packed = pack_bits(a, p.bits)
                        keep.append(packed)
                        ins[WORDS * i] = address(packed)
            if ctx.key != tkey:
                for i, p in enumerate(self._ins):
                    ins[WORDS * i + 2] = p.word
                    ins[WORDS * i + 3 : WORDS * i + 3 + p.rank] = tkey[i]
                ctx.key = tkey
            shapes = self._shapes.get(tkey)
            if shapes is None:
                shapes = self._infer(ctx, tkey)
            results: list[Array | None] = []
            given: list[Array] = []
            outs = ctx.outs
            for j, (q, s) in enumerate(zip(self._outs, shapes, strict=True)):
                a = None if out is None else out.get(q.name)
                if a is not None:
                    a = check_out(a, q, s, keep, given)
                    given.append(a)
                elif s is not None and q.bits >= 8:
                    a = _empty(s, q)
                if a is None:
                    outs[WORDS * j] = outs[WORDS * j + 1] = 0
                else:
                    outs[WORDS * j] = address(a)
                    outs[WORDS * j + 1] = a.nbytes
                results.append(a)
            assert self._fns is not None
            if profile:
                self._fns.set_profile(ctx.ptr, profile)
            status = self._fns.run(*ctx.args)
            if profile:
                self._fns.set_profile(ctx.ptr, None)
            if status:
                self._drop_outputs(ctx, results)
                ctx.check(status)
            for j, a in enumerate(results):
                if a is None:
                    results[j] = self._take(ctx, j)
                elif shapes[j] is None:
                    got = _shape(ctx, j, self._outs[j].rank)
                    if got != a.shape:
                        raise InputError(f"output {self._outs[j].name} has shape {list(got)}, the array given has {list(a.shape)}")
        except BaseException as e:
            ctx.key = None
            self._idle.append(ctx)
            if isinstance(e, MemoryError):  # numpy's, for an output
                raise KernelError(f"no memory for the outputs: {e}") from e
            raise
        self._idle.append(ctx)
        own = {} if out is None else {n: a for n, a in out.items() if a is not None}
        return {q.name: own.get(q.name, a) for q, a in zip(self._outs, results, strict=True)}  # type: ignore[misc]

    def _infer(self, ctx: Context, key: Any) -> list[tuple[int, ...] | None]:
        """Shapes of the outputs for input shapes; None where only the run decides."""
        assert self._fns is not None
        ctx.check(self._fns.infer(*ctx.args))
        shapes: list[tuple[int, ...] | None] = []
        for j, q in enumerate(self._outs):
            s = _shape(ctx, j, q.rank)
            shapes.append(None if any(x < 0 for x in s) else s)
        if len(self._shapes) >= 1024:
            self._shapes.clear()
        self._shapes[key] = shapes
        return shapes

    def _take(self, ctx: Context, j: int) -> Array:
        """An output that the module allocated."""
        assert self._fns is not None
        q = self._outs[j]
        shape = _shape(ctx, j, q.rank)
        n = math.prod(shape)
        nbytes = -(-n * q.bits // 8)
        raw = owned(ctx.outs[WORDS * j], nbytes, self._fns.free)
        if q.bits < 8:
            return unpack_bits(raw, q.bits, shape, q.dtype, not q.dtype.name.startswith("u"))
        return raw.view(q.dtype).reshape(shape) if n else np.empty(shape, q.dtype)

    def _drop_outputs(self, ctx: Context, results: Sequence[Array | None]) -> None:
        assert self._fns is not None
        for j, a in enumerate(results):
            if a is None and ctx.outs[WORDS * j]:
                self._fns.free(ctx.outs[WORDS * j])
                ctx.outs[WORDS * j] = 0

    # ------------------------------------------------------------ looking inside

    def profile(self, inputs: Mapping[str, Any], runs: int = 20) -> list[dict[str, Any]]:
        """Mean time of every kernel call over ``runs`` calls: dicts with ``kernel``, ``nodes`` (names), ``ms``, ``flops``,
        ``bytes`` (both of one call, 0 where unknown). All threads meet after every kernel, so the sum exceeds an ordinary call."""
        calls = self.manifest["calls"]
        arrays = self._given(inputs)
        self.run(inputs)
        times = np.zeros((max(len(calls), 1), 2), np.int64)
        for _ in range(max(1, runs)):
            self._run(arrays, None, times.ctypes.data)
        dims = {n: int(np.shape(arrays[i])[axis]) for n, (i, axis) in self.manifest["dims"].items()}
        rows = []
        for k, c in enumerate(calls):
            ms = float(times[k, 0]) / max(1, runs) / 1e6
            count = float(times[k, 1]) / max(1, runs)
            rows.append({
                "kernel": c["kernel"], "nodes": tuple(c["nodes"]), "ms": ms,
                "flops": int(evaluate(c["flops"], dims) * count), "bytes": int(evaluate(c["bytes"], dims) * count),
            })  # fmt: skip
        return rows

    def write_files(self, folder: Path, shard_mb: float | None = None) -> tuple[str, ...]:
        """The artifact's files but the manifest, into an existing folder; returns their names. ``shard_mb``: for web packages alone.
        Raises TargetError, ArtifactError."""
        from luthier.artifact import write_native

        if shard_mb is not None:
            raise ArtifactError(f"an artifact for {self.manifest['target']['name']} has no shards", hint="leave the shard size out")

        return write_native(self, folder)

    def save(self, path: str | Path, shard_mb: float | None = None, name: str | None = None, version: str | None = None) -> Path:
        """Write the artifact folder ``path`` (whole or not at all). For web packages alone: ``shard_mb``: the most megabytes of a file of
        weights (default 24); ``name``, ``version``: what npm calls it (default: as the folder, 1.0.0). Raises ArtifactError, TargetError
        without a linker."""
        from luthier.artifact import save

        return save(self, Path(path), shard_mb, name, version)


def _shape(ctx: Context, j: int, rank: int) -> tuple[int, ...]:
    """The shape of output ``j`` after a call."""
    return tuple(ctx.outs[WORDS * j + 3 : WORDS * j + 3 + rank])


def _spec(d: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(d["name"], DTYPES[d["code"]][0], tuple(d["shape"]), "default" in d)


def convert(a: Any, p: _Port) -> Array:
    """Anything that is an array to a contiguous numpy array of the right dtype. Raises InputError."""
    if not isinstance(a, np.ndarray):
        if hasattr(a, "__dlpack__") and not isinstance(a, np.generic):
            a = dlpack.view(a, f"input {p.name}")
        elif hasattr(a, "__array_interface__") or hasattr(a, "__array__") or isinstance(a, np.generic):
            a = np.asarray(a)
        else:
            try:
                a = np.asarray(a, p.dtype)
            except (TypeError, ValueError, OverflowError) as e:
                raise InputError(f"input {p.name}: {type(a).__name__} is no array of {p.dtype}: {e}") from e
    if a.dtype != p.dtype:
        raise InputError(f"input {p.name} has dtype {a.dtype}, expected {p.dtype}", hint=f"convert it with .astype({p.dtype.name!r})")
    return a if a.flags.c_contiguous else np.ascontiguousarray(a)


def _empty(shape: tuple[int, ...], q: _Port) -> Array:
    """Memory for an output. Raises KernelError where there is none."""
    try:
        return np.empty(shape, q.dtype)
    except (MemoryError, ValueError):
        raise KernelError(f"out of memory: {math.prod(shape) * q.bits // 8} bytes for {q.name}") from None


def check_out(a: Any, q: _Port, shape: tuple[int, ...] | None, ins: Sequence[Array] = (), outs: Sequence[Array] = ()) -> Array:
    """An array for an output, as numpy's. Raises InputError when it cannot take the result."""
    if not isinstance(a, np.ndarray) and hasattr(a, "__dlpack__"):
        a = dlpack.view(a, f"out[{q.name!r}]")
    if not isinstance(a, np.ndarray) or a.dtype != q.dtype or not a.flags.c_contiguous or not a.flags.writeable or q.bits < 8:
        raise InputError(f"out[{q.name!r}] must be a writable contiguous array of {q.dtype}")
    if shape is not None and a.shape != shape:
        raise InputError(f"out[{q.name!r}] has shape {list(a.shape)}, the output has {list(shape)}")
    if len(a.shape) != q.rank:
        raise InputError(f"out[{q.name!r}] has rank {a.ndim}, the output has {q.rank}")
    if any(np.may_share_memory(a, x) for x in ins):
        raise InputError(f"out[{q.name!r}] shares memory with an input", hint="give another array")
    if any(np.may_share_memory(a, x) for x in outs):
        raise InputError(f"out[{q.name!r}] shares memory with another output", hint="give each output an array of its own")
    return a


def evaluate(e: Any, dims: Mapping[str, int]) -> float:
    """A size formula of the manifest: number, name of a dim, or [operator, operands]; 0 when it needs what only a run knows."""
    if isinstance(e, str):
        return float(dims.get(e, 0))
    if not isinstance(e, list):
        return float(e)
    a, b = (evaluate(x, dims) for x in e[1:])
    op = e[0]
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    if op == "min":
        return min(a, b)
    if op == "max":
        return max(a, b)
    if op == "//":
        return a // b if b else 0.0
    if op == "%":
        return a % b if b else 0.0
    raise LuthierError(f"unknown operator {op!r} in the manifest")


def load(path: str | Path, threads: int | None = None) -> Module:
    """An artifact folder as a Module. Raises ArtifactError when it is missing, damaged or for another machine."""
    from luthier.artifact import load as load_folder

    return load_folder(Path(path), threads)


def load_module(path: Path, manifest: dict[str, Any], threads: int | None) -> Module:
    """A module of machine code from its folder. Raises ArtifactError."""
    from luthier.artifact import CPU_FILES, check_files, missing_features
    from luthier.manifest import demand

    demand(manifest, path, "target.triple", "target.features")
    check_files(path, manifest, CPU_FILES)
    lacking = missing_features(manifest["target"])
    if lacking:
        raise ArtifactError(
            f"{path} was compiled for {manifest['target']['name']}, this machine lacks {', '.join(lacking)}",
            hint="compile it for this machine, or for cpu:x86-64-v2",
        )
    if manifest["files"]["weights.bin"]["bytes"] < manifest["weights_bytes"]:
        raise ArtifactError(f"{path / 'weights.bin'} holds fewer than {manifest['weights_bytes']} bytes", hint="compile the model again")
    weights, intact = map_file(path / "weights.bin")
    return Module(manifest, SharedObject(path / "model.so"), weights, threads, path, intact)
