"""``torch.export.ExportedProgram`` to a graph, and what a call of it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from luthier.errors import InputError
from luthier.importers.torch.program import Program, import_graph
from luthier.ir.errors import InvalidModel


@dataclass
class Exported:
    """``program``; ``names``: of the tensors that a call brings, in the order of its flat arguments (None: a constant that is not passed
    on); ``state``: {input of the graph: its first value} that calls change and keep."""

    program: Program
    names: list[str | None]
    state: dict[str, torch.Tensor]
    in_spec: Any
    out_spec: Any


def export(model: Any, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any) -> Exported:
    """``model``: an ``ExportedProgram``, or an ``nn.Module`` that is exported for these arguments first, in the mode that it is in.

    Raises InputError without arguments or with needless ones, and the errors of :func:`import_exported`."""
    if isinstance(model, torch.nn.Module):
        if args is None and kwargs is None:
            raise InputError("an nn.Module is compiled for example arguments", hint="luthier.compile(model, args=(x,))")
        with torch.no_grad():
            model = torch.export.export(model, tuple(args or ()), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    elif args is not None or kwargs is not None or dynamic_shapes is not None:
        raise InputError("an exported program has its arguments and shapes already")
    return import_exported(model)


def import_exported(ep: torch.export.ExportedProgram, name: str = "main") -> Exported:
    """Raises UnsupportedOperator, ShapeError, TypeMismatch, InvalidModel."""
    tensors: dict[str, Any] = {}
    names: list[str | None] = []
    for s in ep.graph_signature.input_specs:
        if s.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert s.target is not None
            tensors[s.arg.name] = ep.state_dict[s.target] if s.target in ep.state_dict else ep.constants[s.target]
        elif s.kind == InputKind.CONSTANT_TENSOR:
            assert s.target is not None
            tensors[s.arg.name] = ep.constants[s.target]
        elif s.kind == InputKind.USER_INPUT:
            constant = type(s.arg).__name__ == "ConstantArgument"
            names.append(None if constant else s.arg.name)
            if constant:
                tensors[s.arg.name] = s.arg.value  # type: ignore[union-attr]
        else:
            raise InvalidModel(f"the exported program has an input of kind {s.kind.name}, which is not supported")
    written = set(ep.graph_signature.buffers_to_mutate.values())
    states = {s.arg.name for s in ep.graph_signature.input_specs if s.target in written}
    becomes: dict[int, str] = {}
    targets = {s.target: s.arg.name for s in ep.graph_signature.input_specs if s.target is not None}
    for k, o in enumerate(ep.graph_signature.output_specs):
        if o.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            assert o.target is not None
            becomes[k] = targets.get(o.target, o.target)
        elif o.kind != OutputKind.USER_OUTPUT:
            raise InvalidModel(f"the exported program has an output of kind {o.kind.name}, which is not supported")
    program = import_graph(ep.graph_module, name, tensors, dict(ep.range_constraints), states, becomes)
    state = {n: tensors[n] for n in (*program.updates, *program.in_place) if n in tensors}
    spec = ep.call_spec
    return Exported(program, names, state, spec.in_spec, spec.out_spec)


def flatten(spec: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The leaves of a call's arguments in the order of the export. Raises InvalidModel when they are nested otherwise."""
    ordered = {k: kwargs[k] for k in spec.children_specs[1].context if k in kwargs} if kwargs else kwargs
    leaves, found = pytree.tree_flatten((tuple(args), ordered))
    if found != spec:
        raise InvalidModel("the arguments are nested otherwise than those of the export", hint=f"exported with {spec}, called with {found}")
    return leaves
