"""An ONNX file without copying its weights.

Protobuf hands out ``raw_data`` as a fresh copy, which costs more than everything else for large models. :func:`split` reads the
wire format just deep enough to cut large ``raw_data`` fields out of the main graph's initializers: what is left is a small,
ordinary ModelProto, and the weights stay views of the mapped file. Field numbers are those of onnx.proto: ModelProto.graph 7,
GraphProto.initializer 5, TensorProto.raw_data 9.
"""

from __future__ import annotations

import mmap
import os

from luthier.files import open_regular

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
LARGE = 4096


def split(path: str | os.PathLike[str]) -> tuple[bytes, dict[int, memoryview]]:
    """(the model without large weights, {number of the initializer: its raw bytes}).

    Raises OSError when the file cannot be read and ValueError when its framing is broken."""
    with open_regular(path) as f:
        if os.fstat(f.fileno()).st_size == 0:
            return b"", {}
        data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    raws: dict[int, memoryview] = {}
    out: list[bytes | memoryview] = []
    for number, start, body, end in fields(data):
        if number == GRAPH and body >= 0:
            out += _wrap(GRAPH, _graph(data[body:end], raws))
        else:
            out.append(data[start:end])
    return b"".join(out), raws


def forget(raws: dict[int, memoryview]) -> None:
    """Give the pages of the mapped file back to the system; what is still needed of it is read again on the next access."""
    for view in raws.values():
        file = view.obj
        if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            file.madvise(mmap.MADV_DONTNEED)
        return


def _graph(data: memoryview, raws: dict[int, memoryview]) -> list[bytes | memoryview]:
    out: list[bytes | memoryview] = []
    count = 0
    for number, start, body, end in fields(data):
        if number != INITIALIZER or body < 0:
            out.append(data[start:end])
            continue
        if end - body > LARGE:
            kept: list[bytes | memoryview] = []
            tensor = data[body:end]
            for n, s, b, e in fields(tensor):
                if n == RAW_DATA and b >= 0 and e - b > LARGE:
                    raws[count] = tensor[b:e]
                else:
                    kept.append(tensor[s:e])
            out += _wrap(INITIALIZER, kept)
        else:
            out.append(data[start:end])
        count += 1
    return out


def _wrap(number: int, parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    return [_varint(number << 3 | 2) + _varint(sum(len(p) for p in parts)), *parts]


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number runs past the end of the data")
        b = data[at]
        at += 1
        value |= (b & 127) << shift
        if b < 128:
            return value, at
        shift += 7


def fields(data: memoryview) -> list[tuple[int, int, int, int]]:
    """(field number, start of the tag, start of the contents or -1 when it has no length, end) of each field, in order."""
    out = []
    at, size = 0, len(data)
    while at < size:
        start = at
        tag, at = _read_varint(data, at)
        wire, body = tag & 7, -1
        if wire == 0:
            _, at = _read_varint(data, at)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            n, at = _read_varint(data, at)
            body = at
            at += n
        else:
            raise ValueError(f"wire type {wire} is not used by ONNX")
        if at > size:
            raise ValueError("a field runs past the end of the data")
        out.append((tag >> 3, start, body, at))
    return out
