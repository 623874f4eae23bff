"""com.microsoft ``MoE`` and ``QMoE``: top-k routing over experts, of which only the chosen ones are computed. Defined by basic operators,
``luthier::ExpertMatMul`` (integers) and ``luthier::ExpertProduct`` (floats). Source: the operators' schemas in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.dtypes import f32, index
from luthier.ir.expr import Expr, bcast, cast, const, load, maximum, minimum, ramp, var, vreduce
from luthier.ir.graph import Node, TensorType, Value
from luthier.ir.loop import Alloc, Buffer, Let, Stmt, Store, block
from luthier.ir.op import Kernel, Op, op
from luthier.ir.ops.common import Array, must, need, shape_error, static, type_error, unsupported
from luthier.ir.ops.experts import pack_experts
from luthier.ir.ops.kernels import flat, for_, kernel, put
from luthier.ir.ops.transformer import Composite, Steps

LANES = 8


def _weights(node: Node, i: int, what: str) -> Array:
    v = need(node, i)
    if v.data is None:
        raise unsupported(node, f"{what} must be a constant")
    return np.asarray(v.data)


def unpack_stream(raw: Array, bits: int, columns: int) -> Array:
    """u8 [.., columns] from rows of bytes whose lowest bits come first."""
    stream = np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little")[..., : columns * bits]
    fields = stream.reshape(*raw.shape[:-1], columns, bits)
    return np.asarray((fields << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8))


def _interleaved(a: Array) -> Array:
    """Rows (axis 1) g0, l0, g1, l1 .. as g0, g1, .., l0, l1, .."""
    return np.ascontiguousarray(np.concatenate([a[:, 0::2], a[:, 1::2]], 1))


class _Experts(Composite):
    """What the float and the integer form share. Inputs: ``places`` of the three matrices' biases."""

    biases: tuple[int, int, int]

    def infer(self, node: Node) -> Sequence[TensorType]:
        x, r = need(node, 0), need(node, 1)
        if x.rank not in (2, 3) or r.rank != 2 or not x.dtype.is_float:
            raise shape_error(node, "takes floats [tokens, hidden] or [batch, sequence, hidden] and scores [tokens, experts]")
        return [x.type]

    def route(self, node: Node, s: Steps, scores: Value, k: int) -> tuple[Value, Value]:
        """(numbers of the experts [T, k], their shares [T, k])."""
        raise NotImplementedError

    def product(self, node: Node, s: Steps, x: Value, chosen: Value, which: int, columns: int, interleaved: bool) -> Value:
        """[T, k, rows] of matrix ``which`` (0: fc1, 1: fc2, 2: fc3)."""
        raise NotImplementedError

    def has(self, node: Node, which: int) -> bool:
        raise NotImplementedError

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        x = need(node, 0)
        a = node.attrs
        kind = a.get("activation_type", "relu")
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        fusion, k = int(a.get("swiglu_fusion", 0)), int(a.get("k", 1))
        if int(a.get("use_sparse_mixer", 0)) or int(a.get("swiglu_limit_after_activation", 0)):
            raise unsupported(node, "use_sparse_mixer and swiglu_limit_after_activation are not supported")
        if kind not in ("relu", "gelu", "silu", "swiglu", "identity"):
            raise unsupported(node, f"the activation {kind!r}", hint="known: relu, gelu, silu, swiglu, identity")
        if kind == "swiglu" and not fusion and not self.has(node, 2):
            raise unsupported(node, "swiglu needs fc3, or swiglu_fusion 1 or 2")
        fused = kind == "swiglu" and fusion > 0
        hidden = static(node, x.shape[-1], "the hidden size")
        rows = s.cast(s("Reshape", x, s.const([-1, hidden])), _f32())
        chosen, share = self.route(node, s, s.cast(need(node, 1), _f32()), k)

        def layer(v: Value, which: int, columns: int) -> Value:
            inter = fused and fusion == 1 and which == 0
            y = self.product(node, s, v, chosen, which, columns, inter)
            at = self.biases[which]
            if node.input(at) is None:
                return y
            b = _weights(node, at, "a bias").astype(np.float32)
            return s("Add", y, s("Gather", s.const(_interleaved(b[..., None])[..., 0] if inter else b, np.float32), chosen, axis=0))  # type: ignore[no-any-return]

        y = layer(rows, 0, hidden)
        size = static(node, y.shape[2], "the experts' hidden size")
        if fused:
            if size % 2:
                raise shape_error(node, f"{size} rows of fc1 are no pairs")
            size //= 2
            g, up = (s("Slice", y, s.const([lo]), s.const([lo + size]), s.const([2])) for lo in (0, size))
        else:
            g, up = y, layer(rows, 2, hidden) if self.has(node, 2) else None
        h = self.activate(s, kind, g, up, a)
        out = s("ReduceSum", s("Mul", layer(h, 1, size), s("Unsqueeze", share, s.const([2]))), s.const([1]), keepdims=0)
        out = s.cast(out, x)
        return [out if x.rank == 2 else s("Reshape", out, s("Shape", x))]

    def activate(self, s: Steps, kind: str, g: Value, up: Value | None, a: dict[str, Any]) -> Value:
        def number(x: float) -> Value:
            return s.const(x, np.float32)

        if kind == "swiglu":
            assert up is not None
            limit = float(a.get("swiglu_limit", np.inf))
            if np.isfinite(limit):
                g = s("Min", g, number(limit))
                up = s("Min", s("Max", up, number(-limit)), number(limit))
            alpha, beta = float(a.get("activation_alpha", 1.0)), float(a.get("activation_beta", 0.0))
            gate = s("Mul", g, s("Sigmoid", g if alpha == 1 else s("Mul", g, number(alpha))))
            return s("Mul", gate, up if beta == 0 else s("Add", up, number(beta)))  # type: ignore[no-any-return]
        if kind == "relu":
            g = s("Relu", g)
        elif kind == "silu":
            g = s("Mul", g, s("Sigmoid", g))
        elif kind == "gelu":
            g = s("Gelu", g, approximate="tanh")
        return g if up is None else s("Mul", g, up)  # type: ignore[no-any-return]


def _f32() -> Value:
    return Value("", TensorType(f32, ()))


@op("com.microsoft::MoE")
class MixtureOfExperts(_Experts):
    """(input, router_probs, fc1 [E, N, H], fc1_bias, fc2 [E, H, I], fc2_bias, fc3, fc3_bias) -> like input. Shares: the softmax over all
    experts, divided by the sum of the chosen ones with ``normalize_routing_weights``."""

    biases = (3, 5, 7)
    matrices = (2, 4, 6)

    def has(self, node: Node, which: int) -> bool:
        return node.input(self.matrices[which]) is not None

    def route(self, node: Node, s: Steps, scores: Value, k: int) -> tuple[Value, Value]:
        share, chosen = s("TopK", s("Softmax", scores, axis=-1), s.const([k]), outputs=2, axis=-1, largest=1, sorted=1)
        if int(node.attrs.get("normalize_routing_weights", 0)):
            share = s("Div", share, s("ReduceSum", share, s.const([1]), keepdims=1))
        return chosen, share

    def product(self, node: Node, s: Steps, x: Value, chosen: Value, which: int, columns: int, interleaved: bool) -> Value:
        w = need(node, self.matrices[which])
        if w.rank != 3 or w.shape[2].op == "const" and w.shape[2].attr != columns:
            raise shape_error(node, f"experts must be [experts, rows, {columns}]")
        if interleaved:
            w = s.const(_interleaved(_weights(node, self.matrices[which], "interleaved weights")), w.dtype.numpy)
        return s("luthier::ExpertProduct", x, chosen, w)  # type: ignore[no-any-return]


@op("com.microsoft::QMoE")
class QuantizedMixtureOfExperts(_Experts):
    """(input, router_probs, fc1 u8 [E, N, H bits / 8], fc1_scales [E, N] or [E, N, H / block], fc1_bias, fc2 .., fc3 .., zero points of the
    three, router_weights) -> like input, for ``quant_type`` int of 2, 3, 4 or 8 bits in rows of bytes, lowest bits first. 4 and 8 bits
    stay as they are, 2 and 3 take four. Shares: the softmax over the scores of the chosen experts, or the values of ``router_weights``."""

    biases = (4, 7, 10)
    matrices = (2, 5, 8)

    def has(self, node: Node, which: int) -> bool:
        return node.input(self.matrices[which]) is not None

    def route(self, node: Node, s: Steps, scores: Value, k: int) -> tuple[Value, Value]:
        top, chosen = s("TopK", scores, s.const([k]), outputs=2, axis=-1, largest=1, sorted=1)
        given = node.input(14)
        if given is None:
            return chosen, s("Softmax", top, axis=-1)
        share = s("GatherElements", s.cast(given, _f32()), chosen, axis=1)
        if int(node.attrs.get("normalize_routing_weights", 0)):
            share = s("Div", share, s("ReduceSum", share, s.const([1]), keepdims=1))
        return chosen, share

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        kind = node.attrs.get("quant_type", "int")
        if kind not in ("int", b"int"):
            raise unsupported(node, f"experts quantized as {kind!r}", hint="quant_type int is supported")
        if int(node.attrs.get("weights_prepacked", -1)) == 1:
            raise unsupported(node, "weights packed for one execution provider", hint="export with weights_prepacked=0")
        return super().legalize(node, s)

    def product(self, node: Node, s: Steps, x: Value, chosen: Value, which: int, columns: int, interleaved: bool) -> Value:
        at = self.matrices[which]
        bits = int(node.attrs.get(f"fc{which + 1}_expert_weight_bits", node.attrs.get("expert_weight_bits", 4)))
        raw, scales = _weights(node, at, "experts"), _weights(node, at + 1, "scales")
        if bits not in (2, 3, 4, 8):
            raise unsupported(node, f"experts of {bits} bits")
        if raw.ndim != 3 or raw.dtype != np.uint8 or raw.shape[2] != -(-columns * bits // 8):
            raise shape_error(node, f"experts of {columns} columns of {bits} bits take bytes [experts, rows, {-(-columns * bits // 8)}], not {list(raw.shape)}")
        experts, rows, _ = raw.shape
        block_size = int(node.attrs.get("block_size", 0))
        group = block_size if block_size > 0 else columns
        want = (experts, rows, columns // group) if block_size > 0 else (experts, rows)
        if columns % group or scales.shape != want:
            raise shape_error(node, f"scales must be {list(want)}, not {list(scales.shape)}")
        if group % 16:
            raise unsupported(node, f"groups of {group} columns", hint="groups of a multiple of 16 are supported")
        q = unpack_stream(raw, bits, columns)
        scales = scales.reshape(experts, rows, -1)
        more = []
        points = node.input(11 + which)
        if points is not None:
            z = _weights(node, 11 + which, "zero points")
            z = unpack_stream(z, bits, scales.shape[2]) if block_size > 0 else unpack_stream(z, bits, rows)[..., None]
            more.append((-z.astype(np.float32) * scales.astype(np.float32)).astype(np.float32))
        if interleaved:
            q, scales, *more = (_interleaved(v) for v in (q, scales, *more))
        stored = 8 if bits == 8 else 4
        ins = [s.const(pack_experts(q, stored), np.uint8), s.const(scales, scales.dtype), *(s.const(m, np.float32) for m in more)]
        return s("luthier::ExpertMatMul", x, chosen, *ins, bits=stored, group=group, zero=1 << (bits - 1))  # type: ignore[no-any-return]


@op("luthier::ExpertProduct")
class ExpertProduct(Op):
    """(x f32 [S, K] or [S, T, K], chosen i64 [S, T], experts [E, N, K] of floats) -> f32 [S, T, N]: ``x[s(, t)] @ experts[chosen[s, t]].T``; no
    other expert is read. Sums in f32. A number outside of 0 .. E - 1 counts as the nearest one. Raises ShapeError, TypeMismatch."""

    def geometry(self, node: Node) -> tuple[int, int, int, int]:
        """(experts, N, K, T)."""
        x, ids, w = (need(node, i) for i in range(3))
        if x.rank not in (2, 3) or ids.rank != 2 or w.rank != 3:
            raise shape_error(node, "takes x [S, K] or [S, T, K], numbers [S, T] and experts [E, N, K]")
        if x.dtype is not f32 or not w.dtype.is_float:
            raise type_error(node, "x must be f32 and experts floats")
        e, n, k = (static(node, v, "extents of experts") for v in w.shape)
        if x.shape[-1].op == "const" and x.shape[-1].attr != k:
            raise shape_error(node, f"the last extent of x must be {k}")
        return e, n, k, static(node, ids.shape[1], "chosen experts")

    def infer(self, node: Node) -> Sequence[TensorType]:
        _, n, _, t = self.geometry(node)
        return [TensorType(f32, (need(node, 1).shape[0], const(t), const(n)))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Kernel:
        experts, n, k, t = self.geometry(node)
        each = need(node, 0).rank == 3
        x, ids, w, out = *(flat(must(ins, i)) for i in range(3)), flat(outs[0])
        rows, lane, wide = must(ins, 1).shape[0], f32.vec(LANES), k - k % LANES

        def choice(r: Expr) -> Stmt:
            e = var("expert", lo=0, hi=experts - 1)
            number = maximum(minimum(cast(load(ids, [r]), index), const(experts - 1)), const(0))
            row = (r if each else r // t) * k

            def line(i: Expr) -> Stmt:
                acc, tail = Buffer("acc", lane, (), "local"), Buffer("tail", f32, (), "local")
                first = (e * n + i) * k

                def vector(c: Expr) -> Stmt:
                    a, b = (load(v, [ramp(base + c * LANES, 1, LANES)]) for v, base in ((x, row), (w, first)))
                    return Store(acc, (), load(acc, ()) + a * cast(b, lane))

                def single(c: Expr) -> Stmt:
                    return Store(tail, (), load(tail, ()) + load(x, [row + wide + c]) * cast(load(w, [first + wide + c]), f32))

                body = block(
                    Store(acc, (), bcast(const(0.0, f32), LANES)), Store(tail, (), const(0.0, f32)),
                    *([for_("c", wide // LANES, vector)] if wide else []), *([for_("d", k - wide, single)] if wide < k else []),
                    put(out, r * n + i, vreduce("add", load(acc, ())) + load(tail, ())),
                )  # fmt: skip
                return Alloc(acc, Alloc(tail, body))

            return block(Let(e, number), for_("i", n, line))

        return kernel(node, ins, outs, (), for_("r", rows * t, choice, kind="parallel"))

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        x, ids, w = (np.asarray(a) for a in arrays)
        picked = w.astype(np.float64)[np.clip(ids, 0, len(w) - 1)]
        return [np.einsum("stnk,stk->stn" if x.ndim == 3 else "stnk,sk->stn", picked, x.astype(np.float64)).astype(np.float32)]
