"""Counting what kernels do, judging it against ceilings, printing and drawing it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx.parser
import pytest

from luthier.cli.commands import entry
from luthier.cli.commands import luthier as command
from luthier.codegen.targets.ceilings import Ceilings, compiled_dots, dot_peak, dots, lanes
from luthier.codegen.targets.target import parse_target
from luthier.debug.roofline import Roofline, analyse, draw, judge, work_of_calls
from luthier.debug.work import count_work
from luthier.errors import InputError, TargetError
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.dtypes import f32
from luthier.ir.expr import const, load, var
from luthier.ir.loop import Buffer, For, Func, If, Let, Store, block
from luthier.pipeline import compile_program

ROOF = Ceilings(1, 100.0, {"L1": 200.0, "L2": 100.0, "L3": 50.0, "DRAM": 20.0}, {"L1": 32 << 10, "L2": 512 << 10, "L3": 16 << 20}, "test")


def parsed(text: str, **weights: np.ndarray[Any, Any]) -> Any:
    m = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]>\n{text}')
    m.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    return m


def random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def works(m: Any, **feeds: np.ndarray[Any, Any]) -> list[tuple[float, float, float, float]]:
    return work_of_calls(compile_program(import_onnx(m), parse_target("cpu:x86-64-v3").caps), feeds)


def test_loops_tails_and_conditions_are_counted_exactly() -> None:
    n = var("n")
    x, y = Buffer("x", f32, (n,), "param", False), Buffer("y", f32, (n,))
    o, i, w = var("o", lo=0), var("i", lo=0), var("w", lo=0)
    inner = For(i, const(0), w, "serial", Store(y, (o * 8 + i,), load(x, [o * 8 + i]) * 2.0 + 1.0))
    from luthier.ir.expr import minimum

    body = For(o, const(0), (n + 7) // 8, "parallel", block(Let(w, minimum(8, n - o * 8)), inner, If(o.eq(0), Store(y, (const(0),), load(y, [const(0)]) + 1.0))))
    work = count_work(Func("k", (x, y, n), body), {n: 21})
    assert work.floats == 21 * 2 + 1 and work.integers == 0
    assert work.reads == {"x": 21, "y": 1} and work.writes == {"y": 22}


@pytest.mark.parametrize("rows", [1, 7, 64, 130])
def test_a_product_counts_two_operations_a_term(rows: int) -> None:
    (work,) = works(parsed("g (float[N, 48] x) => (float[N, 40] y) { y = MatMul(x, w) }", w=random(48, 40)), x=random(rows, 48))
    flops, integers, weights, others = work
    assert 2 * rows * 48 * 40 <= flops <= 2 * (rows + 8) * 48 * 48  # a tile may overhang
    assert 48 * 40 * 4 <= weights <= 48 * 48 * 4 and others == 4 * (rows * 48 + rows * 40) and integers == 0


def test_only_the_rows_looked_up_count() -> None:
    *_, work = works(parsed("g (int64[N] j) => (float[N, 8] y) { y = Gather(t, j) }", t=random(1000, 8)), j=np.arange(5))
    assert work[2] == 5 * 8 * 4 and work[3] == 5 * 8 + 5 * 8 * 4


def test_integer_products_are_told_apart() -> None:
    m = parsed("g (uint8[16, 64] x) => (int32[16, 32] y) { y = MatMulInteger(x, w) }", w=np.ones((64, 32), np.int8))
    rows = works(m, x=np.ones((16, 64), np.uint8))
    assert sum(r[0] for r in rows) == 0 and sum(r[1] for r in rows) >= 16 * 64 * 32


def test_bounds() -> None:
    def one(flops: float, weights: float, others: float, model: float) -> tuple[str, float]:
        r = judge({"kernel": "k", "nodes": ("n",), "ms": 1.0}, (flops, 0.0, weights, others), model, ROOF)
        return r.bound, r.ideal_ms

    assert one(1e8, 0, 1e3, 1e3) == ("compute", 1.0)
    assert one(1, 20e6, 0, 200e6) == ("DRAM", 1.0)
    assert one(1, 5e6, 0, 5e6) == ("L3", pytest.approx(0.1))
    assert one(1, 0, 20e3, 200e6) == ("L1", pytest.approx(1e-4))
    assert one(1, 20e6, 20e3, 200e6) == ("DRAM", pytest.approx(1.0001))


def test_integer_kernels_are_judged_by_the_dot_product() -> None:
    roof = replace(ROOF, integers=400.0)

    def one(flops: float, integers: float, others: float) -> tuple[str, float]:
        r = judge({"kernel": "k", "nodes": ("n",), "ms": 1.0}, (flops, integers, 0.0, others), 1e3, roof)
        return r.bound, r.ideal_ms

    assert one(1e6, 4e8, 1e3) == ("integers", 1.0)
    assert one(1e8, 2e8, 1e3) == ("compute", 1.0)
    assert one(0, 4e3, 20e3)[0] == "L1"
    r = judge({"kernel": "k", "nodes": ("n",), "ms": 2.0}, (1e6, 4e8, 0.0, 1e3), 1e3, ROOF)  # no dot product was measured
    assert r.bound != "integers" and r.operations == 4.01e8 and r.gops == pytest.approx(200.5)


@pytest.mark.skipif(not dots(), reason="no integer dot products are known for this processor")
def test_dot_product_loops_compute_sums_of_products() -> None:
    _, loops = compiled_dots()
    n = lanes()
    for name, (loop, products) in loops.items():
        acc = 3
        left, right = (np.int16, np.int16) if name == "words" else (np.uint8, np.int8)
        for _ in range(5):
            # VNNI adds to a third operand, so both factors are the constant; the others multiply what they have so far
            a, b = np.array([3 if name == "vnni" else acc], np.int32).view(left).astype(np.int64), np.array([3], np.int32).view(right).astype(np.int64)
            acc = int(np.int64(acc + (a * b).sum()).astype(np.int32))
        assert loop(5, 3) == int(np.int64(12 * acc).astype(np.int32)) and products == n * len(np.zeros(1, np.int32).view(left)), name
    assert dot_peak(1, 1) > 0


@pytest.fixture(scope="module")
def report() -> Roofline:
    m = parsed("g (float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, w)  y = Softmax(c) }", w=random(64, 64))
    return analyse(m, {"x": random(16, 64)}, threads=1, runs=3, ceilings=ROOF)


def test_analysis_has_every_kernel(report: Roofline) -> None:
    assert len(report.rows) >= 3 and report.run_ms > 0 and report.profile_ms == pytest.approx(sum(r.ms for r in report.rows))
    assert all(r.flops > 0 and r.bytes > 0 and r.nodes and r.ideal_ms > 0 for r in report.rows)
    data = json.loads(json.dumps(report.as_json()))
    assert data["kernels"][0]["fraction"] == pytest.approx(report.rows[0].ideal_ms / report.rows[0].ms) and data["ceilings"]["flops"] == 100.0


def test_drawings_parse(report: Roofline, tmp_path: Path) -> None:
    draw(report, tmp_path / "r.svg")
    root = ElementTree.parse(tmp_path / "r.svg").getroot()
    ns = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{ns}circle")
    assert len(circles) == len(report.rows)
    _, _, width, height = (float(v) for v in root.attrib["viewBox"].split())
    assert all(0 <= float(c.attrib["cx"]) <= width and 0 <= float(c.attrib["cy"]) <= height for c in circles)
    draw(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert embedded and json.loads(embedded[1]) == report.as_json() | {"kernels": json.loads(json.dumps(report.as_json()["kernels"]))}
    assert page.count("<tr>") == len(report.rows) + 1 and "<svg" in page
    with pytest.raises(InputError, match="neither"):
        draw(report, tmp_path / "r.png")


def test_names_cannot_break_the_page(report: Roofline, tmp_path: Path) -> None:
    from dataclasses import replace

    odd = replace(report, model="<b>&", rows=[replace(report.rows[0], nodes=("</script><x>",))])
    draw(odd, tmp_path / "r.html")
    assert "</script><x>" not in (tmp_path / "r.html").read_text() and "&lt;b&gt;" in (tmp_path / "r.html").read_text()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.debug.roofline.measure", lambda threads: ROOF)
    onnx.save(parsed("g (float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w)  y = Relu(a) }", w=random(64, 64)), tmp_path / "m.onnx")
    with pytest.raises(SystemExit) as e:
        entry(command, ["roofline", str(tmp_path / "m.onnx"), "--shape", "x=8x64", "--runs", "2", "--threads", "1", "--json", str(tmp_path / "r.json"), "-o", str(tmp_path / "r.svg")])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert "matmul" in out and "compute" in out and "100 GFLOP/s f32 FMA" in out
    assert json.loads((tmp_path / "r.json").read_text())["kernels"] and (tmp_path / "r.svg").exists()
    for words in (["roofline", str(tmp_path / "none.onnx")], ["roofline", str(tmp_path / "m.onnx"), "-o", "x.png"]):
        with pytest.raises(SystemExit) as e:
            entry(command, words)
        assert e.value.code == 2


def test_other_machines_have_no_ceilings_here() -> None:
    with pytest.raises(TargetError, match="cannot be measured"):
        analyse(parsed("g (float[4] x) => (float[4] y) { y = Relu(x) }"), target="cpu:aarch64")
