"""What a failed compilation leaves behind: a folder with everything needed to see the failure again.

================  ====================================================================================
``bundle.json``   the error with its traceback, target, shapes, threads, settings, versions, elided weights
``model.onnx``    the model; weights of more than 4,096 elements are left out and refilled by their names
``ir/``           what ``LUTHIER_DUMP`` writes: the graph after each pass, the program, kernels, as far as it came
================  ====================================================================================

``luthier reduce FOLDER`` shrinks it. Errors that tell users about their model or machine leave nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from luthier import settings
from luthier.errors import (
    ArtifactError,
    InputError,
    InvalidModel,
    LuthierError,
    SettingError,
    ShapeError,
    TargetError,
    TypeMismatch,
    UnsupportedOperator,
)

__all__ = ["USER_ERRORS", "read_bundle", "record", "signature"]

USER_ERRORS = (InvalidModel, UnsupportedOperator, ShapeError, TypeMismatch, InputError, ArtifactError, TargetError, SettingError)
KEEP = 4096  # elements of a weight that is stored
BUNDLES = 20  # newest ones kept in the folder
_PACKAGES = ("luthier", "numpy", "onnx", "llvmlite", "ml_dtypes")


def record(error: BaseException, model: Any, options: Mapping[str, Any], again: Callable[[], Any]) -> Path | None:
    """Write a bundle for ``error`` and say so in it. ``again`` compiles once more, to fill ``ir/``. None when it cannot be written."""
    folder = settings.repro_dir.get() or settings.cache_dir.get() / "repro"
    try:
        path = _write(error, model, options, again, folder)
    except Exception as e:  # whatever is wrong with the bundle must not hide the error that it is for
        _tell(error, f"no repro bundle could be written: {type(e).__name__}: {e}")
        return None
    if isinstance(error, LuthierError):
        error.bundle = str(path)
    else:
        _tell(error, f"repro bundle: {path}")
    return path


def _tell(error: BaseException, text: str) -> None:
    error.add_note(text)


def _write(error: BaseException, model: Any, options: Mapping[str, Any], again: Callable[[], Any], folder: Path) -> Path:
    import onnx

    if isinstance(model, (str, os.PathLike)):
        proto = onnx.load(os.fspath(model))
    else:
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
    elided = _elide(proto)
    data = proto.SerializeToString()
    digest = hashlib.sha256(data + signature(error).encode() + repr(sorted(options.items())).encode()).hexdigest()[:10]
    name = re.sub(r"\W+", "-", proto.graph.name or "model")[:40].strip("-") or "model"
    path = folder / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as fresh:
        work = Path(fresh) / "bundle"
        work.mkdir()
        (work / "model.onnx").write_bytes(data)
        facts = {
            "error": type(error).__name__, "message": str(error), "signature": signature(error),
            "traceback": traceback.format_exception(type(error), error, error.__traceback__), "options": {k: _plain(v) for k, v in options.items()},
            "settings": {s.name: s.text() for s in settings.all_settings() if s.is_set()}, "versions": _versions(), "elided": elided,
        }  # fmt: skip
        (work / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _fill_ir(work / "ir", again)
        if path.exists():
            shutil.rmtree(path)
        work.rename(path)
    for old in sorted((p for p in folder.iterdir() if (p / "bundle.json").is_file()), key=lambda p: p.stat().st_mtime)[:-BUNDLES]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _plain(v: Any) -> Any:
    return {k: list(x) for k, x in v.items()} if isinstance(v, Mapping) else v


def _versions() -> dict[str, str]:
    out = {"python": sys.version.split()[0], "machine": platform.machine(), "system": platform.system()}
    for p in _PACKAGES:
        try:
            out[p] = version(p)
        except PackageNotFoundError:
            out[p] = "not installed"
    return out


def _fill_ir(folder: Path, again: Callable[[], Any]) -> None:
    """The dump of a second attempt, which fails as well."""
    folder.mkdir()
    try:
        with settings.dump.temporarily(str(folder)):
            again()
    except Exception as e:
        (folder / "failed.txt").write_text(f"{type(e).__name__}: {e}\n", encoding="utf-8")


def signature(error: BaseException) -> str:
    """What makes two failures the same: the class and the message without names and numbers."""
    text = error.message if isinstance(error, LuthierError) else str(error)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "_", text.splitlines()[0] if text else "")
    return f"{type(error).__name__}: " + re.sub(r"[\w./]*\d[\w./]*|%\w+|@\w+", "#", text)[:200]


def _elide(proto: Any) -> list[dict[str, Any]]:
    """Takes the data of large initializers out; what is needed to refill them."""
    out = []
    for t in proto.graph.initializer:
        n = int(np.prod(t.dims, dtype=np.int64))
        if n > KEEP:
            out.append({"name": t.name, "type": t.data_type, "shape": list(t.dims)})
            for f in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                t.ClearField(f)
    return out


def read_bundle(path: Path) -> tuple[Any, dict[str, Any]]:
    """(model, facts) of a bundle, left-out weights refilled by their names: floats small and normal, bytes any, other integers 0.

    Raises InputError when the folder is no bundle."""
    import onnx
    import onnx.numpy_helper

    try:
        facts = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
        proto = onnx.load_model_from_string((path / "model.onnx").read_bytes())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is no repro bundle: {e}") from e
    elided = {e["name"] for e in facts["elided"]}
    for t in proto.graph.initializer:
        if t.name in elided:
            rng = np.random.default_rng(zlib.crc32(t.name.encode()))
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type))
            if dtype.kind in "iu" and dtype.itemsize == 1:
                a = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, tuple(t.dims), dtype)
            elif dtype.kind in "iub":
                a = np.zeros(tuple(t.dims), dtype)
            else:
                a = (rng.standard_normal(tuple(t.dims), np.float32) * 0.05).astype(dtype)
            t.CopyFrom(onnx.numpy_helper.from_array(a, t.name))
    return proto, facts
