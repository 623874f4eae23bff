"""Errors: one class per kind of trouble, one line per message.

This module imports nothing of luthier, so that every layer (and a machine that only loads artifacts) can use it;
``luthier.ir.errors`` is the same set of names. A message reads: what is wrong, then the node, its operator, the shapes,
and what to do about it.

>>> str(ShapeError("inner dimensions differ", node="fc1", op="MatMul", shapes={"A": (2, 3), "B": (4, 5)}, hint="transpose B"))
'inner dimensions differ; node "fc1" (MatMul); shapes A [2, 3], B [4, 5]; to do: transpose B'
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

__all__ = [
    "LuthierError", "InvalidModel", "UnsupportedOperator", "ShapeError", "TypeMismatch", "InputError", "ArtifactError",
    "QuantizationError", "TargetError", "ScheduleError", "VerificationError", "CompilationError", "KernelError", "OutOfMemoryError", "TuningError",
    "SettingError",
]  # fmt: skip

Shapes = Mapping[str, object] | Iterable[object] | str


def _shape_text(shape: object) -> str:
    """``(2, 'n')`` -> ``[2, n]``; anything that is no sequence prints as itself."""
    if isinstance(shape, tuple | list):
        return "[" + ", ".join(str(d) for d in shape) + "]"
    return str(shape)


def _shapes_text(shapes: Shapes) -> str:
    if isinstance(shapes, str):
        return shapes
    if isinstance(shapes, Mapping):
        return ", ".join(f"{name} {_shape_text(shape)}" for name, shape in shapes.items())
    return ", ".join(_shape_text(shape) for shape in shapes)


class LuthierError(Exception):
    """Base of all errors that a user can act on. ``exit_code`` is what the command line exits with.

    ``message``: what is wrong. ``node``: name of the graph node. ``op``: its operator (``Conv`` or ``domain::Op``).
    ``shapes``: {name: shape}, a list of shapes, or ready text. ``hint``: what to do. All but the message are optional and
    stay readable as attributes; ``at`` adds them to an error raised by code that did not know the node. ``bundle``: the folder that
    a failed compile left (:mod:`luthier.debug.repro`).
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        op: str | None = None,
        shapes: Shapes | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.node = node
        self.op = op
        self.shapes = _shapes_text(shapes) if shapes is not None else None
        self.hint = hint
        self.bundle: str | None = None
        super().__init__(message)

    def at(
        self,
        *,
        node: str | None = None,
        op: str | None = None,
        shapes: Shapes | None = None,
        hint: str | None = None,
    ) -> LuthierError:
        """Fill in what is still unknown (the innermost knowledge wins) and return self, for ``raise error.at(...)``."""
        self.node = self.node or node
        self.op = self.op or op
        if self.shapes is None and shapes is not None:
            self.shapes = _shapes_text(shapes)
        self.hint = self.hint or hint
        return self

    def __str__(self) -> str:
        parts = [self.message]
        if self.node is not None:
            parts.append(f'node "{self.node}"' + (f" ({self.op})" if self.op else ""))
        elif self.op:
            parts.append(f"operator {self.op}")
        if self.shapes:
            parts.append(f"shapes {self.shapes}")
        if self.hint:
            parts.append(f"to do: {self.hint}")
        if self.bundle:
            parts.append(f"repro bundle: {self.bundle}")
        return " ".join("; ".join(parts).split())

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.node, self.op, self.shapes, self.hint)


def _rebuild(
    cls: type[LuthierError], message: str, node: str | None, op: str | None, shapes: str | None, hint: str | None
) -> LuthierError:
    """Unpickle: an error crosses process boundaries whole."""
    return cls(message, node=node, op=op, shapes=shapes, hint=hint)


class InvalidModel(LuthierError):
    """The model breaks its own format: a missing input, a cycle, an attribute of the wrong type."""


class UnsupportedOperator(LuthierError):
    """The operator, or this use of it (an attribute, a dtype, an opset), is not implemented."""


class ShapeError(LuthierError):
    """Shapes do not fit each other or the operator."""


class TypeMismatch(LuthierError):
    """A dtype does not fit the operator."""


class InputError(LuthierError):
    """A call's inputs differ from what the module declares: a name, a dtype, a rank, an extent."""


class QuantizationError(LuthierError):
    """A quantization that cannot be done as asked: an unknown precision, a group that does not fit, parameters that are no numbers."""


class ArtifactError(LuthierError):
    """A saved folder is missing, damaged, of another ABI version, or for another machine."""


class TargetError(LuthierError):
    """An unknown target, or one that this machine cannot run or build for."""


class ScheduleError(LuthierError):
    """A schedule primitive was applied where it is not legal, or a knob has an illegal value."""


class VerificationError(LuthierError):
    """An IR breaks its own rules: a defect of luthier or of a hand-written kernel."""


class CompilationError(LuthierError):
    """A backend refused its input, or the process that compiled it died."""


class KernelError(LuthierError):
    """A kernel reported a failure at run time: an index out of range, an impossible extent."""


class OutOfMemoryError(KernelError):
    """A call needs more memory than the process or the device gives, or a larger buffer than it allows."""


class TuningError(LuthierError):
    """No candidate could be measured, or the tuning database is unreadable."""


class SettingError(LuthierError):
    """An environment variable holds a value that does not parse."""
