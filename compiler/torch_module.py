"""Modules made of torch programs: called as the module was, with torch's tensors. Imports torch: only :mod:`luthier.api` asks for it, for such a program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from luthier.errors import InputError
from luthier.importers.torch.emitter import array
from luthier.importers.torch.exported import Exported, flatten

if TYPE_CHECKING:
    from luthier.module import Module


class TorchModule:
    """``module``: the compiled :class:`luthier.Module`, to save or to run on arrays by name. ``state``: {name: array} of the buffers that calls
    change; a call updates them in place, and they begin with the values that they had when the program was exported."""

    def __init__(self, module: Module, exported: Exported) -> None:
        self.module, self._exported = module, exported
        self.state = {n: np.array(array(t)) for n, t in exported.state.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments as the exported module took them; results as it gave them, as tensors. Raises InputError, KernelError."""
        x = self._exported
        leaves = flatten(x.in_spec, args, kwargs)
        inputs: dict[str, Any] = {n: to_array(v) for n, v in zip(x.names, leaves, strict=True) if n is not None}
        results = self.module.run(inputs | self.state)
        for name, new in x.program.updates.items():
            np.copyto(self.state.get(name, inputs.get(name)), results[new])
        for name, v in zip(x.names, leaves, strict=True):
            if name in x.program.changed and not v.is_contiguous():  # what was changed is a copy of it
                v.copy_(to_tensor(inputs[name]))
        outputs = list(results.values())
        found = [outputs[r] if is_output else r for r, is_output in zip(x.program.results, x.program.is_output, strict=True)]
        return pytree.tree_unflatten([to_tensor(v) for v in found], x.out_spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def to_array(v: Any) -> Any:
    """A tensor as an array over the same memory."""
    if not isinstance(v, torch.Tensor):
        return np.asarray(v)
    if v.device.type != "cpu":
        raise InputError(f"a tensor on {v.device} was given", hint="copy it to the CPU")
    return array(v)


def to_tensor(v: Any) -> Any:
    """An array as a tensor over the same memory; anything else as it is."""
    if not isinstance(v, np.ndarray):
        return v
    if v.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"):
        words = {1: np.uint8, 2: np.int16}[v.dtype.itemsize]
        return torch.from_numpy(v.view(words)).view(getattr(torch, v.dtype.name))
    return torch.from_numpy(v)
