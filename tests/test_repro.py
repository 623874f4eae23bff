"""What a failed compile leaves, what shrinks it, kernels from files, the Chrome trace."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import luthier
from luthier.cli.commands import entry
from luthier.cli.commands import luthier as command
from luthier.debug.override import override_kernels
from luthier.debug.reduce import kernel_check, outcome, reduce_kernel, reduce_model
from luthier.debug.repro import read_bundle, signature
from luthier.errors import CompilationError, InputError, SettingError, UnsupportedOperator
from luthier.ir.op import REGISTRY, load_all
from luthier.ir.parser import parse_func
from tests.replay.models import model

TEXT = """g (float[N, 8] x) => (float[N, 8] y, float[N, 8] z) {
  a = Relu(x)  b = MatMul(a, w)  c = Exp(b)  d = HardSigmoid(c)  e = Neg(d)  y = Softmax(e)  z = Tanh(a) }"""


def parsed(text: str = TEXT) -> Any:
    m = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]>\n{text}')
    m.graph.initializer.append(onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32), "w"))
    return m


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_REPRO_DIR", str(tmp_path / "bundles"))
    return tmp_path / "bundles"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the mathematics of HardSigmoid had a defect."""
    load_all()

    def compute(node: Any, ins: Any, outs: Any) -> Any:
        raise ZeroDivisionError(f"no alpha in {node.name}17")

    monkeypatch.setattr(REGISTRY["HardSigmoid"], "compute", compute)


def failure(**options: Any) -> BaseException:
    with pytest.raises(ZeroDivisionError) as e:
        luthier.compile(parsed(), **options)
    return e.value


def bundle_of(error: BaseException) -> Path:
    return Path(error.__notes__[0].removeprefix("repro bundle: "))


def test_a_defect_leaves_a_bundle(broken: None, bundles: Path) -> None:
    path = bundle_of(failure(target="cpu:x86-64-v3", shapes={"x": (4, 8)}, threads=2))
    assert path.parent == bundles
    facts = json.loads((path / "bundle.json").read_text())
    assert facts["error"] == "ZeroDivisionError" and "no alpha" in facts["message"] and any("test_repro.py" in line for line in facts["traceback"])
    assert facts["options"] == {"target": "cpu:x86-64-v3", "shapes": {"x": [4, 8]}, "threads": 2, "debug": None}
    assert {"luthier", "llvmlite", "python"} <= set(facts["versions"]) and facts["settings"]["LUTHIER_REPRO_DIR"] == str(bundles)
    assert "HardSigmoid" in (path / "ir" / "000-import.txt").read_text() and "ZeroDivisionError" in (path / "ir" / "failed.txt").read_text()
    assert "LUTHIER_DUMP" not in os.environ
    assert read_bundle(path)[0].graph.node == parsed().graph.node


def test_the_same_failure_has_one_bundle_and_old_ones_go(broken: None, bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_of(failure()) == bundle_of(failure())
    monkeypatch.setattr("luthier.debug.repro.BUNDLES", 2)
    for k in range(3):
        failure(threads=k + 1)
    assert len(list(bundles.iterdir())) == 2


def test_large_weights_are_left_out(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = parsed("g (float[N, 80] x) => (float[N, 90] y) { y = MatMul(x, big) }")
    m.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((80, 90), np.float32), "big"))

    def refuse(*args: Any, **options: Any) -> Any:
        raise CompilationError("no registers left")

    monkeypatch.setattr("luthier.backends.cpu.print_main", refuse)
    with pytest.raises(CompilationError, match="no registers left.*repro bundle: ") as e:
        luthier.compile(m)
    assert e.value.bundle is not None
    path = Path(e.value.bundle)
    assert sum(f.stat().st_size for f in path.glob("*.onnx")) < 2000
    back, facts = read_bundle(path)
    assert facts["elided"] == [{"name": "big", "type": 1, "shape": [80, 90]}]
    assert onnx.numpy_helper.to_array(back.graph.initializer[1]).shape == (80, 90)


def test_errors_about_the_model_leave_nothing(bundles: Path) -> None:
    with pytest.raises(UnsupportedOperator):
        luthier.compile(parsed("g (float[2] x) => (float[2] y) { y = NoSuchOperator(x) }"))
    assert not bundles.exists()


def test_a_bundle_that_cannot_be_written_hides_nothing(broken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_REPRO_DIR", os.devnull)
    assert "no repro bundle could be written" in failure().__notes__[0]


def test_signatures_ignore_names_and_numbers() -> None:
    a, b, c = CompilationError("kernel 'a' has 3 loads of t17"), CompilationError("kernel 'bc' has 40 loads of t2"), CompilationError("kernel 'a' has 3 stores of t17")
    assert signature(a) == signature(b) != signature(c)


# ---------------------------------------------------------------- the reducer


def test_model_is_reduced_to_the_node(broken: None, bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle_of(failure())
    with pytest.raises(SystemExit) as e:
        entry(command, ["reduce", str(path)])
    assert e.value.code == 0
    small = onnx.load(path / "reduced.onnx")
    assert [n.op_type for n in small.graph.node] == ["HardSigmoid"] and not small.graph.initializer
    assert "1 of 7 nodes: HardSigmoid" in capsys.readouterr().out
    assert len(list(bundles.iterdir())) == 1  # attempts leave no bundles


def test_a_reduced_model_keeps_what_it_needs() -> None:
    """The failure needs two nodes that are apart, and the weight between them."""

    def check(m: Any) -> str | None:
        ops = [n.op_type for n in m.graph.node]
        onnx.checker.check_model(m)
        return "both" if "MatMul" in ops and "Neg" in ops else None

    small = reduce_model(parsed(), check)
    assert [n.op_type for n in small.graph.node] == ["MatMul", "Neg"]
    assert [t.name for t in small.graph.initializer] == ["w"] and [i.name for i in small.graph.input] == ["a", "d"] and [o.name for o in small.graph.output] == ["b", "e"]


def test_what_does_not_fail_is_not_reduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(parsed(), tmp_path / "m.onnx")
    with pytest.raises(SystemExit) as e:
        entry(command, ["reduce", str(tmp_path / "m.onnx")])
    assert e.value.code == 2 and "does not fail here" in capsys.readouterr().err


def test_a_command_decides(tmp_path: Path) -> None:
    onnx.save(parsed(), tmp_path / "m.onnx")
    with pytest.raises(SystemExit) as e:
        entry(command, ["reduce", str(tmp_path / "m.onnx"), "--check", "sh -c '! grep -q Tanh {}'", "-o", str(tmp_path / "small.onnx")])
    assert e.value.code == 0
    assert [n.op_type for n in onnx.load(tmp_path / "small.onnx").graph.node] == ["Tanh"]


KERNEL = """func k(x: f32[64] readonly, y: f32[64], z: f32[64], n: index):
  for i in 0..8:
    let a: f32 = x[i] + 1.0:f32
    y[i] = a * 2.0:f32
    if i < 4:
      for j in 0..4:
        z[i * 4 + j] = x[j] * a
    else:
      z[i] = 0.0:f32
  call no.such.thing(&y, n)
  z[0] = 1.0:f32
"""


def test_kernel_is_reduced_to_the_statement(tmp_path: Path) -> None:
    (tmp_path / "k.txt").write_text(KERNEL)
    with pytest.raises(SystemExit) as e:
        entry(command, ["reduce", str(tmp_path / "k.txt")])
    assert e.value.code == 0
    small = parse_func((tmp_path / "k.reduced.txt").read_text())
    assert str(small).splitlines() == ["func k(y: f32[64], n: index):", "  call no.such.thing(&y, n)"]


def test_kernel_reduction_keeps_the_failing_store() -> None:
    def check(f: Any) -> str | None:
        return "bad" if any("z[" in line and "x[" in line for line in str(f).splitlines()[1:]) else None

    small = str(reduce_kernel(parse_func(KERNEL), check))
    assert small.splitlines() == ["func k(x: f32[64] readonly, z: f32[64]):", "  z[0] = x[0]"]


def test_attempts_that_die_or_hang_are_results() -> None:
    assert outcome(lambda: None) is None
    assert outcome(lambda: os.kill(os.getpid(), 9)) == "signal 9"
    assert outcome(lambda: __import__("time").sleep(30), timeout=0.3) == "timeout"
    assert outcome(lambda: 1 / 0) == "ZeroDivisionError: division by zero"


def test_kernel_check_compiles() -> None:
    f = parse_func(KERNEL)
    assert "no.such" not in (kernel_check()(f) or "") and "CompilationError" in (kernel_check()(f) or "")
    assert kernel_check()(parse_func(KERNEL.replace("  call no.such.thing(&y, n)\n", ""))) is None


# ---------------------------------------------------------------- kernels from files


def test_a_kernel_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = parsed("g (float[N, 8] x) => (float[N, 8] y) { a = Relu(x)  y = Neg(a) }")
    monkeypatch.setenv("LUTHIER_DUMP", str(tmp_path / "dump"))
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    np.testing.assert_array_equal(luthier.compile(m).run({"x": x})["y"], -np.maximum(x, 0))
    monkeypatch.delenv("LUTHIER_DUMP")
    (file,) = (tmp_path / "dump" / "kernels").iterdir()
    text = file.read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file.name).write_text(text.replace("max(bcast", "min(bcast"))
    (tmp_path / "mine" / "another_model.txt").write_text("nonsense")
    monkeypatch.setenv("LUTHIER_OVERRIDE", str(tmp_path / "mine"))
    np.testing.assert_array_equal(luthier.compile(m).run({"x": x})["y"], -np.minimum(x, 0))
    for bad, message in (("func", "line 1"), (text.replace("p0:", "q:").replace("p0[", "q["), "has the parameters"), (text.replace("max(", "undefined("), "mine")):
        (tmp_path / "mine" / file.name).write_text(bad)
        with pytest.raises(SettingError, match=message):
            luthier.compile(m)
    monkeypatch.setenv("LUTHIER_OVERRIDE", str(tmp_path / "nowhere"))
    with pytest.raises(SettingError, match="no folder"):
        luthier.compile(m)


def test_kernels_written_and_read_back_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.codegen.targets.target import parse_target
    from luthier.debug.override import write_kernels
    from luthier.importers.onnx.importer import import_onnx
    from luthier.pipeline import compile_program

    program = compile_program(import_onnx(model("indexing")), parse_target("cpu:x86-64-v3").caps)
    before = {n: str(f) for n, f in program.kernels.items()}
    monkeypatch.setenv("LUTHIER_DUMP", str(tmp_path))
    write_kernels(program)
    assert sorted(override_kernels(program, tmp_path / "kernels")) == sorted(before)
    assert {n: str(f) for n, f in program.kernels.items()} == before


# ---------------------------------------------------------------- trace


def test_chrome_trace(tmp_path: Path) -> None:
    onnx.save(parsed(), tmp_path / "m.onnx")
    with pytest.raises(SystemExit) as e:
        entry(command, ["bench", str(tmp_path / "m.onnx"), "--runs", "2", "--shape", "x=4x8", "--no-profile", "--trace", str(tmp_path / "t.json")])
    assert e.value.code == 0
    trace = json.loads((tmp_path / "t.json").read_text())
    calls = [v for v in trace["traceEvents"] if v["ph"] == "X"]
    assert calls and all(v["dur"] >= 0 and v["args"]["nodes"] for v in calls)
    assert all(abs(b["ts"] - a["ts"] - a["dur"]) < 0.01 for a, b in zip(calls, calls[1:]))
    with pytest.raises(SystemExit) as e:
        entry(command, ["bench", str(tmp_path / "m.onnx"), "--runs", "1", "--trace", str(tmp_path / "no" / "t.json")])
    assert e.value.code == 2


def test_reading_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no repro bundle"):
        read_bundle(tmp_path)
