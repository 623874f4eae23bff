"""com.microsoft::DynamicQuantizeLSTM: the LSTM that onnxruntime's dynamic quantization writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.compute import Pull, axis, max_, min_, pull, sum_
from luthier.ir.dtypes import f32, u8
from luthier.ir.expr import Expr, cast, const, load, maximum, minimum, select
from luthier.ir.graph import Node, TensorType
from luthier.ir.loop import Buffer
from luthier.ir.op import op
from luthier.ir.ops.common import Array, axes_of, differ, get, must, need, padded, shape_error, static
from luthier.ir.ops.quantize import centered, dynamic_parameters, dynamic_parameters_ref, saturate, saturate_ref
from luthier.ir.ops.recurrent import LSTM, Step


@op("com.microsoft::DynamicQuantizeLSTM")
class DynamicQuantizeLSTM(LSTM):
    """LSTM with W [D, I, 4 H] and R [D, H, 4 H] of 8 bits; scales and zero points [D] or [D, 4 H] at inputs 8 to 11. X is quantized to u8
    over its whole range, the hidden state in every step, row by row (onnxruntime: over the rows that a thread has)."""

    def hidden(self, node: Node) -> int:
        return static(node, need(node, 2).shape[1], "the hidden size")

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, w, r = need(node, 0), need(node, 1), need(node, 2)
        n = len(self.directions(node))
        if x.rank != 3 or w.rank != 3 or r.rank != 3 or x.dtype is not f32:
            raise shape_error(node, "DynamicQuantizeLSTM takes X, W and R of rank 3, X of f32")
        h = self.hidden(node)
        if any(differ(v.shape[0], const(n)) or differ(v.shape[2], const(4 * h)) for v in (w, r)) or differ(w.shape[1], x.shape[2]):
            raise shape_error(node, f"W must be [{n}, {x.shape[2]!r}, {4 * h}], R [{n}, {h}, {4 * h}]")
        for i in (8, 9, 10, 11):
            v = node.input(i)
            if v is None and i % 2 == 0 or v is not None and v.rank not in (1, 2):
                raise shape_error(node, "scales and zero points must be [directions] or [directions, 4 hidden sizes]")
        self.activations(node)
        t, b = x.shape[0], x.shape[1]
        return [TensorType.of(f32, (t, n, b, h)), *[TensorType.of(f32, (n, b, h))] * 2]

    def parameter(self, st: Step, i: int, q: Expr) -> Expr | None:
        """Scale or zero point ``i`` of column ``q``."""
        b = get(st.ins, i)
        return None if b is None else load(b, [const(st.d), q][: b.rank])

    def weight(self, st: Step, i: int, k: Expr, q: Expr) -> Expr:
        """A weight less its zero point."""
        return centered(load(must(st.ins, i), [const(st.d), k, q]), self.parameter(st, 9 if i == 1 else 11, q))

    def project(self, st: Step, x: Buffer, flip: int, h: int) -> list[Pull]:
        params, s, z = dynamic_parameters(f"{st.name}.xq", x)
        at = axes_of(x.shape, "p")
        small = pull(f"{st.name}.xq.values", at, saturate(load(x, [a.var for a in at]) / s, z, u8))
        q, i = axis("q", 4 * h), axis("i", x.shape[2])
        acc = sum_(i, centered(load(small.buf, [st.t.var, st.b.var, i.var]), z) * self.weight(st, 1, i.var, q.var))
        factor = self.parameter(st, 8, q.var)
        assert factor is not None
        return [*params, small, pull(f"{st.name}.x", (st.t, st.b, q), self.with_biases(st, q.var, cast(acc, f32) * (s * factor), h))]

    def step(self, node: Node, st: Step, proj: Buffer, state: list[Buffer]) -> tuple[list[Pull], list[Pull]]:
        k, name = axis("k", st.h.extent), f"{st.name}.hq"
        h = load(state[0], [st.b.var, k.var])
        hi, lo = pull(f"{name}.max", (st.b,), max_(k, h)), pull(f"{name}.min", (st.b,), min_(k, h))
        top, low = maximum(const(0.0, f32), load(hi.buf, [st.b.var])), minimum(const(0.0, f32), load(lo.buf, [st.b.var]))
        scale = pull(f"{name}.scale", (st.b,), select(top.eq(low), const(1.0, f32), (top - low) / 255.0))
        s = load(scale.buf, [st.b.var])
        zero = pull(f"{name}.zero", (st.b,), saturate(-low / s, None, u8))
        small = pull(f"{name}.values", (st.b, k), saturate(h / s, load(zero.buf, [st.b.var]), u8))
        steps, new = super().step(node, st, proj, state)
        return [hi, lo, scale, zero, small, *steps], new

    def recurrent(self, st: Step, h: Buffer, q0: int, n: int, suffix: str, scale: Buffer | None = None) -> Pull:
        q, k, name = axis("q", n), axis("k", st.h.extent), f"{st.name}.hq"
        row = (st.b.extent,)
        s, z = (load(Buffer(f"{name}.{part}", d, row, "global"), [st.b.var]) for part, d in (("scale", f32), ("zero", u8)))
        small = load(Buffer(f"{name}.values", u8, (st.b.extent, st.h.extent), "global"), [st.b.var, k.var])
        factor = self.parameter(st, 10, q.var + q0)
        assert factor is not None
        acc = sum_(k, centered(small, z) * self.weight(st, 2, k.var, q.var + q0))
        return pull(f"{st.name}.{suffix}", (st.b, q), cast(acc, f32) * (s * factor))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        a: list[Any] = padded(arrays, 12)
        h = self.hidden(node)

        def weights(i: int, scale: int) -> Array:
            q, s, z = np.asarray(a[i]).astype(np.float64), np.asarray(a[scale], np.float64), a[scale + 1]
            if z is not None:
                q = q - np.asarray(z, np.float64).reshape(len(q), 1, -1)
            return np.asarray(q * s.reshape(len(q), 1, -1)).transpose(0, 2, 1)

        r = weights(2, 10)
        x = small(np.asarray(a[0], np.float32))
        node = Node("LSTM", node.inputs[:8], node.outputs, {**node.attrs, "hidden_size": h}, node.name)
        return [v.astype(np.float32) for v in _Rounded("LSTM").reference(node, x, weights(1, 8), r, *a[3:8])]


def small(x: Array) -> Array:
    """``x`` as it is after quantization to u8 over its range, in f64."""
    s, z = dynamic_parameters_ref(x.astype(np.float32))
    return np.asarray((saturate_ref(x.astype(np.float32) / s, np.asarray(z), u8).astype(np.float64) - float(z)) * np.float64(s))


class _Rounded(LSTM):
    """numpy's LSTM whose hidden state is rounded in front of its product."""

    def __init__(self, name: str) -> None:
        self.name = name

    def hidden(self, node: Node) -> int:
        return int(node.attrs["hidden_size"])

    def numpy_step(self, node: Node, xw: Array, state: list[Array], r: Array, bias: Array, peep: Array | None, act: Any, h: int) -> list[Array]:
        return super().numpy_step(node, xw, [np.stack([small(row) for row in state[0]]), state[1]], r, bias, peep, act, h)
