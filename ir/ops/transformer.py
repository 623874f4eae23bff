"""com.microsoft operators of exported transformers, written with basic operators: Attention, MultiHeadAttention, GroupQueryAttention,
EmbedLayerNormalization. ``legalize_operators`` puts the basic operators in their place before anything else looks at the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.ir.builder import Names, make_node, operator
from luthier.ir.dtypes import f32, i32
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.loop import Buffer
from luthier.ir.op import Op, op
from luthier.ir.ops.common import ELEMENT_TYPES, Array, is_one, need, shape_error, unsupported

_CODE = {d.name: k for k, d in ELEMENT_TYPES.items()}


class Steps:
    """Adds basic nodes: ``s("MatMul", x, w)`` is the value of a new node."""

    def __init__(self, node: Node, names: Names) -> None:
        self.node, self.names = node, names
        self.nodes: list[Node] = []

    def __call__(self, op_name: str, *inputs: Value | None, outputs: int = 1, **attrs: Any) -> Any:
        n = make_node(op_name, list(inputs), attrs, names=self.names, name=self.node.name, outputs=outputs, source=self.node.source)
        o = operator(n)
        if isinstance(o, Composite):
            values = list(o.legalize(n, self))
            return values[0] if outputs == 1 else tuple(values)
        self.nodes.append(n)
        return n.outputs[0] if outputs == 1 else n.outputs

    def const(self, data: Any, dtype: Any = np.int64) -> Value:
        return Value.const(self.names.fresh(f"{self.node.name}.const"), np.asarray(data, dtype))

    def scalar(self, x: float, like: Value) -> Value:
        return self.const(x, like.dtype.numpy)

    def cast(self, v: Value, like: Value) -> Value:
        return v if v.dtype is like.dtype else self("Cast", v, to=_CODE[like.dtype.name])

    def extent(self, v: Value, axis: int) -> Value:
        """One extent of ``v`` as a vector of one i64."""
        return self("Slice", self("Shape", v), self.const([axis]), self.const([axis + 1]))

    def heads(self, v: Value, n: int) -> Value:
        """[B, S, n * d] to [B, n, S, d]."""
        return self("Transpose", self("Reshape", v, self.const([0, 0, n, -1])), perm=(0, 2, 1, 3))

    def attend(self, q: Value, k: Value, v: Value, scale: float, *biases: Value | None) -> Value:
        """softmax(scale q k^T + biases) v of [B, n, S, d] operands, as [B, S, n * d]."""
        scores = self("Mul", self("MatMul", q, self("Transpose", k, perm=(0, 1, 3, 2))), self.scalar(scale, q))
        for b in biases:
            if b is not None:
                scores = self("Add", scores, self.cast(b, q))
        out = self("MatMul", self("Softmax", scores, axis=-1), v)
        return self("Reshape", self("Transpose", out, perm=(0, 2, 1, 3)), self.const([0, 0, -1]))

    def causal(self, q: Value, k: Value, value: float) -> Value:
        """[S, T] of 0, and ``value`` where the key comes after the query (queries are the last S of T)."""
        s, t = self.extent(q, 2), self.extent(k, 2)
        zero, one = self.const(0), self.const(1)
        rows = self("Range", zero, self("Squeeze", s, self.const([0])), one)
        cols = self("Range", zero, self("Squeeze", t, self.const([0])), one)
        rows = self("Add", rows, self("Squeeze", self("Sub", t, s), self.const([0])))
        ahead = self("Greater", self("Unsqueeze", cols, self.const([0])), self("Unsqueeze", rows, self.const([1])))
        return self("Where", ahead, self.scalar(value, q), self.scalar(0.0, q))

    def blocked(self, keep: Value, q: Value, value: float) -> Value:
        """0 where ``keep`` (integer) is 1, ``value`` where it is 0."""
        return self("Where", self("Equal", keep, self.const(0, keep.dtype.numpy)), self.scalar(value, q), self.scalar(0.0, q))


class Composite(Op):
    """An operator defined by basic ones."""

    composite = True

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        """Add the nodes to ``s``; the values of the outputs."""
        raise NotImplementedError

    def infer(self, node: Node) -> Sequence[TensorType]:
        return [v.type for v in self.legalize(node, Steps(node, Names()))]

    def compute(self, node: Node, ins: Sequence[Buffer | None], outs: Sequence[Buffer]) -> Graph:
        s = Steps(node, Names())
        values = list(self.legalize(node, s))[: len(node.outputs)]
        inputs = [v if v is not None else Value("_", TensorType(f32, ())) for v in node.inputs]
        return Graph(node.name, inputs, values, s.nodes)

    def reference(self, node: Node, *arrays: Any) -> Sequence[Array]:
        from luthier.ir.interpret.evaluate import evaluate_graph

        g = self.compute(node, (), ())
        feeds = {v.name: np.asarray(a) for v, a in zip(node.inputs, arrays, strict=False) if v is not None and a is not None}
        g.inputs = [v for v in g.inputs if v.name in feeds]
        return list(evaluate_graph(g, feeds)[0].values())


@op("com.microsoft::Attention")
class Attention(Composite):
    """(input [B, S, D], weights [D, 3 H], bias [3 H], mask_index, past [2, B, n, P, d], attention_bias): self-attention with its
    projection. ``mask_index``: [B] key counts, [B, T] or [B, S, T] of 0 and 1. Outputs (output, present)."""

    places = {"mask": 3, "past": 4, "bias": 5}  # where inputs stand

    def optional(self, node: Node, what: str) -> Value | None:
        return node.input(self.places[what]) if what in self.places else None

    def project(self, node: Node, s: Steps) -> Value:
        """Queries, keys and values side by side."""
        y = s("MatMul", need(node, 0), need(node, 1))
        bias = node.input(2)
        return y if bias is None else s("Add", y, bias)

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        w = need(node, 1)
        n = int(node.attrs["num_heads"])
        if node.attrs.get("do_rotary", 0) or node.attrs.get("past_present_share_buffer", 0):
            raise unsupported(node, "do_rotary and past_present_share_buffer are not supported")
        if w.shape[1].op != "const":
            raise shape_error(node, "the extent of the weights must be a constant")
        sizes = [int(v) for v in node.attrs.get("qkv_hidden_sizes") or [w.shape[1].attr // 3] * 3]
        q, k, v = (s.heads(p, n) for p in s("Split", self.project(node, s), s.const(sizes), outputs=3, axis=-1))
        past = self.optional(node, "past")
        if past is not None:
            pk, pv = s("Split", past, s.const([1, 1]), outputs=2, axis=0)
            k, v = (s("Concat", s("Squeeze", p, s.const([0])), new, axis=2) for p, new in ((pk, k), (pv, v)))
        low = float(node.attrs.get("mask_filter_value", -10000.0))
        mask = self.optional(node, "mask")
        keep = None if mask is None else self.mask(node, s, mask, k, q, low)
        causal = s.causal(q, k, low) if int(node.attrs.get("unidirectional", 0)) else None
        scale = float(node.attrs.get("scale", 0.0)) or 1 / math.sqrt(sizes[0] // n)
        out = s.attend(q, k, v, scale, keep, causal, self.optional(node, "bias"))
        if len(node.outputs) < 2:
            return [out]
        return [out, s("Concat", *(s("Unsqueeze", p, s.const([0])) for p in (k, v)), axis=0)]

    def mask(self, node: Node, s: Steps, mask: Value, k: Value, q: Value, low: float) -> Value:
        if mask.rank == 1:  # the number of valid keys of each batch
            cols = s("Range", s.const(0), s("Squeeze", s.extent(k, 2), s.const([0])), s.const(1))
            inside = s("Less", s("Cast", cols, to=_CODE["i32"]), s("Unsqueeze", s.cast(mask, Value("", TensorType(i32, ()))), s.const([1])))
            out = s("Where", inside, s.scalar(0.0, q), s.scalar(low, q))
            return s("Unsqueeze", out, s.const([1, 2]))
        if mask.rank == 2:
            return s("Unsqueeze", s.blocked(mask, q, low), s.const([1, 2]))
        if mask.rank == 3:
            return s("Unsqueeze", s.blocked(mask, q, low), s.const([1]))
        raise unsupported(node, f"a mask_index of rank {mask.rank}")


@op("com.microsoft::MultiHeadAttention")
class MultiHeadAttention(Composite):
    """(query [B, S, D], key [B, T, D], value [B, T, E], bias, key_padding_mask [B] or [B, T], attention_bias, past_key, past_value
    [B, n, P, d]); key and value may come as [B, n, T, d]. Outputs (output, present_key, present_value)."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        q, k, v, bias = need(node, 0), node.input(1), node.input(2), node.input(3)
        n = int(node.attrs["num_heads"])
        if q.rank != 3 or k is None or v is None:
            raise unsupported(node, "packed query, key and value are not supported")
        if any(node.input(i) is not None for i in (8, 9)):
            raise unsupported(node, "past_sequence_length and cache_indirection are not supported")
        if bias is not None:
            d, e = q.shape[2], v.shape[2] if v.rank == 3 else v.shape[1] * v.shape[3]
            if d.op != "const" or e.op != "const":
                raise shape_error(node, "the hidden size must be a constant")
            bq, bk, bv = s("Split", bias, s.const([d.attr, d.attr, e.attr]), outputs=3, axis=0)
            q = s("Add", q, bq)
            k, v = (s("Add", x, b) if x.rank == 3 else x for x, b in ((k, bk), (v, bv)))
        q = s.heads(q, n)
        k, v = (s.heads(x, n) if x.rank == 3 else x for x in (k, v))
        pk, pv = node.input(6), node.input(7)
        if pk is not None and pv is not None:
            k, v = s("Concat", pk, k, axis=2), s("Concat", pv, v, axis=2)
        low = float(node.attrs.get("mask_filter_value", -10000.0))
        mask = node.input(4)
        keep = None if mask is None else Attention().mask(node, s, mask, k, q, low)
        causal = s.causal(q, k, low) if int(node.attrs.get("unidirectional", 0)) else None
        width = q.shape[3]
        if width.op != "const":
            raise shape_error(node, "the head size must be a constant")
        scale = float(node.attrs.get("scale", 0.0)) or 1 / math.sqrt(width.attr)
        out = s.attend(q, k, v, scale, keep, causal, node.input(5))
        return [out, k, v][: max(len(node.outputs), 1)]


@op("com.microsoft::EmbedLayerNormalization")
class EmbedLayerNormalization(Composite):
    """(input_ids [B, S], segment_ids, word, position, segment embeddings, gamma, beta, mask, position_ids) to (output [B, S, D],
    mask_index [B] i32, embedding_sum)."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        ids, segments, word, position, segment, gamma, beta = (node.input(i) for i in range(7))
        if ids is None or word is None or position is None or gamma is None or beta is None:
            raise shape_error(node, "input_ids, word and position embeddings, gamma and beta are needed")
        total = s("Gather", word, ids, axis=0)
        places = node.input(8)
        if places is not None:
            total = s("Add", total, s("Gather", position, places, axis=0))
        else:
            total = s("Add", total, s("Slice", position, s.const([0]), s.extent(ids, 1), s.const([0])))
        if segment is not None and segments is not None:
            total = s("Add", total, s("Gather", segment, segments, axis=0))
        out = [s("LayerNormalization", total, gamma, beta, axis=-1, epsilon=float(node.attrs.get("epsilon", 1e-12)))]
        mask = node.input(7)
        if len(node.outputs) > 1:
            if mask is not None:
                out.append(s("ReduceSum", mask, s.const([1]), keepdims=0))
            else:
                zeros = s("ConstantOfShape", s.extent(ids, 0), value=np.zeros(1, np.int32))
                out.append(zeros)
        return [*out, total][: max(len(node.outputs), 1)]


@op("com.microsoft::GroupQueryAttention")
class GroupQueryAttention(Composite):
    """(query, key, value, past_key [B, k, P, d], past_value, seqlens_k [B], total_sequence_length, cos_cache, sin_cache): causal
    attention of ``num_heads`` queries over ``kv_num_heads`` keys, rotary embedding if ``do_rotary``. Without key and value the query
    holds all three. The cache holds exactly the P earlier tokens of every sequence. Then may come position_ids [B, S], attention_bias and
    head_sink [num_heads], a score without a value; ``smooth_softmax`` is a sink of 0. Outputs (output, present_key, present_value)."""

    def legalize(self, node: Node, s: Steps) -> Sequence[Value]:
        n, m = int(node.attrs["num_heads"]), int(node.attrs["kv_num_heads"])
        q, k, v = need(node, 0), node.input(1), node.input(2)
        if any(node.input(i) is not None for i in range(12, len(node.inputs))):
            raise unsupported(node, "quantized caches, norms of queries and keys, and packed sequences are not supported")
        if int(node.attrs.get("qk_output", 0)) or len(node.outputs) > 3:
            raise unsupported(node, "output_qk is not supported")
        width = q.shape[2]
        if width.op != "const":
            raise shape_error(node, "the hidden size must be a constant")
        d = width.attr // (n if k is not None else n + 2 * m)
        if k is None or v is None:
            q, k, v = s("Split", q, s.const([n * d, m * d, m * d]), outputs=3, axis=-1)
        q, k, v = s.heads(q, n), s.heads(k, m), s.heads(v, m)
        length = s.extent(q, 2)
        first = s("Sub", s("Add", s("Cast", need(node, 5), to=_CODE["i64"]), s.const([1])), length)
        steps = s("Range", s.const(0), s("Squeeze", length, s.const([0])), s.const(1))
        at = s("Add", s("Reshape", first, s.const([-1, 1])), s("Unsqueeze", steps, s.const([0])))  # [B, S] positions
        if int(node.attrs.get("do_rotary", 0)):
            turn = {"interleaved": int(node.attrs.get("rotary_interleaved", 0))}
            turned = at if node.input(9) is None else node.input(9)
            q, k = (s("com.microsoft::RotaryEmbedding", x, turned, need(node, 7), need(node, 8), **turn) for x in (q, k))
        if node.input(3) is not None and node.input(4) is not None:
            k, v = s("Concat", node.input(3), k, axis=2), s("Concat", node.input(4), v, axis=2)
        scale = float(node.attrs.get("scale", 0.0)) or 1 / math.sqrt(d)
        groups = s("Reshape", q, s.const([0, m, n // m, -1, d]))
        keys = s("Unsqueeze", s("Transpose", k, perm=(0, 1, 3, 2)), s.const([2]))
        scores = s("Mul", s("MatMul", groups, keys), s.scalar(scale, q))
        cap = float(node.attrs.get("softcap", 0.0))
        if cap > 0:
            scores = s("Mul", s("Tanh", s("Div", scores, s.scalar(cap, q))), s.scalar(cap, q))
        cols = s("Range", s.const(0), s("Squeeze", s.extent(k, 2), s.const([0])), s.const(1))
        rows = s("Unsqueeze", at, s.const([1, 2, 4]))
        hidden = s("Greater", cols, rows)
        window = int(node.attrs.get("local_window_size", -1))
        if window > 0:
            hidden = s("Or", hidden, s("LessOrEqual", cols, s("Sub", rows, s.const([window]))))
        bias = node.input(10)
        if bias is not None:  # [B or 1, n or 1, S, T]
            split = s("Unsqueeze", s.cast(bias, q), s.const([2]))
            scores = s("Add", scores, split if is_one(bias.shape[1]) else s("Reshape", split, s.const([0, m, n // m, 0, 0])))
        low = s("Where", hidden, s.scalar(-math.inf, q), s.scalar(0.0, q))
        scores = s("Add", scores, low)
        sink = node.input(11)
        if sink is None and int(node.attrs.get("smooth_softmax", 0)) > 0:
            sink = s.const(np.zeros(n), q.dtype.numpy)
        if sink is None:
            p = s("Softmax", scores, axis=-1)
        else:
            sink = s("Reshape", sink, s.const([1, m, n // m, 1, 1]))
            top = s("Max", s("ReduceMax", scores, s.const([-1]), keepdims=1), sink)
            e = s("Exp", s("Sub", scores, top))
            p = s("Div", e, s("Add", s("ReduceSum", e, s.const([-1]), keepdims=1), s("Exp", s("Sub", sink, top))))
        out = s("Reshape", s("MatMul", p, s("Unsqueeze", v, s.const([2]))), s.const([0, n, -1, d]))
        out = s("Reshape", s("Transpose", out, perm=(0, 2, 1, 3)), s.const([0, 0, n * d]))
        return [out, k, v][: max(len(node.outputs), 1)]
