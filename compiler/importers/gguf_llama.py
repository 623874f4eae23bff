"""The Llama architecture of a GGUF file, and those that differ from it by little (:mod:`luthier.importers.gguf.architectures`), as a graph: one function for prompts and for single steps, over a cache that the caller keeps.

Inputs: ``cache.N`` f16 [2, kv_heads, capacity, head] of every layer (or i8, then all ``cache.N.scale`` f32 [2, kv_heads, capacity]), which are
changed in place and come first, ``tokens`` i64 [S], ``pos``
i64 [1] (position of the first of them) and ``last`` i64 [1] (the row whose logits are wanted). Output: ``logits`` f32 [1, vocabulary] (or [S, vocabulary]).

Weights stay in the bits of the file; their scales are kept in half precision (those of the K forms are products of two stored
numbers and are rounded to it). Rows of queries and keys are re-ordered once so that rotation works on halves of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luthier.errors import InvalidModel
from luthier.importers.builder import GraphBuilder
from luthier.importers.gguf.architectures import architecture, check_tensors
from luthier.importers.gguf.blocks import BLOCKS, Grouped
from luthier.importers.gguf.file import GGUF, Tensor
from luthier.importers.gguf.metadata import full_name
from luthier.importers.gguf.requantize import Requantize, permute_rows, stack_blocks
from luthier.importers.gguf.rope_scaling import rope_angles
from luthier.ir.dtypes import f16, f32, i8, i64
from luthier.ir.expr import var
from luthier.ir.graph import Graph, Value
from luthier.ir.ops.experts import pack_experts
from luthier.ir.ops.lowbit import pack_bits
from luthier.ir.ops.lowbit_matmul import pack_trits
from luthier.ir.ops.sparse_matmul import MAX_LEVELS, BlockSparse

Array = np.ndarray[Any, Any]
Weight = Grouped | BlockSparse | Array


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Extents of a model; ``head``: size of one head; ``window``: positions that attention looks back (0: all); ``experts``: of a layer, of which
    ``chosen`` work on a token (0: none); ``hidden``: of the feed-forward net, or of an expert. ``heads``, ``kv_heads`` and ``hidden`` are the first
    layer's, :meth:`layer` has those of another (``each``). ``notes``: what the user should know of the file."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    context: int
    epsilon: float
    rope_base: float
    window: int = 0
    experts: int = 0
    chosen: int = 0
    arch: str = "llama"
    each: tuple[tuple[int, int, int], ...] = ()
    notes: tuple[str, ...] = ()

    def layer(self, i: int) -> LlamaConfig:
        """The same model with the extents of layer ``i``."""
        hidden, heads, kv_heads = self.each[i]
        return replace(self, hidden=hidden, heads=heads, kv_heads=kv_heads)


def config(g: GGUF) -> LlamaConfig:
    """Raises InvalidModel for another architecture, features that are not supported, wrong metadata, and metadata that the tensors contradict."""
    arch, form = architecture(g)
    g.check_metadata()
    layers, width = g.value("block_count"), g.value("embedding_length")
    notes = check_tensors(g, layers)

    def each(key: str) -> tuple[int, ...]:
        v = g.value(key)
        if isinstance(v, tuple) and len(v) != layers:
            raise InvalidModel(f"{g.path}: the metadata {full_name(g.metadata, key)!r} has {len(v)} values for {layers} layers")
        return v if isinstance(v, tuple) else (v,) * layers

    heads = each("attention.head_count")
    kv_heads = heads if g.value("attention.head_count_kv") is None else each("attention.head_count_kv")
    if any(n % k for n, k in zip(heads, kv_heads, strict=True)):
        raise InvalidModel(f"{g.path}: {max(heads)} heads of queries do not share {max(kv_heads)} heads of keys")
    head = g.value("attention.key_length") or width // heads[0]
    if head < 2 or head % 2:
        raise InvalidModel(f"{g.path} has heads of {head} numbers, which cannot be rotated in pairs")
    if g.value("rope.dimension_count") not in (None, head):
        raise InvalidModel(f"{g.path} rotates only a part of a head, which is not supported")
    if g.value("attention.value_length") not in (None, head):
        raise InvalidModel(f"{g.path} has values of another size than keys, which is not supported")
    experts, chosen = g.value("expert_count"), g.value("expert_used_count")
    if experts and not 1 <= chosen <= experts:
        raise InvalidModel(f"{g.path} has {experts} experts a layer of which {chosen} are used")
    hidden = each("feed_forward_length")
    if experts and g.value("expert_feed_forward_length"):
        hidden = (g.value("expert_feed_forward_length"),) * layers
    for i, (n, k) in enumerate(zip(heads, kv_heads, strict=True)):  # before anything is made by these numbers
        name, rows = ("attn_qkv", n + 2 * k) if form.joined else ("attn_k", k)
        g.tensor(f"blk.{i}.attn_output.weight", (width, n * head))
        g.tensor(f"blk.{i}.{name}.weight", (rows * head, width))
    emb = g.tensor("token_embd.weight")
    g.tensor("token_embd.weight", (emb.shape[0], width))
    return LlamaConfig(
        layers, width, hidden[0], heads[0], kv_heads[0], head, emb.shape[0], g.value("context_length"), g.value("attention.layer_norm_rms_epsilon"),
        g.value("rope.freq_base"), g.value("attention.sliding_window"), experts, chosen, arch, tuple(zip(hidden, heads, kv_heads, strict=True)), tuple(notes),
    )  # fmt: skip


def halves(q: Array, heads: int, head: int) -> Array:
    """Rows of a projection from neighbouring pairs to halves of every head."""
    return np.ascontiguousarray(q.reshape(heads, head // 2, 2, -1).swapaxes(1, 2).reshape(q.shape))


def map_rows(w: Grouped | BlockSparse, fn: Any) -> Grouped | BlockSparse:
    if isinstance(w, BlockSparse):
        return permute_rows(w, fn(np.arange(w.rows)[:, None])[:, 0])
    return replace(w, q=fn(w.q), scale=fn(w.scale), offset=None if w.offset is None else fn(w.offset), zeros=None if w.zeros is None else fn(w.zeros))


def stack(parts: list[Grouped]) -> Grouped | None:
    """Matrices one below the other; None when their forms differ."""
    a = parts[0]
    if any(_form(p) != _form(a) for p in parts):
        return None
    off, zeros = (None if getattr(a, k) is None else np.concatenate([getattr(p, k) for p in parts]) for k in ("offset", "zeros"))
    return replace(a, q=np.concatenate([p.q for p in parts]), scale=np.concatenate([p.scale for p in parts]), offset=off, zeros=zeros)


def _form(w: Grouped) -> tuple[Any, ...]:
    return w.bits, w.group, w.zero, w.offset is None, w.q.dtype, None if w.zeros is None else w.zeros.dtype


def round_to_bytes(w: Array) -> Grouped:
    """Floats [rows, columns] to 8 bits in groups of 32."""
    g = w.reshape(len(w), -1, 32)
    scale = (np.abs(g).max(-1) / 127).astype(np.float16).astype(np.float32)
    q = np.clip(np.round(g / np.where(scale == 0, 1, scale)[..., None]), -127, 127).astype(np.int8)
    return Grouped(q.reshape(w.shape), 8, 32, scale)


class _Llama:
    def __init__(self, g: GGUF, capacity: int, exact: bool, all_logits: bool, cache_bits: int, requantize: Requantize | None = None) -> None:
        self.requantize = requantize
        self.g, self.c, self.capacity, self.exact, self.all_logits, self.cache_bits = g, config(g), capacity, exact, all_logits, cache_bits
        self.arch = architecture(g)[1]
        self.b = GraphBuilder(self.c.arch)

    def product(self, x: Value, parts: list[Weight], name: str) -> list[Value]:
        """``x`` times each matrix's transpose: one product where the matrices have one form, then slices."""
        blocks = [p for p in parts if isinstance(p, BlockSparse)]
        joined = stack_blocks(blocks) if len(blocks) == len(parts) else None
        if joined is not None or (blocks and len(parts) == 1):
            return [self.sparse(x, joined or blocks[0], name)]
        if blocks:
            return [self.product(x, [p], f"{name}.{i}")[0] for i, p in enumerate(parts)]
        grouped = [p for p in parts if isinstance(p, Grouped)]
        whole = stack(grouped) if len(grouped) == len(parts) else None
        if whole is None and all(not isinstance(p, Grouped) for p in parts):
            y = self.b.op("MatMul", x, self.b.const(name, np.ascontiguousarray(np.concatenate(parts).T)), name=f"{name}.product")  # type: ignore[arg-type]
        elif whole is not None:
            y = self.grouped(x, whole, name)
        else:
            return [self.product(x, [p], f"{name}.{i}")[0] for i, p in enumerate(parts)]
        return [y]

    def grouped(self, x: Value, w: Grouped, name: str) -> Value:
        k = w.q.shape[1]
        act = 0 if self.exact or k % 32 else 16 if w.bits > 2 else 32  # smaller groups: fewer columns share an outlier's scale
        q, zero = w.q, w.zero
        if q.dtype == np.int8:
            q, zero = (q.astype(np.int16) + 128).astype(np.uint8), zero + 128
        raw = q if w.bits == 8 else pack_bits(q, w.bits) if w.bits else pack_trits(q)
        b = self.b
        ins = [x, b.const(f"{name}.bits", raw), b.const(f"{name}.scale", w.scale.astype(np.float16))]
        attrs: dict[str, Any] = {"K": k, "bits": w.bits, "group": w.group, "act_group": act, "zero": zero}
        if w.offset is not None:
            ins.append(b.const(f"{name}.offset", w.offset.astype(np.float16)))
            attrs["offset"] = 1
        elif w.zeros is not None:
            ins.append(b.const(f"{name}.zeros", w.zeros))
        return b.op("luthier::GroupedMatMul", *ins, name=f"{name}.product", **attrs)

    def sparse(self, x: Value, w: BlockSparse, name: str) -> Value:
        parts = [None if a is None else self.b.const(f"{name}.{p}", a) for p, a in zip(("rows", "columns", "values", "scales", "zeros"), w.arrays(), strict=True)]
        return self.b.op("luthier::SparseMatMul", x, *parts, name=f"{name}.product", **w.attrs(0 if self.exact else MAX_LEVELS))

    def weight(self, name: str, rows: int, columns: int, heads: int = 0) -> Weight:
        t = self.g.tensor(name, (rows, columns))
        w: Any = None if self.requantize is None else self.requantize(name, t.numpy)
        if w is not None and (w.rows, w.columns) != (rows, columns):
            raise InvalidModel(f"weights of {w.rows} x {w.columns} were given for tensor {name!r} of {rows} x {columns}")
        if w is None:
            w = self.stored(name, rows, columns)
        if heads and self.arch.pairs:
            fn = lambda a: halves(a, heads, self.c.head)  # noqa: E731
            w = fn(w) if isinstance(w, np.ndarray) else map_rows(w, fn)
        return w  # type: ignore[no-any-return]

    def stored(self, name: str, rows: int, columns: int) -> Grouped | Array:
        """The file's weights."""
        t = self.g.tensor(name, (rows, columns))
        return t.grouped() if t.kind in BLOCKS else t.numpy()

    def norm(self, x: Value, name: str) -> Value:
        scale = self.g.tensor(name, (self.c.width,)).numpy()
        return self.b.op("RMSNormalization", x, self.b.const(name, scale), axis=-1, epsilon=self.c.epsilon, name=name)

    def embedding(self, t: Tensor, tokens: Value) -> Value:
        b, c = self.b, self.c
        if t.kind not in BLOCKS:
            rows = b.op("Gather", b.const("embedding", t.numpy().astype(np.float16 if t.kind == "F16" else np.float32)), tokens, axis=0)
            return b.op("Cast", rows, to=1) if t.kind == "F16" else rows
        w = t.grouped()
        if w.bits == 0 or w.q.dtype != np.int8:  # rows of values are picked, not streams of bits: a byte a value
            w = replace(w, q=(w.q.astype(np.int16) - (w.zero if w.offset is None else 0)).astype(np.int8), zero=0)
        groups = c.width // w.group
        shape = b.ints(-1, groups, w.group)
        q = b.op("Reshape", b.op("Cast", b.op("Gather", b.const("embedding", w.q), tokens, axis=0), to=1), shape)
        flat = b.ints(-1, groups, 1)

        def pick(name: str, a: Array) -> Value:
            return b.op("Reshape", b.op("Gather", b.const(name, a), tokens, axis=0), flat)

        y = b.op("Mul", q, pick("embedding.scale", w.scale))
        if w.offset is not None:
            y = b.op("Add", y, pick("embedding.offset", w.offset))
        return b.op("Reshape", y, b.ints(-1, c.width))

    def feed_forward(self, h: Value, p: str, hidden: int, kind: str = "") -> Value:
        b, c = self.b, self.c
        if self.arch.joined:
            parts = [self.weight(p + "ffn_up.weight", 2 * hidden, c.width)]
        else:
            parts = [self.weight(p + f"ffn_{n}{kind}.weight", hidden, c.width) for n in ("gate", "up")]
        made = self.product(h, parts, p + "gate_up" + kind)
        if len(made) == 1:
            made = [b.op("Slice", made[0], b.ints(lo), b.ints(lo + hidden), b.ints(1)) for lo in (0, hidden)]
        y = b.op("Mul", self.activation(made[0]), made[1])
        return self.product(y, [self.weight(p + f"ffn_down{kind}.weight", c.width, hidden)], p + "ffn_down" + kind)[0]

    def activation(self, x: Value) -> Value:
        return self.b.op("Gelu", x, approximate="tanh") if self.arch.gelu else self.b.op("Mul", x, self.b.op("Sigmoid", x))

    def experts(self, c: LlamaConfig, h: Value, p: str) -> Value:
        """The sum of the chosen experts' outputs, weighted by the softmax of their scores (alone, or among all); and of the shared expert, where
        there is one, times its gate."""
        b = self.b
        scores = self.product(h, [self.weight(p + "ffn_gate_inp.weight", c.experts, c.width)], p + "router")[0]
        if self.arch.share == "all":
            scores = b.op("Softmax", scores, axis=-1)
        top, chosen = b.ops("TopK", 2, scores, b.ints(c.chosen), axis=-1, largest=1, sorted=1, name=p + "choice")
        share = top if self.arch.share == "all" else b.op("Softmax", top, axis=-1)
        gate, up = (self.expert_product(h, chosen, p + f"ffn_{n}_exps.weight", c.hidden, c.width) for n in ("gate", "up"))
        y = b.op("Mul", self.activation(gate), up)
        y = self.expert_product(y, chosen, p + "ffn_down_exps.weight", c.width, c.hidden)
        y = b.op("ReduceSum", b.op("Mul", y, b.op("Unsqueeze", share, b.ints(-1))), b.ints(1), keepdims=0)
        if p + "ffn_up_shexp.weight" not in self.g.tensors:
            return y
        always = self.feed_forward(h, p, self.g.tensor(p + "ffn_up_shexp.weight").shape[0], "_shexp")
        if p + "ffn_gate_inp_shexp.weight" in self.g.tensors:
            w = self.g.tensor(p + "ffn_gate_inp_shexp.weight", (c.width,)).numpy()
            always = b.op("Mul", always, b.op("Sigmoid", b.op("MatMul", h, b.const(p + "shared_gate", w[:, None]))))
        return b.op("Add", y, always)

    def expert_product(self, x: Value, chosen: Value, name: str, rows: int, columns: int) -> Value:
        """4-bit experts keep their bits, others take a byte a weight; floats are rounded to 8 bits in groups of 32 where these divide the columns."""
        b, n = self.b, self.c.experts
        t = self.g.tensor(name, (n, rows, columns))
        if t.kind not in BLOCKS and columns % 32:
            return b.op("luthier::ExpertProduct", x, chosen, b.const(name, t.numpy()), name=f"{name}.product")
        w = replace(t, shape=(n * rows, columns)).grouped() if t.kind in BLOCKS else round_to_bytes(t.numpy().reshape(n * rows, columns))
        q, zero, bits = w.q, w.zero, 4 if w.bits == 4 else 8
        if q.dtype == np.int8:
            q, zero = (q.astype(np.int16) + 128).astype(np.uint8), zero + 128
        raw = pack_experts(q, bits).reshape(n, rows, -1)
        ins = [x, chosen, b.const(f"{name}.bits", raw), b.const(f"{name}.scale", w.scale.astype(np.float16).reshape(n, rows, -1))]
        if w.offset is not None:
            ins.append(b.const(f"{name}.offset", w.offset.astype(np.float16).reshape(n, rows, -1)))
        return b.op("luthier::ExpertMatMul", *ins, name=name, bits=bits, group=w.group, zero=zero)

    def queries_keys_values(self, c: LlamaConfig, h: Value, p: str) -> Value:
        """[S, (heads + 2 kv_heads) head], with biases and norms where the file has them."""
        b, g = self.b, self.g
        kv = c.kv_heads * c.head
        sizes = (c.heads * c.head, kv, kv)
        if self.arch.joined:
            parts = [self.weight(p + "attn_qkv.weight", sum(sizes), c.width)]
        else:
            parts = [self.weight(p + f"attn_{n}.weight", rows, c.width, heads) for n, rows, heads in zip("qkv", sizes, (c.heads, c.kv_heads, 0), strict=True)]
        made = self.product(h, parts, p + "qkv")
        qkv = made[0] if len(made) == 1 else b.op("Concat", *made, axis=-1)
        if any(p + f"attn_{n}.bias" in g.tensors for n in "qkv"):
            bias = [g.tensor(p + f"attn_{n}.bias", (rows,)).numpy() for n, rows in zip("qkv", sizes, strict=True)]
            if self.arch.pairs:
                bias[:2] = [halves(v[:, None], n, c.head)[:, 0] for v, n in zip(bias[:2], (c.heads, c.kv_heads), strict=True)]
            qkv = b.op("Add", qkv, b.const(p + "qkv.bias", np.concatenate(bias)))
        if p + "attn_q_norm.weight" not in g.tensors:
            return qkv
        ends = np.cumsum([0, *sizes])
        out = []
        for k, n in enumerate("qkv"):
            v = b.op("Slice", qkv, b.ints(int(ends[k])), b.ints(int(ends[k + 1])), b.ints(1))
            if n != "v":
                scale = g.tensor(p + f"attn_{n}_norm.weight", (c.head,)).numpy()
                if self.arch.pairs:
                    scale = halves(scale[:, None], 1, c.head)[:, 0]
                v = b.op("Reshape", v, b.ints(-1, sizes[k] // c.head, c.head))
                v = b.op("RMSNormalization", v, b.const(p + f"{n}_norm", scale), axis=-1, epsilon=c.epsilon)
                v = b.op("Reshape", v, b.ints(-1, sizes[k]))
            out.append(v)
        return b.op("Concat", *out, axis=-1)

    def widened(self, x: Value, heads: int, wide: int) -> Value:
        """[S, heads * head] with zeros after each half of a head: heads of ``wide`` numbers, as the kernels of the cache take them."""
        b, half = self.b, self.c.head // 2
        x = b.op("Reshape", x, b.ints(-1, heads, 2, half))
        return b.op("Reshape", b.op("Pad", x, b.ints(0, 0, 0, 0, 0, 0, 0, wide // 2 - half)), b.ints(-1, heads * wide))

    def narrowed(self, x: Value, heads: int, wide: int) -> Value:
        """The inverse of :meth:`widened`."""
        b, half = self.b, self.c.head // 2
        x = b.op("Slice", b.op("Reshape", x, b.ints(-1, heads, 2, wide // 2)), b.ints(0), b.ints(half), b.ints(3))
        return b.op("Reshape", x, b.ints(-1, heads * self.c.head))

    def graph(self) -> Graph:
        b, c, g = self.b, self.c, self.g
        wide = -(-c.head // 8) * 8
        rows = var("S", lo=1)
        kind = f16 if self.cache_bits == 16 else i8
        layers = [c.layer(i) for i in range(c.layers)]
        caches = [b.input(f"cache.{i}", kind, [2, own.kv_heads, self.capacity, wide]) for i, own in enumerate(layers)]
        scales = [] if kind is f16 else [b.input(f"cache.{i}.scale", f32, [2, own.kv_heads, self.capacity]) for i, own in enumerate(layers)]
        tokens, pos = b.input("tokens", i64, [rows]), b.input("pos", i64, [1])
        last = None if self.all_logits else b.input("last", i64, [1])
        angles, size = rope_angles(g, self.capacity, c.head, c.rope_base, c.context)
        angles = np.pad(angles, ((0, 0), (0, (wide - c.head) // 2)))
        cos, sin = b.const("cos", (np.cos(angles) * size).astype(np.float32)), b.const("sin", (np.sin(angles) * size).astype(np.float32))
        emb = g.tensor("token_embd.weight", (c.vocabulary, c.width))
        x = self.embedding(emb, tokens)
        if self.arch.scaled:
            x = b.op("Mul", x, b.const("embedding.size", np.array(c.width**0.5, np.float32)))
        for i, c in enumerate(layers):
            p = f"blk.{i}."
            h = self.norm(x, p + "attn_norm.weight")
            qkv = self.queries_keys_values(c, h, p)
            if wide != c.head:
                qkv = self.widened(qkv, c.heads + 2 * c.kv_heads, wide)
            own = scales[i : i + 1]
            heads = {"heads": c.heads, "kv_heads": c.kv_heads}
            cache, q, *own = b.ops("luthier::RotateIntoCache", 2 + len(own), caches[i], qkv, cos, sin, pos, *own, **heads, scale=c.head**-0.5, name=p + "rotate")
            a = b.op("luthier::CachedAttention", cache, q, pos, *own, **heads, window=c.window, name=p + "attention")
            if wide != c.head:
                a = self.narrowed(a, c.heads, wide)
            y = self.product(a, [self.weight(p + "attn_output.weight", c.width, c.heads * c.head)], p + "attn_output")[0]
            if p + "attn_output.bias" in g.tensors:
                y = b.op("Add", y, b.const(p + "attn_output.bias", g.tensor(p + "attn_output.bias", (c.width,)).numpy()))
            x = b.op("Add", y, x)
            h = self.norm(x, p + "ffn_norm.weight")
            x = b.op("Add", self.experts(c, h, p) if c.experts else self.feed_forward(h, p, c.hidden), x)
        if last is not None:
            x = b.op("Gather", x, last, axis=0)
        x = self.norm(x, "output_norm.weight")
        name = "output.weight" if "output.weight" in g.tensors else "token_embd.weight"
        b.output("logits", self.product(x, [self.stored(name, c.vocabulary, c.width)], "output")[0])
        return b.graph()


def llama_graph(
    g: GGUF, capacity: int, exact: bool = False, all_logits: bool = False, cache_bits: int = 16, requantize: Requantize | None = None,
) -> Graph:  # fmt: skip
    """The model as a graph. ``capacity``: positions of the cache; ``exact``: activations in f32 instead of 8 bits; ``all_logits``:
    logits of every row; ``cache_bits``: 16, or 8 with a scale for each row of a head; ``requantize``: other weights for the layers' matrices
    (:mod:`luthier.importers.gguf.requantize`). Raises InvalidModel."""
    return _Llama(g, capacity, exact, all_logits, cache_bits, requantize).graph()
