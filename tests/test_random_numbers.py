"""Random operators: the generator against its published vectors, distributions, streams, and equal numbers wherever they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import luthier
from luthier.errors import TypeMismatch, UnsupportedOperator
from luthier.ir.dtypes import bf16, f16, f32, f64, u32
from luthier.ir.expr import const
from luthier.ir.graph import Node, TensorType, Value
from luthier.ir.interpret.loops import evaluate_expr
from luthier.ir.math_rules import expand_expr
from luthier.ir.ops.random_numbers import encipher, encipher_arrays

N = 40_000
KEY = np.array([11, 22], np.uint32)
value = helper.make_tensor_value_info


def model(nodes: Sequence[onnx.NodeProto], x: Sequence[Any], outputs: dict[str, int], opset: int = 22, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [value("x", kind, x)], [value(n, t, None) for n, t in outputs.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def like(op: str, **attrs: Any) -> onnx.ModelProto:
    return model([helper.make_node(op, ["x"], ["y"], name="n", **attrs)], ["n"], {"y": attrs.get("dtype", TensorProto.FLOAT)})


def uniformity(u: Any) -> float:
    """Kolmogorov's distance of numbers from the uniform distribution, times sqrt(n): above 1.95 once in a thousand samples."""
    s = np.sort(np.asarray(u, np.float64).reshape(-1))
    k = np.arange(len(s))
    return float(max(np.max((k + 1) / len(s) - s), np.max(s - k / len(s))) * math.sqrt(len(s)))


def phi(z: Any) -> Any:
    """The normal distribution."""
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in np.asarray(z, np.float64).reshape(-1)])


def test_published_vectors() -> None:
    """Those of the generator's authors (Random123, kat_vectors: threefry2x32 with 20 rounds), in numpy and as expressions."""
    for key, counter, want in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]:
        u = np.uint32
        assert tuple(int(w) for w in encipher_arrays((u(key[0]), u(key[1])), (u(counter[0]), u(counter[1])))) == want
        words = encipher((const(key[0], u32), const(key[1], u32)), (const(counter[0], u32), const(counter[1], u32)))
        for w, n in zip(words, want, strict=True):
            assert int(evaluate_expr(w, {})) == n and int(evaluate_expr(expand_expr(w), {})) == n


@pytest.mark.parametrize("seed", [None, 3.0])
def test_distributions(seed: float | None) -> None:
    given = {} if seed is None else {"seed": seed}
    x = np.zeros(N, np.float32)
    for _ in range(2):
        u = luthier.compile(like("RandomUniformLike", low=-2.0, high=6.0, **given)).run({"x": x})["y"]
        assert u.min() >= -2 and u.max() < 6 and len(np.unique(u)) > 0.99 * N
        assert uniformity((u + 2) / 8) < 2.2
        z = luthier.compile(like("RandomNormalLike", mean=1.0, scale=3.0, **given)).run({"x": x})["y"]
        z = (z.astype(np.float64) - 1) / 3
        assert uniformity(phi(z)) < 2.2
        for k, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # moments and the variances of their estimates
            assert abs(np.mean(z**k) - moment) < 4.5 * math.sqrt(spread / N)
        assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4.5 / math.sqrt(N)  # neighbours
        p = np.repeat(np.array([0, 0.1, 0.5, 0.9, 1], np.float32), N // 5)
        b = luthier.compile(like("Bernoulli", **given)).run({"x": p})["y"].reshape(5, -1)
        assert set(np.unique(b)) == {0, 1} and not b[0].any() and b[4].all()
        assert np.all(np.abs(b.mean(1) - [0, 0.1, 0.5, 0.9, 1]) < 4.5 * np.sqrt(np.array([0, 0.09, 0.25, 0.09, 0]) * 5 / N) + 1e-9)


def test_multinomial() -> None:
    p = np.array([[0.1, 0.0, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25]])
    with np.errstate(divide="ignore"):
        x = (np.log(p) + [[5], [-3]]).astype(np.float32)
    nodes = [helper.make_node("Multinomial", ["x"], ["y"], sample_size=N, dtype=TensorProto.INT64)]
    y = luthier.compile(model(nodes, ["b", 4], {"y": TensorProto.INT64})).run({"x": x})["y"]
    assert y.shape == (2, N) and y.dtype == np.int64
    share = np.stack([np.bincount(row, minlength=4) / N for row in y])
    assert np.all(np.abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / N) + 1e-9)


def test_streams() -> None:
    """Without a seed nodes and calls draw numbers of their own; with one they repeat; a key that is fed decides all."""
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["a"]), helper.make_node("RandomNormalLike", ["x"], ["b"]),
        helper.make_node("RandomNormalLike", ["x"], ["c"], seed=5.0), helper.make_node("RandomNormalLike", ["x"], ["d"], seed=6.0),
        helper.make_node("RandomNormalLike", ["x"], ["e"], seed=5.0),
    ]  # fmt: skip
    m = luthier.compile(model(nodes, ["n"], dict.fromkeys("abcde", TensorProto.FLOAT)))
    assert [(s.name, s.optional) for s in m.inputs] == [("x", False), ("luthier.random", True)]
    x = np.zeros(N, np.float32)
    one, two = m.run({"x": x}), m.run({"x": x})
    drawn = {"a1": one["a"], "b1": one["b"], "a2": two["a"], "b2": two["b"], "c": one["c"], "d": one["d"]}
    for k, u in enumerate(drawn.values()):
        for v in list(drawn.values())[:k]:
            assert abs(np.corrcoef(u, v)[0, 1]) < 4.5 / math.sqrt(N)
    for name in "cde":
        np.testing.assert_array_equal(one[name], two[name])
    np.testing.assert_array_equal(one["c"], one["e"])
    fed = [m.run({"x": x, "luthier.random": KEY}) for _ in range(2)]
    np.testing.assert_array_equal(fed[0]["a"], fed[1]["a"])
    assert np.any(fed[0]["a"] != m.run({"x": x, "luthier.random": KEY + np.uint32(1)})["a"])


def everything() -> onnx.ModelProto:
    """Every random operator, with and without a seed, also in a loop."""
    body = helper.make_graph(
        [helper.make_node("RandomUniform", [], ["u"], shape=[40]), helper.make_node("RandomUniform", [], ["v"], shape=[40], seed=1.0), helper.make_node("Identity", ["c"], ["d"])],
        "body", [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, [])],
        [value("d", TensorProto.BOOL, []), value("u", TensorProto.FLOAT, [40]), value("v", TensorProto.FLOAT, [40])],
    )  # fmt: skip
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["normal"]),
        helper.make_node("RandomUniformLike", ["x"], ["uniform"], low=3.0, high=4.0),
        helper.make_node("RandomUniform", [], ["sized"], shape=[3, 50], seed=7.0),
        helper.make_node("Sigmoid", ["x"], ["p"]),
        helper.make_node("Bernoulli", ["p"], ["coin"], dtype=TensorProto.INT32),
        helper.make_node("Multinomial", ["x"], ["class"], sample_size=30, seed=2.0),
        helper.make_node("Constant", [], ["n"], value_int=5),
        helper.make_node("Constant", [], ["always"], value=onnx.numpy_helper.from_array(np.array(True))),
        helper.make_node("Loop", ["n", "always"], ["rounds", "seeded"], body=body),
        helper.make_node("Constant", [], ["ratio"], value_float=0.25),
        helper.make_node("Dropout", ["x", "ratio", "on"], ["dropped", "kept"]),
    ]
    f, i, b = TensorProto.FLOAT, TensorProto.INT32, TensorProto.BOOL
    outputs = {"normal": f, "uniform": f, "sized": f, "coin": i, "class": i, "rounds": f, "seeded": f, "dropped": f, "kept": b}
    m = model(nodes, ["a", "b"], outputs)
    m.graph.input.append(value("on", TensorProto.BOOL, []))
    return m


@pytest.mark.parametrize("other", ["cpu:x86-64-v2", "cpu, three threads", "wasm", "wasm:simd", "webgpu"])
def test_same_numbers_everywhere(other: str) -> None:
    """Bits are equal; what is computed from them differs by the rounding that contracting a product and a sum allows."""
    if other == "webgpu":
        pytest.importorskip("wgpu")
    feeds = {"x": np.random.default_rng(0).standard_normal((130, 70)).astype(np.float32), "on": np.array(True), "luthier.random": KEY}
    want = luthier.compile(everything(), threads=1).run(feeds)
    target, _, threads = other.partition(", ")
    got = luthier.compile(everything(), target=target, threads=3 if threads else 1).run(feeds)
    for name in want:
        exact = want[name].dtype.kind != "f" or name in ("sized", "rounds", "seeded")
        np.testing.assert_allclose(got[name], want[name], rtol=0 if exact else 2e-6, atol=0 if exact else 1e-6, err_msg=name)
    rounds = np.concatenate([want["rounds"], want["seeded"]])
    assert rounds.shape == (10, 40) and len(np.unique(rounds)) > 390  # every round draws numbers of its own
    kept, x = want["kept"], feeds["x"]
    np.testing.assert_allclose(want["dropped"], np.where(kept, x / np.float32(0.75), 0), rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4.5 * math.sqrt(0.1875 / kept.size)
    off = luthier.compile(everything(), target=target).run({**feeds, "on": np.array(False)})
    np.testing.assert_array_equal(off["dropped"], x)
    assert off["kept"].all()


@pytest.mark.parametrize("d", [f16, bf16, f32, f64], ids=str)
@pytest.mark.parametrize("op", ["RandomUniformLike", "RandomNormalLike"])
def test_element_types(op: str, d: Any) -> None:
    """The Compute against numpy, for every type of float."""
    from tests.ops.check import run_node

    x = Value("x", TensorType.of(f32, (500,)))
    key = Value("k", TensorType.of(u32, (2,)))
    y = Value("y", TensorType.of(d, (500,)))
    node = Node(op, (x, key), (y,), {"dtype": d, "stream": 3}, "n")
    got = run_node(node, [np.zeros(500, np.float32), KEY], {})[0]
    from luthier.ir.op import lookup

    known = lookup(op)
    assert known is not None
    want = known.reference(node, np.zeros(500, np.float32), KEY)[0]
    eps = {f16: 1e-3, bf16: 1e-2, f32: 1e-6, f64: 1e-13}[d]
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=eps, atol=eps)
    assert got.dtype == d.numpy
    if op == "RandomUniformLike":
        assert got.astype(np.float64).max() < 1


def test_seeded_constant_shape_is_no_weight() -> None:
    """A large seeded tensor is drawn by the call, not stored."""
    nodes = [helper.make_node("RandomNormal", [], ["z"], shape=[1000, 1000], seed=1.0), helper.make_node("Add", ["x", "z"], ["y"])]
    m = luthier.compile(model(nodes, [1], {"y": TensorProto.FLOAT}))
    assert m.manifest["weights_bytes"] < 10_000 and [s.name for s in m.inputs] == ["x"]


def test_refusals() -> None:
    body = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["e"], ["z"], name="noise")], "body", [value("e", TensorProto.FLOAT, [3])], [value("z", TensorProto.FLOAT, [3])]
    )
    with pytest.raises(UnsupportedOperator, match='inside Scan.*"body.1/noise"'):
        luthier.compile(model([helper.make_node("Scan", ["x"], ["y"], body=body, num_scan_inputs=1)], [4, 3], {"y": TensorProto.FLOAT}))
    with pytest.raises(TypeMismatch, match="random numbers of type i32"):
        luthier.compile(model([helper.make_node("RandomNormalLike", ["x"], ["y"])], [4, 3], {"y": TensorProto.INT32}, kind=TensorProto.INT32))
