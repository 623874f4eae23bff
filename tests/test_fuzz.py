"""Mutated models through the compiler: no crash, no hang, no error that is not ours (``python -m benchmarks.fuzz`` tries more of them)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from benchmarks.fuzz import FAULTS, UNARGUED, Worker, argued, read_results, run, shrunk, table
from benchmarks.fuzz_models import MODELS
from benchmarks.fuzz_mutate import apply, mutant

SEED = 7
COUNT = 2000
# Mutants whose fault is another's to mend: {signature: why}. Empty when all is well.
KNOWN: dict[str, str] = {}


@pytest.mark.slow
def test_mutants(tmp_path: Path) -> None:
    results = run(SEED, range(COUNT), jobs=2, out=tmp_path / "results", timeout=60.0, peer=False)
    faults = {r["signature"]: (r["number"], r["base"], r["edits"], r.get("detail")) for r in results if r["outcome"] in FAULTS and r["signature"] not in KNOWN}
    assert not faults, json.dumps(faults, indent=1)
    outcomes = Counter(r["outcome"] for r in results)
    assert sum(outcomes.values()) == COUNT == len(read_results(tmp_path / "results"))
    assert outcomes["ran"] > COUNT / 10 and outcomes["refused"] > COUNT / 4  # mutations neither do nothing nor ruin everything


def test_models_agree_with_onnxruntime_before_they_are_mutated(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        got = {name: worker.try_edits(name, "structure", [], checked=True) for name in MODELS}
        assert {name: (r["outcome"], r["peer"]) for name, r in got.items()} == {name: ("ran", "agrees") for name in MODELS}
        assert worker.try_edits("llama.gguf", "structure", [])["outcome"] == "ran"


def test_mutants_are_the_same_every_time() -> None:
    for number in range(30):
        base, kind, edits = mutant(3, number)
        assert mutant(3, number) == (base, kind, edits)
        if not base.startswith("suite/"):
            assert apply(base, kind, edits) == apply(base, kind, edits)


def test_what_goes_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies, one that sleeps and one that fails, in place of the real one."""
    code = (
        "import json, os, sys, time\nfor line in sys.stdin:\n  n = len(open(json.loads(line)['path'], 'rb').read())\n  if n == 1: os.abort()\n  if n == 2: time.sleep(100)\n"
        "  print(json.dumps({'outcome': 'internal', 'signature': 's'} if n % 2 else {'outcome': 'ran'}), flush=True)\n  print('{}', flush=True)\n"
    )
    (tmp_path / "fake.py").write_text(code)
    monkeypatch.setattr("benchmarks.fuzz.COMMAND", [str(tmp_path / "fake.py")])
    monkeypatch.setattr("benchmarks.fuzz.apply", lambda base, kind, edits: (b"x" * (3 + 2 * len(edits) if 5 in edits else 4), []))
    with Worker(tmp_path, timeout=1.0) as worker:
        assert [worker.attempt(b"x" * n, ".onnx")["outcome"] for n in (1, 2, 3, 4)] == ["crash", "hang", "internal", "ran"]
        assert shrunk(worker, "m", "bytes", [9, 5, 7], {"signature": "s"}, False) == [5]
    text = table([{"number": 1, "base": "shapes", "outcome": "crash", "signature": "s", "edits": ["e"]}], 1)
    assert "| shapes | 1 | 0 | 0 | 0 | 1 | 0 | 0 | 0 | 0 |" in text and "1 x `s`" in text


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "r").write_text('{"number": 0}\n{"number": 1}\n{"num')
    assert [r["number"] for r in read_results(tmp_path / "r")] == [0, 1]


ODD = {
    "flags": (helper.make_node("TopK", ["x", "k"], ["y", "z"], largest=7), {}),
    "random": (helper.make_node("RandomNormalLike", ["x"], ["y"]), {}),
    "recurrent": (helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=1), {"w": [1.0, np.nan], "r": [1.0]}),
    "`clip`": (helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=1, clip=0.0), {"w": [1.0], "r": [1.0]}),
    "GridSample": (helper.make_node("GridSample", ["x", "g"], ["y"]), {"g": [0.5, 1e38]}),
    "sequences of length 0": (helper.make_node("GRU", ["x", "w", "r", "", "lens"], ["y"], hidden_size=1), {"w": [1.0]}),
    "quantization": (helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]), {"s": [np.inf]}),
    "Attention whose": (helper.make_node("Attention", ["x", "k", "v"], ["y"], softcap=float("nan")), {}),
    "Celu": (helper.make_node("Celu", ["x"], ["y"], alpha=0.0), {}),
    "TopK": (helper.make_node("TopK", ["x", "k"], ["y", "z"], sorted=0), {}),
    "Clip": (helper.make_node("Clip", ["x", "low"], ["y"]), {"low": [np.inf]}),
    "scores": (helper.make_node("Attention", ["x", "k", "v"], ["y"]), {}),
}
PLAIN = (
    helper.make_node("TopK", ["x", "k"], ["y", "z"], largest=1), helper.make_node("LSTM", ["x", "w", "r"], ["y"], clip=2.0),
    helper.make_node("GridSample", ["x", "w"], ["y"]), helper.make_node("Exp", ["x"], ["y"]),
)  # fmt: skip


def with_constants(node: onnx.NodeProto, constants: dict[str, list[float]]) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in constants.items()]
    return helper.make_model(helper.make_graph([node], "g", [], [], tensors))


def test_answers_that_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is of its own kind of argued differences and of no other; models without anything odd are of none."""
    details = {"scores": "y: -inf against -3.4028234663852886e+38, 1 of 2"}
    models = {name: with_constants(*made) for name, made in ODD.items()}
    models |= {f"plain {n.op_type}": with_constants(n, {"w": [0.5, 2.0], "r": [1.0]}) for n in PLAIN}
    monkeypatch.setattr("benchmarks.fuzz.apply", lambda base, kind, edits: (models[base].SerializeToString(), []))
    row = {"kind": "structure", "chosen": [], "peer": "differs"}
    rows = [{**row, "base": name, "peer_detail": details.get(name, "y: 1.0 against 0.0, 1 of 2")} for name in models]
    by = {r["base"]: text for text, found in argued(rows).items() for r in found}
    assert len(by) == len(models)
    for name, text in by.items():
        assert text == UNARGUED if name.startswith("plain") else text.startswith(name), name
