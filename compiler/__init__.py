"""Luthier: an ahead-of-time tensor compiler with an autotuner.

>>> import luthier
>>> module = luthier.compile("model.onnx", target="cpu")            # doctest: +SKIP
>>> outputs = module.run({"input": array})                          # doctest: +SKIP
>>> module.save("model.luthier"); luthier.load("model.luthier")     # doctest: +SKIP

Names load lazily: ``import luthier`` costs a few milliseconds, and ``luthier.load`` needs neither ``onnx`` nor ``luthier.ir``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "luthier":
    raise ImportError("import luthier; the folder 'compiler' is the package luthier and has no other name")

from luthier.at_fork import whole
from luthier.errors import (
    ArtifactError,
    InputError,
    InvalidModel,
    LuthierError,
    QuantizationError,
    ShapeError,
    TargetError,
    TypeMismatch,
    UnsupportedOperator,
)

if TYPE_CHECKING:
    from luthier.api import compile as compile
    from luthier.custom import op as op
    from luthier.module import Module as Module
    from luthier.module import load as load
    from luthier.quantization.quantize import quantize as quantize

__version__ = "0.1.0"

__all__ = [
    "compile", "load", "op", "quantize", "Module", "LuthierError", "ArtifactError", "InputError", "InvalidModel", "QuantizationError", "ShapeError", "TargetError",
    "TypeMismatch", "UnsupportedOperator", "__version__",
]  # fmt: skip

_LAZY = {"compile": "luthier.api", "load": "luthier.module", "Module": "luthier.module", "op": "luthier.custom", "quantize": "luthier.quantization.quantize"}


def __getattr__(name: str) -> Any:
    """Import what is asked for on first use."""
    where = _LAZY.get(name)
    if where is None:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    with whole:
        value = getattr(importlib.import_module(where), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
