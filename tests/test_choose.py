"""The choice between templates that fit one pattern, made by measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import luthier
import luthier.pipeline as pipeline
from luthier.cli import luthier as command
from luthier.codegen.target import parse_target
from luthier.errors import TuningError
from luthier.ir.interp import run_func
from luthier.schedules.select import Kernels, Record
from luthier.tuner.choose import Chooser
from luthier.tuner.measure import Measurement
from tests.test_lowbit import BYTES, ROUNDED, nmse, product

Array = np.ndarray[Any, Any]
CPU = "cpu:x86-64-v3"


def preferring(template: str, seen: list[Sequence[Kernels]]) -> Callable[[Sequence[Kernels]], list[Measurement]]:
    """A measurer to which one template is the fastest."""

    def measure(found: Sequence[Kernels]) -> list[Measurement]:
        seen.append(found)
        return [Measurement((1.0 if k.template == template else 2.0,)) for k in found]

    return measure


def never(found: Sequence[Kernels]) -> list[Measurement]:
    raise AssertionError("measured again")


def chosen(choose: Chooser, bits: int, tmp_path: Path) -> tuple[Any, Array]:
    """The Program of a product of two rows, and its weights."""
    graph, w = product(64, 128, 64, bits, 32, 2, np.random.default_rng(bits))
    return pipeline.compile_program(graph, parse_target(CPU).caps, record=Record(choose)), w


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("template", ["lut_gemv", "quantized_gemv"])
def test_the_faster_one_is_taken(bits: int, template: str, tmp_path: Path) -> None:
    seen: list[Sequence[Kernels]] = []
    program, _ = chosen(Chooser(parse_target(CPU), tmp_path / "c.json", preferring(template, seen)), bits, tmp_path)
    assert {f.attrs.get("template") for f in program.kernels.values()} >= {template}
    (found,) = seen
    assert {k.template for k in found} == {"lut_gemv", "quantized_gemv"} and len(found) > 2  # knobs as well


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_every_candidate_computes_the_product(bits: int, tmp_path: Path) -> None:
    seen: list[Sequence[Kernels]] = []
    _, w = chosen(Chooser(parse_target(CPU), tmp_path / "c.json", preferring("lut_gemv", seen)), bits, tmp_path)
    x = np.random.default_rng(9).standard_normal((2, 128)).astype(np.float32)
    for k in seen[0]:
        memory: dict[str, Array] = dict(k.packed)
        for f in k.funcs:
            for b in f.buffers:
                n = int(b.size().attr)
                if b.name not in memory:
                    memory[b.name] = x.reshape(-1).copy() if n == x.size and not b.writable else np.zeros(n, b.dtype.scalar.numpy)
            run_func(f, {b.name: memory[b.name] for b in f.buffers}, {})
        outs = [b.name for b in k.funcs[-1].buffers if b.writable and b.size().attr == 2 * 64]
        assert nmse(memory[outs[-1]].reshape(2, 64), x.astype(np.float64) @ w.T) < ROUNDED, k.template


def test_measured_once(tmp_path: Path) -> None:
    store = tmp_path / "c.json"
    seen: list[Sequence[Kernels]] = []
    first, _ = chosen(Chooser(parse_target(CPU), store, preferring("quantized_gemv", seen)), 2, tmp_path)
    again, _ = chosen(Chooser(parse_target(CPU), store, never), 2, tmp_path)
    assert [str(f) for f in first.kernels.values()] == [str(f) for f in again.kernels.values()]
    with pytest.raises(AssertionError, match="again"):  # another product
        chosen(Chooser(parse_target(CPU), store, never), 1, tmp_path)
    with pytest.raises(AssertionError, match="again"):  # the same for another processor
        Chooser(parse_target("cpu:haswell"), store, never)(seen[0])
    store.write_text(store.read_text()[:50])
    chosen(Chooser(parse_target(CPU), store, preferring("lut_gemv", seen)), 2, tmp_path)
    assert len(seen) == 2
    chosen(Chooser(parse_target(CPU), store, never), 2, tmp_path)


def test_failures_are_not_kept(tmp_path: Path) -> None:
    store = tmp_path / "c.json"
    choose = Chooser(parse_target(CPU), store, lambda found: [Measurement(error="no") for _ in found])
    program, _ = chosen(choose, 2, tmp_path)
    assert "lut_gemv" in {f.attrs.get("template") for f in program.kernels.values()}  # the default
    assert not store.exists()


@pytest.mark.skipif(not BYTES, reason="no byte shuffles on this machine")
def test_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE_DIR", str(tmp_path))
    graph, w = product(96, 256, 64, 2, 32, 1, np.random.default_rng(0))
    module = luthier.compile(graph, tune=True, threads=1)
    x = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    assert nmse(module(x)[0], x.astype(np.float64) @ w.T) < ROUNDED
    with Chooser(parse_target("cpu")) as c:
        ((answer),) = c.known.values()
    times = [x["seconds"] for x in answer["candidates"]]
    assert not any(x["error"] for x in answer["candidates"]) and times[answer["best"]] == min(times) > 0


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    graph, _ = product(64, 128, 64, 2, 32, 1, np.random.default_rng(0))
    for target in ("cpu:aarch64", "wasm"):
        with pytest.raises(TuningError):
            luthier.compile(graph, target=target, tune=True)
    import onnx

    m = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    onnx.save(m, tmp_path / "m.onnx")
    done = CliRunner().invoke(command, ["compile", str(tmp_path / "m.onnx"), "--target", "webgpu", "--tune", "-o", str(tmp_path / "out")])
    assert done.exit_code != 0 and not (tmp_path / "out").exists()
