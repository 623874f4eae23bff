"""GGUF files: metadata, tensors as they are stored, and (in :mod:`luthier.importers.gguf_llama`) models built from them.

The file is mapped, not read. Format: the ggml project's description of GGUF, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from luthier.errors import InvalidModel
from luthier.files import open_regular
from luthier.importers.gguf.blocks import BLOCKS, Grouped, read_blocks
from luthier.importers.gguf.metadata import KEYS, read_metadata

Array = np.ndarray[Any, Any]
PLAIN: dict[int, tuple[str, str]] = {0: ("F32", "<f4"), 1: ("F16", "<f2"), 28: ("F64", "<f8"), 30: ("BF16", "<u2")}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMPY = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_NAMES = {t.number: n for n, t in BLOCKS.items()} | {n: v[0] for n, v in PLAIN.items()}
_LIMIT = 1 << 28  # elements of an array, bytes of a text: more is a damaged file


@dataclass(frozen=True, slots=True)
class Tensor:
    """``kind``: ``F32``, ``F16``, ``BF16``, ``F64`` or a block type; ``shape``: rows first (the file says columns first); ``raw``: bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    raw: Array

    def grouped(self) -> Grouped:
        """A matrix of a block type as integers and scales. Raises InvalidModel for other tensors."""
        if self.kind not in BLOCKS or len(self.shape) != 2:
            raise InvalidModel(f"tensor {self.name} is {self.kind}{list(self.shape)}, not a matrix of quantized blocks")
        try:
            return read_blocks(self.kind, self.raw, self.shape[0], self.shape[1])
        except ValueError as e:
            raise InvalidModel(f"tensor {self.name}: {e}") from None

    def numpy(self) -> Array:
        """The values in f32."""
        if self.kind in BLOCKS:
            rows = int(np.prod(self.shape[:-1]))
            return read_blocks(self.kind, self.raw, rows, self.shape[-1]).dequantized().reshape(self.shape)
        a = self.raw.view(next(d for n, d in PLAIN.values() if n == self.kind))
        if self.kind == "BF16":
            a = (a.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(a.astype(np.float32).reshape(self.shape))


@dataclass(slots=True)
class GGUF:
    """``metadata``: values by key (arrays as numpy arrays, texts as lists); ``tensors`` by name."""

    path: str
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    data: Any = field(repr=False, default=None)

    def value(self, key: str) -> Any:
        """A value of the metadata by its key in :data:`luthier.importers.gguf.metadata.KEYS`. Raises InvalidModel when it is missing (and has no
        default), of another type or out of range."""
        return read_metadata(self.path, self.metadata, key)

    def check_metadata(self) -> None:
        """Raises InvalidModel for a wrong value of any key that is read."""
        for key in KEYS:
            self.value(key)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Raises InvalidModel when it is missing or has another shape."""
        t = self.tensors.get(name)
        if t is None:
            raise InvalidModel(f"{self.path} lacks tensor {name!r}", hint="the file must hold a whole model, not a part of a split one")
        if shape is not None and t.shape != shape:
            raise InvalidModel(f"tensor {name!r} has shape {list(t.shape)}, expected {list(shape)}")
        return t


class _Reader:
    def __init__(self, data: Any, path: str) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def take(self, n: int, what: str) -> bytes:
        if n < 0 or self.at + n > self.size:
            raise InvalidModel(f"{self.path} ends within {what} (byte {self.at} of {self.size})", hint="the file is truncated: fetch it again")
        b = bytes(self.data[self.at : self.at + n])
        self.at += n
        return b

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        n = self.number("Q", what)
        if n > _LIMIT:
            raise InvalidModel(f"{self.path}: {what} would be {n} bytes long", hint="the file is damaged")
        return self.take(n, what).decode("utf-8", "replace")

    def value(self, kind: int, what: str) -> Any:
        if kind == 8:
            return self.text(what)
        if kind == 9:
            of, n = self.number("I", what), self.number("Q", what)
            if n > _LIMIT:
                raise InvalidModel(f"{self.path}: {what} would have {n} elements", hint="the file is damaged")
            if of in _NUMPY:
                d = np.dtype(_NUMPY[of])
                return np.frombuffer(self.take(n * d.itemsize, what), d)
            return [self.value(of, what) for _ in range(n)]
        if kind not in _SCALARS:
            raise InvalidModel(f"{self.path}: {what} has the unknown type {kind}")
        return self.number(_SCALARS[kind], what)


def read_gguf(path: str | Path) -> GGUF:
    """The contents of a GGUF file. Raises InvalidModel when it is none, is truncated, or has tensors of unknown types."""
    name = str(path)
    try:
        with open_regular(path) as f:
            size = f.seek(0, 2)
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as e:
        raise InvalidModel(f"cannot read {name}: {e.strerror or e}") from None
    r = _Reader(data, name)
    if size < 4 or r.take(4, "the header") != b"GGUF":
        raise InvalidModel(f"{name} is no GGUF file: it does not begin with 'GGUF'")
    version = r.number("I", "the header")
    if version not in (2, 3):
        raise InvalidModel(f"{name} is GGUF version {version}; versions 2 and 3 are read", hint="convert it with a current tool (big-endian files are not read)")
    count, pairs = r.number("Q", "the header"), r.number("Q", "the header")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = r.text("a metadata key")
        if key in metadata:
            raise InvalidModel(f"{name} has the metadata {key!r} twice", hint="the file is damaged")
        metadata[key] = r.value(r.number("I", f"metadata {key!r}"), f"metadata {key!r}")
    entries = []
    names: set[str] = set()
    for _ in range(count):
        t = r.text("a tensor's name")
        if t in names:
            raise InvalidModel(f"{name} has the tensor {t!r} twice", hint="the file is damaged")
        names.add(t)
        rank = r.number("I", f"tensor {t!r}")
        if not 1 <= rank <= 4:
            raise InvalidModel(f"{name}: tensor {t!r} has rank {rank}")
        dims = [r.number("Q", f"tensor {t!r}") for _ in range(rank)]
        entries.append((t, tuple(int(d) for d in reversed(dims)), r.number("I", f"tensor {t!r}"), r.number("Q", f"tensor {t!r}")))
    align = read_metadata(name, metadata, "general.alignment")
    if align & (align - 1):
        raise InvalidModel(f"{name}: the alignment {align} is no power of two")
    base = -(-r.at // align) * align
    whole = np.frombuffer(data, np.uint8)
    tensors = {}
    for t, shape, kind, offset in entries:
        if kind not in _NAMES:
            raise InvalidModel(f"{name}: tensor {t!r} has the type number {kind}, which is not supported", hint="known: " + ", ".join(sorted(_NAMES.values())))
        nbytes = _bytes(t, _NAMES[kind], shape)
        if base + offset + nbytes > size:
            raise InvalidModel(f"{name} ends within tensor {t!r}: {base + offset + nbytes} bytes are needed, there are {size}", hint="the file is truncated: fetch it again")
        tensors[t] = Tensor(t, _NAMES[kind], shape, whole[base + offset : base + offset + nbytes])
    return GGUF(name, version, metadata, tensors, data)


def _bytes(name: str, kind: str, shape: tuple[int, ...]) -> int:
    n = int(np.prod([int(s) for s in shape], dtype=object))
    if kind not in BLOCKS:
        return n * np.dtype(next(d for k, d in PLAIN.values() if k == kind)).itemsize
    b = BLOCKS[kind]
    if shape[-1] % b.columns:
        raise InvalidModel(f"tensor {name!r}: {shape[-1]} columns do not fill {kind} blocks of {b.columns}")
    return n // b.columns * b.size


def describe(g: GGUF) -> Mapping[str, int]:
    """How many tensors there are of each type."""
    out: dict[str, int] = {}
    for t in g.tensors.values():
        out[t.kind] = out.get(t.kind, 0) + 1
    return out
