"""Calls that cannot be meant: what is wrong is said before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h

import luthier
from luthier.errors import InputError, KernelError, LuthierError, SettingError
from luthier.module import Module

X = np.array([[1, 2, 3]], np.float32)


def proto(extra: list[Any] | None = None) -> Any:
    nodes = [h.make_node("Neg", ["x"], ["y"]), h.make_node("Exp", ["x"], ["z"]), *(extra or [])]
    outs = [h.make_tensor_value_info(n, T.FLOAT, None) for n in ("y", "z")]
    graph = h.make_graph(nodes, "two", [h.make_tensor_value_info("x", T.FLOAT, ["n", 3])], outs)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9)


@pytest.fixture(scope="module", params=["cpu", "wasm"])
def module(request: pytest.FixtureRequest) -> Module:
    if request.param == "wasm":
        pytest.importorskip("wasmtime")
    return luthier.compile(proto(), request.param, threads=1)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([X], "by name, got list"), ((X,), "by name, got tuple"), (X, "by name, got ndarray"), (None, "by name, got NoneType"), ("x", "by name, got str"), ({}, "missing input x"),
        ({1: X}, "missing input x"), ({"x": X, 1: X}, "no input 1"), ({"x": X, 1: X, "a": X, None: X}, "no input 'a', 1, None"),
    ],
)  # fmt: skip
def test_inputs(module: Module, inputs: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        module.run(inputs)


def arrays(kind: str) -> dict[str, Any]:
    raw = np.zeros(8, np.float32)
    return {
        "same": {"y": raw[:3].reshape(1, 3), "z": raw[:3].reshape(1, 3)}, "shifted": {"y": raw[:3].reshape(1, 3), "z": raw[2:5].reshape(1, 3)},
        "bytes": {"z": raw.view(np.uint8)[0:12].view(np.float32).reshape(1, 3), "y": raw.view(np.uint8)[4:16].view(np.float32).reshape(1, 3)},
        "apart": {"y": raw[:3].reshape(1, 3), "z": raw[3:6].reshape(1, 3)},
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["same", "shifted", "bytes", "apart"])
def test_outputs_that_overlap(module: Module, kind: str) -> None:
    out = arrays(kind)
    if kind == "apart":
        got = module.run({"x": X}, out=out)
        np.testing.assert_array_equal(out["y"], -X)
        assert got["z"] is out["z"]
        np.testing.assert_allclose(out["z"], np.exp(X), rtol=1e-6)
        return
    with pytest.raises(InputError, match="shares memory with another output"):
        module.run({"x": X}, out=out)


@pytest.mark.parametrize("out", [[X], X, "y", {1: X, "y": X}, {"other": X, None: X}])
def test_outputs_by_no_name(module: Module, out: Any) -> None:
    with pytest.raises(InputError, match=r"out takes arrays by name|no output"):
        module.run({"x": X}, out=out)


def test_no_memory_for_an_output() -> None:
    node = h.make_node("Expand", ["x", "s"], ["y"])
    graph = h.make_graph(
        [node], "g", [h.make_tensor_value_info("x", T.FLOAT, [1, 1]), h.make_tensor_value_info("s", T.INT64, [2])], [h.make_tensor_value_info("y", T.FLOAT, None)]
    )
    module = luthier.compile(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9), threads=1)
    x = np.ones((1, 1), np.float32)
    with pytest.raises((KernelError, InputError)):
        module.run({"x": x, "s": np.array([1 << 22, 1 << 24], np.int64)})
    assert module.run({"x": x, "s": np.array([2, 3], np.int64)})["y"].shape == (2, 3)


@pytest.mark.parametrize("pads", [[0, 0, 0, -(2**63)], [0, -(2**63), 0, 0], [0, 2**63 - 1, 0, 2**63 - 1], [0, 2**62, 0, 2**62], [0, -4, 0, 0]])
@pytest.mark.parametrize("known", [True, False])
def test_pads_that_no_memory_holds(pads: list[int], known: bool) -> None:
    node = h.make_node("Pad", ["x", "p"], ["y"])
    p = np.array(pads, np.int64)
    ins = [h.make_tensor_value_info("x", T.FLOAT, ["n", 3])] + ([] if known else [h.make_tensor_value_info("p", T.INT64, [4])])
    weights = [h.make_tensor("p", T.INT64, [4], pads)] if known else []
    graph = h.make_graph([node], "g", ins, [h.make_tensor_value_info("y", T.FLOAT, None)], weights)
    with pytest.raises(LuthierError):
        luthier.compile(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9), threads=1).run({"x": X} if known else {"x": X, "p": p})


@pytest.mark.parametrize("target", ["cpu", "wasm", "webgpu"])
def test_a_dump_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_DUMP", str(tmp_path / "file" / "below"))
    with pytest.raises(SettingError, match="cannot write .*below"):
        luthier.compile(proto(), target)
    if os.path.exists("/dev/full"):
        (tmp_path / "dump").mkdir()
        (tmp_path / "dump" / "000-import.txt").symlink_to("/dev/full")
        monkeypatch.setenv("LUTHIER_DUMP", str(tmp_path / "dump"))
        with pytest.raises(SettingError, match="No space left"):
            luthier.compile(proto(), target)
