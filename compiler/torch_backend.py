"""``torch.compile(model, backend="luthier")``, found by torch through the entry point ``torch_dynamo_backends``.

Graphs come from AOTAutograd as functional ATen operators. Where no gradients are asked for, parameters are constants of the compiled
code, packed as kernels want them; a parameter that was changed since is noticed by its version, and the graph is compiled again. A graph
with an operator that has no rule runs as eager torch runs it, with one warning that names all such operators and the user's lines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from luthier.build_graph import compile_graph
from luthier.errors import InputError, LuthierError
from luthier.importers.torch.program import import_graph, missing_operators
from luthier.torch_module import to_array, to_tensor

OPTIONS = {"threads", "tune"}


def luthier(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The backend. ``options``: ``threads`` of a call, ``tune`` as :func:`luthier.compile` takes it. Raises InputError for others."""
    chosen = dict(options or {})
    unknown = sorted(set(chosen) - OPTIONS)
    if unknown:
        raise InputError(f"the backend luthier has no option {unknown[0]!r}", hint=f"its options: {', '.join(sorted(OPTIONS))}")

    def compiler(frozen: bool) -> Callable[..., Any]:
        return lambda graph, inputs: make_boxed_func(_compile(graph, frozen, chosen))

    made = aot_autograd(fw_compiler=compiler(False), inference_compiler=compiler(True), keep_inference_input_mutations=True)
    return made(gm, example_inputs)  # type: ignore[no-any-return]


def _compile(gm: fx.GraphModule, frozen: bool, options: Mapping[str, Any]) -> Callable[..., Any]:
    missing = missing_operators(gm)
    if missing:
        return _fall_back(gm, "; ".join(f"{op} ({where})" if where else op for op, where in missing.items()) + ": no rule")
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    static = list(metadata.static_input_indices) if frozen and metadata is not None else []
    return _Lazy(gm, static, options)


def _fall_back(gm: fx.GraphModule, why: str) -> Callable[..., Any]:
    warnings.warn(f"luthier: this graph runs as eager torch runs it: {why}", stacklevel=2)
    return gm.forward


class _Lazy:
    """Compiled at the first call, when parameters have their values. ``static``: positions of arguments that are parameters or buffers."""

    def __init__(self, gm: fx.GraphModule, static: Sequence[int], options: Mapping[str, Any]) -> None:
        self.gm, self.options = gm, options
        self.places = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.static = [k for k in static if k < len(self.places) and isinstance(self.places[k].meta.get("val"), torch.Tensor)]
        self.call: Callable[..., Any] | None = None
        self.versions: list[tuple[int, int, int]] = []

    def __call__(self, *args: Any) -> Any:
        if self.call is None or any(args[k].data_ptr() != p or args[k]._version != v for k, p, v in self.versions):
            self.call = self.build(args)
        return self.call(*args)

    def build(self, args: Sequence[Any]) -> Callable[..., Any]:
        self.versions = []
        given = {self.places[k].name: args[k] for k in self.static}
        try:
            program = import_graph(self.gm, "torch", given)
            module = compile_graph(program.graph, "cpu", threads=self.options.get("threads"), tune=bool(self.options.get("tune", False)))
        except LuthierError as error:
            return _fall_back(self.gm, str(error))
        names = {v.name for v in program.graph.inputs}
        position = {n.name: k for k, n in enumerate(self.places)}
        order = [position[v.name] for v in program.graph.inputs]
        self.versions = [(k, args[k].data_ptr(), args[k]._version) for k in self.static if self.places[k].name not in names]
        where = {name: k for k, name in enumerate(program.graph.output_names)}
        updates = [(position[n], where[o]) for n, o in program.updates.items()]
        results = list(zip(program.results, program.is_output, [_kind(n) for n in _outputs(self.gm)], strict=True))

        here = [k for k in order if self.places[k].name in program.in_place]

        def call(*args: Any) -> Any:
            arrays = [to_array(args[k]) for k in order]
            outs = module(*arrays)
            for k, o in updates:
                args[k].copy_(to_tensor(outs[o]))
            for k in here:
                if not args[k].is_contiguous():  # what was changed is a copy of it
                    args[k].copy_(to_tensor(arrays[order.index(k)]))
            return [kind(outs[r]) if is_output else r for r, is_output, kind in results]

        return call


def _outputs(gm: fx.GraphModule) -> list[Any]:
    out = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _kind(n: Any) -> Callable[[Any], Any]:
    """How an output array is given back: as a tensor, or as the number that torch keeps for a size."""
    val = n.meta.get("val") if isinstance(n, fx.Node) else None
    return (lambda a: a.item()) if isinstance(val, (torch.SymInt, torch.SymFloat, int, float)) else to_tensor
