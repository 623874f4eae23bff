"""The conformance harness itself: its comparison, and that a crash, a hang or a refusal of one test costs only that test."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


onnx_suite = load("onnx_suite")
conformance = load("conformance")

F32 = np.float32


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ([np.ones(3, F32)], [np.ones(3, F32) + F32(5e-4)]),
        ([np.array([np.nan, np.inf], F32)], [np.array([np.nan, np.inf], F32)]),
        ([np.array(["a"], object)], [np.array(["a"], object)]),
        ([[np.ones(2, F32), np.zeros(1, F32)]], [[np.ones(2, F32), np.zeros(1, F32)]]),
        ([np.ones(2, ml_dtypes.bfloat16)], [np.ones(2, ml_dtypes.bfloat16) * ml_dtypes.bfloat16(1.0078125)]),
        ([np.zeros(0, np.int64)], [np.zeros(0, np.int64)]),
    ],
)
def test_comparison_accepts(want: list[Any], got: list[Any]) -> None:
    onnx_suite.check_outputs(want, got, 1e-3, 1e-7)


@pytest.mark.parametrize(
    ("want", "got", "message"),
    [
        ([np.ones(3, F32)], [np.array([1, 1, 1.002], F32)], r"differs in 1 of 3 elements, first at \[2\]"),
        ([np.ones(3, F32)], [np.ones((3, 1), F32)], "has shape"),
        ([np.ones(3, F32)], [np.ones(3, np.float64)], "has dtype float64"),
        ([np.ones(3, F32)], [np.array([1, 1, np.nan], F32)], "differs"),
        ([np.array(2**62)], [np.array(2**62 + 2**55)], "differs"),
        ([np.array([True])], [np.array([False])], "differs"),
        ([np.array(["a"], object)], [np.array(["b"], object)], "strings"),
        ([np.ones(3, F32)], [], "0 outputs"),
        ([[np.ones(2, F32)]], [np.ones(2, F32)], "expected list"),
    ],
)
def test_comparison_rejects(want: list[Any], got: list[Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        onnx_suite.check_outputs(want, got, 1e-3, 1e-7)


FAKE = """
import os, pathlib, time
__path__: list = []
class LuthierError(Exception):
    op, node = "Magic", "n1"
class Module:
    def __init__(self, text): self.text = text
    def save(self, folder):
        pathlib.Path(folder).mkdir(parents=True)
        (pathlib.Path(folder) / "x").write_text(self.text)
    def run(self, feeds):
        if self.text == "import": import luthier.ir
        if self.text == "onnx": import onnx
        return {"y": feeds["x"] + (1 if self.text == "wrong" else 0)}
def compile(path, target, threads):
    text = pathlib.Path(path).read_text()
    print("noise on standard output")
    if text == "refuse": raise LuthierError("no Magic")
    if text == "die": os.abort()
    if text == "hang": time.sleep(60)
    if text == "bug": raise ZeroDivisionError("oops")
    return Module(text)
def load(folder): return Module((pathlib.Path(folder) / "x").read_text())
"""


def test_every_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for luthier that does what the model file's text says."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "fake_luthier.py").write_text(textwrap.dedent(FAKE))
    (tmp_path / "fake" / "sitecustomize.py").write_text("import sys, fake_luthier\nsys.modules['luthier'] = fake_luthier\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setattr(conformance, "WORK", tmp_path)
    x = np.arange(3, dtype=F32)
    data = {"inputs": ["x"], "outputs": ["y"], "sets": [([x], [x])], "rtol": 1e-3, "atol": 1e-7}
    texts = ["good", "wrong", "refuse", "die", "hang", "bug", "import", "onnx", "good again"]
    for text in texts:
        folder = onnx_suite.case_folder(tmp_path, text)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text(text)
        (folder / "data.pkl").write_bytes(pickle.dumps(data))
    options = conformance.parse(["--jobs", "1", "--limit", "3"])
    results = conformance.run_suite(texts, options)
    assert [r.status for r in results] == [
        "pass", "wrong", "refused", "crash", "timeout", "error", "error", "error", "pass",
    ]  # fmt: skip
    assert results[2].op == "Magic" and results[2].node == "n1" and results[2].message == "no Magic"
    assert "blocked" in results[6].message and "blocked" in results[7].message
