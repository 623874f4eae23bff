"""Weights out of a CTranslate2 `model.bin` (binary versions 3 to 6), in numpy alone: the layout of its `specs/model_spec.py`.

Little-endian: u32 version; the name of the specification; u32 revision; u32 count of variables; for each its name, u8 rank, u32
per extent, u8 type, u32 bytes, the bytes; u32 count of aliases; for each its name and the variable's. A string is u16 length, its
bytes, a zero byte that the length counts.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16, np.uint16)  # the last one holds bfloat16
BFLOAT16 = 5


class _Reader:
    """Takes values off a buffer, front to back."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise ValueError(f"{self.path} ends at byte {len(self.data)}, {size} bytes are wanted from {self.at} on")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))
        return int(value)

    def text(self) -> str:
        return self.take(self.number("H"))[:-1].decode()


def read_variables(path: Path) -> dict[str, NDArray[Any]]:
    """All variables by name; floats become f32, quantized weights (`NAME` beside `NAME_scale`) are divided by their scale, one a
    row or one for all. Raises ValueError for another version, a type that is unknown, a file that is cut short."""
    reader = _Reader(path.read_bytes(), path)
    version = reader.number("I")
    if not 3 <= version <= 6:
        raise ValueError(f"{path}: binary version {version}; 3 to 6 can be read")
    reader.text(), reader.number("I")
    found: dict[str, NDArray[Any]] = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        kind = reader.number("B")
        if kind >= len(TYPES):
            raise ValueError(f"{path}: {name} is of the unknown type {kind}")
        value: NDArray[Any] = np.frombuffer(reader.take(reader.number("I")), np.dtype(TYPES[kind]).newbyteorder("<")).reshape(
            shape
        )
        if kind == BFLOAT16:
            value = (value.astype(np.uint32) << 16).view(np.float32)
        found[name] = value.astype(np.float32) if value.dtype.kind == "f" else value
    for name in [n for n in found if f"{n}_scale" in found]:
        scale = found.pop(f"{name}_scale")
        found[name] = found[name].astype(np.float32) / (scale[:, None] if scale.ndim else scale)
    for _ in range(reader.number("I")):
        alias, name = reader.text(), reader.text()
        if name in found:  # the scale of an alias is one, too
            found[alias] = found[name]
    return found
