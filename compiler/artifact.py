"""The artifact: a folder that runs without this package.

=================  =====================================================================================
``manifest.json``  format and ABI version, target, inputs, outputs, kernels, SHA-256 of the other files
``model.so``       code and runtime; needs nothing but libc
``model.h``        the C header
``weights.bin``    constants at 64-byte aligned offsets, to be mapped
=================  =====================================================================================

Written beside its place, which it takes at once: a folder of that name is the old artifact or the whole new one.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.codegen.targets.backend import loader_of
from luthier.errors import ArtifactError
from luthier.files import open_regular
from luthier.manifest import FORMAT, NAME, read_manifest
from luthier.replace_folder import replacing

if TYPE_CHECKING:
    from luthier.module import Module

__all__ = ["FORMAT", "load", "save"]

CPU_FILES = ("model.so", "model.h", "weights.bin")


def save(module: Module, path: Path, shard_mb: float | None = None, name: str | None = None, version: str | None = None) -> Path:
    """Write ``module`` as the folder ``path``; an artifact that is there is replaced. ``name``, ``version``: of a web package.

    Raises ArtifactError when something else is there, a name is no package's or the disk refuses, TargetError without a linker."""
    try:
        path = Path(os.path.realpath(path))
    except (OSError, ValueError) as e:
        raise ArtifactError(f"cannot write {path}: {e}") from e
    if module.is_package:
        module.manifest["package"] = package_names(path, name, version)
    elif name is not None or version is not None:
        raise ArtifactError(f"an artifact for {module.manifest['target']['name']} is no npm package", hint="leave name and version out")
    try:
        if path.exists() and not (path / NAME).is_file() and (not path.is_dir() or any(path.iterdir())):
            raise ArtifactError(f"{path} exists and is no artifact", hint="name another folder")
        with replacing(path) as fresh:
            _write(module, fresh, shard_mb)
    except OSError as e:
        raise ArtifactError(f"cannot write {path}: {e.strerror or e}") from e
    return path


def package_names(path: Path, name: str | None, version: str | None) -> dict[str, str]:
    """What npm calls the package in the folder ``path``: after it, unless the caller has named it. Raises ArtifactError."""
    if name is None:
        name = re.sub(r"[^a-z0-9._~-]+", "-", path.name.removesuffix(".luthier").lower()).strip("-._") or "model"
    elif not re.fullmatch(r"(@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*", name) or len(name) > 214:
        raise ArtifactError(f"{name!r} is no name of an npm package", hint="small letters, digits and -._~, with or without @scope/ before it")
    if version is None:
        version = "1.0.0"
    elif not re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", version):
        raise ArtifactError(f"{version!r} is no version of an npm package", hint="three numbers, such as 1.2.0")
    return {"name": name[:214], "version": version}


def _write(module: Module, folder: Path, shard_mb: float | None) -> None:
    names = module.write_files(folder, shard_mb)
    for name, make in module.files.items():
        (folder / name).write_bytes(make())
    names = (*names, *module.files)
    known = {s["file"]: {"bytes": s["bytes"], "sha256": s["sha256"]} for s in module.manifest.get("web", {}).get("shards", ())}
    files = {name: known.get(name) or _digest(folder / name) for name in names}
    manifest = {**module.manifest, "format": FORMAT, "files": files, "extra": list(module.files)}
    (folder / NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def write_native(module: Module, folder: Path) -> tuple[str, ...]:
    """The files of a module of machine code; returns their names. Raises TargetError without a linker."""
    if isinstance(module._source, Path):
        for name in CPU_FILES:
            shutil.copyfile(module._source / name, folder / name)
    else:
        from luthier.codegen.llvm.backend import link_shared
        from luthier.codegen.targets.target import parse_target

        link_shared(module._source, folder / "model.so", parse_target(module.manifest["target"]["name"]))
        header = importlib.resources.files("luthier.codegen.runtime").joinpath("luthier.h").read_text(encoding="utf-8")
        (folder / "model.h").write_text(header, encoding="utf-8")
        with open(folder / "weights.bin", "wb") as f:
            module._weights[: module.manifest["weights_bytes"]].tofile(f)
    return CPU_FILES


def _digest(path: Path) -> dict[str, Any]:
    with open_regular(path) as f:
        return {"bytes": os.fstat(f.fileno()).st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def load(path: Path, threads: int | None = None) -> Module:
    """An artifact as a Module. Raises ArtifactError when it is missing, damaged, of another version or for another machine."""
    path = path.absolute()
    manifest = read_manifest(path)
    while True:
        try:
            module: Module = loader_of(manifest["target"].get("kind", "cpu")).load_module(path, manifest, threads)
            extra = manifest.get("extra", ())
            check_files(path, manifest, extra)
            break
        except ArtifactError:
            before, manifest = manifest, read_manifest(path)
            if manifest == before:
                raise  # otherwise another process has just replaced the folder
    module.files = {name: (path / name).read_bytes for name in extra}
    return module


def check_files(path: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Raises ArtifactError when a file of the artifact is missing or differs from its checksum."""
    for name in names:
        want = manifest["files"].get(name)
        try:
            got = _digest(path / name)
        except OSError as e:
            raise ArtifactError(f"cannot read {path / name}: {e.strerror or e}") from e
        if got != want:
            raise ArtifactError(f"{path / name} is damaged: its checksum differs from the manifest's", hint="compile the model again")


# features whose absence makes code crash, as Linux spells them where it differs
_LINUX = {
    "sse4.1": "sse4_1", "sse4.2": "sse4_2", "lzcnt": "abm", "bmi": "bmi1", "avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16", "avx512vbmi2": "avx512_vbmi2", "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
}  # fmt: skip
_CHECKED = frozenset(
    "ssse3 sse4.1 sse4.2 popcnt avx avx2 fma f16c bmi bmi2 lzcnt avx512f avx512bw avx512cd avx512dq avx512vl avx512vbmi".split()
) | frozenset(_LINUX)


def missing_features(target: dict[str, Any]) -> list[str]:
    """What the artifact's code may use and this machine does not have."""
    import platform

    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    wanted = target["triple"].split("-")[0]
    if machine != wanted:
        return [f"the architecture {wanted}"]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []  # no way to know: the processor decides
    flags = next((set(line.split(":", 1)[1].split()) for line in text.splitlines() if line.startswith("flags")), None)
    if flags is None:
        return []
    return sorted(f for f in target["features"] if f in _CHECKED and _LINUX.get(f, f) not in flags)
