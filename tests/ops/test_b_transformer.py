"""com.microsoft operators of exported transformers against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.ir.builder import Names
from luthier.ir.graph import Graph
from luthier.ir.interpret.evaluate import evaluate_graph
from luthier.passes.graph.legalize_operators import legalize_operators
from tests.ops.check import build, check_op

R = np.random.default_rng(17)
B, S, N, D = 2, 5, 4, 8


def fl(*s: int) -> np.ndarray:
    return (R.standard_normal(s) * 0.5).astype(np.float32)


def i32(a: object) -> np.ndarray:
    return np.asarray(a, np.int32)


W = [fl(B, S, N * D), fl(N * D, 3 * N * D), fl(3 * N * D)]
MASKS = {"none": None, "lengths": i32([3, 5]), "keys": i32([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), "full": R.integers(0, 2, (B, S, S)).astype(np.int32)}


@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(mask, causal):
    m = MASKS[mask]
    if m is not None and m.ndim == 3:
        m[:, :, 0] = 1
    args = [*W] if m is None else [*W, m]
    check_op("com.microsoft::Attention", args, {"num_heads": N, "unidirectional": causal}, const=(1, 2), rtol=1e-4, atol=1e-5)


def test_attention_with_past():
    past = fl(2, B, N, 3, D)
    check_op("com.microsoft::Attention", [*W, None, past], {"num_heads": N, "unidirectional": 1}, outputs=2, const=(1, 2), rtol=1e-4, atol=1e-5, symbolic=("",))


@pytest.mark.parametrize("t", [5, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(t, bias):
    args = [fl(B, S, N * D), fl(B, t, N * D), fl(B, t, N * D)]
    if bias:
        args.append(fl(3 * N * D))
    check_op("com.microsoft::MultiHeadAttention", args, {"num_heads": N}, rtol=1e-4, atol=1e-5, symbolic=("",))


def test_multi_head_attention_with_masks_and_past():
    args = [fl(B, S, N * D), fl(B, S, N * D), fl(B, S, N * D), None, None, fl(1, N, S, S + 3), fl(B, N, 3, D), fl(B, N, 3, D)]
    check_op("com.microsoft::MultiHeadAttention", args, {"num_heads": N}, outputs=3, rtol=1e-4, atol=1e-5, symbolic=("",))
    args = [fl(B, S, N * D), fl(B, 7, N * D), fl(B, 7, N * D), None, i32([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])]
    check_op("com.microsoft::MultiHeadAttention", args, {"num_heads": N, "scale": 0.3}, rtol=1e-4, atol=1e-5, symbolic=("",))


def test_embed_layer_normalization():
    ids, seg = R.integers(0, 9, (B, S)).astype(np.int32), R.integers(0, 2, (B, S)).astype(np.int32)
    tables = [fl(9, D), fl(12, D), fl(2, D), fl(D), fl(D)]
    check_op("com.microsoft::EmbedLayerNormalization", [ids, seg, *tables], outputs=2, rtol=1e-4, atol=1e-5)
    check_op("com.microsoft::EmbedLayerNormalization", [ids, seg, *tables, i32([[1, 1, 1, 0, 0], [1] * 5])], outputs=2, rtol=1e-4, atol=1e-5)


def test_the_pass_leaves_only_basic_operators():
    node = build("com.microsoft::Attention", W, {"num_heads": N}, 1, "", (1, 2))
    g = Graph("g", [node.inputs[0]], list(node.outputs), [node])
    (want,) = evaluate_graph(g, {"x0": W[0]})[0].values()
    assert legalize_operators(g)
    assert not any("::" in n.op for n in g.nodes) and len(g.nodes) > 5
    names = [v.name for n in g.nodes for v in n.outputs]
    assert len(set(names)) == len(names)
    (got,) = evaluate_graph(g, {"x0": W[0]})[0].values()
    np.testing.assert_array_equal(got, want)
    assert not legalize_operators(g)
    assert Names(g)


@pytest.mark.parametrize("past", [0, 6])
@pytest.mark.parametrize("attrs", [{}, {"do_rotary": 1}, {"do_rotary": 1, "rotary_interleaved": 1}, {"local_window_size": 3}, {"softcap": 5.0}])
def test_group_query_attention(past, attrs):
    b, s, m, d = 2, 1 if past else S, 2, 16
    angle = np.outer(np.arange(12), 10.0 ** -np.linspace(0, 2, d // 2))
    args = [fl(b, s, N * d), fl(b, s, m * d), fl(b, s, m * d), fl(b, m, past, d), fl(b, m, past, d), i32([past + s - 1] * b), i32(past + s)]
    if "do_rotary" in attrs:
        args += [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
    check_op("com.microsoft::GroupQueryAttention", args, {"num_heads": N, "kv_num_heads": m, **attrs}, outputs=3, rtol=1e-4, atol=1e-5, symbolic=("",))


def test_group_query_attention_of_packed_inputs():
    args = [fl(1, S, (N + 4) * 16), None, None, fl(1, 2, 0, 16), fl(1, 2, 0, 16), i32([S - 1]), i32(S)]
    check_op("com.microsoft::GroupQueryAttention", args, {"num_heads": N, "kv_num_heads": 2}, outputs=3, rtol=1e-4, atol=1e-5, symbolic=("",))
