"""What builds and loads a Module for every kind of target: one line a kind, modules imported when they are used.

``BUILDERS``: a module with ``build_module(program, target, threads) -> Module``. ``LOADERS``: a module with
``load_module(path, manifest, threads) -> Module``, which imports neither ``onnx`` nor ``luthier.ir``.
"""

from __future__ import annotations

import importlib
from typing import Any

from luthier.errors import ArtifactError, TargetError

BUILDERS = {"cpu": "luthier.backends.cpu", "wasm": "luthier.backends.wasm", "webgpu": "luthier.backends.webgpu", "cuda": "luthier.backends.cuda"}
LOADERS = {
    "cpu": "luthier.module", "wasm": "luthier.backends.wasm_module", "webgpu": "luthier.backends.webgpu_module", "cuda": "luthier.backends.cuda_module",
}  # fmt: skip


def builder(kind: str) -> Any:
    """The module that builds for ``kind``. Raises TargetError when there is none."""
    if kind not in BUILDERS:
        raise TargetError(f"nothing builds modules for targets of kind {kind!r}", hint=f"known: {', '.join(BUILDERS)}")
    return importlib.import_module(BUILDERS[kind])


def loader(kind: str) -> Any:
    """The module that loads artifacts of ``kind``. Raises ArtifactError when there is none."""
    if kind not in LOADERS:
        raise ArtifactError(f"the artifact is for a target of kind {kind!r}", hint=f"this package knows {', '.join(LOADERS)}")
    return importlib.import_module(LOADERS[kind])
