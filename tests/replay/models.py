"""Small models without stored weights: one for every way through the compiler. Only their shapes matter."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser

__all__ = ["MODELS", "model"]

_TYPES = {"float": np.float32, "int64": np.int64, "int8": np.int8, "uint8": np.uint8}


def weights(*specs: str) -> dict[str, np.ndarray[Any, Any]]:
    """``"w1 float 64x128"``, ``"s float 1 0.02"`` (a fixed value) to arrays; contents depend on the name alone."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    for spec in specs:
        name, kind, shape, *value = spec.split()
        dims = tuple(int(d) for d in shape.split("x")) if shape != "-" else ()
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        dtype = np.dtype(_TYPES[kind])
        if value:
            out[name] = np.full(dims, float(value[0]), dtype)
        elif dtype.kind == "f":
            out[name] = (rng.standard_normal(dims) * 0.1).astype(dtype)
        else:
            out[name] = rng.integers(0, 100, dims).astype(dtype)
    return out


def parse(text: str, consts: dict[str, np.ndarray[Any, Any]], opset: int = 20) -> onnx.ModelProto:
    """ONNX's text form with initializers added."""
    m = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    for name, a in consts.items():
        m.graph.initializer.append(onnx.numpy_helper.from_array(a, name))
    return m


def mlp() -> onnx.ModelProto:
    w = weights("w0 float 64x128", "b0 float 128", "w1 float 128x40", "b1 float 40", "half float - 0.5", "one float - 1", "root float - 1.4142135")
    return parse(
        """mlp (float[N, 64] x) => (float[N, 40] y) {
          a = MatMul(x, w0)  b = Add(a, b0)  c = Div(b, root)  d = Erf(c)  e = Add(d, one)  f = Mul(b, e)  g = Mul(f, half)
          h = MatMul(g, w1)  i = Add(h, b1)  y = Softmax<axis = -1>(i) }""",
        w,
    )


def _conv(extents: str) -> onnx.ModelProto:
    w = weights(
        "k0 float 16x3x3x3", "c0 float 16", "s0 float 16 1.5", "t0 float 16 0.1", "m0 float 16 0.2", "v0 float 16 0.9",
        "k1 float 16x1x3x3", "c1 float 16", "k2 float 24x16x1x1", "c2 float 24", "k3 float 24x24x3x3", "c3 float 24", "w float 24x10", "b float 10",
    )  # fmt: skip
    return parse(
        f"""conv (float[1, 3, {extents}] x) => (float[1, 10] y) {{
          a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, k0, c0)  a1 = BatchNormalization(a, s0, t0, m0, v0)  a2 = HardSwish(a1)
          d = Conv<group = 16, pads = [1, 1, 1, 1]>(a2, k1, c1)  d1 = Relu(d)
          e = Conv(d1, k2, c2)  p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(e)
          f = Conv<pads = [1, 1, 1, 1]>(p, k3, c3)  g = Add(f, p)  h = Relu(g)
          i = GlobalAveragePool(h)  j = Flatten(i)  y = Gemm(j, w, b) }}""",
        w,
    )


def convnet() -> onnx.ModelProto:
    return _conv("32, 32")


def convnet_dynamic() -> onnx.ModelProto:
    return _conv("H, W")


def transformer() -> onnx.ModelProto:
    """One encoder block over a run-time length, spelled as exporters do."""
    w = weights(
        "g0 float 64 1", "h0 float 64", "wq float 64x64", "wk float 64x64", "wv float 64x64", "wo float 64x64", "bq float 64", "bk float 64", "bv float 64",
        "bo float 64", "g1 float 64 1", "h1 float 64", "w0 float 64x256", "b0 float 256", "w1 float 256x64", "b1 float 64",
        "half float - 0.5", "one float - 1", "root float - 1.4142135", "scale float - 0.25", "eps float - 1e-5", "two float - 2",
    )  # fmt: skip
    w["heads"], w["flat"], w["last"] = np.array([0, 0, 4, 16]), np.array([0, 0, 64]), np.array([-1])

    def norm(x: str, y: str, g: str, h: str) -> str:
        return f"""{y}m = ReduceMean({x}, last)  {y}d = Sub({x}, {y}m)  {y}p = Pow({y}d, two)  {y}v = ReduceMean({y}p, last)
          {y}e = Add({y}v, eps)  {y}s = Sqrt({y}e)  {y}n = Div({y}d, {y}s)  {y}g = Mul({y}n, {g})  {y} = Add({y}g, {h})"""

    def head(x: str, w: str, b: str, y: str, perm: str) -> str:
        return f"{y}0 = MatMul({x}, {w})  {y}1 = Add({y}0, {b})  {y}2 = Reshape({y}1, heads)  {y} = Transpose<perm = [{perm}]>({y}2)"

    return parse(
        f"""block (float[B, L, 64] x, float[B, 1, 1, L] mask) => (float[B, L, 64] y) {{
          {norm("x", "n0", "g0", "h0")}
          {head("n0", "wq", "bq", "q", "0, 2, 1, 3")}  {head("n0", "wk", "bk", "k", "0, 2, 3, 1")}  {head("n0", "wv", "bv", "v", "0, 2, 1, 3")}
          s0 = MatMul(q, k)  s1 = Mul(s0, scale)  s2 = Add(s1, mask)  s = Softmax<axis = -1>(s2)
          o0 = MatMul(s, v)  o1 = Transpose<perm = [0, 2, 1, 3]>(o0)  o2 = Reshape(o1, flat)  o3 = MatMul(o2, wo)  o4 = Add(o3, bo)  r = Add(o4, x)
          {norm("r", "n1", "g1", "h1")}
          a = MatMul(n1, w0)  b = Add(a, b0)  c = Div(b, root)  d = Erf(c)  e = Add(d, one)  f = Mul(b, e)  g = Mul(f, half)
          h = MatMul(g, w1)  i = Add(h, b1)  y = Add(i, r) }}""",
        w,
    )


def decode_step() -> onnx.ModelProto:
    """One query row against a cache of run-time length, the new row appended."""
    w = weights("wq float 64x64", "wk float 64x64", "wv float 64x64", "wo float 64x64", "scale float - 0.25")
    w["heads"], w["flat"] = np.array([1, 1, 4, 16]), np.array([1, 1, 64])

    def head(w: str, y: str) -> str:
        return f"{y}0 = MatMul(x, {w})  {y}1 = Reshape({y}0, heads)  {y} = Transpose<perm = [0, 2, 1, 3]>({y}1)"

    return parse(
        f"""step (float[1, 1, 64] x, float[1, 4, P, 16] pk, float[1, 4, P, 16] pv) => (float[1, 1, 64] y, float[1, 4, Q, 16] nk, float[1, 4, Q, 16] nv) {{
          {head("wq", "q")}  {head("wk", "k")}  {head("wv", "v")}
          nk = Concat<axis = 2>(pk, k)  nv = Concat<axis = 2>(pv, v)  kt = Transpose<perm = [0, 1, 3, 2]>(nk)
          s0 = MatMul(q, kt)  s1 = Mul(s0, scale)  s = Softmax<axis = -1>(s1)  o0 = MatMul(s, nv)
          o1 = Transpose<perm = [0, 2, 1, 3]>(o0)  o2 = Reshape(o1, flat)  y = MatMul(o2, wo) }}""",
        w,
    )


def speech() -> onnx.ModelProto:
    """Two rates behind an If, a convolution and an LSTM with carried state."""
    w = weights(
        "k8 float 32x1x16", "k16 float 32x1x32", "lw float 1x128x32", "lr float 1x128x32", "lb float 1x256", "w float 32x1", "b float 1", "rate int64 - 16000",
    )  # fmt: skip
    w["squeeze"] = np.array([0])

    def branch(name: str, k: str, stride: int) -> str:
        return f"""{name} () => (float[1, 32, T] {name}_out) {{ {name}_c = Conv<strides = [{stride}]>(x3, {k})  {name}_out = Relu({name}_c) }}"""

    return parse(
        f"""speech (float[1, S] x, float[1, 1, 32] h, float[1, 1, 32] c, int64 sr) => (float[1, 1] y, float[1, 1, 32] hn, float[1, 1, 32] cn) {{
          one = Constant<value_ints = [1]>()  x3 = Unsqueeze(x, one)  fast = Equal(sr, rate)
          f = If (fast) <then_branch = {branch("hi", "k16", 16)}, else_branch = {branch("lo", "k8", 8)}>
          t = Transpose<perm = [2, 0, 1]>(f)  ly, hn, cn = LSTM<hidden_size = 32>(t, lw, lr, lb, , h, c)
          last = Squeeze(hn, squeeze)  z = Gemm(last, w, b)  y = Sigmoid(z) }}""",
        w,
    )


def quantized() -> onnx.ModelProto:
    """A convolution between QuantizeLinear and DequantizeLinear, then a dynamically quantized product."""
    w = weights(
        "sx float - 0.02", "zx uint8 - 128", "sw float - 0.01", "zw int8 - 0", "k int8 16x8x3x3", "sb float - 0.0002", "sy float - 0.05", "zy uint8 - 0", "m int8 16x24", "zm int8 - 0",
        "sm float - 0.01",
    )  # fmt: skip
    w["bias"] = np.arange(16, dtype=np.int32)
    w["zb"] = np.array(0, np.int32)
    return parse(
        """quant (float[1, 8, 14, 14] x) => (float[1, 24] y) {
          xq = QuantizeLinear(x, sx, zx)  xd = DequantizeLinear(xq, sx, zx)  kd = DequantizeLinear(k, sw, zw)  bd = DequantizeLinear(bias, sb, zb)
          c = Conv<pads = [1, 1, 1, 1]>(xd, kd, bd)  r = Relu(c)  rq = QuantizeLinear(r, sy, zy)  rd = DequantizeLinear(rq, sy, zy)
          p = GlobalAveragePool(rd)  f = Flatten(p)
          fq, fs, fz = DynamicQuantizeLinear(f)  i = MatMulInteger(fq, m, fz, zm)  j = Cast<to = 1>(i)  s = Mul(fs, sm)  y = Mul(j, s) }""",
        w,
    )


def indexing() -> onnx.ModelProto:
    """Look-ups, writes at computed places, and kernels that find their own extent."""
    w = weights("table float 100x32", "k int64 1 5")
    return parse(
        """index (int64[N] ids, int64[M, 1] where, float[M, 32] up) => (float[5] top, int64[5] at, float[N, 32] s, int64[2, K] nz, int64[N] best) {
          e = Gather(table, ids)  s = ScatterND(e, where, up)  best = ArgMax<axis = 1, keepdims = 0>(s)
          m = ReduceMax<keepdims = 0>(s, ax)  top, at = TopK(m, k)  pos = Relu(s)  nz = NonZero(pos) }""",
        {**w, "ax": np.array([1])},
    )


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f for f in (mlp, convnet, convnet_dynamic, transformer, decode_step, speech, quantized, indexing)
}


def model(name: str) -> onnx.ModelProto:
    return MODELS[name]()
