"""Sequences and optionals at a module's door: lists of arrays, arrays and None to the tensors that hold them, and back.

A manifest has ``structured: {inputs: {name: {ports, tensor}}, outputs: ...}`` (:class:`luthier.ir.graph.Structured`). Needs neither ``onnx``
nor ``luthier.ir``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.errors import InputError

MAX_RANK = 8
Array = np.ndarray[Any, Any]


def pack(spec: Mapping[str, Mapping[str, Any]], feeds: Mapping[str, Any], dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of all inputs; a missing one that is optional is nothing. ``dtypes``: of the tensors, by name.

    Raises InputError for what is no such value."""
    out = {k: v for k, v in feeds.items() if k not in spec}
    for name, s in spec.items():
        ports = s["ports"]
        v = feeds.get(name)
        if v is None and len(ports) < 3:
            raise InputError(f"missing input {name}, a sequence", hint="give a list of arrays")
        items = [] if v is None else [v] if s["tensor"] else v
        if not isinstance(items, (list, tuple)):
            raise InputError(f"input {name} is a sequence, got {type(items).__name__}", hint="give a list of arrays")
        arrays = [np.asarray(a) for a in items]
        for k, a in enumerate(arrays):
            if a.dtype != dtypes[ports[0]]:
                raise InputError(f"element {k} of input {name} has dtype {a.dtype}, expected {dtypes[ports[0]]}")
            if a.ndim > MAX_RANK:
                raise InputError(f"element {k} of input {name} has rank {a.ndim}, at most {MAX_RANK} are supported")
        out[ports[0]] = np.concatenate([a.reshape(-1) for a in arrays]) if arrays else np.zeros(0, dtypes[ports[0]])
        out[ports[1]] = np.array([(*a.shape, *[-1] * (MAX_RANK - a.ndim)) for a in arrays], np.int64).reshape(-1, MAX_RANK)
        if len(ports) > 2:
            out[ports[2]] = np.array(v is not None)
    return out


def unpack(spec: Mapping[str, Mapping[str, Any]], results: Mapping[str, Array]) -> dict[str, Any]:
    """The outputs as callers know them, in the order of their first tensors."""
    made: dict[str, Any] = {}
    own = {p for s in spec.values() for p in s["ports"]}
    first = {s["ports"][0]: name for name, s in spec.items()}
    for k, a in results.items():
        if k not in own:
            made[k] = a
        elif k in first:
            s = spec[first[k]]
            made[first[k]] = _value(s, results)
    return made


def _value(s: Mapping[str, Any], results: Mapping[str, Array]) -> Any:
    data, shapes = (results[p] for p in s["ports"][:2])
    if len(s["ports"]) > 2 and not results[s["ports"][2]]:
        return None
    items, at = [], 0
    for row in shapes.tolist():
        shape = [e for e in row if e >= 0]
        n = int(np.prod(shape, dtype=np.int64))
        items.append(data[at : at + n].reshape(shape))
        at += n
    return items[0] if s["tensor"] else items
