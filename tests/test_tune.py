"""The autotuner: declared knobs, the lite space, what is measured and kept, what may win."""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import luthier
from luthier.cli.commands import luthier as command
from luthier.codegen.targets.target import parse_target
from luthier.errors import InputError
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.graph import Graph
from luthier.ir.interpret.loops import run_func
from luthier.passes.graph.copy_graph import copy_graph
from luthier.pipeline import compile_program
from luthier.schedules.base.schedule import ScheduleError
from luthier.schedules.select import GPU_TEMPLATES, TEMPLATES, Kernels, Point, Record, build, template_module
from luthier.tuner import database
from luthier.tuner.database import Database, from_text, signature, to_text
from luthier.tuner.features import NAMES, features
from luthier.tuner.measure import Measurement
from luthier.tuner.model import FILE, describe, shipped
from luthier.tuner.space import LITE, lite, wide
from luthier.tuner.tune import Tuner, Tuning

CPU = "cpu:x86-64-v3"
Array = np.ndarray[Any, Any]


def matmul(rows: int = 12, inner: int = 40, columns: int = 48) -> Graph:
    rng = np.random.default_rng(0)
    b = GraphBuilder("m")
    x = b.input("x", f32, [rows, inner])
    w = b.const("w", rng.standard_normal((inner, columns)).astype(np.float32))
    b.output("y", b.op("Relu", b.op("MatMul", x, w)))
    return b.graph()


def conv() -> Graph:
    rng = np.random.default_rng(0)
    b = GraphBuilder("c")
    x = b.input("x", f32, [1, 8, 9, 9])
    w = b.const("w", rng.standard_normal((16, 8, 3, 3)).astype(np.float32))
    b.output("y", b.op("Conv", x, w, pads=(1, 1, 1, 1)))
    return b.graph()


def softmax() -> Graph:
    b = GraphBuilder("s")
    b.output("y", b.op("Softmax", b.input("x", f32, [6, 70])))
    return b.graph()


GRAPHS: dict[str, Callable[[], Graph]] = {"matmul": matmul, "conv": conv, "softmax": softmax}


def made(graph: Graph, target: str = CPU) -> list[tuple[Any, Mapping[str, Array], Kernels]]:
    record = Record(everything=True)
    compile_program(graph, parse_target(target).caps, record=record)
    return record.made


# ---------------------------------------------------------------- knobs


@pytest.mark.parametrize("template", [*TEMPLATES, "lut_wide", *GPU_TEMPLATES])
def test_knobs_are_what_a_template_takes(template: str) -> None:
    module = template_module(template)
    taken = {n: p.default for n, p in inspect.signature(module.apply).parameters.items() if p.kind is p.KEYWORD_ONLY}
    declared = {k.name: k.default for k in module.KNOBS}
    passed_on = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.apply).parameters.values())
    assert taken == declared or (passed_on and taken.items() <= declared.items())
    for k in module.KNOBS:
        assert k.about
        for target in ("cpu:x86-64-v2", "cpu:x86-64-v4", "wasm", "webgpu"):
            values = k.worth(parse_target(target).caps, None)  # type: ignore[arg-type]
            assert values[0] == k.default and len(set(values)) == len(values)


def test_a_knob_that_no_template_has() -> None:
    ((compute, constants, _),) = made(matmul())
    caps = parse_target(CPU).caps
    with pytest.raises(ScheduleError, match=r"template contract has no knob 'rows'; it has mu, nv"):
        build(compute, caps, constants, template="contract", rows=2)
    with pytest.raises(ScheduleError, match="template any has no knob 'nonsense'"):
        build(compute, caps, constants, nonsense=2)
    assert build(compute, caps, constants, mu=4, nv=16).template == "contract"  # only the template that has them


def test_inspect_lists_knobs(tmp_path: Path) -> None:
    m = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[64,64] x) => (float[64,64] y) { y = MatMul(x, x) }')
    onnx.save(m, tmp_path / "m.onnx")
    done = CliRunner().invoke(command, ["inspect", str(tmp_path / "m.onnx"), "--knobs", "--target", CPU])
    assert done.exit_code == 0 and "contract: 1 kernels (matmul)" in done.output and "rows of the register tile" in done.output


# ---------------------------------------------------------------- the space


@pytest.mark.parametrize("target", ["cpu:x86-64-v2", "cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:aarch64", "wasm", "webgpu"])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_default_is_in_the_space(name: str, target: str) -> None:
    caps = parse_target(target).caps
    for compute, constants, k in made(GRAPHS[name](), target):
        if "+" in k.template:
            continue
        points = lite(k.template, compute, caps, constants)
        assert points[0] == Point(k.template) and 1 <= len(points) <= LITE and len(set(points)) == len(points)
        assert set(points) <= {*wide(k.template, compute, caps, constants), *(Point(p.template) for p in points)}
        assert _texts(build(compute, caps, constants, template=k.template)) == _texts(k)


def _texts(k: Kernels) -> list[str]:
    return [str(f) for f in k.funcs]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_point_computes_the_same(name: str) -> None:
    caps = parse_target(CPU).caps
    for compute, constants, k in made(GRAPHS[name]()):
        points = [p for p in lite(k.template, compute, caps, constants) if p.knobs]
        want = run(k, constants)
        seen = set()
        for p in random.Random(0).sample(points, min(10, len(points))):
            candidate = build(compute, caps, constants, template=p.template, **dict(p.knobs))
            seen.add("\n".join(_texts(candidate)))
            for n in compute.outs:
                np.testing.assert_allclose(run(candidate, constants)[n], want[n], rtol=1e-4, atol=1e-4, err_msg=str(p))
        assert len(seen) > 1 or k.template != "contract"  # points are not all the same code


def run(k: Kernels, constants: Mapping[str, Array]) -> dict[str, Array]:
    """All buffers after one run by the interpreter, inputs seeded by their names."""
    memory: dict[str, Array] = {n: np.array(a) for n, a in {**constants, **k.packed}.items()}
    for f in k.funcs:
        for b in f.buffers:
            if b.name not in memory:
                values = np.random.default_rng(len(b.name)).standard_normal(int(b.size().attr))
                memory[b.name] = values.astype(b.dtype.scalar.numpy)
        run_func(f, {b.name: memory[b.name].reshape(-1) for b in f.buffers}, {})
    return memory


def test_features() -> None:
    ((compute, constants, k),) = made(matmul())
    caps = parse_target(CPU).caps
    small = dict(zip(NAMES, features(k, caps, {}), strict=True))
    ((_, _, bigger),) = made(matmul(24))
    large = dict(zip(NAMES, features(bigger, caps, {}), strict=True))
    assert large["vector_ops"] > small["vector_ops"] > 0 and large["tensor_bytes"] > small["tensor_bytes"]
    one = dict(zip(NAMES, features(build(compute, caps, constants, template="contract", mu=1, nv=8), caps, {}), strict=True))
    assert one["loads_an_op"] > small["loads_an_op"]  # a tile of one row loads its vectors for itself


# ---------------------------------------------------------------- measuring and choosing


class Clock:
    """A measurer whose times are given: ``seconds(kernels)``; ``wrong``: kernels that compute something else."""

    def __init__(self, seconds: Callable[[Kernels], float], wrong: Callable[[Kernels], bool] = lambda k: False) -> None:
        self.seconds, self.wrong, self.asked, self.timeout = seconds, wrong, 0, 1.0

    def close(self) -> None:
        pass

    def measure(self, kernels: Kernels, *_: object) -> Measurement:
        self.asked += 1
        s = self.seconds(kernels)
        return Measurement((s,)) if s < float("inf") else Measurement(error="died")

    def prepare(self, kernels: Kernels, *_: object) -> Kernels:
        return kernels

    def run(self, kernels: Kernels, keep: bool = False) -> Measurement:
        return self.measure(kernels)

    def results(self, kernels: Kernels, names: Sequence[str], *_: object) -> dict[str, Array]:
        return {n: np.full(4, 2.0 if self.wrong(kernels) else 1.0, np.float32) for n in names}


def tuned(clock: Clock, store: Path, graph: Callable[[], Graph] = matmul, **options: Any) -> tuple[Tuner, Any]:
    caps = parse_target(CPU).caps
    with Tuner(parse_target(CPU), Tuning(20.0, store=store, **options), 1, measurer=clock) as t:  # type: ignore[arg-type]
        program = t.tune(lambda record: compile_program(copy_graph(graph())[0], caps, record=record))
    return t, program


def slow_unless(point: Point, graph: Callable[[], Graph] = matmul) -> Callable[[Kernels], float]:
    ((compute, constants, _),) = made(graph())
    best = _texts(build(compute, parse_target(CPU).caps, constants, template=point.template, **dict(point.knobs)))
    return lambda k: 1e-3 if _texts(k) == best else 2e-3


FAST = Point("contract", (("mu", 2), ("nv", 24)))


def test_the_fastest_point_is_taken_and_measured_once(tmp_path: Path) -> None:
    clock = Clock(slow_unless(FAST))
    t, program = tuned(clock, tmp_path / "t.sqlite", exhaust=True)
    (k,) = t.kernels
    assert k.best == FAST and k.gain == pytest.approx(2.0)
    caps = parse_target(CPU).caps
    want = build(k.compute, caps, k.constants, template="contract", mu=2, nv=24)
    assert [str(f.body) for f in program.kernels.values()] == [str(f.body) for f in want.funcs]
    again = Clock(lambda k: pytest.fail("measured again"))  # type: ignore[arg-type, return-value]
    t2, program2 = tuned(again, tmp_path / "t.sqlite")
    assert again.asked == 0 and t2.kernels[0].best == FAST
    assert [str(f.body) for f in program2.kernels.values()] == [str(f.body) for f in program.kernels.values()]
    other = Clock(lambda k: 1e-3)
    tuned(other, tmp_path / "t.sqlite", lambda: matmul(13))
    assert other.asked > 0  # another extent is another kernel


def test_more_time_starts_from_the_default(tmp_path: Path) -> None:
    """What less time had found is not taken for the default: its time would be stored as the default's."""
    fast = slow_unless(FAST)
    with Tuner(parse_target(CPU), Tuning(5.0, exhaust=True, store=tmp_path / "t.sqlite"), 1, measurer=Clock(fast)) as t:  # type: ignore[arg-type]
        t.tune(lambda record: compile_program(matmul(), parse_target(CPU).caps, record=record))
    assert t.kernels[0].best == FAST
    for options in ({}, {"exhaust": True}):
        t, _ = tuned(Clock(fast), tmp_path / "t.sqlite", **options)
        (k,) = t.kernels
        assert _texts(k.default) == _texts(build(k.compute, parse_target(CPU).caps, k.constants)) and k.seconds == 2e-3 and k.best == FAST


def test_a_hair_is_no_reason_to_leave_the_default(tmp_path: Path) -> None:
    fast = slow_unless(FAST)
    t, _ = tuned(Clock(lambda k: 1e-3 if fast(k) > 1e-3 else 0.98e-3), tmp_path / "t.sqlite")
    assert t.kernels[0].best is None and not t.kernels[0].why


def test_what_computes_something_else_does_not_win(tmp_path: Path) -> None:
    fast = slow_unless(FAST)
    t, _ = tuned(Clock(fast, lambda k: fast(k) == 1e-3), tmp_path / "t.sqlite", exhaust=True)
    assert t.kernels[0].best is None and "off by" in t.kernels[0].why


def test_candidates_that_die_cost_nothing_but_themselves(tmp_path: Path) -> None:
    fast = slow_unless(FAST)
    ((_, _, default),) = made(matmul())
    t, _ = tuned(Clock(lambda k: 1e-3 if fast(k) == 1e-3 else 2e-3 if _texts(k) == _texts(default) else float("inf")), tmp_path / "t.sqlite", exhaust=True)
    assert t.kernels[0].best == FAST
    with Database(tmp_path / "t.sqlite") as db:
        errors = [r["error"] for r in db.rows() if r["seconds"] is None]
    assert errors and set(errors) == {"died"}


def test_on_a_busy_machine_nothing_is_chosen_or_kept(tmp_path: Path) -> None:
    rng = random.Random(0)
    t, _ = tuned(Clock(lambda k: 1e-3 * (1 + rng.random())), tmp_path / "t.sqlite")
    (k,) = t.kernels
    if k.best is None:
        assert k.why.startswith("the machine is busy")
        with Database(tmp_path / "t.sqlite") as db:
            assert db.chosen(k.key, t.device, 0.0) is None
    else:
        assert k.gain > 1.06


def test_a_large_gain_is_not_kept_where_the_default_differs_from_itself(tmp_path: Path) -> None:
    ((_, _, default),) = made(matmul())
    fast, turn = slow_unless(FAST), [0]

    def seconds(k: Kernels) -> float:
        if _texts(k) != _texts(default):
            return fast(k)
        turn[0] += 1
        return 2e-3 * (1.1 if turn[0] % 2 else 1.0)

    t, _ = tuned(Clock(seconds), tmp_path / "t.sqlite", exhaust=True)
    (k,) = t.kernels
    assert k.best is None and k.why.startswith("the machine is busy")
    with Database(tmp_path / "t.sqlite") as db:
        assert db.chosen(k.key, t.device, 0.0) is None


def test_a_default_timed_in_a_quiet_moment_is_no_winner(tmp_path: Path) -> None:
    """The machine gets busy after the default's turn: the candidates' times say nothing about them."""
    asked = [0]

    def seconds(k: Kernels) -> float:
        asked[0] += 1
        return 1e-3 if asked[0] == 1 else 3e-3

    t, _ = tuned(Clock(seconds), tmp_path / "t.sqlite")
    (k,) = t.kernels
    assert k.best is None and "busy" in k.why
    with Database(tmp_path / "t.sqlite") as db:
        assert db.chosen(k.key, t.device, 0.0) is None


def test_an_interrupt_keeps_what_was_found(tmp_path: Path) -> None:
    fast, asked = slow_unless(FAST), [0]

    def seconds(k: Kernels) -> float:
        asked[0] += 1
        if asked[0] == 8:
            raise KeyboardInterrupt
        return fast(k)

    t, program = tuned(Clock(seconds), tmp_path / "t.sqlite")
    assert t.interrupted and program.kernels
    clock = Clock(fast)
    t, _ = tuned(clock, tmp_path / "t.sqlite", exhaust=True)
    points = len({json.dumps(_texts(build(k.compute, parse_target(CPU).caps, k.constants, template=p.template, **dict(p.knobs)))) for k in t.kernels for p in lite("contract", k.compute, parse_target(CPU).caps, k.constants)})
    assert t.kernels[0].best == FAST and t.measured == points - 7  # what was measured before the interrupt is not measured again


def test_times(tmp_path: Path) -> None:
    assert Tuning.of("30s").budget == 30 and Tuning.of("2m").budget == 120 and Tuning.of(5).budget == 5 and Tuning.of(True).budget > 0
    for bad in ("soon", "-1s", "0", "nan", "infs", ""):
        with pytest.raises(InputError, match="no time to tune"):
            Tuning.of(bad)


@pytest.mark.skipif(bool(parse_target(CPU).missing_here()), reason="no AVX2 on this machine")
def test_a_model_tuned_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE_DIR", str(tmp_path / "cache"))
    x = np.random.default_rng(1).standard_normal((12, 40)).astype(np.float32)
    want = luthier.compile(copy_graph(matmul())[0], CPU)(x)[0]
    t = Tuning(3.0)
    np.testing.assert_allclose(luthier.compile(matmul(), CPU, tune=t)(x)[0], want, rtol=1e-4, atol=1e-4)
    assert t.measured > 2 and (tmp_path / "cache" / "tuned.sqlite").exists()
    m = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[n,64] x, float[64,64] w) => (float[n,64] y) { y = MatMul(x, w) }')
    onnx.save(m, tmp_path / "m.onnx")
    done = CliRunner().invoke(command, ["tune", str(tmp_path / "m.onnx"), "--target", CPU, "--budget", "1s", "--size", "n=8"])
    assert done.exit_code == 0 and "tuned: " in done.output, done.output
    done = CliRunner().invoke(command, ["compile", str(tmp_path / "m.onnx"), "--target", CPU, "--tune=1s", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0 and "tuned: " in done.output and (tmp_path / "out").exists(), done.output
    done = CliRunner().invoke(command, ["tune", str(tmp_path / "m.onnx"), "--budget", "never"])
    assert done.exit_code != 0 and isinstance(done.exception, InputError)


# ---------------------------------------------------------------- the database


def test_points_and_signatures(tmp_path: Path) -> None:
    p = Point("lut_gemv", (("widths", (1, 2, 3)), ("streams", None)))
    assert from_text(to_text(p)) == p
    keys = {signature(c, k) for rows in (5, 6) for c, k, _ in made(matmul(rows))}
    assert len(keys) == 2 and keys == {signature(c, k) for rows in (6, 5) for c, k, _ in made(matmul(rows))}


def test_a_broken_database_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.warns(UserWarning, match="is no database"), Database(path) as db:
        db.choose("k", "d", FAST, 1.5, 1.0)
    with Database(path) as db:
        assert db.chosen("k", "d", 1.0) == (FAST, 1.5) and db.chosen("k", "d", 9.0) is None
    assert list(tmp_path.glob("t.broken-*"))


def test_a_locked_database_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "WAIT", 0.05)
    path = tmp_path / "t.sqlite"
    with Database(path) as db:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("begin exclusive")
        with pytest.warns(UserWarning, match="locked; a measurement is not kept"):
            db.add("k", "d", "p", 1.0)
        other.execute("rollback")
        other.close()
        db.add("k", "d", "p", 1.0)
        assert db.measured("k", "d") == {"p": (1.0, "")}


def test_no_room_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="what is measured now is not kept"), Database(tmp_path / "file" / "t.sqlite") as db:
        db.add("k", "d", "p", 1.0)
        assert db.measured("k", "d") == {"p": (1.0, "")}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """At most the measurement at hand is lost."""
    path = tmp_path / "t.sqlite"
    program = (
        "import sys; from pathlib import Path; from luthier.tuner.database import Database; db = Database(Path(sys.argv[1]))\n"
        "for k in range(10**9):\n    db.add('k', sys.argv[2], str(k), 1.0); print(k, flush=True)"
    )
    for turn in range(4):
        worker = subprocess.Popen([sys.executable, "-c", program, str(path), str(turn)], stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        said = [worker.stdout.readline()]
        time.sleep(0.02 * turn)
        os.kill(worker.pid, signal.SIGKILL)
        said += worker.stdout.read().split("\n")
        worker.wait()
        last = max(int(s) for s in said if s.strip())
        with Database(path) as db:
            kept = {int(p) for p in db.measured("k", str(turn))}
        assert set(range(last + 1)) <= kept and len(kept) <= last + 2


# ---------------------------------------------------------------- the cost model


def test_versions_of_the_templates_are_not_mixed() -> None:
    from luthier.tuner.train import groups

    numbers = json.dumps([0.0] * len(NAMES))
    rows = [{"kernel": "k", "device": "d", "version": v, "point": p, "seconds": 1.0, "features": numbers} for v in "ab" for p in ("x", "default", "y", "z")]
    found = groups(rows)
    assert len(found) == 2 and all(len(g) == 4 and g[0][0] == "default" for g in found.values())


def test_the_shipped_model() -> None:
    ranker = shipped()
    assert ranker is not None and FILE.stat().st_size < 500_000
    ((compute, constants, k),) = made(matmul(64, 256, 256))
    caps = parse_target(CPU).caps
    base = features(k, caps, {})
    bad = features(build(compute, caps, constants, template="contract", mu=1, nv=8), caps, {})
    one, two = ranker.score(np.array([describe(base, base), describe(bad, base)]))
    assert one < two  # a tile of one row and one vector waits for its own sums


def test_trees_are_those_of_xgboost() -> None:
    xgboost = pytest.importorskip("xgboost")
    from luthier.tuner.train import fit, from_booster

    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2 * len(NAMES))).astype(np.float32)
    table = xgboost.DMatrix(x, x[:, 3] - 2 * x[:, 7] * (x[:, 1] > 0))
    model = xgboost.train({"max_depth": 4, "base_score": 0.0}, table, 20)
    np.testing.assert_allclose(-from_booster(model).score(x), model.predict(table), rtol=1e-4, atol=1e-4)
    data = []
    for _ in range(30):
        rows = rng.standard_normal((8, len(NAMES)))
        data.append([("default" if i == 0 else str(i), float(2 ** r[0]), r.tolist()) for i, r in enumerate(rows)])
    ranker = fit(data, rounds=40)
    good = 0
    for g in data:
        score = ranker.score(np.array([describe(f, g[0][2]) for _, _, f in g]))
        good += g[int(np.argmin(score))][1] <= sorted(s for _, s, _ in g)[1]
    assert good >= 24  # it learned what decides


def test_training_without_xgboost_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.errors import TuningError
    from luthier.tuner.train import fit

    monkeypatch.setitem(sys.modules, "xgboost", None)  # type: ignore[arg-type]
    with pytest.raises(TuningError, match=r"luthier\[tune\]"):
        fit([])
