"""``luthier compare``: every intermediate value against onnxruntime's, in graph order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.errors import InputError, InvalidModel, LuthierError
from luthier.feeds import random_inputs, read_inputs

__all__ = ["Compared", "compare_values", "session"]


@dataclass(frozen=True)
class Compared:
    """One value. ``error``: largest difference over the largest magnitude of the reference; NaN or inf where they disagree."""

    value: str
    node: str
    op: str
    error: float
    detail: str


def session(model: Any, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU for a path or serialized bytes. Raises InputError when onnxruntime is missing or refuses."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnxruntime is not installed", hint="pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes share no base but Exception
        raise InputError(f"onnxruntime refuses this model: {error}") from error


def compare_values(
    path: Path, target: str, shapes: Mapping[str, Any], threads: int | None, files: Sequence[str], seed: int
) -> list[Compared]:
    """Compile and run the model with every intermediate value as an additional output, beside onnxruntime with the same outputs.

    Exposing a value stops it from being fused away, so kernels differ from those of a plain compile; the model's own outputs are
    therefore also taken from a plain compile and stand at the end of the list."""
    import luthier

    model = _load(path)
    nodes = list(_exposed(model))
    plain = luthier.compile(model, target=target, shapes=dict(shapes) or None, threads=threads)
    feeds = random_inputs(plain.inputs, shapes, seed, given=read_inputs(plain.inputs, files))
    own = [output.name for output in model.graph.output]
    expected = dict(zip(own, session(model.SerializeToString(), threads).run(None, feeds)))
    rows: list[Compared] = []
    wide, values = _widen(model, [value for value, _, _ in nodes if value not in own], threads)
    names = [output.name for output in wide.graph.output]
    inner = dict(zip(names, values.run(None, feeds)))
    try:
        actual = luthier.compile(wide, target=target, shapes=dict(shapes) or None, threads=threads).run(feeds)
    except LuthierError as error:
        raise type(error)(f"with every value exposed: {error.message}", node=error.node, op=error.op, hint=error.hint) from error
    rows += [_compare(value, node, op, inner[value], actual[value]) for value, node, op in nodes if value in actual]
    final = plain.run(feeds)
    made = {value: (node, op) for value, node, op in nodes}
    for name in own:
        node, op = made.get(name, ("", "graph output"))
        rows.append(_compare(f"{name} (plain compile)", node, op, expected[name], final[name]))
    return rows


def _load(path: Path) -> Any:
    import onnx

    try:
        model = onnx.load(path)
        return onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # protobuf's and onnx's decoding errors share no base but Exception
        raise InvalidModel(f"{path} is no ONNX model: {error}", hint="give an .onnx file") from error


def _exposed(model: Any) -> Iterator[tuple[str, str, str]]:
    """(value, node, operator) of every tensor that a node of the main graph makes, in graph order."""
    for number, node in enumerate(model.graph.node):
        for value in node.output:
            if value:
                yield value, node.name or f"{node.op_type}_{number}", node.op_type


def _widen(model: Any, values: Sequence[str], threads: int | None) -> tuple[Any, Any]:
    """A copy of the model with the values whose tensor type onnx infers as additional outputs, and onnxruntime's session for it."""
    import onnx

    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    typed = {info.name: info for info in model.graph.value_info if info.type.HasField("tensor_type")}
    for value in values:
        if value in typed:
            wide.graph.output.append(typed[value])
    return wide, session(wide.SerializeToString(), threads)


def _compare(value: str, node: str, op: str, want: Any, got: Any) -> Compared:
    want, got = np.asarray(want), np.asarray(got)
    if want.shape != got.shape or want.dtype != got.dtype:
        return Compared(value, node, op, float("inf"), f"{got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}")
    if want.dtype.kind in "OSU":
        return Compared(value, node, op, 0.0 if want.tolist() == got.tolist() else float("inf"), "strings")
    if not want.size:
        return Compared(value, node, op, 0.0, "empty")
    left, right = want.astype(np.float64), got.astype(np.float64)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    finite = np.isfinite(left)
    scale = float(np.abs(left[finite]).max()) if finite.any() else 1.0
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(left - right))
    worst = float(difference.max())
    at = np.unravel_index(int(np.argmax(np.where(np.isnan(difference), np.inf, difference))), want.shape)
    detail = "" if worst == 0.0 else f"at {[int(i) for i in at]}: {got[at]!r}, expected {want[at]!r}"
    return Compared(value, node, op, worst / (scale or 1.0), detail)
