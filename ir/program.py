"""Program: a whole model as one loop-IR function over kernels, the form that code generation and artifacts consume.

``body`` uses a subset of the loop IR: ``Let`` (dimensions and values read from buffers), ``Call`` of a kernel with buffers
and scalars in the order of its parameters, ``If``, ``While``, ``Store`` (scalars into small buffers), ``Block``. The call
``lt.check(got, want) {what}`` is no kernel: the run fails with a message when the two index expressions differ. Buffers are:
the ``inputs`` and ``outputs`` (scope param), ``constants`` (scope const) and ``buffers`` (scope global: temporaries, placed
into one arena by ``plan_memory`` by their lifetimes in ``body``). A ``Let`` that loads from a buffer defines a
data-dependent dimension; buffers whose shape needs it are allocated when it is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.ir.expr import Expr
from luthier.ir.graph import Structured
from luthier.ir.loop import Buffer, Func, Stmt
from luthier.ir.requirements import Within


@dataclass(slots=True)
class Program:
    """``inputs``/``outputs``: named buffers whose shapes are Exprs over ``dims``; ``dims``: {symbol: (input number, axis)}, the
    first place a symbol is read from (other occurrences are checked at run time). ``views``: {buffer name: (name of the buffer
    whose memory it shares, element offset Expr)} for buffers that alias another one (reshape, in-place updates).
    ``nodes``: {kernel call number: names of the graph nodes it computes}, for profiles and messages. ``checked``: every access of
    the kernels is to be checked when code is made (:mod:`luthier.passes.loop.check_bounds`). ``defaults``: as in
    :class:`~luthier.ir.graph.Graph`, for the inputs that come last. ``structured_*``, ``within``: as there, too."""

    name: str
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    dims: dict[Expr, tuple[int, int]]
    constants: dict[str, np.ndarray[Any, Any]]
    kernels: dict[str, Func]
    buffers: tuple[Buffer, ...]
    body: Stmt
    views: dict[str, tuple[str, Expr]] = field(default_factory=dict)
    nodes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    output_names: dict[str, str] = field(default_factory=dict)
    checked: bool = False
    defaults: dict[str, np.ndarray[Any, Any] | None] = field(default_factory=dict)
    structured_inputs: dict[str, Structured] = field(default_factory=dict)
    structured_outputs: dict[str, Structured] = field(default_factory=dict)
    within: tuple[Within, ...] = ()

    def __str__(self) -> str:
        from luthier.ir.printer import format_buffer, format_func, format_stmt

        lines = [f"program {self.name}"]
        for k, bs in (("input", self.inputs), ("output", self.outputs), ("buffer", self.buffers)):
            lines += [f"  {k} {format_buffer(b)}" for b in bs]
        lines += [f"  const {n}: {a.dtype}{list(a.shape)}" for n, a in self.constants.items()]
        lines += [f"  dim {v!r} = input {i} axis {a}" for v, (i, a) in self.dims.items()]
        lines += [f"  view {n} = {b} + {o!r}" for n, (b, o) in self.views.items()]
        return "\n".join([*lines, "main:", *format_stmt(self.body, 1), "", *(format_func(f) for f in self.kernels.values())])
