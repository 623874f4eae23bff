"""Modules made of torch programs: called as the module was, with torch's tensors. torch is imported by those who have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import InputError
from luthier.importers.torch.exported import Exported, flatten

if TYPE_CHECKING:
    from luthier.module import Module


class TorchModule:
    """``module``: the compiled :class:`luthier.Module`, to save or to run on arrays by name. ``state``: {name: array} of the buffers that calls
    change; a call updates them in place, and they begin with the values that they had when the program was exported."""

    def __init__(self, module: Module, exported: Exported) -> None:
        from luthier.importers.torch.emitter import array

        self.module, self._exported = module, exported
        self.state = {n: np.array(array(t)) for n, t in exported.state.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments as the exported module took them; results as it gave them, as tensors. Raises InputError, KernelError."""
        import torch
        from torch.utils import _pytree as pytree

        x = self._exported
        leaves = flatten(x.in_spec, args, kwargs)
        inputs: dict[str, Any] = {n: to_array(v) for n, v in zip(x.names, leaves, strict=True) if n is not None}
        results = self.module.run(inputs | self.state)
        outputs = list(results.values())
        for name, own in {**self.state, **{n: inputs[n] for n in x.program.updates if n in inputs}}.items():
            np.copyto(own, results[x.program.updates[name]])
        found = [outputs[r] if is_output else r for r, is_output in zip(x.program.results, x.program.is_output, strict=True)]
        tensors = [to_tensor(torch, found[k]) for k in x.results]
        return pytree.tree_unflatten(tensors, x.out_spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def to_array(v: Any) -> Any:
    """A tensor as an array over the same memory."""
    if hasattr(v, "detach"):
        if v.device.type != "cpu":
            raise InputError(f"a tensor on {v.device} was given", hint="copy it to the CPU")
        from luthier.importers.torch.emitter import array

        return array(v)
    return np.asarray(v)


def to_tensor(torch: Any, v: Any) -> Any:
    """An array as a tensor over the same memory; anything else as it is."""
    if not isinstance(v, np.ndarray):
        return v
    if v.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"):
        words = {1: np.uint8, 2: np.int16}[v.dtype.itemsize]
        return torch.from_numpy(v.view(words)).view(getattr(torch, v.dtype.name))
    return torch.from_numpy(v)


Compiler = Callable[..., Any]


def compile_torch(model: Any, compile_graph: Callable[[Any], Module], args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any) -> TorchModule:
    """``model``: an ``ExportedProgram``, or an ``nn.Module`` that is exported with these arguments first."""
    import torch

    from luthier.importers.torch.exported import import_exported

    if isinstance(model, torch.nn.Module):
        if args is None:
            raise InputError("an nn.Module is compiled for example arguments", hint="luthier.compile(model, args=(x,))")
        with torch.no_grad():
            model = torch.export.export(model.eval(), tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    exported = import_exported(model)
    return TorchModule(compile_graph(exported.program.graph), exported)
