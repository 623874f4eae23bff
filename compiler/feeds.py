"""Arrays for a module's inputs: read from files, or random."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from luthier.errors import InputError
from luthier.files import open_regular

__all__ = ["random_inputs", "read_inputs"]

Array = np.ndarray[Any, np.dtype[Any]]


class InputSpec(Protocol):
    """What a module says about one input: its shape holds integers and, for symbolic dimensions, strings."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> Sequence[int | str]: ...
    @property
    def optional(self) -> bool: ...


def read_inputs(specs: Sequence[InputSpec], files: Sequence[str]) -> dict[str, Array]:
    """Read ``[NAME=]FILE`` arguments. A ``.npz`` holds inputs by name; a ``.npy`` without a name goes to the next free input.

    Raises InputError for a missing or unreadable file and for a name that the model does not have."""
    names = [s.name for s in specs]
    found: dict[str, Array] = {}
    for text in files:
        name, equals, file = text.partition("=")
        if not equals:
            name, file = "", text
        try:
            loaded = _load(Path(file))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"cannot read {file}: {error}", hint="give a .npy or .npz file") from error
        if isinstance(loaded, np.ndarray):
            free = [n for n in names if n not in found]
            if not name and not free:
                raise InputError(f"{file} is one more than the model has inputs ({', '.join(names)})")
            found[name or free[0]] = loaded
        else:
            found |= loaded
    for name in found:
        if name not in names:
            raise InputError(f'the model has no input "{name}"', hint=f"its inputs are {', '.join(names)}")
    return found


def _load(path: Path) -> Array | dict[str, Array]:
    """The array of a .npy, the arrays of a .npz."""
    with open_regular(path) as f:
        loaded = np.load(f, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}


def random_inputs(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int | str]],
    seed: int = 0,
    given: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Seeded arrays: normal floats, integers and bools of 0 and 1 (valid as indices, token ids and masks). Optional inputs are left out
    unless ``given``.

    Symbolic extents come from ``given`` arrays and from ``shapes`` ({input: shape}), consistently by name; what remains is 1.
    Raises InputError when a shape has another rank than its input."""
    arrays = dict(given or {})
    extents: dict[str, int] = {}
    for spec in specs:
        known: Sequence[int | str] | None = arrays[spec.name].shape if spec.name in arrays else shapes.get(spec.name)
        if known is None:
            continue
        if len(known) != len(spec.shape):
            raise InputError(
                f'input "{spec.name}" has rank {len(spec.shape)}', shapes={"declared": tuple(spec.shape), "given": tuple(known)}
            )
        extents |= {str(d): k for d, k in zip(spec.shape, known) if isinstance(k, int) and not isinstance(d, int)}
    generator = np.random.default_rng(seed)
    for spec in specs:
        if spec.name in arrays or spec.optional:
            continue
        shape = [d if isinstance(d, int) else extents.get(str(d), 1) for d in spec.shape]
        arrays[spec.name] = _random(generator, _dtype(spec), shape)
    return {spec.name: arrays[spec.name] for spec in specs if spec.name in arrays}


def _dtype(spec: InputSpec) -> np.dtype[Any]:
    try:
        return np.dtype(spec.dtype)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, str(spec.dtype)))


def _random(generator: np.random.Generator, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
    if dtype.kind in "iub" or "int" in dtype.name:
        return generator.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "OSU":
        return np.full(shape, "a", dtype)
    return generator.standard_normal(shape).astype(dtype)
