"""The choice between templates that fit one pattern, made by measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import luthier
import luthier.pipeline as pipeline
from luthier.cli.commands import luthier as command
from luthier.codegen.targets.target import parse_target
from luthier.errors import TuningError
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.expr import var
from luthier.ir.graph import Graph
from luthier.ir.interpret.loops import run_func
from luthier.ir.ops.lowbit import pack_bits
from luthier.schedules.select import Kernels, Record
from luthier.tuner.choose import MARGIN, Chooser
from luthier.tuner.measure import Measurement, Measurer, compare
from tests.test_lowbit import BYTES, ROUNDED, nmse, product

Array = np.ndarray[Any, Any]
CPU = "cpu:x86-64-v3"
Seen = list[Sequence[Kernels]]


def preferring(template: str, seen: Seen) -> Callable[[Sequence[Kernels]], list[Measurement]]:
    """A measurer to which one template is the fastest."""

    def measure(found: Sequence[Kernels]) -> list[Measurement]:
        seen.append(found)
        return [Measurement((1.0 if k.template == template else 2.0,)) for k in found]

    return measure


def never(found: Sequence[Kernels]) -> list[Measurement]:
    raise AssertionError("measured again")


def chosen(choose: Chooser, bits: int, rows: int = 2) -> tuple[Any, Array]:
    """The Program of a product of two rows, and its weights."""
    graph, w = product(64, 128, 64, bits, 32, rows, np.random.default_rng(bits))
    return pipeline.compile_program(graph, parse_target(CPU).caps, record=Record(choose)), w


def used(program: Any) -> set[str]:
    return {str(f.attrs.get("template")) for f in program.kernels.values()}


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("template", ["lut_gemv", "quantized_gemv"])
def test_the_faster_one_is_taken(bits: int, template: str, tmp_path: Path) -> None:
    seen: Seen = []
    program, _ = chosen(Chooser(parse_target(CPU), tmp_path / "c.json", preferring(template, seen)), bits)
    assert template in used(program)
    (found,) = seen
    assert {k.template for k in found} == {"lut_gemv", "quantized_gemv"} and len(found) > 2  # knobs as well
    graph, _ = product(64, 128, 64, bits, 32, 2, np.random.default_rng(bits))
    assert found[0].template in used(pipeline.compile_program(graph, parse_target(CPU).caps))  # the default comes first


@pytest.mark.parametrize(
    ("target", "template"),
    [("cpu:x86-64-v3", "quantized_gemv"), ("cpu:x86-64-v2", "lut_gemv"), ("wasm", "lut_gemv"), ("cpu:aarch64+dotprod", "quantized_gemv")],
)
def test_three_bits_without_a_measurement(target: str, template: str) -> None:
    """As benchmarks/results/lut_choice.md has it."""
    graph, _ = product(64, 128, 64, 3, 32, 1, np.random.default_rng(0))
    assert template in used(pipeline.compile_program(graph, parse_target(target).caps))


@pytest.mark.parametrize("bits", [4, 8])
def test_widths_of_one_template_have_its_knobs(bits: int, tmp_path: Path) -> None:
    seen: Seen = []
    chosen(Chooser(parse_target(CPU), tmp_path / "c.json", preferring("quantized_gemv", seen)), bits, 4)
    assert {k.template for k in seen[0]} == {"quantized_gemv"} and len(seen[0]) > 2


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4])
def test_every_candidate_computes_the_product(bits: int, tmp_path: Path) -> None:
    """From the same stored tensors: each candidate packs them for itself."""
    seen: Seen = []
    _, w = chosen(Chooser(parse_target(CPU), tmp_path / "c.json", preferring("lut_gemv", seen)), bits)
    x = np.random.default_rng(9).standard_normal((2, 128)).astype(np.float32)
    assert len({frozenset(p.param for p in k.packings.values()) for k in seen[0]}) == 1
    for k in seen[0]:
        memory: dict[str, Array] = dict(k.packed)
        for f in k.funcs:
            for b in f.buffers:
                n = int(b.size().attr)
                if b.name not in memory:
                    memory[b.name] = x.reshape(-1).copy() if n == x.size and not b.writable else np.zeros(n, b.dtype.scalar.numpy)
            run_func(f, {b.name: memory[b.name] for b in f.buffers}, {})
        outs = [b.name for b in k.funcs[-1].buffers if b.writable and b.size().attr == 2 * 64]
        assert nmse(memory[outs[-1]].reshape(2, 64), x.astype(np.float64) @ w.T) < ROUNDED, k.trace


def test_the_graph_keeps_its_bits(tmp_path: Path) -> None:
    """What a file stores does not depend on the choice."""
    for template in ("lut_gemv", "quantized_gemv"):
        graph, _ = product(64, 128, 64, 2, 32, 2, np.random.default_rng(0))
        before = [np.array(v.data) for node in graph.nodes for v in node.inputs if v is not None and v.data is not None]
        seen: Seen = []
        pipeline.compile_program(graph, parse_target(CPU).caps, record=Record(Chooser(parse_target(CPU), tmp_path / template, preferring(template, seen))))
        after = [np.array(v.data) for node in graph.nodes for v in node.inputs if v is not None and v.data is not None]
        assert len(before) == 2 and all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_measured_once(tmp_path: Path) -> None:
    store = tmp_path / "c.json"
    seen: Seen = []
    first, _ = chosen(Chooser(parse_target(CPU), store, preferring("quantized_gemv", seen)), 2)
    again, _ = chosen(Chooser(parse_target(CPU), store, never), 2)
    assert [str(f) for f in first.kernels.values()] == [str(f) for f in again.kernels.values()]
    for other in (1, 3):
        with pytest.raises(AssertionError, match="again"):  # another width
            chosen(Chooser(parse_target(CPU), store, never), other)
    with pytest.raises(AssertionError, match="again"):  # another number of rows
        chosen(Chooser(parse_target(CPU), store, never), 2, 4)
    with pytest.raises(AssertionError, match="again"):  # the same for another processor
        Chooser(parse_target("cpu:haswell"), store, never)(seen[0])
    threads = Chooser(parse_target(CPU), store, never).threads
    with pytest.raises(AssertionError, match="again"):  # the same with another number of threads
        Chooser(parse_target(CPU), store, never, threads=threads + 1)(seen[0])
    store.write_text(store.read_text()[:50])  # cut off: as if there were none
    chosen(Chooser(parse_target(CPU), store, preferring("lut_gemv", seen)), 2)
    assert len(seen) == 2
    chosen(Chooser(parse_target(CPU), store, never), 2)
    ((answer),) = json.loads(store.read_text()).values()
    assert answer["candidates"][answer["best"]]["made"][0].startswith("lut_gemv bits=2 group=64 act=32")


def layers(names: Sequence[str]) -> Graph:
    """Products of one shape with weights of their own."""
    rng = np.random.default_rng(0)
    b = GraphBuilder("chain")
    v = b.input(names[0] + ".in", f32, [1, 128])
    for n in names:
        q, s = rng.integers(0, 4, (128, 128)).astype(np.uint8), rng.uniform(0.5, 1.5, (128, 2)).astype(np.float16)
        v = b.op("luthier::GroupedMatMul", v, b.const(n + "w", pack_bits(q, 2)), b.const(n + "s", s), K=128, bits=2, group=64, act_group=32, zero=2)
    b.output("y", v)
    return b.graph()


def test_measured_once_for_all_layers_and_models(tmp_path: Path) -> None:
    seen: Seen = []
    choose = Chooser(parse_target(CPU), tmp_path / "c.json", preferring("quantized_gemv", seen))
    for names in (["a", "b", "c"], ["other"]):
        assert "quantized_gemv" in used(pipeline.compile_program(layers(names), parse_target(CPU).caps, record=Record(choose)))
    assert len(seen) == 1 == choose.measured


def test_a_hair_is_no_reason_to_leave_the_default(tmp_path: Path) -> None:
    for much, template in ((MARGIN / 2, "lut_gemv"), (2 * MARGIN, "quantized_gemv")):

        def measure(found: Sequence[Kernels], much: float = much) -> list[Measurement]:
            return [Measurement((1.0 + much if k.template == "lut_gemv" else 1.0, 9.0)) for k in found]

        program, _ = chosen(Chooser(parse_target(CPU), tmp_path / f"{template}.json", measure), 2)
        assert template in used(program)


def test_failures_are_not_kept(tmp_path: Path) -> None:
    store = tmp_path / "c.json"
    choose = Chooser(parse_target(CPU), store, lambda found: [Measurement(error="no") for _ in found])
    program, _ = chosen(choose, 2)
    assert "lut_gemv" in used(program)  # the default
    assert not store.exists()


@pytest.mark.skipif(not BYTES, reason="no byte shuffles on this machine")
@pytest.mark.parametrize("threads", [1, 2])
def test_measured_here(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE_DIR", str(tmp_path))
    graph, w = product(96, 256, 64, 2, 32, 1, np.random.default_rng(0))
    module = luthier.compile(graph, tune=True, threads=threads)
    x = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    assert nmse(module(x)[0], x.astype(np.float64) @ w.T) < ROUNDED
    with Chooser(parse_target("cpu")) as c:
        ((answer),) = c.known.values()
    times = [x["seconds"] for x in answer["candidates"]]
    assert answer["threads"] == threads and not any(x["error"] for x in answer["candidates"])
    assert min(times) > 0 and times[answer["best"]] <= min(times) * (1 + MARGIN)


@pytest.mark.skipif(not BYTES, reason="no byte shuffles on this machine")
def test_open_rows_are_measured_with_one_and_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def compare(measurer: Measurer, found: Sequence[Kernels], constants: None, dims: dict[str, int], rounds: int, spread: int) -> list[Measurement]:
        (rows,) = dims.values()
        seen.append(rows)
        return [Measurement(((1.0 if rows == 1 else 9.0) if k.template.startswith("lut") else (2.0 if rows == 1 else 1.0),)) for k in found]

    monkeypatch.setattr("luthier.tuner.choose.compare", compare)
    graph, _ = product(64, 128, 64, 2, 32, var("N", lo=1), np.random.default_rng(0))
    with Chooser(parse_target("cpu"), tmp_path / "c.json", threads=1) as choose:
        program = pipeline.compile_program(graph, parse_target("cpu").caps, record=Record(choose))
    assert seen == [1, 16] and "quantized_gemv" in used(program)


@pytest.mark.skipif(not BYTES, reason="no byte shuffles on this machine")
def test_all_turns_of_a_comparison_run(tmp_path: Path) -> None:
    seen: Seen = []
    chosen(Chooser(parse_target(CPU), tmp_path / "c.json", preferring("lut_gemv", seen)), 2)
    with Measurer(parse_target("cpu"), repeats=2, least=1e-4) as m:
        for r in compare(m, seen[0][:2], rounds=3, spread=1 << 20):
            assert not r.error and len(r.seconds) == 6 and min(r.seconds) > 0


def test_what_cannot_be_measured_takes_the_default(tmp_path: Path) -> None:
    graph, w = product(64, 128, 64, 2, 32, 1, np.random.default_rng(0))
    with pytest.warns(UserWarning, match="wasm cannot be measured.*default order"):
        module = luthier.compile(graph, target="wasm", tune=True)
    x = np.random.default_rng(1).standard_normal((1, 128)).astype(np.float32)
    assert nmse(np.asarray(module(x)[0]), x.astype(np.float64) @ w.T) < ROUNDED
    with pytest.raises(TuningError, match="does not run"):
        Chooser(parse_target("cpu:aarch64"))
    import onnx

    m = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    onnx.save(m, tmp_path / "m.onnx")
    done = CliRunner().invoke(command, ["compile", str(tmp_path / "m.onnx"), "--target", "cpu:aarch64", "--tune", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "note: kernels for cpu:aarch64 cannot be measured" in done.output and (tmp_path / "out").exists()
