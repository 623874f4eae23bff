"""com.microsoft MoE and QMoE: against numpy written from the schema (synthetic weights) and, where it runs them, onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import luthier
from luthier.errors import LuthierError
from luthier.importers.onnx.importer import import_onnx
from luthier.passes.graph.legalize_operators import legalize_operators

Array = np.ndarray[Any, Any]
H, I, E, K, T = 32, 48, 5, 2, 7


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def activated(kind: str, y: Array, up: Array | None, fusion: int, alpha: float, beta: float, limit: float) -> Array:
    if kind == "swiglu":
        g, low = (y, up) if not fusion else (y[0::2], y[1::2]) if fusion == 1 else np.split(y, 2)
        g, low = np.minimum(g, limit), np.clip(low, -limit, limit)
        return np.asarray(g * sigmoid(alpha * g) * (low + beta))
    f = {"relu": np.maximum(y, 0), "silu": y * sigmoid(y), "identity": y, "gelu": 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))}[kind]
    return np.asarray(f if up is None else f * up)


def forward(x: Array, scores: Array, w: list[Array | None], b: list[Array | None], shares: Any, attrs: dict[str, Any]) -> Array:
    """Token by token, expert by expert."""
    args = attrs.get("swiglu_fusion", 0), attrs.get("activation_alpha", 1.0), attrs.get("activation_beta", 0.0), attrs.get("swiglu_limit", np.inf)
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    out = np.zeros_like(flat)
    for t, row in enumerate(flat):
        best = np.argsort(-scores[t], kind="stable")[: attrs["k"]]
        for e, share in zip(best, shares(t, best), strict=True):
            y = [None if m is None else m[e] @ row + (0 if c is None else c[e]) for m, c in zip((w[0], w[2]), (b[0], b[2]), strict=True)]
            h = activated(attrs["activation_type"], y[0], y[1], *args)
            out[t] += share * (w[1][e] @ h + (0 if b[1] is None else b[1][e]))
    return out.reshape(x.shape)


def model(op: str, inputs: list[Any], attrs: dict[str, Any], rank: int, free: dict[int, int]) -> Any:
    """``free``: {number of an input: its rank} of those that a caller gives; the others are constants."""
    names = [f"i{k}" if v is not None else "" for k, v in enumerate(inputs)]
    while not names[-1]:
        names.pop()
    consts = [numpy_helper.from_array(v, names[k]) for k, v in enumerate(inputs) if v is not None and k not in free]
    ins = [helper.make_tensor_value_info(names[k], TensorProto.FLOAT, [f"d{k}{j}" for j in range(r - 1)] + [inputs[k].shape[-1]]) for k, r in free.items()]
    node = helper.make_node(op, names, ["y"], domain="com.microsoft", **attrs)
    g = helper.make_graph([node], "moe", ins, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)], consts)
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9)


def run(m: Any, feeds: dict[str, Array]) -> Array:
    return np.asarray(luthier.compile(m, threads=2).run(feeds)["y"])


def by_runtime(m: Any, feeds: dict[str, Array]) -> Array:
    import onnxruntime as ort

    o = ort.SessionOptions()
    o.log_severity_level = 4
    return np.asarray(ort.InferenceSession(m.SerializeToString(), o, providers=["CPUExecutionProvider"]).run(None, feeds)[0])


def check(got: Array, want: Array, tolerance: float = 2e-5) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() < tolerance * np.abs(want).max()


FLOATS = [
    {"activation_type": "relu"}, {"activation_type": "silu", "normalize_routing_weights": 1}, {"activation_type": "gelu"}, {"activation_type": "identity"},
    {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 0.7},
    {"activation_type": "swiglu", "swiglu_fusion": 2, "activation_alpha": 1.0}, {"activation_type": "silu", "fc3": 1}, {"activation_type": "swiglu", "fc3": 1},
]  # fmt: skip


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("extra", FLOATS, ids=lambda a: "-".join(f"{v}" for v in a.values()))
def test_floats(extra: dict[str, Any], rank: int) -> None:
    rng = np.random.default_rng(5)
    attrs = {k: v for k, v in extra.items() if k != "fc3"} | {"k": K}
    rows = I * (2 if attrs.get("swiglu_fusion") else 1)
    w1, w2 = rng.standard_normal((E, rows, H)).astype(np.float32) / 5, rng.standard_normal((E, H, I)).astype(np.float32) / 5
    b1, b2 = rng.standard_normal((E, rows)).astype(np.float32), rng.standard_normal((E, H)).astype(np.float32)
    w3, b3 = (rng.standard_normal((E, I, H)).astype(np.float32) / 5, rng.standard_normal((E, I)).astype(np.float32)) if "fc3" in extra else (None, None)
    x = rng.standard_normal((T, H) if rank == 2 else (1, T, H)).astype(np.float32)
    scores = rng.standard_normal((T, E)).astype(np.float32)
    p = np.exp(scores.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    whole = attrs.get("normalize_routing_weights", 0)
    want = forward(x, scores, [w1, w2, w3], [b1, b2, b3], lambda t, best: p[t, best] / (p[t, best].sum() if whole else 1), attrs)
    m = model("MoE", [x, scores, w1, b1, w2, b2, w3, b3], attrs, rank, {0: rank, 1: 2})
    feeds = {"i0": x, "i1": scores}
    check(run(m, feeds), want)
    if w3 is None and attrs.get("swiglu_fusion", 1) == 1:  # what onnxruntime's CPU kernel has
        check(by_runtime(m, feeds), want, 1e-4)


def packed(q: Array, bits: int) -> Array:
    """Rows of numbers as a stream of bits, the lowest first."""
    fields = (q[..., None] >> np.arange(bits)) & 1
    return np.packbits(fields.reshape(*q.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


CASES = [(4, 0, False, "silu", 0), (4, 16, False, "swiglu", 1), (4, 16, True, "silu", 0), (8, 16, True, "relu", 0), (8, 0, True, "gelu", 0), (2, 16, True, "silu", 0), (3, 16, False, "swiglu", 2)]


@pytest.mark.parametrize(("bits", "block", "points", "kind", "fusion"), CASES)
def test_integers(bits: int, block: int, points: bool, kind: str, fusion: int) -> None:
    rng = np.random.default_rng(6)
    attrs: dict[str, Any] = {"activation_type": kind, "k": K, "expert_weight_bits": bits, "weights_prepacked": 0}
    if block:
        attrs["block_size"] = block
    if fusion:
        attrs |= {"swiglu_fusion": fusion, "activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.5}
    dense: list[Array | None] = []
    raw, scales, zeros, biases = [], [], [], []
    for rows, columns in ((I * (2 if fusion else 1), H), (H, I)):
        q = rng.integers(0, 1 << bits, (E, rows, columns))
        groups = columns // block if block else 1
        s = (rng.uniform(0.5, 1.5, (E, rows, groups)) / (1 << bits)).astype(np.float32)
        z = rng.integers(0, 1 << bits, (E, rows, groups)) if points else np.full((E, rows, groups), 1 << (bits - 1))
        dense.append((q - np.repeat(z, columns // groups, -1)) * np.repeat(s.astype(np.float64), columns // groups, -1))
        raw.append(packed(q, bits))
        scales.append(s if block else s[..., 0])
        zeros.append(packed(z if block else z[..., 0], bits) if points else None)
        biases.append(rng.standard_normal((E, rows)).astype(np.float32))
    x, scores = rng.standard_normal((1, T, H)).astype(np.float32), rng.standard_normal((T, E)).astype(np.float32)

    def shares(t: int, best: Array) -> Array:
        p = np.exp(scores[t, best].astype(np.float64))
        return np.asarray(p / p.sum())

    want = forward(x, scores, [*dense, None], [*biases, None], shares, attrs)
    ins = [x, scores, raw[0], scales[0], biases[0], raw[1], scales[1], biases[1], None, None, None, zeros[0], zeros[1]]
    m = model("QMoE", ins, attrs, 3, {0: 3, 1: 2})
    feeds = {"i0": x, "i1": scores}
    check(run(m, feeds), want)
    graph = import_onnx(m)
    legalize_operators(graph)
    kept = [n.inputs[2].data.nbytes for n in graph.nodes if n.op == "luthier::ExpertMatMul"]
    assert kept == [r.nbytes * {2: 2, 3: 4 / 3}.get(bits, 1) for r in raw]  # 2 and 3 bits take 4
    if fusion != 2 and bits in (4, 8):
        check(by_runtime(m, feeds), want, 0.03 if bits == 8 else 1e-4)  # its 8-bit kernel rounds activations to 8 bits


def test_shares_of_their_own() -> None:
    """router_weights: one tensor chooses, another one weighs."""
    rng = np.random.default_rng(8)
    q1, q2 = rng.integers(0, 16, (E, I, H)), rng.integers(0, 16, (E, H, I))
    s1, s2 = (rng.uniform(0.5, 1.5, (E, n)).astype(np.float32) / 16 for n in (I, H))
    x, scores, given = rng.standard_normal((T, H)).astype(np.float32), rng.standard_normal((T, E)).astype(np.float32), rng.uniform(0.1, 1, (T, E)).astype(np.float32)
    for whole in (0, 1):
        attrs = {"activation_type": "silu", "k": K, "expert_weight_bits": 4, "weights_prepacked": 0, "normalize_routing_weights": whole}
        w: list[Array | None] = [(q1 - 8) * s1[..., None].astype(np.float64), (q2 - 8) * s2[..., None].astype(np.float64), None]
        want = forward(x, scores, w, [None] * 3, lambda t, best, whole=whole: given[t, best] / (given[t, best].sum() if whole else 1), attrs)
        m = model("QMoE", [x, scores, packed(q1, 4), s1, None, packed(q2, 4), s2, *[None] * 7, given], attrs, 2, {0: 2, 1: 2, 14: 2})
        feeds = {"i0": x, "i1": scores, "i14": given}
        check(run(m, feeds), want)
        check(by_runtime(m, feeds), want, 1e-4)


def test_bad_nodes() -> None:
    x, scores = np.zeros((T, H), np.float32), np.zeros((T, E), np.float32)
    raw, scales = np.zeros((E, I, H // 2), np.uint8), np.zeros((E, I), np.float32)
    down, more = np.zeros((E, H, I // 2), np.uint8), np.zeros((E, H), np.float32)
    good = {"activation_type": "silu", "k": K, "expert_weight_bits": 4, "weights_prepacked": 0}
    for attrs, ins, text in (
        ({"quant_type": "fp8"}, (raw, scales), "fp8"), ({"activation_type": "tanh"}, (raw, scales), "'tanh'"), ({"use_sparse_mixer": 1}, (raw, scales), "use_sparse_mixer"),
        ({"weights_prepacked": 1}, (raw, scales), "execution provider"), ({"expert_weight_bits": 5}, (raw, scales), "5 bits"),
        ({}, (raw[..., :-1], scales), "take bytes"), ({"block_size": 16}, (raw, scales), "scales must be"), ({"activation_type": "swiglu"}, (raw, scales), "swiglu needs fc3"),
    ):  # fmt: skip
        with pytest.raises(LuthierError, match=text):
            luthier.compile(model("QMoE", [x, scores, *ins, None, down, more], good | attrs, 2, {0: 2, 1: 2}))
