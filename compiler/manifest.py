"""``manifest.json`` as it is read: a regular file of bearable size, every field of the right type, no file named outside of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.backends.native import ABI_VERSION, DTYPES, MAX_RANK
from luthier.errors import ArtifactError
from luthier.files import inside, open_regular

__all__ = ["FORMAT", "NAME", "demand", "read_manifest"]

FORMAT = 1
NAME = "manifest.json"
_LIMIT = 1 << 28  # bytes


class _Optional:
    def __init__(self, shape: Any) -> None:
        self.shape = shape


def _count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 1 << 62


def _file(x: Any) -> bool:
    return isinstance(x, str) and inside(x)


def _code(x: Any) -> bool:
    return type(x) is int and x in DTYPES


def _shape(x: Any) -> bool:
    return isinstance(x, list) and len(x) <= MAX_RANK and all(isinstance(d, str) or _count(d) for d in x)


def _formula(x: Any) -> bool:
    """A number, a name, or [operator, left, right]."""
    left = [x]
    while left:
        e = left.pop()
        if isinstance(e, list):
            if len(e) != 3 or not isinstance(e[0], str):
                return False
            left += e[1:]
        elif type(e) is not int and not isinstance(e, str):
            return False
    return True


def _place(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(_count(k) for k in x)


def _default(x: Any) -> bool:
    """What an input is in a call that leaves it out."""
    return x == "random" or isinstance(x, dict) and _count(x.get("offset")) and _count(x.get("bytes")) and _shape(x.get("shape"))


# A type, a predicate, [what every element is], {str: what every value is} or {key: what its value is}
_PORT = {"name": str, "code": _code, "shape": _shape, "default": _Optional(_default)}
_SHARD = {"file": _file, "offset": _count, "bytes": _count, "sha256": str}
_SHAPE: dict[Any, Any] = {
    "name": str, "inputs": [_PORT], "outputs": [_PORT], "dims": {str: _place}, "weights_bytes": _count,
    "target": {"kind": _Optional(str), "name": str, "triple": _Optional(str), "features": _Optional([str])},
    "calls": [{"kernel": str, "nodes": [str], "flops": _formula, "bytes": _formula}],
    "files": {str: {"bytes": _count, "sha256": str}}, "extra": _Optional([_file]),
    "web": _Optional({"shards": [_SHARD]}),
    "wasm": _Optional({
        "pages": _count, "max_pages": _count, "weights": _count, "io": _count, "error": _count, "parallel": bool, "names": [str],
    }),
    "language": _Optional({"vocabulary": _count, "capacity": _count, "chunk": _count, "state": [str], "end": [_count]}),
}  # fmt: skip


def _misfit(value: Any, shape: Any, where: str) -> str:
    """What in ``value`` is not as ``shape`` says, empty for nothing."""
    if isinstance(shape, type):
        return "" if type(value) is shape else f"{where} is {_short(value)}"
    if callable(shape):
        return "" if shape(value) else f"{where} is {_short(value)}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is {_short(value)}"
        return next((m for k, v in enumerate(value) if (m := _misfit(v, shape[0], f"{where}[{k}]"))), "")
    if not isinstance(value, dict):
        return f"{where or 'the manifest'} is {_short(value)}"
    if str in shape:
        return next((m for k, v in value.items() if (m := _misfit(v, shape[str], f"{where}.{k}"))), "")
    for key, part in shape.items():
        path = f"{where}.{key}".lstrip(".")
        if isinstance(part, _Optional):
            if key not in value:
                continue
            part = part.shape
        elif key not in value:
            return f"{path} is missing"
        if m := _misfit(value[key], part, path):
            return m
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises ArtifactError when it is missing, no manifest, or of another version."""
    path = folder / NAME
    try:
        with open_regular(path) as f:
            text = f.read(_LIMIT + 1)
        if len(text) > _LIMIT:
            raise ArtifactError(f"{path} is too large for a manifest")
        manifest = json.loads(text)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is no artifact: it has no manifest.json", hint="make one with: luthier compile MODEL -o FOLDER") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("abi") != ABI_VERSION:
        found = f"format {_short(manifest.get('format'))}, ABI {_short(manifest.get('abi'))}" if isinstance(manifest, dict) else "no object"
        raise ArtifactError(f"{folder} has {found}; this package reads format {FORMAT}, ABI {ABI_VERSION}", hint="compile the model again")
    wrong = _misfit(manifest, _SHAPE, "") or _places(manifest)
    if wrong:
        raise ArtifactError(f"{path} is damaged: {wrong}", hint="compile the model again")
    return manifest


def demand(manifest: Mapping[str, Any], folder: Path, *keys: str) -> None:
    """Parts that a kind of target needs; a dot stands between a part and its field. Raises ArtifactError for one that is missing."""
    for key in keys:
        part, _, name = key.partition(".")
        if part not in manifest or name and name not in manifest[part]:
            raise ArtifactError(f"{folder / NAME} is damaged: {key} is missing", hint="compile the model again")


def _places(manifest: Mapping[str, Any]) -> str:
    """Dims that no input has."""
    ranks = [len(p["shape"]) for p in manifest["inputs"]]
    return next((f"dims.{n} is {at}" for n, at in manifest["dims"].items() if at[0] >= len(ranks) or at[1] >= ranks[at[0]]), "")
