"""Backends as data. A backend is one file of ``codegen/targets/backends/``, called as the kind of its targets, with ``BACKEND``; the
folder's listing is the registry, and nothing else names one.

Whatever a record refers to is a string and imported when it is used: reading all records loads no layer and no third-party package.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

from luthier.codegen.targets import backends
from luthier.errors import ArtifactError, TargetError


@dataclass(frozen=True, slots=True)
class Backend:
    """``kind``: what a target's name starts with. Strings ``MODULE:NAME``:

    * ``parse(text) -> Target`` for what follows ``KIND:`` (empty for the kind alone; TargetError for what it does not know), and
      ``known``, a tuple of the names that it takes;
    * ``builder(program, target, threads) -> Module``, which takes ``ahead`` and ``record`` too where the two fields below say so;
    * ``loader(path, manifest, threads) -> Module``, for artifacts: its module imports neither ``onnx`` nor ``luthier.ir``;
    * ``ahead(target)``: a context whose ``kernel(func)`` starts on kernels while others are still scheduled; empty for none.

    ``retiles``: a module holds several variants, and ``record`` (what register tiles decided) makes the others. ``measures``: kernels run
    in the isolated measurer. ``measures_ceilings``: bandwidth and peak of this machine are known for it. ``checks_bounds``: kernels report an
    index out of range. ``keeps_any_state``: a language model may keep states that are no keys and values and take further inputs."""

    kind: str
    parse: str
    known: str
    builder: str
    loader: str
    ahead: str = ""
    retiles: bool = False
    measures: bool = False
    measures_ceilings: bool = False
    checks_bounds: bool = False
    keeps_any_state: bool = False

    def build_module(self, program: Any, target: Any, threads: int | None = None, **further: Any) -> Any:
        """A Program to a Module. Raises CompilationError, TargetError."""
        return pkgutil.resolve_name(self.builder)(program, target, threads, **further)

    def load_module(self, path: Any, manifest: dict[str, Any], threads: int | None) -> Any:
        """A saved Module. Raises ArtifactError."""
        return pkgutil.resolve_name(self.loader)(path, manifest, threads)


@functools.cache
def all_backends() -> dict[str, Backend]:
    """{kind: its backend}, by name."""
    kinds = sorted(m.name for m in pkgutil.iter_modules(backends.__path__))
    return {k: importlib.import_module(f"{backends.__name__}.{k}").BACKEND for k in kinds}


def backend_of(target: str) -> Backend:
    """Of ``KIND`` or ``KIND:DETAILS``. Raises TargetError naming the targets of all backends."""
    kind = target.strip().partition(":")[0]
    if kind not in all_backends():
        names = [n for b in all_backends().values() for n in pkgutil.resolve_name(b.known)]
        raise TargetError(f"no target {target!r}", hint="known: " + ", ".join(names))
    return all_backends()[kind]


def loader_of(kind: str) -> Backend:
    """The backend that loads artifacts of ``kind``. Raises ArtifactError when there is none."""
    if kind not in all_backends():
        raise ArtifactError(f"the artifact is for a target of kind {kind!r}", hint=f"this package knows {', '.join(all_backends())}")
    return all_backends()[kind]
