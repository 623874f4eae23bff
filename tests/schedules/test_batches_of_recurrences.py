"""Recurrences of batches as register tiles, pooling over whole planes, short log-softmax rows: against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.codegen.targets.target import parse_target
from luthier.importers.onnx.importer import import_onnx
from luthier.pipeline import compile_program
from luthier.schedules.select import Record

CPU = "cpu:x86-64-v3"
Array = np.ndarray[Any, Any]


def model(op: str, inputs: dict[str, Array], constants: dict[str, Array], outputs: int = 1, **attrs: Any) -> Any:
    names = [f"y{k}" for k in range(outputs)]
    node = helper.make_node(op, [*inputs, *constants], names, **attrs)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names], [numpy_helper.from_array(a, n) for n, a in constants.items() if n],
    )  # fmt: skip
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def check(m: Any, inputs: dict[str, Array], target: str = CPU) -> None:
    want = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)
    for got, w in zip(luthier.compile(m, target).run(inputs).values(), want, strict=True):
        np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-5)


def recurrence(op: str, batch: int, hidden: int, both: bool, steps: int = 4, width: int = 12) -> tuple[Any, dict[str, Array]]:
    rng = np.random.default_rng(batch * hidden)
    gates, directions = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if both else 1
    x = {"x": rng.standard_normal((steps, batch, width)).astype(np.float32)}
    weights = {
        "w": rng.standard_normal((directions, gates * hidden, width)).astype(np.float32) / 4,
        "r": rng.standard_normal((directions, gates * hidden, hidden)).astype(np.float32) / 4,
        "b": rng.standard_normal((directions, 2 * gates * hidden)).astype(np.float32) / 4,
    }
    return model(op, x, weights, 3 if op == "LSTM" else 2, hidden_size=hidden, direction="bidirectional" if both else "forward"), x


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("hidden", [8, 20, 32])
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 12, 16])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_batches(op: str, batch: int, hidden: int, both: bool) -> None:
    check(*recurrence(op, batch, hidden, both))


@pytest.mark.parametrize("batch", [3, 16])
def test_batches_on_wasm(batch: int) -> None:
    pytest.importorskip("wasmtime")
    check(*recurrence("LSTM", batch, 32, True), "wasm")


def test_a_batch_is_a_tile() -> None:
    """The matrix that all sequences of a batch meet is packed, and read once a round for eight of them."""

    def traces(batch: int) -> str:
        record = Record(everything=True)
        compile_program(import_onnx(recurrence("LSTM", batch, 32, False)[0]), parse_target(CPU).caps, record=record)
        return "\n".join(str(k.trace) for _, _, k in record.made if k.template == "scan")

    assert "'pack'" in traces(16) and "'pack'" not in traces(1)


@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (2, 5, 16, 16), (1, 40, 5, 9)])
@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
def test_pooling_over_planes(op: str, shape: tuple[int, ...]) -> None:
    x = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    check(model(op, x, {}), x)


@pytest.mark.parametrize("columns", [2, 10, 33, 1000])
def test_log_softmax(columns: int) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((17, columns)).astype(np.float32)}
    check(model("LogSoftmax", x, {}, axis=-1), x)
