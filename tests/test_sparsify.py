"""Pruning of blocks: which ones are kept, what compensation and recovery gain, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import QuantizationError
from luthier.importers.builder import GraphBuilder
from luthier.ir.dtypes import f32
from luthier.ir.graph import Graph
from luthier.passes.quantize.prune_groups import prune_groups, saliency, select_groups
from luthier.passes.quantize.quantize_weights import output_error
from luthier.quantization.sparsify import sparsify

Array = np.ndarray[Any, Any]


def correlated(k: int, rng: np.random.Generator, rows: int = 2000) -> Array:
    """Rows of activations whose columns have different sizes and share directions."""
    base = rng.standard_normal((rows, max(2, k // 4))) @ rng.standard_normal((max(2, k // 4), k))
    return (base + 0.3 * rng.standard_normal((rows, k))) * rng.uniform(0.1, 3, k)


def network(rng: np.random.Generator, width: int = 64) -> Graph:
    b = GraphBuilder("mlp")
    v = x = b.input("x", f32, [16, width])
    for i in range(3):
        w = (rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        v = b.op("MatMul", v, b.const("w", w), name=f"product{i}")
        v = b.op("Add", v, b.const("b", (rng.standard_normal(width) / 4).astype(np.float32)))
        v = b.op("Tanh", v) if i < 2 else v
    b.output("y", b.op("Add", v, x))
    return b.graph()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.sampled_from(["layer", "row"]), st.integers(0, 999))
def test_the_most_salient_blocks_are_kept(n: int, blocks: int, sparsity: float, scope: str, seed: int) -> None:
    scores = np.random.default_rng(seed).random((n, blocks))
    keep = select_groups(scores, sparsity, scope)
    parts = [(keep.reshape(-1), scores.reshape(-1))] if scope == "layer" else list(zip(keep, scores))
    for k, s in parts:
        assert k.sum() == round((1 - sparsity) * len(s))
        assert k.all() or not k.any() or s[k].min() >= s[~k].max()


def test_saliency_is_what_dropping_costs() -> None:
    """With uncorrelated columns, the loss of dropping one block is the error of the outputs, in f64."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 24))
    moments = rng.uniform(0.1, 9, 24)
    x = np.sqrt(moments) * np.linalg.qr(rng.standard_normal((400, 24)))[0] * np.sqrt(400)  # columns orthogonal, mean squares as asked
    scores = saliency(w, 8, moments)
    for n, c in itertools.product(range(5), range(3)):
        without = w.copy()
        without[n, c * 8 : c * 8 + 8] = 0
        np.testing.assert_allclose(np.square(x @ (w - without).T).sum() / 400, scores[n, c], rtol=1e-9)


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_and_compensation_help(block: int, bits: int) -> None:
    rng = np.random.default_rng(block)
    x = correlated(96, rng)
    w = rng.standard_normal((40, 96)).astype(np.float32)
    h = x.T @ x
    errors = [output_error(w, prune_groups(w, 0.5, block, bits, *how).dense(), h) for how in ((None, "nearest"), (h, "nearest"), (h, "compensate"))]
    assert errors[2] < errors[1] < errors[0]


def test_nothing_dropped_is_plain_quantization() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((12, 40)).astype(np.float32)  # the last block is half a block
    for bits, bound in ((4, 1.5e-2), (8, 1e-4)):
        made = prune_groups(w, 0.0, 16, bits)
        assert made.density == 1.0
        assert np.square(made.dense() - w).sum() / np.square(w).sum() < bound  # a step of the largest / 8, squared / 12
    assert len(prune_groups(w, 1.0).cols) == 0
    zero = np.zeros((4, 32), np.float32)
    assert not prune_groups(zero, 0.5, 16, 4, np.eye(32), "compensate").dense().any()


def test_a_model_from_end_to_end() -> None:
    rng = np.random.default_rng(0)
    graph = network(rng)
    data = [{"x": rng.standard_normal((16, 64)).astype(np.float32)} for _ in range(8)]
    found = {s: sparsify(graph, s, calibration=data).report.outputs["y"].nmse for s in (0.0, 0.25, 0.5, 0.75)}
    assert found[0.0] < 0.01 and list(found.values()) == sorted(found.values())
    small = sparsify(graph, 0.5, calibration=data, exclude=["product1"])
    assert set(small.weights) == {"product0", "product2"}
    (y,) = small.compile(threads=1)(data[0]["x"])
    weights = {name: w.dense().astype(np.float64).T for name, w in small.weights.items()}
    v = data[0]["x"].astype(np.float64)
    for i, n in enumerate(n for n in graph.nodes if n.op == "MatMul"):
        v = v @ weights.get(n.name, n.inputs[1].data) + graph.nodes[graph.nodes.index(n) + 1].inputs[1].data  # type: ignore[union-attr]
        v = np.tanh(v) if i < 2 else v
    assert np.square(y - v - data[0]["x"]).sum() / np.square(v + data[0]["x"]).sum() < 1e-5  # activations of 12 bits, three times


def test_each_step_of_recovery_gains() -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    graph = network(rng)
    data = [{"x": rng.standard_normal((16, 64)).astype(np.float32)} for _ in range(24)]
    small = sparsify(graph, 0.5, calibration=data, recover=True, epochs=6)
    before, blocks, ends = (small.steps[s]["y"] for s in ("compensate", "block-wise", "end-to-end"))
    assert blocks < 0.9 * before and ends <= blocks * 1.001
    fresh = [{"x": rng.standard_normal((16, 64)).astype(np.float32)} for _ in range(8)]
    from luthier.quantization.report import compare_graphs

    plain = sparsify(graph, 0.5, calibration=data)
    unseen = [compare_graphs(graph, g.graph, fresh, {}, 0)[0]["y"].nmse for g in (plain, small)]
    assert unseen[1] < unseen[0], "the gain is no memory of the calibration data"
    for a, b in zip(plain.weights.values(), small.weights.values(), strict=True):
        np.testing.assert_array_equal(a.cols, b.cols)


def test_recovery_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(QuantizationError, match="recovery needs torch"):
        sparsify(network(np.random.default_rng(0)), 0.5, calibration=[{"x": np.zeros((16, 64), np.float32)}], recover=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity of 1.5 is not in 0..1"),
        ({"block": 12}, "blocks of 12 values"),
        ({"bits": 3}, "values of 3 bits"),
        ({"method": "compensate"}, "compensation needs activation statistics"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"scope": "column"}, "unknown scope 'column'"),
        ({"recover": True}, "recovery needs calibration data"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        sparsify(network(np.random.default_rng(0)), **{"sparsity": 0.5, **options})


def test_bad_weights() -> None:
    for w, message in ((np.full((4, 32), np.nan, np.float32), "NaN"), (np.zeros(32, np.float32), "must be a matrix")):
        with pytest.raises(QuantizationError, match=message):
            prune_groups(w, 0.5)
    with pytest.raises(QuantizationError, match="do not fit 32 columns"):
        prune_groups(np.ones((4, 32), np.float32), 0.5, hessian=np.eye(16))


def residual_network(rng: np.random.Generator, width: int = 64, layers: int = 4) -> Graph:
    """Blocks ``v + W2 tanh(W1 v)``, the second product with a bias."""
    b = GraphBuilder("residual")
    v = b.input("x", f32, [16, width])
    for i in range(layers):
        w1, w2 = ((rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32) for _ in "ab")
        h = b.op("Tanh", b.op("MatMul", v, b.const("w", w1), name=f"up{i}"))
        y = b.op("Add", b.op("MatMul", h, b.const("w", w2), name=f"down{i}"), b.const("b", rng.standard_normal(width).astype(np.float32)))
        v = b.op("Add", y, v)
    b.output("y", v)
    return b.graph()


def run_numpy(graph: Graph, weights: dict[str, Array], x: Array) -> Array:
    """The network above in f64 with other weights [N, K] for some products."""
    env: dict[Any, Array] = {graph.inputs[0]: x.astype(np.float64)}
    for n in graph.nodes:
        a = [env[v] if v.data is None else v.data.astype(np.float64) for v in n.inputs]  # type: ignore[union-attr]
        if n.op == "MatMul" and n.name in weights:
            a[1] = weights[n.name].T.astype(np.float64)
        env[n.outputs[0]] = a[0] @ a[1] if n.op == "MatMul" else np.tanh(a[0]) if n.op == "Tanh" else a[0] + a[1]
    return env[graph.nodes[-1].outputs[0]]


def test_layers_make_up_for_what_was_lost_before_them() -> None:
    """Against the same pruning of every layer by itself, with the original's activations, on inputs that neither has seen."""
    from luthier.quantization.calibrate import collect, read_data, weight_layers

    rng = np.random.default_rng(2)
    graph = residual_network(rng)
    mix = rng.standard_normal((64, 64)) / 8
    data = [{"x": (rng.standard_normal((16, 64)) @ mix).astype(np.float32)} for _ in range(64)]
    layers = weight_layers(graph)
    stats = collect(graph, read_data(data, graph), hessians=layers)
    alone = {x.name: prune_groups(x.matrix(), 0.5, 16, 4, stats.hessian(x), "compensate").dense() for x in layers}
    together = {name: w.dense() for name, w in sparsify(graph, 0.5, calibration=data).weights.items()}
    fresh = (rng.standard_normal((256, 64)) @ mix).astype(np.float32)
    want = run_numpy(graph, {}, fresh)
    lost = [np.square(run_numpy(graph, w, fresh) - want).sum() for w in (alone, together)]
    assert lost[1] < 0.7 * lost[0]


def test_what_a_product_is_added_to() -> None:
    from luthier.quantization.calibrate import weight_layers
    from luthier.quantization.prune_sequence import residual

    graph = residual_network(np.random.default_rng(0), layers=2)
    found = [residual(graph, x) for x in weight_layers(graph)]
    assert found[0] is None and found[2] is None, "a product under tanh is added to nothing"
    assert found[1] is graph.inputs[0] and found[3] is graph.nodes[4].outputs[0]


def test_sparsities_by_layer_stay_within_the_budget_and_spare_what_matters() -> None:
    rng = np.random.default_rng(3)
    graph = residual_network(rng, layers=3)
    for n in graph.nodes:  # the first block's contribution is ten times as large as the others'
        if n.name == "down0":
            n.inputs[1].data *= np.float32(10)  # type: ignore[union-attr,operator]
    data = [{"x": rng.standard_normal((16, 64)).astype(np.float32)} for _ in range(32)]
    even, free = (sparsify(graph, 0.5, calibration=data, scope=s) for s in ("layer", "model"))
    kept = {name: w.density for name, w in free.weights.items()}  # type: ignore[union-attr]
    assert 0.44 < sum(kept.values()) / len(kept) <= 0.5
    assert min(kept["up0"], kept["down0"]) > 0.6 > max(kept["up1"], kept["down1"], kept["up2"], kept["down2"])
    fresh = rng.standard_normal((256, 64)).astype(np.float32)
    want = run_numpy(graph, {}, fresh)
    lost = [np.square(run_numpy(graph, {n: w.dense() for n, w in made.weights.items()}, fresh) - want).sum() for made in (even, free)]
    assert lost[1] < lost[0]
    with pytest.raises(QuantizationError, match="sparsities by layer need compensation"):
        sparsify(graph, 0.5, scope="model")
