"""The command line: every way to fail is one line and an exit status; a good compile leaves a whole artifact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

INPUT = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])


def save(path: Path, nodes: list[onnx.NodeProto], output: list[int | str]) -> Path:
    weight = onnx.numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "w")
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    graph = helper.make_graph(nodes, "small", [INPUT], [out], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = relu(x @ w) with an open batch."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"], name="mm"), helper.make_node("Relu", ["t"], ["y"], name="act")]
    return save(tmp_path_factory.mktemp("model") / "small.onnx", nodes, ["n", 2])


def cli(*words: object, command: str = "main", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from luthier.cli.commands import {command}; {command}()"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=120)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("luthier: ")
    assert all(part in done.stderr for part in parts), done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("compile",), "MODEL"),
        (("compile", "nowhere.onnx"), "no such file: nowhere.onnx"),
        (("compile", "x.onnx", "--shape", "a=1yx"), "'1y'"),
        (("compile", "x.onnx", "--bogus"), "--bogus"),
        (("nonsense",), "nonsense"),
        (("run", "nowhere.onnx"), "no such file"),
    ],
)
def test_usage_errors(words: tuple[str, ...], part: str, tmp_path: Path) -> None:
    assert_refused(cli(*words, cwd=tmp_path), part)


def test_help_and_settings() -> None:
    assert "bench" in cli("--help").stdout
    shown = cli("settings").stdout
    assert "LUTHIER_DUMP" in shown and "LUTHIER_CACHE_DIR" in shown


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00\x01garbage")
    assert_refused(cli("compile", "bad.onnx", cwd=tmp_path), "bad.onnx")


def test_unknown_target(model: Path, tmp_path: Path) -> None:
    assert_refused(cli("compile", model, "--target", "toaster", cwd=tmp_path), "toaster")


def test_unknown_operator_names_node_and_operator(tmp_path: Path) -> None:
    path = save(tmp_path / "odd.onnx", [helper.make_node("Frobnicate", ["x"], ["y"], name="frob1")], ["n", 4])
    assert_refused(cli("compile", path, cwd=tmp_path), "frob1", "Frobnicate")


def test_compile_then_run(model: Path, tmp_path: Path) -> None:
    done = cli(model, "--target=cpu", command="compile_main", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["small.luthier"]
    x = np.array([[1, -2, 3, 4], [0, 1, 0, -1]], np.float32)
    np.save(tmp_path / "x.npy", x)
    done = cli("run", "small.luthier", "-i", "x.npy", "-o", "out.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = np.maximum(x @ np.arange(8, dtype=np.float32).reshape(4, 2), 0)
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["y"], expected, rtol=1e-6)


def test_output_replaces_an_artifact_and_nothing_else(model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = cli("compile", model, "-o", "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert_refused(cli("compile", model, "-o", "mine", cwd=tmp_path), "is no artifact")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_compare_bench_inspect(model: Path) -> None:
    done = cli("compare", model, "--shape", "x=3x4")
    assert done.returncode == 0 and "0 diverge" in done.stdout, done.stderr + done.stdout
    done = cli("bench", model, "--runs", "3", "--shape", "x=3x4")
    assert done.returncode == 0 and "median" in done.stdout, done.stderr
    assert "mm" in done.stdout, "the profile names the nodes"
    done = cli("inspect", model, "--list")
    assert done.returncode == 0 and "import" in done.stdout and "program" in done.stdout, done.stderr


def test_interrupt_is_clean(tmp_path: Path) -> None:
    """Ctrl-C while a command works: one line, exit status 130."""
    code = (
        "import sys, time, luthier\n"
        "luthier.compile = lambda *a, **k: (print('started', flush=True), time.sleep(60))\n"
        "from luthier.cli.commands import main\n"
        "main()"
    )
    (tmp_path / "m.onnx").touch()
    child = subprocess.Popen(
        [sys.executable, "-c", code, "compile", "m.onnx"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=20)
    assert (child.returncode, stderr.strip()) == (130, "luthier: interrupted")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_ops_shows_what_was_measured() -> None:
    from luthier.debug.inspection import conformance, operator_matrix
    from luthier.targets import BUILDERS

    header, rows = operator_matrix(missing=True)
    assert header == ["operator", "kind", *BUILDERS]
    cells = {row[0]: dict(zip(header[2:], row[2:], strict=True)) for row in rows}
    measured = conformance()["targets"]
    assert {"cpu", "wasm"} <= set(measured)
    for target, ops in measured.items():
        for op, (passed, run) in ops.items():
            assert 0 <= passed <= run
            if op in cells:
                assert cells[op][target] == f"{passed}/{run}"
    assert cells["luthier::Require"]["cpu"] == "untested"
    done = cli("ops", "--missing")
    assert done.returncode == 0 and "tested operators pass all their tests" in done.stdout and "MatMul" in done.stdout
