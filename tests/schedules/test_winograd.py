"""Winograd: its matrices, the rewritten Compute in the interpreter, compiled convolutions against f64, and when it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import luthier
from luthier.codegen.targets.target import parse_target
from luthier.ir.dtypes import f32
from luthier.ir.expr import const
from luthier.schedules.base.capabilities import Capabilities
from luthier.schedules.base.schedule import ScheduleError, schedule
from luthier.schedules.cpu import winograd
from luthier.schedules.select import build
from tests.schedules import cases

CAPS = Capabilities()


@pytest.mark.parametrize("m", [2, 4])
def test_matrices_are_a_correlation(m: int, rng: np.random.Generator) -> None:
    a, g, b = winograd.matrices(m)
    x, w = rng.standard_normal(m + 2), rng.standard_normal(3)
    np.testing.assert_allclose(a.T @ ((g @ w) * (b.T @ x)), np.correlate(x, w), rtol=1e-12, atol=1e-12)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("matrix", [winograd.matrices(m)[k].T for m in (2, 4) for k in (0, 2)], ids=["A2", "B2", "A4", "B4"])
def test_shared_sums_are_the_matrix_product(matrix: Any, rng: np.random.Generator) -> None:
    x = rng.standard_normal(matrix.shape[1]).astype("f")
    got = [e.attr for e in winograd.combine(matrix, [const(float(q), f32) for q in x])]  # constants fold as they meet
    np.testing.assert_allclose(got, matrix @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("h", "p", "m"), [(6, 1, 2), (7, 1, 4), (9, 0, 4), (4, 1, 4), (5, 2, 2)])
@pytest.mark.parametrize("block", [0, 2, 3])
def test_rewritten_compute_in_the_interpreter(h: int, p: int, m: int, block: int, rng: np.random.Generator) -> None:
    c, arrays, ref = cases.conv(h, 8, 16, 3, 1, p, rng)
    k = build(c, CAPS, {"W": arrays["W"]}, template="winograd", tile=m, block=block)
    assert len(k.funcs) == (1 if block else 3)
    got = cases.run(k.funcs, {"X": arrays["X"], **k.packed}, {}, "C")
    np.testing.assert_allclose(got.reshape(ref.shape), ref, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case", [dict(ic=12), dict(s=2), dict(k=5, p=2), dict(ic=8, oc=12), dict(depthwise=True)], ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items())
)
def test_other_convolutions_are_left_alone(case: dict[str, Any], rng: np.random.Generator) -> None:
    args = {"h": 16, "ic": 16, "oc": 16, "k": 3, "s": 1, "p": 1, **case}
    c, arrays, _ = cases.conv(rng=rng, **args)
    with pytest.raises(ScheduleError, match="no pattern"):
        build(c, CAPS, {"W": arrays["W"]}, template="winograd", tile=4)


def test_small_layers_keep_the_direct_sum() -> None:
    caps = CAPS
    assert winograd.cycles(0, 0, 1, 4, 4, 8, 8, 8, caps) < winograd.cycles(4, 0, 1, 4, 4, 8, 8, 8, caps)
    assert winograd.cycles(4, 0, 1, 56, 56, 64, 64, 8, caps) < winograd.cycles(0, 0, 1, 56, 56, 64, 64, 8, caps)


def model(n: int, c: int, h: int, w: int, k: int, pads: tuple[int, ...], rng: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, Any], Any]:
    """Convolution, bias, residual, Relu; with its value in f64."""
    wt = (rng.standard_normal((k, c, 3, 3)) / np.sqrt(9 * c)).astype("f")
    b = rng.standard_normal(k).astype("f")
    x = np.maximum(rng.standard_normal((n, c, h, w)), 0).astype("f")
    pad = np.pad(x.astype("d"), ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    view = np.lib.stride_tricks.sliding_window_view(pad, (3, 3), (2, 3))
    y = np.einsum("nchwij,kcij->nkhw", view, wt.astype("d"), optimize=True) + b.reshape(1, -1, 1, 1)
    r = rng.standard_normal(y.shape).astype("f")
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=list(pads)), helper.make_node("Add", ["c", "r"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    io = [helper.make_tensor_value_info(q, 1, s) for q, s in (("x", x.shape), ("r", r.shape), ("y", y.shape))]
    g = helper.make_graph(nodes, "g", io[:2], io[2:], [numpy_helper.from_array(wt, "w"), numpy_helper.from_array(b, "b")])
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 20)]), {"x": x, "r": r}, np.maximum(y + r, 0)


def kernels_of(proto: onnx.ModelProto) -> int:
    """How many kernels the convolution becomes where the second-level cache has 512 KB (this machine's own may hold more)."""
    return sum(name.startswith("conv") for name in luthier.compile(proto, target="cpu:x86-64-v3").manifest["kernels"])


@pytest.mark.parametrize(("shape", "kernels"), [((1, 64, 14, 14, 32), 3), ((2, 32, 15, 22, 64), 3), ((1, 128, 7, 7, 128), 3), ((1, 32, 90, 120, 32), 1)], ids=str)
@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled(shape: tuple[int, ...], kernels: int, pads: tuple[int, ...], threads: int, rng: np.random.Generator) -> None:
    proto, feeds, ref = model(*shape, pads, rng)
    assert kernels_of(proto) == kernels
    m = luthier.compile(proto, threads=threads)
    err = np.abs(m.run(feeds)["y"] - ref).max() / np.abs(ref).max()
    assert err < 5e-6  # stated for m = 4: 2.2e-6 at 256 channels


def test_the_setting_turns_it_off(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    proto, feeds, ref = model(1, 64, 14, 14, 32, (1, 1, 1, 1), rng)
    monkeypatch.setenv("LUTHIER_WINOGRAD", "0")
    m = luthier.compile(proto)
    assert not any("wino" in q for q in m.manifest["kernels"])
    assert np.abs(m.run(feeds)["y"] - ref).max() / np.abs(ref).max() < 1e-6


def test_no_winograd_on_targets_without_vectors() -> None:
    assert parse_target("cpu").caps.lanes(32) >= 4
    c, arrays, _ = cases.conv(16, 16, 16, 3, 1, 1, np.random.default_rng(0))
    assert winograd.apply(schedule(c), Capabilities(gpu=True), {"W": arrays["W"]}, tile=4) is None


@pytest.mark.parametrize(("shape", "kernels"), [((1, 64, 14, 14, 32), 3), ((1, 32, 90, 120, 32), 1)], ids=str)
def test_a_batch_known_at_run_time(shape: tuple[int, ...], kernels: int, rng: np.random.Generator) -> None:
    for n in (1, 3):
        proto, feeds, ref = model(n, *shape[1:], (1, 1, 1, 1), rng)
        for v in (*proto.graph.input, *proto.graph.output):
            v.type.tensor_type.shape.dim[0].dim_param = "N"
        assert kernels_of(proto) == kernels
        m = luthier.compile(proto, threads=2)
        assert np.abs(m.run(feeds)["y"] - ref).max() / np.abs(ref).max() < 5e-6
