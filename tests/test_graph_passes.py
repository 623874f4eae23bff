"""Graph passes: each must leave the graph's results alone (evaluated with numpy before and after) and must reach its after-form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.parser
import pytest

import luthier
from luthier.importers.onnx.importer import import_onnx
from luthier.ir.graph import Graph
from luthier.ir.interpret.evaluate import evaluate_graph
from luthier.ir.op import lookup
from luthier.passes.graph.canonicalize import canonicalize
from luthier.passes.graph.choose_layout import choose_layout
from luthier.passes.graph.eliminate_dead import eliminate_dead
from luthier.passes.graph.eliminate_transposes import eliminate_transposes
from luthier.passes.graph.fold_batch_norm import fold_batch_norm
from luthier.passes.graph.fold_constants import fold_constants
from luthier.passes.graph.fold_dequantize import fold_dequantize
from luthier.passes.graph.materialize_contents import materialize_contents
from luthier.passes.graph.merge_common import merge_common
from luthier.passes.graph.quantize_integer import quantize_integer
from luthier.passes.graph.recognise_activations import recognise_activations
from luthier.passes.graph.recognise_attention import recognise_attention
from luthier.passes.graph.recognise_norms import recognise_norms
from luthier.passes.graph.recognise_rotary import recognise_rotary
from luthier.passes.graph.recognise_softmax import recognise_softmax
from luthier.passes.program.fuse_operators import fuse_operators

Pass = Callable[[Graph], bool]


def graph(body: str, opset: int = 20) -> Graph:
    return import_onnx(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{body}'))


def ops(g: Graph) -> dict[str, int]:
    return dict(Counter(n.op for n in g.nodes))


def feeds_for(g: Graph, seed: int = 0, **extents: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    out = {}
    for v in g.inputs:
        shape = [s.attr if s.op == "const" else extents[s.attr[0]] for s in v.shape]
        a = rng.standard_normal(shape)
        out[v.name] = (a * 50).astype(v.dtype.numpy) if v.dtype.is_int else (a > 0 if v.dtype.is_bool else a.astype(v.dtype.numpy))
    return out


def apply(g: Graph, *passes: Pass, rtol: float = 1e-5, atol: float = 1e-5, **extents: int) -> Graph:
    """Runs passes and eliminate_dead; the results must stay. Then once more: nothing may change (idempotent)."""
    feeds = feeds_for(g, **extents)
    want, _ = evaluate_graph(g, feeds)
    assert any([p(g) for p in passes])
    eliminate_dead(g)
    got, _ = evaluate_graph(g, feeds)
    assert list(got) == list(want)
    for k in want:
        assert got[k].dtype == want[k].dtype
        np.testing.assert_allclose(got[k].astype(np.float64), want[k].astype(np.float64), rtol=rtol, atol=atol)
    before = str(g)
    for p in passes:
        p(g)
    eliminate_dead(g)
    assert str(g) == before
    return g


def needs(*names: str) -> None:
    for n in names:
        if lookup(n) is None:
            pytest.fail(f"operator {n} is not registered")


def test_canonicalize_drops_what_does_nothing() -> None:
    g = graph(
        """g (float[N, 4, 5] x) => (float[N, 4, 5] z) {
          one = Constant<value_float = 1.0>()  zero = Constant<value_float = 0.0>()  two = Constant<value_float = 2.0>()
          a = Identity(x)  b = Dropout(a)  c = Cast<to = 1>(b)
          d = Transpose<perm = [0, 2, 1]>(c)  e = Transpose<perm = [0, 2, 1]>(d)
          f = Mul(e, one)  h = Add(f, zero)  i = Div(h, one)  j = Sub(i, zero)
          z = Pow(j, two) }"""
    )
    apply(g, canonicalize, N=3)
    assert ops(g) == {"Mul": 1}


def test_canonicalize_composes_transposes() -> None:
    g = graph(
        """g (float[2, 3, 4, 5] x) => (float[5, 3, 4, 2] z) {
          a = Transpose<perm = [0, 2, 1, 3]>(x)  b = Transpose<perm = [3, 1, 2, 0]>(a)  z = Transpose<perm = [0, 2, 1, 3]>(b) }"""
    )
    apply(g, canonicalize)
    assert [n.attrs["perm"] for n in g.nodes] == [(3, 1, 2, 0)]


def test_canonicalize_sees_a_batched_transpose() -> None:
    g = graph(
        """g (float[B, 3, S, 8] x) => (float[B, 3, 8, S] z) {
          s = Shape(x)  b = Shape<start = 0, end = 1>(x)  l = Shape<start = 2, end = 3>(x)
          m = Constant<value_ints = [-1]>()  h = Constant<value_ints = [3]>()  d = Constant<value_ints = [8]>()
          s1 = Concat<axis = 0>(m, l, d)  r = Reshape(x, s1)  t = Transpose<perm = [0, 2, 1]>(r)
          s2 = Concat<axis = 0>(b, h, d, l)  z = Reshape(t, s2) }"""
    )
    apply(g, materialize_contents, canonicalize, B=2, S=5)
    assert ops(g) == {"Transpose": 1}
    assert g.nodes[0].attrs["perm"] == (0, 1, 3, 2)


def test_canonicalize_splits_into_slices() -> None:
    g = graph("g (float[N, 6] x) => (float[N, 2] a, float[N, 4] b) { k = Constant<value_ints = [2, 4]>()  a, b = Split<axis = 1>(x, k) }")
    apply(g, canonicalize, N=3)
    assert ops(g) == {"Slice": 2}


def test_a_transpose_of_unit_dimensions_is_a_view() -> None:
    g = graph("g (float[N, 1, 7] x) => (float[1, N, 7] z) { z = Transpose<perm = [1, 0, 2]>(x) }")
    apply(g, canonicalize, N=3)
    assert "Transpose" not in ops(g)


def test_fold_constants_and_its_limit() -> None:
    g = graph(
        """g (float[4] x) => (float[4] y, float[256, 256] big) {
          a = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()  b = Exp(a)  c = Neg(b)  y = Add(x, c)
          s = Constant<value_ints = [256, 256]>()  o = Constant<value_floats = [1.0]>()  big = Expand(o, s) }"""
    )
    assert ops(g) == {"Add": 1, "Expand": 1}


def test_shape_arithmetic_becomes_content() -> None:
    g = graph(
        """g (float[N, 6] x) => (float[M, 3] y) {
          s = Shape(x)  i = Constant<value_int = 0>()  n = Gather(s, i)  two = Constant<value_int = 2>()
          m = Mul(n, two)  ax = Constant<value_ints = [0]>()  u = Unsqueeze(m, ax)  t = Constant<value_ints = [3]>()
          d = Concat<axis = 0>(u, t)  y = Reshape(x, d) }"""
    )
    apply(g, materialize_contents, N=4)
    assert ops(g) == {"Content": 1, "Reshape": 1}
    assert repr(g.outputs[0].shape[0]) == "N * 2"


def test_a_run_time_shape_is_bound() -> None:
    g = graph("g (float[N] x, int64[2] s) => (float[A, B] y) { y = Reshape(x, s) }")
    assert g.inputs[1].bound
    out, _ = evaluate_graph(g, {"x": np.arange(6, dtype=np.float32), "s": np.array([2, 3], np.int64)})
    assert out["y"].shape == (2, 3)


def test_eliminate_dead() -> None:
    g = graph("g (float[3] x) => (float[3] b) { a = Relu(x)  c = Exp(a)  b = Exp(x) }")
    assert eliminate_dead(g) and ops(g) == {"Exp": 1} and not eliminate_dead(g)


def test_merge_common_tells_attributes_apart() -> None:
    g = graph(
        """g (float[3] x) => (float[3] z) {
          a = Exp(x)  b = Exp(x)  c = LeakyRelu<alpha = 0.1>(x)  d = LeakyRelu<alpha = 0.2>(x)  e = Add(a, b)  f = Add(c, d)  z = Add(e, f) }"""
    )
    apply(g, merge_common)
    assert ops(g) == {"Exp": 1, "LeakyRelu": 2, "Add": 3}


def test_merge_common_keeps_branches_apart() -> None:
    g = graph(
        """g (bool c, float[3] x) => (float[3] y, float[3] w) {
          w = Exp(x)
          y = If(c) <then_branch = t () => (float[3] a) { p = Exp(x)  q = Neg(x)  a = Add(p, q) },
                     else_branch = e () => (float[3] b) { r = Neg(x)  b = Abs(r) }> }"""
    )
    apply(g, merge_common)
    branches = [n.attrs for n in g.nodes if n.op == "If"][0]
    assert ops(branches["then_branch"]) == {"Neg": 1, "Add": 1}
    assert ops(branches["else_branch"]) == {"Neg": 1, "Abs": 1}


GELU = {
    "half first": "h = Mul(half, x)  d = Div(x, r2)  e = Erf(d)  p = Add(e, one)  y = Mul(h, p)",
    "half last": "d = Mul(x, ir2)  e = Erf(d)  p = Add(one, e)  m = Mul(x, p)  y = Mul(m, half)",
    "half inside": "d = Div(x, r2)  e = Erf(d)  f = Mul(e, half)  p = Add(f, half)  y = Mul(p, x)",
    "tanh": "two = Constant<value_float = 3.0>()  q = Pow(x, two)  s = Mul(q, c3)  t = Add(x, s)  u = Mul(t, k)  v = Tanh(u)  p = Add(v, one)  m = Mul(x, p)  y = Mul(half, m)",
    "tanh factored": "q = Mul(x, x)  s = Mul(q, c3)  t = Add(one, s)  w = Mul(x, k)  u = Mul(t, w)  v = Tanh(u)  p = Add(v, one)  m = Mul(x, half)  y = Mul(m, p)",
}
CONSTANTS = """half = Constant<value_float = 0.5>()  one = Constant<value_float = 1.0>()  r2 = Constant<value_float = 1.4142135>()
  ir2 = Constant<value_float = 0.70710677>()  c3 = Constant<value_float = 0.044715>()  k = Constant<value_float = 0.7978846>()
  three = Constant<value_float = 3.0>()  six = Constant<value_float = 6.0>()  zero = Constant<value_float = 0.0>()"""


@pytest.mark.parametrize("spelling", GELU)
def test_gelu_in_every_spelling(spelling: str) -> None:
    g = graph(f"g (float[N, 7] x) => (float[N, 7] y) {{ {CONSTANTS} {GELU[spelling]} }}")
    apply(g, recognise_activations, N=5)
    assert ops(g) == {"Gelu": 1}
    assert g.nodes[0].attrs == ({"approximate": "tanh"} if "tanh" in spelling else {})


OTHERS = {
    "Swish": ["s = Sigmoid(x)  y = Mul(x, s)", "n = Neg(x)  e = Exp(n)  d = Add(e, one)  y = Div(x, d)"],
    "HardSwish": ["a = Add(x, three)  c = Clip(a, zero, six)  m = Mul(x, c)  y = Div(m, six)", "h = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x)  y = Mul(x, h)"],
}


@pytest.mark.parametrize(("name", "body"), [(k, b) for k, bs in OTHERS.items() for b in bs])
def test_other_activations(name: str, body: str) -> None:
    needs(name)
    g = graph(f"g (float[N, 7] x) => (float[N, 7] y) {{ {CONSTANTS} {body} }}")
    apply(g, recognise_activations, N=5)
    assert ops(g) == {name: 1}


def test_what_is_almost_gelu_stays() -> None:
    g = graph(f"g (float[N, 7] x) => (float[N, 7] y) {{ {CONSTANTS} d = Mul(x, half)  e = Erf(d)  p = Add(e, one)  h = Mul(half, x)  y = Mul(h, p) }}")
    assert not recognise_activations(g)


NORM = """ax = Constant<value_ints = [-1]>()  eps = Constant<value_float = 0.00001>()  two = Constant<value_float = 2.0>()
  m = ReduceMean<keepdims = 1>(x, ax)  d = Sub(x, m)"""


@pytest.mark.parametrize(
    "tail",
    [
        "q = Mul(d, d)  v = ReduceMean(q, ax)  e = Add(v, eps)  s = Sqrt(e)  n = Div(d, s)",
        "q = Pow(d, two)  v = ReduceMean(q, ax)  e = Add(eps, v)  s = Sqrt(e)  i = Reciprocal(s)  n = Mul(d, i)",
        "d2 = Sub(x, m)  q = Mul(d2, d2)  v = ReduceMean(q, ax)  e = Add(v, eps)  s = Sqrt(e)  n = Div(d, s)",
    ],
)
def test_layer_norm_spelled_out(tail: str) -> None:
    needs("LayerNormalization", "ReduceMean")
    g = graph(f"g (float[N, 8] x) => (float[N, 8] y) <float[8] w = {{1,2,3,4,5,6,7,8}}, float[8] b = {{1,0,1,0,1,0,1,0}}> {{ {NORM} {tail} a = Mul(n, w)  y = Add(a, b) }}")
    apply(g, recognise_norms, N=3)
    assert ops(g) == {"LayerNormalization": 1}


def test_rms_norm_spelled_out() -> None:
    needs("RMSNormalization", "ReduceMean")
    g = graph(
        """g (float[N, 8] x) => (float[N, 8] y) <float[8] w = {1,2,3,4,5,6,7,8}> {
          ax = Constant<value_ints = [-1]>()  eps = Constant<value_float = 0.00001>()
          q = Mul(x, x)  v = ReduceMean(q, ax)  e = Add(v, eps)  s = Sqrt(e)  n = Div(x, s)  y = Mul(w, n) }"""
    )
    apply(g, recognise_norms, N=3)
    assert ops(g) == {"RMSNormalization": 1}


def test_softmax_spelled_out() -> None:
    needs("Softmax", "ReduceMax", "ReduceSum")
    g = graph("g (float[N, 8] x) => (float[N, 8] y) { a = Constant<value_ints = [-1]>()  m = ReduceMax(x, a)  d = Sub(x, m)  e = Exp(d)  s = ReduceSum(e, a)  y = Div(e, s) }")
    apply(g, recognise_softmax, N=3)
    assert ops(g) == {"Softmax": 1}


HALVES = {
    "slices": """z = Constant<value_ints = [0]>()  h = Constant<value_ints = [32]>()  e = Constant<value_ints = [9223372036854775807]>()
                 ax = Constant<value_ints = [3]>()  a = Slice(x, z, h, ax)  b = Slice(x, h, e, ax)""",
    "negative": """z = Constant<value_ints = [0]>()  h = Constant<value_ints = [-32]>()  e = Constant<value_ints = [64]>()
                   ax = Constant<value_ints = [-1]>()  a = Slice(x, z, h, ax)  b = Slice(x, h, e, ax)""",
    "split": "l = Constant<value_ints = [32, 32]>()  a, b = Split<axis = 3>(x, l)",
}


@pytest.mark.parametrize("spelling", HALVES)
def test_rotary_spelled_out_is_one_kernel(spelling: str) -> None:
    needs("luthier::RotateHalf", "Slice", "Split", "Concat", "Neg")
    g = graph(
        f"""g (float[1, 3, S, 64] x, float[1, 1, S, 64] c, float[1, 1, S, 64] s) => (float[1, 3, S, 64] y) {{
          {HALVES[spelling]}  nb = Neg(b)  r = Concat<axis = -1>(nb, a)  p = Mul(x, c)  q = Mul(r, s)  y = Add(p, q) }}"""
    )
    apply(g, recognise_rotary, S=5)
    assert ops(g) == {"luthier::RotateHalf": 1, "Mul": 2, "Add": 1}
    assert len(fuse_operators(g)) == 1


@pytest.mark.parametrize(
    "body",
    [
        "l = Constant<value_ints = [24, 40]>()  a, b = Split<axis = 3>(x, l)  nb = Neg(b)  y = Concat<axis = -1>(nb, a)",
        "l = Constant<value_ints = [32, 32]>()  a, b = Split<axis = 3>(x, l)  na = Neg(a)  y = Concat<axis = -1>(na, b)",
        "l = Constant<value_ints = [32, 32]>()  a, b = Split<axis = 3>(x, l)  nb = Neg(b)  y = Concat<axis = 2>(nb, a)",
    ],
)
def test_what_is_no_rotation_stays(body: str) -> None:
    g = graph(f"g (float[1, 3, 5, 64] x) => (float[1, 3, N, M] y) {{ {body} }}")
    before = ops(g)
    assert not recognise_rotary(g) and ops(g) == before


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked: bool) -> None:
    needs("luthier::Attention", "MatMul", "Softmax")
    mask = "s2 = Add(s, mask)" if masked else "s2 = Identity(s)"
    g = graph(
        f"""g (float[B, 2, S, 8] q, float[B, 2, T, 8] k, float[B, 2, T, 8] v, float[B, 1, S, T] mask) => (float[B, 2, S, 8] y) {{
          c = Constant<value_float = 0.6>()  kt = Transpose<perm = [0, 1, 3, 2]>(k)  qs = Mul(q, c)  ks = Mul(c, kt)
          s = MatMul(qs, ks)  {mask}  p = Softmax<axis = -1>(s2)  y = MatMul(p, v) }}"""
    )
    canonicalize(g)
    apply(g, recognise_attention, B=2, S=3, T=5)
    assert ops(g) == {"luthier::Attention": 1}


def test_batch_norm_folds_into_the_convolution() -> None:
    needs("Conv", "BatchNormalization")
    g = graph(
        """g (float[N, 2, 5, 5] x) => (float[N, 3, 5, 5] y)
          <float[3, 2, 1, 1] w = {1, 2, 3, 4, 5, 6}, float[3] s = {1, 2, 3}, float[3] b = {3, 2, 1}, float[3] m = {0.5, 1, 2}, float[3] v = {1, 2, 3}, float[1, 3, 1, 1] k = {2, 3, 4}> {
          c = Conv(x, w)  n = BatchNormalization(c, s, b, m, v)  t = Mul(n, k)  y = Add(t, k) }"""
    )
    apply(g, fold_batch_norm, N=2, rtol=1e-4, atol=1e-4)
    assert ops(g) == {"Conv": 1}


def test_transposes_sink_and_cancel() -> None:
    g = graph(
        """g (float[N, 3, 4, 5] x, float[N, 3, 4, 5] z) => (float[N, 3, 4, 5] y) <float[3, 1, 1] k = {1, 2, 3}> {
          a = Transpose<perm = [0, 2, 3, 1]>(x)  b = Transpose<perm = [0, 2, 3, 1]>(z)
          c = Add(a, b)  d = Relu(c)  e = Transpose<perm = [0, 3, 1, 2]>(d)  y = Mul(e, k) }"""
    )
    apply(g, eliminate_transposes, N=2)
    assert "Transpose" not in ops(g)


def test_channels_last_leaves_transposes_at_the_borders_only() -> None:
    needs("Conv", "MaxPool")
    g = graph(
        """g (float[N, 2, 8, 8] x) => (float[N, 3, 4, 4] y)
          <float[3, 2, 1, 1] w = {1, 2, 3, 4, 5, 6}, float[3, 3, 1, 1] u = {1, 2, 3, 4, 5, 6, 7, 8, 9}> {
          a = Conv(x, w)  b = Relu(a)  c = Conv(b, u)  d = Add(c, b)  y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d) }"""
    )
    apply(g, choose_layout, eliminate_transposes, N=2)
    assert ops(g) == {"Transpose": 2, "Conv": 2, "Relu": 1, "Add": 1, "MaxPool": 1}
    assert all(n.attrs["layout"] == "NHWC" for n in g.nodes if n.op in ("Conv", "MaxPool"))


QDQ = """g (uint8[N, 2, 4, 4] x) => (uint8[N, 3, 4, 4] y)
  <int8[3, 2, 1, 1] w = {10, -20, 30, 40, -50, 60}, float[3] ws = {0.01, 0.02, 0.03}, int8[3] wz = {0, 0, 0}, float xs = {0.05}, uint8 xz = {128},
   int32[3] b = {100, -200, 300}, float[3] bs = {0.0005, 0.001, 0.0015}, int32[3] bz = {0, 0, 0}, float ys = {0.13}, uint8 yz = {101}> {
  xf = DequantizeLinear(x, xs, xz)  wf = DequantizeLinear<axis = 0>(w, ws, wz)  bf = DequantizeLinear<axis = 0>(b, bs, bz)
  c = Conv(xf, wf, bf)  y = QuantizeLinear(c, ys, yz) }"""


def test_quantized_convolution_stays_integer() -> None:
    needs("Conv", "ConvInteger", "QuantizeLinear")
    g = graph(QDQ)
    feeds = feeds_for(g, N=2)
    want, values = evaluate_graph(g, feeds)
    quantize_integer(g)
    fold_dequantize(g)
    eliminate_dead(g)
    got, _ = evaluate_graph(g, feeds)
    exact = np.clip(values["c"].astype(np.float64) / np.float32(0.13) + 101, 0, 255)
    assert np.abs(got["y"] - exact).max() <= 0.5 + 1e-3  # the nearest integer; a tie may go either way
    assert np.abs(got["y"].astype(int) - want["y"].astype(int)).max() <= 1
    assert ops(g) == {"ConvInteger": 1, "Cast": 2, "Mul": 1, "Add": 2, "Round": 1}
    assert len(fuse_operators(g)) == 1


def test_groups_of_a_chain_a_fork_and_a_view() -> None:
    g = graph(
        """g (float[N, 4] x, float[4] b) => (float[N, 2, 2] z) {
          a = Add(x, b)  s = Sigmoid(a)  m = Mul(a, s)  sh = Constant<value_ints = [-1, 2, 2]>()  r = Reshape(m, sh)  z = Neg(r) }"""
    )
    groups = fuse_operators(g)
    assert [[n.op for n in k.nodes] for k in groups] == [["Add", "Sigmoid", "Mul"], ["Reshape"], ["Neg"]]


def test_an_epilogue_joins_its_contraction_but_not_past_a_second_reader() -> None:
    needs("MatMul")
    g = graph(
        """g (float[N, 4] x) => (float[N, 3] z, float[N, 3] a)
          <float[4, 3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] b = {1, 2, 3}> {
          m = MatMul(x, w)  a = Add(m, b)  r = Relu(a)  z = Neg(r) }"""
    )
    assert [[n.op for n in k.nodes] for k in fuse_operators(g)] == [["MatMul", "Add"], ["Relu", "Neg"]]


def test_fold_constants_pass_after_rewriting() -> None:
    g = graph("g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { t = Transpose(w)  y = Add(x, t) }")
    assert ops(g) == {"Add": 1}
    assert not fold_constants(g)


def test_extents_are_named_and_products_kept() -> None:
    from luthier.ir.compute import Compute, axis, max_, pull
    from luthier.ir.dtypes import f32
    from luthier.ir.expr import load, var
    from luthier.ir.loop import Buffer
    from luthier.passes.program.abstract_extents import abstract_extents

    h = var("height")
    half = (h + 1) // 2
    x = Buffer.of("p0", f32, (half * 2, half))
    i, k = axis("i", half * 2), axis("k", half)
    c = Compute("f", (x,), (h,), (pull("o0", [i], max_(k, load(x, [i.var, k.var]))),), ("o0",))
    named, scalars = abstract_extents(c)
    assert str(named) == "compute f(p0: f32[e0 * 2, e0], e0) -> o0:\n  o0[i < e0 * 2]: f32 = max[k < e0](p0[i, k])\n"
    assert list(scalars.values()) == [half] and named.dims == tuple(scalars)
    again, none = abstract_extents(named)
    assert again is named and none == {}


def test_flattened_channels_last_is_a_view() -> None:
    g = graph(
        """g (float[N, 4, 5, 6] x) => (float[N, 20, 6] z) {
          t = Transpose<perm = [0, 3, 1, 2]>(x)  s = Constant<value_ints = [0, 6, 20]>()  r = Reshape(t, s)  z = Transpose<perm = [0, 2, 1]>(r) }"""
    )
    apply(g, canonicalize, N=2)
    assert "Transpose" not in ops(g)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_moves_pixels_channels_last(mode: str) -> None:
    g = graph(f"""agraph (float[2, 3, 5, 12] x) => (float[2, 6, 10, 3] y) {{
        c = Transpose<perm=[0,3,1,2]>(x)
        d = DepthToSpace<blocksize=2, mode="{mode}">(c)
        e = Sigmoid(d)
        y = Transpose<perm=[0,2,3,1]>(e)
    }}""")
    apply(g, eliminate_transposes)
    assert ops(g) == {"DepthToSpace": 1, "Sigmoid": 1}


def test_resize_with_an_unread_region_becomes_channels_last() -> None:
    g = graph("""agraph (float[1, 4, 6, 6] x) => (float[1, 4, 12, 12] y)
        <float[8] roi = {0, 0, 0, 0, 1, 1, 1, 1}, float[4] scales = {1, 1, 2, 2}, float[4, 4, 1, 1] k = {
        1, 2, 3, 4, 5, 6, 7, 8, 1, 3, 5, 7, 2, 4, 6, 8}> {
        a = Conv(x, k)
        b = Resize<mode="nearest", coordinate_transformation_mode="asymmetric">(a, roi, scales)
        y = Conv(b, k)
    }""")
    apply(g, choose_layout, eliminate_transposes)
    assert ops(g)["Transpose"] == 2


@pytest.mark.parametrize("between", ["Gather", "Identity", "Cast", "Dropout"])
def test_symbols_survive_the_rewriting_of_their_value(between: str) -> None:
    """An extent is read from a value that a rule replaces: from then on it is read from what stands in its place."""
    nodes = {
        "Gather": "j = Gather(k, zero)", "Identity": "s = Squeeze(k)  j = Identity(s)", "Cast": "s = Squeeze(k)  j = Cast<to = 7>(s)",
        "Dropout": "s = Squeeze(k)  f = Cast<to = 1>(s)  d = Dropout(f)  j = Cast<to = 7>(d)",
    }[between]  # fmt: skip
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x, float[1] r) => (float[m] y) <int64 zero = {{0}}, int64 nought = {{0}}, int64 one = {{1}}> {{
        c = Ceil(r)  k = Cast<to = 7>(c)  {nodes}  i = Range(nought, j, one)  y = Gather(x, i)
    }}"""
    m = luthier.compile(onnx.parser.parse_model(text))
    x = np.arange(9, dtype=np.float32)
    for r in (2.5, 0.0, 7.0):
        np.testing.assert_array_equal(m.run({"x": x, "r": np.array([r], np.float32)})["y"], x[: int(np.ceil(r))])


def test_equal_counts_keep_their_symbols() -> None:
    """Two equal NonZeros whose counts stand in the shapes of other tensors, as torch writes ``x[mask]`` and ``w[mask]``."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x, float[n] w) => (float[n] y) <float nought = {0}> {
        m = Greater(x, nought)  i = NonZero(m)  j = NonZero(m)  it = Transpose(i)  jt = Transpose(j)
        a = GatherND(x, it)  b = GatherND(w, jt)  s = Mul(a, b)  r = Neg(s)  k = NonZero(m)  kt = Transpose(k)  y = ScatterND(x, kt, r)
    }"""
    m = luthier.compile(onnx.parser.parse_model(text))
    rng = np.random.default_rng(0)
    for n in (1, 7, 40):
        x, w = rng.standard_normal(n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
        np.testing.assert_allclose(m.run({"x": x, "w": w})["y"], np.where(x > 0, -x * w, x), rtol=1e-6)
